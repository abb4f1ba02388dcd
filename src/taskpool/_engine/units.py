"""What a worker gets at a time, as the parent sees it: one call, or a range of the items of a map."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from taskpool._current import name_of
from taskpool._engine import exceptions, payloads, plain, sharing, wire
from taskpool._engine.memory import Blocks
from taskpool._engine.outcomes import (
    EncodedError,
    EncodedNotSendableError,
    EncodedNumbers,
    EncodedUnreadableError,
    EncodedValue,
    EncodedValues,
)
from taskpool._engine.payloads import Payload
from taskpool._engine.sharing import Handle
from taskpool._engine.wire import Bytes, Frame, Pickled
from taskpool._map import MapJob, Settled
from taskpool._options import TaskOptions
from taskpool._task import Failure, RawOutcome, TaskFuture, Value
from taskpool.errors import NotSendableError

if TYPE_CHECKING:
    from taskpool._retry import Attempts

CHUNK_SECONDS = 10e-3  # how long a range should keep a worker busy,
LEAST_SECONDS = 0.5e-3  # ... and when little is left to share, which is not worth more ways to workers

_ids = itertools.count(1)  # of units: one for each way to a worker

OUTCOMES: dict[int, Callable[[Pickled], RawOutcome]] = {
    wire.VALUES: EncodedValue,
    wire.EACH: EncodedValues,
    wire.NUMBERS: EncodedNumbers,
    wire.RAISED: EncodedError,
    wire.UNSENDABLE: EncodedNotSendableError,
    wire.UNREADABLE: EncodedUnreadableError,
}


def settled_by(frame: Frame, worker: str, attempts: int) -> Settled:
    """Return what an outcome's frame says."""
    outcome = OUTCOMES[frame.kind](frame.body)
    return Settled(frame.item, frame.items, outcome, frame.started, frame.seconds, worker, attempts)


class Call:
    """One call of a function, its own unit of work. Each attempt has an id: a late word of an earlier one means nothing."""

    # Thousands of these may wait, so each has few fields, and none that the garbage collector would have to visit in vain.
    __slots__ = ("_large", "_small", "attempts", "fresh", "future", "id", "keeps", "options")

    tasks = 1

    def __init__(self, future: TaskFuture[Any], payload: Bytes | Payload, options: TaskOptions) -> None:
        self.id = next(_ids)
        self.future = future
        self.options = options
        self._small: Bytes = payload if isinstance(payload, Bytes) else b""  # what fits into a packet
        self._large: Payload | None = None if isinstance(payload, Bytes) else payload
        self.attempts: Attempts | None = None  # once it has failed and may be tried again
        self.fresh = False  # whether it must run on a new worker, alone
        self.keeps: Sequence[Handle] = ()  # on shared values, which must live as long as it waits or runs

    @property
    def name(self) -> str:
        """The task's name."""
        return self.future.task_name

    @property
    def order(self) -> int:
        """Its place among equals."""
        return self.future.order

    @property
    def priority(self) -> int:
        """Higher leaves the queue first."""
        return self.options.priority

    def frame(self) -> list[Bytes]:
        """Return the parts of the frame that brings it to a worker."""
        body = self.pickled()  # once: blocks may fail any moment
        limit = self.options.task_timeout or 0.0
        head = wire.frame_head(
            wire.CALL, self.id, body, index=self.future.order, count=1, seconds=limit, attempt=self.attempt
        )
        return [head, *body.pieces()]

    def pickled(self) -> Pickled:
        """Return what was pickled, as it would be sent."""
        return Pickled(self._small) if self._large is None else self._large.pickled()

    def packet(self) -> bytes:
        """Return the frame of a small one as one piece."""
        if self._large is not None:
            return b"".join(self.frame())
        limit, order = self.options.task_timeout or 0.0, self.future.order
        return wire.packet(wire.CALL, self.id, self._small, index=order, seconds=limit, attempt=self.attempt)

    def is_small(self) -> bool:
        """Whether it may be sent along with others: its frame fits into one packet."""
        return (self._large is None or self._large.is_small) and not self.fresh

    def claim(self) -> bool:
        """Take it off the queue for a worker; False if it was cancelled."""
        return self.future.set_running_or_notify_cancel()

    def is_cancelled(self) -> bool:
        """Whether there is no point in running it."""
        return self.future.done()

    def give_back(self) -> bool:
        """Return to the state of a queued call, since it does not run; False if it has been resolved instead."""
        return self.future.take_back()

    def receive(self, frame: Frame, worker: str) -> bool:
        """Take an outcome; return whether the unit is finished with it."""
        self.future.finish(OUTCOMES[frame.kind](frame.body))
        return True

    def advance(self, frame: Frame) -> bool:
        """Let another decide about an outcome; return whether the unit is finished with it."""
        return True

    def receive_alone(self, frame: Frame) -> bool:
        """Take an outcome in a thread that waits for it, unless somebody else has a say, or must be told of it, too."""
        policy = self.options.retry
        if policy is not None and policy.judges(ok=frame.kind in wire.RESULTS):
            return False
        return self.future.finish_alone(OUTCOMES[frame.kind](frame.body))

    def settle(self, settled: Settled) -> None:
        """Resolve with an outcome."""
        self.add_output(settled)
        self.future.finish(settled.outcome)

    def add_output(self, settled: Settled) -> None:
        """Keep what an attempt has printed."""
        if settled.output:
            self.future.output += settled.output

    def settle_cancelled(self, settled: Settled) -> None:
        """Resolve as cancelled."""
        self.add_output(settled)
        self.future.finish_cancelled()

    def report(self, _item: int, done: float, total: float) -> None:
        """Note how far the task says it is."""
        self.future.progress = done, total

    def begun(self, item: int) -> bool:
        """Whether `item`, the worker's mark, is still without an outcome."""
        return not self.future.done()

    def owns(self, target: object) -> bool:
        """Whether a request to stop `target`, a future or a map, means this unit."""
        return target is self.future

    def bare(self, outcome: RawOutcome) -> RawOutcome:
        """Return an outcome as the task made it."""
        return outcome

    def wrapped(self, outcome: RawOutcome) -> RawOutcome:
        """Return the outcome as it is settled."""
        return outcome

    def id_of(self, _index: int) -> str:
        """Return what tells the task apart."""
        return self.future.task_id

    @property
    def attempt(self) -> int:
        """Which attempt it makes, from 1."""
        return 1 if self.attempts is None else self.attempts.number

    def again(self, _index: int, attempts: Attempts, *, fresh: bool) -> Call:
        """Return what runs in the next attempt."""
        self.id = next(_ids)
        self.attempts = attempts
        self.fresh = fresh
        return self


