"""Where a hosted process begins: small, since what stands here is imported by every process that spawn starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from multiprocessing.connection import Connection

    from taskpool._engine.channel import WorkerEnd

Initializer = Callable[..., object] | None

MOST_IN_PIPE = 16 * 1024  # bytes; a pipe takes 64 KiB, and what else a process is sent comes to some KB

_end: WorkerEnd | None = None
_door: socket.socket | None = None
_life: int | None = None


class Luggage:
    """The user's initializer and its arguments, as they travel to a process of multiprocessing.

    What is large goes into a file. The pipe into which multiprocessing writes has little room, and a process reads it
    only once it has imported the main module: if it hangs there, or fails, the write never ends (under spawn the parent
    itself holds the reading end).
    """

    def __init__(self, initializer: Initializer = None, initargs: tuple[Any, ...] = ()) -> None:
        self.initializer = initializer
        self.initargs = initargs

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd, ForkingPickler

        data = ForkingPickler.dumps((self.initializer, self.initargs))
        if len(data) <= MOST_IN_PIPE:
            return _unpack, (bytes(data),)
        return _unpack_file, (DupFd(_file_with(data)),)


def _unpack(data: bytes) -> Luggage:
    from multiprocessing.reduction import ForkingPickler

    return Luggage(*ForkingPickler.loads(data))  # pyright: ignore[reportAttributeAccessIssue]


def _file_with(data: memoryview) -> int:
    """Return the descriptor of a file that is open as long as multiprocessing knows the process that is started now."""
    import weakref
    from multiprocessing.context import get_spawning_popen

    from taskpool._engine.descriptors import memory_file

    fd = memory_file()
    close = weakref.finalize(get_spawning_popen(), os.close, fd)
    close.atexit = False
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
    except BaseException:
        close()
        raise
    return fd


def _unpack_file(duplicate: Any) -> Luggage:
    fd = duplicate.detach()
    with open(fd, "rb") as file:
        file.seek(0)
        data = file.read()
        os.ftruncate(fd, 0)  # the parent's descriptor stays for as long as this process
    return _unpack(data)


_luggage = Luggage()


def in_process(end: WorkerEnd, luggage: Luggage) -> None:
    """Be a worker, as the target of a `multiprocessing.Process`."""
    from taskpool._engine import worker

    worker.main(end, luggage.initializer, luggage.initargs)


def keep(end: WorkerEnd, luggage: Luggage) -> None:
    """Be the initializer of a `ProcessPoolExecutor`: keep what the hosted call needs."""
    global _end, _luggage
    _end, _luggage = end, luggage
    _follow_parent(end.life)


def in_executor() -> None:
    """Be a worker, as the one call of a `ProcessPoolExecutor`."""
    assert _end is not None
    in_process(_end, _luggage)


def open_door(door: socket.socket, life: Connection, luggage: Luggage) -> None:
    """Be the initializer of a `multiprocessing.Pool`: keep what its hosted calls need."""
    global _door, _life, _luggage
    _door, _luggage = door, luggage
    with contextlib.suppress(OSError):  # no /proc: then only the calls themselves end with the parent
        _life = os.open(f"/proc/self/fd/{life.fileno()}", os.O_RDONLY | os.O_NONBLOCK)  # the others have it, too
        _follow_parent(_life)


def _follow_parent(life: int) -> None:
    """End when the parent does, also while waiting for the hosted call, which then never comes."""
    from taskpool._engine import stop

    stop.lead_own_group()
    stop.arm_life_pipe(life)


def in_pool() -> None:
    """Take the next channel that the parent has sent through the door, and be its worker, in place of a Pool's task.

    The process ends with it, inside this call: there it holds none of the locks that a Pool's workers share.
    """
    import socket
    from multiprocessing import process

    from taskpool._engine.channel import WorkerEnd

    assert _door is not None
    _data, fds, _flags, _address = socket.recv_fds(_door, 1, 8)
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # tasks may start processes
    in_process(WorkerEnd(*fds), _luggage)
    os._exit(0)
