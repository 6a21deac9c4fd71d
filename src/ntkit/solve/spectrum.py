"""What a kernel looks like: its spectrum, its agreement with the labels, and how far it is from another kernel.

`spectrum` needs the whole matrix. Everything else here needs only sums over its entries and reads one strip of rows at
a time, so a kernel larger than memory can be described, at the price of computing it once per call (where it does fit,
pass `DenseKernel(kernel.dense())` to several calls).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ntkit.errors import InputError
from ntkit.kernel.base import Kernel, strips
from ntkit.solve.symmetric import EPS, as_kernel, as_tensor, symmetric_matrix


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues of a kernel and what is usually read off them.

    Attributes:
        eigenvalues: descending, (n,), float64; rounding may leave the last ones slightly negative.
        trace: their sum.
        condition_number: largest / smallest; infinite if the smallest is not above `resolution`.
        participation_ratio: effective rank trace^2 / ||K||_F^2, between 1 and n: how many equal eigenvalues have the
            same ratio of trace to Frobenius norm. Ruled by the large eigenvalues.
        entropy_rank: effective rank exp(-sum_i p_i log p_i) with p_i = eigenvalue_i / trace (Roy and Vetterli 2007),
            between the participation ratio and n. It counts the tail as well.
        resolution: below this an eigenvalue cannot be told from zero, given the type in which the kernel was computed.
    """

    eigenvalues: Tensor
    trace: float
    condition_number: float
    participation_ratio: float
    entropy_rank: float
    resolution: float

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue."""
        return float(self.eigenvalues[-1])


def spectrum(kernel: Kernel | Tensor | np.ndarray) -> Spectrum:
    """All eigenvalues of a symmetric kernel, in float64, with condition number and effective ranks.

    Not reducible to strips: the whole matrix is held. Cost: 4/3 n^3; memory: 16 n^2 bytes.

    Raises:
        InputError: if the kernel is not square, symmetric and finite, or has no positive eigenvalue.
    """
    matrix = symmetric_matrix(kernel)
    eigenvalues = torch.linalg.eigvalsh(matrix.values).flip(0)
    largest, smallest = float(eigenvalues[0]), float(eigenvalues[-1])
    if not largest > 0:
        raise InputError(
            f"a kernel without a positive eigenvalue has no spectrum to describe: the largest is {largest:.3e}"
        )
    resolution = matrix.tolerance(largest)
    shares = eigenvalues.clamp_min(0) / eigenvalues.clamp_min(0).sum()
    trace = float(eigenvalues.sum())
    return Spectrum(
        eigenvalues=eigenvalues,
        trace=trace,
        condition_number=largest / smallest if smallest > resolution else math.inf,
        participation_ratio=trace**2 / float(eigenvalues.square().sum()),
        entropy_rank=math.exp(float(torch.special.entr(shares).sum())),
        resolution=resolution,
    )


@dataclass(frozen=True)
class Alignment:
    """Agreement of a kernel with the targets: cosines between matrices; 1 is the kernel y y^T itself.

    Attributes:
        plain: kernel-target alignment <K, Y Y^T> / (||K|| ||Y Y^T||) (Cristianini et al. 2001).
        centred: the same after the mean over the examples has been taken out of features and targets (Cortes et al.
            2012). The plain one is easily large because all entries of K are positive; this one is not.
    """

    plain: float
    centred: float


def alignment(kernel: Kernel | Tensor | np.ndarray, targets: Tensor | np.ndarray) -> Alignment:
    """How well a kernel agrees with targets Y of shape (N,) or (N, C); one-hot for classes.

    A reduced kernel (N, N) is compared with Y Y^T. A full kernel (N*C, N*C) is compared with y y^T, y the flattened
    targets, so that it also has to couple the right outputs; the two numbers are not comparable with each other (for
    k (x) I_C the second is the smaller). Read strip by strip; cost n^2.

    Raises:
        InputError: if shapes do not fit, values are not finite, or kernel or targets are zero (constant, when centred).
    """
    kernel = _square(kernel)
    y = as_tensor(targets).to("cpu", torch.float64)
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim != 2 or kernel.shape[0] not in (len(y), y.numel()):
        raise InputError(
            f"targets have shape (N,) or (N, C) for a kernel of N, or N*C, rows: got targets {tuple(y.shape)} and a "
            f"kernel of shape {kernel.shape}"
        )
    if not y.isfinite().all():
        raise InputError("the targets have entries that are not finite (NaN or infinity)")
    outputs = kernel.shape[0] // len(y)
    flat, centred = (v.reshape(kernel.shape[0], -1) for v in (y, _less_their_mean(y)))
    square, products, sums = 0.0, [], []
    for strip in strips(kernel.shape[0]):
        tile = _strip(kernel, strip)
        square += float(tile.square().sum())
        products.append(tile @ torch.cat([flat, centred], 1))
        sums.append(_over_examples(tile, outputs))
    product, total = torch.cat(products), torch.cat(sums)
    width = flat.shape[1]
    # <H K H, Y Y^T> = <K, (H Y)(H Y)^T>: for the numerator the kernel need not be centred.
    return Alignment(
        plain=_cosine(
            float((flat * product[:, :width]).sum()),
            square,
            float((flat.T @ flat).square().sum()),
            "the kernel or the targets are",
        ),
        centred=_cosine(
            float((centred * product[:, width:]).sum()),
            _centred(square, total, total),
            float((centred.T @ centred).square().sum()),
            "once centred, the kernel or the targets are",
        ),
    )


@dataclass(frozen=True)
class Drift:
    """How far a kernel has moved, for example between two checkpoints.

    Attributes:
        relative_change: ||after - before||_F / ||before||_F; sees a change of scale.
        cosine_distance: 1 - <after, before> / (||after|| ||before||); does not.
    """

    relative_change: float
    cosine_distance: float


def drift(before: Kernel | Tensor | np.ndarray, after: Kernel | Tensor | np.ndarray) -> Drift:
    """The relative change between two kernels of one shape, square or not. Read strip by strip; cost n^2.

    Raises:
        InputError: if the shapes differ, entries are not finite, or one of the kernels is zero.
    """
    before, after = _same_shape(before, after)
    change, product, first, second = (0.0,) * 4
    for strip in strips(before.shape[0]):
        a, b = _strip(before, strip), _strip(after, strip)
        change += float((b - a).square().sum())
        product += float((a * b).sum())
        first += float(a.square().sum())
        second += float(b.square().sum())
    cosine = _cosine(product, first, second, "one of the kernels is")
    return Drift(relative_change=math.sqrt(change / first), cosine_distance=1 - cosine)


def cka(left: Kernel | Tensor | np.ndarray, right: Kernel | Tensor | np.ndarray, *, scalars: int = 1) -> float:
    """Linear centred kernel alignment <H K H, H L H> / (||H K H|| ||H L H||), in [0, 1] (Kornblith et al. 2019).

    Args:
        left: a square kernel.
        right: a kernel of the same shape, on the same examples.
        scalars: rows per example: C for two full kernels, for which H removes the mean over the examples of each output
            separately.

    Raises:
        InputError: if shapes differ or do not fit, entries are not finite, or a kernel is constant.

    Read strip by strip; cost n^2.
    """
    left, right = _same_shape(_square(left), _square(right))
    if scalars < 1 or left.shape[0] % scalars:
        raise InputError(f"a kernel of {left.shape[0]} rows does not have {scalars} rows per example")
    product, first, second = 0.0, 0.0, 0.0
    left_sums, right_sums = [], []
    for strip in strips(left.shape[0]):
        a, b = _strip(left, strip), _strip(right, strip)
        product += float((a * b).sum())
        first += float(a.square().sum())
        second += float(b.square().sum())
        left_sums.append(_over_examples(a, scalars))
        right_sums.append(_over_examples(b, scalars))
    az, bz = torch.cat(left_sums), torch.cat(right_sums)
    return _cosine(
        _centred(product, az, bz), _centred(first, az, az), _centred(second, bz, bz), "once centred, a kernel is"
    )


def _over_examples(rows: Tensor, scalars: int) -> Tensor:
    """Rows of A Z with Z = 1 (x) I: each row of a kernel summed over the examples, (rows, scalars)."""
    return rows.reshape(len(rows), -1, scalars).sum(1)


def _centred(product: float, az: Tensor, bz: Tensor) -> float:
    """<H A H, H B H> from <A, B>, A Z and B Z, for symmetric matrices and the projection H = I - Z Z^T / N.

        <H A H, H B H> = <A, B> - (2/N) <A Z, B Z> + (1/N^2) <Z^T A Z, Z^T B Z>

    Exactly zero where rounding leaves nothing of it.
    """
    scalars = az.shape[1]
    examples = len(az) // scalars
    blocks = [z.reshape(examples, scalars, scalars).sum(0) for z in (az, bz)]
    value = product - 2 * float((az * bz).sum()) / examples + float((blocks[0] * blocks[1]).sum()) / examples**2
    return value if abs(value) > 100 * EPS * abs(product) else 0.0


def _less_their_mean(y: Tensor) -> Tensor:
    """Targets (N, C) less their mean over the examples; zero where rounding alone is left of a column."""
    centred = y - y.mean(0)
    return centred * (torch.linalg.vector_norm(centred, dim=0) > 100 * EPS * torch.linalg.vector_norm(y, dim=0))


def _strip(kernel: Kernel, rows: slice) -> Tensor:
    """Whole rows of a kernel in float64 on the CPU, refused if not finite."""
    tile = kernel.tile(rows, slice(None)).to("cpu", copy=False).to(torch.float64)
    if not tile.isfinite().all():
        raise InputError(f"the kernel has entries that are not finite among rows {rows.start} to {rows.stop - 1}")
    return tile


def _cosine(product: float, first: float, second: float, what: str) -> float:
    if not (first > 0 and second > 0):
        raise InputError(f"a cosine between matrices needs both to differ from zero: {what} zero to working precision")
    return product / math.sqrt(first) / math.sqrt(second)


def _square(kernel: Kernel | Tensor | np.ndarray) -> Kernel:
    kernel = as_kernel(kernel)
    if kernel.shape[0] != kernel.shape[1] or 0 in kernel.shape:
        raise InputError(f"expected a square kernel between the same examples: got shape {kernel.shape}")
    return kernel


def _same_shape(left: Kernel | Tensor | np.ndarray, right: Kernel | Tensor | np.ndarray) -> tuple[Kernel, Kernel]:
    left, right = as_kernel(left), as_kernel(right)
    if left.shape != right.shape or 0 in left.shape:
        raise InputError(f"two kernels are compared entry by entry: got shapes {left.shape} and {right.shape}")
    return left, right
