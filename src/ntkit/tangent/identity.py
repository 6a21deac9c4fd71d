"""What a kernel is of, as digests and words that are the same in another process and on another day.

A model is its tensors (`parameters.fingerprint`), how it is built (`architecture`: modules, and the code of their
methods and of the helpers that these name) and its other values (`settings`: attributes, globals and hooks that a
forward pass reads). What its own code writes while it runs is none of these.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import re
from collections.abc import Mapping, Set
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.tangent.bytecode import code_digest
from ntkit.tangent.reach import DEEPEST, VOICELESS, Reach, closure, hooks, is_known, members, methods

if TYPE_CHECKING:
    from ntkit.tangent.examples import Batch, Examples

# Examples read at once; the digest depends on it.
BATCH = 1024
_IN_THEIR_OWN_WORDS = (
    type(None), bool, int, float, complex, str, bytes, type(...), range, slice,
    torch.dtype, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip


def describe(value: Any) -> str:
    """An object in words without addresses; functions by their code, that of their helpers, and what they read."""
    reach, words = Reach(value), _Words()
    functions, values = _functions(reach), _values(reach, words)
    alone = len(functions) == 1 and not values  # its own code is in its words
    more = "" if alone or not functions + values else f" with <{_joined(functions + values)[:16]}>"
    return words.of(value) + more


def architecture(model: nn.Module) -> str:
    """SHA-256 of a model's modules, the code of all their methods, and that of the helpers which these name.

    Modules and functions of torch, NumPy and Python itself count by name.
    """
    reach, found, numbers = Reach(model), [], {}
    for name, module in model.named_modules(remove_duplicate=False):
        number = numbers.setdefault(id(module), len(numbers))  # a module in two places is not two modules
        known = is_known(type(module).extra_repr)  # those of others may print what changes
        found.append(f"{name} {number} {type(module).__qualname__}({module.extra_repr() if known else ''})")
    code = {
        f"{base.__qualname__}.{n} {_code(f)}" for kind in reach.kinds for base in _own(kind) for n, f in methods(base)
    }
    return _joined(found + sorted(code) + _functions(reach))


def settings(model: nn.Module) -> str:
    """SHA-256 of the values besides parameters and buffers that a forward pass can read and does not write.

    These are attributes of modules and classes, globals, defaults and variables of enclosing functions that are named
    by the code which a forward pass can run, and hooks. Left out is what the same code assigns or changes in place: a
    model that has been called is still the same.
    """
    reach, words, found = Reach(model), _Words(), []
    words.reach = reach
    names = {id(module): name for name, module in model.named_modules()}
    words.names = names
    for name, module in model.named_modules():
        found += [f"{name}.{key} = {words.of(item)}" for key, item in reach.attributes(module).items()]
        found += [f"{name} hook {words.of(hook)}" for hook in hooks(module)]
    return _joined(found + _values(reach, words))


def written_buffers(model: nn.Module) -> set[str]:
    """Names of buffers that are not kept with the model and that calling it can change."""
    reach, found = Reach(model), set()
    for name, module in model.named_modules(remove_duplicate=False):
        passing = module._non_persistent_buffers_set & reach.written(type(module))
        found |= {f"{name}.{key}" if name else key for key in passing}
    return found


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
            found.update(f"{tuple(value.shape)} {value.dtype};".encode())
            if value.layout != torch.strided:
                value = value.to_dense()
            if not value.is_meta and value.numel():
                plain = value.detach().cpu().contiguous().resolve_conj().resolve_neg()
                found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update((value if isinstance(value, str) else describe(value)).encode())
    return found.hexdigest()


class _Words:
    """Values in words. With a `reach`, attributes of objects are those that it says can be read."""

    def __init__(self) -> None:
        self.reach: Reach | None = None
        self.names: dict[int, str] = {}
        self._inside: list[int] = []

    def of(self, value: Any) -> str:
        """One value; what contains itself, and what is inside of too much else, by its type alone."""
        if id(value) in self._inside or len(self._inside) > DEEPEST:
            return type(value).__qualname__
        self._inside.append(id(value))
        try:
            return self._of(value)
        finally:
            self._inside.pop()

    def _of(self, value: Any) -> str:
        for words in (self._plain, self._callable, self._container):
            found = words(value)
            if found is not None:
                return found
        if isinstance(value, VOICELESS):
            return type(value).__qualname__
        if isinstance(value, nn.Module):
            return self._module(value)
        return self.of(value.__wrapped__) if hasattr(value, "__wrapped__") else self._object(value)

    def _plain(self, value: Any) -> str | None:
        """Numbers, text, tensors and arrays."""
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, Tensor):
            return f"tensor<{digest([value])[:16]}>"
        if isinstance(value, torch.device):
            return "device"  # which changes how sums are rounded, and no more
        if isinstance(value, (np.ndarray, np.generic)):
            whole = np.asarray(value)
            if whole.dtype == object:
                return f"array{self.of(whole.tolist())}"
            found = hashlib.sha256(f"{whole.shape} {whole.dtype}".encode() + whole.tobytes())
            return f"array<{found.hexdigest()[:16]}>"
        return repr(value) if isinstance(value, _IN_THEIR_OWN_WORDS) else None

    def _container(self, value: Any) -> str | None:
        if isinstance(value, Mapping):
            items = sorted(f"{self.of(key)}: {self.of(item)}" for key, item in value.items())
            return f"{_kind(value, dict)}{{{', '.join(items)}}}"
        if isinstance(value, Set):
            return f"{_kind(value, set)}{{{', '.join(sorted(map(self.of, value)))}}}"
        if isinstance(value, (tuple, list)):
            return f"{_kind(value, tuple, list)}({', '.join(map(self.of, value))})"
        return None

    def _callable(self, value: Any) -> str | None:
        if isinstance(value, MethodType):
            return f"{self.of(value.__self__)}.{self.of(value.__func__)}"
        if isinstance(value, functools.partial):
            items = [value.func, *value.args, *value.keywords.items()]
            return f"partial({', '.join(map(self.of, items))})"
        if isinstance(value, FunctionType):
            bound = "".join(f", {self.of(item)}" for item in self.bound(value).values())
            return f"{value.__qualname__}<{_code(value)[:16]}{bound}>"
        if isinstance(value, type) and not is_known(value):
            return f"{value.__qualname__}<{_joined([_code(f) for base in _own(value) for _, f in methods(base)])[:16]}>"
        if isinstance(value, (type, BuiltinFunctionType)):
            return value.__qualname__
        return value.__name__ if isinstance(value, ModuleType) else None

    def bound(self, function: FunctionType) -> dict[str, Any]:
        """What a function carries with it: variables of enclosing functions, and defaults."""
        cells = closure(function)
        if self.reach is not None:
            cells = {name: item for name, item in cells.items() if not self.reach.is_written(function, name)}
        defaults = {str(i): item for i, item in enumerate(function.__defaults__ or ())}
        return {**cells, **defaults, **(function.__kwdefaults__ or {})}

    def _module(self, value: nn.Module) -> str:
        if id(value) in self.names:
            return f"module {self.names[id(value)]!r}"
        tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        parts = [f"{name}={self.of(t)}" for name, t in tensors.items()]
        for name, module in value.named_modules():
            reach = self.reach or Reach(value)
            parts += [f"{name} {type(module).__qualname__}", *map(self.of, hooks(module))]
            parts += [f"{name}.{key}={self.of(item)}" for key, item in reach.attributes(module).items()]
        return f"{type(value).__qualname__}({', '.join(parts)})"

    def _object(self, value: Any) -> str:
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
        else:
            fields = dict(sorted(members(value)))
        if self.reach is not None and not is_known(type(value)):
            kept = self.reach.attributes(value)
            fields = {name: item for name, item in fields.items() if name in kept}
        if fields or members(value) or type(value).__repr__ is object.__repr__:
            inner = (f"{name}={self.of(item)}" for name, item in fields.items())
            return f"{type(value).__qualname__}({', '.join(inner)})"
        return _without_addresses(repr(value))


def _functions(reach: Reach) -> list[str]:
    """The code of all functions that can be run, whatever the modules are called that they are in."""
    return sorted({f"{f.__qualname__} {_code(f)}" for f in reach.functions.values()})


def _values(reach: Reach, words: _Words) -> list[str]:
    """Globals, class attributes, and what functions carry with them."""
    found = [f"{name} = {words.of(value)}" for name, value in reach.read_globals()]
    for kind in reach.kinds:
        found += [f"{kind.__qualname__}.{n} = {words.of(item)}" for n, item in reach.class_attributes(kind).items()]
    for function in reach.functions.values():
        bound = ", ".join(f"{name}={words.of(item)}" for name, item in words.bound(function).items())
        found += [f"{function.__qualname__}({bound})"] if bound else []
    return sorted(set(found))


def _kind(value: Any, *plain: type) -> str:
    return "" if type(value) in plain else type(value).__qualname__


def _own(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if not is_known(base)]


def _code(function: FunctionType) -> str:
    return code_digest(function.__code__)


def _joined(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _members(batch: Batch) -> list[Any]:
    named = [item for pair in sorted(batch.keywords.items(), key=lambda pair: pair[0]) for item in pair]
    return [*batch.arguments, *named, batch.targets]


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
