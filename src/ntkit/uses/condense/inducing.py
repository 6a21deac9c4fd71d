"""Kernel inducing points: support points moved by gradient descent until a regression from them predicts the data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError, ModelError
from ntkit.kernel.memory import checked_memory
from ntkit.tangent.identity import describe
from ntkit.uses.condense.augment import Augmentation
from ntkit.uses.condense.course import Course, Recorded
from ntkit.uses.condense.regression import RIDGE, Score, block, blocks, checked_ridge, fit, lower, regularised
from ntkit.uses.condense.storage import Folder
from ntkit.uses.condense.support import Labelled, Support, balanced, centred

if TYPE_CHECKING:
    from ntkit.kernel.function import KernelFunction


@dataclass(frozen=True)
class Inducing:
    """How the points are moved; the defaults are those of the authors' notebook.

    Attributes:
        steps: of Adam.
        learning_rate: of Adam.
        batch: targets of one step, as many of every class, so that those of a rare one come several times; all there
            are, each once and so not balanced, where there are no more.
        learn_labels: whether the targets of the support set move as well.
        ridge: in units of the mean diagonal entry of K_ss.
        augment: what is done to every batch of targets, in this order; a sequence.
        record: steps that are recorded besides 0, 1, 2, 4, ... and the last; none beyond it.
        patience: with examples held out, end after so many recorded steps without a better accuracy on them, and give
            back the best; None to watch only.
    """

    steps: int = 1000
    learning_rate: float = 4e-2
    batch: int = 5000
    learn_labels: bool = False
    ridge: float = RIDGE
    augment: Sequence[Augmentation] = ()
    record: Sequence[int] = ()
    patience: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers and the changes.

        Raises:
            InputError: if one cannot be used.
        """
        for name, value, least in (("steps", self.steps, 1), ("batch", self.batch, 1), ("patience", self.patience, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"{name} is a whole number, {least} or more: got {value!r}")
        if not self.learning_rate > 0 or not math.isfinite(self.learning_rate):
            raise InputError(f"learning_rate is a positive number: got {self.learning_rate}")
        checked_ridge(self.ridge)
        if not isinstance(self.augment, Sequence) or not all(
            isinstance(change, Augmentation) for change in self.augment
        ):
            raise InputError(f"augment is a sequence of changes, such as (Flip(), Shift(2)): got {self.augment!r}")
        steps = tuple(self.record) if isinstance(self.record, Iterable) else ()
        whole = all(isinstance(step, Integral) and not isinstance(step, bool) for step in steps)
        if not isinstance(self.record, Iterable) or not whole or not all(0 <= step <= self.steps for step in steps):
            raise InputError(f"record is a list of steps, whole numbers from 0 to {self.steps}: got {self.record!r}")
        # of numpy's integers as well, which no state on disk can be named by
        object.__setattr__(self, "record", tuple(int(step) for step in steps))

    def recorded(self) -> tuple[int, ...]:
        """The steps at which the points are looked at and written down."""
        powers = [0, *(2**k for k in range(self.steps.bit_length()) if 2**k < self.steps), self.steps]
        return tuple(sorted({*powers, *self.record}))


@dataclass(frozen=True, eq=False)
class Condensed:
    """What came of it.

    Attributes:
        support: the points and targets: the last ones, or with `patience` the best.
        start: those it began with.
        step: at which `support` was.
        records: loss, accuracy, ridge and condition on the way.
        stopped: whether patience ended it before the last step.
    """

    support: Support
    start: Support
    step: int
    records: tuple[Recorded, ...]
    stopped: bool


def kernel_inducing_points(
    kernel: KernelFunction,
    start: Support,
    data: tuple[Tensor, Tensor],
    *,
    generator: torch.Generator,
    settings: Inducing | None = None,
    held_out: tuple[Tensor, Tensor] | None = None,
    folder: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Condensed:
    """Move support points by Adam on the loss of the regression from them (Nguyen, Chen and Lee 2021).

    The gradient is exact and streamed: targets come in blocks, each adds to the gradients of the points and of the
    coefficients (K_ss + lambda I)^-1 y_s, and these go back through the factorization once. Cost of a step: about three
    times that of K_ts and K_ss, and n^3.

    Args:
        kernel: differentiable in the examples, one row for each.
        start: the points to begin with, see `random_support`.
        data: examples (N, ...) and class numbers (N,).
        generator: of the batches and the augmentation.
        settings: see `Inducing`.
        held_out: examples and labels that the regression is scored on at every recorded step.
        folder: where the state is kept; a killed run that is given again goes on there, and ends at the same numbers.
        memory: bytes of working space; an eighth of the machine's by default.
        progress: is told (steps done, in all).

    Raises:
        InputError: if anything does not fit; nothing has been computed then.
        ModelError: if the kernel carries no gradients to the points (nothing has been computed then), or the loss is no
            longer finite.
        NotPositiveDefiniteError: if K_ss + lambda I becomes singular in float64.
        StoreError: if the folder holds a run of something else.
    """
    own = settings or Inducing()
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a torch.Generator, torch.Generator().manual_seed(0): got {generator!r}")
    targets = Labelled.of(data, classes=start.classes)
    rows = targets.rows()
    seen = None if held_out is None else Labelled.of(held_out, classes=start.classes, named="the examples held out")
    for name, given in (("the data", targets), *((("the examples held out", seen),) if seen else ())):
        if given.x.shape[1:] != start.x.shape[1:]:
            raise InputError(
                f"{name} have the shape of the support points, {tuple(start.x.shape[1:])}: got "
                f"{tuple(given.x.shape[1:])}"
            )
    if own.patience is not None and seen is None:
        raise InputError("patience asks for examples held out: give held_out=(x, labels)")
    checked_memory(memory, start.x.device)
    _try(kernel, start, targets, own, generator)

    x, y = (t.detach().clone() for t in (start.x, start.y))
    moved = [x.requires_grad_(), y.requires_grad_()] if own.learn_labels else [x.requires_grad_()]
    course = Course(x, y, torch.optim.Adam(moved, own.learning_rate), generator)
    place = None
    if folder is not None:
        place = Folder(Path(folder), kernel, start, targets, seen, describe(own), generator)
        place.restore(course)
    recorded = set(own.recorded())

    def draw() -> Labelled:
        chosen = balanced(rows, own.batch, generator)
        batch = targets.x[chosen]
        for change in own.augment:
            batch = change(batch, generator)
        return Labelled(batch, targets.labels[chosen], targets.classes)

    while True:
        if course.step in recorded and course.looked < course.step:
            score = None if seen is None else fit(kernel, course.support(), ridge=own.ridge).score(
                (seen.x, seen.labels), memory=memory
            )  # fmt: skip
            _look(course, kernel, own, score)
            if place is not None:
                place.write(course, now=True)
        if course.step == own.steps or course.waited(own.patience):
            break
        course.optimizer.zero_grad()
        loss = kip_gradient(kernel, x, y, draw(), ridge=own.ridge, memory=memory)
        if not math.isfinite(loss):
            raise ModelError(f"the loss is {loss} at step {course.step}: take a smaller learning_rate")
        course.optimizer.step()
        course.step, course.loss = course.step + 1, loss
        if place is not None:
            place.write(course, now=False)
        if progress is not None:
            progress(course.step, own.steps)
    best = course.best if own.patience is not None and course.best is not None else (course.step, course.support())
    return Condensed(best[1], start, best[0], tuple(course.records), course.step < own.steps)


def _try(kernel: KernelFunction, start: Support, targets: Labelled, own: Inducing, generator: torch.Generator) -> None:
    """A step with two points and two targets, so that what cannot be done is said before a folder is made.

    The generator stays where it is.

    Raises:
        InputError: if the targets cannot be augmented, or the kernel is of another shape.
        ModelError: if the kernel carries no gradients to the points.
    """
    spare = torch.Generator(generator.device)
    spare.set_state(generator.get_state())
    batch = targets.x[:2]
    for change in own.augment:
        changed = change(batch, spare)
        if changed.shape != batch.shape:
            raise InputError(
                f"augmentation keeps the shape of examples: {change!r} makes {tuple(changed.shape)} of "
                f"{tuple(batch.shape)}"
            )
        batch = changed
    x = start.x[:2].detach().clone()
    with torch.no_grad():
        regularised(kernel, x, own.ridge)  # these two refuse what is of another shape
        block(kernel, batch, x)
    x.requires_grad_()
    try:
        found = regularised(kernel, x, own.ridge)[0], block(kernel, batch, x)
    except InputError as error:  # some kernels say so themselves
        raise ModelError(_without_gradients(kernel)) from error
    for entries in found:
        # a kernel may have gradients to parameters of its own alone
        if not entries.requires_grad or torch.autograd.grad(entries.sum(), x, allow_unused=True)[0] is None:
            raise ModelError(_without_gradients(kernel))


def _without_gradients(kernel: KernelFunction) -> str:
    return (
        f"the kernel carries no gradients to its examples: {type(kernel).__name__} is not differentiable. Take an "
        "infinite-width kernel, RBF, or GradientFeatures of a network"
    )


def kip_gradient(
    kernel: KernelFunction, x: Tensor, y: Tensor, batch: Labelled, *, ridge: float = RIDGE, memory: int | None = None
) -> float:
    """L of support points on a batch of targets; its gradient is added to that of x, and of y where y asks for one.

    Raises:
        ModelError: if the kernel carries no gradient to x.
    """
    matrix, absolute = regularised(kernel, x, ridge)
    if not matrix.requires_grad:
        raise ModelError(_without_gradients(kernel))
    coefficients = torch.cholesky_solve(y, lower(matrix, absolute))
    held = coefficients.detach().requires_grad_()
    total, scale = 0.0, 1 / (2 * len(batch.x) * batch.classes)
    for rows in blocks(len(batch.x), kernel, Support(x.detach(), y.detach()), memory):
        wanted = centred(batch.labels[rows], batch.classes).to(held)
        part = (block(kernel, batch.x[rows], x) @ held - wanted).square().sum() * scale
        part.backward()
        total += float(part.detach())
    coefficients.backward(held.grad)
    return total


def _look(course: Course, kernel: KernelFunction, own: Inducing, score: Score | None) -> None:
    """Record where the points are; the loss is that of the last step's batch, before the step."""
    if score is None:
        found = fit(kernel, course.support(), ridge=own.ridge)
        course.record(None, found.ridge, found.condition)
    else:
        course.record(score, score.ridge, score.condition)
