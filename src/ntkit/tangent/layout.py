"""Where the examples sit in a tensor somewhere inside a network.

Networks move the example axis about: sequence-first attention has it second, flattened tokens (N*T, d) merge it with
the positions, merged heads (T, N*heads, d) put it between. Where it is can be seen from outside by running the network
on a few examples and on the same and one more, and comparing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ntkit.errors import NtkitError

if TYPE_CHECKING:
    from torch import Tensor


class NoExampleAxis(NtkitError):
    """A tensor's size depends on the number of examples in a way that no single axis explains."""


@dataclass(frozen=True)
class ExampleAxis:
    """Axis `axis` of a tensor runs over (before, N, after), slowest first."""

    axis: int
    before: int = 1
    after: int = 1

    def fits(self, tensor: Tensor, examples: int) -> bool:
        """Whether the tensor has the size that this many examples need."""
        return self.axis < tensor.ndim and tensor.shape[self.axis] == self.before * examples * self.after

    def split(self, tensor: Tensor, examples: int) -> Tensor:
        """Examples first: (N, *shape), where `shape` is that of the tensor for a single example."""
        shape = tensor.shape
        head, tail = shape[: self.axis], shape[self.axis + 1 :]
        if self.axis == 0 and self.before == 1:
            return tensor.reshape(examples, self.after, *tail)
        split = tensor.reshape(*head, self.before, examples, self.after, *tail).movedim(self.axis + 1, 0)
        return split.reshape(examples, *head, self.before * self.after, *tail)


def grows(few: tuple[int, ...], more: tuple[int, ...], count: int) -> tuple[int, int] | None:
    """The axis that grows with the number of examples and its size per example, or None if none does.

    Args:
        few: a tensor's shape in a run on `count` examples.
        more: its shape in a run on one more.
        count: number of examples of the first run.

    Raises:
        NoExampleAxis: if several axes change, or one not in proportion.
    """
    if few == more:
        return None
    changed = [axis for axis, (a, b) in enumerate(zip(few, more, strict=False)) if a != b]
    if len(few) != len(more) or len(changed) != 1:
        raise NoExampleAxis(f"shape {few} for {count} examples becomes {more} for {count + 1}")
    axis = changed[0]
    each, rest = divmod(few[axis], count)
    if rest or more[axis] != each * (count + 1):
        raise NoExampleAxis(f"shape {few} for {count} examples becomes {more} for {count + 1}")
    return axis, each


def locate(few: Tensor, more: Tensor, count: int) -> ExampleAxis | None:
    """The example axis of a tensor seen in two runs, the second with one more example behind the same `count`.

    Where N is merged with other axes the order is read off the values: the right one makes the common examples agree.

    Raises:
        NoExampleAxis: if there is no such axis.
    """
    found = grows(tuple(few.shape), tuple(more.shape), count)
    if found is None:
        return None
    axis, each = found
    orders = [ExampleAxis(axis, before, each // before) for before in _divisors(each)]
    if len(orders) == 1:
        return orders[0]

    def disagreement(order: ExampleAxis) -> float:
        difference = order.split(more.detach(), count + 1)[:count].double() - order.split(few.detach(), count).double()
        return float(difference.nan_to_num().abs().amax()) if prod(difference.shape) else 0.0

    return min(orders, key=disagreement)


def _divisors(number: int) -> list[int]:
    """Divisors with the two usual orders, N slowest and N fastest, first."""
    all_divisors = [d for d in range(1, number + 1) if number % d == 0]
    return sorted(all_divisors, key=lambda d: (d not in (1, number), d))
