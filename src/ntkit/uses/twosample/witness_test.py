"""`witness_test`: a function is trained on one half of two samples and looked at on the other, as NTK-MMD does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ntkit.errors import InputError
from ntkit.uses.twosample.relabelling import differences, permutation_pvalue, relabelings
from ntkit.uses.twosample.result import Spread, TestResult
from ntkit.uses.twosample.samples import check_permutations, checked, halves, pooled
from ntkit.uses.twosample.witnesses import Witness

if TYPE_CHECKING:
    from torch import Tensor


def witness_test(
    x: Any,
    y: Any,
    *,
    witness: Witness,
    train_share: float = 0.5,
    permutations: int = 1000,
    generator: torch.Generator,
) -> TestResult:
    """Test whether two samples come from one distribution by the mean of a witness function, in linear time.

    Each sample is cut at random. On the first parts the witness is trained; the statistic is its mean on the rest of x
    minus that on the rest of y. Only the labels of the rest are permuted: the p-value is exact, whatever the witness.

    Args:
        x: n examples: a tensor, a tuple or dict of tensors, or a `Dataset`.
        y: m examples of the same shape.
        witness: `ZeroTime(model)` or `OnlineTraining(model)` for NTK-MMD, `KernelWitness(kernel)` for any kernel.
        train_share: part of each sample that the witness is trained on.
        permutations: B. The smallest p-value is 1 / (B + 1).
        generator: cuts the samples, shuffles the training, draws the relabelings.

    Returns:
        Witness values of the examples that were not trained on; `numbers` says which of the pooled sample these are.
        Its `power` is that of this witness; another cut and another training would give another one.

    Raises:
        InputError: if the samples are too small, differ in shape or are not finite, or an argument cannot be used;
            nothing has been trained then.
        ModelError: if the network cannot be linearized as it stands, or training diverges.
    """
    check_permutations(permutations)
    if not isinstance(witness, Witness):
        raise InputError(f"witness is ZeroTime(model), OnlineTraining(model) or KernelWitness(kernel): got {witness!r}")
    ours, theirs = checked(x, "x", least=4), checked(y, "y", least=4)
    (x_train, x_rest), (y_train, y_rest) = (halves(len(part), train_share, generator) for part in (ours, theirs))
    together = pooled(ours, theirs)
    train = x_train + [len(ours) + i for i in y_train]
    rest = x_rest + [len(ours) + i for i in y_rest]
    signs = torch.ones(len(train), dtype=torch.float64)
    signs[len(x_train) :] = -len(x_train) / len(y_train)
    values = witness(together, signs, train, rest, generator)
    return compared(values, len(x_rest), witness.name, rest, permutations, generator)


def compared(
    values: Tensor, n: int, name: str, numbers: list[int], permutations: int, generator: torch.Generator
) -> TestResult:
    """The test of values whose first n are those of x."""
    m = len(values) - n
    means = differences(values, n, relabelings(n, m, permutations, generator))
    spread = Spread(float(values[:n].var()) / n + float(values[n:].var()) / m)
    first, null = float(means[0]), means[1:]
    return TestResult(first, permutation_pvalue(first, null), null, name, (n, m), values, torch.tensor(numbers), spread)
