"""Examples: tensors with a common first axis, read by `len` and slices.

A tensor is one argument of the model, a tuple is its positional arguments, a dict its keyword arguments. A
`torch.utils.data.Dataset` is read through torch's own collation; there a pair means (input, target), as everywhere in
PyTorch, and the input may be a tuple or a dict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from ntkit.errors import InputError
from ntkit.tangent.structure import flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Examples that are looked at for one that differs from the first: the second, and some that are spread over all.
LOOKED = 16


@dataclass(frozen=True)
class Batch:
    """Some examples, ready for a model: its arguments, and targets where the read-out needs them."""

    size: int
    arguments: tuple[Tensor, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    targets: Any = None

    def call(self, model: Callable[..., Any]) -> Any:
        """The model's output on a copy of these examples, because models may write into their inputs."""
        arguments = [_copy(t) for t in self.arguments]
        return model(*arguments, **{name: _copy(t) for name, t in self.keywords.items()})

    @property
    def signature(self) -> tuple:
        """What has to be equal for two batches to take the same path through a model: shapes without N, and types."""
        named = [*enumerate(self.arguments), *sorted(self.keywords.items(), key=lambda item: item[0])]
        return tuple((name, tuple(t.shape[1:]), t.dtype) if isinstance(t, Tensor) else (name, t) for name, t in named)

    def begins_with(self, one: Batch) -> bool:
        """Whether the first example is that of another batch."""
        mine, theirs = (flatten((b.arguments, b.keywords, b.targets))[0] for b in (self, one))
        return len(mine) == len(theirs) and all(_equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments."""
        return (t for t in (*self.arguments, *self.keywords.values()) if isinstance(t, Tensor))


class Examples:
    """N examples that can be read in any order, without copying them all."""

    def __init__(self, data: Any, *, with_targets: bool = False) -> None:
        """Look at the data once; nothing is read before `batch`.

        Args:
            data: a tensor, a tuple or dict of tensors with a common first axis, or a `Dataset` with `len`.
            with_targets: whether the last member of a tuple is the target of a loss rather than an argument; the first
                of two may then be a dict.

        Raises:
            InputError: if the data are of another kind, empty, or of different lengths.
        """
        if isinstance(data, Examples):
            data = data.data
        self.data = data
        self.with_targets = with_targets
        self.size = _length(data, with_targets)
        if with_targets and not (isinstance(data, Dataset) or (isinstance(data, tuple) and len(data) >= 2)):
            raise InputError(
                f"a loss read-out needs targets: got {type(data).__name__}, "
                "expected a tuple (inputs, targets) or a Dataset of such pairs"
            )

    def __len__(self) -> int:
        """Number of examples N."""
        return self.size

    def batch(self, index: slice | Sequence[int], device: torch.device | None = None) -> Batch:
        """Some examples, on `device`."""
        data = self.data
        if isinstance(data, Dataset):
            numbers = range(*index.indices(self.size)) if isinstance(index, slice) else index
            items = [data[i] for i in numbers]  # pyright: ignore[reportIndexIssue]
            return self._from_dataset(default_collate(items), len(items), device)
        size = len(range(*index.indices(self.size))) if isinstance(index, slice) else len(index)
        if isinstance(data, Tensor):
            return Batch(size, (_take(data, index, device),))
        if isinstance(data, dict):
            return Batch(size, (), _take(data, index, device))
        members = tuple(_take(t, index, device) for t in data)
        return _batch(size, members[:-1], members[-1]) if self.with_targets else Batch(size, members)

    @cached_property
    def contrast(self) -> tuple[int, frozenset[int]]:
        """An example that differs from the first in as many members as one of a few does, and those members.

        Equal examples, or equal targets, cannot show that a model mixes them. Cost: reads two examples, and `LOOKED`
        more where the second does not differ in all members.
        """
        last = self.size - 1
        spread = {round(step * last / LOOKED) for step in range(1, LOOKED)} - {0, 1}
        other, most = min(1, last), frozenset[int]()
        for numbers in ([other], [last, *sorted(spread - {last})]):
            members = self._members([0, *numbers])
            differing = [(t[1:] != t[:1]).reshape(len(numbers), -1).any(1).tolist() for t in members if t.numel()]
            for number, differs in zip(numbers, zip(*differing, strict=True), strict=False):
                found = frozenset(member for member, here in enumerate(differs) if here)
                if len(found) > len(most):
                    other, most = number, found
            if len(most) == len(differing):
                break
        return other, most

    def for_a_trial(self, count: int) -> list[int]:
        """Numbers of `count` examples, three at most, that show whether a model mixes them.

        The first of all, one that differs from it, and another; some come again where there are fewer.
        """
        other = self.contrast[0]
        return [0, other, (2 if other == 1 else 1) % self.size][:count]

    def _members(self, numbers: Sequence[int]) -> list[Tensor]:
        """What some examples are made of; their targets where those count."""
        some = self.batch(numbers)
        leaves, _ = flatten((some.arguments, some.keywords, some.targets if self.with_targets else None))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def pick(self, numbers: Sequence[int]) -> Any:
        """Some examples as data of the same kind."""
        data = self.data
        if isinstance(data, Dataset):
            return Subset(data, numbers)
        if isinstance(data, (Tensor, dict)):
            return _take(data, numbers, None)
        return tuple(_take(t, numbers, None) for t in data)

    def _from_dataset(self, items: Any, size: int, device: torch.device | None) -> Batch:
        items = _move(items, device)
        if isinstance(items, dict):
            return Batch(size, (), items)
        if isinstance(items, Tensor):
            return Batch(size, (items,))
        members = tuple(items)
        inputs, target = (members, None) if len(members) == 1 else (members[:-1], members[-1])
        return _batch(size, inputs, target)


def _batch(size: int, inputs: tuple[Any, ...], target: Any) -> Batch:
    """Inputs and target, where the only input may itself be a dict or a tuple of inputs."""
    if len(inputs) == 1 and isinstance(inputs[0], dict):
        return Batch(size, (), inputs[0], target)
    if len(inputs) == 1 and isinstance(inputs[0], tuple):
        inputs = inputs[0]
    return Batch(size, inputs, {}, target)


def _length(data: Any, with_targets: bool) -> int:
    if isinstance(data, Dataset):
        if not hasattr(data, "__len__"):
            raise InputError("a Dataset must have a length to index a kernel's rows: got one without __len__")
        size = len(data)  # pyright: ignore[reportArgumentType]
    else:
        members = {"x": data} if isinstance(data, Tensor) else data
        if isinstance(members, tuple):
            named = with_targets and len(members) == 2 and isinstance(members[0], dict)
            members = {**members[0], "the targets": members[1]} if named else dict(enumerate(members))
        if not isinstance(members, dict) or not members:
            raise InputError(
                f"examples are a tensor, a tuple or dict of tensors, or a Dataset: got {type(data).__name__}. "
                "Convert a NumPy array with torch.from_numpy, a list of arguments to a tuple"
            )
        for name, t in members.items():
            if not isinstance(t, Tensor) or t.ndim == 0:
                shape = "a scalar tensor" if isinstance(t, Tensor) else type(t).__name__
                raise InputError(f"member {name!r} of the examples must be a tensor with a first axis: got {shape}")
        lengths = {name: len(t) for name, t in members.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"the members of the examples must share their first axis: got lengths {lengths}")
        size = next(iter(lengths.values()))
    if size == 0:
        raise InputError("a kernel needs at least one example: got 0")
    return size


def _take(t: Any, index: slice | Sequence[int], device: torch.device | None) -> Any:
    if isinstance(t, dict):
        return {name: _take(member, index, device) for name, member in t.items()}
    part = t[index if isinstance(index, slice) else list(index)].detach()
    return outside_inference(part if device is None else part.to(device))


def _equal(a: Any, b: Any) -> bool:
    """Whether the first examples of two batches are equal in a member."""
    return torch.equal(a[:1], b[:1]) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def outside_inference(t: Tensor) -> Tensor:
    """The same values where autograd can keep them: it takes no tensor that was made in inference mode."""
    if not t.is_inference():
        return t
    with torch.inference_mode(False):
        return t.clone()


def _copy(t: Any) -> Any:
    return t.clone() if isinstance(t, Tensor) else t


def _move(items: Any, device: torch.device | None) -> Any:
    if isinstance(items, Tensor):
        return outside_inference(items.detach() if device is None else items.detach().to(device))
    if isinstance(items, dict):
        return {name: _move(item, device) for name, item in items.items()}
    if isinstance(items, (tuple, list)):
        return tuple(_move(item, device) for item in items)
    return items
