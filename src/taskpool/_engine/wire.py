"""What crosses between parent and worker: pickles and frames. The only file that pickles.

A pickle is a `Pickled`: the pickle stream and its large buffers beside it (pickle protocol 5, PEP 574), so that an
array is never copied into a stream. A frame is a header, the sizes of its parts, and the parts:

    header (FRAME) | size of each part, 8 bytes each | part 0: pickle stream | part 1 ... n: buffers
    header (FRAME) | two sizes                       | part 0: pickle stream | part 1: places in shared memory

In the second form the buffers lie where the places say; the stream itself does so if part 0 is empty (`memory.py`).

Each frame carries the id of its unit of work; what belongs to an id that is no longer wanted is dropped.
"""

from __future__ import annotations

import copyreg
import pickle
import struct
import sys
from collections.abc import Callable, Sequence
from pickle import PickleBuffer
from typing import Any, NamedTuple

from taskpool._engine import functions, memory
from taskpool._engine.plain import PLAIN

Bytes = bytes | bytearray | memoryview

OUT_OF_BAND = 64 * 1024  # buffers of this size travel beside the pickle; smaller ones are cheaper inside it
LARGE = 256 * 1024  # `bytes` of this size are not copied into the stream, nor searched
SHORT = 16  # items of a container that are looked at one by one
MAIN = b"_main__"  # the end of `__main__` and of `__mp_main__`, as multiprocessing calls it
MAX_PART = 1 << 42  # no real part is larger; a header that says so is garbage

# kind, whether part 1 holds places, number of parts, attempt, unit id, item index, item count, start (monotonic), seconds
FRAME = struct.Struct("<BBHIQQQdd")
SIZE = struct.Struct("<Q")
ONE_PART = struct.Struct(FRAME.format + "Q")  # the header of a frame with one part, as most are, and that part's size

# Parent to worker.
SETUP, CALL, RANGE, SENTINEL, FORGET = range(1, 6)
# Worker to parent.
HELLO, READY, NOT_READY, GOODBYE, LOG, REPORT, HALTED, INTERRUPTED = range(16, 24)  # life, and words beside the task
# outcomes; EACH has a pickle for each of its values, NUMBERS are not pickled
VALUES, EACH, RAISED, UNSENDABLE, UNREADABLE, NUMBERS = range(24, 30)
BEGUN = 31  # a task, where somebody listens
UNOPENED = 30  # nothing has run: the shared memory in which the task lies cannot be opened there
RESULTS = frozenset({VALUES, EACH, NUMBERS})
_FLAT = frozenset({bytes, bytearray, str})
PARENT_TO_WORKER = frozenset(range(SETUP, FORGET + 1))
WORKER_TO_PARENT = frozenset(range(HELLO, BEGUN + 1))


class Pickled(NamedTuple):
    """A pickled object.

    Attributes:
        stream: The pickle stream, or its beginning.
        buffers: The large buffers that travel beside it.
        rest: What follows of the stream, if there are large `bytes` in it: they are sent from where they lie.
        places: Where the buffers lie in shared memory, and the stream if that is empty here; they are not here then.
    """

    stream: Bytes
    buffers: Sequence[Bytes] = ()
    rest: Sequence[Bytes] = ()
    places: Bytes = b""

    @property
    def size(self) -> int:
        """The number of bytes in all."""
        return self.length + sum(map(len, self.buffers))

    @property
    def length(self) -> int:
        """The number of bytes of the whole stream."""
        return len(self.stream) + sum(map(len, self.rest)) if self.rest else len(self.stream)

    def pieces(self) -> list[Bytes]:
        """Return what is to be written, in order."""
        return [self.stream, self.places] if self.places else [self.stream, *self.rest, *self.buffers]

    def parts(self) -> list[Sequence[Bytes]]:
        """Return the stream and each buffer, each as its pieces."""
        return [[self.stream, *self.rest], *([buffer] for buffer in self.buffers)]

    def joined(self) -> Bytes:
        """Return the whole stream."""
        return b"".join([self.stream, *self.rest]) if self.rest else self.stream


