"""Sums of layers, products with numbers, and elementwise functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ntkit.kernel.infinite import pointwise
from ntkit.kernel.infinite.nodes.call import RANDOM, Call, plain
from ntkit.kernel.infinite.nodes.in_place import require_sole_user
from ntkit.kernel.infinite.nodes.weights import added_bias
from ntkit.kernel.infinite.values import Applied, Known, Parameter, Value


def elementwise(call: Call) -> Value:
    """Sums, products with numbers, and elementwise functions; anything else is refused."""
    reader, node, name = call.reader, call.node, call.name.rstrip("_")
    if call.module is not None:
        return _activation(call)
    if call.name.endswith("_") or (name.startswith("i") and name[1:] in ("add", "sub", "mul", "truediv", "pow")):
        require_sole_user(call)
    operands = [*call.args, *call.keywords.values()]
    random = [v for v in operands if isinstance(v, RANDOM)]
    others = [plain(v) for v in operands if not isinstance(v, RANDOM)]
    if len(random) == 2 and not others:
        return _pair(call, name, *random)
    if name in pointwise.ADDITIONS and len(random) == 1 and len(operands) == 2 and isinstance(others[0], Parameter):
        return added_bias(call, random[0], others[0])
    if len(random) == 1 and len(operands) == 2 and all(isinstance(v, (int, float)) for v in others):
        if "div" in name and float(others[0]) == 0 and isinstance(call.x, RANDOM):
            call.refuse("it divides by zero")
        found = pointwise.with_number(name, float(others[0]), first=not isinstance(call.args[0], RANDOM))
        if found is not None:
            return reader.apply(random[0], found, node)
    if random and isinstance(call.x, RANDOM) and len(random) == 1:
        rest = tuple(plain(v) for v in call.args[1:])
        keywords = {k: plain(v) for k, v in call.keywords.items() if k != "input"}
        if not any(isinstance(v, (Known, Parameter)) for v in (*rest, *keywords.values())):
            if keywords.get("inplace"):
                require_sole_user(call)
            function: Any = node.target if callable(node.target) else getattr(torch.Tensor, str(node.target))
            found = pointwise.of_call(name, function, rest, keywords)
            if found is not None:
                return reader.apply(call.x, found, node)
    return reader.refuse(
        node,
        "it is not among the operations whose limit is known here: linear layers, convolutions, average pooling and "
        "means over positions, flatten, sums of layers, products with numbers, LayerNorm, GroupNorm, RMSNorm, Dropout, "
        "concatenation of channels and elementwise functions",
    )


def _activation(call: Call) -> Value:
    module = call.module
    assert module is not None
    slope = call.own("weight") if type(module) is nn.PReLU else None
    if slope is not None:
        if float(slope.tensor.detach().min()) != float(slope.tensor.detach().max()):
            call.refuse("its channels have slopes of their own: units of different kinds")
        call.reader.use(slope.name, call.node)
    if getattr(module, "inplace", False):
        require_sole_user(call)
    found = pointwise.of_module(module, trained=slope is not None and slope.name in call.reader.trained)
    if found is None:
        call.refuse(
            "it is not among the modules whose limit is known here: Linear, Conv, AvgPool, AdaptiveAvgPool, Flatten, "
            "LayerNorm, GroupNorm, RMSNorm, Dropout and activations"
        )
    if isinstance(call.x, Known):
        call.refuse("it has parameters and works on the inputs alone")
    return call.reader.apply(call.x, found, call.node)


def _pair(call: Call, name: str, left: Value, right: Value) -> Value:
    """Two random values: functions of the same units, or the sum of two layers."""
    reader = call.reader
    both = [
        v if isinstance(v, Applied) else Applied(reader.field(v, call.node), pointwise.IDENTITY) for v in (left, right)
    ]
    if both[0].field == both[1].field:
        found = pointwise.together(name, both[0].function, both[1].function)
        if found is not None:
            return reader.applied(both[0].field, found, call.node)
    if name in pointwise.ADDITIONS:
        shapes = {reader.shape(node) for node in call.node.all_input_nodes}
        if shapes != {reader.shape(call.node)}:
            call.refuse("it adds layers of different shapes, one of which is repeated")
        return reader.total((left, right), call.node)
    return reader.refuse(call.node, "a product of two layers is not Gaussian")
