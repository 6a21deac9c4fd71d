"""What comes into the layers of a network, from one pass over the points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ntkit.tangent.linearize import Tangent

# Examples of one forward pass.
BATCH = 256
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True)
class Seen:
    """One pass.

    Attributes:
        inputs: of every layer by name, averaged over all axes but examples and channels, (n, channels); in the order in
            which the layers are called.
        outputs: of the network, (n, C).
    """

    inputs: dict[str, Tensor]
    outputs: Tensor


def layer_inputs(tangent: Tangent, x: Any, names: Sequence[str] | None = None) -> Seen:
    """Pass over all points once.

    Args:
        tangent: the network.
        x: the n points.
        names: of modules; all linear and convolution modules that see each example once by default.

    Raises:
        ModelError: if there is no such module, or one that is named does not see each example once.
    """
    modules = dict(tangent.model.named_modules())
    unknown = [name for name in names or () if name not in modules]
    if unknown:
        raise ModelError(
            f"the network has no module {unknown[0]!r}: expected some of {', '.join(filter(None, modules))}"
        )
    watched = {n: m for n, m in modules.items() if (isinstance(m, LAYERS) if names is None else n in names)}
    found: dict[str, Tensor] = {}
    hooks = [module.register_forward_pre_hook(_Note(name, found)) for name, module in watched.items()]
    examples, outputs = tangent.examples(x), []
    parts: dict[str, list[Tensor]] = {}
    try:
        for start in range(0, len(examples), BATCH):
            stop = min(start + BATCH, len(examples))
            outputs.append(tangent.outputs(examples.pick(range(start, stop)), batch=BATCH).detach().cpu())
            whole = {name: part for name, part in found.items() if len(part) == stop - start}
            lost = [name for name in names or () if name not in whole]
            if lost:
                raise ModelError(f"the module {lost[0]!r} does not see each example once: name others, or none")
            if start == 0:
                parts = {name: [] for name in whole}
            for name in [name for name in parts if name not in whole]:
                del parts[name]
            for name, column in parts.items():
                column.append(whole[name].cpu())
            found.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return Seen({name: torch.cat(column) for name, column in parts.items()}, torch.cat(outputs))


class _Note:
    """A hook that keeps what comes into a module."""

    def __init__(self, name: str, found: dict[str, Tensor]) -> None:
        self.name, self.found = name, found

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim > 1:
            self.found[self.name] = _pooled(inputs[0].detach(), module)


def _pooled(x: Tensor, module: nn.Module) -> Tensor:
    """Averaged over all axes but examples and channels: the second axis for convolutions, the last for others."""
    if x.ndim == 2:
        return x
    return x.mean(tuple(range(2, x.ndim)) if isinstance(module, CONVOLUTIONS) else tuple(range(1, x.ndim - 1)))
