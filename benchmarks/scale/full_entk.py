"""Regression with the full eNTK of lossless CIFAR-10 images and a CNN of W2's size, without the matrix.

    NTKIT_DATA=... python -m benchmarks.scale.full_entk 4000 --folder /tmp/full
    NTKIT_DATA=... python -m benchmarks.scale.full_entk 500 --folder /tmp/check --double --dense

Conjugate gradients on products J (J^T v) in float32, with the units of ReLU on the side that float64 has them, and led
back by products in float64 now and then. The preconditioner comes from one sketch of the full kernel, streamed to disk:
the trace kernel (x) B, and on its leading fifth of eigenvectors the sketched full kernel. The ridge is that of the
trace kernel's own GCV. With --dense the matrix is formed as well, in float64, and the two answers are compared.
Everything is kept in FOLDER; the same command goes on where the last has stopped.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

import ntkit
from benchmarks.scale.data import cifar10_jpeg, cifar10_lossless
from benchmarks.scale.record import peak_mb, record
from benchmarks.scale.sketched import Clock, accuracy, network
from ntkit.kernel.matrixfree import MatrixFreeKernel
from ntkit.solve.coarse import coarse
from ntkit.solve.direct import Cholesky
from ntkit.solve.iterative import ConjugateGradients
from ntkit.solve.precondition import KroneckerPreconditioner, coupling, kronecker
from ntkit.solve.regression import KernelRegression
from ntkit.solve.ridge import GCV, Absolute
from ntkit.tangent.sketch import Sketch

SIZE = 16384
# Of the trace kernel's eigenvectors, on how many the full kernel is looked at; and how much larger a ridge serves the
# rest best (measured on 400 images).
SHARE, DAMPED = 0.2, 3.0
# Examples whose features are read at once: 330 MB.
STRIP = 500


def trace_kernel(features: ntkit.FeatureKernel, outputs: int) -> Tensor:
    """The mean over the outputs of their sketched kernels, (N, N)."""
    n = features.shape[0] // outputs
    total = torch.empty(n, n, dtype=features.dtype)

    def block(a: int) -> Tensor:
        """All features of some examples, end to end: their products are sums over the outputs."""
        return features.features(slice(a * outputs, min(a + STRIP, n) * outputs)).reshape(-1, outputs * features.size)

    for a in range(0, n, STRIP):
        left = block(a)
        for b in range(a, n, STRIP):
            part = left @ (left if a == b else block(b)).T / outputs
            total[a : a + STRIP, b : b + STRIP] = part
            total[b : b + STRIP, a : a + STRIP] = part.T
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative residual")
    parser.add_argument("--double", action="store_true", help="float64 throughout")
    parser.add_argument("--dense", action="store_true", help="form the matrix as well, and compare")
    parser.add_argument("--plain", action="store_true", help="without a preconditioner")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(folder / "seconds.json")
    dtype = torch.float64 if options.double else torch.float32
    with Progress() as bars:
        with clock.step("reading the images", bars):
            data = cifar10_lossless(4000).first(options.n)
            x, labels = data.x_train.to(dtype).clone(), data.y_train
        y = F.one_hot(labels, 10).double() - 0.1
        tangent = ntkit.linearize(network(3).eval().to(dtype))
        exact = None
        if not options.double:
            exact = MatrixFreeKernel(ntkit.linearize(copy.deepcopy(tangent.model).double()), x.double())
        full = MatrixFreeKernel(tangent, x, exact=exact)
        with clock.step("sketch of the full kernel", bars) as tick:
            sketched = ntkit.FeatureMap(tangent, Sketch(SIZE, 1)).save(x, folder / "sketch.zarr", progress=tick)
        with clock.step("preconditioner", bars):
            trace = trace_kernel(sketched, 10)
            diagonal = float(trace.diagonal().double().mean())  # about the full kernel's, which would take minutes
            ridge = KernelRegression.decompose(trace, y).fit(GCV()).relative_ridge * diagonal
            outputs = coupling(tangent, x, generator=torch.Generator().manual_seed(0))
            base = kronecker(trace, outputs, DAMPED * ridge)
            assert isinstance(base, KroneckerPreconditioner)
            helper = coarse(sketched, base.vectors[:, -int(SHARE * options.n) :], ridge, base=base)
        with clock.step("conjugate gradients", bars) as tick:
            solver = ConjugateGradients(
                options.tolerance, 3000, None if options.plain else helper, folder / "state.safetensors"
            )
            found = solver.solve(
                full, y.reshape(-1), Absolute(ridge), exact=exact,
                progress=lambda n, error: print(f"{n:4d} {error:.2e}", flush=True),
            )  # fmt: skip
        facts: dict[str, Any] = {
            "what": "regression with the full eNTK of a CNN of W2's size at initialisation, by products alone",
            "data": data.name,
            "n": options.n,
            "rows": full.shape[0],
            "dtype": str(dtype).removeprefix("torch."),
            "relative_ridge": ridge / diagonal,
            "iterations": found.iterations,
            "tolerance": options.tolerance,
            "converged": found.converged,
            "relative_residual": found.relative_residual,
        }
        with clock.step("predictions on the test images", bars):
            step = tangent.vjp(x, found.value.view(-1, 10).to(dtype))
            test = cifar10_jpeg()
            # those images were standardised by their own training images' mean and deviation
            facts["test_accuracy_jpeg_q75"] = accuracy(tangent.jvp(test.x_test.to(dtype), step), test.y_test)
        facts |= {"steps_seconds": clock.seconds, "seconds": round(sum(clock.seconds.values()), 1)}
        facts["peak_mb"] = peak_mb()
        if options.dense:
            matrix = full.dense() if exact is None else exact.dense()
            exact = Cholesky().factor(matrix, Absolute(ridge)).solve(y.reshape(-1))
            facts["dense"] = {
                "relative_difference": float((found.value - exact.value).norm() / exact.value.norm()),
                "relative_residual": exact.relative_residual,
                "peak_mb": peak_mb(),
            }
    print(record(f"full-entk-{options.n}{'-float64' * options.double}", facts).read_text())


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
