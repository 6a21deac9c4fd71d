"""Normalizations: y = x_hat * weight + bias, where x_hat is what the same operation gives without the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ntkit.errors import ModelError
from ntkit.tangent.factors import Rows
from ntkit.tangent.rules.registry import Contributions, Operand, Use, rule

if TYPE_CHECKING:
    from torch import Tensor


def _value(operand: Any) -> Any:
    return operand.tensor if isinstance(operand, Operand) else operand


def _affine(use: Use, weight: Any, bias: Any, normalized: Tensor, input: Operand, first: int) -> Contributions:
    """Factors of an elementwise scale and shift over the axes from `first` on, of one example's shape.

    `normalized` is used up: with a single scalar it is overwritten.
    `first` counts in the original tensor; axes before it, and all behind those of the parameter, are summed over.
    """
    assert input.axis is not None
    g = use.cotangent  # n, k, *one
    x = input.axis.split(normalized, use.examples).unsqueeze(1)  # n, 1, *one
    alone = g.shape[1] == 1 and g.dtype == x.dtype
    for operand, product in ((weight, lambda: x.mul_(g) if alone else g * x), (bias, lambda: g)):
        if isinstance(operand, Operand) and operand.selected:
            rows = product()
            own = range(first, first + operand.tensor.ndim)
            summed = [axis + 2 for axis in range(rows.ndim - 2) if axis not in own]
            yield operand, Rows(rows.sum(summed) if summed else rows)


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    use: Use,
    input: Operand,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Contributions:
    """Over the last axes."""
    if input.selected:
        return NotImplemented
    normalized = F.layer_norm(input.tensor, tuple(normalized_shape), None, None, eps)
    return _affine(use, weight, bias, normalized, input, input.tensor.ndim - len(normalized_shape))


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    use: Use,
    input: Operand,
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
) -> Contributions:
    """Root mean square over the last axes."""
    if input.selected:
        return NotImplemented
    normalized = F.rms_norm(input.tensor, tuple(normalized_shape), None, eps)
    return _affine(use, weight, None, normalized, input, input.tensor.ndim - len(normalized_shape))


@rule(F.group_norm, torch.group_norm)
def group_norm(
    use: Use,
    input: Operand,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Contributions:
    """Over groups of channels."""
    if input.selected or input.axis is None or input.axis.axis != 0:
        return NotImplemented
    return _affine(use, weight, bias, F.group_norm(input.tensor, num_groups, None, None, eps), input, 1)


@rule(F.instance_norm)
def instance_norm(
    use: Use,
    input: Operand,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Contributions:
    """Over each channel of each example."""
    if input.selected or input.axis is None or input.axis.axis != 0:
        return NotImplemented
    statistics = (None, None) if use_input_stats else (_value(running_mean), _value(running_var))
    normalized = F.instance_norm(input.tensor, *statistics, None, None, use_input_stats, momentum, eps)
    return _affine(use, weight, bias, normalized, input, 1)


@rule(F.batch_norm, torch.batch_norm)
def batch_norm(
    use: Use,
    input: Operand,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Contributions:
    """By running statistics.

    Raises:
        ModelError: if the statistics of the batch are used, which make examples depend on each other.
    """
    if training:
        raise ModelError("batch_norm with the statistics of the batch has no per-example derivative: use model.eval()")
    if input.selected or input.axis is None or input.axis.axis != 0:
        return NotImplemented
    statistics = _value(running_mean), _value(running_var)
    normalized = F.batch_norm(input.tensor, *statistics, None, None, False, momentum, eps)
    return _affine(use, weight, bias, normalized, input, 1)
