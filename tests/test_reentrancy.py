"""`submit`, `cancel` and `shutdown(wait=False)` from callbacks, signal handlers and many threads at once."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import tasks
from tests.helpers import (
    PATIENCE,
    Backend,
    at_most,
    bounded,
    lines,
    on_hosts,
    on_pools,
    outcome,
    run_script,
    wait_until,
)

Pool = Callable[..., taskpool.Executor]


# ---------------------------------------------------------------------------------------------- callbacks


@pytest.mark.core
@on_pools
def test_callbacks_submit(pool: Pool) -> None:
    """Each submits the next, hundreds in a chain."""
    executor = pool(2)
    end: Future[int] = Future()

    def go_on(future: Future[int]) -> None:
        number = future.result(0)
        if number == 300:
            end.set_result(number)
        else:
            executor.submit(tasks.add, number, 1).add_done_callback(go_on)

    executor.submit(tasks.identity, 0).add_done_callback(go_on)
    assert end.result(PATIENCE) == 300


@on_pools
def test_callbacks_cancel_others(pool: Pool, tmp_path: Path) -> None:
    """Queued ones, themselves, and those that are done."""
    executor = pool(1)
    first = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    queued = [executor.submit(tasks.note, tmp_path / "notes", number) for number in range(10)]
    answers: list[bool] = []
    called = threading.Event()

    def cancel_all(future: Future[Any]) -> None:
        answers.extend(other.cancel() for other in [*queued[1:], future])
        called.set()

    first.add_done_callback(cancel_all)
    queued[9].add_done_callback(lambda _: queued[8].cancel())
    (tmp_path / "release").touch()
    assert called.wait(PATIENCE)
    wait(queued, PATIENCE)
    assert answers[-1] is False
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    for number, future in enumerate(queued):
        assert outcome(future) == number or future.cancelled()
    assert sorted(map(int, lines(tmp_path / "notes"))) == [
        n for n, future in enumerate(queued) if not future.cancelled()
    ]


@on_hosts
def test_a_callback_cancels_a_running_task(pool: Pool, tmp_path: Path) -> None:
    """It is stopped."""
    executor = pool(2, grace=0.1)
    running = executor.submit(tasks.note_then, tmp_path / "notes", "started", tasks.swallow_everything)
    wait_until(lambda: lines(tmp_path / "notes"))
    executor.submit(tasks.spin, 0.02).add_done_callback(lambda _: running.cancel())
    assert isinstance(outcome(running), CancelledError)


@on_pools
def test_a_callback_ends_the_executor_without_waiting(pool: Pool) -> None:
    """What was accepted still runs."""
    executor = pool(2)
    futures = [executor.submit(tasks.spin_and_answer, 0.01, number) for number in range(20)]
    futures[3].add_done_callback(lambda _: executor.shutdown(wait=False))
    assert [future.result(PATIENCE) for future in futures] == list(range(20))
    wait_until(lambda: _is_shut(executor))


def _is_shut(executor: taskpool.Executor) -> bool:
    try:
        executor.submit(tasks.identity, 1)
    except RuntimeError:
        return True
    return False


# ---------------------------------------------------------------------------------------------- threads


@pytest.mark.core
@on_pools
def test_many_threads_submit_and_cancel(pool: Pool, tmp_path: Path) -> None:
    """Every future resolves once, rightly, and what was not cancelled ran once."""
    executor = pool(2, grace=0.05)
    notes = tmp_path / "notes"
    results: dict[str, Future[Any]] = {}
    calls: Counter[str] = Counter()
    lock = threading.Lock()

    def count(tag: str) -> None:
        with lock:
            calls[tag] += 1

    def work(name: int) -> None:
        chance = random.Random(name)
        for number in range(60):
            tag = f"{name}-{number}"
            future = executor.submit(tasks.note, notes, tag)
            future.add_done_callback(lambda _, tag=tag: count(tag))
            results[tag] = future
            if chance.random() < 0.2:
                future.cancel()
            if chance.random() < 0.1:
                outcome(future)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 2)
    assert not any(thread.is_alive() for thread in threads)
    for tag, future in results.items():
        assert outcome(future) == tag or future.cancelled()
    wait_until(lambda: len(calls) == 720)
    assert set(calls.values()) == {1}
    noted = Counter(lines(notes))
    assert set(noted.values()) == {1}
    assert {tag for tag, future in results.items() if not future.cancelled()} <= set(noted)


@on_pools
def test_threads_map_at_once(pool: Pool) -> None:
    """Each gets its own results in order."""
    executor = pool(2)
    results: dict[int, list[int]] = {}

    def work(step: int) -> None:
        results[step] = list(executor.map(tasks.add, range(200), [step] * 200))

    threads = [threading.Thread(target=work, args=(step,)) for step in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == {step: [number + step for number in range(200)] for step in range(6)}


@on_pools
@pytest.mark.parametrize("end", ["shutdown", "terminate"])
def test_threads_race_with_the_end(pool: Pool, end: str) -> None:
    """Each submission is either refused or resolved; nobody waits for ever."""
    executor = pool(2)
    accepted: list[Future[Any]] = []
    go = threading.Event()

    def work() -> None:
        go.wait(PATIENCE)
        while True:
            try:
                accepted.append(executor.submit(tasks.square, 3))
            except RuntimeError:
                return

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    go.set()
    wait_until(lambda: len(accepted) > 30)
    enders = [threading.Thread(target=getattr(executor, end)) for _ in range(3)]
    for thread in [*enders]:
        thread.start()
    for thread in [*threads, *enders]:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    for future in accepted:
        assert outcome(future) == 9 or future.cancelled()


@on_hosts
def test_executors_come_and_go_in_threads(backend: Backend) -> None:
    """Starting and ending workers in one thread disturbs no other."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                with taskpool.Executor(1, **backend.options) as executor:
                    assert executor.submit(tasks.square, 4).result(PATIENCE) == 16
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 2)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors


