"""What workers log comes out of the parent's handlers, says where it came from, and survives the worker."""

from __future__ import annotations

import contextlib
import contextvars
import enum
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

import taskpool
from taskpool._logdata import plain
from tests import talk, tasks
from tests.helpers import (
    PATIENCE,
    Backend,
    at_most,
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


# ---------------------------------------------------------------------------------------------- where records go


class Slow(logging.Handler):
    """Keeps records, each after a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        threading.Event().wait(self.seconds)
        self.records.append(record)


@pytest.mark.core
@on_every_host
def test_all_is_handled_before_the_future_resolves(pool: Make, collector: Collector) -> None:
    """However a task ends: ten thousand records, then the end of the process; each is there when the error is."""
    executor = pool(1)
    error = outcome(executor.submit(talk.say_many_then, "n", 10_000, tasks.kill_itself), 50)
    seen = list(collector.texts)
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert seen == [f"n {number}" for number in range(10_000)]
    assert [line.partition(": ")[2] for line in error.log] == [f"n {number}" for number in range(9_990, 10_000)]
    slow = Slow(0.02)
    logging.getLogger("tests.talk").addHandler(slow)
    try:
        for index, end in enumerate((os.getpid, tasks.generator, tasks.segfault)):
            outcome(executor.submit(talk.say_many_then, "m", 3, end))
            assert len(slow.records) == 3 * (index + 1)
        list(executor.map(talk.say, ["1", "2"]))
        assert [record.getMessage() for record in slow.records[9:]] == ["1", "2"]
    finally:
        logging.getLogger("tests.talk").removeHandler(slow)
    record = slow.records[-1]
    assert (record.taskpool_id.partition(":")[2], record.taskpool_attempt) == ("1", 1)  # type: ignore[attr-defined]


@on_one_host
def test_levels_are_those_of_the_parent_at_each_moment(pool: Make, collector: Collector) -> None:
    """A level that is set or named while workers run holds from the next task on; so does `logging.disable`."""
    logger = logging.getLogger("tests.talk")
    logging.addLevelName(talk.NOTICE, "NOTICE")
    executors = [pool(1), pool(1)]
    try:
        for executor in executors:
            executor.submit(talk.say, "debug is off", level=logging.DEBUG).result(PATIENCE)
        logger.setLevel(talk.NOTICE)
        for executor in executors:
            executor.submit(talk.say, "info is off", level=logging.INFO).result(PATIENCE)
            executor.submit(talk.say, "noticed", level=talk.NOTICE).result(PATIENCE)
        logger.setLevel(logging.DEBUG)
        for executor in executors:
            executor.submit(talk.say, "debug is on", level=logging.DEBUG).result(PATIENCE)
        logging.disable(logging.CRITICAL)
        for executor in executors:
            assert list(executor.map(talk.say, ["all is off"]))
    finally:
        logging.disable(logging.NOTSET)
        logger.setLevel(logging.NOTSET)
    for executor in executors:
        executor.submit(talk.say, "debug is off again", level=logging.DEBUG).result(PATIENCE)
    assert collector.texts == ["noticed"] * 2 + ["debug is on"] * 2
    assert {record.levelname for record in collector.records} == {"NOTICE", "DEBUG"}


@on_every_host
def test_each_record_comes_once_and_from_everywhere(pool: Make, collector: Collector, capfd: Any) -> None:
    """Handlers of loggers that a fork copies stay silent; threads' errors and loggers that do not propagate are heard."""
    own = Collector()
    deaf = logging.getLogger("tests.deaf")
    stream = logging.StreamHandler()
    deaf.addHandler(own)
    deaf.addHandler(stream)
    try:
        executor = pool(1)
        executor.submit(talk.say_through_deaf_logger, "deaf").result(PATIENCE)
        executor.submit(talk.configure_and_say, "configured").result(PATIENCE)
        executor.submit(talk.leave_an_error_in_a_thread).result(PATIENCE)
    finally:
        deaf.removeHandler(own)
        deaf.removeHandler(stream)
    assert own.texts == ["deaf"]
    assert collector.texts == ["deaf", "configured", "uncaught exception in thread doomed"]
    assert "ZeroDivisionError" in (collector.records[-1].exc_text or "")
    assert capfd.readouterr().err.count("deaf") == 1


@on_one_host
@pytest.mark.parametrize("timeout", [0.2, 0])
def test_nobody_waits_longer_for_handlers_than_allowed(
    pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collector: Collector, timeout: float
) -> None:
    """With a full queue and a handler that hangs a task goes on after log_timeout; what is dropped is counted."""
    monkeypatch.setattr("taskpool._engine.reports.BOUND", 20_000)
    executor = pool(1, log_timeout=timeout)
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    with blocking_handler(tmp_path / "release"), at_most(8):
        assert outcome(executor.submit(talk.say_many, "n", 5_000), PATIENCE)
        assert outcome(executor.submit(talk.say_many, "n", 100), PATIENCE)
    wait_until(lambda: any("were dropped" in text for text in collector.texts), 10, "the report")
    (report,) = [record for record in collector.records if "were dropped" in record.getMessage()]
    arrived = [text for text in collector.texts if text.startswith("n ")]
    assert report.args is not None
    assert len(arrived) + report.args[0] == 5_100  # type: ignore[index]
    assert arrived[:20] == [f"n {number}" for number in range(20)]
    executor.submit(talk.say, "after").result(PATIENCE)
    wait_until(lambda: "after" in collector.texts)


@on_one_host
def test_a_full_queue_loses_nothing_while_handlers_keep_up(
    pool: Make, monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    """The workers wait, and are read on."""
    monkeypatch.setattr("taskpool._engine.reports.BOUND", 5_000)
    executor = pool(2)
    futures = [executor.submit(talk.say_many, tag, 2_000) for tag in "ab"]
    assert all(outcome(future) for future in futures)
    for tag in "ab":
        assert [text for text in collector.texts if text[0] == tag] == [f"{tag} {number}" for number in range(2_000)]


@on_one_host
def test_a_handler_that_logs_and_waits_for_a_task(pool: Make, collector: Collector) -> None:
    """It may use the very executor: nobody waits for himself for longer than log_timeout."""
    executor = pool(1, log_timeout=0.5)

    class Asking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == "ask":
                answer = executor.submit(talk.say, "from the handler").result(PATIENCE)
                logging.getLogger("tests.other").warning("answered %s", answer > 0)

    handler = Asking()
    logging.getLogger("tests.talk").addHandler(handler)
    try:
        assert outcome(executor.submit(talk.say, "ask"))
        wait_until(lambda: len(collector.texts) == 3)
    finally:
        logging.getLogger("tests.talk").removeHandler(handler)
    assert set(collector.texts) == {"ask", "answered True", "from the handler"}


@on_one_host
def test_records_go_where_they_are_told_to(pool: Make, collector: Collector, tmp_path: Path) -> None:
    """A logger, handlers by their level, a file of JSON lines that several workers write, or nowhere."""
    own, other = Collector(), Collector()
    other.setLevel(logging.ERROR)
    logger = logging.getLogger("tests.ours")
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(own)
    executor = pool(1, logs=logger)
    executor.submit(talk.say, "one").result(PATIENCE)
    executor.submit(talk.say, "two", level=logging.INFO).result(PATIENCE)
    executor = pool(1, logs=[own, other])
    executor.submit(talk.say, "three").result(PATIENCE)
    executor.submit(talk.say_structured, "four", user="me").result(PATIENCE)
    assert own.texts == ["one", "three", "four bound='yes' user='me'"]
    assert other.texts == collector.texts == []
    path = tmp_path / "log.jsonl"
    with pool(2, logs=path) as executor:
        futures = [executor.submit(talk.say_many, tag * 3_000, 50) for tag in "ab"]
        assert all(map(outcome, futures))
        executor.submit(talk.say_with_traceback).result(PATIENCE)
        executor.submit(talk.say_structured, "event", parts=[1]).result(PATIENCE)
        executor.submit(talk.say_what_does_not_travel).result(PATIENCE)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for tag in "ab":
        mine = [entry["message"] for entry in found if entry["message"][0] == tag]
        assert mine == [f"{tag * 3_000} {number}" for number in range(50)]
    assert "TwoArguments" in found[100]["exception"]
    assert (found[100]["task"], found[100]["level"]) == ("say_with_traceback", "ERROR")
    assert found[101]["parts"] == [1]
    assert [entry["message"] for entry in found][-1] == "plain"
    assert collector.texts == []
    logger.removeHandler(own)
    executor = pool(1, logs="off")
    executor.submit(talk.say, "nowhere").result(PATIENCE)
    assert collector.texts == []


@pytest.mark.parametrize(
    ("logs", "error"), [("fwd", ValueError), (3, TypeError), ([], TypeError), ([3], TypeError), (None, TypeError)]
)
def test_bad_ways_for_records_are_refused(logs: Any, error: type[Exception]) -> None:
    """At the call."""
    with pytest.raises(error, match="logs"):
        taskpool.Executor(1, logs=logs)


@on_all
def test_caplog_and_capture_logs_see_records(pool: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Within their blocks, since all is handled when the result is there; each record names its task."""
    executor = pool(1)
    with caplog.at_level(logging.DEBUG):
        future = executor.options(name="greeting").submit(talk.say, "hello", level=logging.DEBUG)
        future.result(PATIENCE)
        (record,) = [record for record in caplog.records if record.name == "tests.talk"]
    assert record.getMessage() == "hello"
    assert (record.taskpool_task, record.taskpool_id) == ("greeting", future.task_id)  # type: ignore[attr-defined]
    assert (record.taskpool_attempt, bool(record.taskpool_worker)) == (1, True)  # type: ignore[attr-defined]
    assert (record.module, record.funcName) == ("talk", "say")
    with structlog.testing.capture_logs() as captured:
        executor.submit(talk.say_structured, "event", number=1).result(PATIENCE)
    assert [(event["event"], event["number"], event["log_level"]) for event in captured] == [("event", 1, "warning")]


@on_one_host
def test_structlog_events_keep_their_time_and_place(pool: Make) -> None:
    """A processor that stamps the time or the place gives those of the worker."""
    kept: list[dict[str, Any]] = []

    def keep(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
        kept.append(dict(event))
        raise structlog.DropEvent

    parameters = structlog.processors.CallsiteParameter
    adder = structlog.processors.CallsiteParameterAdder({parameters.FUNC_NAME, parameters.MODULE, parameters.PROCESS})
    structlog.configure(processors=[structlog.processors.TimeStamper(fmt="iso"), adder, keep])
    try:
        executor = pool(1)
        pid = executor.submit(talk.say_structured, "hello").result(PATIENCE)
    finally:
        structlog.reset_defaults()
    (event,) = kept
    assert (event["func_name"], event["module"], event["process"]) == ("say_structured", "talk", pid)
    assert event["timestamp"].endswith("Z")


@on_all
def test_context_travels_with_each_task(pool: Make) -> None:
    """What is bound in structlog, and chosen variables; what a task sets is gone with it."""
    executor = pool(1, context=[talk.request])

    def submit(text: str) -> list[Any]:
        structlog.contextvars.bind_contextvars(user=text)
        talk.request.set(text)
        with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as captured:
            found = executor.submit(talk.say_and_look, text).result(PATIENCE)
        assert [(event["event"], event["user"]) for event in captured] == [(text, text)]
        return found

    for text in ("first", "second"):
        found = contextvars.copy_context().run(submit, text)
        assert found == [{"user": text}, text]
    if executor._backend.capabilities.processes:
        assert executor.submit(talk.say_and_look, "third").result(PATIENCE) == [{}, "none"]
        assert [found[1] for found in executor.map(talk.say_and_look, "x")] == ["none"]


@pytest.mark.parametrize("context", ["request", 3, [3], [contextvars.ContextVar("nowhere")]])
def test_bad_context_is_refused(context: Any) -> None:
    """At the call."""
    with pytest.raises((TypeError, ValueError), match="context"):
        taskpool.Executor(1, context=context)


@on_hosts
def test_a_worker_that_logs_nothing_loads_nothing_for_it(backend: Backend, tmp_path: Path) -> None:
    """Neither structlog nor attrs, nor what only the parent needs."""
    code = """
from tests import talk
with executor(1) as pool:
    print(*sorted(pool.submit(talk.modules).result() & {"structlog", "attr", "attrs", "taskpool.logs", "json"}))
"""
    fork = backend.start == "fork"  # which copies what the parent has
    assert fork or run_main(code, backend, tmp_path).out.split() == []


# ---------------------------------------------------------------------------------------------- what tasks print


PRINTED = ["to stderr", "raw", "from a program", "from C", "half a line"]


@on_every_host
def test_what_a_task_prints_is_captured(pool: Make, capfd: Any) -> None:
    """By print, descriptors, programs and C code; of tasks that die, pass their limit, or are items of a map, too."""
    executor = pool(1, output="capture", grace=0.1)
    futures = [
        executor.submit(talk.print_much, "fine", os.getpid),
        executor.submit(talk.print_much, "dead", tasks.kill_itself),
        executor.options(task_timeout=1).submit(talk.print_much, "late", tasks.sleep_for_ever),
        executor.submit(talk.print_much, "failed", tasks.generator),
        executor.submit(os.getpid),
    ]
    for future in futures:
        outcome(future)
    for future, text in zip(futures[:4], ("fine", "dead", "late", "failed"), strict=True):
        assert future.output.splitlines() == [text, *PRINTED]
    assert futures[4].output == ""
    found = executor.outcomes(talk.print_line, ["a", "b", "c"], ordered=True)
    assert [(one.value, one.output) for one in found] == [("a", "a\n"), ("b", "b\n"), ("c", "c\n")]
    large = executor.submit(print, "x" * 3_000_000 + "end")
    large.result(PATIENCE)
    assert large.output.endswith("xend\n")
    assert large.output.startswith("[the beginning was left out]\n")
    assert len(large.output) < 1_100_000
    assert capfd.readouterr() == ("", "")


@on_hosts
def test_what_a_task_prints_becomes_records(pool: Make, collector: Collector) -> None:
    """Line by line, tagged with the task, before its future resolves; while it runs, too."""
    executor = pool(1, output="forward", retry=2)
    future = executor.options(name="dead").submit(talk.print_much, "first", tasks.kill_itself)
    error = outcome(future)
    mine = [record for record in collector.records if record.name == "taskpool.output"]
    assert [record.getMessage() for record in mine] == ["first", *PRINTED] * 2
    assert {record.taskpool_id for record in mine} == {future.task_id}  # type: ignore[attr-defined]
    assert [record.taskpool_attempt for record in mine] == [1] * 6 + [2] * 6  # type: ignore[attr-defined]
    assert isinstance(error, taskpool.WorkerCrashedError)
    assert error.log[-1] == "printed: half a line"
    collector.records.clear()
    running = executor.submit(talk.print_much, "live", tasks.spin, 60)
    wait_until(lambda: "from C" in collector.texts)
    assert not running.done()
    running.cancel()


@pytest.mark.parametrize("backend", ["thread", "serial"])
def test_what_cannot_be_done_without_processes_is_refused(backend: str) -> None:
    """By name; "inherit" and "off" are what holds there."""
    for options in ({"output": "capture"}, {"logs": Collector()}):
        with pytest.raises(taskpool.UnsupportedError, match='backend="process" can'):
            taskpool.Executor(1, backend=backend, **options)
    taskpool.Executor(1, backend=backend, output="inherit", logs="off").shutdown()
    for options in ({"output": "fwd"}, {"output": 3}, {"output": "forward", "logs": "off"}):
        with pytest.raises((TypeError, ValueError), match="output"):
            taskpool.Executor(1, **options)


# ---------------------------------------------------------------------------------------------- odd programs


@on_hosts
def test_what_a_tasks_module_configures_is_the_parents(
    pool: Make, collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handlers, filters and levels that the module of a task has set as it was imported are not set again in a worker."""
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    monkeypatch.syspath_prepend(tmp_path)
    import talkative  # type: ignore[import-not-found]

    talkative.log.setLevel(logging.DEBUG)
    talkative.late.setLevel(logging.DEBUG)
    talkative.late.disabled = False
    try:
        executor = pool(1)
        executor.submit(talkative.work, 1).result(20)
        assert list(executor.map(talkative.work, [2])) == [2]
        bounded(executor.shutdown)
    finally:
        talkative.undo()
        del sys.modules["talkative"]
    expected = ["late 1", "filtered one 1", "late 2", "filtered one 2"]
    assert lines(tmp_path / "written") == collector.texts == expected


TALKATIVE = """
import logging
from pathlib import Path

def change(record):
    record.msg = f"filtered {record.msg}"
    return True

log, late = logging.getLogger("talkative"), logging.getLogger("talkative.late")
log.setLevel(logging.INFO)
log.addFilter(change)
log.addHandler(logging.FileHandler(Path(__file__).with_name("written")))
late.disabled = True  # as logging.config does with those that it is not told of

def work(number):
    late.debug("late %d", number)
    log.debug("one %d", number)
    return number

def undo():
    (handler,) = log.handlers
    log.removeHandler(handler)
    handler.close()
    log.filters.clear()
    log.setLevel(0)
    late.setLevel(0)
"""


class Name(enum.StrEnum):
    """Names of loggers."""

    ODD = "tests.odd"


class Level(enum.IntEnum):
    """Levels."""

    NOTICE = 25


@pytest.mark.parametrize("logs", ["forward", "off"])
def test_enumerations_as_names_and_levels(collector: Collector, monkeypatch: pytest.MonkeyPatch, logs: str) -> None:
    """Members of enumerations serve as levels, names of levels and names of loggers, in the program and in its tasks."""
    monkeypatch.setattr(logging, "_levelToName", {**logging._levelToName, Level.NOTICE: Level.NOTICE.name})
    logger = logging.getLogger(Name.ODD)
    logger.setLevel(Level.NOTICE)
    try:
        with taskpool.Executor(1, logs=logs) as executor:
            executor.submit(say_with_enumerations).result(20)
    finally:
        logger.setLevel(logging.NOTSET)
    found = [(*map(type, (record.name, record.levelno)), *shown(record)) for record in collector.records]
    assert found == ([(str, int, "tests.odd", 25, "odd 25", 25, "tests.odd", 0.5)] if logs == "forward" else [])


def say_with_enumerations() -> None:
    """Log with a level, a name and values that are of classes of their own."""

    class Half(float):
        pass

    extra = {"number": Level.NOTICE, "text": Name.ODD, "half": Half(0.5)}
    logging.getLogger(Name.ODD).log(Level.NOTICE, "odd %d", Level.NOTICE, extra=extra)


def shown(record: Any) -> tuple[Any, ...]:
    """What such a record shows."""
    return record.name, record.levelno, record.getMessage(), record.number, record.text, record.half


@pytest.mark.parametrize("kind", [list, dict])
def test_what_lies_in_itself(kind: type) -> None:
    """It is looked into once, not once for each way there is through it."""
    value: Any = kind()
    for number in range(20):
        value.append(value) if isinstance(value, list) else value.update({number: value})
    assert len(bounded(lambda: plain(value), 5)) == 20


def test_a_factory_sees_what_records_are_about(collector: Collector) -> None:
    """What it makes of name and message is in the records of workers, too, and what a worker's own made there stays."""
    before = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        record.last = record.name.rpartition(".")[2]
        record.loud = record.getMessage().upper()
        return record

    logging.setLogRecordFactory(factory)
    try:
        for options in ({}, {"mp_context": "fork"}):
            with taskpool.Executor(1, **options) as executor:  # type: ignore[arg-type]
                executor.submit(talk.say, "hello %d", 5).result(20)
    finally:
        logging.setLogRecordFactory(before)
    assert [(record.last, record.loud) for record in collector.records] == [("talk", "HELLO 5")] * 2  # type: ignore[attr-defined]


def test_json_of_what_json_has_not(tmp_path: Path) -> None:
    """Keys and numbers that JSON does not know cost no record, and what is written is JSON."""
    with taskpool.Executor(1, logs=tmp_path / "log") as executor:
        executor.submit(talk.say, "odd", keys={b"k": 1}, number=float("nan"), size=5).result(20)

    def refuse(text: str) -> None:
        raise ValueError(text)

    (found,) = [json.loads(line, parse_constant=refuse) for line in lines(tmp_path / "log")]
    assert (found["keys"], found["number"], found["size"]) == ("{b'k': 1}", "nan", 5)


def test_a_path_that_cannot_be_a_file(tmp_path: Path) -> None:
    """The executor says so, not each record."""
    for path in (tmp_path, tmp_path / "nowhere" / "log"):
        with pytest.raises(ValueError, match="logs="):
            taskpool.Executor(1, logs=path)


def test_processors_in_a_tuple() -> None:
    """An iterable of any kind holds structlog's processors: a worker that is forked with it starts, and tasks log."""
    kept: list[Any] = []

    def keep(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
        kept.append(event["event"])
        raise structlog.DropEvent

    structlog.configure(processors=(keep,))
    try:
        with taskpool.Executor(1, mp_context="fork") as executor:
            executor.submit(talk.say_structured, "hello").result(20)
    finally:
        structlog.reset_defaults()
    assert kept == ["hello"]


def test_a_descriptor_of_its_own_is_left_alone(tmp_path: Path) -> None:
    """A task may make descriptor 1 a file of its own: taskpool writes nothing into it, and knows what the next prints."""
    with taskpool.Executor(1, output="capture") as executor:
        executor.submit(open_as_output, tmp_path / "own").result(20)
        future = executor.submit(os.write, 2, b"after")
        assert (future.result(20), future.output) == (5, "after")
    assert (tmp_path / "own").read_bytes() == b"mine"


def open_as_output(path: Path) -> None:
    """Open a file in the place of standard output, and leave it there."""
    os.close(1)
    assert os.open(path, os.O_WRONLY | os.O_CREAT) == 1
    os.write(1, b"mine")


STUCK_AT_EXIT = """
import logging
from tests import talk
class Stuck(logging.Handler):
    def emit(self, record):
        threading.Event().wait()
logging.getLogger("tests.talk").addHandler(Stuck())
logging.getLogger("tests.talk").setLevel("INFO")
global pool
pool = executor(1, log_timeout=float(args[0]), shutdown_timeout=float(args[1]))
future = pool.submit(talk.say_many, "n", 3)
if args[0] == "0.3":
    future.result()
"""


@on_one_host
@pytest.mark.parametrize(("log_timeout", "shutdown_timeout"), [("0.3", "20"), ("60", "0.3")])
def test_an_interpreter_ends_whose_handler_does_not_come_back(
    backend: Backend, tmp_path: Path, log_timeout: str, shutdown_timeout: str
) -> None:
    """`logging` itself would wait for that handler's lock, for ever, on its way out."""
    ended = run_main(STUCK_AT_EXIT, backend, tmp_path, log_timeout, shutdown_timeout, timeout=10)
    assert ("is stopped" in ended.err) == (log_timeout == "60"), ended


@on_one_host
def test_what_a_task_binds_is_gone_with_it(pool: Make) -> None:
    """Also where the program itself has never bound anything; what the initializer has bound stays."""
    executor = pool(1, initializer=bind, initargs=("worker",))
    assert executor.submit(bind, "call").result(20) == {"worker": 1}
    assert executor.submit(bind, "call").result(20) == {"worker": 1}
    assert list(executor.map(bind, ["one", "two", "three"], chunksize=3)) == [{"worker": 1}] * 3
    assert executor.submit(bind, "call").result(20) == {"worker": 1}


def bind(name: str) -> dict[str, Any]:
    """Bind a name; return what was bound before."""
    before = structlog.contextvars.get_contextvars()
    structlog.contextvars.bind_contextvars(**{name: 1})
    return before
