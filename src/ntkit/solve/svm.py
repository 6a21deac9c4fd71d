"""Support vector machines on a kernel: one fit, and a search over kernels and C.

The solver is scikit-learn's `SVC` (LIBSVM) on a precomputed matrix; several classes are decided pair by pair. A number
C alone means little: C and a kernel a times as large give the fit of a C and the kernel. So C is *relative* here as a
ridge is: LIBSVM is given C / (mean diagonal entry of the training kernel), and the same C means the same for every
depth and width. `relative=False` gives LIBSVM the number as it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import SVC

from ntkit.errors import InputError

# 10^-2 to 10^4, as in the study of small data by Arora et al. 2020.
DEFAULT_CS = tuple(10.0**power for power in range(-2, 5))
# LIBSVM goes through the matrix itself as long as it fits, and this many MB hold the rows of 3,500 examples.
CACHE_MB = 200
# Kernel entries that LIBSVM may go through in one pair of classes, some seconds: a linear kernel with a large C on
# classes that overlap goes on for hours otherwise.
ENTRIES = 500_000_000


@dataclass(frozen=True)
class SVM:
    """The head of a classifier: a support vector machine on the kernel, in the place of ridge regression.

    Attributes:
        C: what an example on the wrong side of its margin costs; large values fit the training data, small ones smooth.
        relative: whether C is in units of 1 / (mean diagonal entry of the training kernel).
        class_weight: None, "balanced" (C of a class inversely to its frequency), or by label what C is multiplied with;
            labels that are left out have 1.
        max_iter: LIBSVM's steps at most, in each pair of classes; -1 for no limit.
    """

    C: float = 1.0
    relative: bool = True
    class_weight: str | dict[Any, float] | None = None
    max_iter: int = -1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if C is not positive, or another argument cannot be used.
        """
        require_cs([self.C])
        steps = self.max_iter
        if not isinstance(steps, Integral) or isinstance(steps, bool) or (steps < 1 and steps != -1):
            raise InputError(f"max_iter is a number of steps, 1 or more, or -1 for no limit: got {steps!r}")
        if self.class_weight not in (None, "balanced") and not isinstance(self.class_weight, dict):
            raise InputError(f"class_weight is None, 'balanced' or a dict: got {self.class_weight!r}")
        weights = self.class_weight.values() if isinstance(self.class_weight, dict) else ()
        if any(isinstance(w, bool) or not isinstance(w, Real) or not 0 < float(w) < math.inf for w in weights):
            raise InputError(f"the weights of classes are positive numbers: got {self.class_weight!r}")

    def absolute(self, matrix: np.ndarray) -> float:
        """What LIBSVM is given as C for this training kernel.

        Raises:
            InputError: if C is relative and the mean diagonal entry is not positive.
        """
        if not self.relative:
            return float(self.C)
        mean = float(np.diagonal(matrix).mean())
        if not 0 < mean < math.inf:
            raise InputError(
                f"a relative C needs a kernel with a positive mean diagonal: got {mean:.3e}; SVM(C, relative=False) is "
                "given to the solver as it is"
            )
        return float(self.C) / mean

    def fit(self, matrix: np.ndarray, y: np.ndarray, classes: np.ndarray | None = None) -> SVC:
        """The machine of a training kernel (N, N), float64, and labels (N,).

        Memory: LIBSVM copies the matrix. Cost: between N^2 and N^3, more for a large C and classes that overlap.

        Args:
            matrix: see above.
            y: labels; with `classes`, places of the labels among these.
            classes: all labels, sorted, where y has their places.

        Raises:
            InputError: if `class_weight` names a label that is not there, or see `absolute`.
        """
        labels = np.unique(y) if classes is None else classes
        machine = SVC(
            C=self.absolute(matrix), kernel="precomputed", class_weight=self._weights(labels, classes is not None),
            max_iter=self.max_iter, cache_size=CACHE_MB,
        )  # fmt: skip
        return machine.fit(matrix, y)

    def _weights(self, labels: np.ndarray, places: bool) -> str | dict[Any, float] | None:
        """`class_weight` for LIBSVM: by label, or by place among the labels."""
        if not isinstance(self.class_weight, dict):
            return self.class_weight
        known = {label: place if places else label for place, label in enumerate(labels.tolist())}
        unknown = [label for label in self.class_weight if label not in known]
        if unknown:
            raise InputError(f"class_weight names {unknown[0]!r}, and the classes are {', '.join(map(repr, known))}")
        return {known[label]: weight for label, weight in self.class_weight.items()}


