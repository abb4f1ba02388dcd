"""Waiting in an event loop for what other threads bring.

    another thread                               the event loop
    --------------                               --------------
    visit.ring() --- first since the answer? --- call_soon_threadsafe --> the bell answers: it sets `arrived`
         '---------- otherwise only noted ---------------------------->   of each visit that was rung for

A wake-up from another thread costs a system call and a turn of the loop, so one is made for all that arrives before it
is answered.

asyncio is imported here and where this is used, not before: it takes longer than all else that an executor imports.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

R = TypeVar("R")

TURN = 5e-3  # seconds after which the loop gets its turn, however much there is to do
LARGE = 256 * 1024  # bytes from which on a pickle is loaded in another thread
VIGIL = 86_400.0  # seconds; any time will do


class Visit:
    """Somebody in the running loop who waits, once or again and again, for what other threads bring.

    Args:
        stop: Called if the loop is closed during the visit: stops what was waited for. Must not block.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        self.stop = stop
        self.arrived = asyncio.Event()
        self._bell = _bell_of(asyncio.get_running_loop())
        self._bell.visits.add(self)

    def ring(self, _future: object = None) -> None:
        """Have `arrived` set soon. From any thread, under any lock."""
        self._bell.ring(self)

    add_result = add_exception = add_cancelled = ring  # what a future calls of those who wait for it
    release = ring  # what is called of those who wait for a place

    def leave(self) -> None:
        """Wait no more. In the loop's thread, or where a coroutine is collected."""
        self._bell.visits.discard(self)


class Block:
    """A block of `async with`, run by the current task, that waits for other threads and may be interrupted by them.

    Args:
        stop: Called if the loop is closed while the block runs: stops what it has begun. Must not block.

    Raises:
        RuntimeError: If no task runs.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("`async with` needs a task of asyncio")
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._visit = Visit(stop)
        self._requests = task.cancelling()  # to cancel it, from before
        self._runs = True
        self._interrupted = False
        self.ring = self._visit.ring

    def interrupt_soon(self) -> None:
        """Interrupt what the block awaits, once, as a failure in `asyncio.TaskGroup` does. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._interrupt)

    def _interrupt(self) -> None:
        if self._runs and not self._interrupted:
            self._interrupted = True
            self._task.cancel()

    def leave(self) -> None:
        """Note that it has ended. An interruption has arrived by then, since the loop sent it while the task waited."""
        self._runs = False
        if self._interrupted:
            self._task.uncancel()

    def own_cancellation(self) -> tuple[type[BaseException], ...]:
        """Return what comes of an interruption: CancelledError, unless others have cancelled the task as well."""
        return () if self._task.cancelling() > self._requests else (asyncio.CancelledError,)

    def is_closed_from_outside(self) -> bool:
        """Whether it is not the task that leaves the block, but whoever closes or collects its coroutine."""
        try:
            return asyncio.current_task() is not self._task
        except RuntimeError:  # no loop runs
            return True

    async def wait(self, seconds: float) -> None:
        """Wait until somebody rings, at most so long."""
        arrived = self._visit.arrived
        alarm = None if seconds == math.inf else self._loop.call_later(seconds, arrived.set)
        try:
            await arrived.wait()
            arrived.clear()
        finally:
            if alarm is not None:
                alarm.cancel()

    def end(self) -> None:
        """Wait no more."""
        self._visit.leave()


class _Bell:
    """What all visits to one loop share."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.visits: set[Visit] = set()
        self._rung: deque[Visit] = deque()
        self._is_ringing = False

    def ring(self, visit: Visit) -> None:
        # Without a lock. If another thread finds the bell ringing, its note was made before the answer looks; if two
        # find it silent, the second answer finds nothing to do.
        self._rung.append(visit)
        if not self._is_ringing:
            self._is_ringing = True
            try:
                self.loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # the loop is closed: nobody waits there any more
                return

    def _answer(self) -> None:
        self._is_ringing = False  # before the look: what is noted behind it rings again
        until = time.monotonic() + TURN
        while self._rung:
            self._rung.popleft().arrived.set()
            if time.monotonic() > until:
                self._is_ringing = True
                self.loop.call_soon(self._answer)
                return


class _Vigil:
    """Notices that a loop is closed. A loop tells nobody, but it lets its timers go, and this is held by one alone."""

    def __init__(self, bell: _Bell) -> None:
        self._bell = bell
        self()

    def __call__(self) -> None:
        """Go on: now, and when the time of the timer is over."""
        self._bell.loop.call_later(VIGIL, self)

    def __del__(self) -> None:
        for visit in tuple(self._bell.visits):
            visit.stop()


# By the loop's id, which is its own for as long as its bell lives: a bell holds its loop. The loop holds the bell, by
# the vigil, until it is closed.
_bells: weakref.WeakValueDictionary[int, _Bell] = weakref.WeakValueDictionary()


def _bell_of(loop: asyncio.AbstractEventLoop) -> _Bell:
    bell = _bells.get(id(loop))
    if bell is None:
        bell = _bells[id(loop)] = _Bell(loop)
        _Vigil(bell)
    return bell


async def elsewhere(call: Callable[[], R], *, on_cancel: Callable[[], object] | None = None) -> R:
    """Return what `call` returns, or raise what it raises, in a thread of its own.

    Not in one of the loop's own threads: what the program runs there may keep them all.

    Args:
        call: What may block.
        on_cancel: Has it end soon. It is called when the wait is cancelled, which then goes on until the end; if it is
            None a cancelled wait leaves the thread to itself.
    """
    outcome: Future[R] = Future()
    visit = Visit(stop=on_cancel or _do_nothing)
    threading.Thread(target=_carry_out, args=(call, outcome, visit), name="taskpool-elsewhere", daemon=True).start()
    cancelled: asyncio.CancelledError | None = None
    try:
        while not outcome.done():
            try:
                await visit.arrived.wait()
            except asyncio.CancelledError as error:
                if on_cancel is None:
                    raise
                cancelled = error
                on_cancel()
        if cancelled is not None:
            raise cancelled
        return outcome.result()
    finally:
        visit.leave()
        del cancelled  # its traceback holds this frame


def _carry_out(call: Callable[[], Any], outcome: Future[Any], visit: Visit) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:
        outcome.set_exception(error)
    visit.ring()


def _do_nothing() -> None:
    pass
