"""Sketched features: the same map for all examples, on disk and in memory, with an error that is true."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, ModelError, StoreError, StoreWarning
from ntkit.kernel import features as making
from ntkit.kernel.store import Store
from ntkit.tangent import sketch as sketching
from ntkit.tangent.sketch import Sketch
from tests.cases import normal

N = 30


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(200, 30), nn.ReLU(), nn.Linear(30, 3)
    ).double()


def images(n: int = N, seed: int = 1) -> Tensor:
    return normal(2, 5, 5, seed=seed)(n).double()


def tangent(seed: int = 0, readout: Any = None) -> ntkit.Tangent:
    return ntkit.linearize(network(seed), readout=readout)


@pytest.mark.parametrize("trace", [False, True])
def test_the_mean_over_sketches_is_the_exact_kernel(trace: bool) -> None:
    linear, x = tangent(), images(6)
    exact = ntkit.TangentKernel(linear, x, trace=trace).dense()
    generator = seeded()
    found = torch.stack(
        [ntkit.features(linear, x, size=64, trace=trace, generator=generator).dense() for _ in range(300)]
    )
    error = found.mean(0) - exact
    assert (error.abs() < 5 * found.std(0) / 300**0.5).all()
    relative = float((found - exact).square().sum((1, 2)).mean().sqrt() / exact.norm())
    bound = torch.outer(exact.diagonal(), exact.diagonal()) + exact.square()
    assert relative < 1.1 * float((bound.sum() / 64).sqrt() / exact.norm())


def test_a_kernel_of_features_is_a_kernel() -> None:
    made = ntkit.features(tangent(), images(), size=50, generator=seeded())
    phi = made.features()
    assert phi.shape == (3 * N, 50)
    assert made.shape == (3 * N, 3 * N)
    torch.testing.assert_close(made.dense(), phi @ phi.T)
    torch.testing.assert_close(made.diagonal(), (phi @ phi.T).diagonal())
    torch.testing.assert_close(made.tile(slice(3, 9), slice(2, 40)), (phi @ phi.T)[3:9, 2:40])
    vectors = normal(2)(3 * N).double()
    torch.testing.assert_close(made @ vectors, phi @ (phi.T @ vectors))
    torch.testing.assert_close(made @ vectors[:, 0], phi @ (phi.T @ vectors[:, 0]))


def test_other_examples_are_given_the_same_map() -> None:
    linear, x = tangent(), torch.cat([images(), images(5, 2)])
    whole = ntkit.features(linear, x, size=50, generator=seeded())
    part = ntkit.features(linear, images(), size=50, generator=seeded())
    assert part.map is not None
    torch.testing.assert_close(part.features(), whole.features()[: 3 * N])
    torch.testing.assert_close(part.map(images(5, 2)), whole.features()[3 * N :])


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ntkit.features(tangent(), images(), size=50, generator=seeded())
    monkeypatch.setattr(making, "MOST", 7)
    seen: list[tuple[int, int]] = []
    again = ntkit.features(
        tangent(), images(), size=50, generator=seeded(), progress=lambda *numbers: seen.append(numbers)
    )
    torch.testing.assert_close(again.features(), made.features())
    assert seen == [(7, 30), (14, 30), (21, 30), (28, 30), (30, 30)]


def test_batches_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that fit into memory once are made in memory for them once, and for a batch."""
    monkeypatch.setattr(making, "MOST", 4)
    block, kept, most = ntkit.FeatureMap.block, [], []

    def watched(self: ntkit.FeatureMap, *args: Any) -> Tensor:
        most.append(sum(found() is not None for found in kept))
        made = block(self, *args)
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr(ntkit.FeatureMap, "block", watched)
    ntkit.features(tangent(), images(), size=50, generator=seeded())
    assert len(most) == 8
    assert max(most) <= 1


def test_a_map_on_another_device_draws_for_itself() -> None:
    made = ntkit.FeatureMap(tangent(), Sketch(50, 3))
    there = made.to("cpu")
    assert there.sketch == made.sketch
    assert there.sketch is not made.sketch
    assert torch.equal(there(images()), made(images()))


