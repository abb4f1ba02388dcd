"""Starts by multiprocessing that block: nothing else waits for them, and what comes of them too late is ended."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import multiprocessing.forkserver
import os
import queue
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

import taskpool
from taskpool._engine import descriptors, entry, handle, launches
from taskpool._engine.channel import Channel
from taskpool._engine.hosts import pool as pool_host
from taskpool._engine.hosts import processes as process_host
from taskpool._engine.launches import Launches
from tests import states, tasks
from tests.helpers import PATIENCE, at_most, outcome, run_script, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is left")

Make = Callable[..., taskpool.Executor]

# ---------------------------------------------------------------------------------------------- as a whole

# Each process hangs in its main module, and never reads arguments for which its pipe has no room.
HANGS = """
import os, sys, threading, time
if __name__ != "__main__":
    time.sleep(600)
import taskpool

def accept(_):
    pass

backend, context, start_timeout = sys.argv[1], sys.argv[2], float(sys.argv[3])
pool = taskpool.Executor(
    2, backend=backend, mp_context=context, initializer=accept, initargs=(b"x" * 1_000_000,), start_timeout=start_timeout
)
futures = [pool.submit(int) for _ in range(2)]
if start_timeout < 60:
    print([type(future.exception(10)).__name__ for future in futures])
else:
    while not pool._backend._dispatcher.counts.started:
        time.sleep(0.001)
started = time.monotonic()
pool.terminate()
print(time.monotonic() - started < 4, [future.done() for future in futures])
deadline = time.monotonic() + 5
while any(thread.name == "taskpool-start" for thread in threading.enumerate()) and time.monotonic() < deadline:
    time.sleep(0.001)
print([thread.name for thread in threading.enumerate()])
with open("/proc/self/task/%d/children" % os.getpid()) as children:
    helpers = [open(f"/proc/{pid}/cmdline").read() for pid in children.read().split()]
print([helper for helper in helpers if "tracker" not in helper and "forkserver" not in helper])
"""

MULTIPROCESSING = [(name, start) for name in ("process", "futures", "pool") for start in ("spawn", "forkserver")]


@pytest.mark.parametrize("start_timeout", [1, 600])
@pytest.mark.parametrize(("name", "start"), MULTIPROCESSING)
def test_a_main_module_that_hangs(name: str, start: str, start_timeout: int) -> None:
    """The start fails in its time, the executor ends in its own, and neither process nor thread outlives that."""
    ended = run_script(HANGS, args=(name, start, str(start_timeout)))
    failed = [str(["InitializerError"] * 2)] if start_timeout == 1 else []
    assert ended.out.splitlines() == [*failed, "True [True, True]", "['MainThread']", "[]"], ended
    assert ended.code == 0, ended
    assert "Traceback" not in ended.err, ended


FAILS = """
import sys
if __name__ != "__main__":
    sys.exit(3)
import taskpool

def accept(_):
    pass

pool = taskpool.Executor(1, backend=sys.argv[1], mp_context="spawn", initializer=accept, initargs=(b"x" * 1_000_000,))
print(pool.submit(int).exception(15))
pool.shutdown()
"""


@pytest.mark.parametrize("name", ["process", "futures", "pool"])
def test_a_main_module_that_fails(name: str) -> None:
    """It is said what is most often wrong, and not that a pipe is broken."""
    ended = run_script(FAILS, args=(name,))
    assert "a worker ended before it was ready" in ended.out, ended
    assert "__main__" in ended.out, ended


@pytest.fixture
def stopped_server() -> Iterator[Callable[[], None]]:
    """Stop multiprocessing's forkserver when told to; it goes on when the test is over."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    yield lambda: os.kill(server, signal.SIGSTOP)
    os.kill(server, signal.SIGCONT)
    wait_until(lambda: not multiprocessing.active_children(), 5, "the ends that the server had not told")


