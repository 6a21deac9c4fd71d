"""Early stopping: the best of what a training loop has seen so far, kept aside."""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ntkit.errors import InputError


class Stateful(Protocol):
    """A network, an optimiser, `EMATargets`: whatever has a state."""

    def state_dict(self) -> dict[str, Any]:
        """What it goes on with."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Go on from it."""
        ...


class BestSoFar:
    """Copies, in the memory of the CPU, of the states at the best validation score.

        best = BestSoFar(patience=20)
        for epoch in ...:
            ...
            best.update(accuracy, teacher=teacher, table=table)
            if best.exhausted: break
        best.restore(teacher=teacher)  # only now is the network changed

    Of equal scores the first is kept. ESKD is the teacher at its best, plain KD the one of the last epoch.

    Attributes:
        score: the best; None before the first.
        epoch: which call of `update` it was, from 0.
        seen: calls of `update`.
    """

    def __init__(self, *, patience: int | None = None, lower_is_better: bool = False) -> None:
        """Nothing is kept yet.

        Args:
            patience: calls without a better score after which it is `exhausted`; None for never.
            lower_is_better: for a loss; accuracies are better when higher.

        Raises:
            InputError: if patience is not positive.
        """
        if patience is not None and patience < 1:
            raise InputError(f"patience: got {patience}, expected 1 epoch or more, or None")
        self.patience, self.lower_is_better = patience, lower_is_better
        self.score: float | None = None
        self.epoch, self.seen = -1, 0
        self._states: dict[str, Any] = {}

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` scores were no better."""
        return self.patience is not None and self.seen - 1 - self.epoch >= self.patience

    def update(self, score: float, **things: Stateful) -> bool:
        """Look at a new score, and keep the states of these things if it is the best.

        Args:
            score: a finite number.
            things: what to keep, by name; always the same names. They are not changed.

        Raises:
            InputError: if the score is not finite, or other things than before are given.

        Cost: a copy of the states for every best score.
        """
        score = float(score)
        if not math.isfinite(score):
            raise InputError(f"score: got {score}, expected a finite number. Training has diverged: lower its rate")
        if self._states and set(things) != set(self._states):
            raise InputError(f"things: got {sorted(things)}, expected those kept before, {sorted(self._states)}")
        better = self.score is None or (score < self.score if self.lower_is_better else score > self.score)
        if better:
            self._states = {name: _on_cpu(thing.state_dict()) for name, thing in things.items()}
            self.score, self.epoch = score, self.seen
        self.seen += 1
        return better

    def state(self, name: str) -> dict[str, Any]:
        """A copy of what is kept under a name.

        Raises:
            InputError: if nothing is.
        """
        if name not in self._states:
            raise InputError(f"nothing is kept as {name!r}: there are {sorted(self._states)}. Call update first")
        return copy.deepcopy(self._states[name])

    def restore(self, **things: Stateful) -> None:
        """Put kept states back, into the same things or others that are made alike.

        Raises:
            InputError: if nothing is kept under one of the names; nothing is changed then.
        """
        states = {name: self.state(name) for name in things}
        for name, thing in things.items():
            thing.load_state_dict(states[name])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint of the loop itself; torch.load(..., weights_only=True) reads it."""
        return {"score": self.score, "epoch": self.epoch, "seen": self.seen, "states": copy.deepcopy(self._states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it.

        Raises:
            InputError: if it is no state of this class.
        """
        if set(state) != {"score", "epoch", "seen", "states"}:
            raise InputError(f"state: got entries {sorted(state)}, expected what BestSoFar.state_dict() gave")
        self.score, self.epoch, self.seen = state["score"], state["epoch"], state["seen"]
        self._states = copy.deepcopy(state["states"])


def _on_cpu(state: Any) -> Any:
    """A copy that later training does not change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _on_cpu(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_on_cpu(value) for value in state)
    return copy.deepcopy(state) if not isinstance(state, torch.dtype) else state
