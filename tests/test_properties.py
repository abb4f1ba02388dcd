"""Random lives of an executor: what every future, item and attempt comes to is what the serial backend makes of it.

A plan says how each attempt of a task ends: it returns, raises, kills its worker or hangs. The serial backend is the
model: it runs the same plan under the same policy, with the expected error in place of a crash and of a passed limit.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import attrs
import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import taskpool
from tests import tasks
from tests.helpers import FULL, HOSTS, PATIENCE, TEMPLATE, Backend, bounded, lines, outcome

LIMIT = 0.3  # of tasks whose plan has them hang, in seconds

Plan = tuple[str, ...]  # how each attempt ends; the last word stays
Step = tuple[Any, ...]

STEPS: dict[str, Step] = {
    "return": (tasks.identity, "value"),
    "raise": (tasks.fail, OSError, "planned"),
    "crash": (tasks.kill_itself,),
    "hang": (tasks.sleep_for_ever,),
}
MODEL = STEPS | {
    "crash": (tasks.fail, taskpool.WorkerCrashedError, "planned"),
    "hang": (tasks.fail, taskpool.TaskTimeoutError, "planned"),
}
ERRORS: dict[str, type[BaseException]] = {
    "raise": OSError,
    "crash": taskpool.WorkerCrashedError,
    "hang": taskpool.TaskTimeoutError,
}


@attrs.frozen
class End:
    """How a task ends: with a value or with an error of a type, after so many attempts."""

    value: Any
    error: type[BaseException] | None
    attempts: int


@functools.cache
def modelled(plan: Plan, attempts: int) -> End:
    """Return what the serial backend makes of a plan."""
    with tempfile.TemporaryDirectory() as folder, taskpool.Executor(1, backend="serial", retry=attempts) as serial:
        item = tasks.in_turn, Path(folder) / "notes", *(MODEL[step] for step in plan)
        (found,) = serial.outcomes(tasks.call, [item])
        assert len(lines(Path(folder) / "notes")) == found.attempts
    return End(found.value if found.ok else None, None if found.ok else type(found.error), found.attempts)


@attrs.define(eq=False)
class Planned:
    """A task that was started, and what may come of it.

    Attributes:
        plan: How its attempts end.
        end: What the model made of it.
        notes: The file with a line for each attempt.
        may_cancel: Whether it may be cancelled instead.
        may_stop: Whether it may have been stopped at any attempt.
    """

    plan: Plan
    end: End
    notes: Path
    may_cancel: bool = False
    may_stop: bool = False

    def step(self, gate: Path | None = None) -> Step:
        """Return the task: (function, *arguments)."""
        steps = [STEPS[name] for name in self.plan]
        return tasks.in_turn, self.notes, *((tasks.call_behind, gate, *step) if gate else step for step in steps)

    def check(self, value: Any, error: BaseException | None) -> None:
        """Fail unless this is how the task may end."""
        if error is None and value == self.end.value and self.end.error is None:
            return
        may_be = {self.end.error} if self.end.error else set()
        may_be |= {CancelledError} if self.may_cancel or self.may_stop else set()
        may_be |= {ERRORS[name] for name in self.plan if name in ERRORS} if self.may_stop else set()
        assert type(error) in may_be, f"{self} ended with {value!r}, {error!r}"

    def check_starts(self, *, exactly: bool = True) -> None:
        """Fail unless it was started as often as it should."""
        starts = len(lines(self.notes))
        assert starts <= self.end.attempts, self
        assert starts == self.end.attempts or not exactly or self.may_cancel or self.may_stop, (starts, self)


@attrs.define(eq=False)
class Submitted(Planned):
    """... by `submit`.

    Attributes:
        future: Its future.
        called: The future, as often as its callback was called.
        starts: How often it had started when it was cancelled and did not run.
        seen: What the future was first seen resolved with.
    """

    future: taskpool.TaskFuture[Any] = attrs.field(kw_only=True)
    called: list[object] = attrs.Factory(list)
    starts: int | None = None
    seen: Any = None


@attrs.define(eq=False)
class Mapped:
    """A map, and its items."""

    items: list[Planned]
    results: Iterator[Any]
    are_outcomes: bool


PLANS: list[Plan] = [
    (*failures, last)
    for length in range(3)
    for failures in itertools.product(["raise", "crash"], repeat=length)
    for last in ("return", "raise", "crash")
]
plans = st.sampled_from([*PLANS, ("hang",), ("hang", "return"), ("crash", "hang", "return")])
attempts = st.integers(1, 3)
waits = st.sampled_from([0, 0, 0.01])
gates = st.sampled_from([False, False, True])
ends = st.sampled_from(["wait", "wait", "wait", "wait", "cancel", "timeout", "terminate"])
which = st.integers(0, 1000)  # one of those there are


class Lives(RuleBasedStateMachine):
    """One executor, and whatever may be done with it."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.folder = Path(tempfile.mkdtemp(prefix="lives-"))
        self.calls: list[Submitted] = []
        self.left: list[Submitted] = []  # of these, the ones that were neither cancelled nor waited for
        self.maps: list[Mapped] = []
        self.gates: list[Path] = []  # that are closed: some tasks wait behind them
        self.files = 0
        self.end: str
        self.executor: taskpool.Executor

    @initialize(workers=st.integers(1, 3), max_tasks=st.sampled_from([None, None, 2]), end=ends)
    def begin(self, workers: int, max_tasks: int | None, end: str) -> None:
        """Make the executor, and choose how it will be ended."""
        self.end = end
        self.executor = taskpool.Executor(workers, **self.backend.options, max_tasks_per_child=max_tasks)

    # What may be done

    @rule(
        some=st.lists(st.tuples(plans, attempts, st.integers(-1, 1)), min_size=3, max_size=8), wait=waits, behind=gates
    )
    def submit(self, some: list[tuple[Plan, int, int]], wait: float, behind: bool) -> None:
        """Submit some tasks, free to run or behind a gate."""
        gate = self.file("gate") if behind else None
        for plan, tries, priority in some:
            planned = self.plan(plan, tries)
            view = self.view(tries, wait, "hang" in plan).options(priority=priority, name=f"{len(self.calls)} {plan}")
            future = view.submit(*planned.step(None if "hang" in plan else gate))
            call = Submitted(planned.plan, planned.end, planned.notes, future=future)
            future.add_done_callback(call.called.append)
            self.calls.append(call)
            self.left.append(call)
        if gate is not None:
            self.gates.append(gate)

    @rule(
        mix=st.lists(plans, min_size=2, max_size=6),
        tries=attempts,
        chunksize=st.sampled_from([None, 1, 3, 50]),
        are_outcomes=st.booleans(),
    )
    def map(self, mix: list[Plan], tries: int, chunksize: int | None, are_outcomes: bool) -> None:
        """Start a map of a few items; its results are asked for later."""
        items = [self.plan(plan, tries) for plan in mix]
        view = self.view(tries, 0, any("hang" in plan for plan in mix))
        call = view.outcomes if are_outcomes else view.map
        results = call(tasks.call, [item.step() for item in items], chunksize=chunksize, buffersize=10)
        self.maps.append(Mapped(items, results, are_outcomes))

    @precondition(lambda self: self.gates)
    @rule(one=which)
    def release(self, one: int) -> None:
        """Open a gate."""
        self.gates.pop(one % len(self.gates)).touch()

    @precondition(lambda self: self.left)
    @rule(one=which)
    def cancel(self, one: int) -> None:
        """Cancel a call, whatever it does."""
        call = self.left.pop(one % len(self.left))
        was_done = call.future.done()
        call.may_cancel |= not was_done
        accepted = call.future.cancel()
        assert accepted or call.future.done()
        assert not accepted or not was_done or call.future.cancelled()
        if not was_done and call.future.cancelled():
            call.starts = len(lines(call.notes))

    @precondition(lambda self: self.left and not self.gates)
    @rule(one=which)
    def wait(self, one: int) -> None:
        """Wait for a call."""
        outcome(self.left.pop(one % len(self.left)).future, PATIENCE)

    @precondition(lambda self: self.maps and not self.gates)
    @rule(one=which)
    def read(self, one: int) -> None:
        """Read a map to its end."""
        self.check_map(self.maps.pop(one % len(self.maps)))

    @precondition(lambda self: self.maps)
    @rule(one=which)
    def close(self, one: int) -> None:
        """Give a map up."""
        given_up = self.maps.pop(one % len(self.maps))
        given_up.results.close()  # type: ignore[attr-defined]

    @rule()
    def look(self) -> None:
        """Do nothing: some time passes."""

    # What holds

    @invariant()
    def what_is_resolved_is_right(self) -> None:
        """And stays as it is."""
        for call in self.calls:
            if call.future.done():
                ended = outcome(call.future, 0)
                error = ended if isinstance(ended, BaseException) else None
                if call.seen is None:
                    call.check(None if error else ended, error)
                    call.seen = ended
                assert type(ended) is type(call.seen)
                assert ended is call.seen or isinstance(ended, CancelledError)
            if call.starts is not None:
                assert len(lines(call.notes)) <= call.starts + call.future.running()

    def teardown(self) -> None:
        """End it, and look at everything."""
        try:
            self.finish()
        finally:
            bounded(lambda: self.executor.terminate(2))
            shutil.rmtree(self.folder)

    def finish(self) -> None:
        """Have everything resolved within its bounds, each task started as often as it should."""
        if self.end != "wait":
            self.stop()
        while self.gates:
            self.release(0)
        bounded(self.executor.shutdown)
        assert all(call.future.done() for call in self.calls)
        self.what_is_resolved_is_right()
        for each in self.maps:
            self.check_map(each)
        for call in self.calls:
            assert call.called == [call.future]
            call.check_starts()
        with pytest.raises(RuntimeError):
            self.executor.submit(tasks.identity, 1)
        stats = self.executor.stats()
        assert (stats.workers, stats.running, stats.queued) == (0, 0, 0)

    def stop(self) -> None:
        """End it before everything has been done."""
        for call in self.calls:
            call.may_stop = not call.future.done()
        for each in self.maps:
            for item in each.items:
                item.may_stop = True
        if self.end == "cancel":
            self.executor.shutdown(wait=False, cancel_futures=True)
            return
        bounded(lambda: self.executor.shutdown(timeout=0.1) if self.end == "timeout" else self.executor.terminate(2))
        assert all(call.future.done() for call in self.calls)

    def check_map(self, read: Mapped) -> None:
        """Compare a map's results with what the model makes of its items."""
        if read.are_outcomes:
            found = {record.index: record for record in bounded(lambda: list(read.results))}
            assert sorted(found) == list(range(len(read.items)))
            for index, item in enumerate(read.items):
                record = found[index]
                item.check(None if record.error else record.value, record.error)
                assert record.attempts == item.end.attempts or item.may_stop
                item.check_starts()
            return
        for item in read.items:
            try:
                value = bounded(lambda: next(read.results))
            except BaseException as error:
                item.check(None, error)
                break
            item.check(value, None)
            item.check_starts()
        assert list(read.results) == []
        for item in read.items:
            item.check_starts(exactly=False)

    # Helpers

    def plan(self, plan: Plan, tries: int) -> Planned:
        return Planned(plan, modelled(plan, tries), self.file("notes"))

    def file(self, name: str) -> Path:
        self.files += 1
        return self.folder / f"{self.files}-{name}"

    def view(self, tries: int, wait: float, limited: bool) -> taskpool.View:
        policy = taskpool.retry(tries, wait=wait) if wait else tries
        return self.executor.options(retry=policy, task_timeout=LIMIT if limited else None)


def live(backend: Backend, *, examples: int, steps: int) -> None:
    """Try so many lives."""
    run_state_machine_as_test(
        lambda: Lives(backend),
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not FULL,  # repeatable, but where there is time to look for more
            print_blob=True,
            phases=[hypothesis.Phase.generate],  # a race that was lost once cannot be made smaller by repetition
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )


@pytest.mark.core
def test_a_few_lives() -> None:
    """On the default backend, in short."""
    live(TEMPLATE, examples=5, steps=8)


@pytest.mark.timeout(1200 if FULL else 60)
@pytest.mark.parametrize("backend", HOSTS, ids=str)
def test_many_lives(backend: Backend) -> None:
    """On each hosted backend."""
    live(backend, examples=150 if FULL else 10, steps=12)
