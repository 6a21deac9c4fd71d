"""What changes positions or the axis of channels: flatten, pooling, sums, permutations, concatenation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkit.kernel.infinite.nodes.call import Call, each, plain
from ntkit.kernel.infinite.positions import Averaging
from ntkit.kernel.infinite.steps import Mixture, Pooling
from ntkit.kernel.infinite.values import Applied, Field, Value, changed

if TYPE_CHECKING:
    from collections.abc import Callable


def reshaped(call: Call) -> Value:
    """Flatten, view: all positions may become channels; nothing else may change."""
    reader, value = call.reader, call.x
    before, after = reader.shape(call.first), reader.shape(call.node)
    if before == after:
        return value
    if len(after) != 2 or after[0] != before[0]:
        call.refuse(f"it makes shape {after} of {before}: all axes but the first may be flattened into one, no others")
    field = value.field if isinstance(value, Applied) else reader.field(value, call.node)
    order = 1 + sum(size > 1 for size in before[1 : field.channel])
    flat = changed(field, field.step, merged=field.merged or order, channel=1)
    return Applied(flat, value.function) if isinstance(value, Applied) else flat


def squeezed(call: Call) -> Value:
    """Axes of one position go."""
    shape, dims = call.reader.shape(call.first), call.argument(1, "dim")
    asked = range(1, len(shape)) if dims is None else [d % len(shape) for d in _several(dims)]
    gone = [axis for axis in asked if shape[axis] == 1]
    return _reduced(call, dict.fromkeys(gone, (1.0,)), keep=False) if gone else call.x


def pool_module(call: Call) -> Field:
    """Average pooling modules, adaptive ones too."""
    module: Any = call.module
    rank = int(call.name[-2])
    if call.name.startswith("Adaptive"):
        return _pooled(call, rank, lambda axis, row: _adaptive(row, each(module.output_size, rank)[axis]))
    if getattr(module, "divisor_override", None):
        call.refuse("divisor_override makes it another function than a mean")
    return _averaged(
        call, rank, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad
    )


def pool_function(call: Call) -> Field:
    """Average pooling functions."""
    rank = int(call.name[-2])
    if call.name.startswith("adaptive"):
        size = each(call.argument(1, "output_size"), rank)
        return _pooled(call, rank, lambda axis, row: _adaptive(row, size[axis]))
    if call.argument(6, "divisor_override"):
        call.refuse("divisor_override makes it another function than a mean")
    size = call.argument(1, "kernel_size")
    stride = call.argument(2, "stride") or size
    return _averaged(
        call, rank, size, stride, call.argument(3, "padding", 0), call.argument(4, "ceil_mode", False),
        call.argument(5, "count_include_pad", True),
    )  # fmt: skip


def _averaged(call: Call, rank: int, size: Any, stride: Any, padding: Any, ceil: bool, count: bool) -> Field:
    sizes, strides, paddings = each(size, rank), each(stride, rank), each(padding, rank)
    return _pooled(
        call,
        rank,
        lambda axis, row: F.avg_pool1d(row, sizes[axis], strides[axis], paddings[axis], ceil, count),
    )


def _adaptive(row: Tensor, size: int | None) -> Tensor:
    return row if size is None else F.adaptive_avg_pool1d(row, size)


def _pooled(call: Call, rank: int, pool: Callable[[int, Tensor], Tensor]) -> Field:
    reader, field = call.reader, call.field()
    positions = reader.positions[field.step]
    if field.merged or field.channel != 1 or len(positions) != rank:
        call.refuse("it averages other axes than the positions behind the channels")
    axes, after = [], []
    for axis, size in enumerate(positions):
        weights = pool(axis, torch.eye(size, dtype=torch.float64)[None])[0].T  # (outputs, inputs)
        axes.append(Averaging(tuple(tuple(row) for row in weights.tolist())))
        after.append(len(weights))
    return changed(field, reader.add(Pooling((field.step,), call.node.name, tuple(axes)), after))


def summed(call: Call) -> Field:
    """A mean or sum over axes of positions."""
    shape = call.reader.shape(call.first)
    dims, keep = call.argument(1, "dim"), bool(call.argument(2, "keepdim", False))
    if dims is None:
        call.refuse("it takes in all channels: only positions may be averaged or added")
    assert dims is not None
    wanted = {d % len(shape) for d in _several(dims)}
    part = {axis: 1.0 if call.name == "sum" else 1 / shape[axis] for axis in wanted}
    return _reduced(call, {axis: (part[axis],) * shape[axis] for axis in wanted}, keep=keep)


def _several(dims: Any) -> tuple[int, ...]:
    return tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)


def picked(call: Call) -> Field:
    """Single positions, as of a class token: `x[:, 0]`."""
    shape, index = call.reader.shape(call.first), call.argument(1, "index")
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    taken = {axis: item for axis, item in enumerate(items) if item != slice(None)}
    if not taken or not all(type(item) is int for item in taken.values()):
        call.refuse("only single positions may be taken, as by x[:, 0], and whole axes")
    chosen = {axis: item % shape[axis] for axis, item in taken.items()}
    return _reduced(call, {a: tuple(float(i == k) for i in range(shape[a])) for a, k in chosen.items()}, keep=False)


def _reduced(call: Call, weights: dict[int, tuple[float, ...]], *, keep: bool) -> Field:
    """Sums over axes of positions with these weights, which leave one position, or no axis."""
    reader, field = call.reader, call.field()
    positions, ndim = reader.positions[field.step], len(reader.shape(call.first))
    places = [axis for axis in range(ndim) if axis not in (0, field.channel)]
    if field.merged or not weights.keys() <= set(places):
        call.refuse("it works on channels or examples: only positions may be averaged, added or taken")
    axes = tuple(Averaging((weights[place],), dropped=not keep) if place in weights else None for place in places)
    after = [
        1 if place in weights else n for place, n in zip(places, positions, strict=True) if keep or place not in weights
    ]
    channel = field.channel if keep else field.channel - sum(place < field.channel for place in weights)
    return changed(field, reader.add(Pooling((field.step,), call.node.name, axes), after), channel=channel)


def permuted(call: Call) -> Value:
    """Channels may move; positions must stay in order."""
    reader, value = call.reader, call.x
    field = reader.field(value, call.node)
    ndim = len(reader.shape(call.first))
    if call.name == "permute":
        rest = plain(call.args[1:]) or (call.argument(1, "dims"),)
        order = [d % ndim for d in (rest[0] if isinstance(rest[0], (tuple, list)) else rest)]
    else:
        order = list(range(ndim))
        a, b = (call.argument(k + 1, f"dim{k}", call.argument(k + 1, f"axis{k}")) % ndim for k in (0, 1))
        order[a], order[b] = order[b], order[a]
    places = [axis for axis in order if axis not in (0, field.channel)]
    if field.merged or order[0] != 0 or places != sorted(places):
        call.refuse("it exchanges positions: only the axis of channels may move")
    return changed(field, field.step, channel=order.index(field.channel))


def concatenated(call: Call) -> Field:
    """Channels of several layers side by side."""
    reader = call.reader
    parts, dim = call.args[0] if call.args else call.keywords["tensors"], call.argument(1, "dim", 0)
    fields = [reader.whole(part, call.node) for part in parts]
    first, ndim = fields[0], len(reader.shape(call.node))
    if any(f.merged for f in fields) or {f.channel for f in fields} != {dim % ndim}:
        call.refuse("it joins another axis than the channels")
    sources: Any = call.node.args[0] if call.node.args else call.node.kwargs["tensors"]
    channels = [reader.shape(node)[dim] for node in sources]
    shares = tuple(n / sum(channels) for n in channels)
    step = Mixture(tuple(f.step for f in fields), call.node.name, shares)
    number = reader.add(step, reader.positions[first.step])
    roots = frozenset().union(*(f.roots for f in fields))
    return Field(number, first.channel, roots, gaussian=False, centred=all(f.centred for f in fields), mixed=True)
