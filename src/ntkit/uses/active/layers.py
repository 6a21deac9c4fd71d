"""What comes into the layers of a network, from one pass over the points."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
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


def layer_inputs(tangent: Tangent, x: Any, names: Sequence[str] | None = None, last: int = 0) -> Seen:
    """Pass over all points once.

    Args:
        tangent: the network.
        x: the n points.
        names: of modules; all linear and convolution modules that see each example once by default.
        last: so many of them, the last that are called; 0 for all.

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
    tangent.check(x)  # before anybody takes notes: its batches are others
    notes = _Notes(len(tangent.examples(x)), names or ())
    hooks = [
        module.register_forward_pre_hook(partial(notes.take, name), with_kwargs=True)
        for name, module in watched.items()
    ]
    hooks.append(tangent.model.register_forward_hook(notes.close))
    try:
        outputs = tangent.outputs(x, batch=BATCH).detach().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return Seen({name: torch.cat(notes.parts[name]) for name in list(notes.parts)[-last:]}, outputs)


class _Notes:
    """What comes into modules, batch by batch; of those that do not see each example once nothing is kept."""

    def __init__(self, n: int, wanted: Sequence[str]) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self._n, self._wanted = n, wanted
        self._done, self._now, self._calls = 0, {}, Counter()

    def take(self, name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before a module."""
        self._calls[name] += 1
        x = incoming(inputs, named)
        if isinstance(x, Tensor) and x.ndim > 1:
            self._now[name] = _pooled(x.detach(), module)

    def close(self, *_: Any) -> None:
        """A hook after the network: the end of a batch."""
        size = min(BATCH, self._n - self._done)
        whole = {name: part for name, part in self._now.items() if len(part) == size and self._calls[name] == 1}
        lost = [name for name in self._wanted if name not in whole]
        if lost:
            raise ModelError(f"the module {lost[0]!r} does not see each example once: name others, or none")
        if not self._done:
            self.parts = {name: [] for name in whole}
        self.parts = {name: column for name, column in self.parts.items() if name in whole}
        for name, column in self.parts.items():
            column.append(whole[name].cpu())
        self._done, self._now, self._calls = self._done + size, {}, Counter()


def incoming(inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The first thing that comes into a module, by place or by name; None if there is nothing."""
    return next(iter((*inputs, *named.values())), None)


def _pooled(x: Tensor, module: nn.Module) -> Tensor:
    """Averaged over all axes but examples and channels: the second axis for convolutions, the last for others.

    A copy, since a network may go on to overwrite what it gave to a layer.
    """
    if x.ndim == 2:
        return x.clone()
    return x.mean(tuple(range(2, x.ndim)) if isinstance(module, CONVOLUTIONS) else tuple(range(1, x.ndim - 1)))
