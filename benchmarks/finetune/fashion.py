"""Probe, then fine-tune, on real images: a network trained on Fashion-MNIST classes 0 to 4, adapted to 5 to 9.

    NTKIT_DATA=... python -m benchmarks.finetune.fashion --folder work [--seeds 0,1,2]

Every run is a line of work/fashion.jsonl, and what a killed run has finished is beside it; the same command goes on
where it was stopped. With --foresee afterwards, how far the features will go by the linearised network, from every
checkpoint of two heads: lines of work/foreseen.jsonl. Rates were chosen on seed 100, for a head that ends with little
energy and a fine-tuning that does not throw the features about.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.scale.data import Images, fashion_mnist
from ntkit.uses import finetune

SEEDS = (0, 1, 2)
TAUS = (0, 1, 2, 4, 8, 16, 32, 64)
FEATURES, LABELS, MEASURED = 64, 500, 2500
HEADS = {
    "linear": (finetune.LinearHead("head"), 0.0),
    "MLP": (finetune.MLPHead("head", width=128, depth=2), 0.0),
    "linear, smoothed": (finetune.LinearHead("head"), 0.1),
    "re-initialised": (finetune.Reinitialised("neck", finetune.LinearHead("head")), 0.0),
}
RATE, EPOCHS, BATCH, PRETRAINED = 0.0005, 20, 50, 300
PROBING = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)
FINETUNING = partial(torch.optim.SGD, lr=RATE, momentum=0.9, nesterov=True)


class Network(nn.Module):
    """Three convolutions of stride 2, a linear layer to the features, and a head."""

    def __init__(self, classes: int = 5, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, narrow in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(wide, narrow, 3, stride=2, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.neck = nn.Linear(64 * width, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.body(x)).relu())


def chosen(images: Images, classes: range, train: int, test: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some training and test images of some classes, which are counted from 0."""
    generator, found = torch.Generator().manual_seed(seed), []
    for x, y, count in ((images.x_train, images.y_train, train), (images.x_test, images.y_test, test)):
        of = torch.nonzero((y >= classes.start) & (y < classes.stop))[:, 0]
        some = of[torch.randperm(len(of), generator=generator)[:count]]
        found += [x[some], y[some] - classes.start]
    return found[0], found[1], found[2], found[3]


def pretrained(x: Tensor, y: Tensor, *, steps: int, seed: int, width: int = 16) -> Network:
    """A network trained by Adam, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network(int(y.max()) + 1, width)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(steps):
            some = torch.randint(len(x), (128,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
    return model.eval()


def run(images: Images, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One sweep over tau."""
    x, y, _, _ = chosen(images, range(5), 10_000, 10, seed)
    model = pretrained(x, y, steps=PRETRAINED, seed=seed)
    x, y, x_test, y_test = chosen(images, range(5, 10), LABELS, MEASURED, seed)
    head, smoothing = HEADS[name]
    start = time.perf_counter()
    sweep = finetune.probe_then_finetune(
        model, head, (x, y), (x_test, y_test),
        probing=finetune.Probing(TAUS, PROBING, batch_size=BATCH, smoothing=smoothing, seed=seed),
        finetuning=finetune.Finetuning(EPOCHS, FINETUNING, batch_size=BATCH, seed=seed),
        folder=folder / f"{name}-{seed}".replace(", ", "-"),
    )  # fmt: skip
    print(sweep, flush=True)
    return {
        "head": name, "seed": seed, "seconds": round(time.perf_counter() - start, 1),
        "energies": [round(e, 5) for e in sweep.energies], "rows": [asdict(row) for row in sweep.rows],
    }  # fmt: skip


def foreseen(images: Images, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Distances foreseen from every checkpoint of a finished sweep; a step with momentum counts ten times."""
    x, y, _, _ = chosen(images, range(5), 10_000, 10, seed)
    model = pretrained(x, y, steps=PRETRAINED, seed=seed)
    x, y, x_test, _ = chosen(images, range(5, 10), LABELS, MEASURED, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        split = HEADS[name][0].build(model, x, 5)
    heads, distances = load_file(folder / f"{name}-{seed}" / "probe.safetensors"), {}
    start = time.perf_counter()
    for tau in TAUS:
        state = {key.partition("/")[2]: t for key, t in heads.items() if key.startswith(f"{tau}/")}
        split.model.load_state_dict(state, strict=False)
        ahead = finetune.foresee(
            split, x, y, learning_rate=10 * RATE, steps=EPOCHS * LABELS // BATCH, at=x_test[:500]
        )  # fmt: skip
        distances[tau] = round(ahead.distance, 4)
    seconds = round(time.perf_counter() - start, 1)
    return {"head": name, "seed": seed, "seconds": seconds, "distances": distances}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--foresee", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    what, names = (foreseen, ("linear", "MLP")) if options.foresee else (run, tuple(HEADS))
    path, images = options.folder / ("foreseen.jsonl" if options.foresee else "fashion.jsonl"), fashion_mnist()
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(line["head"], line["seed"]) for line in map(json.loads, lines)}
    for seed in map(int, options.seeds.split(",")):
        for name in names:
            if (name, seed) not in done:
                found = what(images, name, seed, options.folder)
                with path.open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
