"""Supervision under label noise: does a filtered teacher help, and more so with more noise?

    NTKIT_DATA=... python -m benchmarks.distill.noise --folder work [--tasks "digits;fashion"] [--workers 1]

Noise as published: for a share of the examples the label is drawn anew from all C classes, the true one among them, so
that a share * (1 - 1/C) is wrong. The labels of the validation examples are as noisy; the test labels are clean. One
teacher for each seed and share gives all targets; its students begin at the same weights as it did and train as long.
Temperature 1, no hard labels. The best validation accuracy chooses the epoch of every network; the last epoch is in the
lines as well.

What was chosen how: sizes, epochs and the rates of "fast" were written down before the first run. Its teachers were at
their best validation accuracy after 5 to 10 epochs, long before the 20 of the filter's memory, which is not the
situation that the filter was published in. So the others have lower rates, such that this epoch is near 50 with noise,
by the number of steps times the rate and the validation accuracy of seed 99, which is not among those below.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.distill.training import Job, Recipe, Trained, accuracy, read, run, said, train
from benchmarks.scale.data import fashion_mnist
from ntkit.uses import distill

C = 10
SHARES, SEEDS = (0.0, 0.2, 0.4), tuple(range(5))
METHODS = ("one-hot", "LS", "KD", "ESKD", "Filter-KD", "Filter-KD, debiased")


@dataclass(frozen=True)
class Split:
    """Examples and clean labels of the three parts."""

    x: tuple[Tensor, Tensor, Tensor]
    y: tuple[Tensor, Tensor, Tensor]


def digits(seed: int) -> Split:
    """scikit-learn's digits: 1,000 to train, 297 to validate, 500 to test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(pixels / 16, dtype=torch.float32)[order]
    return _split(x - x[:1000].mean(0), torch.tensor(labels)[order].long(), (1000, 297, 500))


def fashion(seed: int) -> Split:
    """Fashion-MNIST: 2,000 of the training images to train, 500 to validate, 5,000 test images; 14 x 14 pixels."""
    images = fashion_mnist()
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(seed))[:2500]
    x = nn.functional.avg_pool2d(torch.cat([images.x_train[order], images.x_test[:5000]]), 2).flatten(1)
    return _split(x, torch.cat([images.y_train[order], images.y_test[:5000]]), (2000, 500, 5000))


def noisy(y: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The published noise: some labels are drawn anew from all classes."""
    chosen = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    found = y.clone()
    found[chosen] = torch.randint(C, (len(chosen),), generator=generator)
    return found


def _split(x: Tensor, y: Tensor, sizes: tuple[int, int, int]) -> Split:
    a, b, c = x.split(sizes)
    d, e, f = y.split(sizes)
    return Split((a, b, c), (d, e, f))


def _perceptron(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, C))


_DIGITS = Recipe(partial(_perceptron, 64, 128), 0.01, 200, 64, decay=5e-4, cosine=True)
TASKS = {
    "digits": (digits, _DIGITS),
    "fashion": (fashion, Recipe(partial(_perceptron, 196, 64), 0.005, 200, 64, decay=5e-4, cosine=True)),
    "digits, fast": (digits, replace(_DIGITS, rate=0.1, epochs=100, batch_size=32)),
}


@dataclass(frozen=True)
class Noisy:
    """One seed: labels to train and validate with, and test labels drawn the same way."""

    seed: int
    split: Split
    y: tuple[Tensor, Tensor, Tensor]

    def job(self, targets: distill.Targets, tables: dict[str, distill.EMATargets] | None = None) -> Job:
        validation = self.split.x[1], self.y[1]
        return Job(self.split.x[0], targets, validation, self.seed, {} if tables is None else tables)


def drawn(task: str, share: float, seed: int) -> Noisy:
    split, generator = TASKS[task][0](seed), torch.Generator().manual_seed(1000 + seed)
    a, b, c = (noisy(y, share, generator) for y in split.y)
    return Noisy(seed, split, (a, b, c))


def one(task: str, share: float, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """All methods for one share of noise."""
    torch.set_num_threads(1)
    recipe, data = TASKS[task][1], [drawn(task, share, seed) for seed in seeds]
    labels, tables = [distill.OneHot(d.y[0], C) for d in data], [_tables(len(d.y[0])) for d in data]
    teachers = train(recipe, [d.job(y, t) for d, y, t in zip(data, labels, tables, strict=True)])
    runs: list[tuple[str, Noisy, distill.Targets]] = []
    for d, filtered, teacher in zip(data, tables, teachers, strict=True):
        best = recipe.network()
        teacher.best.restore(model=best, **filtered)
        runs += [
            ("LS", d, distill.Smoothed(d.y[0], C, 0.9)),
            ("KD", d, distill.TeacherTargets.of(teacher.model, d.split.x[0])),
            ("ESKD", d, distill.TeacherTargets.of(best, d.split.x[0])),
            *((name, d, table) for name, table in filtered.items()),
        ]
    students = train(recipe, [d.job(targets) for _, d, targets in runs])
    all_runs = [*(("one-hot", d, y) for d, y in zip(data, labels, strict=True)), *runs]
    return [
        {"task": task, "share": share, "seed": d.seed, **measured(name, recipe, d, targets, found)}
        for (name, d, targets), found in zip(all_runs, [*teachers, *students], strict=True)
    ]


def _tables(size: int) -> dict[str, distill.EMATargets]:
    return {
        "Filter-KD": distill.EMATargets(size, C),
        "Filter-KD, debiased": distill.EMATargets(size, C, debias=True),
    }


def measured(method: str, recipe: Recipe, data: Noisy, targets: distill.Targets, found: Trained) -> dict[str, Any]:
    """Of the student at its best validation accuracy, and at its last epoch.

    The calibration error is also taken with test labels as noisy as those that were trained on: a network that knows
    the noise is calibrated there, and must be less sure than it is right where labels are clean.
    """
    x, y = data.split.x[2], data.split.y[2]
    student = recipe.network()
    found.best.restore(model=student)
    best, last = said(student, x), said(found.model, x)
    near = distill.supervision(targets.table(), distill.OneHot(data.split.y[0], C).table())
    bins = distill.EqualWidth(10)  # as in the public code
    return {
        "method": method,
        "accuracy": accuracy(best, y), "accuracy_last": accuracy(last, y),
        "ece": distill.reliability(best, y, bins).ece, "ece_last": distill.reliability(last, y, bins).ece,
        "ece_noisy": distill.reliability(best, data.y[2], bins).ece,
        "target_rms": near.root_mean_square, "target_right": near.agreement,
        "train_accuracy_last": accuracy(said(found.model, data.split.x[0]), targets.table().argmax(1)),
        "best_epoch": found.best.epoch + 1,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tasks", default=";".join(TASKS), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "noise.jsonl"
    done = {(line["task"], line["share"], line["seed"]) for line in read(path)}
    jobs = []
    for task in options.tasks.split(";"):
        for share in SHARES:
            left = tuple(seed for seed in SEEDS[: options.seeds] if (task, share, seed) not in done)
            jobs += [(task, share, left)] if left else []
    run(one, jobs, path, options.workers)


if __name__ == "__main__":
    main()
