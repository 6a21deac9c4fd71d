"""The records of the two-sample benchmarks: what the page says of them, the published table, the shifts themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.twosample import power, results, shift
from ntkit.uses import twosample

PAGE = (Path(__file__).parent.parent / "docs" / "twosample.md").read_text(encoding="utf-8")
# of which the page shows a table
SIZES = {"digits": 100, "fashion": 200}
DATA = [data for data in results.NAMES if results.read(f"shift_{data}")]


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_tables_of_the_page_are_those_of_the_records() -> None:
    tables = [results.power_table(), results.level_table(), *(results.shift_table(data, SIZES[data]) for data in DATA)]
    assert len(tables) >= 3
    for table in tables:
        assert "\n".join(table) in PAGE, table[0]


def test_the_published_power_is_reproduced_and_the_level_is_right() -> None:
    """Within 0.07 at every rho by both forms; without a difference the level is 0.05, at 500 runs."""
    found = results.read("power")
    assert found["runs"] == 500
    lines = {line["test"]: line["power"] for line in found["lines"]}
    for form in ("SGD", "time zero"):
        for rho, rate in zip(found["rhos"], lines[form], strict=True):
            assert abs(rate - power.PUBLISHED[rho]) <= 0.07, (form, rho, rate)
        assert abs(lines[form][0] - 0.05) < 3 * (0.05 * 0.95 / 500) ** 0.5
    for line in found["lines"]:
        for level, rate in line["levels"].items():
            error = (float(level) * (1 - float(level)) / 500) ** 0.5
            assert rate - float(level) < 3.5 * error, (line["test"], level)  # on the safe side it may be


@pytest.mark.parametrize("data", DATA)
def test_no_test_rejects_too_often_without_a_shift(data: str) -> None:
    found = results.read(f"shift_{data}")
    for line in found["lines"]:
        if line["shift"] == "none":
            for rate in line["power"]:
                assert rate < 0.05 + 3.5 * (0.05 * 0.95 / found["runs"]) ** 0.5, line


def test_shifts_do_what_they_say() -> None:
    x, y = shift.images("digits")
    assert x.shape == (shift.POOL, 1, 8, 8)
    assert float(x.min()) == 0
    assert float(x.max()) == 1
    noise = shift.shifted(x, "noise", 0.1) - x
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    turned = shift.shifted(x, "rotation", 90.0)
    assert torch.allclose(turned, torch.rot90(x, 1, (2, 3)), atol=1e-5) or torch.allclose(
        turned, torch.rot90(x, -1, (2, 3)), atol=1e-5
    )
    setting = shift.Setting("digits", "imbalance", 0.3)
    shares, sizes = [], []
    for run in range(20):
        ours, theirs = setting.draw(100, drawn(run))
        assert len(torch.cat([ours, theirs]).unique()) == len(ours) + len(theirs)  # nobody twice
        shares.append([float((y[t[:, 0]] == 0).double().mean()) for t in (ours, theirs)])
        sizes.append(len(theirs))
    usual, tilted = torch.tensor(shares).mean(0).tolist()
    assert usual == pytest.approx(0.1, abs=0.03)
    assert tilted == pytest.approx(0.37, abs=0.04)  # three tenths, and a tenth of the others
    assert sizes == [100] * 20
    ours, theirs = shift.Setting("digits", "noise", 0.1).draw(100, drawn(0))
    assert ours.max() < shift.POOL <= theirs.min()
    assert len(torch.cat([ours, theirs - shift.POOL]).unique()) == 200  # of other images


def test_looked_up_kernels_are_those_of_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run by the matrix of the whole pool is the run by the network itself."""
    monkeypatch.setattr(shift, "POOL", 40)
    monkeypatch.setattr(shift, "NETWORKS", 1)
    shift.clean_rows.cache_clear()
    setting = shift.Setting("digits", "noise", 0.2)
    x, y = setting.draw(12, drawn(0))
    pixels = [setting.pool[0][t[:, 0]].double() for t in (x, y)]
    network = shift.network(0).double()
    g = drawn(1)
    torch.randint(1, (1,), generator=g)  # which network
    wanted = twosample.witness_test(
        *pixels, witness=twosample.ZeroTime(network), permutations=shift.PERMUTATIONS, generator=g
    )
    found = setting.tests["NTK-MMD"](x, y, drawn(1))
    assert found.statistic == pytest.approx(wanted.statistic, rel=1e-3)
    assert torch.allclose(found.witness, wanted.witness, rtol=1e-3, atol=1e-3)
    shift.clean_rows.cache_clear()


def test_the_picture_is_drawn_from_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "PICTURES", tmp_path)
    results.draw()
    for data in DATA:
        text = (tmp_path / f"shift_{data}.svg").read_text()
        assert text.startswith("<svg")
        assert "infinite FC NTK" in text
        assert "imbalance" in text
