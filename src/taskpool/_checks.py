"""What callers pass, checked once, at the call that brought it: what was wrong, which argument, what would be right."""

from __future__ import annotations

import math
import os
from typing import Any

from taskpool import _nesting

MAX_SECONDS = 1e8  # about three years; larger values, infinity included, mean "no limit that anyone will see"


def check_seconds(value: Any, name: str, *, none: bool = True) -> float | None:
    """Return `value` as seconds for a bounded wait; None, infinite and huge values mean no limit.

    Args:
        value: What the caller passed.
        name: The argument's name, for the error message.
        none: Whether None is accepted.

    Raises:
        TypeError: If it is not a number (bool and text are not).
        ValueError: If it is NaN.
    """
    if value is None and none:
        return None
    if value is None or isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a number of seconds{' or None' if none else ''}, not {value!r}")
    try:
        seconds = float(value)
    except OverflowError:  # an integer beyond the largest float, say 10**400
        seconds = math.inf
    if math.isnan(seconds):
        raise ValueError(f"{name} must be a number of seconds, not NaN")
    if seconds > MAX_SECONDS:
        return None if none else MAX_SECONDS
    return max(seconds, 0.0)


def check_limit(value: object, name: str = "task_timeout") -> float | None:
    """Return a task's limit in seconds: like `check_seconds`, but zero and negative limits are mistakes.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is NaN, zero or negative.
    """
    seconds = check_seconds(value, name)
    if seconds is not None and seconds <= 0:
        raise ValueError(f"{name} must be greater than 0 seconds, not {value!r}; None means no limit")
    return seconds


def check_count(value: Any, name: str, *, none: bool = True) -> int | None:
    """Return a positive whole number or, where allowed, None.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is less than 1.
    """
    if value is None and none:
        return None
    if value is None or isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number{' or None' if none else ''}, not {value!r}")
    count = int(value.__index__())
    if count <= 0:
        raise ValueError(f"{name} must be greater than 0")  # the standard library's text
    return count


def check_callable(value: object, name: str) -> None:
    """Raise TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a callable, not {value!r}")


def default_workers() -> int:
    """Return how many CPUs this process may use (its affinity mask, where the system has one); a worker, its share."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:
        cpus = os.cpu_count() or 1
    return max(1, cpus // _nesting.sharers)


def check_priority(value: object) -> int:
    """Return a task's priority.

    Raises:
        TypeError: If it is not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"priority must be a whole number, not {value!r}")
    return value


def check_name(value: object) -> str | None:
    """Return a name, or None.

    Raises:
        TypeError: If it is neither text nor None.
    """
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"name must be text or None, not {value!r}")


def check_progress(value: object) -> str | None:
    """Return the label that `progress=` asks for: "" is none, and None shows nothing.

    Raises:
        TypeError: If it is neither a truth value nor text nor None.
    """
    if value is None or value is False:
        return None
    if value is True:
        return ""
    if isinstance(value, str):
        return value
    raise TypeError(f"progress must be True, False or a label, not {value!r}")
