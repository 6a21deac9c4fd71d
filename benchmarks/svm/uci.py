"""The protocol of Arora et al. 2020 on the 60 UCI sets, resumable: one file for each set and method.

    python -m benchmarks.svm.uci --folder work [--workers 2] [--methods ntk,rbf,forest] [--sets iris,wine] [--clean]

Hyper-parameters are chosen on one cut of all rows into halves, by the accuracy on the second half, ties keep the first;
then the accuracies on the test rows of four draws are averaged. As in the study, the halves share rows with the draws'
test rows. `--clean` chooses for each draw on its training rows alone, cut by the same halves.

    ntk      infinitely wide fully connected ReLU networks: 1 to 5 layers, 0 to all but one of them fixed: 15 kernels,
             C 10^-2..10^4: 7 values, in the study's convention: no factor 2 in a layer, <x, x'> not divided, C as it is
    ntk-own  the same grid in this library's convention: a layer keeps the size of the signal, C is relative
    rbf      exp(-g |x-x'|^2): g 2^-15..2^3, C 2^-5..2^15, each in steps of 4: 10 x 11, the grid of LIBSVM's guide
    forest   scikit-learn's, 500 trees, features of a split 2, 4, 6, 8 (as the best forest of Fernandez-Delgado et al.
             2014) or the square root of all

Support vector machines are scikit-learn's. A fit ends after 5 10^8 / (training examples) steps of LIBSVM in a pair of
classes, and is scored as it is: a linear kernel with C = 10^4 on classes that overlap goes on for hours otherwise. How
many fits were ended so is written down. Seconds are those of the processor, in one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported, here and in worker processes

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics.pairwise import rbf_kernel

from benchmarks.active.tasks import folder as data_folder
from benchmarks.machine import environment, version
from ntkit.kernel.fully_connected import FullyConnected, family
from ntkit.report.files import replacing
from ntkit.solve.svm import SVM, search

DEPTHS = (1, 2, 3, 4, 5)
CONVENTIONS = {
    "ntk": {"weight_std": 1.0, "scaled_inputs": False},
    "ntk-own": {"weight_std": math.sqrt(2), "scaled_inputs": True},
}
NTK_CS = tuple(10.0**power for power in range(-2, 5))
RBF_CS = tuple(2.0**power for power in range(-5, 16, 2))
GAMMAS = tuple(2.0**power for power in range(-15, 4, 2))
TREES, FEATURES = 500, (2, 4, 6, 8)
STEPS = 500_000_000  # times training examples
DRAWS = 4
METHODS = ("ntk", "rbf", "forest")
Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Set:
    """A data set with its cuts.

    Attributes:
        x: (n, d), float64.
        y: classes, (n,).
        halves: training and validation rows for the hyper-parameters.
        draws: training and test rows, four times.
    """

    x: np.ndarray
    y: np.ndarray
    halves: Split
    draws: tuple[Split, ...]

    @classmethod
    def load(cls, name: str) -> Set:
        with np.load(data_folder() / "uci_classification.npz") as file:
            x, y, bits = (file[f"{name}/{part}"] for part in ("x", "y", "split"))
        x, y = x[: len(bits)].astype(np.float64), y[: len(bits)].astype(np.int64)
        cuts = [(np.flatnonzero(bits >> bit & 1 == 0), np.flatnonzero(bits >> bit & 1)) for bit in range(DRAWS + 1)]
        return cls(x, y, cuts[DRAWS], tuple(cuts[:DRAWS]))

    def without(self, draw: int) -> Split:
        """The halves less the test rows of a draw."""
        first, second = (np.setdiff1d(half, self.draws[draw][1]) for half in self.halves)
        return first, second


def steps(split: Split) -> int:
    """LIBSVM's steps at most, so that a fit takes seconds at most."""
    return STEPS // len(split[0])


def sets() -> dict[str, int]:
    """Names of the sets, with their number of rows, the largest first."""
    with np.load(data_folder() / "uci_classification.npz") as file:
        index = json.loads(str(file["index"]))
    return dict(sorted(((name, of["n1"]) for name, of in index.items()), key=lambda item: -item[1]))


# ---------------------------------------------------------------- the methods: choose, then score


@dataclass(frozen=True)
class Choice:
    """Hyper-parameters with the accuracy that chose them, and what it took."""

    chosen: dict[str, float]
    accuracy: float
    fits: int
    stopped: int = 0


def choose_ntk(data: Set, split: Split, convention: str) -> Choice:
    members = family(torch.from_numpy(data.x), DEPTHS, columns=torch.from_numpy(split[0]), **CONVENTIONS[convention])
    kernels = (((m.function.depth, m.function.fixed), m.matrix.numpy()) for m in members)
    found = search(
        kernels, data.y, [split], NTK_CS, columns=split[0], relative=convention == "ntk-own", max_iter=steps(split)
    )
    (depth, fixed), c = found.best
    return Choice({"depth": depth, "fixed": fixed, "C": c}, found.best_accuracy, found.fits, found.stopped)


def ntk(data: Set, chosen: dict[str, float], convention: str) -> np.ndarray:
    function = FullyConnected(int(chosen["depth"]), int(chosen["fixed"]), **CONVENTIONS[convention])
    return function(torch.from_numpy(data.x)).dense().numpy()


