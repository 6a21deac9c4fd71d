"""One probing run, fine-tuning from each of its checkpoints: against plain loops, killed and gone on with, refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.uses import finetune
from ntkit.uses.finetune.schedule import epoch
from tests.oracles import snapshot

D, H, C, OLD = 5, 6, 3, 4
SGD = partial(torch.optim.SGD, lr=0.3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(D, H), nn.BatchNorm1d(H), nn.Linear(H, H)
        self.fc = nn.Linear(H, OLD)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.norm(self.first(x)).relu()).tanh())


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model(torch.randn(100, D))  # running statistics of its own
    return model.double().eval()


def data(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).double()
    return x, x[:, :C].argmax(1)


PROBING = finetune.Probing(taus=(0, 1, 3), optimizer=SGD, batch_size=8)
FINETUNING = finetune.Finetuning(epochs=2, optimizer=SGD, batch_size=8, frozen_statistics=True)


def sweep(**settings: Any) -> finetune.Sweep:
    given = {"probing": PROBING, "finetuning": FINETUNING, "head": finetune.LinearHead("fc"), **settings}
    model = given.pop("model", None)
    model, train, seen = net() if model is None else model, given.pop("train", data()), given.pop("seen", data(30, 1))
    return finetune.probe_then_finetune(model, given.pop("head"), train, seen, **given)


def test_every_row_is_what_plain_loops_give() -> None:
    """Full batches, where nothing depends on an order."""
    smoothing = 0.2
    found = sweep(
        probing=replace(PROBING, batch_size=None), finetuning=replace(FINETUNING, batch_size=None, smoothing=smoothing)
    )
    (x, y), (x_seen, y_seen) = data(), data(30, 1)
    point = (1 - smoothing) * torch.eye(C).double()[y] + smoothing / C
    model = copy.deepcopy(found.start.model)
    probing = torch.optim.SGD(model.fc.parameters(), lr=0.3)
    with torch.no_grad():
        z = model.last(model.norm(model.first(x_seen)).relu()).tanh()
    for done in range(4):
        q = model(x).softmax(1).detach()
        energy = float((point - q).norm(dim=1).mean())
        assert found.energies[done] == pytest.approx(energy)
        if done in PROBING.taus:
            row = found.rows[PROBING.taus.index(done)]
            tuned = copy.deepcopy(model)
            tuning = torch.optim.SGD(tuned.parameters(), lr=0.3)
            for _ in range(2):
                tuning.zero_grad()
                nn.functional.cross_entropy(tuned(x), point).backward()
                tuning.step()
            with torch.no_grad():
                last = tuned.last(tuned.norm(tuned.first(x_seen)).relu()).tanh()
                accuracies = [float((m(x_seen).argmax(1) == y_seen).double().mean()) for m in (model, tuned)]
                loss = float(nn.functional.cross_entropy(tuned(x_seen), y_seen))
            assert row.tau == done
            assert row.energy == pytest.approx(energy)
            assert [row.probed_accuracy, row.accuracy] == accuracies
            assert row.loss == pytest.approx(loss)
            expected = asdict(finetune.feature_change(z, last))
            assert asdict(row.change) == pytest.approx(expected)
            assert row.change.norm_before == pytest.approx(float(z.norm(dim=1).mean()))
            step = finetune.first_step(finetune.Split(model, "fc"), x, point, at=x_seen)
            assert row.speed == pytest.approx(step.speed)
            for mine, theirs in zip(found.network(done).parameters(), tuned.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs)
        probing.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        probing.step()


class Counted(Net):
    """Counts the examples that go through the backbone, of all copies."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.seen += len(x)
        return super().forward(x)


def test_longer_probing_costs_no_more_passes_of_the_backbone() -> None:
    """Features are read once, for the energy of every epoch too; and it is the energy of the whole network."""
    seen = []
    for last in (1, 30):
        torch.manual_seed(0)
        model = Counted().double().eval()
        before = Counted.seen
        found = sweep(model=model, probing=replace(PROBING, taus=(last,)))
        seen.append(Counted.seen - before)
        assert found.energies[-1] == pytest.approx(found.rows[0].energy)
    assert seen[0] == seen[1]


