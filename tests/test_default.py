"""`taskpool.map`: the shared executor behind it starts on first use, stays warm, and ends by itself."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import processes, states, tasks
from tests.helpers import TEMPLATE, at_most, bounded, lines, wait_until
from tests.scripts import run_main

pytestmark = pytest.mark.usefixtures("shared")

BACKENDS = ["process", "futures", "pool", "thread", "serial"]


def workers(count: int = 4, **options: Any) -> set[int]:
    """Return the processes that ran some items."""
    return set(taskpool.map(lambda _: os.getpid(), range(count), **options))


# ---------------------------------------------------------------------------------------------- results


@pytest.mark.core
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_in_order(backend: str) -> None:
    """The results are a list in the order of the items, whatever order they came in."""
    assert taskpool.map(tasks.square, range(50), backend=backend) == [number**2 for number in range(50)]


def test_order_of_slow_and_quick_items(tmp_path: Path) -> None:
    """An item that takes long does not change its place."""
    notes = tmp_path / "notes"
    given = taskpool.map(states.wait_turn, [notes] * 4, [4] * 4, range(4), max_workers=4, chunksize=1, timeout=20)
    assert given == [0, 1, 2, 3]
    assert lines(notes) == ["3", "2", "1", "0"]


@pytest.mark.parametrize(
    ("iterables", "expected"),
    [
        (([],), []),
        ((iter([3, 4]),), [9, 16]),
        (((number for number in (5, 6)),), [25, 36]),
        (({7: None},), [49]),
    ],
    ids=["empty", "iterator", "generator", "dict"],
)
def test_inputs_of_any_kind(iterables: tuple[Any, ...], expected: list[int]) -> None:
    """What can be iterated can be mapped."""
    assert taskpool.map(tasks.square, *iterables) == expected


def test_several_iterables() -> None:
    """They are taken side by side, to the end of the shortest, as by the built-in map."""
    assert taskpool.map(tasks.add, [1, 2, 3], (10, 20), iter([100, 200, 300])) == [111, 222]
    assert taskpool.map(tasks.square, range(1000), chunksize=7) == [number**2 for number in range(1000)]


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.core
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_failure_comes_as_itself(backend: str) -> None:
    """Of several items that fail it is the first in order whose exception is raised, with its remote traceback."""
    with pytest.raises(tasks.TwoArguments) as caught:
        taskpool.map(states.fail_from, [3] * 9, range(9), backend=backend, max_workers=2)
    assert caught.value.code == 3
    if backend in ("process", "futures", "pool"):
        assert "in fail_from" in str(caught.value.__cause__)


def test_a_failure_stops_what_comes_behind_it(tmp_path: Path) -> None:
    """After the error nothing of that call runs on; what was sent ahead may have begun before it was seen."""
    notes = tmp_path / "notes"
    with pytest.raises(tasks.TwoArguments):
        taskpool.map(states.fail_or_hang, [notes] * 8, range(8), max_workers=2, chunksize=1)
    assert taskpool.map(abs, [-1] * 8, max_workers=2, timeout=10) == [1] * 8
    wait_until(lambda: not any(map(processes.alive, states.pids(notes))), 5, "the end of the items that hung")
    assert len(states.pids(notes)) <= 2, "an item began after the error"


def test_an_input_that_fails() -> None:
    """What an input raises comes out of the call as it is."""

    def items() -> Any:
        yield from (1, 2)
        raise LookupError("no more")

    with at_most(10), pytest.raises(LookupError, match="no more"):
        taskpool.map(tasks.square, items())


def test_an_interrupt_while_input_is_read(tmp_path: Path) -> None:
    """Ctrl-C in the input ends the call at once, and what had begun is stopped."""

    def items() -> Any:
        yield tmp_path / "notes"
        states.expect(tmp_path / "notes", 1)
        raise KeyboardInterrupt

    with at_most(10), pytest.raises(KeyboardInterrupt):
        bounded(lambda: taskpool.map(states.enter, ["sleeping"] * 9, items(), chunksize=1))
    noted = states.pids(tmp_path / "notes")[0]
    wait_until(lambda: not processes.alive(noted), 5, "the end of the item that had begun")


def test_a_crash_and_a_limit() -> None:
    """A worker's death and a task's limit are the failures of one item, and the next call has none of it."""
    with pytest.raises(taskpool.WorkerCrashedError):
        taskpool.map(states.die_if, [False, True, False], chunksize=1)
    with pytest.raises(taskpool.TaskTimeoutError) as caught:
        taskpool.map(states.hang_if, [False, True, False], task_timeout=0.3)
    assert caught.value.seconds == 0.3
    assert "hang_if" in (caught.value.stack or "")
    assert taskpool.map(abs, [-1, -2]) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "options", "kind"),
    [
        ((None, [1]), {}, TypeError),
        ((abs,), {}, TypeError),
        ((abs, 5), {}, TypeError),
        ((abs, [1]), {"chunksize": 0}, ValueError),
        ((abs, [1]), {"chunksize": 1.5}, TypeError),
        ((abs, [1]), {"max_workers": 0}, ValueError),
        ((abs, [1]), {"max_workers": "2"}, TypeError),
        ((abs, [1]), {"backend": "celery"}, ValueError),
        ((abs, [1]), {"unknown": 1}, TypeError),
    ],
    ids=str,
)
def test_bad_calls(arguments: tuple[Any, ...], options: dict[str, Any], kind: type[Exception]) -> None:
    """What makes no sense is refused before anything starts."""
    before = {process.pid for process in processes.descendants()}
    with pytest.raises(kind):
        taskpool.map(*arguments, **options)
    assert {process.pid for process in processes.descendants()} <= before


# ---------------------------------------------------------------------------------------------- timeout


@pytest.mark.core
@pytest.mark.parametrize("state", ["sleeping", "spinning", "holding", "deaf", "parent"])
def test_nothing_runs_on_behind_a_timeout(tmp_path: Path, state: str) -> None:
    """When the call's time is over, what it began is stopped, what it had not begun never starts."""
    notes = tmp_path / "notes"
    with at_most(10), pytest.raises(taskpool.CallTimeoutError) as caught:
        taskpool.map(states.enter, ["idle", *[state] * 7], [notes] * 8, timeout=0.7, max_workers=2, chunksize=1)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.finished == 1
    begun = lines(notes)
    hung = {int(pid) for line in begun if not line.endswith("idle") for pid in line.split()[::2] if pid.isdigit()}
    assert hung
    wait_until(lambda: not any(map(processes.alive, hung)), 5, "the end of what the call had begun")
    assert taskpool.map(abs, [-1, -2], timeout=20) == [1, 2]
    assert lines(notes) == begun, "an item began after the timeout"


