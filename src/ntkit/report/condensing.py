"""A page on condensation: few points learned in the place of a data set, beside those that are chosen plainly."""

from __future__ import annotations

import io
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.kernel.closed import RBF
from ntkit.kernel.infinite import InfiniteWidth
from ntkit.report.files import as_json, check_folder, earlier_results, replacing, write_folder
from ntkit.report.inputs import Cut, Data, Factory, count_outputs, cut_at_random, load_data, load_factory
from ntkit.report.labelled import load_training
from ntkit.report.page import Card, Figure, Page, Section, Table, render
from ntkit.report.pictures import INK, SIZE, drawn
from ntkit.report.provenance import provenance
from ntkit.report.words import count, number, percent
from ntkit.uses import condense
from ntkit.uses.condense.storage import check_own, remove_own

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ntkit.kernel.function import KernelFunction
    from ntkit.uses.study import Listener

BLUE, ORANGE = "#2f80ed", "#e07b00"
KERNELS = "fc:DEPTH, rbf, infinite:MODULE:FACTORY, finite:MODULE:FACTORY"
# Units of the network that is trained on the points where the user names none, and images of a class that are shown.
WIDTH, SHOWN = 1024, 10
# Channels at most, where the last axis of images is shorter than the two before it, and has to be theirs.
LAST = 4
# Where training diverges, learning rates down to this part of the first are tried, each a quarter of the one before.
SMALLEST = 1024
# Points of a class up to which classes are columns of a picture, not rows; channels of images that can be shown.
FEW, CHANNELS = 3, (1, 3)


@dataclass(frozen=True)
class Condensing:
    """A data set, and what is to stand for it.

    Attributes:
        data: `.npz` file, or the table of a `.csv` file, whose rows are vectors.
        per_class: points of each class.
        kernel: as it is written on the command line, see `parse_kernel`.
        settings: of the run.
        cut: how many examples are used.
        validation: share of the training examples that is held out, to watch the run and to stop it.
        zca: whether images are whitened; without it they are standardised by channel, and tables by column, which are
            not whitened.
        network: makes what is trained on the points; None for one hidden layer.
        training: of that network.
        label: column of the table with the classes, its name or number from 1; None for the last one.
    """

    data: Path
    per_class: int
    kernel: str = "fc:1"
    settings: condense.Inducing = field(default_factory=condense.Inducing)
    cut: Cut = field(default_factory=Cut)
    validation: float = 0.1
    zca: bool = False
    network: Factory | None = None
    training: condense.Training = field(default_factory=partial(condense.Training, steps=1000))
    label: str | None = None


@dataclass(frozen=True)
class Row:
    """One support set, judged on the test examples.

    Attributes:
        name: how it was made.
        kernel: what a regression from it does.
        network_accuracy: of a network that has seen nothing else.
        network_error: standard error of that, of a sample of test examples.
        network_rate: its learning rate: the one that was asked for, or a quarter or less where it diverged.
    """

    name: str
    kernel: condense.Score
    network_accuracy: float
    network_error: float
    network_rate: float


@dataclass(frozen=True)
class Report:
    """What the command says at its end.

    Attributes:
        rows: the learned points last.
        found: the run.
    """

    rows: tuple[Row, ...]
    found: condense.Condensed


def parse_kernel(text: str, *, seed: int = 0) -> Callable[[Tensor], KernelFunction]:
    """A kernel as it is written on the command line; called with examples, for their size, it gives the function.

    Args:
        text: "fc:2" (infinite width, two hidden ReLU layers), "rbf" (at the median distance), "infinite:net.py:make"
            (your module at infinite width) or "finite:net.py:make" (gradient features of your network as it is drawn).
        seed: of the network.

    Raises:
        InputError: if it is none of these, or the network cannot be had.
    """
    name, _, value = text.partition(":")
    if name == "fc" and (value or "1").isdecimal() and int(value or 1) > 0:
        return partial(_perceptron_kernel, depth=int(value or 1))
    if name == "rbf" and not value:
        return _rbf
    if name in {"infinite", "finite"} and value:
        model = load_factory(value).build(seed=seed, dtype=torch.float64)
        function = InfiniteWidth(model) if name == "infinite" else condense.GradientFeatures(model)
        return lambda _: function
    raise InputError(f"unknown kernel {text!r}: expected one of {KERNELS}")


