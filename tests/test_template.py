"""The template process: it is replaced when it must be, and only then, and no running task is the worse for it."""

from __future__ import annotations

import errno
import gc
import logging
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NoReturn

import pytest

import taskpool
from taskpool._engine import descriptors, stop
from taskpool._engine.hosts import template as template_host
from tests import processes, states, tasks
from tests.helpers import PATIENCE, TEMPLATE, at_most, bounded, lines, outcome, wait_until
from tests.scripts import run_main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the template process is Linux's")

Make = Callable[..., taskpool.Executor]


def refuse(*_: object, **__: object) -> NoReturn:
    """Be a system call for which there are no descriptors left."""
    raise OSError(errno.EMFILE, "too many open files")


def write_preload(folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> str:
    """Make a module that takes its time to load, and return its name."""
    name = f"loads_for_{seconds:g}_s".replace(".", "_")
    (folder / f"{name}.py").write_text(f"import time; time.sleep({seconds})")
    monkeypatch.syspath_prepend(folder)
    return name


# ---------------------------------------------------------------------------------------------- replaced


@pytest.mark.core
def test_a_template_that_no_longer_fits(pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program changes its groups: the next worker comes from another template, and those of the old one work on."""
    executor = pool(2)
    template = executor.submit(os.getppid).result(PATIENCE)
    running = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", "unharmed")
    states.expect(tmp_path / "started", 1)
    monkeypatch.setattr(template_host, "_identity", lambda: "another")
    assert executor.submit(os.getppid).result(PATIENCE) != template
    (tmp_path / "release").touch()
    assert running.result(PATIENCE) == "unharmed"


def test_a_start_that_fails_here_is_not_the_templates_fault(
    pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent has no descriptor for a moment: the template stays, and with it all its workers."""
    executor = pool(2)
    template = executor.submit(os.getppid).result(PATIENCE)
    running = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", "unharmed")
    states.expect(tmp_path / "started", 1)
    failed: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(template_host, "_standard_streams", lambda: failed.append(1) or refuse())
        waiting = executor.submit(os.getppid)
        wait_until(lambda: failed)
    (tmp_path / "release").touch()
    assert running.result(PATIENCE) == "unharmed"
    assert waiting.result(PATIENCE) == template


def test_a_resource_tracker_that_was_closed(pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that closed descriptors it did not know has workers all the same."""
    monkeypatch.setattr(multiprocessing.resource_tracker._resource_tracker, "_fd", 1_000_000)
    assert pool(1).submit(tasks.identity, 1).result(PATIENCE) == 1


def test_a_stopped_template_is_replaced(pool: Make) -> None:
    """Also one that has started workers before; a start waits no longer for it than for any other reason."""
    executor = pool(1, start_timeout=1)
    worker, template = executor.submit(tasks.pid).result(PATIENCE), executor.submit(os.getppid).result(PATIENCE)
    os.kill(template, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    with at_most(5):
        assert executor.submit(os.getppid).result(PATIENCE) != template
    assert not processes.alive(template)


def test_a_dead_template_leaves_its_sweeping_to_the_parent(pool: Make, tmp_path: Path) -> None:
    """A child that left the group, but not the session, of a task that is stopped ends with it."""
    executor = pool(1, grace=0.1)
    template = executor.submit(os.getppid).result(PATIENCE)
    future = executor.submit(tasks.fork_group_and_hang, tmp_path / "children")
    (child,) = map(int, wait_until(lambda: lines(tmp_path / "children")))
    os.kill(template, signal.SIGKILL)
    wait_until(lambda: not processes.alive(template))
    future.cancel()
    assert isinstance(outcome(future), CancelledError)
    wait_until(lambda: not processes.alive(child), 2, "the end of the task's child")


# ---------------------------------------------------------------------------------------------- slow, or not at all


def test_many_workers_and_a_preload_that_takes_its_time(
    pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template reads nothing meanwhile: no more is sent than its socket has room for."""
    executor = pool(64, preload=[write_preload(tmp_path, monkeypatch, 2)])
    futures = [executor.submit(tasks.identity, number) for number in range(64)]
    assert [future.result(PATIENCE) for future in futures] == list(range(64))


def test_terminate_while_the_first_worker_starts(
    pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no process yet that could take its time to end."""
    executor = pool(2, preload=[write_preload(tmp_path, monkeypatch, 600)])
    future = executor.submit(tasks.pid)
    wait_until(lambda: executor._backend._dispatcher.counts.started)  # type: ignore[attr-defined]
    with at_most(0.9, "terminate"), caplog.at_level(logging.WARNING):
        bounded(executor.terminate)
    assert future.cancelled()
    assert not caplog.records


def test_a_template_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is noted of its socket, whose number may soon mean another file."""
    noted = set(descriptors._parent_ends.fds)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        with pytest.raises(OSError, match="too many"):
            template_host._TemplateProcess([])
    assert descriptors._parent_ends.fds <= noted  # those of an executor before may go meanwhile


IGNORED_CHILDREN = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
pool = executor(1)
template = pool.submit(os.getppid).result(20)
error = pool.submit(tasks.kill_itself).exception(20)
print(type(error).__name__, error.signal, pool.submit(os.getppid).result(20) == template)
pool.shutdown()
"""


def test_a_program_that_ignores_its_children(tmp_path: Path) -> None:
    """With SIGCHLD ignored, as in a program that wants no zombies, workers end as ever, and the template lives on."""
    ended = run_main(IGNORED_CHILDREN, TEMPLATE, tmp_path)
    assert (ended.code, ended.out) == (0, "WorkerCrashedError SIGKILL True\n"), ended


# ---------------------------------------------------------------------------------------------- sweeping elsewhere


def test_sweeping_without_a_descriptor(pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processes cannot be listed at the moment nothing is swept, and the pool goes on."""
    executor = pool(1, mp_context="fork")
    worker = executor.submit(tasks.pid).result(PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: processes.read(worker) is None, 5, "the worker's burial")
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_session_is_swept_before_its_id_is_free(pool: Make, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    """A worker that has ended is still a zombie then, whose id means nothing else."""
    swept: list[Any] = []
    monkeypatch.setattr(stop, "sweep_session", lambda pid: swept.append(processes.read(pid)))
    executor = pool(1, mp_context=start)
    error = outcome(executor.submit(tasks.kill_itself))
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert [process and process.pid for process in swept] == [error.pid]
    assert swept[0].zombie


# ---------------------------------------------------------------------------------------------- the garbage collector


def frozen_and_on() -> tuple[bool, bool]:
    """Return whether the collector passes over what was there at first, and whether it runs."""
    return gc.get_freeze_count() > 1000, gc.isenabled()


def test_a_worker_collects_garbage(pool: Make) -> None:
    """It is off only while the template begins, and leaves alone what all workers share."""
    assert pool(1).submit(frozen_and_on).result(PATIENCE) == (True, True)


def test_a_collector_that_is_off_stays_off(pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever turns it off for every interpreter means the workers, too."""
    (tmp_path / "sitecustomize.py").write_text("import gc; gc.disable()")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    assert pool(1).submit(gc.isenabled).result(PATIENCE) is False
