"""How deep this process is nested: 0 in the main program, one more in each worker that a worker started.

A task that uses taskpool gets executors of its own process. What bounds their number stands here, for the process as a
whole; it comes from the parent, with the setup.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Calls that are nested on purpose go two or three deep: a task calls a library that maps, in whose tasks another one
# does. What goes deeper is a recursion, and each level multiplies: four levels of four workers make 340 processes,
# eight would make 87,380.
MAX_DEPTH = 4

depth: int = 0
sharers: int = 1  # with how many workers, itself included, this process shares the CPUs
at_end: list[Callable[[], None]] = []  # what a worker calls before it ends


class Place:
    """Where a worker stands. To load its pickle is to take the place.

    So it is taken before what is pickled behind it is loaded: the initializer, whose module may make an executor.

    Args:
        workers: How many workers may stand beside it, itself included.
    """

    def __init__(self, workers: int) -> None:
        self.depth = depth + 1
        self.sharers = sharers * workers

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, (self.depth, self.sharers)


def _take(new_depth: int, new_sharers: int) -> None:
    global depth, sharers
    depth, sharers = new_depth, new_sharers
