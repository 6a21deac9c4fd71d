"""A session on the command line, as a person goes through it."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
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
    text = np.array([f'point "{i}", ä' for i in range(N)])
    np.savez(tmp_path / "data.npz", x=x[:N], truth=y[:N], first=labels, x_test=x[N:], y_test=y[N:], text=text)
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
    session = begin(place, "--labels", "first", "--budget", 16)
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
    run("ask", session, "--count", 7, "--out", questions)
    answer(place, questions)
    run("tell", session, questions)
    status = " ".join(run("status", session).split())
    for text in ("points 60", "with a label 16", "waiting for an answer 0", "skipped 1", "question 2", "cat", "owl"):
        assert text in status
    assert "you may stop: 16 labels of a budget of 16" in run("ask", session, "--count", 1)


def test_a_budget_is_not_overrun(place: Path) -> None:
    session = begin(place, "--labels", "first", "--budget", 8)
    assert "2 of 5 points are asked for" in run("ask", session, "--count", 5)
    asked = events(session)[1]["numbers"]
    assert len(asked) == 2
    run("tell", session, *(f"--label={n}=cat" for n in asked))
    assert "you may stop: 8 labels of a budget of 8" in run("status", session)  # before anybody asks again
    out = run("ask", session, "--count", 3)  # who wants more has been told
    assert "you may stop: 8 labels of a budget of 8" in out
    assert len(events(session)[3]["numbers"]) == 3


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


def test_people_see_the_points_in_every_form(place: Path) -> None:
    """The forms are those of the tools' own pages: labelstud.io/guide/predictions, docs.argilla.io (rg.Record)."""
    session = begin(place, "--labels", "first", "--items", "text")
    table, tasks, records = place / "q.csv", place / "tasks.json", place / "records.json"
    run("ask", session, "--out", table, "--count", 3)
    run("ask", session, "--out", tasks, "--format", "labelstudio")
    run("ask", session, "--out", records, "--format", "argilla")
    asked = events(session)[1]["numbers"]
    guessed = [NAMES[guess] for guess in events(session)[1]["guesses"]]
    seen = [f'point "{i}", ä' for i in asked]
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert list(rows[0]) == ["ntkit_id", "score", "guess", "text", "label"]
    assert [(int(row["ntkit_id"]), row["text"], row["guess"]) for row in rows] == list(
        zip(asked, seen, guessed, strict=True)
    )
    for task, number, text, guess in zip(json.loads(tasks.read_text()), asked, seen, guessed, strict=True):
        assert set(task) == {"data", "predictions"}
        assert task["data"] == {"text": text, "ntkit_id": number}
        (prediction,) = task["predictions"]
        assert set(prediction) == {"model_version", "score", "result"}
        assert 0 <= prediction["score"] <= 1
        assert prediction["result"] == [
            {"from_name": "label", "to_name": "item", "type": "choices", "value": {"choices": [guess]}}
        ]
    for record, number, text, guess in zip(json.loads(records.read_text()), asked, seen, guessed, strict=True):
        assert set(record) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
        assert (record["id"], record["fields"]) == (str(number), {"text": text})
        assert record["metadata"]["ntkit_id"] == number
        assert record["suggestions"] == {"label": {"value": guess, "score": None, "agent": "ntkit"}}
    done = json.loads(records.read_text())
    done[0]["responses"] = {"label": [{"value": "owl", "user_id": "1"}]}
    records.write_text(json.dumps(done))
    run("tell", session, records, "--format", "argilla")
    done = json.loads(tasks.read_text())
    done[1]["annotations"] = [{"was_cancelled": True, "result": []}]
    tasks.write_text(json.dumps(done))
    run("tell", session, tasks, "--format", "labelstudio")
    given = answer(place, table, skip=2)
    assert [event["labels"] for event in events(session)[2:4]] == [[2], []]
    assert events(session)[3]["skipped"] == [asked[1]]
    assert list(given) == [asked[2]]
    # a table with two columns, of addresses of images and texts, for one question
    pictures = place / "seen.csv"
    lines = [["image", "remark"], *([f"https://example.org/{i}.png", f"no. {i}"] for i in range(N))]
    with pictures.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    run("ask", session, "--out", tasks, "--format", "labelstudio", "--items", pictures)
    (task,) = json.loads(tasks.read_text())
    assert task["data"] == {
        "image": f"https://example.org/{asked[2]}.png", "remark": f"no. {asked[2]}", "ntkit_id": asked[2],
    }  # fmt: skip


