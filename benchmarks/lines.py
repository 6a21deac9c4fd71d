"""Runs written down one a line, by processes that may be killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a file, none if it is not there; one that a killed run left half written is taken out of it."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    if lines[-1]:
        path.write_text("\n".join([*lines[:-1], ""]))
    return [json.loads(line) for line in lines[:-1]]
