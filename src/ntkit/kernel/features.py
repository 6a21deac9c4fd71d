"""Sketched features: D numbers per row whose inner products are, on average, the tangent kernel's entries.

Past some 50,000 examples a matrix is too large and features are not: N*D numbers, from which every use of a kernel
follows in N*D^2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.kernel.base import Kernel, bounds, strips
from ntkit.kernel.fidelity import relative_error
from ntkit.kernel.memory import default_memory
from ntkit.kernel.plan import FEWEST, human_bytes, sizes
from ntkit.kernel.saved import SAMPLED, begin, fill, holds_features, require_finished
from ntkit.kernel.store import COMPANION, Layout, Store, Tile, check_type
from ntkit.kernel.tasks import Workers, as_workers
from ntkit.tangent.identity import content
from ntkit.tangent.leading import Leading
from ntkit.tangent.sketch import Sketch

if TYPE_CHECKING:
    from ntkit.tangent.linearize import Tangent

# Bytes of activations and cotangents captured at once, and the most examples that makes.
CAPTURED, MOST = 128 * 2**20, 256
# Rows of a tile of features on disk.
EDGE = 2048
# Sizes chosen for a wanted error are multiples of this.
ROUND = 256
# Examples whose gradients' leading directions are kept.
LOOKED_AT = 24
# Features in memory may take three quarters of the machine's, six times the default budget.
MEMORY_SHARE = 6


@dataclass(frozen=True)
class FeatureMap:
    """A network's sketched features: the same random map for all examples that it is given.

    Attributes:
        tangent: the network.
        sketch: the random map of gradients to D numbers.
    """

    tangent: Tangent
    sketch: Sketch

    def __call__(self, x: Any, *, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Features (N*K, D) of the kernel's rows, example-major, or with `trace` (N, D).

        Cost: one forward and K backward passes, and about two passes over the entries of every example's gradient.

        Args:
            x: N examples.
            progress: called with (examples done, examples in all).

        Raises:
            InputError: if the examples are wrong.
            ModelError: if some of them take another path through the model than the first.
        """
        examples = self.tangent.examples(x)
        return self.rows(examples, 0, len(examples), progress)

    def rows(self, examples: Any, start: int, stop: int, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Features of examples start:stop, batch after batch. Memory: theirs, and one batch's."""
        out = None
        for a, b in self.batches(examples, start, stop):
            block = self.block(examples, a, b)
            k = len(block) // (b - a)
            if out is None:  # made once: blocks that are put together at the end would take as much again
                out = block.new_empty((stop - start) * k, block.shape[1])
            out[(a - start) * k : (b - start) * k] = block
            del block  # before the next one is made
            if progress is not None:
                progress(b, stop)
        assert out is not None
        return out

    @property
    def device(self) -> torch.device:
        """That of the network."""
        return self.tangent.device

    def to(self, device: torch.device | str) -> FeatureMap:
        """The same map of a copy of the network on another device."""
        return FeatureMap(self.tangent.to(device), replace(self.sketch))

    def rows_per_example(self, x: Any) -> int:
        """K, or 1 with `trace`."""
        return 1 if self.sketch.trace else self.tangent.anatomy(x).scalars

    def batches(self, examples: Any, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Examples that are captured together."""
        step = min(MOST, _fitting(self.tangent, examples))
        stop = len(examples) if stop is None else stop
        return ((a, min(a + step, stop)) for a in range(start, stop, step))

    @torch.no_grad()
    def block(self, examples: Any, start: int, stop: int) -> Tensor:
        """Features of examples start:stop, which are captured at once.

        Raises:
            ModelError: if they take another path through the model than the first, or a gradient is not finite.
        """
        derivatives = self.tangent.derivatives(examples, slice(start, stop))
        if tuple(derivatives.factors) != self.tangent.parts(examples):
            raise ModelError(
                f"examples {start} to {stop - 1} take another path through the model than the first ones, so that "
                "their features would not belong together. Sketch them apart, or use the exact kernel"
            )
        values = self.sketch.of(derivatives).flatten(0, 1)
        if not bool(torch.isfinite(values.sum())):
            raise ModelError("sketched features are NaN or infinite: a gradient overflows at these parameters")
        return values

    def identity(self, x: Any) -> dict[str, str]:
        """What the features of some examples depend on. Cost: reads the parameters and all examples once."""
        return {**self.described(), "rows": content(self.tangent.examples(x))}

    def described(self) -> dict[str, str]:
        """What the features of any examples depend on besides these. Cost: reads the parameters once."""
        kind = "trace features" if self.sketch.trace else "features"
        return {"kernel": kind, **self.tangent.identity(), "sketch": self.sketch.description}

    @classmethod
    def stored(cls, tangent: Tangent, path: str | os.PathLike[str]) -> FeatureMap:
        """The map that made the features at a path, for a run that goes on or for other examples, in any process.

        Args:
            tangent: the network that they are of.
            path: the folder, finished or not.

        Raises:
            InputError: if there are no features.
            StoreError: if they are of another network or read-out, or its directions are missing or others.
        """
        store = Store.open(Path(path))
        if not holds_features(store):
            raise InputError(f"{path} holds a matrix, not features")
        leading = _kept_directions(store)
        found = cls(tangent, Sketch(store.layout.shape[1], store.fact("seed", int), store.fact("trace", bool), leading))
        _require_same(store, found.described())
        return found

    def save(
        self,
        x: Any,
        path: str | os.PathLike[str],
        *,
        workers: int | Workers | Any | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> FeatureKernel:
        """Stream the features to disk, or go on where a killed run has stopped, as `Kernel.save` does.

        Args:
            x: N examples.
            path: the folder.
            workers: as in `Kernel.save`.
            progress: called with (tiles done, tiles in all).

        Raises:
            InputError: if the arguments cannot be used.
            StoreError: if `path` holds features of something else, the disk is full, or another run is writing there.
        """
        examples, crew = self.tangent.examples(x), as_workers(workers)
        name = str(self.tangent.dtype).removeprefix("torch.")
        check_type(name)
        k = self.rows_per_example(examples)
        edge = max(1, EDGE // k) * k
        layout = Layout((len(examples) * k, self.sketch.size), (edge, self.sketch.size), name, False)
        facts = {"scalars": k, "seed": self.sketch.seed, "trace": self.sketch.trace}
        few = min(SAMPLED, len(examples))
        directions = None if self.sketch.leading is None else self.sketch.leading.save
        sample = partial(self.block, examples, 0, few)
        with begin(Path(path), layout, self.identity(x), facts, sample, directions) as store:
            fill(store, crew, _compute, (self, x), lambda tiles: tiles, progress)
        return FeatureKernel(store, self)


def _kept_directions(store: Store) -> Leading | None:
    """The directions that lie beside features, if these keep any.

    Raises:
        StoreError: if they are missing or damaged, naming the file.
    """
    sketch, kept = store.identity.get("sketch", ""), store.path / COMPANION
    if "leading=" not in sketch:
        return None
    if not kept.is_file():
        raise StoreError(f"the directions that the features at {store.path} keep are missing: no file {kept}")
    try:
        found = Leading.load(kept)
    except InputError as error:
        trouble = str(error)
    else:
        if sketch.endswith(f"leading={found.digest}"):
            return found
        trouble = f"{kept} does not hold those that the features were made with: bytes have changed on disk"
    raise StoreError(
        f"the directions that the features at {store.path} keep are damaged ({trouble}). Put a copy of {kept} back, or "
        "remove that file and save again by the map that made the features, which writes it anew"
    )


def _compute(shared: tuple[FeatureMap, Any], task: tuple[Store, Tile]) -> Iterator[None]:
    """The features of one tile."""
    (features, x), (store, tile) = shared, task
    if store.is_finished(tile):
        return
    examples, k = features.tangent.examples(x), store.fact("scalars", int)
    rows = store.layout.slices(tile)[0]
    store.write(tile, features.rows(examples, rows.start // k, rows.stop // k).cpu().numpy())
    yield


@dataclass(frozen=True)
class SketchError:
    """How far a sketched kernel is from the exact one, measured on a sample of examples.

    Attributes:
        error: relative Frobenius error ||K_sketched - K||_F / ||K||_F of the whole kernel, estimated.
        standard_error: of that estimate, by the jackknife over examples.
        expected: the error that a dense Gaussian map of this size has on average, from the exact entries of the sample.
        size: D.
        examples: number of examples sampled.
    """

    error: float
    standard_error: float
    expected: float
    size: int
    examples: int

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"relative Frobenius error {self.error:.2g} +- {self.standard_error:.1g} of {self.size} sketched features, "
            f"on the exact kernel of {self.examples} examples (a dense Gaussian map's: {self.expected:.2g})"
        )


class FeatureKernel(Kernel):
    """The kernel Phi Phi^T of features (rows, D), in memory or on disk, which are read in blocks."""

    def __init__(self, source: Tensor | Store, map: FeatureMap | None = None, x: Any = None) -> None:
        """Wrap features.

        Args:
            source: (N*K, D), or a finished store of them.
            map: what made them, for features of other examples.
            x: the examples, where they are at hand: `error` draws from them.
        """
        self.source = source
        self.map = map
        self.x = x
        self.scalars = source.fact("scalars", int) if isinstance(source, Store) else 1
        if map is not None and x is not None:
            self.scalars = map.rows_per_example(x)

    @property
    def size(self) -> int:
        """D."""
        return (self.source.layout.shape if isinstance(self.source, Store) else self.source.shape)[1]

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        rows = (self.source.layout.shape if isinstance(self.source, Store) else self.source.shape)[0]
        return rows, rows

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        if isinstance(self.source, Tensor):
            return self.source.dtype
        return torch.float64 if self.source.layout.dtype == "float64" else torch.float32

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    @property
    def symmetric(self) -> bool:  # noqa: D102
        return True

    def features(self, rows: slice = slice(None)) -> Tensor:
        """The features of some rows, (rows, D)."""
        a, b = bounds(rows, self.shape[0])
        if isinstance(self.source, Tensor):
            return self.source[a:b]
        edge = self.source.layout.edge[0]
        out = self._empty(b - a, self.size)
        for i in range(a // edge, -(-b // edge)):
            first, last = max(a, i * edge), min(b, (i + 1) * edge)
            block = np.array(self.source.read((i, 0))[first - i * edge : last - i * edge])
            out[first - a : last - a] = torch.from_numpy(block)
        return out

    def tile(self, rows: slice, cols: slice) -> Tensor:  # noqa: D102
        return self.features(rows) @ self.features(cols).T

    def diagonal(self) -> Tensor:
        """Squared lengths of the features, in float32 at least: half precision overflows at lengths of 256."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        # in one piece from the start: small results between large temporaries would keep those from being given back
        out = torch.empty(self.shape[0], dtype=dtype, device=self.device)
        for strip in strips(self.shape[0]):
            torch.sum(self.features(strip).to(dtype).square(), 1, out=out[strip])
        return out

    def __matmul__(self, other: Tensor | np.ndarray) -> Tensor:
        """Phi (Phi^T other). Cost: N*D numbers read twice, 4 N D R FLOPs."""
        other = self._operand(other)
        inner = other.new_zeros(self.size, *other.shape[1:])
        for strip in strips(self.shape[0]):
            inner += self.features(strip).to(other.dtype).T @ other[strip]
        return torch.cat([self.features(strip).to(other.dtype) @ inner for strip in strips(self.shape[0])])

    def error(self, *, examples: int = 32, generator: torch.Generator, x: Any = None) -> SketchError:
        """Compare with exact entries between some examples.

        Args:
            examples: how many are drawn; their exact kernel is computed.
            generator: draws them.
            x: the examples of the features, where they were opened from disk.

        Raises:
            InputError: if the examples or the network are not at hand, or fewer than 2 are asked for.
        """
        x = self.x if x is None else x
        if self.map is None or x is None:
            raise InputError(
                "the error is measured on examples of these features: give x=..., and open them with a map"
            )
        drawn = self.map.tangent.examples(x)
        count = min(examples, len(drawn))
        if count < 2:
            raise InputError(f"the error of a sketch needs at least 2 examples: got {count}")
        k, trace = self.scalars, self.map.sketch.trace
        numbers = torch.randperm(len(drawn), generator=generator, device=generator.device)[:count].tolist()
        exact = _exact(self.map.tangent, drawn, numbers, trace=trace)
        rows = torch.cat([self.features(slice(i * k, (i + 1) * k)) for i in numbers]).double()
        error, standard_error = relative_error(
            _by_example((rows @ rows.T - exact).square(), k), _by_example(exact.square(), k), len(drawn), symmetric=True
        )
        expected = math.sqrt(_coefficient(exact, k, len(drawn)) / self.size)
        return SketchError(error, standard_error, expected, self.size, count)

    def identity(self) -> dict[str, str]:  # noqa: D102
        if isinstance(self.source, Store):
            return dict(self.source.identity)
        if self.map is None or self.x is None:
            return super().identity()
        return self.map.identity(self.x)


def open_features(path: str | os.PathLike[str], map: FeatureMap | None = None, x: Any = None) -> FeatureKernel:
    """Features that `FeatureMap.save` has written.

    Args:
        path: the folder.
        map: what made them, for features of other examples and for `error`.
        x: the examples, where they are at hand: `error` draws from them.

    Raises:
        InputError: if there are none.
        StoreError: if they are not finished, or not of this map and these examples.
    """
    store = Store.open(Path(path))
    if not holds_features(store):
        raise InputError(f"{path} holds a matrix, not features: open it by ntkit.open_kernel(path)")
    require_finished(store)
    if map is not None:
        _require_same(store, map.described() if x is None else map.identity(x))
    return FeatureKernel(store, map, x)


def _require_same(store: Store, asked: dict[str, str]) -> None:
    other = [name for name, value in asked.items() if store.identity.get(name) != value]
    if other:
        raise StoreError(
            f"the features at {store.path} are of something else (what differs: {', '.join(other)}): give the map that "
            "made them (FeatureMap.stored has it) and the examples that they are of, or neither"
        )


def features(
    tangent: Tangent,
    x: Any,
    *,
    size: int | None = None,
    error: float | None = None,
    trace: bool = False,
    leading: Leading | None = None,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureKernel:
    """Sketched features of a network's tangent kernel, D per row: Phi Phi^T is unbiased for the kernel.

    Args:
        tangent: the network, made by `linearize`.
        x: N examples.
        size: D. The relative error falls as 1/sqrt(D).
        error: instead of `size`: a wanted relative Frobenius error, for which D is chosen from the exact kernel of 32
            examples; never more than it takes for none at all (P, or with `trace` K times that).
        trace: features of the trace kernel, one row per example; the read-out's K scalars have sketches of their own.
        leading: directions that the sketch keeps, by `Leading.of`; those of the first examples by default, and none in
            half precision. They make several times less noise for convolutional networks, and the gradients of weights
            that they hold are not formed. `FeatureMap(tangent, Sketch(size, seed))` does without.
        generator: of the random map (one seed is taken) and of the examples that are looked at for `error`.
        progress: called with (examples done, examples in all).

    Raises:
        InputError: if the arguments cannot be used, or the features do not fit into memory.
        ModelError: if the model has no tangent kernel on them.
    """
    if (size is None) == (error is None):
        raise InputError(f"give either size= or error=: got size={size!r}, error={error!r}")
    if size is None:
        assert error is not None
        size = size_for(tangent, x, error, trace=trace, generator=generator)
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device).item())
    made = FeatureMap(tangent, Sketch(size, seed, trace, leading))
    _require_room(made, x, size, error)
    if leading is None and tangent.dtype.itemsize >= 4:
        few = min(LOOKED_AT, _fitting(tangent, tangent.examples(x)))
        leading = Leading.of(tangent, x, examples=few, generator=torch.Generator().manual_seed(seed))
        made = replace(made, sketch=replace(made.sketch, leading=leading))
    return FeatureKernel(made(x, progress=progress), made, x)


def size_for(
    tangent: Tangent, x: Any, error: float, *, trace: bool = False, examples: int = 32, generator: torch.Generator
) -> int:
    """The number of features D for a wanted relative Frobenius error, from the exact kernel of some examples.

    The variance of a sketched entry is at most (K_ii K_jj + K_ij^2) / D, so that D is what makes its mean over pairs
    the squared error times the mean of K_ij^2. A sketch as long as the gradients is exact: no more are ever chosen.

    Raises:
        InputError: if the error is not a positive number, or there are fewer than 2 examples.
    """
    if not error > 0:
        raise InputError(f"a wanted relative error is a positive number: got {error!r}")
    drawn = tangent.examples(x)
    count = min(examples, len(drawn))
    if count < 2:
        raise InputError(f"the size of a sketch is chosen on at least 2 examples: got {count}")
    numbers = torch.randperm(len(drawn), generator=generator, device=generator.device)[:count].tolist()
    exact = _exact(tangent, drawn, numbers, trace=trace)
    k = len(exact) // count
    most = tangent.count * (tangent.anatomy(drawn).scalars if trace else 1)
    coefficient = _coefficient(exact, k, len(drawn))
    size = most if coefficient >= most * error**2 else int(coefficient / error**2 + 1)
    return -(-size // ROUND) * ROUND


def _fitting(tangent: Tangent, examples: Any) -> int:
    """How many examples are captured together: what fits, and a few at least."""
    itemsize = torch.empty(0, dtype=tangent.dtype).element_size()
    captured = sizes(tangent.anatomy(examples), itemsize, tangent.count * itemsize).captured
    return max(FEWEST, CAPTURED // (captured + 1))


def _require_room(made: FeatureMap, x: Any, size: int, error: float | None) -> None:
    """Refuse features that this machine cannot hold, before any is made.

    Raises:
        InputError: with what they would take, and what to do.
    """
    rows = made.rows_per_example(x) * len(made.tangent.examples(x))
    needed = rows * size * torch.empty(0, dtype=made.tangent.dtype).element_size()
    if needed <= MEMORY_SHARE * default_memory():
        return
    asked = "" if error is None else f", which the error {error:.3g} asks for,"
    raise InputError(
        f"{size:,} features{asked} of {rows:,} rows take {human_bytes(needed)}, more than three quarters of this "
        "machine's memory: choose fewer, put them on disk (FeatureMap(tangent, Sketch(size, seed)).save(x, path)), or "
        "take the exact kernel"
    )


def _exact(tangent: Tangent, examples: Any, numbers: Sequence[int], *, trace: bool) -> Tensor:
    with torch.no_grad():
        found = tangent.derivatives(examples, numbers)
        return found.gram(found, trace=trace).double()


def _coefficient(exact: Tensor, k: int, population: int) -> float:
    """D times the squared relative error that a sketch of D features has on average."""
    diagonal = exact.diagonal()
    variance = torch.outer(diagonal, diagonal) + exact.square()
    return relative_error(_by_example(variance, k), _by_example(exact.square(), k), population, symmetric=True)[0] ** 2


def _by_example(entries: Tensor, k: int) -> Tensor:
    """Sums over the K x K entries of each pair of examples."""
    n = len(entries) // k
    return entries.view(n, k, n, k).sum((1, 3))
