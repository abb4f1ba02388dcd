"""Crashes and limits explain themselves; running tasks show where they are; failures that nobody looks at are reported."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool._engine import inert, stop
from taskpool._engine.autopsy import OutOfMemoryKills
from taskpool._engine.wire import Pickled
from tests import talk, tasks
from tests.helpers import (
    PATIENCE,
    Backend,
    bounded,
    lines,
    on_all,
    on_every_host,
    on_hosts,
    on_one_host,
    outcome,
    wait_until,
)
from tests.scripts import run_main

Make = Callable[..., taskpool.Executor]

MB = 1_000_000


class Hostile:
    """Harms whoever unpickles it or asks for its text."""

    def __init__(self, where: Path | None = None) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return die_here, (self.where,)

    def __repr__(self) -> str:
        raise SystemExit("from a repr")


def die_here(where: Path | None) -> None:
    """Be run by unpickling: note where, and end the process."""
    if where is not None:
        tasks.note(where, os.getpid())
    os._exit(3)


def grow_and_die(size: int, *_: Any, **__: Any) -> None:
    """Take memory, start a program that takes some, log, and be killed."""
    kept = bytearray(size)
    code = "x = bytearray(80_000_000); import time; print(flush=True); time.sleep(60)"
    program = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.readline()
    talk.log.warning("took %d", len(kept))
    tasks.kill_itself()


# ---------------------------------------------------------------------------------------------- crashes


@on_every_host
def test_a_crash_says_what_happened(pool: Make, backend: Backend) -> None:
    """The task with its arguments, how it ended, its memory and that of its programs, and what it had logged."""
    executor = pool(1)
    error = outcome(executor.options(name="grow").submit(grow_and_die, 50 * MB, "a" * 500, key=[Path("x")]))
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert error.call is not None
    assert error.call.startswith("grow(50000000, 'aaaa")
    assert error.call.endswith("key=[PosixPath('x')])")
    assert len(error.call) < 300
    assert error.exitcode in (-signal.SIGKILL, None)
    assert error.signal in ("SIGKILL", None)
    assert error.log == ("WARNING tests.talk: took 50000000",)
    assert error.out_of_memory in (False, None)
    for text in (error.call, *error.log):
        assert text in str(error)
    if backend.name == "process" and backend.start in (None, "fork", "spawn"):
        assert error.peak_memory is not None
    if error.peak_memory is not None:
        assert 130 * MB < error.peak_memory < 600 * MB
    back = pickle.loads(pickle.dumps(error))
    assert (back.call, back.log, back.peak_memory) == (error.call, error.log, error.peak_memory)
    (of_item,) = [one.error for one in executor.outcomes(grow_and_die, [7, 8, 9][:1])]
    assert of_item.call == "grow_and_die(7)"


@on_hosts
def test_a_fault_says_where(pool: Make) -> None:
    """At a segfault and an abort faulthandler's stack is there."""
    executor = pool(1)
    for task, name in ((tasks.segfault, "SIGSEGV"), (os.abort, "SIGABRT")):
        error = outcome(executor.submit(task))
        assert isinstance(error, taskpool.WorkerCrashedError)
        assert (error.signal, error.call) in ((name, f"{task.__name__}()"), (None, f"{task.__name__}()"))
        assert error.stack is not None
        assert "in _call" in error.stack


@on_one_host
def test_what_killed_a_worker_is_not_run_here(pool: Make, tmp_path: Path) -> None:
    """Arguments are looked at without unpickling them, or asking them for their text."""
    executor = pool(1)
    error = outcome(executor.submit(tasks.identity, Hostile(tmp_path / "ran")))
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert error.call is not None
    assert error.call.startswith("identity(die_here(")
    assert set(lines(tmp_path / "ran")).isdisjoint({str(os.getpid())})


