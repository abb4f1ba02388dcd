"""One call of a map, on the caller's side: its input is read ahead by a bound, its results are kept until asked for.

The input is cut into pieces, which the backend takes in the caller's thread. What comes back is handed out as results
or as `Outcome` records, in the order of the input or as it comes.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import CancelledError
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any, NoReturn

from taskpool._map import MapBackend, MapJob, Settled
from taskpool._repr import short_repr
from taskpool.errors import CallTimeoutError

if TYPE_CHECKING:
    from taskpool._outcome import Outcome
    from taskpool.progress import Display

READ_AHEAD = 4  # items per worker that are read ahead of the results
AHEAD_SECONDS = 20e-3  # ... or as many quick ones as keep it busy for so long,
MOST_AHEAD = 1 << 14  # ... but no more than so many,
AHEAD_BYTES = 16 << 20  # ... and no more than take so much memory
LARGEST_PIECE = 1 << 16  # items that are pickled together


class Values(chain[Any]):
    """The results of a map, one after the other."""

    results: MapResults
    groups: Generator[Iterator[Any]]

    def close(self) -> None:
        """End the map: items that have not started never will. Whoever waits for a result gets a CancelledError."""
        self.results.close(stop=False)
        with contextlib.suppress(ValueError):  # another thread waits there, and ends it
            self.groups.close()
            deque(self, maxlen=0)  # what has come of the current group

    def __reduce__(self) -> NoReturn:
        raise TypeError("the results of a map cannot be copied or pickled: put them into a list")


class _Groups:
    """Asks a generator for the next group. Whoever asks while it runs, in another thread, gets its error himself.

    `chain` forgets its source when that raises, and would end for everybody; not so when a group raises.
    """

    def __init__(self, made: Generator[Iterator[Any]]) -> None:
        self._made: Any = made

    def __iter__(self) -> Iterator[Iterator[Any]]:
        return self

    def __next__(self) -> Iterator[Any]:
        try:
            return next(self._made)
        except ValueError as error:
            if self._made.gi_frame is None:  # it has ended: the error is the map's
                raise
            return map(_reraise, (error,))


def _reraise(error: Exception) -> NoReturn:
    raise error


class MapResults:
    """One map: reads its input ahead, and hands out what becomes of it.

    Args:
        backend: Who runs the items.
        job: What to do with each.
        source: The input; read in the thread that asks for results, and in the call that made this.
        timeout: Seconds from now until the last result must be there; None is no limit.
        buffersize: How many items may be read ahead of the results; None decides by how quick and how large they are,
            or takes all at once if the map is eager.
        eager: Whether everything is submitted at once where the input's length is known.
        ordered: Whether results come in the order of the input.
        keeps_items: Whether the items are kept until their outcomes are handed out.
    """

    def __init__(
        self,
        backend: MapBackend,
        job: MapJob,
        source: Iterable[Any],
        *,
        timeout: float | None,
        buffersize: int | None,
        eager: bool = False,
        ordered: bool = True,
        keeps_items: bool = False,
    ) -> None:
        self._backend = backend
        self._job = job
        self._display: Display | None = None
        self._seconds = timeout
        self._deadline = job.deadline = None if timeout is None else time.monotonic() + timeout
        self._buffersize = buffersize
        self._ordered = ordered
        # Sliced instead of iterated; a subclass may iterate in a way of its own.
        self._sequence: Sequence[Any] | None = source if type(source) in (range, list, tuple) else None  # type: ignore[assignment]
        self._source = iter(source)
        job.total = len(source) if isinstance(source, Sized) else None
        self._eager = eager
        self._all_at_once = eager and job.total is not None
        self._items: dict[int, tuple[Any, float]] | None = {} if keeps_items else None  # (item, when it was read)
        if keeps_items:
            from taskpool._outcome import Outcome

            self._outcome = Outcome
        self._read = 0  # items taken from the input
        self._taken = 0  # items whose outcomes were handed out; in order, the item that is due
        self._split: deque[Settled] = deque()  # items of a group that could not be handed out together
        self._input_error: BaseException | None = None
        self._exhausted = job.total == 0
        self._is_asked = False  # whether anybody has asked for a result
        self._reading = threading.RLock()  # an input is read by one thread at a time
        self._is_reading = False
        self._closed = False
        self._wall = time.time() - time.monotonic()

    def start(self) -> None:
        """Read ahead for the first time: a map begins when it is called, not when its results are asked for."""
        self._feed()

    # Input

    def _window(self) -> int | None:
        """How many items may be read ahead; None is all."""
        if self._buffersize is not None:
            return self._buffersize
        if self._all_at_once:
            return None
        each, job = READ_AHEAD, self._job
        if job.seconds:
            each = max(each, min(MOST_AHEAD, int(AHEAD_SECONDS / job.seconds)))
        if job.item_bytes:
            each = max(READ_AHEAD, min(each, int(AHEAD_BYTES / job.item_bytes)))
        return self._backend.workers * each

    def _feed(self, deadline: float = math.inf) -> None:
        """Read ahead as far as the window allows."""
        with self._reading:
            if self._is_reading:
                return  # a signal handler, or the input itself, came back here while the input is being read
            self._is_reading = True
            try:
                self._read_on(deadline)
            finally:
                self._is_reading = False

    def _read_on(self, deadline: float) -> None:
        window = self._window()
        size = 1
        while not self._exhausted and not self._is_late() and time.monotonic() < deadline:
            room = self._room(window)
            # Beside a full window one item at a time would be a piece each: wait until some have been consumed.
            if room <= 0 or (window is not None and room < window // 2 and self._read > self._taken):
                return
            if window is None:
                size = min(max(size * 2, self._job.chunksize or 1), LARGEST_PIECE)
            else:
                size = self._job.chunksize or max(1, room // (2 * self._backend.workers))
            items = self._cut(min(size, room))
            if self._exhausted and self._job.total is None:
                self._job.total = self._read + len(items)
            if not items:
                return
            self._submit(items)

    def _room(self, window: int | None) -> int:
        return LARGEST_PIECE if window is None else window - (self._read - self._taken)

    def _submit(self, items: Sequence[Any]) -> None:
        if self._items is not None:
            queued = time.monotonic()
            self._items.update((index, (item, queued)) for index, item in enumerate(items, self._read))
        self._backend.submit_items(self._job, self._read, items)
        self._read += len(items)

    def _is_late(self) -> bool:
        """Whether the call's time is over: what has not been read by then could not be done in time."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _cut(self, size: int) -> Sequence[Any]:
        if self._sequence is not None:
            part = self._sequence[self._read : self._read + size]
            self._exhausted = self._read + len(part) >= len(self._sequence)
            return part
        items: list[Any] = []  # keeps what came before an error
        try:
            self._exhausted = not self._take(items, size)
        except Exception as error:
            self._input_error = error
            self._exhausted = True
        except BaseException:  # Ctrl-C
            self.close(stop=True)
            raise
        return items

    def _take(self, items: list[Any], size: int) -> bool:
        """Add at most `size` items of the input; return whether there may be more."""
        items.extend(islice(self._source, size))
        return len(items) == size

    def finish_reading(self, deadline: float) -> None:
        """Read an input of unknown length to its end: the executor is being shut down and finishes what was accepted.

        So a map whose results are asked for after the shutdown has them all, as with the standard library. One that is
        being iterated is left to whoever iterates: its input may be endless.
        """
        if self._eager and not self._is_asked and self._buffersize is None and not self._closed:
            self._all_at_once = True
            self._feed(deadline)

    # Output

    def values(self) -> Values:
        """Hand out the results, in C code, so that each costs little; that it is dropped ends the map.

        Raises:
            CallTimeoutError: If the map's timeout has passed; what it had started is stopped.
            Exception: The item's own error; what the map had started is stopped.
        """
        groups = self._groups()
        values: Values = Values.from_iterable(_Groups(groups))  # type: ignore[assignment]  # it is of this class
        values.results, values.groups = self, groups
        return values

    def _groups(self) -> Generator[Iterator[Any]]:
        try:
            while values := self._next_values():
                values.reverse()
                yield map(list.pop, repeat(values, len(values)))  # what was handed out is not kept
        finally:
            self.close(stop=False)

    def as_list(self) -> list[Any]:
        """Return all results at once. Raises what `values` would raise."""
        results: list[Any] = []
        try:
            while values := self._next_values():
                results += values
        finally:
            self.close(stop=False)
        return results

    def outcomes(self) -> Generator[Outcome[Any, Any]]:
        """Hand out a record for each item.

        Raises:
            CallTimeoutError: If the map's timeout has passed; what it had started is stopped.
        """
        try:
            while (settled := self._next_settled()) is not None:
                yield from self._records(settled)
        finally:
            self.close(stop=False)

    def _next_settled(self) -> Settled | None:
        """Return the next group; None at the end."""
        try:
            if self._is_finished():
                return None
            with self._backend.waiting(self._job):
                settled = self._job.take(self._due(), self._deadline)
            if settled is None:
                raise CancelledError if self._job.cancelled else self._timed_out()
        except BaseException:
            self.close(stop=True)
            raise
        self._taken += settled.items
        return settled

    def _due(self) -> int | None:
        return self._taken if self._ordered else None

    def _is_finished(self) -> bool:
        """Read ahead, and tell whether all that was read has been handed out.

        Raises:
            CallTimeoutError: If there is more to read, and no time.
            ForkedExecutorError: In a process that was forked from the map's.
            Exception: What the input raised.
        """
        self._backend.check_process()
        self._is_asked = True
        self._feed()
        return self._is_over()

    def _is_over(self) -> bool:
        if self._taken < self._read:
            return False
        if self._input_error is not None:
            raise self._input_error
        if not self._exhausted:
            raise self._timed_out()
        return True

    def _next_values(self) -> list[Any]:
        """Return the next results; none at the end."""
        while True:
            settled = self._split.popleft() if self._split else self._next_settled()
            if settled is None:
                return []
            values, error = settled.outcome.decode()
            if error is None:
                return values  # type: ignore[no-any-return]
            if settled.items == 1:
                self._blame(settled.item, error)
                self.close(stop=True)
                raise error
            self._split.extend(settled.singly())

    def _blame(self, index: int, error: BaseException) -> None:
        """Have the error say which item it is of."""
        item = "" if self._sequence is None else f" ({short_repr(self._sequence[index])})"
        error.add_note(
            f"raised by item {index}{item} of a map, of which {self._job.finished - self._job.failed} items had "
            "results; `outcomes` keeps them, and has a record for each failure"
        )

    def _records(self, settled: Settled) -> Iterator[Outcome[Any, Any]]:
        values, error = settled.outcome.decode()
        if error is not None and settled.items > 1:
            for one in settled.singly():
                yield from self._records(one)
            return
        each = settled.seconds / settled.items
        for offset, value in enumerate(values if error is None else (None,)):
            yield self._record(settled, offset, each, value, error)

    def _record(
        self, settled: Settled, offset: int, each: float, value: Any, error: BaseException | None
    ) -> Outcome[Any, Any]:
        assert self._items is not None
        index = settled.item + offset
        item, queued = self._items.pop(index)
        started = settled.started + offset * each
        ended = started + each if settled.started else time.monotonic()
        return self._outcome(
            index=index,
            item=item,
            error=error,
            attempts=settled.attempts,
            seconds=each,
            worker=settled.worker,
            queued=self._wall + queued,
            started=self._wall + started if settled.started else None,
            finished=self._wall + ended,
            value=value,
            output=settled.output,
        )

    def _timed_out(self) -> CallTimeoutError:
        finished = self._job.finished
        return CallTimeoutError(
            f"the map did not finish within {self._seconds:g} seconds; {finished} of "
            f"{self._read if self._exhausted else 'more than ' + str(self._read)} items had finished",
            seconds=self._seconds,
            finished=finished,
        )

    # The end

    def show_progress(self, label: str) -> None:
        """Show how far the map is, until it ends, however it ends."""
        from taskpool import progress

        self._display = progress.show(self._job, label)
        if self._closed:  # it was ended from elsewhere meanwhile
            self._display.close()

    def close(self, *, stop: bool) -> None:
        """End the map: items that have not started never will; what runs is stopped or may finish."""
        if not self._closed and self._backend.is_here():
            self._closed = True
            self._job.cancel()
            self._backend.cancel_job(self._job, stop=stop)
            self._end_display()

    def _end_display(self) -> None:
        if self._display is not None:
            self._display.close()

    def __del__(self) -> None:
        """End the display, if nobody ever asked for a result; items that were accepted run on."""
        self._end_display()
