"""The network that stands in when an estimator is given none."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from ntkit.errors import InputError


@dataclass(frozen=True)
class MLP:
    """Makes a ReLU network in float64 with `depth` hidden layers of `width` units: `MLP(256)(n_features, n_outputs)`.

    Weights are He-initialised and biases start at zero (and take part in the kernel). Features should be of order one:
    put a `StandardScaler` before the estimator.

    Args:
        width: units of each hidden layer.
        depth: number of hidden layers; 0 gives a linear model.
    """

    width: int = 512
    depth: int = 2

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.width < 1 or self.depth < 0:
            raise InputError(f"an MLP has width >= 1 and depth >= 0: got {self!r}")

    def __call__(self, n_features: int | tuple[int, ...], n_outputs: int) -> nn.Module:
        """A new network, random by torch's global generator; features of several axes are flattened."""
        sizes = [math.prod(n_features) if isinstance(n_features, tuple) else n_features]
        sizes += [self.width] * self.depth + [n_outputs]
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for index, (rows, cols) in enumerate(pairwise(sizes)):
            last = index == self.depth
            linear = nn.Linear(rows, cols).double()
            nn.init.normal_(linear.weight, std=math.sqrt((1 if last else 2) / rows))
            nn.init.zeros_(linear.bias)
            layers["readout" if last else f"hidden{index}"] = linear
            if not last:
                layers[f"relu{index}"] = nn.ReLU()
        return nn.Sequential(layers)
