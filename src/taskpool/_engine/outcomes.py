"""Outcomes as they come off the wire: decoded by whoever asks, never by the dispatcher."""

from __future__ import annotations

from typing import Any

from taskpool._engine import exceptions, wire
from taskpool._engine.wire import Pickled
from taskpool.errors import NotSendableError, TaskPoolError, UnpickleError


class EncodedValue:
    """A result, still pickled."""

    __slots__ = ("_body",)
    ok = True

    def __init__(self, body: Pickled) -> None:
        self._body = body

    def decode(self) -> tuple[Any, BaseException | None]:
        """Unpickle it; user code runs here, in the thread of the one who asked."""
        try:
            return wire.loads_here(self._body), None
        except wire.LoadingError as failure:
            cause = failure.cause
            text = f"the result cannot be unpickled: {exceptions.type_name(cause)}: {exceptions.safe_str(cause)}"
            error = UnpickleError(text)
            error.__cause__ = cause if isinstance(cause, Exception) else _as_text(cause)
            return None, error


class EncodedError:
    """An exception that the task raised, encoded by `exceptions.encode`."""

    ok = False

    def __init__(self, body: Pickled) -> None:
        self._body = body

    def decode(self) -> tuple[None, BaseException]:
        """Restore it."""
        try:
            return None, exceptions.decode(self._body)[0]
        except Exception as cause:
            error = UnpickleError("the task's exception cannot be restored")
            error.__cause__ = cause
            return None, error


class EncodedNotSendableError(EncodedError):
    """The result could not be pickled."""

    def decode(self) -> tuple[None, BaseException]:
        """Make the error, with the original one as its cause."""
        return _with_cause(NotSendableError, "the result cannot be pickled", super().decode()[1])


class EncodedUnreadableError(EncodedError):
    """The arguments could not be unpickled in the worker."""

    def decode(self) -> tuple[None, BaseException]:
        """Make the error, with the original one as its cause."""
        return _with_cause(UnpickleError, "the task cannot be unpickled in the worker", super().decode()[1])


def _with_cause(cls: type[TaskPoolError], text: str, cause: BaseException) -> tuple[None, BaseException]:
    error = cls(f"{text}: {exceptions.type_name(cause)}: {exceptions.safe_str(cause)}")
    error.__cause__ = cause
    return None, error


def _as_text(cause: BaseException) -> BaseException:
    from taskpool.errors import RemoteError

    return RemoteError(exceptions.safe_str(cause), type_name=exceptions.type_name(cause))