class Frame(NamedTuple):
    """One frame as it was read."""

    kind: int
    attempt: int
    unit: int
    item: int  # the first one that it is about
    items: int  # how many
    started: float
    seconds: float
    body: Pickled


class BadFrameError(Exception):
    """What arrived is not a frame: its sender is broken and must be replaced."""


def dumps(value: object) -> Pickled:
    """Pickle what goes to the parent: by reference where that works there, by value where it does not.

    Functions and classes of `__main__` pickle by reference without complaint, but the parent's `__main__` is another
    one. So a stream that names it is made again, by cloudpickle.

    Raises:
        Exception: Whatever pickling raised; user code runs here.
    """
    try:
        pickled = _dump_beside(value) if _has_large(value) else _dump(value)
    except Exception:
        # Lambdas, closures, classes made in functions. If cloudpickle fails as well its error is the more telling one.
        return _dump_home(value)
    return _dump_home(value) if _mentions_of_main(pickled) else pickled


def dumps_for_worker(value: object, *, has_large: bool = False) -> Pickled:
    """Pickle what goes to a worker, where no `__main__` is but what is sent.

    Args:
        value: What is sent.
        has_large: Whether there are large `bytes` in it.

    Raises:
        Exception: Whatever pickling raised; user code runs here.
    """
    try:
        pickled = _dump_beside(value) if has_large else _dump(value)
    except Exception:
        return _dump(functions.Parcel(value))
    return _dump(functions.Parcel(value)) if _mentions_of_main(pickled) else pickled


def are_plain(values: list[Any]) -> bool:
    """Whether pickling all these and loading them again runs no user code, so that none can harm its neighbours."""
    return PLAIN.issuperset(map(type, values)) or all(map(_is_plain, values))


def _is_plain(value: Any) -> bool:
    # Only shallow and short ones are looked into: for others pickling each by itself costs less than the look.
    kind = type(value)
    if kind is dict:
        return (
            len(value) <= SHORT and PLAIN.issuperset(map(type, value)) and PLAIN.issuperset(map(type, value.values()))
        )
    return kind in PLAIN or (kind in (tuple, list) and len(value) <= SHORT and PLAIN.issuperset(map(type, value)))


def dumps_call(fn: object, *rest: object) -> Pickled:
    """Pickle a function with what belongs to a call of it; one of `__main__` is pickled by value only once.

    Raises:
        Exception: Whatever pickling raised; user code runs here.
    """
    kept = functions.by_value(fn)
    has_large = _has_large(rest[0])
    if kept is None:
        return dumps_for_worker((fn, *rest), has_large=has_large)
    try:
        pickled = (_dump_beside if has_large else _dump)((kept, *rest))
    except Exception:
        return _dump(functions.Parcel((fn, *rest)))
    stands_apart = bool(pickled.rest) and len(kept.data) >= LARGE  # and then is not searched
    if _mentions_of_main(pickled) > (0 if stands_apart else kept.mentions):  # the arguments name it, too
        return _dump(functions.Parcel((fn, *rest)))
    return pickled


def loads(pickled: Pickled) -> Any:
    """Return the object; user code runs here and may raise anything.

    Raises:
        BlockError: If it lies in shared memory that cannot be opened here.
    """
    if not pickled.places:
        return pickle.loads(pickled.joined(), buffers=pickled.buffers)
    parts = memory.mappings.open(pickled.places)
    stream = pickled.stream or parts.pop(0)
    return pickle.loads(stream, buffers=parts)


def loads_shared(pickled: Pickled) -> Any:
    """Return a shared object, whose buffers are read-only; user code runs here and may raise anything.

    Raises:
        BlockError: If it lies in shared memory that cannot be opened here.
    """
    if not pickled.places:
        return pickle.loads(pickled.stream, buffers=pickled.buffers)
    stream, *buffers = memory.open_parts(pickled.places)[1]
    return pickle.loads(stream, buffers=buffers)


