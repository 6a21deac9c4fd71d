"""The full kernel on leading directions, and k (x) B on the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.features import FeatureKernel
from ntkit.solve import coarse as coarse_module
from ntkit.solve.coarse import coarse, recommended
from ntkit.solve.iterative import ConjugateGradients
from ntkit.solve.precondition import KroneckerPreconditioner, coupling, kronecker
from ntkit.solve.ridge import Absolute
from tests.cases import normal
from tests.test_iterative import C, cnn, digits, seeded, trained

N, K, D = 12, 3, 50


class Full(FeatureKernel):
    """Features of K rows per example."""

    def __init__(self) -> None:
        super().__init__(normal(D)(N * K).double())
        self.scalars = K


def basis(d: int) -> Tensor:
    return torch.linalg.qr(normal(d, seed=3)(N).double()).Q.contiguous()


def test_it_is_the_matrix_that_it_says() -> None:
    full, v, ridge = Full(), basis(4), 0.3
    base = kronecker(normal(5, seed=5)(N).double() @ normal(5, seed=5)(N).double().T, K, ridge)
    eye = torch.eye(N * K).double()
    w = torch.kron(v, torch.eye(K).double())
    theta = full.dense()
    inner = torch.linalg.inv(w.T @ theta @ w + ridge * torch.eye(4 * K).double())
    rest = eye - w @ w.T
    found = coarse(full, v, Absolute(ridge), base=base)
    torch.testing.assert_close(found(eye), w @ inner @ w.T + rest @ base(eye) @ rest)


def test_all_directions_give_the_inverse() -> None:
    full, right = Full(), normal(2, seed=7)(N * K).double()
    exact = torch.linalg.solve(full.dense() + 0.3 * torch.eye(N * K).double(), right)
    torch.testing.assert_close(coarse(full, basis(N), 0.3, base=lambda v: v)(right), exact)


def test_it_saves_products() -> None:
    torch.manual_seed(0)
    model, (x, labels) = trained(cnn().double()).eval(), digits()
    tangent = ntkit.linearize(model)
    full = ntkit.TangentKernel(tangent, x).dense()
    ridge = 1e-3 * float(full.diagonal().mean())
    y = (F.one_hot(labels, C).double() - 1 / C).reshape(-1)
    base = kronecker(ntkit.TangentKernel(tangent, x, trace=True), coupling(tangent, x, generator=seeded()), ridge)
    assert isinstance(base, KroneckerPreconditioner)
    sketch = ntkit.features(tangent, x, size=4096, generator=seeded())
    helpers = {"base": base, "coarse": coarse(sketch, base.vectors[:, -20:], ridge, base=base)}
    counts = {}
    for name, helper in helpers.items():
        found = ConjugateGradients(preconditioner=helper).solve(full, y, Absolute(ridge))
        assert found.converged
        counts[name] = found.iterations
    assert counts["coarse"] < 0.8 * counts["base"]


@pytest.mark.parametrize("strip", [7, 1024])
def test_the_recommended_one_is_made_of_the_parts_that_it_names(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse_module, "STRIP", strip)  # 7: blocks of two examples
    full, eye, ridge = Full(), torch.eye(N * K).double(), 0.3
    phi = full.features().view(N, K, D)
    k = torch.einsum("ncd,mcd->nm", phi, phi) / K
    blocks = torch.einsum("ncd,ned->ce", phi, phi)
    base = kronecker(k, blocks * K / blocks.trace(), 3 * ridge)
    assert isinstance(base, KroneckerPreconditioner)
    expected = coarse(full, base.vectors[:, -3:], ridge, base=base)  # three tenths of 12
    found = recommended(full, Absolute(ridge))
    torch.testing.assert_close(found(eye), expected(eye))
    assert found.vectors.shape == (N, 3)
    # another k, dense or by fewer features than examples
    few = normal(5, seed=5)(N).double()
    dense = recommended(full, ridge, kernel=few @ few.T)
    torch.testing.assert_close(recommended(full, ridge, kernel=FeatureKernel(few))(eye), dense(eye))
    assert float((dense(eye) - found(eye)).norm()) > 1e-3


def test_few_features_serve_few_directions() -> None:
    class Few(FeatureKernel):
        def __init__(self) -> None:
            super().__init__(normal(10)(N * K).double())
            self.scalars = K

    assert recommended(Few(), 0.1).vectors.shape == (N, 1)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: coarse(Full(), basis(4)[:5], 0.1, base=lambda v: v), r"shape \(12, d\)"),
        (lambda: coarse(Full(), 2 * basis(4), 0.1, base=lambda v: v), "not orthonormal"),
        (lambda: coarse(Full(), basis(4), 0.0, base=lambda v: v), "positive absolute ridge"),
        (lambda: recommended(Full(), 0.0), "positive absolute ridge"),
        (lambda: recommended(FeatureKernel(torch.zeros(4, 3)), 0.1), "features are zero"),
        (lambda: recommended(Full(), 0.1, kernel=torch.eye(4).double()), r"shape \(12, d\)"),
    ],
)
def test_refusals(do: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        do()
