"""What is written to the descriptors 1 and 2 of a worker, on its way through one pipe, with marks that say whose it is."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
from typing import Any

from taskpool._engine.channel import OUTPUT_KEY, Page

TASK = struct.Struct("<QQ")  # unit, item
KEY_SIZE = 2 + 16
MARK_SIZE = KEY_SIZE + TASK.size
LONGEST_LINE = 16 * 1024  # a line that is longer becomes several records
MOST_CAPTURED = 1 << 20  # bytes that are kept of each task: the last ones


def key_of(page: Page) -> bytes:
    """Return what marks begin with."""
    return b"\0\xff" + struct.pack("<QQ", page.words[OUTPUT_KEY], page.words[OUTPUT_KEY + 1])


# In the worker


def redirect(fd: int) -> None:
    """Make the descriptors 1 and 2 the pipe `fd`, and have Python and C write to them at once."""
    for number in (1, 2):
        os.dup2(fd, number)
    with contextlib.suppress(Exception):  # another C library
        import ctypes

        library = ctypes.CDLL(None)
        for name in ("stdout", "stderr"):
            library.setvbuf(ctypes.c_void_p.in_dll(library, name), None, 2, 0)  # _IONBF
    # What a fork copied may hold text of the parent's, which would be written when it is collected.
    _kept.extend((sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__))
    sys.stdout = sys.__stdout__ = _text(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2)  # type: ignore[misc]


_kept: list[Any] = []


def _text(fd: int) -> io.TextIOWrapper:
    raw: Any = _Unbuffered(fd, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


class _Unbuffered(io.FileIO):
    def write(self, data: Any) -> int:
        """Write all of it: a signal handler may have come in between."""
        view = memoryview(data).cast("B")
        size = len(view)
        while view:
            view = view[super().write(view) or 0 :]
        return size


def mark(fd: int, key: bytes, unit: int, item: int) -> None:
    """Write to the pipe that what follows is of another task. In one piece, however many write.

    Not to the descriptor 1: a task may have closed it, or made it a file of its own.
    """
    with contextlib.suppress(OSError):  # the task has closed all that there is
        os.write(fd, key + TASK.pack(unit, item))


# In the parent


class Printed:
    """What one worker has printed, by task.

    Args:
        key: What marks begin with.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._task = 0, 0  # unit and item
        self._unread = b""  # what may be the beginning of a mark
        self._texts: dict[tuple[int, int], bytearray] = {}
        self._cut: set[tuple[int, int]] = set()  # those of which the beginning was dropped

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        data = self._unread + data
        while (at := data.find(self._key)) >= 0 and len(data) >= at + MARK_SIZE:
            self._add(data[:at])
            unit, item = TASK.unpack_from(data, at + KEY_SIZE)
            self._task = unit, item
            data = data[at + MARK_SIZE :]
        keep = len(data) - at if at >= 0 else self._overlap(data)
        self._add(data[: len(data) - keep])
        self._unread = data[len(data) - keep :]

    def _overlap(self, data: bytes) -> int:
        """Return how many of the last bytes are the beginning of a mark."""
        return next((size for size in range(min(len(data), KEY_SIZE - 1), 0, -1) if data.endswith(self._key[:size])), 0)

    def _add(self, data: bytes) -> None:
        if data:
            text = self._texts.setdefault(self._task, bytearray())
            text += data
            if len(text) > 2 * MOST_CAPTURED:
                del text[:-MOST_CAPTURED]
                self._cut.add(self._task)

    def take(self, task: tuple[int, int]) -> str:
        """Return, and forget, what a task has printed; and what came of any before it in the same unit's place."""
        text = self._texts.pop(task, bytearray())
        cut = task in self._cut or len(text) > MOST_CAPTURED
        self._cut.discard(task)
        for other in [each for each in self._texts if each[0] < task[0]]:  # written when that had ended
            del self._texts[other]
        found = text[-MOST_CAPTURED:].decode(errors="replace")
        return f"[the beginning was left out]\n{found}" if cut else found

    def lines(self, *, rest: bool) -> list[tuple[tuple[int, int], str]]:
        """Return, and forget, the lines that are whole, by task; and what is left, of those that have ended or of all."""
        found = []
        for task in list(self._texts):
            data = self._texts.pop(task)
            lines = data.split(b"\n")
            tail = lines.pop()
            if tail and (rest or task != self._task or len(tail) > LONGEST_LINE):
                lines.append(tail)
            elif tail:
                self._texts[task] = tail
            found += [(task, line.decode(errors="replace")) for line in lines]
        return found