def test_energy_falls_while_probing_and_the_model_is_untouched() -> None:
    model = net()
    model.first.requires_grad_(False)
    before, done = snapshot(model), []
    found = sweep(model=model, progress=lambda *counts: done.append(counts))
    assert snapshot(model) == before
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert len(found.energies) == 4
    assert found.energies[3] < found.energies[0]
    assert [row.energy for row in found.rows] == pytest.approx([found.energies[t] for t in (0, 1, 3)])
    tuned = found.network()
    assert not tuned.training
    assert torch.equal(tuned.first.weight, model.first.weight)  # frozen by the user
    assert not torch.equal(tuned.last.weight, model.last.weight)
    assert torch.equal(tuned.norm.running_mean, model.norm.running_mean)  # frozen_statistics
    free = sweep(finetuning=replace(FINETUNING, frozen_statistics=False)).network(0)
    assert not torch.equal(free.norm.running_mean, model.norm.running_mean)


def test_features_read_once_give_the_same_as_the_whole_network() -> None:
    class Wrapped(nn.Module):
        """The same network with something after its head, so that the head alone is not enough."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": 1 * self.inner(x) + 0.0 * x.sum(1, keepdim=True)}

    one = sweep()
    wrapped = sweep(
        model=Wrapped().eval(), head=finetune.LinearHead("inner.fc", select=lambda output: output["logits"])
    )
    assert wrapped.energies == pytest.approx(one.energies)
    assert [row.accuracy for row in wrapped.rows] == [row.accuracy for row in one.rows]


def test_heads() -> None:
    model, (x, y) = net(), data()
    linear, deep = sweep(), sweep(head=finetune.MLPHead("fc", width=7, depth=3))
    assert isinstance(linear.start.model.fc, nn.Linear)
    assert linear.start.model.fc.out_features == C
    assert [layer.out_features for layer in deep.start.model.fc if isinstance(layer, nn.Linear)] == [7, 7, C]
    fresh = sweep(head=finetune.Reinitialised("last", finetune.LinearHead("fc")))
    assert fresh.start.names == ("last", "fc")
    assert torch.equal(fresh.start.model.first.weight, model.first.weight)
    assert not torch.equal(fresh.start.model.last.weight, model.last.weight)
    torch.testing.assert_close(fresh.start.features(x), model.norm(model.first(x)).relu().detach())
    own = sweep(head=finetune.OwnHead("fc"), train=(x, y + 1), seen=(data(30, 1)[0], data(30, 1)[1] + 1))
    assert torch.equal(own.start.model.fc.weight, model.fc.weight)
    assert sweep().energies == linear.energies  # the same seed
    assert sweep(probing=replace(PROBING, seed=1)).energies[0] != linear.energies[0]


def test_a_head_with_batchnorm_is_trained_and_measured_in_its_own_mode(tmp_path: Path) -> None:
    found = sweep(head=finetune.Reinitialised(("norm", "last"), finetune.LinearHead("fc")), folder=tmp_path)
    kept = load_file(tmp_path / "probe.safetensors")
    assert torch.equal(kept["0/norm.running_mean"], torch.zeros(H).double())
    assert kept["3/norm.running_mean"].abs().min() > 0
    assert kept["3/norm.num_batches_tracked"] == 9  # three epochs of three batches, and no pass that only measures
    # frozen statistics: fine-tuning begins with those of the checkpoint, and keeps them
    assert torch.equal(found.network(3).norm.running_mean, kept["3/norm.running_mean"])


def test_smoothing_while_probing_keeps_energy() -> None:
    long = replace(PROBING, taus=(60,), optimizer=partial(torch.optim.SGD, lr=2.0, momentum=0.9))
    sharp = sweep(probing=long, finetuning=replace(FINETUNING, epochs=1))
    kept = sweep(probing=replace(long, smoothing=0.3), finetuning=replace(FINETUNING, epochs=1))
    assert kept.rows[0].energy > sharp.rows[0].energy + 0.05


def test_stopping_by_energy() -> None:
    probing = replace(PROBING, taus=(0, 1, 200), stop=0.8)
    found = sweep(probing=probing)
    assert found.stopped
    tau = found.rows[-1].tau
    assert 1 < tau < 200
    assert found.energies[tau] <= 0.8 * found.energies[0] < found.energies[tau - 1]
    assert len(found.energies) == tau + 1
    assert not sweep().stopped


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2])
def test_killed_and_gone_on_with(tmp_path: Path, after: int) -> None:
    def die(done: int, total: int) -> None:
        if done == after:
            raise Killed

    whole = sweep()
    with pytest.raises(Killed):
        sweep(folder=tmp_path / "s", progress=die)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    assert sum(name.startswith("tau") for name in written) == 2 * after
    resumed = sweep(folder=tmp_path / "s")
    assert [asdict(row) for row in resumed.rows] == [asdict(row) for row in whole.rows]
    assert resumed.energies == whole.energies
    for name, time in written.items():
        assert (tmp_path / "s" / name).stat().st_mtime_ns == time  # nothing was done twice
    for tau in (0, 1, 3):
        for a, b in zip(
            resumed.network(tau).state_dict().values(), whole.network(tau).state_dict().values(), strict=True
        ):
            assert torch.equal(a, b)


def test_a_kill_between_weights_and_record(tmp_path: Path) -> None:
    whole = sweep(folder=tmp_path)
    (tmp_path / "tau-0001.json").unlink()
    assert sweep(folder=tmp_path).rows == whole.rows
    (tmp_path / "tau-0001.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match="not what was written there"):
        sweep(folder=tmp_path)
    (tmp_path / "tau-0001.json").unlink()
    (tmp_path / "probe.json").unlink()
    assert sweep(folder=tmp_path).rows == whole.rows


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    sweep(folder=tmp_path / "s")
    other = net()
    with torch.no_grad():
        other.first.bias[0] += 1e-9
    x, y = data()
    for settings, part in (
        ({"model": other}, "parameters"),
        ({"train": (x + 1e-9, y)}, "training examples"),
        ({"train": (x, (y + 1) % C)}, "training targets"),
        ({"seen": (data(30, 2)[0], data(30, 1)[1])}, "validation examples"),
        ({"probing": replace(PROBING, smoothing=0.1)}, "probing"),
        ({"finetuning": replace(FINETUNING, optimizer=partial(torch.optim.SGD, lr=0.1))}, "fine-tuning"),
        ({"head": finetune.MLPHead("fc")}, "head"),
        ({"loss": finetune.SquareLoss()}, "loss"),
    ):
        with pytest.raises(StoreError, match=f"something else: {part} differ"):
            sweep(folder=tmp_path / "s", **settings)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds other files"):
        sweep(folder=tmp_path / "o")
    (tmp_path / "s" / "run.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        sweep(folder=tmp_path / "s")
    assert json.loads((tmp_path / "s" / "tau-0001.json").read_text())["facts"]["tau"] == 1


def test_what_could_not_be_tuned_is_refused_before_the_head_is_probed(tmp_path: Path) -> None:
    """No step of probing, and nothing written."""
    steps = []

    class Counting(torch.optim.SGD):
        def step(self, *arguments: Any, **more: Any) -> Any:
            steps.append(1)
            return super().step(*arguments, **more)

    probing = replace(PROBING, optimizer=partial(Counting, lr=0.1))
    frozen = net()
    for p in frozen.parameters():
        p.requires_grad_(False)
    x, y = data()
    with pytest.raises(ModelError, match="backbone has no parameter"):
        sweep(model=frozen, probing=probing, folder=tmp_path / "a")
    wrong = replace(FINETUNING, optimizer=partial(torch.optim.SGD, lr=-1.0))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        sweep(probing=probing, finetuning=wrong, folder=tmp_path / "b")
    with pytest.raises(InputError, match="all targets are equal, 1: there is nothing to learn"):
        sweep(train=(x, torch.ones_like(y)), probing=probing, folder=tmp_path / "c")
    with pytest.raises(InputError, match="two classes or more"):
        sweep(
            train=(x, torch.rand(len(x), 1).double()), seen=(x, torch.rand(len(x), 1).double()), probing=probing,
            folder=tmp_path / "d",
        )  # fmt: skip
    assert not steps
    assert not any(tmp_path.iterdir())
    sweep(probing=probing)
    assert steps


def row(tau: int, energy: float, distance: float, accuracy: float, probed: float = 0.5) -> finetune.Row:
    change = finetune.FeatureChange(distance, 0.9, 1.0, 1.0, 1.0, 0.9)
    return finetune.Row(tau, energy, 1.0, change, probed, 1.0, accuracy, 1 - accuracy, 1.0)


def words(*rows: finetune.Row, validation: int = 10_000) -> str:
    energies = tuple(r.energy for r in rows)
    cut = finetune.Split(net(), "fc")
    return finetune.Sweep(rows, energies, validation, False, cut, {}).recommendation


def test_the_picture_has_room_for_features_that_go_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Farther than the energy is large, as with large rates."""
    from ntkit.report import finetuning

    seen, drawn = [], finetuning.drawn

    @contextmanager
    def watched(*arguments: Any) -> Iterator[Any]:
        with drawn(*arguments) as drawing:
            yield drawing
            seen.append(drawing.axes.get_ylim())

    monkeypatch.setattr(finetuning, "drawn", watched)
    rows = (row(0, 0.5, 3.0, 0.9), row(4, 0.2, 2.0, 0.8))
    found = finetune.Sweep(rows, (0.5, 0.2), 100, False, finetune.Split(net(), "fc"), {})
    finetuning.plot_energy(found)
    ((bottom, top),) = seen
    assert bottom == 0
    assert top > max(*(one.change.relative_distance for one in rows), 0.5)
    assert rows[0].change.relative_distance > 0.5


