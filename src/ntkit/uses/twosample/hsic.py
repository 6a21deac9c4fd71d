"""`independence_test`: do two measurements of the same examples depend on each other? Hilbert-Schmidt independence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import Kernel
from ntkit.kernel.explicit import FeatureFunction
from ntkit.kernel.function import KernelFunction
from ntkit.kernel.memory import default_memory
from ntkit.uses.twosample.pool import check_matrix, feature_rows, finite
from ntkit.uses.twosample.relabelling import permutation_pvalue
from ntkit.uses.twosample.result import Spread, TestResult
from ntkit.uses.twosample.samples import check_permutations, checked

if TYPE_CHECKING:
    from ntkit.tangent.examples import Examples


class Sums(NamedTuple):
    """What the statistics are made of: sums over two kernels K and L of the same n examples, for one or many samples.

    Attributes:
        n: number of examples.
        product: <K, L>.
        rows: <K 1, L 1>.
        left: 1^T K 1.
        right: 1^T L 1.
    """

    n: int
    product: Tensor
    rows: Tensor
    left: Tensor
    right: Tensor


class Dependence(ABC):
    """How two kernels of the same examples become one number, <A, L> with A the first one centred."""

    name: str
    least: int
    hollow: bool  # without the kernels of examples with themselves

    @abstractmethod
    def of(self, sums: Sums) -> Tensor:
        """The same number from sums over the kernels."""

    @abstractmethod
    def centred(self, kernel: Tensor) -> Tensor:
        """A, (N, N), divided by the number of pairs."""

    def by_features(self, phi: Tensor, psi: Tensor, orders: Tensor) -> Tensor:
        """The statistic for many orders (B, N) of the second features: phi (N, D) and psi (N, E) have no mean.

        Cost: N D E for each order, in one product.
        """
        product = torch.einsum("nd,bne->bde", phi, psi[orders]).square().sum((1, 2))
        left, right = phi @ phi.sum(0), psi @ psi.sum(0)
        if self.hollow:
            own, other = phi.square().sum(1), psi.square().sum(1)
            product, left, right = product - other[orders] @ own, left - own, right - other
        return self.of(Sums(len(phi), product, right[orders] @ left, left.sum(), right.sum()))


@dataclass(frozen=True)
class Biased(Dependence):
    """tr(K H L H) / N^2, never negative; its mean under independence is not 0 (Gretton et al. 2005)."""

    name = "HSIC, biased"
    least = 2
    hollow = False

    def of(self, sums: Sums) -> Tensor:
        """Multiplied out."""
        n = sums.n
        return (sums.product - 2 / n * sums.rows + sums.left * sums.right / n**2) / n**2

    def centred(self, kernel: Tensor) -> Tensor:
        """H K H / N^2."""
        rows = kernel.mean(1, keepdim=True)
        return (kernel - rows - rows.T + kernel.mean()) / len(kernel) ** 2


@dataclass(frozen=True)
class Debiased(Dependence):
    """The unbiased estimate: mean 0 under independence (Song et al. 2012, equation 5)."""

    name = "HSIC"
    least = 4
    hollow = True

    def of(self, sums: Sums) -> Tensor:
        """Song et al.'s equation 5."""
        n = sums.n
        return (sums.product - 2 / (n - 2) * sums.rows + sums.left * sums.right / ((n - 1) * (n - 2))) / (n * (n - 3))

    def centred(self, kernel: Tensor) -> Tensor:
        """Without the diagonal, and centred so that rows still add up to 0; over N (N - 3).

        That is an orthogonal projection of matrices, so the second kernel needs none.
        """
        n = len(kernel)
        hollow = kernel.clone()
        hollow.diagonal().zero_()
        rows = hollow.sum(1, keepdim=True) / (n - 2)
        found = hollow - rows - rows.T + rows.sum() / (n - 1)
        found.diagonal().zero_()
        return found / (n * (n - 3))


