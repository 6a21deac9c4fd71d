"""How many products with the full kernel conjugate gradients take, plain and with each preconditioner.

    python -m benchmarks.scale.iterations          # some minutes on one core; goes on where the last run has stopped
    python -m benchmarks.scale.iterations --again  # from the beginning

200 digits, C = 10, so that the kernel has 2,000 rows; ridge 1e-4 of its mean diagonal; to a relative residual of 1e-6;
float64. An MLP with two hidden ReLU layers, a CNN and a transformer, each as built and after cross-entropy training.
Every helper is counted by products with the full kernel, not by what it costs to make. What is recommended was chosen
on these; other networks, on which nothing was chosen, show whether it keeps its promise elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ntkit
from benchmarks.scale.record import RESULTS, record
from ntkit.solve.coarse import recommended
from ntkit.solve.iterative import ConjugateGradients, Preconditioner
from ntkit.solve.nystrom import nystrom
from ntkit.solve.precondition import coupling, kronecker
from ntkit.solve.ridge import Absolute

N, C, RIDGE, TOLERANCE, MOST = 200, 10, 1e-4, 1e-6, 20_000
# Features of the sketched trace kernel (8 N) and of the sketched full kernel (N C), and examples of Nystrom.
TRACE_SIZE, FULL_SIZE, DRAWN = 1600, 2000, 20
# Training: Adam on all examples in each step, until the loss is so small.
LOSS, STEPS = 0.1, 1000

SIZES = {
    "what": "iterations of conjugate gradients with the full kernel, plain and with each preconditioner",
    "dtype": "float64", "n": N, "rows": N * C, "relative_ridge": RIDGE, "tolerance": TOLERANCE,
    "features_of_trace_kernel": TRACE_SIZE,
    "features_of_full_kernel": FULL_SIZE, "examples_of_nystrom": DRAWN, "trained_to_loss": LOSS,
}  # fmt: skip
KINDS = (
    "none", "trace (x) I", "pNTK (x) I", "sketch (x) I", "trace (x) B", "pNTK (x) B", "sketch (x) B", "Nystrom",
    "Nystrom, trace (x) B", "recommended, trace", "recommended, pNTK", "recommended, sketch",
)  # fmt: skip
# What is counted for the other networks.
PROMISED = ("none", "recommended, trace", "recommended, sketch")
# The tables of the page.
REDUCED, MENDED = KINDS[:7], (KINDS[0], *KINDS[7:])
WANTED, MISSED = 4.0, "\N{BALLOT X}"

Make = Callable[[], Preconditioner | None]


class Transformer(nn.Module):
    """One encoder layer over the eight rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 32)
        self.place = nn.Parameter(torch.randn(8, 32) / 32**0.5)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x.view(-1, 8, 8)) + self.place).mean(1))


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, C))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, C),
    )  # fmt: skip


class Residual(nn.Module):
    """Two residual blocks with group normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)) for _ in range(2)
        )
        self.head = nn.Linear(16 * 16, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(-1, 1, 8, 8))
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.avg_pool2d(x, 2).flatten(1))


class Recurrent(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.GRU(8, 48, batch_first=True)
        self.head = nn.Linear(48, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x.view(-1, 8, 8))[0][:, -1])


def smooth() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, C)
    )


System = tuple[str, str, Callable[[], nn.Module], float]  # name, state, network, and the rate of its training
SYSTEMS: tuple[System, ...] = (
    ("MLP of width 256", "as built", lambda: perceptron(256), 0.0),
    ("MLP of width 128", "trained", lambda: perceptron(128), 1e-3),
    ("CNN", "as built", convolutions, 0.0),
    ("CNN", "trained", convolutions, 1e-2),
    ("transformer", "as built", Transformer, 0.0),
    ("transformer", "trained", Transformer, 3e-3),
)
# Networks that had no part in the choice.
OTHERS: tuple[System, ...] = (
    ("MLP of tanh and GELU", "as built", smooth, 0.0),
    ("MLP of tanh and GELU", "trained", smooth, 1e-3),
    ("residual CNN", "as built", Residual, 0.0),
    ("residual CNN", "trained", Residual, 3e-3),
    ("GRU", "as built", Recurrent, 0.0),
    ("GRU", "trained", Recurrent, 3e-3),
)


def digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels)[:N] / 16, torch.from_numpy(labels)[:N].long()


def train(model: nn.Module, x: Tensor, labels: Tensor, rate: float) -> int:
    """Cross-entropy training; the steps it took."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        if float(loss.detach()) < LOSS:
            return step
        loss.backward()
        optimizer.step()
    raise SystemExit(f"the loss is not below {LOSS} after {STEPS} steps")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def helpers(model: nn.Module, x: Tensor, ridge: float) -> dict[str, Make]:
    """What makes each preconditioner; those of a "recommended" row are the library's `recommended`."""
    tangent = ntkit.linearize(model)
    full, trace = ntkit.TangentKernel(tangent, x), ntkit.TangentKernel(tangent, x, trace=True)
    pntk = ntkit.TangentKernel(ntkit.linearize(model, readout=ntkit.SumOfLogits()), x)
    outputs = coupling(tangent, x, generator=seeded())

    def sketch() -> ntkit.FeatureKernel:
        return ntkit.features(tangent, x, size=TRACE_SIZE, trace=True, generator=seeded())

    def columns(base: Preconditioner | None = None) -> Preconditioner:
        return nystrom(full, ridge, examples=DRAWN, generator=seeded(), base=base)

    def features() -> ntkit.FeatureKernel:
        return ntkit.features(tangent, x, size=FULL_SIZE, generator=seeded(1))

    made: dict[str, Make] = {
        "none": lambda: None,
        "trace (x) I": lambda: kronecker(trace, C, ridge),
        "pNTK (x) I": lambda: kronecker(pntk, C, ridge),
        "sketch (x) I": lambda: kronecker(sketch(), C, ridge),
        "trace (x) B": lambda: kronecker(trace, outputs, ridge),
        "pNTK (x) B": lambda: kronecker(pntk, outputs, ridge),
        "sketch (x) B": lambda: kronecker(sketch(), outputs, ridge),
        "Nystrom": columns,
        "Nystrom, trace (x) B": lambda: columns(kronecker(trace, outputs, ridge)),
        "recommended, trace": lambda: recommended(features(), ridge, kernel=trace),
        "recommended, pNTK": lambda: recommended(features(), ridge, kernel=pntk),
        "recommended, sketch": lambda: recommended(features(), ridge),
    }
    assert tuple(made) == KINDS
    return made


