"""Kernel ridge regression around a network, and what it says about data it has not seen, without refitting.

    f(x) = f0(x) + K(x, X) (K(X, X) + ridge I)^-1 (Y - f0(X))

Two shapes of kernel serve N examples with C outputs. A *reduced* kernel is (N, N) and is used for every output. A
*full* kernel is (N*C, N*C), example-major, and couples the outputs. Which one is meant follows from the shapes alone.

Two routes give the same numbers. `regress` with a given ridge factors once (n^3/3, plus as much for leave-one-out);
`KernelRegression.decompose` costs about 20 times that and then has every ridge for n^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import Kernel, strips
from ntkit.solve.direct import factor
from ntkit.solve.ridge import DEFAULT_GRID, FixedRidge, Relative, SearchedRidge, as_ridge
from ntkit.solve.symmetric import SymmetricMatrix, as_kernel, as_tensor, symmetric_matrix

# Of the error on examples left out, GCV may say a half: it varies by a few tens of per cent where it holds, and falls
# to nothing where it does not.
BELIEVED = 2.0
# Entries of U are wrong by the rounding of float64, and S_nn, a sum of their squares, by that squared.
LOST = 1e3 * torch.finfo(torch.float64).eps ** 2


@dataclass(frozen=True, eq=False)
class RegressionFit:
    """A fitted kernel regression: coefficients, and the evidence on how good they are.

    Attributes:
        coefficients: (K + ridge I)^-1 (Y - f0(X)), shape (N, C), float64.
        ridge: the absolute number that was added to the diagonal.
        relative_ridge: the same in units of the mean diagonal entry of the kernel.
        relative_residual: of the linear system that was solved.
        loo_residuals: y_n - f_{-n}(x_n), shape (N, C), where f_{-n} is the fit at the same absolute ridge without
            example n (all its outputs); exact, without refitting.
        gcv: the generalized cross-validation score, see `KernelRegression.gcv`.
        kernel_dtype: the type in which the kernel was computed; the solve is in float64.
        full: whether the kernel couples the outputs, (N*C, N*C).
        around: whether the fit is around predictions f0 that `predict` has to be given again.
    """

    coefficients: Tensor
    ridge: float
    relative_ridge: float
    relative_residual: float
    loo_residuals: Tensor
    gcv: float
    kernel_dtype: torch.dtype
    full: bool
    around: bool

    @property
    def leave_one_out(self) -> float:
        """Mean over the examples of the squared leave-one-out residual, summed over the outputs."""
        return _mean_square(self.loo_residuals)

    @property
    def train_residuals(self) -> Tensor:
        """Y - f(X), shape (N, C): the ridge times the coefficients."""
        return self.ridge * self.coefficients

    def predict(self, cross: Kernel | Tensor | np.ndarray, prior: Tensor | np.ndarray | None = None) -> Tensor:
        """Predictions f(x) on M examples, shape (M, C), float64.

        Args:
            cross: the kernel between the M examples (rows) and the training examples (columns): (M, N), or (M*C, N*C)
                for a full kernel. It is read in strips of rows, never whole.
            prior: f0 on the M examples, (M, C); given exactly when the fit was given one.

        Raises:
            InputError: if the shapes do not fit the training data, or `prior` is missing or superfluous.
        """
        return evaluate(cross, self.coefficients, prior, full=self.full, around=self.around)


@dataclass(frozen=True, eq=False)
class RidgeCurve:
    """How a kernel regression changes with the ridge; one row per ridge of the grid.

    The errors are means over the examples of squares summed over the outputs. Where the ridge is too small to make the
    kernel positive definite, the training error is NaN, and GCV and leave-one-out are infinite.

    Attributes:
        relative: the ridges in units of the mean diagonal entry of the kernel, (G,).
        absolute: the same in the kernel's own units, (G,).
        train: error on the training examples, (G,).
        gcv: generalized cross-validation, (G,).
        leave_one_out: exact leave-one-out error, (G,).
    """

    relative: Tensor
    absolute: Tensor
    train: Tensor
    gcv: Tensor
    leave_one_out: Tensor


@dataclass(frozen=True, eq=False)
class KernelRegression:
    """Kernel ridge regression for every ridge at once, from one float64 eigendecomposition K = U diag(l) U^T.

    Made by `KernelRegression.decompose`. All ridges of its methods are absolute, but for `fit` and `curve`.

    Attributes:
        matrix: the kernel, checked, in float64.
        eigenvalues: ascending, (n,).
        eigenvectors: U, (n, n), one per column.
        targets: Y - f0(X) in the shape of the solve: (N, C), or (N*C, 1) for a full kernel.
        rotated: U^T targets.
        outputs: C.
        around: whether an f0 was given.
    """

    matrix: SymmetricMatrix
    eigenvalues: Tensor
    eigenvectors: Tensor
    targets: Tensor
    rotated: Tensor
    outputs: int
    around: bool

    @classmethod
    def decompose(
        cls,
        kernel: Kernel | Tensor | np.ndarray,
        targets: Tensor | np.ndarray,
        *,
        prior: Tensor | np.ndarray | None = None,
    ) -> KernelRegression:
        """Decompose the kernel between the training examples. Cost: about 9 n^3; memory: 24 n^2 bytes at the peak.

        Args:
            kernel: (N, N), used for every output, or (N*C, N*C), example-major.
            targets: Y, (N,) or (N, C).
            prior: f0(X), the predictions that the regression starts from, in the shape of Y; None for zero.

        Raises:
            InputError: if a shape does not fit, or anything is not finite.
        """
        matrix, system, outputs = _system(kernel, targets, prior)
        eigenvalues, eigenvectors = matrix.decompose()
        return cls(matrix, eigenvalues, eigenvectors, system, eigenvectors.T @ system, outputs, prior is not None)

    @property
    def mean_diagonal(self) -> float:
        """Mean diagonal entry of the kernel, the unit of a relative ridge."""
        return self.matrix.mean_diagonal

    @property
    def full(self) -> bool:
        """Whether the kernel couples the outputs, (N*C, N*C)."""
        return self._block > 1

    @property
    def _block(self) -> int:
        """Rows of the kernel that stand for one example."""
        return self.outputs // self.targets.shape[1]

    def is_positive_definite(self, ridge: float) -> bool:
        """Whether the kernel plus this absolute ridge is positive definite to working precision."""
        return float(self.eigenvalues[0]) + ridge > self.matrix.tolerance(float(self.eigenvalues.abs().max()) + ridge)

    def require_positive_definite(self, ridge: float) -> None:
        """Refuse an absolute ridge that is too small.

        Raises:
            NotPositiveDefiniteError: with the smallest eigenvalue and a ridge that helps.
        """
        if not self.is_positive_definite(ridge):
            raise self.matrix.not_positive_definite(self.eigenvalues, ridge)

    def coefficients(self, ridge: float) -> Tensor:
        """(K + ridge I)^-1 (Y - f0(X)) for an absolute ridge, shape (N, C). Cost: 2 n^2 per right-hand side."""
        self.require_positive_definite(ridge)
        return self._by_example(self.eigenvectors @ (self.rotated / (self.eigenvalues + ridge)[:, None]))

    def loo_residuals(self, ridge: float) -> Tensor:
        """y_n - f_{-n}(x_n) for an absolute ridge, (N, C): the residual of an example when it is left out of the fit.

        With M = (K + ridge I)^-1 it is (M_nn)^-1 (M y)_n (exact for any ridge). For a full kernel M_nn is the C x C
        block of the example, so that all outputs of the example are left out together. Cost: n^2 C.
        """
        weights = self._weights(ridge)
        if self._block == 1:
            return self.left_out(weights)
        weighted, block = self._residuals(weights), self._block
        rows = self.eigenvectors.reshape(-1, block, self.matrix.size)  # (N, C, n)
        blocks = torch.cat([(rows[s] * weights) @ rows[s].transpose(1, 2) for s in strips(len(rows), 256)])
        return torch.linalg.solve(blocks, weighted.reshape(-1, block))

    def left_out(self, left: Tensor) -> Tensor:
        """(S y)_n / S_nn for S = U diag(left) U^T, (n, columns): what each row misses when it is left out of the fit.

        Exact for ridge regression, S = ridge (K + ridge I)^-1 and its multiples, row by row: of a full kernel, one
        output of one example. For other S (training for a while) it is the same formula, used to see what GCV hides.
        Cost: n^2 (C + 1).
        """
        return self._residuals(left) / self._own(left)[:, None]

    def believed(self, score: float, left: Tensor) -> float:
        """A GCV score where it can be believed, else what it stands for: the mean square of `left_out`.

        GCV is leave-one-out with every S_nn replaced by their mean. Where S lives on a few modes that mean says
        nothing: two copies of an example with one label make a mode in which there is no residual, and the score 0.
        Infinite where that is unknown as well: where S_nn is what rounding of U leaves, the row is fitted whatever its
        target.
        """
        own = self._own(left)
        if bool((own.abs() <= LOST * left.abs().max()).any()):
            return math.inf
        missed = float((self._residuals(left) / own[:, None]).square().sum()) / (len(self.targets) // self._block)
        return score if score * BELIEVED >= missed else missed

    def leave_one_out(self, ridge: float) -> float:
        """Mean over the examples of the squared leave-one-out residual, summed over the outputs; absolute ridge."""
        return _mean_square(self.loo_residuals(ridge))

    def gcv(self, ridge: float) -> float:
        """Generalized cross-validation for an absolute ridge: an estimate of the squared error on new examples.

            GCV = mean_n ||(S Y)_n||^2 / (tr S / n)^2,   S = ridge (K + ridge I)^-1

        as in Wei, Hu and Steinhardt 2022, summed over the outputs. S is scaled to have the largest eigenvalue 1, which
        cancels, so that the limit ridge -> 0, mean ||K^-1 Y||^2 / (tr K^-1 / n)^2, is the same formula and not 0/0.

        It estimates the squared error (of one-hot targets: not the accuracy), noise included, and only for a kernel
        that was made without seeing the labels. For a full kernel the n = N*C scalars are exchangeable in this score:
        it is the error of one output of one example from everything else, the other outputs of the same example
        included. Where outputs of one example inform each other that is optimistic, and leave-one-out of the whole
        example is honest. For the kernel k (x) I_C it equals the score of the reduced kernel k. With repeated examples
        and a small ridge it can be 0 and mean nothing: `expected_error`, which `GCV()` goes by, sees that.

        Raises:
            NotPositiveDefiniteError: if the ridge is too small for the kernel (there GCV degenerates).
        """
        weights = self._weights(ridge)
        squares = float((weights[:, None] * self.rotated).square().sum()) / (len(self.targets) // self._block)
        return squares / float(weights.mean()) ** 2

    def expected_error(self, ridge: float) -> float:
        """GCV for an absolute ridge where it can be believed, else leave-one-out: see `believed`. Cost: n^2 (C + 1).

        Raises:
            NotPositiveDefiniteError: if the ridge is too small for the kernel.
        """
        return self.believed(self.gcv(ridge), self._weights(ridge))

    def train_error(self, ridge: float) -> float:
        """Mean over the examples of the squared training residual, summed over the outputs; absolute ridge."""
        return _mean_square(ridge * self.coefficients(ridge))

    def curve(self, grid: tuple[float, ...] = DEFAULT_GRID) -> RidgeCurve:
        """Training, GCV and leave-one-out error over ridges relative to the mean diagonal. Cost: n^2 C for each."""
        relative = torch.tensor([Relative(value).value for value in grid], dtype=torch.float64)
        absolute = relative * self.mean_diagonal
        infinite = (float("nan"), float("inf"), float("inf"))
        rows = [
            (self.train_error(ridge), self.gcv(ridge), self.leave_one_out(ridge))
            if self.is_positive_definite(ridge)
            else infinite
            for ridge in absolute.tolist()
        ]
        train, gcv, leave_one_out = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).T
        return RidgeCurve(relative, absolute, train, gcv, leave_one_out)

    def fit(self, ridge: float | FixedRidge | SearchedRidge) -> RegressionFit:
        """The regression at one ridge: a number relative to the mean diagonal, or a ridge object that may search.

        Raises:
            NotPositiveDefiniteError: if the ridge, or every ridge of the grid, is too small for the kernel.
        """
        rule = as_ridge(ridge)
        fixed = rule.choose(self) if isinstance(rule, SearchedRidge) else rule
        value = fixed.absolute(self.mean_diagonal)
        coefficients = self.coefficients(value)
        columns = coefficients.reshape(self.targets.shape)
        return RegressionFit(
            coefficients=coefficients,
            ridge=value,
            relative_ridge=self.matrix.relative(value),
            relative_residual=_relative_norm(
                self.matrix.values @ columns + value * columns - self.targets, self.targets
            ),
            loo_residuals=self.loo_residuals(value),
            gcv=self.gcv(value),
            kernel_dtype=self.matrix.kernel_dtype,
            full=self.full,
            around=self.around,
        )

    def _weights(self, ridge: float) -> Tensor:
        """Eigenvalues of (K + ridge I)^-1, scaled so that the largest is 1: finite and accurate for any ridge >= 0."""
        self.require_positive_definite(ridge)
        shifted = self.eigenvalues + ridge
        return shifted[0] / shifted

    def _residuals(self, left: Tensor) -> Tensor:
        """S y for S = U diag(left) U^T."""
        return self.eigenvectors @ (left[:, None] * self.rotated)

    def _own(self, left: Tensor) -> Tensor:
        """The diagonal of S, in strips."""
        return torch.cat([self.eigenvectors[s].square() @ left for s in strips(self.matrix.size)])

    def _by_example(self, columns: Tensor) -> Tensor:
        return columns.reshape(-1, self.outputs)


def regress(
    kernel: Kernel | Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    ridge: float | FixedRidge | SearchedRidge,
    *,
    prior: Tensor | np.ndarray | None = None,
) -> RegressionFit:
    """Fit a kernel regression by the cheaper route: a factorization for a given ridge, a decomposition for a search.

    Args:
        kernel: between the training examples: (N, N), used for every output, or (N*C, N*C), example-major.
        targets: Y, (N,) or (N, C).
        ridge: a number is relative to the mean diagonal of the kernel; or Relative, Absolute, GCV, LeaveOneOut.
        prior: f0(X), the predictions that the regression starts from, in the shape of Y; None for zero.

    Raises:
        InputError: if a shape does not fit, or anything is not finite.
        NotPositiveDefiniteError: if the ridge is too small for the kernel.

    Cost: 2/3 n^3 for a given ridge, about 9 n^3 for a search; memory: 16 and 24 n^2 bytes.
    """
    rule = as_ridge(ridge)
    if isinstance(rule, SearchedRidge):
        return KernelRegression.decompose(kernel, targets, prior=prior).fit(rule)
    matrix, system, outputs = _system(kernel, targets, prior)
    factorization = factor(matrix, rule)
    solution = factorization.solve(system)
    block = outputs // system.shape[1]
    blocks = factorization.inverse_blocks(block)
    by_example = solution.value.reshape(-1, outputs)
    mean_inverse = float(blocks.diagonal(dim1=1, dim2=2).mean())
    return RegressionFit(
        coefficients=by_example,
        ridge=solution.ridge,
        relative_ridge=solution.relative_ridge,
        relative_residual=solution.relative_residual,
        loo_residuals=by_example / blocks[:, 0] if block == 1 else torch.linalg.solve(blocks, by_example),
        gcv=_mean_square(by_example / mean_inverse),
        kernel_dtype=matrix.kernel_dtype,
        full=block > 1,
        around=prior is not None,
    )


def evaluate(
    cross: Kernel | Tensor | np.ndarray,
    coefficients: Tensor,
    prior: Tensor | np.ndarray | None,
    *,
    full: bool,
    around: bool,
) -> Tensor:
    """f0(x) + K(x, X) a on M examples, (M, C), float64; `cross` is read in strips of rows, never whole.

    Args:
        cross: the kernel between the M examples (rows) and the training examples (columns): (M, N), or (M*C, N*C).
        coefficients: a, (N, C).
        prior: f0 on the M examples, (M, C).
        full: whether the kernel couples the outputs.
        around: whether there has to be a prior.

    Raises:
        InputError: if the shapes do not fit the training data, or `prior` is missing or superfluous.
    """
    cross = as_kernel(cross)
    examples, outputs = coefficients.shape
    columns = coefficients.reshape(-1, 1) if full else coefficients
    if cross.shape[1] != len(columns) or (full and cross.shape[0] % outputs):
        raise InputError(
            f"a kernel between new and training examples has shape ({'M*C, N*C' if full else 'M, N'}) with "
            f"N={examples}, C={outputs}: got {cross.shape}"
        )
    if (prior is not None) != around:
        raise InputError(
            "the fit is around predictions f0: pass f0 of the new examples as `prior`"
            if around
            else "the fit was not given f0, so `prior` must be left out here too"
        )
    change = (cross @ columns).to(torch.float64).reshape(-1, outputs)
    return change if prior is None else as_targets(prior, "prior", change.shape).to(change.device) + change


def _system(
    kernel: Kernel | Tensor | np.ndarray, targets: Tensor | np.ndarray, prior: Tensor | np.ndarray | None
) -> tuple[SymmetricMatrix, Tensor, int]:
    """The checked kernel, the right-hand sides Y - f0 in its number of rows, and C."""
    kernel = as_kernel(kernel)
    system, _, outputs = right_hand_sides("a kernel", kernel.shape, targets, prior)
    matrix = symmetric_matrix(kernel)
    return matrix, system.to(matrix.values.device), outputs


def right_hand_sides(
    what: str, shape: tuple[int, int], targets: Tensor | np.ndarray, prior: Tensor | np.ndarray | None
) -> tuple[Tensor, int, int]:
    """Y - f0 in float64, for a system of N rows or of one for each output of each example; N; C.

    Args:
        what: what the system consists of, for errors.
        shape: its shape.
        targets: Y, (N,) or (N, C).
        prior: f0(X), in the shape of Y; None for zero.

    Raises:
        InputError: if a shape does not fit, or anything is not finite.
    """
    y = as_targets(targets, "targets")
    examples, outputs = y.shape
    if shape[0] not in (examples, examples * outputs):
        raise InputError(
            f"{what} for targets of shape (N={examples}, C={outputs}) has N={examples} rows, or N*C="
            f"{examples * outputs} when it couples the outputs: got shape {shape}"
        )
    if prior is not None:
        y = y - as_targets(prior, "prior", y.shape).to(y.device)
    return y if shape[0] == examples else y.reshape(-1, 1), examples, outputs


def as_targets(values: Tensor | np.ndarray, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Targets as a finite float64 matrix (N, C)."""
    tensor = as_tensor(values).to(torch.float64)
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    if tensor.ndim != 2 or 0 in tensor.shape or (shape is not None and tensor.shape != shape):
        expected = "(N,) or (N, C)" if shape is None else str(tuple(shape))
        raise InputError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    if not tensor.isfinite().all():
        raise InputError(f"{name}: some entries are not finite (NaN or infinity)")
    return tensor


def _mean_square(residuals: Tensor) -> float:
    """Mean over the examples of the square summed over the outputs, for residuals (N, C)."""
    return float(residuals.square().sum(1).mean())


def _relative_norm(residual: Tensor, reference: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(reference))
    return float(torch.linalg.vector_norm(residual)) / norm if norm else 0.0
