"""What makes a label worth its price: scores of candidates from the posterior and the present outputs.

Every score is that of one label more; batches are made by conditioning on each pick (`ntkit.uses.active.picks`).
Higher is better. `Omega` weighs the target points, those whose predictions matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.losses import Loss
from ntkit.uses.active.posterior import Posterior, inverse, root_of, times

# Numbers in a tensor of (targets, candidates, C).
MOST = 2**24


@dataclass(frozen=True)
class Scene:
    """What a score may look at.

    Attributes:
        posterior: the covariance after the labels and picks so far.
        outputs: the network's outputs, moved by the picks so far, (n, C).
        loss: that of the network.
        targets: numbers of the points whose predictions matter.
        weights: of each point's label in the loss, (n,); 1 by default.
        around: outputs around which the loss is quadratic, with the posterior's precisions, (n, C); None for taking
            gradients at `outputs` wherever they have moved to. For square loss both are the same.
    """

    posterior: Posterior
    outputs: Tensor
    loss: Loss
    targets: Tensor
    weights: Tensor | None = None
    around: Tensor | None = None

    def fitted(self, numbers: Tensor) -> Tensor:
        """What labels of points are compared with, (numbers, C), float64."""
        if self.around is None:
            return self.loss.fitted(self.outputs[numbers]).double()
        first, w = self.around[numbers], self.posterior.precision[numbers]
        away = (self.outputs[numbers] - first).double()
        bent = w[:, 0] * away if self.posterior.block == 1 else (w @ away[..., None])[..., 0]
        return self.loss.fitted(first).double() + (bent if self.weights is None else bent / self.weights[numbers, None])

    def misfit(self, numbers: Tensor, classes: Tensor) -> Tensor:
        """What labels of points would pull with, times their weights, (numbers, C), float64."""
        outputs = self.outputs[numbers]
        return self.weigh(self.loss.targets(classes, outputs).double() - self.fitted(numbers), numbers)

    def weigh(self, misfits: Tensor, numbers: Tensor) -> Tensor:
        """Times the weights of the labels of points."""
        return misfits if self.weights is None else self.weights[numbers][:, None] * misfits


class Objective(ABC):
    """A rule that scores candidates.

    Attributes:
        pairs: whether it looks at every pair of a target and a candidate, so that targets are better drawn.
        curved_labels: whether labels that the network has learned count by the curvature of their loss. Points that a
            network has learned have next to none; rules that go by the size of changes then think that it has forgotten
            them, and are better served by one for each of these labels (measured).
        reads_outputs: whether scores look at the outputs, so that each pick has to move them.
    """

    pairs: ClassVar[bool] = False
    curved_labels: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = True

    def weights(self, outputs: Tensor, loss: Loss, block: int) -> Tensor:
        """Omega of every point were it a target, (n, c, c)."""
        return torch.eye(block, dtype=torch.float64).expand(len(outputs), block, block).clone()

    def precision(self, outputs: Tensor, loss: Loss, block: int, learned: Tensor) -> Tensor:
        """W of a label at every point, whether it is there already, comes or goes: (n, c, c).

        It belongs to the point and to what the network was when it was looked at, so that a label that comes and goes
        leaves nothing behind.

        Args:
            outputs: the network's own, (n, C).
            loss: that it was trained with.
            block: c.
            learned: numbers of the points whose labels it was trained on.
        """
        found = loss.curvature(outputs, block)
        if not self.curved_labels:
            found[learned] = torch.eye(block, dtype=torch.float64)
        return found

    @abstractmethod
    def scores(self, scene: Scene, candidates: Tensor) -> Tensor:
        """One number for each candidate, by number; float64."""


@dataclass(frozen=True)
class IntegratedVariance(Objective):
    """By how much the label shrinks the variance of the targets' outputs: sum_u tr Omega_u (s_uu - s_uu after).

    Attributes:
        curvature: weigh targets by the curvature of the loss at their outputs (for cross-entropy: how open their class
            is), which for the full kernel is BAIT's trace. Otherwise all alike.
    """

    reads_outputs: ClassVar[bool] = False
    curvature: bool = True

    def weights(self, outputs: Tensor, loss: Loss, block: int) -> Tensor:  # noqa: D102
        return loss.curvature(outputs, block) if self.curvature else super().weights(outputs, loss, block)

    def scores(self, scene: Scene, candidates: Tensor) -> Tensor:  # noqa: D102
        r = root_of(scene.posterior.precision[candidates])
        gained = times(times(r.transpose(1, 2), scene.posterior.shared[candidates]), r)
        return (inverse(_whitened(scene.posterior, candidates, r)) * gained.transpose(1, 2)).sum((1, 2))


@dataclass(frozen=True)
class MostLikelyChange(Objective):
    """MLMOC: how far the targets' outputs would move if the label were what the network thinks, as a Frobenius norm.

    (Mohamadi, Bae, Sutherland 2022.) Influence times misfit: sqrt(t) / (1 + w s) * ||e_y - f||.
    """

    curved_labels: ClassVar[bool] = False

    def scores(self, scene: Scene, candidates: Tensor) -> Tensor:  # noqa: D102
        misfit = scene.misfit(candidates, scene.outputs[candidates].argmax(1))
        return _moved(scene.posterior, candidates, misfit[:, :, None] * misfit[:, None]).sqrt()


@dataclass(frozen=True)
class ExpectedChange(Objective):
    """EMOC: the root of the expected square of the same norm, over the labels that the network thinks possible."""

    curved_labels: ClassVar[bool] = False

    def scores(self, scene: Scene, candidates: Tensor) -> Tensor:  # noqa: D102
        p, f = scene.loss.probabilities(scene.outputs[candidates]).double(), scene.fitted(candidates)
        cross = p[:, :, None] * f[:, None]
        moment = torch.diag_embed(p) - cross - cross.transpose(1, 2) + f[:, :, None] * f[:, None]
        one = torch.ones(len(candidates), 1, dtype=torch.float64)
        return _moved(scene.posterior, candidates, moment).sqrt() * scene.weigh(one, candidates)[:, 0]


@dataclass(frozen=True)
class SummedChange(Objective):
    """How far each target would move, summed over the targets, instead of the root of the sum of squares.

    MLMOC as it is printed (Mohamadi, Bae, Sutherland 2022, equation 13) for the likeliest label, EMOC for the mean over
    labels. A target that moves far counts for less than in `MostLikelyChange` and `ExpectedChange`.

    Attributes:
        labels: so many of the likeliest are looked at, their probabilities scaled to one; None for all.
    """

    pairs: ClassVar[bool] = True
    curved_labels: ClassVar[bool] = False
    labels: int | None = 1

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if it is not positive.
        """
        _require_labels(self.labels)

    def scores(self, scene: Scene, candidates: Tensor) -> Tensor:
        """Cost: (targets) x (candidates) x C for each label looked at."""
        before = scene.outputs[scene.targets][:, None].double()

        def moved(scene: Scene, outputs: Tensor) -> Tensor:
            return (outputs - before).norm(dim=2).sum(0)

        return torch.cat(list(expected(scene, candidates, self.labels, moved)))


