"""Active learning with the network and the pool on a device: choices are those of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntkit.kernel.base import DenseKernel
from ntkit.kernel.features import FeatureKernel
from ntkit.uses import active
from tests.elsewhere import DEVICE, device, moved

N, C = 40, 4
# Several ways to ask of a network and a pool; the function moves what belongs to them.
Question = Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor]], np.ndarray]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(6 * 9, 12), nn.ReLU(), nn.Linear(12, C),
    )  # fmt: skip


def pool() -> tuple[Tensor, np.ndarray]:
    y = np.full(N, -1)
    y[:12] = np.arange(12) % C
    return torch.randn(N, 3, 6, 6, generator=torch.Generator().manual_seed(1)), y


def fit(x: Tensor, make: Callable[[], nn.Module]) -> active.Training:
    return active.Training(x, make, steps=8)


@cache
def trained() -> nn.Module:
    x, y = pool()
    return fit(x, network)(y)


def alike(ask: Question) -> None:
    """The same answer on the device as on the CPU."""
    x, _ = pool()
    expected = ask(trained(), x, lambda t: t)
    with device():
        found = ask(moved(trained()), x.to(DEVICE), lambda t: t.to(DEVICE))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def asked(strategy: Any) -> Question:
    return lambda model, x, _: strategy.query(x, pool()[1], model, batch_size=4)


@pytest.mark.parametrize("name", active.NAMES)
def test_every_strategy(name: str) -> None:
    alike(asked(active.strategy(name, missing_label=-1)))


@pytest.mark.parametrize(
    "kernel",
    [active.LastLayer(), active.Sketched(64), active.Sketched(64, coupled=True), active.Exact(coupled=True)],
)
def test_kernels(kernel: active.Geometry) -> None:
    alike(asked(active.LookAhead(kernel=kernel, missing_label=-1)))
    alike(asked(active.LookAhead(loss=active.SquareLoss(), kernel=kernel, missing_label=-1)))
    if not getattr(kernel, "coupled", False):
        alike(asked(active.MaxDet(kernel=kernel, sigma=0.1, missing_label=-1)))
        alike(asked(active.Bait(kernel=kernel, missing_label=-1)))


@pytest.mark.parametrize("kind", [FeatureKernel, lambda phi: DenseKernel(phi @ phi.T)])
def test_features_and_matrices_of_ones_own(kind: Callable[[Tensor], Any]) -> None:
    phi = torch.randn(N, 7, generator=torch.Generator().manual_seed(2))

    def ask(model: nn.Module, x: Tensor, to: Callable[[Tensor], Tensor]) -> np.ndarray:
        strategy = active.LookAhead(kernel=active.Given(kind(to(phi))), missing_label=-1)
        return strategy.query(x, pool()[1], model, batch_size=4)

    alike(ask)


def test_labels_one_at_a_time() -> None:
    def ask(model: nn.Module, x: Tensor, _: Any) -> np.ndarray:
        state = active.LookAheadState(active.LookAhead(missing_label=-1), x, pool()[1], model)
        state.add(20, 1)
        state.relabel(20, 2)
        state.remove(0)
        return np.concatenate([np.nan_to_num(state.scores()), state.change(30).flatten().numpy()])

    alike(ask)


def test_training_and_trust() -> None:
    x, y = pool()
    strategy = active.LookAhead(missing_label=-1)

    def trust(x: Tensor, make: Callable[[], nn.Module]) -> float:
        generator = torch.Generator().manual_seed(0)
        return active.fidelity(strategy, x, y, fit(x, make), generator=generator, candidates=2).correlation

    expected = strategy.query(x, y, trained(), batch_size=4)
    with device():
        away = x.to(DEVICE)
        model = fit(away, lambda: moved(network()))(y)
        assert next(model.parameters()).device == DEVICE
        np.testing.assert_array_equal(strategy.query(away, y, model, batch_size=4), expected)
        assert trust(away, lambda: moved(network())) == pytest.approx(trust(x, network), rel=1e-3)


def test_session(tmp_path: Path) -> None:
    x, y = pool()

    def session(name: str, x: Tensor, make: Callable[[], nn.Module]) -> np.ndarray:
        loop = active.Loop(
            x, active.LookAhead(), fit(x, make), journal=tmp_path / name, classes=C, y=y,
            stop=[active.Budget(20), active.Kappa(), active.MeanUncertainty(1e-9), active.MaxPredictedChange(1e-9)],
        )  # fmt: skip
        loop.run(lambda points: [int(point) % C for point in points], size=4)
        return loop.labels

    expected = session("here", x, network)
    with device():
        np.testing.assert_array_equal(session("away", x.to(DEVICE), lambda: moved(network())), expected)


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with device():
        a, b = torch.ones(2, 2).to(DEVICE), torch.ones(2, 2)
        for wrong in (
            lambda: a + b,
            lambda: a @ b,
            lambda: b.add_(a),
            lambda: b[a[0].long()],
            lambda: torch.cat([a, b]),
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()
        with pytest.raises(TypeError, match="copy it to the CPU"):
            a.numpy()
        assert a[torch.tensor([0])].device == (a * 2.0).device == DEVICE
        assert copy.copy(a).cpu().device.type == "cpu"
