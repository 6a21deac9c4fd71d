"""Nested arguments of an operation as a flat list, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Rebuild = Callable[[Sequence[Any]], Any]


def flatten(nested: Any) -> tuple[list[Any], Rebuild]:
    """The leaves of nested tuples, lists and dicts, and a function that puts new leaves in their places."""
    leaves: list[Any] = []
    _collect(nested, leaves)

    def rebuild(new: Sequence[Any]) -> Any:
        return _place(nested, iter(new))

    return leaves, rebuild


def _collect(nested: Any, leaves: list[Any]) -> None:
    if isinstance(nested, (tuple, list)):
        for member in nested:
            _collect(member, leaves)
    elif isinstance(nested, dict):
        for member in nested.values():
            _collect(member, leaves)
    else:
        leaves.append(nested)


def _place(nested: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(nested, (tuple, list)):
        members = [_place(member, leaves) for member in nested]
        if isinstance(nested, list):
            return members
        return type(nested)(*members) if hasattr(nested, "_fields") else tuple(members)
    if isinstance(nested, dict):
        return {name: _place(member, leaves) for name, member in nested.items()}
    return next(leaves)
