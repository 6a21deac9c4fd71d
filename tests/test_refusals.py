"""What has no tangent kernel is refused, with the cause and the way out, and the model is as it was."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, ModelError, SlowRouteWarning
from tests import oracles
from tests.cases import Net, mlp, normal, weight

X = normal(5)(6)
LONG = 400  # examples, to see that nothing long is done before a refusal


@dataclass(frozen=True)
class Refusal:
    """A model and data that must be refused, and what the message has to say."""

    name: str
    make: Callable[[], nn.Module]
    error: type[Exception]
    message: str
    data: Callable[[], Any] = lambda: normal(5)(LONG)


def linear(c: int = 3, d: int = 5) -> nn.Linear:
    return nn.Linear(d, c)


def net(function: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    """A model in eval mode from a function and makers of its parts."""
    return lambda: Net(function, **{name: make() for name, make in parts.items()}).eval()


def fails(error: Exception) -> Callable[..., Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.f(x)
        raise error

    return forward


def with_value(value: float, place: int) -> Callable[[], Tensor]:
    def data() -> Tensor:
        x = normal(5)(LONG)
        x[place, 0] = value
        return x

    return data


def with_zero(place: int) -> Callable[[], Tensor]:
    def data() -> Tensor:
        x = normal(5)(LONG)
        x[place] = 0
        return x

    return data


def remembers(m: Any, x: Tensor) -> Tensor:
    m.calls.add_(1)
    return m.f(x) * m.calls


def moving_average(m: Any, x: Tensor) -> Tensor:
    m.mean = 0.9 * m.mean + 0.1 * x.mean(0).detach()
    return m.f(x - m.mean)


class DropPath(nn.Module):
    """Stochastic depth: in training a branch is left out, example by example."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.f, self.p = nn.Linear(5, 5), p

    def forward(self, x: Tensor) -> Tensor:
        keep = (torch.rand(len(x), 1) >= self.p).to(x) if self.training else 1.0
        return x + keep * self.f(x)


class Wrapped(DropPath):
    """The same behind a decorator, as transformers has them."""

    @functools.wraps(DropPath.forward)
    def forward(self, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return DropPath.forward(self, *args)


class Blocks(nn.Sequential):
    """In training mode, of torch's own code: what matters is whether its members are."""


EVAL, MIXED = r"model\.eval\(\)", r"outputs for the same examples differ.*examples influence each other.*eval\(\)"

MODE = [
    Refusal("batch_norm/1d", lambda: nn.Sequential(linear(), nn.BatchNorm1d(3)), ModelError,
            rf"batch statistics.*1 \(BatchNorm1d\).*{EVAL}"),
    Refusal("batch_norm/deep", lambda: nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))}),
            ModelError, rf"a\.1 \(BatchNorm2d\).*{EVAL}"),
    Refusal("batch_norm/no_statistics", lambda: nn.Sequential(
            linear(), nn.BatchNorm1d(3, track_running_stats=False)).eval(), ModelError, r"1 \(BatchNorm1d\)"),
    Refusal("batch_norm/one_of_two_training", lambda: nn.Sequential(
            linear(), nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3)), ModelError, r"other examples: 2 \(BatchNorm1d\)\."),
    Refusal("dropout/one", lambda: nn.Sequential(linear(), nn.Dropout(0.1)), ModelError,
            rf"dropout is active: 1 \(Dropout\).*{EVAL}"),
    Refusal("dropout/alpha", lambda: nn.Sequential(linear(), nn.AlphaDropout(0.1)), ModelError, "AlphaDropout"),
    Refusal("dropout/lstm", lambda: nn.LSTM(5, 3, num_layers=2, dropout=0.1), ModelError, "dropout.*LSTM"),
    Refusal("dropout/attention", lambda: nn.MultiheadAttention(4, 2, dropout=0.1), ModelError,
            "dropout.*MultiheadAttention"),
    Refusal("dropout/many", lambda: nn.Sequential(linear(), *(nn.Dropout(0.1) for _ in range(6))), ModelError,
            r"1 \(Dropout\).*4 \(Dropout\) and 2 more"),
    Refusal("drop_path/one", lambda: nn.Sequential(DropPath(0.1), linear()), ModelError,
            rf"its forward looks at self\.training: 0 \(DropPath\).*{EVAL}"),
    Refusal("both", lambda: nn.Sequential(linear(), nn.BatchNorm1d(3), nn.Dropout()), ModelError,
            "batch statistics.*dropout is active"),
]  # fmt: skip

