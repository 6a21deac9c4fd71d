"""The table of what has been done on the machine that the records name: `python -m benchmarks.scale.table`."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.scale.record import RESULTS

HEAD = ["| what | N | time | memory | disk |", "|---|---|---|---|---|"]


def found(name: str) -> dict[str, Any] | None:
    """One record, if it is there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def line(what: str, n: int, seconds: float, peak_mb: float, disk: float | None = None) -> str:
    """One row; bytes in decimal GB."""
    taken = f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
    room = "" if disk is None else f"{disk / 1e9:.1f} GB"
    return f"| {what} | {n:,} | {taken} | {peak_mb * 2**20 / 1e9:.1f} GB | {room} |"


def walls() -> list[str]:
    """What nobody has done: the full kernel as a matrix, (N C)^2 entries in float64, by arithmetic."""
    rows = []
    for data, n, outputs in (("CIFAR-10", 50_000, 10), ("ImageNet", 1_281_167, 1000)):
        terabytes = 8 * (n * outputs) ** 2 / 1e12
        room = f"{terabytes:.1f} TB" if terabytes < 1e6 else f"{terabytes / 1e6:.1f} million TB"
        rows.append(
            f"| *an estimate:* the full kernel of {data} as a matrix, {outputs:,} outputs | {n:,} | | | {room} |"
        )
    return rows


def table() -> list[str]:
    """All rows for which there is a record, and the walls."""
    rows = []
    for n in (20_000, 50_000):
        if exact := found(f"exact-pntk-{n}"):
            what = f"exact pNTK of a CNN with 0.26 M parameters, {exact['data']}, in {len(exact['starts'])} starts"
            rows.append(line(what, n, exact["seconds"], exact["peak_mb"], exact["disk_bytes"]))
        if solve := found(f"solve-pntk-{n}"):
            seconds = solve["seconds_read_and_factor"] + solve["seconds_solve"]
            what = f"ridge regression with that matrix, 10 right-hand sides, residual {solve['relative_residual']:.0e}"
            what += "" if solve.get("converged", True) else " (not converged)"  # older records do not say
            rows.append(line(what, n, seconds, solve["peak_mb"]))
    for name in ("cifar10", "fashion"):
        if run := found(f"sketched-{name}"):
            what = (
                f"regression with 4,096 sketched features, {run['data']}, pNTK and trace kernel, as built and trained, "
                "training included"
            )
            rows.append(line(what, run["train"], run["seconds"], run["peak_mb"], run["disk_bytes"]))
    if full := found("full-entk-4000"):
        residual = f"{full['relative_residual']:.0e}"
        what = f"regression with the full kernel of {full['rows']:,} rows by products, residual {residual}"
        rows.append(line(what, full["n"], full["seconds"], full["peak_mb"]))
    if check := found("full-entk-500"):
        difference = f"{check['dense']['relative_difference']:.0e}"
        what = f"the same with 500 images, which differs from the dense solution in float64 by {difference}"
        rows.append(line(what, check["n"], check["seconds"], check["peak_mb"]))
    return [*HEAD, *rows, *walls()]


def accuracies() -> list[str]:
    """Test accuracy of the sketched regressions beside the network's own."""
    rows = ["| data | state | network | pNTK regression | trace-kernel regression |", "|---|---|---|---|---|"]
    for name in ("cifar10", "fashion"):
        run = found(f"sketched-{name}") or {"states": {}}
        for state, facts in run["states"].items():
            cells = [f"{100 * value:.1f} %" for value in (facts["network"], *_both(facts))]
            rows.append(f"| {run['data']} | {state} | {' | '.join(cells)} |")
    return rows


def scaling() -> list[str]:
    """How much faster two processes were than one."""
    run = found("workers")
    if run is None:
        return []
    rows = ["| workers of one thread each | pool of processes | Dask |", "|---|---|---|"]
    seconds = {(one["workers"], one["through"]): one["seconds"] for one in run["runs"]}
    for count in (1, 2):
        rows.append(f"| {count} | {seconds[count, 'pool']:.0f} s | {seconds[count, 'dask']:.0f} s |")
    faster = run["times_faster_with_two"]
    return [*rows, f"| times faster with two | {faster['pool']:.2f} | {faster['dask']:.2f} |"]


