"""The executors behind `taskpool.map`: started on first use, kept warm, and ended with the interpreter."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from taskpool._executor import Executor
from taskpool._options import check_count, default_workers

R = TypeVar("R")

IDLE_TIMEOUT = 10.0  # seconds after which a worker that has nothing to do is let go


class _SharedExecutor(Executor):
    _idle_timeout = IDLE_TIMEOUT


_executors: dict[tuple[int, int, str], Executor] = {}
_lock = threading.Lock()


def default_executor(max_workers: int | None = None, backend: str = "process") -> Executor:
    """Return the shared executor with so many workers on this backend; a forked child gets one of its own."""
    workers = check_count(max_workers, "max_workers") or default_workers()
    key = os.getpid(), workers, backend
    with _lock:
        executor = _executors.get(key)
        if executor is None or executor._closed:
            executor = _executors[key] = _SharedExecutor(workers, backend=backend, name="taskpool")
        return executor


def map(  # noqa: A001  (it is named for what it does)
    fn: Callable[..., R],
    *iterables: Iterable[Any],
    timeout: float | None = None,
    task_timeout: float | None = None,
    chunksize: int | None = None,
    max_workers: int | None = None,
    backend: str = "process",
) -> list[R]:
    """Run `fn` on every item, in several processes, and return the results in order.

    Args:
        fn: What to call with one item of each iterable; lambdas and functions of `__main__` work too.
        iterables: The inputs; the shortest one ends the map.
        timeout: The longest time that this call may take, in seconds; what it had started is stopped then.
        task_timeout: The longest run of each item, in seconds; the item is stopped then.
        chunksize: How many items a worker gets at a time; None decides by how long they take.
        max_workers: How many workers; None is one for each CPU that this process may use.
        backend: What runs them; see `Executor`.

    Returns:
        The results, in the order of the items.

    Raises:
        CallTimeoutError: If `timeout` has passed.
        TaskTimeoutError: If an item passed `task_timeout`.
        Exception: The first failing item's own exception.
    """
    executor = default_executor(max_workers, backend)
    options = {} if task_timeout is None else {"task_timeout": task_timeout}
    view = executor.options(**options)
    return view._start_map(fn, iterables, timeout=timeout, chunksize=chunksize).as_list()


def _start_afresh() -> None:
    """In a forked child: forget the parent's executors, and the lock that some thread of the parent may have held."""
    global _lock
    _lock = threading.Lock()
    _executors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
