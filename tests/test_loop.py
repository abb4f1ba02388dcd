"""The dispatcher's loop: a call that is posted is called soon, whatever comes between the steps of posting it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from taskpool._engine.loop import Loop
from tests.helpers import PATIENCE, wait_until

pytestmark = pytest.mark.core


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop that turns."""
    loop, ended = Loop(lambda *_: None), threading.Event()

    def turn() -> None:
        while not ended.is_set():
            loop.call(loop.wait())

    thread = threading.Thread(target=turn)
    thread.start()
    yield loop
    ended.set()
    loop.post(bool, None)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    loop.close()


@pytest.fixture
def at_wake_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any], Callable[[], Any]], threading.Event]:
    """Do something before and behind the write of the next wake-up; the event says when it has been done."""

    def intrude(before: Callable[[], Any], behind: Callable[[], Any]) -> threading.Event:
        done = threading.Event()

        def write(fd: int, data: bytes) -> int:
            monkeypatch.setattr("taskpool._engine.loop.os", os)
            before()
            size = os.write(fd, data)
            behind()
            done.set()
            return size

        monkeypatch.setattr("taskpool._engine.loop.os", SimpleNamespace(**{**vars(os), "write": write}))
        return done

    return intrude


Intrude = Callable[[Callable[[], Any], Callable[[], Any]], threading.Event]


def _post_and_wait(loop: Loop) -> None:
    called = threading.Event()
    loop.post(lambda _: called.set(), None)
    assert called.wait(5), "nobody woke the loop"


def _post_until(loop: Loop, done: threading.Event) -> None:
    """Post until it happened that the loop slept."""
    wait_until(lambda: loop.post(bool, None) or done.is_set())


def test_a_handler_that_comes_before_a_wake_up_is_written(loop: Loop, at_wake_up: Intrude) -> None:
    """It may post itself and wait for that, while the thread that it interrupted cannot go on."""
    _post_until(loop, at_wake_up(lambda: _post_and_wait(loop), lambda: None))


def test_a_handler_that_comes_behind_it(loop: Loop, at_wake_up: Intrude) -> None:
    """The loop may sleep again before the thread goes on, which then speaks for the sleep that has ended."""

    def let_it_sleep() -> None:
        for _ in range(20):
            _post_and_wait(loop)

    _post_until(loop, at_wake_up(lambda: None, let_it_sleep))
    for _ in range(20):
        _post_and_wait(loop)
