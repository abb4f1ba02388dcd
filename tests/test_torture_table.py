"""One bad task among good ones, on each hosted backend: the pokes that break other pools, one row each."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
import pytest

import taskpool
from tests import processes, tasks
from tests.helpers import PATIENCE, TEMPLATE, Backend, at_most, lines, on_hosts, outcome, run_script, wait_until

pytestmark = pytest.mark.core

Pool = Callable[..., taskpool.Executor]
Check = Callable[[Any], bool]


def _is(kind: type[BaseException], *attributes: tuple[str, object]) -> Check:
    return lambda got: isinstance(got, kind) and all(getattr(got, name) == value for name, value in attributes)


def _died_of(attribute: str, value: object) -> Check:
    # In a Pool and a ProcessPoolExecutor their own thread reaps the process, and may have taken the exit code.
    return lambda got: (
        isinstance(got, taskpool.WorkerCrashedError) and (got.exitcode is None or getattr(got, attribute) == value)
    )


def _timed_out_at(seconds: float) -> Check:
    return _is(taskpool.TaskTimeoutError, ("seconds", seconds))


def _names(kind: str) -> Check:
    return lambda got: isinstance(got, taskpool.RemoteError) and got.type_name.endswith(kind)


def _two_arguments(got: Any) -> bool:
    return type(got) is tasks.TwoArguments and (got.code, got.reason) == (3, "three")


def _group(got: Any) -> bool:
    return type(got) is ExceptionGroup and len(got.exceptions) == 2


def _returned_error(got: Any) -> bool:
    return type(got) is ValueError and got.__cause__ is None and got.args == ("as a value",)


@attrs.frozen
class Row:
    """A bad task, and what must come of it: its own error, within its own time, and nothing else.

    Attributes:
        call: Function and arguments.
        check: Whether an outcome is the right one.
        options: The task's options.
    """

    call: tuple[Any, ...]
    check: Check
    options: dict[str, Any] = attrs.field(factory=dict)


SHORT = {"task_timeout": 0.3, "grace": 0.2}
TIMED_OUT = _timed_out_at(0.3)

TABLE = {
    "the task SIGKILLs itself": Row((tasks.kill_itself,), _died_of("signal", "SIGKILL")),
    "the task leaves by os._exit(3)": Row((tasks.exit_with, 3), _died_of("exitcode", 3)),
    "killed while it sends 8 MB": Row((tasks.die_in_mid_write, 8_000_000), _is(taskpool.WorkerCrashedError)),
    "sys.exit in the task": Row((tasks.fail, SystemExit, 3), _names("SystemExit")),
    "KeyboardInterrupt in the task": Row((tasks.fail, KeyboardInterrupt), _names("KeyboardInterrupt")),
    "StopIteration in the task": Row((tasks.fail, StopIteration, 3), _names("StopIteration")),
    "an exception with two required arguments": Row((tasks.fail, tasks.TwoArguments, 3, "three"), _two_arguments),
    "an ExceptionGroup": Row((tasks.fail_with_group,), _group),
    "returns a lambda": Row((tasks.make_lambda,), lambda got: callable(got) and got(4) == 5),
    "returns a lock": Row((tasks.make, threading.Lock), _is(taskpool.NotSendableError)),
    "the result fails to unpickle": Row((tasks.make, tasks.FailsAtLoad), _is(taskpool.UnpickleError)),
    "an argument fails to unpickle": Row((tasks.identity, tasks.FailsAtLoad()), _is(taskpool.UnpickleError)),
    "an argument fails to pickle": Row((tasks.identity, threading.Lock()), _is(taskpool.NotSendableError)),
    "returns an exception": Row((tasks.make, ValueError, "as a value"), _returned_error),
    "returns a null character": Row((tasks.identity, "\0"), lambda got: got == "\0"),
    "a lambda as the task": Row((lambda number: number + 1, 4), lambda got: got == 5),
    "a local function as the task": Row((tasks.make_closure(3), 4), lambda got: got == 7),
    "sleeps": Row((tasks.sleep_for_ever,), TIMED_OUT, SHORT),
    "swallows every exception": Row((tasks.swallow_everything,), TIMED_OUT, SHORT),
    "ignores SIGTERM": Row((tasks.ignore_sigterm,), TIMED_OUT, SHORT),
    "holds the interpreter's lock in C": Row((tasks.hold_the_gil,), TIMED_OUT, SHORT),
    "is stopped": Row((tasks.stop_itself,), TIMED_OUT, SHORT),
}


@on_hosts
@pytest.mark.parametrize("name", TABLE)
def test_one_bad_task_costs_one_task(pool: Pool, name: str) -> None:
    """Its neighbours before, beside and behind it are right, and the pool is whole."""
    row = TABLE[name]
    executor = pool(2)
    before = [executor.submit(tasks.square, n) for n in range(4)]
    bad = executor.options(**row.options).submit(*row.call)
    behind = [executor.submit(tasks.square, n) for n in range(4)]
    with at_most(5, "the bad task"):
        got = outcome(bad)
    assert row.check(got), repr(got)[:500]
    assert [future.result(PATIENCE) for future in [*before, *behind]] == [0, 1, 4, 9] * 2
    assert list(executor.map(tasks.square, range(10))) == [n * n for n in range(10)]


@on_hosts
@pytest.mark.parametrize("name", TABLE)
def test_one_bad_item_costs_one_item(pool: Pool, tmp_path: Path, name: str) -> None:
    """As above, in the middle of a chunk of a map: those before it are given, those behind it run."""
    row = TABLE[name]
    fn, *args = row.call
    notes = tmp_path / "notes"
    executor = pool(1)
    items: list[tuple[Any, ...]] = [(tasks.note_slowly, notes, number) for number in range(5)]
    items[2] = (fn, *args)
    results = executor.options(**row.options).map(tasks.call, items, chunksize=5)
    with at_most(5, "the bad item"):
        wait_until(lambda: lines(notes) == ["0", "1", "3", "4"])
    assert [next(results), next(results)] == [0, 1]
    got = outcome(_future_of(results))
    assert row.check(got), repr(got)[:500]
    assert executor.submit(tasks.square, 3).result(PATIENCE) == 9


def _future_of(results: Any) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(next(results))
    except BaseException as error:
        future.set_exception(error)
    return future


@on_hosts
def test_an_idle_worker_is_killed(pool: Pool) -> None:
    """Nobody notices."""
    executor = pool(1)
    for number in range(3):
        os.kill(executor.submit(tasks.pid).result(PATIENCE), signal.SIGKILL)
        assert executor.submit(tasks.square, number).result(PATIENCE) == number * number


@on_hosts
def test_an_initializer_raises(pool: Pool) -> None:
    """Its error is the cause; no task runs without it, and no process is started for ever."""
    executor = pool(2, initializer=tasks.fail, initargs=(ValueError, "not ready"))
    futures = [executor.submit(tasks.identity, n) for n in range(4)]
    for future in futures:
        error = outcome(future)
        assert isinstance(error, taskpool.InitializerError)
        assert "not ready" in f"{error}{error.__cause__}"
    with pytest.raises(taskpool.InitializerError):
        executor.submit(tasks.identity, 1)


@on_hosts
def test_a_pool_inside_a_task(pool: Pool) -> None:
    """The standard library's works in any worker."""
    assert outcome(pool(1).submit(tasks.pool_in_a_task)) == [0, 1, 4]


