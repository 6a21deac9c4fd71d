"""Least squares over the parameters: the step that the kernel's regression takes, with and without a preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
from ntkit.solve.least_squares import LeastSquares
from ntkit.solve.nystrom import nystrom
from ntkit.solve.precondition import coupling, kronecker
from ntkit.solve.ridge import Absolute
from tests.cases import normal
from tests.test_iterative import seeded, spd

N, K = 12, 3


def network() -> ntkit.Tangent:
    torch.manual_seed(0)
    return ntkit.linearize(nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, K)).double())


def examples() -> tuple[Tensor, Tensor]:
    return normal(5, seed=1)(N).double(), normal(K, seed=2)(N).double()


def test_it_is_the_step_of_the_kernel_regression() -> None:
    tangent, (x, r) = network(), examples()
    rows = tangent.jacobian(x)
    for ridge in (0.5, 1e-3):
        seen: list[int] = []
        found = LeastSquares(1e-12).solve(tangent, x, r, Absolute(ridge), progress=seen.append)
        kernel = rows @ rows.T + ridge * torch.eye(len(rows)).double()
        expected = rows.T @ torch.linalg.solve(kernel, r.reshape(-1))
        torch.testing.assert_close(found.step, expected, rtol=1e-6, atol=1e-8)
        assert found.converged
        assert found.relative_residual < 1e-9
        assert seen == list(range(1, found.iterations + 1))
    relative = LeastSquares(1e-12).solve(tangent, x, r, 0.1)
    assert relative.ridge == pytest.approx(0.1 * float((rows @ rows.T).diagonal().mean()))


def test_without_a_ridge_it_is_the_shortest_least_squares_solution() -> None:
    tangent, (x, r) = network(), examples()
    rows = tangent.jacobian(x)
    found = LeastSquares(1e-13, iterations=2000).solve(tangent, x, r)
    torch.testing.assert_close(found.step, torch.linalg.pinv(rows) @ r.reshape(-1), rtol=1e-4, atol=1e-5)
    # more rows than parameters: the residual stays, and is said
    few = ntkit.linearize(tangent.model, parameters="2.bias")
    left = LeastSquares(1e-12).solve(few, x, r)
    torch.testing.assert_close(left.step, r.mean(0), rtol=1e-6, atol=1e-8)
    assert left.relative_residual == pytest.approx(float((r - r.mean(0)).norm() / r.norm()))


def test_a_preconditioner_changes_the_iterations_and_not_the_answer() -> None:
    tangent, (x, r) = network(), examples()
    ridge = 1e-4 * float(ntkit.TangentKernel(tangent, x).diagonal().mean())
    outputs = coupling(tangent, x, generator=seeded())
    trace = ntkit.TangentKernel(tangent, x, trace=True)
    sketch = ntkit.features(tangent, x, size=9, trace=True, generator=seeded())
    plain = LeastSquares(1e-11, iterations=5000).solve(tangent, x, r, Absolute(ridge))
    for kernel in (trace, sketch):
        helper = kronecker(kernel, outputs, ridge)
        found = LeastSquares(1e-11, iterations=5000, preconditioner=helper).solve(tangent, x, r, Absolute(ridge))
        torch.testing.assert_close(found.step, plain.step, rtol=1e-4, atol=1e-6)
        if kernel is trace:
            assert found.iterations < plain.iterations / 2


def test_a_nystrom_preconditioner() -> None:
    tangent, (x, r) = network(), examples()
    kernel = ntkit.TangentKernel(tangent, x)
    ridge = 1e-3 * float(kernel.diagonal().mean())
    plain = LeastSquares(1e-11, iterations=5000).solve(tangent, x, r, Absolute(ridge))
    base = kronecker(ntkit.TangentKernel(tangent, x, trace=True), K, ridge)
    for helper in (
        nystrom(kernel, ridge, examples=4, generator=seeded()),
        nystrom(kernel, ridge, examples=4, generator=seeded(), base=base),
    ):
        found = LeastSquares(1e-11, iterations=5000, preconditioner=helper).solve(tangent, x, r, Absolute(ridge))
        torch.testing.assert_close(found.step, plain.step, rtol=1e-4, atol=1e-6)
        assert found.iterations < plain.iterations


def test_float32_promises_no_more_than_it_keeps() -> None:
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, K))
    x, r = examples()
    found = LeastSquares(1e-10, iterations=500).solve(ntkit.linearize(model), x.float(), r, 1e-4)
    assert found.relative_residual > 1e-9
    assert not found.converged


@given(st.integers(1, 9), st.integers(1, 4), st.floats(0.01, 3), st.integers(0, 99))
@settings(deadline=None)
def test_the_root_is_the_root(n: int, c: int, ridge: float, seed: int) -> None:
    phi, outputs = normal(5, seed=seed)(n).double(), spd(c, seed + 1)
    right = normal(2, seed=seed + 2)(n * c).double()
    for kernel in (phi @ phi.T, ntkit.FeatureKernel(phi)):
        whole = kronecker(kernel, outputs, ridge)
        half = whole.root()
        torch.testing.assert_close(half(half(right)), whole(right), rtol=1e-6, atol=1e-6)


def test_too_few_iterations_are_admitted() -> None:
    tangent, (x, r) = network(), examples()
    found = LeastSquares(1e-12, iterations=3).solve(tangent, x, r, 1e-4)
    assert not found.converged
    assert found.iterations == 3
    assert found.relative_residual > 1e-6


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda t, x, r: LeastSquares(0.0), "tolerance between 0 and 1"),
        (lambda t, x, r: LeastSquares(preconditioner=lambda v: v), "with a root"),
        (lambda t, x, r: LeastSquares(iterations=0), "positive number of iterations"),
        (lambda t, x, r: LeastSquares().solve(t, x, r[:5]), "of shape"),
        (lambda t, x, r: LeastSquares().solve(t, x, r * torch.nan), "not finite"),
        (lambda t, x, r: LeastSquares(preconditioner=kronecker(spd(N), K, 0.1)).solve(t, x, r), "positive ridge"),
    ],
)
def test_refusals(do: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        do(network(), *examples())
