"""The command line as a user meets it: what works end to end, and one line for everything that does not."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import ntkit
from ntkit import report
from ntkit.cli import app

FACTORIES = """
import torch
from torch import nn

SIZE = 3

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

def one():
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))

def words():
    return nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 3))

def sequence():
    return nn.Linear(4, 3)

def dead():
    model = net()
    model[2] = nn.ReLU()
    nn.init.constant_(model[1].bias, -1e3)
    return model

def broken():
    raise RuntimeError("no\\nluck")

def number():
    return 3
"""
N, M = 12, 6
TARGETS = np.random.default_rng(1).normal(size=(N, 3))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of factories, data and weights; the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("nets", "bad", "lacks"):
        sys.modules.pop(name, None)
    (tmp_path / "nets.py").write_text(FACTORIES)
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(N + M, 2, 4)).astype(np.float32), np.arange(N + M) % 3
    np.savez("data.npz", x_train=x[:N], y_train=y[:N], x_test=x[N:], y_test=y[N:])
    save_file(net().state_dict(), "w.safetensors")
    torch.save(net().state_dict(), "w.pt")
    return tmp_path


def net(hidden: int = 5) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 3)).eval()


def call(*arguments: object) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout, found.stderr


def refused(*arguments: object) -> str:
    """The one line that a refusal says."""
    code, _, said = call(*arguments)
    lines = said.strip().splitlines()
    assert code == 2, said
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    return lines[0]


# ---------------------------------------------------------------- what works


def test_help_is_quick_and_light() -> None:
    code = "import sys, ntkit.cli; print(sorted({'torch', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    code, said, _ = call("--help")
    assert code == 0
    assert all(command in said for command in ("demo", "report", "kernel", "plan"))


def test_version() -> None:
    assert call("--version")[1].strip() == ntkit.__version__


@pytest.mark.parametrize(
    ("options", "readout", "trace"),
    [
        (["--readout", "logits"], ntkit.Logits(), False),
        (["--readout", "sum"], ntkit.SumOfLogits(), False),
        (["--readout", "trace"], ntkit.Logits(), True),
        (["--trace"], ntkit.Logits(), True),
        (["--readout", "single:2"], ntkit.SingleLogit(2), False),
        (["--readout", "random:4"], ntkit.RandomLogits(4, torch.Generator().manual_seed(0)), True),
    ],
)
@pytest.mark.parametrize("weights", ["w.safetensors", "w.pt"])
def test_kernel(here: Path, options: list[str], readout: ntkit.Logits, trace: bool, weights: str) -> None:
    code, said, _ = call(
        "kernel", "nets:net", "data.npz", "--out", "K.npy", "--weights", weights, "--dtype", "float64", *options
    )
    assert code == 0
    x = torch.from_numpy(np.load("data.npz")["x_train"]).double()
    expected = ntkit.empirical_ntk(net().double(), x, readout=readout, trace=trace)
    np.testing.assert_allclose(np.load("K.npy"), expected.numpy(), rtol=1e-12)
    assert "K.npy" in said
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


def test_kernel_between_two_arrays_from_a_file_of_factories(here: Path) -> None:
    code, _, _ = call(
        "kernel", here / "nets.py:net", "data.npz", "--out", "K.npy", "--rows", "x_test", "--cols", "x_train",
        "--readout", "sum", "--memory", "100MB", "--seed", 3,
    )  # fmt: skip
    assert code == 0
    assert np.load("K.npy").shape == (M, N)
    assert np.load("K.npy").dtype == np.float32


def test_kernel_of_token_numbers(here: Path) -> None:
    np.savez("tokens.npz", x=np.random.default_rng(0).integers(11, size=(5, 3)))
    assert call("kernel", "nets:words", "tokens.npz", "--out", "K.npy")[0] == 0
    assert np.load("K.npy").shape == (15, 15)


def test_the_factory_is_seeded_and_the_global_generator_left_alone(here: Path) -> None:
    state = torch.get_rng_state()
    kernels = []
    for seed in (3, 3, 4):
        assert call("kernel", "nets:net", "data.npz", "--out", "K.npy", "--force", "--seed", seed)[0] == 0
        kernels.append(np.load("K.npy"))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


def test_plan_computes_nothing_and_says_why(here: Path) -> None:
    code, said, _ = call("plan", "nets:net", "data.npz", "--readout", "sum")
    assert code == 0
    assert f"{N} x {N}" in said
    assert "FLOP" in said
    assert sorted(path.name for path in here.iterdir() if path.suffix == ".npy") == []


def test_report(here: Path) -> None:
    code, said, progress = call(
        "report", "nets:net", "data.npz", "--weights", "w.safetensors", "--out", "deep/page", "--compared", 6
    )
    assert code == 0
    assert "With the given weights" in said
    assert "regression" in progress
    results = json.loads((here / "deep/page/results.json").read_text())
    assert [state["name"] for state in results["study"]["states"]] == ["as built", "with the given weights"]
    assert results["study"]["train_examples"] == N
    text = (here / "deep/page/index.html").read_text()
    assert "nets:net" in text
    assert sorted(path.name for path in (here / "deep").iterdir()) == ["page"]


def test_report_of_a_network_that_finds_all_examples_alike(here: Path) -> None:
    """What is not defined is said to be so, and the rest is there."""
    save_file(net().state_dict(), "alive.safetensors")
    code, said, _ = call("report", "nets:dead", "data.npz", "--weights", "alive.safetensors", "--out", "page")
    assert code == 0
    assert "not defined" in said
    study = json.loads(Path("page/results.json").read_text())["study"]
    collapsed, alive = study["states"]
    assert [facts["alignment"] for facts in collapsed["kernels"]] == [None] * 4
    assert collapsed["similarity"] is None
    assert [facts["alignment"] is None for facts in alive["kernels"]] == [True, False, False, False]
    assert alive["similarity"] is not None
    assert [moved["cka"] for moved in study["movements"]] == [None] * 4
    text = Path("page/index.html").read_text()
    assert "to one of the two all examples are alike" in text
    assert not re.search(r"(?i)\bnan\b", text)


def test_report_where_the_compared_examples_are_of_one_class(here: Path) -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(N, 2, 4)), np.sort(np.arange(N) % 3)
    np.savez("sorted.npz", x_train=x, y_train=y, x_test=x[::2], y_test=y[::2])
    code, _, _ = call("report", "nets:net", "sorted.npz", "--compared", 4, "--out", "page")
    assert code == 0
    (state,) = json.loads(Path("page/results.json").read_text())["study"]["states"]
    assert state["similarity"] is None
    assert all(facts["alignment"] is None for facts in state["kernels"])


def test_report_of_a_regression_with_one_output_and_a_cut(here: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez("all.npz", x=draw.normal(size=(20, 8)), y=draw.normal(size=20))
    code, said, _ = call("report", "nets:one", "all.npz", "--test-share", 0.25, "--readout", "logits")
    assert code == 0
    results = json.loads(Path("ntkit-report/results.json").read_text())
    assert (results["study"]["train_examples"], results["study"]["test_examples"]) == (15, 5)
    assert results["study"]["score_name"] == "R²"
    assert "cut at random" in results["data"]
    assert "R²" in said


def test_the_fashion_example(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parent.parent / "examples/fashion_mnist.py"
    draw = np.random.default_rng(0)
    pixels = {
        f"x_{part}": draw.integers(256, size=(n, 28, 28), dtype=np.uint8) for part, n in (("train", 60), ("test", 30))
    }
    labels = {f"y_{part}": np.arange(n, dtype=np.uint8) % 10 for part, n in (("train", 60), ("test", 30))}
    np.savez("fashion_mnist.npz", **pixels, **labels)  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("NTKIT_DATA", str(here))
    arguments = "f.npz --weights f.safetensors --train 40 --test 20 --epochs 1"
    monkeypatch.setattr(sys, "argv", [str(example), *arguments.split()])
    runpy.run_path(str(example), run_name="__main__")
    code, _, _ = call("report", f"{example}:cnn", "f.npz", "--weights", "f.safetensors", "--compared", 6)
    assert code == 0
    study = json.loads(Path("ntkit-report/results.json").read_text())["study"]
    assert study["parameters"] == 29066
    assert [study["train_examples"], study["test_examples"]] == [40, 20]


def test_force_replaces_only_our_own_files(here: Path) -> None:
    folder = here / "ntkit-report"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    (folder / "index.html").write_text("old")
    arguments = ("report", "nets:net", "data.npz", "--train", 8, "--test", 4)
    assert "exists" in refused(*arguments)
    assert (folder / "index.html").read_text() == "old"
    assert call(*arguments, "--force")[0] == 0
    assert (folder / "index.html").read_text() != "old"
    assert (folder / "mine.txt").read_text() == "keep"
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "mine.txt", "results.json"]


# ---------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("nets", "MODULE:FUNCTION"),
        ("nope:net", "no module 'nope'"),
        ("nope.py:net", "no file nope.py"),
        ("nets:nope", "it has net, wide, one, words, sequence, dead, broken, number"),
        ("nets:SIZE", "is a int"),
        ("nets:broken", "RuntimeError: no luck (nets.py, line "),
        ("nets:number", "must return a torch.nn.Module: got int"),
        ("bad:net", "importing bad failed: ZeroDivisionError"),
        ("bad.py:net", "importing bad.py failed: ZeroDivisionError"),
        ("lacks:net", "No module named 'surely_absent'"),
    ],
)
def test_factories_that_fail(here: Path, factory: str, says: str) -> None:
    (here / "bad.py").write_text("1 / 0\n")
    (here / "lacks.py").write_text("import surely_absent\n")
    for command in (["plan"], ["kernel", "--out", "K.npy"], ["report"]):
        assert says in refused(*command, factory, "data.npz")
    assert sorted(p.name for p in here.glob("*.npy")) == []
    assert not (here / "ntkit-report").exists()


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("absent.pt", "no file of weights absent.pt"),
        ("data.npz", ".safetensors, .pt or .pth"),
        ("other.safetensors", "1.weight is (6, 8) in the file and (5, 8) in the model"),
        ("names.pt", "missing in the file: 1.weight"),
        ("text.safetensors", "not a safetensors file"),
        ("text.pt", "not a plain state dict"),
        ("module.pt", "not a plain state dict"),
        ("list.pt", "not a state dict"),
        ("nan.pt", "not finite: 1.weight"),
        ("whole.pt", "types: 1.weight is torch.int8 in the file and torch.float32 in the model"),
    ],
)
def test_weights_that_do_not_fit(here: Path, weights: str, says: str) -> None:
    save_file(net(6).state_dict(), "other.safetensors")
    torch.save({"a": torch.zeros(1)}, "names.pt")
    torch.save(net(), "module.pt")
    torch.save([1, 2], "list.pt")
    torch.save({**net().state_dict(), "1.weight": torch.ones(5, 8, dtype=torch.int8)}, "whole.pt")
    torch.save({**net().state_dict(), "1.weight": torch.full((5, 8), float("nan"))}, "nan.pt")
    (here / "text.safetensors").write_text("hello")
    (here / "text.pt").write_text("hello")
    for command in (["plan"], ["report"]):
        assert says in refused(*command, "nets:net", "data.npz", "--weights", weights)


def arrays(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Good arrays, but for the changes."""
    draw = np.random.default_rng(0)
    good = {
        "x_train": draw.normal(size=(N, 2, 4)),
        "y_train": np.arange(N) % 3,
        "x_test": draw.normal(size=(M, 2, 4)),
        "y_test": np.arange(M) % 3,
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x_train": np.zeros((N, 2, 4), np.uint8)}, "uint8, raw pixels"),
        ({"x_train": np.full((N, 2, 4), np.nan)}, "not finite"),
        ({"x_train": np.zeros((N, 2, 4), complex)}, "complex128"),
        ({"x_train": np.zeros((0, 2, 4))}, "is empty"),
        ({"x_train": np.array([None] * N)}, "cannot be read"),
        ({"x_train": np.zeros((N - 1, 2, 4))}, f"x_train has {N - 1} examples and y_train {N}"),
        ({"x_train": np.zeros((N, 3, 4))}, "differ in shape"),
        ({"x_train": np.zeros((N, 9)), "x_test": np.zeros((M, 9))}, "mat1 and mat2 shapes cannot be multiplied"),
        ({"y_train": np.arange(N)}, "class number 11, but the model has 3 outputs"),
        ({"y_train": np.arange(N) - 1}, "negative class numbers"),
        ({"y_train": np.eye(3, dtype=int)[np.arange(N) % 3]}, "argmax"),
        ({"y_train": np.zeros((N, 2)), "y_test": np.zeros((M, 2))}, "3 outputs and the targets 2 columns"),
        ({"y_train": np.zeros((N, 3))}, "differ in shape"),
        ({"y_train": np.zeros(N)}, "differ in shape"),
        ({"y_train": np.full((N, 3), np.inf), "y_test": np.zeros((M, 3))}, "not finite"),
        ({"x_train": np.ones((N, 2, 4))}, f"all {N} training examples are equal"),
        ({"y_train": np.full(N, 2)}, "all training examples are of class 2: expected two classes at least"),
        ({"y_train": np.ones((N, 3)), "y_test": TARGETS[:M]}, "targets of all training examples are equal ([1.0, 1.0"),
        ({"y_train": TARGETS, "y_test": np.ones((M, 3))}, "targets of all test examples are equal"),
        ({"y_test": None}, "holds the arrays x_test, x_train, y_train"),
        ({"x_test": np.zeros((1, 2, 4)), "y_test": np.zeros(1, int)}, "two test examples"),
    ],
)
def test_data_that_do_not_fit(here: Path, changes: dict[str, np.ndarray | None], says: str) -> None:
    np.savez("wrong.npz", **arrays(**changes))  # pyright: ignore[reportArgumentType]
    assert says in refused("report", "nets:net", "wrong.npz")
    assert not (here / "ntkit-report").exists()


