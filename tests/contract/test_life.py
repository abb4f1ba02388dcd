"""Every backend: how an executor begins, what it refuses, what it tells of itself, and how it ends."""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import attrs
import pytest

import taskpool
from tests import tasks
from tests.helpers import (
    PATIENCE,
    TEMPLATE,
    Backend,
    at_most,
    bounded,
    lines,
    on_all,
    on_hosts,
    on_pools,
    outcome,
    wait_until,
)

pytestmark = pytest.mark.core

Pool = Callable[..., taskpool.Executor]


# ---------------------------------------------------------------------------------------------- beginning


@on_all
@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": -1}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": 2.5}, TypeError, "max_workers"),
        ({"max_workers": "2"}, TypeError, "max_workers"),
        ({"max_workers": True}, TypeError, "max_workers"),
        ({"initializer": 5}, TypeError, "initializer must be a callable"),
        ({"initializer": print, "initargs": 5}, TypeError, "initargs"),
        ({"preload": "numpy"}, TypeError, "preload"),
        ({"preload": [5]}, TypeError, "preload"),
        ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child"),
        ({"max_tasks_per_child": "1"}, TypeError, "max_tasks_per_child"),
        ({"max_pending": 0}, ValueError, "max_pending"),
        ({"max_pending": 1.0}, TypeError, "max_pending"),
        ({"name": 5}, TypeError, "name"),
        ({"task_timeout": 0}, ValueError, "task_timeout"),
        ({"task_timeout": -1}, ValueError, "task_timeout"),
        ({"task_timeout": math.nan}, ValueError, "task_timeout"),
        ({"task_timeout": "1"}, TypeError, "task_timeout"),
        ({"grace": math.nan}, ValueError, "grace"),
        ({"grace": None}, TypeError, "grace"),
        ({"submit_timeout": "1"}, TypeError, "submit_timeout"),
        ({"shutdown_timeout": math.nan}, ValueError, "shutdown_timeout"),
        ({"start_timeout": True}, TypeError, "start_timeout"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(backend: Backend, options: dict[str, Any], kind: type[Exception], text: str) -> None:
    """At the constructor, with the option's name, and with nothing started."""
    with pytest.raises(kind, match=text):
        taskpool.Executor(**{**backend.options, **options})


@pytest.mark.parametrize("name", ["proces", "", None, 5, "ProcessPoolExecutor"])
def test_an_unknown_backend_is_refused_by_name(name: Any) -> None:
    """The message lists those that exist."""
    with pytest.raises((ValueError, TypeError), match="process") as caught:
        taskpool.Executor(backend=name)
    assert "thread" in str(caught.value)
    assert repr(name) in str(caught.value)


@on_hosts
@pytest.mark.parametrize("context", ["forkk", 5, object()], ids=["unknown name", "number", "object"])
def test_an_unknown_start_method_is_refused(backend: Backend, context: Any) -> None:
    """It is a name that multiprocessing knows, or one of its contexts."""
    with pytest.raises((ValueError, TypeError), match=r"mp_context|start method|forkk"):
        taskpool.Executor(backend=backend.name, mp_context=context)


def test_more_than_the_options_must_be_named() -> None:
    """Only `max_workers` may be passed by place."""
    with pytest.raises(TypeError):
        taskpool.Executor(2, "process")  # type: ignore[misc]


@on_all
def test_without_a_number_there_is_one_worker_per_processor(pool: Pool) -> None:
    """It runs tasks, and nothing is started before the first."""
    executor = pool(None)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_pools
def test_at_most_max_workers_tasks_run_at_once(pool: Pool, tmp_path: Path) -> None:
    """With three workers three tasks are held, and the fourth waits."""
    executor = pool(3)
    futures = [executor.submit(tasks.hold, tmp_path / f"started{n}", tmp_path / "release", n) for n in range(4)]
    wait_until(lambda: all((tmp_path / f"started{number}").exists() for number in range(3)))
    wait_until(lambda: executor.stats().running == 3)
    assert not (tmp_path / "started3").exists()
    (tmp_path / "release").touch()
    assert [future.result(PATIENCE) for future in futures] == [0, 1, 2, 3]


@on_hosts
def test_tasks_run_in_other_processes(pool: Pool) -> None:
    """In as many as there are workers at most."""
    executor = pool(2)
    import os

    pids = {future.result(PATIENCE) for future in [executor.submit(tasks.pid) for _ in range(20)]}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2


# ---------------------------------------------------------------------------------------------- options


@on_all
def test_options_make_a_view_on_the_same_pool(pool: Pool) -> None:
    """The view submits and maps; the executor itself does not change."""
    executor = pool()
    view = executor.options(name="resize", priority=3)
    assert view.submit(tasks.square, 3).result(PATIENCE) == 9
    assert list(view.map(tasks.square, [1, 2])) == [1, 4]
    assert view.submit(tasks.keywords, name="own").result(PATIENCE) == {"name": "own"}


@on_all
@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"timeout": 3}, TypeError, "unknown option 'timeout'"),
        ({"no_such_option": 3}, TypeError, "unknown option 'no_such_option'"),
        ({"task_timeout": "3"}, TypeError, "task_timeout"),
        ({"task_timeout": 0}, ValueError, "task_timeout"),
        ({"priority": 1.5}, TypeError, "priority"),
        ({"priority": True}, TypeError, "priority"),
        ({"name": 3}, TypeError, "name"),
        ({"grace": "1"}, TypeError, "grace"),
        ({"submit_timeout": math.nan}, ValueError, "submit_timeout"),
    ],
    ids=str,
)
def test_bad_task_options_are_refused(pool: Pool, options: dict[str, Any], kind: type[Exception], text: str) -> None:
    """At `options`, not at the first task."""
    with pytest.raises(kind, match=text):
        pool().options(**options)


