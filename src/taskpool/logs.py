"""Worker logs: what workers log comes out of the parent's own handlers, and survives the worker.

In the worker each record is written to the channel in the call that logs it (`_engine/forwarding.py`). In the parent
one thread (`_engine/reports.py`) hands one after the other to a sink, which is what this file has: the loggers of the
same names, as if it had been logged here; a logger or handlers of one's own; or a file of JSON lines.

The only file that knows structlog: events of structlog run through the parent's processors.
"""

from __future__ import annotations

import contextlib
import logging
import marshal
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

from taskpool._current import running
from taskpool._logdata import OUTPUT, RECORD

Record: TypeAlias = logging.LogRecord
LogsOption: TypeAlias = "str | os.PathLike[str] | logging.Logger | logging.Handler | Iterable[logging.Handler]"

OUTPUT_LOGGER = "taskpool.output"  # of what tasks print


class Source:
    """Where a record came from: task and worker."""

    def __init__(self, task: str, task_id: str, attempt: int, worker: str, pid: int | None) -> None:
        self.task = task
        self.id = task_id
        self.attempt = attempt
        self.worker = worker
        self.pid = pid
        self.attributes: dict[str, Any] = {  # of each record
            "process": pid,
            "taskpool_task": task,
            "taskpool_id": task_id,
            "taskpool_attempt": attempt,
            "taskpool_worker": worker,
        }


class Sink:
    """Where records of workers go. Called by one thread only."""

    def take(self, source: Source, data: bytes) -> None:
        """Take a record as it travels. Runs user code, and may raise anything."""
        fields = marshal.loads(data)
        if fields[0] == RECORD:
            self.log(make_record(source, fields))
        elif fields[0] == OUTPUT:
            self.log(output_record(source, fields[1]))
        else:
            self.log_event(source, Event(*fields[1:]))

    def log(self, record: Record) -> None:
        """Take a record of standard logging."""
        raise NotImplementedError

    def log_event(self, source: Source, event: Event) -> None:
        """Take an event of structlog: as a record of standard logging, where there is no structlog to run it through."""
        self.log(_record_of_event(source, event))

    def close(self) -> None:
        """No record comes any more."""

    def __repr__(self) -> str:
        return f"<records {type(self).__name__}>"


# Records of standard logging


Site: TypeAlias = tuple[str, int, str, str, int, str]  # name, level, its name, path, line, function


def make_record(source: Source, fields: tuple[Any, ...]) -> Record:
    """Return the record that was logged in a worker, with what tells where that was."""
    _, site, created, thread, thread_name, process_name, message, args, error, stack, task_name, extra = fields
    attributes = _attributes_of(site).copy()
    attributes.update(source.attributes)
    attributes["msg"] = message
    attributes["args"] = args or ()
    attributes["exc_text"] = error
    attributes["stack_info"] = stack
    attributes["created"] = created
    attributes["msecs"] = (created - int(created)) * 1000 // 1
    attributes["relativeCreated"] = (created - _STARTED) * 1000
    attributes["thread"] = thread
    attributes["threadName"] = thread_name
    attributes["processName"] = process_name
    attributes["taskName"] = task_name
    if extra is not None:
        attributes.update(extra)
    return _as_record(attributes)


def _as_record(attributes: dict[str, Any]) -> Record:
    factory = logging.getLogRecordFactory()
    if getattr(factory, "behind", factory) is not logging.LogRecord:  # it may add what formatters here rely on
        names = "name", "levelno", "pathname", "lineno", "msg", "args", "exc_info", "funcName", "stack_info"
        record = factory(*(attributes[name] for name in names))
        record.__dict__.update(attributes)
        return record
    record = _new(logging.LogRecord)
    record.__dict__ = attributes
    return record


def _attributes_of(site: Site) -> dict[str, Any]:
    """Return what all records of a line have."""
    attributes = _sites.get(site)
    if attributes is None:
        if len(_sites) >= MOST_SITES:
            _sites.clear()
        name, level, level_name, path, line, function = site
        attributes = _sites[site] = {
            "name": name,
            "levelno": level,
            "levelname": logging.getLevelName(level) if level_name.startswith("Level ") else level_name,
            "pathname": path,
            **_names_of(path),
            "lineno": line,
            "funcName": function,
            "exc_info": None,
        }
    return attributes


MOST_SITES = 4096
_sites: dict[Site, dict[str, Any]] = {}

_new: Callable[[type[Record]], Record] = logging.LogRecord.__new__
_first = logging.LogRecord("", 0, "", 0, "", (), None)
_STARTED = _first.created - _first.relativeCreated / 1000  # when logging was loaded here


def _names_of(path: str) -> dict[str, str]:
    file = os.path.basename(path)  # noqa: PTH119  (as logging has it, also for what is no path)
    return {"filename": file, "module": os.path.splitext(file)[0]}  # noqa: PTH122


