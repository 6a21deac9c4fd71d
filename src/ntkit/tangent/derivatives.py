"""The derivatives of a batch, parameter by parameter, and the Gram matrix of two batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntkit.tangent.capture import Source
from ntkit.tangent.factors import Factor, Outer, PulledBack, Rows, Total
from ntkit.tangent.grain import grain
from ntkit.tangent.untouched import plain_precision
from ntkit.tangent.workspace import Workspace


@dataclass(frozen=True)
class Part:
    """A parameter, or a part of one that shares no entries with the rest: what has one factor of its own.

    Attributes:
        name: the parameter.
        terms: which of a batch's (source, factor) terms contribute to it.
        direct: whether the terms' own inner products are those of the parameter.
    """

    name: str
    terms: tuple[int, ...]
    direct: bool


Term = tuple[Source, Factor]


@dataclass(frozen=True, eq=False)
class Derivatives:
    """All per-example gradients of a batch, in factored form.

    Attributes:
        outputs: the scalars (n, k).
        factors: one for each part; the same parts for every batch of one model.
    """

    outputs: Tensor
    factors: dict[Part, Factor]

    @property
    def examples(self) -> int:
        """Number of examples n."""
        return self.outputs.shape[0]

    @property
    def scalars(self) -> int:
        """Number of scalars k per example."""
        return self.outputs.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory held by the factors."""
        return sum(factor.nbytes for factor in self.factors.values())

    def narrow(self, start: int, stop: int) -> Derivatives:
        """The same for examples start:stop, without a copy."""
        return Derivatives(
            self.outputs[start:stop], {part: factor.narrow(start, stop) for part, factor in self.factors.items()}
        )

    def settled(self, examples: int, partners: int, *, trace: bool, same: bool, reused: bool) -> Derivatives:
        """With rows formed now where that saves memory, or work if they are used again.

        Args:
            examples: number of examples that will be on this side, of which these are some.
            partners: number of examples on the other side.
            trace: whether the products are summed over the scalars.
            same: whether the other side are the same examples, contracted all at once.
            reused: whether several products follow.
        """
        settled = {}
        for part, factor in self.factors.items():
            if not isinstance(factor, Rows) and factor.prefers_rows_among(examples, partners, trace=trace, same=same):
                size = self.outputs.element_size() * self.examples * self.scalars * _numel(factor.shape)
                settled[part] = Rows(factor.rows()) if reused or size < factor.nbytes else factor
            else:
                settled[part] = factor
        return replace(self, factors=settled)

    def grams(self, other: Derivatives, *, trace: bool, scratch: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """For each part its parameter's name and the inner products: (n, k, m, l), or summed over k = l: (n, m)."""
        workspace = self._workspace(scratch)
        for part, factor in self.factors.items():
            partner = factor if other is self else other.factors[part]
            with plain_precision(self.outputs.device):
                product = factor.gram(partner, trace=trace, workspace=workspace)
            yield part.name, product

    def gram(self, other: Derivatives, *, trace: bool = False, scratch: int | None = None) -> Tensor:
        """The kernel of two batches: (n*k, m*k) example-major, or with `trace` (n, m), the mean over k."""
        n, k, m = self.examples, self.scalars, other.examples
        total: Tensor | None = None
        for products, scale in self._products(other, trace=trace, workspace=self._workspace(scratch)):
            # in the order in memory of the first, which is mostly that of all: scalars that went back together have
            # theirs outermost, and adding in another order would take several times as long
            if total is not None and total.dtype != products.dtype:  # parameters of several types: in the widest
                total = total.to(torch.promote_types(total.dtype, products.dtype))
            if total is None:
                total = products if scale is None else products * scale
            else:
                total = total.add_(products) if scale is None else total.addcmul_(products, scale)
        if total is None:
            total = self.outputs.new_zeros((n, m) if trace else (n, k, m, k))
        return total.div_(k) if trace else total.reshape(n * k, m * k)

    def _products(
        self, other: Derivatives, *, trace: bool, workspace: Workspace
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Inner products of all parts, each with what it is still to be multiplied by.

        What a weight and its bias have in common comes once, to be multiplied by the sum for both.
        """
        common: Tensor | None = None
        scale: Tensor | None = None
        for part, factor in self.factors.items():
            with plain_precision(self.outputs.device):
                products, own = factor.gram_factors(
                    factor if other is self else other.factors[part], trace=trace, workspace=workspace
                )
            if products is common and own is not None and scale is not None:
                scale = scale + own
                continue
            if common is not None:
                yield common, scale
            common, scale = products, own
        if common is not None:
            yield common, scale

    def squared_norms(self, scratch: int | None = None) -> Tensor:
        """The kernel's diagonal as (n, k)."""
        total, workspace = torch.zeros_like(self.outputs), self._workspace(scratch)
        with plain_precision(self.outputs.device):
            for factor in self.factors.values():
                total = total + factor.squared_norms(workspace)  # in the widest type
        return total

    def _workspace(self, scratch: int | None) -> Workspace:
        return Workspace(grain(self.outputs.device).scratch if scratch is None else scratch)


class Gathering:
    """Batches put one behind the other as they come, in memory that is taken once.

    Were they kept and put together at the end, the allocator would hold the memory of all of them beside the whole.
    """

    def __init__(self, examples: int) -> None:
        """Nothing is there yet.

        Args:
            examples: of all batches together.
        """
        self.examples = examples
        self._whole: Derivatives | None = None
        self._filled = 0

    def fits(self, batch: Derivatives) -> bool:
        """Whether a batch has the parts that those before it have; another one took another path through the model."""
        return self._whole is None or self._whole.factors.keys() == batch.factors.keys()

    def add(self, batch: Derivatives) -> None:
        """The next examples. A batch that is all of them is kept as it is."""
        if self._whole is None:
            self._whole = batch if batch.examples == self.examples else self._room(batch)
        if self._whole is not batch:
            here = slice(self._filled, self._filled + batch.examples)
            self._whole.outputs[here] = batch.outputs
            for part, factor in batch.factors.items():
                for whole, array in zip(self._whole.factors[part].arrays, factor.arrays, strict=True):
                    whole[here] = array
        self._filled += batch.examples

    def result(self) -> Derivatives:
        """All examples."""
        assert self._whole is not None
        assert self._filled == self.examples
        return self._whole

    def _room(self, batch: Derivatives) -> Derivatives:
        factors = {
            part: factor.of(*(_room(array, self.examples) for array in factor.arrays))
            for part, factor in batch.factors.items()
        }
        return Derivatives(_room(batch.outputs, self.examples), factors)


def _room(array: Tensor, examples: int) -> Tensor:
    """Memory for more examples, with the other axes in the order that the array has them in memory."""
    order = [0, *sorted(range(1, array.ndim), key=array.stride, reverse=True)]
    memory = array.new_empty(examples, *(array.shape[axis] for axis in order[1:]))
    return memory.permute([order.index(axis) for axis in range(array.ndim)])


def _numel(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def assemble(outputs: Tensor, terms: Sequence[Term], parts: Sequence[Part]) -> Derivatives:
    """One factor for each part from the terms of a batch."""
    return Derivatives(outputs, {part: _factor(part, [terms[i] for i in part.terms]) for part in parts})


def _factor(part: Part, terms: Sequence[Term]) -> Factor:
    if part.direct:
        return _join([factor for _, factor in terms])
    pulled = []
    for source, factor in terms:
        leaf = source.leaves[part.name]
        pulled.append(factor if source.tensor is leaf else PulledBack(factor, source.tensor, leaf))
    return pulled[0] if len(pulled) == 1 else Total(tuple(pulled))


def leaf_rows(name: str, terms: Sequence[Term]) -> Tensor | None:
    """Rows (n, k, *shape) of a whole parameter, None if no term reaches it."""
    mine = tuple(i for i, (source, _) in enumerate(terms) if name in source.leaves)
    return _factor(Part(name, mine, False), [terms[i] for i in mine]).rows() if mine else None


def partition(terms: Sequence[Term]) -> list[Part]:
    """The parts: connected groups of terms whose sources share parameter entries, one part per parameter of each."""
    spans = [_span(source) for source, _ in terms]
    groups: dict[int, list[int]] = {}  # by the number of any of its terms; the same list for all of them
    met: dict[str, list[int]] = {}
    for i, (source, _) in enumerate(terms):
        groups[i] = [i]
        for name in source.leaves:
            for j in met.setdefault(name, []):
                if groups[j] is not groups[i] and _share(spans[j], spans[i]):
                    merged = sorted(groups[j] + groups[i])
                    groups.update(dict.fromkeys(merged, merged))
            met[name].append(i)
    parts = []
    for group in (group for i, group in groups.items() if i == group[0]):
        geometries = {spans[i].geometry if spans[i] else None for i in group}  # pyright: ignore[reportOptionalMemberAccess]
        direct = len(geometries) == 1 and None not in geometries and _joinable([terms[i][1] for i in group])
        for name in dict.fromkeys(name for i in group for name in terms[i][0].leaves):
            mine = tuple(i for i in group if name in terms[i][0].leaves)
            parts.append(Part(name, mine, direct))
    return parts


@dataclass(frozen=True)
class _Span:
    """The memory that a view of a parameter covers, to tell whether two views share entries."""

    first: int
    last: int
    geometry: tuple


def _span(source: Source) -> _Span | None:
    """The span of a source that is a parameter or a one-to-one view of a part of one; None for anything else.

    For such a source the inner products of rows are those of the parameter's rows, so no mapping back is needed.
    """
    if len(source.leaves) != 1:
        return None
    tensor, leaf = source.tensor, next(iter(source.leaves.values()))
    reach = sum((size - 1) * step for size, step in zip(leaf.shape, leaf.stride(), strict=True))
    if leaf.numel() and reach != leaf.numel() - 1:  # with gaps, or entries that share memory
        return None
    if tensor is leaf:
        return _Span(0, max(0, leaf.numel() - 1), (0, tuple(leaf.shape), leaf.stride()))
    if tensor.dtype != leaf.dtype or tensor.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr():
        return None
    reach = 0
    for step, size in sorted(
        (step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ):
        if step <= reach:  # one-to-one only if each axis steps over all that the faster ones cover
            return None
        reach += step * (size - 1)
    first = tensor.storage_offset() - leaf.storage_offset()
    return _Span(int(first), int(first + reach), (first, tuple(tensor.shape), tensor.stride()))


def _share(a: _Span | None, b: _Span | None) -> bool:
    """Whether two sources that have a leaf in common have entries of it in common."""
    if a is None or b is None:
        return True
    return a.first <= b.last and b.first <= a.last


def _joinable(factors: Sequence[Factor]) -> bool:
    first = factors[0]
    if len(factors) == 1:
        return True
    if isinstance(first, Outer):
        kinds = {(f.inputs_first, f.inputs.shape[1]) if isinstance(f, Outer) else None for f in factors}
        return len(kinds) == 1
    return all(isinstance(f, Rows) for f in factors)


def _join(factors: Sequence[Factor]) -> Factor:
    """The sum of factors of one parameter: outer products are more positions, rows are added."""
    first = factors[0]
    if len(factors) == 1:
        return first
    if isinstance(first, Outer):
        return replace(
            first,
            inputs=torch.cat([f.inputs for f in factors], 2),  # pyright: ignore[reportAttributeAccessIssue]
            cotangents=torch.cat([f.cotangents for f in factors], 3),  # pyright: ignore[reportAttributeAccessIssue]
        )
    return Rows(Total(tuple(factors)).rows())
