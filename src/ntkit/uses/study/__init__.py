"""What the tangent kernel says about one network on one data set: the numbers behind `ntkit demo` and `ntkit report`.

For each state of the network (as built, after training) two questions are answered. How do the kernels compare, the
exact one with its C x C blocks and the cheap ones with one number per pair? And how well does kernel regression with
each of them predict, next to the network itself? Nothing is drawn here; every result is a frozen dataclass of numbers.
"""

from __future__ import annotations

from ntkit.uses.study.examine import study
from ntkit.uses.study.facts import (
    FIRST,
    FULL,
    PSEUDO,
    TRACE,
    Effort,
    Evidence,
    Fit,
    KernelFacts,
    Kind,
    Listener,
    Movement,
    RidgeCheck,
    Silence,
    Similarity,
    State,
    Study,
    Task,
    random_signs,
)

__all__ = [
    "FIRST",
    "FULL",
    "PSEUDO",
    "TRACE",
    "Effort",
    "Evidence",
    "Fit",
    "KernelFacts",
    "Kind",
    "Listener",
    "Movement",
    "RidgeCheck",
    "Silence",
    "Similarity",
    "State",
    "Study",
    "Task",
    "random_signs",
    "study",
]
