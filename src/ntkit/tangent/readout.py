"""Which scalars of a network's output are differentiated.

All tangent kernels are one object with another read-out: `Logits` gives the full kernel (K = C rows per example),
`SumOfLogits` the pseudo-NTK (K = 1), and so on. A network whose output is not an (N, C) tensor says through `select`
which scalars are meant: `Logits(select=lambda output: output.logits)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ntkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    Select = Callable[[Any], Tensor]


class Readout(ABC):
    """A map from a network's output to K scalars per example."""

    needs_targets: ClassVar[bool] = False

    @abstractmethod
    def scalars(self, output: Any, targets: Any = None) -> Tensor:
        """The K scalars of each example, shape (N, K), differentiable in the output."""


def logits(output: Any, select: Select | None) -> Tensor:
    """The (N, C) tensor among a model's output.

    Raises:
        InputError: if there is none, with the shape that was found and how to say which scalars are meant.
    """
    chosen = output if select is None else select(output)
    if isinstance(chosen, Tensor) and chosen.ndim == 1:
        chosen = chosen[:, None]
    if isinstance(chosen, Tensor) and chosen.ndim == 2 and chosen.is_floating_point() and chosen.shape[1] > 0:
        return chosen
    if isinstance(chosen, Tensor):
        got = f"a tensor of shape {tuple(chosen.shape)}, {chosen.dtype}"
    else:
        got = type(chosen).__name__
        if isinstance(chosen, dict):
            got += f" with keys {sorted(map(str, chosen))}"
    where = "the model's output" if select is None else "what `select` took from the model's output"
    raise InputError(
        f"{where} is {got}, expected a floating point tensor of shape (N, C). Say which scalars are meant, for example "
        "Logits(select=lambda output: output.logits) or Logits(select=lambda output: output[:, -1])"
    )


@dataclass(frozen=True)
class Logits(Readout):
    """All C outputs: the full empirical NTK, K = C.

    Args:
        select: takes the (N, C) tensor out of the model's output; not needed if the output is one already.
    """

    select: Select | None = None

    def scalars(self, output: Any, targets: Any = None) -> Tensor:
        """The outputs themselves, (N, C)."""
        return logits(output, self.select)


@dataclass(frozen=True)
class SumOfLogits(Readout):
    """The sum of the C outputs over sqrt(C): the pseudo-NTK, K = 1 (Mohamadi, Bae, Sutherland 2023, equation 2).

    Its kernel is (1/C) 1^T Theta 1, which converges to one diagonal entry of Theta with width, at initialisation.
    After training with softmax cross-entropy the sum of logits is a direction that predictions do not depend on:
    measure `fidelity()` and prefer the trace kernel or `RandomLogits` there.
    """

    select: Select | None = None

    def scalars(self, output: Any, targets: Any = None) -> Tensor:
        """The scaled sum, (N, 1)."""
        chosen = logits(output, self.select)
        return chosen.sum(1, keepdim=True) / math.sqrt(chosen.shape[1])


@dataclass(frozen=True)
class SingleLogit(Readout):
    """Output number `index` alone, K = 1."""

    index: int
    select: Select | None = None

    def scalars(self, output: Any, targets: Any = None) -> Tensor:
        """The chosen output, (N, 1).

        Raises:
            InputError: if there is no such output.
        """
        chosen = logits(output, self.select)
        if not -chosen.shape[1] <= self.index < chosen.shape[1]:
            raise InputError(f"the model has {chosen.shape[1]} outputs: got SingleLogit({self.index})")
        return chosen[:, [self.index]]


@dataclass(frozen=True, init=False)
class RandomLogits(Readout):
    """K = `draws` combinations of the outputs with random signs, (1/sqrt(C)) sum_c eps_c f_c.

    Each diagonal block's mean over draws is unbiased for the trace kernel (1/C) sum_c Theta_cc (Hutchinson), with a
    variance that falls as 1/draws. The signs are fixed when the read-out is made, so that rows, columns and later
    batches agree.
    """

    draws: int
    seed: int
    select: Select | None

    def __init__(self, draws: int, generator: torch.Generator, select: Select | None = None) -> None:
        """Take one seed from `generator`.

        Raises:
            InputError: if `draws` is not a positive number.
        """
        if isinstance(draws, bool) or not isinstance(draws, Integral) or draws < 1:
            raise InputError(f"RandomLogits needs a whole number of draws, at least one draw: got {draws!r}")
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device).item())
        for name, value in (("draws", draws), ("seed", seed), ("select", select)):
            object.__setattr__(self, name, value)

    def signs(self, outputs: int) -> Tensor:
        """The (C, K) matrix of +-1 / sqrt(C), float64."""
        generator = torch.Generator().manual_seed(self.seed)
        bits = torch.randint(2, (outputs, self.draws), generator=generator)
        return (2.0 * bits.double() - 1.0) / math.sqrt(outputs)

    def scalars(self, output: Any, targets: Any = None) -> Tensor:
        """The combinations, (N, draws)."""
        chosen = logits(output, self.select)
        return chosen @ self.signs(chosen.shape[1]).to(chosen)


@dataclass(frozen=True)
class Loss(Readout):
    """The loss of each example, K = 1: inner products of loss gradients, as in influence functions.

    The examples are then a tuple whose last member is the target, or a Dataset of (input, target) pairs.

    Args:
        function: (output, target) -> (N,) losses, for example `nn.CrossEntropyLoss(reduction="none")`.
        select: takes out of the model's output what the loss is given.
    """

    function: Callable[[Any, Any], Tensor]
    select: Callable[[Any], Any] | None = None
    needs_targets: ClassVar[bool] = True

    def scalars(self, output: Any, targets: Any = None) -> Tensor:
        """The losses, (N, 1).

        Raises:
            InputError: if there are no targets, or the loss is not one number per example.
        """
        if targets is None:
            raise InputError("a loss read-out needs targets: the Dataset gives inputs alone, expected (input, target)")
        chosen = output if self.select is None else self.select(output)
        losses = self.function(chosen, targets)
        if losses.ndim == 2 and losses.shape[1] == 1:
            losses = losses[:, 0]
        if losses.ndim != 1:
            raise InputError(
                f"a loss read-out needs one loss per example, shape (N,): got {tuple(losses.shape)}. "
                "Use reduction='none' and sum over all axes but the first"
            )
        return losses[:, None]
