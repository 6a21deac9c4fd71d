"""Classification with the kernel of an untrained network, and the ridge chosen without a validation set.

Writes regression.svg into the folder that is given, or into the current one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ntkit
from ntkit.solve.estimators import MLP
from ntkit.solve.regression import KernelRegression
from ntkit.solve.ridge import GCV

pixels, digits = load_digits(return_X_y=True)
noisy = pixels / 16 + np.random.default_rng(0).normal(scale=0.4, size=pixels.shape)
x_train, x_test, y_train, y_test = train_test_split(noisy, digits, train_size=600, random_state=0, stratify=digits)

classifier = ntkit.NTKClassifier(MLP(256), readout=ntkit.SumOfLogits(), ridge=GCV(), random_state=0)
classifier.fit(x_train, y_train)
print(f"ridge found by GCV: {classifier.relative_ridge_:.2g} of the mean diagonal")
print(f"accuracy: leave-one-out {classifier.loo_accuracy_:.3f}, test {classifier.score(x_test, y_test):.3f}")

# The same by hand: one eigendecomposition, then every ridge for next to nothing, and the truth beside the promises.
tangent = ntkit.linearize(classifier.model_, readout=ntkit.SumOfLogits())
train, test = torch.tensor(x_train), torch.tensor(x_test)
targets, truth = torch.eye(10, dtype=torch.float64)[y_train], torch.eye(10, dtype=torch.float64)[y_test]
regression = KernelRegression.decompose(ntkit.TangentKernel(tangent, train), targets)
curve = regression.curve(tuple(np.logspace(-5, 1, 25)))
cross = ntkit.TangentKernel(tangent, test, train).dense()
error = [float((cross @ regression.coefficients(r) - truth).square().sum(1).mean()) for r in curve.absolute.tolist()]

axes = (figure := Figure(figsize=(5.2, 3.2), layout="constrained")).add_subplot()
axes.semilogx(curve.relative, curve.leave_one_out, label="leave-one-out")
axes.semilogx(curve.relative, curve.gcv, "--", label="GCV")
axes.semilogx(curve.relative, error, label="1,197 test examples")
axes.set_xlabel("ridge, relative to the mean diagonal")
axes.set_ylabel("mean squared error")
axes.legend(loc="best", frameon=False)
figure.savefig(Path(*sys.argv[1:2]) / "regression.svg", metadata={"Date": None})
best = int(np.argmin(error))
print(f"least test error {error[best]:.3f} at ridge {curve.relative[best]:.2g}; GCV there {curve.gcv[best]:.3f}")
