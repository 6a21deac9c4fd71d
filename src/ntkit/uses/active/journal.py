"""A session on disk: one line for everything that happened, added at the end and never changed.

A line is JSON with a checksum of itself and of the line before, written whole and forced to disk before anything else
happens. What a killed run leaves behind is at most a torn last line, which is cut off when the session goes on; all
else that does not fit is named and refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ntkit.errors import StoreError

# Of the format; another one is refused.
VERSION = 1
# How a line begins, before the event's own facts.
_HEAD, _NONE = '{"sha256": "%s", ', "0" * 64


class Journal:
    """The events of one session, in order.

    Attributes:
        path: the file; None for a session that nobody goes on with.
        events: what is in it, without checksums.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        """Read what is there; nothing is written before the first event.

        Raises:
            StoreError: if the file is damaged before its last line, or of another format.
        """
        self.path = None if path is None else Path(path)
        self.events: list[dict[str, Any]] = []
        self._digest = ""
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def add(self, kind: str, **facts: Any) -> None:
        """One event more; it is on disk when this returns.

        Raises:
            StoreError: if it cannot be written. What has been written before is kept.
        """
        event = {"event": kind, **facts}
        body = json.dumps(event, sort_keys=True, allow_nan=False)
        digest = _chained(self._digest, body)
        if self.path is not None:
            _append(self.path, _HEAD % digest + body[1:] + "\n")
        self._digest = digest
        self.events.append(event)

    def check(self) -> None:
        """See whether the next event could be written.

        Raises:
            StoreError: if not.
        """
        if self.path is not None:
            _append(self.path, "")

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise StoreError(f"{path}: cannot read the session ({error})") from error
        torn, whole = lines[-1], lines[:-1]
        for number, line in enumerate(whole, 1):
            # the very bytes are summed up: two ways to write a number would read the same
            body = "{" + line[len(_HEAD % _NONE) :].decode(errors="replace")
            digest = _chained(self._digest, body)
            event = _parsed(body) if line.startswith((_HEAD % digest).encode()) else None
            if event is None:
                raise StoreError(
                    f"{path}: line {number} is not what was written there, or one before it is missing. Restore "
                    "the file from a copy, or cut it off before that line to go on from there"
                )
            self._digest = digest
            self.events.append(event)
        if self.events and self.events[0].get("version") != VERSION:
            raise StoreError(f"{path}: a session of format {self.events[0].get('version')}, this is {VERSION}")
        if torn:  # killed while writing: that event has not happened
            os.truncate(path, len(b"\n".join(whole)) + (1 if whole else 0))


def _append(path: Path, line: str) -> None:
    """Add to a file; it is on disk when this returns.

    Raises:
        StoreError: if it cannot be written; what was there before is kept.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.exists() and path.stat().st_size > before and os.access(path, os.W_OK):
            os.truncate(path, before)  # half a line, as of a full disk
        raise StoreError(f"{path}: cannot write the session down ({error}). Nothing is lost; try again") from error


def _chained(before: str, body: str) -> str:
    return hashlib.sha256((before + body).encode()).hexdigest()


def _parsed(body: str) -> dict[str, Any] | None:
    try:
        event = json.loads(body)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
