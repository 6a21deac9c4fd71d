"""What a function's code is, what it reads and what it writes, from its bytecode: source is not always there.

Bytecode belongs to one minor version of Python; a digest of it is another one in the next.
"""

from __future__ import annotations

import dis
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

# Methods that change what they are called on; those of tensors end in an underscore.
MUTATING = {
    "append", "appendleft", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "popleft", "clear",
    "remove", "discard",
}  # fmt: skip
# Ways to read attributes whose names are not in the code, and to write those that are there as strings.
DYNAMIC = {"getattr", "vars", "__dict__", "__getattribute__"}
SETTING = {"setattr", "__setattr__", "register_buffer"}
_STILL = {"NOP", "RESUME", "CACHE", "EXTENDED_ARG", "KW_NAMES", "MAKE_CELL", "COPY_FREE_VARS"}
_ONLY_POP = ("STORE_", "DELETE_", "POP_", "RETURN_", "RAISE_", "YIELD_")


@dataclass(frozen=True)
class Usage:
    """Names in a code object and those inside of it.

    Attributes:
        read: every name of a global or an attribute, and strings where attributes are read by strings.
        globals: names of globals.
        dynamic: whether attributes are read whose names cannot be told.
        own: attributes of the first argument that are written.
        others: attributes of anything else that are written.
        places: globals that are written.
        cells: variables of enclosing functions that are written.
    """

    read: frozenset[str]
    globals: frozenset[str]
    dynamic: bool
    own: frozenset[str]
    others: frozenset[str]
    places: frozenset[str]
    cells: frozenset[str]


def code_digest(code: CodeType) -> str:
    """SHA-256 of what code does, wherever it is written."""
    found = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, frozenset):
            constant = sorted(map(repr, constant))  # their order changes from process to process
        found.update((code_digest(constant) if isinstance(constant, CodeType) else repr(constant)).encode())
    found.update(" ".join(code.co_names).encode())
    return found.hexdigest()


@cache
def usage(code: CodeType) -> Usage:
    """What code reads and writes. Cost: one pass over its instructions, the first time."""
    inner = [usage(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    named = set(code.co_names)
    strings = {name for constant in code.co_consts for name in _strings(constant)}
    read = named | (strings if named & DYNAMIC else set())
    found: dict[str, set[str]] = {kind: set() for kind in ("globals", "own", "others", "places", "cells")}
    for kind, name in _accesses(code):
        found[kind].add(name)
    if named & SETTING:
        found["others"] |= strings
    # a function inside has its own first argument
    return Usage(
        read=frozenset(read).union(*(one.read for one in inner)),
        globals=frozenset(found["globals"]).union(*(one.globals for one in inner)),
        dynamic=bool(named & DYNAMIC) or any(one.dynamic for one in inner),
        own=frozenset(found["own"]),
        others=frozenset(found["others"]).union(*(one.others | one.own for one in inner)),
        places=frozenset(found["places"]).union(*(one.places for one in inner)),
        cells=frozenset(found["cells"]).union(*(one.cells for one in inner)),
    )


def _strings(constant: Any) -> Iterator[str]:
    """Names among constants."""
    if isinstance(constant, str):
        if constant.isidentifier():
            yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for item in constant:
            yield from _strings(item)


def _accesses(code: CodeType) -> Iterator[tuple[str, str]]:
    """(kind, name) of globals that are read and of everything that is written."""
    walk = _Walk(code.co_varnames[0] if code.co_argcount else None)
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield "globals", step.argval
        written = walk.step(step)
        if written is not None and written[0] != "self":
            yield written


# Where a value comes from: ("own" or "others", attribute), ("places", global), ("cells", variable), ("self", argument).
_Origin = tuple[str, str] | None


class _Walk:
    """Where the values on the stack come from, along the code as it is written.

    Behind a branch inside of an expression that can go wrong; then a write is not seen, and no more.
    """

    def __init__(self, first: str | None) -> None:
        self.first = first
        self.stack: list[_Origin] = []

    def step(self, step: dis.Instruction) -> _Origin:
        """Take one instruction; what it writes to."""
        name, value = step.opname, step.argval
        effect = 0 if name in _STILL else dis.stack_effect(step.opcode, step.arg)
        if name.startswith("LOAD_") and "FAST" not in name:
            return self._load(name, value, effect)
        if name.startswith(("STORE_", "DELETE_")):
            return self._store(name, value, effect)
        if name.startswith("LOAD_FAST"):
            variables = value if isinstance(value, tuple) else (value,)
            self.stack += [("self", variable) if variable == self.first else None for variable in variables]
        elif not self._shuffle(name, step.arg or 1) and name not in _STILL:
            self.stack += [None] * effect
            del self.stack[len(self.stack) + min(effect, 0) :]
            if self.stack and effect <= 0 and not name.startswith(_ONLY_POP):
                self.stack[-1] = None
        return None

    def _top(self, depth: int = 1) -> _Origin:
        return self.stack[-depth] if len(self.stack) >= depth else None

    def _attribute(self, name: str) -> _Origin:
        owner = self._top()
        return "own" if owner is not None and owner[0] == "self" else "others", name

    def _load(self, name: str, value: Any, effect: int) -> _Origin:
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            changed = value in MUTATING or (value.endswith("_") and not value.startswith("_"))
            owner = self._top()
            self.stack[-1:] = [self._attribute(value)] + [None] * effect
            return owner if changed else None
        kinds = {"LOAD_GLOBAL": "places", "LOAD_NAME": "places", "LOAD_DEREF": "cells", "LOAD_CLASSDEREF": "cells"}
        origin = None if name not in kinds else ("self" if value == self.first else kinds[name], value)
        if effect > 0:
            self.stack += [None] * (effect - 1) + [origin]
        else:
            del self.stack[len(self.stack) + effect :]
        return None

    def _store(self, name: str, value: Any, effect: int) -> _Origin:
        written = None
        if name.endswith("_ATTR"):
            written = self._attribute(value)
        elif name.endswith("_GLOBAL"):
            written = ("places", value)
        elif name.endswith("_DEREF"):
            written = ("cells", value)
        elif name.endswith("_SUBSCR"):
            written = self._top(2)
        elif name == "STORE_SLICE":
            written = self._top(3)
        del self.stack[len(self.stack) + min(effect, 0) :]
        return written

    def _shuffle(self, name: str, depth: int) -> bool:
        """Whether an instruction only moves values about."""
        if name == "COPY":
            self.stack.append(self._top(depth))
        elif name == "SWAP" and len(self.stack) >= depth:
            self.stack[-1], self.stack[-depth] = self.stack[-depth], self.stack[-1]
        elif name == "DUP_TOP_TWO":
            self.stack += [self._top(2), self._top(1)]
        elif name == "ROT_THREE" and len(self.stack) >= 3:
            self.stack[-3:] = [self.stack[-1], self.stack[-3], self.stack[-2]]
        else:
            return False
        return True
