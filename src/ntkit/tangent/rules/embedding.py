"""Embeddings: the cotangent of every position, added to the row that the position looked up."""

from __future__ import annotations

import torch.nn.functional as F

from ntkit.errors import ModelError
from ntkit.tangent.factors import Lookup
from ntkit.tangent.rules.registry import Contributions, Operand, Use, rule


@rule(F.embedding)
def embedding(
    use: Use,
    input: Operand,
    weight: Operand,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Contributions:
    """y[t] = W[ids[t]]; no gradient at the padding index.

    Raises:
        ModelError: for options under which the gradient is not the derivative of the output.
    """
    if max_norm is not None:
        raise ModelError("an embedding with max_norm rewrites its weight in every forward pass: set max_norm=None")
    if scale_grad_by_freq:
        raise ModelError("scale_grad_by_freq divides gradients by counts over the batch: set it to False for a kernel")
    if input.selected or input.axis is None:
        return NotImplemented
    ids = input.per_example(use.examples).reshape(use.examples, -1)
    g = use.cotangent
    g = g.reshape(*g.shape[:2], -1, g.shape[-1])
    if padding_idx is not None:
        rows = weight.tensor.shape[0]
        g = g.masked_fill((ids == padding_idx % rows)[:, None, :, None], 0)
    return [(weight, Lookup(ids, g, tuple(weight.tensor.shape)))]
