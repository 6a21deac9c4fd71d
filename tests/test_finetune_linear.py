"""The linear network f = v^T B x with square loss, where the theory of Ren et al. (2023) is exact: its trends and laws.

20 examples in 100 dimensions, 60 features; head probing and fine-tuning are full-batch gradient descent.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ntkit.uses import finetune

N, D, H = 20, 100, 60
TAUS = (0, 1, 2, 4, 8, 16, 32, 64)


def network(seed: int, scale: float, head: float) -> nn.Module:
    generator = torch.Generator().manual_seed(1000 + seed)
    model = nn.Sequential(nn.Linear(D, H, bias=False), nn.Linear(H, 1, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(scale * torch.randn(H, D, generator=generator).double() / H**0.5)
        model[1].weight.copy_(head * torch.randn(1, H, generator=generator).double() / H**0.5)
    return model


def data(seed: int, size: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator).double() / D**0.5
    return x, size * torch.randn(N, 1, generator=generator).double()


def sweep(
    seed: int, *, scale: float = 1.0, head: float = 1.0, size: float = 1.0, rate: float = 0.1, probing: float = 12.0,
    steps: int = 400, taus: tuple[int, ...] = TAUS, folder: Path | None = None,
) -> finetune.Sweep:  # fmt: skip
    return finetune.probe_then_finetune(
        network(seed, scale, head), finetune.OwnHead("1"), data(seed, size), data(seed, size),
        loss=finetune.SquareLoss(), folder=folder,
        probing=finetune.Probing(taus, partial(torch.optim.SGD, lr=probing / scale**2), batch_size=None),
        finetuning=finetune.Finetuning(steps, partial(torch.optim.SGD, lr=rate), batch_size=None),
    )  # fmt: skip


def test_the_longer_the_probing_the_less_features_move() -> None:
    found = sweep(0)
    energies = [row.energy for row in found.rows]
    distances = [row.change.distance for row in found.rows]
    cosines = [row.change.cosine for row in found.rows]
    for values in (energies, distances):
        assert all(a > b for a, b in pairwise(values))
        assert values[-1] < 1e-3 * values[0]  # measured elsewhere: 1/2000 of the energy, 1/4000 of the way
    assert all(a < b for a, b in pairwise(cosines[:-1]))
    assert cosines[0] < 0.97
    assert cosines[-1] == pytest.approx(1, abs=1e-9)
    assert found.rows[-1].change.cka > 0.999
    # E ||z_T - z_0|| <= c AIE (proposition 1)
    assert max(d / e for d, e in zip(distances, energies, strict=True)) < 0.5
    # energy is the mean absolute residual of one output
    x, y = data(0, 1.0)
    with torch.no_grad():
        assert energies[0] == pytest.approx(float((y - found.start.model(x)).abs().mean()))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_dot_product_first_rises_and_then_falls_with_energy(seed: int) -> None:
    found = sweep(seed, scale=0.3, head=4.0, size=0.6, rate=0.02, probing=6.0, taus=(0, 1, 2, 16))
    dots = [row.change.dot for row in found.rows]
    z = found.start.features(data(seed, 0.6)[0])
    before = float(z.square().sum(1).mean())
    assert dots[1] > max(dots[0], dots[-1])  # strong adaptation turns features, mild stretches them in place
    assert dots[-1] == pytest.approx(before, rel=5e-3)
    distances = [row.change.distance for row in found.rows]
    assert all(a > b for a, b in pairwise(distances))


def drift(found: finetune.Sweep, tau: int, head: Tensor) -> float:
    """How far v v^T - B B^T goes by fine-tuning, in units of its size."""
    body, tuned = found.start.model[0].weight.detach(), found.network(tau)
    v, b = tuned[1].weight.detach(), tuned[0].weight.detach()
    start = head.T @ head - body @ body.T
    return float((v.T @ v - b @ b.T - start).norm() / start.norm())


def test_the_invariant_of_gradient_flow(tmp_path: Path) -> None:
    """v v^T - B B^T does not change under gradient flow; under small steps by little, and less with less energy."""
    found = sweep(0, rate=0.05, steps=300, folder=tmp_path)
    heads = load_file(tmp_path / "probe.safetensors")
    drifts = [drift(found, tau, heads[f"{tau}/1.weight"]) for tau in TAUS]
    assert all(a > b for a, b in pairwise(drifts))
    assert 1e-4 < drifts[0] < 1e-3
    assert drifts[-1] < 1e-12
    body = found.start.model[0].weight.detach()
    for tau in TAUS[:-2]:  # the backbone has moved, and by far more than its invariant
        assert float((found.network(tau)[0].weight.detach() - body).norm()) > 1e-2
    # each step changes it by the square of the rate: half the rate, half the drift at the same time
    half = sweep(0, rate=0.025, steps=600, taus=(0, 2))
    for tau in (0, 2):
        assert drift(half, tau, heads[f"{tau}/1.weight"]) == pytest.approx(drifts[TAUS.index(tau)] / 2, rel=0.1)


def test_features_move_along_the_head_alone() -> None:
    found = sweep(0, taus=(0,), steps=1)
    x, y = data(0, 1.0)
    after = finetune.Split(found.network(0), "1").features(x)
    before = found.start.features(x)
    v = found.start.model[1].weight.detach()
    with torch.no_grad():
        residual = found.start.model(x) - y
    # dz(x)/dt = -v (r^T X x) / N
    torch.testing.assert_close(after - before, -0.1 / N * (x @ x.T @ residual) @ v)


def test_too_large_steps_after_long_probing_are_noticed() -> None:
    """The head has grown: a rate that suits tau = 0 throws the network out of its valley, though no energy is left."""
    found = sweep(0, rate=1.0, taus=(0, 4, 64), steps=300)
    distances = [row.change.distance for row in found.rows]
    assert found.rows[2].energy < 0.01 * found.rows[0].energy
    assert distances[2] > 2 * distances[1]
    assert "features move farther although the energy falls" in found.recommendation


def test_what_is_foreseen_is_what_happens_where_little_energy_is_left() -> None:
    """The linearised network is the right one as long as features hardly move; without probing it is not."""
    (x, y), steps, rate = data(0, 1.0), 400, 0.1
    found = sweep(0, steps=steps, rate=rate, taus=(0, 16))
    errors = []
    for tau, row in zip((0, 16), found.rows, strict=True):
        start = network(0, 1.0, 1.0)
        probing = torch.optim.SGD(start[1].parameters(), lr=12.0)
        for _ in range(tau):
            probing.zero_grad()
            finetune.SquareLoss().value(start(x), y).backward()
            probing.step()
        ahead = finetune.foresee(
            finetune.Split(start, "1"), x, y, learning_rate=rate, steps=steps, loss=finetune.SquareLoss()
        )
        errors.append(abs(ahead.distance / row.change.distance - 1))
    assert errors[1] < 0.01
    assert errors[0] > 0.1
