"""Workers in processes of `concurrent.futures`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from taskpool._engine import entry
from taskpool._engine.channel import WorkerEnd
from taskpool._engine.hosts.base import CLOSE_TIME, PENDING, Pending
from taskpool._engine.hosts.processes import LaunchingHost, free, processes

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from taskpool._engine.handle import WorkerHandle


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
            processes.add(process)
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
            free(process)

    def exitcode(self, worker: WorkerHandle) -> int | Pending | None:
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
