"""What a map shows of its progress: a bar where one can be drawn, lines elsewhere, and never at the map's expense."""

from __future__ import annotations

import builtins
import contextlib
import io
import logging
import logging.handlers
import os
import pty
import queue
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import pytest

from taskpool import progress
from taskpool._checks import check_progress
from tests.helpers import PATIENCE, ROOT, at_most, bounded, run_script, wait_until

CALM = {"TASKPOOL_PROGRESS": None, "CI": None, "COLUMNS": "80", "LINES": "25", "TERM": "xterm", "NO_COLOR": None}


class Counts:
    """What a map counts, driven by the test."""

    def __init__(self, finished: int = 0, total: int | None = None, failed: int = 0) -> None:
        self.finished = finished
        self.failed = failed
        self.total = total
        self.parts = 0.0
        self.looks = 0  # how often it was looked at

    def part(self) -> float:
        """What running items say of themselves."""
        self.looks += 1
        return self.parts


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


class Broken(Terminal):
    """A terminal that is gone once `gone` is set."""

    gone = False

    def write(self, text: str) -> int:
        """Write, if there is something to write to."""
        if self.gone:
            raise OSError("gone")
        return super().write(text)


class Stuck(io.StringIO):
    """A stream whose reader has stopped to read."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def write(self, text: str) -> int:
        """Block, as a full pipe does."""
        assert self.go_on.wait(PATIENCE)
        return super().write(text)


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of an ordinary terminal, wherever the tests run."""
    for name, value in CALM.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Put another stream in the place of sys.stderr."""

    def put(stream: Any) -> Any:
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


def screen(output: str) -> list[str]:
    """Return the lines that a terminal would show, by the few control sequences that are used."""
    rows, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", output):
        if text:
            rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
            column += len(text)
        elif code == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif code == "\r":
            column = 0
        elif code == "\x1b[2K":
            rows[row] = ""
        elif code == "\x1b[1A":
            row -= 1
        else:
            assert code[-1] in "mhl", f"a control sequence that this test does not know: {code!r}"
    return [each.rstrip() for each in rows if each.strip()]


def show(counts: Counts, label: str = "resize") -> progress.Display:
    """Show counts."""
    return bounded(lambda: progress.show(counts, label))


def drawn(counts: Counts) -> None:
    """Wait for the second picture: then the first one is on the terminal."""
    seen = counts.looks
    wait_until(lambda: counts.looks >= seen + 3)  # the one before may still have been for the first


def close(*displays: progress.Display) -> None:
    """Close displays, within their bound."""
    for display in displays:
        bounded(display.close)


# ---------------------------------------------------------------------------------------------- what one may ask for


@pytest.mark.core
@pytest.mark.parametrize(("value", "label"), [(None, None), (False, None), (True, ""), ("resize", "resize"), ("", "")])
def test_progress_is_a_truth_value_or_a_label(value: object, label: str | None) -> None:
    """None shows nothing, "" has no label."""
    assert check_progress(value) == label


@pytest.mark.parametrize("value", [0, 1, 1.0, b"resize", ["resize"], object()])
def test_anything_else_is_refused_by_name(value: object) -> None:
    """The error names the argument."""
    with pytest.raises(TypeError, match=r"^progress must be True, False or a label, not "):
        check_progress(value)


def test_importing_it_does_not_load_rich() -> None:
    """That waits until a bar is drawn."""
    done = run_script("import sys, taskpool.progress; print([name for name in sys.modules if name.startswith('rich')])")
    assert done.out == "[]\n", done.err


# ---------------------------------------------------------------------------------------------- plain lines


@pytest.mark.core
def test_an_instant_map_says_what_it_did(stderr: Callable[[Any], Any]) -> None:
    """In one line at its end."""
    out = stderr(io.StringIO())
    close(show(Counts(7, 7)))
    assert re.fullmatch(r"resize: 7 of 7 \(100 %\), [\d.]+/s, in 0\.\d+ s\n", out.getvalue())


@pytest.mark.core
def test_a_line_every_few_seconds(stderr: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With count, failures, rate and what is left; at the end how it ended."""
    monkeypatch.setattr(progress, "LINES_EVERY", 0.02)
    out = stderr(io.StringIO())
    counts = Counts(1200, 5000, 3)
    display = show(counts)
    wait_until(lambda: out.getvalue().count("\n") >= 3)
    close(display)
    *running, last = out.getvalue().splitlines()
    for line in running:
        assert re.fullmatch(r"resize: 1200 of 5000 \(24 %\), 3 failed, [\d.]+/s, about \d+ s left", line)
    assert re.fullmatch(r"resize: 1200 of 5000 \(24 %\), 3 failed, [\d.]+/s, stopped after [\d.]+ s", last)


