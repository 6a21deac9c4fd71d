"""The maximum mean discrepancy of two samples in its forms: quadratic, in blocks, and in linear time.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

Every form is unbiased, and gives its value for the samples as they are and for B relabelings, by one product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import strips
from ntkit.uses.twosample.relabelling import choices, relabelings
from ntkit.uses.twosample.result import Spread

if TYPE_CHECKING:
    from ntkit.uses.twosample.pool import Pool


@dataclass(frozen=True)
class Found:
    """A statistic of two samples and of their relabelings.

    Attributes:
        values: (1+B,), the samples as they are first.
        spread: how the first varies.
        sizes: examples of each sample that were used.
        witness: per pooled example, or None.
    """

    values: Tensor
    spread: Spread
    sizes: tuple[int, int]
    witness: Tensor | None = None


class Statistic(ABC):
    """How the entries of a kernel become one number."""

    @property
    @abstractmethod
    def name(self) -> str:
        """In words."""

    @abstractmethod
    def check(self, n: int, m: int) -> None:
        """Refuse samples that are too small.

        Raises:
            InputError: if they are.
        """

    @abstractmethod
    def __call__(self, pool: Pool, n: int, permutations: int, generator: torch.Generator) -> Found:
        """The statistic of the first n examples against the others, and of random relabelings."""


@dataclass(frozen=True)
class Unbiased(Statistic):
    """All pairs: the most power for the examples there are. Cost: N^2 kernel values, or N D with features.

    Gretton et al. 2012, equation 3. The witness of an example is its mean kernel with the other x minus that with the
    other y; the mean witness of x minus that of y is the statistic.
    """

    @property
    def name(self) -> str:  # noqa: D102
        return "MMD^2"

    def check(self, n: int, m: int) -> None:  # noqa: D102
        if min(n, m) < 2:
            raise InputError(f"the unbiased MMD needs two examples in each sample: got {n} and {m}")

    def __call__(self, pool: Pool, n: int, permutations: int, generator: torch.Generator) -> Found:  # noqa: D102
        m = pool.size - n
        labels = relabelings(n, m, permutations, generator)
        within, toward, rows = pool.quadratic(labels)
        # in blocks: the labels as numbers take eight times their memory
        touched = torch.cat([rows @ labels[:, some].double() for some in strips(1 + permutations, pool.columns())])
        values = discrepancy(within, touched, rows.sum(), n, m)
        others = torch.full((n + m,), float(n)).double()
        others[:n] -= 1
        rest = (n + m - 1) - others
        witness = toward / others - (rows - toward) / rest
        spread = _spread(witness, values, n)
        if pool.removed is not None:
            ours = labels[:, 0].double()
            own, whole = pool.removed * ours, pool.removed @ ours
            witness = witness + (whole - own) / others - (pool.removed.sum() - whole - pool.removed + own) / rest
        return Found(values, spread, (n, m), witness)


def discrepancy(within: Tensor, touched: Tensor, total: Tensor, n: int, m: int) -> Tensor:
    """MMD^2 from sums over ordered pairs of different examples.

    Args:
        within: pairs of two x.
        touched: pairs whose first is an x.
        total: all pairs.
        n: examples of x.
        m: of y.
    """
    across, rest = touched - within, total - 2 * touched + within
    return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * across / (n * m)


def _spread(witness: Tensor, values: Tensor, n: int) -> Spread:
    """Of the U-statistic: 4 Var h1 / n for each sample, and what the null keeps.

    The means behind the witness are noisy themselves. That adds twice the variance under the null to the first part,
    which is taken off again.
    """
    x, y = witness[:n], witness[n:]
    first = 4 * float(x.var()) / len(x) + 4 * float(y.var()) / len(y)
    null = float(values[1:].var()) if len(values) > 2 else 0.0
    return Spread(max(first - 2 * null, 0.0), null, 1.0)


@dataclass(frozen=True)
class Block(Statistic):
    """The mean of the unbiased MMD over blocks of `size` x and `size` y. Cost: 2 N `size` kernel values.

    Zaremba, Gretton and Blaschko 2013. Between `Unbiased` and `Linear` in time and in power. Samples are shuffled;
    what is left over, or over in the larger sample, is not used. Relabelings exchange examples inside blocks.

    Attributes:
        size: examples of each sample in a block.
    """

    size: int

    @property
    def name(self) -> str:  # noqa: D102
        return f"MMD^2 in blocks of {self.size}"

    def check(self, n: int, m: int) -> None:  # noqa: D102
        if not isinstance(self.size, int) or self.size < 2:
            raise InputError(f"a block holds at least two examples of each sample: got {self.size!r}")
        if min(n, m) < 2 * self.size:
            raise InputError(
                f"two blocks of {self.size} examples at least are needed: got samples of {n} and {m}. Take a smaller "
                "size, or Unbiased()"
            )

    def __call__(self, pool: Pool, n: int, permutations: int, generator: torch.Generator) -> Found:  # noqa: D102
        size, groups = self.size, _grouped(n, pool.size - n, self.size, generator)
        step = max(1, pool.memory // (32 * 2 * size * (permutations + 2 * size)))
        values = []
        for some in strips(len(groups), step):
            kernel = pool.small(groups[some])
            kernel.diagonal(dim1=1, dim2=2).zero_()
            labels = choices(len(kernel), size, size, permutations, generator).mT.double()
            whole = torch.zeros(len(kernel), 2 * size, 1, dtype=torch.float64)
            whole[:, :size] = 1
            labels = torch.cat([whole, labels], 2)
            rows = kernel.sum(2)
            within = (kernel @ labels).mul_(labels).sum(1)
            touched = (rows[:, None, :] @ labels)[:, 0]
            values.append(discrepancy(within, touched, rows.sum(1)[:, None], size, size))
        return _mean_of_groups(torch.cat(values), size)


@dataclass(frozen=True)
class Linear(Statistic):
    """The mean of k(x1, x2) + k(y1, y2) - k(x1, y2) - k(x2, y1) over pairs: least power.

    Gretton et al. 2012, lemma 14. Of four examples the kernel enters through the three ways of pairing them: the
    statistic is one of these minus another, and a relabeling chooses which. Samples are shuffled. Cost: 1.5 N kernel
    values with features; a kernel function is asked for small matrices, of 128 N entries together.
    """

    @property
    def name(self) -> str:  # noqa: D102
        return "MMD^2 in linear time"

    def check(self, n: int, m: int) -> None:  # noqa: D102
        if min(n, m) < 4:
            raise InputError(f"the linear-time MMD needs four examples in each sample: got {n} and {m}")

    def __call__(self, pool: Pool, n: int, permutations: int, generator: torch.Generator) -> Found:  # noqa: D102
        groups = _grouped(n, pool.size - n, 2, generator)  # x1 x2 y1 y2
        kernel = pool.small(groups)
        pairings = torch.stack(
            [kernel[:, 0, i] + kernel[:, j, k] for i, j, k in ((1, 2, 3), (2, 1, 3), (3, 1, 2))], 1
        )  # (Q, 3): x1x2|y1y2, x1y1|x2y2, x1y2|x2y1
        q = len(groups)
        found = [(pairings[:, 0] - pairings[:, 2])[:, None].mean(0)]
        draw = {"generator": generator, "device": generator.device}
        for some in strips(permutations, max(1, pool.memory // (64 * q))):
            shape = (some.stop - some.start, q)
            pair = torch.randint(6, shape, **draw).cpu()
            plus = pair % 3
            minus = (plus + 1 + pair // 3) % 3
            signs = torch.zeros(*shape, 3, dtype=torch.float64)
            signs.scatter_(2, plus[..., None], 1.0).scatter_(2, minus[..., None], -1.0)
            found.append(signs.flatten(1) @ pairings.flatten() / q)
        values = torch.cat(found)
        variance = float((pairings[:, 0] - pairings[:, 2]).var()) / q
        return Found(values, Spread(variance), (2 * q, 2 * q))


def _grouped(n: int, m: int, size: int, generator: torch.Generator) -> Tensor:
    """Numbers of pooled examples, (Q, 2 size): in each row `size` of x, then as many of y."""
    count = min(n, m) // size
    x = torch.randperm(n, generator=generator, device=generator.device).cpu()[: count * size]
    y = n + torch.randperm(m, generator=generator, device=generator.device).cpu()[: count * size]
    return torch.cat([x.reshape(count, size), y.reshape(count, size)], 1)


def _mean_of_groups(values: Tensor, size: int) -> Found:
    used = len(values) * size
    return Found(values.mean(0), Spread(float(values[:, 0].var()) / len(values)), (used, used))
