"""The tangent kernel of an infinitely wide fully connected ReLU network, alone and for all depths in one pass.

With layers counted from 1 to `depth` (linear layers, the read-out included) and w = weight_std, b = bias_std:

    S_1     = w^2 <x, x'> / d + b^2                         d: size of an example
    S_{l+1} = w^2 n (sin t + (pi - t) cos t) / (2 pi) + b^2     n = sqrt(S_l(x,x) S_l(x',x')), cos t = S_l(x,x') / n
    D_{l+1} = w^2 (pi - t) / (2 pi)
    T_l     = S_l + D_l T_{l-1} for l > fixed, and 0 before that

S_depth is the kernel of the random network (NNGP), T_depth that of gradients (NTK), where the first `fixed` layers are
not trained; fixed = depth - 1 trains the read-out alone, and T = S. `InfiniteWidth` does the same for any network; this
file knows that a deeper network contains the shallower ones, which a search over depths lives on.

`scaled_inputs=False` leaves the division by d out, and with weight_std=1 that is the convention of the code of Arora et
al. 2020 (arXiv 1910.01663): a ReLU layer then halves the kernel, so that the same C of an SVM means less in a deeper
network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import strips
from ntkit.kernel.closed import ClosedForm
from ntkit.kernel.infinite.duals import PiecewiseLinear

RELU = PiecewiseLinear()
# Rows of which the temporary arrays of a layer are held at once.
ROWS = 256


@dataclass(frozen=True)
class FullyConnected(ClosedForm):
    """The NTK of a ReLU network of infinite width, with or without training of its first layers.

    Angles are computed in float64, whatever the type of the examples, and an example's kernel with itself by its own
    formula: near the diagonal an angle loses half of the digits. Entries carry gradients to the examples.

    Attributes:
        depth: linear layers, 1 or more; 1 is a linear model.
        fixed: the first so many of them are not trained, fewer than depth.
        weight_std: of the weights, times 1/sqrt(inputs of the layer); sqrt(2) keeps the size of the signal.
        bias_std: of the biases.
        scaled_inputs: whether the first layer divides by the square root of its number of inputs, as the others do.
    """

    depth: int = 3
    fixed: int = 0
    weight_std: float = math.sqrt(2)
    bias_std: float = 0.0
    scaled_inputs: bool = True

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            InputError: if they are no network's.
        """
        if not _whole(self.depth) or not _whole(self.fixed) or not 0 <= self.fixed < self.depth:
            raise InputError(
                f"depth is a number of linear layers, 1 or more, and fixed one from 0 to depth - 1: got "
                f"depth={self.depth!r}, fixed={self.fixed!r}"
            )
        if not 0 < self.weight_std < math.inf or not 0 <= self.bias_std < math.inf:
            raise InputError(
                f"weight_std is a positive number and bias_std one that is not negative: got {self.weight_std!r} and "
                f"{self.bias_std!r}"
            )

    def entries(self, rows: Tensor, cols: Tensor, origin: Tensor) -> Tensor:  # noqa: D102
        left, right = rows.double(), cols.double()
        own = self._first_own(right)
        blocks = [self._block(left[strip], right, own) for strip in strips(len(rows), ROWS)]
        return torch.cat(blocks or [left @ right.T]).to(rows.dtype)

    def own(self, rows: Tensor) -> Tensor:  # noqa: D102
        sigma = self._first_own(rows.double())
        theta = torch.zeros_like(sigma) if self.fixed else sigma
        for layer in range(2, self.depth + 1):
            sigma = self._next_own(sigma)
            if layer > self.fixed:
                theta = sigma + theta * (self.weight_std**2 / 2)
        return theta.to(rows.dtype)

    def _block(self, left: Tensor, right: Tensor, right_own: Tensor) -> Tensor:
        sigma, left_own = self._first(left, right), self._first_own(left)
        theta = None if self.fixed else sigma
        for layer in range(2, self.depth + 1):
            sigma, slope = self._next(sigma, left_own, right_own)
            left_own, right_own = self._next_own(left_own), self._next_own(right_own)
            if layer > self.fixed:
                theta = sigma if theta is None else sigma + slope * theta
        assert theta is not None  # fixed < depth
        return theta

    # ------------------------------------------------------------ one layer

    def _first(self, left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.T) * self._per_product(left) + self.bias_std**2

    def _first_own(self, x: Tensor) -> Tensor:
        return x.square().sum(1) * self._per_product(x) + self.bias_std**2

    def _per_product(self, x: Tensor) -> float:
        return self.weight_std**2 / (x.shape[1] if self.scaled_inputs else 1)

    def _next(self, sigma: Tensor, left_own: Tensor, right_own: Tensor) -> tuple[Tensor, Tensor]:
        """S of the next layer and D, both (n, m)."""
        moment, slope = RELU(left_own[:, None], right_own, sigma, derivative=True)
        assert slope is not None
        return moment * self.weight_std**2 + self.bias_std**2, slope * self.weight_std**2

    def _next_own(self, own: Tensor) -> Tensor:
        return own * (self.weight_std**2 / 2) + self.bias_std**2


