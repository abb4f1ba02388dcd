"""What workers log, from their channels to the sink; and outcomes that wait until the records before them are handled.

    dispatcher's thread                                listener's thread
    -------------------                                -----------------
    LOG frame     --- add ----> batch ---> queue ----> sink.take, one record after the other
    outcome       --- hold ---> held   --> queue ----> post: release
    released   <-----------------------------------------'

There is one queue and one listener, so the order of each worker's records is kept, and an outcome is settled when what
its worker logged before it has been handled. The listener starts with the first record, and ends by the queue's
sentinel, behind the last worker.

Handlers are user code: they may be slow, or never return. So the queue has a bound, and no wait for it is longer than
`log_timeout`:

- An outcome waits so long at most, and not at all while a handler has been at one record for longer than that.
- When the queue is full the workers that log are not read any more. Their pipes fill up, and then they wait, in the
  call that logs. After `log_timeout` they are read again, and records are dropped, counted, until half of the queue has
  been handled; then a record of its own says how many.

The counters are each written by one thread only, so none needs a lock: `out` by the dispatcher, `done` by the listener.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import marshal
import math
import time
from collections.abc import Callable

from taskpool._engine.callbacks import CallbackThread
from taskpool._engine.channel import BETWEEN
from taskpool._engine.crew import END_TIME
from taskpool._engine.handle import WorkerHandle
from taskpool._engine.loop import LONGEST_WAIT, Loop
from taskpool._engine.units import Range, Unit
from taskpool._engine.wire import Frame
from taskpool._logdata import OUTPUT
from taskpool.logs import Sink, Source, leave_out_stuck_handlers

BOUND = 8 << 20  # bytes of records that may wait
LARGE = 16 * 1024  # bytes of a record that is not kept for the report of a crash
_LARGE_ONE = marshal.dumps((OUTPUT, "[a large record]"))

now = time.monotonic


class Batch:
    """Neighbouring records of one worker, as one call of the listener's thread."""

    __slots__ = ("_records", "_reports", "_worker")

    def __init__(self, reports: Reports, worker: WorkerHandle) -> None:
        self._reports = reports
        self._worker = worker
        self._records: list[tuple[Source, bytes]] = []

    def add(self, source: Source, data: bytes) -> None:
        """Add a record."""
        self._records.append((source, data))

    def __call__(self) -> None:
        """Handle each."""
        reports, worker = self._reports, self._worker
        for source, data in self._records:
            reports.handle(source, data)
        worker.batches_done += 1


