"""Heads for a new task: what is put on a backbone before it is probed and fine-tuned."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from ntkit.errors import InputError, ModelError
from ntkit.tangent.examples import Examples
from ntkit.uses.finetune.split import Split

if TYPE_CHECKING:
    from ntkit.tangent.readout import Select


class Head(ABC):
    """Makes a copy of a network with a head for C classes. What is drawn at random follows torch's own generator."""

    @abstractmethod
    def build(self, model: nn.Module, x: Any, classes: int) -> Split:
        """A copy of the network, cut in two.

        Args:
            model: not changed.
            x: examples; the first of them tell the number of features.
            classes: C.

        Raises:
            ModelError: if the network has no such module, or it does not take one vector for each example.
        """


@dataclass(frozen=True)
class LinearHead(Head):
    """A fresh linear layer in the place of a module: the plainest head, which leaves most of the work to the features.

    Attributes:
        name: of the module that is replaced.
        select: takes the (N, C) logits out of the network's output, if it is not a tensor.
    """

    name: str
    select: Select | None = None

    def build(self, model: nn.Module, x: Any, classes: int) -> Split:  # noqa: D102
        return _replaced(model, self.name, x, classes, (), self.select)


@dataclass(frozen=True)
class MLPHead(Head):
    """A fresh multi-layer perceptron with ReLU: it takes up more of the energy itself and spares the features.

    Attributes:
        name: of the module that is replaced.
        width: of its hidden layers.
        depth: number of its linear layers, 2 or more.
        select: takes the (N, C) logits out of the network's output, if it is not a tensor.
    """

    name: str
    width: int = 512
    depth: int = 2
    select: Select | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if there is no hidden layer.
        """
        if self.width < 1 or self.depth < 2:
            raise InputError(f"MLPHead: got width={self.width}, depth={self.depth}, expected 1 and 2 or more")

    def build(self, model: nn.Module, x: Any, classes: int) -> Split:  # noqa: D102
        return _replaced(model, self.name, x, classes, (self.width,) * (self.depth - 1), self.select)


@dataclass(frozen=True)
class OwnHead(Head):
    """The network's own modules, with the weights that they have: for a network that has its new head already.

    Attributes:
        names: of the head's modules, one or several.
        select: takes the (N, C) logits out of the network's output, if it is not a tensor.
    """

    names: str | Sequence[str]
    select: Select | None = None

    def build(self, model: nn.Module, x: Any, classes: int) -> Split:  # noqa: D102
        split = Split(copy.deepcopy(model), self.names, self.select)
        found = split.check(Examples(x)).outputs
        if found != classes:
            raise ModelError(
                f"the network has {found} outputs and the targets have {classes} classes: expected as many, or give it "
                f"a new head, LinearHead({split.names[-1]!r})"
            )
        return split


@dataclass(frozen=True)
class Reinitialised(Head):
    """The last modules of the backbone with fresh weights, as a part of the head, below a head on top.

    For a downstream task far from what the network was trained on: the last layers know the old classes best.

    Attributes:
        modules: names of the modules that forget their weights.
        top: the head on top of them.
    """

    modules: str | Sequence[str]
    top: LinearHead | MLPHead | OwnHead

    def build(self, model: nn.Module, x: Any, classes: int) -> Split:  # noqa: D102
        names = (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)
        Split(model, names)  # refuses names that are not there, before anything is copied
        split = self.top.build(model, x, classes)
        for name in names:
            _forget(split.model.get_submodule(name), name)
        return Split(split.model, (*names, *split.names), split.select)


def _replaced(
    model: nn.Module, name: str, x: Any, classes: int, hidden: tuple[int, ...], select: Select | None
) -> Split:
    before, examples = Split(model, name, select), Examples(x)
    features = _width(before, examples)
    sizes = [features, *hidden, classes]
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    head = layers[0] if not hidden else nn.Sequential(*layers[:-1])
    like = next(model.parameters())
    split = Split(copy.deepcopy(model), name, select)
    parent, _, own = name.rpartition(".")
    setattr(split.model.get_submodule(parent), own, head.to(like.device, like.dtype).train(model.training))
    return split


def _width(split: Split, examples: Examples) -> int:
    shape = split.check(examples).shape
    if len(shape) != 1:
        raise ModelError(
            f"the module {split.names[0]!r} takes features of shape {shape} for each example, expected one vector: "
            "name the last linear layer, or use OwnHead(...) with a head of your own"
        )
    return shape[0]


def _forget(module: nn.Module, name: str) -> None:
    for inner, part in module.named_modules(prefix=name):
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        elif any(True for _ in part.parameters(recurse=False)):
            raise ModelError(
                f"the module {inner!r} ({type(part).__name__}) has parameters and no reset_parameters(): give it one, "
                "or put fresh weights there yourself and use OwnHead(...)"
            )
