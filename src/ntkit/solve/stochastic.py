"""What the spectrum of a kernel says, from products with vectors alone: nothing of size n x n is formed.

Lanczos turns a vector v into a few nodes and weights from which v^T f(K) v follows for any function f. Kernels have a
few large eigenvalues that random vectors alone would see badly, so that some vectors are not random: an orthonormal
basis Q of K times random signs, on which the trace of f(K) is summed exactly. What is left of other random vectors
outside of Q stands for the rest, and gives the standard error. For the largest eigenvalues themselves take
`scipy.sparse.linalg.eigsh(kernel.to_scipy())`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.checkpoint import Checkpoint, digest
from ntkit.solve.ridge import FixedRidge, as_absolute
from ntkit.solve.symmetric import EPS, as_kernel

if TYPE_CHECKING:
    import numpy as np

    from ntkit.kernel.base import Kernel


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated from random vectors.

    Attributes:
        value: the estimate.
        standard_error: of it, from the spread between the vectors; NaN for a single one.
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        """Both."""
        return f"{self.value:.6g} +- {self.standard_error:.2g}"


@dataclass(frozen=True, eq=False)
class LanczosSpectrum:
    """Nodes and weights of a kernel's spectrum. Made by `lanczos`.

    Attributes:
        nodes: about eigenvalues, (directions + probes, steps).
        weights: of the nodes, (directions + probes, steps); those of a vector sum to its squared length.
        directions: how many of the vectors are the basis Q. The others are random, and their mean counts.
    """

    nodes: Tensor
    weights: Tensor
    directions: int

    @property
    def largest(self) -> float:
        """The largest eigenvalue, from below."""
        return float(self.nodes.max())

    def sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The sum of a function of all eigenvalues, the trace of f(K) (stochastic Lanczos quadrature).

        For smooth functions; the error of the quadrature, which is not in the standard error, falls with the steps.
        """
        return self._estimate(lambda total: total, function)

    def trace(self) -> Estimate:
        """The sum of the eigenvalues."""
        return self.sum(lambda values: values)

    def log_determinant(self, ridge: float | FixedRidge | None = None) -> Estimate:
        """log det(K + ridge I) for an absolute ridge; None for none.

        Raises:
            InputError: if a node plus ridge is not positive.
        """
        value = 0.0 if ridge is None else as_absolute(ridge)
        least = float(self.nodes.min()) + value
        if not least > 0:
            raise InputError(
                f"the kernel plus ridge {value:.3e} has an eigenvalue of {least:.3e} or less, so that its determinant "
                "has no logarithm: use a larger ridge"
            )
        return self.sum(lambda values: (values + value).log())

    def effective_dimension(self, ridge: float | FixedRidge) -> Estimate:
        """Trace of K (K + ridge I)^-1 for an absolute ridge: how many directions a ridge regression uses.

        Raises:
            InputError: if the ridge is not positive.
        """
        value = as_absolute(ridge)
        return self.sum(lambda values: values.clamp_min(0) / (values.clamp_min(0) + value))

    def participation_ratio(self) -> Estimate:
        """Effective rank trace(K)^2 / ||K||_F^2, as in `Spectrum`.

        Raises:
            InputError: if the kernel is zero.
        """
        self._require_positive()
        return self._estimate(lambda first, second: first**2 / second, lambda values: values, torch.square)

    def entropy_rank(self) -> Estimate:
        """Effective rank exp(-sum_i p_i log p_i) with p_i = eigenvalue_i / trace, as in `Spectrum`.

        Raises:
            InputError: if the kernel is zero.
        """
        self._require_positive()
        # -sum p log p with p = v / t is (sum of -v log v) / t + log t
        return self._estimate(
            lambda trace, entropy: math.exp(entropy / trace + math.log(trace)),
            lambda values: values.clamp_min(0),
            lambda values: torch.special.entr(values.clamp_min(0)),
        )

    def count_above(self, threshold: float) -> Estimate:
        """How many eigenvalues are larger than a number. Coarse: the spectrum is seen in `steps` nodes."""
        return self.sum(lambda values: (values > threshold).to(values))

    def _require_positive(self) -> None:
        if not self.largest > 0:
            raise InputError(f"a kernel without a positive eigenvalue has no rank: the largest is {self.largest:.3e}")

    def _estimate(self, of: Callable[..., float], *functions: Callable[[Tensor], Tensor]) -> Estimate:
        """A function of sums over the eigenvalues, with its error by the jackknife over the random vectors."""
        each = [(self.weights * function(self.nodes)).sum(1) for function in functions]
        known = [float(values[: self.directions].sum()) for values in each]
        drawn = [values[self.directions :] for values in each]
        count = len(drawn[0])
        value = of(*(k + float(d.mean()) for k, d in zip(known, drawn, strict=True)))
        if count < 2:
            return Estimate(value, math.nan)
        left_out = torch.tensor(
            [
                of(*(k + float(d.sum() - d[i]) / (count - 1) for k, d in zip(known, drawn, strict=True)))
                for i in range(count)
            ],
            dtype=torch.float64,
        )
        return Estimate(value, math.sqrt((count - 1) / count * float((left_out - left_out.mean()).square().sum())))


