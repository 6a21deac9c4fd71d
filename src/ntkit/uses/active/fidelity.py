"""Whether a look-ahead is to be trusted: predicted changes beside those of networks that were really trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.tangent.examples import Examples
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits
from ntkit.uses.active.labels import as_labels, as_numbers, as_weights
from ntkit.uses.active.lookahead import LookAhead
from ntkit.uses.active.state import LookAheadState
from ntkit.uses.active.strategy import require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn


@dataclass(frozen=True, eq=False)
class Agreement:
    """Predicted and actual changes of predictions, one trained network for each candidate.

    Changes are those of probabilities for cross-entropy, of outputs for square loss, at points without a label.
    Training often goes further than one Newton step, but in its direction; so the foreseen changes of the outputs are
    taken times one number, the same for all candidates.

    Attributes:
        correlation: of all entries of both, with the changes of the outputs times `slope`.
        standard_error: of that, from leaving out one candidate after the other (jackknife).
        slope: with which the predicted changes come nearest to the actual ones, by least squares; from 0.01 to 100.
        unscaled: the correlation with a slope of 1.
        rank_correlation: Spearman's, of the sizes of the changes, one for each candidate: whether the order is right.
        predicted: sizes of the predicted changes, Frobenius norms, (candidates,).
        actual: sizes of the actual ones.
        candidates: their numbers.
    """

    correlation: float
    standard_error: float
    slope: float
    unscaled: float
    rank_correlation: float
    predicted: Tensor
    actual: Tensor
    candidates: Tensor

    def __str__(self) -> str:
        """In words."""
        return (
            f"predicted and actual changes of {len(self.candidates)} retrained networks correlate with "
            f"{self.correlation:.2f} +- {self.standard_error:.2f} (the outputs move {self.slope:.2f} times as far as "
            f"predicted; without that {self.unscaled:.2f}); the order of their sizes with {self.rank_correlation:.2f}"
        )


def fidelity(
    strategy: LookAhead,
    X: Any,
    y: Any,
    fit: Callable[[np.ndarray], nn.Module],
    *,
    generator: torch.Generator,
    candidates: int | Sequence[int] = 20,
    labels: Sequence[int] | None = None,
    sample_weight: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Agreement:
    """Train with and without some candidates, and compare what changes with what the look-ahead says.

    Args:
        strategy: its loss, kernel and ridge are those that are tried.
        X: all n points.
        y: n classes, with the strategy's `missing_label` where there is none.
        fit: from classes (n,), -1 where there is none, to a network trained on those that are there, in evaluation
            mode. It should do the same in every call (initial weights, order of examples): what it does at random
            counts against the look-ahead.
        generator: draws candidates.
        candidates: their number, or which.
        labels: the class that each of them gets; the likeliest by default.
        sample_weight: n weights of labels in the loss, those of the candidates included; 1 by default. `fit` has to
            train with the same.
        progress: called with (networks trained, networks in all).

    Cost: one training for each candidate, and one more.

    Raises:
        InputError: if anything does not fit, before a network is trained (labels that have no output: after the first),
            or nothing changes.
    """
    from scipy.stats import spearmanr

    require("strategy", strategy, LookAhead, "LookAhead()")
    known = as_labels(y, len(Examples(X)), strategy.missing_label)
    free = (known < 0).nonzero()[:, 0]
    numbers = _candidates(candidates, known, generator)
    given = None if labels is None else _classes(labels, len(numbers))
    weights = None if sample_weight is None else as_weights(sample_weight, len(known))
    model = fit(known.numpy().copy())
    state = LookAheadState(strategy, X, y, model, sample_weight=weights)
    start = _outputs(model, X, strategy)
    if given is not None and max(given) >= start.shape[1]:
        raise InputError(f"labels are classes from 0 to {start.shape[1] - 1}: got {max(given)}")
    before = _said(start, strategy)
    moved, actual = [], []
    if progress is not None:
        progress(1, len(numbers) + 1)
    for place, number in enumerate(numbers.tolist()):
        label = int(start[number].argmax()) if given is None else given[place]
        moved.append(state.change(number, label)[free])
        more = known.clone()
        more[number] = label
        actual.append((_said(_outputs(fit(more.numpy()), X, strategy), strategy) - before)[free])
        if progress is not None:
            progress(place + 2, len(numbers) + 1)
    steps, true = torch.stack(moved), torch.stack(actual)
    if not float(true.abs().max()) > 0 or not float(steps.abs().max()) > 0:
        raise InputError("nothing changes with a label more: fit(y) has to train on the labels that it is given")

    def predicted(slope: float) -> Tensor:
        return torch.stack([_said(start[free] + slope * step, strategy) - before[free] for step in steps])

    slope = _nearest(predicted, true)
    plain, mine = predicted(1.0), predicted(slope)
    left_out = torch.stack(
        [_correlation(mine[keep], true[keep]) for keep in ~torch.eye(len(numbers), dtype=torch.bool)]
    )
    error = ((len(numbers) - 1) / len(numbers) * (left_out - left_out.mean()).square().sum()).sqrt()
    sizes = plain.flatten(1).norm(dim=1), true.flatten(1).norm(dim=1)
    return Agreement(
        correlation=float(_correlation(mine, true)),
        standard_error=float(error),
        slope=slope,
        unscaled=float(_correlation(plain, true)),
        rank_correlation=float(torch.tensor(spearmanr(sizes[0].numpy(), sizes[1].numpy())[0])),
        predicted=sizes[0],
        actual=sizes[1],
        candidates=numbers,
    )


def _candidates(candidates: int | Sequence[int], known: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of the points that get a label.

    Raises:
        InputError: if one has a label already, or they are not 2 to all of the others.
    """
    free = (known < 0).nonzero()[:, 0]
    drawn = isinstance(candidates, (int, np.integer))
    numbers = free if drawn else as_numbers(candidates, len(known), "candidates")
    count = int(candidates) if drawn else len(numbers)
    if not 2 <= count <= len(free):
        raise InputError(f"candidates: got {count}, expected 2 to {len(free)}, the points without a label")
    if bool((known[numbers] >= 0).any()):
        raise InputError(f"point {int(numbers[known[numbers] >= 0][0])} has a label already: it is no candidate")
    if drawn:
        order = torch.randperm(len(free), generator=generator, device=generator.device)[:count].cpu()
        numbers = free[order].sort().values
    return numbers


