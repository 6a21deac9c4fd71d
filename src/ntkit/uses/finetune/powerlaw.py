"""How a loss falls with the number of examples: a + b n^-c."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar, nnls

from ntkit.errors import InputError

# Exponents that are looked at; square losses fall no faster than 1 / n where there is noise.
EXPONENTS = (0.02, 2.0)


@dataclass(frozen=True)
class PowerLaw:
    """loss(n) = floor + scale * n^-exponent.

    Attributes:
        floor: loss of endless data, >= 0.
        scale: >= 0.
        exponent: how fast it gets there.
        misfit: root mean square of the relative residuals of the points that it was fitted to.
    """

    floor: float
    scale: float
    exponent: float
    misfit: float

    def at(self, n: float) -> float:
        """The loss of n examples."""
        return self.floor + self.scale * float(n) ** -self.exponent

    @classmethod
    def fit(cls, sizes: Sequence[int], losses: Sequence[float]) -> PowerLaw:
        """The law with the least relative residuals; for each exponent floor and scale follow by least squares.

        Raises:
            InputError: if there are fewer than three different sizes, or a loss is not positive and finite.
        """
        n, y = np.asarray(sizes, dtype=float), np.asarray(losses, dtype=float)
        if n.shape != y.shape or len(np.unique(n)) < 3 or not (n > 0).all():
            raise InputError(f"a power law needs losses at three different sizes or more: got sizes {list(sizes)}")
        if not (np.isfinite(y) & (y > 0)).all():
            raise InputError(f"losses are positive and finite: got {list(losses)}")
        unit = float(np.exp(np.log(n).mean()))  # both columns of the size of 1

        def solved(exponent: float) -> tuple[np.ndarray, float]:
            columns = np.stack([1 / y, (n / unit) ** -exponent / y], axis=1)
            return nnls(columns, np.ones(len(y)))

        grid = np.linspace(*EXPONENTS, 60)
        start = grid[int(np.argmin([solved(c)[1] for c in grid]))]
        width = grid[1] - grid[0]
        bounds = (max(EXPONENTS[0], start - width), min(EXPONENTS[1], start + width))
        found = minimize_scalar(lambda c: solved(c)[1], bounds=bounds, method="bounded", options={"xatol": 1e-8})
        exponent = float(found.x)  # pyright: ignore[reportAttributeAccessIssue]
        (floor, scale), residual = solved(exponent)
        return cls(float(floor), float(scale * unit**exponent), exponent, float(residual) / len(y) ** 0.5)
