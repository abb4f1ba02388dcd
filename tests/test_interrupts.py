"""Where a thread may be interrupted: not while it imports, since that would leave locks of Python taken for ever."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool.backends.local import Alarms
from tests.helpers import SERIAL, THREAD, lines, outcome, wait_until

MODULE = """
import time
import taskpool

task = taskpool.current_task()
while not task.cancelled:
    time.sleep(0.001)
with open({path!r}, "a") as file:
    print("imported", file=file)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that is imported for as long as its task is not asked to end."""
    name = "imported_until_stopped"
    (tmp_path / f"{name}.py").write_text(MODULE.format(path=str(tmp_path / "notes")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def import_then_spin(name: str) -> None:
    """Import, and go on for ever."""
    __import__(name)
    while True:
        pass


def run_elsewhere(call: Callable[[], Any]) -> Future[Any]:
    """Run `call` in a thread of its own: the serial backend interrupts the main one by a signal."""
    future: Future[Any] = Future()
    threading.Thread(target=lambda: future.set_result(call()), daemon=True).start()
    return future


@pytest.mark.core
@pytest.mark.parametrize("backend", [THREAD, SERIAL], ids=str)
def test_an_import_is_not_cut(pool: Callable[..., taskpool.Executor], module: str, tmp_path: Path) -> None:
    """The limit strikes as soon as it is over."""
    executor = pool(1, task_timeout=0.1, grace=20)
    error = run_elsewhere(lambda: outcome(executor.submit(import_then_spin, module))).result(20)
    assert isinstance(error, taskpool.TaskTimeoutError)
    assert lines(tmp_path / "notes") == ["imported"]
    assert module in sys.modules


def test_nothing_is_tried_again_behind_the_end() -> None:
    """A thread that imports for ever is not asked for ever: the alarms' own thread ends with the executor."""
    alarms, calls = Alarms("ended"), []

    def refuse() -> bool:
        calls.append(1)
        if len(calls) == 2:  # in the alarms' thread, whose end this does not wait for
            alarms.close()
        return False

    alarms.repeat(refuse, 1e-3)
    wait_until(lambda: not any(thread.name == "ended-limits" for thread in threading.enumerate()), 5)
    assert len(calls) == 2
