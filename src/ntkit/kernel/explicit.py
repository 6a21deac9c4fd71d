"""Kernels whose features are at hand: D numbers per row, from which every use of a kernel follows in N*D^2.

    Features(map)                 # of any map, for example a network's last hidden layer
    RandomFourier(RBF(1.0), size=2000, generator=g)
    Sketched(FeatureMap(tangent, sketch))
    Nystrom(k, landmarks)         # of any kernel, by its values at a few examples

All are kernel functions. Sums, multiples, and what is normalised or centred have features again; a product, and what is
made together with a kernel that has none, is a kernel function like any other.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import Kernel, bounds
from ntkit.kernel.closed import RBF, vectors, wide
from ntkit.kernel.features import FeatureKernel, FeatureMap
from ntkit.kernel.function import KernelFunction, check_rows, checked_factor, is_number, lengths, require_fixed
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import content, describe, digest
from ntkit.tangent.sketch import Sketch

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from ntkit.tangent.linearize import Tangent


class FeatureFunction(KernelFunction):
    """A kernel function with features: k(x, y) = <features(x), features(y)>.

    Required: `features` and `identity`. What works in linear time (two-sample tests, ridge regression by
    `ntkit.solve.primal`) asks for the features, everything else for the kernel.
    """

    @abstractmethod
    def features(self, x: Any) -> Tensor:
        """Features of N examples, (N*K, D), example-major."""

    @abstractmethod
    def identity(self, x: Any) -> dict[str, str]:
        """What the features of some examples depend on, as in `Kernel.identity`."""

    def __call__(self, x1: Any, x2: Any = None) -> Kernel:
        """The kernel between examples; their features are computed here, and held."""
        return ExplicitKernel(self, x1, x2)

    def diagonal(self, x: Any) -> Tensor:
        """Squared lengths of the features."""
        return self.features(x).square().sum(1)

    def __add__(self, other: KernelFunction) -> KernelFunction:
        """The features of both, one beside the other."""
        return SumOfFeatures(self, other) if isinstance(other, FeatureFunction) else super().__add__(other)

    def __mul__(self, other: float | KernelFunction) -> KernelFunction:
        """Features times the root of a number; or the product of two kernels, which is read as a matrix."""
        return ScaledFeatures(self, other) if is_number(other) else super().__mul__(other)

    def normalised(self) -> FeatureFunction:
        """Features of length one."""
        return NormalisedFeatures(self)

    def centred(self, *, on: Any) -> FeatureFunction:
        """Features less their mean over a reference sample, whose features are computed now."""
        return CentredFeatures(self, on)


class ExplicitKernel(Kernel):
    """Phi(x1) Phi(x2)^T. Memory: (N + M) K D numbers; cost of a tile: 2 D per entry."""

    def __init__(self, function: FeatureFunction, x1: Any, x2: Any = None) -> None:
        """Compute the features of both sides; x2=None for x1 again."""
        self.function, self.x1, self.x2 = function, x1, x2
        self.left = function.features(x1)
        self.right = self.left if x2 is None else function.features(x2)
        self.scalars = len(self.left) // len(Examples(x1))
        if self.left.shape[1] != self.right.shape[1]:
            raise InputError(
                f"rows and columns have as many features: got {self.left.shape[1]} and {self.right.shape[1]}"
            )

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return len(self.left), len(self.right)

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.left.dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.left.device

    @property
    def symmetric(self) -> bool:  # noqa: D102
        return self.x2 is None

    def tile(self, rows: slice, cols: slice) -> Tensor:  # noqa: D102
        (a, b), (c, d) = bounds(rows, self.shape[0]), bounds(cols, self.shape[1])
        return self.left[a:b] @ self.right[c:d].T

    def diagonal(self) -> Tensor:  # noqa: D102
        size = min(self.shape)
        return (self.left[:size] * self.right[:size]).sum(1)

    def __matmul__(self, other: Tensor | np.ndarray) -> Tensor:
        """Phi (Phi^T other). Cost: 2 (N + M) K D R, and no matrix."""
        other = self._operand(other)
        return self.left.to(other.dtype) @ (self.right.to(other.dtype).T @ other)

    def identity(self) -> dict[str, str]:
        """What the features of both sides depend on."""
        if self.x2 is None:
            return {"kernel": "explicit", **self.function.identity(self.x1)}
        left, right = self.function.identity(self.x1), self.function.identity(self.x2)
        return {f"left {k}": v for k, v in left.items()} | {f"right {k}": v for k, v in right.items()}


class Features(FeatureFunction):
    """The inner product of what a map makes of examples."""

    def __init__(self, map: Callable[[Any], Tensor]) -> None:
        """Of a map from N examples to a floating point tensor (N, ...), which is flattened: a function or a module."""
        if not callable(map):
            raise InputError(f"a map takes N examples and returns a tensor (N, ...): got {type(map).__name__}")
        self.map = map

    def features(self, x: Any) -> Tensor:
        """What the map makes of the examples, (N, D).

        Raises:
            InputError: if it returns something else than one finite vector per example.
        """
        found, size = self.map(x), len(Examples(x))
        if not isinstance(found, Tensor) or found.ndim == 0 or len(found) != size:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the map returns a tensor ({size}, ...) for {size} examples: got {got}")
        return vectors(found, "what the map returns")

    def identity(self, x: Any) -> dict[str, str]:
        """The map in words, with its parameters if it is a module, and the examples."""
        return {"features": describe(self.map), "rows": content(Examples(x))}

    def __repr__(self) -> str:
        return f"Features({getattr(self.map, '__name__', type(self.map).__name__)})"


class RandomFourier(FeatureFunction):
    """Random Fourier features of an RBF kernel (Rahimi & Recht 2007): cosines and sines of random projections.

    Unbiased for every entry k, with the standard deviation (1 - k^2) / sqrt(size), whatever the dimension.
    """

    def __init__(self, kernel: RBF, size: int, *, generator: torch.Generator) -> None:
        """Draw the features.

        Args:
            kernel: what is approximated.
            size: D, an even number.
            generator: one seed is taken from it; examples of any size then have their projections.

        Raises:
            InputError: if an argument cannot be used.
        """
        if not isinstance(kernel, RBF):
            raise InputError(f"random Fourier features are of an RBF kernel: got {kernel!r}")
        if not isinstance(size, int) or size < 2 or size % 2:
            raise InputError(f"size is an even number of features, 2 or more: got {size!r}")
        self.kernel, self.size = kernel, size
        self.seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device).item())

    def features(self, x: Any) -> Tensor:
        """Features (N, D). Cost: N d D / 2 products in float64, and as many random numbers as projections have.

        Raises:
            InputError: if the examples are not tensors of numbers.
        """
        points = vectors(x, "x")
        half, generator = self.size // 2, torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(half, points.shape[1], generator=generator, dtype=torch.float64)
        directions = (drawn / self.kernel.lengthscale).to(points.device, wide(points))
        phases = points.to(directions.dtype) @ directions.T
        return (torch.cat([phases.cos(), phases.sin()], 1) / math.sqrt(half)).to(points.dtype)

    def identity(self, x: Any) -> dict[str, str]:  # noqa: D102
        return {"features": f"Fourier of {self.kernel!r}, D={self.size} seed={self.seed}", "rows": digest([x])}

    def __repr__(self) -> str:
        return f"RandomFourier({self.kernel!r}, {self.size})"


class Sketched(FeatureFunction):
    """Sketched features of a network's tangent kernel, unbiased, with an error that falls as 1/sqrt(D)."""

    def __init__(self, map: FeatureMap) -> None:
        """Of a map to features; `Sketched.drawn` makes one."""
        if not isinstance(map, FeatureMap):
            raise InputError(
                f"Sketched takes a FeatureMap: got {type(map).__name__}; Sketched.drawn(tangent, size, generator=...) "
                "makes one of a network"
            )
        self.map = map

    @classmethod
    def drawn(cls, tangent: Tangent, size: int, *, trace: bool = False, generator: torch.Generator) -> Sketched:
        """With a random map.

        Args:
            tangent: the network, made by `linearize`.
            size: D.
            trace: features of the trace kernel, one row per example.
            generator: one seed is taken from it.
        """
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device).item())
        return cls(FeatureMap(tangent, Sketch(size, seed, trace)))

    def features(self, x: Any) -> Tensor:
        """Features (N*K, D), without derivatives with respect to the examples.

        Raises:
            InputError: if such a derivative is wanted.
        """
        require_fixed(x, "sketched features have no derivative with respect to the examples: detach them")
        return self.map(x)

    def __call__(self, x1: Any, x2: Any = None) -> Kernel:
        """The kernel of the features; between examples and themselves one that can measure its `error`."""
        return FeatureKernel(self.features(x1), self.map, x1) if x2 is None else ExplicitKernel(self, x1, x2)

    def identity(self, x: Any) -> dict[str, str]:  # noqa: D102
        return self.map.identity(x)

    def __repr__(self) -> str:
        return f"Sketched({self.map.sketch.size})"


