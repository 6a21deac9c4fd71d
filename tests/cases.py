"""The models that the exact kernel must be right for, as data.

One `Case` per line where it can be: a name "family/variant", a builder, a maker of n examples. Every model is small,
float64, in eval mode and built under its own seed, and its parameters and statistics are shaken away from the zeros and
ones of their default initialisation, so that no term of a derivative vanishes by accident.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

Make = Callable[[], nn.Module]
Data = Callable[[int], Any]


@dataclass(frozen=True)
class Case:
    """One model and its data.

    Attributes:
        name: "family/variant".
        build: A new copy of the model: float64, eval mode, always the same values.
        data: n -> n examples: a tensor, or a tuple or dict of tensors with first axis n.
        select: The model's raw output -> (N, C); None where the output is (N, C) already.
        parameters: (name, parameter) -> bool, which parameters take part; None for all that require a gradient.
        slow_route: Whether an announced slow route is expected: the model holds an operation that has no rule. None
            where it depends on the examples.
    """

    name: str
    build: Make
    data: Data
    select: Callable[[Any], Tensor] | None = None
    parameters: Callable[[str, nn.Parameter], bool] | None = None
    slow_route: bool | None = False

    def scalars(self, output: Any) -> Tensor:
        """The (N, C) outputs that are meant."""
        return output if self.select is None else self.select(output)

    def chosen(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters of `model` that take part, in the model's order."""
        if self.parameters is None:
            return [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [parameter for name, parameter in model.named_parameters() if self.parameters(name, parameter)]


class Net(nn.Module):
    """A model written as one function of its parts: modules, parameters and (plain tensors) buffers."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def case(
    name: str,
    make: Make,
    data: Data,
    *,
    select: Callable[[Any], Tensor] | None = None,
    parameters: Callable[[str, nn.Parameter], bool] | None = None,
    slow_route: bool | None = False,
) -> Case:
    """A `Case` whose builder is `make` made reproducible: own seed, float64, eval mode, shaken values."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning):  # of the old weight_norm, spectral_norm and torch.jit
                warnings.filterwarnings("ignore", message=".*deprecated", category=kind)
            torch.manual_seed(0)
            model = make().double().eval()
            shake(model)
        return model

    return Case(name, build, data, select, parameters, slow_route)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Moves every parameter and every running statistic of a normalization off its default value."""
    for value in model.parameters():
        value.add_(torch.randn_like(value), alpha=0.2 if value.ndim < 2 else 0.1)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.copy_(torch.randn_like(value) * 0.5)
        elif name.endswith("running_var"):
            value.copy_(torch.rand_like(value) + 0.5)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1] if shape else 1.0))


# ---------------------------------------------------------------- data


def normal(*shape: int, seed: int = 1) -> Data:
    """n examples of independent normal numbers: (n, *shape)."""
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high: int, *shape: int, seed: int = 1) -> Data:
    """n examples of integers in [0, high): (n, *shape)."""
    return lambda n: torch.randint(high, (n, *shape), generator=torch.Generator().manual_seed(seed))


def padding(length: int) -> Data:
    """n sequences of different lengths, at least 2: (n, length) that is True at the padding."""
    return lambda n: torch.arange(length) >= (2 + torch.arange(n) % (length - 1))[:, None]


VECTOR = normal(5)
TOKENS = normal(4, 5)


def together(*parts: Data) -> Data:
    """A tuple of data."""
    return lambda n: tuple(part(n) for part in parts)


def named(**parts: Data) -> Data:
    """A dict of data."""
    return lambda n: {name: part(n) for name, part in parts.items()}


# ---------------------------------------------------------------- linear


def mlp(*, activation: Callable[[], nn.Module] = nn.Tanh, c: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, c))


LINEAR = [
    case("linear/one_layer", lambda: nn.Linear(5, 3), normal(5)),
    case("linear/no_bias", lambda: nn.Linear(5, 3, bias=False), normal(5)),
    case("linear/mlp", mlp, normal(5)),
    case("linear/mlp_one_output", lambda: mlp(c=1), normal(5)),
    case("linear/mlp_inplace_relu", lambda: mlp(activation=lambda: nn.ReLU(inplace=True)), normal(5)),
    case("linear/mlp_dropout_eval", lambda: mlp(activation=lambda: nn.Dropout(0.5)), normal(5)),
    case("linear/mlp_flat_output", lambda: Net(lambda m, x: m.f(x)[:, 0], f=mlp(c=1)), normal(5),
         select=lambda y: y[:, None]),
    case("linear/sequence_mean", lambda: Net(lambda m, x: m.f(x).mean(1), f=mlp()), normal(4, 5)),
    case("linear/two_extra_axes", lambda: Net(lambda m, x: m.f(x).square().mean((1, 2)), f=mlp()), normal(2, 3, 5)),
    case("linear/bilinear", lambda: Net(lambda m, a, b: m.head(m.f(a, b).tanh()), f=nn.Bilinear(4, 3, 5),
         head=nn.Linear(5, 3)), together(normal(4), normal(3, seed=2))),
    case("linear/bilinear_sequence", lambda: Net(lambda m, a, b: m.f(a, b).tanh().sum(1),
         f=nn.Bilinear(4, 3, 3, bias=False)), together(normal(5, 4), normal(5, 3, seed=2))),
]  # fmt: skip


# ---------------------------------------------------------------- convolutions

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "same": {"padding": "same"},
    "same_dilated": {"padding": "same", "dilation": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
    "everything": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "bias": False},
}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "output_padding": {"stride": 2, "output_padding": 1},
    "groups": {"groups": 2},
    "dilation": {"dilation": 2, "padding": 1},
    "everything": {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2, "groups": 2, "bias": False},
}
SIZES = {1: (9,), 2: (6, 7), 3: (5, 6, 5)}


def pooled(body: nn.Module, channels: int) -> nn.Module:
    """Images -> body -> mean over positions -> 3 outputs."""
    return Net(lambda m, x: m.head(m.body(x).tanh().flatten(2).mean(-1)), body=body, head=nn.Linear(channels, 3))


def convolution(kind: type[nn.Module], *, out_channels: int = 4, **options: Any) -> Make:
    return lambda: pooled(kind(4, out_channels, 3, **options), out_channels)


def channels_last() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    return pooled(model.to(memory_format=torch.channels_last), 4)  # pyright: ignore[reportCallIssue]


CONVOLUTION = [
    *(case(f"conv{d}d/{name}", convolution(kind, **options), normal(4, *SIZES[d]))
      for d, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)) for name, options in CONVOLUTIONS.items()),
    *(case(f"conv_transpose{d}d/{name}", convolution(kind, **options), normal(4, *(s - 2 for s in SIZES[d])))
      for d, kind in ((1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d))
      for name, options in TRANSPOSED.items()),
    case("conv2d/rectangular", lambda: pooled(nn.Conv2d(4, 5, (3, 2), (2, 1), (1, 0), (1, 2)), 5), normal(4, 6, 7)),
    case("conv2d/same_even_kernel", lambda: pooled(nn.Conv2d(4, 5, (2, 4), padding="same"), 5), normal(4, 6, 7)),
    case("conv2d/one_by_one", lambda: pooled(nn.Conv2d(4, 5, 1), 5), normal(4, 3, 3)),
    case("conv2d/kernel_of_whole_image", lambda: pooled(nn.Conv2d(4, 5, 4), 5), normal(4, 4, 4)),
    case("conv2d/channels_last", channels_last, normal(4, 6, 7)),
    case("conv2d/functional", lambda: pooled(Net(lambda m, x: F.conv2d(x, weight=m.w, stride=2, padding=1),
        w=weight(5, 4, 3, 3)), 5),
         normal(4, 6, 7)),
    case("conv2d/net", lambda: pooled(nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2)), 6), normal(3, 8, 8)),
]  # fmt: skip


# ---------------------------------------------------------------- normalizations


def normalized(norm: Make, *shape: int) -> Make:
    """Linear along the last axis, the norm, a head on everything: both sides of the norm have parameters."""
    return lambda: Net(
        lambda m, x: m.head(m.norm(m.stem(x)).tanh().flatten(1)),
        stem=nn.Linear(shape[-1], shape[-1]),
        norm=norm(),
        head=nn.Linear(math.prod(shape), 3),
    )


NORMALIZATIONS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "batch1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "batch1d_sequence": (lambda: nn.BatchNorm1d(4), (4, 5)),
    "batch2d": (lambda: nn.BatchNorm2d(4), (4, 3, 3)),
    "batch2d_no_affine": (lambda: nn.BatchNorm2d(4, affine=False), (4, 3, 3)),
    "batch3d": (lambda: nn.BatchNorm3d(3), (3, 2, 3, 2)),
    "layer": (lambda: nn.LayerNorm(5), (5,)),
    "layer_sequence": (lambda: nn.LayerNorm(5), (4, 5)),
    "layer_no_bias": (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
    "layer_two_axes": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer_functional": (
        lambda: Net(lambda m, x: F.layer_norm(x, (5,), bias=m.b, weight=m.g), g=weight(5), b=weight(5)),
        (4, 5),
    ),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "group_sequence": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "instance1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "instance2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "instance2d_running": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 3)),
    "rms": (lambda: nn.RMSNorm(5), (4, 5)),
    "rms_two_axes": (lambda: nn.RMSNorm((4, 5), eps=1e-3), (4, 5)),
}
NORMALIZATION = [
    case(f"norm/{name}", normalized(norm, *shape), normal(*shape)) for name, (norm, shape) in NORMALIZATIONS.items()
]


# ---------------------------------------------------------------- embeddings and PReLU


def embedded(table: Make) -> Make:
    """ids (N, T) -> vectors (N, T, 5) -> mean -> 3 outputs."""
    return lambda: Net(lambda m, ids: m.head(m.table(ids).tanh().mean(1)), table=table(), head=nn.Linear(5, 3))


def bag(**options: Any) -> Make:
    return lambda: Net(
        lambda m, ids, *w: m.head(m.bag(ids, per_sample_weights=w[0] if w else None).tanh()),
        bag=nn.EmbeddingBag(6, 5, **options),
        head=nn.Linear(5, 3),
    )


REPEATED = integers(3, 5)  # five ids out of three: every example repeats some
EMBEDDING = [
    case("embedding/plain", embedded(lambda: nn.Embedding(12, 5)), integers(12, 4)),
    case("embedding/repeated_ids", embedded(lambda: nn.Embedding(3, 5)), REPEATED),
    case("embedding/padding_idx", embedded(lambda: nn.Embedding(3, 5, padding_idx=1)), REPEATED),
    case("embedding/int32_ids", embedded(lambda: nn.Embedding(3, 5)), lambda n: REPEATED(n).int()),
    case("embedding/one_id", lambda: nn.Sequential(nn.Embedding(4, 5), nn.Tanh(), nn.Linear(5, 3)), integers(4)),
    case("embedding/functional", embedded(lambda: Net(lambda m, ids: F.embedding(ids, m.w), w=weight(3, 5))), REPEATED),
    case("embedding/one_hot", embedded(lambda: Net(lambda m, i: F.one_hot(i, 3).double() @ m.w, w=weight(3, 5))),
        REPEATED),
    case("embedding/bag_mean", bag(mode="mean"), REPEATED),
    case("embedding/bag_sum", bag(mode="sum"), REPEATED),
    case("embedding/bag_max", bag(mode="max"), REPEATED),
    case("embedding/bag_padding_idx", bag(mode="mean", padding_idx=1), REPEATED),
    case("embedding/bag_weighted", bag(mode="sum"), together(REPEATED, normal(5, seed=2))),
    case("prelu/one", lambda: mlp(activation=nn.PReLU), normal(5)),
    case("prelu/per_channel", lambda: pooled(nn.Sequential(nn.Conv2d(4, 5, 3), nn.PReLU(5)), 5), normal(4, 6, 7)),
    case("prelu/per_feature", lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 3)), normal(5)),
]  # fmt: skip


# ---------------------------------------------------------------- bare parameters


def vectors(function: Callable[..., Tensor], **parts: Callable[[], Any]) -> Make:
    """(N, 5) -> linear and tanh (N, 5) -> `function` -> tanh, linear -> 3 outputs."""
    return lambda: Net(
        lambda m, x: m.head(function(m, m.stem(x).tanh()).tanh()),
        stem=nn.Linear(5, 5),
        head=nn.Linear(5, 3),
        **{name: part() for name, part in parts.items()},
    )


def tokens(function: Callable[..., Tensor], **parts: Callable[[], Any]) -> Make:
    """(N, 4, 5) -> linear and tanh -> `function` -> (N, T, 5) -> tanh, mean over T, linear -> 3 outputs."""
    return lambda: Net(
        lambda m, x: m.head(function(m, m.stem(x).tanh()).tanh().mean(1)),
        stem=nn.Linear(5, 5),
        head=nn.Linear(5, 3),
        **{name: part() for name, part in parts.items()},
    )


def on_vectors(
    name: str, function: Callable[..., Tensor], *, slow_route: bool | None = False, **parts: Callable[[], Any]
) -> Case:
    return case(name, vectors(function, **parts), VECTOR, slow_route=slow_route)


def on_tokens(
    name: str, function: Callable[..., Tensor], *, slow_route: bool | None = False, **parts: Callable[[], Any]
) -> Case:
    return case(name, tokens(function, **parts), TOKENS, slow_route=slow_route)


def p(*shape: int) -> Callable[[], nn.Parameter]:
    """A parameter of this shape, as a part."""
    return lambda: weight(*shape)


def inplace_add(m: Any, x: Tensor) -> Tensor:
    x = x.sin()
    x += m.b
    return x


def inplace_slice(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:3] += m.b
    return x


def linear(d_in: int = 5, d_out: int = 5) -> Make:
    """A Linear, as a part."""
    return lambda: nn.Linear(d_in, d_out)


def mixture(m: Any, x: Tensor) -> Tensor:
    return sum(a * f for a, f in zip(m.a.softmax(0), (x, x.sin(), x.square()), strict=True))


def relative_positions(m: Any, x: Tensor) -> Tensor:
    """Attention with a bias looked up in a table by the distance of two positions, as in Swin."""
    bias = m.table[m.index].permute(2, 0, 1)[0]
    return (bias + x @ x.mT).softmax(-1) @ x


BARE = [
    # as a vector or scalar that meets the activations
    on_vectors("bare/scale_and_shift", lambda m, x: x * m.g + m.b, g=p(5), b=p(5)),
    on_vectors("bare/parameter_first", lambda m, x: m.b + m.g * x, g=p(5), b=p(5)),
    on_vectors("bare/scalar", lambda m, x: x * m.g + m.b, g=p(), b=p()),
    on_vectors("bare/inplace_add", inplace_add, b=p(5)),
    on_vectors("bare/inplace_add_method", lambda m, x: (x * 2).add_(m.b, alpha=0.5).tanh_(), b=p(5)),
    on_vectors("bare/inplace_mul", lambda m, x: (x + 1).mul_(m.g).sigmoid_(), g=p(5)),
    on_vectors("bare/inplace_slice", inplace_slice, b=p(2)),
    on_vectors("bare/add_alpha", lambda m, x: torch.add(x, m.b, alpha=0.3), b=p(5)),
    on_vectors("bare/sub_alpha", lambda m, x: torch.sub(m.b, x, alpha=0.3), b=p(5)),
    on_vectors("bare/subtract_from", lambda m, x: m.b - x, b=p(5)),
    on_vectors("bare/subtract", lambda m, x: x - m.b, b=p(5)),
    on_vectors("bare/divide", lambda m, x: x / (m.g.square() + 1), g=p(5)),
    on_vectors("bare/divided_by", lambda m, x: m.g / (x.square() + 1), g=p(5)),
    on_vectors("bare/temperature", lambda m, x: F.softmax(x / m.t.exp(), -1), t=p()),
    on_vectors("bare/power", lambda m, x: (x.square() + 1) ** m.g, g=p(5)),
    on_vectors("bare/addcmul", lambda m, x: torch.addcmul(m.b, x, m.g, value=0.5), g=p(5), b=p(5)),
    on_vectors("bare/lerp", lambda m, x: torch.lerp(x, m.b, m.g), g=p(5), b=p(5)),
    on_vectors("bare/where", lambda m, x: torch.where(x > 0, x, m.b), b=p(5)),
    on_vectors("bare/where_scalar", lambda m, x: torch.where(x > 0, x * m.g, m.b), g=p(), b=p()),
    on_vectors("bare/masked_fill", lambda m, x: x.masked_fill(x > 0, 0.0) + (x > 0) * m.b, b=p(5)),
    on_vectors("bare/expand_as", lambda m, x: x * m.g.expand_as(x), g=p(1, 5)),
    case("bare/added_to_output", lambda: Net(lambda m, x: m.f(x) + m.b.expand(len(x), -1), f=mlp(), b=weight(3)),
         VECTOR),
    case("bare/constant_output", lambda: Net(lambda m, x: torch.cat([m.f(x), m.b.expand(len(x), 2)], 1), f=mlp(c=1),
         b=weight(1)), VECTOR),
    # along the positions of a sequence
    on_tokens("bare/positions_added", lambda m, x: x + m.b, b=p(1, 4, 5)),
    on_tokens("bare/positions_without_batch_axis", lambda m, x: x + m.b, b=p(4, 5)),
    on_tokens("bare/positions_sliced", lambda m, x: x + m.b[:, : x.shape[1]], b=p(1, 6, 5)),
    on_tokens("bare/positions_resized", lambda m, x: x + F.interpolate(m.b, size=4, mode="linear").transpose(1, 2),
              b=p(1, 5, 7)),
    on_tokens("bare/per_position_scale", lambda m, x: x * m.g[:, None] + m.b.view(4, 1), g=p(4), b=p(4)),
    on_tokens("bare/layer_scale", lambda m, x: x + m.g * m.f(x), f=linear(), g=p(5)),
    on_tokens("bare/class_token_expand", lambda m, x: torch.cat([m.t.expand(len(x), -1, -1), x], 1), t=p(1, 1, 5)),
    on_tokens("bare/class_token_repeat", lambda m, x: torch.cat((m.t.repeat(len(x), 1, 1), x), dim=1), t=p(1, 1, 5)),
    on_tokens("bare/class_token_zeros", lambda m, x: torch.cat([m.t + torch.zeros(len(x), 1, 5).to(x), x], 1), t=p(5)),
    on_tokens("bare/stack", lambda m, x: torch.stack([m.a.expand(len(x), -1), x[:, 0] * m.b, x[:, 1]], 1),
              a=p(5), b=p(5)),
    on_tokens("bare/channels", lambda m, x: x * m.g.view(1, -1, 1) + m.b.reshape(-1, 1), g=p(4), b=p(4)),
    # as a matrix
    on_vectors("bare/matmul", lambda m, x: x @ m.w, w=p(5, 5)),
    on_vectors("bare/matmul_transposed", lambda m, x: x @ m.w.t(), w=p(5, 5)),
    on_tokens("bare/matmul_sequence", lambda m, x: torch.matmul(x, m.w.T), w=p(5, 5)),
    on_tokens("bare/matmul_left", lambda m, x: m.w @ x, w=p(3, 4)),
    on_vectors("bare/matmul_left_of_columns", lambda m, x: (m.w @ x.t()).t(), w=p(5, 5)),
    on_vectors("bare/matmul_vector", lambda m, x: x * (x @ m.w)[:, None], w=p(5)),
    on_tokens("bare/mixer", lambda m, x: x + m.f(x.transpose(1, 2)).transpose(1, 2), f=linear(4, 4)),
    on_vectors("bare/functional_linear", lambda m, x: F.linear(x, m.w), w=p(5, 5)),
    on_vectors("bare/functional_linear_keywords", lambda m, x: F.linear(bias=m.b, weight=m.w, input=x),
               w=p(5, 5), b=p(5)),
    on_tokens("bare/functional_linear_one_row", lambda m, x: x * F.linear(x, m.w)[..., None], w=p(5)),
    on_vectors("bare/addmm", lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0), w=p(5, 5), b=p(5)),
    on_tokens("bare/bmm_expanded", lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), w=p(1, 5, 5)),
    on_tokens("bare/baddbmm", lambda m, x: torch.baddbmm(m.b.expand(len(x), 4, 5), x, m.w.expand(len(x), 5, 5)),
              w=p(5, 5), b=p(5)),
    on_tokens("bare/bmm_batch_of_weights", lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1),
              w=p(4, 5, 5)),
    on_vectors("bare/einsum", lambda m, x: torch.einsum("nd,dc->nc", x, m.w), w=p(5, 5)),
    on_tokens("bare/einsum_sequence", lambda m, x: torch.einsum("ntd,sd->nts", x, m.w), w=p(5, 5)),
    on_tokens("bare/einsum_heads", lambda m, x: torch.einsum("ntd,dhk,hkc->ntc", x, m.w, m.v),
              w=p(5, 2, 3), v=p(2, 3, 5)),
    on_tokens("bare/einsum_diagonal", lambda m, x: torch.einsum("ntd,td->ntd", x, m.w), w=p(4, 5)),
    on_tokens("bare/tensordot", lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])), w=p(5, 5)),
    # first turned into something else, then used
    on_vectors("bare/slices", lambda m, x: torch.cat([F.linear(x, m.w[:3]), F.linear(x, m.w[3:])], 1), w=p(5, 5)),
    on_vectors("bare/slice_and_whole", lambda m, x: F.linear(x, m.w) + F.pad(F.linear(x, m.w[:3]), (0, 2)), w=p(5, 5)),
    on_vectors("bare/chunks", lambda m, x: sum(F.linear(x, w) for w in m.w.chunk(3)), w=p(15, 5)),
    on_vectors("bare/concatenated_weight", lambda m, x: F.linear(x, torch.cat([m.v, m.w]), m.b),
               v=p(2, 5), w=p(3, 5), b=p(5)),
    on_vectors("bare/low_rank", lambda m, x: F.linear(x, m.a @ m.b), a=p(5, 2), b=p(2, 5)),
    on_vectors("bare/outer_product", lambda m, x: x @ torch.outer(m.a, m.b), a=p(5), b=p(5)),
    on_vectors("bare/product_of_two", lambda m, x: x * (m.a * m.b), a=p(5), b=p(5)),
    on_vectors("bare/used_as_weight_and_scale", lambda m, x: F.linear(x, m.w) * m.w[0] + m.w.sum(0), w=p(5, 5)),
    on_vectors("bare/softmax_mixture", mixture, a=p(3)),
    on_vectors("bare/cumulative_product", lambda m, x: x * torch.cumprod(m.g, 0), g=p(5)),
    on_vectors("bare/softplus", lambda m, x: x * F.softplus(m.g), g=p(5)),
    on_tokens("bare/relative_position_table", relative_positions, table=p(7, 2),
              index=lambda: torch.arange(4)[:, None] - torch.arange(4) + 3),
    case("bare/indexed_by_data", lambda: Net(lambda m, i: m.f(m.w[i].flatten(1)), w=weight(6, 5), f=nn.Linear(20, 3)),
         integers(6, 4)),
    on_vectors("bare/straight_through", lambda m, x: F.linear(x, m.w + (m.w.sign() - m.w).detach()), w=p(5, 5)),
    on_vectors("bare/detached_use", lambda m, x: F.linear(x, m.w.detach()) + x @ m.w, w=p(5, 5)),
    on_vectors("bare/modulated_weight", lambda m, x: torch.bmm(m.w * x[:, None], x[..., None])[..., 0], w=p(5, 5)),
    on_vectors("bare/parameter_list", lambda m, x: x @ m.ws[0] + m.ws[1],
               ws=lambda: nn.ParameterList([weight(5, 5), weight(5)])),
    on_vectors("bare/parameter_dict", lambda m, x: x @ m.ws["a"], ws=lambda: nn.ParameterDict({"a": weight(5, 5)})),
    # learned or constant things that go through layers before they meet any example
    on_vectors("bare/layer_of_a_parameter", lambda m, x: x @ m.f(m.q).tanh(), f=linear(), q=p(5, 5)),
    on_tokens("bare/layer_of_an_expanded_parameter", lambda m, x: x + m.f(m.q.expand(len(x), -1, -1)).tanh(),
              f=linear(), q=p(1, 4, 5)),
    on_tokens("bare/layer_of_a_constant", lambda m, x: x + m.f(m.grid).tanh(), f=linear(),
              grid=lambda: torch.randn(4, 5)),
]  # fmt: skip


# ---------------------------------------------------------------- tied weights, several calls, branches


def language_model(*, transposed: bool = False) -> nn.Module:
    """ids -> embedding -> mix -> scores by the same table: one nn.Parameter in two modules, or one used transposed."""
    table = nn.Embedding(6, 5)
    if transposed:
        return Net(lambda m, ids: m.f(m.table(ids)).tanh().mean(1) @ m.table.weight.t(), table=table, f=nn.Linear(5, 5))
    model = Net(
        lambda m, ids: m.head(m.f(m.table(ids)).tanh().mean(1)), table=table, f=nn.Linear(5, 5), head=nn.Linear(5, 6)
    )
    model.head.weight = table.weight
    return model


def tied_layers(first: nn.Module, second: nn.Module) -> nn.Sequential:
    second.weight, second.bias = first.weight, first.bias
    return nn.Sequential(nn.Linear(5, 5), first, nn.Tanh(), second, nn.Tanh(), nn.Linear(5, 3))


def recurrent(m: Any, x: Tensor) -> Tensor:
    """An Elman network, unrolled by hand over (N, T, 5) from a learned state."""
    state = m.state.expand(len(x), -1)
    for t in range(x.shape[1]):
        state = torch.tanh(m.inner(state) + m.outer(x[:, t]))
    return m.head(state)


def repeated(times: int) -> Make:
    return vectors(lambda m, x: _iterate(m.f, x, times), f=linear())


def _iterate(f: nn.Module, x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = f(x).tanh()
    return x


def shared_sequential() -> nn.Module:
    block = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh())
    return nn.Sequential(block, block, block, nn.Linear(5, 3))


SHARED = [
    case("tied/embedding_and_head", language_model, integers(6, 4)),
    case("tied/embedding_transposed", lambda: language_model(transposed=True), integers(6, 4)),
    case("tied/two_linears", lambda: tied_layers(nn.Linear(5, 5), nn.Linear(5, 5)), VECTOR),
    case("tied/autoencoder", lambda: Net(lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.w.t())[:, :3],
         w=weight(4, 5), b=weight(4)), VECTOR),
    case("repeated/linear_twice", repeated(2), VECTOR),
    case("repeated/linear_three_times", repeated(3), VECTOR),
    case("repeated/block_in_sequential", shared_sequential, VECTOR),
    case("repeated/recurrent", lambda: Net(recurrent, inner=nn.Linear(5, 5), outer=nn.Linear(5, 5, bias=False),
         head=nn.Linear(5, 3), state=weight(5)), TOKENS),
    case("repeated/conv_twice", lambda: pooled(
        Net(lambda m, x: m.f(m.f(x).tanh()), f=nn.Conv2d(3, 3, 3, padding=1)), 3), normal(3, 4, 4)),
    case("repeated/siamese", lambda: Net(lambda m, a, b: m.f(a) * m.f(b), f=mlp()),
         together(VECTOR, normal(5, seed=2))),
    on_tokens("repeated/at_two_shapes", lambda m, x: m.f(x) + m.f(x.mean(1))[:, None], f=linear()),
    on_vectors("branch/residual", lambda m, x: x + m.f(x),
               f=lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 5))),
    on_vectors("branch/concatenated", lambda m, x: torch.cat([m.a(x), m.b(x), x], 1)[:, 2:7],
               a=linear(5, 4), b=linear(5, 2)),
    on_vectors("branch/gated", lambda m, x: m.a(x) * torch.sigmoid(m.b(x)), a=linear(), b=linear()),
    case("branch/squeeze_excite", lambda: pooled(Net(
        lambda m, x: m.f(x) * torch.sigmoid(m.gate(m.f(x).mean((2, 3))))[..., None, None],
        f=nn.Conv2d(3, 4, 3), gate=nn.Linear(4, 4)), 4), normal(3, 5, 5)),
    case("branch/dense", lambda: Net(lambda m, x: m.c(torch.cat([x, m.a(x), m.b(torch.cat([x, m.a(x)], 1))], 1)),
         a=nn.Linear(5, 3), b=nn.Linear(8, 3), c=nn.Linear(11, 3)), VECTOR),
]  # fmt: skip


# ---------------------------------------------------------------- attention


def attention(*, need_weights: bool = False, causal: bool = False, batch_first: bool = True, **options: Any) -> Make:
    """Self-attention over (N, T, 4), batch first outside; both of its outputs count where weights are asked for."""

    def forward(m: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        future = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
        y, attended = m.f(x, x, x, need_weights=need_weights, key_padding_mask=mask, attn_mask=future)
        y = y if batch_first else y.transpose(0, 1)
        return m.head(y.tanh().mean(1)) + (0.0 if attended is None else attended[:, 0, :3])

    return lambda: Net(forward, f=nn.MultiheadAttention(4, 2, batch_first=batch_first, **options), head=nn.Linear(4, 3))


def cross_attention() -> nn.Module:
    return Net(
        lambda m, q, k, v: m.head(m.f(q, k, v)[0].mean(1)),
        f=nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True),
        head=nn.Linear(4, 3),
    )


def hand_attention(*, causal: bool = False, fold_heads: bool = False) -> Make:
    """Scaled dot product attention written out around one joint projection, the heads folded into the batch or not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = m.qkv(x).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        if fold_heads:
            q, k, v = (part.reshape(n * 2, t, d // 2) * m.g for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return m.head(y.reshape(n, 2, t, d // 2).transpose(1, 2).reshape(n, t, d).tanh().mean(1))

    return lambda: Net(forward, qkv=nn.Linear(4, 12), g=weight(2), head=nn.Linear(4, 3))


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 6, **{"batch_first": True, "dropout": 0.1, **options})


def encoder(body: Make, *, batch_first: bool = True) -> Make:
    """(N, T, 4), or with a padding mask (N, T), -> body -> first token -> 3 outputs."""

    def forward(m: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = m.body(x if batch_first else x.transpose(0, 1), src_key_padding_mask=mask)
        return m.head(y[:, 0] if batch_first else y[0])

    return lambda: Net(forward, body=body(), head=nn.Linear(4, 3))


def stack(*, frozen_layers: int = 0, **options: Any) -> nn.TransformerEncoder:
    body = nn.TransformerEncoder(encoder_layer(**options), 2, norm=nn.LayerNorm(4))
    for layer in body.layers[:frozen_layers]:
        layer.requires_grad_(False)
    return body


def causal_stack() -> nn.Module:
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    return Net(lambda m, x, src_key_padding_mask: m.f(x, mask=m.mask, is_causal=True), f=stack(), mask=mask)


SEQUENCE = normal(5, 4)
PADDED = together(SEQUENCE, padding(5))
ATTENTION = [
    case("attention/batch_first", attention(), SEQUENCE),
    case("attention/batch_second", attention(batch_first=False), SEQUENCE),
    case("attention/weights", attention(need_weights=True), SEQUENCE),
    case("attention/weights_batch_second", attention(need_weights=True, batch_first=False), SEQUENCE),
    case("attention/no_bias", attention(bias=False), SEQUENCE),
    case("attention/bias_kv", attention(add_bias_kv=True), SEQUENCE),
    case("attention/padded", attention(), PADDED),
    case("attention/padded_causal_weights", attention(causal=True, need_weights=True), PADDED),
    case("attention/zero_attn", attention(add_zero_attn=True, need_weights=True), SEQUENCE),
    case("attention/other_key_sizes", cross_attention, together(SEQUENCE, normal(3, 3, seed=2), normal(3, 5, seed=3))),
    case("attention/scaled_dot_product", hand_attention(), SEQUENCE),
    case("attention/scaled_dot_product_causal", hand_attention(causal=True), SEQUENCE),
    case("attention/heads_in_the_batch", hand_attention(fold_heads=True), SEQUENCE),
    case("encoder/layer", encoder(encoder_layer), SEQUENCE),
    case("encoder/layer_padded", encoder(encoder_layer), PADDED),
    case("encoder/layer_norm_first", encoder(lambda: encoder_layer(norm_first=True)), PADDED),
    case("encoder/layer_batch_second", encoder(lambda: encoder_layer(batch_first=False), batch_first=False), SEQUENCE),
    case("encoder/layer_batch_second_norm_first", encoder(
        lambda: encoder_layer(batch_first=False, norm_first=True), batch_first=False), PADDED),
    case("encoder/layer_gelu_no_bias", encoder(lambda: encoder_layer(activation="gelu", bias=False)), SEQUENCE),
    case("encoder/stack", encoder(stack), SEQUENCE),
    case("encoder/stack_padded", encoder(stack), PADDED),
    case("encoder/stack_causal", encoder(causal_stack), SEQUENCE),
    case("encoder/stack_first_layer_frozen", encoder(lambda: stack(frozen_layers=1)), PADDED),
    case("encoder/stack_frozen", encoder(lambda: stack(frozen_layers=2)), PADDED),
    case("encoder/decoder_layer", lambda: Net(lambda m, x, memory: m.head(m.f(x, memory)[:, 0]),
         f=nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), head=nn.Linear(4, 3)),
         together(SEQUENCE, normal(3, 4, seed=2))),
]  # fmt: skip


# ---------------------------------------------------------------- where the example axis is, and is not, the first


def time_first(m: Any, x: Tensor) -> Tensor:
    """ids (N, T), transposed once and never back: all layers see (T, N, d)."""
    y = m.table(x.t()) + m.positions[:, None]
    return m.head(m.norm(y + m.f(y).tanh())[-1])


def time_first_net(length: int) -> Make:
    return lambda: Net(
        time_first,
        table=nn.Embedding(6, 5),
        positions=weight(length, 5),
        f=nn.Linear(5, 5),
        norm=nn.LayerNorm(5),
        head=nn.Linear(5, 3),
    )


def windows(m: Any, x: Tensor) -> Tensor:
    """Images (N, 4, 4, 5) cut into four 2x2 windows, (4 N, 4, 5), with a scale per position in the window."""
    n = len(x)
    w = x.view(n, 2, 2, 2, 2, 5).transpose(2, 3).reshape(n * 4, 4, 5)
    w = m.f(w * m.g).tanh()
    return m.head(w.view(n, 4, 4, 5).mean((1, 2)))


def pairs(m: Any, x: Tensor) -> Tensor:
    """Two versions of every example in one batch of 2 N, the halves the other way round in the second call."""
    n = len(x)
    return m.f(torch.cat([x, x.sin()]))[:n] + m.f(torch.cat([x.cos(), x]))[n:]


def modulated(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """A convolution whose weight is scaled for each example, all examples as groups of one image, as in StyleGAN2."""
    n = len(x)
    kernels = m.w * style[:, None, :, None, None]  # (N, 4, 3, 3, 3)
    y = F.conv2d(x.reshape(1, n * 3, *x.shape[2:]), kernels.reshape(n * 4, 3, 3, 3), groups=n)
    return m.head(y.view(n, 4, -1).tanh().mean(-1))


SHAPES = [
    case("shape/time_first", time_first_net(6), integers(6, 6)),
    case("shape/time_first_as_many_steps_as_examples", time_first_net(5), integers(6, 5)),
    on_tokens("shape/flattened_positions", lambda m, x: m.f(x.flatten(0, 1)).tanh().unflatten(0, (-1, 4)) * m.g,
              f=lambda: nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), g=p(5)),
    on_tokens("shape/flattened_batchnorm", lambda m, x: m.f(x.reshape(-1, 5)).view(-1, 4, 5),
              f=lambda: nn.BatchNorm1d(5)),
    on_tokens("shape/flattened_time_first",
              lambda m, x: m.f(x.transpose(0, 1).flatten(0, 1)).view(4, -1, 5).transpose(0, 1), f=linear()),
    on_vectors("shape/features_first", lambda m, x: (m.w @ x.t() + m.b).t(), w=p(5, 5), b=p(5, 1)),
    on_vectors("shape/extra_leading_axis", lambda m, x: m.f(x[None])[0], f=linear()),
    on_vectors("shape/pairs_in_the_batch", pairs, f=linear()),
    case("shape/windows_in_the_batch", lambda: Net(windows, f=nn.Linear(5, 5), g=weight(4, 1), head=nn.Linear(5, 3)),
         normal(4, 4, 5)),
    case("shape/images_of_a_sequence", lambda: Net(lambda m, x: m.f(x.flatten(0, 1)).view(*x.shape[:2], 3).mean(1),
         f=pooled(nn.Conv2d(2, 4, 3), 4)), normal(3, 2, 4, 4)),
    case("shape/examples_as_groups", lambda: Net(modulated, w=weight(4, 3, 3, 3), head=nn.Linear(4, 3)),
         together(normal(3, 5, 5), normal(3, seed=2))),
    case("shape/sequence_output", lambda: Net(lambda m, x: m.f(x), f=mlp()), TOKENS, select=lambda y: y.flatten(1)),
    case("shape/dict_output", lambda: Net(lambda m, x: {"scores": m.f(x), "other": None}, f=mlp()), VECTOR,
         select=lambda y: y["scores"]),
    case("shape/tuple_output", lambda: Net(lambda m, x: (m.f(x), m.g(x)), f=mlp(), g=mlp()), VECTOR,
         select=lambda y: y[0] * y[1]),
]  # fmt: skip


# ---------------------------------------------------------------- reparametrized weights


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def reparametrized(change: Callable[[Any], object], make: Make = lambda: nn.Linear(5, 5)) -> Make:
    def part() -> nn.Module:
        module = make()
        change(module)
        return module

    return vectors(lambda m, x: m.f(x) + m.f(x.sin()), f=part)


def one_channel() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(10, 5))


def orthogonal(orthogonal_map: str) -> Make:
    return reparametrized(lambda f: parametrizations.orthogonal(f, orthogonal_map=orthogonal_map))


def chained(f: nn.Module) -> None:
    parametrize.register_parametrization(f, "weight", Symmetric())
    parametrize.register_parametrization(f, "weight", nn.Tanh())
    parametrize.register_parametrization(f, "bias", nn.Softplus())


REPARAMETRIZED = [
    case("reparametrized/weight_norm", reparametrized(parametrizations.weight_norm), VECTOR),
    case("reparametrized/weight_norm_conv", reparametrized(lambda f: parametrizations.weight_norm(f[1]), one_channel),
         VECTOR),
    case("reparametrized/weight_norm_hook", reparametrized(nn.utils.weight_norm), VECTOR),
    case("reparametrized/spectral_norm", reparametrized(parametrizations.spectral_norm), VECTOR),
    case("reparametrized/spectral_norm_hook", reparametrized(nn.utils.spectral_norm), VECTOR),
    case("reparametrized/orthogonal_exponential", orthogonal("matrix_exp"), VECTOR),
    case("reparametrized/orthogonal_householder", orthogonal("householder"), VECTOR),
    case("reparametrized/symmetric", reparametrized(
        lambda f: parametrize.register_parametrization(f, "weight", Symmetric())), VECTOR),
    case("reparametrized/chain_and_bias", reparametrized(chained), VECTOR),
    case("reparametrized/pruned", reparametrized(lambda f: prune.l1_unstructured(f, "weight", amount=0.4)), VECTOR),
]  # fmt: skip


# ---------------------------------------------------------------- recurrent modules


def last_state(module: Make, width: int, *, batch_first: bool = True) -> Make:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.f(x if batch_first else x.transpose(0, 1))[0]
        return m.head((y if batch_first else y.transpose(0, 1))[:, -1])

    return lambda: Net(forward, f=module(), head=nn.Linear(width, 3))


def cell_loop(m: Any, x: Tensor) -> Tensor:
    state = None
    for t in range(x.shape[1]):
        state = m.f(x[:, t], state)
    return m.head(state[0] if isinstance(state, tuple) else state)


def rnn(kind: type[nn.RNNBase], **options: Any) -> Make:
    return lambda: kind(3, 4, **{"batch_first": True, **options})


STEPS = normal(4, 3)
RECURRENT = [
    case(f"recurrent/{name}", make, STEPS, slow_route=True)
    for name, make in {
        "lstm": last_state(rnn(nn.LSTM), 4),
        "lstm_batch_second": last_state(rnn(nn.LSTM, batch_first=False), 4, batch_first=False),
        "lstm_two_layers": last_state(rnn(nn.LSTM, num_layers=2), 4),
        "lstm_bidirectional": last_state(rnn(nn.LSTM, bidirectional=True), 8),
        "lstm_projected": last_state(rnn(nn.LSTM, proj_size=2), 2),
        "gru": last_state(rnn(nn.GRU), 4),
        "gru_batch_second_two_layers_bidirectional": last_state(
            rnn(nn.GRU, num_layers=2, bidirectional=True, batch_first=False), 8, batch_first=False
        ),
        "rnn": last_state(rnn(nn.RNN), 4),
        "lstm_cell": lambda: Net(cell_loop, f=nn.LSTMCell(3, 4), head=nn.Linear(4, 3)),
        "gru_cell": lambda: Net(cell_loop, f=nn.GRUCell(3, 4), head=nn.Linear(4, 3)),
    }.items()
]


# ---------------------------------------------------------------- whole networks


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or c_in != c_out:
            self.down = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


def resnet18(width: int = 4) -> nn.Sequential:
    """ResNet-18 for 32x32 images: no stem pooling, four stages of two basic blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    c_in = width
    for stage in range(4):
        for block in range(2):
            c_out = width * 2**stage
            layers.append(BasicBlock(c_in, c_out, 2 if stage and not block else 1))
            c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 3))


class VisionBlock(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.scale1, self.scale2 = weight(d), weight(d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + self.scale1 * self.out(attended)
        return x + self.scale2 * self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, d: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, 4, 4)
        self.token = weight(1, 1, d)
        self.positions = weight(1, 5, d)
        self.blocks = nn.Sequential(*(VisionBlock(d, 2) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def bert(kind: str = "BertForSequenceClassification", attention: str = "eager") -> Make:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=8, num_labels=3, attn_implementation=attention,
        )  # fmt: skip
        return getattr(transformers, kind)(config)

    return make


def gpt2(kind: str = "GPT2ForSequenceClassification", attention: str = "eager") -> Make:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8, num_labels=3, pad_token_id=0, bos_token_id=1,
            eos_token_id=1, use_cache=False, attn_implementation=attention,
        )  # fmt: skip
        return getattr(transformers, kind)(config)

    return make


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["query", "value"])
    return peft.get_peft_model(bert()(), adapters)


def text(n: int) -> dict[str, Tensor]:
    """Sentences padded on the right with id 0: ids (n, 6), attention mask and token types."""
    padded = padding(6)(n)
    ids = (integers(10, 6)(n) + 1).masked_fill(padded, 0)
    return {"input_ids": ids, "attention_mask": (~padded).long(), "token_type_ids": (ids > 5).long()}


def unpadded(n: int) -> dict[str, Tensor]:
    ids = integers(10, 6)(n) + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def partly_padded(n: int) -> dict[str, Tensor]:
    """Five full sentences, then padded ones: a model that drops an all-ones mask runs other code for the two groups."""
    full, padded = unpadded(n), text(n)
    return {name: torch.cat([full[name][:5], padded[name][5:]]) for name in full}


def logits(output: Any) -> Tensor:
    return output.logits


def words(output: Any) -> Tensor:
    """Three scores of a language model at the first and second token of each sentence."""
    return output.logits[:, :2, 4:7].flatten(1)


NETWORKS = [
    case("network/resnet18", resnet18, normal(3, 32, 32)),
    case("network/vision_transformer", VisionTransformer, normal(3, 8, 8)),
    *(case(f"network/bert_{kind}", bert(attention=kind), text, select=logits) for kind in ("eager", "sdpa")),
    *(case(f"network/gpt2_{kind}", gpt2(attention=kind), text, select=logits) for kind in ("eager", "sdpa")),
    case("network/bert_partly_padded", bert(attention="sdpa"), partly_padded, select=logits),
    case("network/gpt2_partly_padded", gpt2(attention="sdpa"), partly_padded, select=logits),
    case("network/gpt2_unpadded", gpt2(attention="sdpa"), unpadded, select=logits),
    case("network/bert_language_model", bert("BertForMaskedLM"), text, select=words),
    case("network/gpt2_language_model", gpt2("GPT2LMHeadModel"), text, select=words),
    case("network/bert_lora", lora, text, select=logits),
]  # fmt: skip


# ---------------------------------------------------------------- which parameters


def partly_frozen() -> nn.Module:
    model = mlp()
    model[2].requires_grad_(False)
    return model


def norm_in_the_middle() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def under(*prefixes: str) -> Callable[[str, nn.Parameter], bool]:
    """The parameters whose name begins with one of these."""
    return lambda name, _: name.startswith(prefixes)


CHOICE = [
    case("parameters/frozen_in_the_middle", partly_frozen, VECTOR),
    case("parameters/head_only", mlp, VECTOR, parameters=under("4.")),
    case("parameters/first_layer_only", mlp, VECTOR, parameters=under("0.")),
    case("parameters/biases_only", mlp, VECTOR, parameters=lambda name, _: name.endswith("bias")),
    case("parameters/norm_only", norm_in_the_middle, VECTOR, parameters=under("1.")),
    case("parameters/frozen_but_chosen", partly_frozen, VECTOR, parameters=under("2.", "4.")),
    case("parameters/one_layer_of_a_recurrence", lambda: Net(recurrent, inner=nn.Linear(5, 5), outer=nn.Linear(5, 5),
         head=nn.Linear(5, 3), state=weight(5)), TOKENS, parameters=under("inner.", "state")),
    case("parameters/unused", lambda: Net(lambda m, x: m.f(x), f=mlp(), never=nn.Linear(4, 4), bare=weight(3)), VECTOR),
]  # fmt: skip


# ---------------------------------------------------------------- forward passes with a mind of their own


class Switched(nn.Module):
    """Control flow by flags, by mode and by shape."""

    def __init__(self, *, deep: bool, gated: bool) -> None:
        super().__init__()
        self.deep, self.gated = deep, gated
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.gate, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh() if self.deep else x
        for _ in range(x.shape[1] // 2):
            h = self.second(h).relu()
        if self.gated:
            h = h * self.gate(x).sigmoid()
        return self.head(h) if not self.training else self.head(x)


def partly_without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x).tanh()
    return m.b(h) + m.c(x)


def checkpointed(m: Any, x: Tensor) -> Tensor:
    return m.head(checkpoint(m.block, m.stem(x), use_reentrant=False))


def integers_and_floats(m: Any, ids: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    words_mean = (m.table(ids) * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
    return m.head(torch.cat([words_mean, m.f(x)], 1))


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: output * 1.5 + 0.1)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
    return model


FORWARD = [
    case("forward/buffers_and_constants", lambda: Net(
        lambda m, x: m.head((m.f(x + m.shift) * m.scale).tanh() + torch.arange(5, dtype=x.dtype)),
        f=nn.Linear(5, 5), head=nn.Linear(5, 3), shift=torch.randn(5), scale=torch.rand(5)), VECTOR),
    case("forward/flags", lambda: Switched(deep=True, gated=False), VECTOR),
    case("forward/other_flags", lambda: Switched(deep=False, gated=True), VECTOR),
    case("forward/partly_without_gradient", lambda: Net(partly_without_gradient, a=nn.Linear(5, 4), b=nn.Linear(4, 3),
         c=nn.Linear(5, 3)), VECTOR),
    on_vectors("forward/detached_branch", lambda m, x: m.a(x) * m.b(x).detach() + m.b(x.detach()),
               a=linear(), b=linear()),
    case("forward/checkpointed", lambda: Net(checkpointed, stem=nn.Linear(5, 5),
         block=nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), head=nn.Linear(5, 3)), VECTOR,
         slow_route=True),
    case("forward/hooks_that_change_outputs", hooked, VECTOR),
    case("forward/integers_and_floats", lambda: Net(integers_and_floats, table=nn.Embedding(6, 4), f=nn.Linear(5, 4),
         head=nn.Linear(8, 3)), together(integers(6, 4), VECTOR, lambda n: (~padding(4)(n)).double())),
    case("forward/dict_inputs", lambda: Net(lambda m, *, left, right: m.f(left) * m.g(right), f=mlp(), g=mlp()),
         named(left=VECTOR, right=normal(5, seed=2))),
    case("forward/compiled", lambda: torch.compile(mlp(), backend="eager"), VECTOR),
]  # fmt: skip


# ---------------------------------------------------------------- operations without a rule, and worse


class ScaleOldStyle(torch.autograd.Function):
    """x * g by a hand-written derivative, in the style that `torch.func` refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return x * g

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        x, g = ctx.saved_tensors
        return cotangents[0] * g, (cotangents[0] * x).sum_to_size(g.shape)


class ScaleNewStyle(torch.autograd.Function):
    """The same in the style that `torch.func` understands."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, g: Tensor) -> Tensor:
        return x * g

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        x, g = ctx.saved_tensors
        return cotangents[0] * g, (cotangents[0] * x).sum_to_size(g.shape)


class LazyGradient(torch.autograd.Function):
    """A derivative that is not the derivative of the forward pass (a straight-through step): only autograd knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0]


