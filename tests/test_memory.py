"""Memory is bounded: endless inputs, slow consumers, full queues; and nothing of a finished task is kept."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool.backends.base import Slots
from tests import processes, tasks
from tests.helpers import PATIENCE, Backend, at_most, bounded, lines, on_all, on_hosts, on_pools, outcome, wait_until

Pool = Callable[..., taskpool.Executor]


class Taken:
    """An endless input that counts what was taken from it."""

    def __init__(self, size: int = 0) -> None:
        self.count = 0
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        """Yield numbers, or fresh bytes of a size."""
        for number in itertools.count():
            self.count += 1
            yield bytes(self.size) if self.size else number


def _settled(executor: taskpool.Executor) -> bool:
    stats = executor.stats()
    return stats.queued == stats.running == 0


# ---------------------------------------------------------------------------------------------- maps


@pytest.mark.core
@on_pools
@pytest.mark.parametrize("buffersize", [1, 2, 8])
def test_a_slow_consumer_stops_the_reading(pool: Pool, buffersize: int) -> None:
    """Once the buffer's tasks are done nothing moves until somebody takes a result."""
    executor = pool(2)
    numbers = Taken()
    results = executor.map(tasks.square, numbers, buffersize=buffersize)
    for consumed in range(1, 20):
        assert next(results) == (consumed - 1) ** 2
        wait_until(lambda: _settled(executor))
        assert numbers.count <= consumed + buffersize + 1
    results.close()  # type: ignore[attr-defined]


@on_pools
def test_the_default_read_ahead_is_bounded(pool: Pool) -> None:
    """A consumer that stops after the first result leaves the input alone."""
    executor = pool(2)
    numbers = Taken()
    results = executor.map(tasks.sleep_in_steps, (0.001 for _ in numbers))
    next(results)
    wait_until(lambda: _settled(executor))
    taken = numbers.count
    assert taken < 1000
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert numbers.count == taken
    results.close()  # type: ignore[attr-defined]


@on_hosts
def test_an_endless_input_of_large_items_needs_bounded_memory(pool: Pool) -> None:
    """Four hundred items of a megabyte pass through, there and back."""
    executor = pool(2)
    results = executor.map(tasks.identity, Taken(1_000_000), buffersize=8)
    for result in itertools.islice(results, 50):
        assert len(result) == 1_000_000
    before = processes.resident()
    peak = 0
    for result in itertools.islice(results, 400):
        assert len(result) == 1_000_000
        peak = max(peak, processes.resident())
    assert peak - before < 100_000_000
    results.close()  # type: ignore[attr-defined]


@on_hosts
def test_results_that_were_given_are_not_kept(pool: Pool) -> None:
    """By the iterator of a map, while it goes on."""
    results = pool(2).map(tasks.make, itertools.repeat(tasks.Plain, 50), range(50))
    references = []
    for result in itertools.islice(results, 30):
        references.append(weakref.ref(result))
    del result
    gc.collect()
    assert not any(reference() for reference in references)
    assert len(list(results)) == 20


@on_hosts
def test_large_results_nobody_asked_for_are_freed(pool: Pool) -> None:
    """With their futures."""
    executor = pool(2)
    futures = [executor.submit(tasks.payload, 5_000_000) for _ in range(30)]
    wait_until(lambda: all(future.done() for future in futures))
    full = _trimmed()
    futures.clear()
    gc.collect()
    wait_until(lambda: _trimmed() < full - 80_000_000, 5, "memory given back")