def test_the_recommendation_in_words() -> None:
    first = words(row(0, 1.0, 3.0, 0.9), row(4, 0.5, 2.0, 0.8), row(8, 0.1, 1.0, 0.7))
    assert "tau = 0" in first
    assert "features want to move" in first
    last = words(row(0, 1.0, 3.0, 0.7), row(4, 0.5, 2.0, 0.8), row(8, 0.1, 1.0, 0.9))
    assert "good as they are" in last
    assert "10% of that without probing" in last
    middle = words(row(0, 1.0, 3.0, 0.7), row(4, 0.5, 2.0, 0.9), row(8, 0.1, 1.0, 0.8, 0.8))
    assert "4 epochs (tau = 4)" in middle
    assert "want to move" not in middle
    assert "learning rate" not in middle
    catapult = words(row(0, 1.0, 3.0, 0.7), row(4, 0.5, 0.03, 0.9), row(8, 0.1, 0.23, 0.8))
    assert "From tau = 4 to 8 the features move farther although the energy falls" in catapult
    same = words(row(0, 1.0, 3.0, 0.80), row(4, 0.5, 2.0, 0.81), row(8, 0.1, 1.0, 0.79), validation=100)
    assert "tau = 0, 8 cannot be told from it" in same
    assert "matters little" in same
    useless = words(row(0, 1.0, 3.0, 0.7), row(4, 0.5, 2.0, 0.9, 0.91), row(8, 0.1, 1.0, 0.8))
    assert "does not beat the probed head here: that of tau = 4 alone" in useless
    longer = words(row(0, 1.0, 3.0, 0.7), row(4, 0.5, 2.0, 0.9, 0.5), row(8, 0.1, 1.0, 0.8, 0.95))
    assert "tau = 4), then fine-tune" in longer
    assert "does not beat the probed head here: that of tau = 8 alone" in longer  # not the one that is tuned from
    assert "does not beat the probed head" in words(row(8, 0.1, 1.0, 0.8, 0.95))
    regression = [replace(row(tau, 1.0, 1.0, math.nan, math.nan), loss=loss) for tau, loss in ((0, 0.5), (4, 0.4))]
    assert "validation loss 0.4" in words(*regression)
    assert "does not beat" not in words(*regression)
    better = [*regression, replace(regression[1], tau=8, loss=0.6, probed_loss=0.3)]
    assert "tau = 4), then fine-tune" in words(*better)
    assert "does not beat the probed head here: that of tau = 8 alone" in words(*better)
    equal = (row(0, 1.0, 3.0, 0.9), replace(row(4, 0.5, 2.0, 0.9), loss=0.05), row(8, 0.1, 1.0, 0.9))
    assert "tau = 4), then" in words(*equal)  # of equals the smallest loss
    found = sweep()
    assert found.recommendation in str(found)
    assert str(found).count("\n") == 6


