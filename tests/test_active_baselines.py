"""Baselines with networks that disagree, gradients, and clusters, against their definitions."""

from __future__ import annotations

import copy
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.features import FeatureKernel
from ntkit.uses.active import Exact, Given
from ntkit.uses.active.gradients import BADGE
from ntkit.uses.active.learned import LearnedLoss
from ntkit.uses.active.sampled import BALD, EPIG, Dropout, Ensemble
from ntkit.uses.active.typical import TypiClust

N, C = 14, 3


def member(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, C)).double().eval()


def pool() -> tuple[Tensor, np.ndarray]:
    torch.manual_seed(9)
    y = np.full(N, np.nan)
    y[[2, 5]] = [0, 1]
    return 3 * torch.randn(N, 2, dtype=torch.float64), y


def test_disagreement_by_definition() -> None:
    (x, y), models = pool(), [member(s) for s in range(4)]
    p = torch.stack([m(x).detach().softmax(1) for m in models]).tolist()

    def entropy(q: list[float]) -> float:
        return -sum(v * log(v) for v in q if v > 0)

    def mean(i: int) -> list[float]:
        return [sum(p[s][i][c] for s in range(4)) / 4 for c in range(C)]

    free = [i for i in range(N) if np.isnan(y[i])]
    bald = {i: entropy(mean(i)) - sum(entropy(p[s][i]) for s in range(4)) / 4 for i in free}
    epig = {}
    for i in free:
        total = 0.0
        for u in free:
            for a in range(C):
                for b in range(C):
                    joint = sum(p[s][i][a] * p[s][u][b] for s in range(4)) / 4
                    total += joint * log(joint / (mean(i)[a] * mean(u)[b]))
        epig[i] = total / len(free)
    for rule, true in ((BALD(Ensemble(models)), bald), (EPIG(Ensemble(models)), epig)):
        numbers, utilities = rule.query(x, y, models[0], batch_size=3, return_utilities=True)
        np.testing.assert_allclose(utilities[0, free], [true[i] for i in free], rtol=1e-9, atol=1e-12)
        assert numbers.tolist() == sorted(free, key=lambda i: -true[i])[:3]


def test_targets_are_drawn_and_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), models = pool(), [member(s) for s in range(4)]
    whole = EPIG(Ensemble(models)).query(x, y, models[0], return_utilities=True)[1]
    drawn = EPIG(Ensemble(models), target_size=3).query(x, y, models[0], return_utilities=True)[1]
    assert not np.allclose(whole, drawn, equal_nan=True)
    monkeypatch.setattr("ntkit.uses.active.sampled.MOST", 1)
    np.testing.assert_allclose(EPIG(Ensemble(models)).query(x, y, models[0], return_utilities=True)[1], whole)


