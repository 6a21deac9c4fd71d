"""How much faster two processes are than one, and what large data sets would take on many GPUs.

    NTKIT_DATA=... python -m benchmarks.scale.workers

The pNTK of 1,024 CIFAR-10 images and a CNN of W2's size, written to disk by one and by two processes of one thread
each, through a pool and through Dask; what comes before the first tile (starting processes, importing) is told apart.
The table for N = 10^6 and ImageNet counts the captures and pairs that the tiles of the largest runs would need, and
turns them into time by the seconds that this machine takes for them, and by FLOPs for GPUs.
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

import torch
from torch import nn

import ntkit
from benchmarks.scale.data import cifar10_jpeg
from benchmarks.scale.record import record
from benchmarks.workloads import WORKLOADS
from ntkit.kernel.forecast import Speeds, forecast, measure
from ntkit.kernel.saved import layout_of

IMAGES, ROUNDS, MEMORY = 1024, 3, 10**9
# What a GPU is taken to sustain in float32 products, and the share of FLOPs that are not products: an assumption.
GPU_FLOPS, GPU_MEMORY = 30e12, 64 * 10**9
GPUS = (8, 64, 512)


def saved(kernel: ntkit.TangentKernel, folder: Path, workers: Any) -> tuple[float, float]:
    """Seconds in all, and after the first tile."""
    place, ticks = folder / "k.zarr", []
    start = time.perf_counter()
    kernel.save(place, memory=MEMORY, workers=workers, progress=lambda *_: ticks.append(time.perf_counter()))
    shutil.rmtree(place)
    return time.perf_counter() - start, ticks[-1] - ticks[1]


def compared(kernel: ntkit.TangentKernel, folder: Path) -> list[dict[str, Any]]:
    """One and two processes, through a pool and through Dask."""
    from distributed import Client, LocalCluster

    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    found = []
    for count in (1, 2):
        with ProcessPoolExecutor(count, get_context("spawn")) as pool:
            runs = {"pool": [saved(kernel, folder, pool) for _ in range(ROUNDS + 1)]}
        with (
            LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster) as client,
        ):
            runs["dask"] = [saved(kernel, folder, client) for _ in range(ROUNDS + 1)]
        for name, times in runs.items():
            later = times[1:]  # before the first, processes start and import
            found.append({
                "through": name, "workers": count,
                "seconds": round(statistics.median(whole for whole, _ in later), 2),
                "seconds_after_the_first_tile": round(statistics.median(tiles for _, tiles in later), 2),
            })  # fmt: skip
    return found


def clusters(kernel: ntkit.TangentKernel, name: str, n: int, speeds: Speeds | None) -> dict[str, Any]:
    """What the exact pNTK of n examples like the kernel's would take."""
    plan = kernel.plan(4096)
    flops_capture, flops_pair = kernel.plan(1).flops, sum(route.flops for route in plan.routes)
    layout = layout_of(kernel, "float32", GPU_MEMORY, (n, n))
    gpu = Speeds(flops_capture / GPU_FLOPS, flops_pair / GPU_FLOPS, "gpu")
    found = forecast(layout, 1, gpu, tiles=layout.tiles(), memory=GPU_MEMORY)
    facts: dict[str, Any] = {
        "network": name, "n": n, "tile": layout.edge[0], "tiles": len(layout.tiles()), "disk_tb": layout.nbytes / 1e12,
        "captures": found.captures, "pairs": found.pairs,
        "gflop_a_capture": flops_capture / 1e9, "mflop_a_pair": flops_pair / 1e6,
        "hours_on_gpus": {g: found.seconds / g / 3600 for g in GPUS},
    }  # fmt: skip
    if speeds is not None:
        here = forecast(layout, 1, speeds, tiles=layout.tiles(), memory=GPU_MEMORY)
        facts["measured_seconds_a_capture"], facts["measured_seconds_a_pair"] = speeds.capture, speeds.pair
        facts["hours_on_machines_like_this"] = {g: here.seconds / g / 3600 for g in GPUS}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    x = cifar10_jpeg().x_train[:IMAGES].clone()
    sum_of_logits = ntkit.SumOfLogits()
    cnn = ntkit.TangentKernel(ntkit.linearize(WORKLOADS["W2"].model(), readout=sum_of_logits), x, memory=10**9)
    speeds = measure(cnn, layout_of(cnn, "float32", 10**9))
    with tempfile.TemporaryDirectory() as folder:
        runs = compared(cnn, Path(folder))
    by = {(run["through"], run["workers"]): run["seconds"] for run in runs}
    resnet = ntkit.TangentKernel(
        ntkit.linearize(imagenet_resnet(), readout=ntkit.SumOfLogits(select=lambda output: output.logits)),
        torch.randn(4, 3, 224, 224),
    )
    found = {
        "what": f"the pNTK of {IMAGES:,} images and a CNN of W2's size on disk, one thread for each worker",
        "runs": runs,
        "times_faster_with_two": {name: round(by[name, 1] / by[name, 2], 2) for name in ("pool", "dask")},
        "gpu_assumed": {"flops": GPU_FLOPS, "memory": GPU_MEMORY},
        "clusters": [
            clusters(cnn, "the CNN of W2's size, 32 x 32", 10**6, speeds),
            clusters(resnet, "ResNet-18, 224 x 224", 1_281_167, None),
        ],
    }
    print(record("workers", found).read_text())


def imagenet_resnet() -> nn.Module:
    """ResNet-18 for ImageNet, with random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], embedding_size=64, num_labels=1000
    )
    return ResNetForImageClassification(config).eval()


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