@dataclass(frozen=True)
class Variance(Objective):
    """The candidate's own uncertainty, log det(I + R^T s R): greedy batches have the largest determinant."""

    reads_outputs: ClassVar[bool] = False

    def scores(self, scene: Scene, candidates: Tensor) -> Tensor:  # noqa: D102
        r = root_of(scene.posterior.precision[candidates])
        return torch.linalg.slogdet(_whitened(scene.posterior, candidates, r)).logabsdet


@dataclass(frozen=True)
class Information(Objective):
    """EPIG (Bickford Smith et al. 2023) for Gaussians: what the label tells of the targets' labels, summed, in nats."""

    pairs: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = False

    def scores(self, scene: Scene, candidates: Tensor) -> Tensor:  # noqa: D102
        posterior, targets = scene.posterior, scene.targets
        eye = torch.eye(posterior.block, dtype=torch.float64)
        mine = inverse(_whitened(posterior, targets, theirs := root_of(posterior.precision[targets])))
        found = []
        for some, cross in _pairs(posterior, targets, candidates, posterior.block):
            r = root_of(posterior.precision[some])
            other = inverse(_whitened(posterior, some, r))
            seen = theirs.transpose(1, 2)[:, None] @ cross @ r
            share = mine[:, None] @ seen @ other @ seen.transpose(2, 3)
            found.append(-0.5 * torch.linalg.slogdet(eye - share).logabsdet.sum(0))
        return torch.cat(found)


