"""The thread backend: tasks run in threads of this process. They can be asked to end, not made to."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from taskpool._engine.threads import InterruptibleThread, undisturbed
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
    ThreadTeller,
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
from taskpool.errors import InitializerError, NestingError

MOST_WAITING = 8, 64  # how many tasks may wait for others: so many for each worker, and so many besides
LINGER = 10e-3  # seconds that a thread which is one too many stays, since the next wait may begin at once


class ThreadBackend(Backend):
    """Runs tasks in threads. A thread that does not leave a task in time is abandoned, counted and replaced.

    A task may wait for other tasks. What it waits for comes before all that no task waits for, and the thread of the one
    that waits does not count then, so that there is another one. It runs nothing else: no more tasks begin than there
    are workers, and as many threads wait as tasks are nested deep, not as many as will wait when their turn comes.

    An interrupt may strike a task inside any call of this class. All states are therefore changed under a lock that is
    C code, which `with` takes and holds in one step; entering a condition is a Python call, which can be cut when it
    has just got its lock.
    """

    def __init__(self, name: str, setup: Setup) -> None:
        super().__init__(name, setup)
        refuse(
            name,
            mp_context=setup.mp_context,
            preload=setup.preload,
            max_tasks_per_child=setup.max_tasks_per_child,
        )
        log_here(name, setup)
        self._alarms = Alarms(setup.name)
        self.teller: ThreadTeller = ThreadTeller(setup)
        self._heap: list[tuple[int, int, int, LocalTask]] = []
        self._calls: weakref.WeakValueDictionary[int, LocalCall] = weakref.WeakValueDictionary()  # by their future's id
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
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
        future._waiters = Waiters(future, self.begin_wait_for)
        call = LocalCall(future, fn, args, kwargs, options)
        call.lifted_to = 0 if future._group is None else future._group.level
        self._slots.take(future, options.submit_timeout, self.is_own_thread)
        self._calls[id(future)] = call
        call.tell_queued(self.setup)
        self._queue([call])

    def submit_items(self, job: MapJob, first: int, items: Sequence[Any]) -> None:
        """Queue items of a map. A task that maps is about to wait for them."""
        self._raise_if_broken()
        job.level = max(job.level, _level_here())
        tasks = [LocalItem(job, index, item) for index, item in enumerate(items, first)]
        for task in tasks:
            task.tell_queued(self.setup)
        self._queue(tasks)

    def left_queue(self, future: TaskFuture[Any]) -> None:
        """Free the place of a task that waits no longer, and forget it if it was cancelled."""
        super().left_queue(future)
        call = self._calls.get(id(future))
        if call is not None and future.cancelled():
            call.drop()
            self._forget(call)

    def _queue(self, tasks: Sequence[LocalTask]) -> None:
        with self._lock:
            broken = self._broken
            if broken is None:
                for task in tasks:
                    task.in_queue = True
                    self._push(task)
                self._start_threads()
                self._changed.notify(len(tasks) if not self._closing else len(self._threads) + len(tasks))
        if broken is not None:  # since it was looked at last
            for task in tasks:
                self._refuse(task, _failure(broken))

    def _push(self, task: LocalTask) -> None:
        heapq.heappush(self._heap, (-task.level, -task.options.priority, task.order, task))

    def _first(self) -> LocalTask | None:
        """Return the next task; one that was lifted may stand in the queue again, further behind."""
        while self._heap and not self._heap[0][-1].in_queue:
            heapq.heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def _pop(self) -> LocalTask | None:
        """Take the next task off the queue."""
        task = self._first()
        if task is not None:
            heapq.heappop(self._heap)
            task.in_queue = False
        return task

    def _pop_all(self) -> list[LocalTask]:
        return list(iter(self._pop, None))

    def _start_threads(self) -> None:
        """Start as many as there is work and room for."""
        first = self._first()
        if first is None or (not first.level and len(self._threads) >= self.workers):
            return
        present = self._counting_for(first)
        idle = sum(thread.task is None for thread in present)
        for _ in range(min(len(self._heap) - idle, self.workers - len(present))):
            self._start_thread()

    def _counting_for(self, task: LocalTask) -> list[WorkerThread]:
        """Return the threads that count when it is asked whether there is one for `task`."""
        return [thread for thread in self._threads if not (task.level and thread.waits)]

    def _start_thread(self) -> None:
        thread = WorkerThread(self, f"{self.setup.name}-thread-{next(self._numbers)}")
        seconds = self.setup.start_timeout
        if self.setup.initializer is not None and seconds is not None:
            late = TimeoutError(f"it did not finish within start_timeout={seconds:g} seconds")
            self._alarms.set(thread, time.monotonic() + seconds, lambda: self.initializer_failed(thread, late))
        with undisturbed():
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
            with self._lock:
                task = self._await_task(thread)
                if task is None:
                    self._threads.discard(thread)
                    self._changed.notify_all()
                    return None
                thread.task = task
            if isinstance(task, LocalCall):
                self.left_queue(task.future)
            if task.claim():
                return task
            thread.task = None
            self._counts["cancelled"] += 1

    def _await_task(self, thread: WorkerThread) -> LocalTask | None:
        """Wait for the next task, under the lock; None if the thread shall end."""
        while thread in self._threads:
            first = self._first()
            if first is not None and self._may_begin(first):
                return self._pop()
            if first is None and self._closing and not self._waiting:
                return None
            timeout = LINGER if self._has_too_many() else self.setup.idle_timeout
            if not self._changed.wait(timeout) and (self._has_too_many() or self._first() is None):
                return None
        return None

    def _may_begin(self, task: LocalTask) -> bool:
        """Whether an idle thread may begin this task."""
        if len(self._threads) <= self.workers:
            return True
        return sum(thread.task is not None for thread in self._counting_for(task)) < self.workers

    def _has_too_many(self) -> bool:
        return sum(not thread.waits for thread in self._threads) > self.workers

    def started(self, thread: WorkerThread, task: LocalTask) -> None:
        """A thread begins a task."""
        limit = task.options.task_timeout
        if limit is not None:
            self._alarms.set(thread, time.monotonic() + limit, lambda: self._limit_passed(thread, task))

    def ended(self, thread: WorkerThread, task: LocalTask, outcome: RawOutcome | None) -> None:
        """A thread has left a task."""
        with self._lock:
            if thread.abandoned:
                return  # the task was given its end before
            thread.task = None
            thread.waits.clear()  # of those that were cut, or that the task has left open
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
            with self._lock:
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
        with self._lock:
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
        with self._lock:
            if self._waiting.pop(task, 0) is None:
                self._counts["cancelled"] += isinstance(task, LocalCall)
                self._alarms.clear(task)
                self._changed.notify_all()

    def _queue_again(self, task: LocalTask) -> None:
        with self._lock:
            is_waiting = self._waiting.pop(task, 0) is None
        if is_waiting:
            self._queue([task])

    def _refuse_waiting(self, error: BaseException | None = None) -> None:
        with self._lock:
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
        with self._lock:
            self._broken = error
            self._threads.discard(thread)
            waiting = self._pop_all()
            self._changed.notify_all()
        for task in waiting:
            self._refuse(task, _failure(error))
        self._refuse_waiting(error)

    # Tasks wait for tasks

    def collect(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Do the waiting here, if it is a task that waits."""
        self.check_process()
        thread, wait = threading.current_thread(), object()
        if isinstance(thread, WorkerThread):
            try:
                self.begin_wait_for(future, thread, wait)
                future.sleep(timeout)
            finally:
                thread.backend.end_wait(thread, wait)

    def level(self) -> int:
        """One more than the current task's, if there is one."""
        return _level_here()

    def waiting(self, job: MapJob | None = None) -> contextlib.AbstractContextManager[None]:
        """Have another thread run what is waited for, if it is a task that waits."""
        level = _level_here()
        if job is not None and job.level < level:  # somebody else has called the map
            with self._lock:
                job.level = level
                self._lifted([entry[-1] for entry in self._heap if entry[-1].owns(job)])
        return _not_counting()

    def begin_wait_for(self, future: TaskFuture[Any], thread: WorkerThread, wait: object) -> None:
        """A thread's task begins to wait for a call of this backend.

        Raises:
            NestingError: As `begin_wait` does. The call is cancelled: it would go on with the recursion.
        """
        with self._lock:
            call, level = self._calls.get(id(future)), _level_here()
            if call is not None and call.level < level:
                call.lifted_to = level
                self._lifted([call])
        try:
            thread.backend.begin_wait(thread, wait)
        except NestingError:
            future.cancel()
            raise

    def _lifted(self, tasks: Sequence[LocalTask]) -> None:
        """Bring what has been lifted to where it stands now; what runs keeps its level for its next attempt."""
        for task in tasks:
            if task.in_queue:
                self._push(task)
        self._start_threads()  # there may be threads that wait here, also if the current task is another backend's
        self._changed.notify_all()

    def begin_wait(self, thread: WorkerThread, wait: object) -> None:
        """A thread's task begins to wait for others, of this backend or another one of threads.

        Raises:
            NestingError: If so many wait already that it must be a recursion without end.
        """
        with self._lock:
            each, besides = MOST_WAITING
            waiting = sum(bool(other.waits) for other in self._threads)
            if waiting >= each * self.workers + besides and not thread.waits:
                raise NestingError(
                    f"{waiting} tasks of executor {self.setup.name!r} wait for other tasks of it, and no more threads "
                    "are started to run those: nest tasks less deep, or give it more workers"
                )
            thread.waits.add(wait)
            self._start_threads()
            self._changed.notify_all()

    def end_wait(self, thread: WorkerThread, wait: object) -> None:
        """A wait is over; a thread that idles may be one too many now."""
        with self._lock:
            thread.waits.discard(wait)
            self._changed.notify_all()

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

    def _interrupt(self, thread: WorkerThread, task: LocalTask, *, has_timed_out: bool, last: float = math.inf) -> None:
        """Ask the task to end, and abandon it when its grace is over, or at `last`."""
        if thread.interrupt(task, has_timed_out=has_timed_out):
            when = min(last, time.monotonic() + task.options.grace)
            self._alarms.set(thread, when, lambda: self._abandon(thread, task))
            self._alarms.repeat(lambda: thread.strike(task))

    def _abandon(self, thread: WorkerThread, task: LocalTask) -> None:
        """The task did not yield: resolve it, leave the thread to itself, and use another one."""
        with self._lock:
            if thread.task is not task:
                return
            thread.abandoned = True
            ended = self._ended(thread, task, timed_out(task, thread.stack) if thread.timed_out else None)
            self._threads.discard(thread)
            self._counts["replaced"] += 1
            if self._broken is None:
                self._start_threads()
            self._changed.notify_all()
        self.teller.died(thread.name, early=True)
        self._conclude(ended)

    def stacks(self) -> list[RunningTask]:
        """Look at each thread."""
        running = [(thread, thread.task) for thread in list(self._threads)]
        return [
            running_here(task, thread.name, thread.began, thread.ident) for thread, task in running if task is not None
        ]

    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Whether a thread runs this future's task."""
        return any(thread.task is not None and thread.task.owns(future) for thread in list(self._threads))

    def run_callbacks(self, run: Callable[[], None]) -> None:
        """Run callbacks in the thread that resolved the future."""
        run()

    def cancel_job(self, job: MapJob, *, stop: bool) -> None:
        """Drop the items that have not started, and ask those that run to end."""
        with self._lock:
            self._heap = [entry for entry in self._heap if not entry[-1].owns(job)]
            heapq.heapify(self._heap)
            waiting = [task for task in self._waiting if task.owns(job)]
        for task in waiting:
            self._forget(task)
        if stop:
            self._stop_target(job)

    # The end

    def close(self, *, cancel: bool) -> None:
        """Finish what was accepted, then end the threads."""
        with self._lock:
            self._closing = True
            self._is_over = self._is_over or cancel
            waiting = self._pop_all() if cancel else []
            undecided = list(self._undecided)
            self._changed.notify_all()
        for task in waiting:
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
            if task is not None:
                self._interrupt(thread, task, has_timed_out=False, last=kill_at)

    def _refuse(self, task: LocalTask, outcome: RawOutcome | None) -> None:
        if task.settle(outcome, not_run(task)):
            self._counts["cancelled" if outcome is None else "failed"] += 1
        if isinstance(task, LocalCall):
            self.left_queue(task.future)

    def join(self, timeout: float | None) -> bool:
        """Wait until every thread that was not abandoned has ended, and nothing waits for its next attempt."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with _not_counting(), self._lock:
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
        thread = threading.current_thread()
        return isinstance(thread, WorkerThread) and thread.backend is self

    def stats(self) -> Stats:
        """Count threads and tasks."""
        with self._lock:
            running = sum(thread.task is not None for thread in self._threads)
            workers = len(self._threads)
            queued = len({id(entry[-1]) for entry in self._heap if entry[-1].in_queue}) + len(self._waiting)
        return Stats(workers=workers, idle=workers - running, running=running, queued=queued, **self._counts)


@attrs.frozen(eq=False)
class Ended:
    """An attempt that has ended: of which task, with what (None is a cancellation), and why."""

    task: LocalTask
    outcome: RawOutcome | None
    ran: Ran
    timed_out: bool


class WorkerThread(InterruptibleThread):
    """One thread: runs tasks until the sentinel, or until it is abandoned."""

    def __init__(self, backend: ThreadBackend, name: str) -> None:
        super().__init__(name)
        self.task: LocalTask | None = None
        self.interrupted: bool = False  # the current task was asked to end
        self.timed_out: bool = False  # ... because it passed its limit
        self.abandoned: bool = False
        self.stack: str | None = None
        self.began: float = 0.0  # when the current task started (monotonic)
        self._leaving = False  # the current task has ended
        self.waits: set[object] = set()  # what stands for each wait of its task for others
        self.backend: ThreadBackend = backend

    def run(self) -> None:
        """Be the thread."""
        teller = self.backend.teller
        teller.started(self.name)
        try:
            self._serve()
        finally:
            if not self.abandoned:
                teller.died(self.name, early=False)

    def _serve(self) -> None:
        setup = self.backend.setup
        if setup.initializer is not None:
            try:
                setup.initializer(*setup.initargs)
            except BaseException as error:
                self.backend.initializer_failed(self, error)
                return
            self.backend.initialized(self)
        self.backend.teller.ready(self.name)
        while (task := self.backend.next_task(self)) is not None:
            self._run(task)
            del task

    def _run(self, task: LocalTask) -> None:
        self.began = time.monotonic()
        with as_current(task, lambda: self.interrupted):
            outcome = self._run_interruptibly(task)
        if self.interrupted:  # also if the task swallowed it and went on to an end of its own
            outcome = timed_out(task, self.stack) if self.timed_out else None
        self.backend.ended(self, task, outcome)
        self.interrupted = self.timed_out = False

    def _run_interruptibly(self, task: LocalTask) -> RawOutcome | None:
        outcome: RawOutcome | None = None
        with contextlib.suppress(TaskInterrupt):
            try:
                with self.shield:
                    self._leaving = False
                    self.backend.started(self, task)
                    task.tell_started(self.backend.setup, self.name)
                outcome = run_task(task)
            finally:
                with self.shield:  # from here on no interrupt is sent; one that was sent and not raised is taken back
                    self._leaving = True
                    if self.interrupted:
                        cancel_interrupt(self.ident or 0)
        return outcome

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Do not count while the task waits for others."""
        wait = object()
        try:
            self.backend.begin_wait(self, wait)
            yield
        finally:
            self.backend.end_wait(self, wait)

    def interrupt(self, task: LocalTask, *, has_timed_out: bool) -> bool:
        """Ask the current task to end; return whether it is `task`, and was not asked before."""
        with self.shield:
            if self.task is not task or self._leaving or self.interrupted or self.ident is None:
                return False
            self.interrupted = True
            self.timed_out = has_timed_out
            self.stack = stack_of(self.ident)
            return True

    def strike(self, task: LocalTask) -> bool:
        """Interrupt the task that was asked to end, unless it has ended; return False if it cannot be done now."""
        with self.shield:
            if self._leaving or (self.task is not task and not self.abandoned):
                return True
            return interrupt_thread(self.ident or 0)


