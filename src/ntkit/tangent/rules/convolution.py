"""Convolutions: linear maps over patches, in one, two or three dimensions, forwards and transposed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from ntkit.tangent.factors import Convolution, Geometry, Rows
from ntkit.tangent.rules.registry import Contributions, Operand, Use, rule

if TYPE_CHECKING:
    from collections.abc import Sequence


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers


@rule(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    use: Use,
    input: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Contributions:
    """y = conv(x, W) + b, W (out, in/groups, *window)."""
    axes = weight.tensor.ndim - 2
    window = tuple(weight.tensor.shape[2:])
    dilation = _each(dilation, axes)
    if padding == "same":  # torch puts the odd one behind
        total = [d * (w - 1) for d, w in zip(dilation, window, strict=True)]
        ends = tuple((p // 2, p - p // 2) for p in total)
    else:
        ends = tuple((p, p) for p in _each(0 if padding == "valid" else padding, axes))
    geometry = Geometry(window, _each(stride, axes), ends, dilation, groups)
    return _contributions(use, input, weight, bias, geometry)


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(
    use: Use,
    input: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Contributions:
    """The adjoint of a convolution, W (in, out/groups, *window): input and cotangent exchange their parts."""
    axes = weight.tensor.ndim - 2
    window = tuple(weight.tensor.shape[2:])
    ends = tuple((p, p) for p in _each(padding, axes))
    geometry = Geometry(window, _each(stride, axes), ends, _each(dilation, axes), groups, transposed=True)
    return _contributions(use, input, weight, bias, geometry)


def _contributions(
    use: Use, input: Operand, weight: Operand, bias: Operand | None, geometry: Geometry
) -> Contributions:
    if input.selected or input.axis is None or input.axis.axis != 0 or input.tensor.ndim != weight.tensor.ndim:
        return NotImplemented
    n, images = use.examples, input.axis.after * input.axis.before
    g = use.cotangent  # n, k, images, o, *space
    contributions = []
    if weight.selected:
        a = input.per_example(n)
        if images != 1:
            return NotImplemented
        contributions.append((weight, Convolution(a[:, 0], g[:, :, 0], tuple(weight.tensor.shape), geometry)))
    if isinstance(bias, Operand) and bias.selected:
        contributions.append((bias, Rows(g.flatten(4).sum((2, 4)) if g.ndim > 4 else g.sum(2))))
    return contributions
