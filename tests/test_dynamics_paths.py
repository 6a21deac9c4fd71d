"""Recorded paths: what a recorder keeps, through kills and checkpoints, and what the paths say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.uses.dynamics import (
    Every,
    Logarithmic,
    PathRecorder,
    Paths,
    lightning_callback,
    merge,
    ranking_quality,
    trainer_callback,
    triangle,
)

few = settings(max_examples=25, deadline=None)


def network(seed: int = 0, outputs: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, outputs))


def probes(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, generator=generator), torch.randint(4, (n,), generator=generator)


def train(model: nn.Module, recorder: PathRecorder | None, steps: int, start: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(32, 3, generator=generator), torch.randint(4, (32,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(start + 1, start + steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        if recorder is not None:
            recorder.record(model, step)
    return model


def made(q: Tensor, labels: Tensor | None = None, steps: Tensor | None = None) -> Paths:
    """Paths with given probabilities (T, n, C)."""
    return Paths(torch.arange(len(q)) if steps is None else steps, q.log(), labels, "made")


def test_recording_does_not_change_training() -> None:
    """Same random numbers, same running statistics, same mode: the network ends where it would have ended."""
    x, y = probes()
    plain, recorder = train(network(), None, 10), PathRecorder(x, labels=y)
    watched = train(network(), recorder, 10)  # `network` seeds the random numbers, dropout's too
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])
    assert watched.training
    assert len(recorder) == 10
    expected = watched.eval()(x).detach()
    torch.testing.assert_close(recorder.paths().logits[-1], expected)


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    """A new recorder has all records, a torn last one is cut off, and the paths are those of one run."""
    x, y = probes()
    whole = PathRecorder(x, labels=y)
    train(network(), whole, 6)
    first = PathRecorder(x, labels=y, folder=tmp_path / "paths")
    model = train(network(), first, 4)
    with (tmp_path / "paths" / "records.bin").open("ab") as file:
        file.write(b"half a record")
    second = PathRecorder(x, labels=y, folder=tmp_path / "paths")
    assert second.last == 4
    torch.manual_seed(0)
    train(model, second, 2, start=4)
    third = PathRecorder(x, labels=y, folder=tmp_path / "paths")
    assert third.paths().steps.tolist() == whole.paths().steps.tolist()
    assert torch.equal(third.paths().logits[:4], whole.paths().logits[:4])
    assert torch.equal(third.paths().logits, second.paths().logits)


def test_rewinding_loses_nothing(tmp_path: Path) -> None:
    x, y = probes()
    recorder = PathRecorder(x, labels=y, folder=tmp_path)
    model = train(network(), recorder, 6)
    before = (tmp_path / "records.bin").read_bytes()
    with pytest.raises(InputError, match=r"rewind\(4\)"):
        recorder.record(model, 4)
    recorder.rewind(4)
    assert recorder.last == 3
    recorder.record(model, 4)
    kept = (tmp_path / "records.bin").read_bytes()
    assert kept[: len(before) // 2] == before[: len(before) // 2]
    assert (tmp_path / "replaced-4-6.bin").read_bytes() == before[len(before) // 2 :]
    assert PathRecorder(x, labels=y, folder=tmp_path).paths().steps.tolist() == [1, 2, 3, 4]


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    x, y = probes()
    recorder = PathRecorder(x, labels=y, folder=tmp_path)
    train(network(), recorder, 2)
    with pytest.raises(StoreError, match="other probes"):
        PathRecorder(x + 1, labels=y, folder=tmp_path)
    with pytest.raises(StoreError, match="other labels"):
        PathRecorder(x, labels=(y + 1) % 4, folder=tmp_path)
    with pytest.raises(InputError, match=r"labels are classes, whole numbers: got torch.float"):
        PathRecorder(x, labels=y / 2)
    with pytest.raises(StoreError, match="other select"):
        PathRecorder(x, labels=y, folder=tmp_path, select=lambda output: output.flip(1))
    again = PathRecorder(x, labels=y, folder=tmp_path)
    with pytest.raises(ModelError, match="another network"):
        again.record(network(outputs=5), 3)
    broken = network()
    with torch.no_grad():
        broken[0].weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        again.record(broken, 3)
    assert len(again) == 2
    raw = bytearray((tmp_path / "records.bin").read_bytes())
    raw[12] ^= 1
    (tmp_path / "records.bin").write_bytes(bytes(raw))
    with pytest.raises(StoreError, match="record 0 is damaged"):
        PathRecorder(x, labels=y, folder=tmp_path)
    with pytest.raises(InputError, match="5 classes"):
        PathRecorder(x, labels=y[:2])
    with pytest.raises(InputError, match="nothing has been recorded"):
        PathRecorder(x).paths()


def test_every_branch_is_kept(tmp_path: Path) -> None:
    """Two resumes from one checkpoint: three branches, in a folder as in memory; a new recorder finds them too."""
    x, y = probes()
    recorders = [PathRecorder(x, labels=y, folder=tmp_path), PathRecorder(x, labels=y)]
    branches: list[Tensor] = []
    for recorder in recorders:
        recorder.record(network(9), 2)
    for seed in range(3):
        for recorder in recorders:
            recorder.rewind(3)
            for step in (3, 4):
                recorder.record(network(10 * seed + step), step)
        branches.append(recorders[0].paths().logits[1:])
    for recorder in (*recorders, PathRecorder(x, labels=y, folder=tmp_path)):
        assert torch.equal(recorder.paths().logits[1:], branches[2])
        left = recorder.replaced()
        assert [one.steps.tolist() for one in left] == [[3, 4], [3, 4]]
        for found, expected in zip(left, branches, strict=False):
            assert torch.equal(found.logits, expected)
            assert torch.equal(found.labels, y)
    assert len({tuple(branch.flatten().tolist()) for branch in branches}) == 3
    file = next(tmp_path.glob("replaced-*.bin"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="is damaged"):
        recorders[0].replaced()


def test_a_crash_while_setting_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the copy and before the cut: nothing is gone, and the same call does it then."""
    import os

    x, y = probes()
    recorder = PathRecorder(x, labels=y, folder=tmp_path)
    train(network(), recorder, 4)
    whole = recorder.paths().logits

    def crash(*_: Any) -> None:
        raise OSError("out of power")

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", crash)
        with pytest.raises(StoreError, match="cannot set records aside"):
            recorder.rewind(3)
    again = PathRecorder(x, labels=y, folder=tmp_path)
    assert torch.equal(again.paths().logits, whole)
    again.rewind(3)
    assert torch.equal(again.paths().logits, whole[:2])
    assert all(torch.equal(one.logits, whole[2:]) for one in again.replaced())


