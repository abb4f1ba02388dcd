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

from taskpool._engine import verdicts, wire
from taskpool._engine.callbacks import CallbackThread
from taskpool._engine.channel import ANY_ITEM
from taskpool._engine.crew import END_TIME, Counts, Crew, Settings
from taskpool._engine.deadlines import Deadlines
from taskpool._engine.handle import AHEAD, PICK_UP, SERVING, STARTING, WorkerHandle
from taskpool._engine.hosts import Host
from taskpool._engine.loop import Loop
from taskpool._engine.outcomes import EncodedError
from taskpool._engine.queue import TaskQueue
from taskpool._engine.units import Call, Piece, Range, Source, Unit
from taskpool._engine.wire import BadFrameError, Frame
from taskpool._map import MapJob
from taskpool._task import Failure, Outcome, TaskFuture
from taskpool.logs import LogListener

logger = logging.getLogger("taskpool")
now = time.monotonic

RUSH = 100e-6  # seconds between calls, below which they are better sent by the dispatcher together

FINISHING = frozenset({wire.VALUES, wire.RAISED, wire.UNSENDABLE, wire.UNREADABLE, wire.INTERRUPTED, wire.HALTED})

OPEN, CLOSING, TERMINATING, CLOSED = "open", "closing", "terminating", "closed"


