"""A kernel read by columns: its diagonal, and what one point has with all others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from ntkit.errors import InputError
from ntkit.kernel.base import strips
from ntkit.kernel.features import FeatureKernel

if TYPE_CHECKING:
    from torch import Tensor

    from ntkit.kernel.base import Kernel


class Columns(ABC):
    """A symmetric kernel of n points, float64.

    Attributes:
        diagonal: k(x, x), (n,).
    """

    diagonal: Tensor

    @abstractmethod
    def column(self, number: int) -> Tensor:
        """k(., x) of one point, (n,)."""

    @abstractmethod
    def sums(self, numbers: Tensor) -> Tensor:
        """Sums of every row over some points, (n,)."""

    def distances(self, number: int) -> Tensor:
        """||phi(.) - phi(x)||^2 = k(., .) + k(x, x) - 2 k(., x), (n,); no less than 0."""
        return (self.diagonal + self.diagonal[number] - 2 * self.column(number)).clamp_min(0)


class KernelColumns(Columns):
    """Of a kernel with one row for each point, times a number."""

    def __init__(self, kernel: Kernel, n: int, factor: float = 1.0) -> None:
        """Read the diagonal.

        Args:
            kernel: features in half precision are multiplied in float32: squared lengths above 65,504 have no number
                in float16, and distances are lost in it.
            n: number of points.
            factor: on all entries, in float64.

        Raises:
            InputError: if there is not one row for each point, or a diagonal entry is not finite.
        """
        if kernel.shape != (n, n):
            raise InputError(
                f"batches by distances need one row for each of the {n} points: got a kernel of shape {kernel.shape}. "
                "Use a kernel that does not couple the outputs"
            )
        self._kernel, self._factor = kernel, factor
        self.diagonal = factor * kernel.diagonal().cpu().double()
        if not bool(self.diagonal.isfinite().all()):
            raise InputError("the kernel's diagonal is not finite: features or outputs are too large for their type")

    def column(self, number: int) -> Tensor:
        """k(., x) of one point, (n,).

        Raises:
            InputError: if an entry is not finite: no rule would say so, and distances would be 0.
        """
        kernel, mine = self._kernel, slice(number, number + 1)
        if isinstance(kernel, FeatureKernel) and kernel.dtype.itemsize < torch.float32.itemsize:
            phi = kernel.features(mine)[0].float()
            found = torch.cat([kernel.features(some).float() @ phi for some in strips(kernel.shape[0])])
        else:
            found = kernel.tile(slice(None), mine)[:, 0]
        found = self._factor * found.cpu().double()
        bad = (~found.isfinite()).nonzero()[:, 0]
        if len(bad):
            raise InputError(
                f"the kernel's entry of points {int(bad[0])} and {number} is {float(found[bad[0]])}: it has a NaN, or "
                "is too large for its type"
            )
        return found

    def sums(self, numbers: Tensor) -> Tensor:  # noqa: D102
        some = torch.zeros(self._kernel.shape[0], dtype=torch.float64)
        some[numbers] = 1.0
        return self._factor * (self._kernel @ some.to(self._kernel.device)).cpu().double()


class ProductColumns(Columns):
    """Of the features a (x) h, which are never formed: k = (a a'^T) * (h h'^T)."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """Both factors, (n, d1) and (n, d2)."""
        self._left, self._right = left.double(), right.double()
        self.diagonal = self._left.square().sum(1) * self._right.square().sum(1)

    def column(self, number: int) -> Tensor:  # noqa: D102
        return (self._left @ self._left[number]) * (self._right @ self._right[number])

    def sums(self, numbers: Tensor) -> Tensor:  # noqa: D102
        inner = self._left[numbers].T @ self._right[numbers]
        return ((self._left @ inner) * self._right).sum(1)
