"""Log records as they travel: plain data, which runs no user code where it arrives."""

from __future__ import annotations

from typing import Any, Final

# What a record in the channel begins with.
RECORD: Final = 0  # of standard logging
EVENT: Final = 1  # of structlog
OUTPUT: Final = 2  # a line that was printed

MAX_DEPTH = 8  # how deep containers travel as such

_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})


def plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return `value` if it is plain data, and its repr if it is anything else. Runs user code, and never raises."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if depth and kind is dict:
        return {plain(key, 0): plain(item, depth - 1) for key, item in list(value.items())}
    if depth and kind in (list, tuple):
        return kind(plain(item, depth - 1) for item in value)
    try:
        return str.__str__(repr(value))
    except Exception as error:
        return f"<{kind.__name__} whose repr raised {type(error).__name__}>"
