"""The dispatcher's event loop: what it waits for, and how other threads reach it."""

from __future__ import annotations

import contextlib
import math
import os
import select
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from taskpool._engine.descriptors import close_kept, keep_from_children

now = time.monotonic

LONGEST_WAIT = 3600.0  # seconds


class Loop:
    """Waits for descriptors, for the next deadline, and for calls from other threads; one thread turns it.

    Args:
        refuse: Called with each (function, argument) that comes after the end.
    """

    def __init__(self, refuse: Callable[[Callable[[Any], None], Any], None]) -> None:
        self.wake_at = math.inf  # the next deadline (monotonic)
        self._refuse = refuse
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._selector = selectors.DefaultSelector()
        self._epoll = _share(self._selector)
        self._unwatched: set[int] = set()  # in this turn: what was reported for them no longer counts
        self._closed = False
        self._sleeps = 0  # how often it has begun to wait
        self._sleep = 0  # the number of the wait that it is in; 0 while it is awake
        self._woken = 0  # the last wait that somebody has ended
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        keep_from_children({self._wake_r, self._wake_w})
        self.watch(self._wake_r, self._drain)

    # From any thread

    def post(self, function: Callable[[Any], None], argument: Any) -> None:
        """Have the loop's thread call `function(argument)`.

        Safe in signal handlers and callbacks: it takes no lock and never blocks.
        """
        self._inbox.append((function, argument))
        if self._closed:  # set before the inbox is emptied for the last time, so one of the two finds this
            self._refuse_all()
            return
        # Noted behind the write, so a signal handler that comes before it writes itself; by number, so one that holds
        # this thread up until the loop sleeps again does not speak for that sleep.
        sleep = self._sleep
        if sleep and sleep != self._woken:
            with contextlib.suppress(OSError):  # full: it wakes anyway; closed: it has ended
                os.write(self._wake_w, b"\0")
            self._woken = sleep

    def look_by(self, due: float) -> None:
        """Have the loop turn again at the monotonic time `due` at the latest."""
        # The loop's thread sets `wake_at` to infinity before it looks for deadlines, so it either sees the new one
        # there or is seen here to sleep too long.
        if due < self.wake_at:
            self.post(self.wake_by, due)

    def __len__(self) -> int:
        """How many calls wait."""
        return len(self._inbox)

    # From the loop's own thread

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` is readable."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def watch_writable(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` is writable."""
        self._selector.register(fd, selectors.EVENT_WRITE, callback)

    def unwatch(self, fd: int) -> None:
        """End a watch, if there is one."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fd)
            self._unwatched.add(fd)

    def pause(self, fd: int) -> None:
        """Do not report that `fd` is readable. Also from another thread, if nothing unwatches `fd` meanwhile."""
        if self._epoll is not None:
            with contextlib.suppress(FileNotFoundError):  # its watch has ended
                self._epoll.modify(fd, 0)  # the end of a pipe is reported all the same

    def resume(self, fd: int) -> None:
        """End a pause. Also from another thread, if nothing unwatches `fd` meanwhile."""
        if self._epoll is not None:
            with contextlib.suppress(FileNotFoundError):  # its watch has ended
                self._epoll.modify(fd, select.EPOLLIN)

    def wake_by(self, due: float) -> None:
        """Turn again at the monotonic time `due` at the latest."""
        self.wake_at = min(self.wake_at, due)

    def wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait until something happens; return the descriptors that are ready."""
        self._sleeps += 1
        self._sleep = self._sleeps
        # Whoever posts looks at `_sleep` after the append; so either it is seen here or the pipe wakes us.
        timeout = 0.0 if self._inbox else max(0.0, self.wake_at - now())
        # The system's own calls take no more than some weeks; a turn in between costs nothing.
        ready = self._selector.select(None if timeout == math.inf else min(timeout, LONGEST_WAIT))
        self._sleep = 0
        return ready

    def call(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        """Call what is to be called for these descriptors, and what was posted."""
        self._unwatched.clear()
        for key, _events in ready:
            if key.fd not in self._unwatched:
                key.data()
        for _ in range(len(self._inbox)):
            function, argument = self._inbox.popleft()
            function(argument)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_r, 4096):
                pass

    def close(self) -> None:
        """End: what was posted and is not called yet is refused, and so is what comes later."""
        self._closed = True
        self._refuse_all()
        self._selector.close()
        if self._epoll is not None:
            self._epoll.close()
        fds = self._wake_r, self._wake_w
        self._wake_r = self._wake_w = -1  # first: a thread may be about to write, and the numbers soon mean other files
        for fd in fds:
            close_kept(fd)

    def _refuse_all(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._refuse(*self._inbox.popleft())


def _share(selector: selectors.BaseSelector) -> select.epoll | None:
    """Return a second door to the selector's own epoll, which other threads may use; None where there is none."""
    if hasattr(select, "epoll") and isinstance(selector, selectors.EpollSelector):
        return select.epoll.fromfd(os.dup(selector.fileno()))
    return None
