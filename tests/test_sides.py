"""Units of ReLU near zero are on the side that float64 has them, so that products in float32 lose only rounding."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
from ntkit.kernel import matrixfree
from ntkit.kernel.matrixfree import MatrixFreeKernel
from ntkit.tangent.sides import Sides

if TYPE_CHECKING:
    from collections.abc import Callable


OFFSET = 200.0


class Shared(nn.Module):
    """An image network that uses one ReLU in place, one as a function, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 60, 3), nn.Conv2d(60, 60, 3, padding=1)
        self.relu, self.out = nn.ReLU(inplace=True), nn.Linear(60, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        return self.out((x + F.relu(self.second(x))).mean((2, 3)))


def dense() -> tuple[nn.Module, Tensor]:
    x = torch.randn(37, 8)
    x[:, 0] = OFFSET
    model = nn.Sequential(nn.Linear(8, 500), nn.ReLU(), nn.Linear(500, 3))
    take_off(model[0], x)
    return model, x


def images() -> tuple[nn.Module, Tensor]:
    x = torch.randn(37, 2, 8, 8) + OFFSET
    model = Shared()
    take_off(model.first, x)
    return model, x


def take_off(layer: nn.Linear | nn.Conv2d, x: Tensor) -> None:
    """Each unit is about zero for one example; to see the side, float32 would need digits that it loses."""
    with torch.no_grad():
        for number in range(len(layer.bias)):
            some = layer(x[number % 37][None])[0, number]
            layer.bias[number] -= some if some.ndim == 0 else some[number % 6, number % 5]


CASES = {"dense": dense, "images": images}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Tensor]:
    """A network whose float32 gets some sides wrong, and 37 examples: batches of 16, 16 and 5."""
    monkeypatch.setattr(matrixfree, "TOGETHER", 0)
    torch.manual_seed(0)
    return CASES[request.param]()


def pair(model: nn.Module, x: Tensor, other: Tensor | None = None) -> tuple[MatrixFreeKernel, MatrixFreeKernel]:
    """The exact kernel, and the one in float32 that leans on it."""
    wide = ntkit.linearize(copy.deepcopy(model).double())
    exact = MatrixFreeKernel(wide, x.double(), None if other is None else other.double())
    return exact, MatrixFreeKernel(ntkit.linearize(model), x, other, exact=exact)


def units(model: nn.Module, x: Tensor) -> Tensor:
    """Which units of the first layer are positive."""
    return next(iter(model.children()))(x) > 0


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_float32_gets_sides_wrong_and_this_mends_them(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    assert int((units(model, x) != units(copy.deepcopy(model).double(), x.double())).sum()) >= 5
    exact, full = pair(model, x)
    v = torch.randn(37 * 3, dtype=torch.float64)
    v -= v.mean()
    direction = exact.tangent.vjp(exact.rows, v.view(-1, 3))
    plain = error(full.tangent.vjp(x, v.view(-1, 3).float()), direction)
    sides = Sides(exact.tangent, exact.rows)
    with sides.of(0, 37):
        mended = error(full.tangent.vjp(x, v.view(-1, 3).float()), direction)
    assert mended < plain / 5
    with sides.of(0, 37):
        pushed = error(full.tangent.jvp(x, direction), exact.tangent.jvp(exact.rows, direction))
    assert pushed < error(full.tangent.jvp(x, direction), exact.tangent.jvp(exact.rows, direction)) / 2


@pytest.mark.parametrize("columns", [None, 17])
def test_products(case: tuple[nn.Module, Tensor], columns: int | None) -> None:
    model, x = case
    other = None if columns is None else x[:columns] + 0.1 * torch.randn_like(x[:columns])
    exact, full = pair(model, x, other)
    v = torch.randn(exact.shape[1], 2, dtype=torch.float64)
    expected = exact.dense() @ v
    before = copy.deepcopy(model.state_dict()), x.clone()
    plain = error(MatrixFreeKernel(full.tangent, x, other) @ v, expected)
    for _ in range(2):  # the sides are found in the first product, and stand in the second
        assert error(full @ v, expected) < plain / 3
    assert torch.equal(x, before[1])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())


def test_another_process_leans_on_the_same_kernel(case: tuple[nn.Module, Tensor]) -> None:
    exact, full = pair(*case)
    v = torch.randn(exact.shape[1], dtype=torch.float64)
    for again in (pickle.loads(pickle.dumps(full)), full.to("cpu")):
        torch.testing.assert_close(again @ v, full @ v, rtol=0, atol=0)


def test_networks_that_switch_nothing_are_left_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3)), torch.randn(9, 5)
    exact, full = pair(model, x)
    v = torch.randn(27, dtype=torch.float64)
    assert error(full @ v, exact @ v) < 1e-5


@pytest.mark.parametrize(
    "another",
    [
        lambda model, x: MatrixFreeKernel(ntkit.linearize(model), x),  # not in float64
        lambda model, x: MatrixFreeKernel(ntkit.linearize(copy.deepcopy(model).double()), x[:5].double()),
        lambda model, x: MatrixFreeKernel(ntkit.linearize(copy.deepcopy(model).double()), x.double(), x.double()),
    ],
)
def test_another_kernel_is_refused(another: Callable[[nn.Module, Tensor], MatrixFreeKernel]) -> None:
    model, x = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 3)), torch.randn(9, 5)
    with pytest.raises(InputError, match="the same kernel in float64"):
        MatrixFreeKernel(ntkit.linearize(model), x, exact=another(model, x))
