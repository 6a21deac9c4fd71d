"""Kernel flow for any loss: the closed form for squares, steps of torch for cross-entropy, and laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.course import GradientFlow
from ntkit.solve.evolve import evolve
from ntkit.solve.flow import KernelFlow
from ntkit.solve.losses import CrossEntropy, SquareLoss
from tests.elsewhere import DEVICE, device
from tests.test_regression import Problem

shapes = pytest.mark.parametrize("full", [False, True], ids=["reduced", "full"])
means = pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])


@shapes
@means
def test_squares_in_closed_form(full: bool, mean: bool) -> None:
    problem = Problem()
    kernel, cross = problem.kernels(full)
    flow = KernelFlow.decompose(kernel, problem.y, prior=problem.f0, mean=mean)
    times = [0.0, *(torch.tensor([0.5, 2.0]) * flow.largest_learning_rate()).tolist()]
    found = evolve(kernel, problem.y, SquareLoss(), times, prior=problem.f0, mean=mean)
    for at, time in enumerate(times):
        torch.testing.assert_close(found.outputs[at], problem.y - flow.residuals(GradientFlow(time)), rtol=0, atol=1e-6)
        exact = flow.predict(cross, GradientFlow(time), problem.f0_new)
        torch.testing.assert_close(found.predict(cross, problem.f0_new, at=at), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
@means
def test_cross_entropy_is_the_limit_of_steps(soft: bool, mean: bool) -> None:
    """Small steps of torch on the linear softmax model with this kernel come nearer in proportion to their size."""
    generator = torch.Generator().manual_seed(2)
    n, c, p = 6, 3, 8
    phi, new = (torch.randn(k, p, generator=generator, dtype=torch.float64) for k in (n, 4))
    y: Tensor = torch.randint(c, (n,), generator=generator)
    if soft:
        y = torch.rand(n, c, generator=generator, dtype=torch.float64).softmax(1)
    time = 2.0
    run = evolve(phi @ phi.T, y, CrossEntropy(), [time], prior=torch.zeros(n, c), mean=mean)
    errors = []
    for steps in (400, 800):
        w = torch.nn.Parameter(torch.zeros(p, c, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=time / steps)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(phi @ w, y, reduction="mean" if mean else "sum").backward()
            optimizer.step()
        errors.append(float((new @ w.detach() - run.predict(new @ phi.T, torch.zeros(4, c))).norm()))
    assert errors[0] < 0.05
    assert 0.45 < errors[1] / errors[0] < 0.55


def test_stops_on_the_way_change_nothing() -> None:
    problem = Problem()
    y = torch.arange(problem.n) % problem.c
    whole = evolve(problem.reduced, y, CrossEntropy(), [0.5], prior=problem.f0)
    parts = evolve(problem.reduced, y, CrossEntropy(), [0.1, 0.1, 0.3, 0.5], prior=problem.f0)
    torch.testing.assert_close(parts.outputs[-1], whole.outputs[-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.outputs[0], parts.outputs[1])
    torch.testing.assert_close(whole.predict(problem.reduced, problem.f0), whole.outputs[-1])


@shapes
def test_a_kernel_on_a_device(full: bool) -> None:
    """The kernel is multiplied with where it is; what is given and what comes out is on the CPU or there."""
    problem = Problem()
    kernel, cross = problem.kernels(full)
    y = torch.arange(problem.n) % problem.c
    expected = evolve(kernel, y, CrossEntropy(), [0.2, 0.5], prior=problem.f0)
    with device():
        for where in ("cpu", DEVICE):
            there, prior = kernel.to(DEVICE), problem.f0.to(where)
            found = evolve(there, y.to(where), CrossEntropy(), [0.2, 0.5], prior=prior)
            said = found.predict(cross.to(DEVICE), problem.f0_new.to(DEVICE)).cpu()
            torch.testing.assert_close(found.outputs, expected.outputs)
            torch.testing.assert_close(said, expected.predict(cross, problem.f0_new))


def test_bad_input() -> None:
    problem = Problem()
    y = torch.arange(problem.n) % problem.c
    with pytest.raises(InputError, match="how many outputs"):
        evolve(problem.reduced, y, CrossEntropy(), [1.0])
    with pytest.raises(InputError, match="do not decrease"):
        evolve(problem.reduced, y, CrossEntropy(), [1.0, 0.5], prior=problem.f0)
    with pytest.raises(InputError, match="classes are numbers"):
        evolve(problem.reduced, y + 5, CrossEntropy(), [1.0], prior=problem.f0)
    with pytest.raises(InputError, match="sum to 1"):
        evolve(problem.reduced, problem.y.abs(), CrossEntropy(), [1.0], prior=problem.f0)
    with pytest.raises(InputError, match="gave up at time"):
        evolve(problem.reduced, y, CrossEntropy(), [1e6], prior=problem.f0, evaluations=500)
    with pytest.raises(InputError, match="has 7 or 21 rows"):
        evolve(problem.reduced[:5, :5], y, CrossEntropy(), [1.0], prior=problem.f0)
