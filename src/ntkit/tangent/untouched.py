"""Working with a model and leaving it as it was."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ntkit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a model's plain Python path, and give back buffers and global switches as they were, also after an error.

    Fused attention kernels and compiled code hide the operations that a kernel has to see, so both are switched off
    inside; so are inference mode, which has no derivatives, and autocast around the call, which would round them.
    Buffers can change in a forward pass (power iteration, counters); they are restored from copies.
    """
    buffers = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if isinstance(buffer, Tensor)
    ]
    fused, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    random = torch.get_rng_state()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            torch.backends.cudnn.enabled = False  # its recurrent layers have no derivative in evaluation mode
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with (
            torch.compiler.set_stance("force_eager"),
            plain_precision(device),
            torch.inference_mode(False),  # which switches gradients by itself, and so comes before them
            torch.enable_grad(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.backends.cudnn.enabled = cudnn
        torch.set_rng_state(random)
        known = {(id(module), name) for module, name, *_ in buffers}
        for module in model.modules():
            for name in [n for n, b in module._buffers.items() if b is not None and (id(module), n) not in known]:
                del module._buffers[name]  # made by the forward pass
        with torch.no_grad():
            for module, name, buffer, version, copy in buffers:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(copy)


@contextmanager
def fixed(model: nn.Module) -> Iterator[None]:
    """The same of a model that must be a fixed function of each example, whatever was done to it since it was taken.

    Raises:
        ModelError: see `check_evaluation`.
    """
    check_evaluation(model)
    with untouched(model):
        yield


def plain_precision(device: torch.device) -> AbstractContextManager[object]:
    """Products in the types of their operands, whatever the caller casts automatically."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode inside; outside, also after an error, each and the random numbers as they were."""
    modes = [(module, module.training) for module in model.modules()]
    random = torch.get_rng_state()
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        torch.set_rng_state(random)


def check_evaluation(model: nn.Module) -> None:
    """Refuse modules whose training-mode behaviour makes a per-example derivative meaningless.

    Raises:
        ModelError: naming every BatchNorm that uses the batch's statistics, every active Dropout, and every module in
            training mode whose own code asks for the mode, as stochastic depth does: a trial of a few examples may not
            meet what it drops.
    """
    mixing, random, asking = [], [], []
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training or module.running_mean is None:
                mixing.append(label)
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            if module.training and module.p > 0:
                random.append(label)
        elif isinstance(module, nn.RNNBase) and module.training and module.dropout > 0:
            random.append(label)
        elif isinstance(module, nn.MultiheadAttention) and module.training and module.dropout > 0:
            random.append(label)
        elif module.training and _asks_for_the_mode(module):
            asking.append(label)
    if mixing or random or asking:
        causes = []
        if mixing:
            causes.append("batch statistics make an output depend on the other examples: " + _first(mixing))
        if random:
            causes.append("dropout is active: " + _first(random))
        if asking:
            causes.append("in training mode, and its forward looks at self.training: " + _first(asking))
        raise ModelError(
            f"the tangent kernel of this model is not defined: {'; '.join(causes)}. "
            "Call model.eval() first (BatchNorm then uses its running statistics)"
        )


def _asks_for_the_mode(module: nn.Module) -> bool:
    """Whether a forward that is not torch's own, whose modules are known, reads `training`."""
    forward = inspect.unwrap(module.forward)
    code = getattr(forward, "__code__", None)
    own = getattr(forward, "__module__", None) or ""
    return code is not None and not own.startswith("torch.") and "training" in code.co_names


def _first(labels: list[str], most: int = 4) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more
