"""What a student is taught about each training example, read by the examples' numbers: points of the simplex.

All are at temperature 1 unless one says otherwise; a student's loss tempers them (`DistillationLoss`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkit.errors import InputError
from ntkit.solve.losses import require_classes
from ntkit.tangent.examples import Examples
from ntkit.tangent.readout import logits
from ntkit.tangent.untouched import evaluating, untouched
from ntkit.uses.distill.simplex import class_numbers, finite_logits, numbers, points_of_simplex, positive

if TYPE_CHECKING:
    from ntkit.tangent.readout import Select
    from ntkit.uses.distill.simplex import Indices


class Targets(ABC):
    """What is taught about each of `len(self)` examples."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """C."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of training examples N."""

    @abstractmethod
    def targets(self, indices: Indices) -> Tensor:
        """Points of the simplex, (n, C), float32 or better, for n numbers of examples."""

    def table(self) -> Tensor:
        """All targets, (N, C)."""
        return self.targets(torch.arange(len(self)))


@dataclass(frozen=True, eq=False)
class Smoothed(Targets):
    """Label smoothing: keep * e_y + (1 - keep) / C for every class, which sums to 1.

    The label itself so has keep + (1 - keep) / C. The toy notebook of Ren, Guo and Sutherland (2022) adds
    (1 - keep) / (C - 1) to *all* C classes instead: its rows sum to 1 + (1 - keep) / (C - 1), 1.015 for C = 3 and
    0.97, and are no probabilities. A loss that is linear in its targets is then a little larger, and pulls at the
    logits with a factor of that sum.

    Attributes:
        labels: (N,) classes.
        count: C.
        keep: mass that stays with the label before the rest is spread.
    """

    labels: Tensor
    count: int
    keep: float = 0.97

    def __post_init__(self) -> None:
        """Check labels and mass.

        Raises:
            InputError: if a label is no class, or `keep` is not between 0 and 1.
        """
        object.__setattr__(self, "labels", class_numbers(self.labels, self.count).cpu())
        if not 0 <= self.keep <= 1:
            raise InputError(f"keep: got {self.keep!r}, expected a share of the mass, from 0 to 1")

    @property
    def classes(self) -> int:  # noqa: D102
        return self.count

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self, indices: Indices) -> Tensor:  # noqa: D102
        chosen = self.labels[numbers(indices, len(self))]
        return self.keep * functional.one_hot(chosen, self.count).float() + (1 - self.keep) / self.count


class OneHot(Smoothed):
    """The labels themselves, e_y."""

    def __init__(self, labels: Any, count: int) -> None:
        """From N labels of C classes."""
        super().__init__(labels, count, keep=1.0)


@dataclass(frozen=True, eq=False)
class Given(Targets):
    """Probabilities that are known: the ground truth p*, several annotators' votes, an ensemble.

    Attributes:
        probabilities: (N, C).
    """

    probabilities: Tensor

    def __post_init__(self) -> None:
        """Check that they are probabilities."""
        object.__setattr__(self, "probabilities", points_of_simplex(self.probabilities).cpu())

    @property
    def classes(self) -> int:  # noqa: D102
        return self.probabilities.shape[1]

    def __len__(self) -> int:
        return len(self.probabilities)

    def targets(self, indices: Indices) -> Tensor:  # noqa: D102
        return self.probabilities[numbers(indices, len(self))]


class TeacherTargets(Given):
    """What a network says about each example: the last epoch's for plain distillation, the best one's for ESKD."""

    @classmethod
    def of(
        cls,
        teacher: nn.Module,
        X: Any,
        *,
        temperature: float = 1.0,
        batch_size: int = 256,
        select: Select | None = None,
    ) -> TeacherTargets:
        """Run the teacher once over all examples, in evaluation mode; it is left as it was.

        Plain KD (Hinton et al. 2015) takes the teacher of the last epoch; ESKD the checkpoint of the best validation
        accuracy: `BestSoFar.restore` puts it back into a network.

        Args:
            teacher: gives logits.
            X: N examples, as everywhere in this package.
            temperature: softmax(z / temperature). Give one here *or* to `DistillationLoss`, not to both: there the
                student is compared at the same temperature, as published.
            batch_size: examples at a time.
            select: takes the (n, C) logits out of the network's output, if it is not a tensor.

        Raises:
            InputError: if the temperature is not positive, there is one logit alone, or one is not finite.

        Cost: one forward pass; 4 N C bytes.
        """
        positive(temperature, "temperature")
        examples, parts = Examples(X), []
        device = next((p.device for p in teacher.parameters()), None)
        with evaluating(teacher), untouched(teacher), torch.no_grad():
            for start in range(0, len(examples), batch_size):
                z = logits(examples.batch(slice(start, start + batch_size), device).call(teacher), select)
                require_classes(z.shape[1])
                parts.append((finite_logits(z, (len(z), z.shape[1])) / temperature).softmax(1).cpu())
        return cls(torch.cat(parts))


@dataclass(frozen=True, eq=False)
class Mixed(Targets):
    """share * first + (1 - share) * second: between labels and ground truth, the targets of the toy study.

    Attributes:
        first: for example one-hot labels.
        second: for example the ground truth.
        share: of the first, from 0 to 1.
    """

    first: Targets
    second: Targets
    share: float

    def __post_init__(self) -> None:
        """Check that they are of the same examples.

        Raises:
            InputError: if not, or the share is not between 0 and 1.
        """
        sizes = [(len(t), t.classes) for t in (self.first, self.second)]
        if sizes[0] != sizes[1]:
            raise InputError(f"mixed targets are of the same examples and classes: got (N, C) = {sizes[0]}, {sizes[1]}")
        if not 0 <= self.share <= 1:
            raise InputError(f"share: got {self.share!r}, expected a number from 0 to 1")

    @property
    def classes(self) -> int:  # noqa: D102
        return self.first.classes

    def __len__(self) -> int:
        return len(self.first)

    def targets(self, indices: Indices) -> Tensor:  # noqa: D102
        return self.share * self.first.targets(indices) + (1 - self.share) * self.second.targets(indices)