# ---------------------------------------------------------------------------------------------- signal handlers

STORM = """
import signal, sys, time
import taskpool
from concurrent.futures import wait
from tests import tasks

def main():
    executor = taskpool.Executor(2, grace=0.1, **{options})
    executor.submit(tasks.identity, 0).result(20)
    from_handler, numbers = [], iter(range(2000))

    def handler(*_):  # it may be interrupted by itself
        for number in numbers:
            from_handler.append((number, executor.submit(tasks.identity, number)))
            if number % 7 == 0:
                from_handler[number // 2][1].cancel()
            break

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
    futures = [executor.submit(tasks.square, number) for number in range(3000)]
    for future in futures[::50]:
        future.result(20)
    for future in futures[1::100]:
        future.cancel()
    executor.stats()
    mapped = list(executor.map(tasks.square, range(2000)))
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert mapped == [number * number for number in range(2000)]
    done, pending = wait([*futures, *(future for _, future in from_handler)], 30)
    assert not pending, len(pending)
    for number, future in enumerate(futures):
        assert future.cancelled() or future.result(0) == number * number
    for number, future in from_handler:
        assert future.cancelled() or future.result(0) == number
    assert len(from_handler) > 20, len(from_handler)
    executor.shutdown(timeout=10)
    print("all resolved")

if __name__ == "__main__":
    main()
"""


@on_pools
def test_a_storm_of_signals_submits_and_cancels(backend: Backend) -> None:
    """A handler that submits and cancels interrupts submitting, cancelling, mapping and waiting at any point."""
    ended = run_script(STORM.format(options=backend.options), timeout=60)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == ["all resolved"]


HANDLER_ENDS = """
import os, signal, time
import taskpool
from tests import tasks

def main():
    executor = taskpool.Executor(2, **{options})
    futures = []
    signal.signal(signal.SIGALRM, lambda *_: executor.shutdown(wait=False, cancel_futures={cancel}))
    executor.submit(tasks.identity, 0).result(20)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        while True:
            futures.append(executor.submit(tasks.square, 3))
    except RuntimeError as error:
        assert "after shutdown" in str(error), error
    for future in futures:
        try:
            assert future.result(20) == 9
        except BaseException as error:
            assert future.cancelled(), error
    print("resolved")

if __name__ == "__main__":
    main()
"""


@on_pools
@pytest.mark.parametrize("cancel", [False, True])
def test_a_signal_handler_ends_the_executor(backend: Backend, cancel: bool) -> None:
    """In the middle of a submission."""
    ended = run_script(HANDLER_ENDS.format(options=backend.options, cancel=cancel), timeout=60)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == ["resolved"]


INTERRUPTED = """
import signal, time
import taskpool
from concurrent.futures import wait
from tests import tasks

class Interruption(KeyboardInterrupt):
    pass

def interrupt(*_):
    raise Interruption

def main():
    executor = taskpool.Executor(2, **{options})
    executor.submit(tasks.identity, 0).result(20)
    signal.signal(signal.SIGALRM, interrupt)
    futures, interruptions = [], 0
    end = time.monotonic() + 3
    while time.monotonic() < end and interruptions < 300:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005)
            for number in range(100):
                futures.append((number, executor.submit(tasks.square, number)))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interruption:
            interruptions += 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interruption:
        pass
    assert interruptions > 5, interruptions
    for number, future in futures:
        assert future.result(20) == number * number
    for number in range(50):
        assert executor.submit(tasks.square, number).result(20) == number * number
    executor.shutdown(timeout=10)
    print("whole")

if __name__ == "__main__":
    main()
"""


@on_hosts
def test_an_exception_out_of_a_handler_breaks_no_submission(backend: Backend) -> None:
    """As Ctrl-C does: it may strike anywhere inside `submit`; the futures that were given are right."""
    ended = run_script(INTERRUPTED.format(options=backend.options), timeout=60)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == ["whole"]


@on_pools
def test_the_end_from_two_sides(pool: Pool) -> None:
    """`shutdown` in a thread while the `with` block is left."""
    with at_most(PATIENCE), pool(2) as executor:
        futures = [executor.submit(tasks.square, number) for number in range(50)]
        ending = threading.Thread(target=executor.shutdown)
        ending.start()
    ending.join(PATIENCE)
    assert not ending.is_alive()
    assert [future.result(0) for future in futures] == [number * number for number in range(50)]
    bounded(executor.shutdown)
