"""A training run that is watched: paths of probes and the kernel among them, with checkpoints to go on from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.solve.losses import CrossEntropy, Loss, as_loss
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import architecture, content, describe, digest
from ntkit.tangent.readout import logits
from ntkit.uses.dynamics.kernels import KernelPath, KernelRecorder
from ntkit.uses.dynamics.looking import call, said
from ntkit.uses.dynamics.paths import Paths
from ntkit.uses.dynamics.recorder import PathRecorder
from ntkit.uses.dynamics.schedules import AndLast, Logarithmic, Schedule

# Seconds between checkpoints.
APART = 20.0


def momentum(parameters: Any) -> torch.optim.Optimizer:
    """SGD with learning rate 0.05 and momentum 0.9."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Run:
    """How a network is trained.

    Attributes:
        steps: batches in all.
        batch_size: examples of one.
        optimizer: from parameters to an optimiser.
        loss: cross-entropy or square loss.
    """

    steps: int = 1000
    batch_size: int = 64
    optimizer: Callable[..., torch.optim.Optimizer] = momentum
    loss: Loss = field(default_factory=CrossEntropy)

    def __post_init__(self) -> None:
        """Check the loss and the numbers.

        Raises:
            InputError: if the loss is none, or they are not positive.
        """
        object.__setattr__(self, "loss", as_loss(self.loss))
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise InputError(f"{name}: got {value!r}, expected a positive number")


