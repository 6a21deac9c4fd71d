"""Normalisation over channels, and dropout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ntkit.kernel.infinite.nodes.call import Call
from ntkit.kernel.infinite.steps import Dropout, Normalization
from ntkit.kernel.infinite.values import Field, Value, changed


def normalized(call: Call) -> Field:
    """LayerNorm, GroupNorm and RMSNorm: statistics that take in all channels are their expectations."""
    module: Any = call.module
    reader, field = call.reader, call.field()
    rank = len(reader.positions[field.step])
    ndim = len(reader.shape(call.first))
    if call.name == "GroupNorm":
        if module.num_groups == module.num_channels:
            call.refuse("with one channel in each group its statistics run over positions alone, which stay random")
        over = tuple(range(rank))
    else:
        covered = set(range(ndim - len(module.normalized_shape), ndim))
        if not field.merged and field.channel not in covered:
            call.refuse("it normalises positions without the channels, whose statistics stay random")
        places = [axis for axis in range(ndim) if axis not in (0, field.channel)]
        over = tuple(range(rank)) if field.merged else tuple(i for i, place in enumerate(places) if place in covered)
    if call.name != "RMSNorm" and not field.centred:
        call.refuse("the mean over channels is not zero there: normalise before the nonlinearity, or use RMSNorm")
    weight, bias = call.own("weight"), call.own("bias")
    for parameter in filter(None, (weight, bias)):
        reader.use(parameter.name, call.node)
    step = Normalization(
        (field.step,),
        call.node.name,
        over,
        float(module.eps if module.eps is not None else torch.finfo(torch.float32).eps),
        1.0 if weight is None else _rms(weight.tensor),
        0.0 if bias is None else _rms(bias.tensor),
        float(weight is not None and weight.name in reader.trained),
        float(bias is not None and bias.name in reader.trained),
    )
    return changed(field, reader.add(step, reader.positions[field.step]))


def _rms(values: Tensor) -> float:
    return math.sqrt(float(values.detach().double().square().mean()))


def dropout_module(call: Call) -> Value:
    """A dropout module; nothing in evaluation mode."""
    module: Any = call.module
    return _dropped(call, module.p, module.training, call.name)


def dropout_function(call: Call) -> Value:
    """`torch.nn.functional.dropout` and its kin."""
    return _dropped(call, call.argument(1, "p", 0.5), call.argument(2, "training", True), call.name)


def _dropped(call: Call, p: float, training: bool, name: str) -> Value:
    if not training or p == 0:
        return call.x
    if p >= 1:
        call.refuse("it drops everything")
    reader, field = call.reader, call.field()
    step = Dropout((field.step,), call.node.name, p, channels=name[-1] == "d")
    return changed(field, reader.add(step, reader.positions[field.step]), gaussian=False)
