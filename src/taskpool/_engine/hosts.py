"""Who starts the processes: the only thing that differs between the hosted backends.

A host starts a process that calls `worker.main` on the worker's end of a channel, tells its pid where it knows it, and
its exit code where it learns it. Everything else goes over the channel, and is the same for all.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from taskpool import errors
from taskpool._engine import entry, stop
from taskpool._engine import template as tpl
from taskpool._engine.channel import WorkerEnd
from taskpool._engine.descriptors import close_kept, keep_from_children, no_forks
from taskpool._engine.launches import Launches

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from taskpool._engine.crew import Crew
    from taskpool._engine.handle import WorkerHandle

FORKSERVER_UNKNOWN = 255  # what multiprocessing's forkserver answers when it does not know an exit code
MOST_REQUESTS = 16  # unanswered starts at a template, of some KB each, so that its socket has room for them
ANSWER_TIME = 10.0  # seconds in which a call of a Pool must say who its worker is: such a call can get lost
CLOSE_TIME = 1.0  # seconds that closing an engine may take before it is killed or left


# What says that a template has ended, or is stopped. Anything else that keeps a request from it is this process's own.
_TEMPLATE_IS_GONE = (BrokenPipeError, ConnectionResetError, TimeoutError)


class _Pending:
    """The exit code is not known yet; the host will say it."""


PENDING: Final = _Pending()


class Host:
    """Starts and ends processes. All methods are called by the dispatcher, and none blocks for long."""

    exitcode_time = 0.25  # seconds that an exit code which is not known at once is waited for

    def attach(self, crew: Crew) -> None:
        """Learn whom to tell about pids and exit codes."""
        self._crew = crew
        self._exit = _ExitCodes(crew)

    def prepare(self) -> None:
        """Begin what takes long before the first start. On another thread than the dispatcher's, which does not run yet."""

    def start(self, worker: WorkerHandle) -> None:
        """Begin to start a process for `worker`, and close the parent's copies of the worker's end.

        Raises:
            Exception: If it cannot be started.
        """
        raise NotImplementedError

    def free_starts(self) -> int:
        """Return how many starts may be begun now."""
        return sys.maxsize

    def answer_due(self, worker: WorkerHandle) -> float:
        """When a worker that starts must have said who it is, where that can get lost."""
        return math.inf

    def start_unanswered(self, worker: WorkerHandle) -> None:
        """A start did not answer by `answer_due`, or not within the time for being ready."""

    def pid_known(self, worker: WorkerHandle) -> None:
        """A worker said who it is."""

    def exitcode(self, worker: WorkerHandle) -> int | _Pending | None:
        """Return the exit code of a process that has ended; None if it cannot be known, PENDING if it will be told."""
        return None

    def sweeps(self, worker: WorkerHandle) -> bool:
        """Whether the host itself ends what a dead worker leaves in its session."""
        return False

    def buried(self, worker: WorkerHandle) -> None:
        """All that the worker left has been settled: free what is kept about it."""

    def hint(self, worker: WorkerHandle) -> str:
        """Return what to say about a process that ended before it was ready."""
        code = self.exitcode(worker)
        return f" (exit code {code})" if isinstance(code, int) else ""

    def close(self) -> None:
        """End what was kept for starting processes. All workers have ended."""


# The template process


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

    def exitcode(self, worker: WorkerHandle) -> int | _Pending | None:
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


# Processes of multiprocessing

_processes: weakref.WeakSet[Any] = weakref.WeakSet()  # those that host our workers
_pools: weakref.WeakSet[Any] = weakref.WeakSet()  # those that start such processes themselves


