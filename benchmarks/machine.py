"""The machine that measures: what it is, and whether others are using it. No torch here."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import Any


def environment(threads: int, device: str) -> dict[str, Any]:
    """The machine and the software, without anything that names a person or a place."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "ntkit": version("ntkit"),
        "threads": threads,
        "device": device,
        "dtype": "float32",
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, with its family and the widest vectors where Linux tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    flags = fields.get("flags", "").split()
    vectors = next((flag for flag in ("avx512f", "avx2") if flag in flags), None)
    family = f"family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else None
    return ", ".join(part for part in (name, family, vectors) if part)


def slug(environment: dict[str, Any]) -> str:
    """A file name's part that says which machine: its processor, not its host name, which says nothing to a reader."""
    parts = [environment["cpu"].split(",")[0], f"{environment['cores']}-cores"]
    if environment["device"] != "cpu":
        parts.append(environment["device"])
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def busy_seconds() -> float | None:
    """Seconds of work done by all cores together since the machine started; None where the system does not tell."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(cores: float, patience: float) -> float | None:
    """Wait until other processes keep fewer than `cores` busy, for `patience` seconds at most; the cores at the end."""
    deadline = time.monotonic() + patience
    while True:
        before, start = busy_seconds(), time.monotonic()
        if before is None:
            return None
        time.sleep(min(1.0, patience))
        busy = ((busy_seconds() or 0.0) - before) / max(time.monotonic() - start, 1e-9)
        if busy < cores or time.monotonic() >= deadline:
            return busy
