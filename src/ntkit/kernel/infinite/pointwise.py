"""Elementwise functions as they are met in a traced module, and what is known of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkit.kernel.infinite.duals import GELU, Cosine, Dual, Erf, Exponential, Linear, PiecewiseLinear, Rescaled, Sine
from ntkit.kernel.infinite.hermite import HermiteSeries


@dataclass(frozen=True)
class Pointwise:
    """A function of each entry by itself.

    Attributes:
        function: on tensors.
        name: in words.
        dual: its moments in closed form; None where there is none.
        learned: the moments of its derivative by a trained parameter of its own; None for none.
    """

    function: Callable[[Tensor], Tensor]
    name: str
    dual: Dual | None = None
    learned: Dual | None = None

    @property
    def slope(self) -> float | None:
        """Of a linear function; None for others."""
        return self.dual.slope if isinstance(self.dual, Linear) else None

    @property
    def moments(self) -> Dual:
        """Closed, or by its Hermite series."""
        return self.dual if self.dual is not None else HermiteSeries(self.function, self.name)

    def after(self, inner: Pointwise) -> Pointwise:
        """This function of another one."""
        if inner.slope == 1:
            return self
        name = f"{self.name} of {inner.name}"
        dual = None
        if self.slope is not None and inner.dual is not None:
            dual = scaled(inner.dual, self.slope)
        elif inner.slope is not None and self.dual is not None:
            dual = Rescaled(self.dual, inner.slope, 1.0)
        learned = None
        if inner.learned is not None and self.slope is not None:
            learned = scaled(inner.learned, self.slope)
        elif self.learned is not None and inner.slope is not None:
            learned = Rescaled(self.learned, inner.slope, 1.0)
        elif inner.learned is not None or self.learned is not None:
            raise ValueError(f"{name}: a trained slope inside another function is not known here")
        return Pointwise(lambda z: self.function(inner.function(z)), name, dual, learned)

    def by_scale(self, scale: float) -> Dual:
        """The moments of the derivative by g in f(g x), of z = g x: those of z f'(z) / g."""
        if isinstance(self.dual, (Linear, PiecewiseLinear)):
            return scaled(self.dual, 1 / scale)  # f is homogeneous: z f'(z) = f(z)

        def derivative(z: Tensor) -> Tensor:
            return z * torch.func.jvp(self.function, (z,), (torch.ones_like(z),))[1] / scale

        return HermiteSeries(derivative, f"the derivative of {self.name} by a scale")


def scaled(dual: Dual, factor: float) -> Dual:
    """A number times a function."""
    if isinstance(dual, Linear):
        return Linear(dual.slope * factor)
    if isinstance(dual, Rescaled):
        return Rescaled(dual.function, dual.inner, dual.outer * factor)
    return Rescaled(dual, 1.0, factor)


IDENTITY = Pointwise(lambda z: z, "the identity", Linear())


def times(factor: float) -> Pointwise:
    """A number times the value."""
    return Pointwise(lambda z: factor * z, f"{factor:g} times", Linear(factor))


def leaky(slope: float, *, learned: bool = False) -> Pointwise:
    """Leaky ReLU; with `learned`, its slope is trained."""
    return Pointwise(
        lambda z: F.leaky_relu(z, slope),
        f"leaky ReLU ({slope:g})",
        PiecewiseLinear(slope, 1.0),
        PiecewiseLinear(1.0, 0.0) if learned else None,
    )


