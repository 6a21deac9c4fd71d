"""How a head is probed and a network is fine-tuned: optimiser, length, order of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError

Optimizer = Callable[..., torch.optim.Optimizer]


def _probing_optimizer() -> Optimizer:
    return partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True)


def _finetuning_optimizer() -> Optimizer:
    return partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Probing:
    """How the head alone is trained, on features that stand still.

    Attributes:
        taus: lengths from which fine-tuning is begun, in epochs (passes over the data); 0 is a head that is not probed.
        optimizer: from parameters to an optimiser; SGD with momentum at a constant rate by default, as in the paper.
        batch_size: examples of one step; None for all, where an epoch is one step. One that is left over at the end of
            an epoch joins the step before: BatchNorm cannot train on it alone.
        smoothing: of the targets, for probing alone: the head then keeps some energy however long it is probed.
        stop: probing ends where the energy is at most this part of the energy before probing, and what is left of
            `taus` is left out; None for never.
        seed: of fresh weights, dropout and the order of examples.
    """

    taus: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64)
    optimizer: Optimizer = field(default_factory=_probing_optimizer)
    batch_size: int | None = 128
    smoothing: float = 0.0
    stop: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if they cannot be used.
        """
        taus = tuple(self.taus)
        if not taus or sorted(set(taus)) != list(taus) or not all(isinstance(t, int) and t >= 0 for t in taus):
            raise InputError(f"taus: got {self.taus!r}, expected whole numbers >= 0 in ascending order")
        object.__setattr__(self, "taus", taus)
        if self.stop is not None and not 0 < self.stop < 1:
            raise InputError(f"stop: got {self.stop!r}, expected a part of the first energy, between 0 and 1")
        _check(self.batch_size, self.smoothing)


@dataclass(frozen=True)
class Finetuning:
    """How backbone and head are trained together afterwards.

    Attributes:
        epochs: passes over the data.
        optimizer: from parameters to an optimiser; SGD with momentum, a tenth of the rate of probing, by default.
        schedule: from that optimiser to a scheduler of its rate, stepped after every batch; none by default.
        batch_size: examples of one step; None for all, where an epoch is one step; see `Probing`.
        smoothing: of the targets; the energy is measured against the same.
        frozen_statistics: BatchNorm keeps the running statistics that it has.
        seed: of dropout and the order of examples, the same for every tau.
    """

    epochs: int = 20
    optimizer: Optimizer = field(default_factory=_finetuning_optimizer)
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    batch_size: int | None = 128
    smoothing: float = 0.0
    frozen_statistics: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if they cannot be used.
        """
        if self.epochs < 1:
            raise InputError(f"epochs: got {self.epochs!r}, expected a positive number")
        _check(self.batch_size, self.smoothing)


def epoch(n: int, batch_size: int | None, generator: torch.Generator) -> Iterator[Tensor]:
    """Places of the examples of every step of one pass: all of them in a random order, or all at once."""
    if batch_size is None:
        yield torch.arange(n)
        return
    parts = torch.randperm(n, generator=generator).split(batch_size)
    if len(parts) > 1 and len(parts[-1]) == 1 < batch_size:
        parts = (*parts[:-2], torch.cat(parts[-2:]))
    yield from parts


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's own generators begin with a seed, and are afterwards as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters do not require gradients inside."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)


def _check(batch_size: int | None, smoothing: float) -> None:
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size: got {batch_size!r}, expected a positive number, or None for all examples")
    if not 0 <= smoothing < 1:
        raise InputError(f"smoothing: got {smoothing!r}, expected a number from 0 to below 1")
