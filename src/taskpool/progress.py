"""Progress on standard error: a bar on a terminal and in a notebook, a line every few seconds where there is neither.

```
show()                                        close()
  └── a message ──► the ticker, one thread ◄── a message
                      └── begin, tick, end ──► _Bar        all rows of a terminal, through rich
                                               _Notebook   a cell's output, through rich
                                               _Lines      plain text, anywhere
```

The ticker alone draws, so nothing that a terminal does (it may be stopped for hours by Ctrl-S) holds up a map: whoever
closes a display waits for its last state by a bound. What does not work any more is dropped in silence.

While a bar is drawn, stand-ins take the place of `sys.stdout` and `sys.stderr` and in the logging handlers that hold
them, as far as they lead to the same terminal: whole lines appear above the bar, as they are. rich's own redirection
is not used: it sends what is printed to a redirected `stdout` to the terminal, and wraps lines.

Nothing is shown with `TASKPOOL_PROGRESS=0` in the environment, or where there is no `sys.stderr`. The only file that
knows rich.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import attrs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.segment import SegmentLines
    from rich.table import Table

REFRESH = 0.1  # seconds between two pictures of a bar
NOTEBOOK_REFRESH = 0.25  # ... in a notebook, which keeps every one of them in its messages
LINES_EVERY = 5.0  # seconds between two plain lines
PACE = 5.0  # seconds; the rate is that of a stretch of at least this length
CLOSE_TIMEOUT = 2.0  # the longest that `close` waits for the last state to be drawn
LONGEST_REST = 1 << 16  # characters of a line without end that are held back
LONGEST_BAR, BAR_STEP = 40, 4  # columns
NOTEBOOK_WIDTH = 100  # columns
DECIMAL_BELOW = 9.95  # such a rate is told with one decimal
HINT = 'pip install "taskpool-executor[progress]" shows a bar here'


class Counted(Protocol):
    """What a display looks at; it may do so at any time, from its own thread.

    Attributes:
        finished: How many items have ended, with a result or an error.
        failed: How many of these with an error.
        total: How many there will be; None as long as that is not known.
    """

    finished: int
    failed: int
    total: int | None

    def part(self) -> float:
        """Return what running tasks have reported of themselves, in items: 0.5 while one of them is half done."""
        raise NotImplementedError


def show(counted: Counted, label: str) -> Display:
    """Begin to show a map; whoever calls this closes what it returns.

    Args:
        counted: What to look at.
        label: What to call it; may be empty.
    """
    display = Display(counted, label)
    stream = _behind(sys.stderr)
    if stream is not None and os.environ.get("TASKPOOL_PROGRESS") != "0":
        try:
            _ticker.show(display, _painter_for(display, stream))
        except Exception as error:  # say, no thread is to be had: the map goes on in the dark
            _say_why(error)
    return display


def _say_why(error: BaseException) -> None:
    with contextlib.suppress(Exception):  # a handler may write to the very stream that is broken
        logging.getLogger("taskpool").debug("progress cannot be shown", exc_info=error)


class Display:
    """One map that is shown until `close`."""

    def __init__(self, counted: Counted, label: str) -> None:
        self._label = " ".join("".join(sign if sign.isprintable() else " " for sign in label).split())
        self._counted = counted
        self._started = time.monotonic()
        self._ended: float | None = None
        self._pace = _Pace(self._started)
        self._ticker: _Ticker | None = None
        self._shown = threading.Lock()  # taken until the last state has been drawn

    def close(self) -> None:
        """Show the last state and end; from any thread, and again without effect.

        It waits a moment for the drawing, and never raises because the terminal is gone.
        """
        if self._ended is None:
            self._ended = time.monotonic()
        if self._ticker is _ticker:  # else it was never shown, or by the process that this one was forked from
            _ticker.close(self)

    def _figures(self) -> _Figures:
        finished, total = self._counted.finished, self._counted.total
        if self._ended is not None:
            seconds = max(self._ended - self._started, 1e-6)
            return _Figures(finished, self._counted.failed, total, finished, finished / seconds, seconds, ended=True)
        now = time.monotonic()
        done = finished + max(0.0, self._counted.part())
        done = done if total is None else min(done, total)
        rate = self._pace.measure(now, done)
        return _Figures(finished, self._counted.failed, total, done, rate, now - self._started, ended=False)


# ---------------------------------------------------------------------------------------------- figures


class _Pace:
    """How fast a count has grown of late: over a stretch of at least PACE seconds and a quarter of its life.

    So it follows a change, and does not jump where an item takes minutes.
    """

    def __init__(self, now: float) -> None:
        self._began = now
        self._old = self._new = (now, 0.0)

    def measure(self, now: float, done: float) -> float:
        """Return the items per second."""
        if now - self._new[0] >= max(PACE, (now - self._began) / 4):
            self._old, self._new = self._new, (now, done)
        then, had = self._old
        return max(0.0, done - had) / (now - then) if now > then else 0.0


@attrs.frozen
class _Figures:
    """What a display says at one moment.

    Attributes:
        finished: How many items have ended.
        failed: How many of them failed.
        total: How many there will be, if that is known.
        done: Those that have ended, and the parts of those that run.
        rate: Items per second.
        seconds: How long the map has run.
        ended: Whether this is its last state.
    """

    finished: int
    failed: int
    total: int | None
    done: float
    rate: float
    seconds: float
    ended: bool

    def line(self, label: str) -> str:
        """Say all of it in a line of text."""
        of = "done" if self.total is None else f"of {self.total}"
        percent = f" ({self.percent})" if self.percent else ""
        left = f"about {self.time}" if self.time and not self.ended else self.time
        words = ", ".join(filter(None, [f"{self.finished} {of}{percent}", self.failures, self.speed, left]))
        return f"{label}: {words}" if label else words

    @property
    def extent(self) -> tuple[float | None, float]:
        """How long the whole bar is, None if that is not known, and how much of it is done."""
        if self.total is None and self.ended:
            return 1, 1
        return self.total, self.done

    @property
    def count(self) -> str:
        """How many of how many, in short."""
        return f"{self.finished} done" if self.total is None else f"{self.finished}/{self.total}"

    @property
    def percent(self) -> str:
        """The part that has ended; 100 only when all have."""
        return f"{min(100, 100 * self.finished // self.total)} %" if self.total else ""

    @property
    def failures(self) -> str:
        """How many failed, if any did."""
        return f"{self.failed} failed" if self.failed else ""

    @property
    def speed(self) -> str:
        """The rate in the largest unit that leaves a digit before the point."""
        for unit, seconds in (("s", 1), ("min", 60), ("h", 3600)):
            rate = self.rate * seconds
            if rate >= 1:
                return f"{rate:.{rate < DECIMAL_BELOW:d}f}/{unit}"
        return ""

    @property
    def time(self) -> str:
        """How long it took or will take."""
        if self.ended:
            complete = self.total is None or self.finished >= self.total
            return f"{'in' if complete else 'stopped after'} {_duration(self.seconds)}"
        if self.total is None or not self.speed or self.done >= self.total:
            return ""
        return f"{_duration(max(1, (self.total - self.done) / self.rate))} left"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{max(seconds, 0.01):.1g} s"
    whole = round(seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


# ---------------------------------------------------------------------------------------------- the ticker


class _Painter(Protocol):
    """Draws displays in one way. All calls but the making come from the ticker; those that draw may raise anything."""

    def begin(self, display: Display) -> None: ...

    def tick(self) -> float: ...  # draws what is due, and returns when to be called again (monotonic)

    def end(self, display: Display) -> None: ...  # draws the last state

    def give_up(self) -> None: ...  # puts back what was changed

    def forget(self) -> None: ...  # ... in a forked child: takes no lock, and writes nothing that the parent will write


class _Ticker:
    """The thread that draws; it starts with the first display and ends with the last.

    It alone knows the displays; others send it messages. A SimpleQueue and a lock that the same thread may take twice
    are safe also where a signal handler or a finalizer comes between.
    """

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[tuple[Display, _Painter | None]] = queue.SimpleQueue()
        self._displays: dict[Display, _Painter] = {}
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()
        self._bar: _Bar | None = None

    def bar(self, stream: TextIO, console: Console, first: Display) -> _Bar:
        """Return the bar of a terminal: rich draws one picture at a time on it, so its displays share it."""
        with self._starting:
            if self._bar is None or self._bar.stream is not stream:
                self._bar = _Bar(stream, console, first)
            return self._bar

    def show(self, display: Display, painter: _Painter) -> None:
        """Begin with a display."""
        with self._starting:
            self._start()
            display._shown.acquire()
            display._ticker = self
            self._messages.put((display, painter))

    def close(self, display: Display) -> None:
        """End a display, and wait until that has been drawn, but not for ever."""
        if not display._shown.locked():
            return
        self._messages.put((display, None))
        # A finalizer may run in the ticker itself, which cannot wait for itself.
        if threading.current_thread() is not self._thread and display._shown.acquire(timeout=CLOSE_TIMEOUT):
            display._shown.release()

    def close_all(self) -> None:
        """End what nobody has closed."""
        for display in list(self._displays):
            display.close()

    def forget(self) -> None:
        """Put back what was changed: this is a forked child, where no ticker runs."""
        for painter in set(self._displays.values()):
            painter.forget()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="taskpool-progress", daemon=True)
        if self._thread is None:  # no signal handler comes between this line and the next
            self._thread = thread
            try:
                thread.start()
            except BaseException:  # Ctrl-C: if it runs all the same, it sees that it is not the one
                self._thread = None
                raise

    def _run(self) -> None:
        due = time.monotonic()
        while self._thread is threading.current_thread():
            with contextlib.suppress(queue.Empty):
                self._handle(*self._messages.get(timeout=max(0.0, due - time.monotonic())))
            due = self._tick()
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        with self._starting:
            if not self._displays and self._messages.empty():
                self._thread = None

    def _handle(self, display: Display, painter: _Painter | None) -> None:
        if painter is not None:
            self._displays[display] = painter
            self._attempt(painter, painter.begin, display)
        elif display in self._displays:  # else its painter has failed
            self._attempt(self._displays[display], self._displays[display].end, display)
            if self._displays.pop(display, None) is not None:
                display._shown.release()

    def _tick(self) -> float:
        dues = [self._attempt(painter, painter.tick) for painter in set(self._displays.values())]
        return min(filter(None, dues), default=time.monotonic() + LINES_EVERY)

    def _attempt(self, painter: _Painter, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except BaseException as error:  # the terminal is gone, or the stream closed: no map ends because of that
            painter.give_up()
            self._bar = None if painter is self._bar else self._bar
            for display in [display for display, its in self._displays.items() if its is painter]:
                del self._displays[display]
                display._shown.release()
            _say_why(error)


# ---------------------------------------------------------------------------------------------- how to draw


def _painter_for(display: Display, stream: TextIO) -> _Painter:
    """Choose how to draw a display on `stream`.

    This runs in the thread that starts the map, and so does all importing: what another thread was importing at the
    moment of a fork can never be imported in the child.
    """
    terminal = _is_terminal(stream)
    if not terminal and "IPython" not in sys.modules:  # only rich can tell whether this is a notebook
        return _Lines(stream)
    try:
        from rich.console import Console
    except ImportError:
        return _Lines(stream, hint=terminal)
    console = Console(file=stream)
    if console.is_jupyter:
        return _Notebook(display)
    if terminal and console.is_interactive:
        return _ticker.bar(stream, console, display)
    return _Lines(stream)


def _is_terminal(stream: TextIO) -> bool:
    """Return whether a bar can be drawn on `stream`: not in a build's log, nor where the user draws through rich."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false") or os.environ.get("TERM") in ("dumb", "unknown"):
        return False
    try:
        return stream.isatty() and not hasattr(stream, "rich_proxied_file")
    except (AttributeError, ValueError):  # it has no such method; it is closed
        return False


