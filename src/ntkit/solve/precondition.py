"""Approximate inverses for conjugate gradients: what makes the talk's approximation k (x) I_C an exact method.

A reduced kernel k (trace kernel, pNTK) or its sketch stands for the full one as k (x) B, with a C x C matrix B that
says how the outputs are coupled: the identity at initialisation, and after training something else, which the diagonal
blocks of the full kernel show. The nearer k (x) B is, the fewer products with the full kernel are needed, and the
answer is exact whatever k and B are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import Kernel, strips
from ntkit.kernel.features import FeatureKernel
from ntkit.solve.ridge import FixedRidge, as_absolute
from ntkit.solve.symmetric import as_tensor, symmetric_matrix
from ntkit.tangent.linearize import Tangent

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class KroneckerPreconditioner:
    """(k (x) B + ridge I)^-1 for a reduced kernel k of N examples. Made by `kronecker`.

    Attributes:
        vectors: eigenvectors of k, (N, N).
        outputs: eigenvectors of B, (C, C).
        inverse: 1 / (eigenvalue of k * eigenvalue of B + ridge), (N, C).
    """

    vectors: Tensor
    outputs: Tensor
    inverse: Tensor

    def __call__(self, right: Tensor) -> Tensor:
        """Apply to (N*C, R). Cost: 4 N^2 C R."""
        n, c = self.inverse.shape
        columns = torch.einsum("ncr,cd->ndr", _by_output(right, n, c), self.outputs)
        rotated = (self.vectors.T @ columns.reshape(n, -1)).view(columns.shape) * self.inverse[:, :, None]
        back = (self.vectors @ rotated.reshape(n, -1)).view(columns.shape)
        return torch.einsum("ndr,cd->ncr", back, self.outputs).reshape(right.shape)

    def root(self) -> KroneckerPreconditioner:
        """(k (x) B + ridge I)^-1/2."""
        return replace(self, inverse=self.inverse.sqrt())


@dataclass(frozen=True, eq=False)
class FeaturePreconditioner:
    """(Phi Phi^T (x) B + ridge I)^-1 for sketched features, through D x D matrices (Woodbury). Made by `kronecker`.

    Attributes:
        features: Phi, (N, D).
        vectors: eigenvectors of Phi^T Phi, (D, D).
        outputs: eigenvectors of B, (C, C).
        inside: what Phi^T v is multiplied by along the eigenvectors, (D, C).
        outside: what v itself is multiplied by.
        square_root: the same two for the square root.
    """

    features: FeatureKernel
    vectors: Tensor
    outputs: Tensor
    inside: Tensor
    outside: float
    square_root: tuple[Tensor, float]

    @classmethod
    def make(cls, features: FeatureKernel, weights: Tensor, outputs: Tensor, ridge: float) -> FeaturePreconditioner:
        """From B's eigenvalues and eigenvectors. Cost: N D^2 + 9 D^3."""
        moments = torch.zeros(features.size, features.size, dtype=torch.float64)
        for strip in strips(features.shape[0]):
            block = features.features(strip).double().cpu()
            moments.addmm_(block.T, block)
        values, vectors = torch.linalg.eigh(moments)
        # with f(s) = 1 / (s + ridge) or its root, f(b Phi Phi^T) = f(0) I + Phi V [(f(b m) - f(0)) / m] V^T Phi^T for
        # the eigenvalues m and vectors V of Phi^T Phi; the quotient is written so that m may be zero
        shifted = values.clamp_min(0)[:, None] * weights + ridge
        root, first = shifted.sqrt(), math.sqrt(ridge)
        halved = -weights / (first * root * (root + first))
        return cls(features, vectors, outputs, -weights / (ridge * shifted), 1 / ridge, (halved, 1 / first))

    def __call__(self, right: Tensor) -> Tensor:
        """Apply to (N*C, R). Cost: 4 N D C R."""
        n, c = self.features.shape[0], len(self.outputs)
        columns = torch.einsum("ncr,cd->ndr", _by_output(right, n, c), self.outputs)
        flat = columns.reshape(n, -1)
        inner = flat.new_zeros(self.features.size, flat.shape[1])
        for strip in strips(n):
            inner += self._block(strip).T @ flat[strip]
        scaled = (self.vectors.T @ inner).view(-1, *columns.shape[1:]) * self.inside[:, :, None]
        inner = self.vectors @ scaled.reshape(inner.shape)
        outer = torch.cat([self._block(strip) @ inner for strip in strips(n)])
        found = self.outside * columns + outer.view(columns.shape)
        return torch.einsum("ndr,cd->ncr", found, self.outputs).reshape(right.shape)

    def _block(self, rows: slice) -> Tensor:
        return self.features.features(rows).double().cpu()

    def root(self) -> FeaturePreconditioner:
        """(Phi Phi^T (x) B + ridge I)^-1/2."""
        inside, outside = self.square_root
        return replace(self, inside=inside, outside=outside)


