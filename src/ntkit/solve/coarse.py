"""What k (x) B does not see, mended where it matters: the full kernel itself on the leading directions.

k (x) B spreads every direction of k over the outputs by one and the same B. The full kernel gives some of them to a
single combination of the outputs, up to C times as much as k (x) B says. On the span of k's leading eigenvectors, times
all outputs, sketched features of the full kernel tell how it is: there the noise of a sketch is small beside the
eigenvalues. The rest is left to k (x) B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import STRIP, strips
from ntkit.solve.precondition import KroneckerPreconditioner, kronecker
from ntkit.solve.ridge import FixedRidge, as_absolute

if TYPE_CHECKING:
    import numpy as np

    from ntkit.kernel.base import Kernel
    from ntkit.kernel.features import FeatureKernel
    from ntkit.solve.iterative import Preconditioner

# Of k's eigenvectors, on how many the full kernel is looked at; how many features each of their rows needs (with
# fewer, noise costs more iterations than the look saves); and how much larger a ridge serves the rest best: what is
# left of k (x) B claims more than there is. Measured, see `benchmarks/scale/iterations.py`.
SHARE, FEATURES, DAMPED = 0.3, 2.5, 3.0


@dataclass(frozen=True, eq=False)
class CoarsePreconditioner:
    """W (W^T Theta W + ridge I)^-1 W^T + (I - W W^T) base (I - W W^T) with W = V (x) I_C. Made by `coarse`.

    Attributes:
        vectors: V, (N, d), orthonormal.
        lower: Cholesky factor of W^T Theta W + ridge I, (d*C, d*C).
        base: for what W leaves out.
    """

    vectors: Tensor
    lower: Tensor
    base: Preconditioner

    def __call__(self, right: Tensor) -> Tensor:
        """Apply to (N*C, R). Cost: 6 N d C R + 2 (d C)^2 R, and that of the base."""
        inside = self._inside(right)
        rest = self.base(right - self._outside(inside))
        rest = rest - self._outside(self._inside(rest))
        return rest + self._outside(torch.cholesky_solve(inside, self.lower))

    def _inside(self, right: Tensor) -> Tensor:
        """W^T right, (d*C, R)."""
        return (self.vectors.T @ right.reshape(len(self.vectors), -1)).reshape(len(self.lower), -1)

    def _outside(self, inside: Tensor) -> Tensor:
        """W inside, (N*C, R)."""
        whole = self.vectors @ inside.reshape(self.vectors.shape[1], -1)
        return whole.reshape(-1, inside.shape[1])


def coarse(
    features: FeatureKernel, vectors: Tensor, ridge: float | FixedRidge, *, base: Preconditioner
) -> CoarsePreconditioner:
    """Precondition a solve with the full kernel by its sketch on some directions, and by another helper elsewhere.

    Args:
        features: sketched features of the full kernel, C rows for each of N examples; D several times d*C.
        vectors: V, (N, d), orthonormal: leading eigenvectors of the reduced kernel, for example
            `kronecker(...).vectors[:, -d:]`.
        ridge: the absolute ridge of the solve, positive.
        base: the helper for the rest, that of `kronecker`.

    Cost: 2 N d C D + 2 (d C)^2 D, and (d C)^3 / 3; memory: 4 d C D + 4 (d C)^2 bytes in float32,
    or 12 (d C)^2 if that is more.

    Raises:
        InputError: if the shapes do not fit, or the vectors are not orthonormal.
    """
    ridge, count = as_absolute(ridge), features.scalars
    n = features.shape[0] // count
    if vectors.ndim != 2 or len(vectors) != n or not 1 <= vectors.shape[1] <= n:
        raise InputError(
            f"directions of {n} examples have shape ({n}, d) with 1 <= d <= {n}: got {tuple(vectors.shape)}"
        )
    v = vectors.detach().to("cpu", torch.float64)
    d = v.shape[1]
    if float((v.T @ v - torch.eye(d, dtype=v.dtype)).abs().max()) > 1e-6:
        raise InputError("the directions are not orthonormal: take eigenvectors, or torch.linalg.qr(directions).Q")
    projected = torch.zeros(d, count * features.size, dtype=features.dtype)
    for examples, block in _blocks(features):
        projected.addmm_(v[examples].T.to(block), block.flatten(1))
    rows = projected.view(d * count, features.size)
    gram = rows @ rows.T
    del projected, rows  # the largest arrays here, and the next lines need as much again
    system = gram.double()
    del gram
    system.diagonal().add_(ridge)
    return CoarsePreconditioner(v, torch.linalg.cholesky(system, out=system), base)


def recommended(
    features: FeatureKernel,
    ridge: float | FixedRidge,
    *,
    kernel: Kernel | Tensor | np.ndarray | None = None,
) -> CoarsePreconditioner:
    """The preconditioner to begin with: k (x) B, and `coarse` on up to three tenths of k's directions.

    Args:
        features: sketched features of the full kernel, C rows for each of N examples. D = N*C serves all of those
            directions; fewer features serve fewer of them, 2.5 C for each.
        ridge: the absolute ridge of the solve, positive.
        kernel: k, the trace kernel, or a sketch of it; None for what these features say of it, (N, N).

    Cost: for k from the features 2 N^2 C D, and 9 N^3; then that of `coarse`. Memory: 32 N^2 bytes, and that of
    `coarse`.

    Raises:
        InputError: if the shapes do not fit, or the features are zero.
    """
    ridge, count = as_absolute(ridge), features.scalars
    outputs = _coupling(features)
    base = kronecker(_trace_kernel(features) if kernel is None else kernel, outputs, DAMPED * ridge)
    n = features.shape[0] // count
    size = max(1, min(int(SHARE * n), int(features.size / (FEATURES * count))))
    if isinstance(base, KroneckerPreconditioner):
        vectors = base.vectors[:, -size:]
    else:  # of Phi Phi^T, from those of Phi^T Phi
        long = base.vectors[:, -size:]
        vectors = torch.linalg.qr(torch.cat([base.features.features(s).to(long) @ long for s in strips(n)])).Q
    return coarse(features, vectors, ridge, base=base)


def _blocks(features: FeatureKernel) -> Iterator[tuple[slice, Tensor]]:
    """Examples, and their features (examples, C, D)."""
    count = features.scalars
    for some in strips(features.shape[0] // count, max(1, STRIP // count)):
        block = features.features(slice(some.start * count, some.stop * count)).cpu()
        yield some, block.view(-1, count, features.size)


def _coupling(features: FeatureKernel) -> Tensor:
    """B by the features: their mean diagonal block, scaled to the trace C."""
    total = torch.zeros(features.scalars, features.scalars, dtype=torch.float64)
    for _, block in _blocks(features):
        total += torch.einsum("ncd,ned->ce", block, block).double()
    if not float(total.trace()) > 0:
        raise InputError("the features are zero: there is nothing to precondition")
    return total * (len(total) / total.trace())


def _trace_kernel(features: FeatureKernel) -> Tensor:
    """The mean over the outputs of their sketched kernels, (N, N)."""
    n = features.shape[0] // features.scalars
    total = torch.empty(n, n, dtype=features.dtype)
    for rows, left in _blocks(features):
        for cols, right in _blocks(features):
            if cols.start < rows.start:
                continue
            # all features of an example end to end: their products are sums over the outputs
            part = left.flatten(1) @ right.flatten(1).T / features.scalars
            total[rows, cols], total[cols, rows] = part, part.T
    return total
