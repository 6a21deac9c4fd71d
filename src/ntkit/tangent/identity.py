"""What a kernel is of, as digests and words that are the same in another process and on another day.

A model is its tensors (`parameters.fingerprint`) and how it is built (`architecture`): its modules with their plain
attributes and hooks, the code of their methods, and what of helpers, classes and plain globals that code names. This is
read off, nothing is run, and it does not try to see everything: mutable containers, objects of other kinds, files and
the environment are told by what the model computes, where entries are compared with those that were kept
(`ntkit.kernel.saved`).
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ntkit.tangent.examples import Batch, Examples

# Examples read at once; the digest depends on it.
BATCH = 1024
# Packages whose functions and classes are known by their names: they may differ between versions that compute the same.
_KNOWN = {"torch", "numpy", "scipy", "ntkit", "builtins", "transformers", "lightning"} | set(sys.stdlib_module_names)
# Every module has these, about itself and not about what it computes.
_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, Tensor, np.ndarray, FunctionType)


def describe(value: Any) -> str:
    """An object in words without addresses; functions by their code and what it names."""
    return _words(value, ())


def architecture(model: nn.Module) -> str:
    """SHA-256 of a model's modules, their plain attributes and hooks, their methods' code and what that names."""
    lines, numbers = [], {}
    for name, module in model.named_modules(remove_duplicate=False):
        number = numbers.setdefault(id(module), len(numbers))  # a module in two places is not two modules
        lines.append(f"{name} {number} {type(module).__qualname__}{_attributes(module)}")
        lines += [_hook(hook) for hooks in _HOOKS for hook in getattr(module, hooks, {}).values()]
    kinds = dict.fromkeys(type(module) for module in model.modules())
    lines += [line for kind in kinds for line in _class_attributes(kind)]
    return _joined([*lines, *_code([function for kind in kinds for function in _methods(kind)])])


def passing_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not kept with the model, but for those that its methods make or change."""
    found = {}
    for name, module in model.named_modules():
        for own in module._non_persistent_buffers_set - _written(type(module)):
            buffer = module._buffers.get(own)
            if buffer is not None:
                found[f"{name}.{own}" if name else own] = buffer
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


# --- words ------------------------------------------------------------------------------------------------------------


def _words(value: Any, inside: tuple[Any, ...]) -> str:
    """A value in words; one that contains itself by its type alone."""
    kind = type(value).__qualname__
    if any(value is outer for outer in inside):
        return kind
    say = functools.partial(_words, inside=(*inside, value))
    if isinstance(value, enum.Enum):
        return f"{kind}.{value.name}"
    if isinstance(value, Tensor):
        return f"tensor<{digest([value])[:16]}>"
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        found = hashlib.sha256(f"{value.shape} {value.dtype}".encode() + value.tobytes())
        return f"array<{found.hexdigest()[:16]}>"
    if isinstance(value, nn.Module):
        tensors = [item for pair in sorted(value.state_dict().items()) for item in pair]
        return f"{kind}<{_joined([architecture(value), digest(tensors)])[:16]}>"
    found = _callable(value, say) or _container(value, say)
    if found is not None:
        return found
    fields = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else {}
    if fields and type(value).__repr__ is object.__repr__:
        return f"{kind}({', '.join(f'{name}={say(item)}' for name, item in sorted(fields.items()))})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _callable(value: Any, say: Callable[[Any], str]) -> str | None:
    if isinstance(value, MethodType):
        return f"{say(value.__self__)}.{say(value.__func__)}"
    if isinstance(value, functools.partial):
        return f"partial({', '.join(map(say, [value.func, *value.args, *value.keywords.items()]))})"
    if isinstance(value, FunctionType):
        bound = "".join(f", {say(item)}" for item in _bound(value))
        return f"{value.__qualname__}<{_joined(_code([value]))[:16]}{bound}>"
    if isinstance(value, type):
        code = "" if _is_known(value) else f"<{_joined(_code(_methods(value)))[:16]}>"
        return value.__qualname__ + code
    return None


