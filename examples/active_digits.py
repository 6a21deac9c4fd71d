"""Which digits are worth a label? A network learns from 20 labels, and then buys ten at a time.

Writes active_digits.svg into the folder that is given, or into the current one.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from ntkit.uses import active
from ntkit.uses.digits import digits

data = digits(torch.Generator().manual_seed(0))
mean = data.x_train.mean(0).flatten()
x, truth = data.x_train.flatten(1) - mean, data.y_train.numpy()
x_test = data.x_test.flatten(1) - mean


def network():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def accuracy(model):
    return {"accuracy": float((model(x_test).argmax(1) == data.y_test).float().mean())}


fit = active.Training(x, network, steps=300)
first = np.where(np.arange(len(x)) < 20, truth, -1)

# The same beginning, four ways to go on. With a file in place of None each could be stopped and resumed.
sessions = {}
for name in ("curvature-ivr", "margin", "badge", "random"):
    loop = active.Loop(x, active.strategy(name), fit, journal=None, classes=10, y=first, evaluate=accuracy)
    loop.run(lambda points: truth[points].tolist(), size=10, rounds=12)
    sessions[name] = loop
    start, end = loop.history[0], loop.history[-1]
    print(
        f"{name}: {start.metrics['accuracy']:.1%} with {start.labels}, {end.metrics['accuracy']:.1%} with {end.labels}"
    )

# What two strategies would ask for, given the same 100 labels: those of the second are much alike.
labels = np.where(np.arange(len(x)) < 100, truth, -1)
model = fit(labels)
asked = {name: active.strategy(name, missing_label=-1).query(x, labels, model, batch_size=10) for name in sessions}

figure = plt.figure(figsize=(9.5, 3.6), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
axes = left.subplots()
for name, loop in sessions.items():
    axes.plot([f.labels for f in loop.history], [f.metrics["accuracy"] for f in loop.history], label=name)
axes.set(xlabel="labels", ylabel="test accuracy", title="The same network, other labels")
axes.legend(loc="best")
axes.grid(alpha=0.2)
shown = ("curvature-ivr", "margin", "random")
rows = right.subplots(len(shown), 10)
for row, name in zip(rows, shown, strict=True):
    for place, point in zip(row, asked[name].tolist(), strict=True):
        place.imshow(data.x_train[point, 0].numpy(), cmap="gray_r")
        place.set_title(f"{int(model(x[point][None]).argmax())} / {truth[point]}", fontsize=8)
        place.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=8)
right.suptitle("Asked for with 100 labels: said / is", fontsize=10)
figure.savefig(Path(*sys.argv[1:2]) / "active_digits.svg", metadata={"Date": None})
