"""Closed forms of training with a fixed kernel: against explicit iteration of a linear model, and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntkit import empirical_ntk
from ntkit.errors import InputError
from ntkit.kernel.base import Kernel
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.features import FeatureKernel, features
from ntkit.kernel.infinite import InfiniteWidth, Standard, infinite_ntk
from ntkit.solve.course import Converged, Course, GradientDescent, GradientFlow, MomentumDescent, Ridge
from ntkit.solve.evolve import evolve
from ntkit.solve.flow import KernelFlow
from ntkit.solve.losses import CrossEntropy, SquareLoss
from ntkit.solve.regression import KernelRegression, regress
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import SumOfLogits
from tests.test_regression import Problem, noisy

few = settings(max_examples=20, deadline=None)
problems = st.builds(
    Problem, n=st.integers(2, 7), m=st.integers(1, 4), c=st.integers(1, 3), p=st.just(60), seed=st.integers(0, 2**16)
)
shapes = pytest.mark.parametrize("full", [False, True], ids=["reduced", "full"])
means = pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])


class Linear:
    """f(x) = f0(x) + phi(x) w with the features behind a problem's full kernel, trained by torch."""

    def __init__(self, problem: Problem) -> None:
        generator = torch.Generator().manual_seed(1)
        n, m, c = problem.n, problem.m, problem.c
        self.phi = torch.randn(n * c, 60, generator=generator, dtype=torch.float64)
        self.phi_new = torch.randn(m * c, 60, generator=generator, dtype=torch.float64)
        self.problem = problem
        self.kernel, self.cross = self.phi @ self.phi.T, self.phi_new @ self.phi.T

    def train(self, steps: int, rate: float, *, mean: bool, **options: float | bool) -> tuple[Tensor, Tensor, float]:
        """Outputs on old and new examples, and how far the weights have moved."""
        w = torch.nn.Parameter(torch.zeros(60, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=rate, **options)  # type: ignore[arg-type]
        p = self.problem
        for _ in range(steps):
            optimizer.zero_grad()
            misfit = (self.phi @ w).view(p.n, p.c) + p.f0 - p.y
            loss = 0.5 * misfit.square().sum() / (p.n if mean else 1)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            old, new = (self.phi @ w).view(p.n, p.c) + p.f0, (self.phi_new @ w).view(p.m, p.c) + p.f0_new
            return old, new, float(w.norm())


@means
@pytest.mark.parametrize(
    ("steps", "options"),
    [(0, {}), (1, {}), (40, {}), (40, {"momentum": 0.9}), (40, {"momentum": 0.8, "nesterov": True})],
)  # fmt: skip
def test_steps_of_torch(mean: bool, steps: int, options: dict) -> None:
    """t steps of `torch.optim.SGD` on the linear model, to 1e-12: outputs, new outputs, parameters, loss."""
    problem = Problem()
    linear = Linear(problem)
    flow = KernelFlow.decompose(linear.kernel, problem.y, prior=problem.f0, mean=mean)
    rate = 0.7 * flow.largest_learning_rate()
    course: Course = MomentumDescent(steps, rate, **options) if options else GradientDescent(steps, rate)
    old, new, distance = linear.train(steps, rate, mean=mean, **options)
    scale = float(problem.y.abs().max())
    torch.testing.assert_close(problem.y - flow.residuals(course), old, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(flow.predict(linear.cross, course, problem.f0_new), new, rtol=0, atol=1e-12 * scale)
    assert flow.displacement(course) == pytest.approx(distance, rel=1e-9, abs=1e-12)
    loss = 0.5 * float((old - problem.y).square().sum()) / (problem.n if mean else 1)
    assert flow.loss(course) == pytest.approx(loss, rel=1e-9)


@means
def test_flow_is_the_limit_of_small_steps(mean: bool) -> None:
    problem = Problem()
    linear = Linear(problem)
    flow = KernelFlow.decompose(linear.kernel, problem.y, prior=problem.f0, mean=mean)
    time = 3 * flow.largest_learning_rate()
    exact = flow.predict(linear.cross, GradientFlow(time), problem.f0_new)
    errors = []
    for steps in (1000, 2000):
        old, new, _ = linear.train(steps, time / steps, mean=mean)
        errors.append(float((new - exact).norm()))
        assert float((old - problem.y + flow.residuals(GradientFlow(time))).norm()) < 0.1
    assert 0.4 < errors[1] / errors[0] < 0.6  # first order in the step


@shapes
@few
@given(problem=problems, times=st.tuples(st.floats(0, 3), st.floats(0, 3)))
def test_semigroup(full: bool, problem: Problem, times: tuple[float, float]) -> None:
    """Training for s and then for t is training for s + t."""
    kernel, _ = problem.kernels(full)
    unit = 1 / float(torch.linalg.eigvalsh(kernel).max())
    s, t = (time * unit for time in times)
    first = KernelFlow.decompose(kernel, problem.y, prior=problem.f0, mean=False)
    there = problem.y - first.residuals(GradientFlow(s))
    second = KernelFlow.decompose(kernel, problem.y, prior=there, mean=False)
    torch.testing.assert_close(
        second.residuals(GradientFlow(t)), first.residuals(GradientFlow(s + t)), rtol=1e-9, atol=1e-10
    )


@shapes
@few
@given(problem=problems)
def test_begins_at_the_network_and_ends_at_the_solve(full: bool, problem: Problem) -> None:
    kernel, cross = problem.kernels(full)
    flow = KernelFlow.decompose(kernel, problem.y, prior=problem.f0)
    start = flow.predict(cross, GradientFlow(0.0), problem.f0_new)
    torch.testing.assert_close(start, problem.f0_new)
    end = regress(kernel, problem.y, 0.0, prior=problem.f0).predict(cross, problem.f0_new)
    late = flow.predict(cross, GradientFlow(1e3 / float(flow.eigenvalues.min())), problem.f0_new)
    for found in (late, flow.predict(cross, Converged(), problem.f0_new)):
        torch.testing.assert_close(found, end, rtol=1e-6, atol=1e-6 * float(end.abs().max()))


@few
@given(problem=problems, exponent=st.floats(-3, 1))
def test_ridge_is_a_course(problem: Problem, exponent: float) -> None:
    ridge = 10.0**exponent
    flow = KernelFlow.decompose(problem.reduced, problem.y, prior=problem.f0, mean=False)
    found = KernelRegression.decompose(problem.reduced, problem.y, prior=problem.f0)
    torch.testing.assert_close(flow.coefficients(Ridge(ridge)), found.coefficients(ridge), rtol=1e-8, atol=1e-10)
    assert flow.gcv(Ridge(ridge)) == pytest.approx(found.gcv(ridge), rel=1e-8)


def test_one_example_by_hand() -> None:
    """f_t = y + (f0 - y) exp(-k t)."""
    flow = KernelFlow.decompose(torch.tensor([[2.0]]).double(), torch.tensor([3.0]), prior=torch.tensor([1.0]))
    found = 3.0 - float(flow.residuals(GradientFlow(0.4)))
    assert found == pytest.approx(3 - 2 * torch.exp(torch.tensor(-0.8).double()).item())


def test_repeated_examples() -> None:
    """A singular kernel: the mode that no data moves stays, and nothing is divided by zero."""
    x = torch.tensor([[1.0], [1.0]]).double()
    flow = KernelFlow.decompose(x @ x.T, torch.tensor([[1.0], [3.0]]).double(), mean=False)
    for course in (Converged(), GradientFlow(1e6), GradientDescent(10**6, 0.5), MomentumDescent(10**6, 0.5, 0.5)):
        fitted = torch.tensor([[1.0], [3.0]]).double() - flow.residuals(course)
        torch.testing.assert_close(fitted, torch.full((2, 1), 2.0).double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(flow.predict(x @ x.T, course), fitted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("course", [GradientDescent(7, 0.01), MomentumDescent(7, 0.01, 0.9), GradientFlow(0.07)])
def test_small_eigenvalues_lose_nothing(course: Course) -> None:
    """(1 - left) / l is smooth at zero: its value at 1e-12 is its limit."""
    values = torch.tensor([0.0, 1e-12, 1e-9], dtype=torch.float64)
    moved = course.moved(values)
    torch.testing.assert_close(moved[1:], moved[:1].expand(2), rtol=1e-8, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_largest_learning_rate(momentum: float, nesterov: bool) -> None:
    problem = Problem()
    flow = KernelFlow.decompose(problem.reduced, problem.y)
    limit = flow.largest_learning_rate(momentum, nesterov=nesterov)
    for factor, diverges in ((0.99, False), (1.01, True)):
        left = MomentumDescent(5000, factor * limit, momentum, nesterov).left(flow.eigenvalues)
        assert bool((left.abs().max() > 1) | left.isnan().any()) == diverges


def test_gcv_by_the_definition() -> None:
    """n mean ||(I - S) r||^2 / tr(I - S)^2 with the matrix S that makes fits of residuals."""
    problem = Problem()
    flow = KernelFlow.decompose(problem.reduced, problem.y, prior=problem.f0)
    course = GradientFlow(2 * flow.largest_learning_rate())
    rest = torch.linalg.matrix_exp(-problem.reduced / problem.n * course.time)
    residual = rest @ (problem.y - problem.f0)
    expected = float(residual.square().sum(1).mean()) / float(rest.diagonal().mean()) ** 2
    assert flow.gcv(course) == pytest.approx(expected, rel=1e-10)


def test_stops_where_new_examples_are_predicted_best() -> None:
    """Noisy targets: training to the end costs much, and GCV stops near the best time without seeing a test set."""
    generator = torch.Generator().manual_seed(0)
    n, p = 120, 400
    spread = torch.arange(1, p + 1, dtype=torch.float64).pow(-1.0)
    phi = torch.randn(2 * n, p, generator=generator, dtype=torch.float64) * spread
    truth = torch.randn(p, 1, generator=generator, dtype=torch.float64)
    clean = phi @ truth
    y = clean[:n] + 0.5 * clean.std() * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    flow = KernelFlow.decompose(phi[:n] @ phi[:n].T, y)
    stop = flow.best()

    def error(course: Course) -> float:
        return float((flow.predict(phi[n:] @ phi[:n].T, course) - clean[n:]).square().mean())

    errors = torch.tensor([error(course) for course in stop.courses])
    assert error(stop.course) < 1.3 * float(errors.min())
    assert error(Converged()) > 2 * error(stop.course)
    noise = 0.25 * float(clean.std()) ** 2
    assert stop.gcv == pytest.approx(error(stop.course) + noise, rel=0.3)  # noise included


@pytest.mark.parametrize("copies", [0, 1, 6])
def test_stopping_is_not_fooled_by_chance_or_copies(copies: int) -> None:
    """Late in training one or two modes are left; with copies of examples in one of them there is no residual."""
    fooled = 0
    for seed in range(12):
        kernel, y, cross, truth = noisy(copies=copies, seed=seed)
        flow = KernelFlow.decompose(kernel, y)
        stop = flow.best()
        errors = [float((flow.predict(cross, course) - truth).square().mean()) + 0.25 for course in stop.courses[::5]]
        mine = float((flow.predict(cross, stop.course) - truth).square().mean()) + 0.25
        assert mine < 1.2 * min(errors)
        assert stop.gcv > 0.2 * mine
        fooled += min(map(flow.gcv, stop.courses)) < 0.2 * mine
    assert fooled == 12 or not copies  # the plain score is


@pytest.mark.parametrize("time", [1e4, 6e4])  # beside copies 1e-3 is left of the others, and 1e-16
@pytest.mark.parametrize("copies", [0, 3])
def test_the_expected_error_is_gcv_or_leave_one_out(copies: int, time: float) -> None:
    kernel, y, _, _ = noisy(copies=copies)
    flow = KernelFlow.decompose(kernel, y)
    early, late = GradientFlow(0.01), GradientFlow(time)
    assert flow.expected_error(early) == flow.gcv(early)
    values, vectors = torch.linalg.eigh(kernel)
    smoother = (vectors * torch.exp(-values.clamp_min(0) / len(y) * time)) @ vectors.T
    missed = float(((smoother @ y) / smoother.diagonal()[:, None]).square().mean())
    if copies:
        assert flow.gcv(late) < 1e-3 * missed
        assert flow.expected_error(late) == pytest.approx(missed, rel=1e-4)
    with pytest.raises(InputError, match="known on none of these courses"):
        flow.best([GradientFlow(1e30)])


def test_ensemble_covariance() -> None:
    """The covariance of f0(x) - F f0(X) for any joint covariance of f0; that of the training examples goes to zero."""
    problem = Problem()
    flow = KernelFlow.decompose(problem.reduced, problem.y)
    n, m = problem.n, problem.m
    root = torch.randn(n + m, n + m, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    first = root @ root.T
    course = GradientFlow(3 * flow.largest_learning_rate())
    linear = torch.stack(
        [flow_of(problem.reduced, column, problem.cross, course) for column in torch.eye(n).double()], 1
    )
    both = torch.cat([-linear, torch.eye(m).double()], 1)
    found = flow.covariance(course, problem.cross, first[:n, :n], first[n:, :n], first[n:, n:])
    torch.testing.assert_close(found, both @ first @ both.T)
    late = flow.covariance(Converged(), problem.reduced, first[:n, :n], first[:n, :n], first[:n, :n])
    assert float(late.abs().max()) < 1e-6 * float(first.abs().max())


class Wide(nn.Module):
    """f(x) = sqrt(2 / width) v relu(W x), all weights standard normal, whose limit is known in closed form."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.W = nn.Parameter(torch.randn(width, 3, generator=generator, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(width, 1, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (2 / self.v.shape[0]) ** 0.5 * nn.functional.linear(x, self.W).relu() @ self.v


def limits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels of `Wide` at infinite width between examples of norm 1: of f0 (NNGP), and of the gradients (NTK)."""
    cosine = (x @ x.T).clamp(-1, 1)
    angle = torch.arccos(cosine)
    first = ((1 - cosine**2).clamp_min(0).sqrt() + (math.pi - angle) * cosine) / math.pi
    return first, first + cosine * (math.pi - angle) / math.pi


def test_the_limit_written_out_is_that_of_the_library() -> None:
    x = nn.functional.normalize(
        torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1
    )
    found = infinite_ntk(Wide(64, 0), x, kind="both", weight_std={"W": 3**0.5, "v": 8.0}, parametrization=Standard())
    first, kernel = limits(x)
    torch.testing.assert_close(found.nngp, first, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.ntk, kernel, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("moved", [0.3, 3.0])
def test_ensemble_of_wide_networks(moved: float) -> None:
    """200 wide networks, each linearised and trained from its own start: mean and covariance within sampling error."""
    generator = torch.Generator().manual_seed(0)
    x = nn.functional.normalize(torch.randn(8, 3, generator=generator, dtype=torch.float64), dim=1)
    y = torch.randn(5, 1, generator=generator, dtype=torch.float64)
    first, kernel = limits(x)
    flow = KernelFlow.decompose(kernel[:5, :5], y)
    course = GradientFlow(moved / float(flow.eigenvalues.median()))
    found = flow.ensemble(course, kernel[5:, :5], first[:5, :5], first[5:, :5], first[5:, 5:])
    seen = []
    for seed in range(200):
        model = Wide(1024, seed)
        own, f0 = empirical_ntk(model, x), model(x).detach()
        one = KernelFlow.decompose(own[:5, :5], y, prior=f0[:5])
        seen.append(one.predict(own[5:, :5], course, f0[5:])[:, 0])
    outputs = torch.stack(seen)
    spread = found.covariance.diagonal()
    assert float(((outputs.mean(0) - found.mean[:, 0]) / (spread / 200).sqrt()).abs().max()) < 3
    error = ((spread[:, None] * spread + found.covariance.square()) / 200).sqrt()
    assert float(((torch.cov(outputs.T) - found.covariance) / error).abs().max()) < 3
    assert float((first[5:, 5:].diagonal() / spread).min()) > 1.05  # training has narrowed it
    torch.testing.assert_close(found.deviation, spread.sqrt()[:, None])


@pytest.mark.parametrize("kind", ["pNTK", "sketch of the trace kernel", "infinite width"])
def test_kernels_of_the_library(kind: str) -> None:
    """Reduced, sketched and infinite-width kernels, as they are: against explicit steps with their matrices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    both = torch.randn(11, 4, dtype=torch.float64)
    x, new, y = both[:7], both[7:], torch.randn(7, 3, dtype=torch.float64)
    kernel: Kernel | Tensor
    if kind == "pNTK":
        tangent = linearize(model, readout=SumOfLogits())
        kernel, cross = TangentKernel(tangent, x), TangentKernel(tangent, new, x).dense()
        whole, across = kernel.dense(), cross
    elif kind == "sketch of the trace kernel":
        made = features(linearize(model), both, size=64, trace=True, generator=torch.Generator().manual_seed(1))
        rows = made.features()
        kernel, whole, across = FeatureKernel(rows[:7]), rows[:7] @ rows[:7].T, rows[7:] @ rows[:7].T
    else:
        limit = InfiniteWidth(model)
        kernel, whole, across = limit(x), limit(x).dense(), limit(new, x).dense()
    f0, f0_new = model(x).detach(), model(new).detach()
    flow = KernelFlow.decompose(kernel, y, prior=f0)
    rate = 0.5 * flow.largest_learning_rate()
    old, fresh = f0, f0_new
    for _ in range(30):
        pull = rate / 7 * (y - old)
        old, fresh = old + whole @ pull, fresh + across @ pull
    course = GradientDescent(30, rate)
    torch.testing.assert_close(y - flow.residuals(course), old, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.predict(across, course, f0_new), fresh, rtol=0, atol=1e-12)
    time = 5 * rate
    run = evolve(kernel, y, SquareLoss(), [time], prior=f0)
    torch.testing.assert_close(
        run.predict(across, f0_new), flow.predict(across, GradientFlow(time), f0_new), rtol=0, atol=1e-6
    )
    labels = torch.arange(7) % 3
    learned = evolve(kernel, labels, CrossEntropy(), [time], prior=f0)
    old, steps = f0, 4000
    for _ in range(steps):
        old = old + time / steps / 7 * whole @ (nn.functional.one_hot(labels, 3) - old.softmax(1))
    torch.testing.assert_close(learned.outputs[-1], old, rtol=0, atol=2e-3)


def flow_of(kernel: Tensor, targets: Tensor, cross: Tensor, course: Course) -> Tensor:
    return KernelFlow.decompose(kernel, targets).predict(cross, course)[:, 0]


def test_bad_input() -> None:
    problem = Problem()
    flow = KernelFlow.decompose(problem.reduced, problem.y, prior=problem.f0)
    with pytest.raises(InputError, match="pass f0 of the new examples"):
        flow.predict(problem.cross, GradientFlow(1.0))
    with pytest.raises(InputError, match="diverges"):
        flow.residuals(GradientDescent(10**6, 100 * flow.largest_learning_rate()))
    with pytest.raises(InputError, match="Converged"):
        GradientFlow(float("inf"))
    with pytest.raises(InputError, match="steps"):
        GradientDescent(-1, 0.1)
    with pytest.raises(InputError, match="learning_rate"):
        GradientDescent(1, 0.0)
    with pytest.raises(InputError, match="momentum"):
        MomentumDescent(1, 0.1, 1.0)
    with pytest.raises(InputError, match="ridge"):
        Ridge(0.0)
    for whole in (torch.arange(problem.n), np.arange(problem.n)):
        with pytest.raises(InputError, match="may be classes or points"):
            KernelFlow.decompose(problem.reduced, whole)
    with pytest.raises(InputError, match="at least one course"):
        flow.best([])
    for asked in (KernelFlow.times, KernelFlow.largest_learning_rate):
        with pytest.raises(InputError, match="the kernel is zero"):
            asked(KernelFlow.decompose(0 * problem.reduced, problem.y))
    with pytest.raises(InputError, match="first_cross"):
        flow.covariance(GradientFlow(1.0), problem.cross, problem.reduced, problem.reduced, problem.reduced)
