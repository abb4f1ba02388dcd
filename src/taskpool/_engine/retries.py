"""Attempts that failed: whether another one follows. On the dispatcher's thread, but for the decision itself.

A decision looks at the exception or result, and so runs user code: unpickling, and the policy's own strategies. It is
taken on the callback thread. The wait for the next attempt passes in the feeder, on the dispatcher's clock; meanwhile
the future is a queued one again, which `cancel()` resolves at once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, NamedTuple

from taskpool._engine.callbacks import CallbackThread
from taskpool._engine.crew import Counts, Settings
from taskpool._engine.feeder import Feeder
from taskpool._engine.loop import Loop
from taskpool._engine.units import Source, Unit
from taskpool._map import Settled

if TYPE_CHECKING:
    from taskpool.events import How

# How an attempt ended, as `Counts` has it.
FINISHED: Final = "finished"
FAILED: Final = "failed"
TIMED_OUT: Final = "timed_out"
CRASHED: Final = "crashed"
CANCELLED: Final = "cancelled"


class Ended(NamedTuple):
    """An attempt that has ended: of which unit, with what, and how."""

    unit: Unit
    settled: Settled
    kind: How


class Decided(NamedTuple):
    """What follows an attempt: another one after some seconds, or nothing, and what stands then."""

    ended: Ended
    wait: float | None
    again: Source | None


class Retries:
    """Decides about attempts that have ended, and settles what is not tried again.

    Args:
        loop: The dispatcher's loop.
        feeder: Where the next attempt waits.
        callbacks: The thread for what may run user code.
        counts: Where it is noted how tasks ended.
        settings: What does not change: who listens.
    """

    def __init__(
        self, loop: Loop, feeder: Feeder, callbacks: CallbackThread, counts: Counts, settings: Settings
    ) -> None:
        self._loop = loop
        self._feeder = feeder
        self._callbacks = callbacks
        self._counts = counts
        self._settings = settings
        self._numbers = itertools.count()
        self._undecided: dict[int, Ended] = {}
        self._are_over = False

    def __len__(self) -> int:
        """How many decisions are due."""
        return len(self._undecided)

    def consider(self, ended: Ended) -> None:
        """Settle what has ended, unless its policy has it tried again."""
        policy = ended.unit.options.retry
        if (
            policy is None
            or self._are_over
            or ended.kind == CANCELLED
            or not policy.judges(ok=ended.settled.outcome.ok)
        ):
            self._settle(ended)
            return
        number = next(self._numbers)
        self._undecided[number] = ended
        self._callbacks.run(lambda: self._decide(number, ended))

    def _decide(self, number: int, ended: Ended) -> None:
        """Ask the policy. On the callback thread."""
        decided = [Decided(ended, None, None)]
        try:
            decided = [_decide_one(ended._replace(settled=settled)) for settled in ended.settled.singly()]
        finally:  # whatever raises there, the attempt has an end
            self._loop.post(self.decided, (number, decided))

    def decided(self, decision: tuple[int, list[Decided]]) -> None:
        """Do what was decided, if it has not been settled meanwhile."""
        number, decided = decision
        if self._undecided.pop(number, None) is not None:
            for each in decided:
                self._act_on(each)

    def _act_on(self, decided: Decided) -> None:
        if decided.wait is None or self._are_over:
            self._settle(decided.ended)
        elif decided.again is not None:
            self._counts.retried += 1
            decided.ended.unit.add_output(decided.ended.settled)
            self._tell_retried(decided.ended, decided.wait)
            self._feeder.delay(decided.again, decided.wait)

    def _settle(self, ended: Ended) -> None:
        kind, settled = ended.kind, ended.settled
        if settled.outcome.ok:  # the policy may have made one of the other
            kind = FINISHED
        elif kind == FINISHED:
            kind = FAILED
        setattr(self._counts, kind, getattr(self._counts, kind) + settled.items)
        if kind == CANCELLED:
            ended.unit.settle_cancelled(settled)
        else:
            ended.unit.settle(settled)
        if self._settings.listeners:
            self._callbacks.run(lambda: self._tell_ended(ended.unit, kind, settled))

    def _tell_ended(self, unit: Unit, how: How, settled: Settled) -> None:
        """Tell the listeners of each task. On the callback thread: errors are decoded here."""
        from taskpool.events import TaskEnded

        for one in settled.singly():
            self._settings.listeners.tell(
                TaskEnded(
                    executor=self._settings.name,
                    task=unit.name,
                    id=unit.id_of(one.item),
                    attempt=one.attempts,
                    how=how,
                    error=None if one.outcome.ok else one.outcome.decode()[1],
                    seconds=one.seconds,
                    worker=one.worker,
                )
            )

    def _tell_retried(self, ended: Ended, wait: float) -> None:
        if self._settings.listeners:
            from taskpool.events import TaskRetried

            event = TaskRetried(
                executor=self._settings.name,
                task=ended.unit.name,
                id=ended.unit.id_of(ended.settled.item),
                attempt=ended.settled.attempts,
                error=ended.settled.outcome.decode()[1],
                wait=wait,
            )
            self._callbacks.run(lambda: self._settings.listeners.tell(event))

    def end(self) -> None:
        """Settle everything as it stands: nothing is tried again from here on, and nobody waits for a decision."""
        self._are_over = True
        for ended in self._undecided.values():
            self._settle(ended)
        self._undecided.clear()


def _decide_one(ended: Ended) -> Decided:
    from taskpool._retry import Attempts

    unit, settled = ended.unit, ended.settled
    assert unit.options.retry is not None
    attempts = unit.attempts or Attempts(unit.options.retry, unit.name)
    number = attempts.number
    wait, outcome = attempts.decide(unit.bare(settled.outcome), settled.seconds)
    ended = ended._replace(settled=settled._replace(outcome=unit.wrapped(outcome), attempts=number))
    again = None if wait is None else unit.again(settled.item, attempts, fresh=ended.kind in (TIMED_OUT, CRASHED))
    return Decided(ended, wait, again)
