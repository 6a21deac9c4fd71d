"""Label solve: the best targets for given points, which is one least-squares problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.uses.condense.regression import RIDGE, block, blocks, checked_ridge, lower, regularised, spectrum
from ntkit.uses.condense.support import Labelled, Support, centred

if TYPE_CHECKING:
    from ntkit.kernel.function import KernelFunction


@dataclass(frozen=True, eq=False)
class Solved:
    """Support points with the targets that predict the data best.

    Attributes:
        support: the points as they were, and the new targets.
        loss: L with them, on the data.
        loss_before: with the targets as they were.
        rank: of A = K_ts (K_ss + lambda I)^-1 in floating point; with less than n, the targets are the smallest of
            those that do it.
        condition: of A: its largest singular value by the smallest of those that count.
    """

    support: Support
    loss: float
    loss_before: float
    rank: int
    condition: float


def label_solve(
    kernel: KernelFunction,
    support: Support,
    data: tuple[Tensor, Tensor],
    *,
    ridge: float = RIDGE,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Solved:
    """y_s* = argmin || y_t - K_ts (K_ss + lambda I)^-1 y_s ||^2 (Nguyen, Chen and Lee 2021).

    The tall matrix A = K_ts (K_ss + lambda I)^-1 never exists: blocks of it join a triangular factor one after another
    (QR), which is as exact as the factorization of the whole; normal equations would square its condition. What is left
    is a pseudo-inverse of n x n. Cost: 2 N n^2 beside the kernel.

    Args:
        kernel: one row for each example.
        support: n points; their targets are replaced.
        data: examples (N, ...) and class numbers (N,).
        ridge: in units of the mean diagonal entry of K_ss.
        memory: bytes of working space; an eighth of the machine's by default.
        progress: is told (examples done, in all).

    Raises:
        InputError: if the data do not fit the support set, or the kernel between both is zero.
        NotPositiveDefiniteError: if K_ss + lambda I is singular in float64.
    """
    checked_ridge(ridge)
    found, n = Labelled.of(data, classes=support.classes), len(support)
    if len(found.x) < n:
        raise InputError(f"{n} points stand for as many examples or more: got {len(found.x)}")
    with torch.no_grad():
        matrix, absolute = regularised(kernel, support.x, ridge)
        values, factor = spectrum(matrix, absolute), lower(matrix, absolute)
        triangle = factor.new_zeros(0, n + support.classes)
        for rows in blocks(len(found.x), kernel, support, memory):
            weights = torch.cholesky_solve(block(kernel, found.x[rows], support.x).T, factor).T
            targets = centred(found.labels[rows], found.classes).to(weights)
            triangle = torch.linalg.qr(torch.cat([triangle, torch.cat([weights, targets], 1)]), mode="r").R
            if progress is not None:
                progress(rows.stop, len(found.x))
        reduced, right = triangle[:, :n], triangle[:, n:]
        u, s, vh = torch.linalg.svd(reduced, full_matrices=False)
        if not s[0] > 0:
            raise InputError("the kernel between the data and the points is zero: no targets of theirs reach the data")
        # rounding in K_ts is magnified by the inverse: what is below that is no direction of the points
        kept = s > s[0] * max(len(found.x), float(values[-1] / values[0])) * torch.finfo(s.dtype).eps
        y = vh.T[:, kept] @ ((u.T @ right)[kept] / s[kept, None])

    def loss(y: Tensor) -> float:
        return float((right - reduced @ y).square().sum() / (2 * len(found.x) * found.classes))

    return Solved(Support(support.x, y), loss(y), loss(support.y), int(kept.sum()), float(s[0] / s[kept][-1]))
