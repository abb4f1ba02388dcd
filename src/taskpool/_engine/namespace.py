"""The worker's side of `__main__`: one namespace, in which all functions of the parent's `__main__` live together.

A function arrives as its code; its globals arrive beside it, each as a pickle of its own with a version. They are set
where the function looks for them, in the worker's own `__main__`, and set again only when the parent sends another
version. So what an initializer or a task does to a global stays, as in a forked process, and what is defined again or
changed in the parent takes effect.

Things refer to each other by name here, which is also how they go home: a class or function that came from the
parent is sent back as a word that means the parent's own.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import marshal
import os
import pickle
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any

MAIN = ("__main__", "__mp_main__")  # the second is the name under which multiprocessing's workers import it
MAX_SPACES = 16  # namespaces that call themselves `__main__` beside the real one (debuggers, profilers, exec)
CACHED = 64 * 1024  # no larger arrival is kept: with what arrives again and again is what changes

Luggage = dict[str, dict[str, "tuple[int, bytes | None]"]]  # version and pickle, by name, by namespace

_ABSENT = object()


# Namespaces, known to both sides by a token


class Namespace:
    """A `__main__`: its globals, and which version of each was received last."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.own: dict[str, Any] = {}  # in a worker: those that it began with
        self._versions: dict[str, int] = {}
        self._waiting: dict[str, tuple[int, bytes | None]] = {}
        self.blobs: dict[str, Any] = {}  # how they are sent, for the parent's side

    def announce(self, globals_sent: dict[str, tuple[int, bytes | None]]) -> None:
        """Note what is to be received: the versions that are not here yet."""
        versions = self._versions
        self._waiting = {name: sent for name, sent in globals_sent.items() if versions.get(name) != sent[0]}

    def receive(self) -> None:
        """Set the globals that were announced. User code runs here."""
        try:
            while self._waiting:
                self._receive(next(iter(self._waiting)))
        finally:
            self._waiting = {}

    def find(self, path: str) -> Any:
        """Return what a name means here, in the version that is being received. User code runs here."""
        name = path.partition(".")[0]
        if name in self._waiting:
            self._receive(name)
        found = look_up(self.names, path)
        if found is _ABSENT:
            raise AttributeError(f"__main__ has no {path!r} here")
        return found

    def _receive(self, name: str) -> None:
        version, data = self._waiting.pop(name)  # first, since things may refer to each other in a circle
        if not self._is_changed_here(name):
            try:
                self._set(name, data)
            except BaseException:
                self._versions.pop(name, None)
                raise
        self._versions[name] = version
        if not isinstance(self.own.get(name), type):  # classes may be asked for again, by an older snapshot
            self.own.pop(name, None)

    def _is_changed_here(self, name: str) -> bool:
        """Whether an initializer put something there before the parent sent anything."""
        if name in self._versions or name not in self.names:
            return False
        return self.names[name] is not self.own.get(name, _ABSENT)

    def _set(self, name: str, data: bytes | None) -> None:
        if data is None:
            self.names.pop(name, None)
            return
        value = pickle.loads(data)
        # A lock or a connection that this process has inherited or made while it imported its main module is its own.
        if not isinstance(value, Unsendable) or name in self._versions or name not in self.names:
            self.names[name] = value


def _main() -> dict[str, Any]:
    """Return the globals of this process's main module.

    multiprocessing imports a main module by `runpy`, whose functions have other globals than the module: these are
    where an initializer puts what it makes.
    """
    names = vars(sys.modules["__main__"])
    names.setdefault("__builtins__", builtins)  # the template's is a bare module; where C code imports, it is asked for
    for value in tuple(names.values()):
        if type(value) is FunctionType and value.__globals__.get("__name__") == "__mp_main__":
            return value.__globals__
    return names


_spaces: OrderedDict[str, Namespace] = OrderedDict()  # the main module's, whose token is "", comes first


def begin() -> None:
    """Begin the life of a worker: what its main module has now is its own, and nothing has been received."""
    global _latest
    _spaces.clear()
    _arrived.clear()
    _load.cache_clear()
    _latest = None
    space("").own.update(space("").names)


def space(token: str) -> Namespace:
    """Return the namespace of that token; in a worker it is made on its first use."""
    found = _spaces.get(token)
    if found is None:
        found = _add(token, {"__name__": "__main__", "__builtins__": builtins} if token else _main())
    return found


