"""What a sweep has finished, on disk: a killed run goes on from there, and another model or other data are refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ntkit.errors import StoreError

# Of the format; another one is refused.
VERSION = 1


class Folder:
    """The finished parts of one sweep. A part is a file of tensors and a record, which is written last."""

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, str]) -> None:
        """Begin, or go on.

        Args:
            path: of the folder, made if it is not there.
            identity: what the results depend on, in named parts.

        Raises:
            StoreError: if the folder holds a sweep of something else, or cannot be used.
        """
        self.path = Path(path)
        wanted = {"version": VERSION, "identity": dict(identity)}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            record = self.path / "run.json"
            if not record.exists():
                if any(self.path.iterdir()):
                    raise StoreError(f"{self.path} holds other files and no sweep: name a new or an empty folder")
                _replace(record, json.dumps(wanted, indent=1).encode())
            found = _read_json(record)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be used as a folder ({error})") from error
        theirs = found.get("identity", {})
        other = [part for part, value in wanted["identity"].items() if theirs.get(part) != value]
        if found.get("version") != VERSION or other:
            raise StoreError(
                f"{self.path} holds a sweep of something else: {', '.join(other) or 'the format'} differ. Name another "
                "folder, or go on with the same model, data and settings"
            )

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """A finished part: its facts and tensors; None if it is not finished.

        Raises:
            StoreError: if it is damaged.
        """
        record = self.path / f"{name}.json"
        if not record.exists():
            return None
        found, path = _read_json(record), self.weights(name)
        try:
            if _digest(path) != found["sha256"]:
                raise StoreError(f"{path} is not what was written there: delete {record}, and it is computed again")
            return found["facts"], load_file(path)
        except (OSError, KeyError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be read ({error}): delete {record}, and it is computed again") from error

    def write(self, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a part down; it is finished when this returns, and not there at all if the process dies before.

        Raises:
            StoreError: if it cannot be written.
        """
        path = self.weights(name)
        # clones: tied weights are refused by the format, and are written twice
        plain = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
        try:
            _replacing(path, lambda target: save_file(plain, target))
            record = {"sha256": _digest(path), "facts": dict(facts)}
            _replace(self.path / f"{name}.json", json.dumps(record, indent=1).encode())
        except OSError as error:
            raise StoreError(f"{path}: cannot be written ({error}). What was finished before is kept") from error

    def weights(self, name: str) -> Path:
        """The file of a part's tensors."""
        return self.path / f"{name}.safetensors"


def _replace(path: Path, content: bytes) -> None:
    _replacing(path, lambda target: target.write_bytes(content))


def _replacing(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole, under its name only when it is on disk."""
    target = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(target, path)
    finally:
        target.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _old(file.read())


def _old(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()  # Python 3.10 has no file_digest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): delete it, and it is computed again") from error
    if not isinstance(found, dict):
        raise StoreError(f"{path} is damaged: delete it, and it is computed again")
    return found
