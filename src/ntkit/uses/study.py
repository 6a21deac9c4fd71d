"""What the tangent kernel says about one network on one data set: the numbers behind `ntkit demo` and `ntkit report`.

For each state of the network (as built, after training) two questions are answered. How do the kernels compare, the
exact one with its C x C blocks and the cheap ones with one number per pair? And how well does kernel regression with
each of them predict, next to the network itself? Nothing is drawn here; every result is a frozen dataclass of numbers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkit.errors import InputError
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.empirical import TangentKernel, by_module
from ntkit.solve.regression import KernelRegression, RegressionFit, regress
from ntkit.solve.ridge import LeaveOneOut, Relative
from ntkit.solve.spectrum import Alignment, Drift, Spectrum, alignment, cka, drift, spectrum
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, RandomLogits, Readout, SingleLogit, SumOfLogits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ntkit.kernel.fidelity import Fidelity

# One eigendecomposition of this many rows takes half a minute on two cores; a larger regression gets its ridge from so
# many of its examples, which changes the best relative ridge little.
RIDGE_ROWS = 2000
# A dense block between new and training examples is kept below this many bytes.
BLOCK_BYTES = 2**28
# Examples on which the kernel is split by layer, and images in the picture of similarities.
LAYER_EXAMPLES, PICTURE_EXAMPLES = 48, 120


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
        """Share of examples whose largest output is the right one, or R^2 over all outputs; 1 is perfect."""
        if self.classification:
            return float((outputs.argmax(1) == y).double().mean())
        y = y.double()
        return 1 - float((outputs - y).square().sum() / (y - y.mean(0)).square().sum())


@dataclass(frozen=True)
class Effort:
    """How many examples each part of a study uses, and what is computed.

    Attributes:
        compared: examples of which the full kernel is computed and compared with the reduced ones; fewer are taken if
            they times C exceed `full_rows`.
        full_rows: most rows of a full kernel.
        sampled: examples of the exact blocks on which fidelity is measured.
        reduced: the cheap kernels to compare with the full one.
        fitted: those of them to fit on the compared examples as well.
        main: the kernels to fit on all training examples.
        memory: bytes of working space for computing a kernel; by default a share of the machine's.
    """

    compared: int = 240
    full_rows: int = 2400
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
        alignment: with the targets; of reduced kernels only (the full one's is on another scale).
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

    The prediction for a class is a sum over training examples, f_c(x) = sum_n k(x, x_n) a_nc; its largest terms are
    shown.

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
        similarity: None for a regression task.
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
        cka: centred kernel alignment between the two.
    """

    label: str
    drift: Drift
    cka: float


