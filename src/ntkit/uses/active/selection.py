"""One batch by one call, without objects to make: numbers of points in and out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkit.errors import InputError
from ntkit.tangent.examples import Examples
from ntkit.uses.active.labels import as_labels, as_numbers
from ntkit.uses.active.lookahead import LookAhead
from ntkit.uses.active.registry import as_strategy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from ntkit.uses.active.strategy import Strategy


@dataclass(frozen=True, eq=False)
class Selection:
    """A batch, and how it came about.

    Attributes:
        indices: numbers of the points, best first, (batch_size,).
        utilities: the score of every point when each was picked, (batch_size, n); NaN for those that could not be
            chosen then.
        info: `seconds`, and for a look-ahead `seconds_look` of them until the first score, `ridge` (absolute) and
            `condition` of the system that was solved, from below: 1e12 and more leaves few digits in float64.
    """

    indices: np.ndarray
    utilities: np.ndarray
    info: Mapping[str, float]


def select(
    model: nn.Module,
    X: Any,
    labelled: Sequence[int] | np.ndarray,
    y: Sequence[int] | np.ndarray,
    *,
    candidates: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 1,
    strategy: str | Strategy = "curvature-ivr",
    sample_weight: Any = None,
    random_state: int = 0,
) -> Selection:
    """Points to be labelled next.

    Args:
        model: trained on the labels so far, in evaluation mode; it is not changed.
        X: all n points, as the model takes them.
        labelled: numbers of the points with labels.
        y: their classes.
        candidates: numbers of the points that may be chosen; all without a label by default.
        batch_size: how many.
        strategy: one of `NAMES`, for a network that was trained with cross-entropy; or a strategy, whose own
            `random_state` counts then.
        sample_weight: n weights of the labels in the loss; 1 by default.
        random_state: seed of all draws.

    Raises:
        InputError: if anything does not fit.
        ModelError: if the network has not what the strategy needs.
    """
    rule = as_strategy(strategy, random_state=random_state)
    start = time.perf_counter()
    n, classes = len(Examples(X)), np.asarray(y)
    numbers = as_numbers(labelled, n, "labelled")
    if tuple(numbers.shape) != classes.shape:
        raise InputError(
            f"every labelled point has one class: got {len(numbers)} numbers and classes of shape {classes.shape}"
        )
    missing = as_labels(classes, len(numbers), rule.missing_label) < 0
    if bool(missing.any()):
        place = int(missing.nonzero()[0])
        raise InputError(
            f"every labelled point has a class: got {classes.tolist()[place]} for point {int(numbers[place])}, which "
            "stands for no label"
        )
    known = dict(zip(numbers.tolist(), classes.tolist(), strict=True))
    labels = [known.get(i, rule.missing_label) for i in range(n)]
    now = rule.round(X, labels, model, candidates, batch_size, sample_weight)
    info: dict[str, float] = {}
    if isinstance(rule, LookAhead):
        scene = rule.look(now)
        posterior = scene.posterior
        info = {
            "seconds_look": time.perf_counter() - start, "ridge": posterior.ridge, "condition": posterior.condition,
        }  # fmt: skip
        picked = rule.batch.choose(rule.objective, scene, now.candidates, now.size, now.generator)
    else:
        picked = rule.choose(now)
    return Selection(
        picked.numbers.numpy(), now.utilities(picked), {"seconds": time.perf_counter() - start, **info}
    )  # fmt: skip
