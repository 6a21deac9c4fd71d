"""Queries: global numbers in and out, the same choice whatever the order and the pieces, clear refusals."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, ModelError
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.features import FeatureKernel
from ntkit.tangent.linearize import linearize
from ntkit.uses import active
from ntkit.uses.active import LookAhead
from ntkit.uses.active.strategy import Round

N, C = 40, 3


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, C)).double().eval()


def pool() -> tuple[Tensor, np.ndarray]:
    torch.manual_seed(2)
    y = np.full(N, np.nan)
    y[[3, 8, 20, 33]] = [0, 1, 2, 1]
    return torch.randn(N, 6, dtype=torch.float64), y


def by_hand(phi: Tensor, outputs: Tensor, labelled: list[int], reg: float, size: int) -> list[int]:
    """Greedy curvature-weighted variance from its definition: every candidate's posterior anew for every pick."""
    w = 1 - outputs.softmax(1).square().sum(1)
    ridge = reg * float(phi[labelled].square().sum(1).mean() * w[labelled].mean())
    targets = [i for i in range(N) if i not in labelled]
    picked: list[int] = []

    def risk(points: list[int]) -> float:
        p = ridge * torch.eye(phi.shape[1], dtype=phi.dtype)
        for i in points:
            p = p + w[i] * torch.outer(phi[i], phi[i])
        s = torch.einsum("nd,de,ne->n", phi, torch.linalg.inv(p), phi)
        return float((w * s)[targets].sum())

    for _ in range(size):
        risks = {i: risk([*labelled, *picked, i]) for i in targets if i not in picked}
        picked.append(min(risks, key=lambda i: risks[i]))
    return picked


def test_default_is_greedy_curvature_variance() -> None:
    model, (x, y) = network(), pool()
    hidden, one = nn.Sequential(*list(model)[:2])(x).detach(), torch.ones(N, 1).double()
    labelled = [3, 8, 20, 33]
    last = LookAhead(kernel=active.LastLayer()).query(x, y, model, batch_size=6)
    assert last.tolist() == by_hand(torch.cat([hidden, one], 1), model(x).detach(), labelled, 0.1, 6)  # pyright: ignore
    scaled = [part / (part**2).sum(1).mean() ** 0.5 for part in (x, hidden)]
    found = LookAhead().query(x, y, model, batch_size=6)
    assert found.tolist() == by_hand(torch.cat([*scaled, one], 1), model(x).detach(), labelled, 0.1, 6)  # pyright: ignore
    one_layer = LookAhead(kernel=active.Hidden(depth=1)).query(x, y, model, batch_size=6)
    assert one_layer.tolist() == by_hand(torch.cat([scaled[1], one], 1), model(x).detach(), labelled, 0.1, 6)  # pyright: ignore


def test_last_layer_is_that_layers_tangent_kernel() -> None:
    model, (x, _) = network(), pool()
    mine = active.LastLayer().of(linearize(model), x).dense()
    true = ntkit.empirical_ntk(model, x, readout=ntkit.SingleLogit(1), parameters=lambda name, _: name.startswith("2."))
    torch.testing.assert_close(mine, true)


