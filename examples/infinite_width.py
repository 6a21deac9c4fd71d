"""A network, the kernel that it has at infinite width, and how far finite ones are from it.

Writes infinite_width.svg into the folder that is given, or into the current one.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from ntkit import DenseKernel, InfiniteWidth, empirical_ntk, infinite_ntk
from ntkit.kernel.infinite import Standard
from ntkit.solve.regression import regress


class Residual(nn.Module):
    """Any module that torch.fx can trace: branches, sums and functional calls are read as they are written."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(n, width, 3, padding=1) for n in (1, width, width))
        self.head = nn.Linear(16 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(F.avg_pool2d(x, 2))
        h = h + self.two(F.gelu(self.one(F.gelu(h))))
        return self.head(F.gelu(h).flatten(1))


data = load_digits()
images = torch.tensor(data.images)[:, None].double() / 16
labels = torch.tensor(data.target)
torch.manual_seed(0)

# As PyTorch initialises it: which layers were found, with which variances.
print(InfiniteWidth(Residual(64)).listing(images[:2]))

# Finite networks approach the limit with the root of their width.
few, widths, errors = images[:8], (8, 16, 32, 64, 128), []
for width in widths:
    limit = infinite_ntk(Residual(width), few)
    found = [empirical_ntk(Residual(width).double().eval(), few, trace=True) for _ in range(4)]
    errors.append([float((k - limit).norm() / limit.norm()) for k in found])

# Kernel regression with the limit, beside the kernel of one finite network, on more and more digits.
sizes, scores = (50, 100, 200, 400), {"infinite width": [], "width 32": []}
test, truth = images[1000:1300], labels[1000:1300]
finite = Residual(32).double().eval()
for n in sizes:
    x, y = images[:n], F.one_hot(labels[:n], 10).double() - 0.1
    for name, kernel in (
        ("infinite width", lambda a, b=None: infinite_ntk(Residual(32), a, b, parametrization=Standard())),
        ("width 32", lambda a, b=None: empirical_ntk(finite, a, b, trace=True)),
    ):
        fit = regress(DenseKernel(kernel(x)), y, 1e-4)
        scores[name].append(float((fit.predict(kernel(test, x)).argmax(1) == truth).double().mean()))
for name, values in scores.items():
    print(f"{name}: " + ", ".join(f"{value:.1%} with {n}" for n, value in zip(sizes, values, strict=True)))

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
left.loglog(widths, errors, "o", color="tab:blue", markersize=4)
mean = [sum(e) / len(e) for e in errors]
left.loglog(widths, [mean[0] * (widths[0] / w) ** 0.5 for w in widths], color="gray", label="width$^{-1/2}$")
left.set(xlabel="width", title="Distance of one network's kernel\nfrom the limit (relative)")
left.set_xticks(widths, [str(w) for w in widths], minor=False)
left.minorticks_off()
left.legend(loc="best")
for name, values in scores.items():
    right.semilogx(sizes, values, "o-", markersize=4, label=name)
right.set(xlabel="labels", title="Accuracy of regression on new digits")
right.set_xticks(sizes, [str(n) for n in sizes], minor=False)
right.minorticks_off()
right.legend(loc="best")
figure.savefig(Path(*sys.argv[1:2]) / "infinite_width.svg", metadata={"Date": None})
