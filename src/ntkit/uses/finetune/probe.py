"""Probe the head once, fine-tune from several of its lengths, and see which is best.

A head that is probed to the end has no energy left: fine-tuning then hardly moves the features. One that is not probed
at all moves them by what a random head says. In between lies what a task needs (Ren, Guo, Bae, Sutherland, ICLR 2023).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.solve.losses import CrossEntropy, Loss, as_loss, require_classes
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import architecture, content, describe, digest
from ntkit.tangent.readout import logits
from ntkit.tangent.untouched import check_evaluation
from ntkit.uses.finetune.change import FeatureChange, feature_change
from ntkit.uses.finetune.energy import average_initial_energy, energies, first_step
from ntkit.uses.finetune.folder import Folder
from ntkit.uses.finetune.heads import Head
from ntkit.uses.finetune.schedule import Finetuning, Probing, epoch, frozen, seeded
from ntkit.uses.finetune.split import BATCH, Split
from ntkit.uses.finetune.sweep import Row, Sweep
from ntkit.uses.finetune.targets import accuracy, count_classes, smoothed

Data = tuple[Any, Tensor]
State = dict[str, Tensor]


def probe_then_finetune(
    model: nn.Module,
    head: Head,
    train: Data,
    validation: Data,
    *,
    probing: Probing | None = None,
    finetuning: Finetuning | None = None,
    loss: Loss | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Train the head alone once, and the whole network from each of several points on the way.

    Args:
        model: a pre-trained network in evaluation mode; it is not changed.
        head: the head for the new task, such as LinearHead("fc").
        train: N examples and their targets: classes (N,) or points (N, C).
        validation: examples that the tau is chosen by, and whose features are looked at.
        probing: the lengths tau and how the head is trained.
        finetuning: how the whole network is trained from each of them; the parameters that require gradients.
        loss: of both; cross-entropy by default.
        folder: every finished tau is written there, and a killed run goes on with the same call to the same result.
        progress: called with (fine-tunings done, fine-tunings in all).

    Features are read once for the whole of probing where the head is one module and gives the outputs itself. Every tau
    has the same order of examples. Cost: N forward passes, or N for every epoch of probing, and 3 N for every epoch of
    every fine-tuning. Memory: the features, and for every tau a copy of the weights that are trained, on disk if there
    is a folder.

    Raises:
        InputError: if the data cannot be used, or all targets are equal.
        ModelError: if the network cannot be cut there, its backbone has no parameter to tune, or training diverges.
        StoreError: if the folder holds a sweep of another network, other data or settings.
    """
    probing = Probing() if probing is None else probing
    finetuning = Finetuning() if finetuning is None else finetuning
    task = _Task.of(train, validation, as_loss(loss), finetuning.smoothing)
    check_evaluation(model)
    with seeded(probing.seed):
        start = head.build(model, task.x, task.classes)
    start.check(task.x)
    start.tangent()  # refuses a backbone that stands still, before the head is probed
    finetuning.optimizer([p for p in start.model.parameters() if p.requires_grad])  # and what it cannot be tuned by
    store = None
    if folder is not None:
        store = Folder(folder, _identity(model, head, task, probing, finetuning))
    first_features = start.features(task.x_seen)
    energies, checkpoints, stopped = _probed(start, task, probing, store)
    rows, weights = [], {}
    for tau, state in checkpoints.items():
        name = f"tau-{tau:04d}"
        found = None if store is None else store.read(name)
        if found is None:
            row, tuned = _finetuned(_at(start, state), task, finetuning, tau, first_features)
            if store is not None:
                store.write(name, asdict(row), tuned)
        else:
            row, tuned = Row(**{**found[0], "change": FeatureChange(**found[0]["change"])}), found[1]
        rows.append(row)
        weights[tau] = tuned if store is None else store.weights(name)
        if progress is not None:
            progress(len(rows), len(checkpoints))
    return Sweep(tuple(rows), energies, len(task.x_seen), stopped, start, weights)


