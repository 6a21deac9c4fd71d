"""Batches by a kernel, against each rule's definition in plain algebra; and strategies that look at predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.features import FeatureKernel
from ntkit.tangent.linearize import linearize
from ntkit.uses.active import Given, SquareLoss
from ntkit.uses.active.designs import (
    LCMD,
    Bait,
    CoreSet,
    Design,
    FrankWolfe,
    KMeansPlusPlus,
    MaxDet,
    MaxDiag,
)
from ntkit.uses.active.gradients import BADGE
from ntkit.uses.active.picks import RedundantBatchWarning
from ntkit.uses.active.strategy import Round, Strategy
from ntkit.uses.active.typical import TypiClust
from ntkit.uses.active.uncertainty import Entropy, LeastConfidence, Margin, PowerMargin, Random

N, D, SIZE, SIGMA = 40, 30, 7, 0.3
forms = pytest.mark.parametrize(
    "form", [FeatureKernel, lambda phi: DenseKernel(phi @ phi.T)], ids=["features", "matrix"]
)
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def problem(seed: int, known: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Features of unequal lengths, labels (-1 for none), candidates."""
    draw = torch.Generator().manual_seed(seed)
    phi = torch.randn(N, D, generator=draw, dtype=torch.float64) * 2 * torch.rand(N, 1, generator=draw).double()
    labels = torch.full((N,), -1)
    labels[torch.randperm(N, generator=draw)[:known]] = 1
    return phi, labels, (labels < 0).nonzero()[:, 0]


def now(labels: Tensor, candidates: Tensor, size: int = SIZE, model: nn.Module | None = None, seed: int = 0) -> Round:
    tangent = linearize(model or nn.Linear(2, 3).double())
    x = torch.linspace(-2, 2, 2 * N, dtype=torch.float64).view(N, 2)
    return Round(tangent, x, labels, torch.ones(N).double(), candidates, size, torch.Generator().manual_seed(seed))


def scaled(phi: Tensor, labels: Tensor, sigma: float | None, weights: Tensor | None = None) -> Tensor:
    """Scaled, and with noise those of the posterior kernel, by definition: of a label of weight w it is sigma^2 / w."""
    known = labels >= 0
    phi = phi / (phi[known] if bool(known.any()) else phi).square().sum(1).mean().sqrt()
    if sigma is None:
        return phi
    w = (torch.ones(N).double() if weights is None else weights)[known, None]
    left = torch.linalg.inv(torch.eye(D, dtype=torch.float64) + phi[known].T @ (w * phi[known]) / sigma**2)
    return phi @ torch.linalg.cholesky(left)


@forms
@seeds
@pytest.mark.parametrize("sigma", [None, SIGMA])
def test_max_det_takes_what_raises_the_determinant_most(form: Any, seed: int, sigma: float | None) -> None:
    phi, labels, pool = problem(seed)
    mine = scaled(phi, labels, sigma)
    taken = (labels >= 0).nonzero()[:, 0].tolist() if sigma is None else []
    expected: list[int] = []
    for _ in range(SIZE):
        free = [i for i in pool.tolist() if i not in expected]
        grams = [mine[[*taken, *expected, i]] for i in free]
        expected.append(free[int(torch.stack([torch.linalg.slogdet(g @ g.T).logabsdet for g in grams]).argmax())])
    assert MaxDet(Given(form(phi)), sigma).choose(now(labels, pool)).numbers.tolist() == expected


@forms
@seeds
@pytest.mark.parametrize("sigma", [None, SIGMA])
@pytest.mark.parametrize("known", [0, 6])
def test_core_set_and_lcmd(form: Any, seed: int, sigma: float | None, known: int) -> None:
    phi, labels, pool = problem(seed, known)
    mine = scaled(phi, labels, sigma)
    distance = torch.cdist(mine, mine).square()
    start = (labels >= 0).nonzero()[:, 0].tolist() if sigma is None else []

    def farthest(taken: list[int], free: list[int]) -> int:
        return max(free, key=lambda i: float(distance[i, taken].min()))

    def heaviest(taken: list[int], free: list[int]) -> int:
        nearest = {i: min(taken, key=lambda j: float(distance[i, j])) for i in pool.tolist()}
        weight = {j: sum(float(distance[i, j]) for i in nearest if nearest[i] == j) for j in taken}
        heavy = max(weight, key=lambda j: weight[j])
        return max((i for i in free if nearest[i] == heavy), key=lambda i: float(distance[i, heavy]))

    for rule, best in ((CoreSet, farthest), (LCMD, heaviest)):
        expected: list[int] = []
        while len(expected) < SIZE:
            taken, free = [*start, *expected], [i for i in pool.tolist() if i not in expected]
            first = max(free, key=lambda i: float(mine[i].square().sum()))
            expected.append(best(taken, free) if taken else first)
        assert rule(Given(form(phi)), sigma).choose(now(labels, pool)).numbers.tolist() == expected


