"""The dispatcher: the one thread that knows all workers, and the only one that decides about kills.

    caller's thread                     dispatcher's thread                     worker process
    ---------------                     -------------------                     --------------
    submit: pickle --- idle worker? --------------------------------- packet --> receive, run
            '--------- inbox, wake --> queue -> give to a worker ---- packet -->
    result() <------ future resolves <- read results, then deaths, <-- frame --- write outcome
                                        then deadlines

It waits on result pipes, process ends, the hosts' sockets, the next deadline and a wake-up; it never polls. In each turn
results come first, then deaths, then deadlines: what a worker wrote completely counts, whatever happened to it later.

Why a kill never hits the wrong task: before the ladder is climbed for a task, whatever was sent behind it is read back
from the pipe. So if the task is still the worker's current one after that, the worker has nothing else that it could
begin; at worst the kill hits it when it has just written the outcome, which is then delivered.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from taskpool._engine import stop, wire
from taskpool._engine.callbacks import CallbackThread
from taskpool._engine.channel import ANY_ITEM, close_kept, keep_from_children
from taskpool._engine.handle import AHEAD, DYING, ENDING, GONE, PICK_UP, SERVING, STARTING, Stop, WorkerHandle
from taskpool._engine.hosts import PENDING, Host
from taskpool._engine.outcomes import EncodedError
from taskpool._engine.queue import TaskQueue
from taskpool._engine.units import Call, Piece, Range, Source, Unit
from taskpool._engine.wire import BadFrameError, Frame, Pickled
from taskpool._map import MapJob
from taskpool._task import Failure, Outcome, TaskFuture
from taskpool.errors import InitializerError, TaskTimeoutError, WorkerCrashedError
from taskpool.logs import LogListener

logger = logging.getLogger("taskpool")
now = time.monotonic

RUSH = 100e-6  # seconds between calls, below which they are better sent by the dispatcher together
STACK_TIME = 0.25  # seconds in which a worker writes its stacks and ends by that
LOST_TIME = 0.1  # ... without a channel may still take to end by itself
END_TIME = 1.0  # ... answers the sentinel, or is gone after SIGKILL; then the slot is given up
FAILED_STARTS = 3  # this many in a row, and no worker can be made ready

FINISHING = frozenset({wire.VALUES, wire.RAISED, wire.UNSENDABLE, wire.UNREADABLE, wire.INTERRUPTED, wire.HALTED})

OPEN, CLOSING, TERMINATING, CLOSED = "open", "closing", "terminating", "closed"


@attrs.frozen
class Settings:
    """What does not change in a dispatcher's life. Times in seconds."""

    name: str
    max_workers: int
    setup: Pickled
    has_initializer: bool = False
    start_timeout: float | None = 60.0
    max_tasks: int | None = None
    idle_timeout: float | None = None


@attrs.define
class Counts:
    """What happened so far. Written by the dispatcher only."""

    finished: int = 0
    failed: int = 0
    timed_out: int = 0
    cancelled: int = 0
    crashed: int = 0
    started: int = 0
    replaced: int = 0
    rerun: int = 0


