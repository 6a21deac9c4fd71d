"""Embeddings: rows that are zero but for the tokens of an example.

Two examples meet only in the ids that they have in common. Most ids of a large vocabulary occur a few times in a batch:
for these the places that hold the same id are put together pair by pair, and nothing is formed. Ids that most examples
have, such as punctuation, would make too many pairs; for these rows are formed, of their ids alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.tangent.factors.factor import Factor, rows_gram
from ntkit.tangent.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

# Multiplying one pair of places takes as long as multiplying so many pairs of examples in a product of rows (measured;
# the rows have to be cleared and filled as well).
PAIR = 32
# Bytes for the places of one pair, while they are found.
PLACES = 64


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
        rare, pairs, common = self._ids_with(other)
        total = self._pairs_gram(other, rare, pairs, trace=trace, scratch=workspace.nbytes)
        if len(common):
            total += rows_gram(self._blocks_of(other, common, workspace.nbytes), trace=trace)
        return total

    @property
    def met_entries(self) -> int:  # noqa: D102
        height, width = self.shape
        t = self.ids.shape[1]
        return height * width if PAIR * t**2 >= height**2 else max(1, t**2 * width // height)

    def _ids_with(self, other: Lookup) -> tuple[Tensor, Tensor, Tensor]:
        """The sorted ids that occur in both batches: those to be taken pair by pair, their pairs, and those by rows."""
        ids, times = self.ids.unique(return_counts=True)
        pairs = times * times
        if other is not self:
            others, other_times = other.ids.unique(return_counts=True)
            place = _positions(ids, others)
            ids, pairs = ids[place >= 0], (times * other_times[place])[place >= 0]
        rare = PAIR * pairs < self.examples * other.examples
        return ids[rare], pairs[rare], ids[~rare]

    def _pairs_gram(self, other: Lookup, ids: Tensor, pairs: Tensor, *, trace: bool, scratch: int) -> Tensor:
        """Inner products as far as they come from some ids, which make so many pairs of places each."""
        n, k, t, o = self.cotangents.shape
        m, l, s = other.cotangents.shape[:3]  # noqa: E741
        out = self.cotangents.new_zeros((n * m,) if trace else (n * m, k, l))
        step = max(1, scratch // (2 * (k + l) * o * out.element_size()))
        for mine, others in _equal_places(self.ids, other.ids, ids, pairs, max(1, scratch // PLACES)):
            for start in range(0, len(mine), step):
                a, b = mine[start : start + step], others[start : start + step]
                left, right = self.cotangents[a // t, :, a % t], other.cotangents[b // s, :, b % s]
                products = left.mul_(right).sum((1, 2)) if trace else left @ right.transpose(1, 2)
                out.index_add_(0, a // t * m + b // s, products)
        return out.view(n, m) if trace else out.view(n, m, k, l).transpose(1, 2)

    def squared_norms(self, workspace: Workspace | None = None) -> Tensor:  # noqa: D102
        same = (self.ids[:, :, None] == self.ids[:, None, :]).to(self.cotangents)
        gg = self.cotangents @ self.cotangents.transpose(2, 3)
        return torch.einsum("nts,nkts->nk", same, gg)

    def _blocks_of(self, other: Lookup, ids: Tensor, scratch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of rows over some ids."""
        rows = self.examples * self.scalars + other.examples * other.scalars
        step = max(1, min(len(ids), scratch // max(1, rows * self.shape[1] * self.cotangents.element_size())))
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            mine = self._scatter(_positions(self.ids, part), len(part))
            yield mine, mine if other is self else other._scatter(_positions(other.ids, part), len(part))


def _positions(ids: Tensor, sorted_values: Tensor) -> Tensor:
    """Index of each id in `sorted_values`, or -1."""
    place = torch.searchsorted(sorted_values, ids.contiguous()).clamp_(max=len(sorted_values) - 1)
    return torch.where(sorted_values[place] == ids, place, -1)


def _equal_places(
    left: Tensor, right: Tensor, ids: Tensor, pairs: Tensor, room: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of places of two arrays, each counted in its flat order, that hold the same one of some sorted ids.

    Args:
        left: an array of ids.
        right: another.
        ids: which count.
        pairs: how many pairs each of them makes.
        room: pairs that come at a time, about.
    """
    left_values, left_order = left.flatten().sort()
    values, order = right.flatten().sort()
    sizes = ((pairs.cumsum(0) - pairs) // room).unique_consecutive(return_counts=True)[1]
    for part in ids.split(sizes.tolist()):
        inside = _positions(left_values, part) >= 0
        mine, wanted = left_order[inside], left_values[inside]
        first, behind = torch.searchsorted(values, wanted), torch.searchsorted(values, wanted, right=True)
        times = behind - first
        run = torch.arange(int(times.sum()), device=ids.device) - (times.cumsum(0) - times).repeat_interleave(times)
        yield mine.repeat_interleave(times), order[first.repeat_interleave(times) + run]
