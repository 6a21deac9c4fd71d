"""What all parts of distillation check and compute alike: numbers of examples, logits, and points of the simplex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.solve.losses import TOLERANCE, require_classes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    Indices = Tensor | np.ndarray | Sequence[int]


def numbers(indices: Indices, size: int) -> Tensor:
    """Numbers of examples as int64, (n,), in the memory of the CPU.

    Raises:
        InputError: if they are no whole numbers from 0 to size - 1.
    """
    found = indices if isinstance(indices, Tensor) else torch.as_tensor(indices)
    if found.ndim == 1 and not len(found):
        return torch.empty(0, dtype=torch.int64)
    if found.ndim != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise InputError(
            f"indices: got shape {tuple(found.shape)} of {found.dtype}, expected whole numbers of examples, (n,). "
            "Indexed(dataset) gives them with each batch"
        )
    if int(found.min()) < 0 or int(found.max()) >= size:
        raise InputError(
            f"indices: got numbers from {int(found.min())} to {int(found.max())}, expected 0 to {size - 1}: these are "
            f"targets of {size} training examples. Number the examples of the whole training set, not of a batch"
        )
    return found.detach().to("cpu", torch.int64)


def class_numbers(labels: Any, classes: int, name: str = "labels") -> Tensor:
    """Classes as int64, (n,).

    Raises:
        InputError: if they are no whole numbers from 0 to classes - 1.
    """
    found = labels if isinstance(labels, Tensor) else torch.as_tensor(labels)
    if found.ndim != 1 or not len(found) or found.is_floating_point() or found.dtype == torch.bool:
        raise InputError(f"{name}: got shape {tuple(found.shape)} of {found.dtype}, expected classes as numbers, (n,)")
    if int(found.min()) < 0 or int(found.max()) >= classes:
        raise InputError(
            f"{name}: got classes from {int(found.min())} to {int(found.max())}, expected 0 to {classes - 1}"
        )
    return found.detach().long()


def points_of_simplex(p: Any, name: str = "probabilities") -> Tensor:
    """Probabilities (n, C), as they are.

    Raises:
        InputError: if they are of one class, not finite, negative, or do not sum to 1 within `TOLERANCE`.
    """
    found = p if isinstance(p, Tensor) else torch.as_tensor(p)
    if found.ndim != 2 or not found.is_floating_point() or 0 in found.shape:
        raise InputError(f"{name}: got shape {tuple(found.shape)} of {found.dtype}, expected probabilities (n, C)")
    require_classes(found.shape[1])
    sums = found.double().sum(1)
    if not bool(torch.isfinite(sums).all()):
        raise InputError(f"{name}: some are not finite (NaN or infinity)")
    if float((sums - 1).abs().max()) > TOLERANCE or float(found.min()) < -TOLERANCE:
        raise InputError(
            f"{name}: got rows that sum to {float(sums.min()):.4g} up to {float(sums.max()):.4g} and a least entry of "
            f"{float(found.min()):.3g}, expected points of the simplex. For logits take softmax(1) first"
        )
    return found.detach()


def same_shape(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Raise where two tables do not belong together.

    Raises:
        InputError: if the shapes differ.
    """
    if a.shape != b.shape:
        raise InputError(
            f"{names[0]} and {names[1]} must have one shape: got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Take the same examples, in the same order, and the same classes"
        )


def finite_logits(logits: Tensor, shape: tuple[int, int]) -> Tensor:
    """Logits without their graph, in float32 or better.

    Raises:
        InputError: if they have another shape or are not finite.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or tuple(logits.shape) != shape:
        got = f"shape {tuple(logits.shape)} of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"logits: got {got}, expected floating point numbers of shape {shape}, a row for each index")
    found = logits.detach()
    if not bool(torch.isfinite(found).all()):
        raise InputError("logits: some are not finite (NaN or infinity): training has diverged; nothing was changed")
    return found.to(torch.promote_types(found.dtype, torch.float32))


def positive(value: float, name: str) -> None:
    """Refuse what is no positive number.

    Raises:
        InputError: with the name and the value.
    """
    if not 0 < value < float("inf"):
        raise InputError(f"{name}: got {value!r}, expected a positive number")


def tempered(p: Tensor, temperature: float) -> Tensor:
    """Softmax(log p / temperature), (n, C): what the logits behind p would give at another temperature; 0 stays 0."""
    return p if temperature == 1 else (p.log() / temperature).softmax(-1)
