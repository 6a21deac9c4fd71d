"""Products with J: J^T u by one backward pass, and J v, the change of the scalars along a direction of the parameters.

Forward mode costs about twice a forward pass. Not every operation has it, and where a model cuts its graph it may mean
something else than the backward pass that defines the kernel; so it is compared once with the derivative of u -> J^T u,
which works for everything that can be differentiated twice, and left where the two differ. In the same way the faster
order of images in memory is tried before it is used.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkit.tangent.generic import dense
from ntkit.tangent.images import Innermost, matters
from ntkit.tangent.trial import run_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ntkit.tangent.examples import Batch
    from ntkit.tangent.parameters import Selection
    from ntkit.tangent.readout import Readout


def pullback(
    model: nn.Module, selection: Selection, readout: Readout, some: Batch, cotangents: Tensor, *, innermost: bool
) -> Tensor:
    """J^T u, (P,), for cotangents (n, K); `innermost` computes convolutions in the faster order.

    Raises:
        InputError: if the model fails on the examples.
    """
    with selection.differentiable():
        with Innermost() if innermost else nullcontext():
            scalars = readout.scalars(run_model(model, selection, some), some.targets)
        weighted = (scalars * cotangents.to(scalars)).sum()
        grads = torch.autograd.grad(weighted, selection.tensors, allow_unused=True)
    zeroed = (torch.zeros_like(t) if g is None else dense(g) for g, t in zip(grads, selection.tensors, strict=True))
    return torch.cat([grad.detach().reshape(-1) for grad in zeroed])


def try_innermost(model: nn.Module, selection: Selection, readout: Readout, some: Batch) -> tuple[int, bool]:
    """The number of scalars K, and whether the faster order of images gives the same on some examples.

    Raises:
        InputError: if the model fails on the examples.
    """
    with torch.no_grad():
        scalars = readout.scalars(run_model(model, selection, some), some.targets)
    if not matters(selection.tensors):
        return scalars.shape[1], False
    cotangents = torch.randn(scalars.shape, generator=torch.Generator().manual_seed(0)).to(scalars)
    expected = pullback(model, selection, readout, some, cotangents, innermost=False)
    try:
        found = pullback(model, selection, readout, some, cotangents, innermost=True)
    except Exception:  # whatever it is that the model minds, there is another way
        return scalars.shape[1], False
    return scalars.shape[1], _close(found, expected)


def forward_product(
    model: nn.Module, selection: Selection, readout: Readout, some: Batch, directions: Sequence[Tensor]
) -> Tensor:
    """J v by forward mode, (n, K).

    Raises:
        InputError: if the model fails on the examples.
    """
    # of torch's attention kernels only the plain one has a forward derivative
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), Innermost():
        duals = {
            name: forward_ad.make_dual(parameter.detach(), direction.to(parameter.dtype))
            for name, parameter, direction in zip(selection.names, selection.tensors, directions, strict=True)
        }

        def moving(*arguments: Tensor, **keywords: Any) -> Any:
            return functional_call(model, duals, arguments, keywords)

        scalars = readout.scalars(run_model(moving, selection, some), some.targets)
        pushed = forward_ad.unpack_dual(scalars)
        return torch.zeros_like(pushed.primal) if pushed.tangent is None else pushed.tangent.clone()


def backward_product(
    model: nn.Module, selection: Selection, readout: Readout, some: Batch, directions: Sequence[Tensor]
) -> Tensor:
    """J v by two backward passes, the derivative of u -> J^T u, (n, K).

    Raises:
        NotImplementedError: if an operation of the model can be differentiated only once.
        OutOfMemoryError: torch's own.
        InputError: if the model fails on the examples.
    """
    # of torch's attention kernels only the plain one can be differentiated twice
    with selection.differentiable(), sdpa_kernel(SDPBackend.MATH):
        scalars = readout.scalars(run_model(model, selection, some), some.targets)
        weights = torch.zeros_like(scalars, requires_grad=True)
        grads = torch.autograd.grad(scalars, selection.tensors, weights, create_graph=True, allow_unused=True)
        pairs = [(dense(g) * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None]
        if not pairs:
            return torch.zeros_like(scalars).detach()
        try:
            return torch.autograd.grad(torch.stack(pairs).sum(), weights)[0].detach()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a backward pass that leaves no graph behind
            raise NotImplementedError(str(error)) from error


def forward_mode_agrees(model: nn.Module, selection: Selection, readout: Readout, some: Batch) -> bool:
    """Whether both give the same on some examples, along a random direction.

    Raises:
        NotImplementedError: if an operation of the model can be differentiated only once.
        InputError: if the model fails on the examples.
    """
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(t.shape, generator=generator).to(t) for t in selection.tensors]
    expected = backward_product(model, selection, readout, some, directions)
    try:
        found = forward_product(model, selection, readout, some, directions)
    except Exception:  # whatever it is that forward mode cannot do, there is another way
        return False
    return _close(found, expected)


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    error = torch.linalg.vector_norm((found - expected).double())
    size = torch.linalg.vector_norm(expected.double())
    return bool(error <= 100 * torch.finfo(found.dtype).eps * size)
