"""Kernels on disk: computed tile by tile, by one process or many, and read back as a kernel."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError, StoreError, StoreWarning
from ntkit.kernel.base import Kernel, bounds
from ntkit.kernel.memory import checked_memory
from ntkit.kernel.store import (
    CHUNK,
    COMPANION,
    Layout,
    Store,
    Tile,
    check_place,
    check_range,
    check_room,
    check_type,
    full_disk,
    lock,
)
from ntkit.kernel.tasks import Workers, as_workers

# Pieces of work per worker at least, so that they finish at about the same time.
PIECES = 4
# Examples whose entries are kept with a matrix, and by how much of the largest they may differ when it goes on: between
# machines, devices and numbers of threads they are rounded differently.
SAMPLED = 3
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


class SavedKernel(Kernel):
    """A finished matrix on disk, read through memory maps: nothing is loaded before it is asked for.

    Every tile is checked against its checksum when a process first reads it. Made by `open_kernel` and `Kernel.save`.
    """

    def __init__(self, store: Store) -> None:
        """Read a finished store.

        Raises:
            InputError: if it holds sketched features.
            StoreError: if tiles are missing, or files of theirs are missing or cut short, which are named.
        """
        if holds_features(store):
            raise InputError(
                f"{store.path} holds sketched features, not a matrix: open them by ntkit.open_features(path)"
            )
        require_finished(store)
        self.store = store
        self.scalars = store.fact("scalars", int)

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.store.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries; half precision is read as float32, in which it can be computed with."""
        return torch.float64 if self.store.layout.dtype == "float64" else torch.float32

    @property
    def device(self) -> torch.device:  # noqa: D102
        return torch.device("cpu")

    @property
    def symmetric(self) -> bool:  # noqa: D102
        return self.store.layout.symmetric

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.store.path

    def tile(self, rows: slice, cols: slice) -> Tensor:
        """Entries from disk.

        Raises:
            StoreError: if a tile is missing or damaged.
        """
        r0, r1 = bounds(rows, self.shape[0])
        c0, c1 = bounds(cols, self.shape[1])
        out = self._empty(r1 - r0, c1 - c0)
        for (a, b), (c, d), block in self._blocks(r0, r1, c0, c1):
            # a copy of what is wanted alone: torch does not know read-only memory
            out[a - r0 : b - r0, c - c0 : d - c0] = torch.from_numpy(np.array(block))
        return out

    def _blocks(self, r0: int, r1: int, c0: int, c1: int) -> Iterator[tuple[tuple[int, int], tuple[int, int], Any]]:
        """What each file has of the rows r0:r1 and columns c0:c1, as views."""
        layout = self.store.layout
        for a, b, i in _cuts(r0, r1, layout.edge[0]):
            for c, d, j in _cuts(c0, c1, layout.edge[1]):
                mirrored = layout.symmetric and j < i
                whole = self.store.read((j, i) if mirrored else (i, j))
                top, left = i * layout.edge[0], j * layout.edge[1]
                yield (a, b), (c, d), (whole.T if mirrored else whole)[a - top : b - top, c - left : d - left]

    def __matmul__(self, other: Tensor | np.ndarray) -> Tensor:
        """Product with (columns,) or (columns, R). Cost: each stored tile is read once."""
        other = self._operand(other)
        out = other.new_zeros(self.shape[0], *other.shape[1:])
        for tile in self.store.layout.tiles():
            rows, cols = self.store.layout.slices(tile)
            block = torch.from_numpy(np.array(self.store.read(tile))).to(other.dtype)
            out[rows] += block @ other[cols]
            if self.symmetric and tile[0] != tile[1]:
                out[cols] += block.T @ other[rows]
        return out

    def identity(self) -> dict[str, str]:
        """That of the kernel that was saved, and the type on disk where entries have been rounded to it."""
        identity, stored = dict(self.store.identity), self.store.layout.dtype
        # older stores have no such fact; if nothing says what the entries were, they may have been rounded
        was = self.store.facts.get("precision", identity.get("precision"))
        return identity if was == stored else {**identity, "stored": stored}

    def verify(self) -> None:
        """Read every tile and compare it with its checksum.

        Raises:
            StoreError: naming every file that is damaged.
        """
        found = [trouble for tile in self.store.layout.tiles() if (trouble := self.store.damaged(tile)) is not None]
        if found:
            raise StoreError(
                f"{len(found)} tiles of {self.path} are damaged: {'; '.join(found[:10])}. Run the command that wrote "
                "it again: only these are computed"
            )


