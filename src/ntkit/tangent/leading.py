"""Leading directions of gradients: what lets two small projections stand for a large weight's gradient.

The gradient of a weight, G = sum_t g_t a_t^T (o, i), can be sketched without being formed, P G Q^T =
sum_t (P g_t) (Q a_t)^T for a small P and Q. With P and Q random the noise of that is about 2/d1 + 2/d2 where G is close
to rank one, many times that of a dense map of d1 d2 numbers, and most gradients are: the positions and examples of a
network have much of their length in common directions. So a few examples are asked for these, U (o, r) and V (i, r),
and P keeps them as they are:

    P = [U^T; R (I - U U^T)],    R random with E R^T R = I,    and Q likewise,

so that E P^T P = I: inner products are still unbiased, for any examples, and the noise is that of what lies outside.
Where that is too much (`Sides.pays`) the weight is sketched in another way.
The directions are the leading ones of sum_n G_n G_n^T and sum_n G_n^T G_n (higher-order SVD: De Lathauwer, De Moor and
Vandewalle, 2000), by subspace iteration, which forms no gradient either.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ntkit.errors import InputError, ModelError
from ntkit.tangent.factors import Convolution, Factor, Outer

if TYPE_CHECKING:
    from ntkit.tangent.derivatives import Part
    from ntkit.tangent.linearize import Tangent

# Bytes of patches that are unfolded at a time.
ROOM = 256 * 2**20
# Directions more than are kept, so that the subspace iteration finds these, and its rounds.
MORE, ROUNDS = 8, 4
NOT_FINITE = "the network has gradients that are NaN or infinite: they have no leading directions"


@dataclass(frozen=True, eq=False)
class Sides:
    """The leading directions of one weight's gradients, and how much of their length lies in them.

    Attributes:
        outputs: orthonormal columns (o, r).
        inputs: orthonormal columns (i, r); those of convolutions are patches with the channels innermost.
        weight: this weight's share of the squared length of whole gradients.
        outside: of its own squared length, what is outside of `outputs`, and of `inputs`.
    """

    outputs: Tensor
    inputs: Tensor
    weight: float
    outside: tuple[float, float]

    def split(self, size: int) -> tuple[int, int]:
        """d1 and d2, of which about D is the product: a side that is short leaves the other one more."""
        outputs, inputs = len(self.outputs), len(self.inputs)
        d1 = min(outputs, math.isqrt(size))
        d2 = min(inputs, size // d1)
        return min(outputs, size // d2), d2

    def pays(self, size: int, *, single: bool = False) -> bool:
        """Whether two projections add less noise than D buckets do.

        Relative to the square of its own part of a kernel's entry, that is 2 / d of what is outside, squared, for each
        side that is cut to d directions besides those kept, and 2 / D for all pairs of parts.

        Args:
            size: D.
            single: of one position, where the other way forms no gradient either: then it must be a quarter.
        """
        noise = 0.0
        for side, outside, d in zip((self.outputs, self.inputs), self.outside, self.split(size), strict=True):
            rank = side.shape[1]
            if d < len(side):
                if d < 2 * rank:  # no room for the others
                    return False
                noise += outside**2 / (d - rank)
        return self.weight * noise <= (0.25 if single else 1.0) / size


@dataclass(frozen=True, eq=False)
class Leading:
    """The directions in which some examples' gradients are longest, for every weight that has outputs and inputs.

    Attributes:
        sides: by part of the network (`label`).
    """

    sides: dict[str, Sides]

    @classmethod
    @torch.no_grad()
    def of(cls, tangent: Tangent, x: Any, *, rank: int = 8, examples: int = 24, generator: torch.Generator) -> Leading:
        """Those of the first examples, two thirds of which give the directions and one third what lies in them.

        Cost: their gradients in factored form, with patches unfolded, and about 20 (rank + 8) products with each
        position's inputs and cotangents; the squared lengths of the last third, for which the rows of some layers are
        formed, a layer at a time.

        Args:
            tangent: the network.
            x: examples like those that will be sketched.
            rank: directions of each side.
            examples: how many of them are looked at.
            generator: of the iteration's starts.

        Raises:
            InputError: if `rank` or `examples` is not a positive number, or the network computes in half precision.
            ModelError: if a gradient is NaN or infinite.
        """
        if tangent.dtype.itemsize < 4:
            raise InputError(f"leading directions are found in float32 or float64: the network is {tangent.dtype}")
        for name, number in (("rank", rank), ("examples", examples)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"{name} is a positive number: got {number!r}")
        drawn = tangent.examples(x)
        count = min(examples, len(drawn))
        found = tangent.derivatives(drawn, slice(0, count))
        looked, held = found, found
        if count > 1:  # directions that were fitted to examples hold more of these than of others
            two_thirds = min(count - 1, -(-2 * count // 3))
            looked, held = found.narrow(0, two_thirds), found.narrow(two_thirds, count)
        lengths = {part: float(factor.squared_norms().sum()) for part, factor in held.factors.items()}
        total = max(sum(lengths.values()), torch.finfo(found.outputs.dtype).tiny)
        if not math.isfinite(total):
            raise ModelError(NOT_FINITE)
        sides = {}
        for part, factor in looked.factors.items():
            if is_projectable(factor):
                sides[label(part)] = _sides(factor, held.factors[part], lengths[part], total, rank, generator)
        return cls(sides)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as safetensors, for maps in other processes."""
        named = {}
        for part, sides in self.sides.items():
            named[f"{part} outputs"], named[f"{part} inputs"] = sides.outputs.contiguous(), sides.inputs.contiguous()
            named[f"{part} shares"] = torch.tensor([sides.weight, *sides.outside], dtype=torch.float64)
        Path(path).write_bytes(save(named))  # unlike safetensors' own writing, a full disk is an OSError

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Leading:
        """What `save` wrote.

        Raises:
            InputError: if there is no such file, or it holds something else.
        """
        if not Path(path).is_file():
            raise InputError(f"no leading directions at {path}: no such file")
        try:
            named = load_file(Path(path))
            found = {}
            for part in sorted(name.removesuffix(" shares") for name in named if name.endswith(" shares")):
                weight, *outside = named.pop(f"{part} shares").tolist()
                sides = named.pop(f"{part} outputs"), named.pop(f"{part} inputs")
                found[part] = Sides(*sides, weight, (outside[0], outside[1]))
        except Exception as error:
            raise InputError(f"{path} holds no leading directions: {type(error).__name__}: {error}") from error
        if named:
            raise InputError(f"{path} holds no leading directions: nothing is called {min(named)!r}")
        return cls(found)

    @property
    def digest(self) -> str:
        """What tells them from others."""
        found = hashlib.sha256()
        for part, sides in sorted(self.sides.items()):
            found.update(f"{part} {sides.weight!r} {sides.outside!r}".encode())
            for side in (sides.outputs, sides.inputs):
                found.update(f"{side.dtype} {tuple(side.shape)}".encode())
                found.update(side.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]


