"""`ntkit probe` and `ntkit rank-backbones` as a user meets them."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ntkit.cli import app

NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width, norm=False):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.fc = nn.Linear(width, 7)

    def forward(self, x):
        return self.fc(self.body(self.norm(x.flatten(1))))

def net():
    return Net(12)

def wide():
    return Net(24)

def normed():
    return Net(12, norm=True)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("backbones", None)
    (tmp_path / "backbones.py").write_text(NETS)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(120, 1, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x.reshape(120, 4, 4).sum(2).argmax(1))
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, [*arguments])
    return found.exit_code, found.output + (found.stderr or "")


def test_probe_writes_a_page_and_the_best_network(here: Path) -> None:
    code, text = run(
        "probe", "backbones:net", "data.npz", "--head", "fc", "--taus", "0,2,8", "--epochs", "3", "--batch", "32",
        "--finetuning-rate", "0.05", "--out", "out",
    )  # fmt: skip
    assert code == 0, text
    assert "Probe the head for" in text
    results = json.loads((here / "out" / "results.json").read_text())
    assert [row["tau"] for row in results["rows"]] == [0, 2, 8]
    assert len(results["energies"]) == 9
    assert results["rows"][2]["energy"] == pytest.approx(results["energies"][8], rel=1e-4)
    page = (here / "out" / "index.html").read_text()
    assert page.count("<svg") == 2
    assert results["recommendation"].split(":")[0] in page
    weights = load_file(here / "out" / "best.safetensors")
    assert weights["fc.weight"].shape == (4, 12)  # the new head has the classes of the new task
    assert not (here / "out.part").exists()
    for row in results["rows"]:  # no network that was paid for is thrown away
        kept = load_file(here / "out" / f"tau-{row['tau']:04d}.safetensors")
        same = all(torch.equal(kept[name], t) for name, t in weights.items())
        assert kept.keys() == weights.keys()
        assert same == (row["tau"] == results["best"])


def test_probe_stops_by_energy_and_keeps_what_it_is_told_to(here: Path) -> None:
    """The first epoch whose energy is a part of the first is the last tau; layers that forget; frozen statistics."""
    common = ("--head", "fc", "--taus", "0,1,60", "--epochs", "1", "--batch", "32", "--probing-rate", "0.1")
    code, text = run("probe", "backbones:net", "data.npz", *common, "--stop", "0.9", "--out", "out")
    assert code == 0, text
    results = json.loads((here / "out" / "results.json").read_text())
    energies = results["energies"]
    assert results["stopped"]
    assert results["rows"][-1]["tau"] == len(energies) - 1 < 60
    assert energies[-1] <= 0.9 * energies[0] < energies[-2]
    assert "Probing ended after" in (here / "out" / "index.html").read_text()
    tuned = {}
    for name, more in {
        "free": (), "frozen": ("--frozen-statistics",), "fresh": ("--frozen-statistics", "--reinitialise", "body.3"),
    }.items():  # fmt: skip
        code, text = run("probe", "backbones:normed", "data.npz", *common, "--stop", "0.99", *more, "--out", name)
        assert code == 0, text
        tuned[name] = load_file(here / name / "tau-0000.safetensors")
        assert json.loads((here / name / "results.json").read_text())["rows"][-1]["tau"] != 60
    assert not torch.equal(tuned["free"]["norm.running_mean"], torch.zeros(16))
    assert torch.equal(tuned["frozen"]["norm.running_mean"], torch.zeros(16))
    moved = (tuned["fresh"]["body.3.weight"] - tuned["frozen"]["body.3.weight"]).norm()
    assert moved > 0.5 * tuned["frozen"]["body.3.weight"].norm()  # other weights, not the same ones tuned
    assert (tuned["fresh"]["body.1.weight"] - tuned["frozen"]["body.1.weight"]).norm() < 0.1 * moved
    assert "body.3 re-initialised below it" in (here / "fresh" / "index.html").read_text()


def test_a_sweep_that_is_handed_back_has_its_networks(here: Path) -> None:
    from ntkit.report.finetuning import Sweeping, run_probe
    from ntkit.report.inputs import load_factory
    from ntkit.uses.study import Silence

    own = Sweeping(load_factory("backbones:net"), here / "data.npz", "fc", taus=(0, 2), epochs=1, batch_size=32)
    found = run_probe(here / "out", own, listener=Silence())
    assert not (here / "out.part").exists()
    best = load_file(here / "out" / "best.safetensors")
    assert all(torch.equal(t, best[name]) for name, t in found.network().state_dict().items())
    assert {path.parent for path in found.weights.values() if isinstance(path, Path)} == {here / "out"}
    assert found.network(0) is not None


def test_networks_of_an_earlier_sweep_do_not_stay_beside_those_of_the_next(here: Path) -> None:
    for taus, kept in (("0,2", ["tau-0000.safetensors", "tau-0002.safetensors"]), ("0", ["tau-0000.safetensors"])):
        code, text = run(
            "probe", "backbones:net", "data.npz", "--head", "fc", "--taus", taus, "--epochs", "1", "--out", "out",
            "--force",
        )  # fmt: skip
        assert code == 0, text
        assert sorted(path.name for path in (here / "out").glob("tau-*")) == kept


def test_nothing_is_lost_when_the_page_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed stays in FOLDER.part, and the same command writes the page from it."""
    from ntkit.report import finetuning

    arguments = (
        "probe", "backbones:net", "data.npz", "--head", "fc", "--taus", "0,2", "--epochs", "1", "--out", "out",
    )  # fmt: skip

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    written = finetuning.write_folder
    monkeypatch.setattr(finetuning, "write_folder", full)
    assert run(*arguments)[0] != 0
    assert not (here / "out").exists()
    first = {tau: load_file(here / "out.part" / f"tau-000{tau}.safetensors") for tau in (0, 2)}

    def last(folder: Path, contents: dict[str, str | Path], **how: Any) -> None:
        assert list(contents)[-1] == "index.html"
        written(folder, contents, **how)

    monkeypatch.setattr(finetuning, "write_folder", last)
    monkeypatch.setattr("ntkit.uses.finetune.probe._finetuned", full)  # nothing is computed again
    code, text = run(*arguments)
    assert code == 0, text
    assert not (here / "out.part").exists()
    for tau, weights in first.items():
        assert all(torch.equal(weights[n], t) for n, t in load_file(here / "out" / f"tau-000{tau}.safetensors").items())


