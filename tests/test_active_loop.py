"""Sessions: they go on after SIGKILL as if nothing had happened, and refuse what is not theirs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.kernel.features import FeatureKernel
from ntkit.tangent.examples import Examples
from ntkit.uses.active import Budget, ChangedStrategyWarning, Given, LookAhead, Margin, SquareLoss
from ntkit.uses.active.journal import Journal
from ntkit.uses.active.loop import Loop
from ntkit.uses.active.uncertainty import Random

N, C = 40, 3
START = np.full(N, -1)
START[:3] = [0, 1, 2]


def pool() -> tuple[Tensor, np.ndarray]:
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, x[:, :C].argmax(1).numpy()


def fit(y: np.ndarray) -> nn.Module:
    """Ridge regression as a linear network."""
    x, _ = pool()
    phi = torch.cat([x, torch.ones(N, 1).double()], 1)[torch.from_numpy(y >= 0)]
    target = torch.eye(C).double()[torch.from_numpy(y[y >= 0])]
    solution = torch.linalg.solve(phi.T @ phi + 0.1 * torch.eye(5).double(), phi.T @ target)
    model = nn.Linear(4, C).double().eval()
    with torch.no_grad():
        model.weight.copy_(solution[:4].T)
        model.bias.copy_(solution[4])
    return model


def session(path: Path, **options: Any) -> Loop:
    defaults: dict[str, Any] = {"strategy": LookAhead(loss=SquareLoss()), "fit": fit, "classes": C, "y": START}
    return Loop(options.pop("X", pool()[0]), journal=path, **{**defaults, **options})


def events(path: Path) -> list[dict[str, Any]]:
    """Without checksums and times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in e.items() if k != "sha256" and not k.startswith("seconds")} for e in lines]


def run(path: Path, rounds: int, pause: float = 0.0) -> Loop:
    """Rounds of four points, one answer at a time; every eleventh point cannot be labelled."""
    _, true = pool()
    loop = session(path)
    while loop.rounds < rounds or len(loop.waiting):
        for number in loop.query(4).numbers:
            time.sleep(pause)
            loop.skip([number]) if number % 11 == 0 else loop.label([number], [true[number]])
    return loop


def test_killed_sessions_end_as_unbroken_ones(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.jsonl", 5)
    command = [
        sys.executable,
        "-c",
        "import sys, pathlib, test_active_loop as t; t.run(pathlib.Path(sys.argv[1]), 5, 0.02)",
    ]
    path, kills = tmp_path / "killed.jsonl", 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    while True:
        process = subprocess.Popen([*command, str(path)], env=environment)
        before = path.stat().st_size if path.exists() else 0
        if kills < 3:
            while process.poll() is None and (not path.exists() or path.stat().st_size < before + 700):
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        elif process.wait() == 0:
            break
        else:
            pytest.fail("the session did not go on")
    assert events(path) == events(tmp_path / "whole.jsonl")
    assert kills == 3
    assert np.array_equal(session(path).labels, whole.labels)


def test_a_line_torn_at_any_byte_has_not_happened(tmp_path: Path) -> None:
    run(tmp_path / "whole.jsonl", 2)
    data = (tmp_path / "whole.jsonl").read_bytes()
    for size in range(0, len(data), 37):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(data[:size])
        run(path, 2)
        assert events(path) == events(tmp_path / "whole.jsonl")


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    run(tmp_path / "whole.jsonl", 1)
    data = (tmp_path / "whole.jsonl").read_bytes()
    for place in range(0, len(data) - 1, 3):
        path = tmp_path / "flipped.jsonl"
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        before = path.read_bytes()
        with pytest.raises(StoreError, match="line"):
            session(path)
        assert path.read_bytes() == before
    lines = data.splitlines(keepends=True)
    (tmp_path / "flipped.jsonl").write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(StoreError, match="line 3"):
        session(tmp_path / "flipped.jsonl")


def test_reading_changes_nothing_and_writers_wait_for_each_other(tmp_path: Path) -> None:
    """A line that another process is writing is not cut off by one that looks."""
    path = tmp_path / "s.jsonl"
    loop = session(path)
    first = loop.query(4).numbers
    whole = path.read_bytes()
    Journal(path).add("tell", numbers=[int(first[0])], labels=[1], skipped=[], unlabelled=[])
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:40])  # half of it is there
    reader = session(path)
    assert reader.labels[first[0]] == -1
    assert path.read_bytes() == whole + line[:40]
    with path.open("ab") as file:
        file.write(line[40:])
    assert session(path).labels[first[0]] == 1
    for late in (loop, reader):  # they know nothing of that line
        with pytest.raises(StoreError, match="another process has gone on"):
            late.label([int(first[1])], [2])
        assert path.read_bytes() == whole + line
        assert late.labels[first[1]] == -1
    path.write_bytes(whole + line[:40])
    reader.label([int(first[1])], [2])  # nobody has finished that line: it is cut off
    assert session(path).labels[first[[0, 1]]].tolist() == [-1, 2]
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match="another process has gone on"):
        reader.label([int(first[2])], [2])
    assert path.read_bytes() == whole[:-1]


