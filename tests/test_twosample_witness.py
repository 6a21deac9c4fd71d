"""NTK-MMD, independence, outliers and the usual tests beside them, against their definitions."""

from __future__ import annotations

import copy
import math
import re
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.twosample import power
from ntkit.errors import InputError, ModelError
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.explicit import Features
from ntkit.kernel.function import Empirical
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, SingleLogit
from ntkit.uses import twosample
from ntkit.uses.twosample.relabelling import relabelings
from ntkit.uses.twosample.samples import halves
from tests import oracles


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=drawn(seed), dtype=torch.float64)


def published(d: int = 4, width: int = 8) -> nn.Module:
    return power.network(drawn(7), d, width).double()


def published_kernel(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """(x.y + 1) sum_k a_k^2 s'(w_k.x + b_k) s'(w_k.y + b_k), s' the logistic function: the frozen a adds nothing."""
    hidden, a = model[0], model[2].weight[0].detach()
    s_x, s_y = (torch.sigmoid(t @ hidden.weight.detach().T + hidden.bias.detach()) for t in (x, y))
    return (x @ y.T + 1) * ((s_x * a**2) @ s_y.T)


# ---------------------------------------------------------------- NTK-MMD


@pytest.mark.parametrize(("n", "m"), [(10, 10), (10, 14)])
def test_zero_time_is_the_published_formula(n: int, m: int) -> None:
    """Witness, statistic, and the null over the labels of the test halves, term by term."""
    model, x, y = published(), normal(n, 4), normal(m, 4, seed=1) * 1.5
    found = twosample.witness_test(x, y, witness=twosample.ZeroTime(model), permutations=30, generator=drawn(3))
    generator = drawn(3)
    x_train, x_rest = halves(n, 0.5, generator)
    y_train, y_rest = halves(m, 0.5, generator)
    assert sorted(x_train + x_rest) == list(range(n))
    assert found.numbers is not None
    assert found.numbers.tolist() == x_rest + [n + i for i in y_rest]
    at = torch.cat([x[x_rest], y[y_rest]])
    of_x, of_y = (published_kernel(model, at, part) for part in (x[x_train], y[y_train]))
    witness = of_x.sum(1) - of_y.sum(1) * len(x_train) / len(y_train)
    assert found.witness is not None
    assert torch.allclose(found.witness, witness, rtol=1e-9, atol=1e-12)
    labels = relabelings(len(x_rest), len(y_rest), 30, generator)
    for value, chosen in zip([found.statistic, *found.null.tolist()], labels.T, strict=True):
        wanted = witness[chosen].mean() - witness[~chosen].mean()
        assert value == pytest.approx(float(wanted), rel=1e-9, abs=1e-11)
    assert found.sizes == (len(x_rest), len(y_rest))


def test_one_pass_of_training_approaches_time_zero() -> None:
    """The error falls in proportion to the learning rate; the sign, the loss and the division by the rate are right."""
    model, x, y = published(), normal(24, 4), normal(24, 4, seed=1) * 1.5
    exact = twosample.witness_test(x, y, witness=twosample.ZeroTime(model), permutations=9, generator=drawn(3))
    errors = []
    for rate in (1e-3, 1e-4, 1e-5):
        witness = twosample.OnlineTraining(model, rate)
        found = twosample.witness_test(x, y, witness=witness, permutations=9, generator=drawn(3))
        assert torch.equal(found.numbers, exact.numbers)
        errors.append(oracles.relative_error(found.witness, exact.witness))
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_online_training_is_plain_sgd_on_one_example_after_the_other() -> None:
    """With a rate at which the order matters, written out by hand."""
    model, x, y = published(), normal(12, 4), normal(12, 4, seed=1)
    found = twosample.witness_test(
        x, y, witness=twosample.OnlineTraining(model, 0.3), permutations=9, generator=drawn(3)
    )
    generator = drawn(3)
    (x_train, x_rest), (y_train, y_rest) = halves(12, 0.5, generator), halves(12, 0.5, generator)
    train, signs = torch.cat([x[x_train], y[y_train]]), [1.0] * 6 + [-1.0] * 6
    at = torch.cat([x[x_rest], y[y_rest]])
    order = torch.randperm(12, generator=generator).tolist()
    mine = copy.deepcopy(model)
    sgd = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], lr=0.3)
    with torch.no_grad():
        before = mine(at)[:, 0]
    for i in order:
        sgd.zero_grad()
        (-signs[i] * mine(train[i : i + 1]).sum()).backward()
        sgd.step()
    with torch.no_grad():
        change = (mine(at)[:, 0] - before) / 0.3
    assert torch.allclose(found.witness, change, rtol=1e-9, atol=1e-12)
    several = twosample.OnlineTraining(model, 1e-6, batch_size=5)
    other = twosample.witness_test(x, y, witness=several, permutations=9, generator=drawn(3))
    exact = twosample.witness_test(x, y, witness=twosample.ZeroTime(model), permutations=9, generator=drawn(3))
    assert torch.allclose(other.witness, exact.witness, rtol=1e-3, atol=1e-4)  # losses of a batch are summed


