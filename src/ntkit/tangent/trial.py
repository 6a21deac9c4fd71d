"""The trial: two or three tiny runs that find out how a model works, and check that what was found is true.

A plain run on one example (or two, for models that treat a batch of one in their own way) logs the shapes of all
operations and gives, by one ordinary backward pass, the true gradient of a random combination of the outputs. A
captured run on one more example learns the script: an operation whose output grows with the number of examples is a
use, any other that touches a parameter is derived. Then the guard: outputs of the common examples must agree, and the
gradient put together from the captured factors must be the true one. Whatever the capture cannot see (code that hides
from torch's overrides) is found here, and goes the generic way; whatever makes examples depend on each other is an
error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkit.errors import InputError, ModelError, NtkitError
from ntkit.tangent.backward import run_backward
from ntkit.tangent.capture import (
    Capture,
    Deviation,
    Record,
    Source,
    Step,
    Watch,
    makes_no_tensor,
    operation_name,
    touches,
    writes_in_place,
)
from ntkit.tangent.derivatives import Part, partition
from ntkit.tangent.factors import as_matrix
from ntkit.tangent.generic import dense
from ntkit.tangent.images import OVERWRITTEN
from ntkit.tangent.layout import ExampleAxis, NoExampleAxis, grows, locate
from ntkit.tangent.rules.local import local
from ntkit.tangent.rules.registry import RULES
from ntkit.tangent.structure import Rebuild, flatten

if TYPE_CHECKING:
    from torch import nn

    from ntkit.tangent.examples import Batch, Examples
    from ntkit.tangent.factors import Factor
    from ntkit.tangent.parameters import Selection
    from ntkit.tangent.readout import Readout
    from ntkit.tangent.work import OuterWork


@dataclass(frozen=True)
class PartSize:
    """One parameter's factor, for one example.

    Attributes:
        name: the parameter.
        row: entries of one row, as far as they meet another's.
        held: bytes of the factor for one example, with K scalars.
        work: positions and features, where it is a sum of outer products.
    """

    name: str
    row: int
    held: int
    work: OuterWork | None


@dataclass(frozen=True)
class Anatomy:
    """What a trial found out about a model.

    Attributes:
        script: every operation that touches a selected parameter, in order.
        generic: the parameters that must take the generic route, and why.
        slow: operations without a rule that take the local route, and a parameter that meets each.
        scalars: K.
        reorders: whether examples are picked or sorted by their values before a parameter is used, so that a batch's
            order must be checked and cannot be known from the trial.
        activations: bytes that a forward pass of one example keeps.
        cotangents: bytes of the cotangents of all uses, for one example and one scalar.
        sizes: of every parameter's factor.
        parts: how the factors of a batch belong together.
        first: the first example and its scalars in the trial, alone or beside one other; None where all is generic.
    """

    script: list[Step]
    generic: dict[str, str]
    slow: dict[str, str]
    scalars: int
    reorders: bool = False
    activations: int = 0
    cotangents: int = 0
    sizes: list[PartSize] = field(default_factory=list, repr=False)
    parts: list[Part] = field(default_factory=list, repr=False)
    first: tuple[Batch, Tensor] | None = field(default=None, repr=False)

    def expects(self, some: Batch, scalars: Tensor) -> bool:
        """Whether a batch that begins with the trial's first example has its scalars; any other is as expected.

        A batch has more company than a trial, and other targets. Cost: one comparison of an example.
        """
        if self.first is None or scalars.shape[1] != self.scalars or not some.begins_with(self.first[0]):
            return True
        allowed = tolerance(scalars.dtype) * (float(scalars.abs().max()) or 1.0)
        return float((scalars[:1] - self.first[1]).abs().max()) <= allowed


def part_sizes(factors: Sequence[tuple[Source, Factor]], scalars: int) -> list[PartSize]:
    """Sizes for one example and all K scalars, from the factors of some examples and one scalar."""
    found = []
    for source, factor in factors:
        fixed = factor.nbytes - factor.scalar_nbytes
        held = (fixed + scalars * factor.scalar_nbytes) // factor.examples
        work = None if factor.work is None else replace(factor.work, examples=1, scalars=scalars)
        found.append(PartSize(next(iter(source.leaves)), factor.met_entries, held, work))
    return found


def tolerance(dtype: torch.dtype, parameters: Iterable[Tensor] = ()) -> float:
    """Relative difference below which two ways of computing the same thing agree: 10 sqrt(eps), a tenth at most.

    Args:
        dtype: of what is compared.
        parameters: that it was computed with: a float64 head on a float32 network has the rounding of float32.
    """
    kinds = {dtype, *(p.dtype for p in parameters if p.is_floating_point())}
    return min(10 * max(torch.finfo(kind).eps for kind in kinds) ** 0.5, 0.1)


def examine(
    model: nn.Module, selection: Selection, readout: Readout, examples: Examples, device: torch.device
) -> Anatomy:
    """Learn the script of `model` on the first few examples, and check it.

    Raises:
        ModelError: if the model mixes examples or is not deterministic.
        InputError: if it cannot be run on the examples.
    """
    try:
        anatomy = _tried(model, selection, readout, examples, device, 1)
        if not anatomy.generic:
            return anatomy
    except (ModelError, InputError):
        pass  # some models treat a batch of one in their own way; if this one does not, the same comes again
    return _tried(model, selection, readout, examples, device, 2)


def _tried(
    model: nn.Module, selection: Selection, readout: Readout, examples: Examples, device: torch.device, count: int
) -> Anatomy:
    """One trial on `count` examples and on one more."""
    numbers = examples.for_a_trial(count + 1)
    more, few = examples.batch(numbers, device), examples.batch(numbers[:count], device)
    plain = _plain_run(model, selection, readout, few)
    try:
        learned = _learn(model, selection, readout, few, more, plain)
    except (_Hidden, Deviation) as hidden:
        return Anatomy([], dict.fromkeys(selection.names, str(hidden)), {}, plain.scalars.shape[1])
    check_alone(model, selection, readout, examples.batch(numbers[1:2], device), learned.scalars[1:2].detach())
    return _guarded(model, selection, readout, examples.batch([0], device), plain, learned)


# --- the plain run ----------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    function: Callable
    arguments: list[tuple[int, ...] | None]
    outputs: list[tuple[int, ...]]
    operands: list[Tensor] = field(default_factory=list)  # copies where the examples may be merged with other axes
    results: list[Tensor] = field(default_factory=list)


class _Log(Watch):
    """Shapes of all tensors of all operations, and the values of uses that will be asked where the examples are."""

    def __init__(self, selection: Selection, few: int) -> None:
        super().__init__()
        self.few = few
        self.calls: list[_Call] = []
        self.memory: dict[int, int] = {}
        self._of_parameters: dict[int, Tensor] = {id(tensor): tensor for tensor in selection.tensors}

    def see(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func in (F.embedding, F.embedding_bag):
            refuse_renormalization(func, args, kwargs)
        operands = [a for a in flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        call = _Call(func, [tuple(a.shape) for a in operands], [])
        self.calls.append(call)
        made = [id(a) in self._of_parameters for a in operands]
        if (
            any(made)
            and not all(made)
            and any(self._may_be_merged(a) for a, m in zip(operands, made, strict=True) if not m)
        ):
            call.operands = [a if m else a.detach().clone() for a, m in zip(operands, made, strict=True)]
        result = func(*args, **kwargs)
        tensors = [o for o in flatten(result)[0] if isinstance(o, Tensor)]
        if made and all(made):
            self._of_parameters.update((id(o), o) for o in tensors)
        if call.operands:
            call.results = [o.detach().clone() for o in (operands[:1] if writes_in_place(func) else tensors)]
        call.outputs = [tuple(o.shape) for o in tensors]
        for o in tensors:  # memory that is used again has the same address: what is left is what was alive together
            with suppress(NotImplementedError, RuntimeError):  # tensors inside vmap have no memory of their own
                place = o.untyped_storage().data_ptr()
                self.memory[place] = max(self.memory.get(place, 0), o.nbytes)
        return result

    def _may_be_merged(self, tensor: Tensor) -> bool:
        """Whether the examples have no axis of their own; where one is taken for it that is not, see `_witnessed`."""
        return self.few not in tensor.shape


def refuse_renormalization(func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Embeddings with max_norm rewrite their weight in every forward pass; seen before that happens.

    Raises:
        ModelError: if this call would.
    """
    place = 3 if func is F.embedding else 4
    if kwargs.get("max_norm", args[place] if len(args) > place else None) is not None:
        raise ModelError(
            f"{operation_name(func)} with max_norm rewrites its weight in every forward pass, so the model is not a "
            "fixed function: set max_norm=None (and renormalize the weight once, if it should be)"
        )


