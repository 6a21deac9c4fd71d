"""Kernels on disk: computed tile by tile, by one process or many, and read back as a kernel."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError, StoreError, StoreWarning
from ntkit.kernel.base import Kernel, bounds
from ntkit.kernel.memory import checked_memory
from ntkit.kernel.store import CHUNK, DTYPES, Layout, Store, Tile
from ntkit.kernel.tasks import Workers, as_workers

# Pieces of work per worker at least, so that they finish at about the same time.
PIECES = 4


class SavedKernel(Kernel):
    """A finished matrix on disk, read through memory maps: nothing is loaded before it is asked for.

    Every tile is checked against its checksum when a process first reads it. Made by `open_kernel` and `Kernel.save`.
    """

    def __init__(self, store: Store) -> None:
        """Read a finished store.

        Raises:
            StoreError: if tiles are missing.
        """
        missing = len(store.layout.tiles()) - len(store.finished())
        if missing:
            raise StoreError(
                f"{store.path} is not finished: {missing} of {len(store.layout.tiles())} tiles are missing. Run the "
                "command that wrote it again, and it goes on from there"
            )
        self.store = store
        self.scalars = int(store.facts["scalars"])

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

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with (columns,) or (columns, R). Cost: each stored tile is read once."""
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
            return super().__matmul__(other)  # which says what is wrong
        other = other.to(self.device, torch.promote_types(self.dtype, other.dtype))
        out = other.new_zeros(self.shape[0], *other.shape[1:])
        for tile in self.store.layout.tiles():
            rows, cols = self.store.layout.slices(tile)
            block = torch.from_numpy(np.array(self.store.read(tile))).to(other.dtype)
            out[rows] += block @ other[cols]
            if self.symmetric and tile[0] != tile[1]:
                out[cols] += block.T @ other[rows]
        return out

    def identity(self) -> dict[str, str]:  # noqa: D102
        return dict(self.store.identity)

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
        InputError: if there is none.
        StoreError: if it is not finished.
    """
    return SavedKernel(Store.open(Path(path)))


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
    # the same budget again when it goes on: the size of chunks decides how sums are rounded
    store = begin(Path(path), layout, kernel.identity(), {"scalars": kernel.scalars, "memory": budget})
    fill(store, crew, compute, kernel, lambda tiles: pieces(tiles, crew.count), progress)
    return SavedKernel(store)


def begin(place: Path, layout: Layout, identity: dict[str, str], facts: dict[str, Any]) -> Store:
    """The store at a place: the one that is there if it is of the same, or a new one.

    Raises:
        InputError: if the place cannot be used.
        StoreError: if what is there is of something else, or the disk has no room.
    """
    if not Store.exists(place):
        return Store.create(place, layout, identity, facts)
    store = Store.open(place)
    store.require(layout, identity)
    return store


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
        StoreError: if another run is writing, or the disk is full.
    """
    with store.locked():
        store.sweep()
        todo, total = remaining(store), len(store.layout.tiles())

        def tick() -> None:
            if progress is not None:
                progress(store.count_records(), total)

        tick()
        crew.run(function, shared, [(store, task) for task in cut(todo)], tick)


def begun(kernel: Kernel, place: Path, dtype: str) -> bool:
    """Whether the store at a place is of this kernel, as far as it goes."""
    store = Store.open(place)
    try:
        store.require(replace(store.layout, shape=kernel.shape, dtype=dtype), kernel.identity())
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
    if dtype not in DTYPES:
        raise InputError(f"a matrix on disk is of one of the types {', '.join(DTYPES)}: got {dtype}")
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


def compute(kernel: Kernel, task: tuple[Store, Sequence[Tile]]) -> Iterator[None]:
    """Compute tiles of one row of tiles and put them on disk; those that are there already are left out."""
    store, tiles = task
    finished = set(store.finished())
    left = [tile for tile in tiles if tile not in finished]
    if not left:
        return
    rows = store.layout.slices(left[0])[0]
    columns = [store.layout.slices(tile)[1] for tile in left]
    for tile, values in zip(left, kernel.stripe(rows, columns, memory=store.facts["memory"]), strict=True):
        store.write(tile, values.cpu().numpy())
        yield


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
