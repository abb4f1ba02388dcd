"""The workers' lives: how they begin, wait for work, and end. On the dispatcher's thread, unless it says otherwise."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from taskpool import _levels, errors
from taskpool._engine import stop
from taskpool._engine.autopsy import OutOfMemoryKills
from taskpool._engine.handle import DYING, ENDING, GONE, SERVING, STARTING, WorkerHandle
from taskpool._engine.hosts.base import PENDING, Host
from taskpool._engine.loop import Loop
from taskpool._engine.memory import KEEP, Block
from taskpool._engine.outcomes import EncodedError
from taskpool._engine.starts import Starts
from taskpool._engine.units import Call, Source, Unit
from taskpool._engine.wire import Pickled
from taskpool._listeners import Listeners
from taskpool.logs import Sink

now = time.monotonic

END_TIME = 1.0  # seconds in which a worker answers the sentinel, or is gone after SIGKILL
LOST_TIME = 0.1  # ... in which one without a channel may still end by itself


class Settings(NamedTuple):
    """What does not change in an engine's life. Times in seconds."""

    name: str
    max_workers: int
    setup: Pickled
    has_initializer: bool = False
    start_timeout: float | None = 60.0
    max_tasks: int | None = None
    idle_timeout: float | None = None
    listeners: Listeners = Listeners()
    sink: Sink | None = None  # where log records go
    log_timeout: float = 5.0
    output: str = "inherit"


class Counts:
    """What happened so far. Written by the dispatcher only.

    What waiting threads took is counted with each worker, and added here when that is gone.
    """

    def __init__(self) -> None:
        self.finished = 0
        self.failed = 0
        self.timed_out = 0
        self.cancelled = 0
        self.crashed = 0
        self.started = 0
        self.replaced = 0
        self.retried = 0
        self.rerun = 0


class Hub(Protocol):
    """What the crew needs of the dispatcher."""

    @property
    def is_open(self) -> bool:
        """Whether it accepts work."""
        ...

    def read(self, worker: WorkerHandle) -> None:
        """Take what the worker has written."""

    def settle_left(self, worker: WorkerHandle, unit: Unit, item: int | None) -> None:
        """Settle a unit that a dead worker had: `item` ran, or None if it had not started."""

    def give_up(self, error: Callable[[], BaseException]) -> None:
        """Fail all that waits and all that comes."""

    def log(self, level: int, text: str, *args: object) -> None:
        """Log where handlers may block."""


class WorkerTeller(Protocol):
    """Who tells listeners about workers."""

    def worker_started(self, worker: WorkerHandle) -> None:
        """A start was begun."""

    def worker_ready(self, worker: WorkerHandle) -> None:
        """A worker takes tasks."""

    def worker_died(self, worker: WorkerHandle) -> None:
        """A worker has ended."""


class Outputs(Protocol):
    """Who reads what workers print."""

    is_on: bool  # whether that is wanted

    def begin(self, worker: WorkerHandle) -> None:
        """Read what this worker prints from now on."""

    def end(self, worker: WorkerHandle) -> None:
        """It prints no more."""


