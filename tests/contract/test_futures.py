"""Every backend: what goes in through `submit` comes out of the future, as with the standard library's executors."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import _RemoteTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import tasks
from tests.helpers import PATIENCE, Backend, on_all, on_hosts, on_pools, outcome, wait_until

pytestmark = pytest.mark.core

Pool = Callable[..., taskpool.Executor]


@on_all
def test_it_is_an_executor_and_gives_futures(pool: Pool) -> None:
    """Code that asks for the standard library's types gets them."""
    executor = pool()
    future = executor.submit(tasks.identity, 1)
    assert isinstance(executor, concurrent.futures.Executor)
    assert isinstance(future, Future)
    assert isinstance(future, taskpool.TaskFuture)
    assert future.result(PATIENCE) == 1
    assert future.done()
    assert not future.running()
    assert not future.cancelled()


@on_all
@pytest.mark.parametrize(
    "value",
    [
        None,
        False,
        0,
        "",
        "\0",
        (),
        NotImplemented,
        ...,
        b"\xff" * 70_000,
        10**300,
        ValueError("as a value"),
        tasks.Plain(3),
    ],
    ids=lambda value: f"{value!r:.12}".replace("\\", "").rstrip("<( "),
)
def test_a_result_arrives_as_it_is(pool: Pool, value: object) -> None:
    """Falsy values, null bytes, large ones and exceptions as values are ordinary results."""
    result = pool().submit(tasks.identity, value).result(PATIENCE)
    assert type(result) is type(value)
    assert repr(result) == repr(value) or result == value


BIG = bytes(range(256)) * 2_000


@on_all
@pytest.mark.parametrize(
    "value",
    [
        BIG,
        bytearray(BIG),
        "\N{SNOWMAN}" * 300_000,
        [BIG, 1, BIG],
        (b"", BIG, tasks.Plain(3)),
        {"deep": [[BIG]]},
        [b"__main__" * 100_000],
    ],
    ids=["bytes", "bytearray", "str", "list", "tuple", "deep", "main"],
)
def test_large_values_arrive_as_they_are(pool: Pool, value: Any) -> None:
    """As an argument and as a result, alone and as an item of a map."""
    executor = pool()
    for result in (executor.submit(tasks.identity, value).result(PATIENCE), *executor.map(tasks.identity, [value] * 2)):
        assert type(result) is type(value)
        assert result == value


@on_hosts
def test_a_large_argument_is_sent_as_it_was(pool: Pool) -> None:
    """What becomes of it behind `submit` concerns nobody."""
    executor = pool(1)
    value = bytearray(BIG)
    futures = [executor.submit(tasks.identity, value) for _ in range(4)]
    value[:] = bytes(len(value))
    assert [future.result(PATIENCE) == BIG for future in futures] == [True] * 4


@on_all
def test_arguments_arrive_by_place_and_by_name(pool: Pool) -> None:
    """No keyword belongs to the executor: `fn`, `self`, `timeout` and `name` are the task's own."""
    executor = pool()
    assert executor.submit(tasks.add, 1, 2, three=3).result(PATIENCE) == 6
    named = {"fn": 1, "self": 2, "timeout": 3, "name": 4, "task_timeout": 5, "priority": 6, "args": 7}
    assert executor.submit(tasks.keywords, **named).result(PATIENCE) == named


@on_all
def test_a_tasks_exception_is_raised_as_itself(pool: Pool) -> None:
    """Type, arguments and text are the task's."""
    future = pool().submit(tasks.fail, KeyError, "which", 3)
    with pytest.raises(KeyError) as caught:
        future.result(PATIENCE)
    assert caught.value.args == ("which", 3)
    assert isinstance(future.exception(), KeyError)
    assert future.done()
    assert not future.cancelled()


@on_all
def test_the_traceback_of_the_task_is_shown(pool: Pool, backend: Backend) -> None:
    """Across a process the standard library's remote traceback is the cause; without one the real frames are there."""
    error = pool().submit(tasks.fail, ValueError, "deep in the task").exception(PATIENCE)
    assert error is not None
    if backend.hosted:
        assert type(error.__cause__) is _RemoteTraceback
        text = str(error.__cause__)
        assert "in fail" in text
        assert "ValueError: deep in the task" in text
    else:
        frames = []
        trace = error.__traceback__
        while trace:
            frames.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        assert "fail" in frames