def test_records_are_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once, the others when a second has passed; what is set aside at once."""
    import os

    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: forced.append(os.fstat(handle).st_size))
    seconds = iter([0.0, 0.0, 0.5, 1.5, 1.5, 1.6])
    monkeypatch.setattr(PathRecorder.record.__globals__["time"], "monotonic", lambda: next(seconds))
    recorder = PathRecorder(probes()[0], folder=tmp_path)
    train(network(), recorder, 4)
    size = (tmp_path / "records.bin").stat().st_size // 4
    assert forced == [size, 3 * size]
    recorder.rewind(3)
    assert forced[2:] == [2 * size]


def test_refused_at_the_first_record(tmp_path: Path) -> None:
    """Before training, not after it: labels that are no class, probes of another shape, mixed probes, no step."""
    x, y = probes()
    with pytest.raises(InputError, match=r"classes from 0 to 3, the network has 4 outputs: got 4 to 4"):
        PathRecorder(x, labels=torch.full_like(y, 4), folder=tmp_path).record(network(), 0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"shape \(5, 7\), expected such as it is trained on"):
        PathRecorder(torch.randn(5, 7)).record(network(), 0)
    mixing = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ModelError, match=r"1 \(BatchNorm1d\).*mixes the probes"):
        PathRecorder(x).record(mixing, 0)
    for step in ("a", 1.5, None):
        with pytest.raises(InputError, match="whole number"):
            PathRecorder(x).record(network(), step)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=">= 0"):
        PathRecorder(x).record(network(), -1)
    (tmp_path / "records.bin").write_bytes(b"of whom?")
    with pytest.raises(StoreError, match=r"without probes\.json"):
        PathRecorder(x, folder=tmp_path)


def test_the_same_selection_goes_on(tmp_path: Path) -> None:
    """Another function of the same code is the same; folders that do not say which they were made with are taken."""
    x, y = probes()
    for step in range(2):
        PathRecorder(x, labels=y, folder=tmp_path, select=lambda output: output.flip(1)).record(network(), step)
    facts = json.loads((tmp_path / "probes.json").read_text())
    del facts["select"]
    (tmp_path / "probes.json").write_text(json.dumps(facts))
    assert len(PathRecorder(x, labels=y, folder=tmp_path)) == 2


def test_one_logit_is_no_path(tmp_path: Path) -> None:
    """Its softmax is 1 whatever the network says; two of it are what a sigmoid says."""
    x, _ = probes()
    single = network(outputs=1)
    with pytest.raises(InputError, match=r"two classes or more.*torch\.stack\(\[0 \* z, z\], 1\)"):
        PathRecorder(x, folder=tmp_path).record(single, 0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="two classes or more"):
        Paths(torch.arange(2), torch.randn(2, 5, 1), None, "made")
    recorder = PathRecorder(x, select=lambda output: torch.stack([0 * output[:, 0], output[:, 0]], 1))
    recorder.record(single, 0)
    expected = single.eval()(x).detach()[:, 0].sigmoid()
    torch.testing.assert_close(recorder.paths().probabilities[0, :, 1], expected)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    x, _ = probes()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        PathRecorder(x, folder=tmp_path / "file" / "paths").record(network(), 0)


def test_saved_paths(tmp_path: Path) -> None:
    x, y = probes()
    recorder = PathRecorder(x, labels=y)
    train(network(), recorder, 3)
    paths = recorder.paths()
    paths.save(tmp_path / "paths.npz")
    found = Paths.load(tmp_path / "paths.npz")
    assert torch.equal(found.logits, paths.logits)
    assert torch.equal(found.labels, y)
    assert found.probes == paths.probes
    whole = (tmp_path / "paths.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for spoiled in (b"no", b"", whole[: len(whole) // 2], bytes(flipped)):
        (tmp_path / "none.npz").write_bytes(spoiled)
        with pytest.raises(StoreError, match="no recorded paths"):
            Paths.load(tmp_path / "none.npz")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(StoreError, match="no recorded paths"):
        Paths.load(tmp_path / "array.npz")


def test_merged() -> None:
    x, y = probes()
    all_of_them, early, late = PathRecorder(x, labels=y), PathRecorder(x, labels=y), PathRecorder(x, labels=y)
    left, right = PathRecorder(x[:2], labels=y[:2]), PathRecorder(x[2:], labels=y[2:])
    model = network()
    for step in range(1, 5):
        train(model, None, 1)
        for recorder in (all_of_them, left, right, early if step < 3 else late):
            recorder.record(model, step)
    whole = all_of_them.paths()
    for found in (merge(late.paths(), early.paths()), merge(left.paths(), right.paths())):
        torch.testing.assert_close(found.logits, whole.logits)
        assert torch.equal(found.labels, y)
        assert found.steps.tolist() == [1, 2, 3, 4]
    with pytest.raises(InputError, match="in common"):
        merge(whole, early.paths())
    with pytest.raises(InputError, match="same steps"):
        merge(left.paths(), late.paths())
    other = replace(late.paths(), labels=(late.paths().labels + 1) % 4)  # pyright: ignore[reportOptionalOperand]
    for pair in ((early.paths(), other), (early.paths(), replace(other, labels=None))):
        with pytest.raises(InputError, match="same probes have other labels"):
            merge(*pair)


def test_schedules() -> None:
    assert [step for step in range(10) if Every(3).due(step)] == [0, 3, 6, 9]
    assert [step for step in range(20) if Logarithmic(50).due(step)] == list(range(20))
    due = [step for step in range(100_001) if Logarithmic(10).due(step)]
    counts = [sum(10**k <= step < 10 ** (k + 1) for step in due) for k in (2, 3, 4)]
    assert counts == [10, 10, 10]
    with pytest.raises(InputError):
        Every(0)


# ---------------------------------------------------------------- what paths say


paths_of = st.builds(
    lambda seed, t, n: torch.randn(t, n, 4, generator=torch.Generator().manual_seed(seed)).softmax(2),
    st.integers(0, 2**16), st.integers(2, 12), st.integers(1, 4),
)  # fmt: skip


@few
@given(q=paths_of, weight=st.floats(0.05, 1.0))
def test_smoothing_by_its_sum(q: Tensor, weight: float) -> None:
    found = made(q).smoothed(weight)
    t = len(q) - 1
    weights = torch.tensor([(1 - weight) ** t] + [weight * (1 - weight) ** (t - k) for k in range(1, t + 1)])
    torch.testing.assert_close(found[-1], (weights[:, None, None] * q).sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(2), torch.ones(found.shape[:2]))


knots = st.builds(
    lambda seed, gaps: (
        torch.randn(len(gaps) + 1, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(2),
        torch.tensor([0, *gaps]).cumsum(0),
    ),
    st.integers(0, 2**16),
    st.lists(st.sampled_from([1, 2, 3, 7, 160]), min_size=1, max_size=4),
)


@few
@given(knots=knots, weight=st.sampled_from([0.02, 0.1, 0.5, 1.0]))
def test_schedules_agree(knots: tuple[Tensor, Tensor], weight: float) -> None:
    """Looked at after every step or at the bends alone: the same smoothed path, detour and way astray."""
    q, steps = knots
    every = torch.arange(int(steps[-1]) + 1)
    place = torch.searchsorted(steps, every).clamp_min(1)
    part = ((every - steps[place - 1]) / (steps[place] - steps[place - 1]))[:, None, None]
    line = (1 - part) * q[place - 1] + part * q[place]
    labels = torch.tensor([0, 1, 2])
    dense, sparse = made(line, labels, every), made(q, labels, steps)
    torch.testing.assert_close(sparse.smoothed(weight), dense.smoothed(weight)[steps], rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(sparse.detour(), dense.detour(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sparse.astray(), dense.astray(), rtol=1e-6, atol=1e-6)


def test_a_logarithmic_schedule_says_the_same() -> None:
    """A real run with a detour, seen at every step and by two schedules of `ntkit paths`' kind."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (60,), generator=generator)
    x = 2 * nn.functional.one_hot(truth, 3).float() + 0.3 * torch.randn(60, 3, generator=generator)
    labels = torch.where(torch.arange(60) < 6, (truth + 1) % 3, truth)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3))
    recorders = [PathRecorder(x, labels=labels, schedule=s) for s in (Every(), Logarithmic(60), Logarithmic(30))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(601):
        for recorder in recorders:
            recorder.record(model, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    whole, *others = [recorder.paths() for recorder in recorders]
    assert float(whole.detour()[:6].median()) > 1.2
    for found in others:
        shared = torch.searchsorted(whole.steps, found.steps)
        assert float((found.smoothed() - whole.smoothed()[shared]).abs().max()) < 2e-3  # 0.2 if records count
        torch.testing.assert_close(found.detour(), whole.detour(), rtol=0.03, atol=0)
        torch.testing.assert_close(found.astray(), whole.astray(), rtol=0, atol=0.01)


@few
@given(q=paths_of)
def test_detours_are_at_least_straight(q: Tensor) -> None:
    assert float(made(q).detour().min()) >= 1 - 1e-9


def test_straight_and_bent_paths() -> None:
    """A straight path has the detour 1 and goes nowhere astray; one by way of another class does both."""
    corners = torch.eye(3).clamp_min(1e-6)
    corners = corners / corners.sum(1, keepdim=True)
    part = torch.linspace(0, 1, 400)[:, None]
    start = torch.full((3,), 1 / 3)
    straight = (1 - part) * start + part * corners[0]
    bent = torch.cat([(1 - part) * start + part * corners[1], (1 - part) * corners[1] + part * corners[0]])
    labels = torch.tensor([0])
    one, two = (made(q[:, None], labels) for q in (straight, bent))
    assert float(one.detour()) == pytest.approx(1.0, abs=1e-3)
    length = (corners[1] - start).norm() + (corners[0] - corners[1]).norm()
    assert float(two.detour()) == pytest.approx(float(length / (corners[0] - start).norm()), rel=0.05)
    assert float(one.astray()) == pytest.approx(0.0, abs=1e-6)
    assert float(two.astray()) == pytest.approx(2 / 3, rel=0.05)
    assert float(one.area()) > float(two.area())


def test_area_is_of_training_not_of_records() -> None:
    """Seen at every step or at few: the same, for a probability that rises evenly."""
    rising = torch.linspace(0.1, 0.9, 101)
    q = torch.stack([rising, 1 - rising], 1)[:, None]
    some = torch.tensor([0, 1, 2, 3, 10, 50, 100])
    labels = torch.tensor([0])
    dense, sparse = made(q, labels), made(q[some], labels, some)
    assert float(dense.area()) == pytest.approx(0.5, abs=1e-6)
    assert float(sparse.area()) == pytest.approx(0.5, abs=1e-6)


@few
@given(knots=knots)
def test_averages_are_of_training_not_of_records(knots: tuple[Tensor, Tensor]) -> None:
    """The integral of the straight lines, over the steps; the area is its part for the label."""
    q, steps = knots
    paths = made(q, torch.tensor([0, 1, 2]), steps)
    expected = torch.trapezoid(q, steps.double(), dim=0) / float(steps[-1] - steps[0])
    torch.testing.assert_close(paths.average(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(paths.average().sum(1), torch.ones(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(paths.area(), expected.diagonal())
    torch.testing.assert_close(made(q[:1]).average(), q[0])


def test_the_runner_up_is_that_of_training() -> None:
    """Class 1 is ahead at the many records of the start, class 2 for most of training."""
    early, late = torch.tensor([0.1, 0.6, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.6, 0.1])
    q = torch.stack([early] * 5 + [late] * 2)[:, None]
    paths = made(q, torch.tensor([0]), torch.tensor([0, 1, 2, 3, 4, 5, 90]))
    assert paths.corners(0) == (0, 2)
    assert int(paths.average().argmax(1)) == 2


def test_learned_and_forgotten() -> None:
    right, wrong = torch.tensor([0.8, 0.2]), torch.tensor([0.3, 0.7])
    q = torch.stack(
        [torch.stack(c) for c in ([wrong, right, wrong, right, right], [right] * 5, [right] * 4 + [wrong])], 1
    )
    paths = made(q, torch.tensor([0, 0, 0]), torch.tensor([0, 10, 20, 30, 40]))
    assert paths.learned_at().tolist() == [30, 0, -1]
    assert paths.forgotten().tolist() == [1, 0, 1]


def test_a_triangle_for_any_number_of_classes() -> None:
    q = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.6, 0.2, 0.1, 0.1]])[:, None]
    found = made(q, torch.tensor([0])).reduced(0)
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.2, 0.2]]))
    corners = triangle(torch.eye(3))
    torch.testing.assert_close((corners[0] - corners[2]).norm(), torch.tensor(1.0))
    torch.testing.assert_close(triangle(torch.full((3,), 1 / 3)), corners.mean(0))
    with pytest.raises(InputError, match="three classes"):
        made(q[:, :, :2].softmax(2), torch.tensor([0])).reduced(0)


