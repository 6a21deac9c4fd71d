"""Learning curves of all strategies on all tasks, with the same seeds for all.

    NTKIT_DATA=... python -m benchmarks.active.evidence --folder work [--tasks "digits;fashion"] [--workers 2]
    NTKIT_DATA=... python -m benchmarks.active.evidence --folder work --tasks cifar --device cuda --workers 8

Every run is a line of work/runs.jsonl as soon as it is done; the same command goes on where it was stopped, and
`python -m benchmarks.active.results --folder work` makes records of them. One folder is for one machine, which
work/environment.json describes. Each run is one thread of its own process; on a GPU, which all of them share, the pool,
the network and its training are on the device, labels and choices are not. What a run finds does not depend on how many
run beside it; how long it takes does.

No setting was tuned on seeds from 100 on: settings come from trials on digits and Fashion-MNIST with seeds 0 to 4. That
the last layer alone drew with margin on Fashion-MNIST was first seen on seeds 100 to 109, and made us look for another
kernel, on 0 to 4: seeds from 110 on were never looked at before the default was what it is.
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
from benchmarks.lines import read
from benchmarks.machine import environment
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits
from ntkit.uses import active

SEEDS = "100-109"
MAIN = ("curvature-ivr", "mlmoc", "margin", "badge", "entropy", "lcmd", "bait", "random")
# On digits, the cheapest, all that need no dropout and no pairs of points.
ALL = (*MAIN, "mlmoc, best singles", "ivr", "emoc", "variance", "least-confidence", "power-margin", "learned-loss",
       "core-set", "k-means++", "max-det", "frank-wolfe", "bait-forward-backward", "typiclust")  # fmt: skip
OTHERS = {"digits": ALL, "fashion, whole pool": ("curvature-ivr", "margin", "badge", "random")}
# What comes after a comma in a name here.
VARIANTS: dict[str, dict[str, Any]] = {
    "best singles": {"batch": active.TopK()},
    "last layer": {"kernel": active.LastLayer()},
}
WITH_SINGLES = ("digits, batches of 50", "digits, ten noisy copies", "digits, square loss", "fashion")


def strategies(task: Task) -> tuple[str, ...]:
    """Those that are run on a task."""
    found = OTHERS.get(task.name, MAIN)
    return (*found, "mlmoc, best singles") if task.name in WITH_SINGLES else found


def made(name: str, task: Task, seed: int) -> active.Strategy:
    """A strategy by its name here."""
    plain, _, variant = name.partition(", ")
    found = active.strategy(plain, loss=task.loss, missing_label=-1, random_state=seed)
    return replace(found, **VARIANTS[variant]) if variant else found


def curve(task_name: str, name: str, seed: int, device: str = "cpu") -> dict[str, Any]:
    """One run: test accuracy after every training, and seconds of training and choosing."""
    torch.set_num_threads(1)
    if device != "cpu":
        repeatable()
    task, rng = TASKS[task_name], np.random.default_rng(seed)
    pool = task.pool(rng).to(device)
    network = task.network(pool)
    labels = np.full(len(pool.said), -1)
    first = rng.permutation(len(labels))[: task.initial]
    labels[first] = pool.said[first]
    chooses, accuracies, counts, fits, queries = made(name, task, seed), [], [], 0.0, 0.0
    for turn in range(task.rounds + 1):
        fit = active.Training(
            pool.x, lambda: network().to(device), loss=task.loss, steps=task.steps, seed=1000 * seed + turn
        )
        start = time.perf_counter()
        model = fit(labels)
        if device != "cpu":
            torch.cuda.synchronize()
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


def repeatable() -> None:
    """The same numbers in every process on a GPU: float32 without shortcuts, and sums in a fixed order.

    torch only warns of an operation that it does not know to be repeatable: such is the way back through a pooling of
    maxima, which is repeatable here, where no two windows share a point.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def drawn(labels: np.ndarray, task: Task, seed: int, turn: int) -> np.ndarray:
    """The points of a round: those with labels, and the candidates, the first without a label in an order of all.

    The order follows from seed and round alone, so that candidates of two strategies differ only as their labels do.
    """
    if task.candidates is None:
        return np.arange(len(labels))
    order = np.random.default_rng([seed, turn]).permutation(len(labels))
    free = order[labels[order] < 0][: task.candidates]
    return np.sort(np.concatenate([np.flatnonzero(labels >= 0), free]))


def accuracy(model: torch.nn.Module, pool: Pool) -> float:
    """Of the points to measure by."""
    said = linearize(model, readout=Logits()).outputs(pool.x_test).argmax(1).cpu().numpy()
    return float((said == pool.y_test).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tasks", default=";".join(TASKS), help="separated by semicolons")
    parser.add_argument("--strategies", default="", help="separated by semicolons; all by default")
    parser.add_argument("--seeds", default=SEEDS, help=f"first and last, {SEEDS} by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    describe(options.folder / "environment.json", options.device)
    path = options.folder / "runs.jsonl"
    done = {(run["task"], run["strategy"], run["seed"]) for run in read(path)}
    asked = [name for name in options.strategies.split(";") if name]
    first, last = map(int, options.seeds.split("-"))
    jobs = [
        (task, name, seed)
        for task in options.tasks.split(";")
        for seed in range(first, last + 1)
        for name in asked or strategies(TASKS[task])
        if (task, name, seed) not in done
    ]
    # for the workers, which read them as they start
    os.environ.update(OMP_NUM_THREADS="1", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    start, failed = time.perf_counter(), []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool, path.open("a") as file:
        futures = {pool.submit(curve, *job, options.device): job for job in jobs}
        for k, future in enumerate(as_completed(futures), 1):
            said = f"{k} of {len(jobs)}, {time.perf_counter() - start:.0f} s: {', '.join(map(str, futures[future]))}: "
            error = future.exception()
            if error is not None:  # the others go on: what they find is worth having
                failed.append(futures[future])
                print(f"{said}{type(error).__name__}: {error}", flush=True)
                continue
            run = {**future.result(), "side_by_side": options.workers}
            file.write(json.dumps(run) + "\n")
            file.flush()
            print(f"{said}{np.mean(run['accuracy']):.4f}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed, {failed[0]} among them")


def describe(path: Path, device: str) -> None:
    """Write down the machine of the runs.

    Raises:
        SystemExit: if the folder has runs of another.
    """
    name = f"{device}, {torch.cuda.get_device_name()}" if device != "cpu" else device
    now = environment(1, name)
    before = json.loads(path.read_text()) if path.exists() else now
    if {**before, "date": ""} != {**now, "date": ""}:
        raise SystemExit(f"{path} describes another machine: take another folder for the runs of this one")
    path.write_text(json.dumps(before, indent=1) + "\n")


if __name__ == "__main__":
    main()
