"""Contractions of two batches of sums of outer products that do not form a row.

Index letters as in `factors`: n, m examples; k, l scalars; t, s positions; i input and o output features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ntkit.tangent.grain import grain
from ntkit.tangent.products import gram, inner
from ntkit.tangent.work import Way

if TYPE_CHECKING:
    from torch import Tensor

    from ntkit.tangent.factors import Outer
    from ntkit.tangent.workspace import Workspace


def contract(left: Outer, right: Outer, way: Way, *, trace: bool, workspace: Workspace) -> Tensor:
    """Inner products of all rows, (n, k, m, l) or with `trace` (n, m), in any way but by rows."""
    if way is Way.CARRIED:
        return carried_gram(left, right, workspace=workspace)
    if left.work.single and right.work.single:
        cotangents, inputs = single_products(left, right, trace=trace, workspace=workspace)
        return cotangents * inputs
    return pairs_gram(left, right, trace=trace, workspace=workspace)


def inner_or_gram(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows; if both are the same rows, of little more than half of them."""
    same = left.data_ptr() == right.data_ptr() and left.shape == right.shape and left.stride() == right.stride()
    return gram(left) if same else inner(left, right)


def single_products(left: Outer, right: Outer, *, trace: bool, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """G G^T and A A^T for one position: their elementwise product is the Gram matrix.

    G G^T is left in the workspace: a weight and its bias have it in common.
    """
    g, h = left.cotangents, right.cotangents
    key = (*((c.data_ptr(), c.shape, c.stride()) for c in (g, h)), trace)
    if key not in workspace.shared:
        gg = inner_or_gram(g.reshape(g.shape[0], -1), h.reshape(h.shape[0], -1)) if trace else _cotangent_products(g, h)
        workspace.shared.clear()
        workspace.shared[key] = (gg, g, h)
    gg = workspace.shared[key][0]
    a, b = left.inputs.reshape(g.shape[0], -1), right.inputs.reshape(h.shape[0], -1)
    aa = a * b.T if a.shape[1] == 1 else inner_or_gram(a, b)
    return gg, aa if trace else aa[:, None, :, None]


def _cotangent_products(g: Tensor, h: Tensor) -> Tensor:
    """(n, k, m, l) of one position. What came together has its scalars outermost in memory, and is multiplied so."""
    turned = [c.stride(0) < c.stride(1) for c in (g, h)]
    g, h = (c.transpose(0, 1) if turn else c for c, turn in zip((g, h), turned, strict=True))
    gg = inner_or_gram(g.flatten(0, 1).flatten(1), h.flatten(0, 1).flatten(1)).view(*g.shape[:2], *h.shape[:2])
    gg = gg.transpose(0, 1) if turned[0] else gg
    return gg.transpose(2, 3) if turned[1] else gg


def pairs_gram(left: Outer, right: Outer, *, trace: bool, workspace: Workspace) -> Tensor:
    """sum_ts (a_t . a_s)(g_t . g_s), a strip of left examples at a time so that the pairs fit the workspace."""
    same = left is right
    n, k, t = left.examples, left.scalars, left.positions
    m, l, s = right.examples, right.scalars, right.positions  # noqa: E741
    out = left.inputs.new_zeros((n, m) if trace else (n, k, m, l))
    room = workspace.nbytes // (3 * left.inputs.element_size())
    for group in range(left.inputs.shape[1]):
        b, h = right.inputs[:, group], right.cotangents[:, :, group]  # m s i, m l s o
        for start, stop in left.work.strips(right.work, trace=trace, same=same, entries=room):
            first = start if same else 0  # pairs with the examples before are in earlier strips
            count, others = stop - start, m - first
            aa = inner(left.inputs[start:stop, group].reshape(count * t, -1), b[first:].reshape(others * s, -1))
            g = left.cotangents[start:stop, :, group]  # n k t o
            if trace:  # the scalars are summed over, so they are more features of the cotangent
                gg = inner(g.transpose(1, 2).reshape(count * t, -1), h[first:].transpose(1, 2).reshape(others * s, -1))
                out[start:stop, first:] += aa.mul_(gg).view(count, t, others, s).sum((1, 3))
            else:
                gg = inner(g.reshape(count * k * t, -1), h[first:].reshape(others * l * s, -1))
                gg = gg.view(count, k, t, others, l, s).mul_(aa.view(count, 1, t, others, 1, s))
                out[start:stop, :, first:] += gg.sum((2, 5))
    return mirrored(out) if same else out


def carried_gram(left: Outer, right: Outer, *, workspace: Workspace) -> Tensor:
    """sum_s (sum_t (a_t . a_s) g_t) . g_s: the cotangents of many examples carried to the positions of one other.

    Among the same examples only those before it are.
    """
    same = left is right
    n, k = left.examples, left.scalars
    m, l, s = right.examples, right.scalars, right.positions  # noqa: E741
    o = left.cotangents.shape[4]
    positions_last = left.cotangents.stride(4) != 1  # in memory, as convolutions have them: kept so
    out = left.inputs.new_zeros(n, k, m, l)
    step = max(1, min(workspace.nbytes, grain(left.inputs.device).carried) // (left.inputs.element_size() * k * s * o))
    for group in range(left.inputs.shape[1]):
        cotangents = left.cotangents[:, :, group].flatten(0, 1)  # nk t o
        for j in range(m):
            last = j + 1 if same else n
            h = right.cotangents[j, :, group]
            h = (h.transpose(1, 2) if positions_last else h).reshape(l, s * o)
            for start in range(0, last, step):
                stop = min(start + step, last)
                count = stop - start
                aa = inner(left.inputs[start:stop, group].flatten(0, 1), right.inputs[j, group])
                aa = aa.view(count, 1, -1, s).expand(-1, k, -1, -1).flatten(0, 1)  # nk t s
                g = cotangents[start * k : stop * k]
                factors = (g.transpose(1, 2), aa) if positions_last else (aa.transpose(1, 2), g)
                carried = workspace.take(0, (count * k, o, s) if positions_last else (count * k, s, o), aa)
                torch.bmm(*factors, out=carried)
                out[start:stop, :, j] += (carried.view(count * k, s * o) @ h.T).view(count, k, l)
    return mirrored(out) if same else out


def mirrored(out: Tensor) -> Tensor:
    """The whole of a symmetric matrix of which what is above the diagonal has been computed."""
    matrix = out.view(out.shape[0] * (out.shape[1] if out.ndim == 4 else 1), -1)
    return (matrix.triu() + matrix.triu(1).T).view_as(out)
