"""One kernel matrix, one contender, one process.

    python -m benchmarks.measure --workload W1 --kind pntk --contender rows --examples 256 --chunk 32

The last line of standard output is one JSON object. A contender that fails gives an object with its error in words.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.cases import OURS
from benchmarks.machine import busy_seconds
from benchmarks.record import Checksum, Job, Sample
from benchmarks.workloads import WORKLOADS

if TYPE_CHECKING:
    from ntkit import Readout

SLOW = 10.0  # seconds: a first run this long is timed as well, for what a warm-up saves is lost in it
CORNER = 6  # leading rows and columns that are kept
PROBES = 16

Compute = Callable[[], Tensor]


# ---------------------------------------------------------------- contenders


def ntkit(model: nn.Module, x: Tensor, job: Job) -> Compute:
    import ntkit as library

    return partial(library.empirical_ntk, model, x, readout=_readout(job))


def planned_mb(model: nn.Module, x: Tensor, job: Job) -> float:
    """What ntkit says, before any work, that the memory will grow by."""
    import ntkit as library

    tangent = library.linearize(model, readout=_readout(job))
    return library.TangentKernel(tangent, x).plan().bytes / 2**20


def _readout(job: Job) -> Readout:
    import ntkit as library

    return library.SumOfLogits() if job.kind == "pntk" else library.Logits()


def tutorial(model: nn.Module, x: Tensor, job: Job) -> Compute:
    return partial(peers.tutorial, model, x, _scalars(job), chunk=job.chunk, block=job.block)


def rows(model: nn.Module, x: Tensor, job: Job) -> Compute:
    return partial(peers.rows, model, x, _scalars(job), chunk=job.chunk, block=job.block)


def _scalars(job: Job) -> peers.Scalars:
    return peers.sum_of_logits if job.kind == "pntk" else peers.logits


CONTENDERS: dict[str, Callable[[nn.Module, Tensor, Job], Compute]] = {
    "ntkit": ntkit,
    "tutorial": tutorial,
    "rows": rows,
}


# ---------------------------------------------------------------- memory, MB of 2^20 bytes


def peak_mb(device: torch.device) -> float:
    """Peak so far: resident memory of the process, or allocated memory on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def now_mb(device: torch.device) -> float:
    """At this moment: resident memory of the process, or allocated memory on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return peak_mb(device)  # not Linux: the best that is known


# ---------------------------------------------------------------- measuring


def timed(compute: Compute, runs: int, seconds: float, device: torch.device) -> tuple[list[float], list[float], Tensor]:
    """Seconds and CPU seconds of each whole computation, and the last matrix: `runs` and `seconds` in all, at least.

    One run comes before them and is not counted, unless it took long.
    """
    samples: list[float] = []
    cpu: list[float] = []
    warm = False
    while True:
        kernel: Tensor | None = None  # the matrix of the run before must not count against this one
        start, work = time.perf_counter(), time.process_time()
        kernel = compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        passed = time.perf_counter() - start
        if warm or passed > SLOW:
            samples.append(passed)
            cpu.append(time.process_time() - work)
        warm = True
        if len(samples) >= runs and sum(samples) >= seconds:
            return samples, cpu, kernel


def checksum(kernel: Tensor) -> Checksum:
    """Numbers by which two contenders' matrices can be compared without keeping them."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(kernel.shape[0], PROBES, generator=generator).to(kernel)
    right = torch.randn(kernel.shape[1], PROBES, generator=generator).to(kernel)
    return Checksum(
        shape=[kernel.shape[0], kernel.shape[1]],
        norm=float(torch.linalg.norm(kernel)),
        trace=float(kernel.trace()),
        corner=kernel[:CORNER, :CORNER].tolist(),
        probes=(left * (kernel @ right)).sum(0).tolist(),
    )


def measure(job: Job) -> Sample:
    """Run one job in this process; an exception becomes a sample that says what went wrong."""
    sample = Sample(job=job, torch=torch.__version__)
    try:
        device = torch.device(job.device)
        torch.set_num_threads(job.threads)
        if device.type == "cuda":
            # float32 means float32: convolutions would use TF32, and the contenders would agree to three digits only.
            torch.backends.cudnn.allow_tf32 = False
            sample = replace(sample, device_name=torch.cuda.get_device_name(device))
        workload = WORKLOADS[job.workload]
        model, x = workload.model().to(device), workload.data(job.examples).to(device)
        compute = CONTENDERS[job.contender](model, x, job)
        before = now_mb(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        seconds, cpu, kernel = timed(compute, job.runs, job.seconds, device)
        # before the checksum, which is not the contender's
        peak, passed = peak_mb(device), time.perf_counter() - start
        others = None
        if busy is not None:
            others = max(0.0, (busy_seconds() or 0.0) - busy - (time.process_time() - own)) / passed
        return replace(
            sample,
            seconds=seconds,
            cpu_seconds=cpu,
            peak_mb=peak,
            growth_mb=peak - before,
            planned_mb=planned_mb(model, x, job) if job.contender == OURS else None,
            others=others,
            checksum=checksum(kernel.detach()),
        )
    except Exception as error:  # whatever a contender raises is its result
        text = " ".join(str(error).split())
        return replace(sample, error=f"{type(error).__name__}: {text}"[:500])


def parse(arguments: list[str] | None = None) -> Job:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__)
    parser.add_argument("--workload", required=True, choices=sorted(WORKLOADS))
    parser.add_argument("--kind", required=True, choices=["pntk", "full"])
    parser.add_argument("--contender", required=True, choices=sorted(CONTENDERS))
    parser.add_argument("--examples", required=True, type=int, metavar="N")
    parser.add_argument("--chunk", type=int, help="examples differentiated at a time, of the peers (all of a block)")
    parser.add_argument("--block", type=int, help="examples whose gradients are held, of the peers (all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="timed runs, at least (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="more runs until this many in all (%(default)s)")
    return Job(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    print(json.dumps(measure(parse()).as_json()))
