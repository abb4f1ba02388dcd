"""How a task's exception travels: encoded in the worker, restored in the parent as it was raised.

Pickle rebuilds an exception by calling its class with `args`, which fails or changes it where `__init__` takes
something else. So the worker tries the way back before it sends, and where that does not give the same exception it
sends class, args and attributes apart, to be put together without calling `__init__`. What still cannot travel, and
what must not be raised raw in the parent, is sent as text and becomes a `RemoteError`.
"""

from __future__ import annotations

import copyreg
import traceback
from typing import Any, NamedTuple

from taskpool._engine import wire
from taskpool._engine.wire import Pickled

MAX_CHAIN = 16  # causes and contexts that travel; a longer chain is cut, its text is whole


class Encoded(NamedTuple):
    """One exception, encoded; `cause` and `context` are encoded exceptions themselves."""

    pickled: tuple[bytes, tuple[bytes, ...]] | None  # the exception as it pickles
    parts: tuple[bytes, tuple[bytes, ...]] | None  # or its class, args and attributes
    type_name: str
    message: str
    cause: Encoded | None
    context: Encoded | None
    suppress_context: bool
    members: tuple[Encoded, ...] | None  # of an exception group that could not travel whole


def encode(error: BaseException, *, frames_of_ours: int = 0) -> Pickled:
    """Encode `error` with its chain and its traceback as text; never raises.

    Args:
        error: The exception as it was caught.
        frames_of_ours: How many of the outermost traceback frames are the worker's own and are left out.
    """
    trace = error.__traceback__
    for _ in range(frames_of_ours):
        trace = trace.tb_next if trace is not None else None
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except BaseException as problem:  # a hostile __str__ or __repr__
        text = f"{type_name(error)}: <the traceback could not be formatted: {type_name(problem)}>\n"
    try:
        return wire.dumps((_encode(error, MAX_CHAIN, set()), text))
    except BaseException as problem:  # a hostile metaclass
        stands_in = Encoded(
            pickled=None,
            parts=None,
            type_name=type_name(error),
            message=f"<{type_name(problem)}>",
            cause=None,
            context=None,
            suppress_context=False,
            members=None,
        )
        return wire.dumps((stands_in, text))


def type_name(error: BaseException) -> str:
    """Return the qualified name of the exception's class, without the module where that is builtins."""
    cls = type(error)
    try:
        module, name = str(cls.__module__), str(cls.__qualname__)
    except BaseException:  # a hostile metaclass
        return "an exception whose class has no name"
    return name if module == "builtins" else f"{module}.{name}"


def safe_str(error: BaseException) -> str:
    """Return `str(error)`, whatever the exception's own `__str__` does."""
    try:
        return str.__str__(str(error))  # a copy, should it be of a class of its own
    except BaseException as problem:
        return f"<its text could not be made: {type_name(problem)}>"


def _encode(error: BaseException, depth: int, seen: set[int]) -> Encoded:
    seen.add(id(error))
    pickled = parts = members = None
    if travels_raw(error):
        pickled = _whole(error)
        if pickled is None and isinstance(error, BaseExceptionGroup):
            members = tuple(_encode(member, depth - 1, seen) for member in error.exceptions) if depth else None
        elif pickled is None:
            parts = _apart(error)
    return Encoded(
        pickled,
        parts,
        type_name(error),
        safe_str(error),
        _link(error.__cause__, depth, seen),
        _link(error.__context__, depth, seen) if error.__context__ is not error.__cause__ else None,
        error.__suppress_context__,
        members,
    )


def _link(error: BaseException | None, depth: int, seen: set[int]) -> Encoded | None:
    if error is None or depth <= 0 or id(error) in seen:
        return None
    return _encode(error, depth - 1, seen)


def travels_raw(error: BaseException) -> bool:
    """Whether the parent may see this exception as itself.

    `SystemExit` and `KeyboardInterrupt`, also in a group, would end the caller's program, `StopIteration` and its kin would silently end
    the caller's loop or leave an awaiting coroutine asleep, and `CancelledError` would look like a cancellation.
    """
    if not isinstance(error, Exception) or isinstance(error, StopIteration | StopAsyncIteration):
        return False
    return not (type(error).__name__ == "CancelledError" and type(error).__module__.startswith("concurrent.futures"))