class _Lines:
    """Writes a line about a display every few seconds, and the last one at its end."""

    hinted = False  # in this process

    def __init__(self, stream: TextIO, *, hint: bool = False) -> None:
        self._stream = stream
        self._hint = hint
        self._display: Display | None = None
        self._due = time.monotonic() + LINES_EVERY

    def begin(self, display: Display) -> None:
        self._display = display
        if self._hint and not _Lines.hinted:
            _Lines.hinted = True
            self._write(HINT)

    def tick(self) -> float:
        now = time.monotonic()
        if self._display is not None and now >= self._due:
            self._due = now + LINES_EVERY
            self._report(self._display)
        return self._due

    def end(self, display: Display) -> None:
        self._report(display)

    def give_up(self) -> None:
        self._display = None

    forget = give_up

    def _report(self, display: Display) -> None:
        self._write(display._figures().line(display._label))

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")  # in one piece, between those of other threads
        self._stream.flush()


class _Notebook:
    """Draws a display in the output of the cell that made it."""

    def __init__(self, display: Display) -> None:
        # By IPython's own means: rich would need ipywidgets, and what the cell prints meanwhile can vanish in them.
        show_in_cell: Callable[..., Any] = importlib.import_module("IPython.display").display
        self._handle = show_in_cell(_table([display], NOTEBOOK_WIDTH), display_id=True)
        self._display: Display | None = None

    def begin(self, display: Display) -> None:
        self._display = display

    def tick(self) -> float:
        if self._display is not None:
            self._handle.update(_table([self._display], NOTEBOOK_WIDTH))
        return time.monotonic() + NOTEBOOK_REFRESH

    def end(self, display: Display) -> None:
        self.tick()

    def give_up(self) -> None:
        self._display = None

    forget = give_up


