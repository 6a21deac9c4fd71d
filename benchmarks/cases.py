"""What is measured and what is asked of it, as data. No torch here: the scheduler must stay a small process."""

from __future__ import annotations

from dataclasses import dataclass

OUTPUTS = 10  # logits of every workload
PARAMETERS = {"W1": 5_824_522, "W2": 261_450, "W3": 11_173_962, "W4": 3_425_802}
PEERS = ("tutorial", "rows")
OURS = "ntkit"


@dataclass(frozen=True)
class Bars:
    """What the kernel must reach on two CPU cores; None where nothing is asked.

    Attributes:
        tutorial: Times faster than the `torch.func` tutorial, at least.
        rows: Times faster than per-example rows and one matrix product, at least.
        peak_mb: Peak memory of the whole process, MB of 2^20 bytes, at most.
    """

    tutorial: float | None
    rows: float | None
    peak_mb: float


@dataclass(frozen=True)
class Case:
    """One kernel matrix to compute: a workload, a kind of kernel and a number of examples.

    Attributes:
        workload: "W1" to "W4", see workloads.py.
        kind: "pntk", one row per example, or "full", one row per example and logit.
        examples: N.
        bars: What is asked.
        contenders: Who runs; the peers cannot run where their rows do not fit.
        rounds: How often every contender runs in a process of its own.
    """

    workload: str
    kind: str
    examples: int
    bars: Bars
    contenders: tuple[str, ...] = (OURS, *PEERS)
    rounds: int = 3

    @property
    def name(self) -> str:
        return f"{self.workload} {self.kind} N={self.examples:,}"

    @property
    def row_bytes(self) -> int:
        """Bytes of the parameter gradients of one example in float32."""
        return 4 * PARAMETERS[self.workload] * (OUTPUTS if self.kind == "full" else 1)


CASES = (
    Case("W1", "pntk", 256, Bars(240, 150, 400)),
    Case("W1", "full", 64, Bars(800, 400, 400)),
    Case("W2", "pntk", 128, Bars(2.5, 1.2, 600)),
    Case("W2", "full", 32, Bars(2.1, 1.0, 800)),
    Case("W3", "pntk", 32, Bars(5, 2.6, 1000)),
    Case("W3", "full", 8, Bars(8, 4, 1000)),
    Case("W4", "pntk", 32, Bars(2.2, 1.0, 600)),
    Case("W4", "full", 8, Bars(2.6, 1.6, 650)),
    # The rows of this one would be 466 GB; the matrix itself is 1.6 GB.
    Case("W1", "pntk", 20_000, Bars(None, None, 2.5e9 / 2**20), contenders=(OURS,), rounds=1),
)
