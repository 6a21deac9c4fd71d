"""A session on the command line, as a person goes through it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ntkit.cli import app

N, C, NAMES = 60, 3, ["cat", "dog", "owl"]
NET = """
from torch import nn


def make():
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def other():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
"""


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["active", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, ["active", *map(str, words)])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).normal(size=(N + 40, 5)).astype(np.float32)
    y = x[:, :C].argmax(1)
    labels = np.full(N, -1)
    labels[:6] = y[:6]
    np.savez(tmp_path / "data.npz", x=x[:N], truth=y[:N], first=labels, x_test=x[N:], y_test=y[N:])
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def begin(place: Path, *options: object) -> Path:
    session = place / "session.jsonl"
    run(
        "start",
        session,
        f"{place}/net.py:make",
        place / "data.npz",
        "--names",
        ",".join(NAMES),
        "--steps",
        60,
        *options,
    )
    return session


def answer(place: Path, path: Path, *, leave: int = 0, skip: int = 0) -> dict[int, int]:
    truth = np.load(place / "data.npz")["truth"]
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    given = {}
    for k, row in enumerate(rows):
        number = int(row["ntkit_id"])
        if k < skip:
            row["label"] = "skip"
        elif k < len(rows) - leave:
            row["label"] = NAMES[truth[number]]
            given[number] = int(truth[number])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return given


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_session_from_the_first_label_to_the_last(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(place, "--labels", "first", "--budget", 14)
    monkeypatch.chdir(place.parent)  # tomorrow, in another folder
    questions = place / "q.csv"
    out = run("ask", session, "--count", 5, "--out", questions)
    assert "5 questions" in out
    assert "test accuracy" in out
    given = answer(place, questions, leave=2, skip=1)
    said = run("tell", session, questions)
    assert "2 labels, 1 skipped, 0 taken back; 2 questions wait" in said
    waiting = run("ask", session, "--count", 9)  # no new ones
    asked = events(session)[1]["numbers"]
    assert all(str(number) in waiting for number in asked[-2:])
    truth = np.load(place / "data.npz")["truth"]
    words = [f"--label={number}={NAMES[truth[number]]}" for number in asked[-2:]]
    run("tell", session, *words, "--unlabel", next(iter(given)))
    run("ask", session, "--count", 6, "--out", questions)
    answer(place, questions)
    run("tell", session, questions)
    status = " ".join(run("status", session).split())
    for text in ("points 60", "with a label 15", "waiting for an answer 0", "skipped 1", "question 2", "cat", "owl"):
        assert text in status
    assert "you may stop: 15 labels of a budget of 14" in run("ask", session, "--count", 1)


def test_from_no_label_at_all_and_with_weights(place: Path) -> None:
    import torch
    from safetensors.torch import save_file

    session = begin(place)
    out = run("ask", session, "--count", 4)
    asked = events(session)[1]["numbers"]
    assert len(asked) == len(set(asked)) == 4
    assert "chosen" in out
    truth = np.load(place / "data.npz")["truth"]
    run("tell", session, *(f"--label={n}={NAMES[truth[n]]}" for n in asked))
    scope: dict = {}
    exec(NET, scope)
    torch.manual_seed(3)
    model = scope["make"]()
    save_file(model.state_dict(), place / "w.safetensors")
    run("ask", session, "--count", 3, "--weights", place / "w.safetensors")
    from ntkit.uses.active import LookAhead

    y = np.full(N, -1)
    y[asked] = truth[asked]
    x = torch.from_numpy(np.load(place / "data.npz")["x"])
    expected = LookAhead(missing_label=-1).query(x, y, model.eval(), batch_size=3)
    assert events(session)[3]["numbers"] == expected.tolist()


def test_other_tools(place: Path) -> None:
    session = begin(place, "--labels", "first")
    refused("ask", session, "--out", place / "tasks.json")
    out = run("ask", session, "--out", place / "tasks.json", "--format", "labelstudio", "--count", 2)
    assert "2 questions" in out
    tasks = json.loads((place / "tasks.json").read_text())
    for task in tasks:
        choice = {"type": "choices", "from_name": "label", "value": {"choices": ["dog"]}}
        task["annotations"] = [{"was_cancelled": False, "result": [choice]}]
    (place / "export.json").write_text(json.dumps(tasks))
    run("tell", session, place / "export.json", "--format", "labelstudio")
    assert events(session)[2]["labels"] == [1, 1]


def test_what_is_wrong_is_said_and_nothing_is_written(place: Path) -> None:
    session = begin(place, "--labels", "first")
    before = session.read_bytes()
    net, data = f"{place}/net.py:make", place / "data.npz"
    assert "there is a session" in refused("start", session, net, data)
    assert "expected one of curvature-ivr" in refused("start", place / "n.jsonl", net, data, "--strategy", "magic")
    assert "3 outputs" in refused("start", place / "n.jsonl", net, data, "--names", "a,b")
    assert "no array 'nothing'" in refused("start", place / "n.jsonl", net, data, "--labels", "nothing")
    assert "cross-entropy or square" in refused("start", place / "n.jsonl", net, data, "--loss", "hinge")
    assert not (place / "n.jsonl").exists()
    assert "begin one with" in refused("status", place / "none.jsonl")
    assert "NUMBER=CLASS" in refused("tell", session, "--label", "3")
    assert "expected one of cat, dog, owl" in refused("tell", session, "--label", "30=cow")
    assert "nothing to tell" in refused("tell", session)
    assert "from 0 to 59" in refused("tell", session, "--label", "30=cat", "--label", "60=cat")
    assert "has a label" in refused("tell", session, "--label", "30=cat", "--skip", "0")
    assert "100 points are asked for" in refused("ask", session, "--count", "100")
    assert session.read_bytes() == before
    arrays = dict(np.load(data))
    arrays["x"][0, 0] += 1
    np.savez(data, **arrays)
    assert "another data" in refused("status", session)
    assert session.read_bytes() == before


def test_another_network_is_refused(place: Path) -> None:
    session = begin(place, "--labels", "first")
    run("ask", session, "--count", 2)
    asked = events(session)[1]["numbers"]
    run("tell", session, *(f"--label={n}=cat" for n in asked))
    before = session.read_bytes()
    (place / "net.py").write_text(NET.replace("16", "12"))
    assert "built in another way" in refused("ask", session)
    assert session.read_bytes() == before
