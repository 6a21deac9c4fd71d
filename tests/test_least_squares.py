"""Least squares over the parameters: the step that the kernel's regression takes, with and without a preconditioner."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, StoreError
from ntkit.solve import checkpoint  # noqa: F401 (for the process that is killed)
from ntkit.solve.least_squares import LeastSquares
from ntkit.solve.lsmr import LSMR
from ntkit.solve.nystrom import nystrom
from ntkit.solve.precondition import coupling, kronecker
from ntkit.solve.ridge import Absolute
from tests.cases import normal
from tests.test_iterative import C, digits, mlp, seeded, spd

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


@given(st.integers(4, 12), st.integers(4, 12), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None)
def test_every_iteration_is_that_of_scipy(rows: int, columns: int, steps: int, seed: int) -> None:
    a, b = normal(columns, seed=seed)(rows).double(), normal(2, seed=seed + 1)(rows).double()
    state = LSMR.begin(b, lambda u: a.T @ u)
    for _ in range(steps):
        state.step(lambda v: a @ v, lambda u: a.T @ u, atol=0.0, btol=0.0)
    for column in range(2):
        x, _, taken, norm_r, *_ = lsmr(a.numpy(), b[:, column].numpy(), atol=0, btol=0, conlim=0, maxiter=steps)
        assert taken == steps == int(state.steps[column])
        torch.testing.assert_close(state.x[:, column], torch.from_numpy(x), rtol=1e-7, atol=1e-9)
        assert float(state.norm_r[column]) == pytest.approx(norm_r, rel=1e-7)


@pytest.mark.parametrize("solvable", [True, False])
def test_it_stops_where_scipy_does(solvable: bool) -> None:
    """Each of three right-hand sides by itself, one of which is zero; the residual, or that of the normal equations."""
    a, b = normal(20)(30).double(), normal(3, seed=1)(30).double()
    b = a @ b[:20] if solvable else b
    b[:, 1] = 0
    state = LSMR.begin(b, lambda u: a.T @ u)
    for _ in range(100):
        if bool(state.done.all()):
            break
        state.step(lambda v: a @ v, lambda u: a.T @ u, atol=1e-5, btol=1e-5)
    assert state.done.tolist() == [1, 1, 1]
    for column in range(3):
        x, stop, steps, *_ = lsmr(a.numpy(), b[:, column].numpy(), atol=1e-5, btol=1e-5, conlim=0)
        assert (stop, int(state.steps[column])) == (0 if column == 1 else (1 if solvable else 2), steps)
        torch.testing.assert_close(state.x[:, column], torch.from_numpy(x), rtol=1e-5, atol=1e-7)


def test_several_steps_at_once_are_each_by_itself() -> None:
    tangent, (x, r) = network(), examples()
    several = torch.stack([r, torch.zeros_like(r), r.roll(1, 0).abs()], 2)
    found = LeastSquares(1e-9).solve(tangent, x, several, 1e-2)
    assert found.step.shape == (tangent.count, 3)
    assert found.converged
    alone = [LeastSquares(1e-9).solve(tangent, x, several[:, :, i], 1e-2) for i in range(3)]
    for i, one in enumerate(alone):
        torch.testing.assert_close(found.step[:, i], one.step, rtol=1e-6, atol=1e-9)
    assert [one.iterations > 0 for one in alone] == [True, False, True]
    assert found.iterations == max(one.iterations for one in alone)
    assert found.relative_residual == pytest.approx(max(one.relative_residual for one in alone), rel=1e-3)


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


def test_reduced_kernels_and_sketches_save_iterations() -> None:
    torch.manual_seed(0)
    model, x = mlp().double(), digits()[0][:40]
    r = normal(C, seed=3)(40).double()
    tangent = ntkit.linearize(model)
    ridge = 1e-4 * float(ntkit.TangentKernel(tangent, x).diagonal().mean())
    plain = LeastSquares(1e-6, iterations=5000).solve(tangent, x, r, Absolute(ridge))
    assert plain.converged
    pntk = ntkit.TangentKernel(ntkit.linearize(model, readout=ntkit.SumOfLogits()), x)
    trace = ntkit.TangentKernel(tangent, x, trace=True)
    sketch = ntkit.features(tangent, x, size=320, trace=True, generator=seeded())
    for name, kernel, share in (("trace kernel", trace, 0.25), ("pNTK", pntk, 0.4), ("sketch", sketch, 0.3)):
        helper = kronecker(kernel, C, ridge)
        found = LeastSquares(1e-6, preconditioner=helper).solve(tangent, x, r, Absolute(ridge))
        assert found.converged, name
        assert found.iterations <= share * plain.iterations, name


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


# ---------------------------------------------------------------- stopped and resumed


def helped(tangent: ntkit.Tangent, x: Tensor, ridge: float = 0.05) -> Any:
    return kronecker(ntkit.TangentKernel(tangent, x, trace=True), K, ridge)


def test_a_stopped_solve_goes_on(tmp_path: Path) -> None:
    tangent, (x, r), file = network(), examples(), tmp_path / "state"
    several = torch.stack([r, r.roll(1, 0), torch.zeros_like(r)], 2)
    for helper in (None, helped(tangent, x)):
        whole = LeastSquares(1e-10, preconditioner=helper).solve(tangent, x, several, Absolute(0.05))
        first = LeastSquares(1e-10, 5, helper, file).solve(tangent, x, several, Absolute(0.05))
        assert (first.iterations, first.converged) == (5, False)
        again = LeastSquares(1e-10, preconditioner=helper, checkpoint=file).solve(tangent, x, several, Absolute(0.05))
        assert torch.equal(again.step, whole.step)
        assert again.iterations == whole.iterations
        calls: list[int] = []
        LeastSquares(1e-10, preconditioner=helper, checkpoint=file).solve(
            tangent, x, several, Absolute(0.05), progress=calls.append
        )
        assert not calls  # it was finished
        file.unlink()


def test_a_killed_solve_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "state"
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.test_least_squares import *
checkpoint.EVERY = 0.0
def progress(done):
    if done == 9:
        os.kill(os.getpid(), 9)
LeastSquares(1e-10, checkpoint={str(file)!r}).solve(network(), *examples(), 1e-3, progress=progress)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    seen: list[int] = []
    solver = LeastSquares(1e-10, checkpoint=file)
    found = solver.solve(network(), *examples(), 1e-3, progress=seen.append)
    whole = LeastSquares(1e-10).solve(network(), *examples(), 1e-3)
    assert seen == list(range(10, whole.iterations + 1))
    assert found.converged
    torch.testing.assert_close(found.step, whole.step, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    tangent, (x, r), file = network(), examples(), tmp_path / "state"
    solver = LeastSquares(1e-10, 3, checkpoint=file)
    solver.solve(tangent, x, r, Absolute(0.05))
    before = file.read_bytes()
    with pytest.raises(StoreError, match="another right-hand side or ridge"):
        solver.solve(tangent, x, r + 1, Absolute(0.05))
    with pytest.raises(StoreError, match="another right-hand side or ridge"):
        solver.solve(tangent, x, r, Absolute(0.06))
    with pytest.raises(StoreError, match=r"another kernel \(what differs: .*rows"):
        solver.solve(tangent, x + 1, r, Absolute(0.05))
    with pytest.raises(StoreError, match="another preconditioner"):
        LeastSquares(1e-10, 3, helped(tangent, x), file).solve(tangent, x, r, Absolute(0.05))
    with torch.no_grad():
        next(tangent.model.parameters())[0, 0] += 1e-3
    with pytest.raises(StoreError, match=r"another kernel \(what differs: parameters"):
        solver.solve(ntkit.linearize(tangent.model), x, r, Absolute(0.05))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda t, x, r: LeastSquares(0.0), "tolerance between 0 and 1"),
        (lambda t, x, r: LeastSquares(preconditioner=lambda v: v), "with a root"),
        (lambda t, x, r: LeastSquares(iterations=0), "positive number of iterations"),
        (lambda t, x, r: LeastSquares().solve(t, x, r[:5]), "of shape"),
        (lambda t, x, r: LeastSquares().solve(t, x, r[:, :, None, None]), "of shape"),
        (lambda t, x, r: LeastSquares().solve(t, x, r * torch.nan), "not finite"),
        (lambda t, x, r: LeastSquares(preconditioner=kronecker(spd(N), K, 0.1)).solve(t, x, r), "positive ridge"),
    ],
)
def test_refusals(do: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        do(network(), *examples())
