"""Initializers: a good one runs once in each worker; a bad one fails what waits, in its time, and starts no storm."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import processes, states, tasks
from tests.helpers import (
    EVERY_HOST,
    PATIENCE,
    SERIAL,
    TEMPLATE,
    THREAD,
    Backend,
    at_most,
    bounded,
    lines,
    on_all,
    on_hosts,
    on_one_host,
    outcome,
    run_script,
    wait_until,
)

Make = Callable[..., taskpool.Executor]

RAISES: dict[str, tuple[Any, ...]] = {
    "raises": (tasks.fail, ValueError, "no disk"),
    "raises an odd exception": (tasks.fail, tasks.TwoArguments, 5, "no disk"),
    "raises what does not pickle": (tasks.fail, tasks.CarriesLock, "no disk"),
    "exits politely": (tasks.fail, SystemExit, "no disk"),
}
DIES: dict[str, tuple[Any, ...]] = {
    "leaves": (tasks.exit_with, 3),
    "leaves quietly": (tasks.exit_quietly,),
    "is killed": (tasks.kill_itself,),
    "crashes": (tasks.segfault,),
}
HANGS: dict[str, tuple[Any, ...]] = {
    "sleeps": (tasks.sleep_for_ever,),
    "holds the GIL": (tasks.hold_the_gil,),
    "is deaf": (tasks.ignore_sigterm,),
    "stops": (tasks.stop_itself,),
}


def attempt(executor: taskpool.Executor) -> Any:
    """Submit and return the error that comes of it, from the call or through the future."""
    try:
        future = executor.submit(abs, -1)
    except taskpool.InitializerError as error:
        return error
    return outcome(future, 10)


def expect_all_fail(executor: taskpool.Executor, notes: Path) -> list[taskpool.InitializerError]:
    """Submit to an executor that cannot start, and see each future and each later call fail, and few starts."""
    futures: list[Future[Any]] = []
    with contextlib.suppress(taskpool.InitializerError):  # it may know before all are submitted
        futures += [executor.submit(abs, -1) for _ in range(6)]
    errors = [outcome(future, 10) for future in futures] + [attempt(executor)]
    assert all(type(error) is taskpool.InitializerError for error in errors), errors
    with pytest.raises(taskpool.InitializerError):
        executor.submit(abs, -1)
    with pytest.raises(taskpool.InitializerError):
        list(executor.map(abs, [-1]))
    with at_most(5, "shutdown"):
        bounded(executor.shutdown)
    assert 1 <= len(lines(notes)) <= 3 + 2, "more starts than three failures on two workers explain"
    return errors


@pytest.mark.core
@on_one_host
@pytest.mark.parametrize("way", [*RAISES, *DIES])
def test_an_initializer_that_fails(pool: Make, tmp_path: Path, way: str) -> None:
    """Each waiting future and each later submit gets InitializerError; the reason travels along."""
    initargs = (tmp_path / "starts", "start", *(RAISES | DIES)[way])
    errors = expect_all_fail(pool(2, initializer=tasks.note_then, initargs=initargs), tmp_path / "starts")
    if way in RAISES:
        text = "".join(traceback.format_exception(errors[0]))
        assert "no disk" in text, text
        assert "in fail" in text, "the remote traceback is missing:\n" + text


@pytest.mark.core
@on_one_host
@pytest.mark.parametrize("way", HANGS)
def test_an_initializer_that_hangs(pool: Make, tmp_path: Path, way: str) -> None:
    """`start_timeout` bounds the initializer as well."""
    initargs = (tmp_path / "starts", "start", *HANGS[way])
    executor = pool(2, initializer=tasks.note_then, initargs=initargs, start_timeout=0.6, grace=0.1)
    with at_most(8, "failing"):
        errors = expect_all_fail(executor, tmp_path / "starts")
    assert "0.6" in str(errors[0])


@on_hosts
@pytest.mark.parametrize("way", ["raises", "is killed", "holds the GIL"])
def test_an_initializer_that_fails_on_each_host(pool: Make, tmp_path: Path, way: str) -> None:
    """Each host is told of a start that failed, died or hangs."""
    initargs = (tmp_path / "starts", "start", *(RAISES | DIES | HANGS)[way])
    executor = pool(2, initializer=tasks.note_then, initargs=initargs, start_timeout=1.5, grace=0.1)
    with at_most(10, "failing"):
        expect_all_fail(executor, tmp_path / "starts")


@pytest.mark.parametrize("backend", [THREAD, SERIAL], ids=str)
@pytest.mark.parametrize("way", RAISES)
def test_an_initializer_that_fails_without_processes(pool: Make, tmp_path: Path, way: str) -> None:
    """In threads and in the caller the same error comes, and the initializer is not tried at each call."""
    initargs = (tmp_path / "starts", "start", *RAISES[way])
    errors = expect_all_fail(pool(1, initializer=tasks.note_then, initargs=initargs), tmp_path / "starts")
    assert len(lines(tmp_path / "starts")) == 1
    assert "no disk" in "".join(traceback.format_exception(errors[0]))


@on_one_host
def test_what_the_error_is(pool: Make) -> None:
    """It is a BrokenProcessPool as well, its cause is the initializer's exception, and that one's the remote traceback."""
    executor = pool(1, initializer=tasks.fail, initargs=(ValueError, "no disk"))
    error = outcome(executor.submit(abs, -1))
    assert isinstance(error, BrokenProcessPool)
    assert isinstance(error, BrokenExecutor)
    assert isinstance(error.__cause__, ValueError)
    assert type(error.__cause__.__cause__).__name__ == "_RemoteTraceback"


@on_one_host
def test_waiters_are_told(pool: Make) -> None:
    """`wait` and callbacks see the failure, as `result` does."""
    executor = pool(2, initializer=tasks.fail, initargs=(ValueError, "no disk"))
    told: list[object] = []
    futures = [executor.submit(abs, -1) for _ in range(3)]
    for future in futures:
        future.add_done_callback(told.append)
    done, _ = wait(futures, 20)
    assert len(done) == 3
    wait_until(lambda: len(told) == 3)


@on_hosts
def test_replacements_that_cannot_start(pool: Make, tmp_path: Path) -> None:
    """If workers could be made ready once, three failures in a row end it."""
    executor = pool(
        1, initializer=tasks.note_then, initargs=(tmp_path / "starts", "start", states.fail_when, tmp_path / "block")
    )
    assert executor.submit(abs, -1).result(20) == 1
    (tmp_path / "block").touch()
    crashed = executor.submit(tasks.kill_itself)
    waiting = [executor.submit(abs, -1) for _ in range(3)]
    assert type(outcome(crashed)) is taskpool.WorkerCrashedError
    errors = [outcome(future) for future in waiting]
    assert all(type(error) is taskpool.InitializerError for error in errors), errors
    assert "is in the way" in "".join(traceback.format_exception(errors[0]))
    with pytest.raises(taskpool.InitializerError):
        executor.submit(abs, -1)
    bounded(executor.shutdown)
    assert 3 <= len(lines(tmp_path / "starts")) <= 4


@on_one_host
def test_a_start_that_fails_once(pool: Make, tmp_path: Path) -> None:
    """A single failure among replacements is tried again, and no task notices."""
    executor = pool(1, initializer=states.fail_first, initargs=(tmp_path / "block",))
    worker = executor.submit(os.getpid).result(20)
    (tmp_path / "block").touch()
    os.kill(worker, signal.SIGKILL)
    assert [outcome(executor.submit(abs, -number)) for number in range(3)] == [0, 1, 2]
    assert not (tmp_path / "block").exists()


# ---------------------------------------------------------------------------------------------- good ones


@pytest.mark.core
@on_hosts
def test_a_good_initializer_runs_once_in_each_worker(pool: Make, tmp_path: Path) -> None:
    """It ran before the first task of each worker, and once only, also in a replacement."""
    executor = pool(2, initializer=states.enter, initargs=("idle", tmp_path / "starts"))
    workers = {future.result(20) for future in [executor.submit(tasks.pid) for _ in range(40)]}
    os.kill(min(workers), signal.SIGKILL)
    workers |= {future.result(20) for future in [executor.submit(tasks.pid) for _ in range(40)]}
    bounded(executor.shutdown)
    started = [int(line.split()[0]) for line in lines(tmp_path / "starts")]
    assert len(started) == len(set(started)) <= 3
    assert workers <= set(started)


@on_all
def test_what_an_initializer_did_is_there(pool: Make) -> None:
    """Tasks find what the initializer left."""
    executor = pool(2, initializer=states.keep, initargs=("a", 1, [None]))
    assert [future.result(20) for future in [executor.submit(states.kept) for _ in range(4)]] == [["a", 1, [None]]] * 4


@on_one_host
def test_task_limits_do_not_count_the_start(pool: Make) -> None:
    """A slow initializer takes nothing of a task's own time."""
    executor = pool(1, initializer=tasks.spin, initargs=(0.6,), task_timeout=0.4)
    assert outcome(executor.submit(abs, -1)) == 1


