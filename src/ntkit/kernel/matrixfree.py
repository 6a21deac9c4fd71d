"""The tangent kernel as a product alone: K v = J (J^T v), one vjp and one jvp per batch, whatever N and C are."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkit.errors import ModelError
from ntkit.kernel.empirical import TangentKernel

# Bytes of activations of one batch: on a CPU few enough to stay near the processor (measured). And its examples.
TOGETHER, ELSEWHERE, FEWEST, MOST = 48 * 2**20, 2**30, 16, 1024


class MatrixFreeKernel(TangentKernel):
    """A tangent kernel whose products never form an entry of it: for solves with the full kernel of many examples.

    Tiles and the diagonal are those of `TangentKernel`.
    """

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with (columns,) or (columns, R).

        Raises:
            ModelError: if an operation of the model can be differentiated only once.

        Cost: for each of the R columns a forward and a backward pass of the M examples of the columns, and a jvp of the
        N of the rows, about six forward passes of one example together; memory: one batch.
        """
        if self.trace or other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
            return super().__matmul__(other)  # the trace kernel is no J J^T of one J, and what is wrong is said there
        columns = other.reshape(len(other), -1).to(self.device, self.dtype)
        together = TOGETHER if self.device.type == "cpu" else ELSEWHERE
        batch = max(FEWEST, min(MOST, together // (self._sizes().activations + 1)))
        products = []
        for column in columns.T:
            direction = self.tangent.vjp(self._cols, column.view(-1, self.scalars), batch=batch)
            try:
                products.append(self.tangent.jvp(self._rows, direction, batch=batch).reshape(-1))
            except NotImplementedError as error:
                raise ModelError(
                    f"products without the matrix differentiate twice, and torch cannot do that here ({error}): use "
                    "TangentKernel, whose products go tile by tile"
                ) from error
        return torch.stack(products, 1).reshape(-1, *other.shape[1:]).to(torch.promote_types(self.dtype, other.dtype))
