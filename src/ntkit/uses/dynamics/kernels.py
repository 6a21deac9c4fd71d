"""The tangent kernel through training: how far and how fast it moves, and what it turns towards."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.spectrum import alignment, cka, drift, spectrum
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import architecture, content, describe
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, Readout
from ntkit.tangent.untouched import evaluating
from ntkit.uses.dynamics.looking import as_step
from ntkit.uses.dynamics.schedules import Logarithmic, Schedule

VERSION = 1


@dataclass(frozen=True, eq=False)
class KernelPath:
    """Facts about the kernel on some examples at T steps of training, all (T,) but for the eigenvalues.

    Attributes:
        steps: numbers of updates done.
        drift: ||K_t - K_0|| / ||K_0||, Frobenius; NaN, as all that is relative, from the kernel of a network that has
            died, which is zero.
        cosine: cosine distance of K_t from K_0: what has changed but for the scale.
        velocity: ||K_t - K_s|| / (||K_s|| (t - s)) since the record before; 0 for the first.
        similarity: centred kernel alignment of K_t and K_0 (CKA); NaN where one of them is constant.
        alignment: centred alignment with the labels; NaN where there are none, where all are the same or the kernel is
            constant, and for a kernel of several scalars that are not all the logits.
        effective_rank: participation ratio of the eigenvalues.
        trace: of the kernel.
        largest: the largest eigenvalues, (T, k).
    """

    steps: Tensor
    drift: Tensor
    cosine: Tensor
    velocity: Tensor
    similarity: Tensor
    alignment: Tensor
    effective_rank: Tensor
    trace: Tensor
    largest: Tensor


class KernelRecorder:
    """Computes the kernel on some examples now and then, live or from checkpoints, and keeps the matrices.

    With a folder every matrix is on disk when `record` returns, and a new recorder on the same folder goes on from
    there. Memory and disk: 8 n^2 bytes for each record (n^2 C^2 for a full kernel).
    """

    def __init__(
        self,
        x: Any,
        *,
        labels: Tensor | None = None,
        readout: Readout | None = None,
        trace: bool = True,
        schedule: Schedule | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """Take the examples, and look at what the folder holds.

        Args:
            x: n examples; a few hundred say what all would.
            labels: classes (n,) or targets (n,) or (n, C), for the alignment.
            readout: which kernel; with all logits and `trace` the trace kernel.
            trace: whether to take the mean over the outputs, or the full kernel.
            schedule: when to look; ever more rarely by default.
            folder: to keep the matrices in; None for memory alone.

        Raises:
            InputError: if there are not as many labels as examples, or they are neither classes nor targets of what
                the folder holds.
            StoreError: if the folder holds other kernels, or cannot be read.
        """
        self._x, self._labels = Examples(x), labels
        if labels is not None and (labels.ndim not in (1, 2) or len(labels) != len(self._x)):
            raise InputError(f"labels are those of {len(self._x)} examples: got shape {tuple(labels.shape)}")
        if labels is not None and not labels.is_floating_point() and (labels.ndim != 1 or int(labels.min()) < 0):
            raise InputError(
                f"labels that are whole numbers are classes ({len(self._x)},) from 0 on: got shape "
                f"{tuple(labels.shape)}, the least {int(labels.min())}"
            )
        self._readout, self._trace = Logits() if readout is None else readout, trace
        self.schedule = Logarithmic(10) if schedule is None else schedule
        self.steps: list[int] = []
        self.matrices: list[Tensor] = []
        self.aside: list[tuple[int, Tensor]] = []
        self.scalars = 1
        self._architecture: str | None = None
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None and (self._folder / "kernels.json").exists():
            self._resume(self._folder)
        elif self._folder is not None and any(self._folder.glob("kernel-*.npz")):
            raise StoreError(
                f"{self._folder} holds kernels without kernels.json, which says what they are of: restore it, or take "
                "another folder"
            )

    @property
    def last(self) -> int | None:
        """The last step that was recorded."""
        return self.steps[-1] if self.steps else None

    def record(self, model: nn.Module, step: int) -> bool:
        """Compute the kernel, if the schedule has it so; whether it had.

        The model may be in training mode: it is looked at in evaluation mode, and left as it is.

        Raises:
            InputError: if the step is no number or not after the last one, the network fails on the examples, or
                labels do not fit its outputs.
            ModelError: if the network has no finite kernel, or is another one than before.
            StoreError: if the matrix cannot be written; those before are kept.
        """
        step = as_step(step)
        if not self.schedule.due(step):
            return False
        if self.last is not None and step <= self.last:
            raise InputError(f"step {step} is not after step {self.last}, the last of the records: call rewind({step})")
        found = architecture(model)
        if self._architecture is not None and found != self._architecture:
            raise ModelError(
                "this is another network than the one whose kernels are recorded here (its modules differ): take "
                "another folder, or a new recorder"
            )
        with evaluating(model):
            kernel = TangentKernel(linearize(model, readout=self._readout), self._x.data, trace=self._trace)
            matrix = kernel.dense().double().cpu()
        self._check_labels(kernel.scalars)
        self._architecture, self.scalars = found, kernel.scalars
        if self._folder is not None:
            self._write(self._folder, step, matrix)
        self.matrices.append(matrix)
        self.steps.append(step)
        return True

    def rewind(self, step: int) -> None:
        """Go on from an earlier checkpoint: records of this step and later are set aside, files as `replaced-*`.

        Without a folder they are in `aside`.

        Raises:
            StoreError: if the files cannot be renamed.
        """
        step = as_step(step)
        keep = sum(done < step for done in self.steps)
        if self._folder is not None:
            for done in reversed(self.steps[keep:]):  # so that a crash leaves a beginning
                path, number = _file(self._folder, done), 1
                while (aside := self._folder / f"replaced-{number}-{path.name}").exists():
                    number += 1
                try:
                    path.rename(aside)
                except OSError as error:
                    raise StoreError(f"{path}: cannot set the kernel aside ({error})") from error
        else:
            self.aside.extend(zip(self.steps[keep:], self.matrices[keep:], strict=True))
        del self.steps[keep:], self.matrices[keep:]

    def path(self, eigenvalues: int = 10) -> KernelPath:
        """What the matrices say. Cost: an eigendecomposition for each.

        Raises:
            InputError: if nothing has been recorded.
        """
        if not self.steps:
            raise InputError("nothing has been recorded yet")
        rows: dict[str, list[float]] = {
            name: []
            for name in (
                "drift", "cosine", "velocity", "similarity", "alignment", "effective_rank", "trace",
            )
        }  # fmt: skip
        largest = []
        before, then = self.matrices[0], self.steps[0] - 1
        first = DenseKernel(before)
        for step, matrix in zip(self.steps, self.matrices, strict=True):
            now = DenseKernel(matrix)
            seen = spectrum(now) if bool(matrix.any()) else None
            rows["drift"].append(_moved(self.matrices[0], matrix))
            rows["cosine"].append(_cosine(lambda now=now: drift(first, now).cosine_distance))
            rows["velocity"].append(_moved(before, matrix) / (step - then))
            rows["similarity"].append(_cosine(lambda now=now: cka(first, now, scalars=self.scalars)))
            rows["alignment"].append(self._aligned(now))
            rows["effective_rank"].append(math.nan if seen is None else seen.participation_ratio)
            rows["trace"].append(0.0 if seen is None else seen.trace)
            largest.append((matrix.new_zeros(len(matrix)) if seen is None else seen.eigenvalues)[:eigenvalues])
            before, then = matrix, step
        facts = {name: torch.tensor(column, dtype=torch.float64) for name, column in rows.items()}
        return KernelPath(steps=torch.tensor(self.steps), largest=torch.stack(largest), **facts)

    def _facts(self) -> dict[str, Any]:
        return {"examples": content(self._x), "readout": describe(self._readout), "trace": self._trace}

    def _write(self, folder: Path, step: int, matrix: Tensor) -> None:
        path = _file(folder, step)
        part = path.with_suffix(".part")
        try:
            if not (folder / "kernels.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                facts = {"version": VERSION, "architecture": self._architecture, "scalars": self.scalars}
                first = folder / "kernels.json.part"
                first.write_text(json.dumps({**facts, **self._facts()}))
                first.replace(folder / "kernels.json")
            with part.open("wb") as file:
                np.savez(file, matrix=matrix.numpy())  # an archive, which has a checksum
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise StoreError(f"{path}: cannot write the kernel ({error}). Those before are kept") from error

    def _resume(self, folder: Path) -> None:
        try:
            facts = json.loads((folder / "kernels.json").read_text())
        except (OSError, ValueError) as error:
            raise StoreError(f"{folder}: cannot read the recorded kernels ({error})") from error
        if facts.get("version") != VERSION:
            raise StoreError(f"{folder}: kernels of format {facts.get('version')}, this is {VERSION}")
        for name, mine in self._facts().items():
            if facts[name] != mine:
                raise StoreError(f"{folder} holds kernels with other {name}: take another folder, or the same {name}")
        for path in sorted(folder.glob("kernel-*.npz")):
            try:
                with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                    self.matrices.append(torch.from_numpy(file["matrix"]))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise StoreError(
                    f"{path} is damaged ({error}): restore it from a copy, or delete it and those after it"
                ) from error
            self.steps.append(int(path.stem.removeprefix("kernel-")))
        self._architecture, self.scalars = facts["architecture"], facts["scalars"]
        self._check_labels(self.scalars)

    @property
    def _all_logits(self) -> bool:
        """Whether rows of the kernel are those of all the logits, in their order."""
        return isinstance(self._readout, Logits) and not self._trace

    def _check_labels(self, scalars: int) -> None:
        if self._labels is None or not self._all_logits:
            return
        if self._labels.is_floating_point():
            fits = self._labels.reshape(len(self._labels), -1).shape[1] == scalars
        else:
            fits = scalars == 1 or int(self._labels.max()) < scalars
        if not fits:
            got = f"shape {tuple(self._labels.shape)}, the largest {self._labels.max().item():g}"
            raise InputError(
                f"labels of a network with {scalars} outputs: got {got}, expected classes or targets of it"
            )

    def _aligned(self, kernel: DenseKernel) -> float:
        labels = self._labels
        if labels is None or (self.scalars > 1 and not self._all_logits):
            return float("nan")  # nobody has said which targets other scalars have
        if labels.is_floating_point():
            points = labels.reshape(len(labels), -1)
        else:
            points = torch.nn.functional.one_hot(labels.long(), self.scalars if self.scalars > 1 else -1).double()
        if bool((points == points[0]).all()):
            return float("nan")
        return _cosine(lambda: alignment(kernel, points).centred)


def _moved(before: Tensor, after: Tensor) -> float:
    """||after - before|| / ||before||; NaN from zero."""
    size = float(before.norm())
    return float((after - before).norm()) / size if size else math.nan


def _cosine(measure: Callable[[], float]) -> float:
    """A cosine between matrices; NaN where a kernel is zero or constant and has none: of a network that has died."""
    try:
        return measure()
    except InputError:
        return float("nan")


def _file(folder: Path, step: int) -> Path:
    return folder / f"kernel-{step:012d}.npz"