def label(part: Part) -> str:
    """A part of a network by name."""
    return f"{part.name} {part.terms}"


def is_projectable(factor: Factor) -> bool:
    """Whether a weight has two sides to project."""
    if isinstance(factor, Convolution):
        return not factor.geometry.transposed and factor.geometry.groups == 1
    return isinstance(factor, Outer) and factor.work.groups == 1


def projection(directions: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """P (size, f) with orthonormal directions (f, r) for its first rows, but for their signs, and E P^T P = I.

    A side with no more features than `size` is only turned.
    """
    features, rank = directions.shape
    if size >= features:
        return torch.linalg.qr(directions, mode="complete").Q.mT
    drawn = torch.randn(size - rank, features, generator=generator, dtype=torch.float64).to(directions)
    drawn /= math.sqrt(size - rank)
    return torch.cat([directions.mT, drawn - (drawn @ directions) @ directions.mT])


Pieces = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def _sides(looked: Factor, held: Factor, length: float, total: float, rank: int, generator: torch.Generator) -> Sides:
    """Directions of some examples, and what of others, of this squared length, lies in them."""
    pieces = _pieces(looked)
    work, like = looked.work, looked.like
    assert work is not None
    outputs = _leading(lambda: ((a, g) for g, a in pieces()), work.outputs, rank, like, generator)
    inputs = _leading(pieces, work.inputs, rank, like, generator)
    length = max(length, torch.finfo(like.dtype).tiny)
    inside = [0.0, 0.0]
    for g, a in _pieces(held)():
        inside[0] += float(((g @ outputs).mT @ a).square().sum())
        inside[1] += float((g.mT @ (a @ inputs)).square().sum())
    return Sides(outputs, inputs, length / total, (max(0.0, 1 - inside[0] / length), max(0.0, 1 - inside[1] / length)))


def _pieces(factor: Factor) -> Pieces:
    """Cotangents (n, k, t, o) and inputs (n, 1, t, i), of as many examples at a time as there is room for patches."""

    def both(some: Factor) -> tuple[Tensor, Tensor]:
        found = some.outer() if isinstance(some, Convolution) else some
        assert isinstance(found, Outer)
        return found.cotangents[:, :, 0], found.inputs

    assert factor.work is not None
    each = factor.work.positions * factor.work.inputs * factor.like.element_size()
    step = max(1, ROOM // each)
    if step >= factor.examples:
        whole = [both(factor)]
        return lambda: whole
    return lambda: (both(factor.narrow(a, a + step)) for a in range(0, factor.examples, step))


def _leading(pieces: Pieces, features: int, rank: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Leading eigenvectors (f, r) of sum_n M_n^T M_n for M_n = over_n^T of_n, which is not formed, from (over, of)."""
    count = min(rank + MORE, features)
    found = torch.randn(features, count, generator=generator, device=generator.device, dtype=torch.float64).to(like)
    for _ in range(ROUNDS):
        found = torch.linalg.qr(found).Q
        found = sum(
            ((of.mT @ (over @ (over.mT @ (of @ found)))).sum((0, 1)) for over, of in pieces()),
            torch.zeros_like(found),
        )
    if not bool(found.isfinite().all()):
        raise ModelError(NOT_FINITE)
    return torch.linalg.svd(found, full_matrices=False).U[:, :rank].contiguous()
