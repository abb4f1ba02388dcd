"""The worker: one loop that receives a task, runs it and writes the outcome, until the sentinel.

It runs in the main thread of a process that some host started, for the whole life of that process, and it imports
nothing of the parent's side. What it is doing at each moment stands in the page, written *before* it does it, so that
the parent knows after any death what had started.
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from taskpool import _current, _nesting
from taskpool._engine import exceptions, memory, namespace, plain, sharing, stop, wire
from taskpool._engine.channel import (
    ANY_ITEM,
    BETWEEN,
    IDLE,
    INTERRUPT,
    INTERRUPT_ITEM,
    ITEM,
    LEVELS,
    LOADING,
    PHASE,
    RUNNING,
    STARTED,
    TURN,
    UNIT,
    WRITING,
    WRITTEN,
    WorkerChannel,
    WorkerEnd,
)
from taskpool._engine.wire import Frame, Pickled

GROUP = 1e-3  # outcomes of items are written in groups of about this long (seconds)
LOOK = (
    10e-6  # items are run until so much time has passed; if it is as much more, the last one was slow: they are written
)
SOME = 100  # ... but no more than so many
TINY = 1e-6  # items quicker than this, measured in
TINY_IN_A_ROW = 10  # ... stretches of LOOK, run for ten times as long
REPORTS = 50e-3  # seconds between two reports of a task that are sent

now = time.monotonic


class TaskInterrupt(BaseException):
    """Raised inside a task that must end. Not an Exception, so that ordinary handlers let it pass."""


class Interrupts:
    """Turns SIGUSR1 into a TaskInterrupt, if the task that is meant still runs and no frame is being written.

    Signal handlers run in the main thread between two bytecodes, and so does the worker loop: check and raise cannot
    be separated by anything the loop does. The ids keep a late signal from hitting the next task or item.
    """

    def __init__(self, channel: WorkerChannel) -> None:
        self._words = channel.page.words
        self.armed = 0  # the unit that may be interrupted right now
        self.stack: str | None = None  # where the task was when it was interrupted
        self.came = False  # an interrupt for this unit came: the unit ends here, in time or too late
        self._shields = 0
        self._postponed: FrameType | None = None

    def arm(self, unit: int) -> None:
        """Let this unit be interrupted from now on. What was asked for earlier, when the signal was ignored, comes now."""
        self.armed = unit
        if self._words[INTERRUPT] == unit:
            self.handle(0, sys._getframe(1))

    def handle(self, _number: int, frame: FrameType | None) -> None:
        """Be the signal handler."""
        words = self._words
        if not self.armed or words[INTERRUPT] != self.armed:
            return
        self.came = True
        if words[INTERRUPT_ITEM] not in (words[ITEM], ANY_ITEM):
            return  # that item has just ended by itself; the next ones do not start here, where a kill may be due
        if self._shields:
            self._postponed = frame
            return
        self._raise(frame)

    def _raise(self, frame: FrameType | None) -> None:
        import traceback

        self.armed = 0
        self.stack = "".join(traceback.format_stack(frame)) + _other_stacks()
        raise TaskInterrupt

    def shield(self) -> None:
        """Begin a stretch that must not be cut."""
        self._shields += 1

    def unshield(self) -> None:
        """End it, and raise now what came meanwhile."""
        self._shields -= 1
        if self._postponed is not None and not self._shields:
            frame, self._postponed = self._postponed, None
            if self.armed:
                self._raise(frame)


class Worker:
    """One worker process: its channel, and what it knows of the task that it runs."""

    def __init__(
        self, channel: WorkerChannel, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
    ) -> None:
        self.channel = channel
        self._initializer = initializer, initargs
        self.interrupts = Interrupts(channel)
        self.name = ""
        self._main_thread = threading.get_ident()
        self._handler = self.interrupts.handle  # one object, so that "is it still installed?" can be asked
        self._words = channel.page.words
        self._times = channel.page.times
        self._lent = memory.Lent(self._words, TURN, WRITTEN)
        self._finished = False
        self._frame: Frame | None = None  # of the unit that runs
        self._task = "", "", 0  # the name of its task, the beginning of its id, and the number of its first item
        self._reported = 0.0  # when the last report was sent
        self._levels_version: int | None = None  # of the loggers' levels; None if they are not the parent's
        self._levels: dict[str, int] = {}
        self.tells_starts = False  # whether somebody listens to that
        self.marks = b""  # what marks in the output begin with; empty where there are none

    # Life

    def run(self) -> None:
        """Serve tasks until the sentinel, the end of the channel, or an interrupt, after which the state is unknown."""
        self.channel.send(wire.frame_head(wire.HELLO, os.getpid()))
        while not self._finished:
            frame = self.channel.receive()
            if frame is None or frame.kind == wire.SENTINEL:
                break
            if frame.kind == wire.SETUP:
                self._set_up(frame)
            elif frame.kind == wire.CALL:
                self._run_call(frame)
            elif frame.kind == wire.FORGET:
                sharing.on_forget(bytes(frame.body.stream))
            else:
                self._run_range(frame)
            del frame  # nothing of a finished task is kept while the next is awaited
        _flush()
        self.channel.send(wire.frame_head(wire.GOODBYE))

    def _set_up(self, frame: Frame) -> None:
        try:
            prefix, (forwards_logs, self.tells_starts), _, sent_initializer = wire.loads(frame.body)
            self.name = f"{prefix}-{frame.item}"
            if forwards_logs:
                self._forward_logs()
            initializer, initargs = sent_initializer or self._initializer
            if initializer is not None:
                initializer(*initargs)
        except BaseException as error:
            import logging

            # As the standard library's workers do, in the same words.
            logging.getLogger("concurrent.futures").critical("Exception in initializer:", exc_info=True)
            self._report(wire.NOT_READY, frame, exceptions.encode(error, frames_of_ours=1))
            self._finished = True
        else:
            self._report(wire.READY, frame)

    def _forward_logs(self) -> None:
        from taskpool._engine.forwarding import forward

        forward(self.send_log, self._is_loading)
        self._apply_levels()

    def _is_loading(self) -> bool:
        return self._words[PHASE] == LOADING and threading.get_ident() == self._main_thread

    def send_log(self, record: bytes) -> None:
        """Write a log record to the parent: when this returns the kernel has it, whatever happens to this process.

        In a handler that interrupted the writing of another record: when that returns.
        """
        words = self._words
        frame = wire.log_frame(words[UNIT], words[ITEM], record)
        if threading.get_ident() != self._main_thread:
            self.channel.send_small(frame)
            return
        interrupts = self.interrupts
        interrupts.shield()
        try:
            self.channel.send_small(frame)
        finally:
            interrupts.unshield()

    def _apply_levels(self) -> None:
        """Take over the levels of the parent's loggers."""
        from taskpool import _levels

        self._levels_version, data = self.channel.page.levels()
        self._levels = _levels.apply(data, self._levels)

    def _send_beside(self, head: bytes, body: Pickled | None = None) -> None:
        """Write a frame from within a task, from whichever of its threads."""
        shielded = threading.get_ident() == self._main_thread
        if shielded:
            self.interrupts.shield()
        try:
            self.channel.send(head, body)
        finally:
            if shielded:
                self.interrupts.unshield()

    def tell_start(self, unit: int, item: int, started: float) -> None:
        """Say that something begins, to whoever wants to know."""
        if self.marks and self.channel.output is not None:
            from taskpool._engine.printed import mark

            _flush()
            mark(self.channel.output, self.marks, unit, item)
        if self.tells_starts:
            self._send_beside(wire.frame_head(wire.BEGUN, unit, index=item, started=started))

    # What a task asks about itself

    def current(self) -> _current.CurrentTask | None:
        """Return what `current_task` returns."""
        frame, words = self._frame, self._words
        if frame is None or words[PHASE] != RUNNING:
            return None
        name, beginning, first = self._task
        index = words[ITEM]
        return _current.CurrentTask(
            name,
            f"{beginning}:{first + index}" if frame.kind == wire.RANGE else beginning,
            frame.attempt,
            self._times[STARTED] + frame.seconds if frame.seconds else None,
            is_stopping=lambda: words[INTERRUPT] == frame.unit and words[INTERRUPT_ITEM] in (index, ANY_ITEM),
            report=lambda done, total: self._report_progress(frame.unit, index, done, total),
        )

    def _report_progress(self, unit: int, index: int, done: float, total: float) -> None:
        if done < total and now() - self._reported < REPORTS:
            return
        self._reported = now()
        self._send_beside(wire.frame_head(wire.REPORT, unit, index=index, started=done, seconds=total))

    # One call

    def _run_call(self, frame: Frame) -> None:
        started = self._begin(frame.unit)
        kind, body, seconds = self._call(frame, started)
        seconds = seconds or now() - started
        if self.interrupts.stack is not None:  # also if the task swallowed it and went on to an end of its own
            kind, body = self._interrupted()
        if body is not None:
            body = self._moved(body)
        self._report(kind, frame, body, started=started, seconds=seconds)
        self._end()

    def _call(self, frame: Frame, started: float) -> tuple[int, Pickled | None, float]:
        """Return how the call ended; its arguments are gone with this function's own frame."""
        kind, body, seconds = wire.UNREADABLE, None, 0.0
        try:
            try:
                self.interrupts.arm(frame.unit)
                stream = frame.body.stream
                fn, args, kwargs, name = plain.loads_call(stream) if plain.is_call(stream) else wire.loads(frame.body)
                kind = wire.RAISED
                self._task = name or _current.name_of(fn), str(frame.item), 0
                self._frame = frame
                self._words[PHASE] = RUNNING
                if self.tells_starts or self.marks:
                    self.tell_start(frame.unit, 0, started)
                if "structlog.contextvars" in sys.modules:  # what the task binds is gone with it
                    value = contextvars.copy_context().run(fn, *args, **kwargs)
                else:
                    value = fn(*args, **kwargs)
                kind, seconds = wire.UNSENDABLE, now() - started
                del fn, args, kwargs
                if type(value) in plain.NUMBERS:
                    kind, body = wire.NUMBERS, Pickled(plain.dumps(value))
                else:
                    body = wire.dumps(value)
                    kind = wire.VALUES
            finally:
                self.interrupts.armed = 0
        except BaseException as error:
            kind, body = _failed(kind, error)
        return kind, body, seconds

    def _begin(self, unit: int) -> float:
        if self._levels_version not in (self._words[LEVELS], None):
            self._apply_levels()
        started = now()
        self._times[STARTED] = started
        self._words[ITEM] = 0
        self._words[PHASE] = LOADING
        self._words[UNIT] = unit
        stop.on_interrupt(self._handler)
        return started

    def _end(self) -> None:
        self._frame = None
        self._words[PHASE] = IDLE  # the unit stays: should its outcome be lost, it is known to have begun
        stop.clear_timers()

    def _interrupted(self) -> tuple[int, Pickled]:
        """Return the outcome of an interrupted task. The worker then ends: the task may have left anything half done."""
        self._finished = True
        return wire.INTERRUPTED, Pickled((self.interrupts.stack or "").encode(errors="replace"))

    def _report(
        self,
        kind: int,
        frame: Frame,
        body: Pickled | None = None,
        *,
        index: int = 0,
        count: int = 1,
        started: float = 0.0,
        seconds: float = 0.0,
    ) -> None:
        self._words[PHASE] = WRITING
        goes_on = frame.kind == wire.RANGE and count > 0 and index + count < frame.item + frame.items
        if memory.mappings and (not goes_on or kind == wire.INTERRUPTED):
            memory.mappings.part()  # the parent may use its blocks for something else as soon as it has this outcome
        _flush()
        head = wire.frame_head(kind, frame.unit, body, index=index, count=count, started=started, seconds=seconds)
        self.channel.send(head, body)

    def _moved(self, body: Pickled) -> Pickled:
        """Return an outcome that no longer depends on what the task has in memory; a large one lies in the parent's."""
        if not (memory.mappings or body.buffers or body.rest or len(body.stream) >= memory.LARGE):
            return body
        self._words[PHASE] = WRITING
        if body.size >= memory.LARGE and len(body.buffers) < memory.MOST_PARTS:
            stream = body.stream if body.length < memory.LARGE else b""
            places = self._lent.store(body.parts()[bool(stream) :])
            if places is not None:
                return Pickled(stream, places=places)
        return wire.frozen(body) if memory.mappings else body

    # A range of the items of a map

    def _run_range(self, frame: Frame) -> None:
        """Run items one after the other; one that fails or cannot be read or sent costs no other."""
        self._begin(frame.unit)
        self._words[ITEM] = frame.item
        run = RangeRun(self, frame)
        try:
            try:
                self.interrupts.arm(frame.unit)
                run.load()
            finally:
                self.interrupts.armed = 0
            if self.interrupts.stack is not None:
                raise TaskInterrupt  # the loading swallowed the first
        except BaseException as error:
            # Whatever it was, nothing of the range has run. The parent sends several items again, each by itself.
            kind, body = _failed(wire.UNREADABLE, error)
            count = frame.items
            if self.interrupts.stack is not None:
                kind, body = self._interrupted()
                count = 0  # none of them had begun
            self._report(kind, frame, body, index=frame.item, count=count)
        else:
            while run.index < run.end and not self.interrupts.came:
                run.run_until_something_happens()
            if self.interrupts.came and not self._finished:
                run.drop_items()
                self.interrupts.came = False
                self._report(wire.HALTED, frame, index=run.index, count=0)
        self._end()


