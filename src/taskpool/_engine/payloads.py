"""What a unit of work carries, as it waits in the parent: pickled, and no longer changed by what its objects go through."""

from __future__ import annotations

import contextlib
from typing import Protocol

from taskpool._engine import memory, wire
from taskpool._engine.channel import PACKET
from taskpool._engine.memory import Blocks, Lease, Place
from taskpool._engine.wire import Bytes, Pickled

SMALL = PACKET - wire.FRAME.size - wire.SIZE.size  # bytes of a pickle whose frame fits into one packet
BESIDE_PLACES = 2048  # ... or does so together with its places


class Payload(Protocol):
    """The pickle of a unit of work."""

    @property
    def is_small(self) -> bool:
        """Whether its frame fits into a packet."""
        ...

    def pickled(self) -> Pickled:
        """Return what a frame of it carries."""
        ...


class Plain:
    """A payload that travels through the pipe."""

    def __init__(self, pickled: Pickled) -> None:
        self._pickled = pickled
        self.is_small: bool = is_small(pickled)

    def pickled(self) -> Pickled:
        """Return it."""
        return self._pickled


class Stored:
    """A payload that lies in blocks of memory, whole or for the most part.

    Args:
        stream: The pickle stream; empty if that lies there, too.
        leases: What keeps the blocks.
        places: Where each part lies.
        blocks: Whose they are.
    """

    def __init__(self, stream: Bytes, leases: list[Lease], places: list[Place], blocks: Blocks) -> None:
        self._stream = stream
        self._leases = leases
        self._places = places
        self._packed = memory.pack(places)
        self._blocks = blocks

    @property
    def is_small(self) -> bool:
        """Whether a frame can say where it lies; not if workers turned out not to be able to look there."""
        return self._blocks.are_usable

    def pickled(self) -> Pickled:
        """Return the places, or what lies there."""
        if self._blocks.are_usable:
            return Pickled(self._stream, places=self._packed)
        views = {lease.block.inode: lease.block.view(lease.size) for lease in self._leases}
        parts = [views[place.inode][place.offset : place.offset + place.size] for place in self._places]
        return Pickled(self._stream or parts.pop(0), parts)


def is_small(pickled: Pickled) -> bool:
    """Whether its frame fits into one packet."""
    return len(pickled.stream) <= SMALL and not (pickled.buffers or pickled.rest)


def keep(pickled: Pickled, blocks: Blocks) -> Payload:
    """Keep a pickle for as long as its unit waits or runs: large ones in blocks, others as they are."""
    if blocks.are_usable and pickled.size >= memory.LARGE and len(pickled.buffers) < memory.MOST_PARTS:
        with contextlib.suppress(OSError):  # no room, or no descriptor left
            return _store(pickled, blocks)
    return Plain(wire.frozen(pickled))


def _store(pickled: Pickled, blocks: Blocks) -> Stored:
    stream = pickled.stream if pickled.length <= BESIDE_PLACES else b""
    leases, places = blocks.store(pickled.parts()[bool(stream) :])
    return Stored(stream, leases, places, blocks)
