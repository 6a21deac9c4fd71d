"""Pictures as SVG text that sits in a page: it takes the page's colour and font, so that dark mode is free.

Each function returns one self-contained `<svg>`: small enough to be read on a phone, where it fills the width.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from ntkit.uses.convergence import EXPECTED_SLOPE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes
    from torch import Tensor

    from ntkit.uses.convergence import Convergence, WidthPoint
    from ntkit.uses.study import RidgeCheck, Similarity, State

# Drawn in this colour, shown in the colour of the text around the picture.
INK = "#010203"
# Of middle lightness: legible on white and on near-black, and apart for colour-blind eyes.
COLOURS = {
    "full eNTK": "#8b5cf6",
    "pNTK": "#2f80ed",
    "trace": "#e07b00",
    "first logit": "#0f9d8a",
    "network": "#d6457f",
}
OTHER = ("#d6457f", "#8a9a2b", "#7d8590")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "axes.axisbelow": True,
}
SIZE = (4.6, 3.2)


def colour(label: str) -> str:
    """The colour of a kernel, the same in every picture."""
    return COLOURS.get(label) or OTHER[sum(map(ord, label)) % len(OTHER)]


def similarity(facts: Similarity) -> str:
    """The kernel between examples sorted by class: blue for alike, orange for opposite, nothing for unrelated."""
    with drawn((4.2, 3.9), "Heat map of the kernel between examples sorted by class") as drawing:
        axes = drawing.axes
        values = np.clip(facts.cosines.numpy(), -1, 1)
        image = np.zeros((*values.shape, 4))
        image[...] = np.where(values[..., None] >= 0, to_rgba("#2f80ed"), to_rgba("#e07b00"))
        image[..., 3] = np.abs(values)
        axes.imshow(image, interpolation="nearest")
        classes = facts.classes.numpy()
        edges = np.flatnonzero(np.diff(classes)) + 1
        starts, stops = np.r_[0, edges], np.r_[edges, len(classes)]
        if len(starts) <= 20:
            axes.set_xticks((starts + stops - 1) / 2, [str(c) for c in classes[starts]])
            axes.set_yticks((starts + stops - 1) / 2, [str(c) for c in classes[starts]])
        for edge in edges:
            axes.axhline(edge - 0.5, color=INK, alpha=0.25, linewidth=0.5)
            axes.axvline(edge - 0.5, color=INK, alpha=0.25, linewidth=0.5)
        axes.tick_params(length=0)
        axes.set_xlabel("class of the example")
        axes.set_ylabel("class of the other example")
    return drawing.svg


def fidelity(states: Sequence[State]) -> str:
    """Relative error of each reduced kernel, one group of bars per state, with standard errors."""
    with drawn(SIZE, "Bars: relative error of each reduced kernel") as drawing:
        axes = drawing.axes
        labels = [facts.label for facts in states[0].kernels if facts.fidelity is not None]
        width = 0.8 / len(labels)
        for number, label in enumerate(labels):
            found = [state.kernel(label).fidelity for state in states]
            heights = [f.error for f in found if f is not None]
            errors = [f.standard_error for f in found if f is not None]
            x = np.arange(len(states)) + (number - (len(labels) - 1) / 2) * width
            axes.bar(x, heights, width * 0.9, color=colour(label), label=label)
            axes.errorbar(x, heights, errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        axes.set_xticks(range(len(states)), [state.name for state in states])
        axes.set_ylabel("distance from the exact kernel")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y")
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.2, handlelength=1.4)
    return drawing.svg


def spectra(state: State, labels: Sequence[str]) -> str:
    """Eigenvalues of k (x) I_C for each kernel, in units of the largest of the first, against their rank."""
    with drawn(SIZE, f"Eigenvalues of the kernels {state.name}") as drawing:
        axes = drawing.axes
        rows, unit = state.kernel(labels[0]).rows, state.kernel(labels[0]).spectrum.largest
        for label in labels:
            facts = state.kernel(label)
            values = facts.spectrum.eigenvalues.numpy()
            values = np.repeat(values[values > facts.spectrum.resolution], rows // facts.rows)
            axes.loglog(np.arange(1, len(values) + 1), values / unit, color=colour(label), label=label)
        axes.set_xlabel("rank of the eigenvalue")
        axes.set_ylabel(f"eigenvalue (1 = largest of {labels[0]})")
        axes.set_title(state.name)
        axes.grid()
        axes.legend(loc="best")
    return drawing.svg


def scores(states: Sequence[State], score_name: str, test_examples: int) -> str:
    """Test score of the network and of each kernel regression: hollow dots for the first state, full for the last."""
    rows = [(fit.label, fit.examples) for fit in states[0].fits]
    shares = score_name == "accuracy"
    with drawn((4.6, 0.9 + 0.34 * (len(rows) + 1)), "Test score of the network and of kernel regressions") as drawing:
        axes = drawing.axes
        for place, (label, examples) in enumerate(reversed(rows)):
            fits = [state.fit(label, examples) for state in states]
            _dots(axes, place, [fit.test_score for fit in fits], colour(label), fits[0].test_examples if shares else 0)
        last = states[-1].test_score
        axes.axvline(last, color=COLOURS["network"], linewidth=1.2, linestyle=(0, (4, 3)))
        _dots(axes, len(rows), [last], COLOURS["network"], test_examples if shares else 0)
        names = [f"{label}, {examples:,} examples" for label, examples in rows]
        axes.set_yticks(range(len(rows) + 1), [*reversed(names), f"network {states[-1].name}"])
        axes.set_ylim(-0.6, len(rows) + 0.6)
        axes.set_xlabel(f"{score_name} on test examples")
        if shares:
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return drawing.svg


def _dots(axes: Axes, place: int, points: list[float], shade: str, examples: int) -> None:
    for number, point in enumerate(points):
        last = number == len(points) - 1
        spread = math.sqrt(point * (1 - point) / examples) if examples else 0.0
        height = place + (0.0 if len(points) == 1 else 0.12 * (1 if number == 0 else -1))
        axes.errorbar(
            point,
            height,
            xerr=spread or None,
            fmt="o",
            markersize=6,
            color=shade,
            markerfacecolor=shade if last else "none",
            elinewidth=1,
        )


def ridge(check: RidgeCheck, title: str) -> str:
    """Promised and real squared error for each ridge."""
    with drawn(SIZE, f"Squared error against the ridge {title}") as drawing:
        axes = drawing.axes
        usable = [i for i, value in enumerate(check.test) if math.isfinite(value)]
        x = [check.relative[i] for i in usable]
        series = (
            ("leave-one-out", check.leave_one_out, "#e07b00", "-"),
            ("GCV", check.gcv, "#0f9d8a", "--"),
            ("test set", check.test, "#d6457f", "-"),
        )
        for name, values, shade, dashes in series:
            axes.loglog(x, [values[i] for i in usable], color=shade, linestyle=dashes, label=name)
        axes.set_xlabel("ridge, relative to the mean diagonal")
        axes.set_ylabel("mean squared error")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title)
        axes.grid()
        axes.legend(loc="best")
    return drawing.svg


def layers(states: Sequence[State]) -> str:
    """Share of the kernel's trace that each layer carries."""
    names = list(states[0].layers)
    shown = sorted(names, key=lambda name: -max(state.layers[name] for state in states))[:12]
    names = [name for name in names if name in shown]
    with drawn((4.6, 0.9 + 0.42 * len(names)), "Share of the kernel that each layer carries") as drawing:
        axes = drawing.axes
        height = 0.8 / len(states)
        for number, state in enumerate(states):
            place = np.arange(len(names))[::-1] - (number - (len(states) - 1) / 2) * height
            shares = [state.layers[name] for name in names]
            shade = "#7d8590" if number < len(states) - 1 else "#2f80ed"
            axes.barh(place, shares, height * 0.9, color=shade, label=state.name)
        axes.set_yticks(np.arange(len(names))[::-1], names)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("share of the kernel")
        axes.grid(axis="x")
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    return drawing.svg


