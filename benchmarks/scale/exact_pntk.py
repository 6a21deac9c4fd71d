"""The exact pNTK of N CIFAR-10 (JPEG q75) images and a CNN of W2's size, on disk; killed once on the way if asked.

    NTKIT_DATA=... python -m benchmarks.scale.exact_pntk 20000 --kill --folder /tmp/k

The matrix goes to FOLDER/pntk-N.zarr. The same command goes on where the last has stopped; the record then holds the
time of all starts together.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.scale.record import peak_mb, record


def compute(n: int, folder: Path, memory: float) -> None:
    """The work itself, in a process of its own: its peak is the process's."""
    from rich.progress import Progress

    import ntkit
    from benchmarks.scale.data import cifar10_jpeg
    from benchmarks.workloads import WORKLOADS

    x = cifar10_jpeg().x_train[:n].clone()
    kernel = ntkit.TangentKernel(ntkit.linearize(WORKLOADS["W2"].model(), readout=ntkit.SumOfLogits()), x)
    with Progress() as progress:
        bar = progress.add_task(f"{n:,} x {n:,}")
        kernel.save(
            folder / f"pntk-{n}.zarr",
            memory=int(memory * 1e9),
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--memory", type=float, default=3.8, help="working space in GB (1e9 bytes)")
    parser.add_argument("--kill", action="store_true", help="SIGKILL after a third of the tiles, and start again")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        compute(options.n, options.folder, options.memory)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / f"pntk-{options.n}.json"
    starts = json.loads(log.read_text()) if log.exists() else []
    command = [sys.executable, "-m", "benchmarks.scale.exact_pntk", str(options.n), "--folder", str(options.folder)]
    command += ["--memory", str(options.memory), "--inside"]
    for killed in [True, False] if options.kill else [False]:
        begin = time.perf_counter()
        process = subprocess.Popen(command)
        if killed:
            wait_for_third(options.folder / f"pntk-{options.n}.zarr", process)
            process.kill()
        code = process.wait()
        starts.append({"seconds": round(time.perf_counter() - begin, 1), "exit": code})
        log.write_text(json.dumps(starts))
        if code and not killed:
            raise SystemExit(code)
    import ntkit

    saved = ntkit.open_kernel(options.folder / f"pntk-{options.n}.zarr")
    path = record(
        f"exact-pntk-{options.n}",
        {
            "what": "the exact pNTK of a CNN of W2's size at initialisation, on disk",
            "data": "CIFAR-10 (JPEG q75)",
            "n": options.n,
            "tiles": len(saved.store.layout.tiles()),
            "edge": saved.store.layout.edge[0],
            "starts": starts,
            "seconds": round(sum(start["seconds"] for start in starts), 1),
            "peak_mb": peak_mb(resource.RUSAGE_CHILDREN),
            "disk_bytes": sum(f.stat().st_size for f in saved.path.rglob("*") if f.is_file()),
        },
    )
    print(path.read_text())


def wait_for_third(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a third of the tiles are there."""
    from ntkit.kernel.store import Store

    while process.poll() is None:
        if Store.exists(path):
            store = Store.open(path)
            if store.count_records() * 3 >= len(store.layout.tiles()):
                return
        time.sleep(1)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
