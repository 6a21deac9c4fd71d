"""How long the look-ahead takes on large pools, features given: all scores, and a greedy batch.

    python -m benchmarks.active.speed --folder work [--size million]

Three pools: 1,000,000 points with 1,024 features in half precision on disk, 10 classes, 5,000 labels, a batch of 10;
100,000 points with 256 features in memory, all scores; and 5,000 points with a matrix for a kernel, 500 labels, a batch
of 10, whose points are compared with those by the features that the matrix was made of. The network is a linear layer
on the features, so that its own pass over the pool is counted as well. Features are drawn at random; what they are does
not change the work.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.active.results import RESULTS
from benchmarks.scale.record import peak_mb, record
from ntkit.kernel.base import DenseKernel, Kernel
from ntkit.kernel.features import FeatureKernel
from ntkit.uses import active

CLASSES = 10


class Head(nn.Module):
    """A linear layer on features of any precision."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features.float())


def on_disk(path: Path, n: int, size: int) -> Tensor:
    """Features in half precision, memory-mapped; written in pieces."""
    if not path.exists():
        half = path.with_suffix(".part.npy")
        array = np.lib.format.open_memmap(half, "w+", np.float16, (n, size))
        rng = np.random.default_rng(0)
        spread = (1 / np.sqrt(1 + np.arange(size))).astype(np.float32)  # a spectrum that falls
        for start in range(0, n, 2**16):
            rows = min(2**16, n - start)
            array[start : start + rows] = rng.standard_normal((rows, size), dtype=np.float32) * spread
        array.flush()
        half.rename(path)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def timed(features: Tensor, labels: int, batch: int, kernel: Kernel | None = None) -> dict[str, Any]:
    """Seconds of one query, from the labels to the chosen points; by the features, or a kernel of the same points."""
    n, size = features.shape
    torch.manual_seed(0)
    model = Head(size).eval()
    y = np.full(n, -1)
    y[np.random.default_rng(1).permutation(n)[:labels]] = np.arange(labels) % CLASSES
    strategy = active.LookAhead(kernel=active.Given(kernel or FeatureKernel(features)), missing_label=-1)
    start = time.perf_counter()
    found, utilities = strategy.query(features, y, model, batch_size=batch, return_utilities=True)
    seconds = time.perf_counter() - start
    scored = int(np.isfinite(utilities[0]).sum())
    assert scored == n - labels
    assert len(set(found.tolist())) == batch
    facts = {"points": n, "features": size, "labels": labels, "batch": batch, "seconds": round(seconds, 2)}
    return {**facts, "chosen": found.tolist()}


def by_matrix() -> dict[str, Any]:
    """The dual form, beside the primal one on the same kernel."""
    features = torch.randn(5000, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = DenseKernel(features @ features.T, symmetric=True)
    dual, primal = timed(features, 500, 10, matrix), timed(features, 500, 10)
    same = dual["chosen"] == primal["chosen"]
    return {**dual, "features": "a matrix", "same_points_by_features": same, "seconds_by_features": primal["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=("million", "hundred-thousand", "matrix"), default="million")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.size == "million":
        found = timed(on_disk(options.folder / "features.npy", 10**6, 1024), 5000, 10)
    elif options.size == "matrix":
        found = by_matrix()
    else:
        found = timed(torch.randn(10**5, 256, generator=torch.Generator().manual_seed(0)), 1000, 1)
    del found["chosen"]
    found["peak_mb"] = peak_mb()
    print(record(f"speed-{options.size}", found, RESULTS).read_text())


if __name__ == "__main__":
    main()
