"""A session with a person in it: ask for labels, get some of them, train, ask again; and go on after a crash."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkit.errors import InputError, StoreError
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import content
from ntkit.uses.active.journal import VERSION, Journal

if TYPE_CHECKING:
    from torch import nn

    from ntkit.uses.active.strategy import Strategy

# From classes (n,), -1 where there is none, to a network trained on those that are there, in evaluation mode.
Fit = Callable[[np.ndarray], "nn.Module"]


@dataclass(frozen=True)
class Asked:
    """A question to whoever gives labels.

    Attributes:
        numbers: points that still wait for a label, best first.
        scores: what each was worth when it was chosen.
        seconds_fit: of training before the question; 0 if it had been asked before.
        seconds_query: of choosing.
    """

    numbers: np.ndarray
    scores: np.ndarray
    seconds_fit: float
    seconds_query: float


class Loop:
    """Labels of one pool, and every question and answer so far, in a journal.

    Nothing happens that is not in the journal first; the same calls on the same journal go on where the last process
    has stopped, whenever it was killed. Training is yours: `fit` gets the labels and gives a network.
    """

    def __init__(
        self,
        X: Any,
        strategy: Strategy,
        fit: Fit,
        *,
        journal: str | os.PathLike[str],
        classes: int,
        y: Any = None,
    ) -> None:
        """Begin a session, or go on with the one that is in the journal.

        Args:
            X: all n points.
            strategy: chooses points; its `missing_label` is not used here.
            fit: trains a network on the labels so far. After the same labels it should give the same network.
            journal: the file of the session; a new one is begun if there is none.
            classes: number of classes C.
            y: labels to begin with, (n,), -1 where there is none. When a session goes on: None, or the same.

        Raises:
            InputError: if the labels do not fit.
            StoreError: if the journal is damaged, or of other points, classes or first labels.
        """
        self.strategy, self.fit, self.X = strategy, fit, X
        self.n, self.classes = len(Examples(X)), classes
        self._journal = Journal(journal)
        self._labels = np.full(self.n, -1)
        self._skipped: set[int] = set()
        self._pending: list[tuple[int, float]] = []
        facts = {"version": VERSION, "points": self.n, "classes": classes, "data": content(Examples(X))}
        first = [] if y is None else self._first(y)
        if not self._journal.events:
            self._journal.add("start", **facts, strategy=repr(strategy), labels=first)
        begun = self._journal.events[0]
        for name, meaning in (("points", "number of points"), ("classes", "number of classes"), ("data", "data")):
            if begun.get(name) != facts[name]:
                raise StoreError(
                    f"{self._journal.path} is a session with another {meaning}: got {facts[name]}, it has "
                    f"{begun.get(name)}. Choose another journal"
                )
        if y is not None and first != begun["labels"]:
            raise StoreError(
                f"{self._journal.path} began with other labels: leave y out to go on, or choose another journal"
            )
        for event in self._journal.events:
            self._replay(event)

    @property
    def labels(self) -> np.ndarray:
        """Classes so far, -1 where there is none, (n,)."""
        return self._labels.copy()

    @property
    def waiting(self) -> np.ndarray:
        """Points that have been asked for and have no answer yet, best first."""
        return np.array([number for number, _ in self._pending], dtype=np.int64)

    @property
    def skipped(self) -> np.ndarray:
        """Points that nobody could label; they are not asked for again."""
        return np.array(sorted(self._skipped), dtype=np.int64)

    @property
    def rounds(self) -> int:
        """Questions so far."""
        return sum(event["event"] == "query" for event in self._journal.events)

    def query(self, size: int) -> Asked:
        """Points to be labelled next: those that still wait, or else new ones, for which the network is trained.

        Args:
            size: how many, if none are waiting.

        Raises:
            InputError: if more are asked for than are left.
            ModelError: if the network has not what the strategy needs.
        """
        if not self._pending:
            free = np.setdiff1d(np.flatnonzero(self._labels < 0), self.skipped)
            if not 1 <= size <= len(free):
                raise InputError(f"{size} points are asked for, {len(free)} are left without a label")
            start = time.perf_counter()
            model = self.fit(self.labels)
            trained = time.perf_counter()
            y = np.where(self._labels < 0, np.nan, self._labels)
            numbers, utilities = self._asking().query(self.X, y, model, free, size, return_utilities=True)
            done = time.perf_counter()
            scores = [float(utilities[k, number]) for k, number in enumerate(numbers)]
            facts = {"seconds_fit": trained - start, "seconds_query": done - trained}
            self._happen("query", numbers=numbers.tolist(), scores=scores, **facts)
            return Asked(self.waiting, np.array(scores), trained - start, done - trained)
        return Asked(self.waiting, np.array([score for _, score in self._pending]), 0.0, 0.0)

    def label(self, numbers: Sequence[int], classes: Sequence[int]) -> None:
        """Answers, asked for or not; a point that has a label gets the new one.

        Raises:
            InputError: if a number or a class is out of range, or there is not one for each; nothing is kept then.
        """
        points, found = self._points(numbers), [int(c) for c in np.asarray(classes).ravel()]
        if len(points) != len(found) or any(c != v for c, v in zip(found, np.asarray(classes).ravel(), strict=True)):
            raise InputError(
                f"every point has one class: got {len(points)} points and {list(np.asarray(classes).ravel())}"
            )
        bad = [c for c in found if not 0 <= c < self.classes]
        if bad:
            raise InputError(f"labels are classes from 0 to {self.classes - 1}: got {bad[0]}")
        self._happen("label", numbers=points, labels=found)

    def skip(self, numbers: Sequence[int]) -> None:
        """Points that cannot be labelled: not asked for again, unless somebody labels them after all.

        Raises:
            InputError: if a number is out of range or has a label.
        """
        points = self._points(numbers)
        labelled = [i for i in points if self._labels[i] >= 0]
        if labelled:
            raise InputError(f"point {labelled[0]} has a label: unlabel it first")
        self._happen("skip", numbers=points)

    def unlabel(self, numbers: Sequence[int]) -> None:
        """Take labels back; the points can be asked for again.

        Raises:
            InputError: if a number is out of range or has no label.
        """
        points = self._points(numbers)
        without = [i for i in points if self._labels[i] < 0]
        if without:
            raise InputError(f"point {without[0]} has no label")
        self._happen("unlabel", numbers=points)

    def step(self, oracle: Callable[[np.ndarray], Sequence[int | None]], size: int) -> Asked:
        """Ask, and take the answers of a function; None skips a point.

        Raises:
            InputError: if an answer is no class, or there is not one for each point.
        """
        asked = self.query(size)
        answers = list(oracle(asked.numbers))
        if len(answers) != len(asked.numbers):
            raise InputError(f"{len(asked.numbers)} points were asked for, {len(answers)} answers came")
        known = [(int(i), a) for i, a in zip(asked.numbers, answers, strict=True) if a is not None]
        self.label([i for i, _ in known], [a for _, a in known])
        unknown = [int(i) for i, a in zip(asked.numbers, answers, strict=True) if a is None]
        if unknown:
            self.skip(unknown)
        return asked

    def _asking(self) -> Strategy:
        from dataclasses import replace

        return replace(self.strategy, missing_label=float("nan"))

    def _happen(self, kind: str, **facts: Any) -> None:
        self._journal.add(kind, **facts)
        self._replay(self._journal.events[-1])

    def _replay(self, event: dict[str, Any]) -> None:
        kind, numbers = event["event"], event.get("numbers", [])
        if kind == "start":
            for number, label in event["labels"]:
                self._labels[number] = label
            return
        if kind == "query":
            self._pending = list(zip(numbers, event["scores"], strict=True))
            return
        if kind == "label":
            self._labels[numbers] = event["labels"]
            self._skipped -= set(numbers)
        elif kind == "skip":
            self._skipped |= set(numbers)
        elif kind == "unlabel":
            self._labels[numbers] = -1
        else:
            raise StoreError(f"{self._journal.path}: an event of unknown kind {kind!r}; a newer version has written it")
        answered = set(numbers)
        self._pending = [one for one in self._pending if one[0] not in answered]

    def _points(self, numbers: Sequence[int]) -> list[int]:
        found = np.asarray(numbers).ravel()
        if len(found) and not np.issubdtype(found.dtype, np.integer):
            raise InputError(f"points are numbers from 0 to {self.n - 1}: got {found.dtype}")
        points = [int(i) for i in found]
        bad = [i for i in points if not 0 <= i < self.n]
        if bad:
            raise InputError(f"points are numbers from 0 to {self.n - 1}: got {bad[0]}")
        if len(set(points)) < len(points):
            raise InputError("a point stands twice")
        return points

    def _first(self, y: Any) -> list[tuple[int, int]]:
        values = np.asarray(y)
        if values.shape != (self.n,) or not np.issubdtype(values.dtype, np.integer):
            raise InputError(
                f"labels to begin with are {self.n} whole numbers, -1 where there is none: got {values.dtype} of shape "
                f"{values.shape}"
            )
        if values.max() >= self.classes or values.min() < -1:
            raise InputError(
                f"labels are classes from 0 to {self.classes - 1}, or -1: got {values.min()} to {values.max()}"
            )
        return [[int(i), int(values[i])] for i in np.flatnonzero(values >= 0)]  # pyright: ignore
