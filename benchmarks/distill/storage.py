"""What a filter's table costs at the size of ImageNet: time of an epoch, memory, and what is lost.

    python -m benchmarks.distill.storage

All of its 1.28 million examples and 1,000 classes. One epoch of updates in batches of 256 and one of reading, in CPU
seconds of one thread, logits made outside. The loss is the total variation from a float32 table after 20 updates of 256
examples whose logits drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.scale.record import peak_mb, record
from ntkit.uses import distill

N, C, BATCH = 1_280_000, 1000, 256
RESULTS = Path(__file__).parent / "records"


def storages() -> dict[str, distill.Storage]:
    """Smallest first, so that the peak of memory is that of each."""
    rounding = distill.Stochastic(torch.Generator().manual_seed(0))
    return {
        "the top 20 in float16": distill.TopK(20, torch.float16, rounding),
        "the top 100 in float16": distill.TopK(100, torch.float16, rounding),
        "all in float16": distill.Dense(torch.float16, rounding),
        "all in float32": distill.Dense(),
    }


def drifting(batch: int, steps: int) -> list[Tensor]:
    """Logits of a network that gets surer: a class grows, others scatter with a deviation of 2."""
    generator = torch.Generator().manual_seed(1)
    base, classes = 2 * torch.randn(batch, C, generator=generator), torch.arange(batch) % C
    grown = torch.nn.functional.one_hot(classes, C).float()
    scatter = (torch.randn(batch, C, generator=generator) for _ in range(steps))
    return [base + 0.5 * noise + (2 + 8 * t / steps) * grown for t, noise in enumerate(scatter)]


def measured(storage: distill.Storage) -> dict[str, Any]:
    """One epoch, and what is lost."""
    table, z = distill.EMATargets(N, C, storage=storage), drifting(BATCH, 20)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).split(BATCH)

    def written() -> None:
        for k, numbers in enumerate(order):
            table.update(numbers, z[k % len(z)])

    def read() -> None:
        for numbers in order:
            table.targets(numbers)

    update, targets = _seconds(written), _seconds(read)
    small, exact = distill.EMATargets(BATCH, C, storage=storage), distill.EMATargets(BATCH, C)
    for step in z:
        small.update(torch.arange(BATCH), step)
        exact.update(torch.arange(BATCH), step)
    away = (small.table() - exact.table()).abs().sum(1) / 2
    return {
        "update_cpu_seconds": round(update, 2), "read_cpu_seconds": round(targets, 2),
        "table_mb": round(table.memory_bytes / 1e6, 1), "peak_mb": peak_mb(),
        "total_variation": round(float(away.mean()), 5),
    }  # fmt: skip


def _seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    found = {name: measured(storage) for name, storage in storages().items()}
    record("storage", {"examples": N, "classes": C, "batch_size": BATCH, "tables": found}, RESULTS)
    print(found)


if __name__ == "__main__":
    main()
