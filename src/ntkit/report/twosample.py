"""A page on whether two samples come from one distribution, and which examples make the difference."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.function import Empirical
from ntkit.report.files import as_json, check_folder, write_folder
from ntkit.report.inputs import Factory, load_factory, load_weights
from ntkit.report.page import Card, Figure, Page, Section, Strip, Table, Tile, render
from ntkit.report.pictures import INK, SIZE, drawn, thumbnail
from ntkit.report.provenance import provenance
from ntkit.report.samples import load_sample
from ntkit.report.words import count, number
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import SumOfLogits
from ntkit.uses.twosample import (
    Block,
    Linear,
    OnlineTraining,
    PowerCurve,
    TestResult,
    Unbiased,
    ZeroTime,
    random_network,
    rbf_test,
    two_sample_test,
    witness_test,
)
from ntkit.uses.twosample.samples import check_level
from ntkit.uses.twosample.statistics import Statistic

if TYPE_CHECKING:
    from torch import nn

    from ntkit.uses.study import Listener

BLUE, ORANGE, GREEN = "#2f80ed", "#e07b00", "#0f9d8a"
COLOURS = ("#8b5cf6", "#2f80ed", "#0f9d8a", "#8a9a2b", "#d6457f", "#e07b00", "#7d8590")
STATISTICS = "unbiased, block:SIZE, linear, witness, training or training:RATE"
# Of a picture: grey, colours, colours and transparency.
CHANNELS = {1, 3, 4}
# Most examples of each side that are shown.
SHOWN = 8


@dataclass(frozen=True)
class Comparing:
    """Two samples and how to compare them.

    Attributes:
        first: file of the first sample.
        second: file of the second.
        array: name of the array in both, where they are `.npz` files.
        kernel: "rbf" for the Gaussian kernel with the median bandwidth; "conv" or "mlp" for the tangent kernel of a
            random network; a `Factory` for that of a network of one's own; None for "conv" on images and "mlp" else.
        weights: of the factory's network.
        infinite: take the infinite-width kernel of the network instead.
        statistic: as `parse_statistic` reads it.
        permutations: of the labels.
        level: of the test.
        most: examples of each sample at most, drawn at random.
        seed: of every random choice.
    """

    first: Path
    second: Path
    array: str | None = None
    kernel: str | Factory | None = None
    weights: Path | None = None
    infinite: bool = False
    statistic: str = "unbiased"
    permutations: int = 1000
    level: float = 0.05
    most: int = 2000
    seed: int = 0


def parse_kernel(text: str | None) -> str | Factory | None:
    """A kernel as it is written on the command line.

    Raises:
        InputError: if it is none.
    """
    if text is None or text in {"rbf", "conv", "mlp"}:
        return text
    if ":" not in text:
        raise InputError(f"unknown kernel {text!r}: expected rbf, conv, mlp or MODULE:FACTORY")
    return load_factory(text)


@dataclass(frozen=True)
class Trained:
    """NTK-MMD on the command line.

    Attributes:
        rate: of the pass of training; None for time zero.
    """

    rate: float | None = None


def parse_statistic(text: str) -> Statistic | Trained:
    """A statistic as it is written on the command line.

    Raises:
        InputError: if it is none.
    """
    name, _, value = text.partition(":")
    if name == "block" and value.isdecimal():
        return Block(int(value))
    if name == "training" and value:
        try:
            return Trained(float(value))
        except ValueError:
            pass
    plain: dict[str, Statistic | Trained] = {
        "unbiased": Unbiased(), "linear": Linear(), "witness": Trained(), "training": Trained(1e-3)
    }  # fmt: skip
    if text not in plain:
        raise InputError(f"unknown statistic {text!r}: expected {STATISTICS}")
    return plain[text]


def run_twosample(folder: Path, own: Comparing, *, force: bool = False, listener: Listener) -> TestResult:
    """Test two samples, and write index.html and results.json.

    Args:
        folder: is made; it may exist only with `force`.
        own: the samples and the test.
        force: see above.
        listener: is told what is being done.

    Raises:
        InputError: if anything the user named cannot be used; nothing has been computed then.
        ModelError: if the network cannot be linearized as it stands.
    """
    check_folder(folder, force=force)
    check_level(own.level)
    statistic = parse_statistic(own.statistic)
    if own.most < 4:
        raise InputError(f"a test needs four examples of each sample: got --most {own.most}")
    start, generator = time.perf_counter(), torch.Generator().manual_seed(own.seed)
    samples = [load_sample(path, own.array, torch.float64) for path in (own.first, own.second)]
    if samples[0].shape[1:] != samples[1].shape[1:]:
        shapes = " and ".join(str(tuple(sample.shape[1:])) for sample in samples)
        raise InputError(f"{own.first} and {own.second} hold examples of different shapes: {shapes}")
    kept = [torch.randperm(len(sample), generator=generator)[: own.most].sort().values for sample in samples]
    x, y = (sample[some] for sample, some in zip(samples, kept, strict=True))
    listener.step("testing")
    found, said = _test(own, statistic, x, y, generator)
    listener.step("writing the page")
    seconds = time.perf_counter() - start
    shown = _witnessed(found, kept)
    results = {
        "first": own.first.name, "second": own.second.name, "kernel": said, "statistic_name": found.name,
        "statistic": found.statistic, "pvalue": found.pvalue, "level": own.level, "rejected": found.rejected(own.level),
        "threshold": found.threshold(own.level), "permutations": len(found.null), "sizes": found.sizes,
        "power": found.power(own.level), "null": found.null, "seed": own.seed,
        "witness": [{"example": numbers, "value": values} for numbers, values in shown],
        "seconds": seconds, "made": provenance(),
    }  # fmt: skip
    text = render(_page(own, found, said, (x, y), kept, shown, seconds))
    write_folder(folder, {"results.json": as_json(results), "index.html": text}, force=force)
    return found


def _test(
    own: Comparing, statistic: Statistic | Trained, x: Tensor, y: Tensor, generator: torch.Generator
) -> tuple[TestResult, str]:
    """The result, and the kernel in words.

    Raises:
        InputError: if what was asked for does not go together.
    """
    options: dict[str, Any] = {"permutations": own.permutations, "generator": generator}
    trained = isinstance(statistic, Trained)
    if own.kernel == "rbf" and (trained or own.infinite or own.weights is not None):
        raise InputError(
            "the RBF kernel has no network: leave out --infinite, --weights and the statistics witness and training"
        )
    if own.infinite and (trained or own.weights is not None):
        raise InputError(
            "a network of infinite width is not trained: leave out --weights and the statistics witness and training"
        )
    if own.kernel == "rbf" and not trained:
        return rbf_test(x, y, statistic=statistic, **options), "RBF kernel with the median bandwidth"
    model, x, y, said = _network(own, x, y, generator)
    if not own.infinite:
        x, y = x.float(), y.float()
        if not bool(x.isfinite().all() and y.isfinite().all()):
            raise InputError("the samples have entries that float32, the network's type, cannot hold: rescale them")
    if trained:
        witness = ZeroTime(model) if statistic.rate is None else OnlineTraining(model, statistic.rate)
        return witness_test(x, y, witness=witness, **options), f"tangent kernel of {said}"
    if own.infinite:
        from ntkit.kernel.infinite import InfiniteWidth

        kernel, said = InfiniteWidth(model.double()), f"infinitely wide: {said}"
    else:
        kernel = Empirical(linearize(model, readout=SumOfLogits()))
    return two_sample_test(x, y, kernel=kernel, statistic=statistic, **options), f"tangent kernel of {said}"


def _network(own: Comparing, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[nn.Module, Tensor, Tensor, str]:
    """The network, examples in the form that it takes but still in float64, and its name.

    Raises:
        InputError: if the network cannot be made.
    """
    if isinstance(own.kernel, Factory):
        model = own.kernel.build(seed=own.seed, dtype=torch.float32)
        if own.weights is not None:
            load_weights(model, own.weights)
        return model, x, y, own.kernel.name
    if own.weights is not None:
        raise InputError("weights are those of a network of your own: name it with --kernel MODULE:FACTORY")
    image = x.ndim == 4 or (x.ndim == 3 and min(x.shape[1:]) >= 4)
    convolutional = own.kernel == "conv" or (own.kernel is None and image)
    if convolutional and x.ndim == 4 and x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS:
        raise InputError(
            f"images of shape {tuple(x.shape[1:])} look as if their channels came last: a convolutional network takes "
            "(N, channels, height, width), which is x.transpose(0, 3, 1, 2) in numpy"
        )
    if convolutional and x.ndim == 3:
        x, y = x[:, None], y[:, None]
    # the scale of the pooled sample says nothing about which example belongs where
    together = torch.cat([x, y])
    axes = (0, *range(2, x.ndim)) if convolutional else (0,)
    centre, scale = together.mean(axes, keepdim=True), together.std(axes, keepdim=True)
    x, y = ((part - centre) / torch.where(scale > 0, scale, 1.0) for part in (x, y))
    model = random_network(x.shape[1:], convolutional=convolutional, generator=generator)
    return model, x, y, "a random convolutional network" if convolutional else "a random network with two hidden layers"


def _witnessed(found: TestResult, kept: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each sample the numbers of its examples in the file, and their witness values."""
    if found.witness is None:
        return []
    n = len(kept[0])
    numbers = torch.arange(len(found.witness)) if found.numbers is None else found.numbers
    places = torch.cat([kept[0], kept[1]])[numbers]
    ours = numbers < n
    return [(places[chosen], found.witness[chosen]) for chosen in (ours, ~ours)]


