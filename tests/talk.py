"""Tasks that log."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests import tasks

log = logging.getLogger("tests.talk")


def say(text: str, *args: Any, level: int = logging.WARNING, **extra: Any) -> int:
    """Log one record and return this process."""
    log.log(level, text, *args, extra=extra)
    return os.getpid()


def say_many(tag: object, count: int) -> int:
    """Log numbered records."""
    for number in range(count):
        log.info("%s %d", tag, number)
    return os.getpid()


def say_many_then(tag: object, count: int, call: Callable[..., Any], *args: Any) -> Any:
    """Log numbered records and do something at once."""
    say_many(tag, count)
    return call(*args)


def say_in_threads(threads: int, count: int) -> bytes:
    """Log from several threads at the same time, and return much."""
    talkers = [threading.Thread(target=say_many, args=(number, count)) for number in range(threads)]
    for talker in talkers:
        talker.start()
    for talker in talkers:
        talker.join()
    return tasks.payload(1 << 20)


def say_with_traceback() -> None:
    """Log an exception."""
    try:
        raise tasks.TwoArguments(1, "odd")
    except tasks.TwoArguments:
        log.exception("it failed")


class NoText:
    """Has no text."""

    def __str__(self) -> str:
        """Refuse."""
        raise RuntimeError("no text")

    __repr__ = __str__


def say_what_does_not_travel() -> str:
    """Log records with odd parts, then a plain one."""
    logging.raiseExceptions = False  # it would print what is wrong with them
    log.warning("lock", extra={"lock": threading.Lock(), "odd": NoText()})
    log.warning("%s", NoText())
    log.warning("%d items", "many")
    log.warning("plain")
    return "done"


def say_in_fork() -> str:
    """Fork; log in both processes."""
    child = os.fork()
    if child == 0:
        log.warning("child")
        os._exit(0)
    os.waitpid(child, 0)
    log.warning("parent")
    return "done"


def say_in_handlers(seconds: float) -> tuple[int, int]:
    """Log for so long, and in a signal handler that interrupts that; return how many records came from each."""
    ticks = itertools.count()

    def tick(*_: object) -> None:
        log.info("tick %d", next(ticks))

    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-3)
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        log.info("work %d", count)
        count += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    return count, next(ticks)


def say_in_forks(forks: int) -> list[int]:
    """Log in a thread without a pause, meanwhile fork and log in each child; return how the children ended."""
    enough = threading.Event()

    def talk() -> None:
        while not enough.is_set():
            log.debug("%s", "x" * 10_000)

    log.setLevel(logging.DEBUG)
    talker = threading.Thread(target=talk)
    talker.start()
    codes = [_say_in_child() for _ in range(forks)]
    enough.set()
    talker.join()
    return codes


def _say_in_child() -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(3)
        log.warning("from a child")
        os._exit(0)
    return os.waitpid(child, 0)[1]


class Alarm(BaseException):
    """Raised by a signal handler."""


def say_until_interrupted(path: Path) -> str:
    """Log large records until an alarm has interrupted the writing of one, as a timeout does."""

    def interrupt(_: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename.endswith("channel.py"):
            raise Alarm
        signal.setitimer(signal.ITIMER_REAL, 0.0005)

    tasks.note(path, os.getpid())
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.002)
    with contextlib.suppress(Alarm):
        while True:
            log.warning("x" * 8_000_000)
    return "interrupted"


def warn() -> None:
    """Issue a warning, whatever the filters are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("mind the gap", UserWarning, stacklevel=1)


def say_structured(event: str, **fields: Any) -> int:
    """Log through structlog."""
    import structlog

    structlog.get_logger("tests.talk").bind(bound="yes").warning(event, **fields)
    return os.getpid()


def say_structured_many_then(count: int, call: Callable[..., Any]) -> Any:
    """Log numbered events through structlog and do something at once."""
    import structlog

    for number in range(count):
        structlog.get_logger().info("event", number=number)
    return call()


def structured_failure() -> None:
    """Log an exception through structlog."""
    import structlog

    try:
        raise ValueError("odd")
    except ValueError:
        structlog.get_logger().exception("it failed")


NOTICE = 25  # a level of our own, which only the parent knows by name


def say_through_deaf_logger(text: str) -> None:
    """Log through a logger that does not propagate and has a handler of its own."""
    deaf = logging.getLogger("tests.deaf")
    deaf.propagate = False
    deaf.warning(text)


def leave_an_error_in_a_thread() -> None:
    """Let a thread end by an error that nobody catches."""
    thread = threading.Thread(target=divide, args=(1, 0), name="doomed")
    thread.start()
    thread.join()


def divide(a: int, b: int) -> float:
    """Divide."""
    return a / b


def configure_and_say(text: str) -> str:
    """Set up logging as a module of the program might when it is imported, and log."""
    logging.basicConfig(level=logging.DEBUG, format="here: %(message)s")
    say(text)
    return text


def say_and_look(text: str) -> list[Any]:
    """Log through structlog; return what is bound there, and the value of the variable."""
    import structlog

    structlog.get_logger().warning(text)
    found = [structlog.contextvars.get_contextvars(), request.get("none")]
    structlog.contextvars.bind_contextvars(leaked="yes")
    request.set("leaked")
    return found


def modules() -> set[str]:
    """Return the names of the modules that are loaded here."""
    import sys

    return set(sys.modules)


request: contextvars.ContextVar[str] = contextvars.ContextVar("request")


def print_much(text: str, call: Callable[..., Any], *args: Any) -> Any:
    """Write in all ways to descriptors 1 and 2, end with half a line, and do something."""
    import ctypes
    import subprocess
    import sys

    print(text)
    print("to stderr", file=sys.stderr)
    os.write(1, b"raw\n")
    subprocess.run(["/bin/echo", "from a program"], check=True)
    ctypes.CDLL(None).printf(b"from C\n")
    print("half a line", end="")
    return call(*args)


def print_line(text: str) -> str:
    """Print a line."""
    print(text)
    return text
