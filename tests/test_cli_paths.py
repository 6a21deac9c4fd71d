"""`ntkit paths`: a run that is watched from the command line, killed and gone on with, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ntkit.cli import app
from ntkit.report import learning
from ntkit.uses.dynamics import Paths
from ntkit.uses.dynamics import watch as watching

NETS = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))

def deep():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Linear(12, 4))

def dies():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12, bias=False), nn.ReLU(), nn.Linear(12, 4, bias=False))

def pair():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("pathnets", None)
    (tmp_path / "pathnets.py").write_text(NETS)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(90, 1, 4, 4)).astype(np.float32)
    y = x[:, 0].reshape(90, 4, 4).sum(2).argmax(1)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    np.savez(tmp_path / "two.npz", x=x, y=y % 2)
    np.savez(tmp_path / "floats.npz", x=x, y=np.eye(4)[y].astype(np.float32))
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["paths", *arguments])
    return found.exit_code, found.output + (found.stderr or "")


def test_a_page_and_what_is_behind_it(here: Path) -> None:
    code, text = run("pathnets:net", "data.npz", "--steps", "120", "--batch", "16", "--out", "out")
    assert code == 0, text
    results = json.loads((here / "out" / "results.json").read_text())
    paths = Paths.load(here / "out" / "paths.npz")
    assert len(results["area"]) == paths.logits.shape[1] == 72
    assert results["area"] == pytest.approx(paths.area().tolist(), rel=1e-4)
    assert results["train"][-1] > results["train"][0]
    page = (here / "out" / "index.html").read_text()
    assert page.count("<svg") == 6
    assert "doubtful" in page
    assert not (here / "out.part").exists()
    assert run("pathnets:pair", "two.npz", "--steps", "30", "--out", "two")[0] == 0  # no triangle for two classes


def test_doubt_is_over_training_not_over_records(here: Path) -> None:
    """One label in four is wrong: doubt has the same mean over the steps as the area, up to the last."""
    draw, data = np.random.default_rng(1), np.load(here / "data.npz")
    np.savez(here / "noisy.npz", x=data["x"], y=(data["y"] + (draw.random(90) < 0.25)) % 4)
    code, text = run("pathnets:net", "noisy.npz", "--steps", "119", "--batch", "16", "--out", "out")
    assert code == 0, text
    results = json.loads((here / "out" / "results.json").read_text())
    paths = Paths.load(here / "out" / "paths.npz")
    assert int(paths.steps[-1]) == results["kernel"]["steps"][-1] == results["steps"][-1] == 119
    said, labels = paths.average().argmax(1), torch.tensor(results["labels"])
    assert results["said"] == said.tolist()
    assert said.tolist() != paths.probabilities.mean(0).argmax(1).tolist()
    doubted = int((said != labels).sum())
    assert doubted > 3
    assert f"{doubted} labels are doubtful" in (here / "out" / "index.html").read_text()


def test_goes_on_after_a_kill(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the page is written, the same command ends with the same numbers."""
    command = ("pathnets:net", "data.npz", "--steps", "60", "--batch", "16", "--out")
    assert run(*command, "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(watching.__globals__["time"], "monotonic", iter(range(0, 10**6, 15)).__next__)
        patch.setattr(learning, "render", lambda _: sys.exit(9))
        assert run(*command, "out")[0] == 9
    assert (here / "out.part" / "checkpoint.pt").exists()
    assert run(*command, "out")[0] == 0
    one, two = (json.loads((here / name / "results.json").read_text()) for name in ("whole", "out"))
    for name in ("area", "test", "learned_at"):
        assert one[name] == two[name]


@pytest.mark.parametrize("force", [False, True])
def test_a_crash_among_the_files(here: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    """Killed while files are being put into place, there is no page without its paths, and nothing is lost."""
    command = ("pathnets:net", "data.npz", "--steps", "40", "--batch", "16", "--out", "out", *["--force"] * force)
    if force:
        (here / "out").mkdir()
    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (Path, "rename")):
            own = getattr(module, name)

            def killed(source: Any, target: Any, own: Any = own, **options: Any) -> Any:
                if str(target).endswith(("results.json", "out")):
                    sys.exit(9)
                return own(source, target, **options)

            patch.setattr(module, name, killed)
        assert run(*command)[0] == 9
    assert (here / "out.part" / "records.bin").exists()
    assert not (here / "out" / "index.html").exists()
    assert run(*command)[0] == 0
    assert {"index.html", "results.json", "paths.npz"} <= {path.name for path in (here / "out").iterdir()}
    assert not (here / "out.part").exists()


def test_what_was_set_aside_is_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed and another one in its place: the first one's paths are kept beside the page, every time."""

    def killed(*arguments: str) -> None:
        own, done = watching.__globals__["_update"], iter(range(10))
        with monkeypatch.context() as patch:
            patch.setitem(watching.__globals__, "APART", math.inf)
            patch.setitem(watching.__globals__, "_update", lambda *a: own(*a) if next(done) < 9 else sys.exit(9))
            assert run(*arguments, "--learning-rate", "0.5")[0] == 9

    command = ("pathnets:net", "data.npz", "--steps", "30", "--out", "out")
    killed(*command)
    assert run(*command)[0] == 0
    old, new = (Paths.load(here / "out" / name) for name in ("replaced-1.npz", "paths.npz"))
    assert old.probes == new.probes
    assert old.steps.tolist() == list(range(10))
    assert not torch.equal(old.logits[9], new.logits[9])
    killed(*command, "--force")
    assert run(*command, "--force")[0] == 0
    assert torch.equal(Paths.load(here / "out" / "replaced-1.npz").logits, old.logits)
    assert torch.equal(Paths.load(here / "out" / "replaced-2.npz").logits, old.logits)


def test_few_probes_and_one_class(here: Path) -> None:
    """A page of two probes, and none of a class alone, of which there is nothing to learn."""
    code, text = run("pathnets:net", "data.npz", "--steps", "30", "--probes", "2", "--out", "few")
    assert code == 0, text
    assert len(json.loads((here / "few" / "results.json").read_text())["area"]) == 2
    x = np.load(here / "data.npz")["x"]
    np.savez(here / "one.npz", x=x, y=np.ones(len(x), dtype=np.int64))
    code, text = run("pathnets:net", "one.npz", "--steps", "30", "--out", "one")
    assert code == 2, text
    assert "all training examples are of class 1: expected two classes at least" in text
    assert not (here / "one").exists()


def test_nothing_but_its_own_is_deleted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that only has the name is refused before any work; what is put beside a run's files stays."""
    own = here / "out.part"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    command = ("pathnets:net", "data.npz", "--steps", "20", "--out", "out")
    code, text = run(*command)
    assert code == 2
    assert "thesis.txt" in text
    assert [path.name for path in own.iterdir()] == ["thesis.txt"]
    (own / "thesis.txt").unlink()
    assert run(*command)[0] == 0
    assert not own.exists()
    with monkeypatch.context() as patch:
        patch.setattr(learning, "render", lambda _: sys.exit(9))
        assert run(*command, "--force")[0] == 9
    (own / "thesis.txt").write_text("mine")
    assert run(*command, "--force")[0] == 0
    assert [path.name for path in own.iterdir()] == ["thesis.txt"]
    (own / "thesis.txt").unlink()
    own.rmdir()
    own.write_text("mine, too")
    code, text = run(*command, "--force")
    assert code == 2
    assert "is a file" in text


def test_the_page_of_a_dead_network(here: Path) -> None:
    """No unit is ever on, and the kernel is zero: the page is what one wants then."""
    from safetensors.torch import save_file

    save_file({"1.weight": torch.zeros(12, 16), "3.weight": torch.zeros(4, 12)}, here / "zero.safetensors")
    code, text = run("pathnets:dies", "data.npz", "--weights", "zero.safetensors", "--steps", "30", "--out", "out")
    assert code == 0, text
    results = json.loads((here / "out" / "results.json").read_text())
    assert set(results["kernel"]["trace"]) == {0}
    assert set(results["kernel"]["drift"]) == {None}
    assert re.search(r"\bnan\b", (here / "out" / "index.html").read_text()) is None


def test_what_is_refused(here: Path) -> None:
    code, text = run("pathnets:net", "floats.npz")
    assert code == 2
    assert "are of classes" in text
    for rate in ("-1", "0", "nan"):
        code, text = run("pathnets:net", "data.npz", "--learning-rate", rate, "--out", "out")
        assert code == 2
        assert "expected a positive number" in text
    assert not (here / "out.part").exists()
    (here / "there").mkdir()
    code, text = run("pathnets:net", "data.npz", "--out", "there")
    assert code == 2
    assert "--force" in text
    code, text = run("pathnets:deep", "data.npz", "--learning-rate", "1e20", "--steps", "50", "--out", "out")
    assert code == 2
    assert "diverged" in text
    code, text = run("pathnets:deep", "data.npz", "--steps", "40", "--out", "out")  # what was recorded is set aside
    assert code == 0, text
