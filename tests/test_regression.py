from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkit.errors import InputError, NotPositiveDefiniteError
from ntkit.solve.regression import KernelRegression, RegressionFit, regress
from ntkit.solve.ridge import DEFAULT_GRID, GCV, Absolute, LeaveOneOut, SearchedRidge
from tests import oracles
from tests.test_direct import Counting

few = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**16)
RIDGES = st.one_of(st.just(0.0), st.floats(-6, 1).map(lambda exponent: 10.0**exponent))


class Problem:
    """A linear model in P parameters with C outputs: its kernels, targets and f0, all explicit."""

    def __init__(self, n: int = 7, m: int = 4, c: int = 3, p: int = 40, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.n, self.m, self.c = n, m, c
        common = normal(1, c, p)  # outputs of all examples are correlated, as those of a network are
        train, new = normal(n, c, p) + common, normal(m, c, p) + common
        self.full, self.full_cross = (a.reshape(-1, p) @ train.reshape(-1, p).T for a in (train, new))
        self.reduced, self.cross = oracles.pntk(self.full, c), oracles.pntk(self.full_cross, c)
        self.y, self.f0, self.f0_new = normal(n, c) + 1, normal(n, c), normal(m, c)

    def kernels(self, full: bool) -> tuple[Tensor, Tensor]:
        return (self.full, self.full_cross) if full else (self.reduced, self.cross)

    def absolute(self, full: bool, relative: float) -> float:
        return relative * float(self.kernels(full)[0].diagonal().mean())

    def shaped(self, values: Tensor, full: bool) -> Tensor:
        return values.reshape(-1) if full else values


problems = st.builds(Problem, n=st.integers(2, 8), m=st.integers(1, 5), c=st.integers(1, 4), p=st.just(60), seed=SEEDS)


def decompose_then_fit(kernel, targets, ridge, *, prior=None) -> RegressionFit:
    return KernelRegression.decompose(kernel, targets, prior=prior).fit(ridge)


both_routes = pytest.mark.parametrize("fit", [regress, decompose_then_fit])
both_kernels = pytest.mark.parametrize("full", [False, True], ids=["reduced", "full"])


# ---------------------------------------------------------------- predictions


@both_routes
@both_kernels
@few
@given(problem=problems, ridge=RIDGES, around=st.booleans())
def test_predictions_follow_the_formula(fit, full, problem, ridge, around):
    kernel, cross = problem.kernels(full)
    f0, f0_new = (problem.f0, problem.f0_new) if around else (None, None)
    got = fit(kernel, problem.y, ridge, prior=f0).predict(cross, f0_new)
    flat = [problem.shaped(t, full) for t in (problem.y, problem.f0, problem.f0_new)]
    absolute = problem.absolute(full, ridge)
    expected = oracles.kernel_regression(
        kernel, cross, flat[0], absolute, *((flat[1], flat[2]) if around else (0.0, 0.0))
    )
    assert oracles.relative_error(got, expected.reshape(problem.m, problem.c)) < 1e-9


@both_routes
@both_kernels
def test_what_a_fit_carries(fit, full):
    problem = Problem()
    kernel, _ = problem.kernels(full)
    got = fit(kernel, problem.y, 0.3, prior=problem.f0)
    absolute = problem.absolute(full, 0.3)
    flat = problem.shaped(problem.y - problem.f0, full)
    expected = oracles.ridge_solve(kernel, flat, absolute)
    assert oracles.relative_error(got.coefficients, expected.reshape(problem.n, problem.c)) < 1e-12
    assert got.ridge == pytest.approx(absolute)
    assert got.relative_ridge == pytest.approx(0.3)
    assert got.relative_residual < 1e-13
    assert got.kernel_dtype == torch.float64
    assert (got.full, got.around) == (full, True)
    # the predictions at the training examples miss the targets by exactly the training residuals
    missed = problem.y - got.predict(kernel, problem.f0)
    assert oracles.relative_error(got.train_residuals, missed) < 1e-12
    assert got.leave_one_out == pytest.approx(float((got.loo_residuals**2).sum()) / problem.n)


@both_routes
def test_one_output_may_be_a_vector(fit):
    problem = Problem(c=1)
    vector = fit(problem.reduced, problem.y[:, 0], 0.1)
    column = fit(problem.full, problem.y, 0.1)
    assert torch.equal(vector.coefficients, column.coefficients)
    assert tuple(vector.predict(problem.cross).shape) == (problem.m, 1)
    assert vector.full is False


@both_routes
def test_arrays_are_as_good_as_tensors(fit):
    problem = Problem()
    frozen = problem.y.numpy()
    frozen.flags.writeable = False
    got = fit(problem.reduced.numpy(), frozen, 0.1).predict(problem.cross.numpy())
    assert torch.equal(got, fit(problem.reduced, problem.y, 0.1).predict(problem.cross))


def test_residual_is_measured():
    problem = Problem()
    regression = KernelRegression.decompose(problem.reduced, problem.y)
    regression.eigenvectors[:, 0] *= 2  # spoilt on purpose
    assert regression.fit(0.1).relative_residual > 1e-2


@pytest.mark.parametrize("full", [False, True])
def test_prediction_reads_strips_only(full):
    problem = Problem(n=4, m=1500, c=2)
    kernel, cross = problem.kernels(full)
    lazy = Counting(cross)
    got = regress(kernel, problem.y, 0.1).predict(lazy)
    assert lazy.highest <= 1024 < cross.shape[0]
    assert lazy.read == cross.numel()
    assert torch.equal(got, regress(kernel, problem.y, 0.1).predict(cross))


def test_float32_kernel_is_solved_and_applied_in_float64():
    problem = Problem()
    kernel, cross = problem.reduced.float(), problem.cross.float()
    fit = regress(kernel, problem.y, 1e-3)
    absolute = 1e-3 * float(kernel.double().diagonal().mean())
    expected = oracles.kernel_regression(kernel.double(), cross.double(), problem.y, absolute)
    assert oracles.relative_error(fit.predict(cross), expected) < 1e-10
    assert fit.kernel_dtype == torch.float32


# ---------------------------------------------------------------- leave-one-out


@both_routes
@both_kernels
@few
@given(problem=problems, ridge=RIDGES, around=st.booleans())
def test_leave_one_out_is_refitting(fit, full, problem, ridge, around):
    kernel, _ = problem.kernels(full)
    f0 = problem.f0 if around else torch.zeros_like(problem.y)
    got = fit(kernel, problem.y, ridge, prior=problem.f0 if around else None)
    refitted = oracles.leave_one_out(
        kernel,
        problem.shaped(problem.y, full),
        problem.absolute(full, ridge),
        problem.shaped(f0, full),
        rows_per_example=problem.c if full else 1,
    ).reshape(problem.n, problem.c)
    scale = float(torch.linalg.norm(problem.y - refitted))
    assert float(torch.linalg.norm(got.loo_residuals - (problem.y - refitted))) < 1e-10 * max(scale, 1.0)


def test_the_whole_example_leaves_not_one_output():
    problem = Problem(c=3)
    by_scalar = oracles.leave_one_out(problem.full, problem.y.reshape(-1), 0.1, rows_per_example=1)
    got = regress(problem.full, problem.y, Absolute(0.1)).loo_residuals
    assert oracles.relative_error(got, problem.y - by_scalar.reshape(-1, 3)) > 0.05


@both_routes
@few
@given(problem=problems, ridge=RIDGES)
def test_without_coupling_full_and_reduced_agree(fit, problem, ridge):
    identity = torch.eye(problem.c, dtype=torch.float64)
    full, reduced = (
        fit(kernel, problem.y, ridge) for kernel in (torch.kron(problem.reduced, identity), problem.reduced)
    )
    for one, other in (
        (full.coefficients, reduced.coefficients),
        (full.loo_residuals, reduced.loo_residuals),
        (full.predict(torch.kron(problem.cross, identity)), reduced.predict(problem.cross)),
    ):
        assert oracles.relative_error(one, other) < 1e-9
    assert full.gcv == pytest.approx(reduced.gcv, rel=1e-9)
    assert full.leave_one_out == pytest.approx(reduced.leave_one_out, rel=1e-9)


# ---------------------------------------------------------------- generalized cross-validation


@both_routes
@both_kernels
@few
@given(problem=problems, ridge=st.floats(-3, 1).map(lambda exponent: 10.0**exponent), around=st.booleans())
def test_gcv_is_its_definition(fit, full, problem, ridge, around):
    kernel, _ = problem.kernels(full)
    y = problem.y - problem.f0 if around else problem.y
    got = fit(kernel, problem.y, ridge, prior=problem.f0 if around else None).gcv
    expected = oracles.generalized_cross_validation(kernel, problem.shaped(y, full), problem.absolute(full, ridge))
    # the definition is a mean over rows, and a full kernel has C of them per example
    assert got == pytest.approx(expected * (problem.c if full else 1), rel=1e-9)


@both_routes
def test_gcv_without_ridge_is_the_ridgeless_form_and_the_limit(fit):
    problem = Problem(n=12)
    inverse = torch.linalg.inv(problem.reduced)
    ridgeless = float((inverse @ problem.y).square().sum(1).mean() / (inverse.trace() / 12) ** 2)
    assert fit(problem.reduced, problem.y, 0.0).gcv == pytest.approx(ridgeless, rel=1e-9)
    # the quotient of vanishing residual and vanishing trace, which the definition could not form
    for ridge in (1e-12, 1e-100, 1e-300):
        assert fit(problem.reduced, problem.y, ridge).gcv == pytest.approx(ridgeless, rel=1e-8)


def test_gcv_of_very_large_ridge_is_the_size_of_the_targets():
    problem = Problem()
    regression = KernelRegression.decompose(problem.reduced, problem.y)
    assert regression.gcv(1e12) == pytest.approx(float((problem.y**2).sum(1).mean()), rel=1e-6)


# ---------------------------------------------------------------- one ridge for all scalings


@both_routes
@few
@given(problem=problems, ridge=RIDGES, factor=st.floats(1e-6, 1e6))
def test_a_relative_ridge_does_not_see_the_scale(fit, problem, ridge, factor):
    one = fit(problem.reduced, problem.y, ridge)
    other = fit(factor * problem.reduced, problem.y, ridge)
    assert oracles.relative_error(other.predict(factor * problem.cross), one.predict(problem.cross)) < 1e-9
    assert oracles.relative_error(other.loo_residuals, one.loo_residuals) < 1e-9
    assert other.gcv == pytest.approx(one.gcv, rel=1e-9)


@both_routes
@few
@given(problem=problems, ridge=st.floats(1e-3, 1e2))
def test_sum_of_logits_needs_c_times_the_ridge(fit, problem, ridge):
    c = problem.c
    one = fit(problem.reduced, problem.y, Absolute(ridge)).predict(problem.cross)
    summed = fit(c * problem.reduced, problem.y, Absolute(c * ridge)).predict(c * problem.cross)
    assert oracles.relative_error(summed, one) < 1e-10
    if c > 1:
        same = fit(c * problem.reduced, problem.y, Absolute(ridge)).predict(c * problem.cross)
        assert oracles.relative_error(same, one) > 1e-9


# ---------------------------------------------------------------- the choice of the ridge


@both_kernels
def test_curve_is_every_ridge_fitted_alone(full):
    problem = Problem()
    kernel, _ = problem.kernels(full)
    grid = (1e-4, 1e-2, 1.0)
    curve = KernelRegression.decompose(kernel, problem.y, prior=problem.f0).curve(grid)
    for index, ridge in enumerate(grid):
        alone = regress(kernel, problem.y, ridge, prior=problem.f0)
        assert float(curve.relative[index]) == ridge
        assert float(curve.absolute[index]) == pytest.approx(alone.ridge)
        assert float(curve.train[index]) == pytest.approx(float((alone.train_residuals**2).sum()) / problem.n)
        assert float(curve.gcv[index]) == pytest.approx(alone.gcv)
        assert float(curve.leave_one_out[index]) == pytest.approx(alone.leave_one_out)
    assert (curve.train.diff() > 0).all()


def noisy_problem(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 200, generator=generator, dtype=torch.float64) * torch.arange(1, 201).double() ** -0.75
    signal = rows @ torch.randn(200, 2, generator=generator, dtype=torch.float64)
    return rows @ rows.T, signal + 0.3 * torch.randn(n, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("rule", "name"), [(GCV(), "gcv"), (LeaveOneOut(), "leave_one_out")])
def test_search_finds_the_bottom_of_the_curve(rule, name):
    kernel, y = noisy_problem()
    curve = KernelRegression.decompose(kernel, y).curve()
    best = int(getattr(curve, name).argmin())
    assert 0 < best < len(DEFAULT_GRID) - 1
    assert regress(kernel, y, rule).relative_ridge == pytest.approx(DEFAULT_GRID[best])


def test_the_two_rules_are_two():
    problem = Problem(n=6, c=3, seed=3)
    grids = tuple(10.0**e for e in range(-4, 3))
    curve = KernelRegression.decompose(problem.full, problem.y).curve(grids)
    assert not torch.allclose(curve.gcv, curve.leave_one_out, rtol=0.02)


def test_the_grid_is_relative_to_the_mean_diagonal():
    kernel, y = noisy_problem()
    chosen = [regress(scale * kernel, y, GCV()) for scale in (1.0, 1e-5)]
    assert chosen[0].relative_ridge == pytest.approx(chosen[1].relative_ridge)
    assert chosen[0].ridge == pytest.approx(1e5 * chosen[1].ridge)


def test_a_rule_of_ones_own():
    class Largest(SearchedRidge):
        grid = (0.1, 10.0, 1.0)

        def score(self, regression: KernelRegression, ridge: float) -> float:
            return -ridge

    kernel, y = noisy_problem()
    assert regress(kernel, y, Largest()).relative_ridge == pytest.approx(10.0)


# ---------------------------------------------------------------- kernels that are singular


def singular(n: int = 30, rank: int = 5) -> tuple[Tensor, Tensor]:
    problem = Problem(n=n, c=1, p=rank)
    return problem.reduced, problem.y


@both_routes
def test_singular_kernel_is_refused_with_a_ridge_that_helps(fit):
    kernel, y = singular()
    with pytest.raises(NotPositiveDefiniteError) as caught:
        fit(kernel, y, 0.0)
    got = fit(kernel, y, Absolute(caught.value.suggested_ridge))
    refitted = oracles.leave_one_out(kernel, y, caught.value.suggested_ridge)
    assert oracles.relative_error(got.loo_residuals, y - refitted) < 1e-3
    assert got.relative_residual < 1e-4


def test_search_passes_over_ridges_that_are_too_small():
    kernel, y = singular()
    rule = LeaveOneOut((0.0, 1e-18, 0.5))
    assert regress(kernel, y, rule).relative_ridge == pytest.approx(0.5)
    curve = KernelRegression.decompose(kernel, y).curve(rule.grid)
    assert curve.gcv[:2].isinf().all()
    assert curve.leave_one_out[:2].isinf().all()
    assert curve.train[:2].isnan().all()
    assert all(values[2].isfinite() for values in (curve.train, curve.gcv, curve.leave_one_out))


@pytest.mark.parametrize("rule", [GCV((0.0, 1e-18)), LeaveOneOut((0.0,))])
def test_search_among_nothing_that_works(rule):
    kernel, y = singular()
    with pytest.raises(NotPositiveDefiniteError) as caught:
        regress(kernel, y, rule)
    regress(kernel, y, Absolute(caught.value.suggested_ridge))


@pytest.mark.parametrize("method", ["coefficients", "loo_residuals", "leave_one_out", "gcv", "train_error"])
def test_every_method_refuses_a_ridge_that_is_too_small(method):
    regression = KernelRegression.decompose(*singular())
    with pytest.raises(NotPositiveDefiniteError):
        getattr(regression, method)(0.0)


# ---------------------------------------------------------------- what GCV is for: the error on new data


def power_law(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, their scales i^-0.75 (so that covariance eigenvalues are i^-1.5), the truth, noisy targets."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, 3001, dtype=torch.float64) ** -0.75
    truth = torch.randn(3000, generator=generator, dtype=torch.float64) * scales
    features = torch.randn(n, 3000, generator=generator, dtype=torch.float64) * scales
    return features, scales, truth, features @ truth + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n", "seeds"), [(100, 16), (400, 6)])
def test_gcv_and_leave_one_out_predict_the_test_error(n, seeds):
    penalties = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)  # lambda of the paper, where the ridge is n * lambda
    errors = torch.zeros(len(penalties), 3, dtype=torch.float64)
    for seed in range(seeds):
        features, scales, truth, y = power_law(n, seed)
        regression = KernelRegression.decompose(features @ features.T, y)
        for index, penalty in enumerate(penalties):
            fit = regression.fit(Absolute(n * penalty))
            missed = features.T @ fit.coefficients[:, 0] - truth
            test = float((scales * missed).square().sum()) + 0.01  # expected over all new examples, noise included
            errors[index] += torch.tensor([test, fit.gcv, fit.leave_one_out])
    gcv, leave_one_out = errors[:, 1] / errors[:, 0], errors[:, 2] / errors[:, 0]
    assert ((gcv > 0.85) & (gcv < 1.1)).all(), gcv
    assert ((leave_one_out > 0.85) & (leave_one_out < 1.1)).all(), leave_one_out


def test_gcv_of_a_float32_kernel():
    features, _, _, y = power_law(400, 0)
    kernel = features @ features.T
    exact, rounded = (KernelRegression.decompose(k, y) for k in (kernel, kernel.float()))
    for ridge in (1e-4, 1e-2, 1.0):
        assert rounded.gcv(ridge) == pytest.approx(exact.gcv(ridge), rel=1e-2)


# ---------------------------------------------------------------- what is refused


@both_routes
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": torch.ones(6, 3)}, r"N=6, C=3.*N\*C=18.*\(7, 7\)"),
        ({"targets": torch.ones(7, 3, 1)}, r"targets: expected shape \(N,\) or \(N, C\)"),
        ({"targets": torch.ones(7, 0)}, "targets: expected shape"),
        ({"targets": torch.full((7, 3), float("nan"))}, "targets: some entries are not finite"),
        ({"prior": torch.ones(7, 2)}, r"prior: expected shape \(7, 3\), got \(7, 2\)"),
        ({"prior": torch.full((7, 3), float("inf"))}, "prior: some entries are not finite"),
        ({"kernel": torch.ones(7, 8)}, "square"),
        ({"ridge": "gcv"}, "ridge is a number"),
    ],
)
def test_unusable_fits(fit, change, words):
    problem = Problem()
    arguments = {"kernel": problem.reduced, "targets": problem.y, "ridge": 0.1, "prior": None} | change
    with pytest.raises(InputError, match=words):
        fit(arguments["kernel"], arguments["targets"], arguments["ridge"], prior=arguments["prior"])


