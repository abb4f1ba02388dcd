"""Uses the public API as typed code does. Checked by mypy and pyright, never run."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import assert_type

import tenacity

import taskpool
from taskpool import events


def length(text: str, *, extra: int = 0) -> int:
    return len(text) + extra


def pair(text: str, number: int) -> tuple[str, int]:
    return text, number


def whole_call() -> None:
    assert_type(taskpool.map(length, ["a", "bc"]), list[int])
    assert_type(taskpool.map(pair, ["a"], [1], timeout=5, task_timeout=1), list[tuple[str, int]])
    assert_type(taskpool.starmap(pair, [("a", 1)], retry=3), list[tuple[str, int]])
    assert_type(taskpool.imap(length, iter(["a"]), buffersize=3), Iterator[int])
    assert_type(taskpool.imap_unordered(length, ["a"], progress="lengths"), Iterator[int])


def outcomes(pool: taskpool.Executor) -> None:
    for outcome in taskpool.outcomes(length, ["a"], ordered=True, max_workers=2, backend="thread"):
        assert_type(outcome, taskpool.Outcome[str, int])
        assert_type(outcome.item, str)
        assert_type(outcome.value, int)
        assert_type(outcome.error, BaseException | None)
        assert_type(outcome.started, float | None)
    for several in pool.outcomes(pair, ["a"], [1], strict=True, timeout=3):
        assert_type(several.value, tuple[str, int])


def retries(pool: taskpool.Executor) -> None:
    policy = taskpool.retry(5, wait=tenacity.wait_exponential(), on=(OSError, taskpool.TaskTimeoutError))
    assert_type(policy, taskpool.RetryPolicy)
    taskpool.Executor(retry=policy)
    taskpool.Executor(retry=3)
    taskpool.Executor(retry=tenacity.stop_after_delay(30))
    taskpool.Executor(retry=tenacity.Retrying(stop=tenacity.stop_after_attempt(2)))
    assert_type(pool.options(retry=None).submit(length, "a"), taskpool.TaskFuture[int])


def listeners(heard: list[events.Event]) -> None:
    taskpool.Executor(listeners=[heard.append])
    for event in heard:
        if isinstance(event, events.TaskEnded):
            assert_type(event.how, events.How)
        elif isinstance(event, events.TaskRetried):
            assert_type(event.wait, float)


def inside() -> None:
    task = taskpool.current_task()
    assert_type(task, taskpool.CurrentTask | None)
    if task is not None:
        assert_type(task.remaining(), float | None)
        assert_type(task.cancelled, bool)
        task.report(1, 2.5)


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
        assert_type(pool.map(pair, ["a", "b"], [3, 4], strict=True), Iterator[tuple[str, int]])
        assert_type(pool.starmap(pair, [("a", 1)]), Iterator[tuple[str, int]])

        patient = pool.options(task_timeout=60, name="resize", priority=1)
        assert_type(patient.submit(length, "a"), taskpool.TaskFuture[int])
        assert_type(patient.map(length, ["a"]), Iterator[int])
        assert_type(pool.stats(), taskpool.Stats)

        with pool.group() as group, patient.group(timeout=5, name="ours") as inner:
            assert_type(group, taskpool.TaskGroup)
            assert_type(inner.submit(length, "a", extra=1), taskpool.TaskFuture[int])
    pool.shutdown(wait=True, cancel_futures=False, timeout=2)
    pool.terminate(timeout=5)


def wrong(pool: taskpool.Executor) -> None:
    pool.submit(length, 1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    pool.submit(length, "a", other=1)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    pool.map(length, ["a"], tiemout=1)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    taskpool.outcomes(length, [1])  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    pool.group().submit(length, 1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def texts() -> AsyncIterator[str]:
    yield "a"


async def in_asyncio(pool: taskpool.Executor) -> None:
    assert_type(await pool.submit(length, "a"), int)
    assert_type(await pool.run(length, "a", extra=1), int)
    assert_type(await pool.options(task_timeout=1).run(pair, "a", 1), tuple[str, int])
    async with taskpool.Executor() as entered:
        assert_type(entered, taskpool.Executor)
    async for outcome in pool.aoutcomes(length, ["a"], ordered=True, timeout=3):
        assert_type(outcome, taskpool.Outcome[str, int])
    async for outcome in pool.aoutcomes(length, texts()):
        assert_type(outcome.item, str)
    async for several in pool.aoutcomes(pair, ["a"], [1], strict=True):
        assert_type(several.value, tuple[str, int])
    records = pool.aoutcomes(length, ["a"])
    assert_type(records, AsyncGenerator[taskpool.Outcome[str, int]])
    await records.aclose()
    await pool.run(length, 1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    async with pool.group(timeout=5) as group:
        assert_type(group, taskpool.TaskGroup)
        assert_type(await group.submit(length, "a"), int)
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