class Piece:
    """Neighbouring items of a map, pickled together. Ranges of it go to workers until nothing is left to do."""

    keeps: Sequence[Handle] = ()  # on shared values, as a call has them

    def __init__(self, job: MapJob, first: int, items: Sequence[Any], payload: Payload, blocks: Blocks) -> None:
        self.order = next(_ids)
        self.job = job
        self.first = first
        self.payload = payload
        self._blocks = blocks  # where the payload of what must be sent singly goes
        self.items = items  # kept in case that they must be sent singly
        self.todo = [(0, len(items))]
        self.attempts: Attempts | None = None  # of a single item that has failed and is tried again
        self.fresh = False  # whether it must run on a new worker, alone

    @property
    def name(self) -> str:
        """The task's name."""
        return self.job.options.name or name_of(self.job.fn)

    @property
    def attempt(self) -> int:
        """Which attempt its items make, from 1."""
        return 1 if self.attempts is None else self.attempts.number

    @property
    def priority(self) -> int:
        """Higher leaves the queue first."""
        return self.job.options.priority

    def take(self, *, is_last: bool, workers: int, most: int | None) -> Range:
        """Return the next range for a worker.

        Its length is what should take CHUNK_SECONDS by the measured durations, and leaves something for each worker
        when little is left, unless that is next to nothing; a single item as long as nothing has been measured.

        Args:
            is_last: Whether nothing else waits.
            workers: How many workers there may be.
            most: How many items the worker may still run; None is no limit.
        """
        start, stop = self.todo[0]
        if self.job.chunksize is not None:
            size = self.job.chunksize
        elif self.job.seconds is None:
            size = 1
        else:
            size = int(CHUNK_SECONDS / max(self.job.seconds, 1e-8))
            if is_last:
                least = int(LEAST_SECONDS / max(self.job.seconds, 1e-8))
                size = min(size, max(least, -(-self.left() // (2 * workers))))
        if most is not None:
            size = min(size, most)
        end = min(stop, start + max(1, size))
        if end == stop:
            del self.todo[0]
        else:
            self.todo[0] = end, stop
        return Range(self, start, end)

    def is_small(self) -> bool:
        """Whether a range of it may be sent along with others: it fits into one packet."""
        return self.payload.is_small and not self.fresh

    def is_cancelled(self) -> bool:
        """Whether there is no point in running what is left of it."""
        return self.job.cancelled or not self.todo

    def left(self) -> int:
        """How many items have not been given to a worker."""
        return sum(stop - start for start, stop in self.todo)

    def give_back(self, start: int, stop: int) -> None:
        """Put items back that have no outcome and did not count."""
        if start < stop:
            self.todo = sorted([*self.todo, (start, stop)])

    def singly(self, start: int, stop: int) -> list[Piece]:
        """Return these items as pieces of one item each. Pickles them again: user code runs here.

        On the callback thread, so whatever that raises is the item's outcome; there is nobody else to get it.
        """
        pieces = []
        for index in range(start, stop):
            number = self.first + index
            try:
                piece = make_piece(self.job, number, self.items[index : index + 1], self._blocks)
            except BaseException as error:
                failure = Failure(_explain(f"item {number}", self.items[index], error))
                self.job.settle(Settled(number, 1, failure, attempts=0))
            else:
                pieces += [] if piece is None else [piece]
        return pieces


class Range:
    """A range of a piece's items at one worker. Outcomes arrive in order, so `next` tells what is still out."""

    def __init__(self, piece: Piece, start: int, stop: int) -> None:
        self.id = next(_ids)
        self.order = piece.order
        self.piece = piece
        self.next = start
        self.stop = stop
        self.tasks = stop - start
        self.options = piece.job.options
        self.name = piece.name

    @property
    def job(self) -> MapJob:
        """The map."""
        return self.piece.job

    def frame(self) -> list[Bytes]:
        """Return the parts of the frame that brings it to a worker."""
        body = self.piece.payload.pickled()
        head = wire.frame_head(
            wire.RANGE,
            self.id,
            body,
            index=self.next,
            count=self.stop - self.next,
            seconds=self.options.task_timeout or 0.0,
            attempt=self.attempt,
        )
        return [head, *body.pieces()]

    def packet(self) -> bytes:
        """Return the frame as one piece."""
        return b"".join(self.frame())

    def is_small(self) -> bool:
        """Whether the frame fits into one packet."""
        return self.piece.is_small()

    def claim(self) -> bool:
        """Take it off the queue for a worker; False if the map was cancelled."""
        return not self.job.cancelled

    def give_back(self) -> bool:
        """Return what is left to the piece; False if the map was cancelled."""
        self.piece.give_back(self.next, self.stop)
        return not self.job.cancelled

    def receive(self, frame: Frame, worker: str) -> bool:
        """Take the outcome of one or more items; return whether the range is finished with it."""
        self.settle(settled_by(frame, worker, self.attempt))
        return self.advance(frame)

    def advance(self, frame: Frame) -> bool:
        """Let another decide about an outcome; return whether the range is finished with it."""
        self.next = frame.item + frame.items
        return self.next >= self.stop

    def receive_alone(self, _frame: Frame) -> bool:
        """No thread waits for a range at its worker."""
        return False

    def settle(self, settled: Settled) -> None:
        """Give items their outcome."""
        self.job.settle(settled._replace(item=self.piece.first + settled.item))

    def settle_cancelled(self, settled: Settled) -> None:
        """Give an item its outcome; nobody will ask for it if it was the map that was cancelled."""
        self.settle(settled)

    def add_output(self, settled: Settled) -> None:
        """What an attempt of an item has printed is in its outcome."""

    def report(self, item: int, done: float, total: float) -> None:
        """Note how far an item says it is."""
        self.job.report(self.piece.first + item, done, total)

    def begun(self, item: int) -> bool:
        """Whether `item`, the worker's mark, is still without an outcome."""
        return self.next <= item < self.stop

    def owns(self, target: object) -> bool:
        """Whether a request to stop `target`, a future or a map, means this unit."""
        return target is self.job

    def rest(self, failed: int) -> Piece | None:
        """Give back all but the failed item; return the piece if there is something left to do.

        Items before the failed one ran, but their outcomes, of less than a millisecond's work, had not been written.
        """
        self.piece.give_back(self.next, failed)
        self.piece.give_back(failed + 1, self.stop)
        return None if self.job.cancelled or not self.piece.todo else self.piece

    def bare(self, outcome: RawOutcome) -> RawOutcome:
        """Return an item's outcome as the task made it: results of a map come in lists."""
        values, error = outcome.decode()
        return Value(values[0]) if error is None else Failure(error)

    def wrapped(self, outcome: RawOutcome) -> RawOutcome:
        """Return an item's outcome as it is settled."""
        value, error = outcome.decode()
        return Value([value]) if error is None else Failure(error)

    def id_of(self, index: int) -> str:
        """Return what tells an item apart."""
        return f"{self.job.id}:{self.piece.first + index}"

    @property
    def attempts(self) -> Attempts | None:
        """What is known of earlier attempts, of its only item."""
        return self.piece.attempts

    @property
    def attempt(self) -> int:
        """Which attempt it makes, from 1."""
        return self.piece.attempt

    def again(self, index: int, attempts: Attempts, *, fresh: bool) -> Piece | None:
        """Return what runs in the next attempt of an item; None if there is no point. Pickles it: user code runs."""
        pieces = [] if self.job.cancelled else self.piece.singly(index, index + 1)
        for piece in pieces:
            piece.order = self.order
            piece.attempts = attempts
            piece.fresh = fresh
        return pieces[0] if pieces else None


Unit = Call | Range
Source = Call | Piece


class _Dumped(NamedTuple):
    pickled: Pickled
    handles: Sequence[Handle]  # on shared values in it


def _dump(*parts: Any) -> _Dumped:
    """Pickle a function with what belongs to a call of it."""
    if not sharing.is_used:
        pickled = wire.dumps_call(*parts)
        if not sharing.is_used:
            return _Dumped(pickled, ())
        # Its pickling was the first to share a value in this process: once more, to keep the handle.
    with sharing.carried as handles:
        return _Dumped(wire.dumps_call(*parts), handles)


def make_call(
    future: TaskFuture[Any], fn: Any, args: Any, kwargs: Any, options: TaskOptions, *, blocks: Blocks
) -> Call | None:
    """Pickle a call; if that fails resolve the future with the reason and return None. User code runs here."""
    try:
        stream = plain.dumps_call(fn, args, kwargs, options.name)
        if stream is not None:
            return Call(future, stream, options)
        pickled, handles = _dump(fn, args, kwargs, options.name)
    except Exception as cause:
        # What cannot be pickled is looked for by pickling each part again.
        parts = [("the function", fn), *((f"argument {number}", value) for number, value in enumerate(args, 1))]
        parts += [(f"argument {name!r}", value) for name, value in kwargs.items()]
        future.finish(Failure(_not_sendable(parts, cause)))
        return None
    call = Call(future, pickled.stream if payloads.is_small(pickled) else payloads.keep(pickled, blocks), options)
    if handles:
        call.keeps = handles
    return call


def make_piece(job: MapJob, first: int, items: Sequence[Any], blocks: Blocks) -> Piece | None:
    """Pickle items of a map; a single one that fails gets its reason as its outcome, and None is returned."""
    dumped = _dump_items(job, first, items)
    return None if dumped is None else _keep_piece(job, first, items, dumped, blocks)


def _dump_items(job: MapJob, first: int, items: Sequence[Any]) -> _Dumped | None:
    try:
        return _dump(job.fn, items, job.star, job.options.name, job.id, first)
    except Exception as cause:
        if len(items) > 1:
            raise
        error = _not_sendable([("the function", job.fn), (f"item {first}", items[0])], cause)
        job.settle(Settled(first, 1, Failure(error), attempts=0))
        return None


def _keep_piece(job: MapJob, first: int, items: Sequence[Any], dumped: _Dumped, blocks: Blocks) -> Piece:
    piece = Piece(job, first, items, payloads.keep(dumped.pickled, blocks), blocks)
    piece.keeps = dumped.handles
    return piece


def make_pieces(job: MapJob, first: int, items: Sequence[Any], blocks: Blocks) -> list[Piece]:
    """Pickle items of a map: together, or in halves where they are too large together or one of them fails."""
    try:
        dumped = _dump_items(job, first, items)
    except Exception:
        dumped = None
    if dumped is not None and (len(items) == 1 or dumped.pickled.size <= LARGEST_PAYLOAD):
        return [_keep_piece(job, first, items, dumped, blocks)]
    if len(items) == 1:
        return []
    half = len(items) // 2
    return make_pieces(job, first, items[:half], blocks) + make_pieces(job, first + half, items[half:], blocks)


LARGEST_PAYLOAD = 256 * 1024  # of a piece of several items, in bytes


def _not_sendable(parts: list[tuple[str, object]], cause: Exception) -> NotSendableError:
    """Return the error that names the part that cannot be pickled; raise the cause if there is none."""
    for part, value in parts:
        try:
            wire.dumps_for_worker(value)
        except Exception as error:
            return _explain(part, value, error)
    try:
        wire.dumps_for_worker([value for _part, value in parts])
    except Exception as error:
        return _explain("the task", None, error)
    raise cause  # it can be pickled: it was a signal handler of the program that raised


def _explain(part: str, value: object, cause: BaseException) -> NotSendableError:
    kind = "" if value is None else f" (of type {type(value).__qualname__})"
    text = f"{part}{kind} cannot be pickled: {exceptions.type_name(cause)}: {exceptions.safe_str(cause)}"
    error = NotSendableError(text)
    error.__cause__ = cause
    return error
