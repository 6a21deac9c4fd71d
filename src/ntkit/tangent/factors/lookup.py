"""Embeddings: rows that are zero but for the tokens of an example."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.tangent.factors.factor import Factor, rows_gram
from ntkit.tangent.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, eq=False)
class Lookup(Factor):
    """Rows of an embedding: g[n, k, t, :] added to row ids[n, t]. Only the ids that occur are ever formed."""

    ids: Tensor  # (n, t)
    cotangents: Tensor  # (n, k, t, o); already zero at padding
    shape: tuple[int, ...]  # (vocabulary, o)

    @property
    def arrays(self) -> tuple[Tensor, ...]:  # noqa: D102
        return self.ids, self.cotangents

    def of(self, *arrays: Tensor) -> Lookup:  # noqa: D102
        return replace(self, ids=arrays[0], cotangents=arrays[1])

    @property
    def scalar_nbytes(self) -> int:  # noqa: D102
        return self.cotangents.nbytes

    @property
    def like(self) -> Tensor:  # noqa: D102
        return self.cotangents

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:  # noqa: D102
        stop = self.shape[0] if stop is None else stop
        return self._scatter(self.ids - start, stop - start)

    def _scatter(self, ids: Tensor, height: int) -> Tensor:
        """Rows over `height` places; ids outside are dropped."""
        n, k, t, o = self.cotangents.shape
        inside = (ids >= 0) & (ids < height)
        ids = torch.where(inside, ids, height)
        rows = self.cotangents.new_zeros(n, k, height + 1, o)
        rows.scatter_add_(2, ids[:, None, :, None].expand(n, k, t, o), self.cotangents)
        return rows[:, :, :height]

    def weighted_sum(self, weights: Tensor) -> Tensor:  # noqa: D102
        g = torch.einsum("nk,nkto->nto", weights, self.cotangents)
        return g.new_zeros(self.shape).index_add_(0, self.ids.reshape(-1), g.reshape(-1, self.shape[1]))

    def gram(self, other: Factor, *, trace: bool = False, workspace: Workspace | None = None) -> Tensor:  # noqa: D102
        workspace = workspace or Workspace()
        if not isinstance(other, Lookup):
            return super().gram(other, trace=trace, workspace=workspace)
        return rows_gram(self.common_blocks(other, workspace.nbytes), trace=trace)

    def squared_norms(self, workspace: Workspace | None = None) -> Tensor:  # noqa: D102
        same = (self.ids[:, :, None] == self.ids[:, None, :]).to(self.cotangents)
        gg = self.cotangents @ self.cotangents.transpose(2, 3)
        return torch.einsum("nts,nkts->nk", same, gg)

    def common_blocks(self, other: Lookup, scratch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Row blocks over the ids that occur in both batches; all others contribute nothing."""
        left, right = self.ids.unique(), other.ids.unique()
        common = left if other is self else left[torch.isin(left, right)]
        rows = self.examples * self.scalars + other.examples * other.scalars
        step = max(1, min(len(common), scratch // max(1, rows * self.shape[1] * 4)))
        if len(common) == 0:
            yield self._scatter(self.ids - self.shape[0], 1), other._scatter(other.ids - other.shape[0], 1)
        for start in range(0, len(common), step):
            part = common[start : start + step]
            mine = self._scatter(_positions(self.ids, part), len(part))
            yield mine, mine if other is self else other._scatter(_positions(other.ids, part), len(part))


def _positions(ids: Tensor, sorted_values: Tensor) -> Tensor:
    """Index of each id in `sorted_values`, or -1."""
    place = torch.searchsorted(sorted_values, ids.contiguous()).clamp_(max=len(sorted_values) - 1)
    return torch.where(sorted_values[place] == ids, place, -1)
