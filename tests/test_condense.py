"""Data-set condensation: the loss and its gradient, the best labels, runs that go on, and what is learned from few."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, ModelError, NotPositiveDefiniteError, StoreError
from ntkit.kernel.base import DenseKernel, Kernel
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.explicit import Nystrom
from ntkit.kernel.function import Empirical, KernelFunction
from ntkit.kernel.infinite import InfiniteWidth
from ntkit.uses import condense
from ntkit.uses.condense.inducing import kip_gradient
from ntkit.uses.condense.regression import FEATURE_COPIES, blocks
from ntkit.uses.condense.support import Labelled, balanced

KERNEL = RBF(2.0)
C = 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes in the plane of the first two of four axes, evenly frequent."""
    labels = torch.arange(size) % C
    angles = labels * (2 * math.pi / C)
    x = torch.randn(size, 4, dtype=torch.float64, generator=seeded(seed))
    x[:, 0] += 2.0 * angles.cos()
    x[:, 1] += 2.0 * angles.sin()
    return x, labels


# ---------------------------------------------------------------- by definition, in numpy


def rbf(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.exp(-np.square(a[:, None] - b[None]).sum(2) / 8.0)


def loss_of(x: Tensor, y: Tensor, x_t: Tensor, labels: Tensor, ridge: float) -> float:
    s, t = x.detach().numpy(), x_t.numpy()
    k = rbf(s, s)
    k = k + ridge * np.trace(k) / len(k) * np.eye(len(k))
    wanted = np.eye(C)[labels.numpy()] - 1 / C
    return float(np.square(wanted - rbf(t, s) @ np.linalg.solve(k, y.detach().numpy())).mean() / 2)


# ---------------------------------------------------------------- the loss and its gradient


@pytest.mark.parametrize("memory", [None, 1], ids=["at once", "one target at a time"])
@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_the_gradient_is_that_of_the_definition(memory: int | None, ridge: float) -> None:
    """Finite differences of the plain formula; lambda moves with the points, and so does the factorization."""
    x_t, labels = clouds(20, seed=1)
    x = clouds(6)[0].requires_grad_()
    x.data *= torch.linspace(0.5, 1.5, 6, dtype=torch.float64)[:, None]
    y = torch.randn(6, C, dtype=torch.float64, generator=seeded(2)).requires_grad_()
    found = kip_gradient(KERNEL, x, y, Labelled(x_t, labels, C), ridge=ridge, memory=memory)
    assert found == pytest.approx(loss_of(x, y, x_t, labels, ridge), rel=1e-9)
    for moved in (x, y):
        assert moved.grad is not None
        for index in ((0, 0), (3, 1), (5, 2)):
            ends = []
            for step in (1e-5, -1e-5):
                away = {name: t.detach().clone() for name, t in (("x", x), ("y", y))}
                away["x" if moved is x else "y"][index] += step
                ends.append(loss_of(away["x"], away["y"], x_t, labels, ridge))
            assert float(moved.grad[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-8)


class Scaling(KernelFunction):
    """Not stationary, so that the ridge depends on the points: k(x, z) = (1 + <x, z>)^2."""

    def __call__(self, x1: Any, x2: Any = None) -> Kernel:
        return DenseKernel((1 + x1 @ (x1 if x2 is None else x2).T).square(), symmetric=x2 is None)


def test_the_ridge_is_part_of_the_gradient() -> None:
    x_t, labels = clouds(9, seed=1)
    y = condense.centred(torch.arange(4) % C, C)
    batch = Labelled(x_t, labels, C)

    def loss(x: Tensor) -> Tensor:
        k = (1 + x @ x.T).square()
        k = k + 0.2 * k.trace() / 4 * torch.eye(4, dtype=k.dtype)
        said = (1 + x_t @ x.T).square() @ torch.linalg.solve(k, y)
        return (condense.centred(labels, C) - said).square().mean() / 2

    x = clouds(4, seed=3)[0].requires_grad_()
    assert torch.autograd.gradcheck(loss, x)
    (wanted,) = torch.autograd.grad(loss(x), x)
    value = kip_gradient(Scaling(), x, y, batch, ridge=0.2, memory=6000)  # blocks of 4, 4 and 1
    assert value == pytest.approx(loss(x).item(), rel=1e-12)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-9, atol=1e-12)


def test_a_regression_is_scored_as_by_definition() -> None:
    data, test = clouds(60), clouds(50, seed=5)
    support = condense.random_support(data, 2, generator=seeded())
    fitted = condense.fit(KERNEL, support, ridge=0.1)
    score = fitted.score(test, memory=1)
    s = support.x.numpy()
    k = rbf(s, s) + 0.1 * np.eye(6)
    said = rbf(test[0].numpy(), s) @ np.linalg.solve(k, support.y.numpy())
    np.testing.assert_allclose(fitted.predict(test[0]).numpy(), said, atol=1e-12)
    assert score.accuracy == float((said.argmax(1) == test[1].numpy()).mean())
    assert score.standard_error == pytest.approx(math.sqrt(score.accuracy * (1 - score.accuracy) / 50))
    assert score.loss == pytest.approx(loss_of(support.x, support.y, *test, 0.1), rel=1e-9)
    assert score.ridge == pytest.approx(0.1)  # the mean of an RBF's diagonal is 1
    assert score.condition == pytest.approx(np.linalg.cond(k), rel=1e-6)


# ---------------------------------------------------------------- label solve


def test_no_other_labels_are_better() -> None:
    data = clouds(90)
    support = condense.random_support(data, 2, generator=seeded())
    found = condense.label_solve(KERNEL, support, data, ridge=0.05)
    y, best = found.support.y, loss_of(support.x, found.support.y, *data, 0.05)
    assert found.loss == pytest.approx(best, rel=1e-9)
    assert found.loss_before == pytest.approx(loss_of(support.x, support.y, *data, 0.05), rel=1e-9)
    assert found.loss < 0.95 * found.loss_before
    for seed in range(30):
        away = torch.randn(y.shape, dtype=y.dtype, generator=seeded(seed))
        for size in (1e-4, -1e-4, 1e-2):
            assert loss_of(support.x, y + size * away, *data, 0.05) > best


@pytest.mark.parametrize("memory", [None, 38_000, 1], ids=["at once", "uneven blocks", "one target at a time"])
def test_labels_from_blocks_are_the_pseudo_inverse(memory: int | None) -> None:
    """Also of points that are there twice: then they are the smallest labels among the best."""
    data = clouds(40)
    once = condense.random_support(data, 2, generator=seeded())
    twice = condense.Support(torch.cat([once.x, once.x[:1]]), torch.cat([once.y, once.y[:1]]))
    for support, rank in ((once, 6), (twice, 6)):
        s, ridge = support.x.numpy(), 1e-3
        tall = rbf(data[0].numpy(), s) @ np.linalg.inv(rbf(s, s) + ridge * np.eye(len(s)))
        wanted = np.linalg.pinv(tall, rcond=1e-12) @ (np.eye(C)[data[1].numpy()] - 1 / C)
        told: list[tuple[int, int]] = []
        found = condense.label_solve(
            KERNEL, support, data, ridge=ridge, memory=memory, progress=lambda a, b, told=told: told.append((a, b))
        )
        np.testing.assert_allclose(found.support.y.numpy(), wanted, atol=1e-8)
        assert found.rank == rank
        heights = np.diff([0, *(done for done, _ in told)]).tolist()
        assert sum(heights) == 40
        assert {total for _, total in told} == {40}
        if memory == 38_000:
            assert heights[0] == heights[1] > heights[2]  # blocks of several rows, and one of fewer
        else:
            assert heights == ([1] * 40 if memory else [40])


class OfMatrix(KernelFunction):
    """A given kernel between points that are numbered."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __call__(self, x1: Any, x2: Any = None) -> Kernel:
        rows, cols = (x[:, 0].detach().long() for x in (x1, x1 if x2 is None else x2))
        return DenseKernel(self.matrix[rows][:, cols] * (1 + 0 * x1.sum()), symmetric=x2 is None)


@pytest.mark.parametrize("smallest", [1e-17, 1e-15, 1e-13])
def test_a_kernel_that_is_singular_in_float64_is_refused(smallest: float) -> None:
    """By its eigenvalues, whether a Cholesky factorization goes through or not; fit, labels and steps alike."""
    n = 12
    turned = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=seeded())).Q
    values = torch.ones(n, dtype=torch.float64)
    values[0] = smallest
    kernel = OfMatrix((turned * values) @ turned.T)
    support = condense.Support(torch.arange(n).double()[:, None], condense.centred(torch.arange(n) % C, C))
    data = support.x, torch.arange(n) % C
    calls: list[Any] = [
        lambda ridge: condense.fit(kernel, support, ridge=ridge),
        lambda ridge: condense.label_solve(kernel, support, data, ridge=ridge),
        lambda ridge: kip_gradient(
            kernel, support.x.clone().requires_grad_(), support.y, Labelled.of(data), ridge=ridge
        ),
    ]
    for call in calls:
        if smallest > n * torch.finfo(torch.float64).eps:
            call(0.0)
            continue
        with pytest.raises(NotPositiveDefiniteError, match=r"Take a larger ridge") as caught:
            call(0.0)
        assert abs(caught.value.smallest_eigenvalue) < 1e-14
        call(1e-10)


def test_a_ridge_spares_the_eigenvalues_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("looked at")

    data = clouds(30)
    start = condense.random_support(data, 2, generator=seeded())
    monkeypatch.setattr(torch.linalg, "eigvalsh", never)
    x = start.x.clone().requires_grad_()
    assert math.isfinite(kip_gradient(KERNEL, x, start.y, Labelled.of(data)))
    with pytest.raises(AssertionError, match="looked at"):
        kip_gradient(KERNEL, x, start.y, Labelled.of(data), ridge=1e-16)


def test_points_that_do_not_reach_the_data_have_no_labels() -> None:
    x, labels = clouds(30)
    far = condense.Support(1e4 + 100 * torch.eye(3, 4).double(), condense.centred(torch.arange(3), 3))
    with pytest.raises(InputError, match="the kernel between the data and the points is zero"):
        condense.label_solve(KERNEL, far, (x, labels))
    with pytest.raises(NotPositiveDefiniteError):  # nor each other, nor themselves
        condense.fit(0.0 * KERNEL, far)


def test_labels_that_are_learned_come_down_to_the_solved_ones() -> None:
    data = clouds(60)
    start = condense.random_support(data, 1, generator=seeded())
    solved = condense.label_solve(KERNEL, start, data, ridge=0.1)
    found = condense.kernel_inducing_points(
        KERNEL, start, data, generator=seeded(), held_out=data,
        settings=condense.Inducing(steps=150, batch=60, learn_labels=True, ridge=0.1, learning_rate=0.05),
    )  # fmt: skip
    assert found.records[-1].loss < solved.loss  # the points have moved as well
    assert not torch.equal(found.support.y, start.y)


# ---------------------------------------------------------------- inducing points


def test_the_points_learn_and_the_labels_stay() -> None:
    data, test = clouds(600), clouds(300, seed=9)
    start = condense.random_support(data, 1, generator=seeded(4))
    found = condense.kernel_inducing_points(
        KERNEL, start, data, generator=seeded(), held_out=test,
        settings=condense.Inducing(steps=60, batch=90, record=(3, 50), learning_rate=0.05),
    )  # fmt: skip
    assert [record.step for record in found.records] == [0, 1, 2, 3, 4, 8, 16, 32, 50, 60]
    first, last = found.records[0], found.records[-1]
    assert math.isnan(first.batch_loss)
    assert last.loss < 0.7 * first.loss
    assert last.accuracy > first.accuracy
    assert torch.equal(found.support.y, start.y)
    assert found.step == 60
    assert not found.stopped
    again = condense.fit(KERNEL, found.support).score(test)
    assert (again.accuracy, again.loss, again.condition) == (last.accuracy, last.loss, last.condition)
    assert torch.equal(found.start.x, start.x)  # what was given is not moved


def test_without_examples_held_out_nothing_is_scored() -> None:
    data = clouds(30)
    start = condense.random_support(data, 1, generator=seeded())
    found = condense.kernel_inducing_points(
        KERNEL, start, data, generator=seeded(), settings=condense.Inducing(steps=2)
    )
    assert all(math.isnan(record.accuracy) and math.isnan(record.loss) for record in found.records)
    assert found.records[-1].condition == pytest.approx(condense.fit(KERNEL, found.support).condition)


def test_patience_ends_it_and_gives_the_best_back() -> None:
    """With a rate that throws the points about, the first ones are not beaten for long."""
    data, test = clouds(60), clouds(300, seed=9)
    start = condense.centre_support(data, 1, generator=seeded())
    found = condense.kernel_inducing_points(
        KERNEL, start, data, generator=seeded(), held_out=test,
        settings=condense.Inducing(steps=1000, batch=60, learning_rate=5.0, patience=3, ridge=1e-3),
    )  # fmt: skip
    assert found.stopped
    best = max(record.accuracy for record in found.records)
    chosen = next(record for record in found.records if record.step == found.step)
    assert chosen.accuracy == best
    assert sum(record.step > found.step for record in found.records) == 3
    assert condense.fit(KERNEL, found.support, ridge=1e-3).score(test).accuracy == best


def test_batches_have_as_many_of_every_class() -> None:
    """Those of a rare one come again, all of them equally often but for one time."""
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)
    rows = Labelled(torch.zeros(73, 2), labels, 3).rows()
    chosen = balanced(rows, 30, seeded())
    assert labels[chosen].bincount().tolist() == [10, 10, 10]
    assert chosen[:20].unique().numel() == 20
    assert sorted(chosen[20:].bincount()[70:].tolist()) == [3, 3, 4]
    often = torch.stack([balanced(rows, 30, seeded(seed))[20:].bincount(minlength=73)[70:] for seed in range(60)])
    assert (often == 4).any(0).all()  # it is not always the same one that comes once more
    other = balanced(rows, 30, seeded(1))
    assert not torch.equal(chosen, other)
    assert torch.equal(chosen, balanced(rows, 30, seeded()))
    for size in (73, 90):  # all there are
        assert balanced(rows, size, seeded()).sort().values.tolist() == [*range(73)]
    assert labels[balanced(rows, 72, seeded())].bincount().tolist() == [24, 24, 24]


@pytest.mark.parametrize("size", [3, 31, 60, 500])
def test_batches_of_even_classes_are_drawn_as_ever(size: int) -> None:
    """One order of every class, its first so many: published runs are of such data."""
    rows = Labelled(torch.zeros(60, 2), torch.arange(60) % C, C).rows()
    draw = seeded(5)
    wanted = torch.cat([of[torch.randperm(20, generator=draw)[: size // C]] for of in rows])
    assert torch.equal(balanced(rows, size, seeded(5)), wanted)


def test_a_step_on_a_rare_class_weighs_it_as_much_as_the_others() -> None:
    x, labels = clouds(90)
    kept = (labels != 2) | (torch.arange(90) < 9)  # three of class 2
    data = x[kept], labels[kept]
    start = condense.random_support(data, 1, generator=seeded())
    settings = condense.Inducing(steps=1, batch=36)
    found = condense.kernel_inducing_points(KERNEL, start, data, generator=seeded(1), settings=settings)
    rows = [np.flatnonzero(data[1].numpy() == c) for c in range(C)]
    rare = data[0][rows[2]]
    draw = seeded(1)
    parts = [data[0][rows[c]][torch.randperm(30, generator=draw)[:12]] for c in (0, 1)] + [rare.repeat(4, 1)]
    wanted = loss_of(start.x, start.y, torch.cat(parts), torch.arange(C).repeat_interleave(12), 1e-6)
    assert found.records[1].batch_loss == pytest.approx(wanted, rel=1e-9)


RUN = """
import os, signal, sys
import torch
from ntkit.kernel.closed import RBF
from ntkit.uses import condense

torch.set_num_threads(1)

def drawn(size, seed):  # the tests' own module is not imported: it takes longer than the run
    x, labels = torch.randn(size, 4, dtype=torch.float64, generator=seeded(seed)), torch.arange(size) % 3
    return x + 2 * torch.eye(3, 4)[labels], labels

def seeded(seed):
    return torch.Generator().manual_seed(seed)

data, held_out = drawn(300, 0), drawn(100, 9)
start = condense.random_support(data, 2, generator=seeded(4))
kill_at = int(sys.argv[2])

def told(done, total):
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

found = condense.kernel_inducing_points(
    RBF(2.0), start, data, generator=seeded(7), held_out=held_out, folder=sys.argv[1], progress=told,
    settings=condense.Inducing(steps=21, batch=60, learn_labels=True, learning_rate=0.05, record=(19,)),
)
torch.save([found.support.x, found.support.y, [repr(r) for r in found.records]], sys.argv[3])
"""


def run(folder: Path, kill_at: int, out: Path) -> int:
    command = [sys.executable, "-c", RUN, str(folder), str(kill_at), str(out)]
    return subprocess.run(command, cwd=Path(__file__).parent.parent, check=False, env=dict(os.environ)).returncode


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What an uninterrupted run ends at."""
    place = tmp_path_factory.mktemp("straight")
    assert run(place / "whole", -1, place / "out") == 0
    return torch.load(place / "out", weights_only=True)


@pytest.mark.parametrize("kill_at", [1, 11, 21])
def test_a_killed_run_ends_where_it_would_have(kill_at: int, straight: list[Any], tmp_path: Path) -> None:
    assert run(tmp_path / "cut", kill_at, tmp_path / "none") == -signal.SIGKILL
    assert not (tmp_path / "none").exists()
    assert run(tmp_path / "cut", -1, tmp_path / "out") == 0
    resumed = torch.load(tmp_path / "out", weights_only=True)
    assert torch.equal(resumed[0], straight[0])
    assert torch.equal(resumed[1], straight[1])
    assert resumed[2] == straight[2]
    kept = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert kept == ["state.safetensors", *(f"step-{k:07d}.safetensors" for k in (0, 1, 2, 4, 8, 16, 19, 21))]
    assert torch.equal(condense.load_support(tmp_path / "cut" / kept[-1]).x, straight[0])


def test_a_run_that_is_kept_at_every_step_goes_on_from_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a step was written and before its points were looked at: the look is not lost."""
    from ntkit.solve import checkpoint

    data = clouds(60)
    start = condense.random_support(data, 1, generator=seeded())

    def go(folder: str, stop: int = -1) -> condense.Condensed:
        def told(done: int, _: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        return condense.kernel_inducing_points(
            KERNEL, start, data, generator=seeded(1), held_out=data, folder=tmp_path / folder, progress=told,
            settings=condense.Inducing(steps=9, batch=30, learn_labels=True),
        )  # fmt: skip

    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    straight = go("straight")
    for stop in (3, 8):
        with pytest.raises(KeyboardInterrupt):
            go(str(stop), stop)
        resumed = go(str(stop))
        assert torch.equal(resumed.support.x, straight.support.x)
        assert [repr(record) for record in resumed.records] == [repr(record) for record in straight.records]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    data = clouds(30)
    start = condense.random_support(data, 1, generator=seeded())

    def go(kernel: KernelFunction = KERNEL, seed: int = 0, steps: int = 2, x: Tensor = data[0]) -> condense.Condensed:
        return condense.kernel_inducing_points(
            kernel, start, (x, data[1]), generator=seeded(seed), folder=tmp_path / "run",
            settings=condense.Inducing(steps=steps, batch=12),
        )  # fmt: skip

    first = go()
    assert torch.equal(go().support.x, first.support.x)  # finished: read, not computed
    for other in ({"seed": 1}, {"steps": 3}, {"x": data[0] + 1}):
        with pytest.raises(StoreError, match="another start, data, seed or settings"):
            go(**other)  # pyright: ignore[reportArgumentType]
    with pytest.raises(StoreError, match="another kernel"):
        go(RBF(2.001))
    (tmp_path / "run" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match="damaged"):
        go()


# ---------------------------------------------------------------- kernels of networks


class Conv(nn.Module):
    def __init__(self, act: nn.Module, outputs: int = C) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), act, nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, padding=1), act, nn.Flatten(),
            nn.Linear(16, outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def network(seed: int, act: nn.Module | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Conv(act or nn.Tanh()).double().eval()


def images(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, 1, 4, 4, dtype=torch.float64, generator=seeded(seed))


def test_gradient_features_are_the_pntk() -> None:
    models, x, z = [network(0), network(1)], images(4), images(3, 1)
    kernel = condense.GradientFeatures(*models)
    exact = [Empirical(ntkit.linearize(m, readout=ntkit.SumOfLogits())) for m in models]
    for args in ((x,), (x, z)):
        wanted = (exact[0](*args).dense() + exact[1](*args).dense()) / 2
        torch.testing.assert_close(kernel(*args).dense(), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kernel.diagonal(x), kernel(x).dense().diagonal())
    with torch.no_grad():
        next(models[0].parameters()).zero_()
    torch.testing.assert_close(kernel(x, z).dense(), wanted)  # of the networks as they were
    again = condense.GradientFeatures(network(0), network(1))
    assert kernel(x).identity() == again(x).identity() != condense.GradientFeatures(*models)(x).identity()


def test_blocks_leave_room_for_all_features_that_a_kernel_makes() -> None:
    """Also where they are made on the way: in sums and products, and for Nystrom features of few landmarks."""
    phi, x = condense.GradientFeatures(network(0)), images(6)
    support = condense.Support(x, condense.centred(torch.arange(6) % C, C))
    width, memory = phi.features(x[:1]).shape[1], 2**20

    def height(kernel: KernelFunction) -> int:
        return next(blocks(10_000, kernel, support, memory)).stop

    rbf = RBF(4.0)
    for kernel in (phi, phi + rbf, rbf + phi, phi * rbf, 2.0 * (rbf * phi), (rbf + phi).normalised(), Nystrom(phi, x)):
        assert 8 * FEATURE_COPIES * width * height(kernel) <= memory
        assert height(kernel) == height(phi)
    assert 8 * FEATURE_COPIES * 2 * width * height(phi * phi) <= memory
    assert height(rbf) > height(phi)


def test_blocks_have_the_memory_of_the_device_of_the_points(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("ntkit.kernel.memory.default_memory", lambda device: asked.append(device) or 2**20)
    support = condense.random_support(clouds(30), 1, generator=seeded())
    blocks(10, KERNEL, support, None)
    assert asked == [support.x.device]


def test_gradient_features_are_differentiable() -> None:
    kernel, z = condense.GradientFeatures(network(0)), images(2, 1)
    assert torch.autograd.gradcheck(lambda x: kernel(x, z).dense(), images(2).requires_grad_())
    assert torch.autograd.gradcheck(lambda x: kernel(x).dense(), images(2).requires_grad_())


def test_images_are_condensed_with_a_convolutional_network() -> None:
    labels = torch.arange(60) % C
    x = images(60) + 2 * images(C, 5)[labels]
    start = condense.random_support((x, labels), 1, generator=seeded())
    found = condense.kernel_inducing_points(
        condense.GradientFeatures(network(0, nn.ReLU())), start, (x, labels), generator=seeded(), held_out=(x, labels),
        settings=condense.Inducing(steps=20, batch=30, augment=(condense.Flip(0.0), condense.Shift(0))),
    )  # fmt: skip
    assert found.records[-1].loss < 0.8 * found.records[0].loss
    assert found.support.x.shape == (C, 1, 4, 4)


def infinite(pooled: bool) -> KernelFunction:
    """A convolutional network of infinite width for images of 4 x 4, with or without pooling over all positions."""
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1)] if pooled else [nn.Flatten(), nn.Linear(4, 1)]
    layers = [nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), *end]
    return InfiniteWidth(nn.Sequential(*layers), weight_std=2**0.5, bias_std=0.1)


@pytest.mark.parametrize("pooled", [False, True], ids=["flat", "pooled"])
def test_images_are_condensed_with_a_convolutional_kernel_of_infinite_width(pooled: bool) -> None:
    """The streamed gradient is that of finite differences of the regression's own score, and the points learn."""
    labels = torch.arange(24) % C
    x = images(24) + 2 * images(C, 5)[labels]
    kernel, start = infinite(pooled), condense.random_support((x, labels), 1, generator=seeded())
    points, away = start.x.clone().requires_grad_(), torch.randn(start.x.shape, dtype=x.dtype, generator=seeded(8))
    loss = kip_gradient(kernel, points, start.y, Labelled(x, labels, C), ridge=1e-3, memory=20_000)

    def score(step: float) -> float:
        moved = condense.Support(start.x + step * away, start.y)
        return condense.fit(kernel, moved, ridge=1e-3).score((x, labels)).loss

    assert points.grad is not None
    assert loss == pytest.approx(score(0.0), rel=1e-9)
    assert float((points.grad * away).sum()) == pytest.approx((score(1e-4) - score(-1e-4)) / 2e-4, rel=1e-4)
    found = condense.kernel_inducing_points(
        kernel, start, (x, labels), generator=seeded(), held_out=(x, labels),
        settings=condense.Inducing(steps=8, batch=24, ridge=1e-3),
    )  # fmt: skip
    assert found.records[-1].loss < 0.9 * found.records[0].loss


# ---------------------------------------------------------------- before and after


def test_zca_whitens_and_comes_back() -> None:
    """The covariance is S (S + r)^-1 on the training images, by numpy."""
    x = images(200) @ torch.randn(4, 4, dtype=torch.float64, generator=seeded(3))
    zca = condense.ZCA.fit(x, regularisation=0.1)
    white = zca(x)
    flat = x.flatten(1).numpy()
    flat = (flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)
    centre = flat - flat.mean(0)
    values, vectors = np.linalg.eigh(centre.T @ centre / 200)
    got = white.flatten(1).numpy()
    ridge = 0.1 * values.mean()
    np.testing.assert_allclose(got.T @ got / 200, vectors * (values / (values + ridge)) @ vectors.T, atol=1e-9)
    np.testing.assert_allclose(got, centre @ (vectors / np.sqrt(values + ridge)) @ vectors.T, atol=1e-9)
    np.testing.assert_allclose(zca.inverse(white).flatten(1).numpy(), flat, atol=1e-9)
    near = condense.ZCA.fit(x, regularisation=1e-9)(x).flatten(1).numpy()
    spectrum = np.linalg.eigvalsh(near.T @ near / 200)
    assert spectrum[0] < 1e-5  # an image less its mean has one direction less
    np.testing.assert_allclose(spectrum[1:], 1, atol=1e-4)


def test_channels_are_standardised_by_the_training_images() -> None:
    train = 3 + 2 * torch.randn(50, 2, 4, 4, generator=seeded())
    train[:, 1] *= 5
    scale = condense.Standardised.fit(train)
    got = scale(train)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.std((0, 2, 3)), torch.ones(2), atol=1e-5, rtol=0)
    other = torch.randn(3, 2, 4, 4, generator=seeded(1))
    torch.testing.assert_close(scale(other), (other - train.mean((0, 2, 3))[:, None, None])
                               / train.std((0, 2, 3))[:, None, None])  # fmt: skip
    torch.testing.assert_close(scale.inverse(got), train, atol=1e-4, rtol=0)
    signals = train.flatten(2)
    torch.testing.assert_close(condense.Standardised.fit(signals)(signals), got.flatten(2))  # (N, C, T), by channel
    vectors = torch.randn(50, 7, generator=seeded())
    torch.testing.assert_close(condense.Standardised.fit(vectors)(vectors), (vectors - vectors.mean()) / vectors.std())


