"""A worker that dies at any moment costs at most the task that it ran; a bad object costs its own task."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import processes, tasks
from tests.helpers import (
    PATIENCE,
    Backend,
    at_most,
    bounded,
    lines,
    on_every_host,
    on_hosts,
    on_one_host,
    outcome,
    wait_until,
)

Pool = Callable[..., taskpool.Executor]

DEATHS = {
    "SIGKILL": (tasks.kill_itself, -signal.SIGKILL),
    "SIGSEGV": (tasks.segfault, -signal.SIGSEGV),
    "SIGABRT": (tasks.abort, -signal.SIGABRT),
    "SIGTERM": (tasks.terminate_itself, -signal.SIGTERM),
    "exit 0": (tasks.exit_quietly, 0),
    "exit 0 in C": (tasks.exit_in_c, 0),
    "exec": (tasks.exec_program, 0),
    "closed descriptors": (tasks.close_everything, None),
}
deaths = pytest.mark.parametrize("death", DEATHS)


@pytest.fixture(autouse=True)
def _who_reaps(backend: Backend) -> None:
    """Note whether the exit code is ours to read: in a Pool and a ProcessPoolExecutor their own thread may take it."""
    _assert_crashed.reads_code = backend.options.get("backend", "process") == "process"  # type: ignore[attr-defined]


def _assert_crashed(error: object, exitcode: int | None = None) -> None:
    assert isinstance(error, taskpool.WorkerCrashedError), error
    assert isinstance(error, BrokenProcessPool)
    if exitcode is not None and (error.exitcode is not None or _assert_crashed.reads_code):  # type: ignore[attr-defined]
        assert error.exitcode == exitcode
        assert error.signal == (signal.Signals(-exitcode).name if exitcode < 0 else None)
    assert error.pid
    wait_until(lambda: not processes.alive(error.pid), 2)


# ---------------------------------------------------------------------------------------------- in the task


@pytest.mark.core
@on_hosts
@deaths
def test_a_death_in_the_task_costs_that_task(pool: Pool, backend: Backend, death: str) -> None:
    """All others are right, whether they were queued before it or behind it, and the pool goes on."""
    task, exitcode = DEATHS[death]
    if death == "exec" and backend.name == "futures":
        exitcode = None  # a ProcessPoolExecutor takes it for dead, and ends the new program by SIGTERM
    executor = pool(2)
    before = [executor.submit(tasks.square, n) for n in range(10)]
    doomed = executor.submit(task)
    behind = [executor.submit(tasks.square, n) for n in range(10)]
    _assert_crashed(outcome(doomed), exitcode)
    for futures in (before, behind):
        assert [future.result(PATIENCE) for future in futures] == [n * n for n in range(10)]
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert executor.stats().crashed == 1


@on_hosts
def test_a_segfault_leaves_its_stack(pool: Pool) -> None:
    """The error shows where it was, and says what happened."""
    error = outcome(pool(1).submit(tasks.segfault))
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert "segfault" in (error.stack or "")
    assert "SIGSEGV" in str(error)


@on_every_host
def test_deaths_in_a_row_under_every_start_method(pool: Pool, tmp_path: Path) -> None:
    """One worker after the other dies; the queue is served to its end, in order, each task once."""
    executor = pool(1)
    futures = [executor.submit(tasks.die_at, n if n % 4 == 1 else None, tmp_path / "notes", n) for n in range(20)]
    for number, future in enumerate(futures):
        if number % 4 == 1:
            _assert_crashed(outcome(future), -signal.SIGKILL)
        else:
            assert future.result(PATIENCE) == number
    assert lines(tmp_path / "notes") == [str(number) for number in range(20)]


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("workers", [1, 3])
def test_the_queue_survives_and_nothing_runs_twice(pool: Pool, tmp_path: Path, workers: int) -> None:
    """Hundreds of quick tasks wait; a tenth of them kill their worker."""
    executor = pool(workers)
    futures = [executor.submit(tasks.die_at, n if n % 10 == 7 else None, tmp_path / "notes", n) for n in range(300)]
    for number, future in enumerate(futures):
        got = outcome(future)
        assert got == number or (number % 10 == 7 and isinstance(got, taskpool.WorkerCrashedError))
    noted = [int(line) for line in lines(tmp_path / "notes")]
    assert Counter(noted) == Counter(range(300))
    if workers == 1:
        assert noted == sorted(noted)


@on_hosts
def test_each_crash_has_an_error_of_its_own(pool: Pool) -> None:
    """Two futures never share an exception object."""
    executor = pool(2)
    first, second = (outcome(executor.submit(tasks.kill_itself)) for _ in range(2))
    assert first is not second


@on_hosts
def test_all_workers_die_at_once(pool: Pool) -> None:
    """Also when each kills its neighbours first."""
    executor = pool(4)
    for _ in range(5):
        pids = {future.result(PATIENCE) for future in [executor.submit(tasks.pid_after, 0.02) for _ in range(12)]}
        for future in [executor.submit(tasks.kill_others, sorted(pids)) for _ in range(4)]:
            got = outcome(future)
            assert got == "survived" or isinstance(got, taskpool.WorkerCrashedError)
        assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_hosts
def test_a_child_that_holds_the_pipes_hides_no_death(pool: Pool, tmp_path: Path) -> None:
    """The crash is seen at once, though a grandchild keeps every descriptor of the dead worker open."""
    executor = pool(1)
    with at_most(3, "noticing the crash"):
        _assert_crashed(outcome(executor.submit(tasks.fork_and_die, tmp_path / "children")), -signal.SIGKILL)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    (child,) = map(int, lines(tmp_path / "children"))
    wait_until(lambda: not processes.alive(child), 2, "the end of the dead worker's child")


@on_hosts
def test_a_child_that_returns_speaks_for_nobody(pool: Pool, tmp_path: Path) -> None:
    """A task that forks and returns in both processes resolves once, with the worker's own answer."""
    executor = pool(1)
    assert executor.submit(tasks.fork_and_return, tmp_path / "children").result(PATIENCE) == "parent"
    assert [executor.submit(tasks.identity, n).result(PATIENCE) for n in range(5)] == list(range(5))
    (child,) = map(int, lines(tmp_path / "children"))
    wait_until(lambda: not processes.alive(child), 2, "the end of the forked child")


