"""The short way: the thread that waits for a result takes it from the worker itself, whatever interrupts it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

import taskpool
from taskpool import TaskFuture
from taskpool._engine.channel import Channel
from taskpool._task import Value
from tests import tasks
from tests.helpers import FULL, PATIENCE, Backend, all_stacks, at_most, bounded, on_hosts, run_script, wait_until

Pool = Callable[..., taskpool.Executor]

pytestmark = pytest.mark.core


def test_a_future_has_the_fields_of_the_base_class() -> None:
    """It does not call the base class's `__init__`, so what a new Python adds there would be missing."""
    assert set(vars(Future())) <= set(dir(TaskFuture()))
    assert isinstance(TaskFuture()._condition, threading.Condition)


@on_hosts
def test_a_worker_is_idle_as_soon_as_its_result_is_there(pool: Pool) -> None:
    """Whoever took the result has also put the worker back, and counted."""
    executor = pool(1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    for number in range(200):
        assert executor.submit(tasks.identity, number).result(PATIENCE) == number
    stats = executor.stats()
    assert (stats.idle, stats.queued, stats.running, stats.finished) == (1, 0, 0, 201)


@on_hosts
def test_many_threads_wait_for_one_task(pool: Pool) -> None:
    """All of them get its result, and so do those that wait with a timeout again and again."""
    executor = pool(1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    for number in range(20):
        future = executor.submit(tasks.pid_after, 0.001)
        got: list[object] = []
        threads = [threading.Thread(target=_get, args=(future, got)) for _ in range(6)]
        for thread in threads:
            thread.start()
        while not future.done():
            try:
                future.result(0.0001)
            except TimeoutError:
                continue
        for thread in threads:
            thread.join(PATIENCE)
        assert len(got) == 6, (number, all_stacks())
        assert len(set(got)) == 1


@on_hosts
def test_a_large_result_that_is_asked_for_again_and_again(pool: Pool) -> None:
    """A thread that comes while it is arriving leaves it to the dispatcher, which has begun to read it."""
    executor = pool(1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    for _ in range(10):
        future = executor.submit(tasks.payload, 8_000_000)
        while not future.done():
            with contextlib.suppress(TimeoutError):
                future.result(0.0002)
        assert future.result(PATIENCE) == tasks.payload(8_000_000)


def _get(future: TaskFuture[int], got: list[object]) -> None:
    got.append(future.result(PATIENCE))


@on_hosts
def test_results_reach_those_who_wait_in_other_ways(pool: Pool) -> None:
    """`wait`, `as_completed` and callbacks hear of a result that a waiting thread took."""
    executor = pool(1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    for number in range(50):
        future = executor.submit(tasks.identity, number)
        called = threading.Event()
        future.add_done_callback(lambda _, called=called: called.set())  # type: ignore[misc]
        waiter = threading.Thread(target=concurrent.futures.wait, args=([future],))
        waiter.start()
        assert future.result(PATIENCE) == number
        waiter.join(PATIENCE)
        assert not waiter.is_alive()
        assert called.wait(PATIENCE)


@on_hosts
def test_a_worker_dies_while_its_result_is_awaited(pool: Pool) -> None:
    """The waiting thread hears of it at once."""
    executor = pool(1)
    for _ in range(10):
        executor.submit(tasks.identity, 0).result(PATIENCE)
        with at_most(5), pytest.raises(taskpool.WorkerCrashedError):
            executor.submit(tasks.kill_itself).result(PATIENCE)


class Interrupt(BaseException):
    """Raised by a signal handler."""


@pytest.fixture
def interrupting() -> Iterator[Callable[[float], None]]:
    """Set or clear (0) the time after which SIGALRM's handler raises in the main thread."""
    is_set = False  # the interpreter may run a handler some bytecodes after the timer was cleared

    def handler(*_: object) -> None:
        if is_set:
            raise Interrupt

    def interrupt_in(seconds: float) -> None:
        nonlocal is_set
        is_set = seconds > 0
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.signal(signal.SIGALRM, handler)
    yield interrupt_in
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@on_hosts
def test_an_interrupt_just_before_the_sending(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next calls are sent behind one that the worker never gets, and their results are not taken for anything else."""
    executor = pool(1)
    for number in range(40):  # until it is known that they are short, and may be sent ahead
        assert executor.submit(tasks.identity, number).result(PATIENCE) == number

    def interrupt(_channel: Channel, _packet: bytes) -> bool:
        monkeypatch.undo()
        raise Interrupt

    monkeypatch.setattr(Channel, "send_packet", interrupt)
    with pytest.raises(Interrupt):
        executor.submit(tasks.identity, 3)
    futures = [executor.submit(tasks.identity, number) for number in range(4, 14)]
    assert [future.result(PATIENCE) for future in futures] == list(range(4, 14))
    assert executor.stats().crashed == 0


@pytest.mark.timeout(300)
def test_interrupts_at_any_moment(pool: Pool, backend: Backend, interrupting: Callable[[float], None]) -> None:
    """Whatever a handler interrupts in `submit` and `result`, each future that was returned gets its result."""
    executor = pool(1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    dice = random.Random(backend.name)
    interrupts = 0
    for number in range(3000 if FULL else 400):
        future = None
        try:
            try:
                interrupting(dice.uniform(20e-6, 350e-6))
                future = executor.submit(abs, -number)
                future.result(PATIENCE)
            finally:
                interrupting(0)
        except Interrupt:
            interrupts += 1
        if future is not None:
            assert bounded(lambda future=future: future.result(PATIENCE)) == number  # type: ignore[misc]
    assert interrupts > 20, "the handler hardly ever interrupted anything: nothing was tested"
    with at_most(10):
        executor.shutdown()


@on_hosts
def test_a_map_that_times_out_again_and_again(pool: Pool, backend: Backend) -> None:
    """What it takes back may be something that a worker has been sent and not begun: the worker goes on all the same."""
    executor = pool(2)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    dice = random.Random(backend.name)
    for number in range(600 if FULL else 100):
        with contextlib.suppress(taskpool.CallTimeoutError):
            list(executor.map(time.sleep, [0.0003] * 6, timeout=dice.uniform(0.0002, 0.003)))
        assert bounded(lambda number=number: executor.submit(abs, -number).result(PATIENCE)) == number  # type: ignore[misc]


def test_a_handler_submits_under_a_bound(pool: Pool) -> None:
    """`max_pending` holds no lock that the interrupted thread might have."""
    executor = pool(1, max_pending=100_000)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    submitted: list[TaskFuture[int]] = []
    before = signal.signal(signal.SIGALRM, lambda *_: submitted.append(executor.submit(abs, -1)))
    dice = random.Random(7)
    try:
        for number in range(10_000 if FULL else 1_000):
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(2e-6, 6e-5))
            assert executor.submit(abs, -number).result(PATIENCE) == number
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert submitted
    assert {future.result(PATIENCE) for future in submitted} == {1}


def test_interrupts_of_the_first_submit(pool: Pool, interrupting: Callable[[float], None]) -> None:
    """There is one dispatcher, whatever moment of its start a handler interrupts."""
    dice = random.Random(11)
    for _ in range(100 if FULL else 15):
        executor = pool(1)
        try:
            try:
                interrupting(dice.uniform(30e-6, 400e-6))
                executor.submit(abs, -1)
            finally:
                interrupting(0)
        except Interrupt:
            pass
        assert bounded(executor.submit(abs, -1).result) == 1
        names = [thread.name for thread in threading.enumerate()]
        assert names.count(f"{executor.name}-dispatcher") == 1
        executor.terminate()


def test_a_future_is_resolved_alone_only_if_nobody_else_waits() -> None:
    """Otherwise whoever is to be told of it is told by a thread that no signal handler interrupts."""
    alone, watched = TaskFuture[int](), TaskFuture[int]()
    watched.add_done_callback(lambda _: None)
    for future in (alone, watched):
        assert future.set_running_or_notify_cancel()
    assert alone.finish_alone(Value(1))
    assert alone.result(0) == 1
    assert not watched.finish_alone(Value(1))
    assert not watched.done()


HANDLER = """
import signal, sys, threading, time
import taskpool

def handler(*_):
    started = time.monotonic()
    pool.{end}
    print("ended" if time.monotonic() - started < 8 else "late", flush=True)
    sys.exit(7)

signal.signal(signal.SIGTERM, handler)
with taskpool.Executor(1) as pool:
    print("ready", flush=True)
    while True:
        pool.submit(abs, -1).result()
"""


@pytest.mark.parametrize("end", ["shutdown()", "terminate()", "shutdown(wait=False)"])
def test_a_handler_ends_the_executor(end: str) -> None:
    """Also one that interrupts a thread which is just taking a result, and which cannot go on before it returns."""
    for _ in range(20 if FULL else 4):
        ended = run_script(HANDLER.format(end=end), signals=(("ready", signal.SIGTERM),))
        assert (ended.code, ended.out.replace("\n", "")) == (7, "readyended"), ended  # it may interrupt the first print


def test_a_result_comes_at_once_behind_a_long_wait(pool: Pool) -> None:
    """A thread that waits longer than the short way lasts is woken by the dispatcher."""
    executor = pool(1)
    executor.submit(tasks.identity, 0).result(PATIENCE)
    future = executor.submit(time.sleep, 0.2)
    started = time.monotonic()
    future.result(PATIENCE)
    assert time.monotonic() - started < 2
    wait_until(lambda: executor.stats().idle == 1, 5)
