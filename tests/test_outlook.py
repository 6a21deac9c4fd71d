"""What is said to be possible: the arithmetic of every way, and what fits a machine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.forecast import Speeds
from ntkit.solve.outlook import Outlook, advised, outlook
from ntkit.solve.pace import Pace, measure_pace
from ntkit.solve.ways import Way
from tests.cases import normal
from tests.test_cli import call, here, refused

assert here  # a fixture

PACE = Pace(Speeds(1e-3, 1e-6, "cpu"), Speeds(1e-3, 1e-6, "cpu"), 2e-3, 5e-3, 1e11, 2)
GB = 10**9


def kernel(**options: Any) -> ntkit.TangentKernel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    return ntkit.TangentKernel(ntkit.linearize(model), normal(5)(40).float(), memory=GB, **options)


def said(n: int, **options: Any) -> Outlook:
    return outlook(kernel(), examples=n, pace=PACE, **{"memory": 20 * GB, **options})


def named(found: tuple[Way, ...], *words: str) -> Way:
    """The one way whose name has all these words."""
    (way,) = [way for way in found if all(word in way.name for word in words)]
    return way


def test_times_are_those_of_the_measured_speeds() -> None:
    found = said(30_000, size=1000)
    memory, disk, _, features = found.kernel
    assert memory.seconds == pytest.approx(30_000**2 / 2 * 1e-6, rel=0.2)
    assert disk.seconds >= 30_000**2 / 2 * 1e-6
    assert features.seconds == pytest.approx(30_000 * 2e-3)
    assert features.disk == 90_000 * 1000 * 4
    assert disk.disk == pytest.approx(90_000**2 / 2 * 4, rel=0.1)


def test_solves_are_told_to_their_end() -> None:
    found = said(30_000, size=1000, iterations=50, memory=10**15)
    single, double = (named(found.regression, "Cholesky", kind) for kind in ("float32", "float64"))
    rows = 90_000
    # a factor, and ten or two refinements that pass over the matrix
    assert single.seconds == pytest.approx(rows**3 / 3 / 1e11 + 10 * rows**2 * 5e-9)
    assert double.seconds == pytest.approx(rows**3 / 3 / 5e10 + 2 * rows**2 * 5e-9)
    assert 8 * rows**2 < double.memory < 8.3 * rows**2 + found.kernel[0].held
    assert single.total == single.seconds + min(way.seconds for way in found.kernel[:2])
    plain = named(found.regression, "conjugate", "plain")
    assert plain.seconds == pytest.approx(7 * 50 * 30_000 * 5e-3)
    by_trace = named(found.regression, "conjugate", "trace kernel")
    making = 30_000 * 1e-3 + 30_000**2 / 2 * 1e-6 + 9 * 30_000**3 / 5e10
    assert by_trace.seconds == pytest.approx(making + 50 * (30_000 * 5e-3 + 4 * 30_000**2 * 3 / 5e10))
    assert by_trace.memory > 24 * 30_000**2
    assert "21.6 GB for the preconditioner" in str(by_trace)
    by_features = named(found.regression, "conjugate gradients, helped by 1,000 features")
    assert by_features.seconds < by_trace.seconds
    assert by_features.disk == 30_000 * 1000 * 4
    for solve in (plain, by_trace, by_features):
        least = named(found.regression, solve.name.replace("conjugate gradients", "least squares (LSMR)"))
        assert least.seconds == pytest.approx(solve.seconds)


def test_every_right_hand_side_takes_its_products() -> None:
    """But not its passes over a matrix that is there."""
    one, ten = (said(30_000, targets=targets, memory=10**15) for targets in (1, 10))
    for name in ("conjugate", "LSMR"):
        single, several = (named(found.regression, name, "plain") for found in (one, ten))
        assert several.seconds == pytest.approx(10 * single.seconds)
    single, several = (named(found.regression, "conjugate", "plain") for found in (one, ten))
    assert several.memory - single.memory == 9 * 6 * 8 * 90_000
    single, several = (named(found.regression, "matrix on disk") for found in (one, ten))
    assert several.seconds < 1.5 * single.seconds


def test_right_hand_sides_are_the_outputs_that_a_row_stands_for() -> None:
    assert said(100).job.targets == 1
    assert outlook(kernel(trace=True), pace=PACE).job.targets == 3
    tangent = ntkit.linearize(kernel().tangent.model, readout=ntkit.SumOfLogits())
    pntk = outlook(ntkit.TangentKernel(tangent, normal(5)(6).float()), pace=PACE)
    assert pntk.job.targets == 3
    assert str(pntk).startswith("pNTK of 6 x 6,")
    assert "full kernel" not in str(pntk)
    assert not [way for way in pntk.regression if "trace kernel" in way.name]  # it would be the matrix itself
    single = ntkit.linearize(kernel().tangent.model, readout=ntkit.SingleLogit(1))
    assert outlook(ntkit.TangentKernel(single, normal(5)(6).float()), pace=PACE).job.targets == 1


def test_spectra_are_told() -> None:
    found = said(30_000, memory=10**15)
    rows, product = 90_000, 30_000 * 5e-3
    assert named(found.spectrum, "all eigenvalues").seconds == pytest.approx(9 * rows**3 / 5e10)
    free = named(found.spectrum, "Lanczos, no matrix")
    assert free.seconds == pytest.approx((50 * 16 + 8) * product)
    assert free.memory > 8 * rows * 50 * 16
    assert named(found.trace, "Hutch++").seconds == pytest.approx(60 * product)
    assert named(found.trace, "diagonal").seconds == pytest.approx(30_000 * (1e-3 + 1e-6))
    stored = named(found.spectrum, "matrix on disk")
    assert stored.total == pytest.approx(stored.seconds + named(found.kernel, "exact, on disk").seconds)
    assert stored.seconds == pytest.approx(51 * rows**2 / 2 * (4 / 5e8 + 5e-9))


@pytest.mark.parametrize(
    ("options", "kernel_advice", "regression_advice"),
    [
        ({"n": 1000}, "exact, in memory", "Cholesky in place, float64"),
        ({"n": 20_000, "memory": 40 * GB}, "exact, in memory", "Cholesky in place, float32, refined"),
        ({"n": 50_000}, "exact, on disk", "conjugate gradients, matrix on disk, helped by 4,096 features"),
        ({"n": 50_000, "disk": GB, "iterations": 100}, "4,096 sketched features, in memory", "conjugate gradients, h"),
        # those take more than a night
        ({"n": 50_000, "disk": GB}, "4,096 sketched features, in memory", "ridge on 4,096 features"),
        ({"n": 50_000, "disk": 3 * GB, "memory": 2 * GB}, "4,096 sketched features, on disk", "ridge on 4,096"),
        ({"n": 1000, "memory": 10**6}, "no way fits", "no way fits"),
    ],
)
def test_what_fits_a_machine_and_how_long_it_takes_decide(
    options: dict[str, Any], kernel_advice: str, regression_advice: str
) -> None:
    found = said(**options)
    for_kernel, for_regression, _ = found.advice()
    assert for_kernel.startswith(f"the kernel: {kernel_advice}")
    assert for_regression.startswith(f"a regression: {regression_advice}")
    assert all(line in str(found) for line in found.advice())


def test_advice_says_why() -> None:
    fast = Way("A", 3600, 10, trouble="too much memory")
    exact, slow = Way("B", 7200, 10, before=3600), Way("C", 20_000, 10)
    rough = Way("D", 60, 10, approximate=True)
    assert advised([slow, exact]) == "B, 3 h in all (the fastest exact way that fits)"
    assert "D: 60 s, but approximate; A would be there in 60 min, but takes too much memory" in advised(
        [fast, exact, rough]
    )
    late = Way("E", 13 * 3600, 10)
    assert advised([late]) == "E, 13 h in all (the fastest exact way that fits)"
    assert advised([late, rough]).startswith(
        "D, 60 s in all (approximate; the fastest exact way that fits, E, takes 13 h"
    )
    assert advised([fast, rough]) == "D, 60 s in all (approximate; no exact way fits)"
    gone = Way("F", math.nan, 5, trouble="not for the trace kernel")
    assert advised([fast, gone]) == "no way fits; A, which takes the least memory, needs 10 B"


def test_workers_share_the_time() -> None:
    one, four = said(50_000), said(50_000, workers=4)
    assert four.kernel[3].seconds == one.kernel[3].seconds / 4
    # smaller tiles capture examples more often
    assert one.kernel[1].seconds / 4 <= four.kernel[1].seconds < one.kernel[1].seconds / 2
    assert "4 workers of 2 threads" in str(four)


def test_a_trace_kernel_has_no_products_without_the_matrix() -> None:
    found = outlook(kernel(trace=True), pace=replace(PACE, product=math.nan), memory=10**6)
    lines = [line for line in str(found).splitlines() if "not for the trace kernel" in line]
    assert len(lines) == 6
    assert all(line[62:82].split() == ["-", "-"] for line in lines)
    assert "nan" not in str(found)


def test_a_small_machine_is_planned_for() -> None:
    """The working space shrinks with the memory, and the way to the disk stays open."""
    found = said(100_000, memory=GB)
    assert found.kernel[0].trouble
    assert not found.kernel[1].trouble
    assert found.kernel[1].memory <= GB
    assert "too much memory, too much disk" in str(said(200_000, memory=10**6, disk=1))


def test_millions_of_tiles_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small budget for a large matrix: they would take gigabytes."""
    monkeypatch.setattr("ntkit.kernel.store.Layout.tiles", None)
    assert said(1_000_000, memory=10**6).kernel[1].disk > 3_000_000**2 * 4 / 2


