"""Every backend: the lazy maps and `outcomes`: bounded on both sides, and no failure costs another item."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import processes, tasks
from tests.helpers import (
    PATIENCE,
    Backend,
    bounded,
    lines,
    on_all,
    on_hosts,
    on_one_host,
    on_pools,
    run_script,
    wait_until,
)

pytestmark = pytest.mark.core

Pool = Callable[..., taskpool.Executor]
LAZY = ["imap", "imap_unordered", "outcomes"]


def counted(numbers: Iterator[int]) -> tuple[Iterator[int], list[int]]:
    """Return an iterator over the numbers, and the list of those that were taken from it."""
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in numbers:
            taken.append(number)
            yield number

    return source(), taken


# ---------------------------------------------------------------------------------------------- maps


@on_all
def test_starmap_spreads_each_item(pool: Pool) -> None:
    """Tuples of any length, from any iterable."""
    assert list(pool().starmap(tasks.add, iter([(1,), (2, 3), [4, 5, 6]]))) == [1, 5, 15]


@on_all
def test_imap_is_lazy_for_lists_too(pool: Pool, tmp_path: Path) -> None:
    """At most `buffersize` items are started ahead of the results, also where the length is known."""
    notes = tmp_path / "notes"
    results = pool().imap(tasks.note, [notes] * 100, list(range(100)), buffersize=3)
    assert [next(results), next(results)] == [0, 1]
    results.close()  # type: ignore[attr-defined]
    assert len(lines(notes)) <= 2 + 3 + 1


@on_all
@pytest.mark.parametrize("name", LAZY)
def test_an_endless_input_is_bounded_in_and_out(pool: Pool, name: str) -> None:
    """Read-ahead counts items that were read and not handed out, whether they have finished or not."""
    source, taken = counted(itertools.count())
    results = getattr(pool(), name)(tasks.square, source, buffersize=6)
    for number in range(1, 30):
        next(results)
        assert len(taken) <= number + 6 + 1
    results.close()


@on_pools
def test_imap_unordered_gives_results_as_they_come(pool: Pool, tmp_path: Path) -> None:
    """A slow item holds up no quick one."""
    release = tmp_path / "release"
    calls = [(tasks.await_file, release), (tasks.square, 2), (tasks.square, 3)]
    results = pool(2).imap_unordered(tasks.call, calls, chunksize=1)
    assert sorted([next(results), next(results)]) == [4, 9]
    release.touch()
    assert list(results) == [None]


@on_all
@pytest.mark.parametrize("name", ["map", "imap", "imap_unordered", "outcomes"])
@pytest.mark.parametrize("inputs", [([1, 2], [1]), (iter([1, 2]), [1])], ids=["lists", "iterator"])
def test_strict_wants_inputs_of_the_same_length(pool: Pool, name: str, inputs: Any) -> None:
    """As the built-in `zip`: at the call where the lengths are known, else when the difference is met."""
    with pytest.raises(ValueError, match=r"length|shorter|longer"):
        list(getattr(pool(), name)(tasks.add, *inputs, strict=True))


@on_all
@pytest.mark.parametrize("name", [*LAZY, "map"])
def test_several_inputs_are_zipped(pool: Pool, name: str) -> None:
    """The shortest ends the map, unless `strict` finds them equal."""
    results = getattr(pool(), name)(tasks.add, range(5), itertools.count(10))
    values = [result.value if name == "outcomes" else result for result in results]
    assert sorted(values) == [10, 12, 14, 16, 18]
    assert len(list(getattr(pool(), name)(tasks.add, [1, 2], (3, 4), strict=True))) == 2


@on_hosts
def test_the_error_of_a_map_says_which_item_it_is_of(pool: Pool) -> None:
    """With the item itself where it is at hand, how many have finished, and where the others are kept."""
    with pytest.raises(ValueError, match="bad item 5") as caught:
        list(pool().map(tasks.fail_at, [5] * 9, range(9), chunksize=3))
    assert "raised by item 5" in "\n".join(caught.value.__notes__)
    assert "`outcomes` keeps them" in "\n".join(caught.value.__notes__)
    with pytest.raises(TypeError) as unlucky:
        list(pool().map(tasks.square, [1, "text"]))
    assert "item 1 ('text')" in unlucky.value.__notes__[-1]


@on_hosts
@pytest.mark.parametrize("chunksize", [None, 1, 10])
def test_chunks_are_invisible_when_an_item_kills_its_worker(pool: Pool, tmp_path: Path, chunksize: int | None) -> None:
    """The items before it keep their results, those behind it run elsewhere, and only it fails."""
    notes = tmp_path / "notes"
    results = pool(1).outcomes(tasks.die_at, [6] * 10, [notes] * 10, range(10), chunksize=chunksize, ordered=True)
    outcomes = list(results)
    assert [outcome.ok for outcome in outcomes] == [True] * 6 + [False] + [True] * 3
    assert isinstance(outcomes[6].error, taskpool.WorkerCrashedError)
    assert [outcome.value for outcome in outcomes if outcome.ok] == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    started = lines(notes)
    assert set(started) == {str(number) for number in range(10)}
    assert started.count("6") == 1


@on_hosts
def test_one_result_that_cannot_be_loaded_costs_one_item(pool: Pool) -> None:
    """Although its neighbours travelled in the same frame."""
    kinds = [int, tasks.FailsAtLoad, tasks.Plain, int]
    outcomes = list(pool(1).outcomes(tasks.make, kinds, chunksize=4, ordered=True))
    assert [outcome.ok for outcome in outcomes] == [True, False, True, True]
    assert isinstance(outcomes[1].error, taskpool.UnpickleError)


@on_hosts
@pytest.mark.parametrize("chunksize", [None, 1, 20])
@pytest.mark.parametrize("hangs", [True, False])
def test_a_result_that_harms_its_pickling_costs_one_item(pool: Pool, chunksize: int | None, hangs: bool) -> None:
    """Although it was to be written together with its neighbours."""
    executor = pool(1, task_timeout=0.5, grace=0.1)
    harm = [[50] * 100, [os.getpid()] * 100, [hangs] * 100, range(100)]
    outcomes = list(executor.outcomes(tasks.return_or_harm_at, *harm, chunksize=chunksize, ordered=True))
    expected = taskpool.TaskTimeoutError if hangs else taskpool.WorkerCrashedError
    assert {outcome.index: type(outcome.error) for outcome in outcomes if not outcome.ok} == {50: expected}
    assert [outcome.value for outcome in outcomes if outcome.ok] == [*range(50), *range(51, 100)]


@on_all
def test_a_sequence_that_iterates_in_its_own_way_is_iterated(pool: Pool) -> None:
    """And not sliced, as the built-in `map` does not slice it."""
    assert list(pool().map(tasks.identity, tasks.CountsDown([1, 2, 3]))) == [3, 2, 1]


@on_hosts
def test_an_alarm_that_an_item_leaves_hits_no_other(pool: Pool) -> None:
    """Of the same chunk."""
    results = pool(1).map(tasks.set_alarm_at, [3] * 8, range(8), chunksize=8)
    assert list(results) == list(range(8))


# ---------------------------------------------------------------------------------------------- outcomes


@on_all
def test_an_outcome_says_all_about_an_item(pool: Pool) -> None:
    """Where it stood, what it was, how it ended, how often and how long it ran, where and when."""
    before = time.time()
    first, second = pool(1, name="ours").outcomes(tasks.fail_at, [1, 1], [0, 1], ordered=True)
    after = time.time()
    assert (first.index, first.item, first.ok, first.value, first.error, first.attempts) == (
        0,
        (1, 0),
        True,
        0,
        None,
        1,
    )
    assert (second.index, second.item, second.ok, second.attempts) == (1, (1, 1), False, 1)
    with pytest.raises(ValueError, match="bad item 1") as caught:
        _ = second.value
    assert caught.value is second.error
    for outcome in (first, second):
        assert outcome.worker
        assert outcome.started is not None
        assert before - 0.1 <= outcome.queued <= outcome.started <= outcome.finished <= after + 0.1
        assert 0 <= outcome.seconds <= after - before + 0.1


def test_an_outcome_is_frozen_and_short(pool: Pool) -> None:
    """It cannot be changed, and its text fits into a line whatever it holds."""
    outcome = next(pool(1).outcomes(tasks.identity, ["x" * 5000]))
    with pytest.raises(AttributeError):
        outcome.item = 2  # type: ignore[misc]
    assert len(repr(outcome)) < 300
    assert "\n" not in repr(outcome)


@on_all
def test_no_failure_costs_another_item(pool: Pool, backend: Backend) -> None:
    """Each of what can go wrong is one record; all others have their results."""
    calls: list[Any] = [(tasks.square, number) for number in range(30)]
    calls[3] = (tasks.fail_locally_with, "odd")
    calls[11] = (tasks.raise_two, 1)
    calls[17] = (tasks.exit_with, 3) if backend.hosted else (tasks.fail_locally_with, "no process to lose")
    calls[23] = (tasks.spin_long, 60)
    kinds = {
        outcome.index: type(outcome.error) for outcome in pool(2, task_timeout=1, grace=0.2).outcomes(tasks.call, calls)
    }
    failed = {index: kind for index, kind in kinds.items() if kind is not type(None)}
    assert len(kinds) == 30
    assert failed == {
        3: ValueError,
        11: tasks.TwoArguments,
        17: taskpool.WorkerCrashedError if backend.hosted else ValueError,
        23: taskpool.TaskTimeoutError,
    }


@on_pools
def test_outcomes_come_as_they_are_known(pool: Pool, tmp_path: Path) -> None:
    """Or in the order of the input, if that is asked for."""
    release = tmp_path / "release"
    calls = [(tasks.await_file, release), (tasks.square, 2)]
    executor = pool(2)
    unordered = executor.outcomes(tasks.call, calls, chunksize=1)
    assert next(unordered).index == 1
    ordered = executor.outcomes(tasks.call, calls, chunksize=1, ordered=True)
    release.touch()
    assert [outcome.index for outcome in ordered] == [0, 1]
    assert [outcome.index for outcome in unordered] == [0]


@on_pools
def test_a_timeout_ends_outcomes_and_what_they_started(pool: Pool, tmp_path: Path, backend: Backend) -> None:
    """What was handed out before is the caller's; what runs is stopped."""
    release = tmp_path / "release"
    stuck = (tasks.sleep_for_ever_about, None) if backend.hosted else (tasks.await_file, release)
    executor = pool(1)
    got = []
    with pytest.raises(taskpool.CallTimeoutError, match=r"1\.5 seconds") as caught:
        for outcome in executor.outcomes(tasks.call, [(tasks.square, 3), stuck], timeout=1.5, chunksize=1):
            got.append(outcome.value)  # noqa: PERF401  (what was handed out before the error is kept)
    assert got == [9]
    assert caught.value.finished == 1
    release.touch()
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_pools
def test_termination_is_the_outcome_of_what_did_not_run(pool: Pool, tmp_path: Path) -> None:
    """Nobody waits for ever, and every item has its record."""
    executor = pool(1, grace=0.2)
    outcomes = executor.outcomes(
        tasks.note_then, [tmp_path / "notes"] * 3, range(3), [tasks.sleep_briefly_for_ever] * 3
    )
    bounded(lambda: wait_until(lambda: lines(tmp_path / "notes")))
    executor.terminate()
    kinds = [type(outcome.error) for outcome in bounded(lambda: list(outcomes))]
    assert kinds == [CancelledError] * 3


