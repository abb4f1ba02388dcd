"""The end of an executor and of the interpreter: always within a bound, and with every future resolved."""

from __future__ import annotations

import gc
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import processes, states, tasks
from tests.helpers import (
    TEMPLATE,
    Backend,
    at_most,
    bounded,
    lines,
    on_every_host,
    on_hosts,
    on_pools,
    outcome,
    run_script,
    wait_until,
)
from tests.scripts import run_main

Make = Callable[..., taskpool.Executor]
HUNG = ["sleeping", "spinning", "holding", "stopped", "deaf"]


def settled(futures: list[Future[Any]]) -> None:
    """See that each future is resolved, none with a result: stopped by the executor's end or cancelled by it."""
    assert all(future.done() for future in futures), futures
    for future in futures:
        assert isinstance(outcome(future, 0), CancelledError | taskpool.TaskPoolError), future


def hang(pool: Make, notes: Path) -> tuple[taskpool.Executor, list[Future[Any]]]:
    """Return an executor with a worker in each state that hangs, and as many tasks waiting; and all futures."""
    executor = pool(len(HUNG))
    futures = [executor.submit(states.enter, state, notes) for state in HUNG * 2]
    states.expect(notes, len(HUNG))
    return executor, futures


# ---------------------------------------------------------------------------------------------- the interpreter's exit

starts_at_exit = pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 2),
    reason="Python 3.12.0 and 3.12.1 start no process once the main thread has ended (mended in 3.12.2)",
)

HANG = """
global pool, futures
pool = executor(len(args), shutdown_timeout=0.5)
futures = [pool.submit(states.enter, state, path) for state in args * 2]
states.expect(path, len(args))
"""


@pytest.mark.core
@on_hosts
def test_exit_is_bounded(backend: Backend, tmp_path: Path) -> None:
    """Workers that never end delay the interpreter's exit by the executor's bound, and little more."""
    ended = run_main(HANG, backend, tmp_path, *HUNG)
    assert ended.code == 0, ended
    assert 0.5 < ended.seconds < 8, ended


PENDING = """
global pool, futures
pool = executor()
futures = [pool.submit(states.append, path, number, 0.02) for number in range(30)]
"""


@pytest.mark.core
@on_every_host
@starts_at_exit
def test_accepted_tasks_finish_at_exit(backend: Backend, tmp_path: Path) -> None:
    """A program that ends normally without shutdown gets all that it had submitted."""
    ended = run_main(PENDING, backend, tmp_path)
    assert ended.code == 0, ended
    assert sorted(map(int, lines(tmp_path / "notes"))) == list(range(30))


DROPPED_AT_EXIT = """
futures = [executor().submit(states.append, path, number, 0.02) for number in range(4)]
"""


@on_hosts
@starts_at_exit
def test_tasks_of_forgotten_executors_finish_at_exit(backend: Backend, tmp_path: Path) -> None:
    """It makes no difference that nobody refers to the executor any more."""
    ended = run_main(DROPPED_AT_EXIT, backend, tmp_path)
    assert ended.code == 0, ended
    assert sorted(map(int, lines(tmp_path / "notes"))) == list(range(4))


DROPPED_AND_HUNG = """
futures = [executor(1, shutdown_timeout=0.5).submit(states.enter, "deaf", path)]
states.expect(path, 1)
"""


@on_hosts
def test_forgotten_executors_keep_their_bound(backend: Backend, tmp_path: Path) -> None:
    """An executor that nobody refers to and whose task hangs delays exit by its own bound, no more."""
    ended = run_main(DROPPED_AND_HUNG, backend, tmp_path)
    assert ended.code == 0, ended
    assert ended.seconds < 6, ended


CALLBACKS = """
global pool
pool = executor(1)
future = pool.submit(states.append, path, "task", 0.1)
future.add_done_callback(lambda future: print("called back with", future.result()))
"""


