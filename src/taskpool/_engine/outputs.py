"""What tasks print: all that is written to the descriptors 1 and 2 of a worker, by whatever writes there.

In the worker both are one pipe to the parent (`redirect`), and Python and C keep nothing back of what is written: what
a task has printed is in the pipe, however it ends. Which task it belongs to is told by marks in the same pipe, one in
front of each task, that begin with letters which nobody else knows.

In the parent the dispatcher reads it. Text becomes records, line by line, or is kept for the task's future. What lies
in the pipe when an outcome is read was written before that outcome, so it is taken first.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from taskpool._engine.printed import Printed, key_of

if TYPE_CHECKING:
    from taskpool._engine.handle import WorkerHandle
    from taskpool._engine.loop import Loop
    from taskpool._engine.reports import Reports
    from taskpool._engine.units import Unit

READ = 64 * 1024
READS = 16  # in one turn of the dispatcher's, for each worker


class Outputs:
    """What the workers of an executor print.

    Args:
        mode: What becomes of it: "inherit", "forward" or "capture".
        loop: The dispatcher's loop.
        reports: Where records go.
    """

    def __init__(self, mode: str, loop: Loop, reports: Reports) -> None:
        self.is_on: bool = mode != "inherit"
        self._captures = mode == "capture"
        self._loop = loop
        self._reports = reports

    def begin(self, worker: WorkerHandle) -> None:
        """Read what this worker prints from now on."""
        fd = worker.channel.output
        if fd is not None:
            worker.printed = Printed(key_of(worker.channel.page))
            self._loop.watch(fd, lambda: self.read(worker))

    def end(self, worker: WorkerHandle) -> None:
        """It prints no more."""
        if worker.channel.output is not None:
            self.read(worker)
            self._emit(worker, rest=True)
            self._loop.unwatch(worker.channel.output)

    def read(self, worker: WorkerHandle, ended: Unit | None = None) -> None:
        """Take what it has printed, also of what has ended and is no longer out with it."""
        fd, printed = worker.channel.output, worker.printed
        if fd is None or printed is None:
            return
        for _ in range(READS):
            try:
                data = os.read(fd, READ)
            except BlockingIOError:
                break
            if not data:
                self._loop.unwatch(fd)
                break
            printed.feed(data)
        self._emit(worker, rest=False, ended=ended)

    def flush(self, worker: WorkerHandle, unit: Unit) -> None:
        """Make records of all that a task has printed that has ended."""
        if worker.printed is not None:
            self.read(worker, unit)
            self._emit(worker, rest=True, ended=unit)

    def take(self, worker: WorkerHandle, unit: Unit, item: int) -> str:
        """Return what a task has printed that has ended; empty where that became records."""
        if worker.printed is None:
            return ""
        self.flush(worker, unit)
        return worker.printed.take((unit.id, item)) if self._captures else ""

    def _emit(self, worker: WorkerHandle, *, rest: bool, ended: Unit | None = None) -> None:
        """Make records of whole lines, and of what is left of the last one."""
        if self._captures or worker.printed is None:
            return
        for (unit_id, item), line in worker.printed.lines(rest=rest):
            unit = ended if ended is not None and ended.id == unit_id else worker.unit_of(unit_id)
            self._reports.add_output(worker, unit, item, line)
        self._reports.flush()
