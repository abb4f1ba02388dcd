"""Failures that nobody has looked at: reported once, when their future is collected or their executor ends."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskpool._task import RawOutcome

Report = Callable[[Callable[[], None]], None]

COLLECTED = "task %s failed, and nobody looked at that"
ENDED = "task %s failed, and nobody had looked at that when its executor ended"


class Unseen:
    """The failure of one task, for as long as nobody has looked at it. Its future alone has this.

    Args:
        failures: Those of its executor.
        name: The task's name.
        outcome: What it ended with.
    """

    __slots__ = ("__weakref__", "_failures", "_name", "_outcome", "is_over")

    def __init__(self, failures: Failures, name: str, outcome: RawOutcome) -> None:
        self._failures = failures
        self._name = name
        self._outcome = outcome
        self.is_over: bool = False  # somebody looked, or was told

    def report(self, level: int, text: str) -> None:
        """Log it, unless that is not needed. User code runs here: the error is unpickled, and handlers are called."""
        if not self.is_over:
            self.is_over = True
            _log(level, text, self._name, self._outcome)

    def __del__(self) -> None:
        if not self.is_over and not sys.is_finalizing():
            name, outcome = self._name, self._outcome
            # Anywhere, and in any thread: what may block or take locks is done elsewhere.
            self._failures.run(lambda: _log(logging.ERROR, COLLECTED, name, outcome))


def _log(level: int, text: str, name: str, outcome: RawOutcome) -> None:
    error = outcome.decode()[1]
    logging.getLogger("taskpool.failures").log(level, text, name, exc_info=error)


class Failures:
    """Those of one executor that nobody has looked at.

    Args:
        run: Runs a call where handlers may block, and never blocks itself; from any thread, at any moment.
    """

    def __init__(self, run: Report) -> None:
        self.run: Report = run
        self._unseen: weakref.WeakSet[Unseen] = weakref.WeakSet()

    def add(self, name: str, outcome: RawOutcome) -> Unseen:
        """Return what a future keeps until somebody looks."""
        unseen = Unseen(self, name, outcome)
        self._unseen.add(unseen)
        return unseen

    def report_all(self) -> None:
        """The executor ends: report what nobody has looked at so far."""
        while True:
            try:
                left = list(self._unseen)
                break
            except RuntimeError:  # a task of some thread has failed just now
                continue
        for unseen in left:
            unseen.report(logging.WARNING, ENDED)
