"""Task groups: what is submitted in a block has ended when the block has, whichever way it is left.

    a member ends      in the thread that resolves its future, mostly the dispatcher's: the group takes note
    one fails, or      nothing of the group starts any more: `submit` raises CancelledError, and whoever gives out tasks
    time is over       leaves its members out; a thread of its own stops those that run
    the block ends     its thread looks for itself who has ended, stops what must be stopped, and waits; there, and
                       nowhere else, errors are unpickled

So nothing here depends on user code that may hang: callbacks are neither waited for nor run by whoever stops the
members, and taking note costs microseconds. A group keeps its unfinished futures, and those that failed; results are
the caller's.

A group that is entered in the block of another one is stopped together with that one, whose limit it would outlast
otherwise: it raises CancelledError then. In asyncio the interruption of the block does the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from taskpool._checks import check_callable
from taskpool._current import name_of
from taskpool._engine.threads import start_undisturbed
from taskpool._options import TaskOptions
from taskpool._task import TaskFuture
from taskpool.backends.base import Backend
from taskpool.errors import CallTimeoutError

if TYPE_CHECKING:
    from taskpool._loops import Block

P = ParamSpec("P")
R = TypeVar("R")

STOP_TIME = 2.0  # seconds beyond its grace in which a task has been killed and its worker buried

now = time.monotonic


class TaskGroup:
    """Tasks that have all ended when a block has. Made by `Executor.group`, for `with` and for `async with`.

    The first member that fails stops the others, and comes out of the block in an `ExceptionGroup`; one that was
    cancelled has not failed. `async with` does not block the loop, and there a failure interrupts the block, too.
    """

    def __init__(
        self,
        backend: Backend,
        options: TaskOptions,
        check_open: Callable[[], None],
        *,
        timeout: float | None = None,
        name: str | None = None,
    ) -> None:
        self.name: str | None = name
        self._backend = backend
        self._options = options
        self._check_open = check_open
        self._timeout = timeout
        self._deadline = math.inf
        self._clock: queue.SimpleQueue[None] = queue.SimpleQueue()  # ends the thread that waits for the deadline
        self._members = _Members("the group" if name is None else f"group {name!r}")
        self._outer: _Members | None = None
        self._block: Block | None = None  # in asyncio

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[R]:
        """Have `fn(*args, **kwargs)` run as a member of the group, with the options of the executor or the view.

        Args:
            fn: What to call.
            args: Its arguments.
            kwargs: Its keyword arguments.

        Returns:
            The task's future.

        Raises:
            concurrent.futures.CancelledError: If the group is being stopped: a member failed, or the time is over.
            RuntimeError: If the group has not been entered or has been left, or the executor was shut down.
            Exception: What `Executor.submit` raises.
        """
        check_callable(fn, "fn")
        self._check_open()
        members, options = self._members, self._options
        future: TaskFuture[R] = TaskFuture(self._backend, options.name or name_of(fn), members)
        try:
            members.add(future)
            self._backend.submit(future, self._backend.carrying(fn), args, kwargs, options)
        except BaseException:  # not accepted; or accepted all the same, if it was a signal handler that raised
            future.stop()
            raise
        if members.is_stopping:
            future.stop()  # whoever stopped the others may have come too early for this one
        return future

    def __repr__(self) -> str:
        return f"<TaskGroup {self.name or hex(id(self))} {self._members}>"

    # The block in a thread

    def __enter__(self) -> Self:
        self._members.open()
        self._enter()
        _innermost.set(self._members)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Wait until all members have ended, and raise what came of it.

        Raises:
            ExceptionGroup: If a member or the block failed, or the time is over.
            concurrent.futures.CancelledError: If a group around this one is being stopped.
            ForkedExecutorError: If this process was forked in the block.
        """
        if self._is_forked(error):
            return
        try:
            error = self._leave(error, CancelledError)
            self._wait(self._bound(error))
        except BaseException:  # Ctrl-C: the members are stopped and awaited, but not longer than that takes
            self._members.give_up()
            self._wait(self._options.grace + STOP_TIME)
            raise
        finally:
            self._end()
        self._conclude(error)

    def _wait(self, seconds: float) -> None:
        """Wait until all members have ended, at most so long, and stop those that must end."""
        news: queue.SimpleQueue[None] = queue.SimpleQueue()  # unlike a condition it stands a handler that raises
        self._members.wake = functools.partial(news.put, None)
        end = now() + seconds
        with self._backend.waiting():
            while not self._members.have_ended() and now() < end:
                if self._members.is_stopping:
                    self._members.stop()
                with contextlib.suppress(queue.Empty):
                    news.get(timeout=None if end == math.inf else max(0.0, end - now()))

    # The block in asyncio

    async def __aenter__(self) -> Self:
        from taskpool._loops import Block

        block = Block(stop=self._members.give_up)
        try:
            self._members.open()
        except RuntimeError:
            block.end()
            raise
        self._block = self._members.block = block
        self._enter()
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Do what leaving `with` does, while the loop goes on.

        Raises:
            ExceptionGroup: If a member or the block failed, or the time is over.
            asyncio.CancelledError: If the surrounding task was cancelled; the members have been stopped.
            concurrent.futures.CancelledError: If a group around this one is being stopped.
            ForkedExecutorError: If this process was forked in the block.
        """
        block = self._block
        assert block is not None
        block.leave()
        if self._is_forked(error):
            return
        try:
            error = self._leave(error, CancelledError, *block.own_cancellation())
            await self._wait_in_loop(block, self._bound(error))
        except BaseException:
            self._members.give_up()
            await self._outlast(block, self._options.grace + STOP_TIME)
            raise
        finally:
            self._end()
        self._conclude(error)

    async def _wait_in_loop(self, block: Block, seconds: float) -> None:
        """Wait until all members have ended, at most so long. Stopping them is left to other threads: they may be many."""
        if block.is_closed_from_outside():
            self._wait(seconds)  # its coroutine is closed or collected, and whatever it awaited would never come back
            return
        self._members.wake = block.ring
        end = now() + seconds
        with self._backend.waiting():
            while not self._members.have_ended() and now() < end:
                await block.wait(end - now())

    async def _outlast(self, block: Block, seconds: float) -> None:
        """Wait at most so long, however often the waiting task is cancelled."""
        from asyncio import CancelledError as CancelledInLoop

        end = now() + seconds
        while (left := end - now()) > 0:
            with contextlib.suppress(CancelledInLoop):
                await self._wait_in_loop(block, left)
                break

    # Both

    def _enter(self) -> None:
        self._members.level = self._backend.level()
        self._outer = _innermost.get()
        if self._outer is not None:
            self._outer.enclose(self._members)
        if self._timeout is not None:
            self._deadline = now() + self._timeout
            thread = threading.Thread(target=self._keep_time, name="taskpool-group-limit", daemon=True)
            start_undisturbed(thread.start)

    def _keep_time(self) -> None:
        """Be the thread that waits for the deadline."""
        try:
            self._clock.get(timeout=max(0.0, self._deadline - now()))
        except queue.Empty:
            self._members.give_up(late=True)

    def _is_forked(self, error: BaseException | None) -> bool:
        """Whether a forked child leaves the block by Ctrl-C, `sys.exit` and the like: nothing is to be done there.

        Raises:
            ForkedExecutorError: If it leaves the block in another way.
        """
        if self._backend.pid == os.getpid():
            return False
        if not _goes_on_raw(error):
            self._backend.check_process()
        return True

    def _leave(self, error: BaseException | None, *consequences: type[BaseException]) -> BaseException | None:
        """Note that the block has ended; return its exception, unless that only comes of the members' being stopped."""
        members = self._members
        if now() >= self._deadline:
            members.give_up(late=True)
        if members.is_stopping and isinstance(error, consequences):
            return None
        if error is not None:
            members.give_up()
        return error

    def _bound(self, error: BaseException | None) -> float:
        """Return how long to wait for the members, in seconds."""
        return self._options.grace + STOP_TIME if _goes_on_raw(error) else math.inf

    def _end(self) -> None:
        self._members.close()
        self._clock.put(None)
        if self._block is not None:
            self._block.end()
        if self._outer is not None:
            self._outer.release(self._members)
        if _innermost.get() is self._members:
            _innermost.set(self._outer)
        self._outer = None

    def _conclude(self, error: BaseException | None) -> None:
        """Raise what came of the block, unless all is well or the block's exception goes on raw."""
        members = self._members
        failed = members.take_failed()
        if _goes_on_raw(error):
            return
        errors = [each for each in (future.exception() for future in failed) if each is not None]
        if members.in_time is not None:
            errors.insert(0, self._timed_out(members.in_time))
        is_own = error is not None and not any(error is each for each in errors)  # not a member's, out of `result`
        if error is not None and is_own:
            errors.append(error)
        if errors:
            raise BaseExceptionGroup(self._summary(len(failed), block_failed=is_own), errors) from None
        if members.is_stopping:
            raise CancelledError(f"{members.title} was stopped together with the group around it") from None

    def _timed_out(self, finished: int) -> CallTimeoutError:
        members = self._members
        return CallTimeoutError(
            f"{members.title} did not finish within {self._timeout:g} seconds; {finished} of {members.submitted} tasks "
            "had finished",
            seconds=self._timeout,
            finished=finished,
        )

    def _summary(self, failed: int, *, block_failed: bool) -> str:
        members = self._members
        late = members.in_time is not None
        parts = [f"it did not finish within {self._timeout:g} seconds"] if late else []
        parts += [f"{failed} of {members.submitted} tasks failed"] if failed else []
        parts += ["the block failed"] if block_failed else []
        return f"{members.title}: {', '.join(parts)}"


