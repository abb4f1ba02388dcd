"""The contract between the executor and what runs its tasks."""

from __future__ import annotations

import _thread
import collections
import contextlib
import math
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from taskpool import _carrier
from taskpool._listeners import Listeners
from taskpool._map import MapBackend
from taskpool._options import TaskOptions
from taskpool._task import TaskFuture
from taskpool._unseen import Failures
from taskpool.errors import ForkedExecutorError, QueueFullError, UnsupportedError
from taskpool.logs import Sink

if TYPE_CHECKING:
    from taskpool._records import Capabilities, RunningTask, Stats


class Setup(NamedTuple):
    """What an executor passes to its backend, checked. Times in seconds."""

    name: str
    max_workers: int
    mp_context: Any = None
    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    preload: tuple[str, ...] = ()
    max_tasks_per_child: int | None = None
    max_pending: int | None = None
    start_timeout: float | None = 60.0
    shutdown_timeout: float | None = None
    idle_timeout: float | None = None
    listeners: Listeners = Listeners()
    sink: Sink | None = None
    log_timeout: float = 5.0
    context: tuple[_carrier.Place, ...] = ()
    output: str = "inherit"


class Sleeper(Protocol):
    """Who waits for a place: the lock of a thread, or somebody in an event loop."""

    def release(self) -> None:
        """Be woken. Must not block."""


