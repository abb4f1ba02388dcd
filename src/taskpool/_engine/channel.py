"""The private channel between the parent and one worker: three pipes and a page of shared memory.

    tasks    parent -> worker   a packet pipe (O_DIRECT): one small frame is one packet, read whole or not at all
    results  worker -> parent   a stream of frames; the parent never blocks on it
    life     nobody writes      its hang-up is the end: of the worker's process group when the parent's end closes
    page     both               what the worker does right now, what it shall interrupt, and its last stack

No lock, queue or semaphore is shared, so a worker that dies at any instruction blocks nobody.

A frame that lies unread in the task pipe can be taken back: the parent keeps a reading end of its own, and the kernel
gives each packet to exactly one reader. So it is certain what a worker may still start, without asking it.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from taskpool._engine import descriptors, memory, sharing, spin, wire
from taskpool._engine.descriptors import close_kept, keep_from_children, memory_file
from taskpool._engine.wire import BadFrameError, Bytes, Frame, Pickled

PACKET = 4096  # PIPE_BUF: the largest write that is atomic, and the largest packet
KEYS = 240  # of shared values, that fit into a packet
PACKETS = 128  # how many packets may lie in a task pipe, where the system allows
LEVELS_AT = 4096  # the place of the loggers' levels in the page file, behind the words: two, used in turn
LEVELS_ROOM = 6 * 1024
STACK_AT = 16 * 1024  # the stack's place
PAGE_SIZE = 64 * 1024

# The words of the page. The worker writes the first five, the parent the others. Four say which block of memory the
# worker may write its next large result into; then come the version of the levels, and two that nobody can guess.
UNIT, ITEM, STARTED, PHASE, WRITTEN, INTERRUPT, INTERRUPT_ITEM, TURN, BLOCK, INODE, OWNER, LEVELS, OUTPUT_KEY = range(
    13
)
ANY_ITEM = (1 << 64) - 1  # whichever item runs
BETWEEN = (1 << 64) - 2  # the last item's outcome is written, the next has not begun
IDLE, LOADING, RUNNING, WRITING = range(4)

MOST_PIECES = 64  # written by one system call
READ = 64 * 1024  # bytes that are read at once between large frames

_FILLING = memoryview(bytes(PACKET))
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_F_SETPIPE_SZ = 1031

now = time.monotonic

_publishing = threading.RLock()  # reentrant: a signal handler that submits may interrupt this very thread in it


def _start_afresh() -> None:
    """In a forked child: forget the lock that some thread of the parent may have held."""
    global _publishing
    _publishing = threading.RLock()


os.register_at_fork(after_in_child=_start_afresh)


class Page:
    """The shared words. Each is 8 bytes, aligned, written by one side only."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_SIZE)
        self.words = memoryview(self._map)[:LEVELS_AT].cast("Q")
        self.times = memoryview(self._map)[:LEVELS_AT].cast("d")

    def current(self) -> tuple[int, int, float, int]:
        """Return (unit id, item index, start, phase) as they stood together at one moment.

        The worker writes the start before the item and the unit, so a pair that did not change around the reading of
        the start belongs to it.
        """
        while True:
            unit, item = self.words[UNIT], self.words[ITEM]
            started, phase = self.times[STARTED], self.words[PHASE]
            if (unit, item) == (self.words[UNIT], self.words[ITEM]):
                return unit, item, started, phase

    def stack(self) -> str | None:
        """Return the text that faulthandler wrote here, if any."""
        text = self._map[STACK_AT:].split(b"\0", 1)[0]
        return text.decode(errors="replace").strip() or None

    def clear_stack(self) -> None:
        """Forget it."""
        self._map[STACK_AT:] = bytes(PAGE_SIZE - STACK_AT)

    def publish(self, version: int, levels: bytes) -> None:
        """Write the levels of the parent's loggers, unless a newer version stands there. From any thread of the parent.

        Each version has its place, and the word that names it is written last. So whoever reads the version before
        and behind has read what belongs to it, unless two more came in between; then it has changed.
        """
        with _publishing:
            if self.words[LEVELS] < version:
                begin = LEVELS_AT + version % 2 * LEVELS_ROOM
                self._map[begin : begin + 4 + len(levels)] = len(levels).to_bytes(4, "little") + levels
                self.words[LEVELS] = version

    def levels(self) -> tuple[int, bytes]:
        """Return (their version, the levels)."""
        while True:
            version = self.words[LEVELS]
            begin = LEVELS_AT + version % 2 * LEVELS_ROOM
            size = int.from_bytes(self._map[begin : begin + 4], "little")
            data = self._map[begin + 4 : begin + 4 + size]
            if self.words[LEVELS] == version:
                return version, data

    def close(self) -> None:
        """Unmap the page."""
        self.words.release()
        self.times.release()
        self._map.close()


