"""Cholesky of a large array in its own memory, block by block.

LAPACK counts entries in 32 bits: its Cholesky crashes for more than 46,340 rows. Here every product is one of blocks,
which are small enough for any BLAS, and what is below the diagonal is left as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

# Rows of a block, and rows and columns of what is multiplied at once: so many rows have fewer than 2^31 entries up to a
# million columns.
BLOCK, INNER, ACROSS = 1024, 2048, 8192


def factor(a: Tensor) -> int:
    """Write U with A = U^T U over the upper triangle and the diagonal of a symmetric array (n, n).

    Returns:
        The row at which it stops because A is not positive definite; -1 where it does not.

    Cost: n^3 / 3; memory: blocks.
    """
    for some in _blocks(len(a)):
        rest = slice(some.stop, len(a))
        own = a[some, some].clone()
        for above in _pieces(0, some.start, INNER):
            left = a[above, some].T
            own.addmm_(left, left.T, alpha=-1)
            for across in _pieces(rest.start, rest.stop, ACROSS):
                a[some, across] -= left @ a[above, across]
        upper, info = torch.linalg.cholesky_ex(own, upper=True)
        if int(info):
            return some.start + int(info) - 1
        kept = torch.ones_like(upper, dtype=torch.bool).triu()
        a[some, some] = torch.where(kept, upper, a[some, some])
        for across in _pieces(rest.start, rest.stop, ACROSS):
            a[some, across] = torch.linalg.solve_triangular(upper.T, a[some, across], upper=False)
    return -1


def solve(a: Tensor, y: Tensor) -> Tensor:
    """(U^T U)^-1 y for y (n, R) of the same type, with the U that `factor` has written. Cost: 2 n^2 R."""
    x = y.clone()
    blocks = list(_blocks(len(a)))
    for some in blocks:
        x[some] = torch.linalg.solve_triangular(a[some, some].triu().T, x[some], upper=False)
        x[some.stop :] -= a[some, some.stop :].T @ x[some]
    for some in reversed(blocks):
        x[some] -= a[some, some.stop :] @ x[some.stop :]
        x[some] = torch.linalg.solve_triangular(a[some, some].triu(), x[some], upper=True)
    return x


def _blocks(n: int) -> Iterator[slice]:
    return _pieces(0, n, BLOCK)


def _pieces(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))
