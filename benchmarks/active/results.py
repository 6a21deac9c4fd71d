"""From runs to records, one JSON file for each task, and from records to the tables of the page.

python -m benchmarks.active.results --folder work [--kind fresh]    writes the records
python -m benchmarks.active.results                                 prints the tables, and draws the curves

Of three kinds of seeds: `evidence`, 100 to 109, which had a part in the choice of the default kernel; `fresh`, from 110
on, which were looked at after everything was chosen; `trials`, 0 to 4, on which it was chosen.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.active.tasks import TASKS, UCI
from benchmarks.scale.record import record
from ntkit.uses.active import Comparison, compare

RESULTS = Path(__file__).parent / "records"
PICTURE = Path(__file__).parent / "curves.svg"
KINDS = ("evidence", "fresh", "trials")
DEFAULT, AGAINST = "curvature-ivr", ("margin", "badge", "random")


def write(runs: list[dict[str, Any]], machine: dict[str, Any], kind: str = KINDS[0]) -> None:
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
        record(file_name(task, kind), {**described, "labels": first["labels"], "strategies": facts}, RESULTS)


def file_name(task: str, kind: str = KINDS[0]) -> str:
    """Without commas and spaces."""
    return f"{kind}-" + task.replace(",", "").replace(" ", "-")


def read(task: str, kind: str = KINDS[0]) -> dict[str, Any] | None:
    """The record of a task, if it is there."""
    path = RESULTS / f"{file_name(task, kind)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def compared(found: dict[str, Any]) -> Comparison:
    """The strategies of a record beside each other."""
    curves = {name: np.array(facts["accuracy"]) for name, facts in found["strategies"].items()}
    return compare(curves, found["labels"], against=AGAINST)


def strategies_table(task: str, kind: str = KINDS[0]) -> list[str]:
    """All strategies on one task."""
    found = read(task, kind)
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
        "| task | seeds | area | saved | less margin | less BADGE | less random | best | query / fit |",
        "|---|---|---|---|---|---|---|---|---|",
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
        best = f"{table.rows[0].name} {table.rows[0].area:.4f}, of {len(table.rows)}"
        facts = found["strategies"][DEFAULT]
        share = facts["seconds_query"] / facts["seconds_fit"]
        rows.append(f"| {named} | {table.seeds} | {row.area:.4f} | {saved} | {beside} | {best} | {share:.0%} |")
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


def cifar_table() -> list[str]:
    """Areas alone of an earlier run on CIFAR-10, of more strategies, whose curves are not there."""
    path = RESULTS / "cifar-areas.json"
    if not path.exists():
        return []
    areas = {name: np.array(values) for name, values in json.loads(path.read_text())["areas"].items()}
    rows = ["| strategy | area | the default less it |", "|---|---|---|"]
    for name, values in sorted(areas.items(), key=lambda item: -item[1].mean()):
        less = areas[DEFAULT] - values
        error = less.std(ddof=1) / len(less) ** 0.5
        beside = "" if name == DEFAULT else f"{less.mean():+.4f} ± {error:.4f}"
        rows.append(f"| {name} | {values.mean():.4f} | {beside} |")
    return rows


def time_table() -> list[str]:
    """A query of the default beside a fit."""
    path = RESULTS / "query-time.json"
    if not path.exists():
        return []
    rows = ["| task | points | labels | picks | query | fit | query / fit |", "|---|---|---|---|---|---|---|"]
    for line in json.loads(path.read_text())["lines"]:
        rows.append(
            f"| {line['task']} | {line['points']:,} | {line['labels']} | {line['batch']} | "
            f"{1000 * line['query_seconds']:.0f} ms | {1000 * line['fit_seconds']:.0f} ms | {line['ratio']:.0%} |"
        )
    return rows


def speed_table() -> list[str]:
    """Queries of large pools."""
    rows = ["| points | features | labels | picks | time | memory |", "|---|---|---|---|---|---|"]
    for name in ("million", "hundred-thousand", "matrix"):
        path = RESULTS / f"speed-{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            sizes = (found[key] for key in ("points", "features", "labels", "batch"))
            counts = " | ".join(size if isinstance(size, str) else f"{size:,}" for size in sizes)
            rows.append(f"| {counts} | {found['seconds']:.1f} s | {found['peak_mb'] * 2**20 / 1e9:.1f} GB |")
    return rows


def tables() -> list[list[str]]:
    """All tables of the page."""
    named = [strategies_table(task, kind) for kind in KINDS for task in ("digits", "fashion")]
    return [
        table for table in (tasks_table(), *named, cifar_table(), time_table(), trust_table(), speed_table()) if table
    ]


def draw() -> None:
    """Learning curves of every task with their standard errors, in one picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    # the same file for the same records, with letters as letters
    mpl.rcParams.update({"svg.hashsalt": "ntkit", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    found = [(task, kind, read(task, kind)) for kind in KINDS[:2] for task in TASKS]
    shown = [(task, kind, runs) for task, kind, runs in found if runs is not None]
    rows = -(-len(shown) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(13, 2.6 * rows), layout="constrained", squeeze=False)
    for place, (task, kind, runs) in zip(axes.flat, shown, strict=False):
        for k, name in enumerate((DEFAULT, "mlmoc", *AGAINST)):
            if name not in runs["strategies"]:
                continue
            curves = np.array(runs["strategies"][name]["accuracy"])
            mean, error = curves.mean(0), curves.std(0, ddof=1) / len(curves) ** 0.5
            color = "0.5" if name == "random" else f"C{k}"
            place.plot(runs["labels"], mean, color=color, lw=1.2, label=name)
            place.fill_between(runs["labels"], mean - error, mean + error, color=color, alpha=0.25, lw=0)
        seeds = f"seeds {runs['seeds'][0]}-{runs['seeds'][-1]}" if kind != KINDS[0] else ""
        place.set_title(f"{task} {seeds}", fontsize=9)
        place.tick_params(labelsize=7)
    for place in axes.flat[len(shown) :]:
        place.set_axis_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
    figure.supxlabel("labels", fontsize=9)
    figure.supylabel("test accuracy, mean of the seeds and its standard error", fontsize=9)
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)
    # a hundredth of a point is enough, but not of what stands as text
    PICTURE.write_text(re.sub(r"(?<!>)(\d\.\d\d)\d+", r"\1", PICTURE.read_text()))


def _beside(found: Any) -> str:
    if found is None:
        return ""
    star = "*" if found.p_holm < 0.05 else ""
    return f"{found.difference:+.4f} ± {found.standard_error:.4f}{star}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    options = parser.parse_args()
    if options.folder is not None:
        from benchmarks.lines import read as read_runs

        machine = json.loads((options.folder / "environment.json").read_text())
        write(read_runs(options.folder / "runs.jsonl"), machine, options.kind)
    print("\n\n".join("\n".join(table) for table in tables()))
    draw()


if __name__ == "__main__":
    main()
