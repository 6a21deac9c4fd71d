"""Whether a network is right as often as it says: the reliability table and its expected calibration error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.uses.distill.simplex import class_numbers, points_of_simplex


@dataclass(frozen=True)
class Bins(ABC):
    """How examples are put together by their confidence.

    Attributes:
        count: of bins, at most.
    """

    count: int = 15

    def __post_init__(self) -> None:
        """Check the count.

        Raises:
            InputError: if there is none.
        """
        if self.count < 1:
            raise InputError(f"count: got {self.count}, expected 1 bin or more")

    @abstractmethod
    def edges(self, confidence: Tensor) -> Tensor:
        """Upper ends of all bins but the last, ascending; a bin has its upper end and not its lower one."""


class EqualWidth(Bins):
    """]0, 1/m], ]1/m, 2/m], ... (Naeini et al. 2015; Guo et al. 2017)."""

    def edges(self, confidence: Tensor) -> Tensor:  # noqa: D102
        return torch.arange(1, self.count, dtype=torch.float64) / self.count


class EqualMass(Bins):
    """As many examples in each bin as in the others, up to one, except that equal confidences stay together."""

    def edges(self, confidence: Tensor) -> Tensor:  # noqa: D102
        ordered, n = confidence.sort().values, len(confidence)
        last = torch.arange(1, self.count) * n // self.count - 1
        return ordered[last[last >= 0]].unique()


@dataclass(frozen=True, eq=False)
class Reliability:
    """One row for each bin that has examples, ascending in confidence.

    Attributes:
        counts: examples, (b,).
        confidence: mean probability of the class that was said, (b,).
        accuracy: share of those that were right, (b,).
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error: sum of counts / n * |accuracy - confidence|."""
        return float((self.counts * (self.accuracy - self.confidence).abs()).sum() / self.counts.sum())

    @property
    def largest(self) -> float:
        """The largest |accuracy - confidence| of a bin (maximum calibration error)."""
        return float((self.accuracy - self.confidence).abs().max())

    def __str__(self) -> str:
        rows = zip(self.counts.tolist(), self.confidence.tolist(), self.accuracy.tolist(), strict=True)
        lines = [f"{int(n):9d} {said:11.3f} {right:9.3f}" for n, said, right in rows]
        return "\n".join([" examples  confidence  accuracy", *lines, f"ECE {self.ece:.4f}"])


def reliability(probabilities: Any, labels: Any, bins: Bins | None = None) -> Reliability:
    """Confidence beside accuracy.

    The error is not zero for a calibrated network and few examples: with n examples in a bin its accuracy has a
    deviation of up to 1 / (2 sqrt(n)), of which the absolute value is taken. Compare at equal n and bins.

    Args:
        probabilities: (N, C).
        labels: (N,) classes.
        bins: EqualWidth(15) by default. The public code of Filter-KD has 10, its toy study 3.

    Raises:
        InputError: if these are no probabilities, or there are not as many labels.
    """
    p = points_of_simplex(probabilities)
    y = class_numbers(labels, p.shape[1]).to(p.device)
    if len(y) != len(p):
        raise InputError(f"labels: got {len(y)}, expected one for each of the {len(p)} rows of probabilities")
    said, classes = p.double().max(1)
    right = (classes == y).double()
    edges = (EqualWidth() if bins is None else bins).edges(said).to(said)
    place = torch.bucketize(said, edges)  # the first bin whose upper end is not below
    counts, confidence, accuracy = (
        torch.zeros(len(edges) + 1, dtype=torch.float64, device=p.device).index_add_(0, place, values)
        for values in (torch.ones_like(said), said, right)
    )
    used = counts > 0
    return Reliability(counts[used], confidence[used] / counts[used], accuracy[used] / counts[used])
