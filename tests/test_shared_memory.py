"""Large arguments and results lie in blocks of memory: they stay what they were, and nothing is left of them."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import taskpool
from taskpool._engine import memory
from tests import processes, tasks
from tests.helpers import PATIENCE, lines, on_all, on_hosts, outcome, wait_until

pytestmark = pytest.mark.skipif(not memory.can_share(), reason="this system has no /proc")

Pool = Callable[..., taskpool.Executor]
MB = 1 << 20
NUMBERS = np.arange(200_000, dtype="f8")


def _read_only() -> Any:
    array = NUMBERS.copy()
    array.flags.writeable = False
    return array


VALUES: dict[str, Any] = {
    "bytes": tasks.payload(3 * MB),
    "bytearray": bytearray(tasks.payload(300_000)),
    "text": "\N{GREEK SMALL LETTER PI}" * 300_000,
    "array": NUMBERS,
    "every third": NUMBERS[::3],
    "Fortran": np.asfortranarray(NUMBERS.reshape(400, 500)),
    "read-only": _read_only(),
    "empty": np.zeros((0, 5)),
    "objects": np.array([1, "x", None] * 100_000, dtype=object),
    "nested": {"a": [NUMBERS, (NUMBERS * 2, tasks.payload(300_000))], "b": np.zeros(0)},
    "as many as fit": [np.full(20_000, number) for number in range(memory.MOST_PARTS - 1)],
    "more than fit": [np.full(20_000, number) for number in range(memory.MOST_PARTS + 1)],
    "just small": bytes(memory.LARGE - 1),
    "just large": np.zeros(memory.LARGE, "u1"),
}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


def _warm(executor: taskpool.Executor, size: int) -> None:
    """See that each worker's next large result goes into a block: so do those that follow a large one."""
    for result in [executor.submit(tasks.filled, size, 1.0) for _ in range(4)]:
        result.result(PATIENCE)


def _blocks() -> int:
    return sum("memfd:taskpool" in name for name in processes.census().descriptors.values())


# ---------------------------------------------------------------------------------------------- there and back


@pytest.mark.core
@on_all
def test_large_data_arrives_as_it_was(pool: Pool) -> None:
    """There and back, twice, and as the items of a map."""
    executor = pool(2)
    for _ in range(2):
        futures = {name: executor.submit(tasks.identity, value) for name, value in VALUES.items()}
        assert [name for name, future in futures.items() if not _same(VALUES[name], future.result(PATIENCE))] == []
    assert _same(list(VALUES.values()), list(executor.map(tasks.identity, VALUES.values(), timeout=PATIENCE)))


@pytest.mark.core
@on_hosts
def test_a_change_after_submit_is_not_seen(pool: Pool) -> None:
    """The next submit sees it, although the same array lies in a block by then."""
    executor = pool(1)
    array = np.ones(MB)
    futures = []
    for number in range(6):
        array[-1] = number
        futures.append(executor.submit(tasks.total, array))
        array[0] = 1.0
    assert [future.result(PATIENCE) for future in futures] == [MB - 1.0 + number for number in range(6)]


@on_hosts
def test_an_array_that_waits_many_times_lies_in_one_block(pool: Pool, tmp_path: Path) -> None:
    """However often it was submitted."""
    executor = pool(1)
    executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    wait_until((tmp_path / "started").exists)
    before = processes.in_memory_files()
    futures = [executor.submit(tasks.total, np.ones(MB)) for _ in range(20)]
    assert processes.in_memory_files() - before < 40 * MB  # of 160
    (tmp_path / "release").touch()
    assert [future.result(PATIENCE) for future in futures] == [float(MB)] * 20


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.core
@on_hosts
def test_what_a_task_keeps_never_changes(pool: Pool) -> None:
    """Although the parent uses the block again for the next task."""
    executor = pool(1)
    for number in range(1, 5):
        assert executor.submit(tasks.keep, tasks.filled(2 * MB, number)).result(PATIENCE) == number
        assert executor.submit(tasks.total, tasks.filled(2 * MB, 9.0)).result(PATIENCE) == 9.0 * MB / 4
    assert executor.submit(tasks.kept_totals).result(PATIENCE) == [number * MB / 4 for number in range(1, 5)]


@on_hosts
def test_what_items_keep_never_changes(pool: Pool) -> None:
    """Also behind the end of their range."""
    executor = pool(1)
    list(executor.map(tasks.keep, (tasks.filled(2 * MB, number) for number in range(4)), timeout=PATIENCE))
    list(executor.map(tasks.total, (tasks.filled(2 * MB, 9.0) for _ in range(8)), timeout=PATIENCE))
    assert executor.submit(tasks.kept_totals).result(PATIENCE) == [number * MB / 4 for number in range(4)]


