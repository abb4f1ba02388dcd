"""The executor: what people call. It checks what it is given, and leaves the rest to its backend."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor as _StandardExecutor
from typing import Any, ParamSpec, TypeVar

from taskpool._map import MapBackend, MapJob, MapResults
from taskpool._options import (
    TaskOptions,
    check_callable,
    check_count,
    check_limit,
    check_seconds,
    default_workers,
)
from taskpool._task import TaskFuture
from taskpool.backends import make_backend
from taskpool.backends.base import Backend, Setup, Stats

P = ParamSpec("P")
R = TypeVar("R")

EXIT_TIMEOUT = 60.0  # seconds that the end of the interpreter waits for accepted tasks, unless shutdown_timeout is set
STOP_TIME = 2.0  # seconds beyond its bound in which a shutdown has killed and buried everything

_numbers = iter(range(1, 1 << 62))


class Calls:
    """The calls that an executor and its views share: tasks run with `self._options` on `self._executor`."""

    _executor: Executor
    _options: TaskOptions

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[R]:
        """Have `fn(*args, **kwargs)` run in a worker.

        Args:
            fn: What to call; functions of `__main__`, lambdas and closures work too.
            args: Its arguments.
            kwargs: Its keyword arguments. Options of the task are given by `options`, so none is taken from these.

        Returns:
            The task's future. What cannot be pickled fails the future, with `NotSendableError`.

        Raises:
            TypeError: If `fn` cannot be called.
            RuntimeError: If the executor was shut down.
            ForkedExecutorError: If this process is a fork of the one that made the executor.
            QueueFullError: If `max_pending` tasks are waiting and none was taken within `submit_timeout`.
            InitializerError: If no worker can be made ready.
        """
        executor = self._executor
        check_callable(fn, "fn")
        executor._check_open()
        return executor._backend.submit(fn, args, kwargs, self._options)

    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Iterator[R]:
        """Run `fn` on the items of `iterables`, as the built-in `map` does, and return their results in order.

        Args:
            fn: What to call with one item of each iterable.
            iterables: The inputs; the shortest one ends the map. If all have a length everything is submitted at
                once; otherwise the input is read ahead by `buffersize`, so that it may be endless.
            timeout: Seconds from this call within which the last result must be there; None is no limit.
            chunksize: How many items a worker gets at a time. None measures how long items take and decides by that.
                Either way each item has its own limit and its own outcome.
            buffersize: How many items may be submitted whose results were not asked for yet. None is all where the
                length is known, and a small multiple of the number of workers where it is not.

        Returns:
            An iterator. It raises the first failing item's own exception, or `CallTimeoutError`; both stop what the
            map had started.

        Raises:
            TypeError: If `fn` cannot be called, there is no iterable, or one cannot be iterated.
            ValueError: If `chunksize` or `buffersize` is less than 1.
            RuntimeError: If the executor was shut down.
        """
        return iter(self._start_map(fn, iterables, timeout=timeout, chunksize=chunksize, buffersize=buffersize))

    def _start_map(
        self,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        *,
        timeout: float | None,
        chunksize: int | None,
        buffersize: int | None = None,
    ) -> MapResults:
        check_callable(fn, "fn")
        seconds = check_seconds(timeout, "timeout")
        chunk = check_count(chunksize, "chunksize")
        window = check_count(buffersize, "buffersize")
        if not iterables:
            raise TypeError("map needs at least one iterable")
        self._executor._check_open()
        job = MapJob(fn, star=len(iterables) > 1, options=self._options, chunksize=chunk)
        results = MapResults(_Feeder(self._executor), job, _zipped(iterables), timeout=seconds, buffersize=window)
        self._executor._maps.add(results)
        return results

    def options(self, **changes: Any) -> View:
        """Return a view on the same executor, with other options for the tasks that are submitted through it.

        Args:
            changes: `task_timeout` (seconds), `grace` (seconds), `name`, `priority`, `submit_timeout` (seconds).

        Raises:
            TypeError: If an option is unknown or of a wrong type.
            ValueError: If a value is out of range.
        """
        return View(self._executor, self._options.merge(changes))


class View(Calls):
    """Calls on an executor with options of their own; made by `options`, on an executor or on another view."""

    def __init__(self, executor: Executor, options: TaskOptions) -> None:
        self._executor = executor
        self._options = options

    def __repr__(self) -> str:
        return f"<view on {self._executor!r} with {self._options}>"


class Executor(Calls, _StandardExecutor):
    """Runs tasks on workers, in other processes by default: a `concurrent.futures.Executor` that survives its tasks.

    Args:
        max_workers: How many workers there may be; None is one for each CPU that this process may use. They start when
            there is work for them.
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
        max_pending: How many submitted tasks may wait for a worker; None is no limit. `submit` then waits.
        submit_timeout: How long it waits, in seconds, before it raises `QueueFullError`; None is no limit.
        shutdown_timeout: The bound of `shutdown`, of leaving `with`, and of the interpreter's end, in seconds. None
            waits for accepted tasks as the standard library does, and 60 seconds at the interpreter's end.
        start_timeout: How long a worker may take until it is ready, in seconds, its initializer included.
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
        max_pending: int | None = None,
        submit_timeout: float | None = None,
        shutdown_timeout: float | None = None,
        start_timeout: float | None = 60.0,
        name: str | None = None,
    ) -> None:
        self._closed = False
        self.name: str = _check_name(name) or f"taskpool-{next(_numbers)}"
        options = {"task_timeout": task_timeout, "grace": grace, "submit_timeout": submit_timeout}
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
        )
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

    def __repr__(self) -> str:
        state = "shut down" if self._closed else "open"
        return f"<Executor {self.name} backend={self._backend.name!r} workers={self._backend.workers} {state}>"

    def __del__(self) -> None:
        backend = getattr(self, "_backend", None)
        if backend is None or self._closed or backend.pid != os.getpid():
            return
        self._closed = True
        backend.close(cancel=False)
        if not _is_finalizing():
            warnings.warn(f"{self!r} was dropped without shutdown()", ResourceWarning, source=self, stacklevel=2)

    # Inside

    def _check_open(self) -> None:
        self._backend.check_process()
        if self._closed or _exiting:
            ended = "interpreter shutdown" if _exiting else "shutdown"
            raise RuntimeError(f"cannot schedule new futures after {ended}")

    def _finish_maps(self, deadline: float | None) -> None:
        for results in list(self._maps):
            results.finish_reading(deadline)

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
            _open_backends.discard(self._backend)
        return ended


