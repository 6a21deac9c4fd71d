"""Kernels are right whatever is around a call (inference mode, autocast, another mode), and of unusual tensors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntkit
from ntkit.errors import ModelError, SlowRouteWarning
from ntkit.kernel.matrixfree import MatrixFreeKernel
from tests import oracles


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Parts, and a forward of one's own."""

    def __init__(self, forward: Any, **parts: Any) -> None:
        super().__init__()
        self.way = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def true(model: nn.Module, x: Any) -> Tensor:
    return oracles.entk(model, x, x, lambda out: out, list(model.parameters()))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


# ---------------------------------------------------------------- what is around a call


def test_inference_mode_around_a_call_changes_nothing() -> None:
    model, x = mlp().double(), normal(4, 5)
    wanted = true(model, x)
    v = normal(sum(p.numel() for p in model.parameters()), seed=1)
    tangent = ntkit.linearize(model)
    plain = tangent.jvp(x, v), tangent.vjp(x, normal(4, 3))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for examples in (x, x.clone(), torch.utils.data.TensorDataset(x)):
            assert oracles.relative_error(ntkit.empirical_ntk(model, examples), wanted) < 1e-12
        tangent = ntkit.linearize(model)
        torch.testing.assert_close((tangent.jvp(x.clone(), v), tangent.vjp(x.clone(), normal(4, 3))), plain)
        assert torch.is_inference_mode_enabled()


def test_a_forward_without_gradients_is_refused() -> None:
    frozen = Net(torch.no_grad()(lambda self, x: self.a(x)), a=nn.Linear(5, 3))
    for model in (frozen, Net(lambda self, x: self.a(x).detach(), a=nn.Linear(5, 3))):
        with pytest.raises(ModelError, match="depend on none of the selected parameters"):
            ntkit.empirical_ntk(model, normal(4, 5).float())


