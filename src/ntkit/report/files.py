"""Results on disk: nothing is overwritten unasked, and a file is either whole or not there."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ntkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


def check_folder(folder: Path, *, force: bool) -> None:
    """Refuse an output folder that cannot be used, before any work is done.

    Args:
        folder: where results will go; it and its parents are made when they are written.
        force: whether it may exist already. Files of other names in it are left alone.

    Raises:
        InputError: if it is a file, exists without `force`, or cannot be written to.
    """
    if folder.is_dir():
        if not force:
            raise InputError(
                f"the output folder {folder} exists: choose another with --out, or overwrite the report in it with "
                "--force"
            )
    elif folder.exists():
        raise InputError(f"the output folder {folder} is a file: choose another with --out")
    _check_writable(folder)


def check_file(path: Path, suffix: str, *, force: bool) -> None:
    """Refuse an output file that cannot be used, before any work is done.

    Raises:
        InputError: if it has another suffix, its folder does not exist, it exists without `force`, or cannot be
            written.
    """
    if path.suffix != suffix:
        raise InputError(f"the output file is called something{suffix}: got {path}")
    if path.is_dir():
        raise InputError(f"the output file {path} is a folder: choose another with --out")
    if not path.parent.is_dir():
        raise InputError(
            f"the folder {path.parent} of the output file does not exist: make it, or choose another --out"
        )
    if path.exists() and not force:
        raise InputError(f"the output file {path} exists: choose another with --out, or overwrite it with --force")
    _check_writable(path)


def write_folder(
    folder: Path, contents: Mapping[str, str | Path], *, force: bool, outdated: Collection[str] = ()
) -> None:
    """Write text, and copies of files, into a folder.

    A new folder appears whole; in an old one each file is replaced whole, in the order in which they are given.

    Args:
        folder: see above.
        contents: by name of the file.
        force: see `check_folder`.
        outdated: names of files that an earlier run has written there. What this one does not write again is removed
            first, so that it never lies beside results of another run.

    Raises:
        InputError: if the folder cannot be used, see `check_folder`.
    """
    check_folder(folder, force=force)
    if folder.is_dir():
        for name in set(outdated) - set(contents):
            (folder / name).unlink(missing_ok=True)
        for name, found in contents.items():
            with replacing(folder / name) as file:
                file.write(_bytes(found))
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        fresh = Path(work) / folder.name
        fresh.mkdir()
        for name, found in contents.items():
            (fresh / name).write_bytes(_bytes(found))
        fresh.rename(folder)


def earlier_results(folder: Path) -> dict[str, Any]:
    """What the results.json of a folder says; nothing where there is none. Files beside it may be somebody else's."""
    try:
        found = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(found: str | Path) -> bytes:
    return found.read_bytes() if isinstance(found, Path) else found.encode()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` at the end; after an exception nothing has changed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def as_json(results: Any) -> str:
    """Dataclasses, tensors and numbers as JSON text; numbers that are not finite become null."""
    return json.dumps(_plain(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, (str, int)) or value is None:
        return value
    to_list = getattr(value, "tolist", None)  # tensors and arrays
    return str(value) if to_list is None else _plain(to_list())


def _check_writable(path: Path) -> None:
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise InputError(f"cannot write to {place}: choose another place with --out")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
