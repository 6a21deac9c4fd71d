"""From the files of the runs to records, and from records to the tables of the page.

    python -m benchmarks.svm.results --folder work      writes records/uci.json from the files of `benchmarks.svm.uci`
    python -m benchmarks.svm.results                    prints the tables

Ranks are among the methods of a table, equal accuracies share theirs. P90 and P95: share of the sets on which a method
reaches 90% and 95% of the best accuracy among these methods; PMA: mean of accuracy / best accuracy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range, wilcoxon

from benchmarks.scale.record import record

RECORDS = Path(__file__).parent / "records"
NAMES = {
    "ntk": "NTK, SVM",
    "ntk-own": "NTK, SVM, relative C",
    "rbf": "RBF, SVM",
    "forest": "random forest",
}
MAIN = ("ntk", "rbf", "forest")


@dataclass(frozen=True)
class Standing:
    """How a method does among others on many sets.

    Attributes:
        mean: accuracy in percent. deviation: between the sets.
        rank: mean of its ranks, 1 the best (Friedman).
        p90, p95, pma: see above, in percent.
    """

    mean: float
    deviation: float
    rank: float
    p90: float
    p95: float
    pma: float


def standings(accuracies: np.ndarray) -> list[Standing]:
    """Of accuracies (sets, methods) between 0 and 1."""
    ranks = rankdata(-accuracies, axis=1).mean(0)
    part = accuracies / accuracies.max(1, keepdims=True)
    return [
        Standing(
            100 * a.mean(), 100 * a.std(ddof=1), float(rank), 100 * (p >= 0.9).mean(), 100 * (p >= 0.95).mean(),
            100 * p.mean(),
        )
        for a, rank, p in zip(accuracies.T, ranks, part.T, strict=True)
    ]  # fmt: skip


def friedman(accuracies: np.ndarray) -> float:
    """The p-value that all methods rank alike."""
    return float(friedmanchisquare(*accuracies.T).pvalue)


def nemenyi(methods: int, sets: int, level: float = 0.05) -> float:
    """Difference in mean rank beyond which two methods differ, all pairs being compared (Demsar 2006)."""
    return float(
        studentized_range.ppf(1 - level, methods, np.inf) / np.sqrt(2) * np.sqrt(methods * (methods + 1) / 6 / sets)
    )


def signed_rank(first: np.ndarray, second: np.ndarray) -> float:
    """Wilcoxon's p-value that two methods are alike."""
    return float(wilcoxon(first, second, zero_method="zsplit").pvalue)


# ---------------------------------------------------------------- records


def collect(folder: Path) -> dict[str, Any]:
    """What is in the folder: by method and kind of protocol, by set."""
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name == "environment.json":
            continue
        run = json.loads(path.read_text())
        method = run["method"] + (" clean" if run["clean"] else "")
        kept = ("accuracies", "chosen", "validation", "fits", "stopped", "stopped_draws", "seconds", "seconds_search")
        runs.setdefault(method, {})[run["set"]] = {key: run[key] for key in kept}
    return runs


def read() -> dict[str, Any]:
    """The record."""
    return json.loads((RECORDS / "uci.json").read_text())


def matrix(runs: dict[str, Any], methods: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Sets that all of these methods have, and accuracies (sets, methods)."""
    names = sorted(set.intersection(*(set(runs[method]) for method in methods)))
    return names, np.array([[np.mean(runs[m][name]["accuracies"]) for m in methods] for name in names])


def uci_table(runs: dict[str, Any], methods: Sequence[str]) -> list[str]:
    """One line for each method."""
    names, accuracies = matrix(runs, methods)
    rows = [
        f"| {len(names)} sets | accuracy | rank | P90 | P95 | PMA | best or equal on | CPU minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    best = accuracies >= accuracies.max(1, keepdims=True)
    for number, (method, of) in enumerate(zip(methods, standings(accuracies), strict=True)):
        minutes = sum(runs[method][name]["seconds"] for name in names) / 60
        rows.append(
            f"| {NAMES[method.removesuffix(' clean')]} | {of.mean:.2f} ± {of.deviation:.2f} | {of.rank:.2f} | "
            f"{of.p90:.1f} | {of.p95:.1f} | {of.pma:.2f} | {best[:, number].sum()} | {minutes:.1f} |"
        )
    return rows


def verdict(runs: dict[str, Any], methods: Sequence[str]) -> str:
    """Whether the first of the methods differs from the others beyond chance."""
    names, accuracies = matrix(runs, methods)
    beside = ", ".join(
        f"{NAMES[other.removesuffix(' clean')]} {signed_rank(accuracies[:, 0], accuracies[:, k]):.2g} "
        f"(won {(accuracies[:, 0] > accuracies[:, k]).sum()}, lost {(accuracies[:, 0] < accuracies[:, k]).sum()})"
        for k, other in enumerate(methods)
        if k
    )
    return (
        f"Friedman p = {friedman(accuracies):.2g}; critical difference of mean ranks (Nemenyi, 5%) "
        f"{nemenyi(len(methods), len(names)):.2f}; Wilcoxon p against {beside}"
    )


def tables() -> list[list[str]]:
    """All tables of the page that the records give."""
    runs = read()["runs"]
    found = [uci_table(runs, MAIN)]
    if "ntk-own" in runs:
        found.append(uci_table(runs, ("ntk-own", "ntk", "rbf", "forest")))
    clean = [f"{method} clean" for method in MAIN]
    if all(method in runs for method in clean):
        found.append(uci_table(runs, clean))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.folder is not None:
        machine = json.loads((options.folder / "environment.json").read_text())
        record("uci", {"environment": machine, "runs": collect(options.folder)}, RECORDS)
    print("\n\n".join("\n".join(table) for table in tables()))
    runs = read()["runs"]
    for methods in (MAIN, tuple(f"{method} clean" for method in MAIN)):
        if all(method in runs for method in methods):
            print("\n" + verdict(runs, methods))
            ended = {m: sum(r["stopped"] for r in runs[m].values()) for m in methods}
            fits = {m: sum(r["fits"] for r in runs[m].values()) for m in methods}
            print(f"fits {fits}, ended early {ended}")


if __name__ == "__main__":
    main()