class Nystrom(FeatureFunction):
    """A kernel as far as its values at some landmarks Z tell it: k(x, Z) k(Z, Z)^+ k(Z, y).

    Never larger than k itself, in the sense of positive semi-definite matrices, and equal to it at the landmarks.
    Eigenvalues of k(Z, Z) that cannot be told from zero are left out, D is the number of those that stay.
    """

    def __init__(self, function: KernelFunction, landmarks: Any) -> None:
        """Look at the kernel between the landmarks; m^2 values of it, and 9 (m K)^3 operations.

        Args:
            function: the kernel.
            landmarks: m examples. Features of others follow them in their derivatives, not the landmarks in theirs.

        Raises:
            InputError: if derivatives with respect to the landmarks are wanted, or the kernel is not positive
                semi-definite, zero or not finite there.
        """
        require_fixed(landmarks, "landmarks are held fixed, without derivatives: detach them")
        self.function, self.landmarks = function, landmarks
        with torch.no_grad():
            self._kernel = function(landmarks)
            dense = self._kernel.dense()
        dense = dense.to(wide(dense))
        if not bool(dense.isfinite().all()):
            raise InputError("the kernel has entries between landmarks that are not finite (NaN or infinity)")
        values, basis = torch.linalg.eigh((dense + dense.T) / 2)
        largest = float(values[-1])
        eps = torch.finfo(self._kernel.dtype).eps
        if float(values[0]) < -math.sqrt(eps) * abs(largest):
            raise InputError(
                f"the kernel is not positive semi-definite between the landmarks: its eigenvalues there are from "
                f"{float(values[0]):.3e} to {largest:.3e}"
            )
        kept = values > len(values) * eps * largest
        if not bool(kept.any()):
            raise InputError("the kernel is zero between the landmarks: choose others")
        self._projection = basis[:, kept] / values[kept].sqrt()

    @classmethod
    def drawn(cls, function: KernelFunction, x: Any, size: int, *, generator: torch.Generator) -> Nystrom:
        """With landmarks drawn from examples, all with the same probability.

        `ntkit.solve.nystrom.nystrom(k(x), ...).examples` names better ones, at the price of passes over the columns.

        Args:
            function: the kernel.
            x: N examples.
            size: m, from 1 to N.
            generator: draws them.

        Raises:
            InputError: if there are not so many examples.
        """
        examples = Examples(x)
        if not isinstance(size, int) or not 1 <= size <= len(examples):
            raise InputError(f"expected a number of landmarks from 1 to {len(examples)}: got {size!r}")
        numbers = torch.randperm(len(examples), generator=generator, device=generator.device)[:size]
        return cls(function, examples.pick(sorted(numbers.tolist())))

    @property
    def size(self) -> int:
        """D."""
        return self._projection.shape[1]

    def features(self, x: Any) -> Tensor:
        """Features (N*K, D). Cost: N m values of the kernel, 2 N K (m K) D operations."""
        cross = self.function(x, self.landmarks)
        return (cross @ self._projection).to(cross.dtype)

    def left_out(self, x: Any) -> float:
        """The share of sum k(x, x) over examples that the features do not hold: 0 is exact, 1 is nothing."""
        with torch.no_grad():
            whole, held = self.function.diagonal(x).double().sum(), self.diagonal(x).double().sum()
        return float(1 - held / whole)

    def identity(self, x: Any) -> dict[str, str]:
        """What the kernel between examples and landmarks, and among landmarks, depends on."""
        landmarks = digest([repr(sorted(self._kernel.identity().items()))])
        return {**self.function(x, self.landmarks).identity(), "landmarks": landmarks}

    def __repr__(self) -> str:
        return f"Nystrom({self.function!r}, {self._kernel.shape[0] // self._kernel.scalars} landmarks)"


