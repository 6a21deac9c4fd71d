"""A pure cost model: what computing a kernel will cost, how it will be done, and why.

No work is done here. From the sizes of a network's uses of its parameters (found by a trial on three examples), the
number of examples and a memory budget follow: how many examples are captured at once, how many are held while the
others pass by, the route of every parameter, FLOPs and bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ntkit.tangent.factors import OuterWork
from ntkit.tangent.trial import Anatomy, PartSize
from ntkit.tangent.workspace import SCRATCH

# A capture of about this many bytes is large enough for efficient products; more only costs memory.
CAPTURE = 64 * 2**20
# Never fewer examples at a time than this, if the budget allows: small batches waste the processor.
FEWEST = 4
# Entries of the widest tile that is contracted in one go.
TILE = 2048
# Buffers and code that PyTorch's matrix libraries load when they are first used.
LIBRARIES = 64 * 2**20
# What an allocator takes beyond what is asked of it (measured on the benchmark workloads).
SLACK = 1.3
# Recomputing columns for every held block may cost this share of the contraction itself.
OVERHEAD = 0.2


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
    """

    scalars: int
    itemsize: int
    parameters: int
    activations: int
    cotangents: int
    parts: tuple[PartSize, ...]
    forward: int
    backward: int

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
        rows: through per-example rows, instead of pairs of positions.
        formed: whether rows are formed at capture and kept.
        flops: of contracting one pair of examples, forming not included.
        forming: FLOPs of forming one example's rows.
        held: bytes kept for one held example.
        reason: why, in words.
        pairwise: whether pairs of several positions are formed.
    """

    name: str
    rows: bool
    formed: bool
    flops: int
    forming: int
    held: int
    reason: str
    pairwise: bool = False


@dataclass(frozen=True)
class Plan:
    """What computing the kernel will take.

    Attributes:
        rows: examples N.
        cols: examples M.
        scalars: rows of the matrix per example.
        symmetric: whether only one half is computed.
        block: examples held at once, against which all columns pass.
        chunk: examples captured at once.
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
    block: int
    chunk: int
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


