"""asyncio, uvloop and anyio: whatever ends a wait stops the worker's task, and nothing blocks the loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Self

import anyio
import anyio.lowlevel
import pytest

import taskpool
from taskpool import _loops
from taskpool._task import TaskFuture, Value
from tests import tasks
from tests.helpers import PATIENCE, at_most, bounded, lines, outcome, run_script, wait_until

try:
    import uvloop

    uvloop.new_event_loop().close()  # libuv keeps two descriptors from its first loop on
except ImportError:
    uvloop = None  # type: ignore[assignment]

Pool = Callable[..., taskpool.Executor]
Run = Callable[[Coroutine[Any, Any, Any]], Any]
Way = Callable[[taskpool.Executor, Path], Coroutine[Any, Any, Any]]

needs_uvloop = pytest.mark.skipif(uvloop is None, reason="uvloop cannot be installed for this Python")
FACTORIES = [
    pytest.param(asyncio.new_event_loop, id="asyncio"),
    pytest.param(getattr(uvloop, "new_event_loop", None), id="uvloop", marks=needs_uvloop),
]


@pytest.fixture(params=FACTORIES)
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes a loop, of each kind."""
    factory: Callable[[], asyncio.AbstractEventLoop] = request.param
    return factory


@pytest.fixture
def run(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> Run:
    """What runs a coroutine as `asyncio.run` does, within a bound."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(within(main))

    return run


async def within(main: Awaitable[Any]) -> Any:
    """Wait for what must come in time."""
    async with asyncio.timeout(PATIENCE):
        return await main


async def until(predicate: Callable[[], Any]) -> None:
    """Wait, while the loop goes on, until something is so."""
    async with asyncio.timeout(PATIENCE):
        while not predicate():  # noqa: ASYNC110  (what is waited for is not of the loop)
            await asyncio.sleep(0.001)


# ---------------------------------------------------------------------------------------------- ways to wait


async def by_run(executor: taskpool.Executor, notes: Path) -> None:
    """Wait in `run` for a task that never ends."""
    await executor.run(tasks.note_then, notes, "started", tasks.sleep_for_ever)


async def by_future(executor: taskpool.Executor, notes: Path) -> None:
    """Await its future."""
    await executor.submit(tasks.note_then, notes, "started", tasks.sleep_for_ever)


async def by_aoutcomes(executor: taskpool.Executor, notes: Path) -> None:
    """Iterate over its outcomes."""
    async for _ in executor.aoutcomes(tasks.note_then, [notes], ["started"], [tasks.sleep_for_ever]):
        raise AssertionError("it never ends")


async def by_async_input(executor: taskpool.Executor, notes: Path) -> None:
    """Iterate over the outcomes of an asynchronous input."""

    async def forever() -> AsyncIterator[Path]:
        yield notes
        await asyncio.get_running_loop().create_future()

    async for _ in executor.aoutcomes(lambda path: tasks.note_then(path, "started", tasks.sleep_for_ever), forever()):
        raise AssertionError("it never ends")


async def by_leaving(executor: taskpool.Executor, notes: Path) -> None:
    """Leave `async with`."""
    async with executor:
        executor.submit(tasks.note_then, notes, "started", tasks.sleep_for_ever)


in_each_way = pytest.mark.parametrize(
    "way", [by_run, by_future, by_aoutcomes, by_async_input], ids=lambda way: way.__name__
)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where tasks say that they have started."""
    return tmp_path / "notes"


def expect_free(executor: taskpool.Executor) -> None:
    """The only worker has left what it did, soon."""
    assert executor.submit(tasks.identity, 7).result(PATIENCE) == 7
    assert executor.stats().running == 0


# ---------------------------------------------------------------------------------------------- what ends a wait


@pytest.mark.core
@in_each_way
def test_cancelling_stops_the_task(one: taskpool.Executor, notes: Path, run: Run, way: Way) -> None:
    """The awaiting task ends at once, as cancelled, and the worker is free."""

    async def main() -> None:
        waiting = asyncio.create_task(way(one, notes))
        await until(lambda: lines(notes))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await one.run(tasks.identity, 7) == 7

    run(main())


@in_each_way
def test_a_timeout_around_it_stops_the_task(one: taskpool.Executor, notes: Path, run: Run, way: Way) -> None:
    """`asyncio.timeout` and `wait_for` raise their own error, and nothing else."""

    async def main() -> None:
        with pytest.raises(TimeoutError) as caught:
            await asyncio.wait_for(way(one, notes), 0.1)
        assert not isinstance(caught.value, taskpool.TaskPoolError)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await way(one, notes)
        assert await one.run(tasks.identity, 7) == 7

    run(main())


@pytest.mark.core
@in_each_way
def test_closing_the_loop_stops_the_task(
    one: taskpool.Executor, notes: Path, new_loop: Callable[[], asyncio.AbstractEventLoop], way: Way
) -> None:
    """Also where nothing was cancelled before, and the coroutine that waited is still there."""
    loop = new_loop()
    waiting = loop.create_task(way(one, notes))
    loop.run_until_complete(until(lambda: lines(notes)))
    assert not waiting.done()
    loop.close()
    expect_free(one)
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]  # we know
    waiting.get_coro().close()  # type: ignore[union-attr]


