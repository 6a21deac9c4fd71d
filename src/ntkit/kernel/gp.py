"""Kernel functions as kernels of GPyTorch (extra `gpytorch`), for Gaussian processes with everything they bring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gpytorch
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.function import Empirical, KernelFunction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ntkit.kernel.base import Kernel
    from ntkit.tangent.linearize import Tangent


class FunctionGPKernel(gpytorch.kernels.Kernel):
    """Any kernel function; put it into a `ScaleKernel` to learn how large it is.

    Inputs that require gradients get them, if the function is differentiable. While a process trains on the same
    inputs, the matrix is computed once.

    With K scalars per example it is a multitask kernel: K rows for each input, example-major, as GPyTorch's
    `MultitaskKernel` has them; use it with `MultitaskMultivariateNormal(mean, covariance)`.
    """

    has_lengthscale = False

    def __init__(self, function: KernelFunction, *, shape: Sequence[int] | None = None) -> None:
        """Wrap a kernel function.

        Args:
            function: for example `InfiniteWidth(model)`, `RBF()`, or what is made of kernel functions.
            shape: of one example, where that is not a vector: GPyTorch's inputs are (N, d), and each row is reshaped
                to it.

        Raises:
            InputError: if `function` is none.
        """
        super().__init__()
        if not isinstance(function, KernelFunction):
            raise InputError(
                f"function is a KernelFunction such as InfiniteWidth(model) or RBF(): got {type(function).__name__}"
            )
        self.function = function
        self.shape_of_input = None if shape is None else tuple(shape)
        # a process asks for the same entries at every step of its own training
        self._last: tuple[Tensor, Tensor, tuple, Tensor] | None = None
        self._seen: torch.dtype | None = None
        self._scalars: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the last inputs: GPyTorch would look for parameters of the kernel, which has none."""
        return self._seen or torch.get_default_dtype()

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *args: Any, **params: Any) -> Any:
        """As every kernel of GPyTorch."""
        self._seen = x1.dtype
        return super().__call__(x1, x2, *args, **params)

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """The kernel between (N, d) and (M, d): (N*K, M*K), or its diagonal, in the type of the inputs.

        Raises:
            InputError: if there are batches of inputs, or a derivative with respect to them is wanted that the
                function does not have.
        """
        if last_dim_is_batch or x1.ndim != 2 or x2.ndim != 2:
            raise InputError(
                f"this kernel takes inputs of shape (N, d) without batches: got {tuple(x1.shape)} and {tuple(x2.shape)}"
            )
        moving = torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)
        self._check(x1, x2, moving)
        # inputs that are equal and not one would each get half of a symmetric kernel's gradient
        same = x1 is x2 or (not moving and _equal(x1, x2))
        first = self._inputs(x1)
        second = None if same else self._inputs(x2)
        if moving:
            if not self._in_a_graph(first if x1.requires_grad else self._inputs(x2)):
                raise InputError(f"{self.function!r} has no derivative with respect to its inputs: detach them")
            return self._entries(first, second, diag).to(x1.dtype)
        state = self._state(first, second)
        if self._last is not None:
            before1, before2, before, found = self._last
            if before == (diag, state) and _equal(before1, x1) and _equal(before2, x2):
                return found
        found = self._entries(first, second, diag).to(x1.dtype)
        if state is not None:
            self._last = x1.detach().clone(), x2.detach().clone(), (diag, state), found
        return found

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """K."""
        if self._scalars is None:
            with torch.no_grad():
                self._scalars = self.function(self._inputs(x1[:1].detach())).scalars
        return self._scalars

    def _check(self, x1: Tensor, x2: Tensor, moving: bool) -> None:
        """Refuse inputs that the function cannot take."""

    def _state(self, first: Tensor, second: Tensor | None) -> Any:
        """What the entries depend on; None if that cannot be told, or if they belong to a graph, good for once."""
        if self._in_a_graph(first):
            return None
        try:
            return self.function(first, second).identity()
        except InputError:
            return None

    def _in_a_graph(self, x: Tensor) -> bool:
        """Whether entries depend on something that requires gradients, looked up with one example."""
        return torch.is_grad_enabled() and self.function(x[:1]).dense().requires_grad

    def _entries(self, first: Tensor, second: Tensor | None, diag: bool) -> Tensor:
        if diag and second is None:
            return self.function.diagonal(first)
        kernel: Kernel = self.function(first, second)
        return kernel.diagonal() if diag else kernel.dense()

    def _inputs(self, x: Tensor) -> Tensor:
        return x if self.shape_of_input is None else x.reshape(-1, *self.shape_of_input)


class NTKGPKernel(FunctionGPKernel):
    """The tangent kernel of a network at fixed parameters, without derivatives with respect to the inputs."""

    def __init__(self, tangent: Tangent, *, shape: Sequence[int] | None = None, trace: bool = False) -> None:
        """Wrap a network.

        Args:
            tangent: the network, made by `linearize`.
            shape: of one input of the network, where that is not a vector.
            trace: the mean over the scalars, one row per example.
        """
        super().__init__(Empirical(tangent, trace=trace), shape=shape)
        self.tangent = tangent
        self.trace = trace

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's parameters."""
        return self.tangent.dtype

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return self.tangent.device

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """K, or 1 with `trace`."""
        return 1 if self.trace else self.tangent.anatomy(self._inputs(x1)).scalars

    def _check(self, x1: Tensor, x2: Tensor, moving: bool) -> None:
        """Refuse derivatives, and inputs of another type than the network.

        Raises:
            InputError: with what to do.
        """
        if moving:
            raise InputError("the tangent kernel has no derivative with respect to its inputs: detach them")
        if x1.dtype != self.dtype or x2.dtype != self.dtype:
            raise InputError(
                f"the network is of {self.dtype}, the inputs of {x1.dtype} and {x2.dtype}: convert one of them"
            )

    def _state(self, first: Tensor, second: Tensor | None) -> tuple[tuple[int, int], ...]:
        """What changes when somebody goes on training the network."""
        model = self.tangent.model
        return tuple((t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers()))

    def _inputs(self, x: Tensor) -> Tensor:
        return super()._inputs(x.detach())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