def test_outcomes_keep_no_item_that_was_handed_out(pool: Pool) -> None:
    """A million items pass through in a bound of memory."""
    outcomes = pool(2).outcomes(tasks.identity, (bytes([number % 256]) * 10_000 for number in itertools.count()))
    before = processes.resident()
    for outcome in itertools.islice(outcomes, 20_000):
        assert len(outcome.value) == 10_000
    assert processes.resident() - before < 100 << 20  # 20,000 of them are 200 MB
    outcomes.close()  # type: ignore[attr-defined]


@on_one_host
def test_ctrl_c_in_the_middle_ends_cleanly(backend: Backend) -> None:
    """One line of output, nothing left running, and what was handed out is the caller's."""
    ended = run_script(
        f"""
import sys, taskpool
from tests import tasks
got = []
if __name__ == "__main__":
    with taskpool.Executor(2, **{backend.options!r}) as pool:
        try:
            for outcome in pool.outcomes(tasks.call, [(tasks.square, 2), *[(tasks.sleep_for_ever_about, 1)] * 9]):
                got.append(outcome.value)
                print("ready", flush=True)
        except KeyboardInterrupt:
            print("kept", got)
""",
        signals=(("ready", 2),),
        group=True,
    )
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == ["ready", "kept [4]"]


# ---------------------------------------------------------------------------------------------- what a task can ask


