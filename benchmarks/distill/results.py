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
from benchmarks.lines import read
from benchmarks.scale.record import record

RESULTS = Path(__file__).parent / "records"
TOY = ("accuracy", "ece", "distance", "target_mean", "target_frobenius", "accuracy_last", "ece_last", "best_epoch")
NOISE = ("accuracy", "accuracy_last", "ece", "ece_last", "ece_noisy", "ece_noisy_last")
NOISE += ("target_rms", "target_right", "by_heart", "best_epoch")

# Epochs that a filter with alpha = 0.05 remembers.
MEMORY = 20


def write_mixed(lines: list[dict[str, Any]]) -> None:
    """The mixtures, if all are there."""
    mixed = sorted((line for line in lines if line["kind"] == "mixed"), key=lambda line: line["share"])
    if len(mixed) == len(toy.SHARES):
        record("toy-mixed", {key: _rounded([line[key] for line in mixed]) for key in ("share", *TOY)}, RESULTS)


def write_named(lines: list[dict[str, Any]]) -> None:
    """The named supervisions of the seeds that have all of them."""
    by = {(line["kind"], line["seed"]): line for line in lines if line["kind"] != "mixed"}
    seeds = [seed for seed in toy.SEEDS if all((name, seed) in by for name in toy.NAMED)]
    if seeds:
        bayes = _rounded([by["OHT", seed]["bayes"] for seed in seeds])
        named = {name: {key: _rounded([by[name, seed][key] for seed in seeds]) for key in TOY} for name in toy.NAMED}
        record("toy-named", {"seeds": seeds, "bayes": bayes, "named": named}, RESULTS)


def write_noise(lines: list[dict[str, Any]]) -> None:
    """One record for each task, of the seeds that have all methods and shares."""
    by = {(line["task"], line["share"], line["method"], line["seed"]): line for line in lines}
    for name, task in noise.TASKS.items():
        shares = [s for s in noise.SHARES if any(key[:2] == (name, s) for key in by)]
        seeds = [
            seed
            for seed in noise.SEEDS
            if all((name, share, method, seed) in by for share in shares for method in task.methods)
        ]
        if shares and seeds:
            found = {
                method: [
                    {key: _rounded([by[name, share, method, seed][key] for seed in seeds]) for key in NOISE}
                    for share in shares
                ]
                for method in task.methods
            }
            record(file_name(name), {"task": name, "shares": shares, "seeds": seeds, "methods": found}, RESULTS)


def file_name(task: str) -> str:
    """Without commas and spaces."""
    return "noise-" + task.replace(",", "").replace(" ", "-")


def read_record(name: str) -> dict[str, Any] | None:
    """A record, if it is there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def mixed_ranks() -> dict[str, tuple[float, float]]:
    """Spearman's rank correlation of the mean distance of the targets with what came of them, and its p."""
    found = read_record("toy-mixed")
    if found is None:
        return {}
    keys = ("accuracy", "ece", "accuracy_last", "ece_last", "distance")
    ranks: dict[str, Any] = {key: spearmanr(found["target_mean"], found[key]) for key in keys}
    return {key: (float(rank.statistic), float(rank.pvalue)) for key, rank in ranks.items()}


def mixed_table() -> list[str]:
    """Rank correlations between the distance of the targets and the students."""
    words = {
        "accuracy": "test accuracy, best validation epoch",
        "ece": "test ECE, best validation epoch",
        "accuracy_last": "test accuracy, last epoch",
        "ece_last": "test ECE, last epoch",
        "distance": "mean distance of its own probabilities from p*, test",
    }
    rows = [f"| {words[key]} | {rank:+.3f} | {p:.0e} |" for key, (rank, p) in mixed_ranks().items()]
    return ["| of the student, with the mean distance of its targets | Spearman | p |", "|---|---|---|", *rows]


