"""From runs to records, and from records to the tables of the page.

python -m benchmarks.distill.results --folder work    writes the records
python -m benchmarks.distill.results                  prints the tables
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.distill import noise, toy
from benchmarks.distill.training import read
from benchmarks.scale.record import record

RESULTS = Path(__file__).parent / "records"
TOY = ("accuracy", "ece", "distance", "target_mean", "target_frobenius", "accuracy_last", "ece_last", "best_epoch")
NOISE = ("accuracy", "ece", "ece_noisy", "accuracy_last", "ece_last", "target_rms", "target_right", "best_epoch")


def write_toy(lines: list[dict[str, Any]]) -> None:
    """The mixtures, and the named supervisions of the seeds that have all of them."""
    mixed = sorted((line for line in lines if line["kind"] == "mixed"), key=lambda line: line["share"])
    by = {(line["kind"], line["seed"]): line for line in lines if line["kind"] != "mixed"}
    seeds = [seed for seed in toy.SEEDS if all((name, seed) in by for name in toy.NAMED)]
    columns = ("share", *TOY)
    found = {
        "mixed": {key: _rounded([line[key] for line in mixed]) for key in columns},
        "seeds": seeds,
        "bayes": [by["OHT", seed]["bayes"] for seed in seeds],
        "named": {name: {key: _rounded([by[name, seed][key] for seed in seeds]) for key in TOY} for name in toy.NAMED},
    }
    record("toy", found, RESULTS)


def write_noise(lines: list[dict[str, Any]]) -> None:
    """One record for each task, of the seeds that have all methods and shares."""
    by = {(line["task"], line["share"], line["method"], line["seed"]): line for line in lines}
    for task in noise.TASKS:
        shares = [s for s in noise.SHARES if any(key[:2] == (task, s) for key in by)]
        seeds = [
            seed
            for seed in noise.SEEDS
            if all((task, share, method, seed) in by for share in shares for method in noise.METHODS)
        ]
        if shares and seeds:
            found = {
                method: [
                    {key: _rounded([by[task, share, method, seed][key] for seed in seeds]) for key in NOISE}
                    for share in shares
                ]
                for method in noise.METHODS
            }
            record(file_name(task), {"task": task, "shares": shares, "seeds": seeds, "methods": found}, RESULTS)


def file_name(task: str) -> str:
    """Without commas and spaces."""
    return "noise-" + task.replace(",", "").replace(" ", "-")


def read_record(name: str) -> dict[str, Any] | None:
    """A record, if it is there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def mixed_table() -> list[str]:
    """Rank correlations between the distance of the targets and the students."""
    found = read_record("toy")
    if found is None:
        return []
    mixed = found["mixed"]
    rows = ["| of the student, with the mean distance of its targets | Spearman | p |", "|---|---|---|"]
    for key, words in (
        ("accuracy", "test accuracy, best validation epoch"),
        ("ece", "test ECE, best validation epoch"),
        ("accuracy_last", "test accuracy, last epoch"),
        ("ece_last", "test ECE, last epoch"),
        ("distance", "mean distance of its own probabilities from p*, test"),
    ):
        rank: Any = spearmanr(mixed["target_mean"], mixed[key])
        rows.append(f"| {words} | {rank.statistic:+.3f} | {rank.pvalue:.0e} |")
    return rows


def named_table() -> list[str]:
    """The named supervisions, means over the seeds."""
    found = read_record("toy")
    if found is None or not found["seeds"]:
        return []
    rows = [
        "| targets | their distance | test accuracy | less one-hot | ECE | at the last epoch | ECE | best epoch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = np.array(found["named"]["OHT"]["accuracy"])
    for name, facts in found["named"].items():
        beside = _beside(np.array(facts["accuracy"]) - base) if name != "OHT" else ""
        rows.append(
            f"| {name} | {np.mean(facts['target_frobenius']):.2f} | {np.mean(facts['accuracy']):.4f} | {beside} | "
            f"{np.mean(facts['ece']):.4f} | {np.mean(facts['accuracy_last']):.4f} | {np.mean(facts['ece_last']):.4f} | "
            f"{np.median(facts['best_epoch']):.0f} |"
        )
    return rows


def noise_table(task: str) -> list[str]:
    """Accuracy and calibration of every method at every share of noise."""
    found = read_record(file_name(task))
    if found is None:
        return []
    rows = [
        "| noise | targets | test accuracy | less ESKD | at the last epoch | ECE | ECE, noisy labels | targets right | "
        "distance | best epoch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k, share in enumerate(found["shares"]):
        base = np.array(found["methods"]["ESKD"][k]["accuracy"])
        for method, facts in found["methods"].items():
            own = {key: np.array(values) for key, values in facts[k].items()}
            beside = _beside(own["accuracy"] - base) if method != "ESKD" else ""
            rows.append(
                f"| {share:.0%} | {method} | {own['accuracy'].mean():.3f} | {beside} | "
                f"{own['accuracy_last'].mean():.3f} | {own['ece'].mean():.3f} | {own['ece_noisy'].mean():.3f} | "
                f"{own['target_right'].mean():.3f} | {own['target_rms'].mean():.3f} | "
                f"{np.median(own['best_epoch']):.0f} |"
            )
    return rows


def _beside(differences: np.ndarray) -> str:
    if len(differences) == 1:
        return f"{differences[0]:+.4f}"
    return f"{differences.mean():+.4f} ± {differences.std(ddof=1) / len(differences) ** 0.5:.4f}"


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="runs of toy.jsonl and noise.jsonl")
    options = parser.parse_args()
    if options.folder is not None:
        if lines := read(options.folder / "toy.jsonl"):
            write_toy(lines)
        if lines := read(options.folder / "noise.jsonl"):
            write_noise(lines)
    tables = (mixed_table(), named_table(), *(noise_table(task) for task in noise.TASKS))
    print("\n\n".join("\n".join(table) for table in tables if table))


if __name__ == "__main__":
    main()
