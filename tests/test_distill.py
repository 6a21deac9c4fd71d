"""Distillation: every formula beside its definition written out, and the laws of what is kept between batches."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkit.errors import InputError, StoreError
from ntkit.uses.distill import (
    BestSoFar,
    Bins,
    Dense,
    DistillationLoss,
    EMATargets,
    EqualMass,
    EqualWidth,
    Given,
    Indexed,
    Mixed,
    Nearest,
    OneHot,
    Smoothed,
    Stochastic,
    Storage,
    TeacherTargets,
    TopK,
    reliability,
    risk_gap,
    supervision,
)
from tests.elsewhere import DEVICE, device

N, C = 12, 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simplex(n: int, c: int, seed: int = 0) -> Tensor:
    return torch.randn(n, c, generator=seeded(seed), dtype=torch.float64).mul(1.5).softmax(1)


def passes(epochs: int, seed: int = 0, size: int = N, classes: int = C) -> list[tuple[Tensor, Tensor]]:
    """Batches of 5, 5 and 2 in a new order for every epoch."""
    g = seeded(seed)
    return [
        (some, 2 * torch.randn(len(some), classes, generator=g))
        for _ in range(epochs)
        for some in torch.randperm(size, generator=g).split(5)
    ]


def published(batches: list[tuple[Tensor, Tensor]], alpha: float = 0.05, temperature: float = 1.0) -> Tensor:
    """The loop of the public code, in double precision."""
    table = [[0.0] * C for _ in range(N)]
    for indices, z in batches:
        for i, row in zip(indices.tolist(), z.double().tolist(), strict=True):
            total = sum(math.exp(v / temperature) for v in row)
            p = [math.exp(v / temperature) / total for v in row]
            if sum(table[i]) == 0:
                table[i] = p
            else:
                table[i] = [(1 - alpha) * old + alpha * new for old, new in zip(table[i], p, strict=True)]
    return torch.tensor(table, dtype=torch.float64)


def filled(batches: list[tuple[Tensor, Tensor]], storage: Storage | None = None, **more: Any) -> EMATargets:
    found = EMATargets(N, C, storage=storage, **more)
    for indices, z in batches:
        found.update(indices, z)
    return found


# The filter


@pytest.mark.parametrize(("alpha", "temperature"), [(0.05, 1.0), (0.3, 2.0), (1.0, 0.5)])
def test_the_filter_is_the_published_loop(alpha: float, temperature: float) -> None:
    batches = passes(7)
    found = filled(batches, Dense(torch.float64), alpha=alpha, temperature=temperature)
    # logits of float32 are filtered in float32 and kept in float64
    torch.testing.assert_close(found.table(), published(batches, alpha, temperature), rtol=1e-5, atol=1e-6)
    assert found.updates.tolist() == [7] * N


def test_one_row_by_hand() -> None:
    found = EMATargets(3, 2, alpha=0.25)
    found.update([1], torch.tensor([[0.0, math.log(3)]]))
    assert found.targets([1])[0].tolist() == pytest.approx([0.25, 0.75])
    found.update(np.array([1]), torch.tensor([[0.0, 0.0]]))
    assert found.targets([1])[0].tolist() == pytest.approx([0.3125, 0.6875])


def test_the_weight_of_the_first_prediction_is_what_the_docs_say() -> None:
    found = EMATargets(1, 2)
    for epoch in range(30):
        found.update([0], torch.tensor([[50.0, 0.0] if epoch == 0 else [0.0, 50.0]]))
    assert float(found.targets([0])[0, 0]) == pytest.approx(0.95**29, rel=1e-4)
    assert round(0.95**29, 2) == 0.23


def test_debiased_rows_are_weighted_means() -> None:
    """sum_t (1 - alpha)^(T - t) p_t, divided by the sum of these weights: no weight of its own for the first."""
    batches = passes(6)
    for alpha in (0.05, 0.4):
        found = filled(batches, Dense(torch.float64), alpha=alpha, debias=True).table()
        for i in range(N):
            seen = [z[indices == i][0].double().softmax(0) for indices, z in batches if bool((indices == i).any())]
            weights = [(1 - alpha) ** (len(seen) - 1 - t) for t in range(len(seen))]
            mean = torch.stack([w * p for w, p in zip(weights, seen, strict=True)]).sum(0) / sum(weights)
            torch.testing.assert_close(found[i], mean, rtol=1e-5, atol=1e-6)


def test_an_example_twice_in_a_batch_counts_twice_in_order() -> None:
    z = torch.randn(6, C, generator=seeded())
    rows = torch.tensor([4, 2, 4, 0, 4, 2])
    at_once, one_by_one = EMATargets(N, C), EMATargets(N, C)
    at_once.update(rows, z)
    for k in range(6):
        one_by_one.update(rows[k : k + 1], z[k : k + 1])
    assert torch.equal(at_once.targets([0, 2, 4]), one_by_one.targets([0, 2, 4]))
    assert at_once.updates.tolist() == [1, 0, 2, 0, 3] + [0] * 7


@given(order=st.permutations(range(8)), storage=st.sampled_from([Dense(), TopK(2), Dense(torch.float16, Nearest())]))
@settings(max_examples=20, deadline=None)
def test_the_order_within_a_batch_does_not_matter(order: list[int], storage: Storage) -> None:
    a, b, places = EMATargets(N, C, storage=storage), EMATargets(N, C, storage=storage), torch.tensor(order)
    for seed in range(3):
        rows = torch.randperm(N, generator=seeded(seed))[:8]
        z = torch.randn(8, C, generator=seeded(seed + 50))
        a.update(rows, z)
        b.update(rows[places], z[places])
    known = a.updates.nonzero()[:, 0]
    torch.testing.assert_close(a.targets(known), b.targets(known), rtol=1e-6, atol=1e-7)


def test_an_update_leaves_the_graph_alone() -> None:
    z = torch.randn(3, C, generator=seeded(), requires_grad=True)
    found = EMATargets(N, C)
    found.update([0, 1, 2], z)
    assert z.grad is None
    assert not found.targets([0]).requires_grad
    z.softmax(1).square().sum().backward()
    before = found.targets([0]).clone()
    found.targets([0]).zero_()  # a copy
    assert torch.equal(found.targets([0]), before)
    half = EMATargets(N, C)
    half.update([0, 1, 2], z.detach().bfloat16())
    torch.testing.assert_close(half.targets([0, 1, 2]), z.detach().bfloat16().float().softmax(1))


def storages() -> list[tuple[str, Any]]:
    return [
        ("float32", lambda: Dense()),
        ("float64", lambda: Dense(torch.float64)),
        ("float16", lambda: Dense(torch.float16, Stochastic(seeded(3)))),
        ("bfloat16", lambda: Dense(torch.bfloat16, Nearest())),
        ("top", lambda: TopK(2, torch.float16, Stochastic(seeded(4)))),
        ("top all", lambda: TopK(C)),
    ]


@pytest.mark.parametrize(("name", "storage"), storages())
def test_targets_are_on_the_simplex(name: str, storage: Any) -> None:
    p = filled(passes(6), storage()).table()
    assert p.dtype == (torch.float64 if name == "float64" else torch.float32)
    assert float(p.min()) >= 0
    torch.testing.assert_close(p.sum(1), torch.ones(N).to(p), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "storage"), storages())
def test_a_state_goes_on_bit_for_bit(name: str, storage: Any) -> None:
    batches = passes(8)
    whole = filled(batches, storage())
    half, file = filled(batches[:11], storage()), io.BytesIO()
    torch.save(half.state_dict(), file)
    frozen = half.state_dict()
    for indices, z in batches[11:]:
        half.update(indices, z)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for key, value in state.items():  # a copy: going on has not changed it
        assert torch.equal(value, frozen[key]) if isinstance(value, Tensor) else value == frozen[key]
    resumed = EMATargets(N, C, storage=storage())
    resumed.load_state_dict(state)
    for indices, z in batches[11:]:
        resumed.update(indices, z)
    assert torch.equal(resumed.table(), whole.table()), name
    assert torch.equal(half.table(), whole.table())
    assert torch.equal(resumed.updates, whole.updates)


# Storage


@pytest.mark.parametrize("rounding", [Nearest(), Stochastic(seeded(1))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_its_bound(rounding: Any, dtype: torch.dtype) -> None:
    batches = passes(60, seed=2)
    kept = filled(batches, Dense(dtype, rounding)).state_dict()["values"].double()
    exact = filled(batches, Dense(torch.float64)).table()
    assert float((kept - exact).abs().max()) <= rounding.bound(0.05, dtype)
    step = 2.0**-12 if dtype == torch.float16 else 2.0**-9
    assert rounding.bound(0.05, dtype) == 20 * step * (1 if isinstance(rounding, Nearest) else 2)


def test_small_updates_are_lost_by_nearest_and_not_by_stochastic_rounding() -> None:
    size, start, end = 1000, torch.tensor([0.900, 0.100]).log(), torch.tensor([0.904, 0.096]).log()
    ends = {}
    stochastic = Stochastic(seeded())
    for name, storage in (("nearest", Dense(torch.float16, Nearest())), ("random", Dense(torch.float16, stochastic))):
        found = EMATargets(size, 2, storage=storage)
        found.update(range(size), start.repeat(size, 1))
        for _ in range(200):  # ten time constants: what is left of the start is 4e-5
            found.update(range(size), end.repeat(size, 1))
        ends[name] = found.state_dict()["values"].double()[:, 0]
    assert float(ends["nearest"].std()) == 0
    assert abs(float(ends["nearest"][0]) - 0.900) < 3e-4  # has not moved at all
    deviation = stochastic.deviation(0.05, torch.float16)
    assert deviation == pytest.approx(7.8e-4, rel=0.01)
    assert abs(float(ends["random"].mean()) - 0.904) < 5 * deviation / size**0.5 + 1e-6
    assert 0.3 * deviation < float(ends["random"].std()) <= 1.05 * deviation


@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
@settings(max_examples=25, deadline=None)
def test_stochastic_rounding_gives_a_neighbour_and_is_right_on_average(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(values)
    draws = torch.stack([Stochastic(seeded(s)).round(x, dtype).float() for s in range(200)])
    step = torch.finfo(dtype).eps * x.clamp_min(torch.finfo(dtype).tiny)  # between neighbours, at most
    assert bool((draws >= 0).all())
    assert bool(((draws - x).abs() <= step).all())
    assert bool(((draws.mean(0) - x).abs() <= 6 * step / 2 / 200**0.5).all())
    exact = x.to(dtype).float()
    assert torch.equal(Stochastic(seeded()).round(exact, dtype).float(), exact)


@pytest.mark.parametrize("rounding", [None, "random"])
def test_all_classes_of_top_k_are_dense(rounding: str | None) -> None:
    batches = passes(9)
    dtype = torch.float32 if rounding is None else torch.float16
    if rounding is None:
        a, b = filled(batches, TopK(C)), filled(batches, Dense())
        torch.testing.assert_close(a.table(), b.table(), rtol=1e-6, atol=1e-7)
    else:
        a, b = filled(batches, TopK(C, dtype, Nearest())), filled(batches, Dense(dtype, Nearest()))
        assert torch.equal(a.table(), b.table())


def test_top_k_keeps_the_largest_and_spreads_the_rest() -> None:
    p = simplex(N, C, 7)
    found = EMATargets(N, C, storage=TopK(2, torch.float64))
    found.update(range(N), p.log())
    for row, exact in zip(found.table(), p, strict=True):
        first, second = exact.argsort(descending=True)[:2].tolist()
        rest = (1 - exact[first] - exact[second]) / (C - 2)
        expected = [float(exact[c]) if c in (first, second) else float(rest) for c in range(C)]
        assert row.tolist() == pytest.approx(expected, abs=1e-12)
        left = float(1 - exact[first] - exact[second])
        assert float((row - exact).abs().sum()) / 2 <= left + 1e-12
    found.update([0], torch.full((1, C), 0.0, dtype=torch.float64))  # (1 - alpha) of the reading, and a class may enter
    q = 0.95 * _top(p[:1], 2) + 0.05 / C
    torch.testing.assert_close(found.targets([0]), _top(q, 2), rtol=1e-10, atol=1e-12)


def _top(p: Tensor, k: int) -> Tensor:
    kept = torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(k, 1).indices, value=True)
    left = 1 - (p * kept).sum(1, keepdim=True)
    return torch.where(kept, p, left / (p.shape[1] - k))


def test_sizes_are_what_the_docs_say() -> None:
    for storage, of_million in ((Dense(), 4000), (Dense(torch.float16, Nearest()), 2000), (_top20(), 80)):
        assert EMATargets(10, 1000, storage=storage).memory_bytes == 10 * of_million
    assert round(1.28 * 80) == 102  # MB for the 1.28 million examples of ImageNet


def _top20() -> TopK:
    return TopK(20, torch.float16, Nearest())


def test_a_table_on_disk_is_the_one_in_memory(tmp_path: Path) -> None:
    path, batches = tmp_path / "targets.bin", passes(5)
    found = filled(batches, Dense(torch.float16, Nearest(), path))
    assert torch.equal(found.table(), filled(batches, Dense(torch.float16, Nearest())).table())
    assert path.stat().st_size == N * C * 2
    raw = np.fromfile(path, np.float16).reshape(N, C)
    assert np.array_equal(raw, found.state_dict()["values"].numpy())
    with pytest.raises(StoreError, match="overwrite=True"):
        EMATargets(N, C, storage=Dense(path=path))
    assert np.array_equal(np.fromfile(path, np.float16).reshape(N, C), raw)
    again = EMATargets(N, C, storage=Dense(torch.float16, Nearest(), path, overwrite=True))
    assert not again.updates.any()
    with pytest.raises(StoreError, match="cannot keep"):
        EMATargets(N, C, storage=Dense(path=tmp_path / "no" / "folder"))


# What does not fit the filter


def test_examples_that_were_never_seen() -> None:
    labels = torch.arange(N) % C
    found = EMATargets(N, C)
    found.update([0, 3], torch.zeros(2, C))
    with pytest.raises(InputError, match=r"2 of these 3 .* number 5"):
        found.targets([0, 5, 7])
    found = EMATargets(N, C, fallback=OneHot(labels, C))
    found.update([0, 3], torch.zeros(2, C))
    assert found.targets([3, 7])[0].tolist() == pytest.approx([0.2] * C)
    assert found.targets([3, 7])[1].tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("indices", "z", "words"),
    [
        ([0, N], torch.zeros(2, C), "0 to 11"),
        ([-1, 0], torch.zeros(2, C), "from -1 to 0"),
        ([0.0, 1.0], torch.zeros(2, C), "whole numbers"),
        ([[0, 1]], torch.zeros(2, C), "whole numbers"),
        (torch.ones(N, dtype=torch.bool), torch.zeros(N, C), "whole numbers"),
        ([0, 1], torch.zeros(2, C + 1), "expected floating point"),
        ([0, 1], torch.zeros(3, C), "expected floating point"),
        ([0, 1], torch.zeros(2, C, dtype=torch.int64), "expected floating point"),
        ([0, 1], [[0.0] * C] * 2, "got list"),
        ([0, 1], torch.tensor([[0.0] * C, [math.nan] * C]), "diverged"),
        ([0, 1], torch.tensor([[0.0] * C, [math.inf] * C]), "diverged"),
    ],
)
def test_what_a_filter_refuses_changes_nothing(indices: Any, z: Any, words: str) -> None:
    found = filled(passes(2))
    before = found.state_dict()
    with pytest.raises(InputError, match=words):
        found.update(indices, z)
    for key, value in found.state_dict().items():
        assert torch.equal(value, before[key]) if isinstance(value, Tensor) else value == before[key]


def test_settings_that_do_not_fit() -> None:
    for bad in ({"alpha": 0.0}, {"alpha": 1.5}, {"alpha": math.nan}, {"temperature": 0.0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            EMATargets(N, C, **bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="two classes"):
        EMATargets(N, 1)
    with pytest.raises(InputError, match="fallback"):
        EMATargets(N, C, fallback=OneHot(torch.zeros(N - 1, dtype=torch.int64), C))
    with pytest.raises(InputError, match="Stochastic"):
        Dense(torch.float16)
    with pytest.raises(InputError, match="Stochastic"):
        TopK(2, torch.bfloat16)
    with pytest.raises(InputError, match="16-bit"):
        Dense(rounding=Nearest())
    with pytest.raises(InputError, match="dtype"):
        Dense(torch.int32)
    with pytest.raises(InputError, match="at most the 5 classes"):
        EMATargets(N, C, storage=TopK(6))
    with pytest.raises(InputError, match="k: got 0"):
        TopK(0)


def test_a_state_of_another_table_is_refused() -> None:
    state = filled(passes(2)).state_dict()
    others = [
        EMATargets(N + 1, C),
        EMATargets(N, C + 1),
        EMATargets(N, C, alpha=0.1),
        EMATargets(N, C, temperature=2.0),
        EMATargets(N, C, debias=True),
        EMATargets(N, C, storage=Dense(torch.float64)),
        EMATargets(N, C, storage=TopK(C)),
        EMATargets(N, C, storage=Dense(torch.float16, Stochastic(seeded()))),
    ]
    for other in others:
        with pytest.raises(InputError, match="state"):
            other.load_state_dict(state)
        assert not other.updates.any()


# Other targets


def test_label_smoothing_is_normalised_and_the_notebook_is_not() -> None:
    y = torch.tensor([0, 2, 1])
    found = Smoothed(y, 3, 0.97)
    assert found.targets([1])[0].tolist() == pytest.approx([0.01, 0.01, 0.98])
    torch.testing.assert_close(found.table().sum(1), torch.ones(3))
    notebook = torch.nn.functional.one_hot(y, 3) * 0.97 + 0.03 / 2
    assert notebook.sum(1).tolist() == pytest.approx([1.015] * 3)
    assert torch.equal(OneHot(y, 3).table(), torch.eye(3)[y])
    assert torch.equal(Smoothed(y, 3, 1.0).table(), OneHot(y, 3).table())


def test_given_and_mixed() -> None:
    p, y = simplex(N, C), torch.arange(N) % C
    known, labels = Given(p), OneHot(y, C)
    assert torch.equal(known.targets(torch.tensor([3, 3, 0])), p[[3, 3, 0]])
    mixed = Mixed(labels, known, 0.25)
    torch.testing.assert_close(mixed.table(), 0.25 * torch.eye(C)[y] + 0.75 * p)
    assert (len(mixed), mixed.classes) == (N, C)
    away = torch.tensor([supervision(Mixed(labels, known, s).table(), p).mean for s in (0.0, 0.25, 1.0)])
    torch.testing.assert_close(away, torch.tensor([0, 0.25, 1.0]) * away[2], rtol=1e-5, atol=1e-7)


def test_targets_that_are_none() -> None:
    p = simplex(N, C)
    for bad, words in (
        (torch.randn(N, C), "take softmax"),
        (torch.full((N, C), math.nan), "not finite"),
        (p[0], "expected probabilities"),
        (p * 2, "sum to 2"),
        (p.long(), "expected probabilities"),
    ):
        with pytest.raises(InputError, match=words):
            Given(bad)
    with pytest.raises(InputError, match="classes from 0 to 4, expected 0 to 3"):
        OneHot(torch.arange(5), 4)
    with pytest.raises(InputError, match="classes as numbers"):
        OneHot(torch.zeros(5), 4)
    with pytest.raises(InputError, match="keep"):
        Smoothed(torch.arange(5), 5, 1.1)
    with pytest.raises(InputError, match="same examples"):
        Mixed(OneHot(torch.arange(5), 5), Given(p), 0.5)
    with pytest.raises(InputError, match="share"):
        Mixed(Given(p), Given(p), -0.1)
    with pytest.raises(InputError, match="expected 0 to 11"):
        Given(p).targets([N])


def test_one_logit_is_no_supervision() -> None:
    """Its softmax is 1 for every example; two of it say what its sigmoid says."""
    torch.manual_seed(0)
    x, single = torch.randn(N, 4, generator=seeded()), nn.Linear(4, 1)
    words = r"two classes or more.*torch\.stack\(\[0 \* z, z\], 1\)"
    batches: list[int] = []
    handle = single.register_forward_hook(lambda _module, _inputs, output: batches.append(len(output)))
    with pytest.raises(InputError, match=words):
        TeacherTargets.of(single, x, batch_size=5)
    handle.remove()
    assert batches == [5]  # not after all have been through
    with pytest.raises(InputError, match=words):
        Given(torch.ones(N, 1))
    found = TeacherTargets.of(single, x, select=lambda output: torch.stack([0 * output[:, 0], output[:, 0]], 1))
    torch.testing.assert_close(found.table()[:, 1], single(x).detach()[:, 0].sigmoid())


def test_labels_on_a_device_give_targets_on_the_cpu() -> None:
    """As those of a teacher and of a table do, so that they can be mixed."""
    p, y = simplex(N, C), torch.arange(N) % C
    with device():
        labels = OneHot(y.to(DEVICE), C)
        assert labels.targets([3, 0]).device.type == "cpu"
        torch.testing.assert_close(Mixed(labels, Given(p), 0.5).table(), 0.5 * torch.eye(C)[y] + 0.5 * p)


def test_a_teacher_is_asked_in_evaluation_mode_and_left_alone() -> None:
    x = torch.randn(N, 4, generator=seeded())
    last = nn.Linear(8, C)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), last)
    model(x)
    model[2].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = TeacherTargets.of(model, x, temperature=2.5, batch_size=5)
    assert [m.training for m in model] == [True, True, False, True]
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    model.eval()
    z = model(x).double()
    torch.testing.assert_close(found.table().double(), (z / 2.5).exp() / (z / 2.5).exp().sum(1, keepdim=True))
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="temperature"):
            TeacherTargets.of(model, x, temperature=bad)
    with torch.no_grad():
        last.bias.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        TeacherTargets.of(model, x)


# The student's loss


@given(
    tau=st.floats(0.5, 10),
    factor=st.sampled_from([1.0, 2.0]),
    hard=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_the_loss_is_its_definition(tau: float, factor: float, hard: float, seed: int) -> None:
    z = torch.randn(4, C, dtype=torch.float64, generator=seeded(seed), requires_grad=True)
    p, y = simplex(4, C, seed + 1), torch.tensor([0, 4, 2, 2])
    loss = DistillationLoss(tau, hard, factor)(z, p, y if hard else None)
    total = 0.0
    for row, target, label in zip(z.tolist(), p.tolist(), y.tolist(), strict=True):
        student = [math.exp(v / tau) / sum(math.exp(w / tau) for w in row) for v in row]
        teacher = [v ** (1 / tau) / sum(w ** (1 / tau) for w in target) for v in target]
        kl = sum(a * math.log(a / b) for a, b in zip(teacher, student, strict=True))
        entropy = -math.log(math.exp(row[label]) / sum(math.exp(w) for w in row))
        total += ((1 - hard) * factor * tau**2 * kl + hard * entropy) / 4
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, z)
    soft = factor * tau * ((z / tau).softmax(1) - (p.log() / tau).softmax(1)) / 4
    sharp = (z.softmax(1) - torch.eye(C, dtype=torch.float64)[y]) / 4
    torch.testing.assert_close(gradient, (1 - hard) * soft + hard * sharp, rtol=1e-9, atol=1e-12)


def test_the_published_loss() -> None:
    z, tau = torch.randn(6, C, generator=seeded()), 4.0
    q = simplex(6, C).float()
    code = nn.KLDivLoss(reduction="batchmean")((z / tau).log_softmax(1), (q.log() / tau).softmax(1)) * 2 * tau**2
    torch.testing.assert_close(DistillationLoss(tau, factor=2)(z, q), code)


def test_one_hot_targets_at_any_temperature() -> None:
    z, y = torch.randn(6, C, generator=seeded(), requires_grad=True), torch.arange(6) % C
    plain = nn.functional.cross_entropy(z, y)
    torch.testing.assert_close(DistillationLoss()(z, torch.eye(C)[y]), plain)
    torch.testing.assert_close(DistillationLoss()(z, y), plain)
    tempered = DistillationLoss(4.0)(z, torch.eye(C)[y])
    tempered.backward()
    assert z.grad is not None
    assert bool(torch.isfinite(z.grad).all())
    torch.testing.assert_close(tempered, 16 * nn.functional.cross_entropy(z / 4, y))
    half = DistillationLoss()(z.detach().bfloat16(), torch.eye(C)[y])
    assert half.dtype == torch.float32


def test_what_a_loss_refuses() -> None:
    z, p, y = torch.zeros(3, C), simplex(3, C).float(), torch.tensor([0, 1, 2])
    for bad in ({"temperature": 0.0}, {"hard_weight": 1.5}, {"factor": -1.0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            DistillationLoss(**bad)
    for targets, words in (
        (torch.randn(3, C, generator=seeded()), "sum to 1"),
        (p * 1.1, "sum to 1"),
        (p[:, :4], "shape of the outputs"),
        (p[:2], "shape of the outputs"),
        (p * math.nan, "not finite"),
        (torch.tensor([0, 1, C]), "classes are numbers"),
    ):
        with pytest.raises(InputError, match=words):
            DistillationLoss()(z, targets)
    with pytest.raises(InputError, match="no labels; give them"):
        DistillationLoss(hard_weight=0.5)(z, p)
    with pytest.raises(InputError, match="leave them out"):
        DistillationLoss()(z, p, y)
    assert repr(DistillationLoss(2.0)) == "DistillationLoss(temperature=2.0, hard_weight=0.0, factor=1.0)"


# Early stopping


@given(
    scores=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    lower=st.booleans(),
    patience=st.none() | st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_the_best_so_far(scores: list[int], lower: bool, patience: int | None) -> None:
    best, model = BestSoFar(patience=patience, lower_is_better=lower), nn.Linear(1, 1)
    seen = []
    for k, score in enumerate(scores):
        with torch.no_grad():
            model.weight.fill_(k)
        seen.append(score)
        top = min(seen) if lower else max(seen)
        assert best.update(score, model=model) == (seen.index(top) == k)
        assert model.weight.item() == k  # not changed
        assert (best.score, best.epoch) == (top, seen.index(top))
        assert best.exhausted == (patience is not None and k - seen.index(top) >= patience)
    other = nn.Linear(1, 1)
    best.restore(model=other)
    assert other.weight.item() == best.epoch
    assert model.weight.item() == len(scores) - 1
    file = io.BytesIO()
    torch.save(best.state_dict(), file)
    file.seek(0)
    again = BestSoFar(patience=patience, lower_is_better=lower)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert (again.score, again.epoch, again.exhausted) == (best.score, best.epoch, best.exhausted)
    assert torch.equal(again.state("model")["weight"], best.state("model")["weight"])


def test_a_table_and_an_optimiser_are_kept_beside_the_network() -> None:
    model, table = nn.Linear(2, C), EMATargets(N, C)
    optimizer = torch.optim.Adam(model.parameters())
    batches, best = passes(4), BestSoFar()
    for epoch in range(4):
        for indices, z in batches[3 * epoch : 3 * epoch + 3]:
            table.update(indices, z)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        best.update([0.1, 0.7, 0.7, 0.2][epoch], model=model, table=table, optimizer=optimizer)
    kept = EMATargets(N, C)
    best.restore(table=kept)
    assert torch.equal(kept.table(), filled(batches[:6]).table())
    assert best.state("optimizer")["state"][0]["step"] == 2
    best.state("model")["weight"].zero_()  # a copy
    assert float(best.state("model")["weight"].abs().sum()) > 0


def test_what_early_stopping_refuses() -> None:
    best, model = BestSoFar(), nn.Linear(1, 1)
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="finite"):
            best.update(bad, model=model)
    with pytest.raises(InputError, match="nothing is kept as 'model'"):
        best.restore(model=model)
    best.update(1.0, model=model)
    with pytest.raises(InputError, match="kept before"):
        best.update(2.0, student=model)
    with pytest.raises(InputError, match="patience"):
        BestSoFar(patience=0)
    with pytest.raises(InputError, match="entries"):
        best.load_state_dict({"score": 1.0})


# Quality


def test_supervision_is_its_definition() -> None:
    p, q = simplex(N, C, 1), simplex(N, C, 2)
    pairs = list(zip(p.tolist(), q.tolist(), strict=True))
    rows = [math.sqrt(sum((a - b) ** 2 for a, b in zip(r, s, strict=True))) for r, s in pairs]
    found = supervision(p, q)
    assert found.mean == pytest.approx(sum(rows) / N)
    assert found.frobenius == pytest.approx(math.sqrt(sum(r**2 for r in rows)))
    assert found.frobenius == pytest.approx(float(torch.dist(p, q)))
    assert found.root_mean_square == pytest.approx(found.frobenius / N**0.5)
    assert found.agreement == sum(r.index(max(r)) == s.index(max(s)) for r, s in pairs) / N
    assert supervision(q, q).mean == 0


@given(
    n=st.integers(2, 9),
    c=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.1, 20),
    shift=st.floats(-50, 50),
)
@settings(max_examples=80, deadline=None)
def test_the_bound_of_the_risk_holds(n: int, c: int, seed: int, scale: float, shift: float) -> None:
    p, q = simplex(n, c, seed), simplex(n, c, seed + 1)
    losses = -(scale * torch.randn(n, c, dtype=torch.float64, generator=seeded(seed + 2))).log_softmax(1)
    found = risk_gap(losses, p, q)
    seen = sum(float(p[i, k] * losses[i, k]) for i in range(n) for k in range(c)) / n
    meant = sum(float(q[i, k] * losses[i, k]) for i in range(n) for k in range(c)) / n
    assert (found.seen, found.meant) == (pytest.approx(seen), pytest.approx(meant))
    assert found.gap == pytest.approx(abs(seen - meant), abs=1e-9)
    assert found.gap <= found.by_example * (1 + 1e-9) + 1e-12
    assert found.by_example <= found.bound * (1 + 1e-9)
    moved = risk_gap(losses + shift, p, q)  # a constant in the loss has no part in it
    assert (moved.gap, moved.bound) == (pytest.approx(found.gap, abs=1e-8), pytest.approx(found.bound, rel=1e-6))


def test_the_bound_is_reached() -> None:
    q = torch.full((4, C), 1 / C, dtype=torch.float64)
    p = q + 0.01 * torch.tensor([1.0, -1, 0, 0, 0], dtype=torch.float64)
    losses = 3 + 7 * (p - q)  # in the direction of the difference
    found = risk_gap(losses, p, q)
    assert found.gap == pytest.approx(found.bound, rel=1e-9)
    assert found.gap == pytest.approx(7 * 2e-4)


def test_what_chance_adds() -> None:
    """Over many draws of n examples the squared error of the risk is what the top of the module says."""
    population, n, draws = 500, 20, 4000
    p, q = simplex(population, C, 1), simplex(population, C, 2)
    losses = -torch.randn(population, C, dtype=torch.float64, generator=seeded(5)).log_softmax(1)
    meant = float((q * losses).sum(1).mean())
    picks = torch.randint(population, (draws, n), generator=seeded(6))
    seen = (p * losses).sum(1)[picks].mean(1)
    actual = float((seen - meant).square().mean())
    spread, bias = float((p * losses).sum(1).var(correction=0)), float(((p - q) * losses).sum(1).mean())
    assert actual == pytest.approx(spread / n + bias**2, rel=0.1)
    whole = risk_gap(losses, p, q)
    assert actual <= spread / n + whole.bound**2
    some = [risk_gap(losses[k], p[k], q[k]) for k in picks[:300]]
    assert sum(s.variance for s in some) / 300 == pytest.approx(spread / n, rel=0.1)
    assert whole.root_mean_square == pytest.approx((whole.variance + whole.bound**2) ** 0.5)


def test_what_quality_refuses() -> None:
    p = simplex(N, C)
    with pytest.raises(InputError, match="one shape"):
        supervision(p, p[1:])
    with pytest.raises(InputError, match=r"truth: .*sum to 2"):
        supervision(p, 2 * p)
    with pytest.raises(InputError, match="losses and targets"):
        risk_gap(p[:, 1:], p, p)
    with pytest.raises(InputError, match="log_softmax"):
        risk_gap(p * math.inf, p, p)
    assert math.isnan(risk_gap(p[:1], p[:1], p[:1]).variance)


# Calibration


def brute(p: Tensor, y: Tensor, edges: list[float]) -> float:
    """The definition: bins ]a, b], the first from below 0, the last to above 1."""
    ends = [-math.inf, *edges, math.inf]
    total = 0.0
    for low, high in itertools.pairwise(ends):
        inside = [i for i in range(len(p)) if low < max(p[i].tolist()) <= high]
        if inside:
            right = sum(p[i].tolist().index(max(p[i].tolist())) == int(y[i]) for i in inside) / len(inside)
            said = sum(max(p[i].tolist()) for i in inside) / len(inside)
            total += len(inside) / len(p) * abs(right - said)
    return total


@given(n=st.integers(1, 40), m=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_calibration_is_its_definition(n: int, m: int, seed: int) -> None:
    p, y = simplex(n, C, seed), torch.randint(C, (n,), generator=seeded(seed))
    found = reliability(p, y, EqualWidth(m))
    assert found.ece == pytest.approx(brute(p, y, [k / m for k in range(1, m)]), abs=1e-12)
    assert int(found.counts.sum()) == n
    assert found.ece <= found.largest + 1e-12
    ordered = sorted(max(row) for row in p.tolist())
    last = [part[-1] for part in np.array_split(ordered, min(n, m))][:-1]
    mass = reliability(p, y, EqualMass(m))
    assert int(mass.counts.max()) - int(mass.counts.min()) <= 1
    assert len(mass.counts) == min(n, m)
    if n % min(n, m) == 0:  # otherwise the larger bins may be others
        assert mass.ece == pytest.approx(brute(p, y, last), abs=1e-12)


@given(order=st.permutations(range(12)), bins=st.sampled_from([EqualWidth(3), EqualMass(3), EqualMass(5)]))
@settings(max_examples=30, deadline=None)
def test_calibration_does_not_depend_on_the_order(order: list[int], bins: Bins) -> None:
    p = simplex(4, C).repeat(3, 1)  # equal confidences
    y = torch.arange(12) % C
    assert reliability(p[order], y[order], bins).ece == pytest.approx(reliability(p, y, bins).ece, abs=1e-12)


def test_calibration_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    found = reliability(p, torch.tensor([0, 1, 1, 1]), EqualWidth(2))
    assert found.counts.tolist() == [1, 3]  # 0.5 belongs to ]0, 0.5]
    assert found.confidence.tolist() == pytest.approx([0.5, 2.6 / 3])
    assert found.accuracy.tolist() == pytest.approx([0, 2 / 3])
    assert found.ece == pytest.approx(0.25 * 0.5 + 0.75 * 0.2)
    assert found.largest == pytest.approx(0.5)
    assert str(found).splitlines()[-1] == "ECE 0.2750"
    with pytest.raises(InputError, match="take softmax"):
        reliability(torch.randn(3, 2, generator=seeded()), [0, 1, 1])
    with pytest.raises(InputError, match="one for each of the 4"):
        reliability(p, [0, 1])
    with pytest.raises(InputError, match="1 bin"):
        EqualMass(0)


# In a training loop


def test_numbers_follow_the_examples_through_a_loader() -> None:
    x, y = torch.randn(N, 3, generator=seeded()), torch.arange(N) % C
    seen = []
    for numbers, (inputs, labels) in DataLoader(Indexed(TensorDataset(x, y)), 5, shuffle=True, generator=seeded()):
        assert torch.equal(inputs, x[numbers])
        assert torch.equal(labels, y[numbers])
        seen += numbers.tolist()
    assert sorted(seen) == list(range(N))
    with pytest.raises(InputError, match="IterableDataset"):
        Indexed(iter([1, 2]))


def test_a_filtered_teacher_in_a_plain_loop() -> None:
    """Wrong labels: the filtered table is nearer to the truth than the labels it was made from."""
    g = seeded(1)
    x = torch.randn(200, 6, generator=g)
    truth = x[:, :3].argmax(1)
    said = torch.where(torch.rand(200, generator=g) < 0.3, torch.randint(3, (200,), generator=g), truth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.2, momentum=0.9)
    table, loss = EMATargets(200, 3, storage=Dense(torch.float16, Stochastic(g))), DistillationLoss()
    for _ in range(40):
        for numbers, (inputs, labels) in DataLoader(Indexed(TensorDataset(x, said)), 50, shuffle=True, generator=g):
            z = teacher(inputs)
            table.update(numbers, z)
            optimizer.zero_grad()
            loss(z, labels).backward()
            optimizer.step()
    p = OneHot(truth, 3).table()
    of_labels = supervision(OneHot(said, 3).table(), p)
    of_filter, of_last = supervision(table.table(), p), supervision(TeacherTargets.of(teacher, x).table(), p)
    assert of_filter.agreement > of_labels.agreement + 0.05
    assert of_filter.root_mean_square < of_labels.root_mean_square
    assert of_filter.agreement >= of_last.agreement
