"""Questions and answers in files: what is written can be filled in and read, and what is wrong is named."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ntkit.errors import InputError, StoreError
from ntkit.uses.active.exchange import (
    CSV,
    Answers,
    Argilla,
    Exchange,
    LabelStudio,
    export_tasks,
    import_annotations,
)

NAMES = ["cat", "dog", "bird, small"]
NUMBERS, SCORES, GUESSES = [17, 4, 256], [2.5, 1.5, 0.5], [1, 0, 2]
ITEMS = {i: {"text": f'point "{i}"\nsecond line, ä', "image": f"https://example.org/{i}.png"} for i in NUMBERS}


def written(kind: Exchange, path: Path, **options: Any) -> Path:
    kind.write(path, NUMBERS, SCORES, **{"items": ITEMS, "guesses": GUESSES, **options})
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def fill(path: Path, answers: dict[int, str], separator: str = ",", mark: str = "") -> None:
    """As a spreadsheet saves it."""
    table = rows(path)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), delimiter=separator, lineterminator="\r\n")
    writer.writeheader()
    for row in table:
        writer.writerow({**row, "label": answers.get(int(row["ntkit_id"]), "")})
    path.write_text(mark + out.getvalue(), encoding="utf-8", newline="")


@pytest.mark.parametrize(("separator", "mark"), [(",", ""), (";", "\ufeff"), ("\t", "")])
def test_tables_are_filled_in(tmp_path: Path, separator: str, mark: str) -> None:
    path = written(CSV(NAMES), tmp_path / "q.csv")
    table = rows(path)
    assert [int(row["ntkit_id"]) for row in table] == NUMBERS
    assert [float(row["score"]) for row in table] == SCORES
    assert [row["guess"] for row in table] == ["dog", "cat", "bird, small"]
    assert table[1]["text"] == ITEMS[4]["text"]
    assert CSV(NAMES).read(path) == Answers([], [], [])
    fill(path, {17: "bird, small", 256: "skip"}, separator, mark)
    assert CSV(NAMES).read(path) == Answers([17], [2], [256])


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    path = written(CSV(), tmp_path / "q.csv")
    fill(path, {17: "2", 4: "1.0"})  # as some spreadsheets write a number
    assert CSV().read(path) == Answers([17, 4], [2, 1], [])
    for bad in ("1.5", "-1", "cat", "nan", "inf", "1e999"):
        fill(path, {17: bad})
        with pytest.raises(InputError, match=f"point 17 is '{bad}': expected one of 0, 1, 2"):
            CSV().read(path)


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    path = written(CSV(NAMES), tmp_path / "q.csv")
    fill(path, {4: "mouse"})
    with pytest.raises(InputError, match="'mouse': expected one of cat, dog, bird, small"):
        CSV(NAMES).read(path)
    path.write_text("id,class\n1,cat\n")
    with pytest.raises(InputError, match="ntkit_id and label, got id, class"):
        CSV(NAMES).read(path)
    path.write_text("ntkit_id,label\n1,cat\n1,cat\n")
    assert CSV(NAMES).read(path) == Answers([1], [0], [])
    path.write_text("ntkit_id,label\n1,cat\n1,dog\n")
    with pytest.raises(InputError, match="point 1 has two answers"):
        CSV(NAMES).read(path)
    path.write_text("ntkit_id,label\none,cat\n")
    with pytest.raises(InputError, match="got 'one'"):
        CSV(NAMES).read(path)
    with pytest.raises(InputError, match="cannot read"):
        CSV(NAMES).read(tmp_path / "none.csv")
    with pytest.raises(InputError, match="'score', which is one of the table's own"):
        written(CSV(NAMES), path, items={i: {"score": 1} for i in NUMBERS})
    with pytest.raises(InputError, match="no item for point 256"):
        written(CSV(NAMES), path, items={i: ITEMS[i] for i in NUMBERS[:2]})
    with pytest.raises(InputError, match="same name"):
        CSV(["cat", "cat"])
    with pytest.raises(InputError, match="same name"):
        CSV(["cat", " cat"])  # answers are read without the spaces around them
    with pytest.raises(InputError, match="class 1 has an empty name"):
        CSV(["cat", " "])
    with pytest.raises(InputError, match="one score"):
        CSV().write(path, NUMBERS, SCORES[:2])


def test_cells_that_stand_in_no_column_are_refused(tmp_path: Path) -> None:
    """With a separator too many, what would be read is what stands beside the answer."""
    path = tmp_path / "q.csv"
    path.write_text("ntkit_id,text,label\n1,of 3,cat\n2,of 3, 2,cat\n")
    with pytest.raises(InputError, match="line 3 has more cells than the 3 of the first line: a text with a ','"):
        CSV(NAMES).read(path)
    path.write_text("ntkit_id,text,label\n1,of 3,2,\n")  # would be class 2
    with pytest.raises(InputError, match="line 2 has more cells"):
        CSV().read(path)
    for head in ("ntkit_id,label,label", "ntkit_id,label,ntkit_id,label"):
        path.write_text(f"{head}\n1,cat,dog\n")
        with pytest.raises(InputError, match="there are 2 columns"):
            CSV(NAMES).read(path)


@pytest.mark.parametrize("kind", [CSV, LabelStudio, Argilla])
def test_questions_that_cannot_be_written(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "q"
    for guess in (-1, 3):
        with pytest.raises(InputError, match=f"got {guess}, expected one of 0 to 2"):
            written(kind(NAMES), path, guesses=[0, guess, 1])
    with pytest.raises(InputError, match=r"got -1, expected one of 0, 1, 2"):
        written(kind(), path, guesses=[0, -1, 1])
    for score in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="that of point 4 is not"):
            kind(NAMES).write(path, NUMBERS, [1.0, score, 2.0], items=ITEMS)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        (LabelStudio(), {"data": [1]}, r"data: expected an object, got \[1\]"),
        (LabelStudio(), {"data": {"ntkit_id": 1}, "annotations": ["x"]}, 'annotations are objects: got "x"'),
        (LabelStudio(), {"data": {"ntkit_id": 1}, "annotations": [{"result": 3}]}, "result: expected a list, got 3"),
        (LabelStudio(), {"data": {"ntkit_id": 1}, "annotations": [{"result": [3]}]}, "results are objects: got 3"),
        (
            LabelStudio(),
            {"data": {"ntkit_id": 1}, "annotations": [{"result": [
                {"type": "choices", "from_name": "label", "value": {"choices": "cat"}}
            ]}]},
            'choices: expected a list, got "cat"',
        ),
        (
            LabelStudio(),
            {"data": {"ntkit_id": 1}, "annotations": [{"result": [
                {"type": "choices", "from_name": "animal", "value": {"choices": ["cat"]}}
            ]}]},
            "no answer is one to the tag 'label', those that are there are to animal",
        ),
        (Argilla(), {"id": "1", "responses": [1]}, r"responses: expected an object, got \[1\]"),
        (Argilla(), {"id": "1", "responses": {"label": "cat"}}, 'label: expected a list, got "cat"'),
        (Argilla(), {"id": "1", "responses": {"label": ["cat"]}}, 'responses are objects: got "cat"'),
    ],
)  # fmt: skip
def test_files_of_another_shape(tmp_path: Path, kind: Exchange, task: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([task]))
    with pytest.raises(InputError, match=message):
        kind.read(path)


def test_null_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for responses in (None, {}, {"label": None}, {"label": []}):
        path.write_text(json.dumps([{"id": "1", "responses": responses}]))
        assert Argilla().read(path) == Answers([], [], [])
    path.write_text(json.dumps([{"id": "1", "responses": {"label": [{"value": "2", "status": None}]}}]))
    assert Argilla().read(path) == Answers([1], [2], [])
    part = {"type": "choices", "from_name": "label", "value": None}
    for done in (None, [], [{"result": None}], [{"result": [part]}]):
        path.write_text(json.dumps([{"data": {"ntkit_id": 1}, "annotations": done}]))
        assert LabelStudio().read(path) == Answers([], [], [])


def test_spaces_around_names_do_not_matter(tmp_path: Path) -> None:
    names = ["cat", " dog", "owl "]
    path = written(CSV(names), tmp_path / "q.csv")
    fill(path, {17: "dog", 4: " owl", 256: "cat "})
    assert CSV(names).read(path) == Answers([17, 4, 256], [1, 2, 0], [])


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(CSV(NAMES), tmp_path / "q.csv")
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StoreError, match="No space left"):
        written(CSV(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["q.csv"]


def test_label_studio(tmp_path: Path) -> None:
    path = written(LabelStudio(NAMES, choices="animal", shown="picture"), tmp_path / "tasks.json")
    tasks = json.loads(path.read_text(encoding="utf-8"))
    assert [task["data"]["ntkit_id"] for task in tasks] == NUMBERS
    assert [task["predictions"][0]["score"] for task in tasks] == [0.0, 0.5, 1.0]  # shown lowest first
    assert tasks[0]["data"]["image"] == "https://example.org/17.png"
    assert tasks[0]["predictions"][0]["result"] == [
        {"from_name": "animal", "to_name": "picture", "type": "choices", "value": {"choices": ["dog"]}}
    ]
    kind = LabelStudio(NAMES, choices="animal")
    assert kind.read(path) == Answers([], [], [])

    def done(name: str | None, **more: Any) -> dict[str, Any]:
        other = {"from_name": "remark", "to_name": "picture", "type": "choices", "value": {"choices": ["cat"]}}
        mine = {"from_name": "animal", "to_name": "picture", "type": "choices", "value": {"choices": [name]}}
        return {"id": 1, "result": [other, *([mine] if name else [])], "was_cancelled": False, **more}

    tasks[0]["annotations"] = [done("bird, small")]
    tasks[1]["annotations"] = [done(None, was_cancelled=True)]
    path.write_text(json.dumps(tasks), encoding="utf-8")
    assert kind.read(path) == Answers([17], [2], [4])
    tasks[0]["annotations"].append(done("cat"))
    path.write_text(json.dumps(tasks), encoding="utf-8")
    with pytest.raises(InputError, match="point 17 has two answers"):
        kind.read(path)
    tasks[0]["annotations"] = [done("cat")]
    tasks[0]["annotations"][0]["result"][1]["value"]["choices"] = ["cat", "dog"]
    path.write_text(json.dumps(tasks), encoding="utf-8")
    with pytest.raises(InputError, match="2 choices"):
        kind.read(path)
    path.write_text('[{"data": {}, "annotations": []}]')
    with pytest.raises(InputError, match="got None"):
        kind.read(path)
    for text in ("{", '{"a": 1}', "[1]"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"JSON|list of tasks"):
            kind.read(path)


def test_argilla(tmp_path: Path) -> None:
    kind = Argilla(NAMES, question="animal")
    path = written(kind, tmp_path / "records.json")
    records = json.loads(path.read_text(encoding="utf-8"))
    assert [record["id"] for record in records] == ["17", "4", "256"]
    assert [record["metadata"]["score"] for record in records] == SCORES
    assert records[0]["fields"] == ITEMS[17]
    assert records[0]["suggestions"] == {"animal": {"value": "dog", "score": None, "agent": "ntkit"}}
    assert kind.read(path) == Answers([], [], [])
    records[0]["responses"] = {"animal": [{"value": "cat", "user_id": "1"}, {"value": "cat", "user_id": "2"}]}
    # as Argilla's own export has them: every response has a value, and none a status
    path.write_text(json.dumps(records), encoding="utf-8")
    assert kind.read(path) == Answers([17], [0], [])
    # with the status, as the server has it: what stood in the form is there whether or not it was sent
    for status, expected in (
        ("submitted", Answers([17, 256], [0, 1], [])),
        ("discarded", Answers([17], [0], [256])),
        ("draft", Answers([17], [0], [])),
        ("pending", Answers([17], [0], [])),
    ):
        for value in ("dog", None):
            records[2]["responses"] = {"animal": [{"value": value, "user_id": "1", "status": status}]}
            path.write_text(json.dumps(records), encoding="utf-8")
            nothing = status == "submitted" and value is None
            assert kind.read(path) == (Answers([17], [0], []) if nothing else expected)
    with pytest.raises(InputError, match=r"no answer is one to the question 'other', those .* are to animal"):
        Argilla(NAMES, question="other").read(path)


def test_files_by_functions(tmp_path: Path) -> None:
    for name, fmt, kind in (
        ("q.csv", None, CSV),
        ("t.json", "labelstudio", LabelStudio),
        ("r.json", "argilla", Argilla),
    ):
        path, same = tmp_path / name, tmp_path / f"same-{name}"
        export_tasks(path, NUMBERS, SCORES, fmt=fmt, names=NAMES, items=ITEMS, guesses=GUESSES)
        assert path.read_bytes() == written(kind(NAMES), same).read_bytes()
        assert import_annotations(path, fmt=fmt, names=NAMES) == Answers([], [], [])
    fill(tmp_path / "q.csv", {17: "dog", 4: "skip"})
    assert import_annotations(tmp_path / "q.csv", names=NAMES) == Answers([17], [1], [4])
    with pytest.raises(InputError, match=r"'\.json', expected one of csv, labelstudio, argilla"):
        export_tasks(tmp_path / "x.json", NUMBERS, SCORES)
    with pytest.raises(InputError, match="got 'excel'"):
        import_annotations(tmp_path / "q.csv", fmt="excel")
    with pytest.raises(InputError, match="no record without fields"):
        export_tasks(tmp_path / "x.json", NUMBERS, SCORES, fmt="argilla")
    assert not (tmp_path / "x.json").exists()


def test_equal_scores_and_no_guesses(tmp_path: Path) -> None:
    LabelStudio().write(tmp_path / "t.json", [1, 2], [0.5, 0.5])
    tasks = json.loads((tmp_path / "t.json").read_text())
    assert [task["predictions"][0] for task in tasks] == [{"model_version": "ntkit", "score": 0.0, "result": []}] * 2
    CSV().write(tmp_path / "t.csv", [1], [0.5])
    assert (tmp_path / "t.csv").read_text() == "ntkit_id,score,label\n1,0.5,\n"
