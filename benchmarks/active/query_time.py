"""How long a query takes beside a fit: the default strategy in the middle of a run, one thread, nothing beside it.

    NTKIT_DATA=... python -m benchmarks.active.query_time

Medians of nine. The fit is that of the comparison (300 steps of Adam from scratch), which is short: a longer one makes
the query's part smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from benchmarks.active.results import RESULTS
from benchmarks.active.tasks import TASKS
from benchmarks.scale.record import record
from ntkit.uses import active

CASES = ("digits", "fashion", "cifar")
TIMES = 9


def seconds(task: Callable[[], object]) -> float:
    """Median time of one call."""
    task()
    taken = []
    for _ in range(TIMES):
        start = time.perf_counter()
        task()
        taken.append(time.perf_counter() - start)
    return median(taken)


def main() -> None:
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
        query = seconds(lambda: strategy.query(x, y, model, batch_size=task.size))  # noqa: B023
        trained = seconds(lambda: fit(y))  # noqa: B023
        found.append({
            "task": name, "points": len(y), "labels": count, "batch": task.size,
            "query_seconds": round(query, 4), "fit_seconds": round(trained, 4), "ratio": round(query / trained, 4),
        })  # fmt: skip
        print(found[-1], flush=True)
    record("query-time", {"lines": found}, RESULTS)


if __name__ == "__main__":
    main()