class ToScript(nn.Module):
    """A submodule for `torch.jit.script`, which needs its source."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.f(x))


def routed(m: Any, x: Tensor) -> Tensor:
    """A mixture of experts: every token of (N, T, 5) goes to one expert, chosen by its gate."""
    flat = x.reshape(-1, 5)
    score, choice = m.gate(flat).softmax(-1).max(-1)
    out = torch.zeros_like(flat)
    for index, expert in enumerate(m.experts):
        rows = (choice == index).nonzero().squeeze(-1)
        out = out.index_add(0, rows, expert(flat.index_select(0, rows)) * score[rows, None])
    return m.head(out.view_as(x).mean(1))


def masked(m: Any, x: Tensor) -> Tensor:
    """Examples with a positive first feature take one branch, by boolean mask, the rest keep a learned vector."""
    out = m.rest.expand(len(x), -1).clone()
    chosen = x[:, 0] > 0
    out[chosen] = m.f(x[chosen])
    return m.head(out.tanh())


def one_by_one(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.f(example).tanh() for example in x])


EXOTIC = [
    case("exotic/routed_tokens", lambda: Net(routed, gate=nn.Linear(5, 3), head=nn.Linear(5, 3),
         experts=nn.ModuleList(nn.Linear(5, 5) for _ in range(3))), TOKENS, slow_route=None),
    case("exotic/masked_examples", lambda: Net(masked, f=nn.Linear(5, 4), rest=weight(4), head=nn.Linear(4, 3)), VECTOR,
         slow_route=None),
    case("exotic/loop_over_examples", lambda: Net(one_by_one, f=mlp()), VECTOR, slow_route=True),
    on_vectors("exotic/vmap_inside", lambda m, x: torch.vmap(m.f)(x), f=linear(), slow_route=True),
    on_vectors("exotic/function_old_style", lambda m, x: ScaleOldStyle.apply(x, m.g), g=p(5), slow_route=True),
    on_vectors("exotic/function_new_style", lambda m, x: ScaleNewStyle.apply(x, m.g), g=p(5), slow_route=True),
    on_vectors("exotic/function_of_activations", lambda m, x: LazyGradient.apply(m.f(x)), f=linear()),
    on_vectors(
        "exotic/function_of_a_weight", lambda m, x: F.linear(x, LazyGradient.apply(m.w)), w=p(5, 5), slow_route=True
    ),
    on_vectors("exotic/scripted", lambda m, x: m.f(x), f=lambda: torch.jit.script(ToScript()), slow_route=True),
    case("exotic/scripted_whole", lambda: torch.jit.script(mlp()), VECTOR, slow_route=True),
    on_vectors("exotic/distance_to_centres", lambda m, x: torch.cdist(x, m.centres), centres=p(5, 5), slow_route=True),
]  # fmt: skip


FAMILIES = (
    LINEAR, CONVOLUTION, NORMALIZATION, EMBEDDING, BARE, SHARED, ATTENTION, SHAPES, REPARAMETRIZED, RECURRENT, NETWORKS,
    CHOICE, FORWARD, EXOTIC,
)  # fmt: skip
CASES = [one for family in FAMILIES for one in family]
