"""What is measured: functions that workers run. A module of its own, so that every library pickles them the same way."""

from __future__ import annotations

import os
import signal


def same(x: int) -> int:
    """Return `x`: a task that costs nothing."""
    return x


def square(x: int) -> int:
    """Return the square."""
    return x * x


def pid(_: object = None) -> int:
    """Return the worker's process id."""
    return os.getpid()


def die() -> None:
    """End the worker as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)
