"""A few handwritten digits, classified by support vector machines on kernels of infinite and of real networks.

Writes small_data_svm.svg into the folder that is given, or into the current one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import ntkit
from ntkit import SVM, FullyConnected, NTKSVMSearch
from ntkit.solve.mlp import MLP

# 1. A table of sixty wines: depth, fixed layers and C are found by cross-validation.
wines, growers = load_wine(return_X_y=True)
x, x_test, y, y_test = train_test_split(wines, growers, train_size=60, random_state=0, stratify=growers)
search = make_pipeline(StandardScaler(), NTKSVMSearch()).fit(x, y)
found = search[-1]
print(f"wine: {found.best_params_}, held out {found.best_score_:.3f}, test {search.score(x_test, y_test):.3f}")

# 2. The head is an object: the same classifier on the kernel of an infinitely wide network, of a network as it was
#    initialised, and of that network's last layer.
MACHINES = {
    "infinite network": ntkit.NTKClassifier(FullyConnected(3), head=SVM(10.0)),
    "network of 256 units, eNTK": ntkit.NTKClassifier(
        MLP(256), readout=ntkit.SumOfLogits(), head=SVM(10.0), random_state=0
    ),
    "its last layer": ntkit.NTKClassifier(
        MLP(256), readout=ntkit.SumOfLogits(), parameters="readout.*", head=SVM(10.0), random_state=0
    ),
    "RBF, C and width searched": GridSearchCV(
        SVC(), {"C": 10.0 ** np.arange(-1, 4), "gamma": 2.0 ** np.arange(-8, 1)}, cv=2
    ),
}
SIZES, DRAWS = (20, 40, 80, 160), 5
pixels, digits = load_digits(return_X_y=True)
scores = {name: np.zeros((DRAWS, len(SIZES))) for name in MACHINES}
for draw in range(DRAWS):
    few, new, labels, truth = train_test_split(
        pixels / 8 - 1, digits, train_size=max(SIZES), random_state=draw, stratify=digits
    )
    for column, size in enumerate(SIZES):
        part = np.arange(max(SIZES))
        if size < max(SIZES):
            part = train_test_split(part, train_size=size, random_state=draw, stratify=labels)[0]
        for name, machine in MACHINES.items():
            scores[name][draw, column] = machine.fit(few[part], labels[part]).score(new[:800], truth[:800])

axes = (figure := Figure(figsize=(5.2, 3.4), layout="constrained")).add_subplot()
for name, of in scores.items():
    mean, error = of.mean(0), of.std(0, ddof=1) / DRAWS**0.5
    axes.errorbar(SIZES, mean, error, fmt="o-", ms=3, lw=1.2, capsize=2, label=name)
    print(f"{name:28s}" + "  ".join(f"n={n}: {m:.3f} ± {e:.3f}" for n, m, e in zip(SIZES, mean, error, strict=True)))
axes.set_xscale("log")
axes.set_xticks(SIZES, [str(size) for size in SIZES])
axes.minorticks_off()
axes.set_xlabel("training examples")
axes.set_ylabel("accuracy on 800 others")
axes.legend(loc="best", frameon=False)
figure.savefig(Path(*sys.argv[1:2]) / "small_data_svm.svg", metadata={"Date": None})
