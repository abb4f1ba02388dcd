"""Times as arguments: what is no time is refused by name, what is one is honoured, and only the monotonic clock counts."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import states, tasks
from tests.helpers import FULL, Backend, at_most, bounded, lines, on_all, on_hosts, on_one_host, outcome
from tests.scripts import run_main

pytestmark = pytest.mark.usefixtures("shared")

Make = Callable[..., taskpool.Executor]


class Seconds:
    """A number of some other library."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        """Return it."""
        return float(self.value)

    def __repr__(self) -> str:
        """Return it as text."""
        return f"Seconds({self.value})"


DAYS_25 = 25 * 86_400.0  # more milliseconds than fit into 31 bits
LARGE = [DAYS_25, 1e10, 1e300, 10**400, math.inf]
AT_ONCE = [0, 0.0, -1, -math.inf, 1e-9, 5e-324]
SOME_AT_ONCE = AT_ONCE if FULL else [0, -1, 1e-9]
NOT_A_TIME = ["1", b"1", "", True, False, [1], (), object(), 1j, time.sleep]
NOT_A_NUMBER = [math.nan, -math.nan, Seconds(math.nan), Decimal("nan")]

# Where a time is taken: what is called, and what the error calls the argument.
CONSTRUCTOR = ["task_timeout", "grace", "submit_timeout", "shutdown_timeout", "start_timeout", "log_timeout"]
OPTIONS = ["task_timeout", "grace", "submit_timeout"]
Place = tuple[Callable[[Make, Any], Any], str]
PLACES: dict[str, Place] = {
    **{f"Executor({n})": (lambda pool, value, n=n: pool(1, **{n: value}), n) for n in CONSTRUCTOR},
    **{f"options({n})": (lambda pool, value, n=n: pool(1).options(**{n: value}), n) for n in OPTIONS},
    "Executor.map(timeout)": (lambda pool, value: list(pool(1).map(abs, [-1], timeout=value)), "timeout"),
    "shutdown(timeout)": (lambda pool, value: pool(1).shutdown(timeout=value), "timeout"),
    "terminate(timeout)": (lambda pool, value: pool(1).terminate(timeout=value), "timeout"),
    "result(timeout)": (lambda pool, value: pool(1).submit(abs, -1).result(value), "timeout"),
    "exception(timeout)": (lambda pool, value: pool(1).submit(abs, -1).exception(value), "timeout"),
    "map(timeout)": (lambda _, value: taskpool.map(abs, [-1], timeout=value, backend="serial"), "timeout"),
    "map(task_timeout)": (lambda _, value: taskpool.map(abs, [-1], task_timeout=value), "task_timeout"),
}


def refusal(place: str, pool: Make, value: object) -> Exception:
    """Return the TypeError or ValueError with which a place refuses a value."""
    call, _ = PLACES[place]
    with at_most(5, place), pytest.raises((TypeError, ValueError)) as caught:
        call(pool, value)
    return caught.value


@pytest.mark.core
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_time_is_refused(pool: Make, place: str) -> None:
    """Text, truth values and other objects are refused with TypeError, NaN with ValueError, and the argument is named."""
    for value in [*NOT_A_TIME, *NOT_A_NUMBER]:
        error = refusal(place, pool, value)
        assert PLACES[place][1] in str(error), (value, error)
        assert isinstance(error, ValueError if value in NOT_A_NUMBER else TypeError), (value, error)


NO_ZERO = [place for place, (_, name) in PLACES.items() if name in ("task_timeout", "start_timeout")]


@pytest.mark.parametrize("place", NO_ZERO)
@pytest.mark.parametrize("value", [0, 0.0, -1, -1e-9, -math.inf, Decimal(0), Fraction(-1, 2), Seconds(0)], ids=repr)
def test_limits_must_be_positive(pool: Make, place: str, value: object) -> None:
    """A limit that no task could keep is a mistake."""
    error = refusal(place, pool, value)
    assert isinstance(error, ValueError), error
    assert PLACES[place][1] in str(error)


@pytest.mark.parametrize("place", ["Executor(grace)", "options(grace)", "Executor(log_timeout)"])
def test_where_a_bound_is_needed(pool: Make, place: str) -> None:
    """No bound at all is no choice for the time to clean up."""
    assert PLACES[place][1] in str(refusal(place, pool, None))


# ---------------------------------------------------------------------------------------------- large


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("value", LARGE, ids=str)
def test_large_times_everywhere(pool: Make, value: float) -> None:
    """Times beyond any machine's life work wherever a time is taken."""
    executor = pool(1, **dict.fromkeys(CONSTRUCTOR, value), max_pending=1)
    assert bounded(lambda: executor.submit(abs, -1).result(value)) == 1
    assert bounded(lambda: executor.submit(abs, -1).exception(value)) is None
    view = executor.options(task_timeout=value, grace=value, submit_timeout=value)
    assert bounded(lambda: list(view.map(abs, [-1, -2], timeout=value))) == [1, 2]
    bounded(lambda: executor.shutdown(timeout=value))
    bounded(lambda: executor.terminate(timeout=value))