@dataclass
class _Plain:
    calls: list[_Call]
    scalars: Tensor  # examples, K
    weights: Tensor  # examples, K
    products: dict[str, Tensor]  # of every selected parameter's gradient with its probe
    activations: int


def _plain_run(model: nn.Module, selection: Selection, readout: Readout, batch: Batch) -> _Plain:
    log = _Log(selection, batch.size)
    with selection.differentiable():
        with log:
            output = run_model(model, selection, batch)
        scalars = readout.scalars(output, batch.targets)
        check_scalars(scalars, batch)
        weights = torch.empty(scalars.shape, dtype=torch.float64).uniform_(
            0.5, 1.5, generator=torch.Generator().manual_seed(0)
        )
        weights = weights.to(scalars)
        weighted = (scalars * weights).sum()
        if not weighted.requires_grad:
            raise ModelError(
                "the outputs depend on none of the selected parameters: either others were meant (parameters=...), or "
                "the model's forward runs without gradients (torch.no_grad, inference_mode, detach)"
            )
        products = true_products(selection, weighted)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    activations = sum(size for place, size in log.memory.items() if place not in own) // batch.size
    return _Plain(log.calls, scalars.detach(), weights, products, activations)


def run_model(model: Callable[..., Any], selection: Selection, batch: Batch) -> Any:
    """The model's output, with torch's complaint about types or devices in words.

    Raises:
        InputError: if the examples' type or device is not the model's, or the model fails on them.
        NtkitError: as the model's own code raises it.
    """
    try:
        return batch.call(model)
    except NtkitError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        parameter = selection.tensors[0]
        for t in batch.tensors():
            if t.is_floating_point() and t.dtype != parameter.dtype:
                raise InputError(
                    f"the model's parameters are {parameter.dtype}, the examples {t.dtype}: convert one of them, for "
                    f"example x.to({parameter.dtype})"
                ) from error
            if t.device != parameter.device:
                raise InputError(
                    f"the model is on {parameter.device}, the examples on {t.device}: move one of them"
                ) from error
        shapes = [tuple(t.shape) for t in batch.tensors()]
        raise InputError(f"the model fails on examples of shapes {shapes}: {type(error).__name__}: {error}") from error


