"""What workers run. A module of its own, so that every library pickles these functions the same way."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def same(x: Any) -> Any:
    """Return `x`: a task that costs nothing."""
    return x


def square(x: int) -> int:
    """Return the square."""
    return x * x


def pid(_: object = None) -> int:
    """Return the worker's process id, after a moment in which the others can start."""
    time.sleep(0.002)
    return os.getpid()


def spin(seconds: float) -> None:
    """Compute for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def die_at_every(number: int) -> int:
    """End the worker as the kernel would, at every twentieth number."""
    if number % 20 == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def hang_at_every(number: int) -> int:
    """Hang at every tenth number, in one of three ways."""
    if number % 10 == 5:
        HANGS[number // 10 % 3]()
    return number


def _sleep() -> None:
    time.sleep(60)


def _spin() -> None:
    spin(60)


def _swallow() -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except BaseException:
            continue


HANGS = (_sleep, _spin, _swallow)


def total(array: Any) -> int:
    """Look at a little of an array."""
    return int(array[0]) + int(array[-1])


_kept: Any = None


def keep(array: Any) -> None:
    """Be an initializer that keeps an array for all tasks."""
    global _kept
    _kept = array


def total_of_kept(_: object) -> int:
    """Look at a little of the kept array."""
    return total(_kept)


def total_of_shared(shared: Any, _: object) -> int:
    """Look at a little of a shared array."""
    return total(shared.value)


def die() -> None:
    """End the worker as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_end_of(path: str) -> None:
    """Hold the worker for as long as the file exists."""
    while os.path.exists(path):  # noqa: PTH110
        time.sleep(0.005)
