"""Pictures of learning paths: triangles, curves of easy and hard examples, the kernel in motion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ntkit.errors import InputError
from ntkit.report.pictures import INK, SIZE, drawn
from ntkit.solve.losses import TOLERANCE, off_simplex
from ntkit.uses.dynamics import CORNERS, SMOOTHING, triangle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ntkit.uses.dynamics import KernelPath, Paths, Watched

BLUE, ORANGE, GREEN, RED, VIOLET, GREY = "#2f80ed", "#e07b00", "#0f9d8a", "#d6457f", "#8b5cf6", "#8a8f98"


def simplex(
    paths: Paths,
    probe: int,
    names: Sequence[str] | None = None,
    *,
    truth: Tensor | None = None,
    true_class: int | None = None,
) -> str:
    """One path on the triangle of its classes, or of its label, the runner-up and the rest, as SVG.

    Faint dots are what the network said, the line is the smoothed path, the diamond the start, the red cross the label.

    Args:
        paths: recorded.
        probe: its number.
        names: of the three corners.
        truth: p*(x), the true probabilities (C,), where they are known: a grey cross.
        true_class: where it is known: a ring.

    Raises:
        InputError: if there is no such probe, `truth` are not C probabilities, or the network has two classes.
    """
    classes = paths.logits.shape[2]
    if truth is not None and not (truth.shape == (classes,) and off_simplex(truth[None]) < TOLERANCE):
        raise InputError(f"truth: expected {classes} probabilities that sum to 1, got {truth.tolist()}")
    if true_class is not None and not 0 <= true_class < classes:
        raise InputError(f"true_class: expected a class from 0 to {classes - 1}, got {true_class}")
    named = paths.corners(probe)
    names = corner_names(paths, probe) if names is None else names
    with drawn((3.4, 3.1), f"Learning path of example {probe} on a triangle") as drawing:
        axes = drawing.axes
        corners = np.array([*CORNERS, CORNERS[0]])
        axes.plot(corners[:, 0], corners[:, 1], color=INK, linewidth=0.8, alpha=0.5)
        raw = triangle(paths.reduced(probe)).numpy()
        smooth = triangle(paths.reduced(probe, SMOOTHING)).numpy()
        axes.scatter(raw[:, 0], raw[:, 1], s=5, color=BLUE, alpha=0.35, linewidths=0)
        axes.plot(smooth[:, 0], smooth[:, 1], color=ORANGE, linewidth=1.6)
        axes.scatter(*raw[0], marker="D", s=32, color=GREEN, zorder=3)
        if true_class is not None:
            place = CORNERS[named.index(true_class) if true_class in named else 2]
            axes.scatter(*place, marker="o", s=150, facecolors="none", edgecolors=INK, zorder=3)
        if truth is not None:
            axes.scatter(*triangle(paths.reduce(probe, truth)).numpy(), marker="X", s=50, color=GREY, zorder=3)
        if paths.labels is not None:
            axes.scatter(*CORNERS[named.index(int(paths.labels[probe]))], marker="X", s=60, color=RED, zorder=3)
        for (x, y), name, vertical in zip(CORNERS, names, ("top", "top", "bottom"), strict=True):
            shift = -0.04 if vertical == "top" else 0.04
            axes.text(x, y + shift, name, ha="center", va=vertical, fontsize=9)
        axes.set_aspect("equal")
        axes.set_xlim(-0.15, 1.15)
        axes.set_ylim(-0.14, 1.0)
        axes.axis("off")
    return drawing.svg


def corner_names(paths: Paths, probe: int) -> tuple[str, str, str]:
    """What stands at the corners of a probe's triangle."""
    named = paths.corners(probe)
    if len(named) == 3:
        return "class 0", "class 1", "class 2"
    return f"label {named[0]}", f"class {named[1]}", "the rest"


def easy_to_hard(paths: Paths) -> str:
    """The probability of the label through training: the mean of easy, middle and hard thirds of the probes."""
    with drawn(SIZE, "Probability of the label through training, easy to hard") as drawing:
        axes = drawing.axes
        order = paths.area().argsort(descending=True)
        assert paths.labels is not None
        q = paths.probabilities.gather(2, paths.labels.expand(len(paths.steps), -1)[..., None])[..., 0]
        steps = paths.steps.clamp_min(1).numpy()
        for name, some, colour in zip(
            ("easiest third", "middle", "hardest third"), order.tensor_split(3), (GREEN, BLUE, RED), strict=True
        ):
            if not len(some):
                continue  # fewer than three probes
            low, middle, high = torch.quantile(q[:, some], torch.tensor([0.25, 0.5, 0.75]), dim=1).numpy()
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(steps, middle, color=colour, label=name)
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.set_xlabel("steps")
        axes.set_ylabel("probability of the label")
        axes.grid()
        axes.legend(loc="best")
    return drawing.svg


def kernel_motion(path: KernelPath) -> str:
    """How far the kernel has moved, and how well it agrees with the labels."""
    with drawn(SIZE, "Change of the kernel and its agreement with the labels through training") as drawing:
        axes = drawing.axes
        steps = path.steps.clamp_min(1).numpy()
        axes.plot(steps, path.cosine.numpy(), color=VIOLET, marker="o", markersize=3, label="turned (cosine distance)")
        if not bool(path.alignment.isnan().all()):
            axes.plot(
                steps, path.alignment.numpy(), color=ORANGE, marker="o", markersize=3, label="agreement with labels"
            )
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.set_xlabel("steps")
        axes.grid()
        axes.legend(loc="best")
    return drawing.svg


def accuracies(watched: Watched) -> str:
    """Training and test accuracy."""
    with drawn(SIZE, "Training and test accuracy through training") as drawing:
        axes = drawing.axes
        steps = watched.steps.clamp_min(1).numpy()
        axes.plot(steps, watched.train.numpy(), color=BLUE, marker="o", markersize=3, label="training examples")
        axes.plot(steps, watched.test.numpy(), color=ORANGE, marker="o", markersize=3, label="test examples")
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.set_xlabel("steps")
        axes.set_ylabel("accuracy")
        axes.grid()
        axes.legend(loc="best")
    return drawing.svg
