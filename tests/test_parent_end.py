"""However the parent ends, and whatever its workers do at that moment, nothing of it lives a second later."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests import processes, states
from tests.helpers import FULL, TEMPLATE, Backend, Ended, lines, on_every_host, on_hosts, on_one_host, wait_until
from tests.scripts import run_main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the promise is made for Linux")

STATES = ("sleeping", "spinning", "holding", "stopped", "deaf", "parent", "idle")

# How the parent ends, and the exit code that it then has.
OWN_ENDS = {"return": 0, "sys.exit(3)": 3, "os._exit(7)": 7, "1 / 0": 1, "ctypes.string_at(0)": -signal.SIGSEGV}
SIGNALS = {"SIGTERM": -signal.SIGTERM, "SIGINT": -signal.SIGINT, "SIGKILL": -signal.SIGKILL}
ENDS = OWN_ENDS | SIGNALS

PARENT = """
import ctypes
global pool
end, *names = args
pool = executor(len(names), shutdown_timeout=0.3 if end in ("return", "sys.exit(3)") else None)
futures = []
for count, name in enumerate(names, 1):
    futures.append(pool.submit(states.enter, name, path))
    states.expect(path, count)
if end.startswith("SIG"):
    print("ready", flush=True)
    for future in futures:
        future.result()
    signal.pause()
elif end != "return":
    eval(end)
"""


def run_parent(backend: Backend, folder: Path, end: str, *names: str) -> Ended:
    """Run a parent whose workers are in these states until it ends that way, and see that nothing is left."""
    notes = folder / "notes"
    ended = run_main(PARENT, backend, folder, end, *names, send=signal.Signals[end] if end in SIGNALS else None)
    assert len(lines(notes)) == len(names), ended
    assert ended.code == ENDS[end], ended
    # One that is just being taken down has no environment any more by which the script's own check would find it.
    wait_until(lambda: not any(map(processes.alive, states.pids(notes))), 1.0, f"the end of {lines(notes)}")
    return ended


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("end", ENDS)
def test_nothing_outlives_the_parent(backend: Backend, tmp_path: Path, end: str) -> None:
    """Workers in every state, their children and the processes that started them end with the parent."""
    run_parent(backend, tmp_path, end, *STATES)


@on_every_host
@pytest.mark.parametrize("end", ENDS if FULL else ["SIGKILL"])
def test_no_busy_worker_outlives_the_parent(backend: Backend, tmp_path: Path, end: str) -> None:
    """Under each start method it is the kernel that ends a worker: one that holds the GIL needs nothing else."""
    run_parent(backend, tmp_path, end, "holding", "parent")


@on_one_host
@pytest.mark.parametrize("end", ENDS if FULL else ["return", "1 / 0", "SIGINT", "SIGKILL"])
def test_no_idle_worker_outlives_the_parent(backend: Backend, tmp_path: Path, end: str) -> None:
    """Idle workers end as well, and do not delay the parent's end."""
    ended = run_parent(backend, tmp_path, end, "idle")
    assert ended.seconds < 5


def test_strays_in_the_session_are_swept(tmp_path: Path) -> None:
    """A process that a task started in another process group, but in the worker's session, ends with the parent."""
    run_parent(TEMPLATE, tmp_path, "SIGKILL", "parent of a stray", "parent of a stray")


# ---------------------------------------------------------------------------------------------- uncaught exceptions


@on_hosts
def test_an_uncaught_exception_does_not_wait_for_tasks(backend: Backend, tmp_path: Path) -> None:
    """With no bound of its own the parent still ends at once, and its own traceback is all that is printed."""
    ended = run_parent(backend, tmp_path, "1 / 0", "sleeping", "holding")
    assert ended.seconds < 8
    assert ended.err.count("Traceback") == ended.err.count("ZeroDivisionError") == 1, ended.err


# ---------------------------------------------------------------------------------------------- Ctrl-C

