"""Picklers for what lives in a `__main__`: one for the way to a worker, one for the way home.

They are cloudpickle's, but for this: a function of a `__main__` goes without its globals and is given those of the
other side's namespace (`namespace.py`); what can be found there by its name goes as that name; and on the way home
what came from the parent goes as a word that means the parent's own. Imported when first needed.
"""

from __future__ import annotations

import dis
import functools
import io
import marshal
import sys
import threading
from collections import ChainMap
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pickle import PickleBuffer
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import cloudpickle

from taskpool._engine import namespace, wire

Name = tuple[str, str]  # a namespace's token, and a global of it

NAMING = {"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}  # opcodes
NOT_SENT = {"__builtins__", "__loader__", "__name__", "__spec__"}  # each process has these of its own
ATTRIBUTES = ("__name__", "__qualname__", "__doc__", "__annotations__", "__defaults__", "__kwdefaults__")
LIVING = (Executor, Future, threading.Thread)  # a copy of one would be waited for in vain


def _refuses_itself(cls: type) -> bool:
    return any("__reduce__" in base.__dict__ for base in cls.__mro__[:-1])  # in words of its own


CACHE = type(functools.cache(len))
DISPATCHER = functools.singledispatch(len).__code__  # type: ignore[attr-defined]  # it is a function

if sys.modules["__main__"].__name__ == "__mp_main__":
    # A worker of multiprocessing knows its main module by this name, but workers of its own would not.
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])


class Packed(NamedTuple):
    """What a pickler made: the stream, the buffers beside it, and the globals that it needs on the other side."""

    stream: bytes
    buffers: list[PickleBuffer]
    needs: list[Name]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it ships no types
    """What both ways have in common: functions without globals, and what cloudpickle does not know."""

    def __init__(self, *, beside: bool = True) -> None:
        self._file = io.BytesIO()
        self._buffers: list[PickleBuffer] = []
        # Set before the pickler begins, which looks for it only once. multiprocessing's reducer of methods comes last.
        table: Any = cloudpickle.Pickler.dispatch_table
        self.dispatch_table = ChainMap(dict(self.own_reducers()), *table.maps, wire.extra_reducers())
        super().__init__(self._file, 5, buffer_callback=wire.collector(self._buffers) if beside else None)
        self._needs: dict[Name, None] = {}

    def pack(self, value: object) -> Packed:
        """Pickle `value`.

        Raises:
            Exception: Whatever pickling raised; user code runs here.
        """
        self.dump(value)
        return Packed(self._file.getvalue(), self._buffers, list(self._needs))

    def own_reducers(self) -> Iterator[tuple[type, Callable[[Any], Any]]]:
        """Return reducers by type."""
        yield CodeType, _reduce_code

    def reducer_override(self, obj: Any) -> Any:
        """Reduce functions and classes; all else as its type says."""
        kind = type(obj)
        if kind is FunctionType or kind is CACHE or issubclass(kind, type):
            return self._reduce_named(obj)
        return NotImplemented

    def _reduce_named(self, obj: Any) -> Any:
        raise NotImplementedError

    def _reduce_by_value(self, obj: Any, home: namespace.Home | None, fill_class: Callable[..., None]) -> Any:
        homes = () if home is None else (home,)
        if type(obj) is CACHE:
            if obj.__module__ not in namespace.MAIN:
                return NotImplemented
            return namespace.make_cache, (obj.__wrapped__, obj.cache_parameters(), *homes)
        if type(obj) is not FunctionType:
            return self._reduce_class(obj, home, fill_class)
        if obj.__code__ is DISPATCHER and obj.__module__ in namespace.MAIN:
            others = dict(obj.registry)  # type: ignore[attr-defined]
            return namespace.make_dispatcher, (others.pop(object), others, *homes)
        token = namespace.token_of(obj.__globals__)
        return super().reducer_override(obj) if token is None else self._reduce_function(obj, token, homes)

    def _reduce_function(self, function: FunctionType, token: str, homes: tuple[Any, ...]) -> Any:
        names = _names(function.__code__)
        self._need(token, names)
        if function.__globals__.get("__package__"):  # what a relative import starts from
            self._need(token, ("__package__",))
        cells = function.__closure__ or ()
        contents = {index: cell.cell_contents for index, cell in enumerate(cells) if not _is_empty(cell)}
        known = [*map(function.__globals__.get, names), *contents.values()]
        state = _attributes(function), dict(function.__dict__), contents, _submodules(function.__code__, known)
        made = namespace.make_function, (function.__code__, token, len(cells), *homes)
        return (*made, state, None, None, namespace.fill_function) if any(state) else made

    def _reduce_class(self, cls: type, home: namespace.Home | None, fill: Callable[..., None]) -> Any:
        reduced = super().reducer_override(cls)
        if reduced is NotImplemented or len(reduced) < 6:  # noqa: PLR2004  # by reference
            return reduced
        make, args, content, *_, fill_content = reduced
        content[0].pop("__slotnames__", None)  # pickle's own note, which it makes when it first meets an instance
        token = namespace.depart(cls)
        made = namespace.make_class, (home, token, cls.__bases__, make, args)
        return (*made, (fill_content, content), None, None, fill)

    def _need(self, token: str, names: tuple[str, ...]) -> None:
        self._needs.update(dict.fromkeys((token, name) for name in names))


