"""A pure cost model: what computing a kernel will cost, how it will be done, and why.

No work is done here. From the sizes of a network's uses of its parameters (found by a trial on three examples), the
number of examples and a memory budget follow: how many examples are captured at once, how many are held while the
others pass by, the route of every parameter, FLOPs and bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ntkit.tangent.grain import CPU, Grain
from ntkit.tangent.trial import Anatomy, PartSize
from ntkit.tangent.work import OuterWork, Way

# Never fewer examples at a time than this, if the budget allows: small batches waste the processor.
FEWEST = 4
# Rows of a product below which it wastes the processor.
NARROW = 64
# Buffers and code that PyTorch's matrix libraries load when they are first used.
LIBRARIES = 64 * 2**20
# What an allocator takes beyond what is asked of it (measured on the benchmark workloads).
SLACK = 1.3
# Recomputing columns for every held block may cost this share of the contraction itself.
OVERHEAD = 0.5


@dataclass(frozen=True)
class Sizes:
    """A network's sizes per example.

    Attributes:
        scalars: K.
        itemsize: bytes of one number.
        parameters: bytes of all selected parameters.
        activations: bytes that a forward pass keeps.
        cotangents: bytes of all cotangents of one scalar.
        parts: the parameters.
        forward: FLOPs of a forward pass.
        backward: FLOPs of one backward pass to the uses.
        grain: of the device.
    """

    scalars: int
    itemsize: int
    parameters: int
    activations: int
    cotangents: int
    parts: tuple[PartSize, ...]
    forward: int
    backward: int
    grain: Grain = CPU

    @property
    def captured(self) -> int:
        """Bytes of capturing one example."""
        return self.activations + self.scalars * self.cotangents

    @property
    def capture_flops(self) -> int:
        """FLOPs of capturing one example: one forward pass, K backward passes."""
        return self.forward + self.scalars * self.backward


@dataclass(frozen=True)
class Route:
    """How one parameter part is contracted.

    Attributes:
        name: the parameter.
        way: by rows, pairs of positions or carried cotangents, for a pair of tiles of different examples.
        formed: whether rows are formed at capture and kept.
        flops: of contracting one pair of examples, forming not included.
        own: FLOPs of contracting a tile of the diagonal, by its number of examples; the rest of the tiles cost `flops`.
        forming: FLOPs of forming one example's rows.
        held: bytes kept for one held example.
        reason: why, in words.
    """

    name: str
    way: Way
    formed: bool
    flops: int
    own: dict[int, int]
    forming: int
    held: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What computing the kernel will take.

    Attributes:
        rows: examples N.
        cols: examples M.
        scalars: rows of the matrix per example.
        symmetric: whether only one half is computed.
        reused: whether held examples take part in more than one contraction.
        block: examples held at once, against which all columns pass.
        chunk: examples captured at once.
        passing: columns contracted at once with what is held: one chunk, or some where chunks are small.
        routes: one per parameter part.
        captures: examples captured in total, repetitions included.
        flops: total FLOPs.
        bytes: largest memory in use at once beyond the model and the examples.
        result: bytes of the matrix itself, included in `bytes`.
        reasons: the decisions, in words.
    """

    rows: int
    cols: int
    scalars: int
    symmetric: bool
    reused: bool
    block: int
    chunk: int
    passing: int
    routes: tuple[Route, ...]
    captures: int
    flops: int
    bytes: int
    result: int
    reasons: tuple[str, ...]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Start and stop of each held block of rows."""
        return span(0, self.rows, self.block)

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Start and stop of each captured chunk of examples start:stop."""
        return span(start, stop, self.chunk)

    def passings(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Start and stop of the columns that are contracted at once, among examples start:stop."""
        return span(start, stop, self.passing)

    def __str__(self) -> str:
        """The plan as a few lines for people."""
        shape = f"{self.rows * self.scalars:,} x {self.cols * self.scalars:,}"
        lines = [
            f"kernel of {shape}: {human_flops(self.flops)}, {human_bytes(self.bytes)} at most, "
            f"of which {human_bytes(self.result)} for the matrix"
        ]
        return "\n".join([*lines, *(f"- {reason}" for reason in self.reasons)])


def span(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Neighbouring ranges of at most `step` that cover start:stop."""
    return ((a, min(a + step, stop)) for a in range(start, stop, step))


def human_bytes(number: float) -> str:
    """1.5 GB, and so on."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"


def human_flops(number: float) -> str:
    """1.5 GFLOP, and so on."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {unit}FLOP"
        number /= 1000
    return f"{number:.3g} PFLOP"


def sizes(
    anatomy: Anatomy, itemsize: int, parameters: int, flops: tuple[int, int] | None = None, pace: Grain = CPU
) -> Sizes:
    """The sizes of a network from its trial.

    Args:
        anatomy: what the trial found.
        itemsize: bytes of one number.
        parameters: bytes of the selected parameters.
        flops: forward and backward FLOPs of one example where they were measured; else they are taken from the parts.
        pace: the grain of the device.
    """
    parts = tuple(anatomy.sizes)
    products = sum(2 * p.work.positions * p.row for p in parts if p.work is not None)
    forward, backward = flops or (products, products)
    return Sizes(
        anatomy.scalars, itemsize, parameters, anatomy.activations, anatomy.cotangents, parts, forward, backward, pace
    )


def make_plan(found: Sizes, rows: int, cols: int, *, symmetric: bool, trace: bool, memory: int) -> Plan:
    """The cheapest way within `memory` bytes of working space; a budget too small is exceeded rather than refused.

    Args:
        found: the network's sizes.
        rows: examples N.
        cols: examples M.
        symmetric: whether rows and columns are the same examples.
        trace: whether blocks are summed over scalars.
        memory: bytes for everything but the matrix itself, the model and the examples.
    """
    job = _Job(found, rows, cols, symmetric, trace)
    pace = found.grain
    scratch = min(pace.scratch, memory // 4)
    most = max(rows, cols)
    # large weights are read and rearranged for every chunk: it takes many examples to be worth it
    capture = min(max(pace.capture, 6 * found.parameters), memory // 3)
    # what two chunks would hold is captured at once: that saves putting them together, which takes as much again
    if most * found.captured <= min(2 * capture, memory // 3):
        capture *= 2
    chunk = max(min(FEWEST, memory // (3 * found.captured + 1)), capture // (found.captured + 1))
    chunk = max(1, min(most, chunk))
    space = max(memory // 4, memory - chunk * found.captured - scratch)
    reused = rows > job.edge or (not symmetric and cols > chunk)
    routes = job.routes(rows, reused=reused)
    block = rows
    if rows * sum(route.held for route in routes) > (min(space, pace.roomy) if rows > pace.tile else space):
        reused = True
        for _ in range(2):  # the routes depend a little on the block's size, and the size on what the routes hold
            routes = job.routes(block, reused=True)
            held = sum(route.held for route in routes)
            pair = max(1, sum(route.flops for route in routes))
            repeated = found.capture_flops + sum(route.forming for route in routes)
            enough = int(repeated / (OVERHEAD * pair)) + 1
            block = max(1, min(rows, max(enough, pace.tile), space // max(1, held)))
        routes = job.routes(block, reused=True)
        chunk = min(chunk, max(FEWEST, pace.capture // (2 * found.captured + 1)))  # beside what is held
    each = sum(route.held for route in routes) + 1
    if reused:  # with rows of its own
        chunk = min(chunk, max(FEWEST, capture // each))
    chunk = -(-most // -(-most // chunk))  # of even size: a small one at the end would waste the processor
    if symmetric:  # else columns are captured as many at once whatever few rows they meet
        chunk = min(chunk, max(1, block))
    chunks = -(-NARROW // (chunk * job.scalars)) if reused else 1
    passing = chunk * max(1, min(chunks, memory // (3 * each * chunk)))
    return job.priced(routes, block, chunk, passing, scratch, reused=reused)


@dataclass(frozen=True)
class _Job:
    """What is to be computed, before it is decided how."""

    found: Sizes
    rows: int
    cols: int
    symmetric: bool
    trace: bool

    @property
    def scalars(self) -> int:
        """Rows of the matrix per example."""
        return 1 if self.trace else self.found.scalars

    @property
    def edge(self) -> int:
        """Examples along the edge of a tile."""
        return tile_edge(self.scalars, self.found.grain)

    def diagonal(self, block: int) -> list[int]:
        """Sizes of the tiles on the diagonal of all blocks."""
        if not self.symmetric:
            return []
        return [b - a for start, stop in span(0, self.rows, block) for a, b in span(start, stop, self.edge)]

    def routes(self, block: int, *, reused: bool) -> tuple[Route, ...]:
        """How every part is contracted when so many examples are held."""
        routes = []
        before: OuterWork | None = None
        for part in self.found.parts:
            shares = part.work is not None and before is not None and _shares(before, part.work)
            routes.append(self._shared(part) if shares else self._route(part, block, reused=reused))
            before = part.work
        return tuple(routes)

    def _shared(self, part: PartSize) -> Route:
        return Route(part.name, Way.PAIRS, False, 0, {}, 0, part.held, "shares G G^T with its weight")

    def _route(self, part: PartSize, block: int, *, reused: bool) -> Route:
        found, trace = self.found, self.trace
        heads = found.scalars if trace else found.scalars**2
        row_flops, row_bytes = 2 * part.row * heads, part.row * found.scalars * found.itemsize
        sizes = {*self.diagonal(block)}
        if part.work is None:
            one = OuterWork(1, found.scalars, 1, 1, part.row, 1, found.grain)
            own = {n: one.of(n).products(Way.ROWS, one.of(n), trace=trace, same=True) for n in sizes}
            return Route(part.name, Way.ROWS, False, row_flops, own, 0, part.held, "its rows are small")
        work = part.work
        same = self.symmetric and not reused
        way = work.of(block).way(work.of(self.cols), trace=trace, same=same)
        formed = way is Way.ROWS and (reused or row_bytes < part.held)
        own = {}
        for n in sizes:
            tile = work.of(n)
            tile_way = Way.ROWS if formed else tile.way(tile, trace=trace, same=True)
            own[n] = tile.products(tile_way, tile, trace=trace, same=True)
            if tile_way is Way.ROWS and way is not Way.ROWS:
                own[n] += tile.forming()
        flops = work.products(way, work, trace=trace, same=False)
        held = row_bytes if formed else part.held
        forming = work.forming() if way is Way.ROWS else 0
        return Route(part.name, way, formed, flops, own, forming, held, _reason(work, way, flops, row_flops))

    def priced(
        self, routes: tuple[Route, ...], block: int, chunk: int, passing: int, scratch: int, *, reused: bool
    ) -> Plan:
        """The plan with all its costs."""
        found, rows, cols, scalars = self.found, self.rows, self.cols, self.scalars
        blocks = list(span(0, rows, block))
        captures, pairs = rows, 0
        for start, stop in blocks:
            others = cols - stop if self.symmetric else cols
            captures += others
            pairs += (stop - start) * others
            if self.symmetric:  # a block on the diagonal is contracted in tiles, the upper half of them
                pairs += sum((b - a) * (stop - b) for a, b in span(start, stop, self.edge))
        forming = sum(route.forming for route in routes)
        flops = captures * (found.capture_flops + forming) + pairs * sum(route.flops for route in routes)
        flops += sum(route.own.get(size, 0) for route in routes for size in self.diagonal(block))
        held = min(block, rows) * sum(route.held for route in routes)
        # tiles of the result and their factors, and rows or pairs in the workspace
        edge = min(self.edge, max(block, 1)) * scalars
        unformed = [part.work for part, route in zip(found.parts, routes, strict=True) if not route.formed]
        working = any(work is not None and not work.single for work in unformed)
        temporary = 3 * found.itemsize * edge**2 + (2 * scratch if working else 0)
        result = rows * cols * scalars**2 * found.itemsize
        capture = min(chunk, max(rows, cols)) * found.captured
        formed = [part.work for part, route in zip(found.parts, routes, strict=True) if route.formed and route.forming]
        if formed:  # from unfolded inputs and a copy of them, of one example at least, beside the capture
            patches = max(work.groups * work.positions * work.inputs for work in formed if work is not None)
            capture += 2 * max(min(found.grain.unfolded, scratch), patches * found.itemsize)
        if reused:  # the rows of what passes are formed as well
            capture += min(passing, max(rows, cols)) * sum(route.held for route in routes)
        peak = result + LIBRARIES + int(SLACK * max(held + max(capture, temporary), 3 * found.parameters))
        reasons = [
            f"{chunk} examples are captured at once ({human_bytes(found.captured)} each)",
            f"{len(blocks)} block{'s' if len(blocks) > 1 else ''} of {min(block, rows)} rows held "
            f"({human_bytes(held)}); {captures:,} forward and {captures * found.scalars:,} backward passes of one "
            "example",
        ]
        if self.symmetric:
            reasons.append("rows and columns are the same examples: only one half is computed")
        by_reason: dict[str, list[str]] = {}
        for route in routes:
            by_reason.setdefault(route.reason, []).append(route.name)
        reasons += [f"{listed(names)}: {reason}" for reason, names in by_reason.items()]
        return Plan(
            rows, cols, scalars, self.symmetric, reused, block, chunk, passing, routes, captures, flops, peak, result,
            tuple(reasons),
        )  # fmt: skip


def _is_bias(work: OuterWork) -> bool:
    return work.single and work.inputs == 1


def _shares(before: OuterWork, work: OuterWork) -> bool:
    """Whether this is a bias and the part before its weight, so that they have G G^T in common."""
    return _is_bias(work) and before.single and before.outputs == work.outputs


def _reason(work: OuterWork, way: Way, flops: int, row_flops: int) -> str:
    """Why a part takes its way."""
    instead = f"{human_flops(flops)} a pair instead of {human_flops(row_flops)}"
    if _is_bias(work):
        return "G G^T"
    if work.single:
        return f"(A A^T) * (G G^T): {instead}"
    if way is Way.PAIRS:
        how = ", patches by pixels" if work.by_pixels(work) else ""
        return f"pairs of {work.positions} positions{how}: {human_flops(flops)} a pair, no rows to form"
    if way is Way.CARRIED:
        return f"cotangents carried between {work.positions} positions: {instead}, and no rows to form"
    return f"per-example rows of {work.row_size:,} over {work.positions} positions: {human_flops(row_flops)} a pair"


def listed(names: list[str], most: int = 3) -> str:
    """A few names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def tile_edge(scalars: int, pace: Grain = CPU) -> int:
    """Examples along the edge of the widest tile that is contracted in one go."""
    return max(1, pace.tile // scalars)
