"""Infinite-width kernels: seconds and memory beside a plain numpy recursion, and pairs of images per second.

    python -m benchmarks.infinite.speed                          # all cases, each in processes of its own
    python -m benchmarks.infinite.speed --case "numpy" --once    # one case here, one line of JSON

The fully connected case is 4,000 vectors of 784 numbers and 3 hidden layers of ReLU in float64. The numpy recursion is
what one writes by hand, with the matrices of all N x N pairs at once. The convolutional cases are the CNTK of Arora et
al. (2019): 3 x 3 convolutions with zero padding, ReLU, global average pooling or a flat head, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.scale.record import peak_mb, record

N, D, DEPTH = 4000, 784, 3
ROUNDS = 3
IMAGES = {"pooled 8x8": (8, True, 96), "pooled 16x16": (16, True, 24), "flat 32x32": (32, False, 192)}
RECORDS = Path(__file__).parent / "records"


def vectors() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def recursion(x: np.ndarray) -> np.ndarray:
    """NTK of a ReLU network with weights of std sqrt(2) and biases of std 0.1."""
    cov = 2 * (x @ x.T) / x.shape[1] + 0.01
    ntk = cov.copy()
    for _ in range(DEPTH):
        std = np.sqrt(np.diag(cov))
        norm = np.outer(std, std)
        rho = np.clip(cov / norm, -1, 1)
        angle = np.pi - np.arccos(rho)
        cov = 2 * norm * (np.sqrt(1 - rho**2) + angle * rho) / (2 * np.pi) + 0.01
        ntk = cov + 2 * angle / (2 * np.pi) * ntk
    return ntk


def dense() -> nn.Module:
    layers, size = [], D
    for _ in range(DEPTH):
        layers += [nn.Linear(size, 8), nn.ReLU()]
        size = 8
    return nn.Sequential(*layers, nn.Linear(8, 10))


def convolutional(size: int, pooled: bool, convolutions: int = 3) -> nn.Module:
    layers, channels = [], 3
    for _ in range(convolutions):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()]
        channels = 8
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pooled else [nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(8 if pooled else 8 * size**2, 10))


def once(case: str) -> dict[str, Any]:
    """One case in this process, after a small warm-up."""
    from ntkit import InfiniteWidth

    if case == "on disk":
        return resumed()
    std = {"weight_std": math.sqrt(2), "bias_std": 0.1}
    if case == "numpy":
        x = vectors().numpy()
        recursion(x[:64])
        start = time.perf_counter()
        found = recursion(x)
    elif case == "ntkit":
        x = vectors()
        function = InfiniteWidth(dense(), **std)
        function(x[:64]).dense()
        start = time.perf_counter()
        found = function(x).dense().numpy()
    else:
        torch.set_num_threads(1)
        size, pooled, n = IMAGES[case]
        x = torch.randn(2 * n, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        function = InfiniteWidth(convolutional(size, pooled), **std)
        function(x[:2]).dense()
        start = time.perf_counter()
        function(x[:n], x[n:]).dense()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "pairs": n * n, "pairs_per_second": n * n / seconds, "peak_mb": peak_mb()}
    seconds = time.perf_counter() - start
    corner = found[:6, :6].tolist()
    threads = torch.get_num_threads()
    return {
        "seconds": seconds,
        "threads": threads,
        "peak_mb": peak_mb(),
        "trace": float(np.trace(found)),
        "corner": corner,
    }


def resumed() -> dict[str, Any]:
    """The pooled 8 x 8 kernel of 200 images through a store on disk, whose second half is computed after a stop."""
    from ntkit import InfiniteWidth

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if 2 * done >= total:
            raise Stopped

    torch.set_num_threads(1)
    x = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = InfiniteWidth(convolutional(8, True), weight_std=math.sqrt(2), bias_std=0.1)(x)
    with tempfile.TemporaryDirectory() as folder:
        path, seconds = Path(folder, "k.zarr"), []
        start = time.perf_counter()
        try:
            kernel.save(path, memory=2**19, progress=stop)
        except Stopped:
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        saved = kernel.save(path, memory=2**19)
        seconds.append(time.perf_counter() - start)
        equal = bool(torch.allclose(saved.dense(), kernel.dense(), rtol=1e-12, atol=1e-12))
    return {"seconds_until_stopped": seconds[0], "seconds_after": seconds[1], "equals_the_dense_matrix": equal}


def measured(case: str) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.infinite.speed", "--case", case, "--once"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return json.loads(out.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> list[str]:
    """A record as rows of Markdown."""
    fc, images, disk = found["fully_connected"], found["images"], found["on_disk"]
    rows = ["| what | speed | peak memory of the process |", "|---|---|---|"]
    rows.append(
        f"| {fc['examples']:,} vectors, {DEPTH} hidden layers of ReLU, {fc['threads']} threads | "
        f"{fc['seconds']:.1f} s, {fc['ratio']:.2f} of the time of numpy | {fc['peak_mb']:,.0f} MB |"
    )
    rows.append(
        f"| the same recursion in numpy, whole matrices | {fc['numpy_seconds']:.1f} s | {fc['numpy_peak_mb']:,.0f} MB |"
    )
    for case, one in images.items():
        kind, size = case.split()
        head = "global average pooling" if kind == "pooled" else "a flat head"
        rows.append(
            f"| images of {size.replace('x', ' x ')}, 3 convolutions and {head}, 1 thread | "
            f"{one['pairs_per_second']:,.0f} pairs a second | {one['peak_mb']:,.0f} MB |"
        )
    rows.append(
        f"| 200 images of 8 x 8 onto disk, pooled, stopped half way and gone on with | "
        f"{disk['seconds_until_stopped']:.1f} s and {disk['seconds_after']:.1f} s | |"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["numpy", "ntkit", *IMAGES, "on disk"])
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(once(arguments.case)))
        return
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in ("numpy", "ntkit", *IMAGES)}
    for number in range(ROUNDS):
        for case, runs in found.items():
            runs.append(measured(case))
            print(f"round {number + 1}, {case}: {runs[-1]['seconds']:.2f} s, {runs[-1]['peak_mb']:.0f} MB", flush=True)
    ours, theirs = found["ntkit"], found["numpy"]
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
    differences = np.abs(np.array(ours[0]["corner"]) - theirs[0]["corner"]) / np.abs(theirs[0]["corner"])
    summary = {
        "fully_connected": {
            "examples": N,
            "threads": ours[0]["threads"],
            "seconds": statistics.median(run["seconds"] for run in ours),
            "numpy_seconds": statistics.median(run["seconds"] for run in theirs),
            "ratio": statistics.median(ratios),
            "peak_mb": max(run["peak_mb"] for run in ours),
            "numpy_peak_mb": max(run["peak_mb"] for run in theirs),
            "largest_relative_difference": float(differences.max()),
        },
        "images": {
            case: {
                "pairs_per_second": statistics.median(run["pairs_per_second"] for run in found[case]),
                "peak_mb": max(run["peak_mb"] for run in found[case]),
            }
            for case in IMAGES
        },
        "on_disk": measured("on disk"),
        "runs": found,
    }
    print(json.dumps({k: v for k, v in summary.items() if k != "runs"}, indent=1))
    print(record("speed", summary, RECORDS))


if __name__ == "__main__":
    main()
