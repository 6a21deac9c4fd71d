"""The kernel in motion, the linearised network, influence along a path: against definitions and real training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError, StoreError
from ntkit.solve.course import GradientDescent
from ntkit.solve.flow import KernelFlow
from ntkit.solve.losses import CrossEntropy, Loss, SquareLoss
from ntkit.tangent.readout import RandomLogits, SumOfLogits
from ntkit.uses.dynamics import Every, KernelPath, KernelRecorder, Linearized, constancy, influence, one_step
from tests import oracles


def network(width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double().eval()


def data(seed: int = 1, n: int = 6, m: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, new = (torch.randn(k, 4, generator=generator, dtype=torch.float64) for k in (n, m))
    return x, torch.randint(3, (n,), generator=generator), new


def kernel_of(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    return oracles.entk(model, x1, x2, lambda z: z, list(model.parameters()))


def test_the_linearised_network_trains_as_the_flow_says() -> None:
    """Steps of torch on `Linearized` are the closed form with the first kernel, to 1e-10."""
    model, (x, y, new) = network(), data()
    target = nn.functional.one_hot(y, 3).double()
    straight = Linearized(model)
    assert [name for name, _ in straight.named_parameters()] == ["change"]
    torch.testing.assert_close(straight(new), model(new))
    flow = KernelFlow.decompose(kernel_of(model, x, x), target, prior=model(x).detach())
    rate = 0.5 * flow.largest_learning_rate()
    optimizer = torch.optim.SGD(straight.parameters(), lr=rate)
    for _ in range(30):
        optimizer.zero_grad()
        (0.5 * (straight(x) - target).square().sum() / len(x)).backward()
        optimizer.step()
    expected = flow.predict(kernel_of(model, new, x), GradientDescent(30, rate), model(new).detach())
    torch.testing.assert_close(straight(new).detach(), expected, rtol=0, atol=1e-10)
    assert float(straight.change.detach().norm()) == pytest.approx(
        flow.displacement(GradientDescent(30, rate)), rel=1e-9
    )
    with pytest.raises(ModelError, match=r"model.eval\(\)"):
        Linearized(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)))


def test_the_network_may_be_trained_beside_its_linearisation() -> None:
    """That is how the gap between the two is measured; parameters chosen by a module are those of the copy."""
    model, (x, _, _) = network(), data()
    straight, last = Linearized(model), Linearized(model, parameters=model[2])  # type: ignore[index]
    assert last.change.numel() == 16 * 3 + 3
    before, kernel = straight(x).detach(), kernel_of(model, x, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    torch.testing.assert_close(straight(x).detach(), before, rtol=0, atol=0)
    assert float((model(x) - straight(x)).detach().norm()) > 0.1
    jacobian = torch.cat([straight.tangent.jacobian(x[k : k + 1]) for k in range(len(x))])
    torch.testing.assert_close(jacobian @ jacobian.T, kernel)


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_network_that_dies_leaves_its_path(when: int, tmp_path: Path) -> None:
    """Its kernel is zero: what is relative to it is NaN, and all other records say what they said."""
    torch.manual_seed(0)
    x, y, _ = data()
    models = [nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)) for _ in range(3)]
    whole, broken = (KernelRecorder(x.float(), labels=y, schedule=Every()) for _ in range(2))
    for step, model in enumerate(models):
        whole.record(model, step)
        if step == when:
            with torch.no_grad():
                model[0].weight.zero_()
                model[2].weight.zero_()
        broken.record(model, step)
    found, expected = broken.path(), whole.path()
    others = [step for step in range(3) if step != when]
    assert float(found.trace[when]) == 0
    assert bool(found.effective_rank[when].isnan())
    assert bool(found.largest[when].eq(0).all())
    for name in ("trace", "effective_rank", "largest"):
        assert torch.equal(getattr(found, name)[others], getattr(expected, name)[others])
    if when:
        assert torch.equal(found.drift[others], expected.drift[others])
        assert float(found.drift[when]) == pytest.approx(1.0)
        assert bool(found.cosine[when].isnan())
    else:
        assert bool(found.drift.isnan().all())
    after = [False] * 3
    if when < 2:
        after[when + 1] = True  # from nothing there is no relative velocity
    if when == 0:
        after[0] = True
    assert found.velocity.isnan().tolist() == after


def test_records_that_are_left_behind_are_kept() -> None:
    x, _, _ = data()
    recorder = KernelRecorder(x, schedule=Every())
    for step in range(4):
        recorder.record(network(seed=step), step)
    gone = recorder.matrices[2:]
    recorder.rewind(2)
    assert recorder.steps == [0, 1]
    assert [step for step, _ in recorder.aside] == [2, 3]
    assert all(torch.equal(a, b) for (_, a), b in zip(recorder.aside, gone, strict=True))


def test_kernel_recorder_by_the_definitions() -> None:
    model, (x, y, _) = network(), data()
    recorder = KernelRecorder(x, labels=y, trace=False, schedule=Every())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    kernels = []
    for step in range(4):
        recorder.record(model.train(), step)
        assert model.training
        kernels.append(kernel_of(model, x, x))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    path = recorder.path(eigenvalues=3)
    for step, k in enumerate(kernels):
        assert float(path.drift[step]) == pytest.approx(float((k - kernels[0]).norm() / kernels[0].norm()), abs=1e-9)
        if step:
            before = kernels[step - 1]
            assert float(path.velocity[step]) == pytest.approx(float((k - before).norm() / before.norm()), rel=1e-6)
        values = torch.linalg.eigvalsh(k).flip(0)
        torch.testing.assert_close(path.largest[step], values[:3])
        ratio = values.sum() ** 2 / values.square().sum()
        torch.testing.assert_close(path.effective_rank[step], ratio)
    assert float(path.similarity[0]) == pytest.approx(1.0)
    assert bool((path.similarity[1:] < 1).all())
    with pytest.raises(InputError, match="rewind"):
        recorder.record(model, 2)
    recorder.rewind(2)
    assert recorder.steps == [0, 1]
    with pytest.raises(InputError, match="nothing"):
        KernelRecorder(x).path()


def test_the_trace_kernel_and_its_alignment() -> None:
    """By their definitions: (1/C) sum_c K_cc, the centred cosine with Y Y^T, and 1 - cos(K_t, K_0)."""
    model, (x, y, _) = network(), data()
    classes, points = (KernelRecorder(x, labels=labels, schedule=Every()) for labels in (y, soft_points(y)))
    kernels = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        for recorder in (classes, points):
            recorder.record(model, step)
        full = kernel_of(model, x, x).reshape(len(x), 3, len(x), 3)
        kernels.append(torch.einsum("ncmc->nm", full) / 3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    centre = torch.eye(len(x)).double() - 1 / len(x)
    for recorder, targets in ((classes, nn.functional.one_hot(y, 3).double()), (points, soft_points(y))):
        path = recorder.path()
        wanted = centre @ targets @ targets.T @ centre
        for step, k in enumerate(kernels):
            torch.testing.assert_close(recorder.matrices[step], k)
            own = centre @ k @ centre
            aligned = float((own * wanted).sum() / (own.norm() * wanted.norm()))
            assert float(path.alignment[step]) == pytest.approx(aligned, rel=1e-9)
            turned = 1 - float((k * kernels[0]).sum() / (k.norm() * kernels[0].norm()))
            assert float(path.cosine[step]) == pytest.approx(turned, abs=1e-12)
            assert float(path.trace[step]) == pytest.approx(float(k.trace()))
        assert float(path.cosine[2]) > 1e-4
    assert bool(unlabelled(model, x).alignment.isnan().all())


def test_the_alignment_of_a_full_kernel() -> None:
    """The centred cosine with y y^T of the flattened targets, where a class is missing among the examples too."""
    model, (x, y, _) = network(), data()
    centre = torch.kron(torch.eye(len(x)).double() - 1 / len(x), torch.eye(3).double())
    k = kernel_of(model, x, x)
    own = centre @ k @ centre
    for labels in (y, y % 2, (y % 2).int(), soft_points(y)):
        targets = labels if labels.is_floating_point() else nn.functional.one_hot(labels.long(), 3).double()
        flat = centre @ targets.reshape(-1)
        expected = float(flat @ own @ flat / (own.norm() * flat.square().sum()))
        recorder = KernelRecorder(x, labels=labels, trace=False)
        recorder.record(model, 0)
        assert float(recorder.path().alignment[0]) == pytest.approx(expected, rel=1e-9)
    mixed = RandomLogits(3, torch.Generator().manual_seed(0))  # as many scalars as classes, and none of them a class
    for readout, trace, known in ((mixed, False, False), (mixed, True, True), (SumOfLogits(), False, True)):
        recorder = KernelRecorder(x, labels=y, readout=readout, trace=trace)
        recorder.record(model, 0)
        assert bool(recorder.path().alignment.isfinite().all()) == known


def test_what_has_no_alignment(tmp_path: Path) -> None:
    """Labels that are all the same, and the constant kernel of a network that has died, are no reason to fail."""
    model, (x, y, _) = network(), data()
    for labels in (torch.zeros_like(y), torch.full_like(y, 2), soft_points(y)[:1].expand(len(x), 3)):
        for trace in (True, False):
            recorder = KernelRecorder(x, labels=labels, trace=trace)
            recorder.record(model, 0)
            assert bool(recorder.path().alignment.isnan())
            assert float(recorder.path().similarity) == pytest.approx(1)
    dead = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        dead[0].bias.fill_(-100)
    recorder = KernelRecorder(x, labels=y)
    recorder.record(dead, 0)
    assert bool(recorder.path().alignment.isnan())
    assert bool(recorder.path().similarity.isnan())
    for labels in (y - 1, torch.zeros(len(x), 3).long()):
        with pytest.raises(InputError, match="classes"):
            KernelRecorder(x, labels=labels)
    for labels in (y + 3, soft_points(y)[:, :2]):
        with pytest.raises(InputError, match="labels of a network with 3 outputs"):
            KernelRecorder(x, labels=labels, trace=False, folder=tmp_path / "kernels").record(model, 0)
        assert not (tmp_path / "kernels").exists()
    KernelRecorder(x, trace=False, folder=tmp_path / "kernels").record(model, 0)
    with pytest.raises(InputError, match="labels of a network with 3 outputs"):
        KernelRecorder(x, labels=y + 3, trace=False, folder=tmp_path / "kernels")


def soft_points(y: Tensor) -> Tensor:
    return 0.8 * nn.functional.one_hot(y, 3).double() + 0.1 * torch.arange(3).double()


def unlabelled(model: nn.Module, x: Tensor) -> KernelPath:
    recorder = KernelRecorder(x)
    recorder.record(model, 0)
    return recorder.path()


def test_kernels_on_disk(tmp_path: Path) -> None:
    """A new recorder has all matrices to the bit; what is gone back before is set aside, every time."""
    model, (x, y, _) = network(), data()
    whole = KernelRecorder(x, labels=y, schedule=Every(), trace=False)
    first = KernelRecorder(x, labels=y, schedule=Every(), trace=False, folder=tmp_path / "kernels")
    for step in range(3):
        for recorder in (whole, first):
            recorder.record(network(seed=step), step)
    again = KernelRecorder(x, labels=y, schedule=Every(), trace=False, folder=tmp_path / "kernels")
    assert again.steps == [0, 1, 2]
    assert again.last == 2
    assert all(torch.equal(a, b) for a, b in zip(again.matrices, whole.matrices, strict=True))
    assert torch.equal(again.path().similarity, whole.path().similarity)  # so the number of outputs is known too
    for seed in (7, 8):
        again.rewind(1)
        for step in (1, 2):
            again.record(network(seed=seed + step), step)
    assert len(list((tmp_path / "kernels").glob("replaced-*.npz"))) == 4
    third = KernelRecorder(x, labels=y, schedule=Every(), trace=False, folder=tmp_path / "kernels")
    assert torch.equal(third.matrices[2], again.matrices[2])
    for wrong, words in (
        (lambda: KernelRecorder(x + 1, folder=tmp_path / "kernels", trace=False), "other examples"),
        (lambda: KernelRecorder(x, folder=tmp_path / "kernels"), "other trace"),
        (lambda: KernelRecorder(x, folder=tmp_path / "kernels", trace=False, readout=SumOfLogits()), "other readout"),
    ):
        with pytest.raises(StoreError, match=words):
            wrong()
    with pytest.raises(ModelError, match="another network"):
        third.record(nn.Sequential(nn.Linear(4, 3)).double(), 3)
    broken = next((tmp_path / "kernels").glob("kernel-*2.npz"))
    raw = bytearray(broken.read_bytes())
    raw[400] ^= 1
    broken.write_bytes(bytes(raw))
    with pytest.raises(StoreError, match="is damaged"):
        KernelRecorder(x, folder=tmp_path / "kernels", trace=False)
    broken.write_bytes(b"")
    with pytest.raises(StoreError, match="is damaged"):
        KernelRecorder(x, folder=tmp_path / "kernels", trace=False)
    (tmp_path / "kernels" / "kernels.json").unlink()
    with pytest.raises(StoreError, match=r"without kernels\.json"):
        KernelRecorder(x, folder=tmp_path / "kernels", trace=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        KernelRecorder(x, folder=tmp_path / "file" / "kernels").record(model, 0)
    with pytest.raises(InputError, match="those of 6 examples"):
        KernelRecorder(x, labels=y[:2])
    with pytest.raises(InputError, match="whole number"):
        KernelRecorder(x).record(model, "a")  # type: ignore[arg-type]


def test_velocity_counts_steps() -> None:
    model, (x, _, _) = network(), data()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(1.1)
    one, five = (KernelRecorder(x, schedule=Every()) for _ in range(2))
    for recorder, gap in ((one, 1), (five, 5)):
        recorder.record(model, 10)
        recorder.record(twin, 10 + gap)
    assert float(one.path().velocity[1]) == pytest.approx(5 * float(five.path().velocity[1]))


@pytest.mark.parametrize("loss", [CrossEntropy(), SquareLoss()])
def test_influence_is_one_step_of_one_example(loss: Loss) -> None:
    """At one checkpoint it is what a step on each example alone would do, to first order."""
    model, (x, y, new) = network(), data()
    found = influence([(model, 0.05)], (x, y), (new[:1], 2), loss=loss)
    for n in range(len(x)):
        step = one_step(model, (x[n : n + 1], y[n : n + 1]), new[:1], 0.05, loss=loss)
        change = step.in_probability if step.in_log_probability is None else step.in_log_probability
        assert float(found.total[n]) == pytest.approx(float(change.predicted[0, 2]), rel=1e-9)


def test_influence_adds_up_to_what_happened() -> None:
    """Full-batch training in small steps: the influences of all examples sum to the change of the log-probability."""
    model, (x, y, new) = network(), data()
    rate, checkpoints = 1e-3, []
    first = float(model(new[:1]).detach().log_softmax(1)[0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(100):
        checkpoints.append((copy.deepcopy(model), rate / len(x)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = influence(checkpoints, (x, y), (new[:1], 1))
    last = float(model(new[:1]).detach().log_softmax(1)[0, 1])
    assert float(found.total.sum()) == pytest.approx(last - first, rel=1e-2)
    assert found.each.shape == (100, len(x))
    assert found.strongest(2).tolist() == found.total.abs().topk(2).indices.tolist()
    with pytest.raises(InputError, match="one probe"):
        influence(checkpoints[:1], (x, y), (new, 1))
    with pytest.raises(InputError, match="classes are numbers"):
        influence(checkpoints[:1], (x, y), (new[:1], 3))
    with pytest.raises(InputError, match="at least one checkpoint"):
        influence([], (x, y), (new[:1], 1))


def test_wide_networks_follow_the_flow() -> None:
    """The kernel moves less and the gap to the flow falls with width, as 1/sqrt(width) or faster, within noise."""
    x, y, new = data(n=5)
    target = nn.functional.one_hot(y, 3).double()
    ticks: list[tuple[int, int]] = []
    found = constancy(
        lambda width: network(width, int(torch.initial_seed()) % 2**31), (32, 128, 512), (x, target), new,
        generator=torch.Generator().manual_seed(0), steps=60, seeds=2, progress=lambda *tick: ticks.append(tick),
    )  # fmt: skip
    assert -2.3 < found.drift_slope < -0.35  # torch's usual weights: steeper than 1/width
    assert -2.3 < found.gap_slope < -0.35
    assert ticks[-1] == (6, 6)
    assert max(one.gap for one in found.networks if one.width == 512) < 0.1
    with pytest.raises(InputError, match="two widths"):
        constancy(network, (16,), (x, target), new, generator=torch.Generator())
    with pytest.raises(InputError, match=r"targets: expected shape \(5, 3\), got \(5, 1\)"):
        constancy(network, (8, 16), (x, y), new, generator=torch.Generator())


def test_one_output_with_and_without_its_axis() -> None:
    """Targets (N,) and (N, 1), outputs (N,) and (N, 1): the same training, and one that follows its flow."""

    class Flat(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[:, 0]

    def single(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)).double()

    x, _, new = data(n=5)
    y = x.prod(1)
    found = [
        constancy(made, (64, 256), (x, targets), new, generator=torch.Generator().manual_seed(0), steps=60, seeds=1)
        for targets in (y, y[:, None])
        for made in (single, lambda width: Flat(single(width)))
    ]
    for other in found[1:]:
        for one, same in zip(other.networks, found[0].networks, strict=True):
            assert (one.drift, one.gap) == pytest.approx((same.drift, same.gap), rel=1e-9)
    assert found[0].networks[-1].gap < 0.1
