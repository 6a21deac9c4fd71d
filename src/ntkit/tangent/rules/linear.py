"""Linear maps: the gradient of a weight is a sum over positions of cotangent (outer) input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ntkit.tangent.factors import Outer, Rows
from ntkit.tangent.rules.registry import Contributions, Operand, Use, rule

if TYPE_CHECKING:
    from torch import Tensor

    from ntkit.tangent.factors import Factor


def _positions(values: Tensor) -> Tensor:
    """(n, ..., d) -> (n, 1, t, d): one group."""
    return values.reshape(values.shape[0], 1, -1, values.shape[-1])


def _scalar_positions(values: Tensor) -> Tensor:
    """(n, k, ..., d) -> (n, k, 1, t, d)."""
    return values.reshape(*values.shape[:2], 1, -1, values.shape[-1])


def _features_are_last(operand: Operand) -> bool:
    """Whether the last axis holds features alone, with no examples in it."""
    return operand.axis is not None and operand.axis.axis < operand.tensor.ndim - 1


@rule(F.linear)
def linear(use: Use, input: Operand, weight: Operand, bias: Operand | None = None) -> Contributions:
    """y = x W^T + b."""
    if not _features_are_last(input) or input.selected or weight.tensor.ndim != 2:
        return NotImplemented
    return _linear(use, input, weight, bias)


def _linear(use: Use, input: Operand, weight: Operand, bias: Operand | None) -> Contributions:
    g = _scalar_positions(use.cotangent)
    if weight.selected:
        yield weight, Outer(_positions(input.per_example(use.examples)), g, tuple(weight.tensor.shape))
    if isinstance(bias, Operand) and bias.selected:
        yield bias, _bias(g)


def _bias(cotangents: Tensor) -> Factor:
    """A bias is a weight whose input is one. With a single position that form shares G G^T with the weight."""
    n, _, _, t, o = cotangents.shape
    if t == 1:
        return Outer(cotangents.new_ones(n, 1, 1, 1), cotangents, (o,))
    return Rows(cotangents.sum((2, 3)))


@rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
def matmul(use: Use, input: Operand, weight: Operand) -> Contributions:
    """y = x W with W (d_in, d_out), as written by hand."""
    if not isinstance(input, Operand) or not isinstance(weight, Operand):
        return NotImplemented
    if input.selected or not weight.selected or weight.tensor.ndim != 2 or not _features_are_last(input):
        return NotImplemented
    factor = Outer(
        _positions(input.per_example(use.examples)),
        _scalar_positions(use.cotangent),
        tuple(weight.tensor.shape),
        inputs_first=True,
    )
    return [(weight, factor)]


@rule(torch.addmm, torch.Tensor.addmm)
def addmm(use: Use, bias: Operand, input: Operand, weight: Operand, **scales: Any) -> Contributions:
    """y = b + x W: the linear layer of GPT-2."""
    if scales or input.selected or not _features_are_last(input):
        return NotImplemented
    if bias.selected and bias.tensor.ndim != 1:
        return NotImplemented
    contributions = list(matmul(use, input, weight)) if weight.selected else []
    if bias.selected:
        contributions.append((bias, _bias(_scalar_positions(use.cotangent))))
    return contributions
