"""What a matrix on disk is said to take is what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ntkit
from ntkit.kernel.forecast import Speeds, forecast, human_time, measure
from ntkit.kernel.saved import SAMPLED, layout_of
from tests.cases import normal
from tests.test_saved import C, in_tiles

pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")


@pytest.mark.parametrize("symmetric", [True, False])
def test_captures_are_those_that_are_made(symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = in_tiles() if symmetric else in_tiles(normal(5, seed=2)(9).double())
    captured: list[int] = []
    original = ntkit.Tangent.derivatives

    def counting(self: ntkit.Tangent, x: Any, index: Any = slice(None), **options: Any) -> Any:
        found = original(self, x, index, **options)
        captured.append(found.examples)
        return found

    layout = layout_of(kernel, "float64", 10**9)
    said = forecast(layout, C, Speeds(2.0, 3.0, "cpu"), tiles=layout.tiles(), memory=10**9)
    monkeypatch.setattr(ntkit.Tangent, "derivatives", counting)
    kernel.save(tmp_path / "k.zarr", memory=10**9)
    # before the tiles a few entries are computed, that a run which goes on compares: they are not foretold
    compared = SAMPLED if symmetric else 2 * SAMPLED
    assert said.captures + compared == sum(captured)
    assert said == forecast(layout, C, Speeds(2.0, 3.0, "cpu"), memory=10**9)  # counted row by row
    assert layout.count == len(layout.tiles()) == said.tiles
    assert said.seconds == 2.0 * said.captures + 3.0 * said.pairs
    rows, cols = kernel.shape[0] // C, kernel.shape[1] // C
    # of the five tiles of 5 (one of 3) examples on the diagonal one half is computed
    diagonal = 4 * (25 - 12) + 9 - 4
    assert said.pairs == ((rows * cols - 109) // 2 + 109 - diagonal if symmetric else rows * cols)
    assert said.disk == layout.nbytes
    assert said.disk <= sum(file.stat().st_size for file in (tmp_path / "k.zarr" / "c").rglob("*") if file.is_file())


def test_workers_share_the_time() -> None:
    layout = layout_of(in_tiles(), "float64", 10**9)
    said = forecast(layout, C, Speeds(60.0, 0.0, "cpu"), tiles=layout.tiles()[:3], memory=10**9, workers=4)
    assert "in 3 tiles of 15 x 15, one half (12 are there)" in str(said)
    assert human_time(said.seconds / 4) in str(said)
    assert "on 4 workers" in str(said)


def test_speeds_are_of_this_machine() -> None:
    kernel = in_tiles()
    found = measure(kernel, layout_of(kernel, "float64", 10**9))
    assert 0 < found.capture < 10
    assert 0 < found.pair < 1


@pytest.mark.parametrize(
    ("seconds", "words"), [(45, "45 s"), (600, "10 min"), (3 * 3600, "3 h"), (86_400 * 12, "12 days")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert human_time(seconds) == words
