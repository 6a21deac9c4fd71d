"""Per-example gradients of one use of one parameter, kept in factored form and contracted without being formed.

Index letters in this file: n, m examples; k, l read-out scalars; t, s positions (tokens, pixels, calls); i input
features; o output features. A factor stands for the rows R[n, k] = d f_k(x_n) / d W, one array of W's shape each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkit.tangent.contract import contract, inner_or_gram, mirrored
from ntkit.tangent.work import OuterWork, Way
from ntkit.tangent.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Factor(ABC):
    """Rows of per-example gradients with respect to one array of shape `shape`.

    Required: `shape`, `examples`, `scalars`, `like`, `rows`, `narrow`, `extend`, `nbytes`. `gram` and `squared_norms`
    have derived forms that go through blocks of rows; factors with structure do better.
    """

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def examples(self) -> int:
        """Number of examples n."""

    @property
    @abstractmethod
    def scalars(self) -> int:
        """Number of read-out scalars k per example."""

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

    @abstractmethod
    def narrow(self, start: int, stop: int) -> Factor:
        """The same for examples start:stop."""

    @abstractmethod
    def extend(self, others: Sequence[Factor]) -> Factor:
        """The same for more examples: those of self, then those of others of the same kind."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory held."""

    @property
    def scalar_nbytes(self) -> int:
        """The part of the memory that grows with the number of scalars."""
        return self.nbytes

    def prefers_rows_among(self, examples: int, partners: int, *, trace: bool, same: bool) -> bool:
        """Whether products of so many examples with so many others, or the same, go through rows worth keeping."""
        return False

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
    def examples(self) -> int:  # noqa: D102
        return self.values.shape[0]

    @property
    def scalars(self) -> int:  # noqa: D102
        return self.values.shape[1]

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

    def narrow(self, start: int, stop: int) -> Rows:  # noqa: D102
        return Rows(self.values[start:stop])

    def extend(self, others: Sequence[Factor]) -> Rows:  # noqa: D102
        return Rows(torch.cat([self.values, *(f.values for f in others)]))  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.values.nbytes


