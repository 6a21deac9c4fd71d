"""What a kernel on disk will take, from speeds measured on a few examples: time, bytes, and how it would be cut."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ntkit.kernel.plan import human_bytes
from ntkit.kernel.tasks import with_threads

if TYPE_CHECKING:
    from ntkit.kernel.empirical import TangentKernel
    from ntkit.kernel.store import Layout

# Examples that are captured and contracted to measure the speeds.
SAMPLE = 256


@dataclass(frozen=True)
class Speeds:
    """Measured on one process.

    Attributes:
        capture: seconds for the derivatives of one example.
        pair: seconds for the K x K entries of one pair of examples.
        device: where.
    """

    capture: float
    pair: float
    device: str


@dataclass(frozen=True)
class Forecast:
    """What computing and storing a matrix will take.

    Attributes:
        layout: how it is cut.
        tiles: still to be computed.
        captures: examples captured, repetitions included.
        pairs: pairs of examples contracted.
        seconds: of one worker alone; divide by how many there are.
        workers: how many at the same time.
        disk: bytes of the finished matrix.
        memory: bytes of working space of all workers together.
    """

    layout: Layout
    tiles: int
    captures: int
    pairs: int
    seconds: float
    workers: int
    disk: int
    memory: int

    def __str__(self) -> str:
        """A few lines for people."""
        layout, total = self.layout, self.layout.count
        shape, edge = (f"{rows:,} x {cols:,}" for rows, cols in (layout.shape, layout.edge))
        half = ", one half" if layout.symmetric else ""
        there = f" ({total - self.tiles} are there)" if self.tiles < total else ""
        crowd = f" on {self.workers} workers" if self.workers > 1 else ""
        return "\n".join(
            [
                f"{shape} {layout.dtype} in {self.tiles} tiles of {edge}{half}{there}: about "
                f"{human_time(self.seconds / self.workers)}{crowd}, {human_bytes(self.disk)} on disk, "
                f"{human_bytes(self.memory)} of working space",
                f"- {self.captures:,} forward and backward passes of one example, {self.pairs:,} pairs of examples",
            ]
        )


@contextmanager
def one_of(workers: int, device: torch.device) -> Iterator[float]:
    """As one of so many processes that share this machine: with its part of the threads.

    Gives how many times longer everything takes where there are more processes than processors, or GPUs.
    """
    processors = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    with with_threads(max(1, torch.get_num_threads() // workers)):
        yield max(1.0, workers / processors)


def measure(kernel: TangentKernel, layout: Layout, *, workers: int = 1) -> Speeds:
    """Compute a small corner as a stripe would, and take the time of its two halves. Cost: some seconds.

    Args:
        kernel: of examples of which some are taken.
        layout: how the matrix is cut.
        workers: processes that will share this machine; the speeds are those of one of them.
    """
    with one_of(workers, kernel.device) as longer:
        capture, pair = _speeds(kernel, layout)
    return Speeds(capture * longer, pair * longer, str(kernel.device))


def _speeds(kernel: TangentKernel, layout: Layout) -> tuple[float, float]:
    """Seconds of one capture and of one pair."""
    n = min(
        SAMPLE, layout.edge[0] // kernel.scalars, kernel.shape[0] // kernel.scalars, kernel.shape[1] // kernel.scalars
    )
    rows = slice(0, n * kernel.scalars)
    apart = kernel.apart()

    def seconds(times: int) -> float:
        start = time.perf_counter()
        # the same examples as other columns: captured and contracted again, not only mirrored
        for _ in apart.stripe(rows, [rows] * times):
            pass
        if kernel.device.type == "cuda":
            torch.cuda.synchronize(kernel.device)
        return time.perf_counter() - start

    seconds(1)
    one, three = seconds(1), seconds(3)
    column = max((three - one) / 2, 1e-9)
    capture = max(one - column, 0.1 * one) / n
    return capture, max(column - capture * n, 0.02 * column) / n**2


def forecast(
    layout: Layout,
    scalars: int,
    speeds: Speeds,
    *,
    tiles: list[tuple[int, int]] | None = None,
    memory: int,
    workers: int = 1,
) -> Forecast:
    """What these tiles of a matrix will take. Each row of tiles captures its examples once.

    Args:
        layout: how the matrix is cut.
        scalars: rows per example, K.
        speeds: of one worker.
        tiles: those to be computed; all of them by default, which are then counted row by row.
        memory: bytes of working space in all.
        workers: processes that share the work.
    """
    captures, pairs = _whole(layout, scalars) if tiles is None else _some(layout, scalars, tiles)
    count = layout.count if tiles is None else len(tiles)
    seconds = captures * speeds.capture + pairs * speeds.pair
    return Forecast(layout, count, captures, pairs, seconds, workers, layout.nbytes, memory)


def _some(layout: Layout, scalars: int, tiles: list[tuple[int, int]]) -> tuple[int, int]:
    """Captures and pairs of some tiles."""
    captures = pairs = 0
    for row in {i for i, _ in tiles}:
        rows = layout.slices((row, row if layout.symmetric else 0))[0]
        captures += (rows.stop - rows.start) // scalars
    for tile in tiles:
        rows, cols = layout.slices(tile)
        n, m = (rows.stop - rows.start) // scalars, (cols.stop - cols.start) // scalars
        own = layout.symmetric and tile[0] == tile[1]
        captures += 0 if own else m
        pairs += n * m // 2 if own else n * m
    return captures, pairs


def _whole(layout: Layout, scalars: int) -> tuple[int, int]:
    """Captures and pairs of all tiles, of which there may be millions."""
    captures = pairs = 0
    for row in range(layout.grid[0]):
        rows = layout.slices((row, row))[0]
        n = (rows.stop - rows.start) // scalars
        others = (layout.shape[1] - (rows.stop if layout.symmetric else 0)) // scalars
        captures += n + others
        pairs += n * others + (n * n // 2 if layout.symmetric else 0)
    return captures, pairs


def human_time(seconds: float) -> str:
    """45 s, 12 min, 3.5 h, 12 days."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"
