"""Covariances between hidden units at pairs of positions, and what is common to all operations on them.

At infinite width a layer is known by two numbers for each pair of examples and each pair of positions (pixels, tokens):
the second moment of a unit, E[h(x, p) h(x', p')] (NNGP), and the tangent kernel of a unit. Position axes stand behind
the examples. Where all pairs of positions are kept, the two axes of a pair are neighbours, (..., H, H', W, W'), so that
a convolution slides along them one after another; where only equal positions matter there is one axis each.

    self     one example with itself: (n, positions)           variances, for the nonlinearities
    cross    pairs of examples:       (n, m, positions)        the kernel
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Covariance:
    """Of one layer, for a block of examples.

    Attributes:
        nngp: second moments, examples then positions.
        ntk: tangent kernel, in the same shape; None where it is zero (no trained parameter so far) or not wanted.
        rank: number of position axes of a layer, r.
        full: whether all pairs of positions are there (2 r axes) or equal positions only (r axes).
    """

    nngp: Tensor
    ntk: Tensor | None
    rank: int
    full: bool

    @property
    def lead(self) -> int:
        """Axes of examples: 1 or 2."""
        return self.nngp.ndim - self.rank * (2 if self.full else 1)

    def map(self, change, *, rank: int | None = None) -> Covariance:
        """Both members after the same linear operation."""
        ntk = None if self.ntk is None else change(self.ntk)
        return replace(self, nngp=change(self.nngp), ntk=ntk, rank=self.rank if rank is None else rank)

    def at_equal_positions(self) -> Covariance:
        """What remains of all pairs of positions."""
        if not self.full:
            return self
        found = self.map(lambda values: equal_positions(values, self.rank))
        return replace(found, full=False)

    def plus(self, nngp: Tensor | float, ntk: Tensor | float | None) -> Covariance:
        """Something added to both; `ntk` None for nothing."""
        total = self.ntk
        if ntk is not None:
            total = torch.zeros_like(self.nngp) + ntk if total is None else total + ntk
        return replace(self, nngp=self.nngp + nngp, ntk=total)


@dataclass(frozen=True)
class Block:
    """Which pairs of examples are looked at.

    Attributes:
        lead: 1 for examples with themselves, 2 for rows x columns.
        same: rows x columns where both are one example, (n, m); None where there is none, and for lead 1.
        tangent: whether tangent kernels are wanted beside second moments.
    """

    lead: int
    same: Tensor | None = None
    tangent: bool = True

    def left(self, values: Tensor, full: bool) -> Tensor:
        """A quantity of the rows, (n, positions), as it meets a covariance."""
        return self._placed(values, full, 0)

    def right(self, values: Tensor, full: bool) -> Tensor:
        """A quantity of the columns."""
        return self._placed(values, full, 1)

    def _placed(self, values: Tensor, full: bool, side: int) -> Tensor:
        positions = [(size, 1) if side == 0 else (1, size) for size in values.shape[1:]]
        shape = [size for pair in positions for size in pair] if full else values.shape[1:]
        examples = (len(values),) if self.lead == 1 else (len(values), 1) if side == 0 else (1, len(values))
        return values.reshape(*examples, *shape)

    def coincident(self, found: Covariance) -> Tensor | None:
        """Where both sides are one example at one position: a mask that broadcasts, or None for nowhere."""
        if self.lead == 2 and self.same is None:
            return None
        nngp, lead = found.nngp, self.lead
        examples = nngp.new_ones(1, dtype=torch.bool) if self.same is None else self.same
        mask = examples.reshape(*examples.shape, *(1,) * (nngp.ndim - lead))
        if found.full:
            for axis in range(found.rank):
                size = nngp.shape[lead + 2 * axis]
                shape = [1] * nngp.ndim
                shape[lead + 2 * axis] = shape[lead + 2 * axis + 1] = size
                mask = mask & torch.eye(size, dtype=torch.bool, device=nngp.device).reshape(shape)
        return mask


def equal_positions(values: Tensor, rank: int) -> Tensor:
    """(..., H, H', W, W') to (..., H, W)."""
    lead = values.ndim - 2 * rank
    for _ in range(rank):  # each diagonal leaves its two axes and appends one
        values = values.diagonal(dim1=lead, dim2=lead + 1)
    return values
