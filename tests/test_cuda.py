"""On a GPU everything is what it is on the CPU. Without one these tests are left out."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import ntkit
from ntkit.cli.main import app
from ntkit.kernel.closed import RBF
from ntkit.kernel.matrixfree import MatrixFreeKernel
from ntkit.solve.course import GradientFlow
from ntkit.solve.evolve import evolve
from ntkit.solve.flow import KernelFlow
from ntkit.solve.iterative import ConjugateGradients
from ntkit.solve.losses import CrossEntropy, Loss, SquareLoss
from ntkit.solve.precondition import kronecker
from ntkit.solve.ridge import Absolute
from ntkit.uses import active, condense, distill, dynamics, finetune
from tests import oracles
from tests.cases import CASES, Case

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore::ntkit.errors.SlowRouteWarning"),
    pytest.mark.filterwarnings("ignore:nested_from_padded CUDA kernels:UserWarning"),
]

C = 3


def moved(x: Any, device: str = "cuda") -> Any:
    if isinstance(x, dict):
        return {name: part.to(device) for name, part in x.items()}
    if isinstance(x, tuple):
        return tuple(part.to(device) for part in x)
    return x.to(device)


def agreed(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert oracles.relative_error(found.detach().cpu().double(), expected.detach().cpu().double()) <= tolerance


def network(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, C)
    ).double()


def images(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, C),
    )  # fmt: skip


def vectors(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n: int, seed: int = 2) -> Tensor:
    return torch.randint(C, (n,), generator=torch.Generator().manual_seed(seed))


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_of_all_cases(case: Case) -> None:
    model, x = case.build(), case.data(8)
    x1, x2 = oracles.take(x, slice(0, 5)), oracles.take(x, slice(5, 8))
    readout = ntkit.Logits(select=case.select)
    expected = ntkit.empirical_ntk(model, x1, x2, readout=readout, parameters=case.parameters)
    on_gpu, g1, g2 = case.build().to("cuda"), moved(x1), moved(x2)
    try:
        oracles.call(on_gpu, g1)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"the model itself does not run on a GPU: {error}")
    found = ntkit.empirical_ntk(on_gpu, g1, g2, readout=readout, parameters=case.parameters)
    assert found.is_cuda
    # torch's own weight norm on a GPU is good to some 1e-9 in float64 (seen in 2.11)
    agree = partial(agreed, tolerance=1e-8 if "weight_norm" in case.name else 1e-9)
    agree(found, expected)
    pntk = partial(ntkit.empirical_ntk, readout=ntkit.SumOfLogits(select=case.select), parameters=case.parameters)
    agree(pntk(on_gpu, g1), pntk(model, x1))
    trace = partial(ntkit.empirical_ntk, readout=readout, trace=True, parameters=case.parameters)
    agree(trace(on_gpu, g1), trace(model, x1))


def test_data_may_stay_on_the_cpu() -> None:
    agreed(ntkit.empirical_ntk(network().cuda(), vectors(6)), ntkit.empirical_ntk(network(), vectors(6)))


def test_float32_is_float32() -> None:
    """A kernel in float32 has float32's error, whatever shortcuts the card knows."""
    torch.manual_seed(0)
    x = torch.randn(12, 1, 12, 12)
    for model, some in ((images(), x), (network().float(), vectors(12).float())):
        exact = ntkit.empirical_ntk(copy.deepcopy(model).double(), some.double())
        agreed(ntkit.empirical_ntk(copy.deepcopy(model).cuda(), some.cuda()), exact, 2e-5)


def test_products_diagonals_and_tiles() -> None:
    kernel = ntkit.TangentKernel(ntkit.linearize(network()), vectors(9))
    gpu = ntkit.TangentKernel(ntkit.linearize(network().cuda()), vectors(9).cuda())
    right = torch.randn(27, 2, dtype=torch.float64)
    agreed(gpu @ right.cuda(), kernel @ right)
    agreed(gpu.diagonal(), kernel.diagonal())
    agreed(gpu.tile(slice(3, 11), slice(0, 5)), kernel.tile(slice(3, 11), slice(0, 5)))
    free = MatrixFreeKernel(ntkit.linearize(network().cuda()), vectors(9).cuda())
    agreed(free @ right.cuda(), kernel @ right)
    reduced = [
        ntkit.TangentKernel(ntkit.linearize(network().to(d), readout=ntkit.SumOfLogits()), vectors(9).to(d))
        for d in ("cpu", "cuda")
    ]
    errors = [kernel.fidelity(examples=6, generator=torch.Generator().manual_seed(0)).error for kernel in reduced]
    assert errors[1] == pytest.approx(errors[0], rel=1e-9)


