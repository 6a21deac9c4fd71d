"""Where N x C target probabilities are kept: in full, in half precision, on disk, or only the k largest of each row.

For 1.28 million examples of 1,000 classes: 5.1 GB in float32, 2.6 GB in half precision, 102 MB as the top 20 in half
precision (4 bytes for a class and its value).

**Half precision loses small steps.** A filter moves a row by alpha (p - Q); where that is less than half the distance
of two neighbouring numbers (2^-12 just below 1, 2^-11 of the value in general), rounding to nearest leaves Q where it
is, for ever: it stops up to 2^-12 / alpha short of what it should be, 0.0049 for alpha = 0.05. So what is kept in 16
bits needs a rounding to be named. `Stochastic` rounds up or down at random with the probabilities that make it right on
average; what is left is noise with a deviation of at most 2^-12 / sqrt(alpha (2 - alpha)), 0.0008 for alpha = 0.05.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ntkit.errors import InputError, StoreError

WHOLE, HALF = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)


class Rounding(ABC):
    """How numbers in [0, 1] become 16-bit ones."""

    @abstractmethod
    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in another type."""

    def bound(self, alpha: float, dtype: torch.dtype) -> float:
        """How far an average with weight alpha for the new can at worst be from the exact one, in each entry."""
        return self.step(dtype) / alpha

    @abstractmethod
    def step(self, dtype: torch.dtype) -> float:
        """The largest error of one rounding of a number in [0, 1]."""

    @property
    def generator(self) -> torch.Generator | None:
        """What it draws from, if it draws."""
        return None


@dataclass(frozen=True)
class Nearest(Rounding):
    """To the nearest number: deterministic, but small updates are lost (see the top of this file)."""

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return x.to(dtype)

    def step(self, dtype: torch.dtype) -> float:
        """Half the distance of two numbers below 1."""
        return torch.finfo(dtype).eps / 4


@dataclass(frozen=True, eq=False)
class Stochastic(Rounding):
    """Up with the probability that makes it right on average, so that small updates are kept on average.

    Attributes:
        source: draws one number for every entry; its state is part of a table's state.
    """

    source: torch.Generator

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """To one of the two neighbours. Numbers that are not negative are ordered as their bits are."""
        nearest = x.to(dtype)
        lower = nearest.view(torch.int16) - (nearest.to(x.dtype) > x).to(torch.int16)
        below, above = lower.view(dtype).to(x.dtype), (lower + 1).view(dtype).to(x.dtype)
        up = torch.rand(x.shape, dtype=x.dtype, generator=self.source) < (x - below) / (above - below)
        return (lower + up.to(torch.int16)).view(dtype)

    def step(self, dtype: torch.dtype) -> float:
        """The distance of two numbers below 1."""
        return torch.finfo(dtype).eps / 2

    def deviation(self, alpha: float, dtype: torch.dtype) -> float:
        """The largest standard deviation of an average's entry: independent draws of at most half a step each."""
        return self.step(dtype) / 2 / (alpha * (2 - alpha)) ** 0.5

    @property
    def generator(self) -> torch.Generator | None:  # noqa: D102
        return self.source


class Table(ABC):
    """N rows of C probabilities, as they are kept."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What to compute in: float32 or better."""

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """(n, C)."""

    @abstractmethod
    def write(self, rows: Tensor, probabilities: Tensor) -> None:
        """Keep (n, C) rows; no row is there twice."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name; not copied."""


class Storage(ABC):
    """How a table is to be kept.

    Attributes:
        rounding: how numbers become 16-bit ones; None for whole precision.
    """

    rounding: Rounding | None

    @abstractmethod
    def table(self, size: int, classes: int) -> Table:
        """An empty one for N examples and C classes."""