def lanczos(
    kernel: Kernel | Tensor | np.ndarray,
    *,
    steps: int = 50,
    probes: int = 8,
    directions: int = 8,
    generator: torch.Generator,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanczosSpectrum:
    """Run Lanczos from several vectors, all of which share their products with the kernel.

    Quadrature by Lanczos as in Ubaru, Chen and Saad (2017), the directions as in Hutch++ (Meyer, Musco, Musco and
    Woodruff 2021); with full reorthogonalisation, so that no eigenvalue is found twice.

    Args:
        kernel: square and symmetric; only products with it are taken.
        steps: nodes for each vector, at most n.
        probes: number of random vectors.
        directions: size of the basis Q; 0 for random vectors alone.
        generator: draws them.
        checkpoint: a file that the state is written to now and then, and read from if it is there: of the size of the
            memory below. The generator has to be seeded as before.
        progress: called with (steps done, steps in all).

    Cost: `steps` products of the kernel with directions + probes vectors each, and one more for the basis; memory:
    8 n steps (directions + probes) bytes.

    Raises:
        InputError: if an argument cannot be used, or a product is not finite; with a checkpoint also if the kernel has
            no `identity`.
        StoreError: if the checkpoint is damaged, of another kernel, seed or number of steps or vectors, or the disk is
            full, which leaves the last state as it was.
    """
    kernel = _square(kernel)
    n = kernel.shape[0]
    if steps < 1 or probes < 1 or directions < 0:
        raise InputError(
            f"expected at least one step and one probe, and no negative number of directions: got steps={steps!r}, "
            f"probes={probes!r}, directions={directions!r}"
        )
    steps, directions = min(steps, n), min(directions, n)
    start, others = _signs(n, probes, generator), _signs(n, directions, generator)
    file = state = None
    if checkpoint is not None:
        name = digest(start, "lanczos", steps, directions)
        file = Checkpoint(checkpoint, name, kernel.identity(), named="seed, number of vectors or number of steps")
        saved = file.read()
        state = None if saved is None else _Steps(**saved.parts)
    if state is None:
        if directions:
            main = torch.linalg.qr(_product(kernel, others)).Q
            start = torch.cat([main, start - main @ (main.T @ start)], 1)
        state = _Steps.begin(start, steps)
    _tridiagonal(kernel, state, file, progress)
    alpha, beta, lengths = state.alpha, state.beta, state.lengths
    small = torch.diag_embed(alpha) + torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)
    nodes, vectors = torch.linalg.eigh(small)
    shares = vectors[:, 0].square()
    weights = shares * lengths[:, None].square()
    # nodes of which a vector has nothing are not the kernel's: they are given the place of one that is
    real = (shares > EPS**2) & (lengths[:, None] > 0)
    return LanczosSpectrum(torch.where(real, nodes, nodes[real].max()), torch.where(real, weights, 0.0), directions)


@dataclass
class _Steps:
    """Where Lanczos stands, for several unit vectors.

    `alpha` and `beta` are the diagonals and neighbours of their tridiagonal matrices, (count, steps) each, `basis`
    (count, n, steps) what each vector has seen, `vector` (count, n) the next of it, `lengths` those of the vectors
    before they were made unit vectors, and `done` the number of steps taken.
    """

    alpha: Tensor
    beta: Tensor
    basis: Tensor
    vector: Tensor
    lengths: Tensor
    done: Tensor

    @classmethod
    def begin(cls, start: Tensor, steps: int) -> _Steps:
        """From vectors (n, count)."""
        (n, count), lengths = start.shape, start.norm(dim=0)
        vector = (start / torch.where(lengths > 0, lengths, 1.0)).T.contiguous()
        zeros = start.new_zeros(count, steps)
        return cls(zeros, zeros.clone(), start.new_zeros(count, n, steps), vector, lengths, torch.tensor(0))