def test_items_that_do_not_fit(place: Path) -> None:
    net, data, new = f"{place}/net.py:make", place / "data.npz", place / "n.jsonl"
    table = place / "items.csv"
    assert "no array 'txt', it holds" in refused("start", new, net, data, "--items", "txt")
    assert "expected strings" in refused("start", new, net, data, "--items", "x")
    table.write_text("text\none\ntwo\n")
    assert "2, expected one for each of the 60 points" in refused("start", new, net, data, "--items", table)
    table.write_text("text,more\n" + "one\n" * N)
    assert "line of point 0 has not one entry" in refused("start", new, net, data, "--items", table)
    table.write_text("score\n" + "1\n" * N)
    assert "'score', which is one of our own" in refused("start", new, net, data, "--items", table)
    assert not new.exists()
    session = begin(place, "--labels", "first")
    before = session.read_bytes()
    out = place / "records.json"
    assert "say --items" in refused("ask", session, "--out", out, "--format", "argilla")
    assert session.read_bytes() == before  # before anything was trained
    kept = json.loads(before.splitlines()[0])["settings"]
    assert kept["items"] is None


def test_sessions_of_before_items_go_on(place: Path) -> None:
    """Their first line does not say what people see."""
    from ntkit.uses.active.journal import Journal

    begun = Journal(begin(place, "--labels", "first")).events[0]
    del begun["settings"]["items"]
    old = Journal(place / "old.jsonl")
    old.add(begun.pop("event"), **begun)
    assert "points 60" in " ".join(run("status", place / "old.jsonl").split())