def check_scalars(scalars: Tensor, batch: Batch) -> None:
    """The read-out gives finite (N, K) scalars.

    Raises:
        InputError: if their number is not that of the examples.
        ModelError: if one is NaN or infinite.
    """
    if scalars.ndim != 2 or scalars.shape[0] != batch.size:
        raise InputError(
            f"the read-out of {batch.size} examples has shape {tuple(scalars.shape)}, expected ({batch.size}, K): the "
            "model must give one row per example; say which scalars are meant with select=..."
        )
    if not bool(scalars.isfinite().all()):
        bad = int((~scalars.isfinite().all(1)).nonzero()[0])
        raise ModelError(
            f"the model's output is NaN or infinite (first at example {bad} of a batch): its tangent kernel is not "
            "defined. Check the inputs, the weights and the precision"
        )


# --- the captured run -------------------------------------------------------------------------------------------------


class _Hidden(NtkitError):
    """The model's operations cannot be followed; everything takes the generic route."""


def _reordering() -> frozenset[Any]:
    names = """
        __getitem__ __setitem__ index_select gather take take_along_dim masked_select masked_scatter
        index_add index_copy index_put scatter scatter_add scatter_reduce sort msort topk
    """
    owners = (torch, Tensor)
    forms = [form for name in names.split() for form in (name, f"{name}_")]
    return frozenset(getattr(owner, form) for owner in owners for form in forms if hasattr(owner, form))


# Operations that can put examples into an order that depends on their values. Parameters used behind one of them are
# checked in every batch, not only in the trial.
_REORDERING = _reordering()


