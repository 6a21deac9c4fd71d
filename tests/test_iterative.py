"""Conjugate gradients: the dense answer from products alone, in far fewer of them with a preconditioner."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, ModelError, StoreError
from ntkit.kernel.matrixfree import MatrixFreeKernel
from ntkit.solve import checkpoint
from ntkit.solve.coarse import recommended
from ntkit.solve.iterative import ConjugateGradients
from ntkit.solve.precondition import coupling, kronecker
from ntkit.solve.ridge import Absolute, Relative
from tests.cases import CASES, Case, Net, normal, weight
from tests.test_exactness import announced

N, C = 60, 10


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spd(n: int, seed: int = 0) -> Tensor:
    rows = normal(n, seed=seed)(n).double()
    return rows @ rows.T / n


# ---------------------------------------------------------------- the answer


@given(st.integers(1, 30), st.integers(1, 4), st.floats(1e-3, 10.0), st.integers(0, 99))
@settings(deadline=None)
def test_it_is_the_dense_solve(n: int, r: int, ridge: float, seed: int) -> None:
    matrix, y = spd(n, seed), normal(r, seed=seed + 1)(n).double()
    found = ConjugateGradients(tolerance=1e-11).solve(matrix, y, Absolute(ridge))
    expected = torch.linalg.solve(matrix + ridge * torch.eye(n).double(), y)
    torch.testing.assert_close(found.value, expected, rtol=1e-6, atol=1e-7)
    assert found.converged
    assert found.relative_residual < 1e-9
    assert len(found.history) == found.iterations


def test_columns_do_not_disturb_each_other() -> None:
    """One that is zero, one that is solved at once, and one that takes its time."""
    values = torch.linspace(1, 50, 40, dtype=torch.float64)
    y = torch.stack([torch.zeros(40), torch.eye(40)[3], torch.ones(40)], 1).double()
    found = ConjugateGradients(tolerance=1e-10).solve(torch.diag(values), y)
    torch.testing.assert_close(found.value, y / values[:, None], rtol=1e-8, atol=1e-9)
    assert found.value[:, 0].equal(torch.zeros(40, dtype=torch.float64))


def test_a_vector_stays_a_vector_and_a_relative_ridge_is_relative() -> None:
    matrix, y = 7.0 * spd(12), normal(1)(12).double()[:, 0]
    found = ConjugateGradients(tolerance=1e-11).solve(matrix, y, 0.1)
    assert found.ridge == pytest.approx(0.1 * float(matrix.diagonal().mean()))
    torch.testing.assert_close((matrix + found.ridge * torch.eye(12).double()) @ found.value, y, rtol=1e-6, atol=1e-6)


def test_too_few_iterations_are_admitted() -> None:
    found = ConjugateGradients(tolerance=1e-10, iterations=3).solve(spd(40), normal(1)(40), Absolute(1e-6))
    assert not found.converged
    assert found.iterations == 3
    true = (spd(40) + 1e-6 * torch.eye(40).double()) @ found.value - normal(1)(40)
    assert found.relative_residual == pytest.approx(float(true.norm() / normal(1)(40).norm()), rel=1e-6)


def test_products_in_float32_are_led_back_by_a_kernel_in_float64(tmp_path: Path) -> None:
    matrix, y = spd(60) + torch.ones(60, 60).double(), normal(2)(60).double()
    asked: list[int] = []

    class Single(ntkit.DenseKernel):
        def __matmul__(self, other: Tensor) -> Tensor:
            return (matrix.float() @ other.float()).double()

    class Exact(ntkit.DenseKernel):
        def __matmul__(self, other: Tensor) -> Tensor:
            asked.append(1)
            return super().__matmul__(other)

    single, solver = Single(matrix.float()), ConjugateGradients(tolerance=1e-10, iterations=400)
    alone = solver.solve(single, y, Absolute(0.1))
    assert not alone.converged
    found = solver.solve(single, y, Absolute(0.1), exact=Exact(matrix))
    assert found.converged
    assert found.relative_residual <= 1e-10
    assert len(asked) < 12
    assert found.relative_residual == pytest.approx(
        float(((matrix + 0.1 * torch.eye(60).double()) @ found.value - y).norm(dim=0).div(y.norm(dim=0)).max()),
        rel=1e-3,
    )
    torch.testing.assert_close(
        found.value, torch.linalg.solve(matrix + 0.1 * torch.eye(60).double(), y), rtol=1e-5, atol=1e-6
    )
    file = tmp_path / "state"
    kwargs: dict[str, Any] = {"exact": Exact(matrix)}
    ConjugateGradients(1e-10, 30, checkpoint=file).solve(single, y, Absolute(0.1), **kwargs)
    again = ConjugateGradients(1e-10, 400, checkpoint=file).solve(single, y, Absolute(0.1), **kwargs)
    assert again.history == found.history
    with pytest.raises(InputError, match="another shape"):
        solver.solve(single, y, exact=matrix[:5, :5])


def test_what_float32_takes_for_solved_is_judged_when_the_exact_kernel_comes(tmp_path: Path) -> None:
    matrix, y, file = spd(60) + torch.ones(60, 60).double(), normal(2)(60).double(), tmp_path / "state"

    class Single(ntkit.DenseKernel):
        def __matmul__(self, other: Tensor) -> Tensor:
            return (matrix.float() @ other.float()).double()

    first = ConjugateGradients(1e-10, 70, checkpoint=file).solve(Single(matrix), y, Absolute(0.1))
    assert first.history[-1] < first.relative_residual / 10  # it believes in more than it has
    then = ConjugateGradients(1e-10, 400, checkpoint=file).solve(Single(matrix), y, Absolute(0.1), exact=matrix)
    assert then.converged


def test_an_older_checkpoint_is_read(tmp_path: Path) -> None:
    file, y = tmp_path / "state", normal(2)(60).double()
    whole = ConjugateGradients(1e-10).solve(spd(60), y, Absolute(0.01))
    ConjugateGradients(1e-10, 7, checkpoint=file).solve(spd(60), y, Absolute(0.01))
    with_facts(file, {"name", "history"})
    again = ConjugateGradients(1e-10, checkpoint=file).solve(spd(60), y, Absolute(0.01))
    assert again.history == whole.history


def test_the_diagonal_is_computed_where_it_matters() -> None:
    class NoDiagonal(ntkit.DenseKernel):
        def diagonal(self) -> Tensor:
            raise AssertionError

    y = normal(1)(9)
    for ridge in (Absolute(0.1), 0.0):
        ConjugateGradients().solve(NoDiagonal(spd(9)), y, ridge)
    with pytest.raises(AssertionError):
        ConjugateGradients().solve(NoDiagonal(spd(9)), y, 0.1)


# ---------------------------------------------------------------- products alone


@pytest.mark.parametrize("case", [case for case in CASES[::6] if case.slow_route is False], ids=lambda case: case.name)
def test_products_are_those_of_the_matrix(case: Case) -> None:
    x1, x2 = case.data(5), case.data(4)
    with announced(slow=None):
        tangent = ntkit.linearize(case.build(), readout=ntkit.Logits(select=case.select), parameters=case.parameters)
        for other in (None, x2):
            free, dense = MatrixFreeKernel(tangent, x1, other), ntkit.TangentKernel(tangent, x1, other).dense()
            vectors = normal(2)(dense.shape[1]).double()
            if case.name == "embedding/bag_padding_idx":
                with pytest.raises(ModelError, match="differentiate twice"):
                    free @ vectors
                continue
            torch.testing.assert_close(free @ vectors, dense @ vectors, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(free @ vectors[:, 0], dense @ vectors[:, 0], rtol=1e-8, atol=1e-8)


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x)[:N] / 16, torch.from_numpy(y)[:N]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, C))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, C),
    )  # fmt: skip


def transformer() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.layer(m.stem(x.view(-1, 8, 8)) + m.place).mean(1)), stem=nn.Linear(8, 32),
        place=weight(8, 32), layer=nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
        head=nn.Linear(32, C),
    )  # fmt: skip


def trained(model: nn.Module) -> nn.Module:
    x, y = digits()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("state", ["as built", "trained"])
@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_a_preconditioned_solve_needs_a_quarter_of_the_iterations(make: Callable[[], nn.Module], state: str) -> None:
    torch.manual_seed(0)
    model = make().double()
    model = (trained(model) if state == "trained" else model).eval()
    x, labels = digits()
    y = (F.one_hot(labels, C).double() - 1 / C).reshape(-1)
    tangent = ntkit.linearize(model)
    full = ntkit.TangentKernel(tangent, x).dense()
    plain = ConjugateGradients(iterations=5000).solve(full, y, 1e-4)
    exact = torch.linalg.solve(full + plain.ridge * torch.eye(len(full)).double(), y)
    outputs = coupling(tangent, x, generator=seeded())
    trace = ntkit.TangentKernel(tangent, x, trace=True)
    pntk = ntkit.TangentKernel(ntkit.linearize(model, readout=ntkit.SumOfLogits()), x)
    sketch = ntkit.features(tangent, x, size=8192, trace=True, generator=seeded())
    features = ntkit.features(tangent, x, size=N * C, generator=seeded())
    ridge = plain.ridge
    # and how many times fewer iterations than plain: the pNTK stays behind where the logits' gradients are alike
    helpers: dict[str, tuple[Any, float]] = {
        "trace kernel": (kronecker(trace, outputs, ridge), 4),
        "sketch": (kronecker(sketch, outputs, ridge), 4),
        "pNTK": (kronecker(pntk, outputs, ridge), {mlp: 2.5, cnn: 1.8, transformer: 4}[make]),
        "recommended, trace kernel": (recommended(features, ridge, kernel=trace), 4),
        "recommended, pNTK": (recommended(features, ridge, kernel=pntk), 3),
        "recommended, sketch": (recommended(features, ridge), 4),
    }
    for name, (helper, times) in helpers.items():
        found = ConjugateGradients(preconditioner=helper).solve(full, y, 1e-4)
        assert found.converged, name
        assert found.iterations <= plain.iterations / times, name
        torch.testing.assert_close(found.value, exact, rtol=1e-2, atol=1e-3 * float(exact.abs().max()))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.floats(0.01, 3), st.integers(0, 99))
@settings(deadline=None)
def test_the_preconditioner_is_the_inverse_of_what_it_says(n: int, c: int, r: int, ridge: float, seed: int) -> None:
    phi, outputs = normal(5, seed=seed)(n).double(), spd(c, seed + 1)
    right = normal(r, seed=seed + 2)(n * c).double()
    matrix = torch.kron(phi @ phi.T, outputs) + ridge * torch.eye(n * c).double()
    expected = torch.linalg.solve(matrix, right)
    for kernel in (phi @ phi.T, ntkit.FeatureKernel(phi)):
        torch.testing.assert_close(kronecker(kernel, outputs, ridge)(right), expected, rtol=1e-6, atol=1e-6)
    identity = torch.kron(phi @ phi.T, torch.eye(c)) + ridge * torch.eye(n * c).double()
    found = kronecker(phi @ phi.T, c, ridge)(right)
    torch.testing.assert_close(found, torch.linalg.solve(identity, right), rtol=1e-6, atol=1e-6)


def test_the_coupling_is_the_mean_diagonal_block() -> None:
    tangent, x = ntkit.linearize(mlp().double()), digits()[0][:8]
    full = ntkit.TangentKernel(tangent, x).dense().view(8, C, 8, C)
    mean = torch.einsum("ncnd->cd", full)
    found = coupling(tangent, x, generator=seeded())
    torch.testing.assert_close(found, mean * C / mean.trace(), rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------- stopped and resumed


def test_a_stopped_solve_goes_on(tmp_path: Path) -> None:
    matrix, y, file = spd(60), normal(2)(60).double(), tmp_path / "state"
    whole = ConjugateGradients(tolerance=1e-10).solve(matrix, y, Absolute(0.01))
    first = ConjugateGradients(tolerance=1e-10, iterations=7, checkpoint=file).solve(matrix, y, Absolute(0.01))
    assert first.iterations == 7
    again = ConjugateGradients(tolerance=1e-10, checkpoint=file).solve(matrix, y, Absolute(0.01))
    assert again.history == whole.history
    assert torch.equal(again.value, whole.value)
    calls: list[int] = []
    ConjugateGradients(tolerance=1e-10, checkpoint=file).solve(
        matrix, y, Absolute(0.01), progress=lambda *_: calls.append(1)
    )
    assert not calls  # it was finished


def test_a_killed_solve_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "state"
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.test_iterative import *
checkpoint.EVERY = 0.0
def progress(done, _):
    if done == 9:
        os.kill(os.getpid(), 9)
ConjugateGradients(tolerance=1e-10, checkpoint={str(file)!r}).solve(
    spd(60), normal(2)(60).double(), Absolute(0.01), progress=progress)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    seen: list[int] = []
    solver = ConjugateGradients(tolerance=1e-10, checkpoint=file)
    found = solver.solve(spd(60), normal(2)(60).double(), Absolute(0.01), progress=lambda n, _: seen.append(n))
    assert seen[0] == 10
    assert found.converged


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "state"
    solver = ConjugateGradients(checkpoint=file)
    solver.solve(spd(9), normal(1)(9), Absolute(0.1))
    for y, ridge in ((normal(1, seed=4)(9), 0.1), (normal(1)(9), 0.2)):
        with pytest.raises(StoreError, match="another right-hand side or ridge"):
            solver.solve(spd(9), y, Absolute(ridge))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(StoreError, match="damaged"):
        solver.solve(spd(9), normal(1)(9), Absolute(0.1))
    for place in (tmp_path, tmp_path / "not there" / "state"):
        with pytest.raises(InputError, match="a file in a folder"):
            ConjugateGradients(checkpoint=place).solve(spd(9), normal(1)(9), Absolute(0.1))


class Unnamed(ntkit.DenseKernel):
    """A kernel that does not say what it is of."""

    def identity(self) -> dict[str, str]:
        return ntkit.Kernel.identity(self)


def with_facts(file: Path, keep: set[str]) -> None:
    """Rewrite a checkpoint with some of its facts only."""
    with safe_open(file, "pt") as opened:
        facts = {k: v for k, v in opened.metadata().items() if k in keep}
        parts = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118 (not a dict)
    save_file(parts, file, facts)


@pytest.mark.parametrize("kind", ["named", "unnamed", "an older file"])
def test_a_checkpoint_of_another_kernel(kind: str, tmp_path: Path) -> None:
    """The right-hand side and the ridge are the same: the kernel's identity tells, or a product with it."""
    file, y = tmp_path / "state", normal(2)(60).double()
    other = spd(60).roll(1, 0).roll(1, 1)  # of the same trace and spectrum
    make = Unnamed if kind == "unnamed" else ntkit.DenseKernel
    whole = ConjugateGradients(1e-10).solve(make(spd(60)), y, Absolute(0.01))
    ConjugateGradients(1e-10, 7, checkpoint=file).solve(make(spd(60)), y, Absolute(0.01))
    if kind == "an older file":
        with_facts(file, {"name", "history"})
    before, solver = file.read_bytes(), ConjugateGradients(1e-10, checkpoint=file)
    with pytest.raises(StoreError, match="what differs: entries" if kind == "named" else "belongs to another kernel"):
        solver.solve(make(other), y, Absolute(0.01))
    assert file.read_bytes() == before
    again = solver.solve(make(spd(60)), y, Absolute(0.01))
    assert again.history == whole.history
    assert torch.equal(again.value, whole.value)