@on_all
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, StopIteration, StopAsyncIteration, CancelledError])
def test_what_must_not_escape_raw_arrives_as_remote_error(pool: Pool, kind: type[BaseException]) -> None:
    """A task can neither end the caller's program nor its loop, nor pass for cancelled."""
    future = pool().submit(tasks.fail, kind, "text")
    error = future.exception(PATIENCE)
    assert isinstance(error, taskpool.RemoteError)
    assert error.type_name.rsplit(".", 1)[-1] == kind.__name__
    assert "text" in error.message
    assert "in fail" in error.traceback
    assert not future.cancelled()


@on_all
def test_callbacks_run_once_with_the_future(pool: Pool) -> None:
    """Callbacks that were added before and after the end each run once."""
    executor = pool()
    seen: list[Future[Any]] = []
    called = threading.Event()
    future = executor.submit(tasks.square, 4)
    future.add_done_callback(seen.append)
    future.add_done_callback(lambda _: called.set())
    assert called.wait(PATIENCE)
    future.add_done_callback(seen.append)
    wait_until(lambda: len(seen) == 2)
    assert seen == [future, future]


@on_all
def test_a_callback_that_raises_harms_nobody(pool: Pool) -> None:
    """It is logged by the standard library's rules; the other callbacks and the pool go on."""
    executor = pool()
    called = threading.Event()
    future = executor.submit(tasks.identity, 1)
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(lambda _: called.set())
    assert called.wait(PATIENCE)
    assert future.result(PATIENCE) == 1
    assert executor.submit(tasks.identity, 2).result(PATIENCE) == 2


@on_all
def test_wait_and_as_completed(pool: Pool) -> None:
    """The standard library's own functions work on the futures."""
    executor = pool()
    futures = [executor.submit(tasks.square, number) for number in range(20)]
    failing = executor.submit(tasks.fail, ValueError)
    done, pending = concurrent.futures.wait([*futures, failing], PATIENCE)
    assert len(done) == 21
    assert not pending
    results = [future.result() for future in concurrent.futures.as_completed(futures, PATIENCE)]
    assert sorted(results) == [number * number for number in range(20)]


@on_pools
def test_wait_for_the_first(pool: Pool, tmp_path: Path) -> None:
    """FIRST_COMPLETED and FIRST_EXCEPTION return while others run."""
    executor = pool(2)
    held = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    quick = executor.submit(tasks.identity, 1)
    done, pending = concurrent.futures.wait([held, quick], PATIENCE, concurrent.futures.FIRST_COMPLETED)
    assert (done, pending) == ({quick}, {held})
    failing = executor.submit(tasks.fail, ValueError)
    done, pending = concurrent.futures.wait([held, failing], PATIENCE, concurrent.futures.FIRST_EXCEPTION)
    assert (done, pending) == ({failing}, {held})
    (tmp_path / "release").touch()
    assert held.result(PATIENCE) is None


@on_pools
def test_waiting_ends_but_the_task_goes_on(pool: Pool, tmp_path: Path) -> None:
    """`result(timeout)` only waits: its TimeoutError means wait again."""
    future = pool(1).submit(tasks.hold, tmp_path / "started", tmp_path / "release", "value")
    for waiting in (future.result, future.exception):
        with pytest.raises(TimeoutError):
            waiting(0.05)
    assert not future.done()
    (tmp_path / "release").touch()
    assert future.result(PATIENCE) == "value"


@on_pools
def test_a_running_future_says_so(pool: Pool, tmp_path: Path) -> None:
    """A task that its worker has begun is running, one behind it is not."""
    executor = pool(1)
    first = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    second = executor.submit(tasks.identity, 2)
    wait_until((tmp_path / "started").exists)
    wait_until(first.running)
    assert not second.running()
    assert not second.done()
    (tmp_path / "release").touch()
    assert second.result(PATIENCE) == 2


@on_pools
def test_a_queued_task_that_is_cancelled_never_starts(pool: Pool, tmp_path: Path) -> None:
    """Its future is cancelled at once, waiters and callbacks hear of it, and the others keep their turn."""
    executor = pool(1)
    held = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    wait_until((tmp_path / "started").exists)
    queued = [executor.submit(tasks.note, tmp_path / "notes", number) for number in range(6)]
    called: list[Future[Any]] = []
    queued[1].add_done_callback(called.append)
    assert queued[1].cancel()
    assert queued[4].cancel()
    done, _ = concurrent.futures.wait([queued[1], queued[4]], PATIENCE)
    assert len(done) == 2
    assert queued[1].cancelled()
    with pytest.raises(CancelledError):
        queued[1].result(PATIENCE)
    wait_until(lambda: called == [queued[1]])
    (tmp_path / "release").touch()
    assert held.result(PATIENCE) is None
    assert [outcome(queued[number]) for number in (0, 2, 3, 5)] == [0, 2, 3, 5]
    assert (tmp_path / "notes").read_text().split() == ["0", "2", "3", "5"]


