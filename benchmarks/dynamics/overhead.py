"""What recording 100 probes after every step adds to the step of a Fashion-MNIST network.

    NTKIT_DATA=... python -m benchmarks.dynamics.overhead

Every step is timed, and the recording after it; medians of the ratios of such pairs, since a machine may be slow for a
while. Seconds are those of the process's own processor time on one thread, so that other programs count little. A
probe costs a forward pass and an example of the batch three, so that the part falls with the size of the batch.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.scale.data import folder
from benchmarks.scale.record import record
from ntkit.tangent.examples import Examples
from ntkit.uses.dynamics import PathRecorder
from ntkit.uses.dynamics.looking import said

RESULTS = Path(__file__).parent / "records"
PROBES, STEPS, WARM = 100, 15, 3
BATCHES = (64, 128, 256, 512)


def network() -> nn.Module:
    """Two convolutions and two linear layers, 421,642 parameters: the usual small network for these images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def images() -> tuple[Tensor, Tensor]:
    """5,000 of the training images."""
    with np.load(folder() / "fashion_mnist.npz") as file:
        x = torch.from_numpy(file["x_train"][:5000]).float()[:, None] / 255
        return (x - x.mean()) / x.std(), torch.from_numpy(file["y_train"][:5000]).long()


def measured(batch: int, x: Tensor, y: Tensor, place: Path) -> dict[str, float | int]:
    """What recording takes, in parts of a training step: all of it, and what of it is not the forward pass."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recorder = PathRecorder(x[:PROBES], labels=y[:PROBES], folder=place / f"batch-{batch}")
    probes, generator = Examples(x[:PROBES]), torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {"step": [], "record": [], "forward": [], "plain": []}

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.process_time()
        call()
        times[name].append(time.process_time() - start)

    def step() -> None:
        some = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()

    def plain() -> Tensor:
        with torch.no_grad():
            return model(x[:PROBES])

    for number in range(STEPS + WARM):
        timed("step", step)
        timed("record", partial(recorder.record, model, number))
        timed("forward", partial(said, model, probes, None, PROBES))
        timed("plain", plain)
    kept = {name: found[WARM:] for name, found in times.items()}
    parts = {name: median(a / b for a, b in zip(kept[name], kept["step"], strict=True)) for name in ("record", "plain")}
    return {
        "batch": batch, "step_ms": round(1000 * median(kept["step"]), 2),
        "record_ms": round(1000 * median(kept["record"]), 2), "forward_ms": round(1000 * median(kept["forward"]), 2),
        "overhead": round(parts["record"], 3), "model_as_it_is": round(parts["plain"], 3),
    }  # fmt: skip


def storing(place: Path) -> dict[str, float]:
    """Milliseconds of wall time to write a record, and to force one to the disk."""
    found: dict[str, list[float]] = {"write_ms": [], "fsync_ms": []}
    body = bytes(PROBES * 40)
    for _ in range(50):
        start = time.perf_counter()
        with (place / "file").open("ab") as file:
            file.write(body)
            file.flush()
            middle = time.perf_counter()
            os.fsync(file.fileno())
        found["write_ms"].append(1000 * (middle - start))
        found["fsync_ms"].append(1000 * (time.perf_counter() - middle))
    return {name: round(median(values), 3) for name, values in found.items()}


def table() -> list[str]:
    """The record as it stands in the page."""
    found = json.loads((RESULTS / "overhead.json").read_text())
    rows = ["| batch | training step | recording | overhead | with the model run as it is |", "|---|---|---|---|---|"]
    for line in found["lines"]:
        rows.append(
            f"| {line['batch']} | {line['step_ms']:.0f} ms | {line['record_ms']:.0f} ms | {line['overhead']:.0%} | "
            f"{line['model_as_it_is']:.0%} |"
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    x, y = images()
    with tempfile.TemporaryDirectory() as place:
        lines = [measured(batch, x, y, Path(place)) for batch in BATCHES]
        disk = storing(Path(place))
    for line in (*lines, disk):
        print(line)
    record("overhead", {"probes": PROBES, "threads": torch.get_num_threads(), "lines": lines, "disk": disk}, RESULTS)


if __name__ == "__main__":
    main()
