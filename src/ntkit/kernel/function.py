"""A kernel before it has met data: called with examples, it gives a matrix.

    k = Empirical(tangent)            # or InfiniteWidth(model), RBF(), sums and products of them
    k(x)                              # a symmetric `Kernel`, (N*K, N*K)
    k(x, other)                       # (N*K, M*K)

What needs kernels between samples that are not known yet (a classifier on new points, a test between two samples,
support points that move) takes one of these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from ntkit.kernel.empirical import TangentKernel

if TYPE_CHECKING:
    from torch import Tensor

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


class Empirical(KernelFunction):
    """The tangent kernel of a network at fixed parameters, as a function of the examples."""

    def __init__(self, tangent: Tangent, *, trace: bool = False, memory: int | None = None) -> None:
        """Of a network made by `linearize`; the other arguments are those of `TangentKernel`."""
        self.tangent = tangent
        self.trace = trace
        self.memory = memory

    def __call__(self, x1: Any, x2: Any = None) -> TangentKernel:  # noqa: D102
        return TangentKernel(self.tangent, x1, x2, trace=self.trace, memory=self.memory)
