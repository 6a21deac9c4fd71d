"""A plan says what the work will cost: FLOPs are counted, routes follow the arithmetic, budgets are kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.plan import Plan, Sizes, human_bytes, human_flops, make_plan, span
from ntkit.tangent.trial import PartSize
from ntkit.tangent.work import OuterWork, Way
from tests.cases import Net, normal


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4),
        nn.Flatten(), nn.Linear(48, 4),
    )  # fmt: skip


def transformer() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.layers(m.stem(x)).mean(1)), stem=nn.Linear(12, 16), head=nn.Linear(16, 4),
        layers=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
        ),
    )  # fmt: skip


def language() -> nn.Module:
    return Net(
        lambda m, ids: m.head(m.layer(m.table(ids)).mean(1)), table=nn.Embedding(12, 16), head=nn.Linear(16, 4),
        layer=nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
    )  # fmt: skip


def ids(n: int) -> Tensor:
    return torch.randint(12, (n, 6), generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], float]] = {
    "mlp": (mlp, normal(40), 0.02),
    "cnn": (cnn, normal(3, 8, 8), 0.02),
    "transformer": (transformer, normal(4, 12), 0.02),
    "language": (language, ids, 0.10),  # how many ids two batches share depends on the data
}
WAYS = {"full": (ntkit.Logits(), False), "pntk": (ntkit.SumOfLogits(), False), "trace": (ntkit.Logits(), True)}


def kernel(name: str, way: str, *, symmetric: bool, memory: int | None, n: int = 12, m: int = 6) -> Any:
    torch.manual_seed(0)
    make, data, _ = NETWORKS[name]
    readout, trace = WAYS[way]
    x = data(n + m)
    tangent = ntkit.linearize(make().double().eval(), readout=readout)
    return ntkit.TangentKernel(tangent, x[:n], None if symmetric else x[n:], trace=trace, memory=memory)


@pytest.mark.parametrize("memory", [None, 600_000])
@pytest.mark.parametrize("symmetric", [False, True], ids=["rectangular", "symmetric"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_flops_are_those_that_torch_counts(name: str, way: str, symmetric: bool, memory: int | None) -> None:
    got = kernel(name, way, symmetric=symmetric, memory=memory)
    planned = got.plan().flops
    with FlopCounterMode(display=False) as counter:
        got.dense()
    allowed = NETWORKS[name][2]
    assert abs(planned - counter.get_total_flops()) <= allowed * counter.get_total_flops(), (
        planned / counter.get_total_flops()
    )


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_flops_of_one_example_at_a_time(name: str) -> None:
    """The least that any budget allows: blocks and chunks of a single example."""
    got = kernel(name, "full", symmetric=False, memory=1, n=5, m=4)
    plan = got.plan()
    assert (plan.block, plan.chunk) == (1, 1)
    with FlopCounterMode(display=False) as counter:
        got.dense()
    assert plan.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_smaller_budget_never_plans_more_bytes(name: str, way: str) -> None:
    for symmetric in (False, True):
        plans = [
            kernel(name, way, symmetric=symmetric, memory=memory, n=200, m=100).plan()
            for memory in (1, 10_000, 100_000, 1_000_000, 10_000_000, 10**9)
        ]
        peaks = [plan.bytes for plan in plans]
        # up to rounding: what scratch memory gains from a whole byte, held examples may lose
        assert all(small <= 1.001 * large for small, large in itertools.pairwise(peaks))
        assert plans[0].captures >= plans[-1].captures


@pytest.mark.parametrize("name", NETWORKS)
def test_the_text_of_a_plan(name: str) -> None:
    got = kernel(name, "full", symmetric=True, memory=None)
    plan = got.plan()
    text = str(plan)
    rows, cols = got.shape
    assert f"kernel of {rows:,} x {cols:,}: {human_flops(plan.flops)}, {human_bytes(plan.bytes)}" in text
    for parameter, tensor in got.tangent.model.named_parameters():
        assert tensor.ndim < 2 or parameter in text
    assert {route.name for route in plan.routes} == set(got.tangent.parameter_names)
    assert all(reason in text for reason in plan.reasons)
    assert "only one half is computed" in text
    assert "only one half" not in str(kernel(name, "full", symmetric=False, memory=None).plan())
    assert plan.result == rows * cols * 8
    assert (plan.rows, plan.cols, plan.scalars) == (12, 12, rows // 12)


def test_a_plan_does_no_work() -> None:
    torch.manual_seed(0)
    seen: list[int] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        return m.f(x)

    tangent = ntkit.linearize(Net(forward, f=mlp()).double().eval())
    got = ntkit.TangentKernel(tangent, normal(40)(5000), memory=10**6)
    seen.clear()
    plan = got.plan()
    assert sum(seen) <= 10
    assert plan.captures >= 5000


@pytest.mark.parametrize("wrong", [0, -1, -(2**40), 0.5, "1GB", float("nan"), True])
def test_wrong_budgets(wrong: Any) -> None:
    with pytest.raises(InputError, match="memory budget is a positive number of bytes: got"):
        kernel("mlp", "full", symmetric=True, memory=wrong)


# ---------------------------------------------------------------- the arithmetic behind it, without a network


def sizes(work: OuterWork | None, *, scalars: int = 1, row: int | None = None, held: int = 1000) -> Sizes:
    part = PartSize("layer.weight", row if row is not None else work.row_size if work else 10, held, work)
    return Sizes(scalars, 8, 8 * part.row, 1000, 100, (part,), 5000, 7000)


def plan_of(found: Sizes, n: int = 50, m: int = 50, *, trace: bool = False, memory: int = 10**9) -> Plan:
    return make_plan(found, n, m, symmetric=False, trace=trace, memory=memory)


def test_one_position_is_an_outer_product() -> None:
    (route,) = plan_of(sizes(OuterWork(1, 1, 1, 100, 200), scalars=1)).routes
    assert route.way is Way.PAIRS
    assert route.flops == 2 * (100 + 200)
    (route,) = plan_of(sizes(OuterWork(1, 3, 1, 100, 200), scalars=3)).routes
    assert route.flops == 2 * (100 + 9 * 200)
    (route,) = plan_of(sizes(OuterWork(1, 3, 1, 100, 200), scalars=3), trace=True).routes
    assert route.flops == 2 * (100 + 3 * 200)


def test_few_positions_go_by_pairs_and_many_by_rows() -> None:
    few, many = OuterWork(1, 1, 2, 500, 500), OuterWork(1, 1, 400, 20, 20)
    (route,) = plan_of(sizes(few)).routes
    assert route.way is Way.PAIRS
    assert route.flops == 2 * 2**2 * (500 + 500)
    assert "pairs of 2 positions" in route.reason
    (route,) = plan_of(sizes(many)).routes
    assert route.way is Way.ROWS
    assert route.flops == 2 * 20 * 20
    assert "per-example rows of 400" in route.reason


def test_the_route_changes_with_the_number_of_partners() -> None:
    """Rows cost to form: with few partners pairs are cheaper, with many they are not."""
    work = OuterWork(1, 1, 8, 60, 60)
    for n in range(1, 60):
        (route,) = plan_of(sizes(work), n, n).routes
        assert route.way is work.of(n).way(work.of(n), trace=False, same=False)
    assert {plan_of(sizes(work), n, n).routes[0].way for n in (1, 60)} == {Way.PAIRS, Way.ROWS}


@pytest.mark.parametrize("symmetric", [False, True])
def test_captures_are_counted(symmetric: bool) -> None:
    found = sizes(None, held=10**6)
    plan = make_plan(found, 5000, 5000, symmetric=symmetric, trace=False, memory=10**7)
    blocks = list(plan.blocks())
    assert len(blocks) > 1
    assert blocks[0][0] == 0
    assert blocks[-1][1] == 5000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(blocks))
    expected = sum((b - a) + (5000 - b if symmetric else 5000) for a, b in blocks)
    assert plan.captures == expected


def test_span() -> None:
    assert list(span(3, 10, 3)) == [(3, 6), (6, 9), (9, 10)]
    assert list(span(3, 3, 3)) == []


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e16, "30 PB")]
)
def test_bytes_in_words(number: float, text: str) -> None:
    assert human_bytes(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 FLOP"), (1500, "1.5 kFLOP"), (4e12, "4 TFLOP"), (3e16, "30 PFLOP")]
)
def test_flops_in_words(number: float, text: str) -> None:
    assert human_flops(number) == text


@given(st.integers(1, 3000), st.integers(1, 500))
@settings(deadline=None)
def test_chunks_are_of_even_size(n: int, kilobytes: int) -> None:
    """A small chunk at the end would waste the processor."""
    found = Sizes(1, 4, 1000, 1000 * kilobytes, 0, sizes(OuterWork(1, 1, 1, 10, 10)).parts, 1, 1)
    plan = plan_of(found, n, n, memory=2**32)
    lengths = [b - a for a, b in plan.chunks(0, n)]
    assert sum(lengths) == n
    assert max(lengths) - min(lengths) < len(lengths) or len(lengths) == 1


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_few_rows_meet_many_columns_at_once(rows: int) -> None:
    """As many are captured at once as of the same examples in the rows."""
    found = sizes(OuterWork(1, 1, 1, 10, 10))
    wide, tall = (make_plan(found, *shape, symmetric=False, trace=False, memory=10**9) for shape in (
        (rows, 1000), (1000, rows)))  # fmt: skip
    assert wide.chunk == tall.chunk > 100
    assert wide.block == rows
    tight = make_plan(found, rows, 1000, symmetric=False, trace=False, memory=10**5)
    assert 1 < tight.chunk * found.captured <= 10**5
    got = kernel("mlp", "pntk", symmetric=False, memory=None, n=rows, m=300)
    assert got.plan().chunk == 300


def test_large_weights_are_captured_with_many_examples() -> None:
    part = sizes(OuterWork(1, 1, 1, 10, 10)).parts
    small, large = (Sizes(1, 4, parameters, 10**7, 0, part, 1, 1) for parameters in (10**6, 10**8))
    assert 3 * plan_of(small, 500, 500, memory=2**32).chunk < plan_of(large, 500, 500, memory=2**32).chunk
    assert plan_of(large, 500, 500, memory=10**8).chunk * 10**7 < 10**8  # within the budget


@given(st.integers(1, 3000), st.integers(1, 10**7), st.integers(1, 10**8), st.integers(10**6, 10**10), st.booleans())
@settings(deadline=None)
def test_what_is_captured_is_within_a_third_of_the_budget(
    n: int, activations: int, parameters: int, memory: int, symmetric: bool
) -> None:
    """As long as one example is."""
    found = Sizes(1, 4, parameters, activations, 0, sizes(OuterWork(1, 1, 1, 10, 10)).parts, 1, 1)
    plan = make_plan(found, n, n, symmetric=symmetric, trace=False, memory=memory)
    assert plan.chunk == 1 or 3 * plan.chunk * found.captured <= memory


def test_patches_of_one_example_are_in_the_plan() -> None:
    """However large an image, at least its patches and a copy of its inputs are there at once."""
    peaks = []
    for places in (100_000, 200_000):
        part = PartSize("layer.weight", 5760, 8 * 10**6, OuterWork(1, 1, places, 576, 10))
        plan = plan_of(Sizes(1, 4, 23_040, 10**6, 10**6, (part,), 5000, 7000), memory=2**34)
        assert plan.routes[0].way is Way.ROWS
        peaks.append(plan.bytes)
    assert peaks[1] - peaks[0] >= 2 * 100_000 * 576 * 4


def test_many_examples_are_not_all_held_where_capturing_them_again_is_cheap() -> None:
    """The MLP of the benchmarks: 0.7 GB of inputs and cotangents for 20,000 examples, beside a matrix of 1.6 GB."""
    parts = tuple(
        PartSize(str(i), a * b, 4 * (a + b), OuterWork(1, 1, 1, a, b))
        for i, (a, b) in enumerate([(784, 2048), (2048, 2048), (2048, 10)])
    )
    found = Sizes(1, 4, 23_000_000, 40_000, 16_000, parts, 11_600_000, 11_600_000)
    plan, few = (make_plan(found, n, n, symmetric=True, trace=False, memory=3 * 2**30) for n in (20_000, 2_000))
    held = sum(route.held for route in plan.routes)
    assert 20_000 * held > 2**29
    assert plan.block * held < 2**28
    assert plan.captures * found.capture_flops < 0.6 * plan.flops
    assert few.block == few.captures == 2_000
