"""A page on small data: the NTK machine whose depth, fixed layers and C were searched, beside an RBF machine."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.ticker import PercentFormatter
from sklearn.preprocessing import StandardScaler

from ntkit.errors import InputError
from ntkit.kernel.closed import RBF
from ntkit.report.files import as_json, check_folder, earlier_results, write_folder
from ntkit.report.labelled import Labelled, has_test, load_test, load_training
from ntkit.report.page import Card, Figure, Page, Section, Table, render
from ntkit.report.pictures import INK, SIZE, drawn
from ntkit.report.provenance import provenance
from ntkit.report.words import count, percent
from ntkit.solve.estimators import NTKClassifier
from ntkit.solve.svm import SVM, Grid, search, steps_for
from ntkit.solve.svm_search import NTKSVMSearch, held_out

if TYPE_CHECKING:
    from ntkit.uses.study import Listener

BLUE, ORANGE = "#2f80ed", "#e07b00"
# The RBF machine's own grid, of the size of the other: widths in units of the usual one, sqrt(d), and C.
LENGTHSCALES = tuple(2.0**power for power in range(-4, 5))
RBF_CS = tuple(2.0**power for power in range(-5, 16, 2))


@dataclass(frozen=True)
class Small:
    """A small data set, and how it is searched.

    Attributes:
        training: `.csv` or `.npz` file with classes.
        test: the same, with or without classes; None for what the first file brings along.
        label: column with the classes in a `.csv` file.
        depths: linear layers at most.
        folds: of cross-validation.
        most: training examples at most, drawn at random.
        seed: of folds, and of this draw.
    """

    training: Path
    test: Path | None = None
    label: str | None = None
    depths: int = 5
    folds: int = 5
    most: int = 5000
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """What `ntkit svm` found.

    Attributes:
        search: the fitted NTK machine.
        rbf: accuracies of the RBF machine, and the label and C of its best.
        examples: training examples. features: of each.
        standard_error: of the NTK machine's accuracy on held-out examples.
        predictions: of the test examples; None without any.
        test_accuracy, rbf_test_accuracy: where the test examples have classes.
        test_examples: their number.
    """

    search: NTKSVMSearch
    rbf: Grid
    examples: int
    features: int
    standard_error: float
    predictions: np.ndarray | None = None
    test_accuracy: float | None = None
    rbf_test_accuracy: float | None = None
    test_examples: int = 0


def run_svm(folder: Path, own: Small, *, force: bool = False, listener: Listener) -> Found:
    """Search, predict the test examples, and write index.html, results.json and predictions.csv.

    Args:
        folder: is made; it may exist only with `force`. Predictions of an earlier run are removed with its results.
        own: the data.
        force: see above.
        listener: is told what is being done.

    Raises:
        InputError: if anything the user named cannot be used; nothing has been computed then.
    """
    check_folder(folder, force=force)
    if own.most < 2:
        raise InputError(f"a search needs two training examples at least: got --most {own.most}")
    start = time.perf_counter()
    training = load_training(own.training, own.label)
    source = own.training if own.test is None and has_test(own.training) else own.test
    test = None if source is None else load_test(source, own.label, training, own.training)
    assert training.y is not None
    chosen = _chosen(len(training.x), own)
    scaler = StandardScaler().fit(training.x[chosen])
    x, y = np.asarray(scaler.transform(training.x[chosen])), training.y[chosen]
    classes, codes = np.unique(y, return_inverse=True)
    splits = held_out(own.folds, x, codes, own.seed)  # before any work, so that a bad number is said at once

    listener.step(f"{own.depths * (own.depths + 1) // 2} kernels of infinitely wide networks")
    machine = NTKSVMSearch(tuple(range(1, own.depths + 1)), cv=splits, progress=listener.part).fit(x, y)
    listener.step("RBF kernels")
    unit = x.shape[1] ** 0.5
    rows = torch.from_numpy(x)
    kernels = ((scale, RBF(scale * unit)(rows).dense().numpy()) for scale in LENGTHSCALES)
    rbf = search(
        kernels, codes, splits, RBF_CS, max_iter=steps_for(len(x)),
        progress=lambda done: listener.part(done, len(LENGTHSCALES)),
    )  # fmt: skip
    new = None if test is None else (np.asarray(scaler.transform(test.x)), test.y)
    found = _found(machine, rbf, x, y, splits, new)

    listener.step("writing the page")
    seconds = time.perf_counter() - start
    scale, rbf_c = rbf.best
    table = [
        {"depth": depth, "fixed": fixed, "by C": row}
        for (depth, fixed), row in zip(machine.grid_.labels, machine.grid_.accuracies, strict=True)
    ]
    results = {
        "training": own.training.name, "examples": found.examples, "features": found.features,
        "classes": [str(name) for name in classes], "folds": len(splits), "seed": own.seed,
        "best": machine.best_params_, "held_out_accuracy": machine.best_score_, "standard_error": found.standard_error,
        "Cs": machine.Cs, "accuracies": table, "fits": machine.grid_.fits, "fits_stopped": machine.grid_.stopped,
        "rbf": {
            "lengthscale": scale * unit, "C": rbf_c, "held_out_accuracy": rbf.best_accuracy, "fits": rbf.fits,
            "fits_stopped": rbf.stopped,
        },
        "test_examples": found.test_examples, "test_accuracy": found.test_accuracy,
        "rbf_test_accuracy": found.rbf_test_accuracy, "seconds": seconds, "made": provenance(),
    }  # fmt: skip
    contents: dict[str, str | Path] = {"results.json": as_json(results)}
    if test is not None and found.predictions is not None:
        contents["predictions.csv"] = _predictions(found.predictions, test)
    text = render(_page(own, found, len(training.x), len(classes), len(splits), seconds))
    write_folder(folder, {**contents, "index.html": text}, force=force, outdated=_written_earlier(folder))
    return found


def _written_earlier(folder: Path) -> tuple[str, ...]:
    """The predictions in a folder, if they are those of its results; a file of this name may be somebody else's."""
    earlier = earlier_results(folder)
    return ("predictions.csv",) if "rbf_test_accuracy" in earlier and earlier.get("test_examples") else ()


