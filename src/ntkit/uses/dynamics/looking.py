"""What a network says about some examples, in evaluation mode and without derivatives; as cheap as it can be had."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError, NtkitError
from ntkit.tangent.readout import logits
from ntkit.tangent.untouched import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable

    from ntkit.tangent.examples import Batch, Examples
    from ntkit.tangent.readout import Select


def said(model: nn.Module, examples: Examples, select: Select | None, batch: int) -> Tensor:
    """Logits (n, C), on the network's device. The model and the random numbers are left as they are.

    Raises:
        InputError: if the network fails on the examples, or its output is no (n, C) tensor.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    run = channels_last(model) if device.type == "cpu" else model
    with evaluating(model), torch.no_grad():  # inference mode would spoil what a model caches
        parts = [
            logits(call(run, examples.batch(slice(start, start + batch), device)), select)
            for start in range(0, len(examples), batch)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def channels_last(model: nn.Module) -> Callable[..., Any]:
    """The model with copies of its filters in the order of axes in which a processor convolves and pools fastest.

    The same numbers but for rounding; a forward pass of a small network of convolutions costs less than half. The
    model's own filters are not touched.
    """
    filters: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}  # of each filter one, also where several modules share it: torch wants the same then
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and "weight" in module._parameters:
            if id(module.weight) not in copies:
                copies[id(module.weight)] = module.weight.detach().to(memory_format=torch.channels_last)
            filters[f"{name}.weight" if name else "weight"] = copies[id(module.weight)]
    if not filters or isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):  # compiled: as it is
        return model
    return lambda *arguments, **keywords: torch.func.functional_call(model, filters, arguments, keywords)


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """The model's output, with torch's complaint about a shape or type in words.

    Raises:
        InputError: if the model fails on the examples.
        NtkitError: as the model's own code raises it.
        OutOfMemoryError: of torch, as it is.
    """
    try:
        return batch.call(model)
    except (NtkitError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [tuple(t.shape) for t in batch.tensors()]
        raise InputError(
            f"the network fails on examples of shape {', '.join(map(str, shapes))}, expected such as it is trained on: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_independent(model: nn.Module) -> None:
    """Refuse networks whose outputs depend on the other examples even in evaluation mode.

    Raises:
        ModelError: naming the modules.
    """
    mixing = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
    if mixing:
        raise ModelError(
            f"{', '.join(mixing[:4])}: without running statistics BatchNorm mixes the probes, and what is said about "
            "one depends on the others. Make it with track_running_stats=True, or take GroupNorm"
        )


def as_step(step: Any) -> int:
    """A number of updates done.

    Raises:
        InputError: if it is not a whole number >= 0.
    """
    try:
        found = operator.index(step)
    except TypeError:
        raise InputError(f"step: got {step!r}, expected the number of updates done, a whole number >= 0") from None
    if found < 0:
        raise InputError(f"step: got {step!r}, expected the number of updates done, >= 0")
    return found