def test_texts_of_calls() -> None:
    """Short, of all kinds of pickles, and None where there is nothing to tell."""

    def text(*args: Any, **kwargs: Any) -> str | None:
        return inert.call_text("f", Pickled(pickle.dumps((len, args, kwargs), 5)))

    assert text() == "f()"
    assert text(1, "a", None, k={2: (3.5,)}) == "f(1, 'a', None, k={2: (3.5,)})"
    assert text(len, {1}, range(3), Path) == "f(len, {1}, range(0, 3), Path)"
    assert text(logging.makeLogRecord({})) == "f(LogRecord())"
    assert len(text(*["x" * 1000] * 100) or "") < 310
    assert inert.call_text("f", Pickled(b"garbage")) is None
    assert inert.call_text("f", Pickled(pickle.dumps((len, ("x" * inert.MOST,), {})))) is None
    assert inert.item_text("f", Pickled(pickle.dumps((len, range(9), False))), 4) == "f(4)"
    assert inert.item_text("f", Pickled(pickle.dumps((len, [(1, 2)], True))), 0) == "f(1, 2)"


def test_kills_for_memory_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that the kernel counts is claimed by one dead worker; what cannot be read says nothing."""
    file = tmp_path / "memory.events"
    monkeypatch.setattr(stop, "_counters", lambda: [str(tmp_path / "none"), str(file)])
    kills = OutOfMemoryKills()
    kills.begin()
    assert kills.claim() is None
    file.write_text("low 0\noom_kill 3\n")
    kills.begin()
    assert kills.claim() is False
    file.write_text("low 0\noom_kill 5\n")
    assert [kills.claim(), kills.claim(), kills.claim()] == [True, True, False]


@on_one_host
def test_a_kill_for_memory_is_named(pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the error's text and attribute; an end by another signal is none."""
    count = iter(range(100))
    monkeypatch.setattr("taskpool._engine.stop.out_of_memory_kills", lambda: next(count))
    executor = pool(1)
    error = outcome(executor.submit(tasks.kill_itself))
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert error.out_of_memory is True
    assert "because memory ran out" in str(error)
    error = outcome(executor.submit(tasks.segfault))
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert error.out_of_memory is None


# ---------------------------------------------------------------------------------------------- where tasks are


def wait_in_threads(path: Path) -> None:
    """Have a second thread wait, and wait."""
    import threading

    thread = threading.Thread(target=tasks.await_file, args=(path,), name="second")
    thread.start()
    time.sleep(100)


@on_hosts
def test_a_limit_shows_every_thread(pool: Make, tmp_path: Path) -> None:
    """Where the task was, and where its other threads were; also if it had to be killed."""
    executor = pool(1, task_timeout=0.5)
    error = outcome(executor.submit(wait_in_threads, tmp_path / "never"))
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert error.stack is not None
    assert "in wait_in_threads" in error.stack
    assert "Thread second:" in error.stack
    assert "in await_file" in error.stack
    assert "in hold_the_gil" in (outcome(executor.options(grace=0.1).submit(tasks.hold_the_gil)).stack or "")


@on_every_host
def test_running_tasks_show_where_they_are(pool: Make, tmp_path: Path) -> None:
    """Whoever holds the GIL, as often as one asks, and they go on; what does not run has no stack."""
    executor = pool(2, grace=0.1)
    go, notes = tmp_path / "go", tmp_path / "notes"
    waiting = executor.submit(tasks.note_then, notes, 1, tasks.await_file, go)
    holding = executor.submit(tasks.note_then, notes, 2, tasks.hold_the_gil)
    wait_until(lambda: len(lines(notes)) == 2)
    for _ in range(3):
        wait_until(lambda: "in await_file" in (waiting.stack() or ""))
        wait_until(lambda: "in hold_the_gil" in (holding.stack() or ""))
    found = {running.id: running for running in executor.stacks()}
    assert set(found) == {waiting.task_id, holding.task_id}
    one = found[holding.task_id]
    assert (one.task, one.attempt) == ("note_then", 1)
    assert "in hold_the_gil" in (one.stack or "")
    assert 0 < one.seconds < PATIENCE
    assert one.pid != os.getpid()
    queued = [executor.submit(tasks.identity, number) for number in range(3)]
    assert queued[-1].stack() is None
    go.touch()
    assert waiting.result(PATIENCE) is None
    assert waiting.stack() is None
    error = outcome(executor.options(grace=0.1).submit(tasks.segfault))
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert (error.stack or "").startswith("Fatal Python error")


