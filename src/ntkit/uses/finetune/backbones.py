"""Which backbone will do best on a new task, without fine-tuning any: generalised cross-validation on its kernel.

Each candidate gets a random head of one logit; the tangent kernel of that logit, ridge regression on one-hot labels and
GCV then predict the squared error on new examples (Wei, Hu, Steinhardt, ICML 2022). Honest only as long as the kernel
has not seen the labels: the head is random, and nothing was trained on these examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.solve.regression import KernelRegression
from ntkit.solve.ridge import GCV, FixedRidge, SearchedRidge
from ntkit.tangent.examples import Examples
from ntkit.uses.finetune.candidates import Candidate, ExactKernel, KernelKind, checked, tangent_of
from ntkit.uses.finetune.copies import without_copies
from ntkit.uses.finetune.powerlaw import PowerLaw
from ntkit.uses.finetune.ranking import Ranked, Ranking
from ntkit.uses.finetune.split import Split
from ntkit.uses.finetune.targets import count_classes

# Sizes that the power law is fitted to, the smallest of them, and subsets of each that is smaller than all.
SIZES, SMALLEST, DRAWS = 6, 20, 3


def rank_backbones(
    candidates: Mapping[str, nn.Module | Candidate],
    x: Any,
    y: Tensor,
    *,
    generator: torch.Generator,
    head: str | Sequence[str] = "fc",
    kernel: KernelKind | None = None,
    ridge: float | FixedRidge | SearchedRidge | None = None,
    at: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Predict the downstream loss of each candidate from its tangent kernel; nothing is trained.

    Args:
        candidates: networks, checkpoints, or the same network with other layers, by name.
        x: N examples of the new task, which no candidate was trained on; every candidate takes the same. Copies of
            an example with the same target are left out, with a `RepeatedExamplesWarning`.
        y: integer classes (N,), for which one output of each class is fitted; or points, (N, C) or (N,), as they are.
        generator: of random heads, sketches and subsets; the same for all candidates.
        head: names of the modules that a random logit takes the place of, where a candidate does not say.
        kernel: exact by default, with one head as in the paper.
        ridge: a rule or a number; the least GCV by default.
        at: number of examples to predict the loss for, by a power law through smaller subsets; N by default.
        progress: called with (candidates done, candidates in all).

    Cost, for each candidate: one kernel, and about 20 N^3.

    Raises:
        InputError: if there are no candidates, the data cannot be used, or all targets are equal.
        ModelError: if a candidate is in training mode or has no such module.
    """
    kernel, ridge = ExactKernel() if kernel is None else kernel, GCV() if ridge is None else ridge
    examples, classes = Examples(x), count_classes(y)
    if not candidates:
        raise InputError("there is no candidate: expected networks by name, {'resnet': model, ...}")
    if len(y) != len(examples):
        raise InputError(f"got {len(examples)} examples and {len(y)} targets: expected as many")
    own = without_copies(examples, y)
    if len(own) < len(examples):
        examples, y = Examples(examples.pick(own)), y[own]
    n = len(examples)
    if n < SMALLEST:
        raise InputError(f"got {n} different examples: expected {SMALLEST} or more")
    if bool((y == y[0]).all()):
        raise InputError(f"all targets are equal, {y[0].tolist()}: there is nothing to predict. Expected two or more")
    if kernel.heads < 1 or (at is not None and at < 1):
        raise InputError(f"heads and at are positive: got {kernel.heads!r} and {at!r}")
    asked = {name: c if isinstance(c, Candidate) else Candidate(c) for name, c in candidates.items()}
    splits = {name: checked(name, c, head, examples) for name, c in asked.items()}
    points = torch.nn.functional.one_hot(y.long(), classes).double() if not y.is_floating_point() else y.double()
    points = points[:, None] if points.ndim == 1 else points
    draws = _Draws.of(n, kernel.heads, generator)
    if at not in (None, n) and len(draws.subsets) < 2:
        raise InputError(f"{n} examples are too few to fit a power law and predict for at={at}")
    rows = []
    for name, candidate in asked.items():
        rows.append(_ranked(name, candidate, splits[name], _Job(examples, points, kernel, ridge, at, draws)))
        if progress is not None:
            progress(len(rows), len(asked))
    rows.sort(key=lambda row: row.extrapolated)
    trivial = float((points - points.mean(0)).square().sum(1).mean())
    return Ranking(tuple(rows), n, n if at is None else at, trivial)


