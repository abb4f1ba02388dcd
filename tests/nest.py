"""Tasks that use taskpool themselves."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import multiprocessing
import multiprocessing.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import taskpool
from taskpool import _checks, _nesting
from tests import states, tasks

kept: dict[str, Any] = {}  # what tests and tasks of one process leave for each other


def keep(name: str, value: Any) -> Any:
    """Keep a value in this process, and return it."""
    kept[name] = value
    return value


# ---------------------------------------------------------------------------------------------- in workers


def place(_: object = None) -> tuple[int, int, int]:
    """Return how deep this process is, how many workers share the CPUs, and how many it starts by default."""
    return _nesting.depth, _nesting.sharers, _checks.default_workers()


def places(workers: int | None) -> list[tuple[int, int, int]]:
    """Return the place of this process, and that of a worker that it starts."""
    with taskpool.Executor(workers) as pool:
        return [place(), pool.submit(place).result()]


def map_on(backend: dict[str, Any], count: int) -> list[int]:
    """Map on an executor of this process, and on the shared one."""
    with taskpool.Executor(2, **backend) as pool:
        own = list(pool.map(tasks.square, range(count)))
    assert own == taskpool.map(tasks.square, range(count), backend=backend["backend"])
    return own


def pids_of_two_maps() -> list[int]:
    """Return this process, and the workers that two maps on the shared executor have used."""
    return [os.getpid(), *(taskpool.map(states.pid_of, [0], max_workers=1)[0] for _ in range(2))]


def met(path: Path, count: int) -> int:
    """Return how many workers an executor of this process has at once."""
    taskpool.map(states.meet, [path] * count, [count] * count, max_workers=count, chunksize=1, timeout=20)
    return len(set(states.pids(path)))


def enter_in_workers(state: list[str], path: Path) -> None:
    """Have workers of this process enter these states."""
    taskpool.map(states.enter, state, [path] * len(state), max_workers=len(state), chunksize=1)


def leave_in_workers(state: str, path: Path) -> None:
    """Have a worker of this process enter a state, and return when it has."""
    keep("pool", taskpool.Executor(1)).submit(states.enter, state, path)
    states.expect(path, 1)


def note_at_end(path: Path, name: str, below: str | None = None) -> None:
    """Note a name when this process ends in good order; likewise in a worker that it has."""
    multiprocessing.util.Finalize(None, tasks.note, (path, name), exitpriority=1)
    if below is not None:
        keep("pool", taskpool.Executor(1)).submit(note_at_end, path, below).result()
        taskpool.map(note_at_end, [path], [f"{below} of the map"])


def bomb(path: Path, backend: dict[str, Any] | None) -> Any:
    """Note the depth, and do the same twice in workers of this process."""
    tasks.note(path, _nesting.depth)
    if backend is None:
        return taskpool.map(bomb, [path] * 2, [None] * 2)
    with taskpool.Executor(1, **backend) as pool:
        return [pool.submit(bomb, path, backend).result() for _ in range(2)]


def fill(path: Path, release: Path) -> None:
    """Note the depth and the process, have the same done by as many workers as there may be, and wait below all."""
    tasks.note(path, f"{_nesting.depth} {os.getpid()}")
    if _nesting.depth < _nesting.MAX_DEPTH:
        taskpool.map(fill, [path] * 3, [release] * 3, chunksize=1)
    else:
        tasks.await_file(release)


def fork_in_a_thread() -> int:
    """Fork where no worker forks: beside the main thread. Return the child's exit code."""
    codes: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(7)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    thread = threading.Thread(target=fork, daemon=True)
    thread.start()
    thread.join(10)
    return codes[0]


def warn_below(text: str) -> None:
    """Log a warning in a worker of this process."""
    taskpool.map(logging.getLogger("tests.nest").warning, [text])


def use_kept(call: str) -> Any:
    """Use what the parent has kept, which a forked worker has, too."""
    pool, future = kept["pool"], kept["future"]
    return {
        "submit": lambda: pool.submit(abs, 1),
        "map": lambda: list(pool.map(abs, [1])),
        "result": lambda: future.result(5),
        "cancel": future.cancel,
        "wait": lambda: concurrent.futures.wait([future]),
    }[call]()