class Dispatcher:
    """Runs units of work on hosted workers. Public methods are for any thread; those with an underscore for its own."""

    def __init__(self, host: Host, settings: Settings, release_slot: Callable[[Call], None]) -> None:
        self.settings = settings
        self.counts = Counts()
        self.callbacks = CallbackThread(settings.name)
        self.logs = LogListener(settings.name)
        self.broken: Callable[[], BaseException] | None = None
        self.phase = OPEN
        self.done = threading.Event()  # everything has ended: workers, host, threads
        self._host = host
        host.attach(self)
        self._release_slot = release_slot
        self._workers: set[WorkerHandle] = set()
        self._idle: deque[WorkerHandle] = deque()
        self._queue = TaskQueue()
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._selector = selectors.DefaultSelector()
        self._asleep = False
        self._wake_at = math.inf
        self._worker_numbers = 0
        self._failed_starts = 0
        self._was_ready = False
        self._submitted = 0.0  # when the last call came
        self._singling = 0  # ranges whose items are being pickled again, singly
        self._kill_at = math.inf
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        keep_from_children({self._wake_r, self._wake_w})
        self._selector.register(self._wake_r, selectors.EVENT_READ, self._drain_wake_ups)
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.RLock()

    # From any thread

    def start(self) -> None:
        """Start the thread, once.

        Raises:
            RuntimeError: If no thread can be started; nothing was accepted then.
        """
        with self._thread_lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"{self.settings.name}-dispatcher", daemon=True)
                thread.start()
                self._thread = thread

    def submit(self, call: Call) -> None:
        """Accept a call: straight to an idle worker where nobody waits, to the queue otherwise. Never blocks."""
        try:
            if not (self._may_hand_over(call) and self._hand_over(call)):
                self._post(self._accept, call)
        except BaseException:
            # A signal handler raised between taking a worker and giving it back: have that worker found and replaced.
            self._post(self._find_lost_workers, None)
            raise

    def _may_hand_over(self, call: Call) -> bool:
        """Whether writing to an idle worker right here is best: nobody waits, and this is not one of a rush of calls.

        The write lets go of the GIL, and coming back costs more than the dispatcher's own sending, many at a time.
        """
        before, self._submitted = self._submitted, now()
        if self._inbox or self._queue or not call.is_small():
            return False
        return len(self._idle) == len(self._workers) or self._submitted - before > RUSH

    def _hand_over(self, call: Call) -> bool:
        try:
            worker = self._idle.pop()
        except IndexError:
            return False
        try:
            if not call.claim():
                self._post(self._return_worker, worker)
                return True
            if not worker.give(call):
                call.give_back()
                self._post(self._return_worker, worker)
                return False
            self._release_slot(call)
        finally:
            worker.handed = True
        limit = call.options.task_timeout
        due = worker.since + (PICK_UP if limit is None or limit > PICK_UP else limit)
        # The dispatcher sets `_wake_at` to infinity before it looks through the workers, so it either sees this call
        # there or is seen here to sleep too long.
        if due < self._wake_at:
            self._post(self._wake_by, due)
        if worker.state != SERVING:
            self._post(self._bury_if_dead, worker)
        return True

    def submit_pieces(self, pieces: list[Piece]) -> None:
        """Accept pieces of a map. Never blocks."""
        self._post(self._accept_all, pieces)

    def stop(self, target: TaskFuture[Any] | MapJob) -> None:
        """Stop what runs for a future or a map, and drop what has not started. Never blocks."""
        self._post(self._stop_target, target)

    def drop(self, job: MapJob) -> None:
        """Drop what has not started of a map; what runs may finish."""
        self._post(self._queue.drop_job, job)

    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Whether a worker has this future's task in hand right now."""
        for worker in list(self._workers):
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
            self._post(self._begin_close, cancel)

    def terminate(self, kill_at: float = math.inf) -> None:
        """Cancel what is queued and stop what runs; from the time `kill_at` on by SIGKILL. Never blocks."""
        if self._thread is None:
            self._close_unstarted()
        else:
            self._post(self._begin_terminate, kill_at)

    def join(self, timeout: float | None) -> bool:
        """Wait at most `timeout` seconds until everything has ended, callbacks included; return whether it has."""
        deadline = math.inf if timeout is None else now() + timeout
        if self.is_own_thread():
            return self.done.is_set()
        if not self.done.wait(timeout):
            return False
        left = None if deadline == math.inf else max(0.0, deadline - now())
        if self._thread is not None:
            self._thread.join(left)
        return self.callbacks.close(left)

    def is_own_thread(self) -> bool:
        """Whether the caller runs on the dispatcher's thread or its callback thread, which must not wait for the end."""
        return threading.current_thread() is self._thread or self.callbacks.is_current()

    def snapshot(self) -> tuple[list[tuple[str, bool]], int]:
        """Return (state and whether busy of each worker, how many units wait)."""
        workers = [(worker.state, bool(worker.inflight)) for worker in list(self._workers)]
        return workers, len(self._queue) + len(self._inbox)

    def pids(self) -> list[int]:
        """Return the process ids of the workers."""
        return [worker.pid for worker in list(self._workers) if worker.pid is not None]

    def post(self, function: Callable[[Any], None], argument: Any) -> None:
        """Have the dispatcher call `function(argument)`. Safe in signal handlers: it takes no lock and never blocks."""
        self._post(function, argument)

    def _post(self, function: Callable[[Any], None], argument: Any) -> None:
        self._inbox.append((function, argument))
        if self.phase == CLOSED:  # set before the inbox is emptied for the last time, so one of the two finds this
            self._refuse_inbox()
        elif self._asleep:
            self._asleep = False
            with contextlib.suppress(OSError):  # full: it wakes anyway; closed: it has ended
                os.write(self._wake_w, b"\0")

    # The loop

    def _run(self) -> None:
        try:
            while not self._has_ended():
                self._turn()
        except BaseException as error:  # a fault of ours: nobody may wait for ever because of it
            logger.critical("the dispatcher failed; all tasks are lost", exc_info=True)
            self._break(lambda: RuntimeError(f"taskpool's dispatcher failed: {error!r}"))
            self._abandon_all()
        finally:
            self._end()

    def _turn(self) -> None:
        self._asleep = True
        # Whoever posts looks at `_asleep` after the append; so either it is seen here or the pipe wakes us.
        timeout = 0.0 if self._inbox else max(0.0, self._wake_at - now())
        ready = self._selector.select(None if timeout == math.inf else timeout)
        self._asleep = False
        for key, _events in ready:
            if self._selector.get_map().get(key.fd) is key:  # not closed by an earlier one of this turn
                key.data()
        self._empty_inbox()
        if now() >= self._wake_at:
            self._look_at_deadlines()
        if self._queue:
            self._feed()
        if self.phase != OPEN:
            self._continue_close()

    def _drain_wake_ups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._wake_r, 4096)) == 4096:
                pass

    def _empty_inbox(self) -> None:
        for _ in range(len(self._inbox)):
            function, argument = self._inbox.popleft()
            function(argument)

    def _wake_by(self, due: float) -> None:
        self._wake_at = min(self._wake_at, due)

    # Accepting and feeding

    def _accept(self, source: Source) -> None:
        if self.broken is not None:
            self._refuse(source, Failure(self.broken()))
        elif self.phase == TERMINATING:
            self._refuse(source, None)
        else:
            self._queue.append(source)

    def _accept_all(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._accept(piece)

    def _refuse(self, source: Source, failure: Failure | None) -> None:
        if isinstance(source, Call):
            self._release_slot(source)
            if failure is None:
                self.counts.cancelled += source.future.finish_cancelled()
            else:
                self.counts.failed += source.future.finish(failure)
        elif not source.job.cancelled:
            for start, end in source.todo:
                for item in range(start, end):
                    outcome = failure or Failure(_cancelled())
                    source.job.deposit(source.first + item, 1, outcome)

    def _feed(self) -> None:
        while self._queue:
            try:
                worker = self._idle.pop()
            except IndexError:
                break
            worker.handed = True
            if not self._send_next(worker):
                self._make_idle(worker)
                break
        if self._queue:
            self._start_workers()
            self._send_ahead()

    def _send_next(self, worker: WorkerHandle, *, ahead: bool = False) -> bool:
        """Send the worker what is next in the queue; False if there is nothing (that fits)."""
        unit = self._next_unit(worker, ahead=ahead)
        if unit is None:
            return False
        limit = unit.options.task_timeout
        self._wake_by(now() + min(PICK_UP, math.inf if limit is None else limit, AHEAD if ahead else math.inf))
        try:
            if unit.is_small():
                if not worker.give(unit):
                    self._requeue(unit)
                    return False
            elif not worker.give_large(unit):
                self._selector.register(
                    worker.channel.tasks, selectors.EVENT_WRITE, lambda: self._continue_sending(worker)
                )
        except OSError:  # it has just died; the unit is out with it and comes back when its end is handled
            pass
        return True

    def _next_unit(self, worker: WorkerHandle, *, ahead: bool) -> Unit | None:
        most = None if self.settings.max_tasks is None else self.settings.max_tasks - worker.served
        while self._queue:
            source = self._queue.first()
            if isinstance(source, Call):
                if ahead and not source.is_small():
                    return None
                self._queue.pop()
                self._release_slot(source)
                if source.claim():
                    return source
                self.counts.cancelled += 1
            elif source.job.cancelled or not source.todo:
                self._queue.pop()
            else:
                unit = source.take(is_last=len(self._queue) == 1, workers=self.settings.max_workers, most=most)
                if not source.todo:
                    self._queue.pop()
                if ahead and not unit.is_small():
                    self._requeue(unit)
                    return None
                return unit
        return None

    def _send_ahead(self) -> None:
        if self.settings.max_tasks is not None:
            return
        share = -(-len(self._queue) // max(1, len(self._workers)))
        for worker in self._workers:
            if worker.state == SERVING and worker.inflight:
                for _ in range(worker.room_ahead(share)):
                    if not self._send_next(worker, ahead=True):
                        break

    def _continue_sending(self, worker: WorkerHandle) -> None:
        try:
            finished = worker.channel.continue_large()
        except OSError:
            finished = True  # it died, or closed its end: its own end tells
        worker.since = now()
        if finished:
            self._selector.unregister(worker.channel.tasks)

    def _requeue(self, unit: Unit) -> None:
        if self.broken is not None or self.phase == TERMINATING:
            if unit.give_back():
                failure = None if self.broken is None else Failure(self.broken())
                self._refuse(unit if isinstance(unit, Call) else unit.piece, failure)
        elif unit.give_back():
            self._queue.insert(unit if isinstance(unit, Call) else unit.piece)
        else:
            self.counts.cancelled += 1

    # Workers begin

    def _start_workers(self) -> None:
        serving = [worker for worker in self._workers if worker.state in (STARTING, SERVING, ENDING)]
        starting = sum(worker.state == STARTING for worker in serving)
        room = self.settings.max_workers - len(serving)
        waiting = 0
        for source in self._queue:
            waiting += 1 if isinstance(source, Call) else source.left()
            if waiting - starting >= room:
                break
        for _ in range(min(room, waiting - starting)):
            if self.broken is None:
                self._start_worker()

    def _start_worker(self) -> None:
        self._worker_numbers += 1
        worker = None
        try:
            worker = WorkerHandle(self._worker_numbers, now())
            self._host.start(worker)
        except Exception as error:
            if worker is not None:
                worker.channel.close()
            self._start_failed(error)
            return
        self._workers.add(worker)
        self.counts.started += 1
        self._selector.register(worker.channel.results, selectors.EVENT_READ, lambda: self._read(worker))
        if self.settings.start_timeout is not None:
            self._wake_by(worker.since + self.settings.start_timeout)
        self._wake_by(worker.since + self._host.answer_time)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Have a host's callback called when `fd` is readable."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def unwatch(self, fd: int) -> None:
        """End a watch."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fd)

    def process_known(self, worker: WorkerHandle, pid: int) -> None:
        """Note which process a worker is; its end is watched from now on."""
        if worker.process is not None:
            return
        worker.process = stop.ProcessHandle(pid)
        if worker.process.fd is not None:
            self._selector.register(worker.process.fd, selectors.EVENT_READ, lambda: self._process_ended(worker))
        elif worker.process.ended:
            self._post(self._process_ended, worker)

    def start_failed(self, worker: WorkerHandle, error: Exception) -> None:
        """A host could not start this worker's process."""
        self._start_failed(error)
        self._bury(worker)

    def start_lost(self, worker: WorkerHandle) -> None:
        """A host lost a start; the worker never came to be, through no fault of its own."""
        if worker.process is None and worker.state == STARTING:
            self._bury(worker)

    def _make_idle(self, worker: WorkerHandle) -> None:
        if worker.retiring or (self.settings.max_tasks is not None and worker.served >= self.settings.max_tasks):
            self._retire(worker)
            return
        worker.since = now()
        worker.handed = False
        self._idle.append(worker)
        if self.settings.idle_timeout is not None:
            self._wake_by(worker.since + self.settings.idle_timeout)

    def _retire(self, worker: WorkerHandle) -> None:
        """Have an idle worker end: one sentinel, answered by its end, or else SIGKILL."""
        self._expect_end(worker)
        with contextlib.suppress(OSError):
            worker.send_sentinel()

    def _return_worker(self, worker: WorkerHandle) -> None:
        if worker.state == SERVING and not worker.inflight:
            self._make_idle(worker)
        else:
            self._bury_if_dead(worker)

    def _bury_if_dead(self, worker: WorkerHandle) -> None:
        """A submitting thread is done with a worker whose end was seen meanwhile."""
        if worker.state == DYING and not worker.exitcode_due:
            self._bury(worker)

    def _find_lost_workers(self, _: None) -> None:
        # It may find one that another thread is just handing a call: that call comes back when the worker has ended.
        for worker in list(self._workers):
            if worker.state == SERVING and not worker.handed and not worker.inflight and worker not in self._idle:
                self._retire(worker)

    # Frames

    def _read(self, worker: WorkerHandle) -> None:
        try:
            for frame in worker.channel.receive():
                self._on_frame(worker, frame)
        except EOFError:
            self._selector.unregister(worker.channel.results)
            self._channel_ended(worker)
        except (BadFrameError, MemoryError) as error:
            self._cannot_read(worker, error)
        except OSError:
            self._channel_ended(worker)

    def _cannot_read(self, worker: WorkerHandle, error: Exception) -> None:
        """A frame is garbage, or too large for the memory there is: it costs its worker and that task."""
        self._selector.unregister(worker.channel.results)
        worker.reason = f"what it wrote cannot be read ({error})"
        if worker.inflight and isinstance(error, MemoryError):
            unit = worker.inflight.popleft()
            failure = MemoryError(f"there is no memory for the result of task {unit.name}")
            self._finish_failed_item(unit, unit.next if isinstance(unit, Range) else 0, Failure(failure))
        self._kill(worker)

    def _on_frame(self, worker: WorkerHandle, frame: Frame) -> None:
        if frame.kind in FINISHING:
            self._on_outcome(worker, frame)
        elif frame.kind == wire.LOG:
            self.logs.put(lambda: wire.loads(frame.body), self._name_of(worker, frame.unit))
        elif frame.kind == wire.HELLO:
            self.process_known(worker, frame.unit)
            self._send_setup(worker)
        elif frame.kind == wire.READY:
            self._on_ready(worker)
        elif frame.kind == wire.NOT_READY:
            self._start_failed(EncodedError(frame.body))
            self._expect_end(worker)
        elif frame.kind == wire.GOODBYE:
            self._expect_end(worker)

    def _name_of(self, worker: WorkerHandle, unit_id: int) -> str:
        return next((unit.name for unit in worker.inflight if unit.id == unit_id), "")

    def _send_setup(self, worker: WorkerHandle) -> None:
        setup = self.settings.setup
        head = wire.frame_head(wire.SETUP, 0, setup, index=worker.index)
        with contextlib.suppress(OSError):
            worker.channel.begin_large([head, setup.stream, *setup.buffers])
            if not worker.channel.continue_large():
                self._selector.register(
                    worker.channel.tasks, selectors.EVENT_WRITE, lambda: self._continue_sending(worker)
                )

    def _on_ready(self, worker: WorkerHandle) -> None:
        self._failed_starts = 0
        self._was_ready = True
        if worker.state == STARTING:
            worker.state = SERVING
            self._make_idle(worker)

    def _expect_end(self, worker: WorkerHandle) -> None:
        """The worker shall end by itself, or by SIGKILL when its time is over."""
        if worker.state in (STARTING, SERVING):
            self._take_from_idle(worker)
            worker.state = ENDING
            worker.end_by = now() + END_TIME
            self._wake_by(worker.end_by)

    def _on_outcome(self, worker: WorkerHandle, frame: Frame) -> None:
        unit = worker.inflight[0] if worker.inflight else None
        if unit is None or unit.id != frame.unit:
            return  # of a unit that was given up
        if frame.kind == wire.INTERRUPTED:
            self._on_interrupted(worker, unit, frame)
        elif frame.kind == wire.HALTED:
            worker.inflight.popleft()
            self._requeue(unit)
            self._next_task(worker)
        elif frame.kind == wire.UNREADABLE and isinstance(unit, Range) and frame.count > 1:
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
            self.counts.finished += frame.count
        else:
            self.counts.failed += 1
        return unit.receive(frame)

    def _next_task(self, worker: WorkerHandle) -> None:
        worker.stop = None
        if worker.state != SERVING or worker.inflight:
            return
        if worker.retiring or self.settings.max_tasks is not None or not self._queue or not self._send_next(worker):
            self._make_idle(worker)

    def _on_interrupted(self, worker: WorkerHandle, unit: Unit, frame: Frame) -> None:
        worker.inflight.popleft()
        self._settle_stopped(worker, unit, frame.index, bytes(frame.body.stream).decode(errors="replace"))
        worker.stop = None
        self._expect_end(worker)  # it ends by itself, since the task may have left anything half done

    def _send_singly(self, unit: Range) -> None:
        """Give a range's items back one by one: together they cannot be read, or one of them kills the reader."""
        self._singling += 1

        def pickle_again() -> None:
            pieces = unit.piece.singly(unit.next, unit.stop) if not unit.job.cancelled else []
            self._post(self._singled, pieces)

        self.callbacks.run(pickle_again)

    def _singled(self, pieces: list[Piece]) -> None:
        self._singling -= 1
        self._accept_all(pieces)

    # Stopping tasks

    def _stop_target(self, target: TaskFuture[Any] | MapJob) -> None:
        if isinstance(target, MapJob):
            self._queue.drop_job(target)
        for worker in list(self._workers):
            for unit in list(worker.inflight):
                if unit.owns(target):
                    self._stop_unit(worker, unit)

    def _stop_unit(self, worker: WorkerHandle, unit: Unit) -> None:
        if worker.state == DYING:
            return  # its end is being handled, and what was asked for shows then
        self._read(worker)  # results first
        if unit not in worker.inflight:
            return
        if unit is not worker.inflight[0]:
            self._take_back_rest(worker)  # it has not started: a cancelled one is resolved by coming back
            if unit in worker.inflight:
                # The worker has just read it, so the outcome of the one before is in the pipe: ask again behind that.
                self._post(self._stop_target, unit.job if isinstance(unit, Range) else unit.future)
            return
        if worker.channel.is_sending:
            self._kill(worker)  # it is still being sent, so it has not started, and never will
            return
        item = ANY_ITEM if isinstance(unit, Range) else 0
        self._begin_stop(worker, Stop(unit, item, timed_out=False))

    def _begin_stop(self, worker: WorkerHandle, request: Stop) -> None:
        if worker.stop is not None and worker.stop.unit is request.unit:
            worker.stop.timed_out &= request.timed_out
            return
        self._take_back_rest(worker)
        worker.stop = request
        self._climb(worker)

    def _take_back_rest(self, worker: WorkerHandle) -> None:
        """Take back what was sent ahead. What the worker has read already is its current task by then, or about to be."""
        if len(worker.inflight) < 2:
            return
        taken = worker.channel.take_back()
        for unit in [unit for unit in worker.inflight if unit.id in taken]:
            worker.inflight.remove(unit)
            self._requeue(unit)

    def _climb(self, worker: WorkerHandle) -> None:
        """Take the next rung of the ladder for `worker.stop`."""
        request = worker.stop
        assert request is not None
        request.rung += 1
        time_now = now()
        if worker.process is None:
            request.rung = 3
        if request.rung == 1:
            worker.write_interrupt(request)
            stop.interrupt(worker.process)  # type: ignore[arg-type]
            request.due = time_now + request.unit.options.grace
        elif request.rung == 2:
            stop.dump_and_die(worker.process)  # type: ignore[arg-type]
            request.due = time_now + STACK_TIME
        else:
            self._kill(worker)
            return
        self._wake_by(request.due)

    def _kill(self, worker: WorkerHandle) -> None:
        """End a worker's process group, whatever it does."""
        self._take_from_idle(worker)
        if worker.state in (STARTING, SERVING):
            worker.state = ENDING
        worker.end_by = now() + END_TIME
        worker.channel.end_life()
        if worker.process is not None:
            worker.process.kill_group()
            worker.process.kill()
        self._wake_by(worker.end_by)

    def _take_from_idle(self, worker: WorkerHandle) -> None:
        with contextlib.suppress(ValueError):
            self._idle.remove(worker)
            worker.handed = True

    # Deadlines

    def _look_at_deadlines(self) -> None:
        self._wake_at = math.inf
        time_now = now()
        for worker in list(self._workers):
            due = self._due(worker, time_now)
            if due <= time_now:
                self._act_on(worker, time_now)
                due = self._due(worker, time_now) if worker.state != GONE else math.inf
            self._wake_by(due)
        if self.phase != OPEN:
            self._wake_by(self._kill_at)

    def _due(self, worker: WorkerHandle, time_now: float) -> float:
        if worker.state == STARTING:
            timeout = self.settings.start_timeout
            due = math.inf if timeout is None else worker.since + timeout
            return due if worker.process is not None else min(due, worker.since + self._host.answer_time)
        if worker.state == SERVING:
            if not worker.inflight and self.settings.idle_timeout is not None:
                return worker.since + self.settings.idle_timeout
            return worker.next_due(time_now)
        if worker.state == ENDING:
            return worker.end_by if worker.stop is None else min(worker.stop.due, worker.end_by)
        # DYING. A thread that interrupts its own `submit` at the worst moment never gives a worker back; one that is
        # merely slow does so within microseconds.
        return worker.since + (self._host.exitcode_time if worker.handed else END_TIME)

    def _act_on(self, worker: WorkerHandle, time_now: float) -> None:
        self._read(worker)  # results first
        if worker.state == GONE or self._due(worker, time_now) > time_now:
            return
        if worker.state == STARTING:
            self._start_timed_out(worker)
        elif worker.state == SERVING:
            self._act_on_serving(worker, time_now)
        elif worker.state == ENDING:
            self._act_on_ending(worker)
        elif worker.state == DYING:
            self._bury(worker)

    def _start_timed_out(self, worker: WorkerHandle) -> None:
        if worker.process is None and now() < worker.since + (self.settings.start_timeout or math.inf):
            self._host.start_unanswered(worker)
            self._kill(worker)
            return
        seconds = self.settings.start_timeout
        what = "the initializer" if self.settings.has_initializer else "the start of a worker"
        self._start_failed(TimeoutError(f"{what} did not finish within start_timeout={seconds:g} seconds"))
        self._kill(worker)

    def _act_on_serving(self, worker: WorkerHandle, time_now: float) -> None:
        if worker.stop is not None:
            self._climb(worker)
        elif not worker.inflight:
            if worker in self._idle:
                self._take_from_idle(worker)
                self._retire(worker)
        elif worker.running() is None and time_now >= worker.since + PICK_UP:
            logger.warning("worker %s does not take its task; it is replaced", worker.index)
            self._take_back_all(worker)
            self._kill(worker)
        elif worker.limit_due(time_now) <= time_now:
            running = worker.running()
            if running is not None:
                self._begin_stop(worker, Stop(running[0], running[1], timed_out=True))
        else:
            self._take_back_rest(worker)  # they wait behind a task that turned out to be long

    def _take_back_all(self, worker: WorkerHandle) -> None:
        taken = worker.channel.take_back()
        for unit in [unit for unit in worker.inflight if unit.id in taken]:
            worker.inflight.remove(unit)
            self._requeue(unit)

    def _act_on_ending(self, worker: WorkerHandle) -> None:
        if worker.channel.is_alive_open():
            if worker.inflight and worker.stop is None:
                worker.reason = "it closed its channel to the parent, and was ended for that"
            self._kill(worker)
        else:
            self._give_up_process(worker)

    def _give_up_process(self, worker: WorkerHandle) -> None:
        """SIGKILL did not end it in time: it waits in the kernel. The slot is used again; the corpse is reported."""
        logger.error("process %s does not end after SIGKILL; its slot is replaced", worker.pid)
        self._bury(worker)

    # Workers end

    def _channel_ended(self, worker: WorkerHandle) -> None:
        """Nobody holds the other end of the channel: the process has ended, or must."""
        if worker.process is None:
            self._process_ended(worker)  # it never said who it was
        elif worker.state not in (DYING, GONE):
            self._expect_end(worker)  # most likely it is ending just now
            worker.end_by = min(worker.end_by, now() + LOST_TIME)
            self._wake_by(worker.end_by)

    def _process_ended(self, worker: WorkerHandle) -> None:
        """The process has ended: take what it wrote, then its exit code, then settle what it leaves."""
        if worker.state in (DYING, GONE):
            return
        if worker.process is not None and worker.process.fd is not None:
            self._selector.unregister(worker.process.fd)
        if worker.channel.results in self._selector.get_map():
            self._read(worker)
        if worker.state in (DYING, GONE):
            return
        self._take_from_idle(worker)
        if worker.state == STARTING:
            self._died_before_ready(worker)
        worker.state = DYING
        worker.since = now()
        self.counts.replaced += self.phase == OPEN and not worker.retiring
        known = self._host.exitcode(worker)
        worker.exitcode_due = known is PENDING
        if known is not PENDING:
            worker.exitcode = known
        if worker.exitcode_due or not worker.handed:
            self._wake_by(worker.since + self._host.exitcode_time)
        else:
            self._bury(worker)

    def exitcode_known(self, worker: WorkerHandle, exitcode: int | None) -> None:
        """A host learnt the exit code of a process that has ended."""
        if worker.state not in (DYING, GONE):
            self._process_ended(worker)
        worker.exitcode = exitcode
        worker.exitcode_due = False
        if worker.state == DYING and worker.handed:
            self._bury(worker)

    def _bury(self, worker: WorkerHandle) -> None:
        """Settle what a dead worker leaves, and free all that it held."""
        worker.state = GONE
        if worker.exitcode_due:
            late = self._host.exitcode(worker)
            worker.exitcode = None if late is PENDING else late
        self._workers.discard(worker)
        self._take_from_idle(worker)
        worker.channel.take_back()
        unit_id, item, _started, _phase = worker.channel.page.current()
        for unit in list(worker.inflight):
            if unit.id == unit_id and unit.begun(item):
                self._settle_victim(worker, unit, item)
            else:
                self._requeue(unit)  # it had not started
        worker.inflight.clear()
        for fd in (worker.channel.results, worker.channel.tasks):
            self.unwatch(fd)
        if worker.process is not None:
            if worker.process.fd is not None:
                self.unwatch(worker.process.fd)
            worker.process.kill_group()
        worker.channel.close()
        self._host.buried(worker)
        if worker.process is not None:
            worker.process.close()

    def _settle_victim(self, worker: WorkerHandle, unit: Unit, item: int) -> None:
        request = worker.stop
        if isinstance(unit, Range) and unit.stop - unit.next > 1 and worker.is_loading():
            self._send_singly(unit)  # it died unpickling several items: none can be blamed yet
        elif request is not None and request.unit is unit and request.item in (item, ANY_ITEM):
            self._settle_stopped(worker, unit, item, worker.channel.page.stack())
        else:
            self.counts.crashed += 1
            self._finish_failed_item(unit, item, Failure(_crash_error(worker, unit)))

    def _settle_stopped(self, worker: WorkerHandle, unit: Unit, item: int, stack: str | None) -> None:
        """The task was stopped: it passed its limit, or was cancelled."""
        request = worker.stop
        if request is None or not request.timed_out:
            self.counts.cancelled += 1
            unit.settle_cancelled(item)
            if isinstance(unit, Range) and not unit.job.cancelled:
                self._finish_failed_item(unit, item, Failure(_cancelled()))
            return
        self.counts.timed_out += 1
        limit = unit.options.task_timeout or 0.0
        error = TaskTimeoutError(
            f"task {unit.name} ran longer than its task_timeout of {limit:g} seconds and was stopped"
            + (f"; it was here:\n{stack}" if stack else ""),
            seconds=limit,
            stack=stack,
            task=unit.name,
            pid=worker.pid,
        )
        self._finish_failed_item(unit, item, Failure(error))

    def _finish_failed_item(self, unit: Unit, item: int, outcome: Outcome) -> None:
        unit.settle(item, outcome)
        if isinstance(unit, Range):
            self.counts.rerun += max(0, item - unit.next)
            piece = unit.rest(item)
            if piece is not None:
                self._queue.insert(piece)

    # Starts that fail

    def _died_before_ready(self, worker: WorkerHandle) -> None:
        if worker.stop is not None or self.phase == TERMINATING:
            return
        hint = self._host.hint(worker)
        self._start_failed(WorkerCrashedError(f"a worker ended before it was ready{hint}", pid=worker.pid))

    def _start_failed(self, reason: BaseException | EncodedError) -> None:
        """Count a start that failed; the first one, or three in a row, and all that waits fails with the reason.

        A worker that simply died may have been killed from outside, so that alone is never enough the first time.
        """
        self._failed_starts += 1
        died = isinstance(reason, WorkerCrashedError)
        if self._failed_starts >= FAILED_STARTS or not (self._was_ready or died):
            what = "the initializer failed" if self.settings.has_initializer else "no worker can be started"

            def error() -> InitializerError:
                cause = reason.decode()[1] if isinstance(reason, EncodedError) else reason
                made = InitializerError(f"{what}: {type(cause).__name__}: {cause}")
                made.__cause__ = cause
                return made

            self._break(error)

    def _break(self, error: Callable[[], BaseException]) -> None:
        """Fail all that waits, and all that comes: there is nothing to run it on."""
        self.broken = error
        for source in self._queue.clear():
            self._refuse(source, Failure(error()))
        for worker in list(self._workers):
            if worker.state == STARTING:
                self._kill(worker)

    # The end

    def _begin_close(self, cancel: bool) -> None:  # noqa: FBT001  (called through the inbox)
        if self.phase == OPEN:
            self.phase = CLOSING
        if cancel:
            for source in self._queue.clear():
                self._refuse(source, None)

    def _begin_terminate(self, kill_at: float) -> None:
        self.phase = TERMINATING
        self._kill_at = min(self._kill_at, kill_at)
        self._wake_by(self._kill_at)
        for source in self._queue.clear():
            self._refuse(source, None)
        for worker in list(self._workers):
            if worker.state == STARTING:
                self._kill(worker)
            elif worker.state == SERVING and worker.inflight:
                self._stop_unit(worker, worker.inflight[0])

    def _continue_close(self) -> None:
        if self._queue or self._inbox or self._singling:
            return
        if now() >= self._kill_at:
            self._kill_at = math.inf
            for worker in list(self._workers):
                if worker.state not in (DYING, GONE):
                    self._kill(worker)
        for worker in list(self._workers):
            if worker.state == SERVING and not worker.inflight and worker.handed is False and worker in self._idle:
                self._take_from_idle(worker)
                self._retire(worker)
            elif worker.state == STARTING:
                self._kill(worker)

    def _has_ended(self) -> bool:
        return self.phase != OPEN and not (self._workers or self._queue or self._inbox or self._singling)

    def _close_unstarted(self) -> None:
        with self._thread_lock:
            if self._thread is None and self.phase != CLOSED:
                self._end()

    def _abandon_all(self) -> None:
        for worker in list(self._workers):
            with contextlib.suppress(Exception):
                self._kill(worker)
            with contextlib.suppress(Exception):
                self._bury(worker)

    def _end(self) -> None:
        self.phase = CLOSED
        with contextlib.suppress(Exception):
            self._host.close()
        self.logs.close(END_TIME)
        self._refuse_inbox()
        self._selector.close()
        for fd in (self._wake_r, self._wake_w):
            close_kept(fd)
        self.callbacks.close(0)
        self.done.set()


    def _refuse_inbox(self) -> None:
        """Cancel what was submitted at the very last moment."""
        with contextlib.suppress(IndexError):
            while True:
                function, argument = self._inbox.popleft()
                if function == self._accept:
                    self._refuse(argument, None)
                elif function == self._accept_all:
                    for piece in argument:
                        self._refuse(piece, None)


def _cancelled() -> BaseException:
    from concurrent.futures import CancelledError

    return CancelledError()


def _crash_error(worker: WorkerHandle, unit: Unit) -> WorkerCrashedError:
    reason = worker.reason or _describe_end(worker.exitcode)
    return WorkerCrashedError(
        f"the worker (pid {worker.pid}) died while it ran task {unit.name}: {reason}",
        exitcode=worker.exitcode,
        signal=stop.signal_name(worker.exitcode),
        pid=worker.pid,
        stack=worker.channel.page.stack(),
        task=unit.name,
    )


def _describe_end(exitcode: int | None) -> str:
    name = stop.signal_name(exitcode)
    if exitcode is None:
        return "its exit code is not known"
    if name == "SIGKILL":
        return "killed by SIGKILL (by somebody, or by the kernel because memory ran out)"
    if name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT"):
        return f"{name} (a fault in C code)"
    return f"killed by {name}" if name else f"it exited with code {exitcode}"
