"""One JSON file for each large run; a run that is repeated replaces its own file."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import environment

RESULTS = Path(__file__).parent / "results"


def record(name: str, found: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write what was found, with the machine it was found on."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    described = {"run": name, "environment": environment(torch.get_num_threads(), "cpu"), **found}
    text = json.dumps(described, indent=1)
    flat = re.sub(r"\[\s*([^\[\]{}\"]*?)\s*\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    path.write_text(flat + "\n")  # a list of numbers on one line
    return path


def peak_mb(who: int = resource.RUSAGE_SELF) -> float:
    """Largest resident memory so far, in MB of 2^20 bytes, torch included."""
    return round(resource.getrusage(who).ru_maxrss / 1024, 1)
