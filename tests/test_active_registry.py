"""Every strategy by its name: what all of them promise; and the one that learns losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.uses.active import NAMES, CrossEntropy, PowerMargin, SquareLoss, strategy
from ntkit.uses.active.learned import LearnedLoss, ranking_loss

N, C = 70, 3


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, C)
        ).eval()


def pool() -> tuple[Tensor, np.ndarray]:
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
    y = np.full(N, -1)
    y[:9] = [0, 1, 2] * 3
    return x, y


@pytest.mark.parametrize("loss", [CrossEntropy(), SquareLoss()])
@pytest.mark.parametrize("name", NAMES)
def test_all_choose_points_without_labels_and_the_same_again(name: str, loss: CrossEntropy | SquareLoss) -> None:
    x, y = pool()
    model, candidates = network(), np.arange(12, 60)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    chooses = strategy(name, loss=loss, missing_label=-1, random_state=3)
    found, utilities = chooses.query(x, y, model, candidates, 5, return_utilities=True)
    assert len(set(found.tolist())) == 5
    assert set(found.tolist()) <= set(candidates.tolist())
    assert utilities.shape == (5, N)
    assert np.isnan(np.delete(utilities, candidates, axis=1)).all()
    assert np.isfinite(utilities[range(5), found]).all()
    assert np.array_equal(chooses.query(x, y, model, candidates[::-1], 5), found)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module.training or module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("loss", [CrossEntropy(), SquareLoss()])
@pytest.mark.parametrize("name", NAMES)
def test_one_class_alone_has_labels(name: str, loss: CrossEntropy | SquareLoss) -> None:
    """As when the first labels come from one folder: every strategy goes on, with scores that are numbers."""
    x, y = pool()
    y[:] = np.where(y >= 0, 2, -1)
    model = network()
    chooses = strategy(name, loss=loss, missing_label=-1)
    found, utilities = chooses.query(x, y, model, batch_size=3, return_utilities=True)
    assert len(set(found.tolist())) == 3
    assert (y[found] < 0).all()
    assert np.isfinite(utilities[0][y < 0]).all()


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_power_margin_draws_by_powers_of_the_margin(beta: float) -> None:
    """The first by (1 - margin)^beta, the second the same among the others: without replacement."""
    x, _ = pool()
    x, y, candidates = x[:8], np.full(8, -1), [1, 2, 4, 5, 7]
    p = network()(x).detach().double().softmax(1)
    top = p.topk(2, 1).values
    share = (1 - (top[:, 0] - top[:, 1]))[candidates] ** beta
    share = (share / share.sum()).numpy()
    pairs, draws = np.zeros((5, 5)), 2000
    rule = PowerMargin(beta=beta, missing_label=-1, random_state=1)
    now = rule.round(x, y, network(), candidates, 2)
    for _ in range(draws):  # the generator goes on
        first, second = rule.choose(now).numbers.tolist()
        pairs[candidates.index(first), candidates.index(second)] += 1 / draws
    now = rule.round(x, y, network(), candidates, 2)
    assert rule.choose(now).numbers.tolist() == rule.query(x, y, network(), candidates, 2).tolist()
    expected = share[:, None] * share / (1 - share[:, None])
    np.fill_diagonal(expected, 0)
    assert np.abs(pairs - expected).max() < 5 * np.sqrt(expected.max() / draws)
    statistic = draws * ((pairs - expected) ** 2 / np.where(expected > 0, expected, 1)).sum()
    assert statistic < chi2.ppf(1 - 1e-4, 19)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="'magic': expected one of curvature-ivr"):
        strategy("magic")


def test_the_ranking_loss_by_hand() -> None:
    said, true = torch.tensor([0.3, 2.0, -0.5, 0.1, 0.4, 0.0]), torch.tensor([1.0, 0.2, 0.5, 0.4, 0.9, 0.5])
    # pairs (0, 3), (1, 4), (2, 5): larger, smaller, equal
    expected = (max(0, 0.5 - 0.2) + max(0, 0.5 + 1.6) + 0.5) / 3
    assert float(ranking_loss(said, true, 0.5)) == pytest.approx(expected, rel=1e-6)
    assert float(ranking_loss(-said, true, 0.5)) != pytest.approx(expected)


class Spoiled(nn.Module):
    """Right about the class, and the less sure the larger the last input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        self.last(x)
        return 4 * nn.functional.one_hot(x[:, :3].argmax(1), 3) - x[:, 3:].exp() * torch.tensor([1.0, 1.0, 1.0]) * (
            nn.functional.one_hot(x[:, :3].argmax(1), 3)
        )


def test_losses_are_learned_from_what_comes_into_layers() -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    true = x[:, :3].argmax(1).numpy()
    y = np.where(np.arange(300) < 150, true, -1)
    found, utilities = LearnedLoss(missing_label=-1).query(x, y, Spoiled().eval(), batch_size=10, return_utilities=True)
    scores, hidden = utilities[0, 150:], x[150:, 3].numpy()
    assert np.corrcoef(np.argsort(np.argsort(scores)), np.argsort(np.argsort(hidden)))[0, 1] > 0.9
    assert x[found, 3].mean() > 1.0


def test_layers_that_cannot_be_read() -> None:
    x, y = pool()
    with pytest.raises(ModelError, match="no module 'tail'"):
        LearnedLoss(layers=["tail"], missing_label=-1).query(x, y, network())
    with pytest.raises(ModelError, match="fewer than two"):
        LearnedLoss(missing_label=-1).query(x, y, nn.Linear(4, C).eval())
    with pytest.raises(InputError, match="pairs of labelled points"):
        LearnedLoss(missing_label=-1).query(x, np.where(np.arange(N) < 1, 0, -1), network())
    with pytest.raises(InputError, match="in pairs: got batch_size=1"):
        LearnedLoss(batch_size=1)


def test_convolutions_are_averaged_over_places() -> None:
    x = torch.randn(40, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(16, C)).eval()
    y = np.where(np.arange(40) < 10, np.arange(40) % C, -1)
    strategy_ = LearnedLoss(missing_label=-1, steps=5)
    parts = strategy_._inputs(strategy_.round(x, y, model))
    hidden = model[1](model[0](x))
    torch.testing.assert_close(parts[0], hidden.mean((2, 3)).detach())
    torch.testing.assert_close(parts[1], model[3](model[2](hidden)).detach())


def test_the_page_says_of_every_strategy_whether_it_was_run() -> None:
    page = (Path(__file__).parent.parent / "docs" / "active.md").read_text(encoding="utf-8")
    (missing,) = [part for part in page.split("\n\n") if "Not run anywhere" in part]
    for name in NAMES:
        assert (f"\n| {name} |" in page) != (f"`{name}`" in missing), name
