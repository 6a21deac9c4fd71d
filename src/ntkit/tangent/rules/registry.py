"""The open table of rules: one function per operation, one signature.

A rule takes a `Use` and the operation's own arguments, with every tensor wrapped as an `Operand`, and yields
(operand, factor) for each selected parameter among them. Returning NotImplemented hands the use to the local route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ntkit.tangent.layout import ExampleAxis

if TYPE_CHECKING:
    from torch import Tensor

    from ntkit.tangent.factors import Factor


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor argument of an operation.

    Attributes:
        tensor: its value.
        axis: where its examples are; None if it has none, as for parameters.
        place: its number among the operation's tensors.
        selected: whether it is a parameter (or made of parameters alone) that takes part in the kernel.
    """

    tensor: Tensor
    axis: ExampleAxis | None
    place: int
    selected: bool

    def per_example(self, examples: int) -> Tensor:
        """The value with the examples first, (n, *shape of a batch of one): (N, d) becomes (n, 1, d)."""
        assert self.axis is not None
        return self.axis.split(self.tensor, examples)


@dataclass(frozen=True, eq=False)
class Use:
    """One call of one operation on one batch, with the cotangents of its outputs.

    Attributes:
        function: the operation.
        arguments: positional arguments, tensors as `Operand`.
        keywords: keyword arguments, likewise.
        axes: where the examples are in each output.
        cotangents: per output (n, k, *shape of a batch of one), or None where nothing flows back.
        examples: n.
        in_place: whether the operation writes into its first argument, whose `tensor` is then the old value.
    """

    function: Callable
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    axes: tuple[ExampleAxis | None, ...]
    cotangents: tuple[Tensor | None, ...]
    examples: int
    in_place: bool = False

    @property
    def cotangent(self) -> Tensor:
        """The cotangent of the first output."""
        cotangent = self.cotangents[0]
        assert cotangent is not None
        return cotangent


Contributions: TypeAlias = "Iterable[tuple[Operand, Factor]]"
Rule: TypeAlias = Callable[..., Contributions]

RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule for one or several operations, as seen by `torch.overrides`."""

    def register(function: Rule) -> Rule:
        for operation in functions:
            RULES[operation] = function
        return function

    return register


def selected(*operands: object) -> list[Operand]:
    """Those arguments that are operands with a selected parameter."""
    return [o for o in operands if isinstance(o, Operand) and o.selected]
