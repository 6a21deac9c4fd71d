"""The toy study of Ren, Guo and Sutherland (2022): are targets that are nearer to the truth better to learn from?

    python -m benchmarks.distill.toy --folder work [--workers 1]

Three Gaussian classes in 30 dimensions, so that p* is known; 5,000 training, 5,000 validation, 90,000 test points; a
multilayer perceptron 30-128-128-3, SGD with momentum 0.9, a constant rate of 5e-4, batches of 32, the network of the
best validation accuracy. Means are drawn once for each seed, and how far they are from each other makes a task hard or
easy: the accuracy of Bayes' rule is in every line.

The named targets are trained as in the public notebook, 100 epochs each from weights of its own and in an order of its
own, with ten seeds, 0 to 9, instead of one. "ESKD, teacher's start" has the weights and the order of its teacher
instead. The 48 mixed targets (there 120) are trained for 30 epochs on the data of seed 0, from the same weights. Every
run is a line of work/toy.jsonl; the same command goes on where it was stopped, by 12 mixtures or 5 seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.distill.training import Job, Recipe, Trained, accuracy, run, said, train
from benchmarks.lines import read
from ntkit.uses import distill

C, D, VARIANCE = 3, 30, 6.0
TRAIN, VALIDATION, TEST = 5000, 5000, 90_000
SHARES = tuple(k / 47 for k in range(48))
SEEDS = tuple(range(10))
NAMED = ("OHT", "LS", "GT", "KD", "ESKD", "ESKD, teacher's start", "Filter-KD")


@dataclass(frozen=True)
class Toy:
    """Points, drawn classes and the true probabilities, split in three."""

    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    p: tuple[Tensor, ...]


def drawn(seed: int) -> Toy:
    """Class means uniform on {-1, 0, 1}^30, points normal around them with variance 6."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randint(-1, 2, (C, D), generator=generator).float()
    n = TRAIN + VALIDATION + TEST
    y = torch.randint(C, (n,), generator=generator)
    x = means[y] + VARIANCE**0.5 * torch.randn(n, D, generator=generator)
    p = (-torch.cdist(x.double(), means.double()).square() / (2 * VARIANCE)).softmax(1).float()
    parts = (TRAIN, VALIDATION, TEST)
    return Toy(x.split(parts), y.split(parts), p.split(parts))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, C))


LONG = Recipe(network, rate=5e-4, epochs=100, batch_size=32)
SHORT = Recipe(network, rate=5e-4, epochs=30, batch_size=32)


def measured(kind: str, seed: int, toy: Toy, targets: distill.Targets, found: Trained, **more: Any) -> dict[str, Any]:
    """One line: how near the targets were, and how good the student at its best validation accuracy is."""
    last = said(found.model, toy.x[2])
    student = network()
    found.best.restore(model=student)
    p, near = said(student, toy.x[2]), distill.supervision(targets.table(), toy.p[0])
    bins = distill.EqualWidth(C)
    return {
        "kind": kind, "seed": seed, **more,
        "target_mean": near.mean, "target_frobenius": near.frobenius,
        "accuracy": accuracy(p, toy.y[2]), "accuracy_last": accuracy(last, toy.y[2]),
        "ece": distill.reliability(p, toy.y[2], bins).ece, "ece_last": distill.reliability(last, toy.y[2], bins).ece,
        "distance": distill.supervision(p, toy.p[2]).mean,
        "bayes": accuracy(toy.p[2], toy.y[2]), "best_epoch": found.best.epoch + 1,
    }  # fmt: skip


def mixed(seed: int, shares: tuple[float, ...]) -> list[dict[str, Any]]:
    """Mixtures of one-hot labels and ground truth."""
    toy = drawn(seed)
    labels, truth = distill.OneHot(toy.y[0], C), distill.Given(toy.p[0])
    targets = [distill.Mixed(labels, truth, share) for share in shares]
    found = train(SHORT, [Job(toy.x[0], t, (toy.x[1], toy.y[1]), seed, seed) for t in targets])
    return [measured("mixed", seed, toy, t, f, share=share) for share, t, f in zip(shares, targets, found, strict=True)]


def named(seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """All named supervisions; the network with one-hot labels is the teacher of the last four."""
    toys = [drawn(seed) for seed in seeds]
    one_hot = [distill.OneHot(toy.y[0], C) for toy in toys]
    tables = [distill.EMATargets(TRAIN, C) for _ in toys]
    teachers = train(
        LONG,
        [
            _job("OHT", *each, {"table": t})
            for each, t in zip(zip(seeds, toys, one_hot, strict=True), tables, strict=True)
        ],
    )
    runs = list(zip(("OHT",) * len(seeds), seeds, toys, one_hot, strict=True))
    for seed, toy, teacher, table in zip(seeds, toys, teachers, tables, strict=True):
        best = network()
        teacher.best.restore(model=best, table=table)
        early = distill.TeacherTargets.of(best, toy.x[0])
        others: dict[str, distill.Targets] = {
            "LS": distill.Smoothed(toy.y[0], C, 0.97),
            "GT": distill.Given(toy.p[0]),
            "KD": distill.TeacherTargets.of(teacher.model, toy.x[0]),
            "ESKD": early,
            "ESKD, teacher's start": early,
            "Filter-KD": table,
        }
        runs += [(name, seed, toy, targets) for name, targets in others.items()]
    students = train(LONG, [_job(*each) for each in runs[len(seeds) :]])
    return [measured(*each, found) for each, found in zip(runs, [*teachers, *students], strict=True)]


def _job(
    name: str, seed: int, toy: Toy, targets: distill.Targets, tables: dict[str, distill.EMATargets] | None = None
) -> Job:
    own = seed if name == "ESKD, teacher's start" else 100 * NAMED.index(name) + seed
    return Job(toy.x[0], targets, (toy.x[1], toy.y[1]), own, own, {} if tables is None else tables)


def one(kind: str, seeds: tuple[int, ...], shares: tuple[float, ...]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return mixed(seeds[0], shares) if kind == "mixed" else named(seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", choices=("mixed", "named"))
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "toy.jsonl"
    lines = read(path)
    done = {(line["kind"], line["seed"], line.get("share", 0.0)) for line in lines}
    left = [share for share in SHARES if ("mixed", 0, share) not in done]
    jobs: list[tuple] = [("mixed", (0,), tuple(left[k : k + 12])) for k in range(0, len(left), 12)]
    seeds = [seed for seed in SEEDS if any((name, seed, 0.0) not in done for name in NAMED)]
    jobs += [("named", tuple(seeds[k : k + 5]), ()) for k in range(0, len(seeds), 5)]
    run(one, [job for job in jobs if options.only in (None, job[0])], path, options.workers)


if __name__ == "__main__":
    main()
