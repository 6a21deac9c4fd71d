"""Recording learning paths through any training loop."""

from __future__ import annotations

import json
import os
import struct
import time
import weakref
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.solve.losses import require_classes
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import architecture, content, describe
from ntkit.uses.dynamics.looking import as_step, check_independent, said
from ntkit.uses.dynamics.paths import Paths
from ntkit.uses.dynamics.schedules import Every, Schedule

if TYPE_CHECKING:
    from ntkit.tangent.readout import Select

VERSION = 1
# Examples of one forward pass.
BATCH = 256
# Seconds after which what has been written is forced through the system's cache to the disk.
SYNCED = 1.0
# Of one record: its step, and the checksum of all of it.
_STEP, _SUM = struct.Struct("<q"), struct.Struct("<I")


class PathRecorder:
    """Notes what a network says about some probes, in evaluation mode, while it is trained.

        recorder = PathRecorder(x_probe, labels=y_probe, folder="paths")
        recorder.record(model, 0)
        for step, (x, y) in enumerate(loader, 1):
            ...  # any training step
            recorder.record(model, step)

    With a folder every record is with the system when `record` returns: a run that is killed or crashes loses none, a
    machine whose power fails may lose the last second's. A new recorder on the same folder goes on from there. Model,
    training mode and random numbers are left as they are.
    """

    def __init__(
        self,
        x: Any,
        *,
        labels: Tensor | None = None,
        folder: str | os.PathLike[str] | None = None,
        schedule: Schedule | None = None,
        select: Select | None = None,
    ) -> None:
        """Look at the probes, and at what the folder holds.

        Args:
            x: the n probes.
            labels: classes that they are trained to, or were given, (n,).
            folder: to keep the records in; None for memory alone.
            schedule: when to look; after every step by default.
            select: takes the (n, C) logits out of the network's output, if it is not a tensor.

        Raises:
            InputError: if labels do not fit.
            StoreError: if the folder holds records of other probes, labels or another `select`, or cannot be read or
                written.
        """
        self._examples = Examples(x)
        classes = None if labels is None else torch.as_tensor(labels).cpu()
        if classes is not None and classes.is_floating_point():
            raise InputError(f"labels are classes, whole numbers: got {classes.dtype}")
        self._labels = None if classes is None else classes.long()
        if self._labels is not None and self._labels.shape != (len(self._examples),):
            raise InputError(f"labels are {len(self._examples)} classes: got shape {tuple(self._labels.shape)}")
        self.schedule = Every() if schedule is None else schedule
        self._select = select
        self._digest = content(self._examples)
        self._steps: list[int] = []
        self._records: list[Tensor] = []
        self._architecture: str | None = None
        self._known: weakref.ref[nn.Module] | None = None
        self._aside: list[Paths] = []
        self._synced = -SYNCED
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None and (self._folder / "probes.json").exists():
            self._resume(self._folder)
        elif self._folder is not None and (self._folder / "records.bin").exists():
            raise StoreError(
                f"{self._folder} holds records.bin without probes.json, which says what they are of: restore it, or "
                "take another folder"
            )

    def __len__(self) -> int:
        """Number of records."""
        return len(self._steps)

    @property
    def last(self) -> int | None:
        """The last step that was recorded."""
        return self._steps[-1] if self._steps else None

    def record(self, model: nn.Module, step: int) -> bool:
        """Note what the network says, if the schedule has it so. Cost: a forward pass of the n probes.

        Args:
            model: in whatever mode.
            step: number of updates done.

        Returns:
            Whether it was due.

        Raises:
            InputError: if the step is no number or not after the last one (see `rewind`), the network fails on the
                probes, has one output alone, or a label is none of its classes.
            ModelError: if the model is another one than before, mixes its examples, or its outputs are not finite.
            StoreError: if it cannot be written; what was recorded is kept.
        """
        step = as_step(step)
        if not self.schedule.due(step):
            return False
        if self.last is not None and step <= self.last:
            raise InputError(
                f"step {step} is not after step {self.last}, the last of the records. For a run that goes on from an "
                f"earlier checkpoint call rewind({step}); for a new run take another folder"
            )
        self._check(model)
        found = said(model, self._examples, self._select, BATCH).float().cpu()
        if len(found) != len(self._examples):
            raise ModelError(f"the network gives {len(found)} outputs for {len(self._examples)} probes")
        if self._records and found.shape != self._records[0].shape:
            raise ModelError(f"the network has {found.shape[1]} outputs, before it had {self._records[0].shape[1]}")
        if not self._records:  # now, and not when training is over
            require_classes(found.shape[1])
            check_classes(self._labels, found.shape[1])
        if not bool(torch.isfinite(found).all()):
            raise ModelError(
                f"outputs at step {step} are not finite: training has diverged. The {len(self)} records before are kept"
            )
        if self._folder is not None:
            self._write(self._folder, step, found)
        self._steps.append(step)
        self._records.append(found)
        return True

    def paths(self) -> Paths:
        """What has been recorded.

        Raises:
            InputError: if nothing has.
        """
        if not self._steps:
            raise InputError("nothing has been recorded yet")
        return self._paths(self._steps, self._records)

    def rewind(self, step: int) -> None:
        """Go on from an earlier checkpoint: records of this step and later are set aside, each time anew (`replaced`).

        Raises:
            StoreError: if the files cannot be changed.
        """
        step = as_step(step)
        keep = sum(done < step for done in self._steps)
        if keep == len(self._steps):
            return
        if self._folder is None:
            self._aside.append(self._paths(self._steps[keep:], self._records[keep:]))
        else:
            path = self._folder / "records.bin"
            size = _size(tuple(self._records[0].shape))
            try:
                whole = path.read_bytes()
                aside = _unused(self._folder, f"replaced-{self._steps[keep]}-{self._steps[-1]}")
                part = aside.with_suffix(".part")
                with part.open("wb") as file:
                    file.write(whole[keep * size :])
                    _force(file)
                part.replace(aside)
                os.truncate(path, keep * size)
            except OSError as error:
                raise StoreError(f"{path}: cannot set records aside ({error})") from error
        del self._steps[keep:], self._records[keep:]

    def replaced(self) -> tuple[Paths, ...]:
        """All that `rewind` has ever set aside, the oldest first: branches that training has left.

        Raises:
            StoreError: if a file is damaged.
        """
        if self._folder is None:
            return tuple(self._aside)
        files = sorted(self._folder.glob("replaced-*.bin"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        if not files:
            return ()
        shape = tuple(json.loads((self._folder / "probes.json").read_text())["shape"])
        return tuple(self._paths(*_read(path, shape)[:2]) for path in files)

    def _paths(self, steps: list[int], records: list[Tensor]) -> Paths:
        return Paths(torch.tensor(steps), torch.stack(records), self._labels, self._digest)

    def _check(self, model: nn.Module) -> None:
        if self._known is not None and model is self._known():
            return
        check_independent(model)
        found = architecture(model)
        if self._architecture is not None and found != self._architecture:
            raise ModelError(
                "this is another network than the one whose paths are recorded here (its modules differ): take another "
                "folder, or a new recorder"
            )
        self._architecture, self._known = found, weakref.ref(model)

    def _write(self, folder: Path, step: int, found: Tensor) -> None:
        body = _STEP.pack(step) + found.contiguous().numpy().astype("<f4").tobytes()
        path = folder / "records.bin"
        try:
            if not self._steps:
                folder.mkdir(parents=True, exist_ok=True)
                facts = {
                    "version": VERSION, **self._facts(), "architecture": self._architecture, "shape": list(found.shape)
                }  # fmt: skip
                part = folder / "probes.json.part"
                part.write_text(json.dumps(facts))
                part.replace(folder / "probes.json")
                path.write_bytes(b"")
            with path.open("ab") as file:
                before = file.tell()
                try:
                    file.write(body + _SUM.pack(zlib.crc32(body)))
                    file.flush()
                    if time.monotonic() - self._synced >= SYNCED:
                        _force(file)
                        self._synced = time.monotonic()
                except OSError:
                    os.truncate(path, before)  # half a record, as of a full disk
                    raise
        except OSError as error:
            raise StoreError(f"{path}: cannot write the record ({error}). Those before are kept") from error

    def _facts(self) -> dict[str, Any]:
        """What has to be the same for a recording to go on."""
        labels = None if self._labels is None else self._labels.tolist()
        return {"probes": self._digest, "labels": labels, "select": describe(self._select)}

    def _resume(self, folder: Path) -> None:
        try:
            facts = json.loads((folder / "probes.json").read_text())
        except (OSError, ValueError) as error:
            raise StoreError(f"{folder}: cannot read the recorded paths ({error})") from error
        if facts.get("version") != VERSION:
            raise StoreError(f"{folder}: paths of format {facts.get('version')}, this is {VERSION}")
        own = self._facts()
        facts.setdefault("select", own["select"])  # recordings of before it was compared do not have it
        for name, mine in own.items():
            if facts[name] != mine:
                raise StoreError(f"{folder} holds paths of other {name}: take another folder, or the same {name}")
        shape = tuple(facts["shape"])
        path = folder / "records.bin"
        if path.exists():
            self._steps, self._records, end = _read(path, shape)
            if end < path.stat().st_size:  # killed while writing: that record has not happened
                os.truncate(path, end)
        self._architecture = facts["architecture"]


def check_classes(labels: Tensor | None, classes: int) -> None:
    """Refuse labels that are none of the network's classes.

    Raises:
        InputError: saying which there are.
    """
    if labels is not None and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise InputError(
            f"labels are classes from 0 to {classes - 1}, the network has {classes} outputs: got "
            f"{int(labels.min())} to {int(labels.max())}"
        )


def _size(shape: tuple[int, ...]) -> int:
    return _STEP.size + 4 * shape[0] * shape[1] + _SUM.size


def _read(path: Path, shape: tuple[int, ...]) -> tuple[list[int], list[Tensor], int]:
    """Steps and logits of all whole records, and how many bytes they take."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot read the recorded paths ({error})") from error
    size, steps, records = _size(shape), [], []
    for start in range(0, len(raw) - size + 1, size):
        body, tail = raw[start : start + size - _SUM.size], raw[start + size - _SUM.size : start + size]
        if _SUM.unpack(tail)[0] != zlib.crc32(body):
            raise StoreError(
                f"{path}: record {start // size} is damaged. Restore the file from a copy, or cut it off after {start} "
                "bytes to go on from there"
            )
        steps.append(_STEP.unpack(body[: _STEP.size])[0])
        values = np.frombuffer(body[_STEP.size :], "<f4").reshape(shape)
        records.append(torch.from_numpy(values.astype(np.float32)))
    return steps, records, len(steps) * size


def _unused(folder: Path, name: str) -> Path:
    """A file of this name, with a number where there is one already."""
    path, number = folder / f"{name}.bin", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.bin"
    return path


def _force(file: IO[bytes]) -> None:
    """Through the system's cache, to the disk."""
    file.flush()
    os.fsync(file.fileno())