def test_what_a_killed_start_leaves_behind_is_no_session(place: Path) -> None:
    session = begin(place, "--labels", "first")
    whole = session.read_bytes()
    for size in (0, 1, 80, len(whole) // 2, len(whole) - 1):
        session.write_bytes(whole[:size])
        for words in (("ask",), ("tell", "--label", "30=cat"), ("status",)):
            assert "only the beginning of its first line" in refused(words[0], session, *words[1:])
        assert session.read_bytes() == whole[:size]
        begin(place, "--labels", "first")
        assert session.read_bytes() == whole


KILLED = """
import os, signal, sys
from ntkit.uses.active import journal
write, sync = os.write, os.fsync
moment, words = sys.argv[1], sys.argv[2:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def writes(handle, data):
    if not data.startswith(b'{"sha256"'):
        return write(handle, data)
    if moment == "half":
        write(handle, data[: len(data) // 2])
    if moment != "after":
        die()
    return write(handle, data)

os.write, os.fsync = writes, die
from ntkit.cli import app
app(["active", *words])
"""


@pytest.mark.parametrize(
    ("moment", "command"),
    [("before", "start"), ("half", "start"), ("half", "ask"), ("half", "tell"), ("after", "tell")],
)
def test_a_command_killed_at_any_moment_has_happened_or_not(place: Path, moment: str, command: str) -> None:
    session, net = place / "session.jsonl", f"{place}/net.py:make"
    more = ("--names", ",".join(NAMES), "--steps", 60, "--labels", "first")
    steps = {
        "start": ("start", session, net, place / "data.npz", *more),
        "ask": ("ask", session, "--count", 3),
        "tell": ("tell", session, "--label", "30=cat", "--skip", "31"),
    }
    order = list(steps)
    for words in order[: order.index(command)]:
        run(*steps[words])
    before = session.read_bytes() if session.exists() else b""
    words = [sys.executable, "-c", KILLED, moment, *map(str, steps[command])]
    assert (
        subprocess.run(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode == -signal.SIGKILL
    )
    left = session.read_bytes()
    assert left.startswith(before)
    assert (b"\n" in left[len(before) :]) == (moment == "after")
    if moment != "after":
        for words in order[order.index(command) :]:
            run(*steps[words])
    found = [{k: v for k, v in event.items() if k != "sha256" and "seconds" not in k} for event in events(session)]
    session.unlink()
    for words in order[: len(found)]:
        run(*steps[words])
    whole = [{k: v for k, v in event.items() if k != "sha256" and "seconds" not in k} for event in events(session)]
    assert found == whole


def in_a_read_only_folder(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    inside = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && exec {sys.executable} -"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside], input=script, text=True, capture_output=True, env=environment
    )


def read_only_folders_can_be_made() -> bool:
    import tempfile

    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        return in_a_read_only_folder(Path(folder), "print(1)").returncode == 0


@pytest.mark.skipif(not read_only_folders_can_be_made(), reason="needs a file system that cannot be written")
def test_a_folder_that_cannot_be_written(place: Path) -> None:
    """What can be read is read, a torn line or not; what must be written is refused before training."""
    session = begin(place, "--labels", "first")
    run("ask", session, "--count", 3)
    run("tell", session, "--label", "30=cat")
    lines = session.read_bytes().splitlines(keepends=True)
    torn = place / "torn.jsonl"
    torn.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    before = session.read_bytes(), torn.read_bytes()
    found = in_a_read_only_folder(
        place,
        f"""
import pathlib, unittest.mock
from typer.testing import CliRunner
from ntkit.cli import app
from ntkit.errors import StoreError
from ntkit.report.session import Session

def run(*words):
    return CliRunner().invoke(app, ["active", *words])

for session, labels in (({str(session)!r}, 7), ({str(torn)!r}, 6)):
    status = run("status", session)
    assert status.exit_code == 0, status.output
    assert f"with a label {{labels}}" in " ".join(status.output.split()), status.output
    again = run("ask", session)  # the questions that wait
    assert again.exit_code == 0, again.output
    with unittest.mock.patch.object(Session, "_train", side_effect=AssertionError("trained for nothing")):
        for words in (("tell", session, "--label", "40=cat"), ("ask", session, "--out", "{place}/q.csv")):
            found = run(*words)
            assert found.exit_code == 2, found.output
            assert "Read-only file system" in found.output, found.output
        loop = Session.resume(pathlib.Path(session)).loop
        loop._pending = []
        try:
            loop.query(2)
        except StoreError as error:
            assert "Read-only file system" in str(error), error
        else:
            raise AssertionError("nothing was said")
""",
    )
    assert found.returncode == 0, found.stderr
    assert (session.read_bytes(), torn.read_bytes()) == before


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
    assert "nothing to tell: hand in a file" in refused("tell", session)
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


def test_answers_that_have_not_been_told_are_kept(place: Path) -> None:
    """Asking again writes the questions anew: not over a column that somebody has filled in."""
    session, questions = begin(place, "--labels", "first"), place / "q.csv"
    run("ask", session, "--count", 4, "--out", questions)
    run("ask", session, "--out", questions)  # nothing is filled in yet
    assert "q.csv has no answer yet" in refused("tell", session, questions)
    answer(place, questions, leave=1, skip=1)
    filled, before = questions.read_bytes(), session.read_bytes()
    assert "has not been told: 3, the first to point" in refused("ask", session, "--out", questions)
    assert questions.read_bytes() == filled
    assert session.read_bytes() == before
    run("tell", session, questions)
    asked = events(session)[1]["numbers"]
    run("tell", session, "--label", f"{asked[1]}=cat", "--unlabel", asked[2])  # they have been told all the same
    run("ask", session, "--out", questions)
    run("tell", session, "--label", f"{asked[3]}=cat")
    other = place / "other.jsonl"
    answer(place, questions)
    run("start", other, f"{place}/net.py:make", place / "data.npz", "--names", "cat,dog,owl", "--steps", 60)
    assert "has not been told: 1, the first to point" in refused("ask", other, "--out", questions)  # of another session
    for name, content in (("notes.csv", "a,b\n1,2\n"), ("list.csv", "milk"), ("t.json", "[1]")):
        path = place / name
        path.write_text(content)
        more = ("--format", "labelstudio") if name == "t.json" else ()
        assert "cannot be read as questions" in refused("ask", session, "--out", path, *more)
        assert path.read_text() == content
    (place / "empty.csv").write_text("")
    run("ask", session, "--count", 2, "--out", place / "empty.csv")


def test_answers_of_another_session_are_refused(place: Path) -> None:
    """Both are of the same pool, so that every number fits."""
    session, other = begin(place, "--labels", "first"), place / "other.jsonl"
    shutil.copy(session, other)
    run("ask", session, "--count", 3, "--out", place / "q.csv")
    run("ask", other, "--count", 3)
    asked = events(session)[1]["numbers"]
    answer(place, place / "q.csv", skip=1)
    run("tell", session, place / "q.csv")
    strange = next(i for i in range(10, N) if i not in asked)
    text = (place / "q.csv").read_text().replace(f"\n{asked[2]},", f"\n{strange},")
    (place / "mixed.csv").write_text(text)
    before = session.read_bytes()
    said = refused("tell", session, place / "mixed.csv")
    assert f"1 of its answers are to points that this session has never asked for, the first to point {strange}" in said
    assert "Say --unasked if they are meant" in said
    rows = list(csv.DictReader(io.StringIO((place / "q.csv").read_text())))
    with (place / "skipped.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([{**rows[0], "ntkit_id": strange}])
    assert f"the first to point {strange}" in refused("tell", session, place / "skipped.csv")
    assert session.read_bytes() == before
    run("tell", session, place / "mixed.csv", "--unasked")
    assert strange in events(session)[-1]["numbers"]
    run("tell", session, place / "mixed.csv")  # that is known by now
    run("tell", session, place / "q.csv")  # the same again


def test_names_of_classes_can_be_answered(place: Path) -> None:
    session, net, data = place / "s.jsonl", f"{place}/net.py:make", place / "data.npz"
    for names, message in (("cat,cat,owl", "same name"), ("cat, cat,owl", "same name"), ("cat,,owl", "empty name")):
        assert message in refused("start", session, net, data, "--names", names)
        assert not session.exists()
    run("start", session, net, data, "--names", "cat, dog , owl", "--steps", 60)
    run("tell", session, "--label", "3=dog", "--label", "4=owl")
    assert events(session)[1]["labels"] == [1, 2]
    assert events(session)[0]["settings"]["names"] == NAMES


def test_a_strategy_that_the_network_cannot_serve_is_refused_before_the_session_begins(place: Path) -> None:
    net, data, new = f"{place}/net.py:make", place / "data.npz", place / "n.jsonl"
    said = refused("start", new, net, data, "--strategy", "bald")
    assert "BALD cannot be used with this network: the network has no dropout" in said
    assert "Say --strategy NAME" in said
    (place / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.2), nn.Linear(16, 3))\n"
        "    nn.init.zeros_(model[2].weight)\n    return model\n\n\n"
        "def end():\n    return nn.Sequential(nn.Linear(5, 16), nn.Linear(16, 3), nn.Tanh())\n"
    )
    assert "no last layer" in refused("start", new, f"{place}/net.py:end", data, "--strategy", "badge")
    assert not new.exists()
    run("start", new, net, data, "--strategy", "bald", "--labels", "first", "--steps", 20)
    assert len(events(new)) == 1


@pytest.mark.filterwarnings("always::ntkit.uses.active.loop.ChangedStrategyWarning")
def test_another_strategy_for_a_question(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(place, "--labels", "first")
    before = session.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("ntkit.report.session.Session._train", lambda *_: pytest.fail("trained for nothing"))
        assert "BALD cannot be used" in refused("ask", session, "--strategy", "bald")
        assert "expected one of curvature-ivr" in refused("ask", session, "--strategy", "magic")
    assert session.read_bytes() == before
    said = run("ask", session, "--count", 2, "--strategy", "margin")
    assert "note: this session was begun with another strategy: LookAhead" in " ".join(said.split())
    assert events(session)[1]["strategy"].startswith("Margin(")
    run("tell", session, *(f"--label={n}=cat" for n in events(session)[1]["numbers"]))
    run("ask", session, "--count", 2)
    assert events(session)[3]["strategy"].startswith("LookAhead(")
    cold = place / "cold.jsonl"
    run("start", cold, f"{place}/net.py:make", place / "data.npz")
    run("ask", cold, "--strategy", "k-means++", "--count", 2)
    assert events(cold)[1]["strategy"].startswith("KMeansPlusPlus(")


def test_no_label_and_no_last_linear_layer(place: Path) -> None:
    (place / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3), nn.Tanh())\n"
    )
    session = begin(place)
    run("ask", session, "--count", 4)
    assert len(set(events(session)[1]["numbers"])) == 4


def test_another_file_is_no_session(place: Path) -> None:
    notes = place / "notes.json"
    notes.write_text('{"important": 1}')
    assert "no session" in refused("start", notes, f"{place}/net.py:make", place / "data.npz")
    assert "no session" in refused("ask", notes)
    assert notes.read_text() == '{"important": 1}'
