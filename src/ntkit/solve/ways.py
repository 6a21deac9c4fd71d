"""The arithmetic of an outlook: what each way to a regression or a spectrum takes, from measured speeds.

What is not measured is assumed, and said: how many iterations a solve takes, how fast a disk is read, and how long
an entry of a matrix takes that is only passed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ntkit.kernel.forecast import human_time
from ntkit.kernel.plan import human_bytes
from ntkit.solve.pace import Pace

# Bytes of a library, a batch and its scratch, beside what is said.
BESIDE = 512 * 2**20
# Iterations that a helped solve is assumed to take, and how many times as many without help. To a residual of 1e-6 with
# the ridge 1e-4 small networks took some 50 to 450, and 500 to 3,500 without help (`docs/scale.md`).
ITERATIONS, PLAIN = 200, 7
# Refinements in float64 of a solve with a factor in float32, or in float64.
REFINED = {4: 10, 8: 2}
# Seconds for an entry of a matrix that is read, multiplied and solved with, once (two CPU cores: 4.8 ns); bytes that a
# disk gives in a second.
TOUCH, READ = 5e-9, 5e8
# Rows of the strips in which a matrix in memory is passed over, and their bytes an entry: in its type and in float64.
STRIP, STRIPPED = 1024, 12
# Lanczos: steps, vectors that share them, and products for a basis; Hutch++: products.
STEPS, VECTORS, BASIS, HUTCH = 50, 16, 8, 60
WIDTH = 62


@dataclass(frozen=True)
class Way:
    """One way to the answer.

    Attributes:
        name: in words.
        seconds: of all workers together as they work side by side; NaN if the way cannot be gone.
        memory: bytes of working space.
        disk: bytes on disk.
        trouble: why it cannot be gone here; empty if it can.
        note: what else is to be known.
        before: seconds for what has to be there first, the kernel or its features.
        held: bytes of memory that the result takes for whoever uses it.
        approximate: whether the answer is that of another kernel, or has a random error.
    """

    name: str
    seconds: float
    memory: int
    disk: int = 0
    trouble: str = ""
    note: str = ""
    before: float = 0.0
    held: int = 0
    approximate: bool = False

    @property
    def total(self) -> float:
        """Seconds with what has to be there first."""
        return self.before + self.seconds

    def __str__(self) -> str:
        """One line of a table."""
        disk = human_bytes(self.disk) if self.disk else "-"
        times = [human_time(value) if math.isfinite(value) else "-" for value in (self.seconds, self.total)]
        kind = "approximate" if self.approximate else ""
        more = "; ".join(part for part in (self.trouble, kind, self.note) if part)
        columns = "".join(f"{cell:>10}" for cell in (*times, human_bytes(self.memory), disk))
        return f"{self.name:<{WIDTH}}{columns}  {more}".rstrip()


HEAD = f"{'':<{WIDTH}}" + "".join(f"{name:>10}" for name in ("time", "in all", "memory", "disk"))


@dataclass(frozen=True)
class Job:
    """What is asked of which machine.

    Attributes:
        examples: N.
        scalars: rows per example.
        targets: right-hand sides R.
        size: features D.
        parameters: P.
        itemsize: bytes of a number.
        iterations: of a solve that is helped.
        trace: whether the kernel is a trace kernel.
        pace: measured speeds.
        memory: bytes that may be taken in all.
        disk: bytes that may be written, None for any number.
        workers: processes.
    """

    examples: int
    scalars: int
    targets: int
    size: int
    parameters: int
    itemsize: int
    iterations: int
    trace: bool
    pace: Pace
    memory: int
    disk: int | None
    workers: int

    @property
    def rows(self) -> int:
        """Of the kernel."""
        return self.examples * self.scalars

    def way(
        self, name: str, seconds: float, memory: int, disk: int = 0, *, needs: Sequence[Way] = (), note: str = "",
        held: int = 0, approximate: bool = False,
    ) -> Way:  # fmt: skip
        """A way with its troubles; after whichever of `needs` lets it fit and is there first."""
        nothing = Way("", 0.0, 0)
        found = []
        for first in needs or (nothing,):
            most, room = max(first.memory, memory + first.held), disk + first.disk
            troubles = ["too much memory"] * (most > self.memory)
            troubles += ["too much disk"] * (self.disk is not None and room > self.disk)
            found.append(Way(name, seconds, most, room, ", ".join(troubles), note, first.total, held, approximate))
        return min(found, key=lambda way: (bool(way.trouble), way.total))

    def features(self, rows: int) -> tuple[Way, Way]:
        """Sketched features of so many rows, in memory and on disk."""
        taken, seconds = rows * self.size * self.itemsize, self.examples * self.pace.sketch
        name = f"{self.size:,} sketched features"
        return (
            self.way(f"{name}, in memory", seconds, BESIDE + taken, held=taken, approximate=True),
            self.way(f"{name}, on disk", seconds / self.workers, BESIDE * self.workers, taken, approximate=True),
        )

    @property
    def double(self) -> float:
        """FLOP/s in float64: half of those in float32."""
        return self.pace.cholesky / 2

    def factor_memory(self, itemsize: int) -> int:
        """Bytes of a matrix that is factored in place, with a strip of it in float64 and vectors."""
        return itemsize * self.rows**2 + STRIPPED * STRIP * self.rows + 64 * self.rows * self.targets + BESIDE

    def passing(self) -> float:
        """Seconds of one product with a matrix on disk, of which one half is there."""
        return self.rows**2 / 2 * (self.itemsize / READ + TOUCH)

    def without(self) -> str:
        """Why there are no products without the matrix; empty if there are."""
        if not math.isnan(self.pace.product):
            return ""
        return "not for the trace kernel" if self.trace else "the model can be differentiated only once"


def regressions(job: Job, exact: Sequence[Way], sketched: Sequence[Way]) -> tuple[Way, ...]:
    """Every way to a ridge regression.

    Args:
        job: what is asked.
        exact: ways to the kernel, in memory and on disk.
        sketched: ways to its features.
    """
    rows, found = job.rows, []
    for itemsize, name, speed in (
        (8, "Cholesky in place, float64", job.double),
        (4, "Cholesky in place, float32, refined", job.pace.cholesky),
    ):
        seconds = rows**3 / 3 / speed + REFINED[itemsize] * rows**2 * TOUCH
        found.append(job.way(name, seconds, job.factor_memory(itemsize), needs=exact))
    return (*found, *_iterative(job, exact[-1]), _primal(job, sketched))


def _primal(job: Job, sketched: Sequence[Way]) -> Way:
    seconds = (2 * job.rows * job.size**2 + 9 * job.size**3) / job.double
    return job.way(
        f"ridge on {job.size:,} features", seconds, 24 * job.size**2 + BESIDE, needs=sketched, approximate=True
    )


@dataclass(frozen=True)
class _Helper:
    """A preconditioner: how long it takes to make and to apply once, and its bytes in memory and on disk."""

    name: str
    making: float
    applying: float
    memory: int
    disk: int

    @property
    def note(self) -> str:
        """What it takes of the memory."""
        return f"{human_bytes(self.memory)} for the preconditioner"


def _helpers(job: Job) -> tuple[_Helper, ...]:
    """The trace kernel, if it is another kernel than this one, and features."""
    n, k, columns = job.examples, job.scalars, job.scalars * job.targets
    small = min(n, job.size)
    taken = n * job.size * job.itemsize
    by_features = _Helper(
        f"helped by {job.size:,} features",
        job.features(n)[1].seconds + (2 * n * job.size * small + 9 * small**3) / job.double,
        4 * n * small * columns / job.double + taken / READ,
        24 * small**2,
        taken,
    )
    if k == 1:
        return (by_features,)
    tiles = job.pace.traced or job.pace.alone
    making = n * tiles.capture + n**2 / 2 * tiles.pair + 9 * n**3 / job.double
    return _Helper("helped by the trace kernel", making, 4 * n**2 * columns / job.double, 24 * n**2, 0), by_features


def _iterative(job: Job, stored: Way) -> list[Way]:
    rows, right, helpers = job.rows, job.targets, _helpers(job)
    vectors = 6 * 8 * rows * right
    # four vectors of parameters and slacks, and as many while they are multiplied; one right-hand side at a time
    longer = 8 * 8 * (job.parameters + rows)
    last, product = helpers[-1], job.examples * job.pace.product
    on_disk = f"conjugate gradients, matrix on disk, {last.name}"
    found = [_helped(job, on_disk, job.passing(), vectors, last, needs=[stored])]
    for name, memory in (("conjugate gradients", vectors), ("least squares (LSMR)", longer)):
        for helper in helpers:
            way = _helped(job, f"{name}, {helper.name}", right * product, memory, helper)
            found.append(_closed(way, job.without()))
        seconds = PLAIN * job.iterations * right * product
        found.append(_closed(job.way(f"{name}, plain", seconds, BESIDE + memory), job.without()))
    return found


def _helped(job: Job, name: str, step: float, memory: int, helper: _Helper, needs: Sequence[Way] = ()) -> Way:
    """A solve with a preconditioner, of which features are on disk or, where that is too small, in memory."""
    seconds = helper.making + job.iterations * (step + helper.applying)
    least = BESIDE + memory + helper.memory
    stored = job.way(name, seconds, least, helper.disk, needs=needs, note=helper.note)
    return job.way(name, seconds, least + helper.disk, needs=needs, note=helper.note) if stored.trouble else stored


def _closed(way: Way, reason: str) -> Way:
    """A way that cannot be gone, if there is a reason."""
    return Way(way.name, math.nan, way.memory, way.disk, reason) if reason else way


def spectra(job: Job, exact: Sequence[Way], sketched: Sequence[Way]) -> tuple[Way, ...]:
    """Every way to the eigenvalues, or to sums of functions of them."""
    rows, product = job.rows, job.examples * job.pace.product
    basis = 8 * rows * STEPS * VECTORS + BESIDE
    free = job.way(f"Lanczos, no matrix, {STEPS} steps", (STEPS * VECTORS + BASIS) * product, basis, approximate=True)
    seconds = (STEPS + 1) * job.passing()
    by_features = (2 * rows * job.size**2 + 9 * job.size**3) / job.double
    return (
        job.way("all eigenvalues", 9 * rows**3 / job.double, 24 * rows**2 + BESIDE, needs=exact),
        job.way(f"Lanczos, matrix on disk, {STEPS} steps", seconds, basis, needs=exact[-1:], approximate=True),
        _closed(free, job.without()),
        job.way(
            f"eigenvalues of {job.size:,} features",
            by_features,
            24 * job.size**2 + BESIDE,
            needs=sketched,
            approximate=True,
        ),
    )


def traces(job: Job) -> tuple[Way, ...]:
    """The sum of the eigenvalues: from the diagonal, which is exact, or from products."""
    tiles, product = job.pace.alone, job.examples * job.pace.product
    hutch = job.way(
        f"trace by Hutch++, no matrix, {HUTCH} products",
        HUTCH * product,
        2 * 8 * job.rows * HUTCH + BESIDE,
        approximate=True,
    )
    return (
        job.way("trace by the diagonal", job.examples * (tiles.capture + tiles.pair), BESIDE),
        _closed(hutch, job.without()),
    )
