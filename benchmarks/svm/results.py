"""From the files of the runs to records, and from records to the tables of the page.

    python -m benchmarks.svm.results --folder work      writes records/uci.json from the files of `benchmarks.svm.uci`
    python -m benchmarks.svm.results                    prints the tables, and draws picture.svg

Ranks are among the methods of a table, equal accuracies share theirs. P90 and P95: share of the sets on which a method
reaches 90% and 95% of the best accuracy among these methods; PMA: mean of accuracy / best accuracy.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range, wilcoxon

from benchmarks.scale.record import record
from ntkit.uses.active.comparison import holm

RECORDS = Path(__file__).parent / "records"
PICTURE = Path(__file__).parent / "picture.svg"
NAMES = {
    "ntk": "NTK, SVM",
    "ntk-own": "NTK, SVM, relative C",
    "rbf": "RBF, SVM",
    "forest": "random forest",
}
MAIN = ("ntk", "rbf", "forest")
SHOTS = (10, 20, 40, 80, 160)
FINITE = {
    "network": "the trained network itself",
    "infinite NTK": "infinite NTK, SVM",
    "eNTK, initial": "eNTK at initialisation, SVM",
    "eNTK, trained": "eNTK after training, SVM",
    "last layer, initial": "last layer at initialisation, SVM",
    "last layer, trained": "last layer after training, SVM",
}


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


def verdict(runs: dict[str, Any], methods: Sequence[str], level: float = 0.05) -> str:
    """Whether the first of the methods differs from the others beyond chance, all of these comparisons being made."""
    names, accuracies = matrix(runs, methods)
    first, others = accuracies[:, 0], list(accuracies.T[1:])
    called = [NAMES[other.removesuffix(" clean")] for other in methods[1:]]
    corrected = holm([signed_rank(first, other) for other in others])
    beside = ", ".join(
        f"{name} {p:.2g} (won {(first > other).sum()}, lost {(first < other).sum()})"
        for name, p, other in zip(called, corrected, others, strict=True)
    )
    beyond = [name for name, p in zip(called, corrected, strict=True) if p < level]
    return (
        f"Friedman p = {friedman(accuracies):.2g}; critical difference of mean ranks (Nemenyi, {level:.0%}) "
        f"{nemenyi(len(methods), len(names), level):.2f}; Wilcoxon p with Holm's correction against {beside}: set by "
        f"set, {NAMES[methods[0].removesuffix(' clean')]} differs beyond chance from {' and '.join(beyond) or 'none'}"
    )


def fewshot_uci_table() -> list[str]:
    """Kernels of networks that are finite and trained, beside the infinite one, on small UCI sets."""
    by: dict[str, dict[tuple[str, int], float]] = {}
    for line in fewshot("uci"):
        for kernel, accuracy in line["accuracies"].items():
            by.setdefault(kernel, {})[line["name"], line["seed"]] = accuracy
    names = sorted({name for name, _ in by["network"]})
    every = sorted({seed for _, seed in by["network"]})
    seeds = [seed for seed in every if all((name, seed) in by["network"] for name in names)]
    found = {kernel: np.array([[of[name, seed] for seed in seeds] for name in names]) for kernel, of in by.items()}
    ranks = rankdata(-np.stack([of.mean(1) for of in found.values()], 1), axis=1).mean(0)
    rows = [f"| {len(names)} sets, {len(seeds)} seeds | accuracy | rank |", "|---|---|---|"]
    for (kernel, of), rank in zip(found.items(), ranks, strict=True):
        means = 100 * of.mean(0)
        rows.append(
            f"| {FINITE[kernel]} | {means.mean():.2f} ± {means.std(ddof=1) / len(seeds) ** 0.5:.2f} | {rank:.2f} |"
        )
    return rows


def fewshot_images_table() -> list[str]:
    """Accuracy by number of images, with its standard error between seeds."""
    lines = fewshot("images")
    rows = [f"| {len(lines)} seeds | " + " | ".join(f"n = {n}" for n in SHOTS) + " |", "|---" * (len(SHOTS) + 1) + "|"]
    for kernel in lines[0]["accuracies"]:
        of = 100 * np.array([line["accuracies"][kernel] for line in lines])
        cells = zip(of.mean(0), of.std(0, ddof=1) / len(lines) ** 0.5, strict=True)
        rows.append(f"| {kernel} | " + " | ".join(f"{mean:.1f} ± {error:.1f}" for mean, error in cells) + " |")
    return rows


def fewshot(what: str) -> list[dict[str, Any]]:
    """Lines of a record of `benchmarks.svm.fewshot`; none if it is not there."""
    path = RECORDS / f"fewshot-{what}.json"
    return json.loads(path.read_text())["lines"] if path.exists() else []


def tables() -> list[list[str]]:
    """All tables of the page that the records give."""
    runs = read()["runs"]
    found = [uci_table(runs, MAIN)]
    clean = [f"{method} clean" for method in MAIN]
    done = matrix(runs, MAIN)[0]
    for methods in (("ntk-own", *MAIN), clean):
        if all(method in runs for method in methods) and matrix(runs, methods)[0] == done:
            found.append(uci_table(runs, methods))
    if fewshot("uci"):
        found.append(fewshot_uci_table())
    if fewshot("images"):
        found.append(fewshot_images_table())
    return found


def draw() -> None:
    """How close to the best each method comes on how many sets, and few images of new classes, in one picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    # the same file for the same records, with letters as letters
    mpl.rcParams.update({"svg.hashsalt": "ntkit", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names, accuracies = matrix(read()["runs"], MAIN)
    part = np.sort(100 * accuracies / accuracies.max(1, keepdims=True), axis=0)
    share = 100 * (1 - np.arange(len(names)) / len(names))
    for k, method in enumerate(MAIN):
        left.step(part[:, k], share, where="pre", label=NAMES[method], color=f"C{k}")
    left.set_xlim(80, 100.2)
    left.set_xlabel("per cent of the best accuracy among the three")
    left.set_ylabel(f"per cent of {len(names)} UCI sets that reach it")
    left.legend(loc="best", frameon=False)
    lines = fewshot("images")
    for k, kernel in enumerate(lines[0]["accuracies"] if lines else ()):
        of = 100 * np.array([line["accuracies"][kernel] for line in lines])
        right.errorbar(SHOTS, of.mean(0), of.std(0, ddof=1) / len(lines) ** 0.5, fmt="o-", ms=3, lw=1.2, capsize=2,
                       color=f"C{k}", label=kernel)  # fmt: skip
    right.set_xscale("log")
    right.set_xticks(SHOTS, [str(n) for n in SHOTS])
    right.minorticks_off()
    right.set_xlabel("Fashion-MNIST images of five new classes")
    right.set_ylabel("test accuracy, per cent")
    right.legend(loc="best", frameon=False, fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)
    PICTURE.write_text(re.sub(r"(?<!>)(\d\.\d\d)\d+", r"\1", PICTURE.read_text()))  # a hundredth of a point is enough


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
    draw()


if __name__ == "__main__":
    main()
