"""The kernels and networks of the runs."""

from __future__ import annotations

import math

import torch
from torch import nn

from ntkit.kernel.function import KernelFunction
from ntkit.kernel.infinite import InfiniteWidth
from ntkit.uses.condense import GradientFeatures

# Of the authors' notebook: NTK parametrisation.
WEIGHT, BIAS = math.sqrt(2), 0.1


def fc1(inputs: int) -> KernelFunction:
    """Infinite width, one hidden layer of ReLU."""
    return InfiniteWidth(
        nn.Sequential(nn.Flatten(), nn.Linear(inputs, 1), nn.ReLU(), nn.Linear(1, 1)),
        weight_std=WEIGHT, bias_std=BIAS,
    )  # fmt: skip


def cntk(size: int = 28) -> KernelFunction:
    """Infinite width, two convolutions of 3 x 3 on images of half the size, and a flat head."""
    half = size // 2
    return InfiniteWidth(
        nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(half**2, 1),
        ),
        weight_std=WEIGHT, bias_std=BIAS,
    )  # fmt: skip


def small_conv(seed: int, channels: int = 8, size: int = 28) -> nn.Module:
    """A random network of two convolutions, whose gradient features stand for a convolutional kernel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(2 * channels * (size // 4) ** 2, 10),
        ).double().eval()  # fmt: skip


def conv(seed: int) -> KernelFunction:
    """The pNTK of a small random convolutional network."""
    return GradientFeatures(small_conv(seed))


def perceptron(inputs: int, width: int = 1024) -> nn.Module:
    """One hidden layer in the standard parametrisation: what is trained on the points."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 10))
