"""Every backend in asyncio: `run`, `aoutcomes` and `async with` give what `submit`, `outcomes` and `with` give."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import tasks
from tests.helpers import PATIENCE, Backend, lines, on_all, on_pools, wait_until

pytestmark = pytest.mark.core

Pool = Callable[..., taskpool.Executor]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine, within a bound."""

    async def within() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await main

    return asyncio.run(within())


@on_all
def test_run_returns_the_result(pool: Pool) -> None:
    """With arguments by place and by name, one by one and many at once."""
    executor = pool()

    async def main() -> list[int]:
        alone = await executor.run(tasks.add, 1, 2, three=3)
        return [alone, *await asyncio.gather(*(executor.run(tasks.square, number) for number in range(50)))]

    assert run(main()) == [6, *(number * number for number in range(50))]


@on_all
def test_run_raises_the_tasks_error(pool: Pool) -> None:
    """As itself, also where it could not be sent; a view's options hold."""
    executor = pool()

    async def main() -> None:
        with pytest.raises(tasks.TwoArguments, match="7: why"):
            await executor.run(tasks.fail, tasks.TwoArguments, 7, "why")
        with pytest.raises(OSError, match="twice") as caught:
            await executor.options(retry=2).run(tasks.fail, OSError, "twice")
        assert "attempt 2" in caught.value.__notes__[0]
        with pytest.raises(TypeError, match="fn"):
            await executor.run(5)  # type: ignore[arg-type]

    run(main())


@on_all
@pytest.mark.parametrize(
    "kind", [SystemExit, KeyboardInterrupt, StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError]
)
def test_a_task_cannot_end_the_loop(pool: Pool, kind: type[BaseException]) -> None:
    """What would mean something to a coroutine arrives as `RemoteError`: from `run` and in an outcome."""
    executor = pool()

    async def main() -> None:
        with pytest.raises(taskpool.RemoteError, match="odd"):
            await executor.run(tasks.fail, kind, "odd")
        (outcome,) = [each async for each in executor.aoutcomes(tasks.fail, [kind])]
        assert isinstance(outcome.error, taskpool.RemoteError)

    run(main())


@on_all
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", [list, iter], ids=["sized", "unsized"])
def test_aoutcomes_has_a_record_for_each_item(pool: Pool, ordered: bool, kind: Callable[[range], Any]) -> None:
    """Failures cost no other item; in order if asked for."""

    async def main() -> list[taskpool.Outcome[int, int]]:
        records = pool().aoutcomes(tasks.fail_at, itertools.repeat(7), kind(range(60)), ordered=ordered)
        return [record async for record in records]

    records = run(main())
    indices = [record.index for record in records]
    assert sorted(indices) == list(range(60))
    assert indices == sorted(indices) or not ordered
    assert [record.index for record in records if not record.ok] == [7]
    assert all(record.item == (7, record.index) and record.value == record.index for record in records if record.ok)


@on_all
def test_aoutcomes_reads_an_asynchronous_input(pool: Pool) -> None:
    """No further ahead than `buffersize`, to its end."""
    taken: list[int] = []

    async def numbers() -> AsyncIterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    async def main() -> list[int]:
        values = []
        async for record in pool().aoutcomes(tasks.square, numbers(), buffersize=4, ordered=True):
            values.append(record.value)
            assert len(taken) <= len(values) + 4
        return values

    assert run(main()) == [number * number for number in range(50)]


@on_all
def test_aoutcomes_of_an_endless_input(pool: Pool) -> None:
    """Is read ahead by a bound, however slow the consumer is, and no more once it is closed."""
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield number

    async def main() -> None:
        records = pool().aoutcomes(tasks.square, numbers(), buffersize=5)
        for had in range(30):
            await anext(records)
            await asyncio.sleep(0.002)  # a slow consumer; nothing depends on how slow
            assert taken <= had + 1 + 5
        await records.aclose()
        at_close = taken
        await asyncio.sleep(0)
        assert taken == at_close

    run(main())


@on_all
def test_an_input_that_raises_ends_aoutcomes(pool: Pool) -> None:
    """With its own error, behind the records of all items that it gave before."""

    def numbers() -> Iterator[int]:
        yield from range(3)
        raise LookupError("the input is broken")

    async def later() -> AsyncIterator[int]:
        for number in numbers():
            yield number

    async def main(source: Any) -> list[int]:
        seen = []
        with pytest.raises(LookupError, match="the input is broken"):
            async for record in executor.aoutcomes(tasks.square, source):
                seen.append(record.value)  # noqa: PERF401  (what came before the error is kept)
        return sorted(seen)

    executor = pool()
    assert run(main(numbers())) == [0, 1, 4]
    assert run(main(later())) == [0, 1, 4]


@on_pools
def test_aoutcomes_within_a_time(pool: Pool, tmp_path: Path, backend: Backend) -> None:
    """Past `timeout` it raises, and stops what it had started."""
    executor = pool(1, grace=0.1)
    stuck = tasks.sleep_for_ever if backend.hosted else tasks.spin_for_ever

    async def main() -> None:
        records = executor.aoutcomes(tasks.note_then, [tmp_path / "notes"] * 3, "abc", [stuck] * 3, timeout=0.3)
        with pytest.raises(taskpool.CallTimeoutError, match="0 of more than 3 items"):
            async for _ in records:
                raise AssertionError("nothing had ended")
        assert await executor.run(tasks.identity, 1) == 1

    run(main())
    assert lines(tmp_path / "notes") in ([], ["a"])


@on_pools
def test_waiting_for_a_place_is_not_submitting(pool: Pool, tmp_path: Path) -> None:
    """Under `max_pending` the loop goes on; what is cancelled while it waits never starts, all else runs."""
    executor, notes = pool(1, max_pending=2), tmp_path / "notes"

    async def main() -> None:
        holding = asyncio.create_task(executor.run(tasks.hold, tmp_path / "started", tmp_path / "release"))
        await asyncio.to_thread(wait_until, (tmp_path / "started").exists)
        waiting = [asyncio.create_task(executor.run(tasks.note, notes, number)) for number in range(20)]
        for _ in range(3):
            await asyncio.sleep(0)  # all have come as far as they can
        for task in waiting[10:]:
            task.cancel()
        await asyncio.wait(waiting[10:])
        (tmp_path / "release").touch()
        await asyncio.gather(holding, *waiting[:10])

    run(main())
    assert lines(notes) == [str(number) for number in range(10)]


@on_all
def test_async_with_finishes_what_was_accepted(pool: Pool) -> None:
    """And refuses what comes then."""

    async def main() -> list[int]:
        async with pool() as executor:
            futures = [executor.submit(tasks.square, number) for number in range(20)]
        with pytest.raises(RuntimeError, match="after shutdown"):
            await executor.run(tasks.square, 1)
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.aoutcomes(tasks.square, [1])
        return [future.result(0) for future in futures]

    assert run(main()) == [number * number for number in range(20)]