class RangeRun:
    """The run of one range: the values that were not written yet, and where it stands."""

    def __init__(self, worker: Worker, frame: Frame) -> None:
        self.worker = worker
        self.frame = frame
        self.index = frame.item  # the item that runs
        self.end = frame.item + frame.items
        self._limited = frame.seconds > 0  # whether the parent looks at when an item started
        self._tiny = 0  # how many stretches of tiny items there were in a row
        self.first = frame.item  # the item of the first value in `values`
        self.values: list[Any] = []
        self.group_started = 0.0

    def load(self) -> None:
        """Unpickle function and items, whether an item is a tuple of arguments, and what names them."""
        fn, items, self._star, name, job, first = wire.loads(self.frame.body)
        self.worker._task = name or _current.name_of(fn), str(job), first
        self.worker._frame = self.frame
        if "structlog.contextvars" in sys.modules:  # what an item binds is gone with it
            from taskpool import _carrier

            fn = _carrier.isolated(fn)
        self._fn: Callable[..., Any] = fn
        self._items = items
        self.worker._words[PHASE] = RUNNING

    def run_until_something_happens(self) -> None:
        """Run items to the end of the range, or to the first that raises or is interrupted, and report that one."""
        worker, interrupts = self.worker, self.worker.interrupts
        self.group_started = now()
        outcome = None
        try:
            try:
                interrupts.arm(self.frame.unit)
                while self.index < self.end and not interrupts.came:
                    self._run_some()
            finally:
                interrupts.armed = 0
        except BaseException as error:
            if worker._words[ITEM] != BETWEEN:
                self.index = worker._words[ITEM]
            if interrupts.stack is not None:
                outcome = worker._interrupted()
            else:
                outcome = wire.RAISED, exceptions.encode(error, frames_of_ours=3)
        self.flush()
        if outcome is not None:
            self._report_one(*outcome)

    def drop_items(self) -> None:
        """Let go of the items, the function, and the memory in which they lie: none will run any more."""
        self._items, self._fn = (), repr

    def _run_some(self) -> None:
        # A look at the clock behind each item: items run until their time is over, so if then much more has passed, the
        # last one was slow, and what has gathered before it is written at once. Tiny ones have more time.
        are_tiny = self._tiny >= TINY_IN_A_ROW
        began = now()
        until = began + (10 * LOOK if are_tiny else LOOK)
        some = 1 if self.worker.marks else 10 * SOME if are_tiny else SOME
        first, last = self.index, min(self.index + some, self.end)
        carefully = self._limited or self._star or self.worker.tells_starts or self.worker.marks
        run = self._run_carefully if carefully else self._run_plainly
        self.index = 1 + run(self._items[first:last], first, until)
        if self.worker.interrupts.stack is not None:
            raise TaskInterrupt  # the item swallowed the first and went on to an end of its own: too late
        ended = now()
        self._tiny = self._tiny + 1 if ended - began < TINY * (self.index - first) else 0
        if ended - until >= LOOK or ended - self.group_started >= GROUP or self.worker.marks:
            self.flush()

    # The hot loops of every map, so what they need stands in local names; what the second one can do has its price.
    # A mark before each item, so that after a death it is known which one ran. (`values.append` by its whole name: the
    # interpreter has an instruction for that.)

    def _run_plainly(self, items: Sequence[Any], first: int, until: float) -> int:
        words, fn, values, clock = self.worker._words, self._fn, self.values, now
        index = first
        for index, item in enumerate(items, first):
            words[ITEM] = index
            values.append(fn(item))
            if clock() >= until:
                break
        return index

    def _run_carefully(self, items: Sequence[Any], first: int, until: float) -> int:
        words, times, fn, star = self.worker._words, self.worker._times, self._fn, self._star
        values, clock = self.values, now
        tell = self.worker.tell_start if self.worker.tells_starts or self.worker.marks else None
        index, ended = first, clock()
        for index, item in enumerate(items, first):
            times[STARTED] = ended  # nothing lies between the end of one item and the start of the next
            words[ITEM] = index
            if tell is not None:
                tell(self.frame.unit, index, ended)
            values.append(fn(*item) if star else fn(item))
            ended = clock()
            if ended >= until:
                break
        return index

    def flush(self) -> None:
        """Write the values that are waiting, as one frame; each alone if together they cannot be pickled."""
        values = self.values
        del values[self.index - self.first :]  # of an item that was interrupted when it had just ended
        seconds = now() - self.group_started
        interrupts = self.worker.interrupts
        armed, interrupts.armed = interrupts.armed, 0
        if values:
            self._write(seconds)
        values.clear()
        self.first = self.index
        self.worker._words[ITEM] = BETWEEN  # an interrupt for the item that is written now comes too late
        self.worker._words[PHASE] = RUNNING
        stop.clear_timers()
        self.group_started = now()
        if armed and self.index < self.end:
            interrupts.arm(armed)

    def _write(self, seconds: float) -> None:
        report, first, values = self.worker._report, self.first, self.values
        if self.index >= self.end:
            self.drop_items()
        try:
            kind, body = self._dump_all()
        except BaseException:
            self._write_singly()
        else:
            started, count = self.group_started, len(values)
            values.clear()
            body = self.worker._moved(body)
            report(kind, self.frame, body, index=first, count=count, started=started, seconds=seconds)

    def _dump_all(self) -> tuple[int, Pickled]:
        if plain.are_numbers(self.values):
            return wire.NUMBERS, Pickled(plain.dumps(self.values))
        return (wire.VALUES, wire.dumps(self.values)) if wire.are_plain(self.values) else self._dump_each()

    def _dump_each(self) -> tuple[int, Pickled]:
        """Pickle each value by itself: one whose pickling kills or hangs this process is to blame, and it alone."""
        bodies = [self._dump_one(index, value) for index, value in enumerate(self.values, self.first)]
        if len(bodies) == 1:
            return wire.VALUES, bodies[0]
        if any(body.buffers or body.rest for body in bodies):
            raise ValueError("these are sent one by one")  # a frame's parts say nothing of whose buffers they are
        return wire.EACH, Pickled(bodies[0].stream, [body.stream for body in bodies[1:]])

    def _dump_one(self, index: int, value: Any) -> Pickled:
        self.worker._words[ITEM] = index
        return wire.dumps([value])

    def _write_singly(self) -> None:
        for index, value in enumerate(self.values, self.first):
            try:
                kind, body = wire.VALUES, self._dump_one(index, value)
            except BaseException as error:
                kind, body = wire.UNSENDABLE, exceptions.encode(error, frames_of_ours=1)
            body = self.worker._moved(body)
            self.worker._report(kind, self.frame, body, index=index, started=self.group_started)

    def _report_one(self, kind: int, body: Pickled) -> None:
        seconds = now() - self.group_started
        if self.index + 1 >= self.end:
            self.drop_items()
        self.worker._report(kind, self.frame, body, index=self.index, started=self.group_started, seconds=seconds)
        self.worker._words[PHASE] = RUNNING
        self.index += 1
        self.first = self.index


