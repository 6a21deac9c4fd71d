"""The state of a pool: whatever the order of labels, that of a fresh start; and ridge regression by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError
from ntkit.uses import active
from ntkit.uses.active import LookAhead
from ntkit.uses.active.state import LookAheadState

N, C = 25, 3
losses = pytest.mark.parametrize("loss", [active.SquareLoss(), active.CrossEntropy()], ids=["square", "cross-entropy"])
KERNELS = {
    "features": active.LastLayer(),
    "matrix": active.Exact(),
    "coupled features": active.Sketched(2048, coupled=True),  # more than parameters: exact
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


def make(loss: active.Loss, kernel: active.Geometry, y: np.ndarray, **options: object) -> LookAheadState:
    x, _ = pool()
    targets = list(range(0, N, 2))  # fixed, so that states with other labels have the same
    strategy = LookAhead(loss=loss, kernel=kernel, missing_label=-1, targets=targets, **options)  # pyright: ignore
    return LookAheadState(strategy, x, y, network(), sample_weight=np.linspace(0.5, 2, N))


def same(found: LookAheadState, fresh: LookAheadState, error: float = 1e-8) -> None:
    for mine, true in (
        (found.predict(), fresh.predict()),
        (found.posterior.own, fresh.posterior.own),
        (found.posterior.shared, fresh.posterior.shared),
    ):
        assert float((mine - true).abs().max()) <= error * float(true.abs().max())
    free = found.labels < 0
    assert np.array_equal(found.labels, fresh.labels)
    np.testing.assert_allclose(found.scores()[free], fresh.scores()[free], rtol=1e-6)
    assert np.isnan(found.scores()[~free]).all()


@pytest.fixture(autouse=True)
def one_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ridge is relative to the labels so far; states with other labels are compared at one and the same."""
    monkeypatch.setattr("ntkit.uses.active.lookahead.scale", lambda *_: 2.0)


@losses
@kernels
def test_labels_in_any_order_equal_a_fresh_start(loss: active.Loss, kernel: active.Geometry) -> None:
    _, y = pool()
    state = make(loss, kernel, y)
    state.add(5, 2)
    state.remove(8)
    state.relabel(20, 0)
    state.add(8, 0)
    state.add(9, 1)
    state.relabel(9, 2)
    state.remove(5)
    later = y.copy()
    later[[8, 20, 9]] = [0, 0, 2]
    same(state, make(loss, kernel, later))


@losses
def test_two_hundred_changes(loss: active.Loss) -> None:
    _, y = pool()
    state, now, draw = make(loss, active.LastLayer(), y), y.copy(), np.random.default_rng(0)
    for _ in range(200):
        number, label = int(draw.integers(N)), int(draw.integers(C))
        if now[number] < 0:
            state.add(number, label)
            now[number] = label
        elif draw.random() < 0.5:
            state.remove(number)
            now[number] = -1
        else:
            state.relabel(number, label)
            now[number] = label
    same(state, make(loss, active.LastLayer(), now))


def test_square_loss_is_ridge_regression_around_the_network() -> None:
    (x, y), model = pool(), network()
    state = make(active.SquareLoss(), active.Exact(coupled=True), y)
    theta = ntkit.empirical_ntk(model, x).detach()
    f0, known = model(x).detach(), (y >= 0).nonzero()[0]
    rows = torch.tensor([i * C + c for i in known for c in range(C)])
    noise = torch.diag(2.0 * 0.1 / torch.from_numpy(np.linspace(0.5, 2, N))[known].repeat_interleave(C))
    gap = (torch.eye(C).double()[y[known]] - f0[known]).reshape(-1)
    expected = f0.reshape(-1) + theta[:, rows] @ torch.linalg.solve(theta[rows][:, rows] + noise, gap)
    torch.testing.assert_close(state.predict().reshape(-1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.predict([4, 7]), expected.view(N, C)[[4, 7]], rtol=1e-9, atol=1e-9)


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


@losses
def test_scores_are_those_of_a_query(loss: active.Loss) -> None:
    (x, y), model = pool(), network()
    rule = LookAhead(loss=loss, missing_label=-1)
    state = LookAheadState(rule, x, y, model)
    _, utilities = rule.query(x, y, model, return_utilities=True)
    np.testing.assert_allclose(state.scores(), utilities[0], rtol=1e-9)
    state.refresh(network(7))
    _, utilities = rule.query(x, y, network(7), return_utilities=True)
    np.testing.assert_allclose(state.scores(), utilities[0], rtol=1e-9)


def test_other_objectives_need_the_same_weights() -> None:
    _, y = pool()
    state = make(active.SquareLoss(), active.LastLayer(), y)
    assert np.isfinite(state.scores(active.Variance())[y < 0]).all()
    curved = make(active.CrossEntropy(), active.LastLayer(), y)
    with pytest.raises(InputError, match="weighs targets or labels in another way"):
        curved.scores(active.MostLikelyChange())
    flat = make(active.CrossEntropy(), active.LastLayer(), y, objective=active.MostLikelyChange())
    assert np.isfinite(flat.scores(active.ExpectedChange())[y < 0]).all()


def test_refusals_leave_the_state_as_it_was() -> None:
    _, y = pool()
    state = make(active.CrossEntropy(), active.LastLayer(), y)
    before = state.predict()
    for call, message in (
        (lambda: state.add(3, 1), "point 3 has a label already"),
        (lambda: state.change(3), "point 3 has a label already"),
        (lambda: state.add(25, 1), "numbers from 0 to 24"),
        (lambda: state.add(4, 3), "classes from 0 to 2"),
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
    change = LookAheadState(strategy, x, y, model).change(more, label)
    torch.testing.assert_close(change, hidden @ (warm - first), rtol=1e-3, atol=1e-3)
    other = LookAheadState(LookAhead(loss=active.SquareLoss(), kernel=last, missing_label=-1, reg=1e-1), x, y, model)
    assert float((other.change(more, label) - hidden @ (warm - first)).abs().max()) > 1e-2
