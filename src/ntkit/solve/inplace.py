"""The direct solver for the largest kernel that fits in memory: one n x n array holds the matrix and its factor.

Cholesky writes L over one triangle; the other one still holds the matrix, so that products with it, and with them the
residual, need no second copy. In float32 the factor is the preconditioner of conjugate gradients in float64, which
gives back the digits that it lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError, NotPositiveDefiniteError
from ntkit.kernel.base import Kernel, strips
from ntkit.solve import blocked
from ntkit.solve.iterative import ConjugateGradients, IterativeSolution
from ntkit.solve.ridge import Absolute, FixedRidge, as_fixed_ridge
from ntkit.solve.symmetric import as_kernel


class _Halves(Kernel):
    """A symmetric matrix of which the part below the diagonal is in an array, and the diagonal apart."""

    def __init__(self, below: np.ndarray, diagonal: np.ndarray) -> None:
        self._below, self._diagonal = below, diagonal

    @property
    def shape(self) -> tuple[int, int]:
        return self._below.shape[0], self._below.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def symmetric(self) -> bool:
        return True

    def tile(self, rows: slice, cols: slice) -> Tensor:
        raise NotImplementedError  # products and the diagonal are all that a solve asks for

    def diagonal(self) -> Tensor:
        return torch.from_numpy(self._diagonal)

    def __matmul__(self, other: Tensor | np.ndarray) -> Tensor:
        right = self._operand(other)
        out = self.diagonal().view(-1, *[1] * (right.ndim - 1)) * right
        for strip in strips(self.shape[0]):
            # float64 for a strip at a time
            left = torch.from_numpy(self._below[strip, : strip.start]).double()
            own = torch.from_numpy(self._below[strip, strip]).double().tril(-1)
            out[strip] += left @ right[: strip.start] + own @ right[strip] + own.T @ right[strip]
            out[: strip.start] += left.T @ right[strip]
        return out


@dataclass(frozen=True, eq=False)
class InPlaceFactorization:
    """A kernel plus ridge, factored in its own memory. Made by `CholeskyInPlace.factor`.

    Attributes:
        array: (n, n): L^T above and on the diagonal, the kernel below it.
        kernel_diagonal: of the kernel, float64.
        ridge: the absolute number that was added to the diagonal.
        tolerance: wanted relative residual of a solve.
    """

    array: np.ndarray
    kernel_diagonal: np.ndarray
    ridge: float
    tolerance: float

    def solve(self, y: Tensor | np.ndarray) -> IterativeSolution:
        """Solve (K + ridge I) x = y for y of shape (n,) or (n, R), refined in float64.

        Cost: 4 n^2 R for each refinement, of which a float64 factor needs one or two.

        Raises:
            InputError: if y has another number of rows or is not finite.
        """
        solver = ConjugateGradients(self.tolerance, iterations=100, preconditioner=self._apply)
        return solver.solve(_Halves(self.array, self.kernel_diagonal), y, Absolute(self.ridge))

    def _apply(self, right: Tensor) -> Tensor:
        """(L L^T)^-1 in the factor's own precision."""
        # scaled, so that a small residual does not vanish in float32
        scale = right.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
        array = torch.from_numpy(self.array)
        return blocked.solve(array, (right / scale).to(array.dtype)).double() * scale


@dataclass(frozen=True)
class CholeskyInPlace:
    """Cholesky in one n x n array: `CholeskyInPlace(torch.float32).factor(kernel, ridge).solve(y)`.

    Memory: n^2 numbers of `dtype` and strips of 1,024 rows; cost: n^3 / 3.

    Attributes:
        dtype: of the factor: float64, or float32 for half the memory and refinement in float64.
        tolerance: wanted relative residual of a solve.
    """

    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        """Check the type.

        Raises:
            InputError: if it is neither float32 nor float64.
        """
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(f"a factor is of the type float32 or float64: got {self.dtype}")

    def solve(
        self, kernel: Kernel | Tensor | np.ndarray, y: Tensor | np.ndarray, ridge: float | FixedRidge = 0.0
    ) -> IterativeSolution:
        """Factor, and solve once. Raises what `factor` and `InPlaceFactorization.solve` do."""
        return self.factor(kernel, ridge).solve(y)

    def factor(
        self,
        kernel: Kernel | Tensor | np.ndarray,
        ridge: float | FixedRidge = 0.0,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> InPlaceFactorization:
        """Read the kernel strip by strip and factor it.

        Args:
            kernel: square and symmetric; only what is on and below the diagonal is read.
            ridge: a number is relative to the mean diagonal entry of the kernel; `Absolute(...)` is not.
            progress: called with (rows read, rows in all).

        Raises:
            InputError: if the kernel is not square, not symmetric by its own account, or not finite.
            NotPositiveDefiniteError: if the kernel plus ridge is not positive definite in this precision.
        """
        kernel, fixed = as_kernel(kernel), as_fixed_ridge(ridge)
        n = kernel.shape[0]
        if kernel.shape[1] != n or n == 0:
            raise InputError(f"a solve needs a square kernel: got shape {kernel.shape}")
        array = np.empty((n, n), "f4" if self.dtype == torch.float32 else "f8")
        whole = torch.from_numpy(array)
        for strip in strips(n):
            below = kernel.tile(strip, slice(0, strip.stop)).cpu()
            # by the extremes: a sum of numbers that are large, or of half precision, overflows where none of them does
            if not bool(torch.isfinite(torch.stack(below.aminmax()).to(self.dtype)).all()):
                raise InputError(
                    f"rows {strip.start} to {strip.stop - 1} of the kernel are not finite in {array.dtype} (NaN or "
                    "infinity)"
                )
            whole[strip, : strip.stop] = below
            whole[: strip.stop, strip] = below.T
            if progress is not None:
                progress(strip.stop, n)
        diagonal = array.diagonal().astype("f8")
        value = fixed.absolute(float(diagonal.mean()))
        np.fill_diagonal(array, diagonal + value)
        stopped = blocked.factor(whole)
        if stopped >= 0:
            raise NotPositiveDefiniteError(
                f"the kernel plus ridge {value:.3e} is not positive definite in {array.dtype}: Cholesky stops at row "
                f"{stopped} of {n}. Use a larger ridge" + (", or float64" if self.dtype == torch.float32 else ""),
                smallest_eigenvalue=float("nan"),
                suggested_ridge=max(10 * value, 1e-6 * float(diagonal.mean())),
            )
        return InPlaceFactorization(array, diagonal, value, self.tolerance)
