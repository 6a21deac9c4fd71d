"""`ntkit condense` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ntkit.cli import app
from ntkit.cli.terminal import Terminal
from ntkit.errors import InputError
from ntkit.report.condensing import Condensing, parse_kernel, plot_condensing, plot_support, run_condense
from ntkit.uses import condense

NETS = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

def wrong():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5))

def flat():
    return nn.Linear(16, 3)
"""
QUICK = ("--steps", "5", "--batch", "60", "--network-steps", "40", "--network-rate", "0.05")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("condensed_nets", None)
    (tmp_path / "condensed_nets.py").write_text(NETS)
    draw = np.random.default_rng(0)
    y = np.arange(180) % 3
    x = draw.normal(size=(180, 1, 4, 4)).astype(np.float32) + 2 * draw.normal(size=(3, 1, 4, 4))[y].astype(np.float32)
    np.savez(tmp_path / "data.npz", x=3 + 2 * x, y=y)
    np.savez(tmp_path / "flat.npz", x=x.reshape(180, 16), y=y)
    np.savez(tmp_path / "last.npz", x=x.transpose(0, 2, 3, 1), y=y)
    np.savez(tmp_path / "pairs.npz", x=np.concatenate([x, x[..., ::-1]], 1), y=y)
    np.savez(tmp_path / "bare.npz", x=x[:, 0], y=y)
    np.savez(tmp_path / "rare.npz", x_train=x[:49], y_train=[*y[:48], 3], x_test=x, y_test=[*y[1:], 3])
    np.savez(tmp_path / "targets.npz", x=x, y=np.eye(3, dtype=np.float32)[y])
    np.savez(tmp_path / "pixels.npz", x=(x > 0).astype(np.uint8), y=y)
    np.savez(tmp_path / "more.npz", x_train=x, y_train=y, x_test=x, y_test=y + 1)
    words = np.array(["10", "9", "2"])[y]
    for name, table in {
        "table.csv": [(*row, word) for row, word in zip(x.reshape(180, 16), words, strict=True)],
        "named.csv": [
            (*(f"f{k}" for k in range(8)), "kind", *(f"f{k}" for k in range(8, 16))),
            *((*row[:8], "cba"[c], *row[8:]) for row, c in zip(x.reshape(180, 16), y, strict=True)),
        ],
        "torn.csv": [(1, 2, "a"), (3, "", "b")],
        "seldom.csv": [(*row, "cba"[c]) for row, c in zip(x.reshape(180, 16), y, strict=True)] + [(*range(16), "z")],
        "one.csv": [(1, 2, "a"), (3, 4, "a")],
        "short.csv": [(1, 2, "a"), (3, 4, "b"), (5, 6, "a")],
    }.items():
        (tmp_path / name).write_text("\n".join(",".join(map(str, line)) for line in table))
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["condense", *arguments])
    return found.exit_code, " ".join((found.output + (found.stderr or "")).split())


