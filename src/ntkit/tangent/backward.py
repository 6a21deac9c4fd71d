"""From the scalars back to the outputs of all uses: one backward pass for each scalar, or one for many at once.

A pass for one scalar reads every weight for no more rows than there are examples, and on a GPU starts every operation
for little work. Where each operation on the way back has a batching rule, the scalars of a group go together: the same
products, with as many times the rows. Elsewhere (attention in one piece, an operation of the user's own) they go one
after the other, which is always right.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.errors import ModelError
from ntkit.tangent.grain import grain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.autograd.graph import Node

    from ntkit.tangent.capture import Record

# Operations whose derivative torch can batch: tests run each of them, and none falls back to a loop.
_BATCHED = frozenset(
    """
    Add Addmm Bmm Clone Div Elu Exp Expand Gelu Hardtanh LeakyRelu Log LogSoftmax Mean Mm Mul
    NativeLayerNorm Neg Permute Pow Relu Rsqrt Select Sigmoid Silu Slice Softmax Softplus Split Sqrt
    Squeeze Sub Sum T Tanh Transpose UnsafeView Unsqueeze View _Linear _Tap
    """.split()  # noqa: SIM905
)
# On a CPU those of images gain nothing by it (measured): their passes have many rows each.
_BATCHED_ON_GPU = frozenset(
    """
    AdaptiveAvgPool1D AdaptiveAvgPool2D AvgPool2D ConstantPadNd Convolution CudnnBatchNorm MaxPool2DWithIndices
    NativeBatchNorm
    """.split()  # noqa: SIM905
)


def run_backward(scalars: Tensor, records: list[Record]) -> None:
    """The cotangents of every use for each of the scalars (n, K); they are left with the records.

    Cost: K backward passes. Memory: the cotangents, K for each use; in groups no more than 64 MB of them (1 GB on a
    GPU) are alive a second time.
    """
    edges = [(record, j) for record in records for j, edge in enumerate(record.edges) if edge is not None]
    count = scalars.shape[1]
    for record in records:
        record.cotangents = [None] * len(record.edges)
    if not edges or not scalars.requires_grad:
        return
    targets = [record.edges[j] for record, j in edges]
    step = _together(scalars, edges)
    for start in range(0, count, step):
        stop = min(start + step, count)
        if step == 1:
            grads = _pulled_back(scalars[:, start].sum(), targets, None, retain=stop < count)
        else:
            grads = _pulled_back_together(scalars, targets, _unit_vectors(scalars, start, stop), retain=stop < count)
        for (record, j), grad in zip(edges, grads, strict=True):
            if step == 1:
                record.keep(j, start, count, grad, scalars.shape[0])
            else:
                record.keep_several(j, slice(start, stop), count, grad, scalars.shape[0])


def _pulled_back(
    outputs: Tensor, targets: list[Any], cotangents: Tensor | None, *, retain: bool
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, targets, cotangents, retain_graph=retain, allow_unused=True)


def _pulled_back_together(
    outputs: Tensor, targets: list[Any], cotangents: Tensor, *, retain: bool
) -> list[Tensor | None]:
    """The same for each of several cotangents (b, n, K): results have b as their first axis."""
    reached: list[bool] = []

    def pulled_back(cotangent: Tensor) -> list[Tensor]:
        grads = _pulled_back(outputs, targets, cotangent, retain=retain)
        reached[:] = [grad is not None for grad in grads]
        return [grad for grad in grads if grad is not None]

    try:
        found = iter(torch.vmap(pulled_back)(cotangents))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise ModelError(
            f"a hook on the way back looks at the values of gradients ({str(error).splitlines()[0]}): remove the hooks "
            "that the model puts on tensors"
        ) from error
    return [next(found) if there else None for there in reached]


def _unit_vectors(scalars: Tensor, start: int, stop: int) -> Tensor:
    """(stop - start, n, K): what to pull back for each of these scalars."""
    n, count = scalars.shape
    units = torch.eye(count, dtype=scalars.dtype, device=scalars.device)[start:stop]
    # laid out in full: rows of one matrix for the first product, where views would make it one for each scalar
    return units[:, None].expand(-1, n, -1).contiguous()


def _together(scalars: Tensor, edges: list[tuple[Record, int]]) -> int:
    """How many scalars go back at once."""
    count, on_gpu = scalars.shape[1], scalars.device.type != "cpu"
    if count == 1:
        return 1
    each = sum(record.output_bytes[j] for record, j in edges)
    step = min(count, grain(scalars.device).together // max(1, each))
    batched = _BATCHED | _BATCHED_ON_GPU if on_gpu else _BATCHED
    if step < 2 or scalars.grad_fn is None or not all(_operation(node) in batched for node in _nodes(scalars.grad_fn)):
        return 1
    return step


def _nodes(root: Node) -> Iterator[Node]:
    """All operations behind a tensor, down to the leaves, which are left out."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        if node.next_functions:
            yield node
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                waiting.append(behind)


def _operation(node: Any) -> str:
    """ReluBackward0 -> Relu, _TapBackward -> _Tap."""
    return re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])
