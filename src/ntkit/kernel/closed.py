"""Kernels with a formula, between examples that are tensors: to compare with, and to combine with a network's.

    RBF(lengthscale)(x, y) = exp(-|x - y|^2 / (2 lengthscale^2))
    DotProduct(offset, degree, scale)(x, y) = (scale <x, y> + offset)^degree

Examples are (N, ...) and are flattened. Entries carry gradients to the examples where these ask for them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import Kernel, bounds
from ntkit.kernel.function import KernelFunction
from ntkit.tangent.identity import digest

# Examples between which the median distance is measured: two million pairs.
MEDIAN_OF = 2000
# The part of an RBF entry that rounding may take before distances are taken pair by pair.
LOST = 1e-8
ONE_BY_ONE = "donot_use_mm_for_euclid_dist"


class ClosedForm(KernelFunction):
    """A kernel function whose entries follow from two blocks of vectors."""

    def __call__(self, x1: Tensor, x2: Tensor | None = None) -> ClosedKernel:
        """The kernel between examples (N, ...) and (M, ...), floating point tensors of one type.

        Raises:
            InputError: if they are something else, not finite, or do not fit each other.
        """
        return ClosedKernel(self, x1, x2)

    @abstractmethod
    def entries(self, rows: Tensor, cols: Tensor, origin: Tensor) -> Tensor:
        """The kernel between vectors (n, d) and (m, d), a new tensor (n, m).

        Args:
            rows: vectors.
            cols: vectors.
            origin: a point (d,) in the middle of them, for kernels that do not depend on where the origin is.
        """

    @abstractmethod
    def own(self, rows: Tensor) -> Tensor:
        """The kernel of each of (n, d) with itself, (n,)."""


class ClosedKernel(Kernel):
    """The matrix of a closed-form kernel between two sets of examples. Cost of a tile: 2 n m d FLOPs."""

    def __init__(self, function: ClosedForm, x1: Tensor, x2: Tensor | None = None) -> None:
        """Of N and M examples; x2=None for x1 again."""
        self.function = function
        self._rows = vectors(x1, "x1")
        self._cols = self._rows if x2 is None else vectors(x2, "x2")
        self._symmetric = x2 is None
        if self._rows.shape[1] != self._cols.shape[1]:
            raise InputError(
                f"rows and columns are examples of the same size: got {self._rows.shape[1]} numbers in each of x1 and "
                f"{self._cols.shape[1]} in each of x2"
            )
        if self._rows.dtype != self._cols.dtype or self._rows.device != self._cols.device:
            raise InputError(
                f"x1 and x2 are of one type and on one device: got {self._rows.dtype} on {self._rows.device} and "
                f"{self._cols.dtype} on {self._cols.device}"
            )
        self._origin = self._cols.detach().mean(0)

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return len(self._rows), len(self._cols)

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self._rows.dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self._rows.device

    @property
    def symmetric(self) -> bool:  # noqa: D102
        return self._symmetric

    def tile(self, rows: slice, cols: slice) -> Tensor:  # noqa: D102
        (a, b), (c, d) = bounds(rows, self.shape[0]), bounds(cols, self.shape[1])
        values = self.function.entries(self._rows[a:b], self._cols[c:d], self._origin)
        if self._symmetric and max(a, c) < min(b, d):
            # an example with itself, without the rounding of a difference that is zero
            both = torch.arange(max(a, c), min(b, d), device=self.device)
            put = values.index_put if values.requires_grad else values.index_put_  # autograd keeps what it has made
            values = put((both - a, both - c), self.function.own(self._rows[both]))
        return values

    def diagonal(self) -> Tensor:  # noqa: D102
        return self.function.own(self._rows) if self._symmetric else super().diagonal()

    def identity(self) -> dict[str, str]:
        """The formula and the examples. Cost: reads them once."""
        rows = digest([self._rows])
        return {
            "kernel": repr(self.function), "rows": rows, "cols": rows if self._symmetric else digest([self._cols])
        }  # fmt: skip


@dataclass(frozen=True)
class RBF(ClosedForm):
    """The Gaussian kernel exp(-|x - y|^2 / (2 lengthscale^2)).

    Distances are taken in float64, whatever the type of the examples: in float32 the difference of two large squares
    would lose the near ones. Where float64 would lose them as well (examples further than 6,700 lengthscales from the
    others), they are taken pair by pair, without squares: slower, in the memory of a tile, and once differentiable.

    Attributes:
        lengthscale: the distance at which the kernel has fallen to exp(-1/2).
    """

    lengthscale: float = 1.0

    def __post_init__(self) -> None:
        """Check the lengthscale.

        Raises:
            InputError: if it is not positive.
        """
        _require_number("lengthscale", self.lengthscale, positive=True)

    @classmethod
    def median(cls, x: Tensor, *, most: int = MEDIAN_OF, generator: torch.Generator | None = None) -> RBF:
        """With the median distance between different examples as its lengthscale.

        Args:
            x: N examples; of a comparison of two samples, both of them.
            most: of more examples than this so many are looked at.
            generator: draws these; without one they are evenly spaced.

        Cost: min(N, most)^2 distances.

        Raises:
            InputError: if there are fewer than two examples, or half of the pairs are equal.
        """
        points = vectors(x, "x").detach()
        if len(points) < 2 or most < 2:
            raise InputError(f"a median distance needs at least two examples: got {min(len(points), most)}")
        if len(points) > most:
            if generator is None:
                chosen = torch.linspace(0, len(points) - 1, most, dtype=torch.float64).round().long()
            else:
                chosen = torch.randperm(len(points), generator=generator, device=generator.device)[:most]
            points = points[chosen.to(points.device)]
        median = float(torch.pdist(points.to(wide(points))).median())
        if median == 0:
            raise InputError("half of the pairs of examples are equal, their median distance is 0: give a lengthscale")
        return cls(median)

    def entries(self, rows: Tensor, cols: Tensor, origin: Tensor) -> Tensor:  # noqa: D102
        (left, a), (right, b) = (self._about(origin, t) for t in (rows, cols))
        lost = bool(_far(a).any() & _far(b).any())
        if lost:  # a few examples far away pull the mean along, and not the median
            middle = cols.detach().median(0).values
            (left, a), (right, b) = (self._about(middle, t) for t in (rows, cols))
        exponent = left @ right.T
        exponent -= a[:, None]
        exponent -= b[None, :]
        if lost:  # of a far and a near one that are neighbours no more is lost than of two near ones
            i, j = _far(a).nonzero()[:, 0], _far(b).nonzero()[:, 0]
            some, others = (t.to(wide(t)) for t in (rows[i], cols[j]))
            apart = torch.cdist(some, others, compute_mode=ONE_BY_ONE)
            exponent[i[:, None], j] = (apart / self.lengthscale).square() / -2
        return exponent.clamp_max_(0).exp_().to(rows.dtype)

    def _about(self, origin: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors from a point in lengthscales, and half their squares."""
        away = (x.to(wide(x)) - origin.to(wide(x))) / self.lengthscale
        return away, away.square().sum(1) / 2

    def own(self, rows: Tensor) -> Tensor:  # noqa: D102
        return rows.new_ones(len(rows))


