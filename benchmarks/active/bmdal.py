"""Do the batches by a kernel agree, pick by pick, with those of the library that their rules come from?

    pip install bmdal-reg dill psutil
    NTKIT_DATA=... python -m benchmarks.active.bmdal

bmdal_reg (Holzmueller et al. 2022) and the designs here get the same features, the same labelled points and, where a
rule draws, the same state of torch's generator. Features: random ones of unequal lengths; what comes into the last
layer of a network trained on digits; and the gradients of its first logit, which bmdal_reg computes itself from the
network. Both work in float64. A posterior kernel has the noise SIGMA. The rest of bmdal_reg's settings are its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.active.results import RESULTS
from benchmarks.active.tasks import TASKS
from benchmarks.scale.record import record
from ntkit.kernel.base import Kernel
from ntkit.kernel.empirical import TangentKernel
from ntkit.kernel.features import FeatureKernel
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits
from ntkit.uses import active
from ntkit.uses.active import designs
from ntkit.uses.active.strategy import Round

SIGMA, LABELS, BATCH, SEEDS = 0.1, 40, 32, range(10)
# Rules for which bmdal_reg needs the features themselves, of which gradients have too many.
BY_FEATURES = ("Frank-Wolfe, posterior", "BAIT", "BAIT, forward and backward")
Ours = Callable[[active.Given, float | None], active.Strategy]


@dataclass(frozen=True)
class Rule:
    """One rule in both libraries.

    Attributes:
        method: its name in bmdal_reg.
        ours: makes the design from kernel and noise.
        chosen: labelled points count as chosen (mode TP); else by the posterior kernel that they leave (mode P).
        settings: of bmdal_reg.
    """

    method: str
    ours: Ours
    chosen: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def bait(kernel: active.Given, _: float | None) -> active.Strategy:
    """BAIT, whose noise is no choice of a mode."""
    return designs.Bait(kernel, SIGMA)


def bait_backward(kernel: active.Given, _: float | None) -> active.Strategy:
    """Its forward and backward form."""
    return designs.Bait(kernel, SIGMA, backward=True)


RULES = {
    "max-diag, posterior": Rule("maxdiag", designs.MaxDiag),
    "max-det, posterior": Rule("maxdet", designs.MaxDet),
    "max-det, labels chosen": Rule("maxdet", designs.MaxDet, True),
    "core-set, posterior": Rule("maxdist", designs.CoreSet),
    "core-set, labels chosen": Rule("maxdist", designs.CoreSet, True),
    "LCMD, posterior": Rule("lcmd", designs.LCMD),
    "LCMD, labels chosen": Rule("lcmd", designs.LCMD, True),
    "k-means++, labels chosen": Rule("kmeanspp", designs.KMeansPlusPlus, True),
    "Frank-Wolfe, posterior": Rule("fw", designs.FrankWolfe, False, {"allow_kernel_space_posterior": False}),
    "BAIT": Rule("bait", bait, False, {"bait_sigma": SIGMA}),
    "BAIT, forward and backward": Rule(
        "bait", bait_backward, False, {"bait_sigma": SIGMA, "overselection_factor": 2.0}
    ),
}


def theirs(base: str, model: nn.Module, x: Tensor, known: Tensor, pool: Tensor, name: str, seed: int) -> list[int]:
    """bmdal_reg's batch, as numbers of points."""
    from bmdal_reg.bmdal.algorithms import select_batch  # pyright: ignore[reportMissingImports]
    from bmdal_reg.bmdal.feature_data import TensorFeatureData  # pyright: ignore[reportMissingImports]

    rule = RULES[name]
    transforms = [("scale", [None])] if rule.chosen else [("train", [SIGMA, None])]
    data = {"train": TensorFeatureData(x[known]), "pool": TensorFeatureData(x[pool])}
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        found, facts = select_batch(
            BATCH, [model], data, None, base, transforms, rule.method,
            sel_with_train=rule.chosen, allow_float64=True, verbosity=0, **rule.settings,
        )  # fmt: skip
    if facts["selection_status"] is not None:
        raise RuntimeError(f"bmdal_reg gave up: {facts['selection_status']}")
    numbers = pool[found].tolist()
    return numbers[::-1] if rule.method == "maxdiag" else numbers  # which lists the best last


def ours(kernel: Kernel, x: Tensor, known: Tensor, pool: Tensor, name: str, seed: int) -> list[int]:
    """The batch of the design of that name."""
    rule = RULES[name]
    labels = torch.full((len(x),), -1)
    labels[known] = 0
    now = Round(
        linearize(nn.Linear(x.shape[1], 2).to(x)), x, labels, torch.ones(len(x)).double(), pool, BATCH,
        torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return rule.ours(active.Given(kernel), None if rule.chosen else SIGMA).choose(now).numbers.tolist()


def problem(kind: str, seed: int) -> tuple[str, nn.Module, Tensor, Kernel]:
    """bmdal_reg's kernel and network, the points, and the same kernel here."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "random features":
        x = torch.randn(600, 128, generator=draw).double() * (0.2 + torch.rand(600, 1, generator=draw).double())
        return "linear", nn.Linear(128, 1).double(), x, FeatureKernel(x)
    task, rng = TASKS["digits"], np.random.default_rng(seed)
    pool = task.pool(rng)
    some = rng.permutation(len(pool.said))[:200]
    labels = np.full(len(pool.said), -1)
    labels[some] = pool.said[some]
    network = active.Training(pool.x, task.network(pool), loss=task.loss, steps=task.steps, seed=seed)(labels).double()
    x = pool.x[:600].double()
    if kind == "last layer":
        hidden = network[:-1](x).detach()
        return "linear", network, hidden, FeatureKernel(hidden)
    first = nn.Sequential(*network[:-1], nn.Linear(network[-1].in_features, 1).double())
    with torch.no_grad():
        first[-1].weight.copy_(network[-1].weight[:1])
        first[-1].bias.copy_(network[-1].bias[:1])
    return "grad", first, x, TangentKernel(linearize(first, readout=Logits()), x)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    setattr(np, "Inf", np.inf)  # noqa: B010  bmdal_reg 3.0.2 still asks for it, and NumPy 2 no longer has it
    same: dict[str, dict[str, int]] = {}
    first: list[dict[str, Any]] = []
    start = time.perf_counter()
    for kind in ("random features", "last layer", "gradients"):
        same[kind] = {name: 0 for name in RULES if kind != "gradients" or name not in BY_FEATURES}
        for seed in SEEDS:
            base, model, x, kernel = problem(kind, seed)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))
            known, pool = order[:LABELS].sort().values, order[LABELS:].sort().values
            for name in same[kind]:
                a = theirs(base, model, x, known, pool, name, seed)
                b = ours(kernel, x, known, pool, name, seed)
                same[kind][name] += a == b
                if a != b:
                    at = next((i for i, (p, q) in enumerate(zip(a, b, strict=False)) if p != q), min(len(a), len(b)))
                    first.append({"features": kind, "rule": name, "seed": seed, "at": at, "shared": len({*a} & {*b})})
                    print(first[-1], flush=True)
        print(kind, same[kind], f"{time.perf_counter() - start:.0f} s", flush=True)
    found = {"bmdal_reg": version("bmdal-reg"), "batch": BATCH, "labels": LABELS, "sigma": SIGMA, "seeds": len(SEEDS),
             "same_batches": same, "differences": first}  # fmt: skip
    print(record("bmdal", found, RESULTS).read_text())


if __name__ == "__main__":
    main()