def _page(
    own: Comparing,
    found: TestResult,
    said: str,
    samples: tuple[Tensor, Tensor],
    kept: Sequence[Tensor],
    shown: list[tuple[Tensor, Tensor]],
    seconds: float,
) -> Page:
    names, power = (own.first.name, own.second.name), found.power(own.level)
    if names[0] == names[1]:
        names = str(own.first), str(own.second)
    differ = found.rejected(own.level)
    verdict = (
        f"The two samples differ: p = {found.pvalue:.3g}, at most the level {own.level:g}."
        if differ
        else f"No difference was found at level {own.level:g}: p = {found.pvalue:.3g}. That is no proof that there is "
        "none."
    )
    figures = [Figure(plot_null(found, own.level), "What the statistic is if the labels mean nothing, and what it is.")]
    tables: list[Table] = []
    gallery: list[Strip] = []
    if shown:
        figures.append(
            Figure(
                plot_witness(shown[0][1], shown[1][1], names),
                "How much every example looks like one of the first sample rather than of the second.",
            )
        )
        sides = [_typical(shown[side], largest=side == 0) for side in (0, 1)]
        tables = [
            Table(
                f"Most typical of {names[side]} and not of {names[1 - side]}.", ("example in the file", "witness"),
                tuple((count(int(i)), number(float(w))) for i, w in sides[side]),
            )
            for side in (0, 1)
        ]  # fmt: skip
        gallery = [
            strip
            for side in (0, 1)
            if (strip := _strip(sides[side], samples[side], kept[side], names[side])) is not None
        ]
    return Page(
        title="Two samples, one distribution?",
        lead=f"{count(found.sizes[0])} examples of {names[0]} and {count(found.sizes[1])} of {names[1]}: {found.name} "
        f"with the {said}, {count(len(found.null))} permutations.",
        cards=(
            Card(f"{found.pvalue:.3g}", "p-value"),
            Card(number(found.statistic), "statistic"),
            Card(number(found.threshold(own.level)), f"threshold at level {own.level:g}"),
            Card(f"{power.value:.2f}", f"power at the difference seen ({power.low:.2f} to {power.high:.2f})"),
        ),
        findings=(verdict,),
        sections=(
            Section(
                "The difference",
                (
                    "The p-value is the share of random relabelings, the given labels counted in, whose statistic is "
                    "at least as large. It holds for any sample size if the examples are independent of each other.",
                ),
                figures=tuple(figures), tables=tuple(tables), gallery=tuple(gallery),
            ),
        ),
        footer=f"Computed in {seconds:.0f} seconds. " + ", ".join(f"{k} {v}" for k, v in provenance().items()),
    )  # fmt: skip


