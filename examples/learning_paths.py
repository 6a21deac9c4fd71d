"""Learning paths on a triangle: an easy example, a hard one, and one with a wrong label that bends on its way.

Three Gaussian clouds in 30 dimensions, one label in ten wrong. Writes learning_paths.svg into the folder that is given,
or into the current one.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from ntkit.uses import dynamics

generator = torch.Generator().manual_seed(0)
means = torch.randint(-1, 2, (3, 30), generator=generator).float()
truth = torch.randint(3, (600,), generator=generator)
x = means[truth] + 6**0.5 * torch.randn(600, 30, generator=generator)
wrong = torch.rand(600, generator=generator) < 0.1
labels = torch.where(wrong, (truth + torch.randint(1, 3, (600,), generator=generator)) % 3, truth)
posterior = torch.softmax(-torch.cdist(x, means).square() / (2 * 6), 1)
true = 0.9 * posterior + 0.1 * (1 - posterior) / 2  # p*(label | x)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3))
recorder = dynamics.PathRecorder(x, labels=labels)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
recorder.record(model, 0)
for step in range(1, 601):
    batch = torch.randint(600, (32,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), labels[batch]).backward()
    optimizer.step()
    recorder.record(model, step)

paths = recorder.paths()
area = paths.area()
print(f"wrong labels found by the mean probability of the label: AUROC {dynamics.ranking_quality(area, wrong):.2f}")
at_the_end = paths.probabilities[-1].gather(1, labels[:, None])[:, 0]
print(f"by the label's probability at the end: {dynamics.ranking_quality(at_the_end, wrong):.2f}")

astray = torch.where(wrong, paths.astray(), -1.0)
chosen = {
    "easy": int(area.argmax()),
    "hard, label right": int(torch.where(wrong, 2.0, area).argmin()),
    "label wrong": int(astray.argmax()),
}
figure, all_axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
corners = torch.tensor(dynamics.CORNERS)
for axes, (title, probe) in zip(all_axes, chosen.items(), strict=True):
    raw = dynamics.triangle(paths.reduced(probe))[::4]
    smooth = dynamics.triangle(paths.smoothed(0.05)[:, probe])[::4]
    axes.plot(*corners[[0, 1, 2, 0]].T, color="gray", linewidth=0.8)
    axes.scatter(*raw.T, s=3, alpha=0.3, label="every fourth step")
    axes.plot(*smooth.T, color="tab:orange", label="smoothed")
    axes.scatter(*raw[0], marker="D", color="tab:green", zorder=3, label="start")
    axes.scatter(*corners[labels[probe]], marker="X", s=70, color="tab:red", zorder=3, label="label")
    axes.scatter(*dynamics.triangle(true[probe]), marker="*", s=70, color="black", zorder=3, label="p*")
    axes.scatter(*corners[truth[probe]], marker="o", s=130, facecolors="none", edgecolors="gray", label="true class")
    axes.set_title(f"{title}: detour {float(paths.detour()[probe]):.1f}")
    axes.set_aspect("equal")
    axes.axis("off")
all_axes[0].legend(fontsize=8, loc="upper right")
figure.savefig(Path(*sys.argv[1:2]) / "learning_paths.svg", metadata={"Date": None})
