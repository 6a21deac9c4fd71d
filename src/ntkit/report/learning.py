"""The page on a training run: which examples were learned when, which labels are suspicious, how the kernel moved."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.report import trajectories
from ntkit.report.files import as_json, check_folder, write_folder
from ntkit.report.inputs import Cut, Factory, load_data, load_weights, make_task, require_rate
from ntkit.report.page import Card, Figure, Page, Section, Strip, Table, Tile, render
from ntkit.report.pictures import thumbnail
from ntkit.report.provenance import provenance
from ntkit.report.words import count, number, percent
from ntkit.uses.dynamics import Look, Run, watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from ntkit.uses.dynamics import Paths, Watched
    from ntkit.uses.study import Listener, Task

# So many of the hardest examples are shown.
SHOWN = 12
# Names of what a run has in FOLDER.part; nothing else there is ever deleted.
KEPT = (
    "checkpoint.pt", "checkpoint.part", "probes.json", "probes.json.part", "records.bin", "paths.npz", "paths.npz.part",
    "replaced-*.bin", "replaced-*.npz", "replaced-*.part",
)  # fmt: skip


@dataclass(frozen=True)
class Learning:
    """What a user wants to see learning.

    Attributes:
        factory: makes the network.
        data: `.npz` file.
        weights: to begin with; None for the network as it is built.
        cut: how many examples are used.
        steps: batches.
        batch_size: examples of one.
        learning_rate: of SGD with momentum 0.9, or of Adam.
        adam: whether to take Adam.
        probes: training examples whose paths are recorded.
        dtype: of the network.
    """

    factory: Factory
    data: Path
    weights: Path | None = None
    cut: Cut = field(default_factory=Cut)
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 0.05
    adam: bool = False
    probes: int = 1000
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Check the rate, before anything is read.

        Raises:
            InputError: if it is not positive.
        """
        require_rate("learning rate", self.learning_rate)


@dataclass(frozen=True, eq=False)
class LearningResult:
    """What was seen.

    Attributes:
        factory: as the user wrote it.
        data: how the file was used.
        parameters: of the network.
        steps: at which accuracies and kernels were taken.
        train: accuracies.
        test: accuracies.
        kernel: facts about the kernel.
        area: mean probability of each probe's label through training.
        learned_at: step from which on the label was the likeliest class; -1 for never.
        forgotten: how often a probe was right and then wrong.
        detour: length of the path over the distance it covers.
        labels: of the probes.
        said: the likeliest class by the mean over training.
        seconds: all of it.
        made: versions and the machine.
    """

    factory: str
    data: str
    parameters: int
    steps: Tensor
    train: Tensor
    test: Tensor
    kernel: Any
    area: Tensor
    learned_at: Tensor
    forgotten: Tensor
    detour: Tensor
    labels: Tensor
    said: Tensor
    seconds: float
    made: dict[str, str] = field(default_factory=provenance)


