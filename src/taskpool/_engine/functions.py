"""The parent's side of `__main__`: what its functions need in a worker, pickled once for as long as it holds.

A function of `__main__` is sent with the globals that it names, and that these name. Each is pickled by itself
(`byvalue.py`), with a version by which a worker knows whether it has it (`namespace.py`). Pickling costs 30 to 100 µs a
piece, so each pickle is kept with a list of what it depends on: as long as all of that is the very same, it holds. What
can change without notice, a list or an instance, is pickled anew for each task, to see.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading
from collections.abc import Callable
from enum import EnumMeta
from functools import cache
from itertools import repeat
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from taskpool._engine import namespace
from taskpool._engine.namespace import MAIN, Luggage

if TYPE_CHECKING:
    from taskpool._engine.byvalue import Name, Packed

KEPT = 256  # functions whose pickle is kept
LARGEST_KEPT = namespace.CACHED  # bytes

CACHE = type(cache(len))
_FIXED = {int, float, complex, str, bytes, bool, type(None), type(...), range, ModuleType, BuiltinFunctionType}
_FIXED |= {type(threading.Lock()), type(threading.RLock()), threading.local}  # each worker makes its own
_FIXED_NAMES = {"datetime.date", "datetime.datetime", "datetime.timedelta", "decimal.Decimal", "fractions.Fraction"}
_FIXED_NAMES |= {"dataclasses._HAS_DEFAULT_FACTORY_CLASS", "dataclasses._MISSING_TYPE"}
_FIXED_NAMES |= {
    "logging.Logger",
    "pathlib.PosixPath",
    "re.Pattern",
    "uuid.UUID",
}  # what nobody changes, or goes by name
_OF_CLASSES = {"__annotations__", "__dict__", "__weakref__", "__dataclass_fields__", "__dataclass_params__"}
_OF_CLASSES |= {"_abc_impl", "_field_defaults", "__orig_bases__", "__parameters__", "__slotnames__", "__type_params__"}
_ABSENT = object()

Watch = tuple[Callable[[Any], tuple[Any, ...]], Any, tuple[Any, ...]]  # how to look, at what, and what was seen


# What a pickle depends on


class Watcher:
    """Collects what must stay the same for a pickle to hold."""

    def __init__(self) -> None:
        self.watches: list[Watch] = []
        self._met: set[int] = set()

    def add(self, value: Any) -> bool:
        """Watch a value with all that is pickled with it; False if it can change without notice."""
        kind = type(value)
        if kind in _FIXED or id(value) in self._met or _full_name(kind) in _FIXED_NAMES:
            return True
        if kind is tuple or kind is frozenset:
            return all(map(self.add, value))
        self._met.add(id(value))
        if kind is CACHE:
            return self.add(value.__wrapped__)
        if kind is FunctionType:
            return _is_elsewhere(value) or self.add_function(value, value)
        return isinstance(value, type) and (_is_elsewhere(value) or self._add_class(value))

    def add_function(self, function: FunctionType, held: FunctionType | None) -> bool:
        """Watch a function; `held` is None if the watch shall not keep it alive, and will be told what to look at."""
        seen = _look_at_function(function)
        self.watches.append((_look_at_function, held, seen))
        return all(map(self.add, seen[3:])) and self.add(function.__defaults__)

    def _add_class(self, cls: type) -> bool:
        self.watches.append((_look_at_class, cls, _look_at_class(cls)))
        if isinstance(cls, EnumMeta):
            return True
        return all(map(self.add, cls.__bases__)) and all(
            self._add_attribute(value) for name, value in vars(cls).items() if name not in _OF_CLASSES
        )

    def _add_attribute(self, value: Any) -> bool:
        function = getattr(value, "__func__", value)
        if type(function) is FunctionType:
            self.watches.append((_look_at_function, function, _look_at_function(function)))
            return self.add(function.__defaults__)
        return hasattr(type(value), "__get__") or self.add(value)


def _look_at_function(function: FunctionType) -> tuple[Any, ...]:
    own, keywords, cells = function.__dict__, function.__kwdefaults__, function.__closure__
    looked = function.__code__, function.__defaults__, keywords
    if not own and keywords is None and cells is None:
        return looked
    return (*looked, *own.values(), *(keywords or {}).values(), *map(_content, cells or ()))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _look_at_class(cls: type) -> tuple[Any, ...]:
    return (cls.__bases__, *vars(cls).values())


def _full_name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _is_elsewhere(value: Any) -> bool:
    """Whether a class or function is pickled as the name by which other modules have it."""
    module = sys.modules.get(value.__module__)
    if module is None or value.__module__ in MAIN:
        return False
    return namespace.look_up(vars(module), value.__qualname__) is value


def _is_same(now: tuple[Any, ...], seen: tuple[Any, ...]) -> bool:
    return len(now) == len(seen) and all(map(is_, now, seen))


# Globals


class Blob:
    """A global as it is sent."""

    def __init__(self, value: Any, data: bytes | None, needs: list[Name], watches: list[Watch] | None) -> None:
        self.data = data  # None if it does not exist any more
        self.version = hash(data)
        self.needs = needs
        self.watches = watches  # None if it can change without notice
        self.value = None if watches is None else value

    def holds(self, value: Any) -> bool:
        """Whether this is still what the global is."""
        watches = self.watches
        return (
            watches is not None and value is self.value and all(_is_same(look(it), seen) for look, it, seen in watches)
        )


def _blob(name: Name, making: tuple[Name, ...] = ()) -> Blob | None:
    """Return a global as it is sent; None if there is none, and never was. User code runs here.

    Args:
        name: Where it is.
        making: The globals that are being pickled, and refer to it.
    """
    space = namespace.space(name[0])
    value = space.names.get(name[1], _ABSENT)
    kept: Blob | None = space.blobs.get(name[1])
    if value is _ABSENT and kept is None:
        return None
    if kept is not None and kept.holds(value):
        return kept
    made = _make_blob(name, value, making)
    if kept is not None and made.watches is None is kept.watches and (made.data, made.needs) == (kept.data, kept.needs):
        return kept
    if made.data is None or len(made.data) <= LARGEST_KEPT:
        space.blobs[name[1]] = made
    return made


def _make_blob(name: Name, value: Any, making: tuple[Name, ...]) -> Blob:
    if value is _ABSENT:
        return Blob(value, None, [], [])
    from taskpool._engine import byvalue

    def version(other: Name) -> int | None:
        blob = None if other == name or other in making else _blob(other, (*making, name))
        return None if blob is None else blob.version

    watcher = Watcher()
    watches = watcher.watches if watcher.add(value) else None
    try:
        packed = byvalue.Global(name, version).pack(value)
    except Exception:
        try:
            byvalue.Global(name, version).pack(value)
        except Exception as error:
            return Blob(value, _pickle_refusal(name[1], value, error), [], None)
        raise  # it can be pickled: it was a signal handler of the program that raised
    return Blob(value, packed.stream, packed.needs, watches)


def _pickle_refusal(name: str, value: Any, error: Exception) -> bytes:
    from taskpool._engine import exceptions

    reason = f"{exceptions.type_name(error)}: {exceptions.safe_str(error)}"
    return pickle.dumps(namespace.Unsendable(name, type(value).__qualname__, reason), 5)


def _gather(needs: list[Name]) -> dict[Name, Blob | None]:
    """Return the globals of these names, and those that they need."""
    found: dict[Name, Blob | None] = {}
    waiting = list(needs)
    while waiting:
        name = waiting.pop()
        if name not in found:
            blob = found[name] = _blob(name)
            waiting += [] if blob is None else blob.needs
    return found


def _luggage(blobs: dict[Name, Blob | None]) -> Luggage:
    luggage: Luggage = {}
    for (token, name), blob in blobs.items():
        if blob is not None:
            luggage.setdefault(token, {})[name] = blob.version, blob.data
    return luggage


# What is sent


class Kept:
    """A function with its globals, pickled; pickles as a call that puts them in place and gives the function."""

    def __init__(self, function: Any, found: tuple[str, str] | None, watches: list[Watch]) -> None:
        from taskpool._engine import byvalue

        needs: list[Name] = []
        stream = b""
        if found is None:
            packed: Packed = byvalue.Away().pack(function)
            needs, stream = packed.needs, packed.stream
        else:
            needs = [(found[0], found[1].partition(".")[0])]
        blobs = _gather(needs)
        self.data = pickle.dumps((_luggage(blobs), found, stream), 5)
        self.mentions = self.data.count(b"_main__")
        self._function = None if found is None else function
        self._code = function.__code__ if type(function) is FunctionType else None  # while it lives its id is its own
        self._watches = watches + [watch for blob in blobs.values() if blob for watch in blob.watches or ()]
        self._changing = [(name, blob) for name, blob in blobs.items() if blob is not None and blob.watches is None]
        self._globals = _values(
            {name: blob for name, blob in blobs.items() if blob is None or blob.watches is not None}
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return namespace.arrive, (self.data,)

    def holds(self, function: Any) -> bool:
        """Whether pickling the function again would give the same."""
        if self._function is not None and function is not self._function:
            return False
        for look, it, seen in self._watches:
            if not _is_same(look(function if it is None else it), seen):
                return False
        for names, keys, values in self._globals:
            if not all(map(is_, map(names.get, keys, repeat(_ABSENT)), values)):
                return False
        return not self._changing or all(_blob(name) is blob for name, blob in self._changing)


def _values(blobs: dict[Name, Blob | None]) -> list[tuple[dict[str, Any], list[str], list[Any]]]:
    """Return for each namespace in it: the namespace, names, and what they mean."""
    spaces: dict[str, dict[str, Any]] = {}
    for (token, name), blob in blobs.items():
        spaces.setdefault(token, {})[name] = _ABSENT if blob is None else blob.value
    return [(namespace.space(token).names, list(values), list(values.values())) for token, values in spaces.items()]


_kept: dict[int, Kept] = {}  # by the id of the code: a lambda is a new function each time, but its code is the same


def by_value(function: Any) -> Kept | None:
    """Return a function of `__main__` as it is sent; None for all others, which are pickled with the rest.

    Raises:
        Exception: Whatever pickling raised; user code runs here.
    """
    kind = type(function)
    if (kind is not FunctionType and kind is not CACHE) or function.__module__ not in MAIN:
        return None
    key = id(function.__code__ if kind is FunctionType else function)
    kept = _kept.get(key)
    if kept is None or not kept.holds(function):
        kept = _keep(key, function)
    return kept


def _keep(key: int, function: Any) -> Kept | None:
    found = namespace.path_of(function)
    watcher = Watcher()
    if found is None and not (type(function) is FunctionType and watcher.add_function(function, None)):
        return None
    kept = Kept(function, found, watcher.watches)
    if len(kept.data) <= LARGEST_KEPT:
        while len(_kept) >= KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[key] = kept
    return kept


class Parcel:
    """An object pickled with the globals that it needs; pickles as a call that puts them in place and gives it.

    Raises:
        Exception: Whatever pickling raised; user code runs here.
    """

    def __init__(self, value: object) -> None:
        from taskpool._engine import byvalue

        self._packed: Packed = byvalue.Away().pack(value)
        self._luggage = _luggage(_gather(self._packed.needs))

    def __reduce__(self) -> tuple[Any, ...]:
        return namespace.open_parcel, (self._luggage, self._packed.stream, self._packed.buffers)


class Globals:
    """The globals that a function needs, without the function: for an initializer that gets there in another way."""

    def __init__(self, function: object) -> None:
        self._luggage: Luggage = {}
        # It need not be picklable: under fork it is inherited.
        with contextlib.suppress(Exception):
            if b"_main__" in pickle.dumps(function, 5):
                from taskpool._engine import byvalue

                self._luggage = _luggage(_gather(byvalue.Away().pack(function).needs))

    def __reduce__(self) -> tuple[Any, ...]:
        return namespace.prepare, (self._luggage,)


def home(value: object) -> Packed:
    """Pickle a result for the parent."""
    from taskpool._engine import byvalue

    return byvalue.Home().pack(value)