@pytest.mark.parametrize("name", ["process", "futures"])
def test_a_stopped_forkserver(pool: Make, stopped_server: Callable[[], None], name: str) -> None:
    """Limits hold for what runs meanwhile, and the executor ends in its time; what the server starts later is ended."""
    executor = pool(2, backend=name, mp_context="forkserver", grace=0.2)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    running = executor.options(task_timeout=1).submit(tasks.sleep_for_ever)
    stopped_server()
    waiting = executor.submit(tasks.identity, 1)
    with at_most(4):
        assert isinstance(outcome(running), taskpool.TaskTimeoutError)
    with at_most(4):
        executor.terminate()
    assert waiting.cancelled()


@pytest.mark.parametrize("name", ["process", "futures", "pool"])
def test_a_stopped_forkserver_and_no_worker(pool: Make, stopped_server: Callable[[], None], name: str) -> None:
    """The first start fails in its time; more than are tried at once are not tried."""
    executor = pool(64 if name != "pool" else 2, backend=name, mp_context="forkserver", start_timeout=1)
    stopped_server()
    futures = [executor.submit(tasks.identity, number) for number in range(64)]
    with at_most(5):
        assert {type(outcome(future)) for future in futures} == {taskpool.InitializerError}
    assert sum(thread.name == "taskpool-start" for thread in threading.enumerate()) <= launches.AT_ONCE


class Waits:
    """Takes its time to be pickled."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        self.release.wait(PATIENCE)
        return int, ()


@pytest.mark.parametrize("name", ["process", "futures", "pool"])
def test_initargs_that_are_not_pickled_in_time(pool: Make, name: str) -> None:
    """Users' code holds up its own start only; the process that comes of it in the end is ended."""
    argument = Waits()
    options = {"initializer": tasks.identity, "initargs": (argument,), "start_timeout": 0.3}
    executor = pool(1, backend=name, mp_context="spawn", **options)
    with at_most(4):
        assert isinstance(outcome(executor.submit(int)), taskpool.InitializerError)
        executor.terminate()
    argument.release.set()


@pytest.mark.parametrize(("name", "start"), [*MULTIPROCESSING, ("process", "fork")])
def test_large_initargs(pool: Make, name: str, start: str) -> None:
    """They arrive in every worker, with what only inheritance can pass; of the files that carry them nothing stays."""
    lock = multiprocessing.get_context(start).Lock()
    large = os.urandom(3_000_000)
    options = {"initializer": states.keep, "initargs": (large, lock), "max_tasks_per_child": 1}
    executor = pool(2, backend=name, mp_context=start, **options)
    for _ in range(3):
        assert executor.submit(states.sum_of_kept_bytes).result(PATIENCE) == sum(large)
    wait_until(lambda: bytes_in_files() < len(large), what="files that have been emptied")


def bytes_in_files() -> int:
    """Return how much this process's files without a name hold together."""
    size = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed just now
            size += path.stat().st_size if str(path.readlink()).startswith("/memfd:") else 0
    return size


