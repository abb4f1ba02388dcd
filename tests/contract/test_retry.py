"""Every backend: a task that failed is tried again as its policy says, in the parent's time, and never more often."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import tenacity

import taskpool
from taskpool._retry import Attempts
from tests import tasks
from tests.helpers import (
    PATIENCE,
    SERIAL,
    TEMPLATE,
    THREAD,
    Backend,
    at_most,
    bounded,
    lines,
    on_all,
    on_hosts,
    on_one_host,
    on_pools,
    outcome,
    wait_until,
)

pytestmark = pytest.mark.core

Pool = Callable[..., taskpool.Executor]

on_each_engine = pytest.mark.parametrize("backend", [TEMPLATE, THREAD, SERIAL], ids=str)  # hosts all decide alike
LONG = 3600.0  # a wait that no test sees the end of
FAILS = tasks.fail, OSError, "not yet"
WORKS = tasks.identity, "done"
CRASHES = (tasks.kill_itself,)
HANGS = (tasks.sleep_for_ever,)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """The file with a line for each attempt that was made."""
    return tmp_path / "attempts"


def notes_of(error: BaseException) -> str:
    """Return what stands below an error's message."""
    return "\n".join(error.__notes__)


def await_wait(executor: taskpool.Executor, retried: int = 1) -> None:
    """Wait until so many attempts have failed and are to be followed by another one."""
    wait_until(lambda: executor.stats().retried >= retried)


# ---------------------------------------------------------------------------------------------- attempts


@on_all
def test_a_number_says_how_many_attempts_there_are(pool: Pool, notes: Path) -> None:
    """`retry=3` is three in all, the first included."""
    executor = pool(retry=3)
    assert isinstance(outcome(executor.submit(tasks.in_turn, notes, FAILS)), OSError)
    assert len(lines(notes)) == 3
    stats = executor.stats()
    assert (stats.retried, stats.failed, stats.finished) == (2, 1, 0)


@on_all
def test_success_ends_the_attempts(pool: Pool, notes: Path) -> None:
    """The result is that of the attempt that succeeded, and nothing of the failed one is left in the counts."""
    executor = pool(retry=3)
    assert executor.submit(tasks.in_turn, notes, FAILS, WORKS).result(PATIENCE) == "done"
    assert len(lines(notes)) == 2
    stats = wait_until(lambda: (stats := executor.stats()).finished and stats)
    assert (stats.retried, stats.failed, stats.finished) == (1, 0, 1)


@on_all
def test_without_a_policy_nothing_is_tried_again(pool: Pool, notes: Path) -> None:
    """Nor with a policy of one attempt."""
    executor = pool()
    for view in (executor, executor.options(retry=1)):
        error = outcome(view.submit(tasks.in_turn, notes, FAILS))
        assert isinstance(error, OSError)
        assert not hasattr(error, "__notes__")
    assert len(lines(notes)) == 2


@on_all
def test_the_last_error_is_itself_and_names_what_came_before(pool: Pool, notes: Path) -> None:
    """Type and arguments are the last attempt's; its note has the others' errors in their order."""
    steps = (
        (tasks.fail, OSError, "the first"),
        (tasks.fail, KeyError, "the second"),
        (tasks.fail, ValueError, "last", 3),
    )
    error = outcome(pool(retry=3).submit(tasks.in_turn, notes, *steps))
    assert type(error) is ValueError
    assert error.args == ("last", 3)
    assert notes_of(error).splitlines() == [
        "this was attempt 3; before it:",
        "  attempt 1: OSError: the first",
        "  attempt 2: KeyError: 'the second'",
    ]


@on_all
def test_many_attempts_make_a_short_note(pool: Pool, notes: Path) -> None:
    """The latest ten errors stand in it, each in one line that is cut."""
    error = outcome(pool(retry=30).submit(tasks.in_turn, notes, (tasks.fail, ValueError, "long\n" + "x" * 10_000)))
    text = notes_of(error)
    assert len(lines(notes)) == 30
    assert "attempt 30" in text
    assert "attempt 20: ValueError: long" in text
    assert "attempt 19" not in text
    assert len(text) < 3000


@on_all
def test_a_task_knows_its_attempt(pool: Pool, notes: Path) -> None:
    """`current_task().attempt` counts from 1, in calls and in items."""
    executor = pool(retry=3)
    assert executor.submit(tasks.current_attempt).result(PATIENCE) == 1
    steps = FAILS, FAILS, (tasks.current_attempt,)
    assert executor.submit(tasks.in_turn, notes, *steps).result(PATIENCE) == 3
    others = notes.with_name("others")
    assert list(executor.map(tasks.call, [(tasks.in_turn, others, *steps), (tasks.current_attempt,)])) == [3, 1]