def _container(value: Any, say: Callable[[Any], str]) -> str | None:
    kind = type(value).__qualname__
    if dataclasses.is_dataclass(value):
        fields = (f"{f.name}={say(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{kind}({', '.join(fields)})"
    if isinstance(value, Mapping):
        return f"{kind}{{{', '.join(sorted(f'{say(key)}: {say(item)}' for key, item in value.items()))}}}"
    if isinstance(value, Set):
        return f"{kind}{{{', '.join(sorted(map(say, value)))}}}"
    if isinstance(value, (tuple, list)):
        return f"{kind if type(value) is not list else ''}({', '.join(map(say, value))})"
    return None


def _attributes(module: nn.Module) -> str:
    """Public attributes that nothing but `__init__` sets and that cannot change without being another value."""
    left_out = _INTERNAL | _written(type(module))
    kept = [name for name in sorted(vars(module)) if not name.startswith("_") and name not in left_out]
    return f"({', '.join(f'{n}={describe(vars(module)[n])}' for n in kept if _is_plain(vars(module)[n]))})"


def _class_attributes(kind: type) -> list[str]:
    own = ((name, item) for base in kind.__mro__ if not _is_known(base) for name, item in sorted(vars(base).items()))
    kept = ((name, item) for name, item in own if not name.startswith("__") and name not in _written(kind))
    return [f"{kind.__qualname__}.{name}={describe(item)}" for name, item in kept if _is_plain(item)]


def _hook(hook: Any) -> str:
    """A hook by its code and the plain values that it carries; what it keeps is not what it does."""
    bound = [describe(item) for item in _bound(hook) if _is_plain(item)] if isinstance(hook, FunctionType) else []
    code = _code([hook]) if isinstance(hook, FunctionType) else []
    return f"hook {type(hook).__qualname__} {_joined([*code, *bound])}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, functools.partial):
        return all(map(_is_plain, (value.args, *value.keywords.values())))
    return isinstance(value, _PLAIN)


# --- code -------------------------------------------------------------------------------------------------------------


def _code(functions: Iterable[FunctionType]) -> list[str]:
    """The code of functions, of the helpers and classes that they name, and the plain globals they read, in words."""
    found: dict[int, str] = {}
    waiting = list(functions)
    while waiting:
        function = waiting.pop()
        if id(function) in found or _is_known(function):
            continue
        code, space = function.__code__, function.__globals__
        lines = [f"{function.__qualname__} {_code_digest(code)}"]
        names, stored = _named(code), set(_stored(code, "STORE_GLOBAL"))
        places = [space, *(vars(space[n]) for n in names if isinstance(space.get(n), ModuleType))]
        for name, item in ((n, place[n]) for place in places for n in sorted((names - stored) & place.keys())):
            if isinstance(item, FunctionType):
                waiting.append(item)
            elif isinstance(item, type):
                waiting += _methods(item)
            elif _is_plain(item):
                lines.append(f"{name}={describe(item)}")
        waiting += [item for item in _bound(function) if isinstance(item, FunctionType)]
        found[id(function)] = " ".join(lines)
    return sorted(found.values())


def _methods(kind: type) -> list[FunctionType]:
    """All functions in the bodies of a class and its bases."""
    found = []
    for base in kind.__mro__:
        for _, member in () if _is_known(base) else sorted(vars(base).items(), key=lambda item: item[0]):
            for wrapped in (member, *(getattr(member, part, None) for part in ("__func__", "fget", "func"))):
                found += [wrapped] if isinstance(wrapped, FunctionType) else []
    return found


def _written(kind: type) -> set[str]:
    """Names of attributes that methods set besides `__init__`: caches, counters, the last activations."""
    found = {
        n for base in kind.__mro__ for n, item in vars(base).items() if isinstance(item, functools.cached_property)
    }
    for method in _methods(kind):
        if method.__name__ != "__init__":
            found.update(_stored(method.__code__, "STORE_ATTR"))
            if _named(method.__code__) & {"setattr", "register_buffer"}:
                found |= {constant for constant in method.__code__.co_consts if isinstance(constant, str)}
    return found


def _inner(code: CodeType) -> Iterator[CodeType]:
    """Code and the functions inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _inner(constant)


def _named(code: CodeType) -> set[str]:
    return {name for part in _inner(code) for name in part.co_names}


@functools.lru_cache(maxsize=16384)  # large libraries are gone through again for each of their classes
def _stored(code: CodeType, operation: str) -> frozenset[str]:
    """What is assigned to by an operation of Python's own machine."""
    steps = (step for part in _inner(code) for step in dis.get_instructions(part))
    return frozenset(step.argval for step in steps if step.opname == operation)


def _code_digest(code: CodeType) -> str:
    """SHA-256 of what code does, wherever it is written. Another minor version of Python has another one."""
    found = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, frozenset):
            constant = sorted(map(repr, constant))  # their order changes from process to process
        found.update((_code_digest(constant) if isinstance(constant, CodeType) else repr(constant)).encode())
    found.update(" ".join(code.co_names).encode())
    return found.hexdigest()


def _bound(function: FunctionType) -> list[Any]:
    """What a function carries with it and does not write: variables of enclosing functions, and defaults."""
    cells, stored = [], set(_stored(function.__code__, "STORE_DEREF"))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            if name not in stored | {"__class__"}:  # the class that `super()` asks for
                cells.append(cell.cell_contents)
        except ValueError:
            continue
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _is_known(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _KNOWN


def _joined(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _members(batch: Batch) -> list[Any]:
    named = [item for pair in sorted(batch.keywords.items(), key=lambda pair: pair[0]) for item in pair]
    return [*batch.arguments, *named, batch.targets]
