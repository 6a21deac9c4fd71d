"""How long to probe a head, how far fine-tuning will move the features, and which backbone is worth it."""

from ntkit.solve.losses import CrossEntropy, Loss, SquareLoss
from ntkit.uses.finetune.backbones import rank_backbones
from ntkit.uses.finetune.candidates import Candidate, ExactKernel, SeenLabelsWarning, SketchedKernel
from ntkit.uses.finetune.change import FeatureChange, feature_change
from ntkit.uses.finetune.copies import RepeatedExamplesWarning
from ntkit.uses.finetune.energy import (
    FirstStep,
    Foreseen,
    average_initial_energy,
    direction,
    energies,
    first_step,
    foresee,
    slow_kernel,
)
from ntkit.uses.finetune.heads import Head, LinearHead, MLPHead, OwnHead, Reinitialised
from ntkit.uses.finetune.powerlaw import PowerLaw
from ntkit.uses.finetune.probe import probe_then_finetune
from ntkit.uses.finetune.ranking import Ranked, Ranking
from ntkit.uses.finetune.schedule import Finetuning, Probing
from ntkit.uses.finetune.split import Split
from ntkit.uses.finetune.sweep import Row, Sweep
from ntkit.uses.finetune.targets import smoothed

__all__ = [
    "Candidate",
    "CrossEntropy",
    "ExactKernel",
    "FeatureChange",
    "Finetuning",
    "FirstStep",
    "Foreseen",
    "Head",
    "LinearHead",
    "Loss",
    "MLPHead",
    "OwnHead",
    "PowerLaw",
    "Probing",
    "Ranked",
    "Ranking",
    "Reinitialised",
    "RepeatedExamplesWarning",
    "Row",
    "SeenLabelsWarning",
    "SketchedKernel",
    "Split",
    "SquareLoss",
    "Sweep",
    "average_initial_energy",
    "direction",
    "energies",
    "feature_change",
    "first_step",
    "foresee",
    "probe_then_finetune",
    "rank_backbones",
    "slow_kernel",
    "smoothed",
]
