"""Backbones to choose among: what of them would be fine-tuned, and the kernel of one random logit on each."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.features import features
from ntkit.tangent import parameters as selecting
from ntkit.tangent.examples import Examples
from ntkit.tangent.linearize import Tangent, linearize
from ntkit.tangent.untouched import check_evaluation
from ntkit.uses.finetune.split import Backbone, Split

if TYPE_CHECKING:
    from ntkit.tangent.parameters import Choice
    from ntkit.tangent.readout import Readout


class SeenLabelsWarning(UserWarning):
    """Issued when a kernel may have seen the labels, so that the predicted loss is too good, naming the candidate."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A network, and what of it would be fine-tuned.

    Attributes:
        model: in evaluation mode; not changed.
        head: names of the modules that are left out: the features come in there. The call's `head` by default.
        parameters: of the backbone that take part, as in `linearize`: all that require gradients by default; () for
            none, which is a head alone on features that stand still.
        seen: whether the network was trained on these very examples and labels.
        readout: keeps the network's own head and reads one scalar out of it, instead of a random logit. A head that was
            fitted to the labels makes the prediction too good.
    """

    model: nn.Module
    head: str | Sequence[str] | None = None
    parameters: Choice | None = None
    seen: bool = False
    readout: Readout | None = None


class KernelKind(ABC):
    """How the kernel of a network is computed: (N, N), one scalar for each example.

    Attributes:
        heads: random heads whose kernels are averaged.
    """

    heads: int

    @abstractmethod
    def of(self, tangent: Tangent, x: Any, generator: torch.Generator) -> Tensor:
        """The kernel, (N, N)."""


@dataclass(frozen=True)
class ExactKernel(KernelKind):
    """The exact tangent kernel. Cost: as of `TangentKernel` with one scalar, for each head.

    Attributes:
        heads: random heads whose kernels are averaged.
    """

    heads: int = 1

    def of(self, tangent: Tangent, x: Any, generator: torch.Generator) -> Tensor:  # noqa: D102
        return TangentKernel(tangent, x).dense().double()


@dataclass(frozen=True)
class SketchedKernel(KernelKind):
    """A sketch of it, where networks are large: a forward and a backward pass for each example and head, and N^2 D.

    Attributes:
        size: D, features of each example; the relative error of an entry falls as 1 / sqrt(D).
        heads: random heads whose kernels are averaged.
    """

    size: int = 2048
    heads: int = 1

    def of(self, tangent: Tangent, x: Any, generator: torch.Generator) -> Tensor:  # noqa: D102
        return features(tangent, x, size=self.size, generator=generator).dense().double()


class _RandomLogit(nn.Module):
    """A random linear head of one output on a backbone, drawn as torch draws new linear layers."""

    def __init__(self, backbone: Backbone, width: int, like: Tensor, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(width)
        drawn = (2 * torch.rand(width + 1, generator=generator, dtype=torch.float64) - 1) * bound
        self.weight = nn.Parameter(drawn[None, :-1].to(like))
        self.bias = nn.Parameter(drawn[-1:].to(like))
        self.training = backbone.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return nn.functional.linear(self.backbone(*args, **kwargs), self.weight, self.bias)


def tangent_of(candidate: Candidate, split: Split, examples: Examples, seed: int) -> Tangent:
    """One scalar of a candidate, that of a random head, with the parameters that take part."""
    model, choice = candidate.model, candidate.parameters
    if candidate.readout is not None:
        return linearize(model, readout=candidate.readout, parameters=choice)
    nothing = isinstance(choice, (tuple, list)) and not choice
    names = () if nothing else selecting.select(model, choice).names
    taking = {f"backbone.model.{name}" for name in names if not split.in_head(name)} | {"weight", "bias"}
    width = math.prod(split.check(examples).shape)
    like = next(p for p in model.parameters() if p.is_floating_point())
    network = _RandomLogit(Backbone(model, split.names), width, like, seed)
    return linearize(network, parameters=lambda name, _: name in taking)


def checked(name: str, candidate: Candidate, head: str | Sequence[str], examples: Examples) -> Split:
    """A candidate cut in two, with a warning where its kernel may have seen the labels.

    Raises:
        InputError: naming the candidate, if its read-out gives several scalars.
        ModelError: the same, if it is in training mode or cannot be cut there.
    """
    try:
        check_evaluation(candidate.model)
        split = Split(candidate.model, head if candidate.head is None else candidate.head)
        split.check(examples)
    except ModelError as error:
        raise ModelError(f"candidate {name!r}: {error}") from error
    if candidate.readout is not None:
        own = linearize(candidate.model, readout=candidate.readout, parameters=candidate.parameters)
        scalars = own.outputs(examples.pick([0])).shape[1]
        if scalars != 1:
            raise InputError(
                f"candidate {name!r}: its read-out gives {scalars} scalars for each example, expected one, such as "
                "SumOfLogits()"
            )
    if candidate.seen or candidate.readout is not None:
        cause = "was trained on these examples" if candidate.seen else "keeps its own head, which may be fitted to them"
        warnings.warn(
            f"candidate {name!r} {cause}: its kernel may have seen the labels, and its predicted loss is then too "
            "good. Rank with a random head, and with labels that no candidate was trained on",
            SeenLabelsWarning,
            stacklevel=4,
        )
    return split