@on_all
def test_each_attempt_is_logged(pool: Pool, notes: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At INFO on the logger "taskpool": which task, which attempt, why it failed, and when the next one is."""
    with caplog.at_level(logging.INFO, "taskpool"):
        outcome(pool().options(retry=3, name="fetch").submit(tasks.in_turn, notes, FAILS))
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [text for text in texts if "attempt" in text] == [
        f"task fetch: attempt {number} ended with OSError: not yet; the next one is in 0 s" for number in (1, 2)
    ]


# ---------------------------------------------------------------------------------------------- policies

THREE_TIMES: dict[str, Any] = {
    "number": 3,
    "attempts": taskpool.retry(3),
    "default": taskpool.retry(),
    "stop": taskpool.retry(stop=tenacity.stop_after_attempt(3)),
    "the earlier stop": taskpool.retry(5, stop=tenacity.stop_after_attempt(3)),
    "the earlier number": taskpool.retry(3, stop=tenacity.stop_after_attempt(5)),
    "on a class": taskpool.retry(3, on=OSError),
    "on classes": taskpool.retry(3, on=(KeyError, OSError)),
    "on a strategy": taskpool.retry(3, on=tenacity.retry_if_exception(lambda error: "yet" in str(error))),
    "wait": taskpool.retry(3, wait=0.01),
    "waiting strategy": taskpool.retry(3, wait=tenacity.wait_incrementing(0.0, 0.01)),
    "tenacity stop": tenacity.stop_after_attempt(3),
    "tenacity stops": tenacity.stop_after_attempt(3) | tenacity.stop_after_delay(60),
    "tenacity wait": tenacity.wait_none(),
    "tenacity retry": tenacity.retry_if_exception_type(OSError),
    "tenacity retries": tenacity.retry_if_exception_type(OSError) | tenacity.retry_if_result(lambda value: not value),
    "Retrying": tenacity.Retrying(stop=tenacity.stop_after_attempt(3)),
    "Retrying that raises": tenacity.Retrying(stop=tenacity.stop_after_attempt(3), reraise=True),
}


@on_each_engine
@pytest.mark.parametrize("policy", THREE_TIMES.values(), ids=THREE_TIMES)
def test_each_policy_ends_with_the_tasks_own_error(pool: Pool, notes: Path, policy: Any) -> None:
    """Three attempts, and no `RetryError`, whoever decided."""
    error = outcome(pool(retry=policy).submit(tasks.in_turn, notes, FAILS))
    assert type(error) is OSError
    assert error.args == ("not yet",)
    assert len(lines(notes)) == 3
    assert "attempt 2: OSError: not yet" in notes_of(error)


@on_each_engine
@pytest.mark.parametrize(
    "policy",
    [
        taskpool.retry(3, on=KeyError),
        taskpool.retry(3, on=(KeyError, ConnectionError)),
        taskpool.retry(3, on=()),
        tenacity.retry_if_not_exception_type(OSError),
        tenacity.retry_never,
        tenacity.Retrying(enabled=False),
    ],
    ids=["class", "classes", "nothing", "not", "never", "disabled"],
)
def test_an_error_that_does_not_match_is_not_tried_again(pool: Pool, notes: Path, policy: Any) -> None:
    """It comes out at once, and as it is."""
    error = outcome(pool(retry=policy).submit(tasks.in_turn, notes, FAILS))
    assert type(error) is OSError
    assert not hasattr(error, "__notes__")
    assert len(lines(notes)) == 1


@on_all
@pytest.mark.parametrize("wait", [0.15, tenacity.wait_fixed(0.15)], ids=["seconds", "strategy"])
def test_attempts_are_a_wait_apart(pool: Pool, notes: Path, wait: Any) -> None:
    """No less than it says."""
    started = time.monotonic()
    assert pool(retry=taskpool.retry(3, wait=wait)).submit(tasks.in_turn, notes, FAILS, FAILS, WORKS).result(PATIENCE)
    assert time.monotonic() - started >= 0.3


@on_all
def test_a_stop_by_time_counts_from_the_first_start(pool: Pool, notes: Path) -> None:
    """The time that the first attempt took counts as well."""
    policy = taskpool.retry(stop=tenacity.stop_after_delay(0.1))
    slow = tasks.sleep_and_fail, 0.15, OSError
    assert isinstance(outcome(pool(retry=policy).submit(tasks.in_turn, notes, slow)), OSError)
    assert len(lines(notes)) == 1


@on_all
def test_a_result_that_is_never_good_enough_stands(pool: Pool, notes: Path) -> None:
    """The last one, when the attempts are over; `RetryError` does not exist outside of tenacity."""
    executor = pool(retry=taskpool.retry(3, on=tenacity.retry_if_result(lambda value: value != "done")))
    bad = tasks.identity, "bad"
    assert executor.submit(tasks.in_turn, notes, bad).result(PATIENCE) == "bad"
    assert len(lines(notes)) == 3
    assert executor.submit(tasks.in_turn, notes.with_name("second"), bad, WORKS).result(PATIENCE) == "done"
    assert isinstance(outcome(executor.submit(tasks.in_turn, notes.with_name("error"), FAILS)), OSError)
    assert len(lines(notes.with_name("error"))) == 1


@on_all
@pytest.mark.parametrize("chunksize", [None, 1, 50])
def test_results_of_a_map_are_judged_one_by_one(pool: Pool, tmp_path: Path, chunksize: int | None) -> None:
    """Also those that came in one group; only the bad ones run again."""
    executor = pool(retry=taskpool.retry(2, on=tenacity.retry_if_result(lambda number: number % 10 == 3)))
    found = sorted(
        executor.outcomes(tasks.note, [tmp_path / f"{n}" for n in range(40)], range(40), chunksize=chunksize),
        key=lambda outcome: outcome.index,
    )
    assert [outcome.value for outcome in found] == list(range(40))
    assert [outcome.attempts for outcome in found] == [1 + (number % 10 == 3) for number in range(40)]
    assert [len(lines(tmp_path / f"{number}")) for number in range(40)] == [outcome.attempts for outcome in found]


@on_all
def test_results_until_an_exception(pool: Pool, notes: Path) -> None:
    """A strategy of exceptions may ask for another attempt after a result, too."""
    executor = pool(retry=taskpool.retry(5, on=tenacity.retry_unless_exception_type(OSError)))
    assert isinstance(outcome(executor.submit(tasks.in_turn, notes, WORKS, WORKS, FAILS)), OSError)
    assert len(lines(notes)) == 3


# ---------------------------------------------------------------------------------------------- a whole Retrying


@on_all
def test_hooks_of_a_retrying_run_in_the_parent(pool: Pool, notes: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`after` and `before_sleep`, with what tenacity promises them."""
    seen: list[tuple[Any, ...]] = []

    def after(state: tenacity.RetryCallState) -> None:
        seen.append(("after", os.getpid(), state.attempt_number, str(state.outcome and state.outcome.exception())))

    policy = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(2),
        after=after,
        before_sleep=tenacity.before_sleep_log(logging.getLogger("hooks"), logging.WARNING),
    )
    assert isinstance(outcome(pool(retry=policy).submit(tasks.in_turn, notes, FAILS)), OSError)
    assert seen == [("after", os.getpid(), number, "not yet") for number in (1, 2)]
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == ["hooks"]


