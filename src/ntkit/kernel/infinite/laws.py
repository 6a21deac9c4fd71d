"""The law that weights are drawn from, and what training them adds to the tangent kernel.

A layer with `fan_in` inputs per unit has weights of variance s^2 / fan_in and biases of variance b^2, however they are
parametrised. The parametrisations differ in what is trained:

    NTK        s / sqrt(fan_in) w with w ~ N(0, 1):   a weight layer adds s^2 A + b^2 to the tangent kernel
    standard   w ~ N(0, s^2 / fan_in):                 it adds fan_in A + 1, which grows with the width

A module of PyTorch is of the standard one: its own widths count, and the mean of its empirical kernel is what the limit
comes close to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from scipy.special import stdtrit
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError

# Standard errors within which values count as drawn by PyTorch's default, uniform in +- 1 / sqrt(fan_in).
DEVIATIONS = 4.0
# Of values drawn around zero that are taken for others, on either side.
CHANCE = 5e-6
Deviations = float | Mapping[str, float] | None


@dataclass(frozen=True)
class NTK:
    """The NTK parametrisation of Jacot, Gabriel and Hongler (2018)."""

    def gains(self, weight_std: float, bias_std: float, fan_in: int) -> tuple[float, float]:
        """What trained weights (times A) and a trained bias add to the tangent kernel."""
        return weight_std**2, bias_std**2


@dataclass(frozen=True)
class Standard:
    """The parametrisation of PyTorch: parameters are the weights themselves."""

    def gains(self, weight_std: float, bias_std: float, fan_in: int) -> tuple[float, float]:
        """What trained weights (times A) and a trained bias add to the tangent kernel."""
        return float(fan_in), 1.0


Parametrization = NTK | Standard


@dataclass(frozen=True)
class Law:
    """Standard deviations and parametrisation of all layers.

    Attributes:
        weight_std: s, a number for all layers, or numbers by pattern of the parameter's name; None to read s from the
            values that a layer has.
        bias_std: b, likewise. None reads it from the values, too, unless weight_std is given: then it is 0.
        parametrization: what is trained.
    """

    weight_std: Deviations
    bias_std: Deviations
    parametrization: Parametrization

    def weight(self, name: str, values: Tensor, fan_in: int) -> float:
        """s of one layer."""
        given = _given(self.weight_std, name)
        if given is not None:
            return given
        return math.sqrt(fan_in * variance(values, fan_in, name))

    def bias(self, name: str, values: Tensor | None, fan_in: int | None) -> float:
        """b of one layer; 0 where it has none. `fan_in`: of the layer, None for a bias that stands alone."""
        if values is None:
            return 0.0
        given = _given(self.bias_std, name)
        if given is not None:
            return given
        if self.weight_std is not None and self.bias_std is None:
            return 0.0
        return math.sqrt(variance(values, fan_in, name))


def variance(values: Tensor, fan_in: int | None, name: str = "") -> float:
    """The second moment that some values were drawn with.

    Values that PyTorch's default initialisation could well have drawn have its variance, 1 / (3 fan_in), exactly: the
    largest within its bound and not far below, and a mean square within some standard errors of it. Others have their
    own mean square, and so have those that are in no layer (fan_in None).

    Raises:
        ModelError: if their mean is not zero, within its error.
    """
    found = values.detach().double()
    square, size = float(found.square().mean()), found.numel()
    # by Student's distribution, for a layer may have a few values only
    if size > 1 and abs(float(found.mean())) > -stdtrit(size - 1, CHANCE) * float(found.std()) / math.sqrt(size):
        raise ModelError(
            f"the values of {name!r} have a mean of {float(found.mean()):.3g}, and so are not drawn around zero: a "
            "limit is known for such draws only; give weight_std and bias_std to take the module as drawn anew"
        )
    if fan_in is None:
        return square
    bound, default = 1 / math.sqrt(fan_in), 1 / (3 * fan_in)
    share = float(found.abs().max()) / bound  # below s with the probability s^size
    error = math.sqrt(0.8 / size)  # relative, of a mean of squares of uniform numbers
    likely = CHANCE ** (1 / size) <= share <= 1 + 1e-6 and abs(square / default - 1) <= DEVIATIONS * error
    return default if likely else square


def checked(value: Deviations, name: str) -> Deviations:
    """Standard deviations that can be used.

    Raises:
        InputError: if they cannot.
    """
    numbers = list(value.values()) if isinstance(value, Mapping) else [] if value is None else [value]
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 <= v < math.inf for v in numbers):
        raise InputError(
            f"{name} is a standard deviation >= 0 for all layers, or a dict from patterns of parameter names to such "
            f"numbers: got {value!r}"
        )
    return value


def require_used(value: Deviations, name: str, model: nn.Module) -> None:
    """Refuse patterns that no parameter has.

    Raises:
        InputError: naming the first.
    """
    names = [found for found, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in value if isinstance(value, Mapping) else ():
        if pattern != "*" and not any(fnmatchcase(found, pattern) for found in names):
            raise InputError(f"{name} has {pattern!r}, and no parameter is named so: got {', '.join(names) or 'none'}")


def _given(value: Deviations, name: str) -> float | None:
    if isinstance(value, Mapping):
        return next((float(std) for pattern, std in value.items() if fnmatchcase(name, pattern)), None)
    return None if value is None else float(value)


def parameters_named(model: nn.Module) -> dict[int, str]:
    """Names by identity; of tied parameters the first."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), name)
    return names
