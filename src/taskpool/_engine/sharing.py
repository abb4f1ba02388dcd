"""What the engine knows of shared values (`taskpool.share`): who carries one, and how workers come to forget it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol


class Engine(Protocol):
    """What sends handles to workers."""

    def forget(self, key: bytes) -> None:
        """Have the workers drop a shared value. Never blocks, from any thread."""


class Handle(Protocol):
    """A handle on a shared value."""

    def sent_by(self, engine: Engine) -> None:
        """Note that workers of an engine may get the value."""


class Carried(threading.local):
    """The handles that this thread has pickled since it last asked."""

    def __init__(self) -> None:
        self._handles: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, handle: Handle) -> None:
        """Note a handle, in the middle of a pickle."""
        self._handles.add(handle)

    def take(self) -> list[Handle]:
        """Return those noted so far."""
        handles = list(self._handles)
        self._handles.clear()
        return handles


is_used = False  # whether this process has ever had a handle
carried = Carried()
on_forget: Callable[[bytes], object] = repr  # called with the key of a value that the program has dropped
