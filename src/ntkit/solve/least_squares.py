"""Ridge regression of a linearized network over its parameters, by LSMR.

    delta = argmin ||J delta - r||^2 + ridge ||delta||^2 = J^T (J J^T + ridge I)^-1 r

by products with J and J^T alone. It is also the shortest solution of [J, sqrt(ridge) I] (delta, s) = r. That system
has solutions whatever r is, so that a preconditioner of J J^T + ridge I may be multiplied from the left and changes
nothing but the number of iterations.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.errors import InputError, StoreError
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.checkpoint import Checkpoint, digest
from ntkit.solve.iterative import Rooted, check_stopping
from ntkit.solve.lsmr import LSMR
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
            the outputs. (P, R) for R right-hand sides.
        relative_residual: ||J delta + ridge alpha - r|| / ||r||, where J^T alpha = delta, the largest over the
            right-hand sides; without a ridge that of J delta - r, which need not vanish.
        iterations: of LSMR, of all starts together; each takes one vjp and one jvp.
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
        checkpoint: a file that the state is written to now and then, and read from if it is there, of 4 P + 5 N*K
            numbers. It is bound to the network and the examples.
    """

    tolerance: float = 1e-6
    iterations: int = 1000
    preconditioner: Rooted | None = None
    checkpoint: str | os.PathLike[str] | None = None

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

        Cost: one vjp and one jvp of all examples for each iteration and right-hand side; memory: P + N*K numbers a few
        times for each right-hand side.

        Args:
            tangent: the network.
            x: N examples.
            residuals: r, what the outputs should change by, (N, K), or (N, K, R) for R steps at once.
            ridge: a number is relative to the mean diagonal entry of the kernel J J^T; `Absolute(...)` is not.
            progress: called with the iterations done.

        Raises:
            InputError: if the shapes do not fit, or the residuals are not finite.
            NotImplementedError: if an operation of the model can be differentiated only once.
            StoreError: if the checkpoint is damaged, or of another network, other examples, residuals, ridge or
                preconditioner, or the disk is full, which leaves the last state as it was.
        """
        fixed = as_fixed_ridge(ridge)
        kernel = TangentKernel(tangent, x)
        right = as_tensor(residuals).to("cpu", torch.float64)
        n, k = len(tangent.examples(x)), kernel.scalars
        if not (right.shape[:2] == (n, k) and right.ndim <= 3) and not (k == 1 and right.shape == (n,)):
            raise InputError(
                f"residuals are of shape (N, K)={(n, k)}, or (N, K, R) for several steps: got {tuple(right.shape)}"
            )
        if not bool(right.isfinite().all()):
            raise InputError("the residuals have entries that are not finite (NaN or infinity)")
        value = fixed.of(kernel)
        if self.preconditioner is not None and not value > 0:
            raise InputError("a preconditioner is for a positive ridge: got 0")
        root, p = math.sqrt(value), tangent.count
        half = (lambda v: v) if self.preconditioner is None else self.preconditioner.root()
        flat = right.reshape(n * k, -1)

        def forward(z: Tensor) -> Tensor:
            pushed = [tangent.jvp(x, step).to(flat).reshape(-1) for step in z[:p].T]
            return torch.stack(pushed, 1) + root * z[p:]

        def transposed(u: Tensor) -> Tensor:
            columns = half(u)
            pulled = [tangent.vjp(x, column.view(n, k).to(tangent.dtype)).to(flat) for column in columns.T]
            return torch.cat([torch.stack(pulled, 1), root * columns])

        file = None
        if self.checkpoint is not None:
            file = Checkpoint(self.checkpoint, digest(flat, "least squares", value), kernel.identity())
        target = half(flat)
        state = None if file is None else _read(file, target)
        if state is None:
            state = LSMR.begin(target, transposed)
        # what stops it: the residual, if the system has solutions, and without a ridge that of the normal equations
        loose, done = 0.0 if value > 0 else self.tolerance, int(state.steps.max())
        while done < self.iterations and not bool(state.done.all()):
            state.step(lambda z: half(forward(z)), transposed, atol=loose, btol=self.tolerance)
            done += 1
            if file is not None:
                file.write(state.parts(), {})
            if progress is not None:
                progress(done)
        if file is not None:
            file.write(state.parts(), {}, now=True)
        rest = forward(state.x) - flat
        # products in float32 cannot confirm what the recurrence says to the last digit
        confirmed = not value > 0 or _relative(half(rest), target) <= 10 * self.tolerance
        return LeastSquaresSolution(
            step=state.x[:p].reshape(p, *right.shape[2:]).clone(), relative_residual=_relative(rest, flat),
            iterations=done, converged=bool((state.done == 1).all()) and confirmed, ridge=value,
        )  # fmt: skip


def _read(file: Checkpoint, target: Tensor) -> LSMR | None:
    """The state in a file, which has begun with the same right-hand sides behind the same preconditioner.

    Raises:
        StoreError: if it has not.
    """
    saved = file.read()
    if saved is None:
        return None
    state = LSMR(**saved.parts)
    if not torch.allclose(state.norm_b, target.norm(dim=0), rtol=1e-6, atol=0.0):
        raise StoreError(
            f"{file.path} belongs to another preconditioner, whose vectors are of no use here: choose another "
            "checkpoint, or remove it"
        )
    return state


def _relative(rest: Tensor, whole: Tensor) -> float:
    """||rest|| / ||whole||, the largest over the columns; 0 for those that are zero throughout."""
    norms = whole.norm(dim=0)
    return float((rest.norm(dim=0) / torch.where(norms > 0, norms, 1.0)).max())
