"""Every strategy by its name, for command lines and tables of results."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ntkit.errors import InputError
from ntkit.solve.losses import Loss, as_loss
from ntkit.uses.active import designs, gradients, learned, lookahead, objectives, sampled, typical, uncertainty
from ntkit.uses.active.strategy import Strategy, require

LOOK_AHEAD: dict[str, objectives.Objective] = {
    "curvature-ivr": objectives.IntegratedVariance(),
    "ivr": objectives.IntegratedVariance(curvature=False),
    "mlmoc": objectives.MostLikelyChange(),
    "emoc": objectives.ExpectedChange(),
    "mlmoc-sum": objectives.SummedChange(),
    "emoc-sum": objectives.SummedChange(labels=None),
    "information": objectives.Information(),
    "expected-error": objectives.ErrorReduction(labels=3),
    "expected-brier": objectives.BrierReduction(labels=3),
    "expected-entropy": objectives.EntropyReduction(labels=3),
    "flips": objectives.Flips(),
    "variance": objectives.Variance(),
}
BASELINES: dict[str, Strategy] = {
    "random": uncertainty.Random(),
    "entropy": uncertainty.Entropy(),
    "least-confidence": uncertainty.LeastConfidence(),
    "margin": uncertainty.Margin(),
    "power-margin": uncertainty.PowerMargin(),
    "bald": sampled.BALD(),
    "epig": sampled.EPIG(),
    "badge": gradients.BADGE(),
    "learned-loss": learned.LearnedLoss(),
    "core-set": designs.CoreSet(),
    "k-means++": designs.KMeansPlusPlus(),
    "lcmd": designs.LCMD(),
    "max-det": designs.MaxDet(sigma=0.1),
    "frank-wolfe": designs.FrankWolfe(sigma=0.1),
    "bait": designs.Bait(sigma=0.1),
    "bait-forward-backward": designs.Bait(sigma=0.1, backward=True),
    "typiclust": typical.TypiClust(),
}
NAMES = (*LOOK_AHEAD, *BASELINES)


def as_strategy(meant: Any, **common: Any) -> Strategy:
    """A strategy as it is, and that of a name.

    Raises:
        InputError: if it is neither.
    """
    if isinstance(meant, str):
        return strategy(meant, **common)
    require("strategy", meant, Strategy, 'LookAhead() or Margin(), or a name as in strategy("margin")')
    return meant


def strategy(name: str, *, loss: Loss | None = None, **common: Any) -> Strategy:
    """The strategy of a name, with its usual settings.

    Args:
        name: one of `NAMES`; the objectives of the look-ahead are among them.
        loss: that the network is trained with; cross-entropy by default. Strategies that do not ask for it are given
            none.
        common: `random_state`, `missing_label`, `select`.

    Raises:
        InputError: if there is none of that name.
    """
    loss = as_loss(loss)
    if name in LOOK_AHEAD:
        return lookahead.LookAhead(objective=LOOK_AHEAD[name], loss=loss, **common)
    if name not in BASELINES:
        raise InputError(f"there is no strategy {name!r}: expected one of {', '.join(NAMES)}")
    found = BASELINES[name]
    asks = any(field.name == "loss" for field in fields(found))
    return replace(found, **common, **({"loss": loss} if asks else {}))
