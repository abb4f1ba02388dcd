"""One class for each library: how its own documentation says that the workloads are best done with it."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

WORKERS = 2
CHUNKS = 4 * WORKERS  # into how many chunks `multiprocessing.Pool.map` cuts its input: the peers get the same


class Library:
    """A library at work. A workload that it cannot do raises NotImplementedError.

    Attributes:
        name: What the tables call it.
        package: The distribution whose version is shown; "" for the standard library.
        peer: Whether it is a pool of processes on one machine, and so a peer; others are shown for scale.
        submits: Whether tasks can be submitted one by one.
    """

    name = ""
    package = ""
    peer = True
    submits = True

    def __init__(self, workers: int = WORKERS, method: str | None = None) -> None:
        self.workers = workers
        self.method = method  # how processes start, for those that leave the choice; None is as they do by default
        self.pool: Any = self.start(workers)

    def start(self, workers: int) -> Any:
        """Return a pool."""
        raise NotImplementedError

    def call(self, fn: Callable[[Any], Any], item: Any) -> Any:
        """Run one task, and wait for its result."""
        return self.pool.submit(fn, item).result()

    def many(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Submit tasks one by one, and wait for all; a failure is its exception."""
        return [_outcome(future) for future in [self.pool.submit(fn, item) for item in items]]

    def map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """Map over many quick items, into a list."""
        return list(self.pool.map(fn, items, chunksize=max(1, len(items) // CHUNKS)))

    def lazy(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Map over an input of unknown length, without keeping it."""
        raise NotImplementedError

    def limited(self, fn: Callable[[Any], Any], items: Iterable[Any], seconds: float) -> list[Any]:
        """As `many`, with a limit for each task that stops it."""
        raise NotImplementedError

    def crashing(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """As `many`, where some tasks kill their worker and the others must have their results."""
        raise NotImplementedError

    def initialized(self, keep: Callable[..., Any], array: Any) -> Any:
        """Return another pool, with a `map`, to each of whose workers an initializer has given an array."""
        raise NotImplementedError

    def shared(self, array: Any) -> Any:
        """Return what tasks may be given in place of the array."""
        raise NotImplementedError

    def close(self) -> None:
        """End the pool."""
        self.pool.shutdown()


def _outcome(future: Any, timeout: float | None = None) -> Any:
    try:
        return future.result(timeout)
    except Exception as error:
        return error


class Taskpool(Library):
    """taskpool on its default backend."""

    name = "taskpool"
    package = "taskpool-executor"
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)

    def start(self, workers: int) -> Any:
        """Return an executor."""
        import taskpool

        return taskpool.Executor(workers, mp_context=self.method, **self.options)

    def initialized(self, keep: Callable[..., Any], array: Any) -> Any:
        """Return an executor."""
        import taskpool

        return taskpool.Executor(self.workers, initializer=keep, initargs=(array,), **self.options)

    def shared(self, array: Any) -> Any:
        """Share it."""
        import taskpool

        return taskpool.share(array)

    def map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """Map with default arguments."""
        return list(self.pool.map(fn, items))

    def limited_map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """Map with a limit for each item."""
        return list(self.pool.options(task_timeout=60).map(fn, items))

    def lazy(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Map with default arguments."""
        return self.pool.imap(fn, items)

    def limited(self, fn: Callable[[Any], Any], items: Iterable[Any], seconds: float) -> list[Any]:
        """Submit through a view."""
        view = self.pool.options(task_timeout=seconds, grace=0)
        return [_outcome(future) for future in [view.submit(fn, item) for item in items]]

    def outcomes(self, fn: Callable[[Any], Any], items: Iterable[Any], seconds: float) -> list[Any]:
        """Map with a limit for each item, into records."""
        return list(self.pool.options(task_timeout=seconds, grace=0).outcomes(fn, items))

    def crashing(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Submit."""
        return self.many(fn, items)


class TaskpoolFutures(Taskpool):
    """taskpool hosted by a ProcessPoolExecutor."""

    name = "taskpool futures"
    options = {"backend": "futures"}  # noqa: RUF012


class TaskpoolPool(Taskpool):
    """taskpool hosted by a multiprocessing.Pool."""

    name = "taskpool pool"
    options = {"backend": "pool"}  # noqa: RUF012


class Futures(Library):
    """concurrent.futures.ProcessPoolExecutor."""

    name = "ProcessPoolExecutor"

    def start(self, workers: int) -> Any:
        """Return an executor."""
        return concurrent.futures.ProcessPoolExecutor(workers)

    def initialized(self, keep: Callable[..., Any], array: Any) -> Any:
        """Return an executor."""
        return concurrent.futures.ProcessPoolExecutor(self.workers, initializer=keep, initargs=(array,))


class Pool(Library):
    """multiprocessing.Pool."""

    name = "multiprocessing.Pool"
    module = "multiprocessing"

    def start(self, workers: int) -> Any:
        """Return a pool."""
        return importlib.import_module(self.module).get_context(self.method).Pool(workers)

    def initialized(self, keep: Callable[..., Any], array: Any) -> Any:
        """Return a pool."""
        return multiprocessing.Pool(self.workers, keep, (array,))

    def call(self, fn: Callable[[Any], Any], item: Any) -> Any:
        """Apply."""
        return self.pool.apply(fn, (item,))

    def many(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Apply, and wait behind that."""
        return [result.get() for result in [self.pool.apply_async(fn, (item,)) for item in items]]

    def map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """Map with default arguments, which choose the chunks."""
        return self.pool.map(fn, items)

    def lazy(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Use imap, with the chunks that its documentation advises for long inputs."""
        return self.pool.imap(fn, items, chunksize=1000)

    def close(self) -> None:
        """End it."""
        self.pool.close()
        self.pool.join()


class Billiard(Pool):
    """billiard, celery's pool."""

    name = "billiard"
    package = "billiard"
    module = "billiard"

    def lazy(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Not measured."""
        raise NotImplementedError


class Loky(Library):
    """loky's executor."""

    name = "loky"
    package = "loky"

    def start(self, workers: int) -> Any:
        """Return an executor."""
        import loky

        return loky.ProcessPoolExecutor(workers)


class Pebble(Library):
    """pebble's pool."""

    name = "pebble"
    package = "Pebble"

    def start(self, workers: int) -> Any:
        """Return a pool."""
        import pebble

        return pebble.ProcessPool(workers)

    def call(self, fn: Callable[[Any], Any], item: Any) -> Any:
        """Schedule."""
        return self.pool.schedule(fn, (item,)).result()

    def many(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Schedule."""
        return [_outcome(future) for future in [self.pool.schedule(fn, (item,)) for item in items]]

    def map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """Map in chunks."""
        return list(self.pool.map(fn, items, chunksize=max(1, len(items) // CHUNKS)).result())

    def limited(self, fn: Callable[[Any], Any], items: Iterable[Any], seconds: float) -> list[Any]:
        """Schedule with a timeout."""
        return [_outcome(f) for f in [self.pool.schedule(fn, (item,), timeout=seconds) for item in items]]

    def crashing(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Schedule."""
        return self.many(fn, items)

    def close(self) -> None:
        """End it."""
        self.pool.close()
        self.pool.join()


class Deadpool(Library):
    """deadpool's executor."""

    name = "deadpool"
    package = "deadpool-executor"

    def start(self, workers: int) -> Any:
        """Return an executor."""
        import deadpool

        return deadpool.Deadpool(max_workers=workers, max_backlog=1_000_000)

    def map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """It has no chunks; a million single tasks would take minutes."""
        raise NotImplementedError

    def limited(self, fn: Callable[[Any], Any], items: Iterable[Any], seconds: float) -> list[Any]:
        """Submit with a timeout."""
        return [_outcome(f) for f in [self.pool.submit(fn, item, deadpool_timeout=seconds) for item in items]]

    def crashing(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Submit."""
        return self.many(fn, items)


class Mpire(Library):
    """mpire's pool."""

    name = "mpire"
    package = "mpire"

    def start(self, workers: int) -> Any:
        """Return a pool."""
        import mpire

        return mpire.WorkerPool(workers, keep_alive=True)

    def call(self, fn: Callable[[Any], Any], item: Any) -> Any:
        """Apply."""
        return self.pool.apply(fn, (item,))

    def many(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Apply."""
        return [result.get() for result in [self.pool.apply_async(fn, (item,)) for item in items]]

    def map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """Map with default arguments, which choose the chunks."""
        return self.pool.map(fn, items)

    def lazy(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Use imap."""
        return self.pool.imap(fn, items, chunk_size=1000)

    def close(self) -> None:
        """End it."""
        self.pool.stop_and_join()
        self.pool.terminate()


class Joblib(Library):
    """joblib, as a context that keeps its workers."""

    name = "joblib"
    package = "joblib"
    submits = False  # it takes many at once

    def start(self, workers: int) -> Any:
        """Return a `Parallel` that has been entered."""
        import joblib

        return joblib.Parallel(n_jobs=workers).__enter__()

    def call(self, fn: Callable[[Any], Any], item: Any) -> Any:
        """Run a batch of one."""
        import joblib

        return self.pool([joblib.delayed(fn)(item)])[0]

    def many(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Run one call."""
        import joblib

        return self.pool(joblib.delayed(fn)(item) for item in items)

    def map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """Run one call; it sizes its batches itself."""
        return self.many(fn, items)

    def close(self) -> None:
        """End it."""
        self.pool.__exit__(None, None, None)
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)


class Dask(Library):
    """Dask on one machine; for scale."""

    name = "Dask"
    package = "distributed"
    peer = False

    def start(self, workers: int) -> Any:
        """Return a client of a local cluster."""
        from distributed import Client

        return Client(n_workers=workers, threads_per_worker=1, dashboard_address=None)

    def call(self, fn: Callable[[Any], Any], item: Any) -> Any:
        """Submit."""
        return self.pool.submit(fn, item, pure=False).result()

    def many(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Submit."""
        return self.pool.gather([self.pool.submit(fn, item, pure=False) for item in items])

    def map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """Map in batches."""
        raise NotImplementedError

    def close(self) -> None:
        """End it."""
        self.pool.shutdown()


class Ray(Library):
    """Ray on one machine; for scale."""

    name = "Ray"
    package = "ray"
    peer = False

    def start(self, workers: int) -> Any:
        """Start it."""
        import ray

        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        return ray

    def call(self, fn: Callable[[Any], Any], item: Any) -> Any:
        """Call a remote function."""
        return self.pool.get(self._remote(fn).remote(item))

    def many(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Call a remote function."""
        remote = self._remote(fn)
        return self.pool.get([remote.remote(item) for item in items])

    def map(self, fn: Callable[[Any], Any], items: range) -> list[Any]:
        """It has no chunks."""
        raise NotImplementedError

    def _remote(self, fn: Callable[[Any], Any]) -> Any:
        known = self.__dict__.setdefault("_remotes", {})
        if fn not in known:
            known[fn] = self.pool.remote(fn)
        return known[fn]

    def close(self) -> None:
        """End it."""
        self.pool.shutdown()


ALL: dict[str, type[Library]] = {
    library.name: library
    for library in (
        Taskpool,
        TaskpoolFutures,
        TaskpoolPool,
        Pool,
        Futures,
        Loky,
        Pebble,
        Deadpool,
        Mpire,
        Joblib,
        Billiard,
        Dask,
        Ray,
    )
}
