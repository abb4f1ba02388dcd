"""Starts of workers that the system refuses for a moment: they are tried again, and cost no task."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

import taskpool
from taskpool._engine import descriptors
from taskpool._engine.hosts.futures import FuturesHost
from taskpool._engine.hosts.pool import PoolHost
from taskpool._engine.hosts.processes import ProcessHost
from taskpool._engine.hosts.template import TemplateHost
from tests import processes, tasks
from tests.helpers import PATIENCE, TEMPLATE, on_one_host, outcome, run_script, wait_until
from tests.scripts import run_main

Pool = Callable[..., taskpool.Executor]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, type[Exception]], None]:
    """Have the next so many starts of any host fail."""
    left: list[Exception] = []

    def refusing(start: Callable[..., None]) -> Callable[..., None]:
        def attempt(*args: Any) -> None:
            if left:
                raise left.pop()
            start(*args)

        return attempt

    for host in (TemplateHost, ProcessHost, FuturesHost, PoolHost):
        monkeypatch.setattr(host, "start", refusing(host.start))
    return lambda count, kind: left.extend(kind(errno.EMFILE, "too many") for _ in range(count))


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes.alive(pid))


@pytest.mark.core
@on_one_host
@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_start_that_is_refused_is_tried_again(
    pool: Pool, refuse: Callable[[int, type[Exception]], None], kind: type[Exception]
) -> None:
    """Also when it was the only one, and nothing else happens that would wake anybody."""
    executor = pool(1)
    worker = executor.submit(tasks.pid).result(PATIENCE)
    refuse(2, kind)
    _end(worker)
    assert executor.submit(tasks.pid).result(PATIENCE) != worker


@on_one_host
def test_starts_that_are_refused_for_long_fail_what_waits(
    pool: Pool, refuse: Callable[[int, type[Exception]], None]
) -> None:
    """Nobody waits for ever where no worker is left and none can be started."""
    executor = pool(1)
    worker = executor.submit(tasks.pid).result(PATIENCE)
    refuse(100, OSError)
    _end(worker)
    error = outcome(executor.submit(tasks.pid))
    assert type(error) is taskpool.InitializerError
    assert "too many" in str(error)


@on_one_host
def test_no_task_is_lost_while_others_serve(
    pool: Pool, refuse: Callable[[int, type[Exception]], None], tmp_path: Path
) -> None:
    """However often a further start is refused."""
    executor = pool(3)
    executor.submit(tasks.pid).result(PATIENCE)
    refuse(4, OSError)
    held = [executor.submit(tasks.hold, tmp_path / f"started {n}", tmp_path / "release", n) for n in range(3)]
    wait_until(lambda: all((tmp_path / f"started {n}").exists() for n in range(3)), what="three workers")
    (tmp_path / "release").touch()
    assert [future.result(PATIENCE) for future in held] == [0, 1, 2]


NO_DESCRIPTORS = """
import resource
with executor(8) as pool:
    pool.submit(abs, -1).result(15)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2, hard))
    futures = [pool.submit(tasks.identity, n) for n in range(50)] + [pool.submit(tasks.spin, 0.1) for _ in range(6)]
    print([future.result(15) for future in futures[:50]] == list(range(50)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print({future.result(15) for future in futures[50:]}, pool.submit(abs, -2).result(15))
"""


def test_a_moment_without_descriptors(tmp_path: Path) -> None:
    """The workers that there are do the work."""
    ended = run_main(NO_DESCRIPTORS, TEMPLATE, tmp_path, timeout=40)
    assert (ended.code, ended.out) == (0, "True\n{None} 2\n"), ended


# ---------------------------------------------------------------------------------------------- first submits

IN_A_BLOCK = """
import operator, os, signal
from taskpool import Executor

one, other = Executor(1), Executor(1)
one.submit(abs, 1).result(20)
done = []
signal.signal(signal.SIGUSR1, lambda *_: done.append(other.submit(operator.add, 1, 2)))
real = os.memfd_create


def interrupted(*args):
    os.memfd_create = real
    signal.raise_signal(signal.SIGUSR1)
    return real(*args)


os.memfd_create = interrupted
print(one.submit(len, bytes(4 << 20)).result(20), done[0].result(20))
one.shutdown()
other.shutdown()
"""


def test_a_handler_submits_first_while_descriptors_are_made() -> None:
    """The start of a template does not wait for the lock that the interrupted thread has."""
    ended = run_script(IN_A_BLOCK, timeout=20)
    assert (ended.code, ended.out.split(), ended.err) == (0, ["4194304", "3"], "")


IN_AN_IMPORT = """
import os, signal, threading
from taskpool import Executor

pool, seen = Executor(1), []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(type(pool.submit(os._exit, 3).exception(20)).__name__))
real = threading._register_atexit  # called in the middle of the import of what knows process pools


def interrupted(*args):
    threading._register_atexit = real
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
    return real(*args)


threading._register_atexit = interrupted
print(pool.submit(abs, -1).result(20), *seen)
pool.shutdown()
"""


def test_a_handler_waits_for_a_crash_while_the_first_submit_imports() -> None:
    """The error of a crash is loaded before there is a dispatcher, which would have to wait for that import."""
    ended = run_script(IN_AN_IMPORT, timeout=20)
    assert (ended.code, ended.out.split(), ended.err) == (0, ["1", "WorkerCrashedError"], "")


def test_a_dispatcher_that_cannot_be_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the template that was started before it: neither the process nor a note of its socket; the next try works."""
    with taskpool.Executor(1) as executor:
        noted = set(descriptors._parent_ends.fds)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", _refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                executor.submit(abs, 1)
        assert descriptors._parent_ends.fds <= noted  # those of an executor before may go meanwhile
        assert executor.submit(abs, -1).result(PATIENCE) == 1


def _refuse(_: threading.Thread) -> NoReturn:
    raise RuntimeError("can't start new thread")
