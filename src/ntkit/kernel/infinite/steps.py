"""What each kind of layer does to second moments and tangent kernels at infinite width.

A step knows nothing of networks: it maps the covariances of its inputs to that of its output, for one example with
itself and for pairs of examples alike. Notation: A second moment of the inputs, T their tangent kernel, primes for the
output. Sources: Jacot, Gabriel and Hongler (2018); Arora et al. (2019) for convolutions; Yang (2019) for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ntkit.kernel.infinite.pairs import Block, Covariance
from ntkit.kernel.infinite.positions import Averaging, Window, average, patch_sum

if TYPE_CHECKING:
    from torch import Tensor

    from ntkit.kernel.infinite.duals import Dual


@dataclass(frozen=True)
class Step:
    """A layer.

    Attributes:
        inputs: numbers of the steps whose covariances it takes.
        node: the layer's name in the module, for messages and listings.
    """

    inputs: tuple[int, ...]
    node: str

    # whether the variances of its input, one for each example and position, have to be known
    by_variance = False

    def needs_pairs(self, pairs: bool) -> bool:
        """Whether all pairs of positions of its inputs are needed, if they are of its output (or not)."""
        return pairs

    def __str__(self) -> str:
        """In words."""
        return type(self).__name__.lower()

    def check(self, variances: Tensor, *, tangent: bool) -> None:
        """Look at the variances of its input: whether they can be used, and how well. Nothing to say by default."""

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:
        """The covariance after it. `sides`: variances of rows and columns, for a step that goes by them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Inputs(Step):
    """Inner products of inputs over their channels: A = <x, x'> / C.

    Attributes:
        number: which of the tensors that are computed from the inputs alone.
        channel: their axis of channels.
    """

    number: int
    channel: int

    def __str__(self) -> str:
        return "inner products of the inputs over their channels"

    def products(self, left: Tensor, right: Tensor | None, pairs: bool) -> Covariance:
        """For examples with themselves (right None) or for pairs.

        Cost: 2 C FLOPs for each entry.
        """
        left = left.movedim(self.channel, 1)
        shape, rank = left.shape[2:], left.ndim - 2
        channels, size = left.shape[1], math.prod(shape)
        a = left.reshape(len(left), channels, size)
        b = a if right is None else right.movedim(self.channel, 1).reshape(-1, channels, size)
        if right is None:
            found = a.mT @ a if pairs else a.square().sum(1)
            found = found.reshape(len(a), *shape, *(shape if pairs else ()))
        elif pairs:
            found = a.mT.reshape(-1, channels) @ b.movedim(1, 0).reshape(channels, -1)
            found = found.reshape(len(a), size, len(b), size).transpose(1, 2).reshape(len(a), len(b), *shape, *shape)
        else:
            found = a.permute(2, 0, 1) @ b.permute(2, 1, 0)
            found = found.permute(1, 2, 0).reshape(len(a), len(b), *shape)
        lead = 1 if right is None else 2
        if pairs:
            order = [lead + axis + side * rank for axis in range(rank) for side in (0, 1)]
            found = found.permute(*range(lead), *order).contiguous()
        return Covariance(found / channels, None, rank, pairs)