def test_writers_have_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "s.jsonl"
    loop, write, seen = session(path), os.write, []

    def watched(handle: int, data: bytes) -> int:
        with path.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(handle)
        return write(handle, data[:100])  # as a disk may take it

    monkeypatch.setattr(os, "write", watched)
    loop.label([5], [1])
    assert len(seen) > 1
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert session(path).labels[5] == 1


def test_an_empty_file_is_no_session_yet(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    for start in (b"", b'{"sha256": "12'):
        path.write_bytes(start)
        assert np.array_equal(session(path).labels, START)
        assert len(events(path)) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"notes",
        b'{"a": 1}',
        b"[1, 2]",
        b"one\ntwo\n",
        b"one\ntwo",
        b'{"sha256": "xyz',
        b'{"sha256": "12", "event"',
        b"\0" * 9,
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, content: bytes) -> None:
    """One word too little in a call, and the path is that of something that matters."""
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="no session"):
        session(path)
    assert path.read_bytes() == content
    path.unlink()
    journal = Journal(path)
    path.write_bytes(content)  # after it was looked for
    with pytest.raises(StoreError, match=r"no session|another process"):
        journal.add("start")
    assert path.read_bytes() == content
    session(tmp_path / "s.jsonl")
    whole = (tmp_path / "s.jsonl").read_bytes()
    path.write_bytes(whole + content)
    with pytest.raises(StoreError, match="line 2 is not what was written"):
        session(path)
    assert path.read_bytes() == whole + content


def test_points_that_are_nan_are_found_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, x = tmp_path / "s.jsonl", pool()[0].clone()
    x[17, 2] = torch.nan
    for data in (x, (pool()[0], x), {"x": x}, Listed(x)):
        with pytest.raises(InputError, match="point 17 has a NaN"):
            session(path, X=data)
    assert not path.exists()
    session(path, X=(pool()[0], torch.zeros(N, 0)))  # no numbers are no NaN
    path.unlink()
    monkeypatch.setattr("ntkit.uses.active.loop._Numbers", Examples)
    session(path, X=x)
    monkeypatch.undo()
    assert session(path, X=x).n == N  # what has begun goes on


class Listed(Dataset):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], 0


