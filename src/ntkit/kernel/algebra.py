"""What can be made of kernels as matrices: sums, products, multiples, and what centring and normalising leave.

All are read in tiles as what they are made of is, and carry the gradients that the tiles carry.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import Kernel, bounds
from ntkit.tangent.identity import digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Wrapped(Kernel):
    """A kernel made from one other kernel of the same type and place."""

    def __init__(self, inner: Kernel) -> None:
        self._inner = inner
        self.scalars = inner.scalars

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self._inner.shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self._inner.dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self._inner.device

    @property
    def symmetric(self) -> bool:  # noqa: D102
        return self._inner.symmetric

    def to(self, device: torch.device | str) -> Kernel:
        """The same of its kernels on another device; those that cannot be moved stay where they are."""
        there = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) or (isinstance(value, Kernel) and hasattr(value, "to")):
                setattr(there, name, value.to(device))  # pyright: ignore[reportAttributeAccessIssue]
        return there

    def identity(self) -> dict[str, str]:
        """What the inner kernel depends on, and what is done to it."""
        inner = self._inner.identity()
        return {**inner, "then": f"{inner.get('then', '')} {self._described()}"}

    def _described(self) -> str:
        """What this makes of the inner kernel, in a word."""
        return type(self).__name__.lower()


class Transposed(Wrapped):
    """Rows and columns exchanged."""

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        rows, cols = self._inner.shape
        return cols, rows

    def tile(self, rows: slice, cols: slice) -> Tensor:  # noqa: D102
        return self._inner.tile(cols, rows).T


class Changed(Wrapped):
    """A kernel whose entries each follow from one of the inner kernel's."""

    @abstractmethod
    def _changed(self, values: Tensor, rows: slice, cols: slice) -> Tensor:
        """The entries at `rows` x `cols` from those of the inner kernel there."""

    def tile(self, rows: slice, cols: slice) -> Tensor:  # noqa: D102
        return self._changed(self._inner.tile(rows, cols), rows, cols)

    def stripe(self, rows: slice, columns: Sequence[slice], *, memory: int | None = None) -> Iterator[Tensor]:  # noqa: D102
        tiles = self._inner.stripe(rows, columns, memory=memory)
        return (self._changed(values, rows, cols) for values, cols in zip(tiles, columns, strict=True))

    def tile_rows(self, memory: int) -> int:  # noqa: D102
        return min(self._inner.tile_rows(memory), super().tile_rows(memory))


class Scaled(Changed):
    """A kernel times a number."""

    def __init__(self, inner: Kernel, factor: float) -> None:
        """Scale `inner` by `factor`.

        Raises:
            InputError: if that is not finite.
        """
        if not math.isfinite(factor):
            raise InputError(f"a kernel is scaled by a finite number: got {factor!r}")
        super().__init__(inner)
        self._factor = factor

    def _described(self) -> str:
        return f"times {self._factor!r}"

    def _changed(self, values: Tensor, rows: slice, cols: slice) -> Tensor:
        return self._factor * values

    def diagonal(self) -> Tensor:  # noqa: D102
        return self._factor * self._inner.diagonal()

    def tile_rows(self, memory: int) -> int:  # noqa: D102
        return self._inner.tile_rows(memory)