# ---------------------------------------------------------------------------------------------- at other moments


@pytest.mark.core
@on_every_host
def test_the_death_of_an_idle_worker_is_invisible(pool: Pool) -> None:
    """Again and again, of one or of all."""
    executor = pool(2)
    for _ in range(4):
        pids = {future.result(PATIENCE) for future in [executor.submit(tasks.pid_after, 0.01) for _ in range(4)]}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda pids=pids: not any(map(processes.alive, pids)))
        assert [executor.submit(tasks.square, n).result(PATIENCE) for n in range(3)] == [0, 1, 4]
    assert executor.stats().crashed == 0


@on_hosts
def test_a_task_handed_to_a_dying_worker_is_not_lost(pool: Pool) -> None:
    """Submitted right behind the kill: it had not begun, so it runs elsewhere."""
    executor = pool(1)
    for number in range(25):
        os.kill(executor.submit(tasks.pid).result(PATIENCE), signal.SIGKILL)
        assert executor.submit(tasks.square, number).result(PATIENCE) == number * number


@on_hosts
def test_a_task_handed_to_a_frozen_worker_that_dies_is_not_lost(pool: Pool) -> None:
    """It lies in the worker's pipe, unread, when the worker ends."""
    executor = pool(1)
    pid = executor.submit(tasks.pid).result(PATIENCE)
    os.kill(pid, signal.SIGSTOP)
    futures = [executor.submit(tasks.square, number) for number in range(20)]
    os.kill(pid, signal.SIGKILL)
    assert [future.result(PATIENCE) for future in futures] == [number * number for number in range(20)]


@on_hosts
def test_a_large_argument_on_its_way_to_a_dying_worker_is_not_lost(pool: Pool) -> None:
    """Half of 6 MB are in the pipe when the worker ends."""
    executor = pool(1)
    value = tasks.payload(6_000_000)
    for _ in range(5):
        pid = executor.submit(tasks.pid).result(PATIENCE)
        os.kill(pid, signal.SIGSTOP)
        future = executor.submit(len, value)
        other = executor.submit(tasks.identity, 1)
        os.kill(pid, signal.SIGKILL)
        assert future.result(PATIENCE) == len(value)
        assert other.result(PATIENCE) == 1


