"""Targets for a student out of a teacher's learning paths: Filter-KD beside labels that are wrong in part.

Three Gaussian clouds in 30 dimensions whose true probabilities are known, three labels in ten drawn anew. The teacher
is slow: at its best after some ten epochs, about as long as the filter remembers; with a faster one early stopping is
better (docs/distill.md). Writes filter_kd.svg into the folder that is given, or into the current one.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntkit.uses import distill

EPOCHS, NOISE = 60, 0.3
generator = torch.Generator().manual_seed(0)
means = torch.randint(-1, 2, (3, 30), generator=generator).float()


def drawn(count):
    truth = torch.randint(3, (count,), generator=generator)
    x = means[truth] + 6**0.5 * torch.randn(count, 30, generator=generator)
    return x, truth, (-(x[:, None] - means).square().sum(2) / 12).softmax(1)  # Bayes' rule


x, truth, p_star = drawn(900)
x_test, y_test, p_test = drawn(5000)
y = torch.where(torch.rand(900, generator=generator) < NOISE, torch.randint(3, (900,), generator=generator), truth)
train, validation = slice(0, 600), slice(600, 900)


def fitted(targets, table=None, best=None):
    """Train on targets read by the numbers of examples; test accuracy after every epoch."""
    torch.manual_seed(1)
    model, loss, found = nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 3)), distill.DistillationLoss(), []
    data, order = distill.Indexed(TensorDataset(x[train])), torch.Generator().manual_seed(2)
    loader = DataLoader(data, batch_size=32, shuffle=True, generator=order)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    for _ in range(EPOCHS):
        for numbers, (inputs,) in loader:
            z = model(inputs)
            if table is not None:
                table.update(numbers, z)  # before the step
            optimizer.zero_grad()
            loss(z, targets.targets(numbers)).backward()
            optimizer.step()
        with torch.no_grad():
            found.append(float((model(x_test).argmax(1) == y_test).float().mean()))
            right = float((model(x[validation]).argmax(1) == y[validation]).float().mean())
        if best is not None:
            best.update(right, teacher=model, table=table)
    return model, found


labels = distill.OneHot(y[train], 3)
table, best = distill.EMATargets(600, 3, debias=True), distill.BestSoFar()
teacher, plain = fitted(labels, table, best)
last = distill.TeacherTargets.of(teacher.eval(), x[train])
best.restore(teacher=teacher, table=table)
early = distill.TeacherTargets.of(teacher.eval(), x[train])
kinds = {"labels": labels, "KD": last, "early-stopped KD": early, "Filter-KD": table}
kinds["truth"] = distill.Given(p_star[train])
curves = {name: plain if kind is labels else fitted(kind)[1] for name, kind in kinds.items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, kind in kinds.items():
    away, curve = distill.supervision(kind.table(), p_star[train]).mean, curves[name]
    print(f"{name:17s} distance from the truth {away:.3f}, test accuracy at the end {curve[-1]:.3f}")
    left.plot(range(1, EPOCHS + 1), curve, label=name)
    right.plot(away, curve[-1], "o")
    right.annotate(name, (away, curve[-1]), textcoords="offset points", xytext=(4, 4), fontsize=8)
left.set(xlabel="epoch of the student", ylabel="test accuracy", title="Good targets need not be stopped")
left.legend(fontsize=8)
right.set(xlabel="mean distance of the targets from the truth", title="The nearer the targets, the better")
for axes in (left, right):
    axes.grid(alpha=0.2)
figure.savefig(Path(*sys.argv[1:2]) / "filter_kd.svg", metadata={"Date": None})
