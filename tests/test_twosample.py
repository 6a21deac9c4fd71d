"""Two-sample tests against double loops over their definitions; laws; levels under the null."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ntkit.errors import InputError
from ntkit.kernel.base import DenseKernel, Kernel
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.explicit import Features, Sketched
from ntkit.kernel.function import Empirical, KernelFunction
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, SumOfLogits
from ntkit.uses import twosample
from ntkit.uses.twosample import relabelling, statistics
from ntkit.uses.twosample.relabelling import choices, permutation_pvalue, relabelings
from ntkit.uses.twosample.result import Spread

KERNEL = DotProduct(offset=0.5, degree=2, scale=0.3)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=drawn(seed), dtype=torch.float64)


def quadratic(x: Tensor) -> Tensor:
    """Features of KERNEL in three dimensions, from the binomial formula."""
    squares = torch.einsum("ni,nj->nij", x, x).flatten(1) * 0.3
    return torch.cat([squares, math.sqrt(2 * 0.3 * 0.5) * x, torch.full((len(x), 1), 0.5).to(x)], 1)


def k(a: Tensor, b: Tensor) -> float:
    return (0.3 * float(a @ b) + 0.5) ** 2


def mmd(xs: list[Tensor], ys: list[Tensor]) -> float:
    """The unbiased estimate, term by term."""
    n, m = len(xs), len(ys)
    xx = sum(k(xs[i], xs[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(ys[i], ys[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in xs for b in ys) / (n * m)


# ---------------------------------------------------------------- relabelings and p-values


def test_relabelings_are_uniform_choices() -> None:
    """Each of the ten pairs out of five is chosen equally often; the first column is the sample as it is."""
    labels = relabelings(2, 3, 5000, drawn(0))
    assert labels[:, 0].tolist() == [True, True, False, False, False]
    assert labels.sum(0).eq(2).all()
    codes, counts = labels[:, 1:].T.double().unique(dim=0, return_counts=True)
    assert len(codes) == 10
    assert float(((counts - 500) ** 2 / 500).sum()) < 27.9  # chi^2 with 9 degrees of freedom, p = 0.001


def test_choices_do_not_depend_on_how_many_are_drawn_at_once() -> None:
    together, generator = choices(6, 2, 3, 50, drawn(1)), drawn(1)
    apart = torch.cat([choices(some, 2, 3, 50, generator) for some in (1, 3, 2)])
    assert torch.equal(together, apart)


def test_choices_are_drawn_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting takes 24 bytes for each number: never for all of them, and the choices are the same."""
    whole = choices(3, 2, 3, 50, drawn(1))
    order = torch.rand(3, 50, 5, generator=drawn(1), dtype=torch.float64).argsort(2)
    assert torch.equal(whole, torch.zeros(3, 50, 5, dtype=torch.bool).scatter(2, order[..., :2], True))
    sizes, rand = [], torch.rand

    def counted(*shape: int, **options: Any) -> Tensor:
        sizes.append(math.prod(shape))
        return rand(*shape, **options)

    monkeypatch.setattr(relabelling, "TOGETHER", 37)
    monkeypatch.setattr(torch, "rand", counted)
    assert torch.equal(choices(3, 2, 3, 50, drawn(1)), whole)
    assert sum(sizes) == 3 * 50 * 5
    assert max(sizes) <= 37


def test_the_pvalue_counts_ties_and_itself() -> None:
    null = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert permutation_pvalue(2.0, null) == 3 / 5
    assert permutation_pvalue(2.0 + 1e-13, null) == 3 / 5  # a tie but for rounding
    assert permutation_pvalue(2.1, null) == 2 / 5
    assert permutation_pvalue(9.0, null) == 1 / 5
    assert permutation_pvalue(-1.0, null) == 1


def test_threshold_and_rejection_agree() -> None:
    """The p-value is at most the level exactly where the statistic is above the threshold."""
    null = normal(39)
    for statistic in (*null.tolist(), *(null + 1e-6).tolist(), 9.0, -9.0):
        found = twosample.TestResult(statistic, permutation_pvalue(statistic, null), null, "", (1, 1))
        for level in (0.025, 0.05, 0.1, 0.3, 0.5):
            assert found.rejected(level) == (statistic > found.threshold(level)), (statistic, level)
    assert found.threshold(0.02) == math.inf


