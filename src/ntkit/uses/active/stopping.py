"""When to stop buying labels: rules that look at what each question of a session has found."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ntkit.errors import InputError
from ntkit.solve.losses import Loss, as_loss
from ntkit.uses.active.labels import as_count
from ntkit.uses.active.lookahead import LookAhead
from ntkit.uses.active.objectives import MostLikelyChange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ntkit.uses.active.strategy import Round


@dataclass(frozen=True)
class Finding:
    """What was found when points were asked for.

    Attributes:
        labels: how many there were.
        metrics: of the network that was trained on them, by the session's own measure.
        measured: what each rule has measured, by the rule's name.
        seconds_fit: of training before the question.
        seconds_query: of choosing.
    """

    labels: int
    metrics: Mapping[str, float]
    measured: Mapping[str, Any]
    seconds_fit: float = 0.0
    seconds_query: float = 0.0


class StoppingRule(ABC):
    """Says when further labels are not worth their price."""

    @property
    def name(self) -> str:
        """Under which its measurements are kept."""
        return type(self).__name__

    def measure(self, now: Round) -> Any:
        """Something to remember of this round, as JSON has it; nothing by default."""
        return None

    def left(self, labels: int) -> int | None:
        """So many labels may still be bought when there are `labels`; None for any number, as by default.

        A rule that says so is asked for its reason with the labels as they are by now, not as of the last question.
        """
        return None

    @abstractmethod
    def reason(self, history: Sequence[Finding]) -> str | None:
        """Why to stop, in words; None to go on. The last of the history is the present.

        Raises:
            InputError: if the rule needs what the session does not measure.
        """


@dataclass(frozen=True)
class Budget(StoppingRule):
    """So many labels and no more, those of the beginning included."""

    labels: int

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if it is no positive whole number.
        """
        as_count(self.labels, "labels")

    def left(self, labels: int) -> int:  # noqa: D102
        return max(self.labels - labels, 0)

    def reason(self, history: Sequence[Finding]) -> str | None:  # noqa: D102
        spent = history[-1].labels
        return f"{spent} labels of a budget of {self.labels}" if spent >= self.labels else None


@dataclass(frozen=True)
class Target(StoppingRule):
    """A measure of the session has reached a value.

    Attributes:
        metric: its name.
        value: that is good enough.
        smaller_is_better: as for a loss.
    """

    metric: str
    value: float
    smaller_is_better: bool = False

    def reason(self, history: Sequence[Finding]) -> str | None:  # noqa: D102
        found = _metric(history, self.metric)[-1]
        reached = found <= self.value if self.smaller_is_better else found >= self.value
        return f"{self.metric} is {found:.4g}, {self.value:.4g} was asked for" if reached else None


@dataclass(frozen=True)
class Plateau(StoppingRule):
    """A measure of the session has not become better for some rounds.

    Attributes:
        metric: its name.
        rounds: how many.
        least: what counts as better than the best before.
        smaller_is_better: as for a loss.
    """

    metric: str
    rounds: int = 3
    least: float = 0.0
    smaller_is_better: bool = False

    def __post_init__(self) -> None:
        """Check the number of rounds.

        Raises:
            InputError: if it is not positive.
        """
        as_count(self.rounds, "rounds")

    def reason(self, history: Sequence[Finding]) -> str | None:  # noqa: D102
        sign = -1.0 if self.smaller_is_better else 1.0
        values = [sign * value for value in _metric(history, self.metric)]
        if len(values) <= self.rounds:
            return None
        before, since = max(values[: -self.rounds]), max(values[-self.rounds :])
        if since > before + self.least:
            return None
        return f"{self.metric} was {sign * before:.4g} {self.rounds} rounds ago and has not become better"


