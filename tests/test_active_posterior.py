"""The posterior of labels against plain dense algebra and brute-force refits, in both forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.features import FeatureKernel
from ntkit.uses.active.posterior import FeaturePosterior, KernelPosterior, Posterior

N, D, RIDGE = 23, 40, 4.0
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Posterior]


def by_kernel(phi: Tensor, labelled: Tensor, precision: Tensor, weights: Tensor) -> Posterior:
    return KernelPosterior(phi @ phi.T, labelled, precision, weights, RIDGE)


def by_features(phi: Tensor, labelled: Tensor, precision: Tensor, weights: Tensor) -> Posterior:
    return FeaturePosterior(FeatureKernel(phi), labelled, precision, weights, RIDGE)


FORMS = {"kernel": by_kernel, "features": by_features}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
blocks = pytest.mark.parametrize("c", [1, 3])


def psd(n: int, c: int, rank: int) -> Tensor:
    a = torch.randn(n, c, rank, dtype=torch.float64)
    return a @ a.transpose(1, 2) / rank


def problem(c: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, labelled points, precisions and target weights, both of less than full rank where c > 1."""
    torch.manual_seed(seed)
    phi = torch.randn(N * c, D, dtype=torch.float64)
    precision, weights = psd(N, c, max(1, c - 1)), psd(N, c, max(1, c - 1))
    weights[::4] = 0  # no targets
    return phi, torch.tensor([3, 7, 8, 20]), precision, weights


