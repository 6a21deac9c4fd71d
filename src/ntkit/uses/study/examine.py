"""The computing behind a study: one `_Bench` per state of the network."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ntkit.errors import FidelityWarning, InputError
from ntkit.kernel.base import DenseKernel
from ntkit.kernel.empirical import TangentKernel, by_module
from ntkit.solve.regression import KernelRegression, RegressionFit, regress
from ntkit.solve.ridge import LeaveOneOut, Relative
from ntkit.solve.spectrum import alignment, cka, drift, spectrum
from ntkit.tangent.linearize import linearize
from ntkit.uses.study.facts import (
    FULL,
    TRACE,
    Effort,
    Evidence,
    Fit,
    KernelFacts,
    Kind,
    Listener,
    Movement,
    RidgeCheck,
    Silence,
    Similarity,
    State,
    Study,
    Task,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_Cosine = TypeVar("_Cosine")

# One eigendecomposition of so many rows takes half a minute on two cores; a larger regression gets its ridge from as
# many of its examples, which changes the best relative ridge little.
RIDGE_ROWS = 2000
# However dear a full kernel is, so many examples are compared, and their regressions scored on so many.
FEWEST, FEWEST_TESTS = 8, 100
# A dense block between test and training examples is computed in pieces of at most so many bytes.
BLOCK_BYTES = 2**28
# Examples on which the kernel is split by layer, and images in the picture of similarities.
LAYER_EXAMPLES, PICTURE_EXAMPLES = 48, 120


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
        InputError: if there is no state, or too few examples are there or to be compared.
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
    if effort.compared < 2:
        raise InputError(f"a study compares kernels on two examples at least: got compared={effort.compared}")
    if task.outputs == 1:  # one number per pair is all there is: nothing is reduced
        effort = replace(effort, reduced=(), fitted=(), main=(FULL,))
    compared, compared_test = _affordable(next(iter(states.values())), task, effort)
    found, matrices = [], []
    for name, model in states.items():
        bench = _Bench(name, model, task, effort, compared, compared_test, listener)
        dense = bench.matrices()
        found.append(bench.examine(dense, generator))
        matrices.append(dense)
    return Study(
        parameters=linearize(next(iter(states.values()))).count,
        outputs=task.outputs,
        train_examples=len(task.x_train),
        test_examples=len(task.x_test),
        compared=compared,
        compared_test=compared_test,
        main=effort.main[0].label,
        score_name=task.score_name,
        states=tuple(found),
        movements=_movements(matrices[0], matrices[-1], task.outputs) if len(matrices) > 1 else (),
    )


def _affordable(model: nn.Module, task: Task, effort: Effort) -> tuple[int, int]:
    """How many examples are compared, and test examples for them, so that the full kernels stay affordable."""
    compared = max(2, min(effort.compared, effort.full_rows // task.outputs, len(task.x_train)))
    tangent = linearize(model)
    for _ in range(4):  # the operations per pair change a little with their number
        flops = TangentKernel(tangent, task.x_train[:compared]).plan().flops
        if flops <= effort.full_flops or compared <= FEWEST:
            break
        compared = max(FEWEST, int(0.95 * compared * math.sqrt(effort.full_flops / flops)))
    tests = len(task.x_test)
    flops = TangentKernel(tangent, task.x_test, task.x_train[:compared]).plan().flops
    return compared, min(tests, max(FEWEST_TESTS, int(tests * effort.full_flops / flops)))


@dataclass(frozen=True)
class _Bench:
    """One network on one task, with what every examination of it needs."""

    name: str
    model: nn.Module
    task: Task
    effort: Effort
    compared: int
    compared_test: int
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
        """Everything about this state; `dense` are its `matrices`."""
        task, main = self.task, self.effort.main[0]
        train_score, test_score = (
            task.score(linearize(self.model).outputs(x), y)
            for x, y in ((task.x_train, task.y_train), (task.x_test, task.y_test))
        )
        self.say("spectrum and fidelity of each kernel")
        seed = int(torch.randint(2**62, (1,), generator=generator))
        kernels = tuple(self._facts(kind, dense, seed) for kind in (FULL, *self.effort.reduced))
        fits = {
            (kind.label, examples): self._fitted(kind, examples, dense.get(kind.label))
            for kind, examples in self._regressions()
        }
        self.say("share of each layer")
        largest = fits[main.label, len(task.x_train)]
        return State(
            name=self.name,
            train_score=train_score,
            test_score=test_score,
            kernels=kernels,
            layers=self._layers(),
            fits=tuple(fitted.scores(task) for fitted in fits.values()),
            ridge_check=largest.ridge_check(task),
            similarity=self._similarity(dense),
            evidence=largest.evidence(task) if task.classification and not largest.fit.full else (),
        )

    def _regressions(self) -> list[tuple[Kind, int]]:
        """Kernel and number of examples of each fit."""
        small = [(kind, self.compared) for kind in (FULL, *self.effort.fitted)]
        return small + [(kind, len(self.task.x_train)) for kind in self.effort.main]

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
        sampled = min(self.effort.sampled, self.compared)
        generator = torch.Generator().manual_seed(seed)  # the same sample for every kernel: their errors compare
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FidelityWarning)  # a poor kernel is a finding here, not an accident
            fidelity = None if exact else kernel.fidelity(examples=sampled, generator=generator)
        return KernelFacts(
            label=kind.label,
            rows=len(matrix),
            seconds=dense[kind.label].seconds,
            mean_diagonal=float(matrix.diagonal().double().mean()),
            spectrum=spectrum(matrix),
            alignment=_if_defined(lambda: alignment(matrix, y)) if len(matrix) == len(y) else None,
            error=0.0 if exact else _relative_error(full, matrix),
            fidelity=fidelity,
        )

    def _fitted(self, kind: Kind, examples: int, known: _Timed | None) -> _Fitted:
        """A regression on the first training examples; `known` is the kernel of the compared ones."""
        x, y = self.task.x_train[:examples], self.task.targets(self.task.y_train[:examples])
        if known is None or examples != self.compared:
            self.say(f"{kind.label} kernel of {examples:,} examples")
            known = _timed(self._kernel(kind, x))
        self.say(f"{kind.label} regression on {examples:,} examples")
        start = time.perf_counter()
        searched, ridge = _search_ridge(known.matrix, y)
        whole = len(searched.targets) == len(y) * y.shape[1] // searched.targets.shape[1]
        _give_back_memory()
        fit = searched.fit(ridge) if whole else regress(DenseKernel(known.matrix, symmetric=True), y, ridge)
        scalars = len(known.matrix) // examples
        chunk = max(1, BLOCK_BYTES // (known.matrix.element_size() * scalars * len(known.matrix)))
        x_test = self.task.x_test if examples == len(self.task.x_train) else self.task.x_test[: self.compared_test]
        cross = torch.cat([self._kernel(kind, part, x).dense() for part in x_test.split(chunk)])
        _give_back_memory()
        predictions = fit.predict(cross)
        seconds = known.seconds + time.perf_counter() - start
        return _Fitted(kind.label, examples, y, searched, fit, cross, predictions, seconds)

    def _layers(self) -> dict[str, float]:
        kernel = self._kernel(TRACE, self.task.x_train[:LAYER_EXAMPLES])
        parts = kernel.by_parameter(lambda name: by_module(name) or name)
        traces = {name: float(part.diagonal().double().sum()) for name, part in parts.items()}
        return {name: value / sum(traces.values()) for name, value in traces.items()}

    def _similarity(self, dense: dict[str, _Timed]) -> Similarity | None:
        """None for a regression task, for examples of one class, and where all examples are alike."""
        y = self.task.y_train[: self.compared]
        if not self.task.classification or bool((y == y[0]).all()):
            return None
        timed = dense.get(TRACE.label)
        kernel = timed.matrix if timed else self._kernel(TRACE, self.task.x_train[: self.compared]).dense()
        matrix = DenseKernel(kernel, symmetric=True).centred().dense()
        if float(matrix.trace()) <= 100 * torch.finfo(matrix.dtype).eps * float(kernel.trace()):
            return None
        scale = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
        cosines = (scale[:, None] * matrix * scale).double()
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
    _give_back_memory()
    return _Timed(matrix, time.perf_counter() - start)


def _give_back_memory() -> None:
    """Let the C library return what it keeps of freed blocks: the next step asks for other sizes and cannot use them.

    Without it 10,000 examples take 1.5 GB more. glibc has the call, other libraries do without.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class _Fitted:
    """A regression with what it was made of.

    Attributes:
        label: of the kernel.
        examples: training examples.
        targets: (N, C).
        searched: the decomposition in which the ridge was found, of all or of the first training examples.
        fit: on all of them.
        cross: the kernel between test and training examples.
        predictions: on the test examples, (M, C), without the task's offset.
        seconds: all of it.
    """

    label: str
    examples: int
    targets: Tensor
    searched: KernelRegression
    fit: RegressionFit
    cross: Tensor
    predictions: Tensor
    seconds: float

    @property
    def searched_examples(self) -> int:
        rows = self.searched.matrix.size
        return rows // self.targets.shape[1] if self.fit.full else rows

    def scores(self, task: Task) -> Fit:
        y = task.y_train[: self.examples]
        return Fit(
            label=self.label,
            examples=self.examples,
            test_examples=len(self.predictions),
            rows=self.cross.shape[1],
            relative_ridge=self.fit.relative_ridge,
            ridge_from=self.searched_examples,
            train_score=task.score(self.targets - self.fit.train_residuals + task.offset, y),
            loo_score=task.score(self.targets - self.fit.loo_residuals + task.offset, y),
            test_score=task.score(self.predictions + task.offset, task.y_test[: len(self.predictions)]),
            loo_error=self.fit.leave_one_out,
            gcv=self.fit.gcv,
            seconds=self.seconds,
        )

    def ridge_check(self, task: Task) -> RidgeCheck:
        """Over the grid of ridges, on the examples on which the ridge was searched."""
        curve = self.searched.curve()
        cross = self.cross[:, : self.searched.matrix.size].double()
        truth = task.targets(task.y_test)
        test = []
        for ridge in curve.absolute.tolist():
            if not self.searched.is_positive_definite(ridge):
                test.append(math.inf)
                continue
            coefficients = self.searched.coefficients(ridge)
            predicted = (cross @ (coefficients.reshape(-1, 1) if self.fit.full else coefficients)).reshape(truth.shape)
            test.append(float((predicted - truth).square().sum(1).mean()))
        return RidgeCheck(
            label=self.label,
            examples=self.searched_examples,
            relative=tuple(curve.relative.tolist()),
            leave_one_out=tuple(curve.leave_one_out.tolist()),
            gcv=tuple(curve.gcv.tolist()),
            test=tuple(test),
        )

    def evidence(self, task: Task, *, shown: int = 6, terms: int = 5) -> tuple[Evidence, ...]:
        """Half of the test examples shown are wrong predictions, as far as there are so many."""
        predicted = self.predictions.argmax(1)
        wrong = (predicted != task.y_test).nonzero()[:, 0][: shown // 2]
        right = (predicted == task.y_test).nonzero()[:, 0][: shown - len(wrong)]
        average = self.cross.double().mean(0)
        found = []
        for test in [*wrong.tolist(), *right.tolist()]:
            alike = (self.cross[test].double() - average).clamp_min(0)
            spoken = alike * self.fit.coefficients[:, predicted[test]].clamp_min(0)
            values, numbers = spoken.topk(min(terms, int((spoken > 0).sum())))
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


def _search_ridge(matrix: Tensor, targets: Tensor) -> tuple[KernelRegression, Relative]:
    """The best ridge by leave-one-out, from as many of the first examples as decompose in reasonable time."""
    scalars = len(matrix) // len(targets)
    examples = min(len(targets), max(2, RIDGE_ROWS // scalars))
    rows = examples * scalars
    searched = KernelRegression.decompose(DenseKernel(matrix[:rows, :rows], symmetric=True), targets[:examples])
    return searched, Relative(LeaveOneOut().choose(searched).value / searched.mean_diagonal)


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


def _movements(before: dict[str, _Timed], after: dict[str, _Timed], outputs: int) -> tuple[Movement, ...]:
    return tuple(
        Movement(
            label=label,
            drift=drift(before[label].matrix, after[label].matrix),
            cka=_if_defined(
                partial(cka, before[label].matrix, after[label].matrix, scalars=outputs if label == FULL.label else 1)
            ),
        )
        for label in before
    )


def _if_defined(cosine: Callable[[], _Cosine]) -> _Cosine | None:
    """None where there is no such cosine: a network has collapsed and all its examples are alike, or their targets."""
    try:
        return cosine()
    except InputError:
        return None
