"""What travels with a task beside its arguments: the submitting code's context variables, those that were chosen.

structlog's bound context travels wherever structlog is used; other variables are named by `Executor(context=[...])`.
They are read where the task is submitted, and set for as long as it runs, in a context of its own: what a task sets or
binds itself is gone with it.
"""

from __future__ import annotations

import contextvars
import copyreg
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from importlib import import_module
from typing import Any, NamedTuple

from taskpool._current import name_of
from taskpool._logdata import plain

_bound: ContextVar[dict[str, Any]] = ContextVar("taskpool bound", default={})  # noqa: B039  (it is never changed)


class Place(NamedTuple):
    """Where a context variable is found in every process: the module and the name that it has there."""

    module: str
    attribute: str
    variable: ContextVar[Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return _place_again, (self.module, self.attribute, self.variable.name)


def _place_again(module: str, attribute: str, name: str) -> Place:
    return Place(module, attribute, find(module, attribute, name))


def find(module: str, attribute: str, name: str) -> ContextVar[Any]:
    """Return the variable that stands there; in `__main__`, which workers do not import, it is made."""
    if module == "__main__":
        made: ContextVar[Any] = ContextVar(name)
        return vars(sys.modules["__main__"]).setdefault(attribute, made)  # type: ignore[no-any-return]
    return getattr(import_module(module), attribute)  # type: ignore[no-any-return]


def locate(variables: Iterable[ContextVar[Any]]) -> tuple[Place, ...]:
    """Return where each variable is found.

    Raises:
        TypeError: If one is not a context variable.
        ValueError: If one is not a global of any module.
    """
    places = tuple(_locate(variable) for variable in variables)
    for place in places:
        _places[place.variable] = place
    if places:  # functions of `__main__` that use one take it along, by its place
        copyreg.pickle(ContextVar, _reduce)
    return places


def _locate(variable: object) -> Place:
    if not isinstance(variable, ContextVar):
        raise TypeError(f"context must be context variables, such as context=[request_id], not {variable!r}")
    for module, loaded in list(sys.modules.items()):
        for attribute, value in list(getattr(loaded, "__dict__", {}).items()):
            if value is variable:
                return Place(module, attribute, variable)
    raise ValueError(
        f"context={variable.name!r} is not a global of any module, so that workers cannot find it: bind it to a name "
        "at the top of one"
    )


_places: dict[ContextVar[Any], Place] = {}


def _reduce(variable: ContextVar[Any]) -> tuple[Any, ...]:
    place = _places.get(variable)
    if place is None:
        raise TypeError(f"the context variable {variable.name!r} is not among those of Executor(context=...)")
    return find, (place.module, place.attribute, variable.name)


def has_bound() -> bool:
    """Whether there may be something bound in structlog's context."""
    module = sys.modules.get("structlog.contextvars")
    return bool(_bound.get() if module is None else getattr(module, "_CONTEXT_VARS", True))


def load(fn: Callable[..., Any], places: Iterable[Place]) -> Callable[..., Any]:
    """Return a function that runs `fn` with the values that these variables, and structlog's, have here and now."""
    missing = object()
    values = [(place, place.variable.get(missing)) for place in places]
    values = [(place, value) for place, value in values if value is not missing]
    bound = dict(_bound.get())
    module = sys.modules.get("structlog.contextvars")
    if module is not None:
        bound = {str(key): plain(value) for key, value in module.get_contextvars().items()}
    return Carried(fn, values, bound)


def isolated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs `fn` in a context of its own each time."""
    return fn if isinstance(fn, Carried) else Carried(fn, [], {})


class Carried:
    """A function, and the context that it runs in."""

    def __init__(self, fn: Callable[..., Any], values: list[tuple[Place, Any]], bound: dict[str, Any]) -> None:
        self._fn = fn
        self._values = values
        self._bound = bound
        self.__qualname__ = name_of(fn)  # the task's name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return contextvars.copy_context().run(self._call, args, kwargs)

    def _call(self, args: Any, kwargs: Any) -> Any:
        for place, value in self._values:
            place.variable.set(value)
        if self._bound:
            _bound.set(self._bound)
            bind_here()
        return self._fn(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Carried, (self._fn, self._values, self._bound)


def bind_here() -> None:
    """Bind in structlog what came with the task; done later, if that is imported later."""
    module = sys.modules.get("structlog.contextvars")
    if module is not None and _bound.get():
        module.bind_contextvars(**_bound.get())
