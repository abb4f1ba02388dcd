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

_end: WorkerEnd | None = None
_door: socket.socket | None = None
_life: int | None = None
_initializer: tuple[Initializer, tuple[Any, ...]] = (None, ())


def in_process(end: WorkerEnd, initializer: Initializer, initargs: tuple[Any, ...]) -> None:
    """Be a worker, as the target of a `multiprocessing.Process`."""
    from taskpool._engine import worker

    worker.main(end, initializer, initargs)


def keep(end: WorkerEnd, initializer: Initializer, initargs: tuple[Any, ...]) -> None:
    """Be the initializer of a `ProcessPoolExecutor`: keep what the hosted call needs."""
    global _end, _initializer
    _end, _initializer = end, (initializer, initargs)
    _follow_parent(end.life)


def in_executor() -> None:
    """Be a worker, as the one call of a `ProcessPoolExecutor`."""
    assert _end is not None
    in_process(_end, *_initializer)


def open_door(door: socket.socket, life: Connection, initializer: Initializer, initargs: tuple[Any, ...]) -> None:
    """Be the initializer of a `multiprocessing.Pool`: keep what its hosted calls need."""
    global _door, _life, _initializer
    _door, _initializer = door, (initializer, initargs)
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
    in_process(WorkerEnd(*fds), *_initializer)
    os._exit(0)
