"""Training with a kernel that stays as it is, for any loss: an ordinary differential equation for the coefficients.

    f_t(x) = f0(x) + K(x, X) a_t,      da/dt = -grad l(f_t(X), Y)       (over N for the mean loss)

For the square loss `ntkit.solve.flow` has it in closed form; for cross-entropy it is solved by SciPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.losses import as_loss
from ntkit.solve.regression import as_targets, evaluate
from ntkit.solve.symmetric import as_tensor, symmetric_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from ntkit.kernel.base import Kernel
    from ntkit.solve.losses import Loss


@dataclass(frozen=True, eq=False)
class Evolution:
    """A training run, at the times that were asked for.

    Attributes:
        times: (T,), learning rate times steps.
        outputs: f_t(X) on the training examples, (T, N, C), float64, in the memory of the CPU.
        coefficients: a_t, (T, N, C), there too.
        evaluations: how often the gradient was computed.
        full: whether the kernel couples the outputs.
        around: whether there was an f0.
    """

    times: Tensor
    outputs: Tensor
    coefficients: Tensor
    evaluations: int
    full: bool
    around: bool

    def predict(
        self, cross: Kernel | Tensor | np.ndarray, prior: Tensor | np.ndarray | None = None, *, at: int = -1
    ) -> Tensor:
        """f_t on M examples, (M, C), float64.

        Args:
            cross: the kernel between them (rows) and the training examples (columns): (M, N), or (M*C, N*C).
            prior: f0 on them, (M, C); given exactly when the run was given one.
            at: number of the time.

        Raises:
            InputError: if shapes do not fit, or `prior` is missing or superfluous.
        """
        return evaluate(cross, self.coefficients[at], prior, full=self.full, around=self.around)


def evolve(
    kernel: Kernel | Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    loss: Loss | nn.CrossEntropyLoss,
    times: Sequence[float],
    *,
    prior: Tensor | np.ndarray | None = None,
    mean: bool = True,
    tolerance: float = 1e-8,
    evaluations: int = 100_000,
    progress: Callable[[float, float], None] | None = None,
) -> Evolution:
    """Gradient flow for any loss.

    Args:
        kernel: between the training examples: (N, N), used for every output, or (N*C, N*C), example-major.
        targets: classes (N,), or points (N, C).
        loss: cross-entropy, square loss or one of your own; also a plain `nn.CrossEntropyLoss()`.
        times: to stop at, not decreasing.
        prior: f0(X), (N, C); needed where targets are classes; None for zero.
        mean: train the mean of the losses over the examples, not their sum.
        tolerance: of the solution, relative and absolute.
        evaluations: give up after so many gradients.
        progress: called with (time reached, last time).

    Returns:
        The run. Cost: n^2 C for each gradient (n rows of the kernel), and about 3 times the product of the time and the
        largest eigenvalue of them: the solver is explicit. Memory: 8 n^2 bytes.

    Raises:
        InputError: if anything does not fit or is not finite, or the solver has to give up, with the time it reached.
    """
    from scipy.integrate import DOP853

    loss, moments = as_loss(loss, mean=mean), _checked_times(times)
    y, first = _start(targets, prior)
    n, count = first.shape
    matrix = symmetric_matrix(kernel)
    if matrix.size not in (n, n * count):
        raise InputError(
            f"a kernel of N={n} examples and C={count} outputs has {n} or {n * count} rows: got {matrix.size}"
        )
    full = matrix.size != n
    loss.targets(y, first)  # what is wrong with them is said before any work
    scale = 1 / n if mean else 1.0
    used = 0

    def now(a: Tensor) -> Tensor:
        product = matrix.values @ (a.reshape(-1, 1) if full else a).to(matrix.values.device)
        return first + product.cpu().reshape(n, count)

    def gradient(time: float, flat: np.ndarray) -> np.ndarray:
        nonlocal used
        used += 1
        if used > evaluations:
            raise InputError(
                f"gave up at time {time:.4g} of {moments[-1]:.4g} after {evaluations} gradients: ask for shorter "
                "times, a larger `tolerance`, or more `evaluations`"
            )
        a = torch.from_numpy(flat).reshape(n, count)
        return (scale * loss.misfit(now(a), y)).reshape(-1).numpy()

    state, found, time = np.zeros(n * count), [], 0.0
    for moment in moments:
        if moment > time:
            trouble, solver = None, DOP853(gradient, time, state, moment, rtol=tolerance, atol=tolerance)
            while solver.status == "running":
                trouble = solver.step()
                if progress is not None:
                    progress(float(solver.t), moments[-1])
            if solver.status == "failed":
                raise InputError(f"the solver stopped at time {solver.t:.4g} of {moments[-1]:.4g}: {trouble}")
            state, time = solver.y, moment
        found.append(torch.from_numpy(state.copy()).reshape(n, count))
    return Evolution(
        times=torch.tensor(moments, dtype=torch.float64),
        outputs=torch.stack([now(a) for a in found]),
        coefficients=torch.stack(found),
        evaluations=used,
        full=full,
        around=prior is not None,
    )


def _checked_times(times: Sequence[float]) -> list[float]:
    moments = [float(time) for time in times]
    if not moments or any(not 0 <= time < math.inf for time in moments) or moments != sorted(moments):
        raise InputError(f"times: expected finite numbers >= 0 that do not decrease, got {moments[:6]!r}")
    return moments


def _start(targets: Tensor | np.ndarray, prior: Tensor | np.ndarray | None) -> tuple[Tensor, Tensor]:
    """Targets on the CPU, and f0."""
    y = as_tensor(targets).cpu()
    if prior is not None:
        first = as_targets(prior, "prior").cpu()
    elif y.ndim == 2:
        first = torch.zeros(y.shape, dtype=torch.float64)
    else:
        raise InputError("classes do not say how many outputs there are: pass prior=f0(X), or zeros of shape (N, C)")
    return (y.double() if y.is_floating_point() else y), first
