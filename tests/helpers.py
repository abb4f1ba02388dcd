"""What tests share: the backends to run on, waits with a bound, and scripts in a process group of their own."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests import processes

FULL = os.environ.get("TASKPOOL_TEST_FULL", "") not in ("", "0")
ROOT = Path(__file__).parent.parent
MARK = "TASKPOOL_TEST_SCRIPT"
PATIENCE = 20.0  # the longest that any single wait of a test may take


# ---------------------------------------------------------------------------------------------- backends


@attrs.frozen
class Backend:
    """One way to run tasks: a backend and, for those that start processes, a start method.

    Attributes:
        name: What `Executor(backend=)` takes.
        start: What `Executor(mp_context=)` takes; None leaves the choice to the backend.
    """

    name: str
    start: str | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.start}" if self.start else self.name

    @property
    def options(self) -> dict[str, Any]:
        """The keywords that choose this backend."""
        return {"backend": self.name} | ({"mp_context": self.start} if self.start else {})

    @property
    def hosted(self) -> bool:
        """Whether tasks run in worker processes."""
        return self.name in ("process", "futures", "pool")


TEMPLATE = Backend("process")
THREAD = Backend("thread")
SERIAL = Backend("serial")
EVERY_HOST = [
    TEMPLATE,
    *(Backend(name, start) for name in ("process", "futures", "pool") for start in ("fork", "forkserver", "spawn")),
]
HOSTS = EVERY_HOST if FULL else [TEMPLATE, Backend("futures", "fork"), Backend("pool", "forkserver")]


def _over(backends: list[Backend]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", [pytest.param(backend, id=str(backend)) for backend in backends])


on_hosts = _over(HOSTS)  # each hosted backend, with one start method each
on_one_host = _over(EVERY_HOST if FULL else [TEMPLATE])  # the default backend; in a whole run each hosted one
on_every_host = _over(EVERY_HOST)  # each hosted backend under each start method
on_all = _over([*HOSTS, THREAD, SERIAL])  # every backend
on_pools = _over([*HOSTS, THREAD])  # every backend that runs tasks beside the caller


# ---------------------------------------------------------------------------------------------- waits


def wait_until(predicate: Callable[[], Any], timeout: float = PATIENCE, what: str = "") -> Any:
    """Return the first true answer of `predicate`; fail when none comes in time."""
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout} s: {what or predicate}\n{all_stacks()}")
        time.sleep(0.001)


def all_stacks() -> str:
    """Return the stack of each thread of this process as text."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return "".join(line for line in file if "/site-packages/" not in line and "<frozen runpy>" not in line)


def bounded(call: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """Return what `call` returns or raise what it raises; fail with every stack if it takes longer than `timeout`."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True, name="bounded call")
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        pytest.fail(f"still blocked after {timeout} s: {call}\n{all_stacks()}")
    return outcome.result(0)


def outcome(future: Future[Any], timeout: float = PATIENCE) -> Any:
    """Return the exception of a future or, if it has none, its result; a cancelled one answers its CancelledError."""
    try:
        return future.result(timeout)
    except TimeoutError as error:
        if not future.done():
            pytest.fail(f"{future} is not resolved after {timeout} s\n{all_stacks()}")
        return error
    except BaseException as error:
        return error


def lines(path: Path) -> list[str]:
    """Return the lines of a file that tasks append to; none if it does not exist yet."""
    return path.read_text().splitlines() if path.exists() else []


# ---------------------------------------------------------------------------------------------- scripts


@attrs.frozen
class Ended:
    """How a script ended.

    Attributes:
        code: Its exit code as `subprocess` has it: negative for a signal.
        out: What it and its children wrote to standard output.
        err: What they wrote to standard error.
        seconds: How long it ran.
        mark: What marks the environment of all its descendants.
    """

    code: int
    out: str
    err: str
    seconds: float
    mark: str

    def left(self) -> list[processes.Process]:
        """Return the script's descendants that live now."""
        return processes.marked(MARK, self.mark)


def run_script(
    source: str,
    *,
    timeout: float = 30.0,
    signals: tuple[tuple[str, int], ...] = (),
    group: bool = False,
    args: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    gone_within: float | None = 1.0,
    command: tuple[str, ...] | None = None,
) -> Ended:
    """Run `source` as a script in a session of its own, and end all that it started.

    Args:
        source: The program.
        timeout: Past it, the script's stacks are dumped, all is killed, and the test fails.
        signals: What to send and when: each signal is sent once its line stands on standard output.
        group: Whether signals go to the script's process group, as a terminal's do, or to the script alone.
        args: The script's arguments.
        env: What to add to its environment.
        gone_within: How soon after the script's end each descendant must have ended; None does not look.
        command: What to run instead of a file with `source`, after the interpreter's own name.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="script-") as name:
        folder = Path(name)
        process = _start(folder, source, args, {**(env or {}), MARK: mark}, command)
        started = time.monotonic()
        try:
            _send(process, folder / "out", signals, started + timeout, group)
            process.wait(max(0.0, started + timeout - time.monotonic()))
        except subprocess.TimeoutExpired:
            _stacks_to_stderr(process)
            pytest.fail(f"the script did not end within {timeout} s\n{_report(folder)}")
        else:
            seconds = time.monotonic() - started
            if gone_within is not None:
                _expect_gone(mark, gone_within, folder)
            return Ended(process.returncode, _text(folder / "out"), _text(folder / "err"), seconds, mark)
        finally:
            _end(process, mark)


def _start(
    folder: Path, source: str, args: tuple[str, ...], env: dict[str, str], command: tuple[str, ...] | None
) -> subprocess.Popen[bytes]:
    file = folder / "script.py"
    file.write_text("import faulthandler, signal; faulthandler.register(signal.SIGUSR1, all_threads=True)\n" + source)
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, *(command or (str(file),)), *args],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **env},
        )


def _send(
    process: subprocess.Popen[bytes], out: Path, signals: tuple[tuple[str, int], ...], deadline: float, group: bool
) -> None:
    for line, signum in signals:
        while line not in _text(out).rpartition("\n")[0].splitlines():  # whole ones: print writes its end by itself
            if process.poll() is not None or time.monotonic() > deadline:
                return  # it ended without that line: the caller's assertions say so
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(process.pid, signum)


def _expect_gone(mark: str, within: float, folder: Path) -> None:
    deadline = time.monotonic() + within
    while left := processes.marked(MARK, mark):
        if time.monotonic() > deadline:
            pytest.fail(f"alive {within} s after the script's end: {left}\n{_report(folder)}")
        time.sleep(0.005)


def _stacks_to_stderr(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)  # the one moment faulthandler needs; nothing depends on it


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    deadline = time.monotonic() + 5
    while (left := processes.marked(MARK, mark)) and time.monotonic() < deadline:
        for each in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
        time.sleep(0.005)
    process.wait(5)
    processes.reap_adopted()


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _report(folder: Path) -> str:
    return f"--- stdout\n{_text(folder / 'out')}\n--- stderr\n{_text(folder / 'err')}"


@contextlib.contextmanager
def at_most(seconds: float, what: str = "the block") -> Iterator[None]:
    """Fail if the block takes longer than `seconds`."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took <= seconds, f"{what} took {took:.2f} s, more than {seconds} s"
