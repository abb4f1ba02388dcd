"""What workers log comes out of the parent's handlers, says where it came from, and survives the worker."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

import taskpool
from tests import talk, tasks
from tests.helpers import (
    PATIENCE,
    Backend,
    at_most,
    bounded,
    lines,
    on_every_host,
    on_hosts,
    on_one_host,
    outcome,
    wait_until,
)
from tests.scripts import run_main

Make = Callable[..., taskpool.Executor]


class Collector(logging.Handler):
    """Keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.records.append(record)

    @property
    def texts(self) -> list[str]:
        """The message of each record."""
        return [record.getMessage() for record in self.records]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """What reaches a handler of the root logger, at level INFO."""
    handler, root = Collector(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.setLevel(level)
    root.removeHandler(handler)


@pytest.fixture
def events() -> Iterator[list[dict[str, Any]]]:
    """What reaches structlog's processors in this process."""
    kept: list[dict[str, Any]] = []

    def keep(_: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
        kept.append({**event, "method": method})
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    yield kept
    structlog.reset_defaults()


# ---------------------------------------------------------------------------------------------- what arrives


@pytest.mark.core
@on_every_host
def test_a_record_says_where_it_came_from(pool: Make, collector: Collector) -> None:
    """A record has all that it had in the worker, and names task, worker and process."""
    executor = pool(1, name="press")
    pid = (
        executor.options(name="greeting").submit(talk.say, "hello %s, %d", "you", 5, user="me", parts=[1, 2]).result(20)
    )
    bounded(executor.shutdown)
    (record,) = collector.records
    assert record.getMessage() == "hello you, 5"
    assert (record.name, record.levelno, record.funcName) == ("tests.talk", logging.WARNING, "say")
    assert Path(record.pathname).name == "talk.py"
    assert (record.user, record.parts) == ("me", [1, 2])  # type: ignore[attr-defined]
    assert record.taskpool_task == "greeting"  # type: ignore[attr-defined]
    assert "press" in record.taskpool_worker  # type: ignore[attr-defined]
    assert record.process == pid


@on_one_host
def test_a_task_without_a_name_has_that_of_its_function(pool: Make, collector: Collector) -> None:
    """So does an item of a map."""
    executor = pool(1)
    executor.submit(talk.say, "one").result(20)
    list(executor.map(talk.say, ["two"]))
    bounded(executor.shutdown)
    assert collector.texts == ["one", "two"]
    assert all("say" in record.taskpool_task for record in collector.records), vars(collector.records[0])


@pytest.mark.core
@on_one_host
def test_all_records_arrive_in_order(pool: Make, collector: Collector) -> None:
    """Each record of each worker, in its order, by the end of shutdown."""
    executor = pool(2)
    tags = [executor.submit(talk.say_many, tag, 200) for tag in range(6)]
    pids = {future.result(20) for future in tags}
    bounded(executor.shutdown)
    for tag in range(6):
        mine = [text for text in collector.texts if text.startswith(f"{tag} ")]
        assert mine == [f"{tag} {number}" for number in range(200)]
    assert {record.process for record in collector.records} == pids
    workers = {(record.process, record.taskpool_worker) for record in collector.records}  # type: ignore[attr-defined]
    assert len(workers) == len(pids)


ENDS: dict[str, Any] = {
    "killed": tasks.kill_itself,
    "left": tasks.exit_quietly,
    "crashed": tasks.segfault,
    "hung": tasks.hold_the_gil,
    "failed": tasks.generator,
}


@pytest.mark.core
@on_hosts
@pytest.mark.parametrize("end", ENDS)
def test_records_survive_the_worker(pool: Make, collector: Collector, end: str) -> None:
    """What was logged before the end is there, up to the last record, whatever the end was."""
    executor = pool(1, task_timeout=1.5, grace=0.1)
    assert isinstance(outcome(executor.submit(talk.say_many_then, "last", 300, ENDS[end])), Exception)
    wait_until(lambda: len(collector.records) >= 300, 10, "the records")
    assert collector.texts[:300] == [f"last {number}" for number in range(300)]
    assert outcome(executor.submit(talk.say, "after"))
    wait_until(lambda: "after" in collector.texts, 10, "the next worker's record")


@on_one_host
def test_threads_of_a_task_log(pool: Make, collector: Collector) -> None:
    """Records of several threads and a large result do not get into each other's way."""
    executor = pool(1)
    assert outcome(executor.submit(talk.say_in_threads, 4, 150)) == tasks.payload(1 << 20)
    bounded(executor.shutdown)
    assert sorted(collector.texts) == sorted(f"{thread} {number}" for thread in range(4) for number in range(150))


@on_one_host
def test_an_exception_is_logged_with_its_traceback(pool: Make, collector: Collector) -> None:
    """The traceback arrives as text."""
    executor = pool(1)
    executor.submit(talk.say_with_traceback).result(20)
    bounded(executor.shutdown)
    (record,) = collector.records
    text = logging.Formatter().format(record)
    assert text.startswith("it failed\nTraceback")
    assert "TwoArguments: 1: odd" in text
    assert "in say_with_traceback" in text


@on_one_host
def test_initializers_log(pool: Make, collector: Collector) -> None:
    """What an initializer logs arrives as well."""
    executor = pool(1, initializer=talk.say, initargs=("starting",))
    executor.submit(abs, -1).result(20)
    bounded(executor.shutdown)
    assert "starting" in collector.texts


@on_one_host
def test_warnings_arrive_as_records(pool: Make, collector: Collector) -> None:
    """What a task is warned of is shown by the parent."""
    executor = pool(1)
    executor.submit(talk.warn).result(20)
    bounded(executor.shutdown)
    (record,) = collector.records
    assert record.name == "py.warnings"
    assert "mind the gap" in record.getMessage()


# ---------------------------------------------------------------------------------------------- what does not harm


@on_one_host
def test_odd_records_harm_no_other(pool: Make, collector: Collector) -> None:
    """A record that cannot travel or cannot be made into text costs neither the task nor the next record."""
    executor = pool(1)
    assert outcome(executor.submit(talk.say_what_does_not_travel)) == "done"
    bounded(executor.shutdown)
    assert [text for text in collector.texts if text in ("lock", "plain")] == ["lock", "plain"]
    assert "lock" in repr(collector.records[0].lock)  # type: ignore[attr-defined]


@on_one_host
def test_a_handler_that_raises_harms_nobody(pool: Make, collector: Collector) -> None:
    """A handler of the parent may fail: tasks go on and later records arrive."""

    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == "bad":
                raise SystemExit("from a handler")

    handler = Failing()
    logging.getLogger("tests.talk").addHandler(handler)
    try:
        executor = pool(1)
        for text in ("first", "bad", "last"):
            assert outcome(executor.submit(talk.say, text))
        bounded(executor.shutdown)
    finally:
        logging.getLogger("tests.talk").removeHandler(handler)
    assert [text for text in collector.texts if text in ("first", "last")] == ["first", "last"]


@on_one_host
def test_a_handler_that_blocks_delays_no_task(pool: Make, tmp_path: Path, collector: Collector) -> None:
    """A slow handler holds up records, not outcomes, for longer than its time."""
    executor = pool(1)
    assert executor.submit(abs, -1).result(20) == 1
    with blocking_handler(tmp_path / "release"):
        futures = [executor.submit(talk.say, "blocked") for _ in range(3)]
        answers = [outcome(future, 10) for future in futures]
        assert all(isinstance(answer, int) for answer in answers), answers
    wait_until(lambda: collector.texts.count("blocked") == 3)


@contextlib.contextmanager
def blocking_handler(release: Path) -> Iterator[None]:
    """Have a handler that waits for a file; it is released at the end."""

    class Blocking(logging.Handler):
        def handle(self, _: logging.LogRecord) -> bool:
            tasks.await_file(release)
            return True

    handler = Blocking()
    logging.getLogger("tests.talk").addHandler(handler)
    try:
        yield
    finally:
        release.touch()
        logging.getLogger("tests.talk").removeHandler(handler)


@pytest.mark.core
@on_hosts
def test_signal_handlers_log(pool: Make, collector: Collector) -> None:
    """One that interrupts the writing of a record neither waits for itself nor cuts that record."""
    worked, ticked = bounded(lambda: pool(1).submit(talk.say_in_handlers, 0.5).result())
    assert ticked > 10
    wait_until(lambda: len(collector.records) >= worked + ticked, 5)
    work = [text for text in collector.texts if text.startswith("work")]
    assert work == [f"work {number}" for number in range(worked)]
    assert sorted(set(collector.texts) - set(work)) == sorted(f"tick {number}" for number in range(ticked))


@on_one_host
def test_a_record_that_is_cut_costs_its_task_alone(pool: Make, tmp_path: Path) -> None:
    """A timeout by alarm leaves half a record: the task fails, and does not run again; the pool goes on."""
    executor = pool(1)
    errors = [outcome(executor.submit(talk.say_until_interrupted, tmp_path / "notes")) for _ in range(5)]
    crashes = [error for error in errors if isinstance(error, taskpool.WorkerCrashedError)]
    assert crashes, "no record was cut: nothing was tested"
    assert len(crashes) + errors.count("interrupted") == 5
    assert len(lines(tmp_path / "notes")) == 5
    assert executor.submit(tasks.identity, 1).result(20) == 1


@on_one_host
def test_forks_while_a_thread_logs(pool: Make, collector: Collector) -> None:
    """A child can log, to nobody, whatever the thread was doing that it does not have."""
    assert bounded(lambda: pool(1).submit(talk.say_in_forks, 50).result()) == [0] * 50
    assert "from a child" not in collector.texts


@on_one_host
def test_a_fork_in_a_task_does_not_disturb(pool: Make, collector: Collector) -> None:
    """A child that a task forks does not speak for the worker, and cannot garble what it says."""
    executor = pool(1)
    for _ in range(3):
        assert outcome(executor.submit(talk.say_in_fork)) == "done"
    bounded(executor.shutdown)
    assert collector.texts == ["parent"] * 3


# ---------------------------------------------------------------------------------------------- the parent's settings


@on_hosts
def test_levels_are_the_parents(pool: Make, collector: Collector) -> None:
    """Workers send what the parent would show, and nothing below."""
    executor = pool(1)
    for level in (logging.DEBUG, logging.INFO, logging.ERROR):
        executor.submit(talk.say, "at %d", level, level=level).result(20)
    bounded(executor.shutdown)
    assert collector.texts == ["at 20", "at 40"]


@on_one_host
def test_a_loggers_own_level_counts(pool: Make, collector: Collector) -> None:
    """A level that the parent set on one logger holds in the workers."""
    logger = logging.getLogger("tests.talk")
    logger.setLevel(logging.DEBUG)
    try:
        executor = pool(1)
        executor.submit(talk.say, "in detail", level=logging.DEBUG).result(20)
        bounded(executor.shutdown)
    finally:
        logger.setLevel(logging.NOTSET)
    assert collector.texts == ["in detail"]


@on_every_host
def test_each_handler_writes_once(pool: Make, tmp_path: Path, collector: Collector) -> None:
    """Handlers that a forked worker inherits stay silent there: the parent's own write each record once."""
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger().addHandler(handler)
    try:
        executor = pool(2)
        for future in [executor.submit(talk.say_many, tag, 20) for tag in range(3)]:
            future.result(20)
        bounded(executor.shutdown)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    assert sorted(lines(tmp_path / "log")) == sorted(collector.texts)
    assert len(collector.texts) == 60


UNCONFIGURED = """
from tests import talk
with executor(1) as pool:
    pool.submit(talk.say, "seen once").result()
    pool.submit(talk.say, "not seen", level=20).result()
"""


@on_hosts
def test_a_program_that_configures_nothing(backend: Backend, tmp_path: Path) -> None:
    """Without any handler the standard library's last resort shows warnings, once."""
    ended = run_main(UNCONFIGURED, backend, tmp_path)
    assert ended.err == "seen once\n", ended


KILLED_AT_EXIT = """
import logging
from tests import talk
logging.basicConfig(level=logging.INFO, format="%(message)s %(taskpool_task)s")
global pool, future
pool = executor(1, shutdown_timeout=0.5)
future = pool.submit(talk.say_many_then, "n", 100, tasks.ignore_sigterm)
"""


@on_hosts
def test_records_of_a_task_that_exit_stops(backend: Backend, tmp_path: Path) -> None:
    """The interpreter's exit stops the task that hangs, and what it had logged comes out."""
    ended = run_main(KILLED_AT_EXIT, backend, tmp_path)
    logged = [line for line in ended.err.splitlines() if line.startswith("n ")]
    assert logged == [f"n {number} say_many_then" for number in range(100)], ended


# ---------------------------------------------------------------------------------------------- structlog


@pytest.mark.core
@on_hosts
def test_structlog_events_arrive(pool: Make, events: list[dict[str, Any]]) -> None:
    """An event runs through the parent's processors, with its fields and with task, worker and process."""
    executor = pool(1, name="press")
    pid = executor.options(name="greeting").submit(talk.say_structured, "hello", user="me", parts=[1, 2]).result(20)
    bounded(executor.shutdown)
    (event,) = events
    assert event["event"] == "hello"
    assert (event["user"], event["parts"], event["bound"], event["method"]) == ("me", [1, 2], "yes", "warning")
    assert (event["task"], event["pid"]) == ("greeting", pid)
    assert "press" in event["worker"]


@on_one_host
@pytest.mark.parametrize("end", ["killed", "left", "hung"])
def test_structlog_events_survive_the_worker(pool: Make, events: list[dict[str, Any]], end: str) -> None:
    """As with logging."""
    executor = pool(1, task_timeout=2, grace=0.1)
    outcome(executor.submit(talk.say_structured_many_then, 200, ENDS[end]))
    wait_until(lambda: len(events) >= 200, 10, "the events")
    assert [event["number"] for event in events] == list(range(200))


@on_one_host
def test_structlog_exceptions(pool: Make, events: list[dict[str, Any]]) -> None:
    """A logged exception arrives with its traceback as text, which the parent's own formatting of exceptions keeps."""
    (keep,) = structlog.get_config()["processors"]
    structlog.configure(processors=[structlog.processors.format_exc_info, keep])
    executor = pool(1)
    executor.submit(talk.structured_failure).result(20)
    bounded(executor.shutdown)
    (event,) = events
    assert event["event"] == "it failed"
    assert "ValueError: odd" in event["exception"]


def test_structlog_preloaded(pool: Make, events: list[dict[str, Any]]) -> None:
    """It makes no difference that structlog was there before the worker."""
    executor = pool(1, preload=["structlog"])
    assert outcome(executor.submit(talk.say_structured, "hello"))
    bounded(executor.shutdown)
    assert [event["event"] for event in events] == ["hello"]


# ---------------------------------------------------------------------------------------------- handlers in the parent


class Hostile(logging.Handler):
    """Blocks until it is released, or raises where logging does not catch it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.called, self.gate = threading.Event(), threading.Event()
        self.addFilter(self.judge)

    def judge(self, _: logging.LogRecord) -> bool:
        """Be the filter."""
        raises = self.way == "raises"
        self.called.set()
        if raises:
            raise RuntimeError("from a filter")
        return self.gate.wait(PATIENCE)

    def emit(self, record: logging.LogRecord) -> None:
        """Drop it."""


@pytest.fixture
def hostile(request: pytest.FixtureRequest) -> Iterator[Hostile]:
    """A handler of the root logger that does harm."""
    handler = Hostile(request.param)
    logging.getLogger().addHandler(handler)
    yield handler
    handler.gate.set()
    logging.getLogger().removeHandler(handler)


@on_one_host
@pytest.mark.parametrize("hostile", ["blocks", "raises"], indirect=True)
def test_a_handler_harms_no_task_through_the_engines_own_records(
    pool: Make, hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine itself has to say takes the same way as what workers say, past the thread that serves all."""
    for module in ("handle", "deadlines", "feeder", "direct"):
        monkeypatch.setattr(f"taskpool._engine.{module}.PICK_UP", 0.2)
    executor = pool(1)
    os.kill(executor.submit(tasks.pid).result(PATIENCE), signal.SIGSTOP)
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert hostile.called.wait(PATIENCE), "nothing was logged about the worker that was stopped"
    assert executor.submit(tasks.identity, 2).result(PATIENCE) == 2


@on_one_host
@pytest.mark.parametrize("hostile", ["raises"], indirect=True)
def test_a_filter_that_raises_costs_no_later_record(pool: Make, hostile: Hostile, collector: Collector) -> None:
    """Its thread goes on."""
    executor = pool(1)
    executor.submit(talk.say, "first").result(PATIENCE)
    assert hostile.called.wait(PATIENCE)
    hostile.way = "passes"
    hostile.gate.set()
    executor.submit(talk.say, "second").result(PATIENCE)
    wait_until(lambda: "second" in collector.texts)


@on_one_host
@pytest.mark.parametrize("hostile", ["raises"], indirect=True)
@pytest.mark.usefixtures("hostile", "collector")
def test_a_filter_that_raises_costs_no_retry(pool: Make) -> None:
    """A decision that cannot be logged leaves the task its own error."""
    error = outcome(pool(1, retry=2).submit(tasks.fail, ValueError, "odd"))
    assert type(error) is ValueError, error


@on_one_host
@pytest.mark.parametrize("thread", ["callbacks", "logs"])
def test_no_further_thread_can_be_started(
    pool: Make, collector: Collector, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    """Callbacks run, and records are handled, on a thread that there is; the executor ends as ever."""
    executor, called, start = pool(1), threading.Event(), threading.Thread.start
    executor.submit(tasks.identity, 0).result(PATIENCE)

    def refuse(self: threading.Thread) -> None:
        if self.name.endswith(f"-{thread}"):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    future = executor.submit(talk.say_many_then, "number", 3, tasks.pid_after, 0.2)
    future.add_done_callback(lambda _: called.set())
    assert future.result(PATIENCE)
    assert called.wait(PATIENCE)
    wait_until(lambda: "number 2" in collector.texts)
    with at_most(5):
        bounded(executor.shutdown)