@dataclass(frozen=True)
class Weights(Step):
    """A linear layer or convolution with fresh weights: A' = s^2 mean over the taps of A + b^2.

    T' = gain mean A + bias_gain + s^2 mean over the taps of T.

    Attributes:
        windows: of a convolution, one for each axis of positions; none for a linear layer.
        weight_std, bias_std: s, b.
        weight_gain, bias_gain: what trained weights and biases add to the tangent kernel, by the parametrisation.
    """

    windows: tuple[Window, ...]
    weight_std: float
    bias_std: float
    weight_gain: float
    bias_gain: float

    def __str__(self) -> str:
        taps = " x ".join(str(window.size) for window in self.windows)
        parts = [
            f"weights{f' of {taps} taps' if taps else ''}, s = {self.weight_std:.4g}",
            f"b = {self.bias_std:.4g}",
            f"training adds {self.weight_gain:.4g} A + {self.bias_gain:.4g}",
        ]
        return ", ".join(parts)

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        (inner,) = found
        total = inner.map(lambda values: patch_sum(values, self.windows, full=inner.full)) if self.windows else inner
        # sums over patches are nobody else's (one tap alone is a view of what is there), and memory that is used again
        # need not be fetched from the system
        fresh = _apart(total.nngp, inner.nngp) and not torch.is_grad_enabled()
        share = 1 / math.prod(window.size for window in self.windows)  # of one tap in the mean
        square, constant = self.weight_std**2, self.bias_std**2
        trained = block.tangent and bool(self.weight_gain or self.bias_gain)
        # in the NTK parametrisation with all parameters trained, both are the same
        alike = (self.weight_gain, self.bias_gain) == (square, constant)
        own = _affine(total.nngp, self.weight_gain * share, self.bias_gain) if trained and not alike else None
        nngp = _affine(total.nngp, square * share, constant, fresh)
        own = nngp if trained and alike else own
        ntk = total.ntk
        if ntk is not None and fresh:
            ntk.mul_(square * share)
            ntk = ntk if own is None else ntk.add_(own)
        elif ntk is not None:
            ntk = square * share * ntk if own is None else torch.add(own, ntk, alpha=square * share)
        return replace(total, nngp=nngp, ntk=own if ntk is None else ntk)


