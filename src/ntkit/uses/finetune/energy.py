"""How far fine-tuning will move the features, before it is paid for: energy, direction and the slow kernel.

With features z(x), a head g(z) and fitted values q (softmax of the outputs, or the outputs themselves), one step of
gradient descent on all N examples moves the features of any x by

    z_1(x) - z_0(x) = (eta/N) sum_n kappa(x, x_n) (dg/dz)(x_n)^T (y_n - q_n) + O(eta^2)
                                    slow kernel   direction          energy

(Ren, Guo, Bae and Sutherland, ICLR 2023, equation 3), where kappa = J_z J_z^T is the backbone's tangent kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.losses import Loss, as_loss
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits
from ntkit.uses.finetune.split import BATCH, Split, as_split


def energies(outputs: Tensor, targets: Tensor, loss: Loss | None = None) -> Tensor:
    """||y_n - q_n||_2 of every example, (N,).

    Args:
        outputs: of the network, (N, C).
        targets: classes (N,) or points (N, C); those that fine-tuning will use, smoothed if it smooths.
        loss: that fine-tuning will use; cross-entropy by default.

    Raises:
        InputError: if the targets cannot be the loss's.
    """
    loss = as_loss(loss)
    return torch.linalg.vector_norm(loss.misfit(outputs, targets), dim=1)


def average_initial_energy(split: Split, x: Any, y: Tensor, *, loss: Loss | None = None) -> float:
    """(1/N) sum_n ||y_n - q_n||_2 of a network about to be fine-tuned. Cost: N forward passes.

    The longer the head has been probed, the smaller; how far the features can move is bounded by a multiple of it.

    Raises:
        InputError: if the examples or targets cannot be used.
    """
    return float(energies(as_split(split).outputs(x), y, loss).double().mean())


def direction(split: Split, x: Any, y: Tensor, *, loss: Loss | None = None) -> Tensor:
    """(dg/dz)^T (y - q) of every example, (N, h): where its own loss pulls its features.

    For a linear head it lies in the span of the rows of its weights. Cost: N forward passes, and backward passes
    through the head.

    Raises:
        InputError: if the examples or targets cannot be used.
        ModelError: if the network cannot be cut there.
    """
    loss, examples = as_loss(loss), as_split(split).tangent().examples(x)
    _require_as_many(examples.size, y)
    split.check(examples)
    found = []
    for start in range(0, len(examples), BATCH):
        some = examples.batch(slice(start, start + BATCH), split.device)
        wanted = y[start : start + some.size].to(split.device)
        found.append(split.pulled(some, lambda outputs, wanted=wanted: loss.misfit(outputs, wanted)))
    return torch.cat(found)


def slow_kernel(split: Split, x1: Any, x2: Any = None) -> TangentKernel:
    """kappa = J_z(x1) J_z(x2)^T, the backbone's tangent kernel on its h features: (N*h, M*h), read in tiles.

    Raises:
        ModelError: if the network cannot be cut there.
    """
    tangent = as_split(split).tangent()
    split.check(tangent.examples(x1))
    return TangentKernel(tangent, x1, x2)


@dataclass(frozen=True, eq=False)
class FirstStep:
    """What the first step of gradient descent on all examples does to features, to first order.

    Attributes:
        velocity: change of the features for each unit of learning rate, (M, h).
        features: before the step, (M, h).
        energy: average initial energy of the N examples that are trained on.
        pull: mean ||(dg/dz)^T (y - q)||: energy times the strength of the head.
    """

    velocity: Tensor
    features: Tensor
    energy: float
    pull: float

    @property
    def speed(self) -> float:
        """Mean length of the features' change for each unit of learning rate."""
        return float(torch.linalg.vector_norm(self.velocity.double(), dim=1).mean())

    @property
    def turning(self) -> float:
        """Mean cosine between features and their change: 1 stretches them in place, 0 turns them, -1 shrinks them."""
        return float(torch.nn.functional.cosine_similarity(self.velocity.double(), self.features.double(), 1).mean())

    def after(self, learning_rate: float) -> Tensor:
        """The features after one step, (M, h)."""
        return self.features + learning_rate * self.velocity


