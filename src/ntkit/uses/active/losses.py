"""The loss that a network is trained with, as far as its look-ahead depends on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Loss(ABC):
    """How a label pulls at outputs f of shape (n, C)."""

    @abstractmethod
    def value(self, outputs: Tensor, classes: Tensor) -> Tensor:
        """What training makes small: the mean over (n, C) outputs and their classes (n,)."""

    @abstractmethod
    def probabilities(self, outputs: Tensor) -> Tensor:
        """What the outputs say about the classes, (n, C), on the simplex."""

    @abstractmethod
    def curvature(self, outputs: Tensor, block: int) -> Tensor:
        """The precision W of one label, (n, c, c): c = C for the loss's own Hessian, c = 1 for one number for all."""

    @abstractmethod
    def fitted(self, outputs: Tensor) -> Tensor:
        """What is compared with one-hot labels, (n, C): a label y pulls with y - fitted."""

    def misfit(self, outputs: Tensor, classes: Tensor) -> Tensor:
        """Minus the gradient at the outputs, (n, C), for labels (n,)."""
        return torch.nn.functional.one_hot(classes, outputs.shape[1]).to(outputs) - self.fitted(outputs)


@dataclass(frozen=True)
class SquareLoss(Loss):
    """1/2 ||f - e_y||^2 with one-hot labels: every label has the precision 1, and a look-ahead is exact."""

    def value(self, outputs: Tensor, classes: Tensor) -> Tensor:  # noqa: D102
        target = torch.nn.functional.one_hot(classes, outputs.shape[1]).to(outputs)
        return 0.5 * (outputs - target).square().sum(1).mean()

    def probabilities(self, outputs: Tensor) -> Tensor:
        """The nearest point of the simplex (Duchi et al. 2008, algorithm 1)."""
        ordered = outputs.sort(1, descending=True).values
        excess = ordered.cumsum(1) - 1
        count = torch.arange(1, outputs.shape[1] + 1, dtype=outputs.dtype)
        kept = (ordered - excess / count > 0).sum(1, keepdim=True)
        return (outputs - excess.gather(1, kept - 1) / kept).clamp_min(0)

    def curvature(self, outputs: Tensor, block: int) -> Tensor:  # noqa: D102
        return torch.eye(block, dtype=torch.float64).expand(len(outputs), block, block).clone()

    def fitted(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return outputs


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """-log softmax(f)_y, looked at around the present outputs: curvature diag(p) - p p^T, or its trace 1 - ||p||^2."""

    def value(self, outputs: Tensor, classes: Tensor) -> Tensor:  # noqa: D102
        return torch.nn.functional.cross_entropy(outputs, classes)

    def probabilities(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return outputs.softmax(1)

    def curvature(self, outputs: Tensor, block: int) -> Tensor:  # noqa: D102
        p = self.probabilities(outputs).double()
        if block == 1:
            return (1 - p.square().sum(1)).clamp_min(0)[:, None, None]
        return torch.diag_embed(p) - p[:, :, None] * p[:, None]

    def fitted(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return self.probabilities(outputs)