def kronecker(
    kernel: Kernel | Tensor | np.ndarray,
    outputs: int | Tensor | np.ndarray,
    ridge: float | FixedRidge,
) -> KroneckerPreconditioner | FeaturePreconditioner:
    """(k (x) B + ridge I)^-1, to precondition a solve with the full kernel of the same examples.

    Args:
        kernel: a reduced kernel k between the N training examples, or sketched features of one. Take the trace kernel
            where it can be afforded: it is the nearest of its kind to the full kernel.
        outputs: C, for B the identity, or B itself, (C, C): see `coupling`.
        ridge: the absolute ridge of the solve, positive.

    For features take D several times N where that can be held: it costs little more to make them, and the noise of
    fewer ones hides the small eigenvalues, which costs iterations.

    Cost: about 9 N^3, or N D^2 + 9 D^3 for features; memory: 24 N^2 bytes, or 24 D^2.

    Raises:
        InputError: if an argument cannot be used.
    """
    ridge = as_absolute(ridge)
    if isinstance(kernel, Kernel) and kernel.scalars != 1:
        raise InputError(
            f"a reduced kernel has one row per example: got {kernel.scalars}. Take trace=True or SumOfLogits()"
        )
    weights, rotation = torch.linalg.eigh(_coupling_matrix(outputs))
    weights = weights.clamp_min(0)
    if not isinstance(kernel, FeatureKernel) or kernel.size >= kernel.shape[0]:  # the smaller of N x N and D x D
        values, vectors = (part.cpu() for part in symmetric_matrix(kernel).decompose())
        return KroneckerPreconditioner(vectors, rotation, 1 / (values.clamp_min(0)[:, None] * weights + ridge))
    return FeaturePreconditioner.make(kernel, weights, rotation, ridge)


def coupling(tangent: Tangent, x: Any, *, examples: int = 64, generator: torch.Generator) -> Tensor:
    """B, (C, C): the mean diagonal block of the full kernel over some examples, scaled to the trace C.

    Args:
        tangent: the network with the read-out `Logits()`.
        x: the training examples.
        examples: how many are drawn.
        generator: draws them.

    Cost: C backward passes for each example drawn.

    Raises:
        InputError: if no example is asked for, or the gradients of all that are drawn are zero.
    """
    found = tangent.examples(x)
    if examples < 1:
        raise InputError(f"the coupling of outputs is measured on at least one example: got {examples!r}")
    numbers = torch.randperm(len(found), generator=generator, device=generator.device)[:examples].tolist()
    total: Any = 0.0
    with torch.no_grad():
        for number in numbers:
            one = tangent.derivatives(found, [number])
            total = total + one.gram(one).double().cpu()
    if not float(total.trace()) > 0:
        raise InputError("the gradients of all examples that were drawn are zero: there is nothing to precondition")
    return total * (len(total) / total.trace())


def _by_output(right: Tensor, n: int, c: int) -> Tensor:
    """(N*C, R) as (N, C, R)."""
    if len(right) != n * c:
        raise InputError(f"the preconditioner is for {n} examples of {c} outputs, {n * c} rows: got {len(right)}")
    return right.view(n, c, -1)


def _coupling_matrix(outputs: int | Tensor | np.ndarray) -> Tensor:
    if isinstance(outputs, int) and not isinstance(outputs, bool) and outputs > 0:
        return torch.eye(outputs, dtype=torch.float64)
    matrix = None if isinstance(outputs, (int, float)) else as_tensor(outputs).double().cpu()
    square = matrix is not None and matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    if matrix is None or not square or not torch.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-8):
        got = f"shape {tuple(matrix.shape)}" if matrix is not None else repr(outputs)
        raise InputError(f"outputs are their number C, or a symmetric (C, C) matrix that couples them: got {got}")
    return (matrix + matrix.T) / 2