@on_hosts
def test_a_frozen_worker_blocks_no_caller(pool: Pool) -> None:
    """`submit` returns though nobody reads what it sends, and other workers get their work."""
    executor = pool(2)
    pids = {future.result(PATIENCE) for future in [executor.submit(tasks.pid_after, 0.02) for _ in range(6)]}
    frozen = min(pids)
    os.kill(frozen, signal.SIGSTOP)
    with at_most(3, "submitting"):
        large = [executor.submit(len, tasks.payload(3_000_000)) for _ in range(4)]
        small = [executor.submit(tasks.square, n) for n in range(100)]
    done, pending = concurrent.futures.wait([*large, *small], 1.0)
    assert len(pending) <= 104 - len(done)
    os.kill(frozen, signal.SIGKILL)
    assert [future.result(PATIENCE) for future in large] == [3_000_000] * 4
    assert [future.result(PATIENCE) for future in small] == [n * n for n in range(100)]


@on_hosts
def test_a_death_at_unpickling_the_arguments(pool: Pool) -> None:
    """It costs that task."""
    executor = pool(1)
    _assert_crashed(outcome(executor.submit(tasks.identity, tasks.DiesAtLoad())), -signal.SIGKILL)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_hosts
def test_a_death_at_pickling_the_result(pool: Pool) -> None:
    """It costs that task."""
    executor = pool(1)
    _assert_crashed(outcome(executor.submit(tasks.die_at_dump)), -signal.SIGKILL)
    _assert_crashed(outcome(executor.submit(tasks.fail, tasks.DiesAtDump)), -signal.SIGKILL)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@pytest.mark.core
@on_hosts
def test_a_death_with_half_a_result_written(pool: Pool) -> None:
    """Nobody waits for the other half."""
    executor = pool(2)
    doomed = executor.submit(tasks.die_in_mid_write, 8_000_000)
    others = [executor.submit(tasks.payload, 300_000) for _ in range(6)]
    _assert_crashed(outcome(doomed), -signal.SIGKILL)
    assert [future.result(PATIENCE) for future in others] == [tasks.payload(300_000)] * 6