def _page_file(opened: list[int]) -> int:
    fd = memory_file()
    opened.append(fd)
    os.ftruncate(fd, PAGE_SIZE)
    os.lseek(fd, STACK_AT, os.SEEK_SET)  # faulthandler writes at the file's position
    return fd


class WorkerEnd:
    """The four descriptors that a worker gets, and a fifth for what its tasks print where that is wanted. Pickles where multiprocessing passes it to a new process."""

    def __init__(self, tasks: int, results: int, life: int, page: int, *output: int) -> None:
        self.fds: tuple[int, ...] = (tasks, results, life, page, *output)

    @property
    def life(self) -> int:
        """The reading end of the life pipe."""
        return self.fds[2]

    def move(self) -> WorkerEnd:
        """Move the descriptors to another object, whose owner closes them; this one closes nothing any more."""
        fds, self.fds = self.fds, ()
        return WorkerEnd(*fds)

    def close(self) -> None:
        """Close the parent's copies, once the worker has its own."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            close_kept(fd)

    def hand_over(self) -> None:
        """Let a forked child keep these descriptors: the next fork is the worker's."""
        descriptors.let_child_keep(self.fds)

    def take_back(self) -> None:
        """Note them again, so that they can be closed and no other child gets them."""
        keep_from_children(self.fds)

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        return _receive_end, tuple(DupFd(fd) for fd in self.fds)


def _receive_end(*duplicates: Any) -> WorkerEnd:
    return WorkerEnd(*(duplicate.detach() for duplicate in duplicates))