class _Feeder(MapBackend):
    """What a map gets of its executor: as long as somebody iterates, the executor must not be dropped."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.workers = executor._backend.workers

    def submit_items(self, job: MapJob, first: int, items: Any) -> None:
        self._executor._check_open()
        self._executor._backend.submit_items(job, first, items)

    def cancel_job(self, job: MapJob, *, stop: bool) -> None:
        self._executor._backend.cancel_job(job, stop=stop)


def _zipped(iterables: tuple[Iterable[Any], ...]) -> Iterable[Any]:
    if len(iterables) == 1:
        return iterables[0]
    if all(hasattr(iterable, "__len__") for iterable in iterables):
        return _SizedZip(iterables)
    return zip(*iterables, strict=False)


class _SizedZip:
    """Several inputs whose lengths are known: so is that of what they make together."""

    def __init__(self, iterables: tuple[Any, ...]) -> None:
        self._iterables = iterables

    def __len__(self) -> int:
        return min(map(len, self._iterables))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self._iterables, strict=False)


def _check_name(name: object) -> str | None:
    if name is None or isinstance(name, str):
        return name
    raise TypeError(f"name must be text or None, not {name!r}")


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


def _is_finalizing() -> bool:
    return sys.is_finalizing() or _exiting


def _end_at_exit() -> None:
    """End everything that is still open, within its bound.

    Accepted tasks are finished first, as the standard library does, unless the program ends by an exception: then
    nobody waits for them any more.
    """
    global _exiting
    _exiting = True
    failed = getattr(sys, "last_type", None) is not None
    backends = [backend for backend in list(_open_backends) if backend.pid == os.getpid()]
    for backend in backends:
        if failed:
            backend.terminate(time.monotonic() + 1.0)
        backend.close(cancel=False)
    try:
        _await_end(backends)
    except BaseException:  # Ctrl-C: nobody waits any longer
        for backend in backends:
            backend.terminate(0.0)
        for backend in backends:
            backend.join(STOP_TIME)
        raise


def _await_end(backends: list[Backend]) -> None:
    began = time.monotonic()
    for backend in backends:
        limit = backend.setup.shutdown_timeout
        bound = EXIT_TIMEOUT if limit is None else limit
        if not backend.join(max(0.0, began + bound - time.monotonic())):
            what = f"executor {backend.setup.name!r} did not finish within {bound:g} seconds"
            print(f"taskpool: {what} and is stopped", file=sys.stderr)  # noqa: T201
            backend.terminate(0.0)
            backend.join(STOP_TIME)


def _register_exit() -> None:
    # Before the standard library joins its own threads, and so before it waits for pools that host our workers:
    # what was registered later runs earlier.
    import concurrent.futures.process  # noqa: F401

    register = getattr(threading, "_register_atexit", None)
    if register is None:
        import atexit

        register = atexit.register
    register(_end_at_exit)


_register_exit()