def sizes(anatomy: Anatomy, itemsize: int, parameters: int, flops: tuple[int, int] | None = None) -> Sizes:
    """The sizes of a network from its trial.

    Args:
        anatomy: what the trial found.
        itemsize: bytes of one number.
        parameters: bytes of the selected parameters.
        flops: forward and backward FLOPs of one example where they were measured; else they are taken from the parts.
    """
    parts = tuple(anatomy.sizes)
    products = sum(2 * p.work.positions * p.row for p in parts if p.work is not None)
    forward, backward = flops or (products, products)
    return Sizes(
        anatomy.scalars, itemsize, parameters, anatomy.activations, anatomy.cotangents, parts, forward, backward
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
    most = max(rows, cols)
    scratch = min(SCRATCH, memory // 4)
    chunk = max(1, min(most, max(min(FEWEST, memory // (3 * found.captured + 1)), CAPTURE // (found.captured + 1))))
    once = _routes(found, min(rows, most), cols, trace, reused=False)
    space = max(memory // 4, memory - chunk * found.captured - scratch)
    if rows * sum(route.held for route in once) <= space:
        block, routes = rows, once
    else:
        block = rows
        for _ in range(2):  # the routes depend a little on the block's size, and the size on what the routes hold
            routes = _routes(found, block, cols, trace, reused=True)
            held = sum(route.held for route in routes)
            pair = max(1, sum(route.flops for route in routes))
            repeated = found.capture_flops + sum(route.forming for route in routes)
            enough = int(repeated / (OVERHEAD * pair)) + 1
            block = max(1, min(rows, max(enough, TILE), space // max(1, held)))
        routes = _routes(found, block, cols, trace, reused=True)
    return _priced(found, routes, rows, cols, block, min(chunk, max(1, block)), symmetric, trace, scratch)


def _routes(found: Sizes, rows: int, cols: int, trace: bool, *, reused: bool) -> tuple[Route, ...]:
    routes = []
    before: OuterWork | None = None
    for part in found.parts:
        routes.append(_route(found, part, rows, cols, trace, reused, before))
        before = part.work
    return tuple(routes)


def _route(
    found: Sizes, part: PartSize, rows: int, cols: int, trace: bool, reused: bool, before: OuterWork | None
) -> Route:
    heads = found.scalars if trace else found.scalars**2
    row_flops = 2 * part.row * heads
    row_bytes = part.row * found.scalars * found.itemsize
    if part.work is None:
        return Route(part.name, True, False, row_flops, 0, part.held, "its rows are small")
    work = part.work
    if work.positions == work.inputs == work.groups == 1:
        if before is not None and before.positions == 1 and before.outputs == work.outputs:
            return Route(part.name, False, False, 0, 0, part.held, "shares G G^T with its weight")
        return Route(part.name, False, False, 2 * heads * work.outputs, 0, part.held, "G G^T")
    left, right = work.of(rows), work.of(cols)
    pairs = work.pair_products(trace)
    if not left.prefers_rows(right, trace):
        if work.positions == 1:
            reason = f"(A A^T) * (G G^T): {human_flops(pairs)} a pair instead of {human_flops(row_flops)}"
        else:
            reason = f"pairs of {work.positions} positions: {human_flops(pairs)} a pair, no rows to form"
        return Route(part.name, False, False, pairs, 0, part.held, reason, work.positions > 1)
    formed = reused or row_bytes < part.held
    forming = 2 * work.row_size * work.positions * found.scalars
    reason = f"per-example rows of {part.row:,}: {human_flops(row_flops)} a pair instead of {human_flops(pairs)}"
    return Route(part.name, True, formed, row_flops, forming, row_bytes if formed else part.held, reason)


def _priced(
    found: Sizes,
    routes: tuple[Route, ...],
    rows: int,
    cols: int,
    block: int,
    chunk: int,
    symmetric: bool,
    trace: bool,
    scratch: int,
) -> Plan:
    blocks = list(span(0, rows, block))
    scalars = 1 if trace else found.scalars
    captures = rows
    pairs = 0
    for start, stop in blocks:
        passing = cols - stop if symmetric else cols
        captures += passing
        # a block on the diagonal is contracted in tiles, the upper half of them
        own = sum((b - a) * (stop - a) for a, b in span(start, stop, tile_edge(scalars))) if symmetric else 0
        pairs += (stop - start) * passing + own
    forming = sum(route.forming for route in routes)
    flops = captures * (found.capture_flops + forming) + pairs * sum(route.flops for route in routes)
    held = min(block, rows) * sum(route.held for route in routes)
    # tiles of the result and their factors, and rows or pairs in blocks, the original beside its copy for the product
    edge = min(tile_edge(scalars), max(block, 1)) * scalars
    blockwise = any((route.rows and not route.formed and route.forming) or route.pairwise for route in routes)
    temporary = 3 * found.itemsize * edge**2 + (2 * scratch if blockwise else 0)
    result = rows * cols * scalars**2 * found.itemsize
    capture = min(chunk, max(rows, cols)) * found.captured
    peak = result + LIBRARIES + int(SLACK * max(held + max(capture, temporary), 3 * found.parameters))
    reasons = [
        f"{chunk} examples are captured at once ({human_bytes(found.captured)} each)",
        f"{len(blocks)} block{'s' if len(blocks) > 1 else ''} of {min(block, rows)} rows held "
        f"({human_bytes(held)}); {captures:,} forward and {captures * found.scalars:,} backward passes of one example",
    ]
    if symmetric:
        reasons.append("rows and columns are the same examples: only one half is computed")
    by_reason: dict[str, list[str]] = {}
    for route in routes:
        by_reason.setdefault(route.reason, []).append(route.name)
    reasons += [f"{listed(names)}: {reason}" for reason, names in by_reason.items()]
    return Plan(rows, cols, scalars, symmetric, block, chunk, routes, captures, flops, peak, result, tuple(reasons))


def listed(names: list[str], most: int = 3) -> str:
    """A few names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def tile_edge(scalars: int) -> int:
    """Examples along the edge of a tile of at most TILE rows."""
    return max(1, TILE // scalars)
