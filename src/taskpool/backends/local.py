"""What the backends without processes share: running one task here, and asking a thread to leave it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

from taskpool._current import CurrentTask, name_of, running
from taskpool._engine import exceptions
from taskpool._engine.threads import undisturbed
from taskpool._engine.worker import TaskInterrupt
from taskpool._map import MapJob, Settled
from taskpool._options import TaskOptions
from taskpool._records import RunningTask
from taskpool._retry import Attempts
from taskpool._task import Failure, RawOutcome, TaskFuture, Value
from taskpool.backends.base import Setup, refuse
from taskpool.errors import RemoteError, TaskTimeoutError
from taskpool.events import (
    Event,
    How,
    TaskEnded,
    TaskQueued,
    TaskRetried,
    TaskStarted,
    WorkerDied,
    WorkerReady,
    WorkerReplaced,
    WorkerStarted,
)
from taskpool.logs import Forward, mark_here

_orders = itertools.count()


class LocalTask:
    """A task that runs in this process: a call, or one item of a map.

    Args:
        options: What holds for it.
        name: Its name.
        task_id: What `current_task().id` is in it.
    """

    in_queue: bool = True  # whether it stands in one, until it is taken

    def __init__(self, options: TaskOptions, name: str, task_id: str) -> None:
        self.options = options
        self.name: str = name
        self.id: str = task_id
        self.order: int = next(_orders)  # its place among equals; it keeps it for all its attempts
        self.attempts: Attempts | None = None  # once it has failed and may be tried again

    def claim(self) -> bool:
        """Take it off the queue; False if it was cancelled."""
        raise NotImplementedError

    def call(self) -> Any:
        """Run it."""
        raise NotImplementedError

    def give_back(self) -> bool:
        """Return it to the queue for another attempt; False if it was cancelled meanwhile."""
        raise NotImplementedError

    def report(self, done: float, total: float) -> None:
        """Note how far it says it is."""
        raise NotImplementedError

    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        raise NotImplementedError

    def settle(self, outcome: RawOutcome | None, run: Ran) -> bool:
        """Resolve it; None is a cancellation. Return False if it was resolved before."""
        raise NotImplementedError

    def owns(self, target: object) -> bool:
        """Whether a request to stop `target`, a future or a map, means this."""
        raise NotImplementedError

    @property
    def level(self) -> int:
        """How many tasks wait for it, each for the next."""
        raise NotImplementedError

    @property
    def attempt(self) -> int:
        """Which attempt is being made, from 1."""
        return 1 if self.attempts is None else self.attempts.number

    def tell_queued(self, setup: Setup) -> None:
        """Tell the listeners that it was accepted."""
        if setup.listeners:
            setup.listeners.tell(TaskQueued(executor=setup.name, task=self.name, id=self.id, attempt=0))

    def tell_started(self, setup: Setup, worker: str) -> None:
        """Tell the listeners that an attempt begins."""
        if setup.listeners:
            event = TaskStarted(executor=setup.name, task=self.name, id=self.id, attempt=self.attempt, worker=worker)
            setup.listeners.tell(event)

    def tell_retried(self, setup: Setup, error: BaseException | None, wait: float) -> None:
        """Tell the listeners that another attempt follows."""
        if setup.listeners:
            attempt = self.attempt - 1  # the next one's number has been noted
            setup.listeners.tell(
                TaskRetried(executor=setup.name, task=self.name, id=self.id, attempt=attempt, error=error, wait=wait)
            )

    def tell_ended(self, setup: Setup, how: How, outcome: RawOutcome | None, ran: Ran) -> None:
        """Tell the listeners that it has ended for good."""
        if setup.listeners:
            error = CancelledError() if outcome is None else outcome.decode()[1]
            setup.listeners.tell(
                TaskEnded(
                    executor=setup.name,
                    task=self.name,
                    id=self.id,
                    attempt=ran.attempts,
                    how=how,
                    error=error,
                    seconds=ran.seconds,
                    worker=ran.worker or None,
                )
            )

    def judge(self, outcome: RawOutcome, seconds: float) -> tuple[float | None, RawOutcome]:
        """Return (seconds until its next attempt, or None if there is none, and what stands then)."""
        policy = self.options.retry
        if policy is None or not policy.judges(ok=outcome.ok):
            return None, outcome
        if self.attempts is None:
            self.attempts = Attempts(policy, self.name)
        return self.attempts.decide(outcome, seconds)


class ThreadTeller:
    """Tells listeners about worker threads, in these threads."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._lost: deque[str] = deque()  # that were abandoned, and have no successor yet

    def _tell(self, event: Callable[..., Event], worker: str, **fields: Any) -> None:
        self._setup.listeners.tell(event(executor=self._setup.name, worker=worker, pid=os.getpid(), **fields))

    def started(self, worker: str) -> None:
        """A thread begins."""
        if self._setup.listeners:
            self._tell(WorkerStarted, worker)
            with contextlib.suppress(IndexError):
                self._tell(WorkerReplaced, self._lost.popleft(), by=worker)

    def ready(self, worker: str) -> None:
        """It takes tasks."""
        if self._setup.listeners:
            self._tell(WorkerReady, worker)

    def died(self, worker: str, *, early: bool) -> None:
        """It has ended, or was abandoned."""
        if self._setup.listeners:
            if early:
                self._lost.append(worker)
            self._tell(WorkerDied, worker, exitcode=None, early=early)


