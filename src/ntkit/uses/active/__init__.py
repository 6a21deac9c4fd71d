"""Which labels to buy next: what a linearised model would learn from each, for a whole pool and without training."""

from ntkit.solve.losses import CrossEntropy, Loss, SquareLoss
from ntkit.uses.active.comparison import Comparison, compare, penalties
from ntkit.uses.active.designs import LCMD, Bait, CoreSet, FrankWolfe, KMeansPlusPlus, MaxDet, MaxDiag
from ntkit.uses.active.exchange import CSV, Argilla, LabelStudio, export_tasks, import_annotations
from ntkit.uses.active.fidelity import Agreement, fidelity
from ntkit.uses.active.geometry import Exact, Geometry, Given, Hidden, LastLayer, Sketched
from ntkit.uses.active.gradients import BADGE
from ntkit.uses.active.learned import LearnedLoss
from ntkit.uses.active.lookahead import LookAhead
from ntkit.uses.active.loop import Asked, ChangedStrategyWarning, Loop, UntrainedWarning
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
    SummedChange,
    Variance,
)
from ntkit.uses.active.picks import Greedy, Power, RedundantBatchWarning, TopK
from ntkit.uses.active.registry import NAMES, strategy
from ntkit.uses.active.sampled import BALD, EPIG, Dropout, Ensemble
from ntkit.uses.active.selection import Selection, select
from ntkit.uses.active.state import LookAheadState
from ntkit.uses.active.stopping import (
    Budget,
    Kappa,
    MaxPredictedChange,
    MeanUncertainty,
    Plateau,
    StoppingRule,
    Target,
)
from ntkit.uses.active.strategy import Strategy
from ntkit.uses.active.training import Refit, Training, as_network
from ntkit.uses.active.typical import TypiClust
from ntkit.uses.active.uncertainty import Entropy, LeastConfidence, Margin, PowerMargin, Random

__all__ = [
    "BADGE",
    "BALD",
    "CSV",
    "EPIG",
    "LCMD",
    "NAMES",
    "Agreement",
    "Argilla",
    "Asked",
    "Bait",
    "BrierReduction",
    "Budget",
    "ChangedStrategyWarning",
    "Comparison",
    "CoreSet",
    "CrossEntropy",
    "Dropout",
    "Ensemble",
    "Entropy",
    "EntropyReduction",
    "ErrorReduction",
    "Exact",
    "ExpectedChange",
    "Flips",
    "FrankWolfe",
    "Geometry",
    "Given",
    "Greedy",
    "Hidden",
    "Information",
    "IntegratedVariance",
    "KMeansPlusPlus",
    "Kappa",
    "LabelStudio",
    "LastLayer",
    "LearnedLoss",
    "LeastConfidence",
    "LookAhead",
    "LookAheadState",
    "Loop",
    "Loss",
    "Margin",
    "MaxDet",
    "MaxDiag",
    "MaxPredictedChange",
    "MeanUncertainty",
    "MostLikelyChange",
    "Objective",
    "Plateau",
    "Power",
    "PowerMargin",
    "Random",
    "RedundantBatchWarning",
    "Refit",
    "Selection",
    "Sketched",
    "SquareLoss",
    "StoppingRule",
    "Strategy",
    "SummedChange",
    "Target",
    "TopK",
    "Training",
    "TypiClust",
    "UntrainedWarning",
    "Variance",
    "as_network",
    "compare",
    "export_tasks",
    "fidelity",
    "import_annotations",
    "penalties",
    "select",
    "strategy",
]