def run_paths(folder: Path, own: Learning, *, force: bool = False, listener: Listener) -> LearningResult:
    """Train a user's network, watch it, and write index.html and results.json.

    What is recorded lies beside the folder, as FOLDER.part, until the page is written: the same command goes on where a
    killed one has stopped. The folder then has paths.npz too, and a replaced-*.npz for each recording that a resumed or
    repeated run has set aside and not made again.

    Args:
        folder: is made; it may exist only with `force`.
        own: the network, its data and its training.
        force: see above.
        listener: is told what is being done.

    Raises:
        InputError: if anything the user named cannot be used, or FOLDER.part holds something else; nothing has been
            computed then.
        ModelError: if training diverges, or the network has no tangent kernel.
        StoreError: if FOLDER.part is of another run.
    """
    check_folder(folder, force=force)
    work = folder.with_name(folder.name + ".part")
    _check_work(work)
    start = time.perf_counter()
    model = own.factory.build(seed=own.cut.seed, dtype=own.dtype)
    if own.weights is not None:
        load_weights(model, own.weights)
    data = load_data(own.data, own.cut, own.dtype)
    task = make_task(model, data)
    if data.y_train.is_floating_point():
        raise InputError(f"{own.data} has floating point targets: paths on the simplex are of classes (integers)")
    kind: Callable[..., torch.optim.Optimizer] = (
        partial(torch.optim.Adam, lr=own.learning_rate)
        if own.adam
        else partial(torch.optim.SGD, lr=own.learning_rate, momentum=0.9)
    )
    listener.step("training and watching")
    seen = watch(
        model, (data.x_train, data.y_train), (data.x_test, data.y_test),
        generator=torch.Generator().manual_seed(own.cut.seed), run=Run(own.steps, own.batch_size, kind),
        look=Look(probes=min(own.probes, len(data.x_train))), folder=work, progress=listener.part,
    )  # fmt: skip
    listener.step("writing the page")
    paths = seen.paths
    result = LearningResult(
        factory=own.factory.spec, data=data.said, parameters=sum(p.numel() for p in model.parameters()),
        steps=seen.steps, train=seen.train, test=seen.test, kernel=seen.kernel, area=paths.area(),
        learned_at=paths.learned_at(), forgotten=paths.forgotten(), detour=paths.detour(),
        labels=paths.labels if paths.labels is not None else torch.empty(0), said=paths.average().argmax(1),
        seconds=time.perf_counter() - start,
    )  # fmt: skip
    text = render(_page(own, result, seen, task))
    recorded = _recorded(work, folder, seen)
    write_folder(folder, {**recorded, "results.json": as_json(result), "index.html": text}, force=force)
    _remove(work)  # all that it held is in the folder now
    return result


def _check_work(work: Path) -> None:
    """Refuse a folder that is not that of an earlier run, before anything is written to it or deleted from it.

    Raises:
        InputError: naming what is in it.
    """
    if not work.exists() or (work / "probes.json").exists():
        return
    other = sorted(path.name for path in work.iterdir() if not _is_ours(path)) if work.is_dir() else []
    if other or not work.is_dir():
        raise InputError(
            f"what is recorded is kept in {work} until the page is written, and that "
            f"{f'holds {other[0]}' if other else 'is a file'}: move it away, or choose another folder with --out"
        )


def _remove(work: Path) -> None:
    """Delete what the run has kept; the folder too, unless there is something else in it."""
    with suppress(OSError):  # the page is written: what cannot be deleted is left
        for path in list(work.iterdir()):
            if _is_ours(path):
                path.unlink()
        work.rmdir()


def _is_ours(path: Path) -> bool:
    return path.is_file() and any(path.match(name) for name in KEPT)


def _recorded(work: Path, folder: Path, seen: Watched) -> dict[str, Path]:
    """Files with the paths, and with what was set aside on the way, under names that the folder does not have yet."""
    found, number = {"paths.npz": work / "paths.npz"}, 0
    seen.paths.save(found["paths.npz"])
    for one in seen.replaced:
        number += 1
        while (folder / f"replaced-{number}.npz").exists():
            number += 1
        name = f"replaced-{number}.npz"
        one.save(work / name)
        found[name] = work / name
    return found


