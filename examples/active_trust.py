"""Does the look-ahead foresee what a label does? Networks are really trained with it; and where the time goes.

Writes active_trust.svg into the folder that is given, or into the current one.
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
x, truth = data.x_train.flatten(1) - data.x_train.mean(0).flatten(), data.y_train.numpy()
labels = np.where(np.arange(len(x)) < 100, truth, -1)


def network():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


# A network that is kept from learning its labels by heart can be foreseen; the page tells of others.
adam = partial(torch.optim.Adam, weight_decay=0.01)
fit = active.Training(x, network, steps=300, batch_size=len(x), optimizer=adam)
strategy = active.LookAhead(kernel=active.Sketched(2048), missing_label=-1)
tried = list(range(100, 112))
trusted = active.fidelity(
    strategy, x, labels, fit, candidates=tried, labels=truth[tried].tolist(), generator=torch.Generator()
)
print(trusted)

# Where the time of one query goes.
strategy, model = active.LookAhead(missing_label=-1), fit(labels)
start = time.perf_counter()
fit(labels)
trained = time.perf_counter()
now = strategy.round(x, labels, model, batch_size=10)
now.kernel(strategy.kernel)
passed = time.perf_counter()
scene = strategy.look(now)
looked = time.perf_counter()
strategy.batch.choose(strategy.objective, scene, now.candidates, 10, now.generator)
picked = time.perf_counter()
parts = {
    "training, 300 steps": trained - start,
    "pass over the pool": passed - trained,
    "posterior": looked - passed - (passed - trained),  # it passes over the pool as well
    "ten picks": picked - looked,
}
print({name: f"{1000 * seconds:.1f} ms" for name, seconds in parts.items()})

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.loglog(trusted.predicted, trusted.actual, "o")
line = [float(trusted.predicted.min()), float(trusted.predicted.max())]
left.loglog(line, line, color="gray", linewidth=1, label="equal")
left.set(
    xlabel="change of the predictions, foreseen",
    ylabel="change after training",
    title=f"Entries correlate with {trusted.correlation:.2f} ± {trusted.standard_error:.2f}",
)
left.legend(loc="best")
left.grid(alpha=0.2)
right.barh(list(parts), [1000 * max(seconds, 0.0) for seconds in parts.values()])
right.invert_yaxis()
right.set(xlabel="milliseconds", xscale="log", title="One round: 1,297 points, ten picks")
figure.savefig(Path(*sys.argv[1:2]) / "active_trust.svg", metadata={"Date": None})
