"""To look for something that is about to come for a moment before going to sleep.

To be woken costs more than that: it takes the system 50 us on either side, most of them processor time. So a round trip
of 240 us takes 80, of less processor time than before. But nobody looks without a reason, which the callers have: the
last one came as soon, or the task is known to be short. And where others need the processor nobody looks at all: whoever
sleeps is woken before those that compute, whoever looks around counts as one of these.
"""

from __future__ import annotations

import os
import select
import time

LONGEST = 150e-6  # seconds
AT_ONCE = 5e-6  # what has come within that was there already
TAKEN = 0.4e-3  # if a single look takes so long, somebody else had the processor meanwhile
PAUSE = 0.1  # seconds in which nobody looks after that

now = time.monotonic

_pause_until = 0.0


def until_readable(fd: int, seconds: float = LONGEST) -> bool:
    """Look for something to read, for some microseconds; return whether it has come."""
    global _pause_until
    looked = now()
    until = looked + seconds
    if looked < _pause_until:
        return False
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not poll.poll(0):
        os.sched_yield()
        before, looked = looked, now()
        if looked - before > TAKEN:
            _pause_until = looked + PAUSE
            return False
        if looked >= until:
            return False
    return True
