"""Covariate shift in images: how often do kernels of networks notice it, beside the usual tests?

    NTKIT_DATA=... python -m benchmarks.twosample.shift --folder work [--data digits,fashion] [--runs 100]

X: images; Y: other images of the same data set, of which every one is noisy, or turned, or a part is of class 0. The
digits of scikit-learn (8 x 8) and Fashion-MNIST (averaged to 14 x 14; left out where NTKIT_DATA does not say where it
is), 1,000 images of each, pixels from 0 to 1. Every run draws 2n of the 1,000 without replacement.

Kernels: the tangent kernel of the sum of logits of a random convolutional network with global average pooling (16
channels, three layers, torch's initialisation; a network of four for each run), the same with all examples scaled to
length 1, and the infinite-width kernel of a fully connected network. Each is the MMD with all pairs; the first and the
second also as NTK-MMD at time zero, which trains on one half. Beside them: the RBF kernel with the median bandwidth and
a classifier (logistic regression, half for training).

Runs are lines of work/shift-*.jsonl; the same command goes on where it was stopped, and writes the record at the end.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.scale.record import record
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.function import KernelFunction
from ntkit.kernel.infinite import InfiniteWidth
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import SumOfLogits
from ntkit.uses import twosample

RECORDS = Path(__file__).parent / "records"
POOL, SIZES, NETWORKS, WIDTH, PERMUTATIONS = 1000, (50, 100, 200), 4, 16, 199
STRENGTHS = {
    "none": (0.0,), "noise": (0.05, 0.1, 0.2), "rotation": (2.0, 4.0, 8.0), "imbalance": (0.1, 0.2, 0.3)
}  # fmt: skip
ABOUT = {"pool": POOL, "networks": NETWORKS, "width": WIDTH, "permutations": PERMUTATIONS}


def network(seed: int, width: int = WIDTH) -> nn.Module:
    """Three convolutions, global average pooling, ten outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body: list[nn.Module] = []
        for inputs in (1, width, width):
            body += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def fully_connected(pixels: int) -> nn.Module:
    """Whose infinite width is taken: two hidden layers of ReLU."""
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def images(data: str) -> tuple[Tensor, Tensor]:
    """Some images (POOL, 1, H, W) from 0 to 1, and their classes."""
    if data == "digits":
        x, y = load_digits(return_X_y=True)
        x = (torch.from_numpy(x).float() / 16).reshape(-1, 1, 8, 8)
    else:
        with np.load(Path(os.environ["NTKIT_DATA"]) / "fashion_mnist.npz") as file:
            x, y = torch.from_numpy(file["x_test"]).float()[:, None] / 255, file["y_test"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:POOL]
    return x[order], torch.from_numpy(y).long()[order]


def small(x: Tensor) -> Tensor:
    """Fashion-MNIST at half its resolution; the digits as they are."""
    return nn.functional.avg_pool2d(x, 2) if x.shape[-1] == 28 else x


def shifted(x: Tensor, kind: str, strength: float) -> Tensor:
    """Every image of the pool, noisy or turned."""
    if kind == "noise":
        return x + strength * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    if kind == "rotation":
        angle = torch.tensor(strength).deg2rad()
        turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
        grid = nn.functional.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return nn.functional.grid_sample(x, grid, align_corners=False)
    return x


def rows(x: Tensor, seed: int) -> Tensor:
    """Gradients of the sum of logits of a random network, (N, P)."""
    return linearize(network(seed), readout=SumOfLogits()).jacobian(x)


@cache
def clean_rows(data: str, seed: int) -> Tensor:
    """Those of the images as they are."""
    return rows(Setting(data, "none", 0.0).pool[0][:POOL], seed)


@dataclass(frozen=True)
class Looked(KernelFunction):
    """A kernel between numbers of examples, looked up in a matrix; `scaled` to k(x, x) = 1."""

    matrix: Tensor
    scaled: bool = False

    def __call__(self, x1: Tensor, x2: Tensor | None = None) -> DenseKernel:
        left, right = x1[:, 0], (x1 if x2 is None else x2)[:, 0]
        found = self.matrix[left][:, right].double()
        if self.scaled:
            own = self.matrix.diagonal().double().sqrt()
            found = found / own[left][:, None] / own[right]
        return DenseKernel(found, symmetric=x2 is None)