def named_table() -> list[str]:
    """The named supervisions, means over the seeds."""
    found = read_record("toy-named")
    if found is None:
        return []
    rows = [
        "| targets | distance | test accuracy | less one-hot | above it | ECE | at the last epoch | ECE | best epoch |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| Bayes' rule | | {np.mean(found['bayes']):.4f} | | | | | | |",
    ]
    base = np.array(found["named"]["OHT"]["accuracy"])
    for name, facts in found["named"].items():
        gains = np.array(facts["accuracy"]) - base
        beside = f"{_beside(gains)} | {int((gains > 0).sum())} of {len(gains)}" if name != "OHT" else "| "
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
        "| noise | targets | at the last epoch | less ESKD | best validation | less ESKD | ECE, last | "
        "ECE, noisy labels | targets right | distance | best epoch |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k, share in enumerate(found["shares"]):
        base = {key: np.array(values) for key, values in found["methods"]["ESKD"][k].items()}
        for method, facts in found["methods"].items():
            own = {key: np.array(values) for key, values in facts[k].items()}
            last, best = (
                f"{own[key].mean():.3f} | {_beside(own[key] - base[key], 3) if method != 'ESKD' else ''}"
                for key in ("accuracy_last", "accuracy")
            )
            rows.append(
                f"| {share:.0%} | {method} | {last} | {best} | {own['ece_last'].mean():.3f} | "
                f"{own['ece_noisy_last'].mean():.3f} | {own['target_right'].mean():.3f} | "
                f"{own['target_rms'].mean():.3f} | {np.median(own['best_epoch']):.0f} |"
            )
    return rows


def memory_runs() -> dict[str, dict[bool, list[float]]]:
    """By task, and by whether the teacher's best epoch is later than what the filter remembers: Filter-KD less ESKD.

    Accuracy at the last epoch, of every seed and share of noise but 0.
    """
    runs: dict[str, dict[bool, list[float]]] = {}
    for task in noise.TASKS:
        found = read_record(file_name(task)) or {"shares": ()}
        for k, share in enumerate(found["shares"]):
            teacher, early, filtered = (found["methods"][name][k] for name in ("one-hot", "ESKD", "Filter-KD"))
            gains = np.array(filtered["accuracy_last"]) - np.array(early["accuracy_last"])
            for epoch, gain in zip(teacher["best_epoch"], gains.tolist(), strict=True):
                if share > 0:
                    runs.setdefault(task, {False: [], True: []})[epoch > MEMORY].append(gain)
    return runs


def memory_table() -> list[str]:
    """When the filter helps."""
    rows = [
        "| noise of 20 to 50 % | teacher's best epoch | runs | Filter-KD above ESKD | below | mean difference |",
        "|---|---|---|---|---|---|",
    ]
    for task, parts in memory_runs().items():
        for late, gains in parts.items():
            above, below = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
            words = f"after {MEMORY}" if late else f"up to {MEMORY}"
            if gains:
                rows.append(f"| {task} | {words} | {len(gains)} | {above} | {below} | {np.mean(gains):+.3f} |")
    return rows


def storage_table() -> list[str]:
    """What a table of 1,000 classes costs."""
    found = read_record("storage")
    if found is None:
        return []
    rows = [
        "| table | size, MB | updates of an epoch, s | reading an epoch, s | away from float32, total variation |",
        "|---|---|---|---|---|",
    ]
    return rows + [
        f"| {name} | {facts['table_mb']:.0f} | {facts['update_cpu_seconds']:.1f} | {facts['read_cpu_seconds']:.1f} | "
        f"{facts['total_variation']:.4f} |"
        for name, facts in found["tables"].items()
    ]


def _beside(differences: np.ndarray, digits: int = 4) -> str:
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return f"{differences.mean():+.{digits}f} ± {error:.{digits}f}"


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="runs of toy.jsonl and noise.jsonl")
    options = parser.parse_args()
    if options.folder is not None:
        lines = read(options.folder / "toy.jsonl")
        write_mixed(lines)
        write_named(lines)
        write_noise(read(options.folder / "noise.jsonl"))
    tables = (
        mixed_table(),
        named_table(),
        *(noise_table(task) for task in noise.TASKS),
        memory_table(),
        storage_table(),
    )
    print("\n\n".join("\n".join(table) for table in tables if table))


if __name__ == "__main__":
    main()
