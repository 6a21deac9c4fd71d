"""The exact tangent kernel of a network in one line, and a check against the Jacobian itself."""

from __future__ import annotations

import torch
from torch import nn

import ntkit

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
x = torch.randn(64, 784)

kernel = ntkit.empirical_ntk(model, x)
print(f"full kernel: {tuple(kernel.shape)}")

pntk = ntkit.empirical_ntk(model, x, readout=ntkit.SumOfLogits())
trace = ntkit.empirical_ntk(model, x, trace=True)
cross = ntkit.empirical_ntk(model, x[:5], x[5:12])
print(f"pNTK: {tuple(pntk.shape)}   trace kernel: {tuple(trace.shape)}   two sets: {tuple(cross.shape)}")

# The same by its definition, for the first four examples: every row of the Jacobian, then one matrix product.
rows = [
    torch.cat([g.flatten() for g in torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True)])
    for scalar in model(x[:4]).flatten()
]
jacobian = torch.stack(rows)  # (4 * 10, P)
expected = jacobian @ jacobian.T
error = (kernel[:40, :40] - expected).norm() / expected.norm()
print(f"relative difference from J J^T: {error:.1e}")
assert error < 1e-5
