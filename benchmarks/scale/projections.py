"""Sketched features beside what people do today: rows by torch.func, projected densely by TRAK's basic projector.

    pip install --no-deps traker==0.3.2
    python -m benchmarks.scale.projections W2 W3

Speed on the benchmark's CNN and ResNet-18 at initialisation, pNTK, D = 4,096, in one process, the two in turns; and the
error of both against the exact kernel of 48 examples over several random maps, with random data as in the benchmark.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import ntkit
from benchmarks.scale.record import record
from benchmarks.workloads import WORKLOADS
from ntkit.tangent.sketch import Sketch

SIZE = 4096
ROUNDS = {"W2": 3, "W3": 1}
# Examples of a speed measurement, examples whose gradients vmap takes at once, and random maps for the error.
EXAMPLES = {"W2": 128, "W3": 16}
CHUNK = {"W2": 16, "W3": 4}
MAPS = {"W2": 40, "W3": 10}
# Columns of the dense map that TRAK makes at once: 200 of its default would be 9 GB for W3.
COLUMNS = {"W2": 200, "W3": 16}
SAMPLED = 48


class Rows:
    """Per-example gradients by vmap(grad), put together, and projected."""

    def __init__(self, model: torch.nn.Module, chunk: int, columns: int) -> None:
        from trak.projectors import BasicProjector, ProjectionType

        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        self.buffers, self.model, self.chunk = dict(model.named_buffers()), model, chunk
        count = sum(p.numel() for p in self.parameters.values())
        self.projector = BasicProjector(count, SIZE, 0, ProjectionType.rademacher, "cpu", block_size=columns)

    def rows(self, x: Tensor) -> Tensor:
        def scalar(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
            return functional_call(self.model, (parameters, self.buffers), (one[None],)).sum() / 10**0.5

        parts = [vmap(grad(scalar), (None, 0))(self.parameters, some) for some in x.split(self.chunk)]
        return torch.cat([torch.cat([g.flatten(1) for g in part.values()], 1) for part in parts])

    def __call__(self, x: Tensor) -> Tensor:
        return self.projector.project(self.rows(x), model_id=0)

    def products(self, rows: Tensor, columns: int = 64) -> float:
        """Seconds of the products alone, for a dense map that is there already, from some of its columns."""
        dense = torch.randn(rows.shape[1], columns)
        return min(seconds(lambda: rows @ dense) for _ in range(3)) * SIZE / columns


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(name: str) -> dict[str, Any]:
    model = WORKLOADS[name].model()
    x, sample = WORKLOADS[name].data(EXAMPLES[name]), WORKLOADS[name].data(SAMPLED)
    tangent = ntkit.linearize(model, readout=ntkit.SumOfLogits())
    ours, theirs = ntkit.FeatureMap(tangent, Sketch(SIZE, 0)), Rows(model, CHUNK[name], COLUMNS[name])
    ours(x)  # the trial run
    theirs.rows(x[: CHUNK[name]])
    mine, rows, whole = [], [], []
    for _ in range(ROUNDS[name]):
        mine.append(seconds(lambda: ours(x)))
        rows.append(seconds(lambda: theirs.rows(x)))
        whole.append(seconds(lambda: theirs(x)))
    exact = ntkit.TangentKernel(tangent, sample).dense().double()
    size = exact.norm()

    def error(phi: Tensor) -> float:
        return float((phi.double() @ phi.double().T - exact).norm() / size)

    errors = [error(ntkit.FeatureMap(tangent, Sketch(SIZE, seed))(sample)) for seed in range(MAPS[name])]
    diagonal = exact.diagonal()
    dense = float(((torch.outer(diagonal, diagonal) + exact.square()).sum() / SIZE).sqrt() / size)
    return {
        "workload": name, "examples": EXAMPLES[name], "parameters": tangent.count,
        "seconds_ntkit": statistics.median(mine), "seconds_rows": statistics.median(rows),
        "seconds_rows_and_trak": statistics.median(whole),
        "seconds_of_dense_products_alone": theirs.products(theirs.rows(x)),
        "times_faster": round(statistics.median(b / a for a, b in zip(mine, whole, strict=True)), 1),
        "error_ntkit": (sum(e**2 for e in errors) / len(errors)) ** 0.5, "maps": len(errors),
        "error_dense_gaussian_expected": dense,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=EXAMPLES)
    options = parser.parse_args()
    found = {
        "what": f"sketched features of the pNTK, D = {SIZE:,}, and rows by vmap(grad) projected by traker 0.3.2",
        "workloads": [compare(name) for name in options.workloads],
    }
    print(record("projections", found).read_text())


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