def _disown_in_child() -> None:
    """In a forked child: keep its multiprocessing from ending or awaiting our workers, which are not its children.

    At its exit it would send SIGTERM to those of a Pool, and fail to join the others.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        ours = {*_processes, *(worker for pool in _pools for worker in pool._pool)}
        process._children.difference_update(ours)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_in_child)


class LaunchingHost(Host):
    """Starts processes by multiprocessing, in whichever way.

    Under fork at once, on the dispatcher's thread: nothing blocks there, and a fork on another thread would give the
    child what this one is about to note or to close. Under spawn and forkserver on threads, by `Launches`.

    Args:
        context: The start method.
        initializer: Called in each process; it goes as its argument, so that locks and queues pass by inheritance.
        initargs: Its arguments.
    """

    def __init__(self, context: BaseContext, initializer: Any = None, initargs: tuple[Any, ...] = ()) -> None:
        self._context = context
        self._luggage = entry.Luggage(initializer, initargs)
        self._forks = context.get_start_method() == "fork"

    def attach(self, crew: Crew) -> None:
        """Learn whom to tell about pids and exit codes, and what came of starts."""
        super().attach(crew)
        self._launches: Launches[Any, Any] = Launches(
            crew.post, adopt=self._adopt, fail=self._fail, dispose=self._dispose
        )

    def free_starts(self) -> int:
        """Return how many starts may be begun now: where one may block, each is a thread."""
        return sys.maxsize if self._forks else self._launches.free()

    def start(self, worker: WorkerHandle) -> None:
        """Start a process that gets the worker's end, and closes the parent's copies when it has."""
        end = worker.channel.worker_end.move()
        if self._forks:
            self._adopt(worker, _fork_with(end, lambda: self._make(end)))
        else:
            self._launches.begin(worker, lambda: self._make(end), end)

    def _make(self, end: WorkerEnd) -> Any:
        """Start a process that is a worker on `end`. Perhaps on another thread."""
        raise NotImplementedError

    def _adopt(self, key: Any, made: Any) -> None:
        """Take over what was made for a key of `_launches`."""
        raise NotImplementedError

    def _dispose(self, made: Any) -> None:
        """End what was made and is not wanted any more. Perhaps on another thread."""
        raise NotImplementedError

    def _fail(self, key: Any, error: BaseException) -> None:
        """Nothing could be made for a key of `_launches`."""
        if key.process is not None:
            return  # it said who it is, so it was made after all, and its end will be seen
        self._crew.start_failed(key, error)

    def hint(self, worker: WorkerHandle) -> str:
        """Add what is most often wrong under this start method."""
        return super().hint(worker) + guard_hint(self._context)

    def close(self) -> None:
        """Wait a while for the starts that were given up."""
        self._launches.close(CLOSE_TIME)


def _fork_with(end: WorkerEnd, make: Callable[[], Any]) -> Any:
    """Run `make`, which forks, so that the child keeps the worker's end and none of the parent's."""
    end.hand_over()
    try:
        with _unsaid_of_forks():
            return make()
    finally:
        end.take_back()
        end.close()


@contextlib.contextmanager
def _unsaid_of_forks() -> Iterator[None]:
    # mp_context="fork" was asked for; that it is unsafe beside threads stands in the documentation.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork")
        yield


class ProcessHost(LaunchingHost):
    """Starts each worker as one `multiprocessing.Process`."""

    def _make(self, end: WorkerEnd) -> Any:
        arguments = end, self._luggage
        process = self._context.Process(target=entry.in_process, args=arguments)  # type: ignore[attr-defined]
        _processes.add(process)
        process.start()
        return process

    def _adopt(self, key: WorkerHandle, made: Any) -> None:
        key.hosted = made
        self._crew.process_known(key, made.pid)

    def _dispose(self, made: Any) -> None:
        made.kill()
        _free(made)

    def exitcode(self, worker: WorkerHandle) -> int | _Pending | None:
        """Ask the process object, which reaps it."""
        return PENDING if worker in self._launches else self._exit.code(worker, worker.hosted)

    def buried(self, worker: WorkerHandle) -> None:
        """Reap it and free the process object."""
        self._launches.give_up(worker)
        process, worker.hosted = worker.hosted, None
        if process is not None:
            self._exit.forget(process)
            _free(process)


def _free(process: Any) -> None:
    """Reap a process that has been killed, or has ended, and free the object."""
    process.join(CLOSE_TIME)
    with contextlib.suppress(ValueError):  # it does not end; multiprocessing keeps it
        process.close()


class _ExitCodes:
    """Asks process objects of multiprocessing for their exit code, and tells the crew what comes later.

    Later: under forkserver the code comes over a pipe, the sentinel, behind the process's end; and an engine's own
    thread may be reaping the process at this moment.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._watched: dict[Any, int] = {}

    def code(self, worker: WorkerHandle, process: Any) -> int | _Pending | None:
        """Return the exit code; None if there is nobody to ask, PENDING if it will be told."""
        if process is None:
            return None
        code: int | None = process.exitcode
        if code is None:
            self._watch(worker, process)
            return PENDING
        return None if code == FORKSERVER_UNKNOWN and type(process).__name__ == "ForkServerProcess" else code

    def _watch(self, worker: WorkerHandle, process: Any) -> None:
        if process not in self._watched:
            fd = self._watched[process] = process.sentinel

            def tell() -> None:
                self._crew.unwatch(fd)
                code = self.code(worker, process)
                if isinstance(code, _Pending):  # it lets go of the sentinel just before it can be reaped
                    self._crew.end_seen(worker)
                else:
                    self._crew.exitcode_known(worker, code)

            self._crew.watch(fd, tell)

    def forget(self, process: Any) -> None:
        """Watch a process no longer."""
        fd = self._watched.pop(process, None)
        if fd is not None:
            self._crew.unwatch(fd)