@pytest.mark.parametrize("trace", [False, True])
def test_features(trace: bool) -> None:
    made = [
        ntkit.features(
            ntkit.linearize(model), x, size=512, trace=trace, generator=torch.Generator().manual_seed(0)
        )
        for model, x in ((network(), vectors(9)), (network().cuda(), vectors(9).cuda()))
    ]  # fmt: skip
    assert made[1].dense().is_cuda
    agreed(made[1].dense(), made[0].dense())


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_saved(workers: int | None, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    kernel = ntkit.TangentKernel(ntkit.linearize(network().cuda()), vectors(40).cuda())
    saved = kernel.save(tmp_path / "k.zarr", memory=2**20, workers=workers)
    agreed(saved.dense(), ntkit.empirical_ntk(network(), vectors(40)))


# --- solves -----------------------------------------------------------------------------------------------------------


def test_conjugate_gradients() -> None:
    x, y = vectors(20), torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tangent = ntkit.linearize(network().cuda())
    full = ntkit.TangentKernel(tangent, x.cuda())
    near = kronecker(ntkit.TangentKernel(tangent, x.cuda(), trace=True), C, Absolute(0.1))
    found = ConjugateGradients(tolerance=1e-10, preconditioner=near).solve(full, y.cuda(), Absolute(0.1))
    exact = torch.linalg.solve(
        ntkit.empirical_ntk(network(), x) + 0.1 * torch.eye(60, dtype=torch.float64), y
    )  # fmt: skip
    agreed(found.value, exact, 1e-7)
    assert found.iterations < 60


@pytest.mark.parametrize("readout", [ntkit.Logits(), ntkit.SumOfLogits()], ids=["full", "pntk"])
def test_flow(readout: ntkit.Readout) -> None:
    """In closed form and by the solver."""
    x, seen, y = vectors(8), vectors(4, 5), torch.randn(8, C, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        tangent = ntkit.linearize(network().to(device), readout=readout)
        kernel = ntkit.TangentKernel(tangent, x.to(device))
        cross = ntkit.TangentKernel(tangent, seen.to(device), x.to(device))
        closed = KernelFlow.decompose(kernel, y.to(device)).predict(cross, GradientFlow(2.0))
        run = evolve(kernel, labels(8).to(device), CrossEntropy(), [1.0], prior=y.to(device))
        found.append((closed, run.predict(cross, prior=y[:4].to(device))))
    for mine, theirs in zip(found[1], found[0], strict=True):
        agreed(torch.as_tensor(mine), torch.as_tensor(theirs), 1e-7)


def test_linearised_network() -> None:
    x = vectors(4)
    expected, found = dynamics.Linearized(network().eval()), dynamics.Linearized(network().cuda().eval())
    agreed(found(x.cuda()), expected(x))
    found(x.cuda()).sum().backward()
    expected(x).sum().backward()
    agreed(found.change.grad, expected.change.grad)  # pyright: ignore


# --- uses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [CrossEntropy(), SquareLoss()], ids=["cross-entropy", "square"])
def test_one_step(loss: Loss) -> None:
    x, y, seen = vectors(6), labels(6), vectors(4, 5)
    expected = dynamics.one_step(network(), (x, y), seen, 0.01, loss=loss, matrices=True)
    found = dynamics.one_step(network().cuda(), (x.cuda(), y.cuda()), seen.cuda(), 0.01, loss=loss, matrices=True)
    agreed(found.logits.predicted, expected.logits.predicted)
    agreed(found.logits.actual, expected.logits.actual)


def trained(model: nn.Module, x: Tensor, y: Tensor, recorder: dynamics.PathRecorder, steps: int = 5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        recorder.record(model, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_paths(tmp_path: Path) -> None:
    x, y = vectors(8), labels(8)
    found = []
    for device in ("cpu", "cuda"):
        recorder = dynamics.PathRecorder(x, labels=y, folder=tmp_path / device)
        trained(network().to(device), x.to(device), y.to(device), recorder)
        found.append(recorder.paths())
    agreed(torch.as_tensor(found[1].logits), torch.as_tensor(found[0].logits), 1e-5)


@pytest.mark.parametrize("loss", [CrossEntropy(), SquareLoss()], ids=["cross-entropy", "square"])
@pytest.mark.parametrize("kernel", [active.LastLayer(), active.Hidden(), active.Sketched(256), active.Exact()])
def test_queries(loss: Loss, kernel: active.Geometry) -> None:
    x, y = vectors(60), labels(60)
    y[12:] = -1
    found = []
    for device in ("cpu", "cuda"):
        strategy = active.LookAhead(loss=loss, kernel=kernel, missing_label=-1, random_state=0)
        model = network().to(device)
        found.append(strategy.query(x.to(device), y.numpy(), model, batch_size=4, return_utilities=True))
    assert found[0][0].tolist() == found[1][0].tolist()
    torch.testing.assert_close(
        torch.as_tensor(found[1][1]), torch.as_tensor(found[0][1]), rtol=1e-5, atol=1e-8, equal_nan=True
    )


@pytest.mark.parametrize("name", ["margin", "entropy", "badge", "core-set", "lcmd", "k-means++", "max-det", "random"])
def test_baselines(name: str) -> None:
    x, y = vectors(60), labels(60)
    y[12:] = -1
    found = [
        active.strategy(name, missing_label=-1, random_state=0).query(
            x.to(device), y.numpy(), network().to(device), batch_size=4
        )
        for device in ("cpu", "cuda")
    ]
    assert found[0].tolist() == found[1].tolist()


def test_backbones_are_ranked_alike() -> None:
    x, y = vectors(30), labels(30)
    found = []
    for device in ("cpu", "cuda"):
        candidates = {f"width {w}": network(w).to(device) for w in (4, 16, 64)}
        ranking = finetune.rank_backbones(
            candidates, x.to(device), y.to(device), head="4", generator=torch.Generator().manual_seed(0)
        )
        found.append([(row.name, row.predicted) for row in ranking.rows])
    for mine, theirs in zip(*found, strict=True):
        assert mine[0] == theirs[0]
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)


def test_probing_and_fine_tuning_run() -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(5, 16), nn.ReLU()))
    model.add_module("fc", nn.Linear(16, C))
    x, y = vectors(40).float().cuda(), labels(40).cuda()
    sgd = partial(torch.optim.SGD, lr=0.05)
    sweep = finetune.probe_then_finetune(
        model.cuda(), finetune.LinearHead("fc"), (x[:30], y[:30]), (x[30:], y[30:]),
        probing=finetune.Probing((0, 2), sgd, batch_size=8), finetuning=finetune.Finetuning(2, sgd, batch_size=8),
    )  # fmt: skip
    assert [row.tau for row in sweep.rows] == [0, 2]


def test_targets_of_distillation() -> None:
    logits = torch.randn(6, C)
    for device in ("cpu", "cuda"):
        table, numbers = distill.EMATargets(6, C), torch.arange(6)
        for _ in range(3):
            table.update(numbers, logits.to(device))
        targets = table.targets(numbers.to(device))
        loss = distill.DistillationLoss()(logits.to(device).requires_grad_(), targets.to(device))
        assert bool(loss.isfinite())


def condensed(x: Tensor, y: Tensor, folder: Path, model: nn.Module) -> list[Tensor]:
    """All the way from examples to points, labels and a network; a second call goes on from the state on disk."""
    generator, kernel = torch.Generator().manual_seed(0), RBF(2.0)
    white = condense.ZCA.fit(x)
    data = condense.Standardised.fit(x)(x), y
    start = condense.random_support(data, 2, generator=generator)
    centres = condense.centre_support(data, 2, generator=generator)
    learned = [
        condense.kernel_inducing_points(
            kernel, start, data, generator=torch.Generator().manual_seed(1), held_out=data, folder=folder,
            settings=condense.Inducing(steps=8, batch=30, learn_labels=True, patience=3),
        )
        for _ in range(2)
    ]  # fmt: skip
    best, last = learned[1].support, learned[1].records[-1]
    assert torch.equal(learned[0].support.x, best.x)
    assert {t.device.type for t in (best.x, best.y, centres.x, centres.y)} == {x.device.type}
    shifted = condense.Shift(1)(condense.Flip()(x.reshape(-1, 1, 5, 1), generator), generator)
    solved = condense.label_solve(kernel, centres, data).support
    score = condense.fit(kernel, best).score(data)
    trained = condense.train_network(
        lambda: model, centres, (data[0].cpu(), y.cpu()), generator=generator, training=condense.Training(20, batch=4)
    )
    numbers = torch.tensor([score.loss, last.loss, last.condition, trained.loss, trained.train_loss])
    return [white.inverse(white(x)), best.x, best.y, centres.x, centres.y, shifted, solved.y, numbers]


def test_few_points_for_a_data_set(tmp_path: Path) -> None:
    x, y = vectors(60), torch.arange(60) % C
    x[:, :C] += 2 * torch.eye(C, dtype=torch.float64)[y]
    expected = condensed(x, y, tmp_path / "cpu", network(8))
    found = condensed(x.cuda(), y.cuda(), tmp_path / "cuda", network(8).cuda())
    for mine, theirs in zip(found, expected, strict=True):
        agreed(mine, theirs, 1e-6)


def test_watched_runs_go_on_where_they_stopped(tmp_path: Path) -> None:
    """Dropout on the GPU draws the same after a stop."""
    x, y = vectors(40).float().cuda(), labels(40).cuda()

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.5), nn.Linear(32, C)).cuda()

    def run(folder: Path, progress: Any = None) -> Tensor:
        network = model()
        dynamics.watch(
            network, (x[:30], y[:30]), (x[30:], y[30:]), generator=torch.Generator().manual_seed(0),
            run=dynamics.Run(steps=20, batch_size=8), look=dynamics.Look(probes=10), folder=folder, progress=progress,
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    whole = run(tmp_path / "whole")
    assert whole.is_cuda
    again = run(tmp_path / "again")
    assert torch.equal(whole, again)


def test_the_command_line_puts_the_network_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("on_gpu.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(5, 3)\n")
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(6, 5)))
    for device in ("cpu", "cuda"):
        command = ["kernel", "on_gpu.py:make", "data.npz", "--dtype", "float64", "--out", f"{device}.npy"]
        found = CliRunner().invoke(app, [*command, "--device", device])
        assert found.exit_code == 0, found.output
    np.testing.assert_allclose(np.load("cuda.npy"), np.load("cpu.npy"), rtol=1e-10)
