"""A finite network trained on few points in the place of a data set, and what it then knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.uses.condense.support import Labelled, Support, centred


@dataclass(frozen=True)
class Training:
    """How a network is trained on a support set: the published way, full batches where the set is small.

    Attributes:
        steps: of SGD.
        learning_rate: of SGD; constant.
        momentum: of SGD.
        decay: L2 penalty on all parameters.
        batch: points of a step, drawn without replacement; all there are where there are fewer.
    """

    steps: int = 5000
    learning_rate: float = 1e-2
    momentum: float = 0.9
    decay: float = 1e-3
    batch: int = 100

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if one cannot be used.
        """
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is a whole number, 1 or more: got {value!r}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is positive and finite: got {self.learning_rate}")
        for name, value in (("momentum", self.momentum), ("decay", self.decay)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is a finite number, 0 or more: got {value}")


@dataclass(frozen=True, eq=False)
class Transferred:
    """A network that has seen nothing but the support set.

    Attributes:
        model: in evaluation mode.
        accuracy: on the test examples.
        standard_error: of the accuracy, of a sample of examples.
        loss: half the mean square of its error on them, over examples and classes.
        train_loss: the same on the support set, against its own targets.
    """

    model: nn.Module
    accuracy: float
    standard_error: float
    loss: float
    train_loss: float


def train_network(
    make: Callable[[], nn.Module],
    support: Support,
    test: tuple[Tensor, Tensor],
    *,
    generator: torch.Generator,
    training: Training | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Transferred:
    """Train a network on the targets of a support set by least squares, and test it.

    Args:
        make: a function that gives a network whose output is (n, C), on any device. It is called, and the network
            trained, with torch's global generator (of dropout) seeded from `generator`; that generator is put back.
        support: what is trained on.
        test: examples (N, ...) and class numbers (N,).
        generator: of the weights, of the order, and of what the network draws.
        training: see `Training`.
        progress: is told (steps done, in all).

    Raises:
        InputError: if shapes do not fit, or `make` gives no network with parameters.
        ModelError: if the output is not (n, C), or training diverges.
    """
    own = training or Training()
    found = Labelled.of(test, classes=support.classes, named="the test examples")
    if found.x.shape[1:] != support.x.shape[1:]:
        raise InputError(
            f"the test examples have the shape of the support points, {tuple(support.x.shape[1:])}: got "
            f"{tuple(found.x.shape[1:])}"
        )
    if isinstance(make, nn.Module) or not callable(make):
        raise InputError(f"make is a function that gives a new network, lambda: ...: got {type(make).__name__}")
    # what makes the weights, and dropout, draw from the global generators, whose seeds are set together
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device)))
        model = make()
        weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        if weight is None:
            raise InputError(f"make gives a network with parameters: got {type(model).__name__}")
        x, y = support.x.to(weight), support.y.to(weight)
        _train(model, x, y, own, generator, progress)
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        said = torch.cat([model(part.to(weight)) for part in found.x.split(1000)]).double().cpu()
        kept = torch.cat([model(part) for part in x.split(1000)]).double().cpu()
    if not said.isfinite().all():
        raise ModelError(f"training diverged with a learning rate of {own.learning_rate}: take a smaller one")
    labels = found.labels.cpu()
    right = float((said.argmax(1) == labels).double().mean())
    return Transferred(
        model=model,
        accuracy=right,
        standard_error=math.sqrt(right * (1 - right) / len(said)),
        loss=float(_loss(said, centred(labels, found.classes))) / found.classes,
        train_loss=float(_loss(kept, support.y.cpu())) / support.classes,
    )


def _train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    own: Training,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None,
) -> None:
    with torch.no_grad():
        shape = tuple(model.train()(x[:2]).shape)
    if shape != (len(x[:2]), y.shape[1]):
        raise ModelError(f"the network gives (n, {y.shape[1]}), one output for each class: got {shape}")
    optimizer = torch.optim.SGD(model.parameters(), own.learning_rate, own.momentum, weight_decay=own.decay)
    for step in range(own.steps):
        chosen = slice(None)
        if len(x) > own.batch:
            chosen = torch.randperm(len(x), generator=generator, device=generator.device)[: own.batch].to(x.device)
        loss = _loss(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, own.steps)


def _loss(said: Tensor, wanted: Tensor) -> Tensor:
    return (said - wanted).square().sum(1).mean() / 2
