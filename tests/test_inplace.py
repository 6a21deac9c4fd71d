"""One array for a matrix and its factor: the answer of float64, also from a factor in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ntkit
from ntkit.errors import InputError, NotPositiveDefiniteError
from ntkit.kernel import base
from ntkit.solve import blocked, inplace
from ntkit.solve.inplace import CholeskyInPlace
from ntkit.solve.ridge import Absolute
from tests.cases import normal


def spd(n: int, seed: int = 0) -> Tensor:
    rows = normal(n, seed=seed)(n).double()
    return rows @ rows.T / n


@given(st.integers(1, 40), st.integers(1, 3), st.floats(1e-3, 10), st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_it_is_the_dense_solve(n: int, r: int, ridge: float, half: bool, seed: int) -> None:
    matrix, y = spd(n, seed), normal(r, seed=seed + 1)(n).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inplace, "strips", lambda n: base.strips(n, 16))
        for name, size in (("BLOCK", 8), ("INNER", 12), ("ACROSS", 10)):
            patch.setattr(blocked, name, size)
        solver = CholeskyInPlace(torch.float32 if half else torch.float64, tolerance=1e-12)
        matrix = matrix.float().double()  # what float32 holds exactly
        factored = solver.factor(matrix, Absolute(ridge))
        found = factored.solve(y)
    expected = torch.linalg.solve(matrix + ridge * torch.eye(n).double(), y)
    torch.testing.assert_close(found.value, expected, rtol=1e-6, atol=1e-7)
    assert found.converged
    assert found.relative_residual < 1e-9
    assert found.iterations <= (25 if half else 3)
    assert factored.array.dtype == (np.float32 if half else np.float64)


def test_the_users_matrix_is_left_alone_and_a_vector_stays_one() -> None:
    matrix = spd(20)
    before = matrix.clone()
    found = CholeskyInPlace().factor(matrix, 0.1).solve(torch.ones(20))
    assert torch.equal(matrix, before)
    assert found.value.shape == (20,)
    assert found.ridge == pytest.approx(0.1 * float(before.diagonal().mean()))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 5e4), (torch.bfloat16, 4.0), (torch.float32, 1e38), (torch.float64, 1e306)]
)
def test_large_numbers_and_half_precision_are_finite(dtype: torch.dtype, size: float) -> None:
    """Whatever their sum is."""
    matrix = (size * (0.5 * torch.ones(64, 64) + 0.5 * torch.eye(64)).double()).to(dtype)
    y = normal(1)(64).double()
    found = CholeskyInPlace().factor(matrix, 0.1).solve(y)
    expected = CholeskyInPlace().factor(matrix.double() / size, 0.1).solve(y)
    torch.testing.assert_close(found.value * size, expected.value, rtol=1e-8, atol=1e-8)


def test_from_disk(tmp_path: Path) -> None:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    matrix, y = spd(30), normal(2)(30).double()
    saved = ntkit.DenseKernel(matrix, symmetric=True).save(tmp_path / "k.zarr")
    seen: list[Any] = []
    factored = CholeskyInPlace().factor(saved, 0.1, progress=lambda *n: seen.append(n))
    torch.testing.assert_close(factored.solve(y).value, CholeskyInPlace().factor(matrix, 0.1).solve(y).value)
    assert seen == [(30, 30)]


@pytest.mark.parametrize(
    ("do", "kind", "message"),
    [
        (lambda: CholeskyInPlace(torch.float16), InputError, "float32 or float64"),
        (lambda: CholeskyInPlace().factor(spd(4)[:3]), InputError, "square kernel"),
        (lambda: CholeskyInPlace().factor(spd(4) * torch.nan), InputError, "not finite"),
        (lambda: CholeskyInPlace().factor(spd(4).half() * torch.inf), InputError, "rows 0 to 3 .* not finite"),
        (lambda: CholeskyInPlace(torch.float32).factor(spd(4) * 1e40), InputError, "not finite in float32"),
        (lambda: CholeskyInPlace().factor(-torch.eye(4)), NotPositiveDefiniteError, "stops at row 0 of 4"),
        (lambda: CholeskyInPlace().factor(spd(4), 0.1).solve(torch.ones(3)), InputError, "as many rows"),
    ],
)
def test_refusals(do: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        do()