@dataclass(frozen=True)
class Reduction(Objective):
    """By how much a risk of the targets is expected to fall, over the labels that the network thinks possible.

    Attributes:
        labels: so many of the likeliest labels are looked at, their probabilities scaled to one; all by default.
    """

    pairs: ClassVar[bool] = True
    curved_labels: ClassVar[bool] = False
    labels: int | None = None

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if it is not positive.
        """
        _require_labels(self.labels)

    @abstractmethod
    def risk(self, probabilities: Tensor) -> Tensor:
        """Of predictions (..., C)."""

    def scores(self, scene: Scene, candidates: Tensor) -> Tensor:
        """Cost: (targets) x (candidates) x C for each label looked at."""
        now = self._of(scene, scene.outputs[scene.targets][:, None])
        return torch.cat([now - after for after in expected(scene, candidates, self.labels, self._of)])

    def _of(self, scene: Scene, outputs: Tensor) -> Tensor:
        """Summed over the targets; of outputs (targets, candidates, C)."""
        return self.risk(scene.loss.probabilities(outputs.flatten(0, 1)).view_as(outputs)).double().sum(0)


@dataclass(frozen=True)
class ErrorReduction(Reduction):
    """Of the expected number of errors, 1 - max p."""

    def risk(self, probabilities: Tensor) -> Tensor:  # noqa: D102
        return 1 - probabilities.amax(-1)


@dataclass(frozen=True)
class BrierReduction(Reduction):
    """Of the expected Brier score, 1 - ||p||^2."""

    def risk(self, probabilities: Tensor) -> Tensor:  # noqa: D102
        return 1 - probabilities.square().sum(-1)


@dataclass(frozen=True)
class EntropyReduction(Reduction):
    """Of the entropy, -sum p log p, in nats."""

    def risk(self, probabilities: Tensor) -> Tensor:  # noqa: D102
        return torch.special.entr(probabilities).sum(-1)


@dataclass(frozen=True)
class Flips(Objective):
    """How many targets would change their class.

    Attributes:
        labels: 1 for the likeliest label alone, the default of the paper's code; None for the mean over all.
    """

    pairs: ClassVar[bool] = True
    curved_labels: ClassVar[bool] = False
    labels: int | None = 1

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if it is not positive.
        """
        _require_labels(self.labels)

    def scores(self, scene: Scene, candidates: Tensor) -> Tensor:  # noqa: D102
        before = scene.outputs[scene.targets].argmax(1)[:, None]

        def flipped(scene: Scene, outputs: Tensor) -> Tensor:
            return (outputs.argmax(2) != before).double().sum(0)

        return torch.cat(list(expected(scene, candidates, self.labels, flipped)))


def _require_labels(labels: int | None) -> None:
    """So many labels are looked at.

    Raises:
        InputError: if the number is not positive.
    """
    if labels is not None and labels < 1:
        raise InputError(f"labels looked at: got {labels}, expected a positive number or None for all")


def expected(
    scene: Scene, candidates: Tensor, labels: int | None, of: Callable[[Scene, Tensor], Tensor]
) -> Iterator[Tensor]:
    """The mean of a number over the labels that the network thinks possible, for some candidates after the other.

    Args:
        scene: where we stand.
        candidates: numbers.
        labels: so many of the likeliest are looked at.
        of: from the scene and the targets' outputs after a label, (targets, candidates, C), to (candidates,).
    """
    posterior, c = scene.posterior, scene.outputs.shape[1]
    before = scene.outputs[scene.targets][:, None].double()
    for some, cross in _pairs(posterior, scene.targets, candidates, c):
        outputs = scene.outputs[some]
        p, classes = scene.loss.probabilities(outputs).topk(min(labels or c, c), 1)
        p = (p / p.sum(1, keepdim=True)).double()
        gain = times(cross, inverse(_softened(posterior, some))[None])
        total = torch.zeros(len(some), dtype=torch.float64)
        for k in range(p.shape[1]):
            misfit = scene.misfit(some, classes[:, k])
            moved = gain[..., 0] * misfit if posterior.block == 1 else (gain @ misfit[..., None])[..., 0]
            total += p[:, k] * of(scene, before + moved)
        yield total


def _pairs(posterior: Posterior, targets: Tensor, candidates: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some candidates after the other, with s between all targets and them."""
    step = max(1, MOST // (max(1, len(targets)) * max(width, posterior.block**2)))
    return ((some, posterior.between(targets, some)) for some in candidates.split(step))


def _softened(posterior: Posterior, numbers: Tensor) -> Tensor:
    """I + W s, (numbers, c, c)."""
    return torch.eye(posterior.block, dtype=torch.float64) + times(posterior.precision[numbers], posterior.own[numbers])


def _whitened(posterior: Posterior, numbers: Tensor, roots: Tensor) -> Tensor:
    """I + R^T s R, (numbers, c, c)."""
    inner = times(times(roots.transpose(1, 2), posterior.own[numbers]), roots)
    return torch.eye(posterior.block, dtype=torch.float64) + inner


def _moved(posterior: Posterior, candidates: Tensor, moments: Tensor) -> Tensor:
    """The squared change of the targets' outputs for misfits with second moments (candidates, C, C)."""
    soft = inverse(_softened(posterior, candidates))
    reach = times(times(soft.transpose(1, 2), posterior.shared[candidates]), soft)
    if posterior.block == 1:
        return (reach[:, 0, 0] * moments.diagonal(dim1=1, dim2=2).sum(1)).clamp_min(0)
    return (reach * moments).sum((1, 2)).clamp_min(0)
