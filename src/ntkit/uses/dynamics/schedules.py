"""When to look: after every step, after some, or ever more rarely."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from ntkit.errors import InputError


class Schedule(ABC):
    """Says of each number of updates done whether to look then. Step 0, before training, is always due."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether step >= 0 is one."""


@dataclass(frozen=True)
class Every(Schedule):
    """Every so many steps.

    Attributes:
        steps: 1 for all.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if it is not positive.
        """
        if self.steps < 1:
            raise InputError(f"steps: got {self.steps!r}, expected a positive number")

    def due(self, step: int) -> bool:  # noqa: D102
        return step % self.steps == 0


@dataclass(frozen=True)
class AndLast(Schedule):
    """Another schedule's steps, and the last one of training.

    Attributes:
        schedule: the other.
        last: number of the last step.
    """

    schedule: Schedule
    last: int

    def due(self, step: int) -> bool:  # noqa: D102
        return step == self.last or self.schedule.due(step)


@dataclass(frozen=True)
class Logarithmic(Schedule):
    """All steps at first, then ever more rarely: evenly on a log scale.

    Attributes:
        per_decade: how many between 10 and 100, 100 and 1000, and so on.
    """

    per_decade: int = 50

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if it is not positive.
        """
        if self.per_decade < 1:
            raise InputError(f"per_decade: got {self.per_decade!r}, expected a positive number")

    def due(self, step: int) -> bool:  # noqa: D102
        if step <= 1:
            return True
        place = math.floor(self.per_decade * math.log10(step) + 1e-9)
        return place > math.floor(self.per_decade * math.log10(step - 1) + 1e-9)
