"""How far training has come, mode by mode: what is left of a residual along an eigenvector of the kernel.

Square loss on a linear model (or on a network whose kernel stays as it is) trains every eigenvector of the kernel by
itself: a mode with eigenvalue l keeps the part `left(l)` of its residual, and the coefficients of the change are
`moved(l)` = (1 - left(l)) / l times it. Whatever a course is, both are functions of the eigenvalue alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.errors import InputError


class Course(ABC):
    """A training run on a sum of losses 1/2 ||f(x_n) - y_n||^2, as far as it has come."""

    @abstractmethod
    def left(self, eigenvalues: Tensor) -> Tensor:
        """The part of the first residual that is left, for eigenvalues (n,) >= 0 in float64."""

    @abstractmethod
    def moved(self, eigenvalues: Tensor) -> Tensor:
        """(1 - left) / eigenvalue, with its limit where the eigenvalue is zero."""


@dataclass(frozen=True)
class GradientFlow(Course):
    """Training with infinitely small steps for a time: left = exp(-l t).

    Attributes:
        time: learning rate times steps.
    """

    time: float

    def __post_init__(self) -> None:
        """Check the time.

        Raises:
            InputError: if it is negative or not finite.
        """
        if not 0 <= self.time < math.inf:
            raise InputError(f"time: got {self.time!r}, expected a finite number >= 0; for ever is Converged()")

    def left(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        return torch.exp(-eigenvalues * self.time)

    def moved(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        return _over(-torch.expm1(-eigenvalues * self.time), eigenvalues, self.time)


@dataclass(frozen=True)
class GradientDescent(Course):
    """Full-batch steps of plain gradient descent: left = (1 - rate l)^steps; diverges where rate l > 2.

    Attributes:
        steps: how many.
        learning_rate: of each.
    """

    steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if they are out of range.
        """
        _check(self.steps, self.learning_rate)

    def left(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        return (1 - self.learning_rate * eigenvalues).pow(self.steps)

    def moved(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        rates = self.learning_rate * eigenvalues
        # 1 - (1 - r)^s without cancellation where r is small
        small = -torch.expm1(self.steps * torch.log1p(-rates.clamp_max(0.5)))
        gone = torch.where(rates < 0.5, small, 1 - self.left(eigenvalues))
        return _over(gone, eigenvalues, self.learning_rate * self.steps)


@dataclass(frozen=True)
class MomentumDescent(Course):
    """Full-batch steps with momentum, as `torch.optim.SGD` takes them: v <- momentum v + gradient.

    Attributes:
        steps: how many.
        learning_rate: of each.
        momentum: 0 <= momentum < 1, without dampening.
        nesterov: step along gradient + momentum v instead of v.

    Cost: log2(steps) products of 3 x 3 matrices for each eigenvalue.
    """

    steps: int
    learning_rate: float
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if they are out of range.
        """
        _check(self.steps, self.learning_rate)
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum: got {self.momentum!r}, expected 0 <= momentum < 1")

    def left(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        # (residual, velocity / l): kept by itself, since 1 - l moved cancels where little is left
        rate, m = self.learning_rate * eigenvalues, torch.full_like(eigenvalues, self.momentum)
        one = torch.ones_like(rate)
        if self.nesterov:
            first, cross = 1 - rate * (1 + m), -rate * m * m
        else:
            first, cross = 1 - rate, -rate * m
        rows = [torch.stack([first, cross], 1), torch.stack([one, m], 1)]
        return torch.linalg.matrix_power(torch.stack(rows, 1), self.steps)[:, 0, 0]

    def moved(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        # (a, v, 1): the residual is 1 - l a; v' = m v + 1 - l a; a' = a + rate v'
        rate, m, values = self.learning_rate, self.momentum, eigenvalues
        zero, one = torch.zeros_like(values), torch.ones_like(values)
        if self.nesterov:
            step = [1 - rate * (1 + m) * values, rate * m * m * one, rate * (1 + m) * one]
        else:
            step = [1 - rate * values, rate * m * one, rate * one]
        rows = [torch.stack(row, 1) for row in (step, [-values, m * one, one], [zero, zero, one])]
        return torch.linalg.matrix_power(torch.stack(rows, 1), self.steps)[:, 0, 2]


@dataclass(frozen=True)
class Converged(Course):
    """Trained for ever: nothing is left, but of modes whose eigenvalue is zero everything (least squares, least norm).

    Attributes:
        resolution: eigenvalues below this part of the largest count as zero.
    """

    resolution: float = 1e-12

    def left(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        return self._lost(eigenvalues).to(eigenvalues)

    def moved(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        lost = self._lost(eigenvalues)
        return torch.where(lost, 0.0, 1 / eigenvalues.masked_fill(lost, 1.0))

    def _lost(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues <= self.resolution * eigenvalues.max()


@dataclass(frozen=True)
class Ridge(Course):
    """Trained for ever with the penalty ridge / 2 ||theta - theta_0||^2: left = ridge / (l + ridge).

    Attributes:
        value: in the kernel's own units, for a sum of losses.
    """

    value: float

    def __post_init__(self) -> None:
        """Check the ridge.

        Raises:
            InputError: if it is not positive.
        """
        if not 0 < self.value < math.inf:
            raise InputError(f"ridge: got {self.value!r}, expected a positive number; without one use Converged()")

    def left(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        return self.value / (eigenvalues + self.value)

    def moved(self, eigenvalues: Tensor) -> Tensor:  # noqa: D102
        return 1 / (eigenvalues + self.value)


def _over(gone: Tensor, eigenvalues: Tensor, limit: float) -> Tensor:
    zero = eigenvalues == 0
    return torch.where(zero, limit, gone / eigenvalues.masked_fill(zero, 1.0))


def _check(steps: int, learning_rate: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"steps: got {steps!r}, expected a whole number >= 0")
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate: got {learning_rate!r}, expected a positive number")
