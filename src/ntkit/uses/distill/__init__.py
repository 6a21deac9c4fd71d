"""Which supervision is better: targets for a student, the loss that follows them, and how good they are."""

from ntkit.uses.distill.calibration import Bins, EqualMass, EqualWidth, Reliability, reliability
from ntkit.uses.distill.early import BestSoFar
from ntkit.uses.distill.filter import EMATargets
from ntkit.uses.distill.indexed import Indexed
from ntkit.uses.distill.quality import RiskGap, Supervision, risk_gap, supervision
from ntkit.uses.distill.storage import Dense, Nearest, Stochastic, Storage, TopK
from ntkit.uses.distill.student import DistillationLoss
from ntkit.uses.distill.targets import Given, Mixed, OneHot, Smoothed, Targets, TeacherTargets

__all__ = [
    "BestSoFar",
    "Bins",
    "Dense",
    "DistillationLoss",
    "EMATargets",
    "EqualMass",
    "EqualWidth",
    "Given",
    "Indexed",
    "Mixed",
    "Nearest",
    "OneHot",
    "Reliability",
    "RiskGap",
    "Smoothed",
    "Stochastic",
    "Storage",
    "Supervision",
    "Targets",
    "TeacherTargets",
    "TopK",
    "reliability",
    "risk_gap",
    "supervision",
]
