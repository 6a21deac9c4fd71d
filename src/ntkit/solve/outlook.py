"""Every way to a kernel, to a regression with it and to its spectrum: time, memory, disk, what fits, and advice.

Times come from speeds that are measured on a few examples of the user's own; nothing large is computed. How many
iterations a solve takes nobody knows before: that number is assumed, and can be given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ntkit.errors import InputError
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.forecast import forecast, human_time
from ntkit.kernel.memory import checked_memory, default_memory
from ntkit.kernel.plan import human_bytes
from ntkit.kernel.saved import layout_of
from ntkit.kernel.store import DTYPES
from ntkit.solve.pace import Pace, measure_pace
from ntkit.solve.ways import BESIDE, HEAD, ITERATIONS, PLAIN, Job, Way, regressions, spectra, traces
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, Loss, RandomLogits, SingleLogit, SumOfLogits

# Working space that no way does without.
LEAST = 64 * 2**20
# An exact way that ends within a night is advised even where an approximate one is there sooner.
NIGHT = 12 * 3600.0


@dataclass(frozen=True)
class Outlook:
    """What is possible for a kernel of so many examples on a machine.

    Attributes:
        job: what was asked, of which machine.
        named: the kernel in words.
        kernel: ways to the kernel, exact ones first.
        regression: ways to a ridge regression, exact ones first.
        spectrum: ways to its spectrum.
        trace: ways to its trace.
    """

    job: Job
    named: str
    kernel: tuple[Way, ...]
    regression: tuple[Way, ...]
    spectrum: tuple[Way, ...]
    trace: tuple[Way, ...]

    def advice(self) -> list[str]:
        """Which way to go for each purpose, and why, in words."""
        return [
            f"the kernel: {advised(self.kernel)}",
            f"a regression: {advised(self.regression)}",
            f"the spectrum: {advised(self.spectrum)}",
        ]

    def __str__(self) -> str:
        """A table for people."""
        job = self.job
        pace, shape = job.pace, f"{job.rows:,} x {job.rows:,}"
        crowd = f"{job.workers} workers of {pace.threads} threads" if job.workers > 1 else f"{pace.threads} threads"
        disk = "any disk" if job.disk is None else f"{human_bytes(job.disk)} of disk"
        sides = "1 right-hand side" if job.targets == 1 else f"{job.targets} right-hand sides"
        return "\n".join(
            [
                f"{self.named} of {shape}, {human_bytes(job.memory)} of memory, {disk}, {crowd} (speeds measured now: "
                f"{pace.tiles.capture * 1e3:.3g} ms an example, {pace.tiles.pair * 1e6:.3g} us a pair of examples)",
                HEAD,
                *map(str, self.kernel),
                f"then, a ridge regression with {sides}; iterations are assumed: {job.iterations:,}, and "
                f"{PLAIN * job.iterations:,} plain",
                *map(str, self.regression),
                "or its spectrum",
                *map(str, (*self.spectrum, *self.trace)),
                "Advice",
                *(f"- {line}" for line in self.advice()),
            ]
        )


def advised(ways: Sequence[Way]) -> str:
    """The fastest exact way that fits; or an approximate one, if there is none that ends within a night. With reasons.

    Times are those with what has to be there first.
    """
    possible = sorted((way for way in ways if not way.trouble), key=lambda way: way.total)
    exact, rough = ([way for way in possible if way.approximate is kind] for kind in (False, True))
    if not possible:
        least = min((way for way in ways if math.isfinite(way.total)), key=lambda way: way.memory)
        room = f" and {human_bytes(least.disk)} of disk" if least.disk else ""
        return f"no way fits; {least.name}, which takes the least memory, needs {human_bytes(least.memory)}{room}"
    if exact and (exact[0].total <= NIGHT or not rough):
        best, why = exact[0], "the fastest exact way that fits"
        if rough and rough[0].total < best.total:
            why += f"; {rough[0].name}: {human_time(rough[0].total)}, but approximate"
    else:
        best = rough[0]
        instead = (
            f"the fastest exact way that fits, {exact[0].name}, takes {human_time(exact[0].total)}" if exact else ""
        )
        why = f"approximate; {instead or 'no exact way fits'}"
    faster = [way for way in ways if way.trouble and not way.approximate and way.total < best.total]
    if faster:
        first = min(faster, key=lambda way: way.total)
        why += f"; {first.name} would be there in {human_time(first.total)}, but takes {first.trouble}"
    return f"{best.name}, {human_time(best.total)} in all ({why})"


def outlook(
    kernel: TangentKernel,
    *,
    examples: int | None = None,
    size: int = 4096,
    targets: int | None = None,
    iterations: int = ITERATIONS,
    memory: int | None = None,
    disk: int | None = None,
    workers: int = 1,
    pace: Pace | None = None,
) -> Outlook:
    """Every way to this kernel, to a ridge regression with it, and to its spectrum.

    Args:
        kernel: symmetric; its budget is the working space.
        examples: N, for as many examples like these; those of the kernel by default.
        size: features D of the sketched ways.
        targets: right-hand sides; by default 1 for the full kernel, whose rows are all outputs, C for a reduced one.
        iterations: of a solve with a preconditioner; without it seven times as many are assumed.
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
    targets = right_hand_sides(kernel) if targets is None else targets
    if min(n, workers, size, targets, iterations) < 1 or (disk is not None and disk < 1):
        raise InputError(
            f"expected positive numbers: got examples={n!r}, workers={workers!r}, size={size!r}, targets={targets!r}, "
            f"iterations={iterations!r}, disk={disk!r}"
        )
    limit = 6 * default_memory() if memory is None else checked_memory(memory)
    pace = pace or measure_pace(kernel, size=size, workers=workers)
    itemsize = torch.empty(0, dtype=kernel.dtype).element_size()
    job = Job(
        examples=n,
        scalars=kernel.scalars,
        targets=targets,
        size=size,
        parameters=kernel.tangent.count,
        itemsize=itemsize,
        iterations=iterations,
        trace=kernel.trace,
        pace=pace,
        memory=limit,
        disk=disk,
        workers=workers,
    )
    exact, sketched = _exact(kernel, job), job.features(job.rows)
    return Outlook(
        job=job,
        named=named(kernel),
        kernel=(*exact, *sketched),
        regression=regressions(job, exact, sketched),
        spectrum=spectra(job, exact, sketched),
        trace=traces(job),
    )


