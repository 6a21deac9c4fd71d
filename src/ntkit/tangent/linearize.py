"""`linearize`: a network at fixed parameters, with its derivatives per example."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ntkit.errors import InputError, SlowRouteWarning
from ntkit.tangent import parameters as selecting
from ntkit.tangent.backward import run_backward
from ntkit.tangent.capture import Capture, Deviation, Source, plain_module
from ntkit.tangent.derivatives import Derivatives, Part, Term, assemble, leaf_rows, partition
from ntkit.tangent.directional import (
    backward_product,
    forward_mode_agrees,
    forward_product,
    pullback,
    try_innermost,
)
from ntkit.tangent.examples import Batch, Examples, outside_inference
from ntkit.tangent.generic import generic_rows
from ntkit.tangent.identity import architecture, describe
from ntkit.tangent.images import OVERWRITTEN
from ntkit.tangent.readout import Logits, Readout
from ntkit.tangent.trial import (
    Anatomy,
    check_alone,
    check_independence,
    check_scalars,
    disagreements,
    examine,
    run_model,
    true_products,
)
from ntkit.tangent.untouched import check_evaluation, fixed
from ntkit.tangent.workspace import keep_freed_memory

if TYPE_CHECKING:
    from ntkit.tangent.parameters import Choice, Selection


def linearize(model: nn.Module, *, readout: Readout | None = None, parameters: Choice | None = None) -> Tangent:
    """A network at its present parameters, ready to give its derivatives per example.

    Nothing is computed here, and the model is not changed now or later.

    Args:
        model: any module in evaluation mode.
        readout: which scalars of the output are differentiated; all logits by default.
        parameters: which parameters take part: None for all that require gradients, a predicate (name, parameter) ->
            bool, a name pattern such as "head.*", a submodule, a parameter, or an iterable of those.

    Raises:
        ModelError: if BatchNorm, Dropout or modules that ask for the mode are in training mode, or a parameter is not
            of a floating point type.
        InputError: if no parameter is selected.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"linearize expects a torch.nn.Module: got {type(model).__name__}")
    readout = Logits() if readout is None else readout
    if not isinstance(readout, Readout):
        raise InputError(f"readout must be a read-out such as ntkit.Logits(): got {readout!r}")
    model = plain_module(model)
    check_evaluation(model)
    return Tangent(model, readout, selecting.select(model, parameters))


def _rebuild(model: nn.Module, readout: Readout, names: tuple[str, ...]) -> Tangent:
    return linearize(model, readout=readout, parameters=lambda name, _: name in names)