@dataclass(frozen=True)
class Study:
    """The result of `study`.

    Attributes:
        parameters: P.
        outputs: C.
        train_examples: N.
        test_examples: M.
        compared: examples on which all kernels are compared.
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
    main: str
    score_name: str
    states: tuple[State, ...]
    movements: tuple[Movement, ...]


def study(
    states: Mapping[str, nn.Module],
    task: Task,
    *,
    effort: Effort | None = None,
    generator: torch.Generator,
    listener: Listener | None = None,
) -> Study:
    """Compare the kernels of a network with each other and with the network, at one or several states of its weights.

    Args:
        states: name -> network in evaluation mode; the same architecture at different weights.
        task: the data.
        effort: how many examples each part uses.
        generator: of the examples on which fidelity is sampled.
        listener: is told what is being computed.

    Raises:
        InputError: if there is no state, or the data are too few.
        ModelError: if a network cannot be linearized.

    Cost: with n compared examples and N in all, per state: the full kernel of n and between M and n examples, 9 (n C)^3
    for its regression, and for each main kernel N (N + M) / 2 pairs and 2/3 N^3. Memory: 16 N^2 bytes at the peak.
    """
    effort, listener = effort or Effort(), listener or Silence()
    if not states:
        raise InputError("a study needs the network at one set of weights at least: got none")
    if min(len(task.x_train), len(task.x_test)) < 2:
        raise InputError(
            "a study needs two training and two test examples at least: got "
            f"{len(task.x_train)} training, {len(task.x_test)} test examples"
        )
    if task.outputs == 1:  # one number per pair is all there is: nothing is reduced
        effort = replace(effort, reduced=(), fitted=(), main=(FULL,))
    compared = max(2, min(effort.compared, effort.full_rows // task.outputs, len(task.x_train)))
    found, matrices = [], []
    for name, model in states.items():
        bench = _Bench(name, model, task, effort, compared, listener)
        dense = bench.matrices()
        found.append(bench.examine(dense, generator))
        matrices.append(dense)
    return Study(
        parameters=linearize(next(iter(states.values()))).count,
        outputs=task.outputs,
        train_examples=len(task.x_train),
        test_examples=len(task.x_test),
        compared=compared,
        main=effort.main[0].label,
        score_name=task.score_name,
        states=tuple(found),
        movements=_movements(matrices[0], matrices[-1], task.outputs) if len(matrices) > 1 else (),
    )


@dataclass(frozen=True)
class _Bench:
    """One network on one task, with what every examination of it needs."""

    name: str
    model: nn.Module
    task: Task
    effort: Effort
    compared: int
    listener: Listener

    def say(self, message: str) -> None:
        self.listener.step(f"{self.name}: {message}")

    def matrices(self) -> dict[str, _Timed]:
        """Label -> the dense kernel of the compared examples."""
        x = self.task.x_train[: self.compared]
        found = {}
        for kind in (FULL, *self.effort.reduced):
            self.say(f"{kind.label} kernel of {len(x):,} examples")
            found[kind.label] = _timed(self._kernel(kind, x))
        return found

    def examine(self, dense: dict[str, _Timed], generator: torch.Generator) -> State:
        task = self.task
        train_score, test_score = (
            task.score(linearize(self.model).outputs(x), y)
            for x, y in ((task.x_train, task.y_train), (task.x_test, task.y_test))
        )
        self.say("spectrum and fidelity of each kernel")
        seed = int(torch.randint(2**62, (1,), generator=generator))
        kernels = tuple(self._facts(kind, dense, seed) for kind in (FULL, *self.effort.reduced))
        fits, evidence = [], ()
        for kind, examples in self._regressions():
            ready = dense.get(kind.label) if examples == self.compared else None
            fit, terms = self._fit(kind, examples, ready)
            fits.append(fit)
            if (kind, examples) == (self.effort.main[0], len(task.x_train)):
                evidence = terms
        layers = self._layers()
        self.say("promised and real error over the ridges")
        return State(
            name=self.name,
            train_score=train_score,
            test_score=test_score,
            kernels=kernels,
            layers=layers,
            fits=tuple(fits),
            ridge_check=self._ridge_check(self.effort.main[0]),
            similarity=self._similarity(dense) if task.classification else None,
            evidence=evidence,
        )

    def _regressions(self) -> list[tuple[Kind, int]]:
        """Kernel and number of examples of each fit, without repetitions when all examples are compared."""
        small = [(kind, self.compared) for kind in (FULL, *self.effort.fitted)]
        large = [(kind, len(self.task.x_train)) for kind in self.effort.main]
        return small + [pair for pair in large if pair not in small]

    def _kernel(self, kind: Kind, x: Tensor, other: Tensor | None = None) -> TangentKernel:
        tangent = linearize(self.model, readout=kind.readout)
        return TangentKernel(
            tangent, x, other, trace=kind.trace, memory=self.effort.memory, progress=self.listener.part
        )

    def _facts(self, kind: Kind, dense: dict[str, _Timed], seed: int) -> KernelFacts:
        full, matrix = dense[FULL.label].matrix, dense[kind.label].matrix
        exact = kind == FULL
        y = self.task.targets(self.task.y_train[: self.compared])
        kernel = self._kernel(kind, self.task.x_train)
        generator = torch.Generator().manual_seed(seed)  # the same sample for every kernel: their errors compare
        return KernelFacts(
            label=kind.label,
            rows=len(matrix),
            seconds=dense[kind.label].seconds,
            mean_diagonal=float(matrix.diagonal().double().mean()),
            spectrum=spectrum(matrix),
            alignment=None if exact else alignment(matrix, y),
            error=0.0 if exact else _relative_error(full, matrix),
            fidelity=None if exact else kernel.fidelity(examples=self.effort.sampled, generator=generator),
        )

    def _fit(self, kind: Kind, examples: int, ready: _Timed | None = None) -> tuple[Fit, tuple[Evidence, ...]]:
        """A regression on the first `examples` training examples, scored on the test set, and what speaks for it."""
        task = self.task
        x, y = task.x_train[:examples], task.targets(task.y_train[:examples])
        if ready is None:
            self.say(f"{kind.label} kernel of {examples:,} examples")
            ready = _timed(self._kernel(kind, x))
        start = time.perf_counter()
        matrix = DenseKernel(ready.matrix, symmetric=True)
        self.say(f"{kind.label} regression on {examples:,} examples")
        relative, ridge_from = _best_ridge(matrix, y)
        fit = regress(matrix, y, Relative(relative))
        cross = [self._kernel(kind, part, x).dense() for part in task.x_test.split(_chunk(matrix, task.outputs))]
        predictions = torch.cat([fit.predict(part) for part in cross]) + task.offset
        scores = Fit(
            label=kind.label,
            examples=examples,
            rows=matrix.shape[0],
            relative_ridge=relative,
            ridge_from=ridge_from,
            train_score=task.score(y - fit.train_residuals + task.offset, task.y_train[:examples]),
            loo_score=task.score(y - fit.loo_residuals + task.offset, task.y_train[:examples]),
            test_score=task.score(predictions, task.y_test),
            loo_error=fit.leave_one_out,
            gcv=fit.gcv,
            seconds=ready.seconds + time.perf_counter() - start,
        )
        speaks = task.classification and not fit.full
        return scores, _evidence(torch.cat(cross), fit, predictions.argmax(1), task) if speaks else ()

    def _ridge_check(self, kind: Kind) -> RidgeCheck:
        task = self.task
        examples = min(len(task.x_train), max(2, RIDGE_ROWS // self._kernel(kind, task.x_train[:1]).scalars))
        x, y = task.x_train[:examples], task.targets(task.y_train[:examples])
        regression = KernelRegression.decompose(self._kernel(kind, x), y)
        curve = regression.curve()
        test = []
        cross = self._kernel(kind, task.x_test, x).dense().double()
        truth = task.targets(task.y_test)
        for ridge, promised in zip(curve.absolute.tolist(), curve.gcv.tolist(), strict=True):
            if promised == float("inf"):
                test.append(float("inf"))
                continue
            coefficients = regression.coefficients(ridge)
            predictions = cross @ (coefficients.reshape(-1, 1) if regression.full else coefficients)
            test.append(float((predictions.reshape(truth.shape) - truth).square().sum(1).mean()))
        return RidgeCheck(
            label=kind.label,
            examples=examples,
            relative=tuple(curve.relative.tolist()),
            leave_one_out=tuple(curve.leave_one_out.tolist()),
            gcv=tuple(curve.gcv.tolist()),
            test=tuple(test),
        )

    def _layers(self) -> dict[str, float]:
        kernel = self._kernel(TRACE, self.task.x_train[:LAYER_EXAMPLES])
        parts = kernel.by_parameter(lambda name: by_module(name) or name)
        traces = {name: float(part.diagonal().double().sum()) for name, part in parts.items()}
        return {name: value / sum(traces.values()) for name, value in traces.items()}

    def _similarity(self, dense: dict[str, _Timed]) -> Similarity:
        timed = dense.get(TRACE.label)
        x = self.task.x_train[: self.compared]
        matrix = (
            DenseKernel(timed.matrix if timed else self._kernel(TRACE, x).dense(), symmetric=True).centred().dense()
        )
        scale = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
        cosines = (scale[:, None] * matrix * scale).double()
        y = self.task.y_train[: self.compared]
        same = y[:, None] == y
        apart = ~torch.eye(len(y), dtype=torch.bool)
        shown = y[:PICTURE_EXAMPLES].argsort(stable=True)
        return Similarity(
            cosines=cosines[shown][:, shown],
            classes=y[shown],
            within=float(cosines[same & apart].mean()),
            between=float(cosines[~same].mean()),
        )


@dataclass(frozen=True)
class _Timed:
    matrix: Tensor
    seconds: float


def _timed(kernel: TangentKernel) -> _Timed:
    start = time.perf_counter()
    matrix = kernel.dense()
    return _Timed(matrix, time.perf_counter() - start)


def _chunk(matrix: DenseKernel, outputs: int) -> int:
    """Test examples whose block with the training examples stays within `BLOCK_BYTES`, for either shape of kernel."""
    return max(1, BLOCK_BYTES // (8 * outputs * matrix.shape[1]))


def _best_ridge(kernel: DenseKernel, targets: Tensor) -> tuple[float, int]:
    """The best relative ridge by leave-one-out, from as many examples as decompose in reasonable time."""
    scalars = kernel.shape[0] // len(targets)
    examples = min(len(targets), max(2, RIDGE_ROWS // scalars))
    rows = slice(0, examples * scalars)
    part = DenseKernel(kernel.tile(rows, rows), symmetric=True)
    regression = KernelRegression.decompose(part, targets[:examples])
    return LeaveOneOut().choose(regression).value / regression.mean_diagonal, examples


def _relative_error(full: Tensor, reduced: Tensor) -> float:
    """||full - reduced (x) I_C||_F / ||full||_F for dense matrices, example-major."""
    outputs = full.shape[0] // reduced.shape[0]
    blocks = full.reshape(reduced.shape[0], outputs, reduced.shape[1], outputs)
    traces = blocks.diagonal(dim1=1, dim2=3).sum(2)
    # ||T - k (x) I||^2 = ||T||^2 - 2 <tr T, k> + C ||k||^2, without forming k (x) I.
    square = full.double().square().sum()
    cross = (traces.double() * reduced.double()).sum()
    error = square - 2 * cross + outputs * reduced.double().square().sum()
    return float((error.clamp_min(0) / square).sqrt())


def _evidence(
    cross: Tensor, fit: RegressionFit, predicted: Tensor, task: Task, *, examples: int = 6, terms: int = 5
) -> tuple[Evidence, ...]:
    """Half of the examples shown are wrong predictions, as far as there are so many."""
    wrong = (predicted != task.y_test).nonzero()[:, 0][: examples // 2]
    right = (predicted == task.y_test).nonzero()[:, 0][: examples - len(wrong)]
    found = []
    for test in [*wrong.tolist(), *right.tolist()]:
        spoken = cross[test].double() * fit.coefficients[:, predicted[test]]
        values, numbers = spoken.topk(min(terms, len(spoken)))
        found.append(
            Evidence(
                test=test,
                truth=int(task.y_test[test]),
                predicted=int(predicted[test]),
                train=tuple(numbers.tolist()),
                classes=tuple(task.y_train[numbers].tolist()),
                terms=tuple(values.tolist()),
            )
        )
    return tuple(found)


def _movements(before: dict[str, _Timed], after: dict[str, _Timed], outputs: int) -> tuple[Movement, ...]:
    return tuple(
        Movement(
            label=label,
            drift=drift(before[label].matrix, after[label].matrix),
            cka=cka(before[label].matrix, after[label].matrix, scalars=outputs if label == FULL.label else 1),
        )
        for label in before
    )