def _goes_on_raw(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C or the like, which nobody wraps."""
    return error is not None and not isinstance(error, Exception)


NEW, OPEN, LEFT = "not entered", "open", "left"


class _Members:
    """The members of a group: who has not ended, who has failed, and how all of them are stopped. For any thread.

    Under its lock only its own fields are changed. A future's lock may be held when it is taken, never the other way.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.is_stopping: bool = False  # nothing starts any more, and what runs is stopped
        self.level: int = 0  # how many tasks wait for the members, each for the next
        self.submitted = 0
        self.in_time: int | None = None  # how many had ended when the time was over; None if it is not
        self.wake: Callable[[], object] | None = None  # wakes whoever leaves the block
        self.block: Block | None = None  # in asyncio
        self._state = NEW
        self._unfinished: dict[TaskFuture[Any], int] = {}  # with the number of each
        self._failed: list[tuple[int, TaskFuture[Any]]] = []
        self._inner: set[_Members] = set()  # of the groups in the block
        self._lock = threading.RLock()  # a signal handler may submit or cancel in the thread that has it

    def __repr__(self) -> str:
        state = "stopping" if self.is_stopping and self._state == OPEN else self._state
        return f"{state} unfinished={len(self._unfinished)} submitted={self.submitted}"

    # Coming and going

    def open(self) -> None:
        """Take members from now on, once.

        Raises:
            RuntimeError: If it was open before.
        """
        with self._lock:
            if self._state != NEW:
                raise RuntimeError(f"{self.title} has been entered before; make a new one for each block")
            self._state = OPEN

    def add(self, future: TaskFuture[Any]) -> None:
        """Take a member.

        Raises:
            CancelledError: If the members are being stopped.
            RuntimeError: If the block does not run.
        """
        with self._lock:
            if self._state != OPEN:
                raise RuntimeError(f"{self.title} takes no tasks: it has {_NOT_OPEN[self._state]}")
            if self.is_stopping:
                raise CancelledError(f"{self.title} is being stopped")
            self.submitted += 1
            self._unfinished[future] = self.submitted

    def ended(self, member: TaskFuture[Any]) -> None:
        """Take note that a member is resolved; a failure stops the others."""
        failed = member.has_failed()
        with self._lock:
            number = self._unfinished.pop(member, None)
            if number is None:
                return  # noted before
            if failed:
                self._failed.append((number, member))
            wake = None if self._unfinished else self.wake
        if failed:
            self.give_up()
        if wake is not None:
            wake()

    def have_ended(self) -> bool:
        """Return whether all have ended; from then on there are no others. For whoever leaves the block."""
        # They tell by themselves, unless a signal handler raises in the thread that resolves one.
        for member in self._copy():
            if member._is_resolved():
                self.ended(member)
        with self._lock:
            if not self._unfinished:
                self._state = LEFT
            return self._state == LEFT

    def close(self) -> None:
        """Take no more members."""
        self._state = LEFT

    def take_failed(self) -> list[TaskFuture[Any]]:
        """Return those that failed, in the order of submission, and keep them no longer."""
        failed = sorted(self._failed, key=lambda entry: entry[0])
        self._failed.clear()
        return [member for _number, member in failed]

    def _copy(self) -> list[TaskFuture[Any]]:
        with self._lock:
            return list(self._unfinished)

    # The groups in the block

    def enclose(self, inner: _Members) -> None:
        """Stop `inner` together with these."""
        with self._lock:
            if self._state != OPEN:
                return
            self._inner.add(inner)
        if self.is_stopping:  # set before those inside are looked for, so one of the two finds this
            inner.give_up()

    def release(self, inner: _Members) -> None:
        """Forget `inner`."""
        with self._lock:
            self._inner.discard(inner)

    # Stopping

    def give_up(self, *, late: bool = False) -> None:
        """Let nothing start from now on, and have stopped what runs; `late` if that is because the time is over."""
        with self._lock:
            if self.is_stopping or self._state == LEFT:
                return
            self.is_stopping = True
            if late:
                self.in_time = self.submitted - len(self._unfinished)
            wake = self.wake
        if self.block is not None:
            self.block.interrupt_soon()
        if wake is not None:
            wake()
        if self._unfinished or self._inner:
            self._stop_elsewhere()

    def _stop_elsewhere(self) -> None:
        # They may be many, and this may be the dispatcher's thread, or that of a loop.
        thread = threading.Thread(target=self.stop, name="taskpool-group-stop", daemon=True)
        try:
            start_undisturbed(thread.start)
        except RuntimeError:  # there can be no more threads
            self.stop()

    def stop(self) -> None:
        """Cancel what has not started, stop what runs. Several threads may do so at once, and again."""
        with self._lock:
            inner = list(self._inner)
        for members in inner:
            members.give_up()
        for member in self._copy():
            with contextlib.suppress(
                Exception
            ):  # there may be no thread for its grace; the others must end all the same
                member.stop()


_NOT_OPEN = {NEW: "not been entered", LEFT: "been left"}

_innermost: ContextVar[_Members | None] = ContextVar("taskpool_group", default=None)  # in whose block this thread is