def _exact(kernel: TangentKernel, job: Job) -> tuple[Way, Way]:
    """The exact kernel in memory and on disk."""
    # working space beside what the processes are themselves
    budget = min(kernel.memory, max(job.memory - BESIDE * job.workers, LEAST))
    smaller = TangentKernel(kernel.tangent, kernel.rows, trace=kernel.trace, memory=budget)
    plan, dtype = smaller.plan(job.examples), str(kernel.dtype).removeprefix("torch.")
    inside = plan.captures * job.pace.alone.capture + job.examples**2 / 2 * job.pace.alone.pair
    stored = dtype if dtype in DTYPES else "float32"
    layout = layout_of(smaller, stored, budget // job.workers, (job.rows, job.rows))
    saved = forecast(layout, job.scalars, job.pace.tiles, memory=budget, workers=job.workers)
    return (
        job.way("exact, in memory", inside, plan.bytes, held=plan.result),
        job.way("exact, on disk", saved.seconds / job.workers, budget + BESIDE * job.workers, saved.disk),
    )


def named(kernel: TangentKernel) -> str:
    """Which kernel it is, in words."""
    readout = kernel.tangent.readout
    if isinstance(readout, SumOfLogits):
        return "pNTK"
    if isinstance(readout, SingleLogit):
        return "kernel of one logit"
    if isinstance(readout, Loss):
        return "kernel of the loss"
    drawn = " (of random directions)" if isinstance(readout, RandomLogits) else ""
    return f"{'trace' if kernel.trace else 'full'} kernel{drawn}"


def right_hand_sides(kernel: TangentKernel) -> int:
    """C where one row of an example stands for its C outputs, else 1. Cost: a forward pass of two examples."""
    readout = kernel.tangent.readout
    if kernel.scalars > 1 or isinstance(readout, (SingleLogit, Loss)):
        return 1
    few = kernel.rows.pick(range(min(2, len(kernel.rows))))
    try:
        return linearize(kernel.tangent.model, readout=Logits(getattr(readout, "select", None))).outputs(few).shape[1]
    except InputError:  # a read-out of the user's own: who knows what its outputs are
        return 1
