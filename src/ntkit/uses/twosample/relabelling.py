"""Relabelings of a pooled sample, and p-values from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import strips

# Numbers that are drawn and sorted together, 24 bytes each: 200 MB.
TOGETHER = 2**23
# Of the largest statistic: sums in another order may differ by so much and are ties nevertheless.
ROUNDING = 1e-9


def relabelings(n: int, m: int, permutations: int, generator: torch.Generator) -> Tensor:
    """Who counts as x, (n+m, 1+permutations) of booleans: first as it is, then at random.

    Memory: two bytes each at the peak, one of which stays.
    """
    labels = torch.zeros(n + m, 1 + permutations, dtype=torch.bool)
    labels[:n, 0] = True
    labels[:, 1:] = choices(1, n, m, permutations, generator)[0].T
    return labels


def choices(groups: int, n: int, m: int, permutations: int, generator: torch.Generator) -> Tensor:
    """Random choices of n out of n+m, (groups, permutations, n+m) of booleans. Memory: a byte each, and 200 MB."""
    found = torch.zeros(groups * permutations, n + m, dtype=torch.bool)
    for some in strips(len(found), max(1, TOGETHER // (n + m))):
        numbers = torch.rand(
            some.stop - some.start, n + m, generator=generator, device=generator.device, dtype=torch.float64
        )
        found[some].scatter_(1, numbers.argsort(1)[:, :n].cpu(), True)
    return found.reshape(groups, permutations, n + m)


def permutation_pvalue(statistic: float, null: Tensor) -> float:
    """(1 + #{null >= statistic}) / (B + 1): never 0, and at most the level with no more than that probability.

    Raises:
        InputError: if a statistic is NaN or infinite, which compares as smaller than nothing.
    """
    if not (math.isfinite(statistic) and bool(null.isfinite().all())):
        raise InputError(
            "the statistic is NaN or infinite: look for NaN among the examples, or make them smaller (numbers of order "
            "one)"
        )
    tie = ROUNDING * max(abs(statistic), float(null.abs().max()))
    return (1 + int((null >= statistic - tie).sum())) / (len(null) + 1)


def differences(values: Tensor, n: int, labels: Tensor) -> Tensor:
    """Mean of x minus mean of y for every relabeling, (1+B,): one product of the values (N,) with the labels."""
    chosen = values @ labels.to(values)
    return chosen / n - (values.sum() - chosen) / (len(values) - n)
