"""The predicted loss of a backbone: its kernel against autograd, GCV against refitting, the anchors of the theory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ntkit.errors import InputError, ModelError
from ntkit.solve.regression import KernelRegression
from ntkit.solve.ridge import GCV, Absolute
from ntkit.tangent.linearize import Tangent
from ntkit.tangent.readout import Logits, SumOfLogits
from ntkit.uses import finetune
from ntkit.uses.finetune.candidates import KernelKind
from ntkit.uses.finetune.powerlaw import PowerLaw
from tests.oracles import generalized_cross_validation, jacobian_rows, leave_one_out, ridge_solve, snapshot

N, D, H, C = 40, 4, 6, 3


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 10)).double().eval()


def data(n: int = N) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(0)).double()
    return x, x[:, :C].argmax(1)


def ranked(candidates: Any, **settings: Any) -> finetune.Ranking:
    x, y = settings.pop("data", data())
    given = {"head": "4", "generator": torch.Generator().manual_seed(5), **settings}
    return finetune.rank_backbones(candidates, x, y, **given)


def test_the_prediction_is_that_of_a_random_logit() -> None:
    """GCV and leave-one-out of the double loop's kernel, for two heads whose kernels are averaged."""
    model, (x, y) = net(), data()
    seeds = torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(5)).tolist()[:2]
    kernel = torch.zeros(N, N).double()
    for seed in seeds:
        drawn = 2 * torch.rand(H + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
        head = nn.Linear(H, 1).double()
        with torch.no_grad():
            head.weight.copy_(drawn[None, :-1] / H**0.5)
            head.bias.copy_(drawn[-1:] / H**0.5)
        whole = nn.Sequential(*model[:4], head)
        rows = jacobian_rows(whole, x, lambda out: out, list(whole.parameters()))
        kernel += rows @ rows.T / 2
    points = torch.eye(C).double()[y]
    row = ranked({"a": model}, kernel=finetune.ExactKernel(heads=2), ridge=0.05).rows[0]
    absolute = 0.05 * float(kernel.diagonal().mean())
    assert row.predicted == pytest.approx(generalized_cross_validation(kernel, points, absolute), rel=1e-9)
    left = points - leave_one_out(kernel, points, absolute)
    assert row.leave_one_out == pytest.approx(float(left.square().sum(1).mean()), rel=1e-9)
    assert row.parameters == sum(p.numel() for p in model[:4].parameters()) + H + 1
    assert row.relative_ridge == pytest.approx(0.05)
    searched = ranked({"a": model}, kernel=finetune.ExactKernel(heads=2)).rows[0]
    grid = [g * absolute / 0.05 for g in GCV().grid]
    regression = KernelRegression.decompose(kernel, points)
    usable = [g for g in grid if regression.is_positive_definite(g)]
    assert searched.predicted == pytest.approx(min(generalized_cross_validation(kernel, points, g) for g in usable))


def test_layers_that_take_part() -> None:
    model = net()
    found = ranked(
        {
            "all": model,
            "last": finetune.Candidate(model, parameters="2.*"),
            "head": finetune.Candidate(model, parameters=()),
            "earlier": finetune.Candidate(model, head=("2", "4")),
        }
    )
    counts = {row.name: row.parameters for row in found.rows}
    first, second, head = (sum(p.numel() for p in module.parameters()) for module in (model[0], model[2], model[4]))
    head = H + 1
    assert counts == {
        "all": first + second + head, "last": second + head, "head": head, "earlier": first + head,
    }  # fmt: skip
    features = finetune.Split(model, "4").features(data()[0])
    points = torch.eye(C).double()[data()[1]]
    kernel = features @ features.T + 1  # of the head alone, whatever its weights
    expected = KernelRegression.decompose(kernel, points).fit(GCV())
    row = next(row for row in found.rows if row.name == "head")
    assert row.predicted == pytest.approx(expected.gcv)
    assert row.leave_one_out == pytest.approx(expected.leave_one_out)
    frozen = net()
    frozen[0].requires_grad_(False)
    assert ranked({"a": frozen}).rows[0].parameters == second + head


def test_order_words_and_the_untouched_model() -> None:
    model, others, done = net(), {"b": net(1), "c": net(2)}, []
    before = snapshot(model)
    found = ranked({"a": model, **others}, at=500, progress=lambda *counts: done.append(counts))
    assert snapshot(model) == before
    assert done == [(1, 3), (2, 3), (3, 3)]
    losses = [row.extrapolated for row in found.rows]
    assert losses == sorted(losses)
    assert found.best.name == found.names[0]
    points = torch.eye(C).double()[data()[1]]
    assert found.trivial == pytest.approx(float(1 - points.mean(0).square().sum()))
    assert found.spearman(dict(zip(found.names, [0.1, 0.2, 0.3], strict=True))) == pytest.approx(1)
    assert found.spearman(dict(zip(found.names, [0.3, 0.2, 0.1], strict=True))) == pytest.approx(-1)
    assert f"{found.best.predicted:.4f}" in str(found)
    assert "loss with 500" in str(found)
    for row in found.rows:
        assert row.law is not None
        assert row.extrapolated == pytest.approx(row.predicted * row.law.at(500) / row.law.at(N))
    again = ranked({"c": net(2), "a": net()})
    rows = {row.name: row for row in ranked({"a": net(), "b": net(1), "c": net(2)}).rows}
    for row in again.rows:
        assert row == rows[row.name]  # whatever stands beside it


def test_a_sketch_comes_close() -> None:
    model = net()
    exact = ranked({"a": model}, ridge=0.1).rows[0]
    sketch = ranked({"a": model}, ridge=0.1, kernel=finetune.SketchedKernel(4096, heads=1)).rows[0]
    assert sketch.predicted == pytest.approx(exact.predicted, rel=0.05)
    assert sketch.predicted != exact.predicted


def test_labels_that_were_seen() -> None:
    model, (x, _) = net(), data()
    with pytest.warns(finetune.SeenLabelsWarning, match="'a' was trained on these examples"):
        found = ranked({"a": finetune.Candidate(model, seen=True)})
    assert found.rows[0].seen
    assert "a (has seen the labels)" in str(found)
    with pytest.warns(finetune.SeenLabelsWarning, match="keeps its own head"):
        own = ranked({"a": finetune.Candidate(model, readout=SumOfLogits())})
    assert own.rows[0].parameters == sum(p.numel() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ranked({"a": model}).rows[0].seen
    # what the warning is for: labels that are noise, learned by heart, are predicted as if they could be foreseen
    noise = torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(D, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, C)).double()
    fresh = ranked({"a": wide.eval()}, data=(x, noise)).rows[0]
    optimizer = torch.optim.Adam(wide.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(wide(x), noise).backward()
        optimizer.step()
    with pytest.warns(finetune.SeenLabelsWarning):
        learned = ranked({"a": finetune.Candidate(wide, seen=True)}, data=(x, noise)).rows[0]
    trivial = ranked({"a": net()}, data=(x, noise)).trivial
    assert fresh.predicted > 0.9 * trivial  # nothing to be learned, and it says so
    assert learned.predicted < 0.7 * fresh.predicted


def power_law_features(n: int, generator: np.random.Generator, size: int = 3000) -> np.ndarray:
    return generator.standard_normal((n, size)) * np.arange(1, size + 1) ** -0.75  # eigenvalues i^-1.5


def problem(generator: np.random.Generator, n: int, tests: int = 1000, size: int = 3000) -> tuple[Any, ...]:
    """Features, a target in their span that falls with the eigenvalues, and noise of 0.1."""
    weights = generator.standard_normal(size) * np.arange(1, size + 1) ** -0.25
    x, x_test = power_law_features(n, generator), power_law_features(tests, generator)
    noise = [0.1 * generator.standard_normal(len(part)) for part in (x, x_test)]
    y, y_test = x @ weights + noise[0], x_test @ weights + noise[1]
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(x_test), torch.from_numpy(y_test)


@pytest.mark.parametrize(
    ("n", "penalties"),
    [
        (100, (0.0, 1e-5, 1e-3, 1e-2)),
        (400, (0.0, 1e-5, 1e-4, 1e-3, 1e-2)),
        (1200, (0.0, 1e-5, 1e-4, 1e-3, 1e-2)),
    ],
)
def test_the_anchors_of_the_theory(n: int, penalties: tuple[float, ...]) -> None:
    """GCV over test error is within 0.85 to 1.1, leave-one-out beside it; the mean of three draws, without ridge too.

    From 1,200 examples on the best penalty is 1e-4, and GCV finds it.
    """
    ratios, left, predicted = [], [], []
    for seed in range(3):
        x, y, x_test, y_test = problem(np.random.default_rng(seed), n)
        regression = KernelRegression.decompose(x @ x.T, y)
        for penalty in penalties:
            found = regression.fit(Absolute(n * penalty))
            error = float((found.predict(x_test @ x.T)[:, 0] - y_test).square().mean())
            ratios.append(found.gcv / error)
            left.append(found.leave_one_out / found.gcv)
            predicted.append(found.gcv)
    by = np.array(ratios).reshape(3, -1).mean(0)
    assert (by > 0.85).all()
    assert (by < 1.1).all()
    assert np.allclose(left, 1, atol=0.05 if n < 1200 else 0.01)
    if n == 1200:
        best = np.array(predicted).reshape(3, -1).mean(0)
        assert penalties[int(best.argmin())] == 1e-4
        assert best.min() == pytest.approx(0.0145, rel=0.1)


class Features(nn.Module):
    """A linear model of given features as a network: its kernel is theirs, and the head is a pass-through."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_prediction_and_extrapolation_of_a_ranking() -> None:
    """From 300 examples: the loss of 300 and of 1,200, against fits that are really made."""
    size, scales = 3000, {"steep": 0.0, "flat": 0.35}
    generator = np.random.default_rng(0)
    x, y, x_test, y_test = problem(generator, 1200)
    few = 300
    truth: dict[str, dict[int, float]] = {}
    predicted = {}
    for name, power in scales.items():
        spread = torch.arange(1, size + 1).double() ** power  # another backbone sees the same through other features
        model = Features(size).double().eval()
        found = finetune.rank_backbones(
            {name: finetune.Candidate(model, parameters=())}, x[:few] * spread, y[:few], head="head",
            generator=torch.Generator().manual_seed(0), at=1200,
        )  # fmt: skip
        predicted[name], truth[name] = found.rows[0], {}
        for n in (few, 1200):
            a, b = x[:n] * spread, x_test * spread
            kernel, cross = a @ a.T + 1, b @ a.T + 1  # 1 is the bias of the head
            best = KernelRegression.decompose(kernel, y[:n]).fit(GCV())
            weights = ridge_solve(kernel, y[:n], best.ridge)
            truth[name][n] = float((cross @ weights - y_test).square().mean())
    for name, row in predicted.items():
        assert 0.85 < row.predicted / truth[name][few] < 1.15
        assert 0.7 < row.extrapolated / truth[name][1200] < 1.3
        assert abs(row.extrapolated / truth[name][1200] - 1) < abs(row.predicted / truth[name][1200] - 1)
    order = sorted(scales, key=lambda name: predicted[name].extrapolated)
    assert order == sorted(scales, key=lambda name: truth[name][1200])


def test_power_laws() -> None:
    sizes = [20, 40, 80, 160, 320, 640]
    for floor, scale, exponent in ((0.1, 3.0, 0.7), (0.0, 1.0, 0.25), (0.5, 100.0, 1.5)):
        law = PowerLaw.fit(sizes, [floor + scale * n**-exponent for n in sizes])
        assert law.at(10_000) == pytest.approx(floor + scale * 10_000**-exponent, rel=1e-3)
        assert (law.floor, law.exponent) == (pytest.approx(floor, abs=1e-3), pytest.approx(exponent, abs=1e-2))
        assert law.misfit < 1e-4
    flat = PowerLaw.fit(sizes, [0.3, 0.31, 0.3, 0.32, 0.31, 0.33])
    assert flat.at(1e6) == pytest.approx(0.31, rel=0.05)  # never below zero, never rising
    with pytest.raises(InputError, match="three different sizes"):
        PowerLaw.fit([10, 20], [0.2, 0.1])
    with pytest.raises(InputError, match="positive and finite"):
        PowerLaw.fit([10, 20, 30], [0.2, 0.1, 0.0])


class Unpaid(KernelKind):
    """A kernel that nobody asks for."""

    heads = 1

    def of(self, tangent: Tangent, x: Any, generator: torch.Generator) -> Tensor:
        raise AssertionError("a kernel has been computed")


def test_copies_are_left_out_and_said() -> None:
    """With them a network that sees noise would come first: in one mode it has no residual."""
    x, y = data()
    doubled, wide = torch.cat([x, x[:5]]), torch.cat([y, y[:5]])
    alone = ranked({"a": net(), "b": net(1)}, at=200)
    with pytest.warns(finetune.RepeatedExamplesWarning, match="5 of 45 examples are copies of others"):
        found = ranked({"a": net(), "b": net(1)}, data=(doubled, wide), at=200)
    assert found == alone
    with pytest.warns(finetune.RepeatedExamplesWarning):
        named = finetune.rank_backbones(
            {"a": net()}, TensorDataset(doubled), wide, head="4", generator=torch.Generator().manual_seed(5)
        )
    assert named.examples == N
    other = torch.cat([y, (y[:5] + 1) % C])  # which say how noisy labels are
    assert ranked({"a": net()}, data=(doubled, other)).examples == N + 5
    with pytest.raises(InputError, match="20 or more"), pytest.warns(finetune.RepeatedExamplesWarning):
        ranked({"a": net()}, data=(x[:15].repeat(3, 1), y[:15].repeat(3)))


def test_predictions_that_gcv_cannot_make() -> None:
    """Near copies are not found as copies: the prediction is not the score of their mode."""
    x, y = data()
    near = torch.cat([x, x[:6] + 1e-7]), torch.cat([y, y[:6]])
    wide = nn.Sequential(nn.Linear(D, 400), nn.ReLU(), nn.Linear(400, 10)).double().eval()
    row = ranked({"a": wide}, data=near, head="2", ridge=1e-7).rows[0]
    assert row.predicted > 0.4 * row.leave_one_out > 0


def test_what_cannot_be_ranked() -> None:
    model, (x, y) = net(), data()
    with pytest.raises(InputError, match="no candidate"):
        ranked({})
    with pytest.raises(InputError, match="40 examples and 3 targets"):
        ranked({"a": model}, data=(x, y[:3]))
    with pytest.raises(InputError, match="20 or more"):
        ranked({"a": model}, data=(x[:5], y[:5]))
    with pytest.raises(ModelError, match="candidate 'b': the network has no module 'fc'"):
        ranked({"a": model, "b": finetune.Candidate(model, head="fc")})
    with pytest.raises(ModelError, match=r"candidate 'b'.*dropout is active"):
        ranked({"a": model, "b": nn.Sequential(*net()[:4], nn.Dropout(), nn.Linear(H, 2)).double()})
    with pytest.raises(InputError, match="heads and at are positive"):
        ranked({"a": model}, at=0)
    with pytest.raises(InputError, match="from 0 on: got -1"):
        ranked({"a": model}, data=(x, y - 1))
    with pytest.raises(InputError, match="too few to fit a power law"):  # before a kernel is paid for
        ranked({"a": model}, data=(x[:21], y[:21]), at=500, kernel=Unpaid())
    several = {"a": model, "b": finetune.Candidate(model, readout=Logits())}
    with pytest.raises(InputError, match="candidate 'b': its read-out gives 10 scalars for each example"):
        ranked(several, kernel=Unpaid())
    with pytest.raises(InputError, match="'a': predictions of 0 have no power law"):  # of subsets without the one
        ranked({"a": model}, data=(x, torch.eye(N).double()[:, 4:5]), at=500)
    with pytest.raises(InputError, match=r"all targets are equal, 2: there is nothing to predict"):
        ranked({"a": model}, data=(x, torch.full((N,), 2)), kernel=Unpaid())
    with pytest.raises(InputError, match="three candidates"):
        ranked({"a": model}).spearman({"a": 1.0})
