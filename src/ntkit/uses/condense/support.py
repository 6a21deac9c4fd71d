"""Few points in the place of a data set, and the plain ways to choose them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkit.errors import InputError


@dataclass(frozen=True, eq=False)
class Support:
    """Points with targets: what a kernel regression or a network is trained on instead of the data.

    Attributes:
        x: n points, (n, ...), float64.
        y: their targets, (n, C), float64: one-hot less 1/C, or learned.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        """Check shapes, type and entries.

        Raises:
            InputError: if they do not fit.
        """
        if self.x.ndim < 2 or self.y.ndim != 2 or len(self.x) != len(self.y) or not len(self.x):
            raise InputError(
                f"a support set has n points (n, ...) and targets (n, C): got {tuple(self.x.shape)} and "
                f"{tuple(self.y.shape)}"
            )
        if self.x.dtype != torch.float64 or self.y.dtype != torch.float64:
            raise InputError(
                f"a support set is float64, so that its kernel can be solved with: got {self.x.dtype} and "
                f"{self.y.dtype}; x.double() makes it so"
            )
        if not (self.x.isfinite().all() and self.y.isfinite().all()):
            raise InputError("a support set has entries that are not finite (NaN or infinity)")

    def __len__(self) -> int:
        """n."""
        return len(self.x)

    @property
    def classes(self) -> int:
        """C."""
        return self.y.shape[1]


def centred(labels: Tensor, classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """One-hot less 1/C, (N, C): every row sums to zero, so that a kernel without an offset can say them.

    Raises:
        InputError: if a label is not in 0 to C - 1.
    """
    if labels.ndim != 1 or labels.is_floating_point() or not len(labels):
        raise InputError(f"labels are class numbers (integers), (N,): got {labels.dtype} of {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(f"labels are 0 to {classes - 1}: got {int(labels.min())} to {int(labels.max())}")
    return torch.nn.functional.one_hot(labels.long(), classes).to(dtype) - 1 / classes


@dataclass(frozen=True, eq=False)
class Labelled:
    """A data set of classes: examples and class numbers, checked.

    Attributes:
        x: (N, ...), floating point.
        labels: (N,), int64.
        classes: C.
    """

    x: Tensor
    labels: Tensor
    classes: int

    @classmethod
    def of(cls, data: Any, *, classes: int | None = None, named: str = "the data") -> Labelled:
        """A pair (x, labels), looked through.

        Args:
            data: the pair.
            classes: C; None for one more than the largest label.
            named: what it is, for messages.

        Raises:
            InputError: if they do not fit each other, or are of another kind.
        """
        if not isinstance(data, (tuple, list)) or len(data) != 2 or not all(isinstance(t, Tensor) for t in data):
            raise InputError(f"{named} are a pair of tensors (x, labels): got {type(data).__name__}")
        x, labels = data
        if not x.is_floating_point() or x.ndim < 2 or len(x) != len(labels):
            raise InputError(
                f"{named} are floating point examples (N, ...) and as many labels (N,): got {x.dtype} of "
                f"{tuple(x.shape)} and {tuple(labels.shape)}"
            )
        if not x.isfinite().all():
            raise InputError(f"{named} have entries that are not finite (NaN or infinity)")
        number = int(labels.max()) + 1 if classes is None and len(labels) else classes or 0
        centred(labels, number)
        if number < 2:
            raise InputError(f"{named} have one class: condensing needs two or more")
        return cls(x, labels.to(x.device, torch.int64), number)

    def rows(self) -> list[Tensor]:
        """The numbers of the examples of every class.

        Raises:
            InputError: if a class has none.
        """
        rows = [torch.nonzero(self.labels == c).flatten() for c in range(self.classes)]
        empty = [c for c, found in enumerate(rows) if not len(found)]
        if empty:
            raise InputError(f"class {empty[0]} has no example: classes are numbered 0 to C - 1 without gaps")
        return rows


def balanced(rows: list[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """Numbers of examples, as many of every class as of any other; all of them once where there are no more than asked.

    Args:
        rows: the numbers of every class.
        size: of the whole, divided by the classes. A class that has fewer than its share gives its own again, each as
            often as any other of them or once more.
        generator: of the draw.
    """
    if size >= sum(len(found) for found in rows):
        return torch.cat([_drawn(found, len(found), generator) for found in rows])
    share = max(size // len(rows), 1)
    return torch.cat([_drawn(found, share, generator) for found in rows])


def _drawn(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """So many at random, all of them before any comes again."""
    rounds = range(math.ceil(size / len(rows)))
    orders = [torch.randperm(len(rows), generator=generator, device=generator.device) for _ in rounds]
    return rows[torch.cat(orders)[:size].to(rows.device)]


def random_support(data: tuple[Tensor, Tensor], per_class: int, *, generator: torch.Generator) -> Support:
    """Examples drawn at random, as many of every class, with their labels.

    Args:
        data: x (N, ...) and class numbers (N,).
        per_class: examples of each class.
        generator: of the draw.

    Raises:
        InputError: if a class has fewer examples.
    """
    found = Labelled.of(data)
    rows = _enough(found, per_class)
    chosen = balanced(rows, per_class * found.classes, generator)
    return Support(found.x[chosen].double(), centred(found.labels[chosen], found.classes))


def centre_support(data: tuple[Tensor, Tensor], per_class: int, *, generator: torch.Generator) -> Support:
    """The k-means centres of every class, with its label (scikit-learn). Cost: that of C fits.

    Args:
        data: x (N, ...) and class numbers (N,).
        per_class: centres of each class.
        generator: of the starts.

    Raises:
        InputError: if a class has fewer examples.
    """
    from sklearn.cluster import KMeans

    found = Labelled.of(data)
    centres, labels = [], []
    for c, rows in enumerate(_enough(found, per_class)):
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        fit = KMeans(per_class, random_state=seed).fit(found.x[rows].flatten(1).double().cpu().numpy())
        centres.append(torch.from_numpy(fit.cluster_centers_).unflatten(1, found.x.shape[1:]))
        labels += [c] * per_class
    y = centred(torch.tensor(labels), found.classes)
    return Support(torch.cat(centres).to(found.x.device), y.to(found.x.device))


def _enough(data: Labelled, per_class: int) -> list[Tensor]:
    if isinstance(per_class, bool) or not isinstance(per_class, int) or per_class < 1:
        raise InputError(f"per_class is a number of points, 1 or more: got {per_class!r}")
    rows = data.rows()
    least = min(range(len(rows)), key=lambda c: len(rows[c]))
    if len(rows[least]) < per_class:
        raise InputError(
            f"class {least} has {len(rows[least])} examples: expected at least the {per_class} points of each class"
        )
    return rows
