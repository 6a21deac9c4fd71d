"""Batches by a kernel alone: points that are far from each other, or that leave little open.

The rules are those of Holzmueller et al. (2022, "A framework and benchmark for deep batch active learning for
regression", section 3), on any kernel here. They need the kernel's diagonal and one column for each pick: n D work with
features, n^2 numbers without. The kernel is scaled so that labelled points have the mean diagonal entry 1. Labels count
in one of two ways: as points that are chosen already (`sigma` None), whatever their weights, or by the posterior kernel
that they leave, with noise of the variance sigma^2 over the weight of each.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import DenseKernel, Kernel
from ntkit.kernel.features import FeatureKernel
from ntkit.uses.active.columns import Columns, KernelColumns
from ntkit.uses.active.geometry import Geometry, LastLayer, posterior, scale
from ntkit.uses.active.picks import Picked, RedundantBatchWarning, checked
from ntkit.uses.active.strategy import Round, Strategy, require_kernel

if TYPE_CHECKING:
    from ntkit.uses.active.posterior import Posterior

# Of a diagonal entry, what is left of it by rounding alone.
ROUNDING = 1e-12


class Chosen(ABC):
    """What has been chosen, and what each point is worth next."""

    @abstractmethod
    def scores(self) -> Tensor:
        """Of all points, (n,); higher is better."""

    @abstractmethod
    def take(self, number: int) -> None:
        """One point more."""

    def pick(self, scores: Tensor, generator: torch.Generator) -> int:
        """The place of the next: the best, and of equals the first. What is taken scores minus infinity."""
        return int(scores.argmax())


@dataclass(frozen=True)
class Design(Strategy):
    """A batch by a kernel alone.

    Attributes:
        kernel: which.
        sigma: noise of labels of weight 1, relative to the kernel's scale; None for counting labelled points as chosen.
    """

    kernel: Geometry = field(default_factory=LastLayer)
    sigma: float | None = None

    def __post_init__(self) -> None:
        """Check kernel and noise.

        Raises:
            InputError: if the kernel makes none, or the noise is not positive.
        """
        super().__post_init__()
        require_kernel(self.kernel)
        if self.sigma is not None:
            _require_noise(self.sigma, "a positive number or None")

    @abstractmethod
    def start(self, columns: Columns, now: Round) -> Chosen:
        """Nothing chosen yet."""

    def choose(self, now: Round) -> Picked:  # noqa: D102
        n = len(now.labels)
        kernel = now.kernel(self.kernel)
        KernelColumns(kernel, n)  # which checks the kernel
        one = 1 / scale(kernel, now.labelled, torch.ones(n, 1, 1, dtype=torch.float64))
        if self.sigma is not None and len(now.labelled):
            kernel = left_open(kernel, now.labelled, self.sigma**2 / one / now.weights[now.labelled])
        chosen = self.start(KernelColumns(kernel, n, one), now)
        if self.sigma is None:
            for number in now.labelled.tolist():
                chosen.take(number)
        return in_turn(chosen, now)


def _require_noise(sigma: float, expected: str) -> None:
    if not 0 < sigma < float("inf"):
        raise InputError(f"sigma is the labels' noise: got {sigma!r}, expected {expected}")


def in_turn(chosen: Chosen, now: Round) -> Picked:
    """One pick after the other among the candidates.

    Raises:
        InputError: if the score of any point is not a number: it would be passed over, or spoil those of others.
    """
    free, every = torch.ones(len(now.candidates), dtype=torch.bool), torch.arange(len(now.labels))
    numbers, utilities = [], []
    for _ in range(now.size):
        scores = checked(chosen.scores(), every)[now.candidates].masked_fill(~free, -torch.inf)
        place = chosen.pick(scores, now.generator)
        free[place] = False
        numbers.append(int(now.candidates[place]))
        utilities.append(scores)
        chosen.take(numbers[-1])
    return Picked(torch.tensor(numbers), torch.stack(utilities))


def left_open(kernel: Kernel, labelled: Tensor, noise: Tensor) -> Kernel:
    """The posterior kernel k - k_L (k_LL + noise)^-1 k_L^T: as features where there are some.

    Args:
        kernel: of all points.
        labelled: numbers of those with labels.
        noise: variance of each of these labels, (L,), float64.

    Raises:
        InputError: if the kernel is not positive semidefinite on the labelled points.
    """
    if isinstance(kernel, FeatureKernel):
        features = kernel.features().double()
        known = features[labelled] / noise.to(features.device).sqrt()[:, None]
        moments = known.T @ known
        moments.diagonal().add_(1.0)
        # phi^T (1 + known^T noise^-1 known)^-1 phi' is the same kernel
        lower = torch.linalg.cholesky(moments)
        return FeatureKernel(torch.linalg.solve_triangular(lower, features.T, upper=False).T.contiguous())
    k = kernel.dense().cpu().double()
    some = k[labelled][:, labelled]
    some.diagonal().add_(noise)
    lower, failed = torch.linalg.cholesky_ex(some)
    if int(failed):
        raise InputError("the kernel is not positive semidefinite on the labelled points: use a larger sigma")
    half = torch.linalg.solve_triangular(lower, k[labelled], upper=False)
    return DenseKernel(k - half.T @ half)


@dataclass(frozen=True)
class MaxDiag(Design):
    """The longest vectors; with `sigma` the most uncertain points, one by one."""

    def start(self, columns: Columns, now: Round) -> Chosen:  # noqa: D102
        return _Diagonal(columns)


class _Diagonal(Chosen):
    def __init__(self, columns: Columns) -> None:
        self._scores = columns.diagonal

    def scores(self) -> Tensor:
        return self._scores

    def take(self, number: int) -> None:
        pass


@dataclass(frozen=True)
class MaxDet(Design):
    """The largest determinant: what the points so far leave open is largest for the next (a pivoted Cholesky)."""

    def start(self, columns: Columns, now: Round) -> Chosen:  # noqa: D102
        return _Pivoted(columns)


class _Pivoted(Chosen):
    def __init__(self, columns: Columns) -> None:
        self._columns, self._left = columns, columns.diagonal.clone()
        self._factor = self._left.new_empty(len(self._left), 0)

    def scores(self) -> Tensor:
        return self._left

    def pick(self, scores: Tensor, generator: torch.Generator) -> int:
        place = int(scores.argmax())
        if not float(scores[place]) > 0:
            warnings.warn(
                "the kernel's rank is used up: what is chosen from here on adds nothing to the determinant",
                RedundantBatchWarning,
                stacklevel=2,
            )
        return place

    def take(self, number: int) -> None:
        left = float(self._left[number])
        if left <= 0:  # nothing of it is open, as of a copy of a point that is there
            return
        u = (self._columns.column(number) - self._factor @ self._factor[number]) / left**0.5
        self._factor = torch.cat([self._factor, u[:, None]], 1)
        self._left = self._left - u.square()
        self._left[self._left < ROUNDING * self._columns.diagonal] = 0.0
        self._left[number] = 0.0


class _Nearest(Chosen):
    """Distances to the nearest point chosen so far."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.distance = torch.full_like(columns.diagonal, torch.inf)
        self.centre = torch.full(columns.diagonal.shape, -1, dtype=torch.int64)

    @property
    def begun(self) -> bool:
        """Whether any point has been chosen."""
        return bool((self.centre >= 0).any())

    def take(self, number: int) -> None:
        new = self.columns.distances(number)
        new[number] = 0.0
        nearer = new < self.distance
        self.centre[nearer] = number
        self.distance = torch.minimum(self.distance, new)

    def scores(self) -> Tensor:
        return self.distance if self.begun else self.columns.diagonal


