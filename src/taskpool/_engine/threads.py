"""Starting a thread where nothing can come between: no signal handler, and no interrupt of the thread that does it."""

from __future__ import annotations

import _thread
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class InterruptibleThread(threading.Thread):
    """A thread in which others raise an exception to end what it does; only while they hold its `shield`."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.shield: contextlib.AbstractContextManager[Any] = threading.RLock()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep interrupts of the current thread out.

    One that cuts `Thread.start` leaves locks of it taken. Up to Python 3.11 it can also hit the new thread, which for
    a moment has the id of this one; it then dies before it has begun, and `start` waits for it for ever.
    """
    thread = threading.current_thread()
    if isinstance(thread, InterruptibleThread):
        with thread.shield:
            _let_pass()
            yield
    else:
        yield


def _let_pass() -> None:
    """Do nothing: an interrupt that was sent before is raised when Python code begins."""


def start_undisturbed(start: Callable[[], None]) -> None:
    """Call `start`, which starts a thread, and return when it has.

    Handlers run in the main thread. One that raises in the middle of `Thread.start` there leaves a thread that runs
    without being known, or one that is known and never runs. So another thread does it, one that itself is started in a
    single step; if this thread is interrupted the start goes on.

    Args:
        start: What to call; it must cope with being called twice.

    Raises:
        RuntimeError: If no thread can be started.
    """
    if threading.current_thread() is not threading.main_thread():
        with undisturbed():
            start()
        return
    gate = threading.Lock()
    gate.acquire()
    errors: list[Exception] = []

    def run() -> None:
        try:
            start()
        except Exception as error:
            errors.append(error)
        finally:
            gate.release()

    _thread.start_new_thread(run, ())
    gate.acquire()
    if errors:
        raise errors[0]
