"""Products with J: forward mode where it means the same as two backward passes, and those where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import ntkit
from ntkit.errors import InputError, ModelError
from ntkit.kernel.matrixfree import MatrixFreeKernel
from ntkit.tangent import linearize as module
from ntkit.tangent.directional import backward_product, forward_product
from tests.cases import CASES, Case, Net, normal, weight
from tests.test_exactness import announced

X = normal(5, seed=1)(6).double()


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each way is taken after the trial."""
    calls = {"forward": 0, "backward": 0}

    def counting(name: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*arguments: Any) -> Tensor:
            calls[name] += 1
            return product(*arguments)

        return called

    monkeypatch.setattr(module, "forward_product", counting("forward", forward_product))
    monkeypatch.setattr(module, "backward_product", counting("backward", backward_product))
    return calls


@pytest.mark.parametrize("case", [case for case in CASES[::4] if case.slow_route is False], ids=lambda case: case.name)
def test_it_is_the_product_with_the_jacobian(case: Case) -> None:
    x = case.data(5)
    with announced(slow=None):
        tangent = ntkit.linearize(case.build(), readout=ntkit.Logits(select=case.select), parameters=case.parameters)
        rows = tangent.jacobian(x)
    direction = normal(tangent.count, seed=3)(1)[0].double()
    try:
        found = tangent.jvp(x, direction, batch=2)
    except NotImplementedError:
        assert case.name.startswith("embedding/bag")
        return
    torch.testing.assert_close(found.reshape(-1), rows @ direction, rtol=1e-9, atol=1e-9)


def test_a_plain_network_goes_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    tangent = ntkit.linearize(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    direction = normal(tangent.count)(1)[0].double()
    found = tangent.jvp(X, direction, batch=2)
    torch.testing.assert_close(found.reshape(-1), tangent.jacobian(X) @ direction)
    assert calls == {"forward": 3, "backward": 0}


class OneWay(torch.autograd.Function):
    """An operation with a backward pass alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Once(OneWay):
    """An operation whose backward pass leaves no graph behind."""

    backward = staticmethod(once_differentiable(OneWay.backward))


def test_what_can_be_differentiated_only_once() -> None:
    tangent = ntkit.linearize(Net(lambda m, x: Once.apply(x @ m.w), w=weight(5, 3)).double())
    with announced(slow=None):
        kernel = MatrixFreeKernel(tangent, X)
        with pytest.raises(ModelError, match="differentiate twice"):
            kernel @ torch.ones(18).double()


class Deceiver(torch.autograd.Function):
    """A backward pass that is not the derivative, as straight-through estimators have: the kernel is the backward's."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


@pytest.mark.parametrize("function", [OneWay, Deceiver])
def test_where_forward_mode_fails_or_differs_the_backward_passes_decide(
    function: type[torch.autograd.Function], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    model = Net(lambda m, x: function.apply(x @ m.w), w=weight(5, 3)).double()
    tangent = ntkit.linearize(model)
    with announced(slow=None):
        rows = tangent.jacobian(X)
    direction = normal(tangent.count)(1)[0].double()
    assert not tangent.jvp(X, torch.zeros(tangent.count)).any()  # a direction on which both agree decides nothing
    torch.testing.assert_close(tangent.jvp(X, direction).reshape(-1), rows @ direction)
    assert calls == {"forward": 0, "backward": 2}


def test_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].requires_grad_(False)
    before = list(model.parameters())
    tangent = ntkit.linearize(model)
    tangent.jvp(X, normal(tangent.count)(1)[0].double())
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_that_fails_says_so_in_words() -> None:
    model = Net(lambda m, x: m.f(x) if len(x) == 2 else m.f(x[:, :3]), f=nn.Linear(5, 2)).double()
    with pytest.raises(InputError, match="the model fails on examples of shapes"):
        ntkit.linearize(model).jvp(X, torch.ones(12).double(), batch=3)


class Viewed(nn.Module):
    """A network as they are often written: `view` behind a convolution; and as they should not be."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.head, self.kind = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32 * 64, 2), kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        flat = h[:, None].view(len(x), -1) if self.kind == "another axis" else h.view(len(x), -1)
        if self.kind == "written through":
            flat.mul_(2.0)
            flat = h.reshape(len(x), -1)
        return self.head(flat.tanh())


@pytest.mark.parametrize("first", [1, 20])
@pytest.mark.parametrize("kind", ["plain", "another axis", "written through"])
def test_images_in_another_order_of_memory(kind: str, first: int) -> None:
    """float32, which is where convolutions are rearranged; large batches, and a single example before them."""
    torch.manual_seed(0)
    model, x = Viewed(kind), normal(3, 8, 8)(20).float()
    tangent, exact = ntkit.linearize(model), Viewed(kind).double()
    exact.load_state_dict(model.state_dict())
    with announced(slow=None):
        rows = ntkit.linearize(exact).jacobian(x.double())
    weights, direction = normal(2, seed=1)(20).double(), normal(tangent.count)(1)[0].double()
    with announced(slow=None if kind == "written through" else False):
        found = {
            "vjp": (lambda n: tangent.vjp(x[:n], weights[:n].float()), rows.T @ weights.reshape(-1)),
            "jvp": (lambda n: tangent.jvp(x[:n], direction.float()).reshape(-1), rows @ direction),
            "kernel": (lambda n: ntkit.TangentKernel(tangent, x[:n]).dense(), rows @ rows.T),
        }
        for name, (of, expected) in found.items():
            of(first)
            error = float((of(20).double() - expected).norm() / expected.norm())
            assert error < 1e-5, name