def test_an_unknown_length_becomes_known(stderr: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """First how many are done, then how many of how many."""
    monkeypatch.setattr(progress, "LINES_EVERY", 0.02)
    out = stderr(io.StringIO())
    counts = Counts(12, None, 2)
    display = show(counts, "")
    wait_until(lambda: "\n" in out.getvalue())
    counts.finished, counts.total = 20, 20
    close(display)
    first, *_, last = out.getvalue().splitlines()
    assert re.fullmatch(r"12 done, 2 failed, [\d.]+/s", first)
    assert re.fullmatch(r"20 of 20 \(100 %\), 2 failed, [\d.]+/s, in [\d.]+ s", last)


def test_a_label_is_one_line(stderr: Callable[[Any], Any]) -> None:
    """Whatever it holds."""
    out = stderr(io.StringIO())
    close(show(Counts(), "two\nlines\t\x1b[2Jand more"))
    assert out.getvalue().startswith("two lines [2Jand more: 0 done, in ")
    assert out.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        ((0, 0, 0, 0, 0, 0.001, True), "0 of 0, in 0.01 s"),
        ((999, 0, 1000, 999, 9.96, 100, False), "999 of 1000 (99 %), 10/s, about 1 s left"),
        ((5, 0, 100, 5.5, 0.05, 100, False), "5 of 100 (5 %), 3.0/min, about 31 min 30 s left"),
        ((1, 0, 100, 1, 0.0005, 2000, False), "1 of 100 (1 %), 1.8/h, about 2 d 7 h left"),
        ((0, 0, 100, 0, 0, 100, False), "0 of 100 (0 %)"),
        ((1, 0, 100, 1, 1e-9, 1e9, False), "1 of 100 (1 %)"),
        ((3600, 3600, None, 3600, 1, 3600, True), "3600 done, 3600 failed, 1.0/s, in 1 h"),
        ((12, 0, 10, 10, 1, 12, False), "12 of 10 (100 %), 1.0/s"),
    ],
)
def test_figures_in_words(figures: Any, line: str) -> None:
    """Each in the unit that fits it; 100 % only when nothing is missing."""
    *counts, ended = figures
    assert progress._Figures(*counts, ended=ended).line("") == line


def test_the_rate_follows_a_change() -> None:
    """It is that of the last while, which is longer the longer the map has run."""
    pace, done = progress._Pace(0.0), 0
    for second in range(1, 101):
        done += 10
        assert pace.measure(second, done) == pytest.approx(10)
    for second in range(101, 181):
        done += 1
        rate = pace.measure(second, done)
    assert rate == pytest.approx(1)
    assert pace.measure(1000, done) < 0.5
    assert pace.measure(1001, 0) == 0


def test_parts_count_for_the_time_that_is_left() -> None:
    """What running items have reported is in the rate, not in the count."""
    counts = Counts(0, 2)
    counts.parts = 1.0
    display = progress.Display(counts, "")
    figures = display._figures()
    assert (figures.finished, figures.done) == (0, 1.0)
    assert figures.rate > 0
    counts.parts = 99.0
    assert display._figures().done == 2


# ---------------------------------------------------------------------------------------------- silence