def output_record(source: Source, line: str) -> Record:
    """Return the record of a line that a task has printed."""
    record = logging.LogRecord(OUTPUT_LOGGER, logging.INFO, "", 0, "%s", (line,), None)
    record.__dict__.update(source.attributes, processName=source.worker)
    return record


# Tasks that run in this process


class MarkingFactory:
    """Makes the records of this process, and says of those that tasks log from which they came."""

    def __init__(self, behind: Callable[..., Record]) -> None:
        self.behind = behind

    def __call__(self, *args: Any, **kwargs: Any) -> Record:
        """Make a record."""
        record = self.behind(*args, **kwargs)
        task = running.get()
        if task is not None:
            source = Source(task.name, task.id, task.attempt, threading.current_thread().name, record.process)
            record.__dict__.update(source.attributes)
        return record


def mark_here() -> None:
    """Have records say from which task they came, where tasks run in threads of this process."""
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, MarkingFactory):
        logging.setLogRecordFactory(MarkingFactory(factory))


# Events of structlog


class Event(NamedTuple):
    """An event as it came from a worker."""

    name: str | None
    method: str
    path: str
    line: int
    function: str
    created: float
    thread: int | None
    thread_name: str
    fields: dict[str, Any]


def _record_of_event(source: Source, event: Event) -> Record:
    fields = dict(event.fields)
    text = [str(fields.pop("event", ""))]
    error = fields.pop("exception", None)
    text += [f"{key}={value!r}" for key, value in fields.items()]
    level = _level_of(event.method)
    extra = {f"structlog_{key}" if key in _TAKEN else key: value for key, value in fields.items()}
    site = event.name or "structlog", level, logging.getLevelName(level), event.path, event.line, event.function
    place = event.created, event.thread, event.thread_name, source.worker
    return make_record(source, (RECORD, site, *place, " ".join(text), None, error, None, None, extra))


_TAKEN = frozenset(vars(_first)) | {"message", "asctime"}
_METHODS = {"warn": "WARNING", "exception": "ERROR", "failure": "ERROR", "fatal": "CRITICAL"}


def _level_of(method: str) -> int:
    return logging.getLevelNamesMapping().get(_METHODS.get(method, method.upper()), logging.INFO)


def _run_through_structlog(source: Source, event: Event) -> None:
    """Run an event through this process's processors, as if it had been logged here, then and by that line."""
    import structlog

    context = {
        "task": source.task,
        "task_id": source.id,
        "attempt": source.attempt,
        "worker": source.worker,
        "pid": source.pid,
    }
    fields = dict(event.fields)
    text = fields.pop("event", None)
    processors = [_as_it_was(each, source, event) for each in structlog.get_config()["processors"]]
    logger = structlog.wrap_logger(
        None,
        processors=processors,
        cache_logger_on_first_use=False,
        logger_factory_args=() if event.name is None else (event.name,),
    )
    getattr(logger, event.method, logger.info)(text, **{**context, **fields})


def _as_it_was(processor: Any, source: Source, event: Event) -> Any:
    """Return the processor, with the time and the place that it would have found in the worker."""
    from structlog.processors import CallsiteParameterAdder, TimeStamper

    if type(processor) is TimeStamper:
        return lambda _logger, _method, fields: {**fields, processor.key: _stamp(processor, event.created)}
    if isinstance(processor, CallsiteParameterAdder):
        site = {
            "pathname": event.path,
            **_names_of(event.path),
            "func_name": event.function,
            "lineno": event.line,
            "thread": event.thread,
            "thread_name": event.thread_name,
            "process": source.pid,
            "process_name": source.worker,
        }

        def place(logger: Any, method: str, fields: Any) -> Any:
            given = dict(fields)
            found = processor(logger, method, fields)
            return {**found, **{key: site[key] for key in found if key in site and key not in given}}

        return place
    return processor


def _stamp(stamper: Any, created: float) -> float | str:
    from datetime import UTC, datetime

    if stamper.fmt is None:
        return created
    moment = datetime.fromtimestamp(created, UTC if stamper.utc else None)
    if str(stamper.fmt).upper() == "ISO":
        return moment.isoformat().replace("+00:00", "Z") if stamper.utc else moment.isoformat()
    return moment.strftime(stamper.fmt)


# Sinks


class Forward(Sink):
    """To the logger of the same name, as if it had been logged here."""

    def log(self, record: Record) -> None:
        """Hand it over, if that logger is enabled for it."""
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)

    def log_event(self, source: Source, event: Event) -> None:
        """Run it through the processors that are configured here."""
        _run_through_structlog(source, event)


