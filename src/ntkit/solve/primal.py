"""Kernel ridge regression in feature space: for K = Phi Phi^T with D features, past the size of any matrix.

    f(x) = f0(x) + phi(x) (Phi^T Phi + ridge I)^-1 Phi^T (Y - f0(X))

which are the predictions of the kernel Phi Phi^T with the same ridge. The features are read once, in blocks; what is
held has the size D x D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from scipy.linalg import eigh
from torch import Tensor

from ntkit.errors import InputError, NotPositiveDefiniteError
from ntkit.kernel.base import strips
from ntkit.kernel.features import FeatureKernel
from ntkit.solve.regression import as_targets, right_hand_sides
from ntkit.solve.ridge import FixedRidge, SearchedRidge, as_ridge
from ntkit.solve.symmetric import EPS

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


@dataclass(frozen=True, eq=False)
class PrimalFit:
    """A ridge regression on features, and the evidence on how good it is.

    Attributes:
        weights: (D, C), or (D, 1) for features of every output of an example; float64.
        ridge: the absolute number that was added to the diagonal of the kernel.
        relative_ridge: the same in units of the mean diagonal entry of the kernel.
        relative_residual: of the linear system that was solved, ||(Phi^T Phi + ridge I) weights - Phi^T (Y - f0)|| /
            ||Phi^T (Y - f0)||, with the moments Phi^T Phi themselves and not with their eigenvectors.
        gcv: the generalized cross-validation score, as for `KernelRegression`.
        train_error: mean over the examples of the squared training residual, summed over the outputs.
        effective_dimension: trace of K (K + ridge I)^-1.
        outputs: C.
        around: whether the fit is around predictions f0 that `predict` has to be given again.
    """

    weights: Tensor
    ridge: float
    relative_ridge: float
    relative_residual: float
    gcv: float
    train_error: float
    effective_dimension: float
    outputs: int
    around: bool

    def predict(self, features: FeatureKernel | Tensor, prior: Tensor | np.ndarray | None = None) -> Tensor:
        """Predictions on M examples, (M, C), float64, from their features (the same map), read in blocks.

        Raises:
            InputError: if the number of features differs, or `prior` is missing or superfluous.
        """
        source = _as_features(features)
        if source.size != len(self.weights):
            raise InputError(f"the fit has {len(self.weights)} features: got {source.size}")
        if (prior is not None) != self.around:
            raise InputError(
                "the fit is around predictions f0: pass f0 of the new examples as `prior`"
                if self.around
                else "the fit was not given f0, so `prior` must be left out here too"
            )
        blocks = [source.features(strip).double() @ self.weights for strip in strips(source.shape[0])]
        change = torch.cat(blocks).reshape(-1, self.outputs)
        return change if prior is None else as_targets(prior, "prior", tuple(change.shape)) + change


@dataclass(frozen=True, eq=False)
class PrimalRegression:
    """Ridge regression on features for every ridge at once, from one pass over the features.

    Made by `PrimalRegression.decompose`. All ridges of its methods are absolute, but for `fit`.

    Attributes:
        eigenvalues: of Phi^T Phi, descending, (D,): the nonzero ones are those of the kernel.
        eigenvectors: (D, D), one per column.
        moments: Phi^T Phi itself, (D, D): what a residual is measured with.
        projected: Phi^T (Y - f0), (D, C).
        squares: ||Y - f0||^2, summed over the outputs.
        rows: of the kernel.
        examples: N.
        outputs: C.
        around: whether an f0 was given.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    moments: Tensor
    projected: Tensor
    squares: float
    rows: int
    examples: int
    outputs: int
    around: bool

    @classmethod
    def decompose(
        cls,
        features: FeatureKernel | Tensor,
        targets: Tensor | np.ndarray,
        *,
        prior: Tensor | np.ndarray | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PrimalRegression:
        """Read the features once.

        Cost: N D^2 in float64, and about 9 D^3; memory: 24 D^2 bytes and a block, and 16 D^2 are kept.

        Args:
            features: (N, D), used for every output, or (N*C, D), example-major.
            targets: Y, (N,) or (N, C).
            prior: f0(X), in the shape of Y; None for zero.
            progress: called with (rows read, rows in all).

        Raises:
            InputError: if a shape does not fit, or anything is not finite.
        """
        source = _as_features(features)
        shape = rows, size = source.shape[0], source.size
        system, examples, outputs = right_hand_sides("a matrix of features", shape, targets, prior)
        system = system.to(source.device)
        moments = torch.zeros(size, size, dtype=torch.float64, device=source.device)
        projected = torch.zeros(size, system.shape[1], dtype=torch.float64, device=source.device)
        for strip in strips(rows):
            block = source.features(strip).double()
            if not bool(torch.isfinite(block.sum())):
                raise InputError(f"features {strip.start} to {strip.stop - 1} are not finite (NaN or infinity)")
            moments.addmm_(block.T, block)
            projected.addmm_(block.T, system[strip])
            if progress is not None:
                progress(strip.stop, rows)
        eigenvalues, eigenvectors = _decomposed(moments)
        return cls(
            eigenvalues, eigenvectors, moments, projected, float(system.square().sum()), rows, examples, outputs,
            prior is not None,
        )  # fmt: skip

    @cached_property
    def rotated(self) -> Tensor:
        """eigenvectors^T Phi^T (Y - f0), (D, C)."""
        return self.eigenvectors.T @ self.projected

    @property
    def mean_diagonal(self) -> float:
        """Mean diagonal entry of the kernel, the unit of a relative ridge."""
        return float(self.moments.trace()) / self.rows

    def is_positive_definite(self, ridge: float) -> bool:
        """Whether the kernel plus this absolute ridge is positive definite to working precision."""
        # of more rows than features the kernel itself is singular
        least = 0.0 if self.rows > len(self.eigenvalues) else float(self.eigenvalues[-1])
        return least + ridge > self.rows * EPS * (float(self.eigenvalues[0]) + ridge)

    def require_positive_definite(self, ridge: float) -> None:
        """Refuse an absolute ridge that is too small.

        Raises:
            NotPositiveDefiniteError: with a ridge that helps.
        """
        if not self.is_positive_definite(ridge):
            largest = float(self.eigenvalues[0])
            enough = max(1e-10, 10 * self.rows * EPS) * largest or 1.0
            raise NotPositiveDefiniteError(
                f"a kernel of {self.rows} rows and {len(self.eigenvalues)} features is singular to working precision "
                f"with the ridge {ridge:.3e} (its largest eigenvalue is {largest:.3e}). A ridge that helps: "
                f"ridge=Absolute({enough:.1e})",
                smallest_eigenvalue=0.0,
                suggested_ridge=enough,
            )

    def gcv(self, ridge: float) -> float:
        """Generalized cross-validation for an absolute ridge: see `KernelRegression.gcv`.

        Raises:
            NotPositiveDefiniteError: if the ridge is too small.
        """
        self.require_positive_definite(ridge)
        # 1 - effective_dimension / rows, without the difference: the kernel has eigenvalues zero beyond the features'
        kept = self.eigenvalues[: self.rows]
        share = (float((ridge / (kept + ridge)).sum()) + self.rows - len(kept)) / self.rows
        return self.train_error(ridge) / share**2

    def expected_error(self, ridge: float) -> float:
        """GCV for an absolute ridge; infinite where the residual lives on so few modes that it says nothing.

        What examples miss that are left out is not known from one pass (see `KernelRegression.believed`). With as many
        modes as the root of the rows the score is an average of something; a repeated example alone is one.
        """
        kept = self.eigenvalues[: self.rows]
        left = torch.cat([ridge / (kept + ridge), kept.new_ones(self.rows - len(kept))])
        modes = float(left.sum()) ** 2 / float(left.square().sum())
        return self.gcv(ridge) if modes >= self.rows**0.5 else math.inf

    def train_error(self, ridge: float) -> float:
        """Mean over the examples of the squared training residual, summed over the outputs; absolute ridge."""
        shifted = self.eigenvalues[:, None] + ridge
        # ||(I - K (K + r)^-1) y||^2: what lies outside the features' span stays, what lies inside shrinks
        spanned = int(self._safe.isfinite().sum()) >= self.rows
        outside = 0.0 if spanned else self.squares - float((self.rotated.square() / self._safe[:, None]).sum())
        inside = float((self.rotated.square() / self._safe[:, None] * (ridge / shifted).square()).sum())
        return (max(outside, 0.0) + inside) / self.examples

    def effective_dimension(self, ridge: float) -> float:
        """Trace of K (K + ridge I)^-1 for an absolute ridge."""
        return float((self.eigenvalues / (self.eigenvalues + ridge)).sum())

    def weights(self, ridge: float) -> Tensor:
        """(Phi^T Phi + ridge I)^-1 Phi^T (Y - f0), (D, C), for an absolute ridge. Cost: 2 D^2 C."""
        self.require_positive_definite(ridge)
        return self.eigenvectors @ (self.rotated / (self.eigenvalues + ridge)[:, None])

    def fit(self, ridge: float | FixedRidge | SearchedRidge) -> PrimalFit:
        """The regression at one ridge: a number relative to the mean diagonal, or a ridge object such as GCV().

        Raises:
            InputError: if the ridge is searched for by leaving examples out, which needs the kernel.
            NotPositiveDefiniteError: if the ridge, or every ridge of the grid, is too small.
        """
        rule = as_ridge(ridge)
        fixed = rule.choose(self) if isinstance(rule, SearchedRidge) else rule  # pyright: ignore[reportArgumentType]
        value = fixed.absolute(self.mean_diagonal)
        weights = self.weights(value)
        residual = self.moments @ weights + value * weights - self.projected
        norm = float(self.projected.norm())
        return PrimalFit(
            weights=weights,
            ridge=value,
            relative_ridge=value / self.mean_diagonal if self.mean_diagonal > 0 else 0.0,
            relative_residual=float(residual.norm()) / norm if norm else 0.0,
            gcv=self.gcv(value),
            train_error=self.train_error(value),
            effective_dimension=self.effective_dimension(value),
            outputs=self.outputs,
            around=self.around,
        )

    def leave_one_out(self, ridge: float) -> float:
        """Not known from one pass.

        Raises:
            InputError: always.
        """
        raise InputError(
            "leave-one-out errors need the kernel, and here only its features are read: search the ridge with GCV()"
        )

    @property
    def _safe(self) -> Tensor:
        """Eigenvalues, infinite where they cannot be told from zero: there `rotated` is rounding."""
        floor = len(self.eigenvalues) * EPS * self.eigenvalues[0]
        return torch.where(self.eigenvalues > floor, self.eigenvalues, torch.inf)


def _decomposed(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not negative, and eigenvectors; the moments are as before."""
    if moments.device.type != "cpu":
        values, vectors = torch.linalg.eigh(moments)
    else:
        # LAPACK works in one triangle and the diagonal, and never looks at the other triangle: no second copy
        diagonal = moments.diagonal().clone()
        found = eigh(moments.numpy().T, lower=True, driver="evr", overwrite_a=True, check_finite=False)
        values, vectors = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        for strip in strips(len(moments)):
            moments[strip, strip.stop :] = moments[strip.stop :, strip].T
            own = moments[strip, strip].tril(-1)
            moments[strip, strip] = own + own.T
        moments.diagonal().copy_(diagonal)
    return values.flip(0).clamp_(min=0), vectors.flip(1)


def _as_features(features: FeatureKernel | Tensor) -> FeatureKernel:
    if isinstance(features, FeatureKernel):
        return features
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"features are a FeatureKernel or a floating point tensor (rows, D): got {got}")
    return FeatureKernel(features.detach())
