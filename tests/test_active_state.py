"""The state of a pool: whatever the order of labels, that of a fresh start; and refits by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
from ntkit.kernel.features import FeatureKernel
from ntkit.uses import active
from ntkit.uses.active import LookAhead
from ntkit.uses.active.state import LookAheadState

N, C = 25, 3
losses = pytest.mark.parametrize("loss", [active.SquareLoss(), active.CrossEntropy()], ids=["square", "cross-entropy"])
KERNELS = {
    "features": active.LastLayer(),
    "matrix": active.Exact(),
    "coupled features": active.Sketched(128, coupled=True),  # more than parameters: exact
    "coupled matrix": active.Exact(coupled=True),
}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, C)).double().eval()


def pool() -> tuple[Tensor, np.ndarray]:
    torch.manual_seed(2)
    y = np.full(N, -1)
    y[[3, 8, 20, 11]] = [0, 1, 2, 1]
    return torch.randn(N, 4, dtype=torch.float64), y


# Objectives that weigh targets and labels alike share a state: the first makes it, and all are scored in it.
RULES: dict[str, list[active.Objective]] = {
    "curved": [active.IntegratedVariance()],
    "labels curved": [active.IntegratedVariance(curvature=False), active.Variance(), active.Information()],
    "changes": [
        active.MostLikelyChange(), active.ExpectedChange(), active.ErrorReduction(), active.BrierReduction(2),
        active.EntropyReduction(), active.Flips(), active.Flips(None), active.SummedChange(),
    ],
}  # fmt: skip
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
WEIGHTS = np.linspace(0.5, 2, N)


def make(
    loss: active.Loss, kernel: active.Geometry, y: np.ndarray, learned: np.ndarray | None = None, **options: object
) -> LookAheadState:
    x, _ = pool()
    strategy = LookAhead(loss=loss, kernel=kernel, missing_label=-1, **options)  # pyright: ignore
    return LookAheadState(strategy, x, y, network(), learned=learned, sample_weight=WEIGHTS)


def same(found: LookAheadState, fresh: LookAheadState, rule: list[active.Objective], error: float = 1e-8) -> None:
    assert found.ridge == fresh.ridge
    assert torch.equal(found.posterior.precision, fresh.posterior.precision)
    for mine, true in (
        (found.predict(), fresh.predict()),
        (found.posterior.own, fresh.posterior.own),
        (found.posterior.shared, fresh.posterior.shared),
    ):
        assert float((mine - true).abs().max()) <= error * float(true.abs().max())
    free = found.labels < 0
    assert np.array_equal(found.labels, fresh.labels)
    for objective in rule:
        mine, true = found.scores(objective), fresh.scores(objective)
        np.testing.assert_allclose(mine[free], true[free], rtol=0, atol=error * np.abs(true[free]).max())
        assert np.isnan(mine[~free]).all()


@losses
@kernels
@rules
def test_labels_in_any_order_equal_a_fresh_start(
    loss: active.Loss, kernel: active.Geometry, rule: list[active.Objective]
) -> None:
    _, y = pool()
    state = make(loss, kernel, y, objective=rule[0])
    state.add(5, 2)
    state.remove(8)
    state.relabel(20, 0)
    state.add(8, 0)
    state.add(9, 1)
    state.relabel(9, 2)
    state.remove(5)
    state.remove(3)
    later = y.copy()
    later[[3, 8, 20, 9]] = [-1, 0, 0, 2]
    same(state, make(loss, kernel, later, y, objective=rule[0]), rule)
    for number, label in ((3, 0), (8, 1), (20, 2)):  # and all the way back
        state.add(number, label) if number == 3 else state.relabel(number, label)
    state.remove(9)
    same(state, make(loss, kernel, y, objective=rule[0]), rule)


@losses
@kernels
@rules
def test_two_hundred_changes(loss: active.Loss, kernel: active.Geometry, rule: list[active.Objective]) -> None:
    _, y = pool()
    state, now, draw = make(loss, kernel, y, objective=rule[0]), y.copy(), np.random.default_rng(0)
    counts = dict.fromkeys(("add", "remove", "relabel"), 0)
    for _ in range(200):
        number, label = int(draw.integers(N)), int(draw.integers(C))
        kind = "add" if now[number] < 0 else "remove" if draw.random() < 0.5 else "relabel"
        counts[kind] += 1
        if kind == "remove":
            state.remove(number)
            now[number] = -1
        else:
            (state.add if kind == "add" else state.relabel)(number, label)
            now[number] = label
    assert min(counts.values()) > 40
    same(state, make(loss, kernel, now, y, objective=rule[0]), rule)


@losses
@rules
def test_what_was_learned_is_in_balance(loss: active.Loss, rule: list[active.Objective]) -> None:
    """Its labels pull no more, whatever the network's outputs are; ridge, precisions and targets come from it."""
    (x, y), model = pool(), network()
    state = make(loss, active.LastLayer(), y, objective=rule[0])
    f = model(x).detach()
    assert torch.equal(state.predict(), f)
    phi, known = torch.cat([model[:2](x), torch.ones(N, 1)], 1).detach(), torch.from_numpy(y >= 0)
    w = torch.ones(N).double() if isinstance(loss, active.SquareLoss) else 1 - f.softmax(1).square().sum(1)
    if not rule[0].curved_labels:
        w[known] = 1.0
    w = w * torch.from_numpy(WEIGHTS)
    assert state.ridge == pytest.approx(0.1 * float(phi[known].square().sum(1).mean() * w[known].mean()), rel=1e-12)
    torch.testing.assert_close(state.posterior.precision[:, 0, 0], w, rtol=1e-12, atol=0)
    assert state.scene.targets.tolist() == torch.arange(N)[~known].tolist()
    state.add(5, 2)
    assert state.scene.targets.tolist() == torch.arange(N)[~known].tolist()


