"""A watched run: killed at any checkpoint it ends where it would have ended, bit for bit."""

from __future__ import annotations

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

    wild = Run(50, 8, optimizer=partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(ModelError, match=r"diverged"):
        watch(network(), train, test, generator=generator, run=wild, look=Look(5, 3))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(StoreError, match="no checkpoint"):
        run(tmp_path / "broken")