@on_hosts
def test_options_of_a_view_stand_over_those_of_the_executor(pool: Pool) -> None:
    """Executor, then view: the last word wins, and a view without a word changes nothing."""
    executor = pool(1, task_timeout=0.2, grace=0.1)
    assert executor.options(task_timeout=PATIENCE).submit(tasks.spin, 0.4).result(PATIENCE) is None
    assert executor.options(task_timeout=None).submit(tasks.spin, 0.4).result(PATIENCE) is None
    assert isinstance(outcome(executor.options(name="slow").submit(tasks.sleep_for_ever)), taskpool.TaskTimeoutError)
    error = executor.options(name="slow", task_timeout=0.1).submit(tasks.sleep_for_ever).exception(PATIENCE)
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert (error.task, error.seconds) == ("slow", 0.1)
    assert "slow" in str(error)


@on_pools
def test_higher_priority_leaves_the_queue_first(pool: Pool, tmp_path: Path) -> None:
    """Equals keep their order."""
    executor = pool(1)
    executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    wait_until((tmp_path / "started").exists)
    wanted = {"low": -1, "first": 0, "second": 0, "high": 5, "higher": 9}
    futures = [
        executor.options(priority=priority).submit(tasks.note, tmp_path / "notes", name)
        for name, priority in wanted.items()
    ]
    (tmp_path / "release").touch()
    concurrent.futures.wait(futures, PATIENCE)
    assert lines(tmp_path / "notes") == ["higher", "high", "first", "second", "low"]


@on_all
def test_what_a_backend_cannot_do_it_refuses_by_name(pool: Pool, backend: Backend) -> None:
    """A limit, where it cannot be kept, is an error that names a backend that keeps it; never ignored."""
    try:
        future = pool(1, task_timeout=0.2, grace=0.1).submit(tasks.sleep_in_steps, 5.0)
    except taskpool.UnsupportedError as error:
        assert not backend.hosted
        assert isinstance(error, NotImplementedError)
        assert "process" in str(error)
    else:
        assert isinstance(outcome(future), taskpool.TaskTimeoutError)


@pytest.mark.parametrize("name", ["thread", "serial"])
@pytest.mark.parametrize(
    "option", [{"mp_context": "spawn"}, {"preload": ["json"]}, {"max_tasks_per_child": 3}], ids=str
)
def test_options_of_processes_are_refused_without_processes(name: str, option: dict[str, Any]) -> None:
    """They would be ignored otherwise."""
    with pytest.raises(taskpool.UnsupportedError, match="process"):
        taskpool.Executor(2, backend=name, **option)


# ---------------------------------------------------------------------------------------------- statistics


