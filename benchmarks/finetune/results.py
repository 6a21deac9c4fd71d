"""From runs to records, and from records to the tables of the page.

python -m benchmarks.finetune.results --folder work    writes the records
python -m benchmarks.finetune.results                  prints the tables
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import spearmanr

from benchmarks.lines import read as read_lines
from benchmarks.scale.record import record

RESULTS = Path(__file__).parent / "records"
Line = dict[str, Any]
_TAUS = (0, 1, 2, 4, 8, 16, 32, 64)


def write(folder: Path) -> None:
    """One record for each benchmark, of the seeds that are finished, with the machine that ran it and its trials."""
    for name in ("fashion", "foreseen", "backbones", "cifar", "minilm"):
        path, machine = folder / f"{name}.jsonl", folder / f"{name}.environment.json"
        if path.exists():
            lines = read_lines(path)
            counts = Counter(line["seed"] for line in lines)
            whole = {seed for seed, count in counts.items() if count == max(counts.values())}
            found: dict[str, Any] = {"environment": json.loads(machine.read_text())} if machine.exists() else {}
            if trials := read_lines(folder / f"{name}_rates.jsonl"):
                found["trials"] = trials
            kept = sorted((line for line in lines if line["seed"] in whole), key=lambda line: line["seed"])
            record(name, {**found, "lines": kept}, RESULTS)


def read(name: str) -> list[Line]:
    """The runs of a record, none if it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["lines"] if path.exists() else []