@in_each_way
def test_a_run_that_ends_stops_the_task(one: taskpool.Executor, notes: Path, run: Run, way: Way) -> None:
    """`asyncio.run` cancels what is pending when its own coroutine is done."""
    left: list[asyncio.Task[Any]] = []

    async def main() -> None:
        left.append(asyncio.create_task(way(one, notes)))
        await until(lambda: lines(notes))

    run(main())
    assert left[0].cancelled()
    expect_free(one)


def test_a_closed_coroutine_stops_the_task(one: taskpool.Executor, notes: Path, run: Run) -> None:
    """Also one that is dropped, and collected."""

    async def main() -> None:
        for count, end in enumerate((lambda coroutine: coroutine.close(), lambda _coroutine: None), 1):
            coroutine = by_run(one, notes)
            coroutine.send(None)
            await until(lambda count=count: len(lines(notes)) == count)
            end(coroutine)
            del coroutine
            assert await one.run(tasks.identity, 7) == 7

    run(main())


def test_the_loops_end_is_noticed_however_late(
    one: taskpool.Executor,
    notes: Path,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The timer by which it is noticed is set again and again."""
    renewed = []
    original = _loops._Vigil.__call__

    def renew(vigil: Any) -> None:
        renewed.append(vigil._bell)
        original(vigil)

    monkeypatch.setattr(_loops, "VIGIL", 0.001)
    monkeypatch.setattr(_loops._Vigil, "__call__", renew)
    loop = new_loop()
    coroutine = by_run(one, notes)
    waiting = loop.create_task(coroutine)
    loop.run_until_complete(until(lambda: lines(notes) and len(renewed) > 5))
    loop.close()
    expect_free(one)
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine.close()


def test_a_loop_is_not_kept(one: taskpool.Executor, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Neither by the executor nor by what notices its end."""

    class Kept:
        pass

    loop, kept = new_loop(), Kept()
    loop.call_later(1e6, print, kept)
    assert loop.run_until_complete(within(one.run(tasks.identity, 1))) == 1
    gone = weakref.ref(kept), weakref.ref(_loops._bell_of(loop))
    loop.close()
    del loop, kept
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.core
def test_ctrl_c_stops_the_task() -> None:
    """`asyncio.run` ends by KeyboardInterrupt, and soon."""
    ended = run_script(
        """
import asyncio, taskpool
from tests import tasks
from pathlib import Path

async def main():
    async with taskpool.Executor(1) as pool:
        task = pool.submit(tasks.hold, Path(r"started"), Path(r"release"))
        while not task.running(): await asyncio.sleep(0.001)
        print("waiting", flush=True)
        await task

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted")
""",
        signals=(("waiting", signal.SIGINT),),
    )
    assert (ended.out.splitlines(), ended.err) == (["waiting", "interrupted"], "")
    assert ended.seconds < 15


# ---------------------------------------------------------------------------------------------- who waits


@pytest.mark.core
def test_several_may_wait_for_one_future(one: taskpool.Executor, tmp_path: Path, run: Run) -> None:
    """All get the same object; whoever comes later gets it too."""
    future = one.submit(tasks.hold, tmp_path / "started", tmp_path / "release", tasks.Plain(1))

    async def wait() -> Any:
        return await future

    async def main() -> None:
        waiting = [asyncio.create_task(wait()) for _ in range(5)]
        await until((tmp_path / "started").exists)
        (tmp_path / "release").touch()
        results = await asyncio.gather(*waiting, wait())
        assert len({id(result) for result in [*results, await future, future.result(0)]}) == 1

    run(main())


def test_one_cancelled_wait_cancels_for_all(one: taskpool.Executor, notes: Path, run: Run) -> None:
    """As with a future of asyncio itself; `asyncio.shield` keeps it from that."""

    async def wait(future: taskpool.TaskFuture[Any]) -> Any:
        return await future

    async def main() -> None:
        future = one.submit(tasks.note_then, notes, "started", tasks.sleep_for_ever)
        first, second = asyncio.create_task(wait(future)), asyncio.create_task(wait(future))
        await until(lambda: lines(notes))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(future), 0.05)
        assert future.running()
        first.cancel()
        for task in (first, second):
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(future.cancelled)

    run(main())


