"""How fast the pNTK becomes the full kernel when a network gets wider, at initialisation.

Mohamadi, Bae and Sutherland 2023: in fan-in parametrization the relative Frobenius error of pNTK (x) I_C falls like
1/sqrt(width), up to logarithms, and so does that of the largest eigenvalue. Measured: a slope of about -0.54 in a
log-log plot for multilayer perceptrons with two hidden layers.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.kernel.empirical import TangentKernel
from ntkit.solve.spectrum import spectrum
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, SingleLogit, SumOfLogits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Where the slope of a healthy implementation lies, with three seeds or more.
EXPECTED_SLOPE = (-0.7, -0.4)


@dataclass(frozen=True)
class WidthPoint:
    """One random network of one width: how far its reduced kernels are from its full one.

    Attributes:
        width: units in each hidden layer.
        seed: of the weights.
        sum_error: ||Theta - pNTK (x) I|| / ||Theta||, Frobenius.
        single_error: the same for the kernel of the first logit.
        trace_error: the same for the trace kernel: the least that any k (x) I can reach.
        largest_error: |largest eigenvalue of pNTK - that of Theta| / that of Theta.
        condition_full: condition number of Theta.
        condition_sum: condition number of the pNTK.
    """

    width: int
    seed: int
    sum_error: float
    single_error: float
    trace_error: float
    largest_error: float
    condition_full: float
    condition_sum: float


@dataclass(frozen=True)
class Slope:
    """The slope of log(error) against log(width).

    Attributes:
        value: least squares through all points.
        standard_error: from the slopes of the single seeds.
    """

    value: float
    standard_error: float


@dataclass(frozen=True)
class Convergence:
    """The errors over widths and seeds.

    Attributes:
        examples: N, rows of the reduced kernels.
        outputs: C.
        points: one per width and seed.
    """

    examples: int
    outputs: int
    points: tuple[WidthPoint, ...]

    @property
    def widths(self) -> list[int]:
        """The widths, ascending."""
        return sorted({point.width for point in self.points})

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted({point.seed for point in self.points})

    def at(self, width: int) -> list[WidthPoint]:
        """All points of one width."""
        return [point for point in self.points if point.width == width]

    @property
    def sum_slope(self) -> Slope:
        """How the error of the pNTK falls with width."""
        return self._slope(lambda point: point.sum_error)

    @property
    def trace_slope(self) -> Slope:
        """How the error of the trace kernel falls with width."""
        return self._slope(lambda point: point.trace_error)

    @property
    def largest_slope(self) -> Slope:
        """How the error of the largest eigenvalue falls with width."""
        return self._slope(lambda point: point.largest_error)

    @property
    def as_expected(self) -> bool:
        """Whether the slope of the pNTK's error lies in the band that theory and earlier measurements give."""
        low, high = EXPECTED_SLOPE
        return low <= self.sum_slope.value <= high

    def _slope(self, error: Callable[[WidthPoint], float]) -> Slope:
        single = [_fit([p for p in self.points if p.seed == seed], error) for seed in self.seeds]
        spread = statistics.stdev(single) / len(single) ** 0.5 if len(single) > 1 else float("nan")
        return Slope(_fit(self.points, error), spread)


def convergence(
    x: Tensor,
    *,
    outputs: int = 10,
    widths: Sequence[int] = (64, 128, 256, 512),
    seeds: Sequence[int] = (0, 1, 2),
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Convergence:
    """Compare full and reduced kernels of random multilayer perceptrons of growing width, in float64.

    Args:
        x: (N, ...) examples; flattened to (N, D).
        outputs: C.
        widths: of both hidden layers, at least two.
        seeds: one network each.
        tell: is told (networks done, networks in all).

    Raises:
        InputError: if there are fewer than two widths, or no seed.

    Memory: 8 (N C)^2 bytes and a few copies.
    """
    if len(set(widths)) < 2 or not seeds:
        raise InputError(f"a slope needs two widths and a seed at least: got widths {widths}, seeds {seeds}")
    x = x.flatten(1).to(torch.float64)
    points = []
    for width in widths:
        for seed in seeds:
            points.append(_point(x, perceptron(x.shape[1], width, outputs, seed), width, seed))
            tell(len(points), len(widths) * len(seeds))
    return Convergence(len(x), outputs, tuple(points))


def perceptron(inputs: int, width: int, outputs: int, seed: int) -> nn.Module:
    """Two hidden ReLU layers in float64, weights normal with variance 2 / fan-in (1 / fan-in at the top), no bias."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(inputs, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, outputs, bias=False),
    ).to(torch.float64)
    gains = ("relu", "relu", "linear")
    for parameter, gain in zip(model.parameters(), gains, strict=True):
        nn.init.kaiming_normal_(parameter, nonlinearity=gain, generator=generator)
    return model.eval()


def _point(x: Tensor, model: nn.Module, width: int, seed: int) -> WidthPoint:
    full_tangent = linearize(model, readout=Logits())
    full = TangentKernel(full_tangent, x).dense()
    outputs = len(full) // len(x)
    pseudo = TangentKernel(linearize(model, readout=SumOfLogits()), x).dense()
    single = TangentKernel(linearize(model, readout=SingleLogit(0)), x).dense()
    trace = full.reshape(len(x), outputs, len(x), outputs).diagonal(dim1=1, dim2=3).mean(2)
    of_full, of_sum = spectrum(full), spectrum(pseudo)
    return WidthPoint(
        width=width,
        seed=seed,
        sum_error=relative_error(full, pseudo),
        single_error=relative_error(full, single),
        trace_error=relative_error(full, trace),
        largest_error=abs(of_sum.largest - of_full.largest) / of_full.largest,
        condition_full=of_full.condition_number,
        condition_sum=of_sum.condition_number,
    )


def relative_error(full: Tensor, reduced: Tensor) -> float:
    """||full - reduced (x) I_C|| / ||full||, Frobenius, for dense (N C, M C) and (N, M) matrices, example-major."""
    outputs = full.shape[0] // reduced.shape[0]
    blocks = full.reshape(reduced.shape[0], outputs, reduced.shape[1], outputs)
    identity = torch.eye(outputs, dtype=full.dtype, device=full.device)
    difference = blocks - reduced[:, None, :, None] * identity[None, :, None, :]
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(full))


def _fit(points: Sequence[WidthPoint], error: Callable[[WidthPoint], float]) -> float:
    logs = torch.tensor([[p.width, error(p)] for p in points], dtype=torch.float64).log()
    centred = logs - logs.mean(0)
    return float((centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum())
