"""What labels leave open: the posterior covariance of a linearised model, one label more or less at a time.

With the prior K / ridge and for every label a precision W (its weight; for cross-entropy its curvature), the outputs
at u and x have the covariance

    s(u, x) = phi_u^T P phi_x,    P = (sum_L phi W phi^T + ridge I)^-1,

in blocks of c x c numbers: c = 1 where all outputs share one kernel, k (x) I, and c = C for the full kernel. Two blocks
for every point are enough for most scores: its own, s(x, x), and what it shares with the target points,
t(x) = sum_u s(x, u) Omega_u s(u, x). A label changes s by V V^T with V = s(., x) R L^-T, W = R R^T and
L L^T = I + R^T s(x, x) R, and so every block by products of V and E = sum_u s(., u) Omega_u V_u. Taking a label off
again is the same with I - R^T s(x, x) R and the other sign.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ntkit.kernel.features import FeatureKernel

# Bytes of a strip of features.
STRIP = 32 * 2**20
# A label whose removal would leave less than this of its precision is none.
LEAST = 1e-12


def root_of(blocks: Tensor) -> Tensor:
    """R with R R^T = W for positive semidefinite blocks (n, c, c)."""
    if blocks.shape[1] == 1:
        return blocks.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(blocks)
    return vectors * values.clamp_min(0).sqrt()[:, None]


def times(left: Tensor, right: Tensor) -> Tensor:
    """Products of blocks; torch takes its time over a million products of single numbers."""
    return left * right if left.shape[-2:] == right.shape[-2:] == (1, 1) else left @ right


def inverse(blocks: Tensor) -> Tensor:
    """Of blocks (n, c, c) that have one."""
    return 1 / blocks if blocks.shape[-1] == 1 else torch.linalg.inv(blocks)


class Posterior(ABC):
    """The covariance of n points after the labels so far, in float64.

    Attributes:
        own: s(x, x) of every point, (n, c, c).
        shared: t(x) of every point, (n, c, c).
        precision: W that a label at each point has, (n, c, c).
        weights: Omega of each point, (n, c, c); zero for those that are no targets.
        ridge: absolute.
        condition: of the system that the labels were conditioned on by, from below (its Cholesky factor's diagonal);
            nothing is ever added to the diagonal beside the ridge.
    """

    own: Tensor
    shared: Tensor
    precision: Tensor
    weights: Tensor
    ridge: float
    condition: float = 1.0

    @property
    def block(self) -> int:
        """c."""
        return self.own.shape[1]

    @abstractmethod
    def between(self, rows: Tensor, cols: Tensor) -> Tensor:
        """s between points by number, (rows, cols, c, c)."""

    @abstractmethod
    def moved(self, numbers: Tensor, pulls: Tensor) -> Tensor:
        """sum_x s(., x) pull_x over points by number, for pulls (numbers, C): of all points, (n, C)."""

    @abstractmethod
    def _columns(self, number: int) -> tuple[Tensor, Tensor]:
        """s(., x) of one point, and sum_u s(., u) Omega_u s(u, x): (n, c, c) each."""

    @abstractmethod
    def _change(self, number: int, root: Tensor, sign: float) -> None:
        """Take sign V V^T off s, for V = s(., x) root of the last columns, which were those of that point."""

    def response(self, number: int, *, removed: bool = False) -> Tensor:
        """How the outputs of all points follow the misfit of one, if its label came or went: (n, c, c).

        The misfit is minus the gradient of the weighted loss at the point's own outputs, m = W (y - f) for squares and
        y - p for cross-entropy: f(u) changes by response[u] m, one Newton step, which for squares is exact.
        """
        return self._response(number, self._columns(number)[0], -1.0 if removed else 1.0)

    def add(self, number: int) -> Tensor:
        """One label more; gives `response`."""
        return self._update(number, 1.0)

    def remove(self, number: int) -> Tensor:
        """One label less; gives `response(removed=True)`.

        Raises:
            InputError: if there is nothing to take off: the covariance would not be positive.
        """
        return self._update(number, -1.0)

    def _response(self, number: int, column: Tensor, sign: float) -> Tensor:
        inner = torch.eye(self.block, dtype=torch.float64) + sign * self.precision[number] @ column[number]
        return sign * times(column, inverse(inner)[None])

    def _update(self, number: int, sign: float) -> Tensor:
        # what is kept of every point is only carried along: errors in it must not come back into it
        column, reach = self._columns(number)
        r = root_of(self.precision[number][None])[0]
        inner = torch.eye(self.block, dtype=torch.float64) + sign * r.T @ column[number] @ r
        lower, failed = torch.linalg.cholesky_ex(inner)
        if int(failed) or float(lower.diagonal().min()) ** 2 < LEAST:
            raise InputError(f"point {number} has no label that could be taken off")
        response = self._response(number, column, sign)
        root = torch.linalg.solve_triangular(lower, r.T, upper=False).T
        inside = root.T @ reach[number] @ root  # V^T Omega V
        if self.block == 1:  # the same in three passes over the points, most of the time of an update
            k = float(root) ** 2
            self.shared.addcmul_(column, column, value=k * float(inside)).addcmul_(column, reach, value=-2 * sign * k)
            self.own.addcmul_(column, column, value=-sign * k)
        else:
            v, e = column @ root, reach @ root
            cross = v @ e.transpose(1, 2)
            self.shared += v @ inside @ v.transpose(1, 2) - sign * (cross + cross.transpose(1, 2))
            self.own -= sign * v @ v.transpose(1, 2)
        self._change(number, root, sign)
        return response


class KernelPosterior(Posterior):
    """From a kernel between all points: n^2 c^2 numbers, and as much work for a label."""

    def __init__(self, kernel: Tensor, labelled: Tensor, precision: Tensor, weights: Tensor, ridge: float) -> None:
        """Condition on the labels.

        Args:
            kernel: (n*c, n*c), example-major, of labelled and other points; not changed.
            labelled: numbers of the points with labels; a number that stands twice counts twice.
            precision: (n, c, c).
            weights: (n, c, c).
            ridge: absolute, positive.

        Cost: n^2 c^2 L c + n^2 c^3; memory: 8 n^2 c^2 bytes and one strip.

        Raises:
            InputError: if the kernel is not positive semidefinite on the labelled points.
        """
        self.precision, self.weights, self.ridge = precision, weights, ridge
        n, c = precision.shape[:2]
        self._s = kernel.double() / ridge
        if len(labelled):
            rows = (labelled[:, None] * c + torch.arange(c)).reshape(-1)
            roots = torch.block_diag(*root_of(precision[labelled]))
            column = self._s[:, rows] @ roots
            inner = torch.eye(len(rows), dtype=torch.float64) + roots.T @ column[rows]
            lower, failed = torch.linalg.cholesky_ex(inner)
            if int(failed):
                raise InputError("the kernel is not positive semidefinite on the labelled points: use a larger ridge")
            self.condition = _condition(lower)
            v = torch.linalg.solve_triangular(lower, column.T, upper=False).T
            self._s.addmm_(v, v.T, alpha=-1)
        blocks = self._s.view(n, c, n, c)
        self.own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
        self.shared = torch.empty_like(self.own)
        for x in range(n):
            mine = blocks[x].transpose(0, 1)  # (n, c, c): s(x, u) by u
            self.shared[x] = times(times(mine, weights), mine.transpose(1, 2)).sum(0)

    def between(self, rows: Tensor, cols: Tensor) -> Tensor:  # noqa: D102
        n, c = self.precision.shape[:2]
        return self._s.view(n, c, n, c)[rows][:, :, cols].transpose(1, 2)

    def moved(self, numbers: Tensor, pulls: Tensor) -> Tensor:  # noqa: D102
        n, c = self.precision.shape[:2]
        if c == 1:
            return self._s[:, numbers] @ pulls
        rows = (numbers[:, None] * c + torch.arange(c)).reshape(-1)
        return (self._s[:, rows] @ pulls.reshape(-1)).view(n, c)

    def _columns(self, number: int) -> tuple[Tensor, Tensor]:
        n, c = self.precision.shape[:2]
        column = self._s[:, number * c : (number + 1) * c].reshape(n, c, c)
        reach = self._s @ times(self.weights, column).reshape(n * c, c)
        return column.clone(), reach.view(n, c, c)

    def _change(self, number: int, root: Tensor, sign: float) -> None:
        c = self.block
        v = self._s[:, number * c : (number + 1) * c] @ root
        self._s.addmm_(v, v.T, alpha=-sign)


class FeaturePosterior(Posterior):
    """From D features of every row, read in strips: cost and memory are linear in the points."""

    def __init__(
        self, features: FeatureKernel, labelled: Tensor, precision: Tensor, weights: Tensor, ridge: float
    ) -> None:
        """Condition on the labels, in two passes over the features.

        Args:
            features: (n*c, D), example-major.
            labelled: numbers of the points with labels; a number that stands twice counts twice.
            precision: (n, c, c).
            weights: (n, c, c).
            ridge: absolute, positive.

        Cost: 6 n c D^2 in the features' type, and D^3; a label 8 n c^2 D. Memory: 16 D^2 + 32 n c^2 bytes, and one
        strip.

        Raises:
            InputError: if features are not finite, or the ridge is too small to tell it from rounding.
        """
        self.precision, self.weights, self.ridge, self._features = precision, weights, ridge, features
        self._dtype = torch.promote_types(features.dtype, torch.float32)  # half precision is for disks
        n, c = precision.shape[:2]
        size = features.size
        counts = torch.bincount(labelled, minlength=n)
        known = counts.to(torch.float64)[:, None, None] * precision
        labels = torch.zeros(size, size, dtype=torch.float64)
        targets = torch.zeros(size, size, dtype=torch.float64)
        for some, block in self._strips():
            finite = bool(torch.isfinite(block.sum()))
            if not finite:
                raise InputError(f"features of points {some.start} to {some.stop - 1} are not finite (NaN or infinity)")
            here = counts[some] > 0
            mine = block[here]
            labels += _moments(mine.double(), known[some][here])
            targets += _moments(block, weights[some])
        labels.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(labels)
        if int(failed):
            raise InputError(
                f"a ridge of {ridge:.1e} is lost in the rounding of features whose largest moment is "
                f"{float(labels.diagonal().max()):.1e}: use a larger one, or features in float64"
            )
        self.condition = _condition(lower)
        self._p = torch.cholesky_inverse(lower)
        self._g = targets
        self.own, self.shared = (torch.empty(n, c, c, dtype=torch.float64) for _ in range(2))
        p, g = self._p.to(self._dtype), targets.to(self._dtype)
        for some, block in self._strips():
            inner = (block.reshape(-1, size) @ p).view_as(block)
            self.own[some] = _grams(inner, block)
            self.shared[some] = _grams((inner.reshape(-1, size) @ g).view_as(block), inner)

    def between(self, rows: Tensor, cols: Tensor) -> Tensor:  # noqa: D102
        left, right = self._rows(rows), self._rows(cols)
        found = (left.reshape(-1, left.shape[2]) @ self._p) @ right.reshape(-1, right.shape[2]).T
        return found.view(len(rows), self.block, len(cols), self.block).transpose(1, 2)

    def moved(self, numbers: Tensor, pulls: Tensor) -> Tensor:
        """In one pass over the features."""
        phi = self._rows(numbers).flatten(0, 1)
        q = self._p @ (phi.T @ (pulls if self.block == 1 else pulls.reshape(-1, 1)))  # (D, C), or (D, 1)
        found = torch.empty(len(self.precision), pulls.shape[1], dtype=torch.float64)
        for some, block in self._strips():
            found[some] = (block.flatten(0, 1).double() @ q).view(len(block), -1)
        return found

    def _columns(self, number: int) -> tuple[Tensor, Tensor]:
        phi = self._rows(torch.tensor([number]))[0].T
        q = self._last = self._p @ phi
        # a few long rows: several times faster here than the same product with a few narrow columns
        both = torch.cat([q, self._p @ (self._g @ q)], 1).T.to(self._dtype).contiguous()
        n, c = self.precision.shape[:2]
        found = torch.empty(2 * c, n * c, dtype=torch.float64)
        for some, block in self._strips():
            found[:, some.start * c : some.stop * c] = both @ block.reshape(-1, len(phi)).T
        column, reach = found.view(2, c, n, c).permute(0, 2, 3, 1).contiguous()
        return column, reach

    def _change(self, number: int, root: Tensor, sign: float) -> None:
        q = self._last @ root
        self._p.addmm_(q, q.T, alpha=-sign)

    def _rows(self, numbers: Tensor) -> Tensor:
        """Features of some points, (numbers, c, D), in float64."""
        c = self.block
        return torch.stack(
            [self._features.features(slice(i * c, (i + 1) * c)).cpu().double() for i in numbers.tolist()]
        )

    def _strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Points and their features, (strip, c, D)."""
        n, c = self.precision.shape[:2]
        step = max(1, STRIP // (c * self._features.size * self._dtype.itemsize))
        for start in range(0, n, step):
            some = slice(start, min(start + step, n))
            block = self._features.features(slice(some.start * c, some.stop * c)).to("cpu", self._dtype)
            yield some, block.unflatten(0, (-1, c))


def _condition(lower: Tensor) -> float:
    """At most the condition number of L L^T, and of its order: the ratio of the largest and smallest pivot."""
    pivots = lower.diagonal().square()
    return float(pivots.max() / pivots.min())


def _moments(block: Tensor, weights: Tensor) -> Tensor:
    """sum_x phi_x^T W_x phi_x for rows (m, c, D) and (m, c, c), (D, D)."""
    roots = root_of(weights).transpose(1, 2).to(block)
    rooted = roots * block if block.shape[1] == 1 else roots @ block
    flat = rooted.reshape(-1, block.shape[2])
    return (flat.T @ flat).double()


def _grams(left: Tensor, right: Tensor) -> Tensor:
    """Blocks of rows (m, c, D) with themselves, (m, c, c)."""
    if left.shape[1] == 1:
        return (left * right).sum(2, keepdim=True)
    return left @ right.transpose(1, 2)
