"""Comparisons: areas, tests and labels saved by hand."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from ntkit.errors import InputError
from ntkit.report.curves import plot_learning_curves
from ntkit.uses.active.comparison import area, compare, holm, labels_to, penalties

LABELS = [20, 30, 50]


def curves(seeds: int = 5) -> dict[str, np.ndarray]:
    base = np.array([0.5, 0.6, 0.8]) + 0.01 * np.arange(seeds)[:, None]
    gain = np.array([0.0, 0.1, 0.05]) + 0.001 * np.arange(1, seeds + 1)[:, None]
    return {"random": base, "good": base + gain, "same": base.copy(), "bad": base - 0.2}


def test_areas_are_heights_over_labels() -> None:
    assert area(np.array([0.5, 0.6, 0.8]), np.array(LABELS)) == pytest.approx((10 * 0.55 + 20 * 0.7) / 30)
    assert np.allclose(area(np.full((4, 3), 0.3), np.array(LABELS)), 0.3)


def test_labels_to_a_score() -> None:
    curve, counts = np.array([0.5, 0.6, 0.8]), np.array(LABELS)
    for goal, labels in ((0.4, 20), (0.5, 20), (0.55, 25), (0.6, 30), (0.7, 40), (0.8, 50), (0.81, np.inf)):
        assert labels_to(curve, counts, goal) == pytest.approx(labels)
    assert labels_to(np.array([0.5, 0.9, 0.7]), counts, 0.7) == pytest.approx(25)  # the first time


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_strategies_beside_each_other() -> None:
    found = compare(curves(), LABELS, against=["random"])
    assert [row.name for row in found.rows] == ["good", "random", "same", "bad"]
    good, bad = found["good"].against["random"], found["bad"].against["random"]
    gaps = area(curves()["good"] - curves()["random"], np.array(LABELS))
    assert good.difference == pytest.approx(gaps.mean())
    assert good.standard_error == pytest.approx(gaps.std(ddof=1) / 5**0.5)
    assert (good.wins, bad.wins) == (5, 0)
    assert good.p == pytest.approx(2 / 2**5)  # the largest of 2^5 sign patterns, both sides
    assert good.p_holm == pytest.approx(3 * 2 / 2**5)
    assert found["same"].against["random"].p == 1.0
    assert "random" not in found["random"].against
    mean = curves()["good"].mean(0)
    goal = curves()["random"].mean(0)[-1]
    needed = 30 + 20 * (goal - mean[1]) / (mean[2] - mean[1])
    assert found["good"].saved == pytest.approx(1 - needed / 50)
    assert found["random"].saved == 0
    assert found["bad"].saved == -np.inf
    assert "never" in str(found)
    head, first, *_ = str(found).splitlines()
    assert head.split() == ["strategy", "area", "final", "saved", "-", "random"]
    assert first.startswith("good ")
    row = found["good"]
    for part in (f"{row.area:.4f}", f"{row.final:.3f}", f"{row.saved:.0%}", f"{good.difference:+.4f}"):
        assert f" {part}" in first


def p_of(gaps: np.ndarray) -> float:
    found: Any = ttest_1samp(gaps, 0)
    return float(found.pvalue)


def test_penalties_by_hand() -> None:
    """In round 0 nothing differs; in the others a is better: on all seeds, by next to nothing, on two of three."""
    a = np.array([[0.5, 0.7, 0.60, 0.7], [0.6, 0.8, 0.61, 0.7], [0.4, 0.6, 0.62, 0.4]])
    b = np.array([[0.5, 0.5, 0.60, 0.5], [0.6, 0.6, 0.60, 0.6], [0.4, 0.4, 0.60, 0.5]])
    found = penalties({"a": a, "b": b, "c": b - 1e-9})
    for first, second in (("a", "b"), ("b", "a")):
        gaps = {"a": a, "b": b}[first] - {"a": a, "b": b}[second]
        beats = [gap.mean() > 0 and (np.ptp(gap) < 1e-12 or p_of(gap) < 0.05) for gap in gaps.T]
        assert found[first][second] == pytest.approx(np.mean(beats))
    assert found["a"]["b"] == pytest.approx(1 / 4)
    assert (found["b"]["a"], found["b"]["c"], found["c"]["b"]) == (0.0, 1.0, 0.0)
    assert "a" not in found["a"]
    assert compare({"a": a, "b": b, "c": b - 1e-9}, [1, 2, 3, 4], against=["a"], to_save="b").penalties == found
    assert penalties({"a": a, "b": b}, level=0.5)["a"]["b"] > found["a"]["b"]


def test_curves_that_do_not_fit() -> None:
    for change, message in (
        ({"bad": np.zeros((4, 3))}, "the same for all"),
        ({"bad": np.full((5, 3), np.nan)}, "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            compare({**curves(), **change}, LABELS, against=["random"])
    with pytest.raises(InputError, match="no curve of margin"):
        compare(curves(), LABELS, against=["margin"])
    with pytest.raises(InputError, match="rising"):
        compare(curves(), [20, 20, 30], against=["random"])
    with pytest.raises(InputError, match="two seeds"):
        compare(curves(1), LABELS, against=["random"])


def test_curves_are_drawn() -> None:
    svg = plot_learning_curves(curves(), LABELS, score="accuracy")
    root = ElementTree.fromstring(svg)
    said = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    for word in ("random", "good", "same", "bad", "labels", "accuracy"):
        assert word in said
    assert root.attrib["aria-label"].startswith("accuracy over the number of labels")
    bands = [part for part in root.iter() if part.attrib.get("id", "").startswith("FillBetween")]
    assert len(bands) == 4
    one = plot_learning_curves({"good": curves()["good"][:1]}, LABELS)  # one seed has no error
    assert "FillBetween" not in one
    for wrong in ({}, {"good": np.zeros((2, 4))}):
        with pytest.raises(InputError, match="one score for each number of labels"):
            plot_learning_curves(wrong, LABELS)
