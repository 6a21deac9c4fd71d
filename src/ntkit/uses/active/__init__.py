"""Which labels to buy next: what a linearised model would learn from each, for a whole pool and without training."""

from ntkit.uses.active.geometry import Exact, Geometry, Given, LastLayer, Sketched
from ntkit.uses.active.lookahead import LookAhead
from ntkit.uses.active.losses import CrossEntropy, Loss, SquareLoss
from ntkit.uses.active.objectives import (
    BrierReduction,
    EntropyReduction,
    ErrorReduction,
    ExpectedChange,
    Flips,
    Information,
    IntegratedVariance,
    MostLikelyChange,
    Objective,
    Variance,
)
from ntkit.uses.active.picks import Greedy, Power, RedundantBatchWarning, TopK

__all__ = [
    "BrierReduction",
    "CrossEntropy",
    "EntropyReduction",
    "ErrorReduction",
    "Exact",
    "ExpectedChange",
    "Flips",
    "Geometry",
    "Given",
    "Greedy",
    "Information",
    "IntegratedVariance",
    "LastLayer",
    "LookAhead",
    "Loss",
    "MostLikelyChange",
    "Objective",
    "Power",
    "RedundantBatchWarning",
    "Sketched",
    "SquareLoss",
    "TopK",
    "Variance",
]