@forms
@seeds
@pytest.mark.parametrize("sigma", [None, SIGMA])
def test_frank_wolfe(form: Any, seed: int, sigma: float | None) -> None:
    phi, labels, pool = problem(seed)
    mine = scaled(phi, labels, sigma)
    start = (labels >= 0).nonzero()[:, 0].tolist() if sigma is None else []
    points = [*pool.tolist(), *start]
    mean, total, sum_ = mine[points].sum(0), float(mine[points].norm(dim=1).sum()), torch.zeros(D).double()
    unit, expected = mine / mine.norm(dim=1, keepdim=True), []

    def step(i: int) -> Tensor:
        towards = total * unit[i] - sum_
        return sum_ + float(towards @ (mean - sum_) / (towards @ towards)) * towards

    for i in start:
        sum_ = step(i)
    for _ in range(SIZE):
        free = [i for i in pool.tolist() if i not in expected]
        expected.append(max(free, key=lambda i: float(unit[i] @ (mean - sum_))))
        sum_ = step(expected[-1])
    assert FrankWolfe(Given(form(phi)), sigma).choose(now(labels, pool)).numbers.tolist() == expected


@forms
@seeds
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_bait_leaves_the_least_variance(form: Any, seed: int, backward: bool, weighted: bool) -> None:
    phi, labels, pool = problem(seed)
    mine, known = scaled(phi, labels, None), (labels >= 0).nonzero()[:, 0].tolist()
    weights = 10 ** torch.linspace(-1, 1, N, dtype=torch.float64) if weighted else torch.ones(N).double()

    def left(chosen: list[int]) -> float:
        some, w = mine[[*known, *chosen]], weights[[*known, *chosen], None]
        return float(((mine @ torch.linalg.inv(SIGMA**2 * torch.eye(D).double() + some.T @ (w * some))) * mine).sum())

    expected: list[int] = []
    for _ in range(2 * SIZE if backward else SIZE):
        expected.append(min((i for i in pool.tolist() if i not in expected), key=lambda i: left([*expected, i])))
    while len(expected) > SIZE:
        expected.remove(min(expected, key=lambda i: left([j for j in expected if j != i])))
    found = Bait(Given(form(phi)), SIGMA, backward).choose(replace(now(labels, pool), weights=weights))
    assert found.numbers.tolist() == expected
    assert found.utilities.shape == (SIZE, len(pool))


@forms
def test_k_means_plus_plus_draws_by_squared_distance(form: Any) -> None:
    phi, labels, pool = problem(0)
    distance = torch.cdist(scaled(phi, labels, None), scaled(phi, labels, None)).square()
    weights = distance[pool][:, labels >= 0].amin(1)
    rule, draws = KMeansPlusPlus(Given(form(phi))), 600
    first = [int(rule.choose(now(labels, pool, 1, seed=s)).numbers) for s in range(draws)]
    share = torch.bincount(torch.tensor(first), minlength=N)[pool] / draws
    p = weights / weights.sum()
    assert float((share - p).abs().max()) < 5 * float((p.max() / draws) ** 0.5)
    # and given the first, the second by the distances that are left
    one = int(rule.choose(now(labels, pool, 2, seed=1)).numbers[0])
    left = torch.minimum(weights, distance[pool, one])
    found = rule.choose(now(labels, pool, 2, seed=1)).utilities[1]
    free = found > -torch.inf
    torch.testing.assert_close(found[free], left[free], rtol=1e-9, atol=1e-12)


@forms
def test_longest(form: Any) -> None:
    phi, labels, pool = problem(0)
    expected = sorted(pool.tolist(), key=lambda i: -float(phi[i].norm()))[:SIZE]
    assert MaxDiag(Given(form(phi))).choose(now(labels, pool)).numbers.tolist() == expected
    open_ = scaled(phi, labels, SIGMA).norm(dim=1)
    expected = sorted(pool.tolist(), key=lambda i: -float(open_[i]))[:SIZE]
    assert MaxDiag(Given(form(phi)), SIGMA).choose(now(labels, pool)).numbers.tolist() == expected