@dataclass(frozen=True)
class DotProduct(ClosedForm):
    """The polynomial kernel (scale <x, y> + offset)^degree; without arguments the plain inner product.

    Attributes:
        offset: not negative; with one, the features of lower degrees belong to it too.
        degree: a whole number, 1 or more.
        scale: of the inner product, positive; 1/d keeps entries of order one.
    """

    offset: float = 0.0
    degree: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if they do not give a positive semi-definite kernel.
        """
        _require_number("offset", self.offset, positive=False)
        _require_number("scale", self.scale, positive=True)
        if not isinstance(self.degree, int) or self.degree < 1:
            raise InputError(f"degree is a whole number, 1 or more: got {self.degree!r}")

    def entries(self, rows: Tensor, cols: Tensor, origin: Tensor) -> Tensor:  # noqa: D102
        return self._powered(rows @ cols.T)

    def own(self, rows: Tensor) -> Tensor:  # noqa: D102
        return self._powered(rows.square().sum(1))

    def _powered(self, products: Tensor) -> Tensor:
        found = products.mul_(self.scale).add_(self.offset)
        return found if self.degree == 1 else found**self.degree


def vectors(x: Tensor, name: str) -> Tensor:
    """Examples (N, ...) as (N, d).

    Raises:
        InputError: if they are not finite floating point tensors with a first axis.
    """
    if not isinstance(x, Tensor):
        raise InputError(
            f"{name} is a floating point tensor (N, ...): got {type(x).__name__}; torch.from_numpy makes one of arrays"
        )
    if x.ndim == 0 or not x.is_floating_point():
        raise InputError(
            f"{name} is a floating point tensor (N, ...): got shape {tuple(x.shape)}, dtype {x.dtype}; x.double() "
            "makes one of whole numbers"
        )
    if x.numel() == 0:
        raise InputError(f"a kernel needs at least one example, of at least one number: got {name} {tuple(x.shape)}")
    if not bool(x.detach().isfinite().all()):
        raise InputError(f"{name} has entries that are not finite (NaN or infinity)")
    return x.reshape(len(x), -1)


def _far(halves: Tensor) -> Tensor:
    """Which squares are so large that their last digit counts."""
    return 2 * halves.detach() * torch.finfo(halves.dtype).eps > LOST


def wide(t: Tensor) -> torch.dtype:
    """Float64 where the device has it."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def _require_number(name: str, value: float, *, positive: bool) -> None:
    """Refuse what is not a finite number above zero, or at least zero.

    Raises:
        InputError: naming the argument.
    """
    good = isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 if positive else value >= 0)
    if not good:
        raise InputError(f"{name} is a {'positive' if positive else 'non-negative'} number: got {value!r}")
