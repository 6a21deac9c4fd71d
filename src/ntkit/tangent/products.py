"""Products of large matrices: the one place that knows how the machine multiplies fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, a @ b.T, shape (rows of a, rows of b)."""
    return a @ b.T