def open_kernel(path: str | os.PathLike[str]) -> SavedKernel:
    """A matrix that `Kernel.save` or `ntkit kernel --out K.zarr` has written.

    Raises:
        InputError: if there is none, or features are there instead.
        StoreError: if it is not finished.
    """
    return SavedKernel(Store.open(Path(path)))


def holds_features(store: Store) -> bool:
    """Whether a store is of features, by `FeatureMap.save`."""
    # not by its identity, which the matrix of their inner products may share
    return "seed" in store.facts


def require_finished(store: Store) -> None:
    """Refuse what cannot be read to its end.

    Raises:
        StoreError: if tiles are missing, or files of theirs are missing or cut short, which are named.
    """
    troubles = store.troubles()
    if not troubles:
        return
    damaged, count = [words for words in troubles.values() if words], len(store.layout.tiles())
    missing = len(troubles) - len(damaged)
    said = [f"{missing} of {count} tiles are missing"] if missing else []
    said += [f"{len(damaged)} of {count} tiles are damaged: {'; '.join(damaged[:10])}"] if damaged else []
    raise StoreError(
        f"{store.path} is not finished: {', '.join(said)}. Run the command that wrote it again, and it goes on from "
        "there"
    )


def save_kernel(
    kernel: Kernel,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    workers: int | Workers | Any | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SavedKernel:
    """`Kernel.save`."""
    crew = as_workers(workers)
    budget = checked_memory(memory) // crew.count
    layout = layout_of(kernel, str(dtype or kernel.dtype).removeprefix("torch."), budget)
    # the same budget again when it goes on, if that much is given: the size of chunks decides how sums are rounded
    facts = {"scalars": kernel.scalars, "memory": budget, "precision": str(kernel.dtype).removeprefix("torch.")}
    with begin(Path(path), layout, kernel.identity(), facts, lambda: corner(kernel)) as store:
        given = min(budget, store.fact("memory", int))

        def cut(tiles: list[Tile]) -> list[list[Tile]]:
            if tiles:
                warn_of_less(store, given, crew.count)
            return pieces(tiles, crew.count)

        fill(store, crew, partial(compute, memory=given), kernel, cut, progress)
    return SavedKernel(store)


def warn_of_less(store: Store, memory: int, workers: int) -> None:
    """Say so if a matrix goes on with less memory for each worker than it was begun with: it ends in other bits."""
    begun, (height, width) = store.fact("memory", int), store.layout.edge
    if memory < begun:
        warnings.warn(
            f"{store.path} was begun with {begun:,} bytes of memory for each worker and goes on with {memory:,}. "
            "Finished tiles are kept; sums of the others are rounded in another way, so that the matrix agrees with an "
            "uninterrupted run's to rounding, not to the last bit. Tiles keep their size "
            f"({height:,} x {width:,}) and are computed in strips where their rows do not fit, which takes longer. For "
            f"the same bits give {begun * workers:,} bytes in all; for smaller tiles choose another place, or remove "
            "this one and start again",
            StoreWarning,
            stacklevel=6,
        )


@contextmanager
def begin(
    place: Path,
    layout: Layout,
    identity: dict[str, str],
    facts: dict[str, Any],
    sample: Callable[[], Tensor],
    companion: Callable[[Path], None] | None = None,
) -> Iterator[Store]:
    """The store at a place, under its lock: the one that is there if it is of the same, or a new one.

    Args:
        place: its folder.
        layout: how it is cut, if it is new.
        identity: what the matrix is of.
        facts: what a reader wants to know besides.
        sample: computes a few entries, which are kept, and compared with those that were kept before.
        companion: writes to a path what readers of the tiles need besides. It is there before the store is.

    Raises:
        InputError: if the place cannot be used.
        StoreError: if what is there is of something else, another run is writing, the disk has no room, or these
            entries of a symmetric matrix do not fit into the type on disk.
    """
    check_place(place)
    if Store.exists(place):  # refused before anything is touched
        Store.open(place).require(layout, identity)
    else:
        check_room(place, layout)
    values = sample()
    if layout.symmetric:  # the diagonal is among them, and says how large entries are
        check_range(as_array(values), layout.dtype)
    if Store.exists(place):
        compare(Store.open(place), values)
    with lock(place) as run:
        if not Store.exists(place):
            if companion is not None:
                write_companion(place, companion)
            Store.create(place, layout, identity, {**facts, "sample": sampled(values)})
        store = Store.open(place)
        store.require(layout, identity)  # another run may have begun it meanwhile
        compare(store, values)
        if companion is not None and not (place / COMPANION).exists():  # somebody has lost it
            write_companion(place, companion)
        (place / "records").mkdir(exist_ok=True)
        store.sweep()
        store.run = run
        try:
            yield store
        finally:
            store.run = None


def write_companion(place: Path, write: Callable[[Path], None]) -> None:
    """Have it written whole or not at all. Under the lock.

    Raises:
        StoreError: if the disk is full.
    """
    whole = place / COMPANION
    partial = whole.with_name(f"{whole.name}.partial")
    with full_disk(place):
        write(partial)
        partial.replace(whole)


def corner(kernel: Kernel) -> Tensor:
    """The entries between the first few examples. Cost: up to 3 examples are captured."""
    k = kernel.scalars
    most = k * max(1, min(SAMPLED, 64 // k))
    rows, cols = (slice(0, min(size, most)) for size in kernel.shape)
    return next(iter(kernel.stripe(rows, [cols])))


def sampled(values: Tensor) -> list[list[float]]:
    """Up to 16 x 16 of some entries, evenly spaced."""
    rows, cols = (-(-size // 16) for size in values.shape)
    return values[::rows, ::cols].double().tolist()


def compare(store: Store, values: Tensor) -> None:
    """Refuse a store whose first entries are not those of the kernel that is to go on with it.

    The identity sees what code names. This sees whatever else there may be: files that a model reads, environment
    variables, compiled code.

    Raises:
        StoreError: if they differ by more than another machine's rounding would.
    """
    kept, found = (np.array(entries) for entries in (store.fact("sample", list), sampled(values)))
    largest, difference = max(np.abs(kept).max(), np.abs(found).max()), np.abs(kept - found).max()
    if difference > TOLERANCE.get(values.dtype, 0.1) * largest:
        raise StoreError(
            f"{store.path} is of something else and is left as it is: entries between the first examples differ by "
            f"{difference / largest:.1e} of the largest, though model, data and read-out look the same. Whatever the "
            "model depends on besides (files, the environment, compiled code) has changed. Choose another place, or "
            "remove it"
        )


def fill(
    store: Store,
    crew: Workers,
    function: Callable[[Any, tuple[Store, Any]], Iterator[None]],
    shared: Any,
    cut: Callable[[list[Tile]], Sequence[Any]],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Compute the tiles that a store lacks.

    Args:
        store: what is filled, under its lock.
        crew: who computes.
        function: of what is shared and of (store, task).
        shared: what all tasks need.
        cut: from tiles to tasks.
        progress: called with (tiles done, tiles in all).

    Raises:
        StoreError: if the disk is full.
    """
    todo, total = remaining(store), store.layout.count

    def tick() -> None:
        if progress is not None:
            progress(store.count_records(), total)

    tick()
    crew.run(function, shared, [(store, task) for task in cut(todo)], tick, place=store.path)


def begun(kernel: Kernel, place: Path, dtype: str) -> bool:
    """Whether the store at a place is of this kernel, as far as it goes."""
    store = Store.open(place)
    try:
        store.require(replace(store.layout, shape=kernel.shape, dtype=dtype), kernel.identity())
        compare(store, corner(kernel))
    except StoreError:
        return False
    return True


def layout_of(kernel: Kernel, dtype: str, memory: int, shape: tuple[int, int] | None = None) -> Layout:
    """How a kernel is cut for a budget of memory; with `shape`, one of another size like it.

    Raises:
        InputError: if it has no entries, or `dtype` is not one for a disk.
    """
    rows, cols = shape or kernel.shape
    if rows == 0 or cols == 0:
        raise InputError(f"a matrix on disk has entries: got shape {(rows, cols)}")
    check_type(dtype)
    most, unit = kernel.tile_rows(memory), math.lcm(kernel.scalars, CHUNK)
    if unit > most // 4:  # tiles too small for round numbers
        unit = kernel.scalars
    height = _even(rows, most, unit)
    return Layout(
        (rows, cols), (height, height if kernel.symmetric else _even(cols, most, unit)), dtype, kernel.symmetric
    )


def unfinished(store: Store) -> list[Tile]:
    """The tiles that are missing, contents of the others not read."""
    finished = set(store.finished())
    return [tile for tile in store.layout.tiles() if tile not in finished]


def remaining(store: Store) -> list[Tile]:
    """The tiles that are missing, and with a warning those that are damaged. Cost: reads all finished tiles."""
    finished, todo = set(store.finished()), []
    for tile in store.layout.tiles():
        trouble = store.damaged(tile)
        if trouble is not None:
            warnings.warn(f"{trouble}: it is computed again", StoreWarning, stacklevel=5)
            store.discard(tile)
        if trouble is not None or tile not in finished:
            todo.append(tile)
    return todo


def pieces(tiles: Sequence[Tile], workers: int) -> list[list[Tile]]:
    """Tiles as tasks, each of one row of tiles, whose examples are then captured once; the longest first."""
    stripes: dict[int, list[Tile]] = {}
    for tile in tiles:
        stripes.setdefault(tile[0], []).append(tile)
    # one alone does whole stripes; several should end together, at the price of capturing rows more often
    most = len(tiles) if workers == 1 else max(2, len(tiles) // (PIECES * workers))
    cut = [stripe[a : a + most] for stripe in stripes.values() for a in range(0, len(stripe), most)]
    return cut if workers == 1 else sorted(cut, key=len, reverse=True)


def compute(kernel: Kernel, task: tuple[Store, Sequence[Tile]], memory: int | None = None) -> Iterator[None]:
    """Compute tiles of one row of tiles and put them on disk; those that are there already are left out.

    Args:
        kernel: whose they are.
        task: the store, and which tiles.
        memory: bytes of working space, if less than the store was begun with.
    """
    store, tiles = task
    left = [tile for tile in tiles if not store.is_finished(tile)]
    if not left:
        return
    rows = store.layout.slices(left[0])[0]
    columns = [store.layout.slices(tile)[1] for tile in left]
    begun = store.fact("memory", int)
    if memory is None or memory >= begun:
        found = kernel.stripe(rows, columns, memory=begun)
    else:
        found = in_strips(kernel, rows, columns, memory)
    for tile, values in zip(left, found, strict=True):
        store.write(tile, as_array(values))
        yield


def in_strips(kernel: Kernel, rows: slice, columns: Sequence[slice], memory: int) -> Iterator[Tensor]:
    """Tiles of the same rows that were cut for more memory than there is: of as many rows at a time as it holds.

    Cost: the columns are captured once for every strip of rows.
    """
    height = max(1, kernel.tile_rows(memory) // kernel.scalars) * kernel.scalars
    if height >= rows.stop - rows.start:
        yield from kernel.stripe(rows, columns, memory=memory)
        return
    strips = [slice(a, min(a + height, rows.stop)) for a in range(rows.start, rows.stop, height)]
    for column in columns:
        out = torch.empty(rows.stop - rows.start, column.stop - column.start, dtype=kernel.dtype, device=kernel.device)
        mirrored = kernel.symmetric and column == rows
        for strip in strips:
            # on the diagonal what is right of the strip is below it as well: the tile equals its transpose
            parts = [strip, slice(strip.stop, rows.stop)] if mirrored else [column]
            parts = [part for part in parts if part.start < part.stop]
            for part, values in zip(parts, kernel.stripe(strip, parts, memory=memory), strict=True):
                _part(out, strip, rows, part, column).copy_(values)
                if mirrored:
                    _part(out, part, rows, strip, column).copy_(values.mT)
        yield out


def as_array(values: Tensor) -> np.ndarray:
    """Entries for NumPy, which has no bfloat16."""
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()


def _part(tile: Tensor, rows: slice, first: slice, cols: slice, second: slice) -> Tensor:
    """Rows and columns of the matrix, in a tile that begins at the first row and the first column of two others."""
    top, left = first.start, second.start
    return tile[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]


def _even(length: int, most: int, unit: int) -> int:
    """An edge of at most about `most` that is a multiple of `unit` and cuts a length into even pieces."""
    count = -(-length // max(most, unit))
    return -(-length // (count * unit)) * unit


def _cuts(start: int, stop: int, edge: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of start:stop that each lie in one tile, and which."""
    while start < stop:
        number = start // edge
        end = min(stop, (number + 1) * edge)
        yield start, end, number
        start = end
