"""Budgets of memory in bytes."""

from __future__ import annotations

import os

import torch

from ntkit.errors import InputError


def checked_memory(memory: int | None, device: torch.device | None = None) -> int:
    """A budget as given, or the default one of the device that computes.

    Raises:
        InputError: if it is not a positive number of bytes.
    """
    if memory is None:
        return default_memory(device)
    if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
        raise InputError(f"a memory budget is a positive number of bytes: got {memory!r}")
    return memory


def default_memory(device: torch.device | None = None) -> int:
    """An eighth of the machine's memory, at least 256 MB; a quarter of a GPU's."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        total = 8 * 2**30
    return max(256 * 2**20, total // 8)