def test_one_sketch_of_two_networks() -> None:
    sketch, x = Sketch(50, 3), images(4).flatten(1)
    for width in (30, 20):
        model = nn.Sequential(nn.Linear(50, width), nn.ReLU(), nn.Linear(width, 3)).double()
        linear = ntkit.linearize(model)
        assert torch.equal(ntkit.FeatureMap(linear, sketch)(x), ntkit.FeatureMap(linear, Sketch(50, 3))(x))


@pytest.mark.parametrize("trace", [False, True])
def test_the_error_is_that_of_the_whole_kernel(trace: bool) -> None:
    linear, x = tangent(), images()
    exact = ntkit.TangentKernel(linear, x, trace=trace).dense()
    for seed in range(3):
        made = ntkit.features(linear, x, size=128, trace=trace, generator=seeded(seed))
        true = float((made.dense() - exact).norm() / exact.norm())
        everything = made.error(examples=N, generator=seeded())
        assert everything.error == pytest.approx(true, rel=1e-6)
        sampled = made.error(examples=14, generator=seeded(seed))
        assert abs(sampled.error - true) < 4 * sampled.standard_error
        assert sampled.examples == 14
        bound = torch.outer(exact.diagonal(), exact.diagonal()) + exact.square()
        assert everything.expected == pytest.approx(float((bound.sum() / 128).sqrt() / exact.norm()), rel=1e-6)
        assert "128 sketched features" in str(sampled)


def test_a_size_for_a_wanted_error() -> None:
    linear, x = tangent(readout=ntkit.SumOfLogits()), images()
    exact = ntkit.TangentKernel(linear, x).dense()
    bound = float((torch.outer(exact.diagonal(), exact.diagonal()) + exact.square()).sum() / exact.square().sum())
    size = ntkit.size_for(linear, x, 0.05, examples=N, generator=seeded())
    assert size % 256 == 0
    assert bound / 0.05**2 <= size < bound / 0.05**2 + 257
    errors = [
        float((ntkit.features(linear, x, error=0.05, generator=seeded(seed)).dense() - exact).norm() / exact.norm())
        for seed in range(8)
    ]
    assert sum(error**2 for error in errors) / 8 < 0.06**2


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("error", [1e-6, 1e-200])
def test_no_more_features_are_chosen_than_make_no_error(error: float, trace: bool) -> None:
    small = ntkit.linearize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = normal(3)(6).double()
    found = ntkit.features(small, x, error=error, trace=trace, generator=seeded())
    assert found.size == 256  # of 26 parameters, or twice as many
    torch.testing.assert_close(found.dense(), ntkit.TangentKernel(small, x, trace=trace).dense())
    assert ntkit.size_for(tangent(), images(), error, trace=trace, generator=seeded()) == (18944 if trace else 6400)


