"""A fork of the parent: the child cannot use what it inherited, is told so at once, and harms nobody."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers import TEMPLATE, Backend, lines, on_every_host, on_hosts, on_pools
from tests.scripts import run_main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

# A child that runs `call`, prints what came of it within a bound, and leaves by os._exit.
CHILD = """
def child(call, *args):
    pid = os.fork()
    if pid:
        if os.waitpid(pid, 0)[1]:
            print("ended by its alarm", flush=True)
        return
    signal.alarm(10)
    started = time.monotonic()
    try:
        answer = call(*args)
    except BaseException as error:
        answer = type(error).__name__
    print(answer, "late" if time.monotonic() - started > 1 else "at once", flush=True)
    os._exit(0)

"""

USE = (
    CHILD
    + """
pool = executor(1)
running = pool.submit(tasks.hold, path, release, "unharmed")
states.expect(path, 1)
waiting = pool.submit(abs, -3)
for use in args:
    child(eval(use, {**globals(), **locals()}))
release.touch()
print(running.result(), waiting.result(), pool.submit(abs, -2).result())
pool.shutdown()
"""
)

REFUSED = [
    "lambda: pool.submit(abs, -1)",
    "lambda: list(pool.map(abs, [-1]))",
    "lambda: pool.options(name='task').submit(abs, -1)",
    "lambda: running.result()",
    "lambda: waiting.result(30)",
    "lambda: running.exception()",
]
HARMLESS = [
    "lambda: running.cancel() and None",
    "lambda: waiting.cancel() and None",
    "lambda: pool.shutdown()",
    "lambda: pool.shutdown(wait=False, cancel_futures=True)",
    "lambda: pool.terminate()",
    "lambda: pool.stats() and None",
]


@pytest.mark.core
@on_pools
def test_an_inherited_executor_refuses(backend: Backend, tmp_path: Path) -> None:
    """Whatever a forked child asks of its parent's executor is refused at once, and the parent goes on."""
    ended = run_main(USE, backend, tmp_path, *REFUSED, timeout=40)
    *children, parent = ended.out.splitlines()
    assert dict(zip(REFUSED, children, strict=True)) == dict.fromkeys(REFUSED, "ForkedExecutorError at once"), ended
    assert parent == "unharmed 3 2", ended


@on_pools
def test_ending_an_inherited_executor_is_harmless(backend: Backend, tmp_path: Path) -> None:
    """Clean-up that a forked child runs on its copy returns or is refused, at once, and reaches no worker."""
    ended = run_main(USE, backend, tmp_path, *HARMLESS, timeout=40)
    *children, parent = ended.out.splitlines()
    assert len(children) == len(HARMLESS), ended
    assert set(children) <= {"ForkedExecutorError at once", "None at once"}, dict(zip(HARMLESS, children, strict=True))
    assert parent == "unharmed 3 2", ended


BUSY = (
    CHILD
    + """
def hammer():
    while not enough.is_set():
        pool.submit(abs, -1).add_done_callback(answers.append)

enough, answers = threading.Event(), []
pool = executor(2)
pool.submit(abs, -1).result()
threads = [threading.Thread(target=hammer) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(int(args[0])):
    child(lambda: pool.submit(abs, -2))
enough.set()
for thread in threads:
    thread.join()
pool.shutdown()
assert all(future.result() == 1 for future in answers)
"""
)


@on_hosts
def test_a_fork_while_threads_submit(backend: Backend, tmp_path: Path) -> None:
    """Locks that other threads held at the fork do not matter to the child."""
    ended = run_main(BUSY, backend, tmp_path, "20", timeout=40)
    assert ended.out.splitlines() == ["ForkedExecutorError at once"] * 20, ended
    assert ended.code == 0, ended


FORKING = """
def fork_on():
    while not enough.is_set():
        children.append(os.fork())
        if children[-1] == 0:
            signal.pause()
        enough.wait(0.001)

enough, children = threading.Event(), []
forking = threading.Thread(target=fork_on)
forking.start()
for _ in range(5):
    with executor(1) as pool:
        print(pool.submit(abs, -1).result())
enough.set()
forking.join()
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@on_hosts
def test_a_start_while_another_thread_forks(backend: Backend, tmp_path: Path) -> None:
    """The children get no descriptor whose end the start of a worker waits for."""
    ended = run_main(FORKING, backend, tmp_path, timeout=40)
    assert ended.out.splitlines() == ["1"] * 5, ended
    assert ended.code == 0, ended


LEAVING = """
def leave(way):
    if way == "fail":
        raise LookupError("the child's own")
    if way == "sys.exit":
        sys.exit(0)

pool = executor(2)
pool.submit(abs, -1).result()
running = pool.submit(tasks.hold, path, release, "unharmed")
waiting = [pool.submit(abs, -number) for number in range(10)]
taskpool.map(abs, [-1])
states.expect(path, 1)
for way in ("return", "fail", "sys.exit"):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        return leave(way)
    print(way, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), running.done())
release.touch()
print(running.result(), [future.result() for future in waiting] == list(range(10)), taskpool.map(abs, [-4]))
pool.shutdown()
"""


@pytest.mark.core
@on_every_host
def test_children_that_end_like_programs(backend: Backend, tmp_path: Path) -> None:
    """The exit handlers and finalizers of a forked child leave the parent's workers and tasks alone, and do not wait."""
    ended = run_main(LEAVING, backend, tmp_path)
    expected = ["return 0 False", "fail 1 False", "sys.exit 0 False", "unharmed True [4]"]
    assert ended.out.splitlines() == expected, ended
    assert ended.code == 0, ended
    assert ended.err.count("Traceback") == 1, ended.err
    assert "LookupError: the child's own" in ended.err


