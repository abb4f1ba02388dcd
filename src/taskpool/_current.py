"""What a running task can ask about itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar


class CurrentTask:
    """The task that runs here, as `current_task` returns it. Valid as long as the task runs.

    Attributes:
        name: The task's name.
        id: What tells it apart from all other tasks of the executor's process; all attempts share it.
        attempt: Which attempt this is, from 1.
        deadline: When it passes its `task_timeout`, as `time.monotonic` has it; None if it has none.
    """

    def __init__(
        self,
        name: str,
        id: str,  # noqa: A002  (the attribute's name)
        attempt: int,
        deadline: float | None,
        *,
        is_stopping: Callable[[], bool],
        report: Callable[[float, float], None],
    ) -> None:
        self.name: str = name
        self.id: str = id
        self.attempt: int = attempt
        self.deadline: float | None = deadline
        self._is_stopping = is_stopping
        self._report = report

    def remaining(self) -> float | None:
        """Return the seconds until the deadline, 0 if it has passed, None if there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def cancelled(self) -> bool:
        """Whether the task has been asked to end: it was cancelled, or has passed its limit."""
        return self._is_stopping()

    def report(self, done: float, total: float) -> None:
        """Tell how far the task is, for the future's `progress` and for progress bars. May be called often.

        Args:
            done: How much is done, in any unit.
            total: How much there is in all, in the same unit.

        Raises:
            TypeError: If one is not a number.
            ValueError: If `total` is not greater than 0, or `done` is less than 0 or NaN.
        """
        for name, value in (("done", done), ("total", total)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, not {value!r}")
        if not (done >= 0 and total > 0):
            raise ValueError(f"report needs done >= 0 and total > 0, not done={done!r}, total={total!r}")
        self._report(float(done), float(total))

    def __repr__(self) -> str:
        return f"<task {self.id} {self.name}, attempt {self.attempt}>"


def name_of(fn: object) -> str:
    """Return a short name for a callable."""
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


running: ContextVar[CurrentTask | None] = ContextVar("taskpool task", default=None)  # in a thread of this process
_of_process: Callable[[], CurrentTask | None] | None = None  # in a worker process, for all its threads


def current_task() -> CurrentTask | None:
    """Return the task that runs here; None outside of tasks."""
    task = running.get()
    return _of_process() if task is None and _of_process is not None else task


def set_source(source: Callable[[], CurrentTask | None]) -> None:
    """Have `current_task` ask the worker, whose process this is."""
    global _of_process
    _of_process = source
