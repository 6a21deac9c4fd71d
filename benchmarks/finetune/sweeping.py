"""What the sweeps on real data share: pieces that are kept as soon as they are finished, the line of each, rates.

A piece is one sweep, of one variant and one seed: a line of FOLDER/NAME.jsonl, with the machine in
FOLDER/NAME.environment.json. The same command goes on with the pieces that are missing. Rates of fine-tuning come from
trials on a seed of their own, lines of FOLDER/NAME_rates.jsonl: the best mean accuracy wins.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.lines import read
from benchmarks.machine import environment, version
from ntkit.errors import ModelError
from ntkit.uses import finetune

SEEDS, TRIAL_SEED, TRIED = "0,1,2", 100, (0, 16)
Line = dict[str, Any]


def parser(text: str | None, *, quick: bool = False, choose: bool = False) -> argparse.ArgumentParser:
    """The options of all of them, and those that some have."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--folder", type=Path, required=True)
    found.add_argument("--seeds", default=SEEDS)
    found.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    found.add_argument("--threads", type=int, default=1)
    if quick:
        found.add_argument("--quick", action="store_true", help="a few examples and lengths, to see that it runs")
    if choose:
        found.add_argument("--choose", action="store_true", help="try the rates of fine-tuning, instead of the sweeps")
    return found


def begin(options: argparse.Namespace, name: str, packages: Iterable[str] = ()) -> list[int]:
    """Make the folder, say what machine this is, and give the seeds."""
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    found = environment(torch.get_num_threads(), device) | {package: version(package) for package in packages}
    (options.folder / f"{name}.environment.json").write_text(json.dumps(found, indent=1) + "\n")
    return [int(seed) for seed in options.seeds.split(",")]


def pieces(path: Path, keys: Iterable[Line], run: Callable[..., Line]) -> None:
    """Run what is not in the file yet, and write each line when it is there."""
    lines = read(path)
    for key in keys:
        if not any(key.items() <= line.items() for line in lines):
            start = time.perf_counter()
            found = {**key, **run(**key), "seconds": round(time.perf_counter() - start, 1)}
            with path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{key} took {found['seconds']} s", flush=True)


def facts(sweep: finetune.Sweep) -> Line:
    """What is written down of a sweep."""
    return {"energies": [round(e, 5) for e in sweep.energies], "rows": [asdict(row) for row in sweep.rows]}


def tried(run: Callable[[], finetune.Sweep]) -> Line:
    """What a rate comes to from every tau that is tried; no accuracies if training diverges."""
    try:
        sweep = run()
    except ModelError as error:
        return {"accuracies": None, "why": str(error)}
    return {"accuracies": [row.accuracy for row in sweep.rows], "distances": [r.change.distance for r in sweep.rows]}


def chosen(path: Path, rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The rate of each variant: that of the best mean accuracy in the trials, the middle one without trials."""
    found = {name: of[len(of) // 2] for name, of in rates.items()}
    lines = [line for line in read(path) if line["accuracies"]]
    for name in rates:
        of = [line for line in lines if line["name"] == name]
        if of:
            found[name] = max(of, key=lambda line: fmean(line["accuracies"]))["rate"]
    return found


def counter(name: str, rows: Path | None = None, work: Path | None = None) -> Callable[[int, int], None]:
    """Says how many fine-tunings are done; with a sweep's folder, each row is written down as soon as it is there."""
    start, written = time.perf_counter(), set()

    def done(number: int, every: int) -> None:
        print(f"{name}: {number} of {every}, {time.perf_counter() - start:.0f} s", flush=True)
        for path in sorted(work.glob("tau-*.json")) if work is not None else ():
            if path not in written and rows is not None:
                written.add(path)
                with rows.open("a") as file:
                    file.write(json.dumps({"sweep": name, **json.loads(path.read_text())["facts"]}) + "\n")

    return done