@on_all
def test_statistics_count_what_happened(pool: Pool) -> None:
    """A frozen record that adds up."""
    executor = pool(2)
    futures = [executor.submit(tasks.identity, number) for number in range(5)]
    futures += [executor.submit(tasks.fail, ValueError) for _ in range(3)]
    concurrent.futures.wait(futures, PATIENCE)
    stats = wait_until(lambda: (s := executor.stats()).finished + s.failed == 8 and s)
    assert (stats.finished, stats.failed, stats.queued, stats.running) == (5, 3, 0, 0)
    assert (stats.timed_out, stats.cancelled, stats.crashed, stats.replaced) == (0, 0, 0, 0)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        stats.finished = 6


@on_pools
def test_statistics_count_what_waits(pool: Pool, tmp_path: Path) -> None:
    """Running, queued and cancelled tasks are counted apart."""
    executor = pool(1)
    futures = [executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release") for _ in range(4)]
    wait_until((tmp_path / "started").exists)
    stats = wait_until(lambda: (s := executor.stats()).running == 1 and s.queued == 3 and s)
    assert stats.workers == 1
    assert stats.idle == 0
    futures[3].cancel()
    (tmp_path / "release").touch()
    concurrent.futures.wait(futures, PATIENCE)
    stats = wait_until(lambda: (s := executor.stats()).finished == 3 and s)
    assert (stats.cancelled, stats.queued) == (1, 0)
    wait_until(lambda: executor.stats().idle == executor.stats().workers)


@on_hosts
def test_statistics_count_what_went_wrong(pool: Pool) -> None:
    """Crashes, timeouts, and the workers that were replaced."""
    executor = pool(1, grace=0.1)
    outcome(executor.submit(tasks.kill_itself))
    outcome(executor.options(task_timeout=0.1).submit(tasks.sleep_for_ever))
    outcome(executor.submit(tasks.identity, 1))
    stats = wait_until(lambda: (s := executor.stats()).finished == 1 and s)
    assert (stats.crashed, stats.timed_out, stats.failed) == (1, 1, 0)
    assert stats.replaced >= 2


# ---------------------------------------------------------------------------------------------- the end


@on_all
def test_leaving_the_with_block_finishes_what_was_accepted(pool: Pool) -> None:
    """As the standard library does."""
    with pool(2) as executor:
        futures = [executor.submit(tasks.square, number) for number in range(30)]
    assert all(future.done() for future in futures)
    assert [future.result(0) for future in futures] == [number * number for number in range(30)]


@on_all
def test_after_shutdown_nothing_is_accepted(pool: Pool) -> None:
    """The text is the standard library's."""
    executor = pool()
    executor.submit(tasks.identity, 1).result(PATIENCE)
    bounded(executor.shutdown)
    for call in (
        lambda: executor.submit(tasks.identity, 1),
        lambda: executor.map(tasks.identity, [1]),
        lambda: executor.options(priority=1).submit(tasks.identity, 1),
    ):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            call()
    bounded(executor.shutdown)
    bounded(executor.terminate)
    assert executor.stats().finished == 1


@on_all
def test_an_executor_that_was_never_used_ends_at_once(pool: Pool) -> None:
    """There is nothing to wait for."""
    executor = pool()
    with at_most(2):
        bounded(executor.shutdown)


@on_all
def test_results_outlive_their_executor(pool: Pool) -> None:
    """A future can be asked after the end."""
    executor = pool()
    future, failing = executor.submit(tasks.identity, b"x" * 300_000), executor.submit(tasks.fail, KeyError, 3)
    bounded(executor.shutdown)
    assert future.result(0) == b"x" * 300_000
    assert isinstance(failing.exception(0), KeyError)


@on_pools
def test_shutdown_waits_for_running_and_queued_tasks(pool: Pool, tmp_path: Path) -> None:
    """None is lost."""
    executor = pool(1)
    futures = [executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", n) for n in range(3)]
    wait_until((tmp_path / "started").exists)
    ending = threading.Thread(target=executor.shutdown)
    ending.start()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        wait_until(lambda: executor.submit(tasks.identity, 1) and False, 5)
    assert ending.is_alive()
    (tmp_path / "release").touch()
    ending.join(PATIENCE)
    assert not ending.is_alive()
    assert [future.result(0) for future in futures] == [0, 1, 2]


@on_pools
def test_shutdown_without_waiting_returns_at_once(pool: Pool, tmp_path: Path) -> None:
    """The accepted tasks still run."""
    executor = pool(1)
    futures = [executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", n) for n in range(3)]
    with at_most(1):
        executor.shutdown(wait=False)
    (tmp_path / "release").touch()
    assert [future.result(PATIENCE) for future in futures] == [0, 1, 2]


@on_pools
def test_cancel_futures_cancels_the_queued_only(pool: Pool, tmp_path: Path) -> None:
    """The running one finishes; the waiters of the others hear of it."""
    executor = pool(1)
    running = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", "held")
    wait_until((tmp_path / "started").exists)
    wait_until(running.running)
    queued = [executor.submit(tasks.note, tmp_path / "notes", number) for number in range(5)]
    executor.shutdown(wait=False, cancel_futures=True)
    done, pending = concurrent.futures.wait(queued, PATIENCE)
    assert not pending
    assert all(future.cancelled() for future in done)
    (tmp_path / "release").touch()
    assert running.result(PATIENCE) == "held"
    assert not (tmp_path / "notes").exists()


@on_hosts
def test_shutdown_past_its_timeout_stops_what_runs(pool: Pool) -> None:
    """Every future is resolved, and the call is bounded."""
    executor = pool(1, grace=0.1)
    futures = [executor.submit(tasks.swallow_everything), *(executor.submit(tasks.identity, n) for n in range(3))]
    started = time.monotonic()
    bounded(lambda: executor.shutdown(timeout=0.3))
    assert 0.25 < time.monotonic() - started < 4
    assert all(future.done() for future in futures)
    for future in futures:
        assert isinstance(outcome(future), CancelledError)


@on_hosts
def test_shutdown_timeout_of_the_constructor_bounds_the_with_block(pool: Pool) -> None:
    """Nobody waits for a task that never ends."""
    with at_most(6), pool(1, grace=0.1, shutdown_timeout=0.3) as executor:
        future = executor.submit(tasks.sleep_for_ever)
    assert isinstance(outcome(future, 0.1), CancelledError)


@on_hosts
def test_terminate_stops_everything_at_once(pool: Pool, tmp_path: Path) -> None:
    """Running and queued tasks end as cancelled, within the bound."""
    executor = pool(2, grace=0.2)
    running = [executor.submit(tasks.note_then, tmp_path / "notes", n, tasks.swallow_everything) for n in range(2)]
    wait_until(lambda: len(lines(tmp_path / "notes")) == 2)
    queued = [executor.submit(tasks.note, tmp_path / "notes", "queued") for _ in range(5)]
    with at_most(5):
        bounded(lambda: executor.terminate(timeout=4))
    for future in [*running, *queued]:
        assert isinstance(outcome(future, 0.1), CancelledError)
    assert sorted(lines(tmp_path / "notes")) == ["0", "1"]
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(tasks.identity, 1)


@on_pools
@pytest.mark.parametrize("value", [math.nan, "1", True, [1]], ids=str)
def test_bad_timeouts_of_the_end_are_refused(pool: Pool, value: Any) -> None:
    """And the executor is still there."""
    executor = pool(1)
    for call in (executor.shutdown, executor.terminate):
        with pytest.raises((TypeError, ValueError), match="timeout"):
            call(timeout=value)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_hosts
def test_a_worker_is_recycled_after_its_tasks(pool: Pool) -> None:
    """`max_tasks_per_child` gives each so many tasks, and no task is lost between two workers."""
    executor = pool(1, max_tasks_per_child=3)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    at_once = [future.result(PATIENCE) for future in [executor.submit(tasks.pid) for _ in range(8)]]
    one_by_one = [executor.submit(tasks.pid).result(PATIENCE) for _ in range(9)]
    for pids, shares in ((at_once, [2, 3, 3]), (one_by_one, [3, 3, 3])):
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == shares
    assert executor.stats().replaced == 0


@on_hosts
def test_a_preloaded_module_is_there_before_the_first_task(pool: Pool, backend: Backend) -> None:
    """Where one process is the template of all workers; elsewhere it is refused, not ignored."""
    if backend == TEMPLATE:
        assert pool(1, preload=["wave"]).submit(tasks.is_loaded, "wave").result(PATIENCE)
    else:
        with pytest.raises(taskpool.UnsupportedError, match="process"):
            pool(1, preload=["wave"])