def test_accuracies_are_of_classes() -> None:
    """Real-valued points have none, and the loss decides; probabilities have that of their likeliest class."""
    (x, y), (x_seen, y_seen) = data(), data(30, 1)
    square, sharp = finetune.SquareLoss(), torch.eye(C).double()
    found = sweep(train=(x, x[:, :C]), seen=(x_seen, x_seen[:, :C]), loss=square)
    for one in found.rows:
        assert all(map(math.isnan, (one.probed_accuracy, one.accuracy, one.train_accuracy)))
    assert found.best.loss == min(one.loss for one in found.rows)
    assert "validation loss" in found.recommendation
    classes, points = sweep(loss=square), sweep(train=(x, sharp[y]), seen=(x_seen, sharp[y_seen]), loss=square)
    assert [one.accuracy for one in points.rows] == [one.accuracy for one in classes.rows]


def test_no_batch_of_one_is_left_over() -> None:
    """A head with BatchNorm is trained on 25 examples in steps of 8, and on every one of them in every epoch."""
    found = sweep(
        head=finetune.Reinitialised(("norm", "last"), finetune.LinearHead("fc")), train=data(25),
        finetuning=replace(FINETUNING, frozen_statistics=False),
    )  # fmt: skip
    assert len(found.rows) == 3
    steps = {(25, 8): [8, 8, 9], (24, 8): [8] * 3, (26, 8): [8, 8, 8, 2], (3, 1): [1] * 3, (1, 8): [1]}
    for (n, size), expected in steps.items():
        parts = list(epoch(n, size, torch.Generator().manual_seed(0)))
        assert [len(part) for part in parts] == expected
        assert torch.cat(parts).tolist() == torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()