@dataclass(frozen=True)
class Dense(Storage):
    """Every probability.

    Attributes:
        dtype: float32, float64, float16 or bfloat16.
        rounding: for the last two.
        path: of a file that the table is mapped to, so that it needs no memory; in memory without one. The file is work
            space and no checkpoint: that is `state_dict`, which copies it.
        overwrite: whether a file that is already there may be replaced.
    """

    dtype: torch.dtype = torch.float32
    rounding: Rounding | None = None
    path: str | Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check the type and its rounding."""
        _check_type(self.dtype, self.rounding)

    def table(self, size: int, classes: int) -> Table:
        """Zeros.

        Raises:
            StoreError: if the file is there already, or cannot be made.
        """
        return _DenseTable(self._zeros(size, classes), self.rounding)

    def _zeros(self, size: int, classes: int) -> Tensor:
        if self.path is None:
            return torch.zeros(size, classes, dtype=self.dtype)
        path = Path(self.path)
        if path.exists() and not self.overwrite:
            raise StoreError(f"{path}: is there already. Give another path, or overwrite=True to replace it")
        try:
            with path.open("wb") as file:
                file.truncate(size * classes * self.dtype.itemsize)  # all zeros
            flat = torch.from_file(str(path), shared=True, size=size * classes, dtype=self.dtype)
        except (OSError, RuntimeError) as error:
            raise StoreError(f"{path}: cannot keep {size} x {classes} targets there ({error})") from error
        return flat.view(size, classes)


class _DenseTable(Table):
    def __init__(self, values: Tensor, rounding: Rounding | None) -> None:
        self.values, self.rounding = values, rounding

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.values.dtype, torch.float32)

    def read(self, rows: Tensor) -> Tensor:
        return self.values[rows].to(self.dtype)

    def write(self, rows: Tensor, probabilities: Tensor) -> None:
        self.values[rows] = _rounded(probabilities, self.values.dtype, self.rounding)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}


@dataclass(frozen=True)
class TopK(Storage):
    """The k largest probabilities of each row; what is left of 1 is spread evenly over the other classes.

    Exact for k = C. Otherwise a class outside the k largest keeps no history of its own: it enters when its part of the
    even rest plus one update exceeds the least of those that are kept. The reading differs from the row that was
    written by at most the mass outside the k largest, in total variation.

    Attributes:
        k: classes to keep.
        dtype: of the values.
        rounding: for 16-bit types.
    """

    k: int
    dtype: torch.dtype = torch.float32
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        """Check k, the type and its rounding.

        Raises:
            InputError: if k is not positive, or the type does not fit.
        """
        if self.k < 1:
            raise InputError(f"k: got {self.k}, expected 1 class or more")
        _check_type(self.dtype, self.rounding)

    def table(self, size: int, classes: int) -> Table:
        """Zeros.

        Raises:
            InputError: if there are fewer than k classes.
        """
        if self.k > classes:
            raise InputError(f"k: got {self.k}, expected at most the {classes} classes")
        return _TopKTable(size, classes, self)


class _TopKTable(Table):
    def __init__(self, size: int, classes: int, kept: TopK) -> None:
        self.classes, self.rounding = classes, kept.rounding
        self.values = torch.zeros(size, kept.k, dtype=kept.dtype)
        self.places = torch.zeros(size, kept.k, dtype=torch.int16 if classes <= 2**15 else torch.int32)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.values.dtype, torch.float32)

    def read(self, rows: Tensor) -> Tensor:
        values, others = self.values[rows].to(self.dtype), self.classes - self.values.shape[1]
        rest = (1 - values.sum(1, keepdim=True)).clamp_min(0) / max(others, 1)
        return rest.repeat(1, self.classes).scatter_(1, self.places[rows].long(), values)

    def write(self, rows: Tensor, probabilities: Tensor) -> None:
        values, places = probabilities.topk(self.values.shape[1], 1)
        self.values[rows] = _rounded(values, self.values.dtype, self.rounding)
        self.places[rows] = places.to(self.places.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "places": self.places}


def _rounded(x: Tensor, dtype: torch.dtype, rounding: Rounding | None) -> Tensor:
    return x.to(dtype) if rounding is None else rounding.round(x, dtype)


def _check_type(dtype: torch.dtype, rounding: Rounding | None) -> None:
    if dtype in HALF and rounding is None:
        raise InputError(
            f"{dtype} loses every update of less than about {torch.finfo(dtype).eps / 2:.0e} of a value unless told "
            "how to round: give rounding=Stochastic(torch.Generator().manual_seed(0)), or Nearest() to accept that"
        )
    if dtype in WHOLE and rounding is not None:
        raise InputError(f"rounding is for 16-bit types: got {rounding} with {dtype}. Leave one out")
    if dtype not in (*WHOLE, *HALF):
        raise InputError(f"dtype: got {dtype}, expected one of {[str(t) for t in (*WHOLE, *HALF)]}")