@dataclass(frozen=True)
class CoreSet(Design):
    """The point farthest from all that have been chosen (k-centre greedy, Sener & Savarese 2018); first the longest."""

    def start(self, columns: Columns, now: Round) -> Chosen:  # noqa: D102
        return _Nearest(columns)


@dataclass(frozen=True)
class KMeansPlusPlus(Design):
    """Drawn with probabilities that grow as the squared distance to the nearest chosen point; first any."""

    def start(self, columns: Columns, now: Round) -> Chosen:  # noqa: D102
        return Scattered(columns)


class Scattered(_Nearest):
    """Draws as k-means++ does."""

    def scores(self) -> Tensor:
        """Squared distances; before the first pick 1 for all."""
        return self.distance if self.begun else torch.ones_like(self.distance)

    def pick(self, scores: Tensor, generator: torch.Generator) -> int:
        """Drawn; any free one where all distances are zero."""
        weights = scores.clamp_min(0)
        if not float(weights.sum()) > 0:
            weights = (scores > -torch.inf).double()
        return int(torch.multinomial(weights, 1, generator=generator))


@dataclass(frozen=True)
class LCMD(Design):
    """The farthest point of the heaviest cluster; points belong to the nearest chosen one and weigh their distance.

    All points without a label weigh, candidates or not. Where the heaviest cluster has no candidate, the next one has
    its turn: points of other clusters than the first have scores below 0, the heavier theirs the higher.
    """

    def start(self, columns: Columns, now: Round) -> Chosen:  # noqa: D102
        return _Clusters(columns, (now.labels < 0).nonzero()[:, 0])