def test_features_that_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before any is made."""
    taken = 3 * N * 6400 * 8
    monkeypatch.setattr(making, "default_memory", lambda: taken // 6)
    assert ntkit.features(tangent(), images(), size=6400, generator=seeded()).shape == (3 * N, 3 * N)
    monkeypatch.setattr(making, "default_memory", lambda: taken // 6 - 1)
    monkeypatch.setattr(ntkit.FeatureMap, "block", None)
    with pytest.raises(InputError, match=r"6,400 features of 90 rows take 4.61 MB, more than .* put them on disk"):
        ntkit.features(tangent(), images(), size=6400, generator=seeded())
    with pytest.raises(InputError, match="which the error 1e-06 asks for"):
        ntkit.features(tangent(), images(), error=1e-6, generator=seeded())


# ---------------------------------------------------------------- on disk


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, ntkit.FeatureMap]:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    monkeypatch.setattr(making, "EDGE", 24)
    path, made = tmp_path / "f.zarr", ntkit.FeatureMap(tangent(), Sketch(50, 3))
    made.save(images(), path)
    return path, made


def test_features_on_disk_are_those_in_memory(saved: tuple[Path, ntkit.FeatureMap]) -> None:
    path, made = saved
    kernel = made.save(images(), path)
    torch.testing.assert_close(kernel.features(), made(images()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel.features(slice(20, 51)), made(images())[20:51], rtol=1e-12, atol=1e-12)
    vector = normal(1)(90).double()
    torch.testing.assert_close(kernel @ vector, made(images()) @ (made(images()).T @ vector))
    assert kernel.scalars == 3
    assert kernel.error(examples=10, generator=seeded(), x=images()).error < 1
    assert len(kernel.identity()) == len(made.identity(images()))


def test_lost_and_damaged_features_are_made_again(saved: tuple[Path, ntkit.FeatureMap]) -> None:
    path, made = saved
    (path / "records" / "1-0.json").unlink()
    shard = path / "c" / "2" / "0"
    shard.write_bytes(bytes(100) + shard.read_bytes()[100:])
    kept = (path / "c" / "0" / "0").stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    with pytest.warns(StoreWarning, match="checksum"):
        kernel = made.save(images(), path, progress=lambda *numbers: seen.append(numbers))
    torch.testing.assert_close(kernel.features(), made(images()), rtol=1e-12, atol=1e-12)
    assert (path / "c" / "0" / "0").stat().st_mtime_ns == kept
    assert seen == [(2, 4), (3, 4), (4, 4)]


def test_a_flipped_bit_in_what_features_say_of_themselves(saved: tuple[Path, ntkit.FeatureMap]) -> None:
    from tests.test_saved import with_each_bit_flipped

    path, made = saved
    right = making.open_features(path).features()

    def look() -> bool:
        opened = making.open_features(path)
        found = ntkit.FeatureMap.stored(made.tangent, path).sketch
        return torch.equal(opened.features(), right) and opened.scalars == 3 and found == made.sketch

    found = with_each_bit_flipped(path / "zarr.json", look, step=5)
    assert all(isinstance(seen, StoreError) or seen for seen in found)
    assert sum(isinstance(seen, StoreError) for seen in found) > 0.95 * len(found)


def test_a_task_looks_at_its_own_tile_only(
    saved: tuple[Path, ntkit.FeatureMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = saved
    (path / "records" / "1-0.json").unlink()
    store = Store.open(path)
    monkeypatch.setattr(Store, "finished", None)
    with store.locked():
        for tile, count in (((0, 0), 0), ((1, 0), 1)):
            assert len(list(making._compute((made, images()), (store, tile)))) == count


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("sketch", lambda: (ntkit.FeatureMap(tangent(), Sketch(50, 4)), images())),
        ("parameters", lambda: (ntkit.FeatureMap(tangent(1), Sketch(50, 3)), images())),
        ("rows", lambda: (ntkit.FeatureMap(tangent(), Sketch(50, 3)), images(seed=5))),
        ("kernel", lambda: (ntkit.FeatureMap(tangent(), Sketch(50, 3, True)), images())),
    ],
)
def test_features_of_something_else_are_refused(saved: tuple[Path, ntkit.FeatureMap], name: str, other: Any) -> None:
    made, x = other()
    with pytest.raises(StoreError, match=f"is of something else.*{name}"):
        made.save(x, saved[0])


def test_features_that_an_older_version_has_drawn_are_read_and_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    made = ntkit.FeatureMap(tangent(), Sketch(50, 3))
    with monkeypatch.context() as patch:
        patch.setattr(sketching, "RULE", 1)
        before = made.save(images(), tmp_path / "f.zarr").features()
    with pytest.raises(StoreError, match=r"is of something else.*sketch: D=50 seed=3 rule=1 on disk"):
        made.save(images(), tmp_path / "f.zarr")
    with pytest.raises(StoreError, match="what differs: sketch"):
        making.open_features(tmp_path / "f.zarr", made)
    assert torch.equal(making.open_features(tmp_path / "f.zarr").features(), before)


def test_features_are_opened_again(saved: tuple[Path, ntkit.FeatureMap]) -> None:
    path, made = saved
    kernel = making.open_features(path)
    torch.testing.assert_close(kernel.features(), made(images()), rtol=1e-12, atol=1e-12)
    assert kernel.scalars == 3
    assert kernel.map is None
    again = making.open_features(path, made, images())
    assert again.map is made
    assert again.error(examples=10, generator=seeded()).error < 1


def test_features_are_not_opened_as_something_else(saved: tuple[Path, ntkit.FeatureMap], tmp_path: Path) -> None:
    path, made = saved
    with pytest.raises(InputError, match=r"holds sketched features, not a matrix: open them by .*open_features"):
        ntkit.open_kernel(path)
    making.FeatureKernel(made(images(4)), made, images(4)).save(tmp_path / "k.zarr")
    with pytest.raises(InputError, match=r"holds a matrix, not features: open it by ntkit.open_kernel"):
        making.open_features(tmp_path / "k.zarr")
    assert ntkit.open_kernel(tmp_path / "k.zarr").shape == (12, 12)
    for name, other, x in (
        ("parameters", ntkit.FeatureMap(tangent(1), Sketch(50, 3)), None),
        ("sketch", ntkit.FeatureMap(tangent(), Sketch(50, 4)), None),
        ("rows", made, images(seed=5)),
    ):
        with pytest.raises(StoreError, match=rf"are of something else \(what differs: {name}\)"):
            making.open_features(path, other, x)
    (path / "records" / "1-0.json").unlink()
    with pytest.raises(StoreError, match="1 of 4 tiles are missing"):
        making.open_features(path)


def test_types_that_no_disk_takes_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    made = ntkit.FeatureMap(ntkit.linearize(network().bfloat16()), Sketch(50, 3))
    monkeypatch.setattr(ntkit.FeatureMap, "block", None)
    with pytest.raises(InputError, match=r"one of the types .*: got bfloat16.* convert the model"):
        made.save(images().bfloat16(), tmp_path / "f.zarr")
    assert not (tmp_path / "f.zarr").exists()


class Unseen(nn.Sequential):
    """Depends on what no description of it shows."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * float(os.environ["NTKIT_TEST_GAIN"])


