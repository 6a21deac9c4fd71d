"""Which backbone is best, predicted without training and then really fine-tuned: Fashion-MNIST classes 5 to 9.

    NTKIT_DATA=... python -m benchmarks.finetune.backbones --folder work [--seeds 0,1,2]

Predicted: squared error on new images, by GCV on the tangent kernel of one random logit, 500 labels. Beside it, what
that kernel's regression really has on test images, with 500 labels and with the 1,000 that the power law speaks of.
Truth: the network fine-tuned on the 500 labels from a head of zeros, by square loss and by cross-entropy, with the
better of two rates of Adam each (by test loss, for all candidates alike). Every candidate is a line of
work/backbones.jsonl; the same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune import fashion, sweeping
from benchmarks.finetune.fashion import chosen
from benchmarks.finetune.sweeping import Line
from benchmarks.scale.data import Images, fashion_mnist
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.regression import regress
from ntkit.solve.ridge import GCV
from ntkit.tangent.linearize import linearize
from ntkit.uses import finetune

LABELS, MORE, MEASURED, EPOCHS = 500, 1000, 1500, 30
RATES = (0.0005, 0.002)
LOSSES = {"square": finetune.SquareLoss(), "cross-entropy": finetune.CrossEntropy()}


def candidates(images: Images, seed: int, device: str) -> dict[str, finetune.Candidate]:
    """Networks, checkpoints and layers, by name; all are trained on the processor, so that they are the same ones."""
    x, y, _, _ = chosen(images, range(5), 10_000, 10, seed)

    def pretrained(x: Tensor, y: Tensor, **how: int) -> nn.Module:
        return fashion.pretrained(x, y, seed=seed, **how).to(device)

    noise = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    trained = {steps: pretrained(x, y, steps=steps) for steps in (0, 30, 300, 1200)}
    found = {f"trained for {steps} steps": finetune.Candidate(model) for steps, model in trained.items()}
    return {
        **found,
        "wrong labels, 300 steps": finetune.Candidate(pretrained(x, noise, steps=300)),
        "half as wide, 300 steps": finetune.Candidate(pretrained(x, y, steps=300, width=8)),
        "twice as wide, not trained": finetune.Candidate(pretrained(x, y, steps=0, width=32)),
        "300 steps, head alone": finetune.Candidate(trained[300], parameters=()),
        "300 steps, last layer": finetune.Candidate(trained[300], parameters="neck.*"),
    }


def regressed(candidate: finetune.Candidate, data: tuple[Tensor, ...], count: int, seed: int) -> float:
    """Test error of the kernel regression that GCV speaks of, with another random head."""
    x, y, x_test, y_test = data
    model: Any = copy.copy(candidate.model)
    model._modules = dict(model._modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.head = nn.Linear(fashion.FEATURES, 1).to(device_of(model))
    tangent = linearize(model.eval(), parameters=lambda name, _: taken(candidate, name))
    points, truth = (nn.functional.one_hot(t, 5).double().to(device_of(model)) for t in (y[:count], y_test))
    fit = regress(TangentKernel(tangent, x[:count]), points, GCV())
    return float((fit.predict(TangentKernel(tangent, x_test, x[:count])) - truth).square().sum(1).mean())


def finetuned(candidate: finetune.Candidate, data: tuple[Tensor, ...], loss: str, seed: int) -> tuple[float, float]:
    """Test loss and accuracy after fine-tuning from a head of zeros, at the better rate."""
    x, y, x_test, y_test = data
    model: Any = copy.deepcopy(candidate.model)
    model.head = nn.Linear(fashion.FEATURES, 5).to(device_of(model))
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


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def taken(candidate: finetune.Candidate, name: str) -> bool:
    """Whether a parameter is tuned."""
    if name.startswith("head.") or candidate.parameters is None:
        return True
    return candidate.parameters == "neck.*" and name.startswith("neck.")


def main() -> None:
    options = sweeping.parser(__doc__).parse_args()
    seeds, images = sweeping.begin(options, "backbones"), fashion_mnist()
    for seed in seeds:
        data = chosen(images, range(5, 10), MORE, MEASURED, seed)
        named = candidates(images, seed, options.device)
        sweeping.pieces(
            options.folder / "backbones.jsonl", [{"candidate": name, "seed": seed} for name in named],
            lambda candidate, seed, named=named, data=data: line(candidate, named[candidate], data, seed),
        )  # fmt: skip


def line(name: str, candidate: finetune.Candidate, data: tuple[Tensor, ...], seed: int) -> Line:
    few = (data[0][:LABELS], data[1][:LABELS], *data[2:])
    found: Line = dict(predicted(name, candidate, few, seed))
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
        "seconds_predicting": round(time.perf_counter() - start, 2), "trivial": round(ranking.trivial, 5),
        "predicted": round(row.predicted, 5), "leave_one_out": round(row.leave_one_out, 5),
        "extrapolated": round(row.extrapolated, 5),
    }  # fmt: skip


if __name__ == "__main__":
    main()
