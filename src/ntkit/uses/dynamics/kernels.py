"""The tangent kernel through training: how far and how fast it moves, and what it turns towards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.spectrum import alignment, cka, drift, spectrum
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, Readout
from ntkit.tangent.untouched import evaluating
from ntkit.uses.dynamics.schedules import Logarithmic, Schedule


@dataclass(frozen=True, eq=False)
class KernelPath:
    """Facts about the kernel on some examples at T steps of training, all (T,) but for the eigenvalues.

    Attributes:
        steps: numbers of updates done.
        drift: ||K_t - K_0|| / ||K_0||, Frobenius.
        cosine: cosine distance of K_t from K_0: what has changed but for the scale.
        velocity: ||K_t - K_s|| / (||K_s|| (t - s)) since the record before; 0 for the first.
        similarity: centred kernel alignment of K_t and K_0 (CKA).
        alignment: centred alignment with the labels; NaN where there are none.
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

    Memory: 8 n^2 bytes for each record (n^2 C^2 for a full kernel).
    """

    def __init__(
        self,
        x: Any,
        *,
        labels: Tensor | None = None,
        readout: Readout | None = None,
        trace: bool = True,
        schedule: Schedule | None = None,
    ) -> None:
        """Take the examples.

        Args:
            x: n examples; a few hundred say what all would.
            labels: classes (n,) or targets (n, C), for the alignment.
            readout: which kernel; with all logits and `trace` the trace kernel.
            trace: whether to take the mean over the outputs, or the full kernel.
            schedule: when to look; ever more rarely by default.
        """
        self._x, self._labels = x, labels
        self._readout, self._trace = Logits() if readout is None else readout, trace
        self.schedule = Logarithmic(10) if schedule is None else schedule
        self.steps: list[int] = []
        self.matrices: list[Tensor] = []
        self.scalars = 1

    @property
    def last(self) -> int | None:
        """The last step that was recorded."""
        return self.steps[-1] if self.steps else None

    def record(self, model: nn.Module, step: int) -> bool:
        """Compute the kernel, if the schedule has it so; whether it had.

        The model may be in training mode: it is looked at in evaluation mode, and left as it is.

        Raises:
            InputError: if the step is not after the last one.
            ModelError: if the network has no finite kernel.
        """
        if not self.schedule.due(step):
            return False
        if self.last is not None and step <= self.last:
            raise InputError(f"step {step} is not after step {self.last}, the last of the records: call rewind({step})")
        with evaluating(model):
            kernel = TangentKernel(linearize(model, readout=self._readout), self._x, trace=self._trace)
            self.matrices.append(kernel.dense().double().cpu())
        self.scalars = kernel.scalars
        self.steps.append(step)
        return True

    def rewind(self, step: int) -> None:
        """Forget records of this step and later, for a run that goes on from an earlier checkpoint."""
        keep = sum(done < step for done in self.steps)
        del self.steps[keep:], self.matrices[keep:]

    def path(self, eigenvalues: int = 10) -> KernelPath:
        """What the matrices say. Cost: an eigendecomposition for each.

        Raises:
            InputError: if nothing has been recorded, or labels do not fit.
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
        first, before, then = DenseKernel(self.matrices[0]), None, 0
        for step, matrix in zip(self.steps, self.matrices, strict=True):
            now = DenseKernel(matrix)
            moved, seen = drift(first, now), spectrum(now)
            rows["drift"].append(moved.relative_change)
            rows["cosine"].append(moved.cosine_distance)
            rows["velocity"].append(0.0 if before is None else drift(before, now).relative_change / (step - then))
            rows["similarity"].append(cka(first, now, scalars=self.scalars))
            rows["alignment"].append(self._aligned(now))
            rows["effective_rank"].append(seen.participation_ratio)
            rows["trace"].append(seen.trace)
            largest.append(seen.eigenvalues[:eigenvalues])
            before, then = now, step
        facts = {name: torch.tensor(column, dtype=torch.float64) for name, column in rows.items()}
        return KernelPath(steps=torch.tensor(self.steps), largest=torch.stack(largest), **facts)

    def _aligned(self, kernel: DenseKernel) -> float:
        if self._labels is None:
            return float("nan")
        labels = self._labels
        points = labels if labels.is_floating_point() else torch.nn.functional.one_hot(labels.long()).double()
        return alignment(kernel, points).centred
