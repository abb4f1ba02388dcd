"""A task that uses taskpool itself: it works or is refused with a sentence, it never hangs, and it leaves nothing."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool import _checks, _nesting
from taskpool._engine.channel import Channel, WorkerChannel
from tests import nest, processes, states, tasks
from tests.helpers import (
    HOSTS,
    PATIENCE,
    SERIAL,
    TEMPLATE,
    THREAD,
    Backend,
    at_most,
    bounded,
    lines,
    on_every_host,
    on_hosts,
    outcome,
    run_script,
    wait_until,
)

Pool = Callable[..., taskpool.Executor]

CPUS = len(os.sched_getaffinity(0))
NOT_SENT = "cannot be sent to a worker"


# ---------------------------------------------------------------------------------------------- executors of workers


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("inner", [*HOSTS, THREAD, SERIAL], ids=str)
def test_each_backend_inside_each(pool: Pool, backend: Backend, inner: Backend) -> None:
    """A task makes executors of any kind, and maps."""
    if (backend.start, inner.start) == ("fork", "forkserver"):
        pytest.skip("a forked process of multiprocessing takes its parent's forkserver for a child of its own")
    assert outcome(pool(1).submit(nest.map_on, inner.options, 5)) == [0, 1, 4, 9, 16]


@on_hosts
def test_the_shared_executor_of_a_worker_stays_warm(pool: Pool) -> None:
    """It is one for all tasks of that worker, and has workers of its own."""
    executor = pool(1)
    (worker, *first), second = (outcome(executor.submit(nest.pids_of_two_maps)) for _ in range(2))
    assert second == [worker, *first]
    assert len({os.getpid(), worker, *first}) == 3


@pytest.mark.core
@on_hosts
def test_workers_share_the_cpus(pool: Pool) -> None:
    """By default each worker starts no more workers than are left of the CPUs for it, but one."""
    top, below = outcome(pool(2).submit(nest.places, None))
    share = max(1, CPUS // 2)
    assert top == (1, 2, share)
    assert below == (2, 2 * share, max(1, CPUS // (2 * share)))


@pytest.mark.parametrize(("sharers", "workers"), [(1, 64), (2, 32), (3, 21), (64, 1), (1000, 1)])
def test_what_falls_to_a_worker(monkeypatch: pytest.MonkeyPatch, sharers: int, workers: int) -> None:
    """However many there are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(_nesting, "sharers", sharers)
    assert _checks.default_workers() == workers


def test_max_workers_is_kept_in_a_task(pool: Pool, tmp_path: Path) -> None:
    """Whoever says a number gets it."""
    assert outcome(pool(1).submit(nest.met, tmp_path / "notes", 3)) == 3


MODULE = """
import taskpool
from tests import nest
POOL = taskpool.Executor()
def look():
    return POOL._backend.workers, POOL.submit(nest.place).result()
"""


