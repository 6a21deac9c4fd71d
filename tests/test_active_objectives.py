"""Every score against its definition: brute-force refits, one candidate and one label at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.losses import CrossEntropy, Loss, SquareLoss
from ntkit.uses.active import objectives
from ntkit.uses.active.objectives import (
    BrierReduction,
    EntropyReduction,
    ErrorReduction,
    ExpectedChange,
    Flips,
    Information,
    IntegratedVariance,
    MostLikelyChange,
    Objective,
    Reduction,
    Scene,
    SummedChange,
    Variance,
)
from ntkit.uses.active.posterior import KernelPosterior

N, D, C, RIDGE = 15, 30, 3, 2.0
LABELLED, TARGETS, CANDIDATES = torch.tensor([2, 5, 9]), torch.tensor([0, 1, 4, 6, 7, 10, 11]), torch.tensor([1, 3, 8])
losses = pytest.mark.parametrize("loss", [SquareLoss(), CrossEntropy()], ids=["square", "cross-entropy"])
blocks = pytest.mark.parametrize("c", [1, C])


def close(found: Tensor, expected: list[float] | list[Tensor]) -> None:
    """To 1e-8 of the largest; all in float64."""
    true = torch.tensor([float(one) for one in expected], dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, true, rtol=0, atol=1e-8 * float(true.abs().max()))


class Setting:
    """A linear model in features and labels with weights, with everything by definition."""

    def __init__(self, loss: Loss, c: int, objective: Objective) -> None:
        torch.manual_seed(3)
        self.loss, self.c = loss, c
        self.phi = torch.randn(N, c, D, dtype=torch.float64)
        self.outputs = torch.rand(N, C, dtype=torch.float64)
        self.weights = 0.3 + 2 * torch.rand(N, dtype=torch.float64)
        self.precision = loss.curvature(self.outputs, c) * self.weights[:, None, None]
        omega = objective.weights(self.outputs, loss, c)
        self.omega = torch.zeros_like(omega)
        self.omega[TARGETS] = omega[TARGETS]
        flat = self.phi.reshape(N * c, D)
        posterior = KernelPosterior(flat @ flat.T, LABELLED, self.precision, self.omega, RIDGE)
        self.scene = Scene(posterior, self.outputs, loss, TARGETS, self.weights)

    def covariance(self, extra: int | None = None) -> Tensor:
        """s as (N, N, c, c), with one label more."""
        p = RIDGE * torch.eye(D, dtype=torch.float64)
        for i in [*LABELLED.tolist(), *([] if extra is None else [extra])]:
            p = p + self.phi[i].T @ self.precision[i] @ self.phi[i]
        return torch.einsum("ncd,de,mfe->nmcf", self.phi, torch.linalg.inv(p), self.phi)

    def after(self, x: int, label: int) -> Tensor:
        """The targets' outputs with one label more: one Newton step, for squares the refit."""
        misfit = self.weights[x] * self.loss.misfit(self.outputs[x][None], torch.tensor([label]))[0]
        column = self.covariance(x)[:, x]  # with the label in it: s after (W^-1 + ...) is s+ times the misfit
        change = column[:, 0] * misfit if self.c == 1 else column @ misfit
        return (self.outputs + change)[TARGETS]


@losses
@blocks
@pytest.mark.parametrize("curvature", [True, False])
def test_integrated_variance(loss: Loss, c: int, curvature: bool) -> None:
    rule = IntegratedVariance(curvature=curvature)
    setting = Setting(loss, c, rule)
    before = setting.covariance()
    expected = []
    for x in CANDIDATES.tolist():
        less = before - setting.covariance(x)
        expected.append(sum(float((setting.omega[u] @ less[u, u]).trace()) for u in TARGETS.tolist()))
    close(rule.scores(setting.scene, CANDIDATES), expected)


@losses
@blocks
def test_changes(loss: Loss, c: int) -> None:
    setting = Setting(loss, c, MostLikelyChange())
    likely, mean = [], []
    for x in CANDIDATES.tolist():
        p = loss.probabilities(setting.outputs[x][None])[0]
        moved = [(setting.after(x, y) - setting.outputs[TARGETS]).square().sum() for y in range(C)]
        likely.append(moved[int(setting.outputs[x].argmax())].sqrt())
        mean.append(sum(p[y] * moved[y] for y in range(C)).sqrt())  # pyright: ignore
    for rule, expected in ((MostLikelyChange(), likely), (ExpectedChange(), mean)):
        close(rule.scores(setting.scene, CANDIDATES), expected)


@losses
@blocks
def test_summed_changes(loss: Loss, c: int) -> None:
    """MLMOC as it is printed: the sum over targets of the length of each one's move; and its mean over labels."""
    setting = Setting(loss, c, SummedChange())
    likely, mean = [], []
    for x in CANDIDATES.tolist():
        p = loss.probabilities(setting.outputs[x][None])[0]
        moved = [(setting.after(x, y) - setting.outputs[TARGETS]).norm(dim=1).sum() for y in range(C)]
        likely.append(moved[int(setting.outputs[x].argmax())])
        mean.append(sum(p[y] * moved[y] for y in range(C)))
    close(SummedChange().scores(setting.scene, CANDIDATES), likely)
    close(SummedChange(None).scores(setting.scene, CANDIDATES), mean)


