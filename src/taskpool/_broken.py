"""The exceptions of `errors.py` that are also a `BrokenProcessPool`, whose module takes a while to load.

They are found there, and are loaded when first asked for: at the latest before a dispatcher starts, which may need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures.process import BrokenProcessPool
else:
    try:
        from concurrent.futures.process import BrokenProcessPool
    except RuntimeError:  # the interpreter ends: nothing that has process pools can be loaded, or raise these, any more
        from concurrent.futures import BrokenExecutor as BrokenProcessPool

from taskpool.errors import NotSendableError, TaskPoolError

__all__ = ["InitializerError", "UnpickleError", "WorkerCrashedError"]


class WorkerCrashedError(TaskPoolError, BrokenProcessPool):
    """The process that ran the task died before it had written an outcome. Only this task is lost.

    Attributes:
        exitcode: The exit code as `multiprocessing.Process.exitcode` has it (negative: a signal); None if unknown.
        signal: The signal's name, such as "SIGKILL"; None if it was not a signal.
        pid: The process that died.
        stack: The stack that faulthandler wrote at a segfault or abort; None if it wrote none.
        task: The task's name.
        call: The task with a short text of its arguments, such as "resize('a.png', width=200)"; None if unknown.
        log: The task's last log records, one line each.
        peak_memory: The largest size in memory, in bytes, of the process, and of those that it had started and that
            lived then; None if unknown.
        out_of_memory: Whether the kernel killed it because memory ran out; None if the kernel's counters cannot be read,
            or it was not killed.
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
        call: str | None = None,
        log: tuple[str, ...] = (),
        peak_memory: int | None = None,
        out_of_memory: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.signal = signal
        self.pid = pid
        self.stack = stack
        self.task = task
        self.call = call
        self.log = log
        self.peak_memory = peak_memory
        self.out_of_memory = out_of_memory


class InitializerError(TaskPoolError, BrokenProcessPool):
    """No worker could be made ready: the initializer raised, died, or passed `start_timeout`.

    Its cause is the initializer's own exception with the remote traceback, where there is one.
    """


class UnpickleError(NotSendableError, BrokenProcessPool):
    """Pickled data failed to load on the other side: arguments in the worker, or a result in the parent."""


for _error in (WorkerCrashedError, InitializerError, UnpickleError):
    _error.__module__ = "taskpool.errors"
