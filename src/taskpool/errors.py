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
from concurrent.futures.process import BrokenProcessPool
from pickle import PicklingError

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
        stack: Where the task was when it was stopped, as traceback text; None if it could not be read.
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


class WorkerCrashedError(TaskPoolError, BrokenProcessPool):
    """The process that ran the task died before it had written an outcome. Only this task is lost.

    Attributes:
        exitcode: The exit code as `multiprocessing.Process.exitcode` has it (negative: a signal); None if unknown.
        signal: The signal's name, such as "SIGKILL"; None if it was not a signal.
        pid: The process that died.
        stack: The stack that faulthandler wrote at a segfault or abort; None if it wrote none.
        task: The task's name.
    """

    def __init__(
        self,
        message: str,
        *,
        exitcode: int | None = None,
        signal: str | None = None,
        pid: int | None = None,
        stack: str | None = None,
        task: str | None = None,
    ) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.signal = signal
        self.pid = pid
        self.stack = stack
        self.task = task


class InitializerError(TaskPoolError, BrokenProcessPool):
    """No worker could be made ready: the initializer raised, died, or passed `start_timeout`.

    Its cause is the initializer's own exception with the remote traceback, where there is one.
    """


class NotSendableError(TaskPoolError, TypeError, PicklingError):
    """Part of a task or of its result cannot be pickled. The message names the part; the cause is the original error."""


class UnpickleError(NotSendableError, BrokenProcessPool):
    """Pickled data failed to load on the other side: arguments in the worker, or a result in the parent."""


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
