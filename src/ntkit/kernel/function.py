"""A kernel before it has met data: called with examples, it gives a matrix.

    k = Empirical(tangent)            # or InfiniteWidth(model), RBF(), sums and products of them
    k(x)                              # a symmetric `Kernel`, (N*K, N*K)
    k(x, other)                       # (N*K, M*K)

What needs kernels between samples that are not known yet (a classifier on new points, a test between two samples,
support points that move) takes one of these. New ones are made of old ones:

    k + other, 2.0 * k, k * other     # other features beside these, longer ones, all products of two
    sum([k, other]), k / 2.0, k**2    # the same in other words
    k.normalised(), k.centred(on=x)   # features of length one, features less their mean over x

and by conditioning on data (`ntkit.solve.conditioned`) and approximation (`ntkit.kernel.explicit`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.algebra import Normalised, Recentred
from ntkit.kernel.empirical import TangentKernel

if TYPE_CHECKING:
    from ntkit.kernel.base import Kernel
    from ntkit.tangent.linearize import Tangent


class KernelFunction(ABC):
    """A positive semi-definite function of two examples.

    Required: the call. The matrix of a differentiable one (infinite width, RBF, and what is made of them) carries
    gradients to its inputs where these ask for them.
    """

    @abstractmethod
    def __call__(self, x1: Any, x2: Any = None) -> Kernel:
        """The kernel between examples.

        Args:
            x1: N examples of the rows.
            x2: M examples of the columns; None for x1 again, a symmetric kernel.
        """

    def diagonal(self, x: Any) -> Tensor:
        """k(x, x) of each example, (N*K,)."""
        return self(x).diagonal()

    def __add__(self, other: KernelFunction) -> KernelFunction:
        """The kernel of the features of both, one beside the other."""
        return SumFunction(self, other) if isinstance(other, KernelFunction) else NotImplemented

    def __mul__(self, other: float | KernelFunction) -> KernelFunction:
        """The kernel times a number that is not negative; or times another, the kernel of all products of features."""
        if isinstance(other, KernelFunction):
            return ProductFunction(self, other)
        return ScaledFunction(self, other) if is_number(other) else NotImplemented

    def __rmul__(self, factor: float) -> KernelFunction:
        """A number times the kernel."""
        return self * factor

    def __radd__(self, other: float) -> KernelFunction:
        """0 plus the kernel is the kernel, so that `sum` adds several."""
        return self if is_number(other) and other == 0 else NotImplemented

    def __truediv__(self, divisor: float) -> KernelFunction:
        """The kernel divided by a positive number."""
        if not is_number(divisor):
            return NotImplemented
        if not 0 < float(divisor) < math.inf:
            raise InputError(f"a kernel divided by a number is one for positive numbers: got {divisor!r}")
        return self * (1 / float(divisor))

    def __pow__(self, power: int) -> KernelFunction:
        """The product of so many copies of the kernel, a whole number from 1 on; each of them is computed."""
        if not isinstance(power, Integral) or isinstance(power, bool):
            return NotImplemented
        if power < 1:
            raise InputError(f"a kernel to the power of a whole number needs 1 or more: got {power}")
        half = int(power) // 2
        return self**half * self ** (int(power) - half) if half else self

    def normalised(self) -> KernelFunction:
        """k(x, y) / sqrt(k(x, x) k(y, y)): the cosine of the angle between features, 1 for an example with itself.

        With K > 1 scalars per example each has its own length. A matrix of it costs the diagonals of k besides.
        """
        return NormalisedFunction(self)

    def centred(self, *, on: Any) -> KernelFunction:
        """The kernel of features less their mean over a reference sample, for any other examples too.

        k.centred(on=x)(x) is k(x).centred(). With K > 1 scalars per example the mean is over all N*K rows, as there.

        Args:
            on: the reference sample. Cost: its kernel with itself, now, and with the examples of each matrix.
        """
        return CentredFunction(self, on)


class Empirical(KernelFunction):
    """The tangent kernel of a network at fixed parameters, as a function of the examples."""

    def __init__(self, tangent: Tangent, *, trace: bool = False, memory: int | None = None) -> None:
        """Of a network made by `linearize`; the other arguments are those of `TangentKernel`."""
        self.tangent = tangent
        self.trace = trace
        self.memory = memory

    def __call__(self, x1: Any, x2: Any = None) -> TangentKernel:
        """The kernel between examples.

        Raises:
            InputError: if derivatives with respect to the examples are wanted: there are none.
        """
        for x in (x1, x2):
            require_fixed(
                x, "the tangent kernel of a network has no derivative with respect to its inputs: detach them"
            )
        return TangentKernel(self.tangent, x1, x2, trace=self.trace, memory=self.memory)


class SumFunction(KernelFunction):
    """k(x, y) + l(x, y)."""

    def __init__(self, left: KernelFunction, right: KernelFunction) -> None:
        """Of two kernel functions of the same examples, with as many scalars per example."""
        self.left, self.right = left, right

    def __call__(self, x1: Any, x2: Any = None) -> Kernel:  # noqa: D102
        return self.left(x1, x2) + self.right(x1, x2)

    def diagonal(self, x: Any) -> Tensor:  # noqa: D102
        left, right = self.left.diagonal(x), self.right.diagonal(x)
        check_rows("add", len(left), len(right))
        return left + right

    def __repr__(self) -> str:
        return f"{self.left!r} + {self.right!r}"


class ProductFunction(KernelFunction):
    """k(x, y) l(x, y); with K > 1 scalars per example row by row, K of them again."""

    def __init__(self, left: KernelFunction, right: KernelFunction) -> None:
        """Of two kernel functions of the same examples, with as many scalars per example."""
        self.left, self.right = left, right

    def __call__(self, x1: Any, x2: Any = None) -> Kernel:  # noqa: D102
        return self.left(x1, x2) * self.right(x1, x2)

    def diagonal(self, x: Any) -> Tensor:  # noqa: D102
        left, right = self.left.diagonal(x), self.right.diagonal(x)
        check_rows("multiply", len(left), len(right))
        return left * right

    def __repr__(self) -> str:
        return f"{_bracketed(self.left)} * {_bracketed(self.right)}"


class ScaledFunction(KernelFunction):
    """c k(x, y)."""

    def __init__(self, inner: KernelFunction, factor: float) -> None:
        """Scale a kernel function.

        Raises:
            InputError: if the factor is negative or not finite: what comes out would be no kernel.
        """
        self.inner, self.factor = inner, checked_factor(factor)

    def __call__(self, x1: Any, x2: Any = None) -> Kernel:  # noqa: D102
        return self.factor * self.inner(x1, x2)

    def diagonal(self, x: Any) -> Tensor:  # noqa: D102
        return self.factor * self.inner.diagonal(x)

    def __repr__(self) -> str:
        return f"{self.factor!r} * {_bracketed(self.inner)}"


class NormalisedFunction(KernelFunction):
    """k(x, y) / sqrt(k(x, x) k(y, y))."""

    def __init__(self, inner: KernelFunction) -> None:
        """Of a kernel function."""
        self.inner = inner

    def __call__(self, x1: Any, x2: Any = None) -> Normalised:
        """The normalised kernel between examples.

        Raises:
            InputError: if the features of an example are zero, so that they have no direction.
        """
        kernel = self.inner(x1, x2)
        rows = lengths(kernel.diagonal() if x2 is None else self.inner.diagonal(x1), kernel.scalars, "x1")
        cols = rows if x2 is None else lengths(self.inner.diagonal(x2), kernel.scalars, "x2")
        return Normalised(kernel, rows, cols)

    def __repr__(self) -> str:
        return f"{_bracketed(self.inner, SumFunction, ProductFunction, ScaledFunction)}.normalised()"


class CentredFunction(KernelFunction):
    """<phi(x) - m, phi(y) - m> with m the mean of phi over a reference sample."""

    def __init__(self, inner: KernelFunction, on: Any) -> None:
        """Of a kernel function and the reference sample, whose kernel with itself is read here, once."""
        self.inner, self.on = inner, on
        kernel = inner(on)
        self._level = _row_means(kernel).mean()
        self._whole = kernel

    def __call__(self, x1: Any, x2: Any = None) -> Recentred:  # noqa: D102
        rows = _row_means(self.inner(x1, self.on))
        cols = rows if x2 is None else _row_means(self.inner(x2, self.on))
        return Recentred(self.inner(x1, x2), rows, cols, self._level, self._whole)

    def __repr__(self) -> str:
        return f"{_bracketed(self.inner, SumFunction, ProductFunction, ScaledFunction)}.centred(on=...)"


def lengths(diagonal: Tensor, scalars: int, name: str) -> Tensor:
    """Square roots of k(x, x), for examples of so many rows.

    Raises:
        InputError: if one is not positive, naming the example.
    """
    bad = ~(diagonal.detach() > 0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise InputError(
            f"example {row // scalars} of {name} has k(x, x) = {float(diagonal[row]):.3g} and no direction in "
            "the space of features: a normalised kernel needs k(x, x) > 0. Leave such examples out, or add a kernel "
            "that does not vanish there"
        )
    return diagonal.sqrt()


def require_fixed(x: Any, message: str) -> None:
    """Refuse examples whose derivatives are wanted where there are none.

    Raises:
        InputError: with the message.
    """
    members = x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else (x,)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in members):
        raise InputError(message)


def check_rows(verb: str, left: int, right: int) -> None:
    """Refuse to put together two kernels of the same examples that have different numbers of scalars for each.

    Raises:
        InputError: with both numbers of rows.
    """
    if left != right:
        raise InputError(f"cannot {verb} kernels of {left} and {right} rows for the same examples")


def checked_factor(factor: float) -> float:
    """A number that a kernel may be multiplied by.

    Raises:
        InputError: if it is negative or not finite.
    """
    if not 0 <= float(factor) < math.inf:
        raise InputError(f"a kernel times a number is one for numbers that are not negative and finite: got {factor!r}")
    return float(factor)


def _row_means(kernel: Kernel) -> Tensor:
    """The mean of each row, strip by strip."""
    columns = kernel.shape[1]
    return kernel @ torch.full((columns,), 1 / columns, dtype=kernel.dtype, device=kernel.device)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number of Python or NumPy."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _bracketed(function: KernelFunction, *looser: type[KernelFunction]) -> str:
    """Its text, in brackets where what stands beside it binds closer."""
    return f"({function!r})" if isinstance(function, looser or SumFunction) else repr(function)