class _Bar:
    """Draws the displays of a terminal: those that run in its last lines, those that have ended above."""

    def __init__(self, stream: TextIO, console: Console, first: Display) -> None:
        from rich.live import Live

        console.render_lines(_table([first], console.width))  # into the air: rich imports as it draws
        self.stream = stream
        self._console = console
        self._new_live = functools.partial(
            Live, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._displays: list[Display] = []
        self._live: Live | None = None
        self._detour = _Detour(console, stream)

    def begin(self, display: Display) -> None:
        self._displays.append(display)
        if self._live is None:
            self._detour.open()
            self._live = self._new_live()
            with self._detour.lock:
                self._live.start()

    def tick(self) -> float:
        if self._live is not None:
            with self._detour.lock:
                self._live.update(self._picture(), refresh=True)
        return time.monotonic() + REFRESH

    def end(self, display: Display) -> None:
        self._displays.remove(display)
        with self._detour.lock, self._console:  # in one piece
            self.tick()
            self._console.print(_table([display], self._console.width - 1))
        if not self._displays and self._live is not None:
            with self._detour.lock:
                self._live.stop()
            self._live = None
            self._detour.close()

    def give_up(self) -> None:
        with contextlib.suppress(Exception):  # where it was not the terminal that failed, the cursor comes back
            if self._live is not None:
                self._live.stop()
        self._detour.close()

    def forget(self) -> None:
        self._detour.forget()

    def _picture(self) -> SegmentLines:
        """Return all rows, ready to be written once more below each line that is written above them."""
        from rich.segment import SegmentLines

        if not self._displays:
            return SegmentLines([])
        options = self._console.options
        table = _table(self._displays, options.max_width - 1)  # a full line would wrap where the window gets smaller
        return SegmentLines(self._console.render_lines(table, options, pad=False), new_lines=True)


def _table(displays: Sequence[Display], width: int) -> Table:
    """Return a row for each display, at most `width` wide: where there is little room, what matters less stays out."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    figures = [display._figures() for display in displays]
    columns = _columns([display._label for display in displays], figures, width)
    for name, least in (("speed", BAR_STEP), ("percent", BAR_STEP), ("time", 0), ("label", 0)):
        if _room(columns, width) < least:
            columns.pop(name, None)
    room = min(_room(columns, width), LONGEST_BAR)
    if room >= BAR_STEP:
        size = room - room % BAR_STEP  # so it does not tremble with every digit beside it
        columns["bar"] = [ProgressBar(*each.extent, size) for each in figures]
    table = Table.grid(padding=(0, 1))
    present = {name: column for name, column in columns.items() if any(column)}
    for name in present:
        table.add_column(no_wrap=True, justify="right" if name in ("count", "percent") else "left")
    for row in zip(*present.values(), strict=True):
        table.add_row(*row)
    return table


def _columns(labels: list[str], figures: list[_Figures], width: int) -> dict[str, list[Any]]:
    """Return what stands beside the bars, column by column; that of the bars is still empty."""
    from rich.text import Text

    names = [Text(label) for label in labels]
    for name in names:
        name.truncate(width // 3, overflow="ellipsis")
    return {
        "label": names,
        "bar": [],
        "count": [Text(each.count, "progress.download") for each in figures],
        "percent": [Text(each.percent, "progress.percentage") for each in figures],
        "failures": [Text(each.failures, "red") for each in figures],
        "speed": [Text(each.speed) for each in figures],
        "time": [Text(each.time, "progress.remaining") for each in figures],
    }


def _room(columns: dict[str, list[Any]], width: int) -> int:
    """Return how much of `width` the columns leave to the bar."""
    widths = [max(cell.cell_len for cell in column) + 1 for column in columns.values() if any(column)]
    return int(width - sum(widths))


# ---------------------------------------------------------------------------------------------- what others write


class _Detour:
    """While it is open, what is written to the terminal through `sys`, `print` and logging appears above the bar.

    Attributes:
        lock: Who writes holds it, the bar too: rich looks where the bar stands before it takes a lock of its own.
    """

    def __init__(self, console: Console, stream: TextIO) -> None:
        self.lock = threading.RLock()
        self._console = console
        self._stream = stream
        self._above: dict[str, _Above] = {}
        self._moved: list[logging.StreamHandler[Any]] = []

    def open(self) -> None:
        """Put the stand-ins in place, also in the handlers that hold what they stand for."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if _same_terminal(stream, self._stream):
                above = self._above[name] = _Above(self._console, stream, self.lock)
                setattr(sys, name, above)
                stream.flush()
                self._moved += _move_handlers(stream, above)

    def close(self) -> None:
        """Put everything back, unless somebody else has changed it meanwhile."""
        self._put_back()
        for above in self._above.values():
            with contextlib.suppress(Exception):
                above.leave()
        self._above.clear()

    def forget(self) -> None:
        """Put everything back in a forked child."""
        self._put_back()
        for above in self._above.values():
            above.forget()

    def _put_back(self) -> None:
        for name, above in self._above.items():
            if getattr(sys, name) is above:
                setattr(sys, name, above.stream)
            _move_handlers(above, above.stream, also=self._moved)
        self._moved.clear()


def _same_terminal(stream: Any, other: TextIO) -> bool:
    if stream is other:
        return True
    try:
        return stream.isatty() and os.path.sameopenfile(stream.fileno(), other.fileno())
    except (AttributeError, OSError, ValueError):  # None, without a file, closed
        return False


def _move_handlers(old: Any, new: Any, also: Iterable[logging.Handler] = ()) -> list[logging.StreamHandler[Any]]:
    """Give each logging handler that writes to `old` the stream `new`, and return these handlers."""
    manager = logging.getLogger().manager
    loggers = [manager.root, *list(manager.loggerDict.values())]
    attached = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    made = [reference() for reference in list(logging._handlerList)]  # type: ignore[attr-defined]  # behind a queue, too
    moved = []
    for handler in [*attached, *made, *also]:
        with contextlib.suppress(Exception):  # some have a stream of their own kind, as logging's last resort
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.stream = new  # not by setStream, which waits for the handler's lock, and flushes
                moved.append(handler)
    return moved


class _Above:
    """Stands in for a stream of the terminal: what is written to it appears above the bar, line by line and unchanged.

    The rest after the last line's end is held back: it could not stand in a line of its own. Once the bar has gone
    this is but another name of the stream, for whoever still holds it.
    """

    def __init__(self, console: Console, stream: TextIO, lock: threading.RLock) -> None:
        self.stream = stream
        self._console: Console | None = console
        self._rest = ""
        self._lock = lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write the lines that are complete."""
        if self._console is not None:  # asked before the lock, which is never released in a forked child
            with self._lock:
                if self._console is not None:
                    self._print(self._console, text)
                    return len(text)
        return self.stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write all of them."""
        for line in lines:
            self.write(line)

    def leave(self) -> None:
        """Write the rest, and all that follows, to the stream itself."""
        with self._lock:
            rest, self._rest, self._console = self._rest, "", None
            if rest:
                self.stream.write(rest)
                self.stream.flush()

    def forget(self) -> None:
        """Be but another name of the stream from now on, in a child that may have inherited a taken lock."""
        self._console = None

    def _print(self, console: Console, text: str) -> None:
        from rich.segment import Segment, Segments

        lines, end, self._rest = (self._rest + text).rpartition("\n")
        if len(self._rest) > LONGEST_REST:
            lines, end, self._rest = lines + end + self._rest, "\n", ""
        if end:
            console.print(Segments([Segment(lines + end)]), crop=False)


def _behind(stream: Any) -> Any:
    """Return the stream itself where a bar's stand-in has taken its place."""
    return stream.stream if isinstance(stream, _Above) else stream


# ---------------------------------------------------------------------------------------------- the process

_ticker = _Ticker()


def _start_afresh() -> None:
    """In a forked child: no ticker runs here, and what it had changed is put back."""
    global _ticker
    _ticker, inherited = _Ticker(), _ticker
    inherited.forget()


def _close_all() -> None:
    """At the interpreter's end: what nobody has closed must give the cursor back."""
    _ticker.close_all()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
