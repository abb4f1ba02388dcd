"""When workers may be started, and what follows when that fails. On the dispatcher's thread."""

from __future__ import annotations

import time
from collections.abc import Callable

from taskpool import errors
from taskpool._engine.loop import Loop
from taskpool._engine.outcomes import EncodedError
from taskpool._engine.verdicts import not_ready

now = time.monotonic

FAILED_STARTS = 3  # this many in a row, and no worker can be made ready
PAUSE = 50e-3  # seconds until the next try after a start that failed; doubled after each further one
DOUBLINGS = 5  # ... but no more often than so


class Starts:
    """Counts starts that failed, pauses behind each, and gives up when there is no hope.

    Args:
        loop: The dispatcher's loop.
        give_up: Called with what makes the error of everything that waits and comes.
        has_initializer: Whether it may be the user's initializer that fails.
    """

    def __init__(
        self, loop: Loop, give_up: Callable[[Callable[[], BaseException]], None], *, has_initializer: bool
    ) -> None:
        self._loop = loop
        self._give_up = give_up
        self._has_initializer = has_initializer
        self._failed = 0  # starts in a row
        self._again_at = 0.0  # when the next try is due (monotonic)
        self._has_succeeded = False

    def may_begin(self) -> bool:
        """Whether a start may be tried now; otherwise the loop turns when one may."""
        if now() >= self._again_at:
            return True
        self._loop.wake_by(self._again_at)
        return False

    def succeeded(self) -> None:
        """A worker is ready."""
        self._failed = 0
        self._has_succeeded = True

    def failed(self, reason: BaseException | EncodedError, *, count: int = 1, are_others: bool) -> None:
        """Count a start that failed; the first one, or three in a row, and all that waits fails with the reason.

        A worker that simply died may have been killed from outside, so that alone is never enough the first time. Nor
        is a want of descriptors, processes or memory while there are other workers, which do the work meanwhile.

        Args:
            reason: Why it failed.
            count: How many processes failed in it.
            are_others: Whether another worker serves, or may yet.
        """
        is_new, wants = now() >= self._again_at, _is_want(reason)
        if is_new or not wants:  # a want fails all that are tried meanwhile, and is one
            self._failed += count
        if is_new:
            self._again_at = now() + PAUSE * 2 ** min(self._failed - 1, DOUBLINGS)
            self._loop.wake_by(self._again_at)
        if wants and are_others:
            return
        died = isinstance(reason, errors.WorkerCrashedError)
        if self._failed >= FAILED_STARTS or not (self._has_succeeded or died):
            has_initializer = self._has_initializer
            self._give_up(lambda: not_ready(reason, has_initializer=has_initializer))


def _is_want(reason: object) -> bool:
    """Whether the system had no room for a start, which may be otherwise a moment later."""
    if type(reason) is RuntimeError:  # what `threading` raises
        return True
    return isinstance(reason, OSError) and not isinstance(reason, TimeoutError)
