"""Values that many tasks use: pickled once, they lie in memory that all workers map.

    shared = taskpool.share(array)
    pool.map(partial(work, shared), range(1000))        # work(shared, n) looks at shared.value

What travels with each task is where the value lies. A worker maps it when a task first asks for it, and keeps it until
the last handle in the program is dropped.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from taskpool import _nesting
from taskpool._engine import memory, sharing, wire
from taskpool._engine.memory import Block
from taskpool._engine.wire import Pickled
from taskpool.errors import NotSendableError

T = TypeVar("T")

SMALL = 1024  # bytes of a value that travels with its handle: it needs no descriptor then


class Shared(Generic[T]):
    """A handle on a value that many tasks use. Made by `share`; goes to tasks as an argument, by itself or inside others.

    The value is what it was when it was shared, the same in every process: what goes through NumPy, Arrow or any other
    buffer of pickle protocol 5 is read-only and not copied. Other objects are unpickled once in each process that asks;
    they should not be changed, since the tasks of one worker have them in common.

    It is freed with the last handle of the program. Tasks that wait or run count: one may drop the handle as soon as
    they are submitted. A result that has not been asked for does not: to get a handle back from a task one must keep it.
    """

    _pid = 0

    def __init__(
        self, key: bytes, pickled: Pickled, block: Block | None = None, keeps: Sequence[sharing.Handle] = ()
    ) -> None:
        self._key = key
        self._pickled = pickled
        self._block = block  # in the process that made it
        self._keeps = keeps  # handles inside the value
        self._loaded: list[T] = []
        self._told: weakref.WeakSet[sharing.Engine] = weakref.WeakSet()  # whose workers may have it
        self._pid = os.getpid()  # last: now it is whole

    @property
    def value(self) -> T:
        """The value; not to be changed.

        Raises:
            RuntimeError: If the process that shared it has ended, or does not let this one look at its memory.
            Exception: Whatever unpickling it raises.
        """
        if not self._loaded:
            try:
                self._loaded.append(wire.loads_shared(self._pickled))  # if two threads do, the first one counts
            except memory.BlockError as error:
                raise RuntimeError(f"the shared value cannot be reached: {error}") from error
        return self._loaded[0]

    def __reduce__(self) -> tuple[Any, ...]:
        sharing.carried.add(self)
        return _receive, (self._key, *self._pickled)

    def sent_by(self, engine: sharing.Engine) -> None:
        """Note that workers of an engine may get it."""
        self._told.add(engine)
        for handle in self._keeps:  # workers get those with the value
            handle.sent_by(engine)

    def __del__(self, is_over: Callable[[], bool] = memory.is_over) -> None:
        """Have the workers forget it, and free the memory."""
        if is_over() or self._pid != os.getpid():  # a child that was forked: nothing of this is its own
            return
        for engine in list(self._told):
            engine.forget(self._key)
        if self._block is not None:
            self._block.close()

    def __repr__(self) -> str:
        return f"<taskpool.Shared {self._key.hex()[:8]}>"


def share(value: T) -> Shared[T]:
    """Put a value where all workers can use it without getting a copy each time.

    Args:
        value: Anything that can be pickled. What happens to it later does not change what was shared.

    Returns:
        A handle: give it to tasks, which find the value at `handle.value`. Not only to tasks of taskpool: to any
        process of the same machine and user, as long as this process lives and keeps the handle.

    Raises:
        NotSendableError: If it cannot be pickled.
    """
    with sharing.carried as handles:
        pickled = _pickled(value)
    block, pickled = _stored(pickled)
    handle: Shared[T] = Shared(os.urandom(sharing.KEY), pickled, block, handles)
    _known[handle._key] = handle
    return handle


def _pickled(value: object) -> Pickled:
    try:
        return wire.dumps_for_worker(value, has_large=True)
    except Exception:
        try:
            wire.dumps_for_worker(value, has_large=True)
        except Exception as cause:
            kind = type(value).__qualname__
            raise NotSendableError(
                f"a value of type {kind} cannot be shared, since it cannot be pickled: {type(cause).__name__}: {cause}"
            ) from cause
        raise  # it can be pickled: it was a signal handler of the program that raised


def _stored(pickled: Pickled) -> tuple[Block | None, Pickled]:
    """Return the block that the value is put into, if there can be one, and what says where it lies."""
    if pickled.size > SMALL and len(_known) < memory.most_files() and memory.can_share():
        with contextlib.suppress(OSError):  # no room, or no descriptor left: then it travels
            parts = pickled.parts()
            offsets, end = memory.laid_out(parts)
            block = Block(end)
            block.write(parts, offsets)
            return block, Pickled(b"", places=memory.pack(block.places(parts, offsets)))
    return None, wire.frozen(pickled)._replace(stream=pickled.joined(), rest=())


# Handles that this process has, by their keys: a handle that comes again is the same one.
_known: weakref.WeakValueDictionary[bytes, Shared[Any]] = weakref.WeakValueDictionary()
_kept: dict[bytes, Shared[Any]] = {}  # in a worker: those whose values it keeps until it hears that they are dropped


def _receive(key: bytes, *pickled: Any) -> Shared[Any]:
    """Be what a handle is unpickled by."""
    handle = _known.setdefault(key, Shared(key, Pickled(*pickled)))
    if _nesting.depth:
        _kept[key] = handle
    return handle


def _forget(keys: bytes) -> None:
    for key in sharing.keys_in(keys):
        handle = _kept.pop(key, None)
        if handle is not None and handle._pid != os.getpid():
            handle._loaded.clear()  # this process was forked from the one that shared it, and has its handle for ever


sharing.on_forget = _forget
sharing.is_used = True
