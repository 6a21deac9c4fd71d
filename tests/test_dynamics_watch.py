"""A watched run: killed at any checkpoint it ends where it would have ended, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.uses import dynamics
from ntkit.uses.dynamics import Every, Look, Run, Watched, watch


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    return (x[:40], y[:40]), (x[40:], y[40:])


class Killed(Exception):
    """In place of a signal."""


def run(folder: Path | None, *, until: int | None = None, steps: int = 30) -> Watched:
    def tick(step: int, _: int) -> None:
        if step == until:
            raise Killed

    train, test = data()
    return watch(
        network(), train, test, generator=torch.Generator().manual_seed(3), run=Run(steps, 8),
        look=Look(10, 6, Every(2)), folder=folder, progress=tick,
    )  # fmt: skip


@pytest.mark.parametrize("until", [1, 2, 17, 29])
def test_goes_on_after_a_kill(until: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics.watch.__globals__["time"], "monotonic", iter(range(0, 10**6, 15)).__next__)
    whole = run(None)
    with pytest.raises(Killed):
        run(tmp_path / "run", until=until)
    again = run(tmp_path / "run")
    assert torch.equal(again.paths.logits, whole.paths.logits)
    assert again.paths.steps.tolist() == whole.paths.steps.tolist() == list(range(0, 31, 2))
    for name in ("drift", "alignment", "largest"):
        assert torch.equal(getattr(again.kernel, name), getattr(whole.kernel, name))
    assert torch.equal(again.test, whole.test)
    assert float(whole.train[-1]) > float(whole.train[0])
    finished = run(tmp_path / "run")  # nothing is done again
    assert torch.equal(finished.paths.logits, whole.paths.logits)


def test_goes_on_with_nothing_else(tmp_path: Path) -> None:
    """Other test examples, and another generator: what was recorded is not mixed with either's."""
    train, test = data()

    def watched(folder: Path, test: tuple[Tensor, Tensor], seed: int, until: int | None = None) -> Watched:
        def tick(step: int, _: int) -> None:
            if step == until:
                raise Killed

        return watch(
            network(), train, test, generator=torch.Generator().manual_seed(seed), run=Run(20, 8), look=Look(40, 6),
            folder=folder, progress=tick,
        )  # fmt: skip

    for name, until in (("killed", 12), ("whole", None)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dynamics.watch.__globals__["time"], "monotonic", iter(range(0, 10**6, 25)).__next__)
            if until is None:
                watched(tmp_path / name, test, 3)
            else:
                with pytest.raises(Killed):
                    watched(tmp_path / name, test, 3, until)
        for other, seed in (
            ((test[0][:10], test[1][:10]), 3), ((test[0] + 1, test[1]), 3), ((test[0], 2 - test[1]), 3), (test, 4),
        ):  # fmt: skip
            with pytest.raises(StoreError, match="other data, another seed"):
                watched(tmp_path / name, other, seed)
        assert torch.equal(watched(tmp_path / name, test, 3).test, watched(tmp_path / "afresh", test, 3).test)


def test_the_last_step_is_looked_at() -> None:
    """What is said of the end is said of the network that is handed back, whatever the schedule."""
    train, test = data()
    model, run = network(), Run(29, 8)
    assert not Every(2).due(run.steps)
    seen = watch(model, train, test, generator=torch.Generator().manual_seed(3), run=run, look=Look(10, 6, Every(2)))
    assert seen.paths.steps.tolist() == [*range(0, 29, 2), 29]
    assert int(seen.kernel.steps[-1]) == int(seen.steps[-1]) == 29
    torch.testing.assert_close(seen.paths.logits[-1], model.eval()(seen.probes).detach())
    assert float(seen.test[-1]) == float((model(test[0]).argmax(1) == test[1]).double().mean())


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("test", lambda y: y[:, None], r"test: y are classes \(20,\): got \(20, 1\)"),
        ("test", lambda y: y[:5], r"test: y are classes \(20,\)"),
        ("test", lambda y: y.double(), "test: y are classes"),
        ("test", lambda y: y - 1, "test: y are classes from 0 to 2.*got -1 to 1"),
        ("train", lambda y: torch.where(torch.arange(40) == 7, -100, y), "train: y are classes from 0 to 2.*got -100"),
        ("train", lambda y: torch.where(torch.arange(40) == 7, 3, y), "train: y are classes from 0 to 2.*got 0 to 3"),
    ],
)
def test_targets_are_looked_at_before_anything_is_done(
    name: str, spoil: Callable[[Tensor], Tensor], words: str, tmp_path: Path
) -> None:
    train, test = data()
    if name == "test":
        test = test[0], spoil(test[1])
    else:
        train = train[0], spoil(train[1])
    model, generator = network(), torch.Generator().manual_seed(3)
    before, state = copy.deepcopy(model.state_dict()), generator.get_state()
    with pytest.raises(InputError, match=words):
        watch(model, train, test, generator=generator, run=Run(3, 8), look=Look(3, 2), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
    assert torch.equal(generator.get_state(), state)


def test_one_logit_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (x, y), (x_test, y_test) = data()
    single = nn.Linear(4, 1)
    with pytest.raises(InputError, match="two classes or more"):
        watch(single, (x, 0 * y), (x_test, 0 * y_test), generator=torch.Generator(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_input(tmp_path: Path) -> None:
    train, test = data()
    generator = torch.Generator().manual_seed(3)
    run(tmp_path / "run")
    with pytest.raises(StoreError, match="another network"):
        run(tmp_path / "run", steps=40)
    with pytest.raises(InputError, match="classes"):
        watch(network(), (train[0], train[1][:5]), test, generator=generator)
    with pytest.raises(InputError, match="steps"):
        Run(0)
    from functools import partial

    normed = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(InputError, match="Expected more than 1 value per channel"):
        watch(normed, train, test, generator=generator, run=Run(3, 1), look=Look(5, 3))
    wild = Run(50, 8, optimizer=partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(ModelError, match=r"diverged"):
        watch(network(), train, test, generator=generator, run=wild, look=Look(5, 3))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(StoreError, match="no checkpoint"):
        run(tmp_path / "broken")
