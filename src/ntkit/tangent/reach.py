"""What a forward pass can run and read: methods, helpers, globals and attributes, found by following names.

A model is more than its tensors: a number in an attribute, a helper at the top of a module, a global that it reads. All
of that is found here without running anything. What the same code writes (caches, counters, the last activations) is
left out, so that calling a model does not make it another one.
"""

from __future__ import annotations

import functools
import logging
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.tangent.bytecode import Usage, usage

# Most functions that are followed, so that a model which names half of a library ends too.
MOST = 10_000
# Objects inside of objects that are followed.
DEEPEST = 12
# Packages whose functions and classes are known by their names: they may differ between versions that compute the same.
_KNOWN = {"torch", "numpy", "scipy", "ntkit", "builtins"} | set(sys.stdlib_module_names)
# Every module has these, about itself and not about what it computes.
INTERNAL = frozenset(vars(nn.Module()))
# Special methods that no forward pass runs of an object that is there.
_APART = {
    "__init__", "__new__", "__init_subclass__", "__class_getitem__", "__getstate__", "__setstate__", "__reduce__",
    "__reduce_ex__", "__copy__", "__deepcopy__", "__repr__", "__str__", "__del__", "__dir__", "__setattr__",
}  # fmt: skip
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Things without content of their own, or with one that changes by use.
VOICELESS = (
    logging.Logger, threading.Thread, type(threading.Lock()), type(threading.RLock()), weakref.ref, random.Random,
    torch.Generator, Iterator,
)  # fmt: skip
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor)


def is_known(value: Any) -> bool:
    """Whether a function or class is of a package that is known by its names."""
    where = value.__globals__.get("__name__") if isinstance(value, FunctionType) else value.__module__
    return (where or "").partition(".")[0] in _KNOWN


def _is_installed(function: FunctionType) -> bool:
    """Whether a function is part of an installed package, whose globals belong to its version and come and go."""
    return bool({"site-packages", "dist-packages"} & set(Path(function.__code__.co_filename).parts))