@on_hosts
def test_callbacks_run_at_exit(backend: Backend, tmp_path: Path) -> None:
    """The callbacks of tasks that finish at exit are called."""
    ended = run_main(CALLBACKS, backend, tmp_path)
    assert ended.out.split("\n")[0] == "called back with task", ended


LATE = """
global pool
def late():
    try:
        pool.submit(states.append, path, "late")
    except RuntimeError as error:
        print("refused:", error)
atexit.register(late)
pool = executor(1)
pool.submit(states.append, path, "early").result()
"""


@on_hosts
def test_submit_after_the_end_is_refused(backend: Backend, tmp_path: Path) -> None:
    """A task that comes when the interpreter is ending is refused with the standard library's words."""
    ended = run_main(LATE, backend, tmp_path)
    assert ended.code == 0, ended
    assert "refused: cannot schedule new futures after" in ended.out, ended
    assert lines(tmp_path / "notes") == ["early"]


LATE_DEFAULT = """
def late():
    try:
        print(taskpool.map(abs, [-1, -2]))
    except RuntimeError as error:
        print("refused:", error)
atexit.register(late)
print(taskpool.map(abs, [-3]))
"""


def test_map_after_the_end_is_refused(tmp_path: Path) -> None:
    """The shared executor does not start again when the interpreter is ending."""
    ended = run_main(LATE_DEFAULT, TEMPLATE, tmp_path)
    assert ended.code == 0, ended
    assert ended.out.splitlines()[0] == "[3]", ended
    assert "refused: cannot schedule new futures after" in ended.out, ended


CALLBACK_SUBMITS = """
global pool
def again(future):
    try:
        print("accepted", pool.submit(states.append, path, "second"))
    except RuntimeError as error:
        print("refused:", error)
pool = executor(1)
pool.submit(states.append, path, "first", 0.2).add_done_callback(again)
"""


@on_hosts
def test_submit_while_the_end_waits(backend: Backend, tmp_path: Path) -> None:
    """A callback that submits during exit is answered: the task is refused clearly, or accepted and then run."""
    ended = run_main(CALLBACK_SUBMITS, backend, tmp_path)
    assert ended.code == 0, ended
    if "accepted" in ended.out:
        assert lines(tmp_path / "notes") == ["first", "second"], ended
    else:
        assert "refused: cannot schedule new futures after" in ended.out, ended


THREADS = """
global pool
pool = executor(2)
futures = [pool.submit(states.enter, "leaving a thread", path) for _ in range(4)]
print([future.result() for future in futures])
if args:
    pool.shutdown()
    print("shut down")
"""


@on_hosts
@pytest.mark.parametrize("shutdown", [True, False])
def test_threads_that_tasks_left_do_not_delay_the_end(backend: Backend, tmp_path: Path, shutdown: bool) -> None:
    """A worker in which a task left a non-daemon thread ends when it is told to."""
    ended = run_main(THREADS, backend, tmp_path, *["yes"] * shutdown)
    assert ended.code == 0, ended
    assert ended.out.splitlines() == [str(["done"] * 4), *["shut down"] * shutdown], ended
    assert ended.seconds < 8, ended


IN_A_THREAD = """
def waiter():
    global pool
    pool = executor(1, shutdown_timeout=0.5)
    future = pool.submit(states.enter, "deaf", path)
    states.expect(path, 1)
    started.set()
    try:
        print("resolved with", type(future.exception()).__name__)
    except BaseException as error:
        print("resolved with", type(error).__name__)
started = threading.Event()
threading.Thread(target=waiter, daemon=True).start()
started.wait(20)
"""


@on_hosts
def test_a_daemon_thread_that_waits_does_not_delay_the_end(backend: Backend, tmp_path: Path) -> None:
    """Exit is bounded also when some thread waits for a task that hangs."""
    ended = run_main(IN_A_THREAD, backend, tmp_path)
    assert ended.code == 0, ended
    assert ended.seconds < 8, ended


