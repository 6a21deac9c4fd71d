"""From scores to a batch: each pick changes what the next one is worth."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError

if TYPE_CHECKING:
    from ntkit.uses.active.objectives import Objective, Scene


# What has no logarithm counts as this.
TINY = 1e-300


class RedundantBatchWarning(UserWarning):
    """A batch is made of the best single points, which tell much the same."""


@dataclass(frozen=True)
class Picked:
    """A batch.

    Attributes:
        numbers: the points, in the order of picking, (size,).
        utilities: the score of every candidate when each was picked, (size, candidates); minus infinity for those that
            had been taken.
    """

    numbers: Tensor
    utilities: Tensor


class Picks(ABC):
    """A way to make a batch."""

    @abstractmethod
    def choose(
        self, objective: Objective, scene: Scene, candidates: Tensor, size: int, generator: torch.Generator
    ) -> Picked:
        """Choose points by number; the scene's posterior may be used up on the way.

        Args:
            objective: scores candidates.
            scene: where we stand.
            candidates: numbers, without those that have labels.
            size: how many; no more than there are candidates.
            generator: for what is drawn.

        Raises:
            InputError: if a score is not a number.
        """


@dataclass(frozen=True)
class Greedy(Picks):
    """The best point, then the best given that one, and so on: exact conditioning, by one update for each pick.

    A pick moves the outputs as well, where the objective looks at them, towards the label that the network thinks
    likeliest: each time by the gradient of the loss at the outputs as they are by then. (`LookAheadState` stays with
    the loss that is quadratic around the network's own outputs. For square loss that is the same; for cross-entropy it
    served batches by `MostLikelyChange` worse on digits, and no others better.) Ties go to the first.
    """

    def choose(  # noqa: D102
        self, objective: Objective, scene: Scene, candidates: Tensor, size: int, generator: torch.Generator
    ) -> Picked:
        free = torch.ones(len(candidates), dtype=torch.bool)
        numbers, utilities = [], []
        for _ in range(size):
            scores = checked(objective.scores(scene, candidates), candidates).masked_fill(~free, -torch.inf)
            place = int(scores.argmax())
            free[place] = False
            numbers.append(int(candidates[place]))
            utilities.append(scores)
            if len(numbers) == size:
                break
            if objective.reads_outputs:
                scene = after(scene, numbers[-1])
            else:
                scene.posterior.add(numbers[-1])
        return Picked(torch.tensor(numbers), torch.stack(utilities))


@dataclass(frozen=True)
class TopK(Picks):
    """The best points one by one. One alone is as good as `Greedy`; more are redundant, and a warning says so."""

    def choose(  # noqa: D102
        self, objective: Objective, scene: Scene, candidates: Tensor, size: int, generator: torch.Generator
    ) -> Picked:
        if size > 1:
            warnings.warn(
                f"the {size} points with the best scores tell much the same (on handwritten digits such batches of 50 "
                "were worse than random ones): use Greedy() unless you compare",
                RedundantBatchWarning,
                stacklevel=3,
            )
        scores = checked(objective.scores(scene, candidates), candidates)
        places = scores.sort(descending=True, stable=True).indices[:size]
        return Picked(candidates[places], one_after_the_other(scores, places))


@dataclass(frozen=True)
class Power(Picks):
    """Points drawn without replacement with probabilities score^beta (Kirsch et al. 2023): no conditioning, but spread.

    Attributes:
        beta: infinity would be `TopK`, 0 is at random.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the exponent.

        Raises:
            InputError: if it is negative or no number.
        """
        require_power(self.beta)

    def choose(  # noqa: D102
        self, objective: Objective, scene: Scene, candidates: Tensor, size: int, generator: torch.Generator
    ) -> Picked:
        scores = checked(objective.scores(scene, candidates), candidates)
        places = drawn_by_power(scores, self.beta, size, generator)
        return Picked(candidates[places], one_after_the_other(scores, places))


def after(scene: Scene, number: int) -> Scene:
    """The scene with the label of one point, which is taken to be the likeliest: its posterior is updated in place."""
    mine = torch.tensor([number])
    misfit = scene.misfit(mine, scene.outputs[mine].argmax(1))[0]
    response = scene.posterior.add(number)
    moved = response[:, 0] * misfit if scene.posterior.block == 1 else response @ misfit
    return replace(scene, outputs=scene.outputs + moved.to(scene.outputs))


def checked(scores: Tensor, numbers: Tensor) -> Tensor:
    """Scores as they are, of points by number.

    Raises:
        InputError: if one is not a number.
    """
    if not bool(torch.isfinite(scores).all()):
        bad = numbers[~torch.isfinite(scores)]
        raise InputError(
            f"the scores of {len(bad)} points are not finite, point {int(bad[0])} among them: the kernel, features or "
            "outputs have a NaN there, or are too large for their type"
        )
    return scores


def require_power(beta: float) -> None:
    """The exponent of power sampling.

    Raises:
        InputError: if it is negative, infinite or no number.
    """
    if not 0 <= beta < float("inf"):
        raise InputError(f"the exponent of power sampling: got beta={beta!r}, expected a number of at least 0")


def drawn_by_power(scores: Tensor, beta: float, size: int, generator: torch.Generator) -> Tensor:
    """Places drawn without replacement with probabilities score^beta, by Gumbel noise."""
    drawn = torch.rand(len(scores), generator=generator, dtype=torch.float64).clamp_min(TINY)
    noisy = beta * scores.clamp_min(TINY).log() - (-drawn.log()).log()
    return noisy.sort(descending=True, stable=True).indices[:size]


def one_after_the_other(scores: Tensor, places: Tensor) -> Tensor:
    """Utilities of points that were chosen by their scores alone, (size, candidates)."""
    utilities = scores.repeat(len(places), 1)
    for k in range(1, len(places)):
        utilities[k, places[:k]] = -torch.inf
    return utilities