@dataclass(frozen=True, eq=False)
class _Task:
    """The data, checked.

    Attributes:
        x: training examples.
        y: their targets.
        x_seen: validation examples.
        y_seen: their targets.
        classes: C.
        loss: of probing and fine-tuning.
        smoothing: of fine-tuning's targets.
    """

    x: Examples
    y: Tensor
    x_seen: Examples
    y_seen: Tensor
    classes: int
    loss: Loss
    smoothing: float

    @classmethod
    def of(cls, train: Data, validation: Data, loss: Loss, smoothing: float) -> _Task:
        for name, part in (("train", train), ("validation", validation)):
            if not isinstance(part, tuple) or len(part) != 2:
                raise InputError(f"{name}: expected a pair (examples, targets): got {type(part).__name__}")
        classes = count_classes(train[1], validation[1])
        if bool((train[1] == train[1][0]).all()):
            raise InputError(f"train: all targets are equal, {train[1][0].tolist()}: there is nothing to learn")
        if isinstance(loss, CrossEntropy):
            require_classes(classes)
        x, x_seen = Examples(train[0]), Examples(validation[0])
        for name, examples, y in (("train", x, train[1]), ("validation", x_seen, validation[1])):
            if len(y) != len(examples):
                raise InputError(f"{name}: got {len(examples)} examples and {len(y)} targets, expected as many")
            loss.targets(y, torch.zeros(len(y), classes))  # refuses what the loss cannot take, before any work
        return cls(x, train[1], x_seen, validation[1], classes, loss, smoothing)

    @property
    def wanted(self) -> Tensor:
        """The training targets of fine-tuning, which the energy is measured against."""
        return smoothed(self.y, self.classes, self.smoothing)


def _probed(
    start: Split, task: _Task, probing: Probing, store: Folder | None
) -> tuple[tuple[float, ...], dict[int, State], bool]:
    """The energy after every epoch, the head at every tau, and whether the energy ended the run."""
    found = None if store is None else store.read("probe")
    if found is not None:
        facts, tensors = found
        states: dict[int, State] = {tau: {} for tau in facts["taus"]}
        for name, tensor in tensors.items():
            tau, _, own = name.partition("/")
            states[int(tau)][own] = tensor
        return tuple(facts["energies"]), states, facts["stopped"]
    split = Split(copy.deepcopy(start.model), start.names, start.select)
    energies, states, stopped, done = [], {}, False, 0
    for done, energy in _probing_epochs(split, task, probing):
        energies.append(energy)
        stopped = probing.stop is not None and energy <= probing.stop * energies[0]
        if done in probing.taus or stopped:
            states[done] = {n: t.detach().clone() for n, t in split.model.state_dict().items() if split.in_head(n)}
        if stopped or done == probing.taus[-1]:
            break
    stopped = stopped and done < probing.taus[-1]
    if store is not None:
        facts = {"energies": energies, "taus": list(states), "stopped": stopped}
        store.write("probe", facts, {f"{tau}/{n}": t for tau, state in states.items() for n, t in state.items()})
    return tuple(energies), states, stopped


def _probing_epochs(split: Split, task: _Task, probing: Probing) -> Iterator[tuple[int, float]]:
    """Train the head of a copy, and give the number of epochs and the energy before the first and after each."""
    head = [p for n, p in split.model.named_parameters() if split.in_head(n)]
    rest = [p for n, p in split.model.named_parameters() if not split.in_head(n)]
    if not any(p.requires_grad for p in head):
        raise ModelError(f"no parameter of the head {', '.join(split.names)} requires gradients: it cannot be probed")
    outputs, energy = _outputs_of(split, task)
    targets = smoothed(task.y, task.classes, probing.smoothing).to(split.device)
    optimizer = probing.optimizer([p for p in head if p.requires_grad])
    generator = torch.Generator().manual_seed(probing.seed)
    yield 0, energy()
    done = 0
    while True:
        with seeded(probing.seed + done), frozen(rest):
            for module in split.modules():
                module.train()
            for places in epoch(len(task.x), probing.batch_size, generator):
                optimizer.zero_grad()
                _step(task.loss, outputs(places), targets[places], optimizer, f"epoch {done + 1} of probing")
            for module in split.modules():
                module.eval()
        done += 1
        yield done, energy()


