"""Fashion-MNIST in 1, 10 and 50 images per class: learned points against plain ones, with a kernel and a network.

    NTKIT_DATA=... python -m benchmarks.condense.fashion --folder work [--kernel fc] [--per-class 1 10] [--seeds 3 3]

Every seed draws its images, its batches and its networks. "random" are images with their labels, "k-means" the centres
of every class, "LS" the same random images with solved labels, "KIP" the images moved, "KIP, labels" with their labels
learned as well. All 60,000 training images are targets; pixels are standardised; ridge 1e-6 tr(K_ss) / n; Adam with a
rate of 0.04 and class-balanced batches of 5,000 (1,000 with convolutions). Nothing is chosen by the 10,000 test images.

The kernel is that of one hidden ReLU layer at infinite width; the network has one of 1,024 units in the standard
parametrisation, trained by SGD on the points: momentum 0.9, batches of 100, L2 1e-3, least squares. With
`--kernel cntk` the kernel is that of two convolutions at infinite width, with `--kernel conv` the gradient features of
a small random convolutional network, whose points are judged as well with those of another one that was drawn anew;
the network is then a convolutional one of 32 and 64 channels.

Finished lines are in folder/fashion.jsonl, states of runs beside it: a killed script goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.condense import kernels
from benchmarks.lines import read
from benchmarks.scale.data import Images, fashion_mnist
from benchmarks.scale.record import record
from ntkit.kernel.function import KernelFunction
from ntkit.uses import condense

RECORDS = Path(__file__).parent / "records"
METHODS = ("random", "k-means", "LS", "KIP", "KIP, labels")
STEPS = {1: 300, 10: 300, 50: 150}
# Targets of a step. Features of networks cost more than an infinite-width kernel.
BATCH = {"fc": 5000, "cntk": 1000, "conv": 1000}
TRAINING = condense.Training(steps=1000, learning_rate=0.01)


def generator(*numbers: int) -> torch.Generator:
    """The same for the same numbers, another one for others."""
    return torch.Generator().manual_seed(sum(1000**k * number for k, number in enumerate(numbers)))


def points(
    method: str, kernel: KernelFunction, batch: int, data: Images, per_class: int, seed: int, folder: Path
) -> condense.Support:
    """A support set."""
    train = (data.x_train, data.y_train)
    draw = generator(seed, per_class)
    if method == "k-means":
        return condense.centre_support(train, per_class, generator=draw)
    start = condense.random_support(train, per_class, generator=draw)
    if method == "random":
        return start
    if method == "LS":
        return condense.label_solve(kernel, start, train).support
    settings = condense.Inducing(steps=STEPS[per_class], learn_labels=method == "KIP, labels", batch=batch)
    name = f"{'labels' if settings.learn_labels else 'images'}-{per_class}-{seed}"
    found = condense.kernel_inducing_points(
        kernel, start, train, generator=draw, settings=settings, folder=folder / name,
        progress=lambda done, total: print(f"\r{name}: {done} of {total}", end="", flush=True),
    )  # fmt: skip
    print()
    return found.support


def line(kernel_name: str, method: str, data: Images, per_class: int, seed: int, folder: Path) -> dict[str, Any]:
    """One method, one size, one seed: with the kernel, and with a network trained on the points."""
    inputs = data.x_train[0].numel()
    made_by = {"fc": partial(kernels.fc1, inputs), "cntk": kernels.cntk, "conv": partial(kernels.conv, seed)}
    kernel = made_by[kernel_name]()
    test, begin = (data.x_test, data.y_test), time.perf_counter()
    support = points(method, kernel, BATCH[kernel_name], data, per_class, seed, folder / kernel_name)
    made = time.perf_counter() - begin
    score = condense.fit(kernel, support).score(test)
    facts: dict[str, Any] = {
        "kernel": kernel_name, "method": method, "per_class": per_class, "seed": seed, "seconds": round(made, 1),
        "accuracy": score.accuracy, "loss": float(f"{score.loss:.5g}"), "condition": float(f"{score.condition:.4g}"),
    }  # fmt: skip
    if kernel_name == "conv":
        facts["other_draw"] = condense.fit(kernels.conv(seed + 100), support).score(test).accuracy
    make = partial(kernels.perceptron, inputs) if kernel_name == "fc" else _conv_network
    network = condense.train_network(make, support, test, generator=generator(seed, per_class, 7), training=TRAINING)
    return {**facts, "network_accuracy": network.accuracy, "network_loss": float(f"{network.loss:.5g}")}


def _conv_network() -> torch.nn.Module:
    return kernels.small_conv(int(torch.randint(2**31 - 1, ())), channels=32).float()


def write(lines: list[dict[str, Any]]) -> None:
    """One record for each kernel, of what there is."""
    for kernel in sorted({found["kernel"] for found in lines}):
        own = [{k: v for k, v in found.items() if k != "kernel"} for found in lines if found["kernel"] == kernel]
        own.sort(key=lambda found: (found["per_class"], METHODS.index(found["method"]), found["seed"]))
        facts = {
            "data": "Fashion-MNIST",
            "precision": "float64, networks float32",
            "steps": STEPS,
            "batch": BATCH[kernel],
        }
        record(f"fashion-{kernel}", {**facts, "lines": own}, RECORDS)


def finished(path: Path) -> set[tuple[str, str, int, int]]:
    """Read anew for every line, so that sizes can be given to several processes."""
    return {(found["kernel"], found["method"], found["per_class"], found["seed"]) for found in read(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--per-class", type=int, nargs="+", default=[1, 10, 50], choices=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 3, 2], help="for each size")
    parser.add_argument("--kernel", default="fc", choices=list(BATCH))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "fashion.jsonl"
    data, kernel = fashion_mnist(), options.kernel
    for per_class, seeds in zip(options.per_class, options.seeds, strict=True):
        for seed in range(1, seeds + 1):
            for method in METHODS:
                if (kernel, method, per_class, seed) not in finished(path):
                    found = line(kernel, method, data, per_class, seed, options.folder)
                    with path.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                    print(found, flush=True)
            write(read(path))


if __name__ == "__main__":
    main()
