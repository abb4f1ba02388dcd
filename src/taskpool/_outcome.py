"""The record of how one item of a map ended, as `outcomes` hands it out."""

from __future__ import annotations

from typing import Generic, TypeVar, cast

import attrs

from taskpool._repr import short_repr

I = TypeVar("I")  # noqa: E741  (item)
V = TypeVar("V")


@attrs.frozen(repr=False)
class Outcome(Generic[I, V]):
    """How one item ended. Nothing that happened to another item is in it.

    Attributes:
        index: The item's place in the input, from 0.
        item: The item itself; a tuple where there were several inputs.
        error: What the last attempt raised, or a `TaskPoolError` that says what happened to it; None if it succeeded.
        attempts: How many attempts there were; 0 if it could not be sent.
        seconds: How long the last attempt ran. Items that take microseconds run in groups and share their time equally.
        worker: The name of the worker that ran it; None if none did.
        queued: When the item was read from the input, in seconds since the epoch, as `time.time` has it.
        started: When the last attempt started; None if none did.
        finished: When its outcome was known to the parent.
        output: What the last attempt printed, its last megabyte, with `Executor(output="capture")`.
    """

    index: int
    item: I
    error: BaseException | None
    attempts: int
    seconds: float
    worker: str | None
    queued: float
    started: float | None
    finished: float
    output: str = ""
    _value: V | None = attrs.field(default=None, alias="value")

    @property
    def ok(self) -> bool:
        """Whether there is a result."""
        return self.error is None

    @property
    def value(self) -> V:
        """The result.

        Raises:
            BaseException: The item's error, if it has no result.
        """
        if self.error is not None:
            raise self.error
        return cast("V", self._value)

    def __repr__(self) -> str:
        how = f"value={short_repr(self._value)}" if self.ok else f"error={short_repr(self.error)}"
        return f"<Outcome {self.index} item={short_repr(self.item)} {how} attempts={self.attempts} seconds={self.seconds:.3g}>"