def test_square_loss_is_ridge_regression_around_the_network() -> None:
    """With nothing learned, the network is the prior."""
    (x, y), model = pool(), network()
    state = make(active.SquareLoss(), active.Exact(coupled=True), y, np.full(N, -1))
    theta = ntkit.empirical_ntk(model, x).detach()
    f0, known = model(x).detach(), (y >= 0).nonzero()[0]
    ridge = 0.1 * float(theta.diagonal().mean() * WEIGHTS.mean())
    assert state.ridge == pytest.approx(ridge, rel=1e-12)
    rows = torch.tensor([i * C + c for i in known for c in range(C)])
    noise = torch.diag(ridge / torch.from_numpy(WEIGHTS)[known].repeat_interleave(C))
    gap = (torch.eye(C).double()[y[known]] - f0[known]).reshape(-1)
    expected = f0.reshape(-1) + theta[:, rows] @ torch.linalg.solve(theta[rows][:, rows] + noise, gap)
    torch.testing.assert_close(state.predict().reshape(-1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.predict([4, 7]), expected.view(N, C)[[4, 7]], rtol=1e-9, atol=1e-9)


def objective_of(theta: Tensor, phi: Tensor, labels: np.ndarray, ridge: float, loss: active.Loss) -> Tensor:
    """What training makes small: weighted losses of the labels, and the ridge."""
    known = np.flatnonzero(labels >= 0)
    f, target = phi[known] @ theta.view(-1, C), torch.eye(C).double()[labels[known]]
    each = -(target * f.log_softmax(1)).sum(1)
    if isinstance(loss, active.SquareLoss):
        each = 0.5 * (f - target).square().sum(1)
    return torch.from_numpy(WEIGHTS)[known] @ each + 0.5 * ridge * theta.square().sum()


def newton(theta: Tensor, *task: object) -> Tensor:
    """One step from theta."""
    gradient = torch.autograd.functional.jacobian(lambda t: objective_of(t, *task), theta)  # pyright: ignore
    hessian = torch.autograd.functional.hessian(lambda t: objective_of(t, *task), theta)  # pyright: ignore
    return theta - torch.linalg.solve(hessian, gradient)  # pyright: ignore


@losses
@pytest.mark.parametrize("change", ["add", "remove", "relabel"])
def test_a_trained_network_moves_as_its_objective_says(loss: active.Loss, change: str) -> None:
    """A linear network at the minimum of its objective: the step to that of other labels, in all parameters."""
    (x, y), ridge = pool(), 0.7
    phi = torch.cat([x, torch.ones(N, 1).double()], 1)
    theta = torch.zeros(5 * C, dtype=torch.float64)
    for _ in range(9):
        theta = newton(theta, phi, y, ridge, loss)
    torch.testing.assert_close(newton(theta, phi, y, ridge, loss), theta, rtol=0, atol=1e-12)
    model = nn.Linear(4, C).double().eval()
    with torch.no_grad():
        model.weight.copy_(theta.view(5, C)[:4].T)
        model.bias.copy_(theta.view(5, C)[4])
    later = y.copy()
    later[6 if change == "add" else 20] = {"add": 2, "remove": -1, "relabel": 1}[change]
    for kernel in (active.Exact(coupled=True), active.Sketched(16, coupled=True)):

        def state(reg: float, kernel: active.Geometry = kernel) -> LookAheadState:
            strategy = LookAhead(loss=loss, kernel=kernel, missing_label=-1, reg=reg)
            return LookAheadState(strategy, x, y, model, sample_weight=WEIGHTS)

        found = state(ridge / state(1.0).ridge)
        assert found.ridge == pytest.approx(ridge, rel=1e-12)
        {"add": lambda s: s.add(6, 2), "remove": lambda s: s.remove(20), "relabel": lambda s: s.relabel(20, 1)}[change](
            found
        )
        expected = phi @ newton(theta, phi, later, ridge, loss).view(5, C)
        torch.testing.assert_close(found.predict(), expected, rtol=1e-8, atol=1e-9)


@losses
@kernels
def test_predicted_change_is_what_a_label_does(loss: active.Loss, kernel: active.Geometry) -> None:
    _, y = pool()
    state = make(loss, kernel, y)
    before, change = state.predict(), state.change(6, 2)
    likely = state.change(6)
    assert torch.equal(state.predict(), before)
    torch.testing.assert_close(likely, state.change(6, int(before[6].argmax())))
    state.add(6, 2)
    torch.testing.assert_close(state.predict() - before, change, rtol=1e-9, atol=1e-12)


EVERY = [objective for rule in RULES.values() for objective in rule]


@losses
@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_scores_are_those_of_a_query(loss: active.Loss, objective: active.Objective) -> None:
    (x, y), model = pool(), network()
    rule = LookAhead(objective, loss, missing_label=-1)
    state = LookAheadState(rule, x, y, model, sample_weight=WEIGHTS)
    for other in (None, network(7)):  # the same again after a refresh
        if other is not None:
            state.add(5, 2)
            state.refresh(model := other)
            y[5] = 2
        numbers, utilities = rule.query(x, y, model, batch_size=2, sample_weight=WEIGHTS, return_utilities=True)
        np.testing.assert_allclose(state.scores(), utilities[0], rtol=1e-10, atol=1e-14)
    if isinstance(loss, active.SquareLoss):  # where the second pick of a batch is what the state says of the first
        state.add(int(numbers[0]), int(state.predict()[numbers[0]].argmax()))
        np.testing.assert_allclose(state.scores(), utilities[1], rtol=1e-10, atol=1e-14)


@losses
@kernels
def test_a_score_is_the_size_of_the_change(loss: active.Loss, kernel: active.Geometry) -> None:
    _, y = pool()
    state = make(loss, kernel, y, objective=active.MostLikelyChange())
    for number, score in enumerate(state.scores()):
        if np.isfinite(score):
            assert float(state.change(number)[state.scene.targets].norm()) == pytest.approx(score, rel=1e-9)


@losses
@kernels
def test_scores_are_of_the_model_that_labels_move(loss: active.Loss, kernel: active.Geometry) -> None:
    """Also where labels have moved the outputs: the size of the change, and its mean over the labels."""
    _, y = pool()
    state = make(loss, kernel, y, objective=active.MostLikelyChange())
    for step in (
        lambda: state.add(5, 2), lambda: state.add(6, 0), lambda: state.remove(8), lambda: state.relabel(20, 1),
    ):  # fmt: skip
        step()
        targets, p = state.scene.targets, loss.probabilities(state.predict())
        likely, mean = state.scores(), state.scores(active.ExpectedChange())
        free = np.flatnonzero(state.labels < 0)
        assert np.isfinite(likely[free]).all()
        for number in free.tolist():
            assert float(state.change(number)[targets].norm()) == pytest.approx(likely[number], rel=1e-9)
            squares = torch.stack([state.change(number, c)[targets].square().sum() for c in range(C)])
            assert float((p[number] * squares).sum().sqrt()) == pytest.approx(mean[number], rel=1e-9)


@losses
@kernels
def test_what_pulls_move_is_the_covariance_times_them(loss: active.Loss, kernel: active.Geometry) -> None:
    _, y = pool()
    state = make(loss, kernel, y)
    some, pulls = torch.tensor([4, 7, 20]), torch.randn(3, C, dtype=torch.float64)
    s = state.posterior.between(torch.arange(N), some)
    full = s if state.posterior.block == C else s * torch.eye(C).double()
    expected = torch.einsum("nmcd,md->nc", full, pulls)
    torch.testing.assert_close(state.posterior.moved(some, pulls), expected, rtol=1e-10, atol=1e-12)


def test_features_are_read_in_strips_and_not_point_by_point(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), reads = pool(), []
    phi = active.Given(FeatureKernel(torch.randn(N, 6, dtype=torch.float64)))
    learned = y.copy()
    y[9], read = 2, FeatureKernel.features
    monkeypatch.setattr(FeatureKernel, "features", lambda *a: (reads.append(1), read(*a))[1])
    state = LookAheadState(LookAhead(kernel=phi, missing_label=-1), x, y, network(), learned=learned)
    reads.clear()
    state.relabel(20, 0)
    assert len(reads) == 2  # of the point, and of all
    reads.clear()
    LookAheadState(LookAhead(kernel=phi, missing_label=-1), x, y, network(), learned=learned)
    assert len(reads) < 6


def test_predictions_of_some_points() -> None:
    _, y = pool()
    state = make(active.CrossEntropy(), active.LastLayer(), y)
    assert torch.equal(state.predict([4, 7, 4]), state.predict()[[4, 7, 4]])
    for numbers, message in (
        ([-1], "got -1"), ([N], "from 0 to 24"), (np.arange(N) < 3, "flatnonzero"), ([0.5, 1.0], "got float64"),
        (torch.arange(N) < 3, "flatnonzero"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            state.predict(numbers)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="strategy: got Margin; expected an object such as LookAhead"):
        LookAheadState(active.Margin(missing_label=-1), pool()[0], y, network())  # pyright: ignore[reportArgumentType]


def test_other_objectives_need_the_same_weights() -> None:
    _, y = pool()
    state = make(active.SquareLoss(), active.LastLayer(), y)
    for objective in EVERY:  # all labels count alike for square loss
        assert np.isfinite(state.scores(objective)[y < 0]).all()
    curved = make(active.CrossEntropy(), active.LastLayer(), y)
    for other in (active.MostLikelyChange(), active.Variance()):
        with pytest.raises(InputError, match="weighs targets or labels in another way"):
            curved.scores(other)
    flat = make(active.CrossEntropy(), active.LastLayer(), y, objective=active.MostLikelyChange())
    assert np.isfinite(flat.scores(active.ExpectedChange())[y < 0]).all()
    # a network that has learned nothing has no labels that could count for more; after a refresh it has
    even = active.IntegratedVariance(curvature=False)
    young = make(active.CrossEntropy(), active.LastLayer(), y, np.full(N, -1), objective=even)
    assert np.isfinite(young.scores(active.MostLikelyChange())[y < 0]).all()
    young.refresh(network(7))
    with pytest.raises(InputError, match="weighs targets or labels in another way"):
        young.scores(active.MostLikelyChange())


def test_refusals_leave_the_state_as_it_was() -> None:
    _, y = pool()
    state = make(active.CrossEntropy(), active.LastLayer(), y)
    before = state.predict()
    for call, message in (
        (lambda: state.add(3, 1), "point 3 has a label already"),
        (lambda: state.change(3), "point 3 has a label already"),
        (lambda: state.add(25, 1), "numbers of points from 0 to 24: got 25"),
        (lambda: state.add(0.5, 1), "got float64"),  # pyright: ignore[reportArgumentType]
        (lambda: state.change(True), "got bool"),
        (lambda: state.add(4, 3), "classes from 0 to 2"),
        (lambda: state.add(4, 1.5), "classes from 0 to 2: got 1.5"),  # pyright: ignore[reportArgumentType]
        (lambda: state.remove(4), "point 4 has no label"),
        (lambda: state.relabel(4, 1), "point 4 has no label"),
        (lambda: state.refresh(nn.Linear(4, 5).double()), "5 outputs, the one before had 3"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert torch.equal(state.predict(), before)
    assert np.array_equal(state.labels, y)


def test_a_warm_start_ends_where_training_from_scratch_does() -> None:
    """Of a linearised network, by gradient descent; it is what a label more does to the state as the ridge vanishes."""
    (x, y), model = pool(), network()
    hidden = torch.cat([model[:2](x), torch.ones(N, 1).double()], 1).detach()
    f0, more, label = model(x).detach(), 6, 2

    def trained(start: Tensor, labels: np.ndarray) -> Tensor:
        known = torch.from_numpy(labels >= 0).nonzero()[:, 0]
        phi, target = hidden[known], torch.eye(C).double()[torch.from_numpy(labels)[known]] - f0[known]
        rate, theta = 1 / float(torch.linalg.matrix_norm(phi, 2)) ** 2, start
        for _ in range(60_000):
            theta = theta - rate * phi.T @ (phi @ theta - target)
        assert float((phi @ theta - target).abs().max()) < 1e-11
        return theta

    nothing = torch.zeros(hidden.shape[1], C, dtype=torch.float64)
    with_more = np.where(np.arange(N) == more, label, y)
    first = trained(nothing, y)
    warm, scratch = trained(first, with_more), trained(nothing, with_more)
    torch.testing.assert_close(hidden @ warm, hidden @ scratch, rtol=1e-8, atol=1e-9)
    last = active.LastLayer()
    strategy = LookAhead(loss=active.SquareLoss(), kernel=last, missing_label=-1, reg=1e-6)
    nobody = np.full(N, -1)  # the network is where training begins: it has learned nothing
    change = LookAheadState(strategy, x, y, model, learned=nobody).change(more, label)
    torch.testing.assert_close(change, hidden @ (warm - first), rtol=1e-3, atol=1e-3)
    larger = LookAhead(loss=active.SquareLoss(), kernel=last, missing_label=-1, reg=1e-1)
    other = LookAheadState(larger, x, y, model, learned=nobody)
    assert float((other.change(more, label) - hidden @ (warm - first)).abs().max()) > 1e-2


@pytest.mark.parametrize("one", [1.0, np.float64(1), np.int64(1), torch.tensor(1)], ids=lambda v: type(v).__name__)
def test_a_class_may_be_any_whole_number(one: object) -> None:
    """As labels come out of an array."""
    _, y = pool()
    plain, other = (make(active.CrossEntropy(), active.LastLayer(), y) for _ in range(2))
    for state, label in ((plain, 1), (other, one)):
        assert state.change(5, label).shape == (N, C)  # pyright: ignore[reportArgumentType]
        state.add(5, label)  # pyright: ignore[reportArgumentType]
        state.relabel(3, label)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(other.predict(), plain.predict(), rtol=0, atol=0)
    assert np.array_equal(other.labels, plain.labels)
