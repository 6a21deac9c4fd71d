"""Targets of a downstream task: classes, or points, sharp or smoothed."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.losses import TOLERANCE, off_simplex


def smoothed(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """(1 - smoothing) of the target and smoothing / C of every class, (N, C) float64; without smoothing, as given.

    A head that is probed to such targets keeps a part of its energy against the sharp ones: it never gets to zero.

    Raises:
        InputError: if smoothing is not in [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise InputError(f"smoothing: got {smoothing!r}, expected a number from 0 to below 1")
    if not smoothing:
        return targets
    if not targets.is_floating_point():
        targets = torch.nn.functional.one_hot(targets.long(), classes).double()
    return (1 - smoothing) * targets.double() + smoothing / classes


def count_classes(*targets: Tensor) -> int:
    """C, from classes (N,), or points (N, C) or (N,).

    Raises:
        InputError: if they are of different kinds or sizes, not tensors, or classes below 0.
    """
    for y in targets:
        if not isinstance(y, Tensor) or y.ndim == 0 or y.ndim > 2 or (y.ndim == 2 and not y.is_floating_point()):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InputError(f"targets are a tensor of classes (N,), or of points (N, C): got {got}")
        if not y.is_floating_point() and int(y.min()) < 0:
            raise InputError(f"classes are numbers from 0 on: got {int(y.min())}. Leave examples without a label out")
    kinds = {y.shape[1] if y.ndim == 2 else 1 if y.is_floating_point() else 0 for y in targets}
    if len(kinds) > 1:
        raise InputError("training and validation targets are of different kinds: expected classes or points in both")
    (kind,) = kinds
    return kind or max(int(y.max()) for y in targets) + 1


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of examples whose largest output is the target's; NaN where targets do not say classes.

    That is for a single output, and for points that are no probabilities.
    """
    if outputs.shape[1] == 1 or (targets.is_floating_point() and not off_simplex(targets) <= TOLERANCE):
        return float("nan")
    truth = targets.argmax(1) if targets.ndim == 2 else targets
    return float((outputs.argmax(1) == truth.to(outputs.device)).double().mean())