class LoadingError(Exception):
    """An object cannot be loaded; the cause says why, which may be something that is not an Exception."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(type(cause)))
        self.cause = cause


def loads_here(pickled: Pickled) -> Any:
    """Return the object, in a thread of the caller's: a signal handler of the program may raise here, too.

    To tell the two apart what fails is tried again. If it succeeds now, what was raised came from a handler, and goes
    its way: a `SystemExit` of a handler for SIGTERM must end the program, one of an object must not.

    Raises:
        LoadingError: If the object cannot be loaded.
        BaseException: Whatever a signal handler raised.
    """
    try:
        return loads(pickled)
    except BaseException as error:
        try:
            loads(pickled)
        except BaseException:
            raise LoadingError(error) from error
        raise


def _dump_home(value: object) -> Pickled:
    packed = functions.home(value)
    return Pickled(packed.stream, [buffer.raw() for buffer in packed.buffers])


def _mentions_of_main(pickled: Pickled) -> int:
    """Count where the stream may name `__main__`: everywhere but in large bytes by themselves."""
    if not pickled.rest:
        return bytes(pickled.stream).count(MAIN)
    parts = [pickled.stream, *(part for part in pickled.rest if len(part) < LARGE)]
    return sum(bytes(part).count(MAIN) for part in parts)


def _has_large(value: Any) -> bool:
    """Whether there are large `bytes` in it, as far as a short look tells."""
    if type(value) in _FLAT:
        return len(value) >= LARGE
    return (
        type(value) in (tuple, list)
        and len(value) <= SHORT
        and any(type(item) in _FLAT and len(item) >= LARGE for item in value)
    )


def _dump(value: object) -> Pickled:
    try:
        stream = pickle.dumps(value, 5, buffer_callback=_refuse_large)
    except _LargeBuffer:
        return _dump_beside(value)
    except Exception:
        return _dump_beside(value)  # perhaps something that only multiprocessing's reducers can pickle
    for module in _modules_with_reducers():
        if module in stream:
            return _dump_beside(value)
    return Pickled(stream)


def _dump_beside(value: object) -> Pickled:
    buffers: list[PickleBuffer] = []
    file = _Parts()
    pickler = pickle.Pickler(file, 5, buffer_callback=collector(buffers))
    pickler.dispatch_table = _reducers()
    pickler.dump(value)
    first, *rest = file.joined()
    return Pickled(first, [buffer.raw() for buffer in buffers], rest)


class _Parts:
    """A file that keeps what a pickler writes. Large `bytes` come as they are, by themselves, and are not copied."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: Any) -> None:
        self._parts.append(data if type(data) is bytes else bytes(data))

    def joined(self) -> list[bytes]:
        """Return the parts, small neighbours together: what is LARGE is one write, of somebody's bytes and no names."""
        found: list[bytes] = []
        small: list[bytes] = []
        size = 0
        for part in self._parts:
            if small and size + len(part) >= LARGE:
                found.append(b"".join(small))
                small, size = [], 0
            if len(part) >= LARGE:
                found.append(part)
            else:
                small.append(part)
                size += len(part)
        return [*found, b"".join(small)] if small else found


class _LargeBuffer(BaseException):
    """Raised by the quick attempt, which makes no closure and no list, when an object has a large buffer after all."""


def _is_large(buffer: PickleBuffer) -> bool:
    try:
        return buffer.raw().nbytes >= OUT_OF_BAND
    except BufferError:  # not contiguous: it cannot be sent as it lies, pickle copies it
        return False


def _refuse_large(buffer: PickleBuffer) -> bool:
    if _is_large(buffer):
        raise _LargeBuffer
    return True  # inside the stream