@on_one_host
def test_a_stopped_worker_has_no_stack(pool: Make, tmp_path: Path) -> None:
    """Asking for it ends all the same, and the worker goes on when it may."""
    executor = pool(1)
    future = executor.submit(tasks.note_then, tmp_path / "notes", "x", tasks.await_file, tmp_path / "go")
    wait_until(lambda: lines(tmp_path / "notes"))
    (running,) = executor.stacks()
    os.kill(running.pid, signal.SIGSTOP)
    try:
        assert future.stack() is None
    finally:
        os.kill(running.pid, signal.SIGCONT)
    wait_until(lambda: "await_file" in (future.stack() or ""))
    (tmp_path / "go").touch()
    assert future.result(PATIENCE) is None


@pytest.mark.parametrize("backend", [Backend("thread")], ids=str)
def test_threads_show_where_they_are(pool: Make, tmp_path: Path) -> None:
    """As processes do."""
    executor = pool(1)
    future = executor.submit(tasks.await_file, tmp_path / "go")
    wait_until(lambda: "in await_file" in (future.stack() or ""))
    (running,) = executor.stacks()
    assert (running.id, running.pid) == (future.task_id, os.getpid())
    (tmp_path / "go").touch()
    future.result(PATIENCE)
    wait_until(lambda: executor.stacks() == [])


# ---------------------------------------------------------------------------------------------- failures unseen


@on_all
def test_a_failure_that_nobody_looks_at_is_reported_once(pool: Make, caplog: pytest.LogCaptureFixture) -> None:
    """When its future is collected or the executor ends; not if somebody looked, nor what was cancelled."""

    def reports() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "taskpool.failures"]

    executor = pool(1)
    seen = executor.submit(tasks.fail, ValueError, "seen")
    assert isinstance(outcome(seen), ValueError)
    del seen
    collected = executor.options(name="collected").submit(tasks.fail, ValueError, "odd")
    wait_until(collected.done)
    kept = executor.options(name="kept").submit(tasks.fail, KeyError, "odder")
    wait_until(kept.done)
    assert reports() == []
    del collected
    gc.collect()
    wait_until(reports)
    executor.shutdown()
    texts = [record.getMessage() for record in reports()]
    assert texts == [
        "task collected failed, and nobody looked at that",
        "task kept failed, and nobody had looked at that when its executor ended",
    ]
    assert [type(record.exc_info[1]) for record in reports() if record.exc_info] == [ValueError, KeyError]
    with contextlib.suppress(KeyError):
        kept.result()
    del kept
    gc.collect()
    assert len(reports()) == 2


@on_all
def test_a_failure_that_is_collected_inside_of_a_handler(pool: Make) -> None:
    """It is reported when that handler has come back, which may have a lock that is not reentrant."""
    texts, kept, lock = [], [], threading.Lock()

    class Locking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with lock:
                kept.clear()
                gc.collect()
                texts.append(record.getMessage())

    executor = pool(1)
    kept.append(executor.options(name="lost").submit(tasks.fail, ValueError, "odd"))
    wait_until(kept[0].done)
    handler = Locking()
    logging.getLogger().addHandler(handler)
    try:
        bounded(lambda: logging.getLogger("tests").warning("dropping it"))
        bounded(executor.shutdown)
    finally:
        logging.getLogger().removeHandler(handler)
    assert texts == ["dropping it", "task lost failed, and nobody looked at that"]


OF_MAIN = """
global Global
class Global:
    pass
class Local:
    pass
def end(*_):
    os._exit(3)
with executor(1) as pool:
    print(str(pool.submit(end, Local(), Global(), 5).exception()))
"""


@on_one_host
def test_instances_of_the_main_modules_classes_are_told(backend: Backend, tmp_path: Path) -> None:
    """Those travel by value; the report of a crash has them, and what stands beside them, all the same."""
    ended = run_main(OF_MAIN, backend, tmp_path)
    assert "end(Local(), Global(), 5): it exited with code 3" in ended.out, ended
