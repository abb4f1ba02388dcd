"""Worker logs: what workers log comes out of the parent's own handlers, and survives the worker.

In the worker a handler at the root writes each record to the worker's channel at once; nothing is buffered there. In
the parent one thread hands each to the logger of the same name, as if it had been logged here; a handler that raises or
blocks harms neither the dispatcher nor other records.

The only file that knows structlog. What a task logs through structlog takes the same way, and runs through the
parent's structlog configuration.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

Record = dict[str, Any]
Send = Callable[[Record], None]

MAX_DEPTH = 8  # how deep containers in `extra` travel as such
STRUCTLOG = "structlog event"  # marks a record that came through structlog, and holds its event dict

# In the worker


def forward_from_worker(send: Send, worker: str, levels: dict[str, int]) -> None:
    """Send everything that this process logs to the parent.

    Args:
        send: Writes one record to the parent; when it returns the record is safe.
        worker: This worker's name.
        levels: The parent's logger levels by name ("" is the root), so that what the parent would not show is not sent.
    """
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)
    logging.getLogger().handlers[:] = [ForwardHandler(send, worker)]  # inherited ones belong to the parent
    logging.lastResort = None
    logging.captureWarnings(capture=True)
    if "structlog" in sys.modules:
        _forward_structlog(sys.modules["structlog"], send, worker)
    else:
        sys.meta_path.insert(0, _StructlogFinder(send, worker))


class ForwardHandler(logging.Handler):
    """Sends records to the parent, as plain data: no user code runs there because of a log record."""

    def __init__(self, send: Send, worker: str) -> None:
        super().__init__()
        self._send = send
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; one that cannot be made plain is reported as logging reports such things."""
        try:
            fields = dict(vars(record))
            fields["msg"], fields["args"] = record.getMessage(), None
            if record.exc_info:
                fields["exc_text"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
                fields["exc_info"] = None
            fields["taskpool_worker"] = self._worker
            self._send({name: _plain(value) for name, value in fields.items()})
        except OSError:  # the channel is gone, and with it this process's reason to be
            return
        except Exception:
            self.handleError(record)


def _plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return `value` if it is plain data, and its repr if it is anything else."""
    if value is None or type(value) in (str, int, float, bool, bytes):
        return value
    if depth and type(value) is dict:
        return {_plain(key, 0): _plain(item, depth - 1) for key, item in value.items()}
    if depth and type(value) in (list, tuple):
        return type(value)(_plain(item, depth - 1) for item in value)
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__} whose repr raised {type(error).__name__}>"


class _StructlogFinder:
    """A finder of the import system that configures structlog in the worker at the moment a task imports it; a task that does not, does not pay for it."""

    def __init__(self, send: Send, worker: str) -> None:
        self._send = send
        self._worker = worker

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the other finders find structlog, and configure it once it is loaded."""
        if fullname != "structlog":
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec("structlog")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _forward_structlog(module, self._send, self._worker)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _forward_structlog(structlog: ModuleType, send: Send, worker: str) -> None:
    def emit(logger: Any, method: str, event: Record) -> Record:
        fields: Record = {STRUCTLOG: {key: _plain(value) for key, value in event.items()}, "method": method}
        fields["name"] = getattr(logger, "name", None)
        fields["taskpool_worker"] = worker
        fields["process"] = _pid()
        send(fields)
        raise structlog.DropEvent

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            emit,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        logger_factory=_NamedLogger,
        cache_logger_on_first_use=False,
    )


def _pid() -> int:
    import os

    return os.getpid()


class _NamedLogger:
    """What structlog wraps in a worker: it only carries the name that `get_logger(name)` was given."""

    def __init__(self, *args: Any) -> None:
        self.name = str(args[0]) if args else None

    def msg(self, *_args: Any, **_fields: Any) -> None:
        """Do nothing: the last processor has sent the event."""

    debug = info = warning = warn = error = critical = fatal = exception = failure = log = msg


# In the parent


def current_levels() -> dict[str, int]:
    """Return the levels that are set in this process, by logger name; "" is the root."""
    root = logging.getLogger()
    levels = {"": root.level}
    for name, logger in list(root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET:
            levels[name] = logger.level
    return levels


def handle(fields: Record, task: str) -> None:
    """Hand a worker's record, of the task named `task`, to the logger of the same name."""
    if STRUCTLOG in fields:
        _handle_structlog(fields, task)
        return
    record = logging.makeLogRecord({**fields, "taskpool_task": task})
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _handle_structlog(fields: Record, task: str) -> None:
    import structlog

    event = dict(fields[STRUCTLOG])
    text = event.pop("event", None)
    name = fields["name"]
    logger = structlog.get_logger(*([name] if name else []))
    context = {"task": task, "worker": fields["taskpool_worker"], "pid": fields["process"]}
    getattr(logger, fields["method"], logger.info)(text, **{**context, **event})