@on_hosts
def test_a_lambda_as_initializer(backend: Backend, pool: Make) -> None:
    """It works where functions travel by value; where multiprocessing cannot send it the error says so."""
    offset = 5
    executor = pool(1, initializer=lambda: states.keep(offset))
    answer = outcome(executor.submit(states.kept))
    if backend == TEMPLATE or backend.start == "fork":
        assert answer == [5]
    else:
        assert answer == [5] or (type(answer) is taskpool.InitializerError and "lambda" in str(answer)), answer


@pytest.mark.parametrize("initializer", [5, "text"])
@on_all
def test_an_initializer_must_be_callable(backend: Backend, initializer: Any) -> None:
    """What cannot be called is refused where it is given."""
    with pytest.raises(TypeError, match="initializer must be a callable"):
        taskpool.Executor(1, **backend.options, initializer=initializer)


# ---------------------------------------------------------------------------------------------- inherited objects


@pytest.mark.parametrize("backend", EVERY_HOST[1:], ids=str)
def test_queues_and_locks_pass_by_inheritance(backend: Backend, pool: Make) -> None:
    """Under `mp_context=` initargs may hold what multiprocessing hands to its own processes alone."""
    context = multiprocessing.get_context(backend.start)
    queue, lock = context.Queue(), context.Lock()
    executor = pool(2, initializer=states.keep, initargs=(queue, lock))
    for future in [executor.submit(states.put_in_kept_queue, number) for number in range(6)]:
        future.result(20)
    got = [queue.get(timeout=20) for _ in range(6)]
    assert sorted(number for _, number in got) == list(range(6))
    assert os.getpid() not in {pid for pid, _ in got}
    bounded(executor.shutdown)
    queue.close()
    queue.join_thread()


