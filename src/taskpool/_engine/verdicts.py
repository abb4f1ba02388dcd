"""The errors with which the engine itself ends a task."""

from __future__ import annotations

from concurrent.futures import CancelledError

from taskpool import errors
from taskpool._engine.handle import WorkerHandle
from taskpool._engine.outcomes import EncodedError
from taskpool._engine.units import Unit
from taskpool._task import Failure


def timed_out(worker: WorkerHandle, unit: Unit, stack: str | None) -> Failure:
    """The task passed its limit and was stopped."""
    limit = unit.options.task_timeout or 0.0
    text = f"task {unit.name} ran longer than its task_timeout of {limit:g} seconds and was stopped"
    text += f"; it was here:\n{stack}" if stack else ""
    return Failure(errors.TaskTimeoutError(text, seconds=limit, stack=stack, task=unit.name, pid=worker.pid))


def cancelled() -> Failure:
    """The task was cancelled."""
    return Failure(CancelledError())


def no_memory(unit: Unit) -> Failure:
    """The parent has no memory for the result."""
    return Failure(MemoryError(f"there is no memory for the result of task {unit.name}"))


def not_ready(reason: BaseException | EncodedError, *, has_initializer: bool) -> errors.InitializerError:
    """No worker can be made ready. A new exception each time: one object on many futures would mix their tracebacks."""
    cause = reason.decode()[1] if isinstance(reason, EncodedError) else reason
    what = "the initializer failed" if has_initializer else "no worker can be started"
    if isinstance(cause, errors.WorkerCrashedError):  # ours: it says nothing that is not said here
        return errors.InitializerError(f"{what}: {cause}")
    error = errors.InitializerError(f"{what}: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
