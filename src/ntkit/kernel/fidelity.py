"""How far a reduced kernel is from the full one: sampled, with a standard error.

A reduced kernel k (pNTK, single logit, trace, random combinations) is used as k (x) I_C in place of the full Theta.
Proven bounds hold at initialisation; after training the error depends on the loss and can be large, so it is measured.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkit.errors import FidelityWarning, InputError
from ntkit.tangent.linearize import Tangent
from ntkit.tangent.readout import Logits, Loss

if TYPE_CHECKING:
    from ntkit.kernel.empirical import TangentKernel

# A kernel whose error is this many times that of the trace kernel is worth a warning: another would do better.
MUCH_WORSE = 1.4
# And one whose error is below this stands well enough for the full one, whatever another would do.
POOR = 0.1


@dataclass(frozen=True)
class Fidelity:
    """A reduced kernel beside the exact one, on a sample of examples.

    Attributes:
        error: relative Frobenius error ||Theta - k (x) I||_F / ||Theta||_F of the whole kernel, estimated.
        standard_error: of that estimate, by the jackknife over examples.
        floor: the same error of the trace kernel, the smallest that any k (x) I can have.
        floor_standard_error: of that.
        largest_eigenvalue: of the exact kernel of the sampled examples.
        largest_eigenvalue_reduced: of the reduced one.
        condition: condition number of the exact kernel of the sampled examples (inf if singular).
        condition_reduced: of the reduced one.
        examples: number of examples sampled.
        outputs: C.
    """

    error: float
    standard_error: float
    floor: float
    floor_standard_error: float
    largest_eigenvalue: float
    largest_eigenvalue_reduced: float
    condition: float
    condition_reduced: float
    examples: int
    outputs: int

    @property
    def eigenvalue_error(self) -> float:
        """Relative error of the largest eigenvalue."""
        return abs(self.largest_eigenvalue_reduced - self.largest_eigenvalue) / self.largest_eigenvalue

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"relative Frobenius error {self.error:.3f} +- {self.standard_error:.3f} against the exact "
            f"{self.outputs} x {self.outputs} blocks of {self.examples} examples; the best of its kind (the trace "
            f"kernel) has {self.floor:.3f}"
        )


def measure_fidelity(kernel: TangentKernel, *, examples: int, generator: torch.Generator) -> Fidelity:
    """Compare a reduced kernel with exact blocks; see `TangentKernel.fidelity`.

    The sums of squares over diagonal and other blocks are estimated apart and weighted by their numbers in the whole
    kernel, because the few diagonal blocks are much larger than the rest.

    Warns with `FidelityWarning` where another reduced kernel would do much better.

    Raises:
        InputError: if the kernel is not a reduced one, or the sample is too small.
    """
    readout = kernel.tangent.readout
    if kernel.scalars != 1 or isinstance(readout, Loss):
        raise InputError(
            "fidelity compares a reduced kernel, one row per example, with the full one: got "
            f"{kernel.scalars} rows per example of {readout!r}. Use SumOfLogits(), SingleLogit(c), or trace=True"
        )
    rows, cols = kernel.shape
    examples = min(examples, rows, cols)
    if examples < 2:
        raise InputError(f"fidelity needs at least 2 examples to sample: got {examples}")
    full = Tangent(kernel.tangent.model, Logits(select=getattr(readout, "select", None)), kernel.tangent.selection)
    mine = torch.randperm(rows, generator=generator, device=generator.device)[:examples].tolist()
    theirs = (
        None
        if kernel.symmetric
        else torch.randperm(cols, generator=generator, device=generator.device)[:examples].tolist()
    )
    exact = kernel.on(mine, theirs, tangent=full).double()
    reduced = kernel.on(mine, theirs).double()
    outputs = exact.shape[0] // examples
    blocks = exact.reshape(examples, outputs, examples, outputs)
    trace = torch.einsum("ncmc->nm", blocks) / outputs
    whole = blocks.square().sum((1, 3))
    # ||Theta_ij - k I||^2 = ||Theta_ij||^2 - 2 k tr Theta_ij + C k^2
    difference = whole - 2 * outputs * reduced * trace + outputs * reduced.square()
    error, error_se = relative_error(difference, whole, rows, symmetric=kernel.symmetric)
    floor, floor_se = relative_error(whole - outputs * trace.square(), whole, rows, symmetric=kernel.symmetric)
    top, condition = _extremes(exact, kernel.symmetric, kernel.dtype)
    top_reduced, condition_reduced = _extremes(reduced, kernel.symmetric, kernel.dtype)
    found = Fidelity(
        error, error_se, floor, floor_se, top, top_reduced, condition, condition_reduced, examples, outputs
    )
    doubt = 0.0 if math.isnan(error_se) else 2 * error_se  # what the sample leaves open
    if error > max(POOR, MUCH_WORSE * floor) and error - floor > doubt:
        warnings.warn(
            f"another reduced kernel would do much better: {found}. Use Logits() with trace=True, or for less work an "
            "estimate of it, RandomLogits(draws, generator) with trace=True and enough draws",
            FidelityWarning,
            stacklevel=3,
        )
    return found


def relative_error(squares: Tensor, whole: Tensor, population: int, *, symmetric: bool) -> tuple[float, float]:
    """sqrt(sum squares / sum whole) over the whole kernel, from a sample of blocks, and its jackknife error.

    Args:
        squares: squared differences, (s, s), one entry per pair of examples.
        whole: squared entries of the truth, (s, s).
        population: number of examples of the whole kernel.
        symmetric: whether rows and columns are the same examples, so that the few entries of the diagonal count apart.
    """
    size = len(squares)
    diagonal = torch.eye(size, dtype=torch.bool, device=squares.device) if symmetric else None

    def ratio(keep: Tensor) -> float:
        a, b = squares[keep][:, keep], whole[keep][:, keep]
        if diagonal is None:
            return float((a.sum() / b.sum()).clamp(min=0).sqrt())
        on = diagonal[keep][:, keep]
        others = max(population - 1, 0)

        def total(t: Tensor) -> Tensor:
            return t[on].mean() + (others * t[~on].mean() if others and int((~on).sum()) else 0)

        return float((total(a) / total(b)).clamp(min=0).sqrt())

    everything = torch.ones(size, dtype=torch.bool, device=squares.device)
    estimate = ratio(everything)
    if size < 3:
        return estimate, float("nan")
    left_out = []
    for i in range(size):
        keep = everything.clone()
        keep[i] = False
        left_out.append(ratio(keep))
    values = torch.tensor(left_out, dtype=torch.float64)
    variance = (size - 1) / size * (values - values.mean()).square().sum()
    return estimate, float(variance.sqrt())


def _extremes(matrix: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[float, float]:
    """Largest eigenvalue (or singular value) and condition number of a matrix that was computed in `dtype`.

    What cannot be told from zero counts as zero: see `ntkit.solve.symmetric.SymmetricMatrix.tolerance`, which is out of
    reach from here.
    """
    values = torch.linalg.eigvalsh(matrix) if symmetric else torch.linalg.svdvals(matrix).flip(0)
    top, bottom = float(values[-1]), float(values[0])
    noise = torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(matrix)) / math.sqrt(len(matrix))
    resolution = max(len(matrix) * torch.finfo(matrix.dtype).eps * top, noise)
    return top, top / bottom if bottom > resolution else float("inf")
