"""Cotangents of many scalars together are those that come one by one, and only what batches goes together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntkit
from ntkit.tangent import backward, products
from ntkit.tangent.grain import CPU
from tests import oracles

K = 4
onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of torch has no oneDNN",
)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each group of scalars that was sent back, whether there were several."""
    seen: list[bool] = []
    for name, several in (("_pulled_back", False), ("_pulled_back_together", True)):
        original = getattr(backward, name)
        monkeypatch.setattr(backward, name, partial(_noted, seen, several, original))
    return seen


def _noted(seen: list[bool], several: bool, original: Callable, *args: Any, **options: Any) -> Any:
    seen.append(several)
    return original(*args, **options)


@pytest.fixture(autouse=True)
def no_loops() -> Iterator[None]:
    """An operation without a batching rule runs in a loop, and torch would say so."""
    torch._C._debug_only_display_vmap_fallback_warnings(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        yield
    torch._C._debug_only_display_vmap_fallback_warnings(False)


def truth(model: nn.Module, x: Tensor) -> Tensor:
    return oracles.entk(model, x, x, lambda out: out, list(model.parameters()))


class Between(nn.Module):
    """Something without parameters between two linear layers, which must not be the first or the last."""

    def __init__(self, function: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(features, K)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu": (F.relu, 6),
    "leaky relu": (F.leaky_relu, 6),
    "elu": (F.elu, 6),
    "gelu": (F.gelu, 6),
    "silu": (F.silu, 6),
    "hardtanh": (F.hardtanh, 6),
    "softplus": (F.softplus, 6),
    "tanh and sigmoid": (lambda h: h.tanh() * h.sigmoid(), 6),
    "softmax": (lambda h: F.softmax(h, -1) + F.log_softmax(h, -1), 6),
    "powers": (lambda h: (h**2 + 1).sqrt() - (h**2 + 2).rsqrt() / h.exp() + (h**2 + 1).log() - (-h), 6),
    "layer norm": (lambda h: F.layer_norm(h, (6,)), 6),
    "views": (lambda h: h.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)[:, 1:].unsqueeze(1).squeeze(1), 5),
    "pieces": (lambda h: h.split(3, 1)[1] + h.permute(1, 0).t().contiguous()[:, :3] + h[:, 2:3].expand(-1, 3), 3),
    "one of them": (lambda h: h.view(-1, 2, 3)[:, 0] + h @ h.new_ones(6, 3), 3),
    "means": (lambda h: h.view(-1, 2, 3).mean(1) + h.view(-1, 2, 3).sum(1), 3),
    "products": (lambda h: (h.view(-1, 2, 3) @ h.view(-1, 3, 2)).flatten(1) + h[:, :4].clone(), 4),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_together_is_one_by_one(name: str, passes: list[bool]) -> None:
    model = Between(*FUNCTIONS[name]).double()
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kernel = ntkit.empirical_ntk(model, x)
    assert any(passes), "nothing went together"
    assert oracles.relative_error(kernel, truth(model, x)) <= 1e-10


def test_every_listed_operation_is_among_these(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    original = backward._operation
    monkeypatch.setattr(backward, "_operation", lambda node: [seen.add(original(node)), original(node)][1])
    for function, features in FUNCTIONS.values():
        ntkit.empirical_ntk(Between(function, features).double(), torch.randn(3, 5, dtype=torch.float64))
    assert backward._BATCHED - seen == {"_Linear"}  # which has a test of its own


def test_groups_of_scalars(monkeypatch: pytest.MonkeyPatch, passes: list[bool]) -> None:
    """Too many cotangents for one group: three and one, with a use that only the last scalar sees."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.wide, self.late = nn.Linear(5, 6), nn.Linear(6, K), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh()
            return torch.cat([self.wide(h)[:, : K - 1], self.late(h)], 1)

    torch.manual_seed(0)
    model = Late().double()
    x = torch.randn(2, 5, dtype=torch.float64)
    monkeypatch.setattr(backward, "_BATCHED", backward._BATCHED | {"Cat"})
    small = replace(CPU, together=3 * 2 * (6 + K + 1) * 8)
    monkeypatch.setattr(backward, "grain", lambda device: small)
    kernel = ntkit.empirical_ntk(model, x)
    assert sum(passes) == 2
    assert oracles.relative_error(kernel, truth(model, x)) <= 1e-10


@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.scaled_dot_product_attention(*[h.view(-1, 1, 2, 3)] * 3).flatten(1),
        lambda h: F.conv1d(h[:, None], h.new_ones(1, 1, 3), padding=1).flatten(1),
        lambda h: h.cumsum(1),
    ],
    ids=["attention", "convolution", "not listed"],
)
def test_what_does_not_batch_goes_one_by_one(function: Callable[[Tensor], Tensor], passes: list[bool]) -> None:
    model = Between(function, 6).double()
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kernel = ntkit.empirical_ntk(model, x)
    assert not any(passes)
    assert oracles.relative_error(kernel, truth(model, x)) <= 1e-10


def test_a_use_that_nothing_comes_of(passes: list[bool]) -> None:
    """The first layer's output is thrown away: the others' cotangents are theirs all the same."""

    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wasted, self.first, self.last = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, K)

        def forward(self, x: Tensor) -> Tensor:
            self.wasted(x)
            return self.last(self.first(x).tanh())

    torch.manual_seed(0)
    model, x = Wasteful().double(), torch.randn(3, 5, dtype=torch.float64)
    kernel = ntkit.empirical_ntk(model, x)
    assert any(passes)
    assert oracles.relative_error(kernel, truth(model, x)) <= 1e-10


@onednn
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_of_onednn_along_any_axis(axis: int) -> None:
    rows, weight = torch.randn(64, 16, 300), torch.randn(300, 400)
    moved = rows.movedim(0, axis)
    found = torch.vmap(products._Times.apply, (axis, None))(moved, weight)
    assert oracles.relative_error(found.double(), rows.double() @ weight.double()) <= 1e-5


@onednn
def test_large_products_go_together_through_onednn(monkeypatch: pytest.MonkeyPatch, passes: list[bool]) -> None:
    monkeypatch.setattr(products, "outdoes_mkl", lambda: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, K))
    x = torch.randn(64, 300)
    single = ntkit.empirical_ntk(model, x)
    assert any(passes)
    double = ntkit.empirical_ntk(model.double(), x.double())
    assert oracles.relative_error(single.double(), double) <= 1e-5


def test_on_the_gpus_list_is_what_images_need() -> None:
    """Each batches: run here on a CPU as if it were a GPU's."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ZeroPad2d(1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K),
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "_BATCHED", backward._BATCHED | backward._BATCHED_ON_GPU)
        together = ntkit.empirical_ntk(body, x)
    assert oracles.relative_error(together, ntkit.empirical_ntk(body, x)) <= 1e-12
    assert oracles.relative_error(together, truth(body, x)) <= 1e-10
