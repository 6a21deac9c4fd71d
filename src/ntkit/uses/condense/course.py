"""Where a run of inducing points stands, and what was seen on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.uses.condense.support import Support

if TYPE_CHECKING:
    from ntkit.uses.condense.regression import Score


@dataclass(frozen=True)
class Recorded:
    """One look at the points.

    Attributes:
        step: steps taken before it.
        batch_loss: L on the batch of the last step, before that step; NaN at the start.
        loss: L on the examples held out; NaN without any.
        accuracy: on them; NaN without any.
        ridge: the absolute lambda.
        condition: of K_ss + lambda I.
    """

    step: int
    batch_loss: float
    loss: float
    accuracy: float
    ridge: float
    condition: float


@dataclass(eq=False)
class Course:
    """The state of a run: all that a later step depends on.

    Attributes:
        x: points, which the optimizer moves.
        y: their targets.
        optimizer: with its state.
        generator: of the batches, with its state.
        step: steps taken.
        loss: of the last batch.
        records: so far.
        best: step and points of the best accuracy so far.
    """

    x: Tensor
    y: Tensor
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0
    loss: float = math.nan
    records: list[Recorded] = field(default_factory=list)
    best: tuple[int, Support] | None = None

    @property
    def looked(self) -> int:
        """The last recorded step; -1 without any."""
        return self.records[-1].step if self.records else -1

    def support(self) -> Support:
        """The points as they are, in memory of their own."""
        return Support(self.x.detach().clone(), self.y.detach().clone())

    def record(self, score: Score | None, ridge: float, condition: float) -> None:
        """Write down a look, and keep the points if they are the best so far."""
        loss, accuracy = (math.nan, math.nan) if score is None else (score.loss, score.accuracy)
        if score is not None and accuracy > max((r.accuracy for r in self.records), default=-1.0):
            self.best = self.step, self.support()
        self.records.append(Recorded(self.step, self.loss, loss, accuracy, ridge, condition))

    def waited(self, patience: int | None) -> bool:
        """Whether the last so many looks were none of them the best."""
        if patience is None or self.best is None:
            return False
        return sum(found.step > self.best[0] for found in self.records) >= patience