@on_hosts
def test_a_result_that_is_lost_costs_its_task_alone(pool: Pool, tmp_path: Path) -> None:
    """A worker that waits for work and has not written an outcome has run its task: that fails, and is not run again."""
    executor = pool(1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    _assert_crashed(outcome(executor.submit(tasks.lose_the_outcome, tmp_path / "notes")))
    assert len(lines(tmp_path / "notes")) == 1
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_hosts
def test_deaths_somewhere_in_the_writing_of_8_megabytes(pool: Pool) -> None:
    """Either the whole result arrives or none of it."""
    executor = pool(2)
    chance = random.Random(5)
    counts: Counter[str] = Counter()
    for _ in range(25):
        doomed = executor.submit(tasks.die_later, chance.uniform(0, 0.02), 8_000_000)
        other = executor.submit(tasks.square, 3)
        got = outcome(doomed)
        if isinstance(got, bytes):
            assert got == tasks.payload(8_000_000)
            counts["arrived"] += 1
        else:
            _assert_crashed(got, -signal.SIGKILL)
            counts["crashed"] += 1
        assert other.result(PATIENCE) == 9
    assert counts["crashed"] > 0


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("size", [10, 30_000])
def test_a_written_result_counts(pool: Pool, tmp_path: Path, size: int) -> None:
    """The worker writes, and dies before anybody reads: the result is delivered."""
    executor = pool(1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    value = tasks.payload(size)
    future = executor.submit(tasks.note_and_die_after_return, tmp_path / "notes", 0.1, 0.1, value)
    pid = int(wait_until(lambda: lines(tmp_path / "notes"))[0])
    ctypes.PyDLL(None).usleep(600_000)  # no thread of this process runs meanwhile
    assert not processes.alive(pid)
    assert future.result(PATIENCE) == value
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert executor.stats().crashed == 0


@on_hosts
def test_a_death_after_the_result(pool: Pool, tmp_path: Path) -> None:
    """Of an idle worker, for a reason that the last task left behind."""
    executor = pool(1)
    for number in range(5):
        release = tmp_path / f"release{number}"
        assert executor.submit(tasks.die_when, release, number).result(PATIENCE) == number
        pid = executor.submit(tasks.pid).result(PATIENCE)
        release.touch()
        wait_until(lambda pid=pid: not processes.alive(pid))
        assert executor.submit(tasks.identity, number).result(PATIENCE) == number


@on_hosts
def test_what_a_task_leaves_behind_harms_no_other(pool: Pool) -> None:
    """An armed timer, changed signal handlers, a thread that never ends."""
    executor = pool(1, grace=0.2)
    assert executor.submit(tasks.leave_an_alarm, 0.1).result(PATIENCE) == "done"
    assert executor.submit(tasks.spin, 0.3).result(PATIENCE) is None
    assert executor.submit(tasks.leave_a_mess).result(PATIENCE) == "done"
    stuck = executor.options(task_timeout=0.2).submit(tasks.sleep_for_ever)
    assert isinstance(outcome(stuck), taskpool.TaskTimeoutError)
    assert executor.submit(tasks.exit_thread_left_behind).result(PATIENCE) == "done"
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    with at_most(5):
        bounded(lambda: executor.shutdown(timeout=4))


# ---------------------------------------------------------------------------------------------- in a map


@on_hosts
@pytest.mark.parametrize("chunksize", [None, 1, 4, 10])
def test_a_death_in_a_chunk_costs_one_item(pool: Pool, tmp_path: Path, chunksize: int | None) -> None:
    """Items 0 to 6 keep their results, 8 to 19 run, and the item that died did not run again."""
    notes = tmp_path / "notes"
    executor = pool(1)
    results = executor.map(tasks.die_slowly_at, [7] * 20, [notes] * 20, range(20), chunksize=chunksize)
    wait_until(lambda: len(lines(notes)) >= 20)  # all are tried, though nobody asks for a result yet
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(taskpool.WorkerCrashedError):
        next(results)
    bounded(lambda: executor.shutdown(timeout=PATIENCE / 2))
    assert lines(notes) == [str(number) for number in range(20)]


@on_hosts
def test_quick_items_that_run_twice_are_counted(pool: Pool, tmp_path: Path) -> None:
    """Only items of microseconds, right before the death, whose results were not written yet; never the fatal one."""
    notes = tmp_path / "notes"
    executor = pool(1)
    results = executor.map(tasks.die_at, [60] * 100, [notes] * 100, range(100), chunksize=100)
    wait_until(lambda: lines(notes)[-1:] == ["99"])
    assert [next(results) for _ in range(60)] == list(range(60))
    with pytest.raises(taskpool.WorkerCrashedError):
        next(results)
    counts = Counter(map(int, lines(notes)))
    assert set(counts) == set(range(100))
    assert counts[60] == 1
    twice = [number for number, count in counts.items() if count == 2]
    assert twice == list(range(60 - len(twice), 60))
    assert counts.total() == 100 + len(twice) == 100 + executor.stats().rerun


@on_hosts
def test_with_a_chunksize_of_1_no_item_runs_twice(pool: Pool, tmp_path: Path) -> None:
    """However fast the items are."""
    notes = tmp_path / "notes"
    executor = pool(2)
    results = executor.map(tasks.die_at, [50] * 100, [notes] * 100, range(100), chunksize=1)
    wait_until(lambda: len(lines(notes)) >= 100)
    assert [next(results) for _ in range(50)] == list(range(50))
    with pytest.raises(taskpool.WorkerCrashedError):
        next(results)
    bounded(lambda: executor.shutdown(timeout=PATIENCE / 2))
    assert Counter(map(int, lines(notes))) == Counter(range(100))


# ---------------------------------------------------------------------------------------------- exceptions


@on_hosts
def test_exceptions_that_refuse_changes_arrive_as_themselves(pool: Pool) -> None:
    """Frozen dataclasses are common; what is set on their way back does not go by their own `__setattr__`."""
    executor = pool(1)
    frozen = outcome(executor.submit(tasks.fail, tasks.Frozen, "ice"))
    assert type(frozen) is tasks.Frozen
    assert frozen.text == "ice"
    assert type(outcome(executor.submit(tasks.fail, tasks.Refusing, "no"))) is tasks.Refusing


@on_hosts
@pytest.mark.parametrize("odd", ["text", "name"])
def test_exceptions_that_harm_their_encoding_cost_one_task(pool: Pool, odd: str) -> None:
    """Whatever is wrong with their text or their class, they arrive, and the worker serves on."""
    executor = pool(1)
    assert isinstance(outcome(executor.submit(tasks.fail_oddly, odd)), (tasks.HasOddText, taskpool.RemoteError))
    assert executor.submit(tasks.identity, 5).result(PATIENCE) == 5


@pytest.mark.core
@on_hosts
def test_exceptions_with_required_arguments_arrive_as_themselves(pool: Pool) -> None:
    """Rebuilt without a call of `__init__`, with all their attributes."""
    executor = pool(2)
    others = [executor.submit(tasks.square, n) for n in range(4)]
    error = outcome(executor.submit(tasks.fail, tasks.TwoArguments, 7, "seven"))
    assert type(error) is tasks.TwoArguments
    assert (error.code, error.reason, str(error), error.args) == (7, "seven", "7: seven", ("7: seven",))
    slotted = outcome(executor.submit(tasks.fail, tasks.Slotted, "detail"))
    assert type(slotted) is tasks.Slotted
    assert slotted.args == ("detail", 6)
    assert slotted.detail == "detail"
    keyword = outcome(executor.submit(tasks.fail_with_keyword))
    assert type(keyword) is tasks.KeywordOnly
    assert keyword.reason == "why"
    assert [future.result(PATIENCE) for future in others] == [0, 1, 4, 9]


@on_hosts
@pytest.mark.parametrize("kind", [tasks.Falsy, tasks.Empty])
def test_a_falsy_exception_is_an_exception(pool: Pool, kind: type[Exception]) -> None:
    """And not the result None."""
    future = pool(1).submit(tasks.fail, kind, "text")
    with pytest.raises(kind) as caught:
        future.result(PATIENCE)
    assert type(caught.value) is kind
    assert future.exception() is caught.value


@on_hosts
@pytest.mark.parametrize(
    "kind", [tasks.RaisesAtDump, tasks.RaisesAtLoad, tasks.UnpicklableNoText], ids=lambda k: k.__name__
)
def test_an_exception_that_cannot_travel_as_it_is(pool: Pool, kind: type[Exception]) -> None:
    """Arrives as itself or as a RemoteError that names it; the worker lives, and so do its tasks."""
    executor = pool(1)
    pid = executor.submit(tasks.pid).result(PATIENCE)
    error = outcome(executor.submit(tasks.fail, kind, "text"))
    if type(error) is not kind:
        assert isinstance(error, taskpool.RemoteError)
        assert error.type_name == f"tests.tasks.{kind.__name__}"
        assert "in fail" in error.traceback
        assert kind is tasks.UnpicklableNoText or error.message == "text"
    assert executor.submit(tasks.pid).result(PATIENCE) == pid


@on_hosts
def test_an_attribute_that_cannot_travel_is_left_out(pool: Pool) -> None:
    """The exception itself arrives."""
    error = outcome(pool(1).submit(tasks.fail, tasks.CarriesLock, "text"))
    assert isinstance(error, tasks.CarriesLock | taskpool.RemoteError)
    assert "text" in str(error)
    assert "in fail" in str(error.__cause__)


@on_hosts
def test_an_exception_of_a_local_class_arrives(pool: Pool) -> None:
    """By value, or by name."""
    error = outcome(pool(1).submit(tasks.fail_locally))
    assert type(error).__name__ == "Local" or "Local" in getattr(error, "type_name", "")
    assert "from a function" in str(error)


@on_hosts
def test_an_exception_without_a_text_arrives(pool: Pool) -> None:
    """Though neither `str` nor `repr` of it works."""
    executor = pool(1)
    error = outcome(executor.submit(tasks.fail, tasks.NoText, "hidden"))
    assert type(error) is tasks.NoText or isinstance(error, taskpool.RemoteError)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@pytest.mark.core
@on_hosts
def test_causes_contexts_and_notes_arrive(pool: Pool) -> None:
    """The remote traceback is the cause, and its own cause is the original one."""
    executor = pool(1)
    third = outcome(executor.submit(tasks.fail_with_cause))
    assert type(third) is ValueError
    assert type(third.__cause__) is _RemoteTraceback
    assert "direct cause" in str(third.__cause__)
    second = third.__cause__.__cause__
    assert type(second) is tasks.TwoArguments
    assert type(second.__cause__) is KeyError
    assert second.__cause__.args == ("first",)
    noted = outcome(executor.submit(tasks.fail_with_notes))
    assert noted.__notes__ == ["first note", "second note"]
    assert "second note" in str(noted.__cause__)
    context = outcome(executor.submit(tasks.fail_with_context, False))
    assert type(context.__context__) is KeyError
    suppressed = outcome(executor.submit(tasks.fail_with_context, True))
    assert suppressed.__suppress_context__


@on_hosts
def test_exception_groups_arrive_with_their_members(pool: Pool) -> None:
    """Also those whose members cannot be rebuilt by a call."""
    error = outcome(pool(1).submit(tasks.fail_with_group))
    assert type(error) is ExceptionGroup
    assert error.message == "outer"
    first, inner = error.exceptions
    assert type(first) is tasks.TwoArguments
    assert first.code == 1
    assert type(inner) is ExceptionGroup
    assert [type(member) for member in inner.exceptions] == [ValueError, KeyError]


@on_hosts
def test_a_group_with_an_interrupt_does_not_interrupt_the_caller(pool: Pool) -> None:
    """`except Exception` catches whatever comes of it."""
    error = outcome(pool(1).submit(tasks.fail_with_base_group))
    assert isinstance(error, Exception)
    assert "stop" in str(error.__cause__)


@on_hosts
def test_chains_without_end_and_texts_of_megabytes_arrive(pool: Pool) -> None:
    """Neither blocks nor breaks anything."""
    executor = pool(1)
    error = outcome(executor.submit(tasks.fail_in_a_circle))
    assert (type(error), error.args) == (ValueError, ("first",))
    huge = outcome(executor.submit(tasks.fail_with_huge_text))
    assert type(huge) is ValueError
    assert len(str(huge)) == 5_000_000


# ---------------------------------------------------------------------------------------------- objects


@on_hosts
@pytest.mark.parametrize(
    "make",
    [tasks.BadRepr, tasks.generator, threading.Lock, tasks.FailsAtDump, tasks.make_hostile_dump],
    ids=["bad repr", "generator", "lock", "raises", "exits"],
)
def test_a_result_that_cannot_be_pickled_costs_its_task(pool: Pool, make: Callable[[], Any]) -> None:
    """The error names the result; the worker lives."""
    executor = pool(1)
    pid = executor.submit(tasks.pid).result(PATIENCE)
    error = outcome(executor.submit(make))
    assert isinstance(error, taskpool.NotSendableError)
    assert "result" in str(error)
    assert executor.submit(tasks.pid).result(PATIENCE) == pid


@on_hosts
def test_deep_nesting_costs_its_task_at_most(pool: Pool) -> None:
    """A list in a list fifty thousand times, as result and as argument."""
    executor = pool(1)
    assert isinstance(outcome(executor.submit(tasks.deep)), list | taskpool.TaskPoolError)
    assert isinstance(outcome(executor.submit(tasks.identity, tasks.deep())), list | taskpool.TaskPoolError)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("kind", [ValueError, SystemExit, MemoryError, StopIteration])
def test_a_result_that_fails_to_unpickle_harms_its_waiter_alone(pool: Pool, kind: type[BaseException]) -> None:
    """Whatever it raises."""
    executor = pool(2)
    others = [executor.submit(tasks.square, n) for n in range(4)]
    error = outcome(executor.submit(tasks.make, tasks.FailsAtLoad, kind))
    assert isinstance(error, taskpool.UnpickleError)
    assert isinstance(error, taskpool.NotSendableError)
    assert isinstance(error, BrokenProcessPool)
    assert "I never arrive" in str(error)
    assert [future.result(PATIENCE) for future in others] == [0, 1, 4, 9]
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_hosts
@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, StopIteration])
def test_an_argument_that_fails_to_unpickle_harms_its_task_alone(pool: Pool, kind: type[BaseException]) -> None:
    """And no worker."""
    executor = pool(1)
    pid = executor.submit(tasks.pid).result(PATIENCE)
    error = outcome(executor.submit(tasks.identity, tasks.FailsAtLoad(kind)))
    assert isinstance(error, taskpool.UnpickleError)
    assert "I never arrive" in str(error)
    assert executor.submit(tasks.pid).result(PATIENCE) == pid


