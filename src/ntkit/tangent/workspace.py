"""Temporary memory that one contraction after another uses again."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from ntkit.tangent.grain import CPU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# What the C library of Linux is asked to keep of the memory that is freed, and the largest block it keeps (128 MB to
# 1 GB took the same time within noise). Nothing is given back before twice as much has come together.
KEPT = 256 * 2**20
LARGEST_KEPT = 256 * 2**20
# mallopt's names, from malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
# By these a user has decided already.
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


@cache
def keep_freed_memory() -> None:
    """Have the activations of the next batches use the memory of the last ones again.

    The GNU C library gives every block of more than 32 MB back to the system as soon as it is freed, and the others
    when 64 MB have come together: in a network nearly all. New memory comes page by page and zeroed, which took a tenth
    to a third of the time of the benchmark's convolutional networks and transformer (20,000 to 120,000 pages for a
    kernel that takes half a second). From the first call on the process keeps 256 to 512 MB. Other C libraries, and one
    that the user has set up, are left as they are.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if not mallopt(_MMAP_THRESHOLD, LARGEST_KEPT):
        mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # all that older versions allow
    mallopt(_TRIM_THRESHOLD, 2 * KEPT)
    mallopt(_TOP_PAD, KEPT)


class Workspace:
    """Memory for the rows of one layer after another, and products that neighbouring layers share.

    The system hands out new memory page by page and zeroed, which takes longer than the products that fill it
    (measured: rows of 34 MB take 5 ms in used memory and 14 ms in new).
    """

    def __init__(self, nbytes: int = CPU.scratch) -> None:
        """Nothing is taken yet.

        Args:
            nbytes: what one contraction may use; a single column of rows may exceed it.
        """
        self.nbytes = nbytes
        # Products that the next factor may have in common with the last one, found by the addresses of their operands.
        # These are kept with the product: memory that is alive cannot be given to other tensors.
        self.shared: dict[Any, tuple[Tensor, ...]] = {}
        self._memory: dict[int, Tensor] = {}

    def take(self, side: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of this shape, with anything in it; what was taken before for the same side (0 or 1) is given up."""
        size = prod(shape)
        memory = self._memory.get(side)
        if memory is None or memory.numel() < size or memory.dtype != like.dtype or memory.device != like.device:
            self._memory.pop(side, None)  # freed before the larger one is made
            memory = self._memory[side] = like.new_empty(size)
        return memory[:size].view(*shape)