def _perceptron_kernel(x: Tensor, depth: int) -> KernelFunction:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(x[0].numel(), 1)]
    for _ in range(depth):
        layers += [nn.ReLU(), nn.Linear(1, 1)]
    return InfiniteWidth(nn.Sequential(*layers), weight_std=math.sqrt(2), bias_std=0.1)


def _rbf(x: Tensor) -> KernelFunction:
    return RBF.median(x)


def run_condense(folder: Path, own: Condensing, *, force: bool = False, listener: Listener) -> Report:
    """Condense a data set, and write index.html, results.json, support.npz and, of images, images.svg.

    The state lies beside the folder, as FOLDER.part, until all of it is in the folder: the same command goes on there.

    Args:
        folder: is made; it may exist only with `force`.
        own: what is wanted.
        force: see above.
        listener: is told what is being done.

    Raises:
        InputError: if anything the user named cannot be used, or FOLDER.part holds files and no state of a run; nothing
            has been computed then.
        StoreError: if FOLDER.part is of another run, or cannot be written.
    """
    check_folder(folder, force=force)
    folder, work = _places(folder)
    start = time.perf_counter()
    if not 0 < own.validation < 1:
        raise InputError(f"the share of validation examples lies between 0 and 1: got --validation {own.validation}")
    kernel_of = parse_kernel(own.kernel, seed=own.cut.seed)
    data, names = _load(own)
    classes = int(torch.cat([data.y_train, data.y_test]).max()) + 1
    generator = torch.Generator().manual_seed(own.cut.seed)
    order = torch.randperm(len(data.x_train), generator=generator)
    held = max(1, round(own.validation * len(order)))
    aim = data.x_train[order[held:]]
    scale = condense.ZCA.fit(aim) if own.zca else condense.Standardised.fit(aim, columns=names is not None)
    x = scale(data.x_train).float()
    train, validation = ((x[part], data.y_train[part]) for part in (order[held:], order[:held]))
    test = (scale(data.x_test).float(), data.y_test)
    _check_classes(own, data.y_train, train[1], names)
    for change in own.settings.augment:
        change(train[0][:2], torch.Generator().manual_seed(0))  # refuses what are no images
    kernel = kernel_of(train[0])
    if own.network is not None:
        outputs = count_outputs(own.network.build(seed=own.cut.seed, dtype=torch.float32), x)
        if outputs != classes:
            raise InputError(f"the network has {outputs} outputs, and the data {classes} classes")
    drawn_points = condense.random_support(train, own.per_class, generator=generator)
    if drawn_points.classes != classes:
        raise InputError(f"the test examples have {classes} classes, the training examples {drawn_points.classes}")

    listener.step("moving the points")
    found = condense.kernel_inducing_points(
        kernel, drawn_points, train, generator=generator, settings=own.settings, held_out=validation, folder=work,
        progress=listener.part,
    )  # fmt: skip
    listener.step("choosing points plainly")
    plain = torch.Generator().manual_seed(own.cut.seed)
    sets = {
        "random examples": drawn_points,
        "k-means centres": condense.centre_support(train, own.per_class, generator=plain),
        "random examples, labels solved": condense.label_solve(
            kernel, drawn_points, train, ridge=own.settings.ridge, progress=listener.part
        ).support,
        "learned points": found.support,
    }
    rows = []
    for name, support in sets.items():
        listener.step(f"{name}: kernel and network on the test examples")
        score = condense.fit(kernel, support, ridge=own.settings.ridge).score(test)
        trained, rate = _trained(own, support, test, listener)
        rows.append(Row(name, score, trained.accuracy, trained.standard_error, rate))
    report = Report(tuple(rows), found)

    listener.step("writing the page")
    grid = None
    if drawn_points.x.ndim == 4 and drawn_points.x.shape[1] in CHANNELS:
        grid = plot_support(scale.inverse(drawn_points.x), scale.inverse(found.support.x), classes)
    seconds = time.perf_counter() - start
    results = {
        "data": data.said, "kernel": own.kernel, "per_class": own.per_class, "step": found.step,
        "stopped": found.stopped, "rows": rows, "records": found.records, "seconds": seconds, "made": provenance(),
    }  # fmt: skip
    contents: dict[str, Any] = {"support.npz": _written(work / "support.npz", found, scale, names)}
    contents |= {} if grid is None else {"images.svg": _standalone(grid)}
    contents |= {"results.json": as_json(results), "index.html": render(_page(own, report, data.said, grid, seconds))}
    write_folder(folder, contents, force=force, outdated=_written_earlier(folder))
    with suppress(OSError):  # all that was wanted is written
        remove_own(work, "support.npz")
    return report


