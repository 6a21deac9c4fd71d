"""Changes of target images that leave what they show as it is. Labels are not among the arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntkit.errors import InputError


class Augmentation(ABC):
    """A random change of every image."""

    @abstractmethod
    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Images (N, C, H, W), each changed on its own; those that are given stay as they are."""


@dataclass(frozen=True)
class Flip(Augmentation):
    """Left and right exchanged.

    Attributes:
        probability: for each image.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        """Check the probability.

        Raises:
            InputError: if it is none.
        """
        if not 0 <= self.probability <= 1:
            raise InputError(f"a probability lies between 0 and 1: got {self.probability}")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        _images(x)
        turned = torch.rand(len(x), generator=generator, device=generator.device) < self.probability
        return torch.where(turned.to(x.device)[:, None, None, None], x.flip(3), x)


@dataclass(frozen=True)
class Shift(Augmentation):
    """Moved by up to so many pixels along each axis; what comes in at the border is the value of the nearest pixel.

    Attributes:
        pixels: at most.
    """

    pixels: int = 2

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: if it is negative.
        """
        if self.pixels < 0:
            raise InputError(f"pixels of a shift are 0 or more: got {self.pixels}")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        _images(x)
        n, _, height, width = x.shape
        p = self.pixels
        down, along = (
            torch.randint(2 * p + 1, (n, 1), generator=generator, device=generator.device).cpu() for _ in range(2)
        )
        rows, columns = torch.arange(height) + down, torch.arange(width) + along
        padded = nn.functional.pad(x, (p, p, p, p), mode="replicate")
        return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _images(x: Tensor) -> None:
    if x.ndim != 4:
        raise InputError(f"images to augment are (N, C, H, W): got {tuple(x.shape)}")
