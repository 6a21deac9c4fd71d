"""The infinite-width limit of a module, as a kernel function and as a matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from ntkit.errors import InputError, ModelError
from ntkit.kernel.base import Kernel, bounds
from ntkit.kernel.function import KernelFunction
from ntkit.kernel.infinite.laws import NTK, Deviations, Law, Parametrization, Standard, checked, require_used
from ntkit.kernel.infinite.pairs import Block, Covariance
from ntkit.kernel.infinite.program import Program, Variances
from ntkit.kernel.infinite.reader import Reader, as_double
from ntkit.tangent.examples import Examples
from ntkit.tangent.identity import content, digest
from ntkit.tangent.parameters import select

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ntkit.tangent.examples import Batch
    from ntkit.tangent.parameters import Choice

# Numbers that one step holds for a block of pairs: a few such blocks have to fit into a processor's cache.
BLOCK = 2**16
# Numbers that a tile on disk costs at most, so that a killed run loses minutes.
TILE = 2**33
KINDS = ("ntk", "nngp")


class Both(NamedTuple):
    """The two kernels of a network at infinite width."""

    ntk: Tensor
    nngp: Tensor


def infinite_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    kind: str = "ntk",
    weight_std: Deviations = None,
    bias_std: Deviations = None,
    parametrization: Parametrization | None = None,
    parameters: Choice | None = None,
) -> Tensor | Both:
    """The kernel that a module's tangent kernel tends to as its hidden layers grow wide, between examples.

    Args:
        model: a module that torch.fx can trace; it is not changed. Its widths do not matter in the NTK parametrisation.
        x1: N examples: a tensor, a tuple of tensors, or a `Dataset`.
        x2: M examples; None for x1 again.
        kind: "ntk", "nngp" (the covariance of outputs at initialisation) or "both".
        weight_std: s, weights have variance s^2 / fan_in; a number, or a dict from patterns of parameter names to
            numbers. None reads it from the values that the module has.
        bias_std: b, biases have variance b^2; likewise, and 0 where only weight_std is given.
        parametrization: `NTK()` or `Standard()`; by default the first where deviations are given, the second, which is
            PyTorch's, where they are read.
        parameters: which parameters are trained, as in `linearize`; the others add nothing to the tangent kernel.

    Returns:
        (N, M) in float64: the kernel of one output; outputs are independent and alike. For "both" the pair (ntk, nngp).
        Differentiable in x1 and x2 where these require gradients.

    Raises:
        InputError: if an argument cannot be used.
        ModelError: at a node without an infinite-width limit, naming it, or if the module cannot be traced.
    """
    if kind not in (*KINDS, "both"):
        raise InputError(f"kind is 'ntk', 'nngp' or 'both': got {kind!r}")
    function = InfiniteWidth(
        model,
        kind="nngp" if kind == "nngp" else "ntk",
        weight_std=weight_std,
        bias_std=bias_std,
        parametrization=parametrization,
        parameters=parameters,
    )
    kernel = function(x1, x2)
    return kernel.both() if kind == "both" else kernel.dense()


class InfiniteWidth(KernelFunction):
    """A module at infinite width, as a function of examples. The arguments are those of `infinite_ntk`.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> x = torch.tensor([[2.0**0.5, 0.0], [0.0, 2.0**0.5]])
        >>> InfiniteWidth(net, weight_std={"0.*": 1.0, "2.*": 2.0**0.5})(x).dense().round(decimals=4)
        tensor([[2.0000, 0.3183],
                [0.3183, 2.0000]], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str = "ntk",
        weight_std: Deviations = None,
        bias_std: Deviations = None,
        parametrization: Parametrization | None = None,
        parameters: Choice | None = None,
    ) -> None:
        """Note the module; it is read when the first examples come, for their shape.

        Args:
            model: as in `infinite_ntk`, like the others that are not named here.
            kind: "ntk" or "nngp".
            weight_std: s.
            bias_std: b.
            parametrization: what is trained.
            parameters: which parameters are trained.

        Raises:
            InputError: if an argument cannot be used.
        """
        if not isinstance(model, nn.Module):
            raise InputError(f"an infinite-width limit is taken of a torch.nn.Module: got {type(model).__name__}")
        if kind not in KINDS:
            raise InputError(f"kind is 'ntk' or 'nngp': got {kind!r}")
        given = weight_std is not None or bias_std is not None
        if parametrization is None:
            parametrization = NTK() if given else Standard()
        if not isinstance(parametrization, (NTK, Standard)):
            raise InputError(f"parametrization is NTK() or Standard(): got {parametrization!r}")
        self.model, self.kind = model, kind
        self.law = Law(checked(weight_std, "weight_std"), checked(bias_std, "bias_std"), parametrization)
        require_used(weight_std, "weight_std", model)
        require_used(bias_std, "bias_std", model)
        self.parameters = parameters
        if kind == "ntk":
            select(model, parameters)  # a wrong choice is refused now
        self._programs: dict[tuple, Program] = {}

    def __call__(self, x1: Any, x2: Any = None) -> InfiniteKernel:
        """The kernel between examples; see `KernelFunction`.

        Raises:
            InputError: if the examples are wrong.
            ModelError: if the module has no infinite-width limit that is known here.
        """
        return InfiniteKernel(self, x1, x2)

    def diagonal(self, x: Any) -> Tensor:
        """k(x, x) of each example, one by one."""
        return self(x).diagonal()

    def program(self, examples: Examples) -> Program:
        """The steps of the limit for examples of one shape; read once.

        Raises:
            InputError: if examples are given by name.
            ModelError: if there is no limit.
        """
        batch = examples.batch([0, min(1, len(examples) - 1)])
        if batch.keywords:
            raise InputError(
                "an infinite-width kernel takes tensors in the order of the module's arguments: got a dict"
            )
        require_finite(batch.arguments)
        key = _kinds(batch), next(batch.tensors()).device, self._state()
        if key not in self._programs:
            trained = select(self.model, self.parameters).names if self.kind == "ntk" else ()
            self._programs[key] = Reader(self.model, self.law, frozenset(trained), batch).program()
        return self._programs[key]

    def _state(self) -> tuple:
        """What changes when somebody trains the module, freezes or replaces a part, or puts it into another mode."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        values = tuple((t.data_ptr(), t._version, t.requires_grad) for t in tensors)
        return values, tuple(settings(module) for module in self.model.modules())

    def listing(self, x: Any) -> str:
        """The steps in words, one line each: which layers were read, with which variances, for examples like `x`.

        s and b are the standard deviations of weights (times the root of fan-in) and biases, A is the second moment.
        """
        program = self.program(Examples(x))
        lines = []
        for number, (step, positions) in enumerate(zip(program.steps, program.positions, strict=True)):
            after = f" after {', '.join(map(str, step.inputs))}" if step.inputs else ""
            places = f", {' x '.join(map(str, positions))} positions" if positions else ""
            lines.append(f"{number:3d} {step.node}{after}: {step}{places}")
        return "\n".join(lines)

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads the module itself: traced graphs do not travel."""
        return {**vars(self), "_programs": {}}


