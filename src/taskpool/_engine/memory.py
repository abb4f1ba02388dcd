"""Large data lies in blocks of memory that the parent owns; a frame only says where.

    arguments   the parent copies them into a block, and the worker maps that privately: what it changes is its own
    results     the worker writes them into a block that it was lent, and the parent maps them: nobody copies again

A block is a file without a name. Its pages stay when it is used again, which is what makes it quick: to fill pages that
are there takes a sixth of the time that it takes to get new ones. Nothing can be left behind, since the kernel frees it
with its last descriptor or mapping, and a worker that dies takes nothing with it.

A block is used again only when no mapping of it is left that could notice: a worker parts from its mappings before it
reports the end of a task (`Mappings.part`), and what the parent itself handed to the user goes back when that is
dropped, unless a child was forked meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from taskpool._engine.descriptors import close_kept, keep_from_children, memory_file, no_forks

Bytes = bytes | bytearray | memoryview
Part = Sequence[Bytes]  # its pieces, which belong together

LARGE = 128 * 1024  # bytes; what is smaller travels in the pipe, which is as quick
ALONE = 1 << 20  # a buffer of this size has a block of its own: if it is sent again at once that block serves both
MOST_PARTS = 32  # of one pickle, whose places must fit into a packet
KEEP = 2.0  # seconds that a free block is kept,
MOST_KEPT = 512 << 20  # ... and bytes that they may have in all
HANDED = 1 << 20  # results of this size are handed on as they lie, others are copied out of the block,
MOST_HANDED = 64  # ... and so are those that come while the user holds so many, each with its descriptors
DESCRIPTORS = 10  # one in so many of those that the process may have is for each kind of block
WRITE = 4 << 20  # bytes that are written at once
ALIGNED = 64  # bytes, to which parts are aligned, as NumPy aligns its own
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE: get pages of one's own, with what they hold

PLACE = struct.Struct("<QQQQ")
OWNER = struct.Struct("<Q")

now = time.monotonic
is_over = sys.is_finalizing  # at the very end modules are empty, and the kernel frees everything; so a default argument


class Place(NamedTuple):
    """Where a part of a pickle lies: which file, by its descriptor in the owner's process and its inode, and where in it."""

    fd: int
    inode: int
    offset: int
    size: int


def can_share() -> bool:
    """Whether other processes of the user can open this one's files."""
    try:
        return os.stat("/proc/self/fd").st_uid == os.geteuid()  # root's if the process does not let others look at it
    except OSError:
        return False


def most_files() -> int:
    """Return how many blocks there may be of each kind: that wait for a task, that are free, that are shared."""
    return os.sysconf("SC_OPEN_MAX") // DESCRIPTORS


def pack(places: Sequence[Place], owner: int | None = None) -> bytes:
    """Return places as they stand in a frame, behind the process id of the owner of the files."""
    return OWNER.pack(owner or os.getpid()) + b"".join(PLACE.pack(*place) for place in places)


def unpack(data: Bytes) -> tuple[int, list[Place]]:
    """Return the owner's process id, and the places."""
    return OWNER.unpack_from(data)[0], [Place(*fields) for fields in PLACE.iter_unpack(data[OWNER.size :])]