def test_dropout_is_drawn_from_a_copy() -> None:
    (x, y), model = pool(), member(0)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = BALD(Dropout(10)).query(x, y, model, return_utilities=True)[1]
    assert np.array_equal(first, BALD(Dropout(10)).query(x, y, model, return_utilities=True)[1], equal_nan=True)
    other = BALD(Dropout(10), random_state=1).query(x, y, model, return_utilities=True)[1]
    assert not np.array_equal(first, other, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[2].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    # many draws: the mean is that of masks drawn by hand
    many = BALD(Dropout(3000)).query(x, y, model, return_utilities=True)[1]
    torch.manual_seed(5)
    hidden = model[:2](x).detach()  # pyright: ignore
    masks = (torch.rand(3000, 1, 8) < 0.5).double() * 2
    p = ((hidden * masks) @ model[3].weight.T + model[3].bias).softmax(2).detach()
    true = torch.special.entr(p.mean(0)).sum(1) - torch.special.entr(p).sum(2).mean(0)
    free = np.isnan(y)
    assert np.abs(many[0, free] - true.numpy()[free]).max() < 0.1 * float(true.max())


class Attending(nn.Module):
    """Attention, and nothing else that drops."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=layers, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Head(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.norm, self.head = body, nn.BatchNorm1d(8), nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x).mean(1)))


def sequences() -> tuple[Tensor, np.ndarray]:
    y = np.full(N, np.nan)
    y[[2, 5]] = [0, 1]
    return torch.randn(N, 4, 8, generator=torch.Generator().manual_seed(0)), y


@pytest.mark.parametrize(
    "body",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True), 2),
        Attending,
        lambda: Recurrent(2),
    ],
    ids=["encoder layer", "encoder", "attention", "recurrent"],
)
def test_dropout_inside_of_operations_is_drawn(body: Any) -> None:
    """In evaluation mode torch takes fused ways through these, which leave dropout out."""
    torch.manual_seed(0)
    (x, y), model = sequences(), Head(body()).eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    members = Dropout(10).outputs(BALD().round(x, y, model))
    spread = members.std(0)
    assert float(spread.min()) > 1e-3
    plain = model(x).detach().double()
    assert float((members.mean(0) - plain).abs().max()) < 5 * float(spread.max())  # BatchNorm is that of evaluation
    assert torch.backends.mha.get_fastpath_enabled()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_dropout_that_changes_nothing_is_said() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        (x, y), model = sequences(), Head(Recurrent(1)).eval()
    with pytest.raises(ModelError, match="dropout changes nothing"):
        BALD().query(x, y, model)
    assert torch.backends.mha.get_fastpath_enabled()


def test_badge_is_k_means_plus_plus_on_gradients() -> None:
    (x, y), model = pool(), member(0)
    p, hidden = model(x).detach().softmax(1), model[:2](x).detach()  # pyright: ignore
    phi = torch.cat([hidden, torch.ones(N, 1).double()], 1)
    gradients = ((torch.eye(C).double()[p.argmax(1)] - p)[:, :, None] * phi[:, None]).flatten(1)
    free = np.isnan(y).nonzero()[0]
    numbers, utilities = BADGE().query(x, y, model, batch_size=3, return_utilities=True)
    assert numbers[0] == free[int(gradients[free].norm(dim=1).argmax())]
    np.testing.assert_allclose(utilities[0, free], gradients[free].square().sum(1), rtol=1e-9)
    for k in (1, 2):  # labels do not count
        nearest = torch.cdist(gradients, gradients[numbers[:k]]).square().amin(1)
        left = [int(i) for i in free if i not in numbers[:k]]
        np.testing.assert_allclose(utilities[k, left], nearest[left], rtol=1e-6, atol=1e-12)
    second = [int(BADGE(random_state=s).query(x, y, model, batch_size=2)[1]) for s in range(500)]
    weights = (gradients - gradients[numbers[0]]).square().sum(1).numpy() * np.isnan(y)
    share = np.bincount(second, minlength=N) / 500
    assert np.abs(share - weights / weights.sum()).max() < 5 * (weights.max() / weights.sum() / 500) ** 0.5


def blobs() -> tuple[Tensor, Tensor]:
    """Five clusters of 30, 25, 20, 15 and 10 points, whose first point is the middle."""
    torch.manual_seed(0)
    sizes, parts = (30, 25, 20, 15, 10), []
    for k, size in enumerate(sizes):
        around = 0.3 * torch.randn(size, 2, dtype=torch.float64)
        around[0] = 0.0
        parts.append(around + 10 * torch.tensor([k, k % 2], dtype=torch.float64))
    return torch.cat(parts), torch.tensor([0, 30, 55, 75, 90])


def test_typical_points_of_the_largest_clusters_come_first() -> None:
    x, starts = blobs()
    rule = TypiClust(Given(FeatureKernel(x)))
    model, none = nn.Linear(2, 3).double(), np.full(100, np.nan)
    found = rule.query(x, none, model, batch_size=5)
    cluster = torch.bucketize(torch.from_numpy(found), starts, right=True) - 1
    assert cluster.tolist() == [0, 1, 2, 3, 4]
    for k, number in enumerate(found):
        mine = x[starts[k] : starts[k + 1] if k < 4 else 100]
        near = min(20, len(mine) // 2)
        typical = torch.cdist(mine, mine).sort(1).values[:, 1 : near + 1].mean(1)
        assert number - starts[k] == int(typical.argmin())
    y = none.copy()
    y[[3, 40]] = [0, 1]
    later = rule.query(x, y, model, batch_size=3)
    assert (torch.bucketize(torch.from_numpy(later), starts, right=True) - 1).tolist() == [2, 3, 4]
    assert len(set(rule.query(x, y, model, batch_size=98).tolist())) == 98


def test_refusals() -> None:
    (x, y), model = pool(), member(0)
    with pytest.raises(ModelError, match="no dropout"):
        BALD().query(x, y, nn.Linear(2, 3).double())
    with pytest.raises(InputError, match="two networks or more"):
        Ensemble([model])
    broken = member(1)
    with torch.no_grad():
        list(broken.parameters())[-1][0] = torch.nan
    with pytest.raises(ModelError, match="NaN or infin"):
        BALD(Ensemble([model, broken])).query(x, y, model)
    for rule in (BADGE(kernel=Exact()), TypiClust(Exact()), BADGE(kernel=Given(DenseKernel(torch.eye(N))))):
        with pytest.raises(InputError, match="one row of features for each point"):
            rule.query(x, y, model)


@pytest.mark.parametrize("rule", [BALD, EPIG])
def test_members_are_as_they_are_given_and_stay_so(rule: type[BALD]) -> None:
    """One that is still in training mode would answer for others, and keep what it has seen."""
    (x, y), model = pool(), member(0)
    mixing = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, C)).double()
    before = copy.deepcopy(mixing.state_dict())
    for wrong in (mixing, member(1).train()):
        with pytest.raises(ModelError, match=r"model\.eval\(\)"):
            rule(Ensemble([model, wrong])).query(x, y, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in mixing.state_dict().items())
    wide = nn.Linear(2, C + 1).double()
    with pytest.raises(InputError, match="member 1 of the ensemble has 4 outputs, the network 3"):
        rule(Ensemble([model, wide])).query(x, y, model)
    free = rule(Ensemble([model, member(1)])).query(x, y, model, return_utilities=True)[1]
    frozen = member(1).requires_grad_(False)
    fixed = rule(Ensemble([model, frozen])).query(x, y, model, return_utilities=True)[1]
    np.testing.assert_array_equal(fixed, free)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_what_is_drawn_leaves_the_devices_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed is one for all devices, so that the numbers of all are kept."""
    (x, y), model, kept, fork = pool(), member(0), [], torch.random.fork_rng

    def watched(devices: Any) -> Any:
        kept.append(list(devices))
        return fork(devices=[])

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "fork_rng", watched)
    BALD().query(x, y, model)
    LearnedLoss(steps=1).query(x, y, model)
    assert kept == [[0, 1], [0, 1]]