def _written_earlier(folder: Path) -> tuple[str, ...]:
    """The images in a folder, if they are those of its results."""
    return ("images.svg",) if "per_class" in earlier_results(folder) else ()


def _places(folder: Path) -> tuple[Path, Path]:
    """The folder by its full name, for "." has none, and where the state lies."""
    whole = Path(os.path.abspath(folder))
    if not whole.name:
        raise InputError(f"the output folder {whole} has no place beside it: choose another with --out")
    work = whole.with_name(whole.name + ".part")
    check_own(work)
    return whole, work


def _load(own: Condensing) -> tuple[Data, np.ndarray | None]:
    """The data, and what its classes are called where the file is a table."""
    if own.data.suffix == ".csv":
        if own.zca:
            raise InputError(f"{own.data} is a table, whose columns are scaled one by one: --zca is for images")
        return _table(own)
    if own.label is not None:
        raise InputError(
            f"{own.data} is not a .csv file: its classes are the array y_train or y, leave --label-column out"
        )
    data = load_data(own.data, own.cut, torch.float32)
    if data.y_train.is_floating_point() or not data.x_train.is_floating_point():
        raise InputError("condensing takes floating point examples with class numbers (integers) as y")
    _check_axes(tuple(data.x_train.shape))
    return data, None


def _check_axes(shape: tuple[int, ...]) -> None:
    """Refuse images without channels, and those whose channels come last: others would be scaled in their place."""
    if len(shape) == 3:
        raise InputError(
            f"examples are vectors (N, D) or images (N, C, H, W): got {shape}. Of images with one channel save "
            "x[:, None], of signals (N, C, T) x[:, :, None]"
        )
    if len(shape) == 4 and shape[3] < min(shape[1:3]) and shape[3] <= LAST and shape[1] not in CHANNELS:
        raise InputError(f"images are (N, C, H, W): got {shape}, with the channels last. Save x.transpose(0, 3, 1, 2)")


def _check_classes(own: Condensing, whole: Tensor, left: Tensor, names: np.ndarray | None) -> None:
    lost = sorted({*whole.tolist()} - {*left.tolist()})
    if lost:
        raise InputError(
            f"none of class {lost[0] if names is None else names[lost[0]]} is left after --validation "
            f"{own.validation}: take a smaller share, or leave the class out"
        )


def _table(own: Condensing) -> tuple[Data, np.ndarray]:
    """Rows as vectors, cut at random; classes are numbered in their order, of whole numbers in that of numbers."""
    found = load_training(own.data, own.label)
    y = np.asarray(found.y)
    with suppress(ValueError, OverflowError):  # words
        y = y.astype(np.int64)
    names, numbers = np.unique(y, return_inverse=True)
    x = torch.from_numpy(found.x)  # in float32 columns with a large offset would all be alike: that is for scaled ones
    if not x.float().isfinite().all():
        raise InputError(f"{own.data} has numbers past float32, 3e38: scale them")
    data = cut_at_random(x, torch.from_numpy(numbers), own.cut, f"the rows of {own.data.name}")
    if min(len(data.x_train), len(data.x_test)) < 2:
        raise InputError(
            f"condensing needs two training and two test examples: got {len(data.x_train)} and {len(data.x_test)}"
        )
    return data, names.astype(str)