def guard_hint(context: BaseContext) -> str:
    """Return the sentence about the guard, where a worker imports the main module."""
    if context.get_start_method() == "fork":
        return ""
    return (
        '; under mp_context="spawn" and "forkserver" each worker imports the main module first, so what starts work '
        'there must stand behind `if __name__ == "__main__":` (the default backend needs no guard)'
    )


# ProcessPoolExecutor


def _end(executor: Any) -> Callable[[Any], None]:
    def end(call: Any) -> None:
        # The worker answered the sentinel. Not if it died: then the executor ends by itself, and holds its lock here.
        if call.exception() is None:
            executor.shutdown(wait=False)

    return end


class FuturesHost(LaunchingHost):
    """Starts each worker as the one long call of a `ProcessPoolExecutor(max_workers=1)`."""

    def __init__(self, context: BaseContext, initializer: Any = None, initargs: tuple[Any, ...] = ()) -> None:
        super().__init__(context, initializer, initargs)
        self._ending: list[Any] = []  # executors whose manager thread still runs: dropping one earlier can deadlock it

    def start(self, worker: WorkerHandle) -> None:
        """Start an executor with this worker's end as its initializer's argument."""
        self._forget_ended()
        super().start(worker)

    def _make(self, end: WorkerEnd) -> tuple[Any, ...]:
        from concurrent.futures import ProcessPoolExecutor

        arguments = end, self._luggage
        executor = ProcessPoolExecutor(1, mp_context=self._context, initializer=entry.keep, initargs=arguments)
        executor.submit(entry.in_executor).add_done_callback(_end(executor))
        process = next(iter((executor._processes or {}).values()), None)
        if process is not None:
            _processes.add(process)
        return executor, process, executor._executor_manager_thread

    def _adopt(self, key: WorkerHandle, made: tuple[Any, ...]) -> None:
        key.hosted = made
        process = made[1]
        if process is not None and process.pid is not None:
            self._crew.process_known(key, process.pid)

    def _dispose(self, made: tuple[Any, ...]) -> None:
        executor, process, thread = made
        executor.shutdown(wait=False, cancel_futures=True)
        if process is not None and thread is not None:
            process.kill()
            thread.join(CLOSE_TIME)  # it reaps the process
            _free(process)

    def exitcode(self, worker: WorkerHandle) -> int | _Pending | None:
        """Ask the process object."""
        if worker in self._launches:
            return PENDING
        return self._exit.code(worker, worker.hosted[1] if worker.hosted is not None else None)

    def buried(self, worker: WorkerHandle) -> None:
        """Let the executor end; keep it until its manager thread has."""
        self._launches.give_up(worker)
        hosted, worker.hosted = worker.hosted, None
        if hosted is not None:
            self._exit.forget(hosted[1])
            hosted[0].shutdown(wait=False, cancel_futures=True)
            self._ending.append(hosted)

    def _forget_ended(self) -> None:
        living = []
        for hosted in self._ending:
            _executor, process, thread = hosted
            if thread is not None and thread.is_alive():
                living.append(hosted)
            elif process is not None:
                with contextlib.suppress(ValueError):  # its descriptors would wait for the garbage collector
                    process.close()
        self._ending = living

    def close(self) -> None:
        """Wait for the manager threads, all within one bound."""
        super().close()
        deadline = time.monotonic() + CLOSE_TIME
        for _executor, _process, thread in self._ending:
            if thread is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        self._forget_ended()


# Pool


