"""Machines on the kernels of real networks, finite and trained, beside the infinite one, on few examples.

    python -m benchmarks.svm.fewshot uci        the smallest UCI sets: networks trained on these very sets
    python -m benchmarks.svm.fewshot images     Fashion-MNIST: a network of five classes, few images of the others

Both go on where they stopped and write records/fewshot-uci.json and records/fewshot-images.json at the end.

uci: a ReLU network of two hidden layers of 512 units, He initialisation, 100 steps of Adam (1e-3) on all training rows.
C (relative) is chosen on the protocol's halves, with a network trained on the first of them; accuracies are means over
the four draws, each with a network of its own. Three seeds. Only sets of at most 350 rows.

images: a convolutional network of 3 layers trained on 6,000 images of the classes 0 to 4; then n = 10 to 160 images of
the classes 5 to 9, as many of each, and 1,000 test images; C (relative) by cross-validation on the n images. Ten seeds
of network and draw.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor, nn

from benchmarks.active.tasks import folder as data_folder
from benchmarks.finetune.sweeping import pieces
from benchmarks.lines import read
from benchmarks.scale.record import record
from benchmarks.svm.uci import DRAWS, Set, Split, sets
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.fully_connected import FullyConnected
from ntkit.solve.mlp import MLP
from ntkit.solve.svm import SVM, search
from ntkit.solve.svm_search import held_out
from ntkit.tangent.linearize import linearize

RECORDS = Path(__file__).parent / "records"
LARGEST, WIDTH, STEPS, SEEDS = 350, 512, 100, 3
SHOTS, IMAGE_SEEDS, PRETRAINING, TEST = (10, 20, 40, 80, 160), 10, 6000, 1000
Line = dict[str, Any]


def trace_kernel(model: nn.Module, rows: Tensor, cols: Tensor, parameters: str | None = None) -> np.ndarray:
    """The mean over the outputs of the empirical kernel of one output; with `parameters` that of a part."""
    tangent = linearize(model.eval(), parameters=parameters)
    return TangentKernel(tangent, rows, cols, trace=True).dense().double().numpy()


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int, generator: torch.Generator) -> nn.Module:
    """With Adam on cross-entropy; all examples at once where there are no more than `batch`."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        chosen = torch.randperm(len(x), generator=generator)[:batch]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model.eval()


# ---------------------------------------------------------------- networks trained on small UCI sets


def uci_kernels(data: Set, split: Split, seed: int) -> Iterable[tuple[str, np.ndarray]]:
    """Kernels between all rows and the training rows of a split; the network's own accuracy comes first, as (1, 1)."""
    x, y = torch.from_numpy(data.x).float(), torch.from_numpy(data.y)
    part = torch.from_numpy(split[0])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(WIDTH, 2)(x.shape[1], int(y.max()) + 1).float()
    read_out = "readout.*"
    yield "eNTK, initial", trace_kernel(model, x, x[part])
    yield "last layer, initial", trace_kernel(model, x, x[part], read_out)
    train(model, x[part], y[part], STEPS, len(part), torch.Generator().manual_seed(seed))
    yield "eNTK, trained", trace_kernel(model, x, x[part])
    yield "last layer, trained", trace_kernel(model, x, x[part], read_out)
    with torch.no_grad():
        right = model(x[split[1]]).argmax(1) == y[split[1]]
    yield "network", right.double().mean().reshape(1, 1).numpy()
    yield "infinite NTK", FullyConnected(3)(x.double(), x[part].double()).dense().numpy()


def uci_piece(name: str, seed: int) -> Line:
    data, start = Set.load(name), time.process_time()
    chosen = {}
    for label, matrix in uci_kernels(data, data.halves, seed):
        if label != "network":
            chosen[label] = search([(label, matrix)], data.y, [data.halves], columns=data.halves[0]).best[1]
    accuracies: dict[str, list[float]] = {}
    for draw in range(DRAWS):
        split = data.draws[draw]
        for label, matrix in uci_kernels(data, split, seed + 100 * (draw + 1)):
            accuracies.setdefault(label, []).append(
                matrix.item() if label == "network" else machine(matrix, split, data.y, chosen[label])
            )
    found = {label: round(float(np.mean(values)), 6) for label, values in accuracies.items()}
    return {"accuracies": found, "C": chosen, "cpu_seconds": round(time.process_time() - start, 2)}


