"""Products of large matrices: the fast detour is the plain product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ntkit
from ntkit.tangent import products
from tests import oracles

BIG = 256  # 2 * 256^3 = 2^25 FLOPs


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def detours(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that took the detour, on any processor."""
    monkeypatch.setattr(products, "outdoes_mkl", lambda: True)
    seen: list[tuple[int, ...]] = []
    original = products._onednn

    def spy(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(a.shape))
        return original(a, b, bias)

    monkeypatch.setattr(products, "_onednn", spy)
    return seen


onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of torch has no oneDNN",
)

VIEWS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "plain": lambda: (random(BIG, BIG + 3), random(BIG + 7, BIG + 3, seed=1)),
    "transposed": lambda: (random(BIG, BIG + 8).T, random(BIG, BIG + 5, seed=1).T),
    "strided": lambda: (random(BIG, 2 * BIG)[:, ::2], random(2 * BIG, BIG, seed=1)[::2]),
    "offset": lambda: (random(BIG + 1, BIG + 1)[1:, 1:], random(BIG + 1, BIG + 1, seed=1)[1:, :-1]),
    "permuted": lambda: (random(8, BIG, 32).permute(1, 0, 2).reshape(BIG, BIG), random(BIG, BIG, seed=1)),
    "expanded": lambda: (random(1, BIG).expand(BIG, BIG), random(BIG, BIG, seed=1)),
    "tall": lambda: (random(5000, 30), random(40, 30, seed=1)),
    "itself": lambda: (lambda a: (a, a))(random(BIG, BIG)),
}


@onednn
@pytest.mark.parametrize("view", VIEWS)
def test_inner_agrees_with_float64(view: str, detours: list[Any]) -> None:
    a, b = VIEWS[view]()
    got = products.inner(a, b)
    assert got.dtype == torch.float32
    assert oracles.relative_error(got.double(), a.double() @ b.double().T) <= 1e-5
    assert detours


@onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: random(BIG, BIG),
        lambda: random(BIG, BIG).T,
        lambda: random(4, 64, BIG),
        lambda: random(64, 4, BIG).transpose(0, 1),
        lambda: random(2, 3, 40, BIG),
        lambda: random(4, BIG, 64).transpose(1, 2),
    ],
    ids=["2d", "transposed", "3d", "3d moved", "4d", "3d features moved"],
)
def test_linear_and_its_gradient(make: Callable[[], Tensor], bias: bool, detours: list[Any]) -> None:
    x = make().detach().requires_grad_()
    weight, offset = random(BIG - 6, BIG, seed=1), random(BIG - 6, seed=2) if bias else None
    got = products.linear(x, weight, offset)
    exact = x.detach().double().requires_grad_()
    truth = F.linear(exact, weight.double(), None if offset is None else offset.double())
    assert oracles.relative_error(got.detach().double(), truth.detach()) <= 1e-5
    cotangent = random(*got.shape, seed=3)
    for g in (cotangent, cotangent.transpose(0, 1).contiguous().transpose(0, 1), cotangent[..., :1].expand(got.shape)):
        (mine,) = torch.autograd.grad(got, x, g, retain_graph=True)
        (theirs,) = torch.autograd.grad(truth, exact, g.double(), retain_graph=True)
        assert mine.shape == x.shape
        assert oracles.relative_error(mine.double(), theirs) <= 1e-5
    assert len(detours) == 4


@onednn
def test_linear_without_gradients(detours: list[Any]) -> None:
    x, weight = random(BIG, BIG), random(BIG, BIG, seed=1)
    assert not products.linear(x, weight).requires_grad
    with torch.no_grad():
        assert oracles.relative_error(products.linear(x, weight).double(), x.double() @ weight.double().T) <= 1e-5
    assert detours


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, 6), (5, 6)),
        ((1, 6), (1, 6)),
        ((0, 6), (5, 6)),
        ((3, 0), (5, 0)),
        ((100_000, 60), (1, 60)),
        ((5000, 1), (5000, 1)),
    ],
)
def test_small_and_thin_products_are_plain(a: tuple[int, int], b: tuple[int, int], detours: list[Any]) -> None:
    left, right = random(*a), random(*b, seed=1)
    assert torch.equal(products.inner(left, right), left @ right.T)
    assert torch.equal(products.linear(left, right), F.linear(left, right))
    assert not detours


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_plain(dtype: torch.dtype, detours: list[Any]) -> None:
    a, b = random(BIG, BIG, dtype=torch.float64).to(dtype), random(BIG, BIG, seed=1, dtype=torch.float64).to(dtype)
    assert torch.equal(products.inner(a, b), a @ b.T)
    assert torch.equal(products.linear(a, b, b[0]), F.linear(a, b, b[0]))
    assert not detours


def test_a_weight_that_is_a_vector_is_plain() -> None:
    x = random(3, 4)
    assert torch.equal(products.linear(x, x[0]), F.linear(x, x[0]))
    assert torch.equal(products.linear(x[0], x), F.linear(x[0], x))


@onednn
def test_a_network_in_float32() -> None:
    """The detour within a whole kernel: float32 against float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.ReLU(), torch.nn.Linear(400, 10)).eval()
    x = random(64, 300)
    single = ntkit.empirical_ntk(model, x, readout=ntkit.SumOfLogits())
    double = ntkit.empirical_ntk(model.double(), x.double(), readout=ntkit.SumOfLogits())
    assert single.dtype == torch.float32
    assert oracles.relative_error(single.double(), double) <= 1e-5