class Channel:
    """The parent's end. All methods but `send_packet` belong to the dispatcher; `send_packet` to whoever owns the worker."""

    def __init__(self, *, has_output: bool = False) -> None:
        with descriptors.no_forks():
            self._make(has_output=has_output)

    def _make(self, *, has_output: bool) -> None:
        opened: list[int] = []
        try:
            task_r, self.tasks = _packet_pipe(opened)
            self.results, result_w = _pipe(opened)
            self.life_r, self.life = _pipe(opened)
            page = _page_file(opened)
            self.page = Page(page)
            life = os.dup(self.life_r)
            opened.append(life)
            printed = _pipe(opened) if has_output else ()
            self.output: int | None = printed[0] if printed else None
            self.worker_end = WorkerEnd(task_r, result_w, life, page, *printed[1:])
            self.page_file = os.dup(page)  # whose position the worker's has, too
            opened.append(self.page_file)
            self.unread = _reopen(task_r)
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        os.set_blocking(self.tasks, False)
        os.set_blocking(self.results, False)
        self.page.words[OUTPUT_KEY], self.page.words[OUTPUT_KEY + 1] = struct.unpack("<QQ", os.urandom(16))
        if self.output is not None:
            os.set_blocking(self.output, False)
            keep_from_children({self.output})
        keep_from_children({self.tasks, self.results, self.life, self.life_r, self.page_file, *self.worker_end.fds})
        if self.unread is not None:
            keep_from_children({self.unread})
        self.has_life = True  # whether the life pipe's writing end is open
        self._reader = wire.FrameReader()
        self._sending: list[memoryview] = []
        self.unsaid: deque[bytes] = deque()  # keys of shared values that the worker shall forget
        self.said = 0  # packets of them that it has perhaps not read
        self._most_said = _packets_in(self.tasks) // 2
        self._fetched: deque[bytes] = deque()  # read, and not looked at yet
        self.lent: memory.Block | None = None  # for the worker's next large result
        self.received = 0
        self.is_open = True

    @property
    def sources(self) -> tuple[int, ...]:
        """What is read from the worker."""
        return (self.results,) if self.output is None else (self.results, self.output)

    # Sending

    def send_packet(self, packet: bytes) -> bool:
        """Write a frame of at most PACKET bytes: all of it, or nothing and False. Never blocks."""
        try:
            return len(packet) <= PACKET and os.write(self.tasks, packet) == len(packet)
        except OSError:  # it is full, or nobody reads it any more
            return False

    def send_packets(self, packets: list[bytes]) -> int:
        """Write several frames as a packet each, in one system call; return how many the pipe took. Never blocks.

        Each but the last is filled up to a packet's full size: the kernel begins another there. One call lets go of
        the GIL once, and getting it back from a busy thread is what sending costs most.
        """
        pieces: list[Bytes] = []
        for packet in packets[:-1]:
            pieces += (packet, _FILLING[len(packet) :])
        pieces.append(packets[-1])
        try:
            sent = os.writev(self.tasks, pieces)
        except BlockingIOError:
            return 0
        whole = PACKET * (len(packets) - 1)
        return len(packets) if sent > whole else sent // PACKET

    def say(self) -> None:
        """Send what the worker shall forget. Only in front of tasks, or while it has none.

        Never so much that the pipe is full, since nobody would notice when there is room for a task again. The rest
        goes with the next tasks.
        """
        while self.unsaid and self.said < self._most_said and not self._sending:
            keys: list[bytes] = []
            with contextlib.suppress(IndexError):
                while len(keys) < KEYS:
                    keys.append(self.unsaid.popleft())
            self.said += 1
            body = Pickled(b"".join(keys))
            if not self.send_packet(wire.frame_head(wire.FORGET, 0, body) + body.stream):
                self.unsaid.extend(keys)
                return

    def begin_large(self, parts: list[Bytes]) -> None:
        """Begin to send a frame of any size; `continue_large` sends what the pipe does not take at once."""
        self._set_packets(on=False)
        self._sending = [memoryview(part).cast("B") for part in parts if len(part)]

    def continue_large(self) -> bool:
        """Send what fits; return True when all is sent.

        Raises:
            OSError: If the worker closed its end.
        """
        while self._sending:
            try:
                sent = os.writev(self.tasks, self._sending[:MOST_PIECES])
            except BlockingIOError:
                return False
            _drop_sent(self._sending, sent)
        self._set_packets(on=True)
        return True

    @property
    def is_sending(self) -> bool:
        """Whether a large frame is on its way."""
        return bool(self._sending)

    def _set_packets(self, *, on: bool) -> None:
        # The packet flag is noted with each buffer as it is written, so frames before and behind stay packets.
        flags = fcntl.fcntl(self.tasks, fcntl.F_GETFL)
        fcntl.fcntl(self.tasks, fcntl.F_SETFL, flags | _O_DIRECT if on else flags & ~_O_DIRECT)

    def take_back(self) -> set[int]:
        """Read every packet that the worker has not read, which it will never see; return the ids of their units."""
        ids: set[int] = set()
        if self.unread is not None:
            with contextlib.suppress(BlockingIOError):
                while packet := os.read(self.unread, PACKET):
                    if packet[0] == wire.FORGET:
                        self.unsaid.extend(sharing.keys_in(packet[wire.ONE_PART.size :]))
                    elif len(packet) >= wire.FRAME.size:
                        ids.add(wire.unit_of(packet))
        return ids

    @property
    def can_send_ahead(self) -> bool:
        """Whether frames may wait in the task pipe behind the one that runs, since they can be taken back."""
        return self.unread is not None

    # Receiving

    def receive(self) -> Iterator[Frame]:
        """Yield the frames that have arrived, without blocking, until there is nothing more to read for now.

        Raises:
            EOFError: If no process holds the worker's end any more.
            BadFrameError: If what arrived is not a frame.
            MemoryError: If there is no room for a result.
        """
        while True:
            room = self._reader.room()
            data, again = b"", True
            try:
                if self._fetched:
                    data, room = self._fetched.popleft(), None
                    size = len(data)
                elif room is None:
                    data = os.read(self.results, READ)
                    size = len(data)
                    again = size == READ
                else:
                    size = os.readv(self.results, [room[: 1 << 20]])
            except BlockingIOError:
                return
            if not size:
                raise EOFError
            self.received += size
            if room is None:
                yield from self._reader.feed(data)
                if not again and self._reader.room() is None:
                    return
            elif (frame := self._reader.filled(size)) is not None:
                yield frame

    def is_between_frames(self) -> bool:
        """Whether the next byte from the pipe begins a frame."""
        return not self._fetched and self._reader.is_empty()

    def fetch(self) -> None:
        """Read what has arrived, for `only_frame`; what that does not take stays for `receive`.

        In one call of C code, so that no signal handler can come between reading and keeping.

        Raises:
            BlockingIOError: If nothing has arrived.
        """
        self._fetched.extend(map(os.read, (self.results,), (READ,)))

    def only_frame(self) -> Frame | None:
        """Return the fetched frame if it is whole and all that there is; it stays until `drop_only_frame`.

        Raises:
            BadFrameError: If what arrived is not a frame.
        """
        if len(self._fetched) == 1 and self._reader.is_empty():
            data = self._fetched[0]
            found = wire.parse_frame(data, wire.WORKER_TO_PARENT)
            if found is not None and found[1] == len(data):
                return found[0]
        return None

    def drop_only_frame(self) -> None:
        """Forget the fetched frame: it has been dealt with."""
        self.received += len(self._fetched.popleft())

    def clear_stack(self) -> None:
        """Make room for stacks in the page, from its beginning on."""
        self.page.clear_stack()
        os.lseek(self.page_file, STACK_AT, os.SEEK_SET)

    def lend(self, block: memory.Block) -> None:
        """Let the worker write its next large result into this block."""
        self.lent = block
        words = self.page.words
        words[BLOCK], words[INODE], words[OWNER] = block.fd, block.inode, os.getpid()
        words[TURN] += 1

    def claim(self, places: Bytes, free: Callable[[memory.Block], None]) -> list[memoryview]:
        """Return the parts that the worker has written into the lent block, which is freed when nobody looks at them.

        Raises:
            BadFrameError: If it cannot have written that.
        """
        block, self.lent = self.lent, None
        found = memory.unpack(places)[1]
        end = max((place.offset + place.size for place in found), default=0)
        if block is None or not end or {place.inode for place in found} != {block.inode} or not block.reaches(end):
            raise BadFrameError("a result that lies nowhere")
        view = memory.hand(block, end, free)
        return [view[place.offset : place.offset + place.size] for place in found]

    def take_lent(self) -> memory.Block | None:
        """Take the lent block from a worker that has no task, and so writes nothing."""
        block, self.lent = self.lent, None
        if block is not None:
            self.page.words[TURN] -= 1  # the last one that it has used
        return block

    def progress(self) -> int:
        """Return a number that grows with what the worker has written of its outcomes."""
        return self.received + self.page.words[WRITTEN]

    def end_life(self) -> None:
        """Close the writing end of the life pipe: the kernel kills the worker's process group."""
        if self.has_life:
            self.has_life = False
            close_kept(self.life)

    def close(self) -> None:
        """Close everything of the parent's. The end of the life pipe kills what is left of the worker's group."""
        self.is_open = False
        self.worker_end.close()
        self.end_life()
        fds = self.tasks, self.results, self.life_r, self.unread, self.page_file, self.output
        self.tasks = (
            self.results
        ) = -1  # first: a thread may be about to use them, and the numbers soon mean other files
        self.unread = self.output = None
        for fd in fds:
            if fd is not None:
                close_kept(fd)
        self._sending = []
        if self.lent is not None:
            self.lent.close()  # not to be used again: a process that does not end may still write into it
        with contextlib.suppress(BufferError):  # somebody still looks at a view of it; it goes with the last
            self.page.close()


