"""Every way to a kernel and to a regression with it: time, memory, disk, and which fits a machine.

Times come from speeds that are measured on a few examples of the user's own; nothing large is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ntkit.errors import InputError, ModelError
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.features import FeatureMap
from ntkit.kernel.forecast import Speeds, forecast, human_time, measure
from ntkit.kernel.matrixfree import MatrixFreeKernel
from ntkit.kernel.memory import checked_memory, default_memory
from ntkit.kernel.plan import human_bytes
from ntkit.kernel.saved import layout_of
from ntkit.kernel.store import DTYPES
from ntkit.tangent.sketch import Sketch

# Examples on which features and products are timed, and rows of the matrix on which Cholesky is.
SAMPLE, FACTORED = 64, 3072
# Bytes of a library, a batch and its scratch, beside what is said.
BESIDE = 512 * 2**20
# Working space that no way does without.
LEAST = 64 * 2**20


@dataclass(frozen=True)
class Pace:
    """Speeds measured on this machine with the threads that one worker has.

    Attributes:
        tiles: of derivatives and their contraction.
        alone: the same with all threads.
        sketch: seconds for the features of one example.
        product: seconds for one example's share of a product without the matrix; NaN where there is none.
        cholesky: FLOP/s of factoring a float32 matrix, all threads.
        threads: of one worker.
    """

    tiles: Speeds
    alone: Speeds
    sketch: float
    product: float
    cholesky: float
    threads: int


@dataclass(frozen=True)
class Way:
    """One way to the answer.

    Attributes:
        name: in words.
        seconds: of all workers together as they work side by side; of one iteration for an iterative way; NaN if the
            way cannot be gone.
        memory: bytes of working space.
        disk: bytes on disk.
        trouble: why it cannot be gone here; empty if it can.
        note: what else is to be known.
    """

    name: str
    seconds: float
    memory: int
    disk: int
    trouble: str
    note: str = ""

    def __str__(self) -> str:
        """One line of a table."""
        disk = human_bytes(self.disk) if self.disk else "-"
        taken = human_time(self.seconds) if math.isfinite(self.seconds) else "-"
        more = "; ".join(part for part in (self.trouble, self.note) if part)
        return f"{self.name:<34}{taken:>9}{human_bytes(self.memory):>10}{disk:>10}  {more}".rstrip()


@dataclass(frozen=True)
class Outlook:
    """What is possible for a kernel of so many examples on a machine.

    Attributes:
        examples: N.
        scalars: rows per example.
        kernel: ways to the kernel, exact ones first.
        regression: ways to a ridge regression, exact ones first.
        pace: the measured speeds.
        memory: bytes that may be taken in all.
        disk: bytes that may be written, None for any number.
        workers: processes.
    """

    examples: int
    scalars: int
    kernel: tuple[Way, ...]
    regression: tuple[Way, ...]
    pace: Pace
    memory: int
    disk: int | None
    workers: int

    def advice(self) -> str:
        """The first way of each kind that fits, in words."""
        found = []
        for kind, ways in (("the kernel", self.kernel), ("a regression", self.regression)):
            fitting = [way for way in ways if not way.trouble]
            found.append(f"{kind}: {fitting[0].name}" if fitting else f"{kind}: no way fits")
        return "; ".join(found)

    def __str__(self) -> str:
        """A table for people."""
        rows, pace = self.examples * self.scalars, self.pace
        shape = f"{rows:,} x {rows:,}"
        crowd = f"{self.workers} workers of {pace.threads} threads" if self.workers > 1 else f"{pace.threads} threads"
        disk = "any disk" if self.disk is None else f"{human_bytes(self.disk)} of disk"
        head = f"{'':<34}{'time':>9}{'memory':>10}{'disk':>10}"
        return "\n".join(
            [
                f"kernel of {shape}, {human_bytes(self.memory)} of memory, {disk}, {crowd} (speeds measured now: "
                f"{pace.tiles.capture * 1e3:.3g} ms an example, {pace.tiles.pair * 1e6:.3g} us a pair of examples)",
                head,
                *map(str, self.kernel),
                "then, a ridge regression:",
                *map(str, self.regression),
                f"Advice: {self.advice()}",
            ]
        )


def measure_pace(kernel: TangentKernel, *, size: int, workers: int = 1) -> Pace:
    """Take the times. Cost: some seconds, more for slow networks.

    Args:
        kernel: of the examples on which they are taken.
        size: features D.
        workers: processes that will share this machine's threads.
    """
    before = torch.get_num_threads()
    tangent, x = kernel.tangent, kernel.rows
    few = min(SAMPLE, len(x))
    cholesky = _cholesky_speed(kernel.device)
    layout, made = layout_of(kernel, "float32", kernel.memory), FeatureMap(tangent, Sketch(size, 0, kernel.trace))
    tiles = alone = measure(kernel, layout)
    try:
        torch.set_num_threads(max(1, before // workers))
        if workers > 1:
            tiles = measure(kernel, layout)
        sketch = _seconds(lambda: [made.block(x, a, b) for a, b in made.batches(x, 0, few)], kernel.device) / few
    finally:
        torch.set_num_threads(before)
    some = MatrixFreeKernel(tangent, x.pick(range(few)))
    vector = torch.ones(some.shape[1], dtype=kernel.dtype, device=kernel.device)
    try:
        product = math.nan if kernel.trace else _seconds(lambda: some @ vector, kernel.device) / few
    except ModelError:  # it can be differentiated only once
        product = math.nan
    return Pace(tiles, alone, sketch, product, cholesky, max(1, before // workers))


def outlook(
    kernel: TangentKernel,
    *,
    examples: int | None = None,
    size: int = 4096,
    memory: int | None = None,
    disk: int | None = None,
    workers: int = 1,
    pace: Pace | None = None,
) -> Outlook:
    """Every way to this kernel and to a ridge regression with it.

    Args:
        kernel: symmetric; its budget is the working space.
        examples: N, for as many examples like these; those of the kernel by default.
        size: features D of the sketched ways.
        memory: bytes that may be taken in all, the matrix included; three quarters of this machine's by default.
        disk: bytes that may be written; any number by default.
        workers: processes on this machine, or machines like this one if `pace` was measured for one worker.
        pace: speeds measured before, so that several sizes are told from the same ones.

    Raises:
        InputError: if the kernel is not symmetric, or a number is not positive.
    """
    if not kernel.symmetric:
        raise InputError("an outlook is for the kernel of training examples: leave the columns out")
    n = len(kernel.rows) if examples is None else examples
    if n < 1 or workers < 1 or size < 1 or (disk is not None and disk < 1):
        raise InputError(
            f"expected positive numbers: got examples={n!r}, workers={workers!r}, size={size!r}, disk={disk!r}"
        )
    limit = 6 * default_memory() if memory is None else checked_memory(memory)
    pace = pace or measure_pace(kernel, size=size, workers=workers)
    k, itemsize = kernel.scalars, torch.empty(0, dtype=kernel.dtype).element_size()
    rows = n * k

    def way(name: str, seconds: float, memory: int, room: int = 0, note: str = "") -> Way:
        troubles = ["too much memory"] * (memory > limit) + ["too much disk"] * (disk is not None and room > disk)
        return Way(name, seconds, memory, room, ", ".join(troubles), note)

    # working space beside what the processes are themselves
    budget = min(kernel.memory, max(limit - BESIDE * workers, LEAST))
    smaller = TangentKernel(kernel.tangent, kernel.rows, trace=kernel.trace, memory=budget)
    plan, dtype = smaller.plan(n), str(kernel.dtype).removeprefix("torch.")
    inside = plan.captures * pace.alone.capture + n * n / 2 * pace.alone.pair
    layout = layout_of(smaller, dtype if dtype in DTYPES else "float32", budget // workers, (rows, rows))
    saved = forecast(layout, k, pace.tiles, tiles=layout.tiles(), memory=budget, workers=workers)
    sketched = rows * size * itemsize
    kept = 3 * 8 * size**2 + BESIDE
    in_place = rows**3 / 3 / pace.cholesky
    by_features = (2 * rows * size**2 + 9 * size**3) / pace.cholesky * 2  # in float64
    iteration = way(
        "conjugate gradients, no matrix", n * pace.product, BESIDE + 6 * 8 * rows, 0, "an iteration; full kernel, exact"
    )
    if math.isnan(pace.product):
        reason = "not for the trace kernel" if kernel.trace else "the model can be differentiated only once"
        iteration = Way(iteration.name, math.nan, iteration.memory, 0, reason)
    return Outlook(
        examples=n,
        scalars=k,
        kernel=(
            way("exact, in memory", inside, plan.bytes),
            way("exact, on disk", saved.seconds / workers, budget + BESIDE * workers, saved.disk),
            way(
                f"{size:,} sketched features, on disk", n * pace.sketch / workers, BESIDE * workers, sketched,
                "approximate",
            ),
        ),
        regression=(
            way("Cholesky in place, float32", in_place, 4 * rows**2 + BESIDE),
            iteration,
            way(f"on {size:,} features", by_features, kept, 0, "approximate"),
        ),
        pace=pace, memory=limit, disk=disk, workers=workers,
    )  # fmt: skip


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of the second call: the first one learns about the model."""
    call()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cholesky_speed(device: torch.device) -> float:
    matrix = torch.eye(FACTORED, device=device)
    return FACTORED**3 / 3 / _seconds(lambda: torch.linalg.cholesky(matrix), device)