GEOMETRIES = {
    "last layer": active.LastLayer(),
    "sketched": active.Sketched(64),
    "sketched, coupled": active.Sketched(256, coupled=True),
    "exact": active.Exact(),
    "exact, coupled": active.Exact(coupled=True),
    "sum": active.Exact(ntkit.SumOfLogits()),
    "random logits, sketched": active.Sketched(64, readout=ntkit.RandomLogits(4, torch.Generator().manual_seed(0))),
    "features": active.Given(lambda model, x: FeatureKernel(next(model.children())(x).detach())),
    "matrix": active.Given(DenseKernel(torch.eye(N).double())),
}
OBJECTIVES = [
    active.IntegratedVariance(), active.MostLikelyChange(), active.ExpectedChange(), active.Variance(),
    active.Information(), active.ErrorReduction(2), active.BrierReduction(), active.EntropyReduction(), active.Flips(),
    active.SummedChange(),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("kernel", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("loss", [active.SquareLoss(), active.CrossEntropy()], ids=["square", "cross-entropy"])
def test_every_combination(objective: active.Objective, kernel: active.Geometry, loss: active.Loss) -> None:
    model, (x, y) = network(), pool()
    rule = LookAhead(objective, loss, kernel)
    before = copy.deepcopy(model.state_dict()), x.clone(), y.copy()
    numbers, utilities = rule.query(x, y, model, batch_size=5, return_utilities=True)
    assert len(set(numbers.tolist())) == 5
    assert np.isnan(y[numbers]).all()
    assert utilities.shape == (5, N)
    for k in range(5):
        assert np.isnan(utilities[k, ~np.isnan(y)]).all()
        assert np.isnan(utilities[k, numbers[:k]]).all()
        assert np.nanargmax(utilities[k]) == numbers[k]
    again = rule.query(x, y, model, batch_size=5)
    assert np.array_equal(again, numbers)
    assert torch.equal(x, before[1])
    assert np.array_equal(y, before[2], equal_nan=True)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())


def test_features_and_their_matrix_choose_alike() -> None:
    model, (x, y) = network(), pool()
    phi = torch.randn(N, 12, dtype=torch.float64)
    for objective in OBJECTIVES:
        found = [
            LookAhead(objective, kernel=active.Given(kernel)).query(x, y, model, batch_size=4, return_utilities=True)
            for kernel in (FeatureKernel(phi), DenseKernel(phi @ phi.T))
        ]
        assert np.array_equal(found[0][0], found[1][0])
        np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_order_of_the_pool_does_not_matter(objective: active.Objective) -> None:
    model, (x, y) = network(), pool()
    order = np.random.default_rng(0).permutation(N)
    rule, size = LookAhead(objective), 1 if isinstance(objective, active.Flips) else 4  # of equal counts the first wins
    numbers, utilities = rule.query(x, y, model, batch_size=size, return_utilities=True)
    moved, others = rule.query(x[order], y[order], model, batch_size=size, return_utilities=True)
    np.testing.assert_allclose(others, utilities[:, order], rtol=1e-9, atol=1e-12)
    if not isinstance(objective, active.Flips):  # whose scores tie: the first is taken
        assert np.array_equal(order[moved], numbers)


def test_candidates_are_scored_as_among_all() -> None:
    model, (x, y) = network(), pool()
    _, every = LookAhead().query(x, y, model, return_utilities=True)
    number, some = LookAhead().query(x, y, model, [30, 5, 11], return_utilities=True)
    assert number[0] in (5, 11, 30)
    np.testing.assert_allclose(some[0, [5, 11, 30]], every[0, [5, 11, 30]], rtol=1e-12)
    assert np.isnan(np.delete(some[0], [5, 11, 30])).all()


def test_no_label_yet_and_ways_to_say_so() -> None:
    model, (x, y) = network(), pool()
    expected = LookAhead().query(x, y, model, batch_size=3).tolist()
    minus = np.where(np.isnan(y), -1, y).astype(int)
    none = [None if np.isnan(v) else int(v) for v in y]
    for labels, missing in ((minus, -1), (none, None), (torch.from_numpy(minus), -1)):
        assert LookAhead(missing_label=missing).query(x, labels, model, batch_size=3).tolist() == expected
    assert len(LookAhead().query(x, np.full(N, np.nan), model, batch_size=3)) == 3


def test_duplicates_are_not_bought_twice() -> None:
    """With half the pool a copy of the other half, a greedy batch takes none of them twice; the single best do."""
    model, (x, y) = network(), pool()
    x, y = torch.cat([x, x]), np.concatenate([y, np.where(np.isnan(y), np.nan, y)])
    greedy = LookAhead(reg=0.01).query(x, y, model, batch_size=8)
    assert len(set((greedy % N).tolist())) == 8
    with pytest.warns(active.RedundantBatchWarning, match="use Greedy"):
        best = LookAhead(reg=0.01, batch=active.TopK()).query(x, y, model, batch_size=8)
    assert len(set((best % N).tolist())) < 8


def test_one_is_chosen_without_warning() -> None:
    model, (x, y) = network(), pool()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(LookAhead(batch=active.TopK()).query(x, y, model), LookAhead().query(x, y, model))


def test_power_sampling_follows_the_scores() -> None:
    model, (x, y) = network(), pool()
    _, utilities = LookAhead().query(x, y, model, return_utilities=True)
    u = np.nan_to_num(utilities[0])
    for beta in (0.0, 2.0):
        draws = [int(LookAhead(batch=active.Power(beta), random_state=s).query(x, y, model)[0]) for s in range(400)]
        share = np.bincount(draws, minlength=N) / 400
        p = np.where(np.isnan(utilities[0]), 0, u**beta)
        p /= p.sum()
        assert np.abs(share - p).max() < 5 * np.sqrt(p.max() / 400)
        assert abs((share * u).sum() - (p * u).sum()) < 4 * np.sqrt((p * u**2).sum() / 400)


def test_weights_of_labels_count() -> None:
    model, (x, y) = network(), pool()
    weights = np.ones(N)
    base = LookAhead().query(x, y, model, sample_weight=weights, return_utilities=True)[1]
    np.testing.assert_allclose(base, LookAhead().query(x, y, model, return_utilities=True)[1], rtol=1e-12)
    weights[:] = np.linspace(0.2, 3, N)
    phi = torch.cat([model[:2](x), torch.ones(N, 1)], 1).detach()
    f, free, eye = model(x).detach(), np.flatnonzero(np.isnan(y)), torch.eye(C).double()
    known, each = np.flatnonzero(~np.isnan(y)), torch.from_numpy(weights)
    ridge = 0.1 * float(phi[known].square().sum(1).mean() * each[known].mean())

    def fit(points: list[int], pulls: Tensor) -> tuple[Tensor, Tensor]:
        """The refit's move of all outputs and its covariance: each label counts with its weight."""
        some, w = phi[points], each[points]
        p = torch.linalg.inv(ridge * torch.eye(phi.shape[1]).double() + some.T @ (w[:, None] * some))
        return phi @ p @ some.T @ (w[:, None] * pulls), torch.einsum("nd,de,ne->n", phi, p, phi)

    still = torch.zeros(len(known), C).double()  # what was learned is in balance
    before = fit(known.tolist(), still)[1][free].sum()
    change, variance = np.full(N, np.nan), np.full(N, np.nan)
    for i in free.tolist():
        moved, after = fit([*known.tolist(), i], torch.cat([still, (eye[int(f[i].argmax())] - f[i])[None]]))
        change[i], variance[i] = float(moved[free].norm()), float(before - after[free].sum())
    for objective, expected in ((active.MostLikelyChange(), change), (active.IntegratedVariance(), variance)):
        rule = LookAhead(objective, active.SquareLoss(), active.LastLayer())
        found = rule.query(x, y, model, sample_weight=weights, return_utilities=True)[1]
        np.testing.assert_allclose(found[0], expected, rtol=1e-8)
        assert np.nanmax(np.abs(base[0] - found[0])) > 0.1 * np.nanmax(base[0])


def test_features_from_disk_in_half_precision(tmp_path: Path) -> None:
    """Mapped from a file of float16, in strips: the same choice as in memory, the numbers those of the halves."""
    model, (x, y) = network(), pool()
    phi = torch.randn(N, 30, dtype=torch.float64)
    mapped = np.lib.format.open_memmap(tmp_path / "phi.npy", "w+", np.float16, (N, 30))
    mapped[:] = phi.numpy()
    mapped.flush()
    half = torch.from_numpy(np.lib.format.open_memmap(tmp_path / "phi.npy", "c"))
    before = (tmp_path / "phi.npy").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ntkit.uses.active.posterior.STRIP", 4 * 30 * 7)
        for objective in (active.IntegratedVariance(), active.MostLikelyChange(), active.Information()):
            found, exact, whole = (
                LookAhead(objective, kernel=active.Given(FeatureKernel(features))).query(
                    x, y, model, batch_size=4, return_utilities=True
                )
                for features in (half, half.double(), phi)
            )
            assert found[0].tolist() == exact[0].tolist() == whole[0].tolist()
            np.testing.assert_allclose(found[1], exact[1], rtol=1e-4)  # products in float32
            np.testing.assert_allclose(exact[1], whole[1], rtol=1e-2)
    assert (tmp_path / "phi.npy").read_bytes() == before


def test_a_call_without_objects() -> None:
    model, (x, y) = network(), pool()
    known = np.flatnonzero(~np.isnan(y))[::-1]
    numbers, utilities = LookAhead(random_state=3).query(x, y, model, [5, 9, 30], 2, return_utilities=True)
    found = active.select(
        model, x, known, y[known].astype(int), candidates=[5, 9, 30], batch_size=2, random_state=3
    )  # fmt: skip
    assert np.array_equal(found.indices, numbers)
    np.testing.assert_array_equal(found.utilities, utilities)
    labels = torch.from_numpy(np.nan_to_num(y, nan=-1)).long()
    now = Round(linearize(model), x, labels, torch.ones(N).double(), torch.arange(N), 1, torch.Generator())
    posterior = LookAhead().look(now).posterior
    assert found.info["ridge"] == posterior.ridge
    assert found.info["condition"] == posterior.condition > 1
    assert 0 < found.info["seconds_look"] < found.info["seconds"]
    margin = active.select(model, x, known, y[known].astype(int), batch_size=3, strategy="margin")
    assert np.array_equal(margin.indices, active.Margin().query(x, y, model, batch_size=3))
    given = active.select(model, x, known, y[known].astype(int), strategy=LookAhead(missing_label=None))
    assert np.array_equal(given.indices, LookAhead().query(x, y, model))
    for labelled, classes, message in (
        ([3, 8], [0], "one class"), ([3, 3], [0, 1], "different numbers"), ([N], [0], "from 0 to 39"),
        ([0.5], [0], "from 0 to 39"), ([3], [0.5], "got 0.5"), ([3], [7], "classes from 0 to 2"),
        ([3, 8, 20], [0, 1, np.nan], "every labelled point has a class: got nan for point 20"),
        ([3, 8], [None, 1], "every labelled point has a class: got None for point 3"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            active.select(model, x, labelled, classes)  # pyright: ignore[reportArgumentType]


def test_a_class_that_stands_for_no_label_is_refused_among_labels() -> None:
    """The point would be one without a label, and could be chosen."""
    with pytest.raises(InputError, match="got 0 for point 3, which stands for no label"):
        active.select(network(), pool()[0], [8, 3], [1, 0], strategy=LookAhead(missing_label=0))


@pytest.mark.parametrize("name", [name for name in active.NAMES if name not in ("random", "bald", "epig")])
def test_one_output_is_no_choice(name: str) -> None:
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double().eval()
    x, y = pool()
    if name in (
        "core-set",
        "k-means++",
        "lcmd",
        "max-det",
        "frank-wolfe",
        "bait",
        "bait-forward-backward",
        "typiclust",
    ):
        return  # they look at features alone
    with pytest.raises(InputError, match=r"one output, expected one for each class.*\(0, z\)"):
        active.strategy(name).query(x, np.where(np.isnan(y), np.nan, 0), single)


def test_targets_matter() -> None:
    model, (x, y) = network(), pool()
    every = LookAhead().query(x, y, model, return_utilities=True)[1]
    some = LookAhead(targets=[0, 1]).query(x, y, model, return_utilities=True)[1]
    rest = LookAhead(targets=[i for i in range(2, N) if np.isnan(y[i])]).query(x, y, model, return_utilities=True)[1]
    np.testing.assert_allclose(some + rest, every, rtol=1e-9)  # variance adds up over the targets
    drawn = LookAhead(active.ErrorReduction(), target_size=10)
    labels = torch.from_numpy(np.nan_to_num(y, nan=-1)).long()
    now = Round(linearize(model), x, labels, torch.ones(N).double(), torch.arange(N), 1, torch.Generator())
    assert len(drawn.look(now).targets) == 10


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, C).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).exp()


def broken() -> nn.Sequential:
    model = network()
    with torch.no_grad():
        list(model.parameters())[-1][0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 37}, "37 points are asked for, 36 are left"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 2.0}, "batch_size: got 2.0, expected a whole number of at least 1"),
        ({"batch_size": None}, "batch_size: got None"),
        ({"candidates": []}, "1 points are asked for, 0 are left"),
        ({"candidates": [1, 40]}, "numbers of points from 0 to 39: got 40"),
        ({"candidates": [-1]}, "numbers of points from 0 to 39: got -1"),
        ({"candidates": [1, 1]}, "1 stands twice"),
        ({"candidates": [3]}, "point 3 has a label already"),
        ({"candidates": [0.5]}, "numbers of points"),
        ({"candidates": np.arange(N) > 30}, "got bool.*flatnonzero"),
        ({"y": np.zeros(N)}, "0 are left"),
        ({"y": np.full(N - 1, np.nan)}, "one label for each of the 40 points"),
        ({"y": np.where(np.arange(N) < 5, 3.0, np.nan)}, "classes from 0 to 2"),
        ({"y": np.where(np.arange(N) < 5, -1.0, np.nan)}, "missing_label=-1"),
        ({"y": np.where(np.arange(N) < 5, 0.5, np.nan)}, "got 0.5"),
        ({"y": np.array(["cat"] * N)}, "classes 0, 1, 2"),
        ({"model": broken()}, "NaN"),
        ({"sample_weight": np.ones(3)}, "40 positive numbers"),
        ({"sample_weight": np.zeros(N)}, "40 positive numbers"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    x, y = pool()
    with pytest.raises((InputError, ModelError), match=message):
        LookAhead().query(**{"X": x, "y": y, "model": network(), **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LookAhead(reg=0.0), "reg is relative"),
        (lambda: LookAhead(target_size=0), "target_size"),
        (lambda: LookAhead(reg=float("inf")), "reg is relative.*got inf"),
        (lambda: LookAhead(reg=float("nan")), "reg is relative.*got nan"),
        (lambda: LookAhead(target_size=2.5), r"target_size: got 2\.5"),
        (lambda: active.Power(-1.0), "power sampling"),
        (lambda: active.PowerMargin(beta=-1), "power sampling: got beta=-1"),
        (lambda: active.PowerMargin(beta=float("nan")), "power sampling: got beta=nan"),
        (lambda: active.PowerMargin(loss=nn.MSELoss()), "MSELoss"),
        (lambda: active.Dropout(0), "samples: got 0, expected a whole number of at least 2"),
        (lambda: active.Dropout(samples=1), "samples: got 1"),
        (lambda: active.EPIG(target_size=0), "target_size: got 0"),
        (lambda: active.EPIG(loss=nn.MSELoss()), "MSELoss"),
        (
            lambda: active.MaxDet(sigma=float("inf")),
            "sigma is the labels' noise: got inf, expected a positive.* or None",
        ),
        (lambda: active.Bait(sigma=float("inf")), "sigma is the labels' noise: got inf"),
        (lambda: LookAhead(targets=[99]).query(*pool(), network()), "targets are numbers"),
        (lambda: LookAhead(targets=[3, 3]).query(*pool(), network()), "targets are different.*3 stands twice"),
        (lambda: LookAhead(targets=[]).query(*pool(), network()), "got none"),
        (lambda: LookAhead(targets=np.arange(N) > 30).query(*pool(), network()), "targets.*flatnonzero"),
        (lambda: LookAhead(targets=[0.5, 1.5]).query(*pool(), network()), "targets.*got float64"),
        (lambda: active.select(network(), pool()[0], np.arange(N) > 38, [1]), "labelled.*flatnonzero"),
        (lambda: active.select(network(), pool()[0], [1], [0], strategy=active.Margin), "the class Margin"),
        (lambda: LookAhead(objective="mlmoc"), r"objective: got 'mlmoc'.*MostLikelyChange\(\).*strategy\(\"mlmoc\"\)"),
        (lambda: LookAhead(active.MostLikelyChange), "objective: got the class MostLikelyChange, not an object"),
        (lambda: LookAhead(kernel="last_layer"), r"kernel: got 'last_layer'.*LastLayer\(\)"),
        (lambda: LookAhead(kernel=DenseKernel(torch.eye(N))), r"kernel: got DenseKernel.*Given\("),
        (lambda: LookAhead(batch="greedy"), r"batch: got 'greedy'.*Greedy\(\)"),
        (lambda: active.LCMD(active.Hidden), "kernel: got the class Hidden"),
        (lambda: active.Bait("last_layer"), "kernel: got 'last_layer'"),
        (lambda: active.BADGE(kernel="last_layer").query(*pool(), network()), "kernel: got 'last_layer'"),
        (lambda: active.SummedChange(0), "labels looked at: got 0"),
        (lambda: active.Flips(0), "labels looked at: got 0"),
        (lambda: LookAhead(kernel=active.LastLayer()).query(*pool(), Odd()), "no last layer"),
        (lambda: LookAhead(kernel=active.Given(lambda m, x: x)).query(*pool(), network()), "got Tensor"),
        (lambda: active.Given(torch.eye(N)), r"function.*got Tensor\. Wrap features \(n, D\) as FeatureKernel"),
        (lambda: active.Given(np.eye(N)), r"got ndarray.*a matrix as DenseKernel\(matrix\)"),
        (lambda: LookAhead(kernel=active.Given(DenseKernel(torch.eye(7)))).query(*pool(), network()), "got 7"),
        (
            lambda: LookAhead(kernel=active.Given(DenseKernel(torch.zeros(N, N)))).query(*pool(), network()),
            "no features",
        ),
    ],
)
def test_more_refusals(make: Any, message: str) -> None:
    with pytest.raises((InputError, ModelError), match=message):
        make()