@on_all
def test_a_finished_task_cannot_be_cancelled(pool: Pool) -> None:
    """`cancel` says no, and the result stays."""
    future = pool().submit(tasks.identity, 5)
    assert future.result(PATIENCE) == 5
    assert not future.cancel()
    assert future.result(0) == 5


@on_all
def test_asyncio_awaits_its_futures(pool: Pool) -> None:
    """`wrap_future`, `run_in_executor` and a bare `await` give results and exceptions."""

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE):
            return [
                await executor.submit(tasks.square, 2),
                await asyncio.wrap_future(executor.submit(tasks.square, 3)),
                await loop.run_in_executor(executor, tasks.square, 4),
                *await asyncio.gather(*(loop.run_in_executor(executor, tasks.square, n) for n in range(30))),
                *await asyncio.gather(
                    executor.submit(tasks.fail, KeyError, 1), loop.run_in_executor(executor, tasks.fail, StopIteration),
                    return_exceptions=True,
                ),
            ]  # fmt: skip

    executor = pool()
    *results, error, stopped = asyncio.run(main())
    assert results == [4, 9, 16, *(number * number for number in range(30))]
    assert isinstance(error, KeyError)
    assert isinstance(stopped, taskpool.RemoteError)


@on_all
def test_what_is_not_callable_is_refused(pool: Pool) -> None:
    """`submit(5)` raises at once, where the mistake is."""
    executor = pool()
    with pytest.raises(TypeError, match="callable"):
        executor.submit(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        executor.submit()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="callable"):
        executor.map(None, [1])  # type: ignore[arg-type]
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_all
def test_a_task_called_wrongly_fails_alone(pool: Pool) -> None:
    """A wrong number of arguments is the task's own TypeError."""
    executor = pool()
    assert isinstance(executor.submit(tasks.square).exception(PATIENCE), TypeError)
    assert executor.submit(tasks.square, 3).result(PATIENCE) == 9


@on_all
def test_lambdas_and_closures_are_tasks(pool: Pool) -> None:
    """What has no name that a worker could look up travels by value."""
    factor = 7
    executor = pool()
    assert executor.submit(lambda number: number * factor, 6).result(PATIENCE) == 42
    assert list(executor.map(lambda number: number + factor, range(3))) == [7, 8, 9]


@on_all
def test_unpicklable_things_name_the_part(pool: Pool, backend: Backend) -> None:
    """A lock that must cross a process fails its own task, and the error says where the lock was."""
    executor = pool()
    lock = threading.Lock()
    argument = executor.submit(tasks.identity, lock)
    result = executor.submit(tasks.make, threading.Lock)
    if backend.hosted:
        for future in (argument, result):
            error = future.exception(PATIENCE)
            assert isinstance(error, taskpool.NotSendableError)
            assert isinstance(error, TypeError)
            assert "lock" in str(error)
            assert error.__cause__ is not None
        assert "argument" in str(argument.exception())
        assert "result" in str(result.exception())
    else:
        assert argument.result(PATIENCE) is lock
        assert type(result.result(PATIENCE)) is type(lock)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_all
def test_a_result_is_decoded_once(pool: Pool) -> None:
    """Each call of `result` gives the same object, and each call of `exception` the same exception."""
    executor = pool()
    future = executor.submit(tasks.make, tasks.Plain, 1)
    assert future.result(PATIENCE) is future.result(PATIENCE)
    failing = executor.submit(tasks.fail, ValueError)
    assert failing.exception(PATIENCE) is failing.exception(PATIENCE)


@on_pools
def test_many_threads_wait_for_one_future(pool: Pool, tmp_path: Path) -> None:
    """All get the same object."""
    future = pool(1).submit(tasks.note_then, tmp_path / "notes", 1, tasks.make, tasks.Plain, 8)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(future.result(PATIENCE))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(results) == 8
    assert all(result is results[0] for result in results)