def test_types_that_no_disk_takes() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)).bfloat16()
    half = ntkit.TangentKernel(ntkit.linearize(model), normal(5)(6).bfloat16())
    assert outlook(half, pace=PACE).kernel[1].disk > 0


def test_speeds_are_of_this_network(monkeypatch: pytest.MonkeyPatch) -> None:
    before, captured = torch.get_num_threads(), []
    original = ntkit.Tangent.derivatives

    def counting(self: ntkit.Tangent, x: Any, index: Any = slice(None), **options: Any) -> Any:
        captured.append(len(range(*index.indices(len(x)))) if isinstance(index, slice) else len(index))
        return original(self, x, index, **options)

    monkeypatch.setattr(ntkit.Tangent, "derivatives", counting)
    monkeypatch.setattr("ntkit.kernel.features.CAPTURED", 1)  # batches of the fewest examples
    pace = measure_pace(kernel(), size=64, workers=2)
    assert torch.get_num_threads() == before
    assert all(0 < value < 1 for value in (pace.sketch, pace.product, pace.tiles.capture, pace.tiles.pair))
    assert pace.cholesky > 1e8
    assert captured.count(4) >= 2 * 40 // 4
    assert math.isnan(measure_pace(kernel(trace=True), size=64).product)


def test_sketches_of_more_workers_than_processors_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("ntkit.solve.pace._seconds", lambda call, device: 1.0)
    one, eight = (measure_pace(kernel(), size=64, workers=workers) for workers in (1, 8))
    assert eight.sketch == 4 * one.sketch
    assert eight.threads == 1


