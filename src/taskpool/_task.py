"""The life of one call, and the future that the caller holds.

    QUEUED --send--> SENT --finish--> FINISHED            FINISHED: a result or an error, of whatever kind
      |  ^            | |                                 CANCELLED: CancelledError
      |  '-take_back--' '--stop--> STOPPING --finish--> FINISHED
      |                               '-----cancel----> CANCELLED
      '--cancel--> CANCELLED
      '--finish--> FINISHED       (it could not be sent, or no worker could be made ready)

`LIFE` is this picture as a table. A step that is not in it does not happen: whoever comes second finds that it is no
longer possible, and does nothing. All steps are taken under the future's own lock.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING
from concurrent.futures._base import RUNNING as _RUNNING
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from taskpool._checks import check_seconds
from taskpool._unseen import Failures, Unseen
from taskpool.errors import ForkedExecutorError

T = TypeVar("T")

QUEUED, SENT, STOPPING, DONE = PENDING, _RUNNING, "STOPPING", FINISHED

task_ids = itertools.count(1)  # one for each call and each map of this process

LIFE: dict[tuple[str, str], str] = {
    (QUEUED, "send"): SENT,
    (QUEUED, "cancel"): CANCELLED_AND_NOTIFIED,
    (QUEUED, "finish"): DONE,
    (SENT, "take_back"): QUEUED,
    (SENT, "stop"): STOPPING,
    (SENT, "finish"): DONE,
    (SENT, "cancel"): CANCELLED_AND_NOTIFIED,
    (STOPPING, "take_back"): QUEUED,
    (STOPPING, "finish"): DONE,
    (STOPPING, "cancel"): CANCELLED_AND_NOTIFIED,
}


class RawOutcome:
    """How a task ended, not unpickled yet. Decoding may run user code, so it is left to whoever asks for the result."""

    __slots__ = ()
    ok = False  # whether it is a result and not an error

    def decode(self) -> tuple[Any, BaseException | None]:
        """Return (result, None) or (None, error); never raises an Exception."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """How many bytes it is, pickled; 0 if it is not."""
        return 0

    def parts(self, count: int) -> list[RawOutcome]:
        """Return the outcomes of the items of a map whose results stand in it together."""
        return [self] * count


class Value(RawOutcome):
    """A result that is at hand."""

    __slots__ = ("_value",)
    ok = True

    def __init__(self, value: Any) -> None:
        self._value = value

    def decode(self) -> tuple[Any, None]:
        """Return it."""
        return self._value, None


class Failure(RawOutcome):
    """An error that is at hand."""

    __slots__ = ("_error",)

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def decode(self) -> tuple[None, BaseException]:
        """Return it."""
        return None, self._error


class Owner(Protocol):
    """The backend's side of a future."""

    failures: Failures

    def stop(self, future: TaskFuture[Any]) -> None:
        """Have the task of this future stopped; the future then resolves by itself. Never blocks."""

    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Whether the task has started in a worker and not ended."""
        ...

    def stack(self, future: TaskFuture[Any]) -> str | None:
        """Return where the task of this future is right now; None if it does not run."""
        ...

    def run_callbacks(self, run: Callable[[], None]) -> None:
        """Run a future's callbacks on a thread where they may block."""

    def check_process(self) -> None:
        """Raise `ForkedExecutorError` in a process that was forked from the backend's."""

    def collect(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """A thread begins to wait for the future: resolve it in that thread, if there is a short way to its outcome.

        Raises:
            ForkedExecutorError: If the future belongs to the process that this one was forked from.
        """

    def left_queue(self, future: TaskFuture[Any]) -> None:
        """The future's task has left the queue: it was sent, cancelled or refused."""


class Group(Protocol):
    """What a future knows of the group that it is a member of."""

    is_stopping: bool  # no member may start any more
    level: int  # how many tasks wait for its members, each for the next

    def ended(self, member: TaskFuture[Any]) -> None:
        """A member is resolved. Called under its lock, in any thread; never blocks, and never raises an Exception."""


class TaskFuture(Future[T]):
    """The future of one task: a `concurrent.futures.Future` whose `cancel()` reaches a running task, and awaitable.

    Args:
        owner: The backend that runs the task.
        name: The task's name.
        group: The group that it is a member of, if any.

    Attributes:
        output: What the task has printed, once it has ended, with `Executor(output="capture")`: all of its attempts, the
            last megabyte of each.
    """

    # What each has to begin with. Not in `__init__`: thousands of futures may wait, and most never need the base class's
    # condition, which costs a quarter of a submit, nor its lists, which the garbage collector would visit in vain. Those
    # are made for whoever asks for the condition, as all do who append to them. A test compares these fields with those
    # of the running Python.
    _lazy_condition: threading.Condition | None = None
    _sleepers: Sequence[threading.Lock] = ()
    _state: str = QUEUED
    _result: Any = None
    _exception: BaseException | None = None
    _waiters: Any = ()
    _done_callbacks: Any = ()
    _outcome: RawOutcome | None = None
    _unseen: Unseen | None = None
    output: str = ""

    def __init__(self, owner: Owner | None = None, name: str = "", group: Group | None = None) -> None:
        self._lock = threading.RLock()
        self._owner = owner
        self._group = group
        self.order: int = next(task_ids)
        self.task_name: str = name
        self.progress: tuple[float, float] | None = None  # (done, total), as the task itself reported it last
        self.place: Any = None  # what the backend notes about where it runs

    if not TYPE_CHECKING:  # for type checkers it stays the attribute that it is in the base class

        @property
        def _condition(self) -> threading.Condition:
            # Whoever waits in a way of the standard library's comes by here. In a forked child nobody would wake him.
            if self._owner is not None and not self._is_resolved():
                self._owner.check_process()
            if self._lazy_condition is None:
                with self._lock:
                    self._list("_waiters")
                    self._list("_done_callbacks")
                    if self._lazy_condition is None:
                        self._lazy_condition = threading.Condition(self._lock)
            return self._lazy_condition

    def _list(self, name: str) -> list[Any]:
        # In one step of C code: a signal handler may do the same, and put somebody into it, in the middle of this.
        return vars(self).setdefault(name, [])  # type: ignore[no-any-return]

    # What the caller may do

    @property
    def task_id(self) -> str:
        """What tells the task apart from all others of this process; `current_task().id` in the task itself."""
        return str(self.order)

    def cancel(self) -> bool:
        """Cancel the task: a queued one never starts, a running one is stopped.

        Returns:
            False if the task is already done. True otherwise; for a running task that means "stop requested": the
            future resolves soon after, with `CancelledError`, or with the result if it was already written.

        Raises:
            ForkedExecutorError: If the future belongs to the process that this one was forked from.
        """
        return self._cancel(self._invoke_callbacks)

    def stop(self) -> bool:
        """Do what `cancel` does, with the callbacks where they may block: the caller has more to stop."""
        return self._cancel(self._hand_out_callbacks)

    def _cancel(self, run_callbacks: Callable[[], None]) -> bool:
        if self._owner is not None:
            self._owner.check_process()
        with self._lock:
            if self._state in (CANCELLED, CANCELLED_AND_NOTIFIED):
                return True
            if self._state == DONE:
                return False
            queued = self._state == QUEUED
            if queued:
                self._resolve("cancel", None)
            else:
                self._step("stop")
        if queued:
            if self._owner is not None:
                self._owner.left_queue(self)
            run_callbacks()
        elif self._owner is not None:
            self._owner.stop(self)
        return True

    def running(self) -> bool:
        """Whether the task has started and not ended."""
        state = self._state
        if self._owner is None or state not in (SENT, STOPPING):
            return state in (SENT, STOPPING)
        return self._owner.is_running(self)

    def stack(self) -> str | None:
        """Return where the task is right now, and where the other threads of its process are; None if it does not run.

        The task goes on. It does not matter whether it holds the GIL: the text is written from within a signal handler.

        Raises:
            ForkedExecutorError: If the future belongs to the process that this one was forked from.
        """
        if self._owner is None or self._state not in (SENT, STOPPING):
            return None
        self._owner.check_process()
        return self._owner.stack(self)

    def result(self, timeout: float | None = None) -> T:
        """Return the task's result, or raise its error.

        Args:
            timeout: The longest wait in seconds; None waits until the task ends. The task itself is not affected.

        Raises:
            TimeoutError: If the task has not ended in time; `done()` is then False and one may wait again.
            concurrent.futures.CancelledError: If the task was cancelled.
            Exception: The task's own exception, or a `TaskPoolError` that says what happened to it.
        """
        if self._state != DONE or timeout is not None:
            self._wait(timeout)
        if self._outcome is not None:
            self._decode()
        if self._exception is not None:
            try:
                raise self._exception
            finally:
                self = None  # type: ignore[assignment]  # the traceback would keep the future alive in a cycle
        return self._result  # type: ignore[no-any-return]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the task's error, or None if it has a result. Arguments and errors as in `result`."""
        self._wait(timeout)
        self._decode()
        return self._exception

    def __await__(self) -> Generator[Any, None, T]:
        """Wait in asyncio; cancelling the awaiting task cancels this one, a running one included.

        Closing the coroutine that waits, or its loop, does the same. If several wait for one future, the first of them
        that is cancelled cancels it for all, as with asyncio's own futures; `asyncio.shield` keeps it from that.

        Raises:
            asyncio.CancelledError: If the task was cancelled.
            Exception: As in `result`.
        """
        from asyncio import CancelledError as CancelledInLoop

        from taskpool import _loops

        if self._is_resolved():
            yield  # the loop gets its turn all the same
        else:
            yield from self._arrive().__await__()
        outcome = self._outcome
        if outcome is not None and outcome.size >= _loops.LARGE:
            yield from _loops.elsewhere(self._decode).__await__()
        if self._state != DONE:
            raise CancelledInLoop
        return self.result()

    async def _arrive(self) -> None:
        from taskpool._loops import Visit

        visit = Visit(stop=self._give_up)
        try:
            with self._lock:
                if self._is_resolved():
                    return
                self._list("_waiters").append(visit)
            await visit.arrived.wait()
        finally:
            visit.leave()
            if not self._is_resolved():  # the wait was cancelled, closed or collected
                self._give_up()

    def _give_up(self) -> None:
        with contextlib.suppress(ForkedExecutorError):  # in a forked child it is not ours to stop
            self.cancel()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a TaskFuture cannot be sent to a worker: it is resolved in the process that submitted its task; wait for "
            "it there, and send its result"
        )

    def _wait(self, timeout: float | None) -> None:
        seconds = check_seconds(timeout, "timeout")
        if self._owner is not None and not self._is_resolved():
            began = time.monotonic()
            self._owner.collect(self, seconds)
            if seconds is not None:
                seconds = max(0.0, began + seconds - time.monotonic())
        if not self._is_resolved():
            self.sleep(seconds)
        if self._state == DONE:
            return
        if self._is_resolved():
            raise CancelledError
        raise TimeoutError

    def sleep(self, seconds: float | None) -> None:
        """Wait at most so many seconds until the future is resolved, however that may be."""
        # On a lock of this thread's own. A condition lets go of a lock that it must take again, and a signal handler
        # that raises just between leaves it in a state that fails the caller's `with`.
        sleeper = threading.Lock()
        sleeper.acquire()
        sleepers = self._list("_sleepers")
        try:
            sleepers.append(sleeper)
            if not self._is_resolved():  # whoever resolves it from here on finds the sleeper
                sleeper.acquire(timeout=-1 if seconds is None else min(seconds, threading.TIMEOUT_MAX))
        finally:
            with contextlib.suppress(ValueError):
                sleepers.remove(sleeper)

    def has_failed(self) -> bool:
        """Whether it ended with an error, as far as is known without unpickling a result."""
        with self._lock:
            outcome = self._outcome
            return self._state == DONE and (self._exception is not None if outcome is None else not outcome.ok)

    def _is_resolved(self) -> bool:
        return self._state in (DONE, CANCELLED, CANCELLED_AND_NOTIFIED)

    def _decode(self) -> None:
        # Without a lock: an object that hangs while it is unpickled must hang only those who ask for it. If two ask
        # at once, both decode and the first to come back decides, so everybody gets the same object.
        outcome = self._outcome
        if outcome is None:
            return
        if self._unseen is not None:
            self._unseen.is_over = True
        value, error = outcome.decode()
        with self._lock:
            if self._outcome is not None:
                self._outcome = None
                self._result, self._exception = value, error

    def _get_snapshot(self) -> tuple[bool, bool, Any, BaseException | None]:
        # Python 3.14 and newer: how asyncio copies a future's state.
        if self._state == DONE:
            self._decode()
        with self._lock:
            cancelled = self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)
            done = cancelled or self._state == DONE
            return done, cancelled, self._result if done and not cancelled else None, self._exception

    # What the backend does

    def set_running_or_notify_cancel(self) -> bool:
        """Mark the task as sent; return False if it was cancelled before, or its group is stopping."""
        group = self._group
        if group is not None and group.is_stopping:
            self.stop()
            return False
        with self._lock:
            return self._step("send")

    def take_back(self) -> bool:
        """Mark the task as queued again: it was sent and is known not to have started.

        Returns:
            False if the caller has cancelled it meanwhile; the future is then resolved.
        """
        with self._lock:
            stopping = self._state == STOPPING
            self._step("take_back")
        if stopping:
            self.finish_cancelled()
        return not stopping

    def finish(self, outcome: RawOutcome) -> bool:
        """Resolve the future; return False if it was resolved before."""
        with self._lock:
            resolved = self._resolve("finish", outcome)
        if resolved and self._done_callbacks:
            self._hand_out_callbacks()
        return resolved

    def finish_alone(self, outcome: RawOutcome) -> bool:
        """Resolve the future if nobody else waits for it or is to be called; return False, and do nothing, otherwise.

        For a thread that a signal handler may interrupt anywhere: the state is set last, so either nothing has
        happened or everything has.
        """
        with self._lock:
            if self._state != SENT or self._waiters or self._done_callbacks or self._sleepers:
                return False
            if self._group is not None and not outcome.ok:
                return False  # that stops the whole group
            if not outcome.ok:
                self._note_failure(outcome)
            self._outcome = outcome
            self.place = None
            self._state = DONE
            # Still under the lock: what is found now is of a signal handler that came in between, and of nobody who
            # has seen the future done.
            self._tell(outcome)
        self._hand_out_callbacks()
        return True

    def finish_cancelled(self) -> bool:
        """Resolve the future as cancelled; return False if it was resolved before."""
        with self._lock:
            resolved = self._resolve("cancel", None)
        if resolved:
            self._hand_out_callbacks()
        return resolved

    def _step(self, event: str) -> bool:
        state = LIFE.get((self._state, event))
        if state is None:
            return False
        self._state = state
        return True

    def _resolve(self, event: str, outcome: RawOutcome | None) -> bool:
        if not self._step(event):
            return False
        if outcome is not None and not outcome.ok:
            self._note_failure(outcome)
        self._outcome = outcome
        if self.place is not None:
            self.place = None
        if self._waiters or self._sleepers or self._lazy_condition is not None or self._group is not None:
            self._tell(outcome)
        return True

    def _note_failure(self, outcome: RawOutcome) -> None:
        if self._unseen is not None:  # a signal handler came between noting it and resolving
            self._unseen.is_over = True
        if self._owner is not None:
            self._unseen = self._owner.failures.add(self.task_name, outcome)

    def _tell(self, outcome: RawOutcome | None) -> None:
        for waiter in self._waiters:
            if outcome is None:
                waiter.add_cancelled(self)
            elif outcome.ok:
                waiter.add_result(self)
            else:
                waiter.add_exception(self)
        for sleeper in tuple(self._sleepers):  # those that wake take themselves off
            sleeper.release()
        if self._lazy_condition is not None:
            with self._lock:
                self._lazy_condition.notify_all()
        if self._group is not None:
            self._group.ended(self)
            self._group = None

    def _hand_out_callbacks(self) -> None:
        if not self._done_callbacks:
            return
        if self._owner is None:
            self._invoke_callbacks()
        else:
            self._owner.run_callbacks(self._invoke_callbacks)

    def _invoke_callbacks(self) -> None:
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException:  # also SystemExit: a callback must not end the thread that runs everybody's
                logging.getLogger("taskpool").exception("a callback of %r raised", self)

    def __repr__(self) -> str:
        name = f" of {self.task_name}" if self.task_name else ""
        return f"<TaskFuture{name} at {id(self):#x} state={self._state.lower().replace('_and_notified', '')}>"
