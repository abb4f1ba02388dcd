"""Log records as they travel: plain data, which runs no user code where it arrives."""

from __future__ import annotations

from typing import Any, Final

# What a record in the channel begins with.
RECORD: Final = 0  # of standard logging
EVENT: Final = 1  # of structlog
OUTPUT: Final = 2  # a line that was printed

MAX_DEPTH = 8  # how deep containers travel as such

_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})


def plain(value: Any, depth: int = MAX_DEPTH, within: tuple[int, ...] = ()) -> Any:
    """Return `value` if it is plain data, and its repr if it is anything else. Runs user code, and never raises.

    Numbers and texts of classes of their own are what they are, or show.

    Args:
        value: Anything.
        depth: How deep containers are looked into.
        within: The ids of those that it lies in: one that lies in itself would be looked into without need.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if issubclass(kind, int | float):  # and of a class of its own, as members of enumerations are
        return int.__int__(value) if issubclass(kind, int) else float.__float__(value)
    if depth and kind in (dict, list, tuple) and id(value) not in within:
        within = *within, id(value)
        if kind is dict:
            return {plain(key, 0): plain(item, depth - 1, within) for key, item in list(value.items())}
        return kind(plain(item, depth - 1, within) for item in value)
    try:
        return str.__str__(str(value) if issubclass(kind, str) else repr(value))
    except Exception as error:
        return f"<{kind.__name__} whose repr raised {type(error).__name__}>"