class Ran(NamedTuple):
    """An attempt that was made here: when it began (monotonic), how long it took, in which thread, which one it is."""

    started: float
    seconds: float
    worker: str | None
    attempts: int


def log_here(backend: str, setup: Setup) -> None:
    """See that records of tasks say from which they came; they go to the program's own handlers, as all of its records.

    Raises:
        UnsupportedError: If they shall go anywhere else.
    """
    refuse(backend, output="" if setup.output == "inherit" else setup.output)
    if isinstance(setup.sink, Forward):
        mark_here()
    elif setup.sink is not None:
        refuse(backend, logs=setup.sink)


def not_run(task: LocalTask) -> Ran:
    """Return what there is to say of a task whose next attempt is not made."""
    return Ran(0.0, 0.0, None, task.attempt - 1)


class LocalCall(LocalTask):
    """One call of a function in this process."""

    def __init__(self, future: TaskFuture[Any], fn: Any, args: Any, kwargs: Any, options: TaskOptions) -> None:
        super().__init__(options, future.task_name, future.task_id)
        self.future = future
        self.lifted_to: int = 0
        self._call: Any = fn, args, kwargs

    def claim(self) -> bool:
        """Take it off the queue; False if it was cancelled."""
        return self.future.set_running_or_notify_cancel()

    def call(self) -> Any:
        """Run it; what it was called with is not kept beyond its last attempt."""
        fn, args, kwargs = self._call
        if self.options.retry is None:
            self._call = None
        return fn(*args, **kwargs)

    def drop(self) -> None:
        """Let go of function and arguments: it was cancelled, and stands in a queue for a while yet."""
        self._call = None

    def give_back(self) -> bool:
        """Make its future a queued one again."""
        return self.future.take_back()

    def report(self, done: float, total: float) -> None:
        """Note it on the future."""
        self.future.progress = done, total

    def is_cancelled(self) -> bool:
        """Whether the future is resolved."""
        return self.future.done()

    def settle(self, outcome: RawOutcome | None, run: Ran) -> bool:
        """Resolve the future."""
        self._call = None
        return self.future.finish_cancelled() if outcome is None else self.future.finish(outcome)

    def owns(self, target: object) -> bool:
        """Whether this is the future."""
        return target is self.future

    @property
    def level(self) -> int:
        """That of the tasks that wait for its future."""
        return self.lifted_to


class LocalItem(LocalTask):
    """One item of a map in this process."""

    def __init__(self, job: MapJob, index: int, item: Any) -> None:
        super().__init__(job.options, job.options.name or name_of(job.fn), f"{job.id}:{index}")
        self.job = job
        self._index = index
        self._item = item
        self._unsettled = threading.Lock()  # taken by whoever settles it

    def claim(self) -> bool:
        """Take it off the queue; False if the map was cancelled or its time is over."""
        return not self.job.cancelled and not self._is_late()

    def _is_late(self) -> bool:
        return self.job.deadline is not None and time.monotonic() >= self.job.deadline

    def call(self) -> Any:
        """Run it."""
        return self.job.fn(*self._item) if self.job.star else self.job.fn(self._item)

    def give_back(self) -> bool:
        """Return whether anybody still wants it."""
        return not self.is_cancelled()

    def report(self, done: float, total: float) -> None:
        """Note it with the map."""
        self.job.report(self._index, done, total)

    def is_cancelled(self) -> bool:
        """Whether the map was."""
        return self.job.cancelled

    def settle(self, outcome: RawOutcome | None, run: Ran) -> bool:
        """Give the map its outcome; None is a cancellation."""
        if not self._unsettled.acquire(blocking=False):
            return False
        if outcome is None and self._is_late():
            return True  # whoever asks is told that the time is over
        if outcome is None:
            outcome = Failure(CancelledError())  # not asked for where it was the map that was cancelled
        elif outcome.ok:
            outcome = Value([outcome.decode()[0]])
        self.job.settle(Settled(self._index, 1, outcome, *run))
        return True

    def owns(self, target: object) -> bool:
        """Whether this is the map."""
        return target is self.job

    @property
    def level(self) -> int:
        """That of the tasks that wait for the map."""
        return self.job.level


