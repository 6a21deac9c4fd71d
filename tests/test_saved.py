"""Matrices on disk: what is written is what is read, whatever happens in between."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ntkit
from ntkit.errors import InputError, StoreError, StoreWarning
from ntkit.kernel import store as on_disk
from ntkit.kernel.saved import SAMPLED, compute, layout_of, pieces
from ntkit.kernel.store import Layout, Store
from tests.cases import normal

zarr = pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
N, C = 23, 3


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, C)).double()


def examples(n: int = N, seed: int = 1) -> Tensor:
    return normal(5, seed=seed)(n).double()


def tangent_kernel(**options: Any) -> ntkit.TangentKernel:
    return ntkit.TangentKernel(ntkit.linearize(network(), readout=options.pop("readout", None)), examples(), **options)


class InTiles(ntkit.TangentKernel):
    """Cut into several tiles however small it is."""

    def tile_rows(self, memory: int) -> int:
        return 5 * self.scalars


def in_tiles(x2: Tensor | None = None, **options: Any) -> InTiles:
    return InTiles(ntkit.linearize(network(), readout=options.pop("readout", None)), examples(), x2, **options)


KERNELS: dict[str, Callable[[], ntkit.Kernel]] = {
    "full": in_tiles,
    "pntk": lambda: in_tiles(readout=ntkit.SumOfLogits()),
    "trace": lambda: in_tiles(trace=True),
    "two sets": lambda: in_tiles(examples(9, 2)),
    "whole": tangent_kernel,
    "dense": lambda: ntkit.DenseKernel(truth("full")),
    "scaled": lambda: 0.5 * in_tiles(),
    "sum": lambda: in_tiles() + 2.0 * in_tiles(),
    "centred": lambda: in_tiles(readout=ntkit.SumOfLogits()).centred(),
}


def by_an_older_version(path: Path, change: Callable[[dict[str, Any]], Any] = lambda described: None) -> None:
    """What a store says of itself, changed, and without a checksum of it, which older versions did not write."""
    file = path / "zarr.json"
    found = json.loads(file.read_text())
    del found["attributes"]["ntkit"]["sha256"]
    change(found["attributes"]["ntkit"])
    file.write_text(json.dumps(found))


@cache
def truth(name: str) -> Tensor:
    return KERNELS[name]().dense()


# ---------------------------------------------------------------- written and read


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_read_is_what_was_computed(name: str, tmp_path: Path) -> None:
    kernel, expected = KERNELS[name](), truth(name)
    saved = kernel.save(tmp_path / "k.zarr")
    assert saved.shape == kernel.shape
    assert saved.symmetric == kernel.symmetric
    assert saved.dtype == torch.float64
    torch.testing.assert_close(saved.dense(), expected, rtol=1e-12, atol=1e-12)
    if saved.symmetric:
        assert torch.equal(saved.dense(), saved.dense().T)
    torch.testing.assert_close(saved.diagonal(), expected.diagonal(), rtol=1e-12, atol=1e-12)
    vectors = normal(2, seed=3)(kernel.shape[1]).double()
    torch.testing.assert_close(saved @ vectors, expected @ vectors, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(saved @ vectors[:, 0], expected @ vectors[:, 0], rtol=1e-10, atol=1e-10)
    again = ntkit.open_kernel(tmp_path / "k.zarr")
    assert torch.equal(again.dense(), saved.dense())
    again.verify()


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_any_tile_is_that_part_of_the_matrix(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    for name in ("full", "two sets"):
        path = tmp_path_factory.getbasetemp() / f"{name}.zarr"
        saved = KERNELS[name]().save(path) if not path.exists() else ntkit.open_kernel(path)
        rows, cols = (slice(*sorted(data.draw(st.tuples(*2 * [st.integers(0, size)])))) for size in saved.shape)
        torch.testing.assert_close(saved.tile(rows, cols), truth(name)[rows, cols], rtol=1e-12, atol=1e-12)


def test_another_program_reads_the_upper_half(tmp_path: Path) -> None:
    in_tiles().save(tmp_path / "k.zarr")
    array = np.asarray(zarr.open_array(tmp_path / "k.zarr", mode="r"))
    upper = np.triu(np.ones_like(array, dtype=bool))
    np.testing.assert_allclose(array[upper], truth("full").numpy()[upper], rtol=1e-12)
    assert np.isnan(array[-1, 0])  # nothing is stored below the diagonal's tiles


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-7), (torch.float16, 1e-3)])
def test_smaller_types_on_disk(dtype: torch.dtype, error: float, tmp_path: Path) -> None:
    saved = in_tiles().save(tmp_path / "k.zarr", dtype=dtype)
    assert saved.dtype == torch.float32
    assert saved.store.layout.dtype == str(dtype).removeprefix("torch.")
    torch.testing.assert_close(saved.dense().double(), truth("full"), rtol=error, atol=error)


def test_a_kernel_in_bfloat16_is_stored_in_a_type_that_holds_it(tmp_path: Path) -> None:
    matrix = truth("trace").bfloat16()
    saved = ntkit.DenseKernel(matrix).save(tmp_path / "k.zarr", dtype=torch.float32)
    assert torch.equal(saved.dense(), matrix.float())


def test_a_rounded_copy_is_not_the_exact_matrix(tmp_path: Path) -> None:
    rounded = in_tiles().save(tmp_path / "k16.zarr", dtype=torch.float16)
    assert rounded.identity() == {**in_tiles().identity(), "stored": "float16"}
    copied = rounded.save(tmp_path / "b.zarr")
    assert copied.identity() == rounded.identity()  # nothing more was lost
    (tmp_path / "b.zarr" / "records" / "0-0.json").unlink()
    with pytest.raises(StoreError, match=r"is of something else .*stored: float16 on disk, nothing now"):
        in_tiles().save(tmp_path / "b.zarr", dtype=torch.float32)
    assert in_tiles().save(tmp_path / "k.zarr").identity() == in_tiles().identity()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_an_older_store_holds_is_told_by_what_it_says(dtype: torch.dtype, tmp_path: Path) -> None:
    """The precision of a network, or nothing at all: then it is not taken for exact."""
    for kernel, says in ((in_tiles(), True), (ntkit.DenseKernel(truth("full")), False)):
        path = tmp_path / f"{says}.zarr"
        kernel.save(path, dtype=dtype)
        by_an_older_version(path, lambda described: described["facts"].pop("precision"))
        exact = says and dtype == torch.float64
        more = {} if exact else {"stored": str(dtype).removeprefix("torch.")}
        assert ntkit.open_kernel(path).identity() == {**kernel.identity(), **more}
        kernel.save(path, dtype=dtype)  # it is gone on with as before


def test_a_solve_from_disk(tmp_path: Path) -> None:
    from ntkit.solve.direct import Cholesky

    y = normal(2, seed=5)(N).double()
    solve = [
        Cholesky().factor(k, 1e-3).solve(y).value for k in (in_tiles(trace=True).save(tmp_path / "k"), truth("trace"))
    ]
    torch.testing.assert_close(*solve, rtol=1e-8, atol=1e-8)


def test_progress_counts_tiles(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    in_tiles().save(tmp_path / "k.zarr", progress=lambda *numbers: seen.append(numbers))
    assert seen == [(i, 15) for i in range(16)]  # 5 x 5 tiles, one half


def test_a_caller_keeps_his_gradients_between_tiles() -> None:
    tiles = in_tiles().stripe(slice(0, 15), [slice(0, 15), slice(15, 30)])
    next(tiles)
    assert torch.is_grad_enabled()


def test_the_rows_of_a_tile_are_captured_once_for_all_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []
    original = ntkit.Tangent.derivatives

    def counting(self: ntkit.Tangent, x: Any, index: Any = slice(None), **options: Any) -> Any:
        captured.append(len(range(*index.indices(N))))
        return original(self, x, index, **options)

    monkeypatch.setattr(ntkit.Tangent, "derivatives", counting)
    in_tiles().save(tmp_path / "k.zarr")
    # the sample's examples, then each row once, and the columns right of it
    assert sum(captured) == SAMPLED + N + (18 + 13 + 8 + 3)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 12), st.booleans(), st.integers(2**16, 2**32))
@settings(deadline=None)
def test_tiles_cover_the_matrix_once(n: int, m: int, k: int, symmetric: bool, memory: int) -> None:
    class Shape:
        shape, scalars = (n * k, (n if symmetric else m) * k), k

        def tile_rows(self, memory: int) -> int:
            return ntkit.Kernel.tile_rows(self, memory) // k * k or k  # type: ignore[arg-type]

    kernel: Any = Shape()
    kernel.symmetric = symmetric
    layout = layout_of(kernel, "float32", memory)
    assert all(edge % k == 0 for edge in layout.edge)
    covered = 0
    for tile in layout.tiles():
        rows, cols = layout.slices(tile)
        area = (rows.stop - rows.start) * (cols.stop - cols.start)
        assert area > 0
        covered += area * (2 if symmetric and tile[0] != tile[1] else 1)
    assert covered == n * k * kernel.shape[1]
    assert layout.edge[0] * layout.edge[1] * 32 <= memory or layout.edge[0] == k


def test_pieces_are_all_tiles_of_one_row_each() -> None:
    tiles = Layout((100, 100), (10, 10), "float32", True).tiles()
    for workers in (1, 2, 5, 100):
        cut = pieces(tiles, workers)
        assert sorted(tile for piece in cut for tile in piece) == tiles
        assert all(len({i for i, _ in piece}) == 1 for piece in cut)
        assert len(cut) >= min(10, workers)


# ---------------------------------------------------------------- killed, damaged, mixed up


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from tests.test_saved import in_tiles
from ntkit.kernel.store import Store
write = Store.write
def slowly(self, tile, values):
    write(self, tile, values)
    print(tile, flush=True)
    time.sleep({pause})
Store.write = slowly
print("begun", flush=True)
in_tiles().save(sys.argv[1])
"""


