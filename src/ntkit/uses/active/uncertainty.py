"""Strategies that look at one point's prediction at a time: baselines, and the ones that people use."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ntkit.solve.losses import CrossEntropy, Loss
from ntkit.uses.active.picks import Picked, drawn_by_power, one_after_the_other, require_power
from ntkit.uses.active.strategy import Round, Strategy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Random(Strategy):
    """Any point, all alike. The network is not looked at."""

    def choose(self, now: Round) -> Picked:  # noqa: D102
        scores = torch.rand(len(now.candidates), generator=now.generator, dtype=torch.float64)
        return _best(scores, now)


@dataclass(frozen=True)
class Uncertainty(Strategy):
    """The points whose prediction is least clear, one by one.

    Attributes:
        loss: that of the network: what its outputs say about the classes.
    """

    loss: Loss = field(default_factory=CrossEntropy)

    @abstractmethod
    def scores(self, probabilities: Tensor) -> Tensor:
        """Higher is less clear, (n,), for (n, C)."""

    def choose(self, now: Round) -> Picked:  # noqa: D102
        return _best(self.scores(self.loss.probabilities(now.outputs()[now.candidates])), now)


@dataclass(frozen=True)
class Entropy(Uncertainty):
    """-sum p log p, in nats."""

    def scores(self, probabilities: Tensor) -> Tensor:  # noqa: D102
        return torch.special.entr(probabilities).sum(1)


@dataclass(frozen=True)
class LeastConfidence(Uncertainty):
    """1 - max p."""

    def scores(self, probabilities: Tensor) -> Tensor:  # noqa: D102
        return 1 - probabilities.amax(1)


@dataclass(frozen=True)
class Margin(Uncertainty):
    """1 - (p of the likeliest class - p of the next)."""

    def scores(self, probabilities: Tensor) -> Tensor:  # noqa: D102
        first, second = probabilities.topk(2, 1).values.unbind(1)
        return 1 - (first - second)


@dataclass(frozen=True)
class PowerMargin(Margin):
    """Points drawn with probabilities (1 - margin)^beta (Kirsch et al. 2023).

    Attributes:
        beta: the power; 0 is at random.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the loss and the power.

        Raises:
            InputError: if the loss is none, or the power is negative or no number.
        """
        super().__post_init__()
        require_power(self.beta)

    def choose(self, now: Round) -> Picked:  # noqa: D102
        scores = self.scores(self.loss.probabilities(now.outputs()[now.candidates]))
        places = drawn_by_power(scores, self.beta, now.size, now.generator)
        return Picked(now.candidates[places], one_after_the_other(scores, places))


def _best(scores: Tensor, now: Round) -> Picked:
    places = scores.sort(descending=True, stable=True).indices[: now.size]
    return Picked(now.candidates[places], one_after_the_other(scores, places))
