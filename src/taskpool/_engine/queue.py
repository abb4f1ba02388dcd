"""What waits for a worker: by priority, then in the order of arrival. Only the dispatcher touches it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from taskpool._engine.units import Call, Source


class TaskQueue:
    """A line for each priority. What comes back from a worker takes its old place again."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[Source]] = {}
        self._priorities: list[int] = []  # the highest first

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __bool__(self) -> bool:
        return bool(self._priorities)

    def __iter__(self) -> Iterator[Source]:
        for priority in self._priorities:
            yield from self._lines[priority]

    def append(self, source: Source) -> None:
        """Put a new one at the end of its line."""
        line = self._lines.get(source.priority)
        (self._new_line(source.priority) if line is None else line).append(source)

    def insert(self, source: Source) -> None:
        """Put one that came back where it stood before."""
        line = self._lines.get(source.priority)
        if line is None:
            line = self._new_line(source.priority)
        ahead = []
        while line and line[0].order < source.order:
            ahead.append(line.popleft())
        if not line or line[0] is not source:
            line.appendleft(source)
        line.extendleft(reversed(ahead))

    def first(self) -> Source:
        """Return the one whose turn it is; it stays."""
        return self._lines[self._priorities[0]][0]

    def pop(self) -> Source:
        """Remove the one whose turn it is."""
        priority = self._priorities[0]
        line = self._lines[priority]
        source = line.popleft()
        if not line:
            del self._lines[priority], self._priorities[0]
        return source

    def clear(self) -> list[Source]:
        """Remove and return all."""
        sources = list(self)
        self._lines.clear()
        self._priorities.clear()
        return sources

    def drop_job(self, job: object) -> None:
        """Remove the pieces of one map."""
        kept = [source for source in self.clear() if isinstance(source, Call) or source.job is not job]
        for source in kept:
            self.append(source)

    def _new_line(self, priority: int) -> deque[Source]:
        line = self._lines[priority] = deque()
        self._priorities = sorted(self._lines, reverse=True)
        return line
