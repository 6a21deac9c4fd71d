"""The empirical tangent kernel of a network on two sets of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.kernel.base import Kernel, bounds
from ntkit.kernel.memory import checked_memory
from ntkit.kernel.plan import Plan, Sizes, make_plan, sizes, span, tile_edge
from ntkit.tangent.derivatives import Derivatives, Gathering
from ntkit.tangent.grain import grain
from ntkit.tangent.identity import content
from ntkit.tangent.linearize import Tangent, linearize

if TYPE_CHECKING:
    import numpy as np

    from ntkit.kernel.fidelity import Fidelity
    from ntkit.tangent.examples import Examples
    from ntkit.tangent.parameters import Choice
    from ntkit.tangent.readout import Readout

Progress = Callable[[int, int], None]
# Where a block of the matrix belongs, by examples, and the block.
_Piece = tuple[tuple[int, int], tuple[int, int], Tensor]


def empirical_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    readout: Readout | None = None,
    trace: bool = False,
    parameters: Choice | None = None,
) -> Tensor:
    """The empirical neural tangent kernel of a model as it is, Theta(x1, x2) = J(x1) J(x2)^T.

    Args:
        model: any module in evaluation mode; it is not changed.
        x1: N examples: a tensor, a tuple or dict of tensors with a common first axis, or a `Dataset`.
        x2: M examples, or None for x1 again (half the work).
        readout: the K scalars per example; all C logits by default, which gives the full kernel.
        trace: the trace kernel (1/K) sum_k Theta_kk instead of all pairs of scalars.
        parameters: which parameters take part, as in `linearize`.

    Returns:
        A tensor (N*K, M*K), example-major: row n*K + k is scalar k of example n. With `trace`, (N, M).

    Cost: (N + M) forward and K (N + M) backward passes, and contractions that cost about as much as the layers
    themselves: for a linear layer N*M*(d_in + K*K*d_out) instead of N*M*K*K*d_in*d_out. No (N*K, P) matrix is formed.

    Raises:
        InputError: if the data or the selection is wrong.
        ModelError: if the model mixes examples, or gives NaN or infinite values.
    """
    return TangentKernel(linearize(model, readout=readout, parameters=parameters), x1, x2, trace=trace).dense()


class TangentKernel(Kernel):
    """The tangent kernel of a network on examples x1 (rows) and x2 (columns), read in tiles.

    Nothing is kept between calls but what the first trial run found out about the model.
    """

    def __init__(
        self,
        tangent: Tangent,
        x1: Any,
        x2: Any = None,
        *,
        trace: bool = False,
        memory: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Look at the examples, and run three of them to learn the model's operations.

        Args:
            tangent: the network, made by `linearize`.
            x1: examples of the rows.
            x2: examples of the columns; None for x1, a symmetric kernel.
            trace: the mean over the K scalars of the diagonal blocks, one row per example.
            memory: bytes of working space beside the matrix itself; by default an eighth of the machine's memory, or a
                quarter of the GPU's.
            progress: called with (entries done, entries in all) while tiles are computed.

        Raises:
            InputError: if the examples are wrong or the budget is not positive.
            ModelError: if the model has no tangent kernel on them.
        """
        self.tangent = tangent
        self.trace = trace
        self.memory = checked_memory(memory, tangent.device)
        self.progress = progress
        self._rows = tangent.examples(x1)
        self._cols = self._rows if x2 is None else tangent.examples(x2)
        self._symmetric = x2 is None
        self._anatomy = tangent.anatomy(self._rows)
        if x2 is not None:  # where the rows are one example, or equal, the columns show whether examples are mixed
            tangent.anatomy(self._cols)
        self.scalars = 1 if trace else self._anatomy.scalars

    @property
    def shape(self) -> tuple[int, int]:
        """(N*K, M*K), or (N, M) with `trace`."""
        return len(self._rows) * self.scalars, len(self._cols) * self.scalars

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.tangent.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.tangent.device

    @property
    def symmetric(self) -> bool:
        """Whether the columns are the rows' examples."""
        return self._symmetric

    @property
    def rows(self) -> Examples:
        """The examples of the rows."""
        return self._rows

    def plan(self, examples: int | None = None) -> Plan:
        """What computing the whole matrix will cost and how it will be done, before any of it is done.

        Args:
            examples: plan for so many examples like these, rows and columns, instead of those that are there.

        Cost: one forward and backward pass of two examples, to count FLOPs.

        Raises:
            InputError: if the number of examples is not a positive one.
        """
        if examples is not None and (isinstance(examples, bool) or not isinstance(examples, int) or examples < 1):
            raise InputError(f"a plan is for a positive number of examples: got {examples!r}")
        flops = self.tangent.count_flops(self._rows)
        rows, cols = (len(self._rows), len(self._cols)) if examples is None else (examples, examples)
        return self._planned(rows, cols, self._symmetric, self._sizes(flops))

    def _sizes(self, flops: tuple[int, int] | None = None) -> Sizes:
        itemsize = torch.empty(0, dtype=self.dtype).element_size()
        return sizes(self._anatomy, itemsize, self.tangent.count * itemsize, flops, grain(self.device))

    def _planned(self, rows: int, cols: int, symmetric: bool, found: Sizes | None = None) -> Plan:
        found = found or self._sizes()
        return make_plan(found, rows, cols, symmetric=symmetric, trace=self.trace, memory=self.memory)

    def tile(self, rows: slice, cols: slice) -> Tensor:
        """The entries at `rows` x `cols`; whole examples are computed, so cut at multiples of K.

        Raises:
            ModelError: if a gradient is NaN or infinite.
        """
        r0, r1 = bounds(rows, self.shape[0])
        c0, c1 = bounds(cols, self.shape[1])
        if r0 >= r1 or c0 >= c1:
            return self._empty(r1 - r0, c1 - c0)
        k = self.scalars
        n0, n1, m0, m1 = r0 // k, -(-r1 // k), c0 // k, -(-c1 // k)
        same = self._symmetric and (n0, n1) == (m0, m1)
        plan = self._planned(n1 - n0, m1 - m0, same)
        out = self._empty((n1 - n0) * k, (m1 - m0) * k)
        with torch.no_grad():
            for (a, b), (c, d), block in self._tiles(plan, n0, n1, m0, m1, same):
                _place(out, block, ((a - n0) * k, (b - n0) * k), ((c - m0) * k, (d - m0) * k), mirrored=same)
        _check_finite(out)
        return out[r0 - n0 * k : r1 - n0 * k, c0 - m0 * k : c1 - m0 * k]

    def _tiles(self, plan: Plan, n0: int, n1: int, m0: int, m1: int, same: bool) -> Iterator[_Piece]:
        """Tiles of examples in range, each once; of a symmetric range those on and above the diagonal."""
        edge = tile_edge(self.scalars, grain(self.device))
        total, done = (n1 - n0) * (m1 - m0), 0
        for start, stop in plan.blocks():
            a, b = start + n0, stop + n0
            held = self._held(self._rows, a, b, plan, partners=m1 - m0, same=same and not plan.reused)
            if same:
                yield from self._among(held, a, b, edge)
                done += (b - a) ** 2
                self._report(done, total)
            for c, d in plan.passings(*((b, m1) if same else (m0, m1))):
                yield from self._against(held, a, b, c, d, plan, edge)
                done += (b - a) * (d - c) * (2 if same else 1)
                self._report(done, total)
            held = None  # the next block is captured when this one's memory is free

    def _among(self, held: Derivatives, a: int, b: int, edge: int) -> Iterator[_Piece]:
        """Tiles on and above the diagonal of held examples a:b."""
        for i, j in span(a, b, edge):
            left = held.narrow(i - a, j - a)
            for c, d in span(i, b, edge):
                right = left if c == i else held.narrow(c - a, d - a)
                yield (i, j), (c, d), self._gram(left, right, (i, j), (c, d))

    def _against(self, held: Derivatives, a: int, b: int, c: int, d: int, plan: Plan, edge: int) -> Iterator[_Piece]:
        """Tiles of held examples a:b with columns c:d that are captured for them."""
        right = self._held(self._cols, c, d, plan, partners=b - a)
        for i, j in span(a, b, edge):
            yield (i, j), (c, d), self._gram(held.narrow(i - a, j - a), right, (i, j), (c, d))

    def stripe(self, rows: slice, columns: Sequence[slice], *, memory: int | None = None) -> Iterator[Tensor]:
        """Tiles of the same rows, whose examples are captured once for all of them and held.

        A tile's entries are the same to the last bit whichever others are asked for with it. All slices are cut at
        multiples of K.
        """
        k = self.scalars
        a, b = (edge // k for edge in bounds(rows, self.shape[0]))
        ranges = [tuple(edge // k for edge in bounds(column, self.shape[1])) for column in columns]
        # whatever is asked for, the plan is that of a full pass of all columns: it decides how sums are rounded
        found, budget = self._sizes(), memory or self.memory
        plan = self._full_pass(found, b - a, max(len(self._cols), 2 * found.grain.tile), budget)
        with torch.no_grad():
            held = self._held(self._rows, a, b, plan, partners=len(self._cols))
        for c, d in ranges:
            yield self._stripe_tile(held, a, b, c, d, plan)

    def _full_pass(self, found: Sizes, rows: int, cols: int, memory: int) -> Plan:
        return make_plan(found, rows, cols, symmetric=False, trace=self.trace, memory=memory)

    @torch.no_grad()  # and not around the `yield`, where it would change what the caller does in between
    def _stripe_tile(self, held: Derivatives, a: int, b: int, c: int, d: int, plan: Plan) -> Tensor:
        k, edge = self.scalars, tile_edge(self.scalars, grain(self.device))
        out = self._empty((b - a) * k, (d - c) * k)
        own = self._symmetric and (c, d) == (a, b)
        pieces = (
            self._among(held, a, b, edge)
            if own
            else (piece for e, f in plan.passings(c, d) for piece in self._against(held, a, b, e, f, plan, edge))
        )
        for (i, j), (e, f), block in pieces:
            _place(out, block, ((i - a) * k, (j - a) * k), ((e - c) * k, (f - c) * k), mirrored=own)
        _check_finite(out)
        return out

    def examples(self, numbers: Sequence[int]) -> Tensor:
        """The rows of some examples by number, which are held while all columns pass by once.

        Raises:
            ModelError: if a gradient is NaN or infinite.
        """
        numbers, columns = list(numbers), self._cols.data
        if not numbers:
            return super().examples(numbers)
        some = self._rows.pick(numbers)
        return TangentKernel(self.tangent, some, columns, trace=self.trace, memory=self.memory).dense()

    def tile_rows(self, memory: int) -> int:
        """Rows of a tile on disk: as many as can be held within half of a memory budget, in whole examples."""
        found, k = self._sizes(), self.scalars
        plan = self._full_pass(found, 2 * found.grain.tile, 2 * found.grain.tile, memory)
        held = max(1, sum(route.held for route in plan.routes))
        return max(1, min(memory // (2 * held) * k, super().tile_rows(memory)) // k) * k

    def identity(self) -> dict[str, str]:
        """The network, the read-out and the examples. Cost: reads the parameters and all examples once."""
        columns = "the rows" if self._symmetric else content(self._cols)
        kind = "trace" if self.trace else "tangent"
        return {"kernel": kind, **self.tangent.identity(), "rows": content(self._rows), "columns": columns}

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the network and the examples, not what reports progress here."""
        cols = None if self._symmetric else self._cols.data
        return _rebuild, (type(self), self.tangent, self._rows.data, cols, self.trace, self.memory)

    def apart(self) -> TangentKernel:
        """The same entries, with rows and columns taken for different examples."""
        return type(self)(self.tangent, self._rows.data, self._cols.data, trace=self.trace, memory=self.memory)

    def to(self, device: torch.device | str) -> TangentKernel:
        """The same kernel of a copy of the network on another device; tiles appear there."""
        kind, _, *rest = self.__reduce__()[1]
        return _rebuild(kind, self.tangent.to(device), *rest)

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done * self.scalars**2, total * self.scalars**2)

    def _held(
        self,
        examples: Examples,
        start: int,
        stop: int,
        plan: Plan,
        *,
        partners: int,
        same: bool = False,
    ) -> Derivatives:
        """Examples start:stop captured chunk by chunk, each chunk settled into its smaller form before the next."""
        gathering = Gathering(stop - start)
        for a, b in plan.chunks(start, stop):
            part = self.tangent.derivatives(examples, slice(a, b))
            part = part.settled(stop - start, partners, trace=self.trace, same=same, reused=plan.reused)
            if not gathering.fits(part):
                return self.tangent.derivatives(examples, slice(start, stop), generic=True)
            gathering.add(part)
            del part  # the loop's name would keep the last chunk alive beside the whole
        return gathering.result()

    def _gram(self, left: Derivatives, right: Derivatives, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        if left.factors.keys() != right.factors.keys():  # two batches took two paths through the model
            left = self.tangent.derivatives(self._rows, slice(*rows), generic=True)
            right = self.tangent.derivatives(self._cols, slice(*cols), generic=True)
        return left.gram(right, trace=self.trace)

    def __matmul__(self, other: Tensor | np.ndarray) -> Tensor:
        """Product with (columns,) or (columns, R), tile by tile: every example is captured as often as for `dense`."""
        n, m, k = len(self._rows), len(self._cols), self.scalars
        other = self._operand(other)
        out = other.new_zeros(self.shape[0], *other.shape[1:])
        with torch.no_grad():
            plan = self._planned(n, m, self._symmetric)
            for (a, b), (c, d), block in self._tiles(plan, 0, n, 0, m, self._symmetric):
                block = block.to(other.dtype)
                out[a * k : b * k] += block @ other[c * k : d * k]
                if self._symmetric and (a, b) != (c, d):
                    out[c * k : d * k] += block.T @ other[a * k : b * k]
        _check_finite(out)
        return out

    def diagonal(self) -> Tensor:
        """The squared lengths of the gradients. Cost: N forward and K*N backward passes, no pairs."""
        if not self._symmetric:
            return super().diagonal()
        found = []
        plan = self._planned(len(self._rows), 1, False)
        with torch.no_grad():
            for a, b in plan.chunks(0, len(self._rows)):
                norms = self.tangent.derivatives(self._rows, slice(a, b)).squared_norms()
                found.append(norms.mean(1) if self.trace else norms.reshape(-1))
        diagonal = torch.cat(found).to(self.dtype)
        _check_finite(diagonal)
        return diagonal

    def by_parameter(self, group: Callable[[str], str] | None = None) -> dict[str, Tensor]:
        """The kernel split by parameter, in one pass; the parts sum to the whole.

        Args:
            group: from a parameter's name to the name of its group, for example `ntkit.kernel.empirical.by_module`;
                each parameter by itself by default.

        Returns:
            One matrix of the kernel's shape for each group. Memory: as many matrices as groups.
        """
        n, m = len(self._rows), len(self._cols)
        plan = self._planned(n, m, False)
        label = group or (lambda name: name)
        split = {label(name): torch.zeros(self.shape, dtype=self.dtype) for name in self.tangent.parameter_names}
        k = self.scalars
        with torch.no_grad():
            for a, b in plan.chunks(0, n):
                left = self.tangent.derivatives(self._rows, slice(a, b))
                for c, d in plan.chunks(0, m):
                    same = self._symmetric and (a, b) == (c, d)
                    right = left if same else self.tangent.derivatives(self._cols, slice(c, d))
                    if left.factors.keys() != right.factors.keys():
                        left = self.tangent.derivatives(self._rows, slice(a, b), generic=True)
                        right = self.tangent.derivatives(self._cols, slice(c, d), generic=True)
                    for name, gram in left.grams(right, trace=self.trace):
                        part = gram / left.scalars if self.trace else gram.reshape((b - a) * k, (d - c) * k)
                        split[label(name)][a * k : b * k, c * k : d * k] += part.to(split[label(name)])
        for part in split.values():
            _check_finite(part)
        return {name: part.to(self.device) for name, part in split.items()}

    def fidelity(self, *, examples: int = 16, generator: torch.Generator) -> Fidelity:
        """How well this reduced kernel, times the identity over outputs, stands for the full one.

        Args:
            examples: number s of examples drawn; their exact C x C blocks cost s forward and s*C backward passes.
            generator: draws them.

        Warns with `FidelityWarning` where another reduced kernel would do much better.

        Raises:
            InputError: if this kernel is not a reduced one, or fewer than 2 examples are asked for.
        """
        from ntkit.kernel.fidelity import measure_fidelity

        return measure_fidelity(self, examples=examples, generator=generator)

    def on(self, rows: Sequence[int], cols: Sequence[int] | None = None, *, tangent: Tangent | None = None) -> Tensor:
        """The dense kernel of some examples by number, with this network or another tangent of it."""
        tangent = tangent or self.tangent
        with torch.no_grad():
            left = tangent.derivatives(self._rows, rows)
            right = left if cols is None else tangent.derivatives(self._cols, cols)
            if left.factors.keys() != right.factors.keys():
                left = tangent.derivatives(self._rows, rows, generic=True)
                right = tangent.derivatives(self._cols, cols or rows, generic=True)
            return left.gram(right, trace=self.trace and tangent is self.tangent)


def _rebuild(
    kind: type[TangentKernel], tangent: Tangent, rows: Any, cols: Any, trace: bool, memory: int
) -> TangentKernel:
    return kind(tangent, rows, cols, trace=trace, memory=memory)


def _place(out: Tensor, block: Tensor, rows: tuple[int, int], cols: tuple[int, int], *, mirrored: bool) -> None:
    """A block into its place, and where the matrix is symmetric into its mirror image's."""
    part = out[slice(*rows), slice(*cols)]
    if mirrored and rows == cols:
        torch.add(block, block.T, out=part).mul_(0.5)  # rounding differs above and below the diagonal
    else:
        part.copy_(block)
        if mirrored:
            out[slice(*cols), slice(*rows)] = block.T


def by_module(name: str) -> str:
    """The module that owns a parameter: everything before the last dot of its name."""
    return name.rpartition(".")[0]


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        raise ModelError(
            "the tangent kernel has NaN or infinite entries: a gradient overflows or is not defined at these "
            "parameters. Check the weights, use float64, or look for sqrt(0) and log(0) in the model"
        )
