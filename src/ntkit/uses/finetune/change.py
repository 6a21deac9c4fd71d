"""How features have changed, from before fine-tuning to after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.features import FeatureKernel
from ntkit.solve.spectrum import cka


@dataclass(frozen=True)
class FeatureChange:
    """Means over the examples, of features z_0 before and z_T after.

    Attributes:
        distance: ||z_T - z_0||.
        cosine: between z_T and z_0, over the examples for which neither is zero.
        dot: <z_T, z_0>.
        norm_before: ||z_0||.
        norm_after: ||z_T||.
        cka: linear centred kernel alignment of all z_0 with all z_T: 1 where they differ by a rotation and a scale; NaN
            where all examples have the same features.
    """

    distance: float
    cosine: float
    dot: float
    norm_before: float
    norm_after: float
    cka: float

    @property
    def relative_distance(self) -> float:
        """Distance in units of the norm before."""
        return self.distance / self.norm_before if self.norm_before else float("nan")

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"features have moved by {self.relative_distance:.1%} of their length: cosine {self.cosine:.3f}, dot "
            f"product {self.dot:.4g} (norm {self.norm_before:.4g} before, {self.norm_after:.4g} after), "
            f"CKA {self.cka:.3f}"
        )


def feature_change(before: Tensor, after: Tensor) -> FeatureChange:
    """Compare the features of the same examples before and after, (N, h) each, as `Split.features` gives them.

    Cost: N^2 h for CKA.

    Raises:
        InputError: if shapes differ, or anything is not finite.
    """
    if before.ndim != 2 or before.shape != after.shape or not len(before):
        raise InputError(
            f"features before and after have one shape (N, h): got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    first, last = before.double(), after.double()
    if not bool(torch.isfinite(first).all() and torch.isfinite(last).all()):
        raise InputError("features are not finite (NaN or infinity): has training diverged?")
    lengths = [torch.linalg.vector_norm(z, dim=1) for z in (first, last)]
    dots = (first * last).sum(1)
    known = (lengths[0] > 0) & (lengths[1] > 0)
    return FeatureChange(
        distance=float(torch.linalg.vector_norm(last - first, dim=1).mean()),
        cosine=float((dots / (lengths[0] * lengths[1]))[known].mean()),
        dot=float(dots.mean()),
        norm_before=float(lengths[0].mean()),
        norm_after=float(lengths[1].mean()),
        cka=_alignment(first, last),
    )


def _alignment(first: Tensor, last: Tensor) -> float:
    centred = [z - z.mean(0) for z in (first, last)]
    if any(not float(z.abs().max()) for z in centred):
        return float("nan")
    return cka(FeatureKernel(centred[0]), FeatureKernel(centred[1]))