class Waiters(list[Any]):
    """Who waits for a future by `concurrent.futures.wait` and `as_completed`: if a task does, its thread is told.

    The standard library adds a waiter before it waits and removes it behind that; from `as_completed` also between two
    results, which lets a thread too many run for a moment.
    """

    def __init__(self, future: TaskFuture[Any], begin: Callable[[TaskFuture[Any], WorkerThread, object], None]) -> None:
        super().__init__()
        self._future = weakref.ref(future)  # which has this
        self._begin = begin
        self._threads: dict[Any, tuple[WorkerThread, object]] = {}

    def append(self, waiter: Any) -> None:
        """Begin to wait."""
        thread, future = threading.current_thread(), self._future()
        if isinstance(thread, WorkerThread) and future is not None:
            wait = object()
            self._begin(future, thread, wait)
            self._threads[waiter] = thread, wait
        super().append(waiter)

    def remove(self, waiter: Any) -> None:
        """End it."""
        super().remove(waiter)
        thread, wait = self._threads.pop(waiter, (None, None))
        if thread is not None:
            thread.backend.end_wait(thread, wait)


def _not_counting() -> contextlib.AbstractContextManager[None]:
    """Return what to be in while waiting: if it is a task that waits its thread does not count."""
    thread = threading.current_thread()
    return thread.waiting() if isinstance(thread, WorkerThread) else contextlib.nullcontext()


def _level_here() -> int:
    """How many tasks wait, each for the next, for what the caller begins to wait for."""
    thread = threading.current_thread()
    if not isinstance(thread, WorkerThread):
        return 0
    return 1 if thread.task is None else thread.task.level + 1  # a callback or an initializer has no task


def _initializer_error(cause: BaseException) -> InitializerError:
    error = InitializerError(f"the initializer failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _failure(cause: BaseException) -> RawOutcome:
    return Failure(_initializer_error(cause))