class _Learner(Capture):
    """Writes the script while it runs, by comparing shapes with the plain run's log."""

    def __init__(self, selection: Selection, calls: list[_Call], few: int) -> None:
        super().__init__(selection, [], few + 1)
        self.few = few
        self.calls = calls
        self.count = 0
        self.called: list[_Call] = []  # by step
        self.outputs: list[list[Tensor]] = []
        self.opaque: dict[str, str] = {}
        self.reordered_at = sys.maxsize

    def see(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.count += 1
        result = super().see(func, args, kwargs)
        if func in _REORDERING and self.count <= len(self.calls):
            self._note_reordering(self.calls[self.count - 1], args, kwargs, result)
        return result

    def _note_reordering(self, call: _Call, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Activations that are picked by an index of tensors need not stand in the order of the examples."""
        tensors = [a for a in flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        moving = any(few != tuple(t.shape) for few, t in zip(call.arguments, tensors, strict=False))
        floats = any(isinstance(r, Tensor) and r.is_floating_point() for r in (*flatten(result)[0], *args[:1]))
        if moving and floats and (len(tensors) > 1 or not isinstance(result, Tensor)):
            self.reordered_at = min(self.reordered_at, len(self.script))

    def step(self, func: Callable, leaves: list[Any], rebuild: Rebuild, touched: dict[int, Source]) -> Step | None:
        if makes_no_tensor(func):
            return None
        if self.count > len(self.calls) or self.calls[self.count - 1].function != func:
            raise _Hidden(f"the operations of the model depend on the number of examples (at {operation_name(func)})")
        call = self.calls[self.count - 1]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        try:
            operands = [_provisional(few, t, self.few) for few, t in zip(call.arguments, tensors, strict=True)]
            outputs = self._outputs(func, leaves, rebuild, touched, call, operands)
        except NoExampleAxis as problem:
            for source in touched.values():
                for name in source.leaves:
                    self.opaque.setdefault(
                        name, f"{operation_name(func)} on tensors without an example axis: {problem}"
                    )
            step = Step(len(self.script), func, touches(touched), True, opaque=True)
        else:
            is_use = any(axis is not None for axis in outputs)
            step = Step(len(self.script), func, touches(touched), is_use)
            if is_use:
                step = replace(step, operands=tuple(operands), outputs=tuple(outputs))
        self.script.append(step)
        self.called.append(call)
        return step

    def _outputs(
        self,
        func: Callable,
        leaves: list[Any],
        rebuild: Rebuild,
        touched: dict[int, Source],
        call: _Call,
        operands: list[ExampleAxis | None],
    ) -> list[ExampleAxis | None]:
        if writes_in_place(func):
            return operands[:1]
        moving = next((axis for axis in operands if axis is not None), None)
        if RULES.get(func, local) is not local and len(call.outputs) == 1 and moving is not None:
            # operations with rules keep the examples where they are; `Capture` checks the output that follows
            shape = call.outputs[0]
            if moving.axis < len(shape) and shape[moving.axis] == self.few * moving.after:
                return [moving]
        filled = [leaf.detach() if i in touched else leaf for i, leaf in enumerate(leaves)]
        arguments, keywords = rebuild(filled)
        with torch.no_grad():
            results = [out for out in flatten(func(*arguments, **keywords))[0] if isinstance(out, Tensor)]
        if len(results) != len(call.outputs):
            raise NoExampleAxis(f"{len(call.outputs)} outputs for {self.few} examples, {len(results)} for one more")
        return [_provisional(few, out, self.few) for few, out in zip(call.outputs, results, strict=True)]

    def witness(self, record: Record, outputs: list[Tensor]) -> None:
        self.outputs.append([out.detach().clone() if _is_merged(record.step) else out for out in outputs])


class _Witness(Capture):
    """Follows the script on fewer examples and keeps the outputs of uses whose example axis is merged with others."""

    def __init__(self, selection: Selection, script: list[Step], few: int) -> None:
        super().__init__(selection, script, few)
        self.outputs: list[list[Tensor]] = []

    def witness(self, record: Record, outputs: list[Tensor]) -> None:
        self.outputs.append([out.detach().clone() if _is_merged(record.step) else out for out in outputs])


def _provisional(few: tuple[int, ...] | None, more: Tensor, count: int) -> ExampleAxis | None:
    found = grows(few or (), tuple(more.shape), count)
    return None if found is None else ExampleAxis(found[0], 1, found[1])


def _is_merged(step: Step) -> bool:
    return any(axis is not None and axis.after > 1 for axis in (*step.operands, *step.outputs))


@dataclass
class _Learned:
    script: list[Step]
    records: list[Record]
    opaque: dict[str, str]
    reorders: bool
    scalars: Tensor


def _learn(
    model: nn.Module, selection: Selection, readout: Readout, few: Batch, more: Batch, plain: _Plain
) -> _Learned:
    learner = _Learner(selection, plain.calls, few.size)
    try:
        with learner:
            output = more.call(model)
    except (_Hidden, Deviation, ModelError):
        raise
    except Exception as error:
        raise _Hidden(
            f"the model cannot be run with its operations watched ({type(error).__name__}: {error})"
        ) from error
    if learner.order.overwritten:
        raise _Hidden(OVERWRITTEN)
    scalars = readout.scalars(output, more.targets)
    check_scalars(scalars, more)
    script, records = learner.script, learner.records
    merged = [step.index for step in script if _is_merged(step)]
    if merged:
        try:
            final = _settle(records, learner.outputs, _witnessed(model, selection, few, learner, merged), few.size)
        except (Deviation, NoExampleAxis) as error:
            raise _Hidden(f"the model's operations change from run to run: {error}") from error
        for record in records:
            record.step = final.get(record.step.index, record.step)
        script = [final.get(step.index, step) for step in script]
    reorders = any(step.is_use for step in script[learner.reordered_at :])
    return _Learned(script, records, learner.opaque, reorders, scalars)


_Seen = tuple[Sequence[Tensor], Sequence[Tensor]]  # operands and outputs of a use


def _witnessed(
    model: nn.Module, selection: Selection, few: Batch, learner: _Learner, merged: Sequence[int]
) -> dict[int, _Seen]:
    """What uses saw on fewer examples, by place in the script: from the plain run if it kept all, else from another.

    The plain run keeps none whose weights are made of more than parameters, or in which an axis is as long as there are
    examples.

    Raises:
        Deviation: if the other takes another path.
    """
    kept: dict[int, _Seen] = {
        index: (call.operands, call.results) for index in merged if (call := learner.called[index]).operands
    }
    if len(kept) == len(merged):
        return kept
    witness = _Witness(selection, learner.script, few.size)
    with witness:
        few.call(model)
    if len(witness.records) != sum(step.is_use and not step.opaque for step in learner.script):
        raise Deviation("some are left out")
    return {
        record.step.index: ([leaf for leaf in record.leaves if isinstance(leaf, Tensor)], outputs)
        for record, outputs in zip(witness.records, witness.outputs, strict=True)
    }


def _settle(records: list[Record], outputs: list[list[Tensor]], fewer: dict[int, _Seen], count: int) -> dict[int, Step]:
    """The true axes of every use with merged axes, by place in the script, from the values of the two runs."""
    final: dict[int, Step] = {}
    for record, outs in zip(records, outputs, strict=True):
        step = record.step
        if _is_merged(step):
            mine = [leaf for leaf in record.leaves if isinstance(leaf, Tensor)]
            theirs, other_outs = fewer[step.index]
            operands = tuple(locate(few, more, count) for few, more in zip(theirs, mine, strict=True))
            places = tuple(locate(few, more, count) for few, more in zip(other_outs, outs, strict=True))
            final[step.index] = replace(step, operands=operands, outputs=places)
    return final


# --- the guard --------------------------------------------------------------------------------------------------------


def _guarded(
    model: nn.Module, selection: Selection, readout: Readout, alone: Batch, plain: _Plain, learned: _Learned
) -> Anatomy:
    few = len(plain.scalars)
    allowed = tolerance(plain.scalars.dtype, model.parameters())
    scale = float(plain.scalars.abs().max()) or 1.0
    check_scalars_agree(
        plain.scalars, learned.scalars[:few].detach(), allowed * scale, f"in a batch of {few} and of {few + 1}"
    )
    combined = (learned.scalars[:few] * plain.weights).sum(1, keepdim=True)
    padded = torch.cat([combined, combined.new_zeros(1, 1)])
    generic = dict(learned.opaque)
    factors: list[tuple[Source, Factor]] = []
    wrong: dict[str, str] = {}
    slow: dict[str, str] = {}
    try:
        for record in learned.records:
            record.check_inputs()
        run_backward(padded, learned.records)
        with torch.no_grad():
            for record in learned.records:
                contributions = record.factors(few + 1)
                factors += contributions
                if contributions and not record.step.has_rule:
                    slow.setdefault(record.step.name, next(iter(contributions[0][0].leaves)))
        # of the common examples: what belongs to them and has got to the others is missed
        own = [(source, factor.narrow(0, few)) for source, factor in factors]
        wrong = disagreements(selection, plain.products, own, torch.ones_like(combined))
    except (ModelError, InputError):
        raise
    except Deviation as error:
        generic = dict.fromkeys(selection.names, str(error))
    except Exception as error:
        generic = dict.fromkeys(selection.names, f"its gradients cannot be captured ({type(error).__name__}: {error})")
    for name, reason in wrong.items():
        generic.setdefault(name, reason)
    if generic:
        _spread_reasons(generic, [source for source, _ in factors])
        check_alone(model, selection, readout, alone, plain.scalars[:1], must_run=True)
    kept = [(source, factor) for source, factor in factors if not set(source.leaves) & set(generic)]
    cotangents = sum(g.nbytes for record in learned.records for g in record.cotangents if g is not None)
    return Anatomy(
        learned.script,
        generic,
        slow,
        plain.scalars.shape[1],
        learned.reorders,
        plain.activations,
        cotangents // (few + 1),
        part_sizes(kept, plain.scalars.shape[1]),
        partition(kept),
        (alone, plain.scalars[:1]),
    )


def probes(selection: Selection) -> dict[str, Tensor]:
    """For each parameter, seen as a matrix, a random vector to multiply it by: wrong gradients give wrong products.

    Those of equal width have the same one, and narrower ones its beginning: each parameter is looked at by itself.
    """
    tensors = dict(zip(selection.names, selection.tensors, strict=True))
    widths = {name: as_matrix(tensor).shape[1] for name, tensor in tensors.items()}
    vector = torch.randn(max(widths.values()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = torch.ones(1)
    return {name: (vector[:width] if (width := widths[name]) > 1 else one).to(t) for name, t in tensors.items()}


def true_products(selection: Selection, number: Tensor) -> dict[str, Tensor]:
    """The gradients of a number as torch has them, each times its probe; parameters without one are left out.

    No more than one gradient is held: each is multiplied as soon as it is there, and given up.
    """
    found: dict[str, Tensor] = {}
    if not number.requires_grad:
        return found
    vectors = probes(selection)

    def keep(name: str, gradient: Tensor) -> Tensor:
        found[name] = as_matrix(dense(gradient)) @ vectors[name]
        return torch.zeros_like(gradient) if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

    hooks = [
        tensor.register_hook(partial(keep, name))
        for name, tensor in zip(selection.names, selection.tensors, strict=True)
    ]
    try:
        torch.autograd.grad(number, selection.tensors, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: product.detach() for name, product in found.items()}


def captured_products(
    factors: Sequence[tuple[Source, Factor]], weights: Tensor, vectors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """sum_nk weights[n, k] d f_k(x_n) / d parameter, put together from factors, times each parameter's vector."""
    found: dict[str, Tensor] = {}
    for source, factor in factors:
        name = next(iter(source.leaves))
        mine = weights.to(vectors[name].dtype)  # of the parameter, where outputs are of another type
        if source.is_leaf:
            products = [(name, factor.weighted_product(mine, vectors[name]).detach())]
        else:
            pulled = pull_back(source, factor.weighted_sum(mine).detach())
            products = [(name, as_matrix(gradient) @ vectors[name]) for name, gradient in pulled]
        for name, product in products:
            found[name] = found[name] + product if name in found else product
    return found


def pull_back(source: Source, gradient: Tensor) -> list[tuple[str, Tensor]]:
    """A gradient with respect to a source as gradients with respect to the parameters it is made of."""
    if source.is_leaf:
        return [(next(iter(source.leaves)), gradient)]
    grads = torch.autograd.grad(
        source.tensor, list(source.leaves.values()), gradient.to(source.tensor), retain_graph=True, allow_unused=True
    )
    return [(name, grad) for name, grad in zip(source.leaves, grads, strict=True) if grad is not None]


def check_scalars_agree(a: Tensor, b: Tensor, allowed: float, how: str) -> None:
    """Two runs on the same examples give the same scalars.

    Raises:
        ModelError: if they do not.
    """
    difference = float((a - b).abs().max())
    if not difference <= allowed:
        raise ModelError(
            f"the model's outputs for the same examples differ by {difference:.3g} {how}: either examples influence "
            "each other (batch statistics, attention or sorting across the batch, a loss of (N, 1) outputs and (N,) "
            "targets that broadcast), or the model is random or keeps state between calls. A tangent kernel needs a "
            "fixed function of each example: call model.eval() and remove what mixes or remembers examples"
        )


def disagreements(
    selection: Selection, true: dict[str, Tensor], factors: Sequence[tuple[Source, Factor]], weights: Tensor
) -> dict[str, str]:
    """Parameters whose captured gradient is not the true one, and what that means.

    Both are compared by their products with a random vector, so that neither need be formed.

    Args:
        selection: the parameters.
        true: what `true_products` gives.
        factors: what was captured.
        weights: (n, k) weights of the scalars in the true gradient.

    Raises:
        ModelError: if a true gradient is NaN or infinite.
    """
    found = captured_products(factors, weights, probes(selection))
    allowed = tolerance(weights.dtype, selection.tensors)
    norms = {name: float(true[name].norm()) if name in true else 0.0 for name in selection.names}
    for name, norm in norms.items():
        if not norm < float("inf"):
            raise ModelError(
                f"the gradient of parameter {name!r} is NaN or infinite: the tangent kernel is not defined at these "
                "parameters and examples. Look for sqrt(0), log(0) or a norm of zero in the model"
            )
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    wrong: dict[str, str] = {}
    for name, norm in norms.items():
        if name not in found:
            if norm > torch.finfo(weights.dtype).eps * total:
                wrong[name] = "it is used by code that torch's overrides do not see"
            continue
        difference = float((found[name] - true.get(name, 0)).norm())
        if not difference <= allowed * (norm + min(allowed, 0.01) * total):
            wrong[name] = (
                "torch's overrides do not see all its uses, or a rule is wrong: its gradient is not the true one"
            )
    return wrong


def _spread_reasons(generic: dict[str, str], sources: list[Source]) -> None:
    """A tensor made of several parameters takes one route: if one of them is generic, all are."""
    changed = True
    while changed:
        changed = False
        for source in sources:
            reasons = [generic[name] for name in source.leaves if name in generic]
            missing = [name for name in source.leaves if name not in generic]
            if reasons and missing:
                generic.update(dict.fromkeys(missing, reasons[0]))
                changed = True


def check_independence(
    model: nn.Module, selection: Selection, readout: Readout, examples: Examples, device: torch.device
) -> None:
    """Examples give the same in batches of one, two and three, as a trial would find. Cost: their forward passes.

    Raises:
        ModelError: if it does not.
        InputError: if the model cannot be run on the examples.
    """
    numbers, found = examples.for_a_trial(3), []
    for count in (3, 2):
        some = examples.batch(numbers[:count], device)
        with torch.no_grad():
            found.append(readout.scalars(run_model(model, selection, some), some.targets))
        check_scalars(found[-1], some)
    more, few = found
    allowed = tolerance(few.dtype, model.parameters()) * (float(few.abs().max()) or 1.0)
    check_scalars_agree(few, more[:2], allowed, "in a batch of 2 and of 3")
    check_alone(model, selection, readout, examples.batch(numbers[1:2], device), more[1:2])


def check_alone(
    model: nn.Module, selection: Selection, readout: Readout, batch: Batch, company: Tensor, *, must_run: bool = False
) -> None:
    """An example alone must give what it gives in company, where others stand before and perhaps behind it.

    Raises:
        ModelError: if it does not, or is not finite.
        InputError: if it must run alone and cannot.
    """
    try:
        with torch.no_grad():
            alone = readout.scalars(run_model(model, selection, batch), batch.targets).detach()
    except InputError:
        if must_run:
            raise
        return  # some models cannot take a batch of one
    check_scalars(alone, batch)
    allowed = tolerance(alone.dtype, model.parameters()) * (float(company.abs().max()) or 1.0)
    check_scalars_agree(company, alone, allowed, "alone and in company")
