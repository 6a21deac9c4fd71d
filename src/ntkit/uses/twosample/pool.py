"""What a statistic reads of the pooled sample: sums over a kernel's entries for many relabelings at once.

A kernel's matrix is multiplied by all relabelings in one product, strip by strip where it is larger than memory;
features are multiplied by them directly, and the matrix is never formed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import DenseKernel, Kernel, strips
from ntkit.kernel.explicit import FeatureFunction
from ntkit.kernel.function import KernelFunction
from ntkit.kernel.memory import default_memory

if TYPE_CHECKING:
    from ntkit.tangent.examples import Examples

# Examples of the small matrices that are computed together.
TOGETHER = 128


class Pool(ABC):
    """N pooled examples, with the inner products of a kernel.

    Attributes:
        size: N.
        removed: a, (N,), where the inner products are K_ij - a_i - a_j and a constant more or less; None if they are
            K_ij. No MMD feels that, but a witness does.
    """

    size: int
    removed: Tensor | None = None

    @abstractmethod
    def quadratic(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over ordered pairs of different examples, K_ij with i != j.

        Args:
            labels: (N, B) of booleans, who is chosen.

        Returns:
            The sum over pairs that are both chosen, (B,); for each example the sum with those that the first column
            chooses, (N,); and with all, (N,).
        """

    @abstractmethod
    def small(self, groups: Tensor) -> Tensor:
        """The kernel inside small groups of examples, (Q, g, g) for their numbers (Q, g)."""

    @property
    @abstractmethod
    def memory(self) -> int:
        """Bytes of working space."""

    def columns(self) -> int:
        """Relabelings that are multiplied at once."""
        return max(1, self.memory // (32 * self.size))


class MatrixPool(Pool):
    """A kernel's matrix of the pooled sample, read in strips."""

    def __init__(self, kernel: Kernel, memory: int | None = None) -> None:
        """Take a matrix, and read it at once if it fits into `memory` bytes.

        Raises:
            InputError: if it is not a symmetric kernel with one row for each example.
        """
        self._memory = default_memory() if memory is None else memory
        self.size = kernel.shape[0]
        fits = 8 * self.size**2 <= self._memory
        self._kernel = DenseKernel(kernel.dense().detach(), symmetric=True) if fits else kernel

    @property
    def memory(self) -> int:  # noqa: D102
        return self._memory

    def quadratic(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cost: reads the kernel once, and N^2 B multiplications.

        Raises:
            InputError: if an entry is not finite.
        """
        labels = labels.to(self._kernel.device)
        first = torch.stack([labels[:, 0].double(), torch.ones(self.size, dtype=torch.float64).to(labels.device)], 1)
        within = torch.zeros(labels.shape[1], dtype=torch.float64, device=labels.device)
        sums = torch.empty(self.size, 2, dtype=torch.float64, device=labels.device)
        for strip in strips(self.size, max(1, min(self.size, self._memory // (32 * self.size)))):
            tile = self._kernel.tile(strip, slice(None)).detach().to(torch.float64, copy=True)
            finite(tile).diagonal(strip.start).zero_()
            sums[strip] = tile @ first
            for some in strips(labels.shape[1], self.columns()):
                chosen = labels[:, some].double()
                within[some] += (tile @ chosen).mul_(chosen[strip]).sum(0)
        return within.cpu(), sums[:, 0].cpu(), sums[:, 1].cpu()

    def small(self, groups: Tensor) -> Tensor:  # noqa: D102
        rows = self._kernel.examples(groups.flatten().tolist()).detach().double()
        picked = rows.reshape(*groups.shape, self.size).cpu()
        return finite(picked.gather(2, groups[:, None, :].expand(-1, groups.shape[1], -1)))


class FunctionPool(Pool):
    """A kernel of examples, whose matrix is computed only by statistics that ask for all of it."""

    def __init__(self, function: KernelFunction, examples: Examples, memory: int | None = None) -> None:
        """Nothing is computed here."""
        self._function = function
        self._examples = examples
        self._given = memory
        self.size = len(examples)

    @property
    def memory(self) -> int:  # noqa: D102
        return default_memory() if self._given is None else self._given

    def quadratic(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        kernel = self._function(self._examples.data)
        check_matrix(kernel, self.size)
        return MatrixPool(kernel, self._given).quadratic(labels)

    def small(self, groups: Tensor) -> Tensor:
        """Cost: (Q g) max(g, 128) evaluations of the kernel."""
        count, g = groups.shape
        found, step = [], max(1, TOGETHER // g)
        for some in strips(count, step):
            numbers = groups[some].flatten().tolist()
            kernel = self._function(self._examples.pick(numbers))
            check_matrix(kernel, len(numbers))
            matrix = kernel.dense().detach().double().cpu().reshape(-1, g, len(numbers) // g, g)
            found.append(matrix.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        return finite(torch.cat(found))


class FeaturePool(Pool):
    """Features of the pooled sample, (N, D), whose mean is taken off: sums over large numbers would lose the rest."""

    def __init__(self, features: Tensor, memory: int | None = None) -> None:
        """Of a matrix in float64."""
        centre = features.mean(0)
        self._features = features - centre
        self.removed = (self._features @ centre).cpu()
        self._given = memory
        self.size = len(features)

    @property
    def memory(self) -> int:  # noqa: D102
        return default_memory() if self._given is None else self._given

    def quadratic(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cost: N D B multiplications."""
        phi, labels = self._features, labels.to(self._features.device)
        lengths = phi.square().sum(1)
        first = torch.stack([labels[:, 0].double(), torch.ones(self.size, dtype=torch.float64).to(phi.device)], 1)
        sums = phi @ (phi.T @ first) - lengths[:, None] * first
        within = []
        for some in strips(labels.shape[1], self.columns()):
            chosen = labels[:, some].double()
            within.append((phi.T @ chosen).square_().sum(0) - lengths @ chosen)
        return torch.cat(within).cpu(), sums[:, 0].cpu(), sums[:, 1].cpu()

    def small(self, groups: Tensor) -> Tensor:  # noqa: D102
        picked = self._features[groups.to(self._features.device)]
        return (picked @ picked.mT).cpu()


def finite(entries: Tensor) -> Tensor:
    """The same entries.

    Raises:
        InputError: if one of them is not finite.
    """
    if not bool(torch.isfinite(entries.sum())):
        raise InputError("the kernel is NaN or infinite for some pair of examples")
    return entries


def check_matrix(kernel: Kernel, size: int, which: str = "pooled ") -> None:
    """Refuse a matrix that has not one row and column for each example.

    Raises:
        InputError: if it has not.
    """
    if kernel.shape != (size, size) or not kernel.symmetric:
        raise InputError(
            f"a test needs one kernel value for each pair of the {size} {which}examples: got a matrix of shape "
            f"{kernel.shape}. Of a network with several outputs take SumOfLogits() as read-out, or "
            "Empirical(..., trace=True)"
        )


def pool(source: KernelFunction | Kernel, examples: Examples, memory: int | None = None) -> Pool:
    """The pooled sample as a kernel, a finished matrix or features see it.

    Raises:
        InputError: if `source` is none of these, or does not fit the examples.
    """
    if isinstance(source, FeatureFunction):
        return FeaturePool(feature_rows(source, examples), memory)
    if isinstance(source, KernelFunction):
        return FunctionPool(source, examples, memory)
    if not isinstance(source, Kernel):
        raise InputError(
            "kernel is a KernelFunction such as RBF(), Features(map) or Empirical(tangent), or a Kernel of the pooled "
            f"sample: got {type(source).__name__}"
        )
    check_matrix(source, len(examples))
    return MatrixPool(source, memory)


def feature_rows(source: FeatureFunction, examples: Examples) -> Tensor:
    """Features of some examples, (N, D) in float64.

    Raises:
        InputError: if there is not one finite row for each example.
    """
    found = source.features(examples.data).detach().double()
    if len(found) != len(examples):
        raise InputError(
            f"features are one row for each of {len(examples)} examples: got {len(found)}. Of a network with several "
            "outputs take SumOfLogits() as read-out, or features with trace=True"
        )
    return finite(found)