@dataclass(frozen=True, eq=False)
class Tangent:
    """A network at fixed parameters with a read-out of K scalars per example.

    Made by `linearize`. Examples x are a tensor, a tuple or dict of tensors with a common first axis, or a `Dataset`.

    Attributes:
        model: the user's module.
        readout: what is differentiated.
        selection: the P parameters that take part.
    """

    model: nn.Module
    readout: Readout
    selection: Selection
    # What trials have found out, by the signature of their examples. A memo, not state: it only saves time.
    _anatomies: dict[tuple, Anatomy] = field(default_factory=dict, init=False, repr=False)
    # In which members examples differed where an example was the same alone and beside others.
    _seen: dict[tuple, frozenset[int]] = field(default_factory=dict, init=False, repr=False)
    _generic_parts: dict[tuple, tuple[Part, ...]] = field(default_factory=dict, init=False, repr=False)
    _forward_mode: dict[tuple, bool] = field(default_factory=dict, init=False, repr=False)
    _innermost: dict[tuple, tuple[int, bool]] = field(default_factory=dict, init=False, repr=False)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters that take part, in the order of the Jacobian's columns."""
        return self.selection.names

    @property
    def count(self) -> int:
        """Number of scalar parameters P."""
        return self.selection.count

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters, the widest where they are of several; kernels and products are of this type."""
        return self.selection.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters; examples are copied to it batch by batch."""
        return self.selection.tensors[0].device

    def fingerprint(self) -> str:
        """SHA-256 of the content of parameters and buffers, their selection and the read-out. Cost: reads P numbers."""
        return "-".join([selecting.fingerprint(self.model, self.selection), describe(self.readout)])

    def identity(self) -> dict[str, str]:
        """What the derivatives depend on beside the examples, in named parts that another process finds equal.

        Cost: reads P numbers.
        """
        return {
            "architecture": architecture(self.model),
            "parameters": selecting.fingerprint(self.model, self.selection),
            "readout": describe(self.readout),
            "precision": str(self.dtype).removeprefix("torch."),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process makes its own trial runs."""
        return _rebuild, (self.model, self.readout, self.selection.names)

    def to(self, device: torch.device | str) -> Tangent:
        """The same of a copy of the network on another device."""
        return _rebuild(copy.deepcopy(self.model).to(device), self.readout, self.selection.names)

    def examples(self, x: Any) -> Examples:
        """The data as examples that this tangent can read.

        Raises:
            InputError: if they are of the wrong kind, empty, or of different lengths.
        """
        wanted = self.readout.needs_targets
        return x if isinstance(x, Examples) and x.with_targets == wanted else Examples(x, with_targets=wanted)

    def check(self, x: Any) -> None:
        """Refuse a model whose examples influence each other. Cost: once forward passes of six, nothing after a trial.

        Raises:
            InputError: if the examples are wrong, or the model cannot take them.
            ModelError: if it mixes them.
        """
        examples = self.examples(x)
        self._check(examples, examples.batch([0], self.device))

    def _check(self, examples: Examples, some: Batch) -> None:
        key, members = (some.signature, self.device), examples.contrast[1]
        if key not in self._seen or members - self._seen[key]:
            with fixed(self.model):
                check_independence(self.model, self.selection, self.readout, examples, self.device)
            self._seen[key] = self._seen.get(key, frozenset()) | members

    def outputs(self, x: Any, *, batch: int = 256) -> Tensor:
        """The scalars themselves, (N, K). Cost: N forward passes."""
        examples = self.examples(x)
        self.check(examples)
        found: Tensor | None = None
        with fixed(self.model), torch.no_grad():
            for start in range(0, len(examples), batch):
                some = examples.batch(slice(start, start + batch), self.device)
                scalars = self.readout.scalars(run_model(self.model, self.selection, some), some.targets)
                check_scalars(scalars, some)
                if found is None:
                    # in one piece from the start: small results between the temporaries of a model keep those from
                    # being given back, a GB of them for a million examples
                    found = scalars.new_empty(len(examples), scalars.shape[1])
                if scalars.shape[1] != found.shape[1]:
                    raise InputError(
                        f"the first examples have {found.shape[1]} scalars each, those from {start} on "
                        f"{scalars.shape[1]}: a kernel needs as many of each"
                    )
                found[start : start + some.size] = scalars
        assert found is not None  # there is at least one example
        return found

    def anatomy(self, x: Any) -> Anatomy:
        """What the trial run on the first examples finds: the script, the scalars K, the sizes of all uses."""
        examples = self.examples(x)
        return self._anatomy(examples, examples.batch([0], self.device))

    def _anatomy(self, examples: Examples, some: Batch) -> Anatomy:
        key = (some.signature, self.selection.tensors[0].device)
        if key not in self._anatomies:
            with fixed(self.model):
                anatomy = examine(self.model, self.selection, self.readout, examples, self.device)
            announce(anatomy)
            self._anatomies[key] = anatomy
            if anatomy.first is not None:
                self._seen[key] = self._seen.get(key, frozenset()) | examples.contrast[1]
        elif self._anatomies[key].first is not None:  # what is all generic is computed one example at a time
            self._check(examples, some)
        return self._anatomies[key]

    def parts(self, x: Any) -> tuple[Part, ...]:
        """The parts of the derivatives of examples that take the path of the first one."""
        examples = self.examples(x)
        some = examples.batch([0], self.device)
        anatomy = self._anatomy(examples, some)
        if not anatomy.generic:
            return tuple(anatomy.parts)
        key = some.signature
        if key not in self._generic_parts:  # those of the generic route are not among the trial's
            self._generic_parts[key] = tuple(self.derivatives(examples, [0]).factors)
        return self._generic_parts[key]

    def count_flops(self, x: Any) -> tuple[int, int]:
        """FLOPs of one example's forward pass and of one scalar's backward pass, counted by torch on two examples."""
        examples = self.examples(x)
        some = examples.batch([i % len(examples) for i in range(2)], self.device)
        anatomy = self._anatomy(examples, some)
        with fixed(self.model):
            with FlopCounterMode(display=False) as forward, torch.no_grad():
                output = some.call(self.model)
                self.readout.scalars(output, some.targets)
            if not anatomy.script:
                return forward.get_total_flops() // some.size, 2 * forward.get_total_flops() // some.size
            capture = Capture(self.selection, anatomy.script, some.size)
            with capture:
                output = some.call(self.model)
            scalars = self.readout.scalars(output, some.targets)
            with FlopCounterMode(display=False) as backward:
                run_backward(scalars[:, :1], capture.records)
        return forward.get_total_flops() // some.size, backward.get_total_flops() // some.size

    def derivatives(self, x: Any, index: slice | Sequence[int] = slice(None), *, generic: bool = False) -> Derivatives:
        """All per-example gradients of some examples at once, in factored form.

        Args:
            x: the examples.
            index: which of them.
            generic: take the generic route for all parameters, whatever the trial found.

        Cost: one forward and K backward passes. Memory: the inputs and K cotangents of every use, n examples each.

        Raises:
            ModelError: if an output or gradient is NaN or infinite, or the model mixes examples.
            InputError: if the model cannot take the examples.
        """
        outputs, terms, parts = self._terms(self.examples(x), index, generic)
        with torch.no_grad():
            return assemble(outputs, terms, parts)

    def _terms(
        self, examples: Examples, index: slice | Sequence[int], everything: bool = False
    ) -> tuple[Tensor, list[Term], list[Part]]:
        some = examples.batch(index, self.device)
        anatomy = self._anatomy(examples, some)
        parts = anatomy.parts
        with fixed(self.model):
            try:
                outputs, terms = (None, []) if everything else self._captured(anatomy, some)
                generic = list(self.selection.names if everything else anatomy.generic)
            except Deviation as deviation:
                reason = f"this batch takes another path through the model than the first examples: {deviation}"
                announce(Anatomy([], dict.fromkeys(self.selection.names, reason), {}, anatomy.scalars))
                outputs, terms, generic = None, [], list(self.selection.names)
            if generic:
                numbers = range(*index.indices(len(examples))) if isinstance(index, slice) else index
                alone, rows = generic_rows(
                    self.model, self.selection, self.readout, examples, numbers, generic, self.device
                )
                outputs = alone if outputs is None else outputs
                leaves = {n: t.detach() for n, t in zip(self.selection.names, self.selection.tensors, strict=True)}
                terms = terms + [(Source(leaves[name], {name: leaves[name]}), rows[name]) for name in generic]
        assert outputs is not None
        if generic or len(terms) != sum(len(part.terms) for part in parts):
            parts = partition(terms)
        return outputs, terms, parts

    def _captured(self, anatomy: Anatomy, some: Batch) -> tuple[Tensor | None, list[Term]]:
        if set(anatomy.generic) >= set(self.selection.names):
            return None, []
        if self.device.type == "cpu":
            keep_freed_memory()
        capture = Capture(self.selection, anatomy.script, some.size)
        with capture:
            output = run_model(self.model, self.selection, some)
        if capture.position != len(anatomy.script):
            raise Deviation(f"{len(anatomy.script) - capture.position} operations with parameters were left out")
        if capture.order.overwritten:
            raise Deviation(OVERWRITTEN)
        scalars = self.readout.scalars(output, some.targets)
        check_scalars(scalars, some)
        if anatomy.first is not None and not anatomy.expects(some, scalars.detach()):
            # it is mixed with others, or the parameters have changed since
            check_alone(self.model, self.selection, self.readout, anatomy.first[0], scalars[:1].detach())
        for record in capture.records:
            record.check_inputs()
        run_backward(scalars, capture.records)
        terms = []
        with torch.no_grad():
            while capture.records:  # emptied as it is read, so that each cotangent is freed once it has been used
                record = capture.records.pop(0)
                for source, factor in record.factors(some.size):
                    if not set(source.leaves) & set(anatomy.generic):
                        terms.append((source, factor))
        if anatomy.reorders:
            self._check_order(some, terms, scalars.shape, anatomy)
        return scalars.detach(), terms

    def _check_order(self, some: Batch, terms: list[Term], shape: torch.Size, anatomy: Anatomy) -> None:
        """Compare the rows under random weights with one plain backward pass over the whole batch.

        Raises:
            Deviation: if they belong to other examples than the script says.
        """
        weights = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(some.size)) - 0.5
        with self.selection.differentiable():
            scalars = self.readout.scalars(run_model(self.model, self.selection, some), some.targets)
            weights = weights.to(scalars)
            true = true_products(self.selection, (scalars * weights).sum())
        wrong = disagreements(self.selection, true, terms, weights)
        if set(wrong) - set(anatomy.generic):
            raise Deviation("it sorts or picks examples by their values")

    def jacobian(self, x: Any) -> Tensor:
        """The rows themselves, (N*K, P), example-major. Memory: N*K*P numbers; meant for small P or few examples."""
        outputs, terms, _ = self._terms(self.examples(x), slice(None))
        count = outputs.numel()
        columns = []
        for name, parameter in zip(self.selection.names, self.selection.tensors, strict=True):
            with torch.no_grad():
                rows = leaf_rows(name, terms)
            columns.append(outputs.new_zeros(count, parameter.numel()) if rows is None else rows.reshape(count, -1))
        return torch.cat(columns, 1).detach()

    def vjp(self, x: Any, cotangents: Tensor, *, batch: int = 256) -> Tensor:
        """J^T u: the gradient of sum_nk u[n, k] f_k(x_n), shape (P,). Cost: one forward and one backward pass.

        Raises:
            InputError: if `cotangents` is not (N, K).
        """
        examples, how = self.examples(x), (self.model, self.selection, self.readout)
        self.check(examples)
        with fixed(self.model):
            total = torch.zeros(self.count, dtype=self.dtype, device=self.device)
            key = self._key(examples)
            if key not in self._innermost:
                self._innermost[key] = try_innermost(*how, examples.batch(slice(0, 2), self.device))
            scalars, innermost = self._innermost[key]
            if cotangents.shape != (len(examples), scalars):
                expected = (len(examples), scalars)
                raise InputError(f"cotangents have shape {tuple(cotangents.shape)}, expected {expected}")
            for start in range(0, len(examples), batch):
                some = examples.batch(slice(start, start + batch), self.device)
                weights = outside_inference(cotangents[start : start + some.size].to(self.device))
                total += pullback(*how, some, weights, innermost=innermost)
        return total

    def jvp(self, x: Any, tangent: Tensor, *, batch: int = 256) -> Tensor:
        """J v: the change of the scalars along a direction in parameter space, (N, K).

        By forward mode where the model has it, tried on two examples first; else by two backward passes. Cost: about
        three forward passes of every example, or five.

        Raises:
            InputError: if `tangent` is not (P,).
            NotImplementedError: if an operation of the model can be differentiated only once.
        """
        if tangent.shape != (self.count,):
            raise InputError(f"a direction in parameter space has shape ({self.count},): got {tuple(tangent.shape)}")
        directions = self.selection.split(outside_inference(tangent.to(self.device, self.dtype)))
        examples, how = self.examples(x), (self.model, self.selection, self.readout)
        self.check(examples)
        parts = []
        with fixed(self.model):
            key = self._key(examples)
            if key not in self._forward_mode:
                self._forward_mode[key] = forward_mode_agrees(*how, examples.batch(slice(0, 2), self.device))
            product = forward_product if self._forward_mode[key] else backward_product
            for start in range(0, len(examples), batch):
                some = examples.batch(slice(start, start + batch), self.device)
                parts.append(product(*how, some, directions))
        return torch.cat(parts)

    def _key(self, examples: Examples) -> tuple:
        """What tells examples apart that may take different ways."""
        return examples.batch([0], self.device).signature, self.device, min(len(examples), 2)


def announce(anatomy: Anatomy) -> None:
    """Say once which parameters take a slow route, and why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in anatomy.generic.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"parameters {', '.join(names[:3])}{more} take the generic route, one backward pass per example and scalar "
            f"(exact, slow): {reason}",
            SlowRouteWarning,
            stacklevel=4,
        )
    for operation, parameter in anatomy.slow.items():
        warnings.warn(
            f"parameter {parameter!r} meets {operation}, which has no rule: its gradients are computed by "
            "differentiating that operation example by example (exact, slower than a rule)",
            SlowRouteWarning,
            stacklevel=4,
        )