def test_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (x, _), model, file = digits(), mlp().double(), tmp_path / "state"
    solver, y = ConjugateGradients(1e-8, 3, checkpoint=file), normal(1)(5 * C).double()
    solver.solve(MatrixFreeKernel(ntkit.linearize(model), x[:5]), y, Absolute(0.1))
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    with pytest.raises(StoreError, match=r"another kernel \(what differs: parameters"):
        solver.solve(MatrixFreeKernel(ntkit.linearize(model), x[:5]), y, Absolute(0.1))
    with pytest.raises(StoreError, match=r"another kernel \(what differs: .*rows"):
        solver.solve(MatrixFreeKernel(ntkit.linearize(model), x[5:10]), y, Absolute(0.1))


def test_what_float32_takes_for_its_own_is_its_own(tmp_path: Path) -> None:
    """A kernel without a name in float32: rounding of hundreds of steps is no other kernel."""
    file, y = tmp_path / "state", normal(2)(60)
    kernel = Unnamed((spd(60) + torch.ones(60, 60).double()).float())
    for iterations in (5, 40, 80):
        found = ConjugateGradients(1e-9, iterations, checkpoint=file).solve(kernel, y, Absolute(0.01))
    assert found.relative_residual > 1e-7  # the recurrence is astray


def test_the_state_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products of 7 s: after 60 s and a little each, and at the end."""
    clock, written = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: written.append(clock[0]))

    class Slow(ntkit.DenseKernel):
        def __matmul__(self, other: Tensor) -> Tensor:
            clock[0] += 7.0
            return super().__matmul__(other)

    solver = ConjugateGradients(1e-14, 32, checkpoint=tmp_path / "state")
    solver.solve(Slow(spd(60)), normal(1)(60).double(), Absolute(1e-3))
    assert written == [63.0, 126.0, 189.0, 224.0]


def test_a_full_disk_leaves_the_last_state(tmp_path: Path) -> None:
    file, y = tmp_path / "state", normal(8)(60).double()
    whole = ConjugateGradients(1e-10).solve(spd(60), y, Absolute(0.01))
    ConjugateGradients(1e-10, 7, checkpoint=file).solve(spd(60), y, Absolute(0.01))
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # no file may be larger
    try:
        with pytest.raises(StoreError, match="no room left"):
            ConjugateGradients(1e-10, 20, checkpoint=file).solve(spd(60), y, Absolute(0.01))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]
    again = ConjugateGradients(1e-10, checkpoint=file).solve(spd(60), y, Absolute(0.01))
    assert torch.equal(again.value, whole.value)


def test_two_solves_with_one_checkpoint_never_leave_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One begins to write, and ends, while the other is in the middle of it."""
    file, seen = tmp_path / "state", []
    first, second = (checkpoint.Checkpoint(file, "a system", None) for _ in range(2))
    fsync = os.fsync

    def interrupting(descriptor: int) -> None:
        fsync(descriptor)
        if not seen:
            seen.append(descriptor)
            second.write({"x": torch.ones(9)}, {}, now=True)
            found = second.read()
            assert found is not None
            assert torch.equal(found.parts["x"], torch.ones(9))

    monkeypatch.setattr(checkpoint.os, "fsync", interrupting)
    first.write({"x": torch.zeros(1000)}, {}, now=True)
    found = first.read()
    assert found is not None
    assert torch.equal(found.parts["x"], torch.zeros(1000))
    assert os.listdir(tmp_path) == ["state"]


