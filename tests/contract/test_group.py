"""Every backend: what a group's block started has ended when the block has, and comes out of it as one error."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import anyio
import pytest

import taskpool
from taskpool._group import TaskGroup
from taskpool._options import TaskOptions
from taskpool._task import Failure, TaskFuture, Value
from taskpool.backends.base import Backend as BackendContract
from taskpool.backends.base import Setup
from tests import processes, states, tasks
from tests.helpers import (
    PATIENCE,
    Backend,
    at_most,
    lines,
    on_all,
    on_hosts,
    on_one_host,
    on_pools,
    outcome,
    run_script,
    wait_until,
)

pytestmark = pytest.mark.core

Pool = Callable[..., taskpool.Executor]

STOPPED_WITHIN = 8.0  # seconds, of which a stop needs a fraction: far less than what hangs would last


def hang(group: TaskGroup, backend: Backend, notes: Path) -> TaskFuture[Any]:
    """Submit what does not end by itself, and return when it runs."""
    before = len(lines(notes))
    future = group.submit(tasks.note_then, notes, "hangs", *hanging(backend))
    wait_until(lambda: len(lines(notes)) > before or future.done())  # done: there was no time for it
    return future


def hanging(backend: Backend) -> tuple[Any, ...]:
    """Return a function and its arguments: what resists every exception, where something can be done about that."""
    return (tasks.swallow_everything,) if backend.hosted else (tasks.sleep_in_steps, 3 * PATIENCE)


# ---------------------------------------------------------------------------------------------- all is well


@on_all
def test_leaving_waits_for_all(pool: Pool) -> None:
    """When the block has been left each member has its result."""
    executor = pool(2)
    with executor.group() as group:
        futures = [group.submit(tasks.add, number, step=1) for number in range(30)]
    assert all(future.done() for future in futures)
    assert [future.result(0) for future in futures] == list(range(1, 31))


@on_pools
def test_leaving_waits_for_those_that_run(pool: Pool, tmp_path: Path) -> None:
    """Also for the ones behind them in the queue."""
    executor, left = pool(1), threading.Event()

    def block() -> None:
        with executor.group() as group:
            futures.extend(group.submit(tasks.hold, tmp_path / "started", tmp_path / "release", n) for n in range(3))
        left.set()

    futures: list[TaskFuture[int]] = []
    thread = threading.Thread(target=block)
    thread.start()
    wait_until((tmp_path / "started").exists)
    assert not left.wait(0.1)
    (tmp_path / "release").touch()
    assert left.wait(PATIENCE)
    assert [future.result(0) for future in futures] == [0, 1, 2]
    thread.join()


@on_all
def test_an_empty_group_ends_at_once(pool: Pool) -> None:
    """There is nothing to wait for."""
    with at_most(1), pool().group(timeout=PATIENCE):
        pass


@on_all
def test_the_options_of_a_view_are_those_of_its_group(pool: Pool, backend: Backend) -> None:
    """Limit, grace and name of the members."""
    view = pool(1).options(task_timeout=0.2, grace=0.1, name="slow")
    with pytest.raises(ExceptionGroup) as caught, view.group() as group:
        future = group.submit(tasks.swallow_everything) if backend.hosted else group.submit(tasks.sleep_in_steps, 9)
    assert future.task_name == "slow"
    (error,) = caught.value.exceptions
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert (error.task, error.seconds) == ("slow", 0.2)


@on_pools
def test_members_come_from_threads_and_callbacks(pool: Pool) -> None:
    """Whoever submits while the block runs has it wait."""
    executor, seen = pool(2), []
    with executor.group() as group:
        called = threading.Event()

        def go_on(future: Any) -> None:
            seen.append(group.submit(tasks.add, future.result(0), 1))
            called.set()

        group.submit(tasks.identity, 1).add_done_callback(go_on)
        assert called.wait(PATIENCE)
        thread = threading.Thread(target=lambda: seen.append(group.submit(tasks.identity, 3)))
        thread.start()
        thread.join(PATIENCE)
    assert [future.result(0) for future in seen] == [2, 3]


@on_pools
def test_results_are_not_kept(pool: Pool) -> None:
    """The group holds on to what has not ended, and to failures: a million results are their owner's to keep."""
    with pool(1).group() as group:
        future = group.submit(tasks.make, tasks.Plain, 1)
        result = weakref.ref(future.result(PATIENCE))
        held = weakref.ref(future)
        assert result() is not None
        group.submit(tasks.identity, 2).result(PATIENCE)  # now the worker has let go, too
        del future
        gc.collect()
        assert result() is None
        assert held() is None


# ---------------------------------------------------------------------------------------------- failures