def test_it_writes_the_points_a_page_and_what_was_found(here: Path) -> None:
    code, text = run("data.npz", "--per-class", "2", *QUICK, "--learn-labels", "--out", "out")
    assert code == 0, text
    assert "learned points" in text
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "images.svg", "index.html", "results.json", "support.npz",
    ]  # fmt: skip
    results = json.loads((here / "out" / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [
        "random examples", "k-means centres", "random examples, labels solved", "learned points",
    ]  # fmt: skip
    assert [record["step"] for record in results["records"]] == [0, 1, 2, 4, 5]
    assert results["rows"][3]["kernel"]["loss"] < results["rows"][0]["kernel"]["loss"]
    # the run was watched by examples of its own, not by the test
    assert results["records"][-1]["loss"] != results["rows"][3]["kernel"]["loss"]
    page = (here / "out" / "index.html").read_text()
    assert page.count("<svg") == 2
    assert not (here / "out.part").exists()
    with np.load(here / "out" / "support.npz") as kept:
        assert kept["x"].shape == (6, 1, 4, 4)
        assert kept["labels"].tolist() == [0, 0, 1, 1, 2, 2]
        assert kept["y"].shape == (6, 3)
        with np.load(here / "data.npz") as given:  # the starting points are examples in the units they came in
            gaps = np.abs(given["x"][None] - kept["x_start"][:, None]).max((2, 3, 4)).min(1)
            mean, deviation = given["x"].mean(), given["x"].std()
        slope, offset = np.polyfit(kept["x_scaled"].ravel(), kept["x"].ravel(), 1)
        assert (slope, offset) == pytest.approx((deviation, mean), rel=0.1)
        assert gaps.max() < 1e-5
        assert np.abs(kept["x"] - kept["x_start"]).max() > 1e-3
        scaled = condense.Support(torch.from_numpy(kept["x_scaled"]), torch.from_numpy(kept["y"]))
    score = condense.fit(parse_kernel("fc:1")(scaled.x), scaled)
    assert score.condition == pytest.approx(results["rows"][3]["kernel"]["condition"], rel=1e-5)


def test_target_images_are_changed_on_demand(here: Path) -> None:
    moved = {}
    for name, more in {"plain": (), "flip": ("--flip",), "shift": ("--shift", "1")}.items():
        code, text = run("data.npz", "--per-class", "1", *QUICK, *more, "--out", name)
        assert code == 0, text
        with np.load(here / name / "support.npz") as kept:
            moved[name] = kept["x"]
    assert not np.allclose(moved["plain"], moved["flip"])
    assert not np.allclose(moved["plain"], moved["shift"])


def test_it_goes_on_after_a_page_that_could_not_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkit.report import condensing

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(condensing, "write_folder", full)
        code, text = run("flat.npz", "--per-class", "1", *QUICK, "--out", "out")
    assert code == 2
    assert "no space left" in text
    assert (here / "out.part" / "state.safetensors").exists()
    code, text = run("flat.npz", "--per-class", "1", *QUICK, "--learning-rate", "0.1", "--out", "out")
    assert code == 2
    assert "another start, data, seed or settings" in text
    monkeypatch.setattr(condense.inducing, "kip_gradient", full)  # all steps are taken already
    code, text = run("flat.npz", "--per-class", "1", *QUICK, "--out", "out")
    assert code == 0, text
    assert not (here / "out" / "images.svg").exists()  # vectors are no images
    assert (here / "out" / "index.html").read_text().count("<svg") == 1


def test_tables_are_read_as_by_svm(here: Path) -> None:
    """The rows of a table are the vectors of flat.npz, and are cut as those are."""
    with np.load(here / "flat.npz") as given:
        x, y = given["x"], given["y"]
    kept = {}
    for name, more in {
        "flat.npz": (), "table.csv": (), "named.csv": ("--label-column", "kind"), "ninth.csv": ("--label-column", "9"),
    }.items():  # fmt: skip
        if name == "ninth.csv":
            lines = (here / "named.csv").read_text().splitlines()
            (here / name).write_text("\n".join(lines[1:]))
        code, text = run(name, "--per-class", "2", *QUICK, *more, "--out", name.replace(".", "-"))
        assert code == 0, text
        with np.load(here / name.replace(".", "-") / "support.npz") as found:
            kept[name] = dict(found)
        gaps = np.abs(x[None] - kept[name]["x_start"][:, None]).max(2)
        assert gaps.min(1).max() < 1e-5  # rows of the table, in their units
        names = kept[name].get("classes", np.arange(3).astype(str))
        real = {"table.csv": np.array(["10", "9", "2"]), "flat.npz": np.arange(3).astype(str)}
        wanted = real.get(name, np.array([*"cba"]))[y[gaps.argmin(1)]]
        assert names[kept[name]["labels"]].tolist() == wanted.tolist()
    assert "classes" not in kept["flat.npz"]
    assert kept["table.csv"]["classes"].tolist() == ["2", "9", "10"]  # whole numbers in their order
    assert kept["named.csv"]["classes"].tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(kept["named.csv"]["x"], kept["ninth.csv"]["x"])
    text = (here / "table-csv" / "index.html").read_text()
    assert "the rows of table.csv, cut at random (seed 0)" in text


def test_columns_of_a_table_are_brought_to_one_scale(here: Path) -> None:
    draw = np.random.default_rng(1)
    y = np.arange(120) % 2
    x = np.stack([draw.normal(size=120) + 3 * y, 1e4 * draw.normal(size=120), np.full(120, 5.0)], axis=1)
    (here / "units.csv").write_text("\n".join(f"{','.join(map(str, row))},{c}" for row, c in zip(x, y, strict=True)))
    code, text = run("units.csv", "--per-class", "5", *QUICK)
    assert code == 0, text
    rows = json.loads((here / "condensed" / "results.json").read_text())["rows"]
    assert rows[3]["kernel"]["accuracy"] > 0.8  # the second column, all noise, would drown the first
    with np.load(here / "condensed" / "support.npz") as kept:
        for column in (0, 1):
            slope, offset = np.polyfit(kept["x_scaled"][:, column], kept["x"][:, column], 1)
            assert slope == pytest.approx(x[:, column].std(), rel=0.1)
            assert offset == pytest.approx(x[:, column].mean(), abs=0.2 * slope)


def test_images_of_other_channels_are_condensed_without_a_picture(here: Path) -> None:
    code, text = run("pairs.npz", "--per-class", "1", *QUICK, "--flip")
    assert code == 0, text
    assert not (here / "condensed" / "images.svg").exists()
    assert (here / "condensed" / "index.html").read_text().count("<svg") == 1
    with np.load(here / "condensed" / "support.npz") as kept:
        assert kept["x"].shape == (3, 2, 4, 4)


def test_a_column_far_from_zero_is_not_rounded_away(here: Path) -> None:
    """Seconds since 1970, say: in float32 neighbours are 128 apart."""
    draw = np.random.default_rng(1)
    y = np.arange(120) % 2
    x = np.stack([1.7e9 + draw.normal(size=120) + 5 * y, draw.normal(size=120)], axis=1)
    lines = [",".join(map(str, (*row, c))) for row, c in zip(x.tolist(), y, strict=True)]
    (here / "late.csv").write_text("\n".join(lines))
    code, text = run("late.csv", "--per-class", "2", *QUICK)
    assert code == 0, text
    rows = json.loads((here / "condensed" / "results.json").read_text())["rows"]
    assert rows[3]["kernel"]["accuracy"] > 0.9
    with np.load(here / "condensed" / "support.npz") as kept:
        gaps = np.abs(x[None] - kept["x_start"][:, None]).max(2).min(1)
        assert gaps.max() < 1e-5
        slope = np.polyfit(kept["x_scaled"][:, 0], kept["x"][:, 0] - 1.7e9, 1)[0]
        assert slope == pytest.approx(x[:, 0].std(), rel=0.1)


@pytest.mark.parametrize(
    "kernel",
    ["fc:2", "rbf", "infinite:condensed_nets:flat", "finite:condensed_nets:flat"],
    ids=lambda k: k.split(":")[0],
)
def test_every_kernel_moves_points(here: Path, kernel: str) -> None:
    code, text = run("flat.npz", "--per-class", "1", *QUICK, "--kernel", kernel, "--network", "condensed_nets:flat")
    assert code == 0, text
    rows = json.loads((here / "condensed" / "results.json").read_text())["rows"]
    assert rows[3]["kernel"]["loss"] < rows[0]["kernel"]["loss"]


def test_whitened_images_and_patience(here: Path) -> None:
    code, text = run("data.npz", "--per-class", "1", *QUICK, "--zca", "--patience", "1", "--learning-rate", "9")
    assert code == 0, text
    results = json.loads((here / "condensed" / "results.json").read_text())
    best = max(record["accuracy"] for record in results["records"])
    assert next(r["accuracy"] for r in results["records"] if r["step"] == results["step"]) == best
    assert {row["network_rate"] for row in results["rows"]} <= {0.05 / 4**k for k in range(6)}
    with np.load(here / "condensed" / "support.npz") as kept:
        start = kept["x_start"].reshape(3, 16)
    np.testing.assert_allclose(start.mean(1), 0, atol=1e-6)  # seen up to brightness and contrast
    np.testing.assert_allclose(start.std(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.npz",), "there is no file of data none.npz"),
        (("none.csv",), "there is no file of data none.csv"),
        (("torn.csv",), "example 2 has '' where a feature is expected"),
        (("one.csv",), "one.csv has one class only"),
        (("short.csv",), "two training and two test examples: got 2 and 1"),
        (("named.csv", "--label-column", "x"), "named.csv has no column 'x'"),
        (("data.npz", "--label-column", "y"), "leave --label-column out"),
        (("targets.npz",), "class numbers (integers) as y"),
        (("pixels.npz",), "uint8, raw pixels"),
        (("last.npz",), "got (144, 4, 4, 1), with the channels last. Save x.transpose(0, 3, 1, 2)"),
        (("bare.npz",), "images (N, C, H, W): got (144, 4, 4). Of images with one channel save x[:, None]"),
        (("table.csv", "--zca"), "table.csv is a table, whose columns are scaled one by one: --zca is for images"),
        (("rare.npz", "--validation", "0.9"), "is left after --validation 0.9"),
        (("seldom.csv", "--validation", "0.6"), "none of class z is left after --validation 0.6"),
        (("more.npz",), "the test examples have 4 classes, the training examples 3"),
        (("data.npz", "--kernel", "poly"), "unknown kernel 'poly': expected one of fc:DEPTH, rbf"),
        (("data.npz", "--kernel", "fc:0"), "unknown kernel 'fc:0'"),
        (("data.npz", "--kernel", "rbf:3"), "unknown kernel 'rbf:3'"),
        (("data.npz", "--kernel", "finite:nowhere:net"), "there is no module 'nowhere'"),
        (("data.npz", "--per-class", "100"), "expected at least the 100 points of each class"),
        (("data.npz", "--network", "condensed_nets:wrong"), "the network has 5 outputs, and the data 3 classes"),
        (("flat.npz", "--flip"), "images to augment are (N, C, H, W)"),
        (("data.npz", "--validation", "1.5"), "between 0 and 1: got --validation 1.5"),
        (("data.npz", "--learning-rate", "-1"), "learning_rate is a positive number"),
        (("data.npz", "--ridge", "-1"), "ridge is in units"),
        (("data.npz", "--network-rate", "0"), "learning_rate is positive"),
        (("data.npz", "--kernel", "finite:condensed_nets:flat"), "gradient features of examples of shape (1, 4, 4)"),
    ],
)
def test_bad_input_is_said_before_any_work(here: Path, arguments: tuple[str, ...], words: str) -> None:
    code, text = run(*arguments, *QUICK[:-2])
    assert code == 2, text
    assert "error: " in text
    assert words in text
    assert not (here / "condensed").exists()


def test_a_folder_that_is_there_is_kept(here: Path) -> None:
    (here / "condensed").mkdir()
    code, text = run("data.npz")
    assert code == 2
    assert "the output folder condensed exists" in text


def test_a_state_folder_of_somebody_else_is_left_alone(here: Path) -> None:
    (here / "out.part").mkdir()
    thesis = here / "out.part" / "thesis.txt"
    thesis.write_text("x")
    code, text = run("flat.npz", "--per-class", "1", *QUICK, "--out", "out")
    assert code == 2, text
    assert "holds thesis.txt and no state of a run" in text
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.txt"]
    assert not (here / "out").exists()
    thesis.unlink()
    thesis.parent.rmdir()
    thesis.parent.write_text("a file")
    code, text = run("flat.npz", "--per-class", "1", *QUICK, "--out", "out")
    assert code == 2
    assert "out.part is a file" in text


def test_what_was_laid_into_the_state_folder_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkit.report import condensing

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(condensing, "write_folder", full)
        run("flat.npz", "--per-class", "1", *QUICK, "--out", "out")
    (here / "out.part" / "thesis.txt").write_text("x")
    code, text = run("flat.npz", "--per-class", "1", *QUICK, "--out", "out")
    assert code == 0, text
    assert [path.name for path in (here / "out.part").iterdir()] == ["thesis.txt"]


def test_images_of_an_earlier_run_do_not_stay_beside_points_without(here: Path) -> None:
    for data, wanted in (("data.npz", True), ("flat.npz", False)):
        code, text = run(data, "--per-class", "1", *QUICK, "--out", "out", "--force")
        assert code == 0, text
        assert (here / "out" / "images.svg").exists() == wanted
    (here / "theirs").mkdir()
    (here / "theirs" / "images.svg").write_text("a drawing")  # not of such a run
    code, text = run("flat.npz", "--per-class", "1", *QUICK, "--out", "theirs", "--force")
    assert code == 0, text
    assert (here / "theirs" / "images.svg").read_text() == "a drawing"


def test_a_run_killed_before_its_first_state_begins_again(here: Path) -> None:
    """The points of step 0 are written before the state."""
    (here / "out.part").mkdir()
    for name in ("step-0000000.safetensors", ".step-0000000.safetensors.17", "state.safetensors.partial"):
        (here / "out.part" / name).write_bytes(b"torn")
    code, text = run("flat.npz", "--per-class", "1", *QUICK, "--out", "out")
    assert code == 0, text
    assert not (here / "out.part").exists()


def test_the_folder_one_is_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "inside").mkdir()
    monkeypatch.chdir(here / "inside")
    code, text = run("../flat.npz", "--per-class", "1", *QUICK, "--out", ".", "--force")
    assert code == 0, text
    assert (here / "inside" / "support.npz").exists()
    assert not (here / "inside.part").exists()


def test_the_root_is_no_folder_for_results() -> None:
    with pytest.raises(InputError, match="no place beside it"):
        run_condense(Path("/"), Condensing(Path("none.npz"), 1), force=True, listener=Terminal())


def test_pictures() -> None:
    x = torch.rand(12, 3, 6, 5)
    for classes, label in ((3, "at the start"), (6, "learned")):
        svg = plot_support(x, x + 1, classes)
        assert svg.startswith("<svg")
        assert "<image" in svg
        assert label in svg
    for wrong, classes in ((x[:, :2], 3), (x, 5), (x.flatten(1), 3)):
        with pytest.raises(InputError, match="two sets of images are"):
            plot_support(wrong, wrong, classes)
    records = [condense.Recorded(k, 0.1, 0.1 / (k + 1), 0.2, 1e-6, 10.0) for k in range(3)]
    assert "accuracy" in plot_condensing(records)