@forms
def test_a_label_of_weight_w_has_a_part_of_the_noise(form: Any) -> None:
    phi, labels, pool = problem(0)
    weights = 10 ** torch.linspace(-2, 2, N, dtype=torch.float64)
    told = replace(now(labels, pool), weights=weights)
    mine = scaled(phi, labels, SIGMA, weights)
    found = MaxDiag(Given(form(phi)), SIGMA).choose(told)
    torch.testing.assert_close(found.utilities[0], mine[pool].square().sum(1), rtol=1e-9, atol=1e-12)
    assert float((found.utilities[0] - scaled(phi, labels, SIGMA)[pool].square().sum(1)).abs().max()) > 1e-3


@pytest.mark.parametrize("sigma", [None, SIGMA])
@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.parametrize("rule", [MaxDiag, MaxDet, CoreSet, KMeansPlusPlus, LCMD, FrankWolfe, Bait])
def test_features_in_half_precision_are_multiplied_in_more(rule: Any, size: float, sigma: float | None) -> None:
    """With squared lengths past the largest number of their type, and distances that it cannot tell apart."""
    phi, labels, pool = problem(1)
    half = (size * (phi + 3)).half()
    assert (float(half.double().square().sum(1).max()) > 65_504) == (size > 1)
    noise = SIGMA if rule is Bait and sigma is None else sigma
    found, expected = (rule(Given(FeatureKernel(f)), noise).choose(now(labels, pool)) for f in (half, half.double()))
    assert found.numbers.tolist() == expected.numbers.tolist()
    free = expected.utilities > -torch.inf
    largest = float(expected.utilities[free].abs().max())
    torch.testing.assert_close(found.utilities[free], expected.utilities[free], rtol=0, atol=1e-5 * largest)


def test_a_determinant_cannot_grow_past_the_rank() -> None:
    phi, labels, pool = problem(0, 0)
    thin = FeatureKernel(phi[:, :4].contiguous())
    with pytest.warns(RedundantBatchWarning, match="rank is used up"):
        found = MaxDet(Given(thin)).choose(now(labels, pool))
    assert len(set(found.numbers.tolist())) == SIZE


DESIGNS: list[Strategy] = [
    MaxDiag(),
    MaxDet(),
    CoreSet(),
    KMeansPlusPlus(),
    LCMD(),
    FrankWolfe(),
    Bait(),
    Bait(backward=True),
]
SIMPLE: list[Strategy] = [Random(), Entropy(), LeastConfidence(), Margin(), PowerMargin()]


@pytest.mark.parametrize("rule", [*DESIGNS, *SIMPLE], ids=repr)
@pytest.mark.filterwarnings("ignore::ntkit.uses.active.picks.RedundantBatchWarning")
def test_every_strategy_asks_and_answers_alike(rule: Strategy) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    x, y = torch.randn(30, 3), np.full(30, np.nan)
    x[20:] = x[:10]  # duplicates
    y[[1, 6, 12]] = [0, 3, 1]
    numbers, utilities = rule.query(x, y, model, batch_size=6, return_utilities=True)
    assert len(set(numbers.tolist())) == 6
    assert np.isnan(y[numbers]).all()
    assert np.isfinite(utilities[0]).sum() >= (21 if rule == Bait(backward=True) else 27)  # that gives some up again
    assert np.isnan(utilities[:, ~np.isnan(y)]).all()
    assert np.array_equal(rule.query(x, y, model, batch_size=6), numbers)
    assert set(rule.query(x, y, model, [3, 9], batch_size=2).tolist()) == {3, 9}
    assert len(rule.query(x, np.full(30, np.nan), model, batch_size=6)) == 6
    with pytest.raises(InputError, match="28 points are asked for"):
        rule.query(x, y, model, batch_size=28)


ALIKE = [
    rule(Given(FeatureKernel(problem(3)[0])), sigma)
    for rule in (MaxDiag, MaxDet, CoreSet, KMeansPlusPlus, LCMD, FrankWolfe)
    for sigma in (None, SIGMA)
]


@pytest.mark.parametrize(
    "rule",
    [*ALIKE, Bait(Given(FeatureKernel(problem(3)[0])), SIGMA), BADGE(), TypiClust()],
    ids=lambda r: type(r).__name__,
)
def test_a_candidate_is_worth_the_same_among_few_and_among_all(rule: Strategy) -> None:
    (_, labels, pool), model = problem(3), nn.Linear(2, 3).double()
    every, some = (rule.choose(now(labels, numbers, 1, model)).utilities[0] for numbers in (pool, pool[5:20:3]))
    torch.testing.assert_close(some, every[5:20:3], rtol=1e-9, atol=1e-12)


