"""Which processes belong to this test run, read from /proc, and what a test left behind."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing.forkserver
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

_PR_SET_CHILD_SUBREAPER = 36
_SHM = Path("/dev/shm")
_SEMAPHORES = f"mp{os.getpid()}"  # begins the names of multiprocessing's semaphores of this run
_own: set[int] = set()  # the processes that this one started itself


@attrs.frozen
class Process:
    """One line of the process table.

    Attributes:
        pid: Its id.
        parent: Its parent's id.
        state: One letter as in ps: R, S, D, T, Z...
    """

    pid: int
    parent: int
    state: str

    @property
    def command(self) -> str:
        """Its command line; nothing once it has ended."""
        return _bytes(f"/proc/{self.pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()

    def __repr__(self) -> str:
        """Show it with its command line."""
        return f"<{self.pid} of {self.parent} {self.state} {self.command[:120]}>"

    @property
    def zombie(self) -> bool:
        """Whether it has ended and waits to be reaped."""
        return self.state in "ZX"


def table() -> list[Process]:
    """Return all processes of the machine."""
    found = map(read, _numbers("/proc"))
    return [process for process in found if process]


def read(pid: int) -> Process | None:
    """Return one process, or None if there is none of that id."""
    stat = _bytes(f"/proc/{pid}/stat")
    if not stat:
        return None
    state, parent = stat[stat.rindex(b")") + 2 :].split(maxsplit=2)[:2]
    return Process(pid, int(parent), state.decode())


def _bytes(path: str) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY)  # pathlib would take most of the time that an audit takes
    except OSError:
        return b""
    try:
        return os.read(file, 1 << 20)
    except OSError:  # it ended meanwhile
        return b""
    finally:
        os.close(file)


def alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    process = read(pid)
    return process is not None and not process.zombie


def resident() -> int:
    """Return how many bytes of memory this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_memory_files() -> int:
    """Return how many bytes the files of memory have that this process has open."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if "memfd:" in str(link.readlink()):
                total += link.stat().st_blocks * 512
    return total


def descendants(processes: list[Process] | None = None) -> list[Process]:
    """Return all processes below this one: `adopt_orphans` keeps those below it whose parent has ended."""
    children: dict[int, list[Process]] = {}
    for process in table() if processes is None else processes:
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    pending = [os.getpid()]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += [process.pid for process in below]
    return found


def marked(variable: str, value: str) -> list[Process]:
    """Return the living processes that were started with `variable` set to `value` in their environment."""
    wanted = f"{variable}={value}\0".encode()  # with its end: another value may begin like this one
    return [process for process in table() if not process.zombie and wanted in _bytes(f"/proc/{process.pid}/environ")]


# ---------------------------------------------------------------------------------------------- orphans


def adopt_orphans() -> None:
    """Make this process the parent of each orphan below it, and remember which processes it started itself."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    posix: Any = sys.modules["_posixsubprocess"]
    posix.fork_exec = subprocess._fork_exec = _remembering(posix.fork_exec)  # type: ignore[attr-defined]
    os.fork, os.posix_spawn = _remembering(os.fork), _remembering(os.posix_spawn)


def _remembering(start: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(start)
    def starting(*args: Any, **kwargs: Any) -> int:
        pid = start(*args, **kwargs)
        if pid:
            _own.add(pid)
        return pid

    return starting


def reap_adopted() -> list[Process]:
    """Reap orphans that have ended, which on a usual system is the work of process 1; return all other processes."""
    processes = table()
    _own.intersection_update([process.pid for process in processes])
    adopted = [p for p in processes if p.zombie and p.parent == os.getpid() and p.pid not in _own]
    for process in adopted:
        os.waitpid(process.pid, os.WNOHANG)
    return [process for process in processes if process not in adopted]


# ---------------------------------------------------------------------------------------------- leaks


@attrs.frozen
class Census:
    """What exists at one moment: processes, threads, file descriptors, shared-memory names."""

    processes: dict[int, Process]
    threads: dict[int, str]
    descriptors: dict[int, str]
    names: set[str]

    def size(self) -> int:
        """Return how many things there are."""
        return len(self.processes) + len(self.threads) + len(self.descriptors)

    def new_since(self, before: Census) -> list[str]:
        """Return in words what is here and was not there before."""
        return [
            *(f"process {p}" for pid, p in self.processes.items() if pid not in before.processes),
            *(f"thread {name}" for ident, name in self.threads.items() if ident not in before.threads),
            *(f"descriptor {fd} {n}" for fd, n in self.descriptors.items() if before.descriptors.get(fd) != n),
            *(f"/dev/shm/{name}" for name in self.names - before.names if not of_strangers(name)),
        ]


def census() -> Census:
    """Count what exists now."""
    return Census(
        {process.pid: process for process in descendants(reap_adopted())},
        dict(_threads()),
        dict(_descriptors()),
        {path.name for path in _SHM.iterdir()} if _SHM.is_dir() else set(),
    )


def _threads() -> Iterator[tuple[int, str]]:
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    for ident in _numbers("/proc/self/task"):
        yield ident, known.get(ident, "(not Python's)")


def _descriptors() -> Iterator[tuple[int, str]]:
    for number in _numbers("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of this very listing
            yield number, str(Path(f"/proc/self/fd/{number}").readlink())


def _numbers(folder: str) -> list[int]:
    return [int(path.name) for path in Path(folder).iterdir() if path.name.isdigit()]


def of_strangers(name: str) -> bool:
    """Return whether a shared-memory name belongs to another run of the tests on this machine."""
    if name.startswith("sem."):
        return not name.startswith(f"sem.{_SEMAPHORES}")
    ours = {os.getpid(), *(process.pid for process in descendants())}
    return any(process.pid not in ours and _maps(process.pid, name) for process in table())


def _maps(pid: int, name: str) -> bool:
    try:
        return f"/dev/shm/{name}" in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return False


def leaks(before: Census, patience: float = 5.0) -> list[str]:
    """Return what a test left behind; things on their way out get a moment."""
    deadline = time.monotonic() + patience
    while found := census().new_since(before):
        if time.monotonic() > deadline:
            return found
        gc.collect()
        time.sleep(0.01)
    return []


def end_descendants(before: Census) -> None:
    """End what a test left behind, so that the next one does not suffer from it."""
    for process in descendants():
        if process.pid not in before.processes and not process.zombie:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def start_standard_helpers() -> None:
    """Start the standard library's own helper processes, which live until the interpreter ends."""
    multiprocessing.process.current_process()._config["semprefix"] = f"/{_SEMAPHORES}"  # type: ignore[attr-defined]
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()
