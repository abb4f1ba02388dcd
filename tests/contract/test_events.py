"""Every backend: listeners are told of each attempt and each end, once and in order."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool import events
from tests import tasks
from tests.helpers import PATIENCE, Backend, bounded, lines, on_all, on_hosts, on_pools, outcome, wait_until

pytestmark = pytest.mark.core

Pool = Callable[..., taskpool.Executor]


def ends_into(heard: list[Any]) -> Callable[[events.Event], None]:
    """Return a listener that keeps what is said of attempts that have ended."""

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TaskEnded | events.TaskRetried):
            heard.append(event)

    return listen


@on_all
def test_a_listener_hears_of_each_end(pool: Pool) -> None:
    """Of calls and of items, with the task, how it ended, and where."""
    heard: list[Any] = []
    executor = pool(1, name="ours", listeners=[ends_into(heard)])
    future = executor.options(name="square").submit(tasks.square, 3)
    assert future.result(PATIENCE) == 9
    assert list(executor.map(tasks.square, range(4), chunksize=2)) == [0, 1, 4, 9]
    assert isinstance(outcome(executor.submit(tasks.fail, ValueError, "odd")), ValueError)
    wait_until(lambda: len(heard) == 6)
    first, *items, last = heard
    assert (first.executor, first.task, first.id, first.attempt) == ("ours", "square", future.task_id, 1)
    assert (first.how, first.error) == ("finished", None)
    assert first.worker
    assert first.seconds >= 0
    assert [item.id.split(":")[1] for item in items] == ["0", "1", "2", "3"]
    assert (last.how, type(last.error), str(last.error)) == ("failed", ValueError, "odd")


@on_all
def test_a_listener_hears_of_each_attempt(pool: Pool) -> None:
    """As it fails, with its error, and then of the end."""
    heard: list[Any] = []
    executor = pool(1, listeners=[ends_into(heard)], retry=3)
    assert isinstance(outcome(executor.submit(tasks.fail, ValueError, "odd")), ValueError)
    wait_until(lambda: len(heard) == 3)
    assert [type(event) for event in heard] == [events.TaskRetried, events.TaskRetried, events.TaskEnded]
    assert [event.attempt for event in heard] == [1, 2, 3]
    assert [type(event.error) for event in heard] == [ValueError] * 3
    assert heard[0].wait == 0


@on_hosts
def test_a_listener_hears_how_a_task_was_stopped(pool: Pool, tmp_path: Path) -> None:
    """By its limit, by the death of its worker, by being cancelled while it ran or before."""
    heard: list[Any] = []
    executor = pool(1, listeners=[ends_into(heard)], grace=0.1)
    assert outcome(executor.options(task_timeout=0.2).submit(tasks.sleep_for_ever))
    assert outcome(executor.submit(tasks.exit_with, 3))
    running = executor.submit(tasks.note_then, tmp_path / "notes", 1, tasks.sleep_for_ever)
    queued = executor.submit(tasks.square, 2)
    wait_until(lambda: lines(tmp_path / "notes"))
    queued.cancel()
    running.cancel()
    wait_until(lambda: len(heard) == 4)
    assert [event.how for event in heard] == ["timed_out", "crashed", "cancelled", "cancelled"]
    assert [event.id for event in heard[2:]] == [queued.task_id, running.task_id]


@on_pools
def test_a_listener_that_raises_is_called_no_more(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """It is reported, and harms neither the tasks nor other listeners."""
    calls: Counter[str] = Counter()

    def bad(_: object) -> None:
        calls["bad"] += 1
        raise RuntimeError("I do not listen")

    def good(event: events.Event) -> None:
        calls["good"] += isinstance(event, events.TaskEnded)

    executor = pool(1, listeners=[bad, good])
    assert list(executor.map(tasks.square, range(5), chunksize=1)) == [0, 1, 4, 9, 16]
    wait_until(lambda: calls["good"] == 5)
    assert calls["bad"] == 1
    assert "I do not listen" in caplog.text


@on_all
@pytest.mark.parametrize("listeners", [3, [3]])
def test_bad_listeners_are_refused(backend: Backend, listeners: Any) -> None:
    """At the call."""
    with pytest.raises(TypeError, match="listener"):
        taskpool.Executor(1, **backend.options, listeners=listeners)


@on_pools
def test_ends_without_a_run_are_told(pool: Pool, tmp_path: Path) -> None:
    """Of what waits when the executor is terminated."""
    heard: list[Any] = []
    executor = pool(1, listeners=[ends_into(heard)], grace=0.1)
    executor.submit(tasks.note_then, tmp_path / "notes", 1, tasks.sleep_briefly_for_ever)
    wait_until(lambda: lines(tmp_path / "notes"))
    queued = [executor.submit(tasks.square, number) for number in range(3)]
    bounded(executor.terminate)
    wait_until(lambda: len(heard) == 4)
    assert {event.how for event in heard} == {"cancelled"}
    assert {event.id for event in heard} >= {future.task_id for future in queued}


@on_all
def test_a_listener_hears_all_that_happens(pool: Pool) -> None:
    """To a task and to its worker, in order, with the time on both clocks."""
    heard: list[Any] = []
    began, began_monotonic = time.time(), time.monotonic()
    executor = pool(1, name="ours", listeners=[heard.append])
    assert executor.submit(tasks.square, 3).result(PATIENCE) == 9
    assert list(executor.map(tasks.square, range(2))) == [0, 1]
    bounded(executor.shutdown)
    mine = [event for event in heard if getattr(event, "id", "").partition(":")[0] == heard[0].id]
    assert [type(event) for event in mine] == [events.TaskQueued, events.TaskStarted, events.TaskEnded]
    assert [event.attempt for event in mine] == [0, 1, 1]
    assert mine[1].worker == mine[2].worker
    items = [event for event in heard if ":" in getattr(event, "id", "")]
    kinds = [events.TaskQueued, events.TaskStarted, events.TaskEnded]
    assert Counter(type(event) for event in items) == dict.fromkeys(kinds, 2)
    workers = [event for event in heard if isinstance(event, events.WorkerEvent)]
    if executor.stats().started:
        assert [type(event) for event in workers] == [events.WorkerStarted, events.WorkerReady, events.WorkerDied]
        assert {event.worker for event in workers} == {mine[1].worker}
        assert workers[-1].early is False
    else:
        assert workers == []
    assert {event.executor for event in heard} == {"ours"}
    for event in heard:
        assert -0.01 < event.time - began < PATIENCE
        assert 0 <= event.monotonic - began_monotonic < PATIENCE
    order = sorted(mine, key=lambda event: event.monotonic)
    assert order == mine


@on_hosts
def test_a_listener_hears_of_a_start_when_it_happens(pool: Pool, tmp_path: Path) -> None:
    """Not when the task ends; and of the worker that dies, and of the one in its place."""
    heard: list[Any] = []
    executor = pool(1, listeners=[heard.append])
    future = executor.submit(tasks.await_file, tmp_path / "go")
    (started,) = wait_until(lambda: [event for event in heard if isinstance(event, events.TaskStarted)])
    assert not future.done()
    (tmp_path / "go").touch()
    future.result(PATIENCE)
    assert isinstance(outcome(executor.submit(tasks.kill_itself)), taskpool.WorkerCrashedError)
    assert executor.submit(tasks.square, 2).result(PATIENCE) == 4
    wait_until(lambda: sum(isinstance(event, events.WorkerReady) for event in heard) == 2)
    (died,) = [event for event in heard if isinstance(event, events.WorkerDied)]
    (replaced,) = [event for event in heard if isinstance(event, events.WorkerReplaced)]
    assert (died.worker, died.early, died.pid) == (started.worker, True, replaced.pid)
    assert died.exitcode in (-9, None)
    assert replaced.worker == died.worker
    assert replaced.by == [event.worker for event in heard if isinstance(event, events.WorkerReady)][1]