@pytest.mark.parametrize("trace", [False, True])
def test_autocast_around_a_call_changes_nothing(trace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 8), nn.Tanh(), nn.Linear(8, 3))
    x = normal(4, 2, 5, 5).float()
    kernel = ntkit.TangentKernel(ntkit.linearize(model), x, trace=trace)
    wanted = kernel.dense(), kernel.diagonal(), *(t for _, t in sorted(kernel.by_parameter().items()))
    with torch.autocast("cpu", torch.bfloat16):
        kernel = ntkit.TangentKernel(ntkit.linearize(model), x, trace=trace)
        found = kernel.dense(), kernel.diagonal(), *(t for _, t in sorted(kernel.by_parameter().items()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_training_that_begins_afterwards_is_noticed() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval(), normal(4, 5).float()
    tangent = ntkit.linearize(model)
    kernel = ntkit.TangentKernel(tangent, x)
    kernel.dense()
    model.train()
    for use in (
        kernel.dense,
        lambda: tangent.outputs(x),
        lambda: tangent.jacobian(x),
        lambda: tangent.vjp(x, torch.ones(4, 3)),
        lambda: tangent.jvp(x, torch.ones(tangent.count)),
    ):
        with pytest.raises(ModelError, match="dropout is active"):
            use()


# ---------------------------------------------------------------- what the trial has to see


class _Times(torch.autograd.Function):
    """A product that torch's overrides do not see the parts of, as in fused layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_does_not_hide_what_was_not_captured(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scale = Net(lambda self, x: _Times.apply(x, self.w), w=nn.Parameter(torch.rand(16) + 0.5))
    model = nn.Sequential(nn.Linear(8, 16), scale, nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    x = normal(5, 8).to(dtype)
    with pytest.warns(SlowRouteWarning, match=r"1\.w"):
        found = ntkit.empirical_ntk(model, x)
    wanted = true(model.double(), x.double())
    assert oracles.relative_error(found.double(), wanted) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_hide_half_of_a_gradient(dtype: torch.dtype) -> None:
    """One use of the parameter is seen, and the other is not."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.rand(16) + 0.5)
    scale = Net(lambda self, x: _Times.apply(x, self.w) + x * self.w, w=w)
    model = nn.Sequential(nn.Linear(8, 16), scale, nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    with pytest.warns(SlowRouteWarning, match=r"1\.w"):
        ntkit.empirical_ntk(model, normal(5, 8).to(dtype))


@pytest.mark.parametrize("order", ["the same frame twice", "frames"])
def test_frames_that_neighbours_share_do_not_hide_whose_they_are(order: str) -> None:
    """(f_i, f_i+1): the second image of one example is the first of the next: values alone do not tell them apart."""
    frames = normal(6, 3, 6, 6)
    pairs = torch.stack([frames[:-1], frames[1:]], 1)
    if order != "frames":
        pairs[:2] = frames[0]
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4))

    def forward(self: Any, x: Tensor) -> Tensor:
        z = self.body(torch.cat([x[:, 0], x[:, 1]]))
        a, b = z.chunk(2)
        return self.head(torch.cat([a, b, a * b], 1))

    model = Net(forward, body=body, head=nn.Linear(12, 2)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowRouteWarning)
        found = ntkit.empirical_ntk(model, pairs)
    assert oracles.relative_error(found, true(model, pairs)) < 1e-10


@pytest.mark.filterwarnings("ignore::ntkit.errors.SlowRouteWarning")
def test_a_weight_in_the_place_of_the_input_takes_another_route() -> None:
    model = Net(lambda self, x: F.linear(self.w, x).T, w=nn.Parameter(normal(1, 5)))
    x = normal(4, 5)
    assert oracles.relative_error(ntkit.empirical_ntk(model, x), true(model, x)) < 1e-12


def test_hooks_that_look_at_gradients_are_named() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-1, 1) if g.norm() > 1e3 else g)
        return self.b(h)

    model = Net(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    with pytest.raises(ModelError, match="a hook on the way back looks at the values of gradients"):
        ntkit.empirical_ntk(model, normal(4, 5).float())


# ---------------------------------------------------------------- parameters that are not dense


def spaced() -> nn.Module:
    """Every other column of a larger tensor; entries further down are used again."""
    torch.manual_seed(0)
    w = nn.Parameter(normal(4, 8, seed=2)[:, ::2])
    assert w.stride() == (8, 2)
    return Net(lambda self, x: F.linear(torch.tanh(F.linear(x, self.w)), self.w[2:]), w=w)


def expanded() -> nn.Module:
    """Rows that are one row: every use of one is a use of all, and gradients are by entry nevertheless."""
    w = nn.Parameter(normal(1, 4, seed=2).expand(3, 4))
    return Net(lambda self, x: torch.tanh(x * self.w[0]) + x * self.w[1], w=w)


@pytest.mark.parametrize("make", [spaced, expanded])
def test_parameters_that_are_not_dense_in_memory(make: Any) -> None:
    model, x = make(), normal(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowRouteWarning)
        tangent = ntkit.linearize(model)
        found = ntkit.TangentKernel(tangent, x).dense()
        rows = tangent.jacobian(x)
    assert oracles.relative_error(rows @ rows.T, true(model, x)) < 1e-12
    assert oracles.relative_error(found, true(model, x)) < 1e-12


def test_sparse_gradients_of_embeddings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randint(0, 7, (5, 3), generator=torch.Generator().manual_seed(0))
    tangent = ntkit.linearize(model)
    dense = ntkit.TangentKernel(tangent, x).dense()
    rows = tangent.jacobian(x)
    torch.testing.assert_close(dense, rows @ rows.T)
    u, v = normal(5, 2), normal(tangent.count)
    torch.testing.assert_close(tangent.vjp(x, u), rows.T @ u.flatten())
    torch.testing.assert_close(tangent.jvp(x, v).flatten(), rows @ v)
    torch.testing.assert_close(MatrixFreeKernel(tangent, x) @ u.flatten(), dense @ u.flatten())
