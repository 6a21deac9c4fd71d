"""What the page on infinite width says about speed is what was measured, and within what was aimed at."""

import json
from pathlib import Path

import numpy as np

from benchmarks.infinite import speed
from ntkit import infinite_ntk

PAGE = (Path(__file__).parent.parent / "docs" / "infinite.md").read_text()


def test_the_page_has_what_was_measured() -> None:
    found = json.loads((speed.RECORDS / "speed.json").read_text())
    assert "\n".join(speed.table(found)) in PAGE
    fully = found["fully_connected"]
    assert (fully["examples"], fully["ratio"] <= 1.5, fully["peak_mb"] <= 1500) == (4000, True, True)
    assert fully["largest_relative_difference"] < 1e-6
    assert found["on_disk"]["equals_the_dense_matrix"] is True
    assert all(len(runs) == speed.ROUNDS for runs in found["runs"].values())


def test_the_recursion_beside_it_is_the_same_kernel() -> None:
    x = speed.vectors()[:40]
    ours = infinite_ntk(speed.dense(), x, weight_std=2**0.5, bias_std=0.1)
    np.testing.assert_allclose(ours, speed.recursion(x.numpy()), rtol=1e-6)
