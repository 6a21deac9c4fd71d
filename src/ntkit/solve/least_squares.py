"""Ridge regression of a linearized network over its parameters, by LSMR (Fong and Saunders 2011).

    delta = argmin ||J delta - r||^2 + ridge ||delta||^2 = J^T (J J^T + ridge I)^-1 r

by products with J and J^T alone. It is also the shortest solution of [J, sqrt(ridge) I] (delta, s) = r. That system
has solutions whatever r is, so that a preconditioner of J J^T + ridge I may be multiplied from the left and changes
nothing but the number of iterations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.iterative import Rooted, check_stopping
from ntkit.solve.ridge import FixedRidge, as_fixed_ridge
from ntkit.solve.symmetric import as_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from ntkit.tangent.linearize import Tangent


@dataclass(frozen=True, eq=False)
class LeastSquaresSolution:
    """A step of all parameters, and how far to believe it.

    Attributes:
        step: delta, (P,), float64, in the order of `Tangent.parameter_names`; `tangent.jvp(x, step)` are the changes of
            the outputs.
        relative_residual: ||J delta + ridge alpha - r|| / ||r||, where J^T alpha = delta; without a ridge that of
            J delta - r, which need not vanish.
        iterations: of LSMR; each takes one vjp and one jvp.
        converged: whether the tolerance was reached, by the recurrence, and with a ridge by the residual within a
            factor of 10. With float32 networks some six digits can be.
        ridge: absolute.
    """

    step: Tensor
    relative_residual: float
    iterations: int
    converged: bool
    ridge: float


@dataclass(frozen=True)
class LeastSquares:
    """LSMR on a linearized network: `LeastSquares().solve(tangent, x, residuals, ridge)`.

    Attributes:
        tolerance: wanted relative residual, in the norm that the preconditioner makes.
        iterations: at most so many.
        preconditioner: of J J^T + ridge I, with a square root; none by default.
    """

    tolerance: float = 1e-6
    iterations: int = 1000
    preconditioner: Rooted | None = None

    def __post_init__(self) -> None:
        """Check the numbers and the preconditioner.

        Raises:
            InputError: if the tolerance or the number of iterations is not positive, or the preconditioner has no root.
        """
        check_stopping("least squares", self.tolerance, self.iterations)
        if self.preconditioner is not None and not isinstance(self.preconditioner, Rooted):
            raise InputError(f"least squares need a preconditioner with a root(): got {self.preconditioner!r}")

    def solve(
        self,
        tangent: Tangent,
        x: Any,
        residuals: Tensor | np.ndarray,
        ridge: float | FixedRidge = 0.0,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> LeastSquaresSolution:
        """The step of the parameters that a ridge regression of the linearized network takes.

        Cost: one vjp and one jvp of all examples for each iteration; memory: P + N*K numbers a few times.

        Args:
            tangent: the network.
            x: N examples.
            residuals: r, what the outputs should change by, (N, K).
            ridge: a number is relative to the mean diagonal entry of the kernel J J^T; `Absolute(...)` is not.
            progress: called with the iterations done.

        Raises:
            InputError: if the shapes do not fit, or the residuals are not finite.
            NotImplementedError: if an operation of the model can be differentiated only once.
        """
        fixed = as_fixed_ridge(ridge)
        kernel = TangentKernel(tangent, x)
        right = as_tensor(residuals).to("cpu", torch.float64)
        n, k = len(tangent.examples(x)), kernel.scalars
        if right.shape != (n, k) and not (k == 1 and right.shape == (n,)):
            raise InputError(f"residuals are of shape (N, K)={(n, k)}: got {tuple(right.shape)}")
        if not bool(right.isfinite().all()):
            raise InputError("the residuals have entries that are not finite (NaN or infinity)")
        value = fixed.of(kernel)
        if self.preconditioner is not None and not value > 0:
            raise InputError("a preconditioner is for a positive ridge: got 0")
        root = math.sqrt(value)
        half = (lambda v: v) if self.preconditioner is None else self.preconditioner.root()
        flat, p, calls = right.reshape(-1), tangent.count, [0]

        def forward(z: np.ndarray) -> Tensor:
            step, rest = torch.from_numpy(z[:p].copy()), torch.from_numpy(z[p:].copy())
            return tangent.jvp(x, step).to(flat).reshape(-1) + root * rest

        def matvec(z: np.ndarray) -> np.ndarray:
            return half(forward(z.reshape(-1))[:, None])[:, 0].numpy()

        def rmatvec(u: np.ndarray) -> np.ndarray:
            columns = half(torch.from_numpy(u.reshape(-1, 1).copy()))
            pulled = tangent.vjp(x, columns.view(n, k).to(tangent.dtype)).to(flat)
            if progress is not None and calls[0]:  # the first is before the iterations
                progress(calls[0])
            calls[0] += 1
            return torch.cat([pulled, root * columns[:, 0]]).numpy()

        operator = LinearOperator((n * k, p + n * k), matvec=matvec, rmatvec=rmatvec, dtype="f8")  # pyright: ignore[reportCallIssue]
        # what stops it: the residual, if the system has solutions, and without a ridge that of the normal equations
        loose = 0.0 if value > 0 else self.tolerance
        found = lsmr(
            operator, half(flat[:, None])[:, 0].numpy(), atol=loose, btol=self.tolerance, conlim=0,
            maxiter=self.iterations,
        )  # fmt: skip
        step = torch.from_numpy(found[0][:p].copy())
        rest = forward(found[0]) - flat
        residual = _relative(rest, flat)
        # products in float32 cannot confirm what the recurrence says to the last digit
        confirmed = not value > 0 or _relative(half(rest[:, None]), half(flat[:, None])) <= 10 * self.tolerance
        return LeastSquaresSolution(step, residual, int(found[2]), found[1] in {0, 1, 2} and confirmed, value)


def _relative(rest: Tensor, whole: Tensor) -> float:
    norm = float(whole.norm())
    return float(rest.norm()) / norm if norm else 0.0