@on_all
def test_a_retrying_may_give_another_result(pool: Pool, tmp_path: Path) -> None:
    """What its `retry_error_callback` returns when the attempts are over stands in place of the error."""
    policy = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(2),
        retry_error_callback=lambda state: f"{state.attempt_number} attempts",
    )
    executor = pool(retry=policy)
    assert executor.submit(tasks.in_turn, tmp_path / "call", FAILS).result(PATIENCE) == "2 attempts"
    items = [(tasks.in_turn, tmp_path / "item", FAILS), WORKS]
    assert list(executor.map(tasks.call, items, chunksize=2)) == ["2 attempts", "done"]
    stats = wait_until(lambda: (stats := executor.stats()).finished == 3 and stats)
    assert stats.failed == 0


@on_all
def test_one_retrying_serves_many_tasks_at_once(pool: Pool, tmp_path: Path) -> None:
    """Each has attempts of its own, and the object itself is not changed."""
    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_fixed(0.01))
    executor = pool(retry=policy)
    futures = [executor.submit(tasks.in_turn, tmp_path / f"{number}", FAILS, FAILS, WORKS) for number in range(20)]
    assert [future.result(PATIENCE) for future in futures] == ["done"] * 20
    assert policy.reraise is False


class OwnRetrying(tenacity.Retrying):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()


# ---------------------------------------------------------------------------------------------- mistakes


@on_each_engine
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0, ValueError),
        (-1, ValueError),
        (True, TypeError),
        (2.0, TypeError),
        ("3", TypeError),
        (OSError, TypeError),
        (lambda _: True, TypeError),
        (tenacity.AsyncRetrying(), TypeError),
        (OwnRetrying(), TypeError),
    ],
    ids=["zero", "negative", "bool", "float", "text", "class", "function", "async", "own class"],
)
def test_a_wrong_retry_is_refused_where_it_is_given(pool: Pool, value: Any, kind: type[Exception]) -> None:
    """By the constructor, by `options` and by `taskpool.map`, and the message names the argument."""
    executor = pool()
    for call in (
        lambda: pool(retry=value),
        lambda: executor.options(retry=value),
        lambda: taskpool.map(tasks.identity, [1], retry=value, backend="serial"),
    ):
        with pytest.raises(kind, match="retry"):
            call()


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"attempts": 0}, ValueError),
        ({"attempts": "3"}, TypeError),
        ({"attempts": True}, TypeError),
        ({"attempts": 2.5}, TypeError),
        ({"wait": "1"}, TypeError),
        ({"wait": None}, TypeError),
        ({"wait": True}, TypeError),
        ({"wait": float("nan")}, ValueError),
        ({"wait": lambda _: 1}, TypeError),
        ({"on": OSError("x")}, TypeError),
        ({"on": [OSError]}, TypeError),
        ({"on": (OSError, 3)}, TypeError),
        ({"on": int}, TypeError),
        ({"on": "OSError"}, TypeError),
        ({"stop": 3}, TypeError),
        ({"stop": tenacity.wait_none()}, TypeError),
    ],
    ids=lambda value: getattr(value, "__name__", None) or re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_wrong_arguments_of_retry_are_refused(arguments: dict[str, Any], kind: type[Exception]) -> None:
    """At once, and the message names the argument."""
    with pytest.raises(kind, match=next(iter(arguments))):
        taskpool.retry(**arguments)


# ---------------------------------------------------------------------------------------------- odd errors


