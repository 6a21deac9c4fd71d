"""How long to probe a new head: a network that knows the digits 0 to 4 learns 5 to 9 from two hundred labels.

Writes probe_then_finetune.svg into the folder that is given, or into the current one; and predicts, without training,
which of five backbones suits the new digits.
"""

import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from ntkit.uses import finetune

pixels, digits = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16).float(), torch.tensor(digits)
old, new = y < 5, y >= 5
x_new, y_new = x[new], y[new] - 5
few, held_out = (x_new[:200], y_new[:200]), (x_new[200:], y_new[200:])


def network(width=64):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(OrderedDict(body=body, fc=nn.Linear(width, 5)))


def trained(model, x, y, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


model = trained(network(), x[old], y[old], 200)
sgd = partial(torch.optim.SGD, momentum=0.9)
sweep = finetune.probe_then_finetune(
    model, finetune.LinearHead("fc"), few, held_out,
    probing=finetune.Probing((0, 1, 2, 4, 8, 16, 32, 64), partial(sgd, lr=0.05), batch_size=32),
    finetuning=finetune.Finetuning(30, partial(sgd, lr=0.003), batch_size=32),
)  # fmt: skip
print(sweep)

noise = torch.randint(5, (int(old.sum()),), generator=torch.Generator().manual_seed(0))
ranking = finetune.rank_backbones(
    {
        "pre-trained": model,
        "a little": trained(network(), x[old], y[old], 10),
        "on wrong labels": trained(network(), x[old], noise, 200),
        "not trained": network().eval(),
        "features of it alone": finetune.Candidate(model, parameters=()),
    },
    *few, generator=torch.Generator().manual_seed(0),
)  # fmt: skip
print(ranking)

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
taus, changes = [row.tau for row in sweep.rows], [row.change for row in sweep.rows]
left.plot(range(len(sweep.energies)), sweep.energies, label="energy")
left.plot(taus, [change.relative_distance for change in changes], "o-", label="features move by")
left.plot(taus, [change.cosine for change in changes], "o-", label="cosine with before")
left.set(xlabel="epochs of probing", title="Less energy, less change")
middle.plot(taus, [row.probed_accuracy for row in sweep.rows], "o-", label="probed head alone")
middle.plot(taus, [row.accuracy for row in sweep.rows], "o-", label="after fine-tuning")
middle.set(xlabel="epochs of probing", title="Accuracy on new examples")
for axes in (left, middle):
    axes.set_xscale("symlog", linthresh=1)
    axes.legend(loc="best", fontsize=8)
rows = list(reversed(ranking.rows))
right.barh([row.name for row in rows], [row.predicted for row in rows], height=0.5)
right.plot([row.leave_one_out for row in rows], [row.name for row in rows], "D", label="leave-one-out")
right.set(xlabel="squared error, predicted by GCV", title="Which backbone, without training")
right.legend(loc="best", fontsize=8)
figure.savefig(Path(*sys.argv[1:2]) / "probe_then_finetune.svg", metadata={"Date": None})
