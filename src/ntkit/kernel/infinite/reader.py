"""From a module to the steps of its infinite-width limit: the graph that torch.fx traces, node by node.

The handlers are in `nodes`, by module class and by function; elementwise functions in `pointwise.py`. What no handler
knows is refused, naming the node.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from ntkit.errors import ModelError
from ntkit.kernel.infinite import pointwise
from ntkit.kernel.infinite.laws import Law, parameters_named
from ntkit.kernel.infinite.nodes.table import read
from ntkit.kernel.infinite.program import Program
from ntkit.kernel.infinite.steps import Flattening, Inputs, Nonlinearity, ScaleTraining, Scaling, Step, Total
from ntkit.kernel.infinite.values import Applied, Field, Known, Shape, Value, changed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ntkit.tangent.examples import Batch


class Reader:
    """One pass over a traced module. Handlers read values with `field`, and add steps with `add`."""

    def __init__(self, model: nn.Module, law: Law, trained: frozenset[str], batch: Batch) -> None:
        """Trace a module and run it on two examples, to learn the shapes.

        Args:
            model: stays as it is; a copy is run.
            law: of the weights.
            trained: names of the parameters that take part in the tangent kernel.
            batch: two examples.

        Raises:
            ModelError: if it cannot be traced or run.
        """
        model = _copied(model)  # tracing leaves constants on the module that it goes through
        self.model, self.law, self.trained = model, law, trained
        self.names = parameters_named(model)
        self.modules = dict(model.named_modules())
        self.traced = _trace(model)
        self.batch = batch
        self.results = _results(self.traced, batch.arguments)
        # what numbers are if there is one example more: those that differ belong to the batch, not to the module
        self.with_another = _results(self.traced, [torch.cat([t, t[:1]]) for t in batch.arguments])
        self.steps: list[Step] = []
        self.positions: list[tuple[int, ...]] = []
        self.values: dict[fx.Node, Value] = {}
        self.inputs: list[fx.Node] = []  # known nodes that steps take
        self.used: dict[str, str] = {}  # parameters, and the node that used them
        self._settled: dict[int, tuple[Applied, Field]] = {}

    def program(self) -> Program:
        """Read the graph to its end.

        Raises:
            ModelError: at a node that has no infinite-width limit, or one that is not known here.
        """
        output: Value | None = None
        for node in self.traced.graph.nodes:
            if node.op == "output":
                output = self._output(node)
            else:
                self.values[node] = read(self, node)
        if not isinstance(output, (Field, Applied)):
            raise ModelError("the module's output does not depend on any weights: it has no infinite-width limit")
        last = self.whole(output, None)
        number = last.step
        if last.merged:
            number = self.add(Flattening((number,), "output"), ())
        if self.positions[number]:
            raise ModelError(
                f"the output has positions of shape {self.positions[number]} beside its channels: end the module with "
                "a mean over them, or with a flatten and a linear layer"
            )
        return Program(self.steps, number, self._prepare(), self.positions, tangent=bool(self.trained))

    def _output(self, node: fx.Node) -> Value:
        (returned,) = node.args
        if not isinstance(returned, fx.Node):
            raise ModelError(
                f"the module returns a {type(returned).__name__}: an infinite-width kernel needs one tensor, (N, C)"
            )
        return self.values[returned]

    # --------------------------------------------------------------------------------------------------- for handlers

    def refuse(self, node: fx.Node | None, why: str) -> NoReturn:
        """Say which node has no limit, and why.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"no infinite-width limit at {self.named(node)}: {why}")

    def named(self, node: fx.Node | None) -> str:
        """A node in words: its name, and the module or function."""
        if node is None:
            return "the output"
        if node.op == "call_module":
            return f"node {node.name!r} ({type(self.modules[str(node.target)]).__name__} {node.target!r})"
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return f"node {node.name!r} ({target})"

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of a node's tensor, for two examples."""
        return self.results[node.name]

    def add(self, step: Step, positions: Sequence[int]) -> int:
        """One step more; its number."""
        self.steps.append(step)
        self.positions.append(tuple(positions))
        return len(self.steps) - 1

    def field(self, value: Value, node: fx.Node | None) -> Field:
        """Hidden units with their covariance: functions that were applied become a step."""
        if isinstance(value, Field):
            return value
        if not isinstance(value, Applied):
            self.refuse(node, f"expected hidden units, and got {type(value).__name__.lower()} values")
        found = self._settled.get(id(value))
        if found is not None:
            return found[1]
        inner, function = value.field, value.function
        if function.slope is not None:
            step = Scaling((inner.step,), function.name, function.slope)
            field = changed(inner, self.add(step, self.positions[inner.step]))
        else:
            learned = () if function.learned is None else (function.learned,)
            if inner.scale is not None:
                learned = (*learned, function.by_scale(inner.scale))
            step = Nonlinearity((inner.step,), function.name, function.moments, learned)
            number = self.add(step, self.positions[inner.step])
            field = changed(inner, number, gaussian=False, centred=function.moments.odd, scale=None)
        self._settled[id(value)] = value, field  # kept alive, for its id is the key
        return field

    def whole(self, value: Value, node: fx.Node | None) -> Field:
        """Hidden units with all of their tangent kernel, for layers before which nothing is left open."""
        field = self.field(value, node)
        if field.scale is None:
            return field
        step = ScaleTraining((field.step,), self.steps[field.step].node, field.scale)
        return changed(field, self.add(step, self.positions[field.step]), scale=None)

    def source(self, known: Known, channel: int) -> int:
        """The step with the inner products of a tensor that depends on the inputs alone."""
        if known.node not in self.inputs:
            self.inputs.append(known.node)
        number = self.inputs.index(known.node)
        shape = self.shape(known.node)
        if not shape or shape[0] != self.batch.size:
            self.refuse(known.node, "it is the same for all examples: a kernel needs a row for each")
        channel %= len(shape)
        for step, found in enumerate(self.steps):
            if isinstance(found, Inputs) and (found.number, found.channel) == (number, channel):
                return step
        positions = [size for axis, size in enumerate(shape) if axis not in (0, channel)]
        return self.add(Inputs((), known.node.name, number, channel), positions)

    def apply(self, value: Value, function: pointwise.Pointwise, node: fx.Node) -> Applied:
        """An elementwise function of hidden units."""
        if isinstance(value, Applied):
            try:
                combined = function.after(value.function)
            except ValueError as error:
                self.refuse(node, str(error))
            return self.applied(value.field, combined, node)
        return self.applied(self.field(value, node), function, node)

    def applied(self, field: Field, function: pointwise.Pointwise, node: fx.Node) -> Applied:
        """The same, if the units are such that a function of them is known."""
        if not field.gaussian and function.slope is None:
            self.refuse(
                node,
                f"{function.name} is applied to units that are not Gaussian (the step before is "
                f"{self.steps[field.step].node!r}): put a linear layer or a convolution between them",
            )
        if field.entangled and function.slope is None:
            self.refuse(
                node,
                f"{function.name} is applied to a sum with a layer whose trained scale (the weight of a normalisation) "
                "has gone into it: freeze that weight, or leave it out with parameters=...",
            )
        return Applied(field, function)

    def total(self, values: Sequence[Value], node: fx.Node) -> Field:
        """The sum of layers."""
        entangled = any(field.scale is not None or field.entangled for field in (self.field(v, node) for v in values))
        fields = [self.whole(value, node) for value in values]
        first = fields[0]
        shapes = {(self.positions[field.step], field.channel, field.merged) for field in fields}
        if len(shapes) > 1:
            self.refuse(node, "it adds layers of different shapes, or flattened in different orders")
        if len(frozenset().union(*(f.roots for f in fields))) < sum(len(f.roots) for f in fields):
            self.refuse(
                node, "it adds layers that are correlated: they share weights, with no layer of their own in between"
            )
        if sum(not field.centred for field in fields) > 1:
            self.refuse(node, "it adds several layers with a mean that is not zero (behind ReLU, say), which add up")
        number = self.add(Total(tuple(field.step for field in fields), node.name), self.positions[first.step])
        return Field(
            number,
            first.channel,
            frozenset().union(*(field.roots for field in fields)),
            all(field.gaussian for field in fields),
            all(field.centred for field in fields),
            first.merged,
            entangled=entangled,
            mixed=any(field.mixed for field in fields),
        )

    def use(self, name: str, node: fx.Node) -> None:
        """Note that a parameter is used; twice is not known here."""
        if name in self.used:
            self.refuse(
                node,
                f"parameter {name!r} is used again, after {self.used[name]}: layers that share weights are correlated",
            )
        self.used[name] = node.name

    # ----------------------------------------------------------------------------------------------------- known part

    def _prepare(self) -> Callable[..., tuple[Tensor, ...]]:
        """What steps take of the inputs, as a module of its own in float64.

        Raises:
            ModelError: if it treats examples together.
        """
        graph, places = fx.Graph(), {}
        wanted = _ancestors(self.inputs)
        for node in self.traced.graph.nodes:
            if node in wanted or node.op == "placeholder":
                places[node] = _in_double(graph.node_copy(node, lambda other: places[other]))
        graph.output(tuple(places[node] for node in self.inputs))
        device = self.batch.arguments[0].device
        prepare = copy.deepcopy(fx.GraphModule(self.traced, graph)).double().to(device)
        arguments = [_unlike(as_double(t)) for t in self.batch.arguments]
        with torch.random.fork_rng(devices=[]), torch.no_grad(), Draws() as draws:
            together, again = (prepare(*(t.clone() for t in arguments)) for _ in range(2))
            rows = range(len(arguments[0]))
            alone = zip(*(prepare(*(t[i : i + 1].clone() for t in arguments)) for i in rows), strict=True)
        for node, both, repeated, each in zip(self.inputs, together, again, alone, strict=True):
            if draws.seen or not torch.equal(both, repeated):
                self.refuse(node, f"what is made of the inputs is random{draws.said}")
            singly = torch.cat(each)
            if both.shape != singly.shape or not torch.allclose(both, singly):
                self.refuse(node, "it treats the examples of a batch together: a kernel needs them one by one")
        return prepare