def _chosen(n: int, own: Small) -> np.ndarray:
    if n <= own.most:
        return np.arange(n)
    return np.sort(np.random.default_rng(own.seed).permutation(n)[: own.most])


def _found(
    machine: NTKSVMSearch, rbf: Grid, x: np.ndarray, y: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]],
    test: tuple[np.ndarray, np.ndarray | None] | None,
) -> Found:  # fmt: skip
    held = sum(len(part) for _, part in splits)
    accuracy = machine.best_score_
    error = (accuracy * (1 - accuracy) / held) ** 0.5
    found = Found(machine, rbf, x.shape[0], x.shape[1], error)
    if test is None:
        return found
    scale, c = rbf.best
    predictions = machine.predict(test[0])
    found = replace(found, predictions=predictions, test_examples=len(predictions))
    if test[1] is None:
        return found
    head = SVM(c, max_iter=steps_for(len(x)))
    other = NTKClassifier(RBF(scale * x.shape[1] ** 0.5), head=head).fit(x, y)
    right, others = (float((of == test[1]).mean()) for of in (predictions, other.predict(test[0])))
    return replace(found, test_accuracy=right, rbf_test_accuracy=others)


def _predictions(predictions: np.ndarray, test: Labelled) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["example", "prediction"] + (["label"] if test.y is not None else []))
    for number, prediction in enumerate(predictions):
        writer.writerow([number + 1, prediction] + ([test.y[number]] if test.y is not None else []))
    return text.getvalue()


# ---------------------------------------------------------------- the page


def verdict(found: Found) -> str:
    """The result in a sentence."""
    best = found.search.best_params_
    layers = "1 layer (a linear model)" if best["depth"] == 1 else f"{best['depth']} layers"
    fixed = f", the first {best['fixed']} of them fixed" if best["fixed"] else ""
    return (
        f"best: {layers}{fixed}, C = {best['C']:g}: {percent(found.search.best_score_)} of the held-out examples right "
        f"(± {percent(found.standard_error)}), RBF machine {percent(found.rbf.best_accuracy)}"
    )


def tested(found: Found) -> str | None:
    """How the test examples were predicted, where they have classes."""
    if found.test_accuracy is None or found.rbf_test_accuracy is None:
        return None
    return (
        f"{count(found.test_examples)} test examples: {percent(found.test_accuracy)} right, RBF machine "
        f"{percent(found.rbf_test_accuracy)}"
    )