def test_the_next_heaviest_cluster_where_the_first_has_no_candidate() -> None:
    """Clusters around three labelled points of ten, six and three others, most of them no candidates."""
    middle = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    around = [middle[k] + 1 + torch.rand(n, 2, generator=draw).double() for k, n in enumerate((10, 6, 3))]
    phi = torch.cat([middle, *around])
    labels = torch.tensor([0, 1, 2] + [-1] * 19)
    rule = LCMD(Given(FeatureKernel(phi)))

    def choose(candidates: list[int]) -> list[int]:
        return rule.choose(now(labels, torch.tensor(candidates), 1)).numbers.tolist()

    distance = (phi[:, None] - middle).square().sum(2).amin(1)
    assert choose([5, 15, 20]) == [5]
    assert choose([14, 15, 16, 20]) == [14 + int(distance[14:17].argmax())]
    assert choose([19, 20, 21]) == [19 + int(distance[19:22].argmax())]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", [MaxDet, CoreSet, KMeansPlusPlus, LCMD, FrankWolfe, Bait])
def test_an_entry_that_is_no_number_is_named(rule: Any, bad: float) -> None:
    """One pair in a matrix, beside a diagonal that looks well; and one with a point that has a label."""
    phi, labels, pool = problem(0)
    known = (labels >= 0).nonzero()[:, 0]
    for one, two in ((pool[3], pool[8]), (known[0], pool[8])):
        k = phi @ phi.T
        k[one, two] = k[two, one] = bad
        for sigma in (SIGMA,) if rule is Bait else (None, SIGMA):
            with pytest.raises(InputError, match=r"not finite|is nan|is inf"):
                rule(Given(DenseKernel(k)), sigma).choose(now(labels, pool, len(pool)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", [BADGE, TypiClust])
def test_features_that_are_no_numbers_are_named(rule: Any, bad: float) -> None:
    phi, labels, pool = problem(0)
    phi[pool[3], 2] = bad
    with pytest.raises(InputError, match=f"not.*, point {int(pool[3])} among them"):
        rule(kernel=Given(FeatureKernel(phi))).choose(now(labels, pool))


def test_points_without_features_are_worth_nothing() -> None:
    phi, labels, pool = problem(0)
    phi[pool[:2]] = 0.0
    found = FrankWolfe(Given(FeatureKernel(phi))).choose(now(labels, pool))
    assert found.utilities[:, :2].abs().max() == 0


def test_uncertainty_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.9, 0.1, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(Margin().scores(p), torch.tensor([0.8, 1.0, 0.2]).double())
    torch.testing.assert_close(LeastConfidence().scores(p), torch.tensor([0.5, 0.6, 0.1]).double())
    expected = torch.tensor([-(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2)), 0.0, 0.0]).double()
    torch.testing.assert_close(Entropy().scores(p)[:1], expected[:1])
    assert int(Entropy().scores(p).argmax()) == 1


def test_square_loss_has_its_own_probabilities() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 3).double(), torch.randn(20, 2).double(), np.full(20, np.nan)
    p = SquareLoss().probabilities(model(x).detach()).topk(2, 1).values
    assert int(Margin(SquareLoss()).query(x, y, model)[0]) == int((p[:, 0] - p[:, 1]).argmin())


def test_random_is_uniform_and_follows_its_seed() -> None:
    model, x, y = nn.Linear(2, 3).double(), torch.randn(8, 2).double(), np.full(8, np.nan)
    draws = [int(Random(random_state=s).query(x, y, model)[0]) for s in range(800)]
    assert np.abs(np.bincount(draws, minlength=8) - 100).max() < 50


@pytest.mark.parametrize("rule", [MaxDet, CoreSet, Bait])
def test_noise_is_positive(rule: type[Design]) -> None:
    with pytest.raises(InputError, match="sigma is the labels' noise"):
        rule(sigma=0.0)


def test_coupled_kernels_have_no_distances_between_points() -> None:
    model, x = nn.Linear(2, 3).double(), torch.randn(10, 2).double()
    coupled = Given(DenseKernel(torch.eye(30).double()))
    for rule in (LCMD(coupled), Bait(coupled)):
        with pytest.raises(InputError, match="does not couple"):
            rule.query(x, np.full(10, np.nan), model)


def test_a_margin_needs_two_classes() -> None:
    with pytest.raises(InputError, match="one for each class: with a single logit z"):
        Margin().query(torch.randn(5, 2), np.full(5, np.nan), nn.Linear(2, 1))
