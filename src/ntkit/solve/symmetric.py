"""A kernel as one checked symmetric float64 matrix, and when such a matrix counts as positive definite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from ntkit.errors import InputError, NotPositiveDefiniteError
from ntkit.kernel.base import DenseKernel, Kernel, strips

# float64 rounding of this machine's arithmetic, in which every solve here is done.
EPS = torch.finfo(torch.float64).eps


def as_kernel(kernel: Kernel | Tensor | np.ndarray) -> Kernel:
    """A kernel as it is, or a floating point matrix wrapped as one.

    Raises:
        InputError: if the argument is neither a kernel nor a 2-D floating point matrix.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, np.ndarray):
        kernel = as_tensor(kernel)
    if not isinstance(kernel, Tensor):
        raise InputError(f"expected a Kernel, a tensor or a NumPy array: got {type(kernel).__name__}")
    return DenseKernel(kernel.detach(), symmetric=False)  # not compared with its transpose: done once, in float64


def as_tensor(values: Tensor | np.ndarray) -> Tensor:
    """A tensor without its graph, or a NumPy array as a tensor (copied only where torch cannot share its memory)."""
    if isinstance(values, np.ndarray):
        shared = np.ascontiguousarray(values)
        return torch.from_numpy(shared if shared.flags.writeable else shared.copy())
    return torch.as_tensor(values).detach()


