"""One call of `map`: its input is read ahead by a bound, its outcomes are kept until they are asked for.

The input is cut into pieces, each pickled in the caller's thread. Outcomes come back in groups of neighbouring items,
in any order; together the groups cover the items without gap or overlap. So whoever reads in order finds, at each
index that is due, the beginning of a group.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from itertools import islice
from typing import Any

from taskpool._options import TaskOptions
from taskpool._task import Outcome
from taskpool.errors import CallTimeoutError

READ_AHEAD = 4  # items per worker that are read ahead from an input of unknown length
READ_AHEAD_QUICK = 64  # ... when they turn out to be quicker than QUICK_ITEM
QUICK_ITEM = 1e-3
LARGEST_PIECE = 1 << 16  # items that are pickled together


class MapJob:
    """What the engine knows of a map: how to run an item, and where its outcome goes.

    Args:
        fn: The function.
        star: Whether an item is a tuple of arguments.
        options: What holds for each item.
        chunksize: How many items a worker gets at a time; None sizes the chunks by measured durations.
    """

    def __init__(self, fn: Callable[..., Any], *, star: bool, options: TaskOptions, chunksize: int | None) -> None:
        self.fn = fn
        self.star = star
        self.options = options
        self.chunksize = chunksize
        self.cancelled: bool = False
        self.deadline: float | None = None  # the call's own (monotonic)
        self.seconds: float | None = None  # how long an item takes, of late
        self.finished: int = 0
        self._groups: dict[int, tuple[int, Outcome]] = {}
        self._lock = threading.RLock()
        self._sleeper: threading.Lock | None = None  # of the thread that waits for the next group

    def deposit(self, index: int, count: int, outcome: Outcome, seconds: float | None = None) -> None:
        """Keep the outcome of the items from `index` on: a list of results, or the error of one item.

        Args:
            index: The first item.
            count: How many items; 1 for an error.
            outcome: Theirs.
            seconds: How long they took together, if that was measured.
        """
        if seconds is not None:
            each = seconds / count
            known = self.seconds
            self.seconds = each if known is None or each > known else 0.7 * known + 0.3 * each
        with self._lock:
            if not self.cancelled:
                self._groups[index] = count, outcome
            self.finished += count
            sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None:
            sleeper.release()

    def take(self, index: int, deadline: float | None) -> tuple[int, Outcome] | None:
        """Wait for the group that begins at `index` and return (its length, its outcome); None when time is up."""
        # A lock of its own each time, not a condition, which a signal handler that raises may leave half taken.
        while True:
            sleeper = threading.Lock()
            sleeper.acquire()
            with self._lock:
                self._sleeper = sleeper
                if index in self._groups:
                    return self._groups.pop(index)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            sleeper.acquire(timeout=-1 if left is None else min(left, threading.TIMEOUT_MAX))

    def cancel(self) -> None:
        """Drop what has arrived, and what still will."""
        with self._lock:
            self.cancelled = True
            self._groups.clear()


class MapBackend:
    """What a map needs of its backend."""

    workers: int = 1

    def submit_items(self, job: MapJob, first: int, items: Sequence[Any]) -> None:
        """Accept the items of `job` from index `first` on."""
        raise NotImplementedError

    def cancel_job(self, job: MapJob, *, stop: bool) -> None:
        """Drop the job's items that have not started and, if `stop`, stop those that run."""
        raise NotImplementedError


