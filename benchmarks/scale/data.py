"""The data sets of the large runs, from the folder that the environment variable NTKIT_DATA names."""

from __future__ import annotations

import io
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Images in float32, standardised by the mean and deviation of the training images, and class numbers.

    Attributes:
        name: of the data set, as results have to call it.
        x_train: (N, C, H, W).
        y_train: (N,).
        x_test: (M, C, H, W).
        y_test: (M,).
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def first(self, train: int, test: int | None = None) -> Images:
        """The first examples of each part."""
        test = len(self.x_test) if test is None else test
        return Images(self.name, self.x_train[:train], self.y_train[:train], self.x_test[:test], self.y_test[:test])


def folder() -> Path:
    """Where the data are.

    Raises:
        SystemExit: if NTKIT_DATA does not say.
    """
    if "NTKIT_DATA" not in os.environ:
        raise SystemExit("set NTKIT_DATA to the folder that holds cifar10_jpeg.npz and fashion_mnist.npz")
    return Path(os.environ["NTKIT_DATA"])


def cifar10_jpeg() -> Images:
    """CIFAR-10 (JPEG q75): all 50,000 + 10,000 images, recompressed."""
    with np.load(folder() / "cifar10_jpeg.npz") as file:
        parts = {part: _decoded(file[f"jpeg_{part}"], file[f"offset_{part}"]) for part in ("train", "test")}
        return _standardised("CIFAR-10 (JPEG q75)", *parts.values(), file["y_train"], file["y_test"])


def cifar10_lossless(train: int) -> Images:
    """The first 4,000 CIFAR-10 training images, exact pixels, cut into training and test images."""
    with np.load(folder() / "cifar10_lossless4k.npz") as file:
        x, y = file["x"], file["y"]
    return _standardised("CIFAR-10 (first 4,000)", x[:train], x[train:], y[:train], y[train:])


def fashion_mnist() -> Images:
    """Fashion-MNIST: 60,000 + 10,000 images, one channel."""
    with np.load(folder() / "fashion_mnist.npz") as file:
        x_train, x_test = (file[name][:, None] for name in ("x_train", "x_test"))
        return _standardised("Fashion-MNIST", x_train, x_test, file["y_train"], file["y_test"])


def _decoded(jpeg: np.ndarray, offset: np.ndarray) -> np.ndarray:
    from PIL import Image

    images = [np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes()))) for a, b in itertools.pairwise(offset)]
    return np.stack(images).transpose(0, 3, 1, 2)


def _standardised(
    name: str, x_train: np.ndarray, x_test: np.ndarray, y_train: np.ndarray, y_test: np.ndarray
) -> Images:
    train, test = (torch.from_numpy(np.ascontiguousarray(x)).float().div_(255) for x in (x_train, x_test))
    base = train if len(train) else test
    mean, deviation = base.mean((0, 2, 3), keepdim=True), base.std((0, 2, 3), keepdim=True)
    for x in (train, test):
        x.sub_(mean).div_(deviation)
    return Images(name, train, torch.from_numpy(y_train).long(), test, torch.from_numpy(y_test).long())
