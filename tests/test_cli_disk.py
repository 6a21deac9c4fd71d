"""Matrices on disk from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ntkit
from ntkit.kernel.forecast import Speeds, measure
from ntkit.kernel.store import Layout, Store
from tests.test_cli import N, call, here, net, refused

assert here  # a fixture

pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
COMMAND = ["kernel", "nets.py:net", "data.npz", "--weights", "w.pt", "--readout", "sum", "--out"]


def truth(folder: Path) -> torch.Tensor:
    x = torch.from_numpy(np.load(folder / "data.npz")["x_train"])
    return ntkit.empirical_ntk(net(), x, readout=ntkit.SumOfLogits())


@pytest.fixture
def scheduler() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


@pytest.mark.parametrize(
    "options", [[], ["--workers", 2], ["--dask", "local", "--workers", 1], ["--disk-type", "float16"]]
)
def test_a_kernel_on_disk(here: Path, options: list[Any]) -> None:
    code, said, _ = call(*COMMAND, "K.zarr", *options)
    assert code == 0, said
    saved = ntkit.open_kernel("K.zarr")
    error = 2e-3 if "float16" in options else 1e-5
    torch.testing.assert_close(saved.dense(), truth(here), rtol=error, atol=error)
    assert f"{N} x {N} {'float16' if 'float16' in options else 'float32'}" in said


def test_a_running_dask_cluster(here: Path, scheduler: Any) -> None:
    assert call(*COMMAND, "K.zarr", "--dask", scheduler.scheduler_address)[0] == 0
    torch.testing.assert_close(ntkit.open_kernel("K.zarr").dense(), truth(here), rtol=1e-5, atol=1e-5)
    code, said, _ = call(*COMMAND, "other.zarr", "--dask", scheduler.scheduler_address, "--dry-run")
    assert code == 0
    assert "a regression: Cholesky in place" in said
    assert not Path("other.zarr").exists()


def test_the_same_command_goes_on(here: Path) -> None:
    assert call(*COMMAND, "K.zarr")[0] == 0
    record = Path("K.zarr/records/0-0.json")
    record.unlink()
    assert call(*COMMAND, "K.zarr")[0] == 0
    assert record.exists()


@pytest.mark.filterwarnings("default::ntkit.StoreWarning")
def test_going_on_with_less_memory_is_said(here: Path) -> None:
    assert call(*COMMAND, "K.zarr", "--memory", "1GB")[0] == 0
    Path("K.zarr/records/0-0.json").unlink()
    code, _, said = call(*COMMAND, "K.zarr", "--memory", "1MB")
    assert code == 0
    assert "begun with 1,000,000,000 bytes of memory for each worker and goes on with 1,000,000. Finished" in said
    assert "start again\n" in said  # not cut off
    torch.testing.assert_close(ntkit.open_kernel("K.zarr").dense(), truth(here), rtol=1e-5, atol=1e-5)


def test_another_matrix_is_replaced_only_by_force(here: Path) -> None:
    assert call(*COMMAND, "K.zarr")[0] == 0
    other = ["kernel", "nets.py:net", "data.npz", "--readout", "sum", "--out", "K.zarr"]
    assert "is of something else and is left as it is (parameters:" in refused(*other)
    torch.testing.assert_close(ntkit.open_kernel("K.zarr").dense(), truth(here), rtol=1e-5, atol=1e-5)
    assert call(*other, "--force")[0] == 0
    assert not torch.allclose(ntkit.open_kernel("K.zarr").dense(), truth(here), rtol=1e-2)


def test_force_removes_nothing_that_another_run_writes(here: Path) -> None:
    assert call(*COMMAND, "K.zarr")[0] == 0
    other = ["kernel", "nets.py:net", "data.npz", "--readout", "sum", "--out", "K.zarr", "--force"]
    with Store.open(Path("K.zarr")).locked():
        assert "another run is writing" in refused(*other)
    torch.testing.assert_close(ntkit.open_kernel("K.zarr").dense(), truth(here), rtol=1e-5, atol=1e-5)


def test_force_removes_no_other_folder(here: Path) -> None:
    Path("K.zarr").mkdir()
    Path("K.zarr/thesis.tex").write_text("all of it")
    assert "is not a matrix written by ntkit" in refused(*COMMAND, "K.zarr", "--force")
    assert Path("K.zarr/thesis.tex").read_text() == "all of it"


def test_a_dry_run_computes_nothing(here: Path) -> None:
    code, said, _ = call(*COMMAND, "K.zarr", "--dry-run", "--workers", 2)
    assert code == 0
    assert f"{N} x {N} float32 in 1 tiles of" in said
    assert "on 2 workers" in said
    assert "on disk" in said
    assert not Path("K.zarr").exists()
    # and what else could be done
    assert f"pNTK of {N} x {N}" in said
    assert "2 workers of" in said
    assert "a regression: Cholesky in place" in said
    code, said, _ = call(*COMMAND, "K.npy", "--dry-run")
    assert code == 0
    assert "FLOP" in said
    assert "a regression: Cholesky in place" in said
    code, said, _ = call(*COMMAND, "K.npy", "--cols", "x_test", "--dry-run")
    assert code == 0
    assert "Advice" not in said
    assert not Path("K.npy").exists()


def test_a_dry_run_measures_one_of_the_workers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def watched(kernel: ntkit.TangentKernel, layout: Layout, *, workers: int = 1) -> Speeds:
        asked.append(workers)
        return measure(kernel, layout, workers=workers)

    monkeypatch.setattr("ntkit.report.disk.measure", watched)
    assert call(*COMMAND, "K.zarr", "--dry-run", "--workers", 2)[0] == 0
    assert asked == [2]


def test_a_dry_run_counts_what_is_there(here: Path) -> None:
    assert call(*COMMAND, "K.zarr")[0] == 0
    code, said, _ = call(*COMMAND, "K.zarr", "--dry-run")
    assert code == 0
    assert "in 0 tiles" in said
    assert "(1 are there)" in said
    assert Store.open(Path("K.zarr")).finished() == [(0, 0)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["K.npy", "--workers", 2], "--workers is for matrices on disk"),
        (["K.npy", "--dask", "local"], "--dask is for matrices on disk"),
        (["K.npy", "--disk-type", "float16"], "--disk-type is for matrices on disk"),
        (["K.zarr", "--disk-type", "int8"], "unknown type 'int8' for --disk-type"),
        (["K.zarr", "--dask", "tcp://localhost:8786", "--workers", 2], "a running Dask cluster brings its own"),
        (["K.zarr", "--dask", "nowhere"], "there is no Dask scheduler at nowhere"),
        (["a/b/K.zarr"], "does not exist: make it"),
    ],
)
def test_what_does_not_go_together(here: Path, options: list[Any], says: str) -> None:
    assert says in refused(*COMMAND, *options)
