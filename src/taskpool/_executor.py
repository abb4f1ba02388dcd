"""The executor: what people call. It checks what it is given, and leaves the rest to its backend."""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Executor as _StandardExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

from taskpool import _carrier, _nesting
from taskpool._calls import Calls
from taskpool._checks import check_callable, check_count, check_limit, check_name, check_seconds, default_workers
from taskpool._listeners import Listeners
from taskpool._options import TaskOptions
from taskpool.backends import make_backend
from taskpool.backends.base import Backend, Setup
from taskpool.logs import LogsOption, leave_out_stuck_handlers, sink_for

if TYPE_CHECKING:
    from types import TracebackType

    from taskpool._records import RunningTask, Stats
    from taskpool._results import MapResults
    from taskpool._retry import Retry
    from taskpool.events import Listener

EXIT_TIMEOUT = 60.0  # seconds that the end of the interpreter waits for accepted tasks, unless shutdown_timeout is set
WORKER_EXIT_TIMEOUT = 0.5  # seconds that the end of a worker waits for the executors that its tasks have left open
STOP_TIME = 2.0  # seconds beyond its bound in which a shutdown has killed and buried everything

_numbers = iter(range(1, 1 << 62))


class Executor(Calls, _StandardExecutor):
    """Runs tasks on workers, in other processes by default: a `concurrent.futures.Executor` that survives its tasks.

    Args:
        max_workers: How many workers there may be; None is one for each CPU that this process may use, and in a task
            for each that falls to its worker. They start when there is work for them.
        backend: "process" (taskpool's own processes), "futures" (hosted by `ProcessPoolExecutor`), "pool" (hosted by
            `multiprocessing.Pool`), "thread", or "serial" (the caller itself, for debugging).
        mp_context: A start method's name or a context of `multiprocessing`. None starts workers from a template
            process on Linux, which needs no `if __name__ == "__main__"` guard, and by "spawn" elsewhere.
        initializer: Called once in each worker before its first task. If it fails, tasks fail with `InitializerError`.
        initargs: Its arguments.
        preload: Names of modules that are imported once and shared by all workers (template process only).
        max_tasks_per_child: After so many tasks a worker is replaced; None is never.
        task_timeout: The longest run of a task in seconds, from its start in a worker; None is no limit. A task that
            passes it is stopped and fails with `TaskTimeoutError`.
        grace: How long a task that is being stopped may take to clean up, in seconds, before its process is killed.
        retry: How often a task that fails, passes its limit or loses its worker is tried: a number of attempts,
            `taskpool.retry(...)`, or a stop, wait or retry strategy of tenacity. None is once.
        max_pending: How many submitted tasks may wait for a worker; None is no limit. `submit` then waits.
        submit_timeout: How long it waits, in seconds, before it raises `QueueFullError`; None is no limit.
        shutdown_timeout: The bound of `shutdown`, of leaving `with`, and of the interpreter's end, in seconds. None
            waits for accepted tasks as the standard library does, and 60 seconds at the interpreter's end.
        start_timeout: How long a worker may take until it is ready, in seconds, its initializer included.
        listeners: Each is called with a record of what happens to tasks; see `taskpool.events`.
        logs: Where what workers log goes: "forward", to the loggers of the same names here; a logger, a handler or
            handlers; the path of a file for JSON lines; or "off", which leaves logging in the workers as it is.
        log_timeout: The longest time, in seconds, that a task or its result waits for log handlers. Then it goes on;
            if too many records wait, further ones are dropped and counted.
        output: What becomes of what tasks print, and of all that is written to the descriptors 1 and 2: "inherit" leaves
            it where this process's own goes; "forward" makes log records of it, of the logger "taskpool.output";
            "capture" keeps it for the future's `output`, and for that of `Outcome` records.
        context: Context variables whose values travel from the submitting code into each task; the bound context of
            structlog always does. Each must be a global of a module.
        name: The executor's name, in worker names, thread names and logs.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a value is out of range.
        UnsupportedError: If the backend cannot do what is asked for.
        NotSendableError: If the initializer cannot be pickled.
    """

    _idle_timeout: float | None = None  # seconds after which an idle worker is let go; the shared executors set it

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        backend: str = "process",
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        preload: Iterable[str] = (),
        max_tasks_per_child: int | None = None,
        task_timeout: float | None = None,
        grace: float = 0.5,
        retry: Retry | None = None,
        max_pending: int | None = None,
        submit_timeout: float | None = None,
        shutdown_timeout: float | None = None,
        start_timeout: float | None = 60.0,
        listeners: Iterable[Listener] = (),
        logs: LogsOption = "forward",
        log_timeout: float = 5.0,
        output: str = "inherit",
        context: Iterable[ContextVar[Any]] = (),
        name: str | None = None,
    ) -> None:
        self._closed = False
        self.name: str = check_name(name) or f"taskpool-{next(_numbers)}"
        options = {"task_timeout": task_timeout, "grace": grace, "retry": retry, "submit_timeout": submit_timeout}
        self._options = TaskOptions().merge(options)
        self._shutdown_timeout = check_seconds(shutdown_timeout, "shutdown_timeout")
        self._lock = threading.RLock()
        self._maps: weakref.WeakSet[MapResults] = weakref.WeakSet()
        if initializer is not None:
            check_callable(initializer, "initializer")
        setup = Setup(
            name=self.name,
            max_workers=check_count(max_workers, "max_workers") or default_workers(),
            mp_context=_check_context(mp_context),
            initializer=initializer,
            initargs=_check_initargs(initargs),
            preload=_check_preload(preload),
            max_tasks_per_child=check_count(max_tasks_per_child, "max_tasks_per_child"),
            max_pending=check_count(max_pending, "max_pending"),
            start_timeout=check_limit(start_timeout, "start_timeout"),
            shutdown_timeout=self._shutdown_timeout,
            idle_timeout=self._idle_timeout,
            listeners=_check_listeners(listeners),
            sink=sink_for(logs),
            log_timeout=max(0.0, check_seconds(log_timeout, "log_timeout", none=False) or 0.0),
            output=_check_output(output, logs),
            context=_carrier.locate(_check_context_variables(context)),
        )
        if backend == "futures":
            _end_before_pools()
        self._backend = make_backend(backend, setup)
        _open_backends.add(self._backend)

    @property
    def _executor(self) -> Executor:  # type: ignore[override]
        return self

    # Calls lend themselves from `Calls`, which comes first in the order of resolution.

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> None:  # noqa: FBT001, FBT002
        """Accept nothing more, finish what was accepted, and end all workers by their sentinel.

        Args:
            wait: Whether to return only when everything has ended.
            cancel_futures: Whether to cancel the tasks that have not started.
            timeout: The longest wait in seconds; when it is over, what still runs is stopped and what waits is
                cancelled, so that every future is resolved. None is the executor's `shutdown_timeout`.

        Raises:
            TypeError: If `timeout` is not a number.
            ForkedExecutorError: If this process is a fork of the one that made the executor.
        """
        seconds = check_seconds(timeout, "timeout") if timeout is not None else self._shutdown_timeout
        self._backend.check_process()
        deadline = None if seconds is None else time.monotonic() + seconds
        if wait and not cancel_futures and not self._closed:
            self._finish_maps(deadline)
        self._closed = True
        self._backend.close(cancel=cancel_futures)
        if not wait or self._backend.is_own_thread():
            return  # a callback that waited here would wait for itself
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self._wait_for_end(left):
            return
        self._stop(kill_after=0.0)

    def terminate(self, timeout: float | None = 5.0) -> None:
        """Cancel what has not started, stop what runs, and end all workers.

        Args:
            timeout: When it is over, in seconds, what still runs is killed without further grace; None leaves that to
                each task's `grace`.

        Raises:
            TypeError: If `timeout` is not a number.
            ForkedExecutorError: If this process is a fork of the one that made the executor.
        """
        seconds = check_seconds(timeout, "timeout")
        self._backend.check_process()
        self._stop(kill_after=seconds)

    def terminate_workers(self) -> None:
        """Stop everything, as the standard library's method of this name (Python 3.14)."""
        self.terminate()

    def kill_workers(self) -> None:
        """Stop everything without grace, as the standard library's method of this name (Python 3.14)."""
        self.terminate(timeout=0)

    def stats(self) -> Stats:
        """Return what the executor is doing and has done, as a frozen record."""
        return self._backend.stats()

    def stacks(self) -> list[RunningTask]:
        """Return the tasks that run right now and where each is, without stopping any, whoever holds the GIL.

        Waits up to a second for a worker that is stopped or in the kernel; what that runs has no stack.

        Raises:
            ForkedExecutorError: If this process is a fork of the one that made the executor.
        """
        self._backend.check_process()
        return self._backend.stacks()

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        """Leave `with`: finish what was accepted.

        After an exception cancel what has not started; after Ctrl-C and the like stop what runs, too.
        """
        if exc_type is None:
            self.shutdown()
        elif issubclass(exc_type, Exception):
            self.shutdown(cancel_futures=True)
        else:
            self.terminate()

    async def __aenter__(self) -> Self:
        """Enter `async with`."""
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave `async with`: as `with`, but in another thread, so that the event loop goes on.

        Cancelling this wait kills what runs, and the wait goes on until that has ended.
        """
        from taskpool._loops import elsewhere

        await elsewhere(lambda: self.__exit__(exc_type, error, trace), on_cancel=self._kill)

    def _kill(self) -> None:
        self._closed = True
        self._backend.terminate(time.monotonic())

    def __repr__(self) -> str:
        state = "shut down" if self._closed else "open"
        return f"<Executor {self.name} backend={self._backend.name!r} workers={self._backend.workers} {state}>"

    def __del__(self) -> None:
        if _exiting is not False:
            return  # everything has been ended; and of the modules that it takes some may be gone already
        backend = getattr(self, "_backend", None)
        if backend is None or self._closed or backend.pid != os.getpid():
            return
        self._closed = True
        backend.close(cancel=False)
        if not sys.is_finalizing():
            warnings.warn(f"{self!r} was dropped without shutdown()", ResourceWarning, source=self, stacklevel=2)

    # Inside

    def _check_open(self) -> None:
        self._backend.check_process()
        if self._closed or _exiting:
            ended = "interpreter shutdown" if _exiting else "shutdown"
            raise RuntimeError(f"cannot schedule new futures after {ended}")

    def _finish_maps(self, deadline: float | None) -> None:
        for results in list(self._maps):
            results.finish_reading(math.inf if deadline is None else deadline)

    def _stop(self, *, kill_after: float | None) -> None:
        self._closed = True
        kill_at = float("inf") if kill_after is None else time.monotonic() + kill_after
        self._backend.terminate(kill_at)
        if not self._backend.is_own_thread():
            grace = self._options.grace if kill_after is None else kill_after
            self._wait_for_end(grace + STOP_TIME)

    def _wait_for_end(self, timeout: float | None) -> bool:
        ended = self._backend.join(timeout)
        if ended:
            self._backend.failures.report_all()
            self._backend.finish_logging()
            _open_backends.discard(self._backend)
        return ended


def _check_initargs(initargs: object) -> tuple[Any, ...]:
    if isinstance(initargs, str | bytes) or not isinstance(initargs, Iterable):
        raise TypeError(f"initargs must be a tuple of arguments, not {initargs!r}")
    return tuple(initargs)


def _check_preload(preload: object) -> tuple[str, ...]:
    if isinstance(preload, str) or not isinstance(preload, Iterable):
        raise TypeError(f'preload must be names of modules, such as preload=["numpy"], not {preload!r}')
    names = tuple(preload)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"preload must be names of modules, not {name!r}")
    return names


def _check_listeners(listeners: Any) -> Listeners:
    if not isinstance(listeners, Iterable):
        raise TypeError(f"listeners must be callables, such as listeners=[print], not {listeners!r}")
    found = list(listeners)
    for listener in found:
        check_callable(listener, "a listener")
    return Listeners(found)


def _check_output(output: object, logs: object) -> str:
    if not isinstance(output, str):
        raise TypeError(f'output must be "inherit", "forward" or "capture", not {output!r}')
    if output not in ("inherit", "forward", "capture"):
        raise ValueError(f'output must be "inherit", "forward" or "capture", not {output!r}')
    if output == "forward" and logs == "off":
        raise ValueError('output="forward" makes log records, which logs="off" sends nowhere')
    return output


def _check_context_variables(context: Any) -> Iterable[ContextVar[Any]]:
    if not isinstance(context, Iterable) or isinstance(context, str):
        raise TypeError(f"context must be context variables, such as context=[request_id], not {context!r}")
    return list(context)


def _check_context(context: Any) -> Any:
    if context is None or hasattr(context, "Process"):
        return context
    if not isinstance(context, str):
        raise TypeError(f"mp_context must be a start method's name or a context of multiprocessing, not {context!r}")
    from multiprocessing import get_all_start_methods

    if context not in get_all_start_methods():
        methods = ", ".join(map(repr, get_all_start_methods()))
        raise ValueError(f"mp_context must be one of {methods}, or a context of multiprocessing, not {context!r}")
    return context


# The interpreter's end

# Those of executors that were dropped stand here, too, for as long as something runs on them.
_open_backends: weakref.WeakSet[Backend] = weakref.WeakSet()
_exiting = False


def _end_at_exit() -> None:
    """End everything that is still open, within its bound.

    Accepted tasks are finished first, as the standard library does, unless the program ends by an exception: then
    nobody waits for them any more.
    """
    global _exiting
    _exiting = True
    try:
        _finish_all()
    except BaseException:  # Ctrl-C, at whatever moment: nobody waits any longer
        backends = _own_backends()
        for backend in backends:
            backend.terminate(0.0)
        for backend in backends:
            backend.join(STOP_TIME)
        raise


def _finish_all() -> None:
    failed = getattr(sys, "last_type", None) is not None
    backends = _own_backends()
    for backend in backends:
        if failed:
            backend.terminate(time.monotonic() + 1.0)
        backend.close(cancel=False)
    _await_end(backends)


def _end_with_worker() -> None:
    """In a worker that ends: stop what its tasks have left running, in less than the time that its parent gives it."""
    global _exiting
    _exiting = True
    backends = _own_backends()
    began = time.monotonic()
    for backend in backends:
        backend.terminate(began + WORKER_EXIT_TIMEOUT / 2)
    for backend in backends:
        backend.join(max(0.0, began + WORKER_EXIT_TIMEOUT - time.monotonic()))


def _own_backends() -> list[Backend]:
    return [backend for backend in list(_open_backends) if backend.pid == os.getpid()]


def _await_end(backends: list[Backend]) -> None:
    began = time.monotonic()
    for backend in backends:
        limit = backend.setup.shutdown_timeout
        bound = EXIT_TIMEOUT if limit is None else limit
        if not backend.join(max(0.0, began + bound - time.monotonic())):
            what = f"executor {backend.setup.name!r} did not finish within {bound:g} seconds"
            print(f"taskpool: {what} and is stopped", file=sys.stderr)  # noqa: T201
            backend.terminate(0.0)
            if not backend.join(STOP_TIME):  # a handler may be at a record, for less than log_timeout so far
                import atexit

                atexit.register(leave_out_stuck_handlers)


def _register_exit() -> None:
    register = getattr(threading, "_register_atexit", None)
    if register is None:
        import atexit

        register = atexit.register
    register(_end_at_exit)


_register_exit()
_nesting.at_end.append(_end_with_worker)


@functools.cache
def _end_before_pools() -> None:
    """Have the end come before the standard library waits for pools that host our workers."""
    import concurrent.futures.process  # noqa: F401  # here it registers its own: what was registered later runs earlier

    _register_exit()


def _start_afresh() -> None:
    """In a forked child: it may be a worker, forked while its parent ends, that has work to do yet."""
    global _exiting
    _exiting = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