def _page(own: Learning, result: LearningResult, seen: Watched, task: Task) -> Page:
    paths, order = seen.paths, result.area.argsort()
    doubted = result.said != result.labels
    never = int((result.learned_at < 0).sum())
    turned, aligned = float(seen.kernel.cosine[-1]), [float(seen.kernel.alignment[place]) for place in (0, -1)]
    agreement = (
        f", and its agreement with the labels went from {number(aligned[0])} to {number(aligned[1])}"
        if all(map(math.isfinite, aligned))
        else ""  # there is none with labels that are all the same
    )
    findings = [
        f"Of {count(len(order))} training examples that were watched, {count(len(order) - never)} ended with their "
        f"label as the likeliest class; half of these had it for good from step "
        f"{count(int(result.learned_at[result.learned_at >= 0].median())) if never < len(order) else '-'} on.",
        f"{count(int(doubted.sum()))} labels are doubtful: on the average over training the network held another class "
        "to be likelier. They are the first to look at for wrong labels.",
        f"The kernel turned by {number(turned)} (cosine distance; 0 is a lazy network that its first kernel describes "
        f"to the end){agreement}."
        if math.isfinite(turned)
        else "The kernel is zero at the start or at the end: no parameter moves any prediction there, the network is "
        "dead. Smaller learning rates, biases or another initialisation help.",
    ]
    return Page(
        title=f"How {own.factory.name} learns",
        lead=f"The network of {result.factory} has {count(result.parameters)} parameters and was trained for "
        f"{count(own.steps)} steps. Data: {result.data}.",
        cards=(
            Card(percent(float(seen.test[-1])), "test accuracy at the end"),
            Card(percent(float(seen.train[-1])), "training accuracy"),
            Card(count(int(doubted.sum())), "doubtful labels among those watched"),
            Card(number(turned), "the kernel turned (cosine distance)"),
        ),
        findings=tuple(findings),
        sections=(
            Section(
                "When what is learned",
                (
                    "Easy examples are pulled to their labels by many others like them, hard ones must do it alone. "
                    "Thirds of the examples by the mean probability of the label through training; the bands hold "
                    "half of each.",
                ),
                figures=(
                    Figure(trajectories.easy_to_hard(paths), "The probability of the label, from easy to hard."),
                    Figure(trajectories.accuracies(seen), "Accuracy. Where the test examples stop, memorising begins."),
                ),
            ),
            _triangles(paths, order),
            Section(
                "The kernel in motion",
                (
                    "The kernel says how a step on one example moves the prediction for another. While it turns, the "
                    "network chooses its features; once it stands, training is kernel regression.",
                ),
                figures=(Figure(trajectories.kernel_motion(seen.kernel), "Turning, and agreement with the labels."),),
            ),
            _doubts(result, paths, order, seen, task),
        ),
        footer=f"Computed in {result.seconds:.0f} seconds by "
        f"{', '.join(f'{k} {v}' for k, v in result.made.items())}. paths.npz holds all recorded logits.",
    )


def _triangles(paths: Paths, order: Tensor) -> Section:
    if paths.logits.shape[2] < 3:
        return Section("Paths", ("Triangles are drawn for three classes or more; this network has two.",))
    astray = int(paths.astray().argmax())
    chosen = {"An easy example": int(order[-1]), "A hard one": int(order[0]), "The one that went astray most": astray}
    figures = []
    for title, probe in chosen.items():
        figures.append(Figure(trajectories.simplex(paths, probe), f"{title}: number {probe} of the probes."))
    return Section(
        "Learning paths",
        (
            "Each point is what the network said after a step: at a corner it is sure of that class. The diamond is "
            "the start, the cross the label, the line the smoothed path. A path that bends was first drawn to another "
            "class by examples like it.",
        ),
        figures=tuple(figures),
    )


def _doubts(result: LearningResult, paths: Paths, order: Tensor, seen: Watched, task: Task) -> Section:
    rows = tuple(
        (
            str(int(i)), str(int(result.labels[i])), str(int(result.said[i])), f"{float(result.area[i]):.2f}",
            "never" if result.learned_at[i] < 0 else count(int(result.learned_at[i])), str(int(result.forgotten[i])),
        )
        for i in order[:SHOWN].tolist()
    )  # fmt: skip
    tiles = []
    for i in order[:SHOWN].tolist():
        image = thumbnail(seen.probes[i]) if isinstance(seen.probes, Tensor) else None
        if image is not None:
            tiles.append(Tile(image, f"{i}: {int(result.labels[i])}, said {int(result.said[i])}"))
    gallery = (Strip(tiles[0], False, tuple(tiles[1:])),) if tiles else ()
    return Section(
        "The most doubtful labels",
        ("Lowest mean probability of the label through training first.",),
        tables=(
            Table(
                "Numbers are those of the probes in paths.npz.",
                ("probe", "label", "said through training", "mean probability", "learned at step", "forgotten"),
                rows,
            ),
        ),
        gallery=gallery,
    )