@dataclass(frozen=True, eq=False)
class Setting:
    """A data set and a shift: the pool, its shifted copy after it, and the kernels between all of these."""

    data: str
    kind: str
    strength: float

    @cached_property
    def pool(self) -> tuple[Tensor, Tensor]:
        x, y = images(self.data)
        clean, other = small(x), small(shifted(x, self.kind, self.strength))
        centre, scale = clean.mean(), clean.std()
        return (torch.cat([clean, other]) - centre) / scale, y

    @cached_property
    def tangents(self) -> list[Tensor]:
        """One matrix for each network."""
        found = []
        for seed in range(NETWORKS):
            clean = other = clean_rows(self.data, seed)
            if self.kind in {"noise", "rotation"}:
                other = rows(self.pool[0][POOL:], seed)
            both = torch.cat([clean, other])
            found.append(both @ both.T)
        return found

    @cached_property
    def infinite(self) -> Tensor:
        x = self.pool[0].double()
        return InfiniteWidth(fully_connected(x[0].numel()))(x).dense()

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Numbers of examples, (n, 1) each; those of shifted images begin at POOL."""
        order = torch.randperm(POOL, generator=generator)
        if self.kind != "imbalance":
            return order[:n, None], POOL + order[n : 2 * n, None]
        ours, theirs = order[:n], order[n:]
        replaced = int(torch.rand(n, generator=generator).less(self.strength).sum())
        rest, spare = theirs[: n - replaced], theirs[n - replaced :]
        zeros = spare[self.pool[1][spare] == 0]  # now and then a few less than wanted at the largest size
        return ours[:, None], torch.cat([rest, zeros[:replaced]])[:, None]

    def tangent(self, x: Tensor, y: Tensor, g: torch.Generator, *, scaled: bool, half: bool) -> twosample.TestResult:
        kernel = Looked(self.tangents[int(torch.randint(NETWORKS, (1,), generator=g))], scaled)
        if half:
            witness = twosample.KernelWitness(kernel)
            return twosample.witness_test(x, y, witness=witness, permutations=PERMUTATIONS, generator=g)
        return twosample.two_sample_test(x, y, kernel=kernel, permutations=PERMUTATIONS, generator=g)

    def wide(self, x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
        kernel = Looked(self.infinite)
        return twosample.two_sample_test(x, y, kernel=kernel, permutations=PERMUTATIONS, generator=g)

    def rbf(self, x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
        a, b = (self.pool[0][t[:, 0]] for t in (x, y))
        return twosample.rbf_test(a, b, permutations=PERMUTATIONS, generator=g)

    def classifier(self, x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
        a, b = (self.pool[0][t[:, 0]] for t in (x, y))
        return twosample.classifier_test(a, b, permutations=PERMUTATIONS, generator=g)

    @property
    def tests(self) -> dict[str, Callable[..., Any]]:
        return {
            "conv. NTK": partial(self.tangent, scaled=False, half=False),
            "conv. NTK, scaled": partial(self.tangent, scaled=True, half=False),
            "NTK-MMD": partial(self.tangent, scaled=False, half=True),
            "NTK-MMD, scaled": partial(self.tangent, scaled=True, half=True),
            "infinite FC NTK": self.wide,
            "RBF": self.rbf,
            "classifier": self.classifier,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", default="digits,fashion")
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    for data in options.data.split(","):
        if data == "fashion" and "NTKIT_DATA" not in os.environ:
            print("Fashion-MNIST is left out: NTKIT_DATA does not say where it is")
            continue
        lines = []
        for kind, strengths in STRENGTHS.items():
            for strength in strengths:
                start, setting = time.perf_counter(), Setting(data, kind, strength)
                curve = twosample.power_curve(
                    setting.draw, setting.tests, SIZES, runs=options.runs,
                    path=options.folder / f"shift-{data}-{kind}-{strength:g}.jsonl",
                    about={**ABOUT, "data": data, "kind": kind, "strength": strength},
                )  # fmt: skip
                print(f"{data}, {kind} {strength:g}, {time.perf_counter() - start:.0f} s\n{curve}", flush=True)
                power, errors = curve.power(), curve.standard_error()
                lines += [
                    {
                        "data": data, "shift": kind, "strength": strength, "test": name,
                        "power": [round(float(p), 4) for p in power[name]],
                        "standard_error": [round(float(e), 4) for e in errors[name]],
                        "seconds": round(curve.seconds[name], 4),
                    }
                    for name in power
                ]  # fmt: skip
        record(f"shift_{data}", {**ABOUT, "runs": options.runs, "sizes": list(SIZES), "lines": lines}, RECORDS)


if __name__ == "__main__":
    main()
