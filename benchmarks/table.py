"""Samples become one row per case: medians, ratios beside the bars, marks."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.cases import OURS, PEERS, Case
from benchmarks.record import DISTURBED, Sample

TOLERANCE = 1e-3  # contenders must agree to this, in float32
PLANNED = 1.5  # the factor within which the memory that was planned must be what was taken


@dataclass(frozen=True)
class Result:
    """One contender on one case, over all its rounds.

    Attributes:
        sizes: Chunk and block, in words.
        median: Seconds, over the runs of all rounds.
        fastest: Seconds.
        slowest: Seconds.
        runs: How many.
        peak_mb: The largest of the rounds.
        growth_mb: The largest of the rounds.
        planned_mb: What was said beforehand that it would be; None for a peer.
        distance: Largest relative difference from the first peer that has a matrix; None where there is none.
        others: Cores that other processes kept busy, the most of the rounds; None where the system does not tell.
        error: What went wrong, where nothing was measured.
    """

    sizes: str = ""
    median: float = math.nan
    fastest: float = math.nan
    slowest: float = math.nan
    runs: int = 0
    peak_mb: float = math.nan
    growth_mb: float = math.nan
    planned_mb: float | None = None
    distance: float | None = None
    others: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """One case: every contender, and how many times faster ours is than each peer.

    Attributes:
        case: The case.
        results: By contender.
        ratios: By peer: the median over the rounds of (the peer's median / our median), so that what slows the machine
            for a while slows both sides of a ratio.
    """

    case: Case
    results: dict[str, Result]
    ratios: dict[str, float]

    def checks(self) -> dict[str, bool]:
        """Name of a demand -> whether it is met; only what was measured."""
        checks = {}
        for peer, ratio in self.ratios.items():
            bar = getattr(self.case.bars, peer)
            if bar is not None:
                checks[peer] = ratio >= bar
        ours = self.results.get(OURS)
        if ours is not None and ours.runs:
            checks["peak_mb"] = ours.peak_mb <= self.case.bars.peak_mb
            if ours.planned_mb is not None:
                checks["planned_mb"] = 1 / PLANNED <= ours.planned_mb / ours.growth_mb <= PLANNED
        for name, result in self.results.items():
            if result.distance is not None:
                checks[f"agrees: {name}"] = result.distance <= TOLERANCE  # False for NaN
            elif result.error is not None:
                checks[f"runs: {name}"] = False
        return checks

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "bars": asdict(self.case.bars),
            "ratios": self.ratios,
            "checks": self.checks(),
            "results": {name: asdict(result) for name, result in self.results.items()},
        }


def mine(case: Case, sample: Sample) -> bool:
    """Whether the sample belongs to the case."""
    job = sample.job
    return (job.workload, job.kind, job.examples) == (case.workload, case.kind, case.examples)


def reduce(case: Case, samples: Sequence[Sample]) -> Row:
    """The row of one case. Scouts count only for a contender that has no rounds yet, and then the best of them."""
    by_contender: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if mine(case, sample):
            by_contender[sample.job.contender].append(sample)
    chosen: dict[str, list[Sample]] = {}
    for name in case.contenders:
        good = [sample for sample in by_contender[name] if sample.seconds]
        rounds = [sample for sample in good if sample.stage == "round"]
        rounds = [sample for sample in rounds if sample.job == rounds[-1].job]  # sizes may have changed since the first
        chosen[name] = rounds or sorted(good, key=lambda sample: sample.fastest)[:1] or by_contender[name][-1:]

    reference = next((s.checksum for peer in PEERS for s in chosen.get(peer, []) if s.checksum), None)
    if reference is None:  # the matrix of more examples begins with the matrix of fewer
        reference = next(
            (
                sample.checksum
                for sample in samples
                if (sample.job.workload, sample.job.kind) == (case.workload, case.kind)
                and sample.job.contender in PEERS
                and sample.checksum
            ),
            None,
        )
    results = {}
    for name, group in chosen.items():
        good = [sample for sample in group if sample.seconds]
        if not good:
            if group:
                results[name] = Result(sizes=group[-1].job.sizes, error=group[-1].error)
            continue
        seconds = [value for sample in good for value in sample.seconds]
        sums = [sample.checksum for sample in good if sample.checksum is not None]
        results[name] = Result(
            sizes=good[0].job.sizes,
            median=statistics.median(seconds),
            fastest=min(seconds),
            slowest=max(seconds),
            runs=len(seconds),
            peak_mb=max((s.peak_mb for s in good if s.peak_mb is not None), default=math.nan),
            growth_mb=max((s.growth_mb for s in good if s.growth_mb is not None), default=math.nan),
            planned_mb=max((s.planned_mb for s in good if s.planned_mb is not None), default=None),
            distance=None if reference is None or not sums else _worst([own.distance(reference) for own in sums]),
            others=max((s.others for s in good if s.others is not None), default=None),
        )
    return Row(case, results, _ratios(chosen))


def _ratios(chosen: dict[str, list[Sample]]) -> dict[str, float]:
    ours = {sample.round: sample.median for sample in chosen.get(OURS, []) if sample.seconds}
    ratios = {}
    for peer in PEERS:
        theirs = {sample.round: sample.median for sample in chosen.get(peer, []) if sample.seconds}
        shared = [theirs[number] / ours[number] for number in sorted(ours.keys() & theirs.keys())]
        if shared:
            ratios[peer] = statistics.median(shared)
    return ratios


def _worst(values: list[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


# ---------------------------------------------------------------- for the README


def markdown(rows: Sequence[Row]) -> str:
    """The table of the README: what was measured, what was aimed at in brackets, and a cross where that was missed."""
    rows = [row for row in rows if row.ratios]
    lines: dict[str, list[str]] = {
        "": [f"{row.case.workload} {'pNTK' if row.case.kind == 'pntk' else row.case.kind}" for row in rows],
        "---": ["---"] * len(rows),
        "seconds": [seconds_text(row.results[OURS].median) for row in rows],
    }
    for peer, name in (
        ("tutorial", "times faster than the tutorial"),
        ("rows", "times faster than the hand-written way"),
    ):
        lines[name] = [_aimed(row.ratios[peer], getattr(row.case.bars, peer), row.checks()[peer]) for row in rows]
    lines["peak memory of the process, MB"] = [
        _aimed(row.results[OURS].peak_mb, row.case.bars.peak_mb, row.checks()["peak_mb"]) for row in rows
    ]
    lines["the same of the hand-written way, MB"] = [f"{row.results['rows'].peak_mb:,.0f}" for row in rows]
    text = [f"| {' | '.join([name, *cells])} |" for name, cells in lines.items()]
    return "\n".join(text)


def _aimed(value: float, bar: float, met: bool) -> str:
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{number} ({bar:g})" + ("" if met else " \N{BALLOT X}")


# ---------------------------------------------------------------- for the terminal


def seconds_text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"


def render(rows: Sequence[Row], device: str) -> Table:
    """The table. The bars are those of two CPU cores and are left out on another device."""
    on_cpu = device == "cpu"
    table = Table(title="Exact tangent kernels: medians, and ratios beside what is asked", show_lines=True)
    for header in ("case", "ntkit", "tutorial", "rows", "x tutorial", "x rows", "peak MB", "plan / growth", "agrees"):
        table.add_column(header, justify="left" if header == "case" else "right")
    for row in rows:
        checks = row.checks()
        cells: list[str | Text] = [row.case.name]
        cells += [_time(row.results.get(name)) for name in (OURS, *PEERS)]
        for peer in PEERS:
            ratio, bar = row.ratios.get(peer), getattr(row.case.bars, peer)
            if ratio is None:
                cells.append("-")
            else:
                cells.append(_marked(f"{ratio:.3g}x", f">= {bar:g}x", checks.get(peer) if on_cpu else None))
        ours = row.results.get(OURS)
        peaks = " / ".join(f"{result.peak_mb:,.0f}" for name, result in row.results.items() if name in PEERS)
        if ours is not None and ours.runs:
            peak = f"{ours.peak_mb:,.0f}" + (f"\npeers {peaks}" if peaks else "")
            cells.append(_marked(peak, f"<= {row.case.bars.peak_mb:,.0f}", checks.get("peak_mb") if on_cpu else None))
        else:
            cells.append(f"peers {peaks}" if peaks else "-")
        if ours is not None and ours.planned_mb is not None:
            planned = f"{ours.planned_mb / ours.growth_mb:.2f}\n{ours.planned_mb:,.0f} / {ours.growth_mb:,.0f} MB"
            cells.append(_marked(planned, f"within {PLANNED:g}x", checks.get("planned_mb") if on_cpu else None))
        else:
            cells.append("-")
        distances = [result.distance for result in row.results.values() if result.distance is not None]
        worst = _worst(distances) if distances else None
        cells.append("-" if worst is None else _marked(f"{worst:.0e}", "", worst <= TOLERANCE))
        table.add_row(*cells)
    return table


def _time(result: Result | None) -> str | Text:
    if result is None:
        return "-"
    if result.error is not None:
        return Text(result.error[:60], style="red")
    spread = f"{seconds_text(result.fastest)} .. {seconds_text(result.slowest)}, {result.runs} runs"
    text = Text.assemble((seconds_text(result.median), "bold"), (f"\n{spread}\n{result.sizes}".rstrip(), "dim"))
    if result.others is not None and result.others > DISTURBED:
        text.append(f"\ndisturbed: {result.others:.1f} cores", style="yellow")
    return text


def _marked(value: str, bar: str, passed: bool | None) -> Text:
    if passed is None:
        return Text(value)
    mark, style = ("pass", "green") if passed else ("FAIL", "bold red")
    return Text.assemble((value, style), (f"\n{bar} {mark}" if bar else f" {mark}", style))
