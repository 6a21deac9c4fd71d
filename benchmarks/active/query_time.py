"""How long a query takes beside a fit: the default strategy in the middle of a run, one thread, nothing beside it.

    NTKIT_DATA=... python -m benchmarks.active.query_time [--folder work]

Medians of nine, queries and fits in turn. The fit is that of the comparison (300 steps of Adam from scratch), which is
short: a longer one makes the query's part smaller. On a machine that others use as well the numbers say little: small
steps of training suffer more from neighbours than large products do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.active.results import RESULTS
from benchmarks.active.tasks import TASKS
from benchmarks.scale.record import record
from ntkit.uses import active

CASES = (
    "digits", "digits, batches of 50", "digits, ten noisy copies", "fashion", "fashion, whole pool", "waveform-noise",
    "spambase", "plant-texture", "cifar",
)  # fmt: skip
TIMES = 9


def seconds(*tasks: Callable[[], object]) -> list[float]:
    """Median time of one call of each, in turn."""
    taken: list[list[float]] = [[] for _ in tasks]
    for turn in range(TIMES + 1):
        for task, found in zip(tasks, taken, strict=True):
            start = time.perf_counter()
            task()
            if turn:  # the first warms up
                found.append(time.perf_counter() - start)
    return [median(found) for found in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where query-time.json goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = []
    for name in CASES:
        task, rng = TASKS[name], np.random.default_rng(0)
        pool = task.pool(rng)
        order = rng.permutation(len(pool.said))
        count = task.initial + task.size * (task.rounds // 2)
        seen = np.sort(order[: len(order) if task.candidates is None else count + task.candidates])
        labels = np.full(len(pool.said), -1)
        labels[order[:count]] = pool.said[order[:count]]
        x, y = pool.x[torch.from_numpy(seen)], labels[seen]
        fit = active.Training(x, task.network(pool), loss=task.loss, steps=task.steps)
        strategy, model = active.LookAhead(loss=task.loss, missing_label=-1), fit(y)
        query, trained = seconds(
            lambda: strategy.query(x, y, model, batch_size=task.size),  # noqa: B023
            lambda: fit(y),  # noqa: B023
        )
        found.append({
            "task": name, "points": len(y), "labels": count, "batch": task.size,
            "query_seconds": round(query, 4), "fit_seconds": round(trained, 4), "ratio": round(query / trained, 4),
        })  # fmt: skip
        print(found[-1], flush=True)
    record("query-time", {"lines": found}, options.folder)


if __name__ == "__main__":
    main()
