"""What the engine knows of shared values (`taskpool.share`): who carries one, and how workers come to forget it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Protocol

KEY = 16  # bytes


class Engine(Protocol):
    """What sends handles to workers."""

    def forget(self, key: bytes) -> None:
        """Have the workers drop a shared value. Never blocks, from any thread."""


class Handle(Protocol):
    """A handle on a shared value."""

    def sent_by(self, engine: Engine) -> None:
        """Note that workers of an engine may get the value."""


class Handles(list[Handle]):
    """Those that were pickled in a `with` block."""

    __slots__ = ("__weakref__",)


class Carried(threading.local):
    """Collects the handles that this thread pickles in a `with` block, and keeps them: nobody else may.

    The blocks may be nested: what is pickled may share something when it is. A signal handler that raises may keep one
    from its end; so what was found belongs to whoever began it, and goes with that.
    """

    def __init__(self) -> None:
        self._found: list[weakref.ref[Handles]] = []

    def __enter__(self) -> Handles:
        while self._found and self._found[-1]() is None:
            self._found.pop()
        found = Handles()
        self._found.append(weakref.ref(found))
        return found

    def __exit__(self, *_: object) -> None:
        self._found.pop()

    def add(self, handle: Handle) -> None:
        """Note a handle, in the middle of a pickle."""
        found = self._found[-1]() if self._found else None
        if found is not None:
            found.append(handle)


def keys_in(data: bytes) -> list[bytes]:
    """Return the keys that stand one behind the other."""
    return [data[at : at + KEY] for at in range(0, len(data), KEY)]


is_used = False  # whether this process may have handles; those who pickle much need not look for them before
carried = Carried()
on_forget: Callable[[bytes], object] = repr  # called with the keys of values that the program has dropped
