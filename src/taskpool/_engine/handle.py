"""The parent's view of one worker."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any, NamedTuple

from taskpool._engine import wire
from taskpool._engine.channel import BETWEEN, IDLE, INTERRUPT, INTERRUPT_ITEM, LOADING, PACKETS, WRITING, Channel
from taskpool._engine.printed import Printed
from taskpool._engine.stop import ProcessHandle
from taskpool._engine.units import Range, Unit
from taskpool.logs import Source

# A worker's life: STARTING (no word that it is ready) -> SERVING -> ENDING (it was told to, or said that it will)
# -> DYING (its process has ended, its exit code is awaited) -> GONE.
STARTING, SERVING, ENDING, DYING, GONE = "starting", "serving", "ending", "dying", "gone"

PICK_UP = 2.0  # seconds in which a worker takes a task that lies in its pipe; one that does not is replaced
STUCK = 50e-3  # a waiting thread that watches so long is stuck in a signal handler
SOON = 1e-3  # when to look again for a task that has a tiny limit and has not begun
AHEAD = 20e-3  # how long tasks that were sent ahead wait behind one that turned out to be long
SHORT = 10e-3  # tasks that take less, of late, are sent ahead of time: one,
RECENT = 10  # log records that are kept for the report of a crash
AHEAD_SECONDS = 16e-3  # ... or as many as should take this long (a busy thread of the program keeps the GIL for 5 ms)
REST = 0.5e-3, 8e-3  # seconds, at least and at most, in which nobody listens to a worker that has several tasks:
SEVERAL = 3


class Stop:
    """A climb up the ladder of `stop.py`, for one item of one unit.

    Attributes:
        unit: What must end.
        item: Which item of it; ANY_ITEM for whichever runs.
        timed_out: Whether it passed its limit; otherwise it was cancelled.
        rung: The step that was taken last: 1 interrupt, 2 stacks, 3 the end of the group.
        due: When the next step is due.
    """

    def __init__(self, unit: Unit, item: int, *, timed_out: bool) -> None:
        self.unit = unit
        self.item = item
        self.timed_out = timed_out
        self.rung = 0
        self.due = 0.0


class Running(NamedTuple):
    """What a worker runs at a moment. The item is BETWEEN two items of a range for as long as none has begun."""

    unit: Unit
    item: int
    started: float
    phase: int


class WorkerHandle:
    """One worker: its channel, its process, and the units that are out with it, in the order of sending.

    A worker that is idle stands in the dispatcher's deque of idle workers. Whoever takes it from there, the dispatcher
    or a thread in `submit`, owns it. Each stay there is a turn; whoever ends it notes that it is done with the worker
    by the turn's number, so that a thread that is late with this does not speak for the one that came after it.
    """

    def __init__(self, index: int, name: str, now: float, *, has_output: bool = False) -> None:
        self.index = index
        self.name = name
        self.channel = Channel(has_output=has_output)
        self.process: ProcessHandle | None = None
        self.state = STARTING
        self.turn = 0  # how often it began to wait for work
        self.handed_turn = 0  # the last one whose end was noted
        self.explained = False  # it was ready, or what keeps it from that is known
        self.is_silent = False  # it has closed its end of the channel
        self.inflight: deque[Unit] = deque()
        self.stop: Stop | None = None
        self.since = now  # when it began to do what it does now: start, wait for a task, end
        self.late_with = 0  # the id of the unit for which it got its time to begin a second time
        self.received = 0  # how far it was when a deadline was last looked at
        self.progressed = -math.inf  # when a look last found more of them
        self.served = 0
        self.finished = 0  # tasks whose outcome was taken past the dispatcher: with a result
        self.failed = 0  # ... with an error
        self.retiring = False
        self.ended_early = False
        self.paused_at: float | None = None  # since when a waiting thread watches what it writes
        self.rests_until = math.inf  # when what it wrote is looked at, if nobody listens until then
        self.exitcode: int | None = None
        self.exitcode_due = False  # whether the host has yet to tell it
        self.reason: str | None = None  # why we ended it, if the exit code would not tell
        self.end_by = math.inf  # while ENDING: when it is killed, or given up if it was
        self.hosted: Any = None  # what the host keeps about it
        self.seconds = math.inf  # how long a task of it takes, of late: rather too much,
        self.least = math.inf  # ... and rather too little
        self.peak_memory: int | None = None  # once it has ended: bytes
        self.others_memory = 0  # ... of what it had started and still lived then
        self.out_of_memory: bool | None = None  # ... whether the kernel killed it for that
        self.printed: Printed | None = None  # what it has printed, where that is wanted
        self.batches_out = 0  # batches of log records that were queued,
        self.batches_done = 0  # ... and that the listener has handled
        self.is_held_up = False  # whether it is not read, since too many records wait
        self.recent: deque[tuple[int, int, bytes]] = deque(maxlen=RECENT)  # its last records: unit, item, data
        self.logged_by: tuple[int, int, Source] | None = None  # where the last one came from: unit, item, source

    def __repr__(self) -> str:
        return f"<worker {self.index} {self.state} pid={self.pid}>"

    @property
    def pid(self) -> int | None:
        """Its process id, once it is known."""
        return self.process.pid if self.process is not None else None

    @property
    def handed(self) -> bool:
        """Whether no thread has it in its hands between being idle and being busy."""
        return self.handed_turn == self.turn

    def give(self, unit: Unit) -> bool:
        """Send a unit whose frame fits into a packet; False, and nothing happened, if the pipe is full or closed."""
        packet = unit.packet()
        if not self.inflight:
            self.since = time.monotonic()
        self.inflight.append(unit)
        if self.channel.send_packet(packet):
            return True
        try:
            self.inflight.remove(unit)
        except ValueError:  # this thread was held up for so long that the worker has been buried, and this with it
            return True
        return False

    def give_many(self, units: list[Unit]) -> list[Unit]:
        """Send units whose frames fit into a packet each; return those for which the pipe has no room."""
        if not self.inflight:
            self.since = time.monotonic()
        if self.channel.unsaid:
            self.channel.say()
        self.inflight.extend(units)
        sent = self.channel.send_packets([unit.packet() for unit in units])
        for _ in range(len(units) - sent):
            self.inflight.pop()
        return units[sent:]

    def begin_large(self, unit: Unit) -> None:
        """Begin to send a unit of any size; the worker has nothing else."""
        self.since = time.monotonic()
        self.channel.say()
        self.inflight.append(unit)
        self.channel.begin_large(unit.frame())

    def room(self, share: int) -> int:
        """How many small units may be sent to it now, so that it has at most `share`; at least one if it has none.

        Several only if its tasks have been short of late: they can be taken back, but while they wait behind a long
        one nobody else runs them.
        """
        waiting = len(self.inflight)
        if self.stop is not None or not self.channel.can_send_ahead or self.seconds > SHORT:
            return 0 if waiting else 1
        if waiting and (not self.inflight[0].is_small() or time.monotonic() - self.since > AHEAD):
            return 0
        if waiting and isinstance(self.inflight[0], Range):
            return 2 - waiting
        depth = min(max(2, int(AHEAD_SECONDS / max(self.seconds, 20e-6))), share, PACKETS - 4)
        # Filled up when half of it is done: one write for many, not one for each outcome.
        return max(depth, 1) - waiting if waiting <= depth // 2 else 0

    def rest(self) -> float:
        """How long nobody need listen to it (seconds): until half of its tasks should be done.

        Each outcome by itself would wake the dispatcher, on a processor that a worker could use.
        """
        if len(self.inflight) < SEVERAL or self.inflight[0].options.task_timeout is not None:
            return 0.0
        seconds = min(REST[1], len(self.inflight) * self.least / 2)
        return seconds if seconds >= REST[0] else 0.0

    def count(self, *, ok: bool) -> None:
        """Count an outcome that was taken past the dispatcher."""
        if ok:
            self.finished += 1
        else:
            self.failed += 1

    def finished_one(self, seconds: float) -> None:
        """Note that the unit at the head is done."""
        self.served += self.inflight.popleft().tasks
        self.channel.said = 0  # it has read what was sent before that
        self.since = time.monotonic()
        known = self.seconds
        self.least = min(seconds, 1.25 * self.least)
        self.seconds = seconds if seconds > known or known == math.inf else 0.8 * known + 0.2 * seconds

    def running(self) -> Running | None:
        """Return what it runs, or None: before a start, and behind an end, which is when it has written the outcome.

        From any thread, while the page is there.
        """
        try:
            head = self.inflight[0]
        except IndexError:  # nothing, or the outcome was taken just now
            return None
        unit, item, started, phase = self.channel.page.current()
        has_begun = unit == head.id and phase != IDLE and (item == BETWEEN or head.begun(item))
        return Running(head, item, started, phase) if has_begun else None

    def note_progress(self, now: float) -> None:
        """Note whether bytes have come since the last look."""
        received = self.channel.progress()
        if self.received != received:
            self.received = received
            self.progressed = now

    def unit_of(self, unit_id: int) -> Unit | None:
        """Return what is out with it under this id."""
        return next((unit for unit in self.inflight if unit.id == unit_id), None)

    def write_interrupt(self, stop: Stop) -> None:
        """Write what shall be interrupted into the page: the item first, so that the pair is never mixed."""
        words = self.channel.page.words
        words[INTERRUPT_ITEM] = stop.item
        words[INTERRUPT] = stop.unit.id

    def limit_due(self, running: Running, now: float) -> float:
        """When the running item passes its limit; later than now where there is none."""
        limit = running.unit.options.task_timeout
        if limit is None:
            return math.inf
        if running.item == BETWEEN:
            return now + max(limit, SOON)
        due = running.started + limit
        if running.phase == WRITING:
            # It has run within its limit and its result is on its way. Only if that stands still it must end.
            due = max(due, self.progressed + max(running.unit.options.grace, AHEAD))
        return due

    def next_due(self, now: float) -> float:
        """When a look at this serving worker is due next."""
        if self.stop is not None:
            return self.stop.due
        if not self.inflight:
            return math.inf
        if self.rests_until < math.inf:
            return self.rests_until
        running = self.running()
        if running is not None:
            due = self.limit_due(running, now)
        else:
            limit = self.inflight[0].options.task_timeout
            due = min(self.since + PICK_UP, now + (PICK_UP if limit is None else max(limit, SOON)))
        if len(self.inflight) > 1:  # those behind wait for AHEAD at most, once it is known which task is the long one
            due = min(due, self.since + AHEAD if running is not None else now + AHEAD)
        return due

    def is_loading(self) -> bool:
        """Whether it is still unpickling what was sent, so that none of several items can be blamed."""
        return self.channel.page.current()[3] == LOADING

    def send_sentinel(self) -> None:
        """Tell it to end once it has done what was sent before."""
        self.channel.send_packet(wire.frame_head(wire.SENTINEL))