def test_features_that_have_changed_are_refused_whatever_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    monkeypatch.setenv("NTKIT_TEST_GAIN", "1.0")
    made = ntkit.FeatureMap(ntkit.linearize(Unseen(network())), Sketch(50, 3))
    made.save(images(), tmp_path / "f.zarr")
    monkeypatch.setenv("NTKIT_TEST_GAIN", "1.001")
    with pytest.raises(StoreError, match=r"first examples differ by 1.0e-03 of the largest"):
        made.save(images(), tmp_path / "f.zarr")


def test_other_processes_make_the_same_features(saved: tuple[Path, ntkit.FeatureMap], tmp_path: Path) -> None:
    path, made = saved
    kernel = made.save(images(), tmp_path / "g.zarr", workers=2)
    assert isinstance(kernel.source, Store)
    torch.testing.assert_close(kernel.features(), made.save(images(), path).features(), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either size= or error="),
        ({"size": 3, "error": 0.1}, "either size= or error="),
        ({"size": 0}, "size of a sketch is a positive number"),
        ({"error": 0.0}, "wanted relative error is a positive number"),
        ({"error": float("nan")}, "wanted relative error is a positive number"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ntkit.features(tangent(), images(), generator=seeded(), **options)


def test_an_error_needs_examples_and_a_map() -> None:
    with pytest.raises(InputError, match="measured on examples"):
        ntkit.FeatureKernel(torch.eye(3)).error(generator=seeded())
    with pytest.raises(InputError, match="at least 2 examples"):
        ntkit.features(tangent(), images(1), size=5, generator=seeded()).error(generator=seeded())
    with pytest.raises(InputError, match="at least 2 examples"):
        ntkit.size_for(tangent(), images(1), 0.1, generator=seeded())


def test_gradients_that_are_not_finite_are_said() -> None:
    x = images()
    x[3] = float("inf")
    with pytest.raises(ModelError):
        ntkit.features(tangent(), x, size=5, generator=seeded())


def test_lengths_of_features_in_half_precision_do_not_overflow() -> None:
    phi = torch.full((3, 8), 200.0, dtype=torch.float16)
    found = making.FeatureKernel(phi).diagonal()
    assert found.dtype == torch.float32
    assert found.tolist() == [320_000.0] * 3
