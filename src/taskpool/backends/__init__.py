"""What runs tasks: the hosted workers, threads, or the caller itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskpool.backends.base import Backend, Setup

HOSTED = ("process", "futures", "pool")
NAMES = (*HOSTED, "thread", "serial")


def make_backend(name: object, setup: Setup) -> Backend:
    """Return the backend of this name.

    Raises:
        TypeError: If the name is not text.
        ValueError: If there is no such backend.
        UnsupportedError: If it cannot do what `setup` asks for.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be one of {', '.join(map(repr, NAMES))}, not {name!r}")
    if name in HOSTED:
        from taskpool.backends.workers import WorkersBackend

        return WorkersBackend(name, setup)
    if name == "thread":
        from taskpool.backends.threads import ThreadBackend

        return ThreadBackend(name, setup)
    if name == "serial":
        from taskpool.backends.serial import SerialBackend

        return SerialBackend(name, setup)
    raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, not {name!r}")
