"""How a function of `__main__` travels: by value, but pickled once, and loaded once in each worker.

By value means with what it refers to, as it is at that moment. Doing that anew for each task costs 50 to 100 µs; so a
function whose references cannot change behind our back (modules, other such functions, constants) keeps its pickle for
as long as its globals still hold the very same objects.
"""

from __future__ import annotations

import pickle
import weakref
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

_CONSTANT = (int, float, complex, str, bytes, bool, type(None), ModuleType, BuiltinFunctionType)

_kept: weakref.WeakKeyDictionary[FunctionType, ByValue] = weakref.WeakKeyDictionary()


class ByValue:
    """A function's pickle by value; pickles as a call that gives the function again."""

    def __init__(self, data: bytes, references: dict[str, Any]) -> None:
        self.data = data
        self.mentions = data.count(b"__main__")
        self._references = references

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self.data,)

    def holds(self, function: FunctionType) -> bool:
        """Whether the function's globals are what they were."""
        names = function.__globals__
        return all(names.get(name, _kept) is value for name, value in self._references.items())


@lru_cache(maxsize=256)
def _load(data: bytes) -> Any:
    return pickle.loads(data)


def by_value(function: object) -> ByValue | None:
    """Return the kept pickle of a function of `__main__`; None for all others, which pickle in the ordinary way."""
    if type(function) is not FunctionType or function.__module__ != "__main__":
        return None
    kept = _kept.get(function)
    if kept is not None and kept.holds(function):
        return kept
    references = _references(function)
    if references is None:
        return None
    import cloudpickle

    kept = _kept[function] = ByValue(cloudpickle.dumps(function, 5), references)
    return kept


def _references(function: FunctionType) -> dict[str, Any] | None:
    """Return the globals that a function refers to, with those of the functions among them; None if any can change."""
    found: dict[str, Any] = {}
    waiting = [function]
    seen = set()
    while waiting:
        one = waiting.pop()
        seen.add(one)
        if one.__closure__ or one.__dict__ or one.__kwdefaults__ or not _constants(one.__defaults__ or ()):
            return None
        for name in _names(one.__code__):
            if name not in one.__globals__:
                continue  # a builtin, or an attribute's name
            value = one.__globals__[name]
            found[name] = value
            if type(value) is FunctionType and value.__globals__ is function.__globals__:
                waiting += [value] if value not in seen else []
            elif not isinstance(value, _CONSTANT):
                return None
    return found


def _constants(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, _CONSTANT) for value in values)


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
