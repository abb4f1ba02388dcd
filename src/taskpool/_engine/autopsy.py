"""Why a worker died: what can be found out behind its end. Runs no user code."""

from __future__ import annotations

import contextlib

from taskpool import errors, logs
from taskpool._engine import inert, stop
from taskpool._engine.handle import WorkerHandle
from taskpool._engine.units import Range, Unit
from taskpool._task import Failure

_FAULTS = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")


class OutOfMemoryKills:
    """The kernel's own count of processes that it killed for memory: of this control group, or else of the system."""

    def __init__(self) -> None:
        self._accounted: int | None = None

    def begin(self) -> None:
        """Note how many there were before any worker."""
        if self._accounted is None:
            self._accounted = stop.out_of_memory_kills()

    def claim(self) -> bool | None:
        """Whether there is one that no dead worker was found for yet; None if that cannot be told."""
        count = stop.out_of_memory_kills()
        if count is None or self._accounted is None:
            return None
        if count <= self._accounted:
            return False
        self._accounted += 1
        return True


def crashed(worker: WorkerHandle, unit: Unit, item: int) -> Failure:
    """Return the error of the task that a dead worker ran."""
    call = describe(unit, item)
    lines = tuple(logs.render(data) for unit_id, at, data in worker.recent if (unit_id, at) == (unit.id, item))
    stack = worker.channel.page.stack()
    reason = worker.reason or _describe(worker)
    text = [f"the worker (pid {worker.pid}) died while it ran task {call or unit.name}: {reason}"]
    if worker.peak_memory is not None:
        text.append(f"it and the processes that it had started took {worker.peak_memory / 1e6:,.1f} MB at most")
    if stack:
        text.append(f"it was here:\n{stack}")
    if lines:
        text.append("\n  ".join(["it had logged last:", *lines]))
    error = errors.WorkerCrashedError(
        "\n".join(text),
        exitcode=worker.exitcode,
        signal=stop.signal_name(worker.exitcode),
        pid=worker.pid,
        stack=stack,
        task=unit.name,
        call=call,
        log=lines,
        peak_memory=worker.peak_memory,
        out_of_memory=worker.out_of_memory,
    )
    return Failure(error)


def describe(unit: Unit, item: int) -> str | None:
    """Return a unit's task as a call, with a short text of its arguments; None if that cannot be told."""
    with contextlib.suppress(Exception):
        if isinstance(unit, Range):
            return inert.item_text(unit.name, unit.piece.payload.pickled(), item)
        return inert.call_text(unit.name, unit.pickled())
    return None


def _describe(worker: WorkerHandle) -> str:
    name = stop.signal_name(worker.exitcode)
    if worker.exitcode is None:
        return "its exit code is not known"
    if name == "SIGKILL" and worker.out_of_memory:
        return "killed by SIGKILL, by the kernel because memory ran out"
    if name == "SIGKILL" and worker.out_of_memory is False:
        return "killed by SIGKILL (by somebody; memory had not run out)"
    if name == "SIGKILL":
        return "killed by SIGKILL (by somebody, or by the kernel because memory ran out)"
    if name in _FAULTS:
        return f"{name} (a fault in C code)"
    return f"killed by {name}" if name else f"it exited with code {worker.exitcode}"
