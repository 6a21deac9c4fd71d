"""One step of training taken apart: the change of one example's prediction by a step on another, A x K x G.

Writes one_step.svg into the folder that is given, or into the current one: the first-order prediction beside what
happened, for smaller and smaller learning rates, and which examples move each other.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from ntkit.uses.digits import digits
from ntkit.uses.dynamics import one_step

data = digits(torch.Generator().manual_seed(0))
x, y = data.x_train.flatten(1).double(), data.y_train
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for batch in torch.arange(600).split(60) * 3:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
model.eval()

# A step on a four: the network says "4" more often for other fours, and for what looks to it like one.
four = int((y[700:] == 4).nonzero()[0]) + 700
seen = torch.cat([(y[800:] == digit).nonzero()[:3, 0] + 800 for digit in range(10)])
update = x[four : four + 1], y[four : four + 1]
step = one_step(model, update, x[seen], 0.1, matrices=True)
print(step)
risen = step.in_probability.actual[:, 4].view(10, 3).mean(1)
for digit in range(10):
    print(f"probability of a 4, for images of a {digit}: {float(risen[digit]):+.4f}")

# With the optimiser that has been training, its momentum goes on by itself.
with_momentum = one_step(model, update, x[seen], optimizer)
share = float(with_momentum.past.norm() / with_momentum.logits.predicted.norm())
print(f"with momentum, what came before makes {share:.0%} of the change")

rates = torch.logspace(-4, 0, 9).tolist()
steps = [one_step(model, update, x[seen], rate) for rate in rates]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name in ("logits", "in_probability", "in_log_probability"):
    changes = [getattr(one, name) for one in steps]
    errors = [float((change.actual - change.predicted).norm()) for change in changes]
    left.loglog(rates, errors, "o-", markersize=3, label=name.replace("_", " "))
left.loglog(rates, [10 * rate**2 for rate in rates], "--", color="gray", label="slope 2")
left.set(xlabel="learning rate", ylabel="error of the prediction", title="Of second order in the step")
left.legend(loc="best")
predicted, actual = (getattr(step.in_probability, part).flatten() for part in ("predicted", "actual"))
right.scatter(predicted, actual, s=8)
ends = [float(actual.min()), float(actual.max())]
right.plot(ends, ends, color="gray", linewidth=1)
right.set(xlabel="change of a probability, predicted", ylabel="what happened")
right.set_title(f"One step with learning rate 0.1: gap {step.in_probability.gap:.0%}")
for axes in (left, right):
    axes.grid(alpha=0.2)
figure.savefig(Path(*sys.argv[1:2]) / "one_step.svg", metadata={"Date": None})
