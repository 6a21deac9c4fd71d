"""Convolutions: sums of outer products over patches, which are unfolded only when they are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ntkit.tangent import images
from ntkit.tangent.contract import contract, mirrored
from ntkit.tangent.factors.factor import Factor
from ntkit.tangent.factors.outer import Outer
from ntkit.tangent.grain import grain
from ntkit.tangent.pixels import pixel_gram
from ntkit.tangent.work import OuterWork, Way
from ntkit.tangent.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Geometry:
    """How a convolution's window moves: one number per spatial axis; padding may differ between the two ends."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False

    def patches(self, batch: Tensor, places: tuple[int, ...]) -> Tensor:
        """Windows of (b, c, *space) images at `places` positions per axis: (b, groups, places, window * c/groups)."""
        batch = F.pad(batch, [end for pair in reversed(self.padding) for end in pair])
        b, c = batch.shape[:2]
        example, channel, *steps = batch.stride()
        view = batch.as_strided(
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
    def arrays(self) -> tuple[Tensor, ...]:  # noqa: D102
        return self.inputs, self.cotangents

    def of(self, *arrays: Tensor) -> Convolution:  # noqa: D102
        return replace(self, inputs=arrays[0], cotangents=arrays[1])

    @property
    def scalar_nbytes(self) -> int:  # noqa: D102
        return self.cotangents.nbytes

    @cached_property
    def work(self) -> OuterWork:  # pyright: ignore[reportIncompatibleMethodOverride]  # noqa: D102
        groups, rest = self.geometry.groups, prod(self.shape[1:])
        places = self.inputs.shape[2:] if self.geometry.transposed else self.cotangents.shape[3:]
        work = OuterWork(
            self.examples, self.scalars, prod(places), rest, self.shape[0] // groups, groups, grain(self.inputs.device)
        )
        if self.geometry.transposed or prod(self.geometry.window) == 1:
            return work
        return replace(work, pixels=self.inputs.shape[2:].numel(), window=self.geometry.window)

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
        if shape[2] == height and images.has_fast_rows(self.inputs, self.cotangents, self.geometry):
            images.weight_gradients(self.inputs, self.cotangents, self.geometry, out)
            return out.movedim(-1, 3)
        step = max(1, grain(self.inputs.device).unfolded // self._patches_nbytes)
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
        blocks = -(-self.shape[1] // max(1, workspace.nbytes // each))
        step = -(-self.shape[1] // blocks)  # of even size
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

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        """left R right^T for every row, (n, k, d1, d2), by convolving the images with what `right` looks for.

        Neither rows nor patches are formed; for one group, not transposed.

        Args:
            left: (d1, o).
            right: (d2, features), in the order of patches: channels innermost.
        """
        geometry, axes = self.geometry, len(self.geometry.window)
        filters = right.view(len(right), *geometry.window, self.shape[1]).movedim(-1, 1)
        padded = F.pad(self.inputs, [end for pair in reversed(geometry.padding) for end in pair])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        found = convolve(padded, filters, None, geometry.stride, 0, geometry.dilation).flatten(2)  # n d2 t
        return (left @ self.cotangents.flatten(3)) @ found.mT[:, None]

    def weighted_sum(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self.outer().weighted_sum(weights).movedim(-1, 1)

    def weighted_product(self, weights: Tensor, direction: Tensor) -> Tensor:  # noqa: D102
        return self.outer().weighted_product(weights, direction.view(self.shape[1:]).movedim(0, -1).reshape(-1))

    def gram(self, other: Factor, *, trace: bool = False, workspace: Workspace | None = None) -> Tensor:  # noqa: D102
        workspace, same = workspace or Workspace(), other is self
        way = self.work.way(other.work, trace=trace, same=same) if isinstance(other, Convolution) else Way.ROWS
        if way is Way.ROWS or not isinstance(other, Convolution):
            return super().gram(other, trace=trace, workspace=workspace)
        if way is Way.PAIRS and self.work.by_pixels(other.work) and not self.work.single:
            return pixel_gram(self, other, trace=trace, workspace=workspace)
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
        unfolded = self.scalars if self.geometry.transposed else 1
        return unfolded * self.work.positions * self.geometry.groups * prod(self.shape[1:]) * self.like.element_size()