def token_of(names: dict[str, Any]) -> str | None:
    """Return the token of the globals of a `__main__`; None for those of any other module."""
    if space("").names is names:
        return ""
    for token, known in tuple(_spaces.items()):
        if known.names is names:
            return token
    if names.get("__name__") not in MAIN:
        return None
    token = os.urandom(8).hex()
    _add(token, names)
    return token


def _add(token: str, names: dict[str, Any]) -> Namespace:
    added = _spaces[token] = Namespace(names)
    while len(_spaces) > MAX_SPACES:
        del _spaces[next(token for token in _spaces if token)]
    return added


def look_up(names: dict[str, Any], path: str) -> Any:
    """Return what `path` means in `names`, as it stands there; something that is nothing else if it does not."""
    if "." not in path:
        return names.get(path, _ABSENT)
    name, *attributes = path.split(".")
    found = names.get(name, _ABSENT)
    for attribute in attributes:
        found = vars(found).get(attribute, _ABSENT) if isinstance(found, type) else _ABSENT
    return found


def path_of(value: Any) -> tuple[str, str] | None:
    """Return the namespace and the name under which a class or function of a `__main__` can be found there."""
    path = getattr(value, "__qualname__", None)
    if type(path) is not str or "<" in path or getattr(value, "__module__", None) not in MAIN:
        return None
    if look_up(space("").names, path) is value:
        return "", path
    others = tuple(_spaces.items())
    return next(((token, path) for token, known in others if look_up(known.names, path) is value), None)


# Arrival. What stands in pickles by these names


class Arrival:
    """A function with its luggage: unpacked once, and put in place again whenever something else came between."""

    def __init__(self, luggage: Luggage, path: tuple[str, str] | None, pickled: bytes) -> None:
        self.luggage = luggage
        self._path = path
        self._pickled = pickled
        self._value: Any = _ABSENT

    def value(self) -> Any:
        """Return the function: what its name means now or, if it has none, always the same."""
        if self._path is not None:
            return space(self._path[0]).find(self._path[1])
        if self._value is _ABSENT:
            self._value = pickle.loads(self._pickled)
        return self._value


_latest: Arrival | None = None  # what it brought is in place


def arrive(data: bytes) -> Any:
    """Return a function that was sent by value, with its globals in place."""
    global _latest
    if len(data) > CACHED:
        arrival = Arrival(*pickle.loads(data))
        unpack(arrival.luggage)
        return arrival.value()
    arrival = _load(data)
    if arrival is not _latest:
        unpack(arrival.luggage)
        _latest = arrival
    return arrival.value()


@functools.lru_cache(maxsize=256)
def _load(data: bytes) -> Arrival:
    return Arrival(*pickle.loads(data))


def unpack(luggage: Luggage) -> None:
    """Put globals in place."""
    global _latest
    _latest = None
    spaces = [(space(token), sent) for token, sent in luggage.items()]
    for each, sent in spaces:
        each.announce(sent)
    for each, _ in spaces:
        each.receive()


def prepare(luggage: Luggage) -> None:
    """Put globals in place for an initializer. What cannot be is no matter yet: it may not be used."""
    with contextlib.suppress(Exception):
        unpack(luggage)


def open_parcel(luggage: Luggage, stream: bytes, buffers: list[Any]) -> Any:
    """Return an object that was sent with the globals that its functions and classes need."""
    unpack(luggage)
    return pickle.loads(stream, buffers=buffers)


def by_name(token: str, path: str, _version: int | None = None) -> Any:
    """Return what a name means in a namespace. The version makes what refers to it another one when it changes."""
    return space(token).find(path)


# Things of the parent, and the way home

Home = tuple[str, str, str]  # its own token, its namespace, its name there

_departed: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_arrived: weakref.WeakKeyDictionary[Any, Home] = weakref.WeakKeyDictionary()
_by_token: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_whole: weakref.WeakSet[type] = weakref.WeakSet()  # classes that are not to be filled by what comes back


def depart(value: Any) -> str:
    """Return the token by which a class or function is known wherever it is sent."""
    token = _departed.get(value)
    if token is None:
        token = _departed[value] = os.urandom(8).hex()
        _by_token[token] = value
    if isinstance(value, type):
        _whole.add(value)
    return token


def home_of(value: Any) -> Home | None:
    """Return what to send to the parent in place of a class or function that it has by name."""
    try:
        home = _arrived.get(value)
    except TypeError:  # a class whose metaclass forbids hashing
        return None
    if home is None:
        path = path_of(value)
        if path is not None and not path[0] and look_up(space("").own, path[1]) is value:
            home = "", *path  # of the main module that this process imported, or inherited
    return home


