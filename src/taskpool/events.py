"""What happens to tasks, as records for listeners.

A listener is called with one record after the other, on a thread where it may take its time: the executor's callback
thread, or the thread that ran the task on the backends without processes. One that raises is reported to the "taskpool"
logger and called no more.

    def listener(event):
        if isinstance(event, taskpool.events.TaskRetried):
            print(event.task, event.attempt, event.error)

    with taskpool.Executor(listeners=[listener]) as pool:
        ...
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
        time: When it became known, in seconds since the epoch, as `time.time` has it.
    """

    executor: str
    task: str
    id: str
    attempt: int
    time: float = attrs.field(factory=time.time)


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


Listener: TypeAlias = Callable[[TaskEvent], object]
