"""`ntkit twosample` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from ntkit.cli import app
from ntkit.errors import InputError
from ntkit.kernel.closed import RBF
from ntkit.uses import twosample

NETS = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))

def moody():
    return nn.Sequential(nn.Linear(5, 1))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("testing_nets", None)
    (tmp_path / "testing_nets.py").write_text(NETS)
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(60, 3)), draw.normal(size=(50, 3)) + 1.5
    b[7] = 20  # the most typical of all that A has not
    for name, x in (("a", a), ("b", b), ("same", draw.normal(size=(50, 3)))):
        np.savez(tmp_path / f"{name}.npz", x=x, small=x[:3], other=x[:, :2])
        np.savetxt(tmp_path / f"{name}.csv", x, delimiter=",", header="p,q,r", comments="")
    images = draw.normal(size=(2, 40, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", x=images[0])
    np.savez(tmp_path / "noisy.npz", x=2 * images[1])
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["twosample", *arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception  # what no message is made of has to be seen
    return found.exit_code, found.output + (found.stderr or "")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_difference_is_found_and_shown(here: Path) -> None:
    code, text = run("a.npz", "b.npz", "--kernel", "rbf", "--permutations", "99", "--out", "out")
    assert code == 0, text
    assert "the samples differ at level 0.05" in text
    found = results(here / "out")
    x, y = (torch.from_numpy(np.load(here / f"{name}.npz")["x"]).float() for name in "ab")
    kernel = RBF(float(torch.pdist(torch.cat([x, y])).median()))
    wanted = twosample.two_sample_test(x, y, kernel=kernel, permutations=1, generator=torch.Generator())
    assert found["statistic"] == pytest.approx(wanted.statistic, rel=1e-5)
    assert found["pvalue"] == 0.01 == (1 + sum(v >= found["statistic"] for v in found["null"])) / 100
    assert found["rejected"]
    assert found["sizes"] == [60, 50]
    assert len(found["witness"][0]["value"]) == 60
    assert found["witness"][1]["value"] == pytest.approx(wanted.witness[60:].tolist(), rel=1e-3)  # pyright: ignore
    page = (here / "out" / "index.html").read_text()
    assert page.count("<svg") == 2
    assert "The two samples differ: p = 0.01" in page
    code, text = run("a.npz", "same.npz", "--kernel", "rbf", "--permutations", "99", "--level", "0.01", "--out", "none")
    assert code == 0, text
    assert "no difference found at level 0.01" in text
    assert "That is no proof" in (here / "none" / "index.html").read_text()


def test_csv_gives_what_npz_gives(here: Path) -> None:
    common = ("--kernel", "mlp", "--permutations", "49", "--most", "30")
    for kind in ("npz", "csv"):
        code, text = run(f"a.{kind}", f"b.{kind}", *common, "--out", kind)
        assert code == 0, text
    npz, table = results(here / "npz"), results(here / "csv")
    assert table["statistic"] == pytest.approx(npz["statistic"], rel=1e-4)
    assert table["pvalue"] == npz["pvalue"] == 0.02
    assert npz["sizes"] == [30, 30]
    # numbers are those of the file, not of what was drawn from it
    assert max(npz["witness"][0]["example"]) > 30


@pytest.mark.parametrize("options", [("--kernel", "rbf"), (), ("--infinite",), ("--statistic", "witness")])
def test_small_differences_of_large_numbers_are_seen(here: Path, options: tuple[str, ...]) -> None:
    """Seconds since 1970: float32 knows them to 128 s only."""
    for name in "ab":
        x = np.load(here / f"{name}.npz")["x"]
        np.savetxt(here / f"late_{name}.csv", x + 1.7e9, fmt="%.17g", delimiter=",")
    found = []
    for number, files in enumerate((("a.npz", "b.npz"), ("late_a.csv", "late_b.csv"))):
        code, text = run(*files, *options, "--permutations", "99", "--out", f"out{number}")
        assert code == 0, text
        found.append(results(here / f"out{number}"))
    assert found[0]["pvalue"] == found[1]["pvalue"] <= 0.05
    assert found[1]["statistic"] == pytest.approx(found[0]["statistic"], rel=1e-3)


@pytest.mark.parametrize("statistic", ["unbiased", "block:5", "linear", "witness", "training:0.0001"])
def test_networks_and_statistics(here: Path, statistic: str) -> None:
    options = ("--kernel", "testing_nets:net", "--statistic", statistic, "--permutations", "99")
    code, text = run("a.npz", "b.npz", *options)
    assert code == 0, text
    found = results(here / "twosample")
    assert found["pvalue"] <= (0.05 if statistic != "linear" else 0.5)
    assert found["kernel"] == "tangent kernel of net"
    assert len(found["witness"]) == (0 if statistic in {"linear", "block:5"} else 2)


def test_weights_and_seeds_matter_and_repeat(here: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))
    save_file({name: 3 * t for name, t in model.state_dict().items()}, here / "w.safetensors")
    values = []
    for number, more in enumerate(
        ((), (), ("--seed", "1"), ("--weights", "w.safetensors"), ("--infinite",), ("--infinite", "--seed", "1"))
    ):
        code, text = run(
            "a.npz", "b.npz", "--kernel", "testing_nets:net", "--permutations", "9", "--out", f"out{number}", *more
        )
        assert code == 0, text
        values.append(results(here / f"out{number}")["statistic"])
    assert values[0] == values[1]
    assert len({round(v, 6) for v in values[:4]}) == 3
    assert values[4] == pytest.approx(values[5], rel=1e-6)  # an infinite width has no draw


def test_images_are_compared_by_a_convolutional_network_and_shown(here: Path) -> None:
    code, text = run("images.npz", "noisy.npz", "--permutations", "19", "--out", "out")
    assert code == 0, text
    found = results(here / "out")
    assert found["kernel"] == "tangent kernel of a random convolutional network"
    assert found["rejected"]
    page = (here / "out" / "index.html").read_text()
    assert page.count("data:image/png") == 16
    best = max(zip(found["witness"][0]["value"], found["witness"][0]["example"], strict=True))[1]
    assert f"most typical of images.npz: {best}<" in page
    worst = min(zip(found["witness"][1]["value"], found["witness"][1]["example"], strict=True))[1]
    assert f"most typical of noisy.npz: {worst}<" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.npz", "gone.npz"), "there is no file of data gone.npz"),
        (("a.npz", "gone.csv"), "there is no file of data gone.csv"),
        (("a.npz", "testing_nets.py"), "not an .npz file"),
        (("a.npz", "b.npz", "--array", "y"), "no array 'y'"),
        (("a.csv", "b.csv", "--array", "x"), "leave --array out"),
        (("a.npz", "images.npz"), "different shapes"),
        (("a.npz", "b.npz", "--array", "small", "--statistic", "linear"), "four examples in each sample"),
        (("a.npz", "b.npz", "--kernel", "gauss"), "unknown kernel 'gauss'"),
        (("a.npz", "b.npz", "--kernel", "testing_nets:gone"), "has no 'gone'"),
        (("a.npz", "b.npz", "--kernel", "testing_nets:moody"), "error: "),
        (("a.npz", "b.npz", "--kernel", "conv"), "takes images"),
        (("a.npz", "b.npz", "--statistic", "t-test"), "unknown statistic 't-test'"),
        (("a.npz", "b.npz", "--statistic", "block:x"), "unknown statistic 'block:x'"),
        (("a.npz", "b.npz", "--statistic", "block:1"), "at least two examples"),
        (("a.npz", "b.npz", "--statistic", "training:-1"), "learning rate is a positive number"),
        (("a.npz", "b.npz", "--kernel", "rbf", "--statistic", "witness"), "RBF kernel has no network"),
        (("a.npz", "b.npz", "--infinite", "--statistic", "witness"), "infinite width is not trained"),
        (("a.npz", "b.npz", "--weights", "w.pt"), "name it with --kernel"),
        (("a.npz", "b.npz", "--level", "1.5"), "lies between 0 and 1: got 1.5"),
        (("a.npz", "b.npz", "--permutations", "0"), "--permutations"),
        (("a.npz", "b.npz", "--most", "3"), "got --most 3"),
        (("words.csv", "a.csv"), "example 2 has 'many'"),
        (("ragged.csv", "a.csv"), "example 2 has 2 cells: expected 3, as in the first line"),
        (("empty.csv", "a.csv"), "no line of numbers"),
        (("nan.csv", "a.csv"), "not finite"),
        (("tokens.npz", "a.npz"), "token numbers"),
        (("pixels.npz", "a.npz"), "uint8, raw pixels"),
        (("last.npz", "last.npz"), "(8, 8, 3) look as if their channels came last"),
        (("last.npz", "last.npz", "--array", "grey"), "(8, 8, 1) look as if their channels came last"),
        (("huge.csv", "huge.csv", "--kernel", "testing_nets:net"), "float32, the network's type, cannot hold"),
        (("a.npz", "b.npz", "--out", "taken"), "--force"),
    ],
)
def test_bad_input_is_said_in_one_line_and_leaves_nothing(here: Path, arguments: tuple[str, ...], message: str) -> None:
    (here / "words.csv").write_text("p,q,r\n1,2,3\n1,many,3\n")
    (here / "ragged.csv").write_text("1,2,3\n1,2\n")
    (here / "empty.csv").write_text("p,q,r\n")
    (here / "nan.csv").write_text("1,2,3\n1,nan,3\n1,2,3\n1,2,3\n")
    np.savez(here / "tokens.npz", x=np.arange(12).reshape(4, 3))
    np.savez(here / "pixels.npz", x=np.zeros((4, 3), np.uint8))
    np.savez(here / "last.npz", x=np.ones((6, 8, 8, 3)), grey=np.ones((6, 8, 8, 1)))
    (here / "huge.csv").write_text("1,1e300,3\n" * 6)
    (here / "taken").mkdir()
    before = {path.name for path in here.iterdir()}
    code, text = run(*arguments)
    assert code == 2, text
    assert message in " ".join(text.split())
    assert "Traceback" not in text
    assert {path.name for path in here.iterdir()} - before <= {"__pycache__"}


def test_random_networks() -> None:
    generator = torch.Generator().manual_seed(0)
    images = twosample.random_network((3, 9, 7), width=5, generator=generator)
    assert images(torch.zeros(2, 3, 9, 7)).shape == (2, 1)
    shifted = torch.zeros(1, 3, 15, 15)
    shifted[..., 6:9, 6:9] = 1
    moved = torch.roll(shifted, (-1, 1), (2, 3))
    with torch.no_grad():
        assert images(shifted).item() == pytest.approx(images(moved).item(), rel=1e-4)  # where it is does not matter
    vectors = twosample.random_network((7,), width=4000, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = vectors(torch.randn(200, 7, generator=torch.Generator().manual_seed(2)))
    assert outputs.shape == (200, 1)
    assert 0.3 < float(outputs.std()) < 3  # neither vanishes nor explodes
    again = twosample.random_network((7,), width=4000, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(vectors.parameters(), again.parameters(), strict=True))
    for shape, options in (((0,), {}), ((7,), {"width": 0}), ((7,), {"convolutional": True})):
        with pytest.raises(InputError, match="got examples of shape"):
            twosample.random_network(shape, **options, generator=generator)
