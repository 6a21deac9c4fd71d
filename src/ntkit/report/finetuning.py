"""Pages on fine-tuning: how long to probe a head, and which backbone to take."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ntkit.errors import InputError
from ntkit.report.files import as_json, check_folder, earlier_results, write_folder
from ntkit.report.inputs import Cut, Data, Factory, load_data, load_factory, load_weights, require_rate
from ntkit.report.page import Card, Figure, Page, Section, Table, render
from ntkit.report.pictures import SIZE, drawn
from ntkit.report.provenance import provenance
from ntkit.report.words import count, number, percent
from ntkit.uses.finetune import (
    Candidate,
    ExactKernel,
    Finetuning,
    Head,
    LinearHead,
    MLPHead,
    Probing,
    Ranking,
    Reinitialised,
    SketchedKernel,
    Sweep,
    probe_then_finetune,
    rank_backbones,
)

if TYPE_CHECKING:
    from torch import nn

    from ntkit.uses.study import Listener

BLUE, ORANGE, GREEN = "#2f80ed", "#e07b00", "#0f9d8a"


@dataclass(frozen=True)
class Sweeping:
    """A pre-trained network and its new task.

    Attributes:
        factory: makes the network.
        data: `.npz` file of the new task.
        head: name of the module that a new head takes the place of.
        weights: of the pre-training.
        cut: how many examples are used.
        hidden: width of the new head's hidden layer; None for a linear head.
        reinitialised: names of modules below it that forget their weights and are probed with the head.
        taus: epochs of probing from which to fine-tune.
        epochs: of fine-tuning.
        probing_rate: learning rate of probing.
        finetuning_rate: learning rate of fine-tuning.
        smoothing: of the labels, while probing.
        batch_size: examples of one step.
        stop: probing ends where this part of the energy is left; None for never.
        frozen_statistics: BatchNorm keeps the running statistics that it has.
    """

    factory: Factory
    data: Path
    head: str
    weights: Path | None = None
    cut: Cut = field(default_factory=Cut)
    hidden: int | None = None
    reinitialised: Sequence[str] = ()
    taus: Sequence[int] = (0, 1, 2, 4, 8, 16, 32)
    epochs: int = 20
    probing_rate: float = 1e-2
    finetuning_rate: float = 1e-3
    smoothing: float = 0.0
    batch_size: int = 128
    stop: float | None = None
    frozen_statistics: bool = False

    def __post_init__(self) -> None:
        """Check the rates, before anything is read.

        Raises:
            InputError: if one is not positive.
        """
        require_rate("probing rate", self.probing_rate)
        require_rate("fine-tuning rate", self.finetuning_rate)

    @property
    def new_head(self) -> Head:
        """The head that is probed."""
        top = LinearHead(self.head) if self.hidden is None else MLPHead(self.head, self.hidden)
        return Reinitialised(tuple(self.reinitialised), top) if self.reinitialised else top


def parse_taus(text: str) -> tuple[int, ...]:
    """Epochs as they are written on the command line, "0,1,2,4".

    Raises:
        InputError: if they are no whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"taus are epochs, such as 0,1,2,4: got {text!r}")
    return tuple(map(int, parts))


