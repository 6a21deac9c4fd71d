"""The rule for operations without structure: differentiate the one operation, example by example.

Exact for any operation that treats examples alone, and cheap for elementwise ones. It needs no knowledge of the
operation: each tensor is cut to one example (keeping its example axis, of that example's length), and the operation is
differentiated with respect to the parameter only.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkit.tangent.factors import Rows
from ntkit.tangent.rules.registry import Contributions, Operand, Use, rule
from ntkit.tangent.structure import flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Operations for which this rule is as good as one of their own.
_NAMES = """
    add sub mul div true_divide subtract multiply divide rsub neg pow where lerp addcmul maximum minimum
    cat concat concatenate stack hstack vstack bmm baddbmm addbmm einsum tensordot bilinear
    embedding_bag dot mv masked_fill masked_scatter index_add scatter_add index_copy index_put softplus
    sigmoid exp tanh clamp atan2 gather index_select take_along_dim chain_matmul addmv outer kron cross
    logaddexp hypot floor_divide matmul mm repeat repeat_interleave tile broadcast_to expand_as setitem
    getitem
"""

_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _operations() -> Iterator[Any]:
    owners = (torch, torch.Tensor, torch.nn.functional)
    for name in _NAMES.split():
        for form in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__", f"__{name.replace('_', '')}__"):
            yield from (getattr(owner, form) for owner in owners if hasattr(owner, form))
    yield from (torch.Tensor.__truediv__, torch.Tensor.__rtruediv__, torch.Tensor.__itruediv__)


@rule(*_operations())
def local(use: Use, *_: Any, **__: Any) -> Contributions:
    """Rows by vector-Jacobian products of this one operation, vectorized over examples where torch can."""
    operands, rebuild = flatten((use.arguments, use.keywords))
    wrapped = [o for o in operands if isinstance(o, Operand)]
    chosen = [o for o in wrapped if o.selected]
    moving = [o for o in wrapped if not o.selected and o.axis is not None]
    live = [j for j, g in enumerate(use.cotangents) if g is not None]

    # An index that is out of range for a single example is an error on a CPU, which says that the examples cannot be
    # told apart; on a GPU it is the end of all work of the process.
    home = use.cotangents[live[0]].device  # pyright: ignore[reportOptionalMemberAccess]
    indexed = any(o.tensor.dtype in _INDICES for o in wrapped)
    device = torch.device("cpu") if indexed else home

    def here(tensor: Tensor) -> Tensor:
        return tensor.to(device) if indexed else tensor

    def run(parameters: tuple[Tensor, ...], slices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs that have cotangents, for the given parameters and the given values of what moves."""
        new = {id(o): t for o, t in zip(chosen, parameters, strict=True)}
        new |= {id(o): t.clone() if use.in_place else t for o, t in zip(moving, slices, strict=True)}
        filled = [new.get(id(o), here(o.tensor)) if isinstance(o, Operand) else o for o in operands]
        arguments, keywords = rebuild(filled)
        result = use.function(*arguments, **keywords)
        outputs = [arguments[0]] if use.in_place else flatten(result)[0]
        return tuple(outputs[j] for j in live)

    parameters = tuple(here(o.tensor.detach()) for o in chosen)
    cotangents = tuple(here(g) for g in use.cotangents if g is not None)
    if not moving:
        rows = _from_constants(use, run, parameters, [use.axes[j] for j in live], cotangents)
    else:
        slices = tuple(here(o.per_example(use.examples)) for o in moving)
        rows: Sequence[Tensor] = ()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's remarks on its own speed are not the user's business here
                rows = _vectorized(run, parameters, slices, cotangents)
            right = _spot_check(run, parameters, slices, cotangents, rows)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
            right = False
        if not right:
            rows = _one_by_one(run, parameters, slices, cotangents)
    return [(o, Rows(r.detach().to(home))) for o, r in zip(chosen, rows, strict=True)]


