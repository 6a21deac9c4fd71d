"""Training without training: the flow of the first kernel beside a really trained network, and when to stop.

Writes kernel_flow.svg into the folder that is given, or into the current one.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from ntkit import empirical_ntk
from ntkit.solve.course import GradientFlow
from ntkit.solve.flow import KernelFlow
from ntkit.uses.dynamics import constancy

# A curve with noise, forty points of it.
generator = torch.Generator().manual_seed(0)
x = torch.rand(40, 1, generator=generator, dtype=torch.float64) * 2 - 1
new = torch.linspace(-1.2, 1.2, 121, dtype=torch.float64)[:, None]
y = torch.sin(4 * x) + 0.3 * torch.randn(40, 1, generator=generator, dtype=torch.float64)


def network(width: int) -> nn.Module:
    layers = nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    return nn.Sequential(*layers).double()


torch.manual_seed(1)
model = network(256).eval()
flow = KernelFlow.decompose(empirical_ntk(model, x), y, prior=model(x).detach())
cross, prior = empirical_ntk(model, new, x), model(new).detach()
stop = flow.best()
print(f"largest learning rate that converges: {flow.largest_learning_rate():.3f}")
print(f"GCV stops at time {stop.course.time:.1f}, with an estimated error of {stop.gcv:.3f} on new points")

found = constancy(
    network, (32, 64, 128, 256), (x, y), new, generator=torch.Generator().manual_seed(0), steps=100, seeds=2
)
print(f"drift of the kernel falls as width^{found.drift_slope:.2f}, the gap to training as width^{found.gap_slope:.2f}")

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
left.plot(x[:, 0], y[:, 0], ".", color="gray")
for time, name in ((0.0, "start"), (stop.course.time, "stopped by GCV"), (300 * stop.course.time, "much later")):
    left.plot(new[:, 0], flow.predict(cross, GradientFlow(time), prior)[:, 0], label=name)
left.set(title="Every time from one decomposition", ylim=(-1.8, 1.8))
left.legend(loc="best", fontsize=8)
times = torch.tensor([course.time for course in stop.courses])
truth = torch.sin(4 * new)
inside = new[:, 0].abs() <= 1
errors = [float((flow.predict(cross, course, prior) - truth)[inside].square().mean()) + 0.09 for course in stop.courses]
middle.loglog(times, stop.scores, label="GCV, from the training points")
middle.loglog(times, errors, label="true error on new points")
middle.axvline(stop.course.time, color="gray", linewidth=1)
middle.set(xlabel="time", title="When to stop", ylim=(0.05, 2))
middle.legend(loc="best", fontsize=8)
for name, label in (("drift", "the kernel moves"), ("gap", "the flow misses the network by")):
    sizes = [getattr(one, name) for one in found.networks]
    right.loglog([one.width for one in found.networks], sizes, "o", label=label)
right.set(xlabel="width", title="Wider networks are more linear")
right.set_xticks([32, 64, 128, 256], ["32", "64", "128", "256"], minor=False)
right.minorticks_off()
right.legend(loc="best", fontsize=8)
figure.savefig(Path(*sys.argv[1:2]) / "kernel_flow.svg", metadata={"Date": None})
