"""Strategies beside each other, on the same seeds: areas under learning curves, tests, and labels saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkit.errors import InputError


@dataclass(frozen=True)
class Against:
    """One strategy beside another, seed by seed.

    Attributes:
        difference: of mean areas, the first less the second.
        standard_error: of that.
        wins: seeds on which the first has the larger area.
        p: of Wilcoxon's signed-rank test, two-sided; 1 where no area differs.
        p_holm: the same, corrected for all strategies of the table (Holm 1979).
    """

    difference: float
    standard_error: float
    wins: int
    p: float
    p_holm: float


@dataclass(frozen=True)
class Row:
    """One strategy.

    Attributes:
        name: of the strategy.
        area: mean score over the curve, mean over seeds.
        standard_error: of that.
        final: mean score with all labels.
        saved: part of all labels that it needs not to reach the mean final score of `Comparison.to_save`; negative
            infinity if it never does.
        against: beside each of the strategies that it is compared with.
    """

    name: str
    area: float
    standard_error: float
    final: float
    saved: float
    against: Mapping[str, Against]


@dataclass(frozen=True)
class Comparison:
    """All strategies, the largest area first.

    Attributes:
        rows: one for each.
        seeds: how many.
        to_save: whose final score counts for labels saved.
        penalties: as `penalties` gives them; those of several tasks add up.
    """

    rows: tuple[Row, ...]
    seeds: int
    to_save: str
    penalties: Mapping[str, Mapping[str, float]]

    def __getitem__(self, name: str) -> Row:
        """The row of one strategy."""
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        """As a table of text."""
        others = list(dict.fromkeys(name for row in self.rows for name in row.against))
        head = ["strategy", "area", "final", "saved", *(f"- {name}" for name in others)]
        lines = [head]
        for row in self.rows:
            found = [row.against.get(name) for name in others]
            beside = [
                "" if a is None else f"{a.difference:+.4f} ± {a.standard_error:.4f} (p {a.p_holm:.2g})" for a in found
            ]
            saved = f"{row.saved:.0%}" if np.isfinite(row.saved) else "never"
            lines.append([row.name, f"{row.area:.4f} ± {row.standard_error:.4f}", f"{row.final:.4f}", saved, *beside])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def compare(
    curves: Mapping[str, np.ndarray],
    labels: Sequence[int],
    *,
    against: Sequence[str],
    to_save: str = "random",
) -> Comparison:
    """Compare learning curves that were run on the same seeds.

    Args:
        curves: for each strategy the scores, (seeds, rounds); row s of all has the same initial labels and networks.
        labels: how many there were in each round, rising.
        against: strategies that every other is compared with.
        to_save: whose mean final score is to be reached with fewer labels.

    Raises:
        InputError: if shapes do not fit, or a strategy is unknown.
    """
    counts = np.asarray(labels, dtype=float)
    if counts.ndim != 1 or len(counts) < 2 or (np.diff(counts) <= 0).any():
        raise InputError("labels: expected the rising numbers of labels of at least two rounds")
    values = {name: np.asarray(curve, dtype=float) for name, curve in curves.items()}
    shapes = {curve.shape for curve in values.values()}
    if len(shapes) != 1 or next(iter(shapes))[1:] != counts.shape or next(iter(shapes))[0] < 2:
        raise InputError(
            f"every strategy needs (seeds, {len(counts)}) scores, at least two seeds, the same for all: got "
            f"{', '.join(f'{name} {curve.shape}' for name, curve in values.items())}"
        )
    bad = [name for name, curve in values.items() if not np.isfinite(curve).all()]
    unknown = [name for name in (*against, to_save) if name not in values]
    if bad or unknown:
        raise InputError(
            f"{bad[0]} has scores that are not finite" if bad else f"no curve of {unknown[0]}: got {', '.join(values)}"
        )
    areas = {name: area(curve, counts) for name, curve in values.items()}
    goal = float(values[to_save].mean(0)[-1])
    beside = {name: _against(areas, name) for name in against}
    rows = [
        Row(
            name,
            float(found.mean()),
            float(found.std(ddof=1) / len(found) ** 0.5),
            float(values[name][:, -1].mean()),
            1 - labels_to(values[name].mean(0), counts, goal) / counts[-1],
            {other: table[name] for other, table in beside.items() if other != name},
        )
        for name, found in areas.items()
    ]
    seeds = len(next(iter(values.values())))
    return Comparison(tuple(sorted(rows, key=lambda row: -row.area)), seeds, to_save, penalties(values))


def penalties(curves: Mapping[str, np.ndarray], level: float = 0.05) -> dict[str, dict[str, float]]:
    """In which part of the rounds each strategy beats each other one, by name and name (Ash et al. 2020, section 4).

    One beats the other in a round if its mean score is larger and a paired, two-sided t-test over the seeds says so.
    Rows of good strategies have large numbers, columns of bad ones.

    Args:
        curves: as for `compare`.
        level: of the tests, which are not corrected: their numbers are compared, they prove nothing one by one.
    """
    from scipy.stats import t

    values = {name: np.asarray(curve, dtype=float) for name, curve in curves.items()}
    seeds = len(next(iter(values.values())))
    least = float(t.ppf(1 - level / 2, seeds - 1)) / seeds**0.5

    def beats(mine: np.ndarray, theirs: np.ndarray) -> float:
        gaps = mine - theirs
        return float((gaps.mean(0) > least * gaps.std(0, ddof=1)).mean())

    return {a: {b: beats(values[a], values[b]) for b in values if b != a} for a in values}


def area(curve: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean height of curves (..., rounds) over the number of labels, by trapezoids: (...)."""
    from scipy.integrate import trapezoid

    return trapezoid(curve, labels, axis=-1) / (labels[-1] - labels[0])


def labels_to(curve: np.ndarray, labels: np.ndarray, goal: float) -> float:
    """Labels with which a curve first reaches a score, between rounds on a straight line; infinity if never."""
    reached = np.flatnonzero(curve >= goal)
    if not len(reached):
        return float("inf")
    k = int(reached[0])
    if k == 0:
        return float(labels[0])
    part = (goal - curve[k - 1]) / (curve[k] - curve[k - 1])
    return float(labels[k - 1] + part * (labels[k] - labels[k - 1]))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p values: the k-th smallest of m times m - k + 1, never falling, at most 1."""
    order, found, largest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, (len(p) - rank) * float(p[place]))
        found[place] = min(1.0, largest)
    return found


def _against(areas: Mapping[str, np.ndarray], other: str) -> dict[str, Against]:
    from scipy.stats import wilcoxon

    names = [name for name in areas if name != other]
    gaps = [areas[name] - areas[other] for name in names]
    tests: list[Any] = [wilcoxon(gap) if gap.any() else None for gap in gaps]
    p = [1.0 if test is None else float(test.pvalue) for test in tests]
    return {
        name: Against(
            float(gap.mean()), float(gap.std(ddof=1) / len(gap) ** 0.5), int((gap > 0).sum()), p[k], corrected
        )
        for k, (name, gap, corrected) in enumerate(zip(names, gaps, holm(p), strict=True))
    }
