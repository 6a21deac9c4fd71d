"""What a matrix on disk is said to take is what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ntkit
from ntkit.kernel.forecast import Speeds, forecast, human_time, measure, one_of
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


def test_one_of_several_workers_has_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for workers, threads, longer in ((1, 4, 1.0), (2, 2, 1.0), (4, 1, 1.0), (16, 1, 4.0)):
            with one_of(workers, torch.device("cpu")) as found:
                assert (torch.get_num_threads(), found) == (threads, longer)
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_more_workers_than_processors_are_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("ntkit.kernel.forecast._speeds", lambda kernel, layout: (2.0, 3.0))
    kernel = ntkit.TangentKernel(ntkit.linearize(torch.nn.Linear(3, C)), torch.ones(4, 3))
    layout = layout_of(kernel, "float32", kernel.memory)
    told = [
        forecast(layout, C, measure(kernel, layout, workers=workers), memory=10**9, workers=workers)
        for workers in (1, 8)
    ]
    assert told[1].seconds / told[1].workers == told[0].seconds == 4 * 2.0 + 8 * 3.0