def test_two_loops_share_an_executor(pool: Pool, tmp_path: Path) -> None:
    """Each in its thread gets its own results; one future can be awaited in both."""
    executor = pool(2)
    common = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", tasks.Plain(1))

    async def main(first: int) -> Any:
        waiting = asyncio.ensure_future(common)
        numbers = range(first, first + 200)
        assert await asyncio.gather(*(executor.run(tasks.identity, number) for number in numbers)) == list(numbers)
        seen = [record.value async for record in executor.aoutcomes(tasks.identity, numbers, ordered=True)]
        assert seen == list(numbers)
        (tmp_path / "release").touch()
        return await waiting

    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda first=first: results.append(asyncio.run(within(main(first)))))  # type: ignore[misc]
        for first in (0, 1000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        bounded(thread.join)
    assert len(results) == 2
    assert results[0] is results[1]


def test_a_loop_that_is_gone_disturbs_nobody(one: taskpool.Executor, tmp_path: Path, run: Run) -> None:
    """What resolves for it resolves, is not logged as a failure, and everything else goes on."""
    release = tmp_path / "release"
    future = one.submit(tasks.hold, tmp_path / "started", release, 1)

    async def main() -> None:
        visit = _loops.Visit(stop=lambda: None)
        future._list("_waiters").append(visit)

    run(main())
    release.touch()
    assert outcome(future) == 1
    expect_free(one)


def test_a_callback_that_hangs_holds_up_nobody_who_awaits(pool: Pool, run: Run) -> None:
    """A done callback is the program's own; a result reaches the loop past it."""
    executor, release = pool(1), threading.Event()

    async def main() -> None:
        first = executor.submit(tasks.identity, 1)
        first.add_done_callback(lambda _future: release.wait(PATIENCE))
        assert await first == 1
        assert await executor.run(tasks.identity, 2) == 2

    try:
        run(main())
    finally:
        release.set()


def test_a_fork_does_not_stop_what_its_parent_waits_for(one: taskpool.Executor, tmp_path: Path) -> None:
    """A child that closes or collects the coroutine it inherited leaves the task alone."""

    async def main() -> int:
        waiting = asyncio.create_task(one.run(tasks.hold, tmp_path / "started", tmp_path / "release", 5))
        await until((tmp_path / "started").exists)
        if (child := os.fork()) == 0:
            code = 1
            with contextlib.suppress(BaseException):
                waiting.get_coro().close()  # type: ignore[union-attr]
                code = 0
            os._exit(code)
        await until(lambda: os.waitpid(child, os.WNOHANG) == (child, 0))
        (tmp_path / "release").touch()
        return await waiting

    assert asyncio.run(within(main())) == 5


# ---------------------------------------------------------------------------------------------- places


def test_max_pending_does_not_block_the_loop(pool: Pool, run: Run) -> None:
    """However many wait, all are done in the end."""
    executor = pool(2, max_pending=3)

    async def main() -> None:
        numbers = range(500)
        assert await asyncio.gather(*(executor.run(tasks.identity, number) for number in numbers)) == list(numbers)

    run(main())


def test_no_place_in_time(pool: Pool, tmp_path: Path, run: Run) -> None:
    """`submit_timeout` bounds the wait, and the call that waited too long never starts."""
    executor = pool(1, max_pending=1, submit_timeout=0.1)

    async def main() -> None:
        holding = asyncio.create_task(executor.run(tasks.hold, tmp_path / "started", tmp_path / "release"))
        await until((tmp_path / "started").exists)
        queued = executor.submit(tasks.identity, 1)
        with pytest.raises(taskpool.QueueFullError, match=r"within submit_timeout=0\.1 seconds"):
            await executor.run(tasks.note, tmp_path / "notes", "never")
        (tmp_path / "release").touch()
        await holding
        assert await queued == 1

    run(main())
    assert lines(tmp_path / "notes") == []


def test_a_place_that_is_not_taken_goes_on_to_the_next(pool: Pool, tmp_path: Path, run: Run) -> None:
    """One who waited cannot be sent, one was cancelled just as its turn came: those behind them run."""
    executor = pool(1, max_pending=1)

    async def main() -> None:
        holding = asyncio.create_task(executor.run(tasks.hold, tmp_path / "started", tmp_path / "release"))
        await until((tmp_path / "started").exists)
        queued = executor.submit(tasks.identity, 1)
        bad, late, good = (
            asyncio.create_task(executor.run(tasks.identity, value)) for value in (tasks.FailsAtDump(), 2, 3)
        )
        await asyncio.sleep(0)
        while not late.done():  # its place is called out in another thread: cancel it around that moment
            (tmp_path / "release").touch()
            if bad.done():
                late.cancel()
            await asyncio.sleep(0)
        with pytest.raises(taskpool.NotSendableError):
            await bad
        assert await good == 3
        await asyncio.gather(holding, asyncio.wait([late]))
        assert await queued == 1

    run(main())


def test_a_shutdown_ends_the_wait_for_a_place(pool: Pool, tmp_path: Path, run: Run) -> None:
    """For each who waits."""
    executor = pool(1, max_pending=1)

    async def main() -> None:
        holding = asyncio.create_task(executor.run(tasks.hold, tmp_path / "started", tmp_path / "release"))
        await until((tmp_path / "started").exists)
        queued = executor.submit(tasks.identity, 1)
        waiting = [asyncio.create_task(executor.run(tasks.identity, 2)) for _ in range(5)]
        await asyncio.sleep(0)
        executor.shutdown(wait=False)
        (tmp_path / "release").touch()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, RuntimeError)
            assert "after shutdown" in str(error)
        await holding
        assert await queued == 1

    run(main())