MIXING = [
    Refusal("mixing/softmax_over_the_batch", net(lambda m, x: m.f(x).softmax(0), f=linear), ModelError, MIXED),
    Refusal("mixing/centred_inputs", net(lambda m, x: m.f(x - x.mean(0)), f=linear), ModelError, MIXED),
    Refusal("mixing/centred_outputs", net(lambda m, x: m.f(x) - m.f(x).mean(0), f=linear), ModelError, MIXED),
    Refusal("mixing/functional_batch_norm", net(
            lambda m, x: m.g(F.batch_norm(m.f(x), None, None, training=True)), f=linear, g=lambda: linear(3, 3)),
            ModelError, MIXED),
    Refusal("mixing/attention_over_the_batch", net(
            lambda m, x: F.scaled_dot_product_attention(m.f(x), m.f(x), x)[:, :3], f=lambda: linear(5)),
            ModelError, MIXED),
    Refusal("mixing/rolled", net(lambda m, x: m.f(x.roll(1, 0)), f=linear), ModelError, MIXED),
    Refusal("mixing/last_example", net(lambda m, x: m.f(x) - x[-1, :3], f=linear), ModelError, MIXED),
    Refusal("state/counter", net(remembers, f=linear, calls=lambda: torch.zeros(())), ModelError, "keeps state"),
    Refusal("state/moving_average", net(moving_average, f=linear, mean=lambda: torch.zeros(5)), ModelError,
            "keeps state"),
    # Examples that depend on those before them only: the first ones look the same in a longer batch.
    Refusal("mixing/running_sum", net(lambda m, x: m.f(x.cumsum(0)), f=linear), ModelError, MIXED),
    Refusal("mixing/first_example", net(lambda m, x: m.f(x) - m.g(x[:1]), f=linear, g=linear), ModelError, MIXED),
    Refusal("mixing/recurrence_over_the_batch", net(lambda m, x: m.f(x)[0][:, -1], f=lambda: nn.LSTM(5, 3)),
            ModelError, MIXED, lambda: normal(4, 5)(LONG)),
]  # fmt: skip

RANDOM = [
    Refusal("random/functional_dropout", net(
            lambda m, x: m.g(F.dropout(m.f(x), 0.5, True)), f=lambda: linear(64), g=lambda: linear(3, 64)), ModelError,
            f"{MIXED}|the model is random"),
    Refusal("random/noise", net(lambda m, x: m.f(x) + torch.randn(len(x), 1), f=linear), ModelError,
            "the model is random"),
]  # fmt: skip

NUMBERS = [
    Refusal("output/nan_example", linear, ModelError, "output is NaN or infinite.*example 0.*inputs, the weights",
            with_value(math.nan, 0)),
    Refusal("output/inf_example", linear, ModelError, "output is NaN or infinite", with_value(math.inf, LONG - 1)),
    Refusal("output/log", net(lambda m, x: (m.f(x) * 0 - 1).log(), f=linear), ModelError, "output is NaN or infinite"),
    Refusal("gradient/sqrt_at_zero", net(lambda m, x: m.f(x).square().sqrt(), f=lambda: nn.Linear(5, 3, bias=False)),
            ModelError, r"NaN or infinite.*sqrt\(0\)", with_zero(0)),
    Refusal("gradient/sqrt_at_zero_later", net(
            lambda m, x: m.f(x).square().sqrt(), f=lambda: nn.Linear(5, 3, bias=False)),
            ModelError, r"NaN or infinite.*sqrt\(0\)", with_zero(LONG - 1)),
    Refusal("gradient/norm_at_zero", net(
            lambda m, x: m.f(x.square().sum(1, keepdim=True).sqrt() * m.w).exp(), f=linear, w=lambda: weight(5)),
            ModelError, "NaN or infinite", lambda: normal(5)(LONG) * 1e200),
]  # fmt: skip