def _trained(
    own: Condensing, support: condense.Support, test: tuple[Tensor, Tensor], listener: Listener
) -> tuple[condense.Transferred, float]:
    """A network trained on the points. Learned points can be far from the data, where the rate has to be smaller."""
    rate = own.training.learning_rate
    while True:
        try:
            return condense.train_network(
                partial(_network, own, test[0], support.classes), support, test,
                generator=torch.Generator().manual_seed(own.cut.seed), progress=listener.part,
                training=replace(own.training, learning_rate=rate),
            ), rate  # fmt: skip
        except ModelError:
            if rate <= own.training.learning_rate / SMALLEST:
                raise
            rate /= 4


def _network(own: Condensing, x: Tensor, classes: int) -> nn.Module:
    if own.network is not None:
        return own.network.build(seed=int(torch.randint(2**31 - 1, ())), dtype=torch.float32)
    return nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))


def _written(
    path: Path, found: condense.Condensed, scale: condense.ZCA | condense.Standardised, names: np.ndarray | None
) -> Path:
    arrays = {
        "x": scale.inverse(found.support.x).numpy(), "x_scaled": found.support.x.numpy(),
        "y": found.support.y.numpy(), "labels": found.start.y.argmax(1).numpy(),
        "x_start": scale.inverse(found.start.x).numpy(),
    }  # fmt: skip
    if names is not None:
        arrays["classes"] = names
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    with replacing(path) as file:
        file.write(buffer.getvalue())
    return path


def _standalone(svg: str) -> str:
    """A picture of a page as a file of its own."""
    return svg.replace("currentColor", "#444").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


# ---------------------------------------------------------------- pictures


