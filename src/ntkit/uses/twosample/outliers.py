"""Outliers: examples that are not like those of a reference sample, as a kernel sees it.

score(x) = -(1/n) sum_i k(x, x_i) / sqrt(k(x, x) k(x_i, x_i))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.explicit import FeatureFunction
from ntkit.kernel.function import KernelFunction
from ntkit.uses.twosample.pool import feature_rows, finite
from ntkit.uses.twosample.relabelling import ROUNDING
from ntkit.uses.twosample.samples import check_level, checked, halves, pooled

if TYPE_CHECKING:
    from ntkit.tangent.examples import Examples


@dataclass(frozen=True)
class Outliers:
    """Scores of examples, and how unusual these are.

    Attributes:
        scores: (N,), between -1 and 1; large for outliers.
        pvalues: (N,), the rank among the scores of reference examples that were set apart.
        calibration: those scores, (n,).
    """

    scores: Tensor = field(repr=False)
    pvalues: Tensor = field(repr=False)
    calibration: Tensor = field(repr=False)

    def flagged(self, level: float = 0.05) -> Tensor:
        """Which examples have a p-value of at most `level`, (N,): so many of 100 that belong are flagged.

        Raises:
            InputError: if the level is not between 0 and 1.
        """
        check_level(level)
        return self.pvalues <= level

    def discovered(self, rate: float = 0.1) -> Tensor:
        """Which examples to call outliers so that at most this part of them belong, on average, (N,).

        Benjamini and Hochberg's procedure, which holds for p-values of one calibration sample (Bates et al. 2023).

        Raises:
            InputError: if the rate is not between 0 and 1.
        """
        check_level(rate)
        values, order = self.pvalues.sort()
        allowed = rate * torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
        last = int(torch.nonzero(values <= allowed + 1e-12).max()) + 1 if bool((values <= allowed + 1e-12).any()) else 0
        found = torch.zeros(len(values), dtype=torch.bool)
        found[order[:last]] = True
        return found

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"{int(self.flagged().sum())} of {len(self.scores)} examples have p <= 0.05 (expected "
            f"{0.05 * len(self.scores):.1f} if all belong), by {len(self.calibration)} calibration scores"
        )


def outlier_scores(x: Any, reference: Any, *, kernel: KernelFunction) -> Tensor:
    """Minus the mean cosine between an example and a reference sample, (N,), larger for outliers.

    Cost: N n values of the kernel, or (N + n) D with features.

    Args:
        x: N examples.
        reference: n examples of the same shape.
        kernel: a `KernelFunction`, with features or without.

    Raises:
        InputError: if samples do not fit each other or the kernel, or an example has k(x, x) = 0.
    """
    ours, theirs = checked(x, "x", least=1), checked(reference, "reference", least=1)
    pooled(ours, theirs)
    return _scores(ours, theirs, kernel)


def outlier_test(
    x: Any,
    reference: Any,
    *,
    kernel: KernelFunction,
    calibration_share: float = 0.5,
    generator: torch.Generator,
) -> Outliers:
    """Score examples against a reference sample, with p-values that need no permutations.

    The reference sample is cut at random: one part is compared with, the scores of the other are ranked among. The
    p-value (1 + #{calibration >= score}) / (n + 1) is at most u with no more than probability u, for every example that
    comes from the distribution of the reference (conformal prediction; Bates et al. 2023).

    Args:
        x: N examples.
        reference: examples of the same shape that belong.
        kernel: as in `outlier_scores`.
        calibration_share: part of the reference that is set apart for ranking. n of them allow p-values down to
            1 / (n + 1).
        generator: cuts the reference.

    Raises:
        InputError: see `outlier_scores`, or if the share leaves too few examples.
    """
    ours, theirs = checked(x, "x", least=1), checked(reference, "reference", least=4)
    pooled(ours, theirs)
    apart, kept = halves(len(theirs), calibration_share, generator)
    base = checked(theirs.pick(kept), "reference", least=1)
    calibration = _scores(checked(theirs.pick(apart), "reference", least=1), base, kernel)
    scores = _scores(ours, base, kernel)
    # scores are cosines: those of equal examples may differ by rounding, and are ties
    above = len(calibration) - torch.searchsorted(calibration.sort().values, scores - ROUNDING, side="left")
    return Outliers(scores, (1 + above).double() / (len(calibration) + 1), calibration)


def _scores(x: Examples, reference: Examples, source: KernelFunction) -> Tensor:
    if isinstance(source, FeatureFunction):
        ours, theirs = (feature_rows(source, part) for part in (x, reference))
        mean = (theirs / _roots(theirs.square().sum(1)).to(theirs)[:, None]).mean(0)
        return -(ours @ mean).cpu() / _roots(ours.square().sum(1))
    if not isinstance(source, KernelFunction):
        raise InputError(f"kernel is a KernelFunction such as RBF() or Features(map): got {type(source).__name__}")
    kernel = source(x.data, reference.data)
    if kernel.shape != (len(x), len(reference)):
        raise InputError(
            f"a score needs one kernel value for each pair of {len(x)} and {len(reference)} examples: got a matrix of "
            f"shape {kernel.shape}. Take SumOfLogits() as read-out, or Empirical(..., trace=True)"
        )
    own, theirs = (_roots(source.diagonal(part.data)) for part in (x, reference))
    return -finite((kernel @ theirs.reciprocal().to(kernel.device)).detach().double().cpu()) / own / len(reference)


def _roots(diagonal: Tensor) -> Tensor:
    """Lengths of examples in the feature space.

    Raises:
        InputError: if one has none.
    """
    found = finite(diagonal.detach().double().cpu())
    if not bool((found > 0).all()):
        number = int((found <= 0).nonzero()[0])
        raise InputError(
            f"an example has k(x, x) = {float(found[number]):g}, so that it has no direction: leave it out"
        )
    return found.sqrt()
