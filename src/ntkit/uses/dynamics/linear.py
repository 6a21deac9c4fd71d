"""The linearised network as a network: its outputs are straight lines in the parameters, and it can be trained."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits

if TYPE_CHECKING:
    from ntkit.tangent.linearize import Tangent
    from ntkit.tangent.parameters import Choice
    from ntkit.tangent.readout import Select


class Linearized(nn.Module):
    """f(x; theta_0) + J(x) (theta - theta_0), with theta - theta_0 as its only parameter.

    Trained like any module; its kernel stays as it is, so that its training is that of `ntkit.solve.flow`.

    Attributes:
        change: theta - theta_0, (P,), zero at first.
    """

    def __init__(self, model: nn.Module, *, parameters: Choice | None = None, select: Select | None = None) -> None:
        """Linearise a copy where the model stands: the model may be trained beside it.

        Args:
            model: in evaluation mode.
            parameters: which take part, as for `ntkit.linearize`.
            select: takes the (n, C) logits out of the model's output, if it is not a tensor.

        Raises:
            ModelError: if BatchNorm or Dropout are in training mode.
            InputError: if no parameter is selected.
        """
        super().__init__()
        chosen = set(linearize(model, readout=Logits(select), parameters=parameters).parameter_names)
        twin = copy.deepcopy(model)
        tangent = linearize(twin, readout=Logits(select), parameters=lambda name, _: name in chosen)
        self._tangent = (tangent,)  # not a submodule
        self.change = nn.Parameter(
            torch.zeros(self.tangent.count, dtype=self.tangent.dtype, device=self.tangent.device)
        )

    @property
    def tangent(self) -> Tangent:
        """The network at theta_0."""
        return self._tangent[0]

    def forward(self, x: Any) -> Tensor:
        """Outputs (n, C), differentiable in `change`. Cost: a forward pass and a jvp; backward one vjp."""
        return self.tangent.outputs(x) + _Product.apply(self.change, self.tangent, x)


class _Product(torch.autograd.Function):
    """J(x) v, with J(x)^T u as its gradient."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, tangent: Tangent, x: Any) -> Tensor:  # type: ignore[override]
        ctx.tangent, ctx.x = tangent, x
        return tangent.jvp(x, change.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.tangent.vjp(ctx.x, grad), None, None