def plot_support(start: Tensor, learned: Tensor, classes: int) -> str:
    """Points before and after by class, as `<svg>`: the first ten of each.

    Every image is stretched to its own darkest and lightest hundredth, because learned pixels know no bounds.

    Args:
        start: (n, 1, H, W) or (n, 3, H, W), sorted by class.
        learned: as many.
        classes: C, n is a multiple of it.

    Raises:
        InputError: if they are no such images.
    """
    if start.shape != learned.shape or start.ndim != 4 or start.shape[1] not in CHANNELS or len(start) % classes:
        raise InputError(
            f"two sets of images are (n, 1 or 3, H, W), n a multiple of {classes}: got {tuple(start.shape)} and "
            f"{tuple(learned.shape)}"
        )
    across = len(start) // classes <= FEW  # classes beside each other, the learned images below the others
    before, after = (_mosaic(images, classes, across=across) for images in (start, learned))
    each = (before.shape[across] / classes) * (np.arange(classes) + 0.5) - 0.5
    gap = np.zeros_like(before[: before.shape[0] // 8 + 2] if across else before[:, : before.shape[1] // 12 + 6])
    whole = np.concatenate([before, gap, after], axis=0 if across else 1)
    middles = [before.shape[1 - across] / 2 - 0.5, whole.shape[1 - across] - after.shape[1 - across] / 2 - 0.5]
    height, width = whole.shape[:2]
    size = min(7.2, 0.9 * classes * width / height) if across else 7.2
    with drawn((size, 0.35 + size * height / width), "Points before and after, by class") as drawing:
        axes = drawing.axes
        axes.imshow(whole, interpolation="nearest")
        sides, names = (middles, ["at the start", "learned"]), (each, [str(c) for c in range(classes)])
        axes.set_xticks(*(names if across else sides))
        axes.set_yticks(*(sides if across else names), rotation=90 if across else 0, va="center")
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return drawing.svg


def _mosaic(images: Tensor, classes: int, *, across: bool) -> np.ndarray:
    pixels = images.detach().double().cpu().numpy().reshape(classes, -1, *images.shape[1:])[:, :SHOWN]
    low, high = (np.quantile(pixels, q, axis=(2, 3, 4), keepdims=True) for q in (0.01, 0.99))
    pixels = np.clip((pixels - low) / np.maximum(high - low, 1e-12), 0, 1)
    if across:
        pixels = pixels.swapaxes(0, 1)
    rows, columns, channels, height, width = pixels.shape
    framed = np.zeros((rows, columns, 4, height + 1, width + 1))  # a line of nothing between images
    framed[:, :, :3, :height, :width] = pixels if channels == 3 else pixels.repeat(3, 2)
    framed[:, :, 3, :height, :width] = 1
    return framed.transpose(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), 4)


def plot_condensing(records: Sequence[condense.Recorded]) -> str:
    """Accuracy and loss on the examples held out, over the steps, as `<svg>`."""
    with drawn(SIZE, "Accuracy and loss on examples held out, over the steps") as drawing:
        axes = drawing.axes
        steps = [record.step for record in records]
        axes.plot(steps, [record.accuracy for record in records], "o-", markersize=3, color=BLUE)
        axes.set(xlabel="steps", ylabel="accuracy")
        axes.yaxis.label.set_color(BLUE)
        axes.set_xscale("symlog", linthresh=1)
        axes.grid()
        other = axes.twinx()
        other.plot(steps, [record.loss for record in records], "o--", markersize=3, color=ORANGE)
        other.set_ylabel("loss", color=ORANGE)
        other.spines["right"].set(visible=True, color=INK)
    return drawing.svg


def _page(own: Condensing, report: Report, said: str, grid: str | None, seconds: float) -> Page:
    found, best = report.found, report.rows[-1]
    first, size = report.rows[0], len(found.support)
    curve = Figure(plot_condensing(found.records), "On the validation examples, which were not targets.")
    figures = (curve,) if grid is None else (
        Figure(grid, "By class. Every image is stretched to its own range of brightness."), curve
    )  # fmt: skip
    table = Table(
        "Test accuracy, with the standard error of a sample of so many test examples.",
        ("points", "kernel", "kernel, loss", "network trained on them", "at a rate of", "condition"),
        tuple(
            (
                row.name, _with_error(row.kernel.accuracy, row.kernel.standard_error), number(row.kernel.loss),
                _with_error(row.network_accuracy, row.network_error), f"{row.network_rate:.2g}",
                number(row.kernel.condition),
            )
            for row in report.rows
        ),
    )  # fmt: skip
    gain = best.network_accuracy - max(row.network_accuracy for row in report.rows[:-1])
    findings = (
        f"{count(size)} learned points give the kernel {percent(best.kernel.accuracy)}; as many random examples "
        f"{percent(first.kernel.accuracy)}.",
        f"A network that has seen nothing but the learned points is right on {percent(best.network_accuracy)}: "
        + (
            f"{100 * gain:.1f} points more than with the best of the others."
            if gain > 0
            else "no more than with plainly chosen points. What is learned for one kernel need not suit a network."
        ),
    )
    return Page(
        title=f"{count(size)} points for a data set",
        lead=f"{own.per_class} points of each class, {'with learned labels, ' if own.settings.learn_labels else ''}"
        f"moved for {found.step} steps so that a regression with the kernel {own.kernel} from them predicts the "
        f"data. Data: {said}.",
        cards=(
            Card(percent(best.kernel.accuracy), "test accuracy of the kernel with the learned points"),
            Card(percent(best.network_accuracy), "of a network trained on them"),
            Card(percent(first.kernel.accuracy), "of the kernel with as many random examples"),
        ),
        findings=findings,
        sections=(
            Section(
                "The points",
                (
                    "Kernel inducing points: Adam on the square error of kernel ridge regression from the points, on "
                    "batches with as many training examples of every class, or all where there are no more.",
                ),
                figures=figures,
                tables=(table,),
            ),
        ),
        footer=f"Computed in {seconds:.0f} seconds. support.npz holds x and y (less 1/C), x_start, and x_scaled as "
        "the kernel saw it. " + ", ".join(f"{k} {v}" for k, v in provenance().items()),
    )


def _with_error(value: float, error: float) -> str:
    return f"{percent(value)} ± {100 * error:.1f}"