def test_a_picture_of_a_path() -> None:
    """Start, label, p* and true class stand where they should; what does not fit is refused."""
    from ntkit.report.trajectories import GREEN, GREY, RED, corner_names, simplex

    q = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.6, 0.2, 0.1, 0.1]])[:, None]
    paths = made(q, torch.tensor([0]))
    assert corner_names(paths, 0) == ("label 0", "class 1", "the rest")
    plain = simplex(paths, 0)
    for colour, times in ((GREEN, 1), (RED, 1), (GREY, 0)):
        assert (colour in plain) == bool(times)
    star = torch.tensor([0.2, 0.4, 0.3, 0.1])
    torch.testing.assert_close(paths.reduce(0, star), torch.tensor([0.2, 0.4, 0.4]))
    full = simplex(paths, 0, ("a", "b", "c"), truth=star, true_class=3)
    assert GREY in full
    assert full.count("<path") > plain.count("<path") or len(full) > len(plain)
    moved = simplex(paths, 0, ("a", "b", "c"), truth=star.flip(0), true_class=1)
    assert moved != full
    assert simplex(made(q[:, :, :3].softmax(2)), 0)  # three classes, and no label
    with pytest.raises(InputError, match="4 probabilities that sum to 1"):
        simplex(paths, 0, truth=star[:3])
    with pytest.raises(InputError, match="4 probabilities that sum to 1"):
        simplex(paths, 0, truth=2 * star)
    with pytest.raises(InputError, match="4 probabilities that sum to 1"):
        simplex(paths, 0, truth=torch.tensor([2.0, -1.0, 0.0, 0.0]))
    with pytest.raises(InputError, match="from 0 to 3"):
        simplex(paths, 0, true_class=4)
    with pytest.raises(InputError, match="of 4 classes"):
        paths.reduce(0, star[:3])