@dataclass(frozen=True, eq=False)
class SymmetricMatrix:
    """A kernel between the same examples, dense, symmetric and finite, in float64.

    Attributes:
        values: the matrix, (n, n), float64, our own copy.
        kernel_dtype: the type in which the kernel was computed.
        mean_diagonal: trace / n, the unit of a relative ridge.
        noise: spectral norm that rounding alone may have put into the kernel when it was computed, eps(kernel_dtype) *
            ||K||_F / sqrt(n) (what independent rounding errors of every entry add up to).
    """

    values: Tensor
    kernel_dtype: torch.dtype
    mean_diagonal: float
    noise: float

    @property
    def size(self) -> int:
        """Rows, and columns, of the matrix."""
        return self.values.shape[0]

    def relative(self, ridge: float) -> float:
        """An absolute ridge in units of the mean diagonal; infinite where that is not positive."""
        if not ridge:
            return 0.0
        return ridge / self.mean_diagonal if self.mean_diagonal > 0 else math.inf

    def tolerance(self, largest: float) -> float:
        """The size below which an eigenvalue of the matrix (plus ridge) cannot be told from zero.

        The larger of the rounding of the float64 solve, n * eps * `largest` (as in `numpy.linalg.matrix_rank`), and of
        the `noise` that the kernel came with. `largest` is the spectral norm of what is solved with.
        """
        return max(self.size * EPS * largest, self.noise)

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, ascending, (n,), and orthonormal eigenvectors, (n, n), one per column.

        On a CPU by LAPACK's relatively robust representations, which need 16 n^2 bytes beside the matrix where the
        divide and conquer of `torch.linalg.eigh` needs 24.
        """
        if self.values.device.type != "cpu":
            return torch.linalg.eigh(self.values)
        scratch = self.values.numpy().copy().T  # equal to its transpose, and in the order of axes that LAPACK wants
        values, vectors = eigh(scratch, driver="evr", overwrite_a=True, check_finite=False)
        return torch.from_numpy(values), torch.from_numpy(vectors)

    def not_positive_definite(self, eigenvalues: Tensor, ridge: float) -> NotPositiveDefiniteError:
        """The error for a kernel with these `eigenvalues` (all of them, in any order) and this absolute `ridge`."""
        smallest, largest = float(eigenvalues.min()), float(eigenvalues.abs().max())
        # A condition number of 1e10 leaves the solution some six digits. The margin is doubled until it passes the very
        # test that failed: the tolerance grows with the ridge, though far more slowly.
        deficit = max(-smallest, 0.0)
        margin = max(10 * self.tolerance(largest), 1e-10 * largest) or 1.0
        while smallest + deficit + margin <= 2 * self.tolerance(largest + deficit + margin):
            margin *= 2
        suggested = _rounded_up(deficit + margin)
        relative = (
            f" (relative: ridge={_rounded_up(suggested / self.mean_diagonal):.1e}, in units of the mean diagonal "
            f"{self.mean_diagonal:.3g})"
            if self.mean_diagonal > 0
            else ""
        )
        return NotPositiveDefiniteError(
            f"the kernel plus ridge is not positive definite: its size is {self.size} x {self.size}, its smallest "
            f"eigenvalue {smallest:.3e}, its largest {largest:.3e}, the ridge {ridge:.3e}, and below "
            f"{self.tolerance(largest + ridge):.1e} an eigenvalue cannot be told from zero (computed in "
            f"{str(self.kernel_dtype).removeprefix('torch.')}, solved in float64). Repeated examples, or more rows "
            f"than parameters, do this. A ridge that helps: ridge=Absolute({suggested:.1e}){relative}",
            smallest_eigenvalue=smallest,
            suggested_ridge=suggested,
        )


def symmetric_matrix(kernel: Kernel | Tensor | np.ndarray) -> SymmetricMatrix:
    """Read a square kernel whole, in float64, and check it. Memory: 8 n^2 bytes beside the kernel's own dense form.

    Tiny asymmetries, those that rounding leaves when a tile and its mirror image are computed apart, are averaged away.

    Raises:
        InputError: if the kernel is empty, not square, not finite, or not symmetric to sqrt(eps) of its largest entry.
    """
    kernel = as_kernel(kernel)
    rows, cols = kernel.shape
    if rows != cols or rows == 0:
        raise InputError(
            f"a solve needs a square kernel between the training examples and themselves: got shape {(rows, cols)}"
        )
    dense = kernel.dense().detach()  # kernels of modules carry gradients to their parameters
    device = torch.device("cpu") if dense.device.type == "mps" else dense.device  # MPS has no float64
    values = dense.to(device=device, dtype=torch.float64, copy=True)
    del dense
    _require_finite(values)
    gap = _symmetrise(values)
    least, most = values.aminmax()
    largest = max(-float(least), float(most))
    allowed = math.sqrt(torch.finfo(kernel.dtype).eps) * largest
    if gap > allowed:
        raise InputError(
            f"a solve needs a symmetric kernel: entries differ from their mirror images by up to {gap:.3e}, where at "
            f"most {allowed:.1e} can be rounding; were the rows and columns the same examples in the same order?"
        )
    noise = torch.finfo(kernel.dtype).eps * float(torch.linalg.matrix_norm(values)) / math.sqrt(rows)
    return SymmetricMatrix(values, kernel.dtype, float(values.diagonal().mean()), noise)


def _require_finite(values: Tensor) -> None:
    for strip in strips(values.shape[0]):
        bad = (~values[strip].isfinite()).nonzero()
        if len(bad):
            row, col = strip.start + int(bad[0, 0]), int(bad[0, 1])
            raise InputError(
                f"the kernel has entries that are not finite, the first at row {row}, column {col} "
                f"({float(values[row, col])}): NaN or overflow in the data or weights, or a half-precision type"
            )


def _symmetrise(values: Tensor) -> float:
    """Replace a matrix by the mean of itself and its transpose, in place; the largest difference between the two."""
    gap = 0.0
    for rows in strips(values.shape[0]):
        for cols in strips(rows.stop):
            lower, upper = values[rows, cols], values[cols, rows].T
            gap = max(gap, float((lower - upper).abs().amax()))
            mean = (lower + upper) / 2
            values[rows, cols] = mean
            values[cols, rows] = mean.T
    return gap


def _rounded_up(value: float) -> float:
    """The value with two digits, never smaller, so that the number printed in a message is the number that works."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.1e}")
