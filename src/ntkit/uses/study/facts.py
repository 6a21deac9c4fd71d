"""What a study is given and what it finds: frozen dataclasses of tensors and numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ntkit.tangent.readout import Logits, RandomLogits, Readout, SingleLogit, SumOfLogits

if TYPE_CHECKING:
    from ntkit.kernel.fidelity import Fidelity
    from ntkit.solve.spectrum import Alignment, Drift, Spectrum


class Listener(Protocol):
    """Is told how far a long computation is."""

    def step(self, message: str) -> None:
        """A new step begins."""
        ...

    def part(self, done: int, total: int) -> None:
        """So much of the present step is done."""
        ...


class Silence:
    """A listener that does nothing."""

    def step(self, message: str) -> None:
        """Ignore it."""

    def part(self, done: int, total: int) -> None:
        """Ignore it."""


@dataclass(frozen=True)
class Kind:
    """One kernel among the many that a network has: which scalars are differentiated, and whether they are averaged.

    Attributes:
        label: what people call it.
        readout: the read-out.
        trace: whether the scalars of an example are averaged to one number per pair.
    """

    label: str
    readout: Readout
    trace: bool = False


FULL = Kind("full eNTK", Logits())
PSEUDO = Kind("pNTK", SumOfLogits())
TRACE = Kind("trace", Logits(), trace=True)
FIRST = Kind("first logit", SingleLogit(0))


def random_signs(draws: int, generator: torch.Generator) -> Kind:
    """The mean over a few random-sign combinations of the logits, an estimate of the trace kernel for less work."""
    return Kind(f"{draws} random signs", RandomLogits(draws, generator), trace=True)


@dataclass(frozen=True)
class Task:
    """Data, cut into training and test examples.

    Class numbers (an integer y) make a classification task, scored by accuracy; floating point targets a regression
    task, scored by R^2.

    Attributes:
        x_train: (N, ...).
        y_train: (N,) int64, or (N, C) floating point.
        x_test: (M, ...).
        y_test: like y_train.
        outputs: C, the number of outputs of the network.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    outputs: int

    @property
    def classification(self) -> bool:
        """Whether the targets are class numbers."""
        return not self.y_train.is_floating_point()

    @property
    def score_name(self) -> str:
        """What `score` measures."""
        return "accuracy" if self.classification else "R²"

    @property
    def offset(self) -> Tensor:
        """What kernel regression adds to its predictions: 1/C for classes, the training mean of other targets, (C,)."""
        if self.classification:
            return torch.full((self.outputs,), 1 / self.outputs, dtype=torch.float64)
        return self.y_train.double().mean(0)

    def targets(self, y: Tensor) -> Tensor:
        """Targets of a kernel regression, (n, C), float64: one-hot for classes, less the offset."""
        plain = functional.one_hot(y, self.outputs) if self.classification else y
        return plain.double() - self.offset

    def score(self, outputs: Tensor, y: Tensor) -> float:
        """Share of examples whose largest output is the right one, or R^2 over all outputs; 1 is perfect.

        Of targets that are all equal there is no R^2: NaN.
        """
        if self.classification:
            return float((outputs.argmax(1) == y).double().mean())
        y = y.double()
        spread = float((y - y.mean(0)).square().sum())
        return 1 - float((outputs - y).square().sum()) / spread if spread else math.nan


@dataclass(frozen=True)
class Effort:
    """How many examples each part of a study uses, and what is computed.

    Attributes:
        compared: examples of which the full kernel is computed and compared with the reduced ones; fewer are taken if
            they times C exceed `full_rows`.
        full_rows: most rows of a full kernel.
        full_flops: most floating point operations of a full kernel; beyond, fewer examples are compared (8 at least),
            and their regressions are scored on fewer test examples (100 at least).
        sampled: examples of the exact blocks on which fidelity is measured.
        reduced: the cheap kernels to compare with the full one.
        fitted: those of them to fit on the compared examples as well.
        main: the kernels to fit on all training examples.
        memory: bytes of working space for computing a kernel; by default a share of the machine's.
    """

    compared: int = 160
    full_rows: int = 1600
    full_flops: float = 3e12
    sampled: int = 32
    reduced: tuple[Kind, ...] = (PSEUDO, TRACE, FIRST)
    fitted: tuple[Kind, ...] = (PSEUDO, TRACE)
    main: tuple[Kind, ...] = (PSEUDO,)
    memory: int | None = None


@dataclass(frozen=True)
class KernelFacts:
    """One kernel at one state of the network, on the compared examples.

    Attributes:
        label: of the kernel.
        rows: rows of the matrix.
        seconds: to compute it.
        mean_diagonal: trace / rows.
        spectrum: its eigenvalues.
        alignment: with the targets; of reduced kernels only (the full one's is on another scale), and where all
            examples are not alike.
        error: ||Theta - k (x) I|| / ||Theta|| with all blocks of the compared examples; 0 for the full kernel itself.
        fidelity: the same for the kernel of all training examples, from a sample of them, with a standard error; None
            for the full kernel.
    """

    label: str
    rows: int
    seconds: float
    mean_diagonal: float
    spectrum: Spectrum
    alignment: Alignment | None
    error: float
    fidelity: Fidelity | None