def test_an_executor_of_the_initializers_module(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker knows its place before anything of the user's is imported."""
    (tmp_path / "has_a_pool.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("has_a_pool")
    share = max(1, CPUS // 2)
    assert outcome(pool(2, initializer=module.look).submit(module.look)) == (
        share,
        (2, 2 * share, max(1, CPUS // (2 * share))),
    )
    module.POOL.shutdown()


@on_hosts
def test_log_records_come_from_below(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """What a task's own workers log reaches the main program, once."""
    assert outcome(pool(1).submit(nest.warn_below, "from below")) is None
    wait_until(lambda: "from below" in caplog.text)
    assert caplog.messages.count("from below") == 1


MAIN = """
import os, sys
import taskpool

class MainError(Exception):
    pass

class Point:
    def __init__(self, x):
        self.x = x

def fail(point):
    raise MainError(point)

def make(x):
    return Point(x)

def middle(x):
    try:
        taskpool.map(fail, [Point(x)])
    except MainError as error:
        assert type(error.args[0]) is Point
        with taskpool.Executor(1) as pool:
            point = pool.submit(make, x + 1).result()
            assert type(point) is Point
            return pool.submit(lambda point: Point(point.x + 1), point).result()

def main(**options):
    with taskpool.Executor(2, **options) as pool:
        points = list(pool.map(middle, range(2)))
        assert [type(point) for point in points] == [Point, Point]
        print([point.x for point in points])

if __name__ == "__main__":
    main(backend=sys.argv[1], mp_context=sys.argv[2] or None)
"""


@on_hosts
def test_what_lives_in_main_works_below(backend: Backend) -> None:
    """Functions, classes and exceptions of the program, two levels below it."""
    ended = run_script(MAIN, args=(backend.name, backend.start or ""))
    assert (ended.code, ended.out, ended.err) == (0, "[2, 3]\n", ""), ended


# ---------------------------------------------------------------------------------------------- too deep

BOMB = """
import sys
from pathlib import Path
import taskpool
from tests import nest

if __name__ == "__main__":
    options = dict(backend=sys.argv[1], mp_context=sys.argv[2] or None)
    with taskpool.Executor(2, **options) as pool:
        try:
            list(pool.map(nest.bomb, [Path(sys.argv[3])] * 2, [eval(sys.argv[4])] * 2))
        except taskpool.NestingError as error:
            print(error)
"""


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("inner", [None, "same"])
def test_a_recursion_without_end_is_refused(backend: Backend, tmp_path: Path, inner: str | None) -> None:
    """At a certain depth, with a sentence; there were few workers, and then there is none."""
    below = None if inner is None else backend.options
    args = (backend.name, backend.start or "", str(tmp_path / "notes"), repr(below))
    ended = run_script(BOMB, args=args, timeout=50)
    assert ended.code == 0, ended
    assert f"{_nesting.MAX_DEPTH} levels below the main program" in ended.out, ended
    assert 'backend="thread" or backend="serial"' in ended.out
    depths = [int(line) for line in lines(tmp_path / "notes")]
    assert set(depths) == set(range(1, _nesting.MAX_DEPTH + 1))
    assert len(depths) <= sum(2**depth for depth in set(depths)), "a task ran twice"


FULL_HOUSE = """
import os, sys
from pathlib import Path
import taskpool
from tests import nest

if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with taskpool.Executor(**eval(sys.argv[3])) as pool:
        list(pool.map(nest.fill, [Path(sys.argv[1])] * 4, [Path(sys.argv[2])] * 4, chunksize=1))
"""


@on_hosts
def test_the_number_of_workers_is_bounded(backend: Backend, tmp_path: Path) -> None:
    """By default there are at each depth as many as CPUs, if that many have workers at all, and one below each."""
    notes, release = tmp_path / "notes", tmp_path / "release"
    cpus, depth = min(2, CPUS), _nesting.MAX_DEPTH
    opened = threading.Thread(target=lambda: (states.expect(notes, cpus * depth), release.touch()))
    opened.start()
    ended = run_script(FULL_HOUSE, args=(str(notes), str(release), repr(backend.options)), timeout=50)
    opened.join()
    assert (ended.code, ended.err) == (0, ""), ended
    noted = {line for line in lines(notes) if not line.startswith("1 ")}
    for level in range(1, depth + 1):
        assert len({line for line in lines(notes) if line.startswith(f"{level} ")}) == cpus, noted


def test_too_deep_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts no process is not refused, and an executor that is refused starts nothing."""
    monkeypatch.setattr(_nesting, "depth", _nesting.MAX_DEPTH)
    before = {process.pid for process in processes.descendants()}
    for backend in HOSTS:
        with pytest.raises(taskpool.NestingError, match="each level starts processes") as caught:
            taskpool.Executor(1, **backend.options)
        assert isinstance(caught.value, RuntimeError)
    assert {process.pid for process in processes.descendants()} == before
    for backend in (THREAD, SERIAL):
        with taskpool.Executor(1, **backend.options) as executor:
            assert executor.submit(tasks.square, 3).result(PATIENCE) == 9


# ---------------------------------------------------------------------------------------------- what is not sent


@pytest.fixture
def unsendable(pool: Pool) -> dict[str, Any]:
    """What belongs to this process."""
    executor = pool(1)
    return {"executor": executor, "view": executor.options(priority=1), "future": executor.submit(abs, -1)}


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("kind", ["executor", "view", "future"])
def test_what_belongs_to_this_process_is_not_sent(pool: Pool, unsendable: dict[str, Any], kind: str) -> None:
    """It fails at once, with a sentence that names the part and says what to do."""
    value, executor = unsendable[kind], pool(1)
    what = "TaskFuture" if kind == "future" else "Executor"

    class Holder:
        def __init__(self) -> None:
            self.held = value

        def method(self) -> None:
            pass

    calls = {
        "argument 2": lambda: executor.submit(tasks.add, 1, value),
        "argument 'named'": lambda: executor.submit(tasks.keywords, named=[value]),
        "the function": lambda: executor.submit(lambda: value),
        "the function (": lambda: executor.submit(Holder().method),
        "argument 1": lambda: executor.submit(tasks.identity, {1: (value,)}),
    }
    for part, call in calls.items():
        error = outcome(call())
        assert isinstance(error, taskpool.NotSendableError)
        assert str(error).startswith(part)
        assert what in str(error)
        assert NOT_SENT in str(error)
    results = executor.map(tasks.identity, [1, value, 2])
    assert next(results) == 1
    with pytest.raises(taskpool.NotSendableError, match=f"^item 1 .*{what}.*{NOT_SENT}"):
        next(results)


def test_pickling_itself_says_so(unsendable: dict[str, Any]) -> None:
    """Whoever pickles, in whatever way."""
    for value in unsendable.values():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match=NOT_SENT):
                pickle.dumps(value, protocol)


@pytest.mark.parametrize("backend", [TEMPLATE, Backend("process", "spawn"), Backend("pool", "forkserver")], ids=str)
def test_initargs_that_belong_to_this_process(pool: Pool, unsendable: dict[str, Any]) -> None:
    """They are refused with the same sentence, at the latest by the first task."""

    def use() -> None:
        pool(1, initializer=tasks.identity, initargs=(unsendable["executor"],)).submit(abs, 1).result(PATIENCE)

    with pytest.raises((taskpool.NotSendableError, taskpool.InitializerError), match=NOT_SENT):
        bounded(use)


GLOBAL = """
import sys
import taskpool

def square(number):
    return number * number

def by_pool(number):
    return pool.submit(square, number).result()

def by_view(number):
    return list(view.map(square, [number]))

def by_future(number):
    return future.result() + number

class Service:
    def task(self, number):
        return by_pool(number)

if __name__ == "__main__":
    pool = taskpool.Executor(1, backend=sys.argv[1], mp_context=sys.argv[2] or None)
    view = pool.options(name="other")
    future = pool.submit(square, 2)
    for task in (by_pool, by_view, by_future, Service().task, lambda number: by_pool(number)):
        for call in (lambda: pool.submit(task, 3).result(20), lambda: list(pool.map(task, [3]))):
            try:
                print("no error:", call())
            except (taskpool.NotSendableError, taskpool.ForkedExecutorError) as error:
                print(error)
    pool.shutdown()
"""


@pytest.mark.core
@on_every_host
def test_functions_of_main_that_use_a_global_executor(backend: Backend) -> None:
    """They go by value with what they use; where a fork has brought that along, using it fails there. Always by name."""
    ended = run_script(GLOBAL, args=(backend.name, backend.start or ""))
    told = ended.out.splitlines()
    assert (ended.code, ended.err, len(told)) == (0, "", 10), ended
    assert all(("of __main__" in line and NOT_SENT in line) or "belongs to process" in line for line in told), ended


@pytest.mark.parametrize("call", ["submit", "map", "result", "cancel", "wait"])
@pytest.mark.parametrize("backend", [Backend(name, "fork") for name in ("process", "futures", "pool")], ids=str)
def test_a_forked_worker_does_not_use_what_it_inherits(pool: Pool, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a global executor comes along with the fork, using it fails at once."""
    executor = pool(1)
    monkeypatch.setitem(nest.kept, "pool", executor)
    monkeypatch.setitem(nest.kept, "future", executor.submit(tasks.await_file, Path("/nowhere")))
    error = outcome(pool(1).submit(nest.use_kept, call), 10)
    assert isinstance(error, taskpool.ForkedExecutorError)
    assert "make a new Executor here" in str(error)


# ---------------------------------------------------------------------------------------------- ends


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("end", ["limit", "cancel", "kill", "terminate"])
def test_nothing_is_left_of_a_task_that_was_ended(pool: Pool, tmp_path: Path, end: str) -> None:
    """Its workers, their children, and what has started them: gone within a second."""
    notes = tmp_path / "notes"
    executor = pool(1, grace=0.3, task_timeout=5 if end == "limit" else None)
    worker = executor.submit(tasks.pid).result(PATIENCE)
    future = executor.submit(nest.enter_in_workers, ["sleeping", "deaf", "holding", "parent"], notes)
    wait_until(lambda: len(lines(notes)) == 4 or future.done())
    begun = set(states.pids(notes)) - {worker}
    if end == "cancel":
        future.cancel()
    elif end == "kill":
        os.kill(worker, signal.SIGKILL)
    elif end == "terminate":
        executor.terminate(0.1)
    error = outcome(future)
    assert type(error).__name__ == {
        "limit": "TaskTimeoutError",
        "kill": "WorkerCrashedError",
    }.get(end, "CancelledError")
    wait_until(lambda: not any(map(processes.alive, begun)), 1.0, "the end of all that it had started")


PARENT = """
import os, sys
from pathlib import Path
import taskpool
from tests import nest, states

if __name__ == "__main__":
    pool = taskpool.Executor(1, backend=sys.argv[1], mp_context=sys.argv[2] or None)
    pool.submit(nest.enter_in_workers, ["sleeping", "deaf", "holding"], Path(sys.argv[3]))
    states.expect(sys.argv[3], 3)
    print("ready", flush=True)
    pool.submit(abs, 1).result()
"""


@on_hosts
def test_nothing_is_left_of_a_program_that_was_killed(backend: Backend, tmp_path: Path) -> None:
    """Two levels below it."""
    args = backend.name, backend.start or "", str(tmp_path / "notes")
    ended = run_script(PARENT, args=args, signals=(("ready", signal.SIGKILL),), gone_within=1.0)
    assert ended.code == -signal.SIGKILL, ended


@pytest.mark.core
def test_executors_of_a_worker_end_with_it(pool: Pool, tmp_path: Path) -> None:
    """In good order, if they have nothing to do: each level ends by itself, and the lower one first."""
    executor = pool(1)
    assert outcome(executor.submit(nest.note_at_end, tmp_path / "notes", "worker", "below")) is None
    executor.shutdown()
    *below, last = lines(tmp_path / "notes")
    assert sorted(below) == ["below", "below of the map"]
    assert last == "worker"


@on_hosts
@pytest.mark.parametrize("state", ["sleeping", "deaf", "holding"])
@pytest.mark.parametrize("recycled", [False, True], ids=["shutdown", "max_tasks_per_child"])
def test_an_executor_that_has_tasks_does_not_hold_its_worker(
    pool: Pool, tmp_path: Path, state: str, recycled: bool
) -> None:
    """What a task leaves running in workers of its own ends with the task's worker."""
    executor = pool(1, max_tasks_per_child=1 if recycled else None)
    assert outcome(executor.submit(nest.leave_in_workers, state, tmp_path / "notes")) is None
    below = states.pids(tmp_path / "notes")[0]
    with at_most(3):
        if recycled:
            assert outcome(executor.submit(tasks.square, 2)) == 4
        else:
            assert processes.alive(below)
            executor.shutdown()
        wait_until(lambda: not processes.alive(below), 1.0)


AT_EXIT = """
import sys
import taskpool
from tests import nest, tasks

if __name__ == "__main__":
    pool = taskpool.Executor(1, backend=sys.argv[1], mp_context=sys.argv[2] or None)
    future = pool.submit(nest.map_on, {"backend": "process"}, 4)
    future.add_done_callback(lambda future: print(future.exception() or future.result(), flush=True))
"""


@on_hosts
def test_a_task_that_runs_while_the_program_ends(backend: Backend) -> None:
    """It was accepted, so it runs, and so do tasks of its own."""
    ended = run_script(AT_EXIT, args=(backend.name, backend.start or ""))
    assert (ended.code, ended.out, ended.err) == (0, "[0, 1, 4, 9]\n", ""), ended


@on_hosts
def test_a_thread_of_a_task_forks(pool: Pool) -> None:
    """Any thread of a worker may."""
    assert outcome(pool(1).submit(nest.fork_in_a_thread)) == 7


def test_a_channel_is_closed_once_in_a_child_of_a_child() -> None:
    """Each fork closes what is the parent's; by the second time the numbers mean other files."""
    parent = Channel()
    worker = WorkerChannel(parent.worker_end)
    worker.close()
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
    worker.close()
    for descriptor in others:
        os.close(descriptor)
    parent.worker_end.fds = ()
    parent.close()
    worker.page.close()


@on_hosts
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", [nest.standard_pool, nest.standard_executor], ids=["Pool", "ProcessPoolExecutor"])
def test_the_standard_librarys_pools_inside_a_task(pool: Pool, kind: Callable[[str], list[int]], method: str) -> None:
    """A worker may start processes, in whatever way it was started itself."""
    assert outcome(pool(1).submit(kind, method)) == [0, 1, 4]


# ---------------------------------------------------------------------------------------------- threads


def on_ways_but(*others: nest.Way) -> pytest.MarkDecorator:
    """Run a test with each way to wait for tasks but these."""
    ways = [way for way in nest.WAYS if way not in others]
    return pytest.mark.parametrize("way", ways, ids=lambda way: way.__name__)


on_ways = on_ways_but()
threads = pytest.mark.parametrize("backend", [THREAD], ids=str)


@pytest.mark.core
@threads
@on_ways
@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_wait_for_tasks_of_their_own_executor(pool: Pool, way: nest.Way, workers: int) -> None:
    """There is a thread for what is waited for: no more than the tasks are nested deep, and it goes again."""
    executor = pool(workers)
    assert bounded(lambda: executor.submit(nest.fibonacci, executor, way, 9).result()) == 34
    assert executor.stats().started < 40  # of 109 tasks, 54 of which wait
    wait_until(lambda: executor.stats().workers <= workers, 5, "the end of the threads that are no longer needed")
    assert executor.stats().queued == 0


@threads
@on_ways
def test_a_long_queue_of_tasks_that_will_wait(pool: Pool, way: nest.Way) -> None:
    """Only as many of them begin as there are workers."""
    executor = pool(2)
    gauge = nest.Gauge()

    def wait_for_two(number: int) -> int:
        gauge.now, gauge.most = gauge.now + 1, max(gauge.most, gauge.now + 1)
        found = sum(way(executor, tasks.square, [number, 1]))
        gauge.now -= 1
        return found

    assert bounded(lambda: list(executor.map(wait_for_two, range(300)))) == [number**2 + 1 for number in range(300)]
    assert gauge.most <= 2
    assert executor.stats().started <= 30


@threads
def test_tasks_that_compute_are_as_many_as_workers(pool: Pool) -> None:
    """Those that wait make room for those that they wait for, and for no others."""
    executor = pool(2)
    gauge = nest.Gauge()
    bounded(lambda: list(executor.map(lambda _: list(executor.map(gauge.run, [0.01] * 4)), range(6))))
    assert gauge.most <= 3  # one thread more for the moment in which a wait ends


@threads
def test_the_order_of_what_nobody_waits_for(pool: Pool) -> None:
    """Tasks that a task submits, and does not wait for, have no precedence."""
    executor, order, gate = pool(1), [], threading.Event()

    def submit_two() -> None:
        for name in ("inner 1", "inner 2"):
            executor.submit(order.append, name)
        gate.wait(PATIENCE)

    futures = [executor.submit(submit_two)]
    wait_until(lambda: executor.stats().queued == 2)
    futures += [executor.submit(order.append, name) for name in ("outer 1", "outer 2")]
    gate.set()
    for future in futures:
        future.result(PATIENCE)
    assert order == ["inner 1", "inner 2", "outer 1", "outer 2"]


@pytest.mark.core
@pytest.mark.usefixtures("shared")
def test_a_map_inside_a_map_on_the_shared_threads() -> None:
    """They are the same threads."""

    def inner(number: int) -> int:
        return sum(taskpool.map(tasks.square, range(number), backend="thread", max_workers=2))

    expected = [sum(each**2 for each in range(number)) for number in range(20)]
    assert bounded(lambda: taskpool.map(inner, range(20), backend="thread", max_workers=2)) == expected


@threads
def test_a_map_that_somebody_else_has_called(pool: Pool) -> None:
    """A task that reads the results of a map may come before the items of it."""
    executor, gate = pool(1), threading.Event()
    executor.submit(gate.wait, PATIENCE)
    results = executor.map(tasks.square, range(50))
    reader = executor.options(priority=1).submit(list, results)
    gate.set()
    assert reader.result(PATIENCE) == [number**2 for number in range(50)]


@threads
def test_two_executors_that_wait_for_each_other(pool: Pool) -> None:
    """A task of one waits for a task of the other, and that for one of the first."""
    one, other = pool(1), pool(1)

    def there(number: int) -> int:
        return other.submit(back, number).result()

    def back(number: int) -> int:
        return one.submit(tasks.square, number).result()

    assert bounded(lambda: list(one.map(there, range(20)))) == [number**2 for number in range(20)]
    assert one.stats().started <= 4


@threads
def test_an_executor_of_its_own_in_a_thread(pool: Pool) -> None:
    """Leaving `with` waits for what was submitted, and that may need the thread's own executor."""
    outer = pool(1)
    done: list[int] = []

    def make() -> list[int]:
        with taskpool.Executor(1, backend="thread") as inner:
            for number in range(3):
                inner.submit(lambda number: done.append(outer.submit(tasks.square, number).result()), number)
        return list(done)

    assert bounded(lambda: outer.submit(make).result()) == [0, 1, 4]


@pytest.mark.core
@threads
@on_ways_but(nest.by_exception)  # it would wait again and again
def test_a_recursion_of_threads_without_end(pool: Pool, way: nest.Way) -> None:
    """Past a bound a wait is refused with a sentence, and all that waited ends with that error."""
    executor = pool(1)
    error = nest.leaf(bounded(lambda: executor.submit(nest.recurse, executor, way).exception()))
    assert isinstance(error, taskpool.NestingError)
    assert "wait for other tasks of it" in str(error)
    wait_until(lambda: executor.stats().workers <= 1, 5)
    assert executor.stats().started <= 8 + 64 + 2
    assert executor.stats().queued == 0
    assert executor.submit(tasks.square, 2).result(PATIENCE) == 4


@threads
def test_the_limit_of_a_task_that_waits(pool: Pool, tmp_path: Path) -> None:
    """It is abandoned as one that does not yield, and the executor goes on."""
    executor = pool(1, grace=0.1)

    def wait() -> None:
        executor.submit(tasks.await_file, tmp_path / "release").result()

    with at_most(5):
        error = outcome(executor.options(task_timeout=0.2).submit(wait))
    assert isinstance(error, taskpool.TaskTimeoutError)
    (tmp_path / "release").touch()
    assert bounded(lambda: executor.submit(nest.fibonacci, executor, nest.by_result, 6).result()) == 8


CUT = """
import os, time
import taskpool
from tests import nest, tasks

executor = taskpool.Executor(2, backend="thread", grace=0.3)

def nested():
    end = time.monotonic() + 5
    while time.monotonic() < end:
        nest.by_result(executor, tasks.square, [1, 2, 3])
        nest.by_wait(executor, tasks.square, [1, 2, 3])
        nest.by_map(executor, tasks.square, [1, 2, 3])

for number in range(80):
    view = executor.options(task_timeout=0.002 + 0.0003 * number)
    for future in [view.submit(nested) for _ in range(4)]:
        assert isinstance(future.exception(20), taskpool.TaskTimeoutError)
    assert executor.submit(nest.fibonacci, executor, nest.by_wait, 5).result(20) == 5
print("all right", flush=True)
os._exit(0)  # there may be an abandoned thread yet: Python loses an interrupt that comes in a callback of a weak reference
"""


def test_waits_that_are_cut() -> None:
    """Whenever an interrupt strikes a task that submits and waits, nothing of the executor is left half done."""
    ended = run_script(CUT, timeout=50)
    assert ended.out == "all right\n", ended


@threads
@on_ways_but(nest.by_growing_group)  # a member that is tried again submits the others again
def test_a_task_that_is_waited_for_and_tried_again(pool: Pool, way: nest.Way) -> None:
    """It has its precedence for each attempt, also if it had begun before anybody waited."""
    executor = pool(2)
    retrying = executor.options(retry=taskpool.retry(attempts=3, wait=0.02))
    seen: list[int] = []

    def fail_twice(number: int) -> int:
        seen.append(number)
        if seen.count(number) < 3:
            raise OSError(number)
        return number

    def wait(_: object) -> list[int]:
        return way(retrying, fail_twice, [1, 2])  # type: ignore[arg-type]

    def begun_before(_: object) -> list[int]:
        future = retrying.submit(fail_twice, 3)
        nest.by_result(executor, tasks.square, [1])
        wait_until(lambda: 3 in seen)
        return [future.result()]

    futures = [executor.submit(call, None) for call in (wait, begun_before, wait)]
    assert [bounded(future.result) for future in futures] == [[1, 2], [3], [1, 2]]


@threads
def test_callbacks_and_initializers_that_wait(pool: Pool) -> None:
    """They run in a thread of the executor, and so it needs another one meanwhile."""
    executor = pool(1)
    found: list[int] = []
    future = executor.submit(tasks.square, 2)
    future.add_done_callback(lambda _: found.append(executor.submit(tasks.square, 3).result()))
    future.add_done_callback(lambda _: found.extend(executor.map(tasks.square, [4])))
    wait_until(lambda: found == [9, 16])
    made: list[taskpool.Executor] = []

    def begin() -> None:
        if not found:
            found.append(0)
            found.extend(made[0].map(tasks.square, [5]))

    found.clear()
    made.append(pool(1, initializer=begin))
    assert made[0].submit(tasks.square, 6).result(PATIENCE) == 36
    wait_until(lambda: found == [0, 25])


@threads
def test_shutdown_while_tasks_wait_for_tasks(pool: Pool) -> None:
    """What was accepted is finished."""
    executor, started = pool(1), threading.Event()

    def wait() -> list[int]:
        futures = [executor.submit(tasks.square, number) for number in range(5)]
        started.set()
        tasks.sleep_in_steps(0.1)
        return [future.result() for future in futures]

    future = executor.submit(wait)
    started.wait(PATIENCE)
    bounded(executor.shutdown)
    assert future.result(0) == [0, 1, 4, 9, 16]


# ---------------------------------------------------------------------------------------------- the caller itself

serial = pytest.mark.parametrize("backend", [SERIAL], ids=str)
in_threads = pytest.mark.parametrize("in_main", [True, False], ids=["main", "thread"])


def run_in(in_main: bool, call: Callable[[], Any]) -> Any:
    """Call it here or in another thread."""
    return call() if in_main else bounded(call)


@pytest.mark.core
@serial
@on_ways_but(nest.by_asynchronous_group)  # there is one loop for each thread
def test_serial_tasks_inside_serial_tasks(pool: Pool, way: nest.Way) -> None:
    """All run in the caller, one inside the other."""
    executor = pool(1)
    assert bounded(lambda: executor.submit(nest.fibonacci, executor, way, 9).result()) == 34


@serial
@in_threads
@pytest.mark.parametrize("separate", [False, True], ids=["same", "other"])
def test_the_outer_limit_goes_through_the_inner_task(pool: Pool, in_main: bool, separate: bool) -> None:
    """The task inside is cancelled, and the one around it does not go on."""
    executor = pool(1)
    inner_pool = pool(1) if separate else executor
    reached: list[str] = []

    def outer() -> None:
        inner_pool.submit(tasks.sleep_in_steps, 60)
        reached.append("behind it")
        tasks.sleep_in_steps(60)

    with at_most(5):
        error = run_in(in_main, lambda: outcome(executor.options(task_timeout=0.2).submit(outer)))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert error.task
    assert error.task.endswith("outer")
    assert reached == []
    assert inner_pool.stats().cancelled == 1
    assert executor.stats().running == 0


@serial
@in_threads
def test_the_inner_limit_is_the_inner_tasks(pool: Pool, in_main: bool) -> None:
    """It ends that one alone, and the outer limit holds on."""
    executor = pool(1)
    seen: list[Any] = []

    def outer() -> None:
        seen.append(outcome(executor.options(task_timeout=0.1).submit(tasks.sleep_in_steps, 60)))
        seen.append(outcome(executor.options(task_timeout=10).submit(tasks.square, 3)))
        tasks.sleep_in_steps(60)

    with at_most(5):
        error = run_in(in_main, lambda: outcome(executor.options(task_timeout=0.6).submit(outer)))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert error.seconds == 0.6
    assert isinstance(seen[0], taskpool.TaskTimeoutError)
    assert seen[0].seconds == 0.1
    assert seen[1] == 9


@serial
@in_threads
def test_both_limits_at_once(pool: Pool, in_main: bool) -> None:
    """Neither is lost, whichever comes first."""
    executor = pool(1)
    seen: list[Any] = []

    def outer() -> None:
        seen.append(outcome(executor.options(task_timeout=0.05).submit(tasks.sleep_in_steps, 60)))
        tasks.sleep_in_steps(60)

    def run() -> None:
        for round_number in range(20):
            error = outcome(executor.options(task_timeout=0.0495 + 0.0001 * round_number).submit(outer))
            assert isinstance(error, taskpool.TaskTimeoutError)

    with at_most(15):
        run_in(in_main, run)
    assert all(isinstance(error, taskpool.TaskTimeoutError) for error in seen)


@serial
def test_a_map_inside_a_limited_map(pool: Pool) -> None:
    """The time of the whole call ends what is inside of it."""
    executor = pool(1)
    with at_most(5), pytest.raises(taskpool.CallTimeoutError):
        list(executor.map(lambda _: list(executor.map(tasks.sleep_in_steps, [30, 30])), range(3), timeout=0.2))
    assert list(executor.map(tasks.square, range(3))) == [0, 1, 4]


CTRL_C = """
import time
import taskpool

pool = taskpool.Executor(1, backend="serial")

def inner():
    print("ready", flush=True)
    time.sleep(60)

def outer():
    pool.submit(inner)
    print("went on")

try:
    pool.submit(lambda: pool.submit(outer).exception())
except KeyboardInterrupt:
    print("interrupted", pool.stats().cancelled)
"""


def test_ctrl_c_goes_through_all_tasks() -> None:
    """It means the caller, however deep the task is that it finds."""
    ended = run_script(CTRL_C, signals=(("ready", signal.SIGINT),))
    assert ended.out.splitlines() == ["ready", "interrupted 3"], ended


@serial
def test_the_programs_own_signal_handler(pool: Pool) -> None:
    """A signal that is not meant for a task reaches whoever installed a handler for it."""
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: came.append(number))
    try:
        executor = pool(1)
        inner = lambda: os.kill(os.getpid(), signal.SIGUSR1)  # noqa: E731
        assert executor.submit(lambda: executor.submit(inner).result()).result() is None
        error = outcome(executor.options(task_timeout=0.1).submit(tasks.sleep_in_steps, 60))
        assert isinstance(error, taskpool.TaskTimeoutError)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1]


@pytest.mark.parametrize("backend", [*HOSTS, THREAD], ids=str)
def test_the_limit_of_a_task_that_runs_serial_ones(pool: Pool, tmp_path: Path) -> None:
    """The request to end reaches it, through the task that it runs itself."""
    executor = pool(1, grace=10)
    assert outcome(executor.submit(nest.map_on, SERIAL.options, 1)) == [0]  # what takes time is imported
    with at_most(5):
        error = outcome(executor.options(task_timeout=0.5).submit(nest.serial_inside, tmp_path / "notes"))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert lines(tmp_path / "notes") == ["left"]
