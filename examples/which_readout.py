"""How well each reduced kernel stands for the full one: at initialisation, and after training with two losses.

Writes which_readout.svg into the folder that is given, or into the current one.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import ntkit

warnings.simplefilter("ignore", ntkit.FidelityWarning)  # which kernels are poor is what is asked here
pixels, digits = load_digits(return_X_y=True)
x, y = torch.tensor(pixels[:1000] / 16, dtype=torch.float32), torch.tensor(digits[:1000])
one_hot = F.one_hot(y, 10).float()


def network(steps: int = 0, loss=None, decay: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    for layer, gain in zip(model[::2], ("relu", "relu", "linear"), strict=True):
        nn.init.kaiming_normal_(layer.weight, nonlinearity=gain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
    return model.eval()


networks = {
    "at initialisation": network(),
    "cross-entropy": network(300, lambda out: F.cross_entropy(out, y)),
    "cross-entropy,\nweight decay 0.005": network(300, lambda out: F.cross_entropy(out, y), decay=5e-3),
    "square loss": network(300, lambda out: (out - one_hot).square().sum(1).mean() / 2),
}
signs = ntkit.RandomLogits(4, torch.Generator().manual_seed(1))
kernels = {
    "pNTK": (ntkit.SumOfLogits(), False),
    "first logit": (ntkit.SingleLogit(0), False),
    "4 random signs": (signs, True),
    "trace": (ntkit.Logits(), True),
}
axes = (figure := Figure(figsize=(6.4, 3.2), layout="constrained")).add_subplot()
for number, (label, (readout, trace)) in enumerate(kernels.items()):
    measured = []
    for model in networks.values():
        kernel = ntkit.TangentKernel(ntkit.linearize(model, readout=readout), x, trace=trace)
        measured.append(kernel.fidelity(examples=40, generator=torch.Generator().manual_seed(2)))
    print(f"{label:15}", "  ".join(f"{m.error:.3f} +- {m.standard_error:.3f}" for m in measured))
    places = [place + 0.2 * (number - 1.5) for place in range(len(networks))]
    axes.bar(places, [m.error for m in measured], 0.18, yerr=[m.standard_error for m in measured], label=label)
axes.set_xticks(range(len(networks)), list(networks))
axes.set_ylabel("relative Frobenius error")
axes.legend(loc="best", frameon=False)
figure.savefig(Path(*sys.argv[1:2]) / "which_readout.svg", metadata={"Date": None})