def choose_rbf(data: Set, split: Split) -> Choice:
    kernels = ((gamma, rbf_kernel(data.x, data.x[split[0]], gamma=gamma)) for gamma in GAMMAS)
    found = search(kernels, data.y, [split], RBF_CS, columns=split[0], relative=False, max_iter=steps(split))
    gamma, c = found.best
    return Choice({"gamma": gamma, "C": c}, found.best_accuracy, found.fits, found.stopped)


def rbf(data: Set, chosen: dict[str, float]) -> np.ndarray:
    return rbf_kernel(data.x, gamma=chosen["gamma"])


def machine_accuracy(matrix: np.ndarray, data: Set, split: Split, head: SVM) -> tuple[float, bool]:
    """On the second part of a split, and whether the fit was stopped."""
    train, test = split
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        machine = head.fit(matrix[np.ix_(train, train)], data.y[train])
    return float((machine.predict(matrix[np.ix_(test, train)]) == data.y[test]).mean()), bool(machine.fit_status_)


def forest_accuracy(data: Set, split: Split, features: int, seed: int) -> float:
    train, test = split
    forest = RandomForestClassifier(TREES, max_features=features, random_state=seed, n_jobs=1)
    return float(forest.fit(data.x[train], data.y[train]).score(data.x[test], data.y[test]))


def choose_forest(data: Set, split: Split) -> Choice:
    d = data.x.shape[1]
    tried = sorted({min(k, d) for k in (*FEATURES, max(1, round(math.sqrt(d))))})
    found = {features: forest_accuracy(data, split, features, 0) for features in tried}
    best = max(found, key=lambda features: found[features])  # the first of equal ones
    return Choice({"features": best}, found[best], len(tried))


def run(name: str, method: str, clean: bool) -> dict[str, Any]:
    """One method on one set."""
    torch.set_num_threads(1)
    data, start = Set.load(name), time.process_time()
    choose: Callable[[Set, Split], Choice]
    if method in CONVENTIONS:
        choose, kernel = partial(choose_ntk, convention=method), partial(ntk, convention=method)
    else:
        choose, kernel = (choose_rbf, rbf) if method == "rbf" else (choose_forest, None)
    choices = [choose(data, data.without(draw)) for draw in range(DRAWS)] if clean else [choose(data, data.halves)]
    chosen_at = time.process_time()
    accuracies, stopped, matrix, of = [], 0, None, None
    for draw, choice in zip(range(DRAWS), choices if clean else choices * DRAWS, strict=True):
        split, chosen = data.draws[draw], choice.chosen
        if kernel is None:
            accuracies.append(forest_accuracy(data, split, int(chosen["features"]), draw))
            continue
        if chosen != of:
            matrix, of = kernel(data, chosen), chosen
        assert matrix is not None
        accuracy, ended = machine_accuracy(
            matrix, data, split, SVM(chosen["C"], method == "ntk-own", None, steps(split))
        )
        accuracies.append(accuracy)
        stopped += ended
    end = time.process_time()
    return {
        "set": name, "method": method, "clean": clean, "accuracies": [round(a, 6) for a in accuracies],
        "chosen": [choice.chosen for choice in choices], "validation": [round(c.accuracy, 6) for c in choices],
        "fits": sum(c.fits for c in choices), "stopped": sum(c.stopped for c in choices), "stopped_draws": stopped,
        "seconds": round(end - start, 2), "seconds_search": round(chosen_at - start, 2),
    }  # fmt: skip


# ---------------------------------------------------------------- all of them


def file_of(folder: Path, name: str, method: str, clean: bool) -> Path:
    return folder / f"{name}.{method}{'.clean' if clean else ''}.json"


def missing(folder: Path, names: list[str], methods: list[str], clean: bool) -> Iterator[tuple[str, str]]:
    return ((name, method) for name in names for method in methods if not file_of(folder, name, method, clean).exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sets", default=None, help="names with commas; all by default")
    parser.add_argument("--clean", action="store_true")
    options = parser.parse_args()
    sizes, methods = sets(), options.methods.split(",")
    names = list(sizes) if options.sets is None else options.sets.split(",")
    unknown = [name for name in names if name not in sizes] + [m for m in methods if m not in (*METHODS, *CONVENTIONS)]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    machine = environment(1, "cpu") | {"dtype": "float64"} | {p: version(p) for p in ("scikit-learn", "scipy", "numpy")}
    (options.folder / "environment.json").write_text(json.dumps(machine, indent=1) + "\n")
    todo = list(missing(options.folder, names, methods, options.clean))
    work = {name: 2000 + rows**2 / 1000 for name, rows in sizes.items()}  # for the estimate of the time left
    whole = left = sum(work[name] for name, _ in todo)
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = {pool.submit(run, name, method, options.clean): (name, method) for name, method in todo}
        for number, job in enumerate(as_completed(jobs), 1):
            name, method = jobs[job]
            found = job.result()
            with replacing(file_of(options.folder, name, method, options.clean)) as file:
                file.write((json.dumps(found) + "\n").encode())
            left -= work[name]
            spent = time.perf_counter() - start
            ahead = spent * left / max(whole - left, 1)
            print(
                f"{number}/{len(todo)} {name} {method}: {100 * np.mean(found['accuracies']):.2f}% in "
                f"{found['seconds']:.0f} s; {spent:.0f} s so far, about {ahead:.0f} s to go",
                flush=True,
            )


if __name__ == "__main__":
    main()