@pytest.mark.core
@on_hosts
def test_a_child_of_a_task_sees_its_argument_for_ever(pool: Pool, tmp_path: Path) -> None:
    """A child that was forked in a task outlives it, and looks at the argument when others have had the block."""
    executor = pool(1)
    release, path = tmp_path / "release", tmp_path / "sum"
    executor.submit(tasks.look_in_a_child, tasks.filled(2 * MB, 4.0), release, path).result(PATIENCE)
    for _ in range(4):
        executor.submit(tasks.total, tasks.filled(2 * MB, 9.0)).result(PATIENCE)
    release.touch()
    assert wait_until(lambda: lines(path)) == [str(4.0 * MB / 4)]


@pytest.mark.core
@on_hosts
def test_results_that_are_kept_never_change(pool: Pool) -> None:
    """Whatever others are dropped, and whatever the user writes into them; and they take few descriptors."""
    executor = pool(2)
    futures = [executor.submit(tasks.filled, 2 * MB, number) for number in range(150)]
    kept = [future.result(PATIENCE) for future in futures if not futures.index(future) % 2]
    futures.clear()
    kept[3][:] = 0.0
    list(executor.map(tasks.filled, [2 * MB] * 20, [9.0] * 20, timeout=PATIENCE))
    assert [tasks.total(array) for array in kept] == [
        0.0 if place == 3 else 2 * place * MB / 4 for place in range(len(kept))
    ]
    assert _blocks() < 2 * memory.MOST_HANDED + 30


@pytest.mark.core
def test_a_child_of_the_parent_sees_a_result_for_ever(pool: Pool, tmp_path: Path) -> None:
    """What it looks at is not used again, although the parent has dropped it."""
    executor = pool(1)
    _warm(executor, 2 * MB)
    result = executor.submit(tasks.filled, 2 * MB, 4.0).result(PATIENCE)
    child = tasks.look_in_a_child(result, tmp_path / "release", tmp_path / "sum")
    del result
    for _ in range(6):
        executor.submit(tasks.filled, 2 * MB, 9.0).result(PATIENCE)
    (tmp_path / "release").touch()
    assert wait_until(lambda: lines(tmp_path / "sum")) == [str(4.0 * MB / 4)]
    os.waitpid(child, 0)


def test_a_child_that_drops_what_waits_wakes_nobody() -> None:
    """It has the parent's blocks in its memory, but what it would wake the parent by may be a file of its own."""
    calls: list[float] = []
    blocks = memory.Blocks(calls.append)
    leases, _ = blocks.store([[bytes(2 * MB)]])
    child = os.fork()
    if not child:
        leases.clear()
        os._exit(len(calls))
    assert os.waitpid(child, 0)[1] == 0
    leases.clear()
    assert len(calls) == 1
    blocks.close()


# ---------------------------------------------------------------------------------------------- descriptors and memory


@pytest.fixture
def few() -> Iterator[Callable[[int], None]]:
    """Let this process have only so many descriptors more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(processes.census().descriptors) + more, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.core
@on_hosts
def test_tasks_that_wait_take_few_descriptors(pool: Pool, few: Callable[[int], None]) -> None:
    """A thousand large arguments wait, and the program still finds one; so do new workers."""
    executor = pool(2)
    few(200)
    futures = [executor.submit(tasks.total, tasks.filled(memory.LARGE, number)) for number in range(1000)]
    assert _blocks() < 100
    with Path(os.devnull).open():
        assert [future.result(PATIENCE) for future in futures] == [number * memory.LARGE / 8 for number in range(1000)]


@pytest.mark.core
def test_a_result_arrives_without_a_descriptor_to_spare(pool: Pool, few: Callable[[int], None], tmp_path: Path) -> None:
    """It lies in a block that cannot be mapped then; the worker did nothing wrong, and lives."""
    executor = pool(1)
    _warm(executor, 2 * MB)
    pid = executor.submit(tasks.pid).result(PATIENCE)
    future = executor.submit(tasks.call_behind, tmp_path / "release", tasks.filled, 2 * MB, 3.0)
    gate = os.open(tmp_path / "gate", os.O_CREAT | os.O_WRONLY)
    few(1)
    fillers = []
    try:
        while True:
            fillers.append(os.dup(gate))
    except OSError as error:
        assert error.errno == errno.EMFILE
    os.link(tmp_path / "gate", tmp_path / "release")
    try:
        assert wait_until(future.done)
    finally:
        for fd in [gate, *fillers]:
            os.close(fd)
    assert tasks.total(future.result(PATIENCE)) == 3.0 * MB / 4
    assert executor.submit(tasks.pid).result(PATIENCE) == pid


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.ENOMEM])
def test_without_blocks_all_goes_through_the_pipe(pool: Pool, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Where the system gives none."""

    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(memory, "memory_file", refuse)
    executor = pool(2)
    assert [tasks.total(array) for array in executor.map(tasks.identity, [NUMBERS] * 6)] == [tasks.total(NUMBERS)] * 6