@on_hosts
@pytest.mark.parametrize("kind", [ValueError, RecursionError, SystemExit, KeyboardInterrupt])
def test_an_argument_that_fails_to_pickle_harms_its_task_alone(pool: Pool, kind: type[BaseException]) -> None:
    """The future carries the error; `submit` itself does not raise, but for an interruption of the caller."""
    executor = pool(1)
    try:
        error = outcome(executor.submit(tasks.identity, tasks.FailsAtDump(kind)))
    except (SystemExit, KeyboardInterrupt) as raised:
        assert type(raised) is kind
    else:
        assert isinstance(error, taskpool.NotSendableError)
        assert "argument" in str(error)
    named = outcome(executor.submit(tasks.keywords, good=1, bad=threading.Lock()))
    assert isinstance(named, taskpool.NotSendableError)
    assert "bad" in str(named)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_one_host
@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_item_that_cannot_be_pickled_again_costs_no_other(pool: Pool, kind: type[BaseException]) -> None:
    """Items that cannot be unpickled together are pickled singly, where whatever it raises is the item's own outcome."""
    items = [0, tasks.FailsAtLoad(), tasks.PicklesOnce(tasks.fail, kind, "I stay here"), 3]
    got = list(pool(1).outcomes(tasks.identity, items, ordered=True, chunksize=4))
    assert [each.value for each in got if each.ok] == [0, 3]
    assert isinstance(got[1].error, taskpool.UnpickleError)
    assert isinstance(got[2].error, taskpool.NotSendableError)
    assert "item 2" in str(got[2].error)
    assert isinstance(got[2].error.__cause__, kind)


