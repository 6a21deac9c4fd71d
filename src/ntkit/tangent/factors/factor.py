"""What a factor is, and the plainest one: rows that are there already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.tangent.contract import inner_or_gram
from ntkit.tangent.work import OuterWork, Way
from ntkit.tangent.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self


class Factor(ABC):
    """Rows of per-example gradients with respect to one array of shape `shape`.

    Required: `shape`, `like`, `rows`, `arrays`, `of`. `gram` and `squared_norms` have derived forms that go through
    blocks of rows; factors with structure do better.
    """

    shape: tuple[int, ...]

    @property
    def work(self) -> OuterWork | None:
        """The sizes that decide between rows and other ways, of a sum of outer products; None for anything else."""
        return None

    @property
    def examples(self) -> int:
        """Number of examples n."""
        return self.arrays[0].shape[0]

    @property
    def scalars(self) -> int:
        """Number of read-out scalars k per example."""
        return self.arrays[-1].shape[1]

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the rows' type and device."""

    @abstractmethod
    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """The rows (n, k, *shape), or of their first parameter axis only the entries start:stop.

        Args:
            start: first entry of the parameter's first axis.
            stop: the one behind the last.
            out: memory of the result's shape, which may be used for it or not.
        """

    @property
    @abstractmethod
    def arrays(self) -> tuple[Tensor, ...]:
        """What is held, with the examples along the first axis of each, and the scalars along the last one's second."""

    @abstractmethod
    def of(self, *arrays: Tensor) -> Factor:
        """The same kind of factor of other examples, given what `arrays` are for them."""

    def narrow(self, start: int, stop: int) -> Self:
        """The same for examples start:stop, without a copy."""
        return self.of(*(array[start:stop] for array in self.arrays))  # pyright: ignore[reportReturnType]

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def scalar_nbytes(self) -> int:
        """The part of the memory that grows with the number of scalars."""
        return self.nbytes

    @property
    def met_entries(self) -> int:
        """Entries of two examples' rows that are multiplied with each other."""
        return prod(self.shape)

    def prefers_rows_among(self, examples: int, partners: int, *, trace: bool, same: bool) -> bool:
        """Whether products of so many examples with so many others, or the same, go through rows worth keeping."""
        if self.work is None:
            return False
        return self.work.of(examples).way(self.work.of(partners), trace=trace, same=same) is Way.ROWS

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_nk weights[n, k] R[n, k]: one gradient of the parameter's shape."""
        return torch.einsum("nk,nk...->...", weights, self.rows())

    def weighted_product(self, weights: Tensor, direction: Tensor) -> Tensor:
        """That gradient as a matrix (first axis by the rest) times a vector: cheap where the gradient is large."""
        return as_matrix(self.weighted_sum(weights)) @ direction

    def gram(self, other: Factor, *, trace: bool = False, workspace: Workspace | None = None) -> Tensor:
        """Inner products of all rows: (n, k, m, l), or with `trace` summed over k = l: (n, m).

        Args:
            other: rows of the same parameter.
            trace: sum over equal scalars.
            workspace: temporary memory; the same for all factors of a pair of batches.
        """
        return rows_gram(self.blocks(other, workspace or Workspace()), trace=trace)

    def gram_factors(self, other: Factor, *, trace: bool, workspace: Workspace) -> tuple[Tensor, Tensor | None]:
        """Two arrays whose elementwise product is `gram`, or `gram` and None.

        The first of two is not written to: the next factor may have it in common.
        """
        return self.gram(other, trace=trace, workspace=workspace), None

    def squared_norms(self, workspace: Workspace | None = None) -> Tensor:
        """Squared length of every row, (n, k)."""
        total = 0
        for left, _ in self.blocks(self, workspace or Workspace()):
            total = total + left.reshape(*left.shape[:2], -1).square().sum(2)
        return total  # pyright: ignore[reportReturnType]

    def blocks(self, other: Factor, workspace: Workspace) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of self and of other, the same columns in both, in blocks that fit the workspace."""
        height, rest = (self.shape[0], self.shape[1:]) if self.shape else (1, ())
        sides = (self,) if other is self else (self, other)
        each = prod(rest) * self.like.element_size() * sum(side.examples * side.scalars for side in sides)
        step = max(1, min(height, workspace.nbytes // max(1, each)))
        for start in range(0, height, step):
            stop = min(start + step, height)
            rows = [
                side.rows(start, stop, workspace.take(i, (side.examples, side.scalars, stop - start, *rest), side.like))
                for i, side in enumerate(sides)
            ]
            yield rows[0], rows[-1]


def as_matrix(values: Tensor) -> Tensor:
    """A parameter's array as a matrix, its first axis by all others."""
    return values.reshape(values.shape[0], -1) if values.ndim else values.reshape(1, 1)


def rows_gram(blocks: Iterator[tuple[Tensor, Tensor]], *, trace: bool) -> Tensor:
    """The Gram matrix of rows that arrive in column blocks: (n, k, m, l), or with `trace` (n, m)."""
    total: Tensor | None = None
    for left, right in blocks:
        n, k, m, l = left.shape[0], left.shape[1], right.shape[0], right.shape[1]  # noqa: E741
        # the parameter's axes in the order they have in memory, so that nothing is copied
        order = [0, 1, *sorted(range(2, left.ndim), key=left.stride, reverse=True)]
        left, right = left.permute(order), right.permute(order)
        part = inner_or_gram(left.reshape(n if trace else n * k, -1), right.reshape(m if trace else m * l, -1))
        part = part if trace else part.view(n, k, m, l)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


@dataclass(frozen=True, eq=False)
class Rows(Factor):
    """Rows that are there already: biases, normalization weights, whatever has no cheaper form."""

    values: Tensor  # (n, k, *shape)

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # noqa: D102
        return tuple(self.values.shape[2:])

    @property
    def like(self) -> Tensor:  # noqa: D102
        return self.values

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:  # noqa: D102
        return self.values[:, :, start:stop] if self.shape else self.values

    def blocks(self, other: Factor, workspace: Workspace) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        if isinstance(other, Rows):  # nothing is formed, so all at once
            yield self.values, other.values
        else:
            yield from super().blocks(other, workspace)

    @property
    def arrays(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (self.values,)

    def of(self, *arrays: Tensor) -> Rows:  # noqa: D102
        return Rows(*arrays)
