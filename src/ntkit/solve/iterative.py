"""Conjugate gradients for kernels that are never formed: products alone, a preconditioner, and evidence.

Several right-hand sides share their products with the matrix, each with steps of its own. What was reached is measured
at the end with the matrix itself, not taken from the recurrence. Products in float32 lead the recurrence astray after
some digits; a kernel in float64, asked now and then, leads it back. A long solve can be stopped, and goes on from a
file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from ntkit.errors import InputError, StoreError
from ntkit.kernel.base import Kernel
from ntkit.solve.checkpoint import Checkpoint, State, digest, identity_of
from ntkit.solve.ridge import FixedRidge, as_fixed_ridge
from ntkit.solve.symmetric import as_kernel, as_tensor

if TYPE_CHECKING:
    import numpy as np

# A map of (n, R) vectors to (n, R) vectors that is about the inverse of the matrix; symmetric and positive definite.
Preconditioner = Callable[[Tensor], Tensor]


@runtime_checkable
class Rooted(Protocol):
    """A preconditioner that knows a square root of itself."""

    def __call__(self, right: Tensor, /) -> Tensor:
        """About (K + ridge I)^-1 right."""
        ...

    def root(self) -> Preconditioner:
        """About the inverse square root of K + ridge I; symmetric."""
        ...


# The residual is taken anew with the exact kernel whenever it has fallen by this factor.
RENEWED = 1e-2


@dataclass(frozen=True, eq=False)
class IterativeSolution:
    """(K + ridge I)^-1 y by conjugate gradients, and how far to believe it.

    Attributes:
        value: the solution, float64, in the shape of y.
        relative_residual: ||(K + ridge I) value - y|| / ||y||, the largest over the right-hand sides, measured with
            one more product.
        iterations: products with the matrix that were needed, of all starts together.
        converged: whether every right-hand side reached the tolerance.
        history: the largest relative residual after each iteration, by the recurrence.
        ridge: the absolute number that was added to the diagonal.
    """

    value: Tensor
    relative_residual: float
    iterations: int
    converged: bool
    history: tuple[float, ...]
    ridge: float


def check_stopping(name: str, tolerance: float, iterations: int) -> None:
    """Refuse a stopping rule that stops nothing, or everything.

    Raises:
        InputError: if the tolerance is not between 0 and 1, or the number of iterations not positive.
    """
    if not 0 < tolerance < 1 or iterations < 1:
        raise InputError(
            f"{name} need a tolerance between 0 and 1 and a positive number of iterations: got "
            f"tolerance={tolerance!r}, iterations={iterations!r}"
        )


@dataclass(frozen=True)
class ConjugateGradients:
    """The iterative solver: `ConjugateGradients().solve(kernel, y, ridge)`.

    Attributes:
        tolerance: wanted relative residual of every right-hand side.
        iterations: at most so many.
        preconditioner: about the inverse of K + ridge I; none by default. See `ntkit.solve.precondition`.
        checkpoint: a file that the state is written to now and then, and read from if it is there: four times the size
            of y. It is bound to the kernel by `Kernel.identity`, which is read once more for it.
    """

    tolerance: float = 1e-6
    iterations: int = 1000
    preconditioner: Preconditioner | None = None
    checkpoint: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if the tolerance or the number of iterations is not positive.
        """
        check_stopping("conjugate gradients", self.tolerance, self.iterations)

    def solve(
        self,
        kernel: Kernel | Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        ridge: float | FixedRidge = 0.0,
        *,
        exact: Kernel | Tensor | np.ndarray | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> IterativeSolution:
        """Solve (K + ridge I) x = y for y of shape (n,) or (n, R).

        Cost: one product of the kernel with R vectors for each iteration, and one at the end; with `exact` one more of
        that for every two digits. Everything but the products happens on the CPU, in float64.

        Args:
            kernel: square and symmetric; only products with it are taken, and its diagonal for a relative ridge.
            y: right-hand sides.
            ridge: a number is relative to the mean diagonal entry of the kernel; `Absolute(...)` is not.
            exact: the same kernel in float64, where `kernel` is in float32: the residual is taken from it now and then,
                so that the solution is as good as with it alone.
            progress: called after each iteration with (iterations done, largest relative residual).

        Raises:
            InputError: if the shapes do not fit, y is not finite, or the matrix is not positive definite.
            StoreError: if the checkpoint is damaged, or of another kernel, right-hand side or ridge (a kernel without
                an `identity` is told by one product with the solution so far), or the disk is full, which leaves the
                last state as it was.
        """
        kernel, fixed = as_kernel(kernel), as_fixed_ridge(ridge)
        right = as_tensor(y).to("cpu", torch.float64)
        if kernel.shape[0] != kernel.shape[1] or right.ndim not in (1, 2) or len(right) != kernel.shape[0]:
            raise InputError(
                f"a solve needs a square kernel and a right-hand side of as many rows: got shapes {kernel.shape} and "
                f"{tuple(right.shape)}"
            )
        if not bool(right.isfinite().all()):
            raise InputError("the right-hand side has entries that are not finite (NaN or infinity)")
        judge = kernel if exact is None else as_kernel(exact)
        if judge.shape != kernel.shape:
            raise InputError(f"the exact kernel has another shape: got {judge.shape}, expected {kernel.shape}")
        value = fixed.of(kernel)

        def with_ridge(matrix: Kernel, v: Tensor) -> Tensor:
            return (matrix @ v.to(matrix.device)).to(v) + value * v

        columns = right if right.ndim == 2 else right[:, None]

        def remainder(solution: Tensor) -> Tensor:
            return columns - with_ridge(judge, solution)

        judged = None if exact is None else remainder
        norms = columns.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        file = state = None
        if self.checkpoint is not None:
            file = Checkpoint(self.checkpoint, digest(columns, value), identity_of(kernel))
            saved = file.read()
            if saved is not None:
                state = _State.of(saved)
                if not saved.bound:
                    asked = judge if state.judged else kernel
                    rest = columns - with_ridge(asked, state.solution)
                    _require_own(file, float(((rest - state.residual).norm(dim=0) / norms).max()), asked.dtype)
        state = self._iterate(lambda v: with_ridge(kernel, v), judged, columns, value, state, file, progress)
        history = state.history
        if exact is not None and history and state.renewed == history[-1]:
            residual = state.renewed  # it was taken at the last iteration
        else:
            gap = remainder(state.solution).norm(dim=0) / norms
            residual = float(gap.max()) if columns.numel() else 0.0
        return IterativeSolution(
            value=state.solution.reshape(right.shape).to(as_tensor(y).device),
            relative_residual=residual,
            iterations=len(history),
            # products in float32 cannot confirm what the recurrence says to the last digit
            converged=bool(history[-1] <= self.tolerance if history else True) and residual <= 10 * self.tolerance,
            history=tuple(history),
            ridge=value,
        )

    def _iterate(
        self,
        product: Preconditioner,
        remainder: Callable[[Tensor], Tensor] | None,
        y: Tensor,
        ridge: float,
        state: _State | None,
        file: Checkpoint | None,
        progress: Callable[[int, float], None] | None,
    ) -> _State:
        inverse = self.preconditioner or (lambda r: r)
        norms = y.norm(dim=0)
        scale = torch.where(norms > 0, norms, 1.0)
        if state is None:
            z = inverse(y)
            state = _State(torch.zeros_like(y), y.clone(), z.clone(), (y * z).sum(0), [], 1.0, remainder is not None)
        elif remainder is not None and not state.judged:  # begun without: what it believes has to be found out
            state.residual = remainder(state.solution)
            state.direction = inverse(state.residual).clone()  # which may be the residual itself
            state.energy = (state.residual * state.direction).sum(0)
            state.renewed, state.judged = float((state.residual.norm(dim=0) / scale).max()), True
        while len(state.history) < self.iterations:
            active = state.residual.norm(dim=0) / scale > self.tolerance
            if not bool(active.any()):
                break
            step = product(state.direction)
            curvature = (state.direction * step).sum(0)
            if bool((curvature[active] <= 0).any()) or not bool(curvature.isfinite().all()):
                raise InputError(
                    f"the kernel plus ridge {ridge:.3e} is not positive definite (a direction has the curvature "
                    f"{float(curvature.min()):.3e}), or its products are not finite: use a larger ridge, or float64"
                )
            # finished right-hand sides stand still
            alpha = torch.where(active, state.energy / torch.where(active, curvature, 1.0), 0.0)
            state.solution += alpha * state.direction
            state.residual -= alpha * step
            worst = float((state.residual.norm(dim=0) / scale).max())
            if remainder is not None and worst <= max(RENEWED * state.renewed, self.tolerance):
                state.residual = remainder(state.solution)
                state.renewed = worst = float((state.residual.norm(dim=0) / scale).max())
            z = inverse(state.residual)
            energy = (state.residual * z).sum(0)
            beta = torch.where(active, energy / torch.where(active, state.energy, 1.0), 0.0)
            state.direction = z + beta * state.direction
            state.energy = energy
            state.history.append(worst)
            if file is not None:
                state.write(file)
            if progress is not None:
                progress(len(state.history), state.history[-1])
        if file is not None:
            state.write(file, now=True)
        return state


@dataclass
class _State:
    """Where conjugate gradients stand.

    `renewed` is the relative residual when it was last taken from the solution, and `judged` whether it ever is.
    """

    solution: Tensor
    residual: Tensor
    direction: Tensor
    energy: Tensor
    history: list[float]
    renewed: float
    judged: bool

    @classmethod
    def of(cls, saved: State) -> _State:
        """From a file; older ones have neither of the last two."""
        facts = saved.facts
        renewed, judged = float(facts.get("renewed", 1.0)), facts.get("judged") == "yes"
        return cls(**saved.parts, history=json.loads(facts["history"]), renewed=renewed, judged=judged)

    def write(self, file: Checkpoint, *, now: bool = False) -> None:
        """Into a file, if it is time."""
        parts = {name: getattr(self, name) for name in ("solution", "residual", "direction", "energy")}
        judged = "yes" if self.judged else "no"
        file.write(
            parts, {"history": json.dumps(self.history), "renewed": repr(self.renewed), "judged": judged}, now=now
        )


def _require_own(file: Checkpoint, gap: float, dtype: torch.dtype) -> None:
    """Refuse a state whose residual is not that of its solution, by the relative difference of the two.

    Raises:
        StoreError: if they differ by more than rounding does in a solve that comes to something.
    """
    if not gap <= torch.finfo(dtype).eps ** 0.25:
        raise StoreError(
            f"{file.path} belongs to another kernel, or float32 has led it astray: its residual differs by {gap:.1e} "
            "from that of its solution with this kernel. Choose another checkpoint, or remove it"
        )