@on_all
def test_a_task_knows_itself(pool: Pool) -> None:
    """Its name, its id, its attempt and its deadline; outside of tasks there is none."""
    executor = pool(1, task_timeout=30)
    future = executor.options(name="resize").submit(tasks.describe_itself)
    name, task_id, attempt, remaining, stopping = future.result(PATIENCE)
    assert (name, task_id, attempt, stopping) == ("resize", future.task_id, 1, False)
    assert 0 < remaining <= 30
    assert executor.options(task_timeout=None).submit(tasks.describe_itself).result(PATIENCE)[3] is None
    assert taskpool.current_task() is None


@on_all
@pytest.mark.parametrize("chunksize", [1, 5])
def test_items_know_themselves(pool: Pool, chunksize: int) -> None:
    """Each has an id of its own, within that of its map."""
    ids = [each[1] for each in pool(2).map(tasks.describe_itself, range(10), chunksize=chunksize)]
    jobs = {text.split(":")[0] for text in ids}
    assert len(jobs) == 1
    assert [text.split(":")[1] for text in ids] == [str(number) for number in range(10)]


@on_hosts
def test_threads_of_a_task_know_it(pool: Pool) -> None:
    """In a worker process, which runs nothing else."""
    assert pool(1).options(name="resize").submit(tasks.in_thread, tasks.describe_itself).result(PATIENCE)[0] == "resize"