@dataclass(frozen=True)
class Kappa(StoppingRule):
    """The network's classes hardly change from round to round (Bloodgood and Vijay-Shanker 2009).

    Cohen's kappa between the predictions of one round and the next, on points drawn once from the whole pool, has a
    mean of at least `least` over the last rounds. No labels are needed for it. Rounds in which other points were
    watched are not compared.

    Attributes:
        least: 0.99 as in the paper.
        rounds: so many comparisons.
        points: so many are watched.
        seed: draws them.
    """

    least: float = 0.99
    rounds: int = 3
    points: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: if they are not positive, or kappa is more than 1.
        """
        as_count(self.rounds, "rounds")
        as_count(self.points, "points")
        if not self.least <= 1:
            raise InputError(f"kappa is at most 1: got least={self.least!r}")

    def measure(self, now: Round) -> dict[str, Any]:
        """The classes of the points that are watched, and which those are."""
        generator = torch.Generator().manual_seed(self.seed)
        watched = torch.randperm(len(now.labels), generator=generator)[: self.points].sort().values
        classes = now.outputs()[watched].argmax(1).tolist()
        return {"points": len(watched), "seed": self.seed, "classes": classes}

    def reason(self, history: Sequence[Finding]) -> str | None:  # noqa: D102
        from sklearn.metrics import cohen_kappa_score

        said = _of_the_same_points(_measured(history, self))
        if len(said) <= self.rounds:
            return None
        # kappa of two predictions that know one class alone has no value; they agree
        pairs = zip(said[-self.rounds - 1 : -1], said[-self.rounds :], strict=True)
        kappas = [1.0 if a == b else float(cohen_kappa_score(a, b)) for a, b in pairs]
        mean = sum(kappas) / len(kappas)
        if mean < self.least:
            return None
        return f"predictions of the last {self.rounds + 1} rounds agree with a kappa of {mean:.3f}"


@dataclass(frozen=True)
class MeanUncertainty(StoppingRule):
    """The mean entropy of predictions at points without a label, as a part of log C, is small.

    Attributes:
        most: that counts as small.
        loss: what outputs say about the classes; by default the strategy's, and cross-entropy where it has none.
    """

    most: float = 0.05
    loss: Loss | None = None

    def __post_init__(self) -> None:
        """Take torch's loss for ours.

        Raises:
            InputError: if it is neither.
        """
        if self.loss is not None:
            object.__setattr__(self, "loss", as_loss(self.loss))

    def measure(self, now: Round) -> float:  # noqa: D102
        p = (self.loss or now.loss).probabilities(now.outputs()[now.labels < 0])
        return float(torch.special.entr(p).sum(1).mean()) / math.log(p.shape[1])

    def reason(self, history: Sequence[Finding]) -> str | None:  # noqa: D102
        found = _last(history, self)
        if found is None:
            return None
        return f"the mean uncertainty is {found:.3f} of its largest value" if found <= self.most else None


@dataclass(frozen=True)
class MaxPredictedChange(StoppingRule):
    """No single label would move the predictions any more, says the look-ahead.

    What is compared is the root mean square, over targets, of how far the outputs would move with the most telling
    label, if it were the likeliest one.

    Attributes:
        most: that counts as nothing, in units of the outputs (logits for cross-entropy).
        strategy: its loss, kernel, ridge and targets are used; its objective has to be `MostLikelyChange`. By default
            one with the loss of the session's strategy, and cross-entropy where that has none.
    """

    most: float
    strategy: LookAhead | None = None

    def __post_init__(self) -> None:
        """Check the objective.

        Raises:
            InputError: if it measures something else than the change of outputs.
        """
        if self.strategy is not None and not isinstance(self.strategy.objective, MostLikelyChange):
            raise InputError(
                "a predicted change is one of outputs: expected LookAhead(objective=MostLikelyChange()), got "
                f"{type(self.strategy.objective).__name__}"
            )

    def measure(self, now: Round) -> float:
        """Cost: that of scores of all candidates."""
        strategy = self.strategy or LookAhead(objective=MostLikelyChange(), loss=now.loss)
        scene = strategy.look(now)
        largest = float(strategy.objective.scores(scene, now.candidates).max())
        return largest / len(scene.targets) ** 0.5

    def reason(self, history: Sequence[Finding]) -> str | None:  # noqa: D102
        found = _last(history, self)
        if found is None or found > self.most:
            return None
        return f"the most telling label would move an output by {found:.3g} in the mean (root of squares)"


def require_metric(name: str | None, metrics: Mapping[str, float]) -> None:
    """What a rule looks at, None for nothing, has to be measured.

    Raises:
        InputError: if it is not.
    """
    if name is not None and name not in metrics:
        known = ", ".join(sorted(metrics)) or "nothing"
        raise InputError(
            f"a stopping rule looks at {name!r}; the session measures {known}: give Loop(evaluate=...) a function that "
            "returns it"
        )


def _metric(history: Sequence[Finding], name: str) -> list[float]:
    """A measure since it came into the session."""
    require_metric(name, history[-1].metrics)
    return [found.metrics[name] for found in history if name in found.metrics]


def _measured(history: Sequence[Finding], rule: StoppingRule) -> list[Any]:
    """What a rule has measured since it came into the session."""
    return [found.measured[rule.name] for found in history if rule.name in found.measured]


def _of_the_same_points(measured: list[Any]) -> list[list[int]]:
    """Classes of the last rounds that watched what the very last one did; the oldest journals have them alone."""
    marked = [one if isinstance(one, dict) else {"points": len(one), "seed": None, "classes": one} for one in measured]
    found: list[list[int]] = []
    for one in reversed(marked):
        if (one["points"], one["seed"]) != (marked[-1]["points"], marked[-1]["seed"]):
            break
        found.insert(0, one["classes"])
    return found


def _last(history: Sequence[Finding], rule: StoppingRule) -> Any:
    return history[-1].measured.get(rule.name)
