"""Nested arguments of an operation as a flat list, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Rebuild = Callable[[Sequence[Any]], Any]


def flatten(nested: Any) -> tuple[list[Any], Rebuild]:
    """The leaves of nested tuples, lists and dicts, and a function that puts new leaves in their places."""
    leaves: list[Any] = []
    _collect((nested,), leaves)

    def rebuild(new: Sequence[Any]) -> Any:
        return _place(nested, iter(new))

    return leaves, rebuild


def _collect(members: Iterable[Any], leaves: list[Any]) -> None:
    for member in members:
        if not isinstance(member, (tuple, list, dict)):
            leaves.append(member)
        elif member:
            _collect(member.values() if isinstance(member, dict) else member, leaves)


def _place(nested: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(nested, (tuple, list)):
        members = [_place(member, leaves) for member in nested]
        if isinstance(nested, list):
            return members
        return type(nested)(*members) if hasattr(nested, "_fields") else tuple(members)
    if isinstance(nested, dict):
        return {name: _place(member, leaves) for name, member in nested.items()}
    return next(leaves)
