"""What an optimiser will do with a gradient: where it goes, and how much of that is this gradient's own doing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from ntkit.tangent.parameters import Selection


@dataclass(frozen=True, eq=False)
class Displacement:
    """The next update of the selected parameters, all of shape (P,).

    Attributes:
        total: theta_{t+1} - theta_t, as the optimiser makes it.
        scale: of this gradient g alone: its own part of the update is -scale * g, the rest comes from momentum and
            weight decay. The learning rate for plain SGD; for Adam (1 - beta1) / (1 - beta1^t) times it over the root
            of second moments.
        learning_rate: of the first group of parameters.
    """

    total: Tensor
    scale: Tensor
    learning_rate: float


def displacement(
    model: nn.Module, selection: Selection, gradient: Tensor, optimizer: Optimizer | float
) -> Displacement:
    """Let a copy of an optimiser take its next step on copies of the parameters; neither model nor optimiser changes.

    Args:
        model: whose parameters the optimiser has.
        selection: those that the gradient is of; others do not move.
        gradient: (P,).
        optimizer: of torch, in the state that it is in; or a learning rate for plain SGD.

    Raises:
        InputError: if the optimiser has other parameters, or is neither SGD, Adam nor AdamW.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not optimizer > 0:
            raise InputError(f"learning rate: got {optimizer!r}, expected a positive number, or an optimiser of torch")
        scale = torch.full_like(gradient, float(optimizer))
        return Displacement(-scale * gradient, scale, float(optimizer))
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise InputError(
            f"steps of {type(optimizer).__name__} are not taken apart: expected torch.optim.SGD, Adam or AdamW, or a "
            "learning rate for plain SGD"
        )
    own = {id(p) for p in model.parameters()}
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise InputError("the optimiser has parameters that are not the model's: pass the one that trains this model")
    parts = dict(zip(map(id, selection.tensors), selection.split(gradient), strict=True))
    copies = _stepped(optimizer, parts)
    total, scale = [], []
    for parameter in selection.tensors:
        if id(parameter) in copies:
            copy, group, state = copies[id(parameter)]
            total.append((copy.detach() - parameter.detach()).reshape(-1))
            scale.append(_scale(optimizer, group, state, parameter).reshape(-1))
        else:  # the optimiser does not train it
            total.append(torch.zeros_like(parameter.detach()).reshape(-1))
            scale.append(torch.zeros_like(parameter.detach()).reshape(-1))
    return Displacement(torch.cat(total), torch.cat(scale), float(optimizer.param_groups[0]["lr"]))


def _stepped(optimizer: Optimizer, gradients: dict[int, Tensor]) -> dict[int, tuple[Tensor, dict, dict]]:
    """Copies of all parameters after a step of a copy of the optimiser, with their groups and states."""
    groups, copies = [], {}
    for group in optimizer.param_groups:
        members = []
        for parameter in group["params"]:
            member = parameter.detach().clone().requires_grad_()
            if id(parameter) in gradients:
                member.grad = gradients[id(parameter)].to(member).clone()
            copies[id(parameter)] = member
            members.append(member)
        groups.append({**group, "params": members})
    twin = type(optimizer)(groups)  # pyright: ignore[reportCallIssue]
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would go on in the very same tensors
    twin.step()
    found = {}
    for before, after in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for parameter, member in zip(before["params"], after["params"], strict=True):
            found[id(parameter)] = member, after, twin.state.get(member, {})
    return found


def _scale(optimizer: Optimizer, group: dict, state: dict, parameter: Tensor) -> Tensor:
    """How far a parameter goes for each unit of this gradient; `state` is that after the step."""
    rate, sign = float(group["lr"]), -1.0 if group.get("maximize") else 1.0
    one = torch.ones_like(parameter.detach())
    if isinstance(optimizer, torch.optim.SGD):
        momentum = group["momentum"]
        if not momentum:
            return sign * rate * one
        first = optimizer.state.get(parameter, {}).get("momentum_buffer") is None
        kept = 1.0 if first else 1 - group["dampening"]  # torch takes the first gradient whole
        return sign * rate * (1 + momentum * kept if group["nesterov"] else kept) * one
    beta1, beta2 = group["betas"]
    steps = float(state["step"])
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    root = (second / (1 - beta2**steps)).sqrt() + group["eps"]
    return sign * rate * (1 - beta1) / (1 - beta1**steps) / root
