"""Moments of a nonlinearity under Gaussian inputs: E[g(u) g(v)] and E[g'(u) g'(v)] for (u, v) ~ N(0, [[a, c], [c, b]]).

Closed forms: linear and piecewise linear with a kink at zero (Cho and Saul, 2009), erf (Williams, 1997), GELU,
exponential, sine and cosine. For GELU, with A = 1 + a, B = 1 + b, D = A B - c^2 and Q = 1/4 + atan(c / sqrt(D)) /
(2 pi), which is the probability that u and v exceed two independent standard normal numbers:

    E[g g]   = c Q + sqrt(D) / (2 pi) * (1 + 1/D - 1/A - 1/B)
    E[g' g'] = Q + c / (2 pi sqrt(D)) * (1/A + 1/B + 1/D)

Any other function goes through its Hermite series (`ntkit.kernel.infinite.hermite`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

# Where a*b - c^2 is zero or negative by rounding, its root has this in its place, and so a finite derivative.
_TINY = torch.finfo(torch.float64).tiny


class Dual(ABC):
    """The two moments of one function g, elementwise in a, b, c (tensors that broadcast)."""

    odd: bool = False  # g(-z) = -g(z): its mean is zero

    @abstractmethod
    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:
        """E[g g], and E[g' g'] where that is wanted."""

    def coincident(self, a: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:
        """The same for u = v, exactly: E[g^2] and E[g'^2]."""
        return self(a, a, a, derivative=derivative)

    def check(self, a: Tensor, *, derivative: bool) -> None:  # noqa: B027  (most have nothing to say)
        """Say what error there is for units of these variances; closed forms have none."""


@dataclass(frozen=True)
class Linear(Dual):
    """g(z) = slope z."""

    slope: float = 1.0
    odd = True

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        square = self.slope**2
        return square * c, torch.full_like(c, square) if derivative else None


@dataclass(frozen=True)
class PiecewiseLinear(Dual):
    """g(z) = below z for z < 0, above z for z > 0: ReLU is (0, 1), the absolute value (-1, 1).

    Attributes:
        below, above: the slopes.
        at_zero: the derivative that PyTorch takes at 0, where units are that have no variance; None for `below`.
    """

    below: float = 0.0
    above: float = 1.0
    at_zero: float | None = None

    @property
    def _kink(self) -> float:
        return self.below if self.at_zero is None else self.at_zero

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        k, slope = self._by_angle(a, b, c, derivative)
        if slope is not None and (bool((a == 0).any()) or bool((b == 0).any())):
            half = self._kink * (self.below + self.above) / 2
            slope = torch.where((a == 0) ^ (b == 0), half, slope)
            slope = torch.where((a == 0) & (b == 0), self._kink**2, slope)
        return k, slope

    def _by_angle(self, a: Tensor, b: Tensor, c: Tensor, derivative: bool) -> tuple[Tensor, Tensor | None]:
        """By the angle t between u and v: E[relu relu] = (sqrt(ab - c^2) + (pi - t) c) / (2 pi)."""
        jump, product = (self.above - self.below) ** 2, self.below * self.above
        if torch.is_grad_enabled() and any(t.requires_grad for t in (a, b, c)):
            height = (a * b - c.square()).clamp_min(_TINY).sqrt()
            angle = (math.pi - torch.atan2(height, c)) * (jump / (2 * math.pi))
            k = height * (jump / (2 * math.pi)) + angle * c
            return (k + product * c if product else k), (angle + product if derivative else None)
        # two products rounded alike, so that an example and its copy have no angle; a fused one would leave 1e-8
        height = (a * b).sub_(c.square()).clamp_min_(0).sqrt_()
        angle = torch.atan2(height, c).mul_(-1 / (2 * math.pi)).add_(0.5)
        k = height.mul_(1 / (2 * math.pi)).addcmul_(angle, c)
        if jump != 1:
            k.mul_(jump)
        if product:
            k.add_(c, alpha=product)
        if derivative and jump != 1:
            angle.mul_(jump)
        return k, (angle.add_(product) if derivative and product else angle if derivative else None)

    def coincident(self, a: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        mean = (self.below**2 + self.above**2) / 2
        return mean * a, torch.where(a == 0, self._kink**2, mean).to(a) if derivative else None


@dataclass(frozen=True)
class Erf(Dual):
    """g(z) = erf(z)."""

    odd = True

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        product = (1 + 2 * a) * (1 + 2 * b)
        k = (2 / math.pi) * torch.asin(2 * c / product.sqrt())
        return k, (4 / math.pi) / (product - 4 * c.square()).sqrt() if derivative else None


@dataclass(frozen=True)
class GELU(Dual):
    """g(z) = z Phi(z), the exact form."""

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        inverses = 1 / (1 + a) + 1 / (1 + b)
        determinant = (1 + a) * (1 + b) - c.square()
        root = determinant.sqrt()
        quadrant = 0.25 + torch.atan2(c, root) / (2 * math.pi)
        k = c * quadrant + (root * (1 - inverses) + 1 / root) / (2 * math.pi)
        if not derivative:
            return k, None
        return k, quadrant + c / (2 * math.pi * root) * (inverses + 1 / determinant)


@dataclass(frozen=True)
class Sine(Dual):
    """g(z) = sin(z)."""

    odd = True

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        odd, even = _waves(a, b, c)
        return odd, even if derivative else None


def _waves(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-(a + b) / 2) times sinh(c) and cosh(c), without the overflow of either."""
    up, down = torch.exp(c - (a + b) / 2), torch.exp(-c - (a + b) / 2)
    return (up - down) / 2, (up + down) / 2


@dataclass(frozen=True)
class Exponential(Dual):
    """g(z) = exp(z)."""

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        k = torch.exp((a + b) / 2 + c)
        return k, k.clone() if derivative else None


@dataclass(frozen=True)
class Cosine(Dual):
    """g(z) = cos(z)."""

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        odd, even = _waves(a, b, c)
        return even, odd if derivative else None


@dataclass(frozen=True)
class Rescaled(Dual):
    """g(z) = outer * f(inner * z)."""

    function: Dual
    inner: float = 1.0
    outer: float = 1.0

    @property
    def odd(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the function itself."""
        return self.function.odd

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        square = self.inner**2
        k, slope = self.function(square * a, square * b, square * c, derivative=derivative)
        return self._scaled(k, slope)

    def coincident(self, a: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        k, slope = self.function.coincident(self.inner**2 * a, derivative=derivative)
        return self._scaled(k, slope)

    def _scaled(self, k: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor | None]:
        square = self.outer**2
        return square * k, None if slope is None else square * self.inner**2 * slope
