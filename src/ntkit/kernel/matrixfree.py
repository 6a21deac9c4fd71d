"""The tangent kernel as a product alone: K v = J (J^T v), one vjp and one jvp per batch, whatever N and C are."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.errors import InputError, ModelError
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.plan import span
from ntkit.tangent.sides import Sides

if TYPE_CHECKING:
    import numpy as np

    from ntkit.tangent.linearize import Tangent

# Bytes of activations of one batch: on a CPU few enough to stay near the processor (measured). And its examples.
TOGETHER, ELSEWHERE, FEWEST, MOST = 48 * 2**20, 2**30, 16, 1024


class MatrixFreeKernel(TangentKernel):
    """A tangent kernel whose products never form an entry of it: for solves with the full kernel of many examples.

    Tiles and the diagonal are those of `TangentKernel`.
    """

    def __init__(
        self, tangent: Tangent, x1: Any, x2: Any = None, *, exact: MatrixFreeKernel | None = None, **options: Any
    ) -> None:
        """As `TangentKernel`, and perhaps with a better kernel to lean on.

        Args:
            tangent: the network, made by `linearize`.
            x1: examples of the rows.
            x2: examples of the columns; None for x1, a symmetric kernel.
            exact: the same kernel in float64, where this one is in float32: the units of ReLU that are almost zero are
                put on the side where it has them, which is most of what float32 gets wrong in products (see
                `ntkit.tangent.sides`). Tiles and the diagonal are not changed by it.
            **options: those of `TangentKernel`.

        Raises:
            InputError: if the examples are wrong, the budget is not positive, or the exact kernel is another's.
            ModelError: if the model has no tangent kernel on them.
        """
        super().__init__(tangent, x1, x2, **options)
        self._exact = exact
        if exact is not None:
            if exact.shape != self.shape or exact.symmetric != self.symmetric or exact.dtype != torch.float64:
                raise InputError(
                    "the exact kernel is the same kernel in float64: got one of shape "
                    f"{exact.shape} in {exact.dtype}, expected {self.shape}"
                )
            self._row_sides = Sides(exact.tangent, exact._rows)
            self._col_sides = self._row_sides if exact.symmetric else Sides(exact.tangent, exact._cols)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process leans on the same kernel."""
        rebuild, (kind, *rest) = super().__reduce__()
        return rebuild, (kind if self._exact is None else partial(kind, exact=self._exact), *rest)

    def __matmul__(self, other: Tensor | np.ndarray) -> Tensor:
        """Product with (columns,) or (columns, R).

        Raises:
            ModelError: if an operation of the model can be differentiated only once.

        Cost: for each of the R columns a forward and a backward pass of the M examples of the columns, and a jvp of the
        N of the rows, about six forward passes of one example together; the first time with an exact kernel a forward
        pass in float64 as well. Memory: one batch.
        """
        other = self._operand(other)
        if self.trace:
            return super().__matmul__(other)  # the trace kernel is no J J^T of one J
        columns = other.reshape(len(other), -1).to(self.dtype)
        try:
            products = [self._product(column.view(-1, self.scalars)) for column in columns.T]
        except NotImplementedError as error:
            raise ModelError(
                f"products without the matrix differentiate twice, and torch cannot do that here ({error}): use "
                "TangentKernel, whose products go tile by tile"
            ) from error
        return torch.stack(products, 1).reshape(-1, *other.shape[1:]).to(other.dtype)

    def _product(self, column: Tensor) -> Tensor:
        """K v for v of shape (M, K), flat."""
        together = TOGETHER if self.device.type == "cpu" else ELSEWHERE
        batch = max(FEWEST, min(MOST, together // (self._sizes().activations + 1)))
        if self._exact is None:
            direction = self.tangent.vjp(self._cols, column, batch=batch)
            return self.tangent.jvp(self._rows, direction, batch=batch).reshape(-1)
        # many small parts nearly cancel; their sum is not to lose what the right sides gain
        total = torch.zeros(self.tangent.count, dtype=torch.float64, device=self.device)
        for start, stop in span(0, len(self._cols), batch):
            some = self._cols.pick(range(start, stop))
            with self._col_sides.of(start, stop):
                total += self.tangent.vjp(some, column[start:stop], batch=batch)
        parts = []
        for start, stop in span(0, len(self._rows), batch):
            some = self._rows.pick(range(start, stop))
            with self._row_sides.of(start, stop):
                parts.append(self.tangent.jvp(some, total, batch=batch))
        return torch.cat(parts).reshape(-1)
