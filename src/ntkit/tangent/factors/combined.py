"""Factors made of others: sums of several uses of a parameter, and maps back to what a weight was made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.tangent.factors.factor import Factor
from ntkit.tangent.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, eq=False)
class Total(Factor):
    """The sum of several uses of one parameter that have no common factored form, as in tied weights."""

    terms: tuple[Factor, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # noqa: D102
        return self.terms[0].shape

    @property
    def arrays(self) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(array for term in self.terms for array in term.arrays)

    def of(self, *arrays: Tensor) -> Total:  # noqa: D102
        remaining = iter(arrays)
        return Total(tuple(term.of(*(next(remaining) for _ in term.arrays)) for term in self.terms))

    @property
    def like(self) -> Tensor:  # noqa: D102
        return self.terms[0].like

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:  # noqa: D102
        total = self.terms[0].rows(start, stop)
        for term in self.terms[1:]:
            total = torch.add(total, term.rows(start, stop), out=out)
        return total


@dataclass(frozen=True, eq=False)
class PulledBack(Factor):
    """Rows of a parameter through a tensor that is made of it: W = g v/|v|, slices, sums, orthogonal maps.

    The map from the parameter to the tensor is torch's own graph; its transpose is applied to all rows at once.
    """

    inner: Factor  # rows with respect to `derived`
    derived: Tensor
    leaf: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # noqa: D102
        return tuple(self.leaf.shape)

    @property
    def arrays(self) -> tuple[Tensor, ...]:  # noqa: D102
        return self.inner.arrays

    def of(self, *arrays: Tensor) -> PulledBack:  # noqa: D102
        return replace(self, inner=self.inner.of(*arrays))

    @property
    def like(self) -> Tensor:  # noqa: D102
        return self.leaf

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:  # noqa: D102
        n, k = self.examples, self.scalars
        flat = self.inner.rows().reshape(n * k, *self.derived.shape)

        def pull(cotangent: Tensor, batched: bool) -> Tensor:
            (grad,) = torch.autograd.grad(
                self.derived, self.leaf, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
            if grad is not None:
                return grad
            return cotangent.new_zeros((*cotangent.shape[:1], *self.shape) if batched else self.shape)

        try:
            pulled = pull(flat, True)
        except RuntimeError:  # an operation that torch cannot vectorize
            pulled = torch.stack([pull(row, False) for row in flat])
        pulled = pulled.detach().view(n, k, *self.shape)
        return pulled[:, :, start:stop] if self.shape else pulled

    def blocks(self, other: Factor, workspace: Workspace) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        left = self.rows()  # in one piece: pulling back is all or nothing
        yield left, left if other is self else other.rows()
