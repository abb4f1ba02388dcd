"""One thread for what may run user code that hangs: done callbacks, and pickling items of a map a second time."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from taskpool._engine.threads import start_undisturbed


class CallbackThread:
    """Runs callables one after the other; starts with the first and ends by sentinel."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def run(self, call: Callable[[], object]) -> None:
        """Have `call` run soon. Never blocks on what is already running."""
        self._queue.put(call)
        if self._thread is None:
            start_undisturbed(self._start)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name=f"{self._name}-callbacks", daemon=True)
                thread.start()
                self._thread = thread

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
            try:
                call()
            except BaseException:
                logging.getLogger("taskpool").exception("a callback raised")
            del call
