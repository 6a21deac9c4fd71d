"""Which operation used which parameter, with which input and output.

A `TorchFunctionMode` sees every torch operation that a model calls, wherever it is called from. An operation that
touches a parameter either makes something of parameters alone (a reshaped, sliced, normalized weight: *derived*), or
brings a parameter together with examples (a *use*). A use runs with the parameter detached; its inputs are kept, and
the place of its output in the autograd graph is noted, so that one backward pass to those places gives the cotangents
of every use for the whole batch.

What is derived and what is a use, and where the examples are in each tensor, is the `Script` of the model, found out
once by `ntkit.tangent.trial`; a capture then follows it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name

from ntkit.errors import NtkitError
from ntkit.tangent import images, products
from ntkit.tangent.layout import ExampleAxis
from ntkit.tangent.rules import all as _all_rules  # noqa: F401  (registers the rules)
from ntkit.tangent.rules.local import local
from ntkit.tangent.rules.registry import RULES, Operand, Use
from ntkit.tangent.structure import Rebuild, flatten

if TYPE_CHECKING:
    from ntkit.tangent.factors import Factor
    from ntkit.tangent.parameters import Selection


class Deviation(NtkitError):
    """A batch took another path through the model than the script says."""


@dataclass(frozen=True)
class Step:
    """One operation of the script that touches a parameter.

    Attributes:
        index: its place in the script.
        function: the operation.
        touches: which arguments are made of which parameters.
        is_use: whether examples take part; else its result is derived from parameters alone.
        opaque: the examples cannot be told apart in it; its parameters take the generic route.
        operands: where the examples are in each tensor argument.
        outputs: where they are in each tensor output.
    """

    index: int
    function: Callable
    touches: tuple[tuple[int, tuple[str, ...]], ...]
    is_use: bool
    operands: tuple[ExampleAxis | None, ...] = ()
    outputs: tuple[ExampleAxis | None, ...] = ()
    opaque: bool = False

    @property
    def name(self) -> str:
        """The operation's name as a user would write it."""
        return operation_name(self.function)

    @property
    def parameters(self) -> str:
        """The names of the parameters it touches."""
        return ", ".join(name for _, names in self.touches for name in names)

    @property
    def has_rule(self) -> bool:
        """Whether the operation is in the table of rules."""
        return self.function in RULES


@dataclass(frozen=True, eq=False)
class Source:
    """A selected parameter, or a tensor made of selected parameters alone.

    Attributes:
        tensor: for a parameter a detached leaf that requires gradients, sharing its memory; for a derived tensor the
            tensor itself, whose autograd graph leads back to such leaves.
        leaves: the parameters it is made of, by name, as such leaves.
    """

    tensor: Tensor
    leaves: dict[str, Tensor]

    @property
    def is_leaf(self) -> bool:
        """Whether it is a parameter as it stands."""
        return any(leaf is self.tensor for leaf in self.leaves.values())