def test_a_timeout_with_an_endless_input() -> None:
    """The timeout ends a call whose input never ends."""
    with at_most(3), pytest.raises(taskpool.CallTimeoutError):
        bounded(lambda: taskpool.map(tasks.square, states.count_for_ever(), timeout=0.5))
    assert taskpool.map(abs, [-1], timeout=10) == [1]


def test_calls_do_not_share_their_timeouts(tmp_path: Path) -> None:
    """Two calls at once: the end of one leaves the other alone."""
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(
            taskpool.map(tasks.hold, [tmp_path / "started"], [tmp_path / "release"], ["unharmed"], max_workers=3)
        )
    )
    thread.start()
    states.expect(tmp_path / "started", 1)
    with pytest.raises(taskpool.CallTimeoutError):
        taskpool.map(states.enter, ["deaf"] * 3, [tmp_path / "notes"] * 3, timeout=0.4, max_workers=3)
    (tmp_path / "release").touch()
    thread.join(20)
    assert answers == [["unharmed"]]


# ---------------------------------------------------------------------------------------------- sharing


@pytest.mark.core
def test_workers_stay_warm() -> None:
    """The next call finds the workers of the last one."""
    first = workers(8, max_workers=2)
    assert 1 <= len(first) <= 2
    assert os.getpid() not in first
    assert len(set.union(*(workers(8, max_workers=2) for _ in range(5)), first)) <= 2


def test_max_workers_is_kept(tmp_path: Path) -> None:
    """A call uses no more workers than it says, and as many if it has work for them."""
    notes = tmp_path / "notes"
    taskpool.map(states.meet, [notes] * 3, [3] * 3, max_workers=3, chunksize=1, timeout=20)
    assert len(set(states.pids(notes))) == 3
    assert len(workers(20, max_workers=1, chunksize=1)) == 1


