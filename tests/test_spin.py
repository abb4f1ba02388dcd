"""To look for a moment before sleeping: it finds what comes, ends in time, and stops where others need the processor."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from taskpool._engine import spin

pytestmark = pytest.mark.core


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Return both ends of a pipe."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin, "_pause_until", 0.0)


def _clock(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Have each look take so many seconds."""
    ticks = itertools.count(1000.0, step)
    monkeypatch.setattr(spin, "now", lambda: next(ticks))


def test_what_is_there_is_found(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first look, and what comes while it looks with a later one."""
    os.write(pipe[1], b"1")
    assert spin.until_readable(pipe[0])
    os.read(pipe[0], 1)
    monkeypatch.setattr(os, "sched_yield", lambda: os.write(pipe[1], b"2"))
    _clock(monkeypatch, spin.LONGEST / 10)
    assert spin.until_readable(pipe[0])


def test_it_ends_where_nothing_comes(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time, and the next one looks again."""
    _clock(monkeypatch, spin.LONGEST / 10)
    looks: list[int] = []
    monkeypatch.setattr(os, "sched_yield", lambda: looks.append(1))
    assert not spin.until_readable(pipe[0])
    assert 8 <= len(looks) <= 12
    os.write(pipe[1], b"1")
    assert spin.until_readable(pipe[0])


def test_nobody_looks_where_others_need_the_processor(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that took long was interrupted by somebody: for a while there is none, then there is one again."""
    looks: list[int] = []
    monkeypatch.setattr(os, "sched_yield", lambda: looks.append(1))
    _clock(monkeypatch, 2 * spin.TAKEN)
    assert not spin.until_readable(pipe[0], 1.0)
    os.write(pipe[1], b"1")
    assert len(looks) == 1
    assert not spin.until_readable(pipe[0], 1.0)
    _clock(monkeypatch, spin.PAUSE)
    spin.now()
    spin.now()
    assert spin.until_readable(pipe[0], 1.0)