@pytest.mark.parametrize("backend", EVERY_HOST[1:], ids=str)
def test_queues_and_locks_reach_replacements(backend: Backend, pool: Make) -> None:
    """The worker that replaces a killed one has them as well."""
    context = multiprocessing.get_context(backend.start)
    queue, lock = context.SimpleQueue(), context.Lock()
    executor = pool(1, initializer=states.keep, initargs=(queue, lock))
    assert type(outcome(executor.submit(tasks.kill_itself))) is taskpool.WorkerCrashedError
    executor.submit(states.put_in_kept_queue, "after").result(20)
    assert bounded(queue.get)[1] == "after"
    bounded(executor.shutdown)
    queue.close()


@pytest.mark.core
def test_the_template_names_the_way(pool: Make) -> None:
    """The default backend cannot pass them on; its error says what can."""
    lock = multiprocessing.get_context("spawn").Lock()

    def use() -> None:
        executor = pool(1, initializer=states.keep, initargs=(lock,))
        executor.submit(abs, -1).result(20)

    with at_most(5), pytest.raises((TypeError, RuntimeError), match=r"mp_context="):
        use()


# ---------------------------------------------------------------------------------------------- preload


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """Make a module that only a preload imports, and return its name."""
    (folder / "preloaded_by_test.py").write_text(body)
    monkeypatch.syspath_prepend(folder)
    return "preloaded_by_test"


def test_preload_is_imported_once(pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is preloaded is imported by the template alone, and each worker has it."""
    name = write_module(tmp_path, monkeypatch, f"import os\nopen({str(tmp_path / 'notes')!r}, 'a').write('once\\n')\n")
    executor = pool(2, preload=[name])
    workers = {executor.submit(tasks.pid).result(20)}
    os.kill(min(workers), signal.SIGKILL)
    assert outcome(executor.submit(states.loaded, name)) is True
    assert lines(tmp_path / "notes") == ["once"]


@pytest.mark.parametrize("body", ["raise OSError('no disk')", "import os; os._exit(3)", "import time; time.sleep(600)"])
def test_a_preload_that_fails(pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A preload that raises, ends the template or hangs is an InitializerError too, within `start_timeout`."""
    name = write_module(tmp_path, monkeypatch, body)
    executor = pool(1, preload=[name], start_timeout=1)
    with at_most(8):
        error = outcome(executor.submit(abs, -1))
    assert type(error) is taskpool.InitializerError, error
    wait_until(lambda: not [process for process in processes.descendants() if name in process.command])


@pytest.mark.parametrize("name", ["thread", "serial"])
def test_start_timeout_bounds_an_initializer_without_processes(name: str, tmp_path: Path) -> None:
    """In a thread, which is left to itself, and in the caller, which is interrupted."""
    release = tmp_path / "release"
    how: dict[str, Any] = {"initializer": tasks.await_file, "initargs": (release,), "start_timeout": 0.3}
    with at_most(5), taskpool.Executor(1, backend=name, **how) as pool:
        future = pool.submit(tasks.square, 3)
        with pytest.raises(taskpool.InitializerError, match=r"start_timeout=0\.3"):
            future.result(PATIENCE)
    release.touch()


def test_ctrl_c_in_a_serial_task_is_the_callers() -> None:
    """It ends the program as it would without an executor; one that a task raises itself is the task's error."""
    ended = run_script(
        """
import taskpool
from tests import tasks
pool = taskpool.Executor(backend="serial")
print(type(pool.submit(tasks.fail, KeyboardInterrupt).exception()).__name__)
def wait():
    print("ready", flush=True)
    tasks.sleep_for_ever()
try:
    pool.submit(wait)
except KeyboardInterrupt:
    print("ended")
print(pool.submit(abs, -1).result())
""",
        signals=(("ready", 2),),
    )
    assert ended.out.splitlines() == ["RemoteError", "ready", "ended", "1"]
