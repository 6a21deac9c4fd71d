"""Comparisons: areas, tests and labels saved by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ntkit.errors import InputError
from ntkit.uses.active.comparison import area, compare, holm, labels_to

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
    assert "0.0" in str(found).splitlines()[1]


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
