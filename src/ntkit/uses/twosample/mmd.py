"""`two_sample_test`: do two samples come from one distribution?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ntkit.errors import InputError
from ntkit.uses.twosample.pool import pool
from ntkit.uses.twosample.relabelling import permutation_pvalue
from ntkit.uses.twosample.result import TestResult
from ntkit.uses.twosample.samples import check_permutations, checked, pooled
from ntkit.uses.twosample.statistics import Statistic, Unbiased

if TYPE_CHECKING:
    import torch

    from ntkit.kernel.base import Kernel
    from ntkit.kernel.function import KernelFunction


def two_sample_test(
    x: Any,
    y: Any,
    *,
    kernel: KernelFunction | Kernel,
    statistic: Statistic | None = None,
    permutations: int = 1000,
    generator: torch.Generator,
    memory: int | None = None,
) -> TestResult:
    """Test with the maximum mean discrepancy whether two samples come from one distribution.

    The p-value is exact at every level for exchangeable examples: the statistic is compared with that of random
    relabelings, all of which are multiplied with the kernel at once.

    Args:
        x: n examples: a tensor, a tuple or dict of tensors, or a `Dataset`.
        y: m examples of the same shape.
        kernel: a `KernelFunction` such as `RBF()` or `Empirical(tangent)`; one with features, `Features(map)` or
            `Sketched(...)`, costs no more than (n + m) D B; or a finished `Kernel` of the pooled sample (x first),
            stored or not.
        statistic: `Unbiased()` by default; `Block(size)` and `Linear()` are faster and find less.
        permutations: B. The smallest p-value is 1 / (B + 1).
        generator: draws the relabelings.
        memory: bytes of working space; an eighth of the machine's by default. Beside it relabelings are kept, a byte
            for each example and permutation (two, and 200 MB, while they are drawn).

    Returns:
        With `Unbiased()` every example has a witness value.

    Raises:
        InputError: if the samples are too small, differ in shape or are not finite, or an argument cannot be used;
            nothing has been computed then.
    """
    check_permutations(permutations)
    statistic = Unbiased() if statistic is None else statistic
    if not isinstance(statistic, Statistic):
        raise InputError(f"statistic is Unbiased(), Block(size) or Linear(): got {statistic!r}")
    ours, theirs = checked(x, "x", least=2), checked(y, "y", least=2)
    statistic.check(len(ours), len(theirs))
    together = pooled(ours, theirs)
    found = statistic(pool(kernel, together, memory), len(ours), permutations, generator)
    first, null = float(found.values[0]), found.values[1:]
    return TestResult(
        first, permutation_pvalue(first, null), null, statistic.name, found.sizes, found.witness, None, found.spread
    )