@dataclass(frozen=True)
class _Draws:
    """What is drawn at random once, the same for all candidates.

    Attributes:
        seeds: of the heads.
        sketch: of the sketch.
        subsets: of the examples, by size.
    """

    seeds: tuple[int, ...]
    sketch: int
    subsets: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, n: int, heads: int, generator: torch.Generator) -> _Draws:
        drawn = torch.randint(2**62, (heads + 1,), generator=generator, device=generator.device).tolist()
        least = max(SMALLEST, n // 16)
        sizes = sorted({round(least * (n / least) ** (i / (SIZES - 1))) for i in range(SIZES)} - {n})
        subsets = {
            size: [torch.randperm(n, generator=generator, device=generator.device)[:size].cpu() for _ in range(DRAWS)]
            for size in sizes
        }
        return cls(tuple(drawn[:-1]), drawn[-1], subsets)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is the same for all candidates."""

    examples: Examples
    points: Tensor
    kernel: KernelKind
    ridge: float | FixedRidge | SearchedRidge
    at: int | None
    draws: _Draws


def _ranked(name: str, candidate: Candidate, split: Split, job: _Job) -> Ranked:
    seeds = job.draws.seeds if candidate.readout is None else job.draws.seeds[:1]
    matrix, count = torch.zeros((), dtype=torch.float64), 0
    for seed in seeds:
        tangent = tangent_of(candidate, split, job.examples, seed)
        count = tangent.count
        sketch = torch.Generator().manual_seed(job.draws.sketch ^ seed)
        matrix = matrix + job.kernel.of(tangent, job.examples.data, sketch) / len(seeds)
    points = job.points.to(matrix.device)
    regression = KernelRegression.decompose(matrix, points)
    fit = regression.fit(job.ridge)
    predicted = regression.expected_error(fit.ridge)
    law = _law(matrix, points, predicted, job)
    if law is None and job.at not in (None, len(points)):
        raise InputError(
            f"candidate {name!r}: predictions of 0 have no power law, and none for at={job.at}: leave `at` out"
        )
    return Ranked(
        name=name,
        predicted=predicted,
        leave_one_out=fit.leave_one_out,
        relative_ridge=fit.relative_ridge,
        law=law,
        # the law says by how much the loss falls; where it falls from is known better than the law goes through
        extrapolated=predicted if law is None or job.at is None else predicted * law.at(job.at) / law.at(len(points)),
        parameters=count,
        seen=candidate.seen or candidate.readout is not None,
    )


def _law(matrix: Tensor, points: Tensor, whole: float, job: _Job) -> PowerLaw | None:
    """The power law through the errors that subsets and all of them predict."""
    if len(job.draws.subsets) < 2:
        return None
    sizes, losses = [len(points)], [whole]
    for size, subsets in job.draws.subsets.items():
        places = [subset.to(matrix.device) for subset in subsets]
        found = [KernelRegression.decompose(matrix[some][:, some], points[some]) for some in places]
        sizes.append(size)
        losses.append(_pooled(found, job.ridge))
    if not all(loss > 0 for loss in losses):
        return None
    return PowerLaw.fit(sizes, losses)


def _pooled(found: Sequence[KernelRegression], ridge: float | FixedRidge | SearchedRidge) -> float:
    """Mean prediction of subsets of one size, at the one ridge best for all: the least of each would be too good."""
    if not isinstance(ridge, SearchedRidge):
        return fmean(r.expected_error(r.fit(ridge).ridge) for r in found)
    scores = {
        relative: fmean(ridge.score(r, relative * r.mean_diagonal) for r in found)
        for relative in ridge.grid
        if all(r.is_positive_definite(relative * r.mean_diagonal) for r in found)
    }
    if not scores:
        return found[0].fit(ridge).gcv  # says which ridge helps
    best = min(scores, key=lambda relative: scores[relative])
    return fmean(r.expected_error(best * r.mean_diagonal) for r in found)
