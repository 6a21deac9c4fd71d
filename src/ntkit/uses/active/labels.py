"""Labels as users keep them, and as we do: classes, with -1 where there is none."""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError


def as_labels(y: Any, n: int, missing: float | None) -> Tensor:
    """Classes (n,), -1 for points without a label.

    Args:
        y: n classes, numbers from 0 on; `missing` where there is none.
        n: number of points.
        missing: NaN, None, or a number that is no class.

    Raises:
        InputError: if there are not n, or one is no class.
    """
    values = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if values.shape != (n,):
        raise InputError(f"y has one label for each of the {n} points: got shape {values.shape}")
    if values.dtype == object:
        values = np.array([np.nan if v is None or v is missing else v for v in values], dtype=object)
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"labels are classes 0, 1, 2, ...: got {values.dtype} ({error})") from error
    absent = np.isnan(numbers)
    if missing is not None:
        absent |= numbers == missing
    known = numbers[~absent]
    if len(known) and (not np.isfinite(known).all() or (known != np.floor(known)).any() or known.min() < 0):
        bad = known[(known != np.floor(known)) | (known < 0) | ~np.isfinite(known)][0]
        raise InputError(
            f"labels are classes 0, 1, 2, ..., or {missing} where there is none: got {bad:g}. If that stands for a "
            f"missing label, say missing_label={bad:g}"
        )
    return torch.from_numpy(np.where(absent, -1.0, numbers)).long()


def as_numbers(values: Any, n: int, what: str = "points", *, twice: bool = False) -> Tensor:
    """Numbers of points, in the order that they were given in.

    Args:
        values: whole numbers; a mask or fractions would be others than those that are meant.
        n: number of points.
        what: they are, for messages.
        twice: whether one may stand there twice.

    Raises:
        InputError: if they are no whole numbers from 0 to n - 1, or one stands twice.
    """
    given = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    expected = f"{what} are numbers of points from 0 to {n - 1}"
    if given.ndim != 1 or not (np.issubdtype(given.dtype, np.integer) or given.size == 0):
        mask = ": take np.flatnonzero(mask)" if given.dtype == bool else ""
        raise InputError(f"{expected}: got {given.dtype} of shape {given.shape}{mask}")
    numbers = given.astype(np.int64)
    bad = numbers[(numbers < 0) | (numbers >= n)]
    if len(bad):
        raise InputError(f"{expected}: got {bad[0]}")
    if not twice and len(np.unique(numbers)) < len(numbers):
        found, counts = np.unique(numbers, return_counts=True)
        raise InputError(f"{what} are different numbers of points: {found[counts > 1][0]} stands twice")
    return torch.from_numpy(numbers)


def as_count(value: Any, what: str, least: int = 1) -> int:
    """How many, as a plain int; integers of numpy and torch are taken.

    Args:
        value: a whole number; 2.0 is none, since a slice would not take it either.
        what: it counts, for messages.
        least: smallest that makes sense.

    Raises:
        InputError: if it is no whole number, or smaller.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if found < least:
        raise InputError(f"{what}: got {value!r}, expected a whole number of at least {least}")
    return found


def as_candidates(candidates: Any, labels: Tensor, size: int) -> Tensor:
    """Numbers of the points that may be chosen, in rising order.

    Raises:
        InputError: if they are no numbers of points, have labels, stand twice, or are fewer than asked for.
    """
    if candidates is None:
        found = (labels < 0).nonzero()[:, 0]
    else:
        found = as_numbers(candidates, len(labels), "candidates").sort().values
        if bool((labels[found] >= 0).any()):
            raise InputError(f"point {int(found[labels[found] >= 0][0])} has a label already: it is no candidate")
    if size > len(found):
        raise InputError(f"{size} points are asked for, {len(found)} are left without a label")
    return found


def as_weights(values: Any, n: int) -> Tensor:
    """Weights of n labels.

    Raises:
        InputError: if there are not n, or one is not positive.
    """
    weights = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    if weights.shape != (n,) or not bool((weights > 0).all()) or not bool(weights.isfinite().all()):
        raise InputError(f"sample_weight has {n} positive numbers: got shape {tuple(weights.shape)}")
    return weights


def draw(seed: int, labels: Tensor) -> int:
    """A seed that follows from the labels so far, so that a resumed session draws what an unbroken one does."""
    digest = hashlib.sha256(f"{seed}".encode() + labels.numpy().tobytes()).digest()
    return int.from_bytes(digest[:7], "big")
