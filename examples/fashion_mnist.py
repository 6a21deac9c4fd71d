"""Fashion-MNIST for `ntkit report`: the factory of a network, its data as an `.npz` file, and trained weights.

    export NTKIT_DATA=folder/with/fashion_mnist.npz        # x_train, y_train, x_test, y_test as uint8
    python examples/fashion_mnist.py fashion.npz --weights fashion.safetensors
    ntkit report examples/fashion_mnist.py:cnn fashion.npz --weights fashion.safetensors

The last line takes about five minutes on two cores: the pNTK of 10,000 training and 2,000 test images, before and after
training.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional


def cnn() -> nn.Module:
    """Three convolutions and a linear layer for 28 x 28 images of one colour and ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),  # 14 x 14
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),  # 7 x 7
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),  # 3 x 3
        nn.Flatten(),
        nn.Linear(576, 10),
    )


def images(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, 28, 28) as float32 (N, 1, 28, 28) in [0, 1]: what the network is trained on."""
    return (pixels[:, None] / 255).astype(np.float32)


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, generator: torch.Generator) -> None:
    """SGD with momentum on cross-entropy, batches of 64, a learning rate that falls to zero along half a cosine."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 64))
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(x), generator=generator).split(64):
            loss = functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(index)
        print(f"epoch {epoch + 1} of {epochs}: loss {total / len(x):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Fashion-MNIST for ntkit report.")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--weights", type=Path, help="also train the network, and write its weights (.safetensors)")
    parser.add_argument("--train", type=int, default=10_000, help="training images")
    parser.add_argument("--test", type=int, default=2_000, help="test images")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    folder = os.environ.get("NTKIT_DATA")
    source = Path(folder or ".") / "fashion_mnist.npz"
    if not source.is_file():
        sys.exit(f"there is no {source}: set NTKIT_DATA to the folder that holds fashion_mnist.npz")
    raw = np.load(source)
    arrays = {
        "x_train": images(raw["x_train"][: options.train]),
        "y_train": raw["y_train"][: options.train].astype(np.int64),
        "x_test": images(raw["x_test"][: options.test]),
        "y_test": raw["y_test"][: options.test].astype(np.int64),
    }
    np.savez(options.out, **arrays)
    print(f"{options.out}: {len(arrays['x_train']):,} training and {len(arrays['x_test']):,} test images")
    if options.weights is None:
        return
    torch.manual_seed(0)  # the seed with which `ntkit report` calls the factory: both start from the same weights
    model = cnn()
    x, y = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])
    train(model, x, y, epochs=options.epochs, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = model(torch.from_numpy(arrays["x_test"])).argmax(1) == torch.from_numpy(arrays["y_test"])
    save_file(model.state_dict(), options.weights)
    print(f"{options.weights}: test accuracy {float(right.double().mean()):.1%}")


if __name__ == "__main__":
    main()
