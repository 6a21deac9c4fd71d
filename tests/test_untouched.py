"""A model, and torch's own switches, are as they were: after every use, under every mode, and after every failure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.tangent.untouched import untouched
from tests import oracles
from tests.cases import Net, normal

X = normal(4, 8)(5)


def model() -> nn.Module:
    """Everything that a careless library would change: hooks, gradients, frozen parameters, buffers, fused paths."""
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        return m.head(m.norm(m.layer(x).mean(1)))

    net = Net(
        forward, layer=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), norm=nn.BatchNorm1d(8),
        head=nn.Linear(8, 3), calls=torch.zeros((), dtype=torch.long),
    ).double().eval()  # fmt: skip
    net.layer.linear1.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    net.head.register_forward_hook(lambda module, args, output: None)
    net.head.weight.register_hook(lambda grad: grad)
    return net


def unchanged(before: dict[str, Any], net: nn.Module) -> None:
    after = oracles.snapshot(net)
    for aspect, value in before.items():
        assert after[aspect] == value, f"the model's {aspect} changed"


USES: dict[str, Callable[[ntkit.TangentKernel], Any]] = {
    "dense": lambda k: k.dense(),
    "tile": lambda k: k.tile(slice(2, 5), slice(0, 4)),
    "diagonal": lambda k: k.diagonal(),
    "product": lambda k: k @ torch.ones(k.shape[1], dtype=torch.float64),
    "by_parameter": lambda k: k.by_parameter(),
    "plan": lambda k: k.plan(),
    "outputs": lambda k: k.tangent.outputs(X),
    "jacobian": lambda k: k.tangent.jacobian(X),
    "vjp": lambda k: k.tangent.vjp(X, torch.ones(5, 3)),
    "fingerprint": lambda k: k.tangent.fingerprint(),
}
MODES: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("chosen", [None, "*"])
def test_every_use(mode: str, fused: bool, chosen: str | None) -> None:
    net = model()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        before = oracles.snapshot(net)
        with MODES[mode]():
            kernel = ntkit.TangentKernel(ntkit.linearize(net, parameters=chosen), X)
            for use in USES.values():
                result = use(kernel)
                assert not getattr(result, "requires_grad", False)
        unchanged(before, net)
        assert torch.backends.mha.get_fastpath_enabled() is fused
        assert kernel.tangent.selection.count == sum(
            p.numel() for p in net.parameters() if chosen is not None or p.requires_grad
        )
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_recurrent_layers_do_without_cudnn(enabled: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recurrent layers refuse a backward pass in evaluation mode; other networks keep it."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", enabled)
    for net, inside in ((torch.nn.LSTM(2, 3), False), (torch.nn.Linear(2, 3), enabled)):
        with contextlib.suppress(Interrupted), untouched(net):
            assert torch.backends.cudnn.enabled is inside
            if fails:
                raise Interrupted
        assert torch.backends.cudnn.enabled is enabled


def test_frozen_parameters_stay_frozen_and_their_kernel_is_right() -> None:
    net = model()
    frozen = list(net.layer.linear1.parameters())  # pyright: ignore
    truth = oracles.entk(net, X, X, lambda y: y, frozen)
    before = oracles.snapshot(net)
    got = ntkit.empirical_ntk(net, X, parameters=net.layer.linear1)  # pyright: ignore
    unchanged(before, net)
    assert oracles.relative_error(got, truth) <= 1e-10


class Interrupted(Exception):
    """Not one that the library could expect."""


@pytest.mark.parametrize("use", [name for name in USES if name not in {"fingerprint", "plan"}])
@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, RuntimeError])
def test_after_a_failure_in_the_middle(use: str, error: type[BaseException]) -> None:
    """The model fails once the trial is over, from inside its forward pass."""
    net = model()
    armed = []

    def fail(module: nn.Module, args: Any) -> None:
        if armed:
            raise error

    net.norm.register_forward_pre_hook(fail)  # pyright: ignore
    kernel = ntkit.TangentKernel(ntkit.linearize(net, parameters="*"), X)
    before = oracles.snapshot(net)
    armed.append(True)
    with pytest.raises(ntkit.InputError if error is RuntimeError else error):
        USES[use](kernel)
    unchanged(before, net)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, RuntimeError])
def test_after_a_failure_in_the_backward_pass(error: type[BaseException]) -> None:
    net = model()
    armed = []

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
            if armed:
                raise error("in the backward pass")
            return cotangents[0]

    net.head.register_forward_pre_hook(lambda module, args: (Failing.apply(args[0]),))  # pyright: ignore
    kernel = ntkit.TangentKernel(ntkit.linearize(net, parameters="*"), X)
    before = oracles.snapshot(net)
    armed.append(True)
    with pytest.raises((error, ntkit.NtkitError)):
        kernel.dense()
    unchanged(before, net)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_context_itself(fused: bool, fails: bool) -> None:
    net = Net(lambda m, x: x, a=torch.zeros(3), b=torch.ones(2, 2)).double()
    net.register_buffer("nothing", None)
    torch.backends.mha.set_fastpath_enabled(fused)
    before = oracles.snapshot(net)
    try:
        with contextlib.suppress(Interrupted), torch.no_grad(), untouched(net):
            assert not torch.backends.mha.get_fastpath_enabled()
            assert torch.is_grad_enabled()
            net.a.add_(1)  # pyright: ignore
            net.b = torch.zeros(2, 2)
            if fails:
                raise Interrupted
        assert torch.is_grad_enabled()
        unchanged(before, net)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_training_goes_on_as_if_nothing_had_happened() -> None:
    """A kernel between two steps of an optimizer changes neither."""

    def steps(look: bool) -> list[Tensor]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net.train()(normal(5)(8)).square().mean().backward()
            if look:
                ntkit.empirical_ntk(net.eval(), normal(5)(4))
            optimizer.step()
        return [*net.state_dict().values()]

    for looked, plain in zip(steps(True), steps(False), strict=True):
        assert torch.equal(looked, plain)