MANY = """
global pools, futures
pools = [executor(1, shutdown_timeout=2) for _ in range(4)]
futures = [pool.submit(states.enter, "holding", path) for pool in pools]
states.expect(path, 4)
"""


def test_many_executors_share_the_bound(tmp_path: Path) -> None:
    """Executors end side by side: four that hang take no longer than one."""
    ended = run_main(MANY, TEMPLATE, tmp_path)
    assert ended.code == 0, ended
    assert 2 < ended.seconds < 7, ended


# ---------------------------------------------------------------------------------------------- shutdown


@pytest.mark.core
@on_hosts
def test_shutdown_keeps_its_bound(pool: Make, tmp_path: Path) -> None:
    """`shutdown(timeout=)` returns in time, whatever workers do, and resolves what ran and what waited."""
    executor, futures = hang(pool, tmp_path / "notes")
    with at_most(5, "shutdown(timeout=0.3)"):
        bounded(lambda: executor.shutdown(timeout=0.3))
        wait(futures, 2)
    settled(futures)
    workers = set(states.pids(tmp_path / "notes")[::2])
    wait_until(lambda: not any(map(processes.alive, workers)), 2, "the end of the hung workers")
    assert len(lines(tmp_path / "notes")) == len(HUNG), "a cancelled task ran"


@on_pools
def test_shutdown_waits_for_what_is_quick_enough(pool: Make, tmp_path: Path) -> None:
    """What finishes within the bound gives its result."""
    executor = pool(2)
    futures = [executor.submit(states.append, tmp_path / "notes", number, 0.02) for number in range(10)]
    executor.shutdown(timeout=15)
    assert [outcome(future, 0) for future in futures] == list(range(10))