def test_labels_so_far_count_one_each_where_changes_are_compared() -> None:
    """A network is sure of what it has learned: with the curvature there, next to nothing would hold it in place."""
    model, (x, y) = network(), pool()
    f, phi = model(x).detach(), active.LastLayer().of(linearize(model), x).dense()
    values, vectors = torch.linalg.eigh(phi)
    phi, known, free = vectors * values.clamp_min(0).sqrt(), ~np.isnan(y), np.isnan(y)
    ridge = 0.1 * float(phi[known].square().sum(1).mean())
    p = torch.linalg.inv(ridge * torch.eye(N).double() + phi[known].T @ phi[known])
    s = phi @ p @ phi.T
    w = 1 - f.softmax(1).square().sum(1)
    misfit = (torch.eye(C).double()[f.argmax(1)] - f.softmax(1)).norm(dim=1)
    expected = s[free].square().sum(0).sqrt() / (1 + w * s.diagonal()) * misfit
    rule = LookAhead(active.MostLikelyChange(), kernel=active.LastLayer())
    _, found = rule.query(x, y, model, return_utilities=True)
    np.testing.assert_allclose(found[0, free], expected[free], rtol=1e-8)


def test_one_pass_over_the_pool_is_enough() -> None:
    """And six examples at first, by which one sees that the network does not mix them."""
    x, y, model = torch.randn(40, 5), np.where(np.arange(40) < 6, np.arange(40) % 3, -1), network_with_count()
    active.LookAhead(missing_label=-1).query(x, y, model, batch_size=3)
    assert model.seen == 40 + 6
    active.strategy("badge", missing_label=-1).query(x, y, model, batch_size=3)
    assert model.seen == 2 * (40 + 6)