def test_shifts_and_flips_are_what_they_say() -> None:
    x = torch.rand(60, 2, 5, 4, generator=seeded())
    before = x.clone()
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    shifts = {(a, b): padded[:, :, a : a + 5, b : b + 4] for a in range(3) for b in range(3)}
    moved, seen = condense.Shift(1)(x, seeded(1)), set()
    for k, image in enumerate(moved):
        fits = [shift for shift, whole in shifts.items() if torch.equal(whole[k], image)]
        assert len(fits) == 1
        seen.update(fits)
    assert seen == set(shifts)
    flipped = condense.Flip()(x, seeded(2))
    turned = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, x, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, x, strict=True)]
    assert all(a != b for a, b in zip(turned, kept, strict=True))
    assert 15 < sum(turned) < 45
    assert torch.equal(condense.Flip(1.0)(x, seeded()), x.flip(3))
    assert torch.equal(x, before)


def test_augmentation_leaves_labels_and_changes_the_course(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image of a batch goes with the label of the image that it was made from."""
    from ntkit.uses.condense import inducing

    labels = torch.arange(30) % C
    x = labels.double()[:, None, None, None] * torch.ones(30, 1, 4, 4) + 0.01 * images(30)
    batches: list[Labelled] = []
    plain = inducing.kip_gradient

    def spied(kernel: Any, x: Tensor, y: Tensor, batch: Labelled, **more: Any) -> float:
        batches.append(batch)
        return plain(kernel, x, y, batch, **more)

    monkeypatch.setattr(inducing, "kip_gradient", spied)
    start = condense.random_support((x, labels), 1, generator=seeded())
    condense.kernel_inducing_points(
        RBF(4.0), start, (x, labels), generator=seeded(),
        settings=condense.Inducing(steps=3, batch=12, augment=(condense.Flip(), condense.Shift(1))),
    )  # fmt: skip
    originals = {tuple(image.flatten().tolist()) for image in x}
    assert len(batches) == 3
    for batch in batches:
        assert torch.equal(batch.x.mean((1, 2, 3)).round().long(), batch.labels)
        assert any(tuple(image.flatten().tolist()) not in originals for image in batch.x)
        assert batch.labels.bincount().tolist() == [4, 4, 4]


# ---------------------------------------------------------------- the plain ways, and networks


def test_plain_supports_are_balanced_examples_and_centres() -> None:
    x, labels = clouds(90)
    found = condense.random_support((x.float(), labels), 3, generator=seeded())
    assert found.x.dtype == torch.float64
    torch.testing.assert_close(found.y, torch.eye(C, dtype=torch.float64).repeat_interleave(3, 0) - 1 / C)
    for point, target in zip(found.x, found.y, strict=True):
        rows = torch.nonzero((x.float().double() == point).all(1)).flatten()
        assert labels[rows].tolist() == [int(target.argmax())]
    one = condense.centre_support((x, labels), 1, generator=seeded())
    torch.testing.assert_close(one.x, torch.stack([x[labels == c].mean(0) for c in range(C)]))
    several = condense.centre_support((x, labels), 4, generator=seeded())
    assert several.y.argmax(1).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for c in range(C):
        own, centres = x[labels == c], several.x[4 * c : 4 * c + 4]
        nearest = torch.cdist(own, centres).argmin(1)
        torch.testing.assert_close(centres, torch.stack([own[nearest == k].mean(0) for k in range(4)]))


def test_a_network_learns_from_the_points() -> None:
    data, test = clouds(300), clouds(200, seed=9)
    start = condense.random_support(data, 1, generator=seeded(4))

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, C))

    training = condense.Training(steps=300, learning_rate=0.05)
    state = torch.random.get_rng_state()
    few = condense.train_network(make, start, test, generator=seeded(1), training=training)
    again = condense.train_network(make, start, test, generator=seeded(1), training=training)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (few.accuracy, few.loss) == (again.accuracy, again.loss)
    many = condense.Support(data[0], condense.centred(data[1], C))
    better = condense.train_network(make, many, test, generator=seeded(1), training=training)
    assert better.accuracy > few.accuracy + 0.01
    assert better.loss < 0.5 * few.loss
    assert few.train_loss < 0.01 < few.loss
    with torch.no_grad():
        said = few.model(test[0].float()).double()
    assert few.loss == pytest.approx(float((said - condense.centred(test[1], C)).square().mean() / 2))
    assert few.accuracy == float((said.argmax(1) == test[1]).double().mean())
    assert not few.model.training


def test_dropout_is_drawn_from_the_generator() -> None:
    data = clouds(30)
    support = condense.random_support(data, 1, generator=seeded(4))

    def train(seed: int, elsewhere: int) -> condense.Transferred:
        torch.manual_seed(elsewhere)
        state = torch.random.get_rng_state()
        found = condense.train_network(
            lambda: nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, C)), support, data,
            generator=seeded(seed), training=condense.Training(steps=20),
        )  # fmt: skip
        assert torch.equal(torch.random.get_rng_state(), state)
        return found

    with torch.random.fork_rng(devices=[]):
        first, again, other = train(1, 0), train(1, 7), train(2, 0)
    assert first.loss == again.loss
    assert first.loss != other.loss


def test_training_takes_numbers_it_can_use() -> None:
    for settings, words in (
        ({"steps": 1.5}, "steps is a whole number, 1 or more: got 1.5"), ({"steps": True}, "steps is a whole"),
        ({"batch": 0}, "batch is a whole"), ({"learning_rate": math.inf}, "learning_rate is positive and finite"),
        ({"learning_rate": math.nan}, "learning_rate is positive"), ({"learning_rate": 0}, "learning_rate is positive"),
        ({"momentum": -0.1}, "momentum is a finite number"), ({"decay": math.inf}, "decay is a finite number"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            condense.Training(**settings)


def test_decay_and_momentum_are_those_of_sgd() -> None:
    """Three steps of one linear layer on two points, by hand: v = m v + g + d w; w -= r v."""
    support = condense.Support(torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, -1.0], [0.0, 2.0]]).double())
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(0.5)
    w, v = np.full((2, 2), 0.5), np.zeros((2, 2))
    for _ in range(3):
        v = 0.8 * v + ((w - support.y.numpy().T) / 2 + 0.3 * w)
        w = w - 0.1 * v
    training = condense.Training(steps=3, learning_rate=0.1, momentum=0.8, decay=0.3)
    found = condense.train_network(
        lambda: model, support, (support.x, torch.tensor([0, 1])), generator=seeded(), training=training
    )
    np.testing.assert_allclose(next(found.model.parameters()).detach().numpy(), w, atol=1e-12)


# ---------------------------------------------------------------- what is refused


class Constant(KernelFunction):
    """Without gradients."""

    def __call__(self, x1: Any, x2: Any = None) -> Kernel:
        return DenseKernel(KERNEL(x1, x2).dense().detach(), symmetric=x2 is None)


def test_what_cannot_be_used_is_refused_in_words() -> None:
    x, labels = clouds(30)
    data = (x, labels)
    start = condense.random_support(data, 1, generator=seeded())

    def kip(kernel: KernelFunction = KERNEL, given: Any = data, **more: Any) -> condense.Condensed:
        settings = condense.Inducing(steps=2, **more.pop("settings", {}))
        return condense.kernel_inducing_points(kernel, start, given, generator=seeded(), settings=settings, **more)

    with pytest.raises(ModelError, match="Constant is not differentiable"):
        kip(Constant())
    with pytest.raises(InputError, match=r"shape of the support points, \(4,\): got \(3,\)"):
        kip(given=(x[:, :3], labels))
    with pytest.raises(InputError, match=r"the examples held out have the shape"):
        kip(held_out=(x[:, :3], labels))
    with pytest.raises(InputError, match="pair of tensors"):
        kip(given=x)
    with pytest.raises(InputError, match="labels are 0 to 2: got 0 to 3"):
        kip(given=(x, labels + (labels == 2)))
    with pytest.raises(InputError, match="class 2 has no example"):
        kip(given=(x, labels % 2))
    with pytest.raises(InputError, match="not finite"):
        kip(given=(x / 0, labels))
    with pytest.raises(InputError, match="patience asks for examples held out"):
        kip(settings={"patience": 2})
    with pytest.raises(InputError, match="images to augment are"):
        kip(settings={"augment": (condense.Flip(),)})
    for settings, words in (
        ({"steps": 0}, "steps is a whole number"), ({"batch": 1.5}, "batch is a whole number"),
        ({"learning_rate": 0}, "learning_rate is a positive"), ({"ridge": -1}, "ridge is in units"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            condense.Inducing(**settings)
    for call in (condense.random_support, condense.centre_support):
        with pytest.raises(InputError, match="class 0 has 10 examples: expected at least the 11"):
            call(data, 11, generator=seeded())
        with pytest.raises(InputError, match="per_class is a number"):
            call(data, 0, generator=seeded())
        with pytest.raises(InputError, match="class 1 has no example"):
            call((x, labels * 2), 1, generator=seeded())
    double = condense.Support(start.x.repeat(2, 1), start.y.repeat(2, 1))
    with pytest.raises(NotPositiveDefiniteError, match=r"Take a larger ridge"):
        condense.fit(KERNEL, double, ridge=0.0)
    for scale in (1.0, 1e-9):  # Cholesky by itself goes through by luck
        flat = condense.Support(scale * x[:12], condense.centred(labels[:12], 3))
        with pytest.raises(NotPositiveDefiniteError, match=r"Take a larger ridge"):
            condense.fit(DotProduct(), flat, ridge=0.0)
    with pytest.raises(InputError, match=r"one scalar for each example"):
        condense.fit(Empirical(ntkit.linearize(nn.Linear(4, 2).double())), start)
    with pytest.raises(InputError, match="as many examples or more"):
        condense.label_solve(KERNEL, start, (x[:2], torch.tensor([0, 2])))
    with pytest.raises(InputError, match="points"):
        condense.Support(x, condense.centred(labels, 3)[:5])
    with pytest.raises(InputError, match="a support set is float64"):
        condense.Support(x.float(), condense.centred(labels, 3))
    with pytest.raises(InputError, match="not finite"):
        condense.Support(x / 0, condense.centred(labels, 3))
    with pytest.raises(InputError, match="one or more networks"):
        condense.GradientFeatures()
    with pytest.raises(InputError, match="call eval"):
        condense.GradientFeatures(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).train())
    with pytest.raises(InputError, match="no parameters"):
        condense.GradientFeatures(nn.ReLU())
    with pytest.raises(ModelError, match="one output for each class"):
        condense.train_network(lambda: nn.Linear(4, 7), start, data, generator=seeded())
    with pytest.raises(ModelError, match="diverged"):
        condense.train_network(
            lambda: nn.Linear(4, 3), start, data, generator=seeded(), training=condense.Training(200, 1e3)
        )
    made: list[int] = []

    def make() -> nn.Module:
        made.append(1)
        return nn.Linear(4, 3)

    with pytest.raises(InputError, match=r"the test examples have the shape of the support points, \(4,\): got \(3,\)"):
        condense.train_network(make, start, (x[:, :3], labels), generator=seeded())
    assert not made
    for wrong, words in (
        (nn.Linear(4, 3), "make is a function that gives a new network, .*: got Linear"),
        ("Linear", "make is a function that gives a new network, .*: got str"),
        (lambda: None, "gives a network with parameters: got NoneType"),
        (lambda: nn.Flatten(), "gives a network with parameters: got Flatten"),
    ):
        with pytest.raises(InputError, match=words):
            condense.train_network(wrong, start, data, generator=seeded())  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="a channel of the training examples is constant"):
        condense.Standardised.fit(torch.ones(5, 1, 2, 2))
    with pytest.raises(InputError, match="regularisation is a positive"):
        condense.ZCA.fit(images(5), regularisation=0)


class OwnGradients(KernelFunction):
    """Gradients to a parameter, none to the examples."""

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def __call__(self, x1: Any, x2: Any = None) -> Kernel:
        return DenseKernel(self.scale * KERNEL(x1, x2).dense().detach(), symmetric=x2 is None)


class Cropped(condense.Augmentation):
    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x[:, 1:]


def test_what_is_refused_has_made_no_folder(tmp_path: Path) -> None:
    data = clouds(30)
    start = condense.random_support(data, 1, generator=seeded())
    generator = seeded(1)
    empirical = Empirical(ntkit.linearize(nn.Linear(4, 1).double()))

    def kip(kernel: KernelFunction, *augment: condense.Augmentation) -> condense.Condensed:
        return condense.kernel_inducing_points(
            kernel, start, data, generator=generator, folder=tmp_path / "run", held_out=data,
            settings=condense.Inducing(steps=3, batch=12, augment=augment),
        )  # fmt: skip

    for kernel in (empirical, Constant(), OwnGradients()):
        with pytest.raises(ModelError, match=f"{type(kernel).__name__} is not differentiable"):
            kip(kernel)
    with pytest.raises(InputError, match="images to augment are"):
        kip(KERNEL, condense.Flip())
    with pytest.raises(InputError, match=r"keeps the shape of examples: .* makes \(2, 3\) of \(2, 4\)"):
        kip(KERNEL, Cropped())
    for memory in (0, -1, 1.5):
        with pytest.raises(InputError, match="a memory budget is a positive number of bytes"):
            condense.kernel_inducing_points(
                KERNEL, start, data, generator=generator, folder=tmp_path / "run", memory=memory
            )  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "run").exists()
    assert torch.equal(generator.get_state(), seeded(1).get_state())
    kip(KERNEL)  # corrected, in the same folder
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_trying_augmentation_draws_no_random_numbers() -> None:
    """The first batch that is changed is drawn from the generator as it was given."""
    states = []

    class Watched(condense.Augmentation):
        def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
            states.append((len(x), generator.get_state()))
            return x + 0 * torch.rand(len(x), 1, generator=generator)

    data = clouds(30)
    start = condense.random_support(data, 1, generator=seeded())
    settings = condense.Inducing(steps=1, batch=12, augment=(Watched(),))
    condense.kernel_inducing_points(KERNEL, start, data, generator=seeded(1), settings=settings)
    expected = seeded(1)
    balanced(Labelled.of(data).rows(), 12, expected)
    assert [size for size, _ in states] == [2, 12]
    assert torch.equal(states[1][1], expected.get_state())


def test_steps_to_record_are_whole_numbers_of_any_kind(tmp_path: Path) -> None:
    data = clouds(30)
    start = condense.random_support(data, 1, generator=seeded())
    for record in ([np.int64(3), np.int64(5)], np.array([3, 5]), range(3, 6, 2), (3, 5)):
        settings = condense.Inducing(steps=6, batch=12, record=record)  # pyright: ignore[reportArgumentType]
        assert [*map(type, settings.recorded())] == [int] * 7
        found = condense.kernel_inducing_points(
            KERNEL, start, data, generator=seeded(1), settings=settings, folder=tmp_path / "one"
        )  # the same run in all four ways
        assert [seen.step for seen in found.records] == [0, 1, 2, 3, 4, 5, 6]
    for record in ([7], [-1], [1.0], [True], 3, ["3"]):
        with pytest.raises(InputError, match="record is a list of steps, whole numbers from 0 to 6"):
            condense.Inducing(steps=6, record=record)  # pyright: ignore[reportArgumentType]


def test_changes_and_the_generator_are_what_they_are_called() -> None:
    for augment in (condense.Flip(), (condense.Flip,), "flip", None):
        with pytest.raises(InputError, match="augment is a sequence of changes"):
            condense.Inducing(augment=augment)  # pyright: ignore[reportArgumentType]
    data = clouds(30)
    start = condense.random_support(data, 1, generator=seeded())
    with pytest.raises(InputError, match=r"generator is a torch\.Generator"):
        condense.kernel_inducing_points(KERNEL, start, data, generator=None)  # pyright: ignore[reportArgumentType]


def test_what_is_no_support_set_is_not_read(tmp_path: Path) -> None:
    support = condense.random_support(clouds(30), 1, generator=seeded())
    condense.save_support(tmp_path / "a.safetensors", support)
    assert torch.equal(condense.load_support(tmp_path / "a.safetensors").x, support.x)
    (tmp_path / "b.safetensors").write_bytes(b"x")
    with pytest.raises(StoreError, match="is not a support set"):
        condense.load_support(tmp_path / "b.safetensors")
    with pytest.raises(StoreError, match="cannot be written"):
        condense.save_support(tmp_path / "none" / "c.safetensors", support)
