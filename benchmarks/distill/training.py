"""The one training loop of these studies, and lines of results on disk.

Like the loop of the papers: every epoch in a new random order, a validation score after each, the first best one kept.
Many small networks of one shape are trained side by side, because one alone spends its time between the operations:
each has its own examples, targets, order and weights, and goes exactly where it would go alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.distill.stack import stacked
from ntkit.uses import distill


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        network: makes a new one; what it draws follows the seed.
        rate: of stochastic gradient descent with momentum 0.9.
        epochs: passes over the training examples.
        batch_size: examples of a step; the last, smaller batch of an epoch is used too.
        decay: of the weights.
        cosine: whether the rate falls to 0.
        factor: of the loss of soft targets; the public code of Filter-KD has 2, and 1 for labels.
        view: what is done to the examples of a batch before each step, with a generator; evaluation has none.
    """

    network: Callable[[], nn.Module]
    rate: float
    epochs: int
    batch_size: int
    decay: float = 0.0
    cosine: bool = False
    factor: float = 1.0
    view: Callable[[Tensor, torch.Generator], Tensor] | None = None


@dataclass(frozen=True)
class Job:
    """One network to train: on what, towards what, and the tables that take in every batch before the step.

    Attributes:
        weights: seed of the weights it begins with.
        order: seed of the order of the examples, and of what `view` draws.
    """

    x: Tensor
    targets: distill.Targets
    validation: tuple[Tensor, Tensor]
    weights: int
    order: int
    tables: dict[str, distill.EMATargets] = field(default_factory=dict)


@dataclass
class Trained:
    """A network at its last epoch and, within `best`, at its best one, with the tables of that moment."""

    model: nn.Module
    best: distill.BestSoFar


def train(recipe: Recipe, jobs: list[Job]) -> list[Trained]:
    """Train one network for each job."""
    trained = [Trained(_made(recipe.network, job.weights), distill.BestSoFar()) for job in jobs]
    models, taught = [found.model for found in trained], [job.targets.table() for job in jobs]
    orders = [torch.Generator().manual_seed(job.order) for job in jobs]
    stack, loss = stacked(models), distill.DistillationLoss(factor=recipe.factor)
    optimizer = torch.optim.SGD(stack.weights, lr=recipe.rate, momentum=0.9, weight_decay=recipe.decay, fused=True)
    steps = recipe.epochs * -(-len(jobs[0].x) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if recipe.cosine else None
    for _ in range(recipe.epochs):
        epoch = [torch.randperm(len(job.x), generator=order) for job, order in zip(jobs, orders, strict=True)]
        for some in zip(*(order.split(recipe.batch_size) for order in epoch), strict=True):
            batches = [job.x[k] for job, k in zip(jobs, some, strict=True)]
            if recipe.view is not None:
                batches = [recipe.view(x, order) for x, order in zip(batches, orders, strict=True)]
            z = stack.forward(torch.stack(batches))
            for job, numbers, own in zip(jobs, some, z.detach(), strict=True):
                for table in job.tables.values():
                    table.update(numbers, own)
            wanted = torch.stack([p[k] for p, k in zip(taught, some, strict=True)])
            optimizer.zero_grad()
            # the sum over networks of each one's mean: none has a part in another's gradient
            (len(jobs) * loss(z.flatten(0, 1), wanted.flatten(0, 1))).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        stack.write(models)
        for job, found in zip(jobs, trained, strict=True):
            score = accuracy(said(found.model, job.validation[0]), job.validation[1])
            found.best.update(score, model=found.model, **job.tables)
    return trained


def _made(network: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network()


def said(model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities in evaluation mode, (N, C)."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).softmax(1) for part in x.split(1000)])


def accuracy(p: Tensor, y: Tensor) -> float:
    return float((p.argmax(1) == y).double().mean())


def run(one: Callable[..., list[dict[str, Any]]], jobs: list[tuple], path: Path, workers: int) -> None:
    """Add the lines of every job to a file as soon as it is done, one thread for each worker."""
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, path.open("a") as file:
        futures = {pool.submit(one, *job): job for job in jobs}
        for k, future in enumerate(as_completed(futures), 1):
            file.write("".join(json.dumps(line) + "\n" for line in future.result()))
            file.flush()
            print(f"{k} of {len(jobs)}, {time.perf_counter() - start:.0f} s: {futures[future]}", flush=True)
