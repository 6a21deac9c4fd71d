"""How much ridge: a number with its unit, or a rule that finds one.

Wherever a regression is asked for, a bare float is a *relative* ridge: in units of the mean diagonal entry of the
kernel between the training examples (trace / rows). The same number then means the same thing for every network, width
and read-out. What belongs to one matrix (preconditioners, determinants) takes the absolute number and says so.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError

if TYPE_CHECKING:
    from ntkit.kernel.base import Kernel
    from ntkit.solve.regression import KernelRegression

# Three values per decade. The largest eigenvalue of a kernel is up to `rows` times its mean diagonal, so that 100 is
# still a sensible ridge for pure noise; below 1e-8 the rounding of a float32 kernel decides, not the data.
DEFAULT_GRID = tuple(10.0 ** (step / 3) for step in range(-24, 7))


class FixedRidge(ABC):
    """A ridge that is known before the kernel is decomposed."""

    @abstractmethod
    def absolute(self, mean_diagonal: float) -> float:
        """The number that is added to the diagonal of a kernel with this mean diagonal entry."""

    def of(self, kernel: Kernel) -> float:
        """The same for a kernel, whose diagonal is computed only where it matters."""
        return self.absolute(float(kernel.diagonal().double().mean()))


@dataclass(frozen=True)
class Absolute(FixedRidge):
    """A ridge in the kernel's own units: the number added to its diagonal.

    It changes its meaning with the scale of the kernel: the kernel of the plain sum of C logits is C times the pNTK,
    and needs C times the ridge for the same predictions (Mohamadi, Bae, Sutherland 2023).
    """

    value: float

    def __post_init__(self) -> None:
        """Check the value."""
        _require_ridge(self.value, "Absolute")

    def absolute(self, mean_diagonal: float) -> float:  # noqa: D102
        return float(self.value)

    def of(self, kernel: Kernel) -> float:  # noqa: D102
        return float(self.value)


@dataclass(frozen=True)
class Relative(FixedRidge):
    """A ridge in units of the mean diagonal entry of the training kernel; what a bare float means."""

    value: float

    def __post_init__(self) -> None:
        """Check the value."""
        _require_ridge(self.value, "Relative")

    def absolute(self, mean_diagonal: float) -> float:  # noqa: D102
        if not self.value:
            return 0.0
        if not mean_diagonal > 0:
            raise InputError(
                f"a relative ridge needs a kernel with a positive mean diagonal: got {mean_diagonal:.3e}; is every "
                "selected parameter without effect on the output? An absolute ridge is ridge=Absolute(...)"
            )
        return float(self.value) * mean_diagonal

    def of(self, kernel: Kernel) -> float:  # noqa: D102
        return super().of(kernel) if self.value else 0.0


class SearchedRidge(ABC):
    """A ridge that is chosen from a grid by an estimate of the test error, from one eigendecomposition.

    A rule of your own: subclass with a `grid` (relative to the mean diagonal) and a `score`, the smaller the better.
    """

    grid: tuple[float, ...]

    @abstractmethod
    def score(self, regression: KernelRegression, ridge: float) -> float:
        """The estimated error at this absolute ridge."""

    def __repr__(self) -> str:
        grid = "" if self.grid == DEFAULT_GRID else f"({', '.join(f'{value:g}' for value in self.grid)},)"
        return f"{type(self).__name__}({grid})"

    def choose(self, regression: KernelRegression) -> Absolute:
        """The ridge of the grid with the least score; ridges too small for a positive definite kernel are passed over.

        Raises:
            InputError: if the score says nothing at any ridge of the grid.
            NotPositiveDefiniteError: if every ridge of the grid is too small.
        """
        candidates = torch.tensor(self.grid, dtype=torch.float64) * Relative(1.0).absolute(regression.mean_diagonal)
        usable = [float(ridge) for ridge in candidates if regression.is_positive_definite(float(ridge))]
        if not usable:
            regression.require_positive_definite(float(candidates.max()))
        best = min(usable, key=lambda ridge: self.score(regression, ridge))
        if not self.score(regression, best) < math.inf:
            raise InputError(
                f"{self!r} says nothing at any ridge of its grid: are examples repeated? Leave the copies out, or add "
                "larger ridges to the grid"
            )
        return Absolute(best)


@dataclass(frozen=True, repr=False)
class GCV(SearchedRidge):
    """The ridge with the least generalized cross-validation score (Wei, Hu, Steinhardt 2022).

    It predicts the squared error on new data. With the full kernel it leaves out one output of one example, not an
    example: see `KernelRegression.gcv`, and prefer `LeaveOneOut` there. Ridges at which it says nothing
    (repeated examples, small ridges) go by leave-one-out instead: `KernelRegression.expected_error`.
    """

    grid: tuple[float, ...] = DEFAULT_GRID

    def __post_init__(self) -> None:
        """Check the grid."""
        object.__setattr__(self, "grid", _checked_grid(self.grid, "GCV"))

    def score(self, regression: KernelRegression, ridge: float) -> float:  # noqa: D102
        return regression.expected_error(ridge)


@dataclass(frozen=True, repr=False)
class LeaveOneOut(SearchedRidge):
    """The ridge with the least squared error on examples left out one at a time (exactly, without refitting)."""

    grid: tuple[float, ...] = DEFAULT_GRID

    def __post_init__(self) -> None:
        """Check the grid."""
        object.__setattr__(self, "grid", _checked_grid(self.grid, "LeaveOneOut"))

    def score(self, regression: KernelRegression, ridge: float) -> float:  # noqa: D102
        return regression.leave_one_out(ridge)


def as_ridge(ridge: float | FixedRidge | SearchedRidge) -> FixedRidge | SearchedRidge:
    """A ridge object as it is; a bare number as `Relative`.

    Raises:
        InputError: if it is neither a ridge object nor a finite number >= 0.
    """
    if isinstance(ridge, (FixedRidge, SearchedRidge)):
        return ridge
    if isinstance(ridge, Real) and not isinstance(ridge, bool):
        return Relative(float(ridge))
    raise InputError(
        "ridge is a number (relative to the mean diagonal of the kernel) or one of Relative(...), Absolute(...), "
        f"GCV(), LeaveOneOut(): got {ridge!r}"
    )


def as_fixed_ridge(ridge: float | FixedRidge) -> FixedRidge:
    """The same for a solver that takes one ridge and searches for none.

    Raises:
        InputError: if the ridge is a rule that has to search.
    """
    found = as_ridge(ridge)
    if isinstance(found, SearchedRidge):
        raise InputError(
            f"{type(found).__name__} searches for a ridge and this solver takes a given one: pass a number, "
            "Relative(...) or Absolute(...), or use ntkit.solve.regression.regress, which searches"
        )
    return found


def as_absolute(ridge: float | FixedRidge) -> float:
    """For what belongs to one matrix: the absolute number, bare or as `Absolute`.

    Raises:
        InputError: if it is relative, or not a positive number.
    """
    value = ridge.value if isinstance(ridge, Absolute) else ridge
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise InputError(
            f"a positive absolute ridge is needed here, as a number or Absolute(...): got {ridge!r}. From a relative "
            "one: its value times kernel.diagonal().mean()"
        )
    return float(value)


def _require_ridge(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise InputError(f"{name}: a ridge is a finite number >= 0: got {value!r}")


def _checked_grid(grid: object, name: str) -> tuple[float, ...]:
    values = grid.tolist() if isinstance(grid, Tensor) else list(grid)  # type: ignore[call-overload]
    if not values:
        raise InputError(f"{name}: the grid of ridges is empty")
    for value in values:
        _require_ridge(value, f"{name}(grid)")
    return tuple(float(value) for value in values)