def test_what_killed_runs_have_left_is_swept_away(tmp_path: Path) -> None:
    old, older, young = "state." + 32 * "0" + ".partial", "state.partial", "state." + 32 * "1" + ".partial"
    for name in (old, older, young, "state.notes.partial"):
        (tmp_path / name).write_text("half")
        if name != young:
            os.utime(tmp_path / name, (0, time.time() - 2 * checkpoint.STALE))
    ConjugateGradients(checkpoint=tmp_path / "state").solve(spd(9), normal(1)(9), Absolute(0.1))
    # another run may be writing the one, and the other is none of ours
    assert sorted(os.listdir(tmp_path)) == sorted(["state", young, "state.notes.partial"])


# ---------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: ConjugateGradients(tolerance=0.0), "tolerance between 0 and 1"),
        (lambda: ConjugateGradients(iterations=0), "positive number of iterations"),
        (lambda: ConjugateGradients().solve(spd(5)[:4], torch.ones(4)), "square kernel"),
        (lambda: ConjugateGradients().solve(spd(5), torch.ones(4)), "as many rows"),
        (lambda: ConjugateGradients().solve(spd(5), torch.full((5,), torch.nan)), "not finite"),
        (lambda: ConjugateGradients().solve(-torch.eye(5), torch.ones(5)), "not positive definite"),
        (lambda: kronecker(spd(4), 0, 0.1), "outputs are their number C"),
        (lambda: kronecker(spd(4), torch.ones(2, 3), 0.1), "outputs are their number C"),
        (lambda: kronecker(spd(4), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 0.1), "outputs are their number C"),
        (lambda: kronecker(spd(4), 3, 0.0), "positive absolute ridge"),
        (lambda: kronecker(spd(4), 3, Relative(0.1)), "positive absolute ridge"),
        (lambda: kronecker(spd(4), 3, 0.1)(torch.ones(4, 3).double()), "12 rows: got 4"),
        (
            lambda: kronecker(ntkit.TangentKernel(ntkit.linearize(mlp().double()), digits()[0]), C, 0.1),
            "one row per example: got 10",
        ),
        (lambda: coupling(ntkit.linearize(mlp()), digits()[0], examples=0, generator=seeded()), "at least one example"),
    ],
)
def test_refusals(do: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        do()
