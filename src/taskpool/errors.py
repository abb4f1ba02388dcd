"""Every exception of taskpool.

```
Exception
└── TaskPoolError                 the root: `except TaskPoolError` catches all that is ours
    ├── TaskTimeoutError          a task passed its task_timeout          (also TimeoutError)
    ├── CallTimeoutError          a call passed its timeout               (also TimeoutError)
    ├── WorkerCrashedError        the worker process died                 (also BrokenProcessPool)
    ├── InitializerError          workers cannot be made ready            (also BrokenProcessPool)
    ├── NotSendableError          an object cannot be pickled             (also TypeError, PicklingError)
    │   └── UnpickleError         ... or cannot be unpickled              (also BrokenProcessPool)
    ├── RemoteError               stands for an exception that could not make the journey
    ├── QueueFullError            max_pending tasks are waiting           (also queue.Full)
    ├── ForkedExecutorError       an executor was used in a forked child  (also RuntimeError)
    ├── NestingError              calls inside of calls go too deep       (also RuntimeError)
    └── UnsupportedError          this backend cannot do that             (also NotImplementedError)
```

The standard library's classes are bases wherever code written for `ProcessPoolExecutor` catches them.
A task's own exception is raised as itself; a cancelled task raises `concurrent.futures.CancelledError`.
"""

from __future__ import annotations

import queue
from pickle import PicklingError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskpool._broken import InitializerError, UnpickleError, WorkerCrashedError

__all__ = [
    "CallTimeoutError",
    "ForkedExecutorError",
    "InitializerError",
    "NestingError",
    "NotSendableError",
    "QueueFullError",
    "RemoteError",
    "TaskPoolError",
    "TaskTimeoutError",
    "UnpickleError",
    "UnsupportedError",
    "WorkerCrashedError",
]


class TaskPoolError(Exception):
    """The root of taskpool's own exceptions."""


class TaskTimeoutError(TaskPoolError, TimeoutError):
    """A task ran longer than its `task_timeout` and was stopped.

    Attributes:
        seconds: The limit that was passed, in seconds.
        stack: Where the task was when it was stopped, as traceback text, and behind that where the other threads of its
            process were; None if it could not be read.
        task: The task's name.
        pid: The process that ran it; None on backends without processes.
    """

    def __init__(
        self,
        message: str,
        *,
        seconds: float | None = None,
        stack: str | None = None,
        task: str | None = None,
        pid: int | None = None,
    ) -> None:
        super().__init__(message)
        self.seconds = seconds
        self.stack = stack
        self.task = task
        self.pid = pid


class CallTimeoutError(TaskPoolError, TimeoutError):
    """A call passed its `timeout`; what it had started was stopped.

    Attributes:
        seconds: The limit that was passed, in seconds.
        finished: How many items had finished, where the call has items.
    """

    def __init__(self, message: str, *, seconds: float | None = None, finished: int | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds
        self.finished = finished


class NotSendableError(TaskPoolError, TypeError, PicklingError):
    """Part of a task or of its result cannot be pickled. The message names the part; the cause is the original error."""


class RemoteError(TaskPoolError):
    """Stands for an exception of a task that could not make the journey, or that must not escape raw in the parent.

    Attributes:
        type_name: The qualified name of the original exception's class.
        message: The text of the original exception.
        traceback: The formatted traceback from the worker.
    """

    def __init__(self, message: str, *, type_name: str = "", traceback: str = "") -> None:
        super().__init__(f"{type_name}: {message}" if type_name else message)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by attributes: `args` holds the composed text, which must not be composed twice."""
        return _restore_remote_error, (self.message, self.type_name, self.traceback), self.__dict__


def _restore_remote_error(message: str, type_name: str, traceback: str) -> RemoteError:
    return RemoteError(message, type_name=type_name, traceback=traceback)


class QueueFullError(TaskPoolError, queue.Full):
    """`max_pending` tasks are waiting, and none was taken within `submit_timeout`."""


class ForkedExecutorError(TaskPoolError, RuntimeError):
    """An executor was used in a forked child. Its workers belong to the parent; make a new executor in the child."""


class NestingError(TaskPoolError, RuntimeError):
    """Tasks that use taskpool themselves are nested too deep, or too many of them wait for others."""


class UnsupportedError(TaskPoolError, NotImplementedError):
    """The chosen backend cannot do that. The message names one that can."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from taskpool import _broken

    globals().update({each: getattr(_broken, each) for each in _broken.__all__})
    return globals()[name]