@dataclass(frozen=True)
class Look:
    """What is looked at, and when.

    Attributes:
        probes: training examples whose paths are recorded, at most.
        kernel_examples: of those, how many the kernel is computed on.
        schedule: of the paths; the kernel is computed some six times as rarely as the default. Both are looked at
            after the last step too.
    """

    probes: int = 1000
    kernel_examples: int = 100
    schedule: Schedule = field(default_factory=lambda: Logarithmic(30))

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if they are not positive.
        """
        for name, value in (("probes", self.probes), ("kernel_examples", self.kernel_examples)):
            if value < 2:
                raise InputError(f"{name}: got {value!r}, expected two or more")


@dataclass(frozen=True, eq=False)
class Watched:
    """A training run, seen.

    Attributes:
        paths: of the probes, which are training examples.
        probes: those examples.
        kernel: the trace kernel among some of them.
        steps: at which accuracies were taken, (T,).
        train: accuracy on the training examples, (T,).
        test: on the test examples, (T,).
        replaced: recordings that this folder's runs have set aside, where they were not recorded again to the bit.
    """

    paths: Paths
    probes: Any
    kernel: KernelPath
    steps: Tensor
    train: Tensor
    test: Tensor
    replaced: tuple[Paths, ...] = ()


def watch(
    model: nn.Module,
    train: tuple[Any, Tensor],
    test: tuple[Any, Tensor],
    *,
    generator: torch.Generator,
    run: Run | None = None,
    look: Look | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Watched:
    """Train a network and watch what becomes of its predictions and of its kernel.

    The model that is given is trained. With a folder a killed run goes on from its last checkpoint, given the same
    network, data, run and look, and a generator in the same state.

    Args:
        model: freshly made.
        train: (x, y), classes (N,).
        test: (x, y), classes (M,).
        generator: draws probes and the order of examples.
        run: how to train.
        look: what to look at.
        folder: for records and checkpoints.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: if anything does not fit; nothing has been trained or written then.
        ModelError: if training diverges; what was recorded is kept.
        StoreError: if the folder holds another run, or cannot be written.
    """
    run, look = Run() if run is None else run, Look() if look is None else look
    (x, y), examples = train, Examples(train[0])
    for name, data in (("train", train), ("test", test)):
        _check(name, *data, model)
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device).item())
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    seen = order[: look.probes].sort().values
    identity = digest([
        architecture(model), *model.state_dict().values(), content(examples), y, content(Examples(test[0])), test[1],
        str(seed), describe(run), describe(look),
    ])  # fmt: skip
    place = None if folder is None else Path(folder)
    optimizer = run.optimizer(model.parameters())
    watched = examples.pick(seen.tolist())
    recorder = PathRecorder(watched, labels=y[seen], folder=place, schedule=AndLast(look.schedule, run.steps))
    few = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed + 1))[: look.kernel_examples]]
    rarely = AndLast(Logarithmic(5), run.steps)
    kernels = KernelRecorder(examples.pick(few.tolist()), labels=y[few], schedule=rarely)
    state = _State(model, optimizer, kernels, identity, place)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        start = state.load()
        recorder.rewind(start + 1 if start else 0)
        if not start:
            _look(recorder, kernels, state, model, 0, (x, y), test)
        saved = time.monotonic()
        for step in range(start + 1, run.steps + 1):
            _update(model, optimizer, examples, y, _batch(step, len(examples), run.batch_size, seed), run.loss)
            _look(recorder, kernels, state, model, step, (x, y), test)
            if time.monotonic() - saved > APART or step == run.steps:
                state.save(step)
                saved = time.monotonic()
            if progress is not None:
                progress(step, run.steps)
    scores = torch.tensor(state.scores, dtype=torch.float64).reshape(-1, 3)
    paths = recorder.paths()
    left = tuple(one for one in recorder.replaced() if not _again(one, paths))
    return Watched(paths, watched, kernels.path(), scores[:, 0].long(), scores[:, 1], scores[:, 2], left)


def _check(name: str, x: Any, y: Tensor, model: nn.Module) -> None:
    """Refuse what is no class of the network, whose outputs are those of the first example."""
    examples = Examples(x)
    if y.shape != (len(examples),) or y.is_floating_point():
        raise InputError(f"{name}: y are classes ({len(examples)},): got {tuple(y.shape)}, {y.dtype}")
    outputs = said(model, Examples(examples.pick([0])), None, 1).shape[1]
    if int(y.min()) < 0 or int(y.max()) >= outputs:
        raise InputError(
            f"{name}: y are classes from 0 to {outputs - 1}, the network has {outputs} outputs: got {int(y.min())} to "
            f"{int(y.max())}"
        )


def _again(old: Paths, paths: Paths) -> bool:
    """Whether all that was set aside has been recorded anew, to the bit."""
    if old.logits.shape[1:] != paths.logits.shape[1:] or not bool(torch.isin(old.steps, paths.steps).all()):
        return False
    return torch.equal(paths.logits[torch.searchsorted(paths.steps, old.steps)], old.logits)


def _look(
    recorder: PathRecorder,
    kernels: KernelRecorder,
    state: _State,
    model: nn.Module,
    step: int,
    train: tuple[Any, Tensor],
    test: tuple[Any, Tensor],
) -> None:
    recorder.record(model, step)
    if kernels.record(model, step):
        state.scores.append([step, _accuracy(model, *train), _accuracy(model, *test)])


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, examples: Examples, y: Tensor, some: list[int], loss: Loss
) -> None:
    device = next(model.parameters()).device
    model.train()
    optimizer.zero_grad()
    value = loss.value(logits(call(model, examples.batch(some, device)), None), y[some].to(device))
    if not bool(torch.isfinite(value)):
        raise ModelError(
            f"the training loss is {float(value)}: training has diverged. Take a smaller learning rate; what was "
            "recorded is kept"
        )
    value.backward()
    optimizer.step()


def _batch(step: int, n: int, size: int, seed: int) -> list[int]:
    """Numbers of the examples of a step: every epoch in an order that follows from its number."""
    size = min(size, n)
    each = n // size  # the last, smaller batch of an epoch is left out
    epoch, place = divmod(step - 1, each)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 2 + epoch))
    return order[place * size : (place + 1) * size].tolist()


def _accuracy(model: nn.Module, x: Any, y: Tensor) -> float:
    examples = Examples(x)
    found = said(model, examples, None, 512).argmax(1).cpu()
    return float((found == y.cpu()).double().mean())


class _State:
    """What a run needs to go on."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        kernels: KernelRecorder,
        identity: str,
        folder: Path | None,
    ) -> None:
        self.model, self.optimizer, self.kernels, self.identity = model, optimizer, kernels, identity
        self.path = None if folder is None else folder / "checkpoint.pt"
        self.scores: list[list[float]] = []

    def load(self) -> int:
        """Go on from the checkpoint; the step it was made at, 0 where there is none."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            found = torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch says in many ways that a file is none
            raise StoreError(f"{self.path}: no checkpoint ({error})") from error
        if found.get("identity") != self.identity:
            raise StoreError(
                f"{self.path} is of another network, other data, another seed or another run: take another folder"
            )
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        torch.set_rng_state(found["random"])
        if len(found["cuda_random"]) == torch.cuda.device_count():  # on other devices dropout draws otherwise
            torch.cuda.set_rng_state_all(found["cuda_random"])
        self.kernels.steps[:] = found["kernel_steps"]
        self.kernels.matrices[:] = found["kernels"]
        self.scores[:] = found["scores"]
        return int(found["step"])

    def save(self, step: int) -> None:
        """Write a checkpoint, whole or not at all."""
        if self.path is None:
            return
        part = self.path.with_suffix(".part")
        try:
            torch.save(
                {
                    "identity": self.identity, "step": step, "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state(),
                    "cuda_random": torch.cuda.get_rng_state_all(),
                    "kernel_steps": self.kernels.steps, "kernels": self.kernels.matrices, "scores": self.scores,
                },
                part,
            )  # fmt: skip
            part.replace(self.path)
        except (OSError, RuntimeError) as error:
            raise StoreError(f"{self.path}: cannot write the checkpoint ({error}). The last one is kept") from error
