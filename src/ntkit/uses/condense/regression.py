"""Kernel ridge regression from a support set: its predictions, its loss, and how good they are on other examples.

    L = 1/2 mean (y_t - K_ts (K_ss + lambda I)^-1 y_s)^2,  lambda = ridge * tr(K_ss) / n,

the mean over targets and classes, in float64 through a Cholesky factorization (Nguyen, Chen and Lee 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ntkit.errors import InputError, NotPositiveDefiniteError
from ntkit.kernel.explicit import FeatureFunction
from ntkit.kernel.function import KernelFunction
from ntkit.kernel.memory import checked_memory
from ntkit.solve.symmetric import EPS
from ntkit.uses.condense.support import Labelled, Support, centred

RIDGE = 1e-6
# Copies of a block of K_ts that an infinite-width kernel of a few layers keeps for its gradients.
COPIES = 40
# Copies of the features of a target, those on the way to them included.
FEATURE_COPIES = 6


@dataclass(frozen=True)
class Score:
    """How a regression from a support set does on other examples.

    Attributes:
        accuracy: share of the examples whose largest prediction is their label.
        standard_error: of the accuracy, of a sample of examples.
        loss: L on them.
        ridge: the absolute number that was added to the diagonal.
        condition: of K_ss + lambda I.
    """

    accuracy: float
    standard_error: float
    loss: float
    ridge: float
    condition: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """A kernel ridge regression from a support set.

    Attributes:
        kernel: what it regresses with.
        support: what it has seen.
        coefficients: (K_ss + lambda I)^-1 y_s, (n, C).
        ridge: the absolute lambda.
        condition: of K_ss + lambda I.
    """

    kernel: KernelFunction
    support: Support
    coefficients: Tensor
    ridge: float
    condition: float

    def predict(self, x: Tensor, *, memory: int | None = None) -> Tensor:
        """(N, C), float64. K_ts is formed in blocks.

        Raises:
            InputError: if examples have another shape than the support points.
        """
        with torch.no_grad():
            said = [
                block(self.kernel, x[rows], self.support.x) @ self.coefficients
                for rows in blocks(len(x), self.kernel, self.support, memory)
            ]
        return torch.cat(said) if said else self.coefficients.new_zeros(0, self.support.classes)

    def score(self, data: tuple[Tensor, Tensor], *, memory: int | None = None) -> Score:
        """On examples with labels.

        Raises:
            InputError: if they do not fit the support set.
        """
        found = Labelled.of(data, classes=self.support.classes, named="the examples to score on")
        said, labels = self.predict(found.x, memory=memory).cpu(), found.labels.cpu()
        right = (said.argmax(1) == labels).double()
        return Score(
            accuracy=float(right.mean()),
            standard_error=math.sqrt(float(right.mean() * (1 - right.mean())) / len(right)),
            loss=float((said - centred(labels, found.classes)).square().mean() / 2),
            ridge=self.ridge,
            condition=self.condition,
        )


def fit(kernel: KernelFunction, support: Support, *, ridge: float = RIDGE) -> Fitted:
    """Regress from a support set. Cost: n^3, for the factorization and the condition number.

    Args:
        kernel: one row for each example.
        support: n points.
        ridge: in units of the mean diagonal entry of K_ss.

    Raises:
        InputError: if the kernel has several rows for an example, or the ridge is negative.
        NotPositiveDefiniteError: if K_ss + lambda I is singular in float64.
    """
    checked_ridge(ridge)
    with torch.no_grad():
        matrix, absolute = regularised(kernel, support.x, ridge)
        values = spectrum(matrix, absolute)
        coefficients = torch.cholesky_solve(support.y, lower(matrix, absolute))
    return Fitted(kernel, support, coefficients, float(absolute), float(values[-1] / values[0]))


def checked_ridge(ridge: float) -> None:
    """A relative ridge.

    Raises:
        InputError: if it is negative or not finite.
    """
    if not ridge >= 0 or not math.isfinite(ridge):
        raise InputError(
            f"ridge is in units of the mean diagonal entry of the kernel, 0 or more, such as 1e-6: got {ridge}"
        )


def regularised(kernel: KernelFunction, x: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """K_ss + lambda I in float64, and lambda. Both carry gradients to x.

    Raises:
        InputError: if the kernel is not (n, n).
    """
    matrix = kernel(x).dense().double()
    if matrix.shape != (len(x), len(x)):
        raise InputError(
            f"a kernel of {len(x)} points has shape {(len(x), len(x))} here: got {tuple(matrix.shape)}. Use a read-out "
            "with one scalar for each example (SumOfLogits, or trace=True)"
        )
    absolute = ridge * matrix.diagonal().mean()
    return (matrix + matrix.T) / 2 + absolute * torch.eye(len(x), dtype=matrix.dtype, device=matrix.device), absolute


def lower(matrix: Tensor, absolute: Tensor) -> Tensor:
    """The Cholesky factor. The eigenvalues are looked at only where the ridge is too small to vouch for them.

    Raises:
        NotPositiveDefiniteError: if the matrix cannot be solved with, see `spectrum`.
    """
    # none of K_ss + lambda I is below lambda, and none above the trace
    if not bool(absolute.detach() > EPS * len(matrix) * matrix.detach().diagonal().sum()):
        spectrum(matrix, absolute)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not factor.detach().isfinite().all():
        _refuse(_eigenvalues(matrix), absolute)
    return factor


def spectrum(matrix: Tensor, absolute: Tensor) -> Tensor:
    """The eigenvalues, ascending, of a matrix that can be solved with. Cost: 4/3 n^3.

    Raises:
        NotPositiveDefiniteError: if the smallest cannot be told from zero in float64, as in `ntkit.solve.direct`.
    """
    values = _eigenvalues(matrix)
    if not values[0] > EPS * len(values) * values[-1]:
        _refuse(values, absolute)
    return values


def _eigenvalues(matrix: Tensor) -> Tensor:
    matrix = matrix.detach()
    return torch.linalg.eigvalsh(matrix) if matrix.isfinite().all() else torch.full_like(matrix[0], math.nan)


def _refuse(values: Tensor, absolute: Tensor) -> NoReturn:
    smallest, mean = float(values[0]), float(values.mean())  # that of the diagonal as well
    raise NotPositiveDefiniteError(
        f"the kernel of the support points plus its ridge {float(absolute.detach()):.1e} is not positive definite "
        f"(smallest eigenvalue {smallest:.1e}, mean of the diagonal {mean:.1e}): points that have become alike? Take a "
        "larger ridge, such as 1e-4",
        smallest, 1e-4 * mean,
    )  # fmt: skip


def block(kernel: KernelFunction, targets: Tensor, x: Tensor) -> Tensor:
    """K_ts of a few targets, (B, n), float64.

    Raises:
        InputError: if the targets have another shape than the support points.
    """
    if targets.shape[1:] != x.shape[1:]:
        raise InputError(
            f"examples have the shape of the support points, {tuple(x.shape[1:])}: got {tuple(targets.shape[1:])}"
        )
    return kernel(targets.to(x), x).dense().double()


def blocks(size: int, kernel: KernelFunction, support: Support, memory: int | None) -> Iterator[slice]:
    """Slices of targets such that a block of K_ts with what its gradients need stays within the memory."""
    with torch.no_grad():
        features = FEATURE_COPIES * _features(kernel, support.x[:1])
    each = COPIES * len(support) + 4 * support.x[0].numel() + features
    height = max(min(checked_memory(memory, support.x.device) // (8 * each), 8192), 1)
    return (slice(start, min(start + height, size)) for start in range(0, size, height))


def _features(kernel: KernelFunction, x: Tensor) -> int:
    """Features of one example that a kernel makes, or that the kernels do of which it is made."""
    parts = [part for part in vars(kernel).values() if isinstance(part, KernelFunction)]
    own = kernel.features(x).shape[1] if isinstance(kernel, FeatureFunction) else 0
    return max(own, sum(_features(part, x) for part in parts))
