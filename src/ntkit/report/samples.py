"""Samples from files: an array of an `.npz` file, or the numbers of a `.csv` file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.report.inputs import load_examples
from ntkit.report.tables import is_number, read_table


def load_sample(path: Path, name: str | None, dtype: torch.dtype) -> Tensor:
    """One sample, (N, ...).

    Args:
        path: `.npz` with the array `name` (by default x_train or x), or `.csv` with a line for each example; a first
            line of words names the columns.
        name: of the array.
        dtype: of the numbers.

    Raises:
        InputError: if there is no such file or array, or it does not hold finite numbers.
    """
    if path.suffix == ".csv":
        if name is not None:
            raise InputError(f"{path} is a .csv file, which has no arrays: leave --array out")
        return _table(path, dtype)
    x = load_examples(path, name, dtype)
    if not x.is_floating_point():
        raise InputError(f"{path} holds whole numbers (token numbers?): a test needs floating point arrays")
    return x if x.ndim > 1 else x[:, None]


def _table(path: Path, dtype: torch.dtype) -> Tensor:
    _, lines = read_table(path)
    for number, line in enumerate(lines, 1):
        wrong = [cell for cell in line if not is_number(cell)]
        if wrong:
            raise InputError(f"{path}: example {number} has {wrong[0]!r}: expected {len(line)} numbers")
    x = torch.tensor([[float(cell) for cell in line] for line in lines], dtype=torch.float64).to(dtype)
    if not bool(x.isfinite().all()):
        raise InputError(f"{path} has entries that are not finite (NaN or infinity)")
    return x
