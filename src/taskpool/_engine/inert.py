"""A pickle as text, without running anything that is in it: for the report of a crash.

What a worker died of may be what it was sent. So nothing of it is imported, called or built here: classes and functions
are stood in for by their names, and their instances by the name with its arguments.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import itertools
import pickle
import reprlib
from collections.abc import Iterable
from typing import Any, Self

from taskpool._engine import plain
from taskpool._engine.wire import Bytes, Pickled

MOST = 256 * 1024  # bytes of a pickle that is looked at
MOST_TEXT = 300  # letters of the text that is made of it

_HARMLESS: dict[tuple[str, str], Any] = {
    **{("builtins", cls.__name__): cls for cls in (set, frozenset, complex, range, slice, bytearray)},
    **{("datetime", cls.__name__): cls for cls in (dt.date, dt.datetime, dt.time, dt.timedelta, dt.timezone)},
}


def call_text(name: str, pickled: Pickled) -> str | None:
    """Return `name(1, 'a', key=2)` for the pickle of a call: of a tuple of function, arguments and keyword arguments.

    Returns:
        None if that cannot be told.
    """
    with contextlib.suppress(Exception):
        if plain.is_call(pickled.stream):
            _module, _function, args, _name = plain.loads(pickled.stream)
            return _text(name, args, {})
        _function, args, kwargs, *_ = _loads(pickled)
        return _text(name, args, kwargs)
    return None


def item_text(name: str, pickled: Pickled, index: int) -> str | None:
    """Return `name(item)` for the pickle of a range of items: of a tuple of function, items, and whether they are tuples."""
    with contextlib.suppress(Exception):
        _function, items, star, *_ = _loads(pickled)
        return _text(name, items[index] if star else (items[index],), {})
    return None


def _text(name: str, args: Iterable[Any], kwargs: dict[str, Any]) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    parts = [short.repr(arg) for arg in itertools.islice(args, 20)]
    parts += [f"{key}={short.repr(value)}" for key, value in itertools.islice(kwargs.items(), 20)]
    text = f"{name}({', '.join(parts)})"
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def _loads(pickled: Pickled) -> Any:
    if pickled.places or pickled.length > MOST:
        raise ValueError("it lies elsewhere, or is too large")
    return _Unpickler(pickled.joined(), pickled.buffers).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Bytes, buffers: Iterable[Any]) -> None:
        super().__init__(io.BytesIO(stream), buffers=map(_Buffer, buffers))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        if module == "taskpool._engine.namespace" and name == "open_parcel":
            return _open_parcel
        if module.startswith("copyreg"):
            return _made
        if name in ("by_name", "_make_skeleton_class", "_make_skeleton_enum"):
            return _class_named
        if name == "make_class":
            return _class_made
        return _Kind(name.rpartition(".")[2], (_Thing,), {})

    def persistent_load(self, _: object) -> Any:
        return _Thing("...")


def _open_parcel(_luggage: object, stream: Bytes, buffers: Iterable[Any]) -> Any:
    """Stand in for what puts a function's globals in place: only what came with them is of interest."""
    return _Unpickler(stream, buffers).load()


def _class_named(_: object, name: str, *_more: object) -> Any:
    """Stand in for what makes or finds a class that travels by value, or a function."""
    return _Kind(name.rpartition(".")[2], (_Thing,), {})


def _class_made(_home: object, _token: object, _bases: object, _make: object, args: Iterable[Any]) -> Any:
    return _class_named(*args)


def _made(cls: Any, *_: object) -> Any:
    """Stand in for what makes an instance of a class."""
    return cls()


class _Kind(type):
    """A class or function that is only a name."""

    def __repr__(cls) -> str:
        return cls.__name__


class _Thing(metaclass=_Kind):
    """What a call of such a thing would have given."""

    def __new__(cls, *args: object, **_kwargs: object) -> Any:
        thing = super().__new__(cls)
        thing._args = args  # type: ignore[attr-defined]
        return thing

    def __init__(self, *args: object, **_kwargs: object) -> None:
        pass

    def __repr__(self) -> str:
        args = ", ".join(reprlib.repr(arg) for arg in self._args)  # type: ignore[attr-defined]
        return f"{type(self).__name__}({args})"

    def __setstate__(self, _: object) -> None:
        pass

    def _take(self, *_: object) -> None:
        pass

    append = extend = add = __setitem__ = _take

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _Buffer(bytes):
    """A large buffer, which is not looked at."""

    def __new__(cls, buffer: Bytes) -> Self:
        made = super().__new__(cls)
        made.size = len(buffer)  # type: ignore[attr-defined]
        return made

    def __repr__(self) -> str:
        return f"<{self.size} bytes>"  # type: ignore[attr-defined]
