"""Every contender on every workload, side by side: `python -m benchmarks.run`.

Each measurement is a process of its own. First scouts choose each peer's chunk and block sizes; then the contenders
take turns (A B C, B C A, ...), so that what slows the machine for a while slows all of them. The file is written after
every measurement: Ctrl-C keeps what there is, and --resume goes on from it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

# No torch in this process: a child's peak memory, as the kernel reports it, begins at the parent's.
from benchmarks.cases import CASES, OURS, PEERS, Case
from benchmarks.machine import environment, slug, wait_until_quiet
from benchmarks.record import DISTURBED, Job, Record, Sample
from benchmarks.table import Row, mine, reduce, render, seconds_text

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
CHUNKS = (32, 16, 8, 4)  # examples differentiated at a time, tried after the whole block


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads of a measured process.
        quick: The peers' scouts are their result, and ours runs once.
        memory_gb: Gradients that a peer may hold.
        timeout: Seconds after which a process is given up.
        patience: Seconds to wait, before each process, for others to leave the machine alone.
        redo: Whether measurements that others disturbed are made again.
        contenders: Who runs.
    """

    device: str = "cpu"
    threads: int = 2
    quick: bool = False
    memory_gb: float = 10.0
    timeout: float = 1800.0
    patience: float = 20.0
    redo: bool = False
    contenders: tuple[str, ...] = (OURS, *PEERS)


class Bench:
    """Runs measurements one at a time and keeps them."""

    def __init__(self, record: Record, path: Path, options: Options, console: Console) -> None:
        self.record = record
        self.path = path
        self.options = options
        self.console = console
        self.fresh: set[tuple[object, ...]] = set()  # keys of what was measured since this start

    def case(self, case: Case) -> Row:
        """Measure one case whole."""
        contenders = [name for name in case.contenders if name in self.options.contenders]
        jobs: dict[str, Job] = {}
        for name in contenders:
            job = self.job(case, name)
            jobs[name] = job if name == OURS else self.scout(case, job)
        if self.options.quick:
            order = [name for name in contenders if name == OURS]
            rounds = 1
        else:
            order, rounds = contenders, case.rounds
        for number in range(rounds):
            turn = number % max(len(order), 1)
            for name in order[turn:] + order[:turn]:
                self.measure(jobs[name], "round", number)
        return reduce(case, self.record.samples)

    def job(self, case: Case, contender: str) -> Job:
        # In three rounds one timed run each is enough for the slow ones.
        runs = 3 if self.options.quick and contender == OURS and case.rounds > 1 else 1
        return Job(
            case.workload,
            case.kind,
            contender,
            case.examples,
            device=self.options.device,
            threads=self.options.threads,
            runs=runs,
        )

    def scout(self, case: Case, job: Job) -> Job:
        """The job with the fastest sizes: first the chunk at the largest block that fits, then half the block.

        By the fastest single run: a median would follow whatever else the machine was doing.
        """
        # the tutorial holds both sides even where they are the same
        sides = 2 if job.contender == "tutorial" else 1
        limit = self.options.memory_gb * 1e9
        block = case.examples
        while block > 1 and _held(case, block, sides) > limit:
            block = -(-block // 2)
        whole = replace(job, block=None if block >= case.examples else block)
        samples = [self.measure(whole, "scout", 0)]
        for chunk in (chunk for chunk in CHUNKS if chunk < block):
            samples.append(self.measure(replace(whole, chunk=chunk), "scout", 0))
            if len(samples) > 2 and samples[-1].fastest > 1.1 * samples[-2].fastest:
                break  # smaller ones lose more
        best = min(samples, key=lambda sample: sample.fastest).job
        samples += [self.measure(halved, "scout", 0) for halved in _halved(best, case)]
        return min(samples, key=lambda sample: sample.fastest).job

    def measure(self, job: Job, stage: str, number: int) -> Sample:
        """One process, unless the record has its result already."""
        label = f"{job.workload} {job.kind} N={job.examples:,} {job.contender} {job.sizes}".strip()
        label += f" ({stage})" if stage == "scout" else f" (round {number + 1})"
        known = self.record.find(job, stage, number)
        if known is not None and self.keeps(known):
            if known.key not in self.fresh:
                self.console.print(f"{label}: kept, {seconds_text(known.median)}", style="dim", highlight=False)
            return known
        # a spinner that turns seldom: it shares the cores with what is measured
        with self.console.status(f"{label}: waiting for a quiet machine", refresh_per_second=1):
            wait_until_quiet(DISTURBED, self.options.patience)
        with self.console.status(label, refresh_per_second=1):
            sample = replace(self.spawn(job), stage=stage, round=number)
        self.fresh.add(sample.key)
        self.record.add(sample)
        self.save()
        if sample.error is not None:
            self.console.print(f"{label}: {sample.error}", style="red", markup=False, highlight=False)
        else:
            self.console.print(
                f"{label}: {seconds_text(sample.median)}, {len(sample.seconds)} runs, peak {sample.peak_mb:,.0f} MB"
                + (f"; others kept {sample.others:.1f} cores busy" if sample.disturbed else ""),
                style="yellow" if sample.disturbed else None,
                highlight=False,
            )
        return sample

    def keeps(self, sample: Sample) -> bool:
        """Whether a sample from an earlier start stays: not if it failed, nor if it was disturbed and may be redone."""
        if sample.key in self.fresh:
            return True
        return sample.error is None and not (self.options.redo and sample.disturbed)

    def spawn(self, job: Job) -> Sample:
        """Run benchmarks.measure; whatever happens to it becomes a sample."""
        command = [sys.executable, "-m", "benchmarks.measure", *job.arguments()]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=self.options.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return Sample(job=job, error=f"gave up after {self.options.timeout:g} s")
        try:
            return Sample.from_json(json.loads(done.stdout.strip().splitlines()[-1]))
        except (IndexError, ValueError, TypeError, KeyError):
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            why = "killed, most likely for want of memory" if done.returncode == -9 else f"exit code {done.returncode}"
            return Sample(job=job, error=f"{why}: {last}"[:500])

    def rows(self) -> list[Row]:
        """One row for each case that has samples."""
        measured = [case for case in CASES if any(mine(case, sample) for sample in self.record.samples)]
        return [reduce(case, self.record.samples) for case in measured]

    def save(self) -> None:
        samples = self.record.samples
        names = {sample.device_name for sample in samples if sample.device_name}
        if names:
            self.record.environment["gpu"] = ", ".join(sorted(names))
        self.record.summary = [row.as_json() for row in self.rows()]
        self.record.write(self.path)


def _held(case: Case, block: int, sides: int) -> float:
    """Bytes of gradients that a peer holds at a time: two blocks, or the one whole where a side is used twice."""
    return case.row_bytes * block * (sides if block >= case.examples else 2)


def _halved(best: Job, case: Case) -> list[Job]:
    """Half the block: more gradients are made twice, but less memory is walked through."""
    block = (best.block or case.examples) // 2
    if block < 2:
        return []
    chunk = best.chunk if best.chunk is not None and best.chunk < block else None
    return [replace(best, block=block, chunk=chunk)]


# ---------------------------------------------------------------- command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="The kernels of W1 to W4, beside torch.func."
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help='workloads or cases: W1, "W2 full"; may be repeated (all)'
    )
    parser.add_argument("--contender", action="append", choices=[OURS, *PEERS], help="may be repeated (all)")
    parser.add_argument("--quick", action="store_true", help="one process each, for a first look; ratios are rough")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results (benchmarks/results/DATE-machine.json)")
    parser.add_argument("--resume", action="store_true", help="go on with FILE, or with the newest of this machine")
    parser.add_argument("--redo", action="store_true", help="with --resume: also what others disturbed")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--memory", type=float, default=10.0, metavar="GB", help="a peer's gradients (%(default)s)")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="per process (%(default)s)")
    parser.add_argument(
        "--patience", type=float, default=20.0, metavar="SECONDS", help="wait for a quiet machine (%(default)s)"
    )
    return parser.parse_args(arguments)


