"""On which side of zero the units of ReLU are, as float64 has it.

In float32 a few units that are almost zero come out on the wrong side: 30 of 690 million for 4,000 images and a CNN.
Each switches a whole gradient on or off, an error as large as the unit's share, where rounding alone makes one of
1e-7; in J^T u of a vector whose gradients nearly cancel that is the largest error by far (measured: 2e-3, and 8e-5
with every unit on its right side). So the units near zero are found once, in float64, and put where they belong.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from ntkit.tangent.examples import Examples
    from ntkit.tangent.linearize import Tangent

# Near zero: of the root mean square of an operation's inputs. Float32 errs by about 1e-6 of it, deep networks by more.
NEAR = 1e-4
_RELU = {torch.ops.aten.relu.default, torch.ops.aten.relu_.default}


class _Near(NamedTuple):
    """The units of one ReLU that are near zero: shape of all, where they stand in the pile, and what is near."""

    shape: torch.Size
    start: int
    stop: int
    bound: float


class _Pile:
    """Numbers of units, in one piece of memory.

    Thousands of small tensors, made between large ones that come and go, would keep the memory of those from being used
    again: 46 MB for each batch of 32 images were measured.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()

    def put(self, numbers: Tensor) -> tuple[int, int]:
        """Add some; gives where they are."""
        start = len(self._bytes)
        self._bytes += numbers.cpu().numpy().tobytes()
        return start, len(self._bytes)

    def get(self, start: int, stop: int) -> Tensor:
        """A copy of some."""
        if start == stop:
            return torch.zeros(0, dtype=torch.int64)
        return torch.frombuffer(bytearray(self._bytes[start:stop]), dtype=torch.int64)


class Sides:
    """The units near zero of a network on batches of examples, found when a batch is first asked for.

    Memory: 8 bytes for each unit near zero, about one in ten thousand.
    """

    def __init__(self, exact: Tangent, examples: Examples) -> None:
        """Look at nothing yet.

        Args:
            exact: the network in float64.
            examples: in its precision.
        """
        self._exact, self._examples = exact, examples
        self._pile = _Pile()
        self._found: dict[tuple[int, int], list[_Near]] = {}

    def of(self, start: int, stop: int) -> AbstractContextManager[Any]:
        """Inside, the network's ReLUs on examples start:stop switch as in float64, in any precision.

        Cost: the first time one forward pass of the examples in float64.
        """
        if (start, stop) not in self._found:
            some = self._examples.pick(range(start, stop))
            self._exact.check(some)  # before anybody looks
            with _Look(self._pile) as look:
                self._exact.outputs(some, batch=stop - start)
            self._found[start, stop] = look.found
        return _Put(self._pile, self._found[start, stop])


class _Look(TorchDispatchMode):
    """Notes the units near zero."""

    def __init__(self, pile: _Pile) -> None:
        super().__init__()
        self.found: list[_Near] = []
        self._pile = pile

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _RELU:
            x = args[0]
            bound = NEAR * float(x.square().mean().sqrt()) if x.numel() else 0.0
            # numbers in the order of the axes, whatever the order in memory; twice, and one more for positive units
            numbers = (x.abs() <= bound).reshape(-1).nonzero()[:, 0]
            positive = x[torch.unravel_index(numbers, x.shape)] > 0
            self.found.append(_Near(x.shape, *self._pile.put(2 * numbers + positive), bound))
        return func(*args, **(kwargs or {}))


class _Put(TorchDispatchMode):
    """Puts the results of ReLU where their sides are; its derivatives go by the result."""

    def __init__(self, pile: _Pile, found: list[_Near]) -> None:
        super().__init__()
        self._pile, self._found, self._next = pile, found, 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _RELU and self._found:
            near = self._found[self._next % len(self._found)]
            if out.shape == near.shape:  # else this is a trial on fewer examples
                self._next += 1
                numbers = self._pile.get(near.start, near.stop).to(out.device)
                places = torch.unravel_index(numbers // 2, out.shape)
                here = out[places]
                right = torch.where(numbers % 2 == 1, here.clamp_min(torch.finfo(out.dtype).tiny), 0.0)
                # a unit that is far from zero here is another one: the run has taken another way
                out[places] = torch.where(here <= 2 * near.bound, right, here)
        return out
