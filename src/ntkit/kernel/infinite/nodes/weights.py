"""Linear layers and convolutions, as modules and as functions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkit.kernel.infinite.nodes.call import RANDOM, SCORES, Call, each
from ntkit.kernel.infinite.positions import Window
from ntkit.kernel.infinite.steps import Bias, Flattening, Weights
from ntkit.kernel.infinite.values import Field, Known, Parameter, Value, changed


@dataclass(frozen=True)
class _Layer:
    """A linear layer or convolution, however it is called."""

    weight: Tensor
    bias: Tensor | None
    weight_name: str
    bias_name: str | None
    fan_in: int


def _weights(call: Call, layer: _Layer, source: int, windows: tuple[Window, ...], channel: int) -> Field:
    """A step with fresh weights on the covariance `source`."""
    reader, law = call.reader, call.reader.law
    for name in filter(None, (layer.weight_name, layer.bias_name)):
        reader.use(name, call.node)
    weight_std = law.weight(layer.weight_name, layer.weight, layer.fan_in)
    bias_std = law.bias(layer.bias_name or "", layer.bias, layer.fan_in)
    gain, bias_gain = law.parametrization.gains(weight_std, bias_std, layer.fan_in)
    step = Weights(
        (source,),
        call.node.name,
        windows,
        weight_std,
        bias_std,
        gain if layer.weight_name in reader.trained else 0.0,
        bias_gain if layer.bias_name in reader.trained else 0.0,
    )
    before = reader.positions[source]
    after = tuple(w.outputs(size) for w, size in zip(windows, before, strict=True)) if windows else before
    number = reader.add(step, after)
    return Field(number, channel, frozenset({number}))


def _layer(call: Call, weight: Any, bias: Any) -> _Layer:
    for what, value in (("weight", weight), ("bias", bias)):
        if value is not None and not isinstance(value, Parameter):
            call.refuse(f"its {what} is not a parameter of the module")
    per_unit = weight.tensor[0].numel()
    return _Layer(
        weight.tensor,
        None if bias is None else bias.tensor,
        weight.name,
        None if bias is None else bias.name,
        per_unit,
    )


def linear_module(call: Call) -> Field:
    """`nn.Linear`."""
    return _linear(call, call.own("weight"), call.own("bias"))


def linear_function(call: Call) -> Field:
    """`F.linear` with parameters of the module."""
    return _linear(call, call.argument(1, "weight"), call.argument(2, "bias"))


def product(call: Call) -> Field:
    """`x @ w` with a parameter (inputs, outputs)."""
    _refuse_two_layers(call)
    return _linear(call, _turned(call, call.argument(1, "other")), None)


def contraction(call: Call) -> Field:
    """Products that are written in general: only those of two layers are looked at, for the reason."""
    _refuse_two_layers(call)
    return call.refuse("it is a product that is not read: write it as a linear layer, F.linear or x @ w")


def _refuse_two_layers(call: Call) -> None:
    if sum(isinstance(value, RANDOM) for value in call.args) > 1:
        call.refuse(f"the product of two layers is not Gaussian; and if it is attention, {SCORES}")


def sum_and_product(call: Call) -> Field:
    """`torch.addmm(b, x, w)`."""
    if len(call.args) != 3 or call.keywords:
        call.refuse("it is known without beta and alpha only")
    bias, x, weight = call.args
    return _linear(replace(call, args=(x,)), _turned(call, weight), bias)


def transposed(call: Call) -> Parameter:
    """A parameter with its two axes exchanged."""
    if call.name == "getattr" and call.args[1] not in ("T", "mT"):
        call.refuse(f"it takes {call.args[1]!r} of a parameter")
    return _turned(call, call.x)


def _turned(call: Call, value: Any) -> Parameter:
    if not isinstance(value, Parameter) or value.tensor.ndim != 2:
        call.refuse("a product is known with a parameter of two axes only, (inputs, outputs), as weights")
    return Parameter(value.name, value.tensor.T)


def added_bias(call: Call, value: Value, parameter: Parameter) -> Field:
    """A layer plus a parameter with one number for each channel."""
    reader, before = call.reader, call.reader.field(value, call.node)
    field = reader.whole(value, call.node)
    full, shape = reader.shape(call.node), tuple(parameter.tensor.shape)
    aligned = (1,) * (len(full) - len(shape)) + shape
    wanted = tuple(size if axis == field.channel else 1 for axis, size in enumerate(full))
    if field.merged or aligned != wanted:
        call.refuse("a parameter is added that is not one number for each channel")
    reader.use(parameter.name, call.node)
    std = reader.law.bias(parameter.name, parameter.tensor, None)
    gain = reader.law.parametrization.gains(0.0, std, 1)[1] if parameter.name in reader.trained else 0.0
    number = reader.add(Bias((field.step,), call.node.name, std, gain), reader.positions[field.step])
    entangled = before.scale is not None or before.entangled
    return changed(field, number, roots=field.roots | {number}, entangled=entangled)


def _linear(call: Call, weight: Any, bias: Any) -> Field:
    reader, layer = call.reader, _layer(call, weight, bias)
    value = call.x
    if isinstance(value, Known):
        last = len(reader.shape(value.node)) - 1
        if last < 1:
            call.refuse("its input has no axis of channels")
        return _weights(call, layer, reader.source(value, last), (), last)
    field = reader.whole(value, call.node)
    if field.merged:
        return _weights(call, layer, reader.add(Flattening((field.step,), call.node.name), ()), (), 1)
    if field.channel != 1 + len(reader.positions[field.step]):
        call.refuse("it mixes positions, not channels: permute the channels to the last axis, or flatten before it")
    return _weights(call, layer, field.step, (), field.channel)


def conv_module(call: Call) -> Field:
    """`nn.Conv1d` to `nn.Conv3d`."""
    module: Any = call.module
    mode = module.padding_mode
    return _conv(
        call,
        call.own("weight"),
        call.own("bias"),
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        mode,
    )


def conv_function(call: Call) -> Field:
    """`F.conv1d` to `F.conv3d` with parameters of the module."""
    return _conv(
        call,
        call.argument(1, "weight"),
        call.argument(2, "bias"),
        call.argument(3, "stride", 1),
        call.argument(4, "padding", 0),
        call.argument(5, "dilation", 1),
        call.argument(6, "groups", 1),
        "zeros",
    )


def _conv(
    call: Call, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, mode: str
) -> Field:
    reader, layer = call.reader, _layer(call, weight, bias)
    value, sizes = call.x, weight.tensor.shape[2:]
    rank = len(sizes)
    channels_per_group = weight.tensor.shape[1]
    if isinstance(value, Known):
        if len(reader.shape(value.node)) != rank + 2:
            call.refuse(f"its input must have {rank + 2} axes, (N, channels, positions)")
        if groups > 1:
            call.refuse("groups of input channels give units of different kinds: only hidden layers may be grouped")
        source = reader.source(value, 1)
    else:
        field = reader.whole(value, call.node)
        if field.merged or field.channel != 1 or len(reader.positions[field.step]) != rank:
            call.refuse("its input must have the channels on axis 1 and positions behind them")
        if groups > 1 and channels_per_group == 1:
            call.refuse(
                "a depthwise convolution sees one channel, however wide the network: its units are not Gaussian"
            )
        if groups > 1 and field.mixed:
            call.refuse("groups behind a concatenation hold channels of different kinds")
        source = field.step
    windows = _windows(reader.positions[source], sizes, stride, padding, dilation, mode)
    return _weights(call, layer, source, windows, 1)


def _windows(inputs: Any, sizes: Any, stride: Any, padding: Any, dilation: Any, mode: str) -> tuple[Window, ...]:
    rank, found = len(sizes), []
    strides, dilations = each(stride, rank), each(dilation, rank)
    for axis in range(rank):
        reach = dilations[axis] * (sizes[axis] - 1)
        if padding == "same":
            before, after = reach // 2, reach - reach // 2
        else:
            before = after = 0 if padding == "valid" else each(padding, rank)[axis]
        source = None
        if mode != "zeros" and before + after:
            places = torch.arange(inputs[axis], dtype=torch.float64)[None, None]
            source = tuple(int(i) for i in F.pad(places, (before, after), mode=mode)[0, 0])
        found.append(Window(sizes[axis], strides[axis], dilations[axis], before, after, source))
    return tuple(found)
