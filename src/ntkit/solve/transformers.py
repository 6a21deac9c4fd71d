"""Kernel functions as steps of a scikit-learn pipeline, in front of any estimator that takes kernels or features.

    make_pipeline(StandardScaler(), KernelMatrix(RBF(2.0)), SVC(kernel="precomputed"))
    make_pipeline(StandardScaler(), KernelFeatures(RBF(2.0), landmarks=200), LogisticRegression())

The examples of the fit are remembered, so that cross-validation splits examples, not a matrix, and a grid can hold
kernels: GridSearchCV(pipeline, {"kernelmatrix__kernel": [RBF(1.0), InfiniteWidth(model)], "svc__C": [1, 10]}).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ntkit.errors import InputError
from ntkit.kernel.closed import RBF
from ntkit.kernel.explicit import FeatureFunction, Nystrom
from ntkit.kernel.function import KernelFunction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class _Transformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What both share: arrays in, examples of a kernel function out."""

    kernel: KernelFunction | None
    shape: Sequence[int] | None
    dtype: torch.dtype | None
    device: torch.device | str | None

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        assert tags.transformer_tags is not None
        tags.transformer_tags.preserves_dtype = ["float64", "float32"] if self.dtype is None else []
        return tags

    def _examples(self, X: Any, *, reset: bool) -> Tensor:
        """X as a tensor (N, ...), checked."""
        # of one example alone no distance can be taken
        least = 2 if reset and self.kernel is None else 1
        checked = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=least)
        # what comes later meets the examples of the fit, and is of their type
        x = torch.tensor(checked, dtype=self.dtype if reset else self._dtype, device=self.device)
        if reset:
            self._dtype = x.dtype
        if self.shape is None:
            return x
        if x[0].numel() != np.prod(self.shape, dtype=int):
            raise InputError(f"X has {x.shape[1]} features, and they are to be examples of shape {tuple(self.shape)}")
        return x.reshape(-1, *self.shape)

    def _function(self, x: Tensor) -> KernelFunction:
        """The kernel function that was given, or an RBF as wide as the data."""
        if self.kernel is None:
            return RBF.median(x)
        if not isinstance(self.kernel, KernelFunction):
            raise InputError(
                f"kernel is a KernelFunction such as RBF(1.0), or None: got {type(self.kernel).__name__}. Of a network "
                "made by linearize take Empirical(tangent)"
            )
        return self.kernel


class KernelMatrix(_Transformer):
    """Examples become their kernel with the examples of the fit, for estimators with kernel="precomputed".

    Args:
        kernel: a kernel function of one scalar per example; None for an RBF with the median distance of the fit.
        shape: of one example, where it is not a vector: rows of X are reshaped to it, (1, 28, 28) for example.
        dtype: of the examples, as the kernel function wants them; None for that of the X of the fit (float64 or
            float32), which later ones are cast to.
        device: where the examples go.

    Attributes:
        kernel_: the kernel function used.
        X_fit_: the examples of the fit, a tensor.
        n_features_in_, feature_names_in_: as in scikit-learn.
    """

    def __init__(
        self,
        kernel: KernelFunction | None = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.kernel = kernel
        self.shape = shape
        self.dtype = dtype
        self.device = device

    def fit(self, X: Any, y: Any = None) -> KernelMatrix:
        """Remember the examples X, (N, features).

        Raises:
            InputError: if X or the kernel cannot be used.
        """
        self.X_fit_ = self._examples(X, reset=True)
        self.kernel_ = self._function(self.X_fit_)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The kernel between M examples and those of the fit, (M, N).

        Raises:
            InputError: if X does not fit, or the kernel has several rows per example.
        """
        check_is_fitted(self)
        return self._matrix(self._examples(X, reset=False), self.X_fit_)

    def fit_transform(self, X: Any, y: Any = None, **params: Any) -> np.ndarray:
        """The symmetric kernel of the examples of the fit, (N, N); cheaper than `fit(X).transform(X)`.

        Raises:
            InputError: as `fit` and `transform`.
        """
        self.fit(X)
        return self._matrix(self.X_fit_, None)

    @torch.no_grad()
    def _matrix(self, rows: Tensor, cols: Tensor | None) -> np.ndarray:
        kernel = self.kernel_(rows, cols)
        _require_one(kernel.shape[0], len(rows))
        return kernel.dense().cpu().numpy()

    @property
    def _n_features_out(self) -> int:
        return len(self.X_fit_)


class KernelFeatures(_Transformer):
    """Examples become features of a kernel, for linear estimators, in time that is linear in the examples.

    Args:
        kernel: a function with features (`RandomFourier`, `Sketched`, `Features`, ...), or any other kernel function of
            one scalar per example, whose Nystrom features are taken; None for an RBF with the median distance.
        landmarks: for Nystrom features so many examples are drawn from the fit, all if there are fewer.
        shape: as for `KernelMatrix`.
        dtype: as for `KernelMatrix`.
        device: as for `KernelMatrix`.
        random_state: draws the landmarks.

    Attributes:
        features_: the function whose features are taken.
        n_features_in_, feature_names_in_: as in scikit-learn.
    """

    def __init__(
        self,
        kernel: KernelFunction | None = None,
        *,
        landmarks: int = 100,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.kernel = kernel
        self.landmarks = landmarks
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> KernelFeatures:
        """Draw the landmarks, where the kernel has no features of its own.

        Raises:
            InputError: if X, the kernel or the number of landmarks cannot be used.
        """
        x = self._examples(X, reset=True)
        function = self._function(x)
        if not isinstance(function, FeatureFunction):
            if not isinstance(self.landmarks, (int, np.integer)) or self.landmarks < 1:
                raise InputError(f"landmarks is a number of examples, 1 or more: got {self.landmarks!r}")
            seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
            generator, size = torch.Generator().manual_seed(seed), min(int(self.landmarks), len(x))
            function = Nystrom.drawn(function, x, size, generator=generator)
        self.features_ = function
        self._n_features_out = self._of(x[:1]).shape[1]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features (M, D).

        Raises:
            InputError: if X does not fit, or there are several rows per example.
        """
        check_is_fitted(self)
        return self._of(self._examples(X, reset=False))

    @torch.no_grad()
    def _of(self, x: Tensor) -> np.ndarray:
        found = self.features_.features(x)
        _require_one(len(found), len(x))
        return found.cpu().numpy()


def _require_one(rows: int, examples: int) -> None:
    """Refuse kernels of several rows per example: scikit-learn knows one.

    Raises:
        InputError: with what to take instead.
    """
    if rows != examples:
        raise InputError(
            f"scikit-learn knows one row per example, and this kernel has {rows // examples}: take trace=True, or a "
            "read-out of one scalar such as SumOfLogits()"
        )
