"""Stopping rules: on histories written by hand, and in sessions."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_active_loop import START, fit, pool, session

from ntkit.errors import InputError
from ntkit.uses.active import CrossEntropy, LookAhead, Margin, MostLikelyChange, SquareLoss, UntrainedWarning
from ntkit.uses.active.stopping import (
    Budget,
    Finding,
    Kappa,
    MaxPredictedChange,
    MeanUncertainty,
    Plateau,
    StoppingRule,
    Target,
)
from ntkit.uses.active.uncertainty import Random


def told(values: list[float], name: str = "accuracy") -> list[Finding]:
    return [Finding(10 * (k + 1), {name: value}, {}) for k, value in enumerate(values)]


def stops_at(rule: StoppingRule, history: list[Finding]) -> int | None:
    """The first round in which it says stop, from 1."""
    return next((k for k in range(1, len(history) + 1) if rule.reason(history[:k]) is not None), None)


def test_budgets_and_targets() -> None:
    history = told([0.5, 0.7, 0.8, 0.75])
    assert stops_at(Budget(30), history) == 3
    assert stops_at(Budget(31), history) == 4
    assert stops_at(Budget(41), history) is None
    assert stops_at(Target("accuracy", 0.8), history) == 3
    assert stops_at(Target("accuracy", 0.7, smaller_is_better=True), history) == 1
    assert stops_at(Target("accuracy", 0.4, smaller_is_better=True), history) is None
    assert "0.8" in str(Target("accuracy", 0.8).reason(history[:3]))
    with pytest.raises(InputError, match="'loss'; the session measures accuracy"):
        Target("loss", 0.1).reason(history)


def test_a_plateau_is_rounds_without_progress() -> None:
    history = told([0.5, 0.7, 0.6, 0.71, 0.71, 0.705, 0.71])
    assert stops_at(Plateau("accuracy", rounds=2), history) == 6
    assert stops_at(Plateau("accuracy", rounds=3), history) == 7
    assert stops_at(Plateau("accuracy", rounds=2, least=0.02), history) == 4
    assert stops_at(Plateau("accuracy", rounds=1, smaller_is_better=True), history) == 2
    assert stops_at(Plateau("accuracy", rounds=7), history) is None
    with pytest.raises(InputError, match="rounds"):
        Plateau("accuracy", rounds=0)


def test_kappa_is_the_agreement_beyond_chance() -> None:
    def said(*classes: list[int]) -> list[Finding]:
        return [Finding(10 * (k + 1), {}, {"Kappa": c}) for k, c in enumerate(classes)]

    first, second = [0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]
    agreed, chance = 7 / 8, (3 * 2 + 5 * 6) / 64
    kappa = (agreed - chance) / (1 - chance)
    assert Kappa(least=kappa - 1e-12, rounds=1).reason(said(first, second)) is not None
    assert Kappa(least=kappa + 1e-12, rounds=1).reason(said(first, second)) is None
    history = said(first, second, second, second, first)
    assert stops_at(Kappa(least=0.99, rounds=1), history) == 3
    assert stops_at(Kappa(least=0.99, rounds=2), history) == 4
    assert stops_at(Kappa(least=(kappa + 1) / 2, rounds=2), history) == 3  # the mean of both
    assert stops_at(Kappa(least=1.0, rounds=1), said([2] * 5, [2] * 5)) == 2  # one class alone


def test_uncertainty_and_predicted_change_are_those_of_the_network() -> None:
    x, _ = pool()
    rule = LookAhead(objective=MostLikelyChange(), loss=SquareLoss(), missing_label=-1)
    model = fit(START)
    now = rule.round(x, START, model)
    p = SquareLoss().probabilities(model(x).detach())[START < 0]
    entropy = -(p * p.clamp_min(1e-300).log()).sum(1).mean() / np.log(3)
    assert MeanUncertainty(loss=SquareLoss()).measure(now) == pytest.approx(float(entropy), rel=1e-12)
    free = np.flatnonzero(START < 0)
    scene, changes = rule.look(now), []
    for i in free.tolist():  # how the outputs would move, point by point
        misfit = torch.eye(3).double()[scene.outputs[i].argmax()] - scene.outputs[i]
        moved = scene.posterior.response(i)[:, 0] * misfit
        changes.append(float(moved[free].square().sum(1).mean().sqrt()))
    found = MaxPredictedChange(0.1, rule).measure(now)
    assert found == pytest.approx(max(changes), rel=1e-10)
    history = [Finding(3, {}, {"MaxPredictedChange": found})]
    assert MaxPredictedChange(found * 1.01, rule).reason(history) is not None
    assert MaxPredictedChange(found * 0.99, rule).reason(history) is None
    assert MaxPredictedChange(1.0, rule).reason(told([0.5])) is None  # came into the session later
    with pytest.raises(InputError, match="MostLikelyChange"):
        MaxPredictedChange(0.1, LookAhead())


def test_rules_go_by_the_loss_of_the_strategy() -> None:
    x, model = pool()[0], fit(START)
    change = LookAhead(objective=MostLikelyChange(), loss=SquareLoss())
    for strategy, loss in (
        (Margin(SquareLoss()), SquareLoss()),
        (Margin(), CrossEntropy()),
        (Random(), CrossEntropy()),
    ):
        now = replace(strategy, missing_label=-1).round(x, START, model)
        assert MeanUncertainty().measure(now) == MeanUncertainty(loss=loss).measure(now)
        assert MaxPredictedChange(0.1).measure(now) == MaxPredictedChange(0.1, replace(change, loss=loss)).measure(now)
    square, cross = (Margin(loss, missing_label=-1).round(x, START, model) for loss in (SquareLoss(), CrossEntropy()))
    for rule in (MeanUncertainty(), MaxPredictedChange(0.1)):
        assert rule.measure(square) != pytest.approx(rule.measure(cross), rel=0.01)
    assert MeanUncertainty(loss=SquareLoss()).measure(cross) == MeanUncertainty().measure(square)


def test_sessions_stop_and_say_why(tmp_path: Path) -> None:
    _, true = pool()
    x, calls = pool()[0], []

    def accuracy(model: torch.nn.Module) -> dict[str, float]:
        calls.append(1)
        return {"accuracy": float((model(x).argmax(1).numpy() == true).mean())}

    rules = [Budget(30), Target("accuracy", 2.0), Kappa(rounds=50), MeanUncertainty(most=-1.0)]
    options: dict[str, Any] = {"strategy": Random(), "stop": rules, "evaluate": accuracy}
    loop = session(tmp_path / "s.jsonl", **options)
    reasons = loop.run(lambda numbers: true[numbers].tolist(), 6)
    assert reasons == ("30 labels of a budget of 30",)
    assert (loop.labels >= 0).sum() == 30  # the last question is a smaller one, and nothing is trained after it
    assert [found.labels for found in loop.history] == [3, 9, 15, 21, 27]
    assert all(set(found.measured) == {"Kappa", "MeanUncertainty"} for found in loop.history)
    assert len(calls) == 5
    again = session(tmp_path / "s.jsonl", **options)  # nothing is trained or measured again
    assert again.run(lambda numbers: true[numbers].tolist(), 6) == reasons
    assert len(calls) == 5
    assert again.history == loop.history
    with pytest.raises(InputError, match="one rule of each kind"):
        session(tmp_path / "t.jsonl", stop=[Kappa(), Kappa(rounds=2)])
    other = session(tmp_path / "u.jsonl", strategy=Random(), stop=[Target("accuracy", 0.9)])
    with pytest.raises(InputError, match="measures nothing"):
        other.run(lambda numbers: true[numbers].tolist(), 6)


def test_a_budget_goes_by_the_labels_of_now(tmp_path: Path) -> None:
    _, true = pool()
    loop = session(tmp_path / "s.jsonl", strategy=Random(), stop=[Budget(12), Budget(20), Kappa(rounds=50)])
    assert (loop.room, loop.reasons) == (9, ())
    asked = loop.query(15).numbers  # by hand, and more than there is room for
    said: list[list[int]] = []

    def answer(numbers: np.ndarray) -> list[int | None]:
        said.append(numbers.tolist())
        return [None if i == asked[0] else int(true[i]) for i in numbers]

    assert loop.run(answer, 5) == ("12 labels of a budget of 12",)
    assert said == [asked[:9].tolist(), asked[9:10].tolist()]  # what is skipped costs nothing
    assert len(loop.waiting) == 5
    loop.unlabel([int(asked[1])])
    assert (loop.room, loop.reasons) == (1, ())
    assert loop.run(answer, 5) == ("12 labels of a budget of 12",)
    free = session(tmp_path / "t.jsonl", strategy=Random(), stop=[Kappa()])
    assert free.room is None


@pytest.mark.parametrize("wrong", [0, 2.5, None])
def test_rules_count_in_whole_numbers(wrong: Any) -> None:
    for make in (Budget, lambda k: Plateau("accuracy", rounds=k), lambda k: Kappa(rounds=k), lambda k: Kappa(points=k)):
        with pytest.raises(InputError, match="expected a whole number of at least 1"):
            make(wrong)


def test_sessions_end_when_nothing_is_left(tmp_path: Path) -> None:
    _, true = pool()
    loop = session(tmp_path / "s.jsonl", strategy=Random())
    assert loop.run(lambda numbers: true[numbers].tolist(), 15, rounds=2) == ("2 rounds",)
    assert loop.run(lambda numbers: true[numbers].tolist(), 15) == ("every point has a label or was skipped",)
    assert [found.labels for found in loop.history] == [3, 18, 33]
    assert np.array_equal(loop.labels, np.where(START >= 0, START, true))


def test_measures_that_came_later(tmp_path: Path) -> None:
    """Old questions did not measure it: they are passed over, and none is in the way."""
    _, true = pool()
    history = [Finding(3, {}, {}), *told([0.5, 0.7, 0.7])]
    assert Plateau("accuracy", rounds=2).reason(history) is None
    assert stops_at(Plateau("accuracy", rounds=1), history[1:]) == 3
    assert Plateau("accuracy", rounds=1).reason(history) is not None
    assert Target("accuracy", 0.7).reason(history) is not None
    rules: list[StoppingRule] = [Target("accuracy", 0.0), Plateau("accuracy", rounds=1)]
    options: dict[str, Any] = {"strategy": Random(), "stop": rules, "evaluate": lambda _: {"accuracy": 0.5}}
    path = tmp_path / "s.jsonl"
    waiting = session(path, strategy=Random()).query(2).numbers
    loop = session(path, **options)
    assert loop.query(2).numbers.tolist() == waiting.tolist()  # asked before it was measured
    assert loop.reasons == ()
    loop.label(waiting.tolist(), true[waiting].tolist())
    assert loop.query(2).reasons == ("accuracy is 0.5, 0 was asked for",)


def test_a_measure_that_is_missing_is_said_before_it_is_written_down(tmp_path: Path) -> None:
    path, trained = tmp_path / "s.jsonl", []

    def counted(y: np.ndarray) -> torch.nn.Module:
        trained.append(1)
        return fit(y)

    loop = session(path, strategy=Random(), fit=counted, stop=[Plateau("accuracy")])
    before = path.read_bytes()
    with pytest.raises(InputError, match="'accuracy'; the session measures nothing"):
        loop.query(2)
    assert not trained
    misspelt = session(path, strategy=Random(), stop=[Plateau("acuracy")], evaluate=lambda _: {"accuracy": 0.5})
    with pytest.raises(InputError, match="'acuracy'; the session measures accuracy"):
        misspelt.query(2)
    assert path.read_bytes() == before


def test_kappa_compares_the_same_points_alone(tmp_path: Path) -> None:
    _, true = pool()
    path = tmp_path / "s.jsonl"

    def ask(rule: Kappa) -> tuple[str, ...]:
        loop = session(path, strategy=Random(), stop=[rule], fit=lambda _: fit(START))
        loop.label(loop.waiting.tolist(), true[loop.waiting].tolist())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedWarning)
            return loop.query(2).reasons

    same = Kappa(rounds=1, points=20)
    assert ask(same) == ()
    assert ask(same) != ()  # the network is the same, and so are its classes
    for other in (Kappa(rounds=1, points=20, seed=1), Kappa(rounds=1, points=10), same):
        assert ask(other) == ()
    assert ask(same) != ()
    found = session(path, strategy=Random()).history
    classes = fit(START)(pool()[0]).argmax(1)
    watched = torch.randperm(len(true), generator=torch.Generator().manual_seed(1))[:20].sort().values
    assert found[2].measured["Kappa"] == {"points": 20, "seed": 1, "classes": classes[watched].tolist()}
    plain = Finding(3, {}, {"Kappa": found[0].measured["Kappa"]["classes"]})  # as the first journals have it
    assert same.reason([plain, plain]) is not None
    assert same.reason([plain, found[0]]) is None
