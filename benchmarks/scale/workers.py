"""How much faster two processes are than one.

    NTKIT_DATA=... python -m benchmarks.scale.workers

The pNTK of 2,048 CIFAR-10 images and a CNN of W2's size, written to disk by one and by two processes of one thread
each, through a pool and through Dask; what comes before the first tile (starting processes, importing) is told apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ntkit
from benchmarks.scale.data import cifar10_jpeg
from benchmarks.scale.record import record
from benchmarks.workloads import WORKLOADS
from ntkit.kernel.tasks import KEEP_MEMORY

# Working space of each worker, so that the tiles are the same for one and for two.
IMAGES, ROUNDS, MEMORY = 2048, 2, 10**9


def saved(kernel: ntkit.TangentKernel, folder: Path, workers: Any, count: int) -> tuple[float, float]:
    """Seconds in all, and after the first tile."""
    place, ticks = folder / "k.zarr", []
    start = time.perf_counter()
    kernel.save(place, memory=count * MEMORY, workers=workers, progress=lambda *_: ticks.append(time.perf_counter()))
    shutil.rmtree(place)
    return time.perf_counter() - start, ticks[-1] - ticks[1]


def compared(kernel: ntkit.TangentKernel, folder: Path) -> list[dict[str, Any]]:
    """One and two processes, through a pool and through Dask."""
    import dask.config
    from distributed import Client, LocalCluster

    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    runs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    # Dask last: it leaves its workers' environment in this process, whose children would inherit it
    for count in (1, 2):
        with ProcessPoolExecutor(count, get_context("spawn")) as pool:
            runs["pool", count] = [saved(kernel, folder, pool, count) for _ in range(ROUNDS + 1)]
    environment = {"OMP_NUM_THREADS": "1", **KEEP_MEMORY}
    for count in (1, 2):
        with (
            dask.config.set({"distributed.nanny.pre-spawn-environ": environment}),
            LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster) as client,
        ):
            runs["dask", count] = [saved(kernel, folder, client, count) for _ in range(ROUNDS + 1)]
    return [
        {
            "through": name, "workers": count,
            "seconds": round(statistics.median(whole for whole, _ in times[1:]), 2),  # in the first, workers start
            "seconds_after_the_first_tile": round(statistics.median(tiles for _, tiles in times[1:]), 2),
        }
        for (name, count), times in runs.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    x = cifar10_jpeg().x_train[:IMAGES].clone()
    cnn = ntkit.TangentKernel(ntkit.linearize(WORKLOADS["W2"].model(), readout=ntkit.SumOfLogits()), x, memory=MEMORY)
    with tempfile.TemporaryDirectory() as folder:
        runs = compared(cnn, Path(folder))
    by = {(run["through"], run["workers"]): run["seconds"] for run in runs}
    found = {
        "what": f"the pNTK of {IMAGES:,} images and a CNN of W2's size on disk, one thread for each worker",
        "runs": runs,
        "times_faster_with_two": {name: round(by[name, 1] / by[name, 2], 2) for name in ("pool", "dask")},
    }
    print(record("workers", found).read_text())


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