@contextlib.contextmanager
def as_current(task: LocalTask, is_stopping: Callable[[], bool]) -> Iterator[None]:
    """Have `current_task` return this one inside. No interrupt may be under way when this is entered or left."""
    limit = task.options.task_timeout
    deadline = None if limit is None else time.monotonic() + limit
    token = running.set(
        CurrentTask(task.name, task.id, task.attempt, deadline, is_stopping=is_stopping, report=task.report)
    )
    try:
        yield
    finally:
        running.reset(token)


def run_task(task: LocalTask) -> RawOutcome:
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


def kind_of(outcome: RawOutcome | None, *, timed_out: bool) -> How:
    """Return under what an end counts in the statistics."""
    if outcome is None:
        return "cancelled"
    if outcome.ok:
        return "finished"
    return "timed_out" if timed_out else "failed"


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


def running_here(task: LocalTask, worker: str, began: float, thread_id: int | None) -> RunningTask:
    """Return a task that runs in a thread of this process, and where that is."""
    return RunningTask(
        task=task.name,
        id=task.id,
        attempt=task.attempt,
        worker=worker,
        pid=os.getpid(),
        seconds=max(0.0, time.monotonic() - began),
        stack=None if thread_id is None else stack_of(thread_id),
    )


def interrupt_thread(thread_id: int) -> bool:
    """Have TaskInterrupt raised in a thread, as soon as it runs Python code; do nothing and return False while it imports.

    Python's own code of an import takes locks, some for the whole process, in steps that an exception can part: all
    other threads would wait for them for ever.
    """
    if _is_importing(thread_id):
        return False
    _set_async(ctypes.c_ulong(thread_id), ctypes.py_object(TaskInterrupt))
    return True


def _is_importing(thread_id: int) -> bool:
    frame = sys._current_frames().get(thread_id)
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
        frame = frame.f_back
    return frame is not None


def cancel_interrupt(thread_id: int) -> None:
    """Take back what `interrupt_thread` asked for, if it was not raised yet."""
    _set_async(ctypes.c_ulong(thread_id), None)


_set_async = ctypes.pythonapi.PyThreadState_SetAsyncExc


class Alarms:
    """One thread that calls back at given times; it runs only while something is due."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._due: dict[object, tuple[float, Callable[[], None]]] = {}
        self._lock = threading.RLock()  # see ThreadBackend
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    def set(self, key: object, when: float, call: Callable[[], None]) -> None:
        """Have `call` called at the monotonic time `when`."""
        with self._lock:
            self._due[key] = when, call
            self._closed = False
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=f"{self._name}-limits", daemon=True)
                with undisturbed():
                    self._thread.start()
            self._changed.notify()

    def repeat(self, call: Callable[[], bool], pause: float = 5e-3) -> None:
        """Call `call` now and, until it returns True or all has ended, again behind a pause, each longer than the last."""
        if call():
            return
        with self._lock:
            if not self._closed:  # `set` would begin anew
                self.set(object(), time.monotonic() + pause, lambda: self.repeat(call, min(2 * pause, 1.0)))

    def clear(self, key: object) -> None:
        """Forget one."""
        with self._lock:
            self._due.pop(key, None)

    def close(self) -> None:
        """Forget all, and end the thread."""
        with self._lock:
            self._due.clear()
            self._closed = True
            thread = self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)

    def _serve(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except BaseException:  # the next one is somebody else's
                logging.getLogger("taskpool").exception("an alarm failed")

    def _next(self) -> Callable[[], None] | None:
        """Wait for the next call; None when nothing has been due for a while, or all has ended."""
        with self._lock:
            while True:
                if not self._due and not self._changed.wait_for(lambda: self._due or self._closed, 1.0):
                    break
                if not self._due:
                    break
                key, (when, call) = min(self._due.items(), key=lambda entry: entry[1][0])
                left = when - time.monotonic()
                if left <= 0:
                    del self._due[key]
                    return call
                self._changed.wait(left)
            self._thread = None
            return None
