"""Random linear maps from parameter space to D numbers that keep inner products on average.

A sketch S has independent parts for the parameters; that of one parameter with entries (line, place) adds the entry,
with a random sign, to one of D buckets:

    bucket(line, place) = start(line) + place  (mod D),      sign = sign(line) * sign(round, place)

so that a line of the gradient goes to D neighbouring buckets without meeting itself (one longer than D is cut first),
and two lines meet shifted by a random distance. <S x, S y> is unbiased for <x, y>, with the variance of a dense
Gaussian sketch, (|x|^2 |y|^2 + <x, y>^2) / D, or less: entries of one line never meet, and the signs of different pairs
that do are uncorrelated. They would not be where two lines meet unshifted, in all places at once and with one sign:
starts are drawn without replacement, anew for every D lines or so, and each such round has signs of its own for the
places of a line. Parameters of at most D entries are put one behind the other: each is kept as it is, and a network
of at most D parameters is sketched without any error.

The product of two small random projections, U R V^T with d1 d2 = D, would form no gradient, but its variance is about
2/d1 + 2/d2 instead of 2/D where gradients are close to rank one, and those of convolutions are (see `docs/scale.md`).
Projections that keep the gradients' leading directions (`leading`) do not have that: a sketch that is given these
forms no gradient of a weight that they hold, and is several times less noisy for convolutional networks.

For a linear layer with one position, R = g (outer) a, the sum over lines is a circular convolution of the sketches of
g and a, by three Fourier transforms of D numbers (as TensorSketch: Pham & Pagh, 2013), and R is not formed. For sums
over positions the rows are formed for a few examples at a time, in memory that is used again, whichever is cheaper.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.tangent.derivatives import Derivatives, Part
from ntkit.tangent.factors import Convolution, Factor, Lookup, Outer, Rows
from ntkit.tangent.leading import Leading, Sides, is_projectable, label, projection
from ntkit.tangent.workspace import Workspace

# How maps are drawn: 1 had the same signs for all rounds. Features by another rule do not go together with these.
RULE = 2
# Rows formed at a time.
FORMED = 32 * 2**20
# Nanoseconds on two CPU cores, measured on 32 and 64 examples with all that goes with each: of a Fourier transform of
# D numbers, over D log2 D (0.13 to 0.34); of forming a row, for each product of an entry; of adding an entry to its
# bucket (2.6 to 5.9).
TRANSFORM, PRODUCT, BUCKET = 0.25, 0.012, 2.8


@dataclass(frozen=True, eq=False)
class Hash:
    """Where the entries of one parameter go, and with which signs.

    Attributes:
        shape: of the parameter.
        across: whether lines run along the first axis instead of the others; they run along the longer one.
        start: first bucket of each line, (k, lines, blocks); k is 1 if all scalars share one sketch.
        sign: of each line, the same shape, +-1.
        place: sign of each place of a line, (rounds, length), or (rounds, D) for lines that are cut.
        size: D.
    """

    shape: tuple[int, ...]
    across: bool
    start: Tensor
    sign: Tensor
    place: Tensor
    size: int

    @classmethod
    def draw(
        cls,
        shape: tuple[int, ...],
        size: int,
        scalars: int,
        like: Tensor,
        generator: torch.Generator,
        first: int | None = 0,
    ) -> Hash:
        """Random starts and signs for a parameter, on the device of `like`.

        One that fits begins at bucket `first`, its lines one behind the other, unless `first` is None.
        """
        height = shape[0] if len(shape) > 1 else 1
        rest = math.prod(shape) // max(1, height)
        across = height > rest
        lines, length = (rest, height) if across else (height, rest)
        blocks = -(-length // size)
        count = scalars * lines * blocks
        drawn = _round(lines, size)
        rounds = max(1, -(-count // drawn))
        if first is not None and count * length <= size:
            start = first + torch.arange(count) * length
        else:
            start = torch.cat([torch.randperm(size, generator=generator)[:drawn] for _ in range(rounds)])[:count]
        start = (start % size).view(scalars, blocks, lines).mT.contiguous()
        return cls(
            shape, across, start.to(like.device), _signs(generator, *start.shape).to(like),
            _signs(generator, rounds, min(length, size)).to(like), size,
        )  # fmt: skip

    def matrix(self, rows: Tensor) -> Tensor:
        """Rows (n, k, *shape) as (n, k, lines, length); those of convolutions with the channels behind the window."""
        n, k = rows.shape[:2]
        if rows.ndim > 4:
            rows = rows.movedim(3, -1)  # the order in which they are formed
        matrix = rows.reshape(n, k, *((self.shape[0], -1) if len(self.shape) > 1 else (1, -1)))
        return matrix.transpose(2, 3) if self.across else matrix

    def add(self, rows: Tensor, out: Tensor) -> None:
        """Add rows (n, k, *shape) to buckets, (n, 1 or k, 2 D): those past D belong to the beginning."""
        matrix, places, count = self.matrix(rows), self.place.unbind(), self.start[0].numel()
        drawn = _round(self.start.shape[1], self.size)
        for k, lines in enumerate(self.start.tolist()):
            mine = matrix[:, k : k + 1] if len(self.start) > 1 else matrix
            signs = self.sign[k].tolist()
            for line, blocks in enumerate(lines):
                for block, start in enumerate(blocks):
                    here = slice(block * self.size, (block + 1) * self.size)
                    part = mine[:, :, line, here]
                    room = out[:, :, start : start + part.shape[2]]
                    # its `turn`, without the time that a call takes
                    place = places[(k * count + block * len(lines) + line) // drawn]
                    room.addcmul_(part, place[: part.shape[2]], value=signs[line][block])

    def buckets(self, first: Tensor, rest: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Bucket and sign of entries, by their indices along the first axis and along the others, for scalar k."""
        line, place = (rest, first) if self.across else (first, rest)
        block, place = place // self.size, place % self.size
        bucket = (self.start[k, line, block] + place) % self.size
        return bucket, self.sign[k, line, block] * self.place[self.turn(k, line, block), place]

    def turn(self, k: int, line: Any, block: Any) -> Any:
        """In which round a line was drawn, or each of several."""
        _, lines, blocks = self.start.shape
        return ((k * blocks + block) * lines + line) // _round(lines, self.size)

    def turns(self, k: int, block: int) -> Iterator[tuple[Tensor, slice]]:
        """The lines of a block by the round in which they were drawn, with the signs of their places."""
        lines, drawn = self.start.shape[1], _round(self.start.shape[1], self.size)
        for turn in range(self.turn(k, 0, block), self.turn(k, lines - 1, block) + 1):
            first = turn * drawn - (k * self.start.shape[2] + block) * lines
            yield self.place[turn], slice(max(first, 0), min(first + drawn, lines))