@on_pools
def test_a_task_that_is_stopped_can_see_it(pool: Pool, tmp_path: Path) -> None:
    """While it cleans up, `cancelled` is true."""
    executor = pool(1, grace=5)
    future = executor.submit(tasks.note_whether_stopped, tmp_path / "started", tmp_path / "notes")
    wait_until((tmp_path / "started").exists)
    future.cancel()
    wait_until(lambda: lines(tmp_path / "notes") == ["False", "True"])
    with pytest.raises(CancelledError):
        future.result(PATIENCE)


@on_pools
def test_a_report_is_the_futures_progress(pool: Pool, tmp_path: Path) -> None:
    """As soon as the task has made it."""
    future = pool(1).submit(tasks.report_and_hold, tmp_path / "release")
    wait_until(lambda: future.progress == (1.0, 4.0))
    (tmp_path / "release").touch()
    assert future.result(PATIENCE) == "done"


@on_all
@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (("1", 2), TypeError, "done"),
        ((1, None), TypeError, "total"),
        ((True, 2), TypeError, "done"),
        ((-1, 2), ValueError, "done >= 0"),
        ((1, 0), ValueError, "total > 0"),
        ((float("nan"), 1), ValueError, "done >= 0"),
    ],
    ids=str,
)
def test_bad_reports_are_refused(pool: Pool, arguments: Any, kind: type[Exception], text: str) -> None:
    """In the task, by a message that names what is wrong."""
    with pytest.raises(kind, match=text):
        pool(1).submit(tasks.report, *arguments).result(PATIENCE)


# ---------------------------------------------------------------------------------------------- the module's calls


