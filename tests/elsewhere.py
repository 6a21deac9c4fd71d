"""A device that is not the CPU, on any machine: its tensors refuse to be mixed with those of the CPU, as a GPU's do.

`torch.device("meta")` stands for it. Inside `device()` what is moved or made there keeps its numbers, on the CPU in
truth, and every operation that a GPU would refuse for tensors on two devices is an error.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_aten = torch.ops.aten
# What takes tensors of two devices: copies, and numbers of rows.
_ROWS = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)
_MIXED = (_aten.copy_.default, _aten._to_copy.default, *_ROWS)


class Away(Tensor):
    """A tensor on that device."""

    plain: Tensor
    is_meta = False  # there are numbers in it

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        made.plain = inner
        return made

    def __getitem__(self, index: Any) -> Tensor:
        # torch makes a tensor of a list on the device below what can be seen here
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def tolist(self) -> list[Any]:
        return self.plain.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor on a device has no array: copy it to the CPU")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def device() -> TorchDispatchMode:
    """Where the device is there."""
    return _Device()


def moved(model: nn.Module) -> nn.Module:
    """A copy of a network without buffers on the device."""
    found = copy.deepcopy(model)
    for module in found.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(DEVICE))
    return found


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = tree_flatten((args, kwargs))[0]
    away = any(isinstance(t, Away) for t in flat)
    here = any(isinstance(t, Tensor) and not isinstance(t, Away) and t.ndim > 0 for t in flat)
    if away and here and (func not in _MIXED or (func in _ROWS and not isinstance(args[0], Away))):
        raise RuntimeError(f"{func} has tensors on two devices")
    wanted = kwargs.get("device")
    stays = away if wanted is None else torch.device(wanted) == DEVICE
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args_, kwargs_ = tree_map(lambda t: t.plain if isinstance(t, Away) else t, (args, kwargs))
    found = func(*args_, **kwargs_)
    for given, plain in zip((*args[:1], kwargs.get("out")), (*args_[:1], kwargs_.get("out")), strict=True):
        if found is plain and plain is not None:
            return given  # what was changed in its place
    return tree_map(lambda t: Away(t) if isinstance(t, Tensor) and stays else t, found)