@dataclass(frozen=True, eq=False)
class Outer(Factor):
    """R[n, k] = sum_t g[n, k, t, :] (outer) a[n, t, :], per group: linear layers, and convolutions over patches.

    Groups are independent blocks of output features with inputs of their own; a plain linear layer has one.
    """

    inputs: Tensor  # (n, groups, t, i)
    cotangents: Tensor  # (n, k, groups, t, o)
    shape: tuple[int, ...]  # of the parameter: groups*o entries by i, in whatever axes
    inputs_first: bool = False  # the parameter is stored (i, o)

    @property
    def examples(self) -> int:  # noqa: D102
        return self.inputs.shape[0]

    @property
    def scalars(self) -> int:  # noqa: D102
        return self.cotangents.shape[1]

    @property
    def positions(self) -> int:
        """Number of positions t that are summed over."""
        return self.inputs.shape[2]

    def narrow(self, start: int, stop: int) -> Outer:  # noqa: D102
        return replace(self, inputs=self.inputs[start:stop], cotangents=self.cotangents[start:stop])

    def extend(self, others: Sequence[Factor]) -> Outer:  # noqa: D102
        return replace(
            self,
            inputs=torch.cat([self.inputs, *(f.inputs for f in others)]),  # pyright: ignore[reportAttributeAccessIssue]
            cotangents=torch.cat([self.cotangents, *(f.cotangents for f in others)]),  # pyright: ignore[reportAttributeAccessIssue]
        )

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.inputs.nbytes + self.cotangents.nbytes

    @property
    def scalar_nbytes(self) -> int:  # noqa: D102
        return self.cotangents.nbytes

    @property
    def like(self) -> Tensor:  # noqa: D102
        return self.inputs

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:  # noqa: D102
        n, k, groups = self.examples, self.scalars, self.inputs.shape[1]
        stop = self.shape[0] if stop is None else stop
        if groups > 1:
            letters = "nkgto,ngti->nkgio" if self.inputs_first else "nkgto,ngti->nkgoi"
            rows = torch.einsum(letters, self.cotangents, self.inputs)
            return rows.reshape(n, k, *self.shape)[:, :, start:stop]
        if out is None:
            out = self.inputs.new_empty(n, k, stop - start, *self.shape[1:])
        if self.inputs_first:
            a = self.inputs[:, :, :, start:stop].expand(n, k, -1, -1).flatten(0, 1)
            g = self.cotangents[:, :, 0].flatten(0, 1)
            torch.bmm(a.transpose(1, 2), g, out=out.view(n * k, stop - start, -1))
        else:
            g = self.cotangents[:, :, 0, :, start:stop].transpose(2, 3).reshape(n, k * (stop - start), -1)
            torch.bmm(g, self.inputs[:, 0], out=out.view(n, k * (stop - start), -1))
        return out

    def weighted_sum(self, weights: Tensor) -> Tensor:  # noqa: D102
        g = torch.einsum("nk,nkgto->gnto", weights, self.cotangents).flatten(1, 2)
        a = self.inputs.transpose(0, 1).flatten(1, 2)
        total = a.transpose(1, 2) @ g if self.inputs_first else g.transpose(1, 2) @ a
        return total.reshape(self.shape)

    def weighted_product(self, weights: Tensor, direction: Tensor) -> Tensor:  # noqa: D102
        weighted = torch.einsum("nk,nkgto->ngto", weights, self.cotangents)
        if self.inputs_first:
            return torch.einsum("ngti,ngt->gi", self.inputs, weighted @ direction).reshape(-1)
        return torch.einsum("ngto,ngt->go", weighted, self.inputs @ direction).reshape(-1)

    def gram(self, other: Factor, *, trace: bool = False, workspace: Workspace | None = None) -> Tensor:  # noqa: D102
        workspace = workspace or Workspace()
        way = self.work.way(other.work, trace=trace, same=other is self) if isinstance(other, Outer) else Way.ROWS
        if way is Way.ROWS or not isinstance(other, Outer):
            return super().gram(other, trace=trace, workspace=workspace)
        return contract(self, other, way, trace=trace, workspace=workspace)

    def prefers_rows_among(self, examples: int, partners: int, *, trace: bool, same: bool) -> bool:  # noqa: D102
        return self.work.of(examples).way(self.work.of(partners), trace=trace, same=same) is Way.ROWS

    @cached_property
    def work(self) -> OuterWork:
        """The sizes that decide between the two routes."""
        _, groups, t, i = self.inputs.shape
        return OuterWork(self.examples, self.scalars, t, i, self.cotangents.shape[4], groups)

    def squared_norms(self, workspace: Workspace | None = None) -> Tensor:  # noqa: D102
        if self.positions == 1:
            a = self.inputs[:, :, 0].square().sum(2)  # n, groups
            return torch.einsum("ng,nkgo->nk", a, self.cotangents[:, :, :, 0].square())
        i, o = self.inputs.shape[3], self.cotangents.shape[4]
        if self.positions * (i + self.scalars * o) > self.scalars * i * o:
            return super().squared_norms(workspace)
        aa = self.inputs @ self.inputs.transpose(2, 3)
        gg = self.cotangents @ self.cotangents.transpose(3, 4)
        return torch.einsum("ngts,nkgts->nk", aa, gg)