# --- what is made of features and has features ------------------------------------------------------------------------


class SumOfFeatures(FeatureFunction):
    """Features of two functions side by side."""

    def __init__(self, left: FeatureFunction, right: FeatureFunction) -> None:
        """Of two functions of the same examples, with as many scalars per example."""
        self.left, self.right = left, right

    def features(self, x: Any) -> Tensor:
        """Features (N*K, D + D').

        Raises:
            InputError: if the two have another number of rows.
        """
        left, right = self.left.features(x), self.right.features(x)
        check_rows("add", len(left), len(right))
        return torch.cat([left, right], 1)

    def identity(self, x: Any) -> dict[str, str]:  # noqa: D102
        left, right = self.left.identity(x), self.right.identity(x)
        return {f"one {k}": v for k, v in left.items()} | {f"other {k}": v for k, v in right.items()}

    def __repr__(self) -> str:
        return f"({self.left!r} + {self.right!r})"


class _Changed(FeatureFunction):
    """Features that follow from another function's."""

    def __init__(self, inner: FeatureFunction) -> None:
        self.inner = inner

    def identity(self, x: Any) -> dict[str, str]:
        inner = self.inner.identity(x)
        return {**inner, "then": f"{inner.get('then', '')} {self._described()}"}

    @abstractmethod
    def _described(self) -> str:
        """What is done, in a word."""