def dense(phi: Tensor, labelled: list[int], precision: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s as (N, N, c, c), own and shared, from the definition."""
    c = precision.shape[1]
    p = torch.eye(D, dtype=torch.float64) * RIDGE
    for i in labelled:
        rows = phi[i * c : (i + 1) * c]
        p = p + rows.T @ precision[i] @ rows
    s = (phi @ torch.linalg.inv(p) @ phi.T).view(N, c, N, c).transpose(1, 2)
    own = torch.stack([s[i, i] for i in range(N)])
    shared = torch.stack([sum(s[x, u] @ weights[u] @ s[u, x] for u in range(N)) for x in range(N)])  # pyright: ignore
    return s, own, shared


def check(found: Posterior, s: Tensor, own: Tensor, shared: Tensor, error: float = 1e-10) -> None:
    every = torch.arange(N)
    for mine, true in ((found.between(every, every), s), (found.own, own), (found.shared, shared)):
        assert float((mine - true).abs().max()) <= error * float(true.abs().max())


@forms
@blocks
def test_the_condition_is_told_from_below(form: Form, c: int) -> None:
    phi, labelled, precision, weights = problem(c)
    for scale in (1.0, 1e3):  # one labelled point that is much longer than the others
        long = phi.clone()
        long[7 * c : 8 * c] *= scale
        moments = RIDGE * torch.eye(D, dtype=torch.float64)
        for i in labelled.tolist():
            rows = long[i * c : (i + 1) * c]
            moments += rows.T @ precision[i] @ rows
        true = float(torch.linalg.cond(moments))
        found = form(long, labelled, precision, weights).condition
        assert 1 < found <= true * (1 + 1e-9)
        assert found > (1e4 if scale > 1 else 1)


@forms
@blocks
def test_definition(form: Form, c: int) -> None:
    phi, labelled, precision, weights = problem(c)
    check(form(phi, labelled, precision, weights), *dense(phi, labelled.tolist(), precision, weights))


@forms
@blocks
def test_no_labels_yet(form: Form, c: int) -> None:
    phi, _, precision, weights = problem(c)
    none = torch.tensor([], dtype=torch.int64)
    check(form(phi, none, precision, weights), *dense(phi, [], precision, weights))


@forms
@blocks
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_labels_that_come_and_go_equal_a_fresh_start(form: Form, c: int, data: st.DataObject) -> None:
    phi, labelled, precision, weights = problem(c)
    found, now = form(phi, labelled, precision, weights), labelled.tolist()
    for _ in range(data.draw(st.integers(1, 12))):
        if now and data.draw(st.booleans()):
            out = data.draw(st.sampled_from(now))
            found.remove(out)
            now.remove(out)
        else:
            new = data.draw(st.integers(0, N - 1))  # a label may be bought twice
            found.add(new)
            now.append(new)
    check(found, *dense(phi, now, precision, weights), 1e-8)


@forms
@blocks
def test_two_hundred_changes(form: Form, c: int) -> None:
    phi, labelled, precision, weights = problem(c)
    found, now = form(phi, labelled, precision, weights), labelled.tolist()
    draw = torch.Generator().manual_seed(1)
    for _ in range(200):
        number = int(torch.randint(N, (1,), generator=draw))
        if number in now:
            found.remove(number)
            now.remove(number)
        else:
            found.add(number)
            now.append(number)
    check(found, *dense(phi, now, precision, weights), 1e-8)


def refit(phi: Tensor, labelled: list[int], weights: list[float], y: Tensor, prior: Tensor) -> Tensor:
    """Weighted ridge regression around a prior on single outputs each: predictions at all points, (N*c, R)."""
    rows, k = torch.tensor(labelled), phi @ phi.T
    noise = torch.diag(RIDGE / torch.tensor(weights, dtype=torch.float64))
    return prior + k[:, rows] @ torch.linalg.solve(k[rows][:, rows] + noise, (y - prior)[rows])


@forms
@pytest.mark.parametrize("removed", [False, True])
def test_look_ahead_is_a_refit_for_square_loss(form: Form, removed: bool) -> None:
    phi, labelled, precision, weights = problem(1)
    y, prior = (torch.randn(N, 4, dtype=torch.float64) for _ in range(2))
    w = precision.flatten().tolist()
    now = labelled.tolist()
    before = refit(phi, now, [w[i] for i in now], y, prior)
    number = 8 if removed else 11
    after = [i for i in now if i != 8] if removed else [*now, 11]
    expected = refit(phi, after, [w[i] for i in after], y, prior)
    found = form(phi, labelled, precision, weights)
    misfit = w[number] * (y[number] - before[number])
    response = found.response(number, removed=removed)
    torch.testing.assert_close(before + response[:, 0] * misfit, expected, rtol=1e-9, atol=1e-9)
    again = found.remove(number) if removed else found.add(number)
    torch.testing.assert_close(again, response, rtol=0, atol=0)


@forms
def test_look_ahead_is_a_refit_with_the_full_kernel(form: Form) -> None:
    c = 3
    phi, labelled, _, weights = problem(c)
    precision = torch.eye(c, dtype=torch.float64).expand(N, c, c) * torch.rand(N, 1, 1, dtype=torch.float64)
    y, prior = (torch.randn(N * c, 1, dtype=torch.float64) for _ in range(2))

    def fit(numbers: list[int]) -> Tensor:
        rows = [i * c + k for i in numbers for k in range(c)]
        return refit(phi, rows, [float(precision[i // c, 0, 0]) for i in rows], y, prior)

    before, expected = fit(labelled.tolist()), fit([*labelled.tolist(), 11])
    misfit = precision[11] @ (y - before)[11 * c : 12 * c]
    found = before.view(N, c, 1) + form(phi, labelled, precision, weights).response(11) @ misfit
    torch.testing.assert_close(found.reshape(-1, 1), expected, rtol=1e-9, atol=1e-9)


@forms
@pytest.mark.parametrize("coupled", [False, True])
def test_cross_entropy_look_ahead_is_a_newton_step(form: Form, coupled: bool) -> None:
    """Of the new label's loss plus the quadratic that the labels so far have left around the present outputs.

    With one kernel for all outputs, each output has parameters of its own and the curvature is one number, its trace.
    """
    outputs, c = 3, 3 if coupled else 1
    phi, labelled, _, weights = problem(c)
    p = torch.randn(N, outputs, dtype=torch.float64).softmax(1)
    full = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    one = 1 - p.square().sum(1)
    eye = torch.eye(outputs, dtype=torch.float64)
    rows = phi.view(N, c, D) if coupled else torch.einsum("nd,ij->nijd", phi, eye).reshape(N, outputs, outputs * D)
    curvature = full if coupled else one[:, None, None] * eye
    hessian = RIDGE * torch.eye(rows.shape[2], dtype=torch.float64)
    for i in [*labelled.tolist(), 11]:
        hessian = hessian + rows[i].T @ curvature[i] @ rows[i]
    misfit = eye[1] - p[11]
    step = rows @ torch.linalg.solve(hessian, rows[11].T @ misfit)
    response = form(phi, labelled, full if coupled else one[:, None, None], weights).response(11)
    found = response @ misfit if coupled else response[:, 0] * misfit
    torch.testing.assert_close(found, step, rtol=1e-9, atol=1e-9)


@blocks
def test_strips_and_types(c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    phi, labelled, precision, weights = problem(c)
    whole = by_features(phi, labelled, precision, weights)
    monkeypatch.setattr("ntkit.uses.active.posterior.STRIP", 8 * D * c * 5)
    cut = by_features(phi, labelled, precision, weights)
    torch.testing.assert_close(cut.shared, whole.shared, rtol=1e-12, atol=0)
    torch.testing.assert_close(cut.response(5), whole.response(5), rtol=1e-12, atol=1e-14)
    for dtype, error in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        less = by_features(phi.to(dtype), labelled, precision, weights)
        assert float((less.shared - whole.shared).norm() / whole.shared.norm()) < error


@forms
def test_what_is_not_there_cannot_be_taken_off(form: Form) -> None:
    phi, labelled, precision, weights = problem(1)
    posterior = form(phi, labelled, 100 * precision, weights)
    with pytest.raises(InputError, match="no label that could be taken off"):
        posterior.remove(11)


def test_refusals() -> None:
    phi, labelled, precision, weights = problem(1)
    broken = phi.clone()
    broken[5, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        by_features(broken, labelled, precision, weights)
    with pytest.raises(InputError, match="lost in the rounding"):
        FeaturePosterior(FeatureKernel(phi), labelled, precision, weights, 1e-20)
    with pytest.raises(InputError, match="not positive semidefinite"):
        KernelPosterior(-phi @ phi.T, labelled, precision, weights, RIDGE)
