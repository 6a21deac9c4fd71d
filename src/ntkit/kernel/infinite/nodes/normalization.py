"""Normalisation over channels, and dropout."""

from __future__ import annotations

from typing import Any

import torch

from ntkit.kernel.infinite.nodes.call import Call
from ntkit.kernel.infinite.nodes.in_place import require_sole_user
from ntkit.kernel.infinite.steps import Dropout, Normalization
from ntkit.kernel.infinite.values import Field, Parameter, Value, changed


def normalized(call: Call) -> Field:
    """LayerNorm, GroupNorm and RMSNorm: statistics that take in all channels are their expectations."""
    module: Any = call.module
    reader = call.reader
    before = reader.field(call.x, call.node)
    field = reader.whole(call.x, call.node)
    rank, ndim = len(reader.positions[field.step]), len(reader.shape(call.first))
    if call.name == "GroupNorm":
        if field.merged or field.channel != 1:
            call.refuse("the channels must be on axis 1, with positions behind them")
        if module.num_groups == module.num_channels:
            call.refuse("with one channel in each group its statistics run over positions alone, which stay random")
        if field.mixed and module.num_groups > 1:
            call.refuse("groups behind a concatenation hold channels of different kinds")
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
    scale = _checked(call, weight, bias, per_position=bool(over) and call.name != "GroupNorm")
    trained = weight is not None and weight.name in reader.trained
    step = Normalization(
        (field.step,),
        call.node.name,
        over,
        float(module.eps if module.eps is not None else torch.finfo(torch.float32).eps),
        scale,
        float(bias is not None and bias.name in reader.trained),
    )
    number = reader.add(step, reader.positions[field.step])
    entangled = before.scale is not None or before.entangled
    return changed(field, number, scale=scale if trained else None, entangled=entangled)


def _checked(call: Call, weight: Parameter | None, bias: Parameter | None, *, per_position: bool) -> float:
    """The common value of the weights, with the parameters noted as used.

    Raises:
        ModelError: if they are not as at initialisation, or trained where each position has its own.
    """
    reader = call.reader
    for parameter in filter(None, (weight, bias)):
        reader.use(parameter.name, call.node)
        if per_position and parameter.name in reader.trained:
            call.refuse(
                f"{parameter.name!r} has a number for each position, whose training is not known here: "
                "elementwise_affine=False, or leave it out with parameters=..."
            )
    values = torch.ones(1) if weight is None else weight.tensor.detach()
    if float(values.min()) != float(values.max()) or float(values.max()) == 0:
        call.refuse("its weights are not all the same, as they are at initialisation: channels of different kinds")
    if bias is not None and bool(bias.tensor.detach().any()):
        call.refuse("its biases are not zero, as they are at initialisation: channels of different kinds")
    return float(values.max())


def dropout_module(call: Call) -> Value:
    """A dropout module; nothing in evaluation mode."""
    module: Any = call.module
    return _dropped(call, module.p, module.training, call.name, module.inplace)


def dropout_function(call: Call) -> Value:
    """`torch.nn.functional.dropout` and its kin."""
    training = call.argument(2, "training", call.argument(2, "train", True))  # torch.dropout has another name for it
    return _dropped(call, call.argument(1, "p", 0.5), training, call.name, call.argument(3, "inplace", False))


def _dropped(call: Call, p: float, training: bool, name: str, inplace: bool) -> Value:
    if not training or p == 0:
        return call.x
    if inplace:
        require_sole_user(call)
    if p >= 1:
        call.refuse("it drops everything")
    reader, field = call.reader, call.field()
    if name[-1] == "d" and (field.channel != 1 or field.merged):
        call.refuse("it drops what is on axis 1, and these are not the channels")
    step = Dropout((field.step,), call.node.name, p, channels=name[-1] == "d")
    return changed(field, reader.add(step, reader.positions[field.step]), gaussian=False)