def test_wrong_labels_are_found() -> None:
    """Noisy labels in a real run: they are learned late, and the area ranks them first."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    x, truth = torch.tensor(pixels[:600] / 16).float(), torch.tensor(digits[:600])
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(600, generator=generator) < 0.2
    given = torch.where(wrong, (truth + torch.randint(1, 10, (600,), generator=generator)) % 10, truth)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    recorder = PathRecorder(x, labels=given, schedule=Every(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(601):
        recorder.record(model, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), given).backward()
        optimizer.step()
    paths = recorder.paths()
    assert ranking_quality(paths.area(), wrong) > 0.95
    assert ranking_quality(-paths.astray(), wrong) > 0.9
    with pytest.raises(InputError, match="wrong labels and right ones"):
        ranking_quality(paths.area(), torch.zeros(600))
    with pytest.raises(InputError, match="scores are finite"):
        ranking_quality(torch.where(wrong, math.nan, paths.area()), wrong)


# ---------------------------------------------------------------- in other people's loops


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning(tmp_path: Path) -> None:
    """Every step of a Lightning run, and a resumed run goes on; sets aside what was after the checkpoint."""
    pl = pytest.importorskip("lightning.pytorch")
    x, y = probes(16)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trainer(recorder: PathRecorder, steps: int) -> Any:
        return pl.Trainer(
            max_steps=steps, callbacks=[lightning_callback(recorder, network="net")], logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=tmp_path,
        )  # fmt: skip

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    recorder = PathRecorder(x[:3], labels=y[:3], folder=tmp_path / "paths")
    run = trainer(recorder, 4)
    module = Module()
    run.fit(module, data)
    assert recorder.paths().steps.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(recorder.paths().logits[-1], module.net.eval()(x[:3]).detach())
    run.save_checkpoint(tmp_path / "checkpoint.ckpt")
    recorder.record(module.net, 7)  # beyond the checkpoint
    again = PathRecorder(x[:3], labels=y[:3], folder=tmp_path / "paths")
    trainer(again, 6).fit(Module(), data, ckpt_path=tmp_path / "checkpoint.ckpt", weights_only=True)
    assert again.paths().steps.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        max_position_embeddings=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(20, (8, 5))
    items = [{"input_ids": t, "labels": torch.tensor(k % 3)} for k, t in enumerate(tokens)]
    recorder = PathRecorder({"input_ids": tokens[:3]}, select=lambda output: output.logits)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=items, callbacks=[trainer_callback(recorder)]).train()
    assert recorder.paths().steps.tolist() == [0, 1, 2, 3]
    expected = model.eval()(input_ids=tokens[:3]).logits.detach()
    torch.testing.assert_close(recorder.paths().logits[-1], expected)
