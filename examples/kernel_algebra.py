"""Kernels made of kernels: drawn from, conditioned on data, approximated by features, and searched over in a grid.

Writes kernel_algebra.svg into the folder that is given, or into the current one.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import nn

from ntkit import RBF, DotProduct, InfiniteWidth, KernelMatrix, Nystrom, Posterior, RandomFourier

generator = torch.Generator().manual_seed(0)
network = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
wide = InfiniteWidth(network, weight_std=1.4, bias_std=0.5)
figure, ((prior_axes, posterior_axes), (error_axes, grid_axes)) = plt.subplots(
    2, 2, figsize=(8, 6), layout="constrained"
)

# A prior: a network of infinite width, and beside it one whose values are alike only near each other.
line = torch.linspace(-3, 3, 151, dtype=torch.float64)[:, None]
k = 0.1 * wide + wide.normalised() * RBF(0.5)
noise = torch.randn(len(line), 4, generator=generator, dtype=torch.float64)


def draws(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky(matrix + 1e-8 * torch.eye(len(matrix))) @ noise


prior_axes.plot(line, draws(k(line).dense()), lw=1)
prior_axes.set_title("functions of the prior")

# The same after ten noisy values. All in the formula of the posterior is a kernel function again.
x = 4 * torch.rand(10, 1, generator=generator, dtype=torch.float64) - 2
y = torch.sin(3 * x) + 0.1 * torch.randn(10, 1, generator=generator, dtype=torch.float64)
posterior = Posterior(k, x, ridge=0.01)
mean, spread = posterior.mean(line, y)[:, 0], posterior.diagonal(line).clamp_min(0).sqrt()
posterior_axes.fill_between(line[:, 0], mean - 2 * spread, mean + 2 * spread, color="0.9")
posterior_axes.plot(line, mean[:, None] + draws(posterior(line).dense()), lw=1)
posterior_axes.plot(x, y, "k.", line, mean, "k--", lw=1)
posterior_axes.set_title("the same, conditioned on ten values")

# Features: random ones gain by the root of their number, landmarks by how fast the spectrum falls.
pixels, digits = load_digits(return_X_y=True)
images = torch.tensor(pixels[:400] / 16)
rbf, sizes = RBF.median(images), (16, 32, 64, 128, 256)
exact = rbf(images).dense()
for name, function in (
    ("random Fourier", lambda size: RandomFourier(rbf, size, generator=generator)),
    ("Nystrom", lambda size: Nystrom.drawn(rbf, images, size, generator=generator)),
):
    errors = [float((function(size)(images).dense() - exact).norm() / exact.norm()) for size in sizes]
    error_axes.loglog(sizes, errors, "o-", ms=4, label=name)
error_axes.loglog(sizes, [0.5 / size**0.5 for size in sizes], ":", color="0.5", label="slope -1/2")
error_axes.set(xlabel="features", title="error of the kernel of 400 digits")
error_axes.set_xticks(sizes, sizes)
error_axes.minorticks_off()
error_axes.legend(loc="best", frameon=False)

# A grid over kernels, as over any other setting.
net = InfiniteWidth(nn.Sequential(nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 1)), weight_std=1.4)
kernels = {"linear": DotProduct(), "RBF": RBF(8.0), "network": net, "network x RBF": net * RBF(16.0)}
pipeline = make_pipeline(StandardScaler(), KernelMatrix(), SVC(kernel="precomputed"))
noisy = pixels[:500] + np.random.default_rng(0).normal(scale=5, size=(500, 64))
grid = {"kernelmatrix__kernel": list(kernels.values()), "svc__C": [0.1, 10.0]}
found = GridSearchCV(pipeline, grid, cv=3).fit(noisy, digits[:500]).cv_results_["mean_test_score"].reshape(-1, 2)
grid_axes.barh(list(kernels), found.max(1), height=0.6)
grid_axes.set(xlim=(0.5, 1), title="accuracy on 500 noisy digits (3 folds)")
figure.savefig(Path(*sys.argv[1:2]) / "kernel_algebra.svg", metadata={"Date": None})
print(dict(zip(kernels, found.max(1).round(3).tolist(), strict=True)))