def test_what_cannot_be_probed() -> None:
    x, y = data()
    with pytest.raises(InputError, match="24 examples and 3 targets"):
        sweep(train=(x, y[:3]))
    with pytest.raises(InputError, match="a pair"):
        sweep(train=x)
    with pytest.raises(InputError, match="from 0 on: got -1"):
        sweep(train=(x, y - 1))
    with pytest.raises(InputError, match="different kinds"):
        sweep(seen=(x, torch.eye(C).double()[y]))
    with pytest.raises(InputError, match="sum to 1"):
        sweep(train=(x, 3 * torch.eye(C)[y]), seen=(x, torch.eye(C)[y]))
    with pytest.raises(ModelError, match="no module 'classifier'"):
        sweep(head=finetune.LinearHead("classifier"))
    with pytest.raises(ModelError, match="4 outputs and the targets have 3"):
        sweep(head=finetune.OwnHead("fc"))
    with pytest.raises(ModelError, match="batch statistics"):
        sweep(model=net().train())
    wild = replace(FINETUNING, optimizer=partial(torch.optim.SGD, lr=1e200), epochs=5)
    with pytest.raises(ModelError, match="diverges"):
        sweep(finetuning=wild)
    with pytest.raises(InputError, match="taus"):
        finetune.Probing(taus=(4, 2))
    with pytest.raises(InputError, match="stop"):
        finetune.Probing(stop=1.5)
    with pytest.raises(InputError, match="epochs"):
        finetune.Finetuning(epochs=0)
    with pytest.raises(InputError, match="batch_size"):
        finetune.Finetuning(batch_size=0)
    with pytest.raises(InputError, match="depth"):
        finetune.MLPHead("fc", depth=1)
    with pytest.raises(InputError, match="no network was fine-tuned from tau=9"):
        sweep().network(9)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(H).double())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = net()
    model.last = nn.Sequential(Bare(), model.last)
    with pytest.raises(ModelError, match=r"'last.0' \(Bare\).*reset_parameters"):
        sweep(model=model, head=finetune.Reinitialised("last", finetune.LinearHead("fc")))
    images = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3), nn.Flatten()).eval()
    with pytest.raises(ModelError, match=r"features of shape \(2, 4, 4\)"):
        sweep(model=images, head=finetune.LinearHead("1"), train=(torch.randn(24, 1, 6, 6), y))
