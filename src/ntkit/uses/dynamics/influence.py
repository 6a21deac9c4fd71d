"""Which training examples have moved a prediction, added up along the path of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.solve.losses import CrossEntropy, Loss, as_loss, require_classes
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ntkit.tangent.readout import Select


@dataclass(frozen=True, eq=False)
class Influence:
    """What each of N training examples has done to one number of a probe.

    Attributes:
        total: over all checkpoints, (N,): positive where the example has raised it.
        each: at every checkpoint, (checkpoints, N).
    """

    total: Tensor
    each: Tensor

    def strongest(self, count: int = 10) -> Tensor:
        """Numbers of the examples that have moved it most, in either direction."""
        return self.total.abs().argsort(descending=True, stable=True)[:count]


def influence(
    checkpoints: Iterable[tuple[nn.Module, float]],
    train: tuple[Any, Tensor],
    probe: tuple[Any, int],
    *,
    loss: Loss | nn.CrossEntropyLoss | None = None,
    select: Select | None = None,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Influence:
    """First-order influence along a path: the sum over checkpoints of -rate A K G for one class of one probe.

    At each checkpoint the example's own step, taken alone, would move the log-probability of the class (for the square
    loss its output) by -rate <grad of it, grad of the example's loss>: TracIn (Pruthi et al. 2020), which is the
    one-step decomposition of Ren, Guo and Sutherland (2022) summed up.

    Args:
        checkpoints: (network in evaluation mode, rate): the learning rate there times the number of times that each
            example is visited until the next checkpoint, over the batch size for a mean loss. An iterator may load one
            after the other.
        train: (x, y) of the N training examples: classes (N,) or points (N, C).
        probe: (x, class): one example, with its first axis of length 1, and the class that is asked about.
        loss: cross-entropy by default.
        select: takes the (n, C) logits out of the network's output, if it is not a tensor.
        batch: examples at once.
        progress: called with the number of checkpoints done.

    Cost: for each checkpoint one backward pass of the probe, and a forward pass and a jvp of the N examples.

    Raises:
        InputError: if anything does not fit, or there is no checkpoint.
        ModelError: if a network is in training mode with BatchNorm or Dropout.
    """
    loss = as_loss(loss)
    (x, y), (seen, asked) = train, probe
    found = []
    for model, rate in checkpoints:
        tangent = linearize(model, readout=Logits(select))
        z = tangent.outputs(seen)
        if len(z) != 1:
            raise InputError(f"one probe at a time: got {len(z)} examples")
        if isinstance(loss, CrossEntropy):
            require_classes(z.shape[1])
        if not hasattr(asked, "__index__") or not 0 <= int(asked) < z.shape[1]:
            raise InputError(f"classes are numbers from 0 to {z.shape[1] - 1}: got {asked!r}")
        unit = torch.zeros_like(z)
        unit[0, asked] = 1.0
        pull = unit - z.softmax(1) if isinstance(loss, CrossEntropy) else unit
        direction = tangent.vjp(seen, pull)
        misfit = loss.misfit(tangent.outputs(x, batch=batch), y.to(tangent.device))
        found.append((rate * (tangent.jvp(x, direction, batch=batch) * misfit).sum(1)).cpu())
        if progress is not None:
            progress(len(found))
    if not found:
        raise InputError("influence needs at least one checkpoint: got none")
    each = torch.stack(found)
    return Influence(each.sum(0), each)
