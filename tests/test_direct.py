from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkit.errors import InputError, NotPositiveDefiniteError
from ntkit.kernel.base import DenseKernel, Kernel
from ntkit.solve.direct import Cholesky
from ntkit.solve.inplace import CholeskyInPlace
from ntkit.solve.iterative import ConjugateGradients
from ntkit.solve.regression import regress
from ntkit.solve.ridge import DEFAULT_GRID, GCV, Absolute, LeaveOneOut, Relative, as_ridge
from ntkit.solve.symmetric import symmetric_matrix
from tests import oracles

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**16)
RIDGES = st.floats(-6, 1).map(lambda exponent: 10.0**exponent)
few = settings(max_examples=30, deadline=None)


def gram(n: int, p: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(n, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (rows @ rows.T).to(dtype)


def with_spectrum(eigenvalues: list[float], seed: int = 0) -> Tensor:
    n = len(eigenvalues)
    basis = torch.linalg.qr(gram(n, n, seed)).Q
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2


class Counting(Kernel):
    """A lazy kernel that counts how many entries were read."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.read, self.highest = matrix, 0, 0

    shape = property(lambda self: tuple(self.matrix.shape))
    dtype = property(lambda self: self.matrix.dtype)
    device = property(lambda self: self.matrix.device)
    symmetric = property(lambda self: True)

    def tile(self, rows: slice, cols: slice) -> Tensor:
        tile = self.matrix[rows, cols]
        self.read += tile.numel()
        self.highest = max(self.highest, len(tile))
        return tile


# ---------------------------------------------------------------- the solution


@few
@given(n=SIZES, r=st.integers(1, 4), ridge=RIDGES, seed=SEEDS)
def test_solution_is_that_of_dense_algebra(n, r, ridge, seed):
    kernel, y = gram(n, n + 10, seed), gram(n + r, 3, seed)[:n, n:]
    solution = Cholesky().factor(kernel, Absolute(ridge)).solve(y)
    assert oracles.relative_error(solution.value, oracles.ridge_solve(kernel, y, ridge)) < 1e-10
    assert solution.relative_residual < 1e-12


@few
@given(n=SIZES, ridge=RIDGES, scale=st.floats(1e-6, 1e6), seed=SEEDS)
def test_a_number_is_relative_to_the_mean_diagonal(n, ridge, scale, seed):
    kernel, y = scale * gram(n, n + 10, seed), torch.ones(n, dtype=torch.float64)
    absolute = ridge * float(kernel.diagonal().mean())
    solution = Cholesky().factor(kernel, ridge).solve(y)
    assert oracles.relative_error(solution.value, oracles.ridge_solve(kernel, y, absolute)) < 1e-10
    assert solution.ridge == pytest.approx(absolute)
    assert solution.relative_ridge == pytest.approx(ridge)
    again = Cholesky().factor(kernel, Relative(ridge)).solve(y)
    assert torch.equal(again.value, solution.value)


def test_default_is_no_ridge():
    kernel, y = gram(5, 20), torch.ones(5, dtype=torch.float64)
    solution = Cholesky().factor(kernel).solve(y)
    assert solution.ridge == solution.relative_ridge == 0
    assert oracles.relative_error(kernel @ solution.value, y) < 1e-12


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3)])
def test_solution_has_the_shape_of_the_right_hand_side(shape):
    y = np.ones(shape, dtype=np.float32)
    value = Cholesky().factor(gram(6, 20).numpy(), 0.1).solve(y).value
    assert tuple(value.shape) == shape
    assert value.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_solve_is_in_float64_whatever_the_kernel(dtype):
    kernel, y = gram(30, 60, dtype=dtype), torch.ones(30)
    kernel = torch.tril(kernel) + torch.tril(kernel, -1).T
    solution = Cholesky().factor(kernel, 1e-2).solve(y)
    ridge = 1e-2 * float(kernel.double().diagonal().mean())
    assert oracles.relative_error(solution.value, oracles.ridge_solve(kernel, y, ridge)) < 1e-10
    assert (solution.dtype, solution.kernel_dtype) == (torch.float64, dtype)


def test_rounding_asymmetry_is_averaged():
    kernel = gram(20, 60)
    noisy = kernel * (1 + 1e-10 * gram(20, 40, seed=1))
    y = torch.ones(20, dtype=torch.float64)
    value = Cholesky().factor(noisy).solve(y).value
    assert oracles.relative_error(value, oracles.ridge_solve((noisy + noisy.T) / 2, y, 0.0)) < 1e-12


def test_asymmetry_is_averaged_across_strips():
    kernel = gram(1100, 5)
    noisy = kernel * (1 + 1e-10 * normal_like(kernel))
    assert torch.equal(symmetric_matrix(noisy).values, (noisy + noisy.T) / 2)


def normal_like(matrix: Tensor) -> Tensor:
    return torch.randn(matrix.shape, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))


def test_the_kernel_is_read_once_and_left_alone():
    lazy = Counting(gram(40, 80))
    before = lazy.matrix.clone()
    factorization = Cholesky().factor(lazy, 0.3)
    for seed in range(3):
        y = gram(40, 1, seed)[:, 0]
        value = factorization.solve(y).value
        ridge = 0.3 * float(before.diagonal().mean())
        assert oracles.relative_error(value, oracles.ridge_solve(before, y, ridge)) < 1e-10
    assert lazy.read == 40 * 40
    assert torch.equal(lazy.matrix, before)


# ---------------------------------------------------------------- the evidence


def test_residual_is_measured_and_not_assumed():
    kernel, y = gram(8, 20), torch.arange(8.0, dtype=torch.float64)
    good = Cholesky().factor(kernel, Absolute(2.0))
    wrong = replace(good, lower=1.5 * good.lower)
    solution = wrong.solve(y)
    left = (kernel + 2.0 * torch.eye(8, dtype=torch.float64)) @ solution.value
    assert solution.relative_residual == pytest.approx(oracles.relative_error(left, y), rel=1e-10)
    assert solution.relative_residual > 0.5


def test_residual_of_nothing_is_zero():
    assert Cholesky().factor(gram(4, 9)).solve(torch.zeros(4)).relative_residual == 0


def test_ends_of_the_spectrum():
    factorization = Cholesky().factor(with_spectrum([100.0, 40.0, 3.0, 2.0, 0.5]), Absolute(0.5))
    assert factorization.smallest_eigenvalue == pytest.approx(1.0, rel=1e-6)
    assert factorization.largest_eigenvalue == pytest.approx(100.5, rel=1e-6)
    assert factorization.solve(torch.ones(5)).condition_number == pytest.approx(100.5, rel=1e-6)


@pytest.mark.parametrize("strip", [1024, 5, 1])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (12, 1), (12, 3), (12, 12), (60, 4)])
def test_inverse_blocks(n, size, strip, monkeypatch):
    monkeypatch.setattr("ntkit.solve.direct.STRIP", strip)
    kernel = gram(n, n + 50)
    blocks = Cholesky().factor(kernel, 0.1).inverse_blocks(size)
    ridge = 0.1 * float(kernel.diagonal().mean())
    inverse = torch.linalg.inv(kernel + ridge * torch.eye(n, dtype=torch.float64))
    expected = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, n, size)])
    assert oracles.relative_error(blocks, expected) < 1e-10


# ---------------------------------------------------------------- singular and indefinite kernels


def duplicated(n: int, p: int, scale: float, seed: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    rows = torch.cat([rows, rows[:1]])
    return scale * (rows @ rows.T)


@few
@given(
    n=st.integers(1, 30),
    p=st.integers(1, 40),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e9]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=SEEDS,
)
def test_suggested_ridge_of_a_singular_kernel_works(n, p, scale, dtype, seed):
    kernel = duplicated(n, p, scale, seed, dtype)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        Cholesky().factor(kernel)
    check_advice(kernel, caught.value)
    largest = float(torch.linalg.eigvalsh(kernel.double())[-1])
    assert abs(caught.value.smallest_eigenvalue) < 1e-6 * largest
    assert 0 < caught.value.suggested_ridge < 1e-5 * largest  # a help, not another problem


@few
@given(smallest=st.floats(-1e3, -1e-3), n=st.integers(2, 20), seed=SEEDS)
def test_suggested_ridge_of_an_indefinite_kernel_works(smallest, n, seed):
    kernel = with_spectrum([smallest, *(10.0 for _ in range(n - 1))], seed)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        Cholesky().factor(kernel, Absolute(-smallest / 2))
    assert caught.value.smallest_eigenvalue == pytest.approx(smallest)
    assert -smallest < caught.value.suggested_ridge < -1.11 * smallest
    check_advice(kernel, caught.value)


def test_a_large_singular_kernel():
    kernel = gram(600, 20)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        Cholesky().factor(kernel)
    check_advice(kernel, caught.value)


def test_a_kernel_of_zeros():
    with pytest.raises(NotPositiveDefiniteError) as caught:
        Cholesky().factor(torch.zeros(3, 3))
    assert caught.value.smallest_eigenvalue == 0
    check_advice(torch.zeros(3, 3), caught.value)


def check_advice(kernel: Tensor, error: NotPositiveDefiniteError) -> None:
    """The ridges named in the message and in the attribute work, and the message names the eigenvalue."""
    y = torch.ones(len(kernel), dtype=torch.float64)
    solution = Cholesky().factor(kernel, Absolute(error.suggested_ridge)).solve(y)
    assert solution.relative_residual < 1e-4
    assert f"smallest eigenvalue {error.smallest_eigenvalue:.3e}" in str(error)
    absolute = re.search(r"ridge=Absolute\(([-+.e\d]+)\)", str(error))
    assert absolute is not None
    assert float(absolute[1]) == error.suggested_ridge
    relative = re.search(r"relative: ridge=([-+.e\d]+)", str(error))
    assert (relative is not None) == (float(kernel.double().diagonal().mean()) > 0)
    if relative is not None:
        Cholesky().factor(kernel, float(relative[1]))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 400 * 2.0**-52), (torch.float32, 2.0**-23)])
def test_where_an_eigenvalue_ends_and_rounding_begins(dtype, limit):
    def factored(smallest: float):
        diagonal = torch.ones(400, dtype=dtype)
        diagonal[7] = smallest
        return Cholesky().factor(torch.diag(diagonal))

    assert factored(1.1 * limit).smallest_eigenvalue == pytest.approx(1.1 * limit)
    with pytest.raises(NotPositiveDefiniteError, match="cannot be told from zero"):
        factored(0.9 * limit)


def test_ill_conditioned_is_not_singular():
    kernel = with_spectrum([1.0, 1e-5, 1e-10])
    solution = Cholesky().factor(kernel).solve(torch.ones(3))
    assert solution.condition_number == pytest.approx(1e10, rel=1e-3)


# ---------------------------------------------------------------- what is refused


def not_finite(value: float) -> Tensor:
    kernel = gram(1100, 5)
    kernel[1050, 3] = kernel[3, 1050] = value
    return kernel


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (torch.ones(3, 4), r"square kernel.*\(3, 4\)"),
        (torch.zeros(0, 0), "square"),
        (torch.ones(3), "2-D"),
        (torch.ones(3, 3, dtype=torch.int64), "floating point"),
        (torch.eye(3) + torch.triu(torch.ones(3, 3), 1), "symmetric kernel: .* up to 1.000e\\+00"),
        (not_finite(float("nan")), "row 3, column 1050"),
        (not_finite(float("inf")), "row 3, column 1050"),
        ([[1.0]], "expected a Kernel"),
    ],
)
def test_unusable_kernels(kernel, words):
    with pytest.raises(InputError, match=words):
        Cholesky().factor(kernel, 1.0)


def test_asymmetry_across_strips_is_seen():
    kernel = gram(1100, 5)
    kernel[1050, 3] += 1.0
    with pytest.raises(InputError, match="symmetric"):
        Cholesky().factor(kernel, 1.0)


@pytest.mark.parametrize("y", [torch.ones(4), torch.ones(5, 1, 1), torch.tensor([1.0, 2, 3, 4, float("nan")])])
def test_unusable_right_hand_sides(y):
    factorization = Cholesky().factor(torch.eye(5))
    with pytest.raises(InputError, match="right-hand side"):
        factorization.solve(y)


@pytest.mark.parametrize("size", [0, 2])
def test_unusable_blocks(size):
    with pytest.raises(InputError, match="blocks"):
        Cholesky().factor(torch.eye(5)).inverse_blocks(size)


@pytest.mark.parametrize("ridge", [-1e-3, float("nan"), float("inf"), True, "0.1", None, GCV(), LeaveOneOut()])
def test_unusable_ridges(ridge):
    with pytest.raises(InputError, match="ridge"):
        Cholesky().factor(torch.eye(3), ridge)


@pytest.mark.parametrize("make", [Absolute, Relative, lambda value: GCV((value,)), lambda value: LeaveOneOut((value,))])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", True])
def test_ridge_objects_check_their_values(make, value):
    with pytest.raises(InputError, match="finite number >= 0"):
        make(value)


@pytest.mark.parametrize("rule", [GCV, LeaveOneOut])
def test_grids(rule):
    assert rule(torch.tensor([1.0, 2.0])) == rule([1, 2]) == rule((1.0, 2.0))
    assert hash(rule()) == hash(rule(DEFAULT_GRID))
    assert sorted(set(DEFAULT_GRID)) == list(DEFAULT_GRID)
    assert (repr(rule()), repr(rule((0.1,)))) == (f"{rule.__name__}()", f"{rule.__name__}((0.1,))")
    with pytest.raises(InputError, match="empty"):
        rule(())


def test_relative_ridge_needs_a_positive_diagonal():
    with pytest.raises(InputError, match="positive mean diagonal"):
        Cholesky().factor(torch.zeros(2, 2), 0.1)
    assert Cholesky().factor(torch.zeros(2, 2), Absolute(2)).solve(torch.ones(2)).value.tolist() == pytest.approx(
        [0.5, 0.5]
    )


@pytest.mark.parametrize("ridge", [0.0, 0.1, 100.0])
def test_a_relative_ridge_of_a_negative_diagonal_says_which_helps(ridge):
    kernel = -gram(6, 20)
    for act in (lambda r: Cholesky().factor(kernel, r), lambda r: regress(kernel, torch.arange(6.0), r)):
        with pytest.raises(
            NotPositiveDefiniteError, match=r"smallest eigenvalue -.*A ridge that helps: ridge=Abs"
        ) as caught:
            act(ridge)
        assert caught.value.smallest_eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(kernel)[0]))
        act(Absolute(caught.value.suggested_ridge))


def test_a_ridge_object_is_kept():
    rule = GCV((1.0,))
    assert as_ridge(rule) is rule
    assert as_ridge(np.float32(0.5)) == Relative(0.5)


def test_kernel_objects_and_matrices_are_alike():
    kernel, y = gram(5, 9), torch.ones(5)
    values = [Cholesky().factor(k, 0.1).solve(y).value for k in (kernel, kernel.numpy(), DenseKernel(kernel))]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    "by", [Cholesky(), CholeskyInPlace(), CholeskyInPlace(torch.float32), ConjugateGradients(tolerance=1e-10)], ids=str
)
def test_a_kernel_is_solved_by_any_solver(by: Any) -> None:
    matrix = gram(9, 40)
    y = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ridge, absolute in ((0.1, 0.1 * float(matrix.diagonal().mean())), (Absolute(0.3), 0.3), (0.0, 0.0)):
        found = DenseKernel(matrix, symmetric=True).solve(y, ridge, by=by)
        expected = torch.linalg.solve(matrix + absolute * torch.eye(9, dtype=torch.float64), y)
        assert torch.allclose(found.value, expected, rtol=1e-6, atol=1e-8)
        assert found.relative_residual <= 1e-9
    for wrong in (None, "cholesky", Cholesky, 3):
        with pytest.raises(InputError, match=r"an object such as ConjugateGradients"):
            DenseKernel(matrix, symmetric=True).solve(y, by=wrong)  # type: ignore[arg-type]
