"""What a host is."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from taskpool._engine.crew import Crew
    from taskpool._engine.handle import WorkerHandle

CLOSE_TIME = 1.0  # seconds that closing an engine may take before it is killed or left


class Pending:
    """The exit code is not known yet; the host will say it."""


PENDING: Final = Pending()


class Host:
    """Starts and ends processes. All methods are called by the dispatcher, and none blocks for long."""

    exitcode_time = 0.25  # seconds that an exit code which is not known at once is waited for

    def attach(self, crew: Crew) -> None:
        """Learn whom to tell about pids and exit codes."""
        self._crew = crew

    def prepare(self) -> None:
        """Begin what takes long before the first start. On another thread than the dispatcher's, which does not run yet."""

    def start(self, worker: WorkerHandle) -> None:
        """Begin to start a process for `worker`, and close the parent's copies of the worker's end.

        Raises:
            Exception: If it cannot be started.
        """
        raise NotImplementedError

    def free_starts(self) -> int:
        """Return how many starts may be begun now."""
        return sys.maxsize

    def answer_due(self, worker: WorkerHandle) -> float:
        """When a worker that starts must have said who it is, where that can get lost."""
        return math.inf

    def start_unanswered(self, worker: WorkerHandle) -> None:
        """A start did not answer by `answer_due`, or not within the time for being ready."""

    def pid_known(self, worker: WorkerHandle) -> None:
        """A worker said who it is."""

    def exitcode(self, worker: WorkerHandle) -> int | Pending | None:
        """Return the exit code of a process that has ended; None if it cannot be known, PENDING if it will be told."""
        return None

    def sweeps(self, worker: WorkerHandle) -> bool:
        """Whether the host itself ends what a dead worker leaves in its session."""
        return False

    def buried(self, worker: WorkerHandle) -> None:
        """All that the worker left has been settled: free what is kept about it."""

    def hint(self, worker: WorkerHandle) -> str:
        """Return what to say about a process that ended before it was ready."""
        code = self.exitcode(worker)
        return f" (exit code {code})" if isinstance(code, int) else ""

    def close(self) -> None:
        """End what was kept for starting processes. All workers have ended."""
