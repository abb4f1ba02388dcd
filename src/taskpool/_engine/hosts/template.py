"""The template process: started once, it forks the workers."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from taskpool import errors
from taskpool._engine import stop
from taskpool._engine import template as tpl
from taskpool._engine.descriptors import close_kept, keep_from_children, no_forks
from taskpool._engine.hosts.base import CLOSE_TIME, PENDING, Host, Pending

if TYPE_CHECKING:
    from taskpool._engine.handle import WorkerHandle

MOST_REQUESTS = 16  # unanswered starts at a template, of some KB each, so that its socket has room for them

# What says that a template has ended, or is stopped. Anything else that keeps a request from it is this process's own.
_TEMPLATE_IS_GONE = (BrokenPipeError, ConnectionResetError, TimeoutError)


class TemplateHost(Host):
    """Starts workers by a template process (`template.py`); one that has died is replaced, its workers live on."""

    def __init__(self, preload: tuple[str, ...] = ()) -> None:
        self._preload = list(preload)
        self._template: _TemplateProcess | None = None
        self._by_pid: dict[int, WorkerHandle] = {}

    def free_starts(self) -> int:
        """Return how many requests may be sent: so few lie unread that the socket has room for all."""
        return MOST_REQUESTS - (0 if self._template is None else len(self._template.starting))

    def prepare(self) -> None:
        """Start the template, which needs a while until it can answer."""
        import resource  # noqa: F401  (while no signal handler can come in between)

        lock = no_forks()  # not waited for: who has it may have been interrupted by a handler, which waits for this
        if self._template is None and lock.acquire(blocking=False):
            try:
                with contextlib.suppress(Exception):  # the first start tries again, and says what is wrong
                    self._new_template()
            finally:
                lock.release()

    def start(self, worker: WorkerHandle) -> None:
        """Send a start request; the answer comes over the socket."""
        try:
            self._request(worker)
        except _TEMPLATE_IS_GONE:
            self._request(worker)
        worker.channel.worker_end.close()

    def _request(self, worker: WorkerHandle) -> None:
        template = worker.hosted = self._living_template()
        try:
            template.request_start(worker)
        except _TEMPLATE_IS_GONE:
            self._drop(template)
            raise

    def _living_template(self) -> _TemplateProcess:
        template = self._template
        if template is not None and not template.fits():
            self._drop(template)
            template = None
        return template or self._new_template()

    def _new_template(self) -> _TemplateProcess:
        template = self._template = _TemplateProcess(self._preload)
        self._crew.watch(template.line.sock.fileno(), lambda: self._read(template))
        return template

    def _read(self, template: _TemplateProcess) -> None:
        received = template.line.receive()
        if received is None:
            self._drop(template)
            return
        for kind, *values in received[0]:
            if kind == tpl.STARTED:
                self._started(template, *values)
            elif kind == tpl.ENDED:
                self._ended(template, *values)
            elif kind == tpl.FAILED:
                self._failed(template, values[0], OSError(f"the template process cannot fork: {values[1]}"))
            elif kind == tpl.PRELOAD_FAILED:
                self._preload_failed(template, *values)

    def _started(self, template: _TemplateProcess, number: int, pid: int) -> None:
        template.has_started = True
        worker = template.starting.pop(number, None)
        if worker is not None and worker.hosted is not None:
            self._by_pid[pid] = worker
            self._crew.process_known(worker, pid)

    def _ended(self, template: _TemplateProcess, pid: int, exitcode: int, memory: int | None) -> None:
        worker = self._by_pid.get(pid)
        if worker is not None:
            self._crew.process_ended(worker)  # what it leaves is looked at there
            if memory is not None:
                worker.peak_memory = memory + worker.others_memory
            self._crew.exitcode_known(worker, exitcode)
        else:
            with contextlib.suppress(OSError):  # it was given up before it said who it is
                template.line.send((tpl.REAP, pid))

    def _failed(self, template: _TemplateProcess, number: int, error: Exception) -> None:
        worker = template.starting.pop(number, None)
        if worker is not None:
            self._crew.start_failed(worker, error)

    def _preload_failed(self, template: _TemplateProcess, module: str, text: str, trace: str) -> None:
        error = ImportError(f"preload={module!r} cannot be imported in a worker: {text}")
        error.add_note(trace)
        for number in list(template.starting):
            self._failed(template, number, error)

    def start_unanswered(self, worker: WorkerHandle) -> None:
        """Replace the template, which is stopped, or does not come to the end of what it preloads."""
        template: _TemplateProcess | None = worker.hosted
        if template is not None and template is self._template:
            self._drop(template)

    def _drop(self, template: _TemplateProcess) -> None:
        """A template is gone, or fits no longer. Exit codes of its workers are lost; those that it did not start fail.

        It is killed: at the end of its socket it would take this process for gone, and end its workers, which live on.
        """
        template.kill()
        self._close(template)
        for worker in [worker for worker in template.starting.values() if worker.hosted is template]:
            if template.has_started:
                self._crew.start_lost(worker)
            else:
                error = errors.WorkerCrashedError("the template process ended before it could start a worker")
                self._crew.start_failed(worker, error)

    def _close(self, template: _TemplateProcess) -> None:
        self._crew.unwatch(template.line.sock.fileno())
        template.close()
        if self._template is template:
            self._template = None

    def exitcode(self, worker: WorkerHandle) -> int | Pending | None:
        """The template tells, if it lives."""
        return worker.exitcode if worker.exitcode is not None or not self.sweeps(worker) else PENDING

    def sweeps(self, worker: WorkerHandle) -> bool:
        """The template does, before it reaps, if it lives."""
        return worker.hosted is self._template

    def buried(self, worker: WorkerHandle) -> None:
        """Let the template reap it."""
        template: _TemplateProcess | None = worker.hosted
        worker.hosted = None
        if worker.pid is None or self._by_pid.pop(worker.pid, None) is None:
            return
        if template is not None and template is self._template:
            try:
                template.line.send((tpl.REAP, worker.pid))
            except OSError:  # it has just ended itself
                stop.sweep_session(worker.pid)

    def close(self) -> None:
        """End the template: it reaps what is left and goes when the socket closes."""
        if self._template is not None:
            self._close(self._template)


class _TemplateProcess:
    """The parent's side of one template process."""

    def __init__(self, preload: list[str]) -> None:
        # While this process has the template's end of the socket, or waits for the exec, a child that forked from
        # another thread would keep both from ending: the wait would last as long as that child.
        with no_forks():
            self._start(preload)

    def _start(self, preload: list[str]) -> None:
        ours, theirs = socket.socketpair()
        keep_from_children({ours.fileno()})
        ours.settimeout(CLOSE_TIME)  # there is room for what it has not read, unless that is huge; then it is replaced
        self.line = tpl.Line(ours)
        self.starting: dict[int, WorkerHandle] = {}  # requests that it has not answered
        self.has_started = False  # whether it has ever started a worker
        self._requests = 0
        try:
            self._identity = _identity()
            self._state: dict[str, Any] = _state()
            self._process = self._popen(theirs.fileno(), preload)
        except BaseException:
            close_kept(ours.detach())
            raise
        finally:
            theirs.close()
        del self._state["argv"], self._state["filters"]  # a new interpreter does not inherit these

    def _popen(self, fd: int, preload: list[str]) -> subprocess.Popen[bytes]:
        path = [os.fspath(entry) for entry in self._state["path"] if isinstance(entry, (str, os.PathLike))]
        # Without the garbage collector, which finds nothing in what is imported: 5 of 50 ms.
        code = f"import gc, sys; collects = gc.isenabled(); gc.disable(); sys.path[:] = {path!r}; "
        code += f"from taskpool._engine.template import main; main({fd}, {preload!r}, collects=collects)"
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        # Its own session from the first moment: a Ctrl-C at the terminal is not for it.
        # With a copy of the environment: the system's own may move while another thread changes it.
        return subprocess.Popen(
            [sys.executable, *flags, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[fd],
            env=self._state["environ"],
            start_new_session=True,
        )

    def fits(self) -> bool:
        """Whether its forks still have this process's user and groups."""
        return self._identity == _identity()

    def request_start(self, worker: WorkerHandle) -> None:
        """Ask for a worker.

        Raises:
            OSError: If it cannot be asked; one of _TEMPLATE_IS_GONE if that is for good.
        """
        state = _state()
        changes = {key: value for key, value in state.items() if self._state.get(key) != value}
        if "cloudpickle" in sys.modules and "cloudpickle" not in self._state:
            changes["imports"] = ["cloudpickle"]  # tasks that came by value need it: once here, not in each worker
            state["cloudpickle"] = True
        with _standard_streams() as streams:
            channel = worker.channel.worker_end.fds
            fds = [*channel, *streams, *_tracker_fd()]
            limits = {**_limits(f"worker-{worker.index}"), "channel": len(channel)}
            self.line.send((tpl.START, self._requests, changes, limits, len(fds)), fds)
        self.starting[self._requests] = worker
        self._requests += 1
        self._state.update(state)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """Close the socket, which ends the template, and reap it; SIGKILL if it does not go, or may be preloading."""
        if not self.has_started:
            self.kill()
        close_kept(self.line.sock.detach())
        if not self._wait():
            self.kill()
            self._wait()

    def _wait(self) -> bool:
        """Wait a while for its end, and reap it; return whether it has ended."""
        end = stop.ProcessHandle(self._process.pid)  # `Popen.wait` with a bound sleeps, and looks again: 2 ms too long
        with contextlib.suppress(subprocess.TimeoutExpired):
            if end.fd is None:
                self._process.wait(CLOSE_TIME)
            else:
                poll = select.poll()
                poll.register(end.fd, select.POLLIN)
                poll.poll(CLOSE_TIME * 1e3)
        end.close()
        return self._process.poll() is not None


def _identity() -> tuple[Any, ...]:
    return os.getresuid(), os.getresgid(), os.getgroups(), sys.executable


def _state() -> dict[str, Any]:
    """Return what a worker shall have as the parent has it now."""
    state: dict[str, Any] = {
        "environ": _environ(),
        "path": list(sys.path),
        "argv": list(getattr(sys, "argv", [])),
    }
    with contextlib.suppress(OSError):
        state["cwd"] = os.getcwd()
    umask = _umask()
    if umask is not None:
        state["umask"] = umask
    state["filters"] = [entry for entry in warnings.filters if _is_plain_filter(entry)]
    return state


def _environ() -> dict[str, str]:
    """Copy the environment, which other threads may be changing."""
    while True:
        with contextlib.suppress(KeyError, RuntimeError):
            return dict(os.environ)


def _umask() -> int | None:
    # os.umask can only be asked by changing it, for all threads.
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    return None


def _is_plain_filter(entry: Any) -> bool:
    return bool(entry[2].__module__ == "builtins")


def _limits(name: str) -> dict[str, Any]:
    import resource
    from multiprocessing import process

    numbers = {getattr(resource, key) for key in dir(resource) if key.startswith("RLIMIT_")}
    return {
        "rlimits": {number: resource.getrlimit(number) for number in numbers},
        "affinity": os.sched_getaffinity(0),
        "authkey": bytes(process.current_process().authkey),
        "name": name,
    }


@contextlib.contextmanager
def _standard_streams() -> Iterator[list[int]]:
    """Give the descriptors that a worker gets as 1 and 2: the null device for one that is closed here."""
    is_open = [_is_open(fd) for fd in (1, 2)]
    if all(is_open):
        yield [1, 2]
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        yield [fd if fd_is_open else null for fd, fd_is_open in zip((1, 2), is_open, strict=True)]
    finally:
        os.close(null)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _tracker_fd() -> list[int]:
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    fd = None if tracker is None else tracker._resource_tracker._fd
    return [fd] if fd is not None and _is_open(fd) else []