class Away(_Pickler):
    """Pickles for a worker: what has a name in a `__main__` goes as that name, all else of it by value."""

    def _reduce_named(self, obj: Any) -> Any:
        found = namespace.path_of(obj)
        if found is None:
            return self._reduce_by_value(obj, None, namespace.fill_class)
        token, path = found
        name = path.partition(".")[0]
        return self._reduce_at(obj, (token, name), found)

    def _reduce_at(self, _obj: Any, name: Name, found: tuple[str, str]) -> Any:
        self._needs[name] = None
        return namespace.by_name, found


class Global(Away):
    """Pickles one of the globals for a worker.

    Args:
        root: The global: it goes by value, all others go by name.
        version: What tells the version of another global.
    """

    def __init__(self, root: Name, version: Callable[[Name], int | None]) -> None:
        self._root = root
        self._version = version
        super().__init__(beside=False)

    def own_reducers(self) -> Iterator[tuple[type, Callable[[Any], Any]]]:
        """Return reducers by type; a lock among the globals is one of each worker's own."""
        yield from super().own_reducers()
        yield type(threading.Lock()), lambda _: (threading.Lock, ())
        yield type(threading.RLock()), lambda _: (threading.RLock, ())
        yield threading.local, lambda _: (threading.local, ())

    def reducer_override(self, obj: Any) -> Any:
        """Refuse what would be dead on the other side."""
        if issubclass(type(obj), LIVING) and not _refuses_itself(type(obj)):
            raise TypeError(f"cannot pickle {type(obj).__name__!r} object")
        return super().reducer_override(obj)

    def _reduce_at(self, obj: Any, name: Name, found: tuple[str, str]) -> Any:
        if name == self._root:
            has_name = "." not in found[1] or isinstance(obj, type)
            home = (namespace.depart(obj), *found) if has_name else None
            return self._reduce_by_value(obj, home, namespace.fill_class)
        # A class that changes is filled again; a function is replaced, and so must be what refers to it.
        version = None if isinstance(obj, type) else self._version(name)
        made = super()._reduce_at(obj, name, found)
        return made if version is None else (namespace.by_name, (*found, version))


class Home(_Pickler):
    """Pickles for the parent."""

    def _reduce_named(self, obj: Any) -> Any:
        home = namespace.home_of(obj)
        return self._reduce_by_value(obj, None, namespace.fill_new_class) if home is None else (namespace.home, home)


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[str, ...]:
    """Return the names of the globals that code reads or sets, that of the functions and classes in it included."""
    names = {each.argval: None for each in dis.get_instructions(code) if each.opname in NAMING}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_names(constant)))
    return tuple(name for name in names if name not in NOT_SENT)


def _attributes(function: FunctionType) -> dict[str, Any]:
    """Return those attributes of a function that its code does not give it."""
    plain = FunctionType(function.__code__, {"__name__": "__main__"}, None, None, function.__closure__)
    found = {name: getattr(function, name) for name in ATTRIBUTES}
    if function.__module__ not in namespace.MAIN:
        found["__module__"] = function.__module__
    return {name: value for name, value in found.items() if value is not getattr(plain, name, None) and value != {}}


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _submodules(code: CodeType, values: list[Any]) -> list[ModuleType]:
    """Return the modules that code reaches as attributes of packages, as in `xml.dom`: somebody must import them."""
    packages = [
        value.__name__ + "." for value in values if isinstance(value, ModuleType) and hasattr(value, "__path__")
    ]
    if not packages:
        return []
    attributes = set(_attribute_names(code))
    return [
        module
        for name, module in tuple(sys.modules.items())
        for package in packages
        if name.startswith(package) and attributes.issuperset(name[len(package) :].split("."))
    ]


def _attribute_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attribute_names(constant)


def _reduce_code(code: CodeType) -> Any:
    # Version 2 of marshal gives the same bytes each time; later ones depend on how many references there are.
    try:
        return namespace.load_code, (marshal.dumps(code, 2),)
    except ValueError:  # somebody has put objects of his own among its constants
        return cloudpickle.Pickler.dispatch_table[CodeType](code)