def require_finite(arguments: Sequence[Tensor]) -> None:
    """Refuse examples with entries that are no numbers.

    Raises:
        InputError: if there are any.
    """
    if any(t.is_floating_point() and not bool(t.detach().isfinite().all()) for t in arguments):
        raise InputError("the examples have entries that are NaN or infinite: clean them first")


def settings(module: nn.Module) -> tuple:
    """What a module's own attributes say beside its tensors and submodules."""
    plain = (bool, int, float, str, tuple, type(None))
    own = ((name, value) for name, value in sorted(vars(module).items()) if not name.startswith("_"))
    return type(module), tuple((name, value) for name, value in own if isinstance(value, plain))


def _members(found: Covariance, tangent: bool) -> tuple[Tensor, ...]:
    """The tangent kernel, where it is wanted, and the second moments."""
    if not tangent:
        return (found.nngp,)
    return (torch.zeros_like(found.nngp) if found.ntk is None else found.ntk), found.nngp


def _kinds(batch: Batch) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Shapes of one example's tensors, and whether they are numbers with a point."""
    return tuple((tuple(t.shape[1:]), "float" if t.is_floating_point() else "integer") for t in batch.tensors())


class InfiniteKernel(Kernel):
    """The kernel of a module at infinite width on examples x1 (rows) and x2 (columns), in float64, read in tiles.

    Where examples require gradients, tiles carry them; each block of pairs is computed again on the way back, so that
    memory stays that of a block.
    """

    def __init__(self, function: InfiniteWidth, x1: Any, x2: Any = None) -> None:
        """Look at the examples, and read the module for them.

        Args:
            function: the limit.
            x1: examples of the rows.
            x2: examples of the columns; None for x1, a symmetric kernel.

        Raises:
            InputError: if the examples are wrong.
            ModelError: if there is no limit.
        """
        self.function = function
        self._rows = Examples(x1)
        self._cols = self._rows if x2 is None else Examples(x2)
        self._symmetric = x2 is None
        rows, cols = (_kinds(examples.batch([0])) for examples in (self._rows, self._cols))
        if rows != cols:
            raise InputError(f"rows and columns must be examples of one shape and type: got {rows} and {cols}")
        self.program = function.program(self._rows)

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return len(self._rows), len(self._cols)

    @property
    def dtype(self) -> torch.dtype:
        """float64: differences of nearly equal angles need it."""
        return torch.float64

    @property
    def device(self) -> torch.device:
        """Of the examples."""
        return next(self._rows.batch([0]).tensors()).device

    @property
    def symmetric(self) -> bool:  # noqa: D102
        return self._symmetric

    def tile(self, rows: slice, cols: slice) -> Tensor:
        """The entries at `rows` x `cols`. Cost: in a convolutional network, D^2 numbers per step and pair with pooling
        of D positions, D without.
        """  # noqa: D205
        return self._tiles(rows, cols, self.function.kind == "ntk")[0]

    def both(self) -> Both:
        """Tangent kernel and covariance of outputs, in one pass.

        Raises:
            InputError: if the function is of the second kind alone.
        """
        if self.function.kind != "ntk":
            raise InputError("both kernels are had from InfiniteWidth(..., kind='ntk'): this one is of kind 'nngp'")
        ntk, nngp = self._tiles(slice(None), slice(None), True)
        return Both(ntk, nngp)

    def diagonal(self) -> Tensor:
        """The main diagonal; of a symmetric kernel at the price of N pairs."""
        if not self._symmetric:
            return super().diagonal()
        x, found = self._prepared(self._rows, 0, len(self._rows)), []
        step = max(1, BLOCK // max(self.program.entries(), self.program.entries(cross=False)))
        for start in range(0, len(self._rows), step):
            part = self.program.diagonal(tuple(t[start : start + step] for t in x), tangent=self.function.kind == "ntk")
            found.append(_members(part, self.function.kind == "ntk")[0])
        return torch.cat(found)

    def _tiles(self, rows: slice, cols: slice, tangent: bool) -> tuple[Tensor, Tensor]:
        (r0, r1), (c0, c1) = bounds(rows, self.shape[0]), bounds(cols, self.shape[1])
        if r0 == r1 or c0 == c1:
            empty = self._empty(r1 - r0, c1 - c0)
            return empty, empty
        left = self._prepared(self._rows, r0, r1)
        same = self._symmetric and (r0, r1) == (c0, c1)
        right = left if same else self._prepared(self._cols, c0, c1)
        with_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (*left, *right))
        found = self._differentiable if with_gradients else self._plain
        return found(left, right, (r0, c0), same, tangent)

    def _prepared(self, examples: Examples, start: int, stop: int) -> tuple[Tensor, ...]:
        """What the steps take of some examples; of tensors without the copy that would cut their gradients off."""
        data = examples.data
        if isinstance(data, Dataset):
            arguments = examples.batch(slice(start, stop)).arguments
        else:
            arguments = tuple(t[start:stop] for t in (data if isinstance(data, tuple) else (data,)))
        require_finite(arguments)
        return tuple(as_double(t) for t in self.program.prepare(*(as_double(t) for t in arguments)))

    def _shape_of_blocks(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of a block such that each step's numbers stay in the cache; broad rather than tall."""
        pairs = max(1, BLOCK // self.program.entries())
        height = min(rows, max(1, math.isqrt(pairs // 4)))
        return height, max(1, min(cols, pairs // max(1, height)))

    @torch.no_grad()
    def _plain(
        self, left: tuple[Tensor, ...], right: tuple[Tensor, ...], corner: tuple[int, int], same: bool, tangent: bool
    ) -> tuple[Tensor, Tensor]:
        """Block by block into one matrix; of a symmetric one those that touch the upper half."""
        n, m = len(left[0]), len(right[0])
        found = [self._empty(n, m) for _ in range(2 if tangent else 1)]
        sides = (self._variances(left), None)
        sides = (sides[0], sides[0] if same else self._variances(right))
        height, width = self._shape_of_blocks(n, m)
        for a in range(0, n, height):
            b = min(a + height, n)
            for c in range(a if same else 0, m, width):
                d = min(c + width, m)
                values = self._block(
                    tuple(t[a:b] for t in left),
                    tuple(t[c:d] for t in right),
                    ({k: v[a:b] for k, v in sides[0].items()}, {k: v[c:d] for k, v in sides[1].items()}),
                    self._same(corner[0] + a, corner[0] + b, corner[1] + c, corner[1] + d),
                    tangent,
                )
                for out, value in zip(found, values, strict=True):
                    out[a:b, c:d] = value
                    if same:
                        out[c:d, a:b] = value.T
        if not all(bool(out.isfinite().all()) for out in found):
            raise ModelError("the kernel has entries that are not finite: a function of the module grows too fast")
        return found[0], found[-1]

    def _differentiable(
        self, left: tuple[Tensor, ...], right: tuple[Tensor, ...], corner: tuple[int, int], same: bool, tangent: bool
    ) -> tuple[Tensor, Tensor]:
        n, m = len(left[0]), len(right[0])
        height, width = self._shape_of_blocks(n, m)
        strips: list[list[Tensor]] = [[] for _ in range(2 if tangent else 1)]
        for a in range(0, n, height):
            b, row = min(a + height, n), [[] for _ in strips]
            for c in range(0, m, width):
                d = min(c + width, m)
                marks = self._same(corner[0] + a, corner[0] + b, corner[1] + c, corner[1] + d)

                def block(*tensors: Tensor, marks: Tensor | None = marks) -> tuple[Tensor, ...]:
                    x, y = tensors[: len(left)], tensors[len(left) :]
                    return self._block(x, y, (self.program.variances(x), self.program.variances(y)), marks, tangent)

                values: Any = checkpoint(
                    block,
                    *(t[a:b] for t in left),
                    *(t[c:d] for t in right),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for parts, value in zip(row, values, strict=True):
                    parts.append(value)
            for strip, parts in zip(strips, row, strict=True):
                strip.append(torch.cat(parts, 1))
        found = [torch.cat(strip) for strip in strips]
        return found[0], found[-1]

    def _block(
        self,
        left: tuple[Tensor, ...],
        right: tuple[Tensor, ...],
        sides: tuple[Variances, Variances],
        same: Tensor | None,
        tangent: bool,
    ) -> tuple[Tensor, ...]:
        return _members(self.program.covariance(left, right, sides, Block(2, same, tangent)), tangent)

    def _variances(self, x: tuple[Tensor, ...]) -> Variances:
        """Of all examples, some at a time."""
        step = max(1, 4 * BLOCK // self.program.entries(cross=False))
        parts = [self.program.variances(tuple(t[a : a + step] for t in x)) for a in range(0, len(x[0]), step)]
        return {number: torch.cat([part[number] for part in parts]) for number in parts[0]}

    def _same(self, a: int, b: int, c: int, d: int) -> Tensor | None:
        """Where rows a:b and columns c:d are one example."""
        if not self._symmetric or max(a, c) >= min(b, d):
            return None
        return torch.arange(a, b, device=self.device)[:, None] == torch.arange(c, d, device=self.device)

    def tile_rows(self, memory: int) -> int:
        """Rows of a tile on disk: fewer where a pair of examples is expensive."""
        return max(1, min(super().tile_rows(memory), math.isqrt(TILE // self.program.entries())))

    def identity(self) -> dict[str, str]:
        """The steps with all their numbers, what is done to the inputs before, and the examples."""
        columns = "the rows" if self._symmetric else content(self._cols)
        before: Any = self.program.prepare
        modules = repr([settings(module) for _, module in sorted(before.named_modules())[1:]])
        return {
            "kernel": f"infinite {self.function.kind}",
            "steps": digest([repr((self.program.steps, self.program.output))]),
            "inputs": digest([before.code, modules, *(t for _, t in sorted(before.state_dict().items()))]),
            "rows": content(self._rows),
            "columns": columns,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the module and the examples."""
        return InfiniteKernel, (self.function, self._rows.data, None if self._symmetric else self._cols.data)
