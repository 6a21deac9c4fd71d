"""What a node of a traced module becomes: handlers by module class and by function, and reasons to refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ntkit.kernel.infinite.nodes import functions, normalization, positions, weights
from ntkit.kernel.infinite.nodes.call import SCORES, Call
from ntkit.kernel.infinite.values import Applied, Field, Known, Parameter, Plain, Shape, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ntkit.kernel.infinite.reader import Reader

# Why these have no limit that is a kernel in closed form, by words in the name of the module or function.
_REFUSED = {
    "BatchNorm": "batch normalisation has no limit that treats examples one by one; use LayerNorm or GroupNorm",
    "batch_norm": "batch normalisation has no limit that treats examples one by one; use LayerNorm or GroupNorm",
    "MaxPool": "the maximum of correlated Gaussian units has no closed form; use average pooling",
    "max_pool": "the maximum of correlated Gaussian units has no closed form; use average pooling",
    "max": "the maximum of correlated Gaussian units has no closed form; use average pooling",
    "InstanceNorm": "its statistics run over positions alone, which stay finite and random",
    "Attention": SCORES,
    "attention": SCORES,
    "Transformer": "the softmax of attention has no closed form at the usual scale 1/sqrt(d)",
    "softmax": "it couples the channels, or the positions, of random units, and has no closed form",
    "Softmax": "it couples the channels, or the positions, of random units, and has no closed form",
    "LSTM": "the products of gates have no closed form here", "GRU": "the products of gates have no closed form here",
    "RNN": "its weights are used at every step: layers that share weights are correlated",
    "Bilinear": "the product of two layers is not Gaussian",
    "Parametrized": "its weights are not independent Gaussian numbers, but a function of other parameters",
}  # fmt: skip


def read(reader: Reader, node: fx.Node) -> Value:
    """The value of a node, with the steps that it takes."""
    if node.op == "placeholder":
        return Known(node)
    if node.op == "get_attr":
        return _attribute(reader, node)

    def value(other: fx.Node) -> Any:
        return reader.values[other]

    args, keywords = tuple(fx.map_arg(node.args, value)), dict(fx.map_arg(node.kwargs, value))
    module = reader.modules[str(node.target)] if node.op == "call_module" else None
    if module is not None:
        name = type(module).__name__
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    call = Call(reader, node, module, str(name), args, keywords)
    operands, result = list(_operands((args, keywords))), reader.results[node.name]
    if call.name in ("item", "tolist") and operands:
        call.refuse("it makes a number of the examples' values, which a graph keeps for all others")
    if _is_plain(result):
        # a shape, a number of dimensions, or arithmetic with such
        return Plain(result, varies=result != reader.with_another[node.name])
    if all(isinstance(v, (Known, Plain)) for v in operands) and not (module is not None and _has_parameters(module)):
        if operands and (
            call.name.rstrip("_") != call.name or call.name in _IN_PLACE or getattr(module, "inplace", False)
        ):
            call.refuse("it writes into its inputs: use the form that is not in place")
        return Known(node)
    if operands and isinstance(operands[0], Parameter) and call.name in ("t", "T", "mT", "transpose", "getattr"):
        return weights.transposed(call)
    _refuse_known(call)
    home = getattr(node.target, "__module__", None) if node.op == "call_function" else None
    if home is not None and home.partition(".")[0] not in _KNOWN_HOMES:
        call.refuse(f"{home}.{call.name} is a function of its own, which is not traced")
    handler = _HANDLERS.get(type(module)) if module is not None else _FUNCTIONS.get(call.name, functions.elementwise)
    handler = handler or functions.elementwise
    if handler is not positions.reshaped and any(isinstance(v, Plain) and v.varies for v in operands):
        call.refuse("it takes a number that depends on how many examples there are")
    return handler(call)


# Where functions come from that are known by their names.
_KNOWN_HOMES = {"torch", "_operator", "builtins", "math"}
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ipow"}


def _operands(value: Any) -> Iterator[Value]:
    if isinstance(value, (Known, Plain, Parameter, Field, Applied)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _operands(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _operands(item)


def _is_plain(result: Any) -> bool:
    """Whether a node gave a number, a shape or the like, rather than tensors."""
    if isinstance(result, torch.Size):
        return True
    if isinstance(result, (tuple, list)) and not isinstance(result, Shape):
        return all(_is_plain(item) for item in result)
    return isinstance(result, (bool, int, float, str, torch.dtype, torch.device, type(None)))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _attribute(reader: Reader, node: fx.Node) -> Value:
    found: Any = reader.model
    for part in str(node.target).split("."):
        found = getattr(found, part)
    if isinstance(found, nn.Parameter):
        return Parameter(reader.names[id(found)], found)
    return Known(node) if isinstance(found, Tensor) else Plain(found)


def _refuse_known(call: Call) -> None:
    """Refuse what is known to have no limit, with the reason.

    Raises:
        ModelError: if it is.
    """
    for word, why in _REFUSED.items():
        if call.name == word or (len(word) > 3 and word in call.name):
            call.refuse(why)


def _unchanged(call: Call) -> Value:
    return call.x


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_NORMS = tuple(getattr(nn, name) for name in ("LayerNorm", "GroupNorm", "RMSNorm") if hasattr(nn, name))
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_HANDLERS: dict[type, Callable[[Call], Value]] = {
    nn.Linear: weights.linear_module,
    nn.Flatten: positions.reshaped,
    **dict.fromkeys(_CONVS, weights.conv_module),
    **dict.fromkeys(_POOLS, positions.pool_module),
    **dict.fromkeys(_NORMS, normalization.normalized),
    **dict.fromkeys(_DROPOUTS, normalization.dropout_module),
}
_FUNCTIONS: dict[str, Callable[[Call], Value]] = {
    "linear": weights.linear_function,
    **dict.fromkeys(("matmul", "mm"), weights.product),
    **dict.fromkeys(("bmm", "baddbmm", "einsum"), weights.contraction),
    "addmm": weights.sum_and_product,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), weights.conv_function),
    **dict.fromkeys(
        (f"{kind}avg_pool{rank}d" for kind in ("", "adaptive_") for rank in (1, 2, 3)), positions.pool_function
    ),
    **dict.fromkeys(("flatten", "view", "reshape", "unsqueeze"), positions.reshaped),
    "squeeze": positions.squeezed,
    **dict.fromkeys(("permute", "transpose", "swapaxes"), positions.permuted),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), normalization.dropout_function),
    **dict.fromkeys(("cat", "concat", "concatenate"), positions.concatenated),
    **dict.fromkeys(("contiguous", "clone"), _unchanged),
    **dict.fromkeys(("mean", "sum"), positions.summed),
    "getitem": positions.picked,
}