def _vectorized(
    run: Callable, parameters: tuple[Tensor, ...], slices: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    def one(slices: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pull = torch.func.vjp(lambda *p: run(p, slices), *parameters)[1]
        return torch.func.vmap(pull)(cotangents)

    return torch.func.vmap(one)(slices, cotangents)


def _spot_check(
    run: Callable,
    parameters: tuple[Tensor, ...],
    slices: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    rows: Sequence[Tensor],
) -> bool:
    """The last example by plain autograd. Some of torch's vectorized derivatives are silently wrong (cdist in 2.13)."""
    last = slice(-1, None)
    plain = _one_by_one(run, parameters, tuple(s[last] for s in slices), tuple(g[last] for g in cotangents))
    tolerance = 10 * torch.finfo(rows[0].dtype).eps ** 0.5
    return all(bool((p - r[last]).norm() <= tolerance * p.norm()) for p, r in zip(plain, rows, strict=True))


def _one_by_one(
    run: Callable, parameters: tuple[Tensor, ...], slices: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
) -> list[Tensor]:
    n, k = cotangents[0].shape[:2]
    rows = [p.new_zeros(n, k, *p.shape) for p in parameters]
    for i in range(n):
        with torch.enable_grad():
            leaves = tuple(p.clone().requires_grad_() for p in parameters)
            outputs = run(leaves, tuple(s[i] for s in slices))
        for j in range(k):
            grads = torch.autograd.grad(
                outputs, leaves, tuple(g[i, j] for g in cotangents), retain_graph=True, allow_unused=True
            )
            for row, grad in zip(rows, grads, strict=True):
                if grad is not None:
                    row[i, j] = grad
    return rows


def _from_constants(
    use: Use, run: Callable, parameters: tuple[Tensor, ...], axes: list[Any], cotangents: tuple[Tensor, ...]
) -> list[Tensor]:
    """Parameters spread over the batch without meeting any data: pull back one example's cotangent at a time."""
    with torch.enable_grad():
        leaves = tuple(p.clone().requires_grad_() for p in parameters)
        outputs = run(leaves, ())
    n, k = cotangents[0].shape[:2]
    rows = [p.new_zeros(n, k, *p.shape) for p in parameters]
    for i in range(n):
        for j in range(k):
            masked = [torch.zeros_like(out) for out in outputs]
            for out, axis, g in zip(masked, axes, cotangents, strict=True):
                split = axis.split(out, n)
                if split.data_ptr() != out.data_ptr():
                    raise NotImplementedError("examples do not lie in one piece")
                split[i] = g[i, j]
            grads = torch.autograd.grad(outputs, leaves, masked, retain_graph=True, allow_unused=True)
            for row, grad in zip(rows, grads, strict=True):
                if grad is not None:
                    row[i, j] = grad
    return rows


@rule(torch.prelu, F.prelu)
def prelu(use: Use, input: Operand, weight: Operand) -> Contributions:
    """y = x where x > 0, else w x, with one w or one per channel (axis 1)."""
    if input.selected or input.axis is None or input.axis.axis != 0:
        return NotImplemented
    rows = use.cotangent * input.per_example(use.examples).clamp(max=0).unsqueeze(1)  # n, k, images, channels, *space
    rows = rows.flatten(4).sum((2, 4)) if rows.ndim > 4 else rows.sum(2)
    return [(weight, Rows(rows.sum(2, keepdim=True) if weight.tensor.numel() == 1 else rows))]


@rule(torch.Tensor.expand)
def expand(use: Use, input: Operand, *_: Any) -> Contributions:
    """A parameter spread over the batch, as class tokens are: sum the cotangent over what was spread."""
    g = use.cotangent  # n, k, *one
    shape = tuple(input.tensor.shape)
    padded = (1,) * (g.ndim - 2 - len(shape)) + shape
    spread = [axis + 2 for axis, size in enumerate(padded) if size == 1]
    return [(input, Rows((g.sum(spread, keepdim=True) if spread else g).reshape(*g.shape[:2], *shape)))]