def test_strategies_by_name_and_what_is_none(tmp_path: Path) -> None:
    x, _ = pool()
    named = Loop(x, "margin", fit, journal=None, classes=C, y=START).query(3).numbers
    assert np.array_equal(named, Loop(x, Margin(), fit, journal=None, classes=C, y=START).query(3).numbers)
    for strategy, message in (
        ("magic", "no strategy 'magic'"), (Margin, "the class Margin, not an object"), (3, "strategy: got int"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            session(tmp_path / "s.jsonl", strategy=strategy)
    assert not (tmp_path / "s.jsonl").exists()


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = session(tmp_path / "s.jsonl")
    asked = loop.query(4).numbers
    before = (tmp_path / "s.jsonl").read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        loop.label([asked[0]], [1])
    assert (tmp_path / "s.jsonl").read_bytes() == before
    assert loop.labels[asked[0]] == -1
    monkeypatch.undo()
    loop.label([asked[0]], [1])
    assert session(tmp_path / "s.jsonl").labels[asked[0]] == 1
    before, write = (tmp_path / "s.jsonl").read_bytes(), os.write

    def half(handle: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", full)
        return write(handle, data[:50])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StoreError, match="No space left"):
        loop.label([asked[1]], [1])
    assert (tmp_path / "s.jsonl").read_bytes() == before


def test_questions_and_answers(tmp_path: Path) -> None:
    loop = session(tmp_path / "s.jsonl")
    asked = loop.query(4)
    assert np.array_equal(loop.query(9).numbers, asked.numbers)  # they wait: no others are chosen
    expected = LookAhead(loss=SquareLoss(), missing_label=-1).query(pool()[0], START, fit(START), batch_size=4)
    assert np.array_equal(asked.numbers, expected)
    first, second, third, fourth = asked.numbers.tolist()
    loop.label([second], [2])
    loop.skip([first])
    assert loop.waiting.tolist() == [third, fourth]
    loop.label([third, fourth, 30], [0, 1, 2])  # one that nobody has asked for
    assert loop.labels[[second, third, fourth, 30]].tolist() == [2, 0, 1, 2]
    loop.label([second], [0])
    loop.unlabel([30])
    assert (loop.labels[second], loop.labels[30]) == (0, -1)
    everything = loop.query(N - 7).numbers  # 3 at first, 3 since, 1 skipped
    assert first not in everything
    assert 30 in everything
    with pytest.raises(InputError, match="left without a label"):
        session(tmp_path / "other.jsonl").query(N - 2)
    loop.label([first], [1])  # after all
    assert len(loop.skipped) == 0
    again = session(tmp_path / "s.jsonl", y=None)
    assert np.array_equal(again.labels, loop.labels)
    assert np.array_equal(again.waiting, loop.waiting)


def test_a_function_that_answers(tmp_path: Path) -> None:
    _, true = pool()
    loop = session(tmp_path / "s.jsonl", strategy=Random())
    loop.step(lambda numbers: [None if k == 0 else int(true[i]) for k, i in enumerate(numbers)], 5)
    assert (loop.labels >= 0).sum() == 7
    assert len(loop.skipped) == 1
    with pytest.raises(InputError, match="2 answers came"):
        loop.step(lambda numbers: [0, 1], 5)
    assert len(loop.waiting) == 5


def test_other_sessions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    session(path).query(2)
    x, other = pool()[0], START.copy()
    other[5] = 1
    for change, message in (
        ({"X": x[:-1], "y": None}, "another number of points"),
        ({"classes": 4}, "another number of classes"),
        ({"X": x + 1e-9}, "another data"),
        ({"y": other}, "other labels"),
    ):
        with pytest.raises(StoreError, match=message):
            session(path, **change)
    journal = Journal(path)
    journal.add("dance")
    with pytest.raises(StoreError, match="unknown kind 'dance'"):
        session(path)


def test_going_on(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with pytest.raises(InputError, match="there is no session"):
        Loop.resume(path, pool()[0], Random(), fit)
    assert not path.exists()
    first = session(path, strategy=Random())
    asked = first.query(3).numbers
    again = Loop.resume(path, pool()[0], Random(), fit, evaluate=lambda _: {"accuracy": 0.5})
    assert np.array_equal(again.waiting, asked)
    assert again.classes == C
    again.label(asked.tolist(), [0, 1, 2])
    assert again.query(2).metrics == {"accuracy": 0.5}


def test_another_strategy_is_said_and_written_down(tmp_path: Path) -> None:
    path, (x, _) = tmp_path / "s.jsonl", pool()
    session(path, strategy=Random()).query(1)
    with pytest.warns(ChangedStrategyWarning, match=r"begun with another strategy: Random.*goes on with LookAhead"):
        loop = session(path)
    loop.label(loop.waiting.tolist(), [0])
    loop.query(1)
    assert [event["strategy"].split("(")[0] for event in events(path) if event["event"] != "tell"] == [
        "Random", "Random", "LookAhead",
    ]  # fmt: skip
    session(path)  # it has had both by now
    session(path, strategy=Random())
    # functions are told by their names, not by where they are in memory
    path = tmp_path / "given.jsonl"
    for _ in range(2):
        Loop(x, LookAhead(kernel=Given(Features())), fit, journal=path, classes=C)
    assert "Features" in events(path)[0]["strategy"]


class Features:
    def __call__(self, model: nn.Module, x: Tensor) -> FeatureKernel:
        return FeatureKernel(x)


def test_weights_of_labels_are_the_sessions(tmp_path: Path) -> None:
    path, true, weights = tmp_path / "s.jsonl", pool()[1], np.linspace(0.1, 5, N)
    rule = LookAhead(loss=SquareLoss())
    loop = session(path, sample_weight=weights)
    asked = loop.query(4).numbers
    expected = replace(rule, missing_label=-1).query(pool()[0], START, fit(START), None, 4, weights)
    assert np.array_equal(asked, expected)
    assert not np.array_equal(asked, session(tmp_path / "plain.jsonl").query(4).numbers)
    loop.label(asked.tolist(), true[asked].tolist())
    whole = loop.query(4).numbers
    again = session(tmp_path / "again.jsonl", sample_weight=weights)
    again.label(again.query(4).numbers.tolist(), true[asked].tolist())
    again = Loop.resume(tmp_path / "again.jsonl", pool()[0], rule, fit, sample_weight=weights)
    assert np.array_equal(again.query(4).numbers, whole)
    for other in (None, weights * 2):
        with pytest.raises(StoreError, match="another sample_weight"):
            session(path, sample_weight=other)
    with pytest.raises(StoreError, match="another sample_weight: got None"):
        Loop.resume(path, pool()[0], rule, fit)
    with pytest.raises(InputError, match="40 positive numbers"):
        session(tmp_path / "new.jsonl", sample_weight=weights[:-1])
    assert not (tmp_path / "new.jsonl").exists()
    assert "weights" not in events(tmp_path / "plain.jsonl")[0]  # as before there were any


class Noted(nn.Module):
    """What trains it may note things down on it."""

    def __init__(self, rate: float, name: str) -> None:
        super().__init__()
        self.drop = nn.Dropout(rate)
        self.add_module(name, fit(START))
        self.last = name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.last)(self.drop(x))


def test_a_network_is_another_by_its_modules_and_not_by_notes_on_them(tmp_path: Path) -> None:
    path, true, losses = tmp_path / "s.jsonl", pool()[1], iter(range(9))

    def noted(y: np.ndarray, rate: float = 0.1, name: str = "head") -> nn.Module:
        model = Noted(rate, name).eval()
        model.best_loss = float(next(losses))  # pyright: ignore[reportArgumentType]
        model.drop.note = "of a part as well"  # pyright: ignore[reportArgumentType]
        model.load_state_dict({f"{name}.{key}": tensor for key, tensor in fit(y).state_dict().items()})
        return model

    def wide(_: np.ndarray) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, C)).double().eval()

    loop = session(path, strategy=Random(), fit=noted)
    for _ in range(3):
        loop.step(lambda numbers: true[numbers].tolist(), 2)
    before = path.read_bytes()
    for other in (lambda y: noted(y, rate=0.2), lambda y: noted(y, name="top"), wide):
        with pytest.raises(ModelError, match="built in another way"):
            session(path, strategy=Random(), fit=other).query(2)
    assert path.read_bytes() == before
    old = Journal(tmp_path / "old.jsonl")  # as journals were that knew networks by all their attributes
    for event in Journal(path).events:
        kind, facts = event["event"], {name: value for name, value in event.items() if name != "event"}
        if kind == "query":
            facts["network"] = {"built": "abc", "parameters": facts["network"]["parameters"]}
        old.add(kind, **facts)
    assert len(session(tmp_path / "old.jsonl", strategy=Random(), fit=noted).query(2).numbers) == 2


