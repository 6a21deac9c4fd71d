"""How the kernel's drift and the gap to its flow fall with width: five widths, five networks of each.

    python -m benchmarks.dynamics.constancy

A network of one hidden layer on noisy points of a curve, trained for 60 full-batch steps: with all weights standard
normal and the sum over 1/sqrt(width) (the scaling of the theory), and with torch's usual weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.scale.record import record
from ntkit.uses.dynamics import constancy

RESULTS = Path(__file__).parent / "records"
WIDTHS, SEEDS, STEPS = (32, 64, 128, 256, 512), 5, 60


class Scaled(nn.Module):
    """v tanh(W x) / sqrt(width), standard normal weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, 2, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(width, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.W).tanh() @ self.v / len(self.v) ** 0.5


def usual(width: int) -> nn.Module:
    """As torch draws them."""
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()


NETWORKS = {"scaled": Scaled, "usual": usual}


def sentence() -> str:
    """The record as it stands in the page."""
    found = json.loads((RESULTS / "constancy.json").read_text())
    one, two = (found[name] for name in NETWORKS)
    return (
        f"as width^{one['drift_slope']:.2f} and width^{one['gap_slope']:.2f} in the scaling of the theory, and as "
        f"width^{two['drift_slope']:.2f} and width^{two['gap_slope']:.2f} with torch's usual weights"
    )


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x, new = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (12, 20))
    y = torch.sin(2 * x[:, :1]) + 0.1 * torch.randn(12, 1, generator=generator, dtype=torch.float64)
    kinds = {}
    for name, network in NETWORKS.items():
        found = constancy(network, WIDTHS, (x, y), new, generator=generator, steps=STEPS, seeds=SEEDS)
        lines = [
            {"width": one.width, "drift": float(f"{one.drift:.4g}"), "gap": float(f"{one.gap:.4g}")}
            for one in found.networks
        ]
        slopes = {"drift_slope": round(found.drift_slope, 3), "gap_slope": round(found.gap_slope, 3)}
        kinds[name] = {**slopes, "lines": lines}
    record("constancy", kinds, RESULTS)
    print(sentence())


if __name__ == "__main__":
    main()
