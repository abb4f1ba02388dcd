"""What happens to tasks and workers, as records for listeners.

A listener is called with one record after the other, on a thread where it may take its time: the executor's callback
thread. On the backends without processes it is called where things happen: in the thread that submits or runs the task.
One that raises is reported to the "taskpool" logger and called no more.

    def listener(event):
        if isinstance(event, taskpool.events.TaskRetried):
            print(event.task, event.attempt, event.error)

    with taskpool.Executor(listeners=[listener]) as pool:
        ...
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic as _monotonic
from time import time as _time
from typing import Literal, TypeAlias

import attrs

How: TypeAlias = Literal["finished", "failed", "timed_out", "crashed", "cancelled"]


@attrs.frozen(kw_only=True)
class TaskEvent:
    """What all records of tasks have.

    Attributes:
        executor: The executor's name.
        task: The task's name.
        id: What tells the task apart; items of a map have the map's id, a colon and their index.
        attempt: Which attempt it is about, from 1; 0 if there was none.
        time: When it happened, in seconds since the epoch, as `time.time` has it.
        monotonic: The same as `time.monotonic` has it, which no change of the clock moves.
    """

    executor: str
    task: str
    id: str
    attempt: int
    time: float = attrs.field(factory=_time)
    monotonic: float = attrs.field(factory=_monotonic)


@attrs.frozen(kw_only=True)
class TaskQueued(TaskEvent):
    """A task was accepted, and waits for a worker or goes to one at once. Its attempt is 0."""


@attrs.frozen(kw_only=True)
class TaskStarted(TaskEvent):
    """A worker has begun an attempt.

    Attributes:
        worker: The worker's name.
    """

    worker: str


@attrs.frozen(kw_only=True)
class TaskRetried(TaskEvent):
    """An attempt failed, and another one follows.

    Attributes:
        error: How it failed; None if its result was not good enough.
        wait: The seconds until the next attempt.
    """

    error: BaseException | None
    wait: float


@attrs.frozen(kw_only=True)
class TaskEnded(TaskEvent):
    """A task has ended for good.

    Attributes:
        how: "finished", "failed" (by an exception of its own), "timed_out", "crashed" (its worker died) or "cancelled".
        error: What its future raises; None if it finished.
        seconds: How long the last attempt ran; 0 if there was none.
        worker: The name of the worker that ran it; None if none did.
    """

    how: How
    error: BaseException | None
    seconds: float
    worker: str | None


@attrs.frozen(kw_only=True)
class WorkerEvent:
    """What all records of workers have.

    Attributes:
        executor: The executor's name.
        worker: The worker's name.
        pid: Its process; None if that is not known yet.
        time: When it happened, in seconds since the epoch.
        monotonic: The same as `time.monotonic` has it.
    """

    executor: str
    worker: str
    pid: int | None
    time: float = attrs.field(factory=_time)
    monotonic: float = attrs.field(factory=_monotonic)


@attrs.frozen(kw_only=True)
class WorkerStarted(WorkerEvent):
    """The start of a worker was begun."""


@attrs.frozen(kw_only=True)
class WorkerReady(WorkerEvent):
    """A worker has run its initializer, and takes tasks."""


@attrs.frozen(kw_only=True)
class WorkerDied(WorkerEvent):
    """A worker has ended, in whatever way; on "thread" it may also have been abandoned.

    Attributes:
        exitcode: Its exit code, negative for a signal; None if unknown, and for threads.
        early: Whether it ended before its time: by a crash, or since a task of it had to be stopped.
    """

    exitcode: int | None
    early: bool


@attrs.frozen(kw_only=True)
class WorkerReplaced(WorkerEvent):
    """A worker that had ended early has a successor.

    Attributes:
        by: The successor's name.
    """

    by: str


Event: TypeAlias = TaskEvent | WorkerEvent
Listener: TypeAlias = Callable[[Event], object]