def counted(system: System, kinds: Sequence[str], before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One network's numbers, after each solve; those of `before` are kept if they are of the same network."""
    name, state, make, rate = system
    torch.manual_seed(0)
    (x, labels), model = digits(), make().double()
    steps = train(model, x, labels, rate) if rate else 0
    model.eval()
    with torch.no_grad():
        logits = model(x)
    full = ntkit.TangentKernel(ntkit.linearize(model), x).dense()
    ridge = RIDGE * float(full.diagonal().mean())
    y = (F.one_hot(labels, C).double() - 1 / C).reshape(-1)
    facts = {
        "network": name, "state": state, "parameters": sum(p.numel() for p in model.parameters()),
        "training_rate": rate, "training_steps": steps,
        "loss": round(float(F.cross_entropy(logits, labels)), 4),
        "accuracy": round(float((logits.argmax(1) == labels).double().mean()), 3),
    }  # fmt: skip
    known: dict[str, int] = before["iterations"] if facts.items() <= before.items() else {}
    made = helpers(model, x, ridge)
    for kind in kinds:
        if kind in known:
            continue
        found = ConjugateGradients(TOLERANCE, MOST, made[kind]()).solve(full, y, Absolute(ridge))
        if not found.converged:
            raise SystemExit(f"{name}, {state}, {kind}: not converged in {MOST} iterations")
        known = {**known, kind: found.iterations}
        yield {**facts, "iterations": known}


def fewer(row: dict[str, Any], kind: str) -> float:
    """How many times fewer iterations than plain."""
    return row["iterations"]["none"] / row["iterations"][kind]


def table(kinds: Sequence[str], run: str = "iterations") -> list[str]:
    """The record's numbers for some preconditioners; a cross where they need more than a quarter of plain's."""
    rows = [f"| network | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    path = RESULTS / f"{run}.json"
    for row in json.loads(path.read_text())["networks"] if path.exists() else ():
        if not set(kinds) <= set(row["iterations"]):
            continue  # not finished
        cells = [f"{row['iterations']['none']:,}" if kind == "none" else _cell(row, kind) for kind in kinds]
        rows.append(f"| {row['network']} {row['state']} | {' | '.join(cells)} |")
    return rows


def _cell(row: dict[str, Any], kind: str) -> str:
    times = fewer(row, kind)
    return f"{row['iterations'][kind]:,} ({times:.1f}){' ' + MISSED if times < WANTED else ''}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="do not keep what has been counted")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    count("iterations", SYSTEMS, KINDS, again=options.again)
    count("iterations-others", OTHERS, PROMISED, again=options.again)
    tables = (table(REDUCED), table(MENDED), table(PROMISED, "iterations-others"))
    print("\n\n".join("\n".join(rows) for rows in tables))


def count(run: str, systems: Sequence[System], kinds: Sequence[str], *, again: bool) -> None:
    """Count what the record of this name does not have yet."""
    path, rows = RESULTS / f"{run}.json", {}
    if path.exists() and not again:
        rows = {(row["network"], row["state"]): row for row in json.loads(path.read_text())["networks"]}
    with Progress() as bars:
        bar = bars.add_task("solves", total=len(kinds) * len(systems))
        for system in systems:
            before = rows.get(system[:2], {})
            if set(before.get("iterations", {})) != set(kinds):
                for facts in counted(system, kinds, before):
                    rows[system[:2]] = facts
                    record(run, {**SIZES, "networks": list(rows.values())}, RESULTS)
                    bars.update(bar, completed=sum(len(row["iterations"]) for row in rows.values()))


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