def _trimmed() -> int:
    """Return the resident memory, without what the C library keeps for later, and that of files in memory."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    return processes.resident() + processes.in_memory_files()


# ---------------------------------------------------------------------------------------------- full queues


def _fill(executor: taskpool.Executor, folder: Path) -> list[Future[Any]]:
    first = executor.submit(tasks.hold, folder / "started", folder / "release")
    wait_until((folder / "started").exists)
    wait_until(lambda: executor.stats().running == 1)
    return [first, *(executor.submit(tasks.identity, n) for n in range(3))]


@pytest.mark.core
@on_pools
def test_a_full_queue_blocks_submit_until_there_is_room(pool: Pool, tmp_path: Path) -> None:
    """And then the task runs."""
    executor = pool(1, max_pending=3)
    futures = _fill(executor, tmp_path)
    accepted: list[Future[Any]] = []
    caller = threading.Thread(target=lambda: accepted.append(executor.submit(tasks.identity, "late")))
    caller.start()
    with pytest.raises(taskpool.QueueFullError):  # by its own wait this shows that the other caller waits as well
        executor.options(submit_timeout=0.3).submit(tasks.identity, "never")
    assert caller.is_alive()
    assert not accepted
    (tmp_path / "release").touch()
    caller.join(PATIENCE)
    assert accepted[0].result(PATIENCE) == "late"
    assert [future.result(PATIENCE) for future in futures] == [None, 0, 1, 2]


@pytest.mark.core
@on_pools
@pytest.mark.parametrize("limit", [0, 0.2])
def test_a_full_queue_refuses_after_submit_timeout(pool: Pool, tmp_path: Path, limit: float) -> None:
    """With an error of its own, and what was refused never runs."""
    executor = pool(1, max_pending=3, submit_timeout=limit)
    futures = _fill(executor, tmp_path)
    started = time.monotonic()
    with pytest.raises(taskpool.QueueFullError) as caught:
        executor.submit(tasks.note, tmp_path / "notes", "refused")
    assert limit <= time.monotonic() - started < limit + 1
    assert "max_pending" in str(caught.value)
    assert "3" in str(caught.value)
    (tmp_path / "release").touch()
    assert [future.result(PATIENCE) for future in futures] == [None, 0, 1, 2]
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert not lines(tmp_path / "notes")


@on_hosts
def test_an_interrupted_submit_takes_no_place(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a signal handler raises in it."""
    executor = pool(1, max_pending=2, submit_timeout=0)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    take = Slots.take

    def take_and_raise(*args: Any) -> None:
        take(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Slots, "take", take_and_raise)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            executor.submit(tasks.identity, 1)
    monkeypatch.undo()
    assert executor.submit(tasks.identity, 2).result(PATIENCE) == 2


@on_pools
def test_cancelling_a_queued_task_makes_room(pool: Pool, tmp_path: Path) -> None:
    """While the one before it still runs."""
    executor = pool(1, max_pending=3, submit_timeout=0)
    futures = _fill(executor, tmp_path)
    assert futures[2].cancel()
    late = executor.options(submit_timeout=PATIENCE).submit(tasks.identity, "late")
    with pytest.raises(taskpool.QueueFullError):
        executor.submit(tasks.identity, "never")
    (tmp_path / "release").touch()
    assert late.result(PATIENCE) == "late"


@on_pools
def test_a_full_queue_in_a_callback_refuses_at_once(pool: Pool, tmp_path: Path) -> None:
    """Nobody waits where the waiting itself would keep the queue full."""
    executor = pool(1, max_pending=1)
    answer: Future[Any] = Future()

    def submit_many(_: Future[Any]) -> None:
        try:
            for number in range(1000):
                executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", number)
            answer.set_result("accepted all")
        except BaseException as error:
            answer.set_exception(error)

    executor.submit(tasks.spin, 0.02).add_done_callback(submit_many)
    try:
        with at_most(5), pytest.raises(taskpool.QueueFullError):
            answer.result(PATIENCE)
    finally:
        (tmp_path / "release").touch()


@on_hosts
def test_a_full_queue_does_not_outlive_the_executor(pool: Pool, tmp_path: Path) -> None:
    """A caller that waits for room is told when there will be none."""
    executor = pool(1, max_pending=3, grace=0.1)
    _fill(executor, tmp_path)
    answer: Future[Future[Any]] = Future()

    def submit() -> None:
        try:
            answer.set_result(executor.submit(tasks.identity, "never"))
        except BaseException as error:
            answer.set_exception(error)

    caller = threading.Thread(target=submit)
    caller.start()
    with pytest.raises(taskpool.QueueFullError):
        executor.options(submit_timeout=0.2).submit(tasks.identity, "never")
    bounded(lambda: executor.terminate(timeout=3))
    caller.join(PATIENCE)
    if answer.exception(0):
        assert isinstance(answer.exception(), RuntimeError | taskpool.QueueFullError)
    else:
        assert isinstance(outcome(answer.result()), CancelledError)


@on_hosts
def test_crashes_and_limits_make_room(pool: Pool) -> None:
    """However a task ends, its place is free again."""
    executor = pool(1, max_pending=2, grace=0.1)
    for task in (tasks.kill_itself, tasks.sleep_for_ever, tasks.FailsAtDump):
        futures = [executor.options(task_timeout=0.1).submit(task) for _ in range(6)]
        assert all(isinstance(outcome(future), Exception) for future in futures)
    unsendable = [executor.submit(tasks.identity, threading.Lock()) for _ in range(6)]
    assert all(isinstance(outcome(future), taskpool.NotSendableError) for future in unsendable)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


# ---------------------------------------------------------------------------------------------- references


def _gone(reference: weakref.ref[Any]) -> bool:
    gc.collect()
    return reference() is None


