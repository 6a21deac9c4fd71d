"""The tangent kernel as a kernel of GPyTorch (extra `gpytorch`), for Gaussian processes with everything they bring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gpytorch
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.empirical import TangentKernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ntkit.tangent.linearize import Tangent


class NTKGPKernel(gpytorch.kernels.Kernel):
    """The tangent kernel of a network at fixed parameters; put it into a `ScaleKernel` to learn how large it is.

    With K scalars per example it is a multitask kernel: K rows for each input, example-major, as GPyTorch's
    `MultitaskKernel` has them; use it with `MultitaskMultivariateNormal(mean, covariance)`.
    """

    has_lengthscale = False

    def __init__(self, tangent: Tangent, *, shape: Sequence[int] | None = None, trace: bool = False) -> None:
        """Wrap a network.

        Args:
            tangent: the network, made by `linearize`.
            shape: of one input of the network, where that is not a vector: GPyTorch's inputs are (N, d), and each row
                is reshaped to it.
            trace: the mean over the scalars, one row per example.
        """
        super().__init__()
        self.tangent = tangent
        self.trace = trace
        self.shape_of_input = None if shape is None else tuple(shape)
        # a process asks for the same entries at every step of its own training
        self._last: tuple[Tensor, Tensor, tuple, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's parameters: GPyTorch would look for parameters of the kernel, which has none."""
        return self.tangent.dtype

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return self.tangent.device

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """The kernel between (N, d) and (M, d): (N*K, M*K), or its diagonal.

        Raises:
            InputError: if there are batches of inputs, they are of another type than the network, or a derivative with
                respect to them is wanted.
        """
        if last_dim_is_batch or x1.ndim != 2 or x2.ndim != 2:
            raise InputError(
                f"the tangent kernel takes inputs of shape (N, d) without batches: got {tuple(x1.shape)} and "
                f"{tuple(x2.shape)}"
            )
        if torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad):
            raise InputError("the tangent kernel has no derivative with respect to its inputs: detach them")
        if x1.dtype != self.dtype or x2.dtype != self.dtype:
            raise InputError(
                f"the network is of {self.dtype}, the inputs of {x1.dtype} and {x2.dtype}: convert one of them"
            )
        if self._last is not None:
            before1, before2, before, found = self._last
            if before == (diag, self._versions()) and _equal(before1, x1) and _equal(before2, x2):
                return found
        first, second = self._inputs(x1), self._inputs(x2)
        kernel = TangentKernel(self.tangent, first, None if _equal(x1, x2) else second, trace=self.trace)
        found = kernel.diagonal() if diag else kernel.dense()
        self._last = x1.detach().clone(), x2.detach().clone(), (diag, self._versions()), found
        return found

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """K, or 1 with `trace`."""
        return 1 if self.trace else self.tangent.anatomy(self._inputs(x1)).scalars

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """What changes when somebody goes on training the network."""
        model = self.tangent.model
        return tuple((t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers()))

    def _inputs(self, x: Tensor) -> Tensor:
        return x.detach() if self.shape_of_input is None else x.detach().reshape(-1, *self.shape_of_input)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