# ---------------------------------------------------------------- MMD


def test_unbiased_mmd_of_every_relabeling_is_its_definition() -> None:
    x, y = normal(5, 3), normal(4, 3, seed=1) + 1
    found = twosample.two_sample_test(x, y, kernel=KERNEL, permutations=40, generator=drawn(3))
    labels = relabelings(5, 4, 40, drawn(3))
    pooled = [*x, *y]
    for value, chosen in zip([found.statistic, *found.null.tolist()], labels.T, strict=True):
        ours = [p for p, c in zip(pooled, chosen, strict=True) if c]
        theirs = [p for p, c in zip(pooled, chosen, strict=True) if not c]
        assert value == pytest.approx(mmd(ours, theirs), rel=1e-10, abs=1e-12)
    assert found.pvalue == (1 + int((found.null >= found.statistic).sum())) / 41
    assert found.sizes == (5, 4)
    assert "5 and 4 examples" in str(found)
    assert "40 permutations" in str(found)


def test_the_witness_is_the_mean_similarity_to_the_others() -> None:
    x, y = normal(6, 3), normal(4, 3, seed=1) + 1
    found = twosample.two_sample_test(x, y, kernel=KERNEL, permutations=5, generator=drawn(0))
    assert found.witness is not None
    x_list, y_list = list(x), list(y)
    wanted = [
        sum(k(a, b) for j, b in enumerate(x_list) if not (own and j == i)) / (len(x) - own)
        - sum(k(a, b) for j, b in enumerate(y_list) if not (not own and j == i)) / (len(y) - (not own))
        for own, part in ((True, x_list), (False, y_list))
        for i, a in enumerate(part)
    ]
    assert torch.allclose(found.witness, torch.tensor(wanted, dtype=torch.float64), rtol=1e-10)
    assert float(found.witness[:6].mean() - found.witness[6:].mean()) == pytest.approx(found.statistic, rel=1e-10)


def test_blocks_are_the_mean_of_their_own_mmds() -> None:
    x, y = normal(11, 3), normal(9, 3, seed=1) + 1
    found = twosample.two_sample_test(
        x, y, kernel=KERNEL, statistic=twosample.Block(3), permutations=20, generator=drawn(5)
    )
    generator = drawn(5)
    groups = statistics._grouped(11, 9, 3, generator)
    assert groups.shape == (3, 6)
    assert len(groups.unique()) == 18  # nobody twice
    assert groups[:, :3].max() < 11 <= groups[:, 3:].min()
    pooled = torch.cat([x, y])
    exchanged = choices(3, 3, 3, 20, generator)
    mean = sum(mmd([*pooled[g[:3]]], [*pooled[g[3:]]]) for g in groups) / 3
    assert found.statistic == pytest.approx(mean, rel=1e-10)
    for b in range(20):
        blocks = [(pooled[g], exchanged[q, b]) for q, g in enumerate(groups)]
        wanted = sum(mmd([*p[c]], [*p[~c]]) for p, c in blocks) / 3
        assert float(found.null[b]) == pytest.approx(wanted, rel=1e-10, abs=1e-12)
    assert found.sizes == (9, 9)