def standard_pool(method: str) -> list[int]:
    """Use the standard library's pool."""
    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.map(tasks.square, range(3))


def standard_executor(method: str) -> list[int]:
    """Use the standard library's executor."""
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(tasks.square, range(3)))


def serial_inside(path: Path) -> None:
    """Run a task that never ends here, and note how it was ended."""
    with taskpool.Executor(backend="serial") as pool:
        try:
            pool.submit(tasks.sleep_in_steps, 60)
        finally:
            tasks.note(path, "left")


# ---------------------------------------------------------------------------------------------- in threads

Pool = taskpool.Executor
Way = Callable[[Pool, Callable[..., Any], list[Any]], list[Any]]


def by_result(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Submit, and wait for each result."""
    return [future.result() for future in [pool.submit(fn, item) for item in items]]


def by_exception(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Submit one after the other, and wait for each to have no error, time and again."""
    found = []
    for item in items:
        future = pool.submit(fn, item)
        while True:
            try:
                assert future.exception(timeout=0.005) is None
            except TimeoutError:
                continue
            break
        found.append(future.result())
    return found


def by_map(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Map a list."""
    return list(pool.map(fn, items))


def by_lazy_map(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Map an input that is read as results are taken."""
    return list(pool.map(fn, iter(items), buffersize=2))


def by_unordered_map(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Map, and take results as they come."""
    return [result for _, result in sorted(pool.imap_unordered(lambda pair: (pair[0], fn(pair[1])), enumerate(items)))]


def by_outcomes(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Take the record of each."""
    return [outcome.value for outcome in pool.outcomes(fn, items, ordered=True)]


def by_wait(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Wait for all by the standard library's function."""
    futures = [pool.submit(fn, item) for item in items]
    assert not concurrent.futures.wait(futures).not_done
    return [future.result() for future in futures]


def by_as_completed(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Take them as they come, by the standard library's function."""
    futures = [pool.submit(fn, item) for item in items]
    assert {*concurrent.futures.as_completed(futures)} == {*futures}
    return [future.result() for future in futures]


def by_group(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Leave a group."""
    with pool.group() as group:
        futures = [group.submit(fn, item) for item in items]
    return [future.result(0) for future in futures]


def by_growing_group(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Leave a group whose members submit the others."""
    futures: list[Any] = []

    def member(number: int) -> Any:
        if number + 1 < len(items):
            futures.append(group.submit(member, number + 1))
        return fn(items[number])

    with pool.group() as group:
        futures.append(group.submit(member, 0))
    return [future.result(0) for future in futures]


def by_asynchronous_group(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    """Leave a group in asyncio."""

    async def main() -> list[Any]:
        async with pool.group() as group:
            futures = [group.submit(fn, item) for item in items]
        return [future.result(0) for future in futures]

    return asyncio.run(main())


WAYS: list[Way] = [
    by_result,
    by_exception,
    by_map,
    by_lazy_map,
    by_unordered_map,
    by_outcomes,
    by_wait,
    by_as_completed,
    by_group,
    by_growing_group,
    by_asynchronous_group,
]


def fibonacci(pool: Pool, way: Way, number: int) -> int:
    """Count the leaves of a tree of tasks, each of which waits for two others."""
    if number < 2:
        return number
    return sum(way(pool, lambda smaller: fibonacci(pool, way, smaller), [number - 1, number - 2]))


def recurse(pool: Pool, way: Way, _: object = None) -> Any:
    """Wait for a task that does the same."""
    return way(pool, lambda _: recurse(pool, way), [0])


def leaf(error: BaseException | None) -> BaseException | None:
    """Return the one error in groups of one."""
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    return error


class Gauge:
    """How many run at the same time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def run(self, seconds: float) -> None:
        """Be one of them for a while."""
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        tasks.sleep_in_steps(seconds)
        with self._lock:
            self.now -= 1
