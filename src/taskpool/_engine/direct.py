"""The short way between a caller and a worker, past the dispatcher's thread.

    submit:  the call goes straight into the pipe of an idle worker
    result:  the thread that waits for it reads the worker's pipe itself, and resolves the future

Each way round the dispatcher saves two threads a change of hands, which costs more than everything else that a short
task needs. All that is not simple is left to the dispatcher: it is told, or finds it in the pipe.

Why the two cannot meet: a worker that is idle belongs to whoever takes it from the deque of idle workers, which is
atomic. Taking an outcome changes what the dispatcher decides by, so one lock excludes the two from each other: the
dispatcher has it whenever it does not sleep, and a waiting thread takes it for some microseconds, never waits for it,
and holds it over nothing that can block. It resolves only a future that nobody else waits for, by one assignment: to
tell others is left to the dispatcher, which no signal handler interrupts.

While a thread waits at a worker's pipe the dispatcher does not listen there. A signal handler may interrupt both, the
waiting and the taking:

- it raises: the dispatcher listens again and puts things right. The bytes that were read stay where it reads them once
  more, and an outcome that was taken before finds its task gone; a worker that was on its way to the idle ones is found
  to be lost, and is replaced;
- it takes its time while the thread waits: the dispatcher listens again after STUCK;
- it does not come back for END_TIME while the thread takes: the dispatcher goes on without it, and replaces the worker.
"""

from __future__ import annotations

import contextlib
import math
import select
import threading
import time
from collections.abc import Callable
from typing import Any

from taskpool._engine import spin, wire
from taskpool._engine.crew import END_TIME, Crew
from taskpool._engine.feeder import Feeder
from taskpool._engine.handle import PICK_UP, SERVING, STUCK, WorkerHandle
from taskpool._engine.loop import Loop
from taskpool._engine.units import Call
from taskpool._engine.wire import BadFrameError
from taskpool._task import TaskFuture

now = time.monotonic

RUSH = 100e-6  # seconds between calls, below which they are better sent by the dispatcher together
WAIT = 2e-3  # seconds that a waiting thread looks after the worker itself; for a longer task a change of hands is cheap


