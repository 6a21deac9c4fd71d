"""Conjugate gradients for kernels that are never formed: products alone, a preconditioner, and evidence.

Several right-hand sides share their products with the matrix, each with steps of its own. What was reached is measured
at the end with the matrix itself, not taken from the recurrence. Products in float32 lead the recurrence astray after
some digits; a kernel in float64, asked now and then, leads it back. A long solve can be stopped, and goes on from a
file.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ntkit.errors import InputError, StoreError
from ntkit.kernel.base import Kernel
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


# Seconds between two states on disk.
EVERY = 60.0
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
        checkpoint: a file that the state is written to now and then, and read from if it is there.
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
            StoreError: if the checkpoint is of another system.
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
        state = self._iterate(lambda v: with_ridge(kernel, v), judged, columns, value, progress)
        history = state.history
        if exact is not None and history and state.renewed == history[-1]:
            residual = state.renewed  # it was taken at the last iteration
        else:
            norms = columns.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
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
        progress: Callable[[int, float], None] | None,
    ) -> _State:
        inverse = self.preconditioner or (lambda r: r)
        file = None if self.checkpoint is None else _Checkpoint(Path(self.checkpoint), _name(y, ridge))
        state = None if file is None else file.read()
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
                file.write(state)
            if progress is not None:
                progress(len(state.history), state.history[-1])
        if file is not None:
            file.write(state, now=True)
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


class _Checkpoint:
    """A state on disk: written whole, with the name of its system."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.last = path, name, time.monotonic()

    def read(self) -> _State | None:
        """The state, if there is one.

        Raises:
            StoreError: if it is of another system, or damaged.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                facts = file.metadata() or {}
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{self.path} is not a checkpoint of a solve, or damaged ({error}): remove it") from error
        if facts.get("name") != self.name:
            raise StoreError(
                f"{self.path} belongs to another right-hand side or ridge: choose another checkpoint, or remove it"
            )
        # older files have neither of the last two
        renewed, judged = float(facts.get("renewed", 1.0)), facts.get("judged") == "yes"
        return _State(**parts, history=json.loads(facts["history"]), renewed=renewed, judged=judged)

    def write(self, state: _State, *, now: bool = False) -> None:
        """Write the state down, if the last time is long ago."""
        if not now and time.monotonic() - self.last < EVERY:
            return
        parts = {name: getattr(state, name).contiguous() for name in ("solution", "residual", "direction", "energy")}
        partial = self.path.with_name(self.path.name + ".partial")
        facts = {"name": self.name, "history": json.dumps(state.history), "renewed": repr(state.renewed)}
        save_file(parts, partial, {**facts, "judged": "yes" if state.judged else "no"})
        partial.replace(self.path)
        self.last = time.monotonic()


def _name(y: Tensor, ridge: float) -> str:
    return hashlib.sha256(y.contiguous().cpu().numpy().tobytes() + repr(ridge).encode()).hexdigest()
