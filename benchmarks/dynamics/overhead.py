"""What recording 100 probes after every step adds to the step of a Fashion-MNIST network.

    NTKIT_DATA=... python -m benchmarks.dynamics.overhead

Blocks of steps with and without the recorder take turns, on all threads of the machine; ratios of medians. A probe
costs a forward pass and an example of the batch three, so that the part falls with the size of the batch.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.scale.data import folder
from benchmarks.scale.record import record
from ntkit.uses.dynamics import PathRecorder

RESULTS = Path(__file__).parent / "records"
PROBES, STEPS, BLOCKS = 100, 12, 8


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
    """Seconds of a step without and with the recorder."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recorder = PathRecorder(x[:PROBES], labels=y[:PROBES], folder=place / f"batch-{batch}")
    generator, done = torch.Generator().manual_seed(0), 0
    times: dict[bool, list[float]] = {False: [], True: []}
    for block in range(2 * BLOCKS + 2):
        watched = bool(block % 2)
        for _ in range(STEPS):
            some = torch.randint(len(x), (batch,), generator=generator)
            start = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
            done += 1
            if watched:
                recorder.record(model, done)
            if block > 1:  # the first two warm up
                times[watched].append(time.perf_counter() - start)
    plain, seen = median(times[False]), median(times[True])
    return {
        "batch": batch, "step_ms": round(1000 * plain, 2), "recorded_step_ms": round(1000 * seen, 2),
        "overhead": round(seen / plain - 1, 3),
    }  # fmt: skip


def main() -> None:
    x, y = images()
    with tempfile.TemporaryDirectory() as place:
        lines = [measured(batch, x, y, Path(place)) for batch in (64, 128, 256, 512)]
    for line in lines:
        print(line)
    record("overhead", {"probes": PROBES, "threads": torch.get_num_threads(), "lines": lines}, RESULTS)


if __name__ == "__main__":
    main()