def chosen(only: Sequence[str] | None) -> list[Case]:
    """The cases whose names begin with one of `only`, at a word's end."""
    if not only:
        return list(CASES)
    wanted = [name.lower().split() for name in only]
    cases = [case for case in CASES if any(case.name.lower().split()[: len(words)] == words for words in wanted)]
    if not cases:
        raise ValueError(f"no case begins with {' or '.join(only)}; there are: {'; '.join(c.name for c in CASES)}")
    return cases


def destination(out: Path | None, resume: bool, date: str, machine: str) -> Path:
    """Where the results go; nothing is overwritten unless it is resumed."""
    if out is not None:
        if out.exists() and not resume:
            raise FileExistsError(f"{out} exists: give --resume to go on with it, or another --out")
        return out
    if resume:
        name = re.compile(rf"\d{{4}}-\d\d-\d\d-{re.escape(machine)}(-\d+)?\.json")
        found = sorted(
            (path for path in RESULTS.glob("*.json") if name.fullmatch(path.name)),
            key=lambda path: path.stat().st_mtime,
        )
        if not found:
            raise FileNotFoundError(f"nothing to resume for {machine} in {RESULTS}: leave --resume out")
        return found[-1]
    path, number = RESULTS / f"{date}-{machine}.json", 1
    while path.exists():
        number += 1
        path = RESULTS / f"{date}-{machine}-{number}.json"
    return path


def continued(path: Path, here: dict[str, Any]) -> Record:
    """The record at `path`, which must come from this machine and set-up."""
    record = Record.read(path)
    for key in ("cpu", "torch", "threads", "device"):
        was = record.environment.get(key)
        if was != here[key]:
            raise ValueError(f"{path} was measured with {key} {was!r}, this is {here[key]!r}: give another --out")
    return record


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    here = environment(given.threads, given.device)
    try:
        cases = chosen(given.only)
        path = destination(given.out, given.resume, here["date"], slug(here))
        record = continued(path, here) if path.exists() else Record(here)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options = Options(
        given.device,
        given.threads,
        given.quick,
        given.memory,
        given.timeout,
        given.patience,
        given.redo,
        tuple(given.contender) if given.contender else Options.contenders,
    )
    bench = Bench(record, path, options, console)
    code = 0
    try:
        for number, case in enumerate(cases):
            console.rule(f"{case.name}  ({number + 1} of {len(cases)})")
            bench.case(case)
    except KeyboardInterrupt:
        console.print("Interrupted; what was measured is kept, and --resume goes on from it.", style="yellow")
        code = 130
    if record.samples:
        bench.save()
        console.print(render(bench.rows(), given.device))
        if given.quick:
            console.print("Quick: one process each, not side by side; the ratios are rough.", style="yellow")
        console.print(f"Written to {path}", markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