class Direct:
    """Hands calls to idle workers, and outcomes to the threads that wait for them.

    Args:
        loop: The dispatcher's loop.
        crew: The workers.
        feeder: The queue; what waits in it comes before any new call.
        left_queue: Called with the future of each call that is handed over.
        read: The dispatcher's way to read a worker's pipe.
        is_open: Whether the engine accepts work.
        takes: Whether outcomes may be taken past the dispatcher while it does.
    """

    def __init__(
        self,
        loop: Loop,
        crew: Crew,
        feeder: Feeder,
        *,
        left_queue: Callable[[TaskFuture[Any]], None],
        read: Callable[[WorkerHandle], None],
        is_open: Callable[[], bool],
        takes: bool,
    ) -> None:
        self._loop = loop
        self._crew = crew
        self._feeder = feeder
        self._left_queue = left_queue
        self._read = read
        self._is_open = is_open
        self._takes = takes
        self._submitted = 0.0  # when the last call came
        self._lock = threading.Lock()  # whoever has it may settle what workers wrote
        self._taken_from: WorkerHandle | None = None  # whose outcome a waiting thread is taking

    # There

    def give(self, call: Call) -> bool:
        """Send a call to an idle worker; False if there is none or the dispatcher does better. Never blocks."""
        return self._is_best_here(call) and self._hand_over(call)

    def _is_best_here(self, call: Call) -> bool:
        """Whether writing to an idle worker right here is best: nobody waits, and this is not one of a rush of calls.

        The write lets go of the GIL, and coming back costs more than the dispatcher's own sending, many at a time.
        """
        before, self._submitted = self._submitted, now()
        if self._loop or self._feeder.can_feed or not call.is_small():
            return False
        return len(self._crew.idle) == len(self._crew.workers) or self._submitted - before > RUSH

    def _hand_over(self, call: Call) -> bool:
        try:
            worker = self._crew.idle.pop()
        except IndexError:
            return False
        turn = worker.turn
        try:
            if not call.claim():
                self._loop.post(self._crew.take_returned, worker)
                return True
            call.future.place = worker
            if not worker.give(call):
                call.give_back()
                self._loop.post(self._crew.take_returned, worker)
                return False
            self._left_queue(call.future)
        finally:
            worker.handed_turn = turn
        limit = call.options.task_timeout
        self._loop.look_by(worker.since + (PICK_UP if limit is None or limit > PICK_UP else limit))
        if worker.state != SERVING or not self._is_open():  # set before anybody looks at what this worker has
            self._loop.post(self._crew.bury_if_dead, worker)
        return True

    # Back

    def _may_take(self) -> bool:
        return self._takes and self._is_open()

    def collect(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Take the outcome of a task that was handed over, if it comes at once; the caller waits for it anyway.

        Args:
            future: The task's future. It may be resolved or not when this returns.
            timeout: How long the caller would wait, in seconds.
        """
        worker = future.place
        if worker is None or not self._may_take():
            return
        try:
            self._collect(worker, future, timeout)
        except BaseException:
            self.recover_soon()
            raise

    def recover_soon(self) -> None:
        """A signal handler raised somewhere here: have the dispatcher put right whatever that left undone."""
        self._loop.post(self._recover, None)

    def _recover(self, _: None) -> None:
        for worker in list(self._crew.workers):
            self.listen_again(worker)
            self._read(worker)
        self._crew.find_lost()

    def _collect(self, worker: WorkerHandle, future: TaskFuture[Any], timeout: float | None) -> None:
        if not self._begin(worker, future):
            return
        try:
            if _comes(worker, WAIT if timeout is None else max(0.0, min(WAIT, timeout))):
                self._take_if_alone(worker, future)
        finally:
            self._end(worker)

    def _begin(self, worker: WorkerHandle, future: TaskFuture[Any]) -> bool:
        """Have the dispatcher sleep through what this worker writes."""
        lock = self._lock
        if not lock.acquire(blocking=False):
            return False
        try:
            waits = self._is_waiting(worker, future)
            if waits:
                worker.paused_at = now()
                self._loop.pause(worker.channel.results)
                self._loop.look_by(worker.paused_at + STUCK)
            return waits
        finally:
            lock.release()

    def _end(self, worker: WorkerHandle) -> None:
        """Have it listen again. What lies in the pipe wakes it at once."""
        lock = self._lock
        if not lock.acquire(blocking=False):
            self._loop.post(self.listen_again, worker)
            return
        try:
            self.listen_again(worker)
        finally:
            lock.release()

    def listen_again(self, worker: WorkerHandle) -> None:
        """Watch the worker's results as ever, if it still has a channel."""
        worker.paused_at, worker.rests_until = None, math.inf
        if worker.channel.is_open and not worker.is_held_up:
            self._loop.resume(worker.channel.results)

    def _is_waiting(self, worker: WorkerHandle, future: TaskFuture[Any]) -> bool:
        """Whether the worker has nothing but this task, nobody wants to stop it, and no frame is half read."""
        out = worker.inflight
        if worker.state != SERVING or worker.stop is not None or len(out) != 1 or not out[0].owns(future):
            return False
        if worker.batches_out != worker.batches_done:
            return False  # its records come first
        return worker.channel.is_between_frames()

    def _take_if_alone(self, worker: WorkerHandle, future: TaskFuture[Any]) -> None:
        lock = self._lock
        if not lock.acquire(blocking=False):
            return  # the dispatcher is at it
        try:
            if self._is_waiting(worker, future):
                self._take(worker)
        finally:
            lock.release()

    def _take(self, worker: WorkerHandle) -> None:
        """Read what the worker wrote; if that is the outcome, resolve the future and let the worker wait for work."""
        self._taken_from = worker
        try:
            if not self._settle(worker):
                self._loop.post(self._read, worker)
            if self._feeder.can_feed or self._lies_ahead() or not self._may_take():
                self._loop.post(_wake, None)  # something came while this worker was not idle, or may be fetched for it
        finally:
            self._taken_from = None

    def _lies_ahead(self) -> bool:
        """Whether a worker has more than it runs."""
        return any(len(worker.inflight) > 1 for worker in list(self._crew.workers))

    def _settle(self, worker: WorkerHandle) -> bool:
        channel = worker.channel
        # Nothing has come, or nothing that can be read; or the dispatcher went on without this thread, and all is gone.
        with contextlib.suppress(OSError, BadFrameError, IndexError):
            unit = worker.inflight[0]
            channel.fetch()
            frame = channel.only_frame()
            if (
                frame is not None
                and frame.unit == unit.id
                and frame.kind in (wire.VALUES, wire.NUMBERS, wire.RAISED)
                and not frame.body.places
                and unit.receive_alone(frame)
            ):
                worker.turn += 1  # until it is idle again it counts as lost if this thread does not come back
                worker.finished_one(frame.seconds)
                worker.count(ok=frame.kind != wire.RAISED)
                channel.drop_only_frame()
                self._crew.make_idle(worker)
                return True
        return False

    def shut_out(self) -> threading.Lock:
        """Keep waiting threads away from outcomes, for the dispatcher; it releases the lock that this returns."""
        lock = self._lock
        if not lock.acquire(timeout=END_TIME):
            lock = self._lock = threading.Lock()  # see above: a signal handler does not come back
            lock.acquire()
            if self._taken_from is not None:
                self._crew.kill(self._taken_from)
        return lock


def _comes(worker: WorkerHandle, seconds: float) -> bool:
    """Wait until there is something to read from a worker; not from one whose channel has been closed."""
    fd = worker.channel.results
    if fd < 0:
        return False
    if worker.seconds < spin.LONGEST and spin.until_readable(fd, min(spin.LONGEST, seconds)):
        return True
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _wake(_: None) -> None:
    """Do nothing: the dispatcher looks around whenever it wakes."""
