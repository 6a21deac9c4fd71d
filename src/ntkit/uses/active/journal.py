"""A session on disk: one line for everything that happened, added at the end and never changed.

A line is JSON with a checksum of itself and of the line before, written whole and forced to disk before anything else
happens. What a killed run leaves behind is at most a torn last line, which begins as all lines do. Reading passes over
it and changes nothing; who adds the next line cuts it off, alone with the file. All else that does not fit is named and
refused: a path may well be that of another file.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkit.errors import StoreError

if TYPE_CHECKING:
    from io import FileIO

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
            StoreError: if the file is none of ours, damaged before its last line, or of another format.
        """
        self.path = None if path is None else Path(path)
        self.events: list[dict[str, Any]] = []
        self._digest, self._end = "", 0  # of the whole lines that are known
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def add(self, kind: str, **facts: Any) -> None:
        """One event more; it is on disk when this returns.

        Raises:
            StoreError: if it cannot be written, or another process has gone on with the session. What has been written
                before is kept.
        """
        event = {"event": kind, **facts}
        body = json.dumps(event, sort_keys=True, allow_nan=False)
        digest = _chained(self._digest, body)
        if self.path is not None:
            self._append(self.path, (_HEAD % digest + body[1:] + "\n").encode())
        self._digest = digest
        self.events.append(event)

    def check(self) -> None:
        """See whether the next event could be written.

        Raises:
            StoreError: if not.
        """
        if self.path is not None:
            self._append(self.path, b"")

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise StoreError(f"{path}: cannot read the session ({error})") from error
        for number, line in enumerate(lines[:-1], 1):  # behind the last end of a line: a torn one, or nothing
            # the very bytes are summed up: two ways to write a number would read the same
            body = "{" + line[len(_HEAD % _NONE) :].decode(errors="replace")
            digest = _chained(self._digest, body)
            event = _parsed(body) if line.startswith((_HEAD % digest).encode()) else None
            if event is None:
                raise self._damaged(number, line)
            self._digest = digest
            self.events.append(event)
            self._end += len(line) + 1
        if self.events and self.events[0].get("version") != VERSION:
            raise StoreError(f"{path}: a session of format {self.events[0].get('version')}, this is {VERSION}")
        if not _begins(lines[-1]):
            raise self._damaged(len(lines), lines[-1])

    def _append(self, path: Path, line: bytes) -> None:
        """Add to the file; it is on disk when this returns.

        Raises:
            StoreError: if it cannot be written, or is not as it was read; what was there before is kept.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b", buffering=0) as file:
                _lock(file)
                self._cut(file)
                _write(file, line, self._end)
        except OSError as error:
            raise StoreError(f"{path}: cannot write the session down ({error}). Nothing is lost; try again") from error
        self._end += len(line)

    def _cut(self, file: FileIO) -> None:
        """Take off what a killed process has left of a line.

        Raises:
            StoreError: if there are more lines than were read, or fewer, or something that is no line of ours.
        """
        size = os.fstat(file.fileno()).st_size
        file.seek(min(self._end, size))
        left = file.read(size - self._end) if size > self._end else b""
        if size < self._end or b"\n" in left:
            raise StoreError(
                f"{self.path}: another process has gone on with this session since it was read here. Nothing was "
                "written now: read the session again and repeat this step"
            )
        if not _begins(left):
            raise self._damaged(len(self.events) + 1, left)
        if left:
            file.truncate(self._end)

    def _damaged(self, number: int, line: bytes) -> StoreError:
        if number == 1 and not _begins(line):
            return StoreError(
                f"{self.path} is no session: line 1 is none of ours. It is left alone: choose another journal"
            )
        return StoreError(
            f"{self.path}: line {number} is not what was written there, or one before it is missing. Restore the file "
            "from a copy, or cut it off before that line to go on from there"
        )


def _lock(file: FileIO) -> None:
    """Wait for the file; closing it lets the next one in."""
    try:
        import fcntl
    except ImportError:  # Windows: two people at one session are told apart by its length alone
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def _write(file: FileIO, line: bytes, end: int) -> None:
    """A line behind `end` bytes, on disk when this returns.

    Raises:
        OSError: if it cannot be written.
    """
    done = 0
    try:
        while done < len(line):
            done += os.write(file.fileno(), line[done:])
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # half a line, as of a full disk; if it stays, the next writer cuts it off
            file.truncate(end)
        raise


def _begins(line: bytes) -> bool:
    """Whether bytes are a line of ours or the beginning of one, as far as their head goes."""
    before, behind = (part.encode() for part in _HEAD.split("%s"))
    digest, rest = line[len(before) :][: len(_NONE)], line[len(before) + len(_NONE) :]
    is_hexadecimal = not digest.strip(b"0123456789abcdef")
    return before.startswith(line[: len(before)]) and is_hexadecimal and behind.startswith(rest[: len(behind)])


def _chained(before: str, body: str) -> str:
    return hashlib.sha256((before + body).encode()).hexdigest()


def _parsed(body: str) -> dict[str, Any] | None:
    try:
        event = json.loads(body)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