@dataclass(frozen=True, eq=False)
class Projected:
    """Two small projections of a large weight's gradients, and where the entries of what is left go.

    Attributes:
        left: (d1, outputs).
        right: (d2, inputs).
        core: of the entries between directions that both sides keep: most of the length, which meets nothing large.
        rest: of all others.
    """

    left: Tensor
    right: Tensor
    core: Hash
    rest: Hash

    @classmethod
    def draw(
        cls,
        sides: Sides,
        kept: int,
        size: int,
        scalars: int,
        like: Tensor,
        generator: torch.Generator,
        first: int,
    ) -> Projected:
        """Of about D numbers for a row; `kept` directions of each side make the core, from bucket `first` on."""
        outputs, inputs = sides.outputs.to(like), sides.inputs.to(like)
        d1, d2 = sides.split(size)
        core = min(kept, outputs.shape[1]), min(kept, inputs.shape[1])
        return cls(
            projection(outputs, d1, generator),
            projection(inputs, d2, generator),
            Hash.draw(core, size, scalars, like, generator, first),
            Hash.draw((d1, d2), size, scalars, like, generator, None),
        )

    def add(self, factor: Outer | Convolution, out: Tensor) -> None:
        """Add the sketch of a factor's rows to buckets, as `Hash.add` does that of rows."""
        rows = factor.projected(self.left, self.right)
        core = rows[:, :, : self.core.shape[0], : self.core.shape[1]]
        self.core.add(core, out)
        core.zero_()
        self.rest.add(rows, out)


