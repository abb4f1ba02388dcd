"""The thread backend: tasks run in threads of this process. They can be asked to end, not made to."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from taskpool._map import MapJob
from taskpool._options import TaskOptions
from taskpool._task import Failure, RawOutcome, TaskFuture
from taskpool.backends.base import Backend, Capabilities, Setup, Stats, refuse
from taskpool.backends.local import (
    Alarms,
    LocalCall,
    LocalItem,
    LocalTask,
    Ran,
    TaskInterrupt,
    as_current,
    cancel_interrupt,
    interrupt_thread,
    kind_of,
    not_run,
    run_task,
    stack_of,
    timed_out,
)
from taskpool.errors import InitializerError


class ThreadBackend(Backend):
    """Runs tasks in threads. A thread that does not leave a task in time is abandoned, counted and replaced."""

    capabilities: Capabilities = Capabilities(
        kill=False, isolation=False, processes=False, start_methods=False, preload=False, recycling=False
    )

    def __init__(self, name: str, setup: Setup) -> None:
        super().__init__(name, setup)
        refuse(
            name,
            mp_context=setup.mp_context,
            preload=setup.preload,
            max_tasks_per_child=setup.max_tasks_per_child,
        )
        self._alarms = Alarms(setup.name)
        self._heap: list[tuple[int, int, LocalTask]] = []
        self._calls: weakref.WeakValueDictionary[int, LocalCall] = weakref.WeakValueDictionary()  # by their future's id
        self._changed = threading.Condition()
        self._threads: set[WorkerThread] = set()
        self._numbers = itertools.count(1)
        self._closing = False
        self._is_over = False  # nothing is tried again
        self._undecided: set[Ended] = set()  # attempts, until it is known what follows
        self._waiting: dict[LocalTask, None] = {}  # for their next attempt, in the order of their failures
        self._broken: BaseException | None = None
        self._counts: dict[str, int] = dict.fromkeys(
            ("finished", "failed", "timed_out", "cancelled", "started", "replaced", "retried"), 0
        )

    # Accepting

    def submit(
        self, future: TaskFuture[Any], fn: Callable[..., Any], args: Any, kwargs: Any, options: TaskOptions
    ) -> None:
        """Queue a call."""
        self._raise_if_broken()
        call = LocalCall(future, fn, args, kwargs, options)
        self._slots.take(future, options.submit_timeout, self.is_own_thread)
        self._calls[id(future)] = call
        self._queue([call])

    def submit_items(self, job: MapJob, first: int, items: Sequence[Any]) -> None:
        """Queue items of a map."""
        self._raise_if_broken()
        self._queue([LocalItem(job, index, item) for index, item in enumerate(items, first)])

    def left_queue(self, future: TaskFuture[Any]) -> None:
        """Free the place of a task that waits no longer, and forget it if it was cancelled."""
        super().left_queue(future)
        call = self._calls.pop(id(future), None)
        if call is not None and future.cancelled():
            call.drop()
            self._forget(call)

    def _queue(self, tasks: Sequence[LocalTask]) -> None:
        with self._changed:
            for task in tasks:
                heapq.heappush(self._heap, (-task.options.priority, task.order, task))
            idle = sum(thread.task is None for thread in self._threads)
            for _ in range(min(len(self._heap) - idle, self.workers - len(self._threads))):
                self._start_thread()
            self._changed.notify(len(tasks) if not self._closing else len(self._threads) + len(tasks))

    def _start_thread(self) -> None:
        thread = WorkerThread(self, f"{self.setup.name}-thread-{next(self._numbers)}")
        seconds = self.setup.start_timeout
        if self.setup.initializer is not None and seconds is not None:
            late = TimeoutError(f"it did not finish within start_timeout={seconds:g} seconds")
            self._alarms.set(thread, time.monotonic() + seconds, lambda: self.initializer_failed(thread, late))
        thread.start()
        self._threads.add(thread)
        self._counts["started"] += 1

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise _initializer_error(self._broken)

    # Threads ask for work

    def next_task(self, thread: WorkerThread) -> LocalTask | None:
        """Return the next task for a thread; None is the sentinel."""
        while True:
            with self._changed:
                while not self._heap or thread not in self._threads:
                    if (self._closing and not self._waiting) or thread not in self._threads:
                        self._threads.discard(thread)
                        self._changed.notify_all()
                        return None
                    if not self._changed.wait(self.setup.idle_timeout) and not self._heap:
                        self._threads.discard(thread)
                        self._changed.notify_all()
                        return None
                task = heapq.heappop(self._heap)[2]
                thread.task = task
            if isinstance(task, LocalCall):
                self.left_queue(task.future)
            if task.claim():
                return task
            thread.task = None
            self._counts["cancelled"] += 1

    def started(self, thread: WorkerThread, task: LocalTask) -> None:
        """A thread begins a task."""
        limit = task.options.task_timeout
        if limit is not None:
            self._alarms.set(thread, time.monotonic() + limit, lambda: self._limit_passed(thread, task))

    def ended(self, thread: WorkerThread, task: LocalTask, outcome: RawOutcome | None) -> None:
        """A thread has left a task."""
        with self._changed:
            if thread.abandoned:
                return  # the task was given its end before
            thread.task = None
            ended = self._ended(thread, task, outcome)
        if task.options.task_timeout is not None or thread.interrupted:
            self._alarms.clear(thread)
        self._conclude(ended)

    def _ended(self, thread: WorkerThread, task: LocalTask, outcome: RawOutcome | None) -> Ended:
        """Note an attempt: the end waits until it is known what follows."""
        ran = Ran(thread.began, time.monotonic() - thread.began, thread.name, task.attempt)
        ended = Ended(task, outcome, ran, thread.timed_out)
        self._undecided.add(ended)
        return ended

    def _conclude(self, ended: Ended) -> None:
        """Settle a task, or have it tried again. User code runs here."""
        task, wait, outcome = ended.task, None, ended.outcome
        try:
            if outcome is not None and not self._is_over:
                wait, outcome = task.judge(outcome, ended.ran.seconds)
            if wait is None or self._is_over:
                self._settle(attrs.evolve(ended, outcome=outcome))
            else:
                if outcome is not None:
                    task.tell_retried(self.setup, outcome.decode()[1], wait)
                self._try_again(task, wait)
        finally:
            with self._changed:
                self._undecided.discard(ended)
                if self._closing:
                    self._changed.notify_all()

    def _settle(self, ended: Ended) -> None:
        if ended.task.settle(ended.outcome, ended.ran):
            how = kind_of(ended.outcome, timed_out=ended.timed_out)
            self._counts[how] += 1
            ended.task.tell_ended(self.setup, how, ended.outcome, ended.ran)

    # What is tried again

    def _try_again(self, task: LocalTask, wait: float) -> None:
        """Have its next attempt queued after so many seconds, unless it is cancelled."""
        if isinstance(task, LocalCall):
            self._calls[id(task.future)] = task
        if not task.give_back():
            self._counts["cancelled"] += 1
            return
        self._counts["retried"] += 1
        with self._changed:
            self._waiting[task] = None
        if wait > 0:
            self._alarms.set(task, time.monotonic() + wait, lambda: self._queue_again(task))
        if self._is_over:  # set before what waits is refused, so one of the two finds it; so for what is cancelled
            self._refuse_waiting()
        elif task.is_cancelled():
            self._forget(task)
        elif wait <= 0:
            self._queue_again(task)

    def _forget(self, task: LocalTask) -> None:
        """Drop a task that was cancelled, if it waits for its next attempt."""
        with self._changed:
            if self._waiting.pop(task, 0) is None:
                self._counts["cancelled"] += isinstance(task, LocalCall)
                self._alarms.clear(task)
                self._changed.notify_all()

    def _queue_again(self, task: LocalTask) -> None:
        with self._changed:
            is_waiting = self._waiting.pop(task, 0) is None
        if is_waiting:
            self._queue([task])

    def _refuse_waiting(self, error: BaseException | None = None) -> None:
        with self._changed:
            waiting, self._waiting = self._waiting, {}
            self._changed.notify_all()
        for task in waiting:
            self._alarms.clear(task)
            self._refuse(task, None if error is None else _failure(error))

    def initialized(self, thread: WorkerThread) -> None:
        """A thread is ready."""
        self._alarms.clear(thread)

    def initializer_failed(self, thread: WorkerThread, error: BaseException) -> None:
        """A thread cannot be made ready: fail all that waits."""
        with self._changed:
            self._broken = error
            self._threads.discard(thread)
            waiting, self._heap = self._heap, []
            self._changed.notify_all()
        for _priority, _order, task in waiting:
            self._refuse(task, _failure(error))
        self._refuse_waiting(error)

    # Stopping tasks

    def stop(self, future: TaskFuture[Any]) -> None:
        """Ask a running task to end."""
        self._stop_target(future)

    def _stop_target(self, target: object) -> None:
        for thread in list(self._threads):
            task = thread.task
            if task is not None and task.owns(target):
                self._interrupt(thread, task, has_timed_out=False)

    def _limit_passed(self, thread: WorkerThread, task: LocalTask) -> None:
        self._interrupt(thread, task, has_timed_out=True)

    def _interrupt(self, thread: WorkerThread, task: LocalTask, *, has_timed_out: bool) -> None:
        if thread.interrupt(task, has_timed_out=has_timed_out):
            when = time.monotonic() + task.options.grace
            self._alarms.set(thread, when, lambda: self._abandon(thread, task))

    def _abandon(self, thread: WorkerThread, task: LocalTask) -> None:
        """The task did not yield: resolve it, leave the thread to itself, and use another one."""
        with self._changed:
            if thread.task is not task:
                return
            thread.abandoned = True
            ended = self._ended(thread, task, timed_out(task, thread.stack) if thread.timed_out else None)
            self._threads.discard(thread)
            self._counts["replaced"] += 1
            if self._heap and not self._broken:
                self._start_thread()
            self._changed.notify_all()
        self._conclude(ended)

    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Whether a thread runs this future's task."""
        return any(thread.task is not None and thread.task.owns(future) for thread in list(self._threads))

    def run_callbacks(self, run: Callable[[], None]) -> None:
        """Run callbacks in the thread that resolved the future."""
        run()

    def cancel_job(self, job: MapJob, *, stop: bool) -> None:
        """Drop the items that have not started, and ask those that run to end."""
        with self._changed:
            self._heap = [entry for entry in self._heap if not entry[2].owns(job)]
            heapq.heapify(self._heap)
            waiting = [task for task in self._waiting if task.owns(job)]
        for task in waiting:
            self._forget(task)
        if stop:
            self._stop_target(job)

    # The end

    def close(self, *, cancel: bool) -> None:
        """Finish what was accepted, then end the threads."""
        with self._changed:
            self._closing = True
            waiting: list[tuple[int, int, LocalTask]] = []
            if cancel:
                self._is_over = True
                waiting, self._heap = self._heap, []
            undecided = list(self._undecided)
            self._changed.notify_all()
        for _priority, _order, task in waiting:
            self._refuse(task, None)
        if cancel:
            self._refuse_waiting()
            for ended in undecided:
                self._settle(ended)

    def terminate(self, kill_at: float) -> None:
        """Cancel what is queued, and ask what runs to end."""
        self.close(cancel=True)
        for thread in list(self._threads):
            task = thread.task
            if task is not None and thread.interrupt(task, has_timed_out=False):
                when = min(kill_at, time.monotonic() + task.options.grace)
                self._alarms.set(thread, when, lambda thread=thread, task=task: self._abandon(thread, task))  # type: ignore[misc]

    def _refuse(self, task: LocalTask, outcome: RawOutcome | None) -> None:
        if task.settle(outcome, not_run(task)):
            self._counts["cancelled" if outcome is None else "failed"] += 1
        if isinstance(task, LocalCall):
            self.left_queue(task.future)

    def join(self, timeout: float | None) -> bool:
        """Wait until every thread that was not abandoned has ended, and nothing waits for its next attempt."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            own = [thread for thread in self._threads if thread is not threading.current_thread()]
            if not self._changed.wait_for(self._has_ended, timeout):
                return False
        for thread in own:
            if thread.abandoned or thread.task is not None:
                continue
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._alarms.close()
        return True

    def _has_ended(self) -> bool:
        others = self._threads.difference([threading.current_thread()])
        return not (others or self._waiting or self._undecided)

    def is_own_thread(self) -> bool:
        """Whether this is one of the threads."""
        return isinstance(threading.current_thread(), WorkerThread)

    def stats(self) -> Stats:
        """Count threads and tasks."""
        with self._changed:
            running = sum(thread.task is not None for thread in self._threads)
            workers = len(self._threads)
            queued = len(self._heap) + len(self._waiting)
        return Stats(workers=workers, idle=workers - running, running=running, queued=queued, **self._counts)


@attrs.frozen(eq=False)
class Ended:
    """An attempt that has ended: of which task, with what (None is a cancellation), and why."""

    task: LocalTask
    outcome: RawOutcome | None
    ran: Ran
    timed_out: bool


class WorkerThread(threading.Thread):
    """One thread: runs tasks until the sentinel, or until it is abandoned."""

    def __init__(self, backend: ThreadBackend, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.task: LocalTask | None = None
        self.interrupted: bool = False  # the current task was asked to end
        self.timed_out: bool = False  # ... because it passed its limit
        self.abandoned: bool = False
        self.stack: str | None = None
        self.began: float = 0.0  # when the current task started (monotonic)
        self._leaving = False  # the current task has ended
        self._backend = backend
        self._lock = threading.Lock()  # held while deciding whether an interrupt still hits its task

    def run(self) -> None:
        """Be the thread."""
        setup = self._backend.setup
        if setup.initializer is not None:
            try:
                setup.initializer(*setup.initargs)
            except BaseException as error:
                self._backend.initializer_failed(self, error)
                return
            self._backend.initialized(self)
        while (task := self._backend.next_task(self)) is not None:
            self._run(task)
            del task

    def _run(self, task: LocalTask) -> None:
        self.began, self._leaving = time.monotonic(), False
        with as_current(task, lambda: self.interrupted):
            outcome = self._run_interruptibly(task)
        if self.interrupted:  # also if the task swallowed it and went on to an end of its own
            outcome = timed_out(task, self.stack) if self.timed_out else None
        self._backend.ended(self, task, outcome)
        self.interrupted = self.timed_out = False

    def _run_interruptibly(self, task: LocalTask) -> RawOutcome | None:
        outcome: RawOutcome | None = None
        with contextlib.suppress(TaskInterrupt):
            try:
                self._backend.started(self, task)
                outcome = run_task(task)
            finally:
                with self._lock:  # from here on no interrupt is sent; one that was sent and not raised is taken back
                    self._leaving = True
                    if self.interrupted:
                        cancel_interrupt(self.ident or 0)
        return outcome

    def interrupt(self, task: LocalTask, *, has_timed_out: bool) -> bool:
        """Ask the current task to end; return whether it is `task`, and was not asked before."""
        with self._lock:
            if self.task is not task or self._leaving or self.interrupted or self.ident is None:
                return False
            self.interrupted = True
            self.timed_out = has_timed_out
            self.stack = stack_of(self.ident)
            interrupt_thread(self.ident)
            return True


def _initializer_error(cause: BaseException) -> InitializerError:
    error = InitializerError(f"the initializer failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _failure(cause: BaseException) -> RawOutcome:
    return Failure(_initializer_error(cause))