class Draws(TorchDispatchMode):
    """Notes operations that take random numbers, wherever they are called from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen.append(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))

    @property
    def said(self) -> str:
        """In brackets, for a message."""
        return f" ({', '.join(dict.fromkeys(self.seen))})" if self.seen else ""


def _in_double(node: fx.Node) -> fx.Node:
    """A node of a graph whose tensors are float64, with casts to other floating point types turned into float64."""

    def double(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    node.args, node.kwargs = map_aggregate(node.args, double), map_aggregate(node.kwargs, double)  # pyright: ignore[reportAttributeAccessIssue]
    if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
        node.target = "double"
    return node


def _unlike(t: Tensor) -> Tensor:
    """Two examples that differ, whatever was given: the second is moved by as much as the first is large."""
    if not t.is_floating_point():
        return t
    noise = torch.randn(t[1:].shape, generator=torch.Generator().manual_seed(0), dtype=t.dtype).to(t.device)
    return torch.cat([t[:1], t[1:] + (t[:1].abs().mean() + 1) * noise])


def as_double(t: Tensor) -> Tensor:
    """Floating point inputs in float64, others as they are."""
    return t.double() if t.is_floating_point() else t


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _trace(model: nn.Module) -> fx.GraphModule:
    hooked = [
        name or "the module itself"
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    if hooked:
        raise ModelError(
            f"{hooked[0]!r} has forward hooks, which an infinite-width limit cannot see: remove them (weight "
            "normalisation and spectral normalisation of the old kind are hooks, too)"
        )
    tracer = _Tracer()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), Draws() as draws:
            traced = fx.GraphModule(model, tracer.trace(model))
    except Exception as error:
        raise ModelError(
            f"the module cannot be traced by torch.fx ({type(error).__name__}: {error}): an infinite-width limit needs "
            "a forward method whose path does not depend on the values of tensors"
        ) from error
    if draws.seen:
        raise ModelError(
            f"the forward method draws random numbers of its own{draws.said}, which a traced graph would keep as they "
            "came: take that out, or put the module into evaluation mode"
        )
    if tracer.without_gradients:
        raise ModelError(
            f"part of the forward method runs without gradients (torch.no_grad, at {tracer.without_gradients[0]!r}), "
            "which a traced graph does not show: take that out, and leave parameters out with parameters=..."
        )
    return traced


class _Tracer(fx.Tracer):
    """Traces, and notes what is called while gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.without_gradients: list[str] = []

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        if kind.startswith("call") and not torch.is_grad_enabled():
            self.without_gradients.append(node.name)
        return node


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"the module cannot be copied ({type(error).__name__}: {error}), and it is not to be changed"
        ) from error


def _results(traced: fx.GraphModule, arguments: Sequence[Tensor]) -> dict[str, Any]:
    """Shapes of all tensors, and other values, by node; found by running a copy on some examples."""
    runner = _Recorder(copy.deepcopy(traced))
    floating = next((p.dtype for p in runner.module.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in runner.module.parameters()), None)  # which need not be that of the examples
    arguments = [t.to(device, floating if t.is_floating_point() else t.dtype) for t in arguments]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            runner.run(*arguments, enable_io_processing=False)
    except Exception as error:
        raise ModelError(
            f"the module fails on {len(arguments[0])} of the examples: {type(error).__name__}: {error}"
        ) from error
    return runner.found


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps shapes, and what is not a tensor."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n.name] = Shape(result.shape) if isinstance(result, Tensor) else result
        return result