def test_refusals() -> None:
    with pytest.raises(InputError, match="positive numbers"):
        said(0)
    with pytest.raises(InputError, match="leave the columns out"):
        outlook(ntkit.TangentKernel(kernel().tangent, normal(5)(4).float(), normal(5)(3).float()), pace=PACE)


def test_from_the_command_line(here: Path) -> None:
    command = ["plan", "nets:net", "data.npz", "--readout", "sum", "--examples", 5000, "--features", 128]
    code, shown, _ = call(*command, "--ram", "64GB", "--disk", "1GB", "--workers", 2)
    assert code == 0
    assert "kernel of 5,000 x 5,000" in shown
    assert "128 sketched features" in shown
    assert "64 GB of memory, 1 GB of disk, 2 workers of" in shown
    assert "- the kernel: exact, " in shown
    assert "iterations are assumed: 200, and 1,400 plain" in shown
    assert "iterations are assumed: 30, and 210 plain" in call(*command, "--iterations", 30)[1]
    code, shown, _ = call(*command, "--no-times")
    assert code == 0
    assert "Advice" not in shown
    for options in (
        ["--no-times", "--ram", "1GB"],
        ["--cols", "x_test", "--workers", 2],
        ["--no-times", "--iterations", 9],
    ):
        assert "belong to the times" in refused("plan", "nets:net", "data.npz", *options)


def test_the_trace_kernel_that_helps_is_timed_for_itself() -> None:
    """It contracts K pairs of scalars, a full kernel K^2."""
    assert measure_pace(kernel(), size=64).traced is not None
    assert measure_pace(kernel(trace=True), size=64).traced is None
    slow = replace(PACE, alone=Speeds(1e-3, 1.0, "cpu"), traced=Speeds(1e-3, 1e-6, "cpu"))
    by_trace = named(said(30_000, size=1000, memory=10**15).regression, "conjugate", "trace kernel")
    again = outlook(kernel(), examples=30_000, size=1000, pace=slow, memory=10**15)
    assert named(again.regression, "conjugate", "trace kernel").seconds == pytest.approx(by_trace.seconds)
