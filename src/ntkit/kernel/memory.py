"""Budgets of memory in bytes."""

from __future__ import annotations

import os

from ntkit.errors import InputError


def checked_memory(memory: int | None) -> int:
    """A budget as given, or the default one.

    Raises:
        InputError: if it is not a positive number of bytes.
    """
    if memory is None:
        return default_memory()
    if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
        raise InputError(f"a memory budget is a positive number of bytes: got {memory!r}")
    return memory


def default_memory() -> int:
    """An eighth of the machine's memory, at least 256 MB."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        total = 8 * 2**30
    return max(256 * 2**20, total // 8)