def _typical(side: tuple[Tensor, Tensor], *, largest: bool) -> list[tuple[Tensor, Tensor]]:
    numbers, values = side
    best = values.topk(min(SHOWN, len(values)), largest=largest).indices
    return [(numbers[i], values[i]) for i in best]


def _strip(typical: list[tuple[Tensor, Tensor]], sample: Tensor, kept: Tensor, name: str) -> Strip | None:
    """The images themselves, where they are some."""
    place = {int(i): k for k, i in enumerate(kept)}
    tiles = []
    for i, value in typical:
        image = thumbnail(sample[place[int(i)]])
        if image is None:
            return None
        tiles.append(Tile(image, f"{int(i)}: {number(float(value))}"))
    first = Tile(tiles[0].image, f"most typical of {name}: {int(typical[0][0])}")
    return Strip(first, True, tuple(tiles[1:]))


def plot_null(found: TestResult, level: float = 0.05) -> str:
    """The statistics of the relabelings, the threshold, and the statistic, as `<svg>`."""
    with drawn(SIZE, "Histogram of the statistic under random labels, and its value") as drawing:
        axes = drawing.axes
        axes.hist(found.null.numpy(), bins=40, color="#7d8590", alpha=0.6, label="random labels")
        threshold = found.threshold(level)
        if math.isfinite(threshold):
            axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"threshold, level {level:g}")
        axes.axvline(found.statistic, color=ORANGE, label="statistic")
        axes.set_xlabel(found.name)
        axes.set_yticks([])
        axes.legend(loc="best")
    return drawing.svg


