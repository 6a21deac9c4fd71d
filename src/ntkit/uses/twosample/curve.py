"""`power_curve`: how often tests reject, by simulation or by drawing from data, with standard errors."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ntkit.errors import InputError, StoreError
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import describe, digest
from ntkit.uses.twosample.result import TestResult
from ntkit.uses.twosample.samples import check_level

Draw = Callable[[Any, torch.Generator], tuple[Any, Any]]
Test = Callable[[Any, Any, torch.Generator], "TestResult | float"]
Point = str | int | float
# Of the file of runs; another one is refused.
VERSION = 1


@dataclass(frozen=True)
class PowerCurve:
    """P-values of repeated tests, from which rates of rejection follow at every level.

    Attributes:
        points: where the tests were made.
        pvalues: of each test, (points, runs).
        seconds: mean time of a run of each test.
    """

    points: tuple[Point, ...]
    pvalues: Mapping[str, np.ndarray] = field(repr=False)
    seconds: Mapping[str, float] = field(repr=False)

    @property
    def runs(self) -> int:
        """Runs at each point."""
        return next(iter(self.pvalues.values())).shape[1]

    def power(self, level: float = 0.05) -> dict[str, np.ndarray]:
        """How often each test rejected, (points,).

        Raises:
            InputError: if the level is not between 0 and 1.
        """
        check_level(level)
        return {name: (found <= level).mean(1) for name, found in self.pvalues.items()}

    def standard_error(self, level: float = 0.05) -> dict[str, np.ndarray]:
        """Of those rates, (points,); one success and one failure are added, so that it is never 0.

        Raises:
            InputError: if the level is not between 0 and 1.
        """
        smooth = {name: (rate * self.runs + 1) / (self.runs + 2) for name, rate in self.power(level).items()}
        return {name: np.sqrt(rate * (1 - rate) / self.runs) for name, rate in smooth.items()}

    def __str__(self) -> str:
        """A line for each test."""
        power, error = self.power(), self.standard_error()
        width = max(map(len, power))
        lines = [f"power at level 0.05, {self.runs} runs each, at {', '.join(map(str, self.points))}"]
        for name, rates in power.items():
            cells = "  ".join(f"{p:.3f} ± {e:.3f}" for p, e in zip(rates, error[name], strict=True))
            lines.append(f"{name:{width}}  {cells}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Subsamples:
    """Draws from samples that are there: `size` examples of each, without replacement.

    Attributes:
        x: the first sample.
        y: the second; None draws both from x, disjoint: then every rejection is a false one.
    """

    x: Any
    y: Any = None

    def __call__(self, size: int, generator: torch.Generator) -> tuple[Any, Any]:
        """Two samples of `size`.

        Raises:
            InputError: if there are not so many examples.
        """
        x = Examples(self.x)
        y = None if self.y is None else Examples(self.y)
        wanted = 2 * size if y is None else size
        fewest = len(x) if y is None else min(len(x), len(y))
        if size < 1 or wanted > fewest:
            raise InputError(f"cannot draw {wanted} of {fewest} examples without replacement: take a smaller size")

        def order(part: Examples) -> list[int]:
            return torch.randperm(len(part), generator=generator, device=generator.device).tolist()

        if y is None:
            numbers = order(x)
            return x.pick(numbers[:size]), x.pick(numbers[size : 2 * size])
        return x.pick(order(x)[:size]), y.pick(order(y)[:size])


def power_curve(
    draw: Draw,
    tests: Mapping[str, Test],
    points: Sequence[Point],
    *,
    runs: int = 200,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PowerCurve:
    """Repeat tests on fresh samples and count rejections.

    All tests of a run see the same samples. A run's generators follow from the seed, its point and its number alone, so
    that points, runs and tests can be added later, and any run can be repeated.

    Args:
        draw: (point, generator) -> two samples; `Subsamples(x, y)` for data that are there, with sizes as points.
        tests: by name, (x, y, generator) -> a `TestResult` or a p-value.
        points: sample sizes, strengths of a shift, or whatever `draw` understands: numbers or words.
        runs: at each point.
        seed: of everything.
        path: a file of finished runs, one a line; the same call goes on there after a kill. None keeps nothing.
        about: what `draw` and the tests are, in plain words and numbers: a file of something else is refused. By
            default that is their code, what it names and the values they carry (`ntkit.tangent.identity`); a file that
            does not say it, as of older versions, is taken to be right.
        progress: called with (runs done, runs in all).

    Raises:
        InputError: if an argument cannot be used, or a test gives what is no p-value; finished runs are kept.
        StoreError: if the file is of other runs, damaged, or cannot be written.
    """
    if not isinstance(runs, int) or runs < 1:
        raise InputError(f"runs is a positive whole number: got {runs!r}")
    points = [p.item() if isinstance(p, np.generic) else p for p in points]
    if not tests or not points or len(set(points)) < len(points):
        raise InputError("a power curve needs one test and one point at least, every point once")
    head = {"version": VERSION, "seed": seed, "about": dict(about or {})}
    code: dict[str, str] = {}
    if path is not None and about is None:
        head["draw"] = _code(draw)
        code = {name: _code(test) for name, test in tests.items()}
    journal = _Journal(path, head, code)
    wanted = [(point, run) for point in points for run in range(runs)]
    for done, (point, run) in enumerate(wanted):
        missing = [name for name in tests if name not in journal.runs.get((point, run), {})]
        if missing:
            x, y = draw(point, _generator(seed, point, run, "draw"))
            found = {}
            for name in missing:
                start = time.perf_counter()
                result = tests[name](x, y, _generator(seed, point, run, *_stream(name)))
                pvalue = result.pvalue if isinstance(result, TestResult) else float(result)
                if not 0 <= pvalue <= 1:
                    raise InputError(f"the test {name!r} gave p = {pvalue} at {point!r}, run {run}: not from 0 to 1")
                found[name] = [pvalue, round(time.perf_counter() - start, 6)]
            journal.add(point, run, found)
        if progress is not None:
            progress(done + 1, len(wanted))
    table = {name: np.array([[journal.runs[p, r][name] for r in range(runs)] for p in points]) for name in tests}
    return PowerCurve(
        tuple(points), {name: t[..., 0] for name, t in table.items()},
        {name: float(t[..., 1].mean()) for name, t in table.items()},
    )  # fmt: skip


def _code(function: Any) -> str:
    return digest([describe(function)])[:16]


def _stream(name: str) -> tuple[str, ...]:
    """What tells the generator of a test from the others; "draw" is what that of the data is called."""
    return (name, "test") if name == "draw" else (name,)


def _generator(*key: Any) -> torch.Generator:
    """A generator of its own for everything that has a name."""
    number = hashlib.sha256(json.dumps(key).encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(number, "big") >> 1)


class _Journal:
    """Finished runs, in memory and as lines of a file."""

    def __init__(self, path: str | os.PathLike[str] | None, head: dict[str, Any], code: dict[str, str]) -> None:
        """Read what is there. A last line that a kill has cut is left out, and written again.

        Args:
            path: of the file, or None.
            head: its first line.
            code: what each test does; empty if that is not to be compared.

        Raises:
            StoreError: if the file is not of these runs; it is left as it is then.
        """
        self.path = None if path is None else Path(path)
        self.runs: dict[tuple[Point, int], dict[str, list[float]]] = {}
        self.code: dict[str, str] = {}
        if self.path is None:
            return
        head = json.loads(json.dumps(head))
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if whole:
                self._read(whole, head)
            elif not (json.dumps(head) + "\n").encode().startswith(content):
                raise StoreError(f"{self.path} is not a file of runs: name another")
            changed = [name for name in code if self.code.get(name, code[name]) != code[name]]
            if changed:
                raise StoreError(
                    f"{self.path} holds runs of other code under the name {', '.join(changed)}: name another file. If "
                    "it computes the same, about={} goes on"
                )
            if not whole:
                self.path.write_text(json.dumps(head) + "\n", encoding="utf-8")
            elif whole != content:
                os.truncate(self.path, len(whole))
        except OSError as error:
            raise StoreError(f"{self.path} cannot be used ({error})") from error
        known = self.code.keys() | {name for found in self.runs.values() for name in found}
        new = {name: words for name, words in code.items() if name not in known}
        if new:
            self._write({"code": new})

    def _read(self, content: bytes, head: dict[str, Any]) -> None:
        """Take in whole lines.

        Raises:
            StoreError: if they are of other runs, or damaged.
        """
        first, *lines = content.decode("utf-8", "replace").splitlines()
        theirs = _parsed(first)
        if theirs is None or "about" not in theirs:
            raise StoreError(f"{self.path} is not a file of runs: name another")
        theirs = {"draw": head.get("draw"), **theirs}  # older files do not say it
        parts = [key for key in head if theirs.get(key) != head[key]]
        if parts:
            raise StoreError(f"{self.path} holds runs of something else, {', '.join(parts)} differ: name another file")
        for number, text in enumerate(lines, 2):
            line = _parsed(text)
            if line is not None and line.keys() == {"code"}:
                self.code.update(line["code"])
                continue
            if line is None or not line.keys() >= {"point", "run", "found"}:
                raise StoreError(f"{self.path} is damaged in line {number}: delete that line, or the file")
            if not all(0 <= pvalue <= 1 for pvalue, _ in line["found"].values()):
                raise StoreError(f"{self.path} holds what is no p-value in line {number}: delete that line")
            self.runs.setdefault((line["point"], line["run"]), {}).update(line["found"])

    def add(self, point: Point, run: int, found: dict[str, list[float]]) -> None:
        """Keep a run; it is on disk when this returns."""
        self.runs.setdefault((point, run), {}).update(found)
        if self.path is not None:
            self._write({"point": point, "run": run, "found": found})

    def _write(self, line: dict[str, Any]) -> None:
        assert self.path is not None
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written ({error}). What was finished before is kept") from error


def _parsed(text: str) -> dict[str, Any] | None:
    """A line of a file, or None if it is not an object of JSON."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
