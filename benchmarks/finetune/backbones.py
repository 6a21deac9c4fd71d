"""Which backbone is best, predicted without training and then really fine-tuned: Fashion-MNIST classes 5 to 9.

    NTKIT_DATA=... python -m benchmarks.finetune.backbones --folder work [--seeds 0,1,2]

Predicted: squared error on new images, by GCV on the tangent kernel of one random logit, 500 labels. Beside it, what
that kernel's regression really has on test images, with 500 labels and with the 1,000 that the power law speaks of.
Truth: the network fine-tuned on the 500 labels from a head of zeros, by square loss and by cross-entropy, with the
better of two rates of Adam each (by test loss, for all candidates alike). Every candidate is a line of
work/backbones.jsonl; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune.fashion import Network, chosen, pretrained
from benchmarks.scale.data import Images, fashion_mnist
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.regression import regress
from ntkit.solve.ridge import GCV
from ntkit.tangent.linearize import linearize
from ntkit.uses import finetune

SEEDS = (0, 1, 2)
LABELS, MORE, MEASURED, EPOCHS = 500, 1000, 1500, 30
RATES = (0.0005, 0.002)
LOSSES = {"square": finetune.SquareLoss(), "cross-entropy": finetune.CrossEntropy()}


def candidates(images: Images, seed: int) -> dict[str, finetune.Candidate]:
    """Networks, checkpoints and layers, by name."""
    x, y, _, _ = chosen(images, range(5), 10_000, 10, seed)
    noise = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    trained = {steps: pretrained(x, y, steps=steps, seed=seed) for steps in (0, 30, 300, 1200)}
    found = {f"trained for {steps} steps": finetune.Candidate(model) for steps, model in trained.items()}
    return {
        **found,
        "wrong labels, 300 steps": finetune.Candidate(pretrained(x, noise, steps=300, seed=seed)),
        "half as wide, 300 steps": finetune.Candidate(pretrained(x, y, steps=300, seed=seed, width=8)),
        "twice as wide, not trained": finetune.Candidate(pretrained(x, y, steps=0, seed=seed, width=32)),
        "300 steps, head alone": finetune.Candidate(trained[300], parameters=()),
        "300 steps, last layer": finetune.Candidate(trained[300], parameters="neck.*"),
    }


def regressed(candidate: finetune.Candidate, data: tuple[Tensor, ...], count: int, seed: int) -> float:
    """Test error of the kernel regression that GCV speaks of, with another random head."""
    x, y, x_test, y_test = data
    model = Network()
    model.body, model.neck = candidate.model.body, candidate.model.neck
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.head = nn.Linear(model.head.in_features, 1)
    tangent = linearize(model.eval(), parameters=lambda name, _: taken(candidate, name))
    points, truth = (nn.functional.one_hot(t, 5).double() for t in (y[:count], y_test))
    fit = regress(TangentKernel(tangent, x[:count]), points, GCV())
    return float((fit.predict(TangentKernel(tangent, x_test, x[:count])) - truth).square().sum(1).mean())


def finetuned(candidate: finetune.Candidate, data: tuple[Tensor, ...], loss: str, seed: int) -> tuple[float, float]:
    """Test loss and accuracy after fine-tuning from a head of zeros, at the better rate."""
    x, y, x_test, y_test = data
    model = copy.deepcopy(candidate.model)
    model.head = nn.Linear(model.head.in_features, 5)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(taken(candidate, name))
    # the head alone: one parameter of the backbone is left to `fine-tuning`, which it cannot do without
    alone, rows = candidate.parameters == (), []
    for rate in RATES:
        adam = partial(torch.optim.Adam, lr=rate)
        probing = finetune.Probing((EPOCHS if alone else 0,), adam, batch_size=50, seed=seed)
        tuning = finetune.Finetuning(EPOCHS, adam, batch_size=50, seed=seed)
        if alone:
            model.neck.bias.requires_grad_(True)
            tuning = finetune.Finetuning(1, partial(torch.optim.SGD, lr=0.0), batch_size=None)
        sweep = finetune.probe_then_finetune(
            model, finetune.OwnHead("head"), (x, y), (x_test, y_test), probing=probing, finetuning=tuning,
            loss=LOSSES[loss],
        )  # fmt: skip
        # the square loss is half the squared error
        rows.append((sweep.best.loss * (2 if loss == "square" else 1), sweep.best.accuracy))
    return min(rows)


def taken(candidate: finetune.Candidate, name: str) -> bool:
    """Whether a parameter is tuned."""
    if name.startswith("head.") or candidate.parameters is None:
        return True
    return candidate.parameters == "neck.*" and name.startswith("neck.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    path, images = options.folder / "backbones.jsonl", fashion_mnist()
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(line["candidate"], line["seed"]) for line in map(json.loads, lines)}
    for seed in map(int, options.seeds.split(",")):
        left = {n: c for n, c in candidates(images, seed).items() if (n, seed) not in done}
        data = chosen(images, range(5, 10), MORE, MEASURED, seed)
        few = (data[0][:LABELS], data[1][:LABELS], *data[2:])
        for name, candidate in left.items():
            with path.open("a") as file:
                file.write(json.dumps(line(name, candidate, data, few, seed)) + "\n")


def line(
    name: str, candidate: finetune.Candidate, data: tuple[Tensor, ...], few: tuple[Tensor, ...], seed: int
) -> dict[str, Any]:
    found = {"candidate": name, "seed": seed, **predicted(name, candidate, few, seed)}
    found["regressed"] = round(regressed(candidate, data, LABELS, seed), 5)
    found["regressed_more"] = round(regressed(candidate, data, MORE, seed), 5)
    start = time.perf_counter()
    for loss in LOSSES:
        value, accuracy = finetuned(candidate, few, loss, seed)
        found |= {f"{loss} loss": round(value, 5), f"{loss} accuracy": round(accuracy, 4)}
    found["seconds_finetuning"] = round(time.perf_counter() - start, 2)
    print(found, flush=True)
    return found


def predicted(name: str, candidate: finetune.Candidate, few: tuple[Tensor, ...], seed: int) -> dict[str, float]:
    """What is said without training, and the time it takes."""
    start = time.perf_counter()
    ranking = finetune.rank_backbones(
        {name: candidate}, few[0], few[1], head="head", at=MORE, generator=torch.Generator().manual_seed(seed)
    )
    row = ranking.best
    return {
        "seconds": round(time.perf_counter() - start, 2), "trivial": round(ranking.trivial, 5),
        "predicted": round(row.predicted, 5), "leave_one_out": round(row.leave_one_out, 5),
        "extrapolated": round(row.extrapolated, 5),
    }  # fmt: skip


if __name__ == "__main__":
    main()
