"""Starting a thread where no signal handler can come between."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable


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