def first_step(split: Split, x: Any, y: Tensor, *, at: Any = None, loss: Loss | None = None) -> FirstStep:
    """The change of features that one full-batch step would make; exact up to the square of the learning rate.

    Args:
        split: the network, its head as it would be fine-tuned from.
        x: the N examples it would be tuned on.
        y: their targets, with the smoothing that fine-tuning uses.
        at: the M examples whose features are looked at; x by default.
        loss: of fine-tuning; cross-entropy by default.

    The slow kernel is never formed. Cost: a forward and a backward pass of the N examples, and about four forward
    passes of the M.

    Raises:
        InputError: if the examples or targets cannot be used.
        ModelError: if the network cannot be cut there.
    """
    tangent = as_split(split).tangent()
    pulls = direction(split, x, y, loss=loss)
    at = x if at is None else at
    gradient = tangent.vjp(x, pulls / len(pulls))
    return FirstStep(
        velocity=tangent.jvp(at, gradient),
        features=split.features(at),
        energy=average_initial_energy(split, x, y, loss=loss),
        pull=float(torch.linalg.vector_norm(pulls.double(), dim=1).mean()),
    )


@dataclass(frozen=True, eq=False)
class Foreseen:
    """A whole fine-tuning, foreseen by the network linearised where it stands.

    Attributes:
        before: features before it, (M, h).
        after: features that are foreseen after it, (M, h).
        energies: average energy before every step and at the end, (steps + 1,).
    """

    before: Tensor
    after: Tensor
    energies: Tensor

    @property
    def distance(self) -> float:
        """Mean length of the foreseen change."""
        return float(torch.linalg.vector_norm((self.after - self.before).double(), dim=1).mean())


def foresee(
    split: Split,
    x: Any,
    y: Tensor,
    *,
    learning_rate: float,
    steps: int,
    at: Any = None,
    loss: Loss | None = None,
) -> Foreseen:
    """What plain full-batch gradient descent on backbone and head would do to features, in the linearised network.

    Its outputs are f_t = f_0 + Theta a_t with the full tangent kernel Theta (N*C, N*C) and a_{t+1} = a_t + (eta/N)
    (y - q_t); its features then move by J_z J^T a. It says how far the features go as long as the kernel stays what it
    is, which it does the better, the smaller the energy.

    Args:
        split: the network, its head as it would be fine-tuned from.
        x: the N examples it would be tuned on; a few hundred.
        y: their targets, with the smoothing that fine-tuning uses.
        learning_rate: eta.
        steps: of gradient descent; with momentum m a step counts about 1 / (1 - m) times.
        at: the M examples whose features are looked at; x by default.
        loss: of fine-tuning; cross-entropy by default.

    Cost: the exact kernel of N*C rows, steps * (N*C)^2, and as much as `first_step`. Memory: 8 (N*C)^2 bytes.

    Raises:
        InputError: if the examples or targets cannot be used, a number is not positive, or it diverges.
        ModelError: if the network cannot be cut there.
    """
    loss, at = as_loss(loss), x if at is None else at
    if not 0 < learning_rate < math.inf or steps < 1:
        raise InputError(f"learning_rate and steps are positive and finite: got {learning_rate!r} and {steps!r}")
    slow = as_split(split).tangent()
    split.check(slow.examples(x))
    _require_as_many(len(slow.examples(x)), y)
    start = split.outputs(x).double()
    whole = linearize(split.model, readout=Logits(split.select))
    theta = TangentKernel(whole, x).dense().double()
    weights, outputs, found = torch.zeros_like(start), start, []
    for _ in range(steps):
        misfit = loss.misfit(outputs, y.to(outputs.device))
        found.append(torch.linalg.vector_norm(misfit, dim=1).mean())
        weights = weights + learning_rate / len(start) * misfit
        outputs = start + (theta @ weights.reshape(-1)).reshape(start.shape)
    if not bool(torch.isfinite(outputs).all()):
        raise InputError(
            f"with learning_rate={learning_rate:g} the linearised network diverges until its numbers overflow: with "
            f"the square loss it converges below {2 * len(start) / float(torch.linalg.matrix_norm(theta, 2)):.3g}"
        )
    found.append(energies(outputs, y.to(outputs.device), loss).mean())
    names = {name.removeprefix("model.") for name in slow.parameter_names}
    backbone = linearize(split.model, readout=Logits(split.select), parameters=lambda name, _: name in names)
    moved = backbone.vjp(x, weights.to(backbone.dtype))
    before = split.features(at)
    return Foreseen(before, before + slow.jvp(at, moved), torch.stack(found))


def _require_as_many(n: int, y: Tensor) -> None:
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != n:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"targets are a tensor with one row for each of {n} examples: got {got}")
