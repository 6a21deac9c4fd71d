"""A kernel conditioned on data: against the formula in NumPy, and scikit-learn's Gaussian process."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as theirs
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, NotPositiveDefiniteError
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.function import Empirical, KernelFunction
from ntkit.solve.conditioned import Posterior
from ntkit.solve.ridge import Absolute

quick = settings(max_examples=15, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tangent(outputs: int = 1) -> ntkit.Tangent:
    torch.manual_seed(0)
    return ntkit.linearize(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double())


X, Y, DATA = normal(7, 3), normal(5, 3, seed=1), normal(6, 3, seed=2)
PRIORS: dict[str, KernelFunction] = {
    "rbf": RBF(1.5),
    "sum of kernels": RBF(1.5) + 0.1 * DotProduct(),
    "network": Empirical(tangent()),
    "network with two outputs": Empirical(tangent(2)),
}
each = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())


def formula(prior: KernelFunction, x: Tensor, y: Tensor, ridge: float) -> np.ndarray:
    whole, left, right, inner = (
        k.dense().numpy() for k in (prior(x, y), prior(x, DATA), prior(DATA, y), prior(DATA, DATA))
    )
    return whole - left @ np.linalg.inv(inner + ridge * np.eye(len(inner))) @ right


@each
def test_the_covariance_is_the_formula(prior: KernelFunction) -> None:
    k = Posterior(prior, DATA, ridge=Absolute(0.3))
    for kernel, expected in ((k(X), formula(prior, X, X, 0.3)), (k(X, Y), formula(prior, X, Y, 0.3))):
        np.testing.assert_allclose(kernel.dense(), expected, atol=1e-10)
        np.testing.assert_allclose(kernel.tile(slice(1, 4), slice(2, 5)), expected[1:4, 2:5], atol=1e-10)
        np.testing.assert_allclose(kernel.diagonal(), expected.diagonal(), atol=1e-10)
        stripe = torch.cat(list(kernel.stripe(slice(2, 4), [slice(0, 2), slice(2, kernel.shape[1])])), 1)
        np.testing.assert_allclose(stripe, expected[2:4], atol=1e-10)
        assert kernel.scalars == prior(X).scalars
    square = k(X)
    assert square.symmetric
    assert not k(X, Y).symmetric
    np.testing.assert_allclose(square.dense(), square.dense().T, atol=1e-12)
    assert float(torch.linalg.eigvalsh(square.dense())[0]) > -1e-10
    np.testing.assert_allclose(k.diagonal(X), square.diagonal())


@quick
@given(n=st.integers(1, 6), lengthscale=st.floats(0.5, 3), ridge=st.floats(1e-4, 10), seed=st.integers(0, 99))
def test_a_gaussian_process_of_scikit_learn_says_the_same(n: int, lengthscale: float, ridge: float, seed: int) -> None:
    data, x, values = normal(n, 2, seed=seed), normal(4, 2, seed=seed + 1), normal(n, seed=seed + 2)
    process = GaussianProcessRegressor(theirs.RBF(lengthscale, "fixed"), alpha=ridge, optimizer=None)
    process.fit(data.numpy(), values.numpy())
    mean, covariance = process.predict(x.numpy(), return_cov=True)
    k = Posterior(RBF(lengthscale), data, ridge=Absolute(ridge))
    np.testing.assert_allclose(k(x).dense(), covariance, atol=1e-7)
    np.testing.assert_allclose(k.mean(x, values), mean, atol=1e-7)
    np.testing.assert_allclose(k.mean(x, values[:, None].numpy()), mean[:, None], atol=1e-7)


def test_it_vanishes_at_the_data_as_the_ridge_goes_to_zero() -> None:
    left = [float(Posterior(RBF(1.5), DATA, ridge=r)(DATA).diagonal().max()) for r in (1e-2, 1e-4, 1e-6)]
    assert left[0] < 1e-2
    np.testing.assert_allclose([left[1] / left[0], left[2] / left[1]], 1e-2, rtol=0.2)
    cross = Posterior(RBF(1.5), DATA, ridge=1e-8)(X, DATA).dense()
    assert float(cross.abs().max()) < 1e-6
    far = 100 + DATA
    torch.testing.assert_close(Posterior(RBF(1.5), DATA, ridge=1e-3)(far).dense(), RBF(1.5)(far).dense())


@pytest.mark.parametrize(
    ("prior", "n", "ridge"), [(PRIORS["network"], 20, 1e-7), (DotProduct(), 40, 1e-6)], ids=["network", "dot product"]
)
def test_no_variance_is_negative(prior: KernelFunction, n: int, ridge: float) -> None:
    """Where nothing is left, a kernel in float32 leaves its rounding."""
    if isinstance(prior, Empirical):
        prior = Empirical(ntkit.linearize(copy.deepcopy(prior.tangent.model).float()))
    data = normal(n, 3).float()
    k = Posterior(prior, data, ridge=ridge)
    x = torch.cat([data, 10 * data])
    variance, entries = k.diagonal(x), k(x).dense().diagonal()
    assert float(variance.min()) == 0
    assert bool(variance.sqrt().isfinite().all())
    torch.testing.assert_close(variance, entries.clamp_min(0), rtol=0, atol=1e-6 * float(prior.diagonal(x).max()))
    covariances = k(x, x.flip(0))  # these may well be negative
    assert float(covariances.diagonal().min()) < 0
    torch.testing.assert_close(covariances.diagonal(), covariances.dense().diagonal())


def test_conditioning_twice_is_conditioning_on_both() -> None:
    first, second = DATA[:4], DATA[4:]
    ridge = Absolute(0.2)
    twice = Posterior(Posterior(RBF(1.5), first, ridge=ridge), second, ridge=ridge)
    once = Posterior(RBF(1.5), DATA, ridge=ridge)
    torch.testing.assert_close(twice(X, Y).dense(), once(X, Y).dense())
    assert bool((once.diagonal(X) < Posterior(RBF(1.5), first, ridge=ridge).diagonal(X)).all())


def test_a_number_is_a_relative_ridge_and_precision_is_double() -> None:
    prior = 4.0 * RBF(1.5)
    relative, absolute = Posterior(prior, DATA, ridge=0.1), Posterior(prior, DATA, ridge=Absolute(0.4))
    torch.testing.assert_close(relative(X).dense(), absolute(X).dense())
    single = Posterior(prior, DATA.float(), ridge=0.1)(X.float())
    assert single.dtype == single.dense().dtype == single.diagonal().dtype == torch.float64
    torch.testing.assert_close(single.dense(), relative(X).dense(), rtol=1e-5, atol=1e-5)


def test_gradients() -> None:
    k = Posterior(RBF(1.5) + DotProduct(0.3, 2), DATA, ridge=0.1)
    x, y = X[:3].clone().requires_grad_(), Y[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: k(a, b).dense(), (x, y))
    assert torch.autograd.gradcheck(lambda a: k(a).dense(), x)
    assert torch.autograd.gradcheck(k.diagonal, x)
    assert torch.autograd.gradcheck(lambda a: k.mean(a, normal(6, 2)), x)
    assert torch.autograd.gradcheck(lambda a: (2.0 * k.normalised())(a).dense() + a.sum(), x)


@each
def test_saved_and_told_apart(prior: KernelFunction, tmp_path: Any) -> None:
    pytest.importorskip("zarr")
    k = Posterior(prior, DATA, ridge=0.1)
    kernel = k(X)
    torch.testing.assert_close(kernel.save(tmp_path / "k.zarr", memory=2**20).dense(), kernel.dense())
    assert k(X.clone()).identity() == Posterior(prior, DATA.clone(), ridge=0.1)(X).identity() == kernel.identity()
    others = [Posterior(prior, DATA, ridge=0.2)(X), Posterior(prior, Y, ridge=0.1)(X), k(X, Y), k(Y), prior(X)]
    assert all(other.identity() != kernel.identity() for other in others)
    torch.testing.assert_close(copy.deepcopy(k)(X, Y).dense(), k(X, Y).dense())
    assert repr(k) == f"Posterior({prior!r}, {prior(DATA).shape[0]} rows, ridge={k.factor.ridge:.3g})"


def test_refusals() -> None:
    with pytest.raises(InputError, match="held fixed"):
        Posterior(RBF(), DATA.clone().requires_grad_(), ridge=0.1)
    with pytest.raises(NotPositiveDefiniteError, match="A ridge that helps"):
        Posterior(RBF(), torch.cat([DATA, DATA]), ridge=0.0)
    with pytest.raises(InputError, match="ridge"):
        Posterior(RBF(), DATA, ridge=-1.0)
    with pytest.raises(InputError, match="a right-hand side for a kernel of 6 rows"):
        Posterior(RBF(), DATA, ridge=0.1).mean(X, normal(5))
