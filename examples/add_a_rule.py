"""An operation that ntkit has no rule for: exact without one, fast with one."""

from __future__ import annotations

import time
import warnings

import torch
from torch import nn

import ntkit
from ntkit.tangent.factors import Outer
from ntkit.tangent.rules.registry import Operand, Use, rule


class Product(nn.Module):
    """A linear layer written with `torch.inner`."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.inner(x, self.weight)


def timed(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    kernel = ntkit.empirical_ntk(model, x, readout=ntkit.SumOfLogits())
    return kernel, time.perf_counter() - start


torch.manual_seed(0)
model = nn.Sequential(Product(256, 1024), nn.Tanh(), Product(1024, 10)).double().eval()
x = torch.randn(128, 256, dtype=torch.float64)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", ntkit.SlowRouteWarning)
    without, slow = timed(model, x)
print(f"without a rule: {slow:.2f} s, and it says:\n  {caught[0].message}")


@rule(torch.inner)
def inner(use: Use, input: Operand, weight: Operand) -> object:
    """y = x W^T: each row of the Jacobian is the outer product of cotangent and input."""
    if input.selected or not weight.selected or input.tensor.ndim != 2 or weight.tensor.ndim != 2:
        return NotImplemented  # the route without a rule takes over
    a = input.per_example(use.examples)[:, None]  # (n, groups = 1, positions = 1, d_in)
    g = use.cotangent[:, :, None]  # (n, k, 1, 1, d_out)
    return [(weight, Outer(a, g, tuple(weight.tensor.shape)))]


with_rule, fast = timed(model, x)
print(f"with the rule: {fast:.2f} s, relative difference {(with_rule - without).norm() / without.norm():.1e}")
assert torch.allclose(with_rule, without)
