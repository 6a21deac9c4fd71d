"""Kernel gradient flow: what training with the square loss does to every prediction, in closed form.

For a kernel K = U diag(l) U^T that stays as it is, and the first residual r0 = Y - f0(X),

    f_t(X) = Y - U left(l) U^T r0,       f_t(x) = f0(x) + K(x, X) U moved(l) U^T r0

where `left` and `moved` say how far training has come (`ntkit.solve.course`): for gradient flow left = exp(-l t). Any
kernel of the library will do: full, reduced, sketched, from disk (Jacot et al. 2018; Lee et al. 2019).

Losses are 1/2 ||f(x_n) - y_n||^2, summed over the outputs. Over the examples their *mean* is trained by default, as
torch does; `mean=False` trains their sum, for which the same learning rate goes N times as far. (`torch.nn.MSELoss`
means over the outputs as well and has no 1/2: its learning rate is C/2 times the one meant here.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.course import Course, GradientFlow
from ntkit.solve.regression import KernelRegression, evaluate
from ntkit.solve.symmetric import as_kernel, as_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from ntkit.kernel.base import Kernel


@dataclass(frozen=True, eq=False)
class Stop:
    """Where along a path the estimated error on new examples is least.

    Attributes:
        course: the one with the least score.
        gcv: that score, an estimate of the squared error summed over the outputs.
        courses: all that were looked at.
        scores: of each, (courses,): GCV where it can be believed (`KernelFlow.expected_error`).
    """

    course: Course
    gcv: float
    courses: tuple[Course, ...]
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Ensemble:
    """A Gaussian process: what networks say that differ by their first weights alone.

    Attributes:
        mean: of the predictions on M examples, (M, C).
        covariance: (M, M), the same for every output; or (M*C, M*C), example-major, for a full kernel.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each prediction, (M, C)."""
        own = self.covariance.diagonal().clamp_min(0).sqrt()  # rounding leaves it slightly negative where all agree
        return own.reshape(len(self.mean), -1).expand_as(self.mean)


@dataclass(frozen=True, eq=False)
class KernelFlow:
    """Training with a kernel that stays as it is; every time and every number of steps from one eigendecomposition.

    Made by `KernelFlow.decompose`.

    Attributes:
        regression: the decomposed kernel, with Y - f0(X).
        mean: whether the mean of the examples' losses is trained, or their sum.
    """

    regression: KernelRegression
    mean: bool = True

    @classmethod
    def decompose(
        cls,
        kernel: Kernel | Tensor | np.ndarray,
        targets: Tensor | np.ndarray,
        *,
        prior: Tensor | np.ndarray | None = None,
        mean: bool = True,
    ) -> KernelFlow:
        """Decompose the kernel between the training examples. Cost: about 9 n^3; memory: 24 n^2 bytes at the peak.

        Args:
            kernel: (N, N), used for every output, or (N*C, N*C), example-major.
            targets: Y, (N,) or (N, C), real numbers; classes are one_hot(y, C).double().
            prior: f0(X), the network's outputs before training; None for zero.
            mean: train the mean of the losses over the examples, not their sum.

        Raises:
            InputError: if a shape does not fit, anything is not finite, or targets are whole numbers (N,), which may
                be classes or points.
        """
        y = as_tensor(targets)
        if y.ndim == 1 and not y.is_floating_point():
            raise InputError(
                f"targets of type {y.dtype} may be classes or points: pass torch.nn.functional.one_hot(y, C).double(), "
                "or y.double()"
            )
        return cls(KernelRegression.decompose(kernel, targets, prior=prior), mean)

    @property
    def eigenvalues(self) -> Tensor:
        """Rates at which the modes are learned, ascending: eigenvalues of K, over N for the mean loss, (n,)."""
        values = self.regression.eigenvalues.clamp_min(0)  # rounding may leave the last ones slightly negative
        return values * self._scale

    @property
    def _scale(self) -> float:
        return self.regression.outputs / self.regression.targets.numel() if self.mean else 1.0

    def residuals(self, course: Course) -> Tensor:
        """Y - f_t(X), (N, C)."""
        left = self._finite(course.left(self.eigenvalues), course)
        return self._by_example(self.regression.eigenvectors @ (left[:, None] * self.regression.rotated))

    def coefficients(self, course: Course) -> Tensor:
        """What K(x, X) is multiplied by: f_t(x) - f0(x) = K(x, X) a, (N, C).

        For a full kernel the parameters have moved by J^T a (`tangent.vjp(x, a)`).
        """
        moved = self._finite(course.moved(self.eigenvalues), course) * self._scale
        return self._by_example(self.regression.eigenvectors @ (moved[:, None] * self.regression.rotated))

    def predict(
        self,
        cross: Kernel | Tensor | np.ndarray,
        course: Course,
        prior: Tensor | np.ndarray | None = None,
    ) -> Tensor:
        """f_t on M examples, (M, C), float64.

        Args:
            cross: the kernel between them (rows) and the training examples (columns): (M, N), or (M*C, N*C).
            course: how far training has come.
            prior: f0 on them, (M, C); given exactly when the flow was given one.

        Raises:
            InputError: if shapes do not fit, `prior` is missing or superfluous, or training has diverged.
        """
        return evaluate(
            cross, self.coefficients(course), prior, full=self.regression.full, around=self.regression.around
        )

    def loss(self, course: Course) -> float:
        """The training loss that is left: 1/2 ||Y - f_t(X)||^2, mean or sum over the examples."""
        left = self._finite(course.left(self.eigenvalues), course)
        total = 0.5 * float((left[:, None] * self.regression.rotated).square().sum())
        return total * self._scale

    def displacement(self, course: Course) -> float:
        """||theta_t - theta_0||: how far the parameters of the linear model have moved, for its own kernel J J^T.

        For a reduced kernel k, used as k (x) I, it is that of a model with such a kernel.
        """
        moved = self._finite(course.moved(self.eigenvalues), course)[:, None] * self.regression.rotated
        return float((moved.square() * self.eigenvalues[:, None]).sum() * self._scale) ** 0.5

    def gcv(self, course: Course) -> float:
        """Generalized cross-validation of the fit so far: an estimate of the squared error on new examples.

            mean_n ||(left r0)_n||^2 / (mean left)^2

        Training for a while is linear in the residual, as ridge regression is, and the same score applies; what is said
        at `KernelRegression.gcv` on labels that the kernel has seen, on full kernels and on repeated examples, holds
        here too.
        """
        return self._gcv(self._left(course))

    def expected_error(self, course: Course) -> float:
        """GCV where it can be believed, else what examples miss that are left out; cost: n^2 (C + 1).

        See `KernelRegression.believed`: late in training the score may be small by chance.
        """
        left = self._left(course)
        return self.regression.believed(self._gcv(left), left)

    def _left(self, course: Course) -> Tensor:
        """What is left of every mode, up to one factor: it cancels in GCV, and late in training this is not 0 / 0."""
        left = self._finite(course.left(self.eigenvalues), course)
        largest = float(left.abs().max())
        return left / largest if largest > 0 else left

    def _gcv(self, left: Tensor) -> float:
        examples = self.regression.targets.numel() // self.regression.outputs
        squares = float((left[:, None] * self.regression.rotated).square().sum()) / examples
        mean = float(left.mean())
        return squares / mean**2 if mean else float("inf")  # nothing is left to estimate from

    def best(self, courses: Iterable[Course] | None = None) -> Stop:
        """Early stopping without a validation set: the course with the least expected error.

        That is GCV where it can be believed, as `expected_error` says.

        Args:
            courses: those to look at; gradient flow at `times()` by default.

        Raises:
            InputError: if there is none, or the error is known on none.

        Cost: n^2 (C + 1) for each.
        """
        found = tuple(map(GradientFlow, self.times().tolist()) if courses is None else courses)
        if not found:
            raise InputError("best needs at least one course: got none")
        scores = torch.tensor([self.expected_error(course) for course in found], dtype=torch.float64)
        least = int(scores.argmin())
        if not float(scores[least]) < math.inf:
            raise InputError("the error is known on none of these courses: look at earlier ones, or hold examples out")
        return Stop(found[least], float(scores[least]), found, scores)

    def times(self, count: int = 200) -> Tensor:
        """Times from where nothing has been learned to where everything has, evenly on a log scale, (count,).

        Raises:
            InputError: if the kernel is zero.
        """
        values = self.eigenvalues
        largest = float(values.max())
        if not largest > 0:
            raise InputError("the kernel is zero: nothing is ever learned")
        smallest = float(values[values > 1e-12 * largest].min())
        return torch.logspace(math.log10(0.01 / largest), math.log10(20 / smallest), count, dtype=torch.float64)

    def largest_learning_rate(self, momentum: float = 0.0, *, nesterov: bool = False) -> float:
        """Full-batch steps converge below this learning rate, and diverge above it.

        2 (1 + momentum) / l_max, and with Nesterov's momentum 2 (1 + momentum) / ((1 + 2 momentum) l_max).

        Raises:
            InputError: if `momentum` is not in [0, 1), or the kernel is zero.
        """
        if not 0 <= momentum < 1:
            raise InputError(f"momentum: got {momentum!r}, expected 0 <= momentum < 1")
        largest = float(self.eigenvalues.max())
        if not largest > 0:
            raise InputError("the kernel is zero: nothing is ever learned, at any learning rate")
        factor = 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)
        return factor / largest

    def covariance(
        self,
        course: Course,
        cross: Kernel | Tensor | np.ndarray,
        first: Kernel | Tensor | np.ndarray,
        first_cross: Kernel | Tensor | np.ndarray,
        first_test: Kernel | Tensor | np.ndarray,
    ) -> Tensor:
        """Covariance over an ensemble of what networks predict on M examples, each trained from its own f0.

        With F = K(x, X) U moved U^T the predictions are f0(x) + F (Y - f0(X)), and f0 has the covariance `first`
        (the NNGP kernel, for networks of infinite width; Lee et al. 2019, equation 16):

            first_test - F first_cross^T - first_cross F^T + F first F^T

        Args:
            course: how far training has come.
            cross: the kernel between the M examples and the training examples, (M, N) or (M*C, N*C).
            first: covariance of f0 on the training examples, square like the kernel.
            first_cross: of f0 between the M and the training examples, like `cross`.
            first_test: of f0 on the M examples, square.

        Raises:
            InputError: if shapes do not fit.
        """
        moved = self._finite(course.moved(self.eigenvalues), course) * self._scale
        k, k0, k01, k1 = (
            as_kernel(one).dense().to("cpu", torch.float64) for one in (cross, first, first_cross, first_test)
        )
        n, m = self.regression.matrix.size, len(k)
        for name, got, expected in (
            ("cross", k.shape, (m, n)), ("first", k0.shape, (n, n)), ("first_cross", k01.shape, (m, n)),
            ("first_test", k1.shape, (m, m)),
        ):  # fmt: skip
            if tuple(got) != expected:
                raise InputError(f"{name}: expected shape {expected}, got {tuple(got)}")
        vectors = self.regression.eigenvectors.cpu()
        weights = ((k @ vectors) * moved.cpu()) @ vectors.T
        shared = weights @ k01.T
        return k1 - shared - shared.T + weights @ k0 @ weights.T

    def ensemble(
        self,
        course: Course,
        cross: Kernel | Tensor | np.ndarray,
        first: Kernel | Tensor | np.ndarray,
        first_cross: Kernel | Tensor | np.ndarray,
        first_test: Kernel | Tensor | np.ndarray,
    ) -> Ensemble:
        """What an ensemble of wide networks says on M examples: the NTK-GP (Lee et al. 2019, equations 15 and 16).

        Each network starts at its own f0, of mean zero and covariance `first`, and is trained with the same kernel. The
        flow itself is that of the mean, so it is decomposed without a `prior`. Arguments are those of `covariance`.

        Raises:
            InputError: if shapes do not fit, or the flow was given one network's f0.
        """
        if self.regression.around:
            raise InputError("an ensemble has no one f0: decompose the flow without `prior`")
        mean = self.predict(cross, course)
        spread = self.covariance(course, cross, first, first_cross, first_test)
        return Ensemble(mean, spread)

    def _by_example(self, columns: Tensor) -> Tensor:
        return columns.reshape(-1, self.regression.outputs)

    def _finite(self, values: Tensor, course: Course) -> Tensor:
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                f"{course} diverges until its numbers overflow: the largest learning rate that converges is "
                f"{self.largest_learning_rate():.3g} without momentum"
            )
        return values
