"""Every factored form of per-example gradients against its own rows, and the rows against their definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkit.tangent.capture import Source
from ntkit.tangent.derivatives import Derivatives, Gathering, Part, Term, partition
from ntkit.tangent.factors import (
    Convolution,
    Factor,
    Geometry,
    Lookup,
    Outer,
    PulledBack,
    Rows,
    Total,
    as_matrix,
)
from ntkit.tangent.grain import CPU
from ntkit.tangent.workspace import Workspace

small = st.integers(1, 4)
SCRATCHES = [1, 4000, 2**24]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# (n, seed) -> a factor of n examples; everything else about the parameter is drawn once, by the maker's own maker.
Make = Callable[[int, int], Factor]


@st.composite
def makers(draw: st.DrawFn, kinds: str = "rows outer single convolution transposed lookup total pulled") -> Make:
    """A function (n, seed) -> factor; factors of one maker belong to one parameter."""
    kind, k = draw(st.sampled_from(kinds.split())), draw(small)
    return MAKERS[kind](draw, k)


def make_rows(draw: Any, k: int) -> Make:
    shape = tuple(draw(st.lists(small, max_size=3)))
    return lambda n, seed: Rows(random(n, k, *shape, seed=seed))


def make_outer(draw: Any, k: int, positions: int | None = None) -> Make:
    groups, t, i, o = draw(small), positions or draw(st.integers(1, 6)), draw(small), draw(small)
    first = draw(st.booleans())
    shape = (i, o) if first and groups == 1 else (groups * i, o) if first else (groups * o, i)
    return lambda n, seed: Outer(
        random(n, groups, t, i, seed=seed), random(n, k, groups, t, o, seed=seed + 50), shape, first
    )


def make_convolution(draw: Any, k: int, *, transposed: bool = False) -> Make:
    axes, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    window = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    stride, dilation = (tuple(draw(st.integers(1, 2)) for _ in range(axes)) for _ in "ab")
    padding = tuple((low, low if transposed else low + draw(st.integers(0, 1))) for low in
                    (draw(st.integers(0, 1)) for _ in range(axes)))  # fmt: skip
    c, o = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    geometry = Geometry(window, stride, padding, dilation, groups, transposed)
    space = tuple(d * (w - 1) + 1 + draw(st.integers(0, 3)) for w, d in zip(window, dilation, strict=True))
    if transposed:
        space = tuple(size + 2 for size in space)
        sizes = zip(space, stride, padding, dilation, window, strict=True)
        out = tuple((i - 1) * s - 2 * p + d * (w - 1) + 1 for i, s, (p, _), d, w in sizes)
        shape = (c, o // groups, *window)
    else:
        sizes = zip(space, stride, padding, dilation, window, strict=True)
        out = tuple((i + p + q - d * (w - 1) - 1) // s + 1 for i, s, (p, q), d, w in sizes)
        shape = (o, c // groups, *window)
    images, cotangents = draw(st.booleans()), draw(st.booleans())

    def make(n: int, seed: int) -> Convolution:
        a, g = random(n, c, *space, seed=seed), random(n, k, o, *out, seed=seed + 50)
        return Convolution(
            channels_innermost(a, 1) if images else a, channels_innermost(g, 2) if cotangents else g, shape, geometry
        )

    return make


def channels_innermost(values: Tensor, axis: int) -> Tensor:
    """The same values with the channels innermost in memory."""
    return values.movedim(axis, -1).contiguous().movedim(-1, axis)


def make_lookup(draw: Any, k: int) -> Make:
    vocabulary, t, o = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(small)

    def make(n: int, seed: int) -> Lookup:
        ids = torch.randint(vocabulary, (n, t), generator=torch.Generator().manual_seed(seed))
        return Lookup(ids, random(n, k, t, o, seed=seed + 50), (vocabulary, o))

    return make


def make_total(draw: Any, k: int) -> Make:
    t, i, o = draw(small), draw(small), draw(small)

    def make(n: int, seed: int) -> Total:
        outer = Outer(random(n, 1, t, i, seed=seed), random(n, k, 1, t, o, seed=seed + 9), (o, i))
        ids = torch.randint(o, (n, t), generator=torch.Generator().manual_seed(seed))
        return Total((outer, Lookup(ids, random(n, k, t, i, seed=seed + 5), (o, i)), Rows(random(n, k, o, i, seed=1))))

    return make


def make_pulled(draw: Any, k: int) -> Make:
    leaf = random(3, 4, seed=7).requires_grad_()
    function = draw(st.sampled_from([lambda w: w.tanh(), lambda w: (w / w.norm()).T, lambda w: w[1] * 2, torch.sum]))
    with torch.enable_grad():
        derived = function(leaf)
    return lambda n, seed: PulledBack(Rows(random(n, k, *derived.shape, seed=seed)), derived, leaf)


MAKERS: dict[str, Callable[[Any, int], Make]] = {
    "rows": make_rows,
    "outer": make_outer,
    "single": lambda draw, k: make_outer(draw, k, 1),
    "convolution": make_convolution,
    "transposed": lambda draw, k: make_convolution(draw, k, transposed=True),
    "lookup": make_lookup,
    "total": make_total,
    "pulled": make_pulled,
}


def flat(factor: Factor) -> Tensor:
    return factor.rows().reshape(factor.examples, factor.scalars, -1)


# ---------------------------------------------------------------- every factor against its own rows


@given(make=makers(), n=small, m=small, scratch=st.sampled_from(SCRATCHES), trace=st.booleans(), same=st.booleans())
@settings(max_examples=200, deadline=None)
def test_gram_is_that_of_the_rows(make: Make, n: int, m: int, scratch: int, trace: bool, same: bool) -> None:
    left = make(n, 0)
    right = left if same else make(m, 100)
    a, b = flat(left), flat(right)
    expected = torch.einsum("nki,mki->nm" if trace else "nki,mli->nkml", a, b)
    for workspace in (None, Workspace(scratch)):
        got = left.gram(right, trace=trace, workspace=workspace)
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, atol=1e-10)


@given(make=makers(), n=small, scratch=st.sampled_from(SCRATCHES))
@settings(max_examples=100, deadline=None)
def test_norms_sums_and_sizes(make: Make, n: int, scratch: int) -> None:
    factor = make(n, 0)
    whole = factor.rows()
    assert whole.shape == (n, factor.scalars, *factor.shape)
    assert torch.allclose(factor.squared_norms(Workspace(scratch)), flat(factor).square().sum(2), atol=1e-10)
    weights = random(n, factor.scalars, seed=3)
    total = torch.einsum("nk,nk...->...", weights, whole)
    assert torch.allclose(factor.weighted_sum(weights), total, atol=1e-10)
    direction = random(as_matrix(total).shape[1], seed=4)
    assert torch.allclose(factor.weighted_product(weights, direction), as_matrix(total) @ direction, atol=1e-10)
    assert 0 <= factor.scalar_nbytes <= factor.nbytes


@given(make=makers(), n=small, data=st.data())
@settings(max_examples=100, deadline=None)
def test_rows_in_blocks(make: Make, n: int, data: st.DataObject) -> None:
    factor = make(n, 0)
    if not factor.shape:
        return
    start = data.draw(st.integers(0, factor.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, factor.shape[0]))
    assert torch.allclose(factor.rows(start, stop), factor.rows()[:, :, start:stop], atol=1e-12)
    other = make(data.draw(small), 1)
    workspace = Workspace(data.draw(st.sampled_from(SCRATCHES)))
    entries, total = 0, torch.zeros(n, factor.scalars, other.examples, other.scalars, dtype=torch.float64)
    for left, right in factor.blocks(other, workspace):
        assert left.shape[2:] == right.shape[2:]
        entries += left[0, 0].numel()
        total += torch.einsum("nkp,mlp->nkml", left.flatten(2), right.flatten(2))
    assert entries == prod(factor.shape)  # every entry once
    whole = torch.einsum("nkp,mlp->nkml", factor.rows().flatten(2), other.rows().flatten(2))
    assert torch.allclose(total, whole, atol=1e-10)


@given(make=makers(), sizes=st.lists(small, min_size=2, max_size=3), data=st.data())
@settings(max_examples=100, deadline=None)
def test_gathered_and_narrowed(make: Make, sizes: list[int], data: st.DataObject) -> None:
    parts = [make(n, 10 * i) for i, n in enumerate(sizes)]
    name = Part("w", (0,), True)
    gathering = Gathering(sum(sizes))
    for part in parts:
        batch = Derivatives(random(part.examples, part.scalars), {name: part})
        assert gathering.fits(batch)
        gathering.add(batch)
    assert not gathering.fits(Derivatives(batch.outputs, {Part("v", (0,), True): parts[0]}))
    together = gathering.result().factors[name]
    assert together.examples == sum(sizes)
    assert torch.allclose(together.rows(), torch.cat([part.rows() for part in parts]), atol=1e-12)
    start = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.integers(start + 1, sum(sizes)))
    assert torch.allclose(together.narrow(start, stop).rows(), together.rows()[start:stop], atol=1e-12)
    assert together.nbytes == sum(part.nbytes for part in parts)


@given(make=makers("outer convolution lookup"), n=small, m=small, trace=st.booleans())
@settings(max_examples=60, deadline=None)
def test_gram_with_formed_rows(make: Make, n: int, m: int, trace: bool) -> None:
    """One side may have been settled into rows, the other not."""
    left, right = make(n, 0), make(m, 100)
    expected = left.gram(right, trace=trace)
    assert torch.allclose(Rows(left.rows()).gram(right, trace=trace), expected, atol=1e-10)
    assert torch.allclose(left.gram(Rows(right.rows()), trace=trace), expected, atol=1e-10)


# ---------------------------------------------------------------- rows against autograd


@given(data=st.data(), transposed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_convolution_rows_are_the_derivative(data: st.DataObject, transposed: bool) -> None:
    factor: Any = make_convolution(data.draw, data.draw(st.integers(1, 6)), transposed=transposed)(2, 0)
    g = factor.geometry
    axes = len(g.window)
    weight = random(*factor.shape, seed=9).requires_grad_()
    name = f"conv_transpose{axes}d" if transposed else f"conv{axes}d"
    for n in range(2):
        image = factor.inputs[n : n + 1]
        if transposed:
            padding = [low for low, _ in g.padding]
            out = getattr(F, name)(image, weight, None, g.stride, padding, 0, g.groups, g.dilation)
        else:
            image = F.pad(image, [end for pair in reversed(g.padding) for end in pair])
            out = getattr(F, name)(image, weight, None, g.stride, 0, g.dilation, g.groups)
        for k in range(factor.scalars):
            (expected,) = torch.autograd.grad(out[0], weight, factor.cotangents[n, k], retain_graph=True)
            assert torch.allclose(factor.rows()[n, k], expected, atol=1e-10)
            assert torch.allclose(factor.outer().rows()[n, k].movedim(-1, 1), expected, atol=1e-10)


def test_outer_rows_by_definition() -> None:
    a, g = random(3, 2, 5, 4), random(3, 6, 2, 5, 7, seed=1)
    expected = torch.einsum("nkgto,ngti->nkgoi", g, a)
    assert torch.allclose(Outer(a, g, (14, 4)).rows().view(3, 6, 2, 7, 4), expected)
    assert torch.allclose(Outer(a, g, (8, 7), True).rows().view(3, 6, 2, 4, 7), expected.transpose(3, 4))


def test_lookup_rows_by_definition() -> None:
    ids, g = torch.tensor([[0, 2, 2], [4, 0, 1]]), random(2, 3, 3, 4)
    expected = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    for n in range(2):
        for t in range(3):
            expected[n, :, ids[n, t]] += g[n, :, t]
    factor = Lookup(ids, g, (5, 4))
    assert torch.allclose(factor.rows(), expected)
    assert torch.allclose(factor.rows(1, 3), expected[:, :, 1:3])


@pytest.mark.parametrize("scratch", [1, 3000, 2**20])
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_ids_go_pair_by_pair_or_by_rows(same: bool, trace: bool, scratch: int) -> None:
    """Ids that everybody has, ids that few have, and ids that one side alone has, in one product."""
    n, m, k, t, o, vocabulary = 9, 11, 2, 7, 3, 60

    def batch(examples: int, seed: int) -> Lookup:
        ids = torch.randint(vocabulary, (examples, t), generator=torch.Generator().manual_seed(seed))
        ids[:, :2] = torch.tensor([5, 6])  # two in every example
        return Lookup(ids, random(examples, k, t, o, seed=seed + 50), (vocabulary, o))

    left = batch(n, 0)
    right = left if same else batch(m, 1)
    rare, pairs, common = left._ids_with(right)
    assert torch.equal(pairs, torch.stack([(left.ids == i).sum() * (right.ids == i).sum() for i in rare]))
    assert {5, 6} <= set(common.tolist())
    assert len(rare) > 10
    expected = torch.einsum("nkvo,mlvo->nkml", left.rows(), right.rows())
    expected = torch.einsum("nkmk->nm", expected) if trace else expected
    got = left.gram(right, trace=trace, workspace=Workspace(scratch))
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_entries_that_meet_of_a_lookup() -> None:
    """Many ids, few places: t^2 / vocabulary pairs; few ids: all rows."""
    assert Lookup(torch.zeros(1, 50).long(), random(1, 1, 50, 8), (1000, 8)).met_entries == 50 * 50 * 8 // 1000
    assert Lookup(torch.zeros(1, 6).long(), random(1, 1, 6, 8), (12, 8)).met_entries == 12 * 8


def test_lookups_without_a_common_id() -> None:
    left = Lookup(torch.tensor([[0, 1]]), random(1, 2, 2, 3), (6, 3))
    right = Lookup(torch.tensor([[4, 5]]), random(1, 2, 2, 3, seed=1), (6, 3))
    assert left.gram(right).shape == (1, 2, 1, 2)
    assert not left.gram(right).any()
    assert not left.gram(right, trace=True).any()


def test_pulled_back_rows_by_definition() -> None:
    leaf = random(3, 4).requires_grad_()
    derived = (leaf / leaf.norm(dim=1, keepdim=True)).T
    inner = random(2, 3, 4, 3, seed=1)
    got = PulledBack(Rows(inner), derived, leaf).rows()
    for n in range(2):
        for k in range(3):
            (expected,) = torch.autograd.grad(derived, leaf, inner[n, k], retain_graph=True)
            assert torch.allclose(got[n, k], expected)


# ---------------------------------------------------------------- derivatives


@given(data=st.data(), n=small, m=small, trace=st.booleans(), reused=st.booleans())
@settings(max_examples=60, deadline=None)
def test_derivatives_of_several_parts(data: st.DataObject, n: int, m: int, trace: bool, reused: bool) -> None:
    k = data.draw(small)
    makes = [MAKERS[data.draw(st.sampled_from([*MAKERS]))](data.draw, k) for _ in range(3)]
    parts = [Part(f"p{i}", (i,), True) for i in range(3)]

    def some(size: int, seed: int) -> Derivatives:
        return Derivatives(
            random(size, k),
            {part: make(size, seed + i) for i, (part, make) in enumerate(zip(parts, makes, strict=True))},
        )

    left, right = some(n, 0), some(m, 100)
    a = torch.cat([flat(f) for f in left.factors.values()], 2)
    b = torch.cat([flat(f) for f in right.factors.values()], 2)
    full = torch.einsum("nki,mli->nkml", a, b)
    expected = torch.einsum("nkmk->nm", full) / k if trace else full.reshape(n * k, m * k)
    assert torch.allclose(left.gram(right, trace=trace), expected, atol=1e-10)
    settled = left.settled(n, m, trace=trace, same=False, reused=reused)
    assert torch.allclose(settled.gram(right, trace=trace), expected, atol=1e-10)
    assert torch.allclose(left.squared_norms(), a.square().sum(2), atol=1e-10)
    gathering = Gathering(n + m)
    gathering.add(left)
    gathering.add(right)
    both = gathering.result()
    assert torch.equal(both.outputs, torch.cat([left.outputs, right.outputs]))
    assert (both.examples, both.scalars) == (n + m, k)
    assert torch.allclose(both.narrow(n, n + m).gram(left, trace=trace), expected_transposed(full, trace), atol=1e-10)
    alone = Gathering(n)
    alone.add(left)
    assert alone.result() is left


def expected_transposed(full: Tensor, trace: bool) -> Tensor:
    n, k, m, _ = full.shape
    return (torch.einsum("nkmk->nm", full) / k).T if trace else full.reshape(n * k, m * k).T


def test_only_neighbours_on_the_same_batches_share_a_product() -> None:
    """A weight and its bias share G G^T; another pair of batches must not."""
    g, h = random(2, 3, 1, 1, 4), random(2, 3, 1, 1, 4, seed=1)
    weight, bias = Outer(random(2, 1, 1, 5, seed=2), g, (4, 5)), Outer(torch.ones(2, 1, 1, 1).double(), g, (4,))
    other = Outer(random(2, 1, 1, 5, seed=3), h, (4, 5))
    workspace = Workspace()
    weight.gram(weight, workspace=workspace)
    assert torch.allclose(bias.gram(bias, workspace=workspace), bias.gram(bias))
    assert torch.allclose(weight.gram(other, workspace=workspace), weight.gram(other))
    assert torch.allclose(weight.gram(weight, trace=True, workspace=workspace), weight.gram(weight, trace=True))


@pytest.mark.parametrize("k", [1, 2, 6])
def test_many_examples_of_a_convolution(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More examples than are unfolded at a time."""
    monkeypatch.setattr("ntkit.tangent.grain.CPU", replace(CPU, unfolded=1000))
    geometry = Geometry((3,), (1,), ((1, 1),), (1,), 1)
    factor = Convolution(random(19, 2, 7), random(19, k, 3, 7, seed=1), (3, 2, 3), geometry)
    whole = factor.outer().rows().movedim(-1, 3)  # the channels are behind the window there
    assert torch.allclose(factor.rows(), whole)
    assert torch.allclose(factor.rows(1, 3), whole[:, :, 1:3])


def test_parts_of_a_parameter_are_told_apart_by_the_entries_they_share() -> None:
    """Slices that overlap belong together, also by way of a third; others, and other parameters, stand alone."""
    w, b = random(6, 2), random(6)

    def term(tensor: Tensor, **leaves: Tensor) -> Term:
        return Source(tensor, leaves), Rows(random(3, 1, *tensor.shape))

    terms = [term(w[:2], w=w), term(b, b=b), term(w[4:], w=w), term(w[1:3], w=w)]
    assert [(part.name, part.terms) for part in partition(terms)] == [("w", (0, 3)), ("b", (1,)), ("w", (2,))]
    between = term(w[2:5], w=w)  # touches the last two
    assert [(part.name, part.terms) for part in partition([*terms, between])] == [("w", (0, 2, 3, 4)), ("b", (1,))]
    both = term(w[4:] * b[4:, None], w=w, b=b)  # no view: may be of all entries of both
    assert [(part.name, part.terms) for part in partition([*terms, both])] == [("w", (0, 2, 3, 4)), ("b", (1, 4))]
    assert [part.direct for part in partition(terms)] == [False, True, True]