def network_with_count() -> Any:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return self.layer(x)

    return Counts().eval()


class Branches(nn.Module):
    """Layers that are not called in the order of their names, one of them for pairs of places, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(4, 4)
        self.places = nn.Linear(2, 5)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.token = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:  # (N, 4, 8)
        self.places(x.reshape(-1, 2))
        middle = self.conv(x) + self.token(x.transpose(1, 2)).transpose(1, 2)
        return self.head(middle.relu().mean(2))


def test_hidden_reads_layers_in_the_order_of_calls() -> None:
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(300, 4, 8)
    tangent = linearize(model)
    middle = (model.conv(x) + model.token(x.transpose(1, 2)).transpose(1, 2)).relu().mean(2)

    def expected(*parts: Tensor) -> Tensor:
        return torch.cat([*(p / p.square().sum(1).mean().sqrt() for p in parts), torch.ones(300, 1)], 1).detach()

    def found(**options: Any) -> Tensor:
        kernel = active.Hidden(**options).of(tangent, x)
        assert isinstance(kernel, FeatureKernel)
        return kernel.features()

    torch.testing.assert_close(found(depth=1), expected(middle))
    torch.testing.assert_close(found(depth=2), expected(x.mean(2), middle))  # the inputs of token: channels last
    torch.testing.assert_close(found(depth=9), expected(x.mean(2), x.mean(2), middle))
    torch.testing.assert_close(found(layers=["conv"]), expected(x.mean(2)))
    for options, message in (
        ({"layers": ["tail"]}, "no module 'tail'"),
        ({"layers": ["places"]}, "'places' does not see each example once"),
        ({"layers": ["unused"]}, "'unused' does not see each example once"),
    ):
        with pytest.raises(ModelError, match=message):
            found(**options)
    with pytest.raises(InputError, match="depth"):
        active.Hidden(depth=0)
    with pytest.raises(ModelError, match="nothing comes into"):
        active.Hidden().of(linearize(Bare().eval()), torch.randn(5, 3))
    assert not any(module._forward_pre_hooks for module in model.modules())


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Overwrites(nn.Module):
    """Adds to what it has given to a layer, in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x += self.middle(x)
        return self.head(x)