READY = """
def ready(count):
    states.expect(path, count)
    print("ready", flush=True)

def press_when(count):
    threading.Thread(target=ready, args=(count,)).start()

"""
PLACES = {
    "result": """
press_when(1)
pool = executor()
pool.submit(states.enter, "sleeping", path).result()
""",
    "map": """
press_when(2)
pool = executor()
list(pool.map(states.enter, ["deaf"] * 4, [path] * 4))
""",
    "default map": """
press_when(2)
taskpool.map(states.enter, ["sleeping"] * 4, [path] * 4, max_workers=2)
""",
    "with": """
press_when(2)
with executor() as pool:
    futures = [pool.submit(states.enter, "sleeping", path) for _ in range(5)]
    futures[-1].result()
""",
    "leaving with": """
press_when(2)
with executor() as pool:
    futures = [pool.submit(states.enter, "sleeping", path) for _ in range(5)]
""",
    "shutdown": """
press_when(2)
pool = executor()
futures = [pool.submit(states.enter, "holding", path) for _ in range(3)]
pool.shutdown()
""",
}


def expect_one_traceback(ended: Ended) -> None:
    """See that a script ended by Ctrl-C, at once, and printed its own traceback and nothing else of the kind."""
    assert ended.code == -signal.SIGINT, ended
    assert ended.err.count("Traceback") == ended.err.count("KeyboardInterrupt") == 1, ended.err
    assert ended.seconds < 8, ended


@pytest.mark.core
@pytest.mark.parametrize("place", PLACES)
def test_one_interrupt_prints_one_traceback(tmp_path: Path, place: str) -> None:
    """One Ctrl-C ends the program wherever it waits, with the parent's own traceback and no other."""
    expect_one_traceback(run_main(READY + PLACES[place], TEMPLATE, tmp_path, send=signal.SIGINT))


@on_every_host
def test_one_interrupt_on_every_host(backend: Backend, tmp_path: Path) -> None:
    """No host and no worker of any start method adds a line of its own."""
    expect_one_traceback(run_main(READY + PLACES["with"], backend, tmp_path, send=signal.SIGINT))


AT_EXIT = """
global pool, future
pool = executor()
future = pool.submit(states.enter, "sleeping", path)
states.expect(path, 1)
threading._register_atexit(print, "ready", flush=True)
"""


@on_hosts
def test_an_interrupt_ends_the_wait_at_exit(backend: Backend, tmp_path: Path) -> None:
    """Ctrl-C while the interpreter waits for accepted tasks ends that wait."""
    ended = run_main(AT_EXIT, backend, tmp_path, send=signal.SIGINT)
    assert ended.seconds < 8, ended
    assert ended.err.count("KeyboardInterrupt") <= 1, ended.err


TWICE = """
def interrupted(signum, frame):
    print("again", flush=True)
    raise KeyboardInterrupt

with executor(grace=5) as pool:
    futures = [pool.submit(states.enter, "deaf", path) for _ in range(3)]
    states.expect(path, 2)
    signal.signal(signal.SIGINT, interrupted)
    print("ready", flush=True)
    futures[0].result()
"""


@on_hosts
def test_a_second_interrupt_is_harmless(backend: Backend, tmp_path: Path) -> None:
    """A second Ctrl-C while the first one's cleaning up goes on leaves nothing either."""
    ended = run_main(TWICE, backend, tmp_path, send=signal.SIGINT)
    assert ended.code == -signal.SIGINT, ended
    assert ended.seconds < 10, ended


# ---------------------------------------------------------------------------------------------- while starting

STARTING = """
threading.Timer(float(args[0]), os.kill, (os.getpid(), signal.SIGKILL)).start()
while True:
    pool = executor(3)
    futures = [pool.submit(states.enter, "idle", path) for _ in range(6)]
    futures[-1].result()
    pool.shutdown(wait=False)
"""


@on_hosts
@pytest.mark.parametrize("delay", range(0, 200, 10 if FULL else 60))
def test_a_parent_killed_while_workers_start(backend: Backend, tmp_path: Path, delay: int) -> None:
    """Half-started workers, and those that are just ending, find out as well."""
    ended = run_main(STARTING, backend, tmp_path, str(delay / 1000))
    assert ended.code == -signal.SIGKILL, ended


TEMPLATE_GONE = """
pool = executor()
futures = [pool.submit(states.enter, "holding", path), pool.submit(states.enter, "parent", path)]
states.expect(path, 2)
template = states.pids(path)[1]
assert template != os.getpid()
os.kill(template, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_parent_and_template_killed_together(tmp_path: Path) -> None:
    """Workers do not need the process that forked them in order to end with the parent."""
    ended = run_main(TEMPLATE_GONE, TEMPLATE, tmp_path)
    assert ended.code == -signal.SIGKILL, ended
    assert len(lines(tmp_path / "notes")) == 2
