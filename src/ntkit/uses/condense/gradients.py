"""The pNTK of random finite networks as a kernel that can be differentiated in the examples.

    phi(x) = d/dtheta sum_c f_c(x) / sqrt(C),  k(x, x') = <phi(x), phi(x')>, averaged over the networks

`TangentKernel` of `SumOfLogits` has the same entries and is faster, but carries no gradients to the examples. Here the
features are made by `torch.func`, so that autograd can differentiate them once more. `vmap` has to batch the network:
fully connected and small convolutional ones in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ntkit.errors import InputError, ModelError
from ntkit.kernel.explicit import FeatureFunction
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import architecture, content, digest


class GradientFeatures(FeatureFunction):
    """The mean pNTK of networks at fixed parameters, differentiable in the examples."""

    def __init__(self, *models: nn.Module) -> None:
        """Take the networks as they are; they are not changed, and later changes of theirs are not seen.

        Args:
            models: in evaluation mode, each gives (N, C).

        Raises:
            InputError: if there is none, or one is no module or has no parameters that require gradients.
        """
        if not models or not all(isinstance(model, nn.Module) for model in models):
            raise InputError(f"GradientFeatures are of one or more networks: got {[type(m).__name__ for m in models]}")
        if any(model.training and _random(model) for model in models):
            raise InputError("a network in training mode with BatchNorm or Dropout has no fixed features: call eval()")
        self.models = models
        self._parameters = [
            {name: p.detach().clone().double() for name, p in model.named_parameters() if p.requires_grad}
            for model in models
        ]
        self._fixed = [_fixed(model) for model in models]
        if not all(self._parameters):
            raise InputError("a network has no parameters that require gradients")

    def features(self, x: Tensor) -> Tensor:
        """phi(x) of all networks side by side, (N, sum of P), float64. Memory: several times as much.

        Raises:
            ModelError: if an output is not (N, C), or the network cannot take the examples one by one.
        """
        scale = len(self.models) ** -0.5
        parts = [self._of(k, x.double()) * scale for k in range(len(self.models))]
        return torch.cat(parts, 1)

    def _of(self, number: int, x: Tensor) -> Tensor:
        model, fixed = self.models[number], self._fixed[number]

        def total(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
            said = functional_call(model, {**fixed, **parameters}, (one[None],))
            if said.ndim != 2:
                raise ModelError(f"a network gives (N, C): got {said.ndim} axes")
            return said.sum() / said.shape[1] ** 0.5

        try:
            found = vmap(grad(total), in_dims=(None, 0))(self._parameters[number], x)
        except RuntimeError as error:
            raise ModelError(
                f"gradient features of examples of shape {tuple(x.shape[1:])} cannot be had of this "
                f"{type(model).__name__}: {error}"
            ) from error
        return torch.cat([part.flatten(1) for part in found.values()], 1)

    def identity(self, x: Any) -> dict[str, str]:
        """The networks and the examples. Cost: reads them once."""
        tensors = [
            t for k in range(len(self.models)) for t in (*self._parameters[k].values(), *self._fixed[k].values())
        ]
        return {
            "features": "gradients of " + " ".join(architecture(model) for model in self.models),
            "parameters": digest(tensors),
            "rows": content(Examples(x)),
        }

    def __repr__(self) -> str:
        return f"GradientFeatures({', '.join(type(model).__name__ for model in self.models)})"


def _fixed(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not trained, and buffers."""
    frozen = {name: p.detach().clone().double() for name, p in model.named_parameters() if not p.requires_grad}
    return frozen | {
        name: b.detach().clone().double() if b.is_floating_point() else b.clone() for name, b in model.named_buffers()
    }


def _random(model: nn.Module) -> bool:
    kinds: Sequence[type[nn.Module]] = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return any(isinstance(module, tuple(kinds)) for module in model.modules())
