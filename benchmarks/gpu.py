"""W1 to W4 on a GPU beside the peers, and what whole data sets would take: `python -m benchmarks.gpu --out FILE`.

One process for all, since a GPU's time is dear: contenders take turns for three rounds, each with its best chunk of a
few, after one run that warms up. float32 throughout, without TF32. Seconds are of the whole computation, to the last
kernel's end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ntkit
from benchmarks.cases import CASES, OURS, PEERS, Case
from benchmarks.machine import environment
from benchmarks.measure import CONTENDERS, Compute, checksum, timed
from benchmarks.record import Job
from benchmarks.scale.clusters import imagenet_resnet
from benchmarks.workloads import WORKLOADS
from ntkit.kernel import forecast
from ntkit.kernel.saved import layout_of

ROUNDS = 3
CHUNKS = (None, 32)
# Bytes of gradients that a peer may hold.
ROOM = 30e9


def case_on(case: Case, examples: int, device: torch.device) -> dict[str, Any]:
    """All contenders on one kernel matrix."""
    workload = WORKLOADS[case.workload]
    torch.manual_seed(0)
    model, x = workload.model().to(device), workload.data(examples).to(device)
    job = Job(case.workload, case.kind, OURS, examples, device=device.type)
    found: dict[str, Any] = {
        "case": f"{case.workload} {case.kind}",
        "n": examples,
    }
    runs: dict[str, Any] = {OURS: CONTENDERS[OURS](model, x, job)}
    sums = {OURS: checksum(timed(runs[OURS], 1, 0.0, device)[2].detach())}
    for name in PEERS:
        if 2 * case.row_bytes * examples > ROOM:
            found[name] = "its gradients do not fit"
            continue
        best: tuple[float, int | None, Compute] | None = None
        for chunk in CHUNKS:
            try:
                tried = CONTENDERS[name](model, x, replace(job, contender=name, chunk=chunk))
                taken, _, kernel = timed(tried, 1, 0.0, device)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            if best is None or taken[0] < best[0]:
                best, sums[name] = (taken[0], chunk, tried), checksum(kernel.detach())
            del kernel
        if best is None:
            found[name] = "out of memory"
        else:
            runs[name], found[f"{name}_chunk"] = best[2], best[1]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, compute in runs.items():
            torch.cuda.reset_peak_memory_stats()
            seconds[name] += timed(compute, 3, 0.2, device)[0][:50]
            peaks[name] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found |= {"seconds": {name: float(f"{value:.4g}") for name, value in medians.items()}, "peak_mb": peaks}
    found["times_faster"] = {name: round(medians[name] / medians[OURS], 2) for name in medians if name != OURS}
    found["largest_difference"] = max((sums[OURS].distance(sums[name]) for name in sums if name != OURS), default=None)
    return found


def speeds(device: torch.device) -> dict[str, Any]:
    """Seconds for an example to be captured and for a pair to be contracted, in tiles that use the GPU's memory."""
    forecast.SAMPLE = 2048  # a GPU is not busy with the few examples that a CPU is measured by
    found = {}
    networks = {
        "cnn": (WORKLOADS["W2"].model(), (3, 32, 32), 4096),
        "resnet18": (imagenet_resnet(), (3, 224, 224), 256),
    }
    for name, (model, shape, n) in networks.items():
        readout = ntkit.SumOfLogits(select=None if name == "cnn" else lambda output: output.logits)
        kernel = ntkit.TangentKernel(
            ntkit.linearize(model.to(device).eval(), readout=readout), torch.randn(n, *shape), memory=20 * 10**9
        )
        taken = forecast.measure(kernel, layout_of(kernel, "float32", 20 * 10**9))
        found[name] = {"seconds_a_capture": taken.capture, "seconds_a_pair": taken.pair}
    return found


def markdown(record: dict[str, Any]) -> list[str]:
    """The cases of a record as a table."""
    rows = [
        "| | N | ntkit, s | tutorial, s | rows, s | ntkit, MB | tutorial, MB | rows, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        seconds = [f"{case['seconds'][name]:.3f}" if name in case["seconds"] else "-" for name in (OURS, *PEERS)]
        peaks = [f"{case['peak_mb'][name]:,.0f}" if name in case["peak_mb"] else "-" for name in (OURS, *PEERS)]
        rows.append(f"| {case['case']} | {case['n']:,} | {' | '.join([*seconds, *peaks])} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--more", type=int, default=8, help="and with so many times the examples (%(default)s)")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    record: dict[str, Any] = {"environment": environment(torch.get_num_threads(), device.type)}
    record["environment"]["gpu"] = torch.cuda.get_device_name(device)
    record["cases"] = []
    for case in CASES:
        if case.bars.tutorial is None:
            continue
        for times in (1, options.more):
            record["cases"].append(case_on(case, case.examples * times, device))
            print(json.dumps(record["cases"][-1]), flush=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    record["speeds"] = speeds(device)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["speeds"]))


if __name__ == "__main__":
    main()