def _pipe(opened: list[int]) -> tuple[int, int]:
    ends = os.pipe()
    opened.extend(ends)
    return ends


def _packet_pipe(opened: list[int]) -> tuple[int, int]:
    if not (_O_DIRECT and hasattr(os, "pipe2")):
        return _pipe(opened)
    ends = os.pipe2(os.O_CLOEXEC | _O_DIRECT)
    opened.extend(ends)
    # The bound on a user's pipe memory may refuse; then fewer packets fit, and `send_packet` says so.
    with contextlib.suppress(OSError):
        fcntl.fcntl(ends[1], _F_SETPIPE_SZ, PACKETS * PACKET)
    return ends


def _packets_in(pipe: int) -> int:
    """Return how many packets a pipe takes, at least two."""
    with contextlib.suppress(AttributeError, OSError):  # another system
        return max(2, fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) // PACKET)
    return 2


def _reopen(task_r: int) -> int | None:
    """Open the reading end a second time, non-blocking: an open file of its own, so that the worker's stays blocking."""
    if not _O_DIRECT:
        return None
    try:
        return os.open(f"/proc/self/fd/{task_r}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no /proc: then no frame is sent ahead
        return None


class WorkerChannel:
    """The worker's end: blocking reads of tasks, whole frames of outcomes."""

    def __init__(self, end: WorkerEnd) -> None:
        self._tasks, self._results, self.life, self.page_fd, *output = end.fds
        self.output: int | None = output[0] if output else None
        self._waited = math.inf  # how long it took until the last task came
        self.page = Page(self.page_fd)
        self._lock = threading.RLock()
        self._waiting: deque[list[Bytes]] = deque()  # frames
        self._is_writing = False  # seen by the thread that has the lock

    def receive(self) -> Frame | None:
        """Return the next frame; None at the end of the channel.

        Raises:
            BadFrameError: If what arrived is not a frame.
        """
        began = now()
        if spin.AT_ONCE < self._waited < spin.LONGEST:
            spin.until_readable(self._tasks)
        packet = os.read(self._tasks, PACKET)
        self._waited = now() - began
        head = None
        while head is None:
            whole = wire.parse_frame(packet, wire.PARENT_TO_WORKER)
            if whole is not None:  # a small one, perhaps with filling behind
                return whole[0]
            head = wire.parse_head(packet, wire.PARENT_TO_WORKER)
            more = b"" if head is not None else os.read(self._tasks, PACKET)
            if head is None and not more:
                return None
            packet += more
        fields, sizes, begin = head
        size = sum(sizes)
        parts = bytearray(size)
        parts[: len(packet) - begin] = packet[begin:]
        if not self._fill(memoryview(parts), len(packet) - begin):
            return None
        return wire.make_frame(fields, sizes, memoryview(parts))

    def _fill(self, view: memoryview, position: int) -> bool:
        while position < len(view):
            size = os.readv(self._tasks, [view[position : position + (1 << 20)]])
            if not size:
                return False
            position += size
        return True

    def send(self, head: bytes, body: Pickled | None = None) -> None:
        """Write one frame, whole: threads of a task that log take turns with the outcome.

        A signal handler or a finalizer may call this while its very thread is in the middle of a frame. Then its frame
        waits, and is written right behind by the call that was interrupted. The system takes a small one whole, so
        nothing comes into the middle of that.
        """
        frame: list[Bytes] = [head] if body is None else [head, *body.pieces()]
        with self._lock:
            if not (self._is_writing or self._waiting) and sum(map(len, frame)) <= PACKET:
                os.write(self._results, b"".join(frame))
                return
            self._waiting.append(frame)
            # Looked at again once nothing is being written: what interrupted the very end of that has only waited.
            while self._waiting and not self._is_writing:
                self._write_waiting()

    def send_small(self, frame: bytes) -> None:
        """Write one frame as `send` does, in fewer steps if it fits into a packet and nothing is in its way."""
        with self._lock:
            if self._is_writing or self._waiting or len(frame) > PACKET:
                self._waiting.append([frame])
            else:
                self._is_writing = True
                try:
                    os.write(self._results, frame)  # the system takes it whole or not at all
                finally:
                    self._is_writing = False
            while self._waiting and not self._is_writing:
                self._write_waiting()

    def _write_waiting(self) -> None:
        try:
            self._is_writing = True
            while self._waiting:
                self._write(self._waiting.popleft())
        finally:
            self._is_writing = False

    def _write(self, parts: list[Bytes]) -> None:
        """Write a frame, or end the process: behind half a frame nothing that it writes would mean anything.

        A signal handler may raise here, at any moment. How much was written is noted in the same call of C code, so
        that no handler can come between.
        """
        size = sum(map(len, parts))
        written: list[int] = []
        rest = [memoryview(part).cast("B") for part in parts if len(part)]
        try:
            while rest:
                written.extend(map(os.writev, (self._results,), (rest[:MOST_PIECES],)))
                _drop_sent(rest, written[-1])
        except BaseException:
            if 0 < sum(written) < size:
                os._exit(1)
            raise

    def close(self) -> None:
        """Close the worker's descriptors: in a child that a task forked, which must not speak for the worker."""
        for fd in (self._tasks, self._results, self.life, self.page_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._tasks = self._results = self.life = self.page_fd = -1  # the numbers may soon mean other files
        self._lock = threading.RLock()  # another thread, which is not here, may have been writing
        self._waiting.clear()
        self._is_writing = False


def _drop_sent(pieces: list[memoryview], sent: int) -> None:
    """Take the first `sent` bytes off `pieces`."""
    while pieces and sent >= len(pieces[0]):
        sent -= len(pieces.pop(0))
    if sent:
        pieces[0] = pieces[0][sent:]


__all__ = ["BadFrameError", "Channel", "Page", "WorkerChannel", "WorkerEnd"]
