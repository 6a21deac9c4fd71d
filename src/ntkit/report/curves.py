"""Learning curves of strategies beside each other, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ntkit.errors import InputError
from ntkit.report.pictures import drawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def plot_learning_curves(
    curves: Mapping[str, np.ndarray], labels: Sequence[int], *, score: str = "test accuracy"
) -> str:
    """The mean of every strategy over its seeds, with a band of one standard error, as `<svg>`.

    Args:
        curves: for each strategy the scores, (seeds, rounds), as for `ntkit.uses.active.compare`.
        labels: how many there were in each round.
        score: what the scores are.

    Raises:
        InputError: if shapes do not fit.
    """
    values = {name: np.atleast_2d(np.asarray(curve, dtype=float)) for name, curve in curves.items()}
    bad = [name for name, curve in values.items() if curve.ndim != 2 or curve.shape[1] != len(labels)]
    if bad or not values:
        raise InputError(
            f"learning curves are (seeds, {len(labels)}), one score for each number of labels: got "
            f"{f'{bad[0]} of shape {values[bad[0]].shape}' if bad else 'none'}"
        )
    with drawn((5.4, 3.6), f"{score} over the number of labels, for {', '.join(values)}") as drawing:
        for name, curve in values.items():
            mean = curve.mean(0)
            (line,) = drawing.axes.plot(labels, mean, marker="o", markersize=3, label=name)
            if len(curve) > 1:
                error = curve.std(0, ddof=1) / len(curve) ** 0.5
                drawing.axes.fill_between(labels, mean - error, mean + error, color=line.get_color(), alpha=0.2, lw=0)
        drawing.axes.set(xlabel="labels", ylabel=score)
        drawing.axes.grid(True)
        drawing.axes.legend(loc="best")
    return drawing.svg
