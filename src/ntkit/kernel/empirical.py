"""The empirical tangent kernel of a network on two sets of examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.kernel.base import Kernel, bounds
from ntkit.tangent.linearize import Tangent, linearize

if TYPE_CHECKING:
    from ntkit.tangent.parameters import Choice
    from ntkit.tangent.readout import Readout


def empirical_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    readout: Readout | None = None,
    trace: bool = False,
    parameters: Choice | None = None,
) -> Tensor:
    return TangentKernel(linearize(model, readout=readout, parameters=parameters), x1, x2, trace=trace).dense()


class TangentKernel(Kernel):
    def __init__(self, tangent: Tangent, x1: Any, x2: Any = None, *, trace: bool = False) -> None:
        self.tangent = tangent
        self.trace = trace
        self._rows = tangent.examples(x1)
        self._cols = self._rows if x2 is None else tangent.examples(x2)
        self._symmetric = x2 is None
        self.scalars = 1 if trace else tangent.anatomy(self._rows).scalars

    @property
    def shape(self):
        return len(self._rows) * self.scalars, len(self._cols) * self.scalars

    @property
    def dtype(self):
        return self.tangent.dtype

    @property
    def device(self):
        return self.tangent.device

    @property
    def symmetric(self):
        return self._symmetric

    def tile(self, rows, cols):
        r0, r1 = bounds(rows, self.shape[0])
        c0, c1 = bounds(cols, self.shape[1])
        left = self.tangent.derivatives(self._rows)
        right = left if self._symmetric else self.tangent.derivatives(self._cols)
        with torch.no_grad():
            return left.gram(right, trace=self.trace)[r0:r1, c0:c1]
