"""The derivatives of one batch, parameter by parameter, and the Gram matrix of two batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ntkit.tangent.capture import Source
from ntkit.tangent.factors import SCRATCH, Factor, Outer, Rows, rows_gram


@dataclass(frozen=True, eq=False)
class Term:
    """One use's contribution: a factor, and the parameter or derived tensor that it is the gradient of."""

    source: Source
    factor: Factor

    def narrow(self, start: int, stop: int) -> Term:
        """The same for examples start:stop."""
        return Term(self.source, self.factor.narrow(start, stop))

    def leaf_rows(self) -> dict[str, Tensor]:
        """Rows (n, k, *shape) of each parameter behind the source."""
        rows = self.factor.rows()
        if self.source.is_leaf:
            return {next(iter(self.source.leaves)): rows}
        return _pull_back_rows(self.source, rows)


def _pull_back_rows(source: Source, rows: Tensor) -> dict[str, Tensor]:
    """Rows with respect to a derived tensor as rows of the parameters it is made of, by batched backward passes."""
    n, k = rows.shape[:2]
    flat = rows.reshape(n * k, *source.tensor.shape)
    leaves = list(source.leaves.values())
    try:
        grads = torch.autograd.grad(
            source.tensor, leaves, flat, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation that torch cannot vectorize
        single = [
            torch.autograd.grad(source.tensor, leaves, row, retain_graph=True, allow_unused=True) for row in flat
        ]
        grads = [None if column[0] is None else torch.stack(column) for column in zip(*single, strict=True)]
    return {
        name: rows.new_zeros(n, k, *leaf.shape) if grad is None else grad.view(n, k, *leaf.shape)
        for (name, leaf), grad in zip(source.leaves.items(), grads, strict=True)
    }


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
    if tensor is leaf:
        return _Span(0, max(0, leaf.numel() - 1), (0, leaf.shape, leaf.stride()))
    if tensor.dtype != leaf.dtype or tensor.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr():
        return None
    sizes = [(step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    reach = 0
    for step, size in sorted(sizes):  # one-to-one if each axis steps over all that the faster ones cover
        if step <= reach:
            return None
        reach += step * (size - 1)
    first = tensor.storage_offset() - leaf.storage_offset()
    return _Span(first, first + reach, (first, tensor.shape, tensor.stride()))


@dataclass(frozen=True)
class Part:
    """Terms that must be contracted together because their sources share parameters.

    Attributes:
        terms: places in the list of terms.
        direct: whether the factors' own inner products are those of the parameters.
        names: the parameters.
    """

    terms: tuple[int, ...]
    direct: bool
    names: tuple[str, ...]


def partition(terms: Sequence[Term]) -> list[Part]:
    """The smallest groups of terms without shared parameter entries between them."""
    spans = [_span(term.source) for term in terms]
    groups: list[list[int]] = []
    for i, term in enumerate(terms):
        touching = [g for g in groups if any(_share(terms[j], spans[j], term, spans[i]) for j in g)]
        groups = [g for g in groups if g not in touching]
        groups.append(sorted([*(j for g in touching for j in g), i]))
    parts = []
    for group in sorted(groups):
        names = tuple(dict.fromkeys(name for i in group for name in terms[i].source.leaves))
        alike = {spans[i].geometry if spans[i] else None for i in group}  # pyright: ignore[reportOptionalMemberAccess]
        direct = len(alike) == 1 and None not in alike and (len(group) == 1 or _joinable([terms[i] for i in group]))
        parts.append(Part(tuple(group), direct, names))
    return parts


def _share(a: Term, a_span: _Span | None, b: Term, b_span: _Span | None) -> bool:
    if not set(a.source.leaves) & set(b.source.leaves):
        return False
    if a_span is None or b_span is None:
        return True
    return a_span.first <= b_span.last and b_span.first <= a_span.last


def _joinable(terms: Sequence[Term]) -> bool:
    first = terms[0].factor
    if isinstance(first, Outer):
        return all(
            isinstance(t.factor, Outer)
            and t.factor.inputs_first == first.inputs_first
            and t.factor.inputs.shape[1] == first.inputs.shape[1]
            for t in terms
        )
    return all(isinstance(t.factor, Rows) for t in terms)


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
    total = factors[0].rows().clone()
    for factor in factors[1:]:
        total += factor.rows()
    return Rows(total)


@dataclass(frozen=True, eq=False)
class Derivatives:
    """All per-example gradients of a batch, in factored form.

    Attributes:
        outputs: the scalars (n, k).
        terms: one per use and parameter; the same in number and order for every batch of one model.
        parts: their grouping, the same for every batch.
    """

    outputs: Tensor
    terms: list[Term]
    parts: list[Part]

    @property
    def examples(self) -> int:
        """Number of examples n."""
        return self.outputs.shape[0]

    @property
    def scalars(self) -> int:
        """Number of scalars k per example."""
        return self.outputs.shape[1]

    def narrow(self, start: int, stop: int) -> Derivatives:
        """The same for examples start:stop."""
        return Derivatives(self.outputs[start:stop], [t.narrow(start, stop) for t in self.terms], self.parts)

    def grams(self, other: Derivatives, *, trace: bool, scratch: int = SCRATCH) -> Iterator[tuple[Part, Tensor]]:
        """For each part, inner products of rows: (n, k, m, l), or summed over k = l: (n, m)."""
        for part in self.parts:
            if part.direct:
                left = self.joined[part]
                right = left if other is self else other.joined[part]
                yield part, left.gram(right, trace=trace, scratch=scratch)
            else:
                yield part, rows_gram([self._pairs(part, name, other) for name in part.names], trace=trace)

    def named_grams(self, other: Derivatives, *, trace: bool, scratch: int = SCRATCH) -> Iterator[tuple[str, Tensor]]:
        """The same, one for each parameter by name; a name can come several times (its parts add up)."""
        for part in self.parts:
            if len(part.names) == 1:
                alone = replace(self, parts=[part])
                yield part.names[0], next(alone.grams(other, trace=trace, scratch=scratch))[1]
            else:
                for name in part.names:
                    yield name, rows_gram([self._pairs(part, name, other)], trace=trace)

    def gram(self, other: Derivatives, *, trace: bool = False, scratch: int = SCRATCH) -> Tensor:
        """The kernel of two batches: (n*k, m*k) example-major, or with `trace` (n, m), the mean over k."""
        n, k, m = self.examples, self.scalars, other.examples
        total = self.outputs.new_zeros((n, m) if trace else (n, k, m, k))
        for _, gram in self.grams(other, trace=trace, scratch=scratch):
            total += gram
        return total.div_(k) if trace else total.view(n * k, m * k)

    def squared_norms(self, scratch: int = SCRATCH) -> Tensor:
        """The kernel's diagonal as (n, k)."""
        total = torch.zeros_like(self.outputs)
        for part in self.parts:
            if part.direct:
                total += self.joined[part].squared_norms(scratch)
            else:
                for name in part.names:
                    for left, _ in self._pairs(part, name, self):
                        total += left.flatten(2).square().sum(2)
        return total

    def rows(self, names: Sequence[str], shapes: Sequence[torch.Size]) -> Tensor:
        """The Jacobian (n, k, P) over the named parameters, in their order."""
        n, k = self.examples, self.scalars
        columns = {name: self.outputs.new_zeros(n, k, *shape) for name, shape in zip(names, shapes, strict=True)}
        for term in self.terms:
            for name, rows in term.leaf_rows().items():
                columns[name] += rows.reshape(columns[name].shape)
        return torch.cat([column.reshape(n, k, -1) for column in columns.values()], 2)

    @cached_property
    def joined(self) -> dict[Part, Factor]:
        """One factor for each direct part."""
        return {part: _join([self.terms[i].factor for i in part.terms]) for part in self.parts if part.direct}

    def _pairs(self, part: Part, name: str, other: Derivatives) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of one parameter summed over the terms of a part, for both batches, in blocks where possible."""
        mine = [self.terms[i] for i in part.terms if name in self.terms[i].source.leaves]
        theirs = [other.terms[i] for i in part.terms if name in self.terms[i].source.leaves]
        if all(term.source.is_leaf for term in mine):
            shape = mine[0].source.tensor.shape
            height = shape[0] if len(shape) else 1
            each = prod(shape[1:]) * (self.examples * self.scalars + other.examples * other.scalars) * 4
            step = max(1, min(height, SCRATCH // max(1, each)))
            for start in range(0, height, step):
                stop = min(start + step, height)
                left = sum_of([t.factor.rows(start, stop) for t in mine])
                yield left, left if other is self else sum_of([t.factor.rows(start, stop) for t in theirs])
        else:
            left = sum_of([t.leaf_rows()[name] for t in mine])
            yield left, left if other is self else sum_of([t.leaf_rows()[name] for t in theirs])


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, without a copy where there is only one."""
    total = tensors[0]
    for t in tensors[1:]:
        total = total + t
    return total
