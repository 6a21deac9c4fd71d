"""Errors keep what they carry, also on the way back from a worker process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from ntkit import errors


def test_the_indefinite_kernel_survives_pickling() -> None:
    error = errors.NotPositiveDefiniteError("no", smallest_eigenvalue=-1e-3, suggested_ridge=2e-3)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "no"
    assert (copy.smallest_eigenvalue, copy.suggested_ridge) == (-1e-3, 2e-3)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.InputError, ValueError),
        (errors.ModelError, ValueError),
        (errors.NotPositiveDefiniteError, np.linalg.LinAlgError),
    ],
)
def test_errors_are_also_what_callers_already_catch(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, errors.NtkitError)
    assert issubclass(error, builtin)


@pytest.mark.parametrize("warning", [errors.SlowRouteWarning, errors.FidelityWarning])
def test_warnings_are_shown_to_users_by_default(warning: type[Warning]) -> None:
    assert issubclass(warning, UserWarning)
