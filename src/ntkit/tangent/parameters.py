"""Which parameters take part in a kernel, and what identifies their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.tangent.identity import digest, passing_buffers

if TYPE_CHECKING:
    from collections.abc import Iterator

    Choice = Callable[[str, nn.Parameter], bool] | str | nn.Module | nn.Parameter | Iterable


@dataclass(frozen=True)
class Selection:
    """The parameters that are differentiated, each once however often it is tied, in the model's own order."""

    names: tuple[str, ...]
    tensors: tuple[nn.Parameter, ...]

    @property
    def count(self) -> int:
        """Number of scalar parameters P."""
        return sum(t.numel() for t in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The widest type among them."""
        return reduce(torch.promote_types, dict.fromkeys(t.dtype for t in self.tensors))

    def split(self, vector: Tensor) -> list[Tensor]:
        """A (P,) vector as tensors of the parameters' shapes."""
        parts = vector.split([t.numel() for t in self.tensors])
        return [part.reshape(t.shape) for part, t in zip(parts, self.tensors, strict=True)]

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """All selected parameters require gradients inside; outside each is as it was."""
        before = [t.requires_grad for t in self.tensors]
        try:
            for t in self.tensors:
                t.requires_grad_(True)
            yield
        finally:
            for t, flag in zip(self.tensors, before, strict=True):
                t.requires_grad_(flag)


def select(model: nn.Module, choice: Choice | None = None) -> Selection:
    """The parameters of `model` that `choice` names.

    Args:
        model: any module.
        choice: None for all that require gradients; a predicate (name, parameter) -> bool; a pattern of names as in a
            shell ("head.*"); a submodule or a parameter of the model; or an iterable of patterns, modules, parameters.

    Raises:
        InputError: if nothing is selected, or something that is not the model's.
        ModelError: if a selected parameter is not initialised or not of a floating point type.
    """
    named = dict(model.named_parameters())
    if choice is None:
        chosen = {name for name, p in named.items() if p.requires_grad}
    elif callable(choice) and not isinstance(choice, nn.Module):
        chosen = {name for name, p in named.items() if choice(name, p)}
    else:
        single = isinstance(choice, (str, nn.Module, Tensor))
        members = list(choice) if isinstance(choice, Iterable) and not single else [choice]
        chosen = set().union(*(_named_by(member, named) for member in members))
    if not chosen:
        known = ", ".join(list(named)[:5]) or "none"
        hint = "no parameter requires gradients" if choice is None else f"nothing matches {choice!r}"
        raise InputError(f"no parameter takes part in the kernel: {hint}. The model's parameters begin: {known}")
    names = tuple(name for name in named if name in chosen)
    for name in names:
        parameter = named[name]
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"parameter {name!r} is not initialised: run the lazy module once before linearizing it")
        if not parameter.is_floating_point():
            raise ModelError(
                f"parameter {name!r} has dtype {parameter.dtype}: a tangent kernel needs floating point parameters. "
                "Leave it out with parameters=..., or dequantize the model"
            )
    return Selection(names, tuple(named[name] for name in names))


def _named_by(member: object, named: dict[str, nn.Parameter]) -> set[str]:
    if isinstance(member, str):
        found = {name for name in named if fnmatchcase(name, member)}
    elif isinstance(member, nn.Module):
        own = {id(p) for p in member.parameters()}
        found = {name for name, p in named.items() if id(p) in own}
    elif isinstance(member, Tensor):
        found = {name for name, p in named.items() if p is member}
    else:
        raise InputError(f"parameters are selected by name pattern, module, parameter or predicate: got {member!r}")
    if not found:
        text = member if isinstance(member, str) else type(member).__name__
        raise InputError(f"{text!r} selects no parameter of this model; its parameters begin: {list(named)[:5]}")
    return found


def fingerprint(model: nn.Module, selection: Selection) -> str:
    """SHA-256 over the content of all parameters and buffers and over which of them are selected. Cost: one read.

    Buffers that are not saved with the model count as well, but for those that calling it makes or changes.
    """
    content = {**model.state_dict(), **passing_buffers(model)}
    found = hashlib.sha256()
    for name, value in sorted(content.items(), key=lambda item: item[0]):
        found.update(f"{name} {digest([value])};".encode())
    found.update("|".join(selection.names).encode())
    return found.hexdigest()
