"""Benchmarks of support vector machines: the numbers of the page are those of the records, and how they are made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon
from sklearn.svm import SVC

from benchmarks.svm import fewshot, results, uci
from ntkit.kernel.fully_connected import FullyConnected

ROOT = Path(__file__).parent.parent
needs_data = pytest.mark.skipif("NTKIT_DATA" not in os.environ, reason="needs the folder of data sets")


def test_the_page_has_what_was_found() -> None:
    page = (ROOT / "docs" / "svm.md").read_text()
    tables = results.tables()
    assert len(tables) >= 4
    for rows in tables:
        assert len(rows) > 2
        assert "\n".join(rows) in page
    runs = results.read()["runs"]
    assert results.verdict(runs, results.MAIN) in page
    assert results.verdict(runs, ("ntk-own", *results.MAIN)) in page
    stopped, fits, scored = (
        {m: sum(run[key] for run in runs[m].values()) for m in ("ntk", "rbf", "ntk-own")}
        for key in ("stopped", "fits", "stopped_draws")
    )
    assert f"{stopped['ntk-own']} of {fits['ntk-own']:,}\nfits of its search ended early" in page
    ours, theirs = (f"{stopped[m]} of {fits[m]:,}" for m in ("ntk", "rbf"))
    assert f"({ours} fits of the NTK's search and {theirs} of RBF's;" in page
    assert f"that are scored {scored['ntk']} and, on `bank`, {scored['rbf']})" in page


def test_the_records_are_whole() -> None:
    runs = results.read()["runs"]
    names, _ = results.matrix(runs, results.MAIN)
    assert len(names) == 60
    for method in ("ntk-own", *results.MAIN):
        assert all(len(runs[method][name]["accuracies"]) == 4 for name in names)
        # what is scored has converged, but for the four draws of one set (RBF: at C = 8192)
        stopped = {name: runs[method][name]["stopped_draws"] for name in names if runs[method][name]["stopped_draws"]}
        assert stopped == {"rbf": {"bank": 4}, "ntk-own": {"mammographic": 4}}.get(method, {})
    seconds = sum(run["seconds"] for method in results.MAIN for run in runs[method].values())
    assert seconds < 2 * 3600  # under an hour on two cores


def test_standings_by_hand() -> None:
    #                       best .8     best .5     best 1.0, shared
    accuracies = np.array([[0.8, 0.7], [0.46, 0.5], [1.0, 1.0]])
    first, second = results.standings(accuracies)
    assert (first.rank, second.rank) == (pytest.approx((1 + 2 + 1.5) / 3), pytest.approx((2 + 1 + 1.5) / 3))
    assert first.mean == pytest.approx(100 * 2.26 / 3)
    assert first.deviation == pytest.approx(100 * np.std([0.8, 0.46, 1.0], ddof=1))
    assert (first.p90, first.p95) == (pytest.approx(100), pytest.approx(200 / 3))  # .46 is 92% of .5
    assert (second.p90, second.p95) == (pytest.approx(200 / 3), pytest.approx(200 / 3))  # .7 is 87.5% of .8
    assert first.pma == pytest.approx(100 * (1 + 0.92 + 1) / 3)


def test_the_critical_difference_is_that_of_the_tables() -> None:
    # Demsar 2006, table 5: q = 2.343 for three and 2.569 for four methods at 5%
    assert results.nemenyi(3, 60) == pytest.approx(2.343 * np.sqrt(3 * 4 / (6 * 60)), rel=1e-3)
    assert results.nemenyi(4, 20) == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 20)), rel=1e-3)


def test_both_comparisons_are_counted() -> None:
    def verdict(gaps: np.ndarray) -> str:
        """Where the first method is before both others by so much, set by set."""
        columns = {"ntk": gaps / 1000, "rbf": np.zeros(20), "forest": np.zeros(20)}
        runs = {m: {f"{k:02}": {"accuracies": [v]} for k, v in enumerate(of)} for m, of in columns.items()}
        return results.verdict(runs, results.MAIN)

    gaps = np.arange(1.0, 21.0)
    assert verdict(gaps).endswith("NTK, SVM differs beyond chance from RBF, SVM and random forest")
    gaps[[*range(8), 13]] *= -1
    alone = float(wilcoxon(gaps).pvalue)
    assert 0.025 < alone < 0.05  # beyond chance alone, and not as one of two
    assert f"against RBF, SVM {2 * alone:.2g} (won 11, lost 9), random forest {2 * alone:.2g} (won" in verdict(gaps)
    assert verdict(gaps).endswith("NTK, SVM differs beyond chance from none")


@needs_data
def test_cuts_are_those_of_the_study() -> None:
    assert len(uci.sets()) == 60
    assert list(uci.sets().values()) == sorted(uci.sets().values(), reverse=True)
    data = uci.Set.load("wine")
    assert data.x.shape == (178, 13)
    np.testing.assert_allclose(data.x.mean(0), 0, atol=1e-5)
    for split in (data.halves, *data.draws):
        assert sorted(np.concatenate(split)) == list(range(178))
    assert [len(test) for _, test in data.draws] == [44] * 4
    for draw in range(4):
        kept = np.concatenate(data.without(draw))
        assert sorted(np.concatenate([kept, data.draws[draw][1]])) == list(range(178))
        assert set(data.without(draw)[0]) <= set(data.halves[0])


@needs_data
@pytest.mark.parametrize("name", ["lenses", "wine"])
def test_the_protocol_in_loops(name: str) -> None:
    """One machine at a time, with the sums of the study's kernel written out, as its code has them."""
    data = uci.Set.load(name)
    train, held = data.halves
    best, chosen = -1.0, (0, 0, 0.0)
    for depth in uci.DEPTHS:
        for fixed in range(depth):
            matrix = plain_kernel(data.x, depth, fixed)
            for c in uci.NTK_CS:
                machine = SVC(kernel="precomputed", C=c).fit(matrix[train][:, train], data.y[train])
                accuracy = float((machine.predict(matrix[held][:, train]) == data.y[held]).mean())
                if accuracy > best:
                    best, chosen = accuracy, (depth, fixed, c)
    matrix = plain_kernel(data.x, *chosen[:2])
    accuracies = []
    for train, test in data.draws:
        machine = SVC(kernel="precomputed", C=chosen[2]).fit(matrix[train][:, train], data.y[train])
        accuracies.append(float((machine.predict(matrix[test][:, train]) == data.y[test]).mean()))
    found = uci.run(name, "ntk", clean=False)
    assert found["validation"] == [pytest.approx(best, abs=1e-6)]
    assert tuple(found["chosen"][0].values()) == chosen
    assert found["accuracies"] == pytest.approx(accuracies, abs=1e-6)
    assert results.read()["runs"]["ntk"][name]["accuracies"] == found["accuracies"]