def _classes(labels: Sequence[int], count: int) -> list[int]:
    """A class for each candidate.

    Raises:
        InputError: if there is not one for each, or one is no class.
    """
    given = np.asarray(labels)
    if given.shape != (count,) or not np.issubdtype(given.dtype, np.integer) or given.min() < 0:
        raise InputError(f"labels: expected one class for each of the {count} candidates, got {given.tolist()}")
    return given.tolist()


def _nearest(predicted: Callable[[float], Tensor], true: Tensor) -> float:
    """The slope of least squares. Probabilities level off: the best of a grid, then between its neighbours."""
    from scipy.optimize import minimize_scalar

    def miss(logarithm: float) -> float:
        return float((predicted(10.0**logarithm) - true).square().sum())

    grid = [k / 4 for k in range(-8, 9)]
    best = min(grid, key=miss)
    found = minimize_scalar(miss, bounds=(max(best - 0.25, -2.0), min(best + 0.25, 2.0)), method="bounded")
    return 10.0 ** float(found.x)  # type: ignore[attr-defined]


def _outputs(model: nn.Module, x: Any, strategy: LookAhead) -> Tensor:
    return linearize(model, readout=Logits(strategy.select)).outputs(x).detach().cpu().double()


def _said(outputs: Tensor, strategy: LookAhead) -> Tensor:
    """What is compared: probabilities, or for square loss the outputs."""
    return strategy.loss.fitted(outputs)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return (a @ b) / (a.norm() * b.norm())
