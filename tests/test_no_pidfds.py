"""A system that refuses pidfds, as old kernels and some sandboxes do: processes that live are not taken for dead."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

import taskpool
from taskpool._engine import stop
from tests import processes, tasks
from tests.helpers import EVERY_HOST, FULL, HOSTS, PATIENCE, TEMPLATE, Backend, on_hosts
from tests.scripts import run_main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfds are Linux's")

Make = Callable[..., taskpool.Executor]

BACKENDS = EVERY_HOST if FULL else [*HOSTS, Backend("process", "spawn"), Backend("process", "fork")]
CASES = [
    *((backend, errno.ENOSYS) for backend in BACKENDS),
    *((backend, reason) for backend in (BACKENDS if FULL else [TEMPLATE]) for reason in (errno.EPERM, errno.EMFILE)),
]

WITHOUT = """
def refuse(*_):
    raise OSError(int(args[0]), "refused")

os.pidfd_open = refuse
pool = executor(1, grace=0.1)
for task in (tasks.kill_itself, tasks.kill_itself):
    error = pool.submit(task).exception(15)
    print(type(error).__name__, error.signal)
print(type(pool.submit(tasks.fork_and_die, path).exception(15)).__name__)
os.kill(pool.submit(tasks.pid).result(15), signal.SIGKILL)
print(pool.submit(tasks.identity, 1).result(15))
print(type(pool.options(task_timeout=0.2).submit(tasks.swallow_everything).exception(15)).__name__)
running = pool.submit(tasks.sleep_for_ever)
started = time.monotonic()
pool.terminate()
print(time.monotonic() - started < 4, running.done())
"""
AS_EVER = [
    "WorkerCrashedError SIGKILL",
    "WorkerCrashedError SIGKILL",
    "WorkerCrashedError",
    "1",
    "TaskTimeoutError",
    "True True",
]


@pytest.mark.parametrize(("backend", "reason"), CASES, ids=lambda value: errno.errorcode.get(value, str(value)))
def test_a_worker_is_seen_to_live_and_to_end(backend: Backend, reason: int, tmp_path: Path) -> None:
    """Crashes, kills, limits and the end are what they are elsewhere, whatever the refusal says."""
    ended = run_main(WITHOUT, backend, tmp_path, str(reason), timeout=40)
    out = ended.out
    if backend.name != "process":  # there a thread of the standard library's may take the exit code
        out = out.replace("Error None", "Error SIGKILL")
    assert out.splitlines() == AS_EVER, ended
    assert ended.code == 0, ended


def _refuse(*_: object) -> NoReturn:
    raise OSError(errno.EPERM, "refused")


@pytest.mark.parametrize("call", [(os, "pidfd_open"), (signal, "pidfd_send_signal")], ids=lambda call: call[1])
def test_the_default_backend_does_without_a_template(
    pool: Make, monkeypatch: pytest.MonkeyPatch, call: tuple[object, str]
) -> None:
    """The template needs pidfds that work."""
    monkeypatch.setattr(*call, _refuse)
    executor = pool(1)
    assert not executor._backend.capabilities.preload
    assert executor.submit(os.getppid).result(PATIENCE) == os.getpid()


@on_hosts
def test_no_descriptor_for_a_pidfd(pool: Make, monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """For the moment: a template is used all the same, and its workers are seen to live."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert stop.has_pidfds()
    executor = pool(1)
    worker = executor.submit(tasks.pid).result(PATIENCE)
    assert executor.submit(tasks.pid).result(PATIENCE) == worker, backend
    os.kill(worker, signal.SIGKILL)
    assert executor.submit(tasks.pid).result(PATIENCE) != worker
    assert not processes.alive(worker)
