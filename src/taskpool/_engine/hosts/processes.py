"""Processes that multiprocessing starts: what all such hosts share, and the host that starts one for each worker."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from taskpool._engine import entry
from taskpool._engine.channel import WorkerEnd
from taskpool._engine.hosts.base import CLOSE_TIME, PENDING, Host, Pending
from taskpool._engine.launches import Launches

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from taskpool._engine.crew import Crew
    from taskpool._engine.handle import WorkerHandle

FORKSERVER_UNKNOWN = 255  # what multiprocessing's forkserver answers when it does not know an exit code


processes: weakref.WeakSet[Any] = weakref.WeakSet()  # those that host our workers
pools: weakref.WeakSet[Any] = weakref.WeakSet()  # those that start such processes themselves


def _disown_in_child() -> None:
    """In a forked child: keep its multiprocessing from ending or awaiting our workers, which are not its children.

    At its exit it would send SIGTERM to those of a Pool, and fail to join the others.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        ours = {*processes, *(worker for pool in pools for worker in pool._pool)}
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
        self._exit = ExitCodes(crew)
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
        with unsaid_of_forks():
            return make()
    finally:
        end.take_back()
        end.close()


@contextlib.contextmanager
def unsaid_of_forks() -> Iterator[None]:
    # mp_context="fork" was asked for; that it is unsafe beside threads stands in the documentation.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork")
        yield


class ProcessHost(LaunchingHost):
    """Starts each worker as one `multiprocessing.Process`."""

    def _make(self, end: WorkerEnd) -> Any:
        arguments = end, self._luggage
        process = self._context.Process(target=entry.in_process, args=arguments)  # type: ignore[attr-defined]
        processes.add(process)
        process.start()
        return process

    def _adopt(self, key: WorkerHandle, made: Any) -> None:
        key.hosted = made
        self._crew.process_known(key, made.pid)

    def _dispose(self, made: Any) -> None:
        made.kill()
        free(made)

    def exitcode(self, worker: WorkerHandle) -> int | Pending | None:
        """Ask the process object, which reaps it."""
        return PENDING if worker in self._launches else self._exit.code(worker, worker.hosted)

    def buried(self, worker: WorkerHandle) -> None:
        """Reap it and free the process object."""
        self._launches.give_up(worker)
        process, worker.hosted = worker.hosted, None
        if process is not None:
            self._exit.forget(process)
            free(process)


def free(process: Any) -> None:
    """Reap a process that has been killed, or has ended, and free the object."""
    process.join(CLOSE_TIME)
    with contextlib.suppress(ValueError):  # it does not end; multiprocessing keeps it
        process.close()


class ExitCodes:
    """Asks process objects of multiprocessing for their exit code, and tells the crew what comes later.

    Later: under forkserver the code comes over a pipe, the sentinel, behind the process's end; and an engine's own
    thread may be reaping the process at this moment.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._watched: dict[Any, int] = {}

    def code(self, worker: WorkerHandle, process: Any) -> int | Pending | None:
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
                if isinstance(code, Pending):  # it lets go of the sentinel just before it can be reaped
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


def make_context(mp_context: Any) -> BaseContext:
    """Return the multiprocessing context that a user named or passed."""
    from multiprocessing import get_context

    context: BaseContext = get_context(mp_context) if mp_context is None or isinstance(mp_context, str) else mp_context
    if context.get_start_method() == "fork":
        # What every worker needs, once here instead of in each of them.
        import faulthandler  # noqa: F401

        import taskpool._engine.worker  # noqa: F401
    return context
