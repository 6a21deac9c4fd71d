"""A kernel conditioned on data: the covariance that a Gaussian process has left once it has seen its values at X.

    k(x, y) - k(x, X) (k(X, X) + ridge I)^-1 k(X, y)

This is again a kernel function: small where the data leave little open, and, of features, what is orthogonal to those
of the data where the ridge is small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.kernel.algebra import Changed
from ntkit.kernel.function import KernelFunction, require_fixed
from ntkit.solve.direct import Cholesky
from ntkit.tangent.identity import digest

if TYPE_CHECKING:
    import numpy as np

    from ntkit.kernel.base import Kernel
    from ntkit.solve.ridge import FixedRidge


class Posterior(KernelFunction):
    """A kernel function conditioned on data. Entries are in float64, and carry gradients to x1 and x2.

    Attributes:
        prior: the kernel function.
        data: X, n examples.
        factor: k(X, X) + ridge I, factored.
    """

    def __init__(self, prior: KernelFunction, data: Any, *, ridge: float | FixedRidge) -> None:
        """Factor the kernel of the data; (n K)^3 / 3 operations and 16 (n K)^2 bytes.

        Args:
            prior: the kernel function.
            data: X. They are held fixed: no gradients go to them.
            ridge: the variance of the noise on the values at X: a number is relative to the mean diagonal entry of
                k(X, X), `Absolute(...)` is not.

        Raises:
            InputError: if derivatives with respect to the data are wanted, or the ridge cannot be used.
            NotPositiveDefiniteError: if the ridge is too small, with one that helps.
        """
        require_fixed(
            data, "the data on which a kernel is conditioned are held fixed, without derivatives: detach them"
        )
        self.prior, self.data = prior, data
        with torch.no_grad():
            self._kernel = prior(data)
            self.factor = Cholesky().factor(self._kernel, ridge)

    def __call__(self, x1: Any, x2: Any = None) -> PosteriorKernel:
        """The covariance that is left between examples.

        Cost: their kernels with the data, and for each of their rows n K numbers in memory and (n K)^2 operations.
        """
        rows = self._half(x1)
        cols = rows if x2 is None else self._half(x2)
        return PosteriorKernel(self.prior(x1, x2), rows, cols, self._kernel, self.factor.ridge)

    def mean(self, x: Any, values: Tensor | np.ndarray) -> Tensor:
        """What a process of mean zero predicts: k(x, X) (k(X, X) + ridge I)^-1 values.

        Args:
            x: N examples.
            values: at the data, (n*K,) or (n*K, R).

        Returns:
            (N*K,) or (N*K, R), float64.

        Raises:
            InputError: if the values do not fit the data.
        """
        return self.prior(x, self.data) @ self.factor.solve(values).value

    def _half(self, x: Any) -> Tensor:
        """L^-1 k(X, x), of which the products are what the data explain."""
        cross = self.prior(x, self.data).dense().to(self.factor.lower.device, torch.float64)
        return torch.linalg.solve_triangular(self.factor.lower, cross.T, upper=False)

    def __repr__(self) -> str:
        return f"Posterior({self.prior!r}, {self.factor.matrix.size} rows, ridge={self.factor.ridge:.3g})"


class PosteriorKernel(Changed):
    """The covariance left between examples, in float64. Memory: n K numbers for each row and column."""

    def __init__(self, prior: Kernel, rows: Tensor, cols: Tensor, data: Kernel, ridge: float) -> None:
        """Of the prior kernel and what is explained.

        Args:
            prior: the kernel between the examples.
            rows: L^-1 k(X, x1), (n*K, rows).
            cols: L^-1 k(X, x2).
            data: the kernel of the data, for `identity`.
            ridge: absolute.
        """
        super().__init__(prior)
        self._rows, self._cols, self._data, self._ridge = rows, cols, data, ridge

    @property
    def dtype(self) -> torch.dtype:
        """float64: differences of nearly equal numbers need it."""
        return torch.float64

    @property
    def device(self) -> torch.device:
        """Where the solve is."""
        return self._rows.device

    def _changed(self, values: Tensor, rows: slice, cols: slice) -> Tensor:
        return values.to(self.device, self.dtype) - self._rows[:, rows].T @ self._cols[:, cols]

    def diagonal(self) -> Tensor:
        """The variances that are left, none below zero: at the data rounding alone would make some negative."""
        size = min(self.shape)
        explained = (self._rows[:, :size] * self._cols[:, :size]).sum(0)
        left = self._inner.diagonal().to(self.device, self.dtype) - explained
        return left.clamp_min(0) if self.symmetric else left

    def _described(self) -> str:
        data = digest([repr(sorted(self._data.identity().items()))])[:16]
        return f"conditioned on {data} with ridge {self._ridge:.12g}"
