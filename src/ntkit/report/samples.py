"""Samples from files: an array of an `.npz` file, or the numbers of a `.csv` file."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.report.inputs import load_examples
from ntkit.report.labelled import is_number


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
    if not path.is_file():
        raise InputError(f"there is no file of data {path}")
    try:
        lines = [line for line in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot read it as text with commas ({error})") from error
    if lines and not any(map(is_number, lines[0])):
        lines = lines[1:]
    if not lines:
        raise InputError(f"{path} has no line of numbers")
    for number, line in enumerate(lines, 1):
        wrong = [cell for cell in line if not is_number(cell)]
        if wrong or len(line) != len(lines[0]):
            what = f"{wrong[0]!r}" if wrong else f"{len(line)} cells"
            raise InputError(
                f"{path}: example {number} has {what}: expected {len(lines[0])} numbers, as in the first line"
            )
    x = torch.tensor([[float(cell) for cell in line] for line in lines], dtype=torch.float64).to(dtype)
    if not bool(x.isfinite().all()):
        raise InputError(f"{path} has entries that are not finite (NaN or infinity)")
    return x
