"""The channel between the parent and a worker, by itself."""

from __future__ import annotations

import errno
import os
from typing import NoReturn

import pytest

from taskpool._engine import channel as channels
from taskpool._engine import descriptors
from taskpool._engine import loop as loops
from taskpool._engine.channel import Channel
from taskpool._engine.loop import Loop


@pytest.mark.parametrize("function", ["dup", "ftruncate"])
def test_a_channel_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Whichever step fails, for want of descriptors say, what was made before it is closed again."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    noted = set(descriptors._parent_ends.fds)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        if function == "open":  # the second reading end is something that a channel can do without
            Channel().close()
        else:
            with pytest.raises(OSError, match="too many"):
                Channel()
    assert descriptors._parent_ends.fds == noted


def test_a_task_for_a_worker_that_has_died_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no second reading end nobody reads the pipe any more: nothing was sent, and nothing is raised."""
    monkeypatch.setattr(channels, "_reopen", lambda _: None)
    channel = Channel()
    channel.worker_end.close()
    assert not channel.send_packet(b"a task")
    channel.close()


def test_no_number_is_kept_of_what_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while it is being closed: a thread that is about to write would write into another file."""
    channel, loop = Channel(), Loop(lambda *_: None)
    close, seen = channels.close_kept, []

    def look(fd: int) -> None:
        seen.append(fd in (channel.tasks, channel.results, loop._wake_w))
        close(fd)

    monkeypatch.setattr(channels, "close_kept", look)
    monkeypatch.setattr(loops, "close_kept", look)
    channel.close()
    loop.close()
    assert len(seen) >= 10
    assert not any(seen)
