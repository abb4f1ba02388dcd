"""Starts of processes that may block: each in a thread of its own, so that the dispatcher never waits for one.

Under forkserver multiprocessing waits for the server's answer, and a server that is stopped answers nobody; and what
pickles the arguments is users' code. There is no bound on that. So the dispatcher goes on meanwhile, and what comes of
a start is adopted on its thread. A start that is given up before answers for itself: should it ever end, it disposes of
what it made.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from taskpool._engine.channel import WorkerEnd

Key = TypeVar("Key")
Made = TypeVar("Made")

AT_ONCE = 16  # starts of one host, each in a thread

now = time.monotonic


class Launch(Generic[Key, Made]):
    """One start.

    Args:
        key: What it is for.
        make: What to run.
        end: The worker's end that it passes on. Nobody else closes it: its numbers would soon mean other files.
        over: Called on its thread when it is over.
    """

    def __init__(
        self,
        key: Key,
        make: Callable[[], Made],
        end: WorkerEnd | None,
        over: Callable[[Launch[Key, Made]], None],
    ) -> None:
        self.key = key
        self.made: Made | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, name="taskpool-start", daemon=True)
        self.lock = threading.Lock()  # of the next two: whoever sets the second disposes of what was made
        self.is_over = False
        self.is_given_up = False
        self._make = make
        self._end = end
        self._over = over

    def run(self) -> None:
        """Make it."""
        try:
            self.made = self._make()
        except BaseException as error:
            self.error = error
        self._over(self)

    def take(self) -> tuple[Made | None, BaseException | None]:
        """Return what was made and what was raised, once, and close the worker's end: the start is over."""
        if self._end is not None:
            self._end.close()
        made, error = self.made, self.error
        self.made = self.error = None  # an error holds this, by its traceback
        return made, error


class Launches(Generic[Key, Made]):
    """The starts of one host that are under way. All methods belong to the dispatcher's thread.

    Args:
        post: Has that thread call a function with an argument.
        adopt: Called there with a key and what was made for it.
        fail: Called there with a key and why nothing was made.
        dispose: Called on any thread with what was made and is not wanted any more.
    """

    def __init__(
        self,
        post: Callable[[Callable[[Any], None], Any], None],
        *,
        adopt: Callable[[Key, Made], None],
        fail: Callable[[Key, BaseException], None],
        dispose: Callable[[Made], None],
    ) -> None:
        self._post = post
        self._adopt = adopt
        self._fail = fail
        self._dispose = dispose
        self._begun: dict[Key, Launch[Key, Made]] = {}
        self._given_up: list[Launch[Key, Made]] = []

    def __contains__(self, key: Key) -> bool:
        """Whether a start for it is under way."""
        return key in self._begun

    def free(self) -> int:
        """Return how many more may be begun."""
        return AT_ONCE - len(self._begun)

    def begin(self, key: Key, make: Callable[[], Made], end: WorkerEnd | None = None) -> None:
        """Begin a start.

        Args:
            key: What it is for.
            make: What to run.
            end: The worker's end that it passes on; it is closed when the start is over.
        """
        launch = self._begun[key] = Launch(key, make, end, self._over)
        try:
            launch.thread.start()
        except RuntimeError:  # Python 3.12.0 and 3.12.1 start no thread once the main thread has ended
            launch.run()

    def _over(self, launch: Launch[Key, Made]) -> None:
        """A start is over. On its thread."""
        with launch.lock:
            launch.is_over = True
            is_wanted = not launch.is_given_up
        if not is_wanted:
            self._discard(launch)
        else:
            self._post(self._tell, launch)

    def _tell(self, launch: Launch[Key, Made]) -> None:
        if launch.is_given_up:
            return  # since it was over
        del self._begun[launch.key]
        made, error = launch.take()
        if made is not None:
            self._adopt(launch.key, made)
        elif error is not None:
            self._fail(launch.key, error)

    def give_up(self, key: Key) -> None:
        """Want no longer what a start makes, if one is under way."""
        launch = self._begun.pop(key, None)
        if launch is None:
            return
        with launch.lock:
            launch.is_given_up = True
            was_over = launch.is_over
        if was_over:
            self._discard(launch)
        else:
            self._given_up = [other for other in self._given_up if other.thread.is_alive()] + [launch]

    def _discard(self, launch: Launch[Key, Made]) -> None:
        made, _error = launch.take()
        if made is not None:
            self._dispose(made)

    def close(self, timeout: float) -> None:
        """Wait a while for what was given up; what blocks even then ends with this process."""
        deadline = now() + timeout
        for launch in self._given_up:
            with contextlib.suppress(RuntimeError):  # it ran in no thread
                launch.thread.join(max(0.0, deadline - now()))
