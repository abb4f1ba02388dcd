"""A limit stops the task, whatever it does; `cancel()` of a running task and asyncio's cancellation do the same."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool._engine.channel import INTERRUPT, INTERRUPT_ITEM, Channel, WorkerChannel
from taskpool._engine.worker import Interrupts, TaskInterrupt
from tests import processes, tasks
from tests.helpers import PATIENCE, at_most, lines, on_every_host, on_hosts, on_one_host, outcome, wait_until

Pool = Callable[..., taskpool.Executor]

LIMIT, GRACE = 0.2, 0.2
SLACK = 1.5  # what a loaded machine may add

DEAF = [tasks.ignore_all_signals, tasks.block_signals]  # no signal makes them tell where they are
STUCK = [
    tasks.sleep_for_ever,
    tasks.spin_for_ever,
    tasks.swallow_everything,
    tasks.ignore_sigterm,
    *DEAF,
    tasks.hold_the_gil,
    tasks.sleep_with_the_gil,
    tasks.stop_itself,
    tasks.hang_in_finally,
]
PARENTS = [
    tasks.start_child_and_hang,
    tasks.fork_and_hang,
    tasks.fork_group_and_hang,
    tasks.fork_tree_and_hang,
]
stuck = pytest.mark.parametrize("task", STUCK, ids=lambda task: task.__name__)
parents = pytest.mark.parametrize("task", PARENTS, ids=lambda task: task.__name__)


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.core
@on_hosts
@stuck
def test_a_limit_stops_the_task(pool: Pool, task: Callable[[], None]) -> None:
    """The error tells where it was stuck, and the next task on that slot runs."""
    executor = pool(1, task_timeout=LIMIT, grace=GRACE)
    assert executor.submit(tasks.identity, 0).result(PATIENCE) == 0
    with at_most(LIMIT + GRACE + SLACK, "stopping the task"):
        error = outcome(executor.submit(task))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert isinstance(error, TimeoutError)
    assert error.seconds == LIMIT
    assert error.task == task.__name__
    if task not in DEAF:
        assert f"in {task.__name__}" in (error.stack or "")
    wait_until(lambda: not processes.alive(error.pid), 2)
    assert executor.submit(tasks.identity, 7).result(PATIENCE) == 7
    assert executor.stats().timed_out == 1


@on_every_host
@pytest.mark.parametrize("task", [tasks.sleep_for_ever, tasks.hold_the_gil], ids=lambda task: task.__name__)
def test_a_limit_stops_the_task_under_every_start_method(pool: Pool, task: Callable[[], None]) -> None:
    """Soft and hard."""
    executor = pool(1, grace=GRACE)
    error = outcome(executor.options(task_timeout=LIMIT).submit(task))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert task.__name__ in (error.stack or "")
    assert executor.submit(tasks.identity, 7).result(PATIENCE) == 7


@on_hosts
@parents
def test_a_limit_kills_what_the_task_started(pool: Pool, task: Callable[[Path], None], tmp_path: Path) -> None:
    """No child of a stopped task lives."""
    executor = pool(1, task_timeout=LIMIT + 0.3, grace=GRACE)
    assert isinstance(outcome(executor.submit(task, tmp_path / "children")), taskpool.TaskTimeoutError)
    (child,) = map(int, lines(tmp_path / "children"))
    wait_until(lambda: not processes.alive(child), 2, "the end of the task's child")
    assert executor.submit(tasks.identity, 7).result(PATIENCE) == 7


@on_hosts
def test_the_end_of_a_task_is_not_the_end_of_its_limit(pool: Pool) -> None:
    """A result that takes too long to pickle is stopped as well."""
    error = outcome(pool(1, task_timeout=LIMIT, grace=GRACE).submit(tasks.HangsAtDump))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert "sleep_for_ever" in (error.stack or "")


@on_hosts
def test_arguments_that_never_load_are_stopped(pool: Pool) -> None:
    """The limit holds from the moment the worker takes the task."""
    error = outcome(pool(1, task_timeout=LIMIT, grace=GRACE).submit(tasks.identity, tasks.HangsAtLoad()))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert "sleep_for_ever" in (error.stack or "")


@on_hosts
@pytest.mark.parametrize("items", [1, 2, 3])
def test_items_that_never_load_are_stopped(pool: Pool, items: int) -> None:
    """An item of a map is told so as a task is; its neighbours, which were sent along with it, run."""
    results = pool(1, task_timeout=LIMIT, grace=GRACE).map(tasks.identity, [*range(items - 1), tasks.HangsAtLoad()])
    assert [next(results) for _ in range(items - 1)] == [*range(items - 1)]
    with pytest.raises(taskpool.TaskTimeoutError) as caught:
        next(results)
    assert "sleep_for_ever" in (caught.value.stack or "")


@on_hosts
def test_waiting_in_the_queue_does_not_count(pool: Pool) -> None:
    """Each of many tasks has the whole limit, from its own start."""
    executor = pool(1, task_timeout=0.4)
    futures = [executor.submit(tasks.spin, 0.1) for _ in range(10)]
    assert [future.result(PATIENCE) for future in futures] == [None] * 10


@on_hosts
def test_starting_a_worker_does_not_count(pool: Pool) -> None:
    """A limit shorter than the start of a process is kept for the task, not for the start."""
    executor = pool(2, task_timeout=0.15, initializer=time.sleep, initargs=(0.4,))
    assert [executor.submit(tasks.identity, n).result(PATIENCE) for n in range(3)] == [0, 1, 2]


@on_hosts
def test_each_item_of_a_chunk_has_its_own_limit(pool: Pool) -> None:
    """Ten items of 0.1 s in one chunk are no task of 1 s."""
    results = pool(1, task_timeout=0.5).map(tasks.spin, [0.1] * 10, chunksize=10)
    assert list(results) == [None] * 10


@on_hosts
@pytest.mark.parametrize("chunksize", [None, 1, 4, 10])
def test_a_stuck_item_of_a_map_costs_one_item(pool: Pool, tmp_path: Path, chunksize: int | None) -> None:
    """The items before it keep their results, those behind it run, and none runs twice."""
    notes = tmp_path / "notes"
    executor = pool(1, task_timeout=LIMIT, grace=GRACE)
    results = executor.map(tasks.hang_at, [6] * 10, [notes] * 10, range(10), chunksize=chunksize)
    wait_until(lambda: len(lines(notes)) == 10)  # all are tried, though nobody asks for a result yet
    assert [next(results) for _ in range(6)] == list(range(6))
    with pytest.raises(taskpool.TaskTimeoutError) as caught:
        next(results)
    assert "hang_at" in (caught.value.stack or "")
    bounded_end(executor)
    assert sorted(map(int, lines(notes))) == list(range(10))


@on_hosts
def test_stubborn_tasks_are_stopped_side_by_side(pool: Pool) -> None:
    """Three that resist take as long as one."""
    executor = pool(3, task_timeout=LIMIT, grace=0.5)
    for future in [executor.submit(tasks.identity, n) for n in range(3)]:
        future.result(PATIENCE)
    with at_most(LIMIT + 0.5 + SLACK):
        errors = [outcome(future) for future in [executor.submit(tasks.ignore_sigterm) for _ in range(3)]]
    assert [type(error) for error in errors] == [taskpool.TaskTimeoutError] * 3


@on_hosts
def test_a_stopped_worker_that_continues_is_stopped_once(pool: Pool) -> None:
    """A task that someone freezes and thaws in time is none the worse."""
    executor = pool(1, task_timeout=PATIENCE)
    pid = executor.submit(tasks.pid).result(PATIENCE)
    os.kill(pid, signal.SIGSTOP)
    future = executor.submit(tasks.pid)
    os.kill(pid, signal.SIGCONT)
    assert future.result(PATIENCE) == pid


@on_hosts
def test_an_idle_worker_that_is_frozen_costs_no_more_than_its_task(pool: Pool) -> None:
    """A task that was handed to it runs elsewhere or is stopped by its limit; the slot works again."""
    executor = pool(1, task_timeout=LIMIT, grace=GRACE)
    pid = executor.submit(tasks.pid).result(PATIENCE)
    os.kill(pid, signal.SIGSTOP)
    try:
        result = outcome(executor.submit(tasks.identity, 3))
        assert result == 3 or isinstance(result, taskpool.TaskTimeoutError)
        assert executor.submit(tasks.identity, 4).result(PATIENCE) == 4
    finally:
        if processes.alive(pid):
            os.kill(pid, signal.SIGCONT)


@on_hosts
def test_a_task_may_clean_up_within_its_grace(pool: Pool, tmp_path: Path) -> None:
    """`finally` blocks run; the process is not killed under them."""
    executor = pool(1, task_timeout=LIMIT, grace=PATIENCE)
    error = outcome(executor.submit(tasks.clean_up_slowly, tmp_path / "notes", 0.3))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert lines(tmp_path / "notes") == ["begun", "cleaned up"]


@on_hosts
def test_a_task_that_ends_after_its_limit_is_late(pool: Pool) -> None:
    """A result that a task makes out of its interruption does not count: the limit was passed."""
    error = outcome(pool(1, task_timeout=LIMIT, grace=2).submit(tasks.answer_the_interruption))
    assert isinstance(error, taskpool.TaskTimeoutError)


@on_hosts
def test_a_result_written_in_time_counts(pool: Pool, tmp_path: Path) -> None:
    """Though the caller looks at it long after the limit: results come before deadlines."""
    executor = pool(1, task_timeout=0.6, grace=0.05)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    future = executor.submit(tasks.note_and_die_after_return, tmp_path / "notes", 0.2, PATIENCE, "in time")
    wait_until(lambda: lines(tmp_path / "notes"))
    ctypes.PyDLL(None).usleep(900_000)  # no thread of this process runs meanwhile
    assert future.result(PATIENCE) == "in time"


@on_one_host
def test_a_result_on_its_way_is_not_cut(pool: Pool) -> None:
    """However long after the limit it arrives, as long as it does not stand still for the grace."""
    executor = pool(1, task_timeout=0.3, grace=1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    assert len(executor.submit(tasks.write_slowly, 1 << 21, 2.5).result(PATIENCE)) == 1 << 21


@on_hosts
@pytest.mark.parametrize("limit", [1e-9, 1e-3])
def test_tiny_limits_stop_what_lasts(pool: Pool, limit: float) -> None:
    """However short."""
    error = outcome(pool(1, task_timeout=limit, grace=GRACE).submit(tasks.sleep_for_ever))
    assert isinstance(error, taskpool.TaskTimeoutError)


@on_hosts
def test_the_limit_of_one_never_hits_the_next(pool: Pool) -> None:
    """Hundreds of limits that pass at the end of their tasks leave every neighbour alone."""
    executor = pool(2, grace=0.05)
    limited = executor.options(task_timeout=0.005)
    futures: list[tuple[Any, Any]] = []
    for number in range(150):
        futures.append((None, limited.submit(tasks.spin, 0.005)))
        futures.append((number, executor.submit(tasks.identity, number)))
    for wanted, future in futures:
        got = outcome(future)
        assert got == wanted or (wanted is None and isinstance(got, taskpool.TaskTimeoutError))


# ---------------------------------------------------------------------------------------------- cancelling


@pytest.mark.core
@on_hosts
@stuck
def test_cancel_stops_a_running_task(pool: Pool, task: Callable[[], None], tmp_path: Path) -> None:
    """True means that the stop is requested; the future resolves as cancelled, and the slot works again."""
    executor = pool(1, grace=GRACE)
    future = executor.submit(tasks.note_then, tmp_path / "notes", "started", task)
    behind = executor.submit(tasks.identity, 7)
    wait_until(lambda: lines(tmp_path / "notes"))
    calls: list[object] = []
    future.add_done_callback(calls.append)
    with at_most(GRACE + SLACK, "stopping the task"):
        assert future.cancel()
        assert future.cancel()
        done, _ = wait([future], PATIENCE)
    assert done
    assert future.cancelled()
    with pytest.raises(CancelledError):
        future.result(0)
    with pytest.raises(CancelledError):
        future.exception(0)
    assert behind.result(PATIENCE) == 7
    assert calls == [future]
    assert executor.stats().cancelled == 1


@on_hosts
@parents
def test_cancel_kills_what_the_task_started(pool: Pool, task: Callable[[Path], None], tmp_path: Path) -> None:
    """No child of a cancelled task lives."""
    executor = pool(1, grace=GRACE)
    future = executor.submit(task, tmp_path / "children")
    (child,) = map(int, wait_until(lambda: lines(tmp_path / "children")))
    assert future.cancel()
    assert isinstance(outcome(future), CancelledError)
    wait_until(lambda: not processes.alive(child), 2, "the end of the task's child")
    assert executor.submit(tasks.identity, 7).result(PATIENCE) == 7


@on_hosts
def test_a_cancelled_task_that_had_written_its_result_keeps_it(pool: Pool, tmp_path: Path) -> None:
    """It resolves once, with the result."""
    executor = pool(1, grace=GRACE)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    future = executor.submit(tasks.note_and_die_after_return, tmp_path / "notes", 0.1, PATIENCE, "written")
    wait_until(lambda: lines(tmp_path / "notes"))
    ctypes.PyDLL(None).usleep(500_000)  # the result lies in the pipe, and nobody has read it
    future.cancel()
    assert outcome(future) == "written"
    assert not future.cancelled()


@on_hosts
def test_cancelling_in_a_row_harms_nobody(pool: Pool, tmp_path: Path) -> None:
    """Every third task is cancelled, wherever it is; all others give their result, once and in order."""
    executor = pool(2, grace=0.05)
    futures = [executor.submit(tasks.note_then, tmp_path / "notes", n, tasks.spin, 0.002) for n in range(150)]
    for future in futures[::3]:
        future.cancel()
    for number, future in enumerate(futures):
        got = outcome(future)
        assert got is None or (number % 3 == 0 and isinstance(got, CancelledError)), (number, got)
    noted = [int(line) for line in lines(tmp_path / "notes")]
    assert len(noted) == len(set(noted))
    assert set(noted) >= {number for number in range(150) if number % 3}


@on_hosts
def test_closing_a_map_leaves_the_pool_to_others(pool: Pool, tmp_path: Path) -> None:
    """Queued items go; whoever comes next gets the workers."""
    executor = pool(1, grace=GRACE)
    results = executor.map(
        tasks.note_then, itertools.repeat(tmp_path / "notes"), range(50), [tasks.spin] * 50, [0.01] * 50
    )
    next(results)
    results.close()  # type: ignore[attr-defined]
    with at_most(3):
        assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_hosts
def test_cancelling_while_a_result_is_written_is_not_lost(pool: Pool, tmp_path: Path) -> None:
    """The item that is being written when the signal comes cannot be interrupted any more; the next one never starts."""
    executor = pool(1, grace=PATIENCE)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    with pytest.raises(taskpool.CallTimeoutError):
        list(executor.map(tasks.note_and_dump_slowly, [tmp_path / "notes"] * 2, range(2), chunksize=2, timeout=LIMIT))
    with at_most(0.5 + 2 * SLACK):
        assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert lines(tmp_path / "notes") == ["0"]


def test_an_interrupt_that_came_too_early() -> None:
    """A signal that finds nothing to interrupt is not lost: who is armed looks whether one was meant for him."""
    channel = Channel()
    words, interrupts = channel.page.words, Interrupts(WorkerChannel(channel.worker_end))
    words[INTERRUPT], words[INTERRUPT_ITEM] = 7, 0
    interrupts.handle(signal.SIGUSR1, None)
    interrupts.arm(8)
    with pytest.raises(TaskInterrupt):
        interrupts.arm(7)
    channel.close()


# ---------------------------------------------------------------------------------------------- asyncio


def _submit_and_wrap(executor: taskpool.Executor, *call: Any) -> asyncio.Future[Any]:
    return asyncio.wrap_future(executor.submit(*call))


def _run_in_executor(executor: taskpool.Executor, *call: Any) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().run_in_executor(executor, *call)


async def _await_it(executor: taskpool.Executor, *call: Any) -> Any:
    return await executor.submit(*call)


ways = pytest.mark.parametrize("way", [_submit_and_wrap, _run_in_executor, _await_it], ids=lambda way: way.__name__)


@pytest.mark.core
@on_hosts
@ways
def test_asyncio_timeouts_stop_the_task(pool: Pool, tmp_path: Path, way: Callable[..., Any]) -> None:
    """`asyncio.timeout` and `wait_for` free the worker, not only the coroutine."""
    executor = pool(1, grace=GRACE)

    async def main() -> int:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(LIMIT):
                await way(executor, tasks.note_then, tmp_path / "notes", os.getpid(), tasks.swallow_everything)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(way(executor, tasks.hold_the_gil), LIMIT)
        return await asyncio.wait_for(way(executor, tasks.identity, 7), GRACE + SLACK)

    assert asyncio.run(main()) == 7
    assert executor.stats().running == 0


@on_hosts
@ways
def test_cancelling_the_coroutine_stops_the_task(pool: Pool, tmp_path: Path, way: Callable[..., Any]) -> None:
    """And kills what it started."""
    executor = pool(1, grace=GRACE)

    async def main() -> None:
        async def body() -> None:
            await way(executor, tasks.fork_and_hang, tmp_path / "children")

        coroutine = asyncio.create_task(body())
        async with asyncio.timeout(PATIENCE):
            await asyncio.to_thread(wait_until, lambda: lines(tmp_path / "children"))
            coroutine.cancel()
            with pytest.raises(asyncio.CancelledError):
                await coroutine

    asyncio.run(main())
    (child,) = map(int, lines(tmp_path / "children"))
    wait_until(lambda: not processes.alive(child), GRACE + SLACK, "the end of the task's child")
    assert executor.submit(tasks.identity, 7).result(PATIENCE) == 7


@on_hosts
def test_cancelled_by_us_is_cancelled_in_asyncio(pool: Pool, tmp_path: Path) -> None:
    """`future.cancel()` from elsewhere ends the coroutine that awaits it."""
    executor = pool(1, grace=GRACE)

    async def main() -> None:
        future = executor.submit(tasks.note_then, tmp_path / "notes", "started", tasks.sleep_for_ever)
        async with asyncio.timeout(PATIENCE):
            waiting = asyncio.ensure_future(_awaiting(future))
            await asyncio.to_thread(wait_until, lambda: lines(tmp_path / "notes"))
            future.cancel()
            with pytest.raises((asyncio.CancelledError, CancelledError)):
                await waiting

    asyncio.run(main())


@on_hosts
def test_a_closed_loop_harms_nobody(pool: Pool, tmp_path: Path) -> None:
    """A task whose loop has ended resolves all the same."""
    executor = pool(1)

    async def main() -> None:
        asyncio.wrap_future(future)

    future = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", 1)
    asyncio.run(main())
    (tmp_path / "release").touch()
    wait_until(future.done)
    assert executor.submit(tasks.identity, 2).result(PATIENCE) == 2


async def _awaiting(future: taskpool.TaskFuture) -> Any:
    return await future


def bounded_end(executor: taskpool.Executor) -> None:
    """End the executor within a bound, so that what it does not run any more has not run."""
    with at_most(PATIENCE):
        executor.shutdown(timeout=PATIENCE / 2)
