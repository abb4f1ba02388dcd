"""Starts by multiprocessing that block: nothing else waits for them, and what comes of them too late is ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import taskpool
from tests import states
from tests.helpers import PATIENCE, run_script, wait_until

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
