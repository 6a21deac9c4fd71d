"""The cells of a `.csv` file."""

from __future__ import annotations

import csv
from pathlib import Path

from ntkit.errors import InputError


def read_table(path: Path) -> tuple[tuple[str, ...], list[list[str]]]:
    """The names of the columns, none where the first line has a number, and the cells of the other lines.

    Raises:
        InputError: if it is no text with commas, has no lines but names, or lines of different lengths.
    """
    if not path.is_file():
        raise InputError(f"there is no file of data {path}")
    try:
        lines = [line for line in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot read it as text with commas ({error})") from error
    names = tuple(cell.strip() for cell in lines[0]) if lines and not any(map(is_number, lines[0])) else ()
    lines = lines[1:] if names else lines
    if not lines:
        raise InputError(f"{path} has no line of numbers")
    width = len(names) or len(lines[0])
    for number, line in enumerate(lines, 1):
        if len(line) != width:
            raise InputError(f"{path}: example {number} has {len(line)} cells: expected {width}, as in the first line")
    return names, lines


def is_number(cell: str) -> bool:
    """Whether a cell of a table reads as a number, NaN and infinity included."""
    try:
        float(cell)
    except ValueError:
        return False
    return True