def _apart(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


def _affine(values: Tensor, factor: float, constant: float, fresh: bool = False) -> Tensor:
    """factor * values + constant, in place where the values are `fresh`."""
    scaled = values.mul_(factor) if fresh else factor * values
    return scaled.add_(constant) if constant else scaled


@dataclass(frozen=True)
class Bias(Step):
    """A bias of its own for each channel: A' = A + b^2, T' = T + gain.

    Attributes:
        std: b.
        gain: what training it adds, by the parametrisation.
    """

    std: float
    gain: float

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        return found[0].plus(self.std**2, self.gain if block.tangent and self.gain else None)


@dataclass(frozen=True)
class Nonlinearity(Step):
    """An elementwise function: A' = E[g g], T' = E[g' g'] T.

    Attributes:
        dual: the two moments.
        learned: of the derivatives by trained parameters of the function or its argument (the slope of a PReLU, the
            weight of a normalisation before it).
    """

    dual: Dual
    learned: tuple[Dual, ...] = ()
    by_variance = True

    def __str__(self) -> str:
        trained = f", training adds {', '.join(str(dual) for dual in self.learned)}" if self.learned else ""
        return f"{self.dual}{trained}"

    def check(self, variances: Tensor, *, tangent: bool) -> None:  # noqa: D102
        self.dual.check(variances, derivative=tangent)
        for dual in self.learned:
            dual.check(variances, derivative=False)

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        (inner,), derivative = found, found[0].ntk is not None
        assert sides is not None
        nngp, slope = _moments(self.dual, inner, block, sides, derivative=derivative)
        ntk = None
        if slope is not None and inner.ntk is not None:
            ntk = slope * inner.ntk if torch.is_grad_enabled() else slope.mul_(inner.ntk)
        after = replace(inner, nngp=nngp, ntk=ntk)
        for dual in self.learned if block.tangent else ():
            after = after.plus(0.0, _moments(dual, inner, block, sides, derivative=False)[0])
        return after


def _moments(
    dual: Dual, inner: Covariance, block: Block, sides: tuple[Tensor, Tensor], *, derivative: bool
) -> tuple[Tensor, Tensor | None]:
    a, b = block.left(sides[0], inner.full), block.right(sides[1], inner.full)
    if block.lead == 1 and not inner.full:
        return dual.coincident(a, derivative=derivative)
    mask = block.coincident(inner)
    c = inner.nngp
    if mask is None:
        return dual(a, b, c, derivative=derivative)
    # away from the diagonal of the formulas, where their derivatives are infinite
    values, slopes = dual(a, b, torch.where(mask, 0.0, c), derivative=derivative)
    exact, steep = dual.coincident(a, derivative=derivative)
    values = torch.where(mask, exact, values)
    return values, None if slopes is None or steep is None else torch.where(mask, steep, slopes)


@dataclass(frozen=True)
class Scaling(Step):
    """A number times a layer."""

    factor: float

    def __str__(self) -> str:
        return f"times {self.factor:.4g}"

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        return found[0].map(lambda values: self.factor**2 * values)


@dataclass(frozen=True)
class Total(Step):
    """A sum of layers that share no random weights but through weights of their own in between: moments add."""

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        total, *others = found
        for other in others:
            total = total.plus(other.nngp, other.ntk)
        return total


@dataclass(frozen=True)
class Mixture(Step):
    """Layers side by side in one: the mean over all channels.

    Attributes:
        shares: of the channels, one for each input.
    """

    shares: tuple[float, ...]

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        first, *others = (
            one.map(lambda values, share=share: share * values) for one, share in zip(found, self.shares, strict=True)
        )
        for other in others:
            first = first.plus(other.nngp, other.ntk)
        return first


@dataclass(frozen=True)
class Pooling(Step):
    """Sums over positions, on both sides of all pairs; single positions, on both sides of equal ones too.

    Attributes:
        axes: one for each axis of positions; None leaves it.
    """

    axes: tuple[Averaging | None, ...]

    def needs_pairs(self, pairs: bool) -> bool:  # noqa: D102
        return pairs or not all(axis is None or axis.single for axis in self.axes)

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        rank = sum(axis is None or not axis.dropped for axis in self.axes)
        return found[0].map(lambda values: average(values, self.axes, full=found[0].full), rank=rank)


@dataclass(frozen=True)
class Flattening(Step):
    """Positions become channels: a linear layer behind it sees the mean over equal positions."""

    def needs_pairs(self, pairs: bool) -> bool:  # noqa: D102
        return False

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        (inner,) = found
        axes = tuple(range(inner.lead, inner.lead + inner.rank))
        return inner.map(lambda values: values.mean(axes) if axes else values, rank=0)


@dataclass(frozen=True)
class Normalization(Step):
    """Layer normalization: A' = g^2 A / sqrt((v + eps)(v' + eps)), by the variances v, and T likewise.

    Attributes:
        over: axes of positions over which the variance is a mean as well.
        eps: of the layer.
        scale: its weight g, the same in all channels.
        shift_gain: 1 where the bias is trained. What a trained weight adds depends on the layer that follows.
    """

    over: tuple[int, ...]
    eps: float
    scale: float = 1.0
    shift_gain: float = 0.0
    by_variance = True

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        (inner,) = found
        assert sides is not None
        left, right = (self._inverse(values) for values in sides)
        factor = block.left(left, inner.full) * block.right(right, inner.full)
        normal = inner.map(lambda values: factor * values)
        after = normal.map(lambda values: self.scale**2 * values)
        return after.plus(0.0, self.shift_gain) if block.tangent and self.shift_gain else after

    def _inverse(self, variances: Tensor) -> Tensor:
        if self.over:
            axes = tuple(1 + axis for axis in self.over)
            variances = variances.mean(axes, keepdim=True).expand_as(variances)
        return (variances + self.eps).rsqrt()


@dataclass(frozen=True)
class ScaleTraining(Step):
    """What training a weight per channel adds where a linear layer follows: T' = T + A / g^2, with A of g times units.

    Attributes:
        scale: g.
    """

    scale: float

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        return found[0].plus(0.0, found[0].nngp / self.scale**2) if block.tangent else found[0]


@dataclass(frozen=True)
class Dropout(Step):
    """Units dropped at random with probability p and the others scaled by 1 / (1 - p), as in training.

    An example meets itself with one mask; different examples with masks of their own.

    Attributes:
        p: probability.
        channels: whether whole channels are dropped, all positions alike.
    """

    p: float
    channels: bool = False

    def run(self, found: list[Covariance], block: Block, sides: tuple[Tensor, Tensor] | None) -> Covariance:  # noqa: D102
        (inner,) = found
        if self.channels and block.lead == 1:
            mask = torch.ones_like(inner.nngp, dtype=torch.bool)
        elif self.channels:
            same = block.same
            mask = None if same is None else same.reshape(*same.shape, *(1,) * (inner.nngp.ndim - 2))
        else:
            mask = block.coincident(inner)
        if mask is None:
            return inner
        return inner.map(lambda values: torch.where(mask, values / (1 - self.p), values))
