"""Batches by the gradients that the network's own guess would give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ntkit.errors import InputError
from ntkit.kernel.features import FeatureKernel
from ntkit.solve.losses import CrossEntropy, Loss
from ntkit.uses.active.columns import ProductColumns
from ntkit.uses.active.designs import Scattered, in_turn
from ntkit.uses.active.geometry import Geometry, LastLayer
from ntkit.uses.active.strategy import Round, Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ntkit.uses.active.picks import Picked


@dataclass(frozen=True)
class BADGE(Strategy):
    """k-means++ on gradients of the last layer for the likeliest label, (e_y - p) (x) phi (Ash et al. 2020).

    The first is the longest; the others are drawn by squared distance. The gradients are never formed.

    Attributes:
        loss: that of the network.
        kernel: features phi of points.
    """

    loss: Loss = field(default_factory=CrossEntropy)
    kernel: Geometry = field(default_factory=LastLayer)

    def choose(self, now: Round) -> Picked:  # noqa: D102
        features, outputs = now.kernel(self.kernel), now.outputs()
        if not isinstance(features, FeatureKernel) or features.shape[0] != len(outputs):
            raise InputError(
                f"BADGE needs one row of features for each point: got {type(features).__name__} of {features.shape[0]} "
                f"rows for {len(outputs)} points"
            )
        misfit = self.loss.misfit(outputs, outputs.argmax(1))
        return in_turn(_FromTheLongest(ProductColumns(misfit, features.features().cpu())), now)


class _FromTheLongest(Scattered):
    def scores(self) -> Tensor:
        return super().scores() if self.begun else self.columns.diagonal

    def pick(self, scores: Tensor, generator: torch.Generator) -> int:
        return super().pick(scores, generator) if self.begun else int(scores.argmax())