@on_all
def test_a_single_failure_comes_in_a_group(pool: Pool) -> None:
    """As from `asyncio.TaskGroup`; what is in it is the very exception of the member."""
    with pytest.raises(ExceptionGroup, match="1 of 2 tasks failed") as caught, pool(1).group(name="ours") as group:
        good, bad = group.submit(tasks.identity, 1), group.submit(tasks.fail, KeyError, "which")
    assert caught.value.exceptions == (bad.exception(0),)
    assert caught.value.exceptions[0] is bad.exception(0)
    assert "'ours'" in str(caught.value)
    assert good.result(0) == 1


@on_pools
def test_the_first_failure_stops_the_others(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """Those that run, whatever they do about it; those that wait never start."""
    executor, notes = pool(2, grace=0.1), tmp_path / "notes"
    with at_most(STOPPED_WITHIN), pytest.raises(ExceptionGroup) as caught, executor.group() as group:
        running = group.submit(tasks.note_then, notes, "hangs", *hanging(backend))
        failing = group.submit(states.fail_behind, notes, 2, ValueError, "first")
        waiting = [group.submit(tasks.note, tmp_path / "never", number) for number in range(20)]
        tasks.note(notes, "all are there")
    assert "1 of 22 tasks failed" in str(caught.value)
    assert caught.value.exceptions == (failing.exception(0),)
    assert running.cancelled()
    assert all(future.cancelled() for future in waiting)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1  # the queue goes on, behind the group's tasks
    assert lines(tmp_path / "never") == []


@on_hosts
def test_what_is_stopped_has_ended_when_the_block_has(pool: Pool, tmp_path: Path) -> None:
    """Not only its future: its process works no more."""
    executor = pool(2, grace=0.1)
    with pytest.raises(ExceptionGroup), executor.group() as group:
        group.submit(states.enter, "deaf", tmp_path / "notes")
        group.submit(states.fail_behind, tmp_path / "notes", 1, ValueError)
    assert not processes.alive(states.pids(tmp_path / "notes")[0])


@on_pools
def test_a_failure_stops_the_others_while_the_block_runs(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """The block hears of it by CancelledError, from `result` and from `submit`; that comes out as the failure."""
    executor, notes = pool(2, grace=0.1), tmp_path / "notes"
    refused = False
    with at_most(STOPPED_WITHIN), pytest.raises(ExceptionGroup) as caught, executor.group() as group:
        running = hang(group, backend, notes)
        failing = group.submit(tasks.fail, ValueError, "first")
        with pytest.raises(CancelledError):
            running.result(PATIENCE)
        with pytest.raises(CancelledError, match="is being stopped"):
            group.submit(tasks.note, tmp_path / "never", 1)
        refused = True
        running.result(0)
    assert refused
    assert caught.value.exceptions == (failing.exception(0),)
    assert lines(tmp_path / "never") == []


@on_all
def test_nothing_is_accepted_behind_a_failure(pool: Pool, tmp_path: Path) -> None:
    """As soon as the failed future is done."""
    with pytest.raises(ExceptionGroup) as caught, pool(1).group() as group:
        bad = group.submit(tasks.fail, ValueError)
        wait_until(bad.done)
        group.submit(tasks.note, tmp_path / "notes", 1)
    assert caught.value.exceptions == (bad.exception(0),)
    assert lines(tmp_path / "notes") == []


@on_hosts
def test_a_crash_and_a_limit_are_failures(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """The others are stopped."""
    executor = pool(2, grace=0.1)
    with pytest.raises(ExceptionGroup) as crashed, executor.group() as group:
        running = hang(group, backend, tmp_path / "notes")
        group.submit(tasks.kill_itself)
    assert running.cancelled()
    assert [type(error) for error in crashed.value.exceptions] == [taskpool.WorkerCrashedError]
    with pytest.raises(ExceptionGroup) as late, executor.options(task_timeout=0.2).group() as group:
        group.submit(tasks.sleep_for_ever)
    assert [type(error) for error in late.value.exceptions] == [taskpool.TaskTimeoutError]


@on_hosts
def test_what_cannot_be_sent_is_a_failure(pool: Pool) -> None:
    """It is one from the beginning."""
    with pytest.raises(ExceptionGroup) as caught, pool(1).group() as group:
        future = group.submit(tasks.identity, threading.Lock())
        assert isinstance(future.exception(0), taskpool.NotSendableError)
        with pytest.raises(CancelledError):
            group.submit(tasks.identity, 1)
    assert caught.value.exceptions == (future.exception(0),)


@on_all
@pytest.mark.parametrize("kind", [tasks.Falsy, tasks.Empty, tasks.NoText, SystemExit, CancelledError])
def test_odd_failures(pool: Pool, kind: type[BaseException]) -> None:
    """Whatever the exception is like, and what must not come raw comes as RemoteError."""
    with pytest.raises(ExceptionGroup) as caught, pool(1).group() as group:
        bad = group.submit(tasks.fail, kind)
    assert caught.value.exceptions[0] is bad.exception(0)
    assert type(caught.value.exceptions[0]).__name__ in (kind.__name__, "RemoteError")


@on_pools
def test_a_member_that_is_cancelled_has_not_failed(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """Queued or running: the others go on, and the block ends well."""
    executor, notes = pool(2, grace=0.1), tmp_path / "notes"
    with executor.group() as group:
        running = hang(group, backend, notes)
        held = group.submit(tasks.hold, notes, tmp_path / "release", "held")
        wait_until(lambda: len(lines(notes)) == 2)
        queued, last = group.submit(tasks.identity, 1), group.submit(tasks.identity, 2)
        assert queued.cancel()
        assert running.cancel()
        (tmp_path / "release").touch()
    assert running.cancelled()
    assert queued.cancelled()
    assert (held.result(0), last.result(0)) == ("held", 2)


@on_pools
def test_the_end_of_the_executor_ends_the_block(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """Its tasks are cancelled then, the group's among them."""
    executor = pool(1, grace=0.1)
    with at_most(STOPPED_WITHIN), executor.group() as group:
        futures = [hang(group, backend, tmp_path / "notes"), group.submit(tasks.identity, 1)]
        threading.Thread(target=executor.terminate).start()
    assert all(future.cancelled() for future in futures)


# ---------------------------------------------------------------------------------------------- the block fails


@on_pools
def test_an_error_of_the_block_stops_the_members(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """It comes in the group as theirs do."""
    executor, own = pool(1, grace=0.1), ZeroDivisionError("of the block")
    with at_most(STOPPED_WITHIN), pytest.raises(ExceptionGroup) as caught, executor.group() as group:
        futures = [hang(group, backend, tmp_path / "notes"), group.submit(tasks.identity, 1)]
        raise own
    assert "the block failed" in str(caught.value)
    assert caught.value.exceptions == (own,)
    assert all(future.cancelled() for future in futures)


@on_all
def test_errors_of_members_and_block_come_together(pool: Pool) -> None:
    """Those of the members first."""
    own = ZeroDivisionError("of the block")
    with pytest.raises(ExceptionGroup) as caught, pool(1).group() as group:
        bad = group.submit(tasks.fail, ValueError)
        wait_until(bad.done)
        raise own
    assert caught.value.exceptions == (bad.exception(0), own)


@on_all
def test_an_error_out_of_result_comes_once(pool: Pool) -> None:
    """The block that lets a member's error pass has not failed itself."""
    with pytest.raises(ExceptionGroup) as caught, pool(1).group() as group:
        bad = group.submit(tasks.fail, ValueError, "once")
        bad.result(PATIENCE)
    assert caught.value.exceptions == (bad.exception(0),)
    assert "block" not in str(caught.value)


@on_pools
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_of_the_block_goes_on_as_it_is(
    pool: Pool, backend: Backend, tmp_path: Path, kind: type[BaseException]
) -> None:
    """When it comes out, the members have been stopped."""
    executor = pool(1, grace=0.1)
    with at_most(STOPPED_WITHIN), pytest.raises(kind), executor.group() as group:
        futures = [hang(group, backend, tmp_path / "notes"), group.submit(tasks.identity, 1)]
        raise kind
    assert all(future.cancelled() for future in futures)


class Interrupt(BaseException):
    """Raised by a signal handler, as Ctrl-C is."""


@pytest.fixture
def interrupting() -> Iterator[Callable[[float], None]]:
    """Set or clear (0) the time after which a handler raises in the main thread."""

    def handler(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@on_pools
def test_an_interrupt_while_the_block_is_left(
    pool: Pool, backend: Backend, tmp_path: Path, interrupting: Callable[[float], None]
) -> None:
    """The members are stopped, and then it goes on."""
    executor = pool(1, grace=0.1)
    with at_most(STOPPED_WITHIN), pytest.raises(Interrupt), executor.group() as group:
        futures = [hang(group, backend, tmp_path / "notes"), group.submit(tasks.identity, 1)]
        interrupting(0.05)
    assert all(future.cancelled() for future in futures)


@on_one_host
def test_interrupts_at_any_moment(pool: Pool, interrupting: Callable[[float], None], full: bool) -> None:
    """Whatever a handler interrupts in `submit` and in leaving: no member is lost, and the executor is whole."""
    executor = pool(2, grace=0.1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    interrupts = 0
    for number in range(2000 if full else 300):
        futures: list[TaskFuture[Any]] = []
        try:
            with contextlib.suppress(ExceptionGroup), executor.group() as group:
                interrupting(20e-6 * (1 + number % 60))
                futures.extend(group.submit(tasks.spin_and_answer, 0.0002, number) for _ in range(2))
            interrupting(0)
        except Interrupt:
            interrupts += 1
        wait_until(lambda futures=futures: all(future.done() for future in futures))
        assert all(outcome(future) == number or future.cancelled() for future in futures)
    assert interrupts > 50
    wait_until(lambda: executor.stats().running == 0 and executor.stats().queued == 0)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_hosts
def test_an_interrupt_between_a_claim_and_its_sending(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is nobody's then: the group does not wait for it, and the worker that was to have it is replaced."""

    def interrupt(*_: object) -> None:
        raise Interrupt

    executor = pool(1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    with at_most(STOPPED_WITHIN), executor.group() as group:
        with monkeypatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr("taskpool._engine.handle.WorkerHandle.give", interrupt)
            group.submit(tasks.identity, 1)
        assert group.submit(tasks.identity, 2).result(PATIENCE) == 2


# ---------------------------------------------------------------------------------------------- timeout


@on_all
def test_its_timeout_bounds_the_block(pool: Pool) -> None:
    """What runs then is stopped, what waits never starts, and the error says how many had finished."""
    executor = pool(1, grace=0.1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    with at_most(STOPPED_WITHIN), pytest.raises(ExceptionGroup) as caught, executor.group(timeout=0.8) as group:
        done = group.submit(tasks.identity, 1)
        running = group.submit(tasks.sleep_in_steps, 3 * PATIENCE)
        group.submit(tasks.identity, 2)
    assert done.result(0) == 1
    assert running.cancelled()
    (error,) = caught.value.exceptions
    assert isinstance(error, taskpool.CallTimeoutError)
    assert (error.seconds, error.finished) == (0.8, 1)
    assert "1 of " in str(error)


@on_pools
def test_members_are_stopped_in_time_although_the_block_goes_on(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """The block learns of it where it asks a member for its result."""
    executor = pool(1, grace=0.1)
    with pytest.raises(ExceptionGroup) as caught, executor.group(timeout=0.5) as group:
        running, queued = hang(group, backend, tmp_path / "notes"), group.submit(tasks.identity, 1)
        with at_most(STOPPED_WITHIN):
            for future in (running, queued):
                assert isinstance(outcome(future), CancelledError)
        with pytest.raises(CancelledError):
            group.submit(tasks.identity, 1)
    assert [type(error) for error in caught.value.exceptions] == [taskpool.CallTimeoutError]


@on_all
def test_a_block_that_is_late_by_itself_is_late(pool: Pool) -> None:
    """Although all members had finished."""
    with pytest.raises(ExceptionGroup) as caught, pool(1).group(timeout=0.05) as group:
        group.submit(tasks.identity, 1)
        time.sleep(0.06)
    (error,) = caught.value.exceptions
    assert isinstance(error, taskpool.CallTimeoutError)


def test_only_a_timeout_costs_a_thread(pool: Pool) -> None:
    """It ends with the block, or else with the timeout."""
    executor = pool(1)
    executor.submit(tasks.identity, 1).result(PATIENCE)
    before = set(threading.enumerate())
    with executor.group() as group:
        group.submit(tasks.identity, 1).result(PATIENCE)
        assert set(threading.enumerate()) == before
    with executor.group(timeout=10 * PATIENCE) as group:
        group.submit(tasks.identity, 1).result(PATIENCE)
        (clock,) = set(threading.enumerate()) - before
    clock.join(PATIENCE)
    assert not clock.is_alive()


@pytest.mark.parametrize("timeout", [10**400, math.inf, 1e9, 10**7])
def test_a_huge_timeout_is_none(one: taskpool.Executor, timeout: float) -> None:
    """It works as if there were no limit."""
    with one.group(timeout=timeout) as group:
        future = group.submit(tasks.identity, 1)
    assert future.result(0) == 1


# ---------------------------------------------------------------------------------------------- groups in groups


@on_all
def test_an_inner_failure_that_is_caught_stays_inside(pool: Pool) -> None:
    """The outer group goes on."""
    executor = pool(2)
    with executor.group() as outer:
        first = outer.submit(tasks.identity, 1)
        with pytest.raises(ExceptionGroup), executor.group() as inner:
            inner.submit(tasks.fail, ValueError)
        second = outer.submit(tasks.identity, 2)
    assert (first.result(0), second.result(0)) == (1, 2)


@on_pools
def test_an_inner_failure_fails_the_outer_group(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """As any error of its block, and it is told apart."""
    executor = pool(2, grace=0.1)
    with at_most(STOPPED_WITHIN), pytest.raises(ExceptionGroup) as caught, executor.group(name="outer") as outer:
        running = hang(outer, backend, tmp_path / "notes")
        with executor.group(name="inner") as inner:
            bad = inner.submit(tasks.fail, ValueError)
    (group,) = caught.value.exceptions
    assert isinstance(group, ExceptionGroup)
    assert group.exceptions == (bad.exception(0),)
    assert running.cancelled()


@on_pools
def test_an_outer_failure_stops_the_inner_group(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """So the block that waits for the inner one ends; the error is that of the outer one alone."""
    executor, notes = pool(2, grace=0.1), tmp_path / "notes"
    with at_most(STOPPED_WITHIN), pytest.raises(ExceptionGroup) as caught, executor.group() as outer:
        bad = outer.submit(states.fail_behind, notes, 1, ValueError, "outer")
        with executor.group() as inner:
            running = hang(inner, backend, notes)
    assert caught.value.exceptions == (bad.exception(0),)
    assert running.cancelled()


@on_pools
def test_an_outer_timeout_bounds_the_inner_groups(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """However deep they are, and also those that begin too late."""
    executor = pool(1, grace=0.1)
    with at_most(STOPPED_WITHIN), pytest.raises(ExceptionGroup) as caught, executor.group(timeout=0.4):
        with (
            pytest.raises(CancelledError, match="'middle' was stopped"),
            executor.group(name="middle"),
            executor.group(name="inner") as inner,
        ):
            running = hang(inner, backend, tmp_path / "notes")
        with executor.group() as late:
            late.submit(tasks.identity, 1)
    assert running.cancelled()
    assert [type(error) for error in caught.value.exceptions] == [taskpool.CallTimeoutError]


@on_pools
def test_groups_side_by_side_do_not_touch_each_other(pool: Pool) -> None:
    """Neither those of other threads nor one that comes after a failed one."""
    executor, failed = pool(2), threading.Event()

    def other() -> None:
        with contextlib.suppress(ExceptionGroup), executor.group() as group:
            group.submit(tasks.fail, ValueError)
        failed.set()

    with executor.group() as group:
        thread = threading.Thread(target=other)
        thread.start()
        assert failed.wait(PATIENCE)
        assert group.submit(tasks.identity, 1).result(PATIENCE) == 1
        thread.join()
    with executor.group() as group:
        assert group.submit(tasks.identity, 2).result(PATIENCE) == 2


# ---------------------------------------------------------------------------------------------- misuse


@on_all
def test_a_group_is_used_once_and_in_its_block(pool: Pool) -> None:
    """Each mistake is a RuntimeError that says which one it is."""
    group = pool().group(name="ours")
    with pytest.raises(RuntimeError, match="'ours' takes no tasks: it has not been entered"):
        group.submit(tasks.identity, 1)
    with group:
        with pytest.raises(RuntimeError, match="has been entered before"):
            group.__enter__()
        future = group.submit(tasks.identity, 1)
    assert future.result(0) == 1
    with pytest.raises(RuntimeError, match="takes no tasks: it has been left"):
        group.submit(tasks.identity, 1)
    with pytest.raises(RuntimeError, match="has been entered before"):
        group.__enter__()
    assert "ours" in repr(group)
    assert "left" in repr(group)


@on_all
@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"timeout": math.nan}, ValueError, "timeout"),
        ({"timeout": "1"}, TypeError, "timeout"),
        ({"timeout": True}, TypeError, "timeout"),
        ({"name": 5}, TypeError, "name"),
    ],
    ids=str,
)
def test_bad_options_of_a_group_are_refused(
    pool: Pool, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """Where they are given."""
    with pytest.raises(kind, match=text):
        pool().group(**options)


@on_all
def test_a_call_that_is_refused_is_no_member(pool: Pool) -> None:
    """The block waits for nothing that was never accepted."""
    executor = pool(1)
    with executor.group() as group:
        with pytest.raises(TypeError, match="callable"):
            group.submit(5)  # type: ignore[arg-type]
        executor.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            group.submit(tasks.identity, 1)


@on_pools
def test_a_full_queue_refuses_a_member(pool: Pool, tmp_path: Path) -> None:
    """With QueueFullError, as without a group."""
    executor = pool(1, max_pending=1, submit_timeout=0.05)
    with executor.group() as group:
        held = group.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
        wait_until((tmp_path / "started").exists)
        wait_until(held.running)
        group.submit(tasks.identity, 1)
        with pytest.raises(taskpool.QueueFullError):
            group.submit(tasks.identity, 2)
        (tmp_path / "release").touch()


FORKED = """
import os, sys
import taskpool
from tests import tasks

def main():
    pool = taskpool.Executor(1)
    code = 9
    with pool.group() as group:
        future = group.submit(tasks.spin_and_answer, 0.5, "of the parent")
        if (child := os.fork()) == 0:
            try:
                with pool.group() as other:
                    other.submit(abs, -1)
            except taskpool.ForkedExecutorError:
                code = 7
    if child == 0:
        raise AssertionError("the child has left the block in silence")
    print(future.result(0), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    pool.shutdown()

try:
    main()
except taskpool.ForkedExecutorError:
    os._exit(7)
"""


def test_a_forked_child_is_told() -> None:
    """Members belong to the parent: the child that leaves the block does not wait for them."""
    ended = run_script(FORKED)
    assert (ended.code, ended.out) == (0, "of the parent 7\n"), ended.err


# ---------------------------------------------------------------------------------------------- user code that hangs


@on_hosts
def test_a_callback_that_hangs_holds_nobody_up(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """Neither the stop of the others nor the end of the block."""
    executor, notes = pool(2, grace=0.1), tmp_path / "notes"
    called, release = threading.Event(), threading.Event()

    def stuck(_: object) -> None:
        called.set()
        release.wait(3 * PATIENCE)

    executor.submit(tasks.identity, 1).add_done_callback(stuck)
    assert called.wait(PATIENCE)
    with at_most(STOPPED_WITHIN), pytest.raises(ExceptionGroup), executor.group() as group:
        running = hang(group, backend, notes)
        failing = group.submit(tasks.fail, ValueError)
        failing.add_done_callback(stuck)
        queued = group.submit(tasks.identity, 2)
        queued.add_done_callback(stuck)
        assert isinstance(outcome(running), CancelledError)
    release.set()


class HeldBackend(BackendContract):
    """A backend whose tasks end when the test says so."""

    def __init__(self) -> None:
        super().__init__("held", Setup(name="held", max_workers=1))
        self.stopped: list[TaskFuture[Any]] = []
        self.meanwhile: Callable[[], object] = lambda: None  # what happens while a call is being accepted

    def submit(self, future: TaskFuture[Any], *_: Any) -> None:
        """Take it; it begins at once."""
        future.set_running_or_notify_cancel()
        self.meanwhile()

    def stop(self, future: TaskFuture[Any]) -> None:
        """Note the wish."""
        self.stopped.append(future)

    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Each runs until it ends."""
        return not future.done()

    def run_callbacks(self, run: Callable[[], None]) -> None:
        """Run them here."""
        run()

    def close(self, *, cancel: bool) -> None:
        """There is nothing to end."""

    def terminate(self, kill_at: float) -> None:
        """There is nothing to end."""

    def join(self, timeout: float | None) -> bool:
        """There is nothing to wait for."""
        return True

    def stats(self) -> taskpool.Stats:
        """Count nothing."""
        return taskpool.Stats()


def held_group() -> tuple[HeldBackend, TaskGroup]:
    """Return a group on such a backend."""
    backend = HeldBackend()
    return backend, TaskGroup(backend, TaskOptions(grace=0.1), lambda: None)


def test_several_failures_come_in_the_order_of_submission() -> None:
    """Whatever the order in which they happened; one that ends well although it was to be stopped has its result."""
    backend, group = held_group()
    with pytest.raises(ExceptionGroup, match="3 of 4 tasks failed") as caught, group:
        futures = [group.submit(abs, number) for number in range(4)]
        errors = [ValueError(number) for number in range(4)]
        for number in (2, 0, 3):
            futures[number].finish(Failure(errors[number]))
        wait_until(lambda: futures[1] in backend.stopped)
        futures[1].finish(Value("after all"))
    assert list(caught.value.exceptions) == [errors[0], errors[2], errors[3]]
    assert futures[1].result(0) == "after all"


def test_a_failure_while_another_member_is_accepted() -> None:
    """Whoever stops the members may find that one too early, before anybody has it who could be told to stop it."""
    backend, group = held_group()

    def fail() -> None:
        futures[0].finish(Failure(ValueError()))
        wait_until(lambda: backend.stopped)
        backend.stopped.clear()

    with pytest.raises(ExceptionGroup), group:
        futures = [group.submit(abs, 1)]
        backend.meanwhile = fail
        second = group.submit(abs, 2)
        assert backend.stopped == [second]
        second.finish_cancelled()


def test_a_member_that_could_not_tell_is_found() -> None:
    """A handler that raises in the thread that resolves a future keeps it from telling: the leaving thread looks."""
    _backend, group = held_group()
    with at_most(STOPPED_WITHIN), pytest.raises(ExceptionGroup) as caught, group:
        good, bad = group.submit(abs, 1), group.submit(abs, 2)
        good._group = bad._group = None
        good.finish(Value(1))
        bad.finish(Failure(ValueError("told nobody")))
    assert caught.value.exceptions == (bad.exception(0),)


def test_what_does_not_stop_holds_an_interrupt_only_so_long() -> None:
    """Ctrl-C waits for grace and kill, and then goes on."""
    backend, group = held_group()
    with at_most(STOPPED_WITHIN), pytest.raises(KeyboardInterrupt), group:
        future = group.submit(abs, 1)
        raise KeyboardInterrupt
    assert future in backend.stopped


# ---------------------------------------------------------------------------------------------- asyncio


def run(main: Callable[[], Any]) -> Any:
    """Run a coroutine function to its end, within a bound."""

    async def limited() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await main()

    return asyncio.run(limited())


@on_all
def test_async_leaving_waits_for_all(pool: Pool) -> None:
    """Results are there behind the block, and can be awaited in it."""
    executor = pool(2)

    async def main() -> list[int]:
        async with executor.group() as group:
            futures = [group.submit(tasks.square, number) for number in range(30)]
            assert await futures[3] == 9
        return [future.result(0) for future in futures]

    assert run(main) == [number * number for number in range(30)]


@on_pools
def test_async_leaving_does_not_block_the_loop(pool: Pool, tmp_path: Path) -> None:
    """It is another task of the loop that lets the member end."""
    executor = pool(1)

    async def let_go() -> None:
        for _ in range(20):
            await asyncio.sleep(0.001)
        (tmp_path / "release").touch()

    async def main() -> Any:
        other = asyncio.create_task(let_go())
        async with executor.group() as group:
            future = group.submit(tasks.hold, tmp_path / "started", tmp_path / "release", "held")
        await other
        return future.result(0)

    assert run(main) == "held"


@on_pools
def test_async_failure_interrupts_the_block(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """What it awaits is cancelled, the others are stopped, and the task that runs the block is none the worse."""
    executor = pool(2, grace=0.1)

    async def main() -> None:
        running = None
        with pytest.raises(ExceptionGroup) as caught:
            async with executor.group() as group:
                running = group.submit(tasks.note_then, tmp_path / "notes", "hangs", *hanging(backend))
                failing = group.submit(states.fail_behind, tmp_path / "notes", 1, ValueError)
                await asyncio.Event().wait()
        assert caught.value.exceptions == (failing.exception(0),)
        assert running is not None
        assert running.cancelled()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)

    with at_most(STOPPED_WITHIN):
        run(main)


@on_all
def test_async_errors_out_of_await_come_once(pool: Pool) -> None:
    """The member's own exception, whether the block awaits it or not."""
    executor = pool(1)

    async def main() -> None:
        for wait in (True, False):
            with pytest.raises(ExceptionGroup) as caught:
                async with executor.group() as group:
                    bad = group.submit(tasks.fail, ValueError)
                    if wait:
                        await bad
            assert caught.value.exceptions == (bad.exception(0),)

    run(main)


@on_pools
def test_async_block_sees_stopped_members_as_cancelled(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """The block may catch that; what comes out is the failure."""
    executor = pool(2, grace=0.1)

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with executor.group() as group:
                running = group.submit(tasks.note_then, tmp_path / "notes", "hangs", *hanging(backend))
                failing = group.submit(states.fail_behind, tmp_path / "notes", 1, ValueError)
                with pytest.raises(asyncio.CancelledError):
                    await running
                group.submit(tasks.identity, 1)
        assert caught.value.exceptions == (failing.exception(0),)

    with at_most(STOPPED_WITHIN):
        run(main)


@on_pools
def test_async_error_of_the_block(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """It stops the members and comes out in the group."""
    executor, own = pool(1, grace=0.1), ZeroDivisionError()

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with executor.group() as group:
                running, queued = hang(group, backend, tmp_path / "notes"), group.submit(tasks.identity, 1)
                raise own
        assert caught.value.exceptions == (own,)
        assert running.cancelled()
        assert queued.cancelled()

    with at_most(STOPPED_WITHIN):
        run(main)


@on_pools
@pytest.mark.parametrize("waits", ["in the block", "while leaving"])
def test_async_timeout(pool: Pool, backend: Backend, tmp_path: Path, waits: str) -> None:
    """It interrupts the block as well."""
    executor = pool(1, grace=0.1)

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with executor.group(timeout=0.4) as group:
                running = hang(group, backend, tmp_path / "notes")
                if waits == "in the block":
                    await asyncio.Event().wait()
        assert [type(error) for error in caught.value.exceptions] == [taskpool.CallTimeoutError]
        assert running.cancelled()

    with at_most(STOPPED_WITHIN):
        run(main)


@on_pools
@pytest.mark.parametrize("waits", ["in the block", "for a member", "while leaving"])
def test_async_cancellation_from_outside(pool: Pool, backend: Backend, tmp_path: Path, waits: str) -> None:
    """The members are stopped, also if it comes again and again meanwhile, and then it goes on as it is."""
    executor = pool(1, grace=0.1)
    futures: list[TaskFuture[Any]] = []

    async def block() -> None:
        async with executor.group() as group:
            futures.extend([hang(group, backend, tmp_path / "notes"), group.submit(tasks.identity, 1)])
            if waits == "in the block":
                await asyncio.Event().wait()
            if waits == "for a member":
                await futures[0]

    async def main() -> None:
        task = asyncio.create_task(block())
        await asyncio.sleep(0)  # up to where it waits
        assert len(futures) == 2
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.002)
        assert task.cancelled()
        assert all(future.cancelled() for future in futures)

    with at_most(STOPPED_WITHIN):
        run(main)


@on_pools
def test_async_a_timeout_of_asyncio_around_it(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """It ends the block and remains what it is."""
    executor = pool(1, grace=0.1)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), executor.group() as group:
                futures.append(hang(group, backend, tmp_path / "notes"))
        assert futures[0].cancelled()
        await asyncio.sleep(0)

    futures: list[TaskFuture[Any]] = []
    with at_most(STOPPED_WITHIN):
        run(main)


@on_pools
def test_async_groups_in_groups(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """The outer one's failure interrupts the block, and with it the inner one."""
    executor = pool(2, grace=0.1)

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with executor.group() as outer:
                bad = outer.submit(states.fail_behind, tmp_path / "notes", 1, ValueError)
                async with executor.group() as inner:
                    running = hang(inner, backend, tmp_path / "notes")
        assert caught.value.exceptions == (bad.exception(0),)
        assert running.cancelled()

    with at_most(STOPPED_WITHIN):
        run(main)


@on_pools
def test_async_in_a_scope_of_anyio(pool: Pool, backend: Backend, tmp_path: Path) -> None:
    """A scope cancels again and again until its block is left: the members are awaited all the same."""
    executor = pool(1, grace=0.1)
    futures: list[TaskFuture[Any]] = []

    async def main() -> None:
        with anyio.move_on_after(0.3) as scope:
            async with executor.group() as group:
                futures.append(hang(group, backend, tmp_path / "notes"))
        assert scope.cancelled_caught
        assert futures[-1].cancelled()
        with pytest.raises(ExceptionGroup) as caught:
            async with executor.group() as group:
                bad = group.submit(tasks.fail, ValueError)
                await anyio.sleep_forever()
        assert caught.value.exceptions == (bad.exception(0),)

    with at_most(STOPPED_WITHIN):
        anyio.run(main)


def test_async_misuse(one: taskpool.Executor) -> None:
    """A group needs a task of asyncio, and is entered once."""
    with pytest.raises(RuntimeError):
        one.group().__aenter__().send(None)

    async def main() -> None:
        async with one.group() as group:
            with pytest.raises(RuntimeError, match="entered before"):
                await group.__aenter__()
        with pytest.raises(RuntimeError, match="entered before"):
            await group.__aenter__()

    run(main)


@on_hosts
@pytest.mark.parametrize("waits", ["in the block", "while leaving"])
@pytest.mark.parametrize("what", ["the coroutine", "the loop"])
def test_async_what_runs_the_block_is_closed(
    pool: Pool, backend: Backend, tmp_path: Path, what: str, waits: str
) -> None:
    """The members are stopped: by the block itself where its coroutine is closed, and as soon as the loop is."""
    executor = pool(1, grace=0.1)
    futures: list[TaskFuture[Any]] = []

    async def block() -> None:
        async with executor.group() as group:
            futures.append(hang(group, backend, tmp_path / "notes"))
            if waits == "in the block":
                await asyncio.Event().wait()

    loop, coroutine = asyncio.new_event_loop(), block()
    task = loop.create_task(coroutine)
    loop.run_until_complete(asyncio.sleep(0.01))
    assert not futures[0].done()
    with at_most(STOPPED_WITHIN):
        if what == "the coroutine":
            coroutine.close()
            assert futures[0].cancelled()
        loop.close()
        assert isinstance(outcome(futures[0]), CancelledError)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine.close()


@on_one_host
def test_async_a_failure_among_many(pool: Pool, tmp_path: Path) -> None:
    """Thousands that wait are cancelled, and none of them starts."""
    executor = pool(1)

    async def main() -> None:
        with pytest.raises(ExceptionGroup, match="1 of 5001 tasks failed"):
            async with executor.group() as group:
                group.submit(states.fail_behind, tmp_path / "notes", 1, ValueError)
                others = [group.submit(tasks.note, tmp_path / "never", number) for number in range(5000)]
                tasks.note(tmp_path / "notes", "now")
                await asyncio.Event().wait()
        assert all(future.cancelled() for future in others)
        assert lines(tmp_path / "never") == []

    run(main)