def plot_witness(x: Tensor, y: Tensor, names: Sequence[str] = ("X", "Y")) -> str:
    """Witness values of both samples, as `<svg>`."""
    with drawn(SIZE, "Histograms of the witness values of both samples") as drawing:
        axes = drawing.axes
        edges = np.histogram_bin_edges(torch.cat([x, y]).numpy(), bins=30)
        for values, name, shade in ((x, names[0], BLUE), (y, names[1], ORANGE)):
            axes.hist(values.numpy(), bins=list(edges), density=True, color=shade, alpha=0.55, label=name)
            axes.axvline(float(values.mean()), color=shade, linewidth=1.2)
        axes.set_xlabel("witness (lines: means)")
        axes.set_yticks([])
        axes.legend(loc="best")
    return drawing.svg


def plot_power(curve: PowerCurve, level: float = 0.05, *, label: str = "examples of each sample") -> str:
    """How often each test rejected at each point, with bars of one standard error, as `<svg>`."""
    panel = Rates("", curve.points, curve.power(level), curve.standard_error(level))
    return plot_rates([panel], level, label=label)


@dataclass(frozen=True)
class Rates:
    """One panel of rates of rejection.

    Attributes:
        title: above it.
        points: where the tests were made.
        power: of each test, at each point.
        errors: standard errors of that.
    """

    title: str
    points: Sequence[Any]
    power: Mapping[str, Sequence[float] | np.ndarray]
    errors: Mapping[str, Sequence[float] | np.ndarray]


def plot_rates(panels: Sequence[Rates], level: float = 0.05, *, label: str) -> str:
    """Rates of rejection side by side, with bars of one standard error; the dotted line is the level, as `<svg>`."""
    size = (SIZE[0] if len(panels) == 1 else 3.2 * len(panels), SIZE[1])
    with drawn(size, f"Power over {label}, for {', '.join(panels[0].power)}") as drawing:
        figure: Any = drawing.axes.figure
        drawing.axes.remove()
        for place, (axes, panel) in enumerate(
            zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True)
        ):
            axes.patch.set_alpha(0)
            places = np.arange(len(panel.points))
            for k, (name, rates) in enumerate(panel.power.items()):
                axes.errorbar(
                    places + 0.03 * (k - len(panel.power) / 2), rates, panel.errors[name], marker="o", markersize=3,
                    elinewidth=1, color=COLOURS[k % len(COLOURS)], label=name, linewidth=1.4,
                )  # fmt: skip
            axes.axhline(level, color=INK, linewidth=1, linestyle=":")
            axes.set_xticks(places, [str(point) for point in panel.points])
            axes.set(ylim=(-0.03, 1.05), xlabel=label, title=panel.title)
            axes.grid()
            if place == 0:
                axes.set_ylabel("power")
                axes.legend(loc="best", fontsize=7.5)
    return drawing.svg
