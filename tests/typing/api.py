"""Uses the public API as typed code does. Checked by mypy and pyright, never run."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator
from typing import assert_type

import taskpool


def length(text: str, *, extra: int = 0) -> int:
    return len(text) + extra


def pair(text: str, number: int) -> tuple[str, int]:
    return text, number


def whole_call() -> None:
    assert_type(taskpool.map(length, ["a", "bc"]), list[int])
    assert_type(taskpool.map(pair, ["a"], [1], timeout=5, task_timeout=1), list[tuple[str, int]])


def executor() -> None:
    with taskpool.Executor(max_workers=2, backend="process", task_timeout=2, grace=0.1, name="ours") as pool:
        standard: concurrent.futures.Executor = pool
        standard.submit(length, "a")

        future = pool.submit(length, "a", extra=1)
        assert_type(future, taskpool.TaskFuture[int])
        assert_type(future.result(timeout=1.5), int)
        assert_type(future.exception(), BaseException | None)
        assert_type(future.cancel(), bool)
        plain: concurrent.futures.Future[int] = future
        concurrent.futures.wait([plain, future])
        for done in concurrent.futures.as_completed([future]):
            assert_type(done.result(), int)

        assert_type(pool.map(length, ["a"], timeout=3, chunksize=1, buffersize=8), Iterator[int])
        assert_type(pool.map(pair, ["a", "b"], [3, 4]), Iterator[tuple[str, int]])

        patient = pool.options(task_timeout=60, name="resize", priority=1)
        assert_type(patient.submit(length, "a"), taskpool.TaskFuture[int])
        assert_type(patient.map(length, ["a"]), Iterator[int])
        assert_type(pool.stats(), taskpool.Stats)
    pool.shutdown(wait=True, cancel_futures=False, timeout=2)
    pool.terminate(timeout=5)


def wrong(pool: taskpool.Executor) -> None:
    pool.submit(length, 1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    pool.submit(length, "a", other=1)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


async def in_asyncio(pool: taskpool.Executor) -> None:
    assert_type(await pool.submit(length, "a"), int)
    assert_type(await asyncio.get_running_loop().run_in_executor(pool, length, "a"), int)


def errors(future: taskpool.TaskFuture[int]) -> None:
    try:
        future.result()
    except taskpool.TaskTimeoutError as error:
        assert_type(error.seconds, float | None)
        assert_type(error.stack, str | None)
    except taskpool.WorkerCrashedError as error:
        assert_type(error.signal, str | None)
        assert_type(error.exitcode, int | None)
    except taskpool.RemoteError as error:
        assert_type(error.type_name, str)
    except taskpool.TaskPoolError as error:
        assert_type(error, taskpool.TaskPoolError)