def test_idle_workers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that nobody needs for a while are let go, and come again when needed."""
    monkeypatch.setattr("taskpool._default._SharedExecutor._idle_timeout", 0.2)
    first = workers(max_workers=2)
    wait_until(lambda: not any(map(processes.alive, first)), 10, "the end of idle workers")
    assert taskpool.map(abs, [-1], timeout=20) == [1]


def test_a_killed_idle_worker_is_not_noticed() -> None:
    """The death of a warm worker between two calls costs nothing."""
    for _ in range(5):
        for pid in workers(max_workers=2):
            os.kill(pid, signal.SIGKILL)
        assert taskpool.map(abs, [-1, -2, -3], timeout=20) == [1, 2, 3]


def test_calls_from_many_threads() -> None:
    """First calls at the same moment share one executor, and each gets its own results."""
    barrier = threading.Barrier(8)
    answers: dict[int, list[int]] = {}

    def call(number: int) -> None:
        barrier.wait(10)
        answers[number] = taskpool.map(tasks.add, range(100), [number] * 100, max_workers=2)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {number: list(range(number, number + 100)) for number in range(8)}


def test_a_map_inside_a_task() -> None:
    """A task that maps itself, in its worker, does not wait for workers that wait for it."""
    assert taskpool.map(states.map_inside, range(4), max_workers=2, timeout=30) == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_no_warning_is_left() -> None:
    """The shared executor is nobody's to shut down: it never warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        taskpool.map(abs, [-1])
        gc.collect()
    assert not [each for each in caught if each.category is ResourceWarning]


# ---------------------------------------------------------------------------------------------- exit

EXIT = """
print(taskpool.map(abs, [-1, -2]), taskpool.map(lambda number: number + 1, [1, 2]))
"""


@pytest.mark.core
def test_exit(tmp_path: Path) -> None:
    """A program that only calls `taskpool.map` ends at once, in silence, with nothing left."""
    ended = run_main(EXIT, TEMPLATE, tmp_path)
    assert (ended.code, ended.out, ended.err) == (0, "[1, 2] [2, 3]\n", ""), ended
    assert ended.seconds < 5


NOT_USED = """
before = set(os.listdir("/proc/self/task"))
import taskpool.errors
print(set(os.listdir("/proc/self/task")) == before, os.path.exists(f"/proc/self/task/{os.getpid()}/children")
      and open(f"/proc/self/task/{os.getpid()}/children").read())
"""


def test_nothing_starts_before_the_first_call(tmp_path: Path) -> None:
    """Importing taskpool starts no thread and no process."""
    ended = run_main(NOT_USED, TEMPLATE, tmp_path)
    assert ended.out in ("True \n", "True False\n"), ended


IN_DAEMON = """
def call():
    print(taskpool.map(abs, [-1]), flush=True)
    taskpool.map(states.enter, ["deaf"], [path])

threading.Thread(target=call, daemon=True).start()
states.expect(path, 1)
"""


def test_exit_while_a_daemon_thread_maps(tmp_path: Path) -> None:
    """The interpreter does not wait for a call that nobody waits for: its bound is that of the executor."""
    ended = run_main(IN_DAEMON.replace("[path])", "[path], timeout=2)"), TEMPLATE, tmp_path)
    assert ended.code == 0, ended
    assert ended.seconds < 10, ended


def test_elapsed_time_is_not_wasted() -> None:
    """A warm call of few items takes milliseconds, not a polling interval."""
    taskpool.map(abs, [-1])
    fastest = min(_timed(lambda: taskpool.map(abs, [-1, -2])) for _ in range(20))
    assert fastest < 0.05


def _timed(call: Any) -> float:
    started = time.perf_counter()
    bounded(call)
    return time.perf_counter() - started


@pytest.mark.parametrize("backend", ["process", "futures", "pool"])
def test_the_chosen_backend_runs_it(backend: str) -> None:
    """`backend=` names where the items run."""
    assert os.getpid() not in taskpool.map(states.pid_of, [None], backend=backend)


def test_threads_and_the_caller() -> None:
    """So it does for those without processes."""
    assert taskpool.map(states.thread_name, [None], backend="serial") == [threading.current_thread().name]
    assert taskpool.map(states.thread_name, [None], backend="thread") != [threading.current_thread().name]
