"""Examples with classes from files: the table of a `.csv` file, or arrays of an `.npz` file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ntkit.errors import InputError
from ntkit.report.inputs import Arrays
from ntkit.report.tables import is_number, read_table


@dataclass(frozen=True)
class Labelled:
    """Examples with the classes that they have.

    Attributes:
        x: (N, d), float64.
        y: classes, whole numbers or words, (N,); None where the file has none.
        columns: names of the d features, empty where the file has none.
    """

    x: np.ndarray
    y: np.ndarray | None
    columns: tuple[str, ...] = ()


def load_training(path: Path, label: str | None) -> Labelled:
    """Training examples: a `.csv` file, or x_train and y_train (or x and y) of an `.npz` file.

    Args:
        path: a line of the `.csv` file is an example; a first line of words names its columns.
        label: name, or number from 1, of the column with the classes; None for the last one.

    Raises:
        InputError: if the file cannot be used, or has fewer than two classes.
    """
    if path.suffix == ".csv":
        found = _table(path, label, needs_label=True)
    else:
        _without_columns(path, label)
        found = _arrays(path, ("x_train", "y_train"), ("x", "y"))
    assert found.y is not None
    if len(np.unique(found.y)) < 2:
        raise InputError(f"{path} has one class only, {found.y[0].item()!r}: a classifier needs two")
    return found


def load_test(path: Path, label: str | None, training: Labelled, source: Path) -> Labelled:
    """Examples to predict, with or without classes, in the form of the training examples.

    Raises:
        InputError: if the file cannot be used, or has other features.
    """
    if path.suffix == ".csv":
        found = _table(path, label, needs_label=False, columns=training.columns, features=training.x.shape[1])
    else:
        # of a file that holds training examples as well, the test examples
        found = _arrays(path, ("x_test", "y_test"), ("x", "y"), needs_label=False)
    if found.x.shape[1] != training.x.shape[1]:
        raise InputError(f"{path} has {found.x.shape[1]} features in each example, and {source} {training.x.shape[1]}")
    if found.y is not None and training.y is not None and found.y.dtype.kind != training.y.dtype.kind:
        raise InputError(
            f"the classes of {path} are like {found.y[0].item()!r}, and those of {source} like {training.y[0].item()!r}"
        )
    if found.y is not None and training.y is not None and not np.isin(found.y, training.y).any():
        raise InputError(
            f"no class of {path} ({found.y[0].item()!r}, ...) is one of {source} ({training.y[0].item()!r}, ...): are "
            "they spelled alike?"
        )
    return found


def has_test(path: Path) -> bool:
    """Whether a file of training examples brings test examples along."""
    if path.suffix == ".csv":
        return False
    with Arrays(path) as arrays:
        return "x_test" in arrays.names and "x_train" in arrays.names


def _without_columns(path: Path, label: str | None) -> None:
    if label is not None:
        raise InputError(f"{path} is not a .csv file: its classes are the array y_train or y, leave --label-column out")


def _arrays(path: Path, *pairs: tuple[str, str], needs_label: bool = True) -> Labelled:
    with Arrays(path) as arrays:
        found = next((pair for pair in pairs if pair[0] in arrays.names), None)
        if found is None or (needs_label and found[1] not in arrays.names):
            wanted = " or ".join(f"{x} and {y}" if needs_label else x for x, y in pairs)
            raise InputError(f"{path} holds {', '.join(sorted(arrays.names)) or 'no arrays'}: expected {wanted}")
        x = arrays.examples(found[0], torch.float64)
        if not x.is_floating_point():
            raise InputError(f"{found[0]} of {path} holds whole numbers: save it as floating point numbers")
        y = _classes(arrays, path, found[1]) if found[1] in arrays.names else None
    if y is not None and len(y) != len(x):
        raise InputError(f"{path} has {len(x)} examples in {found[0]} and {len(y)} classes in {found[1]}")
    return Labelled(x.reshape(len(x), -1).numpy(), y)


def _classes(arrays: Arrays, path: Path, name: str) -> np.ndarray:
    try:
        return np.array(arrays.texts(name))
    except InputError:
        y = arrays.targets(name, torch.float64)
    if y.ndim != 1 or y.is_floating_point():
        raise InputError(f"{name} of {path} is not a list of classes: expected whole numbers or words, (N,)")
    return y.numpy()


# ---------------------------------------------------------------- tables


def _table(
    path: Path, label: str | None, *, needs_label: bool, columns: tuple[str, ...] = (), features: int | None = None
) -> Labelled:
    names, lines = read_table(path)
    width = len(lines[0])
    alone = not needs_label and width == features and label not in names  # features, without classes
    place = None if alone else _place(path, label, names, width)
    if place is None and not alone:
        raise InputError(f"{path} has no column {label!r}: it has {', '.join(names) or f'{width}, without names'}")
    kept = [column for column in range(width) if column != place]
    if not kept:
        raise InputError(f"{path} has one column only: expected features and, in a column of their own, classes")
    if columns and names and tuple(names[column] for column in kept) != columns:
        raise InputError(
            f"{path} has the features {', '.join(names[column] for column in kept)}: expected {', '.join(columns)}"
        )
    x = np.array([[_number(path, n, line[column]) for column in kept] for n, line in enumerate(lines, 1)])
    y = None if place is None else np.array([line[place].strip() for line in lines])
    return Labelled(x, y, tuple(names[column] for column in kept) if names else ())


def _place(path: Path, label: str | None, names: tuple[str, ...], width: int) -> int | None:
    """The column with the classes, from 0; None where there is none of this name."""
    if label is None:
        return width - 1
    if label in names:
        return names.index(label)
    if not label.isdecimal():
        return None
    if not 1 <= int(label) <= width:
        raise InputError(f"{path} has {width} columns: there is no column {label}")
    return int(label) - 1


def _number(path: Path, example: int, cell: str) -> float:
    value = float(cell) if is_number(cell) else float("nan")
    if not np.isfinite(value):
        raise InputError(
            f"{path}: example {example} has {cell!r} where a feature is expected: every feature is a finite number. "
            "Fill in what is missing, make words numbers, and name the column of the classes by --label-column"
        )
    return value
