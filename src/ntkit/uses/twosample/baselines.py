"""What a kernel of a network has to be better than: the median-bandwidth RBF kernel, and a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.closed import RBF
from ntkit.uses.twosample.mmd import two_sample_test
from ntkit.uses.twosample.relabelling import permutation_pvalue
from ntkit.uses.twosample.result import Spread, TestResult
from ntkit.uses.twosample.samples import check_permutations, checked, halves, pooled
from ntkit.uses.twosample.witness_test import compared

if TYPE_CHECKING:
    import numpy as np
    from sklearn.base import BaseEstimator

    from ntkit.uses.twosample.statistics import Statistic

ACCURACY = "accuracy of a classifier"


def rbf_test(
    x: Tensor,
    y: Tensor,
    *,
    statistic: Statistic | None = None,
    permutations: int = 1000,
    generator: torch.Generator,
    memory: int | None = None,
) -> TestResult:
    """`two_sample_test` with the Gaussian kernel whose bandwidth is the median distance in the pooled sample.

    Args:
        x: n examples.
        y: m examples of the same shape.
        statistic: as in `two_sample_test`.
        permutations: B.
        generator: draws the relabelings, and for large samples those that the median is taken of.
        memory: bytes of working space.

    Raises:
        InputError: if a sample cannot be used; nothing has been computed then.
    """
    check_permutations(permutations)
    together = pooled(checked(x, "x", least=2), checked(y, "y", least=2))
    if not isinstance(together.data, Tensor) or not together.data.is_floating_point():
        raise InputError("an RBF kernel takes floating point tensors (N, ...): of other data give features of them")
    kernel = RBF.median(together.data, generator=generator)
    return two_sample_test(
        x, y, kernel=kernel, statistic=statistic, permutations=permutations, generator=generator, memory=memory
    )


def classifier_test(
    x: Tensor,
    y: Tensor,
    *,
    classifier: BaseEstimator | Any | None = None,
    train_share: float = 0.5,
    permutations: int = 1000,
    generator: torch.Generator,
) -> TestResult:
    """Test whether a classifier that has learned to tell half of two samples apart can tell the other half apart.

    Lopez-Paz and Oquab 2017. The statistic is the accuracy on the other half, the mean of those on x and on y. Its
    p-value comes from permutations of the labels there; `binomial_pvalue` gives the usual one.

    Args:
        x: n examples.
        y: m examples of the same shape.
        classifier: any scikit-learn classifier; a copy is fitted. By default logistic regression on standardised
            numbers.
        train_share: part of each sample that is learned from.
        permutations: B.
        generator: cuts the samples, draws the relabelings.

    Returns:
        The witness is 1 where the classifier says x, and 0 where it says y.

    Raises:
        InputError: if a sample cannot be used; nothing has been computed then.
    """
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_permutations(permutations)
    ours, theirs = checked(x, "x", least=4), checked(y, "y", least=4)
    together = pooled(ours, theirs)
    if not isinstance(together.data, Tensor):
        raise InputError("a classifier takes tensors (N, ...): of other data give features of them")
    (x_train, x_rest), (y_train, y_rest) = (halves(len(part), train_share, generator) for part in (ours, theirs))
    if classifier is None:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    model: Any = clone(classifier)
    n = len(ours)
    model.fit(_rows(together.data, x_train + [n + i for i in y_train]), [1] * len(x_train) + [0] * len(y_train))
    rest = x_rest + [n + i for i in y_rest]
    said = torch.as_tensor(model.predict(_rows(together.data, rest))).double()
    found = compared(said, len(x_rest), "classifier", rest, permutations, generator)
    # accuracy = (share of x called x + share of y called y) / 2
    statistic, null = (1 + found.statistic) / 2, (1 + found.null) / 2
    spread = None if found.spread is None else Spread(found.spread.linear / 4, centre=0.5)
    return TestResult(
        statistic, permutation_pvalue(statistic, null), null, ACCURACY, found.sizes, found.witness,
        found.numbers, spread,
    )  # fmt: skip


def binomial_pvalue(result: TestResult) -> float:
    """The p-value of a `classifier_test` if each held-out example were a toss of a fair coin.

    Raises:
        InputError: if it is the result of another test, or the two samples are not equally large: guessing the larger
            one is right more often then.
    """
    if result.name != ACCURACY:
        raise InputError(f"the binomial p-value is for a result of classifier_test: got one of {result.name}")
    n, m = result.sizes
    if n != m:
        raise InputError(f"the binomial p-value is for samples of one size: got {n} and {m}; take result.pvalue")
    return float(binomtest(round(result.statistic * (n + m)), n + m, 0.5, alternative="greater").pvalue)


def _rows(data: Tensor, numbers: list[int]) -> np.ndarray:
    return data[numbers].flatten(1).double().cpu().numpy()