def steps_for(examples: int) -> int:
    """LIBSVM's steps in which it goes through `ENTRIES` of the kernel of so many examples."""
    return max(1, ENTRIES // examples)


@dataclass(frozen=True)
class Grid:
    """Accuracies of a search over kernels and C.

    Attributes:
        labels: of the kernels, in the order in which they came.
        Cs: ascending.
        accuracies: mean over the splits, (kernels, Cs).
        fits: how many machines were fitted.
        stopped: how many of these reached `max_iter`.
    """

    labels: tuple[Any, ...]
    Cs: tuple[float, ...]
    accuracies: np.ndarray
    fits: int = 0
    stopped: int = 0

    @property
    def best(self) -> tuple[Any, float]:
        """The label and the C of the largest accuracy; of equal ones the first, kernels before Cs."""
        kernel, c = np.unravel_index(int(self.accuracies.argmax()), self.accuracies.shape)
        return self.labels[int(kernel)], self.Cs[int(c)]

    @property
    def best_accuracy(self) -> float:
        """The accuracy of `best`."""
        return float(self.accuracies.max())


@dataclass
class _Counter:
    fits: int = field(default=0)
    stopped: int = field(default=0)


def search(
    kernels: Iterable[tuple[Hashable, np.ndarray]],
    y: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    Cs: Sequence[float] = DEFAULT_CS,
    *,
    columns: np.ndarray | None = None,
    relative: bool = True,
    max_iter: int = -1,
    progress: Callable[[int], None] | None = None,
) -> Grid:
    """Accuracy of an SVM with each kernel and each C, on examples held out.

    A machine in which no example is at its bound C has found the widest margin, and larger Cs give it again: they are
    not fitted.

    Args:
        kernels: (label, matrix) one after another; the matrix is between all N examples and those of the columns.
        y: labels, (N,).
        splits: numbers of the training and of the held-out examples, one pair for each split.
        Cs: ascending.
        columns: numbers of the examples that make the columns, all training examples among them; None for all.
        relative: as for `SVM`.
        max_iter: as for `SVM`; fits that reach it are counted, and scored as they are.
        progress: called with the number of kernels that are done.

    Raises:
        InputError: if the Cs are not positive and ascending, or a training set has one class only.
    """
    values = require_cs(Cs)
    if list(values) != sorted(set(values)):
        raise InputError(f"the values of C are ascending: got {Cs!r}")
    for train, _ in splits:
        if len(np.unique(y[train])) < 2:
            raise InputError("the training examples of a split have one class only: stratify the splits")
    place = np.full(len(y), -1)
    numbers = np.arange(len(y)) if columns is None else columns
    place[numbers] = np.arange(len(numbers))
    if any((place[train] < 0).any() for train, _ in splits):
        raise InputError("a training example of a split is not among the columns")
    labels, rows, counter = [], [], _Counter()
    for label, matrix in kernels:
        scores = [
            _scores(
                matrix[np.ix_(train, place[train])], matrix[np.ix_(held, place[train])], y[train], y[held],
                [SVM(c, relative, None, max_iter) for c in values], counter,
            )
            for train, held in splits
        ]  # fmt: skip
        labels.append(label)
        rows.append(np.mean(scores, axis=0))
        if progress is not None:
            progress(len(labels))
    if not labels:
        raise InputError("a search needs at least one kernel")
    return Grid(tuple(labels), values, np.array(rows), counter.fits, counter.stopped)


def _scores(
    kernel: np.ndarray, cross: np.ndarray, y: np.ndarray, held: np.ndarray, heads: Sequence[SVM], counter: _Counter
) -> list[float]:
    found: list[float] = []
    for head in heads:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
            machine = head.fit(kernel, y)
        stopped = bool(machine.fit_status_)
        counter.fits += 1
        counter.stopped += stopped
        found.append(float((machine.predict(cross) == held).mean()))
        if not stopped and float(np.abs(np.asarray(machine.dual_coef_)).max()) < (1 - 1e-9) * machine.C:
            break
    return found + found[-1:] * (len(heads) - len(found))


def require_cs(Cs: Sequence[float]) -> tuple[float, ...]:
    """The values of C as numbers.

    Raises:
        InputError: if there are none, or one is not a positive number.
    """
    if isinstance(Cs, str) or not isinstance(Cs, Iterable):
        raise InputError(f"the values of C are a list of positive numbers: got {Cs!r}")
    values = list(Cs)
    if not values or any(isinstance(c, bool) or not isinstance(c, Real) or not 0 < float(c) < math.inf for c in values):
        raise InputError(f"C is a positive number: got {', '.join(map(repr, values)) or 'none'}")
    return tuple(float(c) for c in values)