def collector(buffers: list[PickleBuffer]) -> Callable[[PickleBuffer], bool]:
    """Return what a pickler asks about each buffer: the large ones are collected, to travel beside the pickle."""

    def inside(buffer: PickleBuffer) -> bool:
        if _is_large(buffer):
            buffers.append(buffer)
            return False
        return True

    return inside


def extra_reducers() -> dict[Any, Any]:
    """Return the reducers that multiprocessing knows (connections, sockets, tensors), if anybody loaded them.

    Without them a `Connection` would pickle as its bare descriptor number, which means another file in the worker.
    """
    reduction = sys.modules.get("multiprocessing.reduction")
    return {} if reduction is None else reduction.ForkingPickler._extra_reducers


def _reducers() -> dict[Any, Any]:
    """Return all reducers as one plain dict: a ChainMap would cost a Python call for each object that is pickled."""
    return {**copyreg.dispatch_table, **extra_reducers()}


def _modules_with_reducers() -> tuple[bytes, ...]:
    """Return the names of modules whose objects need multiprocessing's reducers, as they stand in a stream.

    The quick attempt goes without them, since a pickler with a table of its own takes twice as long to make.
    """
    global _modules, _modules_from
    extra = extra_reducers()
    if len(extra) != _modules_from:
        names = {cls.__module__ for cls in extra} - {"builtins", "functools"}
        _modules, _modules_from = tuple(name.encode() for name in sorted(names)), len(extra)
    return _modules


_modules: tuple[bytes, ...] = ()
_modules_from = -1


def frozen(pickled: Pickled) -> Pickled:
    """Return the pickle with its buffers copied, so that it no longer changes with the objects it was made from."""
    return pickled._replace(buffers=[bytes(buffer) for buffer in pickled.buffers]) if pickled.buffers else pickled


def frame_head(
    kind: int,
    unit: int = 0,
    body: Pickled | None = None,
    *,
    index: int = 0,
    count: int = 0,
    started: float = 0.0,
    seconds: float = 0.0,
    attempt: int = 1,
) -> bytes:
    """Return header and sizes of a frame whose parts are those of `body`."""
    if body is None:
        return FRAME.pack(kind, 0, 0, attempt, unit, index, count, started, seconds)
    if not (body.buffers or body.places):
        return ONE_PART.pack(kind, 0, 1, attempt, unit, index, count, started, seconds, body.length)
    sizes = [body.length, *map(len, (body.places,) if body.places else body.buffers)]
    head = FRAME.pack(kind, 1 if body.places else 0, len(sizes), attempt, unit, index, count, started, seconds)
    return head + struct.pack(f"<{len(sizes)}Q", *sizes)


def packet(kind: int, unit: int, stream: Bytes, *, index: int, seconds: float, attempt: int) -> bytes:
    """Return a small frame of one task, as one piece."""
    return ONE_PART.pack(kind, 0, 1, attempt, unit, index, 1, 0.0, seconds, len(stream)) + stream


def log_frame(unit: int, item: int, record: bytes) -> bytes:
    """Return the frame of a log record, as one piece."""
    return ONE_PART.pack(LOG, 0, 1, 0, unit, item, 0, 0.0, 0.0, len(record)) + record


def unit_of(frame: bytes) -> int:
    """Return the id of the unit that a whole frame is about."""
    return FRAME.unpack_from(frame)[4]  # type: ignore[no-any-return]


def parse_head(
    data: Bytes, kinds: frozenset[int], position: int = 0
) -> tuple[tuple[Any, ...], tuple[int, ...], int] | None:
    """Return (header fields, sizes of the parts, where the parts begin), or None if `data` is too short for that.

    Raises:
        BadFrameError: If what stands at `position` is not the beginning of a frame of one of these `kinds`.
    """
    begin = position + FRAME.size
    if len(data) < begin:
        return None
    fields = FRAME.unpack_from(data, position)
    if fields[0] not in kinds:
        raise BadFrameError(f"unknown frame kind {fields[0]}")
    parts = fields[2]
    end = begin + SIZE.size * parts
    if len(data) < end:
        return None
    sizes = SIZE.unpack_from(data, begin) if parts == 1 else struct.unpack_from(f"<{parts}Q", data, begin)
    if sizes and max(sizes) > MAX_PART:
        raise BadFrameError(f"a part of {max(sizes)} bytes")
    return fields, sizes, end


