"""Descriptors that only the parent may hold: a forked child closes them before it runs anything else."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable


class _ParentEnds:
    """The descriptors that only the parent may hold. A forked child closes them before it runs anything else.

    The lock keeps a fork of another thread out of the moment between making descriptors and noting them here. It is
    reentrant, since a signal handler that forks may interrupt that very moment.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.fds: set[int] = set()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._close_in_child
            )

    # Not the lock's own methods: a child has a lock of its own, and the old one stays locked there for ever.

    def _before_fork(self) -> None:
        self.lock.acquire()

    def _after_fork(self) -> None:
        self.lock.release()

    def _close_in_child(self) -> None:
        fds, self.fds = self.fds, set()  # the garbage collector may come in between, and close one here that is gone
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.lock = threading.RLock()

    def close(self, fd: int) -> None:
        with self.lock:
            if fd in self.fds:
                self.fds.discard(fd)
                os.close(fd)


_parent_ends = _ParentEnds()


def keep_from_children(fds: Iterable[int]) -> None:
    """Note descriptors that a forked child of this process must close."""
    _parent_ends.fds.update(fds)


def let_child_keep(fds: Iterable[int]) -> None:
    """Forget what was noted: the next fork is of the child that shall have these descriptors."""
    _parent_ends.fds.difference_update(fds)


def no_forks() -> threading.RLock:
    """Return the lock under which no other thread forks, so that no child gets what has not been noted yet."""
    return _parent_ends.lock


def close_kept(fd: int) -> None:
    """Close a descriptor that was noted by `keep_from_children`. Once: its number may soon mean another file."""
    _parent_ends.close(fd)


def memory_file() -> int:
    """Open a new file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("taskpool", os.MFD_CLOEXEC)
    import tempfile

    fd, path = tempfile.mkstemp(prefix="taskpool-")
    os.unlink(path)
    return fd
