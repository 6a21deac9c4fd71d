"""What people see of a point while they label it: texts, or where images are."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ntkit.errors import InputError
from ntkit.report.inputs import Arrays
from ntkit.uses.active.exchange import OWN


def items_of(source: str, data: Path, n: int) -> list[dict[str, str]]:
    """The fields of every point, by name.

    Args:
        source: name of an array of strings in the data, which names the field as well; or a `.csv` file with a line for
            each point, in order, and the names of the fields in its first line.
        data: the `.npz` file.
        n: number of points.

    Raises:
        InputError: if there is no such thing, it has not n entries, or a field has a name of ours.
    """
    with Arrays(data) as arrays:
        held = arrays.names
        found = [{source: text} for text in arrays.texts(source)] if source in held else None
    if found is None:
        found = _table(Path(source), f"{data} has no array {source!r}, it holds {', '.join(sorted(held))}")
    if len(found) != n:
        raise InputError(f"the items {source} are {len(found)}, expected one for each of the {n} points")
    taken = OWN & set(found[0])
    if taken:
        raise InputError(f"the items {source} have a field {sorted(taken)[0]!r}, which is one of our own: rename it")
    return found


def _table(path: Path, otherwise: str) -> list[dict[str, str]]:
    if path.suffix != ".csv" or not path.is_file():
        raise InputError(f"{otherwise}; and {path} is no .csv file with a line for each point")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the items ({error})") from error
    table = csv.DictReader(io.StringIO(text, newline=""))
    rows = list(table)
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise InputError(f"{path}: the line of point {number} has not one entry for each of {table.fieldnames}")
    return rows