class Reach:
    """What can be run and read from some values on.

    Attributes:
        functions: those that can be run, but for known packages.
        globals: by module and name, those that are read by functions of no installed package.
        kinds: classes of the user's whose methods can be run.
    """

    def __init__(self, *roots: Any) -> None:
        """Follow everything from `roots`: modules, functions, or things that hold them."""
        self.functions: dict[int, FunctionType] = {}
        self.globals: dict[tuple[str, str], Any] = {}
        self.kinds: dict[type, None] = {}
        self._objects: dict[int, Any] = {}
        self._seen: dict[int, FunctionType] = {}
        self._names: set[str] = {"forward", "__call__"}
        self._dynamic: set[type] = set()
        self._made: set[type] = set()
        self._methods: set[int] = set()
        self._own: dict[type, set[str]] = {}
        self._others: set[str] = set()
        self._places: set[tuple[Any, str]] = set()
        self._cells: set[int] = set()
        self._read: set[int] = set()
        self._bodies: dict[type, list[tuple[str, list[Any], Any]]] = {}
        for root in roots:
            self._add(root)
        before = None
        while before != self._size() and len(self.functions) < MOST:
            before = self._size()
            self._round()

    # ------------------------------------------------------------ what was found

    def attributes(self, value: Any) -> dict[str, Any]:
        """Attributes of an object that the code can read and does not write, by name."""
        kind = type(value)
        found = {name: item for name, item in members(value) if not (isinstance(value, nn.Module) and name in INTERNAL)}
        if isinstance(value, nn.Module) and "training" in self._names and not is_known(kind):
            found["training"] = value.training
        everything = self._reads_all(kind)
        written = self.written(kind)
        return {
            name: found[name] for name in sorted(found) if (everything or name in self._names) and name not in written
        }

    def class_attributes(self, kind: type) -> dict[str, Any]:
        """Values that a class has for all its objects, as `attributes`."""
        written = self.written(kind)
        bodies = (self._body(base) for base in reversed(kind.__mro__))
        found = {name: item for body in bodies for name, functions, item in body if not functions}
        return {name: found[name] for name in sorted(found) if name in self._names and name not in written}

    def is_written(self, function: FunctionType, name: str) -> bool:
        """Whether a variable of an enclosing function is written by any of the code."""
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        return id(cells[name]) in self._cells

    def read_globals(self) -> Iterator[tuple[str, Any]]:
        """Name and value of the globals that are read and not written."""
        for (where, name), value in self.globals.items():
            if (where, name) not in self._places and not isinstance(value, ModuleType):
                yield name, value

    # ------------------------------------------------------------ following

    def _size(self) -> tuple[int, ...]:
        return tuple(map(len, (self.functions, self.globals, self.kinds, self._objects, self._names, self._dynamic)))

    def _round(self) -> None:
        for kind in list(self.kinds):
            for base in kind.__mro__:
                for name, functions, member in self._body(base):
                    if functions and self._is_run(kind, name):
                        for function in functions:
                            self._note(kind, function)
                            self._add(function)
                    elif not functions and name in self._names:
                        self._add(member)
        for key in [key for key in self.functions if key not in self._read]:
            self._read.add(key)
            self._follow(self.functions[key])
        for value in list(self._objects.values()):
            for item in self.attributes(value).values():
                self._add(item)

    def _body(self, base: type) -> list[tuple[str, list[Any], Any]]:
        """Name, functions and value of what is written into a class of the user's."""
        if base not in self._bodies:
            found = [] if is_known(base) else [(n, _functions_of(item), item) for n, item in vars(base).items()]
            self._bodies[base] = [one for one in found if one[1] or not one[0].startswith("__")]
        return self._bodies[base]

    def _is_run(self, kind: type, name: str) -> bool:
        if name.startswith("__"):
            return name not in _APART or (kind in self._made and name in ("__init__", "__new__"))
        return name in self._names or issubclass(kind, torch.autograd.Function)

    def _note(self, kind: type, method: Any) -> None:
        """What a method reads and writes of its own object."""
        while hasattr(method, "__wrapped__"):
            method = method.__wrapped__
        if isinstance(method, FunctionType) and not is_known(method):
            found = usage(method.__code__)
            self._methods.add(id(method))
            if method.__name__ not in _APART:
                self._own.setdefault(kind, set()).update(found.own)
            if found.dynamic:
                self._dynamic.add(kind)

    def _follow(self, function: FunctionType) -> None:
        """The names of a function, and what they stand for."""
        found, space = usage(function.__code__), function.__globals__
        where = str(space.get("__name__"))
        self._names |= found.read
        self._others |= found.others if id(function) in self._methods else found.others | found.own
        self._places |= {(where, name) for name in found.places}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name in found.cells:
                self._cells.add(id(cell))
        installed = _is_installed(function)
        for name in sorted(found.globals & space.keys()):
            if not installed:
                self._global(where, name, space[name], found)
            elif isinstance(space[name], FunctionType):
                self._add(space[name])

    def _global(self, where: str, name: str, value: Any, found: Usage) -> None:
        if not isinstance(value, ModuleType):
            self.globals[where, name] = value
            self._add(value)
        elif value.__name__.partition(".")[0] not in _KNOWN:
            for inner in sorted(found.read & vars(value).keys()):
                if (value.__name__, inner) not in self.globals:
                    self.globals[value.__name__, inner] = vars(value)[inner]
                    self._global(value.__name__, inner, vars(value)[inner], found)

    def _add(self, value: Any, depth: int = 0) -> None:
        """Whatever of a value can be run or read."""
        if isinstance(value, (*_PLAIN, *VOICELESS, ModuleType, BuiltinFunctionType)) or depth > DEEPEST:
            return
        if isinstance(value, type):
            self._kind(value)
            self._made.add(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif (inside := self._inside(value)) is not None:
            for item in inside:
                self._add(item, depth + 1)
        elif id(value) not in self._objects:
            self._objects[id(value)] = value
            self._kind(type(value))

    def _inside(self, value: Any) -> list[Any] | None:
        """What can be run or read of something by itself, if it is no more than that."""
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, Mapping):
            return list(value.values())
        if isinstance(value, (list, tuple, Set)):
            return list(value)
        return [value.__wrapped__] if hasattr(value, "__wrapped__") else None

    def _function(self, value: FunctionType) -> list[Any]:
        if id(value) in self._seen:
            return []
        self._seen[id(value)] = value
        if not is_known(value):
            self.functions[id(value)] = value
        # a known one may be a decorator's: what it wraps is in its closure
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*closure(value).values(), *defaults, getattr(value, "__wrapped__", None)]

    def _module(self, value: nn.Module) -> None:
        for module in value.modules():
            if id(module) not in self._objects:
                self._objects[id(module)] = module
                self._kind(type(module))
                for hook in hooks(module):
                    self._add(hook)

    def _kind(self, kind: type) -> None:
        if any(not is_known(base) for base in kind.__mro__):
            self.kinds[kind] = None

    def _reads_all(self, kind: type) -> bool:
        """Whether a class's attributes can be read without being named, by itself or by a class that is known."""
        if kind in self._dynamic:
            return True
        bases = (base for base in kind.__mro__ if is_known(base))
        return any(base is not nn.Module and base.__module__ not in ("abc", "typing", "builtins") for base in bases)

    def written(self, kind: type) -> set[str]:
        """Names that the code writes, and those that are kept once they have been asked for."""
        own = [names for other, names in self._own.items() if issubclass(kind, other)]
        kept = {
            name
            for base in kind.__mro__
            for name, item in vars(base).items()
            if isinstance(item, functools.cached_property)
        }
        return self._others.union(kept, *own)


def hooks(module: nn.Module) -> Iterator[Callable]:
    """All hooks of a module, in their order."""
    for name in HOOKS:
        yield from getattr(module, name, {}).values()


def closure(function: FunctionType) -> dict[str, Any]:
    """Variables of enclosing functions, by name, those that are set; not the class that `super()` asks for."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            if name != "__class__":
                found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """All functions in a class body, by name."""
    for name, member in sorted(vars(kind).items(), key=lambda item: item[0]):
        for function in _functions_of(member):
            if isinstance(function, FunctionType):
                yield name, function


def _functions_of(member: Any) -> list[Any]:
    """The functions behind what is written into a class body."""
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    if isinstance(member, property):
        return [f for f in (member.fget, member.fset) if f is not None]
    if isinstance(member, functools.cached_property):
        return [member.func]
    return [member] if isinstance(member, FunctionType) or hasattr(member, "__wrapped__") else []


def members(value: Any) -> Iterable[tuple[str, Any]]:
    """Attributes of an object, from its dictionary and its slots."""
    slots = (name for base in type(value).__mro__ for name in _as_tuple(vars(base).get("__slots__", ())))
    found = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}.items()


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
