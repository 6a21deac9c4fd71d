"""What a student makes small: how far it is from its targets, at a temperature (Hinton, Vinyals and Dean 2015)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ntkit.errors import InputError
from ntkit.solve.losses import CrossEntropy
from ntkit.uses.distill.simplex import positive, tempered


class DistillationLoss(nn.Module):
    """(1 - h) * factor * tau^2 * mean_i KL(p_i || softmax(z_i / tau)) + h * cross-entropy of the labels.

    p_i is the target at the temperature tau, softmax(log p_tar / tau): for a teacher's softmax(z_T) that is
    softmax(z_T / tau). Its gradient in z is factor * tau * (softmax(z / tau) - p) / n, and tau^2 keeps it of the same
    size when tau grows.

    The public code of Filter-KD has `factor=2`: twice the gradient, that is twice the learning rate, and twice the
    weight beside hard labels if there are any (as published there are none). With the default of 1 and a temperature of
    1 the gradient is that of the cross-entropy with soft labels.
    """

    def __init__(self, temperature: float = 1.0, hard_weight: float = 0.0, factor: float = 1.0) -> None:
        """Set up.

        Args:
            temperature: tau, of the student and of its targets.
            hard_weight: h, from 0 to 1; 0 as published.
            factor: 2 as published.

        Raises:
            InputError: if one of them does not fit.
        """
        super().__init__()
        positive(temperature, "temperature")
        positive(factor, "factor")
        if not 0 <= hard_weight <= 1:
            raise InputError(f"hard_weight: got {hard_weight!r}, expected a share, from 0 to 1")
        self.temperature, self.hard_weight, self.factor = temperature, hard_weight, factor

    def forward(self, logits: Tensor, targets: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar; half precision is computed in float32.

        Args:
            logits: (n, C), of the student.
            targets: (n, C) points of the simplex at temperature 1, or (n,) classes.
            labels: (n,) classes, for `hard_weight` alone.

        Raises:
            InputError: if the targets are no probabilities, or labels are missing or without use.
        """
        if (labels is None) != (self.hard_weight == 0):
            got, instead = ("no labels", "give them") if labels is None else ("labels", "leave them out")
            raise InputError(f"hard_weight is {self.hard_weight}: got {got}; {instead}, or change hard_weight")
        z = logits.float() if logits.dtype.itemsize == 2 else logits
        p = tempered(CrossEntropy().targets(targets.to(z.device), z).clamp_min(0), self.temperature)
        soft = functional.kl_div((z / self.temperature).log_softmax(1), p, reduction="batchmean")
        soft = self.factor * self.temperature**2 * soft
        if labels is None:
            return soft
        return (1 - self.hard_weight) * soft + self.hard_weight * CrossEntropy().value(z, labels.to(z.device))

    def extra_repr(self) -> str:
        """For print()."""
        return f"temperature={self.temperature}, hard_weight={self.hard_weight}, factor={self.factor}"