def _tridiagonal(
    kernel: Kernel, state: _Steps, file: Checkpoint | None, progress: Callable[[int, int], None] | None
) -> None:
    """Take the steps that are left."""
    alpha, beta, basis, n = state.alpha, state.beta, state.basis, state.basis.shape[1]
    steps = alpha.shape[1]
    for step in range(int(state.done), steps):
        vector = state.vector
        basis[:, :, step] = vector
        product = _product(kernel, vector.T).T
        if step == 0:
            _require_symmetric(vector @ product.T, kernel)
        alpha[:, step] = (product * vector).sum(1)
        for _ in range(2):  # once is not enough: what rounding leaves of old directions grows
            known = basis[:, :, : step + 1]
            product = product - (known @ (known.mT @ product[:, :, None]))[:, :, 0]
        length = product.norm(dim=1)
        # a vector that has seen all that it can reach stands still
        moving = length > n * EPS * (alpha.abs() + beta).amax(1)
        beta[:, step] = torch.where(moving, length, 0.0)
        following = torch.where(moving[:, None], product / torch.where(moving, length, 1.0)[:, None], 0.0)
        state.vector = following.contiguous()  # as it comes back from a file, so that products round alike
        state.done += 1
        if file is not None:
            file.write({field.name: getattr(state, field.name) for field in fields(state)}, {}, now=step + 1 == steps)
        if progress is not None:
            progress(step + 1, steps)


def hutch_plus_plus(
    kernel: Kernel | Tensor | np.ndarray, *, products: int = 60, generator: torch.Generator
) -> Estimate:
    """The trace of a kernel from products alone: exact on its largest directions, random on the rest.

    Meyer, Musco, Musco and Woodruff (2021). Where a kernel's diagonal is at hand its sum is exact and cheaper.

    Args:
        kernel: square and symmetric.
        products: with vectors, at least 6, a third for each of the three parts of the method.
        generator: draws the vectors.

    Cost: `products` products, in three blocks; memory: 8 n products bytes.

    Raises:
        InputError: if an argument cannot be used, or a product is not finite.
    """
    kernel = _square(kernel)
    n, count = kernel.shape[0], products // 3
    if count < 2:
        raise InputError(f"Hutch++ takes at least 6 products: got {products!r}")
    main = torch.linalg.qr(_product(kernel, _signs(n, min(count, n), generator))).Q
    images = _product(kernel, main)
    _require_symmetric(main.T @ images, kernel)
    inside = float((main * images).sum())
    rest = _signs(n, count, generator)
    rest = rest - main @ (main.T @ rest)
    found = _mean((rest * _product(kernel, rest)).sum(0))
    return Estimate(inside + found.value, found.standard_error)


def _mean(values: Tensor) -> Estimate:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error)


def _square(kernel: Kernel | Tensor | np.ndarray) -> Kernel:
    kernel = as_kernel(kernel)
    if kernel.shape[0] != kernel.shape[1] or 0 in kernel.shape:
        raise InputError(f"a spectrum is that of a square kernel between the same examples: got shape {kernel.shape}")
    return kernel


def _require_symmetric(forms: Tensor, kernel: Kernel) -> None:
    """Refuse a kernel K by V^T K V, which is as symmetric as K."""
    allowed = math.sqrt(torch.finfo(kernel.dtype).eps) * float(forms.abs().max())
    if float((forms - forms.T).abs().max()) > allowed:
        raise InputError("the kernel is not symmetric: are rows and columns the same examples in the same order?")


def _signs(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Random signs, (n, count)."""
    drawn = torch.randint(0, 2, (n, count), generator=generator, device=generator.device)
    return drawn.to("cpu", torch.float64) * 2 - 1


def _product(kernel: Kernel, vectors: Tensor) -> Tensor:
    found = (kernel @ vectors.to(kernel.device)).to("cpu", torch.float64)
    if not bool(found.isfinite().all()):
        raise InputError("the kernel's products are not finite: NaN or overflow in the data or weights")
    return found
