"""Few points in the place of a data set: kernel inducing points, label solve, and what is learned from them."""

from ntkit.uses.condense.augment import Augmentation, Flip, Shift
from ntkit.uses.condense.course import Recorded
from ntkit.uses.condense.gradients import GradientFeatures
from ntkit.uses.condense.inducing import Condensed, Inducing, kernel_inducing_points
from ntkit.uses.condense.labels import Solved, label_solve
from ntkit.uses.condense.regression import Fitted, Score, fit
from ntkit.uses.condense.scaling import ZCA, Standardised
from ntkit.uses.condense.storage import load_support, save_support
from ntkit.uses.condense.support import Support, centre_support, centred, random_support
from ntkit.uses.condense.transfer import Training, Transferred, train_network

__all__ = [
    "ZCA",
    "Augmentation",
    "Condensed",
    "Fitted",
    "Flip",
    "GradientFeatures",
    "Inducing",
    "Recorded",
    "Score",
    "Shift",
    "Solved",
    "Standardised",
    "Support",
    "Training",
    "Transferred",
    "centre_support",
    "centred",
    "fit",
    "kernel_inducing_points",
    "label_solve",
    "load_support",
    "random_support",
    "save_support",
    "train_network",
]