def machine(matrix: np.ndarray, split: Split, y: np.ndarray, c: float) -> float:
    """Accuracy on the second part of a split, of a kernel whose columns are the first."""
    fitted = SVM(c).fit(matrix[split[0]], y[split[0]])
    return float((fitted.predict(matrix[split[1]]) == y[split[1]]).mean())


# ---------------------------------------------------------------- few images of new classes


def convolutional(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(256, outputs),
    )  # fmt: skip


def images_piece(seed: int) -> Line:
    """One network, and nested draws of few images."""
    start = time.process_time()
    with np.load(data_folder() / "fashion_mnist.npz") as file:
        x, y = file["x_train"], file["y_train"].astype(np.int64)
    rng = np.random.default_rng(seed)
    old = rng.permutation(np.flatnonzero(y < 5))[:PRETRAINING]
    new = [rng.permutation(np.flatnonzero(y == k)) for k in range(5, 10)]
    each = max(SHOTS) // 5
    # one of each class in turn, so that the first n are as many of each
    shots = np.stack([of[:each] for of in new], 1).ravel()
    tests = np.concatenate([of[each : each + TEST // 5] for of in new])
    scaled = torch.from_numpy((x.astype(np.float32) / 255 - 0.286) / 0.353)[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = convolutional(5)
    rows, labels = torch.from_numpy(np.concatenate([shots, tests])), y[np.concatenate([shots, tests])]
    examples = scaled[rows]
    few = examples[: len(shots)]
    kernels = {
        "eNTK, initial": trace_kernel(model, examples, few),
        "last layer, initial": trace_kernel(model, examples, few, "8.*"),
    }
    train(model, scaled[old], torch.from_numpy(y[old]), 600, 64, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        pretrained = float((model(scaled[old[:1000]]).argmax(1).numpy() == y[old[:1000]]).mean())
    kernels["eNTK, trained on other classes"] = trace_kernel(model, examples, few)
    kernels["last layer, trained on other classes"] = trace_kernel(model, examples, few, "8.*")
    flat = examples.flatten(1).double()
    kernels["infinite NTK of pixels"] = FullyConnected(3)(flat, flat[: len(shots)]).dense().numpy()
    kernels["RBF of pixels"] = rbf_kernel(flat.numpy(), flat[: len(shots)].numpy(), gamma=1 / flat.shape[1])
    found = {
        label: [round(few_accuracy(matrix, labels, len(shots), n), 6) for n in SHOTS]
        for label, matrix in kernels.items()
    }
    seconds = round(time.process_time() - start, 2)
    return {"accuracies": found, "pretrained_accuracy": pretrained, "cpu_seconds": seconds}


def few_accuracy(matrix: np.ndarray, labels: np.ndarray, tests: int, n: int) -> float:
    """Of a machine on the first n examples, on those from number `tests` on."""
    kernel, y = matrix[:n, :n], labels[:n]
    c = search([("k", kernel)], y, held_out(5, kernel, y - y.min())).best[1]
    fitted = SVM(c).fit(kernel, y)
    return float((fitted.predict(matrix[tests:, :n]) == labels[tests:]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("uci", "images"))
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"fewshot-{options.what}.jsonl"
    run: Callable[..., Line]
    if options.what == "uci":
        names = [name for name, rows in reversed(sets().items()) if rows <= LARGEST]
        keys, run = [{"name": name, "seed": seed} for seed in range(SEEDS) for name in names], uci_piece
    else:
        keys, run = [{"seed": seed} for seed in range(IMAGE_SEEDS)], images_piece
    pieces(path, keys, run)
    record(
        f"fewshot-{options.what}", {"shots": SHOTS if options.what == "images" else None, "lines": read(path)}, RECORDS
    )


if __name__ == "__main__":
    main()
