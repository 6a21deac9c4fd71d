"""`ntkit probe` and `ntkit rank-backbones` as a user meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ntkit.cli import app

NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc = nn.Linear(width, 7)

    def forward(self, x):
        return self.fc(self.body(x))

def net():
    return Net(12)

def wide():
    return Net(24)
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


def test_rank_backbones(here: Path) -> None:
    """Weights that suit the task are read and put in order with others; a file that is none is refused."""
    sys.path.insert(0, str(here))
    torch.manual_seed(0)
    import backbones

    state = backbones.net().state_dict()
    state["body.1.weight"] = torch.zeros_like(state["body.1.weight"])  # sees nothing of its input
    save_file(state, here / "blind.safetensors")
    code, text = run(
        "rank-backbones", "data.npz", "backbones:net", "backbones:wide", "backbones:net@blind.safetensors",
        "--head", "fc", "--at", "400", "--out", "out",
    )  # fmt: skip
    assert code == 0, text
    results = json.loads((here / "out" / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    assert set(names) == {"backbones:net", "backbones:wide", "backbones:net@blind.safetensors"}
    assert results["at"] == 400
    assert [row["extrapolated"] for row in results["rows"]] == sorted(row["extrapolated"] for row in results["rows"])
    assert (here / "out" / "index.html").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("probe", "backbones:net", "data.npz", "--head", "nose"), "nose"),
        (("probe", "backbones:net", "data.npz", "--head", "fc", "--taus", "1,x"), "taus"),
        (("probe", "backbones:net", "data.npz", "--head", "fc", "--finetuning-rate", "1e30"), "diverge"),
        (("rank-backbones", "data.npz", "backbones:net", "backbones:net", "--head", "fc"), "once"),
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
