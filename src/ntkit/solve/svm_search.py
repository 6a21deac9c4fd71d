"""A support vector machine on an infinitely wide fully connected network whose depth, fixed layers and C are searched.

The recipe for small data of Arora et al. 2020 (arXiv 1910.01663) as a scikit-learn classifier: kernels of all depths
and numbers of fixed layers come from one pass, every one is tried with every C on held-out examples, and the best is
fitted to all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import BaseCrossValidator, StratifiedKFold
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ntkit.errors import InputError
from ntkit.kernel.fully_connected import FullyConnected, family
from ntkit.solve.estimators import NTKClassifier, as_array
from ntkit.solve.svm import DEFAULT_CS, SVM, require_cs, search, steps_for

Split = tuple[np.ndarray, np.ndarray]
FOLDS = 5  # scikit-learn's own number


class NTKSVMSearch(ClassifierMixin, BaseEstimator):
    """An NTK machine whose depth, fixed layers and C are chosen on held-out examples.

    Features should be of order one: put a `StandardScaler` before it. Of equal accuracies the shallowest network wins,
    then the one with the fewest fixed layers, then the smallest C.

    Args:
        depths: numbers of linear layers to try, ascending; 1 is a linear model.
        Cs: values of C to try, ascending.
        cv: how examples are held out: a number of stratified folds, None for 5, fewer where a class has fewer examples;
            a scikit-learn splitter, `PredefinedSplit` for one cut of your own; or a list of (training, held-out)
            numbers, which have none in common.
        relative: whether C is in units of 1 / (mean diagonal entry of the training kernel), as in `SVM`.
        weight_std: of the weights, as in `FullyConnected`.
        bias_std: of the biases.
        scaled_inputs: whether the first layer divides by the square root of its number of inputs. The study's code has
            relative=False, weight_std=1 and scaled_inputs=False.
        max_iter: LIBSVM's steps at most in each pair of classes; None for 5e8 / (number of examples), which is some
            seconds, -1 for no limit. Machines that reach it are scored as they are and counted in `grid_.stopped`; if
            the chosen one does, scikit-learn's ConvergenceWarning says so.
        random_state: shuffles the examples before stratified folds are cut.
        progress: called with (kernels done, kernels in all).

    Attributes:
        best_params_: depth, fixed and C. best_score_: accuracy on held-out examples, the mean of the splits.
        grid_: every accuracy, a `Grid`. scores_: the same by depth, fixed layers and C, NaN where there is no network.
        classifier_: the `NTKClassifier` with the best kernel and C, fitted to all examples.
        n_iter_: LIBSVM's steps in the longest of its pairs of classes.
        classes_, n_features_in_, feature_names_in_: as in scikit-learn.

    Cost of a fit: max(depths) + 4 matrices (N, N) in float64, and len(Cs) machines at most for each kernel and split.
    """

    def __init__(  # noqa: PLR0913  (an estimator's parameters are its constructor's)
        self,
        depths: Sequence[int] = (1, 2, 3, 4, 5),
        Cs: Sequence[float] = DEFAULT_CS,
        *,
        cv: int | BaseCrossValidator | Sequence[Split] | None = 5,
        relative: bool = True,
        weight_std: float = math.sqrt(2),
        bias_std: float = 0.0,
        scaled_inputs: bool = True,
        max_iter: int | None = None,
        random_state: int | np.random.RandomState | None = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.depths = depths
        self.Cs = Cs
        self.cv = cv
        self.relative = relative
        self.weight_std = weight_std
        self.bias_std = bias_std
        self.scaled_inputs = scaled_inputs
        self.max_iter = max_iter
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any) -> NTKSVMSearch:
        """Search, and fit the best to all examples (N, features) and classes (N,).

        Raises:
            InputError: if an argument cannot be used, or there is one class only.
        """
        X, y = validate_data(self, as_array(X), as_array(y), dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"a classifier needs at least two classes: y has one class, {self.classes_[0]!r}")
        depths, cs = _depths(self.depths), require_cs(self.Cs)
        splits = held_out(self.cv, X, codes, self.random_state)
        columns = np.unique(np.concatenate([train for train, _ in splits]))
        members = family(
            torch.tensor(X), depths, columns=torch.from_numpy(columns), weight_std=self.weight_std,
            bias_std=self.bias_std, scaled_inputs=self.scaled_inputs,
        )  # fmt: skip
        kernels = (((m.function.depth, m.function.fixed), m.matrix.numpy()) for m in members)
        every, tell = sum(depths), self.progress
        most = steps_for(len(X)) if self.max_iter is None else self.max_iter
        self.grid_ = search(
            kernels, codes, splits, cs, columns=columns, relative=self.relative, max_iter=most,
            progress=None if tell is None else lambda done: tell(done, every),
        )  # fmt: skip
        self.scores_ = np.full((len(depths), max(depths), len(cs)), np.nan)
        for (depth, fixed), row in zip(self.grid_.labels, self.grid_.accuracies, strict=True):
            self.scores_[depths.index(depth), fixed] = row
        (depth, fixed), c = self.grid_.best
        self.best_params_ = {"depth": depth, "fixed": fixed, "C": c}
        self.best_score_ = self.grid_.best_accuracy
        function = FullyConnected(depth, fixed, self.weight_std, self.bias_std, self.scaled_inputs)
        self.classifier_ = NTKClassifier(function, head=SVM(c, self.relative, max_iter=most)).fit(X, y)
        self.n_iter_ = int(np.max(self.classifier_.machine_.n_iter_))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The class of each example, (M,)."""
        x = self._read(X)
        return self.classifier_.predict(x)

    def decision_function(self, X: Any) -> np.ndarray:
        """That of scikit-learn's `SVC`: (M, C), or (M,) for two classes."""
        x = self._read(X)
        return self.classifier_.decision_function(x)

    def _read(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return np.asarray(validate_data(self, as_array(X), reset=False, dtype=np.float64))


def _depths(depths: Sequence[int]) -> tuple[Any, ...]:
    """Depths as a tuple, NumPy's integers as Python's; `family` looks at the numbers."""
    if isinstance(depths, str) or not isinstance(depths, Iterable):
        raise InputError(f"depths are ascending numbers of linear layers, such as (1, 2, 3): got {depths!r}")
    return tuple(int(depth) if isinstance(depth, np.integer) else depth for depth in depths)


def held_out(
    cv: int | BaseCrossValidator | Sequence[Split] | None,
    X: np.ndarray,
    codes: np.ndarray,
    random_state: int | np.random.RandomState | None = 0,
) -> list[Split]:
    """Training and held-out examples of every split, as numbers.

    Raises:
        InputError: if there are too few examples to hold some out, an example of a list is trained on and held out, or
            `cv` is something else.
    """
    cv = FOLDS if cv is None else cv
    if isinstance(cv, Integral) and not isinstance(cv, bool):
        folds = min(int(cv), int(np.bincount(codes).max()))
        if folds < 2:
            raise InputError(f"cv is a number of folds, 2 or more, with a class of as many examples: got {cv!r}")
        cutter = StratifiedKFold(folds, shuffle=True, random_state=random_state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes with fewer examples than folds
            splits = list(cutter.split(X, codes))
        splits = [(train, held) for train, held in splits if len(np.unique(codes[train])) > 1]
        if not splits:
            raise InputError(
                "every fold leaves one class only to train on: give cv splits of your own, or more examples"
            )
        return splits
    found: Any = cv
    splitter = hasattr(cv, "split") and not isinstance(cv, str)
    if splitter:
        found = found.split(X, codes)
    try:
        splits = [(np.asarray(train), np.asarray(held)) for train, held in found]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"cv is a number of folds, a scikit-learn splitter, or a list of (training, held-out) numbers: got {cv!r}"
        ) from error
    parts = [part for pair in splits for part in pair]
    if not parts or any(part.ndim != 1 or part.dtype.kind not in "iu" or not len(part) for part in parts):
        raise InputError("every split of cv has numbers of training and of held-out examples, and at least one of each")
    if any(int(part.max()) >= len(codes) or int(part.min()) < 0 for part in parts):
        raise InputError(f"a split of cv names an example that is not there: there are {len(codes)}")
    for train, held in [] if splitter else splits:  # a splitter may mean it
        shared = np.intersect1d(train, held)
        if len(shared):
            raise InputError(
                f"a split of cv has {len(shared)} examples both to train on and held out, such as {shared[0]}: their "
                "accuracy says nothing of new ones"
            )
    return splits