@dataclass(frozen=True)
class Sketch:
    """A random linear map of gradients to D numbers, the same for every batch.

    Attributes:
        size: D.
        seed: of all random choices.
        trace: whether the scalars of an example are summed into one row, each through a sketch of its own: the inner
            products are then unbiased for the sum over equal scalars.
        leading: directions in which gradients are longest. Where they hold enough of them, a weight's gradients are not
            formed, but go through two small projections that keep these directions.
    """

    size: int
    seed: int
    trace: bool = False
    leading: Leading | None = None
    # of the network that was met last, by what it was drawn for
    _drawn: dict[Any, dict[Part, Hash | Projected]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the size.

        Raises:
            InputError: if it is not a positive number.
        """
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise InputError(f"the size of a sketch is a positive number of features: got {self.size!r}")

    def __reduce__(self) -> tuple[type[Sketch], tuple[int, int, bool, Leading | None]]:
        """Another process draws the same."""
        return Sketch, (self.size, self.seed, self.trace, self.leading)

    @property
    def description(self) -> str:
        """All that decides which map it is."""
        leading = "" if self.leading is None else f" leading={self.leading.digest}"
        return f"D={self.size} seed={self.seed} rule={RULE}{leading}"

    @torch.no_grad()
    def of(self, derivatives: Derivatives) -> Tensor:
        """The sketch of every row, (n, k, D), or with `trace` of every example, (n, 1, D), over sqrt(k).

        Cost: forming rows where there are several positions, and an addition for each of their entries; no memory of
        the size of all rows.
        """
        n, k = derivatives.examples, derivatives.scalars
        like = derivatives.outputs
        out = like.new_zeros(n, 1 if self.trace else k, 2 * self.size)
        waves = like.new_zeros(n, out.shape[1], self.size // 2 + 1, dtype=_complex(like.dtype))
        workspace, transformed, drawn = Workspace(FORMED), False, self._draw(derivatives)
        for part, factor in derivatives.factors.items():
            found = drawn[part]
            if isinstance(found, Projected):
                assert isinstance(factor, Outer | Convolution)
                found.add(factor, out)
            elif isinstance(factor, Lookup):
                _add_lookup(found, factor, out)
            elif isinstance(factor, Outer) and _transforms(factor, found):
                _add_transformed(found, factor, waves)
                transformed = True
            else:
                _add_rows(found, factor, out, workspace)
        total = out[:, :, : self.size] + out[:, :, self.size :]
        if transformed:
            total += torch.fft.irfft(waves, n=self.size)
        return total / math.sqrt(k) if self.trace else total

    def _draw(self, derivatives: Derivatives) -> dict[Part, Hash | Projected]:
        """Starts and signs of all parameters: the same for all batches of a network, wherever it is."""
        scalars = derivatives.scalars if self.trace else 1
        shapes = tuple((part, f.shape, f.like.dtype, f.like.device) for part, f in derivatives.factors.items())
        if (drawn := self._drawn.get((scalars, shapes))) is not None:
            return drawn
        projected = self._projected(derivatives, scalars)
        # as many directions as let the cores of all weights stand side by side in half of the buckets
        kept = max(1, math.isqrt(self.size // (2 * scalars * max(1, len(projected)))))
        first, drawn = 0, {}
        for part, factor in sorted(derivatives.factors.items(), key=lambda item: item[0] not in projected):
            # each with a generator of its own: what one draws does not change the others
            name = f"{self.seed} {label(part)}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
            if part in projected:
                found = Projected.draw(projected[part], kept, self.size, scalars, factor.like, generator, first)
                alone = found.core.shape
            else:
                found = Hash.draw(factor.shape, self.size, scalars, factor.like, generator, first)
                alone = factor.shape
            drawn[part] = found
            if scalars * math.prod(alone) <= self.size:  # the small ones do not meet, as long as there is room
                first = (first + scalars * math.prod(alone)) % self.size
        self._drawn.clear()
        self._drawn[scalars, shapes] = drawn
        return drawn

    def _projected(self, derivatives: Derivatives, scalars: int) -> dict[Part, Sides]:
        """The weights whose gradients are not formed, with the directions that they keep.

        Raises:
            InputError: if the directions are of another network.
        """
        found = {}
        for part, factor in derivatives.factors.items() if self.leading is not None else ():
            if not is_projectable(factor) or scalars * math.prod(factor.shape) <= self.size:
                continue
            assert factor.work is not None
            assert self.leading is not None
            expected, sides = (factor.work.outputs, factor.work.inputs), self.leading.sides.get(label(part))
            have = None if sides is None else (len(sides.outputs), len(sides.inputs))
            if sides is None or have != expected:
                raise InputError(
                    f"the leading directions are of another network: for {part.name} they have {have} outputs and "
                    f"inputs, expected {expected}. Take those of this network: Leading.of(tangent, x, ...)"
                )
            if sides.pays(self.size, single=factor.work.single):
                found[part] = sides
        return found


def _add_rows(found: Hash, factor: Factor, out: Tensor, workspace: Workspace) -> None:
    """Form the rows of a few examples at a time."""
    if isinstance(factor, Rows):
        found.add(factor.values, out)
        return
    each = factor.scalars * math.prod(factor.shape) * factor.like.element_size()
    step = max(1, min(factor.examples, workspace.nbytes // max(1, each)))
    for a in range(0, factor.examples, step):
        some = factor.narrow(a, a + step) if step < factor.examples else factor
        memory = workspace.take(0, (some.examples, some.scalars, *some.shape), some.like)
        found.add(some.rows(out=memory), out[a : a + step])


def _add_lookup(found: Hash, factor: Lookup, out: Tensor) -> None:
    """The lines of an embedding that occur."""
    n, k, t, o = factor.cotangents.shape
    features = torch.arange(o, device=factor.ids.device)
    ids = factor.ids.clamp(0, factor.shape[0] - 1)  # elsewhere the cotangents are zero
    for own in range(len(found.start)):
        bucket, sign = found.buckets(ids[:, :, None].expand(n, t, o), features.expand(n, t, o), own)
        for scalar in range(k) if len(found.start) == 1 else (own,):
            room = out[:, 0 if out.shape[1] == 1 else scalar]
            room.scatter_add_(1, bucket.reshape(n, -1), (sign * factor.cotangents[:, scalar]).reshape(n, -1))


def _transforms(factor: Outer, found: Hash) -> bool:
    """Whether Fourier transforms are cheaper than forming rows."""
    work = factor.work
    if work.groups > 1 or len(factor.shape) != 2 or work.row_size <= found.size:
        return False
    if factor.like.dtype.itemsize < 4:  # there are none in half precision
        return False
    _, lines, blocks = found.start.shape
    count = (work.scalars + 1) * blocks * -(-lines // found.size)  # of transforms for a position
    transforms = work.positions * count * found.size * math.log2(max(2, found.size)) * TRANSFORM
    return transforms < work.scalars * work.row_size * (work.positions * PRODUCT + BUCKET)


def _add_transformed(found: Hash, factor: Outer, waves: Tensor) -> None:
    """sum_t sum_line sign g[line] roll(a, start(line)): products of Fourier transforms."""
    a, g = factor.inputs[:, 0], factor.cotangents[:, :, 0]  # n t i; n k t o
    first_is_cotangent = not factor.inputs_first
    along_cotangent = found.across == first_is_cotangent  # whether lines run along the cotangent's features
    for block in range(found.start.shape[2]):
        here = slice(block * found.size, (block + 1) * found.size)
        long, short = (g[..., here], a[:, None]) if along_cotangent else (a[:, None, :, here], g)
        for k in range(g.shape[1]):
            own = k if len(found.start) > 1 else 0
            line, all_short = (side[:, k if side.shape[1] > 1 else 0] for side in (long, short))  # n t features
            for place, lines in found.turns(own, block):
                some = all_short[..., lines] * found.sign[own, lines, block]
                counted = some.new_zeros(*some.shape[:2], found.size)
                counted.index_add_(2, found.start[own, lines, block], some)
                shifted = torch.fft.rfft(line * place[: line.shape[2]], n=found.size)
                waves[:, 0 if waves.shape[1] == 1 else k] += (shifted * torch.fft.rfft(counted)).sum(1)


def _round(lines: int, size: int) -> int:
    """How many lines are drawn in one round: as many as D buckets let begin apart, and none of a block cut needlessly.

    A block whose lines are of several rounds takes as many Fourier transforms.
    """
    lines = max(1, lines)
    return size // lines * lines if lines <= size else -(-lines // -(-lines // size))


def _signs(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(2, shape, generator=generator) * 2.0 - 1.0


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64
