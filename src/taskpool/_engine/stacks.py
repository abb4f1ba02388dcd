"""Where running tasks are right now, without stopping them.

The worker's faulthandler writes all stacks into the page, from within a signal handler in C, so it does not matter who
holds the GIL. It does not say when it has done so, and the kernel has no event for that. But a thread that handles a
signal has it blocked, which everybody can see: the caller looks at it in short intervals, in its own thread. What
touches descriptors is done on the dispatcher's thread, where no channel is closed meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from taskpool._engine import stop
from taskpool._engine.handle import Running, WorkerHandle
from taskpool._engine.loop import Loop

PATIENCE = 1.0  # seconds for which the stacks of a worker are waited for: one that is stopped never writes any
PAUSE = 1e-3  # seconds between two looks

now = time.monotonic


class RunningStack(NamedTuple):
    """What a worker ran when it was asked, and where that was; None where that could not be read."""

    worker: WorkerHandle
    running: Running
    stack: str | None


class Stacks:
    """Asks workers for their stacks.

    Args:
        loop: The dispatcher's loop.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._lock = threading.Lock()

    def of(self, worker: WorkerHandle, wanted: Callable[[Running], bool]) -> RunningStack | None:
        """Return where a worker is, if it runs something that is wanted, and still does once it has written that."""
        with self._lock:
            running = _running(worker)
            if running is None or not wanted(running):
                return None
            text = self._dump(worker)
            again = _running(worker)
        if again is None or (again.unit, again.item) != (running.unit, running.item):
            return None
        return RunningStack(worker, running, text)

    def _dump(self, worker: WorkerHandle) -> str | None:
        pid = worker.pid
        if pid is None:
            return None
        blocked = stop.threads_that_block(pid)
        begun, deadline = threading.Event(), now() + PATIENCE
        self._loop.post(lambda _: _ask(worker, begun), None)
        text = None
        if begun.wait(PATIENCE):
            # An empty page may also mean that the signal is on its way from the one list to the other.
            while now() < deadline and not (text and stop.has_taken_signal(pid, blocked)):
                time.sleep(PAUSE)
                text = _stack(worker)
            text = _stack(worker)
        self._loop.post(lambda _: _clear(worker, text), None)
        return text


def _ask(worker: WorkerHandle, begun: threading.Event) -> None:
    if worker.channel.is_open and worker.process is not None and worker.stop is None:
        worker.channel.clear_stack()
        if stop.ask_for_stacks(worker.process):
            begun.set()


def _clear(worker: WorkerHandle, text: str | None) -> None:
    """Make room again for the stack of a crash, unless there may be one already."""
    if worker.channel.is_open and worker.stop is None and _stack(worker) == text:
        worker.channel.clear_stack()


def _running(worker: WorkerHandle) -> Running | None:
    try:
        return worker.running()
    except ValueError:  # its page was unmapped just now
        return None


def _stack(worker: WorkerHandle) -> str | None:
    try:
        return worker.channel.page.stack()
    except ValueError:  # as above
        return None