@on_all
def test_a_task_may_ask_for_another_attempt(pool: Pool, notes: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`tenacity.TryAgain` is always tried again, and comes out as itself in the end."""
    executor = pool(retry=taskpool.retry(3, on=KeyError))
    again = tasks.fail, tenacity.TryAgain, "please"
    assert executor.submit(tasks.in_turn, notes, again, again, WORKS).result(PATIENCE) == "done"
    error = outcome(executor.submit(tasks.in_turn, notes.with_name("never"), again))
    assert type(error) is tenacity.TryAgain
    assert error.args == ("please",)
    assert len(lines(notes.with_name("never"))) == 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@on_all
@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_predicate_that_raises_ends_the_attempts(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    """The task's own outcome stands, the fault is logged, and the pool goes on."""

    def judge(_: object) -> bool:
        raise kind("no opinion")

    executor = pool(retry=taskpool.retry(3, on=tenacity.retry_if_exception(judge)))
    assert isinstance(outcome(executor.submit(tasks.in_turn, tmp_path / "call", FAILS)), OSError)
    items = [WORKS, (tasks.in_turn, tmp_path / "item", FAILS), WORKS]
    found = sorted(executor.outcomes(tasks.call, items, chunksize=3), key=lambda outcome: outcome.index)
    assert [outcome.ok for outcome in found] == [True, False, True]
    assert (len(lines(tmp_path / "call")), len(lines(tmp_path / "item"))) == (1, 1)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert "retry policy" in caplog.text


@on_all
@pytest.mark.parametrize(
    "step",
    [
        (tasks.fail, tasks.NoText),
        (tasks.fail, tasks.ExitsAtText),
        (tasks.fail_with_odd_notes,),
        (tasks.fail, SystemExit, 3),
    ],
    ids=["no text", "exits at text", "odd notes", "SystemExit"],
)
def test_odd_errors_are_tried_again_like_others(pool: Pool, tmp_path: Path, step: tuple[Any, ...]) -> None:
    """What their text or their notes do harms neither the task nor others."""
    executor = pool(retry=2)
    kind = taskpool.RemoteError if SystemExit in step else Exception
    assert isinstance(outcome(executor.submit(tasks.in_turn, tmp_path / "call", step)), kind)
    found = list(executor.outcomes(tasks.call, [(tasks.in_turn, tmp_path / "item", step), WORKS]))
    assert sorted(outcome.ok for outcome in found) == [False, True]
    assert (len(lines(tmp_path / "call")), len(lines(tmp_path / "item"))) == (2, 2)


@on_hosts
def test_what_cannot_be_sent_is_not_tried_again(pool: Pool, tmp_path: Path) -> None:
    """It would only fail again; a policy that names the error gets its way."""
    executor = pool(retry=3)
    step = tasks.make, tasks.FailsAtDump
    assert isinstance(outcome(executor.submit(tasks.in_turn, tmp_path / "1", step)), taskpool.NotSendableError)
    assert len(lines(tmp_path / "1")) == 1
    assert isinstance(outcome(executor.submit(tasks.identity, tasks.FailsAtDump())), taskpool.NotSendableError)
    assert isinstance(outcome(executor.submit(tasks.identity, tasks.FailsAtLoad())), taskpool.UnpickleError)
    found = executor.outcomes(
        tasks.identity, [1, tasks.FailsAtDump(), tasks.FailsAtLoad(), 4], ordered=True, chunksize=4
    )
    assert [outcome.attempts for outcome in found] == [1, 0, 1, 1]
    assert executor.stats().retried == 0
    stubborn = executor.options(retry=taskpool.retry(2, on=taskpool.NotSendableError))
    assert isinstance(outcome(stubborn.submit(tasks.in_turn, tmp_path / "2", step)), taskpool.NotSendableError)
    assert len(lines(tmp_path / "2")) == 2


@on_all
def test_a_failed_initializer_is_no_attempt(pool: Pool, notes: Path) -> None:
    """The task has not run; nobody waits through its attempts."""
    executor = pool(1, retry=taskpool.retry(3, wait=LONG), initializer=tasks.fail, initargs=(KeyError,))
    try:
        future = executor.submit(tasks.in_turn, notes, WORKS)
    except taskpool.InitializerError:
        pass
    else:
        assert isinstance(outcome(future), taskpool.InitializerError)
    assert lines(notes) == []
    assert executor.stats().retried == 0


# ---------------------------------------------------------------------------------------------- crashes and limits


@on_all
def test_a_passed_limit_is_tried_again(pool: Pool, notes: Path, backend: Backend) -> None:
    """The limit holds for each attempt; the last error says what came before."""
    executor = pool(1, retry=2, task_timeout=0.2, grace=5.0)
    hangs = HANGS if backend.hosted else (tasks.sleep_in_steps, PATIENCE)
    assert executor.submit(tasks.in_turn, notes, hangs, WORKS).result(PATIENCE) == "done"
    error = outcome(executor.submit(tasks.in_turn, notes.with_name("never"), hangs))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert "attempt 1: TaskTimeoutError" in notes_of(error)
    assert len(lines(notes.with_name("never"))) == 2
    stats = executor.stats()
    assert (stats.retried, stats.timed_out, stats.finished) == (2, 1, 1)


@on_hosts
@pytest.mark.parametrize("step", [CRASHES, HANGS], ids=["crash", "limit"])
@pytest.mark.parametrize("others", ["none", "idle", "busy"])
def test_after_a_crash_or_a_limit_the_next_attempt_has_a_new_process(
    pool: Pool, tmp_path: Path, step: tuple[Any, ...], others: str
) -> None:
    """One that has served nothing else: where there is no room, a worker that waits makes some."""
    executor = pool(1 if others == "none" else 2, grace=0.1)
    seen = {outcome(future) for future in [executor.submit(tasks.pid_after, 0.02) for _ in range(4)]}
    held = executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release") if others == "busy" else None
    future = executor.options(retry=3, task_timeout=0.5).submit(tasks.in_turn, tmp_path / "attempts", step, WORKS)
    assert future.result(PATIENCE) == "done"
    first, second = map(int, lines(tmp_path / "attempts"))
    assert second not in {first, *seen}
    if held is not None:
        assert not held.done()
        (tmp_path / "release").touch()
        held.result(PATIENCE)


@on_hosts
def test_behind_a_crash_nothing_is_sent_along(pool: Pool, tmp_path: Path) -> None:
    """While the next attempt runs, its worker has nothing else, however much waits; then it serves on."""
    executor = pool(1, retry=2)
    assert list(executor.map(tasks.identity, range(50))) == list(range(50))
    again = tasks.hold, tmp_path / "again", tmp_path / "release"
    future = executor.submit(tasks.in_turn, tmp_path / "attempts", CRASHES, again)
    others = [executor.submit(tasks.note, tmp_path / "others", number) for number in range(50)]
    wait_until((tmp_path / "again").exists)
    dispatcher = executor._backend._dispatcher  # type: ignore[attr-defined]
    wait_until(lambda: [len(worker.inflight) for worker in dispatcher._crew.workers] == [1])
    later = executor.submit(tasks.identity, "later")
    assert not later.done()
    assert len(lines(tmp_path / "others")) < 50
    (tmp_path / "release").touch()
    assert future.result(PATIENCE) is None
    assert [other.result(PATIENCE) for other in others] == list(range(50))
    assert later.result(PATIENCE) == "later"
    assert lines(tmp_path / "others") == [str(number) for number in range(50)]


@on_hosts
@pytest.mark.parametrize("chunksize", [None, 1, 50])
def test_an_item_that_always_kills_its_worker_ends_after_its_attempts(
    pool: Pool, tmp_path: Path, chunksize: int | None
) -> None:
    """The others run once, wherever in a chunk they stood, and the pool is healthy."""
    executor = pool(2, retry=3)
    path = tmp_path / "notes"
    found = list(executor.outcomes(tasks.die_slowly_at, [30] * 50, [path] * 50, range(50), chunksize=chunksize))
    bad = next(outcome for outcome in found if outcome.index == 30)
    assert isinstance(bad.error, taskpool.WorkerCrashedError)
    assert "attempt 2: WorkerCrashedError" in notes_of(bad.error)
    assert bad.attempts == 3
    assert sorted(outcome.value for outcome in found if outcome is not bad) == sorted({*range(50)} - {30})
    assert {outcome.attempts for outcome in found if outcome is not bad} == {1}
    assert sorted(map(int, lines(path))) == sorted([*range(50), 30, 30])
    assert executor.stats().rerun == 0
    assert list(executor.map(tasks.square, range(10))) == [number * number for number in range(10)]
    stats = wait_until(lambda: (stats := executor.stats()).finished == 59 and stats)
    assert (stats.crashed, stats.retried, stats.replaced) == (1, 2, 3)


@on_hosts
@pytest.mark.parametrize("chunksize", [None, 50])
def test_a_map_raises_at_the_item_that_always_kills(pool: Pool, tmp_path: Path, chunksize: int | None) -> None:
    """In its place, after its attempts; an item that kills its worker only once costs nothing."""
    executor = pool(2, retry=3)
    items = [(tasks.note_slowly, tmp_path / f"{number}", number) for number in range(20)]
    items[5] = tasks.in_turn, tmp_path / "5", CRASHES, (tasks.identity, 5)  # type: ignore[assignment]
    assert list(executor.map(tasks.call, items, chunksize=chunksize)) == list(range(20))
    items[10] = tasks.in_turn, tmp_path / "bad", CRASHES  # type: ignore[assignment]
    results = executor.map(tasks.call, items, chunksize=chunksize)
    assert [next(results) for _ in range(10)] == list(range(10))
    with pytest.raises(taskpool.WorkerCrashedError):
        next(results)
    assert len(lines(tmp_path / "bad")) == 3
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_one_host
def test_the_new_process_may_die_before_the_attempt(pool: Pool, tmp_path: Path) -> None:
    """An idle death is invisible, and the attempt has yet another process for itself."""
    executor = pool(1, retry=2, initializer=tasks.in_turn, initargs=(tmp_path / "starts", WORKS, CRASHES, WORKS))
    again = (tasks.current_attempt,)
    assert executor.submit(tasks.in_turn, tmp_path / "attempts", CRASHES, again).result(PATIENCE) == 2
    assert len(lines(tmp_path / "attempts")) == 2
    assert len(lines(tmp_path / "starts")) == 3


@on_hosts
def test_workers_that_serve_so_many_tasks_retry_as_well(pool: Pool, tmp_path: Path) -> None:
    """With `max_tasks_per_child=1` each attempt has a process of its own."""
    executor = pool(2, retry=3, max_tasks_per_child=1)
    steps = FAILS, CRASHES, WORKS
    futures = [executor.submit(tasks.in_turn, tmp_path / f"{number}", *steps) for number in range(4)]
    assert [future.result(PATIENCE) for future in futures] == ["done"] * 4
    pids = [pid for number in range(4) for pid in lines(tmp_path / f"{number}")]
    assert len(set(pids)) == len(pids) == 12


# ---------------------------------------------------------------------------------------------- the wait


@on_pools
def test_no_worker_sleeps_while_a_task_waits(pool: Pool, notes: Path) -> None:
    """The only worker runs others meanwhile; the task is a queued one."""
    executor = pool(1, retry=taskpool.retry(2, wait=LONG))
    future = executor.submit(tasks.in_turn, notes, FAILS)
    await_wait(executor)
    assert [executor.submit(tasks.identity, number).result(PATIENCE) for number in range(5)] == list(range(5))
    assert list(executor.map(tasks.identity, range(5))) == list(range(5))
    assert not future.running()
    assert not future.done()
    assert executor.stats().running == 0


@on_pools
def test_cancelling_a_task_that_waits_resolves_it_at_once(pool: Pool, tmp_path: Path) -> None:
    """It never starts again, is no longer queued, and nothing waits for its next attempt."""
    executor = pool(1, retry=taskpool.retry(2, wait=LONG))
    called: list[object] = []
    future, other = (executor.submit(tasks.in_turn, tmp_path / name, FAILS) for name in ("one", "two"))
    future.add_done_callback(called.append)
    await_wait(executor, 2)
    with at_most(1):
        assert future.cancel()
        assert future.cancelled()
        wait_until(lambda: called == [future])
    wait_until(lambda: executor.stats().cancelled == 1)
    assert not other.done()
    assert other.cancel()
    wait_until(lambda: executor.stats().queued == 0)
    with at_most(2):
        bounded(executor.shutdown)
    assert (len(lines(tmp_path / "one")), len(lines(tmp_path / "two"))) == (1, 1)


@on_pools
def test_cancelling_ends_a_shutdown_that_waits(pool: Pool, notes: Path) -> None:
    """The last task that it waits for is cancelled during its wait."""
    executor = pool(1, retry=taskpool.retry(2, wait=LONG))
    future = executor.submit(tasks.in_turn, notes, FAILS)
    await_wait(executor)
    ending = threading.Thread(target=executor.shutdown)
    ending.start()
    wait_until(lambda: executor._closed)
    assert future.cancel()
    ending.join(2)
    assert not ending.is_alive()


@on_pools
def test_cancelling_while_the_decision_is_due(pool: Pool, notes: Path) -> None:
    """A predicate that takes its time cannot bring a cancelled task back."""
    asked, answer = threading.Event(), threading.Event()

    def judge(_: object) -> bool:
        asked.set()
        return answer.wait(PATIENCE)

    executor = pool(1, retry=taskpool.retry(2, on=tenacity.retry_if_exception(judge)))
    future = executor.submit(tasks.in_turn, notes, FAILS)
    assert asked.wait(PATIENCE)
    assert future.cancel()
    answer.set()
    assert isinstance(outcome(future), CancelledError)
    assert future.cancelled()
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert len(lines(notes)) == 1
    wait_until(lambda: executor.stats().cancelled == 1)


@on_pools
def test_cancelling_the_next_attempt_stops_it(pool: Pool, tmp_path: Path) -> None:
    """As it would the first one."""
    executor = pool(1, retry=5, grace=5.0)
    again = tasks.note_then, tmp_path / "again", 1, tasks.sleep_in_steps, PATIENCE
    future = executor.submit(tasks.in_turn, tmp_path / "attempts", FAILS, again)
    wait_until((tmp_path / "again").exists)
    wait_until(future.running)
    assert future.cancel()
    assert isinstance(outcome(future), CancelledError)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert len(lines(tmp_path / "attempts")) == 2


@on_all
def test_a_maps_timeout_ends_a_wait(pool: Pool, notes: Path) -> None:
    """The item does not start again, the worker is free, and the end of the executor waits for nothing."""
    executor = pool(1, retry=taskpool.retry(2, wait=LONG))
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    with at_most(5), pytest.raises(taskpool.CallTimeoutError):
        list(executor.map(tasks.call, [(tasks.in_turn, notes, FAILS), WORKS], timeout=1.0))
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    wait_until(lambda: executor.stats().queued == 0)
    with at_most(2):
        bounded(executor.shutdown)
    assert len(lines(notes)) == 1


@on_pools
def test_closing_a_map_ends_a_wait(pool: Pool, notes: Path) -> None:
    """An iterator that is given up leaves no attempt behind."""
    executor = pool(1, retry=taskpool.retry(2, wait=LONG))
    results = executor.map(tasks.call, [WORKS, (tasks.in_turn, notes, FAILS)])
    assert next(results) == "done"
    await_wait(executor)
    results.close()  # type: ignore[attr-defined]
    with at_most(2):
        bounded(executor.shutdown)
    assert len(lines(notes)) == 1


# ---------------------------------------------------------------------------------------------- the end


@on_all
def test_shutdown_waits_for_what_is_tried_again(pool: Pool, tmp_path: Path) -> None:
    """Accepted tasks finish, with all their attempts; so do the items of a map that is read later."""
    executor = pool(2, retry=taskpool.retry(3, wait=0.1))
    future = executor.submit(tasks.in_turn, tmp_path / "call", FAILS, FAILS, WORKS)
    results = executor.map(tasks.call, [WORKS, (tasks.in_turn, tmp_path / "item", FAILS, WORKS)])
    bounded(executor.shutdown)
    assert future.result(0) == "done"
    assert list(results) == ["done", "done"]


@pytest.mark.parametrize("backend", [THREAD], ids=str)
def test_shutdown_waits_for_what_an_abandoned_thread_left(pool: Pool, notes: Path) -> None:
    """A thread that does not yield is left to itself, and its task is tried again in another one."""
    executor = pool(1, retry=taskpool.retry(2, wait=0.2), task_timeout=0.1, grace=0.05)
    future = executor.submit(tasks.in_turn, notes, (time.sleep, 0.5), WORKS)
    bounded(executor.shutdown)
    assert future.done()
    assert future.result(0) == "done"
    wait_until(lambda: not any("-thread-" in thread.name for thread in threading.enumerate()))


@on_pools
def test_a_shutdown_that_waits_already_waits_for_retries_too(pool: Pool, tmp_path: Path) -> None:
    """What fails behind it has all its attempts."""
    executor = pool(1, retry=taskpool.retry(3, wait=0.05))
    first = tasks.hold_and_fail, tmp_path / "started", tmp_path / "release", OSError
    future = executor.submit(tasks.in_turn, tmp_path / "attempts", first, FAILS, WORKS)
    wait_until((tmp_path / "started").exists)
    ending = threading.Thread(target=executor.shutdown)
    ending.start()
    wait_until(lambda: executor._closed)
    with contextlib.suppress(TimeoutError):
        future.result(0.1)  # by then it waits; if not the test is only weaker
    (tmp_path / "release").touch()
    ending.join(PATIENCE)
    assert not ending.is_alive()
    assert future.result(0) == "done"


def _ends(executor: taskpool.Executor) -> dict[str, Callable[[], None]]:
    return {
        "cancel_futures": lambda: executor.shutdown(cancel_futures=True),
        "terminate": executor.terminate,
        "timeout": lambda: executor.shutdown(timeout=0.2),
    }


ENDS = ["cancel_futures", "terminate", "timeout"]


@on_pools
@pytest.mark.parametrize("end", ENDS)
def test_an_end_resolves_what_waits_for_its_next_attempt(pool: Pool, tmp_path: Path, end: str) -> None:
    """Calls as cancelled, items with the same error in their outcomes; nothing starts again."""
    executor = pool(2, retry=taskpool.retry(2, wait=LONG))
    futures = [executor.submit(tasks.in_turn, tmp_path / f"{number}", FAILS) for number in range(3)]
    found = executor.outcomes(tasks.call, [WORKS, (tasks.in_turn, tmp_path / "item", FAILS)], ordered=True)
    good = bounded(lambda: next(found))
    await_wait(executor, 4)
    with at_most(4):
        bounded(_ends(executor)[end])
    assert all(future.cancelled() for future in futures)
    (bad,) = found
    assert (good.ok, good.attempts) == (True, 1)
    assert (type(bad.error), bad.attempts) == (CancelledError, 1)
    assert [len(lines(tmp_path / name)) for name in ("0", "1", "2", "item")] == [1] * 4
    assert executor.stats().queued == 0


@on_pools
@pytest.mark.parametrize("end", ENDS)
def test_an_end_does_not_wait_for_a_decision(pool: Pool, notes: Path, end: str) -> None:
    """A predicate that does not answer: the task's own error stands."""
    asked, answer = threading.Event(), threading.Event()

    def judge(_: object) -> bool:
        asked.set()
        return answer.wait(PATIENCE)

    executor = pool(1, retry=taskpool.retry(2, on=tenacity.retry_if_exception(judge)), grace=0.1)
    future = executor.submit(tasks.in_turn, notes, FAILS)
    assert asked.wait(PATIENCE)
    ending = threading.Thread(target=_ends(executor)[end])
    ending.start()
    try:
        assert isinstance(outcome(future, 4), OSError)
    finally:
        answer.set()
        ending.join(PATIENCE)
    assert len(lines(notes)) == 1


@on_pools
@pytest.mark.parametrize("end", ENDS)
def test_what_fails_after_the_end_began_is_not_tried_again(pool: Pool, tmp_path: Path, end: str) -> None:
    """A task that runs while the executor is being ended has had its last attempt."""
    executor = pool(1, retry=taskpool.retry(3, wait=LONG), grace=0.5)
    again = tasks.note_then, tmp_path / "again", 1, tasks.sleep_and_fail, 0.1, OSError
    future = executor.submit(tasks.in_turn, tmp_path / "attempts", again)
    wait_until((tmp_path / "again").exists)
    with at_most(5):
        bounded(_ends(executor)[end])
    assert isinstance(outcome(future, 0), OSError | CancelledError)
    assert len(lines(tmp_path / "attempts")) == 1


@pytest.mark.parametrize("backend", [SERIAL], ids=str)
@pytest.mark.parametrize("end", ["cancel_futures", "terminate"])
@pytest.mark.parametrize("kind", ["call", "item"])
def test_another_thread_ends_the_wait_of_a_serial_executor(pool: Pool, notes: Path, end: str, kind: str) -> None:
    """The caller, who sleeps, comes back with a cancelled task."""
    executor = pool(1, retry=taskpool.retry(2, wait=LONG))

    def run() -> Any:
        if kind == "call":
            return executor.submit(tasks.in_turn, notes, FAILS).exception(0)
        return next(executor.outcomes(tasks.call, [(tasks.in_turn, notes, FAILS)])).error

    with concurrent.futures.ThreadPoolExecutor(1) as caller:
        running = caller.submit(run)
        await_wait(executor)
        bounded(_ends(executor)[end])
        assert isinstance(outcome(running, 4), CancelledError)
    assert len(lines(notes)) == 1
    assert executor.stats().cancelled == 1


# ---------------------------------------------------------------------------------------------- with other options


@on_all
def test_outcomes_have_the_number_of_attempts(pool: Pool, tmp_path: Path) -> None:
    """Of each item by itself, whether it succeeded in the end or not."""
    plans = [(WORKS,), (FAILS, WORKS), (FAILS,), (FAILS, FAILS, WORKS)]
    items = [(tasks.in_turn, tmp_path / f"{number}", *steps) for number, steps in enumerate(plans)]
    executor = pool(retry=3)
    found = list(executor.outcomes(tasks.call, items, ordered=True, chunksize=4))
    assert [(outcome.ok, outcome.attempts) for outcome in found] == [(True, 1), (True, 2), (False, 3), (True, 3)]
    stats = wait_until(lambda: (stats := executor.stats()).finished == 3 and stats)
    assert (stats.failed, stats.retried) == (1, 5)


@on_all
def test_views_compose(pool: Pool, tmp_path: Path) -> None:
    """Executor, then view, then view on the view; None switches retries off."""
    executor = pool(retry=2)
    names = iter(range(10))

    def attempts(calls: Any) -> int:
        path = tmp_path / f"{next(names)}"
        assert isinstance(outcome(calls.submit(tasks.in_turn, path, FAILS)), OSError)
        return len(lines(path))

    named = executor.options(name="named")
    four = named.options(retry=4)
    assert [attempts(calls) for calls in (executor, named, four, four.options(priority=1))] == [2, 2, 4, 4]
    assert [attempts(calls) for calls in (four.options(retry=None), executor.options(retry=None), executor)] == [
        1,
        1,
        2,
    ]


@on_each_engine
@pytest.mark.usefixtures("shared")
def test_the_module_level_calls_take_a_policy(tmp_path: Path, backend: Backend) -> None:
    """`taskpool.map(retry=)` and its kin."""
    items = [(tasks.in_turn, tmp_path / f"{number}", FAILS, (tasks.identity, number)) for number in range(4)]
    assert taskpool.map(tasks.call, items, retry=2, backend=backend.name, max_workers=2) == list(range(4))
    found = taskpool.outcomes(tasks.call, items, retry=2, backend=backend.name, max_workers=2, ordered=True)
    assert [outcome.attempts for outcome in found] == [1] * 4


@on_pools
def test_a_bounded_queue_takes_retries(pool: Pool, tmp_path: Path) -> None:
    """An attempt takes no place of `max_pending`, so retries neither block submitters nor let in too many."""
    executor = pool(1, retry=taskpool.retry(3, wait=0.02), max_pending=2, submit_timeout=PATIENCE)
    futures = [executor.submit(tasks.in_turn, tmp_path / f"{number}", FAILS, FAILS, WORKS) for number in range(12)]
    assert [future.result(PATIENCE) for future in futures] == ["done"] * 12
    executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    wait_until((tmp_path / "started").exists)
    hasty = executor.options(submit_timeout=0)
    with pytest.raises(taskpool.QueueFullError):  # a few may lie at the worker already, which take no place
        for _ in range(200):
            hasty.submit(tasks.identity, 1)
    (tmp_path / "release").touch()


@on_pools
def test_an_attempt_waits_in_line_by_its_priority(pool: Pool, tmp_path: Path) -> None:
    """Higher ones go first; among equals it keeps the turn of its first attempt."""
    first = tasks.hold_and_fail, tmp_path / "started", tmp_path / "gate", OSError
    assert order_around(pool(1, retry=2), tmp_path, first) == ["3", "2", "again", "1", "0"]


@on_hosts
def test_an_attempt_after_a_crash_waits_in_line_by_its_priority(pool: Pool, tmp_path: Path) -> None:
    """Also though it needs a new process."""
    first = tasks.hold_and_die, tmp_path / "started", tmp_path / "gate"
    assert order_around(pool(1, retry=2), tmp_path, first) == ["3", "2", "again", "1", "0"]


def order_around(executor: taskpool.Executor, path: Path, first: tuple[Any, ...]) -> list[str]:
    """Return in which order the second attempt of a task of priority 1 and tasks of others run."""
    order = path / "order"
    again = executor.options(priority=1).submit(tasks.in_turn, path / "attempts", first, (tasks.note, order, "again"))
    wait_until((path / "started").exists)
    others = [executor.options(priority=each).submit(tasks.note, order, each) for each in (0, 1, 2)]
    others.append(executor.options(priority=3).submit(tasks.note_then, order, 3, tasks.await_file, path / "decided"))
    (path / "gate").touch()
    await_wait(executor)
    (path / "decided").touch()
    concurrent.futures.wait([again, *others], PATIENCE)
    return lines(order)


@on_all
def test_retries_of_a_long_map_keep_nothing(pool: Pool, tmp_path: Path) -> None:
    """What is known of an item's attempts goes with the item."""
    executor = pool(retry=2)
    items = ((tasks.in_turn, tmp_path / f"{number}", FAILS, WORKS) for number in range(120))
    results = executor.imap(tasks.call, items, buffersize=4)
    for _ in range(100):
        assert next(results) == "done"
    gc.collect()
    assert sum(isinstance(each, Attempts) for each in gc.get_objects()) <= 12
    results.close()  # type: ignore[attr-defined]


@on_pools
def test_huge_waits_do_no_harm(pool: Pool, notes: Path) -> None:
    """A strategy that answers with centuries blocks neither limits nor the end."""
    executor = pool(1, retry=tenacity.wait_fixed(1e18), grace=5.0)
    future = executor.submit(tasks.in_turn, notes, FAILS)
    await_wait(executor)
    limited = executor.options(task_timeout=0.1, retry=None)
    assert isinstance(outcome(limited.submit(tasks.sleep_in_steps, PATIENCE)), taskpool.TaskTimeoutError)
    assert future.cancel()