@on_one_host
def test_an_item_that_never_pickles_again_does_not_delay_the_end(pool: Pool) -> None:
    """`terminate` cancels it."""
    executor, pickling, release = pool(1), threading.Event(), threading.Event()
    hanging = tasks.PicklesOnce(lambda: (pickling.set(), release.wait(PATIENCE)))
    results = executor.map(tasks.identity, [0, tasks.FailsAtLoad(), hanging], chunksize=3)
    try:
        assert pickling.wait(PATIENCE)
        with at_most(5):
            bounded(lambda: executor.terminate(timeout=2))
        with pytest.raises(concurrent.futures.CancelledError):
            bounded(lambda: list(results))
    finally:
        release.set()


@on_hosts
def test_a_slow_unpickling_delays_its_waiter_alone(pool: Pool, tmp_path: Path) -> None:
    """Other results, deadlines and crashes are dealt with meanwhile."""
    executor = pool(2, grace=0.1)
    slow = executor.submit(tasks.make, tasks.LoadsWhen, tmp_path / "loading", tmp_path / "release")
    waiter = threading.Thread(target=slow.result, args=(PATIENCE,))
    waiter.start()
    wait_until((tmp_path / "loading").exists)
    assert executor.submit(tasks.square, 3).result(PATIENCE) == 9
    assert isinstance(outcome(executor.submit(tasks.kill_itself)), taskpool.WorkerCrashedError)
    limited = executor.options(task_timeout=0.1).submit(tasks.sleep_for_ever)
    assert isinstance(outcome(limited), taskpool.TaskTimeoutError)
    assert waiter.is_alive()
    (tmp_path / "release").touch()
    waiter.join(PATIENCE)
    assert slow.result(0) == "late"


