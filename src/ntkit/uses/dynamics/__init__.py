"""How training moves predictions: steps taken apart, paths recorded, kernels watched."""

from ntkit.uses.dynamics.callbacks import lightning_callback, trainer_callback
from ntkit.uses.dynamics.constancy import Constancy, constancy
from ntkit.uses.dynamics.influence import Influence, influence
from ntkit.uses.dynamics.kernels import KernelPath, KernelRecorder
from ntkit.uses.dynamics.linear import Linearized
from ntkit.uses.dynamics.paths import CORNERS, SMOOTHING, Paths, merge, ranking_quality, triangle
from ntkit.uses.dynamics.recorder import PathRecorder
from ntkit.uses.dynamics.schedules import Every, Logarithmic, Schedule
from ntkit.uses.dynamics.step import Change, Step, one_step
from ntkit.uses.dynamics.watch import Look, Run, Watched, watch

__all__ = [
    "CORNERS",
    "SMOOTHING",
    "Change",
    "Constancy",
    "Every",
    "Influence",
    "KernelPath",
    "KernelRecorder",
    "Linearized",
    "Logarithmic",
    "Look",
    "PathRecorder",
    "Paths",
    "Run",
    "Schedule",
    "Step",
    "Watched",
    "constancy",
    "influence",
    "lightning_callback",
    "merge",
    "one_step",
    "ranking_quality",
    "trainer_callback",
    "triangle",
    "watch",
]
