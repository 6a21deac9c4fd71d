"""Which digits are worth a label? A network learns from 20 labels, and then buys ten at a time.

Writes active_digits.svg into the folder that is given, or into the current one.
"""

import sys
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from ntkit.uses import active
from ntkit.uses.digits import digits

data = digits(torch.Generator().manual_seed(0))
x, truth = data.x_train.flatten(1), data.y_train.numpy()
x_test = data.x_test.flatten(1)


def network():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def accuracy(model):
    return {"accuracy": float((model(x_test).argmax(1) == data.y_test).float().mean())}


fit = active.Training(x, network, steps=300, optimizer=partial(torch.optim.Adam, lr=2e-3))
first = np.where(np.arange(len(x)) < 20, truth, -1)

# The same beginning, three ways to go on. A journal in place of None would let each be stopped and resumed.
curves, sessions = {}, {}
for name in ("curvature-ivr", "margin", "random"):
    loop = active.Loop(x, active.strategy(name), fit, journal=None, classes=10, y=first, evaluate=accuracy)
    loop.run(lambda points: truth[points].tolist(), size=10, rounds=9)
    curves[name] = [found.metrics["accuracy"] for found in loop.history]
    sessions[name] = loop
    print(f"{name}: {curves[name][0]:.1%} with 20 labels, {curves[name][-1]:.1%} with {loop.history[-1].labels}")

# What the look-ahead says of eight points, and what really happens when the network is trained with each.
labels = np.where(np.arange(len(x)) < 100, truth, -1)
trusted = active.fidelity(
    active.LookAhead(missing_label=-1), x, labels, fit, candidates=8, generator=torch.Generator().manual_seed(0)
)
print(trusted)

# Where the time of one query goes.
strategy = active.LookAhead(missing_label=-1)
model = fit(labels)
start = time.perf_counter()
now = strategy.round(x, labels, model, batch_size=10)
now.kernel(strategy.kernel)
passed = time.perf_counter() - start
scene = strategy.look(now)
looked = time.perf_counter() - start - 2 * passed
start = time.perf_counter()
chosen = strategy.batch.choose(strategy.objective, scene, now.candidates, 10, now.generator).numbers
picked = time.perf_counter() - start
parts = {"pass of the network": passed, "posterior of the pool": max(looked, 0.0), "ten picks": picked}

figure = plt.figure(figsize=(9.5, 6.2), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
left, right = above.subplots(1, 2)
for name, curve in curves.items():
    left.plot([found.labels for found in sessions[name].history], curve, label=name)
left.set(xlabel="labels", ylabel="test accuracy", title="The same network, other labels")
left.legend()
left.grid(alpha=0.2)
right.loglog(trusted.predicted, trusted.actual, "o")
line = [float(trusted.predicted.min()), float(trusted.predicted.max())]
right.loglog(line, line, color="gray", linewidth=1, label="equal")
right.set(
    xlabel="change of the predictions, foreseen", ylabel="change after training",
    title=f"Entries correlate with {trusted.correlation:.2f} ± {trusted.standard_error:.2f}",
)  # fmt: skip
right.legend()
right.grid(alpha=0.2)
grid = below.add_gridspec(2, 6, width_ratios=(1, 1, 1, 1, 1, 4))
for k, point in enumerate(chosen.tolist()):
    axes = below.add_subplot(grid[k // 5, k % 5])
    axes.imshow(data.x_train[point, 0], cmap="gray_r")
    axes.set_title(f"said {int(model(x[point][None]).argmax())}, is {truth[point]}", fontsize=8)
    axes.axis("off")
times = below.add_subplot(grid[:, 5])
times.barh(list(parts), [1000 * seconds for seconds in parts.values()])
times.invert_yaxis()
times.set(xlabel="milliseconds", title="One query: 1,297 points, ten picks")
below.suptitle("Ten points that were asked for with 100 labels", x=0.27, fontsize=10)
figure.savefig(Path(*sys.argv[1:2]) / "active_digits.svg", metadata={"Date": None})