class PoolHost(LaunchingHost):
    """Starts workers as long calls of a `multiprocessing.Pool`, which restarts a process for the next call itself.

    A killed process may take one of the Pool's own locks with it, if it was waiting for its call; then a start is not
    answered, and the Pool is replaced. The old one is kept until its living workers have ended.

    What a worker is hosted by is the Pool, the call, and when that must be answered; workers may wait for a Pool that
    is still being opened.
    """

    def __init__(
        self, context: BaseContext, size: int, initializer: Any = None, initargs: tuple[Any, ...] = ()
    ) -> None:
        super().__init__(context, initializer, initargs)
        self._size = size
        self._pool: _HostingPool | None = None

    def free_starts(self) -> int:
        """Return how many starts may be begun now: they are calls, and need no thread."""
        return sys.maxsize

    def start(self, worker: WorkerHandle) -> None:
        """Send the worker's end through the door and have the Pool call for it, once it is open."""
        if self._pool is None:
            self._open_pool()
        worker.hosted = self._pool, None, math.inf
        if self._pool not in self._launches:
            self._call_for(worker)

    def _open_pool(self) -> None:
        pool = _HostingPool(self._context, self._size, self._luggage)
        if self._forks:
            with _unsaid_of_forks():
                pool.open()
            self._watch_first(pool)
        else:
            self._launches.begin(pool, pool.open)
        self._pool = pool

    def _call_for(self, worker: WorkerHandle) -> None:
        pool: _HostingPool = worker.hosted[0]
        worker.hosted = pool, pool.host(worker.channel.worker_end), time.monotonic() + ANSWER_TIME
        worker.channel.worker_end.close()

    def _adopt(self, key: _HostingPool, made: _HostingPool) -> None:
        self._watch_first(made)
        for worker in self._crew.hosted_by(key):
            try:
                self._call_for(worker)
            except OSError as error:
                self._crew.start_failed(worker, error)
            else:
                self._crew.call_sent(worker)

    def _fail(self, key: _HostingPool, error: BaseException) -> None:
        self._pool = None if self._pool is key else self._pool
        waiting = self._crew.hosted_by(key)
        for worker in waiting[1:]:
            self._crew.start_lost(worker)  # it counts once
        for worker in waiting[:1]:
            super()._fail(worker, error)

    def _dispose(self, made: _HostingPool) -> None:
        made.end()

    def _watch_first(self, pool: _HostingPool) -> None:
        """See whether the Pool's first processes all end before one becomes a worker.

        The Pool itself would start them again, ten times a second and for ever.
        """
        processes = len(pool.first)
        for process in pool.first:

            def ended(process: Any = process) -> None:
                self._crew.unwatch(process.sentinel)
                pool.first.remove(process)
                if not pool.first:
                    self._cannot_start(pool, processes)

            self._crew.watch(process.sentinel, ended)

    def _watch_no_more(self, pool: _HostingPool) -> None:
        for process in pool.first:
            self._crew.unwatch(process.sentinel)
        pool.first.clear()

    def _cannot_start(self, pool: _HostingPool, processes: int) -> None:
        if pool is self._pool:
            self._pool = None
        for worker in self._crew.hosted_by(pool):
            self._crew.start_died(worker, processes)
        self._end_if_unused(pool)  # it may have had no worker left

    def answer_due(self, worker: WorkerHandle) -> float:
        """When the call must have been answered."""
        return math.inf if worker.hosted is None else float(worker.hosted[2])

    def start_unanswered(self, worker: WorkerHandle) -> None:
        """Use another Pool from now on."""
        if worker.hosted is not None and worker.hosted[0] is self._pool:
            self._pool = None

    def exitcode(self, worker: WorkerHandle) -> int | _Pending | None:
        """Ask the Pool's process object, if the Pool still had it when the pid became known."""
        if worker.hosted is None or worker.pid is None:
            return None
        return self._exit.code(worker, worker.hosted[0].process(worker.pid))

    def pid_known(self, worker: WorkerHandle) -> None:
        """Keep the Pool's process object before the Pool drops it."""
        if worker.hosted is not None and worker.pid is not None:
            self._watch_no_more(worker.hosted[0])
            worker.hosted[0].process(worker.pid)

    def buried(self, worker: WorkerHandle) -> None:
        """Forget the hosted call, which the Pool would keep for ever; end a replaced Pool with its last worker."""
        hosted, worker.hosted = worker.hosted, None
        if hosted is not None:
            pool, call, _due = hosted
            self._exit.forget(pool.drop_process(worker.pid))
            if call is not None:
                pool.forget(call)
            self._end_if_unused(pool)

    def _end_if_unused(self, pool: _HostingPool) -> None:
        """End a replaced Pool once nothing runs in it."""
        if pool is not self._pool and not pool.calls and not self._crew.hosted_by(pool):
            self._end_pool(pool)

    def _end_pool(self, pool: _HostingPool) -> None:
        if pool in self._launches:
            self._launches.give_up(pool)  # it is ended once it is open
        else:
            self._watch_no_more(pool)
            pool.end()

    def close(self) -> None:
        """End the Pool."""
        if self._pool is not None:
            self._end_pool(self._pool)
            self._pool = None
        super().close()


