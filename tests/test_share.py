"""`taskpool.share`: one copy of a value for all tasks, for as long as anybody needs it and no longer."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import taskpool
from taskpool import _share
from taskpool._engine import descriptors, memory
from taskpool._engine.channel import Channel
from taskpool._engine.sharing import KEY, carried
from tests import processes, tasks
from tests.helpers import PATIENCE, Backend, on_all, on_every_host, on_hosts, outcome, wait_until
from tests.scripts import run_main

pytestmark = pytest.mark.skipif(not memory.can_share(), reason="this system has no /proc")

Pool = Callable[..., taskpool.Executor]
SIZE = 1 << 20
TOTAL = SIZE / 8


def _array() -> Any:
    return tasks.filled(SIZE, 1.0)


def _forgotten(executor: taskpool.Executor, count: int = 0) -> None:
    """Wait until the executor's only worker keeps no more shared values than so many."""
    gc.collect()
    wait_until(lambda: executor.submit(tasks.count_shared).result(PATIENCE) == count, what="shared values forgotten")


# ---------------------------------------------------------------------------------------------- the value


@pytest.mark.core
@on_all
def test_tasks_see_the_value(pool: Pool) -> None:
    """As it was when it was shared; by submit, in a partial, as an item, inside other objects, in a closure."""
    executor = pool(2)
    array = _array()
    shared = taskpool.share(array)
    array[:] = 0.0
    assert executor.submit(tasks.shared_total, shared).result(PATIENCE) == TOTAL
    assert executor.submit(tasks.first_of, [shared]).result(PATIENCE) == TOTAL
    assert executor.submit(lambda: tasks.shared_total(shared)).result(PATIENCE) == TOTAL
    assert list(executor.map(partial(tasks.shared_total, shared), range(50))) == [TOTAL + n for n in range(50)]
    assert list(executor.map(tasks.shared_total, [shared] * 5)) == [TOTAL] * 5
    assert executor.submit(tasks.identity, shared).result(PATIENCE) is shared


@on_all
@pytest.mark.parametrize("value", [None, 7, "x" * 5000, b"y" * 300_000, {"a": [1, 2]}, np.zeros((0, 3))], ids=type)
def test_any_value_can_be_shared(pool: Pool, value: Any) -> None:
    """Small ones travel with the handle."""
    found = pool(1).submit(getattr, taskpool.share(value), "value").result(PATIENCE)
    assert type(found) is type(value)
    assert found == value if not isinstance(value, np.ndarray) else found.shape == value.shape


@pytest.mark.core
@on_all
def test_an_array_cannot_be_changed(pool: Pool) -> None:
    """It is everybody's."""
    shared = taskpool.share(_array())
    assert "read-only" in pool(1).submit(tasks.try_to_change, shared).result(PATIENCE)


def test_what_cannot_be_pickled_is_refused() -> None:
    """At once, with the type's name; and no block is left."""
    with pytest.raises(taskpool.NotSendableError, match="generator"):
        taskpool.share(tasks.generator())


class _Interrupted(Exception):
    """Raised by a signal handler."""


def test_a_signal_handler_that_raises_is_not_to_blame_on_the_value() -> None:
    """What it raises goes its way; and what it kept from its end keeps no handle."""

    class PicklesAgain:
        def __reduce__(self) -> tuple[Any, ...]:
            if interruptions:
                raise interruptions.pop()
            return int, ()

    interruptions = [_Interrupted(), _Interrupted()]  # one for each way to pickle
    with pytest.raises(_Interrupted):
        taskpool.share(PicklesAgain())
    carried.__enter__()  # and the end of this never comes
    before = len(_share._known)
    pickle.dumps(taskpool.share(_array()))
    assert len(_share._known) == before


@on_every_host
def test_in_initargs(pool: Pool) -> None:
    """For each worker, also one that replaces another."""
    executor = pool(1, initializer=tasks.keep_shared, initargs=(taskpool.share(_array()),))
    for _ in range(2):
        assert executor.submit(tasks.kept_shared_total).result(PATIENCE) == TOTAL
        assert isinstance(outcome(executor.submit(tasks.kill_itself)), taskpool.WorkerCrashedError)