@on_hosts
def test_objects_that_act_when_collected_harm_their_task_at_most(pool: Pool) -> None:
    """An argument or a result whose `__del__` ends or disturbs the worker."""
    executor = pool(1)
    for call in ((tasks.identity, tasks.ExitsAtDel()), (tasks.make, tasks.ExitsAtDelAwayFrom, os.getpid())):
        got = outcome(executor.submit(*call))
        assert isinstance(got, tasks.ExitsAtDel | taskpool.WorkerCrashedError)
        assert [executor.submit(tasks.identity, n).result(PATIENCE) for n in range(5)] == list(range(5))
    assert executor.submit(tasks.drop_what_raises_at_del).result(PATIENCE) == "dropped"
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


# ---------------------------------------------------------------------------------------------- callbacks


@on_hosts
@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_anything_harms_nobody(pool: Pool, kind: type[BaseException]) -> None:
    """The next callback is called, and the pool works."""
    executor = pool(1)
    called = threading.Event()

    def bad(_: Future[Any]) -> None:
        raise kind("from a callback")

    future = executor.submit(tasks.identity, 1)
    future.add_done_callback(bad)
    future.add_done_callback(lambda _: called.set())
    assert called.wait(PATIENCE)
    assert future.result(PATIENCE) == 1
    assert executor.submit(tasks.identity, 2).result(PATIENCE) == 2