RUNS = [
    Refusal("input/dtype", linear, InputError, r"parameters are torch\.float64, the examples torch\.float32.*x\.to\(",
            lambda: normal(5)(LONG).float()),
    Refusal("input/shape", linear, InputError, r"fails on examples of shapes \[\(2, 7\)\]: RuntimeError: mat1",
            lambda: normal(7)(LONG)),
    Refusal("input/integers", linear, InputError, r"fails on examples.*RuntimeError",
            lambda: torch.ones(LONG, 5).long()),
    Refusal("input/keyword", linear, InputError, "unexpected keyword argument 'pixels'",
            lambda: {"pixels": normal(5)(LONG)}),
    Refusal("input/too_many", linear, InputError, "positional argument", lambda: (normal(5)(LONG), normal(5)(LONG))),
    Refusal("input/id_out_of_range", lambda: nn.Sequential(nn.Embedding(4, 3), nn.Flatten()), InputError,
            "IndexError: index out of range", lambda: torch.full((LONG, 2), 4)),
    Refusal("forward/runtime_error", net(fails(RuntimeError("no kernel image")), f=linear), InputError,
            "the model fails on examples.*RuntimeError: no kernel image"),
    Refusal("forward/other_error", net(fails(ZeroDivisionError("mine")), f=linear), ZeroDivisionError, "mine"),
    Refusal("forward/interrupted", net(fails(KeyboardInterrupt("stop")), f=linear), KeyboardInterrupt, "stop"),  # pyright: ignore
    Refusal("embedding/scale_grad_by_freq", lambda: nn.Sequential(
            nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Flatten()), ModelError, "scale_grad_by_freq.*False",
            lambda: torch.randint(4, (LONG, 2), generator=torch.Generator().manual_seed(0))),
    Refusal("embedding/max_norm", lambda: nn.Sequential(nn.Embedding(4, 3, max_norm=0.1), nn.Flatten()), ModelError,
            "max_norm=None", lambda: torch.randint(4, (LONG, 2), generator=torch.Generator().manual_seed(0))),
]  # fmt: skip

REFUSALS = [*MODE, *MIXING, *RANDOM, *NUMBERS, *RUNS]
LATE = {"gradient/sqrt_at_zero_later", "output/inf_example"}  # only the example itself can show it


def build(refusal: Refusal) -> nn.Module:
    torch.manual_seed(0)
    model = refusal.make()
    model.double()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    return model


def calls(model: nn.Module) -> list[int]:
    """Examples seen by each call of the model's forward. Sees the call, leaves no hook."""
    seen: list[int] = []
    forward = type(model).forward

    class Counted(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(len((*args, *kwargs.values())[0]))
            return forward(self, *args, **kwargs)

    Counted.__name__ = type(model).__name__  # which messages show
    model.__class__ = Counted
    return seen


@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last:UserWarning")
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.name)
def test_refused_early_in_words_and_untouched(refusal: Refusal) -> None:
    model, data = build(refusal), refusal.data()
    seen = calls(model)
    before, kept = oracles.snapshot(model), copy.deepcopy(data)
    with pytest.raises(refusal.error, match=f"(?s){refusal.message}"):
        ntkit.empirical_ntk(model, data)
    after = oracles.snapshot(model)
    for aspect, value in before.items():
        assert after[aspect] == value, f"the model's {aspect} changed"
    assert type(data) is type(kept)
    if isinstance(data, Tensor):
        assert torch.equal(data.nan_to_num(), kept.nan_to_num())
    if refusal.name not in LATE:
        assert sum(seen) <= 12, "examples were run before the refusal"


@pytest.mark.parametrize("refusal", [*MIXING, *RANDOM], ids=lambda r: r.name)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_mixing_is_seen_in_few_examples_too(refusal: Refusal, n: int) -> None:
    with pytest.raises(ModelError):
        ntkit.TangentKernel(ntkit.linearize(build(refusal)), refusal.data()[:n])


def behind_equal(data: Tensor, equal: int) -> Tensor:
    """The same with the first few examples equal to the first of all."""
    return torch.cat([data[:1].expand(equal, *data.shape[1:]), data[equal:]])


@pytest.mark.parametrize("refusal", MIXING, ids=lambda r: r.name)
@pytest.mark.parametrize("equal", [2, 3, LONG - 1])
def test_mixing_is_seen_behind_equal_examples(refusal: Refusal, equal: int) -> None:
    model = build(refusal)
    seen = calls(model)
    with pytest.raises(ModelError):
        ntkit.TangentKernel(ntkit.linearize(model), behind_equal(refusal.data(), equal))
    assert sum(seen) <= 12


@pytest.mark.filterwarnings("ignore::ntkit.errors.SlowRouteWarning")
@pytest.mark.parametrize("refusal", MIXING, ids=lambda r: r.name)
@pytest.mark.parametrize("equal", [1, 5])
def test_mixing_is_seen_in_the_columns(refusal: Refusal, equal: int) -> None:
    """One row, or equal ones, cannot show it, though batch statistics of them may be nothing that can be computed."""
    data = refusal.data()
    with pytest.raises(ModelError if "batch_norm" not in refusal.name else InputError):
        ntkit.TangentKernel(ntkit.linearize(build(refusal)), data[:1].expand(equal, *data.shape[1:]), data)


