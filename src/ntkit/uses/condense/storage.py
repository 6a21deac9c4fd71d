"""A run of inducing points on disk: its state, written whole, and the support set of every recorded step."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ntkit.errors import InputError, StoreError
from ntkit.solve.checkpoint import Checkpoint, digest
from ntkit.uses.condense.course import Recorded
from ntkit.uses.condense.support import Support

if TYPE_CHECKING:
    from ntkit.kernel.function import KernelFunction
    from ntkit.uses.condense.course import Course
    from ntkit.uses.condense.support import Labelled

# Points whose kernel a folder is bound to, and the digits of it that are the same on another machine.
PROBES, DIGITS = 16, 5
# Files of a run, whole or on the way to it; and those that a kill before the first state leaves.
FILES = re.compile(r"state\.safetensors(\.partial)?|step-\d{7,}\.safetensors|\.step-\d{7,}\.safetensors\.\d+")
FIRST = re.compile(r"state\.safetensors\.partial|step-0{7}\.safetensors|\.step-0{7}\.safetensors\.\d+")


class Folder:
    """One run. `state.safetensors` is what it goes on from; `step-N.safetensors` are points to look at."""

    def __init__(
        self,
        path: Path,
        kernel: KernelFunction,
        start: Support,
        data: Labelled,
        held_out: Labelled | None,
        settings: str,
        generator: torch.Generator,
    ) -> None:
        """Make the folder, and name the run by what it depends on.

        Raises:
            InputError: if it cannot be made.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path} cannot be used as a folder ({error})") from error
        parts = [start.x, start.y, data.x, data.labels, generator.get_state()]
        parts += [] if held_out is None else [held_out.x, held_out.labels]
        named = digest(torch.empty(0), settings, *(digest(part.detach().cpu()) for part in parts))
        with torch.no_grad():
            entries = kernel(start.x[:PROBES].double()).dense().flatten().tolist()
        probed = digest(torch.empty(0), *(f"{entry:.{DIGITS}g}" for entry in entries))
        self._state = Checkpoint(
            path / "state.safetensors", named, {"entries": probed}, named="start, data, seed or settings"
        )

    def restore(self, course: Course) -> None:
        """Go on from the state that is there, if one is.

        Raises:
            StoreError: if it is of another run.
        """
        found = self._state.read()
        if found is None:
            return
        facts, parts = json.loads(found.facts["course"]), found.parts
        with torch.no_grad():
            course.x.copy_(parts["x"])
            course.y.copy_(parts["y"])
        state = {
            k: {name: parts[f"adam.{k}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
            for k in range(facts["moved"])
        }
        course.optimizer.load_state_dict({**course.optimizer.state_dict(), "state": state})
        course.generator.set_state(parts["generator"])
        course.step, course.loss = facts["step"], float(facts["loss"])
        course.records = [_recorded(**found) for found in facts["records"]]
        best = [parts[name].to(course.x.device) for name in ("best.x", "best.y") if name in parts]
        course.best = (facts["best"], Support(*best)) if best else None

    def write(self, course: Course, *, now: bool) -> None:
        """Keep the state: if it is due, or at once; then the points go into a file of their own as well.

        Raises:
            StoreError: if the disk is full.
        """
        adam = {
            f"adam.{k}.{name}": value
            for k, state in course.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        best = {} if course.best is None else {"best.x": course.best[1].x, "best.y": course.best[1].y}
        facts = {
            "step": course.step,
            "loss": repr(course.loss),
            "moved": len(adam) // 3,
            "records": [
                {k: v if k == "step" else repr(v) for k, v in dataclasses.asdict(r).items()} for r in course.records
            ],
            "best": None if course.best is None else course.best[0],
        }
        if now:
            save_support(self.path / f"step-{course.step:07d}.safetensors", course.support())
        parts = {"x": course.x.detach(), "y": course.y.detach(), "generator": course.generator.get_state()}
        self._state.write({**parts, **adam, **best}, {"course": json.dumps(facts)}, now=now)

    def steps(self) -> dict[int, Path]:
        """The files of the recorded steps."""
        return {int(path.stem.removeprefix("step-")): path for path in sorted(self.path.glob("step-*.safetensors"))}


def check_own(path: Path) -> None:
    """Refuse a folder that is there and holds files, but no state of a run: it is somebody else's.

    Raises:
        InputError: if it does, or if it is a file.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, and the place where the state of the run is kept: move it away")
    if not path.is_dir() or (path / "state.safetensors").is_file():
        return
    foreign = sorted(found.name for found in path.iterdir() if not FIRST.fullmatch(found.name))
    if foreign:
        raise InputError(
            f"the folder {path}, where the state of the run is kept, holds {foreign[0]} and no state of a run: move it "
            "away, or write to another folder"
        )


def remove_own(path: Path, *more: str) -> None:
    """Delete the files of a run, and the folder if nothing else is in it.

    Args:
        path: the folder.
        more: names of other files that are to go.
    """
    for found in path.iterdir():
        if found.is_file() and (FILES.fullmatch(found.name) or found.name in more):
            found.unlink()
    if not any(path.iterdir()):
        path.rmdir()


def _recorded(step: int, **numbers: str) -> Recorded:
    return Recorded(step, **{name: float(value) for name, value in numbers.items()})


def save_support(path: str | os.PathLike[str], support: Support) -> None:
    """Write a support set, x and y, as a safetensors file; it is whole or not there.

    Raises:
        StoreError: if it cannot be written.
    """
    place = Path(path)
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(save({"x": support.x.contiguous().cpu(), "y": support.y.contiguous().cpu()}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
    except OSError as error:
        raise StoreError(f"{place}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def load_support(path: str | os.PathLike[str]) -> Support:
    """Read a support set back.

    Raises:
        StoreError: if the file is none.
    """
    try:
        found: dict[str, Tensor] = load_file(path)
        return Support(found["x"], found["y"])
    except (OSError, KeyError, SafetensorError) as error:
        raise StoreError(f"{path} is not a support set ({error}): expected a safetensors file with x and y") from error
