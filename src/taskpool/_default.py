"""The executors behind `taskpool.map`: started on first use, kept warm, and ended with the interpreter."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from taskpool._calls import Calls, ZipOptions
from taskpool._checks import check_count, default_workers
from taskpool._executor import Executor

if TYPE_CHECKING:
    from taskpool._outcome import Outcome
    from taskpool._retry import Retry

R = TypeVar("R")
T = TypeVar("T")

IDLE_TIMEOUT = 10.0  # seconds after which a worker that has nothing to do is let go


class _SharedExecutor(Executor):
    _idle_timeout = IDLE_TIMEOUT


_executors: dict[tuple[int, int, str], Executor] = {}
_lock = threading.RLock()


def default_executor(max_workers: int | None = None, backend: str = "process") -> Executor:
    """Return the shared executor with so many workers on this backend; a forked child gets one of its own."""
    workers = check_count(max_workers, "max_workers") or default_workers()
    key = os.getpid(), workers, backend
    with _lock:  # reentrant: a signal handler may map, too, and interrupt just this
        executor = _executors.get(key)
        if executor is None or executor._closed:
            made = _SharedExecutor(workers, backend=backend, name="taskpool")
            executor = _executors.get(key)
            if executor is None or executor._closed:
                executor = _executors[key] = made
            else:
                made.shutdown(wait=False)  # a handler was faster; this one has not started anything
        return executor


class SharedOptions(ZipOptions, total=False):
    """How a map on a shared executor is run, beyond `MapOptions`."""

    max_workers: int | None
    """How many workers; None is one for each CPU that this process may use, and in a task for each that falls to its
    worker."""

    backend: str
    """What runs them; see `Executor`."""

    task_timeout: float | None
    """The longest run of each item, in seconds; the item is stopped then."""

    retry: Retry | None
    """How often an item that fails is tried; see `Executor`."""

    name: str | None
    """The name of the items in errors and logs."""


def _shared(how: SharedOptions) -> tuple[Calls, dict[str, Any]]:
    """Return whom to call, and what is left of the options for that call."""
    left: dict[str, Any] = dict(how)
    executor = default_executor(left.pop("max_workers", None), left.pop("backend", "process"))
    changes = {name: left.pop(name) for name in ("task_timeout", "retry", "name") if name in left}
    return executor.options(**changes), left


def map(fn: Callable[..., R], *iterables: Iterable[Any], **how: Unpack[SharedOptions]) -> list[R]:  # noqa: A001  (it is named for what it does)
    """Run `fn` on every item, in several processes, and return the results in order.

    Args:
        fn: What to call with one item of each iterable; lambdas and functions of `__main__` work too.
        iterables: The inputs; the shortest one ends the map.
        how: See `SharedOptions`.

    Returns:
        The results, in the order of the items.

    Raises:
        CallTimeoutError: If `timeout` has passed.
        TaskTimeoutError: If an item passed `task_timeout`.
        Exception: The first failing item's own exception.
    """
    calls, left = _shared(how)
    return calls._start(fn, iterables, left, eager=True).as_list()


def starmap(fn: Callable[..., R], iterable: Iterable[Iterable[Any]], **how: Unpack[SharedOptions]) -> list[R]:
    """Run `fn(*item)` for every item, and return the results in order. Everything else is as in `map`."""
    calls, left = _shared(how)
    return calls._start(fn, (iterable,), left, star=True, eager=True).as_list()


def imap(fn: Callable[..., R], *iterables: Iterable[Any], **how: Unpack[SharedOptions]) -> Iterator[R]:
    """Run `fn` on the items as they are asked for: lazily, by a bound. Everything else is as in `map`.

    Returns:
        An iterator over the results, in the order of the items.
    """
    calls, left = _shared(how)
    return calls.imap(fn, *iterables, **left)


def imap_unordered(fn: Callable[..., R], *iterables: Iterable[Any], **how: Unpack[SharedOptions]) -> Iterator[R]:
    """Run `fn` on the items, lazily, and return an iterator over the results as they come."""
    calls, left = _shared(how)
    return calls.imap_unordered(fn, *iterables, **left)


@overload
def outcomes(
    fn: Callable[[T], R], iterable: Iterable[T], /, *, ordered: bool = ..., **how: Unpack[SharedOptions]
) -> Iterator[Outcome[T, R]]: ...


@overload
def outcomes(
    fn: Callable[..., R],
    first: Iterable[Any],
    second: Iterable[Any],
    /,
    *more: Iterable[Any],
    ordered: bool = ...,
    **how: Unpack[SharedOptions],
) -> Iterator[Outcome[Any, R]]: ...


def outcomes(
    fn: Callable[..., Any], /, *iterables: Iterable[Any], ordered: bool = False, **how: Unpack[SharedOptions]
) -> Iterator[Outcome[Any, Any]]:
    """Run `fn` on the items, and return an iterator over records of how each ended. No failure costs another item.

    Args:
        fn: What to call with one item of each iterable.
        iterables: The inputs; the shortest one ends it.
        ordered: Whether the records come in the order of the input; otherwise as items end.
        how: See `SharedOptions`.

    Raises:
        CallTimeoutError: If `timeout` has passed, by the iterator; what was started is stopped.
    """
    calls, left = _shared(how)
    return calls.outcomes(fn, *iterables, ordered=ordered, **left)


def _start_afresh() -> None:
    """In a forked child: forget the parent's executors, and the lock that some thread of the parent may have held."""
    global _lock
    _lock = threading.RLock()
    _executors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
