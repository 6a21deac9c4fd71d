"""What the planner says of the large runs, beside what they took: `python -m benchmarks.scale.foretold`.

The planner takes its speeds on the machine on which this runs, and the records are of the machine that they name: times
can be compared where the two are the same and nothing else is running. Bytes are arithmetic on both sides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ntkit
from benchmarks.scale.table import found
from benchmarks.workloads import WORKLOADS
from ntkit.kernel.forecast import human_time
from ntkit.kernel.plan import human_bytes
from ntkit.solve.outlook import Outlook, outlook
from ntkit.solve.pace import Pace, measure_pace
from ntkit.solve.ways import Way

# The budget of `exact_pntk`, and examples on which speeds are measured.
MEMORY, MEASURED = int(3.8e9), 256


@dataclass(frozen=True)
class Pair:
    """One number, as the planner tells it and as it was.

    Attributes:
        what: of which run.
        kind: "seconds", or "bytes" of memory or disk.
        told: by the planner.
        taken: in the record.
    """

    what: str
    kind: str
    told: float
    taken: float

    def __str__(self) -> str:
        """One line."""
        human = human_time if self.kind == "seconds" else human_bytes
        return f"{self.what:<58}{human(self.told):>10}{human(self.taken):>10}{self.told / self.taken:>8.2f}"


def kernel(*, trace: bool = False, full: bool = False, examples: int = MEASURED) -> ntkit.TangentKernel:
    """The network of the large runs; its times do not depend on what is on the images."""
    workload = WORKLOADS["W2"]
    readout = ntkit.Logits() if full else ntkit.SumOfLogits()
    tangent = ntkit.linearize(workload.model(), readout=readout)
    return ntkit.TangentKernel(tangent, workload.data(examples), trace=trace, memory=MEMORY)


def one(ways: tuple[Way, ...], *words: str) -> Way:
    """The way whose name has all these words."""
    (way,) = [way for way in ways if all(word in way.name for word in words)]
    return way


def record(name: str) -> dict[str, Any]:
    """One record.

    Raises:
        SystemExit: if it is not there.
    """
    facts = found(name)
    if facts is None:
        raise SystemExit(f"there is no record {name}")
    return facts


def pntk(pace: Pace | None, few: ntkit.TangentKernel) -> Iterator[Pair]:
    """The exact pNTK on disk, its solve, and the features."""
    for n in (20_000, 50_000):
        told: Outlook = outlook(few, examples=n, targets=10, memory=24 * 10**9, pace=pace)
        exact, solve = record(f"exact-pntk-{n}"), record(f"solve-pntk-{n}")
        way, factor = one(told.kernel, "exact, on disk"), one(told.regression, "float32")
        yield Pair(f"exact pNTK of {n:,} on disk", "seconds", way.seconds, exact["seconds"])
        yield Pair("- disk", "bytes", way.disk, exact["disk_bytes"])
        yield Pair("- memory, at most", "bytes", way.memory, exact["peak_mb"] * 2**20)
        taken = solve["seconds_read_and_factor"] + solve["seconds_solve"]
        yield Pair("- ridge regression in place, float32", "seconds", factor.seconds, taken)
        yield Pair("  memory", "bytes", told.job.factor_memory(4), solve["peak_mb"] * 2**20)
    run = record("sketched-cifar10")
    steps, told = run["steps_seconds"], outlook(few, examples=run["train"], targets=10, pace=pace)
    way, ridge = one(told.kernel, "features, on disk"), one(told.regression, "ridge on 4,096")
    yield Pair("4,096 features of the pNTK of 50,000", "seconds", way.seconds, steps["built: pntk features, train"])
    yield Pair("- ridge regression on them", "seconds", ridge.seconds, steps["built: pntk regression"])
    share = run["train"] / (run["train"] + run["test"])  # of the features on disk, which are of four kernels
    yield Pair("- disk", "bytes", way.disk, run["disk_bytes"] / 4 * share)


def without(pace: Pace | None, few: ntkit.TangentKernel) -> Iterator[Pair]:
    """Conjugate gradients without the matrix; the number of iterations is taken from the record."""
    run = record("full-entk-4000")
    told = outlook(few, examples=run["n"], iterations=run["iterations"], pace=pace)
    way = one(told.regression, "conjugate gradients, helped by the trace kernel")
    steps = run["steps_seconds"]
    taken = sum(steps[name] for name in ("sketch of the full kernel", "preconditioner", "conjugate gradients"))
    yield Pair(f"full kernel of {run['rows']:,} rows, {run['iterations']} products", "seconds", way.seconds, taken)


def main() -> None:
    print(f"{'':<58}{'told':>10}{'taken':>10}{'ratio':>8}")
    for tell, few in ((pntk, kernel()), (without, kernel(full=True, examples=64))):
        for pair in tell(measure_pace(few, size=4096), few):
            print(pair)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