class Slots:
    """The places of `max_pending`: a task has one from its submission until it leaves the queue.

    Signal handlers submit, too, so nobody waits for a lock that the interrupted thread may have: the one there is is
    reentrant, and giving a place back takes none. At worst a handler that comes between looking and taking is let in
    beyond the bound.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._holders: set[object] = set()
        self._lock = threading.RLock()  # between threads that take
        self._sleepers: collections.deque[Sleeper] = collections.deque()

    @property
    def is_full(self) -> bool:
        """Whether there is no place."""
        return self._count is not None and len(self._holders) >= self._count

    def take(self, holder: object, timeout: float | None, is_own_thread: Callable[[], bool]) -> None:
        """Wait for a place, and take it; where there is no bound do nothing.

        Args:
            holder: Who has it from now on.
            timeout: The longest wait, in seconds.
            is_own_thread: Tells whether the caller is a thread that frees places, which must not wait for one.

        Raises:
            QueueFullError: If there is none within `timeout` seconds, or at once where waiting could never end.
        """
        if self._count is None or self._take(holder):
            return
        if is_own_thread() or not self._wait(holder, timeout):
            raise self.full(timeout)

    def full(self, timeout: float | None) -> QueueFullError:
        """Return the error that says that there was no place."""
        within = "" if timeout is None else f" within submit_timeout={timeout:g} seconds"
        return QueueFullError(f"max_pending={self._count} tasks are waiting, and none was taken{within}")

    def _take(self, holder: object) -> bool:
        with self._lock:
            if self.is_full:
                return False
            self._holders.add(holder)
            return True

    def _wait(self, holder: object, timeout: float | None) -> bool:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            sleeper = threading.Lock()
            sleeper.acquire()
            self._sleepers.append(sleeper)
            woken = False
            try:
                if self._take(holder):  # whoever frees a place from the append on finds the sleeper
                    return True
                left = deadline - time.monotonic()
                woken = left > 0 and sleeper.acquire(timeout=min(left, threading.TIMEOUT_MAX))
                if not woken:
                    return False
            finally:
                if not woken:
                    self.leave(sleeper)

    def enter(self, sleeper: Sleeper, *, again: bool) -> None:
        """Have `sleeper` released, once, when there is a place: in its turn, or next if its place was snatched away."""
        (self._sleepers.appendleft if again else self._sleepers.append)(sleeper)
        if not self.is_full:  # whoever frees a place from the append on finds the sleeper
            self._wake_one()

    def leave(self, sleeper: Sleeper) -> None:
        """Sleep no more; a call that came for this one, who has no use for it, goes on to the next."""
        try:
            self._sleepers.remove(sleeper)
        except ValueError:
            if not self.is_full:
                self._wake_one()

    def _wake_one(self) -> None:
        with contextlib.suppress(IndexError):
            self._sleepers.popleft().release()

    def free(self, holder: object) -> None:
        """Give a place back, if this one has it."""
        if self._count is None:
            return
        with contextlib.suppress(KeyError):
            self._holders.remove(holder)
            self._wake_one()


class Backend(MapBackend):
    """Runs tasks. Every method that can block takes a bound."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name: str = name
        self.setup: Setup = setup
        self.workers: int = setup.max_workers
        self.pid: int = os.getpid()
        self._slots = Slots(setup.max_pending)
        self._logging: dict[threading.Lock, None] = {}  # of what is being logged, each taken until it has been
        self.failures: Failures = Failures(self.log_soon)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do beyond running tasks: without processes none of it."""
        from taskpool._records import Capabilities

        return Capabilities(
            kill=False,
            isolation=False,
            processes=False,
            start_methods=False,
            preload=False,
            recycling=False,
            logs=False,
            output=False,
        )

    def log_soon(self, call: Callable[[], None]) -> None:
        """Log something where handlers may block. From any thread, at any moment.

        A future may be collected inside of a handler, or with any lock held. So a new thread does it, one that is
        started in a single step; `finish_logging` waits for it.
        """
        gate = threading.Lock()
        gate.acquire()
        self._logging[gate] = None

        def run() -> None:
            try:
                with contextlib.suppress(BaseException):  # a handler may raise anything
                    call()
            finally:
                self._logging.pop(gate, None)
                gate.release()

        try:
            _thread.start_new_thread(run, ())
        except RuntimeError:  # the system has no more threads
            run()

    def finish_logging(self) -> None:
        """Wait for what `log_soon` was given, as long as handlers do not take too long."""
        deadline = time.monotonic() + self.setup.log_timeout
        for gate in list(self._logging):
            gate.acquire(timeout=min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))

    def check_process(self) -> None:
        """Raise `ForkedExecutorError` in a process that was forked from the one that made this. Takes no lock."""
        if not self.is_here():
            raise ForkedExecutorError(
                f"this executor belongs to process {self.pid}; its workers cannot serve process {os.getpid()}, which "
                "was forked from it: make a new Executor here"
            )

    def is_here(self) -> bool:
        """Whether this process is the one that made this."""
        return self.pid == os.getpid()

    def carrying(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with what the caller's context holds for its tasks, if that is anything."""
        if self.setup.context or _carrier.has_bound():
            return _carrier.load(fn, self.setup.context)
        return fn

    def collect(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """A thread begins to wait for this future; there is nothing that it could do itself."""
        self.check_process()

    def level(self) -> int:
        """Return how many tasks wait, each for the next, for what the caller is going to wait for."""
        return 0

    def left_queue(self, future: TaskFuture[Any]) -> None:
        """Free the place of a task that waits no longer."""
        self._slots.free(future)
        if self.setup.listeners and future.done():  # it was cancelled or refused
            self.run_callbacks(lambda: self._tell_ended_unrun(future))

    def _tell_ended_unrun(self, future: TaskFuture[Any]) -> None:
        from taskpool.events import TaskEnded

        cancelled = future.cancelled()
        event = TaskEnded(
            executor=self.setup.name,
            task=future.task_name,
            id=future.task_id,
            attempt=0,
            how="cancelled" if cancelled else "failed",
            error=CancelledError() if cancelled else future.exception(0),
            seconds=0.0,
            worker=None,
        )
        self.setup.listeners.tell(event)

    @abstractmethod
    def submit(
        self, future: TaskFuture[Any], fn: Callable[..., Any], args: Any, kwargs: Any, options: TaskOptions
    ) -> None:
        """Accept a call, which resolves `future`. An argument that cannot be sent fails the future, not this call."""

    @abstractmethod
    def stop(self, future: TaskFuture[Any]) -> None:
        """Have the task of this future stopped; the future then resolves by itself. Never blocks."""

    @abstractmethod
    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Whether the task has started and not ended."""

    def stack(self, future: TaskFuture[Any]) -> str | None:
        """Return where the task of this future is right now; None if it does not run."""
        return next((running.stack for running in self.stacks() if running.id == future.task_id), None)

    @abstractmethod
    def stacks(self) -> list[RunningTask]:
        """Return the tasks that run, and where they are."""

    @abstractmethod
    def run_callbacks(self, run: Callable[[], None]) -> None:
        """Run a future's callbacks on a thread where they may block."""

    @abstractmethod
    def close(self, *, cancel: bool) -> None:
        """Accept nothing more and finish what was accepted, or cancel what is queued. Never blocks."""

    @abstractmethod
    def terminate(self, kill_at: float) -> None:
        """Cancel what is queued and stop what runs, by all means from the time `kill_at` on. Never blocks."""

    @abstractmethod
    def join(self, timeout: float | None) -> bool:
        """Wait at most `timeout` seconds until everything has ended; return whether it has."""

    @abstractmethod
    def stats(self) -> Stats:
        """Return what it is doing and has done."""

    def is_own_thread(self) -> bool:
        """Whether the caller runs on a thread of this backend's, which must not wait for it."""
        return False


def refuse(backend: str, **wanted: object) -> None:
    """Raise for the first of these settings that was given, naming backends that have it.

    Raises:
        UnsupportedError: If one is not None, empty or False.
    """
    for argument, value in wanted.items():
        if value:
            others = {
                "preload": 'backend="process" without mp_context=',
                "mp_context": 'backend="process", "futures" and "pool"',
            }.get(argument, 'backend="process"')
            raise UnsupportedError(f"backend={backend!r} cannot do {argument}={value!r}; {others} can")
