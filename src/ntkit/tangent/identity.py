"""What a kernel is of, as digests and words that are the same in another process and on another day."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from ntkit.tangent.examples import Batch, Examples

# Examples read at once; the digest depends on it.
BATCH = 1024


def describe(value: Any) -> str:
    """An object in words without addresses; functions by their code, so that an edited one is another one."""
    if isinstance(value, FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        bound = "".join(f", {describe(item)}" for item in [*inner, *(value.__defaults__ or ())])
        return f"{value.__qualname__}<{_code(value.__code__)[:16]}{bound}>"
    if isinstance(value, functools.partial):
        items = [value.func, *value.args, *value.keywords.items()]
        return f"partial({', '.join(map(describe, items))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{f.name}={describe(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__qualname__}({', '.join(fields)})"
    if isinstance(value, Tensor):
        return f"tensor<{digest([value])[:16]}>"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(describe, value))})"
    return _without_addresses(repr(value))


def architecture(model: nn.Module) -> str:
    """SHA-256 of a model's modules, their settings and the code of their `forward`."""
    found = hashlib.sha256(_without_addresses(repr(model)).encode())
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        forward = getattr(kind.forward, "__code__", None)
        ours = not kind.__module__.startswith("torch.nn.")  # torch's may differ between versions that compute the same
        code = _code(forward) if ours and forward is not None else ""
        found.update(f"{kind.__qualname__} {code};".encode())
    return found.hexdigest()


def content(examples: Examples) -> str:
    """SHA-256 of all examples, whatever holds them. Cost: one read."""
    found = hashlib.sha256(f"{len(examples)};".encode())
    for start in range(0, len(examples), BATCH):
        batch = examples.batch(slice(start, start + BATCH))
        found.update(digest(_members(batch)).encode())
    return found.hexdigest()


def digest(values: list[Any]) -> str:
    """SHA-256 of tensors, by type, shape and bytes, and of other values, by their words."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            found.update(f"{tuple(plain.shape)} {plain.dtype};".encode())
            found.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
        else:
            found.update(describe(value).encode())
    return found.hexdigest()


def _members(batch: Batch) -> list[Any]:
    named = [item for pair in sorted(batch.keywords.items(), key=lambda pair: pair[0]) for item in pair]
    return [*batch.arguments, *named, batch.targets]


def _code(code: CodeType) -> str:
    found = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, frozenset):
            constant = sorted(map(repr, constant))  # their order changes from process to process
        found.update((_code(constant) if isinstance(constant, CodeType) else repr(constant)).encode())
    found.update(" ".join(code.co_names).encode())
    return found.hexdigest()


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