def run(path: Path, pause: float) -> subprocess.Popen[str]:
    script = SCRIPT.format(root=str(Path(__file__).parents[1]), pause=pause)
    return subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)


def finish(path: Path) -> None:
    with run(path, 0) as process:
        process.communicate()
        assert process.returncode == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    path = tmp_path_factory.mktemp("undisturbed") / "k.zarr"
    finish(path)
    return ntkit.open_kernel(path).dense()


@pytest.mark.parametrize("tiles", [0, 1, 6, 14])
def test_a_killed_run_goes_on_and_ends_the_same_to_the_last_bit(
    tiles: int, tmp_path: Path, undisturbed: Tensor
) -> None:
    path = tmp_path / "k.zarr"
    with run(path, 0.05) as process:
        assert process.stdout is not None
        for _ in range(tiles + 1):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    if tiles:
        done = Store.open(path).finished()
        assert tiles <= len(done) < 15
        with pytest.raises(StoreError, match=r"is not finished: .* of 15 tiles are missing"):
            ntkit.open_kernel(path)
        times = {tile: (path / "c" / f"{tile[0]}" / f"{tile[1]}").stat().st_mtime_ns for tile in done}
    finish(path)
    assert torch.equal(ntkit.open_kernel(path).dense(), undisturbed)
    if tiles:
        assert times == {t: (path / "c" / f"{t[0]}" / f"{t[1]}").stat().st_mtime_ns for t in done}
    assert not list(path.rglob("*.partial"))