def independence_test(
    x: Any,
    y: Any,
    *,
    kernel_x: KernelFunction | Kernel,
    kernel_y: KernelFunction | Kernel,
    statistic: Dependence | None = None,
    permutations: int = 1000,
    generator: torch.Generator,
    memory: int | None = None,
) -> TestResult:
    """Test with HSIC whether x and y, measured on the same examples, are independent.

    The p-value is exact: the order of y is permuted, and the kernels in all orders are multiplied at once.

    Args:
        x: n examples: a tensor, a tuple or dict of tensors, or a `Dataset`.
        y: n others, each belonging to the x in its place.
        kernel_x: a `KernelFunction`, or a finished `Kernel`.
        kernel_y: the same for y. Where both have features no matrix is formed: n D E operations for each permutation.
        statistic: `Debiased()` by default, or `Biased()`.
        permutations: B. The smallest p-value is 1 / (B + 1).
        generator: draws the orders.
        memory: bytes of working space; an eighth of the machine's by default. Matrices need 16 n^2 beside,
            and at the beginning 40 n^2.

    Raises:
        InputError: if there are too few examples, not as many of each, they are not finite, or an argument cannot be
            used; nothing has been computed then.
    """
    check_permutations(permutations)
    statistic = Debiased() if statistic is None else statistic
    if not isinstance(statistic, Dependence):
        raise InputError(f"statistic is Debiased() or Biased(): got {statistic!r}")
    ours, theirs = checked(x, "x", least=statistic.least), checked(y, "y", least=statistic.least)
    if len(ours) != len(theirs):
        raise InputError(f"x and y belong to the same examples: got {len(ours)} and {len(theirs)}")
    n, memory = len(ours), default_memory() if memory is None else memory
    orders, found = _orders(n, permutations, generator), []
    if isinstance(kernel_x, FeatureFunction) and isinstance(kernel_y, FeatureFunction):
        phi, psi = (rows - rows.mean(0) for rows in (feature_rows(kernel_x, ours), feature_rows(kernel_y, theirs)))
        phi, psi = phi.cpu(), psi.cpu()
        at_once = memory // (32 * psi.shape[1] * (n + phi.shape[1]))
        for block in _blocks(orders, at_once):
            found.append(statistic.by_features(phi, psi, block))
        variance = _jackknife(statistic, _featured(phi, psi), n)
    else:
        kernel, other = _matrix(kernel_x, ours), _matrix(kernel_y, theirs)
        variance = _jackknife(statistic, _dense(kernel, other), n)
        centred = statistic.centred(kernel)
        del kernel
        for block in _blocks(orders, memory // (32 * n * n)):
            permuted = other[block].gather(2, block[:, None, :].expand(-1, n, -1))
            found.append(permuted.flatten(1) @ centred.flatten())
    values = torch.cat(found)
    first, null = float(values[0]), values[1:]
    spread = _spread(variance, null, statistic) if n > statistic.least else None
    return TestResult(first, permutation_pvalue(first, null), null, statistic.name, (n,), spread=spread)


def _spread(variance: float, null: Tensor, statistic: Dependence) -> Spread:
    """Of the jackknife's variance, which counts twice what is there under independence too and falls as 1/n^2."""
    quadratic = float(null.var()) if len(null) > 1 else 0.0
    bias = 0.0 if statistic.hollow else float(null.mean())
    return Spread(max(variance - 2 * quadratic, 0.0), quadratic, 1.0, bias=bias)


def _orders(n: int, permutations: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The order that was given, and then random ones."""
    drawn = (torch.randperm(n, generator=generator, device=generator.device).cpu() for _ in range(permutations))
    return chain([torch.arange(n)], drawn)


def _blocks(orders: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """So many of them at a time, one at least."""
    while block := list(islice(orders, max(1, size))):
        yield torch.stack(block)


# ---------------------------------------------------------------- how the statistic would vary


class _Pair(NamedTuple):
    """Two kernels K and L as the jackknife needs them.

    Attributes:
        left: v -> K v.
        right: v -> L v.
        both: (K * L) 1, entry by entry.
        own: diagonal of K.
        other: diagonal of L.
    """

    left: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]
    both: Tensor
    own: Tensor
    other: Tensor


def _dense(kernel: Tensor, other: Tensor) -> _Pair:
    both = torch.einsum("ij,ij->i", kernel, other)
    return _Pair(kernel.mv, other.mv, both, kernel.diagonal(), other.diagonal())


def _featured(phi: Tensor, psi: Tensor) -> _Pair:
    both = ((phi @ (phi.T @ psi)) * psi).sum(1)
    left, right = (lambda v: phi @ (phi.T @ v)), (lambda v: psi @ (psi.T @ v))
    return _Pair(left, right, both, phi.square().sum(1), psi.square().sum(1))


def _jackknife(statistic: Dependence, pair: _Pair, n: int) -> float:
    """Variance of the statistic, from its values with each example left out in turn (Efron and Stein, 1981).

    Cost: two products with each kernel.
    """
    left, right, both, own, other = pair
    if statistic.hollow:
        left, right = (lambda v: pair.left(v) - pair.own * v), (lambda v: pair.right(v) - pair.other * v)
        both, own, other = both - own * other, torch.zeros_like(own), torch.zeros_like(other)
    k, m = left(torch.ones_like(both)), right(torch.ones_like(both))
    without = Sums(
        n - 1,
        both.sum() - 2 * both + own * other,
        k @ m - left(m) - right(k) + both - (k - own) * (m - other),
        k.sum() - 2 * k + own,
        m.sum() - 2 * m + other,
    )
    return float((n - 1) * statistic.of(without).var(correction=0))


def _matrix(source: KernelFunction | Kernel, examples: Examples) -> Tensor:
    """A kernel of the examples, centred, (N, N) in float64.

    Raises:
        InputError: if `source` is none, or has not one value for each pair.
    """
    kernel = source(examples.data) if isinstance(source, KernelFunction) else source
    if not isinstance(kernel, Kernel):
        raise InputError(f"kernel is a KernelFunction such as RBF(), or a Kernel: got {type(source).__name__}")
    check_matrix(kernel, len(examples), "")
    matrix = finite(kernel.dense().detach()).to("cpu", torch.float64, copy=True)
    rows = matrix.mean(1, keepdim=True)  # what this takes away does not matter, and large constants would cost digits
    return matrix.sub_(rows).sub_(rows.T).add_(rows.mean())
