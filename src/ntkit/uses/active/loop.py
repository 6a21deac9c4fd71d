"""A session with a person in it: ask for labels, get some of them, train, ask again; and go on after a crash."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import content, digest
from ntkit.uses.active.journal import VERSION, Journal
from ntkit.uses.active.labels import as_count, as_numbers, as_weights
from ntkit.uses.active.registry import as_strategy
from ntkit.uses.active.stopping import Finding, StoppingRule, require_metric
from ntkit.uses.active.strategy import require

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ntkit.tangent.examples import Batch
    from ntkit.uses.active.strategy import Round, Strategy

# From classes (n,), -1 where there is none, to a network trained on those that are there, in evaluation mode.
Fit = Callable[[np.ndarray], "nn.Module"]
# What a network is worth, by name: accuracy on a test set, say.
Evaluate = Callable[["nn.Module"], Mapping[str, float]]


class UntrainedWarning(UserWarning):
    """Labels have come, and the network is still the one before."""


class ChangedStrategyWarning(UserWarning):
    """A session goes on with a strategy that it has not had before."""


@dataclass(frozen=True)
class Asked:
    """A question to whoever gives labels.

    Attributes:
        numbers: points that still wait for a label, best first.
        scores: what each was worth when it was chosen.
        guesses: the class that the network thought likeliest.
        seconds_fit: of training before the question; 0 if it had been asked before.
        seconds_query: of choosing.
        metrics: of the network that was asked.
        reasons: why one may as well stop, by the session's rules.
    """

    numbers: np.ndarray
    scores: np.ndarray
    guesses: np.ndarray
    seconds_fit: float
    seconds_query: float
    metrics: Mapping[str, float]
    reasons: tuple[str, ...]


class Loop:
    """Labels of one pool, and every question and answer so far, in a journal.

    Nothing happens that is not in the journal first; the same calls on the same journal go on where the last process
    has stopped, whenever it was killed. Training is yours: `fit` gets the labels and gives a network.
    """

    def __init__(  # noqa: PLR0913 (all of a session is said where it begins)
        self,
        X: Any,
        strategy: str | Strategy,
        fit: Fit,
        *,
        journal: str | os.PathLike[str] | None,
        classes: int,
        y: Any = None,
        evaluate: Evaluate | None = None,
        stop: StoppingRule | Sequence[StoppingRule] = (),
        sample_weight: Any = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a session, or go on with the one that is in the journal.

        Args:
            X: all n points.
            strategy: chooses points; its `missing_label` is not used here. One of `NAMES` is for a network that is
                trained with cross-entropy, as in `select`.
            fit: trains a network on the labels so far. After the same labels it should give the same network.
            journal: the file of the session; a new one is begun if there is none. None for a session that ends with
                this process.
            classes: number of classes C.
            y: labels to begin with, (n,), -1 where there is none. When a session goes on: None, or the same.
            evaluate: measures every trained network; what it returns is written down.
            stop: rules that say when to stop, or one. They only say so: `query` answers all the same, `run` ends.
            sample_weight: n weights of labels in the loss, as a strategy's `query` takes them; 1 by default. The same
                have to be given when a session goes on. `fit` is yours: it has to train with them.
            settings: of whoever begins the session, as JSON: written down, and given back when it goes on.

        Raises:
            InputError: if the labels do not fit, there are not two classes or more, a point has a NaN in it, the
                strategy or a rule is none, or two rules of one kind would measure under one name.
            StoreError: if the journal is damaged, or of other points, classes, weights or first labels.

        Warns:
            ChangedStrategyWarning: if the session has had another strategy.
        """
        self.strategy = strategy = as_strategy(strategy)
        self.fit, self.X = fit, X
        self.evaluate, self.rules = evaluate, tuple(stop) if isinstance(stop, Iterable) else (stop,)
        for rule in self.rules:
            require("stop", rule, StoppingRule, "Budget(100), or a list of such")
        names = [rule.name for rule in self.rules if type(rule).measure is not StoppingRule.measure]
        if len(set(names)) < len(names):
            raise InputError(f"one rule of each kind that measures: got {', '.join(sorted(names))}")
        self.n, self.classes = len(Examples(X)), as_count(classes, "classes", 2)
        self._weights = None if sample_weight is None else as_weights(sample_weight, self.n)
        self._journal = Journal(journal)
        self._labels = np.full(self.n, -1)
        self._skipped: set[int] = set()
        self._pending: list[tuple[int, float, int]] = []
        examples = Examples(X) if self._journal.events else _Numbers(X)  # what has begun goes on
        facts = {"version": VERSION, "points": self.n, "classes": self.classes, "data": content(examples)}
        if self._weights is not None:
            facts["weights"] = digest([self._weights])
        first = [] if y is None else self._first(y)
        if not self._journal.events:
            self._journal.add("start", **facts, strategy=_named(strategy), labels=first, settings=dict(settings or {}))
        begun = self._journal.events[0]
        for name, meaning in (
            ("points", "number of points"), ("classes", "number of classes"), ("data", "data"),
            ("weights", "sample_weight"),
        ):  # fmt: skip
            if begun.get(name) != facts.get(name):
                raise StoreError(
                    f"{self._journal.path} is a session with another {meaning}: got {facts.get(name)}, it has "
                    f"{begun.get(name)}. Choose another journal"
                )
        if y is not None and first != begun["labels"]:
            raise StoreError(
                f"{self._journal.path} began with other labels: leave y out to go on, or choose another journal"
            )
        for event in self._journal.events:
            self._replay(event)
        before = [event["strategy"] for event in self._journal.events if "strategy" in event]
        if _named(strategy) not in map(_without_places, before):
            warnings.warn(
                f"this session was begun with another strategy: {before[0]}. It goes on with {_named(strategy)}, and "
                "the journal says so at every question",
                ChangedStrategyWarning,
                stacklevel=2,
            )

    @classmethod
    def resume(
        cls,
        journal: str | os.PathLike[str],
        X: Any,
        strategy: str | Strategy,
        fit: Fit,
        *,
        evaluate: Evaluate | None = None,
        stop: StoppingRule | Sequence[StoppingRule] = (),
        sample_weight: Any = None,
    ) -> Loop:
        """Go on with the session of a journal, as `Loop(...)` does; but never begin one.

        Raises:
            InputError: if there is none.
            StoreError: if the journal is damaged, or of other points or weights.
        """
        events = Journal(journal).events
        if not events:
            raise InputError(f"there is no session {os.fspath(journal)}: begin one with Loop(..., journal=...)")
        return cls(
            X, strategy, fit, journal=journal, classes=events[0]["classes"], evaluate=evaluate, stop=stop,
            sample_weight=sample_weight,
        )  # fmt: skip

    @property
    def labels(self) -> np.ndarray:
        """Classes so far, -1 where there is none, (n,)."""
        return self._labels.copy()

    @property
    def waiting(self) -> np.ndarray:
        """Points that have been asked for and have no answer yet, best first."""
        return np.array([number for number, *_ in self._pending], dtype=np.int64)

    @property
    def skipped(self) -> np.ndarray:
        """Points that nobody could label; they are not asked for again."""
        return np.array(sorted(self._skipped), dtype=np.int64)

    @property
    def told(self) -> set[tuple[int, int | None]]:
        """All answers so far, those that were changed or taken back as well: point and class, None for skipped."""
        begun, *later = self._journal.events
        events = [event for event in later if event["event"] == "tell"]
        labels = [pair for event in events for pair in zip(event["numbers"], event["labels"], strict=True)]
        skipped = [(number, None) for event in events for number in event["skipped"]]
        return {*map(tuple, begun["labels"]), *labels, *skipped}

    @property
    def asked(self) -> set[int]:
        """All points that have been asked for so far, answered or not."""
        return {number for event in self._journal.events if event["event"] == "query" for number in event["numbers"]}

    @property
    def rounds(self) -> int:
        """Questions so far."""
        return sum(event["event"] == "query" for event in self._journal.events)

    @property
    def history(self) -> list[Finding]:
        """What every question has found, the present last."""
        return [
            Finding(event["spent"], event["metrics"], event["measured"], event["seconds_fit"], event["seconds_query"])
            for event in self._journal.events
            if event["event"] == "query"
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """What was written down when the session began."""
        return dict(self._journal.events[0]["settings"])

    @property
    def room(self) -> int | None:
        """So many labels more are allowed by the rules; None for any number."""
        limits = [left for rule in self.rules if (left := rule.left(self._spent)) is not None]
        return min(limits, default=None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why one may as well stop: rules that limit the labels go by those of now, the others by the last question.

        Rules about what the last question did not measure wait for the next.
        """
        history, spent = self.history, self._spent
        now = Finding(spent, history[-1].metrics if history else {}, {})
        limits = [rule for rule in self.rules if rule.left(spent) is not None]
        others = [rule for rule in self.rules if rule.left(spent) is None and not self._waits(rule, history)]
        return (*_reasons(limits, [*history, now]), *_reasons(others, history))

    @property
    def _spent(self) -> int:
        return int((self._labels >= 0).sum())

    def _waits(self, rule: StoppingRule, history: list[Finding]) -> bool:
        metric = getattr(rule, "metric", None)
        return bool(history) and self.evaluate is not None and metric not in (None, *history[-1].metrics)

    def query(self, size: int) -> Asked:
        """Points to be labelled next: those that still wait, or else new ones, for which the network is trained.

        Args:
            size: how many, if none are waiting.

        Raises:
            InputError: if the size is no whole number, more are asked for than are left, or a rule looks at what is not
                measured.
            ModelError: if the network has not what the strategy needs, or is built in another way than before.
            StoreError: if the journal cannot be written.
        """
        size = as_count(size, "size")
        if self._pending:
            return self._asked(0.0, 0.0)
        free = np.setdiff1d(np.flatnonzero(self._labels < 0), self.skipped)
        if size > len(free):
            raise InputError(f"{size} points are asked for, {len(free)} are left without a label")
        self._journal.check()  # before the network is trained for nothing
        if self.evaluate is None:
            for rule in self.rules:
                require_metric(getattr(rule, "metric", None), {})
        start = time.perf_counter()
        model = self.fit(self.labels)
        trained = time.perf_counter()
        network = self._network(model)
        y = np.where(self._labels < 0, np.nan, self._labels)
        now = replace(self.strategy, missing_label=float("nan")).round(self.X, y, model, free, size, self._weights)
        picked = self.strategy.choose(now)
        done = time.perf_counter()
        count = now.outputs().shape[1]
        if count != self.classes:
            raise ModelError(
                f"the network has {count} outputs, the session {self.classes} classes: expected one output for each"
            )
        places = np.searchsorted(now.candidates.numpy(), picked.numbers.numpy())
        scores = picked.utilities[range(size), places].tolist()
        guesses = now.outputs()[picked.numbers].argmax(1).tolist()
        seconds = {"seconds_fit": trained - start, "seconds_query": done - trained}
        self._happen(
            "query",
            numbers=picked.numbers.tolist(),
            scores=scores,
            guesses=guesses,
            strategy=_named(self.strategy),
            **seconds,
            network=network,
            **self._found(model, now),
        )
        return self._asked(**seconds)

    def _asked(self, seconds_fit: float, seconds_query: float) -> Asked:
        """The present question."""
        _, scores, guesses = zip(*self._pending, strict=True)
        metrics = self.history[-1].metrics
        return Asked(
            self.waiting, np.array(scores), np.array(guesses), seconds_fit, seconds_query, metrics, self.reasons
        )

    def label(self, numbers: Sequence[int], classes: Sequence[int]) -> None:
        """Answers, asked for or not; a point that has a label gets the new one.

        Raises:
            InputError: if a number or a class is out of range, or there is not one for each; nothing is kept then.
        """
        self.tell(numbers, classes)

    def skip(self, numbers: Sequence[int]) -> None:
        """Points that cannot be labelled: not asked for again, unless somebody labels them after all.

        Raises:
            InputError: if a number is out of range or has a label.
        """
        self.tell([], [], skipped=numbers)

    def unlabel(self, numbers: Sequence[int]) -> None:
        """Take labels back; the points can be asked for again.

        Raises:
            InputError: if a number is out of range or has no label.
        """
        self.tell([], [], unlabelled=numbers)

    def tell(
        self,
        numbers: Sequence[int],
        classes: Sequence[int],
        *,
        skipped: Sequence[int] = (),
        unlabelled: Sequence[int] = (),
    ) -> None:
        """All three at once: everything is kept, or nothing if one is wrong.

        Raises:
            InputError: as `label`, `skip` and `unlabel` do, or if a point stands in two of them.
        """
        points, given = self._points(numbers), np.asarray(classes).ravel()
        found = [c for c in map(_class, given) if c is not None]
        if len(points) != len(given) or len(found) != len(given):
            raise InputError(
                f"every point has one class, a number from 0 to {self.classes - 1}: got {len(points)} points and "
                f"{given.tolist()}"
            )
        bad = [c for c in found if not 0 <= c < self.classes]
        if bad:
            raise InputError(f"labels are classes from 0 to {self.classes - 1}: got {bad[0]}")
        without, back = self._points(skipped), self._points(unlabelled)
        labelled = [i for i in without if self._labels[i] >= 0]
        if labelled:
            raise InputError(f"point {labelled[0]} has a label: unlabel it first")
        missing = [i for i in back if self._labels[i] < 0]
        if missing:
            raise InputError(f"point {missing[0]} has no label")
        self._points([*points, *without, *back])  # none twice
        if points or without or back:
            self._happen("tell", numbers=points, labels=found, skipped=without, unlabelled=back)

    def step(self, oracle: Callable[[np.ndarray], Sequence[int | None]], size: int) -> Asked:
        """Ask, and take the answers of a function; None skips a point.

        Raises:
            InputError: if an answer is no class, or there is not one for each point.
        """
        asked = self.query(size)
        self._answer(asked.numbers, oracle)
        return asked

    def run(
        self,
        oracle: Callable[[np.ndarray], Sequence[int | None]],
        size: int,
        *,
        rounds: int | None = None,
        progress: Callable[[Asked], None] | None = None,
    ) -> tuple[str, ...]:
        """Step after step until a rule says stop, all points have labels, or so many questions have been asked.

        Where the rules allow no label more, it ends before the network is trained again.

        Args:
            oracle: as for `step`.
            size: of a batch; the last may be smaller, by the points that are left or the labels that rules allow.
            rounds: questions of the session, those before a crash included.
            progress: called after every question.

        Returns:
            Why it ended, in words.

        Raises:
            InputError: if the size is no whole number, or an answer is no class.
        """
        size = as_count(size, "size")
        while True:
            left, room = int((self._labels < 0).sum()) - len(self._skipped), self.room
            if not self._pending and not left:
                return ("every point has a label or was skipped",)
            if not self._pending and room == 0:
                return self.reasons
            if not self._pending and rounds is not None and self.rounds >= rounds:
                return (f"{self.rounds} rounds",)
            asked = self.query(size if self._pending else min(size, left, left if room is None else room))
            if progress is not None:
                progress(asked)
            if asked.reasons:
                return asked.reasons
            self._answer(asked.numbers[:room], oracle)  # those of an older question may be more

    def _answer(self, numbers: np.ndarray, oracle: Callable[[np.ndarray], Sequence[int | None]]) -> None:
        answers = list(oracle(numbers))
        if len(answers) != len(numbers):
            raise InputError(f"{len(numbers)} points were asked for, {len(answers)} answers came")
        known = [(int(i), a) for i, a in zip(numbers, answers, strict=True) if a is not None]
        unknown = [int(i) for i, a in zip(numbers, answers, strict=True) if a is None]
        self.tell([i for i, _ in known], [a for _, a in known], skipped=unknown)

    def _network(self, model: nn.Module) -> dict[str, str]:
        """What a network is, beside that of the questions before.

        Raises:
            ModelError: if it is built in another way.
        """
        mine = {
            "modules": _modules(model),
            "parameters": digest([item for pair in model.state_dict().items() for item in pair]),
        }
        before = [event for event in self._journal.events if event["event"] == "query"]
        if (
            before and before[-1]["network"].get("modules", mine["modules"]) != mine["modules"]
        ):  # old journals have none
            raise ModelError(
                "the network is built in another way than at the last question of this session: go on with the same "
                "modules, or begin a session with Loop(y=loop.labels) in another journal"
            )
        trained_before = before and before[-1]["network"]["parameters"] == mine["parameters"]
        if trained_before and before[-1]["spent"] != self._spent:
            warnings.warn(
                "labels have come since the last question, and the network is the same as then: does fit(labels) train "
                "it?",
                UntrainedWarning,
                stacklevel=3,
            )
        return mine

    def _found(self, model: nn.Module, now: Round) -> dict[str, Any]:
        """What is measured at a question."""
        metrics = {} if self.evaluate is None else {k: float(v) for k, v in self.evaluate(model).items()}
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        if bad:
            raise InputError(f"evaluate gives {bad[0]} = {metrics[bad[0]]}: expected a finite number")
        measured = {rule.name: found for rule in self.rules if (found := rule.measure(now)) is not None}
        found = {"spent": len(now.labelled), "metrics": metrics, "measured": measured}
        _reasons(self.rules, [*self.history, Finding(*found.values())])  # what a rule misses is not written down
        return found

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
            self._pending = list(zip(numbers, event["scores"], event["guesses"], strict=True))
            return
        if kind != "tell":
            raise StoreError(f"{self._journal.path}: an event of unknown kind {kind!r}; a newer version has written it")
        without, back = event["skipped"], event["unlabelled"]
        self._labels[numbers] = event["labels"]
        self._labels[back] = -1
        self._skipped = (self._skipped | set(without)) - set(numbers)
        answered = {*numbers, *without, *back}
        self._pending = [one for one in self._pending if one[0] not in answered]

    def _points(self, numbers: Sequence[int]) -> list[int]:
        return as_numbers(np.asarray(numbers).ravel(), self.n).tolist()

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


class _Numbers(Examples):
    """Examples that are looked at while they are read: one NaN would be found by the network, once it is trained."""

    def batch(self, index: slice | Sequence[int], device: torch.device | None = None) -> Batch:
        """Some examples.

        Raises:
            InputError: if there is a NaN in one of them.
        """
        found = super().batch(index, device)
        for t in found.tensors():
            if t.is_floating_point() and bool(t.isnan().any()):
                place = int(t.isnan().reshape(len(t), -1).any(1).nonzero()[0])
                number = range(self.size)[index][place] if isinstance(index, slice) else index[place]
                raise InputError(f"point {number} has a NaN in it: leave it out of the pool, or say what it stands for")
        return found


def _reasons(rules: Sequence[StoppingRule], history: list[Finding]) -> tuple[str, ...]:
    found = [rule.reason(history) for rule in rules] if history else []
    return tuple(reason for reason in found if reason is not None)


def _class(answer: Any) -> int | None:
    """The whole number that is meant, if one is."""
    try:
        value = float(answer)
    except (TypeError, ValueError):
        return None
    return int(value) if value.is_integer() else None


def _modules(model: nn.Module) -> str:
    """How a network is built, as a digest: names and kinds of its modules, names and shapes of what they keep.

    Of torch's own modules their settings as well (a stride, a rate of dropout), which make another function of the same
    parameters. Not attributes in general, as a kernel on disk has them: a training may note down on a module what it
    has found (its best loss, an epoch), and that is no other network.
    """
    lines = []
    for name, module in model.named_modules():
        kind = type(module)
        settings = module.extra_repr() if kind.__module__.startswith("torch.nn.") else ""
        lines.append(f"{name} {kind.__qualname__}({settings})")
    kept = model.state_dict().items()
    lines += [f"{name} {tuple(tensor.shape)}" for name, tensor in kept if isinstance(tensor, Tensor)]
    return digest(["\n".join(lines)])


def _named(strategy: Strategy) -> str:
    return _without_places(repr(strategy))


def _without_places(text: str) -> str:
    """Python names functions and many objects by where they are in memory, which is new in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
