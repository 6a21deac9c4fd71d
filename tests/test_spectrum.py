from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.spectrum import alignment, cka, drift, spectrum
from tests import oracles
from tests.test_direct import Counting, gram, with_spectrum

few = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / torch.linalg.norm(a) / torch.linalg.norm(b))


def centring(examples: int, scalars: int = 1) -> Tensor:
    """H (x) I: takes the mean over the examples out of each scalar."""
    h = torch.eye(examples, dtype=torch.float64) - 1 / examples
    return torch.kron(h, torch.eye(scalars, dtype=torch.float64))


# ---------------------------------------------------------------- spectrum


def test_a_spectrum_written_down():
    got = spectrum(with_spectrum([1.0, 8.0, 4.0, 3.0]))
    assert got.eigenvalues.tolist() == pytest.approx([8.0, 4.0, 3.0, 1.0])
    assert (got.largest, got.smallest) == (pytest.approx(8.0), pytest.approx(1.0))
    assert got.trace == pytest.approx(16.0)
    assert got.condition_number == pytest.approx(8.0)
    assert got.participation_ratio == pytest.approx(16.0**2 / (64 + 16 + 9 + 1))
    shares = [0.5, 0.25, 3 / 16, 1 / 16]
    assert got.entropy_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_flat_and_rank_one():
    flat, one = spectrum(3 * torch.eye(6)), spectrum(torch.ones(6, 6))
    assert (flat.participation_ratio, flat.entropy_rank) == (pytest.approx(6), pytest.approx(6))
    assert (one.participation_ratio, one.entropy_rank) == (pytest.approx(1), pytest.approx(1, abs=1e-5))
    assert flat.condition_number == pytest.approx(1)
    assert one.condition_number == math.inf


@few
@given(n=st.integers(1, 12), p=st.integers(1, 20), scale=st.floats(1e-9, 1e9), seed=SEEDS)
def test_laws_of_effective_ranks(n, p, scale, seed):
    kernel = gram(n, p, seed)
    got, scaled = spectrum(kernel), spectrum(scale * kernel)
    assert 1 - 1e-9 <= got.participation_ratio <= got.entropy_rank + 1e-9 <= min(n, p) + 1e-6
    assert scaled.participation_ratio == pytest.approx(got.participation_ratio)
    assert scaled.entropy_rank == pytest.approx(got.entropy_rank, rel=1e-6)
    assert (got.condition_number == math.inf) == (p < n)
    assert (got.eigenvalues > -got.resolution).all()


def test_float32_noise_is_not_a_condition_number():
    kernel = gram(100, 20).float()
    assert spectrum(kernel).condition_number == math.inf
    assert spectrum(kernel).resolution > 1e-9 * spectrum(kernel).largest


def test_nothing_to_describe():
    with pytest.raises(InputError, match="positive eigenvalue"):
        spectrum(torch.zeros(3, 3))


# ---------------------------------------------------------------- alignment


@few
@given(n=st.integers(2, 9), c=st.integers(1, 4), seed=SEEDS, scale=st.floats(0.01, 100))
def test_alignment_is_its_definition(n, c, seed, scale):
    kernel, y = scale * gram(n, 30, seed), normal(n, c, seed=seed + 1) + 0.5
    h = centring(n)
    got = alignment(kernel, y)
    assert got.plain == pytest.approx(cosine(kernel, y @ y.T), rel=1e-9, abs=1e-12)
    assert got.centred == pytest.approx(cosine(h @ kernel @ h, h @ y @ y.T @ h), rel=1e-9, abs=1e-12)


@few
@given(n=st.integers(2, 7), c=st.integers(2, 4), seed=SEEDS)
def test_alignment_of_a_full_kernel_is_its_definition(n, c, seed):
    kernel, y = gram(n * c, 40, seed), normal(n, c, seed=seed + 1) + 0.5
    flat, h = y.reshape(-1, 1), centring(n, c)
    got = alignment(kernel, y)
    assert got.plain == pytest.approx(cosine(kernel, flat @ flat.T), rel=1e-9, abs=1e-12)
    assert got.centred == pytest.approx(cosine(h @ kernel @ h, h @ flat @ flat.T @ h), rel=1e-9, abs=1e-12)


def test_the_ideal_kernel_is_aligned():
    y = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0, 1, 1]))
    target = (y @ y.T).double()
    assert alignment(target, y).plain == pytest.approx(1)
    assert alignment(target + 5, y).centred == pytest.approx(1)  # a constant feature is no disagreement
    assert alignment(target + 5, y).plain < 0.99
    flat = y.double().reshape(-1, 1)
    assert alignment(flat @ flat.T, y).plain == pytest.approx(1)


def test_alignment_with_a_vector():
    kernel, y = gram(6, 20), normal(6)
    assert alignment(kernel, y) == alignment(kernel.numpy(), y[:, None].numpy())


@pytest.mark.parametrize("c", [2, 3, 5, 7])
def test_rounding_of_constant_targets_is_no_alignment(c):
    """One class, less 1/C: the mean is taken out of numbers that are not exact."""
    for n in (3, 6, 11, 50, 199):
        y = torch.nn.functional.one_hot(torch.zeros(n, dtype=torch.long), c).double() - 1 / c
        for kernel, columns in ((gram(n, 20), y), (gram(n * c, 20), y), (gram(n, 20), y[:, 0])):
            with pytest.raises(InputError, match="once centred, the kernel or the targets are zero"):
                alignment(kernel, columns)


