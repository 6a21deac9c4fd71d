"""Nystrom preconditioning: what some columns of a kernel know of the rest of it.

K is close to F F^T, where F comes from the columns of a few examples by a partial Cholesky factorization. Trained
networks have kernels with a few hundred large eigenvalues, and those F F^T holds; the flat rest is left to another
preconditioner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.iterative import Preconditioner, Rooted
from ntkit.solve.ridge import FixedRidge, as_absolute
from ntkit.solve.symmetric import as_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from ntkit.kernel.base import Kernel

# Times that examples are drawn: each time where the columns so far explain least, at the price of one pass over all.
ROUNDS = 4


@dataclass(frozen=True, eq=False)
class NystromPreconditioner:
    """U (L + ridge)^-1 U^T + (I - U U^T) base (I - U U^T), with F F^T = U L U^T. Made by `nystrom`.

    Attributes:
        vectors: U, (n, r), orthonormal.
        values: L, descending, (r,).
        ridge: absolute.
        base: for what U leaves out; None for 1 / (smallest of L + ridge), as in Frangella, Tropp and Udell (2023).
        examples: whose columns were computed, in the order in which they were drawn.
    """

    vectors: Tensor
    values: Tensor
    ridge: float
    base: Preconditioner | None
    examples: tuple[int, ...]

    def __call__(self, right: Tensor) -> Tensor:
        """Apply to (n, R). Cost: 6 n r R, and that of the base."""
        inside = self.vectors.T @ right
        rest = right - self.vectors @ inside
        if self.base is None:
            rest = rest / (self.values[-1] + self.ridge)
        else:
            rest = self.base(rest)
            rest -= self.vectors @ (self.vectors.T @ rest)
        return self.vectors @ (inside / (self.values + self.ridge)[:, None]) + rest

    def root(self) -> Preconditioner:
        """A symmetric R of which R^2 is about the inverse; with a base, the base's own root outside of U.

        Raises:
            InputError: if the base has no root.
        """
        base = self.base
        if base is not None and not isinstance(base, Rooted):
            raise InputError(f"the base of this preconditioner has no square root: got {base!r}")
        level = math.sqrt(float(self.values[-1]) + self.ridge)
        outer = (lambda rest: rest / level) if base is None else base.root()

        def apply(right: Tensor) -> Tensor:
            inside = self.vectors.T @ right
            rest = outer(right - self.vectors @ inside)
            rest = rest - self.vectors @ (self.vectors.T @ rest)
            return self.vectors @ (inside / (self.values + self.ridge).sqrt()[:, None]) + rest

        return apply


def nystrom(
    kernel: Kernel | Tensor | np.ndarray,
    ridge: float | FixedRidge,
    *,
    examples: int,
    generator: torch.Generator,
    base: Preconditioner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NystromPreconditioner:
    """Precondition a solve with a kernel by the columns of some of its examples.

    The examples are drawn in four rounds, in proportion to what the earlier ones leave of the diagonal (randomly
    pivoted Cholesky by blocks: Chen, Epperly, Tropp and Webber 2023).

    Args:
        kernel: the kernel that is to be solved with, square and symmetric.
        ridge: the absolute ridge of the solve, positive.
        examples: how many are drawn; each brings its K columns.
        generator: draws them.
        base: a preconditioner for the rest, for example that of `kronecker`.
        progress: called with (examples done, examples in all).

    Cost: the diagonal, `examples` K columns of the kernel, about 12 n r^2 for r = `examples` K; memory: 24 n r bytes.

    Raises:
        InputError: if an argument cannot be used, or the kernel is not positive semidefinite on what was drawn.
    """
    kernel = as_kernel(kernel)
    n, k = kernel.shape[0], kernel.scalars
    if kernel.shape[1] != n or n == 0:
        raise InputError(f"a preconditioner needs a square kernel: got shape {kernel.shape}")
    ridge = as_absolute(ridge)
    if not 1 <= examples <= n // k:
        raise InputError(f"expected a number of examples from 1 to {n // k}: got {examples!r}")
    diagonal = kernel.diagonal().double().cpu()
    if not bool(diagonal.isfinite().all()) or bool((diagonal < 0).any()):
        raise InputError("the kernel's diagonal has entries that are negative or not finite")
    # what can be told from rounding in the kernel's own type
    largest = float(diagonal.max())
    floor = 10 * torch.finfo(kernel.dtype).eps * largest
    factor, left, drawn = diagonal.new_empty(n, 0), diagonal.clone(), []
    while len(drawn) < examples:
        weights = left.view(-1, k).sum(1)
        weights[drawn] = 0
        count = min(-(-examples // ROUNDS), examples - len(drawn), int((weights > k * floor).sum()))
        if count == 0:
            break  # the columns so far say everything
        new = torch.multinomial(weights.to(generator.device), count, generator=generator).tolist()
        factor = torch.cat([factor, _columns(kernel, new, factor, largest, floor)], 1)
        left = diagonal - factor.square().sum(1)
        if float(left.min()) < -1e-3 * largest:
            raise InputError(
                "the kernel is not positive semidefinite: its columns explain more than its diagonal holds"
            )
        left.clamp_min_(0)
        drawn += new
        if progress is not None:
            progress(len(drawn), examples)
    if not factor.shape[1]:
        raise InputError("the kernel is zero: there is nothing to precondition")
    vectors, singular, _ = torch.linalg.svd(factor, full_matrices=False)
    kept = singular.square() > floor
    return NystromPreconditioner(vectors[:, kept], singular[kept].square(), ridge, base, tuple(drawn))


def _columns(kernel: Kernel, numbers: list[int], factor: Tensor, largest: float, floor: float) -> Tensor:
    """The part of some examples' columns that the factor does not explain, as columns C of which C C^T is that part."""
    k = kernel.scalars
    rows = torch.tensor([i * k + j for i in numbers for j in range(k)])
    columns = kernel.examples(numbers).T.double().cpu()
    columns -= factor @ factor[rows].T
    own = columns[rows]
    if float((own - own.T).abs().max()) > math.sqrt(torch.finfo(kernel.dtype).eps) * largest:
        raise InputError("the kernel is not symmetric: are rows and columns the same examples in the same order?")
    values, vectors = torch.linalg.eigh((own + own.T) / 2)
    if float(values[0]) < -1e-3 * largest:
        raise InputError(
            f"the kernel is not positive semidefinite: a block of it has the eigenvalues {float(values[0]):.3e} to "
            f"{float(values[-1]):.3e}"
        )
    kept = values > floor
    return columns @ (vectors[:, kept] / values[kept].sqrt())