def test_one_output_and_class_numbers(here: Path) -> None:
    assert "one output" in refused("report", "nets:one", "data.npz")


def test_an_output_that_is_not_a_row_per_example(here: Path) -> None:
    said = refused("plan", "nets:sequence", "data.npz")
    assert "let the factory wrap the model" in said


@pytest.mark.parametrize("command", [["plan"], ["report"], ["kernel", "--out", "K.npy"]])
def test_data_files_that_are_none(here: Path, command: list[str]) -> None:
    (here / "text.npz").write_text("hello")
    np.save("single.npy", np.zeros(3))
    (here / "single.npy").rename(here / "single.npz")
    assert "no file of data absent.npz" in refused(*command, "nets:net", "absent.npz")
    assert "not an .npz file" in refused(*command, "nets:net", "text.npz")
    assert "not an .npz file" in refused(*command, "nets:net", "single.npz")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--readout", "mean"], "unknown read-out 'mean'"),
        (["--readout", "single"], "unknown read-out"),
        (["--readout", "random:0"], "at least one draw"),
        (["--readout", "single:7"], "3 outputs"),
        (["--dtype", "float16"], "float32 or float64"),
        (["--device", "gpu"], "unknown device 'gpu': expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "no device cuda:99 here"),
        (["--memory", "much"], "not a size"),
        (["--memory", "0"], "not a size"),
        (["--rows", "z"], "no array 'z'"),
    ],
)
def test_options_that_mean_nothing(here: Path, options: list[str], says: str) -> None:
    assert says in refused("plan", "nets:net", "data.npz", *options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--test-share", "0.3"], "leave --test-share out"),
        (["--train", "1"], "two training"),
        (["--readout", "logits", "--train", "0"], "two training"),
    ],
)
def test_cuts_that_leave_nothing(here: Path, options: list[str], says: str) -> None:
    assert says in refused("report", "nets:net", "data.npz", *options)


