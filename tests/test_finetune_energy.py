"""Energy, direction, slow kernel and the change of features, against autograd on one example at a time in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.solve.losses import CrossEntropy, Loss, SquareLoss
from ntkit.uses import finetune
from tests.oracles import jacobian_rows, snapshot

N, M, D, H, C = 7, 5, 4, 3, 3
LOSSES = [CrossEntropy(), SquareLoss()]


class Net(nn.Module):
    """A backbone with an in-place ReLU before a head that writes into its input, and logits in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, H), nn.Softplus())
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(H, C))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(x)) * 1.5}


def logits_of(output: dict[str, Tensor]) -> Tensor:
    return output["logits"]


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def split(model: nn.Module | None = None) -> finetune.Split:
    return finetune.Split(net() if model is None else model, "head", logits_of)


def data(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator).double(), torch.randint(C, (n,), generator=generator)


def soft(n: int = N) -> Tensor:
    return torch.rand(n, C, generator=torch.Generator().manual_seed(3)).double().softmax(1)


def own_loss(outputs: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Of one example, written out: outputs (C,), y a class or a point (C,)."""
    point = torch.eye(C, dtype=torch.float64)[y] if y.ndim == 0 else y
    if isinstance(loss, SquareLoss):
        return 0.5 * (outputs - point).square().sum()
    return -(point * outputs.log_softmax(0)).sum()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("targets", [data()[1], soft()], ids=["classes", "points"])
def test_energy_and_direction(loss: Loss, targets: Tensor) -> None:
    model, x = net(), data()[0]
    got = finetune.direction(split(model), x, targets, loss=loss)
    total = 0.0
    for n in range(N):
        z = model.body(x[n : n + 1]).detach().requires_grad_()
        outputs = model.head(z.clone())[0] * 1.5
        outputs_leaf = outputs.detach().requires_grad_()
        (pull,) = torch.autograd.grad(own_loss(outputs_leaf, targets[n], loss), outputs_leaf)
        total += float(pull.norm())
        (found,) = torch.autograd.grad(own_loss(outputs, targets[n], loss), z)
        torch.testing.assert_close(got[n], -found[0])
    energy = finetune.average_initial_energy(split(model), x, targets, loss=loss)
    assert energy == pytest.approx(total / N, rel=1e-12)
    torch.testing.assert_close(split(model).features(x), model.body(x).detach())


def test_the_slow_kernel() -> None:
    model, (x, _), (other, _) = net(), data(), data(M, 1)
    parameters = list(model.body.parameters())
    rows = jacobian_rows(model.body, x, lambda z: z, parameters)
    columns = jacobian_rows(model.body, other, lambda z: z, parameters)
    torch.testing.assert_close(finetune.slow_kernel(split(model), x, other).dense(), rows @ columns.T)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_first_step_is_exact_to_first_order(loss: Loss) -> None:
    (x, y), (at, _) = data(), data(M, 1)
    step = finetune.first_step(split(), x, y, at=at, loss=loss)
    kappa = finetune.slow_kernel(split(), at, x).dense()
    pulls = finetune.direction(split(), x, y, loss=loss)
    torch.testing.assert_close(step.velocity.flatten(), kappa @ pulls.flatten() / N)
    assert step.pull == pytest.approx(float(pulls.norm(dim=1).mean()))
    errors = []
    rates = (1e-2, 1e-3)
    for rate in rates:
        model = net()
        loss.value(model(x)["logits"], y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad
        after = model.body(at).detach()
        errors.append(float((after - step.after(rate)).norm()))
        assert step.speed * rate == pytest.approx(float((after - step.features).norm(dim=1).mean()), rel=20 * rate)
    slope = math.log(errors[0] / errors[1]) / math.log(rates[0] / rates[1])
    assert slope == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_foreseen_is_gradient_descent_of_the_linearised_network(loss: Loss) -> None:
    model, (x, y), (at, _) = net(), *[data(), data(M, 1)]
    rate, steps = 0.3, 40
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    jacobian = jacobian_rows(model, x, logits_of, parameters)
    start = logits_of(model(x)).detach()
    moved = torch.zeros(jacobian.shape[1], dtype=torch.float64)
    for _ in range(steps):
        outputs = (start + (jacobian @ moved).reshape(N, C)).requires_grad_()
        (pull,) = torch.autograd.grad(sum(own_loss(outputs[n], y[n], loss) for n in range(N)) / N, outputs)
        moved = moved - rate * jacobian.T @ pull.flatten()
    body = sum(p.numel() for name, p in zip(names, parameters, strict=True) if name.startswith("body"))
    slow = jacobian_rows(model.body, at, lambda z: z, list(model.body.parameters()))
    found = finetune.foresee(split(model), x, y, learning_rate=rate, steps=steps, at=at, loss=loss)
    torch.testing.assert_close((found.after - found.before).flatten(), slow @ moved[:body])
    assert found.energies.shape == (steps + 1,)
    assert found.energies[0] == pytest.approx(finetune.average_initial_energy(split(model), x, y, loss=loss))
    assert found.energies[-1] < found.energies[0]


def test_one_foreseen_step_is_the_first_step() -> None:
    x, y = data()
    found = finetune.foresee(split(), x, y, learning_rate=0.2, steps=1)
    step = finetune.first_step(split(), x, y)
    torch.testing.assert_close(found.after, step.after(0.2))
    assert found.distance == pytest.approx(0.2 * step.speed)


def test_a_linear_head_moves_features_along_its_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 6), nn.Linear(6, 2)).double().eval()
    cut = finetune.Split(model, "1")
    x, y = data()
    step = finetune.first_step(cut, x, y % 2)
    rows = model[1].weight.detach()
    beside = step.velocity - step.velocity @ torch.linalg.pinv(rows) @ rows
    assert float(beside.norm()) < 1e-12 * float(step.velocity.norm())
    pulls = finetune.direction(cut, x, y % 2)
    torch.testing.assert_close(pulls, CrossEntropy().misfit(model(x).detach(), y % 2) @ rows)


def test_smoothing() -> None:
    y = torch.tensor([0, 2])
    expected = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(finetune.smoothed(y, 3, 0.3), expected)
    assert finetune.smoothed(y, 3, 0.0) is y
    # a head that fits the smoothed targets keeps this energy against the sharp ones
    energy = finetune.energies(expected.log(), y)
    torch.testing.assert_close(energy, torch.full((2,), math.sqrt(0.2**2 + 2 * 0.1**2), dtype=torch.float64))
    with pytest.raises(InputError, match="smoothing"):
        finetune.smoothed(y, 3, 1.0)


def test_feature_change() -> None:
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    after = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 4.0]])
    found = finetune.feature_change(before, after)
    assert found.distance == pytest.approx((0 + math.sqrt(2) + 2) / 3)
    assert found.cosine == pytest.approx(2 / 3)
    assert found.dot == pytest.approx((25 + 0 + 8) / 3)
    assert (found.norm_before, found.norm_after) == (pytest.approx(8 / 3), pytest.approx(10 / 3))
    first, last = (z.double() - z.double().mean(0) for z in (before, after))
    kernels = [z @ z.T for z in (first, last)]
    aligned = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert found.cka == pytest.approx(float(aligned))
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]
    assert finetune.feature_change(before, 3 * before @ turn).cka == pytest.approx(1)
    assert "CKA" in str(found)
    dead = finetune.feature_change(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert dead.cosine == 1
    assert math.isnan(dead.cka)  # all features the same afterwards


def test_the_model_is_not_changed() -> None:
    model = net()
    model.body[0].weight.requires_grad_(False)
    before = snapshot(model)
    x, y = data()
    cut = split(model)
    finetune.first_step(cut, x, y)
    finetune.foresee(cut, x, y, learning_rate=0.1, steps=2)
    finetune.slow_kernel(cut, x).dense()
    cut.features(x)
    with pytest.raises(InputError):
        finetune.direction(cut, x, y + C)
    assert snapshot(model) == before
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert split(frozen).features(x).shape == (N, H)  # a frozen backbone has features too
    with pytest.raises(ModelError, match="nothing in it can be tuned"):
        finetune.first_step(split(frozen), x, y)


def test_frozen_layers_do_not_move_features() -> None:
    x, y = data()
    model = net()
    model.body[0].requires_grad_(False)
    moved = jacobian_rows(model.body, x, lambda z: z, list(model.body[2].parameters()))
    pulls = finetune.direction(split(model), x, y)
    step = finetune.first_step(split(model), x, y)
    torch.testing.assert_close(step.velocity.flatten(), moved @ moved.T @ pulls.flatten() / N)


class Strange(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body, self.fc, self.last = how, nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        if self.how == "twice":
            z = self.fc(self.fc(z))
        elif self.how == "merged":
            z = self.fc(z.repeat(2, 1))[: len(x)]
        elif self.how == "once":
            z = self.fc(z)
        return self.last(z)


def test_networks_that_cannot_be_cut() -> None:
    x, y = data()
    x = x.float()
    with pytest.raises(ModelError, match=r"no module 'classifier'.*body, fc, last"):
        finetune.Split(Strange("once"), "classifier")
    with pytest.raises(ModelError, match="no module ''"):
        finetune.Split(Strange("once"), ())
    for how, message in (
        ("twice", "2 calls"),
        ("merged", r"14 rows|6 rows"),
        ("never", "'fc' is never called"),
        ("once", r"'last' has parameters and is called after.*\('fc', 'last'\)"),
    ):
        with pytest.raises(ModelError, match=message):
            finetune.Split(Strange(how).eval(), "fc").features(x)
    both = finetune.Split(Strange("once").eval(), ("fc", "last"))
    torch.testing.assert_close(both.features(x), both.model.body(x).detach())
    finetune.direction(both, x, y)
    training = finetune.Split(nn.Sequential(nn.Linear(D, H), nn.Dropout(), nn.Linear(H, C)), "2")
    with pytest.raises(ModelError, match="dropout is active"):
        training.features(x)


def test_bad_input() -> None:
    x, y = data()
    with pytest.raises(InputError, match="one row for each of 7"):
        finetune.direction(split(), x, y[:3])
    with pytest.raises(InputError, match="classes are numbers from 0 to 2"):
        finetune.average_initial_energy(split(), x, y + C)
    with pytest.raises(InputError, match="learning_rate and steps"):
        finetune.foresee(split(), x, y, learning_rate=0.0, steps=3)
    with pytest.raises(InputError, match="positive and finite"):
        finetune.foresee(split(), x, y, learning_rate=math.inf, steps=3)
    with pytest.raises(InputError, match="diverges until its numbers overflow") as told:
        finetune.foresee(split(), x, y, learning_rate=1e3, steps=400, loss=finetune.SquareLoss())
    limit = float(str(told.value).split()[-1])
    for factor, grows in ((0.95, False), (1.1, True)):
        found = finetune.foresee(
            split(), x, y, learning_rate=factor * limit, steps=300, loss=finetune.SquareLoss()
        ).energies  # fmt: skip
        assert bool(found[-1] > found[0]) == grows
    with pytest.raises(InputError, match="cut in two"):
        finetune.slow_kernel(net(), x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"one shape \(N, h\)"):
        finetune.feature_change(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(InputError, match="diverged"):
        finetune.feature_change(torch.zeros(1, 2), torch.full((1, 2), math.nan))
