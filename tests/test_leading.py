"""Sketches that keep leading directions: the same as of gradients that are formed, which these are not."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, ModelError, StoreError
from ntkit.tangent import leading as keeping
from ntkit.tangent.derivatives import Derivatives, Part
from ntkit.tangent.factors import Convolution, Factor, Outer
from ntkit.tangent.factors.convolution import Geometry
from ntkit.tangent.leading import Leading, Sides, label, projection
from ntkit.tangent.sketch import Projected, Sketch


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 20, 3, stride=2), nn.ReLU(),
        nn.Conv2d(20, 16, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4, 5),
    ).double().eval()  # fmt: skip


class Squared(nn.Module):
    """Finite outputs with gradients that overflow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) * 1e-200) * x.flatten(1).square().sum(1, keepdim=True).clamp(max=1e300)


def images(n: int = 9, seed: int = 1) -> Tensor:
    return draw(n, 2, 8, 8, seed=seed)


def matrices(factor: Factor) -> Tensor:
    """Rows as (n, k, outputs, inputs), by forming them."""
    rows = factor.rows()
    if isinstance(factor, Convolution):
        return rows.movedim(3, -1).flatten(3)
    assert isinstance(factor, Outer)
    return rows.mT if factor.inputs_first else rows


@st.composite
def convolutions(draws: st.DrawFn) -> Convolution:
    axes = draws(st.integers(1, 3))
    each = [(draws(st.integers(1, 3)), draws(st.integers(1, 2)), draws(st.integers(1, 2))) for _ in range(axes)]
    window, stride, dilation = (tuple(found) for found in zip(*each, strict=True))
    padding = tuple((draws(st.integers(0, 2)), draws(st.integers(0, 2))) for _ in range(axes))
    n, k, c, o = (draws(st.integers(1, 3)) for _ in range(4))
    space, places = [], []
    for w, s, d, (before, behind) in zip(window, stride, dilation, padding, strict=True):
        space.append(max(1, (w - 1) * d + 1 - before - behind) + draws(st.integers(0, 2)))
        places.append((space[-1] + before + behind - (w - 1) * d - 1) // s + 1)
    geometry = Geometry(window, stride, padding, dilation, 1)
    return Convolution(draw(n, c, *space), draw(n, k, o, *places, seed=1), (o, c, *window), geometry)


@st.composite
def linears(draws: st.DrawFn) -> Outer:
    n, k, t, i, o = (draws(st.integers(1, 4)) for _ in range(5))
    first = draws(st.booleans())
    return Outer(draw(n, 1, t, i), draw(n, k, 1, t, o, seed=1), (i, o) if first else (o, i), first)


@given(st.one_of(convolutions(), linears()), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None, max_examples=200)
def test_projected_rows_are_the_rows_projected(factor: Outer | Convolution, d1: int, d2: int) -> None:
    rows = matrices(factor)
    left, right = draw(d1, rows.shape[2], seed=2), draw(d2, rows.shape[3], seed=3)
    torch.testing.assert_close(factor.projected(left, right), left @ rows @ right.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("features", "size", "rank"), [(30, 12, 4), (30, 30, 4), (10, 30, 10), (30, 12, 1)])
def test_projections_keep_their_directions_and_are_unbiased(features: int, size: int, rank: int) -> None:
    directions = torch.linalg.qr(draw(features, rank)).Q
    found = projection(directions, size, seeded())
    assert found.shape == (min(size, features), features)
    kept = found @ directions
    torch.testing.assert_close(kept[:rank].abs(), torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(kept[rank:].abs().sum()) < 1e-9
    times = 4000
    drawn = torch.stack([projection(directions, size, seeded(seed)) for seed in range(times)])
    error = (drawn.mT @ drawn).mean(0) - torch.eye(features, dtype=torch.float64)
    assert float(error.abs().max()) < 5 * math.sqrt(2 / (max(1, size - rank) * times))


def test_the_directions_are_those_of_the_gradients() -> None:
    """Leading singular vectors of all rows side by side, and the shares of what they hold."""
    tangent = ntkit.linearize(network())
    found = Leading.of(tangent, images(), rank=3, examples=8, generator=seeded())
    with torch.no_grad():
        looked, held = (tangent.derivatives(images(), part).factors for part in (slice(0, 6), slice(6, 8)))
        total = sum(float(factor.squared_norms().sum()) for factor in held.values())
        weights = {
            label(part): (matrices(factor).flatten(0, 1), matrices(held[part]).flatten(0, 1))
            for part, factor in looked.items()
            if part.name.endswith("weight")
        }
    assert found.sides.keys() >= weights.keys()
    for name, (rows, others) in weights.items():
        sides, length = found.sides[name], float(others.square().sum())
        assert sides.weight == pytest.approx(length / total, rel=1e-9)
        for side, moments, outside in zip(
            (sides.outputs, sides.inputs),
            ((rows @ rows.mT).sum(0), (rows.mT @ rows).sum(0)),
            sides.outside,
            strict=True,
        ):
            torch.testing.assert_close(side.T @ side, torch.eye(side.shape[1], dtype=torch.float64))
            best = float(torch.linalg.eigvalsh(moments).flip(0)[: side.shape[1]].sum())
            assert 0.99 * best < float((side.T @ moments @ side).trace()) < (1 + 1e-9) * best
            inside = others @ side if side is sides.inputs else side.T @ others
            assert outside == pytest.approx(1 - float(inside.square().sum()) / length, abs=1e-9)


def test_a_few_examples_unfolded_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tangent = ntkit.linearize(network())
    whole = Leading.of(tangent, images(), rank=3, generator=seeded())
    monkeypatch.setattr(keeping, "ROOM", 20_000)  # one or two examples
    pieces = Leading.of(tangent, images(), rank=3, generator=seeded())
    for name, sides in whole.sides.items():
        other = pieces.sides[name]
        assert other.outside == pytest.approx(sides.outside, rel=1e-9, abs=1e-12)
        for a, b in ((sides.outputs, other.outputs), (sides.inputs, other.inputs)):
            torch.testing.assert_close(b @ b.T, a @ a.T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_examples_have_directions_too(count: int) -> None:
    """The last is what the shares are of, if there are several."""
    tangent = ntkit.linearize(network())
    sides = Leading.of(tangent, images(), examples=count, generator=seeded()).sides
    with torch.no_grad():
        held = tangent.derivatives(images(), slice(max(0, count - 1), count))
        total = float(held.squared_norms().sum())
        for part, factor in held.factors.items():
            if part.name.endswith("weight"):
                share = float(factor.squared_norms().sum()) / total
                assert sides[label(part)].weight == pytest.approx(share, rel=1e-9)
    phi = ntkit.features(tangent, images(count), size=300, generator=seeded()).features()
    assert bool(phi.isfinite().all())


def test_half_precision_does_without() -> None:
    found = ntkit.features(ntkit.linearize(network().bfloat16()), images().bfloat16(), size=300, generator=seeded())
    assert found.map is not None
    assert found.map.sketch.leading is None


def test_projections_are_taken_where_they_pay() -> None:
    """By the formula: noise of both sides that are cut, against that of the buckets; a whole side adds none."""

    def sides(outputs: int, inputs: int, outside: tuple[float, float], weight: float = 1.0) -> Sides:
        return Sides(draw(outputs, 8), draw(inputs, 8), weight, outside)

    assert sides(300, 400, (0.0, 0.0)).split(4096) == (64, 64)
    assert sides(16, 400, (0.0, 0.0)).split(4096) == (16, 256)
    assert sides(300, 27, (0.0, 0.0)).split(4096) == (151, 27)
    edge = math.sqrt(56 / 4096)  # 64 - 8 of 4,096 numbers
    for outside in ((0.0, 0.99 * edge), (0.99 * edge, 0.0), (0.7 * edge, 0.7 * edge)):
        assert sides(300, 400, outside).pays(4096)
    for outside in ((0.0, 1.01 * edge), (1.01 * edge, 0.0), (0.72 * edge, 0.72 * edge)):
        assert not sides(300, 400, outside).pays(4096)
        assert sides(300, 400, outside, weight=0.9).pays(4096)
        assert not sides(300, 400, outside, weight=0.27).pays(4096, single=True)
        assert sides(300, 400, outside, weight=0.24).pays(4096, single=True)
    assert sides(60, 60, (1.0, 1.0)).pays(4096)  # both whole
    assert sides(300, 400, (0.0, 0.0)).pays(16**2)
    assert not sides(300, 400, (0.0, 0.0)).pays(15**2)  # no room for what is outside


def test_a_sketch_that_keeps_them_is_linear_and_unbiased() -> None:
    tangent, x = ntkit.linearize(network()), images(4)
    leading = Leading.of(tangent, images(6, seed=7), rank=4, generator=seeded())
    with torch.no_grad():
        found = tangent.derivatives(x)
        exact = found.gram(found)
        size, times = 300, 400
        kernels = []
        for seed in range(times):
            phi = Sketch(size, seed, leading=leading).of(found).flatten(0, 1)
            kernels.append(phi @ phi.T)
    kernels = torch.stack(kernels)
    error = (kernels.mean(0) - exact) / (kernels.std(0) / math.sqrt(times))
    assert float(error.abs().max()) < 5
    sketch = Sketch(size, 0, leading=leading)
    doubled = Derivatives(found.outputs, {p: _scaled(f, 2.0) for p, f in found.factors.items()})
    torch.testing.assert_close(sketch.of(doubled), 2 * sketch.of(found), rtol=1e-10, atol=1e-10)


def _scaled(factor: Factor, by: float) -> Factor:
    *others, cotangents = factor.arrays
    return factor.of(*others, by * cotangents)


@pytest.mark.parametrize("trace", [False, True])
def test_what_lies_in_the_directions_has_no_noise(trace: bool) -> None:
    """Gradients that are sums of few directions: a random projection would be several percent off, and is."""
    u, v = torch.linalg.qr(draw(60, 3)).Q, torch.linalg.qr(draw(90, 3, seed=1)).Q
    n, k, t = 5, 2, 7
    factor = Outer(draw(n, 1, t, 3) @ v.T, draw(n, k, 1, t, 3, seed=1) @ u.T, (60, 90))
    part = Part("w", (0,), True)
    found = Derivatives(draw(n, k), {part: factor})
    exact = found.gram(found, trace=trace)
    for leading, low, high in (
        (Leading({label(part): Sides(u, v, 1.0, (0.0, 0.0))}), 0, 1e-10), (None, 0.005, 1),
    ):  # fmt: skip
        phi = Sketch(900, 0, trace, leading).of(found).flatten(0, 1)
        error = float((phi @ phi.T - exact).norm() / exact.norm())
        if not trace or leading is None:
            assert low <= error <= high
        else:  # scalars have signs of their own, and meet
            assert error < 0.2


def test_no_gradient_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    tangent, x = ntkit.linearize(network(), readout=ntkit.SumOfLogits()), images()
    found = Leading.of(tangent, x, rank=4, generator=seeded())
    leading = Leading({part: replace(sides, outside=(0.0, 0.0)) for part, sides in found.sides.items()})

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("formed")

    with torch.no_grad():
        found = tangent.derivatives(x)
        exact = found.gram(found)
        size = 400
        small = [p for p, f in found.factors.items() if math.prod(f.shape) <= size]
        assert {p.name for p in found.factors} - {p.name for p in small} == {"2.weight", "4.weight"}
        monkeypatch.setattr(Convolution, "rows", forbidden)
        monkeypatch.setattr(Convolution, "outer", forbidden)
        large = Derivatives(found.outputs, {p: f for p, f in found.factors.items() if p not in small})
        phi = Sketch(size, 0, leading=leading).of(large)[:, 0]
        with pytest.raises(AssertionError, match="formed"):
            Sketch(size, 0).of(large)
    monkeypatch.undo()
    with torch.no_grad():
        exact = large.gram(large)
    assert float((phi @ phi.T - exact).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize("trace", [False, True])
def test_cores_stand_side_by_side_in_half_of_the_buckets(trace: bool) -> None:
    """What is longest meets nothing that is long, whatever parameters stand between."""
    tangent, x = ntkit.linearize(network()), images()
    found = Leading.of(tangent, x, rank=8, generator=seeded())
    leading = Leading({part: replace(sides, outside=(0.0, 0.0)) for part, sides in found.sides.items()})
    with torch.no_grad():
        drawn = Sketch(400, 0, trace, leading)._draw(tangent.derivatives(x))
    cores = [maps.core for maps in drawn.values() if isinstance(maps, Projected)]
    assert len(cores) >= 2
    taken = []
    for core in cores:
        first, rest = torch.meshgrid(*map(torch.arange, core.shape), indexing="ij")
        taken += [core.buckets(first, rest, k)[0].reshape(-1) for k in range(len(core.start))]
    buckets = torch.cat(taken)
    assert len(buckets.unique()) == len(buckets) <= 200
    side = min(cores[0].shape)
    assert side == min(8, math.isqrt(200 // (len(cores) * (5 if trace else 1))))  # as many as fit


def test_directions_lower_the_noise_of_gradients_that_have_much_in_common() -> None:
    """Against projections that keep any six, and against a dense map's noise."""
    tangent, x = ntkit.linearize(network(), readout=ntkit.SumOfLogits()), images(12).abs()
    with torch.no_grad():
        found = tangent.derivatives(x)
        exact = found.gram(found)
    any_ones = Leading(
        {
            part: replace(
                sides,
                outputs=torch.linalg.qr(draw(*sides.outputs.shape)).Q,
                inputs=torch.linalg.qr(draw(*sides.inputs.shape)).Q,
            )
            for part, sides in Leading.of(tangent, x, rank=6, generator=seeded()).sides.items()
        }
    )
    some = Leading.of(tangent, images(16, seed=9).abs(), rank=6, generator=seeded())
    size, errors = 400, []
    for leading in (any_ones, some):
        squares = []
        for seed in range(60):
            with torch.no_grad():
                phi = Sketch(size, seed, leading=leading).of(found)[:, 0]
            squares.append(float((phi @ phi.T - exact).square().sum() / exact.square().sum()))
        errors.append(math.sqrt(sum(squares) / len(squares)))
    diagonal = exact.diagonal()
    dense = math.sqrt(float((torch.outer(diagonal, diagonal) + exact.square()).sum() / size)) / float(exact.norm())
    assert errors[1] < 0.8 * errors[0]
    assert errors[1] < 1.2 * dense


@pytest.mark.parametrize("rank", [1, 4])
def test_in_another_process_and_on_disk(rank: int, tmp_path: Path) -> None:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    tangent, x = ntkit.linearize(network()), images()
    leading = Leading.of(tangent, x, rank=rank, generator=seeded())
    made = ntkit.FeatureMap(tangent, Sketch(300, 3, leading=leading))
    phi = made(x)
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), phi)
    leading.save(tmp_path / "leading.safetensors")
    again = Leading.load(tmp_path / "leading.safetensors")
    assert again.digest == leading.digest
    same = ntkit.FeatureMap(tangent, Sketch(300, 3, leading=again))
    assert torch.equal(same(x), phi)
    made.save(x, tmp_path / "f.zarr")
    assert torch.equal(ntkit.open_features(tmp_path / "f.zarr", same).features(), phi)
    assert torch.equal(ntkit.FeatureMap.stored(tangent, tmp_path / "f.zarr")(x), phi)
    made.save(x, tmp_path / "f.zarr")  # there is nothing more to do
    for other in (Sketch(300, 3), Sketch(300, 3, leading=Leading.of(tangent, x, rank=3, generator=seeded()))):
        with pytest.raises(StoreError, match="sketch"):
            ntkit.open_features(tmp_path / "f.zarr", ntkit.FeatureMap(tangent, other))


def test_a_folder_with_directions_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    tangent, x = ntkit.linearize(network()), images()
    mine = tmp_path / "leading.safetensors"
    Leading.of(tangent, x, rank=3, generator=seeded()).save(mine)
    before = mine.read_bytes()
    made = ntkit.FeatureMap(tangent, Sketch(300, 3, leading=Leading.of(tangent, x, rank=4, generator=seeded())))
    with pytest.raises(InputError, match="is not a matrix written by ntkit"):
        made.save(x, tmp_path)
    assert mine.read_bytes() == before


def test_a_map_from_disk_is_that_of_its_network(tmp_path: Path) -> None:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    tangent, x, path = ntkit.linearize(network()), images(), tmp_path / "f.zarr"
    sketched = ntkit.features(tangent, x, size=300, generator=seeded())
    assert sketched.map is not None
    assert sketched.map.sketch.leading is not None
    kernel = sketched.map.save(x, path)
    assert torch.equal(kernel.features(), sketched.features())
    other = network()
    with torch.no_grad():
        other[0].weight += 1  # type: ignore[operator]
    with pytest.raises(StoreError, match="what differs: parameters"):
        ntkit.FeatureMap.stored(ntkit.linearize(other), path)
    ntkit.FeatureMap(tangent, Sketch(300, 3)).save(x, tmp_path / "plain.zarr")
    assert ntkit.FeatureMap.stored(tangent, tmp_path / "plain.zarr").sketch == Sketch(300, 3)
    (path / "leading.safetensors").unlink()
    with pytest.raises(StoreError, match=r"directions .* are missing"):
        ntkit.FeatureMap.stored(tangent, path)
    sketched.map.save(x, path)  # by the map that made them
    assert ntkit.FeatureMap.stored(tangent, path).sketch.description == sketched.map.sketch.description
    ntkit.TangentKernel(tangent, x).save(tmp_path / "k.zarr")
    with pytest.raises(InputError, match="holds a matrix"):
        ntkit.FeatureMap.stored(tangent, tmp_path / "k.zarr")


def test_damaged_directions_beside_features(tmp_path: Path) -> None:
    pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
    from tests.test_saved import with_each_bit_flipped

    tangent, x, path = ntkit.linearize(network()), images(), tmp_path / "f.zarr"
    leading = Leading.of(tangent, x, rank=2, generator=seeded())
    made = ntkit.FeatureMap(tangent, Sketch(100, 3, leading=leading))
    made.save(x, path)
    file, size = path / "leading.safetensors", 100

    def look() -> bool:
        return ntkit.FeatureMap.stored(tangent, path).sketch.description == made.sketch.description

    found = with_each_bit_flipped(file, look, step=file.stat().st_size // size)
    assert all(seen is True or f"Put a copy of {file} back" in str(seen) for seen in found)
    assert sum(isinstance(seen, StoreError) for seen in found) > 0.95 * size
    file.unlink()
    made.save(x, path)  # as the message says
    assert look()


def test_bad_directions(tmp_path: Path) -> None:
    tangent, x = ntkit.linearize(network()), images()
    for arguments in ({"rank": 0}, {"examples": -1}, {"rank": 2.5}, {"examples": True}):
        with pytest.raises(InputError, match="positive number"):
            Leading.of(tangent, x, generator=seeded(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="float32 or float64"):
        Leading.of(ntkit.linearize(network().bfloat16()), x.bfloat16(), generator=seeded())
    for place in (1, -1):  # among those that give the directions, and those that are measured
        broken = x.clone()
        broken[place] = 1e200
        with pytest.raises(ModelError, match="NaN or infinite"):
            Leading.of(ntkit.linearize(Squared(network())), broken, generator=seeded())
    good = Leading.of(tangent, x, generator=seeded())
    other = Leading({part: replace(sides, outputs=sides.outputs[1:]) for part, sides in good.sides.items()})
    for leading in (Leading({}), other):
        with pytest.raises(InputError, match=r"another network.*2\.weight"):
            ntkit.FeatureMap(tangent, Sketch(300, 3, leading=leading))(x)
    with pytest.raises(InputError, match="no such file"):
        Leading.load(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(InputError, match="holds no leading directions"):
        Leading.load(tmp_path / "text")