def probing_table(head: str, name: str = "fashion") -> list[str]:
    """One head, or one variant: every length of probing, means over the seeds."""
    rows = [
        "| tau | energy | speed | distance | cosine | dot product | norm | CKA | probed | fine-tuned | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by: dict[int, list[Line]] = defaultdict(list)
    for line in read(name):
        if kind(line) == head:
            for row in line["rows"]:
                by[row["tau"]].append(row)
    for tau, found in sorted(by.items()):
        change = {key: fmean(row["change"][key] for row in found) for key in found[0]["change"]}
        mean = {key: fmean(row[key] for row in found) for key in ("energy", "speed", "loss")}
        speed = f"{mean['speed']:{'.0f' if mean['speed'] >= 10 else '.2g'}}"
        rows.append(
            f"| {tau} | {mean['energy']:.3f} | {speed} | {change['distance']:.1f} | {change['cosine']:.3f} "
            f"| {change['dot']:.0f} | {change['norm_after']:.1f} | {change['cka']:.3f} | "
            f"{_share(found, 'probed_accuracy')} | {_share(found, 'accuracy')} | {mean['loss']:.3f} |"
        )
    return rows


def kind(line: Line) -> str:
    """The head, or the variant, of a sweep."""
    return line["head"] if "head" in line else line["name"]


def trends_table(name: str = "fashion") -> list[str]:
    """All heads, or variants: how what is known before fine-tuning goes with what comes of it."""
    rows = [
        "| head | seeds | energy and distance | energy and cosine | speed and distance | best tau (each seed) | "
        "accuracy without probing | best | longest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by: dict[str, list[Line]] = defaultdict(list)
    for line in read(name):
        by[kind(line)].append(line)
    for head, lines in by.items():
        pairs: list[Callable[[Line], tuple[float, float]]] = [
            lambda row: (row["energy"], row["change"]["distance"]),
            lambda row: (row["energy"], row["change"]["cosine"]),
            lambda row: (row["speed"], row["change"]["distance"]),
        ]
        ranks = " | ".join(
            f"{fmean(_rank([pair(row) for row in line['rows']]) for line in lines):+.2f}" for pair in pairs
        )
        best = [max(line["rows"], key=lambda row: (row["accuracy"], -row["loss"])) for line in lines]
        rows.append(
            f"| {head} | {len(lines)} | {ranks} | {', '.join(str(row['tau']) for row in best)} | "
            f"{_share([line['rows'][0] for line in lines], 'accuracy')} | {_share(best, 'accuracy')} | "
            f"{_share([line['rows'][-1] for line in lines], 'accuracy')} |"
        )
    return rows


def foreseen_table() -> list[str]:
    """Distances that were foreseen, beside those that came, means over the seeds."""
    rows = ["| head | " + " | ".join(f"tau {tau}" for tau in _TAUS) + " | rank correlation |", "|---" * 10 + "|"]
    came = {
        (line["head"], line["seed"]): [row["change"]["distance"] for row in line["rows"]] for line in read("fashion")
    }
    by: dict[str, list[Line]] = defaultdict(list)
    for line in read("foreseen"):
        by[line["head"]].append(line)
    for head, lines in by.items():
        ahead = [[line["distances"][str(tau)] for tau in _TAUS] for line in lines]
        true = [came[head, line["seed"]] for line in lines]
        cells = " | ".join(
            f"{fmean(a[i] for a in ahead):.1f} of {fmean(t[i] for t in true):.1f}" for i in range(len(_TAUS))
        )
        ranks = _each([_rank(list(zip(a, t, strict=True))) for a, t in zip(ahead, true, strict=True)])
        rows.append(f"| {head} | {cells} | {ranks} |")
    return rows


def backbones_table() -> list[str]:
    """Predicted and true losses, means over the seeds."""
    rows = [
        "| candidate | predicted | regression's own | predicted for 1,000 | regression's own | fine-tuned, square loss "
        "| accuracy | fine-tuned, cross-entropy | accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by: dict[str, list[Line]] = defaultdict(list)
    for line in read("backbones"):
        by[line["candidate"]].append(line)
    for name, lines in sorted(by.items(), key=lambda item: fmean(line["predicted"] for line in item[1])):
        mean = {key: fmean(line[key] for line in lines) for key in lines[0] if key not in ("candidate", "seed")}
        rows.append(
            f"| {name} | {mean['predicted']:.3f} | {mean['regressed']:.3f} | {mean['extrapolated']:.3f} | "
            f"{mean['regressed_more']:.3f} | {mean['square loss']:.3f} | {mean['square accuracy']:.1%} | "
            f"{mean['cross-entropy loss']:.3f} | {mean['cross-entropy accuracy']:.1%} |"
        )
    return rows


def ranks_table() -> list[str]:
    """Rank correlation of the prediction with each truth: of every seed, and how close the prediction is."""
    by: dict[int, list[Line]] = defaultdict(list)
    for line in read("backbones"):
        by[line["seed"]].append(line)
    rows = ["| truth | rank correlation, each seed | tuned networks alone |", "|---|---|---|"]
    truths = {
        "test error of the kernel regression": "regressed",
        "loss after fine-tuning by square loss": "square loss",
        "loss after fine-tuning by cross-entropy": "cross-entropy loss",
        "accuracy after square loss": "square accuracy",
        "accuracy after cross-entropy": "cross-entropy accuracy",
    }
    for name, key in truths.items():
        sign = -1 if "accuracy" in key else 1
        every, whole = [], []
        for lines in by.values():
            tuned = [line for line in lines if "alone" not in line["candidate"] and "last" not in line["candidate"]]
            every.append(_rank([(line["predicted"], sign * line[key]) for line in lines]))
            whole.append(_rank([(line["predicted"], sign * line[key]) for line in tuned]))
        rows.append(f"| {name} | {_spread(every)} | {_spread(whole)} |")
    return rows


def ratios() -> str:
    """One sentence on how close GCV and the extrapolation come."""
    lines = read("backbones")
    if not lines:
        return ""
    now = [line["predicted"] / line["regressed"] for line in lines]
    more = [line["extrapolated"] / line["regressed_more"] for line in lines]
    return (
        f"predicted / test error of the regression: {min(now):.2f} to {max(now):.2f}, mean {fmean(now):.2f}; for twice "
        f"the labels: {min(more):.2f} to {max(more):.2f}, mean {fmean(more):.2f} ({len(lines)} runs)"
    )


def _rank(pairs: list[tuple[float, float]]) -> float:
    return float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return _each(values)
    return f"{_each(values)}; mean {fmean(values):+.2f} ± {stdev(values):.2f}"


def _share(rows: list[Line], key: str) -> str:
    values = [row[key] for row in rows]
    error = f" ± {stdev(values) / len(values) ** 0.5:.1%}" if len(values) > 1 else ""
    return f"{fmean(values):.1%}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.folder is not None:
        write(options.folder)
    heads = list(dict.fromkeys(line["head"] for line in read("fashion")))
    for head in heads:
        print(f"{head}\n\n" + "\n".join(probing_table(head)) + "\n")
    for name in ("cifar", "minilm"):
        for head in dict.fromkeys(map(kind, read(name))):
            print(f"{name}: {head}\n\n" + "\n".join(probing_table(head, name)) + "\n")
        if read(name):
            print("\n".join(trends_table(name)) + "\n")
    tables = (trends_table(), foreseen_table(), backbones_table(), ranks_table(), [ratios()])
    print("\n\n".join("\n".join(table) for table in tables))


if __name__ == "__main__":
    main()
