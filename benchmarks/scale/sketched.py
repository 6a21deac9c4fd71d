"""Regression with sketched kernels on a whole image data set, by a CNN of W2's size, as built and after training.

    NTKIT_DATA=... python -m benchmarks.scale.sketched cifar10 --folder /tmp/cifar

The pNTK and the trace kernel (mean over two random-sign combinations of the logits, each with a sketch of its own),
D = 4,096 features each, ridge by GCV. Features, weights and the state of training are kept in FOLDER; the same command
goes on where the last has stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ntkit
from benchmarks.scale.data import Images, cifar10_jpeg, fashion_mnist
from benchmarks.scale.record import peak_mb, record
from ntkit.kernel.store import Store
from ntkit.solve.primal import PrimalRegression
from ntkit.solve.ridge import GCV
from ntkit.tangent.sketch import Sketch

SETS: dict[str, Callable[[], Images]] = {"cifar10": cifar10_jpeg, "fashion": fashion_mnist}
SIZE, EPOCHS, BATCH = 4096, 2, 128


def network(channels: int) -> nn.Module:
    """W2's layers for images of so many channels, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
            nn.AvgPool2d(2), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


def train(model: nn.Module, data: Images, folder: Path, tick: Callable[[int, int], None]) -> None:
    """Cross-entropy, Adam with a one-cycle rate; after every epoch everything is written down."""
    steps = -(-len(data.x_train) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, EPOCHS * steps)
    state = folder / "training.pt"
    done = 0
    if state.exists():
        before = torch.load(state, weights_only=True)
        model.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
        schedule.load_state_dict(before["schedule"])
        done = before["epochs"]
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(done, EPOCHS):
        order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(epoch))
        for step, batch in enumerate(order.split(BATCH)):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x_train[batch]), data.y_train[batch]).backward()
            optimizer.step()
            schedule.step()
            tick(epoch * steps + step + 1, EPOCHS * steps)
        whole = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "epochs": epoch + 1,
        }  # fmt: skip
        torch.save(whole, state.with_suffix(".partial"))
        state.with_suffix(".partial").replace(state)
    model.eval().to(memory_format=torch.contiguous_format)


@torch.no_grad()
def accuracy(outputs: Tensor, y: Tensor) -> float:
    return float((outputs.argmax(1) == y).double().mean())


@torch.no_grad()
def own_outputs(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(500)])


class Clock:
    """Seconds of each step over all starts, kept on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def step(self, name: str, progress: Progress) -> Iterator[Callable[[int, int], None]]:
        bar, start = progress.add_task(name, total=None), time.perf_counter()
        try:
            yield lambda done, total: progress.update(bar, completed=done, total=total)
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 1)
            self.path.write_text(json.dumps(self.seconds))


def feature_map(tangent: ntkit.Tangent, trace: bool, x: Tensor, place: Path) -> ntkit.FeatureMap:
    """That of the features which are there, or a new one that keeps the leading directions of the first images."""
    if Store.exists(place):
        return ntkit.FeatureMap.stored(tangent, place)
    leading = ntkit.Leading.of(tangent, x, generator=torch.Generator().manual_seed(1))
    return ntkit.FeatureMap(tangent, Sketch(SIZE, 1, trace, leading))


def regressions(
    model: nn.Module, state: str, data: Images, folder: Path, clock: Clock, bars: Progress
) -> dict[str, Any]:
    """Both kernels of one state of the network: features on disk, ridge by GCV, accuracy and measured error."""
    y = F.one_hot(data.y_train, 10).double() - 0.1
    readouts = {
        "pntk": (ntkit.SumOfLogits(), False),
        "trace": (ntkit.RandomLogits(2, torch.Generator().manual_seed(0)), True),
    }
    found: dict[str, Any] = {"network": accuracy(own_outputs(model, data.x_test), data.y_test)}
    for name, (readout, trace) in readouts.items():
        tangent = ntkit.linearize(model, readout=readout)
        with clock.step(f"{state}: {name} directions", bars):
            made = feature_map(tangent, trace, data.x_train, folder / f"{state}-{name}-train.zarr")
        parts = {}
        for part, x in (("train", data.x_train), ("test", data.x_test)):
            with clock.step(f"{state}: {name} features, {part}", bars) as tick:
                parts[part] = made.save(x, folder / f"{state}-{name}-{part}.zarr", progress=tick)
        with clock.step(f"{state}: {name} regression", bars) as tick:
            fit = PrimalRegression.decompose(parts["train"], y, progress=tick).fit(GCV())
            error = parts["train"].error(examples=48, generator=torch.Generator().manual_seed(2), x=data.x_train)
            predicted = fit.predict(parts["test"])
        found[name] = {
            "accuracy": accuracy(predicted, data.y_test),
            "relative_ridge": fit.relative_ridge,
            "gcv": fit.gcv,
            "effective_dimension": fit.effective_dimension,
            "kernel_error": error.error,
            "kernel_error_standard_error": error.standard_error,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SETS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--first", type=int, help="only so many training images, a fifth as many for the test: a trial")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(folder / "seconds.json")
    with Progress() as bars:
        with clock.step("reading the images", bars):
            data = SETS[options.data]()
            if options.first:
                data = data.first(options.first, options.first // 5)
        model = network(data.x_train.shape[1]).eval()
        states = {"as built": regressions(model, "built", data, folder, clock, bars)}
        weights = folder / "trained.safetensors"
        if not weights.exists():
            with clock.step("training", bars) as tick:
                train(model, data, folder, tick)
            save_file(model.state_dict(), weights)
        model.load_state_dict(load_file(weights))
        states["trained"] = regressions(model.eval(), "trained", data, folder, clock, bars)
    found = {
        "what": f"regression with sketched kernels, D = {SIZE}, CNN of W2's size, {EPOCHS} epochs of training",
        "data": data.name,
        "train": len(data.x_train),
        "test": len(data.x_test),
        "states": states,
        "steps_seconds": clock.seconds,
        "seconds": round(sum(clock.seconds.values()), 1),
        "peak_mb": peak_mb(),
        "disk_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
    }
    if options.first:
        print(json.dumps(found, indent=1))
        return
    print(record(f"sketched-{options.data}", found).read_text())


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
