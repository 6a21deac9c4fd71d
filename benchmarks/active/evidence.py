"""Learning curves of all strategies on all tasks, with the same seeds for all.

    NTKIT_DATA=... python -m benchmarks.active.evidence --folder work [--tasks digits,fashion] [--workers 2]

Every run is a line of work/runs.jsonl; the same command goes on where it was stopped. No setting was
tuned on seeds from 100 on: settings come from trials on digits and Fashion-MNIST with seeds 0 to 4. That the last layer
alone drew with margin on Fashion-MNIST was first seen on these seeds, and made us look for another kernel, on 0 to 4.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.active.tasks import TASKS, Pool, Task
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits
from ntkit.uses import active

SEEDS = tuple(range(100, 110))
MAIN = ("curvature-ivr", "mlmoc", "margin", "badge", "entropy", "lcmd", "bait", "random")
# On digits, the cheapest, all that need no dropout and no pairs of points.
ALL = (*MAIN, "mlmoc, best singles", "ivr", "emoc", "variance", "least-confidence", "power-margin", "learned-loss",
       "core-set", "k-means++", "max-det", "frank-wolfe", "bait-forward-backward", "typiclust")  # fmt: skip
OTHERS = {"digits": ALL, "fashion, whole pool": ("curvature-ivr", "margin", "badge", "random")}
WITH_SINGLES = ("digits, batches of 50", "digits, ten noisy copies", "digits, square loss", "fashion")


def strategies(task: Task) -> tuple[str, ...]:
    """Those that are run on a task."""
    found = OTHERS.get(task.name, MAIN)
    return (*found, "mlmoc, best singles") if task.name in WITH_SINGLES else found


def made(name: str, task: Task, seed: int) -> active.Strategy:
    """A strategy by its name here."""
    plain, _, singles = name.partition(", ")
    found = active.strategy(plain, loss=task.loss, missing_label=-1, random_state=seed)
    return replace(found, batch=active.TopK()) if singles and isinstance(found, active.LookAhead) else found


def curve(task_name: str, name: str, seed: int) -> dict[str, Any]:
    """One run: test accuracy after every training, and seconds of training and choosing."""
    torch.set_num_threads(1)
    task, rng = TASKS[task_name], np.random.default_rng(seed)
    pool = task.pool(rng)
    labels = np.full(len(pool.said), -1)
    first = rng.permutation(len(labels))[: task.initial]
    labels[first] = pool.said[first]
    chooses, accuracies, counts, fits, queries = made(name, task, seed), [], [], 0.0, 0.0
    for turn in range(task.rounds + 1):
        start = time.perf_counter()
        model = active.Training(pool.x, task.network(pool), loss=task.loss, steps=task.steps, seed=1000 * seed + turn)(
            labels
        )
        fits += time.perf_counter() - start
        accuracies.append(accuracy(model, pool))
        counts.append(int((labels >= 0).sum()))
        if turn < task.rounds:
            seen = drawn(labels, task, seed, turn)
            x, y = pool.x[seen], labels[seen]
            start = time.perf_counter()
            chosen = seen[chooses.query(x, y, model, batch_size=task.size)]
            queries += time.perf_counter() - start
            labels[chosen] = pool.said[chosen]
    return {
        "task": task_name, "strategy": name, "seed": seed, "labels": counts,
        "accuracy": [round(a, 4) for a in accuracies],
        "seconds_fit": round(fits / (task.rounds + 1), 4), "seconds_query": round(queries / task.rounds, 4),
    }  # fmt: skip


def drawn(labels: np.ndarray, task: Task, seed: int, turn: int) -> np.ndarray:
    """The points of a round: those with labels, and the candidates."""
    if task.candidates is None:
        return np.arange(len(labels))
    free = np.random.default_rng([seed, turn]).permutation(np.flatnonzero(labels < 0))[: task.candidates]
    return np.sort(np.concatenate([np.flatnonzero(labels >= 0), free]))


def accuracy(model: torch.nn.Module, pool: Pool) -> float:
    """Of the points to measure by."""
    said = linearize(model, readout=Logits()).outputs(pool.x_test).argmax(1).numpy()
    return float((said == pool.y_test).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tasks", default=";".join(TASKS), help="separated by semicolons")
    parser.add_argument("--strategies", default="", help="separated by semicolons; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "runs.jsonl"
    done = {(run["task"], run["strategy"], run["seed"]) for run in read(path)}
    jobs = [
        (task, name, seed)
        for task in options.tasks.split(";")
        for seed in SEEDS[: options.seeds]
        for name in strategies(TASKS[task])
        if (task, name, seed) not in done and (not options.strategies or name in options.strategies.split(";"))
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool, path.open("a") as file:
        futures = [pool.submit(curve, *job) for job in jobs]
        for k, future in enumerate(as_completed(futures), 1):
            run = future.result()
            file.write(json.dumps(run) + "\n")
            file.flush()
            said = f"{k} of {len(jobs)}, {time.perf_counter() - start:.0f} s: {run['task']}, {run['strategy']}, "
            print(f"{said}{run['seed']}: {np.mean(run['accuracy']):.4f}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """All runs of a file; a line that a killed run left half written is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    if lines[-1]:
        path.write_text("\n".join([*lines[:-1], ""]))
    return [json.loads(line) for line in lines[:-1]]


if __name__ == "__main__":
    main()