@on_hosts
def test_for_workers_of_a_worker(pool: Pool) -> None:
    """Which forget it, too."""
    executor = pool(1)
    shared = taskpool.share(_array())
    assert executor.submit(tasks.shared_total_below, shared, counts=True).result(PATIENCE) == [*[TOTAL] * 3, 1]
    del shared
    _forgotten(executor)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_for_other_processes(start: str) -> None:
    """Those of the standard library's pool; and as plain pickle for this one."""
    shared = taskpool.share(_array())
    assert pickle.loads(pickle.dumps(shared)) is shared
    with ProcessPoolExecutor(1, mp_context=get_context(start)) as executor:
        assert list(executor.map(tasks.shared_total, [shared] * 3, timeout=PATIENCE)) == [TOTAL] * 3


def test_where_memory_cannot_be_shared_it_travels(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each task."""
    monkeypatch.setattr(memory, "can_share", lambda: False)
    shared = taskpool.share(_array())
    assert list(pool(2).map(tasks.shared_total, [shared] * 3, timeout=PATIENCE)) == [TOTAL] * 3


def test_out_of_reach(pool: Pool) -> None:
    """What was freed says so."""
    shared = taskpool.share(_array())
    data = pickle.dumps(shared)
    del shared
    with pytest.raises(RuntimeError, match="cannot be reached"):
        _ = pickle.loads(data).value
    executor = pool(1, initializer=tasks.refuse_blocks)
    with pytest.raises(RuntimeError, match="cannot be reached"):
        executor.submit(tasks.shared_total, taskpool.share(_array())).result(PATIENCE)


# ---------------------------------------------------------------------------------------------- its life


@pytest.mark.core
@on_hosts
def test_a_handle_may_be_dropped_after_submit(pool: Pool, tmp_path: Path) -> None:
    """Tasks that wait count: of calls, of maps whose items are changed meanwhile, and what shares itself on the way."""
    executor = pool(1)
    executor.submit(tasks.await_file, tmp_path / "release")
    items = [[taskpool.share(_array())] for _ in range(3)]
    call = executor.submit(tasks.shared_total, taskpool.share(_array()))
    own = executor.submit(tasks.totals_of, tasks.SharesItself(_array()), tasks.SharesItself(_array()))
    results = executor.map(tasks.first_of, items)
    for item in items:
        item.clear()
    gc.collect()
    (tmp_path / "release").touch()
    assert call.result(PATIENCE) == TOTAL
    assert own.result(PATIENCE) == 2 * TOTAL
    assert list(results) == [TOTAL] * 3
    del call, own, results
    _forgotten(executor)


@pytest.mark.core
@on_every_host
def test_workers_forget_what_was_dropped(pool: Pool) -> None:
    """And have none of its memory any more."""
    executor = pool(1)
    handles = [taskpool.share(_array()) for _ in range(3)]
    before = executor.submit(tasks.count_mapped).result(PATIENCE)  # a worker that was forked has the handles by now
    assert sum(executor.map(tasks.shared_total, handles)) == 3 * TOTAL
    handles.pop()
    _forgotten(executor, 2)
    handles.clear()
    _forgotten(executor)
    assert executor.submit(tasks.count_mapped).result(PATIENCE) == before
    assert processes.in_memory_files() < SIZE


@on_hosts
def test_a_handle_inside_a_shared_value(pool: Pool) -> None:
    """Lives as long as that, and is forgotten with it."""
    executor = pool(1)
    outer = taskpool.share([taskpool.share(_array()) for _ in range(2)])
    gc.collect()
    assert executor.submit(tasks.sum_of_inner, outer).result(PATIENCE) == 2 * TOTAL
    del outer
    _forgotten(executor)


@pytest.mark.core
@on_hosts
def test_handles_that_are_dropped_by_the_thousand(pool: Pool, tmp_path: Path) -> None:
    """While the worker is busy: all are forgotten, and the words about it leave room for the next task."""
    executor = pool(1)
    handles = [taskpool.share(number) for number in range(1000)]
    assert list(executor.map(getattr, handles, ["value"] * 1000)) == list(range(1000))
    assert executor.submit(tasks.count_shared).result(PATIENCE) == 1000
    executor.submit(tasks.hold, tmp_path / "started", tmp_path / "release")
    wait_until((tmp_path / "started").exists)
    handles.clear()
    gc.collect()
    future = executor.submit(tasks.identity, 1)
    (tmp_path / "release").touch()
    assert future.result(PATIENCE) == 1
    _forgotten(executor)


def test_words_about_them_leave_room_for_a_task() -> None:
    """In a pipe that nobody reads for now; and none is lost, also where the pipe is full."""
    channel = Channel()
    keys = [os.urandom(KEY) for _ in range(50_000)]
    channel.unsaid.extend(keys)
    channel.say()
    assert channel.send_packet(b"a task")
    channel.take_back()
    assert sorted(channel.unsaid) == sorted(keys)
    channel.said = 0
    while channel.send_packet(b"a task"):
        pass
    channel.say()
    assert sorted(channel.unsaid) == sorted(keys)
    channel.close()


def test_many_handles_take_few_descriptors(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small values take none; of others so many that some are left to the program. All can be used."""
    monkeypatch.setattr(memory, "DESCRIPTORS", os.sysconf("SC_OPEN_MAX") // 50)
    before = len(processes.census().descriptors)
    small = [taskpool.share(number) for number in range(40)]
    assert len(processes.census().descriptors) <= before + 1
    large = [taskpool.share(tasks.payload(5000)) for _ in range(200)]
    assert len(processes.census().descriptors) <= before + 60
    values = list(pool(2).map(getattr, small + large, ["value"] * 240, timeout=PATIENCE))
    assert values == [*range(40), *[tasks.payload(5000)] * 200]


def test_a_forked_child_neither_closes_nor_tells() -> None:
    """The handle that it has inherited is the parent's."""
    shared = taskpool.share(_array())
    told: list[bytes] = []

    class Engine:
        forget = staticmethod(told.append)

    engine = Engine()
    shared.sent_by(engine)
    child = os.fork()
    if not child:
        seen = tasks.shared_total(shared) == TOTAL
        others = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]  # one has the number of the parent's block
        del shared
        gc.collect()
        for fd in others:
            os.close(fd)
        os._exit(bool(told) or not seen)
    assert os.waitpid(child, 0)[1] == 0
    assert tasks.shared_total(shared) == TOTAL
    key = shared._key
    del shared
    assert told == [key]
    assert key not in _share._known


def test_what_the_very_end_frees_asks_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are empty by then."""
    blocks = memory.Blocks(lambda _: None)
    shared, block = taskpool.share(_array()), memory.Block(SIZE)
    leases, _ = blocks.store([[bytes(SIZE)]])
    with monkeypatch.context() as patch:
        for module in (_share, memory, descriptors):
            patch.setattr(module, "os", None)
        for each in (shared, block, *leases):
            each.__del__(lambda: True)  # type: ignore[attr-defined]
    assert tasks.shared_total(shared) == TOTAL
    leases.clear()
    blocks.close()


ALIVE = """
import builtins, numpy as np, taskpool
pool = executor(1)
class Own:
    def __init__(self, number): self.number = number
def look(shared): return shared.value[0].number + shared.value[1].sum()
shared = taskpool.share([Own(3), np.ones(1 << 17)])
print(pool.submit(look, shared).result(), type(shared.value[0]) is Own)
builtins.kept = [shared, pool.submit(np.ones, 1 << 18).result(), pool.submit(np.ones, 1 << 18).result(), pool]
builtins.kept.append(builtins.kept)
sys.kept = [taskpool.share(np.ones(1 << 17)), pool.submit(np.ones, 1 << 18).result()]  # till there is no os any more
sys.kept += [pool.submit(len, np.ones(1 << 18)), [module for name, module in sys.modules.items() if "taskpool" in name]]
"""


@pytest.mark.core
@on_hosts
def test_an_exit_with_handles_alive(backend: Backend, tmp_path: Path) -> None:
    """Handles, results and tasks that only the end of the interpreter frees: nothing is said about it."""
    ended = run_main(ALIVE, backend, tmp_path)
    assert (ended.code, ended.err) == (0, ""), ended
    assert ended.out == f"{3 + (1 << 17):.1f} True\n"