def _other_stacks() -> str:
    """Return the stacks of all threads but this one."""
    import traceback

    me, names = threading.get_ident(), {thread.ident: thread.name for thread in threading.enumerate()}
    text = ""
    for ident, frame in sys._current_frames().items():
        if ident != me:
            text += f"\nThread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
    return text


def _failed(kind: int, error: BaseException) -> tuple[int, Pickled | None]:
    """Return the outcome of a task that ended with an error in a phase in which that is of this kind."""
    if kind == wire.UNREADABLE and isinstance(error, memory.BlockError):
        return wire.UNOPENED, None
    return kind, exceptions.encode(error, frames_of_ours=1)


def _flush() -> None:
    # What a task printed comes before its outcome. A task may have closed or replaced its streams.
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        return


def main(
    end: WorkerEnd,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
    *,
    signals_are_reset: bool = False,
) -> None:
    """Be a worker on this channel. Called in the main thread of a new process, for the rest of its life.

    Args:
        end: The worker's end of the channel.
        initializer: Called before the first task, if the host had to pass it itself.
        initargs: Its arguments.
        signals_are_reset: Whether the process was forked from one that has no handlers of the parent.
    """
    stop.lead_own_group()
    channel = WorkerChannel(end)
    if not signals_are_reset:
        stop.reset_signals()
    stop.arm_life_pipe(channel.life)
    stop.write_stacks_to(channel.page_fd)
    namespace.begin()
    worker = Worker(channel, initializer, initargs)
    if channel.output is not None:
        from taskpool._engine import printed

        worker.marks = printed.key_of(channel.page)
        printed.redirect(channel.output)
    _current.set_source(worker.current)
    pid = os.getpid()
    os.register_at_fork(after_in_child=channel.close)
    stop.on_interrupt(worker._handler)
    try:
        worker.run()
        for call in _nesting.at_end:
            call()
    except OSError:
        # The channel is gone: the task closed it, or this is a child that the task forked and that came back here.
        os._exit(1 if os.getpid() == pid else 0)
    except BaseException:
        # Whatever it is, the process ends with it, since a host that caught it would live on with the channel open.
        import traceback

        traceback.print_exc()
        os._exit(1)
