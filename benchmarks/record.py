"""What was measured, and the JSON file that keeps it. No torch here."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DISTURBED = 0.2  # cores


@dataclass(frozen=True)
class Job:
    """One process: who computes what, and how.

    Attributes:
        workload: "W1" to "W4".
        kind: "pntk" or "full".
        contender: "ntkit", "tutorial" or "rows".
        examples: N.
        chunk: Examples that a peer differentiates at a time; None for all of a block.
        block: Examples whose gradients a peer holds at a time; None for all.
        device: "cpu" or "cuda".
        threads: CPU threads.
        runs: Timed runs, at least.
        seconds: Timed runs go on until they add up to this.
    """

    workload: str
    kind: str
    contender: str
    examples: int
    chunk: int | None = None
    block: int | None = None
    device: str = "cpu"
    threads: int = 2
    runs: int = 3
    seconds: float = 1.0

    @property
    def sizes(self) -> str:
        """Chunk and block in words, empty where there are none."""
        parts = [f"chunk {self.chunk}"] if self.chunk else []
        parts += [f"block {self.block}"] if self.block else []
        return ", ".join(parts) or ("" if self.contender == "ntkit" else "whole")

    def arguments(self) -> list[str]:
        """The command line of benchmarks.measure that runs this job."""
        return [f"--{name}={value}" for name, value in asdict(self).items() if value is not None]


@dataclass(frozen=True)
class Checksum:
    """Numbers by which two matrices can be compared without keeping them.

    Attributes:
        shape: Of the matrix.
        norm: Frobenius norm.
        trace: Sum of the diagonal.
        corner: The leading rows and columns.
        probes: u^T K v for a few fixed pairs of standard normal vectors.
    """

    shape: list[int]
    norm: float
    trace: float
    corner: list[list[float]]
    probes: list[float]

    def distance(self, other: Checksum) -> float:
        """Relative difference: the largest of those in norm, trace, corner, and estimated in Frobenius norm.

        E (u^T D v)^2 = ||D||_F^2, so that the root mean square of the probes' differences estimates that norm. Matrices
        of different sizes (the first examples are the same) are compared by their corners.
        """
        corner = [abs(a - b) for p, q in zip(self.corner, other.corner, strict=True) for a, b in zip(p, q, strict=True)]
        largest = max(abs(b) for row in other.corner for b in row)
        parts = [max(corner) / largest]
        if self.shape == other.shape:
            squares = [(a - b) ** 2 for a, b in zip(self.probes, other.probes, strict=True)]
            parts.append(math.sqrt(sum(squares) / len(squares)) / other.norm)
            parts += [abs(self.norm / other.norm - 1), abs(self.trace / other.trace - 1)]
        # max() would let a NaN pass
        return math.nan if any(math.isnan(part) for part in parts) else max(parts)


@dataclass(frozen=True)
class Sample:
    """What one process reported.

    Attributes:
        job: What it ran.
        stage: "scout" for the choice of chunk and block, "round" for what is compared.
        round: Which round.
        seconds: Of every timed run.
        cpu_seconds: Of every timed run, all threads. With one thread it says more than `seconds` on a busy machine;
            with several it counts their waiting for each other as well.
        peak_mb: Peak resident memory of the process (on a GPU: peak allocated), MB of 2^20 bytes.
        growth_mb: The peak less what was there just before the first run.
        checksum: Of the matrix.
        error: What went wrong, in words.
        torch: Version.
        device_name: Of a GPU.
        others: Cores that other processes kept busy meanwhile, on average; None where the system does not tell.
        planned_mb: What the contender said beforehand that it would grow by; ours alone says so.
    """

    job: Job
    stage: str = "round"
    round: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    growth_mb: float | None = None
    checksum: Checksum | None = None
    error: str | None = None
    torch: str | None = None
    device_name: str | None = None
    others: float | None = None
    planned_mb: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether other processes took so much of the machine that the times mean little."""
        return self.others is not None and self.others > DISTURBED

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def fastest(self) -> float:
        """Seconds of the fastest run; infinite where there is none."""
        return min(self.seconds, default=math.inf)

    @property
    def key(self) -> tuple[Any, ...]:
        """Two samples of one key are repetitions of the same measurement."""
        return (self.job, self.stage, self.round)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Sample:
        value = dict(value)
        value["job"] = Job(**value["job"])
        if value.get("checksum") is not None:
            value["checksum"] = Checksum(**value["checksum"])
        return cls(**value)


@dataclass
class Record:
    """A file of samples with the machine they come from.

    Attributes:
        environment: The machine and the software, see machine.py.
        samples: In the order in which they were measured.
        summary: One row per case, derived from the samples; for readers of the file only.
    """

    environment: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    summary: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write to `path` through a temporary file: an interruption leaves the old content, never half of the new."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "environment": self.environment,
            "summary": self.summary,
            "samples": [sample.as_json() for sample in self.samples],
        }
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(_compact(json.dumps(content, indent=1)) + "\n")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Record:
        content = json.loads(path.read_text())
        samples = [Sample.from_json(value) for value in content["samples"]]
        return cls(content["environment"], samples, content["summary"])

    def find(self, job: Job, stage: str, number: int) -> Sample | None:
        """The sample of this measurement, if it is there."""
        return next((sample for sample in self.samples if sample.key == (job, stage, number)), None)

    def add(self, sample: Sample) -> None:
        """Add a sample in the place of an earlier attempt at the same measurement."""
        self.samples = [other for other in self.samples if other.key != sample.key] + [sample]


def _compact(text: str) -> str:
    """Lists of numbers on one line: a file that can be read and compared."""
    return re.sub(r"\[\s+([-\d.e+,\sNaInfity]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
