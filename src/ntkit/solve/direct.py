"""The direct solver: one Cholesky factorization in float64, then any number of right-hand sides."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import STRIP, Kernel, strips
from ntkit.solve.ridge import FixedRidge, Relative, as_fixed_ridge
from ntkit.solve.symmetric import SymmetricMatrix, as_tensor, symmetric_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator

# Power and inverse iterations for the two ends of the spectrum, with a block of vectors: n^2 each, beside the n^3/3 of
# the factorization. The inverse iteration of a singular matrix converges at once, which is when its answer matters.
ITERATIONS, BLOCK = 12, 4


@dataclass(frozen=True, eq=False)
class Solution:
    """(K + ridge I)^-1 y and how far to believe it.

    Attributes:
        value: the solution, float64, in the shape of y.
        relative_residual: ||(K + ridge I) value - y|| / ||y|| (Frobenius norms; 0 when y is 0).
        ridge: the absolute number that was added to the diagonal.
        relative_ridge: the same in units of the mean diagonal entry of the kernel.
        condition_number: estimate for K + ridge I, from power iterations (a lower bound).
        dtype: the type of the solve, float64.
        kernel_dtype: the type in which the kernel was computed.
    """

    value: Tensor
    relative_residual: float
    ridge: float
    relative_ridge: float
    condition_number: float
    dtype: torch.dtype
    kernel_dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Factorization:
    """A kernel plus ridge, factored: K + ridge I = L L^T. Made by `Cholesky.factor`.

    Attributes:
        matrix: the kernel in float64, without the ridge.
        lower: L, (n, n), lower triangular.
        ridge: the absolute number that was added to the diagonal.
        smallest_eigenvalue: estimate of the smallest eigenvalue of K + ridge I (an upper bound).
        largest_eigenvalue: estimate of the largest (a lower bound).
    """

    matrix: SymmetricMatrix
    lower: Tensor
    ridge: float
    smallest_eigenvalue: float
    largest_eigenvalue: float

    @property
    def relative_ridge(self) -> float:
        """The ridge in units of the mean diagonal entry of the kernel."""
        return self.matrix.relative(self.ridge)

    def solve(self, y: Tensor | np.ndarray) -> Solution:
        """Solve (K + ridge I) x = y for y of shape (n,) or (n, R). Cost: 2 n^2 R, and as much for the residual.

        Raises:
            InputError: if y has another number of rows or is not finite.
        """
        right = as_tensor(y).to(self.lower.device, torch.float64)
        if right.ndim not in (1, 2) or right.shape[0] != self.matrix.size:
            raise InputError(
                f"a right-hand side for a kernel of {self.matrix.size} rows has shape ({self.matrix.size},) or "
                f"({self.matrix.size}, R): got {tuple(right.shape)}"
            )
        if not right.isfinite().all():
            raise InputError("the right-hand side has entries that are not finite (NaN or infinity)")
        columns = right if right.ndim == 2 else right[:, None]
        value = _solved(self.lower, columns)
        residual = self.matrix.values @ value + self.ridge * value - columns
        norm = float(torch.linalg.vector_norm(columns))
        return Solution(
            value=value.reshape(right.shape),
            relative_residual=float(torch.linalg.vector_norm(residual)) / norm if norm else 0.0,
            ridge=self.ridge,
            relative_ridge=self.relative_ridge,
            condition_number=self.largest_eigenvalue / self.smallest_eigenvalue,
            dtype=torch.float64,
            kernel_dtype=self.matrix.kernel_dtype,
        )

    def apply(self, columns: Tensor) -> Tensor:
        """(K + ridge I)^-1 of float64 columns (n, R), without evidence. Cost: 2 n^2 R."""
        return _solved(self.lower, columns)

    def inverse_blocks(self, size: int = 1) -> Tensor:
        """The diagonal blocks of (K + ridge I)^-1, shape (n / size, size, size). Cost: n^3 / 3; memory: 16 kB * n.

        Raises:
            InputError: if `size` does not divide n.
        """
        n = self.matrix.size
        if size < 1 or n % size:
            raise InputError(f"a matrix of {n} rows has no diagonal blocks of {size} rows: {size} does not divide {n}")
        height = max(STRIP // size, 1) * size
        blocks = []
        for strip in strips(n, height):
            columns = _inverse_columns(self.lower, strip, height)
            grouped = columns.reshape(len(columns), -1, size).transpose(0, 1)  # (blocks, rows of L^-1, size)
            blocks.append(grouped.transpose(1, 2) @ grouped)
        return torch.cat(blocks)


@dataclass(frozen=True)
class Cholesky:
    """The direct solver for a kernel that fits in memory: `Cholesky().factor(kernel, ridge).solve(y)`.

    Float64 whatever the type of the kernel. Cost: n^3 / 3; memory: 16 n^2 bytes.
    """

    def factor(self, kernel: Kernel | Tensor | np.ndarray, ridge: float | FixedRidge = 0.0) -> Factorization:
        """Factor K + ridge I once, for any number of solves.

        Args:
            kernel: square and symmetric, between the training examples and themselves.
            ridge: a number is relative to the mean diagonal entry of the kernel; `Absolute(...)` is not.

        Raises:
            InputError: if the kernel is empty, not square, not symmetric or not finite, or the ridge is not usable.
            NotPositiveDefiniteError: if K + ridge I is indefinite, or singular to working precision; the error carries
                the smallest eigenvalue of K and a ridge that helps (found from all eigenvalues, 4/3 n^3 more).
        """
        fixed = as_fixed_ridge(ridge)
        return factor(symmetric_matrix(kernel), fixed)

    def solve(
        self, kernel: Kernel | Tensor | np.ndarray, y: Tensor | np.ndarray, ridge: float | FixedRidge = 0.0
    ) -> Solution:
        """Factor, and solve once. Raises what `factor` and `Factorization.solve` do."""
        return self.factor(kernel, ridge).solve(y)


def factor(matrix: SymmetricMatrix, ridge: FixedRidge) -> Factorization:
    """`Cholesky.factor` for a matrix that has been read and checked already."""
    if matrix.mean_diagonal < 0 and isinstance(ridge, Relative):  # in units of less than nothing
        raise matrix.not_positive_definite(torch.linalg.eigvalsh(matrix.values), 0.0)
    value = ridge.absolute(matrix.mean_diagonal)
    with _ridge_added(matrix.values, value) as shifted:
        lower, info = torch.linalg.cholesky_ex(shifted)
        smallest, largest = _ends(shifted, lower) if int(info) == 0 else (0.0, 0.0)
    if int(info) == 0 and smallest > matrix.tolerance(largest):
        return Factorization(matrix, lower, value, smallest, largest)
    del lower
    raise matrix.not_positive_definite(torch.linalg.eigvalsh(matrix.values), value)


@contextmanager
def _ridge_added(values: Tensor, ridge: float) -> Iterator[Tensor]:
    """The matrix plus ridge for a while, in place: a copy would be a third n x n matrix at the peak."""
    diagonal = values.diagonal().clone()
    values.diagonal().add_(ridge)
    try:
        yield values
    finally:
        values.diagonal().copy_(diagonal)


def _solved(lower: Tensor, columns: Tensor) -> Tensor:
    """(L L^T)^-1 columns; unlike `torch.cholesky_solve`, which copies L first."""
    half = torch.linalg.solve_triangular(lower, columns, upper=False)
    return torch.linalg.solve_triangular(lower.T, half, upper=True)


def _inverse_columns(lower: Tensor, strip: slice, height: int) -> Tensor:
    """Columns `strip` of L^-1 from the diagonal down; above it they are zero.

    By forward substitution in blocks of `height` rows, because a triangular solve with a part of L would copy the part.
    """
    start, n = strip.start, len(lower)
    columns = lower.new_zeros(n - start, strip.stop - start)
    columns.fill_diagonal_(1.0)
    for above in range(0, n - start, height):
        rows = slice(start + above, min(start + above + height, n))
        here = columns[above : above + height]
        here -= lower[rows, start : rows.start] @ columns[:above]
        here.copy_(torch.linalg.solve_triangular(lower[rows, rows], here, upper=False))
    return columns


def _ends(matrix: Tensor, lower: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue of a factored matrix, by inverse and power iteration from a fixed start."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[0], BLOCK, dtype=torch.float64, generator=generator).to(matrix.device)
    high = low = torch.linalg.qr(start).Q
    largest = inverse = torch.zeros((), dtype=torch.float64)
    for _ in range(ITERATIONS):
        high, low = matrix @ high, _solved(lower, low)
        if not low.isfinite().all():
            return 0.0, float(largest)
        largest, inverse = torch.linalg.matrix_norm(high, 2), torch.linalg.matrix_norm(low, 2)
        high, low = torch.linalg.qr(high).Q, torch.linalg.qr(low).Q
    return 1.0 / float(inverse), float(largest)
