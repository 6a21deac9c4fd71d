"""Networks of one shape side by side: what each one says is what it says alone, in one pass for all."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Stack(ABC):
    """R networks.

    Attributes:
        weights: what is trained, tensors that hold the parameters of all.
    """

    weights: list[Tensor]

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(R, n, ...) inputs, n for each network, to (R, n, C), in training mode."""

    @abstractmethod
    def write(self, models: list[nn.Module]) -> None:
        """Put parameters and statistics back into single networks."""


def stacked(models: list[nn.Module]) -> Stack:
    """Sequences of layers: linear ones by batched products, convolutions by grouped ones; vmap is much slower."""
    convolutional = any(isinstance(layer, nn.Conv2d) for layer in models[0].modules())
    return _Grouped(models) if convolutional else _Batched(models)


class _Batched(Stack):
    def __init__(self, models: list[nn.Module]) -> None:
        self._layers = copy.deepcopy(list(models[0].children()))
        self._named = {
            name: torch.stack([model.state_dict()[name] for model in models]).requires_grad_()
            for name, _ in models[0].named_parameters()
        }
        self.weights = list(self._named.values())

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self._layers):
            if isinstance(layer, nn.Linear):
                x = torch.baddbmm(self._named[f"{k}.bias"][:, None], x, self._named[f"{k}.weight"].mT)
            else:
                x = layer(x)
        return x

    def write(self, models: list[nn.Module]) -> None:
        with torch.no_grad():
            for k, model in enumerate(models):
                for name, parameter in model.named_parameters():
                    parameter.copy_(self._named[name][k])


class _Grouped(Stack):
    """The channels of all networks behind each other: a group is a network."""

    def __init__(self, models: list[nn.Module]) -> None:
        self._count = len(models)
        self._wide = nn.Sequential(*(self._widened(layer) for layer in models[0].children()))
        with torch.no_grad():
            for name, tensor in self._wide.state_dict().items():
                if tensor.ndim:
                    tensor.copy_(torch.cat([model.state_dict()[name] for model in models]))
        self._wide = self._wide.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights = list(self._wide.parameters())

    def forward(self, x: Tensor) -> Tensor:
        side_by_side = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        return self._wide(side_by_side).unflatten(1, (self._count, -1)).transpose(0, 1)

    def write(self, models: list[nn.Module]) -> None:
        with torch.no_grad():
            for name, tensor in self._wide.state_dict().items():
                for model, own in zip(models, tensor.chunk(self._count) if tensor.ndim else [], strict=False):
                    model.state_dict()[name].copy_(own)

    def _widened(self, layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Conv2d):
            size, bias = (self._count * layer.in_channels, self._count * layer.out_channels), layer.bias is not None
            how = {"stride": layer.stride, "padding": layer.padding}
            return nn.Conv2d(*size, layer.kernel_size, groups=self._count, bias=bias, **how)  # type: ignore[arg-type]
        if isinstance(layer, nn.BatchNorm2d):
            return nn.BatchNorm2d(self._count * layer.num_features)
        return copy.deepcopy(layer)
