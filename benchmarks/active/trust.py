"""Whether the look-ahead foresees what training does: digits, 100 labels, 40 networks really trained for each line.

    python -m benchmarks.active.trust

Two hidden layers of 128, Adam on all labels at once for 300 steps, with weight decay and without; points with their
true labels are drawn four times, and each draw is a line.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.active.results import RESULTS
from benchmarks.active.tasks import TASKS
from benchmarks.scale.record import record
from ntkit.uses import active

LABELS, CANDIDATES, STEPS = 100, 40, 300
DRAWS = (200, 201, 202, 203)
KERNELS = {"hidden layers": active.Hidden(), "last layer": active.LastLayer(), "sketched": active.Sketched(2048)}


class Remembered:
    """Networks that were trained before for the same labels are not trained again for another kernel."""

    def __init__(self, fit: active.Training) -> None:
        self.fit, self.seen = fit, {}

    def __call__(self, labels: np.ndarray) -> nn.Module:
        key = labels.tobytes()
        if key not in self.seen:
            self.seen[key] = self.fit(labels)
        return self.seen[key]


def main() -> None:
    torch.set_num_threads(1)
    task, found = TASKS["digits"], []
    for loss in (active.CrossEntropy(), active.SquareLoss()):
        for decay in (0.01, 0.0):
            adam = partial(torch.optim.Adam, lr=1e-3, weight_decay=decay)
            for draw in DRAWS:
                rng = np.random.default_rng(draw)
                pool = task.pool(rng)
                order = rng.permutation(len(pool.said))
                labels = np.full(len(pool.said), -1)
                labels[order[:LABELS]] = pool.said[order[:LABELS]]
                candidates = np.sort(order[LABELS : LABELS + CANDIDATES])
                fit = Remembered(
                    active.Training(
                        pool.x, task.network(pool), loss=loss, steps=STEPS, batch_size=len(labels), optimizer=adam
                    )
                )
                for name, kernel in KERNELS.items():
                    agreed = active.fidelity(
                        active.LookAhead(loss=loss, kernel=kernel, missing_label=-1), pool.x, labels, fit,
                        generator=torch.Generator(), candidates=candidates.tolist(),
                        labels=pool.said[candidates].tolist(),
                    )  # fmt: skip
                    found.append({
                        "loss": type(loss).__name__, "weight_decay": decay, "kernel": name, "draw": draw,
                        "correlation": round(agreed.correlation, 3),
                        "standard_error": round(agreed.standard_error, 3),
                        "slope": round(agreed.slope, 2), "unscaled": round(agreed.unscaled, 3),
                        "rank_correlation": round(agreed.rank_correlation, 3),
                    })  # fmt: skip
                    print(found[-1], flush=True)
    record("trust", {"labels": LABELS, "candidates": CANDIDATES, "lines": found}, RESULTS)


if __name__ == "__main__":
    main()
