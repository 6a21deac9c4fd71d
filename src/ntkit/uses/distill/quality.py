"""How good supervision is: its distance to the true probabilities, and what that says about the risk.

For one function f, with losses L(x) = (loss of f at x if the class is c)_c, training sees the risk with p_tar and means
the one with p*. For every example

    |p_tar . L - p* . L| = |(p_tar - p*) . (L - mean L)| <= ||p_tar - p*||_2 ||L - mean L||_2

because both sum to 1, so that a constant in L has no part in it; and by Cauchy and Schwarz over the examples, the mean
of the right side is at most sqrt(mean ||p_tar - p*||^2) sqrt(mean ||L - mean L||^2). If f and p_tar do not depend on
the n examples, their average risk is an unbiased estimate of that of p_tar, so that

    E (average of p_tar . L - R(f))^2 = Var(p_tar . L) / n + (E (p_tar - p*) . L)^2
                                     <= Var(p_tar . L) / n + E ||p_tar - p*||^2 E ||L - mean L||^2

This is the form of the statement of Ren, Guo and Sutherland (2022), after Menon et al. (2021), derived here anew with
its constant. For an f that was trained on these very examples only the first part, which has no chance in it, holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.uses.distill.simplex import points_of_simplex, same_shape


@dataclass(frozen=True)
class Supervision:
    """How far targets are from the truth.

    Attributes:
        mean: of ||p_tar - p*||_2 over the examples.
        frobenius: of the whole table: sqrt(sum of their squares), as the toy study of the paper prints it.
        root_mean_square: frobenius / sqrt(n).
        agreement: share of examples whose most likely class is that of p*.
    """

    mean: float
    frobenius: float
    root_mean_square: float
    agreement: float


@dataclass(frozen=True)
class RiskGap:
    """The risk that training sees, beside the one that is meant, for one function.

    Attributes:
        seen: mean of p_tar . L.
        meant: mean of p* . L.
        by_example: mean of ||p_tar - p*|| ||L - mean L||, at least |seen - meant|.
        bound: Cauchy-Schwarz over the examples too; at least `by_example`.
        variance: of p_tar . L over the examples, divided by n: what chance adds to `seen` as an estimate.
    """

    seen: float
    meant: float
    by_example: float
    bound: float
    variance: float

    @property
    def gap(self) -> float:
        """|seen - meant|."""
        return abs(self.seen - self.meant)

    @property
    def root_mean_square(self) -> float:
        """Bound of sqrt(E (seen - R(f))^2), for a function that does not depend on these examples."""
        return (self.variance + self.bound**2) ** 0.5


def supervision(targets: Any, truth: Any) -> Supervision:
    """Compare targets with true probabilities.

    Args:
        targets: (N, C).
        truth: (N, C).

    Raises:
        InputError: if one of them is no table of probabilities, or they are not of one shape.
    """
    p, q = _pair(targets, truth)
    squares = (p - q).square().sum(1)
    return Supervision(
        mean=float(squares.sqrt().mean()),
        frobenius=float(squares.sum().sqrt()),
        root_mean_square=float(squares.mean().sqrt()),
        agreement=float((p.argmax(1) == q.argmax(1)).double().mean()),
    )


def risk_gap(losses: Tensor, targets: Any, truth: Any) -> RiskGap:
    """What the distance of the targets can do to a risk (the top of this file has the derivation).

    Args:
        losses: (N, C), the loss of the function at each example for each class: -log_softmax(z) for cross-entropy.
        targets: (N, C).
        truth: (N, C).

    Raises:
        InputError: if the tables do not belong together, or a loss is not finite.
    """
    p, q = _pair(targets, truth)
    same_shape(losses, p, ("losses", "targets"))
    if not bool(torch.isfinite(losses).all()):
        raise InputError("losses: some are not finite. Take -log_softmax(z, 1) of the logits, not -log of a softmax")
    given = losses.detach().double()
    sizes = (given - given.mean(1, keepdim=True)).norm(dim=1)
    away, seen = (p - q).norm(dim=1), (p * given).sum(1)
    return RiskGap(
        seen=float(seen.mean()),
        meant=float((q * given).sum(1).mean()),
        by_example=float((away * sizes).mean()),
        bound=float(away.square().mean().sqrt() * sizes.square().mean().sqrt()),
        variance=float(seen.var() / len(seen)) if len(seen) > 1 else float("nan"),
    )


def _pair(targets: Any, truth: Any) -> tuple[Tensor, Tensor]:
    p, q = points_of_simplex(targets, "targets"), points_of_simplex(truth, "truth")
    same_shape(p, q, ("targets", "truth"))
    return p.double(), q.double()
