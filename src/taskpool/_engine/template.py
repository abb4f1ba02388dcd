"""The template process: a fresh interpreter that has imported the worker, and forks one whenever it is asked.

It never imports `__main__`, so no guard is needed; it forks from its only thread, so no lock is ever copied in a locked
state; and what it has imported is shared with all workers. It answers on one socket:

    parent -> template   START (number, changes of state, descriptors) · REAP (pid)
    template -> parent   STARTED (number, pid) · ENDED (pid, exit code, peak memory) · FAILED (number, reason)

A worker stays unreaped until the parent says so: while it is a zombie its pid, group and session mean nothing else.
When the parent is gone the template kills what is left of its workers' sessions, and ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
import types
import warnings
from typing import Any

from taskpool._engine import stop

START, REAP, STARTED, ENDED, FAILED, PRELOAD_FAILED = range(6)
LENGTH = struct.Struct("<I")
MAX_FDS = 8


class Line:
    """The socket between parent and template: whole messages, with descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._pending = b""

    def send(self, message: tuple[Any, ...], fds: list[int] | None = None) -> None:
        """Send a message.

        Raises:
            OSError: If the other side is gone, or does not read for as long as the socket's timeout.
        """
        body = pickle.dumps(message)
        data = LENGTH.pack(len(body)) + body
        sent = socket.send_fds(self.sock, [data], fds or [])
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def receive(self) -> tuple[list[tuple[Any, ...]], list[int]] | None:
        """Return the messages that have arrived and their descriptors; None when the other side is gone."""
        try:
            data, fds, _flags, _address = socket.recv_fds(self.sock, 1 << 16, MAX_FDS)
        except BlockingIOError:
            return [], []
        except OSError:
            return None
        if not data:
            return None
        self._pending += data
        messages = []
        while len(self._pending) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._pending)[0]
            if len(self._pending) < end:
                break
            messages.append(pickle.loads(self._pending[LENGTH.size : end]))
            self._pending = self._pending[end:]
        return messages, fds


class Template:
    """The template's main loop."""

    def __init__(self, sock: socket.socket) -> None:
        self.line = Line(sock)
        self.workers: dict[int, int] = {}  # pidfd by pid
        self.released: set[int] = set()  # pids that may be reaped as soon as they end
        self.fds: list[int] = []  # descriptors that came before the rest of their message
        self.poll = select.poll()
        self.poll.register(sock, select.POLLIN)

    def serve(self) -> None:
        """Serve the parent until it is gone."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it went while it was being told something
            while self._turn():
                pass
        self._end()

    def _turn(self) -> bool:
        for fd, _event in self.poll.poll():
            if fd != self.line.sock.fileno():
                self._report_end(fd)
            elif not self._answer():
                return False
        return True

    def _answer(self) -> bool:
        received = self.line.receive()
        if received is None:
            return False
        messages, fds = received
        self.fds += fds
        for message in messages:
            if message[0] == START:
                self._start(*message[1:])
            elif message[0] == REAP:
                self._reap(message[1])
        return True

    def _start(self, number: int, changes: dict[str, Any], limits: dict[str, Any], count: int) -> None:
        fds, self.fds = self.fds[:count], self.fds[count:]
        try:
            apply_changes(changes)
            pid = os.fork()
        except OSError as error:
            self.line.send((FAILED, number, str(error)))
            pid = -1
        if pid == 0:
            self._become_worker(fds, limits)
        for fd in fds:
            os.close(fd)
        if pid > 0:
            pidfd = os.pidfd_open(pid)
            self.workers[pid] = pidfd
            self.poll.register(pidfd, select.POLLIN)
            self.line.send((STARTED, number, pid))

    def _become_worker(self, fds: list[int], limits: dict[str, Any]) -> None:
        code = 1
        try:
            self.line.sock.close()
            for pidfd in self.workers.values():
                os.close(pidfd)
            count = limits["channel"]
            channel, (out, err), tracker = fds[:count], fds[count : count + 2], fds[count + 2 :]
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)
            apply_limits(limits)
            _hand_over_identity(limits, tracker)
            _reseed()

            from taskpool._engine.channel import WorkerEnd
            from taskpool._engine.worker import main

            main(WorkerEnd(*channel), signals_are_reset=True)
            _run_finalizers()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _report_end(self, pidfd: int) -> None:
        pid = next((pid for pid, fd in self.workers.items() if fd == pidfd), None)
        if pid is None:
            return  # reaped earlier in this turn
        self.poll.unregister(pidfd)
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if result is not None:
            exited = result.si_code == os.CLD_EXITED
            code = result.si_status if exited else -result.si_status
            memory = stop.peak_of_zombie(os.P_PIDFD, pidfd) if code else None
            self.line.send((ENDED, pid, code, memory))
        if pid in self.released:
            self._reap(pid)

    def _reap(self, pid: int) -> None:
        pidfd = self.workers.get(pid)
        if pidfd is None:
            return
        stop.sweep_session(pid)
        if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None:
            self.released.add(pid)  # the parent has given it up, but it has not ended yet
            return
        self.released.discard(pid)
        del self.workers[pid]
        with contextlib.suppress(KeyError):
            self.poll.unregister(pidfd)
        os.close(pidfd)

    def _end(self) -> None:
        for pid in self.workers:
            stop.sweep_session(pid)
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)


def apply_changes(changes: dict[str, Any]) -> None:
    """Take over what has changed in the parent since the last start, for this and all further workers."""
    if "environ" in changes:
        for name in set(os.environ) - set(changes["environ"]):
            del os.environ[name]
        os.environ.update(changes["environ"])
    if "cwd" in changes:
        with contextlib.suppress(OSError):  # removed meanwhile
            os.chdir(changes["cwd"])
    if "umask" in changes:
        os.umask(changes["umask"])
    if "path" in changes:
        sys.path[:] = changes["path"]
    if "argv" in changes:
        sys.argv[:] = changes["argv"]
    if "filters" in changes:
        warnings.filters[:] = changes["filters"]  # type: ignore[index]
        getattr(warnings, "_filters_mutated", getattr(warnings, "_filters_mutated_lock_held", lambda: None))()
    for module in changes.get("imports", ()):
        with contextlib.suppress(Exception):
            __import__(module)


def apply_limits(limits: dict[str, Any]) -> None:
    """Take over the parent's resource limits and CPU affinity."""
    import resource

    for number, pair in limits["rlimits"].items():
        with contextlib.suppress(ValueError, OSError):
            if resource.getrlimit(number) != pair:
                resource.setrlimit(number, pair)
    with contextlib.suppress(OSError):
        if os.sched_getaffinity(0) != limits["affinity"]:
            os.sched_setaffinity(0, limits["affinity"])


