"""What the backends without processes share: running one task here, and asking a thread to leave it."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from taskpool._engine import exceptions
from taskpool._engine.units import name_of
from taskpool._map import MapJob
from taskpool._options import TaskOptions
from taskpool._task import Failure, Outcome, TaskFuture, Value
from taskpool.errors import RemoteError, TaskTimeoutError


class TaskInterrupt(BaseException):
    """Raised inside a task that must end. Not an Exception, so that ordinary handlers let it pass."""


class LocalCall:
    """One call of a function in this process."""

    def __init__(self, future: TaskFuture[Any], fn: Any, args: Any, kwargs: Any, options: TaskOptions) -> None:
        self.future = future
        self.options = options
        self.name: str = future.task_name
        self._call: Any = fn, args, kwargs

    def claim(self) -> bool:
        """Take it off the queue; False if it was cancelled."""
        return self.future.set_running_or_notify_cancel()

    def call(self) -> Any:
        """Run it, once; what it was called with is not kept."""
        fn, args, kwargs = self._call
        self._call = None
        return fn(*args, **kwargs)

    def drop(self) -> None:
        """Let go of function and arguments: it was cancelled, and stands in a queue for a while yet."""
        self._call = None

    def settle(self, outcome: Outcome | None, seconds: float) -> bool:
        """Resolve the future; None is a cancellation."""
        return self.future.finish_cancelled() if outcome is None else self.future.finish(outcome)

    def owns(self, target: object) -> bool:
        """Whether a request to stop `target` means this."""
        return target is self.future


class LocalItem:
    """One item of a map in this process."""

    def __init__(self, job: MapJob, index: int, item: Any) -> None:
        self.job = job
        self.options: TaskOptions = job.options
        self.name: str = job.options.name or name_of(job.fn)
        self._index = index
        self._item = item
        self._settled = False

    def claim(self) -> bool:
        """Take it off the queue; False if the map was cancelled or its time is over."""
        deadline = self.job.deadline
        return not self.job.cancelled and (deadline is None or time.monotonic() < deadline)

    def call(self) -> Any:
        """Run it."""
        return self.job.fn(*self._item) if self.job.star else self.job.fn(self._item)

    def settle(self, outcome: Outcome | None, seconds: float) -> bool:
        """Deposit the outcome; None is a cancellation, of which nobody will ask."""
        if self._settled:
            return False
        self._settled = True
        if outcome is None:
            return True
        if outcome.ok:
            outcome = Value([outcome.decode()[0]])
        self.job.deposit(self._index, 1, outcome, seconds)
        return True

    def owns(self, target: object) -> bool:
        """Whether a request to stop `target` means this."""
        return target is self.job


LocalTask = LocalCall | LocalItem


def run_task(task: LocalTask) -> Outcome:
    """Run a task and return how it ended; a TaskInterrupt goes through."""
    try:
        return Value(task.call())
    except TaskInterrupt:
        raise
    except BaseException as error:
        if exceptions.travels_raw(error):
            # Without the frames of this library, and of no use to keep alive longer than the error itself.
            return Failure(error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None))
        text = "".join(traceback.format_exception(error))
        made = RemoteError(exceptions.safe_str(error), type_name=exceptions.type_name(error), traceback=text)
        return Failure(made)


def timed_out(task: LocalTask, stack: str | None) -> Failure:
    """Return the outcome of a task that passed its limit."""
    limit = task.options.task_timeout or 0.0
    text = f"task {task.name} ran longer than its task_timeout of {limit:g} seconds and was stopped"
    text += f"; it was here:\n{stack}" if stack else ""
    return Failure(TaskTimeoutError(text, seconds=limit, stack=stack, task=task.name))


def stack_of(thread_id: int) -> str | None:
    """Return where a thread is."""
    frame = sys._current_frames().get(thread_id)
    return None if frame is None else "".join(traceback.format_stack(frame))


def interrupt_thread(thread_id: int) -> None:
    """Have TaskInterrupt raised in a thread, as soon as it runs Python code."""
    _set_async(ctypes.c_ulong(thread_id), ctypes.py_object(TaskInterrupt))


def cancel_interrupt(thread_id: int) -> None:
    """Take back what `interrupt_thread` asked for, if it was not raised yet."""
    _set_async(ctypes.c_ulong(thread_id), None)


_set_async = ctypes.pythonapi.PyThreadState_SetAsyncExc


class Alarms:
    """One thread that calls back at given times; it runs only while something is due."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._due: dict[object, tuple[float, Callable[[], None]]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def set(self, key: object, when: float, call: Callable[[], None]) -> None:
        """Have `call` called at the monotonic time `when`."""
        with self._changed:
            self._due[key] = when, call
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=f"{self._name}-limits", daemon=True)
                self._thread.start()
            self._changed.notify()

    def clear(self, key: object) -> None:
        """Forget one."""
        with self._changed:
            self._due.pop(key, None)

    def close(self) -> None:
        """Forget all, and end the thread."""
        with self._changed:
            self._due.clear()
            thread = self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)

    def _serve(self) -> None:
        while True:
            with self._changed:
                if not self._due and not self._changed.wait_for(lambda: self._due, 1.0):
                    self._thread = None
                    return
                key, (when, call) = min(self._due.items(), key=lambda entry: entry[1][0])
                left = when - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                del self._due[key]
            call()
