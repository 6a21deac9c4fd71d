"""A session of active learning as the command line keeps it: everything that it needs is in its journal."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.report.inputs import Arrays, load_factory, load_weights, parse_dtype
from ntkit.report.items import items_of
from ntkit.report.page import Table
from ntkit.solve.losses import CrossEntropy, Loss, SquareLoss
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits
from ntkit.uses.active.exchange import CSV, Answers, Exchange, exchange
from ntkit.uses.active.geometry import Hidden
from ntkit.uses.active.journal import Journal
from ntkit.uses.active.loop import Loop
from ntkit.uses.active.registry import strategy
from ntkit.uses.active.stopping import Budget, Kappa, Plateau, StoppingRule
from ntkit.uses.active.training import Training
from ntkit.uses.active.typical import TypiClust

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ntkit.uses.active.loop import Asked
    from ntkit.uses.active.strategy import Strategy

# Points on which a strategy is tried.
TRIAL = 50
LOSSES: dict[str, type[Loss]] = {"cross-entropy": CrossEntropy, "square": SquareLoss}


@dataclass(frozen=True)
class Settings:
    """What is said once, when a session begins.

    Attributes:
        factory: of the network, MODULE:FUNCTION or path.py:FUNCTION.
        data: the `.npz` file, absolute.
        x: name of the array of the pool, or None for x_train or x.
        names: of the classes, or None for their numbers.
        strategy: by name.
        loss: "cross-entropy" or "square".
        steps: of training.
        batch_size: of training.
        lr: learning rate of Adam.
        seed: of training and of what is drawn.
        dtype: "float32" or "float64".
        budget: labels to stop at, or None.
        plateau: rounds without progress on the test examples to stop at, or None.
        kappa: agreement of rounds to stop at, or None.
        items: what people see of a point: name of an array of strings, or a `.csv` file; None for nothing.
    """

    factory: str
    data: str
    x: str | None = None
    names: list[str] | None = None
    strategy: str = "curvature-ivr"
    loss: str = "cross-entropy"
    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0
    dtype: str = "float32"
    budget: int | None = None
    plateau: int | None = None
    kappa: float | None = None
    items: str | None = None


class Session:
    """A session on disk, with its pool and its network."""

    def __init__(
        self, settings: Settings, journal: Path, *, labels: str | None = None, strategy: str | None = None
    ) -> None:
        """Read the pool, and the journal if there is one.

        Args:
            settings: those of the session.
            journal: its file.
            labels: name of the array of labels to begin with.
            strategy: another than that of the settings, by name. It is tried on a few points, as that of a session that
                begins is.

        Raises:
            InputError: if anything does not fit.
            StoreError: if the journal is damaged, or of other points.
        """
        if settings.loss not in LOSSES:
            raise InputError(f"unknown loss {settings.loss!r}: expected {' or '.join(LOSSES)}")
        self._chosen = strategy
        self.settings, self._dtype = settings, parse_dtype(settings.dtype)
        self._factory = load_factory(settings.factory)
        path, y = Path(settings.data), None
        with Arrays(path) as arrays:
            name = settings.x or next((n for n in ("x_train", "x") if n in arrays.names), None)
            if name is None or name not in arrays.names:
                raise InputError(
                    f"{path} has no array {settings.x or 'x_train or x'}: it holds {', '.join(sorted(arrays.names))}"
                )
            self.x = arrays.examples(name, self._dtype)
            self._test = None
            if {"x_test", "y_test"} <= arrays.names:
                self._test = arrays.examples("x_test", self._dtype), torch.from_numpy(arrays.labels("y_test"))
            if labels is not None:
                y = arrays.labels(labels)
        if settings.plateau is not None and self._test is None:
            raise InputError(f"a plateau is one of the accuracy on x_test and y_test, which {path} has not")
        model = self._factory.build(seed=settings.seed, dtype=self._dtype)
        classes = linearize(model, readout=Logits()).outputs(self.x[:2]).shape[1]
        if settings.names is not None and len(settings.names) != classes:
            raise InputError(f"the network has {classes} outputs, one for each class: got {len(settings.names)} names")
        rule, begins = self._strategy(strategy or settings.strategy), not Journal(journal).events
        if begins:
            CSV(settings.names)  # which checks them: a session keeps its names for ever
            if settings.items is not None:  # later it may be another, or nobody looks
                self.items()
        if begins or strategy is not None:
            self._try(rule, classes)
        self.loop = Loop(
            self.x,
            rule,
            self._train,
            journal=journal,
            classes=classes,
            y=y,
            evaluate=None if self._test is None else self._evaluate,
            stop=self._rules(),
            settings=dataclasses.asdict(settings),
        )

    @classmethod
    def resume(cls, journal: Path, strategy: str | None = None) -> Session:
        """The session of a journal.

        Args:
            journal: its file.
            strategy: another than the session's, by name.

        Raises:
            InputError: if there is none, or what it needs has gone.
            StoreError: if it is damaged, or was not begun here.
        """
        events = Journal(journal).events if journal.is_file() else []
        if not events:
            unfinished = ", only the beginning of its first line" if journal.is_file() else ""
            raise InputError(
                f"there is no session {journal}{unfinished}: begin one with `ntkit active start {journal} ...`"
            )
        kept = events[0].get("settings", {})
        fields = {field.name for field in dataclasses.fields(Settings)}
        if not {"factory", "data"} <= set(kept) <= fields:
            raise StoreError(f"{journal}: this session was begun in Python, or by another version: go on there")
        return cls(Settings(**kept), journal, strategy=strategy)

    def within(self, count: int) -> int:
        """So many points, or as many as the budget leaves. One that is used up stops nobody: `ask` says so."""
        return min(count, self.loop.room or count)

    def ask(self, count: int, weights: Path | None = None) -> Asked:
        """Points to be labelled; the network is trained here, or read from a file.

        Raises:
            InputError: if anything does not fit.
        """
        if weights is not None:
            self.loop.fit = partial(self._load, weights)
        elif not (self.loop.labels >= 0).any():
            self.loop.fit = lambda _: self._factory.build(seed=self.settings.seed, dtype=self._dtype)
            if self._chosen is None:  # not every network ends in a linear layer
                self.loop.strategy = TypiClust(Hidden(), random_state=self.settings.seed)
        return self.loop.query(count)

    def label(self, text: str) -> tuple[int, int]:
        """NUMBER=CLASS, with the class by name or number.

        Raises:
            InputError: if it is something else.
        """
        number, _, name = text.partition("=")
        if not number.isdigit() or not name:
            raise InputError(f"a label is written NUMBER=CLASS: got {text!r}")
        return int(number), CSV(self.settings.names).parse(name)

    def require_told(self, kind: Exchange, path: Path) -> None:
        """Questions may be written to a file that is there already, if no answer is lost by it.

        Raises:
            InputError: if it holds answers that this session has never been told, or is no file of questions.
        """
        if not path.exists() or not path.stat().st_size:
            return
        try:
            found = kind.read(path)
        except InputError as error:
            raise InputError(
                f"{path} is there already and cannot be read as questions, so that it is not replaced. {error}. Mend "
                "it, or choose another file"
            ) from error
        lost = [number for number, _ in self._new(found)]
        if lost:
            raise InputError(
                f"{path} has answers that this session has not been told: {len(lost)}, the first to point {lost[0]}. "
                "Hand it in with `ntkit active tell` before you ask again, or choose another file"
            )

    def answers(self, kind: Exchange, path: Path, *, unasked: bool = False) -> Answers:
        """What a file says, to questions of this session; `unasked` takes answers to other points as well.

        Raises:
            InputError: if it cannot be read, or has an answer to what was never asked: it is another session's then.
        """
        found, asked = kind.read(path), self.loop.asked
        stray = [number for number, _ in self._new(found) if number not in asked]
        if stray and not unasked:
            raise InputError(
                f"{path}: {len(stray)} of its answers are to points that this session has never asked for, the first "
                f"to point {stray[0]}: is this another session's file? Say --unasked if they are meant"
            )
        return found

    def _new(self, found: Answers) -> list[tuple[int, int | None]]:
        """Answers of a file that the session has never been told; None for skipped."""
        answers = [*zip(found.numbers, found.labels, strict=True), *((number, None) for number in found.skipped)]
        told = self.loop.told
        return [one for one in answers if one not in told]

    def exchange(self, name: str | None, path: Path) -> Exchange:
        """The kind of a file, by name or by the end of its path.

        Raises:
            InputError: if it is not known.
        """
        return exchange(path, name, self.settings.names)

    def items(self, source: str | None = None, *, needed: bool = False) -> list[dict[str, str]] | None:
        """What people see of every point; another source than the session's may be named. None if there is none.

        Raises:
            InputError: if it is not there though it is needed, or has not an entry for each point.
        """
        source = source or self.settings.items
        if source is None and needed:
            raise InputError("this tool takes no point of which nothing can be seen: say --items NAME or FILE.csv")
        return None if source is None else items_of(source, Path(self.settings.data), len(self.x))

    def status(self) -> Table:
        """What has happened so far."""
        loop, names = self.loop, self.settings.names
        labels = loop.labels
        rows: list[tuple[str, ...]] = [
            ("points", f"{loop.n:,}", "", "", ""),
            ("with a label", f"{int((labels >= 0).sum()):,}", "", "", ""),
            ("waiting for an answer", f"{len(loop.waiting):,}", "", "", ""),
            ("skipped", f"{len(loop.skipped):,}", "", "", ""),
            ("labels by class", "", "", "", ""),
        ]
        for c in range(loop.classes):
            rows.append((str(c if names is None else names[c]), f"{int((labels == c).sum()):,}", "", "", ""))
        if loop.history:
            rows.append(("questions", "", "", "", ""))
        for k, asked in enumerate(loop.history, 1):
            accuracy = asked.metrics.get("accuracy")
            rows.append((
                f"question {k}", f"{asked.labels:,}", f"{asked.seconds_fit:.1f} s", f"{asked.seconds_query:.1f} s",
                "" if accuracy is None else f"{accuracy:.1%}",
            ))  # fmt: skip
        return Table(
            f"{self.settings.strategy}, {self.settings.data}",
            ("", "labels", "fit", "query", "test accuracy"),
            tuple(rows),
        )

    def _strategy(self, name: str) -> Strategy:
        return strategy(name, loss=LOSSES[self.settings.loss](), random_state=self.settings.seed)

    def _try(self, rule: Strategy, classes: int) -> None:
        """Ask once on a few points, with labels that are made up and a network that has seen them once.

        What a strategy needs of a network is known before anything is written down, or trained for long.

        Raises:
            InputError: if the strategy cannot be used with the network.
        """
        x = self.x[:TRIAL]
        if len(x) < 4:  # too few to leave anything to choose from
            return
        y = np.where(np.arange(len(x)) % 2, -1, np.arange(len(x)) // 2 % classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a trial nobody need know
            try:
                replace(rule, missing_label=-1).query(x, y, self._training(x, 1)(y))
            except (InputError, ModelError) as error:
                raise InputError(
                    f"the strategy {type(rule).__name__} cannot be used with this network: {error}. Say --strategy NAME"
                ) from error

    def _rules(self) -> list[StoppingRule]:
        said = self.settings
        rules: list[StoppingRule] = []
        if said.budget is not None:
            rules.append(Budget(said.budget))
        if said.plateau is not None:
            rules.append(Plateau("accuracy", rounds=said.plateau))
        if said.kappa is not None:
            rules.append(Kappa(least=said.kappa))
        return rules

    def _train(self, labels: np.ndarray) -> nn.Module:
        return self._training(self.x, self.settings.steps)(labels)

    def _training(self, x: Tensor, steps: int) -> Training:
        said = self.settings
        return Training(
            x,
            partial(self._factory.build, seed=said.seed, dtype=self._dtype),
            loss=LOSSES[said.loss](),
            optimizer=partial(torch.optim.Adam, lr=said.lr),
            steps=steps,
            batch_size=said.batch_size,
            seed=said.seed,
        )

    def _load(self, weights: Path, _: np.ndarray) -> nn.Module:
        model = self._factory.build(seed=self.settings.seed, dtype=self._dtype)
        load_weights(model, weights)
        return model

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        assert self._test is not None
        x, y = self._test
        right: Tensor = linearize(model, readout=Logits()).outputs(x).argmax(1).cpu() == y
        return {"accuracy": float(right.double().mean())}
