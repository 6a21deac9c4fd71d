"""Pools, networks and protocols of the comparison; everything follows from a name and a seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.scale.data import folder
from ntkit.uses.active import CrossEntropy, Loss, SquareLoss

WIDTH = 128
# Of the UCI sets with 1,000 points or more, ten with different numbers of inputs and classes, chosen before any run.
UCI = (
    "waveform-noise",
    "spambase",
    "chess-krvkp",
    "statlog-image",
    "cardiotocography-3clases",
    "steel-plates",
    "car",
    "yeast",
    "plant-texture",
    "led-display",
)


@dataclass(frozen=True)
class Pool:
    """Points without labels, what an annotator would say about them, and points to measure by."""

    x: Tensor
    said: np.ndarray
    x_test: Tensor
    y_test: np.ndarray
    classes: int

    def to(self, device: str) -> Pool:
        """With the points on a device."""
        return replace(self, x=self.x.to(device), x_test=self.x_test.to(device))


@dataclass(frozen=True)
class Task:
    """One protocol.

    Attributes:
        name: in results.
        pool: from a seed.
        network: from the pool to a function that makes a new one.
        initial: labels to begin with, drawn at random.
        size: labels of a round.
        rounds: how often is asked.
        loss: that the network is trained with.
        steps: of Adam in every round, from scratch.
        candidates: so many points are looked at in a round, as if the others were not there: the first without a label
            in an order of the pool that is drawn for each seed and round. In the first round they are the same for all
            strategies, later they differ by as much as the labels do. None for the whole pool.
    """

    name: str
    pool: Callable[[np.random.Generator], Pool]
    network: Callable[[Pool], Callable[[], nn.Module]]
    initial: int
    size: int
    rounds: int
    loss: Loss
    steps: int = 300
    candidates: int | None = None


def digits(rng: np.random.Generator) -> Pool:
    """scikit-learn's digits: 1,297 in the pool, 500 to measure by."""
    from sklearn.datasets import load_digits

    pixels, y = load_digits(return_X_y=True)
    x, order = torch.tensor(pixels / 16, dtype=torch.float32), rng.permutation(len(y))
    x = x - x.mean(0)
    pool, test = order[:1297], order[1297:]
    return Pool(x[pool], y[pool], x[test], y[test], 10)


def imbalanced(rng: np.random.Generator) -> Pool:
    """Digits from 5 on are ten times rarer in the pool; the test points are not."""
    found = digits(rng)
    kept = np.flatnonzero((found.said < 5) | (rng.random(len(found.said)) < 0.1))
    return replace(found, x=found.x[kept], said=found.said[kept])


def redundant(rng: np.random.Generator) -> Pool:
    """Ten noisy copies of each digit."""
    found = digits(rng)
    x = found.x.repeat_interleave(10, 0)
    noise = torch.from_numpy(rng.normal(0, 0.05, x.shape)).float()
    return replace(found, x=x + noise, said=found.said.repeat(10))


def wrong(rng: np.random.Generator) -> Pool:
    """One label in ten is another class, drawn at random."""
    found = digits(rng)
    mistaken = rng.random(len(found.said)) < 0.1
    other = (found.said + rng.integers(1, 10, len(found.said))) % 10
    return replace(found, said=np.where(mistaken, other, found.said))


def fashion(rng: np.random.Generator) -> Pool:
    """Fashion-MNIST: 10,000 of the training images in the pool, all test images to measure by."""
    with np.load(folder() / "fashion_mnist.npz") as file:
        drawn = rng.permutation(60_000)[:10_000]
        x, y = _flat(file["x_train"][drawn]), file["y_train"][drawn].astype(np.int64)
        x_test, y_test = _flat(file["x_test"]), file["y_test"].astype(np.int64)
    mean, deviation = x.mean(), x.std()
    return Pool((x - mean) / deviation, y, (x_test - mean) / deviation, y_test, 10)


def cifar(rng: np.random.Generator) -> Pool:
    """The 4,000 lossless CIFAR-10 images: 3,000 in the pool, 1,000 to measure by."""
    with np.load(folder() / "cifar10_lossless4k.npz") as file:
        x, y = torch.from_numpy(file["x"]).float() / 255, file["y"].astype(np.int64)
    order = rng.permutation(len(y))
    pool, test = order[:3000], order[3000:]
    mean, deviation = x[pool].mean((0, 2, 3), keepdim=True), x[pool].std((0, 2, 3), keepdim=True)
    x = (x - mean) / deviation
    return Pool(x[pool], y[pool], x[test], y[test], 10)


def uci(name: str, rng: np.random.Generator) -> Pool:
    """A UCI set, standardised as in the study of Arora et al. (2020): three quarters in the pool."""
    with np.load(folder() / "uci_classification.npz") as file:
        x, y = torch.from_numpy(file[f"{name}/x"]).float(), file[f"{name}/y"].astype(np.int64)
        classes = json.loads(str(file["index"]))[name]["classes"]
    order = rng.permutation(len(y))
    pool, test = order[: 3 * len(y) // 4], order[3 * len(y) // 4 :]
    return Pool(x[pool], y[pool], x[test], y[test], classes)


def perceptron(pool: Pool) -> Callable[[], nn.Module]:
    """Two hidden layers."""
    return partial(_perceptron, pool.x.shape[1], pool.classes)


def small_cnn(pool: Pool) -> Callable[[], nn.Module]:
    """Three convolutions with pooling, and a linear layer on 256 numbers."""
    return partial(_small_cnn, pool.classes)


def _perceptron(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes)
    )


def _small_cnn(classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, classes))


def _flat(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), -1)).float() / 255


_CE, _SQUARE = CrossEntropy(), SquareLoss()
_DIGITS = Task("digits", digits, perceptron, 20, 10, 15, _CE)
_FASHION = Task("fashion", fashion, perceptron, 50, 25, 12, _CE, candidates=2000)
TASKS = {
    task.name: task
    for task in (
        _DIGITS,
        replace(_DIGITS, name="digits, square loss", loss=_SQUARE),
        replace(_DIGITS, name="digits, batches of 50", size=50, rounds=4),
        replace(_DIGITS, name="digits, rare classes", pool=imbalanced),
        replace(_DIGITS, name="digits, ten noisy copies", pool=redundant, size=50, rounds=4),
        replace(_DIGITS, name="digits, wrong labels", pool=wrong),
        _FASHION,
        replace(_FASHION, name="fashion, square loss", loss=_SQUARE),
        replace(_FASHION, name="fashion, whole pool", candidates=None),
        Task("cifar", cifar, small_cnn, 200, 100, 6, _CE, steps=400),
        *(Task(name, partial(uci, name), perceptron, 20, 10, 10, _CE) for name in UCI if name != "plant-texture"),
        Task("plant-texture", partial(uci, "plant-texture"), perceptron, 200, 50, 8, _CE),
    )
}