def test_hidden_is_what_came_into_layers_before_it_was_overwritten() -> None:
    torch.manual_seed(0)
    model, x = Overwrites().eval(), torch.randn(300, 5)
    with torch.no_grad():
        before = model.first(x).relu()
        after = before + model.middle(before)
    kernel = active.Hidden().of(linearize(model), x)
    assert isinstance(kernel, FeatureKernel)
    expected = [part / part.square().sum(1).mean().sqrt() for part in (before, after)]
    torch.testing.assert_close(kernel.features(), torch.cat([*expected, torch.ones(300, 1)], 1))


@pytest.mark.parametrize("objective", [active.IntegratedVariance(), active.Variance(), active.Information()])
def test_outputs_need_not_move_for_scores_that_do_not_look_at_them(
    objective: active.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = network(), pool()
    rule = LookAhead(objective)
    numbers, utilities = rule.query(x, y, model, batch_size=6, return_utilities=True)
    assert not objective.reads_outputs
    monkeypatch.setattr(type(objective), "reads_outputs", True)
    again, moved = rule.query(x, y, model, batch_size=6, return_utilities=True)
    np.testing.assert_array_equal(numbers, again)
    np.testing.assert_array_equal(utilities, moved)


class Wrapped(nn.Sequential):
    """Gives its logits in a dict. (A sketch goes by the names of parameters, which are those of the other.)"""

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(input)}