def make_frame(fields: tuple[Any, ...], sizes: tuple[int, ...], parts: Bytes) -> Frame:
    """Return the frame whose parts lie in `parts`, one behind the other; nothing is copied."""
    kind, has_places, _, attempt, unit, index, count, started, seconds = fields
    body = _cut(sizes, parts)
    if has_places:
        body = Pickled(body.stream, places=body.buffers[0])
    return Frame(kind, attempt, unit, index, count, started, seconds, body)


def parse_frame(data: bytes, kinds: frozenset[int], position: int = 0) -> tuple[Frame, int] | None:
    """Return the frame at `position`, with copies of its parts, and where it ends; None if it is not whole.

    Raises:
        BadFrameError: As `parse_head` does.
    """
    begin = position + ONE_PART.size
    if len(data) >= begin:
        kind, _, parts, attempt, unit, index, count, started, seconds, size = ONE_PART.unpack_from(data, position)
        end = begin + size
        if parts == 1 and end <= len(data) and kind in kinds:
            return Frame(kind, attempt, unit, index, count, started, seconds, Pickled(data[begin:end])), end
    head = parse_head(data, kinds, position)
    if head is None:
        return None
    fields, sizes, begin = head
    end = begin + sum(sizes)
    return None if end > len(data) else (make_frame(fields, sizes, data[begin:end]), end)


def _cut(sizes: tuple[int, ...], parts: Bytes) -> Pickled:
    if len(sizes) <= 1:
        return Pickled(parts)
    cuts: list[memoryview] = []
    parts = memoryview(parts)
    position = 0
    for size in sizes:
        cuts.append(parts[position : position + size])
        position += size
    return Pickled(cuts[0], cuts[1:])


class FrameReader:
    """Cuts a stream of bytes into frames; for the parent, which never blocks on a half-written one."""

    def __init__(self) -> None:
        self._pending = b""
        self._large: bytearray | None = None  # the parts of a frame that came in pieces
        self._filled = 0
        self._head: tuple[tuple[Any, ...], tuple[int, ...]] = ((), ())

    def is_empty(self) -> bool:
        """Whether the next byte begins a frame."""
        return not self._pending and self._large is None

    def room(self) -> memoryview | None:
        """Return where the next bytes of a large frame go, to be read into directly; None between large frames."""
        return None if self._large is None else memoryview(self._large)[self._filled :]

    def filled(self, size: int) -> Frame | None:
        """Count `size` bytes that were read into `room()`; return the frame once it is complete."""
        assert self._large is not None
        self._filled += size
        if self._filled < len(self._large):
            return None
        frame = make_frame(*self._head, memoryview(self._large))
        self._large = None
        return frame

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that are complete with `data`.

        Raises:
            BadFrameError: If what arrived is not a frame.
            MemoryError: If there is no room for a large frame.
        """
        if self._pending:
            data = self._pending + data
            self._pending = b""
        frames: list[Frame] = []
        position = 0
        while (found := parse_frame(data, WORKER_TO_PARENT, position)) is not None:
            frame, position = found
            frames.append(frame)
        if not self._begin_large(data, position):
            self._pending = data[position:]
        return frames

    def _begin_large(self, data: bytes, position: int) -> bool:
        """Make room for a large frame that begins at `position`, if there is one."""
        head = parse_head(data, WORKER_TO_PARENT, position)
        if head is None or sum(head[1]) <= OUT_OF_BAND:
            return False
        fields, sizes, begin = head
        start = memoryview(data)[begin:]
        self._large = bytearray(sum(sizes))
        self._large[: len(start)] = start
        self._filled = len(start)
        self._head = (fields, sizes)
        return True
