"""What is made of kernels, as functions and as matrices: sums, products, multiples, centring, normalising."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import KernelCenterer
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.explicit import FeatureFunction, RandomFourier
from ntkit.kernel.fully_connected import FullyConnected
from ntkit.kernel.function import Empirical, KernelFunction

quick = settings(max_examples=15, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


X, Y, Z = normal(7, 3), normal(5, 3, seed=1), normal(6, 3, seed=2)
RBF1, CUBIC = RBF(1.3), DotProduct(0.3, 3, 0.5)
WIDE = FullyConnected(depth=3, weight_std=1.4, bias_std=0.3)
TANGENT = Empirical(ntkit.linearize(network()))
SEVERAL = Empirical(ntkit.linearize(network(2)))
MADE: dict[str, KernelFunction] = {
    "sum": RBF1 + CUBIC,
    "product": RBF1 * CUBIC,
    "multiple": 2.5 * RBF1,
    "normalised": CUBIC.normalised(),
    "centred": CUBIC.centred(on=Z),
    "all of it": 0.5 * (RBF1 * CUBIC + 2.0 * WIDE.normalised()).centred(on=Z),
    "of a network": (TANGENT + RBF1 * TANGENT).normalised(),
    "of a network with two outputs": (2.0 * SEVERAL * SEVERAL).normalised().centred(on=Z),
}
each = pytest.mark.parametrize("k", MADE.values(), ids=MADE.keys())


@each
def test_matrices_are_symmetric_semidefinite_and_read_in_tiles(k: KernelFunction) -> None:
    for kernel in (k(X), k(X, Y)):
        dense, (n, m) = kernel.dense(), kernel.shape
        assert dense.shape == (n, m)
        assert dense.dtype == kernel.dtype == torch.float64
        for rows, cols in (
            (slice(0, n // 2), slice(1, m)),
            (slice(n // 2, n), slice(0, 2)),
            (slice(1, 4), slice(2, 5)),
        ):
            torch.testing.assert_close(kernel.tile(rows, cols), dense[rows, cols], rtol=1e-12, atol=1e-12)
        columns = [slice(0, 2), slice(2, m)]  # of whole examples
        torch.testing.assert_close(torch.cat(list(kernel.stripe(slice(2, 4), columns)), 1), dense[2:4])
        torch.testing.assert_close(kernel.diagonal(), dense.diagonal(), rtol=1e-12, atol=1e-12)
        v = normal(m, 2, seed=3)
        torch.testing.assert_close(kernel @ v, dense @ v)
    square = k(X)
    assert square.symmetric
    assert not k(X, Y).symmetric
    torch.testing.assert_close(square.dense(), square.dense().T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(k(X, X).dense(), square.dense(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(k(Y, X).dense(), k(X, Y).dense().T)
    torch.testing.assert_close(k.diagonal(X), square.diagonal())
    assert square.scalars == len(square.diagonal()) // 7
    eigenvalues = torch.linalg.eigvalsh(square.dense())
    assert float(eigenvalues[0]) > -1e-10 * float(eigenvalues[-1])


@quick
@given(n=st.integers(1, 6), m=st.integers(1, 6), factor=st.floats(0, 5), seed=st.integers(0, 99))
def test_sums_products_and_multiples_are_entry_by_entry(n: int, m: int, factor: float, seed: int) -> None:
    x, y = normal(n, 3, seed=seed), normal(m, 3, seed=seed + 1)
    rbf = np.exp(-((x.numpy()[:, None] - y.numpy()[None]) ** 2).sum(2) / (2 * 1.3**2))
    cubic = (0.5 * x.numpy() @ y.numpy().T + 0.3) ** 3
    for k, expected in (
        (RBF1 + CUBIC, rbf + cubic), (RBF1 * CUBIC, rbf * cubic), (factor * RBF1, factor * rbf),
        (RBF1 * np.float32(0.5), 0.5 * rbf),
        (np.float64(0.5) * RBF1, 0.5 * rbf), (RBF1 * CUBIC * RBF1 + 2 * CUBIC, rbf * cubic * rbf + 2 * cubic),
    ):  # fmt: skip
        np.testing.assert_allclose(k(x, y).dense(), expected, rtol=1e-10, atol=1e-10)


def test_sums_of_lists_quotients_and_powers() -> None:
    a, b = RBF1(X, Y).dense(), CUBIC(X, Y).dense()
    torch.testing.assert_close(sum([RBF1, CUBIC, RBF1])(X, Y).dense(), 2 * a + b)
    assert 0 + RBF1 is RBF1
    torch.testing.assert_close((CUBIC / 4)(X, Y).dense(), b / 4)
    torch.testing.assert_close((CUBIC / np.float64(0.3)).diagonal(X), CUBIC.diagonal(X) / 0.3)
    assert CUBIC**1 is CUBIC
    for power in (2, 3, np.int64(5), 8):
        torch.testing.assert_close((CUBIC**power)(X, Y).dense(), b ** int(power))
        torch.testing.assert_close((CUBIC**power).diagonal(X), CUBIC.diagonal(X) ** int(power))


def test_features_stay_at_hand_in_sums_and_quotients() -> None:
    phi = RandomFourier(RBF1, 8, generator=torch.Generator().manual_seed(0))
    for made, expected in ((sum([phi, phi]), 2 * phi), (phi / 4, 0.25 * phi)):
        assert isinstance(made, FeatureFunction)
        torch.testing.assert_close(made(X, Y).dense(), expected(X, Y).dense())


def test_matrices_multiply_too() -> None:
    left, right = ntkit.DenseKernel(X @ X.T), ntkit.DenseKernel(Z[:5] @ Z.T[:, :5])
    wide = ntkit.DenseKernel(Y @ X[:5].T)
    torch.testing.assert_close((right * wide).dense(), right.dense() * wide.dense())
    assert (left * left).symmetric
    assert not (right * wide).symmetric
    with pytest.raises(InputError, match=r"cannot multiply kernels of different shapes: \(7, 7\) and \(5, 5\)"):
        left * right


@pytest.mark.parametrize("k", [CUBIC, WIDE], ids=["polynomial", "infinite width"])
def test_a_normalised_kernel_is_a_cosine(k: KernelFunction) -> None:
    cosine = k.normalised()
    assert torch.equal(cosine(X).diagonal(), torch.ones(7, dtype=torch.float64))
    assert torch.equal(cosine(X).dense().diagonal(), torch.ones(7, dtype=torch.float64))
    assert torch.equal(cosine(X).tile(slice(2, 5), slice(1, 4))[[0, 1], [1, 2]], torch.ones(2, dtype=torch.float64))
    assert float(cosine(X, Y).dense().abs().max()) <= 1
    both = k(torch.cat([X, Y])).dense()
    root = torch.linalg.cholesky(both + 1e-12 * torch.eye(12)).numpy()
    np.testing.assert_allclose(cosine(X, Y).dense(), cosine_similarity(root[:7], root[7:]), atol=1e-6)


def test_an_example_without_features_has_no_direction() -> None:
    x = X.clone()
    x[4] = 0
    with pytest.raises(InputError, match=r"example 4 of x2 has k\(x, x\) = 0"):
        DotProduct().normalised()(X, x)
    with pytest.raises(InputError, match="example 4 of x1"):
        DotProduct().normalised()(x)
    one = Empirical(ntkit.linearize(nn.Linear(3, 2, bias=False).double()))
    with pytest.raises(InputError, match="example 4 of x1"):  # the fourth example, not the eighth row
        one.normalised()(x)


def test_centring_takes_the_mean_of_features_away() -> None:
    # a polynomial kernel of degree 2 with its features written out
    def phi(x: Tensor) -> np.ndarray:
        a = x.numpy()
        pairs = np.einsum("ni,nj->nij", a, a).reshape(len(a), -1)
        return np.concatenate([pairs, np.sqrt(2) * a, np.ones((len(a), 1))], 1)

    k, mean = DotProduct(1.0, 2).centred(on=Z), phi(Z).mean(0)
    np.testing.assert_allclose(k(X, Y).dense(), (phi(X) - mean) @ (phi(Y) - mean).T, atol=1e-10)
    np.testing.assert_allclose(k(X).diagonal(), ((phi(X) - mean) ** 2).sum(1), atol=1e-10)


def test_centring_on_the_examples_themselves_is_that_of_the_matrix() -> None:
    for k in (CUBIC, TANGENT, SEVERAL):
        torch.testing.assert_close(k.centred(on=X)(X).dense(), k(X).centred().dense(), rtol=1e-10, atol=1e-10)
    train, test = CUBIC(X).dense().numpy(), CUBIC(Y, X).dense().numpy()
    centrer = KernelCenterer().fit(train)
    np.testing.assert_allclose(CUBIC.centred(on=X)(Y, X).dense(), centrer.transform(test), atol=1e-10)


def test_a_mean_over_more_examples_than_a_strip() -> None:
    many = normal(2100, 3, seed=5)
    got = CUBIC.centred(on=many)(X, Y).dense()
    gram = CUBIC(torch.cat([X, Y]), many).dense()
    grand = float(CUBIC(many).dense().mean())
    expected = CUBIC(X, Y).dense() - gram[:7].mean(1)[:, None] - gram[7:].mean(1)[None] + grand
    torch.testing.assert_close(got, expected)


DIFFERENTIABLE: dict[str, Callable[[Tensor], KernelFunction]] = {
    "sum": lambda z: RBF1 + CUBIC,
    "product": lambda z: RBF1 * CUBIC,
    "multiple": lambda z: 2.5 * RBF1,
    "normalised": lambda z: CUBIC.normalised(),
    "centred": lambda z: CUBIC.centred(on=z),
    "of infinite width": lambda z: (WIDE * RBF1).normalised(),
}


@pytest.mark.parametrize("make", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
def test_gradients(make: Callable[[Tensor], KernelFunction]) -> None:
    x, y, z = (t[:3].clone().requires_grad_() for t in (X, Y, Z))
    k = make(z.detach())
    assert torch.autograd.gradcheck(lambda a, b: k(a, b).dense(), (x, y))
    weights = normal(3, 3, seed=4)
    assert torch.autograd.gradcheck(lambda a: (k(a).dense() * weights).sum() + a.sum(), x)
    assert torch.autograd.gradcheck(lambda a, b: make(b)(a).dense() + b.sum(), (x, z))


@each
def test_what_is_made_can_be_saved_pickled_and_copied(k: KernelFunction, tmp_path: Any) -> None:
    pytest.importorskip("zarr")
    kernel = k(X)
    saved = kernel.save(tmp_path / "k.zarr", memory=2**20)
    torch.testing.assert_close(saved.dense(), kernel.dense(), rtol=1e-12, atol=1e-12)
    again = k(X.clone())
    assert again.identity() == kernel.identity() == saved.identity()
    assert k(Y).identity() != kernel.identity()
    assert (0.25 * k)(X).identity() != kernel.identity()
    for other in (pickle.loads(pickle.dumps(k)), copy.deepcopy(k)):
        torch.testing.assert_close(other(X, Y).dense(), k(X, Y).dense())


def test_identities_tell_what_was_done() -> None:
    made = [
        RBF1, RBF1 + CUBIC, RBF1 * CUBIC, CUBIC + RBF1, 2.0 * RBF1, 3.0 * RBF1, RBF1.normalised(), RBF1.centred(on=Z),
        RBF1.centred(on=Y), RBF1.normalised().centred(on=Z), RBF1.centred(on=Z).normalised(),
    ]  # fmt: skip
    seen = [repr(sorted(k(X).identity().items())) for k in made]
    assert len(set(seen)) == len(made)


def test_names() -> None:
    k = 2.0 * (RBF(1.0) + DotProduct()) * RBF(2.0).normalised()
    dot = "DotProduct(offset=0.0, degree=1, scale=1.0)"
    assert repr(k) == f"2.0 * (RBF(lengthscale=1.0) + {dot}) * RBF(lengthscale=2.0).normalised()"
    assert repr((2.0 * RBF(1.0)).normalised()) == "(2.0 * RBF(lengthscale=1.0)).normalised()"
    assert repr((RBF(1.0) * RBF(2.0)).centred(on=X)).startswith("(RBF(lengthscale=1.0) * RBF(lengthscale=2.0)).")
    assert repr((RBF(1.0) + RBF(2.0)).centred(on=X)) == "(RBF(lengthscale=1.0) + RBF(lengthscale=2.0)).centred(on=...)"


def test_refusals() -> None:
    for factor in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="not negative and finite"):
            factor * RBF1
    for operation in (lambda: RBF1 + 1.0, lambda: RBF1 * "2", lambda: RBF1 * True, lambda: "2" * RBF1):
        with pytest.raises(TypeError):
            operation()
    for operation in (
        lambda: 1.0 + RBF1,
        lambda: False + RBF1,
        lambda: RBF1 / "2",
        lambda: RBF1**0.5,
        lambda: 2 / RBF1,
    ):
        with pytest.raises(TypeError):
            operation()
    for divisor in (0, -2.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="divided by a number"):
            RBF1 / divisor
    for power in (0, -1):
        with pytest.raises(InputError, match=f"needs 1 or more: got {power}"):
            RBF1**power
    with pytest.raises(InputError, match=r"cannot add kernels .* \(14, 14\) and \(7, 7\), with 2 and 1 rows"):
        (SEVERAL + RBF1)(X)
    with pytest.raises(InputError, match="cannot multiply kernels"):
        (SEVERAL * RBF1)(X)
    for n in (7, 1):  # of one example the numbers would be spread over its scalars
        for k, verb in ((SEVERAL + RBF1, "add"), (RBF1 + SEVERAL, "add"), (SEVERAL * RBF1, "multiply")):
            with pytest.raises(InputError, match=rf"cannot {verb} kernels of \d+ and \d+ rows for the same examples"):
                k.diagonal(X[:n])
    with pytest.raises(InputError, match="no derivative with respect to its inputs: detach"):
        (TANGENT + RBF1)(X, Y.clone().requires_grad_())  # and not the derivative of one of the two
    with torch.no_grad():
        assert (TANGENT + RBF1)(X, Y.clone().requires_grad_()).shape == (7, 5)