def touches(sources: dict[int, Source]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Places among an operation's arguments, and the parameters behind each."""
    return tuple((place, tuple(source.leaves)) for place, source in sources.items())


@dataclass(eq=False)
class Record:
    """One use, as it happened on one batch."""

    step: Step
    leaves: list[Any]
    rebuild: Rebuild
    sources: dict[int, Source]  # by place among the leaves
    versions: dict[int, int]
    edges: list[GradientEdge | None]
    output_bytes: list[int]
    in_place: bool
    cotangents: list[Tensor | None] = field(default_factory=list)  # by output, (n, k, *shape of one example)

    def factors(self, examples: int) -> list[tuple[Source, Factor]]:
        """What the use contributes to each parameter, by the operation's rule or else by the local one."""
        if all(g is None for g in self.cotangents):
            return []
        places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        axes = dict(zip(places, self.step.operands, strict=True))
        wrapped = [
            Operand(leaf, axes[i], i, i in self.sources) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(self.leaves)
        ]
        arguments, keywords = self.rebuild(wrapped)
        use = Use(
            self.step.function,
            tuple(arguments),
            keywords,
            self.step.outputs,
            tuple(self.cotangents),
            examples,
            self.in_place,
        )
        rule = RULES.get(self.step.function, local)
        if self.in_place:
            rule = local
        try:
            contributions = rule(use, *arguments, **keywords)
            if contributions is NotImplemented:
                contributions = local(use)
            return [(self.sources[operand.place], factor) for operand, factor in contributions]
        except (RuntimeError, IndexError, ValueError, NotImplementedError) as error:
            if isinstance(error, NtkitError):
                raise
            raise Deviation(f"the rule of {self.step.name} fails on it ({error})") from error

    def keep(self, output: int, scalar: int, scalars: int, gradient: Tensor | None, examples: int) -> None:
        """Take in the cotangent of one output for one scalar.

        It is copied at once, while it is in the processor's cache, and its memory serves the next scalar's.
        """
        axis, kept = self.step.outputs[output], self.cotangents[output]
        if gradient is None or axis is None:
            if kept is not None:
                kept[:, scalar] = 0
            return
        split = axis.split(gradient, examples)
        if scalars == 1:
            self.cotangents[output] = split.unsqueeze(1)
            return
        if kept is None:
            kept = self.cotangents[output] = _several_like(split, scalars)
            kept[:, :scalar] = 0
        kept[:, scalar] = split

    def keep_several(self, output: int, chosen: slice, scalars: int, gradients: Tensor | None, examples: int) -> None:
        """Take in the cotangents of one output for the chosen scalars, which come as the first axis."""
        axis, kept = self.step.outputs[output], self.cotangents[output]
        if gradients is None or axis is None:
            if kept is not None:
                kept[:, chosen] = 0
            return
        split = torch.vmap(partial(axis.split, examples=examples), out_dims=1)(gradients)
        if split.shape[1] == scalars:
            self.cotangents[output] = split
            return
        if kept is None:
            kept = self.cotangents[output] = _several_like(split[:, 0], scalars)
            kept[:, : chosen.start] = 0
        kept[:, chosen] = split

    def check_inputs(self) -> None:
        """The kept inputs must still be what the operation saw.

        Raises:
            Deviation: if one was overwritten afterwards.
        """
        for place, version in self.versions.items():
            if self.leaves[place]._version != version:
                raise Deviation(f"the input of {self.step.name} is overwritten in place after it was used")


def _several_like(split: Tensor, scalars: int) -> Tensor:
    """Memory for (n, k, *shape) with the axes in the order that a tensor (n, *shape) has them in memory.

    Where channels are innermost the scalars come next, so that k and channels together are the columns of one matrix.
    """
    order = sorted(range(1, split.ndim), key=split.stride, reverse=True)
    if order == list(range(1, split.ndim)):
        return split.new_empty(split.shape[0], scalars, *split.shape[1:])
    sizes = [split.shape[axis] for axis in order]
    memory = split.new_empty(split.shape[0], *sizes[:-1], scalars, sizes[-1])
    axes = [*order[:-1], -1, order[-1]]  # what the axes of the memory are, the scalars -1
    return memory.permute(0, *(1 + axes.index(axis) for axis in (-1, *range(1, split.ndim))))


class Watch(TorchFunctionMode):
    """The common ground of all modes here: composite functions are taken apart, the rest goes to `see`."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Intercept one call of a torch operation."""
        composite = _COMPOSITES.get(func)
        if composite is not None:
            with self:
                return composite(*args, **(kwargs or {}))
        return self.see(func, args, kwargs or {})

    def see(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What this mode does with an operation."""
        return func(*args, **kwargs)


def _opened(function: Any, **parts: Callable) -> Callable:
    """A composite function whose own check for overrides answers no, so that its parts are seen instead of it.

    Args:
        function: the composite.
        parts: functions to call in place of those that it knows by these names.
    """

    def no(*_: Any) -> bool:
        return False

    names = {name: no for name in function.__globals__ if name.startswith("has_torch_function")}
    names |= {name: part for name, part in parts.items() if name in function.__globals__}
    body = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _projected(q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None) -> Sequence[Tensor]:
    """Queries, keys and values, in three copies instead of three views of one.

    Their cotangents are put side by side on the way back. Of views each would be put into zeros as large as all three,
    and these added (measured on a transformer: a thirtieth of the time of its kernel).
    """
    if not (q is k is v):
        return F._in_projection_packed(q, k, v, w, b)  # pyright: ignore[reportAttributeAccessIssue]
    return [part.contiguous() for part in F.linear(q, w, b).unflatten(-1, (3, q.shape[-1])).unbind(-2)]


_COMPOSITES: dict[Callable, Callable] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward, _in_projection_packed=_projected),
}


# Stand-ins that compute the same for detached parameters.
_FASTER: dict[Callable, Callable] = {F.linear: products.linear, F.conv2d: images.conv2d}


class _Tap(torch.autograd.Function):
    """Nothing, but a place in the autograd graph: the output of a use whose inputs need no gradients."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return cotangent, None


class Capture(Watch):
    """Runs a model under a script and keeps what is needed for the per-example gradients of its parameters."""

    def __init__(self, selection: Selection, script: list[Step], examples: int) -> None:
        """Prepare to follow `script` on a batch of so many examples."""
        super().__init__()
        self.script = script
        self.examples = examples
        self.position = 0
        self.records: list[Record] = []
        self.order = images.Order()
        self.sources: dict[int, Source] = {}
        self._keep: list[Tensor] = []
        for name, parameter in zip(selection.names, selection.tensors, strict=True):
            leaf = parameter.detach().requires_grad_()
            self._register(parameter, Source(leaf, {name: leaf}))
        first = selection.tensors[0]
        self._anchor = torch.zeros((), device=first.device, requires_grad=True)

    def _register(self, tensor: Tensor, source: Source) -> None:
        self.sources[id(tensor)] = source
        self._keep.append(tensor)

    def see(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Follow the script where a parameter is touched; leave everything else alone."""
        leaves, rebuild = flatten((args, kwargs))
        touched = {i: self.sources[id(leaf)] for i, leaf in enumerate(leaves) if id(leaf) in self.sources}
        if not touched or not torch.is_grad_enabled():
            return self.order.call(func, args, kwargs)
        step = self.step(func, leaves, rebuild, touched)
        if step is None:
            return func(*args, **kwargs)
        if step.opaque:
            args, kwargs = rebuild([leaf.detach() if i in touched else leaf for i, leaf in enumerate(leaves)])
            return func(*args, **kwargs)
        if step.is_use:
            return self._use(step, leaves, rebuild, touched)
        return self._derive(func, leaves, rebuild, touched)

    def step(self, func: Callable, leaves: list[Any], rebuild: Rebuild, touched: dict[int, Source]) -> Step | None:
        """The script's word on this operation; None if it makes no tensor.

        Raises:
            Deviation: if the script expects another.
        """
        if makes_no_tensor(func):
            return None
        step = self.script[self.position] if self.position < len(self.script) else None
        if step is None or step.function != func or step.touches != touches(touched):
            expected = "nothing more" if step is None else f"{step.name} with {step.parameters}"
            met = ", ".join(name for source in touched.values() for name in source.leaves)
            raise Deviation(f"met {operation_name(func)} with {met} where {expected} was expected")
        self.position += 1
        return step

    def _derive(self, func: Callable, leaves: list[Any], rebuild: Rebuild, touched: dict[int, Source]) -> Any:
        filled = [touched[i].tensor if i in touched else leaf for i, leaf in enumerate(leaves)]
        arguments, keywords = rebuild(filled)
        result = func(*arguments, **keywords)
        made_of = {name: leaf for source in touched.values() for name, leaf in source.leaves.items()}
        outputs = flatten(result)[0]
        if writes_in_place(func):
            outputs = [*outputs, arguments[0]]
        for out in outputs:
            if isinstance(out, Tensor) and out.requires_grad and id(out) not in self.sources:
                self._register(out, Source(out, made_of))
        return result

    def _use(self, step: Step, leaves: list[Any], rebuild: Rebuild, touched: dict[int, Source]) -> Any:
        in_place = writes_in_place(step.function)
        filled = [leaf.detach() if i in touched else leaf for i, leaf in enumerate(leaves)]
        kept = list(filled)
        if in_place:
            kept[0] = filled[0].detach().clone()
        arguments, keywords = rebuild(filled)
        result = _FASTER.get(step.function, step.function)(*arguments, **keywords)
        outputs, refill = flatten(arguments[0] if in_place else result)
        outputs = [
            self._tap(out) if axis is not None else out
            for out, axis in zip(outputs, _spread(step.outputs, outputs), strict=True)
        ]
        tensors = [out for out in outputs if isinstance(out, Tensor)]
        edges = [
            get_gradient_edge(out) if axis is not None and out.requires_grad else None
            for out, axis in zip(tensors, step.outputs, strict=True)
        ]
        seen = [leaf for leaf in kept if isinstance(leaf, Tensor)]
        for tensor, axis in zip([*seen, *tensors], [*step.operands, *step.outputs], strict=True):
            if axis is not None and not axis.fits(tensor, self.examples):
                raise Deviation(f"{step.name} meets shape {tuple(tensor.shape)} in a batch of {self.examples}")
        versions = {
            i: leaf._version for i, leaf in enumerate(kept) if isinstance(leaf, Tensor) and not (in_place and i == 0)
        }
        kept = [
            leaf.detach() if isinstance(leaf, Tensor) and i not in versions else leaf for i, leaf in enumerate(kept)
        ]
        sizes = [out.nbytes for out in tensors]
        record = Record(step, kept, rebuild, touched, versions, edges, sizes, in_place)
        self.records.append(record)
        self.witness(record, tensors)
        return result if in_place else refill(outputs)

    def witness(self, record: Record, outputs: list[Tensor]) -> None:
        """Called with every use and its outputs; here nothing."""

    def _tap(self, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.requires_grad:
            return output
        fresh = output.clone() if output._is_view() else output
        return _Tap.apply(fresh, self._anchor)


def _spread(axes: tuple[ExampleAxis | None, ...], outputs: list[Any]) -> list[ExampleAxis | None]:
    """The axes of the tensors among `outputs`, None for what is no tensor.

    Raises:
        Deviation: if there are more or fewer tensors than the script says.
    """
    tensors = [isinstance(out, Tensor) for out in outputs]
    if sum(tensors) != len(axes):
        raise Deviation(f"an operation has {sum(tensors)} outputs where {len(axes)} were expected")
    remaining = iter(axes)
    return [next(remaining) if is_tensor else None for is_tensor in tensors]


def writes_in_place(func: Callable) -> bool:
    """Whether an operation writes into its first argument, by torch's naming."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return name.endswith("_") and not name.endswith("__")


_SILENT = frozenset(
    """
    size dim stride numel nelement element_size storage_offset is_contiguous is_floating_point
    is_complex is_sparse data_ptr type get_device ndimension item tolist numpy __len__ __bool__ __repr__
    __format__ __hash__ requires_grad_ register_hook retain_grad backward untyped_storage is_set_to
    is_same_size is_pinned dense_dim sparse_dim result_type can_cast is_tensor is_nonzero is_inference
    is_signed is_coalesced is_conj is_neg __get__state __set__
""".split()  # noqa: SIM905
)


def makes_no_tensor(func: Callable) -> bool:
    """Whether an operation only asks about a tensor."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        return owner not in ("T", "mT", "H", "mH", "data", "real", "imag")
    return name in _SILENT


def operation_name(func: Callable) -> str:
    """`torch.lstm`, `torch.Tensor.add`, ..."""
    return resolve_name(func) or getattr(func, "__name__", repr(func))


def plain_module(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper, or the module itself."""
    return getattr(model, "_orig_mod", model)