def clusters() -> list[str]:
    """What data sets past one machine would take: by measured times, and by counted FLOPs."""
    run = found("clusters")
    if run is None:
        return []
    counts = list(run["clusters"][0]["hours_on_gpus"])
    rows = [
        f"| exact pNTK of | N | disk | on | {' | '.join(counts)} |",
        "|---|---|---|---|" + "---|" * len(counts),
    ]
    for one in run["clusters"]:
        start = f"| {one['network']} | {one['n']:,} | {one['disk_tb']:.1f} TB |"
        if "hours_on_machines_like_this" in one:
            rows.append(f"{start} machines like this (measured tasks) | {_times(one['hours_on_machines_like_this'])} |")
        rows.append(f"{start} GPUs (counted FLOPs) | {_times(one['hours_on_gpus'])} |")
        if (speeds := _measured_on_a_gpu(one["network"])) is not None:
            seconds = one["captures"] * speeds["seconds_a_capture"] + one["pairs"] * speeds["seconds_a_pair"]
            rows.append(f"{start} H200s (measured on one) | {_times({g: seconds / int(g) / 3600 for g in counts})} |")
    return rows


def _measured_on_a_gpu(network: str) -> dict[str, float] | None:
    """Seconds that an H200 takes to capture an example of a network, and to contract a pair (`benchmarks.gpu`)."""
    path = RESULTS.parents[1] / "results/2026-11-27-nvidia-h200.json"
    if not path.exists():
        return None
    return json.loads(path.read_text())["speeds"]["resnet18" if "ResNet" in network else "cnn"]


def _times(hours: dict[str, float]) -> str:
    return " | ".join(_time(value) for value in hours.values())


def _time(hours: float) -> str:
    if hours >= 72:
        return f"{hours / 24:.0f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 0.1 else f"{3600 * hours:.0f} s"


def projections() -> list[str]:
    """Sketched features beside rows by vmap(grad) and TRAK's projector."""
    run = found("projections")
    if run is None:
        return []
    rows = [
        "| network | images | ours | rows by `vmap(grad)` | rows and TRAK's projector | rows and a dense map at hand | "
        "times faster | our error | dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in run["workloads"]:
        rows_, trak = one["seconds_rows"], one["seconds_rows_and_trak"]
        dense = rows_ + one["seconds_of_dense_products_alone"]
        cells = [
            f"{value:.2f} s" if value < 10 else f"{value:.0f} s" for value in (one["seconds_ntkit"], rows_, trak, dense)
        ]
        cells.append(f"{one['times_faster']:.0f}, {dense / one['seconds_ntkit']:.0f}")
        cells += [f"{100 * one[name]:.1f} %" for name in ("error_ntkit", "error_dense_gaussian_expected")]
        rows.append(f"| {one['workload']} | {one['examples']} | {' | '.join(cells)} |")
    return rows


def forms() -> list[str]:
    """Forms that a sketch could take: error and work of each."""
    run = found("sketch-forms")
    if run is None:
        return []
    rows = [
        "| network and images | form | error | beside a dense map | MFLOP an image | CPU time an image |",
        "|---|---|---|---|---|---|",
    ]
    for case in run["cases"]:
        dense = case["error_dense_gaussian_expected"]
        for name, facts in case["forms"].items():
            error = f"{100 * facts['error']:.2f} ± {100 * facts['standard_error']:.2f} %"
            work = [
                f"{facts['mflop_an_example']:,.0f}" if "mflop_an_example" in facts else "",
                f"{facts['cpu_ms_an_example']:.1f} ms" if "cpu_ms_an_example" in facts else "",
            ]
            cells = [f"{case['network']}, {case['what']}", name, error, f"{facts['error'] / dense:.2f}", *work]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _both(facts: dict[str, Any]) -> list[float]:
    return [facts[kernel]["accuracy"] for kernel in ("pntk", "trace")]


if __name__ == "__main__":
    parts = (table(), accuracies(), projections(), forms(), scaling(), clusters())
    print("\n\n".join("\n".join(part) for part in parts))
