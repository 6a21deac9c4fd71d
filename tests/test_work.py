"""Ways to contract sums of outer products: each gives the same numbers, and takes the FLOPs that are said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ntkit.tangent.contract import contract
from ntkit.tangent.factors import Convolution, Geometry, Outer
from ntkit.tangent.factors.factor import rows_gram
from ntkit.tangent.pixels import pixel_gram
from ntkit.tangent.products import gram, symmetric_entries
from ntkit.tangent.work import OuterWork, Way
from ntkit.tangent.workspace import Workspace

few = st.integers(1, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outer(n: int, k: int, t: int, i: int, o: int, groups: int, *, last: bool = False, seed: int = 0) -> Outer:
    """With positions last in memory, as convolutions have them, or features last."""
    g = random(n, k, groups, o, t, seed=seed + 1).transpose(3, 4) if last else random(n, k, groups, t, o, seed=seed + 1)
    return Outer(random(n, groups, t, i, seed=seed), g, (groups * o, i))


def by_definition(left: Outer, right: Outer, *, trace: bool) -> Tensor:
    a = torch.einsum("nkgto,ngti->nkgoi", left.cotangents, left.inputs)
    b = torch.einsum("mlgso,mgsi->mlgoi", right.cotangents, right.inputs)
    return torch.einsum("nkgoi,mkgoi->nm" if trace else "nkgoi,mlgoi->nkml", a, b)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Outer, Outer]:
    n, m, k, i, o, groups = (draw(few) for _ in range(6))
    t, s = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    last = draw(st.booleans())
    left = outer(n, k, t, i, o, groups, last=last)
    return left, left if draw(st.booleans()) else outer(m, k, s, i, o, groups, last=draw(st.booleans()), seed=7)


@given(sides=pairs(), trace=st.booleans(), room=st.sampled_from([1, 500, 2**24]))
@settings(max_examples=300, deadline=None)
def test_every_way_gives_the_same(sides: tuple[Outer, Outer], trace: bool, room: int) -> None:
    left, right = sides
    expected = by_definition(left, right, trace=trace)
    workspace = Workspace(room)
    for way in [Way.PAIRS] if trace else [Way.PAIRS, Way.CARRIED]:
        for _ in range(2):  # the second time in used memory
            got = contract(left, right, way, trace=trace, workspace=workspace)
            assert got.shape == expected.shape
            assert torch.allclose(got, expected, atol=1e-10), way
    rows = rows_gram(left.blocks(right, workspace), trace=trace)
    assert torch.allclose(rows, expected, atol=1e-10)


@given(sides=pairs(), trace=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_flops_are_those_that_torch_counts(sides: tuple[Outer, Outer], trace: bool) -> None:
    left, right = sides
    same = left is right
    for way in [Way.PAIRS] if trace else [Way.PAIRS, Way.CARRIED]:
        with FlopCounterMode(display=False) as counter:
            contract(left, right, way, trace=trace, workspace=Workspace())
        counted = counter.get_total_flops()
        work = left.work.products(way, right.work, trace=trace, same=same)
        assert work == counted
    if left.work.groups > 1:
        return  # rows of several groups are formed by einsum, which multiplies single numbers without a product
    with FlopCounterMode(display=False) as counter:
        rows_gram(left.blocks(right, Workspace()), trace=trace)
    products = left.work.products(Way.ROWS, right.work, trace=trace, same=same)
    forming = left.work.forming() + (0 if same else right.work.forming())
    assert products + forming == counter.get_total_flops()


@pytest.mark.parametrize("trace", [False, True])
def test_flops_of_many_examples(trace: bool) -> None:
    """Enough rows for symmetric products and strips to save work."""
    factor = outer(300, 1, 2, 3, 2, 1)
    for way in [Way.PAIRS] if trace else list(Way):
        with FlopCounterMode(display=False) as counter:
            if way is Way.ROWS:
                got = rows_gram(factor.blocks(factor, Workspace()), trace=trace)
            else:
                got = contract(factor, factor, way, trace=trace, workspace=Workspace())
        assert torch.allclose(got, by_definition(factor, factor, trace=trace), atol=1e-10)
        work = factor.work.products(way, factor.work, trace=trace, same=True)
        whole = factor.work.products(way, factor.work, trace=trace, same=False)
        assert work + (factor.work.forming() if way is Way.ROWS else 0) == counter.get_total_flops()
        assert 0.5 * whole < work <= 0.75 * whole


@pytest.mark.parametrize("rows", [1, 5, 63, 64, 65, 127, 320, 700])
def test_a_symmetric_product_is_the_product(rows: int) -> None:
    a = random(rows, 7)
    with FlopCounterMode(display=False) as counter:
        got = gram(a)
    assert torch.allclose(got, a @ a.T)
    assert counter.get_total_flops() == 2 * 7 * symmetric_entries(rows)


@pytest.mark.parametrize("k", [1, 12])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_many_examples(k: int, transposed: bool) -> None:
    """More than are unfolded at once: few positions and large weights, so that no rows are formed."""
    geometry = Geometry((2,), (1,), ((0, 0),), (1,), 1, transposed)

    def some(n: int, seed: int) -> Convolution:
        inputs, outputs = ((90, 3), (40, 4)) if transposed else ((60, 4), (90, 3))
        shape = (90, 40, 2) if transposed else (90, 60, 2)
        return Convolution(random(n, *inputs, seed=seed), random(n, k, *outputs, seed=seed + 1), shape, geometry)

    left, right = some(9, 0), some(5, 5)
    for other in (left, right):
        same = other is left
        assert left.work.way(other.work, trace=False, same=same) is (Way.PAIRS if k == 1 else Way.CARRIED)
        for trace in (False, True):
            expected = by_definition(left.outer(), other.outer(), trace=trace) if not transposed else None
            if expected is None:
                a, b = left.rows().flatten(2), other.rows().flatten(2)
                expected = torch.einsum("nki,mki->nm" if trace else "nki,mli->nkml", a, b)
            for room in (1, 20_000, 2**24):
                assert torch.allclose(left.gram(other, trace=trace, workspace=Workspace(room)), expected, atol=1e-10)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Convolution, Convolution]:
    """Any window, stride, padding, dilation, in one to three dimensions; the other side has images of another size."""
    axes = draw(st.integers(1, 3))
    each = [(draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))) for _ in range(axes)]
    window, dilation, stride = (tuple(found) for found in zip(*each, strict=True))
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(axes))
    geometry = Geometry(window, stride, padding, dilation, 1)
    c, k, o, n, m = (draw(st.integers(1, 3)) for _ in range(5))

    def side(count: int, seed: int) -> Convolution:
        space, places = [], []
        for w, d, s, (before, behind) in zip(window, dilation, stride, padding, strict=True):
            least = max(1, (w - 1) * d + 1 - before - behind)
            space.append(draw(st.integers(least, least + 2)))
            places.append((space[-1] + before + behind - (w - 1) * d - 1) // s + 1)
        return Convolution(
            random(count, c, *space, seed=seed), random(count, k, o, *places, seed=seed + 1), (o, c, *window), geometry
        )

    left = side(n, 0)
    return left, left if draw(st.booleans()) else side(m, 5)


@given(sides=convolutions(), trace=st.booleans(), room=st.sampled_from([1, 500, 2**24]))
@settings(max_examples=300, deadline=None)
def test_pairs_of_patches_from_pairs_of_pixels(sides: tuple[Convolution, Convolution], trace: bool, room: int) -> None:
    left, right = sides
    expected = by_definition(left.outer(), right.outer(), trace=trace)
    with FlopCounterMode(display=False) as counter:
        got = pixel_gram(left, right, trace=trace, workspace=Workspace(room))
    assert torch.allclose(got, expected, atol=1e-10)
    if left.work.by_pixels(right.work) and not left.work.single and room == 2**24:
        counted = counter.get_total_flops()
        assert left.work.products(Way.PAIRS, right.work, trace=trace, same=left is right) == counted


def test_a_last_convolution_goes_by_pixels_and_takes_fewer_products() -> None:
    """512 channels on 4 x 4 places: a ninth of the products of inputs, and no patch is unfolded."""
    geometry = Geometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    factor = Convolution(random(3, 512, 4, 4), random(3, 1, 512, 4, 4, seed=1), (512, 512, 3, 3), geometry)
    work = factor.work
    assert work.way(work, trace=False, same=True) is Way.PAIRS
    assert work.by_pixels(work)
    with FlopCounterMode(display=False) as counter:
        got = factor.gram(factor)
    assert counter.get_total_flops() == work.products(Way.PAIRS, work, trace=False, same=True)
    assert counter.get_total_flops() == 2 * 3 * 3 * 16 * 16 * (512 + 512)
    expected = by_definition(factor.outer(), factor.outer(), trace=False)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-8 * float(expected.abs().max()))
    strided = Convolution(
        random(3, 64, 8, 8), random(3, 1, 64, 4, 4), (64, 64, 3, 3), Geometry((3, 3), (2, 2), ((1, 1),) * 2, (1, 1), 1)
    )
    assert not strided.work.by_pixels(strided.work)  # four times as many pixels as positions
    groups = Geometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 2)
    grouped = Convolution(random(3, 512, 2, 2), random(3, 1, 512, 2, 2, seed=1), (512, 256, 3, 3), groups)
    assert grouped.work.way(grouped.work, trace=False, same=True) is Way.PAIRS
    assert not grouped.work.by_pixels(grouped.work)
    expected = by_definition(grouped.outer(), grouped.outer(), trace=False)
    assert torch.allclose(grouped.gram(grouped), expected, rtol=1e-10, atol=1e-8 * float(expected.abs().max()))
    single = Convolution(
        random(3, 64, 4, 4), random(3, 1, 64, 4, 4), (64, 64, 1, 1), Geometry((1, 1), (1, 1), ((0, 0),) * 2, (1, 1), 1)
    )
    assert not single.work.by_pixels(single.work)


# ---------------------------------------------------------------- which way


def test_a_single_position_never_goes_by_rows() -> None:
    work = OuterWork(1000, 10, 1, 1, 1000)
    assert work.way(work, trace=False, same=False) is Way.PAIRS


def test_the_way_follows_from_the_sizes() -> None:
    image = OuterWork(64, 10, 1024, 27, 64)  # a first convolution
    token = OuterWork(8, 10, 32, 256, 1024)  # a transformer's linear layer
    for work, several, one in ((image, Way.ROWS, Way.ROWS), (token, Way.CARRIED, Way.ROWS)):
        assert work.way(work, trace=False, same=True) is several
        assert work.way(work, trace=True, same=True) is not Way.CARRIED
        single = OuterWork(64, 1, work.positions, work.inputs, work.outputs)
        assert single.way(single, trace=False, same=True) is one
    last = OuterWork(32, 1, 16, 4608, 512)  # a last convolution: few positions, a large weight
    assert last.way(last, trace=False, same=True) is Way.PAIRS


def test_memory_that_is_touched_counts() -> None:
    """By products alone pairs and carrying would win; writing and reading what lies between makes rows cheaper."""
    for work, rival in ((OuterWork(1000, 1, 4, 34, 34), Way.PAIRS), (OuterWork(1000, 4, 4, 14, 14), Way.CARRIED)):
        products = {way: work.products(way, work, trace=False, same=False) for way in Way}
        assert products[rival] < products[Way.ROWS]
        assert work.way(work, trace=False, same=False) is Way.ROWS


def test_temporary_operands_are_not_mistaken_for_one_another() -> None:
    """Patches of a transposed convolution on a single place are made for one product; the next may get their memory."""
    geometry = Geometry((3,), (1,), ((1, 1),), (1,), 1, transposed=True)
    workspace = Workspace()
    factors = [
        Convolution(random(4, 5, 1, seed=i), random(4, 2, 6, 1, seed=i + 50), (5, 6, 3), geometry) for i in range(10)
    ]
    for factor in factors:
        assert factor.work.single
        rows = factor.rows().flatten(2)
        expected = torch.einsum("nki,mli->nkml", rows, rows)
        assert torch.allclose(factor.gram(factor, workspace=workspace), expected, atol=1e-10)


@given(st.lists(st.integers(1, 60), min_size=6, max_size=6), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_work_by_the_formulas(sizes: list[int], trace: bool, same: bool) -> None:
    work = OuterWork(*sizes)
    n, k, t, i, o, groups = sizes
    heads = k if trace else k * k
    assert work.row_size == groups * i * o
    assert work.forming() == 2 * n * k * t * work.row_size
    assert work.of(9) == OuterWork(9, *sizes[1:])
    if work.single:
        return

    def products(way: Way) -> int:
        return work.products(way, work, trace=trace, same=False)

    assert products(Way.ROWS) == 2 * n * n * heads * work.row_size
    assert products(Way.PAIRS) == 2 * n * n * groups * t * t * (i + heads * o)
    if not trace:
        assert products(Way.CARRIED) == 2 * n * n * groups * (t * t * (i + k * o) + heads * t * o)
    for way in Way:
        assert n == 1 or work.products(way, work, trace=trace, same=True) <= products(way)
    strips = list(work.strips(work, trace=trace, same=same))
    assert [a for a, _ in strips] == [0, *(b for _, b in strips[:-1])]
    assert strips[-1][1] == n
