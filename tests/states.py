"""What a worker may be doing when something ends: tasks that note their state in a file and stay in it."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import tasks

_STAYS = {
    "idle": tasks.pid,
    "sleeping": tasks.sleep_for_ever,
    "spinning": tasks.spin_for_ever,
    "holding": tasks.hold_the_gil,
    "stopped": tasks.stop_itself,
    "deaf": tasks.ignore_sigterm,
    "parent": tasks.sleep_for_ever,
    "parent of a stray": tasks.sleep_for_ever,
    "leaving a thread": tasks.exit_thread_left_behind,
}
_CHILDREN = {"parent": tasks.fork_stubborn, "parent of a stray": lambda: tasks.fork_stubborn(os.setpgrp)}


def enter(state: str, path: Path | str) -> object:
    """Note in one line this process, its parent, its child if the state has one, and the state; then stay in it."""
    pids = [os.getpid(), os.getppid()]
    if state in _CHILDREN:
        pids.append(_CHILDREN[state]())
    tasks.note(Path(path), " ".join([*map(str, pids), state]))
    return _STAYS[state]()


def expect(path: Path | str, count: int, timeout: float = 20) -> None:
    """Return once the file has `count` lines."""
    deadline = time.monotonic() + timeout
    while count and (not Path(path).exists() or Path(path).read_text().count("\n") < count):
        if time.monotonic() > deadline:
            raise RuntimeError(f"fewer than {count} lines in {path} after {timeout} s")
        time.sleep(0.002)


def pids(path: Path | str) -> list[int]:
    """Return each process that was noted."""
    return [int(word) for word in Path(path).read_text().split() if word.isdigit()]


def append(path: Path | str, value: object, seconds: float = 0) -> object:
    """Note a value after so many seconds, and return it."""
    time.sleep(seconds)
    return tasks.note(Path(path), value)


def fail_when(path: Path) -> None:
    """Raise once the file exists."""
    if path.exists():
        raise OSError(f"{path.name} is in the way")


_kept: list[Any] = []


def keep(*values: Any) -> None:
    """Keep values in this process."""
    _kept[:] = values


def kept() -> list[Any]:
    """Return what was kept."""
    return _kept


def sum_of_kept_bytes() -> int:
    """Return the sum of the kept bytes, under the kept lock."""
    data, lock = _kept
    with lock:
        return sum(data)


def put_in_kept_queue(value: object) -> None:
    """Put this process's id and a value in the kept queue, under the kept lock."""
    queue, lock = _kept
    with lock:
        queue.put((os.getpid(), value))


def fail_first(path: Path) -> None:
    """Raise if the file exists, and remove it."""
    if path.exists():
        path.unlink()
        raise OSError("once")


def loaded(name: str) -> bool:
    """Return whether a module is loaded."""
    return name in sys.modules


def clean_up_slowly(path: Path, seconds: float) -> None:
    """Sleep for ever; when stopped, take so many seconds and note it."""
    try:
        tasks.sleep_for_ever()
    finally:
        time.sleep(seconds)
        tasks.note(path, "cleaned up")


def break_wall_clock() -> None:
    """Make this process's wall clock stand still."""
    time.time = int  # type: ignore[assignment]  # int() is 0


def wall_clock() -> float:
    """Return what this process takes for the time."""
    return time.time()


# ---------------------------------------------------------------------------------------------- items of a map


def wait_turn(path: Path, count: int, number: int) -> int:
    """End after all higher numbers, and note it."""
    expect(path, count - 1 - number)
    tasks.note(path, number)
    return number


def fail_from(first: int, number: int) -> int:
    """Raise from some number on."""
    if number >= first:
        raise tasks.TwoArguments(number, "too large")
    return number


def fail_or_hang(path: Path, number: int) -> None:
    """Hang if the number is 1; if it is 0, fail once that one hangs."""
    if number == 0:
        expect(path, 1)
        raise tasks.TwoArguments(number, "first")
    tasks.note(path, os.getpid())
    tasks.swallow_everything()


def die_if(die: bool) -> None:
    """Kill this process, or not."""
    if die:
        tasks.kill_itself()


def hang_if(hang: bool) -> None:
    """Hang, or not."""
    if hang:
        tasks.sleep_for_ever()


def count_for_ever() -> Iterator[int]:
    """Count slowly, without an end."""
    for number in itertools.count():
        time.sleep(0.001)
        yield number


def meet(path: Path, count: int) -> None:
    """Note this process and return once as many have come."""
    tasks.note(path, os.getpid())
    expect(path, count)


def map_inside(number: int) -> list[int]:
    """Map in the worker."""
    import taskpool

    return [*taskpool.map(tasks.square, [0]), number]


def thread_name(_: object) -> str:
    """Return the name of the thread that runs this."""
    return threading.current_thread().name


def pid_of(_: object) -> int:
    """Return the process that runs this."""
    return os.getpid()


def raise_it(error: BaseException) -> None:
    """Raise an exception that was made elsewhere."""
    raise error


# ---------------------------------------------------------------------------------------------- members of a group


def fail_behind(path: Path, count: int, kind: type[BaseException], *args: Any) -> None:
    """Raise an exception once so many lines have been noted."""
    expect(path, count)
    raise kind(*args)
