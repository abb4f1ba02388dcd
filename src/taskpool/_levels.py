"""The levels of the program's loggers: read in the parent, applied in its workers.

What the parent would not show is not sent. So a worker must know of a change before the next task, and a submit must
learn of it at next to no cost. `logging` empties the caches of its loggers whenever a level is set or logging is
disabled: a mark that stands in the root's cache tells, by being gone, that something may have changed.
"""

from __future__ import annotations

import logging
import marshal
import os
import threading

MOST = 6000  # bytes that a worker's page has room for

_MARK: object = "taskpool has read the levels"
_DEFAULT_NAMES = {0: "NOTSET", 10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}

_lock = threading.RLock()
_version = 0
_data = b""


def version() -> int:
    """Return a number that grows with each change of a level."""
    if _MARK not in logging.root._cache:  # type: ignore[attr-defined]
        read()
    return _version


def read() -> tuple[int, bytes]:
    """Return (a number that grows with each change, the levels of now as `apply` takes them)."""
    global _version, _data
    with _lock:
        logging.root._cache[_MARK] = True  # type: ignore[attr-defined]  # first: a change from here on removes it
        data = _dumps()
        if data != _data:
            _version, _data = _version + 1, data
        return _version, _data


def _dumps() -> bytes:
    root = logging.root
    levels = {"": int(root.level)}  # of the very types that marshal knows: enumerations serve as levels and as names
    for name, logger in list(root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET:
            levels[str.__str__(name)] = int(logger.level)
    names = {
        int(level): str(name)
        for level, name in list(logging._levelToName.items())  # there is no public way to ask for all
        if _DEFAULT_NAMES.get(level) != name
    }
    disabled = int(root.manager.disable)
    data = marshal.dumps((levels, disabled, names))
    if len(data) > MOST:  # more is sent then than is shown, never less
        data = marshal.dumps(({"": min(levels.values())}, disabled, {}))
    return data


def apply(data: bytes, before: dict[str, int]) -> dict[str, int]:
    """In a worker: take over levels, and the names of levels; return them by logger name ("" is the root).

    Args:
        data: What `read` returned in the parent.
        before: What was taken over before; of these, what is set no longer is not set here either.

    Raises:
        Exception: If that is not what `read` returned.
    """
    levels, disabled, names = marshal.loads(data)
    for level, name in names.items():
        logging.addLevelName(level, name)
    for name in before.keys() - levels.keys():
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)
    logging.disable(disabled)
    return levels  # type: ignore[no-any-return]


def _start_afresh() -> None:
    """In a forked child: forget the lock that some thread of the parent may have held."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