def test_linear_time_and_its_relabelings() -> None:
    """With two groups of four there are 36 relabeled values, all equally likely."""
    x, y = normal(5, 3), normal(4, 3, seed=1) + 1
    found = twosample.two_sample_test(
        x, y, kernel=KERNEL, statistic=twosample.Linear(), permutations=7200, generator=drawn(5)
    )
    pooled = torch.cat([x, y])

    def h(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
        return k(a, b) + k(c, d) - k(a, d) - k(b, c)

    groups = [pooled[g] for g in statistics._grouped(5, 4, 2, drawn(5))]
    assert found.statistic == pytest.approx(sum(h(*g) for g in groups) / 2, rel=1e-10)
    each = [sorted({round(h(*(g[list(o)])), 9) for o in itertools.permutations(range(4))}) for g in groups]
    assert [len(values) for values in each] == [6, 6]
    wanted = torch.tensor([(a + b) / 2 for a in each[0] for b in each[1]], dtype=torch.float64)
    nearest = (found.null[:, None] - wanted).abs().min(1)
    assert float(nearest.values.max()) < 1e-8
    counts = nearest.indices.bincount(minlength=36).double()
    assert float(((counts - 200) ** 2 / 200).sum()) < 66.6  # chi^2 with 35 degrees of freedom, p = 0.001


FORMS = [twosample.Unbiased(), twosample.Block(4), twosample.Linear()]


@pytest.mark.parametrize("statistic", FORMS, ids=lambda form: form.name)
def test_features_and_their_kernel_give_the_same(statistic: Any) -> None:
    x, y = normal(13, 3), normal(16, 3, seed=1) + 0.3
    by = [
        twosample.two_sample_test(x, y, kernel=source, statistic=statistic, permutations=30, generator=drawn(2))
        for source in (KERNEL, Features(quadratic), KERNEL(torch.cat([x, y])))
    ]
    for other in by[1:]:
        assert other.statistic == pytest.approx(by[0].statistic, rel=1e-9)
        assert torch.allclose(other.null, by[0].null, rtol=1e-9, atol=1e-12)
        assert other.pvalue == by[0].pvalue
    if by[0].witness is not None:
        assert torch.allclose(by[1].witness, by[0].witness, rtol=1e-9)


@pytest.mark.parametrize("statistic", FORMS, ids=lambda form: form.name)
def test_where_features_have_their_origin_does_not_matter(statistic: Any) -> None:
    """Numbers with a large offset, of which products keep nothing but the offset."""
    x, y = normal(13, 3), normal(16, 3, seed=1) + 1
    here, far = (
        twosample.two_sample_test(
            x + offset, y + offset, kernel=Features(nn.Identity()), statistic=statistic, permutations=30,
            generator=drawn(2),
        )
        for offset in (0.0, 1e8)
    )  # fmt: skip
    assert far.statistic == pytest.approx(here.statistic, rel=1e-5)
    assert torch.allclose(far.null, here.null, rtol=1e-5, atol=1e-5)
    assert far.pvalue == here.pvalue
    assert far.power().value == pytest.approx(here.power().value, rel=1e-3)


@pytest.mark.parametrize("statistic", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("source", ["kernel", "features"])
def test_little_memory_gives_the_same(statistic: Any, source: str) -> None:
    """Strips of the kernel and columns of the relabelings, down to one at a time."""
    x, y = normal(13, 3), normal(16, 3, seed=1)
    kernel: Any = KERNEL if source == "kernel" else Features(quadratic)
    by = [
        twosample.two_sample_test(
            x, y, kernel=kernel, statistic=statistic, permutations=30, generator=drawn(2), memory=memory
        )
        for memory in (None, 1, 10_000)
    ]
    for other in by[1:]:
        assert torch.allclose(other.null, by[0].null, rtol=1e-9, atol=1e-12)
        assert other.pvalue == by[0].pvalue


class Counted(KernelFunction):
    """Counts entries that are asked for."""

    def __init__(self) -> None:
        self.entries = 0

    def __call__(self, x1: Tensor, x2: Tensor | None = None) -> Kernel:
        self.entries += len(x1) * (len(x1) if x2 is None else len(x2))
        return KERNEL(x1, x2)


def test_blocks_and_linear_time_never_ask_for_the_whole_matrix() -> None:
    x, y = normal(1000, 3), normal(1000, 3, seed=1)
    for statistic, most in ((twosample.Linear(), 2000 * 128), (twosample.Block(50), 2000 * 100)):
        kernel = Counted()
        twosample.two_sample_test(x, y, kernel=kernel, statistic=statistic, permutations=9, generator=drawn(0))
        assert kernel.entries <= most
    whole = Counted()
    twosample.two_sample_test(x, y, kernel=whole, permutations=9, generator=drawn(0))
    assert whole.entries == 2000**2


def test_features_of_many_examples_need_no_matrix() -> None:
    """40,000 examples, whose kernel would take 12.8 GB, in 100 MB of working space."""
    x, y = normal(20_000, 5), normal(20_000, 5, seed=1) * 1.1
    found = twosample.two_sample_test(
        x, y, kernel=Features(nn.Identity()), permutations=20, generator=drawn(0), memory=100_000_000
    )
    assert found.null.shape == (20,)
    # the linear kernel compares means, which are the same: |mean x - mean y|^2 up to the noise that is taken off
    noise = float(x.var(0).sum() / len(x) + y.var(0).sum() / len(y))
    assert found.statistic == pytest.approx(float((x.mean(0) - y.mean(0)).square().sum()) - noise, rel=1e-6)


def network(outputs: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, outputs)).double().eval()


def test_with_the_kernel_of_a_network_and_with_its_features() -> None:
    tangent = linearize(network(3), readout=SumOfLogits())
    x, y = normal(12, 3), normal(12, 3, seed=1)
    jacobian = tangent.jacobian(torch.cat([x, y]))
    sources: list[Any] = [Empirical(tangent), DenseKernel(jacobian @ jacobian.T), Features(tangent.jacobian)]
    found = [twosample.two_sample_test(x, y, kernel=s, permutations=20, generator=drawn(0)) for s in sources]
    assert all(torch.allclose(other.null, found[0].null, rtol=1e-8) for other in found)
    sketched = Sketched.drawn(tangent, tangent.count * 20, generator=drawn(0))
    rough = twosample.two_sample_test(x, y, kernel=sketched, permutations=20, generator=drawn(0))
    assert rough.statistic == pytest.approx(found[0].statistic, abs=0.5 * float(found[0].null.std()))


@pytest.mark.parametrize("form", ["tuple", "dict", "dataset"])
def test_samples_in_every_form(form: str) -> None:
    x, y = normal(6, 3), normal(7, 3, seed=1)
    make: Callable[[Tensor], Any] = {
        "tuple": lambda t: (t,), "dict": lambda t: {"input": t}, "dataset": TensorDataset
    }[form]  # fmt: skip
    kernel = Empirical(linearize(network()))
    wanted = twosample.two_sample_test(x, y, kernel=kernel, permutations=9, generator=drawn(0))
    for statistic in (twosample.Unbiased(), twosample.Linear()):
        plain = twosample.two_sample_test(x, y, kernel=kernel, statistic=statistic, permutations=9, generator=drawn(0))
        found = twosample.two_sample_test(
            make(x), make(y), kernel=kernel, statistic=statistic, permutations=9, generator=drawn(0)
        )
        assert torch.allclose(found.null, plain.null, rtol=1e-10)
    assert wanted.sizes == (6, 7)


# ---------------------------------------------------------------- levels


def plain(x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
    return twosample.rbf_test(x, y, permutations=39, generator=g)


def blocks(x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
    return twosample.rbf_test(x, y, statistic=twosample.Block(3), permutations=39, generator=g)


def linear(x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
    return twosample.rbf_test(x, y, statistic=twosample.Linear(), permutations=39, generator=g)


def by_features(x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
    return twosample.two_sample_test(x, y, kernel=Features(quadratic), permutations=39, generator=g)


def witness(x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
    kernel = twosample.KernelWitness(KERNEL)
    return twosample.witness_test(x, y, witness=kernel, permutations=39, generator=g)


def dependence(statistic: Any) -> Callable[[Tensor, Tensor, torch.Generator], twosample.TestResult]:
    def test(x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
        few = min(len(x), len(y))
        return twosample.independence_test(
            x[:few], y[:few], kernel_x=RBF(), kernel_y=KERNEL, statistic=statistic, permutations=39, generator=g
        )

    return test


TESTS = {
    "unbiased": plain, "blocks": blocks, "linear": linear, "features": by_features, "witness": witness,
    "HSIC": dependence(twosample.Debiased()), "biased HSIC": dependence(twosample.Biased()),
}  # fmt: skip


@pytest.mark.parametrize("name", TESTS)
def test_pvalues_are_uniform_under_the_null(name: str) -> None:
    """With 39 permutations p is one of 40 values, all equally likely: chi^2 over eight groups, 600 runs."""
    runs, counts = 600, torch.zeros(8)
    for run in range(runs):
        g = drawn(run)
        x, y = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (12, 10))
        rank = round(TESTS[name](x, y, g).pvalue * 40)
        counts[(rank - 1) // 5] += 1
    expected = runs / 8
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # 7 degrees of freedom, p = 0.001


@pytest.mark.parametrize("name", TESTS)
def test_every_test_finds_a_large_difference(name: str) -> None:
    g = drawn(0)
    x = torch.randn(60, 3, generator=g, dtype=torch.float64)
    y = x.square() if "HSIC" in name else torch.randn(60, 3, generator=g, dtype=torch.float64) * 0.3 + 1.5
    found = TESTS[name](x, y, g)
    assert found.pvalue == 1 / 40, str(found)


# ---------------------------------------------------------------- power from one result


class FirstNumber(twosample.Witness):
    """A witness that needs no training: what is left of the spread is that of the examples looked at."""

    name = "first number"

    def __call__(self, pooled: Any, signs: Any, train: Any, at: list[int], generator: Any) -> Tensor:
        return -pooled.data[at][:, 0]


def first_number(x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
    return twosample.witness_test(x, y, witness=FirstNumber(), permutations=39, generator=g)


@pytest.mark.parametrize(
    ("shift", "most", "test"),
    # without a difference the linear part of the U-statistic's variance is 0, and its estimate cannot be negative
    [(0.0, 1.7, plain), (0.8, 1.4, plain)] + [(s, 1.4, t) for s in (0.0, 0.8) for t in (blocks, linear, first_number)],
)
def test_the_spread_of_a_result_is_that_of_fresh_samples(shift: float, most: float, test: Any) -> None:
    values, variances = [], []
    for run in range(150):
        g = drawn(run)
        x, y = (torch.randn(24, 3, generator=g, dtype=torch.float64) for _ in range(2))
        found = test(x, y + shift, g)
        values.append(found.statistic)
        variances.append(found.spread.linear + found.spread.quadratic)
    ratio = float(torch.tensor(variances).mean() / torch.tensor(values).var())
    assert 0.7 < ratio < most


@pytest.mark.parametrize(("rate", "centre"), [(1.0, 0.0), (0.5, 0.0), (0.5, 0.5)])
def test_power_of_more_examples_follows_from_how_null_and_spread_shrink(rate: float, centre: float) -> None:
    null = centre + normal(199) / 10
    spread = Spread(0.02, 0.01, rate, centre)
    found = twosample.TestResult(centre + 0.2, 0.05, null, "", (1, 1), spread=spread)
    for factor in (1.0, 4.0):
        threshold = centre + (float(null.sort(descending=True).values[9]) - centre) / factor**rate
        deviation = (0.02 / factor + 0.01 / factor**2) ** 0.5
        wanted = [norm.cdf((centre + 0.2 + off - threshold) / deviation) for off in (0, -(0.03**0.5), 0.03**0.5)]
        power = found.power(factor=factor)
        assert [power.value, power.low, power.high] == pytest.approx(wanted)


def test_power_says_what_is_simulated() -> None:
    """At 40 examples from pairs of 40, and at 80 from pairs of 40."""

    def pair(n: int, run: int) -> twosample.TestResult:
        g = drawn(run)
        x, y = (torch.randn(n, 3, generator=g, dtype=torch.float64) for _ in range(2))
        kernel = RBF(2.0)
        return twosample.two_sample_test(x, y + 0.45, kernel=kernel, permutations=99, generator=g)

    few, many = ([pair(n, run) for run in range(120)] for n in (40, 80))
    for factor, group in ((1.0, few), (2.0, many)):
        rejected = sum(found.rejected() for found in group) / 120
        median = float(torch.tensor([found.power(factor=factor).value for found in few]).median())
        assert abs(median - rejected) < 0.15, (factor, median, rejected)
    one = few[0].power()
    assert one.low < one.value < one.high
    assert few[0].power(factor=4).value > one.value
    assert few[0].power(0.2).value > one.value
    assert "at level 0.05" in str(one)


# ---------------------------------------------------------------- bad input


X, Y = normal(8, 3), normal(8, 3, seed=1)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (X[:1], Y, {}, "sample x has 1 examples: expected at least 2"),
        (X, Y[:1], {}, "sample y has 1"),
        (X, Y[:, :2], {}, r"one shape and type, on one device: got \(3,\) .* and \(2,\)"),
        (X, Y.float(), {}, "one shape and type"),
        (X, (Y,), {}, "the same form: got Tensor"),
        (X, TensorDataset(Y), {}, "one is a Dataset"),
        (X.numpy(), Y, {}, "got ndarray.*torch.from_numpy"),
        (torch.where(X[3, 1] == X, math.nan, X), Y, {}, "sample x has entries that are NaN"),
        (X, Y * math.inf, {}, "sample y has entries that are NaN or infinite"),
        (X, Y, {"permutations": 0}, "positive whole number: got 0"),
        (X, Y, {"permutations": -5}, "positive whole number: got -5"),
        (X, Y, {"permutations": 9.5}, "positive whole number: got 9.5"),
        (X, Y, {"statistic": "linear"}, "statistic is Unbiased.*got 'linear'"),
        (X, Y, {"statistic": twosample.Block(1)}, "at least two examples of each sample: got 1"),
        (X, Y, {"statistic": twosample.Block(5)}, "two blocks of 5"),
        (X[:3], Y, {"statistic": twosample.Linear()}, "four examples in each sample: got 3 and 8"),
        (X, Y, {"kernel": "rbf"}, "kernel is a KernelFunction.*got str"),
        (X, Y, {"kernel": RBF()(X)}, r"16 pooled examples: got a matrix of shape \(8, 8\)"),
        (X, Y, {"kernel": RBF()(torch.cat([X, Y]), torch.cat([X, Y]))}, "one kernel value for each pair"),
        (X, Y, {"kernel": Empirical(linearize(network(2), readout=Logits()))}, "matrix of shape.*SumOfLogits"),
        (X, Y, {"kernel": Features(lambda x: x[:3])}, r"a tensor \(16, ...\) for 16 examples: got \(3, 3\)"),
        (X, Y, {"kernel": Sketched.drawn(linearize(network(2)), 64, generator=drawn(0))}, "16 examples: got 32"),
        (X, Y, {"kernel": Features(lambda x: x / 0)}, "not finite"),
        (X * 1e160, Y, {"kernel": DotProduct(degree=2)}, "kernel is NaN or infinite"),
    ],
)  # fmt: skip
def test_refused(x: Any, y: Any, options: dict[str, Any], message: str) -> None:
    asked = {"kernel": RBF(), "permutations": 9, "generator": drawn(0), **options}
    with pytest.raises(InputError, match=message):
        twosample.two_sample_test(x, y, **asked)


class Forbidden(KernelFunction):
    def __call__(self, x1: Any, x2: Any = None) -> Kernel:
        raise AssertionError("computed before the input was checked")


def test_nothing_is_computed_before_the_input_is_known_to_be_good() -> None:
    for x, y, options in ((X[:1], Y, {}), (X, Y[:, :2], {}), (X, Y, {"permutations": 0})):
        with pytest.raises(InputError):
            twosample.two_sample_test(x, y, kernel=Forbidden(), generator=drawn(0), **options)


def test_levels_and_factors_are_checked() -> None:
    found = twosample.rbf_test(X, Y, permutations=9, generator=drawn(0))
    for level in (0.0, 1.0, -0.1, 5):
        for use in (found.threshold, found.rejected, found.power):
            with pytest.raises(InputError, match="lies between 0 and 1"):
                use(level)
    with pytest.raises(InputError, match="factor=0"):
        found.power(factor=0)
    unknown = twosample.TestResult(1.0, 0.1, found.null, "a test", (1, 1))
    with pytest.raises(InputError, match=r"a test does not know.*power_curve"):
        unknown.power()


# ---------------------------------------------------------------- repeated tests


def uniform(_x: Any, _y: Any, generator: torch.Generator) -> float:
    return float(torch.rand(1, generator=generator))


def gaussian(shift: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = (torch.randn(20, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y + shift


def test_power_curve_counts_rejections_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, calls = tmp_path / "runs.jsonl", []

    def counted(x: Tensor, y: Tensor, g: torch.Generator) -> twosample.TestResult:
        calls.append(1)
        return plain(x, y, g)

    def stopped(done: int, total: int) -> None:
        assert total == 40
        if done == 17:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"runs": 20, "path": path, "about": {"n": 20}}
    tests = {"RBF": counted}
    with pytest.raises(KeyboardInterrupt):
        twosample.power_curve(gaussian, tests, [0.0, 1.2], **arguments, progress=stopped)
    path.write_bytes(path.read_bytes()[:-30])  # the kill came in the middle of a line
    curve = twosample.power_curve(gaussian, tests, [0.0, 1.2], **arguments)
    assert len(calls) == 17 + 24
    fresh = twosample.power_curve(gaussian, {"RBF": plain}, [0.0, 1.2], runs=20)
    assert (curve.pvalues["RBF"] == fresh.pvalues["RBF"]).all()
    power, error = curve.power()["RBF"], curve.standard_error()["RBF"]
    assert power[0] < 0.3
    assert power[1] > 0.9
    assert power[1] == (curve.pvalues["RBF"][1] <= 0.05).mean()
    smooth = (20 * power + 1) / 22
    assert error == pytest.approx((smooth * (1 - smooth) / 20) ** 0.5)
    # more runs, another test: what is there is kept
    more = twosample.power_curve(gaussian, {"RBF": counted, "none": uniform}, [1.2], **{**arguments, "runs": 25})
    assert len(calls) == 41 + 5
    assert (more.pvalues["RBF"][0, :20] == curve.pvalues["RBF"][1]).all()
    assert "power at level 0.05, 25 runs" in str(more)


def test_every_run_has_random_numbers_of_its_own_and_can_be_repeated() -> None:
    def seen(seed: int, points: list[str], tests: list[str]) -> list[float]:
        numbers: list[float] = []

        def noted(*given: Any) -> Any:
            numbers.append(float(torch.rand(1, generator=given[-1], dtype=torch.float64)))
            return (X, Y) if len(given) == 2 else 0.5

        twosample.power_curve(noted, dict.fromkeys(tests, noted), points, runs=3, seed=seed)
        return numbers

    all_of_them = seen(0, ["a", "b"], ["one", "two"]) + seen(1, ["a", "b"], ["one", "two"])
    assert len(set(all_of_them)) == 2 * 2 * 3 * 3  # seeds, points, runs; samples and two tests
    assert set(seen(0, ["b"], ["two"])) < set(all_of_them)


def test_runs_of_something_else_are_refused(tmp_path: Path) -> None:
    from ntkit.errors import StoreError

    path = tmp_path / "runs.jsonl"
    arguments: dict[str, Any] = {"tests": {"none": uniform}, "points": ["a"], "runs": 3, "path": path}
    twosample.power_curve(lambda *_: (X, Y), **arguments, about={"n": 1})
    with pytest.raises(StoreError, match="about differ"):
        twosample.power_curve(lambda *_: (X, Y), **arguments, about={"n": 2})
    with pytest.raises(StoreError, match="seed differ"):
        twosample.power_curve(lambda *_: (X, Y), **arguments, about={"n": 1}, seed=1)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
    with pytest.raises(StoreError, match="damaged in line 2"):
        twosample.power_curve(lambda *_: (X, Y), **arguments, about={"n": 1})
    path.write_text("a letter to a friend")
    with pytest.raises(StoreError, match="not a file of runs"):
        twosample.power_curve(lambda *_: (X, Y), **arguments)
    assert path.read_text() == "a letter to a friend"
    # whatever it is, a file of something else stays as it is, its last line too
    (tmp_path / "other.jsonl").write_text(json.dumps({"version": 1, "seed": 5, "about": {}}) + '\n{"point": 1}')
    (tmp_path / "list.txt").write_text("milk\nbread\nbutter")
    (tmp_path / "settings.json").write_text('{"width": 5}\n{"depth": 2}')
    for name, message in (("other.jsonl", "seed differ"), ("list.txt", "not a file"), ("settings.json", "not a file")):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(StoreError, match=message):
            twosample.power_curve(lambda *_: (X, Y), **{**arguments, "path": tmp_path / name})
        assert (tmp_path / name).read_bytes() == before


def shifted(shift: float) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda _, generator: (X, X + shift * torch.rand(1, generator=generator))


def constant(pvalue: float) -> Callable[..., float]:
    return lambda *_: pvalue


def test_runs_of_other_code_are_refused_unless_it_is_said_what_they_are(tmp_path: Path) -> None:
    from ntkit.errors import StoreError

    path, points = tmp_path / "runs.jsonl", ["a"]

    def again(draw: Any, tests: Any, **more: Any) -> list[float]:
        curve = twosample.power_curve(draw, tests, points, runs=2, path=path, **more)
        return [float(found[0, 0]) for found in curve.pvalues.values()]

    assert again(shifted(1.0), {"one": constant(0.5)}) == [0.5]
    assert again(shifted(1.0), {"one": constant(0.5), "two": constant(0.25)}) == [0.5, 0.25]
    before = path.read_bytes()
    with pytest.raises(StoreError, match="draw differ"):
        again(shifted(2.0), {"one": constant(0.5)})
    for name in ("one", "two"):  # a test that came later, too
        with pytest.raises(StoreError, match=f"other code under the name {name}: "):
            again(shifted(1.0), {name: constant(0.125)})
        with pytest.raises(StoreError, match="other code"):
            again(shifted(1.0), {name: uniform})
    assert path.read_bytes() == before
    assert again(shifted(2.0), {"one": constant(0.125)}, about={}) == [0.5]
    # a file of an older version does not say it
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[0]["draw"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if "code" not in line))
    assert again(shifted(2.0), {"one": constant(0.125), "three": constant(1.0)}) == [0.5, 1.0]
    with pytest.raises(StoreError, match="under the name three"):
        again(shifted(2.0), {"three": constant(0.0)})


def test_a_test_called_draw_has_random_numbers_of_its_own() -> None:
    """The others keep those that they have always had: files of runs go on."""
    seen: dict[str, float] = {}

    def noted(name: str) -> Callable[..., Any]:
        def note(*given: Any) -> Any:
            seen[name] = float(torch.rand(1, generator=given[-1], dtype=torch.float64))
            return (X, Y) if name == "data" else 0.5

        return note

    twosample.power_curve(noted("data"), {"draw": noted("draw"), "RBF": noted("RBF")}, ["a"], runs=1)
    assert len(set(seen.values())) == 3
    for name, key in (("data", "draw"), ("RBF", "RBF")):
        number = int.from_bytes(hashlib.sha256(json.dumps([0, "a", 0, key]).encode()).digest()[:8], "big") >> 1
        assert seen[name] == float(torch.rand(1, generator=drawn(number), dtype=torch.float64))


@pytest.mark.parametrize("pvalue", [math.nan, 1.5, -0.1])
def test_what_is_no_pvalue_is_refused(tmp_path: Path, pvalue: float) -> None:
    from ntkit.errors import StoreError

    path = tmp_path / "runs.jsonl"
    with pytest.raises(InputError, match=f"'odd' gave p = {pvalue} at 0.0, run 0"):
        twosample.power_curve(gaussian, {"odd": constant(pvalue)}, [0.0], runs=2, path=path, about={})
    with path.open("a") as file:  # kept when it was not
        file.write(json.dumps({"point": 0.0, "run": 0, "found": {"odd": [pvalue, 0.1]}}) + "\n")
    with pytest.raises(StoreError, match="no p-value in line 2"):
        twosample.power_curve(gaussian, {"odd": constant(pvalue)}, [0.0], runs=2, path=path, about={})


@pytest.mark.parametrize(
    "wrong",
    [{"runs": 0}, {"runs": 2.5}, {"points": []}, {"points": [1, 1]}, {"tests": {}}],
)
def test_power_curves_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        twosample.power_curve(gaussian, **{"tests": {"none": uniform}, "points": [0.0], "runs": 2, **wrong})


def test_subsamples() -> None:
    """Examples of each sample without replacement; from one sample the two are disjoint."""
    x, y = torch.arange(10.0)[:, None], 100 + torch.arange(6.0)[:, None]
    a, b = twosample.Subsamples(x, y)(5, drawn(0))
    assert a.max() < 10 <= b.min()
    assert len(a.unique()) == len(b.unique()) == 5
    a, b = twosample.Subsamples(x)(5, drawn(0))
    assert torch.equal(torch.cat([a, b]).flatten().sort().values, torch.arange(10.0))
    seen = {tuple(twosample.Subsamples(x)(2, drawn(run))[0].flatten().tolist()) for run in range(20)}
    assert len(seen) > 10
    for size, sample in ((7, twosample.Subsamples(x, y)), (6, twosample.Subsamples(x)), (0, twosample.Subsamples(x))):
        with pytest.raises(InputError, match="without replacement"):
            sample(size, drawn(0))
