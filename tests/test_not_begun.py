"""What was sent to a worker and has not begun: it is taken back, runs elsewhere or never, and costs no innocent task."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool._engine.channel import PACKET, Channel
from taskpool._engine.crew import Crew
from taskpool._engine.handle import GONE, WorkerHandle
from taskpool._engine.units import Unit
from tests import processes, tasks
from tests.helpers import PATIENCE, all_stacks, at_most, lines, on_one_host, outcome, wait_until

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
@pytest.mark.parametrize("seconds", [0.0, 2e-3])
def test_a_worker_without_work_gets_what_lies_ahead_at_another(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """At once, without the time in which a short task would have ended; also if the other has not read its first."""
    monkeypatch.setattr("taskpool._engine.handle.AHEAD", 10 * PATIENCE)
    executor = pool(2)
    for number in range(20):
        executor.submit(tasks.spin_and_answer, seconds, number).result(PATIENCE)
    for turn in range(10):
        started, release = tmp_path / f"started {turn}", tmp_path / f"release {turn}"
        early = [executor.submit(tasks.spin_and_answer, seconds, number) for number in range(20)]
        long = executor.submit(tasks.hold, started, release)
        late = [executor.submit(tasks.spin_and_answer, seconds, number) for number in range(20)]
        assert [future.result(PATIENCE) for future in early + late] == 2 * [*range(20)]
        release.touch()
        long.result(PATIENCE)
    wait_until(lambda: executor.stats().idle == 2, what="both workers idle")


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


# ---------------------------------------------------------------------------------------------- just being handed over


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[WorkerHandle], object]], None]:
    """Have the next thread that hands a call to a worker do something between taking that worker and sending."""
    give = WorkerHandle.give

    def hold_up(act: Callable[[WorkerHandle], object]) -> None:
        def act_and_give(self: WorkerHandle, unit: Unit) -> bool:
            monkeypatch.setattr(WorkerHandle, "give", give)
            act(self)
            return give(self, unit)

        monkeypatch.setattr(WorkerHandle, "give", act_and_give)

    return hold_up


HoldUp = Callable[[Callable[[WorkerHandle], object]], None]


@on_one_host
def test_a_worker_is_buried_before_its_call_is_sent(pool: Pool, held_up: HoldUp, tmp_path: Path) -> None:
    """A handler that takes long comes in between: the call runs elsewhere, and no other file gets its bytes."""
    executor, files = pool(1), []
    executor.submit(tasks.pid).result(PATIENCE)

    def bury(worker: WorkerHandle) -> None:
        number = worker.channel.tasks
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda: worker.state == GONE)
        while not files or files[-1].fileno() < number:  # one of them gets the number
            files.append((tmp_path / "other").open("ab"))

    held_up(bury)
    try:
        assert executor.submit(tasks.identity, 7).result(PATIENCE) == 7
    finally:
        for file in files:
            file.close()
    assert (tmp_path / "other").read_bytes() == b""


@on_one_host
def test_a_worker_is_buried_while_its_call_is_sent(
    pool: Pool, held_up: HoldUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was noted with it then, and not settled with it, runs elsewhere."""
    executor = pool(1)
    executor.submit(tasks.pid).result(PATIENCE)
    send = Channel.send_packet

    def bury(worker: WorkerHandle) -> None:
        def lose(*_: object) -> bool:  # as if it had been sent at the last moment
            monkeypatch.setattr(Channel, "send_packet", send)
            return True

        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda: worker.state == GONE)
        monkeypatch.setattr(Channel, "send_packet", lose)

    held_up(bury)
    assert executor.submit(tasks.identity, 7).result(PATIENCE) == 7


@on_one_host
def test_terminate_stops_what_is_just_being_handed_over(pool: Pool, held_up: HoldUp) -> None:
    """Without a bound of its own it would wait for that task."""
    executor, holding, release = pool(1, grace=0.1), threading.Event(), threading.Event()
    executor.submit(tasks.pid).result(PATIENCE)

    def hold(_: WorkerHandle) -> None:
        holding.set()
        release.wait(PATIENCE)

    held_up(hold)
    futures: list[taskpool.TaskFuture[None]] = []
    submitting = threading.Thread(target=lambda: futures.append(executor.submit(tasks.sleep_for_ever)))
    submitting.start()
    assert holding.wait(PATIENCE)
    ending = threading.Thread(target=executor.terminate, args=(None,))
    ending.start()
    wait_until(lambda: not executor._backend._dispatcher.is_open)  # type: ignore[attr-defined]
    release.set()
    for thread in (submitting, ending):
        thread.join(PATIENCE)
        assert not thread.is_alive(), all_stacks()
    assert isinstance(outcome(futures[0]), CancelledError)


@on_one_host
def test_a_worker_that_seemed_lost_finishes_the_call_that_it_was_just_given(
    pool: Pool, held_up: HoldUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread was interrupted, and another one had the worker: its task takes its time."""
    monkeypatch.setattr("taskpool._engine.crew.END_TIME", 0.2)
    executor, sent, retiring = pool(1), threading.Event(), threading.Event()
    pid = executor.submit(tasks.pid).result(PATIENCE)
    retire = Crew.retire

    def retire_when_sent(self: Crew, worker: WorkerHandle) -> None:
        monkeypatch.setattr(Crew, "retire", retire)
        retiring.set()
        sent.wait(PATIENCE)
        retire(self, worker)

    def lose(_: WorkerHandle) -> None:
        monkeypatch.setattr(Crew, "retire", retire_when_sent)
        executor._backend._dispatcher._direct.recover_soon()  # type: ignore[attr-defined]
        assert retiring.wait(PATIENCE)

    held_up(lose)
    future = executor.submit(tasks.pid_after, 1)
    sent.set()
    assert future.result(PATIENCE) == pid
    assert executor.submit(tasks.pid).result(PATIENCE) != pid


@on_one_host
def test_a_buried_worker_does_not_wait_for_work(pool: Pool) -> None:
    """Even if a thread that was held up lets it."""
    executor = pool(1)
    executor.submit(tasks.pid).result(PATIENCE)
    (worker,) = _handles(executor)
    assert worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: worker.state == GONE)
    crew: Crew = executor._backend._dispatcher._crew  # type: ignore[attr-defined]
    crew.make_idle(worker)
    assert worker not in crew.idle


@on_one_host
def test_nothing_overtakes_a_call_that_is_just_being_sent(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is submitted meanwhile is not sent to the same worker before it; each runs once."""
    executor, holding, release = pool(1), threading.Event(), threading.Event()
    for number in range(40):  # until it is known that they are short, and may be sent ahead
        assert executor.submit(tasks.identity, number).result(PATIENCE) == number
    send = Channel.send_packet

    def hold(self: Channel, packet: bytes) -> bool:
        monkeypatch.setattr(Channel, "send_packet", send)
        holding.set()
        release.wait(PATIENCE)
        return send(self, packet)

    monkeypatch.setattr(Channel, "send_packet", hold)
    futures: list[taskpool.TaskFuture[object]] = []
    notes = tmp_path / "notes"
    submitting = threading.Thread(target=lambda: futures.append(executor.submit(tasks.note, notes, "first")))
    submitting.start()
    assert holding.wait(PATIENCE)
    others = [executor.submit(tasks.note, notes, str(number)) for number in range(10)]
    wait_until(lambda: not executor._backend._dispatcher._loop)  # type: ignore[attr-defined]
    release.set()
    submitting.join(PATIENCE)
    for future in [*futures, *others]:
        future.result(PATIENCE)
    assert sorted(lines(notes)) == sorted(["first", *map(str, range(10))])
