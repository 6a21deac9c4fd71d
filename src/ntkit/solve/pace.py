"""How fast this machine is with this network: the speeds that an outlook is told from, measured on a few examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ntkit.errors import ModelError
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.features import FeatureMap
from ntkit.kernel.forecast import Speeds, measure, one_of
from ntkit.kernel.matrixfree import MatrixFreeKernel
from ntkit.kernel.saved import layout_of
from ntkit.tangent.sketch import Sketch

# Examples on which features and products are timed, and rows of the matrix on which Cholesky is.
SAMPLE, FACTORED = 64, 3072


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
        traced: `alone`, of the trace kernel of a full one; None where the kernel is a reduced one itself.
    """

    tiles: Speeds
    alone: Speeds
    sketch: float
    product: float
    cholesky: float
    threads: int
    traced: Speeds | None = None


def measure_pace(kernel: TangentKernel, *, size: int, workers: int = 1) -> Pace:
    """Take the times. Cost: some seconds, more for slow networks.

    Args:
        kernel: of the examples on which they are taken.
        size: features D.
        workers: processes that will share this machine's threads.
    """
    tangent, x = kernel.tangent, kernel.rows
    few = min(SAMPLE, len(x))
    cholesky = _cholesky_speed(kernel.device)
    layout, made = layout_of(kernel, "float32", kernel.memory), FeatureMap(tangent, Sketch(size, 0, kernel.trace))
    tiles = alone = measure(kernel, layout)
    if workers > 1:
        tiles = measure(kernel, layout, workers=workers)
    with one_of(workers, kernel.device) as longer:
        threads = torch.get_num_threads()
        sketch = _seconds(lambda: [made.block(x, a, b) for a, b in made.batches(x, 0, few)], kernel.device) / few
    some = MatrixFreeKernel(tangent, x.pick(range(few)))
    vector = torch.ones(some.shape[1], dtype=kernel.dtype, device=kernel.device)
    try:
        product = math.nan if kernel.trace else _seconds(lambda: some @ vector, kernel.device) / few
    except ModelError:  # it can be differentiated only once
        product = math.nan
    traced = None
    if kernel.scalars > 1:
        reduced = TangentKernel(tangent, x, trace=True, memory=kernel.memory)
        traced = measure(reduced, layout_of(reduced, "float32", kernel.memory))
    return Pace(tiles, alone, longer * sketch, product, cholesky, threads, traced)


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
