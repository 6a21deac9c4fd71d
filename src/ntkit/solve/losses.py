"""The loss that a network is trained with: how a target pulls at outputs, and how much it curves.

Targets are classes (n,), or points (n, C): soft labels on the simplex, or any values for the square loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError

# How far soft labels may be from the simplex.
TOLERANCE = 1e-3


class Loss(ABC):
    """How a label pulls at outputs f of shape (n, C)."""

    @abstractmethod
    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training makes small: the mean over (n, C) outputs and their targets, (n,) or (n, C)."""

    @abstractmethod
    def probabilities(self, outputs: Tensor) -> Tensor:
        """What the outputs say about the classes, (n, C), on the simplex."""

    @abstractmethod
    def curvature(self, outputs: Tensor, block: int) -> Tensor:
        """The precision W of one label, (n, c, c): c = C for the loss's own Hessian, c = 1 for one number for all."""

    @abstractmethod
    def fitted(self, outputs: Tensor) -> Tensor:
        """What is compared with the targets, (n, C): a target y pulls with y - fitted."""

    def targets(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """The targets as points (n, C), in the type and on the device of the outputs; classes become one-hot.

        Raises:
            InputError: if there are not as many as outputs, or they are classes or points that cannot be.
        """
        return points(targets, outputs)

    def misfit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Minus the gradient of each example's own loss at its outputs, (n, C)."""
        return self.targets(targets, outputs) - self.fitted(outputs)


@dataclass(frozen=True)
class SquareLoss(Loss):
    """1/2 ||f - y||^2, with one-hot y for classes: every label has the precision 1, and a look-ahead is exact."""

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return 0.5 * (outputs - self.targets(targets, outputs)).square().sum(1).mean()

    def probabilities(self, outputs: Tensor) -> Tensor:
        """The nearest point of the simplex (Duchi et al. 2008, algorithm 1)."""
        ordered = outputs.sort(1, descending=True).values
        excess = ordered.cumsum(1) - 1
        count = torch.arange(1, outputs.shape[1] + 1, dtype=outputs.dtype, device=outputs.device)
        kept = (ordered - excess / count > 0).sum(1, keepdim=True)
        return (outputs - excess.gather(1, kept - 1) / kept).clamp_min(0)

    def curvature(self, outputs: Tensor, block: int) -> Tensor:  # noqa: D102
        one = torch.eye(block, dtype=torch.float64, device=outputs.device)
        return one.expand(len(outputs), block, block).clone()

    def fitted(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return outputs


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """-sum_c y_c log softmax(f)_c, around the present outputs: curvature diag(p) - p p^T, or its trace 1 - ||p||^2."""

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        if not targets.is_floating_point():
            return torch.nn.functional.cross_entropy(outputs, targets.long())
        return torch.nn.functional.cross_entropy(outputs, self.targets(targets, outputs))

    def targets(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Points of the simplex (n, C); classes become one-hot.

        Raises:
            InputError: if there are not as many as outputs, or they are classes or points that cannot be.
        """
        found = points(targets, outputs)
        if targets.is_floating_point() and not off_simplex(found) <= TOLERANCE:
            raise InputError(
                f"targets of a cross-entropy are probabilities that sum to 1: got sums from "
                f"{float(found.sum(1).min()):.3g} to {float(found.sum(1).max()):.3g} and a least entry of "
                f"{float(found.min()):.3g}. Normalise them, or use SquareLoss()"
            )
        return found

    def probabilities(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return outputs.softmax(1)

    def curvature(self, outputs: Tensor, block: int) -> Tensor:  # noqa: D102
        p = self.probabilities(outputs).double()
        if block == 1:
            return (1 - p.square().sum(1)).clamp_min(0)[:, None, None]
        return torch.diag_embed(p) - p[:, :, None] * p[:, None]

    def fitted(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return self.probabilities(outputs)


def as_loss(loss: Any, *, mean: bool = True) -> Loss:
    """The loss that is meant: cross-entropy for None, a loss of ours as it is, torch's where it is exactly one of ours.

    `nn.CrossEntropyLoss()` is `CrossEntropy()`, if it has no weights and no smoothing and sums up the examples as the
    caller does. `nn.MSELoss` never is `SquareLoss()`: it has no 1/2, and means over the outputs too.

    Args:
        loss: what a user has passed.
        mean: whether the caller means over the examples; a sum otherwise.

    Raises:
        InputError: if it is anything else, with what to pass instead.
    """
    if loss is None:
        return CrossEntropy()
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, nn.CrossEntropyLoss):
        reduction = "mean" if mean else "sum"
        own = [
            f"{name}={value}"
            for name, value, plain in (
                ("weight", loss.weight, None), ("ignore_index", loss.ignore_index, -100),
                ("reduction", loss.reduction, reduction), ("label_smoothing", loss.label_smoothing, 0.0),
            )
            if (value is not None if plain is None else value != plain)
        ]  # fmt: skip
        if not own:
            return CrossEntropy()
        raise InputError(
            f"loss: got nn.CrossEntropyLoss({', '.join(own)}), expected a plain one, with reduction={reduction!r} as "
            "here: pass CrossEntropy(), and smoothed labels as soft targets (n, C)"
        )
    if isinstance(loss, nn.MSELoss):
        raise InputError(
            "loss: got nn.MSELoss, which has no 1/2 and means over the C outputs too: pass SquareLoss(), which is "
            "1/2 ||f - y||^2; it takes 2/C times the learning rate to the same steps"
        )
    named = isinstance(loss, type) and issubclass(loss, (Loss, nn.Module))
    got = f"the class {loss.__name__}" if named else getattr(loss, "__name__", None) or type(loss).__name__
    raise InputError(
        f"loss: got {got}{f', not an object of it: write {loss.__name__}()' if named else ''}; expected CrossEntropy() "
        "or SquareLoss() of ntkit.solve.losses, one of your own made from its Loss, or a plain nn.CrossEntropyLoss()"
    )


def off_simplex(found: Tensor) -> float:
    """How far points (n, C) are from probabilities: by how much a sum misses 1, or an entry is below 0, at most."""
    return max(float((found.sum(1) - 1).abs().max()), float(-found.min()))


def require_classes(count: int) -> None:
    """Refuse what has one class: its probability is 1 whatever the network says.

    Raises:
        InputError: with how to make two classes of one logit.
    """
    if count < 2:
        raise InputError(
            "probabilities are of two classes or more: got one, whose softmax is always 1. Make two of a single logit "
            "z, (n,): torch.stack([0 * z, z], 1)"
        )


def points(targets: Tensor, outputs: Tensor) -> Tensor:
    """Classes (n,) as one-hot points, and points (n, C) as they are, in the type of the outputs.

    Raises:
        InputError: if there are not as many as outputs, a class is out of range, or a number is not finite.
    """
    n, count = outputs.shape
    if targets.is_floating_point():
        targets = targets[:, None] if targets.ndim == 1 and count == 1 else targets
        if targets.shape != outputs.shape:
            raise InputError(f"soft targets have the shape of the outputs, {(n, count)}: got {tuple(targets.shape)}")
        if not bool(torch.isfinite(targets).all()):
            raise InputError("targets are not finite (NaN or infinity)")
        return targets.to(outputs)
    if targets.shape != (n,):
        raise InputError(f"targets are {n} classes, or points of shape {(n, count)}: got {tuple(targets.shape)}")
    if n and (int(targets.min()) < 0 or int(targets.max()) >= count):
        raise InputError(
            f"classes are numbers from 0 to {count - 1}, the network has {count} outputs: got "
            f"{int(targets.min())} to {int(targets.max())}"
        )
    return torch.nn.functional.one_hot(targets.long(), count).to(outputs)
