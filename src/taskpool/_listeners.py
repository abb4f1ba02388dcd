"""Who is told what happens to tasks. The records themselves are loaded only where somebody listens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskpool.events import Event, Listener


class Listeners:
    """Those who want to know; false if nobody does, so that nothing is done for nobody."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self._listeners = list(listeners)

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def tell(self, event: Event) -> None:
        """Call each with a record. User code runs here."""
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:
                with contextlib.suppress(ValueError):  # another thread was faster
                    self._listeners.remove(listener)
                logging.getLogger("taskpool").exception("the listener %r raised; it is called no more", listener)
