"""A matrix on disk in tiles that are written whole, each with a checksum: what a killed run resumes from.

A store is one Zarr v3 array that any Zarr library reads. Each tile is one shard, and a shard is written by one owner in
one go (several writers to a shard lose data silently). Beside the shards lie completion records, one small file for
each finished tile, written after its shard is safely on disk. A tile without a valid record does not exist.

    K.zarr/zarr.json            the array: shape, type, tiles, and what the matrix is of, with a SHA-256 of all that
    K.zarr/c/3/5                the shard of tile (3, 5); of a symmetric matrix only tiles (i, j) with i <= j
    K.zarr/records/3-5.json     its size and SHA-256
    K.zarr/lock                 held by the run that writes
    K.zarr/run                  which run that is; held while one of its processes puts a tile in its place

A process can outlive the run that started it, for a second or until its task ends. What it still writes has a name of
its own, and it finds out that another run has come before anything gets into place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import numpy as np

from ntkit.errors import InputError, StoreError

if TYPE_CHECKING:
    import zarr

Tile = tuple[int, int]
T = TypeVar("T")

# Format 1 is read, and not gone on with: its identity of a model leaves out attributes, helpers and globals.
FORMAT, READABLE = 2, (1, 2)
# Rows of an inner chunk of a shard: what another program reads at least when it reads anything.
CHUNK = 256
DTYPES = ("float16", "float32", "float64")
# What the checksum of zarr.json is of, besides our own attributes. Other programs may add attributes of theirs, and how
# Zarr writes what is optional differs between its versions.
COVERED = (
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
)  # fmt: skip
# What may lie beside the tiles of a new store, and is written before there is one.
COMPANION = "leading.safetensors"


@dataclass(frozen=True)
class Layout:
    """How a matrix is cut.

    Attributes:
        shape: rows and columns of the matrix.
        edge: rows and columns of a tile; those at the end are smaller.
        dtype: of the entries on disk: float16, float32 or float64.
        symmetric: whether only tiles on and above the diagonal are stored.
    """

    shape: tuple[int, int]
    edge: tuple[int, int]
    dtype: str
    symmetric: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Number of tiles along each axis."""
        return -(-self.shape[0] // self.edge[0]), -(-self.shape[1] // self.edge[1])

    def tiles(self) -> list[Tile]:
        """Every tile that is stored, row by row."""
        rows, cols = self.grid
        return [(i, j) for i in range(rows) for j in range(i if self.symmetric else 0, cols)]

    def slices(self, tile: Tile) -> tuple[slice, slice]:
        """The rows and columns of the matrix that a tile covers."""
        (i, j), (r, c) = tile, self.edge
        return slice(i * r, min((i + 1) * r, self.shape[0])), slice(j * c, min((j + 1) * c, self.shape[1]))

    @property
    def chunk(self) -> tuple[int, int]:
        """The inner chunks of a shard: strips of its full width, so that their rows follow each other in the file."""
        rows = math.gcd(self.edge[0], CHUNK)
        return rows if rows >= CHUNK // 8 else self.edge[0], self.edge[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles on disk, but for a few hundred of each for its index and record."""
        total = 0
        for i in range(self.grid[0]):  # row by row: a small budget makes millions of tiles
            rows = self.slices((i, i))[0]
            height = -(-(rows.stop - rows.start) // self.chunk[0]) * self.chunk[0]
            total += height * self.stripe(i)
        return total * self.edge[1] * np.dtype(self.dtype).itemsize

    def stripe(self, row: int) -> int:
        """Number of tiles that are stored of a row of tiles."""
        return max(0, self.grid[1] - (row if self.symmetric else 0))

    @property
    def count(self) -> int:
        """Number of all tiles."""
        return sum(map(self.stripe, range(self.grid[0])))


@dataclass(frozen=True)
class Record:
    """That a tile is finished.

    Attributes:
        tile: which one.
        identity: SHA-256 of what the matrix is of.
        bytes: size of the shard.
        sha256: of the shard.
    """

    tile: Tile
    identity: str
    bytes: int
    sha256: str


class Store:
    """A matrix on disk; made by `Store.create` or `Store.open`, which read no tile."""

    def __init__(
        self, path: Path, layout: Layout, identity: Mapping[str, str], facts: Mapping[str, Any], format: int = FORMAT
    ) -> None:
        """Describe a store that is there.

        Args:
            path: its folder.
            layout: how it is cut.
            identity: what the matrix is of, in named parts, each a digest or a few words.
            facts: whatever a reader wants to know besides.
            format: of its files.
        """
        self.path = path.absolute()  # workers, and whoever unpickles this, may be in other working directories
        self.layout = layout
        self.identity = dict(identity)
        self.facts = dict(facts)
        self.format = format
        self.run: str | None = None  # that of the lock which is held
        self._verified: set[Tile] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Another process makes its own encoder."""
        return {name: value for name, value in self.__dict__.items() if name != "_encoder"} | {"_verified": set()}

    # ------------------------------------------------------------ making and finding

    @classmethod
    def create(
        cls, path: Path, layout: Layout, identity: Mapping[str, str], facts: Mapping[str, Any] | None = None
    ) -> Store:
        """A new store without tiles, or the rest of one whose making was broken off. Under the lock.

        Raises:
            InputError: if something else is there already, or the parent folder is not.
            StoreError: if the disk has no room for it all.
        """
        check_place(path)
        check_room(path, layout)
        found = cls(path, layout, identity, facts or {})
        described = {"format": FORMAT, "symmetric": layout.symmetric, "identity": found.identity, "facts": found.facts}
        _, kept = _in_memory(layout, {"ntkit": described})
        described["sha256"] = _checksum(json.loads(kept["zarr.json"].to_bytes()))
        with full_disk(path):
            (path / "records").mkdir(parents=True, exist_ok=True)
            found.sweep()
            # the description comes last: where it is, everything is
            _create(path, layout, {"ntkit": described})
        return found

    @classmethod
    def open(cls, path: Path) -> Store:
        """A store that is there, finished or not.

        Raises:
            InputError: if there is none.
            StoreError: if it was written by a newer version, or its description is damaged.
        """
        if not path.exists():
            raise InputError(f"there is no matrix at {path}")
        try:
            content = (path / "zarr.json").read_bytes()
        except OSError as error:
            raise InputError(f"{path} is not a matrix written by ntkit ({type(error).__name__}: {error})") from error
        try:
            found = json.loads(content)
            described = found["attributes"]["ntkit"]
            format = described["format"]
            if format in READABLE:  # what a newer one has a checksum of is not known here
                _check_sum(found)
                return cls(path, _layout(found), described["identity"], described["facts"], format)
        except (ValueError, KeyError, TypeError) as error:
            _refuse(path, error)
        raise StoreError(f"{path} has format {format}, and this version of ntkit reads formats up to {FORMAT}")

    def fact(self, name: str, kind: type[T]) -> T:
        """What the store says of something.

        Raises:
            StoreError: if it does not say, or not in that type.
        """
        found = self.facts.get(name)
        if not isinstance(found, kind):
            _refuse(self.path, TypeError(f"{name!r} is {found!r}, expected {kind.__name__}"))
        return found

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether an array has been begun at a place."""
        return (path / "zarr.json").is_file()

    def require(self, layout: Layout, identity: Mapping[str, str]) -> None:
        """Refuse to go on with a store of another matrix.

        Raises:
            StoreError: naming what differs, or if an older version has written it.
        """
        if self.format != FORMAT:
            raise StoreError(
                f"{self.path} was begun by an older version of ntkit (format {self.format}, now {FORMAT}), which knew "
                "less of a model to tell it from another. It can be read, and not gone on with: choose another place, "
                "or remove it"
            )
        other = [name for name in {**self.identity, **identity} if self.identity.get(name) != identity.get(name)]
        if other:
            differing = "; ".join(
                f"{name}: {_short(self.identity.get(name))} on disk, {_short(identity.get(name))} now" for name in other
            )
            raise StoreError(
                f"{self.path} is of something else and is left as it is ({differing}). Choose another place, remove "
                "it, or go back to what it was made of"
            )
        here = self.layout
        if (here.shape, here.dtype, here.symmetric) != (layout.shape, layout.dtype, layout.symmetric):
            raise StoreError(
                f"{self.path} holds {here.shape} entries of {here.dtype}, and {layout.shape} of {layout.dtype} were "
                "asked for: choose another place, or remove it"
            )

    # ------------------------------------------------------------ writing

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The one run that may write, for as long as it lives; the system gives the lock back if it is killed.

        Raises:
            StoreError: if another run has it.
        """
        with lock(self.path) as self.run:
            try:
                yield
            finally:
                self.run = None

    def write(self, tile: Tile, values: np.ndarray) -> None:
        """Put a tile on disk, then its record. Values are converted to the type of the store.

        Both are written under other names first, and put in place together.

        Raises:
            StoreError: if they do not fit into that type, are not finite, the disk is full, or another run has come
                since this process was given its task; nothing is damaged then.
        """
        rows, cols = self.layout.slices(tile)
        assert values.shape == (rows.stop - rows.start, cols.stop - cols.start)
        with np.errstate(over="ignore", under="ignore"):  # said in words below
            converted = values.astype(self.layout.dtype, copy=False)
        if not np.isfinite(converted).all():
            check_range(values, self.layout.dtype)
            raise StoreError(f"tile {tile} has entries that are not finite")
        # of a symmetric matrix the diagonal says how large entries are; those far from it may be as small as they like
        if converted is not values and (not self.layout.symmetric or tile[0] == tile[1]):
            check_range(values, self.layout.dtype)
        record, shard = self._record_path(tile), self._shard(tile)
        with full_disk(self.path), self._partial(shard) as whole, self._partial(record) as note:
            content = self._encoded(tile, converted)
            _write(whole, content)
            described = Record(tile, self.digest, len(content), hashlib.sha256(content).hexdigest())
            _write(note, json.dumps(asdict(described)).encode())
            with _turn(self.path) as file:
                self._check_run(file)
                record.unlink(missing_ok=True)  # never the record of one tile beside another one
                whole.replace(shard)
                note.replace(record)
        self._verified.add(tile)

    @contextmanager
    def _partial(self, path: Path) -> Iterator[Path]:
        """A name for a file until it is whole; what has not been put in its place is removed."""
        assert self.run is not None, "a store is written under its lock"
        with _turn(self.path) as file:  # a folder that another run has removed is not made again
            self._check_run(file)
            path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{self.run}.{uuid.uuid4().hex}.partial")
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def _check_run(self, file: TextIO) -> None:
        if file.read() != self.run:
            raise StoreError(
                f"another run has begun to write to {self.path}: this process is of an earlier one, and stops"
            )

    def _encoded(self, tile: Tile, values: np.ndarray) -> memoryview:
        """The shard of a tile, as Zarr writes it."""
        array, kept = self._encoder
        rows, cols = self.layout.slices(tile)
        array[rows, cols] = values
        return memoryview(kept.pop(f"c/{tile[0]}/{tile[1]}").as_numpy_array()).cast("B")

    @cached_property
    def _encoder(self) -> tuple[zarr.Array, dict[str, Any]]:
        """The array without its shards, in memory, and what that holds."""
        return _in_memory(self.layout, {})

    def discard(self, tile: Tile) -> None:
        """Remove a tile, its record first."""
        self._record_path(tile).unlink(missing_ok=True)
        self._shard(tile).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed run has left half-written. Only for the run that holds the lock."""
        for pattern in ("*.partial", "c/**/*.partial", "records/*.partial"):
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)

    # ------------------------------------------------------------ reading

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the identity and the layout."""
        described = json.dumps([self.identity, asdict(self.layout)], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def finished(self) -> list[Tile]:
        """Tiles with a record and a shard of the recorded size; contents are not read."""
        return [tile for tile in self.layout.tiles() if self.is_finished(tile)]

    def is_finished(self, tile: Tile) -> bool:
        """Whether one tile is among them: a task asks for its own, as there may be many others."""
        return self._trouble(tile) is None

    def troubles(self) -> dict[Tile, str | None]:
        """Tiles that are not finished, and what is wrong with them; None for those without a record."""
        found = {tile: self._trouble(tile) for tile in self.layout.tiles()}
        return {
            tile: trouble if self._record_path(tile).exists() else None
            for tile, trouble in found.items()
            if trouble is not None
        }

    def count_records(self) -> int:
        """How many tiles have a record, valid or not: cheap, for a progress bar."""
        folder = self.path / "records"
        return sum(name.endswith(".json") for name in os.listdir(folder)) if folder.is_dir() else 0

    def damaged(self, tile: Tile) -> str | None:
        """What is wrong with a tile that has a record, by reading all of it; None if nothing is, or it has none."""
        if not self._record_path(tile).exists():
            return None
        trouble = self._trouble(tile)
        if trouble is None and tile not in self._verified:
            record, shard = self._record(tile), self._shard(tile)
            assert record is not None
            if _sha256(shard) != record.sha256:
                return f"{shard} does not have the checksum of its record: bytes have changed on disk"
            self._verified.add(tile)
        return trouble

    def read(self, tile: Tile) -> np.ndarray:
        """A tile's entries as a read-only view of its file, verified once by each process.

        Raises:
            StoreError: if the tile is missing or damaged, naming its file.
        """
        if not self._record_path(tile).exists():
            raise StoreError(f"tile {tile} of {self.path} has not been computed: run the same command again")
        trouble = self.damaged(tile)
        if trouble is not None:
            raise StoreError(f"{trouble}. Run the command that wrote {self.path} again: only this tile is computed")
        rows, cols = self.layout.slices(tile)
        strip, width = self.layout.chunk
        height = -(-(rows.stop - rows.start) // strip) * strip
        shape = (height, width)
        # the strips of a shard lie one behind the other from its first byte on, as its index says
        whole = np.memmap(self._shard(tile), dtype=f"<f{np.dtype(self.layout.dtype).itemsize}", mode="r", shape=shape)
        self._check_index(tile, height // strip)
        return whole[: rows.stop - rows.start, : cols.stop - cols.start]

    def _check_index(self, tile: Tile, strips: int) -> None:
        """The file's own table of where each strip begins must be what the view of it takes for granted."""
        strip, width = self.layout.chunk
        size = strip * width * np.dtype(self.layout.dtype).itemsize
        entries = self.layout.edge[0] // strip
        with self._shard(tile).open("rb") as file:
            file.seek(-(16 * entries + 4), os.SEEK_END)
            index = np.frombuffer(file.read(16 * entries), "<u8").reshape(entries, 2)
        expected = np.stack([np.arange(strips) * size, np.full(strips, size)], 1)
        if not np.array_equal(index[:strips], expected):
            raise StoreError(f"{self._shard(tile)} keeps its rows in another order than ntkit writes them")

    def _trouble(self, tile: Tile) -> str | None:
        """What is wrong with a tile as far as can be told without reading it."""
        record, shard = self._record(tile), self._shard(tile)
        if record is None:
            return f"{self._record_path(tile)} is missing or cannot be read"
        if record.identity != self.digest or record.tile != tile:
            return f"{self._record_path(tile)} belongs to another matrix"
        if not shard.is_file():
            return f"{shard} is missing"
        if shard.stat().st_size != record.bytes:
            return f"{shard} has {shard.stat().st_size:,} bytes where its record says {record.bytes:,}"
        return None

    def _record(self, tile: Tile) -> Record | None:
        try:
            found = json.loads(self._record_path(tile).read_text())
            i, j = found["tile"]
            return Record((i, j), found["identity"], found["bytes"], found["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _record_path(self, tile: Tile) -> Path:
        return self.path / "records" / f"{tile[0]}-{tile[1]}.json"

    def _shard(self, tile: Tile) -> Path:
        return self.path / "c" / str(tile[0]) / str(tile[1])


@contextmanager
def lock(path: Path) -> Iterator[str]:
    """The right to write at a place, for the one run that has it; its name.

    Raises:
        StoreError: if another run has it.
    """
    with full_disk(path):
        path.mkdir(exist_ok=True)
        with (path / "lock").open("a+") as file:
            if not _lock(file) or not _is_there(file, path / "lock"):
                raise StoreError(f"another run is writing to {path}: wait for it, or stop it")
            name = uuid.uuid4().hex
            (path / "run").touch()
            with _turn(path) as run:  # from here on, what is left of earlier runs puts nothing in place
                run.truncate()
                run.write(name)
                run.flush()  # before others may read it
            yield name


@contextmanager
def _turn(path: Path) -> Iterator[TextIO]:
    """The file with the name of the run that may write, held."""
    try:
        file = (path / "run").open("r+")
    except FileNotFoundError as error:
        raise StoreError(f"{path} was removed while a process was writing to it") from error
    with file:
        _lock(file, wait=True)
        yield file


def check_place(path: Path) -> None:
    """Refuse a place where a matrix can be neither begun nor continued.

    Raises:
        InputError: if the parent folder does not exist or cannot be written, or something else is there.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"the folder {parent} does not exist: make it, or choose another place")
    if not os.access(path if path.is_dir() else parent, os.W_OK):
        raise InputError(f"cannot write to {path if path.is_dir() else parent}: choose another place")
    if path.exists() and not Store.exists(path) and not _is_left_over(path):
        raise InputError(f"{path} exists and is not a matrix written by ntkit: choose another place, or remove it")


def check_type(dtype: str) -> None:
    """Refuse what no disk takes.

    Raises:
        InputError: with the types that there are.
    """
    if dtype not in DTYPES:
        raise InputError(
            f"what is on disk is of one of the types {', '.join(DTYPES)}: got {dtype}. Give one of them, dtype=..., or "
            "convert the model"
        )


def check_range(values: np.ndarray, dtype: str) -> None:
    """Refuse entries that a smaller type does not hold: some too large, or all too small.

    Raises:
        StoreError: with the largest.
    """
    there, here = np.finfo(dtype), np.finfo(values.dtype)
    if here.max <= there.max and here.tiny >= there.tiny:
        return
    most, least = float(there.max), float(there.tiny)
    largest = max(abs(float(values.min())), abs(float(values.max())))  # NaN is not for this to judge
    wider = "float32" if dtype == "float16" else "float64"
    if most < largest < math.inf:
        raise StoreError(
            f"entries up to {largest:.3g} do not fit into {dtype} (largest {most:.3g}): store {wider}, or scale the "
            "kernel, (1e-3 * kernel).save"
        )
    if 0 < largest < least:
        raise StoreError(
            f"entries of at most {largest:.3g} are lost in {dtype}, which has all its digits from {least:.3g} on: "
            f"store {wider}, or scale the kernel, (1e3 * kernel).save"
        )


def check_room(path: Path, layout: Layout) -> None:
    """Refuse a disk that is too small.

    Raises:
        StoreError: with the bytes that are needed.
    """
    free = shutil.disk_usage(path.absolute().parent).free
    if layout.nbytes > free:
        raise StoreError(
            f"{path} needs {layout.nbytes:,} bytes of disk and {free:,} are free: make room, choose another disk, "
            "or store a smaller type (float16 or float32)"
        )


def _is_left_over(path: Path) -> bool:
    """Whether a folder holds what a run leaves that is killed while it makes a store, and nothing else."""
    if not path.is_dir():
        return False
    names = {n for n in os.listdir(path) if not (n.startswith("zarr.") and n.endswith(".partial"))}
    own = {"lock", "run", "records"}
    if "run" in names:  # a run has been here; without it the file may be anybody's
        own |= {COMPANION, f"{COMPANION}.partial"}
    return names <= own and not ("records" in names and os.listdir(path / "records"))


# A strip that happens to equal the fill value is written too: the length of a file must not depend on its content.
_WHOLE: Any = {"write_empty_chunks": True}


def _zarr() -> Any:
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise InputError("matrices on disk need zarr >= 3 (Python >= 3.11): pip install 'ntkit[scale]'") from error
    if int(zarr.__version__.partition(".")[0]) < 3:
        raise InputError(f"matrices on disk need zarr >= 3: got {zarr.__version__}; pip install 'ntkit[scale]'")
    return zarr


def _create(place: Any, layout: Layout, attributes: dict[str, Any]) -> zarr.Array:
    """The array without its shards, in a folder or a store of Zarr's."""
    return _zarr().create_array(
        place, shape=layout.shape, shards=layout.edge, chunks=layout.chunk, dtype=layout.dtype,
        compressors=None, fill_value=float("nan"), config=_WHOLE, attributes=attributes,
    )  # fmt: skip


def _in_memory(layout: Layout, attributes: dict[str, Any]) -> tuple[zarr.Array, dict[str, Any]]:
    """The same in memory, and what that holds."""
    kept: dict[str, Any] = {}
    return _create(_zarr().storage.MemoryStore(kept), layout, attributes), kept


def _checksum(found: Mapping[str, Any]) -> str:
    """SHA-256 of what a zarr.json says of a matrix, however it is written down."""
    described = {name: value for name, value in found["attributes"]["ntkit"].items() if name != "sha256"}
    covered = [{name: found.get(name) for name in COVERED}, described]
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _check_sum(found: Mapping[str, Any]) -> None:
    """Compare a zarr.json with its checksum, which older versions did not write.

    Raises:
        ValueError: if it is another.
    """
    if found["attributes"]["ntkit"].get("sha256") not in (None, _checksum(found)):
        raise ValueError("it does not have its checksum: bytes have changed on disk")


def _layout(found: Mapping[str, Any]) -> Layout:
    """How a matrix is cut, from its zarr.json.

    Raises:
        ValueError: if that is nothing that ntkit writes; KeyError or TypeError: if it is not said.
    """
    shape, edge = found["shape"], found["chunk_grid"]["configuration"]["chunk_shape"]
    dtype, symmetric = found["data_type"], found["attributes"]["ntkit"]["symmetric"]
    numbers = [*shape, *edge]
    if len(shape) != 2 or len(edge) != 2 or not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"a matrix of shape {shape} in tiles of {edge}, expected two positive numbers for each")
    if dtype not in DTYPES or not isinstance(symmetric, bool):
        raise ValueError(f"entries of type {dtype!r}, symmetric={symmetric!r}")
    return Layout((shape[0], shape[1]), (edge[0], edge[1]), dtype, symmetric)


def _refuse(path: Path, error: Exception) -> NoReturn:
    """Say of a zarr.json that cannot be believed whether it is damaged or somebody else's, and what to do.

    Raises:
        InputError: if nothing else of a matrix is there.
        StoreError: if it is damaged.
    """
    said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    if (path / "records").is_dir():
        raise StoreError(
            f"{path / 'zarr.json'} is damaged ({said}), and without it nobody knows what the tiles are of. Put a copy "
            f"of that file back, or remove {path} and run the command that wrote it again"
        ) from error
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        raise InputError(f"{path} is not a matrix written by ntkit ({said})") from error
    raise InputError(f"{path} is a Zarr array, but not one written by ntkit") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, content: bytes | memoryview) -> None:
    """A file that is on disk afterwards."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _lock(file: Any, *, wait: bool = False) -> bool:
    """Take a file's lock; False if another process has it and is not waited for."""
    try:
        import fcntl
    except ImportError:  # Windows: files that are open cannot be replaced there, which keeps two runs apart
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_there(file: Any, path: Path) -> bool:
    """Whether an open file still has its name: its folder may have been removed and made again since."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Errors of the file system in words."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(
            f"no room left for {path} ({error.strerror}): what is finished is kept, nothing is damaged; make room and "
            "run the same command again"
        ) from error


def _short(text: str | None) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= 60 else text[:12] + "..."
