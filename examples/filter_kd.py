"""Targets for a student out of a teacher's learning paths: Filter-KD beside labels that are wrong in part.

Three Gaussian clouds, p* known, three labels in ten drawn anew. The teacher is at its best after 17 epochs, less than
the filter remembers; `debias=True`, not published, leaves out the untrained network. Makes filter_kd.svg.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from ntkit.uses import distill, dynamics

EPOCHS, NOISE = 60, 0.3
generator = torch.Generator().manual_seed(0)
means = torch.randint(-1, 2, (3, 30), generator=generator).float()


def drawn(count):
    truth = torch.randint(3, (count,), generator=generator)
    x = means[truth] + 6**0.5 * torch.randn(count, 30, generator=generator)
    return x, truth, (-(x[:, None] - means).square().sum(2) / 12).softmax(1)  # Bayes' rule


x, truth, p_star = drawn(900)
x_test, y_test, _ = drawn(5000)
y = torch.where(torch.rand(900, generator=generator) < NOISE, torch.randint(3, (900,), generator=generator), truth)
best, tables, path, filtered = distill.BestSoFar(), {}, [], []


def fitted(targets, order=3):
    """Train on the first 600 examples; test accuracy after every epoch. The tables see every batch before the step."""
    torch.manual_seed(1)
    model, loss, found = nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 3)), distill.DistillationLoss(), []
    optimizer, drawer = torch.optim.SGD(model.parameters(), 0.005, 0.9), torch.Generator().manual_seed(order)
    for _ in range(EPOCHS):
        for numbers in torch.randperm(600, generator=drawer).split(32):
            z = model(x[numbers])
            for table in tables.values():
                table.update(numbers, z)
            optimizer.zero_grad()
            loss(z, targets.targets(numbers)).backward()
            optimizer.step()
        p = distill.TeacherTargets.of(model, torch.cat([x, x_test])).table()
        found.append(float((p[900:].argmax(1) == y_test).float().mean()))
        if tables:
            best.update(float((p[600:900].argmax(1) == y[600:]).float().mean()), **tables)
            path.append(p[:600])
            filtered.append(tables["Filter-KD"].table())
    return found


labels = distill.OneHot(y[:600], 3)
tables |= {"Filter-KD": distill.EMATargets(600, 3), "Filter-KD, debiased": distill.EMATargets(600, 3, debias=True)}
plain = fitted(labels, order=2)
best.restore(**tables)
kinds = {"labels": labels, "KD": distill.Given(path[-1]), "early-stopped KD": distill.Given(path[best.epoch]), **tables}
kinds["truth"], tables = distill.Given(p_star[:600]), {}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
for name, kind in kinds.items():
    curve, away = plain if kind is labels else fitted(kind), distill.supervision(kind.table(), p_star[:600]).mean
    print(f"{name:20s} distance from the truth {away:.3f}, test accuracy at the end {curve[-1]:.3f}")
    left.plot(range(1, EPOCHS + 1), curve, label=f"{name} ({away:.2f})")
left.set(xlabel="epoch", ylabel="test accuracy", title="Students (distance of their targets from p*)")
turned = (y != truth)[:600] & (path[-1].argmax(1) == y[:600])  # wrong labels, learnt by heart in the end
ways = torch.stack([truth, y, (3 - truth - y) % 3])[:, :600]  # the true class, the label, the third
one = int((turned * filtered[best.epoch].gather(1, ways[[0, 2]].T).prod(1)).argmax())  # not on an edge alone
lines = {"teacher": (path, ".:"), "filtered": (filtered, "-"), "early-stopped KD": (path[best.epoch :][:1], "P")}
for name, (points, style) in {**lines, "Filter-KD": (filtered[best.epoch :][:1], "*"), "p*": ([p_star], "X")}.items():
    right.plot(*dynamics.triangle(torch.stack([p[one, ways[:, one]] for p in points])).T, style, label=name)
for place, name in zip(dynamics.CORNERS, ("true class", "label given", "third class"), strict=True):
    right.annotate(name, place, ha="center", va="bottom" if place[1] else "top")
right.fill(*zip(*dynamics.CORNERS, strict=True), fill=False, alpha=0.3)
right.set(title="Path of one example with a wrong label", aspect="equal", xlim=(-0.2, 1.6), ylim=(-0.1, 1))
right.axis("off")
for axes in (left, right):
    axes.legend(loc="best", fontsize=7)
figure.savefig(Path(*sys.argv[1:2]) / "filter_kd.svg", metadata={"Date": None})
