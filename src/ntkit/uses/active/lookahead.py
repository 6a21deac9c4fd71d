"""The strategy of this package: choosing by what labels would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.features import FeatureKernel
from ntkit.solve.losses import CrossEntropy, Loss
from ntkit.uses.active.geometry import LEAST, Geometry, Hidden, posterior, scale
from ntkit.uses.active.labels import as_count, as_numbers
from ntkit.uses.active.objectives import IntegratedVariance, Objective, Scene
from ntkit.uses.active.picks import Greedy, Picked, Picks
from ntkit.uses.active.strategy import Round, Strategy, require, require_kernel


@dataclass(frozen=True)
class LookAhead(Strategy):
    """Chooses points by what their labels would do to a network, without training it.

    The network is linearised where it stands; one label more is then an exact update of its posterior, and a score of
    every candidate costs no more than a few passes over their features (Mohamadi, Bae, Sutherland 2022; the default,
    variance weighed by curvature, is BAIT's trace with one number for each target).

    Attributes:
        objective: what makes a label valuable.
        loss: that the network is trained with.
        kernel: which kernel the look-ahead goes by.
        reg: the ridge, relative to the mean diagonal entry of labelled points (times their mean curvature); 0.01 to 0.1
            served best in trials.
        batch: how a batch is made of scores.
        targets: numbers of the points whose predictions matter; all without a label by default.
        target_size: where an objective looks at pairs of targets and candidates, so many targets are drawn.
    """

    objective: Objective = field(default_factory=IntegratedVariance)
    loss: Loss = field(default_factory=CrossEntropy)
    kernel: Geometry = field(default_factory=Hidden)
    reg: float = 0.1
    batch: Picks = field(default_factory=Greedy)
    targets: Sequence[int] | None = None
    target_size: int = 1000

    def __post_init__(self) -> None:
        """Check what the look-ahead is made of.

        Raises:
            InputError: if a number is out of range, or the objective, loss, kernel or batch is none.
        """
        super().__post_init__()
        by_name = '; a whole strategy has a name, as in strategy("mlmoc")' if isinstance(self.objective, str) else ""
        require("objective", self.objective, Objective, f"IntegratedVariance() or MostLikelyChange(){by_name}")
        require("batch", self.batch, Picks, "Greedy(), Power() or TopK()")
        require_kernel(self.kernel)
        if not LEAST <= self.reg < float("inf"):
            raise InputError(
                f"reg is relative to the kernel's diagonal: got {self.reg!r}, expected a number of at least {LEAST}"
            )
        as_count(self.target_size, "target_size")

    def choose(self, now: Round) -> Picked:  # noqa: D102
        return self.batch.choose(self.objective, self.look(now), now.candidates, now.size, now.generator)

    def look(self, now: Round, known: Tensor | None = None) -> Scene:
        """The posterior, and the network's own outputs: what scores are made of.

        Args:
            now: what the network has learned; ridge, precisions and targets follow from that.
            known: numbers of the points whose labels count in the posterior; those that were learned by default.

        Raises:
            InputError: if anything does not fit.
            ModelError: if the network has not the kernel that is asked for.
        """
        kernel, outputs = now.kernel(self.kernel), now.outputs()
        n, count = outputs.shape
        if not isinstance(kernel, FeatureKernel):
            kernel = DenseKernel(kernel.dense().cpu().double())
        if kernel.shape[0] not in (n, n * count):
            raise InputError(
                f"a kernel of {n} points and {count} outputs has {n} rows, or {n * count} where it couples the "
                f"outputs: got {kernel.shape[0]}"
            )
        block = kernel.shape[0] // n
        learned = now.labelled
        precision = self.objective.precision(outputs, self.loss, block, learned) * now.weights[:, None, None]
        targets = self._targets(now)
        weights = torch.zeros_like(precision)
        weights[targets] = self.objective.weights(outputs, self.loss, block)[targets]
        ridge = self.reg * scale(kernel, learned, precision)
        known = learned if known is None else known
        found = posterior(kernel, known, precision, weights, ridge)
        return Scene(found, outputs, self.loss, targets, now.weights)

    def _targets(self, now: Round) -> Tensor:
        if self.targets is None:
            found = (now.labels < 0).nonzero()[:, 0]
        else:
            found = as_numbers(self.targets, len(now.labels), "targets")
            if not len(found):
                raise InputError("targets are the points whose predictions matter: got none")
        if self.objective.pairs and len(found) > self.target_size:
            drawn = torch.randperm(len(found), generator=now.generator)[: self.target_size]
            found = found[drawn.sort().values]
        return found
