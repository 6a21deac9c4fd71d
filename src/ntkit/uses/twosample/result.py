"""What a test has found: the statistic with everything that says how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from scipy.stats import norm
from torch import Tensor

from ntkit.errors import InputError
from ntkit.uses.twosample.relabelling import ROUNDING
from ntkit.uses.twosample.samples import check_level


@dataclass(frozen=True)
class Power:
    """How often a test of this size would reject, as it looks from one result.

    Attributes:
        value: at the difference that was seen.
        low: if the difference is smaller by one standard error.
        high: if it is larger by one.
        level: of the test.
    """

    value: float
    low: float
    high: float
    level: float

    def __str__(self) -> str:
        """One sentence."""
        return f"power {self.value:.2f} ({self.low:.2f} to {self.high:.2f}) at level {self.level:g}"


@dataclass(frozen=True)
class Spread:
    """How the statistic would vary from sample to sample.

    Attributes:
        linear: part of its variance that falls as 1/n.
        quadratic: part that falls as 1/n^2.
        rate: power of 1/n with which the null shrinks.
        centre: what the null shrinks towards.
        bias: part of the statistic that is there without any difference, and shrinks as the null does.
    """

    linear: float
    quadratic: float = 0.0
    rate: float = 0.5
    centre: float = 0.0
    bias: float = 0.0


@dataclass(frozen=True)
class TestResult:
    """A test by permutations, as SciPy gives one.

    Attributes:
        statistic: large where the samples differ, or depend on each other.
        pvalue: (1 + #{null >= statistic}) / (B + 1), or what `name` says.
        null: statistics of the relabelings, (B,).
        name: of the test.
        sizes: how many examples of each sample it used, or how many pairs.
        witness: for each of these examples how much it looks like one of the first sample, or None.
        numbers: which examples of the pooled sample the witness values belong to; None for all, in order.
        spread: of the statistic, or None where it is not known.
    """

    __test__ = False  # pytest takes a class of this name for one of its own

    statistic: float
    pvalue: float
    null: Tensor = field(repr=False)
    name: str
    sizes: tuple[int, ...]
    witness: Tensor | None = field(default=None, repr=False)
    numbers: Tensor | None = field(default=None, repr=False)
    spread: Spread | None = None

    def threshold(self, level: float = 0.05) -> float:
        """The statistic must be larger than this for a p-value of at most `level`; infinite for too few permutations.

        Raises:
            InputError: if the level is not between 0 and 1.
        """
        check_level(level)
        above = math.floor(level * (len(self.null) + 1) + 1e-9) - 1
        return math.inf if above < 0 else float(self.null.sort(descending=True).values[above])

    def rejected(self, level: float = 0.05) -> bool:
        """Whether the p-value is at most `level`.

        Raises:
            InputError: if the level is not between 0 and 1.
        """
        check_level(level)
        return self.pvalue <= level

    def power(self, level: float = 0.05, *, factor: float = 1.0) -> Power:
        """Power of the test, by the normal approximation around the difference that was seen.

        It is a look from one pair of samples: `low` and `high` say how little that may be. Sizes are planned with
        `factor`, and levels with `power_curve`.

        Args:
            level: of the test.
            factor: for so many times the samples.

        Raises:
            InputError: if the level is not between 0 and 1, `factor` is not positive, or the test knows no spread.
        """
        if self.spread is None:
            raise InputError(f"{self.name} does not know how its statistic varies: simulate with power_curve")
        if not factor > 0:
            raise InputError(f"samples are a positive number of times as large: got factor={factor!r}")
        centre, shrunk = self.spread.centre, factor**-self.spread.rate
        threshold = centre + (self.threshold(level) - centre) * shrunk
        seen = self.statistic - self.spread.bias * (1 - shrunk)
        deviation = math.sqrt(self.spread.linear / factor + self.spread.quadratic / factor**2)
        error = math.sqrt(self.spread.linear + self.spread.quadratic)

        def at(difference: float) -> float:
            if deviation == 0:
                return float(difference > threshold + ROUNDING * abs(threshold))
            return float(norm.cdf((difference - threshold) / deviation))

        return Power(at(seen), at(seen - error), at(seen + error), level)

    def __str__(self) -> str:
        """One sentence."""
        what = "pairs" if len(self.sizes) == 1 else "examples"
        of = " and ".join(map(str, self.sizes))
        number = f"{self.statistic:.4g}, p = {self.pvalue:.3g}"
        return f"{self.name} of {of} {what}: {number} ({len(self.null)} permutations)"
