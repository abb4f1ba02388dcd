"""Threads for what may run user code that hangs: done callbacks, pickling a second time, log handlers."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable

from taskpool._engine.threads import start_undisturbed


class CallbackThread:
    """Runs callables one after the other; starts with the first and ends by sentinel.

    Args:
        name: The thread's name.
        complaint: What to log if one of them raises.
    """

    def __init__(self, name: str, complaint: str) -> None:
        self._name = name
        self._complaint = complaint
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def run(self, call: Callable[[], object]) -> None:
        """Have `call` run soon. Never blocks on what is already running."""
        self._queue.put(call)
        if self._thread is None:
            try:
                start_undisturbed(self._start)
            except RuntimeError:
                # The system has no more threads, or this is Python 3.12.0 or 3.12.1 and the main thread has ended.
                # Here it may hang the engine, but not at all it would surely be missed.
                self._run_here()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                thread.start()
                self._thread = thread

    def _run_here(self) -> None:
        with contextlib.suppress(queue.Empty):
            while (call := self._queue.get_nowait()) is not None:
                self._call(call)

    def is_current(self) -> bool:
        """Whether the caller is itself running on this thread."""
        return self._thread is threading.current_thread()

    def close(self, timeout: float | None) -> bool:
        """Send the sentinel and wait at most `timeout` seconds for what is queued; return whether all has run."""
        if self._thread is None:
            return True
        self._queue.put(None)
        if self.is_current():
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        for call in iter(self._queue.get, None):
            self._call(call)
            del call

    def _call(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException:  # the next one is somebody else's
            with contextlib.suppress(BaseException):  # a filter or handler may raise anything
                logging.getLogger("taskpool").exception(self._complaint)