def _page(own: Small, found: Found, n: int, classes: int, splits: int, seconds: float) -> Page:
    used = count(found.examples) if found.examples == n else f"{count(found.examples)} of {count(n)}"
    best, on_test = found.search.best_params_, tested(found)
    grid = found.search.grid_
    rows = tuple(
        (f"{depth} layers, {fixed} fixed" if depth > 1 else "linear", *(percent(value) for value in accuracies))
        for (depth, fixed), accuracies in zip(grid.labels, grid.accuracies, strict=True)
    )
    return Page(
        title=f"A support vector machine for {own.training.name}",
        lead=f"{used} examples with {found.features} features (standardised) in {classes} classes. Kernels of "
        f"infinitely wide fully connected ReLU networks, each tried with each C on {splits} folds.",
        cards=(
            Card(percent(found.search.best_score_), "of the held-out examples right, by the best of the NTK machines"),
            Card(percent(found.rbf.best_accuracy), "by the best of the RBF machines"),
            Card(f"{best['depth']} / {best['fixed']}", "layers / fixed layers of the best"),
            Card(f"{best['C']:g}", "C of the best, in units of 1 / mean diagonal of the kernel"),
        ),
        findings=(f"The {verdict(found)}.", *(() if on_test is None else (f"{on_test}.",))),
        sections=(
            Section(
                "What was searched",
                (
                    "A deeper network bends more; fixing its first layers makes the kernel smoother. Both accuracies "
                    "above are the best of many on the same held-out examples, and so a little too good: test examples "
                    "say how much.",
                    *_stopped(found),
                ),
                figures=(
                    Figure(plot_depths(found.search), "Held-out accuracy at the best C of each kernel."),
                    Figure(plot_cs(found.search), "Held-out accuracy by C: the best kernel, and the best of any."),
                ),
                tables=(Table("Held-out accuracy by kernel and C.", ("", *(f"{c:g}" for c in grid.Cs)), rows),),
            ),
        ),
        footer=f"Computed in {seconds:.0f} seconds. " + ", ".join(f"{k} {v}" for k, v in provenance().items()),
    )


def _stopped(found: Found) -> tuple[str, ...]:
    """A sentence on fits that were ended, if there were any."""
    grids = found.search.grid_, found.rbf
    stopped, fits = sum(grid.stopped for grid in grids), sum(grid.fits for grid in grids)
    if not stopped:
        return ()
    return (
        f"{count(stopped)} of {count(fits)} fits, with a large C on classes that overlap, were ended before they had "
        "converged, and are judged as they were then.",
    )


def plot_depths(found: NTKSVMSearch) -> str:
    """Held-out accuracy by depth and fixed layers, each at its best C, as `<svg>`."""
    table = np.full((max(found.depths), len(found.depths)), np.nan)
    for (depth, fixed), row in zip(found.grid_.labels, found.grid_.accuracies, strict=True):
        table[fixed, list(found.depths).index(depth)] = row.max()
    with drawn(SIZE, "Held-out accuracy by depth and number of fixed layers") as drawing:
        axes = drawing.axes
        low, high = float(np.nanmin(table)), float(np.nanmax(table))
        # squares, not an image: text of a page, without pixels
        axes.pcolormesh(table, cmap="viridis", vmin=low - 0.25 * (high - low) - 1e-3, vmax=high + 1e-3)
        for fixed, column in np.argwhere(np.isfinite(table)):
            value = float(table[fixed, column])
            light = value > low + 0.4 * (high - low)
            axes.text(column + 0.5, fixed + 0.5, f"{100 * value:.1f}", ha="center", va="center", fontsize=9,
                      color="black" if light else "white")  # fmt: skip
        best = found.best_params_
        axes.plot(
            list(found.depths).index(best["depth"]) + 0.5, best["fixed"] + 0.82, "v", color=ORANGE, ms=7, clip_on=False
        )
        axes.set_xticks(np.arange(len(found.depths)) + 0.5, [str(depth) for depth in found.depths])
        axes.set_yticks(np.arange(len(table)) + 0.5, [str(fixed) for fixed in range(len(table))])
        axes.set_xlabel("layers")
        axes.set_ylabel("fixed layers")
    return drawing.svg


def plot_cs(found: NTKSVMSearch) -> str:
    """Held-out accuracy by C, of the best kernel and of the best kernel at each C, as `<svg>`."""
    grid, best = found.grid_, found.best_params_
    row = grid.labels.index((best["depth"], best["fixed"]))
    with drawn(SIZE, "Held-out accuracy by C") as drawing:
        axes = drawing.axes
        axes.plot(grid.Cs, grid.accuracies.max(0), "--", color=INK, lw=1, label="best kernel at this C")
        axes.plot(
            grid.Cs, grid.accuracies[row], "o-", color=BLUE, label=f"{best['depth']} layers, {best['fixed']} fixed"
        )
        axes.plot(best["C"], found.best_score_, "v", color=ORANGE, ms=8)
        axes.set_xscale("log")
        axes.set_xlabel("C, in units of 1 / mean diagonal")
        axes.set_ylabel("held-out accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid()
        axes.legend(loc="best")
    return drawing.svg
