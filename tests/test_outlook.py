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
from ntkit.solve.outlook import Outlook, Pace, measure_pace, outlook
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


def test_times_are_those_of_the_measured_speeds() -> None:
    found = said(30_000, size=1000)
    memory, disk, features = found.kernel
    cholesky, iteration, primal = found.regression
    assert memory.seconds == pytest.approx(30_000**2 / 2 * 1e-6, rel=0.2)
    assert disk.seconds >= 30_000**2 / 2 * 1e-6
    assert features.seconds == pytest.approx(30_000 * 2e-3)
    assert features.disk == 90_000 * 1000 * 4
    assert disk.disk == pytest.approx(90_000**2 / 2 * 4, rel=0.1)
    assert cholesky.seconds == pytest.approx(90_000**3 / 3 / 1e11)
    assert cholesky.memory > 90_000**2 * 4
    assert iteration.seconds == pytest.approx(30_000 * 5e-3)
    assert primal.seconds < cholesky.seconds


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"n": 1000}, "the kernel: exact, in memory; a regression: Cholesky in place, float32"),
        ({"n": 50_000}, "the kernel: exact, on disk; a regression: conjugate gradients, no matrix"),
        ({"n": 50_000, "disk": 3 * GB}, "the kernel: 4,096 sketched features, on disk; a regression: conj"),
        ({"n": 50_000, "disk": GB}, "the kernel: no way fits"),
        ({"n": 1000, "memory": 10**6}, "the kernel: no way fits; a regression: no way fits"),
    ],
)
def test_what_fits_a_machine_decides(options: dict[str, Any], advice: str) -> None:
    found = said(**options)
    assert found.advice().startswith(advice)
    assert advice in str(found)


def test_workers_share_the_time() -> None:
    one, four = said(50_000), said(50_000, workers=4)
    assert four.kernel[2].seconds == one.kernel[2].seconds / 4
    # smaller tiles capture examples more often
    assert one.kernel[1].seconds / 4 <= four.kernel[1].seconds < one.kernel[1].seconds / 2
    assert "4 workers of 2 threads" in str(four)


def test_a_trace_kernel_has_no_products_without_the_matrix() -> None:
    found = outlook(kernel(trace=True), pace=replace(PACE, product=math.nan), memory=10**6)
    line = next(line for line in str(found).splitlines() if "not for the trace kernel" in line)
    assert line.split()[4] == "-"
    assert "nan" not in str(found)


def test_a_small_machine_is_planned_for() -> None:
    """The working space shrinks with the memory, and the way to the disk stays open."""
    found = said(100_000, memory=GB)
    assert found.kernel[0].trouble
    assert not found.kernel[1].trouble
    assert found.kernel[1].memory <= GB
    assert "too much memory, too much disk" in str(said(200_000, memory=10**6, disk=1))


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
    assert "Advice: the kernel: exact, in memory" in shown
    code, shown, _ = call(*command, "--no-times")
    assert code == 0
    assert "Advice" not in shown
    for options in (["--no-times", "--ram", "1GB"], ["--cols", "x_test", "--workers", 2]):
        assert "belong to the times" in refused("plan", "nets:net", "data.npz", *options)