@dataclass(frozen=True)
class Fit:
    """One kernel regression, scored.

    Attributes:
        label: of the kernel.
        examples: training examples.
        test_examples: test examples.
        rows: rows of the linear system.
        relative_ridge: chosen by leave-one-out, in units of the mean diagonal.
        ridge_from: examples on which the ridge was chosen.
        train_score: on its own training examples.
        loo_score: on each training example, when it is left out. Too good if the network was trained on these labels.
        test_score: on the test examples.
        loo_error: mean squared leave-one-out error.
        gcv: generalized cross-validation estimate of the same.
        seconds: kernels, ridge, solve and predictions together.
    """

    label: str
    examples: int
    test_examples: int
    rows: int
    relative_ridge: float
    ridge_from: int
    train_score: float
    loo_score: float
    test_score: float
    loo_error: float
    gcv: float
    seconds: float


@dataclass(frozen=True)
class RidgeCheck:
    """What leave-one-out and GCV promise for each ridge, and what the test set says.

    Attributes:
        label: of the kernel.
        examples: training examples of the fit.
        relative: the ridges, in units of the mean diagonal.
        leave_one_out: mean squared error, per ridge.
        gcv: the same.
        test: mean squared error on the test examples.
    """

    label: str
    examples: int
    relative: tuple[float, ...]
    leave_one_out: tuple[float, ...]
    gcv: tuple[float, ...]
    test: tuple[float, ...]

    @property
    def regret(self) -> float:
        """Test error at the ridge that leave-one-out chooses, over the least test error of the grid; 1 is no regret."""
        chosen = min(range(len(self.relative)), key=self.leave_one_out.__getitem__)
        return self.test[chosen] / min(self.test)


@dataclass(frozen=True)
class Similarity:
    """The trace kernel between some examples as cosines, centred, sorted by class.

    Centred: of the features less their mean over the examples, so that 0 means "no more alike than any two examples".

    Attributes:
        cosines: (n, n), 1 on the diagonal.
        classes: (n,), ascending.
        within: mean cosine of two different examples of one class.
        between: mean cosine of two examples of different classes.
    """

    cosines: Tensor
    classes: Tensor
    within: float
    between: float


@dataclass(frozen=True)
class Evidence:
    """The training examples that speak loudest for a prediction of a kernel regression.

    The prediction for class c is a sum over training examples, f_c(x) = sum_n k(x, x_n) a_nc. What sets x apart from
    the average test example x' is sum_n (k(x, x_n) - mean k(x', x_n)) a_nc. The largest terms of it are shown whose two
    factors are positive: examples that vote for c, and are more like x than like the average.

    Attributes:
        test: number of the test example.
        truth: its class.
        predicted: the predicted class.
        train: numbers of the training examples with the largest terms.
        classes: their classes.
        terms: the terms.
    """

    test: int
    truth: int
    predicted: int
    train: tuple[int, ...]
    classes: tuple[int, ...]
    terms: tuple[float, ...]


@dataclass(frozen=True)
class State:
    """Everything about the network at one set of weights.

    Attributes:
        name: of the state.
        train_score: of the network itself, on the training examples.
        test_score: on the test examples.
        kernels: on the compared examples; the full one first.
        layers: share of the trace of the full kernel that each layer carries.
        fits: kernel regressions, on the compared examples and on all.
        ridge_check: of the first main kernel.
        similarity: None for a regression task, and where all examples, or their classes, are alike.
        evidence: of the first main kernel, if it is a reduced one; empty for a regression task.
    """

    name: str
    train_score: float
    test_score: float
    kernels: tuple[KernelFacts, ...]
    layers: dict[str, float]
    fits: tuple[Fit, ...]
    ridge_check: RidgeCheck
    similarity: Similarity | None
    evidence: tuple[Evidence, ...]

    def kernel(self, label: str) -> KernelFacts:
        """The facts about one kernel."""
        return next(facts for facts in self.kernels if facts.label == label)

    def fit(self, label: str, examples: int) -> Fit:
        """The regression with one kernel on this many examples."""
        return next(fit for fit in self.fits if (fit.label, fit.examples) == (label, examples))


@dataclass(frozen=True)
class Movement:
    """How one kernel changed from the first state of the network to the last.

    Attributes:
        label: of the kernel.
        drift: relative change and cosine distance.
        cka: centred kernel alignment between the two; None where all examples are alike to one of them.
    """

    label: str
    drift: Drift
    cka: float | None


@dataclass(frozen=True)
class Study:
    """The result of `study`.

    Attributes:
        parameters: P.
        outputs: C.
        train_examples: N.
        test_examples: M.
        compared: examples on which all kernels are compared.
        compared_test: test examples on which regressions with those examples are scored.
        main: label of the kernel whose regression on all examples comes first.
        score_name: "accuracy" or "R²".
        states: one or more, in order.
        movements: from the first to the last state; empty if there is only one.
    """

    parameters: int
    outputs: int
    train_examples: int
    test_examples: int
    compared: int
    compared_test: int
    main: str
    score_name: str
    states: tuple[State, ...]
    movements: tuple[Movement, ...]