class ScaledFeatures(_Changed):
    """sqrt(c) phi(x)."""

    def __init__(self, inner: FeatureFunction, factor: float) -> None:
        """Of the kernel times a number that is not negative."""
        super().__init__(inner)
        self.factor = checked_factor(factor)

    def features(self, x: Any) -> Tensor:  # noqa: D102
        return math.sqrt(self.factor) * self.inner.features(x)

    def _described(self) -> str:
        return f"times {self.factor!r}"

    def __repr__(self) -> str:
        return f"{self.factor!r} * {self.inner!r}"


class NormalisedFeatures(_Changed):
    """phi(x) / |phi(x)|."""

    def features(self, x: Any) -> Tensor:
        """Features of length one.

        Raises:
            InputError: if those of an example are zero.
        """
        found = self.inner.features(x)
        return found / lengths(found.square().sum(1), len(found) // len(Examples(x)), "x")[:, None]

    def _described(self) -> str:
        return "normalised"

    def __repr__(self) -> str:
        return f"{self.inner!r}.normalised()"


class CentredFeatures(_Changed):
    """phi(x) less the mean of phi over a reference sample."""

    def __init__(self, inner: FeatureFunction, on: Any) -> None:
        """Of a function and the reference sample."""
        super().__init__(inner)
        self.on = on
        self.mean = inner.features(on).mean(0)

    def features(self, x: Any) -> Tensor:  # noqa: D102
        return self.inner.features(x) - self.mean

    def _described(self) -> str:
        return f"centred on {digest([repr(sorted(self.inner.identity(self.on).items()))])[:16]}"

    def __repr__(self) -> str:
        return f"{self.inner!r}.centred(on=...)"