def test_as_many_outputs_as_classes(tmp_path: Path) -> None:
    for classes in (2, 4):
        path = tmp_path / f"{classes}.jsonl"
        loop = session(path, classes=classes, y=np.where(np.arange(N) < 2, np.arange(N), -1))
        before = path.read_bytes()
        with pytest.raises(ModelError, match=f"3 outputs, the session {classes} classes"):
            loop.query(2)
        assert path.read_bytes() == before


def test_numbers_that_count_nothing_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    for classes in (None, 3.5, 3.0, "3", 0, 1):
        with pytest.raises(InputError, match=r"classes: got .*, expected a whole number of at least 2"):
            session(path, classes=classes)
    for stop, message in (
        (5, "stop: got int; expected an object such as Budget"), (None, "stop: got NoneType"),
        ([Budget], "stop: got the class Budget, not an object of it"), (["budget"], "stop: got 'budget'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            session(path, stop=stop)
    assert not path.exists()
    loop = session(path, classes=np.int64(C), stop=Budget(5), fit=lambda _: pytest.fail("trained for nothing"))
    assert loop.room == 2
    for size in (2.5, 2.0, None, 0, "2"):
        for ask in (loop.query, lambda size: loop.run(lambda _: [], size), lambda size: loop.step(lambda _: [], size)):
            with pytest.raises(InputError, match=r"size: got .*, expected a whole number of at least 1"):
                ask(size)  # pyright: ignore[reportArgumentType]
    assert len(events(path)) == 1
    loop.fit = fit
    assert len(loop.query(np.int64(2)).numbers) == 2  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"size: got 2\.5"):
        loop.query(2.5)  # pyright: ignore[reportArgumentType]


def test_refusals_are_not_written_down(tmp_path: Path) -> None:
    loop = session(tmp_path / "s.jsonl")
    asked = loop.query(3).numbers
    before = (tmp_path / "s.jsonl").read_bytes()
    for call, message in (
        (lambda: loop.label([asked[0]], [3]), "classes from 0 to 2"),
        (lambda: loop.label([asked[0]], [0.5]), "one class"),
        (lambda: loop.label([asked[0]], [0, 1]), "one class"),
        (lambda: loop.label([asked[0]], ["cat"]), "one class, a number from 0 to 2.*'cat'"),  # pyright: ignore
        (lambda: loop.label([asked[0]], [None]), "one class"),  # pyright: ignore[reportArgumentType]
        (lambda: loop.label([asked[0]], [float("inf")]), "one class"),  # pyright: ignore[reportArgumentType]
        (lambda: loop.label(np.arange(N) == asked[0], [1]), "flatnonzero"),  # pyright: ignore[reportArgumentType]
        (lambda: loop.label([N], [0]), "from 0 to 39"),
        (lambda: loop.label([-1], [0]), "from 0 to 39"),
        (lambda: loop.label([5, 5], [0, 1]), "stands twice"),
        (lambda: loop.skip([0]), "point 0 has a label"),
        (lambda: loop.unlabel([asked[0]]), "has no label"),
        (lambda: loop.skip([0.5]), "numbers"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert (tmp_path / "s.jsonl").read_bytes() == before
    for y in (START.astype(float), START[:-1], np.full(N, 3)):
        with pytest.raises(InputError, match="labels"):
            session(tmp_path / "new.jsonl", y=y)
    assert not (tmp_path / "new.jsonl").exists()