def home(token: str, space_token: str, path: str) -> Any:
    """Return the very thing that was sent, or what its name means now if that is gone."""
    known = _by_token.get(token)
    return space(space_token).find(path) if known is None else known


def _settle(value: Any, home: Home | None) -> Any:
    """Put a class or function that has a name in its place, before it is complete: parts of it may refer to it."""
    if home is not None:
        token, space_token, path = home
        _arrived[value] = home
        _by_token[token] = value
        if "." not in path:
            space(space_token).names[path] = value
    return value


# How functions and classes are made


def load_code(data: bytes) -> CodeType:
    """Return a code object."""
    return marshal.loads(data)  # type: ignore[no-any-return]


def make_function(code: CodeType, token: str, cells: int, home: Home | None = None) -> FunctionType:
    """Return a function whose globals are the namespace, and whose closure is still empty."""
    closure = tuple(CellType() for _ in range(cells)) or None
    function = FunctionType(code, space(token).names, None, None, closure)
    function.__module__ = "__main__"
    _settle(function, home)
    return function


def fill_function(
    function: FunctionType, state: tuple[dict[str, Any], dict[str, Any], dict[int, Any], list[Any]]
) -> None:
    """Give a function the rest. The last are modules, which by now are imported."""
    attributes, own, cells, _modules = state
    for name, value in attributes.items():
        setattr(function, name, value)
    function.__dict__.update(own)
    for index, value in cells.items():
        assert function.__closure__ is not None
        function.__closure__[index].cell_contents = value


def make_class(home: Home | None, token: str, bases: tuple[type, ...], make: Callable[..., type], args: Any) -> type:
    """Return the class that is known by this token, or the one that this process has imported, or a new one."""
    known = _by_token.get(token)
    if known is None and home is not None:
        own = look_up(space(home[1]).own, home[2])
        if isinstance(own, type) and own.__bases__ == bases:
            known = own
    made: type = make(*args) if known is None else known
    _by_token[token] = made
    _departed[made] = token
    return _settle(made, home)  # type: ignore[no-any-return]


def fill_class(cls: type, state: tuple[Callable[..., Any], Any]) -> None:
    """Give a class that comes from the parent what is in it, also one that is here: it may have changed."""
    fill, content = state
    fill(cls, content)
    _whole.add(cls)


def fill_new_class(cls: type, state: tuple[Callable[..., Any], Any]) -> None:
    """Give a class that comes home what is in it, unless it is this process's own."""
    if cls not in _whole:
        fill_class(cls, state)


def make_cache(function: Any, parameters: dict[str, Any], home: Home | None = None) -> Any:
    """Return a `functools.cache` or `lru_cache`, empty."""
    cached = functools.lru_cache(**parameters)(function)
    return _settle(cached, home)


def make_dispatcher(default: Any, others: dict[Any, Any], home: Home | None = None) -> Any:
    """Return a `functools.singledispatch` function."""
    dispatcher = functools.singledispatch(default)
    for cls, function in others.items():
        dispatcher.register(cls, function)
    return _settle(dispatcher, home)


# What cannot be sent

USES = {each for each in {*dir(float), *dir(dict)} - {*dir(object)} if each.startswith("__")}
USES |= {"__aenter__", "__aexit__", "__aiter__", "__anext__", "__await__", "__call__", "__enter__", "__exit__"}
USES |= {"__ge__", "__gt__", "__le__", "__lt__", "__next__", "__setattr__", "__delattr__"}


class Unsendable:
    """Stands for a global that cannot be pickled. Whoever uses it is told so; a function that only names it runs."""

    __slots__ = ("__told",)

    def __init__(self, *told: str) -> None:
        object.__setattr__(self, "_Unsendable__told", told)

    def __reduce__(self) -> tuple[Any, ...]:
        return Unsendable, self.__told

    def __getattr__(self, _name: str) -> Any:
        self.__refuse(sys._getframe(1))

    def __refuse(self, user: FrameType) -> Any:
        from taskpool.errors import NotSendableError

        name, kind, reason = self.__told
        raise NotSendableError(
            f"the function {user.f_code.co_name!r} uses the global {name!r} (of type {kind}) of __main__, which cannot "
            f"be pickled: {reason}; create it in an initializer, or inside the function"
        )

    def _use(self, *_: object) -> Any:
        return self.__refuse(sys._getframe(1))


for _name in USES:
    setattr(Unsendable, _name, Unsendable._use)