class Member(NamedTuple):
    """One kernel of a family.

    Attributes:
        function: the same as a function of examples.
        matrix: between all examples (rows) and the chosen ones (columns), (N, M), float64.
    """

    function: FullyConnected
    matrix: Tensor


def family(
    x: Tensor,
    depths: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    columns: Tensor | None = None,
    weight_std: float = math.sqrt(2),
    bias_std: float = 0.0,
    scaled_inputs: bool = True,
) -> Iterator[Member]:
    """The kernels of several depths, each with 0, 1, ..., depth - 1 fixed layers, in this order.

    Layers are computed once for all of them. Memory: max(depths) + 4 matrices (N, M) in float64; one that is kept stays
    as it is. Cost: 2 N M d FLOPs, and for each layer an arctangent and a root of N M entries and `depth` products.

    Args:
        x: N examples, floating point, (N, ...).
        depths: numbers of linear layers, ascending.
        columns: numbers of the M examples that make the columns; None for all.
        weight_std: as for `FullyConnected`.
        bias_std: as for `FullyConnected`.
        scaled_inputs: as for `FullyConnected`.

    Raises:
        InputError: if the depths are not ascending numbers of layers, or the examples cannot be used.
    """
    if not depths or not all(map(_whole, depths)) or list(depths) != sorted(set(depths)) or depths[0] < 1:
        raise InputError(f"depths are ascending numbers of linear layers, 1 or more, such as (1, 2, 3): got {depths!r}")
    base = FullyConnected(1, 0, weight_std, bias_std, scaled_inputs)
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise InputError("x holds examples (N, ...) as a floating point tensor without NaN and infinity")
    if not x.numel():
        raise InputError(f"there are no features to compute a kernel of: x has the shape {tuple(x.shape)}")
    rows = x.detach().reshape(len(x), -1).double()
    numbers = torch.arange(len(rows)) if columns is None else columns
    if numbers.ndim != 1 or numbers.dtype != torch.int64 or bool(((numbers < 0) | (numbers >= len(rows))).any()):
        raise InputError(f"columns are numbers of examples, int64 from 0 to {len(rows) - 1}: got {columns!r}")
    return _members(base, rows, numbers, tuple(depths))


def _members(base: FullyConnected, rows: Tensor, numbers: Tensor, depths: tuple[int, ...]) -> Iterator[Member]:
    own = base._first_own(rows)
    place = (numbers, torch.arange(len(numbers)))  # of an example with itself
    sigma = base._first(rows, rows[numbers])
    sigma[place] = own[numbers]
    thetas: list[Tensor] = [sigma]  # by the number of fixed layers
    for depth in range(1, depths[-1] + 1):
        if depth > 1:
            slope = torch.empty_like(sigma)
            after = torch.empty_like(sigma)
            for strip in strips(len(rows), ROWS):
                after[strip], slope[strip] = base._next(sigma[strip], own[strip], own[numbers])
            own = base._next_own(own)
            after[place], slope[place] = own[numbers], base.weight_std**2 / 2  # exactly; an angle has half the digits
            sigma = after
            for fixed in range(len(thetas)):  # one by one: an old matrix is gone before the next is made
                thetas[fixed] = torch.addcmul(sigma, slope, thetas[fixed])
            thetas.append(sigma)
        if depth in depths:
            for fixed in range(depth):
                yield Member(replace(base, depth=depth, fixed=fixed), thetas[fixed])


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
