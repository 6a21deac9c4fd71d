"""The published power table of NTK-MMD (Cheng and Xie 2021): X ~ N(0, I) against Y ~ N(0, I + rho 11^T), d = 100.

    python -m benchmarks.twosample.power --folder work [--runs 500]

200 examples of each, half for training; a network a^T softplus(W x + b) of width 512 with a frozen; the witness of one
pass of online SGD, and the exact one at time zero; 400 permutations, level 0.05. Beside them the RBF kernel with the
median bandwidth, and a classifier. Every run has a network of its own. Runs are lines of work/power.jsonl; the same
command goes on where it was stopped, and writes the record when all are there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.scale.record import record
from ntkit.uses import twosample

RECORDS = Path(__file__).parent / "records"
RHOS = (0.0, 0.04, 0.08, 0.12, 0.16)
D, N, WIDTH, RATE, PERMUTATIONS = 100, 200, 512, 1e-3, 400
LEVELS = (0.01, 0.05, 0.1, 0.2, 0.5)
# of the source, 500 runs
PUBLISHED = {0.0: 0.058, 0.04: 0.130, 0.08: 0.430, 0.12: 0.824, 0.16: 0.960}
ABOUT = {"d": D, "n": N, "width": WIDTH, "rate": RATE, "permutations": PERMUTATIONS}


def network(generator: torch.Generator, d: int = D, width: int = WIDTH) -> nn.Module:
    """a^T softplus(W x + b) with W ~ N(0, 1), b = 0 and a ~ N(0, 1/width), which is frozen."""
    hidden, readout = nn.Linear(d, width), nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        hidden.weight.normal_(generator=generator)
        hidden.bias.zero_()
        readout.weight.normal_(generator=generator).div_(width**0.5)
    readout.requires_grad_(False)
    return nn.Sequential(hidden, nn.Softplus(), readout).eval()


def gaussians(rho: float, generator: torch.Generator, n: int = N, d: int = D) -> tuple[Tensor, Tensor]:
    """X and Y."""
    x, y = (torch.randn(n, d, generator=generator) for _ in range(2))
    return x, y + rho**0.5 * torch.randn(n, 1, generator=generator)


def trained(x: Tensor, y: Tensor, generator: torch.Generator) -> twosample.TestResult:
    witness = twosample.OnlineTraining(network(generator), RATE)
    return twosample.witness_test(x, y, witness=witness, permutations=PERMUTATIONS, generator=generator)


def exact(x: Tensor, y: Tensor, generator: torch.Generator) -> twosample.TestResult:
    witness = twosample.ZeroTime(network(generator))
    return twosample.witness_test(x, y, witness=witness, permutations=PERMUTATIONS, generator=generator)


def rbf(x: Tensor, y: Tensor, generator: torch.Generator) -> twosample.TestResult:
    return twosample.rbf_test(x, y, permutations=PERMUTATIONS, generator=generator)


def classifier(x: Tensor, y: Tensor, generator: torch.Generator) -> twosample.TestResult:
    return twosample.classifier_test(x, y, permutations=PERMUTATIONS, generator=generator)


TESTS = {"SGD": trained, "time zero": exact, "RBF": rbf, "classifier": classifier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def told(done: int, total: int) -> None:
        if done % 100 == 0:
            print(f"{done} of {total}, {time.perf_counter() - start:.0f} s", flush=True)

    curve = twosample.power_curve(
        gaussians, TESTS, RHOS, runs=options.runs, path=options.folder / "power.jsonl", about=ABOUT, progress=told
    )
    print(curve)
    errors, power = curve.standard_error(), curve.power()
    lines = [
        {
            "test": name, "power": [round(float(p), 4) for p in power[name]],
            "standard_error": [round(float(e), 4) for e in errors[name]], "seconds": round(curve.seconds[name], 4),
            # shares of p-values at or below each level without a difference
            "levels": {str(level): round(float(curve.power(level)[name][0]), 4) for level in LEVELS},
        }
        for name in TESTS
    ]  # fmt: skip
    record("power", {**ABOUT, "runs": curve.runs, "rhos": list(RHOS), "lines": lines}, RECORDS)


if __name__ == "__main__":
    main()
