"""The counted iterations: the page shows what the record says, and what is recommended keeps what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from benchmarks.scale import iterations
from benchmarks.scale.record import RESULTS

ROOT = Path(__file__).parents[1]
FOUND, OTHERS = (
    json.loads((RESULTS / f"{name}.json").read_text())["networks"] for name in ("iterations", "iterations-others")
)


def test_the_page_has_what_was_counted() -> None:
    assert [(row["network"], row["state"]) for row in FOUND] == [system[:2] for system in iterations.SYSTEMS]
    page = (ROOT / "docs/scale.md").read_text()
    for kinds in (iterations.REDUCED, iterations.MENDED):
        rows = iterations.table(kinds)
        assert len(rows) == 2 + len(iterations.SYSTEMS)
        assert "\n\n" + "\n".join(rows) + "\n\n" in page
    assert [(row["network"], row["state"]) for row in OTHERS] == [system[:2] for system in iterations.OTHERS]
    rows = iterations.table(iterations.PROMISED, "iterations-others")
    assert len(rows) == 2 + len(iterations.OTHERS)
    assert "\n\n" + "\n".join(rows) + "\n\n" in page


@pytest.mark.parametrize("kind", ["recommended, trace", "recommended, sketch", "Nystrom, trace (x) B"])
@pytest.mark.parametrize("row", FOUND, ids=lambda row: f"{row['network']} {row['state']}")
def test_what_is_recommended_needs_at_most_a_quarter(row: dict, kind: str) -> None:
    assert iterations.fewer(row, kind) >= iterations.WANTED


def test_other_networks_keep_the_promise_but_for_the_one_that_the_page_names() -> None:
    missed = [
        (row["network"], row["state"])
        for row in OTHERS
        if any(iterations.fewer(row, kind) < iterations.WANTED for kind in iterations.PROMISED[1:])
    ]
    assert missed == [("GRU", "trained")]


def test_a_cross_marks_what_was_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iterations, "RESULTS", tmp_path)
    counts = dict.fromkeys(iterations.KINDS, 250) | {"none": 1000, "trace (x) I": 251}
    done = {"network": "A", "state": "as built", "iterations": counts}
    begun = {"network": "B", "state": "trained", "iterations": {"none": 9}}
    (tmp_path / "iterations.json").write_text(json.dumps({"networks": [done, begun]}))
    assert iterations.table(("none", "trace (x) I", "trace (x) B"))[2:] == [
        "| A as built | 1,000 | 251 (4.0) \N{BALLOT X} | 250 (4.0) |"
    ]


def test_it_goes_on_where_it_has_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Solver(iterations.ConjugateGradients):
        def solve(self, *args, **kwargs):
            solved.append(1)
            return super().solve(*args, **kwargs)

    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, iterations.C))

    solved: list[int] = []
    sizes = {"RESULTS": tmp_path, "N": 8, "TRACE_SIZE": 20, "FULL_SIZE": 80, "DRAWN": 2, "LOSS": 2.2}
    systems = (("small", "as built", small, 0.0), ("small", "trained", small, 1e-2))
    replaced = {**sizes, "SYSTEMS": systems, "OTHERS": systems[:1], "ConjugateGradients": Solver}
    for name, value in replaced.items():
        monkeypatch.setattr(iterations, name, value)
    path = tmp_path / "iterations.json"
    iterations.main([])
    first = json.loads(path.read_text())["networks"]
    assert len(solved) == 2 * len(iterations.KINDS) + len(iterations.PROMISED)
    others = json.loads((tmp_path / "iterations-others.json").read_text())["networks"]
    assert [list(row["iterations"]) for row in others] == [list(iterations.PROMISED)]
    assert first[0]["training_steps"] == 0 < first[1]["training_steps"]
    assert first[1]["loss"] < 2.2
    assert [list(row["iterations"]) for row in first] == [list(iterations.KINDS)] * 2
    for changed, again in (({}, 3), ({"loss": 1.0}, len(iterations.KINDS))):  # another network is counted anew
        kept = {kind: first[1]["iterations"][kind] for kind in iterations.KINDS[:-3]}
        path.write_text(json.dumps({"networks": [first[0], {**first[1], **changed, "iterations": kept}]}))
        solved.clear()
        iterations.main([])
        assert len(solved) == again
        assert json.loads(path.read_text())["networks"] == first
