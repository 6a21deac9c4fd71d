"""Kernels with features at hand: random Fourier features, sketches, Nystrom, and what is made of them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.kernel_approximation import Nystroem
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.explicit import FeatureFunction, Features, Nystrom, RandomFourier, Sketched
from ntkit.kernel.features import FeatureKernel, FeatureMap
from ntkit.kernel.function import Empirical, KernelFunction, ProductFunction, SumFunction
from ntkit.tangent.sketch import Sketch

quick = settings(max_examples=15, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tangent(outputs: int = 1) -> ntkit.Tangent:
    torch.manual_seed(0)
    return ntkit.linearize(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double())


def squares(x: Tensor) -> Tensor:
    return torch.cat([x, x.square()], 1)


X, Y, Z = normal(7, 3), normal(5, 3, seed=1), normal(6, 3, seed=2)
SIMPLE: dict[str, FeatureFunction] = {
    "features": Features(squares),
    "random Fourier": RandomFourier(RBF(1.5), 12, generator=draws()),
    "Nystrom": Nystrom(RBF(1.5), Z),
    "Nystrom of a network with two outputs": Nystrom(Empirical(tangent(2)), Z),
    "sketched": Sketched.drawn(tangent(), 16, generator=draws()),
    "sketched, two outputs": Sketched.drawn(tangent(2), 16, generator=draws()),
}
MADE: dict[str, FeatureFunction] = SIMPLE | {
    "sum": SIMPLE["features"] + SIMPLE["Nystrom"],
    "multiple": 2.5 * SIMPLE["random Fourier"],
    "normalised": SIMPLE["features"].normalised(),
    "centred": SIMPLE["sketched, two outputs"].centred(on=Z),
    "all of it": 0.5 * (SIMPLE["features"].normalised() + 2.0 * SIMPLE["sketched"]).centred(on=Z),
}  # pyright: ignore[reportAssignmentType]
each = pytest.mark.parametrize("k", MADE.values(), ids=MADE.keys())


@each
def test_the_kernel_is_that_of_the_features(k: FeatureFunction) -> None:
    phi, psi = k.features(X), k.features(Y)
    assert phi.dtype == torch.float64
    for kernel, expected in ((k(X), phi @ phi.T), (k(X, Y), phi @ psi.T), (k(X, X), phi @ phi.T)):
        n, m = expected.shape
        assert kernel.shape == (n, m)
        assert kernel.scalars == len(phi) // 7
        torch.testing.assert_close(kernel.dense(), expected)
        torch.testing.assert_close(kernel.tile(slice(1, 4), slice(2, 5)), expected[1:4, 2:5])
        torch.testing.assert_close(kernel.diagonal(), expected.diagonal())
        v = normal(m, 2, seed=3)
        torch.testing.assert_close(kernel @ v, expected @ v)
        torch.testing.assert_close(kernel @ v[:, 0], expected @ v[:, 0])
        with pytest.raises(InputError, match="cannot multiply"):
            kernel @ v[1:]
    assert k(X).symmetric
    assert not k(X, Y).symmetric
    torch.testing.assert_close(k.diagonal(X), k(X).diagonal())


@each
def test_what_is_made_of_features_is_what_is_made_of_the_kernel(k: FeatureFunction) -> None:
    """The features of a sum, a multiple, ... have the kernel that the algebra of kernels gives."""

    class Plain(KernelFunction):
        """The same without features."""

        def __init__(self, inner: FeatureFunction) -> None:
            self.inner = inner

        def __call__(self, x1: Any, x2: Any = None) -> ntkit.Kernel:
            return self.inner(x1, x2)

    plain = Plain(k)
    for with_features, without in (
        (k + k, plain + plain), (3.0 * k, 3.0 * plain), (k.normalised(), plain.normalised()),
        (k.centred(on=Z), plain.centred(on=Z)),
    ):  # fmt: skip
        assert isinstance(with_features, FeatureFunction)
        assert not isinstance(without, FeatureFunction)
        for pair in ((X,), (X, Y)):
            torch.testing.assert_close(with_features(*pair).dense(), without(*pair).dense(), rtol=1e-9, atol=1e-9)
    assert isinstance(k + plain, SumFunction)
    assert isinstance(plain + k, SumFunction)
    assert isinstance(k * k, ProductFunction)
    torch.testing.assert_close((k * k)(X, Y).dense(), k(X, Y).dense().square())


@each
def test_saved_pickled_copied_and_told_apart(k: FeatureFunction, tmp_path: Any) -> None:
    pytest.importorskip("zarr")
    for name, kernel in (("square", k(X)), ("cross", k(X, Y))):
        saved = kernel.save(tmp_path / f"{name}.zarr", memory=2**20)
        torch.testing.assert_close(saved.dense(), kernel.dense())
    assert k(X.clone()).identity() == k(X).identity()
    assert k(X, Y.clone()).identity() == k(X, Y).identity()
    for other in (k(Y), k(X, Y), (2.0 * k)(X), k.normalised()(X), k.centred(on=Y)(X), (k + k)(X)):
        assert other.identity() != k(X).identity()
    for other in (pickle.loads(pickle.dumps(k)), copy.deepcopy(k)):
        assert torch.equal(other.features(X), k.features(X))
    assert repr(k)


def test_identities_tell_the_features_apart() -> None:
    twice = nn.Linear(3, 2).double()
    made = [
        Nystrom(RBF(1.5), Z), Nystrom(RBF(1.5), Y), Nystrom(RBF(1.0), Z), Nystrom(DotProduct(), Z),
        *(RandomFourier(RBF(1.5), size, generator=draws(seed)) for size, seed in ((12, 0), (12, 1), (14, 0))),
        RandomFourier(RBF(1.0), 12, generator=draws()), Features(squares), Features(torch.sin), Features(twice),
        *(Sketched.drawn(tangent(), size, generator=draws(seed)) for size, seed in ((16, 0), (16, 1), (8, 0))),
    ]  # fmt: skip
    seen = [repr(sorted(k(X).identity().items())) for k in made]
    with torch.no_grad():
        twice.weight.mul_(2)
    seen.append(repr(sorted(Features(twice)(X).identity().items())))
    assert len(set(seen)) == len(made) + 1


# --- random Fourier features ------------------------------------------------------------------------------------------


def test_random_fourier_features_have_the_right_mean_and_spread() -> None:
    rbf, runs, size = RBF(1.5), 400, 20
    exact = rbf(X, Y).dense()
    found = torch.stack([RandomFourier(rbf, size, generator=draws(seed))(X, Y).dense() for seed in range(runs)])
    spread = (1 - exact.square()) / size**0.5
    assert float(((found.mean(0) - exact) / (spread / runs**0.5)).abs().max()) < 4.5
    torch.testing.assert_close(found.std(0), spread, rtol=0.2, atol=0)
    torch.testing.assert_close(found.var(0).mean(), spread.square().mean(), rtol=0.1, atol=0)
    one = RandomFourier(rbf, size, generator=draws())
    torch.testing.assert_close(one(X).diagonal(), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["Fourier", "sketch"])
def test_random_features_converge_with_the_root_of_their_number(kind: str) -> None:
    rbf, network = RBF(1.5), tangent()
    exact = (rbf(X) if kind == "Fourier" else Empirical(network)(X)).dense()
    sizes, errors = (4, 8, 16, 32) if kind == "sketch" else (16, 64, 256, 1024), []
    for size in sizes:
        squared = []
        for seed in range(60):
            generator = draws(seed)
            k = (
                RandomFourier(rbf, size, generator=generator)
                if kind == "Fourier"
                else Sketched.drawn(network, size, generator=generator)
            )
            squared.append(float((k(X).dense() - exact).square().sum()))
        errors.append(float(np.mean(squared)) ** 0.5)
    if kind == "sketch":  # exact from P = 31 features on, and never worse than a dense sketch before
        assert errors[-1] < 1e-12
        assert all(errors[i + 1] < 0.8 * errors[i] for i in range(2))
        return
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.05)


def test_one_draw_serves_all_examples() -> None:
    k = RandomFourier(RBF(1.5), 8, generator=draws())
    torch.testing.assert_close(k.features(X)[2:4], k.features(X[2:4]))
    torch.testing.assert_close(k.features(X.float()), k.features(X).float(), rtol=1e-5, atol=1e-5)
    assert k.features(X.float()).dtype == torch.float32
    assert k.features(normal(4, 9)).shape == (4, 8)
    assert not torch.equal(k.features(X), RandomFourier(RBF(1.5), 8, generator=draws(1)).features(X))


# --- sketches of a network's tangent kernel ---------------------------------------------------------------------------


def test_sketched_features_are_those_of_the_map() -> None:
    network = tangent(2)
    for trace in (False, True):
        k = Sketched.drawn(network, 16, trace=trace, generator=draws())
        assert torch.equal(k.features(X), FeatureMap(network, k.map.sketch)(X))
        assert k.features(X).shape == (7 if trace else 14, 16)
        kernel = k(X)
        assert isinstance(kernel, FeatureKernel)
        assert kernel.error(generator=draws()).error > 0
        exact = Sketched(FeatureMap(network, Sketch(4096, 0, trace)))
        torch.testing.assert_close(exact(X, Y).dense(), Empirical(network, trace=trace)(X, Y).dense())


# --- Nystrom ----------------------------------------------------------------------------------------------------------


@quick
@given(n=st.integers(1, 8), m=st.integers(1, 4), lengthscale=st.floats(0.3, 3), seed=st.integers(0, 99))
def test_all_examples_as_landmarks_are_exact(n: int, m: int, lengthscale: float, seed: int) -> None:
    x, y = normal(n, 3, seed=seed), normal(m, 3, seed=seed + 1)
    rbf = RBF(lengthscale)
    k = Nystrom(rbf, x)
    torch.testing.assert_close(k(x).dense(), rbf(x).dense(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(k(x, y).dense(), rbf(x, y).dense(), rtol=1e-6, atol=1e-6)
    assert abs(k.left_out(x)) < 1e-8


def test_nystrom_is_the_formula_and_scikit_learn_s() -> None:
    rbf = RBF(1.5)
    k = Nystrom(rbf, Z)
    cross, inner = rbf(X, Z).dense().numpy(), rbf(Z).dense().numpy()
    np.testing.assert_allclose(k(X, Y).dense(), cross @ np.linalg.pinv(inner) @ rbf(Z, Y).dense().numpy(), atol=1e-9)
    theirs = Nystroem(kernel="rbf", gamma=0.5 / 1.5**2, n_components=6, random_state=0).fit(Z.numpy())
    psi = theirs.transform(X.numpy())
    np.testing.assert_allclose(k(X).dense(), psi @ psi.T, atol=1e-9)
    left = rbf(X).dense() - k(X).dense()
    assert float(torch.linalg.eigvalsh(left)[0]) > -1e-10
    assert k.left_out(X) == pytest.approx(float(left.trace() / 7))


def test_nystrom_of_a_kernel_of_low_rank_is_exact_and_leaves_zeros_out() -> None:
    k = Nystrom(DotProduct(), Z)
    assert k.size == 3
    torch.testing.assert_close(k(X, Y).dense(), X @ Y.T)
    doubled = Nystrom(RBF(1.5), torch.cat([Z, Z]))
    assert doubled.size == 6
    torch.testing.assert_close(doubled(X, Y).dense(), Nystrom(RBF(1.5), Z)(X, Y).dense())
    network = Empirical(tangent(2))
    several = Nystrom(network, X)
    torch.testing.assert_close(several(X).dense(), network(X).dense())
    assert several(X).scalars == 2


def test_landmarks_are_drawn_from_the_examples() -> None:
    many = normal(40, 3)
    k = Nystrom.drawn(RBF(1.5), many, 10, generator=draws())
    assert len(k.landmarks) == 10 == len({tuple(row) for row in k.landmarks.tolist()})
    assert {tuple(row) for row in k.landmarks.tolist()} <= {tuple(row) for row in many.tolist()}
    again, other = (Nystrom.drawn(RBF(1.5), many, 10, generator=draws(seed)) for seed in (0, 1))
    assert torch.equal(again.landmarks, k.landmarks)
    assert not torch.equal(other.landmarks, k.landmarks)
    assert k.left_out(many) > Nystrom.drawn(RBF(1.5), many, 30, generator=draws()).left_out(many)
    pairs = Nystrom.drawn(Empirical(tangent()), (many,), 40, generator=draws())
    assert isinstance(pairs.landmarks, tuple)
    torch.testing.assert_close(pairs(many).dense(), Empirical(tangent())(many).dense())


# --- gradients and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["features", "random Fourier", "Nystrom"])
def test_gradients(name: str) -> None:
    k = SIMPLE[name]
    x, y = X[:3].clone().requires_grad_(), Y[:2].clone().requires_grad_()
    for made in (k, 2.0 * k.normalised().centred(on=Z) + k):
        assert torch.autograd.gradcheck(lambda a, b, made=made: made(a, b).dense(), (x, y))
        assert torch.autograd.gradcheck(lambda a, made=made: made(a).dense() + a.sum(), x)
    assert torch.autograd.gradcheck(lambda a: k.centred(on=a)(a).dense() + a.sum(), x)


class Indefinite(KernelFunction):
    def __call__(self, x1: Any, x2: Any = None) -> ntkit.Kernel:
        return ntkit.DenseKernel(-(x1 @ (x1 if x2 is None else x2).T))


REFUSED: list[tuple[Any, str]] = [
    (lambda: Features(3), "a map takes N examples"),
    (lambda: Features(lambda x: x[1:])(X), r"a tensor \(7, ...\) for 7 examples: got \(6, 3\)"),
    (lambda: Features(lambda x: "x")(X), "got str"),
    (lambda: Features(lambda x: x / 0)(X), "what the map returns has entries that are not finite"),
    (lambda: Features(lambda x: x[:, : 1 + (len(x) == 7)])(X, Y), "as many features: got 2 and 1"),
    (lambda: RandomFourier(DotProduct(), 4, generator=draws()), "of an RBF kernel"),
    (lambda: RandomFourier(RBF(), 5, generator=draws()), "an even number"),
    (lambda: RandomFourier(RBF(), 4, generator=draws()).features(X.numpy()), "got ndarray"),
    (lambda: Sketched(tangent()), "takes a FeatureMap: got Tangent"),
    (lambda: Sketched.drawn(tangent(), 8, generator=draws())(X.clone().requires_grad_()), "no derivative"),
    (lambda: Nystrom(RBF(), Z.clone().requires_grad_()), "landmarks are held fixed"),
    (lambda: Nystrom(Indefinite(), Z), "not positive semi-definite"),
    (lambda: Nystrom(DotProduct(), torch.zeros(3, 2)), "zero between the landmarks"),
    (lambda: Nystrom.drawn(RBF(), X, 8, generator=draws()), "from 1 to 7: got 8"),
    (lambda: (SIMPLE["sketched"] + SIMPLE["sketched, two outputs"])(X), "7 and 14 rows"),
    (lambda: -1.0 * SIMPLE["features"], "not negative"),
    (lambda: Features(lambda x: 0 * x).normalised()(X), "example 0 of x"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refusals(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
