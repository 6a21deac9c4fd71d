"""From runs to records, one JSON file for each task, and from records to the tables of the page.

python -m benchmarks.active.results --folder work    writes the records
python -m benchmarks.active.results                  prints the tables
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.active.tasks import TASKS, UCI
from benchmarks.scale.record import record
from ntkit.uses.active import Comparison, compare

RESULTS = Path(__file__).parent / "records"
DEFAULT, AGAINST = "curvature-ivr", ("margin", "badge", "random")


def write(runs: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """One record for each task, of the seeds that every strategy has, with the machine that ran them."""
    by: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        by[run["task"]][run["strategy"]][run["seed"]] = run
    for task, strategies in by.items():
        seeds = sorted(set.intersection(*(set(found) for found in strategies.values())))
        if not seeds:
            continue
        first = next(iter(strategies.values()))[seeds[0]]
        facts = {
            name: {
                "accuracy": [found[seed]["accuracy"] for seed in seeds],
                **{
                    key: float(np.median([found[seed][key] for seed in seeds]))
                    for key in ("seconds_fit", "seconds_query")
                },
            }
            for name, found in strategies.items()
        }
        beside = sorted({run["side_by_side"] for found in strategies.values() for run in found.values()})
        described = {"environment": machine, "side_by_side": beside, "task": task, "seeds": seeds}
        record(file_name(task), {**described, "labels": first["labels"], "strategies": facts}, RESULTS)


def file_name(task: str) -> str:
    """Without commas and spaces."""
    return "evidence-" + task.replace(",", "").replace(" ", "-")


def read(task: str) -> dict[str, Any] | None:
    """The record of a task, if it is there."""
    path = RESULTS / f"{file_name(task)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def compared(found: dict[str, Any]) -> Comparison:
    """The strategies of a record beside each other."""
    curves = {name: np.array(facts["accuracy"]) for name, facts in found["strategies"].items()}
    return compare(curves, found["labels"], against=AGAINST)


def strategies_table(task: str) -> list[str]:
    """All strategies on one task."""
    found = read(task)
    if found is None:
        return []
    table = compared(found)
    rows = [
        "| strategy | area | final | labels saved | less margin | less BADGE | less random | query / fit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table.rows:
        facts = found["strategies"][row.name]
        saved = f"{row.saved:.0%}" if np.isfinite(row.saved) else "never"
        beside = " | ".join(_beside(row.against.get(name)) for name in AGAINST)
        share = facts["seconds_query"] / facts["seconds_fit"]
        rows.append(f"| {row.name} | {row.area:.4f} | {row.final:.3f} | {saved} | {beside} | {share:.0%} |")
    return rows


def tasks_table() -> list[str]:
    """The default strategy on all tasks."""
    rows = [
        "| task | seeds | area | saved | less margin | less BADGE | less random | best of all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        found = read(task)
        if found is None:
            continue
        table = compared(found)
        row = table[DEFAULT]
        saved = f"{row.saved:.0%}" if np.isfinite(row.saved) else "never"
        beside = " | ".join(_beside(row.against.get(name)) for name in AGAINST)
        named = f"{task} (UCI)" if task in UCI else task
        best = table.rows[0]
        rows.append(f"| {named} | {table.seeds} | {row.area:.4f} | {saved} | {beside} | {best.name} {best.area:.4f} |")
    return rows


def trust_table() -> list[str]:
    """Foreseen changes beside those of networks that were really trained."""
    path = RESULTS / "trust.json"
    if not path.exists():
        return []
    rows = [
        "| loss | weight decay | kernel | correlation of all entries (each draw) | slope | unscaled | of the order |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for line in json.loads(path.read_text())["lines"]:
        groups.setdefault((line["loss"], line["weight_decay"], line["kernel"]), []).append(line)
    for (loss, decay, kernel), lines in groups.items():
        name = {"CrossEntropy": "cross-entropy", "SquareLoss": "square loss"}[loss]
        mean = {key: fmean(line[key] for line in lines) for key in lines[0] if key not in ("loss", "kernel")}
        each = ", ".join(f"{line['correlation']:.2f}" for line in lines)
        rows.append(
            f"| {name} | {decay} | {kernel} | {mean['correlation']:.2f} ({each}) | {mean['slope']:.1f} | "
            f"{mean['unscaled']:.2f} | {mean['rank_correlation']:.2f} |"
        )
    return rows


def speed_table() -> list[str]:
    """Queries of large pools."""
    rows = ["| points | features | labels | picks | time | memory |", "|---|---|---|---|---|---|"]
    for name in ("million", "hundred-thousand"):
        path = RESULTS / f"speed-{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            counts = " | ".join(f"{found[key]:,}" for key in ("points", "features", "labels", "batch"))
            rows.append(f"| {counts} | {found['seconds']:.1f} s | {found['peak_mb'] * 2**20 / 1e9:.1f} GB |")
    return rows


def _beside(found: Any) -> str:
    if found is None:
        return ""
    star = "*" if found.p_holm < 0.05 else ""
    return f"{found.difference:+.4f} ± {found.standard_error:.4f}{star}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.folder is not None:
        from benchmarks.active.evidence import read as read_runs

        machine = json.loads((options.folder / "environment.json").read_text())
        write(read_runs(options.folder / "runs.jsonl"), machine)
    tables = (tasks_table(), strategies_table("digits"), strategies_table("fashion"), trust_table(), speed_table())
    print("\n\n".join("\n".join(table) for table in tables))


if __name__ == "__main__":
    main()
