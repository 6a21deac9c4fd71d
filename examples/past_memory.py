"""Past the matrix: the error of sketched features by their number, and exact solves from products alone.

Writes past_memory.svg into the folder that is given, or into the current one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.solve.iterative import ConjugateGradients
from ntkit.solve.nystrom import nystrom
from ntkit.solve.precondition import coupling, kronecker
from ntkit.solve.ridge import Absolute

pixels, digits = load_digits(return_X_y=True)
x, y = torch.tensor(pixels[:100] / 16), torch.tensor(digits[:100])
torch.manual_seed(0)
model = nn.Sequential(
    nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
    nn.Flatten(), nn.Linear(32 * 64, 64), nn.ReLU(), nn.Linear(64, 10),
).double()  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
for _ in range(30):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
tangent, generator = ntkit.linearize(model.eval()), torch.Generator().manual_seed(1)

figure = Figure(figsize=(7.6, 3.2), layout="constrained")
left, right = figure.subplots(1, 2)
sizes = [256, 512, 1024, 2048, 4096]
for number in range(6):
    made = [ntkit.features(tangent, x, size=size, trace=True, generator=generator) for size in sizes]
    errors = [each.error(examples=50, generator=generator) for each in made]
    left.plot(sizes, [e.error for e in errors], "o", color="C1", alpha=0.5, label="" if number else "six random maps")
left.plot(sizes, [e.expected for e in errors], "--", label="dense Gaussian maps, expected")
left.set(xscale="log", yscale="log", xlabel="features D", ylabel="relative Frobenius error")
left.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
left.set_xticks([], minor=True)
left.legend(loc="best", frameon=False, fontsize="small")

full = ntkit.TangentKernel(tangent, x)
matrix, targets = full.dense(), (F.one_hot(y, 10).double() - 0.1).reshape(-1)
ridge = 1e-4 * float(matrix.diagonal().mean())
blocks = coupling(tangent, x, generator=generator)
trace = kronecker(ntkit.TangentKernel(tangent, x, trace=True), blocks, ridge)
sketch = ntkit.features(tangent, x, size=2048, trace=True, generator=generator)
helpers = {
    "plain": None,
    "trace kernel (x) B": trace,
    "sketch (x) B": kronecker(sketch, blocks, ridge),
    "Nystrom, 10 examples": nystrom(full, ridge, examples=10, generator=generator),
    "Nystrom and trace (x) B": nystrom(full, ridge, examples=10, generator=generator, base=trace),
}
for name, helper in helpers.items():
    found = ConjugateGradients(preconditioner=helper, iterations=2000).solve(matrix, targets, Absolute(ridge))
    print(f"{name:24} {found.iterations:5d} products, residual {found.relative_residual:.1e}")
    right.plot(range(1, found.iterations + 1), found.history, label=name)
right.set(yscale="log", xscale="log", xlabel="products with the full kernel", ylabel="relative residual")
right.legend(loc="best", frameon=False, fontsize="small")
figure.savefig(Path(*sys.argv[1:2]) / "past_memory.svg", metadata={"Date": None})
