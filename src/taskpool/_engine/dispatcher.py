"""The dispatcher: the one thread that knows all workers, and the only one that decides about kills.

    caller's thread                     dispatcher's thread                     worker process
    ---------------                     -------------------                     --------------
    submit: pickle --- idle worker? --------------------------------- packet --> receive, run
            '--------- inbox, wake --> queue -> give to a worker ---- packet -->
    result() <------ future resolves <- read results, then deaths, <-- frame --- write outcome
                                        then deadlines

It waits on result pipes, process ends, the hosts' sockets, the next deadline and a wake-up; it never polls. In each turn
results come first, then deaths, then deadlines: what a worker wrote completely counts, whatever happened to it later.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from taskpool._engine.callbacks import CallbackThread
from taskpool._engine.crew import Counts, Crew, Settings
from taskpool._engine.deadlines import Deadlines
from taskpool._engine.direct import Direct
from taskpool._engine.feeder import Feeder
from taskpool._engine.handle import SERVING, STARTING, WorkerHandle
from taskpool._engine.hosts.base import Host
from taskpool._engine.loop import Loop
from taskpool._engine.memory import Blocks
from taskpool._engine.outputs import Outputs
from taskpool._engine.receiver import Receiver
from taskpool._engine.reports import Reports
from taskpool._engine.stacks import RunningStack, Stacks
from taskpool._engine.telling import Teller
from taskpool._engine.threads import start_undisturbed
from taskpool._engine.units import Call, Piece, Unit
from taskpool._map import MapJob
from taskpool._task import Failure, TaskFuture

logger = logging.getLogger("taskpool")
now = time.monotonic

OPEN, CLOSING, TERMINATING, CLOSED = "open", "closing", "terminating", "closed"


class Dispatcher:
    """Runs units of work on hosted workers.

    Args:
        host: Who starts the processes.
        settings: What does not change.
        left_queue: Called with the future of each call that leaves the queue.
        report_failures: Called at the end, where handlers may block, to log the failures that nobody looked at.
    """

    def __init__(
        self,
        host: Host,
        settings: Settings,
        left_queue: Callable[[TaskFuture[Any]], None],
        report_failures: Callable[[], None],
    ) -> None:
        self._report_failures = report_failures
        self.counts = Counts()
        self.callbacks = CallbackThread(f"{settings.name}-callbacks", "a callback raised")
        self._settings = settings
        self._host = host
        self._loop = Loop(self._refuse_posted)
        self.blocks = Blocks(self._loop.look_by)
        self.teller = Teller(settings.name, settings.listeners, self.callbacks)
        self._reports = Reports(self._loop, settings.sink, settings.log_timeout, settings.name)
        self._outputs = Outputs(settings.output, self._loop, self._reports)
        self._crew = Crew(self, self._loop, host, settings, self.counts, teller=self.teller, outputs=self._outputs)
        self.look_at_levels = self._crew.look_at_levels
        self._feeder = Feeder(self._loop, self._crew, settings, self.counts, left_queue)
        self._receiver = Receiver(
            self._loop,
            self._crew,
            self._feeder,
            settings=settings,
            counts=self.counts,
            callbacks=self.callbacks,
            reports=self._reports,
            teller=self.teller,
            outputs=self._outputs,
            blocks=self.blocks,
        )
        self._retries = self._receiver.retries
        self._deadlines = Deadlines(self, self._loop, self._crew, settings.idle_timeout)
        self._stacks = Stacks(self._loop)
        self._direct = Direct(
            self._loop,
            self._crew,
            self._feeder,
            left_queue=left_queue,
            read=self.read,
            is_open=lambda: self.is_open,
            # A worker that serves only so many tasks may end after each, and listeners are told of each end: both are
            # the dispatcher's work. So is it to read what a task has printed.
            takes=settings.max_tasks is None and not settings.listeners and not self._outputs.is_on,
        )
        self._phase = OPEN
        self._done = threading.Event()  # everything has ended: workers, host, threads
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.RLock()

    # From any thread

    def start(self) -> None:
        """Start the thread, once.

        Raises:
            RuntimeError: If no thread can be started; nothing was accepted then.
        """
        if self._thread is None:
            start_undisturbed(self._start)

    def _start(self) -> None:
        with self._thread_lock:
            if self._thread is not None or self._phase == CLOSED:
                return
            self._host.prepare()
            # Before the thread is there, which will ask for them: when a worker crashes there may be no descriptor left
            # to load its error, or an interrupted import in the main thread that would have to end first.
            import taskpool._broken  # noqa: F401

            thread = threading.Thread(target=self._run, name=f"{self._settings.name}-dispatcher", daemon=True)
            try:
                thread.start()
            except BaseException:
                self._host.close()  # nobody else would, if this executor is dropped now
                raise
            self._thread = thread

    @property
    def is_open(self) -> bool:
        """Whether it accepts work."""
        return self._phase == OPEN

    @property
    def broken(self) -> Callable[[], BaseException] | None:
        """What makes the error of everything that is submitted, if there is nothing to run it on."""
        return self._feeder.broken

    def submit(self, call: Call) -> None:
        """Accept a call: straight to an idle worker where nobody waits, to the queue otherwise. Never blocks."""
        try:
            if not self._direct.give(call):
                self._loop.post(self._feeder.accept, call)
        except BaseException:
            self._direct.recover_soon()
            self._loop.post(self._drop_unsent, call)
            raise

    def _drop_unsent(self, call: Call) -> None:
        """A signal handler raised in `submit`: if no worker has the call by now, it never starts."""
        if not any(call in worker.inflight for worker in self._crew.workers):
            call.future.finish_cancelled()

    def collect(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Help a thread that waits for a future to its outcome."""
        self._direct.collect(future, timeout)

    def submit_pieces(self, pieces: list[Piece]) -> None:
        """Accept pieces of a map. Never blocks."""
        self._loop.post(self._feeder.accept_all, pieces)

    def stop(self, target: TaskFuture[Any] | MapJob) -> None:
        """Stop what runs for a future or a map, and drop what has not started. Never blocks."""
        if isinstance(target, MapJob):
            self.drop(target)
        self._loop.post(self._deadlines.stop_target, target)

    def drop(self, job: MapJob) -> None:
        """Drop what has not started of a map; what runs may finish."""
        self._loop.post(self._feeder.drop_job, job)

    def cancelled(self) -> None:
        """A call was cancelled while it waited, perhaps for its next attempt. Never blocks."""
        self._feeder.cancelled()

    def forget(self, key: bytes) -> None:
        """Have the workers drop a shared value. Never blocks."""
        self._loop.post(self._crew.forget, key)

    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Whether a worker has this future's task in hand right now."""
        for worker in list(self._crew.workers):
            with contextlib.suppress(ValueError):  # the page was unmapped just now
                running = worker.running()
                if running is not None and running.unit.owns(future):
                    return True
        return False

    def stack(self, future: TaskFuture[Any]) -> str | None:
        """Return where this future's task is right now; None if it does not run. Waits for its worker, for a moment."""
        for worker in list(self._crew.workers):
            found = self._stacks.of(worker, lambda running: running.unit.owns(future))
            if found is not None:
                return found.stack
        return None

    def stacks(self) -> list[RunningStack]:
        """Return what runs, and where it is."""
        found = [self._stacks.of(worker, lambda _: True) for worker in list(self._crew.workers)]
        return [each for each in found if each is not None]

    def log_soon(self, call: Callable[[], None]) -> None:
        """Have something logged in its turn; here, once all has ended."""
        self._loop.post(self._reports.run, call)

    def close(self, *, cancel: bool = False) -> None:
        """Accept nothing more, finish what was accepted (or cancel what is queued), then end. Never blocks."""
        if not self._close_unstarted():
            self._loop.post(self._begin_close, cancel)

    def terminate(self, kill_at: float = math.inf) -> None:
        """Cancel what is queued and stop what runs; from the time `kill_at` on by SIGKILL. Never blocks."""
        if not self._close_unstarted():
            self._loop.post(self._begin_terminate, kill_at)

    def join(self, timeout: float | None) -> bool:
        """Wait at most `timeout` seconds until everything has ended, callbacks included; return whether it has."""
        deadline = math.inf if timeout is None else now() + timeout
        if self.is_own_thread():
            return self._done.is_set()
        if not self._done.wait(timeout):
            return False
        left = None if deadline == math.inf else max(0.0, deadline - now())
        if self._thread is not None:
            self._thread.join(left)
        return self.callbacks.close(left)

    def is_own_thread(self) -> bool:
        """Whether the caller runs on the dispatcher's thread or its callback thread, which must not wait for the end."""
        return threading.current_thread() is self._thread or self.callbacks.is_current()

    def snapshot(self) -> tuple[list[bool], int]:
        """Return (for each worker that serves whether it is busy, how many units wait)."""
        busy = [bool(worker.inflight) for worker in list(self._crew.workers) if worker.state == SERVING]
        return busy, len(self._feeder) + len(self._loop)

    def taken(self) -> tuple[int, int]:
        """Return (results, errors) that were taken past the dispatcher from workers that still serve."""
        workers = list(self._crew.workers)
        return sum(worker.finished for worker in workers), sum(worker.failed for worker in workers)

    # The thread

    def _run(self) -> None:
        try:
            while not self._has_ended():
                ready = self._loop.wait()
                lock = self._direct.shut_out()
                try:
                    self._turn(ready)
                finally:
                    lock.release()
        except BaseException as error:  # a fault of ours: nobody may wait for ever because of it
            text = f"taskpool's dispatcher failed: {error!r}"
            with contextlib.suppress(Exception):
                self.give_up(lambda: RuntimeError(text))
            self._crew.abandon()
            self.log(logging.CRITICAL, "the dispatcher failed; all tasks are lost", exc_info=error)
        finally:
            self._end()

    def _turn(self, ready: list[Any]) -> None:
        self._loop.call(ready)
        if self._phase == TERMINATING:
            self._stop_all()  # before any is killed, so that the kill counts as this stop
        if now() >= self._loop.wake_at:
            self._deadlines.look()
            self._feeder.look_for_due()
            self._reports.look()
            self._crew.take_lent(self.blocks.give_back)
            self.blocks.trim()
        if self._feeder.can_feed or self._crew.idle:
            self._feeder.feed()
        if self._phase != OPEN and not self._has_work():
            self._crew.retire_idle()

    def _refuse_posted(self, function: Callable[[Any], None], argument: Any) -> None:
        if function == self._retries.decided:
            self._retries.end()
        elif function == self._reports.run:
            argument()
        elif function == self._crew.bury_if_dead:
            self._crew.bury_if_dead(argument)
        else:
            self._feeder.refuse_posted(function, argument)

    # What its parts need of each other

    def read(self, worker: WorkerHandle) -> None:
        """Take what the worker has written."""
        self._receiver.read(worker)

    def log(self, level: int, text: str, *args: object, exc_info: BaseException | None = None) -> None:
        """Log a record of the engine's own where handlers may block."""
        self._reports.run(lambda: logger.log(level, text, *args, exc_info=exc_info))

    def withdraw(self, worker: WorkerHandle) -> bool:
        """Put back in the queue what the worker has not read; return whether there was anything."""
        return self._feeder.withdraw(worker)

    def next_task(self, worker: WorkerHandle) -> None:
        """Give a worker that has nothing left something else to do, or let it wait."""
        self._receiver.next_task(worker)

    def listen_again(self, worker: WorkerHandle) -> None:
        """Watch what a worker writes, although a waiting thread wanted to."""
        self._direct.listen_again(worker)

    def settle_left(self, worker: WorkerHandle, unit: Unit, item: int | None) -> None:
        """Settle a unit that a dead worker had: `item` ran, or None if it had not started."""
        self._receiver.settle_left(worker, unit, item)

    def give_up(self, error: Callable[[], BaseException]) -> None:
        """Fail all that waits and all that comes: there is nothing to run it on."""
        self._feeder.broken = error
        self._retries.end()
        self._feeder.refuse_all(lambda: Failure(error()))
        for worker in list(self._crew.workers):
            if worker.state == STARTING:
                self._crew.kill(worker)

    # The end

    def _begin_close(self, cancel: bool) -> None:  # noqa: FBT001  (called through the loop)
        if self._phase == OPEN:
            self._phase = CLOSING
        if not cancel:
            return
        self._retries.end()
        self._feeder.feed()  # submitted just before, with workers free: these have as good as started
        begun = sum(worker.state == STARTING for worker in self._crew.workers)
        self._feeder.refuse_behind(begun)  # a worker is being started for each of the first

    def _begin_terminate(self, kill_at: float) -> None:
        self._phase = TERMINATING
        self._feeder.terminating = True
        self._retries.end()
        self._reports.end_by(kill_at)
        self._deadlines.kill_at = min(self._deadlines.kill_at, kill_at)
        self._loop.wake_by(self._deadlines.kill_at)
        self._feeder.refuse_all()

    def _stop_all(self) -> None:
        """Stop what runs; also what was just being handed over when the end began."""
        for worker in list(self._crew.workers):
            if worker.state == SERVING and worker.inflight and worker.stop is None:
                self._deadlines.stop_unit(worker, worker.inflight[0])

    def _has_work(self) -> bool:
        pickling = self._receiver.singling and self._phase != TERMINATING  # user code, which may hang
        return bool(self._feeder or self._loop or pickling or self._retries or self._reports)

    def _has_ended(self) -> bool:
        return self._phase != OPEN and not self._crew.workers and not self._has_work()

    def _close_unstarted(self) -> bool:
        """End here if the thread has never started; return whether that is so."""
        with self._thread_lock:
            if self._thread is None and self._phase != CLOSED:
                self._end()
            return self._thread is None

    def _end(self) -> None:
        self._phase = CLOSED
        self._feeder.terminating = True  # what comes later, or comes back, is cancelled
        for close in (
            self._host.close,
            lambda: self._reports.run(self._report_failures),
            self._reports.close,
            self._receiver.end,
            self._loop.close,
            self.blocks.close,
            lambda: self.callbacks.close(0),
        ):
            with contextlib.suppress(Exception):  # whatever fails, nobody waits for ever
                close()
        self._done.set()