@losses
@blocks
@pytest.mark.parametrize("labels", [None, 2])
@pytest.mark.parametrize("kind", [ErrorReduction, BrierReduction, EntropyReduction])
def test_reductions(loss: Loss, c: int, labels: int | None, kind: type[Reduction]) -> None:
    def risk(outputs: Tensor) -> float:
        p = loss.probabilities(outputs)
        if kind is ErrorReduction:
            return float((1 - p.max(1).values).sum())
        return float((1 - (p * p).sum(1)).sum() if kind is BrierReduction else -(p * p.clamp_min(1e-300).log()).sum())

    setting, rule = Setting(loss, c, kind()), kind(labels)
    expected = []
    for x in CANDIDATES.tolist():
        p = loss.probabilities(setting.outputs[x][None])[0]
        seen = p.argsort(descending=True).tolist()[: labels or C]
        later = sum(float(p[y]) * risk(setting.after(x, y)) for y in seen) / float(p[seen].sum())
        expected.append(risk(setting.outputs[TARGETS]) - later)
    close(rule.scores(setting.scene, CANDIDATES), expected)


@losses
@blocks
def test_flips(loss: Loss, c: int) -> None:
    setting = Setting(loss, c, Flips())
    now, likely, mean = setting.outputs[TARGETS].argmax(1), [], []
    for x in CANDIDATES.tolist():
        p = loss.probabilities(setting.outputs[x][None])[0]
        flips = [float((setting.after(x, y).argmax(1) != now).sum()) for y in range(C)]
        likely.append(flips[int(setting.outputs[x].argmax())])
        mean.append(sum(float(p[y]) * flips[y] for y in range(C)))
    assert Flips().scores(setting.scene, CANDIDATES).tolist() == likely
    close(Flips(None).scores(setting.scene, CANDIDATES), mean)
    assert sum(mean) > 0


@losses
@blocks
def test_information_and_variance(loss: Loss, c: int) -> None:
    """Mutual information of labels with Gaussian noise, from determinants of joint covariances."""
    setting = Setting(loss, c, Information())
    s, eye = setting.covariance(), torch.eye(c, dtype=torch.float64)

    def root(x: int) -> Tensor:
        values, vectors = torch.linalg.eigh(setting.precision[x])
        return vectors @ torch.diag(values.clamp_min(0).sqrt())

    expected, own = [], []
    for x in CANDIDATES.tolist():
        mine, total = eye + root(x).T @ s[x, x] @ root(x), 0.0
        for u in TARGETS.tolist():
            theirs, cross = eye + root(u).T @ s[u, u] @ root(u), root(u).T @ s[u, x] @ root(x)
            joint = torch.cat([torch.cat([theirs, cross], 1), torch.cat([cross.T, mine], 1)])
            total += 0.5 * float(mine.logdet() + theirs.logdet() - joint.logdet())
        expected.append(total)
        own.append(float(mine.logdet()))
    close(Information().scores(setting.scene, CANDIDATES), expected)
    close(Variance().scores(setting.scene, CANDIDATES), own)


@blocks
@pytest.mark.parametrize("rule", [ErrorReduction(), Flips(), Information(), IntegratedVariance(), SummedChange()])
def test_pieces_and_order_do_not_matter(rule: Objective, c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(CrossEntropy(), c, rule)
    every = torch.arange(N)
    whole = rule.scores(setting.scene, every)
    monkeypatch.setattr(objectives, "MOST", 1)
    torch.testing.assert_close(rule.scores(setting.scene, every), whole, rtol=1e-12, atol=1e-14)
    order = torch.randperm(N)
    torch.testing.assert_close(rule.scores(setting.scene, order), whole[order], rtol=1e-12, atol=1e-14)


def test_probabilities_of_square_loss_are_the_nearest_point_of_the_simplex() -> None:
    torch.manual_seed(0)
    outputs = 2 * torch.randn(200, C, dtype=torch.float64)
    p = SquareLoss().probabilities(outputs)
    torch.testing.assert_close(p.sum(1), torch.ones(200).double())
    assert bool((p >= 0).all())
    # nearest: every other point of the simplex is on the far side (the variational inequality)
    for corner in torch.eye(C, dtype=torch.float64):
        assert float(((outputs - p) * (corner - p)).sum(1).max()) <= 1e-12
    torch.testing.assert_close(SquareLoss().probabilities(p), p)


@losses
def test_losses_agree_with_autograd(loss: Loss) -> None:
    torch.manual_seed(0)
    f = torch.randn(C, dtype=torch.float64, requires_grad=True)

    def value(f: Tensor) -> Tensor:
        if isinstance(loss, SquareLoss):
            return 0.5 * (f - torch.eye(C, dtype=torch.float64)[1]).square().sum()
        return -f.log_softmax(0)[1]

    (gradient,) = torch.autograd.grad(value(f), f)
    hessian = torch.autograd.functional.hessian(value, f.detach())
    torch.testing.assert_close(loss.misfit(f.detach()[None], torch.tensor([1]))[0], -gradient)
    torch.testing.assert_close(loss.curvature(f.detach()[None], C)[0], hessian)
    if isinstance(loss, CrossEntropy):
        torch.testing.assert_close(loss.curvature(f.detach()[None], 1)[0, 0, 0], hessian.trace())  # pyright: ignore


def test_a_number_of_labels_is_positive() -> None:
    with pytest.raises(InputError, match="got 0"):
        ErrorReduction(0)