def laid_out(parts: Sequence[Part]) -> tuple[list[int], int]:
    """Return where parts begin that lie one behind the other, and where the last one ends."""
    offsets, end = [], 0
    for part in parts:
        offsets.append(end)
        end += -(-size_of(part) // ALIGNED) * ALIGNED
    return offsets, end


def placed(parts: Sequence[Part], offsets: Sequence[int]) -> Iterator[tuple[Bytes, int]]:
    """Yield each piece of each part with where it belongs."""
    for part, begin in zip(parts, offsets, strict=True):
        offset = begin
        for piece in part:
            yield piece, offset
            offset += len(piece)


def size_of(part: Part) -> int:
    """Return how many bytes it has."""
    return sum(map(len, part))


def capacity_for(size: int) -> int:
    """Return the capacity of a block that takes so many bytes. Few different ones, so that they can be used again."""
    return 1 << max(size - 1, LARGE).bit_length()


# The parent's side


class Block:
    """A file of memory. It takes no room where nothing has been written."""

    fd: int = -1
    _map: mmap.mmap | None = None

    def __init__(self, capacity: int) -> None:
        with no_forks():
            self.fd = memory_file()
            keep_from_children({self.fd})
        os.ftruncate(self.fd, capacity)
        self.inode: int = os.fstat(self.fd).st_ino
        self.capacity: int = capacity
        self.returned: float = 0.0  # since when it is free (monotonic)

    def write(self, parts: Sequence[Part], offsets: Sequence[int]) -> None:
        """Copy parts to where they belong."""
        # Not through a mapping: that is quicker only once each page has been touched through it.
        for piece, offset in placed(parts, offsets):
            write_at(self.fd, piece, offset)

    def places(self, parts: Sequence[Part], offsets: Sequence[int]) -> list[Place]:
        """Say where parts lie."""
        return [Place(self.fd, self.inode, at, size_of(part)) for at, part in zip(offsets, parts, strict=True)]

    def view(self, size: int) -> memoryview:
        """Return the first bytes."""
        if self._map is None:
            try:
                self._map = mmap.mmap(self.fd, self.capacity)
            except OSError:  # no descriptor left for it
                return memoryview(self.copy(size))
        return memoryview(self._map)[:size]

    def copy(self, size: int) -> bytearray:
        """Return a copy of the first bytes; needs no descriptor, and lets go of the GIL."""
        copy = bytearray(size)
        view = memoryview(copy)
        while view:
            view = view[os.preadv(self.fd, [view], size - len(view)) :]
        return copy

    def reaches(self, end: int) -> bool:
        """Whether the file has so many bytes; somebody else may have made it larger."""
        size = os.fstat(self.fd).st_size
        if size > self.capacity:
            self.capacity, self._map = size, None
        return size >= end

    def close(self) -> None:
        """Close it; the pages go with the last mapping."""
        if self.fd >= 0:
            close_kept(self.fd)
            self.fd = -1
        self._map = None  # unmapped at once, unless somebody still looks at it

    def __del__(self, is_over: Callable[[], bool] = is_over) -> None:
        """Close it: a signal handler raised where it was between two hands."""
        if not is_over():
            self.close()


class Lease:
    """A block in use for one part, or several, of pickles that wait or run; free again with the last reference to this."""

    fds: set[int] = set()  # of all there are  # noqa: RUF012

    def __init__(self, free: Callable[[Block], None], block: Block, size: int) -> None:
        self._free = free
        self.block = block
        self.size = size
        self.fds.add(block.fd)

    def place(self, offset: int, size: int) -> Place:
        """Say where a part lies."""
        return Place(self.block.fd, self.block.inode, offset, size)

    def holds(self, data: Bytes) -> bool:
        """Whether it holds just these bytes."""
        return self.size == len(data) and are_equal(self.block.view(self.size), data)

    def __del__(self, is_over: Callable[[], bool] = is_over) -> None:
        """Free the block."""
        if is_over():
            return
        self.fds.discard(self.block.fd)
        self._free(self.block)


class Blocks:
    """The blocks of one engine: those in use belong to who uses them, those that are free wait here for a while.

    From any thread: whatever changes here changes by one step of a deque or dict. A signal handler, or the garbage
    collector, may come between any two.

    Args:
        look_by: Called with the monotonic time at which `trim` is to be called.
    """

    def __init__(self, look_by: Callable[[float], None]) -> None:
        self.are_usable = can_share()  # until a worker says that it cannot open one
        self._look_by = look_by
        self._free: dict[int, deque[Block]] = {}  # by capacity
        self._recent: deque[weakref.ref[Lease]] = deque(maxlen=4)  # large parts that may come again
        self._pid = os.getpid()
        self._closed = False

    def store(self, parts: Sequence[Part]) -> tuple[list[Lease], list[Place]]:
        """Copy parts into blocks; return what keeps them there, and where they lie, in the same order.

        Raises:
            OSError: If there is no room, or no descriptor left for this.
        """
        together = [part for part in parts if size_of(part) < ALONE]
        offsets, end = laid_out(together)
        leases = [self._lease(together, offsets, end)] if together else []
        rest = iter(offsets)
        places = []
        for part in parts:
            if size_of(part) < ALONE:
                places.append(leases[0].place(next(rest), size_of(part)))
            else:
                leases.append(self._lease_alone(part))
                places.append(leases[-1].place(0, size_of(part)))
        return leases, places

    def _lease_alone(self, part: Part) -> Lease:
        for known in list(self._recent) if len(part) == 1 else ():
            lease = known()
            if lease is not None and lease.holds(part[0]):
                return lease
        lease = self._lease([part], [0], size_of(part))
        self._recent.append(weakref.ref(lease))
        return lease

    def _lease(self, parts: Sequence[Part], offsets: Sequence[int], end: int) -> Lease:
        if len(Lease.fds) >= most_files():  # so much waits that the program itself might find no descriptor
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        lease = Lease(self.give_back, self.take(end), end)
        lease.block.write(parts, offsets)
        return lease

    def take(self, size: int) -> Block:
        """Return a free block for so many bytes, or a new one.

        Raises:
            OSError: If there is no room, or no descriptor left.
        """
        capacity = capacity_for(size)
        with contextlib.suppress(KeyError, IndexError):
            return self._free[capacity].pop()
        return Block(capacity)

    def give_back(self, block: Block) -> None:
        """Take a block that nobody uses any more."""
        if self._pid != os.getpid():  # a child that was forked: none of this is its own, nor may it wake the loop
            return
        block.returned = now()
        if self._closed or block.fd < 0 or not self._has_room(block.capacity):
            block.close()
            return
        self._free.setdefault(block.capacity, deque()).append(block)
        self._look_by(block.returned + KEEP)
        if self._closed:  # just now
            self.trim(0.0)

    def _has_room(self, capacity: int) -> bool:
        """Whether one more may be kept."""
        kept = [(each, len(free)) for each, free in list(self._free.items())]
        size = capacity + sum(each * count for each, count in kept)
        return size <= MOST_KEPT and sum(count for _, count in kept) < most_files()

    def trim(self, keep: float = KEEP) -> None:
        """Close what has been free for so many seconds."""
        for free in list(self._free.values()):
            with contextlib.suppress(IndexError):
                while free[0].returned + keep <= now():  # the one that waits longest
                    free.popleft().close()
            if free:
                self._look_by(now() + KEEP)

    def close(self) -> None:
        """Close all that are free; those in use go when they are given back."""
        self._closed = True
        self.trim(0.0)


class Handed(mmap.mmap):
    """A result, as it lies in its block, in the hands of the user. A child that is forked has a copy of its own."""

    _count = 0  # how many there are
    _forks = 0  # how often this process has forked: a child may still look at what was handed out before

    block: Block | None = None
    free: Callable[[Block], None]
    born: int

    def __del__(self, is_over: Callable[[], bool] = is_over) -> None:
        """Free the block: nobody looks at it any more."""
        if self.block is None or is_over():
            return
        Handed._count -= 1
        if self.born == Handed._forks:
            self.free(self.block)
        else:
            self.block.close()


def hand(block: Block, size: int, free: Callable[[Block], None]) -> memoryview:
    """Return the first bytes of a block, to be kept by the user for as long as he likes; then the block is freed."""
    if size >= max(HANDED, block.capacity // 4) and Handed._count < MOST_HANDED:
        with contextlib.suppress(OSError):  # no descriptor left for it
            handed = Handed(block.fd, size, flags=mmap.MAP_PRIVATE)
            handed.free, handed.born = free, Handed._forks
            Handed._count += 1
            handed.block = block
            return memoryview(handed)
    copy = block.copy(size)
    free(block)
    return memoryview(copy)


def _note_fork() -> None:
    Handed._forks += 1


if hasattr(os, "register_at_fork"):
    # Twice: another thread may hand something out between the first time and the fork itself.
    os.register_at_fork(before=_note_fork, after_in_parent=_note_fork)


def are_equal(ours: memoryview, theirs: Bytes) -> bool:
    """Compare bytes with others of the same length, as fast as the machine can, and without the GIL."""
    try:
        from taskpool._engine import compare
    except ImportError:  # a Python without ctypes
        return False
    return compare.are_equal(ours, theirs)


# The worker's side


class BlockError(Exception):
    """A block of the parent's cannot be opened here."""


def open_file(owner: int, fd: int, inode: int, flags: int) -> int:
    """Open a file of another process by its descriptor there.

    Raises:
        BlockError: If that is not allowed, or there is another file by now.
    """
    try:
        opened = os.open(f"/proc/{owner}/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BlockError(f"a block of process {owner} cannot be opened: {error}") from error
    if os.fstat(opened).st_ino != inode:
        os.close(opened)
        raise BlockError(f"descriptor {fd} of process {owner} is another file by now")
    return opened


class Lent:
    """The worker's side of the block that it may write a large result into; the parent lends another for the next.

    Args:
        words: The shared words of its page: the parent writes which block it is, and then counts up its turn.
        turn: Which word has the turn; behind it stand the block's descriptor, its inode and the owner's process id.
        written: Which word counts the bytes that have been written, so that the parent sees that they become more.
    """

    def __init__(self, words: memoryview, turn: int, written: int) -> None:
        self._words = words
        self._at = turn
        self._written = written
        self._used = 0  # the last turn

    def store(self, parts: Sequence[Part]) -> Bytes | None:
        """Write parts into the block; return their places, packed, or None if there is none, or no room."""
        turn, fd, inode, owner = self._words[self._at : self._at + 4]
        if turn == self._used:
            return None
        with contextlib.suppress(BlockError, OSError):
            file = open_file(owner, fd, inode, os.O_RDWR)
            try:
                offsets = self._write(file, parts)
            finally:
                os.close(file)
            self._used = turn
            places = [Place(fd, inode, at, size_of(part)) for at, part in zip(offsets, parts, strict=True)]
            return pack(places, owner)
        return None

    def _write(self, file: int, parts: Sequence[Part]) -> list[int]:
        offsets, end = laid_out(parts)
        if os.fstat(file).st_size < end:
            os.ftruncate(file, capacity_for(end))
        for piece, offset in placed(parts, offsets):
            write_at(file, piece, offset, self._note)
        return offsets

    def _note(self, size: int) -> None:
        self._words[self._written] += size


def open_parts(data: Bytes, prot: int = mmap.PROT_READ) -> tuple[list[mmap.mmap], list[memoryview]]:
    """Map the parts whose places are packed in `data`, for this process alone; return the mappings and the parts.

    Raises:
        BlockError: If they cannot be opened.
    """
    owner, places = unpack(data)
    maps: dict[int, mmap.mmap] = {}
    for place in places:
        if place.inode not in maps:
            size = max(other.offset + other.size for other in places if other.inode == place.inode)
            maps[place.inode] = _map(owner, place, size, prot)
    views = {inode: memoryview(mapped) for inode, mapped in maps.items()}
    parts = [views[place.inode][place.offset : place.offset + place.size] for place in places]
    return list(maps.values()), parts


def _map(owner: int, place: Place, size: int, prot: int) -> mmap.mmap:
    fd = open_file(owner, place.fd, place.inode, os.O_RDONLY)
    try:
        return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=prot)
    except OSError as error:  # no descriptor left, say: through the pipe it can still come
        raise BlockError(f"a block of process {owner} cannot be mapped: {error}") from error
    finally:
        os.close(fd)


class Mappings:
    """What a worker has mapped of the parent's blocks, for the task that it runs."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def __bool__(self) -> bool:
        return bool(self._maps)

    def open(self, data: Bytes) -> list[memoryview]:
        """Map the parts whose places are packed in `data`. What the task changes in them is its own.

        Raises:
            BlockError: If they cannot be opened.
        """
        maps, parts = open_parts(data, mmap.PROT_READ | mmap.PROT_WRITE)
        self._maps += maps
        return parts

    def part(self) -> None:
        """Have no page in common with the parent any more: unmap what nobody uses, copy what the task has kept."""
        maps, self._maps = self._maps, []
        for mapped in maps:
            try:
                mapped.close()
            except BufferError:
                _own(mapped)


def _own(mapped: mmap.mmap) -> None:
    """Get copies of all pages of a private mapping that the process has not changed so far."""
    try:
        mapped.madvise(POPULATE_WRITE)
    except (OSError, ValueError):  # before Linux 5.14: write to each page what it holds
        for position in range(0, len(mapped), mmap.PAGESIZE):
            mapped[position] = mapped[position]


mappings = Mappings()  # of this process
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=mappings.part)  # a child may live longer than the task


def write_at(fd: int, data: Any, offset: int, note: Callable[[int], object] = abs) -> None:
    """Write all of it to a place in a file; each time that some of it is written, `note` is called with how much."""
    view = memoryview(data).cast("B")
    while view:
        sent = os.pwrite(fd, view[:WRITE], offset)
        view, offset = view[sent:], offset + sent
        note(sent)