@pytest.mark.parametrize("name", ["process", "futures"])
def test_a_worker_that_dies_before_its_start_is_over(pool: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The thread that started it was held up: its exit code is waited for."""
    is_over = Launches._over

    def late(self: Launches[Any, Any], launch: Any) -> None:
        wait_until(lambda: launch.key.state == handle.DYING, what="the end of the worker")
        is_over(self, launch)

    monkeypatch.setattr(Launches, "_over", late)
    error = outcome(pool(1, backend=name, mp_context="spawn").submit(tasks.kill_itself))
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert error.signal == "SIGKILL"


# ---------------------------------------------------------------------------------------------- by itself


class Thing:
    """What a start makes."""


class Starts:
    """Starts that end when they are allowed to; and what became of them."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.posted: queue.SimpleQueue[tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
        self.told: list[tuple[object, ...]] = []
        self.launches: Launches[str, Thing] = Launches(
            lambda function, argument: self.posted.put((function, argument)),
            adopt=lambda key, made: self.told.append(("adopted", key, type(made))),
            fail=lambda key, error: self.told.append(("failed", key, type(error))),
            dispose=lambda made: self.told.append(("disposed of", type(made))),
        )
        self.things: weakref.WeakSet[Thing] = weakref.WeakSet()

    def make(self) -> Thing:
        """Wait, and make it."""
        assert self.release.wait(PATIENCE)
        thing = Thing()
        self.things.add(thing)
        return thing

    def turn(self) -> None:
        """Do as the dispatcher does with what was posted."""
        function, argument = self.posted.get(timeout=PATIENCE)
        function(argument)


@pytest.fixture
def starts() -> Iterator[Starts]:
    """Starts, all of which have ended when the test is over."""
    starts = Starts()
    yield starts
    starts.release.set()


@pytest.fixture
def worker() -> Iterator[Channel]:
    """The channel of a worker."""
    worker = Channel()
    yield worker
    worker.close()


def test_what_was_made_is_adopted(starts: Starts, worker: Channel) -> None:
    """On the dispatcher's thread; the worker's end is closed by then and not before, and nothing is kept."""
    end = worker.worker_end.move()
    starts.launches.begin("worker", starts.make, end)
    worker.close()
    assert end.fds, "these numbers would have meant other files, and have been passed on"
    starts.release.set()
    starts.turn()
    assert starts.told == [("adopted", "worker", Thing)]
    assert not end.fds
    assert "worker" not in starts.launches
    wait_until(lambda: not starts.things, 1, "the end of what nobody holds")


def test_what_was_given_up_is_disposed_of(starts: Starts, worker: Channel) -> None:
    """When it comes, whether or not anybody still listens; a new start for the same is another one."""
    end = worker.worker_end.move()
    starts.launches.begin("worker", starts.make, end)
    starts.launches.give_up("worker")
    starts.launches.begin("worker", starts.make)
    starts.launches.close(0)
    assert not starts.told
    starts.release.set()
    starts.launches.close(PATIENCE)
    assert starts.told == [("disposed of", Thing)]
    assert not end.fds
    starts.turn()
    assert starts.told == [("disposed of", Thing), ("adopted", "worker", Thing)]


def test_a_start_that_is_over_and_given_up(starts: Starts) -> None:
    """Before anybody was told of it: it is disposed of, once."""
    starts.release.set()
    starts.launches.begin("worker", starts.make)
    wait_until(lambda: not starts.posted.empty())
    starts.launches.give_up("worker")
    starts.turn()
    assert starts.told == [("disposed of", Thing)]


def test_a_start_that_fails(starts: Starts) -> None:
    """Whatever it raises; if it was given up nobody is told."""
    for error in (ValueError, SystemExit):
        starts.launches.begin("worker", lambda error=error: tasks.fail(error))  # type: ignore[misc]
        starts.turn()
    assert starts.told == [("failed", "worker", ValueError), ("failed", "worker", SystemExit)]
    starts.launches.begin("worker", lambda: starts.make() and tasks.fail(ValueError))
    starts.launches.give_up("worker")
    starts.release.set()
    starts.launches.close(PATIENCE)
    assert starts.posted.empty()
    assert len(starts.told) == 2


def test_no_thread_for_a_start(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens in place."""
    monkeypatch.setattr(threading.Thread, "start", lambda _: tasks.fail(RuntimeError))
    starts.release.set()
    starts.launches.begin("worker", starts.make)
    starts.turn()
    assert starts.told == [("adopted", "worker", Thing)]
    starts.launches.begin("worker", starts.make)
    starts.launches.give_up("worker")
    starts.launches.close(PATIENCE)
    assert starts.told[1:] == [("disposed of", Thing)]


# ---------------------------------------------------------------------------------------------- around it


def test_a_pool_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what was opened for it stays, or stays noted."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    noted = set(descriptors._parent_ends.fds)
    for place, function in ((os, "pipe"), (socket, "socketpair")):
        with monkeypatch.context() as patch:
            patch.setattr(place, function, refuse)
            with pytest.raises(OSError, match="too many"):
                pool_host._HostingPool(process_host.make_context("fork"), 1, entry.Luggage())
    assert descriptors._parent_ends.fds <= noted  # those of an executor before may go meanwhile