class Pair(Wrapped):
    """Two kernels of one shape, put together entry by entry."""

    def __init__(self, left: Kernel, right: Kernel) -> None:
        """Of two kernels on the same examples."""
        if left.shape != right.shape:
            raise InputError(
                f"cannot {self._verb} kernels of different shapes: {left.shape} and {right.shape}, with {left.scalars} "
                f"and {right.scalars} rows per example"
            )
        super().__init__(left)
        self._right = right

    _verb: str

    @abstractmethod
    def _together(self, left: Tensor, right: Tensor) -> Tensor:
        """Entries from those of the two."""

    def identity(self) -> dict[str, str]:
        """What both depend on, and what is done to them."""
        left, right = self._inner.identity(), self._right.identity()
        both = {f"left {k}": v for k, v in left.items()} | {f"right {k}": v for k, v in right.items()}
        return both | self._named()

    def _named(self) -> dict[str, str]:
        return {"kernel": type(self).__name__.lower()}

    def stripe(self, rows: slice, columns: Sequence[slice], *, memory: int | None = None) -> Iterator[Tensor]:  # noqa: D102
        half = None if memory is None else memory // 2  # both hold their rows
        pairs = zip(
            self._inner.stripe(rows, columns, memory=half), self._right.stripe(rows, columns, memory=half), strict=True
        )
        return (self._together(left, right) for left, right in pairs)

    def tile_rows(self, memory: int) -> int:  # noqa: D102
        return min(self._inner.tile_rows(memory // 2), self._right.tile_rows(memory // 2))

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return torch.promote_types(self._inner.dtype, self._right.dtype)

    @property
    def symmetric(self) -> bool:  # noqa: D102
        return self._inner.symmetric and self._right.symmetric

    def tile(self, rows: slice, cols: slice) -> Tensor:  # noqa: D102
        return self._together(self._inner.tile(rows, cols), self._right.tile(rows, cols))

    def diagonal(self) -> Tensor:  # noqa: D102
        return self._together(self._inner.diagonal(), self._right.diagonal())


class Sum(Pair):
    """Sum of two kernels: the kernel of the concatenated features."""

    _verb = "add"

    def _named(self) -> dict[str, str]:
        return {}  # as it was before there were products: matrices on disk go on

    def _together(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


class Product(Pair):
    """Product of two kernels entry by entry (Schur): the kernel of all products of their features."""

    _verb = "multiply"

    def _together(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right


class Centred(Changed):
    """H K H for a symmetric kernel; row means are computed once, in strips."""

    def __init__(self, inner: Kernel) -> None:
        """Centre a symmetric kernel."""
        if not inner.symmetric:
            raise InputError("only a symmetric kernel can be centred: its rows and columns must be the same examples")
        super().__init__(inner)
        ones = torch.ones(inner.shape[1], dtype=inner.dtype, device=inner.device)
        self._means = (inner @ ones) / inner.shape[1]

    def _changed(self, values: Tensor, rows: slice, cols: slice) -> Tensor:
        # the two means are added first: that order rounds alike on both sides of the diagonal
        return values - (self._means[rows, None] + self._means[None, cols]) + self._means.mean()


class Recentred(Changed):
    """A kernel of features from which one and the same vector is taken away, the mean over a reference sample."""

    def __init__(self, inner: Kernel, rows: Tensor, cols: Tensor, level: Tensor, reference: Kernel) -> None:
        """Centre with known means.

        Args:
            inner: the kernel.
            rows: its mean over the reference for each row, (rows,).
            cols: the same for each column.
            level: the mean of the kernel within the reference.
            reference: that kernel, for `identity`.
        """
        super().__init__(inner)
        self._rows, self._cols, self._level, self._reference = rows, cols, level, reference

    def _described(self) -> str:
        return f"centred on {digest([repr(sorted(self._reference.identity().items()))])[:16]}"

    def _changed(self, values: Tensor, rows: slice, cols: slice) -> Tensor:
        # the two means are added first, as above
        return values - (self._rows[rows, None] + self._cols[None, cols]) + self._level

    def diagonal(self) -> Tensor:  # noqa: D102
        size = min(self.shape)
        return self._inner.diagonal() - (self._rows[:size] + self._cols[:size]) + self._level


class Normalised(Changed):
    """A kernel of features of length one: the cosine of the angle between them."""

    def __init__(self, inner: Kernel, rows: Tensor, cols: Tensor) -> None:
        """Divide by the lengths of the features of the rows, and of the columns."""
        super().__init__(inner)
        self._rows, self._cols = rows, cols

    def _changed(self, values: Tensor, rows: slice, cols: slice) -> Tensor:
        (a, b), (c, d) = bounds(rows, self.shape[0]), bounds(cols, self.shape[1])
        values = values / (self._rows[a:b, None] * self._cols[None, c:d])
        if self.symmetric and max(a, c) < min(b, d):
            both = torch.arange(max(a, c), min(b, d), device=values.device)
            values[both - a, both - c] = 1.0
        return values

    def diagonal(self) -> Tensor:  # noqa: D102
        if self.symmetric:
            return torch.ones(self.shape[0], dtype=self.dtype, device=self.device)
        size = min(self.shape)
        return self._inner.diagonal() / (self._rows[:size] * self._cols[:size])