def test_a_constant_column_beside_another_does_not_count():
    kernel, y = gram(50, 20), torch.cat([torch.full((50, 1), 1e6 / 3, dtype=torch.float64), 1e-9 * normal(50, 1)], 1)
    assert alignment(kernel, y).centred == pytest.approx(alignment(kernel, y[:, 1]).centred, rel=1e-9)


# ---------------------------------------------------------------- drift and CKA


@few
@given(n=st.integers(1, 8), m=st.integers(1, 8), seed=SEEDS)
def test_drift_is_its_definition(n, m, seed):
    before, after = normal(n, m, seed=seed), normal(n, m, seed=seed + 1)
    got = drift(before, after)
    assert got.relative_change == pytest.approx(oracles.relative_error(after, before))
    assert got.cosine_distance == pytest.approx(1 - cosine(before, after), abs=1e-12)


def test_drift_of_a_change_of_scale():
    kernel = gram(5, 9)
    got = drift(kernel, 3 * kernel)
    assert got.relative_change == pytest.approx(2)
    assert got.cosine_distance == pytest.approx(0, abs=1e-12)
    assert drift(kernel, kernel).relative_change == 0


@few
@given(n=st.integers(2, 8), scalars=st.integers(1, 3), seed=SEEDS, scale=st.floats(0.01, 100))
def test_cka_is_its_definition(n, scalars, seed, scale):
    left, right = gram(n * scalars, 30, seed), scale * gram(n * scalars, 40, seed + 1)
    h = centring(n, scalars)
    got = cka(left, right, scalars=scalars)
    assert got == pytest.approx(cosine(h @ left @ h, h @ right @ h), rel=1e-9)
    assert -1e-12 <= got <= 1 + 1e-12
    assert cka(right, left, scalars=scalars) == pytest.approx(got)
    assert cka(left, left, scalars=scalars) == pytest.approx(1)


def test_cka_does_not_see_a_shift_of_the_features():
    features = normal(8, 5)
    left, right = ((f @ f.T) for f in (features, features + 100 * normal(5, seed=1)))
    assert cka(left, right) == pytest.approx(1, abs=1e-8)


def test_cka_of_full_kernels_without_coupling_is_that_of_the_reduced():
    left, right = gram(6, 20), gram(6, 20, seed=1)
    identity = torch.eye(3, dtype=torch.float64)
    full = cka(torch.kron(left, identity), torch.kron(right, identity), scalars=3)
    assert full == pytest.approx(cka(left, right))
    assert full != pytest.approx(cka(torch.kron(left, identity), torch.kron(right, identity)), rel=1e-3)


# ---------------------------------------------------------------- by strips, and what is refused


@pytest.mark.parametrize("scalars", [1, 3])
def test_everything_but_the_spectrum_reads_strips_once(scalars):
    n = 1200
    left, right, y = gram(n, 30), gram(n, 40, seed=1), normal(n // scalars, scalars)
    h = centring(n // scalars, scalars)
    a, b, flat = h @ left @ h, h @ right @ h, y.reshape(n, -1)
    expected = {
        "cka": cosine(a, b),
        "alignment": cosine(a, h @ flat @ flat.T @ h),
        "drift": oracles.relative_error(right, left),
    }
    lazy, other = Counting(left), Counting(right)
    got = {
        "cka": cka(lazy, other, scalars=scalars),
        "alignment": alignment(lazy, y).centred,
        "drift": drift(lazy, other).relative_change,
    }
    assert got == pytest.approx(expected, rel=1e-9)
    assert max(lazy.highest, other.highest) <= 1024
    assert (lazy.read, other.read) == (3 * n * n, 2 * n * n)


BAD = gram(5, 9)
BAD[3, 1] = float("nan")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: drift(torch.ones(3, 3), torch.ones(3, 4)), r"shapes \(3, 3\) and \(3, 4\)"),
        (lambda: drift(BAD, BAD), "not finite among rows 0 to 4"),
        (lambda: drift(torch.zeros(3, 3), torch.ones(3, 3)), "one of the kernels is zero"),
        (lambda: drift(torch.zeros(0, 0), torch.zeros(0, 0)), "shapes"),
        (lambda: cka(torch.ones(3, 4), torch.ones(3, 4)), r"square kernel.*\(3, 4\)"),
        (lambda: cka(torch.ones(3, 3), torch.eye(3)), "once centred, a kernel is zero"),
        (lambda: cka(torch.full((17, 17), 0.1, dtype=torch.float64), torch.eye(17)), "once centred, a kernel is zero"),
        (lambda: cka(torch.eye(3), torch.eye(3), scalars=2), "3 rows does not have 2 rows per example"),
        (lambda: cka(torch.eye(3), torch.eye(3), scalars=0), "rows per example"),
        (lambda: cka(BAD, BAD), "not finite"),
        (lambda: alignment(torch.eye(3), torch.ones(4, 2)), r"targets \(4, 2\).*\(3, 3\)"),
        (lambda: alignment(torch.eye(3), torch.ones(3, 1, 1)), "targets"),
        (lambda: alignment(torch.eye(3), torch.tensor([1.0, 2.0, float("nan")])), "targets.*not finite"),
        (lambda: alignment(torch.eye(3), torch.zeros(3)), "the kernel or the targets are zero"),
        (lambda: alignment(torch.eye(3), torch.ones(3)), "once centred, the kernel or the targets are zero"),
        (lambda: alignment(BAD, torch.arange(5)), "not finite"),
        (lambda: alignment(torch.ones(3, 4), torch.ones(3)), "square"),
        (lambda: spectrum(torch.ones(3, 4)), "square"),
        (lambda: spectrum(BAD), "not finite"),
    ],
)
def test_refused(act, words):
    with pytest.raises(InputError, match=words):
        act()