@pytest.mark.parametrize("least", [0, 1, -5])
def test_two_examples_at_least_are_compared(here: Path, least: int) -> None:
    code, _, said = call("report", "nets:net", "data.npz", "--compared", least)
    assert code == 2
    assert "--compared" in said
    assert not (here / "ntkit-report").exists()


def test_an_output_that_the_network_does_not_have(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    np.savez("one.npz", x=draw.normal(size=(20, 8)), y=draw.normal(size=20))
    monkeypatch.setattr("ntkit.report.own.study", lambda *_, **__: pytest.fail("the study has begun"))
    assert "has 3 outputs: got SingleLogit(7)" in refused("report", "nets:net", "data.npz", "--readout", "single:7")
    assert "has 1 outputs: got SingleLogit(1)" in refused("report", "nets:one", "one.npz", "--readout", "single:1")


def test_a_share_outside_its_range(here: Path) -> None:
    np.savez("all.npz", x=np.zeros((9, 8)), y=np.zeros(9, int))
    assert "between 0 and 1" in refused("report", "nets:net", "all.npz", "--test-share", "1.5")


def test_a_regression_too_large_for_memory(here: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(5000, 8)), np.arange(5000) % 3
    np.savez("large.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    assert "--train 4666" in refused("report", "nets:net", "large.npz", "--readout", "logits")


def test_outputs_that_exist_are_kept(here: Path) -> None:
    (here / "K.npy").write_text("old")
    assert "exists" in refused("kernel", "nets:net", "data.npz", "--out", "K.npy")
    assert (here / "K.npy").read_text() == "old"
    assert call("kernel", "nets:net", "data.npz", "--out", "K.npy", "--force")[0] == 0
    assert np.load("K.npy").shape == (3 * N, 3 * N)
    assert "is called something.npy" in refused("kernel", "nets:net", "data.npz", "--out", "K.txt")
    assert "does not exist" in refused("kernel", "nets:net", "data.npz", "--out", "a/b/K.npy")
    (here / "folder.npy").mkdir()
    assert "is a folder" in refused("kernel", "nets:net", "data.npz", "--out", "folder.npy", "--force")
    assert "is a file" in refused("report", "nets:net", "data.npz", "--out", "K.npy", "--force")
    (here / "report").mkdir()
    assert "exists" in refused("demo", "--out", "report")


def test_a_kernel_that_fails_leaves_the_old_file(here: Path) -> None:
    (here / "K.npy").write_text("old")
    np.savez("huge.npz", x=np.full((3, 8), 1e38))
    code, _, said = call("kernel", "nets:net", "huge.npz", "--out", "K.npy", "--force")
    assert code == 2
    assert said.strip().splitlines()[-1].startswith("error: ")
    assert (here / "K.npy").read_text() == "old"
    assert sorted(p.name for p in here.iterdir() if p.name.startswith(".")) == []


def test_a_missing_extra_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ntkit, "report", report
    )  # the package that is imported anew replaces it, until the test is over
    for name in [name for name in sys.modules if name.startswith(("ntkit.report", "matplotlib"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, said = call("demo", "--out", "page")
    assert code == 2
    assert "ntkit[report]" in said
