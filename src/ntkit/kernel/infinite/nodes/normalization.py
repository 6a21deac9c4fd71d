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
    reader = call.reader
    field = reader.whole(call.x, call.node)
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
    scale = 1.0 if weight is None else _rms(weight.tensor)
    shift = 0.0 if bias is None else _rms(bias.tensor)
    trained = weight is not None and weight.name in reader.trained
    if trained and (shift or not scale):
        call.refuse(
            "its trained weight is known at a bias of zero and a weight that is not zero only, as at initialisation"
        )
    step = Normalization(
        (field.step,),
        call.node.name,
        over,
        float(module.eps if module.eps is not None else torch.finfo(torch.float32).eps),
        scale,
        shift,
        float(bias is not None and bias.name in reader.trained),
    )
    number = reader.add(step, reader.positions[field.step])
    return changed(field, number, scale=scale if trained else None, entangled=False)


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
