"""Probe, then fine-tune, on colour images: from CIFAR-10 (JPEG q75) classes 0 to 4 to classes 5 to 9 without JPEG.

    NTKIT_DATA=... python -m benchmarks.finetune.cifar --folder work --device cuda [--seeds 0,1,2]
    NTKIT_DATA=... python -m benchmarks.finetune.cifar --folder work --width 16 --threads 2     for a processor

A convolutional network is trained on the JPEG images of airplanes, automobiles, birds, cats and deer, and adapted to
dogs, frogs, horses, ships and trucks of the first 4,000 images with exact pixels: 500 labels, all others are measured
on. The two data sets share no class, so no image. Rates of fine-tuning come from --choose. Every sweep is a line of
work/cifar.jsonl; the same command goes on where it was stopped.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune import sweeping
from benchmarks.finetune.fashion import BATCH, EPOCHS, HEADS, LABELS, PROBING, TAUS
from benchmarks.finetune.sweeping import TRIAL_SEED, TRIED, Line
from benchmarks.scale.data import Images, cifar10_jpeg, cifar10_lossless
from ntkit.uses import finetune

OLD, NEW = range(5), range(5, 10)
WIDTH, FEATURES, STEPS, DRAWN = 64, 256, 2000, 128
RATES = (5e-4, 2e-3, 8e-3)
Side = tuple[Tensor, Tensor]


class Network(nn.Module):
    """Three stages of two convolutions with GroupNorm, a linear layer to the features, and a head."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, narrow in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            for inputs in (wide, narrow):
                layers += [nn.Conv2d(inputs, narrow, 3, padding=1), nn.GroupNorm(8, narrow), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.neck = nn.Linear(64 * width, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.body(x)).relu())


def of(x: Tensor, y: Tensor, classes: range) -> Side:
    """The images of some classes, which are counted from 0."""
    some = (y >= classes.start) & (y < classes.stop)
    return x[some], y[some] - classes.start


def pretrained(images: Images, options: Any, seed: int) -> tuple[Network, float]:
    """A network trained by Adam on the old classes, images flipped at random, and its accuracy on their test images."""
    x, y = (t.to(options.device) for t in of(images.x_train, images.y_train, OLD))
    width, steps = (16, 60) if options.quick else (options.width, STEPS)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network(width, len(OLD))
    model.to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = torch.randint(len(x), (DRAWN,), generator=generator)
        flipped = (torch.rand(DRAWN, generator=generator) < 0.5).to(options.device)[:, None, None, None]
        optimizer.zero_grad()
        drawn = x[some.to(options.device)]
        outputs = model(torch.where(flipped, drawn.flip(-1), drawn))
        nn.functional.cross_entropy(outputs, y[some.to(options.device)]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    seen, truth = of(images.x_test, images.y_test, OLD)
    with torch.no_grad():
        right = [model(part.to(options.device)).argmax(1).cpu() for part in seen.split(500)]
    return model, float((torch.cat(right) == truth).double().mean())


def task(seed: int, options: Any) -> tuple[Side, Side]:
    """Training images of the new classes, and all other images of theirs: exact pixels, standardised by all 4,000."""
    images = cifar10_lossless(4000)
    x, y = of(images.x_train, images.y_train, NEW)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:LABELS], order[LABELS : LABELS + 100 if options.quick else len(order)]
    return (x[train], y[train]), (x[test], y[test])


def run(model: nn.Module, options: Any, name: str, seed: int, rate: float, taus: tuple[int, ...]) -> finetune.Sweep:
    """One sweep over tau; the weights of all of them stay in memory."""
    head, smoothing = HEADS[name]
    sgd = partial(torch.optim.SGD, lr=rate, momentum=0.9, nesterov=True)
    return finetune.probe_then_finetune(
        model, head, *task(seed, options),
        probing=finetune.Probing(taus, PROBING, batch_size=BATCH, smoothing=smoothing, seed=seed),
        finetuning=finetune.Finetuning(1 if options.quick else EPOCHS, sgd, batch_size=BATCH, seed=seed),
        progress=sweeping.counter(f"{name}, rate {rate}, seed {seed}"),
    )  # fmt: skip


def main() -> None:
    asked = sweeping.parser(__doc__, quick=True, choose=True)
    asked.add_argument("--width", type=int, default=WIDTH, help="filters of the first stage (%(default)s)")
    options = asked.parse_args()
    seeds = sweeping.begin(options, "cifar")
    images, trials = cifar10_jpeg(), options.folder / "cifar_rates.jsonl"
    start = functools.cache(lambda seed: pretrained(images, options, seed))
    taus, every = (0, 2) if options.quick else TAUS, dict.fromkeys(HEADS, RATES)
    if options.choose:
        tried = taus if options.quick else TRIED
        sweeping.pieces(
            trials, [{"name": name, "rate": rate} for name in HEADS for rate in RATES],
            lambda name, rate: sweeping.tried(
                lambda: run(start(TRIAL_SEED)[0], options, name, TRIAL_SEED, rate, tried)
            ),
        )  # fmt: skip
        print(sweeping.chosen(trials, every))
        return
    rates = sweeping.chosen(trials, every)

    def piece(head: str, seed: int) -> Line:
        model, accuracy = start(seed)
        sweep = run(model, options, head, seed, rates[head], taus)
        print(sweep, flush=True)
        told = {
            "rate": rates[head],
            "width": options.width,
            "pretrained": round(accuracy, 4),
            "labels": LABELS,
            "measured": sweep.validation,
        }
        return {**told, **sweeping.facts(sweep)}

    keys = [{"head": head, "seed": seed} for seed in seeds for head in HEADS]
    sweeping.pieces(options.folder / "cifar.jsonl", keys, piece)


if __name__ == "__main__":
    main()
