"""Regression on features is kernel regression with their kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, NotPositiveDefiniteError
from ntkit.kernel import base
from ntkit.solve import primal as primal_module
from ntkit.solve.primal import PrimalRegression
from ntkit.solve.regression import KernelRegression
from ntkit.solve.ridge import GCV, Absolute, LeaveOneOut
from ntkit.tangent.sketch import Sketch
from tests.cases import normal

N, M, C = 40, 7, 3
RIDGES = [1e-4, 0.3, 20.0]


def data(rows: int = N, size: int = 12, seed: int = 0) -> Tensor:
    return normal(size, seed=seed)(rows).double()


@pytest.mark.parametrize("size", [12, 70], ids=["tall", "wide"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_it_is_kernel_regression(size: int, full: bool, around: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primal_module, "strips", lambda n: base.strips(n, 16))
    rows = C if full else 1
    phi, new, y = data(N * rows, size), data(M * rows, size, 1), data(N, C, 2)
    prior, new_prior = (data(N, C, 3), data(M, C, 4)) if around else (None, None)
    kernel = KernelRegression.decompose(phi @ phi.T, y, prior=prior)
    primal = PrimalRegression.decompose(phi, y, prior=prior)
    assert primal.mean_diagonal == pytest.approx(kernel.mean_diagonal)
    for ridge in RIDGES:
        expected, found = kernel.fit(Absolute(ridge)), primal.fit(Absolute(ridge))
        close = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(found.predict(new, new_prior), expected.predict(new @ phi.T, new_prior), **close)
        assert found.gcv == pytest.approx(expected.gcv, rel=1e-5)
        assert found.train_error == pytest.approx(kernel.train_error(ridge), rel=1e-5, abs=1e-12)
        assert found.relative_ridge == pytest.approx(expected.relative_ridge)
        assert found.relative_residual < 1e-12
        values = kernel.eigenvalues
        assert found.effective_dimension == pytest.approx(float((values / (values + ridge)).sum()), rel=1e-6)
    assert primal.fit(GCV()).ridge == pytest.approx(kernel.fit(GCV()).ridge)
    assert primal.fit(0.1).ridge == pytest.approx(0.1 * kernel.mean_diagonal)


@pytest.mark.parametrize("size", [12, 70], ids=["tall", "wide"])
@pytest.mark.parametrize("wrong", ["values", "vectors", "nothing"])
def test_the_residual_does_not_trust_the_eigensolver(size: int, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    phi, y, right = data(N, size), data(N, C, 2), primal_module.eigh

    def broken(matrix: Any, **kwargs: Any) -> tuple[Any, Any]:
        values, vectors = right(matrix, **kwargs)
        turned = np.linalg.qr(vectors + 0.05 * np.cos(np.arange(size**2)).reshape(size, size))[0]
        return (1.7 * values if wrong == "values" else values), (turned if wrong == "vectors" else vectors)

    monkeypatch.setattr(primal_module, "strips", lambda n: base.strips(n, 16))
    monkeypatch.setattr(primal_module, "eigh", broken)
    regression = PrimalRegression.decompose(phi, y)
    torch.testing.assert_close(regression.moments, phi.T @ phi, rtol=1e-13, atol=1e-13)
    fit = regression.fit(0.1)
    true = phi.T @ phi @ fit.weights + fit.ridge * fit.weights - phi.T @ y
    error = float(true.norm() / (phi.T @ y).norm())
    assert fit.relative_residual == pytest.approx(error, rel=1e-6, abs=1e-13)
    assert fit.relative_residual < 1e-12 if wrong == "nothing" else fit.relative_residual > 0.01


def test_features_from_a_network_and_from_disk(tmp_path: Path) -> None:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, C)).double(), data(N, 6), data(N, C, 2)
    made = ntkit.FeatureMap(ntkit.linearize(model), Sketch(100, 3))
    saved = made.save(x, tmp_path / "f.zarr")
    seen: list[tuple[int, int]] = []
    fit = PrimalRegression.decompose(saved, y, progress=lambda *n: seen.append(n)).fit(0.01)
    again = PrimalRegression.decompose(made(x), y).fit(0.01)
    torch.testing.assert_close(fit.predict(made(data(M, 6, 5))), again.predict(made(data(M, 6, 5))))
    assert fit.predict(saved).shape == (N, C)
    assert seen == [(N * C, N * C)]


def test_a_ridge_too_small_is_said() -> None:
    primal = PrimalRegression.decompose(data(), data(N, C, 2))
    with pytest.raises(NotPositiveDefiniteError, match="singular to working precision") as error:
        primal.fit(0.0)
    assert primal.fit(Absolute(error.value.suggested_ridge)).weights.isfinite().all()


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: PrimalRegression.decompose(data(), data(N - 1, C)), "has N=39 rows, or N\\*C=117"),
        (lambda: PrimalRegression.decompose(data()[0], data(N, C)), "features are a FeatureKernel or"),
        (lambda: PrimalRegression.decompose(data() * float("nan"), data(N, C)), "features 0 to 39 are not finite"),
        (lambda: PrimalRegression.decompose(data(), data(N, C)).fit(LeaveOneOut()), "search the ridge with GCV"),
        (lambda: PrimalRegression.decompose(data(), data(N, C)).fit(0.1).predict(data(M, 5)), "has 12 features: got 5"),
        (lambda: PrimalRegression.decompose(data(), data(N, C)).fit(0.1).predict(data(M), data(M, C)), "left out"),
    ],
)
def test_refusals(do: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        do()


def test_a_copy_does_not_fool_gcv() -> None:
    """More features than rows: one mode without a residual, by which alone the plain score goes."""
    phi, y = data(N, 60) + 2, data(N, 1, 2)
    phi, y = torch.cat([phi, phi[:1]]), torch.cat([y, y[:1]])
    primal, kernel = PrimalRegression.decompose(phi, y), KernelRegression.decompose(phi @ phi.T, y)
    assert primal.gcv(1e-6) < 1e-3 * kernel.leave_one_out(1e-6)
    assert primal.expected_error(1e-6) == float("inf")
    assert primal.expected_error(30.0) == primal.gcv(30.0)
    fit = primal.fit(GCV())
    assert fit.gcv > 0.3 * kernel.leave_one_out(fit.ridge)
    tall = PrimalRegression.decompose(torch.cat([data(N), data(N)[:1]]), y)
    assert tall.expected_error(1e-6) == tall.gcv(1e-6)  # many modes lie outside the features
