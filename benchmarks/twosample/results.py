"""From records to the tables and pictures of the page.

python -m benchmarks.twosample.results            prints the tables
python -m benchmarks.twosample.results --draw     draws the pictures beside this file
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.twosample.power import PUBLISHED

PICTURES = Path(__file__).parent
RECORDS = PICTURES / "records"
NAMES = {"digits": "Digits", "fashion": "Fashion-MNIST"}
# the strength of each shift that is drawn: where tests differ most
DRAWN = {
    "digits": {"noise": 0.1, "rotation": 2.0, "imbalance": 0.2},
    "fashion": {"noise": 0.2, "rotation": 8.0, "imbalance": 0.2},
}
Found = dict[str, Any]


def read(name: str) -> Found:
    """A record, empty if it is not there."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def power_table() -> list[str]:
    """The published rates and ours."""
    found = read("power")
    rows = [
        "| rho | " + " | ".join(f"{rho:g}" for rho in found["rhos"]) + " |", "|---" * (len(found["rhos"]) + 1) + "|",
        "| published, SGD | " + " | ".join(f"{PUBLISHED[rho]:.3f}" for rho in found["rhos"]) + " |",
    ]  # fmt: skip
    for line in found["lines"]:
        name = {"SGD": "NTK-MMD, one pass of SGD", "time zero": "NTK-MMD, exact at time zero"}.get(
            line["test"], line["test"]
        )
        cells = " | ".join(f"{p:.3f} ± {e:.3f}" for p, e in zip(line["power"], line["standard_error"], strict=True))
        rows.append(f"| {name} | {cells} |")
    return rows


def level_table() -> list[str]:
    """Rejections without a difference, at several levels."""
    lines = read("power")["lines"]
    levels = list(lines[0]["levels"])
    rows = ["| level | " + " | ".join(levels) + " |", "|---" * (len(levels) + 1) + "|"]
    rows += [f"| {line['test']} | " + " | ".join(f"{line['levels'][at]:.3f}" for at in levels) + " |" for line in lines]
    return rows


def shift_table(data: str, size: int) -> list[str]:
    """Power at one sample size, for every shift and strength."""
    found = read(f"shift_{data}")
    at = found["sizes"].index(size)
    tests = list(dict.fromkeys(line["test"] for line in found["lines"]))
    rows = ["| shift | " + " | ".join(tests) + " |", "|---" * (len(tests) + 1) + "|"]
    for kind, strength in dict.fromkeys((line["shift"], line["strength"]) for line in found["lines"]):
        cells = []
        for test in tests:
            line = pick(found, kind, strength, test)
            cells.append(f"{line['power'][at]:.2f} ± {line['standard_error'][at]:.2f}")
        rows.append(f"| {kind if kind == 'none' else f'{kind} {strength:g}'} | {' | '.join(cells)} |")
    return rows


def pick(found: Found, kind: str, strength: float, test: str) -> Found:
    """The line of one setting and test."""
    wanted = {"shift": kind, "strength": strength, "test": test}
    return next(line for line in found["lines"] if wanted.items() <= line.items())


def seconds_table(data: str) -> list[str]:
    """Mean time of one test without a shift, the kernels of the whole pool counted where they are first needed."""
    found = read(f"shift_{data}")
    tests = dict.fromkeys(line["test"] for line in found["lines"])
    return [f"{test}: {pick(found, 'none', 0.0, test)['seconds']:.3f} s" for test in tests]


def draw() -> None:
    """One picture for each data set: power over the sample size, at one strength of each shift."""
    from ntkit.report.twosample import Rates, plot_rates

    for data in NAMES:
        found = read(f"shift_{data}")
        if not found:
            continue
        tests = list(dict.fromkeys(line["test"] for line in found["lines"]))
        panels = []
        for kind, strength in DRAWN[data].items():
            lines = {test: pick(found, kind, strength, test) for test in tests}
            panels.append(
                Rates(
                    f"{NAMES[data]}: {kind} {strength:g}", found["sizes"],
                    {test: line["power"] for test, line in lines.items()},
                    {test: line["standard_error"] for test, line in lines.items()},
                )
            )  # fmt: skip
        svg = plot_rates(panels, label="examples of each sample").replace("currentColor", "#24292f")
        head, body = svg.split(">", 1)
        # on its own, outside a page, a picture has no ground
        svg = f'{head}><rect width="100%" height="100%" fill="white"/>{body}'
        (PICTURES / f"shift_{data}.svg").write_text(re.sub(r"(?<!>)(\d\.\d\d)\d+", r"\1", svg))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        draw()
    tables = [power_table(), level_table()]
    for data in NAMES:
        if read(f"shift_{data}"):
            tables += [shift_table(data, size) for size in read(f"shift_{data}")["sizes"]]
            tables.append(seconds_table(data))
    print("\n\n".join("\n".join(table) for table in tables))


if __name__ == "__main__":
    main()