RELU = Pointwise(F.relu, "ReLU", PiecewiseLinear())
_GELU = Pointwise(F.gelu, "GELU", GELU())
_CLOSED = {
    "relu": RELU,
    "erf": Pointwise(torch.erf, "erf", Erf()),
    "sin": Pointwise(torch.sin, "sine", Sine()),
    "cos": Pointwise(torch.cos, "cosine", Cosine()),
    "exp": Pointwise(torch.exp, "exponential", Exponential()),
    "abs": Pointwise(torch.abs, "absolute value", PiecewiseLinear(-1.0, 1.0, at_zero=0.0)),
    "neg": times(-1.0),
    "positive": IDENTITY,
    "contiguous": IDENTITY,
    "clone": IDENTITY,
}
# Functions of torch and torch.nn.functional and methods of tensors, by name, that act on each entry by itself.
_NUMERIC = {
    "asinh", "atan", "arctan", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cosh", "elu", "erfc", "exp2",
    "expit", "expm1", "hardsigmoid", "hardswish", "hardtanh", "log1p", "logsigmoid", "mish", "pow",
    "relu6", "selu", "sigmoid", "silu", "sinc", "sinh", "softplus", "softshrink", "softsign", "square", "tanh",
    "tanhshrink", "gelu", "float_power", "logit",
}  # fmt: skip
_MODULES = (
    nn.CELU, nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LogSigmoid, nn.Mish, nn.ReLU6,
    nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip
ADDITIONS = ("add", "iadd", "sub", "isub")
PRODUCTS = ("mul", "imul", "multiply", "truediv", "itruediv", "div", "divide")


def of_module(module: nn.Module, *, trained: bool) -> Pointwise | None:
    """What an activation module computes; None if it is none."""
    if type(module) is nn.ReLU:
        return RELU
    if type(module) is nn.LeakyReLU:
        return leaky(module.negative_slope)
    if type(module) is nn.PReLU:
        return leaky(float(module.weight.detach().double().mean()), learned=trained)
    if type(module) is nn.RReLU and not module.training:
        return leaky((module.lower + module.upper) / 2)
    if type(module) is nn.GELU:
        return _GELU if module.approximate == "none" else Pointwise(_fresh(module), "GELU by tanh")
    if type(module) is nn.Identity or (isinstance(module, DROPOUTS) and not module.training):
        return IDENTITY
    if type(module) in _MODULES:
        return Pointwise(_fresh(module), type(module).__name__)
    return None


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _fresh(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """On a copy: activations may be told to write into their inputs."""
    return lambda z: function(z.clone())


def of_call(
    name: str, function: Callable[..., Tensor], rest: tuple[Any, ...], keywords: dict[str, Any]
) -> Pointwise | None:
    """What a call with a tensor and numbers computes; None if it is not known to be elementwise.

    Args:
        name: of the function or method, without a final underscore.
        function: takes the tensor first.
        rest: the other arguments by place, numbers.
        keywords: those by name.
    """
    keywords = {key: value for key, value in keywords.items() if key not in ("inplace", "out")}
    if name == "leaky_relu":
        return leaky(float(rest[0] if rest else keywords.get("negative_slope", 0.01)))
    if name == "gelu" and keywords.get("approximate", "none") == "none":
        return _GELU
    if name in _CLOSED:
        return _CLOSED[name]
    if name in _NUMERIC:
        shown = ", ".join([*map(str, rest), *(f"{k}={v}" for k, v in keywords.items())])
        return Pointwise(lambda z: function(z.clone(), *rest, **keywords), f"{name}({shown})" if shown else name)
    return None


def with_number(name: str, number: float, *, first: bool) -> Pointwise | None:
    """A sum or product with a number; `first` where the number stands before the tensor."""
    if name in PRODUCTS:
        if "div" in name:
            return Pointwise(lambda z: number / z, f"{number:g} over") if first else times(1 / number)
        return times(number)
    if name in ADDITIONS:
        sign = -1.0 if name in ("sub", "isub") else 1.0
        if number == 0:
            return times(sign) if first else IDENTITY
        if first:
            return Pointwise(lambda z: number + sign * z, f"{number:g} plus")
        return Pointwise(lambda z: z + sign * number, f"plus {sign * number:g}")
    if name in ("pow", "ipow") and not first:
        return IDENTITY if number == 1 else Pointwise(lambda z: z**number, f"power {number:g}")
    return None


def together(name: str, left: Pointwise, right: Pointwise) -> Pointwise | None:
    """A sum or product of two functions of the same value."""
    combine = {
        **dict.fromkeys(("add", "iadd"), operator.add),
        **dict.fromkeys(("sub", "isub"), operator.sub),
        **dict.fromkeys(("mul", "imul", "multiply"), operator.mul),
    }.get(name)
    if combine is None:
        return None
    if left.slope is not None and right.slope is not None and combine is not operator.mul:
        return times(combine(left.slope, right.slope))
    if left.learned is not None and right.learned is not None:
        return None
    learned = left.learned if left.learned is not None else right.learned
    if learned is not None and combine is operator.mul:
        return None
    return Pointwise(
        lambda z: combine(left.function(z), right.function(z)), f"{left.name} {name} {right.name}", None, learned
    )
