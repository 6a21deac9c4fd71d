"""A real task that every machine has: scikit-learn's handwritten digits, and a network that learns them in seconds."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = 10
# 1,797 images are all there are; the rest, 500, are kept for the test.
TRAINING_IMAGES = 1297


@dataclass(frozen=True)
class Digits:
    """The 1,797 images of 8 x 8 pixels (Alpaydin and Kaynak 1998), in [0, 1], cut into two parts.

    Attributes:
        x_train: (1297, 1, 8, 8), float32.
        y_train: (1297,), int64, the digit itself.
        x_test: (500, 1, 8, 8), float32.
        y_test: (500,), int64.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def digits(generator: torch.Generator) -> Digits:
    """The digits in a random order, so that no writer and no class fills one of the two parts."""
    from sklearn.datasets import load_digits

    pixels, numbers = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(numbers, dtype=torch.int64)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return Digits(x[train], y[train], x[test], y[test])


def small_cnn(generator: torch.Generator, *, channels: int = 24) -> nn.Module:
    """Three convolutions and a linear layer, without normalization, for 8 x 8 images of one colour and ten classes.

    Weights are drawn as He et al. 2015 propose (normal, variance 2 / fan-in; 1 / fan-in in the last layer) from
    `generator`; biases are zero.
    """
    layers = {
        "conv1": nn.Conv2d(1, channels, 3, padding=1),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(channels, channels, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool2": nn.AvgPool2d(2),
        "conv3": nn.Conv2d(channels, 2 * channels, 3, padding=1),
        "relu3": nn.ReLU(),
        "pool3": nn.AvgPool2d(2),
        "flatten": nn.Flatten(),
        "head": nn.Linear(8 * channels, CLASSES),
    }
    model = nn.Sequential(OrderedDict(layers))
    for module in model:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gain = "linear" if isinstance(module, nn.Linear) else "relu"
            nn.init.kaiming_normal_(module.weight, nonlinearity=gain, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.eval()


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator,
    epochs: int = 30,
    learning_rate: float = 0.05,
    batch: int = 32,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Train in place by SGD with momentum 0.9 on cross-entropy, without weight decay, and return to evaluation mode.

    Args:
        model: gives (n, C) logits.
        x: examples, first axis N.
        y: (N,) class numbers.
        generator: of the order of the examples.
        epochs: passes through the examples.
        learning_rate: falls to zero along half a cosine.
        batch: examples per step.
        tell: is told (epochs done, epochs in all) after each epoch.

    Returns:
        The mean loss of each epoch.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(x), generator=generator).split(batch):
            loss = functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(index)
        losses.append(total / len(x))
        tell(epoch + 1, epochs)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return losses
