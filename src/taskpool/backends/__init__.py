"""What runs tasks: the hosted workers, threads, or the caller itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    make: Any
    if name in HOSTED:
        from taskpool.backends.workers import WorkersBackend as make
    elif name == "thread":
        from taskpool.backends.threads import ThreadBackend as make
    elif name == "serial":
        from taskpool.backends.serial import SerialBackend as make
    else:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, not {name!r}")
    return make(name, setup)  # type: ignore[no-any-return]
