"""The random maps: linear, the same by every route, unbiased, and no noisier than a dense Gaussian map."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ntkit
from ntkit.errors import InputError, ModelError
from ntkit.tangent import sketch as sketching
from ntkit.tangent.derivatives import Derivatives, Part
from ntkit.tangent.factors import Convolution, Factor, Lookup, Outer, Rows
from ntkit.tangent.factors.convolution import Geometry
from ntkit.tangent.sketch import Hash, Sketch
from tests.cases import CASES, Case
from tests.test_exactness import announced


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def only(factor: Factor) -> Derivatives:
    """A network whose one parameter has this factor."""
    return Derivatives(draw(factor.examples, factor.scalars), {Part("w", (0,), True): factor})


def linear(n: int, k: int, t: int, i: int, o: int, *, inputs_first: bool = False, seed: int = 0) -> Outer:
    shape = (i, o) if inputs_first else (o, i)
    return Outer(draw(n, 1, t, i, seed=seed), draw(n, k, 1, t, o, seed=seed + 1), shape, inputs_first)


def image(n: int, k: int, c: int, o: int, groups: int = 1) -> Convolution:
    geometry = Geometry((3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1), groups)
    return Convolution(draw(n, c, 5, 4), draw(n, k, o, 5, 4), (o, c // groups, 3, 2), geometry)


def tokens(n: int, k: int, t: int, vocabulary: int, o: int) -> Lookup:
    ids = torch.randint(vocabulary, (n, t), generator=torch.Generator().manual_seed(0))
    return Lookup(ids, draw(n, k, t, o), (vocabulary, o))


sizes = st.integers(1, 5)
factors = st.one_of(
    st.builds(linear, sizes, sizes, sizes, st.integers(1, 40), st.integers(1, 40), inputs_first=st.booleans()),
    st.builds(image, sizes, sizes, st.sampled_from([2, 4]), st.sampled_from([2, 6]), st.sampled_from([1, 2])),
    st.builds(tokens, sizes, sizes, sizes, st.integers(1, 40), st.integers(1, 20)),
)


@given(factors, st.integers(1, 70), st.booleans(), st.booleans(), st.integers(1, 4000))
@settings(deadline=None, max_examples=150)
def test_every_route_is_that_of_the_rows(factor: Factor, size: int, trace: bool, fourier: bool, room: int) -> None:
    sketch = Sketch(size, 7, trace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketching, "TRANSFORM", 0.0 if fourier else 1e9)
        patch.setattr(sketching, "FORMED", room)
        found = sketch.of(only(factor))
    rows = Rows(factor.rows().contiguous())
    expected = sketch.of(only(rows))
    assert found.shape == (factor.examples, 1 if trace else factor.scalars, size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_transforms_are_taken_and_not_taken() -> None:
    large, small = linear(2, 1, 1, 300, 200), linear(2, 1, 1, 10, 20)
    hashes = [Hash.draw(f.shape, 512, 1, f.like, torch.Generator()) for f in (large, small)]
    assert sketching._transforms(large, hashes[0])
    assert not sketching._transforms(small, hashes[1])


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 50), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None)
def test_the_map_sends_every_entry_to_one_bucket_with_a_sign(
    o: int, i: int, size: int, scalars: int, seed: int
) -> None:
    found = Hash.draw((o, i), size, scalars, draw(1), torch.Generator().manual_seed(seed))
    entries = torch.eye(o * i, dtype=torch.float64).view(o * i, 1, o, i)
    for k in range(scalars):
        rows = entries.new_zeros(o * i, scalars, o, i)
        rows[:, k : k + 1] = entries
        out = rows.new_zeros(o * i, 1, 2 * size)
        found.add(rows, out)
        table = (out[..., :size] + out[..., size:])[:, 0]
        assert table.abs().sum(1).equal(torch.ones(o * i, dtype=torch.float64))
        first, rest = (axis.reshape(-1) for axis in torch.meshgrid(torch.arange(o), torch.arange(i), indexing="ij"))
        bucket, sign = found.buckets(first, rest, k)
        assert table[torch.arange(o * i), bucket].equal(sign)
        if scalars * o * i <= size:
            assert len(bucket.unique()) == o * i  # kept as it is


def dense_variance(x: Tensor, y: Tensor) -> float:
    return float(x.square().sum() * y.square().sum() + (x * y).sum() ** 2)


@pytest.mark.parametrize("rank", [1, 2, 30], ids=lambda rank: f"rank-{rank}")
@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (100, 12), (300,), (6, 150)])
@pytest.mark.parametrize("aligned", [True, False])
def test_sketches_are_unbiased_and_no_noisier_than_gaussian_ones(
    rank: int, shape: tuple[int, ...], aligned: bool
) -> None:
    size, times = 64, 1500
    first, rest = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
    x, other = (draw(first, rank, seed=s) @ draw(rank, rest, seed=s + 10) for s in (1, 2))
    y = x + 0.3 * other if aligned else other
    rows = torch.stack([x, y]).view(2, 1, *shape)
    products = []
    for seed in range(times):
        found = Sketch(size, seed).of(only(Rows(rows)))[:, 0]
        products.append(found[0] @ found[1])
    errors = torch.stack(products) - (x * y).sum()
    bound = dense_variance(x, y) / size
    assert abs(errors.mean()) < 4 * math.sqrt(bound / times)
    assert errors.square().mean() < 1.25 * bound


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("size", "scalars", "shape"), [(32, 12, (16, 30)), (32, 12, (30, 16)), (16, 1, (40, 40)), (16, 3, (20, 24))]
)
def test_more_lines_than_features_are_no_noisier(
    size: int, scalars: int, shape: tuple[int, int], parallel: bool
) -> None:
    """Of several rounds, two lines begin in the same bucket now and then."""
    times, (lines, length) = 1500, sorted(shape)
    x, y = (draw(scalars, lines, 1, seed=s) * draw(length, seed=9) for s in (1, 2))
    if not parallel:
        x, y = draw(scalars, lines, length, seed=1), draw(scalars, lines, length, seed=2)
    y = x + 0.3 * y
    both = torch.stack([x, y])
    rows = Rows(both if shape[0] <= shape[1] else both.mT.contiguous())
    products = []
    for seed in range(times):
        found = Sketch(size, seed, True).of(only(rows))[:, 0]
        products.append(found[0] @ found[1])
    errors = torch.stack(products) - (x * y).sum() / scalars
    bound = dense_variance(x, y) / size / scalars**2
    assert abs(errors.mean()) < 4 * math.sqrt(bound / times)
    assert errors.square().mean() < 1.25 * bound


@given(st.integers(1, 30), st.integers(1, 60), st.integers(1, 40), st.integers(1, 4))
@settings(deadline=None)
def test_lines_of_one_round_begin_apart_and_others_have_other_signs(o: int, i: int, size: int, scalars: int) -> None:
    found = Hash.draw((o, i), size, scalars, draw(1), torch.Generator().manual_seed(o))
    _, lines, blocks = found.start.shape
    rounds: dict[int, list[int]] = {}
    for k in range(scalars):
        for block in range(blocks):
            covered = torch.arange(lines)
            turns = list(found.turns(k, block))
            assert torch.equal(torch.cat([covered[some] for _, some in turns]), covered)
            assert lines > size or len(turns) == 1  # which would take more Fourier transforms
            for place, some in turns:
                (turn,) = {found.turn(k, line, block) for line in range(lines)[some]}
                assert torch.equal(place, found.place[turn])
                rounds.setdefault(turn, []).extend(found.start[k, some, block].tolist())
    assert sorted(rounds) == list(range(len(found.place)))
    assert all(len(set(starts)) == len(starts) for starts in rounds.values())
    assert found.place.numel() <= 2 * found.start.numel() + size  # no more than there are lines, or D


def test_scalars_of_a_trace_have_sketches_of_their_own() -> None:
    factor = linear(3, 4, 2, 9, 8)
    exact = torch.einsum("nkoi,mkoi->nm", factor.rows(), factor.rows()) / 4
    products = []
    for seed in range(800):
        found = Sketch(48, seed, True).of(only(factor))[:, 0]
        products.append(found @ found.T)
    stacked = torch.stack(products)
    error = stacked.mean(0) - exact
    assert (error.abs() < 4.5 * stacked.std(0) / math.sqrt(len(products))).all()


def test_parameters_have_independent_sketches() -> None:
    rows = Rows(draw(1, 1, 5, 8))
    parts = {Part("a", (0,), True): rows, Part("b", (1,), True): rows}
    mean = torch.stack([Sketch(4, s).of(Derivatives(draw(1, 1), parts)).square().sum() for s in range(800)]).mean()
    exact = 2 * rows.values.square().sum()
    assert abs(mean / exact - 1) < 0.12  # were they the same, it would be twice that


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_features_of_every_model(case: Case) -> None:
    """With as many features as parameters nothing is lost, so that every entry of every model has been found."""
    model, x = case.build(), case.data(4)
    with announced(slow=None):
        tangent = ntkit.linearize(model, readout=ntkit.Logits(select=case.select), parameters=case.parameters)
        for trace in (False, True):
            exact = ntkit.TangentKernel(tangent, x, trace=trace).dense()
            size = tangent.count * (tangent.anatomy(x).scalars if trace else 1)
            options = {"trace": trace, "generator": torch.Generator().manual_seed(1)}
            if case.name == "exotic/masked_examples":
                with pytest.raises(ModelError, match="take another path through the model than the first"):
                    ntkit.features(tangent, x, size=size, **options)
                continue
            made = ntkit.features(tangent, x, size=size, **options)
            torch.testing.assert_close(made.dense(), exact, rtol=1e-8, atol=1e-9)
            assert made.scalars == len(exact) // 4


def test_batches_do_not_matter() -> None:
    case = next(case for case in CASES if case.name.startswith("conv"))
    tangent, x = ntkit.linearize(case.build(), readout=ntkit.Logits(select=case.select)), case.data(6)
    sketch = Sketch(50, 3)
    whole = sketch.of(tangent.derivatives(x))
    parts = torch.cat([sketch.of(tangent.derivatives(x, slice(a, b))) for a, b in ((0, 1), (1, 4), (4, 6))])
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)


def test_another_process_draws_the_same() -> None:
    sketch, factor = Sketch(20, 5, True), linear(2, 2, 1, 9, 8)
    again = pickle.loads(pickle.dumps(sketch))
    assert again == sketch
    assert torch.equal(again.of(only(factor)), sketch.of(only(factor)))
    assert not torch.equal(Sketch(20, 6, True).of(only(factor)), sketch.of(only(factor)))


def test_one_sketch_for_several_networks() -> None:
    """It draws for each what a new one draws, whatever it has met before."""
    sketch, single = Sketch(20, 5, True), linear(2, 2, 1, 9, 8)
    single = Outer(single.inputs.float(), single.cotangents.float(), single.shape, False)
    small, large = Rows(draw(2, 2, 3)), Rows(draw(2, 2, 4, 9))
    before = {Part("a", (0,), True): small, Part("b", (1,), True): Rows(draw(2, 2, 3)), Part("c", (2,), True): large}
    after = dict(list(before.items())[1:])
    for found in (
        *map(only, (linear(2, 2, 1, 9, 8), linear(2, 2, 1, 9, 12), linear(2, 3, 1, 9, 8), linear(2, 2, 1, 9, 8))),
        Derivatives(draw(2, 2).float(), {Part("w", (0,), True): single}),
        Derivatives(draw(2, 2), before), Derivatives(draw(2, 2), after),
    ):  # fmt: skip
        assert torch.equal(sketch.of(found), Sketch(20, 5, True).of(found))


@pytest.mark.parametrize("size", [0, -3, 2.5, True])
def test_sizes_that_are_none(size: float) -> None:
    with pytest.raises(InputError, match="size of a sketch is a positive number"):
        Sketch(size, 0)  # type: ignore[arg-type]