@dataclass(frozen=True)
class Geometry:
    """How a convolution's window moves: one number per spatial axis; padding may differ between the two ends."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False

    def patches(self, images: Tensor, places: tuple[int, ...]) -> Tensor:
        """Windows of (b, c, *space) images at `places` positions per axis: (b, groups, places, window * c/groups)."""
        images = F.pad(images, [end for pair in reversed(self.padding) for end in pair])
        b, c = images.shape[:2]
        example, channel, *steps = images.stride()
        view = images.as_strided(
            (b, self.groups, *self.window, *places, c // self.groups),
            (
                example,
                channel * (c // self.groups),
                *(step * d for step, d in zip(steps, self.dilation, strict=True)),
                *(step * s for step, s in zip(steps, self.stride, strict=True)),
                channel,
            ),
        )
        # copied in the order of memory: with channels innermost if the images have them so, else with places
        axes = len(self.window)
        window, moved = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
        shape = b, self.groups, prod(places), prod(self.window) * (c // self.groups)
        if channel == 1:
            return view.permute(0, 1, *moved, *window, 2 + 2 * axes).reshape(shape)
        unfolded = view.permute(0, 1, *window, 2 + 2 * axes, *moved)
        return unfolded.reshape(*shape[:2], shape[3], shape[2]).transpose(2, 3)


# Bytes of patches unfolded at a time: few enough to be read back from a processor's cache (measured best on a CPU).
UNFOLDED = 5 * 2**20


@dataclass(frozen=True, eq=False)
class Convolution(Factor):
    """A convolution's weight: an `Outer` over the patches, unfolded a few examples at a time.

    For a transposed convolution input and output change places: the patches are those of the cotangent.
    """

    inputs: Tensor  # (n, c, *space)
    cotangents: Tensor  # (n, k, o, *space)
    shape: tuple[int, ...]
    geometry: Geometry

    @property
    def examples(self) -> int:  # noqa: D102
        return self.inputs.shape[0]

    @property
    def scalars(self) -> int:  # noqa: D102
        return self.cotangents.shape[1]

    def narrow(self, start: int, stop: int) -> Convolution:  # noqa: D102
        return replace(self, inputs=self.inputs[start:stop], cotangents=self.cotangents[start:stop])

    def extend(self, others: Sequence[Factor]) -> Convolution:  # noqa: D102
        return replace(
            self,
            inputs=torch.cat([self.inputs, *(f.inputs for f in others)]),  # pyright: ignore[reportAttributeAccessIssue]
            cotangents=torch.cat([self.cotangents, *(f.cotangents for f in others)]),  # pyright: ignore[reportAttributeAccessIssue]
        )

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.inputs.nbytes + self.cotangents.nbytes

    @property
    def scalar_nbytes(self) -> int:  # noqa: D102
        return self.cotangents.nbytes

    @cached_property
    def work(self) -> OuterWork:
        """The sizes that decide between pairs and rows."""
        groups, rest = self.geometry.groups, prod(self.shape[1:])
        places = self.inputs.shape[2:] if self.geometry.transposed else self.cotangents.shape[3:]
        return OuterWork(self.examples, self.scalars, prod(places), rest, self.shape[0] // groups, groups)

    def outer(self) -> Outer:
        """Sums of outer products over patches; their features are (*window, channels), so rows are (n, k, *stored)."""
        a, g, groups = self.inputs, self.cotangents, self.geometry.groups
        n, k = g.shape[:2]
        if self.geometry.transposed:
            places = tuple(a.shape[2:])
            patches = self.geometry.patches(g.flatten(0, 1), places)
            patches = patches.reshape(n, k, *patches.shape[1:])
            a = a.reshape(n, groups, a.shape[1] // groups, -1).transpose(2, 3)
            return Outer(a, patches, self.stored, inputs_first=True)
        patches = self.geometry.patches(a, tuple(g.shape[3:]))
        g = g.reshape(n, k, groups, g.shape[2] // groups, -1).transpose(3, 4)
        return Outer(patches, g, self.stored)

    @property
    def stored(self) -> tuple[int, ...]:
        """The parameter's shape with the channels behind the window, the order in which patches are cheapest."""
        return self.shape[0], *self.shape[2:], self.shape[1]

    @property
    def like(self) -> Tensor:  # noqa: D102
        return self.inputs

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:  # noqa: D102
        height, *rest = self.stored
        shape = self.examples, self.scalars, (height if stop is None else stop) - start, *rest
        out = self.inputs.new_empty(shape) if out is None else out.view(shape)
        step = max(1, UNFOLDED // self._patches_nbytes)
        for first in range(0, self.examples, step):
            here = out[first : first + step]
            rows = self.narrow(first, first + step).outer().rows(start, stop, here)
            if rows is not here:
                here.copy_(rows)
        return out.movedim(-1, 3)

    def blocks(self, other: Factor, workspace: Workspace) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of a few channels at a time, so that every patch is unfolded once."""
        if not isinstance(other, Convolution) or self.geometry.groups > 1:
            yield from super().blocks(other, workspace)
            return
        sides = (self,) if other is self else (self, other)
        each = (prod(self.shape) // self.shape[1]) * self.like.element_size()
        each *= sum(side.examples * side.scalars for side in sides)
        step = max(1, workspace.nbytes // each)
        for start in range(0, self.shape[1], step):
            parts = [side.channels(start, min(start + step, self.shape[1])) for side in sides]
            rows = [
                part.rows(out=workspace.take(i, (part.examples, part.scalars, *part.shape), part.like))
                for i, part in enumerate(parts)
            ]
            yield rows[0], rows[-1]

    def channels(self, start: int, stop: int) -> Convolution:
        """The same for entries start:stop of the parameter's second axis: of the channels that are unfolded."""
        shape = self.shape[0], stop - start, *self.shape[2:]
        if self.geometry.transposed:
            return replace(self, cotangents=self.cotangents[:, :, start:stop], shape=shape)
        return replace(self, inputs=self.inputs[:, start:stop], shape=shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self.outer().weighted_sum(weights).movedim(-1, 1)

    def weighted_product(self, weights: Tensor, direction: Tensor) -> Tensor:  # noqa: D102
        return self.outer().weighted_product(weights, direction.view(self.shape[1:]).movedim(0, -1).reshape(-1))

    def gram(self, other: Factor, *, trace: bool = False, workspace: Workspace | None = None) -> Tensor:  # noqa: D102
        workspace, same = workspace or Workspace(), other is self
        way = self.work.way(other.work, trace=trace, same=same) if isinstance(other, Convolution) else Way.ROWS
        if way is Way.ROWS or not isinstance(other, Convolution):
            return super().gram(other, trace=trace, workspace=workspace)
        n, k, m, l = self.examples, self.scalars, other.examples, other.scalars  # noqa: E741
        out = self.inputs.new_zeros((n, m) if trace else (n, k, m, l))
        spans, others = self._unfoldable(workspace), other._unfoldable(workspace)
        for i, (a, b) in enumerate(spans):
            left = self.narrow(a, b).outer()
            for c, d in spans[i:] if same else others:
                right = left if same and c == a else other.narrow(c, d).outer()
                part = contract(left, right, way, trace=trace, workspace=workspace)
                (out[a:b, c:d] if trace else out[a:b, :, c:d]).copy_(part)
        return mirrored(out) if same and len(spans) > 1 else out

    def _unfoldable(self, workspace: Workspace) -> list[tuple[int, int]]:
        """Start and stop of examples whose patches, or those of another side, fit half the workspace."""
        step = max(1, workspace.nbytes // (2 * self._patches_nbytes))
        return [(a, min(a + step, self.examples)) for a in range(0, self.examples, step)]

    @property
    def _patches_nbytes(self) -> int:
        """Memory of one example's patches."""
        images = self.scalars if self.geometry.transposed else 1
        return images * self.work.positions * self.geometry.groups * prod(self.shape[1:]) * self.like.element_size()

    def prefers_rows_among(self, examples: int, partners: int, *, trace: bool, same: bool) -> bool:  # noqa: D102
        return self.work.of(examples).way(self.work.of(partners), trace=trace, same=same) is Way.ROWS


@dataclass(frozen=True, eq=False)
class Lookup(Factor):
    """Rows of an embedding: g[n, k, t, :] added to row ids[n, t]. Only the ids that occur are ever formed."""

    ids: Tensor  # (n, t)
    cotangents: Tensor  # (n, k, t, o); already zero at padding
    shape: tuple[int, ...]  # (vocabulary, o)

    @property
    def examples(self) -> int:  # noqa: D102
        return self.ids.shape[0]

    @property
    def scalars(self) -> int:  # noqa: D102
        return self.cotangents.shape[1]

    def narrow(self, start: int, stop: int) -> Lookup:  # noqa: D102
        return replace(self, ids=self.ids[start:stop], cotangents=self.cotangents[start:stop])

    def extend(self, others: Sequence[Factor]) -> Lookup:  # noqa: D102
        return replace(
            self,
            ids=torch.cat([self.ids, *(f.ids for f in others)]),  # pyright: ignore[reportAttributeAccessIssue]
            cotangents=torch.cat([self.cotangents, *(f.cotangents for f in others)]),  # pyright: ignore[reportAttributeAccessIssue]
        )

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.ids.nbytes + self.cotangents.nbytes

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


@dataclass(frozen=True, eq=False)
class Total(Factor):
    """The sum of several uses of one parameter that have no common factored form, as in tied weights."""

    terms: tuple[Factor, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # noqa: D102
        return self.terms[0].shape

    @property
    def examples(self) -> int:  # noqa: D102
        return self.terms[0].examples

    @property
    def scalars(self) -> int:  # noqa: D102
        return self.terms[0].scalars

    @property
    def nbytes(self) -> int:  # noqa: D102
        return sum(term.nbytes for term in self.terms)

    @property
    def like(self) -> Tensor:  # noqa: D102
        return self.terms[0].like

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:  # noqa: D102
        total = self.terms[0].rows(start, stop)
        for term in self.terms[1:]:
            total = torch.add(total, term.rows(start, stop), out=out)
        return total

    def narrow(self, start: int, stop: int) -> Total:  # noqa: D102
        return Total(tuple(term.narrow(start, stop) for term in self.terms))

    def extend(self, others: Sequence[Factor]) -> Total:  # noqa: D102
        columns = zip(*(other.terms for other in others), strict=True)  # pyright: ignore[reportAttributeAccessIssue]
        return Total(tuple(mine.extend(theirs) for mine, theirs in zip(self.terms, columns, strict=True)))


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
    def examples(self) -> int:  # noqa: D102
        return self.inner.examples

    @property
    def scalars(self) -> int:  # noqa: D102
        return self.inner.scalars

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.inner.nbytes

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

    def narrow(self, start: int, stop: int) -> PulledBack:  # noqa: D102
        return replace(self, inner=self.inner.narrow(start, stop))

    def extend(self, others: Sequence[Factor]) -> PulledBack:  # noqa: D102
        return replace(self, inner=self.inner.extend([f.inner for f in others]))  # pyright: ignore[reportAttributeAccessIssue]
