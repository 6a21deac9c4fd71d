"""Moments of any elementwise function, by its Hermite series.

With normalised Hermite polynomials h_k and g_k(a) = E[g(sqrt(a) u) h_k(u)] for standard normal u,

    E[g(u) g(v)]   = sum_k g_k(a) g_k(b) rho^k,                          rho = c / sqrt(a b)
    E[g'(u) g'(v)] = sum_k k g_k(a) g_k(b) rho^(k - 1) / sqrt(a b)

The coefficients are one-dimensional Gaussian integrals for each example, not two-dimensional ones for each pair. They
are taken by the trapezoidal rule, which converges as fast as Gauss-Hermite quadrature for smooth functions and does not
thin out where functions are steep. What the terms that are kept miss is known from Parseval's identity, and said where
it matters: functions with kinks converge slowly for nearly equal inputs, their derivatives more slowly still, and
functions with jumps have no tangent kernel.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ntkit.errors import FidelityWarning, ModelError
from ntkit.kernel.infinite.duals import Dual
from ntkit.tangent.identity import digest

REACH, STEP = 10.0, 0.05  # of the rule, in standard deviations
TERMS = 192
# Relative error of a moment from which on it is said, and from which on there is no sense in the number.
TOLERANCE, SENSELESS = 1e-7, 0.1
_TINY = 1e-200  # whose root is still a number that another one can be divided by
# Variance as which smaller ones count in the series, whose derivatives are differences: below, they would be rounding.
_SMALL = 1e-12


@dataclass(frozen=True)
class HermiteSeries(Dual):
    """The moments of `function`, which acts on each entry of a tensor by itself.

    Attributes:
        function: g.
        name: as it is called in messages.
    """

    function: Callable[[Tensor], Tensor] = field(repr=False)
    name: str

    def __repr__(self) -> str:
        """By its name, and by its values: what a matrix on disk depends on."""
        values = self.function(torch.linspace(-REACH, REACH, 1001, dtype=torch.float64))
        return f"HermiteSeries({self.name}, {digest([values])[:16]})"

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:
        """Horner's scheme over the terms. Cost: 2 operations per term and entry, 4 with the derivative."""
        left, right = self._coefficients(a), self._coefficients(b)
        size = max(_needed(left), _needed(right))
        scale = a.clamp_min(_SMALL).sqrt() * b.clamp_min(_SMALL).sqrt()
        rho = (c / scale).clamp(-1, 1)
        k, slope = torch.zeros_like(rho), torch.zeros_like(rho)
        for number in reversed(range(size)):
            term = left[..., number] * right[..., number]
            k = torch.addcmul(term, k, rho)
            if derivative and number:
                slope = torch.addcmul(number * term, slope, rho)
        return k, slope / scale if derivative else None

    def coincident(self, a: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:
        """By integrals of g^2 and g'^2, so that no terms are cut off."""
        nodes, weights, _ = _rule(a.device)
        z = a.clamp_min(_TINY).sqrt()[..., None] * nodes
        values, slopes = torch.func.jvp(self.function, (z,), (torch.ones_like(z),))  # pyright: ignore[reportAssignmentType]
        return values.square() @ weights, slopes.square() @ weights if derivative else None

    def _coefficients(self, a: Tensor) -> Tensor:
        """g_k(a) for k below TERMS, on a last axis."""
        nodes, _, weighted = _rule(a.device)
        return self.function(a.clamp_min(_SMALL).sqrt()[..., None] * nodes) @ weighted

    @torch.no_grad()
    def check(self, a: Tensor, *, derivative: bool) -> None:
        """Compare moments with the sums of their terms, with the same rule at every other node, and look at its ends.

        Raises:
            ModelError: if the function is not finite, its series does not come near, or it grows past the rule.
        """
        a = a.detach().reshape(-1)
        # some of them, and the extremes, where functions that grow or turn fast are at their worst
        a = torch.cat([a[:: max(1, a.numel() // 64)], a.min()[None], a.max()[None]]).clamp_min(_SMALL)
        nodes, weights, _ = _rule(a.device)
        z = a.sqrt()[:, None] * nodes
        values, slopes = torch.func.jvp(self.function, (z,), (torch.ones_like(z),))  # pyright: ignore[reportAssignmentType]
        terms = self._coefficients(a).square()
        error, outside = _misfit(values.square(), weights, terms.sum(-1)), _outside(values.square(), weights)
        if derivative:
            orders = torch.arange(TERMS, dtype=a.dtype, device=a.device)
            error = max(error, _misfit(slopes.square(), weights, terms @ orders / a))
            outside = max(outside, _outside(slopes.square(), weights))
        if math.isfinite(error) and outside > TOLERANCE:
            far = REACH * float(a.max().sqrt())
            grows = (
                f"{self.name} grows so fast that units more than {REACH:g} standard deviations ({far:.3g}) from zero, "
                f"which are left out, would add about {outside:.1e} of itself to a moment"
            )
            if outside > SENSELESS:
                raise ModelError(f"{grows}: smaller weights (weight_std), or a function that grows more slowly")
            warnings.warn(grows, FidelityWarning, stacklevel=2)
        if not math.isfinite(error):
            raise ModelError(f"{self.name} is not finite for all units of a layer: it has no infinite-width limit here")
        if error > SENSELESS:
            raise ModelError(
                f"the Hermite series of {self.name} is off by {error:.0%} after {TERMS} terms: it jumps, or has "
                "moments that are infinite"
            )
        if error > max(TOLERANCE, outside):  # the larger of the two is said
            warnings.warn(
                f"{self.name} has no closed form here, and {TERMS} terms of its Hermite series leave a relative error "
                f"of about {error:.1e} for nearly equal inputs, far less for others",
                FidelityWarning,
                stacklevel=2,
            )


def _misfit(squares: Tensor, weights: Tensor, series: Tensor) -> float:
    """Relative error of a second moment: of its series, and of the rule, (n, nodes) and (n,)."""
    exact = squares @ weights
    coarse = 2 * squares[:, ::2] @ weights[::2]
    largest = torch.stack([exact, coarse, series]).amax(0).clamp_min(_TINY)
    error = torch.maximum((exact - series).abs(), (exact - coarse).abs()) / largest
    return float(error.max()) if bool(error.isfinite().all()) else math.nan


def _outside(squares: Tensor, weights: Tensor) -> float:
    """Part of a second moment that the rule's ends cut off: the integrand there, as if it went on for one deviation.

    What it is worth where it matters: of exp(6 u) all but a fortieth is beyond ten deviations, and both comparisons of
    `_misfit`, which end where the rule does, see nothing.
    """
    ends = squares[:, [0, -1]] @ weights[[0, -1]] / STEP
    part = ends / (squares @ weights).clamp_min(_TINY)
    return float(part.max()) if bool(part.isfinite().all()) else math.nan


def _needed(coefficients: Tensor) -> int:
    """Terms up to the last that is more than rounding."""
    size = coefficients.detach().abs().reshape(-1, TERMS).amax(0)
    size = size * torch.arange(TERMS, device=size.device).clamp_min(1).sqrt()
    kept = (size > 1e-9 * size.max()).nonzero()  # they enter as products of two
    return int(kept[-1]) + 1 if len(kept) else 1


@functools.lru_cache(maxsize=4)
def _rule(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights for a standard normal number, and weights times h_k(nodes), (nodes, TERMS)."""
    half = round(REACH / STEP)
    nodes = torch.arange(-half, half + 1, dtype=torch.float64) * STEP
    weights = torch.exp(-nodes.square() / 2) * (STEP / math.sqrt(2 * math.pi))
    polynomials = [torch.ones_like(nodes), nodes]
    for k in range(1, TERMS - 1):
        polynomials.append((nodes * polynomials[k] - math.sqrt(k) * polynomials[k - 1]) / math.sqrt(k + 1))
    weighted = weights[:, None] * torch.stack(polynomials, 1)
    return nodes.to(device), weights.to(device), weighted.to(device)
