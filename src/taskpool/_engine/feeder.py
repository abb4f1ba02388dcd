"""From the queue to the workers: what is accepted, and who gets it when. On the dispatcher's thread."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

from taskpool._engine import verdicts, wire
from taskpool._engine.crew import Counts, Crew, Settings
from taskpool._engine.handle import AHEAD, PICK_UP, SERVING, WorkerHandle
from taskpool._engine.loop import Loop
from taskpool._engine.queue import TaskQueue
from taskpool._engine.units import Call, Piece, Range, Source, Unit
from taskpool._map import Settled
from taskpool._task import Failure, TaskFuture

now = time.monotonic


class Feeder:
    """The queue, and the hand that gives workers what waits in it.

    Args:
        loop: The dispatcher's loop.
        crew: The workers.
        settings: What does not change.
        counts: Where it is noted what was cancelled or failed.
        left_queue: Called with the future of each call that leaves the queue.
    """

    def __init__(
        self, loop: Loop, crew: Crew, settings: Settings, counts: Counts, left_queue: Callable[[TaskFuture[Any]], None]
    ) -> None:
        self.queue = TaskQueue()
        self.broken: Callable[[], BaseException] | None = None  # makes the error of everything that is submitted
        self.terminating = False  # everything that comes is cancelled
        self._delayed: list[tuple[float, int, Source]] = []  # a heap: what waits for its next attempt, by when that is
        self._numbers = itertools.count()  # of entries in that heap
        self._will_drop = False  # what was cancelled there will be looked for
        self._fresh = TaskQueue()  # what waits for a new worker, to run there alone
        self._loop = loop
        self._crew = crew
        self._settings = settings
        self._counts = counts
        self._left_queue = left_queue

    # What comes

    def accept(self, source: Source) -> None:
        """Queue it, or resolve it if nothing runs any more."""
        if self.broken is not None:
            self.refuse(source, Failure(self.broken()))
        elif self.terminating:
            self.refuse(source, None)
        else:
            self.queue.append(source)

    def accept_all(self, pieces: list[Piece]) -> None:
        """Queue pieces of a map."""
        for piece in pieces:
            self.accept(piece)

    def refuse(self, source: Source, failure: Failure | None) -> None:
        """Resolve it with a failure, or as cancelled."""
        if isinstance(source, Call):
            if failure is None:
                self._counts.cancelled += source.future.finish_cancelled()
            else:
                self._counts.failed += source.future.finish(failure)
            self._left_queue(source.future)
        elif not source.job.cancelled:
            for start, end in source.todo:
                outcome, attempts = failure or verdicts.cancelled(), source.attempt - 1
                source.job.settle(Settled(source.first + start, end - start, outcome, attempts=attempts))

    def refuse_posted(self, function: Callable[[Any], None], argument: Any) -> None:
        """Cancel what was submitted at the very last moment."""
        if function == self.accept:
            self.refuse(argument, None)
        elif function == self.accept_all:
            for piece in argument:
                self.refuse(piece, None)

    def refuse_all(self, failure: Callable[[], Failure] | None = None) -> None:
        """Resolve all that waits."""
        for source in [*self.queue.clear(), *self._clear_retried()]:
            self.refuse(source, None if failure is None else failure())

    def _clear_retried(self) -> list[Source]:
        sources = [*self._fresh.clear(), *(source for _due, _number, source in self._delayed)]
        self._delayed.clear()
        return sources

    def refuse_behind(self, count: int) -> None:
        """Cancel all that waits but the first so many calls."""
        for source in self.queue.clear():
            if count and isinstance(source, Call):
                count -= 1
                self.queue.append(source)
            else:
                self.refuse(source, None)
        for source in self._clear_retried():
            self.refuse(source, None)

    def requeue(self, unit: Unit) -> None:
        """Put back a unit that has not started, or what is left of it, where it stood in the queue."""
        if unit.give_back():
            self.put_back(unit if isinstance(unit, Call) else unit.piece)
        else:
            self._counts.cancelled += 1

    def put_back(self, source: Source) -> None:
        """Put it where it stood in the queue."""
        if self.broken is not None or self.terminating:
            self.refuse(source, None if self.broken is None else Failure(self.broken()))
        else:
            (self._fresh if source.fresh else self.queue).insert(source)

    def drop_job(self, job: object) -> None:
        """Drop what waits of a map."""
        self.queue.drop_job(job)
        self._fresh.drop_job(job)
        self._drop_cancelled()

    # What is tried again

    def delay(self, source: Source, seconds: float) -> None:
        """Queue what failed after some seconds, unless it has been cancelled."""
        if isinstance(source, Call) and not source.give_back():
            self._counts.cancelled += 1
        elif seconds <= 0:
            self.put_back(source)
        else:
            heapq.heappush(self._delayed, (now() + seconds, next(self._numbers), source))
            if source.is_cancelled():  # just now: whoever did that saw nothing that waits
                self._drop_cancelled()
            self.look_for_due()

    def look_for_due(self) -> None:
        """Queue what has waited long enough, and see that the loop turns when the next one has."""
        while self._delayed and self._delayed[0][0] <= now():
            self.put_back(heapq.heappop(self._delayed)[2])
        if self._delayed:
            self._loop.wake_by(self._delayed[0][0])

    def cancelled(self) -> None:
        """A call was cancelled that was not out with a worker: see that the end does not wait for it. From any thread."""
        if self._delayed and not self._will_drop:
            self._will_drop = True
            self._loop.post(self._drop_cancelled, None)

    def _drop_cancelled(self, _: None = None) -> None:
        """Forget what was cancelled while it waited for its next attempt."""
        self._will_drop = False
        waiting = []
        for entry in self._delayed:
            if not entry[2].is_cancelled():
                waiting.append(entry)
            elif isinstance(entry[2], Call):
                self._counts.cancelled += 1
        heapq.heapify(waiting)
        self._delayed = waiting

    def __len__(self) -> int:
        """How many calls, and pieces of maps, wait: for a worker, or for their next attempt."""
        return len(self.queue) + len(self._fresh) + len(self._delayed)

    @property
    def waits_for_room(self) -> bool:
        """Whether the next one waits for a new worker; then those that are done with a task wait for a decision."""
        fresh, queue = self._fresh, self.queue
        return bool(fresh) and (not queue or fresh.first().priority >= queue.first().priority)

    @property
    def can_feed(self) -> bool:
        """Whether something waits for a worker."""
        return bool(self.queue or self._fresh)

    def _feed_fresh(self) -> None:
        """Give each of what must run alone on a new worker one; where there is no room an old worker makes some."""
        while self.waits_for_room:
            if self._fresh.first().is_cancelled():
                self._unit_of(self._fresh.pop())
                continue
            worker = self._crew.take_fresh()
            if worker is None:
                self._crew.start_fresh(len(self._fresh))
                break
            unit = self._unit_of(self._fresh.pop())
            if unit is None:
                self._crew.make_idle(worker)
            else:
                self._send(worker, [unit])

    def _unit_of(self, source: Source) -> Unit | None:
        """Return the unit that a single task makes; None if it was cancelled."""
        if isinstance(source, Call):
            if source.claim():
                return source
            self._counts.cancelled += 1
        elif not source.is_cancelled():
            return source.take(is_last=True, workers=1, most=1)
        return None

    # What goes

    def feed(self) -> None:
        """Give what waits to workers: to idle ones, to new ones where there is room, and ahead to busy ones."""
        if self._crew.idle and not self.can_feed:
            self._fetch_for_idle()
        self._feed_fresh()
        while self.queue:
            worker = self._crew.take_idle()
            if worker is None:
                break
            if not self.send_next(worker):
                self._crew.make_idle(worker)
                break
        self._feed_fresh()
        if self.queue:
            self._crew.start_for(self.queue)
        if self.queue and self._settings.max_tasks is None:
            for worker in list(self._crew.workers):
                # Not while a thread is handing it a call, which might come behind these although it is noted before them.
                if worker.state == SERVING and worker.inflight and worker.handed and not self.waits_for_room:
                    self.send_next(worker)

    def _fetch_for_idle(self) -> None:
        """Put back in the queue what was sent ahead to a busy worker: another one has nothing to do."""
        for worker in list(self._crew.workers):
            if worker.state == SERVING and len(worker.inflight) > 1 and self.withdraw(worker):
                if not worker.inflight:  # it had not even read the first
                    self._crew.make_idle(worker)
                break

    def withdraw(self, worker: WorkerHandle) -> bool:
        """Put back in the queue what the worker has not read; return whether there was anything."""
        if not worker.inflight[0].is_small():
            return False  # it is alone, and what lies in the pipe may be the rest of what the worker is reading
        taken = worker.channel.take_back()
        for unit in [unit for unit in worker.inflight if unit.id in taken]:
            worker.inflight.remove(unit)
            self.requeue(unit)
        return bool(taken)

    def send_next(self, worker: WorkerHandle) -> bool:
        """Send the worker as much as it should have of what is next in the queue; False if that is nothing."""
        room = worker.room(-(-len(self.queue) // max(1, len(self._crew.workers))))
        most = None if self._settings.max_tasks is None else self._settings.max_tasks - worker.served
        room = room if most is None else min(room, most)
        units: list[Unit] = []
        while len(units) < room:
            unit = self._next_unit(most, only_small=bool(units or worker.inflight))
            if unit is None:
                break
            units.append(unit)
            if isinstance(unit, Range) or not unit.is_small() or self.waits_for_room:
                break
        if not units:
            return False
        self._send(worker, units)
        return bool(worker.inflight)

    def _send(self, worker: WorkerHandle, units: list[Unit]) -> None:
        self._wake_for(units[0], ahead=len(units) > 1 or bool(worker.inflight))
        with contextlib.suppress(OSError):  # it has just died; what is out with it comes back when its end is handled
            if units[0].is_small():
                for unit in worker.give_many(units):
                    self.requeue(unit)
                self._let_rest(worker)
            else:
                worker.begin_large(units[0])
                self._send_large(worker)

    def _let_rest(self, worker: WorkerHandle) -> None:
        seconds = worker.rest()
        if seconds and worker.rests_until == math.inf:
            worker.rests_until = now() + seconds
            self._loop.pause(worker.channel.results)
            self._loop.wake_by(worker.rests_until)

    def _wake_for(self, unit: Unit, *, ahead: bool) -> None:
        limit = unit.options.task_timeout
        soonest = min(PICK_UP, math.inf if limit is None else limit, AHEAD if ahead else math.inf)
        self._loop.wake_by(now() + soonest)

    def _next_unit(self, most: int | None, *, only_small: bool) -> Unit | None:
        """Take the next unit, of at most so many tasks, off the queue.

        Returns:
            None if there is none, or it is large and only a small one fits.
        """
        while self.queue:
            source = self.queue.first()
            if isinstance(source, Call):
                if only_small and not source.is_small():
                    return None
                self.queue.pop()
                self._left_queue(source.future)
                if source.claim():
                    return source
                self._counts.cancelled += 1
            elif source.is_cancelled():
                self.queue.pop()
            elif only_small and not source.is_small():
                return None
            else:
                unit = source.take(is_last=len(self.queue) == 1, workers=self._settings.max_workers, most=most)
                if not source.todo:
                    self.queue.pop()
                return unit
        return None

    def send_setup(self, worker: WorkerHandle) -> None:
        """Send a new worker what it needs before its first task."""
        setup = self._settings.setup
        head = wire.frame_head(wire.SETUP, 0, setup, index=worker.index)
        with contextlib.suppress(OSError):
            worker.channel.begin_large([head, *setup.pieces()])
            self._send_large(worker)

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
