"""Linear maps of positions: the patches of a convolution, and pooling. One axis after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Window:
    """How a convolution slides along one axis.

    Attributes:
        size: taps of the kernel.
        stride: between windows.
        dilation: between taps.
        before, after: padded positions.
        source: the position that each padded position copies, for padding that is not zero; None for zeros.
    """

    size: int
    stride: int
    dilation: int
    before: int
    after: int
    source: tuple[int, ...] | None = None

    def outputs(self, inputs: int) -> int:
        """Number of windows."""
        return (inputs + self.before + self.after - self.dilation * (self.size - 1) - 1) // self.stride + 1

    def taps(self, inputs: int) -> list[tuple[slice, slice]]:
        """For each tap: the windows that it reaches, and the positions that they read."""
        before = self.before if self.source is None else 0
        size = inputs if self.source is None else len(self.source)
        outputs, found = self.outputs(inputs), []
        for tap in range(self.size):
            offset = tap * self.dilation - before
            first = max(0, -(offset // self.stride))
            last = min(outputs - 1, (size - 1 - offset) // self.stride)
            if last >= first:
                start = first * self.stride + offset
                read = slice(start, start + (last - first) * self.stride + 1, self.stride)
                found.append((slice(first, last + 1), read))
        return found


def patch_sum(values: Tensor, windows: tuple[Window, ...], *, full: bool) -> Tensor:
    """Sum over the taps, the same tap on both sides: sum_t values[s p + t, s p' + t].

    Cost: one addition per tap of each axis and entry.
    """
    per = 2 if full else 1
    lead = values.ndim - per * len(windows)
    for axis, window in enumerate(windows):
        dims = tuple(range(lead + per * axis, lead + per * (axis + 1)))
        values = _slide(values, window, dims)
    return values


def _slide(values: Tensor, window: Window, dims: tuple[int, ...]) -> Tensor:
    inputs = values.shape[dims[0]]
    if window.source is not None:
        index = torch.tensor(window.source, device=values.device)
        for dim in dims:
            values = values.index_select(dim, index)
    taps = window.taps(inputs)
    outputs = window.outputs(inputs)
    shape = list(values.shape)
    for dim in dims:
        shape[dim] = outputs
    if len(taps) == 1 and taps[0][0] == slice(0, outputs):
        return _part(values, dims, taps[0][1])
    # the tap that reaches every window is written, the others are added
    whole = next((tap for tap in taps if tap[0] == slice(0, outputs)), None)
    out = values.new_zeros(shape) if whole is None else _part(values, dims, whole[1]).clone()
    for tap in taps:
        if tap is not whole:
            _part(out, dims, tap[0]).add_(_part(values, dims, tap[1]))
    return out


def _part(values: Tensor, dims: tuple[int, ...], index: slice) -> Tensor:
    return values[tuple(index if dim in dims else slice(None) for dim in range(values.ndim))]


@dataclass(frozen=True)
class Averaging:
    """Weighted sums of positions along one axis.

    Attributes:
        weights: (outputs, inputs), as nested tuples.
        dropped: whether the axis is gone afterwards (a single output).
    """

    weights: tuple[tuple[float, ...], ...]
    dropped: bool = False

    @property
    def single(self) -> bool:
        """Whether each output is of one position, so that equal positions are enough for equal outputs."""
        return all(sum(weight != 0 for weight in row) <= 1 for row in self.weights)


def average(values: Tensor, axes: tuple[Averaging | None, ...], *, full: bool) -> Tensor:
    """Sums along each axis, on both sides of a pair; of equal positions those that are `single` alone."""
    per = 2 if full else 1
    lead = values.ndim - per * len(axes)
    dropped = []
    for axis, averaging in enumerate(axes):
        if averaging is None:
            continue
        weights = values.new_tensor(averaging.weights)
        weights = weights if full else weights.square()
        for dim in range(lead + per * axis, lead + per * (axis + 1)):
            values = _weighted(values, weights, dim)
            if averaging.dropped:
                dropped.append(dim)
    for dim in reversed(dropped):
        values = values.squeeze(dim)
    return values


def _weighted(values: Tensor, weights: Tensor, dim: int) -> Tensor:
    outputs, inputs = weights.shape
    if outputs == 1 and bool((weights == 1 / inputs).all()):
        return values.mean(dim, keepdim=True)
    return (values.movedim(dim, -1) @ weights.T).movedim(-1, dim)
