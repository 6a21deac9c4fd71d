"""Kernels with a formula: against scikit-learn's, as matrices in tiles, with gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.closed import RBF, DotProduct
from ntkit.kernel.function import KernelFunction

quick = settings(max_examples=15, deadline=None)
KERNELS: dict[str, KernelFunction] = {
    "rbf": RBF(1.3),
    "dot product": DotProduct(),
    "cubic": DotProduct(0.3, 3, 0.5),
}
each = pytest.mark.parametrize("k", KERNELS.values(), ids=KERNELS.keys())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(
    n=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 4), lengthscale=st.floats(0.1, 10),
    offset=st.floats(0, 3), degree=st.integers(1, 4), scale=st.floats(0.1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_entries_are_those_of_scikit_learn(
    n: int, m: int, d: int, lengthscale: float, offset: float, degree: int, scale: float, seed: int
) -> None:
    x, y = normal(n, d, 2, seed=seed), normal(m, d, 2, seed=seed + 1)
    flat = x.flatten(1).numpy(), y.flatten(1).numpy()
    np.testing.assert_allclose(
        RBF(lengthscale)(x, y).dense(), rbf_kernel(*flat, gamma=0.5 / lengthscale**2), rtol=1e-10, atol=1e-14
    )
    np.testing.assert_allclose(
        DotProduct(offset, degree, scale)(x, y).dense(),
        polynomial_kernel(*flat, degree=degree, gamma=scale, coef0=offset), rtol=1e-10, atol=1e-12,
    )  # fmt: skip


@each
def test_a_tile_is_a_block_and_the_diagonal_is_the_diagonal(k: KernelFunction) -> None:
    x, y = normal(9, 3), normal(6, 3, seed=1)
    for kernel in (k(x), k(x, y)):
        dense = kernel.dense()
        for rows, cols in ((slice(0, 4), slice(2, 6)), (slice(3, 9), slice(0, 2)), (slice(5, 5), slice(None))):
            torch.testing.assert_close(kernel.tile(rows, cols), dense[rows, cols], rtol=0, atol=1e-14)
        torch.testing.assert_close(kernel.diagonal(), dense.diagonal(), rtol=0, atol=1e-14)
    symmetric = k(x)
    assert symmetric.symmetric
    assert not k(x, y).symmetric
    assert torch.equal(symmetric.diagonal(), symmetric.dense().diagonal())
    assert torch.equal(symmetric.diagonal(), k.diagonal(x))
    torch.testing.assert_close(symmetric.dense(), symmetric.dense().T, rtol=1e-15, atol=1e-15)
    assert float(torch.linalg.eigvalsh(symmetric.dense())[0]) > -1e-12 * float(symmetric.diagonal().max())


def test_near_examples_far_from_the_origin_keep_their_distance_in_float32() -> None:
    near = (1e3 + 1e-2 * normal(8, 50)).float()
    got = RBF(0.1)(near).dense()
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, rbf_kernel(near.double().numpy(), gamma=50.0), atol=1e-6)
    assert torch.equal(got.diagonal(), torch.ones(8))


def plain(x: Tensor, y: Tensor, lengthscale: float) -> Tensor:
    """By the differences of every pair."""
    return (-(x[:, None] - y[None]).square().sum(2) / (2 * lengthscale**2)).exp()


@pytest.mark.parametrize("away", [1e4, 1e8, 1e12])
def test_one_example_far_away_leaves_the_others_as_they_are(away: float) -> None:
    x = normal(9, 3)
    x[4] += away
    k = RBF(1.3)
    for found, expected in (
        (k(x).dense(), plain(x, x, 1.3)), (k(x, x[:5]).dense(), plain(x, x[:5], 1.3)),
        (k(x[:4], x).tile(slice(1, 4), slice(2, 9)), plain(x[1:4], x[2:9], 1.3)),
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    near = [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(k(x).dense()[near][:, near], k(x[near]).dense(), rtol=0, atol=1e-7)
    single = k(x.float()).dense()
    torch.testing.assert_close(single[near][:, near], k(x[near].float()).dense(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("away", [1e4, 1e8])
def test_groups_far_from_each_other_keep_their_distances(away: float) -> None:
    """Neither a mean nor a median is near to all of them."""
    x = normal(12, 3)
    x[::3] += away
    x[1::3] -= 3 * away
    for scale in (1.0, 1e-3):  # of the examples and the lengthscale alike
        found = RBF(1.3 * scale)(x * scale).dense()
        torch.testing.assert_close(found, plain(x * scale, x * scale, 1.3 * scale), rtol=0, atol=1e-7)
        assert float(torch.linalg.eigvalsh(found)[0]) > -1e-7


def test_gradients_among_examples_far_away() -> None:
    x, y = normal(4, 3), normal(3, 3, seed=1)
    x[0] += 1e5
    y[0] = x[0] + 0.3
    y[1] = x[0]  # without a distance there is none either
    x, y = x.requires_grad_(), y.requires_grad_()
    found = torch.autograd.grad((RBF(1.3)(x, y).dense() * normal(4, 3, seed=2)).sum(), (x, y))
    wanted = torch.autograd.grad((plain(x, y, 1.3) * normal(4, 3, seed=2)).sum(), (x, y))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert float(found[0][0].abs().max()) > 1e-2
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):  # not a wrong one
        torch.autograd.functional.hessian(lambda a: RBF(1.3)(a, y.detach()).dense().sum(), x.detach())


@each
def test_gradients(k: KernelFunction) -> None:
    x, y = normal(4, 3).requires_grad_(), normal(3, 3, seed=1).requires_grad_()
    weights = normal(4, 4, seed=2)
    assert torch.autograd.gradcheck(lambda a, b: k(a, b).dense(), (x, y))
    assert torch.autograd.gradcheck(lambda a: k(a).dense(), x)
    assert torch.autograd.gradgradcheck(lambda a: (k(a).dense() * weights).sum(), x)
    if isinstance(k, DotProduct):
        assert torch.autograd.gradcheck(k.diagonal, x)


def test_the_median_distance() -> None:
    x = normal(30, 4)
    pairs = pairwise_distances(x.numpy())[np.triu_indices(30, 1)]
    found = RBF.median(x).lengthscale
    assert np.sum(pairs < found) <= len(pairs) / 2 <= np.sum(pairs <= found)
    many = normal(700, 4)
    for generator in (None, torch.Generator().manual_seed(0)):
        assert RBF.median(many, most=300, generator=generator).lengthscale == pytest.approx(
            RBF.median(many).lengthscale, rel=0.1
        )
    assert RBF.median(x[:2]).lengthscale == pytest.approx(float((x[0] - x[1]).norm()))


def test_an_identity_is_of_formula_and_examples() -> None:
    x, y = normal(4, 3), normal(4, 3, seed=1)
    assert RBF(1.0)(x).identity() == RBF(1.0)(x.clone()).identity() == RBF(1.0)(x, x).identity()
    others = [RBF(2.0)(x), RBF(1.0)(y), RBF(1.0)(x, y), RBF(1.0)(x.float()), DotProduct()(x)]
    assert all(RBF(1.0)(x).identity() != other.identity() for other in others)


REFUSED: list[tuple[Any, str]] = [
    (lambda: RBF(0.0), "lengthscale is a positive number"),
    (lambda: RBF(math.nan), "lengthscale is a positive number"),
    (lambda: DotProduct(offset=-1.0), "offset is a non-negative number"),
    (lambda: DotProduct(scale=0.0), "scale is a positive number"),
    (lambda: DotProduct(degree=0), "degree is a whole number"),
    (lambda: RBF()(np.ones((2, 2))), "got ndarray; torch.from_numpy"),
    (lambda: RBF()(torch.ones(2, 2, dtype=torch.int64)), r"dtype torch\.int64"),
    (lambda: RBF()(torch.ones(())), "shape"),
    (lambda: RBF()(torch.ones(0, 2)), "at least one example"),
    (lambda: RBF()(torch.tensor([[1.0], [math.inf]])), "x1 has entries that are not finite"),
    (lambda: RBF()(torch.ones(2, 2), torch.ones(2, 3)), "got 2 numbers in each of x1 and 3"),
    (lambda: RBF()(torch.ones(2, 2), torch.ones(2, 2).double()), "of one type"),
    (lambda: RBF.median(torch.ones(1, 2)), "at least two examples"),
    (lambda: RBF.median(torch.ones(5, 2)), "median distance is 0"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refusals(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