def plain_kernel(x: np.ndarray, depth: int, fixed: int) -> np.ndarray:
    s = x @ x.T
    h = np.zeros_like(s)
    for layer in range(depth):
        if fixed <= layer:
            h = h + s
        if layer == depth - 1:
            return h
        p = np.sqrt(np.outer(np.diag(s), np.diag(s))).clip(1e-9)
        rho = (s / p).clip(-1, 1)
        rest = (np.pi - np.arccos(rho)) / (2 * np.pi)
        s, h = p * (rho * rest + np.sqrt(1 - rho**2) / (2 * np.pi)), h * rest
    raise AssertionError


@needs_data
def test_a_clean_choice_does_not_see_the_test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = uci.Set.load("wine"), []

    def choose(of: uci.Set, split: uci.Split) -> uci.Choice:
        seen.append(np.concatenate(split))
        return uci.Choice({"gamma": 0.1, "C": 1.0}, 1.0, 1)

    monkeypatch.setattr(uci, "choose_rbf", choose)
    found = uci.run("wine", "rbf", clean=True)
    assert len(found["chosen"]) == len(seen) == 4
    for rows, (_, test) in zip(seen, data.draws, strict=True):
        assert not set(rows) & set(test)


@needs_data
def test_runs_are_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["uci", "--folder", str(tmp_path), "--workers", "1", "--sets", "lenses", "--methods", "rbf,ntk-own"]
    monkeypatch.setattr("sys.argv", arguments)
    uci.main()
    assert "2/2 lenses" in capsys.readouterr().out
    written = {path.name for path in tmp_path.glob("lenses.*.json")}
    assert written == {"lenses.rbf.json", "lenses.ntk-own.json"}
    (tmp_path / "lenses.rbf.json").unlink()
    uci.main()
    assert "1/1 lenses rbf" in capsys.readouterr().out
    runs = results.collect(tmp_path)
    assert set(runs) == {"rbf", "ntk-own"}
    assert json.loads((tmp_path / "environment.json").read_text())["scikit-learn"]


@needs_data
def test_a_network_on_a_small_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewshot, "WIDTH", 16)
    monkeypatch.setattr(fewshot, "STEPS", 3)
    found = fewshot.uci_piece("lenses", 0)
    assert set(found["accuracies"]) == set(results.FINITE)
    assert set(found["C"]) == set(results.FINITE) - {"network"}
    assert all(0 <= accuracy <= 1 for accuracy in found["accuracies"].values())


def test_few_examples_are_chosen_and_scored_apart() -> None:
    x = np.concatenate([np.full((6, 1), -1.0), np.full((6, 1), 1.0)])[[0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]]
    labels = np.where(x[:, 0] > 0, 9, 5)
    matrix = x @ x[:8].T
    assert fewshot.few_accuracy(matrix, labels, 8, 6) == 1.0
    labels[8:] = 14 - labels[8:]  # the test examples turned round
    assert fewshot.few_accuracy(matrix, labels, 8, 6) == 0.0


def test_conventions() -> None:
    assert FullyConnected(3, 1, **uci.CONVENTIONS["ntk-own"]) == FullyConnected(3, 1)
    assert uci.steps((np.arange(1000), np.arange(3))) == 500_000
    assert len(uci.GAMMAS) * len(uci.RBF_CS) == 110
