"""One label at a time: the pool as the linearised network sees it, updated instead of trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits
from ntkit.uses.active.labels import as_labels, as_numbers, as_weights, draw
from ntkit.uses.active.lookahead import LookAhead
from ntkit.uses.active.strategy import Round, require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ntkit.uses.active.objectives import Objective, Scene
    from ntkit.uses.active.posterior import Posterior


class LookAheadState:
    """Labels that come and go, and what the network would then say, without training.

    The network is linearised where it stands, and its loss is quadratic around its outputs. What it has learned is in
    balance there, so that the predictions are its own outputs at first; labels that come, go or change move them, by
    ridge regression for square loss, by one Newton step for cross-entropy. Ridge, precision of each point's label and
    targets are fixed by what the network has learned. Every update is exact within that model, and scores are of it:
    whatever the order of changes, the state is that of a fresh start with the same labels and the same `learned`.
    (What the network thinks possible is read off the moved outputs. Queries take the gradient there as well, after
    their first pick: see `Greedy`.)
    Cost of an update: a pass over the features (or n^2 c^2 numbers of a kernel).
    """

    def __init__(
        self, strategy: LookAhead, X: Any, y: Any, model: nn.Module, *, learned: Any = None, sample_weight: Any = None
    ) -> None:
        """Look at the pool once.

        Args:
            strategy: its objective, loss, kernel, ridge and targets are used. The ridge is relative to the labels that
                were learned: it becomes a number now and stays (`ridge`), as the targets do.
            X: all n points.
            y: n classes, with the strategy's `missing_label` where there is none.
            model: the network, in evaluation mode; it is not changed.
            learned: the labels that it was trained on, in the form of y; those of y by default. With none at all the
                network is the prior: for square loss the predictions are ridge regression on y around its outputs.
            sample_weight: n weights of labels, of those to come as well; 1 by default.

        Raises:
            InputError: if anything does not fit.
            ModelError: if the network has not the kernel that is asked for.
        """
        require("strategy", strategy, LookAhead, "LookAhead()")
        tangent = linearize(model, readout=Logits(strategy.select))
        n = len(tangent.examples(X))
        self.strategy, self._x = strategy, X
        self._labels = as_labels(y, n, strategy.missing_label)
        self._learned = self._labels.clone() if learned is None else as_labels(learned, n, strategy.missing_label)
        self._weights = torch.ones(n, dtype=torch.float64) if sample_weight is None else as_weights(sample_weight, n)
        self._first, self.scene = self._look(model, self._learned)

    def _look(self, model: nn.Module, learned: Tensor) -> tuple[Tensor, Scene]:
        """The network's own outputs, and the scene after the labels as they are now."""
        tangent = linearize(model, readout=Logits(self.strategy.select))
        generator = torch.Generator().manual_seed(draw(self.strategy.random_state, learned))
        none = torch.zeros(0, dtype=torch.int64)
        now = Round(tangent, self._x, learned, self._weights, none, 0, generator)
        scene = self.strategy.look(now, (self._labels >= 0).nonzero()[:, 0])
        first = scene.outputs
        scene = replace(scene, around=first)
        changed = (self._labels != learned).nonzero()[:, 0]
        if not len(changed):
            return first, scene
        pulls = torch.stack([
            self._pull(first, i, int(self._labels[i])) - self._pull(first, i, int(learned[i])) for i in changed.tolist()
        ])  # fmt: skip
        return first, replace(scene, outputs=first + scene.posterior.moved(changed, pulls))

    @property
    def labels(self) -> np.ndarray:
        """The classes so far, -1 where there is none, (n,)."""
        return self._labels.numpy().copy()

    @property
    def posterior(self) -> Posterior:
        """The covariance after the labels so far."""
        return self.scene.posterior

    @property
    def ridge(self) -> float:
        """The ridge of this state, absolute: the strategy's, times the mean diagonal entry of what was learned."""
        return self.posterior.ridge

    def predict(self, numbers: Sequence[int] | None = None) -> Tensor:
        """Logits of all points, or of some, (n, C), float64.

        Raises:
            InputError: if there is no point of such a number.
        """
        outputs = self.scene.outputs
        return outputs.clone() if numbers is None else outputs[as_numbers(numbers, len(outputs), twice=True)]

    def scores(self, objective: Objective | None = None) -> np.ndarray:
        """What a label of each point is worth now, (n,); NaN for those that have one.

        Args:
            objective: another than the strategy's; one that weighs targets (or the labels so far) in another way needs
                a state of its own.

        Raises:
            InputError: if the posterior was not made for that objective.
        """
        mine, other = self.strategy.objective, objective or self.strategy.objective
        if other is not mine and not all(map(torch.equal, self._rules(other), self._rules(mine))):
            raise InputError(
                f"{type(other).__name__} weighs targets or labels in another way than {type(mine).__name__}, for which "
                "this state was made: make a state with LookAhead(objective=...)"
            )
        free = (self._labels < 0).nonzero()[:, 0]
        found = np.full(len(self._labels), np.nan)
        if len(free):
            found[free.numpy()] = other.scores(self.scene, free).numpy()
        return found

    def _rules(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """How an objective weighs targets and labels."""
        block, loss = self.posterior.block, self.strategy.loss
        learned = (self._learned >= 0).nonzero()[:, 0]
        return (
            objective.weights(self._first, loss, block), objective.precision(self._first, loss, block, learned)
        )  # fmt: skip

    def change(self, number: int, label: int | None = None) -> Tensor:
        """How the logits of all points would move with one label more, (n, C).

        Args:
            number: of a point without a label.
            label: its class; the likeliest by default.

        Raises:
            InputError: if the point has a label already, or either number is out of range.
        """
        self._check(number, labelled=False)
        label = int(self.scene.outputs[number].argmax()) if label is None else self._class(label)
        return self._moved(self.posterior.response(number), number, label)

    def add(self, number: int, label: int) -> None:
        """One label more.

        Raises:
            InputError: if the point has a label already, or either number is out of range.
        """
        self._check(number, labelled=False)
        label = self._class(label)
        misfit = self._misfit(number, label)
        self._move(self.posterior.add(number), misfit)
        self._labels[number] = label

    def remove(self, number: int) -> None:
        """One label less.

        Raises:
            InputError: if the point has none.
        """
        self._check(number, labelled=True)
        misfit = self._misfit(number, int(self._labels[number]))
        self._move(self.posterior.remove(number), misfit)
        self._labels[number] = -1

    def relabel(self, number: int, label: int) -> None:
        """Another class for a point that has one.

        Raises:
            InputError: if it has none, or the class is out of range.
        """
        self._check(number, labelled=True)
        label = self._class(label)
        change = self._pull(self._first, number, label) - self._pull(self._first, number, int(self._labels[number]))
        moved = self.posterior.moved(torch.tensor([number]), change[None])
        self.scene = replace(self.scene, outputs=self.scene.outputs + moved)
        self._labels[number] = label

    def refresh(self, model: nn.Module) -> None:
        """Start afresh from a network that has been trained on the labels so far: ridge and targets are theirs then.

        Raises:
            InputError: if its outputs are of another number.
            ModelError: if it has not the kernel that is asked for.
        """
        first, scene = self._look(model, self._labels)
        if first.shape != self._first.shape:
            raise InputError(f"the network has {first.shape[1]} outputs, the one before had {self._first.shape[1]}")
        self._first, self.scene, self._learned = first, scene, self._labels.clone()

    def _pull(self, first: Tensor, number: int, label: int) -> Tensor:
        """Minus the gradient of a label's weighted loss at the network's own outputs, (C,); 0 for no label."""
        if label < 0:
            return first.new_zeros(first.shape[1])
        outputs = first[number][None]
        return self._weights[number] * self.strategy.loss.misfit(outputs, torch.tensor([label]))[0]

    def _misfit(self, number: int, label: int) -> Tensor:
        """The same at the outputs as they are now, in the quadratic model."""
        return self.scene.misfit(torch.tensor([number]), torch.tensor([label]))[0]

    def _moved(self, response: Tensor, number: int, label: int) -> Tensor:
        return _apply(response, self._misfit(number, label))

    def _move(self, response: Tensor, misfit: Tensor) -> None:
        self.scene = replace(self.scene, outputs=self.scene.outputs + _apply(response, misfit))

    def _check(self, number: int, *, labelled: bool) -> None:
        as_numbers([number], len(self._labels))
        if (int(self._labels[number]) >= 0) != labelled:
            raise InputError(f"point {number} has {'no label' if labelled else 'a label already'}")

    def _class(self, label: int) -> int:
        """A class as a plain int: 1.0 is in a range, too, and would be taken for a soft target."""
        count = self._first.shape[1]
        if label not in range(count):
            raise InputError(f"labels are classes from 0 to {count - 1}: got {label}")
        return int(label)


def _apply(response: Tensor, misfit: Tensor) -> Tensor:
    """(n, C) from blocks (n, c, c) and (C,)."""
    return response[:, 0] * misfit if response.shape[1] == 1 else response @ misfit
