"""Filter-KD: what a network said about each example, averaged along its training (Ren, Guo and Sutherland 2022).

A hard example with a wrong label first moves towards the truth, pulled by the examples that look like it, and only
later to its own label. An average along the path keeps the first part, for every example by itself; stopping early has
to choose one moment for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.uses.distill.simplex import finite_logits, numbers, positive
from ntkit.uses.distill.storage import Dense, Storage, Table
from ntkit.uses.distill.targets import Targets

if TYPE_CHECKING:
    from ntkit.uses.distill.simplex import Indices

# Of what state_dict gives; another one is refused.
VERSION = 1


class EMATargets(Targets):
    """One row of probabilities for each training example, filtered while a teacher trains.

    In the teacher's loop, in training mode, on the augmented view, *before* the optimiser's step:

        for numbers, (x, y) in DataLoader(Indexed(data), ...):
            z = teacher(x)
            table.update(numbers, z)
            ...  # loss, backward, step

    The first time sets Q_i = p_i, p = softmax(z / temperature); after that Q_i = (1 - alpha) Q_i + alpha p_i. Each row
    is updated once an epoch, so it remembers about 1 / alpha epochs (20 by default), and after T epochs the very first
    prediction, that of the untrained network, still has the weight (1 - alpha)^(T - 1): 0.77 after 6, 0.23 after 30,
    0.006 after 100. A teacher that is at its best before 1 / alpha epochs needs a larger alpha, a lower learning rate
    or `debias`; otherwise its table, and a student of it, are much less sure than they should be.

    What is averaged out is the scatter of predictions along the path. A teacher with a high learning rate, at its best
    after 1 / alpha epochs or more, has that; one with a low rate has not, and its average is only older than its
    present (docs/distill.md has the measurements).

    As published, the table of the epoch with the best validation accuracy is taken: `BestSoFar` keeps it beside the
    best network, `best.update(accuracy, teacher=teacher, table=table)`.

    Cost: one softmax and 2 n C numbers copied in each batch; memory as the storage says, and 4 N bytes.
    """

    def __init__(
        self,
        size: int,
        classes: int,
        *,
        alpha: float = 0.05,
        temperature: float = 1.0,
        debias: bool = False,
        storage: Storage | None = None,
        fallback: Targets | None = None,
    ) -> None:
        """An empty table.

        Args:
            size: N, training examples.
            classes: C.
            alpha: weight of the new prediction, in (0, 1]; 0.05 as published.
            temperature: of the filtered softmax; 1 as published.
            debias: whether the t-th update has the weight alpha / (1 - (1 - alpha)^t) instead of alpha, so that the
                first epochs are averaged evenly and the untrained network's prediction has no weight of its own. Not
                published; for teachers that are best before 1 / alpha epochs.
            storage: `Dense()` in float32 by default.
            fallback: targets of examples that were never seen; without it, asking for one is an error.

        Raises:
            InputError: if a number does not fit.
        """
        if size < 1 or classes < 2:
            raise InputError(f"a table needs an example and two classes: got size {size} and {classes} classes")
        if not 0 < alpha <= 1:
            raise InputError(f"alpha: got {alpha!r}, expected a weight of the new prediction, in (0, 1]")
        positive(temperature, "temperature")
        if fallback is not None and (len(fallback), fallback.classes) != (size, classes):
            raise InputError(
                f"fallback: got targets of {len(fallback)} examples and {fallback.classes} classes, expected "
                f"{size} and {classes}"
            )
        self.alpha, self.temperature, self.debias, self.fallback = alpha, temperature, debias, fallback
        self.storage = Dense() if storage is None else storage
        self._classes = classes
        self._table: Table = self.storage.table(size, classes)
        self._updates = torch.zeros(size, dtype=torch.int32)

    @property
    def classes(self) -> int:  # noqa: D102
        return self._classes

    def __len__(self) -> int:
        return len(self._updates)

    @property
    def updates(self) -> Tensor:
        """How often each example was seen, (N,)."""
        return self._updates.clone()

    @property
    def memory_bytes(self) -> int:
        """What the table takes, in memory or on disk."""
        return sum(t.nbytes for t in self._table.tensors().values())

    def update(self, indices: Indices, logits: Tensor) -> None:
        """Take in what the network says about some examples. An example that is there twice counts twice, in order.

        Args:
            indices: (n,) numbers of examples in the whole training set.
            logits: (n, C), of the forward pass that is trained on; its graph is left alone.

        Raises:
            InputError: if a number is out of range, or a logit is not finite; the table is then as it was.
        """
        rows = numbers(indices, len(self))
        p = (finite_logits(logits, (len(rows), self._classes)) / self.temperature).softmax(1)
        p = p.to("cpu", self._table.dtype)
        for places in _without_repeats(rows):
            self._take(rows[places], p[places])

    def _take(self, rows: Tensor, p: Tensor) -> None:
        times = self._updates[rows] + 1
        weight = p.new_full((len(rows),), self.alpha).masked_fill_(times == 1, 1.0)
        if self.debias:
            weight = self.alpha / (1 - (1 - self.alpha) ** times.to(p.dtype))
        weight = weight[:, None]
        self._table.write(rows, (1 - weight) * self._table.read(rows) + weight * p)
        self._updates[rows] = times

    def targets(self, indices: Indices) -> Tensor:
        """The filtered probabilities, (n, C), in float32 (float64 if kept so); rounding is normalised away.

        Raises:
            InputError: if some examples were never seen and there is no fallback.
        """
        rows = numbers(indices, len(self))
        unseen = self._updates[rows] == 0
        found = self._table.read(rows)
        found /= found.sum(1, keepdim=True)
        if bool(unseen.any()):
            if self.fallback is None:
                raise InputError(
                    f"{int(unseen.sum())} of these {len(rows)} examples were never seen by update(), the first is "
                    f"number {int(rows[unseen][0])}. Train the teacher for a whole epoch, or give fallback="
                    "OneHot(labels, classes)"
                )
            found[unseen] = self.fallback.targets(rows[unseen]).to(found.dtype)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on with, bit for bit: tensors and numbers only, a copy.

        It can be read by torch.load(..., weights_only=True). A table on disk is copied too.
        """
        return {name: v.clone() if isinstance(v, Tensor) else v for name, v in self._state().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; everything is checked before anything is changed.

        Raises:
            InputError: if it is of another size, storage, alpha or temperature.
        """
        own = self._state()
        if set(state) != set(own):
            raise InputError(f"state: got entries {sorted(state)}, expected {sorted(own)}: make the table as before")
        for name, value in own.items():
            given = state[name]
            if isinstance(value, Tensor):
                fits = isinstance(given, Tensor) and (given.shape, given.dtype) == (value.shape, value.dtype)
                got, expected = _named(given), _named(value)
            else:
                fits, got, expected = given == value, given, value
            if not fits:
                raise InputError(
                    f"state: {name} is {got}, expected {expected}. Make the table with the size, classes, storage, "
                    "alpha and temperature that the state was saved with"
                )
        self._updates.copy_(state["updates"])
        for name, t in self._table.tensors().items():
            t.copy_(state[name])
        rounding = self.storage.rounding
        if rounding is not None and rounding.generator is not None:
            rounding.generator.set_state(state["random"])

    def _state(self) -> dict[str, Any]:
        """What `state_dict` copies: the tensors themselves."""
        found: dict[str, Any] = {
            "version": VERSION,
            "alpha": self.alpha,
            "temperature": self.temperature,
            "debias": self.debias,
            "classes": self._classes,
            "updates": self._updates,
            **self._table.tensors(),
        }
        rounding = self.storage.rounding
        if rounding is not None and rounding.generator is not None:
            found["random"] = rounding.generator.get_state()
        return found


def _without_repeats(rows: Tensor) -> list[Tensor]:
    """Places of the rows in parts, in which none is there twice: all first times, then all second times."""
    if len(rows.unique()) == len(rows):
        return [torch.arange(len(rows))]
    ordered, places = rows.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(new, torch.arange(len(rows)), 0).cummax(0).values
    turn = torch.arange(len(rows)) - start
    return [places[turn == k] for k in range(int(turn.max()) + 1)]


def _named(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