def test_rank_backbones(here: Path) -> None:
    """A network whose weights see nothing of the input comes last, with the error of the frequencies: they are read."""
    sys.path.insert(0, str(here))
    torch.manual_seed(0)
    backbones = importlib.import_module("backbones")
    blind = "backbones:net@blind.safetensors"
    state = backbones.net().state_dict()
    save_file(state, here / "same.safetensors")
    # neither the features nor any of their derivatives depends on the input
    save_file({n: t * (n not in ("body.1.weight", "body.3.weight")) for n, t in state.items()}, here / blind[14:])
    given = ("backbones:net", "backbones:wide", "backbones:net@same.safetensors", blind)
    common = ("--head", "fc", "--at", "400", "--seed", "0")
    code, text = run("rank-backbones", "data.npz", *given, *common, "--out", "out")
    assert code == 0, text
    results = json.loads((here / "out" / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert set(rows) == set(given)
    assert results["at"] == 400
    assert results["rows"][-1]["name"] == blind
    assert rows[blind]["predicted"] == pytest.approx(results["trivial"], rel=0.05)
    assert all(row["predicted"] < 0.8 * results["trivial"] for name, row in rows.items() if name != blind)
    assert [row["extrapolated"] for row in results["rows"]] == sorted(row["extrapolated"] for row in results["rows"])
    page = (here / "out" / "index.html").read_text()
    assert page.count("<svg") == 1
    assert "has seen the labels" not in page
    assert not any(row["seen"] for row in rows.values())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, text = run("rank-backbones", "data.npz", *given, *common, "--seen", "backbones:wide", "--out", "marked")
    assert code == 0, text
    assert "backbones:wide" in text
    assert "may have seen the labels" in text
    again = {row["name"]: row for row in json.loads((here / "marked" / "results.json").read_text())["rows"]}
    assert [name for name, row in again.items() if row["seen"]] == ["backbones:wide"]
    assert again["backbones:wide"]["predicted"] == rows["backbones:wide"]["predicted"]
    page = (here / "marked" / "index.html").read_text()
    assert "backbones:wide (has seen the labels)" in page
    assert "trained on these very labels" in page


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("probe", "backbones:net", "data.npz", "--head", "nose"), "nose"),
        (("probe", "backbones:net", "data.npz", "--head", "fc", "--taus", "1,x"), "taus"),
        (("probe", "backbones:net", "data.npz", "--head", "fc", "--finetuning-rate", "1e30"), "diverge"),
        (("probe", "backbones:net", "data.npz", "--head", "fc", "--probing-rate", "-1"), "expected a positive number"),
        (
            ("probe", "backbones:net", "data.npz", "--head", "fc", "--finetuning-rate", "0"),
            "expected a positive number",
        ),
        (("rank-backbones", "data.npz", "backbones:net", "backbones:net", "--head", "fc"), "once"),
        (("probe", "backbones:net", "data.npz", "--head", "fc", "--stop", "2"), "stop"),
        (("probe", "backbones:net", "data.npz", "--head", "fc", "--reinitialise", "layer4"), "layer4"),
        (("rank-backbones", "data.npz", "backbones:net", "--head", "fc", "--seen", "backbones:wide"), "backbones:wide"),
        (("rank-backbones", "data.npz", "backbones:net@none.pt", "--head", "fc"), "no file"),
        (("rank-backbones", "none.npz", "backbones:net", "--head", "fc"), "no file"),
    ],
)
def test_what_is_refused(here: Path, arguments: tuple[str, ...], word: str) -> None:
    code, text = run(*arguments, "--out", "out")
    assert code == 2, text
    assert text.startswith("error:") or "\nerror:" in text
    assert word in text
    assert not (here / "out").exists()