@pytest.mark.core
@on_hosts
def test_workers_that_cannot_open_blocks_get_all_through_the_pipe(pool: Pool) -> None:
    """Each task runs once; what waits, maps and retries as well."""
    executor = pool(2, initializer=tasks.refuse_blocks)
    futures = [executor.submit(tasks.identity, value) for value in VALUES.values()]
    assert all(map(_same, VALUES.values(), [future.result(PATIENCE) for future in futures]))
    assert _same(list(VALUES.values()), list(executor.map(tasks.identity, VALUES.values(), timeout=PATIENCE)))
    again = executor.options(retry=3)
    failing = [again.submit(tasks.fail_at, 0, 0), again.submit(tasks.total, NUMBERS)]
    assert isinstance(outcome(failing[0]), ValueError)
    assert failing[1].result(PATIENCE) == tasks.total(NUMBERS)
    assert executor.stats().crashed == 0


@pytest.mark.core
def test_memory_is_given_back(pool: Pool) -> None:
    """Some seconds after the last large task; also what was lent to workers that wait."""
    executor = pool(2)
    for _ in range(3):
        _warm(executor, 20 * MB)
    assert executor.submit(tasks.total, tasks.filled(20 * MB, 1.0)).result(PATIENCE)
    assert processes.in_memory_files() >= 20 * MB
    wait_until(lambda: processes.in_memory_files() < MB, 3 * memory.KEEP + 2, "memory given back")
    assert _same(executor.submit(tasks.identity, NUMBERS).result(PATIENCE), NUMBERS)
    _warm(executor, 2 * MB)


def test_a_block_that_nobody_got_is_closed() -> None:
    """A signal handler may raise where it was just between two hands."""
    before = _blocks()
    block = memory.Block(MB)
    assert _blocks() == before + 1
    del block
    assert _blocks() == before


@on_hosts
def test_large_data_of_a_function_is_not_copied(pool: Pool) -> None:
    """A map's function with an array is mapped for each range, and let go of before that ends."""
    executor = pool(1, initializer=tasks.count_copies)
    results = list(executor.map(tasks.Scales(2 * MB), range(30), chunksize=3, timeout=PATIENCE))
    assert results == [2.0 * number for number in range(30)]
    assert executor.submit(tasks.count_held).result(PATIENCE) == 0


# ---------------------------------------------------------------------------------------------- deaths and limits


@pytest.mark.core
@on_hosts
def test_a_death_in_the_middle_of_a_block_costs_one_task(pool: Pool) -> None:
    """The next ones have blocks without a trace of it."""
    executor = pool(1)
    _warm(executor, 2 * MB)
    failed = executor.submit(tasks.die_in_a_block, 2 * MB)
    others = [executor.submit(tasks.filled, 2 * MB, number) for number in range(4)]
    assert isinstance(outcome(failed), taskpool.WorkerCrashedError)
    assert [tasks.total(future.result(PATIENCE)) for future in others] == [number * MB / 4 for number in range(4)]


@pytest.mark.core
@on_hosts
def test_a_result_that_is_stored_past_the_limit_counts(pool: Pool) -> None:
    """The task itself kept it; its result becomes more all the time, if slowly."""
    executor = pool(1, task_timeout=0.6, grace=0.3)
    _warm(executor, 8 * MB)
    started = time.monotonic()
    assert tasks.total(executor.submit(tasks.write_slowly_to_a_block, 8 * MB, 0.15).result(PATIENCE)) == 5.0 * MB
    assert time.monotonic() - started > 1.2


@on_hosts
def test_kills_leave_no_block(pool: Pool, tmp_path: Path) -> None:
    """Whatever the workers had: an argument, a block for a result, or both."""
    executor = pool(2)
    _warm(executor, 2 * MB)
    futures = [executor.submit(tasks.die_at, 1, tmp_path / "path", 1) for _ in range(10)]
    futures += [executor.submit(tasks.die_in_a_block, 2 * MB) for _ in range(10)]
    futures += [executor.submit(tasks.sleep_for_ever_about, NUMBERS) for _ in range(4)]
    for future in futures[:20]:
        outcome(future)
    for future in futures[20:]:
        future.cancel()
        outcome(future)
    executor.shutdown()
    futures.clear()
    assert processes.in_memory_files() == 0
