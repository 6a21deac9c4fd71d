"""A random network to compare samples with, where nobody has one of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ntkit.errors import InputError


def random_network(
    shape: Sequence[int], *, width: int | None = None, convolutional: bool | None = None, generator: torch.Generator
) -> nn.Module:
    """An untrained network with one output, in evaluation mode and float32; examples should be standardised.

    Of images it has three convolutions and global average pooling, so that where something is does not matter; of
    anything else two hidden layers. ReLU, weights with variance 2 / fan-in, no biases at the start.

    Args:
        shape: of one example: (C, H, W) for an image.
        width: channels or units of a layer; 32 channels or 512 units by default.
        convolutional: whether it is; by default for three axes.
        generator: draws the weights.

    Raises:
        InputError: if the shape is empty, or not that of an image where one is needed.
    """
    shape = tuple(shape)
    convolutional = len(shape) == 3 if convolutional is None else convolutional
    if math.prod(shape) < 1 or (width is not None and width < 1):
        raise InputError(f"a network needs inputs and a positive width: got examples of shape {shape}, width={width}")
    if convolutional and len(shape) != 3:
        raise InputError(f"a convolutional network takes images (C, H, W): got examples of shape {shape}")
    if convolutional:
        wide, layers = width or 32, []
        for inputs in (shape[0], width or 32, width or 32):
            layers += [nn.Conv2d(inputs, wide, 3, padding=1), nn.ReLU()]
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 1))
    else:
        wide = width or 512
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(shape), wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(),
            nn.Linear(wide, 1),
        )  # fmt: skip
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                fan_in = layer.weight[0].numel()
                layer.weight.normal_(generator=generator).mul_(math.sqrt(2 / fan_in))
                if layer.bias is not None:
                    layer.bias.zero_()
    return network.eval()
