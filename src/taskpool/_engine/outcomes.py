"""Outcomes as they come off the wire: decoded by whoever asks, never by the dispatcher."""

from __future__ import annotations

from typing import Any

from taskpool import errors
from taskpool._engine import exceptions, plain, wire
from taskpool._engine.wire import Pickled
from taskpool._task import RawOutcome, Value


class EncodedValue(RawOutcome):
    """A result, or the list of the results of several items, still pickled."""

    __slots__ = ("_body",)
    ok = True

    def __init__(self, body: Pickled) -> None:
        self._body = body

    @property
    def size(self) -> int:
        """How many bytes it is."""
        return self._body.size

    def parts(self, count: int) -> list[RawOutcome]:
        """Return the items' results by themselves; all have the error, if together they cannot be unpickled."""
        values, error = self.decode()
        return [self] * count if error is not None else [Value([value]) for value in values]

    def decode(self) -> tuple[Any, BaseException | None]:
        """Unpickle it; user code runs here, in the thread of the one who asked."""
        try:
            return wire.loads_here(self._body), None
        except wire.LoadingError as failure:
            cause = failure.cause
            text = f"the result cannot be unpickled: {exceptions.type_name(cause)}: {exceptions.safe_str(cause)}"
            error = errors.UnpickleError(text)
            error.__cause__ = cause if isinstance(cause, Exception) else _as_text(cause)
            return None, error


class EncodedNumbers(EncodedValue):
    """A result that is a number, or the list of the results of several items that are."""

    __slots__ = ()

    def decode(self) -> tuple[Any, BaseException | None]:
        """Read them; no user code runs."""
        return plain.loads(self._body.stream), None


class EncodedValues(RawOutcome):
    """The results of several items of a map, each pickled by itself, since unpickling one may run user code."""

    __slots__ = ("_bodies",)
    ok = True

    def __init__(self, body: Pickled) -> None:
        self._bodies = [body.stream, *body.buffers]

    @property
    def size(self) -> int:
        """How many bytes they are."""
        return sum(map(len, self._bodies))

    def decode(self) -> tuple[Any, BaseException | None]:
        """Unpickle them; the first that cannot be is the error."""
        values: list[Any] = []
        for part in self.parts(len(self._bodies)):
            value, error = part.decode()
            if error is not None:
                return None, error
            values += value
        return values, None

    def parts(self, count: int) -> list[RawOutcome]:
        """Return the items' results by themselves."""
        return [EncodedValue(Pickled(body)) for body in self._bodies]


class EncodedError(RawOutcome):
    """An exception that the task raised, encoded by `exceptions.encode`."""

    __slots__ = ("_body",)

    def __init__(self, body: Pickled) -> None:
        self._body = body

    def decode(self) -> tuple[None, BaseException]:
        """Restore it."""
        try:
            return None, exceptions.decode(self._body)[0]
        except Exception as cause:
            error = errors.UnpickleError("the task's exception cannot be restored")
            error.__cause__ = cause
            return None, error


class EncodedNotSendableError(EncodedError):
    """The result could not be pickled."""

    def decode(self) -> tuple[None, BaseException]:
        """Make the error, with the original one as its cause."""
        return _with_cause(errors.NotSendableError, "the result cannot be pickled", super().decode()[1])


class EncodedUnreadableError(EncodedError):
    """The arguments could not be unpickled in the worker."""

    def decode(self) -> tuple[None, BaseException]:
        """Make the error, with the original one as its cause."""
        return _with_cause(errors.UnpickleError, "the task cannot be unpickled in the worker", super().decode()[1])


def _with_cause(cls: type[errors.TaskPoolError], text: str, cause: BaseException) -> tuple[None, BaseException]:
    error = cls(f"{text}: {exceptions.type_name(cause)}: {exceptions.safe_str(cause)}")
    error.__cause__ = cause
    return None, error


def _as_text(cause: BaseException) -> BaseException:
    return errors.RemoteError(exceptions.safe_str(cause), type_name=exceptions.type_name(cause))
