"""Ridge regression with the exact pNTK that `exact_pntk` has written, solved in one float32 array.

NTKIT_DATA=... python -m benchmarks.scale.solve_pntk 20000 --folder /tmp/k
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress

import ntkit
from benchmarks.scale.data import cifar10_jpeg
from benchmarks.scale.record import peak_mb, record
from ntkit.solve.inplace import CholeskyInPlace

# Wanted relative residual.
TOLERANCE = 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ridge", type=float, default=1e-3, help="in units of the mean diagonal entry")
    options = parser.parse_args()
    kernel = ntkit.open_kernel(options.folder / f"pntk-{options.n}.zarr")
    labels = cifar10_jpeg().y_train[: options.n].clone()
    start = time.perf_counter()
    with Progress() as progress:
        bar = progress.add_task("reading")
        factored = CholeskyInPlace(torch.float32, tolerance=TOLERANCE).factor(
            kernel, options.ridge, progress=lambda done, total: progress.update(bar, completed=done, total=total)
        )
    middle = time.perf_counter()
    found = factored.solve(F.one_hot(labels, 10).double() - 0.1)
    end = time.perf_counter()
    path = record(
        f"solve-pntk-{options.n}",
        {
            "what": "ridge regression with the exact pNTK on disk: Cholesky in one float32 array, refined in float64",
            "n": options.n,
            "relative_ridge": options.ridge,
            "seconds_read_and_factor": round(middle - start, 1),
            "seconds_solve": round(end - middle, 1),
            "iterations": found.iterations,
            "tolerance": TOLERANCE,
            "converged": found.converged,
            "relative_residual": found.relative_residual,
            "peak_mb": peak_mb(),
        },
    )
    print(path.read_text())


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