class Crew:
    """All workers. One that is idle stands in `idle`, from where a submitting thread may take it (see WorkerHandle)."""

    def __init__(
        self,
        hub: Hub,
        loop: Loop,
        host: Host,
        settings: Settings,
        counts: Counts,
        *,
        teller: WorkerTeller,
        outputs: Outputs,
    ) -> None:
        self._teller = teller
        self._outputs = outputs
        self.workers: set[WorkerHandle] = set()
        self.idle: deque[WorkerHandle] = deque()
        self._hub = hub
        self._loop = loop
        self._host = host
        self._settings = settings
        self._counts = counts
        self._numbers = 0
        self._levels_version = 0  # that of the levels that workers know
        self._memory_kills = OutOfMemoryKills()
        self._starts = Starts(loop, hub.give_up, has_initializer=settings.has_initializer)
        host.attach(self)

    # Begin

    def start_for(self, waiting: Iterable[Source]) -> None:
        """Start as many workers as there is room and work for."""
        room = self._room()
        wanted = -sum(worker.state == STARTING for worker in self.workers)
        for source in waiting:
            wanted += 1 if isinstance(source, Call) else source.left()
            if wanted >= room:
                break
        self._start(min(room, wanted))

    def _room(self) -> int:
        """How many more workers there may be."""
        return self._settings.max_workers - sum(w.state in (STARTING, SERVING, ENDING) for w in self.workers)

    def _start(self, count: int) -> None:
        """Start so many workers, or as many as can be at this moment; where the host is busy, its answer brings more."""
        count = min(count, self._host.free_starts())
        if count > 0 and self._starts.may_begin():
            while count and self._start_one():
                count -= 1

    def _start_one(self) -> bool:
        self._numbers += 1
        worker = None
        self._memory_kills.begin()
        try:
            worker = WorkerHandle(
                self._numbers, f"{self._settings.name}-{self._numbers}", now(), has_output=self._outputs.is_on
            )
            worker.channel.page.publish(*_levels.read())
            self._host.start(worker)
        except Exception as error:
            if worker is not None:
                worker.channel.close()
            self._start_failed(error)
            return False
        self.workers.add(worker)
        self.publish_levels()  # once more: whoever changed them meanwhile did not see this one
        self._counts.started += 1
        self._teller.worker_started(worker)
        self._outputs.begin(worker)
        self._loop.watch(worker.channel.results, lambda: self._hub.read(worker))
        self.call_sent(worker)
        return True

    def call_sent(self, worker: WorkerHandle) -> None:
        """From now on an answer of the worker that starts is awaited."""
        self._loop.wake_by(self.start_due(worker))

    def start_due(self, worker: WorkerHandle) -> float:
        """When a starting worker must be ready, or at least have said who it is."""
        timeout = self._settings.start_timeout
        due = math.inf if timeout is None else worker.since + timeout
        return due if worker.process is not None else min(due, self._host.answer_due(worker))

    def process_known(self, worker: WorkerHandle, pid: int) -> None:
        """Note which process a worker is; its end is watched from now on. Hosts and workers themselves tell."""
        if worker.process is not None:
            return
        worker.process = stop.ProcessHandle(pid)
        self._host.pid_known(worker)
        if worker.process.fd is not None:
            self._loop.watch(worker.process.fd, lambda: self.process_ended(worker))
        elif worker.process.ended or self._has_exited(worker):  # asked now, the host tells of its end when that comes
            self._loop.post(self.process_ended, worker)

    def _has_exited(self, worker: WorkerHandle) -> bool:
        """Whether a process for which there is no pidfd has ended, by its exit code."""
        has_pidfd = worker.process is not None and worker.process.fd is not None
        return not has_pidfd and isinstance(self._host.exitcode(worker), int)

    def ready(self, worker: WorkerHandle) -> None:
        """A worker can take tasks."""
        self._starts.succeeded()
        worker.explained = True
        if worker.state == STARTING:
            worker.state = SERVING
            self._teller.worker_ready(worker)
            self.make_idle(worker)

    # Starts that fail

    def not_ready(self, worker: WorkerHandle, error: EncodedError) -> None:
        """A worker's initializer raised."""
        worker.explained = True
        self._start_failed(error)
        self.expect_end(worker)

    def start_failed(self, worker: WorkerHandle, error: BaseException) -> None:
        """A host could not start this worker's process."""
        self.bury(worker)
        self._start_failed(error)

    def start_died(self, worker: WorkerHandle, processes: int) -> None:
        """A host saw so many processes end that could have become this worker."""
        if worker.process is None and worker.state == STARTING:
            worker.explained = True
            self._died_before_ready(worker, processes)
            self.bury(worker)

    def start_lost(self, worker: WorkerHandle) -> None:
        """A host lost a start; the worker never came to be, through no fault of its own."""
        if worker.process is None and worker.state == STARTING:
            self.bury(worker)

    def start_timed_out(self, worker: WorkerHandle) -> None:
        """A worker is not ready in time."""
        self.expect_end(worker)  # so that giving up leaves this one alone
        seconds = self._settings.start_timeout
        if seconds is not None and now() >= worker.since + seconds:
            what = "the initializer" if self._settings.has_initializer else "the start of a worker"
            self._start_failed(TimeoutError(f"{what} did not finish within start_timeout={seconds:g} seconds"))
        if worker.process is not None:
            self.kill(worker)
        else:
            self._host.start_unanswered(worker)
            self.bury(worker)

    def _died_before_ready(self, worker: WorkerHandle, processes: int = 1) -> None:
        text = f"a worker ended before it was ready{self._host.hint(worker)}"
        self._start_failed(errors.WorkerCrashedError(text, pid=worker.pid), processes)

    def _start_failed(self, reason: BaseException | EncodedError, count: int = 1) -> None:
        are_others = any(worker.state in (STARTING, SERVING) for worker in self.workers)
        self._starts.failed(reason, count=count, are_others=are_others)

    def forget(self, key: bytes) -> None:
        """Have every worker that serves drop a shared value: at once, or in front of its next task."""
        for worker in list(self.workers):
            if worker.state == SERVING:
                worker.channel.unsaid.append(key)
                if not worker.inflight:
                    worker.channel.say()

    def look_at_levels(self) -> None:
        """See that a change of the loggers' levels reaches the workers before the next task. From any thread."""
        if self._levels_version != _levels.version() and self._settings.sink is not None:
            self.publish_levels()

    def publish_levels(self) -> None:
        """Let the workers know the levels of the loggers as they are now, before their next task. From any thread."""
        self._levels_version, data = _levels.read()
        for worker in list(self.workers):
            with contextlib.suppress(ValueError):  # its page was unmapped just now
                worker.channel.page.publish(self._levels_version, data)

    # Wait for work

    def make_idle(self, worker: WorkerHandle) -> None:
        """Let a worker wait for work, or end if it has done its share."""
        if self._settings.max_tasks is not None and worker.served >= self._settings.max_tasks:
            worker.retiring = True
            self.retire(worker)
            return
        worker.since = now()
        worker.turn += 1
        if worker.channel.unsaid:
            worker.channel.say()
        self.idle.append(worker)
        if worker.state != SERVING:  # by a thread that was held up for long; a burial sets this, then looks there
            self.remove_from_idle(worker)
        if self._settings.idle_timeout is not None:
            self._loop.look_by(worker.since + self._settings.idle_timeout)
        if worker.channel.lent is not None:
            self._loop.look_by(worker.since + KEEP)

    def take_lent(self, free: Callable[[Block], None]) -> None:
        """Free the blocks that were lent to workers which have had no task for a while."""
        for worker in [worker for worker in list(self.idle) if worker.channel.lent is not None]:
            if worker.since + KEEP > now():
                self._loop.wake_by(worker.since + KEEP)
            elif self.remove_from_idle(worker):
                block = worker.channel.take_lent()
                self.make_idle(worker)
                if block is not None:
                    free(block)

    def take_idle(self) -> WorkerHandle | None:
        """Take a worker that waits, the one that has waited least."""
        try:
            worker = self.idle.pop()
        except IndexError:
            return None
        worker.handed_turn = worker.turn
        return worker

    def remove_from_idle(self, worker: WorkerHandle) -> bool:
        """Take this worker, if it still waits; false if it does not or a submitting thread was faster."""
        try:
            self.idle.remove(worker)
        except ValueError:
            return False
        worker.handed_turn = worker.turn
        return True

    def take_fresh(self) -> WorkerHandle | None:
        """Take a worker that waits and has not served yet."""
        fresh = (worker for worker in list(self.idle) if not worker.served)
        return next((worker for worker in fresh if self.remove_from_idle(worker)), None)

    def start_fresh(self, wanted: int) -> None:
        """See that so many new workers come: where there is no room, workers that wait make room by ending."""
        wanted -= sum(worker.state in (STARTING, ENDING) for worker in self.workers)
        room = self._room()
        self._start(min(wanted, room))
        for _ in range(min(wanted - room, len(self.idle))):
            worker = self.take_idle()
            if worker is not None:
                worker.retiring = True
                self.retire(worker)

    def take_returned(self, worker: WorkerHandle) -> None:
        """A submitting thread gives back a worker unused."""
        if worker.state == SERVING and not worker.inflight:
            self.make_idle(worker)
        else:
            self.bury_if_dead(worker)

    def bury_if_dead(self, worker: WorkerHandle) -> None:
        """A submitting thread is done with a worker whose end was seen meanwhile."""
        if worker.state == DYING and not worker.exitcode_due:
            self.bury(worker)
        while worker.state == GONE and worker.inflight:  # what came behind its burial nobody has read
            self._hub.settle_left(worker, worker.inflight.popleft(), None)

    def find_lost(self) -> None:
        """Replace the worker that a thread took and, interrupted at the worst moment, never gave back.

        It may find one that another thread is just handing a call: that call comes back when the worker has ended, or
        runs first, if it was sent before the sentinel (`end_overdue`). One that was taken, but perhaps never sent its
        call, is found by the look that is called for here.
        """
        self._loop.wake_by(now())
        for worker in list(self.workers):
            if worker.state == SERVING and not worker.inflight and worker not in self.idle:
                self.retire(worker)

    # End

    def retire(self, worker: WorkerHandle) -> None:
        """Have a worker without tasks end: one sentinel, answered by its end, or else SIGKILL."""
        self.expect_end(worker)
        with contextlib.suppress(OSError):
            worker.send_sentinel()

    def retire_idle(self) -> None:
        """Have every worker end that has nothing to do."""
        for worker in list(self.workers):
            if worker.state == SERVING and not worker.inflight and self.remove_from_idle(worker):
                self.retire(worker)
            elif worker.state == STARTING:
                self.kill(worker)

    def expect_end(self, worker: WorkerHandle) -> None:
        """A worker shall end by itself, or by SIGKILL when its time is over."""
        if worker.state in (STARTING, SERVING):
            self.remove_from_idle(worker)
            worker.state = ENDING
            worker.end_by = now() + END_TIME
            self._loop.wake_by(worker.end_by)

    def kill(self, worker: WorkerHandle) -> None:
        """End a worker's process group, whatever it does."""
        worker.explained = True
        self.expect_end(worker)
        worker.end_by = now() + END_TIME
        worker.channel.end_life()
        if worker.process is None:  # should it come to be after all, it finds the channel closed, and ends
            self.bury(worker)
            return
        worker.process.kill_group()
        worker.process.kill()
        self._loop.wake_by(worker.end_by)

    def end_overdue(self, worker: WorkerHandle) -> None:
        """A worker has not ended in time: kill it, or give up the slot if that was done."""
        if self._has_exited(worker):
            self.process_ended(worker)  # nothing else told: a child of it may hold all that would
        elif worker.channel.has_life and worker.stop is None and not worker.is_silent and worker.running() is not None:
            worker.state = SERVING  # another thread had it all the time; it ends behind this task
        elif worker.channel.has_life:
            if worker.inflight and worker.stop is None:
                worker.reason = "it closed its channel to the parent, and was ended for that"
            self.kill(worker)
        else:
            text = "process %s does not end after SIGKILL; its slot is used by another"
            self._hub.log(logging.ERROR, text, worker.pid)
            self.bury(worker)

    def channel_ended(self, worker: WorkerHandle) -> None:
        """Nobody holds the other end of the channel: the process is ending, or must."""
        self._loop.unwatch(worker.channel.results)
        worker.is_silent = True
        if worker.process is None:
            self.process_ended(worker)  # it never said who it was
        else:
            self.end_seen(worker)

    def end_seen(self, worker: WorkerHandle) -> None:
        """A process has let go of something that it holds for all its life: it is ending, or must."""
        if worker.state not in (DYING, GONE):
            self.expect_end(worker)
            worker.end_by = min(worker.end_by, now() + LOST_TIME)
            self._loop.wake_by(worker.end_by)

    def process_ended(self, worker: WorkerHandle) -> None:
        """The process has ended: take what it wrote, then its exit code, then settle what it leaves."""
        if worker.state in (DYING, GONE):
            return
        if worker.process is not None and worker.process.fd is not None:
            self._loop.unwatch(worker.process.fd)
        self.remove_from_idle(worker)
        worker.state = DYING
        worker.since = now()
        self._hub.read(worker)
        if not worker.explained:
            self._died_before_ready(worker)
        worker.ended_early = self._hub.is_open and not worker.retiring
        self._counts.replaced += worker.ended_early
        if worker.inflight:
            own, worker.others_memory = stop.peak_memory(worker.process)
            worker.peak_memory = None if own is None else own + worker.others_memory
        self._end_descendants(worker)  # before anybody asks for the exit code: that may reap, and free the id
        self._take_back(worker)  # others run it now: the exit code may be long in coming
        known = self._host.exitcode(worker)
        worker.exitcode_due = known is PENDING
        if not worker.exitcode_due:
            worker.exitcode = known  # type: ignore[assignment]
        if worker.exitcode_due or not worker.handed:
            self._loop.wake_by(self.burial_due(worker))
        else:
            self.bury(worker)

    def _end_descendants(self, worker: WorkerHandle) -> None:
        """Kill what is left of a worker's group and session."""
        if worker.process is not None:
            worker.process.kill_group()
            if not self._host.sweeps(worker):
                stop.sweep_session(worker.process.pid)
            if worker.state == DYING:
                worker.process.ended = True  # from here on its id may come to mean another

    def burial_due(self, worker: WorkerHandle) -> float:
        """When a dead worker is buried at the latest.

        A thread that interrupts its own `submit` at the worst moment never gives the worker back; one that is merely
        slow does so within microseconds.
        """
        return worker.since + (self._host.exitcode_time if worker.handed else END_TIME)

    def exitcode_known(self, worker: WorkerHandle, exitcode: int | None) -> None:
        """A host learnt the exit code of a process that has ended."""
        self.process_ended(worker)
        worker.exitcode = exitcode
        worker.exitcode_due = False
        if worker.state == DYING and worker.handed:
            self.bury(worker)

    def bury(self, worker: WorkerHandle) -> None:
        """Settle what a worker leaves, and free all that it held."""
        if worker.state == GONE:
            return
        if worker.state != DYING:
            self._end_descendants(worker)
        worker.state = GONE
        if worker.exitcode_due:
            late = self._host.exitcode(worker)
            worker.exitcode = None if late is PENDING else late  # type: ignore[assignment]
        self.workers.discard(worker)
        if worker.exitcode == -stop.KILL_SIGNAL and worker.inflight:
            worker.out_of_memory = self._memory_kills.claim()
        self._counts.finished += worker.finished
        self._counts.failed += worker.failed
        self.remove_from_idle(worker)
        self._settle(worker)
        self._outputs.end(worker)
        self._teller.worker_died(worker)
        for fd in (worker.channel.results, worker.channel.tasks):
            self._loop.unwatch(fd)
        if worker.process is not None and worker.process.fd is not None:
            self._loop.unwatch(worker.process.fd)
        worker.channel.close()
        self._host.buried(worker)
        if worker.process is not None:
            worker.process.close()

    def _settle(self, worker: WorkerHandle) -> None:
        self._take_back(worker)
        while worker.inflight:  # to which a submitting thread may be adding
            unit = worker.inflight.popleft()
            self._hub.settle_left(worker, unit, self._ran(worker, unit))

    def _take_back(self, worker: WorkerHandle) -> None:
        """Put back what a dead worker has not begun."""
        worker.channel.take_back()  # nobody will read it any more
        for unit in list(worker.inflight):
            if self._ran(worker, unit) is None:
                with contextlib.suppress(ValueError):  # a submitting thread has just taken it off: its write failed
                    worker.inflight.remove(unit)
                    self._hub.settle_left(worker, unit, None)

    def _ran(self, worker: WorkerHandle, unit: Unit) -> int | None:
        """Which item of a unit a dead worker ran; None if it had not begun the unit."""
        unit_id, item, _started, _phase = worker.channel.page.current()
        return item if unit.id == unit_id and unit.begun(item) else None

    def abandon(self) -> None:
        """Kill and bury all, whatever happens: the engine has failed."""
        for worker in list(self.workers):
            with contextlib.suppress(Exception):
                self.kill(worker)
            with contextlib.suppress(Exception):
                self.bury(worker)

    # What hosts need

    def post(self, function: Callable[[Any], None], argument: Any) -> None:
        """Have a host's function called on the dispatcher's thread. From any thread."""
        self._loop.post(function, argument)

    def watch(self, fd: int, callback: Callable[[], Any]) -> None:
        """Have a host's callback called when `fd` is readable."""
        self._loop.watch(fd, callback)

    def hosted_by(self, engine: object) -> list[WorkerHandle]:
        """For hosts: the workers whose `hosted` begins with this engine."""
        return [worker for worker in self.workers if worker.hosted is not None and worker.hosted[0] is engine]

    def unwatch(self, fd: int) -> None:
        """End a watch."""
        self._loop.unwatch(fd)