@pytest.mark.parametrize(
    "kernel", [active.Sketched(64), active.Sketched(64, coupled=True), active.Exact(), active.Exact(coupled=True)]
)
def test_kernels_of_all_parameters_know_where_the_logits_are(kernel: active.Geometry) -> None:
    model, (x, y) = network(), pool()
    expected = LookAhead(kernel=kernel).query(x, y, model, batch_size=3, return_utilities=True)
    rule = LookAhead(kernel=kernel, select=lambda said: said["logits"])
    found = rule.query(x, y, Wrapped(*model).eval(), batch_size=3, return_utilities=True)
    assert np.array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-8)
    summed = LookAhead(kernel=active.Exact(ntkit.SumOfLogits(lambda said: said["logits"])), select=rule.select)
    alone = LookAhead(kernel=active.Exact(ntkit.SumOfLogits())).query(x, y, model, batch_size=3)
    assert np.array_equal(summed.query(x, y, Wrapped(*model).eval(), batch_size=3), alone)


class Twice(nn.Module):
    """One of its layers sees each example twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.again(self.first(x).tanh()).tanh()).tanh())


def test_a_layer_that_is_called_twice_has_not_one_input() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(300, 6)
    kernel = active.Hidden().of(linearize(model), x)
    assert isinstance(kernel, FeatureKernel)
    with torch.no_grad():
        last = model.again(model.again(model.first(x).tanh()).tanh()).tanh()
    expected = [part / part.square().sum(1).mean().sqrt() for part in (x, last)]
    torch.testing.assert_close(kernel.features(), torch.cat([*expected, torch.ones(300, 1)], 1))
    with pytest.raises(ModelError, match="'again' does not see each example once"):
        active.Hidden(layers=["again"]).of(linearize(model), x)


class ByName(nn.Module):
    """The same three layers, called by place or by keyword."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv, self.head = nn.Linear(6, 6), nn.Conv1d(1, 4, 3), nn.Linear(4, 3)
        self.named = named

    def forward(self, x: Tensor) -> Tensor:
        if not self.named:
            return self.head(self.conv(self.first(x).tanh()[:, None]).relu().mean(2))
        hidden = self.conv(input=self.first(input=x).tanh()[:, None])
        return self.head(input=hidden.relu().mean(2))


@pytest.mark.parametrize("kernel", [active.Hidden(), active.Hidden(layers=["conv", "head"]), active.LastLayer()])
def test_layers_that_are_called_by_keyword_are_seen(kernel: active.Geometry) -> None:
    x = torch.randn(300, 6)
    found, expected = (kernel.of(linearize(ByName(named).eval()), x) for named in (True, False))
    assert isinstance(found, FeatureKernel)
    assert isinstance(expected, FeatureKernel)
    torch.testing.assert_close(found.features(), expected.features())
