"""Nystrom preconditioning: exact where the columns say everything, and a solve in fewer products everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import TensorDataset

import ntkit
from ntkit.errors import InputError
from ntkit.solve.iterative import ConjugateGradients
from ntkit.solve.nystrom import nystrom
from ntkit.solve.precondition import coupling, kronecker
from ntkit.solve.ridge import Absolute
from tests.cases import normal
from tests.test_iterative import C, digits, seeded, trained, transformer


def low_rank(n: int, rank: int, seed: int = 0) -> Tensor:
    phi = normal(rank, seed=seed)(n).double()
    return phi @ phi.T


@given(st.integers(2, 12), st.integers(1, 3), st.floats(0.01, 3), st.integers(0, 99))
@settings(deadline=None)
def test_all_examples_give_the_inverse(n: int, r: int, ridge: float, seed: int) -> None:
    """Of a kernel of low rank so do fewer, on the span; outside of it the base or a number decides."""
    matrix, right = low_rank(n, 2, seed), normal(r, seed=seed + 1)(n).double()
    shifted = matrix + ridge * torch.eye(n).double()
    exact = torch.linalg.solve(shifted, right)
    made = nystrom(matrix, ridge, examples=n, generator=seeded(seed), base=lambda v: v / ridge)
    torch.testing.assert_close(made(right), exact, rtol=1e-6, atol=1e-6)
    assert made.vectors.shape[1] <= 2
    inside = made.vectors @ (made.vectors.T @ right)
    alone = nystrom(matrix, ridge, examples=n, generator=seeded(seed))
    torch.testing.assert_close(alone(inside), torch.linalg.solve(shifted, inside), rtol=1e-6, atol=1e-6)


def test_it_is_symmetric_and_positive_definite() -> None:
    matrix = low_rank(30, 40)
    base = kronecker(low_rank(30, 5, seed=3), 1, 0.1)
    for made in (
        nystrom(matrix, 0.1, examples=8, generator=seeded()),
        nystrom(matrix, 0.1, examples=8, generator=seeded(), base=base),
    ):
        inverse = made(torch.eye(30).double())
        torch.testing.assert_close(inverse, inverse.T)
        assert float(torch.linalg.eigvalsh(inverse)[0]) > 0
        assert made.vectors.shape == (30, 8)
        assert len(set(made.examples)) == 8


def test_the_root_is_the_root() -> None:
    matrix, right = low_rank(30, 40), normal(2, seed=4)(30).double()
    base = kronecker(low_rank(30, 5, seed=3), 1, 0.1)
    alone = nystrom(matrix, 0.1, examples=8, generator=seeded())
    torch.testing.assert_close(alone.root()(alone.root()(right)), alone(right))
    half = nystrom(matrix, Absolute(0.1), examples=8, generator=seeded(), base=base).root()(torch.eye(30).double())
    torch.testing.assert_close(half, half.T)
    assert float(torch.linalg.eigvalsh(half)[0]) > 0
    with pytest.raises(InputError, match="no square root"):
        nystrom(matrix, 0.1, examples=8, generator=seeded(), base=lambda v: v).root()


def test_examples_are_drawn_where_the_columns_explain_least() -> None:
    """One block of nine equal rows and one row of its own: the second is drawn as soon as the first is explained."""
    matrix = torch.block_diag(torch.ones(40, 40), torch.full((1, 1), 0.5)).double()
    made = nystrom(matrix, 0.1, examples=8, generator=seeded())
    assert 40 in made.examples
    assert len(made.examples) < 8  # then nothing is left to draw


@pytest.mark.parametrize("state", ["as built", "trained"])
def test_a_trained_network_takes_fewer_products(state: str) -> None:
    torch.manual_seed(0)
    model = transformer().double()
    model = (trained(model) if state == "trained" else model).eval()
    x, labels = digits()
    y = (torch.nn.functional.one_hot(labels, C).double() - 1 / C).reshape(-1)
    tangent = ntkit.linearize(model)
    full = ntkit.TangentKernel(tangent, x)
    dense = full.dense()
    ridge = 1e-4 * float(dense.diagonal().mean())
    base = kronecker(ntkit.TangentKernel(tangent, x, trace=True), coupling(tangent, x, generator=seeded()), ridge)
    counts = {}
    for name, helper in {
        "none": None,
        "kronecker": base,
        "nystrom": nystrom(full, ridge, examples=15, generator=seeded()),
        "both": nystrom(full, ridge, examples=15, generator=seeded(), base=base),
    }.items():
        found = ConjugateGradients(iterations=5000, preconditioner=helper).solve(dense, y, Absolute(ridge))
        assert found.converged
        counts[name] = found.iterations
    assert counts["both"] < counts["kronecker"] * 0.7
    assert counts["nystrom"] < counts["none"] / 8


def test_rows_of_examples_by_number() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).double()
    x, other = torch.randn(7, 6).double(), torch.randn(4, 6).double()
    tangent = ntkit.linearize(model)
    for columns in (None, other):
        for trace in (False, True):
            kernel = ntkit.TangentKernel(tangent, x, columns, trace=trace)
            dense, k = kernel.dense(), kernel.scalars
            rows = dense.view(7, k, -1)[[5, 0, 3]].reshape(3 * k, -1)
            torch.testing.assert_close(kernel.examples([5, 0, 3]), rows)
            torch.testing.assert_close(ntkit.Kernel.examples(kernel, [5, 0, 3]), rows)
            assert kernel.examples([]).shape == (0, dense.shape[1])
    for data in ((x,), {"input": x}, TensorDataset(x)):
        kernel = ntkit.TangentKernel(tangent, data)
        torch.testing.assert_close(kernel.examples([2, 1]), kernel.dense().view(7, 3, -1)[[2, 1]].reshape(6, -1))


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: nystrom(torch.ones(3, 4), 0.1, examples=1, generator=seeded()), "square kernel"),
        (lambda: nystrom(torch.eye(3), 0.0, examples=1, generator=seeded()), "positive absolute ridge"),
        (lambda: nystrom(torch.eye(3), 0.1, examples=0, generator=seeded()), "from 1 to 3"),
        (lambda: nystrom(torch.eye(3), 0.1, examples=4, generator=seeded()), "from 1 to 3"),
        (lambda: nystrom(torch.zeros(3, 3), 0.1, examples=2, generator=seeded()), "kernel is zero"),
        (lambda: nystrom(-torch.eye(3), 0.1, examples=2, generator=seeded()), "negative or not finite"),
        (
            lambda: nystrom(torch.tensor([[4.0, 1.0], [2.0, 4.0]]), 0.1, examples=2, generator=seeded()),
            "not symmetric|not positive semidefinite",
        ),
        (
            lambda: nystrom(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.1, examples=2, generator=seeded()),
            "not positive semidefinite",
        ),
    ],
)
def test_refusals(do: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        do()