class Small(nn.Module):
    """Convolutions, batch normalisation in evaluation mode, three outputs, frozen first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        return self.head(self.second(h).relu().mean((2, 3)))


def small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small().double()
        model.norm.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
    return model.eval()


@pytest.mark.parametrize("parameters", [None, "second.*"])
def test_any_network_and_its_kernel_as_a_witness_agree(parameters: str | None) -> None:
    model, x, y = small(), normal(10, 1, 6, 6), normal(10, 1, 6, 6, seed=1) * 2
    tangent = linearize(model, readout=SingleLogit(1), parameters=parameters)
    witnesses: list[Any] = [
        twosample.ZeroTime(model, SingleLogit(1), parameters),
        twosample.KernelWitness(Empirical(tangent)),
        twosample.KernelWitness(Features(tangent.jacobian)),
        twosample.OnlineTraining(model, 1e-7, readout=SingleLogit(1), parameters=parameters),
    ]
    found = [twosample.witness_test(x, y, witness=w, permutations=9, generator=drawn(0)) for w in witnesses]
    for other in found[1:3]:
        assert torch.allclose(other.witness, found[0].witness, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found[3].witness, found[0].witness, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 1e200])
def test_the_network_is_left_as_it_was(rate: float) -> None:
    model = small()
    before = oracles.snapshot(model)
    x, y = normal(8, 1, 6, 6), normal(8, 1, 6, 6, seed=1)
    twosample.witness_test(x, y, witness=twosample.ZeroTime(model), permutations=9, generator=drawn(0))
    training = twosample.OnlineTraining(model, rate)
    with nullcontext() if rate < 1 else pytest.raises(ModelError, match=r"smaller learning rate|not finite|NaN"):
        twosample.witness_test(x, y, witness=training, permutations=9, generator=drawn(0))
    assert oracles.snapshot(model) == before


@pytest.mark.parametrize("rho", [0.0, 0.12])
@pytest.mark.parametrize(("test", "runs"), [(power.trained, 30), (power.exact, 120)])
def test_power_is_that_of_the_published_table(rho: float, test: Any, runs: int) -> None:
    """Within 0.07 of the published rate, and two and a half standard errors of so few runs."""
    rejected = 0
    for run in range(runs):
        generator = drawn(1000 + run)
        rejected += test(*power.gaussians(rho, generator), generator).rejected()
    rate, wanted = rejected / runs, power.PUBLISHED[rho]
    assert abs(rate - wanted) < 0.07 + 2.5 * math.sqrt(wanted * (1 - wanted) / runs), rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": normal(3, 4)}, "sample x has 3 examples: expected at least 4"),
        ({"y": normal(9, 5)}, "one shape and type"),
        ({"train_share": 0.0}, "lies between 0 and 1: got 0.0"),
        ({"train_share": 1.2}, "lies between 0 and 1: got 1.2"),
        ({"train_share": 0.9}, "cut at 0.9 leaves 7 and 1 examples"),
        ({"permutations": 0}, "positive whole number"),
        ({"witness": "ntk"}, "witness is ZeroTime.*got 'ntk'"),
        ({"witness": twosample.OnlineTraining(published(), 0.0)}, "learning rate is a positive number: got 0.0"),
        ({"witness": twosample.OnlineTraining(published(), math.nan)}, "learning rate is a positive number"),
        ({"witness": twosample.OnlineTraining(published(), batch_size=0)}, "positive whole number of examples: got 0"),
        ({"witness": twosample.KernelWitness(4)}, "kernel is a KernelFunction.*got 4"),  # pyright: ignore
        ({"witness": twosample.ZeroTime(nn.Linear(4, 3).double(), Logits())}, "the read-out gives 3"),
    ],
)
def test_witness_tests_refused(options: dict[str, Any], message: str) -> None:
    asked = {
        "x": normal(8, 4), "y": normal(8, 4, seed=1), "witness": twosample.ZeroTime(published()), "permutations": 9,
        **options,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        twosample.witness_test(asked.pop("x"), asked.pop("y"), **asked, generator=drawn(0))


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 1)).double()
    for witness in (twosample.ZeroTime(model), twosample.OnlineTraining(model)):
        with pytest.raises(ModelError, match="Dropout"):
            twosample.witness_test(normal(8, 4), normal(8, 4), witness=witness, generator=drawn(0))


# ---------------------------------------------------------------- independence


def hsic_biased(k: Tensor, m: Tensor) -> float:
    """tr(K H L H) / n^2."""
    n = len(k)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    return float(torch.trace(k @ h @ m @ h)) / n**2


def hsic_unbiased(k: Tensor, m: Tensor) -> float:
    """Song et al. 2012, equation 5, to the letter."""
    n, one = len(k), torch.ones(len(k), dtype=torch.float64)
    k, m = (t - torch.diag(t.diagonal()) for t in (k, m))
    last = float(one @ k @ one) * float(one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * float(one @ k @ m @ one)
    return (float(torch.trace(k @ m)) + last) / (n * (n - 3))


LINEAR, OTHER = DotProduct(offset=1.0), DotProduct(offset=0.2, scale=2.0)


def with_ones(offset: float, scale: float) -> Any:
    return lambda t: torch.cat([math.sqrt(scale) * t, t.new_full((len(t), 1), math.sqrt(offset))], 1)


@pytest.mark.parametrize(
    ("statistic", "wanted"), [(twosample.Biased(), hsic_biased), (twosample.Debiased(), hsic_unbiased)]
)
@pytest.mark.parametrize("memory", [None, 1])
def test_hsic_of_every_order_is_its_definition(statistic: Any, wanted: Any, memory: int | None) -> None:
    x = normal(9, 2) + 3
    y = x[:, :1] + normal(9, 3, seed=1)
    phi, psi = (Features(with_ones(o, s)) for o, s in ((1.0, 1.0), (0.2, 2.0)))
    k, m = x @ x.T + 1, 2 * y @ y.T + 0.2
    generator = drawn(4)
    orders = [torch.randperm(9, generator=generator) for _ in range(25)]
    without = [torch.tensor([j for j in range(9) if j != i]) for i in range(9)]
    left_out = torch.tensor([wanted(k[rest][:, rest], m[rest][:, rest]) for rest in without], dtype=torch.float64)
    jackknife = 8 / 9 * float((left_out - left_out.mean()).square().sum())
    for kernels in ((LINEAR, OTHER), (phi, psi), (LINEAR, psi), (phi, OTHER), (LINEAR(x), OTHER(y))):
        found = twosample.independence_test(
            x, y, kernel_x=kernels[0], kernel_y=kernels[1], statistic=statistic, permutations=25, generator=drawn(4),
            memory=memory,
        )  # fmt: skip
        assert found.statistic == pytest.approx(wanted(k, m), rel=1e-9)
        assert found.null.tolist() == pytest.approx([wanted(k, m[o][:, o]) for o in orders], rel=1e-9, abs=1e-12)
        assert found.pvalue == (1 + int((found.null >= found.statistic).sum())) / 26
        assert found.spread is not None
        quadratic = float(found.null.var())
        assert found.spread.quadratic == pytest.approx(quadratic)
        assert jackknife > 2 * quadratic
        assert found.spread.linear == pytest.approx(jackknife - 2 * quadratic, rel=1e-9)
    assert "of 9 pairs" in str(found)


@pytest.mark.parametrize("statistic", [twosample.Biased(), twosample.Debiased()])
def test_power_of_the_independence_test_is_about_the_rate_of_rejections(statistic: Any) -> None:
    """At 30 pairs, and as 15 of them foretell it: medians over many samples against what happens."""

    def test(run: int, n: int) -> twosample.TestResult:
        x = normal(n, 1, seed=run)
        y = 0.7 * x + normal(n, 1, seed=run + 10_000)
        return twosample.independence_test(
            x, y, kernel_x=RBF(), kernel_y=RBF(), statistic=statistic, permutations=99, generator=drawn(run)
        )

    runs = range(120)
    at_30, at_15 = [test(run, 30) for run in runs], [test(run, 15) for run in runs]
    rate = sum(found.rejected() for found in at_30) / len(runs)
    assert 0.3 < rate < 0.9
    assert float(np.median([found.power().value for found in at_30])) == pytest.approx(rate, abs=0.15)
    assert float(np.median([found.power(factor=2).value for found in at_15])) == pytest.approx(rate, abs=0.25)


@pytest.mark.parametrize("statistic", [twosample.Biased(), twosample.Debiased()])
def test_more_examples_do_not_make_power_of_independence(statistic: Any) -> None:
    found = [
        twosample.independence_test(
            normal(20, 1, seed=run), normal(20, 1, seed=run + 10_000), kernel_x=RBF(), kernel_y=RBF(),
            statistic=statistic, permutations=99, generator=drawn(run),
        ).power(factor=4).value
        for run in range(60)
    ]  # fmt: skip
    assert float(np.median(found)) < 0.4


@pytest.mark.parametrize("statistic", [twosample.Biased(), twosample.Debiased()])
def test_the_null_of_independence_shrinks_as_it_is_told_to(statistic: Any) -> None:
    found = [
        twosample.independence_test(
            normal(n, 1), normal(n, 1, seed=1), kernel_x=RBF(), kernel_y=RBF(), statistic=statistic, permutations=400,
            generator=drawn(0),
        )
        for n in (25, 400)
    ]  # fmt: skip
    assert found[0].spread is not None
    rate = math.log(float(found[0].null.std() / found[1].null.std())) / math.log(16)
    assert rate == pytest.approx(found[0].spread.rate, abs=0.15)


def test_a_statistic_that_is_all_bias_has_no_power() -> None:
    """A kernel so narrow that every order is as good as another."""
    found = twosample.independence_test(
        normal(20, 1), normal(20, 1, seed=1), kernel_x=RBF(1e-6), kernel_y=RBF(1e-6), statistic=twosample.Biased(),
        permutations=99, generator=drawn(0),
    )  # fmt: skip
    assert found.pvalue == 1
    assert found.power(factor=2).high == 0


def test_power_and_statistic_do_not_depend_on_the_origin_of_features() -> None:
    """Times in seconds since 1970: a constant far larger than what varies."""
    x, y = normal(30, 1), normal(30, 1, seed=1)
    found = [
        twosample.independence_test(
            x + far, y + far, kernel_x=DotProduct(), kernel_y=DotProduct(), permutations=9, generator=drawn(0)
        )
        for far in (0.0, 1e5)
    ]
    assert found[1].statistic == pytest.approx(found[0].statistic, rel=1e-3)
    assert found[1].power().value == pytest.approx(found[0].power().value, rel=1e-3)


def test_values_that_are_no_numbers_are_refused() -> None:
    """NaN is not smaller than any permuted value: the smallest p-value would come of it."""
    x = normal(20, 4)
    broken = x.clone()
    broken[3, 1] = math.nan
    with pytest.raises(InputError, match="the statistic is NaN or infinite"):
        twosample.witness_test(
            TensorDataset(broken), TensorDataset(normal(20, 4, seed=1)), witness=twosample.ZeroTime(published()),
            train_share=0.5, permutations=9, generator=drawn(0),
        )  # fmt: skip
    with pytest.raises(InputError, match="the statistic is NaN or infinite"):
        twosample.independence_test(
            x * 1e80, x * 1e80, kernel_x=DotProduct(), kernel_y=DotProduct(), permutations=9, generator=drawn(0)
        )


def test_power_of_too_few_pairs_is_refused() -> None:
    x, y = normal(4, 2), normal(4, 2, seed=1)
    found = twosample.independence_test(x, y, kernel_x=RBF(), kernel_y=RBF(), permutations=9, generator=drawn(0))
    with pytest.raises(InputError, match="HSIC does not know how its statistic varies"):
        found.power()


def test_unbiased_hsic_has_mean_zero_under_independence_and_the_biased_one_has_not() -> None:
    values = {"HSIC": [], "HSIC, biased": []}
    for run in range(300):
        x, y = normal(10, 2, seed=run), normal(10, 2, seed=run + 10_000)
        for statistic in (twosample.Debiased(), twosample.Biased()):
            found = twosample.independence_test(
                x, y, kernel_x=RBF(), kernel_y=RBF(), statistic=statistic, permutations=1, generator=drawn(run)
            )
            values[found.name].append(found.statistic)
    for name, zero in (("HSIC", True), ("HSIC, biased", False)):
        t = torch.tensor(values[name])
        assert (abs(float(t.mean() / t.std())) * 300**0.5 < 3.5) == zero


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"y": normal(7, 2)}, "the same examples: got 8 and 7"),
        ({"x": normal(3, 2), "y": normal(3, 2)}, "sample x has 3 examples: expected at least 4"),
        ({"y": normal(8, 2) * math.nan}, "sample y has entries that are NaN"),
        ({"permutations": -1}, "positive whole number"),
        ({"statistic": "biased"}, "statistic is Debiased"),
        ({"kernel_x": "rbf"}, "kernel is a KernelFunction.*got str"),
        ({"kernel_y": RBF()(normal(5, 2))}, r"got a matrix of shape \(5, 5\)"),
    ],
)
def test_independence_refused(options: dict[str, Any], message: str) -> None:
    asked = {"x": normal(8, 2), "y": normal(8, 2, seed=1), "kernel_x": RBF(), "kernel_y": RBF(), **options}
    asked = {"permutations": 9, **asked}
    with pytest.raises(InputError, match=message):
        twosample.independence_test(asked.pop("x"), asked.pop("y"), **asked, generator=drawn(0))


# ---------------------------------------------------------------- outliers


def test_outlier_scores_are_minus_the_mean_cosine() -> None:
    x, reference = normal(5, 3), normal(7, 3, seed=1) + 1
    kernel = DotProduct(offset=0.5)

    def k(a: Tensor, b: Tensor) -> float:
        return float(a @ b) + 0.5

    wanted = [-sum(k(a, b) / math.sqrt(k(a, a) * k(b, b)) for b in reference) / 7 for a in x]
    for source in (kernel, Features(with_ones(0.5, 1.0))):
        assert twosample.outlier_scores(x, reference, kernel=source).tolist() == pytest.approx(wanted, rel=1e-9)
    tangent = linearize(small(), readout=SingleLogit(0))
    images, base = normal(4, 1, 6, 6), normal(5, 1, 6, 6, seed=1)
    scores = [
        twosample.outlier_scores(images, base, kernel=source)
        for source in (Empirical(tangent), Features(tangent.jacobian))
    ]
    assert torch.allclose(*scores, rtol=1e-9)


def test_conformal_pvalues_are_ranks_and_hold_their_level() -> None:
    """Over references, p <= u for a share u of examples that belong; those far away have the smallest p there is."""
    kernel, below = RBF(1.5), []
    for run in range(150):
        g = drawn(run)
        reference, x = (torch.randn(n, 2, generator=g, dtype=torch.float64) for n in (38, 40))
        found = twosample.outlier_test(x, reference, kernel=kernel, generator=g)
        assert len(found.calibration) == 19
        below.append([float((found.pvalues <= u).double().mean()) for u in (0.05, 0.2, 0.5)])
    rates, errors = np.mean(below, 0), np.std(below, 0, ddof=1) / 150**0.5
    assert (np.abs(rates - (0.05, 0.2, 0.5)) < 3.5 * errors).all(), rates
    ranks = [(1 + int((found.calibration >= s).sum())) / 20 for s in found.scores]
    assert found.pvalues.tolist() == pytest.approx(ranks)
    far = twosample.outlier_test(x + 9, reference, kernel=kernel, generator=drawn(0))
    assert far.pvalues.unique().tolist() == [1 / 20]
    assert far.flagged().all()
    assert "40 of 40 examples have p <= 0.05 (expected 2.0" in str(far)


def test_equal_examples_are_ties() -> None:
    """Three kinds of examples: whoever is of the rarest kind of the calibration is as unusual as all of these."""
    kinds = torch.eye(3, dtype=torch.float64)[[0] * 60 + [1] * 30 + [2] * 10] * 0.1
    found = twosample.outlier_test(
        kinds[[0, 60, 99]], kinds, kernel=Features(lambda t: t * 0.3), generator=drawn(0)
    )  # fmt: skip
    values, counts = (found.calibration * 1e6).round().unique(return_counts=True)
    assert len(values) == 3
    wanted = [(1 + int(counts[k:].sum())) / 51 for k in range(3)]
    assert sorted(found.pvalues.tolist(), reverse=True) == pytest.approx(wanted)
    assert found.pvalues[0] == 1


def test_discoveries_are_those_of_benjamini_and_hochberg() -> None:
    p = torch.tensor([0.6, 0.01, 0.04, 0.03, 0.5], dtype=torch.float64)
    found = twosample.Outliers(p, p, p)
    # sorted: .01 <= .02, .03 <= .04, .04 <= .06, .5 > .08: the first three at rate 0.1
    assert found.discovered(0.1).tolist() == [False, True, True, True, False]
    assert found.discovered(0.051).tolist() == [False, True, False, False, False]
    assert not found.discovered(0.01).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": normal(5, 2)}, "one shape and type"),
        ({"reference": normal(3, 3)}, "sample reference has 3 examples"),
        ({"x": normal(5, 3) * math.inf}, "sample x has entries that are NaN or infinite"),
        ({"x": torch.zeros(5, 3).double(), "kernel": DotProduct()}, r"k\(x, x\) = 0"),
        ({"kernel": RBF()(normal(5, 3))}, "kernel is a KernelFunction.*got ClosedKernel"),
        ({"kernel": 3}, "got int"),
        ({"calibration_share": 1.0}, "lies between 0 and 1"),
        ({"calibration_share": 0.01}, "leaves 0 and 20"),
    ],
)
def test_outliers_refused(options: dict[str, Any], message: str) -> None:
    asked = {"x": normal(5, 3), "reference": normal(20, 3, seed=1), "kernel": RBF(), **options}
    with pytest.raises(InputError, match=message):
        twosample.outlier_test(asked.pop("x"), asked.pop("reference"), **asked, generator=drawn(0))


# ---------------------------------------------------------------- the usual tests


def test_median_bandwidth() -> None:
    x, y = normal(20, 3), normal(24, 3, seed=1) + 1
    median = float(torch.pdist(torch.cat([x, y])).median())
    found = twosample.rbf_test(x, y, permutations=20, generator=drawn(0))
    wanted = twosample.two_sample_test(x, y, kernel=RBF(median), permutations=20, generator=drawn(0))
    assert found.statistic == wanted.statistic
    assert torch.equal(found.null, wanted.null)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 60)])
def test_classifier_test_is_accuracy_on_the_other_half(n: int, m: int) -> None:
    x, y = normal(n, 3), normal(m, 3, seed=1) + 0.7
    classifier = LogisticRegression(C=0.1)
    found = twosample.classifier_test(x, y, classifier=classifier, permutations=200, generator=drawn(2))
    generator = drawn(2)
    (x_train, x_rest), (y_train, y_rest) = halves(n, 0.5, generator), halves(m, 0.5, generator)
    mine = LogisticRegression(C=0.1).fit(
        torch.cat([x[x_train], y[y_train]]).numpy(), [1] * len(x_train) + [0] * len(y_train)
    )
    right_x, right_y = mine.predict(x[x_rest].numpy()) == 1, mine.predict(y[y_rest].numpy()) == 0
    assert found.statistic == pytest.approx((right_x.mean() + right_y.mean()) / 2)
    assert not hasattr(classifier, "coef_")  # a copy is fitted
    assert abs(float(found.null.mean()) - 0.5) < 0.02
    assert found.pvalue == (1 + int((found.null >= found.statistic - 1e-9).sum())) / 201
    if n == m:
        correct = int(right_x.sum() + right_y.sum())
        assert twosample.binomial_pvalue(found) == pytest.approx(binom.sf(correct - 1, n, 0.5))
        assert found.power(factor=50).value > 0.99
        assert found.power().high <= 1
    else:
        with pytest.raises(InputError, match="one size: got 20 and 30"):
            twosample.binomial_pvalue(found)


def test_the_binomial_pvalue_is_of_accuracies_alone() -> None:
    x, y = normal(20, 3), normal(20, 3, seed=1)
    for found in (
        twosample.rbf_test(x, y, permutations=9, generator=drawn(0)),
        twosample.witness_test(x, y, witness=twosample.KernelWitness(RBF()), permutations=9, generator=drawn(0)),
    ):
        with pytest.raises(InputError, match=f"result of classifier_test: got one of {re.escape(found.name)}"):
            twosample.binomial_pvalue(found)


def test_classifier_tests_hold_their_level_and_find_what_is_there() -> None:
    rejected = 0
    for run in range(100):
        g = drawn(run)
        x, y = (torch.randn(40, 2, generator=g, dtype=torch.float64) for _ in range(2))
        rejected += twosample.classifier_test(x, y, permutations=39, generator=g).rejected(0.1)
    assert rejected <= 10 + 3.5 * (100 * 0.1 * 0.9) ** 0.5
    x, y = normal(200, 2), normal(200, 2, seed=1) * 0.3
    curved = MLPClassifier((16,), max_iter=400, learning_rate_init=0.05, random_state=0, tol=1e-3)
    assert twosample.classifier_test(x, y, classifier=curved, permutations=99, generator=drawn(0)).rejected()


def test_baselines_refused() -> None:
    x = normal(8, 3)
    for test in (twosample.rbf_test, twosample.classifier_test):
        with pytest.raises(InputError, match="positive whole number"):
            test(x, x, permutations=0, generator=drawn(0))
        with pytest.raises(InputError, match="one shape and type"):
            test(x, x[:, :2], permutations=9, generator=drawn(0))
        with pytest.raises(InputError, match="features of them"):
            test({"a": x}, {"a": x}, permutations=9, generator=drawn(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="sample y has 3 examples: expected at least 4"):
        twosample.classifier_test(x, x[:3], generator=drawn(0))