class Dispatcher:
    """Runs units of work on hosted workers.

    Args:
        host: Who starts the processes.
        settings: What does not change.
        left_queue: Called with the future of each call that leaves the queue.
    """

    def __init__(self, host: Host, settings: Settings, left_queue: Callable[[TaskFuture[Any]], None]) -> None:
        self.counts = Counts()
        self.callbacks = CallbackThread(settings.name)
        self.broken: Callable[[], BaseException] | None = None  # makes the error of everything that is submitted
        self._settings = settings
        self._left_queue = left_queue
        self._host = host
        self._queue = TaskQueue()
        self._loop = Loop(self._refuse_posted)
        self._crew = Crew(self, self._loop, host, settings, self.counts)
        self._deadlines = Deadlines(self, self._loop, self._crew, settings.idle_timeout)
        self._logs = LogListener(settings.name)
        self._phase = OPEN
        self._done = threading.Event()  # everything has ended: workers, host, threads
        self._submitted = 0.0  # when the last call came
        self._singling = 0  # ranges whose items are being pickled again, singly
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.RLock()

    # From any thread

    def start(self) -> None:
        """Start the thread, once.

        Raises:
            RuntimeError: If no thread can be started; nothing was accepted then.
        """
        if self._thread is None:
            with self._thread_lock:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name=f"{self._settings.name}-dispatcher", daemon=True)
                    thread.start()
                    self._thread = thread

    @property
    def is_open(self) -> bool:
        """Whether it accepts work."""
        return self._phase == OPEN

    def submit(self, call: Call) -> None:
        """Accept a call: straight to an idle worker where nobody waits, to the queue otherwise. Never blocks."""
        try:
            if not (self._may_hand_over(call) and self._hand_over(call)):
                self._loop.post(self._accept, call)
        except BaseException:
            # A signal handler raised between taking a worker and giving it back: have that worker found and replaced.
            self._loop.post(self._crew.find_lost, None)
            raise

    def _may_hand_over(self, call: Call) -> bool:
        """Whether writing to an idle worker right here is best: nobody waits, and this is not one of a rush of calls.

        The write lets go of the GIL, and coming back costs more than the dispatcher's own sending, many at a time.
        """
        before, self._submitted = self._submitted, now()
        if self._loop or self._queue or not call.is_small():
            return False
        return len(self._crew.idle) == len(self._crew.workers) or self._submitted - before > RUSH

    def _hand_over(self, call: Call) -> bool:
        try:
            worker = self._crew.idle.pop()
        except IndexError:
            return False
        try:
            if not call.claim():
                self._loop.post(self._crew.take_returned, worker)
                return True
            if not worker.give(call):
                call.give_back()
                self._loop.post(self._crew.take_returned, worker)
                return False
            self._left_queue(call.future)
        finally:
            worker.handed = True
        limit = call.options.task_timeout
        due = worker.since + (PICK_UP if limit is None or limit > PICK_UP else limit)
        # The dispatcher sets `wake_at` to infinity before it looks through the workers, so it either sees this call
        # there or is seen here to sleep too long.
        if due < self._loop.wake_at:
            self._loop.post(self._loop.wake_by, due)
        if worker.state != SERVING:
            self._loop.post(self._crew.bury_if_dead, worker)
        return True

    def submit_pieces(self, pieces: list[Piece]) -> None:
        """Accept pieces of a map. Never blocks."""
        self._loop.post(self._accept_all, pieces)

    def stop(self, target: TaskFuture[Any] | MapJob) -> None:
        """Stop what runs for a future or a map, and drop what has not started. Never blocks."""
        if isinstance(target, MapJob):
            self.drop(target)
        self._loop.post(self._deadlines.stop_target, target)

    def drop(self, job: MapJob) -> None:
        """Drop what has not started of a map; what runs may finish."""
        self._loop.post(self._queue.drop_job, job)

    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Whether a worker has this future's task in hand right now."""
        for worker in list(self._crew.workers):
            head = worker.inflight[0] if worker.inflight else None
            if head is not None and head.owns(future):
                with contextlib.suppress(ValueError):  # the page was unmapped just now
                    return worker.running() is not None
        return False

    def close(self, *, cancel: bool = False) -> None:
        """Accept nothing more, finish what was accepted (or cancel what is queued), then end. Never blocks."""
        if self._thread is None:
            self._close_unstarted()
        else:
            self._loop.post(self._begin_close, cancel)

    def terminate(self, kill_at: float = math.inf) -> None:
        """Cancel what is queued and stop what runs; from the time `kill_at` on by SIGKILL. Never blocks."""
        if self._thread is None:
            self._close_unstarted()
        else:
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
        return busy, len(self._queue) + len(self._loop)

    # The thread

    def _run(self) -> None:
        try:
            while not self._has_ended():
                self._loop.turn()
                if now() >= self._loop.wake_at:
                    self._deadlines.look()
                if self._queue:
                    self._feed()
                if self._phase != OPEN:
                    self._continue_close()
        except BaseException as error:  # a fault of ours: nobody may wait for ever because of it
            logger.critical("the dispatcher failed; all tasks are lost", exc_info=True)
            text = f"taskpool's dispatcher failed: {error!r}"
            self.give_up(lambda: RuntimeError(text))
            self._crew.abandon()
        finally:
            self._end()

    # Accepting and feeding

    def _accept(self, source: Source) -> None:
        if self.broken is not None:
            self._refuse(source, Failure(self.broken()))
        elif self._phase == TERMINATING:
            self._refuse(source, None)
        else:
            self._queue.append(source)

    def _accept_all(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._accept(piece)

    def _refuse(self, source: Source, failure: Failure | None) -> None:
        if isinstance(source, Call):
            self._left_queue(source.future)
            if failure is None:
                self.counts.cancelled += source.future.finish_cancelled()
            else:
                self.counts.failed += source.future.finish(failure)
        elif not source.job.cancelled:
            for start, end in source.todo:
                for item in range(start, end):
                    outcome = failure or verdicts.cancelled()
                    source.job.deposit(source.first + item, 1, outcome)

    def _refuse_posted(self, function: Callable[[Any], None], argument: Any) -> None:
        """Cancel what was submitted at the very last moment."""
        if function == self._accept:
            self._refuse(argument, None)
        elif function == self._accept_all:
            for piece in argument:
                self._refuse(piece, None)

    def _feed(self) -> None:
        while self._queue:
            worker = self._crew.take_idle()
            if worker is None:
                break
            if not self._send_next(worker):
                self._crew.make_idle(worker)
                break
        if self._queue:
            self._crew.start_for(self._queue)
        if self._queue and self._settings.max_tasks is None:
            for worker in list(self._crew.workers):
                if worker.state == SERVING and worker.inflight:
                    self._send_next(worker)

    def _send_next(self, worker: WorkerHandle) -> bool:
        """Send the worker as much as it should have of what is next in the queue; False if that is nothing."""
        room = worker.room(-(-len(self._queue) // max(1, len(self._crew.workers))))
        units: list[Unit] = []
        while len(units) < room:
            unit = self._next_unit(worker, only_small=bool(units or worker.inflight))
            if unit is None:
                break
            units.append(unit)
            if isinstance(unit, Range) or not unit.is_small():
                break
        if not units:
            return False
        self._wake_for(units[0], ahead=len(units) > 1 or bool(worker.inflight))
        with contextlib.suppress(OSError):  # it has just died; what is out with it comes back when its end is handled
            if units[0].is_small():
                for unit in worker.give_many(units):
                    self.requeue(unit)
            else:
                worker.begin_large(units[0])
                self._send_large(worker)
        return bool(worker.inflight)

    def _wake_for(self, unit: Unit, *, ahead: bool) -> None:
        limit = unit.options.task_timeout
        soonest = min(PICK_UP, math.inf if limit is None else limit, AHEAD if ahead else math.inf)
        self._loop.wake_by(now() + soonest)

    def _next_unit(self, worker: WorkerHandle, *, only_small: bool) -> Unit | None:
        """Take the next unit off the queue; None if there is none, or it is large and only a small one fits."""
        most = None if self._settings.max_tasks is None else self._settings.max_tasks - worker.served
        while self._queue:
            source = self._queue.first()
            if isinstance(source, Call):
                if only_small and not source.is_small():
                    return None
                self._queue.pop()
                self._left_queue(source.future)
                if source.claim():
                    return source
                self.counts.cancelled += 1
            elif source.job.cancelled or not source.todo:
                self._queue.pop()
            elif only_small and not source.is_small():
                return None
            else:
                unit = source.take(is_last=len(self._queue) == 1, workers=self._settings.max_workers, most=most)
                if not source.todo:
                    self._queue.pop()
                return unit
        return None

    def _send_large(self, worker: WorkerHandle) -> None:
        """Send what the pipe takes of a large frame, and the rest whenever it takes more."""
        if not worker.channel.continue_large():
            self._loop.watch_writable(worker.channel.tasks, lambda: self._continue_sending(worker))

    def _continue_sending(self, worker: WorkerHandle) -> None:
        try:
            finished = worker.channel.continue_large()
        except OSError:
            finished = True  # it died, or closed its end: its own end tells
        worker.since = now()
        if finished:
            self._loop.unwatch(worker.channel.tasks)

    def requeue(self, unit: Unit) -> None:
        """Put back a unit that has not started, or what is left of it, where it stood in the queue."""
        if not unit.give_back():
            self.counts.cancelled += 1
        elif self.broken is not None or self._phase == TERMINATING:
            failure = None if self.broken is None else Failure(self.broken())
            self._refuse(unit if isinstance(unit, Call) else unit.piece, failure)
        else:
            self._queue.insert(unit if isinstance(unit, Call) else unit.piece)

    # What workers write

    def read(self, worker: WorkerHandle) -> None:
        """Take what the worker has written, in order. Does nothing for one whose channel has ended."""
        try:
            for frame in worker.channel.receive():
                self._on_frame(worker, frame)
        except BadFrameError as error:
            worker.reason = f"what it wrote is not a frame ({error})"
            self._cannot_read(worker)
        except MemoryError:
            if worker.inflight:
                unit = worker.inflight.popleft()
                self._fail_item(unit, unit.next if isinstance(unit, Range) else 0, verdicts.no_memory(unit))
            self._cannot_read(worker)
        except (EOFError, OSError):
            self._crew.channel_ended(worker)

    def _cannot_read(self, worker: WorkerHandle) -> None:
        """It costs this worker, and the task it has in hand; what follows in the pipe means nothing."""
        self._loop.unwatch(worker.channel.results)
        self._crew.kill(worker)

    def _on_frame(self, worker: WorkerHandle, frame: Frame) -> None:
        if frame.kind in FINISHING:
            self._on_outcome(worker, frame)
        elif frame.kind == wire.LOG:
            self._logs.put(lambda: wire.loads(frame.body), self._name_of(worker, frame.unit))
        elif frame.kind == wire.HELLO:
            self._crew.process_known(worker, frame.unit)
            self._send_setup(worker)
        elif frame.kind == wire.READY:
            self._crew.ready(worker)
        elif frame.kind == wire.NOT_READY:
            self._crew.not_ready(worker, EncodedError(frame.body))
        elif frame.kind == wire.GOODBYE:
            self._crew.expect_end(worker)

    def _name_of(self, worker: WorkerHandle, unit_id: int) -> str:
        return next((unit.name for unit in worker.inflight if unit.id == unit_id), "")

    def _send_setup(self, worker: WorkerHandle) -> None:
        setup = self._settings.setup
        head = wire.frame_head(wire.SETUP, 0, setup, index=worker.index)
        with contextlib.suppress(OSError):
            worker.channel.begin_large([head, setup.stream, *setup.buffers])
            self._send_large(worker)

    def _on_outcome(self, worker: WorkerHandle, frame: Frame) -> None:
        unit = worker.inflight[0] if worker.inflight else None
        if unit is None or unit.id != frame.unit:
            return  # of a unit that was given up
        if frame.kind == wire.INTERRUPTED:
            self._on_interrupted(worker, unit, frame)
        elif frame.kind == wire.HALTED:
            worker.inflight.popleft()
            self.requeue(unit)
            self._next_task(worker)
        elif frame.kind == wire.UNREADABLE and isinstance(unit, Range) and frame.items > 1:
            worker.inflight.popleft()
            self._send_singly(unit)
            self._next_task(worker)
        elif self._receive(unit, frame):
            worker.finished_one(frame.seconds, now())
            self._next_task(worker)
        elif worker.stop is not None and not unit.begun(worker.stop.item) and worker.stop.item != ANY_ITEM:
            worker.stop = None  # that item has ended by itself

    def _receive(self, unit: Unit, frame: Frame) -> bool:
        if frame.kind == wire.VALUES:
            self.counts.finished += frame.items
        else:
            self.counts.failed += 1
        return unit.receive(frame)

    def _next_task(self, worker: WorkerHandle) -> None:
        worker.stop = None
        if worker.state != SERVING or worker.inflight:
            return
        if self._settings.max_tasks is not None or not self._queue or not self._send_next(worker):
            self._crew.make_idle(worker)

    def _on_interrupted(self, worker: WorkerHandle, unit: Unit, frame: Frame) -> None:
        worker.inflight.popleft()
        self._settle_stopped(worker, unit, frame.item, bytes(frame.body.stream).decode(errors="replace"))
        worker.stop = None
        self._crew.expect_end(worker)  # it ends by itself, since the task may have left anything half done

    def _send_singly(self, unit: Range) -> None:
        """Give a range's items back one by one: together they cannot be read, or one of them kills the reader."""
        self._singling += 1

        def pickle_again() -> None:
            pieces = unit.piece.singly(unit.next, unit.stop) if not unit.job.cancelled else []
            self._loop.post(self._singled, pieces)

        self.callbacks.run(pickle_again)

    def _singled(self, pieces: list[Piece]) -> None:
        self._singling -= 1
        self._accept_all(pieces)

    # Tasks that do not end by themselves

    def settle_left(self, worker: WorkerHandle, unit: Unit, item: int | None) -> None:
        """Settle a unit that a dead worker had: `item` ran, or None if it had not started."""
        request = worker.stop
        if item is None:
            self.requeue(unit)
        elif isinstance(unit, Range) and unit.stop - unit.next > 1 and worker.is_loading():
            self._send_singly(unit)  # it died unpickling several items: none can be blamed yet
        elif request is not None and request.unit is unit and request.item in (item, ANY_ITEM):
            self._settle_stopped(worker, unit, item, worker.channel.page.stack())
        else:
            self.counts.crashed += 1
            self._fail_item(unit, item, verdicts.crashed(worker, unit))

    def _settle_stopped(self, worker: WorkerHandle, unit: Unit, item: int, stack: str | None) -> None:
        """The task was stopped: it passed its limit, or was cancelled."""
        if worker.stop is not None and worker.stop.timed_out:
            self.counts.timed_out += 1
            self._fail_item(unit, item, verdicts.timed_out(worker, unit, stack))
        elif isinstance(unit, Call):
            self.counts.cancelled += unit.future.finish_cancelled()
        else:
            self.counts.cancelled += 1
            self._fail_item(unit, item, verdicts.cancelled())

    def _fail_item(self, unit: Unit, item: int, outcome: Outcome) -> None:
        """Settle one item of a unit, and put back what is left of it."""
        unit.settle(item, outcome)
        if isinstance(unit, Range):
            self.counts.rerun += max(0, item - unit.next)
            piece = unit.rest(item)
            if piece is not None and self._phase == TERMINATING:
                self._refuse(piece, None)
            elif piece is not None:
                self._queue.insert(piece)

    # The end

    def give_up(self, error: Callable[[], BaseException]) -> None:
        """Fail all that waits and all that comes: there is nothing to run it on."""
        self.broken = error
        for source in self._queue.clear():
            self._refuse(source, Failure(error()))
        for worker in list(self._crew.workers):
            if worker.state == STARTING:
                self._crew.kill(worker)

    def _begin_close(self, cancel: bool) -> None:  # noqa: FBT001  (called through the loop)
        if self._phase == OPEN:
            self._phase = CLOSING
        if not cancel:
            return
        self._feed()  # submitted just before, with workers free: these have as good as started
        begun = sum(worker.state == STARTING for worker in self._crew.workers)
        for source in self._queue.clear():
            if begun and isinstance(source, Call):
                begun -= 1  # a worker is being started for it
                self._queue.append(source)
            else:
                self._refuse(source, None)

    def _begin_terminate(self, kill_at: float) -> None:
        self._phase = TERMINATING
        self._deadlines.kill_at = min(self._deadlines.kill_at, kill_at)
        self._loop.wake_by(self._deadlines.kill_at)
        for source in self._queue.clear():
            self._refuse(source, None)
        for worker in list(self._crew.workers):
            if worker.state == SERVING and worker.inflight:
                self._deadlines.stop_unit(worker, worker.inflight[0])

    def _continue_close(self) -> None:
        if not (self._queue or self._loop or self._singling):
            self._crew.retire_idle()

    def _has_ended(self) -> bool:
        busy = self._crew.workers or self._queue or self._loop or self._singling
        return self._phase != OPEN and not busy

    def _close_unstarted(self) -> None:
        with self._thread_lock:
            if self._thread is None and self._phase != CLOSED:
                self._end()

    def _end(self) -> None:
        self._phase = CLOSED
        with contextlib.suppress(Exception):
            self._host.close()
        self._logs.close(END_TIME)
        self._loop.close()
        self.callbacks.close(0)
        self._done.set()
