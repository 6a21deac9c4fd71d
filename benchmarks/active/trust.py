"""Whether the look-ahead foresees what training does: digits, 100 labels, 40 networks really trained for each line.

    python -m benchmarks.active.trust

Two hidden layers of 128, Adam on all labels at once for 300 steps, with weight decay and without; points
and their true labels drawn once.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from benchmarks.active.results import RESULTS
from benchmarks.active.tasks import TASKS
from benchmarks.scale.record import record
from ntkit.uses import active

LABELS, CANDIDATES, STEPS = 100, 40, 300
KERNELS = {"hidden layers": active.Hidden(), "last layer": active.LastLayer(), "sketched": active.Sketched(2048)}


def main() -> None:
    torch.set_num_threads(1)
    task, rng = TASKS["digits"], np.random.default_rng(200)
    pool = task.pool(rng)
    order = rng.permutation(len(pool.said))
    labels = np.full(len(pool.said), -1)
    labels[order[:LABELS]] = pool.said[order[:LABELS]]
    candidates = np.sort(order[LABELS : LABELS + CANDIDATES])
    found = []
    for loss in (active.CrossEntropy(), active.SquareLoss()):
        for decay in (0.01, 0.0):
            adam = partial(torch.optim.Adam, lr=1e-3, weight_decay=decay)
            fit = active.Training(
                pool.x, task.network(pool), loss=loss, steps=STEPS, batch_size=len(labels), optimizer=adam
            )
            for name, kernel in KERNELS.items():
                strategy = active.LookAhead(loss=loss, kernel=kernel, missing_label=-1)
                agreed = active.fidelity(
                    strategy, pool.x, labels, fit, generator=torch.Generator(), candidates=candidates.tolist(),
                    labels=pool.said[candidates].tolist(),
                )  # fmt: skip
                found.append({
                    "loss": type(loss).__name__, "weight_decay": decay, "kernel": name,
                    "correlation": round(agreed.correlation, 3), "standard_error": round(agreed.standard_error, 3),
                    "slope": round(agreed.slope, 2), "rank_correlation": round(agreed.rank_correlation, 3),
                })  # fmt: skip
                print(found[-1], flush=True)
    record("trust", {"labels": LABELS, "candidates": CANDIDATES, "lines": found}, RESULTS)


if __name__ == "__main__":
    main()