@on_hosts
def test_a_callback_that_hangs_stops_no_task(pool: Pool, tmp_path: Path) -> None:
    """Results, limits and crashes of the others are dealt with; only further callbacks wait."""
    executor = pool(2, grace=0.1)
    hanging, release = threading.Event(), threading.Event()
    future = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    future.add_done_callback(lambda _: (hanging.set(), release.wait(PATIENCE)))
    (tmp_path / "release").touch()
    assert hanging.wait(PATIENCE)
    try:
        assert [executor.submit(tasks.square, n).result(PATIENCE) for n in range(20)] == [n * n for n in range(20)]
        assert isinstance(outcome(executor.submit(tasks.kill_itself)), taskpool.WorkerCrashedError)
        limited = executor.options(task_timeout=0.1).submit(tasks.sleep_for_ever)
        assert isinstance(outcome(limited), taskpool.TaskTimeoutError)
    finally:
        release.set()


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize(
    "task", [tasks.kill_itself, tasks.exit_quietly, tasks.sleep_for_ever], ids=lambda t: t.__name__
)
def test_a_callback_submits_again_after_a_failure(pool: Pool, task: Callable[[], Any]) -> None:
    """The pattern of every retry: it neither blocks nor is lost."""
    executor = pool(1, grace=0.1, task_timeout=0.5)
    again: Future[Future[Any]] = Future()
    executor.submit(task).add_done_callback(lambda _: again.set_result(executor.submit(tasks.square, 6)))
    assert again.result(PATIENCE).result(PATIENCE) == 36


@on_hosts
def test_a_callback_may_wait_for_another_task(pool: Pool) -> None:
    """Or is told that it may not; it does not wait for ever."""
    executor = pool(1)
    answer: Future[Any] = Future()

    def wait_for_another(_: Future[Any]) -> None:
        try:
            answer.set_result(executor.submit(tasks.square, 5).result(PATIENCE))
        except BaseException as error:
            answer.set_exception(error)

    executor.submit(tasks.identity, 1).add_done_callback(wait_for_another)
    try:
        assert answer.result(PATIENCE) == 25
    except RuntimeError as error:
        assert "callback" in str(error)


@on_hosts
@pytest.mark.parametrize("end", ["shutdown", "terminate"])
def test_a_callback_may_end_the_executor(pool: Pool, end: str) -> None:
    """It does not wait for itself."""
    executor = pool(2)
    ended: Future[None] = Future()

    def finish(_: Future[Any]) -> None:
        try:
            ended.set_result(getattr(executor, end)())
        except BaseException as error:
            ended.set_exception(error)

    executor.submit(tasks.spin, 0.02).add_done_callback(finish)
    assert ended.result(PATIENCE) is None
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(tasks.identity, 1)
    bounded(executor.shutdown)


# ---------------------------------------------------------------------------------------------- inputs


@on_hosts
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_input_that_raises_leaves_the_pool_alone(pool: Pool, kind: type[BaseException]) -> None:
    """In the middle of a long map, with tasks of others between."""
    executor = pool(2)

    def numbers() -> Iterator[int]:
        yield from range(200)
        raise kind("the input is broken")

    others = [executor.submit(tasks.square, n) for n in range(10)]
    with pytest.raises(kind):
        list(executor.map(tasks.square, numbers(), buffersize=8))
    assert [future.result(PATIENCE) for future in others] == [n * n for n in range(10)]
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_hosts
def test_an_input_that_blocks_does_not_block_the_end(pool: Pool) -> None:
    """Nobody but the consumer waits for the generator."""
    executor = pool(1)
    release = threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        release.wait(PATIENCE)
        yield 2

    results = executor.map(tasks.square, numbers(), buffersize=1)
    first: Future[int] = Future()
    consumer = threading.Thread(target=lambda: first.set_result(next(results)), daemon=True)
    consumer.start()
    started = time.monotonic()
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    bounded(lambda: executor.terminate(timeout=2))
    assert time.monotonic() - started < 5
    release.set()
    consumer.join(PATIENCE)
    assert not consumer.is_alive()
