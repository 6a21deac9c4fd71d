"""Pixels brought to one scale before they are condensed, and back so that the points can be looked at.

What is estimated is estimated on the training examples alone: `fit` takes these, and the result changes any others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.errors import InputError


@dataclass(frozen=True, eq=False)
class Standardised:
    """Every channel less its mean, by its deviation, over all training pixels. Vectors have one channel.

    Attributes:
        mean: of every channel, in the shape of one example with axes of 1.
        deviation: likewise.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def fit(cls, x: Tensor, *, columns: bool = False) -> Standardised:
        """Estimate both on training examples, (N, C, H, W) or (N, D).

        Args:
            x: the examples. Of three axes or more the second is that of the channels: (N, C, T) are signals, and images
                (N, H, W) of one channel are to be given as (N, 1, H, W), `x[:, None]`.
            columns: whether vectors are lines of a table, whose columns are in units of their own: each is then brought
                to its scale alone, and one that is constant to zero.

        Raises:
            InputError: if they are none, or constant.
        """
        _examples(x)
        if columns and x.ndim == 2:
            deviation = x.double().std(0)
            return cls(x.double().mean(0), torch.where(deviation > 0, deviation, 1.0))
        axes = [0, *range(2, x.ndim)] if x.ndim > 2 else [0, 1]
        mean, deviation = x.double().mean(axes, keepdim=True)[0], x.double().std(axes, keepdim=True)[0]
        if not (deviation > 0).all():
            raise InputError("a channel of the training examples is constant: leave it out")
        return cls(mean, deviation)

    def __call__(self, x: Tensor) -> Tensor:
        """The same of other examples, in their type."""
        return ((x - self.mean) / self.deviation).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Back to pixels."""
        return (x * self.deviation + self.mean).to(x.dtype)


@dataclass(frozen=True, eq=False)
class ZCA:
    """Whitening that stays near the image: W = V (S + r I)^(-1/2) V^T, of the training images' covariance V S V^T.

    Before it each image loses its mean and is divided by its deviation, which `inverse` cannot bring back: it gives the
    image up to brightness and contrast. The covariance of what comes out is V S (S + r I)^-1 V^T: 1 along directions
    that vary much, less along those that hardly vary.

    Attributes:
        mean: of the training images so scaled, (D,).
        basis: V, (D, D).
        scales: sqrt(S + r), (D,).
    """

    mean: Tensor
    basis: Tensor
    scales: Tensor

    @classmethod
    def fit(cls, x: Tensor, *, regularisation: float = 0.1) -> ZCA:
        """Estimate all of it on training images. Cost: N D^2 and 10 D^3; memory: D^2.

        Args:
            x: (N, ...), D numbers each.
            regularisation: r in units of the mean eigenvalue, tr(S) / D.

        Raises:
            InputError: if they are no examples, or the regularisation is not positive.
        """
        _examples(x)
        if not regularisation > 0:
            raise InputError(f"regularisation is a positive number, such as 0.1: got {regularisation}")
        total, square = torch.zeros(x[0].numel(), dtype=torch.float64, device=x.device), 0.0
        for part in x.split(4096):
            total = total + _normalised(part).sum(0)
        mean = total / len(x)
        for part in x.split(4096):
            away = _normalised(part) - mean
            square = square + away.T @ away
        values, basis = torch.linalg.eigh(square / len(x))
        ridge = regularisation * values.mean()
        return cls(mean, basis, (values.clamp_min(0) + ridge).sqrt())

    def __call__(self, x: Tensor) -> Tensor:
        """The same of other images, in their type and shape."""
        white = ((_normalised(x) - self.mean) @ self.basis / self.scales) @ self.basis.T
        return white.reshape(x.shape).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Back to images of mean 0 and deviation 1 each."""
        seen = (x.flatten(1).double() @ self.basis * self.scales) @ self.basis.T + self.mean
        return seen.reshape(x.shape).to(x.dtype)


def _normalised(x: Tensor) -> Tensor:
    flat = x.flatten(1).double()
    return (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True, correction=0).clamp_min(1e-8)


def _examples(x: Tensor) -> None:
    if x.ndim < 2 or not x.is_floating_point() or len(x) < 2:
        raise InputError(f"training examples are floating point, (N, ...), two or more: got {x.dtype} {tuple(x.shape)}")