@on_pools
def test_shutdown_without_waiting(pool: Make, tmp_path: Path) -> None:
    """`shutdown(wait=False)` returns at once; accepted tasks still run, new ones are refused."""
    executor = pool(1)
    futures = [executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", number) for number in range(4)]
    with at_most(1, "shutdown(wait=False)"):
        executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(abs, 1)
    assert not any(future.done() for future in futures)
    (tmp_path / "release").touch()
    assert [outcome(future) for future in futures] == list(range(4))


@on_pools
def test_shutdown_cancels_what_waits(pool: Make, tmp_path: Path) -> None:
    """`cancel_futures=True` cancels queued tasks alone."""
    executor = pool(1)
    running = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", "ran")
    states.expect(tmp_path / "started", 1)
    queued = [executor.submit(tasks.note, tmp_path / "started", number) for number in range(4)]
    executor.shutdown(wait=False, cancel_futures=True)
    done, _ = wait(queued, 5)
    assert len(done) == 4
    assert all(future.cancelled() for future in queued)
    (tmp_path / "release").touch()
    assert outcome(running) == "ran"
    assert len(lines(tmp_path / "started")) == 1


@on_pools
def test_shutdown_again(pool: Make) -> None:
    """A second shutdown changes nothing, in whatever form it comes."""
    executor = pool(2)
    assert executor.submit(abs, -1).result(20) == 1
    bounded(executor.shutdown)
    with at_most(2, "further shutdowns"):
        executor.shutdown()
        executor.shutdown(wait=False)
        executor.shutdown(cancel_futures=True)
        executor.shutdown(timeout=0)
        executor.terminate()


@on_hosts
def test_a_second_shutdown_can_be_stricter(pool: Make, tmp_path: Path) -> None:
    """After `shutdown(wait=False)` a bounded one still ends what hangs."""
    executor = pool(1)
    futures = [executor.submit(states.enter, "deaf", tmp_path / "notes") for _ in range(2)]
    states.expect(tmp_path / "notes", 1)
    executor.shutdown(wait=False)
    with at_most(5, "the second shutdown"):
        bounded(lambda: executor.shutdown(timeout=0.2))
        wait(futures, 2)
    settled(futures)


@on_pools
def test_shutdown_from_many_threads(pool: Make) -> None:
    """Shutdowns at the same time all return."""
    executor = pool(2)
    futures = [executor.submit(time.sleep, 0.01) for _ in range(20)]
    threads = [threading.Thread(target=executor.shutdown, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert all(future.done() for future in futures)


@on_pools
def test_shutdown_of_an_executor_that_never_ran(pool: Make) -> None:
    """An executor that got no task ends like any other."""
    executor = pool(2)
    with at_most(2, "shutdown"):
        executor.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(abs, 1)


@on_pools
def test_shutdown_from_a_callback(pool: Make) -> None:
    """A callback may shut its executor down, and even wait for that: it does not wait for itself."""
    executor = pool(1)
    returned = threading.Event()

    def end(_: Future[Any]) -> None:
        executor.shutdown(wait=True)
        returned.set()

    executor.submit(abs, -1).add_done_callback(end)
    assert returned.wait(10)
    bounded(executor.shutdown)


# ---------------------------------------------------------------------------------------------- terminate


@pytest.mark.core
@on_hosts
def test_terminate_stops_everything(pool: Make, tmp_path: Path) -> None:
    """`terminate` returns in time, resolves every future and leaves no process."""
    executor, futures = hang(pool, tmp_path / "notes")
    with at_most(5, "terminate"):
        bounded(executor.terminate)
    settled(futures)
    assert all(future.cancelled() for future in futures[len(HUNG) :])
    assert not any(processes.alive(pid) for pid in states.pids(tmp_path / "notes")[::2])
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(abs, 1)


@on_pools
def test_terminate_with_nothing_to_stop(pool: Make) -> None:
    """`terminate` ends an idle executor, and one that never ran."""
    idle, unused = pool(2), pool(2)
    future = idle.submit(abs, -1)
    assert future.result(20) == 1
    with at_most(4, "terminate twice"):
        bounded(idle.terminate)
        bounded(unused.terminate)
    assert future.result(0) == 1


# ---------------------------------------------------------------------------------------------- with


@on_pools
def test_leaving_with_an_exception_cancels_what_waits(pool: Make, tmp_path: Path) -> None:
    """The exception does not wait for tasks that have not begun; the one that runs finishes."""
    executor = pool(1)
    with pytest.raises(LookupError), executor:
        running = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", "ran")
        states.expect(tmp_path / "started", 1)
        queued = [executor.submit(tasks.note, tmp_path / "started", number) for number in range(4)]
        threading.Timer(0.2, (tmp_path / "release").touch).start()
        raise LookupError
    assert outcome(running, 0) == "ran"
    assert all(future.cancelled() for future in queued)
    assert len(lines(tmp_path / "started")) == 1


@on_hosts
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_leaving_with_an_interrupt_stops_what_runs(pool: Make, tmp_path: Path, kind: type[BaseException]) -> None:
    """Who leaves in a hurry does not wait for running tasks either."""
    executor = pool(1)
    with at_most(5, "leaving"), pytest.raises(kind), executor:
        futures = [executor.submit(states.enter, "deaf", tmp_path / "notes") for _ in range(2)]
        states.expect(tmp_path / "notes", 1)
        raise kind
    wait(futures, 2)
    settled(futures)
    assert not processes.alive(states.pids(tmp_path / "notes")[0])


# ---------------------------------------------------------------------------------------------- dropped


def drop(make: Callable[[], tuple[taskpool.Executor, list[Future[Any]]]]) -> tuple[list[Future[Any]], list[str]]:
    """Make an executor, lose it, and return its futures and the warnings of that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        executor, futures = make()
        del executor
        gc.collect()
    return futures, [str(each.message) for each in caught if each.category is ResourceWarning]


@pytest.mark.core
@on_every_host
def test_a_dropped_executor_warns_and_finishes(backend: Backend, tmp_path: Path) -> None:
    """An executor that is lost without shutdown says so; its tasks finish, then its processes end."""

    def make() -> tuple[taskpool.Executor, list[Future[Any]]]:
        executor = taskpool.Executor(2, **backend.options, name="forgotten")
        futures = [executor.submit(tasks.hold, tmp_path / "pids", tmp_path / "release", number) for number in range(5)]
        states.expect(tmp_path / "pids", 2)
        return executor, futures

    futures, warned = drop(make)
    assert len(warned) == 1, warned
    assert "shutdown" in warned[0]
    assert "forgotten" in warned[0]
    (tmp_path / "release").touch()
    assert [outcome(future) for future in futures] == list(range(5))
    workers = set(states.pids(tmp_path / "pids"))
    wait_until(lambda: not any(map(processes.alive, workers)), 5, "the end of the workers")


@on_pools
def test_an_idle_executor_that_is_dropped_ends(backend: Backend) -> None:
    """Idle workers of a lost executor end without more ado."""

    def make() -> tuple[taskpool.Executor, list[Future[Any]]]:
        executor = taskpool.Executor(2, **backend.options)
        future = executor.submit(tasks.pid)
        wait([future], 20)
        return executor, [future]

    (future,), warned = drop(make)
    assert len(warned) == 1, warned
    if backend.hosted:
        wait_until(lambda: not processes.alive(future.result(0)), 5, "the worker's end")


@on_pools
@pytest.mark.parametrize("end", ["shutdown", "with", "terminate"])
def test_an_executor_that_was_ended_does_not_warn(backend: Backend, end: str) -> None:
    """There is no warning after an orderly end."""

    def make() -> tuple[taskpool.Executor, list[Future[Any]]]:
        executor = taskpool.Executor(1, **backend.options)
        if end == "with":
            with executor:
                return executor, [executor.submit(abs, -1)]
        future = executor.submit(abs, -1)
        assert future.result(20) == 1
        getattr(executor, end)()
        return executor, [future]

    _, warned = drop(make)
    assert not warned


@on_every_host
def test_a_start_that_is_cut_short_leaves_nothing(backend: Backend) -> None:
    """At whatever moment: before the first process, between its start and its word that it is ready, behind that."""
    for milliseconds in (0, 5, 10, 20, 40, 80, 120):
        executor = taskpool.Executor(2, **backend.options)
        futures = [executor.submit(tasks.square, 3) for _ in range(4)]
        began = time.monotonic()
        wait_until(lambda began=began, s=milliseconds / 1000: time.monotonic() >= began + s)
        bounded(executor.terminate)
        assert all(future.done() for future in futures)
        del executor, futures
        gc.collect()  # what still has a descriptor warns here, and that is an error


def test_an_executor_that_lives_to_the_very_end_ends_in_silence(tmp_path: Path) -> None:
    """Also one in a global, of which the interpreter lets go when its modules are half gone."""
    body = """
global held
held = executor(2)
results = held.imap(tasks.report_and_return, range(1000))
print(next(results))
print(sum(taskpool.map(tasks.report_and_return, range(20))))
"""
    ended = run_main(body, TEMPLATE, tmp_path)
    assert (ended.code, ended.out, ended.err) == (0, "0\n190\n", "")


ASKS_LATE = """
import threading, time
import taskpool


def late():
    threading.main_thread().join()
    try:
        raise KeyError("its own")
    except taskpool.WorkerCrashedError:
        print("another")
    except KeyError as error:
        print(*error.args)


threading.Thread(target=late).start()
"""


def test_errors_are_asked_for_when_the_main_thread_has_ended() -> None:
    """Where nothing has loaded them before: then nothing with process pools can be loaded any more."""
    ended = run_script(ASKS_LATE, timeout=20)
    assert (ended.code, ended.out.strip(), ended.err) == (0, "its own", "")