def _hand_over_identity(limits: dict[str, Any], tracker: list[int]) -> None:
    """Make this process look to multiprocessing like a child of the parent: managers and shared memory work."""
    from multiprocessing import process

    process._current_process._config["authkey"] = process.AuthenticationString(limits["authkey"])  # type: ignore[attr-defined]
    process._current_process._name = limits["name"]  # type: ignore[attr-defined]
    if tracker:
        from multiprocessing import resource_tracker

        # The parent's own tracker. One of this worker's would unlink the parent's shared memory at the worker's end.
        resource_tracker._resource_tracker._fd = tracker[0]  # type: ignore[attr-defined]


def _reseed() -> None:
    """Give each worker its own stream of NumPy's global generator; `random` reseeds itself after a fork."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _run_finalizers() -> None:
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util._exit_function()


def _preload(line: Line, modules: list[str]) -> None:
    parent = os.getppid()

    def look_for_parent(*_: object) -> None:
        if os.getppid() != parent:  # it ended while an import takes its time
            os._exit(1)

    signal.signal(signal.SIGALRM, look_for_parent)
    signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)
    for module in modules:
        try:
            __import__(module)
        except BaseException as error:
            line.send((PRELOAD_FAILED, module, f"{type(error).__name__}: {error}", traceback.format_exc()))
            os._exit(1)
    stop.clear_timers()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def main(fd: int, preload: list[str], *, collects: bool = True) -> None:
    """Be the template on the socket `fd`. Called by the parent with `python -c`, in a session of its own.

    Args:
        fd: The socket's descriptor.
        preload: Modules to import.
        collects: Whether the garbage collector, which has been off until now, shall run from here on.
    """
    stop.reset_signals()
    sys.modules["__main__"] = types.ModuleType("__main__")  # where the parent's functions will live
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)  # noqa: FBT003
    # What every worker needs, once here instead of in each of them.
    import faulthandler  # noqa: F401
    import gc
    import multiprocessing.process  # noqa: F401
    import resource  # noqa: F401

    import taskpool._engine.forwarding
    import taskpool._engine.worker
    import taskpool._levels  # noqa: F401

    template = Template(sock)
    if collects:
        gc.enable()
    if preload:
        _preload(template.line, preload)
        stop.reset_signals()  # those that a module brought with it
        gc.collect()
    gc.freeze()  # what is here now is shared with all workers: the collector must not touch, and so copy, its pages
    template.serve()
    os._exit(0)