def run_probe(folder: Path, own: Sweeping, *, force: bool = False, listener: Listener) -> Sweep:
    """Sweep over lengths of probing, and write index.html, results.json and the weights of every fine-tuned network.

    best.safetensors is the whole best network; tau-*.safetensors are those from every tau. What is finished lies beside
    the folder, as FOLDER.part, until all of it is in the folder: the same command goes on there.

    Args:
        folder: is made; it may exist only with `force`.
        own: the network and its task.
        force: see above.
        listener: is told what is being done.

    Raises:
        InputError: if anything the user named cannot be used; nothing has been computed then.
        ModelError: if the network has no such head, or training diverges.
        StoreError: if FOLDER.part is of another sweep, or cannot be written.
    """
    from safetensors.torch import save_file

    check_folder(folder, force=force)
    start = time.perf_counter()
    model = _network(own.factory, own.weights, own.cut.seed)
    data = load_data(own.data, own.cut, torch.float32)
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    listener.step("probing and fine-tuning")
    work = folder.with_name(folder.name + ".part")
    found = probe_then_finetune(
        model, own.new_head, (data.x_train, data.y_train), (data.x_test, data.y_test),
        probing=Probing(
            own.taus, partial(sgd, lr=own.probing_rate), own.batch_size, own.smoothing, own.stop, own.cut.seed
        ),
        finetuning=Finetuning(
            own.epochs, partial(sgd, lr=own.finetuning_rate), batch_size=own.batch_size, seed=own.cut.seed,
            frozen_statistics=own.frozen_statistics,
        ),
        folder=work, progress=listener.part,
    )  # fmt: skip
    listener.step("writing the page")
    seconds = time.perf_counter() - start
    results = {
        "factory": own.factory.spec, "data": data.said, "rows": found.rows, "energies": found.energies,
        "best": found.best.tau, "stopped": found.stopped, "recommendation": found.recommendation, "seconds": seconds,
        "made": provenance(),
    }  # fmt: skip
    text, best = render(_probe_page(own, found, data, seconds)), work / "best.safetensors"
    save_file({name: t.contiguous().clone() for name, t in found.network().state_dict().items()}, best)
    tuned = {f"tau-{tau:04d}.safetensors": path for tau, path in found.weights.items() if isinstance(path, Path)}
    # the page comes last: where it is, everything is
    contents = {best.name: best, **tuned, "results.json": as_json(results), "index.html": text}
    earlier = folder.glob("tau-*.safetensors") if "energies" in earlier_results(folder) else ()
    write_folder(folder, contents, force=force, outdated=[path.name for path in earlier])
    shutil.rmtree(work, ignore_errors=True)  # all networks are in the folder now
    return replace(found, weights={tau: folder / f"tau-{tau:04d}.safetensors" for tau in found.weights})


@dataclass(frozen=True)
class Backbones:
    """Networks to choose among, and the task.

    Attributes:
        names: MODULE:FACTORY, or MODULE:FACTORY@weights.
        data: `.npz` file of the new task.
        head: name of the module that a random logit takes the place of.
        cut: how many examples are used.
        at: number of examples to predict for; None for as many as there are.
        sketch: features of a sketch; None for the exact kernel.
        seen: those of the names whose networks were trained on these very labels.
    """

    names: Sequence[str]
    data: Path
    head: str
    cut: Cut = field(default_factory=Cut)
    at: int | None = None
    sketch: int | None = None
    seen: Sequence[str] = ()


def run_ranking(folder: Path, own: Backbones, *, force: bool = False, listener: Listener) -> Ranking:
    """Predict each network's loss on the task, and write index.html and results.json.

    Args:
        folder: is made; it may exist only with `force`.
        own: the networks and the task.
        force: see above.
        listener: is told what is being done.

    Raises:
        InputError: if anything the user named cannot be used; nothing has been computed then.
        ModelError: if a network has no such head.
    """
    check_folder(folder, force=force)
    if len(set(own.names)) < len(own.names):
        raise InputError(f"every network is named once: got {', '.join(own.names)}")
    unknown = [name for name in own.seen if name not in own.names]
    if unknown:
        raise InputError(f"no network is called {unknown[0]!r}: expected one of {', '.join(own.names)}, as it is named")
    start = time.perf_counter()
    candidates = {}
    for name in own.names:
        spec, _, weights = name.partition("@")
        model = _network(load_factory(spec), Path(weights) if weights else None, own.cut.seed)
        candidates[name] = Candidate(model, own.head, seen=name in own.seen)
    data = load_data(own.data, own.cut, torch.float32)
    listener.step("kernels of random heads")
    found = rank_backbones(
        candidates, data.x_train, data.y_train, generator=torch.Generator().manual_seed(own.cut.seed), head=own.head,
        kernel=ExactKernel() if own.sketch is None else SketchedKernel(own.sketch), at=own.at, progress=listener.part,
    )  # fmt: skip
    listener.step("writing the page")
    seconds = time.perf_counter() - start
    results = {
        "data": data.said, "examples": found.examples, "at": found.at, "trivial": found.trivial, "rows": found.rows,
        "seconds": seconds, "made": provenance(),
    }  # fmt: skip
    text = render(_ranking_page(found, data, seconds))
    write_folder(folder, {"index.html": text, "results.json": as_json(results)}, force=force)
    return found