@pytest.mark.core
@on_all
@pytest.mark.parametrize("task", [tasks.identity, tasks.watch_and_fail], ids=lambda task: task.__name__)
def test_arguments_of_a_finished_task_are_freed(pool: Pool, task: Callable[[Any], Any], backend: Backend) -> None:
    """In the parent, though the future is kept."""
    executor = pool(1)
    argument = tasks.Plain(1)
    reference = weakref.ref(argument)
    future = executor.submit(task, argument)
    del argument
    result = outcome(future)
    if not backend.hosted:
        result = future = None  # there the result is the argument, and the error's frames hold it
    wait_until(lambda: _gone(reference), 5, "the argument freed")
    del result, future


@pytest.mark.core
@on_all
def test_results_are_freed_with_their_future(pool: Pool) -> None:
    """Nothing else keeps them."""
    executor = pool(1)
    future = executor.submit(tasks.make, tasks.Plain, 1)
    reference = weakref.ref(future.result(PATIENCE))
    kept = weakref.ref(future)
    del future
    wait_until(lambda: _gone(reference) and _gone(kept), 5, "future and result freed")
    failing = executor.submit(tasks.fail, tasks.TwoArguments, 1, "one")
    error = weakref.ref(outcome(failing))
    del failing
    wait_until(lambda: _gone(error), 5, "the exception freed")


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("task", [tasks.watch, tasks.watch_and_fail], ids=lambda task: task.__name__)
def test_a_worker_keeps_no_argument(pool: Pool, task: Callable[[Any], Any]) -> None:
    """When it takes the next task the last one's are gone, also after an exception."""
    executor = pool(1)
    outcome(executor.submit(task, tasks.Plain(1)))
    assert executor.submit(tasks.watched_is_gone).result(PATIENCE)


@on_hosts
def test_a_worker_keeps_no_result(pool: Pool) -> None:
    """Nor the items and results of a chunk."""
    executor = pool(1)
    assert executor.submit(tasks.watch_result).result(PATIENCE) == tasks.Plain(1)
    assert executor.submit(tasks.watched_is_gone).result(PATIENCE)
    list(executor.map(tasks.watch, [tasks.Plain(n) for n in range(5)], chunksize=5))
    assert executor.submit(tasks.watched_is_gone).result(PATIENCE)


@on_all
def test_cancelled_tasks_are_freed(pool: Pool, tmp_path: Path, backend: Backend) -> None:
    """Their arguments do not wait for their turn in the queue."""
    if backend.name == "serial":
        pytest.skip("nothing is ever queued there")
    executor = pool(1)
    executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    argument = tasks.Plain(1)
    reference = weakref.ref(argument)
    future = executor.submit(tasks.identity, argument)
    del argument
    assert future.cancel()
    wait_until(lambda: _gone(reference), 5, "the argument freed")
    (tmp_path / "release").touch()


@on_hosts
def test_a_dropped_executor_is_collected(backend: Backend) -> None:
    """With a warning; its workers and threads end, and what it had accepted resolves."""
    with pytest.warns(ResourceWarning, match="shutdown"):
        reference, futures = _use_and_drop(backend)
    assert reference() is None
    for number, future in enumerate(futures):
        got = outcome(future)
        assert got == number * number or future.cancelled()


def _use_and_drop(backend: Backend) -> tuple[weakref.ref[Any], list[Future[Any]]]:
    executor = taskpool.Executor(1, **backend.options)
    futures = [executor.submit(tasks.square, number) for number in range(20)]
    assert futures[0].result(PATIENCE) == 0
    reference = weakref.ref(executor)
    del executor
    gc.collect()
    return reference, futures


def test_threads_that_wait_for_a_place_sleep(pool: Pool, tmp_path: Path) -> None:
    """However many they are: they need no processor time, and the bound holds."""
    executor = pool(1, max_pending=2)
    _fill_places(executor, tmp_path)
    threads = [threading.Thread(target=executor.submit, args=(tasks.identity, n)) for n in range(6)]
    for thread in threads:
        thread.start()
    slots = executor._backend._slots
    wait_until(lambda: len(slots._sleepers) == len(threads))
    slots._wake_one()  # a call that brings no place
    wait_until(lambda: len(slots._sleepers) == len(threads))
    used = time.process_time()
    time.sleep(0.3)  # in which nothing may happen
    assert time.process_time() - used < 0.1
    assert len(slots._holders) == 2
    (tmp_path / "release").touch()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)


def _fill_places(executor: taskpool.Executor, folder: Path) -> None:
    executor.submit(tasks.hold, folder / "started", folder / "release")
    wait_until((folder / "started").exists)
    for number in range(2):
        executor.submit(tasks.identity, number)