def _outputs_of(split: Split, task: _Task) -> tuple[Callable[[Tensor], Tensor], Callable[[], float]]:
    """The network's outputs at places of the data, and its energy; from features read once where that is the same."""
    x = task.x
    anatomy = split.check(x)
    if not anatomy.alone:
        return (
            lambda places: logits(x.batch(places.tolist(), split.device).call(split.model), split.select),
            lambda: average_initial_energy(split, x, task.wanted, loss=task.loss),
        )
    features, (head,) = split.features(x).reshape(-1, *anatomy.shape), split.modules()

    def energy() -> float:
        with torch.no_grad():
            outputs = torch.cat([head(some) for some in features.split(BATCH)])
        return float(energies(outputs, task.wanted, task.loss).double().mean())

    return lambda places: head(features[places]), energy


def _finetuned(
    split: Split, task: _Task, finetuning: Finetuning, tau: int, first_features: Tensor
) -> tuple[Row, State]:
    """Fine-tune a copy that is ours; what is measured is measured in evaluation mode."""
    model, device = split.model, split.device
    probed = split.outputs(task.x_seen)
    step = first_step(split, task.x, task.wanted, at=task.x_seen, loss=task.loss)
    optimizer = finetuning.optimizer([p for p in model.parameters() if p.requires_grad])
    scheduler = None if finetuning.schedule is None else finetuning.schedule(optimizer)
    generator, targets = torch.Generator().manual_seed(finetuning.seed), task.wanted.to(device)
    with seeded(finetuning.seed):
        model.train()
        if finetuning.frozen_statistics:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        for number in range(finetuning.epochs):
            for places in epoch(len(task.x), finetuning.batch_size, generator):
                optimizer.zero_grad()
                outputs = logits(task.x.batch(places.tolist(), device).call(model), split.select)
                where = f"epoch {number + 1} of fine-tuning from tau = {tau}"
                _step(task.loss, outputs, targets[places], optimizer, where)
                if scheduler is not None:
                    scheduler.step()
        model.eval()
    last = split.outputs(task.x_seen)
    row = Row(
        tau=tau,
        energy=step.energy,
        speed=step.speed,
        change=feature_change(first_features, split.features(task.x_seen)),
        probed_accuracy=accuracy(probed, task.y_seen),
        probed_loss=float(task.loss.value(probed, task.y_seen.to(device))),
        accuracy=accuracy(last, task.y_seen),
        loss=float(task.loss.value(last, task.y_seen.to(device))),
        train_accuracy=accuracy(split.outputs(task.x), task.y),
    )
    return row, _kept(model)


def _kept(model: nn.Module) -> State:
    """What fine-tuning may have changed: all but the parameters that stand still, most of a network with adapters."""
    still = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: t.detach().clone() for name, t in model.state_dict().items() if name not in still}


def _step(loss: Loss, outputs: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer, where: str) -> None:
    with torch.enable_grad():
        value = loss.value(outputs, targets)
    if not bool(torch.isfinite(value)):
        raise ModelError(f"training diverges: the loss is {value.item()} in {where}. Use a smaller learning rate")
    value.backward()
    optimizer.step()


def _at(start: Split, state: State) -> Split:
    """A copy with a probed head."""
    model = copy.deepcopy(start.model)
    model.load_state_dict(state, strict=False)
    return Split(model, start.names, start.select)


def _identity(model: nn.Module, head: Head, task: _Task, probing: Probing, finetuning: Finetuning) -> dict[str, str]:
    """What the results depend on. Cost: reads the parameters and all examples once."""
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return {
        "architecture": architecture(model),
        "parameters": digest([*[item for pair in sorted(model.state_dict().items()) for item in pair], flags]),
        "head": describe(head),
        "training examples": content(task.x),
        "training targets": digest([task.y]),
        "validation examples": content(task.x_seen),
        "validation targets": digest([task.y_seen]),
        "probing": describe(probing),
        "fine-tuning": describe(finetuning),
        "loss": describe(task.loss),
    }