def test_unusable_predictions():
    problem = Problem()
    plain = regress(problem.reduced, problem.y, 0.1)
    around = regress(problem.full, problem.y, 0.1, prior=problem.f0)
    with pytest.raises(InputError, match=r"\(M, N\).*N=7.*got \(4, 6\)"):
        plain.predict(problem.cross[:, :6])
    with pytest.raises(InputError, match=r"\(M\*C, N\*C\).*got \(11, 21\)"):
        around.predict(problem.full_cross[:11], problem.f0_new)
    with pytest.raises(InputError, match="not given f0"):
        plain.predict(problem.cross, problem.f0_new)
    with pytest.raises(InputError, match="pass f0"):
        around.predict(problem.full_cross)
    with pytest.raises(InputError, match=r"prior: expected shape \(4, 3\)"):
        around.predict(problem.full_cross, problem.f0_new[:, :2])


# ---------------------------------------------------------------- where GCV says nothing


def noisy(n: int = 60, copies: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A kernel with a wide spectrum, noisy targets, the first examples once more; and new ones, their targets true."""
    draw = torch.Generator().manual_seed(seed)
    x, new = (torch.randn(m, 5, generator=draw, dtype=torch.float64) for m in (n, 300))
    y = torch.sin(2 * x[:, :1]) + 0.5 * torch.randn(n, 1, generator=draw, dtype=torch.float64)
    x, y = torch.cat([x, x[:copies]]), torch.cat([y, y[:copies]])
    kernel, cross = (torch.exp(-torch.cdist(a, x).square() / 2) for a in (x, new))
    return kernel, y, cross, torch.sin(2 * new[:, :1])


@pytest.mark.parametrize("copies", [1, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_do_not_fool_gcv(copies: int, seed: int) -> None:
    """Two copies with one label leave a mode without a residual: the plain score is next to nothing at small ridges."""
    kernel, y, cross, truth = noisy(copies=copies, seed=seed)
    regression = KernelRegression.decompose(kernel, y)
    small, large = 1e-7, 30.0
    assert regression.gcv(small) < 1e-6
    left = y - oracles.leave_one_out(kernel, y, small)
    assert regression.expected_error(small) == pytest.approx(float(left.square().mean()), rel=1e-5)
    assert regression.expected_error(large) == regression.gcv(large)

    fit, other = regression.fit(GCV()), regression.fit(LeaveOneOut())
    errors = [float((f.predict(cross) - truth).square().mean()) + 0.25 for f in (fit, other)]
    assert errors[0] < 1.25 * errors[1]
    assert fit.gcv > 0.2 * errors[0]


def test_rows_that_are_left_out_of_a_full_kernel() -> None:
    """One output of one example at a time, as GCV means it."""
    problem = Problem()
    regression = KernelRegression.decompose(problem.full, problem.y)
    ridge = problem.absolute(True, 0.1)
    left = regression.left_out(ridge / (regression.eigenvalues + ridge))
    rows = len(problem.full)
    alone = problem.full + ridge * torch.eye(rows).double()
    for row in range(0, rows, 5):
        others = [k for k in range(rows) if k != row]
        weights = torch.linalg.solve(alone[others][:, others], problem.y.reshape(-1)[others])
        expected = problem.y.reshape(-1)[row] - problem.full[row, others] @ weights
        torch.testing.assert_close(left[row, 0], expected, rtol=1e-9, atol=1e-12)


def test_a_score_that_is_known_nowhere() -> None:
    class Silent(GCV):
        def score(self, regression: KernelRegression, ridge: float) -> float:
            return float("inf")

    problem = Problem()
    with pytest.raises(InputError, match="says nothing at any ridge of its grid: are examples repeated"):
        regress(problem.reduced, problem.y, Silent())