class ToLogger(Sink):
    """To one logger, whatever names the records have."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def log(self, record: Record) -> None:
        """Hand it over, if the logger is enabled for it."""
        if self._logger.isEnabledFor(record.levelno):
            self._logger.handle(record)


class ToHandlers(Sink):
    """To these handlers, by the levels that they have."""

    def __init__(self, handlers: Iterable[logging.Handler]) -> None:
        self._handlers = list(handlers)

    def log(self, record: Record) -> None:
        """Hand it to each; one that raises costs no other."""
        errors = []
        for handler in self._handlers:
            if record.levelno >= handler.level:
                try:
                    handler.handle(record)
                except BaseException as error:
                    errors.append(error)
        if errors:
            raise errors[0]


class ToFile(Sink):
    """To a file, as JSON lines: one object a line, each written at once, behind what other processes write there."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(path)  # noqa: PTH100  (the program may change its directory)
        folder = os.path.dirname(self._path)  # noqa: PTH120
        if not os.path.isdir(folder) or os.path.isdir(self._path):  # noqa: PTH112
            raise ValueError(f"logs={path!r} cannot be a file: there is no folder {folder}, or it is one itself")
        self._fd = -1

    def log(self, record: Record) -> None:
        """Write a line."""
        import json

        fields = _as_json(record)
        try:
            text = json.dumps(fields, ensure_ascii=False, allow_nan=False, default=str)
        except (TypeError, ValueError):  # JSON has no such keys, or no such numbers
            text = json.dumps({key: _for_json(value) for key, value in fields.items()}, ensure_ascii=False)
        data = memoryview(f"{text}\n".encode(errors="backslashreplace"))
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        while data:  # in one piece, unless the disk is full
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def _for_json(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int) else repr(value)


def _as_json(record: Record) -> dict[str, Any]:
    from datetime import UTC, datetime

    fields = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
        "level": record.levelname,
        "logger": record.name,
        "message": record.getMessage(),
        "module": record.module,
        "function": record.funcName,
        "line": record.lineno,
        "path": record.pathname,
        "task": getattr(record, "taskpool_task", ""),
        "id": getattr(record, "taskpool_id", ""),
        "attempt": getattr(record, "taskpool_attempt", 0),
        "worker": getattr(record, "taskpool_worker", ""),
        "pid": record.process,
        "thread": record.threadName,
    }
    if record.exc_text:
        fields["exception"] = record.exc_text
    if record.stack_info:
        fields["stack"] = record.stack_info
    for key, value in vars(record).items():
        if key not in _TAKEN and not key.startswith("taskpool_"):
            fields.setdefault(key, value)
    return fields


def leave_out_stuck_handlers() -> None:
    """Have the interpreter end without handlers that do not come back: `logging.shutdown` would wait for their locks."""
    handlers = logging._handlerList  # type: ignore[attr-defined]  # what it goes through; there is no public way
    handlers[:] = [reference for reference in handlers if not _is_stuck(reference())]


def _is_stuck(handler: logging.Handler | None) -> bool:
    lock = None if handler is None else handler.lock
    if lock is None:
        return False
    with contextlib.suppress(TypeError):  # a lock of another kind
        if not lock.acquire(timeout=STUCK):
            return True
        lock.release()
    return False


STUCK = 0.1  # seconds that each handler is given then


def sink_for(logs: Any) -> Sink | None:
    """Return where records go by what `Executor(logs=...)` was given; None is nowhere: workers are left alone.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is a word that means nothing, or a path that cannot be a file's.
    """
    if isinstance(logs, str) and logs in ("forward", "off"):
        return Forward() if logs == "forward" else None
    if isinstance(logs, logging.Logger):
        return ToLogger(logs)
    if isinstance(logs, logging.Handler):
        return ToHandlers([logs])
    if isinstance(logs, os.PathLike):
        return ToFile(os.fspath(logs))
    if isinstance(logs, str):
        return ToFile(_checked_path(logs))
    if isinstance(logs, Iterable) and not isinstance(logs, bytes):
        handlers = list(logs)
        if handlers and all(isinstance(handler, logging.Handler) for handler in handlers):
            return ToHandlers(handlers)
    raise TypeError(f'logs must be "forward", "off", a logger, handlers, or the path of a file, not {logs!r}')


def _checked_path(text: str) -> str:
    """Return a path; a bare word is more likely one that was misspelt."""
    if not text or not (os.sep in text or "." in text):
        raise ValueError(
            f'logs={text!r} is neither "forward" nor "off"; a path has a "/" or a "." in it, or is a pathlib.Path'
        )
    return text


def render(data: bytes) -> str:
    """Return a record as a short line, for the report of a crash. Runs no user code."""
    fields = marshal.loads(data)
    if fields[0] == OUTPUT:
        return f"printed: {fields[1]}"[:500]
    if fields[0] == RECORD:
        (name, _, level, *_), message, args = fields[1], fields[6], fields[7]
        return f"{level} {name}: {message % args if args else message}"[:500]
    event = Event(*fields[1:])
    values = "".join(f" {key}={value!r}" for key, value in event.fields.items() if key != "event")
    return f"{event.method.upper()} {event.name or 'structlog'}: {event.fields.get('event')}{values}"[:500]
