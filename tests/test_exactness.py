"""The kernel of every case, by every read-out, against the double loop of autograd."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import SlowRouteWarning
from tests import oracles
from tests.cases import CASES, Case

# Said once per process, and only of the kernels that it concerns.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Problem:
    """A case at work: five examples for the rows, three for the columns, and the rows of both Jacobians."""

    case: Case
    model: nn.Module
    x1: Any
    x2: Any
    rows: Tensor
    cols: Tensor
    c: int

    def kernel(self, x1: Any, x2: Any = None, *, readout: Any = None, trace: bool = False) -> Tensor:
        """The library's kernel; it must say so if, and only if, it is slow, and leave everything as it was."""
        if readout is None:
            readout = ntkit.Logits(select=self.case.select)
        before, data = oracles.snapshot(self.model), copy.deepcopy((x1, x2))
        with announced(slow=self.case.slow_route):
            kernel = ntkit.empirical_ntk(
                self.model, x1, x2, readout=readout, trace=trace, parameters=self.case.parameters
            )
        after = oracles.snapshot(self.model)
        for aspect, value in before.items():
            assert after[aspect] == value, f"the model's {aspect} changed"
        assert same((x1, x2), data), "the data changed"
        assert kernel.dtype == torch.float64
        assert not kernel.requires_grad
        return kernel


@contextlib.contextmanager
def announced(*, slow: bool | None) -> Iterator[None]:
    if slow is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowRouteWarning)
            yield
    elif slow:
        with pytest.warns(SlowRouteWarning):
            yield
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowRouteWarning)
            yield


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b


def split(x: Any, first: int = 0) -> tuple[Any, Any]:
    """Five examples for the rows and the next three for the columns."""
    return oracles.take(x, slice(first, first + 5)), oracles.take(x, slice(first + 5, first + 8))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def problem(request: pytest.FixtureRequest) -> Problem:
    case: Case = request.param
    model, (x1, x2) = case.build(), split(case.data(8))
    rows = oracles.jacobian_rows(model, x1, case.scalars, case.chosen(model))
    cols = oracles.jacobian_rows(model, x2, case.scalars, case.chosen(model))
    return Problem(case, model, x1, x2, rows, cols, len(rows) // 5)


def test_full(problem: Problem) -> None:
    got = problem.kernel(problem.x1, problem.x2)
    assert oracles.relative_error(got, problem.rows @ problem.cols.T) <= TOLERANCE


def test_full_symmetric(problem: Problem) -> None:
    got = problem.kernel(problem.x1)
    assert oracles.relative_error(got, problem.rows @ problem.rows.T) <= TOLERANCE
    assert oracles.relative_error(got, got.T) <= 1e-14


def test_trace(problem: Problem) -> None:
    got = problem.kernel(problem.x1, problem.x2, trace=True)
    assert oracles.relative_error(got, oracles.trace_kernel(problem.rows @ problem.cols.T, problem.c)) <= TOLERANCE


def test_sum_of_logits(problem: Problem) -> None:
    got = problem.kernel(problem.x1, problem.x2, readout=ntkit.SumOfLogits(select=problem.case.select))
    assert oracles.relative_error(got, oracles.pntk(problem.rows @ problem.cols.T, problem.c)) <= TOLERANCE


def test_single_logit_of_one_example(problem: Problem) -> None:
    """One column only: a batch of one must not be taken for something to broadcast."""
    index, one = problem.c - 1, oracles.take(problem.x2, slice(0, 1))
    got = problem.kernel(problem.x1, one, readout=ntkit.SingleLogit(index, select=problem.case.select))
    truth = problem.rows @ problem.cols[: problem.c].T
    assert oracles.relative_error(got, oracles.single_logit(truth, problem.c, index)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore::ntkit.errors.SlowRouteWarning")
@pytest.mark.parametrize("draw", range(16))
@pytest.mark.parametrize("name", ["exotic/routed_tokens", "exotic/masked_examples"])
def test_data_dependent_paths(name: str, draw: int) -> None:
    """What runs, and on how many rows, depends on the values of a batch: right for one draw proves little."""
    case = next(case for case in CASES if case.name == name)
    model, (x1, x2) = case.build(), split(case.data(16 * 8), first=draw * 8)
    got = ntkit.empirical_ntk(model, x1, x2, readout=ntkit.Logits(select=case.select))
    truth = oracles.entk(model, x1, x2, case.scalars, case.chosen(model))
    assert oracles.relative_error(got, truth) <= TOLERANCE
