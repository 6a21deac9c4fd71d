"""What a node of a traced module is while its graph is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ntkit.kernel.infinite.pointwise import Pointwise


class Shape(tuple):
    """Of a node's tensor, for two examples."""


@dataclass(frozen=True)
class Known:
    """A tensor that depends on the inputs alone, not on random weights."""

    node: Any


@dataclass(frozen=True)
class Plain:
    """A number, a shape or another Python value.

    Attributes:
        varies: whether it depends on how many examples there are.
    """

    value: Any
    varies: bool = False


@dataclass(frozen=True)
class Parameter:
    """A parameter of the module, used as a function's argument."""

    name: str
    tensor: Any


@dataclass(frozen=True)
class Field:
    """Hidden units: random, alike in all channels, known by their covariance.

    Attributes:
        step: number of the step that gives the covariance.
        channel: axis of the channels, whose number goes to infinity.
        roots: steps whose weights the values themselves depend on, with no weights of their own in between. Two layers
            that share a root are correlated.
        gaussian: whether the units are Gaussian, given the layers before.
        centred: whether their mean is zero.
        merged: the order in which positions have become channels (behind a flatten), 0 where they have not: 1 and how
            many axes of positions lay before the channels, but those of one position.
        scale: of a trained weight per channel in a normalisation layer just before, whose part of the tangent kernel is
            still to come: it depends on the function that follows. None where there is none.
        entangled: whether such a part has gone into a sum with another layer, or through another normalisation.
        mixed: whether the channels are of several kinds (behind a concatenation).
    """

    step: int
    channel: int
    roots: frozenset[int]
    gaussian: bool = True
    centred: bool = True
    merged: int = 0
    scale: float | None = None
    entangled: bool = False
    mixed: bool = False


@dataclass(frozen=True)
class Applied:
    """An elementwise function of Gaussian units, before its moments are taken: others may be applied to it."""

    field: Field
    function: Pointwise


Value = Known | Plain | Parameter | Field | Applied


def changed(field: Field, step: int, **other: Any) -> Field:
    """The units after a step."""
    return replace(field, step=step, **other)