@pytest.mark.parametrize("make", [linear, mlp], ids=["linear", "mlp"])
def test_equal_examples_are_no_mixing(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().double(), X[:1].expand(5, 5)
    kernel = ntkit.empirical_ntk(model, x)
    assert oracles.relative_error(kernel, oracles.entk(model, x, x, lambda y: y, list(model.parameters()))) <= 1e-12


BROADCAST = ntkit.Loss(lambda output, target: (output - target).square().mean(1))  # (N, 1) - (N,) is (N, N)


@pytest.mark.parametrize("targets", [[0.0] * 4 + [1.0] * 4, [0.0] * 7 + [1.0], [1.0] + [0.0] * 7])
def test_a_loss_that_broadcasts_is_refused_whatever_the_order_of_the_targets(targets: list[float]) -> None:
    torch.manual_seed(0)
    model, data = mlp(c=1).double(), (normal(5)(8), torch.tensor(targets, dtype=torch.float64))
    with pytest.raises(ModelError, match=r"differ by .*a loss of \(N, 1\) outputs and \(N,\) targets that broadcast"):
        ntkit.TangentKernel(ntkit.linearize(model, readout=BROADCAST), data)


def test_mixing_that_a_trial_cannot_show_is_seen_in_the_first_batch() -> None:
    """One target among many differs from the others: it is not among the few that are looked at."""
    torch.manual_seed(0)
    model, targets = mlp(c=1).double(), torch.zeros(LONG, dtype=torch.float64)
    targets[77] = 100.0
    kernel = ntkit.TangentKernel(ntkit.linearize(model, readout=BROADCAST), (normal(5)(LONG), targets))
    with pytest.raises(ModelError, match="alone and in company"):
        kernel.dense()


def test_other_targets_of_the_same_examples_are_no_mixing() -> None:
    """What the trial saw of the first example holds for its target alone."""
    torch.manual_seed(0)
    tangent = ntkit.linearize(mlp().double(), readout=ntkit.Loss(nn.CrossEntropyLoss(reduction="none")))
    first, second = (ntkit.TangentKernel(tangent, (X, (torch.arange(6) + shift) % 3)).dense() for shift in (0, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("use", ["outputs", "vjp", "jvp", "jacobian"])
@pytest.mark.parametrize("refusal", MIXING, ids=lambda r: r.name)
def test_mixing_is_refused_by_every_use(refusal: Refusal, use: str) -> None:
    tangent, data = ntkit.linearize(build(refusal)), refusal.data()
    with pytest.raises(ModelError):
        {
            "outputs": lambda: tangent.outputs(data),
            "vjp": lambda: tangent.vjp(data, torch.ones(len(data), 3)),
            "jvp": lambda: tangent.jvp(data, torch.ones(tangent.count)),
            "jacobian": lambda: tangent.jacobian(data),
        }[use]()


def test_outputs_are_checked_once() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    seen = calls(model)
    tangent = ntkit.linearize(model)
    for _ in range(3):
        tangent.outputs(X)
        tangent.vjp(X, torch.ones(6, 3))
    assert seen == [3, 2, 1, 6, 2, *[6] * 5]  # the check, and K of the first vjp; else what is asked for
    after_a_trial = ntkit.TangentKernel(ntkit.linearize(model), X).tangent
    seen.clear()
    after_a_trial.outputs(X)
    assert seen == [6]


@pytest.mark.parametrize("use", ["outputs", "jacobian"])
@pytest.mark.parametrize("refusal", [r for r in NUMBERS if r.name.startswith("output")], ids=lambda r: r.name)
def test_other_uses_refuse_too(refusal: Refusal, use: str) -> None:
    model = build(refusal)
    before = oracles.snapshot(model)
    with pytest.raises(ModelError, match="NaN or infinite"):
        getattr(ntkit.linearize(model), use)(refusal.data())
    assert oracles.snapshot(model) == before


@pytest.mark.parametrize(
    "read",
    [
        lambda kernel: kernel.dense(),
        lambda kernel: kernel.diagonal(),
        lambda kernel: kernel.by_parameter(),
        lambda kernel: kernel @ torch.ones(kernel.shape[1], dtype=torch.float64),
    ],
    ids=["dense", "diagonal", "by_parameter", "product"],
)
def test_a_late_infinite_gradient_is_seen_by_every_method(read: Callable[[ntkit.TangentKernel], Any]) -> None:
    refusal = next(r for r in NUMBERS if r.name == "gradient/sqrt_at_zero_later")
    model = build(refusal)
    kernel = ntkit.TangentKernel(ntkit.linearize(model), refusal.data()[-8:])
    before = oracles.snapshot(model)
    with pytest.raises(ModelError, match="NaN or infinite"):
        read(kernel)
    assert oracles.snapshot(model) == before


def test_an_undefined_gradient_is_not_called_a_slow_route() -> None:
    """The refusal must come first: no announcement, no example-by-example work."""
    refusal = next(r for r in NUMBERS if r.name == "gradient/sqrt_at_zero")
    with pytest.raises(ModelError, match="NaN or infinite"):
        ntkit.TangentKernel(ntkit.linearize(build(refusal)), refusal.data()[:4]).dense()


# ---------------------------------------------------------------- what is accepted all the same


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(linear(), nn.Dropout(0.0)),
        lambda: nn.Sequential(linear(), nn.Tanh(), nn.Linear(3, 3)).train(),
        lambda: nn.Sequential(linear(), nn.LayerNorm(3)).train(),
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(3), nn.Dropout()).eval(),
        lambda: nn.Sequential(DropPath(0.1), linear()).eval(),
        lambda: Blocks(Net(lambda m, x: m.f(x), f=linear())).train(),
        lambda: nn.TransformerEncoderLayer(5, 1, 4, dropout=0.0, batch_first=True).train(),
    ],
    ids=[
        "dropout of nothing",
        "training without consequence",
        "layer norm",
        "eval",
        "drop path in eval",
        "modules of one's own",
        "torch's own code",
    ],
)
def test_accepted(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double()
    x = X if isinstance(model, nn.Sequential) else X[:, None]
    tangent = ntkit.linearize(model, readout=ntkit.Logits(select=lambda output: output.flatten(1)[:, :3]))
    assert ntkit.TangentKernel(tangent, x).dense().shape == (18, 18)


@pytest.mark.parametrize("seed", range(5))
def test_stochastic_depth_is_refused_whatever_it_drops(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(DropPath(0.1), DropPath(0.1), linear()).double().train()
    with pytest.raises(ModelError, match=r"0 \(DropPath\), 1 \(DropPath\)"):
        ntkit.linearize(model)


def test_a_forward_behind_a_decorator_is_looked_at() -> None:
    with pytest.raises(ModelError, match=r"self\.training: the model \(Wrapped\)"):
        ntkit.linearize(Wrapped(0.1))


def counts(m: Any, x: Tensor) -> Tensor:
    m.calls.add_(len(x))
    m.last = x.detach().mean() + m.last
    return m.f(x)


@pytest.mark.parametrize("fails_at", [None, 0, 1])
def test_buffers_that_forward_changes_are_restored(fails_at: int | None) -> None:
    """Both written in place and replaced; also when the forward pass fails half way."""
    torch.manual_seed(0)
    seen = []

    def forward(m: Any, x: Tensor) -> Tensor:
        out = counts(m, x)
        seen.append(len(x))
        if fails_at is not None and len(seen) > fails_at:
            raise RuntimeError("half way")
        return out

    model = Net(forward, f=mlp(), calls=torch.zeros((), dtype=torch.long), last=torch.zeros(())).double().eval()
    before = oracles.snapshot(model)
    if fails_at is None:
        tangent = ntkit.linearize(model)
        kernel = ntkit.TangentKernel(tangent, X, memory=1)
        for use in (kernel.dense, kernel.diagonal, kernel.by_parameter, kernel.plan):
            use()
            assert oracles.snapshot(model) == before
        for product in (
            lambda: tangent.outputs(X),
            lambda: tangent.jacobian(X),
            lambda: tangent.vjp(X, torch.ones(6, 3)),
            lambda: tangent.jvp(X, torch.ones(tangent.count)),
        ):
            product()
            assert oracles.snapshot(model) == before
    else:
        with pytest.raises(InputError, match="half way"):
            ntkit.empirical_ntk(model, X)
    assert oracles.snapshot(model) == before


def test_slow_route_is_said_once_per_tangent() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: torch.stack([m.f(row) for row in x]), f=linear()).double().eval()
    tangent = ntkit.linearize(model)
    with pytest.warns(SlowRouteWarning, match=r"f\.weight, f\.bias take the generic route.*exact, slow"):
        kernel = ntkit.TangentKernel(tangent, X)
    kernel.dense()  # a second warning would be an error
    ntkit.TangentKernel(tangent, X[:3], X).dense()


def test_examples_with_another_number_of_scalars_are_named() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)[:, : 4 if len(x) == 256 else 1]

    with pytest.raises(InputError, match="4 scalars each, those from 256 on 1"):
        ntkit.linearize(Wide().eval()).outputs(torch.randn(300, 3))