@pytest.mark.parametrize("value", LARGE, ids=str)
def test_large_times_in_map(value: float) -> None:
    """The same on the shared executor."""
    assert bounded(lambda: taskpool.map(abs, [-1, -2], timeout=value, task_timeout=value)) == [1, 2]


@on_one_host
@pytest.mark.parametrize("value", LARGE, ids=str)
def test_large_times_wait(pool: Make, tmp_path: Path, value: float) -> None:
    """A wait of such a length waits: it neither ends at once nor fails."""
    executor = pool(1, max_pending=1, submit_timeout=value)
    running = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release", 1)
    states.expect(tmp_path / "started", 1)
    executor.submit(abs, -2)
    answers: list[Any] = []
    calls = [
        lambda: running.result(value),
        lambda: running.exception(value),
        lambda: executor.submit(abs, -4).result(value),  # waits for its place
        lambda: list(executor.map(abs, [-5], timeout=value)),
    ]
    threads = [threading.Thread(target=lambda call=call: answers.append(call()), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    assert not running.done()
    threads[0].join(0.3)
    assert answers == []
    (tmp_path / "release").touch()
    for thread in threads:
        thread.join(20)
    assert sorted(answers, key=repr) == sorted([1, None, 4, [5]], key=repr)


@on_one_host
@pytest.mark.parametrize("value", [DAYS_25, math.inf], ids=str)
def test_a_large_grace_waits_for_the_clean_up(pool: Make, tmp_path: Path, value: float) -> None:
    """A task that is stopped gets all the time it was given."""
    executor = pool(1, task_timeout=0.2, grace=value)
    future = executor.submit(states.clean_up_slowly, tmp_path / "notes", 1.0)
    assert type(outcome(future)) is taskpool.TaskTimeoutError
    assert lines(tmp_path / "notes") == ["cleaned up"]


@pytest.mark.parametrize("value", [1, Fraction(3, 4), Decimal("0.5"), Seconds(1)], ids=repr)
def test_numbers_of_any_kind(pool: Make, value: Any) -> None:
    """What converts to a float is a time."""
    executor = pool(1, task_timeout=value, grace=value, submit_timeout=value, max_pending=4)
    assert executor.submit(abs, -1).result(value) == 1
    with at_most(10):
        assert type(outcome(executor.submit(tasks.sleep_for_ever))) is taskpool.TaskTimeoutError
    bounded(lambda: executor.shutdown(timeout=value))


# ---------------------------------------------------------------------------------------------- small


@pytest.fixture
def hung(pool: Make, tmp_path: Path) -> tuple[taskpool.Executor, Future[Any]]:
    """An executor whose only worker hangs, with one task that waits, which is all it takes; and the one that hangs."""
    executor = pool(1, max_pending=1)
    future = executor.submit(states.enter, "sleeping", tmp_path / "notes")
    states.expect(tmp_path / "notes", 1)
    executor.submit(abs, -1)
    return executor, future


@pytest.mark.core
@pytest.mark.parametrize("value", AT_ONCE, ids=str)
def test_no_time_to_wait(hung: tuple[taskpool.Executor, Future[Any]], value: float) -> None:
    """Zero, less and next to nothing: one look, then the answer."""
    executor, future = hung
    with at_most(2):
        for wait_for in (future.result, future.exception):
            with pytest.raises(TimeoutError):
                wait_for(value)
        with pytest.raises(taskpool.QueueFullError):
            executor.options(submit_timeout=value).submit(abs, -2)
    assert not future.done()
    with at_most(4):
        bounded(lambda: executor.shutdown(timeout=value))
        wait([future], 3)
    assert future.done()


@pytest.mark.parametrize("value", SOME_AT_ONCE, ids=str)
def test_no_time_for_a_map(pool: Make, tmp_path: Path, value: float) -> None:
    """A map without time gives up at once and stops what it began."""
    executor = pool(1)
    assert executor.submit(abs, -1).result(20) == 1
    with at_most(3), pytest.raises(TimeoutError):
        list(executor.map(states.enter, ["sleeping"] * 3, [tmp_path / "notes"] * 3, timeout=value))
    assert outcome(executor.submit(abs, -2), 5) == 2


@pytest.mark.parametrize("value", SOME_AT_ONCE, ids=str)
def test_no_time_for_the_shared_map(tmp_path: Path, value: float) -> None:
    """The same on the shared executor."""
    with at_most(4), pytest.raises(taskpool.CallTimeoutError):
        taskpool.map(states.enter, ["sleeping"] * 3, [tmp_path / "notes"] * 3, timeout=value)


@on_one_host
@pytest.mark.parametrize("value", SOME_AT_ONCE, ids=str)
def test_no_time_for_terminate(pool: Make, tmp_path: Path, value: float) -> None:
    """`terminate` without time still stops everything; it only does not watch."""
    executor = pool(1)
    future = executor.submit(states.enter, "holding", tmp_path / "notes")
    states.expect(tmp_path / "notes", 1)
    with at_most(3):
        bounded(lambda: executor.terminate(timeout=value))
        wait([future], 2)
    assert future.done()


@on_one_host
@pytest.mark.parametrize("value", SOME_AT_ONCE, ids=str)
def test_no_time_to_clean_up(pool: Make, value: float) -> None:
    """Without grace the process ends at once."""
    executor = pool(1, task_timeout=0.2, grace=value)
    with at_most(5):
        assert type(outcome(executor.submit(tasks.swallow_everything))) is taskpool.TaskTimeoutError
    assert outcome(executor.options(task_timeout=10).submit(abs, -1)) == 1


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("value", [5e-324, 1e-4], ids=str)
def test_a_tiny_task_timeout(pool: Make, value: float) -> None:
    """A limit that is over before anything could run stops the task all the same, and the slot works."""
    executor = pool(1, grace=0.1)
    tiny = executor.options(task_timeout=value)
    for call in (tasks.sleep_for_ever, tasks.spin_for_ever, tasks.hold_the_gil):
        with at_most(1.8):
            error = outcome(tiny.submit(call))
        assert type(error) is taskpool.TaskTimeoutError, error
        assert error.seconds == value
        assert outcome(executor.submit(abs, -1)) == 1


@on_one_host
def test_a_tiny_start_timeout(pool: Make) -> None:
    """No worker can start in no time: the error says so, and nothing hangs."""
    executor = pool(1, start_timeout=1e-6)
    with at_most(8):
        assert type(outcome(executor.submit(abs, -1))) is taskpool.InitializerError


NO_TIME_AT_EXIT = """
global pool, future
pool = executor(1, shutdown_timeout=float(args[0]))
future = pool.submit(states.enter, "holding", path)
states.expect(path, 1)
"""


@on_one_host
@pytest.mark.parametrize("value", ["0", "-1", "1e-9"])
def test_no_time_at_exit(backend: Backend, tmp_path: Path, value: str) -> None:
    """With no time for shutdown the interpreter ends at once."""
    ended = run_main(NO_TIME_AT_EXIT, backend, tmp_path, value)
    assert ended.code == 0, ended
    assert ended.seconds < 6, ended


# ---------------------------------------------------------------------------------------------- clocks


class WallClock:
    """A wall clock that jumps by a day, back and forth, at each look."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        """Return some time or other."""
        self.looks += 1
        return 1.7e9 + 86_400 * (-1) ** self.looks * self.looks


@pytest.mark.core
@on_all
def test_the_wall_clock_does_not_matter(backend: Backend, pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it jumps, in the parent and in the workers, tasks keep their time and waits end when they should."""
    clock = WallClock()
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(time, "time_ns", lambda: int(clock() * 1e9))
    executor = pool(1, task_timeout=20, initializer=states.break_wall_clock if backend.hosted else None)
    assert outcome(executor.submit(abs, -1)) == 1
    assert bounded(lambda: list(executor.map(abs, range(-5, 0), timeout=20))) == [5, 4, 3, 2, 1]
    if backend.hosted:
        assert outcome(executor.submit(states.wall_clock)) == 0
        expect_time_out(executor)
    bounded(lambda: executor.shutdown(timeout=10))


def expect_time_out(executor: taskpool.Executor) -> None:
    """See a wait and a limit end after their time, not before and not much later."""
    future = executor.options(task_timeout=0.8).submit(tasks.sleep_for_ever)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        future.result(0.3)
    assert 0.3 <= time.monotonic() - started < 0.7
    assert type(outcome(future)) is taskpool.TaskTimeoutError
    assert 0.7 < time.monotonic() - started < 5
