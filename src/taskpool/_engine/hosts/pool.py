"""Workers in processes of a `multiprocessing.Pool`."""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from taskpool._engine import entry
from taskpool._engine.channel import WorkerEnd
from taskpool._engine.descriptors import close_kept, keep_from_children
from taskpool._engine.hosts.base import CLOSE_TIME, Pending
from taskpool._engine.hosts.processes import LaunchingHost, pools, unsaid_of_forks

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from taskpool._engine.handle import WorkerHandle

ANSWER_TIME = 10.0  # seconds in which a call of a Pool must say who its worker is: such a call can get lost


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
            with unsaid_of_forks():
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

    def exitcode(self, worker: WorkerHandle) -> int | Pending | None:
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
        pools.add(self._pool)
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
