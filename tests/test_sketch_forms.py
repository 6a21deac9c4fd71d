"""The forms of a sketch that the benchmark compares are what they are called, and none is off on average."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ntkit
from benchmarks.scale import sketch_forms as forms
from ntkit.tangent.derivatives import Derivatives
from ntkit.tangent.factors import Outer
from tests.cases import normal

SIZE, N = 24, 5


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    """The benchmark draws its maps in the default type."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def derivatives() -> Derivatives:
    """A convolution with several positions and a linear layer, both larger than the sketch, and small biases."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(45, 4)).double()
    tangent = ntkit.linearize(model, readout=ntkit.SumOfLogits())
    return tangent.derivatives(tangent.examples(normal(2, 5, 5)(N).double()))


def parts() -> list[tuple[Outer, Tensor]]:
    """The large parts as sums over positions, and as gradients (n, o, i)."""
    small, large = forms.cut(derivatives(), SIZE)
    assert (len(small.factors), len(large.factors)) == (2, 2)
    unfolded = [forms.outer(factor) for factor in large.factors.values()]
    return [(each, each.rows()[:, 0].flatten(2)) for each in unfolded]


def test_products_are_those_of_the_gradient_with_two_projections() -> None:
    for factor, gradient in parts():
        _, o, i = gradient.shape
        generator, again = (torch.Generator().manual_seed(3) for _ in range(2))
        found = forms.product(3, size=SIZE)(factor, generator)
        left, right = forms.gaussian(o, 3, again), forms.gaussian(i, 8, again)
        torch.testing.assert_close(found.view(N, 3, 8), left.T @ gradient @ right)


def test_a_side_that_is_no_longer_is_kept_whole() -> None:
    assert forms.split_of(64, 512, 4608, 4096) == (64, 64)
    assert forms.split_of(128, 64, 576, 4096) == (64, 64)
    assert forms.split_of(16, 64, 100, 4096) == (16, 100)
    factor, gradient = parts()[0]
    found = forms.product(5, size=5 * 18)(factor, torch.Generator())  # 5 outputs, 18 inputs
    torch.testing.assert_close(found.view(N, 5, 18), gradient)


def test_tensor_sketch_puts_every_entry_where_its_two_counts_say() -> None:
    for factor, gradient in parts():
        found = forms.tensor_sketch(SIZE)(factor, torch.Generator().manual_seed(4))
        generator = torch.Generator().manual_seed(4)
        (h, s), (k, r) = (forms.drawn_counts(length, SIZE, generator) for length in gradient.shape[1:])
        expected = torch.zeros(N, SIZE, dtype=torch.float64)
        for o in range(len(h)):
            for i in range(len(k)):
                expected[:, (h[o] + k[i]) % SIZE] += s[o] * r[i] * gradient[:, o, i]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "form", [forms.product(4, size=SIZE), forms.product(4, forms.signs, SIZE), forms.tensor_sketch(SIZE)]
)
def test_the_mean_over_maps_is_the_exact_kernel(form: forms.Form) -> None:
    found = derivatives()
    exact = found.gram(found)
    kernels = torch.stack([phi @ phi.T for phi in forms.features(form, found, 400, SIZE)])
    scale = kernels.std(0) / math.sqrt(len(kernels))
    assert float(((kernels.mean(0) - exact) / scale).abs().max()) < 4


def test_dense_maps_have_the_error_of_their_formula() -> None:
    found = derivatives()
    exact = found.gram(found)
    measured = forms.errors(forms.dense(exact, 300, SIZE), exact)
    assert measured["error"] == pytest.approx(forms.expected_dense(exact, SIZE), abs=4 * measured["standard_error"])
    assert measured["standard_error"] < 0.1 * measured["error"]
    # by hand, from the second moments of a Gaussian map
    diagonal = exact.diagonal()
    by_hand = ((diagonal[:, None] * diagonal + exact**2).sum() / SIZE).sqrt() / exact.square().sum().sqrt()
    assert forms.expected_dense(exact, SIZE) == pytest.approx(float(by_hand))


def test_the_standard_error_is_that_of_the_root() -> None:
    """Two maps that miss a kernel of one entry by 3 and by 1: d sqrt(m) = dm / (2 sqrt(m))."""
    found = forms.errors([torch.tensor([[2.0]]), torch.tensor([[2.0**0.5]])], torch.tensor([[1.0]]))
    assert found["error"] == pytest.approx(5**0.5)
    assert found["standard_error"] == pytest.approx(4 / (2 * 5**0.5))


def test_work_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        forms, "cut", lambda found: (found, Derivatives(found.outputs, dict(list(found.factors.items())[:1])))
    )
    work = forms.mflop(derivatives())  # 9 positions of 18 inputs and 5 outputs
    assert work["ours"] == pytest.approx(2 * (9 + 1) * 90 / 1e6)
    assert work["product 64 x 64"] == pytest.approx(2 * 9 * 5 * 18 / 1e6)
    transform = 2.5 * 4096 * 12
    assert work["TensorSketch"] == pytest.approx(9 * (2 * 23 + 2 * transform + 4 * 4096) / 1e6)


def test_gradients_of_rank_one_are_told() -> None:
    g, a = torch.randn(3, 1, 1, 1, 80), torch.randn(3, 1, 1, 80)
    part = next(iter(derivatives().factors))
    one = Derivatives(torch.zeros(3, 1), {part: Outer(a, g, (80, 80))})
    assert forms.leading_share(one) == pytest.approx(1)
    two = Derivatives(
        torch.zeros(3, 1),
        {part: Outer(torch.eye(80)[:2].expand(3, 1, 2, 80), torch.eye(80)[:2].expand(3, 1, 1, 2, 80), (80, 80))},
    )
    assert forms.leading_share(two) == pytest.approx(0.5)