class MapResults:
    """One map: reads its input ahead, and hands out the results in the order of the input.

    Args:
        backend: Who runs the items.
        job: What to do with each.
        source: The input; read in the thread that asks for results, and in the call that made this.
        timeout: Seconds from now until the last result must be there; None is no limit.
        buffersize: How many items may be read ahead of the results; None decides by the input: all of one whose
            length is known, and a small multiple of the number of workers otherwise.
    """

    def __init__(
        self, backend: MapBackend, job: MapJob, source: Iterable[Any], *, timeout: float | None, buffersize: int | None
    ) -> None:
        self._backend = backend
        self._job = job
        self._seconds = timeout
        self._deadline = job.deadline = None if timeout is None else time.monotonic() + timeout
        self._buffersize = buffersize
        self._sequence = source if isinstance(source, range | list | tuple) else None
        self._source = iter(source)
        self._sized = isinstance(source, Sized)
        self._read = 0  # items taken from the input
        self._next = 0  # the item that is due
        self._input_error: BaseException | None = None
        self._exhausted = isinstance(source, Sized) and not len(source)
        self._closed = False
        self._feed()

    # Input

    def _window(self) -> int | None:
        """How many items may be read ahead; None is all."""
        if self._buffersize is not None:
            return self._buffersize
        if self._sized:
            return None
        quick = self._job.seconds is not None and self._job.seconds < QUICK_ITEM
        return self._backend.workers * (READ_AHEAD_QUICK if quick else READ_AHEAD)

    def _feed(self) -> None:
        """Read ahead as far as the window allows."""
        window = self._window()
        size = 1
        while not self._exhausted and not self._is_late():
            room = LARGEST_PIECE if window is None else window - (self._read - self._next)
            # Beside a full window one item at a time would be a piece each: wait until some have been consumed.
            if room <= 0 or (window is not None and room < window // 2 and self._read > self._next):
                return
            if window is None:
                size = min(max(size * 2, self._job.chunksize or 1), LARGEST_PIECE)
            else:
                size = self._job.chunksize or max(1, room // (2 * self._backend.workers))
            items = self._cut(min(size, room))
            if items:
                self._backend.submit_items(self._job, self._read, items)
                self._read += len(items)

    def _is_late(self) -> bool:
        """Whether the call's time is over: what has not been read by then could not be done in time."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _cut(self, size: int) -> Sequence[Any]:
        if self._sequence is not None:
            items = self._sequence[self._read : self._read + size]
            self._exhausted = self._read + len(items) >= len(self._sequence)
            return items
        items = []
        try:
            items.extend(islice(self._source, size))  # keeps what came before an error
        except Exception as error:
            self._input_error = error
            self._exhausted = True
        except BaseException:  # Ctrl-C
            self._close(stop=True)
            raise
        else:
            self._exhausted = len(items) < size
        return items

    def finish_reading(self, deadline: float | None) -> None:
        """Read an input of unknown length to its end: the executor is being shut down and finishes what was accepted."""
        if self._buffersize is None and not self._closed:
            self._sized = True
            self._feed()

    # Output

    def __iter__(self) -> Generator[Any]:
        """Hand out the results; a generator, so that each costs little, and that ends the map when it is dropped.

        Raises:
            CallTimeoutError: If the map's timeout has passed; what it had started is stopped.
            Exception: The item's own error; what the map had started is stopped.
        """
        try:
            while values := self._next_group():
                values.reverse()
                while values:
                    yield values.pop()  # what was handed out is not kept
        finally:
            self._close(stop=False)

    def as_list(self) -> list[Any]:
        """Return all results at once. Raises what iterating would raise."""
        results: list[Any] = []
        try:
            while values := self._next_group():
                results += values
        finally:
            self._close(stop=False)
        return results

    def _next_group(self) -> list[Any]:
        """Return the next results; none at the end."""
        self._feed()
        if self._next < self._read:
            return self._take_group()
        if self._input_error is not None:
            raise self._input_error
        if not self._exhausted:
            self._close(stop=True)
            raise self._timed_out()
        return []

    def _take_group(self) -> list[Any]:
        try:
            group = self._job.take(self._next, self._deadline)
            if group is None:
                raise self._timed_out()
            count, outcome = group
            values, error = outcome.decode()
            if error is not None:
                raise error
        except BaseException:
            self._close(stop=True)
            raise
        self._next += count
        return values  # type: ignore[no-any-return]

    def _timed_out(self) -> CallTimeoutError:
        finished = self._job.finished
        return CallTimeoutError(
            f"the map did not finish within {self._seconds:g} seconds; {finished} of "
            f"{self._read if self._exhausted else 'more than ' + str(self._read)} items had finished",
            seconds=self._seconds,
            finished=finished,
        )

    def _close(self, *, stop: bool) -> None:
        """End the map: items that have not started never will; what runs is stopped or may finish."""
        if not self._closed:
            self._closed = True
            self._job.cancel()
            self._backend.cancel_job(self._job, stop=stop)