def test_half_written_files_are_swept_away(tmp_path: Path) -> None:
    path = tmp_path / "k.zarr"
    in_tiles().save(path)
    left = [path / "c" / "0" / "1.123.partial", path / "records" / "0-1.9.partial", path / "zarr.5.partial"]
    for file in left:
        file.write_text("half")
    in_tiles().save(path)
    assert not any(file.exists() for file in left)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(bytes(content))


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a flipped bit": (r"c/1/3 does not have the checksum", lambda p: flip(p / "c" / "1" / "3", 77)),
    "a flipped bit in the index": (r"c/1/3 does not have the checksum", lambda p: flip(p / "c" / "1" / "3", -9)),
    "cut short": (r"c/1/3 has .* bytes where", lambda p: os.truncate(p / "c" / "1" / "3", 100)),
    "no shard": (r"c/1/3 is missing", lambda p: (p / "c" / "1" / "3").unlink()),
    "another tile": (
        r"c/1/3 does not have the checksum", lambda p: shutil.copy(p / "c" / "0" / "1", p / "c" / "1" / "3"),
    ),
    "another tile's record": (
        r"records/1-3.json belongs to another matrix",
        lambda p: shutil.copy(p / "records" / "0-1.json", p / "records" / "1-3.json"),
    ),
    "an empty record": (
        r"records/1-3.json is missing or cannot be read", lambda p: (p / "records" / "1-3.json").write_text(""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_mended(damage: str, tmp_path: Path, undisturbed: Tensor) -> None:
    message, do = DAMAGES[damage]
    path = tmp_path / "k.zarr"
    in_tiles().save(path)
    do(path)
    if "checksum" in message:  # which is found when the tile is read
        opened = ntkit.open_kernel(path)
        opened.tile(slice(0, 15), slice(0, 15))  # another tile is not concerned
        for read in (opened.dense, opened.verify):
            with pytest.raises(StoreError, match=message):
                read()
    else:
        with pytest.raises(StoreError, match=rf"is not finished: 1 of 15 tiles are damaged: .*{message}"):
            ntkit.open_kernel(path)
    kept = (path / "c" / "2" / "2").stat().st_mtime_ns
    with pytest.warns(StoreWarning, match=message):
        mended = in_tiles().save(path)
    assert torch.equal(mended.dense(), truth("full")) or torch.allclose(mended.dense(), undisturbed, rtol=1e-14)
    assert (path / "c" / "2" / "2").stat().st_mtime_ns == kept


def with_each_bit_flipped(file: Path, look: Callable[[], Any], step: int = 1) -> list[Any]:
    """What is seen, or said as a `StoreError`, with the lowest bit of every byte flipped, one after the other."""
    found: list[Any] = []
    for position in range(0, file.stat().st_size, step):
        flip(file, position)
        try:
            found.append(look())
        except StoreError as error:
            found.append(error)
        finally:
            flip(file, position)
    return found


@pytest.mark.parametrize("older", [False, True])
def test_a_flipped_bit_in_what_a_matrix_says_of_itself(older: bool, tmp_path: Path) -> None:
    """Said, or nothing has changed; older versions wrote no checksum, so that there it may go unseen."""
    path = tmp_path / "k.zarr"
    matrix = ntkit.DenseKernel(torch.arange(12.0).reshape(3, 4) + 1)
    matrix.save(path)
    if older:
        by_an_older_version(path)

    def look() -> Any:
        opened = ntkit.open_kernel(path)
        return opened.dense().tolist(), opened.scalars, opened.identity()

    right = look()
    found = with_each_bit_flipped(path / "zarr.json", look)
    said = [str(error) for error in found if isinstance(error, StoreError)]
    named = "zarr.json is damaged", "has format 3", "k.zarr is not finished"  # the tiles belong to another matrix
    assert all(any(words in error for words in named) for error in said)
    assert older or all(isinstance(seen, StoreError) or seen == right for seen in found)
    assert len(said) > (0.3 if older else 0.95) * len(found)
    matrix.save(path)


def test_what_others_note_beside_is_not_in_the_checksum(tmp_path: Path) -> None:
    in_tiles().save(tmp_path / "k.zarr")
    zarr.open_array(tmp_path / "k.zarr", mode="r+").attrs["mine"] = "a note"
    assert "a note" in (tmp_path / "k.zarr" / "zarr.json").read_text()
    ntkit.open_kernel(tmp_path / "k.zarr").verify()
    (tmp_path / "k.zarr" / "records" / "0-2.json").unlink()
    torch.testing.assert_close(in_tiles().save(tmp_path / "k.zarr").dense(), truth("full"), rtol=1e-12, atol=1e-12)


def test_a_damaged_description_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "k.zarr"
    in_tiles().save(path)
    (path / "records" / "0-2.json").unlink()
    flip(path / "zarr.json", (path / "zarr.json").read_bytes().index(b'"memory": ') + 10)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(StoreError, match=r"zarr.json is damaged .* Put a copy of that file back, or remove"):
        in_tiles().save(path)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_missing_record_is_a_missing_tile(tmp_path: Path) -> None:
    path = tmp_path / "k.zarr"
    in_tiles().save(path)
    (path / "records" / "0-2.json").unlink()
    with pytest.raises(StoreError, match="1 of 15 tiles are missing"):
        ntkit.open_kernel(path)
    torch.testing.assert_close(in_tiles().save(path).dense(), truth("full"), rtol=1e-12, atol=1e-12)


class Other(nn.Sequential):
    """The same modules, another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def changed(change: Callable[[nn.Module], Any]) -> ntkit.TangentKernel:
    model = network()
    model = change(model) or model
    return InTiles(ntkit.linearize(model), examples())


def moved(position: int) -> Tensor:
    x = examples().clone()
    x.view(-1)[position] += 1e-9
    return x


class Gain(nn.Sequential):
    """A plain number, and a buffer that is not saved."""

    def __init__(self, gain: float, buffer: float) -> None:
        super().__init__(*network())
        self.gain = gain
        self.register_buffer("by", torch.tensor(buffer), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain * self.by


def test_models_that_differ_in_plain_values_are_told_apart(tmp_path: Path) -> None:
    kernels = {case: InTiles(ntkit.linearize(Gain(*case)), examples()) for case in [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)]}
    first, number, buffer = kernels.values()
    first.save(tmp_path / "k")
    with pytest.raises(StoreError, match=r"something else .*(settings|architecture): "):
        number.save(tmp_path / "k")
    with pytest.raises(StoreError, match=r"something else .*parameters: "):
        buffer.save(tmp_path / "k")
    torch.testing.assert_close(number.save(tmp_path / "l").dense(), 4 * truth("full"), rtol=1e-12, atol=1e-12)


OTHERS: dict[str, tuple[str, Callable[[], ntkit.Kernel]]] = {
    "weights": ("parameters", lambda: changed(lambda m: nn.init.constant_(m[2].bias, 0.1) is None)),
    "function": ("architecture", lambda: changed(lambda m: m.__setitem__(1, nn.ReLU()))),
    "forward": ("architecture", lambda: changed(lambda m: Other(*m))),
    "readout": ("readout", lambda: in_tiles(readout=ntkit.SumOfLogits())),
    "select": ("readout", lambda: in_tiles(readout=ntkit.Logits(select=lambda out: out + 1))),
    "trace": ("kernel", lambda: in_tiles(trace=True)),
    "data": ("rows", lambda: InTiles(ntkit.linearize(network()), moved(100))),
    "columns": ("columns", lambda: in_tiles(examples())),
    "more data": ("rows", lambda: InTiles(ntkit.linearize(network()), examples(24))),
    "precision": (
        "precision",
        lambda: InTiles(ntkit.linearize(network().float()), examples().float()),
    ),
    "parameters": ("parameters", lambda: InTiles(ntkit.linearize(network(), parameters="0.*"), examples())),
    "scaled": ("then", lambda: 2.0 * in_tiles()),
    "dense": ("kernel", lambda: ntkit.DenseKernel(truth("full"))),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_matrix_of_something_else_is_refused_and_left_alone(other: str, tmp_path: Path) -> None:
    path = tmp_path / "k.zarr"
    in_tiles().save(path)
    (path / "records" / "0-2.json").unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    name, make = OTHERS[other]
    with pytest.raises(StoreError, match=f"is of something else.*[(; ]{name}: .* on disk"):
        make().save(path)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


class Unseen(nn.Module):
    """Depends on what no description of it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * float(os.environ["NTKIT_TEST_GAIN"])


@pytest.mark.parametrize("finished", [True, False])
def test_entries_that_have_changed_are_refused_whatever_the_cause(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "k.zarr"
    monkeypatch.setenv("NTKIT_TEST_GAIN", "1.0")
    first = InTiles(ntkit.linearize(Unseen()), examples())
    first.save(path)
    if not finished:
        (path / "records" / "0-2.json").unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    monkeypatch.setenv("NTKIT_TEST_GAIN", "1.001")
    second = InTiles(ntkit.linearize(Unseen()), examples())
    assert second.identity() == first.identity()
    with pytest.raises(StoreError, match=r"is of something else .*first examples differ by 2.0e-03 of the largest"):
        second.save(path)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    monkeypatch.setenv("NTKIT_TEST_GAIN", "1.0000000001")  # as another machine may round
    torch.testing.assert_close(second.save(path).dense(), first.dense(), rtol=1e-8, atol=1e-8)


def edited() -> nn.Module:
    """A class that is defined twice under one name, as in a notebook."""

    class Edited(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    return Edited(*network())


def test_an_edited_forward_is_another_model() -> None:
    first, second = (InTiles(ntkit.linearize(edited()), examples()).identity() for _ in range(2))
    assert first == second

    class Edited(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - 1.0

    Edited.__qualname__ = type(edited()).__qualname__
    third = InTiles(ntkit.linearize(Edited(*network())), examples()).identity()
    assert [name for name in first if first[name] != third[name]] == ["architecture"]


@pytest.mark.parametrize("same", ["a copy", "a dataset", "more memory"])
def test_the_same_by_another_way_goes_on(same: str, tmp_path: Path) -> None:
    path = tmp_path / "k.zarr"
    in_tiles().save(path)
    (path / "records" / "0-2.json").unlink()
    model, x = copy.deepcopy(network()), examples()
    data = TensorDataset(x, torch.zeros(N)) if same == "a dataset" else x.clone()
    if same == "a dataset":
        kernel = InTiles(ntkit.linearize(model), TensorDataset(x))
        assert kernel.identity() == in_tiles().identity()
        assert InTiles(ntkit.linearize(model), data).identity() != kernel.identity()  # a target is content too
    else:
        kernel = InTiles(ntkit.linearize(model), data)
    saved = kernel.save(path, memory=2**50 if same == "more memory" else None)
    torch.testing.assert_close(saved.dense(), truth("full"), rtol=1e-12, atol=1e-12)


class Budgeted(ntkit.TangentKernel):
    """As many examples in a tile as there are millions of bytes; what it is asked for with a budget is noted."""

    asked: ClassVar[list[tuple[int, int]]] = []

    def tile_rows(self, memory: int) -> int:
        return max(1, memory // 10**6) * self.scalars

    def stripe(self, rows: slice, columns: Sequence[slice], *, memory: int | None = None) -> Iterator[Tensor]:
        if memory is not None:
            self.asked.append((memory, (rows.stop - rows.start) // self.scalars))
        return super().stripe(rows, columns, memory=memory)


def begun_with_ten_million(path: Path, x2: Tensor | None = None) -> tuple[Budgeted, Tensor, set[Path]]:
    """A kernel, its matrix as it was, and the tiles that are left; half of them have been lost."""
    kernel = Budgeted(ntkit.linearize(network()), examples(), x2)
    before = kernel.save(path, memory=10**7).dense()
    tiles = Store.open(path).layout.tiles()
    for i, j in tiles[::2]:
        (path / "records" / f"{i}-{j}.json").unlink()
    Budgeted.asked.clear()
    return kernel, before, {path / "c" / str(i) / str(j) for i, j in tiles[1::2]}


def modified(files: set[Path]) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize(("workers", "each"), [(None, 3 * 10**6), (4, 2_500_000)])
def test_a_run_that_goes_on_with_less_memory_takes_no_more(
    sets: int, workers: int | None, each: int, tmp_path: Path
) -> None:
    """Less in all, or as much for more workers."""
    path = tmp_path / "k.zarr"
    kernel, before, left = begun_with_ten_million(path, examples(17, 2) if sets == 2 else None)
    kept = modified(left)
    said = rf"begun with 10,000,000 bytes of memory for each worker and goes on with {each:,}\. .* not to the last bit"
    with pytest.warns(StoreWarning, match=said), ThreadPoolExecutor(workers or 1) as threads:
        saved = kernel.save(path, memory=each * (workers or 1), workers=threads if workers else None)
    assert {memory for memory, _ in Budgeted.asked} == {each}
    assert max(rows for _, rows in Budgeted.asked) == each // 10**6
    torch.testing.assert_close(saved.dense(), before, rtol=1e-12, atol=1e-12)
    if saved.symmetric:
        assert torch.equal(saved.dense(), saved.dense().T)
    assert kept == modified(left)
    kernel.save(path, memory=1)  # there is nothing left to do with less, and nothing is said


@pytest.mark.parametrize(("workers", "memory"), [(None, 10**7), (None, 10**9), (2, 2 * 10**7)])
def test_a_run_that_goes_on_with_as_much_memory_ends_in_the_same_bits(
    workers: int | None, memory: int, tmp_path: Path
) -> None:
    path = tmp_path / "k.zarr"
    kernel, before, _ = begun_with_ten_million(path)
    with ThreadPoolExecutor(workers or 1) as threads:
        saved = kernel.save(path, memory=memory, workers=threads if workers else None)
    assert {memory for memory, _ in Budgeted.asked} == {10**7}
    assert torch.equal(saved.dense(), before)


def test_a_task_looks_at_its_own_tiles_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "k.zarr", []
    kernel = in_tiles()
    kernel.save(path)
    (path / "records" / "0-2.json").unlink()
    store, look = Store.open(path), Store._record

    def looking(self: Store, tile: Any) -> Any:
        seen.append(tile)
        return look(self, tile)

    monkeypatch.setattr(Store, "_record", looking)
    with store.locked():
        assert len(list(compute(kernel, (store, [(0, 1), (0, 2)])))) == 1  # that which is there is left out
    assert sorted(seen) == [(0, 1), (0, 2)]


def test_a_tile_of_another_matrix_is_not_taken_for_one(tmp_path: Path) -> None:
    here, there = tmp_path / "k.zarr", tmp_path / "other.zarr"
    in_tiles().save(here)
    InTiles(ntkit.linearize(network(1)), examples()).save(there)
    for part in ("records/1-3.json", "c/1/3"):
        shutil.copy(there / part, here / part)
    with pytest.warns(StoreWarning, match=r"1-3.json belongs to another matrix"):
        saved = in_tiles().save(here)
    torch.testing.assert_close(saved.dense(), truth("full"), rtol=1e-12, atol=1e-12)


# A process is killed at each step that it takes in the file system, before it takes it; the same call goes on from
# there. All in copies of one process that has imported everything.
KILLS = """
import contextlib, os, pathlib, signal, sys
sys.path.insert(0, {root!r})
import ntkit, torch
from ntkit.tangent.sketch import Sketch
from tests.test_saved import flip

torch.set_num_threads(1)  # a copy of a process has no threads but its own

class Tiles(ntkit.DenseKernel):
    def tile_rows(self, memory):
        return 4

class Features:  # whose map keeps directions in a file of its own
    def __init__(self):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 2)).double().eval()
        self.tangent, self.x = ntkit.linearize(net), torch.randn(4, 1, 6, 6, dtype=torch.float64)
        leading = ntkit.Leading.of(self.tangent, self.x, rank=2, generator=torch.Generator().manual_seed(0))
        self.new = ntkit.FeatureMap(self.tangent, Sketch(6, 0, leading=leading))

    def save(self, path):
        begun = (path / "zarr.json").exists()
        return (ntkit.FeatureMap.stored(self.tangent, path) if begun else self.new).save(self.x, path)

place, state = pathlib.Path(sys.argv[1]), sys.argv[2]
if state == "features":
    kernel = Features()
    phi = kernel.new(kernel.x)
    matrix = phi @ phi.T
else:
    matrix = torch.arange(32, dtype=torch.float64).reshape(8, 4) + 1.0
    kernel = Tiles(matrix, symmetric=False)

def kill_at(step):
    count = 0
    def hook(event, args):
        nonlocal count
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.truncate") or (
            event == "open" and args[1] not in ("r", "rb"))
        if changes and any(str(place) in str(arg) for arg in args[:2]):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def apart(do):
    pid = os.fork()
    if not pid:
        try:
            do()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def prepare(path):
    if state in ("damaged", "half"):
        kernel.save(path)
    if state == "damaged":
        flip(path / "c" / "1" / "0", 5)
    if state == "half":
        (path / "records" / "1-0.json").unlink()

def interrupted(path, step):
    kill_at(step)
    kernel.save(path)

def resumed(path):
    import warnings
    warnings.simplefilter("ignore")
    assert torch.equal(kernel.save(path).dense(), matrix)
    if state != "features":
        ntkit.open_kernel(path).verify()
    assert not list(path.rglob("*.partial"))

step = 0
while True:
    step += 1
    path = place / str(step)
    assert apart(lambda: prepare(path)) == 0
    status = apart(lambda: interrupted(path, step))
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    assert apart(lambda: resumed(path)) == 0, step
print(step - 1)
"""


@pytest.mark.parametrize(("state", "least"), [("new", 25), ("half", 12), ("damaged", 12), ("features", 20)])
def test_a_run_that_is_killed_at_any_step_goes_on(state: str, least: int, tmp_path: Path) -> None:
    script = KILLS.format(root=str(Path(__file__).parents[1]))
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path), state], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= least


def test_what_an_earlier_run_still_writes_changes_nothing(tmp_path: Path) -> None:
    path, ones = tmp_path / "k.zarr", np.ones((15, 15))
    in_tiles().save(path)
    orphan = Store.open(path)
    with orphan.locked():
        copied = pickle.loads(pickle.dumps(orphan))  # as a worker is given it
        copied.write((0, 0), ones)
    assert Store.open(path).read((0, 0)).max() == 1.0
    (path / "records" / "0-0.json").unlink()
    in_tiles().save(path)
    with pytest.raises(StoreError, match="another run has begun to write"):
        copied.write((0, 0), ones)
    shutil.rmtree(path)
    with pytest.raises(StoreError, match="was removed while"):
        copied.write((0, 0), ones)
    assert not path.exists()
    torch.testing.assert_close(in_tiles().save(path).dense(), truth("full"), rtol=1e-12, atol=1e-12)
    with pytest.raises(StoreError, match="another run has begun to write"):
        copied.write((0, 0), ones)
    ntkit.open_kernel(path).verify()


def test_a_run_begins_while_an_earlier_one_is_in_the_middle_of_a_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "k.zarr"
    in_tiles().save(path)
    (path / "records" / "0-0.json").unlink()
    orphan = Store.open(path)
    with orphan.locked():
        copied = pickle.loads(pickle.dumps(orphan))
    write, seen = on_disk._write, []

    def interrupting(file: Path, content: Any) -> None:
        write(file, content)
        if not seen:  # half of the orphan's files are there; a whole run comes in between
            seen.append(file)
            in_tiles().save(path)
            assert not file.exists()  # swept away

    monkeypatch.setattr(on_disk, "_write", interrupting)
    with pytest.raises(StoreError, match="another run has begun to write"):
        copied.write((0, 0), np.ones((15, 15)))
    assert seen
    ntkit.open_kernel(path).verify()
    torch.testing.assert_close(ntkit.open_kernel(path).dense(), truth("full"), rtol=1e-12, atol=1e-12)
    assert not list(path.rglob("*.partial"))


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "k.zarr"
    with run(path, 0.3) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        with pytest.raises(StoreError, match="another run is writing"):
            in_tiles().save(path)
        process.kill()
    in_tiles().save(path)


# ---------------------------------------------------------------- what cannot be done


def in_a_full_disk(script: str, size: str) -> subprocess.CompletedProcess[str]:
    """A script in a file system of its own that holds `size`, mounted where it finds itself."""
    inside = f"mount -t tmpfs -o size={size} none /mnt && cd /mnt && exec {sys.executable} - "
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside], input=textwrap.dedent(script), text=True, capture_output=True
    )


@pytest.mark.skipif(
    shutil.which("unshare") is None or in_a_full_disk("print(1)", "1m").returncode != 0,
    reason="needs a file system of its own to fill",
)
def test_a_full_disk_is_said_and_nothing_is_damaged() -> None:
    root = Path(__file__).parents[1]
    found = in_a_full_disk(
        f"""
        import os, pathlib, sys
        sys.path.insert(0, {str(root)!r})
        import torch, ntkit
        from tests.test_saved import in_tiles, truth
        kernel = in_tiles()
        try:
            ntkit.DenseKernel(torch.ones(1000, 1000, dtype=torch.float64), symmetric=False).save("large")
        except ntkit.StoreError as error:
            assert "bytes of disk" in str(error), error
        assert not pathlib.Path("large").exists()
        # something else fills the disk meanwhile
        import ntkit.kernel.store as store
        write, count = store.Store.write, 0
        def filling(self, tile, values):
            global count
            count += 1
            if count == 4:
                with open("filler", "wb", buffering=0) as file:
                    try:
                        while file.write(bytes(512)): pass
                    except OSError:
                        pass
            write(self, tile, values)
        store.Store.write = filling
        try:
            kernel.save("k.zarr")
        except ntkit.StoreError as error:
            assert "no room left for" in str(error), error
        else:
            raise AssertionError("nothing was said")
        assert len(store.Store.open(pathlib.Path("k.zarr")).finished()) == 3
        from ntkit.kernel.saved import write_companion
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 3), torch.nn.Flatten(), torch.nn.Linear(1024, 2)).eval()
        leading = ntkit.Leading.of(ntkit.linearize(net), torch.randn(4, 1, 6, 6), generator=torch.Generator())
        try:
            write_companion(pathlib.Path("k.zarr"), leading.save)
        except ntkit.StoreError as error:
            assert "no room left for" in str(error), error
        else:
            raise AssertionError("nothing was said")
        os.unlink("filler")
        torch.testing.assert_close(kernel.save("k.zarr").dense(), truth("full"), rtol=1e-12, atol=1e-12)
        print("fine")
        """,
        "1m",
    )
    assert found.stdout == "fine\n", found.stderr


@pytest.mark.parametrize(
    ("factor", "dtype", "message"),
    [
        (1e6, torch.float16, "do not fit into float16"),
        (1e-9, torch.float16, r"entries of at most .*e-09 are lost in float16"),
        (1e-6, torch.float16, r"entries of at most .*e-06 are lost in float16"),  # digits of them
        (1e-42, torch.float32, "are lost in float32"),
        (1e42, torch.float32, "do not fit into float32"),
    ],
)
def test_entries_that_do_not_fit_the_type_are_said_before_anything_is_done(
    factor: float, dtype: torch.dtype, message: str, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=f"{message}.* scale the kernel"):
        (factor * in_tiles()).save(tmp_path / "k.zarr", dtype=dtype)
    assert not (tmp_path / "k.zarr").exists()


class Cut(ntkit.DenseKernel):
    """In tiles of five rows."""

    def tile_rows(self, memory: int) -> int:
        return 5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("last", "message"), [(1e5, "do not fit into"), (1e-8, "are lost in")])
def test_entries_that_do_not_fit_the_type_are_said_when_they_come(
    symmetric: bool, last: float, message: str, tmp_path: Path
) -> None:
    matrix = torch.block_diag(torch.eye(10), last * torch.eye(5)).double()
    kernel = Cut(matrix if symmetric else matrix[:, 10:] + matrix[:, :5], symmetric=symmetric)
    with pytest.raises(StoreError, match=f"{message} float16"):
        kernel.save(tmp_path / "k.zarr", dtype=torch.float16)
    assert len(Store.open(tmp_path / "k.zarr").finished()) < Store.open(tmp_path / "k.zarr").layout.count


def test_small_entries_beside_a_large_diagonal_are_kept(tmp_path: Path) -> None:
    """Examples that have little to do with each other: what is lost is nothing beside their lengths."""
    matrix = torch.eye(15).double() + 1e-9
    saved = Cut(matrix).save(tmp_path / "k.zarr", dtype=torch.float16)
    torch.testing.assert_close(saved.dense(), matrix.float(), rtol=0, atol=1e-8)
    zeros = Cut(torch.zeros(15, 15).double()).save(tmp_path / "zeros.zarr", dtype=torch.float16)
    assert not zeros.dense().any()


def test_what_half_precision_has_lost_before_is_stored_as_it_is(tmp_path: Path) -> None:
    matrix = (1e-6 * torch.eye(7)).half()
    assert torch.equal(ntkit.DenseKernel(matrix).save(tmp_path / "k.zarr").dense(), matrix.float())


def occupied(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("all of it")


def another_array(path: Path) -> None:
    zarr.create_array(path, shape=(3, 3), dtype="f4")


REFUSALS: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    ("a folder of something else", lambda p: (occupied(p), in_tiles().save(p)), InputError, "exists"),
    ("a file", lambda p: (p.write_text("x"), in_tiles().save(p)), InputError, "exists"),
    ("another program's array", lambda p: (another_array(p), in_tiles().save(p)), InputError, "not one written by"),
    ("no such folder", lambda p: in_tiles().save(p / "a" / "b"), InputError, "does not exist: make it"),
    ("a type for no disk", lambda p: in_tiles().save(p, dtype=torch.bfloat16), InputError, "one of the types"),
    ("a type for no disk by itself", lambda p: ntkit.DenseKernel(torch.eye(3).bfloat16()).save(p), InputError,
     "one of the types float16, float32, float64: got bfloat16. Give one of them"),
    ("another type than before", lambda p: (in_tiles().save(p), in_tiles().save(p, dtype=torch.float32)), StoreError,
     "float64, and .* of float32 were asked for"),
    ("no memory", lambda p: in_tiles().save(p, memory=0), InputError, "positive number of bytes"),
    ("no workers", lambda p: in_tiles().save(p, workers=0), InputError, "number of workers is a positive one"),
    ("workers of no kind", lambda p: in_tiles().save(p, workers="dask"), InputError, "workers are None"),
    ("nothing there", lambda p: ntkit.open_kernel(p), InputError, "there is no matrix at"),
    ("nothing of ours there", lambda p: (occupied(p), ntkit.open_kernel(p)), InputError, "is not a matrix written by"),
]  # fmt: skip


OCCUPIED = [do for name, do, *_ in REFUSALS if name in ("a folder of something else", "nothing of ours there")]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case[0])
def test_refusals(case: tuple[str, Callable[[Path], Any], type[Exception], str], tmp_path: Path) -> None:
    _, do, kind, message = case
    with pytest.raises(kind, match=message):
        do(tmp_path / "k")
    if do in OCCUPIED:
        assert (tmp_path / "k" / "thesis.tex").read_text() == "all of it"
        assert os.listdir(tmp_path / "k") == ["thesis.tex"]


def test_a_kernel_that_does_not_say_what_it_is_of(tmp_path: Path) -> None:
    class Mine(ntkit.DenseKernel):
        identity = ntkit.Kernel.identity

    with pytest.raises(InputError, match=r"define identity\(\)"):
        Mine(torch.eye(3)).save(tmp_path / "k")
    assert not (tmp_path / "k").exists()


def test_a_store_of_a_newer_version(tmp_path: Path) -> None:
    in_tiles().save(tmp_path / "k")
    by_an_older_version(tmp_path / "k", lambda described: described.update(format=99, sha256="of other things"))
    with pytest.raises(StoreError, match="has format 99"):
        ntkit.open_kernel(tmp_path / "k")


def test_a_store_of_an_older_version_is_read_and_not_gone_on_with(tmp_path: Path) -> None:
    in_tiles().save(tmp_path / "k")

    def change(described: dict[str, Any]) -> None:
        described["format"] = 1
        del described["facts"]["sample"]

    by_an_older_version(tmp_path / "k", change)
    torch.testing.assert_close(ntkit.open_kernel(tmp_path / "k").dense(), truth("full"), rtol=1e-12, atol=1e-12)
    with pytest.raises(StoreError, match=r"begun by an older version .* can be read, and not gone on with"):
        in_tiles().save(tmp_path / "k")


def test_a_matrix_that_is_finished_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_tiles().save(tmp_path / "k")
    monkeypatch.setattr(Store, "write", None)
    torch.testing.assert_close(in_tiles().save(tmp_path / "k").dense(), truth("full"), rtol=1e-12, atol=1e-12)


def test_a_matrix_is_found_from_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entries = in_tiles().save("K.zarr").dense()
    opened = pickle.dumps(ntkit.open_kernel("K.zarr"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(pickle.loads(opened).dense(), entries)
