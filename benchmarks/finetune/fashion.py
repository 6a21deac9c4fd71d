"""Probe, then fine-tune, on real images: a network trained on Fashion-MNIST classes 0 to 4, adapted to 5 to 9.

    NTKIT_DATA=... python -m benchmarks.finetune.fashion --folder work [--seeds 0,1,2]

Every run is a line of work/fashion.jsonl, and what a killed run has finished is beside it; the same command goes on
where it was stopped. With --foresee afterwards, how far the features will go by the linearised network, from every
checkpoint of two heads: lines of work/foreseen.jsonl. Rates were chosen on seed 100, for a head that ends with little
energy and a fine-tuning that does not throw the features about.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.finetune import sweeping
from benchmarks.finetune.sweeping import Line
from benchmarks.scale.data import Images, fashion_mnist
from ntkit.uses import finetune

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


def run(images: Images, name: str, seed: int, options: Any) -> Line:
    """One sweep over tau."""
    x, y, _, _ = chosen(images, range(5), 10_000, 10, seed)
    model = pretrained(x, y, steps=PRETRAINED, seed=seed).to(options.device)
    x, y, x_test, y_test = chosen(images, range(5, 10), LABELS, MEASURED, seed)
    head, smoothing = HEADS[name]
    sweep = finetune.probe_then_finetune(
        model, head, (x, y), (x_test, y_test),
        probing=finetune.Probing(TAUS, PROBING, batch_size=BATCH, smoothing=smoothing, seed=seed),
        finetuning=finetune.Finetuning(EPOCHS, FINETUNING, batch_size=BATCH, seed=seed),
        folder=options.folder / f"{name}-{seed}".replace(", ", "-"),
    )  # fmt: skip
    print(sweep, flush=True)
    return sweeping.facts(sweep)


def foreseen(images: Images, name: str, seed: int, options: Any) -> Line:
    """Distances foreseen from every checkpoint of a finished sweep; a step with momentum counts ten times."""
    x, y, _, _ = chosen(images, range(5), 10_000, 10, seed)
    model = pretrained(x, y, steps=PRETRAINED, seed=seed)
    x, y, x_test, _ = chosen(images, range(5, 10), LABELS, MEASURED, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        split = HEADS[name][0].build(model, x, 5)
    heads, distances = load_file(options.folder / f"{name}-{seed}" / "probe.safetensors"), {}
    split.model.to(options.device)
    for tau in TAUS:
        state = {key.partition("/")[2]: t for key, t in heads.items() if key.startswith(f"{tau}/")}
        split.model.load_state_dict(state, strict=False)
        ahead = finetune.foresee(
            split, x, y, learning_rate=10 * RATE, steps=EPOCHS * LABELS // BATCH, at=x_test[:500]
        )  # fmt: skip
        distances[tau] = round(ahead.distance, 4)
    return {"distances": distances}


def main() -> None:
    parser = sweeping.parser(__doc__)
    parser.add_argument("--foresee", action="store_true")
    options = parser.parse_args()
    name = "foreseen" if options.foresee else "fashion"
    seeds, images = sweeping.begin(options, name), fashion_mnist()
    what, names = (foreseen, ("linear", "MLP")) if options.foresee else (run, tuple(HEADS))
    keys = [{"head": head, "seed": seed} for seed in seeds for head in names]
    sweeping.pieces(options.folder / f"{name}.jsonl", keys, lambda head, seed: what(images, head, seed, options))


if __name__ == "__main__":
    main()