@on_hosts
def test_an_executor_inside_a_task(pool: Pool) -> None:
    """One of our own works in any worker."""
    assert outcome(pool(1).submit(tasks.executor_in_a_task)) == [0, 1, 4]


@on_hosts
def test_a_started_program_dies_with_its_task(pool: Pool, tmp_path: Path) -> None:
    """At the limit."""
    executor = pool(1, task_timeout=0.5, grace=0.2)
    assert _timed_out_at(0.5)(outcome(executor.submit(tasks.start_child_and_hang, tmp_path / "child")))
    (child,) = map(int, lines(tmp_path / "child"))
    wait_until(lambda: not processes.alive(child), 2)


@on_hosts
def test_three_stubborn_tasks_take_as_long_as_one(pool: Pool) -> None:
    """They are stopped side by side."""
    executor = pool(3, task_timeout=0.5, grace=0.5)
    started = time.monotonic()
    errors = [outcome(future) for future in [executor.submit(tasks.ignore_sigterm) for _ in range(3)]]
    assert all(map(_timed_out_at(0.5), errors))
    assert time.monotonic() - started < 3


@on_hosts
def test_long_tasks_in_a_map_are_not_timed_out_for_waiting(pool: Pool) -> None:
    """Four tasks just under the limit, on two workers that are replaced after each."""
    executor = pool(2, task_timeout=0.8, max_tasks_per_child=1)
    assert list(executor.map(tasks.spin, [0.4] * 4)) == [None] * 4


# ---------------------------------------------------------------------------------------------- the parent

SCRIPT = """
import os, signal, sys, time
import taskpool
from tests import tasks

def main():
    with taskpool.Executor(2, **{options}) as pool:
        for future in [pool.submit(tasks.pid_after, 0.05) for _ in range(4)]:
            future.result(20)
        if {busy}:
            [pool.submit(tasks.sleep_for_ever) for _ in range(2)]
            while pool.stats().running < 2:
                time.sleep(0.005)
        print("ready")
        time.sleep(60)

if __name__ == "__main__":
    main()
"""


@on_hosts
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_the_parent_dies(backend: Backend, busy: bool, number: signal.Signals) -> None:
    """A second later nobody lives."""
    source = SCRIPT.format(options=backend.options, busy=busy)
    ended = run_script(source, signals=(("ready", number),), gone_within=1.0)
    assert ended.code == -number
    assert "Traceback" not in ended.err
    assert backend != TEMPLATE or ended.err == ""  # elsewhere the standard library may tell that it cleans up


@on_hosts
def test_ctrl_c_ends_the_program(backend: Backend) -> None:
    """At once, with the one traceback of the caller."""
    source = SCRIPT.format(options={**backend.options, "shutdown_timeout": 0.5, "grace": 0.2}, busy=True)
    ended = run_script(source, signals=(("ready", signal.SIGINT),), group=True, gone_within=1.0)
    assert ended.seconds < 15
    assert ended.code == -signal.SIGINT
    assert ended.err.count("Traceback") == 1
    assert ended.err.rstrip().endswith("KeyboardInterrupt")
