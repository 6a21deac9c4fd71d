"""The generic route: plain autograd, one example and one scalar at a time. Exact for any model, and slow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.tangent.factors import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ntkit.tangent.examples import Examples
    from ntkit.tangent.parameters import Selection
    from ntkit.tangent.readout import Readout


def generic_rows(
    model: nn.Module,
    selection: Selection,
    readout: Readout,
    examples: Examples,
    index: slice | Sequence[int],
    names: Sequence[str],
    device: torch.device,
) -> tuple[Tensor, dict[str, Rows]]:
    """Scalars (n, k) and, for each named parameter, its rows (n, k, *shape).

    Each example runs through the model alone, so this is right whatever the model does inside. Cost: n forward passes
    and n*k backward passes on batches of one.
    """
    wanted = dict(zip(selection.names, selection.tensors, strict=True))
    parameters = [wanted[name] for name in names]
    numbers = range(*index.indices(len(examples))) if isinstance(index, slice) else index
    outputs: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    with selection.differentiable():
        for i in numbers:
            batch = examples.batch([i], device)
            scalars = readout.scalars(batch.call(model), batch.targets)
            outputs.append(scalars.detach())
            count = scalars.shape[1]
            each: list[list[Tensor]] = [[] for _ in names]
            for k in range(count):
                grads: Sequence[Tensor | None] = [None] * len(parameters)
                if scalars.requires_grad:
                    grads = torch.autograd.grad(
                        scalars[0, k], parameters, retain_graph=k < count - 1, allow_unused=True
                    )
                for column, grad, parameter in zip(each, grads, parameters, strict=True):
                    column.append(torch.zeros_like(parameter) if grad is None else dense(grad))
            for name, column in zip(names, each, strict=True):
                rows[name].append(torch.stack(column).detach())
    return torch.cat(outputs), {name: Rows(torch.stack(parts)) for name, parts in rows.items()}


def dense(gradient: Tensor) -> Tensor:
    """A gradient that holds all its entries: those of embeddings may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient
