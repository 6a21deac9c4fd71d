"""The state of a long solve on disk: written whole, and read back only for the system that it is of."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ntkit.errors import InputError, StoreError
from ntkit.kernel.store import full_disk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ntkit.kernel.base import Kernel

# Seconds between two states on disk.
EVERY = 60.0
# Seconds after which a file that is not whole is what a killed run has left: none is that long in the writing.
STALE = 3600.0


@dataclass(frozen=True)
class State:
    """What a file holds.

    Attributes:
        parts: tensors by name.
        facts: words by name.
        bound: whether the file says which kernel it is of, and that is the one at hand.
    """

    parts: dict[str, Tensor]
    facts: dict[str, str]
    bound: bool


class Checkpoint:
    """A file that holds the state of one solve, and never half of one."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str,
        kernel: Mapping[str, str] | None,
        *,
        named: str = "right-hand side or ridge",
    ) -> None:
        """Say whose state it is; nothing is written yet.

        Args:
            path: of the file.
            name: of the system but for its kernel, see `digest`.
            kernel: what the kernel depends on, see `identity_of`; None where it does not say.
            named: what the name is of, in words.

        Raises:
            InputError: if no file can be at this place.
        """
        self.path, self.name, self.kernel = Path(path), name, None if kernel is None else dict(kernel)
        self.last, self.named = time.monotonic(), named
        folder = self.path.absolute().parent
        if self.path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"a checkpoint is a file in a folder that can be written to: got {self.path}")

    def read(self) -> State | None:
        """The state, if there is one.

        Raises:
            StoreError: if it is of another system, or damaged.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                facts = file.metadata() or {}
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{self.path} is not a checkpoint of a solve, or damaged ({error}): remove it") from error
        if facts.get("name") != self.name:
            raise StoreError(f"{self.path} belongs to another {self.named}: choose another checkpoint, or remove it")
        theirs = json.loads(facts["kernel"]) if "kernel" in facts else None
        if theirs is None or self.kernel is None:
            return State(parts, facts, False)
        other = [part for part in {**theirs, **self.kernel} if theirs.get(part) != self.kernel.get(part)]
        if other:
            raise StoreError(
                f"{self.path} belongs to another kernel (what differs: {', '.join(other)}): choose another checkpoint, "
                "or remove it"
            )
        return State(parts, facts, True)

    def write(self, parts: Mapping[str, Tensor], facts: Mapping[str, str], *, now: bool = False) -> None:
        """Write the state down, if the last time is long ago or it has to be `now`.

        Raises:
            StoreError: if the disk is full; the last state is kept.
        """
        if not now and time.monotonic() - self.last < EVERY:
            return
        bound = {} if self.kernel is None else {"kernel": json.dumps(self.kernel)}
        # not by safetensors' own hand, which does not wait for the disk and has errors of its own when it is full
        data = save({name: part.contiguous() for name, part in parts.items()}, {"name": self.name, **bound, **facts})
        self._sweep()
        # of this run alone: under one name, two of them would put each other's half in place
        partial = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.partial")
        try:
            with full_disk(self.path):
                with partial.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)
        self.last = time.monotonic()

    def _sweep(self) -> None:
        """Remove what killed runs have left half-written."""
        name = glob.escape(self.path.name)
        for pattern in (f"{name}.partial", f"{name}.{'[0-9a-f]' * 32}.partial"):
            for left in self.path.absolute().parent.glob(pattern):
                with contextlib.suppress(OSError):  # another run has done it, or its owner is somebody else
                    if time.time() - left.stat().st_mtime > STALE:
                        left.unlink()


def digest(values: Tensor, *words: float | str) -> str:
    """SHA-256 of a tensor on the CPU, and of numbers and words, to name a system by."""
    return hashlib.sha256(values.numpy().tobytes() + "".join(map(repr, words)).encode()).hexdigest()


def identity_of(kernel: Kernel) -> dict[str, str] | None:
    """What a kernel's entries depend on, where it says so. Cost: that of `Kernel.identity`."""
    try:
        return kernel.identity()
    except InputError:
        return None
