"""One map, as the engine sees it: what to do with each item, and where its outcome goes.

Items go to workers in pieces; outcomes come back in groups of neighbouring items, in any order. Together the groups
cover the items without gap or overlap. So whoever reads in order finds, at each index that is due, the beginning of a
group; whoever does not takes the groups as they come.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from taskpool._options import TaskOptions
from taskpool._task import RawOutcome, task_ids


class Settled(NamedTuple):
    """The outcome of neighbouring items: the list of their results together, or the error that each of them has.

    Attributes:
        item: The index of the first item.
        items: How many they are.
        outcome: Decodes to the list of their results, or to the error.
        started: When the first of them began (monotonic); 0 if none has.
        seconds: How long they took together; 0 if that was not measured.
        worker: The name of the worker that ran them; None if none has.
        attempts: How many attempts it took.
        output: What the last of them printed, where that is kept.
    """

    item: int
    items: int
    outcome: RawOutcome
    started: float = 0.0
    seconds: float = 0.0
    worker: str | None = None
    attempts: int = 1
    output: str = ""

    def singly(self) -> list[Settled]:
        """Return each item by itself: together their results cannot be decoded, or must be judged one by one."""
        if self.items == 1:
            return [self]
        each = self.seconds / self.items
        return [
            self._replace(item=self.item + k, items=1, outcome=part, started=self.started + k * each, seconds=each)
            for k, part in enumerate(self.outcome.parts(self.items))
        ]


class MapJob:
    """What the engine knows of a map.

    Args:
        fn: The function.
        star: Whether an item is a tuple of arguments.
        options: What holds for each item.
        chunksize: How many items a worker gets at a time; None sizes the chunks by measured durations.
    """

    def __init__(self, fn: Callable[..., Any], *, star: bool, options: TaskOptions, chunksize: int | None) -> None:
        self.id: int = next(task_ids)
        self.fn = fn
        self.star = star
        self.options = options
        self.chunksize = chunksize
        self.cancelled: bool = False
        self.level: int = 0  # how many tasks wait for its items, each for the next
        self.deadline: float | None = None  # the call's own (monotonic)
        self.seconds: float | None = None  # how long an item takes, of late
        self.item_bytes: float = 0.0  # how large it is, or its result, pickled
        self.total: int | None = None  # how many items there are, once that is known
        self.finished: int = 0
        self.failed: int = 0
        self.on_settled: Callable[[], None] | None = None  # called after each group; must not block
        self._reports: dict[int, float] = {}  # how far running items say they are, from 0 to 1
        self._groups: dict[int, Settled] = {}
        self._lock = threading.RLock()
        self._sleeper: threading.Lock | None = None  # of the thread that waits for a group,
        self._awaited: int | None = None  # ... and where that begins; None for any

    def settle(self, settled: Settled) -> None:
        """Keep a group until it is asked for."""
        self._measure(settled)
        with self._lock:
            if not self.cancelled:
                self._groups[settled.item] = settled
            self.finished += settled.items
            self.failed += 0 if settled.outcome.ok else settled.items
            if self._reports:
                self._forget_reports(settled)
            sleeper = self._sleeper if self._awaited in (settled.item, None) else None
            if sleeper is not None:
                self._sleeper = None
        if sleeper is not None:
            sleeper.release()
        if self.on_settled is not None:
            self.on_settled()

    def _measure(self, settled: Settled) -> None:
        if settled.seconds and settled.outcome.ok:
            each = settled.seconds / settled.items
            known = self.seconds
            self.seconds = each if known is None or each > known else 0.7 * known + 0.3 * each
            self.item_bytes = max(self.item_bytes, settled.outcome.size / settled.items)

    def poll(self, index: int | None) -> Settled | None:
        """Take the group that begins at `index`, or any if that is None; None if it has not come."""
        with self._lock:
            if index is None:
                index = next(iter(self._groups), None)
            return None if index is None else self._groups.pop(index, None)

    def take(self, index: int | None, deadline: float | None) -> Settled | None:
        """Wait for the group that begins at `index`, or for any, and take it; None when time is up, or after `cancel`."""
        # A lock of its own each time, not a condition, which a signal handler that raises may leave half taken.
        while True:
            sleeper = threading.Lock()
            sleeper.acquire()
            with self._lock:
                self._sleeper, self._awaited = sleeper, index
                settled = self.poll(index)
            if settled is not None or self.cancelled:
                return settled
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            sleeper.acquire(timeout=-1 if left is None else min(left, threading.TIMEOUT_MAX))

    def cancel(self) -> None:
        """Drop what has arrived, and what still will; whoever waits for it waits no longer."""
        with self._lock:
            self.cancelled = True
            self._groups.clear()
            self._reports.clear()
            sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None:
            sleeper.release()

    # What running items say of themselves

    def report(self, index: int, done: float, total: float) -> None:
        """Note how far a running item says it is."""
        with self._lock:
            if not self.cancelled and total > 0:
                self._reports[index] = min(max(done / total, 0.0), 1.0)

    def part(self) -> float:
        """Return what the running items have done, by their own reports, in items."""
        with self._lock:
            return sum(self._reports.values())

    def _forget_reports(self, settled: Settled) -> None:
        for index in range(settled.item, settled.item + settled.items):
            self._reports.pop(index, None)


class MapBackend:
    """What a map needs of its backend."""

    workers: int = 1

    def check_process(self) -> None:
        """Raise `ForkedExecutorError` in a process that was forked from the one that made this. Takes no lock."""

    def is_here(self) -> bool:
        """Whether this process is the one that made this."""
        return True

    def submit_items(self, job: MapJob, first: int, items: Sequence[Any]) -> None:
        """Accept the items of `job` from index `first` on."""
        raise NotImplementedError

    def waiting(self, job: MapJob | None = None) -> contextlib.AbstractContextManager[None]:
        """Return what to be in while waiting: for an outcome of `job`, or for tasks that were submitted for that."""
        return contextlib.nullcontext()

    def cancel_job(self, job: MapJob, *, stop: bool) -> None:
        """Drop the job's items that have not started and, if `stop`, stop those that run."""
        raise NotImplementedError
