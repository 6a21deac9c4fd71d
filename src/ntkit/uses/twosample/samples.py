"""Two samples, checked and pooled: nothing is computed before they are known to be usable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ntkit.errors import InputError
from ntkit.tangent.examples import Examples


def checked(data: Any, name: str, *, least: int) -> Examples:
    """A sample whose floating point tensors are finite.

    Args:
        data: a tensor, a tuple or dict of tensors with a common first axis, or a `Dataset`.
        name: what it is called in messages.
        least: the fewest examples that will do.

    Raises:
        InputError: if it is of another kind, too small, or has NaN or infinite entries.
    """
    found = Examples(data)
    if len(found) < least:
        raise InputError(f"the sample {name} has {len(found)} examples: expected at least {least}")
    if not isinstance(data, Dataset):
        for member in found.batch(slice(None)).tensors():
            if member.is_floating_point() and not bool(member.isfinite().all()):
                raise InputError(f"the sample {name} has entries that are NaN or infinite: clean it first")
    return found


def pooled(x: Examples, y: Examples) -> Examples:
    """Both samples as one, x first.

    Raises:
        InputError: if they are of different kinds, or their examples of different shapes.
    """
    if isinstance(x.data, Dataset) or isinstance(y.data, Dataset):
        if not (isinstance(x.data, Dataset) and isinstance(y.data, Dataset)):
            raise InputError("of two samples one is a Dataset and the other is not: give both in the same form")
        return Examples(ConcatDataset([x.data, y.data]))
    ours, theirs = _members(x.data), _members(y.data)
    if type(x.data) is not type(y.data) or ours.keys() != theirs.keys():
        raise InputError(
            f"two samples have the same form: got {type(x.data).__name__} of {list(ours)} and "
            f"{type(y.data).__name__} of {list(theirs)}"
        )
    for name, t in ours.items():
        other = theirs[name]
        first, second = ((tuple(part.shape[1:]), part.dtype, part.device) for part in (t, other))
        if first != second:
            got = " and ".join(f"{shape} {dtype} on {device}" for shape, dtype, device in (first, second))
            raise InputError(f"two samples have examples of one shape and type, on one device: got {got}")
    together = {name: torch.cat([t, theirs[name]]) for name, t in ours.items()}
    if isinstance(x.data, Tensor):
        return Examples(together[0])
    return Examples(together if isinstance(x.data, dict) else tuple(together.values()))


def _members(data: Any) -> dict[Any, Tensor]:
    if isinstance(data, dict):
        return data
    return dict(enumerate((data,) if isinstance(data, Tensor) else data))


def check_permutations(permutations: int) -> None:
    """Refuse a number of permutations that is none.

    Raises:
        InputError: if it is not a positive whole number.
    """
    if not isinstance(permutations, int) or isinstance(permutations, bool) or permutations < 1:
        raise InputError(f"permutations is a positive whole number: got {permutations!r}")


def check_level(level: float) -> None:
    """Refuse a level that is none.

    Raises:
        InputError: if it is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise InputError(f"the level of a test lies between 0 and 1: got {level!r}")


def halves(size: int, share: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Numbers of the examples of a sample, cut at random in two; `share` of them come first.

    Raises:
        InputError: if `share` is not between 0 and 1, or leaves fewer than two examples in a part.
    """
    if not 0 < share < 1:
        raise InputError(f"the share of a sample that is set apart lies between 0 and 1: got {share!r}")
    first = int(share * size)
    if min(first, size - first) < 2:
        raise InputError(
            f"a sample of {size} cut at {share:g} leaves {first} and {size - first} examples: expected two in each "
            "part at least"
        )
    order = torch.randperm(size, generator=generator, device=generator.device).tolist()
    return order[:first], order[first:]