# ---------------------------------------------------------------------------------------------- aoutcomes


def endless(taken: list[int]) -> Iterator[int]:
    """Count, and note how far."""
    for number in itertools.count():
        taken.append(number)
        yield number


@pytest.mark.core
@pytest.mark.parametrize("how", ["break", "aclose", "raise", "drop"])
def test_leaving_the_iteration_stops_the_rest(one: taskpool.Executor, notes: Path, run: Run, how: str) -> None:
    """However one leaves it: what runs is stopped, and what waits never starts."""
    calls = [tasks.identity, *[tasks.sleep_for_ever] * 50]
    arguments: list[tuple[Any, ...]] = [(0,), *[()] * 50]

    def note_and_call(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        tasks.note_then(notes, call[0].__name__, call[0], *call[1])

    async def iterate() -> None:
        records = one.aoutcomes(note_and_call, zip(calls, arguments, strict=True), chunksize=1)
        async for _ in records:
            await until(lambda: len(lines(notes)) == 2)
            if how == "raise":
                raise LookupError("in the body")
            if how == "drop":
                return
            break
        if how == "aclose":
            await records.aclose()
            assert await anext(records, "ended") == "ended"

    async def main() -> None:
        if how == "raise":
            with pytest.raises(LookupError):
                await iterate()
        else:
            await iterate()
        assert await one.run(tasks.identity, 7) == 7

    run(main())
    assert lines(notes) == ["identity", "sleep_for_ever"]
    assert one.stats().queued == 0


def test_one_that_is_never_asked_starts_nothing(one: taskpool.Executor, notes: Path, run: Run) -> None:
    """As a coroutine that nobody awaits."""

    async def main() -> None:
        one.aoutcomes(tasks.note, [notes], ["never"])
        await one.run(tasks.identity, 1)

    run(main())
    assert lines(notes) == []


def test_a_slow_input_lets_the_loop_go_on(one: taskpool.Executor, run: Run) -> None:
    """The loop has its turn every few milliseconds, although there is room for all that the input gives."""
    turns = 0

    def slow() -> Iterator[int]:
        for number in range(200):
            tasks.spin(0.001)
            yield number

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        counting = asyncio.create_task(count_turns())
        assert len([record async for record in one.aoutcomes(tasks.identity, slow(), buffersize=1000)]) == 200
        counting.cancel()

    run(main())
    assert turns > 200 * 1 / 20  # at least one in 20 ms


def test_a_large_list_is_read_in_small_bites(one: taskpool.Executor, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `buffersize` allows, what is read and pickled in one go takes milliseconds."""
    bites: list[float] = []
    backend = one._backend
    original = backend.submit_items

    def submit_items(job: Any, first: int, items: Any) -> None:
        began = time.thread_time()
        original(job, first, items)
        bites.append(time.thread_time() - began)

    monkeypatch.setattr(backend, "submit_items", submit_items)
    items = [{"number": number, "text": str(number)} for number in range(30_000)]

    async def main() -> int:
        return sum([record.value async for record in one.aoutcomes(len, items, buffersize=1_000_000)])

    assert run(main()) == 60_000
    assert len(bites) > 5
    assert max(bites) < 0.05


def test_a_large_result_is_loaded_in_another_thread(pool: Pool, tmp_path: Path, run: Run) -> None:
    """A result that takes its time to load holds up only whoever waits for it."""
    executor = pool(1)
    item = (tasks.LoadsWhen, tmp_path / "loading", tmp_path / "release")

    async def records() -> Any:
        return (await anext(executor.aoutcomes(padded_item, [item]))).value

    async def check(waiting: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(waiting)
        await until((tmp_path / "loading").exists)  # the loop goes on although it is being loaded
        assert not task.done()
        (tmp_path / "release").touch()
        assert len((await task)[1]) == 1 << 20
        (tmp_path / "loading").unlink()
        (tmp_path / "release").unlink()

    async def main() -> None:
        await check(executor.run(tasks.padded, 1 << 20, *item))
        await check(records())

    run(main())


def padded_item(item: tuple[Any, ...]) -> tuple[Any, bytes]:
    """Return a large result that is loaded slowly."""
    return tasks.padded(1 << 20, *item)


def test_one_task_reads_an_asynchronous_input(one: taskpool.Executor, run: Run) -> None:
    """So that it may hold a timeout open between its items; and it is closed in that task, too."""
    readers: set[asyncio.Task[Any] | None] = set()

    async def numbers() -> AsyncIterator[int]:
        try:
            async with asyncio.timeout(PATIENCE):
                for number in itertools.count():
                    readers.add(asyncio.current_task())
                    yield number
        finally:
            readers.add(asyncio.current_task())
            closed.set()

    async def main() -> None:
        async with contextlib.aclosing(one.aoutcomes(tasks.square, numbers(), ordered=True)) as records:
            async for record in records:
                if record.value == 400:
                    break
        assert closed.is_set()
        assert len(readers - {None}) == 1
        assert asyncio.current_task() not in readers

    closed = threading.Event()
    run(main())


def test_an_asynchronous_input_that_waits_costs_no_result(one: taskpool.Executor, run: Run) -> None:
    """What has ended is handed out although the next item has not come; an input may be late for `timeout`."""

    async def numbers(gate: asyncio.Event) -> AsyncIterator[int]:
        yield 1
        await gate.wait()
        yield 2

    async def main() -> None:
        gate = asyncio.Event()
        records = one.aoutcomes(tasks.square, numbers(gate))
        assert (await anext(records)).value == 1
        gate.set()
        assert (await anext(records)).value == 4
        assert await anext(records, None) is None
        with pytest.raises(taskpool.CallTimeoutError, match="1 of more than 1 items"):
            async for _ in one.aoutcomes(tasks.square, numbers(asyncio.Event()), timeout=0.3):
                pass

    run(main())


def test_an_asynchronous_input_elsewhere_is_refused(one: taskpool.Executor) -> None:
    """By calls that cannot read it, with a sentence."""

    async def numbers() -> AsyncIterator[int]:
        yield 1

    for call in (one.map, one.imap, one.outcomes):
        with pytest.raises(TypeError, match="`aoutcomes`"):
            call(tasks.square, numbers())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="single"):
        one.aoutcomes(tasks.add, numbers(), [1])  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="iterable"):
        one.aoutcomes(tasks.square, 5)  # type: ignore[call-overload]


# ---------------------------------------------------------------------------------------------- async with


def test_leaving_lets_the_loop_go_on(pool: Pool, tmp_path: Path, run: Run) -> None:
    """While it waits for what was accepted: here that is ended by the loop itself."""

    async def main() -> None:
        async with pool(1) as executor:
            future = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", 3)
            asyncio.get_running_loop().call_later(0.05, (tmp_path / "release").touch)
        assert future.result(0) == 3

    run(main())


def test_leaving_needs_no_thread_of_the_loops_own(pool: Pool, run: Run) -> None:
    """What the program runs there may keep them all."""
    release = threading.Event()

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(keeper)
        kept = asyncio.get_running_loop().run_in_executor(None, release.wait, PATIENCE)
        async with pool(1) as executor:
            assert await executor.run(tasks.identity, 1) == 1
        release.set()
        await kept

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as keeper:
        run(main())


@pytest.mark.parametrize("kind", [ValueError, asyncio.CancelledError])
def test_leaving_by_an_exception(pool: Pool, notes: Path, run: Run, kind: type[BaseException]) -> None:
    """An ordinary one cancels what waits; a cancellation stops what runs as well."""

    async def main() -> None:
        async with pool(1, grace=0.1) as executor:
            running = executor.submit(tasks.note_then, notes, "started", tasks.sleep_in_steps, 0.2)
            waiting = executor.submit(tasks.note, notes, "never")
            futures.extend([running, waiting])
            await until(lambda: lines(notes))
            raise kind

    futures: list[taskpool.TaskFuture[Any]] = []
    with pytest.raises(kind):
        run(main())
    assert futures[1].cancelled()
    assert futures[0].cancelled() == (kind is asyncio.CancelledError)
    assert lines(notes) == ["started"]


@pytest.mark.core
def test_cancelling_the_leaving_kills_what_runs(pool: Pool, notes: Path, run: Run) -> None:
    """Also what will not be stopped, and also if it is cancelled again and again; when it returns all has ended."""
    executor = pool(1, grace=60)

    async def leave() -> None:
        async with executor:
            executor.submit(tasks.note_then, notes, "started", tasks.swallow_everything)

    async def main() -> None:
        leaving = asyncio.create_task(leave())
        await until(lambda: lines(notes))
        with at_most(10, "leaving"):
            while not leaving.done():
                leaving.cancel()
                await asyncio.sleep(0.01)
        assert leaving.cancelled()
        assert executor.stats().workers == 0

    run(main())


def test_closing_the_loop_while_leaving(
    pool: Pool, notes: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Kills what runs, as cancelling does."""
    executor, loop = pool(1, grace=60), new_loop()
    coroutine = by_leaving(executor, notes)
    leaving = loop.create_task(coroutine)
    loop.run_until_complete(until(lambda: lines(notes)))
    loop.close()
    wait_until(lambda: executor.stats().workers == 0)
    leaving._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine.close()


# ---------------------------------------------------------------------------------------------- the loop is not blocked

SLOW = 0.05  # seconds: what a callback of the loop may take
COUNT = 10_000


async def through_run(executor: taskpool.Executor) -> None:
    """Run tasks from fifty coroutines, one after the other in each."""

    async def some(first: int) -> None:
        for number in range(first, first + COUNT // 50):
            assert await executor.run(tasks.identity, number) == number

    await asyncio.gather(*(some(first) for first in range(0, COUNT, COUNT // 50)))


async def through_submit(executor: taskpool.Executor) -> None:
    """Submit all, in bites, and only then await them: most results are there together."""
    futures = []
    for number in range(COUNT):
        futures.append(executor.submit(tasks.identity, number))
        if number % 100 == 0:
            await asyncio.sleep(0)
    for number, future in enumerate(futures):
        assert await future == number


async def through_aoutcomes(executor: taskpool.Executor) -> None:
    """Have all of them as outcomes."""
    seen = 0
    async for record in executor.aoutcomes(tasks.identity, range(COUNT)):
        seen += record.ok
    assert seen == COUNT


class Watch(logging.Handler):
    """Finds what blocks a loop in its debug mode, on a machine that may be busy with other things.

    The loop goes by the wall clock: it also reports callbacks during which the thread was merely not run. So each step
    of a task and each answer of the bell, which is all that runs in the loop for us, is measured: what it computed, by
    its thread's own clock, and what it waited. That is the rest of its time without what the thread stood in the
    kernel's queue, and without what another thread, which does nothing but nap, was kept from the interpreter's lock.
    A report counts if the step behind it computed or waited for so long itself.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.blocked: list[str] = []
        self._last = (0.0, 0.0)  # of the latest step: how long it computed, how long it waited
        self._gaps = 0.0  # how long the napping thread was kept, in all
        self._woke = time.monotonic()  # when it woke last
        self._ended = threading.Event()
        self._napper = threading.Thread(target=self._nap)

    def __enter__(self) -> Self:
        self._napper.start()
        logging.getLogger("asyncio").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("asyncio").removeHandler(self)
        self._ended.set()
        self._napper.join(PATIENCE)

    def _nap(self) -> None:
        while not self._ended.wait(0.002):
            self._gaps, self._woke = self._kept(), time.monotonic()

    def _kept(self) -> float:
        """How long the napping thread was kept until now: it may still be, where the watched one ran on first."""
        return self._gaps + max(0.0, time.monotonic() - self._woke - 0.005)

    def emit(self, record: logging.LogRecord) -> None:
        """Judge what the loop reports of the step that has just ended."""
        computed, waited = self._last
        if max(computed, waited) > SLOW:
            self.blocked.append(f"computed {computed:.3f} s, waited {waited:.3f} s: {record.getMessage()}")

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measure the block."""
        wall, thread, before = time.monotonic(), time.thread_time(), _queued() + self._kept()
        try:
            yield
        finally:
            computed = time.thread_time() - thread
            kept = _queued() + self._kept() - before
            self._last = computed, time.monotonic() - wall - computed - kept

    def task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        """Make a task each of whose steps is measured."""
        return asyncio.Task(Measured(coroutine, self), loop=loop, **options)


class Measured(Coroutine[Any, Any, Any]):
    """A coroutine each of whose steps is measured."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], watch: Watch) -> None:
        self._coroutine = coroutine
        self._watch = watch

    def send(self, value: Any) -> Any:
        with self._watch.step():
            return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        with self._watch.step():
            return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._coroutine.__await__()


def _queued() -> float:
    """How long this thread has stood in the kernel's queue, in seconds, since it began."""
    with open("/proc/thread-self/schedstat", "rb") as file:  # noqa: PTH123  (as quick as can be)
        return int(file.read().split()[1]) / 1e9


@contextlib.contextmanager
def watched_loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[asyncio.AbstractEventLoop, Watch]]:
    """Make a loop in debug mode that is watched. The garbage of a whole test run is not its own to collect."""
    answer = _loops._Bell._answer
    gc.collect()
    with contextlib.ExitStack() as stack, Watch() as watch, asyncio.Runner(loop_factory=new_loop, debug=True) as runner:

        def _answer(bell: Any) -> None:
            with watch.step():
                answer(bell)

        gc.disable()
        stack.callback(gc.enable)
        monkeypatch.setattr(_loops._Bell, "_answer", _answer)
        loop = runner.get_loop()
        loop.slow_callback_duration = SLOW
        loop.set_task_factory(watch.task)
        yield loop, watch


linux_only = pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="needs Linux's accounting")


@linux_only
@pytest.mark.timeout(150)
@pytest.mark.parametrize("way", [through_run, through_submit, through_aoutcomes], ids=lambda way: way.__name__)
def test_ten_thousand_tasks_block_the_loop_nowhere(
    pool: Pool,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    way: Callable[[taskpool.Executor], Coroutine[Any, Any, None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop's own debug mode reports no callback of more than 50 ms that is the work of this library."""
    executor = pool(2)
    with watched_loop(new_loop, monkeypatch) as (loop, watch):
        loop.run_until_complete(loop.create_task(way(executor)))
    assert watch.blocked == []


@linux_only
def test_the_watch_of_that_test_sees_what_blocks(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By computing and by waiting; a step in between is none."""

    async def main() -> None:
        await asyncio.sleep(0)
        end = time.thread_time() + 2 * SLOW
        while time.thread_time() < end:
            pass
        await asyncio.sleep(0)
        threading.Event().wait(10 * SLOW)
        await asyncio.sleep(0)

    with watched_loop(new_loop, monkeypatch) as (loop, watch):
        loop.run_until_complete(loop.create_task(main()))
    assert len(watch.blocked) == 2


def test_one_wake_up_serves_many(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives before the loop answers is not announced again."""

    async def main() -> None:
        loop, calls = asyncio.get_running_loop(), 0
        futures = [TaskFuture[int]() for _ in range(1000)]
        waiting = [asyncio.ensure_future(future) for future in futures]
        await asyncio.sleep(0)
        bell = _loops._bell_of(loop)

        class Counting:
            def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
                nonlocal calls
                calls += 1
                loop.call_soon_threadsafe(call)

            def __getattr__(self, name: str) -> Any:
                return getattr(loop, name)

        monkeypatch.setattr(bell, "loop", Counting())
        for number, future in enumerate(futures):
            future.set_running_or_notify_cancel()
            future.finish(Value(number))
        assert await asyncio.gather(*waiting) == list(range(1000))
        assert calls == 1

    run(main())


# ---------------------------------------------------------------------------------------------- anyio

ANYIO = [
    pytest.param({"use_uvloop": False}, id="asyncio"),
    pytest.param({"use_uvloop": True}, id="uvloop", marks=needs_uvloop),
]
on_anyio = pytest.mark.parametrize("options", ANYIO)


@pytest.mark.core
@on_anyio
@in_each_way
def test_a_cancel_scope_stops_the_task(one: taskpool.Executor, notes: Path, options: dict[str, Any], way: Way) -> None:
    """`move_on_after` moves on, `fail_after` fails, and both free the worker."""

    async def main() -> None:
        with anyio.move_on_after(0.1) as scope:
            await way(one, notes)
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError), anyio.fail_after(0.1):
            await way(one, notes)
        with anyio.fail_after(PATIENCE):
            assert await one.run(tasks.identity, 7) == 7

    anyio.run(main, backend_options=options)


@on_anyio
def test_a_task_group_stops_its_tasks(pool: Pool, notes: Path, options: dict[str, Any]) -> None:
    """The failure of one cancels the others, in the workers too."""
    executor = pool(2)

    async def fail() -> None:
        await until(lambda: lines(notes))
        await executor.run(tasks.fail, LookupError, "first")

    async def main() -> None:
        with anyio.fail_after(PATIENCE):
            with pytest.raises(ExceptionGroup) as caught:
                async with anyio.create_task_group() as group:
                    group.start_soon(by_run, executor, notes)
                    group.start_soon(fail)
            assert [type(error) for error in caught.value.exceptions] == [LookupError]
            assert await executor.run(tasks.identity, 7) == 7
        await until(lambda: executor.stats().running == 0)

    anyio.run(main, backend_options=options)


@on_anyio
def test_a_cancelled_scope_is_left_when_all_has_ended(pool: Pool, notes: Path, options: dict[str, Any]) -> None:
    """A scope cancels again in each turn of the loop: `async with` waits for its bounded end all the same."""
    executor = pool(1, grace=60)

    async def main() -> None:
        with anyio.move_on_after(0.3) as scope:
            async with executor:
                executor.submit(tasks.note_then, notes, "started", tasks.swallow_everything)
        assert scope.cancelled_caught
        assert executor.stats().workers == 0

    with at_most(10):
        anyio.run(main, backend_options=options)


@on_anyio
def test_an_input_may_hold_a_cancel_scope(one: taskpool.Executor, options: dict[str, Any]) -> None:
    """A scope must be left in the task in which it was entered: one task reads the input."""

    async def numbers() -> AsyncIterator[int]:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            for number in itertools.count():
                yield number
                await anyio.lowlevel.checkpoint()

    async def main() -> None:
        with anyio.fail_after(PATIENCE):
            async with contextlib.aclosing(one.aoutcomes(tasks.square, numbers(), ordered=True)) as records:
                assert [(await anext(records)).value for _ in range(10)] == [number**2 for number in range(10)]
            assert await one.run(tasks.identity, 7) == 7

    anyio.run(main, backend_options=options)