def _network(factory: Factory, weights: Path | None, seed: int) -> nn.Module:
    model = factory.build(seed=seed, dtype=torch.float32)
    if weights is not None:
        load_weights(model, weights)
    return model


def _probe_page(own: Sweeping, found: Sweep, data: Data, seconds: float) -> Page:
    best = found.best
    stopped = (
        (f"Probing ended after {len(found.energies) - 1} epochs, by the energy: longer ones were left out.",)
        if found.stopped
        else ()
    )
    forgotten = f", with {', '.join(own.reinitialised)} re-initialised below it" if own.reinitialised else ""
    rows = tuple(
        (
            str(row.tau), number(row.energy), number(row.change.distance), f"{row.change.cosine:.3f}",
            number(row.change.norm_after), f"{row.change.cka:.3f}", _share(row.probed_accuracy), _share(row.accuracy),
            number(row.loss),
        )
        for row in found.rows
    )  # fmt: skip
    return Page(
        title=f"How long to probe the head of {own.factory.name}",
        lead=f"A new head in the place of {own.head}{forgotten}, probed once; the whole network fine-tuned for "
        f"{own.epochs} epochs from {len(found.rows)} of its states. Data: {data.said}.",
        cards=(
            Card(str(best.tau), "epochs of probing before fine-tuning (tau)"),
            Card(_share(best.accuracy) or number(best.loss), "after fine-tuning, on the examples tau was chosen by"),
            Card(_share(best.probed_accuracy) or number(best.probed_loss), "with the probed head alone"),
            Card(number(best.energy), "energy at that point"),
        ),
        findings=(found.recommendation, *stopped),
        sections=(
            Section(
                "Energy, and what it does",
                (
                    "The energy is how wrong the network is on its training examples when fine-tuning begins, the mean "
                    "of ||label - prediction||. It drives the features: with none left they stay where they are, with "
                    "much of it they go wherever an untrained head sends them.",
                ),
                figures=(
                    Figure(plot_energy(found), "Energy while the head is probed, and how far features then go."),
                    Figure(plot_accuracy(found), "What came of it, on the examples held out."),
                ),
                tables=(
                    Table(
                        "Feature changes are means over the examples held out.",
                        (
                            "tau", "energy", "features move", "cosine", "norm after", "CKA", "probed", "fine-tuned",
                            "loss",
                        ),
                        rows,
                    ),
                ),
            ),
        ),
        footer=f"Computed in {seconds:.0f} seconds. best.safetensors holds the weights of the best network, "
        "tau-*.safetensors those of every one that was fine-tuned. "
        + ", ".join(f"{k} {v}" for k, v in provenance().items()),
    )  # fmt: skip


def plot_energy(found: Sweep) -> str:
    """The energy while the head is probed, and how far features go by fine-tuning from each tau, as `<svg>`."""
    with drawn(SIZE, "Energy while the head is probed, and distance that features move afterwards") as drawing:
        axes = drawing.axes
        epochs = np.arange(len(found.energies))
        axes.plot(epochs, found.energies, color=BLUE, label="energy")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlabel("epochs of probing")
        taus = [row.tau for row in found.rows]
        axes.plot(taus, [row.change.relative_distance for row in found.rows], "o-", color=ORANGE,
                  label="features move by (1 = their length)")  # fmt: skip
        axes.set_ylim(bottom=0)  # when all is there: it ends the search for the other limit
        axes.grid()
        axes.legend(loc="best")
    return drawing.svg


