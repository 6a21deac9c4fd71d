"""`ntkit svm` as a user meets it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from ntkit.cli import app
from ntkit.report.labelled import load_test, load_training
from ntkit.solve.svm_search import NTKSVMSearch

X, Y = load_wine(return_X_y=True)
ORDER = np.random.default_rng(0).permutation(len(Y))
TRAIN, TEST = ORDER[:60], ORDER[60:]
NAMES = np.array(["barbera", "barolo", "grignolino"])
HEADER = [f"f{number}" for number in range(X.shape[1])]


def write(path: Path, rows: np.ndarray, *, header: bool = True, labels: bool = True, first: bool = False) -> Path:
    """A table of wines; the class comes last, or first."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(["wine", *HEADER] if first and labels else [*HEADER, *(["wine"] if labels else [])])
        for row in rows:
            cells, name = [repr(float(value)) for value in X[row]], [NAMES[Y[row]]] if labels else []
            writer.writerow([*name, *cells] if first else [*cells, *name])
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.csv", TRAIN)
    write(tmp_path / "test.csv", TEST)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["svm", *arguments])
    return found.exit_code, found.output + (found.stderr or "")


def predictions(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))


def test_a_table_is_classified(here: Path) -> None:
    code, said = run("train.csv", "--test", "test.csv", "--depths", "2", "--folds", "3")
    assert code == 0, said
    results = json.loads((here / "svm" / "results.json").read_text())
    scaler = StandardScaler().fit(X[TRAIN])
    expected = NTKSVMSearch((1, 2), cv=3).fit(scaler.transform(X[TRAIN]), NAMES[Y[TRAIN]])
    assert results["best"] == expected.best_params_
    assert results["held_out_accuracy"] == pytest.approx(expected.best_score_, rel=1e-6)
    assert [line["by C"] for line in results["accuracies"]] == [
        pytest.approx(list(row), rel=1e-6) for row in expected.grid_.accuracies
    ]
    assert results["examples"] == 60
    assert results["classes"] == list(NAMES)
    lines = predictions(here / "svm")
    predicted = expected.predict(scaler.transform(X[TEST]))
    assert [line["prediction"] for line in lines] == list(predicted)
    assert [line["label"] for line in lines] == list(NAMES[Y[TEST]])
    accuracy = float((predicted == NAMES[Y[TEST]]).mean())
    assert results["test_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert f"118 test examples: {100 * accuracy:.1f}% right" in said
    assert results["rbf"]["held_out_accuracy"] > 0.9
    assert results["rbf_test_accuracy"] > 0.9
    page = (here / "svm" / "index.html").read_text()
    assert page.count("<svg") == 2
    assert "Held-out accuracy by kernel and C" in page


def test_the_column_of_the_classes_by_name_and_by_number(here: Path) -> None:
    write(here / "first.csv", TRAIN, first=True)
    write(here / "bare.csv", TRAIN, header=False, first=True)
    last = load_training(here / "train.csv", None)
    for name, label in (("first.csv", "wine"), ("first.csv", "1"), ("bare.csv", "1"), ("train.csv", "wine")):
        found = load_training(here / name, label)
        np.testing.assert_array_equal(found.x, last.x)
        assert found.y is not None
        assert list(found.y) == list(NAMES[Y[TRAIN]])
    assert found.columns == tuple(HEADER)


@pytest.mark.parametrize("first", [False, True])
def test_a_test_table_without_classes(here: Path, first: bool) -> None:
    write(here / "train.csv", TRAIN, first=first)
    write(here / "new.csv", TEST, labels=False)
    label = "wine" if first else None
    found = load_test(here / "new.csv", label, load_training(here / "train.csv", label), here / "train.csv")
    assert found.y is None
    np.testing.assert_allclose(found.x, X[TEST])


@pytest.mark.parametrize("column", ["1", "14"])
def test_a_test_table_without_names_and_classes(here: Path, column: str) -> None:
    """Features alone, whatever number the column of the classes has in the training table."""
    write(here / "bare.csv", TRAIN, header=False, first=column == "1")
    write(here / "new.csv", TEST, header=False, labels=False)
    code, said = run("bare.csv", "--label-column", column, "--test", "new.csv", "--depths", "1", "--folds", "2")
    assert code == 0, said
    assert "label" not in predictions(here / "svm")[0]
    write(here / "known.csv", TEST, header=False, first=column == "1")
    code, said = run(
        "bare.csv", "--label-column", column, "--test", "known.csv", "--depths", "1", "--folds", "2", "--out", "again"
    )
    assert code == 0, said
    for ours, theirs in zip(predictions(here / "svm"), predictions(here / "again"), strict=True):
        assert ours["prediction"] == theirs["prediction"]
        assert theirs["label"] in NAMES


@pytest.mark.filterwarnings("default::sklearn.exceptions.ConvergenceWarning")
def test_fits_that_are_stopped_are_counted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkit.solve.svm.ENTRIES", 60)  # one step
    code, said = run("train.csv", "--depths", "1", "--folds", "2")
    assert code == 0, said
    assert "were ended before they had converged" in (here / "svm" / "index.html").read_text()
    results = json.loads((here / "svm" / "results.json").read_text())
    assert results["fits"] == results["fits_stopped"] > 0
    assert results["rbf"]["fits"] == results["rbf"]["fits_stopped"] > 0


def test_arrays_that_bring_their_test_examples(here: Path) -> None:
    np.savez(here / "all.npz", x_train=X[TRAIN], y_train=Y[TRAIN], x_test=X[TEST], y_test=Y[TEST])
    code, said = run("all.npz", "--depths", "1", "--folds", "2", "--out", "one")
    assert code == 0, said
    np.savez(here / "train.npz", x=X[TRAIN], y=NAMES[Y[TRAIN]])
    np.savez(here / "new.npz", x=X[TEST])
    assert run("train.npz", "--test", "new.npz", "--depths", "1", "--folds", "2", "--out", "two")[0] == 0
    one, two = (predictions(here / name) for name in ("one", "two"))
    assert [NAMES[int(line["prediction"])] for line in one] == [line["prediction"] for line in two]
    assert "label" in one[0]
    assert "label" not in two[0]
    assert json.loads((here / "two" / "results.json").read_text())["test_accuracy"] is None


def test_without_test_examples_and_with_fewer_training_examples(here: Path) -> None:
    code, said = run("train.csv", "--depths", "1", "--folds", "2", "--most", "30")
    assert code == 0, said
    assert not (here / "svm" / "predictions.csv").exists()
    assert json.loads((here / "svm" / "results.json").read_text())["examples"] == 30
    assert "30 of 60 examples" in (here / "svm" / "index.html").read_text()


def test_predictions_of_an_earlier_run_do_not_stay_beside_other_results(here: Path) -> None:
    quick = ("train.csv", "--depths", "1", "--folds", "2")
    assert run(*quick, "--test", "test.csv")[0] == 0
    (here / "svm" / "notes.txt").write_text("mine")
    assert len(predictions(here / "svm")) == len(TEST)
    assert run(*quick, "--force")[0] == 0
    assert {path.name for path in (here / "svm").iterdir()} == {"index.html", "results.json", "notes.txt"}
    (here / "svm" / "predictions.csv").write_text("mine")  # those of no run
    assert run(*quick, "--force")[0] == 0
    assert (here / "svm" / "predictions.csv").read_text() == "mine"


@pytest.mark.parametrize("results", [None, "[]", "{", '{"test_examples": 3}'])
def test_files_beside_foreign_results_stay(here: Path, results: str | None) -> None:
    (here / "svm").mkdir()
    (here / "svm" / "predictions.csv").write_text("mine")
    if results is not None:
        (here / "svm" / "results.json").write_text(results)
    assert run("train.csv", "--depths", "1", "--folds", "2", "--force")[0] == 0
    assert (here / "svm" / "predictions.csv").read_text() == "mine"


def test_the_folder_is_not_overwritten_unasked(here: Path) -> None:
    (here / "svm").mkdir()
    assert run("train.csv")[0] == 2
    assert run("train.csv", "--depths", "1", "--folds", "2", "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.csv",), "there is no file of data none.csv"),
        (("none.npz",), "there is no file of data none.npz"),
        (("train.csv", "--label-column", "vine"), "no column 'vine': it has f0, f1"),
        (("train.csv", "--label-column", "40"), "14 columns: there is no column 40"),
        (("train.csv", "--label-column", "f0"), "example 1 has 'grignolino' where a feature"),
        (("train.csv", "--test", "none.csv"), "there is no file of data none.csv"),
        (("train.csv", "--test", "few.csv"), "has the features f0, f1: expected f0, f1, f2"),
        (("train.csv", "--test", "other.npz"), "2 features in each example, and train.csv 13"),
        (("train.csv", "--test", "numbers.npz"), "classes of numbers.npz are like 1, and those of train.csv like '"),
        (("empty.csv",), "no line of numbers"),
        (("ragged.csv",), "example 2 has 2 cells: expected 3"),
        (("missing.csv",), "example 2 has '' where a feature is expected: every feature is a finite number"),
        (("infinite.csv",), "example 1 has 'inf'"),
        (("one.csv",), "one column only"),
        (("single.csv",), "one class only, 'a'"),
        (("binary.csv",), "cannot read it as text"),
        (("other.npz",), "holds x: expected x_train and y_train or x and y"),
        (("numbers.npz", "--label-column", "y"), "leave --label-column out"),
        (("short.npz",), "3 examples in x and 2 classes in y"),
        (("whole.npz",), "x of whole.npz holds whole numbers"),
        (("targets.npz",), "not a list of classes"),
        (("lonely.csv",), "cv is a number of folds"),
        (("train.csv", "--most", "1"), "got --most 1"),
        (("train.csv", "--test", "spelled.csv"), "no class of spelled.csv ('Barolo', ...) is one of train.csv ('"),
        (("train.csv", "--seed", "-1"), "Invalid value for '--seed'"),
    ],
)  # fmt: skip
def test_unusable(here: Path, arguments: tuple[str, ...], words: str) -> None:
    text = {
        "few": "f0,f1,wine\n1,2,a\n3,4,b\n", "empty": "\n", "ragged": "1,2,a\n1,a\n", "missing": "1,2,a\n1,,b\n",
        "infinite": "inf,2,a\n1,2,b\n", "one": "1\n2\n", "single": "1,2,a\n3,4,a\n", "lonely": "1,2,a\n3,4,b\n",
    }  # fmt: skip
    for name, lines in text.items():
        (here / f"{name}.csv").write_text(lines)
    (here / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    write(here / "spelled.csv", TEST)
    (here / "spelled.csv").write_text("".join(
        line.replace(",b", ",B").replace(",g", ",G") for line in (here / "spelled.csv").read_text().splitlines(True)
    ))  # fmt: skip
    three = np.arange(6.0).reshape(3, 2)
    np.savez(here / "other.npz", x=three)
    np.savez(here / "numbers.npz", x=X[TEST], y=Y[TEST])
    np.savez(here / "short.npz", x=three, y=np.array([0, 1]))
    np.savez(here / "whole.npz", x=three.astype(int), y=np.array([0, 1, 1]))
    np.savez(here / "targets.npz", x=three, y=np.array([0.5, 1.0, 2.0]))
    code, said = run(*arguments)
    assert code == 2, said
    assert words in " ".join(said.split())
    assert not (here / "svm").exists()


def test_a_table_of_numbers_alone_has_its_classes_in_the_last_column(here: Path) -> None:
    (here / "numbers.csv").write_text("1,2,0\n3,4,1\n5,6,1\n")
    found = load_training(here / "numbers.csv", None)
    assert found.y is not None
    assert list(found.y) == ["0", "1", "1"]
    np.testing.assert_array_equal(found.x, [[1, 2], [3, 4], [5, 6]])
