"""Calls and results made of plain values only, written as the interpreter writes its own constants.

That takes a third of the time of a pickle, and no user code runs. All else is pickled (`wire.py`); what is written here
can be told from a pickle by its first byte.
"""

from __future__ import annotations

import marshal
import sys
from types import FunctionType
from typing import Any

from taskpool._engine.namespace import MAIN

LARGEST = 3072  # bytes of a call that is written here
PICKLE = 0x80  # the first byte of every pickle of protocol 2 or later; marshal has none like it

# By their exact types: what is derived from them may be more than its value.
NUMBERS = frozenset({int, float, complex, bool, type(None)})
PLAIN = NUMBERS | {str, bytes}

Bytes = bytes | bytearray | memoryview


def are_numbers(values: list[Any]) -> bool:
    """Whether these are numbers, truth values and None."""
    return NUMBERS.issuperset(map(type, values))


def dumps(value: Any) -> bytes:
    """Write a number, or a list of them."""
    return marshal.dumps(value)


def loads(stream: Bytes) -> Any:
    """Return what `dumps` was given."""
    return marshal.loads(stream)


def dumps_call(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None) -> bytes | None:
    """Write a call of a module's function with plain arguments; None if it is anything else, or long.

    The function is named, as a pickle names it, and only if that name leads to it here.
    """
    if type(fn) is not FunctionType or kwargs or not PLAIN.issuperset(map(type, args)):
        return None
    module, function = fn.__module__, fn.__qualname__
    if module in MAIN or getattr(sys.modules.get(module), function, None) is not fn:
        return None
    try:
        stream = marshal.dumps((module, function, args, name))
    except ValueError:  # a name that is a string of another type
        return None
    return stream if len(stream) <= LARGEST else None


def is_call(stream: Bytes) -> bool:
    """Whether `dumps_call` wrote this, and not pickle."""
    return len(stream) > 0 and stream[0] != PICKLE


def loads_call(stream: Bytes) -> tuple[Any, tuple[Any, ...], dict[str, Any], str | None]:
    """Return function, arguments, keyword arguments and name. A module that is imported for it may raise anything."""
    module, function, args, name = marshal.loads(stream)
    __import__(module)
    return getattr(sys.modules[module], function), args, {}, name