def widths(facts: Convergence) -> str:
    """Error of the pNTK against width, both logarithmic, with the slopes that are expected."""
    with drawn(SIZE, "Relative error of the pNTK against width") as drawing:
        axes = drawing.axes
        x = np.array(facts.widths, dtype=float)

        def mean(value: str) -> np.ndarray:
            return np.array([np.exp(np.mean([np.log(getattr(p, value)) for p in facts.at(w)])) for w in facts.widths])

        errors = mean("sum_error")
        centre, level = np.exp(np.log(x).mean()), np.exp(np.log(errors).mean())
        low, high = (level * (x / centre) ** slope for slope in EXPECTED_SLOPE)
        axes.fill_between(x, low, high, color=colour("pNTK"), alpha=0.15, linewidth=0, label="expected slope")
        for value, shade, name in (
            ("sum_error", colour("pNTK"), "whole kernel, pNTK"),
            ("trace_error", colour("trace"), "whole kernel, trace"),
            ("largest_error", colour("full eNTK"), "largest eigenvalue, pNTK"),
        ):
            axes.loglog(x, mean(value), color=shade, label=name)
            axes.loglog(*_points(facts.points, value), "o", color=shade, markersize=3, alpha=0.6)
        axes.set_xticks(x, [f"{int(w)}" for w in x])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("width of the hidden layers")
        axes.set_ylabel("relative error")
        axes.grid()
        axes.legend(loc="best")
    return drawing.svg


def _points(points: Sequence[WidthPoint], value: str) -> tuple[list[int], list[float]]:
    return [p.width for p in points], [getattr(p, value) for p in points]


def thumbnail(image: Tensor) -> str | None:
    """An example as a PNG data address, if it has the shape of an image: (H, W), (1, H, W) or (3, H, W)."""
    if image.ndim == 3 and image.shape[0] == 1:
        image = image[0]
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[0] == 3)) or min(image.shape[-2:]) < 4:
        return None
    pixels = image.detach().double().cpu().numpy()
    pixels = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-12)
    colours = mpl.colormaps["gray"](pixels) if pixels.ndim == 2 else np.moveaxis(pixels, 0, 2)
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((colours[..., :3] * 255).astype(np.uint8)).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass
class Drawing:
    """Axes to draw on, and what has become of them."""

    axes: Axes
    svg: str = ""


@contextmanager
def drawn(size: tuple[float, float], label: str) -> Iterator[Drawing]:
    """A drawing of one pair of axes; after the block its `svg` is there. `label` is for those who cannot see it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        drawing = Drawing(figure.add_subplot())
        drawing.axes.patch.set_alpha(0)
        yield drawing
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing.svg = _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """An SVG document as an element of a page, with the colour and the font of the text around it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    svg = svg.replace(INK, "currentColor")
    # The size in points is left to the page; the view box keeps the proportions.
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*pt"', "", head)
    return f'{head} role="img" aria-label="{html.escape(label)}">{body}'