class _HostingPool:
    """One `multiprocessing.Pool` and the door through which its processes get their channels."""

    def __init__(self, context: BaseContext, size: int, luggage: entry.Luggage) -> None:
        from multiprocessing.connection import Connection

        self._make = context.Pool
        self._size = size
        self._luggage = luggage
        life, self._life = os.pipe()
        self._reader = Connection(life, writable=False)
        try:
            self._ours, self._theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        except OSError:
            os.close(self._life)
            self._reader.close()
            raise
        keep_from_children({self._ours.fileno(), self._life})
        self._ours.settimeout(0)
        self._processes: dict[int | None, Any] = {}
        self.calls: set[Any] = set()
        self.first: list[Any] = []
        self._ended = False

    def open(self) -> _HostingPool:
        """Start the Pool, which may block; return this."""
        try:
            self._pool = self._make(self._size, entry.open_door, (self._theirs, self._reader, self._luggage))
        except BaseException:
            self._ended = True
            self._close()
            raise
        _pools.add(self._pool)
        self.first += self._pool._pool  # type: ignore[attr-defined]
        return self

    def host(self, end: WorkerEnd) -> Any:
        """Have some process of the Pool take this worker's end; return the hosted call."""
        socket.send_fds(self._ours, [b"w"], list(end.fds))
        call = self._pool.apply_async(entry.in_pool)
        self.calls.add(call)
        return call

    def process(self, pid: int) -> Any:
        """Return the Pool's process object of this pid; it is kept, since the Pool drops it when it ends."""
        if pid not in self._processes:  # and no others: one that is dropped must not come back
            processes = list(self._pool._pool)  # type: ignore[attr-defined]
            self._processes.update((process.pid, process) for process in processes if process.pid == pid)
        return self._processes.get(pid)

    def drop_process(self, pid: int | None) -> Any:
        """Forget a process object, and return it."""
        return self._processes.pop(pid, None)

    def forget(self, call: Any) -> None:
        """Drop a hosted call from the Pool's table of unfinished ones."""
        self.calls.discard(call)
        self._pool._cache.pop(call._job, None)  # type: ignore[attr-defined]

    def end(self) -> None:
        """End the Pool, once, within a bound: `terminate` can wait for ever on a lock that a killed process held."""
        if self._ended:
            return
        self._ended = True
        thread = threading.Thread(target=self._terminate, name="taskpool-pool-end", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # Python 3.12.0 and 3.12.1 start no thread once the main thread has ended
            self._abandon()
        else:
            thread.join(CLOSE_TIME)
            if thread.is_alive():
                self._abandon()
        self._close()

    def _close(self) -> None:
        close_kept(self._ours.detach())
        self._theirs.close()
        close_kept(self._life)
        self._reader.close()

    def _terminate(self) -> None:
        self._pool.terminate()
        self._pool.join()

    def _abandon(self) -> None:
        """Kill the processes of a Pool whose locks are lost, and keep it from starting others or waiting at exit."""
        from multiprocessing import pool as mp_pool

        self._pool._terminate.cancel()  # type: ignore[attr-defined]
        self._pool._state = mp_pool.TERMINATE  # type: ignore[attr-defined]
        self._pool._worker_handler._state = mp_pool.TERMINATE  # type: ignore[attr-defined]
        self._pool._change_notifier.put(None)  # type: ignore[attr-defined]
        for process in list(self._pool._pool):  # type: ignore[attr-defined]
            process.kill()
            process.join(CLOSE_TIME)


def make_context(mp_context: Any) -> BaseContext:
    """Return the multiprocessing context that a user named or passed."""
    from multiprocessing import get_context

    context: BaseContext = get_context(mp_context) if mp_context is None or isinstance(mp_context, str) else mp_context
    if context.get_start_method() == "fork":
        # What every worker needs, once here instead of in each of them.
        import faulthandler  # noqa: F401

        import taskpool._engine.worker  # noqa: F401
    return context