def _whole(error: BaseException) -> tuple[bytes, tuple[bytes, ...]] | None:
    """Pickle `error` if the way back gives an exception that is the same as far as can be seen."""
    try:
        pickled = wire.dumps(error)
        back = wire.loads(pickled)
        if type(back).__qualname__ == type(error).__qualname__ and _same_args(back, error):
            return _plain(pickled)
    except BaseException:  # user code: it may raise anything, SystemExit included
        return None
    return None


def _same_args(back: BaseException, error: BaseException) -> bool:
    if len(back.args) != len(error.args):
        return False
    texts = (str, int, float, bytes, type(None))
    return all(one == other for one, other in zip(back.args, error.args, strict=True) if isinstance(other, texts))


def _apart(error: BaseException) -> tuple[bytes, tuple[bytes, ...]] | None:
    """Pickle class, args and attributes, leaving out the attributes that cannot be pickled."""
    attributes = dict(getattr(error, "__dict__", {}))
    for name in copyreg._slotnames(type(error)):  # type: ignore[attr-defined]  # what pickle itself asks
        if hasattr(error, name):
            attributes[name] = getattr(error, name)
    try:
        pickled = wire.dumps((type(error), error.args, attributes))
        _rebuild(*wire.loads(pickled))
    except BaseException:
        return _apart_without_attributes(error, attributes)
    return _plain(pickled)


def _apart_without_attributes(
    error: BaseException, attributes: dict[str, Any]
) -> tuple[bytes, tuple[bytes, ...]] | None:
    kept = {name: value for name, value in attributes.items() if _can_travel(value)}
    try:
        pickled = wire.dumps((type(error), error.args, kept))
        _rebuild(*wire.loads(pickled))
    except BaseException:
        return None
    return _plain(pickled)


def _can_travel(value: object) -> bool:
    try:
        wire.loads(wire.dumps(value))
    except BaseException:
        return False
    return True


def _plain(pickled: Pickled) -> tuple[bytes, tuple[bytes, ...]]:
    return bytes(pickled.joined()), tuple(bytes(buffer) for buffer in pickled.buffers)


# The way back


def decode(body: Pickled) -> tuple[BaseException, str]:
    """Restore (exception, traceback text).

    The exception's `__cause__` is the standard library's remote traceback, whose own cause is the original one.
    """
    from concurrent.futures.process import _RemoteTraceback

    encoded, text = wire.loads(body)
    error = _decode(encoded, text)
    remote = _RemoteTraceback(f'\n"""\n{text}"""')  # type: ignore[arg-type]  # it takes text
    remote.__cause__ = error.__cause__
    suppress = error.__suppress_context__
    _set(error, "__cause__", remote)
    # Assigning a cause suppresses the context, as `raise ... from` does; what the task had decided stays.
    _set(error, "__suppress_context__", suppress or error.__context__ is None)
    return error, text


def _decode(encoded: Encoded, text: str) -> BaseException:
    encoded = Encoded(*encoded)
    error = _restore(encoded)
    if error is None:  # an exception may be false
        error = _stand_in(encoded, text)
    if encoded.context is not None:
        _set(error, "__context__", _decode(encoded.context, ""))
    if encoded.cause is not None:
        _set(error, "__cause__", _decode(encoded.cause, ""))
    _set(error, "__suppress_context__", encoded.suppress_context)
    return error


def _set(error: BaseException, name: str, value: Any) -> None:
    """Set an attribute, also of an exception that is frozen: not by its own `__setattr__`."""
    BaseException.__setattr__(error, name, value)


def _restore(encoded: Encoded) -> BaseException | None:
    try:
        if encoded.pickled is not None:
            error = wire.loads_here(Pickled(*encoded.pickled))
        elif encoded.parts is not None:
            error = _rebuild(*wire.loads_here(Pickled(*encoded.parts)))
        elif encoded.members is not None:
            error = BaseExceptionGroup(
                encoded.message.rsplit(" (", 1)[0], [_decode(member, "") for member in encoded.members]
            )
        else:
            return None
    except Exception:  # it loads in the worker but not here; its text still arrives
        return None
    return error if isinstance(error, BaseException) else None


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    _set(error, "args", args)
    for name, value in attributes.items():
        _set(error, name, value)
    return error


def _stand_in(encoded: Encoded, text: str) -> BaseException:
    from taskpool.errors import RemoteError

    return RemoteError(encoded.message, type_name=encoded.type_name, traceback=text)