@pytest.mark.core
def test_told_to_be_silent(stderr: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """TASKPOOL_PROGRESS=0 is stronger than what the program asks for."""
    monkeypatch.setenv("TASKPOOL_PROGRESS", "0")
    out = stderr(Terminal())
    close(show(Counts(1, 1)))
    assert out.getvalue() == ""


def test_no_standard_error_at_all(stderr: Callable[[Any], Any]) -> None:
    """As in a service without a console."""
    stderr(None)
    close(show(Counts(1, 1)))


# ---------------------------------------------------------------------------------------------- what breaks


@pytest.mark.core
@pytest.mark.parametrize("make", [io.StringIO, Terminal], ids=["lines", "bar"])
def test_a_closed_stream(stderr: Callable[[Any], Any], make: Callable[[], TextIO]) -> None:
    """Closed before or meanwhile, it costs nothing but the display."""
    out = stderr(make())
    display = show(Counts(1, 2))
    out.close()
    late = show(Counts(1, 2))
    with at_most(1):
        close(display, late)
    assert sys.stderr is out


@pytest.mark.core
def test_a_terminal_that_goes_away(stderr: Callable[[Any], Any]) -> None:
    """All is put back, and the next terminal gets its bar."""
    out = stderr(Broken())
    handler = logging.StreamHandler()
    displays = [show(Counts(1, 2), "first"), show(Counts(1, 2), "second")]
    wait_until(lambda: sys.stderr is not out)
    out.gone = True
    wait_until(lambda: sys.stderr is out)
    with at_most(1):
        close(*displays)
    assert handler.stream is out
    out.gone = False
    close(show(Counts(3, 3), "third"))
    assert screen(out.getvalue())[-1].startswith("third ━")


def test_a_stream_that_blocks(stderr: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing waits for it by a bound, and what was to be said is said later."""
    monkeypatch.setattr(progress, "CLOSE_TIMEOUT", 0.1)
    out = stderr(Stuck())
    display = show(Counts(3, 3))
    with at_most(1):
        close(display, display)
    out.go_on.set()
    wait_until(lambda: "3 of 3" in out.getvalue())


def test_closing_again_and_from_many_threads(stderr: Callable[[Any], Any]) -> None:
    """Shows the end once."""
    out = stderr(io.StringIO())
    display = show(Counts(3, 3))
    threads = [threading.Thread(target=display.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    close(display)
    assert out.getvalue().count("\n") == 1


def test_no_thread_is_to_be_had(stderr: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The map goes on in the dark, and the next one is shown."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    out = stderr(io.StringIO())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        display = progress.show(Counts(1, 1), "first")
    close(display, show(Counts(2, 2), "second"))
    assert out.getvalue().startswith("second: ")


# ---------------------------------------------------------------------------------------------- the bar


@pytest.mark.core
def test_a_bar_on_a_terminal(stderr: Callable[[Any], Any]) -> None:
    """It shows label, count, failures and rate, and stays where it was when it ends."""
    out = stderr(Terminal())
    counts = Counts(1, 4)
    display = show(counts)
    wait_until(lambda: "1/4" in out.getvalue())
    counts.finished, counts.failed = 3, 2
    wait_until(lambda: "3/4" in out.getvalue())
    counts.finished = 4
    close(display)
    (row,) = screen(out.getvalue())
    assert re.fullmatch(r"resize ━+ 4/4 100 % 2 failed [\d.]+/s in [\d.]+ s", row)
    assert out.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back
    assert sys.stderr is out


@pytest.mark.parametrize("ended", [False, True])
def test_a_bar_of_unknown_length(stderr: Callable[[Any], Any], ended: bool) -> None:
    """It moves, and is whole at the end."""
    out = stderr(Terminal())
    display = show(Counts(7))
    wait_until(lambda: "7 done" in out.getvalue())
    text = screen(out.getvalue())
    close(display)
    (row,) = screen(out.getvalue()) if ended else text
    assert re.fullmatch(r"resize ━{40} 7 done [\d.]+/s" + (r" in [\d.]+ s" if ended else ""), row)


@pytest.mark.parametrize("columns", [80, 60, 40, 24])
@pytest.mark.parametrize("total", [5_000, 50_000_000, None])
def test_a_row_fits(
    stderr: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, columns: int, total: int | None
) -> None:
    """On a narrow terminal the less important stays out; count and failures never do."""
    monkeypatch.setenv("COLUMNS", str(columns))
    out = stderr(Terminal())
    display = show(Counts(1234, total, 56), "pictures of a whole year")
    wait_until(lambda: "1234" in out.getvalue())
    close(display)
    (row,) = screen(out.getvalue())
    assert len(row) < columns
    assert "1234" in row
    assert "56 failed" in row


@pytest.mark.core
def test_two_bars(stderr: Callable[[Any], Any]) -> None:
    """They share the terminal; who ends first is left above."""
    out = stderr(Terminal())
    outer = show(Counts(1, 3), "outer")
    for name in ("first", "second"):
        inner = show(Counts(5, 5), name)
        wait_until(lambda name=name: any(row.startswith(name) for row in screen(out.getvalue())))
        assert len([row for row in screen(out.getvalue()) if row.startswith("outer")]) == 1
        close(inner)
    close(outer)
    assert [row.split()[0] for row in screen(out.getvalue())] == ["first", "second", "outer"]


def test_many_bars_in_threads(stderr: Callable[[Any], Any]) -> None:
    """Each leaves its row."""
    out = stderr(Terminal())

    def some(thread: int) -> None:
        for number in range(5):
            display = progress.show(Counts(1, 1), f"{thread}.{number}")
            display.close()

    threads = [threading.Thread(target=some, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    names = {row.split()[0] for row in screen(out.getvalue())}
    assert names == {f"{thread}.{number}" for thread in range(4) for number in range(5)}
    assert sys.stderr is out


@pytest.mark.parametrize("variable", [("TERM", "dumb"), ("CI", "true")], ids=str)
def test_a_terminal_that_is_none(
    stderr: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    """A build's log and a dumb terminal get lines."""
    monkeypatch.setenv(*variable)
    out = stderr(Terminal())
    close(show(Counts(1, 1)))
    assert out.getvalue().startswith("resize: 1 of 1 (100 %)")
    assert "\x1b" not in out.getvalue()


def test_a_terminal_that_rich_draws_on_already(stderr: Callable[[Any], Any]) -> None:
    """The user's own display stays whole: lines go above it."""
    from rich.console import Console
    from rich.progress import Progress

    out = stderr(Terminal())
    with Progress(console=Console(file=out, force_terminal=True, width=80), auto_refresh=False) as theirs:
        theirs.add_task("theirs", total=3)
        close(show(Counts(1, 1)))
    rows = screen(out.getvalue())
    assert rows[0].startswith("resize: 1 of 1")
    assert rows[1].startswith("theirs ━")
    assert len(rows) == 2


# ---------------------------------------------------------------------------------------------- what others write


@contextlib.contextmanager
def bar(counts: Counts | None = None) -> Iterator[None]:
    """A bar that is there for the time of a block."""
    counts = counts or Counts(1, 2)
    display = show(counts)
    drawn(counts)
    yield
    close(display)


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """A logger of its own."""
    logger = logging.getLogger("tests.progress")
    logger.propagate = False
    yield logger
    logger.handlers.clear()
    logger.propagate = True


@pytest.mark.core
def test_log_lines_stay_whole(stderr: Callable[[Any], Any], log: logging.Logger) -> None:
    """Also those of handlers that took hold of the stream before there was a bar, and those behind a queue."""
    out = stderr(Terminal())
    direct, behind = logging.StreamHandler(), logging.StreamHandler()
    records: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(records, behind)
    log.addHandler(direct)
    log.addHandler(logging.handlers.QueueHandler(records))
    listener.start()
    with bar():
        for number in range(20):
            log.warning("line %d %s", number, "x" * 100)
        listener.stop()
    *rows, last = screen(out.getvalue())
    assert sorted(rows) == sorted(2 * [f"line {number} {'x' * 100}" for number in range(20)])
    assert last.startswith("resize ━")
    assert direct.stream is behind.stream is out


def test_handlers_that_come_and_go(stderr: Callable[[Any], Any], log: logging.Logger, tmp_path: Path) -> None:
    """Each has its own stream again afterwards."""
    out = stderr(Terminal())
    gone, file = logging.StreamHandler(), logging.FileHandler(tmp_path / "log")
    log.addHandler(gone)
    log.addHandler(file)
    of_file = file.stream
    with bar():
        log.removeHandler(gone)
        log.addHandler(come := logging.StreamHandler())
        log.warning("here")
        kept = sys.stderr
    assert [gone.stream, come.stream, file.stream] == [out, out, of_file]
    file.close()
    assert screen(out.getvalue())[0] == "here"
    kept.write("later\n")  # by somebody who kept the stand-in
    assert screen(out.getvalue())[-1] == "later"


def test_lines_come_as_they_are(stderr: Callable[[Any], Any]) -> None:
    """No markup, no wrapping, colours untouched; what has no end waits for it."""
    out = stderr(Terminal())
    with bar():
        print("[red]one[/]", "\x1b[32mgreen\x1b[0m", "x" * 200, file=sys.stderr)
        sys.stderr.writelines(["two ", "and ", "a half\nthree"])
        sys.stderr.flush()
        assert sys.stderr.isatty()
        with pytest.raises(TypeError):
            sys.stderr.write(b"bytes")  # type: ignore[arg-type]
    assert f"[red]one[/] \x1b[32mgreen\x1b[0m {'x' * 200}\n" in out.getvalue()
    one, two, row, rest = screen(out.getvalue())
    assert one.startswith("[red]one[/]")
    assert two == "two and a half"
    assert row.startswith("resize ━")
    assert rest == "three"


def test_a_line_without_end_is_not_kept_for_ever(stderr: Callable[[Any], Any]) -> None:
    """Nor lost."""
    out = stderr(Terminal())
    with bar():
        for _ in range(100):
            sys.stderr.write("y" * 1000)
        wait_until(lambda: out.getvalue().count("y") >= progress.LONGEST_REST)
    assert out.getvalue().count("y") == 100_000


def test_a_redirection_that_outlives_the_bar(stderr: Callable[[Any], Any]) -> None:
    """It is not undone; and what it puts back leads to the terminal."""
    out = stderr(Terminal())
    with contextlib.ExitStack() as stack:
        with bar():
            other = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        assert sys.stderr is other
    print("back", file=sys.stderr)
    assert screen(out.getvalue())[-1] == "back"


# ---------------------------------------------------------------------------------------------- notebooks


class Cell:
    """Stands for the output of a notebook's cell."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def display(self, table: Any, *, display_id: bool) -> Cell:
        """Show something that can be replaced."""
        assert display_id
        self.update(table)
        return self

    def update(self, table: Any) -> None:
        """Replace it."""
        self.shown.append(table._repr_mimebundle_([], [])["text/html"])


def test_a_bar_in_a_notebook(stderr: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rich says that it is one; standard error is left to the cell."""
    cell, module = Cell(), ModuleType("IPython.display")
    module.display = cell.display  # type: ignore[attr-defined]
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    out = stderr(io.StringIO())
    counts = Counts(1, 4)
    display = show(counts)
    counts.finished, counts.failed = 4, 2
    close(display)
    assert "1/4" in cell.shown[0]
    assert "4/4" in cell.shown[-1]
    assert "2 failed" in cell.shown[-1]
    assert sys.stderr is out
    assert out.getvalue() == ""


# ---------------------------------------------------------------------------------------------- real terminals

COUNTS = """
import logging, os, sys, time
from taskpool import progress
class Counts:
    failed = 0
    def __init__(self, finished, total):
        self.finished, self.total = finished, total
    looks = 0
    def part(self):
        self.looks += 1
        return 0.0
def shown(counts, label):
    display = progress.show(counts, label)
    seen = counts.looks
    while counts.looks < seen + 3:  # then the first picture is on the terminal
        time.sleep(0.001)
    return display
"""


def on_terminal(source: str, *, columns: int = 80, stdout: TextIO | None = None) -> str:
    """Run a script on a terminal of its own and return what it wrote there."""
    master, slave = pty.openpty()
    try:
        termios.tcsetwinsize(slave, (25, columns))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        for name in ("COLUMNS", "LINES"):
            env.pop(name)
        script = subprocess.Popen(
            [sys.executable, "-c", COUNTS + source],
            stdin=slave,
            stdout=stdout or slave,
            stderr=slave,
            env=env,
            start_new_session=True,
        )
        os.close(slave)
        try:
            output = b"".join(iter(lambda: _read(master), b""))
            assert script.wait(PATIENCE) == 0, output.decode()
        finally:
            script.kill()
            script.wait()
    finally:
        os.close(master)
    return output.decode()


def _read(master: int) -> bytes:
    if not select.select([master], [], [], PATIENCE)[0]:
        pytest.fail("the script neither writes nor ends")
    try:
        return os.read(master, 1 << 16)
    except OSError:  # nobody holds the other side any more
        return b""


@pytest.mark.core
def test_print_and_logging_on_a_real_terminal() -> None:
    """Everything is in a line of its own, the bar below, and the cursor comes back."""
    output = on_terminal("""
logging.basicConfig(format="%(message)s")
counts = Counts(0, 50)
display = shown(counts, "resize")
for number in range(50):
    counts.finished += 1
    print("printed", number)
    logging.warning("logged %d", number)
display.close()
print("the end", type(sys.stdout).__name__, type(sys.stderr).__name__)
""")
    *rows, row, end = screen(output)
    assert rows == [f"{how} {number}" for number in range(50) for how in ("printed", "logged")]
    assert re.fullmatch(r"resize ━+ 50/50 100 % [\d.]+/s in [\d.]+ s", row)
    assert end == "the end TextIOWrapper TextIOWrapper"
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1


@pytest.mark.core
def test_what_is_printed_into_a_file_stays_there(tmp_path: Path) -> None:
    """The bar is drawn on standard error, and takes nothing from a standard output that leads elsewhere."""
    with (tmp_path / "out").open("w") as out:
        output = on_terminal(
            """
display = shown(Counts(3, 3), "resize")
print("a result")
display.close()
""",
            stdout=out,
        )
    assert (tmp_path / "out").read_text() == "a result\n"
    (row,) = screen(output)
    assert row.startswith("resize ━")


def test_nobody_closes() -> None:
    """The interpreter's end does: the cursor must come back."""
    output = on_terminal("display = shown(Counts(1, 3), 'resize')\nprint('left')")
    assert [row.split()[0] for row in screen(output)] == ["left", "resize"]
    assert output.rstrip().endswith("\x1b[?25h")


def test_a_fork_in_the_middle() -> None:
    """The child writes to the streams themselves, is not held up by its parent's displays, and can show its own."""
    output = on_terminal("""
import warnings
warnings.simplefilter("ignore")  # of forking beside a thread, which is what this is about
handler = logging.StreamHandler()
display = shown(Counts(3, 3), "parent")
sys.stderr.write("the parent's rest")
child = os.fork()
if not child:
    started = time.monotonic()
    display.close()
    kinds = {type(stream).__name__ for stream in (sys.stdout, sys.stderr, handler.stream)}
    progress.show(Counts(5, 5), "child").close()
    os._exit(0 if kinds == {"TextIOWrapper"} and time.monotonic() - started < 1 else 1)
code = os.waitpid(child, 0)[1]
display.close()
print(" ended", code)
""")
    rows = screen(output)
    assert any("child ━" in row for row in rows)
    assert rows[-1] == "the parent's rest ended 0"
    assert output.count("the parent's rest") == 1
    assert rows[-2].startswith("parent ━")


def test_rich_is_absent() -> None:
    """Lines even on a terminal, and one hint what to do about it."""
    output = on_terminal("""
sys.modules["rich"] = None
for label in ("first", "second"):
    progress.show(Counts(3, 3), label).close()
""")
    hint, *rows = screen(output)
    assert hint == 'pip install "taskpool-executor[progress]" shows a bar here'
    assert [row.split(",")[0] for row in rows] == ["first: 3 of 3 (100 %)", "second: 3 of 3 (100 %)"]


def test_the_drawing_thread_imports_nothing() -> None:
    """A process that is forked meanwhile could never import what was being imported."""
    output = on_terminal("""
import threading
class Watch:
    def find_spec(self, name, path=None, target=None):
        importers.add(threading.current_thread().name)
importers = set()
sys.meta_path.insert(0, Watch())
display = shown(Counts(3, None), "resize")
logging.warning("above")
display.close()
print(importers)
""")
    assert screen(output)[-1] == "{'MainThread'}"


def test_a_narrow_terminal() -> None:
    """Its real width counts."""
    output = on_terminal(
        "display = shown(Counts(400, 400), 'resize')\ndisplay.close()",
        columns=40,
    )
    (row,) = screen(output)
    assert len(row) < 40
    assert row.startswith("resize ━━━━")


def test_it_costs_little(stderr: Callable[[Any], Any]) -> None:
    """A line above the bar takes well under a hundredth of a second."""
    stderr(Terminal())
    with bar():
        started = time.monotonic()
        for number in range(100):
            print(number, file=sys.stderr)
        assert time.monotonic() - started < 1