@pytest.mark.parametrize("name", ["process", "thread", "serial"])
def test_the_module_level_calls(name: str) -> None:
    """They need no executor; options of the task and of the shared executor are given along."""
    ended = run_script(
        f"""
import taskpool
from tests import tasks
if __name__ == "__main__":
    how = dict(backend={name!r}, max_workers=2)
    print(taskpool.starmap(tasks.add, [(1, 2), (3, 4)], **how))
    print(list(taskpool.imap(tasks.square, range(4), task_timeout=20, **how)))
    print(sorted(taskpool.imap_unordered(tasks.square, range(4), retry=2, **how)))
    for outcome in taskpool.outcomes(tasks.fail_at, [1, 1], [0, 1], ordered=True, retry=2, name="try", **how):
        print(outcome.index, outcome.ok, outcome.attempts)
"""
    )
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == ["[3, 7]", "[0, 1, 4, 9]", "[0, 1, 4, 9]", "0 True 1", "1 False 2"]


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("name", ["map", "starmap", "imap", "imap_unordered", "outcomes"])
def test_unknown_options_of_the_module_level_calls_are_refused(name: str) -> None:
    """At the call, by name."""
    with pytest.raises(TypeError, match="tiemout"):
        getattr(taskpool, name)(tasks.square, [1], tiemout=3)


# ---------------------------------------------------------------------------------------------- the end, and forks


def test_a_shutdown_within_a_bound_does_not_read_an_endless_input(pool: Pool) -> None:
    """Neither before anybody has asked for a result, nor behind that."""
    for asked in (0, 1):
        executor = pool(2)
        results = executor.map(tasks.square, itertools.count())
        assert [next(results) for _ in range(asked)] == [0] * asked
        bounded(lambda executor=executor: executor.shutdown(timeout=0.3), 5)


def test_leaving_with_a_map_that_is_being_read_does_not_read_it_to_its_end() -> None:
    """It may be endless."""
    ended = run_script(
        """
import itertools, taskpool
with taskpool.Executor(2) as pool:
    results = pool.map(abs, itertools.count())
    print(next(results))
try:
    for _ in results: pass
except RuntimeError as error:
    print(error)
""",
        timeout=20,
    )
    assert ended.out.splitlines() == ["0", "cannot schedule new futures after shutdown"]


@on_all
def test_results_of_a_map_are_there_after_the_shutdown(pool: Pool) -> None:
    """Also those of an input of unknown length, as with the standard library."""
    executor = pool(2)
    results = executor.map(tasks.square, iter(range(2000)))
    executor.shutdown()
    assert list(results) == [number * number for number in range(2000)]


@on_hosts
def test_a_map_in_a_forked_child_refuses(pool: Pool) -> None:
    """`next` raises, closing does nothing, and waiting in the ways of the standard library raises, too."""
    executor = pool(1)
    results = executor.imap(tasks.square, itertools.count())
    future = executor.submit(tasks.sleep_for_ever)
    child = os.fork()
    if not child:
        refused = 0
        for wait in (
            lambda: next(results),
            lambda: concurrent.futures.wait([future], 5),
            lambda: list(concurrent.futures.as_completed([future], 5)),
            lambda: future.add_done_callback(print),
        ):
            try:
                wait()
            except taskpool.ForkedExecutorError:
                refused += 1
        results.close()  # type: ignore[attr-defined]
        os._exit(refused)
    assert os.waitstatus_to_exitcode(bounded(lambda: os.waitpid(child, 0))[1]) == 4
    results.close()  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- progress


@on_all
@pytest.mark.parametrize("name", ["map", "imap", "imap_unordered", "outcomes"])
def test_progress_counts_items_and_failures(pool: Pool, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the chunks are; on standard error, in a line where that is no terminal."""
    results = getattr(pool(), name)(tasks.fail_at, itertools.repeat(99), range(30), chunksize=7, progress="resize")
    assert len(list(results)) == 30
    assert capfd.readouterr().err.startswith("resize: 30 ")


@on_all
def test_progress_of_a_map_that_nobody_reads_ends(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    """With the iterator."""
    results = pool().imap(tasks.square, range(10), progress=True)
    del results
    assert capfd.readouterr().err


def test_progress_is_off_unless_asked_for(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    """And what is neither a label nor a bool is refused."""
    assert len(list(pool().map(tasks.square, range(30)))) == 30
    assert capfd.readouterr().err == ""
    with pytest.raises(TypeError, match="progress"):
        pool().map(tasks.square, [1], progress=3)  # type: ignore[arg-type]
