"""Spectra from products with random vectors: right on average, and their standard errors are believed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import Tensor

import ntkit
from ntkit.errors import InputError, StoreError
from ntkit.kernel.matrixfree import MatrixFreeKernel
from ntkit.solve import checkpoint
from ntkit.solve.ridge import Absolute, Relative
from ntkit.solve.spectrum import spectrum
from ntkit.solve.stochastic import LanczosSpectrum, hutch_plus_plus, lanczos
from tests.cases import normal

N = 40


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(n: int = N, seed: int = 0) -> Tensor:
    """Eigenvalues 1/i^2, as kernels have them, in a random basis."""
    basis = torch.linalg.qr(normal(n, seed=seed)(n).double()).Q
    return basis @ torch.diag(torch.arange(1, n + 1).double().pow(-2)) @ basis.T


def whole(matrix: Tensor) -> LanczosSpectrum:
    """As many steps as rows: the quadrature is exact for each probe."""
    return lanczos(matrix, steps=len(matrix), probes=6, generator=seeded())


@given(st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None)
def test_all_steps_give_the_quadratic_forms_of_each_probe(n: int, seed: int) -> None:
    """For every probe z, the sum of f over the nodes is z^T f(K) z."""
    matrix = decaying(n, seed)
    found = lanczos(matrix, steps=n, probes=3, directions=0, generator=seeded(seed))
    signs = torch.randint(0, 2, (n, 3), generator=seeded(seed)).double() * 2 - 1
    values, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(found.weights.sum(1), torch.full((3,), n).double())
    for f in (torch.sqrt, torch.exp, lambda v: 1 / (v + 0.1)):
        expected = ((vectors.T @ signs).square() * f(values.clamp_min(0))[:, None]).sum(0)
        actual = (found.weights * f(found.nodes.clamp_min(0))).sum(1)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


ESTIMATES: dict[str, tuple[Callable[[LanczosSpectrum], object], Callable[[Tensor], float]]] = {
    "trace": (lambda s: s.trace(), lambda v: float(v.sum())),
    "log-determinant": (lambda s: s.log_determinant(0.01), lambda v: float((v + 0.01).log().sum())),
    "effective dimension": (lambda s: s.effective_dimension(0.01), lambda v: float((v / (v + 0.01)).sum())),
    "participation ratio": (lambda s: s.participation_ratio(), lambda v: float(v.sum() ** 2 / v.square().sum())),
    "entropy rank": (
        lambda s: s.entropy_rank(),
        lambda v: math.exp(float(torch.special.entr(v.clamp_min(0) / v.clamp_min(0).sum()).sum())),
    ),
    "count": (lambda s: s.count_above(0.02), lambda v: float((v > 0.02).sum())),
}


# quotients of sums that random vectors alone see badly are biased
QUOTIENTS = {"participation ratio", "entropy rank"}


@pytest.mark.parametrize(("name", "directions"), [(n, d) for n in ESTIMATES for d in (0, 5) if d or n not in QUOTIENTS])
def test_estimates_are_right_and_so_are_their_errors(name: str, directions: int) -> None:
    """Over 60 seeds: the mean is the truth, and the standard errors are the spread."""
    matrix = decaying()
    of, truth = ESTIMATES[name]
    found = [of(lanczos(matrix, steps=N, probes=10, directions=directions, generator=seeded(i))) for i in range(60)]
    values = torch.tensor([e.value for e in found])  # pyright: ignore[reportAttributeAccessIssue]
    errors = torch.tensor([e.standard_error for e in found])  # pyright: ignore[reportAttributeAccessIssue]
    expected = truth(torch.linalg.eigvalsh(matrix))
    # quotients have a bias of the order of the squared error
    assert (
        abs(float(values.mean()) - expected) < 4 * float(values.std()) / math.sqrt(60) + float(values.var()) / expected
    )
    assert 0.7 < float(errors.square().mean().sqrt() / values.std()) < 1.4


def test_as_the_exact_spectrum() -> None:
    matrix = decaying()
    exact, found = spectrum(matrix), whole(matrix)
    assert found.largest == pytest.approx(exact.largest, rel=1e-8)
    for mine, theirs in (
        (found.participation_ratio(), exact.participation_ratio),
        (found.entropy_rank(), exact.entropy_rank),
    ):
        assert abs(mine.value - theirs) < 5 * mine.standard_error


def test_directions_take_the_noise_away() -> None:
    matrix = decaying(200)
    exact = spectrum(matrix)

    def spread(directions: int) -> float:
        found = [
            lanczos(matrix, steps=20, probes=8, directions=directions, generator=seeded(i)).participation_ratio().value
            for i in range(20)
        ]
        return float((torch.tensor(found) - exact.participation_ratio).square().mean().sqrt())

    assert spread(8) < spread(0) / 10


def test_as_many_directions_as_rows_leave_nothing_to_chance() -> None:
    found = lanczos(decaying(9), steps=9, probes=2, directions=20, generator=seeded())
    exact = spectrum(decaying(9))
    assert found.entropy_rank().value == pytest.approx(exact.entropy_rank, rel=1e-8)
    assert found.trace().standard_error < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_probe_within_the_basis_says_nothing(n: int) -> None:
    found = lanczos(3 * torch.eye(n).double(), generator=seeded())
    assert found.log_determinant().value == pytest.approx(n * math.log(3))
    assert found.log_determinant(Absolute(1.0)).value == pytest.approx(n * math.log(4))


def test_few_steps_find_the_largest_eigenvalue_and_smooth_sums() -> None:
    matrix = decaying(300)
    found = lanczos(matrix, steps=20, probes=4, generator=seeded())
    many = lanczos(matrix, steps=300, probes=4, generator=seeded())
    assert found.largest == pytest.approx(1.0, rel=1e-8)
    assert found.effective_dimension(0.01).value == pytest.approx(many.effective_dimension(0.01).value, rel=1e-3)


@pytest.mark.parametrize("matrix", [torch.eye(7).double(), torch.ones(7, 7).double(), torch.zeros(7, 7).double()])
def test_a_probe_that_has_seen_everything_stands_still(matrix: Tensor) -> None:
    found = lanczos(matrix, steps=7, probes=5, directions=0, generator=seeded())
    assert bool(found.nodes.isfinite().all())
    assert float(found.weights.sum()) == pytest.approx(7 * 5)
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert found.largest == pytest.approx(largest, abs=1e-9)
    if largest == 1:
        assert found.trace().value == pytest.approx(7.0)
        assert found.log_determinant(1.0).value == pytest.approx(7 * math.log(2))


def test_hutch_plus_plus() -> None:
    matrix = decaying(200)
    found = [hutch_plus_plus(matrix, products=30, generator=seeded(i)) for i in range(60)]
    values, errors = (torch.tensor([getattr(e, n) for e in found]) for n in ("value", "standard_error"))
    truth = float(matrix.trace())
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(60)
    assert 0.6 < float(errors.square().mean().sqrt() / values.std()) < 1.5
    # plain random vectors, as many, miss by sqrt(2 (||K||_F^2 - diagonal) / 30)
    plain = math.sqrt(2 * float(matrix.square().sum() - matrix.diagonal().square().sum()) / 30)
    assert float(values.std()) < plain / 4
    low = normal(3)(50).double()
    assert hutch_plus_plus(low @ low.T, products=12, generator=seeded()).value == pytest.approx(
        float(low.square().sum())
    )


def test_of_a_kernel_that_is_never_formed() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).double()
    kernel = MatrixFreeKernel(ntkit.linearize(model), torch.randn(10, 6).double())
    dense = kernel.dense()
    found = lanczos(kernel, steps=30, probes=8, generator=seeded())
    exact = torch.linalg.slogdet(dense + 0.1 * torch.eye(30).double())[1]
    estimate = found.log_determinant(0.1)
    assert abs(estimate.value - float(exact)) < 5 * estimate.standard_error
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]))
    top = eigsh(kernel.to_scipy(), 3, return_eigenvectors=False)
    torch.testing.assert_close(torch.tensor(sorted(top)), torch.linalg.eigvalsh(dense)[-3:])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("directions", [0, 4])
def test_a_stopped_run_goes_on(directions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    taken: list[int] = []

    class Counting(ntkit.DenseKernel):
        def __matmul__(self, other: Tensor) -> Tensor:
            taken.append(other.shape[1])
            return super().__matmul__(other)

    def run(matrix: Tensor, file: Path | None, seed: int = 0, steps: int = 12, stop: int = 99) -> LanczosSpectrum:
        def progress(done: int, _: int) -> None:
            if done == stop:
                raise Stopped

        return lanczos(
            Counting(matrix), steps=steps, probes=3, directions=directions, generator=seeded(seed), checkpoint=file,
            progress=progress,
        )  # fmt: skip

    whole, file = run(decaying(), None), tmp_path / "state"
    with pytest.raises(Stopped):
        run(decaying(), file, stop=7)
    taken.clear()
    before = file.read_bytes()
    for changed in ({"seed": 1}, {"steps": 13}):
        with pytest.raises(StoreError, match="another seed, number of vectors or number of steps"):
            run(decaying(), file, **changed)
    with pytest.raises(StoreError, match="another kernel"):
        run(decaying(seed=1), file)
    assert file.read_bytes() == before
    again = run(decaying(), file)
    assert taken == [directions + 3] * 5
    assert torch.equal(again.nodes, whole.nodes)
    assert torch.equal(again.weights, whole.weights)
    taken.clear()
    assert torch.equal(run(decaying(), file).nodes, whole.nodes)  # it was finished
    assert not taken


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: lanczos(torch.ones(3, 4), generator=seeded()), "square kernel"),
        (lambda: lanczos(torch.eye(3), steps=0, generator=seeded()), "at least one step"),
        (lambda: lanczos(torch.eye(3), probes=0, generator=seeded()), "at least one step and one probe"),
        (lambda: lanczos(torch.eye(3) * torch.nan, generator=seeded()), "not finite"),
        (lambda: hutch_plus_plus(torch.eye(3), products=5, generator=seeded()), "at least 6"),
        (lambda: whole(torch.zeros(3, 3)).log_determinant(), "larger ridge"),
        (lambda: whole(torch.eye(3)).effective_dimension(0.0), "positive absolute ridge"),
        (lambda: whole(torch.eye(3)).log_determinant(Relative(0.1)), "positive absolute ridge"),
        (lambda: whole(torch.zeros(3, 3)).entropy_rank(), "no rank"),
        (lambda: whole(torch.zeros(3, 3)).participation_ratio(), "no rank"),
        (lambda: lanczos(normal(9)(9), generator=seeded()), "not symmetric"),
        (lambda: hutch_plus_plus(normal(9)(9), generator=seeded()), "not symmetric"),
    ],
)
def test_refusals(do: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        do()
