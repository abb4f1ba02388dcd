"""Deadlines, and the climb up the ladder of `stop.py` for tasks that must end. On the dispatcher's thread.

Why a kill never hits the wrong task: before the ladder is climbed for a task, whatever was sent behind it is read back
from the pipe. So if the task is still the worker's current one after that, the worker has nothing else that it could
begin; at worst the kill hits it when it has just written the outcome, which is then delivered.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any, Protocol

from taskpool._engine import stop
from taskpool._engine.channel import ANY_ITEM
from taskpool._engine.crew import Crew
from taskpool._engine.handle import DYING, ENDING, GONE, PICK_UP, SERVING, SOON, STARTING, STUCK, Stop, WorkerHandle
from taskpool._engine.loop import Loop
from taskpool._engine.units import Range, Unit
from taskpool._map import MapJob
from taskpool._task import TaskFuture

now = time.monotonic

ASK, STACKS = 1, 2  # the rungs of the ladder; the third is the end of the process group
STACK_TIME = 0.25  # seconds in which a worker writes its stacks, and ends by that


class Hub(Protocol):
    """What is needed of the dispatcher."""

    def read(self, worker: WorkerHandle) -> None:
        """Take what the worker has written."""

    def withdraw(self, worker: WorkerHandle) -> bool:
        """Put back in the queue what the worker has not read; return whether there was anything."""
        ...

    def next_task(self, worker: WorkerHandle) -> None:
        """Give a worker that has nothing left something else to do, or let it wait."""

    def listen_again(self, worker: WorkerHandle) -> None:
        """Watch what a worker writes, although a waiting thread wanted to."""

    def log(self, level: int, text: str, *args: object) -> None:
        """Log where handlers may block."""


class Deadlines:
    """Looks after what every worker does, at the times when a look is due."""

    def __init__(self, hub: Hub, loop: Loop, crew: Crew, idle_timeout: float | None) -> None:
        self.kill_at = math.inf  # when an engine that is being terminated kills what is left
        self._hub = hub
        self._loop = loop
        self._crew = crew
        self._idle_timeout = idle_timeout

    # Tasks that must end

    def stop_target(self, target: TaskFuture[Any] | MapJob) -> None:
        """Stop what runs for a future or a map."""
        for worker in list(self._crew.workers):
            for unit in list(worker.inflight):
                if unit.owns(target):
                    self.stop_unit(worker, unit)

    def stop_unit(self, worker: WorkerHandle, unit: Unit) -> None:
        """Stop a unit that is out with a worker, by cancellation."""
        self._hub.read(worker)  # results first
        if worker.state in (DYING, GONE) or unit not in worker.inflight:
            return  # its end is being handled, or has been
        self._take_back(worker)  # what has not started never will: a cancelled unit is resolved by coming back
        if unit not in worker.inflight:
            return
        if unit is not worker.inflight[0]:
            # The worker has just read it, so the outcome of the one before is in the pipe: ask again behind that.
            self._loop.post(self.stop_target, unit.job if isinstance(unit, Range) else unit.future)
        elif worker.channel.is_sending:
            self._crew.kill(worker)  # it is still being sent, so it has not started, and never will
        else:
            item = ANY_ITEM if isinstance(unit, Range) else 0
            self._begin(worker, Stop(unit, item, timed_out=False))

    def _begin(self, worker: WorkerHandle, request: Stop) -> None:
        if worker.stop is not None and worker.stop.unit is request.unit:
            worker.stop.timed_out &= request.timed_out
            worker.stop.item = request.item if request.item == ANY_ITEM else worker.stop.item
            return
        worker.stop = request
        self._hub.listen_again(worker)
        self._climb(worker)

    def _take_back(self, worker: WorkerHandle) -> None:
        """Take back what the worker has not read. What it has read is its current task, or about to be."""
        if self._leave_nothing(worker):
            self._hub.next_task(worker)

    def _leave_nothing(self, worker: WorkerHandle) -> bool:
        """Put back in the queue what the worker has not read; return whether it is left with nothing by that."""
        return self._hub.withdraw(worker) and not worker.inflight

    def _climb(self, worker: WorkerHandle) -> None:
        """Take the next rung of the ladder for `worker.stop`."""
        request = worker.stop
        assert request is not None
        request.rung += 1
        if worker.process is None or request.rung > STACKS:
            request.due = math.inf  # the rest is the worker's end, which has a time of its own
            self._crew.kill(worker)
            return
        if request.rung == ASK:
            worker.write_interrupt(request)
            stop.interrupt(worker.process)
            request.due = now() + request.unit.options.grace
        else:
            stop.dump_and_die(worker.process)
            request.due = now() + STACK_TIME
        self._loop.wake_by(request.due)

    # Deadlines

    def look(self) -> None:
        """Do what is due, and note when the next look is."""
        self._loop.wake_at = self.kill_at
        time_now = now()
        if time_now >= self.kill_at:
            self._loop.wake_at = self.kill_at = math.inf
            for worker in list(self._crew.workers):
                if worker.state not in (DYING, GONE):
                    self._crew.kill(worker)
        for worker in list(self._crew.workers):
            if worker.state != GONE:
                self._look_at(worker, time_now)

    def _look_at(self, worker: WorkerHandle, time_now: float) -> None:
        if worker.paused_at is not None and worker.paused_at + STUCK <= time_now:
            self._hub.listen_again(worker)
        if worker.rests_until <= time_now:
            self._hub.listen_again(worker)
            self._hub.read(worker)
        if self._due(worker, time_now) <= time_now:
            self._hub.read(worker)  # results first
            worker.note_progress(time_now)
            if worker.state != GONE and self._due(worker, time_now) <= time_now:
                self._act_on(worker, time_now)
        if worker.state != GONE:
            # Not at once: what cannot be taken back now, say, has been read, and its predecessor's outcome is coming.
            self._loop.wake_by(max(self._due(worker, time_now), time_now + SOON))
            self._loop.wake_by(math.inf if worker.paused_at is None else worker.paused_at + STUCK)

    def _due(self, worker: WorkerHandle, time_now: float) -> float:
        if worker.state == STARTING:
            return self._crew.start_due(worker)
        if worker.state == SERVING:
            if not worker.inflight:
                ends = math.inf if self._idle_timeout is None else worker.since + self._idle_timeout
                return min(ends, worker.rests_until)
            return worker.next_due(time_now)
        if worker.state == ENDING:
            return worker.end_by
        return self._crew.burial_due(worker)

    def _act_on(self, worker: WorkerHandle, time_now: float) -> None:
        if worker.state == STARTING:
            self._crew.start_timed_out(worker)
        elif worker.state == SERVING:
            self._act_on_serving(worker, time_now)
        elif worker.state == ENDING:
            self._crew.end_overdue(worker)
        else:
            self._crew.bury(worker)

    def _act_on_serving(self, worker: WorkerHandle, time_now: float) -> None:
        running = worker.running()  # read once: the next item may begin at any moment
        if not worker.inflight:
            if self._crew.remove_from_idle(worker):
                worker.retiring = True
                self._crew.retire(worker)
        elif worker.stop is not None:
            self._climb(worker)
        elif running is None:
            if time_now >= worker.since + PICK_UP:
                self._pass_over(worker)
        elif worker.limit_due(running, time_now) <= time_now:
            self._take_back(worker)
            self._begin(worker, Stop(running.unit, running.item, timed_out=True))
        elif len(worker.inflight) > 1:
            self._take_back(worker)  # they wait behind a task that turned out to be long

    def _pass_over(self, worker: WorkerHandle) -> None:
        """It does not begin what it was sent: let others do that, and end it.

        First it is made sure that it cannot begin it after all. What does not come back it has just read, or it stands
        still between reading and beginning; so that gets its time once more.
        """
        head = worker.inflight[0]
        if self._leave_nothing(worker) or worker.channel.is_sending or worker.late_with == head.id:
            self._hub.log(logging.WARNING, "worker %s does not take its task; it is replaced", worker.index)
            self._crew.kill(worker)
        else:
            worker.late_with = head.id
            worker.since = now()
