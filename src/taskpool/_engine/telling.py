"""What listeners are told of workers, and of tasks that have not ended. Does nothing where nobody listens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from taskpool._engine.callbacks import CallbackThread
from taskpool._engine.handle import WorkerHandle
from taskpool._engine.reports import source_of
from taskpool._engine.units import Piece
from taskpool._engine.wire import Frame
from taskpool._listeners import Listeners
from taskpool._task import TaskFuture

if TYPE_CHECKING:
    from taskpool import events


class Teller:
    """Makes records of what happens, when it happens, and has listeners called on the callback thread.

    Args:
        executor: The executor's name.
        listeners: Who listens.
        callbacks: The thread for what may run user code.
    """

    def __init__(self, executor: str, listeners: Listeners, callbacks: CallbackThread) -> None:
        self._executor = executor
        self._listeners = listeners
        self._callbacks = callbacks
        self._lost: deque[WorkerHandle] = deque()  # that ended early, and have no successor yet

    def _tell(self, event: Callable[..., events.Event], **fields: Any) -> None:
        record = event(executor=self._executor, **fields)
        self._callbacks.run(lambda: self._listeners.tell(record))

    # Tasks

    def queued(self, future: TaskFuture[Any]) -> None:
        """A call was accepted."""
        if self._listeners:
            from taskpool.events import TaskQueued

            self._tell(TaskQueued, task=future.task_name, id=future.task_id, attempt=0)

    def queued_items(self, pieces: list[Piece]) -> None:
        """Items of a map were accepted."""
        if self._listeners:
            from taskpool.events import TaskQueued

            for piece in pieces:
                for index in range(len(piece.items)):
                    self._tell(TaskQueued, task=piece.name, id=f"{piece.job.id}:{piece.first + index}", attempt=0)

    def started(self, worker: WorkerHandle, frame: Frame) -> None:
        """A worker says that it has begun something."""
        unit = worker.unit_of(frame.unit)
        if self._listeners and unit is not None:
            from taskpool.events import TaskStarted

            source = source_of(worker, unit, frame.item)
            wall = time.time() - (time.monotonic() - frame.started)
            fields = {"task": source.task, "id": source.id, "attempt": source.attempt, "worker": worker.name}
            self._tell(TaskStarted, **fields, time=wall, monotonic=frame.started)

    # Workers

    def worker_started(self, worker: WorkerHandle) -> None:
        """A start was begun."""
        if self._listeners:
            from taskpool.events import WorkerReplaced, WorkerStarted

            self._tell(WorkerStarted, worker=worker.name, pid=worker.pid)
            if self._lost:
                lost = self._lost.popleft()
                self._tell(WorkerReplaced, worker=lost.name, pid=lost.pid, by=worker.name)

    def worker_ready(self, worker: WorkerHandle) -> None:
        """A worker takes tasks."""
        if self._listeners:
            from taskpool.events import WorkerReady

            self._tell(WorkerReady, worker=worker.name, pid=worker.pid)

    def worker_died(self, worker: WorkerHandle) -> None:
        """A worker has ended."""
        if self._listeners:
            from taskpool.events import WorkerDied

            if worker.ended_early:
                self._lost.append(worker)
            fields = {"exitcode": worker.exitcode, "early": worker.ended_early}
            self._tell(WorkerDied, worker=worker.name, pid=worker.pid, **fields)