WITH = """
with executor(1) as pool:
    running = pool.submit(tasks.hold, path, release, "unharmed")
    states.expect(path, 1)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        if args:
            sys.exit(0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] in (0, 256)
    release.touch()
    print(running.result())
"""


@on_hosts
@pytest.mark.parametrize("unwinds", [True, False])
def test_a_fork_inside_with(backend: Backend, tmp_path: Path, unwinds: bool) -> None:
    """A child that leaves its parent's `with` block, by an exception even, takes nothing along."""
    ended = run_main(WITH, backend, tmp_path, *["yes"] * unwinds)
    assert ended.out == "unharmed\n", ended
    assert ended.code == 0, ended


AFRESH = (
    CHILD
    + """
def workers():
    return set(taskpool.map(lambda _: os.getpid(), range(4), max_workers=2))

before = workers() if args else set()
child(lambda: (taskpool.map(abs, [-1, -2]), before.isdisjoint(workers())))
pool = executor(1)
child(lambda: executor(1).submit(abs, -5).result())
print(pool.submit(abs, -6).result(), taskpool.map(abs, [-3]))
"""
)


@pytest.mark.core
@pytest.mark.parametrize("used", [True, False])
def test_a_child_starts_afresh(tmp_path: Path, used: bool) -> None:
    """`taskpool.map` and new executors work in a forked child, on workers of its own."""
    ended = run_main(AFRESH, TEMPLATE, tmp_path, *["yes"] * used)
    answers = [line.removesuffix(" at once").removesuffix(" late") for line in ended.out.splitlines()]
    assert answers == ["([1, 2], True)", "5", "6 [3]"], ended
    assert ended.code == 0, ended


CHILD_OUTLIVES = """
pool = executor()
futures = [pool.submit(states.enter, name, path) for name in ("holding", "parent")]
states.expect(path, 2)
child = os.fork()
if child == 0:
    workers = states.pids(path)
    if sys.argv[2]:  # multiprocessing's own server lives as long as any process that inherited its pipe
        workers = [workers[0], workers[2], workers[4]]
    os.kill(os.getppid(), signal.SIGKILL)
    deadline = time.monotonic() + 1
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.005)
    print([pid for pid in workers if alive(pid)], flush=True)
    os._exit(0)
signal.pause()
"""

ALIVE = """
def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

"""


@pytest.mark.skipif(sys.platform != "linux", reason="the promise is made for Linux")
@on_every_host
def test_a_forked_child_does_not_keep_workers_alive(backend: Backend, tmp_path: Path) -> None:
    """The parent is killed while a child that it forked lives on: its workers end all the same."""
    ended = run_main(ALIVE + CHILD_OUTLIVES, backend, tmp_path)
    assert ended.code == -signal.SIGKILL, ended
    assert ended.out == "[]\n", ended
    assert len(lines(tmp_path / "notes")) == 2


MULTIPROCESSING = """
import multiprocessing

def use(queue):
    try:
        queue.put(str(pool.submit(abs, -1).result(5)))
    except BaseException as error:
        queue.put(type(error).__name__)

pool = executor(1)
pool.submit(abs, -1).result()
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=use, args=(queue,))
process.start()
print(queue.get())
process.join(10)
print(process.exitcode, pool.submit(abs, -2).result())
pool.shutdown()
"""


@on_hosts
def test_a_process_of_multiprocessing(backend: Backend, tmp_path: Path) -> None:
    """A `multiprocessing.Process` that is forked while an executor lives is such a child too, and ends normally."""
    ended = run_main(MULTIPROCESSING, backend, tmp_path)
    assert ended.out.splitlines() == ["ForkedExecutorError", "0 2"], ended
    assert ended.code == 0, ended


THREAD_OF_A_CHILD = (
    CHILD
    + """
def fork_in_a_thread():
    def run():
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0)
        os.waitpid(grandchild, 0)
        done.set()

    done = threading.Event()
    threading.Thread(target=run, daemon=True).start()
    return done.wait(2)

pool = executor(1)
pool.submit(abs, -1).result()
child(fork_in_a_thread)
print(pool.submit(fork_in_a_thread).result(20))
pool.shutdown()
"""
)


@pytest.mark.core
@on_hosts
def test_a_thread_of_a_child_forks(backend: Backend, tmp_path: Path) -> None:
    """Each forked child, a worker too, has a lock of its own around its forks, which all of its threads can take."""
    ended = run_main(THREAD_OF_A_CHILD, backend, tmp_path)
    assert ended.out.splitlines() == ["True at once", "True"], ended
    assert ended.code == 0, ended


IN_A_TASK = """
def fork_in_task():
    child = os.fork()
    if child == 0:
        sys.stdout.flush()
        return "from the child"
    return os.waitpid(child, 0)[1] is not None and "from the task"

pool = executor(1)
for _ in range(3):
    print(pool.submit(fork_in_task).result(20), pool.submit(abs, -1).result(20))
pool.shutdown()
"""


@on_hosts
def test_a_child_that_returns_from_the_task(backend: Backend, tmp_path: Path) -> None:
    """A task that forks and returns in both processes has one outcome, that of the worker."""
    ended = run_main(IN_A_TASK, backend, tmp_path)
    assert ended.out.splitlines() == ["from the task 1"] * 3, ended
    assert ended.code == 0, ended
