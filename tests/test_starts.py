"""Starts of workers that the system refuses for a moment: they are tried again, and cost no task."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool._engine import hosts
from tests import processes, tasks
from tests.helpers import PATIENCE, TEMPLATE, on_one_host, outcome, wait_until
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

    for host in (hosts.TemplateHost, hosts.ProcessHost, hosts.FuturesHost, hosts.PoolHost):
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
