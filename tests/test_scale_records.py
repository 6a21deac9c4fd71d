"""What the large runs had to keep to, and did: time, memory and agreement, as their records say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.scale.record import RESULTS

GB = 10**9


def found(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def peak(record: dict[str, Any]) -> float:
    return record["peak_mb"] * 2**20


@pytest.mark.parametrize(("data", "train"), [("cifar10", 50_000), ("fashion", 60_000)])
def test_sketched_regression_of_a_whole_data_set(data: str, train: int) -> None:
    run = found(f"sketched-{data}")
    assert (run["train"], run["test"]) == (train, 10_000)
    assert run["seconds"] < 30 * 60
    assert peak(run) < 8 * GB
    assert sum(run["steps_seconds"].values()) == pytest.approx(run["seconds"], abs=1)
    for state in run["states"].values():
        for kind in ("pntk", "trace"):
            assert state[kind]["kernel_error"] < 0.02
            assert state[kind]["accuracy"] > state["network"]


def test_the_exact_matrix_on_disk_and_its_regression() -> None:
    run, solve = found("exact-pntk-20000"), found("solve-pntk-20000")
    assert [start["exit"] for start in run["starts"]] == [-9, 0]  # killed once, and gone on with
    assert run["seconds"] < 25 * 60
    assert peak(run) < 4 * GB
    assert run["disk_bytes"] < 1.6 * GB
    assert solve["converged"]
    assert solve["relative_residual"] < 1e-9
    whole = found("exact-pntk-50000")
    assert whole["starts"][-1]["exit"] == 0
    assert found("solve-pntk-50000")["relative_residual"] < 2e-9


def test_the_full_kernel_by_products_alone() -> None:
    run, check = found("full-entk-4000"), found("full-entk-500")
    assert run["rows"] == 40_000
    assert run["seconds"] < 30 * 60
    assert peak(run) < 4 * GB
    assert run["converged"]
    assert check["dense"]["relative_difference"] < 1e-6


def test_sketches_beside_rows_and_a_dense_projection() -> None:
    for work in found("projections")["workloads"]:
        assert work["times_faster"] >= 5
        assert work["seconds_ntkit"] * 5 < work["seconds_rows"] + work["seconds_of_dense_products_alone"]
        assert work["error_ntkit"] <= 1.2 * work["error_dense_gaussian_expected"]


def test_two_workers_are_faster_than_one() -> None:
    assert min(found("workers")["times_faster_with_two"].values()) > 1.5