class _Clusters(_Nearest):
    def __init__(self, columns: Columns, pool: Tensor) -> None:
        super().__init__(columns)
        self._pool = pool

    def scores(self) -> Tensor:
        if not self.begun:
            return self.columns.diagonal
        mine = self.centre[self._pool]
        weights = torch.zeros_like(self.distance).index_add_(0, mine, self.distance[self._pool])
        rank = torch.empty_like(self.centre)
        rank[weights.argsort(descending=True, stable=True)] = torch.arange(len(rank))
        rank = rank[self.centre]
        return torch.where(rank == 0, self.distance, self.distance / (1 + self.distance.max()) - rank)


@dataclass(frozen=True)
class FrankWolfe(Design):
    """Points whose weighted sum comes near the sum over all without a label (ACS-FW, Pinsler et al. 2019).

    Where labelled points count as chosen, they belong to the sum.
    """

    def start(self, columns: Columns, now: Round) -> Chosen:  # noqa: D102
        pool = torch.arange(len(now.labels)) if self.sigma is None else (now.labels < 0).nonzero()[:, 0]
        return _Coreset(columns, pool)


class _Coreset(Chosen):
    """With mu the sum of the pool's features and c the weighted sum so far: inner products of both with every point."""

    def __init__(self, columns: Columns, pool: Tensor) -> None:
        self._columns = columns
        self._norms = columns.diagonal.clamp_min(0).sqrt()
        self._total = float(self._norms[pool].sum())
        self._mean = columns.sums(pool)
        self._now = torch.zeros_like(self._mean)
        self._now_mean, self._now_now = 0.0, 0.0  # <c, mu> and <c, c>

    def scores(self) -> Tensor:
        return torch.where(self._norms > 0, (self._mean - self._now) / self._norms, 0.0)

    def take(self, number: int) -> None:
        norm = float(self._norms[number])
        if not norm > 0:
            return
        far = self._total / norm  # d = far * phi - c
        column = self._columns.column(number)
        at_mean, at_now = far * float(self._mean[number]), far * float(self._now[number])
        length = far**2 * norm**2 - 2 * at_now + self._now_now
        if not length > 0:
            return
        step = (at_mean - self._now_mean - at_now + self._now_now) / length
        self._now = (1 - step) * self._now + step * far * column
        self._now_mean = (1 - step) * self._now_mean + step * at_mean
        self._now_now = (1 - step) ** 2 * self._now_now + 2 * (1 - step) * step * at_now + (step * far * norm) ** 2


@dataclass(frozen=True)
class Bait(Strategy):
    """BAIT (Ash et al. 2021) on one kernel for all outputs: least variance of all points, in sum, after the batch.

    Attributes:
        kernel: which.
        sigma: noise of labels of weight 1, relative to the kernel's scale.
        backward: choose twice as many first, and then give up those that are missed least.
    """

    kernel: Geometry = field(default_factory=LastLayer)
    sigma: float = 1e-1
    backward: bool = False

    def __post_init__(self) -> None:
        """Check kernel and noise.

        Raises:
            InputError: if the kernel makes none, or the noise is not positive.
        """
        super().__post_init__()
        require_kernel(self.kernel)
        _require_noise(self.sigma, "a positive number")

    def choose(self, now: Round) -> Picked:  # noqa: D102
        n = len(now.labels)
        kernel = now.kernel(self.kernel)
        KernelColumns(kernel, n)  # which checks the kernel
        ones = torch.ones(n, 1, 1, dtype=torch.float64)
        ridge = self.sigma**2 * scale(kernel, now.labelled, ones)
        open_ = posterior(kernel, now.labelled, now.weights[:, None, None].clone(), ones, ridge)
        wanted = min(2 * now.size, len(now.candidates)) if self.backward else now.size
        picked = in_turn(_Variance(open_), replace(now, size=wanted))
        kept = picked.numbers.tolist()
        while len(kept) > now.size:
            some = torch.tensor(kept)
            w = open_.precision[some, 0, 0]
            missed = w * open_.shared[some, 0, 0] / (1 - w * open_.own[some, 0, 0])
            out = kept.pop(int(missed.argmin()))
            open_.remove(out)
        places = [picked.numbers.tolist().index(number) for number in kept]
        return Picked(torch.tensor(kept), picked.utilities[places])


class _Variance(Chosen):
    def __init__(self, open_: Posterior) -> None:
        self._open = open_

    def scores(self) -> Tensor:
        w = self._open.precision[:, 0, 0]
        return w * self._open.shared[:, 0, 0] / (1 + w * self._open.own[:, 0, 0])

    def take(self, number: int) -> None:
        self._open.add(number)