class Reports:
    """The queue of records, and what waits behind them.

    Args:
        loop: The dispatcher's loop.
        sink: Where records go; None where nothing is forwarded.
        log_timeout: The longest wait for handlers, in seconds.
        name: The executor's name.
    """

    def __init__(self, loop: Loop, sink: Sink | None, log_timeout: float, name: str) -> None:
        self._loop = loop
        self._sink = sink
        self._timeout = log_timeout
        self._name = name
        self._thread = CallbackThread(f"{name}-logs", "a worker's log record could not be handled")
        self._batch: Batch | None = None  # of the worker that is being read
        self._out = 0  # bytes that were put in the queue,
        self._done = 0  # ... and that have been handled
        self._since = math.inf  # when the listener began with the record that it is at
        self._numbers = itertools.count()
        self._held: dict[int, tuple[float, Callable[[], None]]] = {}  # when each is due at the latest, and what it is
        self._full_since = math.inf
        self._paused: set[WorkerHandle] = set()  # that are not read
        self._dropped = 0
        self._drops = False
        self._end_by = math.inf  # when nobody waits any more, since the engine is terminated

    def __len__(self) -> int:
        """How many outcomes wait."""
        return len(self._held)

    # On the dispatcher's thread

    def run(self, call: Callable[[], object]) -> None:
        """Have something else handled in its turn: records of the engine's own."""
        self.flush()
        self._thread.run(call)

    def add(self, worker: WorkerHandle, frame: Frame) -> None:
        """Take a record that a worker has written."""
        data = bytes(frame.body.stream)
        self._put(worker, frame.unit, frame.item, self._source_of(worker, frame), data)

    def _put(self, worker: WorkerHandle, unit: int, item: int, source: Source, data: bytes) -> None:
        worker.recent.append((unit, item, data if len(data) <= LARGE else _LARGE_ONE))
        if self._drops:
            self._dropped += 1
            return
        if self._batch is None:
            self._batch = Batch(self, worker)
            worker.batches_out += 1
        self._out += len(data)
        self._batch.add(source, data)
        if self._out - self._done > BOUND and not worker.is_held_up:
            self._pause(worker)

    def add_output(self, worker: WorkerHandle, unit: Unit | None, item: int, line: str) -> None:
        """Take a line that a worker has printed."""
        data = marshal.dumps((OUTPUT, line))
        self._put(worker, 0 if unit is None else unit.id, item, source_of(worker, unit, item), data)

    def flush(self) -> None:
        """Queue what a worker has written: it has been read."""
        if self._batch is not None:
            batch, self._batch = self._batch, None
            self._thread.run(batch)

    def _source_of(self, worker: WorkerHandle, frame: Frame) -> Source:
        # Kept until the next one logs: what threads log that a task has left behind is still of that task.
        known = worker.logged_by
        if known is None or known[0] != frame.unit or known[1] != frame.item:
            source = source_of(worker, worker.unit_of(frame.unit), frame.item)
            known = worker.logged_by = frame.unit, frame.item, source
        return known[2]

    def is_behind(self, worker: WorkerHandle) -> bool:
        """Whether records of this worker are still to be handled, and it makes sense to wait for that."""
        if worker.batches_out == worker.batches_done:
            return False
        time_now = now()
        return time_now - self._since < self._timeout and time_now < self._end_by

    def hold(self, worker: WorkerHandle, settle: Callable[[], None]) -> None:
        """Call `settle` when the worker's records have been handled, or `log_timeout` has passed."""
        if not self.is_behind(worker):
            settle()
            return
        self.flush()
        number = next(self._numbers)
        due = min(now() + self._timeout, self._end_by)
        self._held[number] = due, settle
        self._thread.run(lambda: self._loop.post(self._release, number))
        self._loop.wake_by(due)

    def _release(self, number: int) -> None:
        _due, settle = self._held.pop(number, (0.0, None))
        if settle is not None:
            settle()

    def look(self) -> None:
        """Do what is due: settle what has waited long enough, and drop records if nothing else helps."""
        time_now = now()
        for number, (due, _settle) in list(self._held.items()):
            if due <= time_now:
                self._release(number)
            else:
                self._loop.wake_by(due)
        if self._full_since + self._timeout <= time_now:
            self._drops = True
            self._resume_all()
        elif self._paused:
            self._loop.wake_by(self._full_since + self._timeout)

    def end_by(self, time: float) -> None:
        """The engine is terminated: let nothing wait beyond the monotonic time `time`."""
        self._end_by = min(self._end_by, time)
        for number, (due, settle) in self._held.items():
            self._held[number] = min(due, self._end_by), settle

    def end(self) -> None:
        """Settle all: nobody waits any more."""
        for number in list(self._held):
            self._release(number)

    def close(self) -> None:
        """Send the sentinel, and wait for the records that are left, as long as handlers do not take too long."""
        self.flush()
        self._report_dropped()
        patience = min(max(self._timeout, END_TIME), LONGEST_WAIT)
        while not self._thread.close(max(0.0, min(self._since, now()) + patience - now())):
            if now() - self._since >= patience:
                atexit.register(leave_out_stuck_handlers)
                break
        if self._sink is not None:
            self._sink.close()

    # The bound

    def _pause(self, worker: WorkerHandle) -> None:
        """Do not read this worker until there is room."""
        self._full_since = min(self._full_since, now())
        worker.is_held_up = True
        self._paused.add(worker)
        for fd in worker.channel.sources:
            self._loop.pause(fd)
        self._loop.wake_by(self._full_since + self._timeout)
        if self._has_room():  # the listener looked just before
            self._resume()

    def _has_room(self) -> bool:
        return self._out - self._done <= BOUND // 2

    def _resume(self, _: None = None) -> None:
        """There is room again."""
        if self._has_room():
            self._full_since = math.inf
            self._drops = False
            self._resume_all()
            self._report_dropped()

    def _resume_all(self) -> None:
        for worker in self._paused:
            worker.is_held_up = False
            if worker.channel.is_open:
                for fd in worker.channel.sources:
                    self._loop.resume(fd)
        self._paused.clear()
        self._full_since = math.inf

    def _report_dropped(self) -> None:
        count, self._dropped = self._dropped, 0
        if count:
            text = "%d log records of workers were dropped: handlers were behind by more than log_timeout=%g seconds"
            self._thread.run(lambda: logging.getLogger("taskpool").warning(text, count, self._timeout))

    # On the listener's thread

    def handle(self, source: Source, data: bytes) -> None:
        """Give a record to the sink; whatever handlers raise costs no other record."""
        self._since = now()
        try:
            assert self._sink is not None
            self._sink.take(source, data)
        except BaseException:
            with contextlib.suppress(BaseException):  # a filter or handler may raise anything
                logging.getLogger("taskpool").exception("a worker's log record could not be handled")
        finally:
            self._since = math.inf
        self._done += len(data)
        if (self._paused or self._drops) and self._has_room():
            self._loop.post(self._resume, None)


def source_of(worker: WorkerHandle, unit: Unit | None, item: int) -> Source:
    """Return where what a worker says came from; without a task where it has none."""
    if unit is None:
        return Source("", "", 0, worker.name, worker.pid)
    if item == BETWEEN and isinstance(unit, Range):
        item = unit.next
    return Source(unit.name, unit.id_of(item), unit.attempt, worker.name, worker.pid)
