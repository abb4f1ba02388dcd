"""One call of a map, read by an event loop: nothing that it does there takes longer than a turn.

Input is read and pickled in small bites, records are made one by one, and between them the loop gets its turn. What
takes longer is loaded in another thread.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from taskpool._loops import LARGE, TURN, Visit, elsewhere
from taskpool._map import MapBackend, MapJob, Settled
from taskpool._outcome import Outcome
from taskpool._results import LARGEST_PIECE, MapResults
from taskpool._task import Failure, Value

FIRST_BITE = 16  # items that are read and pickled together at first
BITE_SECONDS = 2e-3  # how long that should take from then on


class AsyncResults(MapResults):
    """One map that an event loop reads. It begins when its first record is asked for.

    Args:
        backend: Who runs the items.
        job: What to do with each.
        source: The input, asynchronous or not.
        how: Everything else, as in `MapResults`.
    """

    def __init__(
        self, backend: MapBackend, job: MapJob, source: Iterable[Any] | AsyncIterable[Any], **how: Any
    ) -> None:
        self._incoming = Incoming(source) if isinstance(source, AsyncIterable) else None
        self._label: str | None = None  # under which progress is shown
        self._bite = FIRST_BITE
        self._bitten = 0.0  # when the last bite was begun
        super().__init__(backend, job, iter(()) if isinstance(source, AsyncIterable) else source, **how)

    async def aoutcomes(self) -> AsyncGenerator[Outcome[Any, Any]]:
        """Hand out a record for each item. Raises as `outcomes`."""
        visit = Visit(stop=lambda: self.close(stop=True))
        self._job.on_settled = visit.ring
        turned = time.monotonic()
        try:
            if self._label is not None:
                label = self._label
                await elsewhere(lambda: super(AsyncResults, self).show_progress(label))
            if self._incoming is not None:
                self._incoming.start(visit.arrived.set)
            while (settled := await self._arrival(visit)) is not None:
                for record in self._records(await _decoded(settled)):
                    if time.monotonic() - turned > TURN:
                        await asyncio.sleep(0)
                        turned = time.monotonic()
                    yield record
        finally:
            visit.leave()
            self.close(stop=True)
            if self._incoming is not None:
                await self._incoming.close()

    def show_progress(self, label: str) -> None:
        """Show how far the map is from its first record on: in another thread, since the terminal may take its time."""
        self._label = label

    def _end_display(self) -> None:
        if self._display is not None:
            threading.Thread(target=self._display.close, name="taskpool-display-end", daemon=True).start()

    async def _arrival(self, visit: Visit) -> Settled | None:
        """Return the next group; None at the end."""
        self._is_asked = True
        while True:
            visit.arrived.clear()  # before the look: what comes behind it sets it again
            self._backend.check_process()
            until = time.monotonic() + TURN
            self._feed(until)
            settled = self._job.poll(self._due())
            if settled is not None:
                self._taken += settled.items
                return settled
            if self._is_over():
                return None
            if time.monotonic() < until:  # all was read that there is room for
                await self._wait(visit)
            else:
                await asyncio.sleep(0)

    async def _wait(self, visit: Visit) -> None:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        limit = asyncio.timeout(left)
        try:
            async with limit:
                await visit.arrived.wait()
        except TimeoutError:
            if limit.expired():
                raise self._timed_out() from None
            raise

    # Input

    def _is_over(self) -> bool:
        # What has not been read yet is not over: the turn was, or the next item has not come.
        return (self._exhausted or self._is_late()) and super()._is_over()

    def _read_on(self, deadline: float) -> None:
        super()._read_on(deadline)
        if self._incoming is not None:
            self._incoming.allow(self._room(self._window()))

    def _cut(self, size: int) -> Sequence[Any]:
        self._bitten = time.monotonic()
        return super()._cut(min(size, self._bite))

    def _take(self, items: list[Any], size: int) -> bool:
        if self._incoming is not None:
            return self._incoming.take(items, size)
        until = self._bitten + TURN
        for item in islice(self._source, size):
            items.append(item)
            if time.monotonic() > until:  # a slow input
                return True
        return len(items) == size

    def _submit(self, items: Sequence[Any]) -> None:
        super()._submit(items)
        took = time.monotonic() - self._bitten
        if took > BITE_SECONDS:
            self._bite = max(1, len(items) // 2)
        elif len(items) == self._bite:
            self._bite = min(2 * self._bite, LARGEST_PIECE)


async def _decoded(settled: Settled) -> Settled:
    """Return a group whose results can be had without delay."""
    if settled.outcome.size < LARGE:
        return settled
    values, error = await elsewhere(settled.outcome.decode)
    if error is not None and settled.items > 1:
        return settled  # each is decoded by itself
    return settled._replace(outcome=Value(values) if error is None else Failure(error))


class Incoming:
    """An asynchronous input, which one task reads from its first item to its end, as far as there is room.

    One task, since what a generator holds open between its items, a timeout or a cancel scope, belongs to a task.
    """

    def __init__(self, source: AsyncIterable[Any]) -> None:
        self._source = source
        self._items: deque[Any] = deque()
        self._room = 1
        self._has_room = asyncio.Event()
        self._arrived: Callable[[], object] = lambda: None
        self._error: BaseException | None = None
        self._is_read = False  # to its end
        self._reader: asyncio.Task[None] | None = None

    def start(self, arrived: Callable[[], object]) -> None:
        """Begin to read; `arrived` is called for each item, and at the end."""
        self._arrived = arrived
        self._reader = asyncio.get_running_loop().create_task(self._read())

    def allow(self, room: int) -> None:
        """Read ahead so many items of those that were taken."""
        self._room = room
        if len(self._items) < room:
            self._has_room.set()

    def take(self, items: list[Any], size: int) -> bool:
        """Add at most `size` items that have come; return whether there may be more. Raises what the input raised."""
        while self._items and len(items) < size:
            items.append(self._items.popleft())
        if self._items or not self._is_read:
            return True
        if self._error is not None:
            raise self._error
        return False

    async def close(self) -> None:
        """Read no more; return when the reading has ended."""
        if self._reader is None or self._reader.get_loop().is_closed():  # then it is collected, not cancelled
            return
        self._reader.cancel()
        await asyncio.wait([self._reader])

    async def _read(self) -> None:
        try:
            await self._read_on()
        except Exception as error:
            self._error = error
        except asyncio.CancelledError as error:
            self._error = error
            raise
        finally:
            self._is_read = True
            self._arrived()

    async def _read_on(self) -> None:
        try:
            async for item in self._source:
                self._items.append(item)
                self._arrived()
                while len(self._items) >= self._room:
                    self._has_room.clear()
                    await self._has_room.wait()
        except asyncio.CancelledError:
            if inspect.isasyncgen(self._source):
                await self._source.aclose()  # here, in the task that what it holds open belongs to
            raise