def plot_accuracy(found: Sweep) -> str:
    """Accuracy of the probed head and after fine-tuning, by tau, as `<svg>`; losses where there are no classes."""
    with drawn(SIZE, "Accuracy before and after fine-tuning by length of probing") as drawing:
        axes = drawing.axes
        taus = [row.tau for row in found.rows]
        if math.isnan(found.rows[0].accuracy):
            before, after = [row.probed_loss for row in found.rows], [row.loss for row in found.rows]
            axes.set_ylabel("loss")
        else:
            before, after = [row.probed_accuracy for row in found.rows], [row.accuracy for row in found.rows]
            axes.set_ylabel("accuracy")
        axes.plot(taus, before, "o-", color=BLUE, label="probed head alone")
        axes.plot(taus, after, "o-", color=ORANGE, label="after fine-tuning")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlabel("epochs of probing")
        axes.grid()
        axes.legend(loc="best")
    return drawing.svg


def _ranking_page(found: Ranking, data: Data, seconds: float) -> Page:
    best = found.best
    rows = tuple(
        (
            row.name + (" (has seen the labels)" if row.seen else ""), number(row.predicted),
            number(row.leave_one_out), number(row.extrapolated), count(row.parameters),
        )
        for row in found.rows
    )  # fmt: skip
    others = found.rows[1:]
    lead = f"Predicted from {count(found.examples)} labels, without training anything. Data: {data.said}."
    findings = [
        f"{best.name} is predicted to have the least squared error, {number(best.extrapolated)} with "
        f"{count(found.at)} examples; always saying how frequent the classes are gives {number(found.trivial)}."
    ]
    if others and others[0].extrapolated < 1.05 * best.extrapolated:
        findings.append(f"{others[0].name} is within 5% of it: the prediction does not tell the two apart.")
    if any(row.seen for row in found.rows):
        findings.append(
            f"{', '.join(row.name for row in found.rows if row.seen)}: trained on these very labels, so that what is "
            "predicted is too good. Do not compare it with the others; rank with labels that no network has seen."
        )
    findings.append(
        "The prediction is that of kernel regression around a random head. It finds backbones that do not suit the "
        "task; among good ones, real fine-tuning may order them otherwise."
    )
    return Page(
        title="Which backbone to take",
        lead=lead,
        cards=(
            Card(best.name, "first"),
            Card(number(best.extrapolated), f"predicted squared error with {count(found.at)} examples"),
            Card(number(found.trivial), "squared error of the class frequencies alone"),
        ),
        findings=tuple(findings),
        sections=(
            Section(
                "Predictions",
                (
                    "Generalised cross-validation of ridge regression with the tangent kernel of one random logit on "
                    "each network. Leave-one-out is computed exactly, beside it.",
                ),
                figures=(Figure(plot_ranking(found), "Predicted squared error; the line says nothing but how "
                                "frequent the classes are."),),
                tables=(
                    Table(
                        "Squared error of one-hot labels, summed over the classes.",
                        ("network", f"with {count(found.examples)}", "leave-one-out", f"with {count(found.at)}",
                         "parameters"),
                        rows,
                    ),
                ),
            ),
        ),
        footer=f"Computed in {seconds:.0f} seconds. " + ", ".join(f"{k} {v}" for k, v in provenance().items()),
    )  # fmt: skip


def plot_ranking(found: Ranking) -> str:
    """The predicted squared error of each network, leave-one-out beside it, and that of the frequencies, as `<svg>`."""
    with drawn((4.6, 1.2 + 0.4 * len(found.rows)), "Predicted squared error of each network") as drawing:
        axes = drawing.axes
        names = [row.name for row in reversed(found.rows)]
        axes.barh(names, [row.predicted for row in reversed(found.rows)], color=BLUE, height=0.5, label="GCV")
        axes.plot([row.leave_one_out for row in reversed(found.rows)], names, "D", color=ORANGE, label="leave-one-out")
        axes.axvline(found.trivial, color=GREEN, linewidth=1)
        axes.set_xlabel(f"squared error, {found.examples} labels")
        axes.legend(loc="best")
    return drawing.svg


def _share(value: float) -> str:
    return "" if math.isnan(value) else percent(value)
