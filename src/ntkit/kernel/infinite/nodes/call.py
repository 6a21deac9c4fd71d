"""One node of a traced module with its arguments read, as handlers take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from torch import fx, nn

from ntkit.kernel.infinite.values import Applied, Field, Parameter, Plain, Value

if TYPE_CHECKING:
    from ntkit.kernel.infinite.reader import Reader

RANDOM = (Field, Applied)
# Why attention has no limit here.
SCORES = "the softmax of random scores has no closed form at the usual scale 1/sqrt(d)"


@dataclass(frozen=True)
class Call:
    """One node with its arguments read.

    Attributes:
        reader: adds steps.
        node: of the graph.
        module: that is called; None for functions and methods.
        name: of the function or method; of a module's class.
        args, keywords: values.
    """

    reader: Reader
    node: fx.Node
    module: nn.Module | None
    name: str
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def x(self) -> Value:
        """The tensor that is worked on."""
        return self.args[0] if self.args else self.keywords["input"]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by place or by name, as a Python value where it is one."""
        found = self.args[place] if len(self.args) > place else self.keywords.get(name, default)
        return plain(found)

    def field(self) -> Field:
        """The hidden units that are worked on."""
        return self.reader.field(self.x, self.node)

    def refuse(self, why: str) -> NoReturn:
        """This node has no limit.

        Raises:
            ModelError: always.
        """
        self.reader.refuse(self.node, why)

    def own(self, name: str) -> Parameter | None:
        """A parameter of the module that is called; None where it has none."""
        found = getattr(self.module, name, None)
        if found is not None and id(found) not in self.reader.names:
            self.refuse(f"its {name} is not a parameter of the module")
        return None if found is None else Parameter(self.reader.names[id(found)], found)

    @property
    def first(self) -> fx.Node:
        """The node of the tensor that is worked on."""
        found = self.node.args[0] if self.node.args else self.node.kwargs["input"]
        assert isinstance(found, fx.Node)
        return found


def plain(value: Any) -> Any:
    """A Python value out of a read argument; tensors stay what they are."""
    if isinstance(value, Plain):
        return value.value
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    return value


def each(value: Any, rank: int) -> tuple[int, ...]:
    """A number for each axis."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
