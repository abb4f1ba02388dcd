"""What was sent to a worker and has not begun: it is taken back, runs elsewhere or never, and costs no innocent task."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool._engine.channel import PACKET
from taskpool._engine.crew import Crew
from taskpool._engine.handle import WorkerHandle
from tests import processes, tasks
from tests.helpers import PATIENCE, at_most, lines, on_one_host, outcome, wait_until

Pool = Callable[..., taskpool.Executor]


def _handles(executor: taskpool.Executor) -> list[WorkerHandle]:
    return list(executor._backend._dispatcher._crew.workers)  # type: ignore[attr-defined]


def _stopped_worker(executor: taskpool.Executor) -> int:
    """Return the only worker, which waits for a task and is stopped."""
    pid: int = executor.submit(tasks.pid).result(PATIENCE)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: (process := processes.read(pid)) is not None and process.state == "T")
    return pid


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time in which a worker must begin what it was sent."""
    for module in ("handle", "deadlines", "feeder", "direct"):
        monkeypatch.setattr(f"taskpool._engine.{module}.PICK_UP", 0.3)


@on_one_host
def test_a_cancelled_task_that_lies_unread_never_starts(pool: Pool, tmp_path: Path) -> None:
    """It comes back from the pipe of a worker that does not read, and the worker may go on."""
    executor = pool(1, grace=PATIENCE)
    pid = _stopped_worker(executor)
    future = executor.submit(tasks.note, tmp_path / "notes", "ran")
    with at_most(2, "taking back"):
        assert future.cancel()
        assert isinstance(outcome(future), CancelledError)
    os.kill(pid, signal.SIGCONT)
    assert executor.submit(tasks.pid).result(PATIENCE) == pid
    assert lines(tmp_path / "notes") == []


@on_one_host
@pytest.mark.usefixtures("soon")
def test_a_worker_that_wakes_as_it_is_replaced_kills_no_task(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it was sent is out of its reach before it is killed."""
    executor = pool(1)
    pid = _stopped_worker(executor)
    kill = Crew.kill

    def wake_and_kill(self: Crew, worker: WorkerHandle) -> None:
        if worker.pid == pid and processes.alive(pid):
            os.kill(pid, signal.SIGCONT)
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline and not lines(tmp_path / "notes"):
                time.sleep(0.001)
        kill(self, worker)

    monkeypatch.setattr(Crew, "kill", wake_and_kill)
    future = executor.submit(tasks.note_then, tmp_path / "notes", "ran", tasks.pid_after, 0.5)
    other = future.result(PATIENCE)
    assert other != pid
    assert lines(tmp_path / "notes") == ["ran"]
    assert executor.stats().crashed == 0


@on_one_host
@pytest.mark.usefixtures("soon")
def test_a_worker_that_reads_and_never_begins_is_replaced(pool: Pool) -> None:
    """Its task runs elsewhere."""
    executor = pool(1)
    pid = _stopped_worker(executor)
    future = executor.submit(tasks.pid)
    unread = _handles(executor)[0].channel.unread
    assert unread is not None
    assert os.read(unread, PACKET)  # as the worker would just before it is stopped
    with at_most(5, "finding out"):
        assert future.result(PATIENCE) != pid
    assert executor.stats().crashed == 0


@on_one_host
def test_short_tasks_do_not_wait_behind_one_that_turns_out_to_be_long(pool: Pool, tmp_path: Path) -> None:
    """They were sent ahead, since all before had been short; other workers get them."""
    executor = pool(2)
    for number in range(300):
        executor.submit(tasks.identity, number).result(PATIENCE)
    early = [executor.submit(tasks.identity, number) for number in range(30)]
    long = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    late = [executor.submit(tasks.identity, number) for number in range(60)]
    with at_most(5, "the short ones"):
        assert [future.result(PATIENCE) for future in early + late] == [*range(30), *range(60)]
    assert not long.done()
    (tmp_path / "release").touch()
    long.result(PATIENCE)


@on_one_host
def test_running_asks_nothing_of_a_task_that_just_ended(pool: Pool) -> None:
    """`running()` answers, whatever the engine takes away meanwhile."""
    executor, answers = pool(2), set[Any]()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            futures = [executor.submit(tasks.identity, number) for number in range(50)]
            while not all(future.done() for future in futures):
                answers |= {future.running() for future in futures}
    finally:
        sys.setswitchinterval(before)
    assert answers <= {True, False}
