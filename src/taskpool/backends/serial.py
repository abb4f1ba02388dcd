"""The serial backend: the caller runs each task itself, at once. For debugging and tests, and for comparison."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from taskpool._engine.worker import TaskInterrupt
from taskpool._map import MapJob
from taskpool._options import TaskOptions
from taskpool._records import RunningTask, Stats
from taskpool._task import Failure, RawOutcome, TaskFuture
from taskpool.backends.base import Backend, Setup, refuse
from taskpool.backends.local import (
    Alarms,
    LocalCall,
    LocalItem,
    LocalTask,
    Ran,
    as_current,
    cancel_interrupt,
    interrupt_thread,
    kind_of,
    log_here,
    not_run,
    run_task,
    running_here,
    stack_of,
    timed_out,
)
from taskpool.errors import InitializerError


class SerialBackend(Backend):
    """Runs each task in `submit`, in the caller's thread. A limit asks the task to end; it cannot make it."""

    def __init__(self, name: str, setup: Setup) -> None:
        super().__init__(name, setup)
        refuse(
            name,
            mp_context=setup.mp_context,
            preload=setup.preload,
            max_tasks_per_child=setup.max_tasks_per_child,
        )
        log_here(name, setup)
        self.workers = 1
        self._alarms = Alarms(setup.name)
        self._running: list[LocalRun] = []
        self._initialized = False
        self._broken: BaseException | None = None  # what the initializer raised
        self._is_over = False  # nothing is tried again
        self._sleepers: list[threading.Lock] = []  # of callers that wait for a next attempt
        self._counts: dict[str, int] = dict.fromkeys(("finished", "failed", "timed_out", "cancelled", "retried"), 0)

    def submit(
        self, future: TaskFuture[Any], fn: Callable[..., Any], args: Any, kwargs: Any, options: TaskOptions
    ) -> None:
        """Run a call now."""
        self._raise_if_broken()
        self._initialize()
        if self._broken is not None:
            self._counts["failed"] += future.finish(Failure(_initializer_error(self._broken)))
        else:
            self._run(LocalCall(future, fn, args, kwargs, options))

    def carrying(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as it is: tasks run in the caller's own context."""
        return fn

    def submit_items(self, job: MapJob, first: int, items: Sequence[Any]) -> None:
        """Run items of a map now, until the time of the whole call is over."""
        self._initialize()
        self._raise_if_broken()
        for index, item in enumerate(items, first):
            self._run(LocalItem(job, index, item), job.deadline)

    def _initialize(self) -> None:
        if not self._initialized and self.setup.initializer is not None:
            run = LocalRun(None)
            try:
                with self._limited(run, self.setup.start_timeout, None):
                    self.setup.initializer(*self.setup.initargs)
            except BaseException as cause:
                if run.passed_on(cut=isinstance(cause, TaskInterrupt) and not run.interrupted):
                    raise
                self._broken = cause
            if run.timed_out:
                self._broken = TimeoutError(
                    f"it did not finish within start_timeout={self.setup.start_timeout:g} seconds"
                )
        self._initialized = True

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise _initializer_error(self._broken)

    def _run(self, task: LocalTask, deadline: float | None = None) -> None:
        """Run a task, as often as its policy asks for; the caller sleeps in between, as the worker that it is."""
        task.tell_queued(self.setup)
        while task.claim():
            task.tell_started(self.setup, "serial")
            wait = self._attempt(task, deadline)
            if wait is None:
                return
            if not task.give_back():
                break
            self._sleep(wait if deadline is None else min(wait, max(0.0, deadline - time.monotonic())))
            if self._is_over:
                task.settle(None, not_run(task))
                break
        self._counts["cancelled"] += 1

    def _sleep(self, seconds: float) -> None:
        """Wait so many seconds, and no longer than until nothing is tried again."""
        # On a lock of its own: see `TaskFuture.sleep`.
        sleeper = threading.Lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        try:
            if not self._is_over:  # whoever sets it from here on finds the sleeper
                sleeper.acquire(timeout=seconds)
        finally:
            self._sleepers.remove(sleeper)

    def _attempt(self, task: LocalTask, deadline: float | None) -> float | None:
        """Run it once; return the seconds until the next attempt, or settle it and return None."""
        began = time.monotonic()
        run = LocalRun(task)
        self._running.append(run)
        outcome: RawOutcome | None = None
        cut = False  # by an interrupt that means a task around this one
        try:
            with as_current(task, lambda: run.interrupted), self._limited(run, task.options.task_timeout, deadline):
                outcome = run_task(task)
        except TaskInterrupt:
            cut = not run.interrupted
        finally:
            self._running.remove(run)
        if run.interrupted:
            outcome = timed_out(task, run.stack) if run.timed_out else None
        ran = Ran(began, time.monotonic() - began, "serial", task.attempt)
        passed_on = run.passed_on(cut=cut)
        if passed_on is not None:
            self._settle(task, None if passed_on is KeyboardInterrupt else outcome, ran, timed_out=run.timed_out)
            raise passed_on
        return self._conclude(task, outcome, ran, timed_out=run.timed_out)

    def _conclude(self, task: LocalTask, outcome: RawOutcome | None, ran: Ran, *, timed_out: bool) -> float | None:
        if outcome is not None and not self._is_over:
            wait, outcome = task.judge(outcome, ran.seconds)
            if wait is not None:
                self._counts["retried"] += 1
                task.tell_retried(self.setup, outcome.decode()[1], wait)
                return wait
        self._settle(task, outcome, ran, timed_out=timed_out)
        return None

    def _settle(self, task: LocalTask, outcome: RawOutcome | None, ran: Ran, *, timed_out: bool) -> None:
        if task.settle(outcome, ran):
            how = kind_of(outcome, timed_out=timed_out)
            self._counts[how] += 1
            task.tell_ended(self.setup, how, outcome, ran)

    @contextlib.contextmanager
    def _limited(self, run: LocalRun, limit: float | None, deadline: float | None) -> Iterator[None]:
        """Interrupt what runs inside when it passes its limit, or when the whole call passes its own."""
        ends = []
        if limit is not None:
            ends.append((time.monotonic() + limit, True))
        if deadline is not None:
            ends.append((deadline, False))
        if ends:
            when, is_limit = min(ends)
            self._alarms.set(run, when, lambda: self._interrupt(run, has_timed_out=is_limit))
        try:
            with run:
                yield
        finally:
            if ends:
                self._alarms.clear(run)

    def stop(self, future: TaskFuture[Any]) -> None:
        """Ask a running task to end: another thread, or a signal handler, cancelled it."""
        self._stop_target(future)

    def _stop_target(self, target: object) -> None:
        for run in list(self._running):
            if run.task is not None and run.task.owns(target):
                self._interrupt(run)

    def _interrupt(self, run: LocalRun, *, has_timed_out: bool = False) -> None:
        if run.interrupt(has_timed_out=has_timed_out):
            self._alarms.repeat(run.strike)

    def stacks(self) -> list[RunningTask]:
        """Look at the callers' threads."""
        return [
            running_here(run.task, "serial", run.began, run.thread)
            for run in list(self._running)
            if run.task is not None
        ]

    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Whether this future's task runs."""
        return any(run.task is not None and run.task.owns(future) for run in list(self._running))

    def run_callbacks(self, run: Callable[[], None]) -> None:
        """Run callbacks at once."""
        run()

    def cancel_job(self, job: MapJob, *, stop: bool) -> None:
        """Ask an item that runs to end; there is no queue."""
        if stop:
            self._stop_target(job)

    def close(self, *, cancel: bool) -> None:
        """What runs may finish; what waits for its next attempt is cancelled if `cancel` says so."""
        if cancel:
            self._end_retries()

    def _end_retries(self) -> None:
        self._is_over = True
        for sleeper in list(self._sleepers):
            with contextlib.suppress(RuntimeError):  # it has been woken before
                sleeper.release()

    def terminate(self, kill_at: float) -> None:
        """Ask what runs to end, and cancel what waits for its next attempt."""
        self._end_retries()
        for run in list(self._running):
            self._interrupt(run)

    def join(self, timeout: float | None) -> bool:
        """There is nothing to wait for: what was accepted has been run."""
        self._alarms.close()
        return True

    def stats(self) -> Stats:
        """Count tasks."""
        return Stats(workers=1, idle=int(not self._running), running=int(bool(self._running)), **self._counts)


def _initializer_error(cause: BaseException) -> InitializerError:
    error = InitializerError(f"the initializer failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


class LocalRun:
    """One task that runs in the caller's thread: inside `with` it can be interrupted.

    In the main thread a signal wakes it from a blocking call; elsewhere only running Python code can be interrupted.
    A task that runs others in its own thread may be interrupted while they run: that goes through them.
    """

    def __init__(self, task: LocalTask | None) -> None:
        self.task = task
        self.ctrl_c: bool = False  # Ctrl-C came, which means the caller and not the task
        self.interrupted: bool = False
        self.timed_out: bool = False
        self.stack: str | None = None
        self.thread: int = threading.get_ident()
        self.began: float = time.monotonic()
        self._in_main = threading.current_thread() is threading.main_thread()
        self._lock = threading.Lock()
        self._active = False
        self._raised = False  # whether the interrupt has arrived
        self._handlers: dict[signal.Signals, Any] = {}
        self._outer: LocalRun | None = getattr(_here, "run", None)
        self._interrupted_around = self._count_around()

    def __enter__(self) -> None:
        if self._in_main:
            self._handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._handle)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle_ctrl_c)
        _here.run = self
        self._active = True

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._active = False
            if self.interrupted and not self._in_main:
                cancel_interrupt(self.thread)
        _here.run = self._outer
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def interrupt(self, *, has_timed_out: bool) -> bool:
        """Ask the task to end; return whether it runs, and was not asked before."""
        with self._lock:
            if not self._active or self.interrupted:
                return False
            self.interrupted, self.timed_out = True, has_timed_out
            self.stack = stack_of(self.thread)
            if self._in_main:
                signal.pthread_kill(self.thread, signal.SIGUSR1)
            return True

    def strike(self) -> bool:
        """Interrupt the task that was asked to end, where no signal does; return False if it cannot be done now."""
        with self._lock:
            return self._in_main or not self._active or interrupt_thread(self.thread)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted and not self._raised:
            self._raised = True
            if self._active:
                raise TaskInterrupt
            return
        handler = self._handlers.get(signal.SIGUSR1)
        if callable(handler):  # of the task around this one, of the worker that runs it, or the program's own
            handler(number, frame)

    def _handle_ctrl_c(self, _number: int, _frame: FrameType | None) -> None:
        self.ctrl_c = True
        raise KeyboardInterrupt

    # Tasks around this one

    def passed_on(self, *, cut: bool) -> type[BaseException] | None:
        """Return what must be raised behind this task, since it was not meant for it.

        Args:
            cut: Whether this task was cut by such an interrupt. One may also have ended in it unseen: its code caught
                it, or it came together with one of its own.
        """
        if self.ctrl_c or any(run.ctrl_c for run in self._around()):
            return KeyboardInterrupt
        return TaskInterrupt if cut or self._count_around() > self._interrupted_around else None

    def _around(self) -> Iterator[LocalRun]:
        run = self._outer
        while run is not None:
            yield run
            run = run._outer

    def _count_around(self) -> int:
        """Count the tasks around this one that are being interrupted, and that know of it from now on."""
        count = 0
        for run in self._around():
            with run._lock:
                count += run.interrupted
                run._raised = run.interrupted
        return count


_here = threading.local()  # its `run` is the innermost one of each thread
