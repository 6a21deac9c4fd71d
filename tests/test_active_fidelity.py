"""Predicted beside actual changes: the same where the network is linear; a look-ahead that is wrong is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.uses import active
from ntkit.uses.active import LookAhead
from ntkit.uses.active.fidelity import fidelity

N, C, REG = 40, 3, 0.1


def pool() -> tuple[Tensor, np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    x = torch.randn(N, 5, dtype=torch.float64)
    classes = x[:, :C].argmax(1).numpy()
    y = np.full(N, -1)
    y[:8] = classes[:8]
    return x, y, classes


def ridge(first: np.ndarray, weights: np.ndarray | None = None):
    """Fits a linear network exactly, with the ridge that the look-ahead has for the first labels."""
    x, _, _ = pool()
    phi, begun = torch.cat([x, torch.ones(N, 1).double()], 1), torch.from_numpy(first >= 0)
    each = torch.ones(N).double() if weights is None else torch.from_numpy(weights)
    weight = REG * float(phi[begun].square().sum(1).mean() * each[begun].mean())

    def fit(y: np.ndarray) -> nn.Module:
        known = torch.from_numpy(y >= 0)
        some, target, w = phi[known], torch.eye(C).double()[torch.from_numpy(y)[known]], each[known, None]
        solution = torch.linalg.solve(some.T @ (w * some) + weight * torch.eye(6).double(), some.T @ (w * target))
        model = nn.Linear(5, C).double().eval()
        with torch.no_grad():
            model.weight.copy_(solution[:5].T)
            model.bias.copy_(solution[5])
        return model

    return fit


@pytest.mark.parametrize("weights", [None, np.linspace(0.2, 3, N)], ids=["alike", "weighted"])
def test_exact_where_the_network_is_linear(weights: np.ndarray | None) -> None:
    """Ridge regression is in balance: one label more moves it to that of all labels, as the look-ahead says."""
    x, y, classes = pool()
    rule = LookAhead(loss=active.SquareLoss(), kernel=active.LastLayer(), reg=REG, missing_label=-1)
    numbers = list(range(10, 22))
    ticks: list[tuple[int, int]] = []
    found = fidelity(
        rule, x, y, ridge(y, weights), generator=torch.Generator(), candidates=numbers, sample_weight=weights,
        labels=[int(classes[i]) for i in numbers], progress=lambda *tick: ticks.append(tick),
    )  # fmt: skip
    torch.testing.assert_close(found.predicted, found.actual, rtol=1e-8, atol=0)
    assert found.unscaled == pytest.approx(1.0, abs=1e-12)
    assert found.correlation == pytest.approx(1.0, abs=1e-9)
    assert found.slope == pytest.approx(1.0, abs=1e-4)  # as near as the search comes
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.standard_error < 1e-9
    assert ticks == [(k, 13) for k in range(1, 14)]
    assert found.candidates.tolist() == numbers
    assert "12 retrained networks" in str(found)


class Table(nn.Module):
    """Gives each point the logits that it has been given: its number stands in the first place."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0].long()]


@pytest.mark.parametrize("loss", [active.CrossEntropy(), active.SquareLoss()])
@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_further_in_the_same_direction(loss: active.Loss, factor: float) -> None:
    """A network that moves as is foreseen, only further: the slope says so, and the correlation is whole."""
    x, y, _ = pool()
    x[:, 0] = torch.arange(N)
    rule = LookAhead(loss=loss, kernel=active.Given(lambda model, x: active_features(len(x))), missing_label=-1)
    first = torch.randn(N, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state = active.LookAheadState(rule, x, y, Table(first))

    def fit(labels: np.ndarray) -> nn.Module:
        new = np.flatnonzero(labels != y)
        return Table(first + sum(factor * state.change(int(i), int(labels[i])) for i in new)).eval()

    found = fidelity(rule, x, y, fit, generator=torch.Generator().manual_seed(0), candidates=6)
    assert found.slope == pytest.approx(factor, rel=1e-4)
    assert found.correlation == pytest.approx(1.0, abs=1e-6)
    assert found.unscaled <= found.correlation + 1e-9
    assert found.standard_error < 1e-6


def test_a_wrong_kernel_is_seen() -> None:
    x, y, _ = pool()
    torch.manual_seed(1)
    noise = active.Given(lambda model, x: active_features(len(x)))
    good, bad = (
        fidelity(
            LookAhead(loss=active.SquareLoss(), kernel=kernel, reg=REG, missing_label=-1), x, y, ridge(y),
            generator=torch.Generator().manual_seed(0), candidates=10,
        ).correlation
        for kernel in (active.LastLayer(), noise)
    )  # fmt: skip
    assert good > 0.9
    assert bad < 0.5


def active_features(n: int):
    from ntkit.kernel.features import FeatureKernel

    return FeatureKernel(torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_refusals() -> None:
    x, y, _ = pool()
    rule, model = LookAhead(loss=active.SquareLoss(), missing_label=-1), ridge(y)(y)
    with pytest.raises(InputError, match="nothing changes"):
        fidelity(rule, x, y, lambda _: model, generator=torch.Generator(), candidates=3)
    with pytest.raises(InputError, match="expected 2 to 32"):
        fidelity(rule, x, y, ridge(y), generator=torch.Generator(), candidates=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": [3, 10]}, "point 3 has a label already"),
        ({"candidates": [10, 40]}, "from 0 to 39: got 40"),
        ({"candidates": [-1, 10]}, "got -1"),
        ({"candidates": [10, 10]}, "10 stands twice"),
        ({"candidates": [10]}, "got 1, expected 2 to 32"),
        ({"candidates": np.arange(N) > 30}, "flatnonzero"),
        ({"candidates": [10.5, 11.0]}, "got float64"),
        ({"candidates": np.int64(33)}, "got 33, expected 2 to 32"),
        ({"candidates": [10, 11], "labels": [1]}, r"one class for each of the 2 candidates, got \[1\]"),
        ({"candidates": [10, 11], "labels": [1, -1]}, r"got \[1, -1\]"),
        ({"candidates": [10, 11], "labels": [1, 0.5]}, r"got \[1.0, 0.5\]"),
        ({"y": pool()[1][:-1]}, "one label for each of the 40 points"),
        ({"strategy": active.Margin()}, "strategy: got Margin; expected an object such as LookAhead"),
    ],
)
def test_what_does_not_fit_is_said_before_training(change: dict[str, Any], message: str) -> None:
    x, y, _ = pool()
    rule = LookAhead(loss=active.SquareLoss(), missing_label=-1)

    def fit(_: np.ndarray) -> nn.Module:
        raise AssertionError("trained for nothing")

    with pytest.raises(InputError, match=message):
        fidelity(**{"strategy": rule, "X": x, "y": y, "fit": fit, "generator": torch.Generator(), **change})


def test_numbers_of_numpy_and_labels_without_an_output() -> None:
    x, y, _ = pool()
    rule, trained = LookAhead(loss=active.SquareLoss(), missing_label=-1), []

    def fit(labels: np.ndarray) -> nn.Module:
        trained.append(labels)
        return ridge(y)(labels)

    draw = torch.Generator().manual_seed(0)
    assert len(fidelity(rule, x, y, fit, generator=draw, candidates=np.int64(2)).candidates) == 2  # pyright: ignore
    trained.clear()
    with pytest.raises(InputError, match="from 0 to 2: got 3"):
        fidelity(rule, x, y, fit, generator=draw, candidates=[10, 11], labels=[0, 3])
    assert len(trained) == 1
