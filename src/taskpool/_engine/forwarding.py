"""In the worker: everything that is logged here goes to the parent, and nothing of it stays behind.

Each record is written to the worker's channel at once, in the call that logged it: when that returns the kernel has
it, whatever happens to this process. It travels as plain data, so that no user code runs in the parent because of it.

Records are caught where a logger hands them to handlers. So a logger that does not propagate is heard, too, and what
handlers there are makes no difference; those that a task adds itself are called as well. What was there before the
worker (handlers and filters that a fork copied, or that the main module made when it was imported again) belongs to the
parent, which has it, and is taken off here. What modules configure that are imported because a task is unpickled is the
parent's as well, where the task was pickled by their names; it is ignored here.
"""

from __future__ import annotations

import contextlib
import logging
import marshal
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from taskpool import _carrier
from taskpool._logdata import EVENT, RECORD, plain

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

Send = Callable[[bytes], None]

_SCALARS = frozenset({str, int, float, bool, type(None)})
_fields = vars(logging.LogRecord("", 0, "", 0, "", (), None))  # not those that a factory of the program's adds
_STANDARD = frozenset(_fields) | {"message", "asctime"}
_COUNT = len(_fields)

_default_formatter = logging.Formatter()
_call_handlers = logging.Logger.callHandlers


def forward(send: Send, is_loading: Callable[[], bool]) -> None:
    """Send everything that this process logs from now on to the parent.

    Args:
        send: Writes one record to the parent; when it returns the record is safe.
        is_loading: Whether the calling thread is unpickling a task.
    """
    _take_off_inherited()
    for name in ("addHandler", "addFilter", "setLevel"):
        setattr(logging.Logger, name, _unless(is_loading, getattr(logging.Logger, name)))
    logging.Logger.disabled = _Disabled(is_loading)  # type: ignore[assignment]

    def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the channel is gone, and with it this process's reason to be
            send(_dumps(record))
        _call_handlers(logger, record)

    logging.Logger.callHandlers = call_handlers  # type: ignore[method-assign, assignment]
    logging.getLogger().addHandler(_Placeholder())
    logging.lastResort = _Placeholder()
    logging.captureWarnings(capture=True)
    _report_uncaught()
    if "structlog" in sys.modules:
        _forward_structlog(sys.modules["structlog"], send)
    else:
        sys.meta_path.insert(0, _StructlogFinder(send))


class _Placeholder(logging.NullHandler):
    """Stands at the root, so that `basicConfig` in a module that a task imports finds that all is set up; and behind all."""


def _take_off_inherited() -> None:
    root = logging.getLogger()
    for logger in [root, *root.manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):
            logger.handlers[:], logger.filters[:], logger.disabled = [], [], False


def _unless(is_loading: Callable[[], bool], method: Callable[..., None]) -> Callable[..., None]:
    kept = []  # a handler's file that is collected open brings a warning

    def method_unless_loading(logger: logging.Logger, setting: Any) -> None:
        if is_loading():
            kept.append(setting)
        else:
            method(logger, setting)

    return method_unless_loading


class _Disabled:
    """The setter of that attribute, which `logging.config` sets without a call. Reading it is as quick as ever."""

    def __init__(self, is_loading: Callable[[], bool]) -> None:
        self._is_loading = is_loading

    def __set__(self, logger: logging.Logger, disabled: bool) -> None:  # noqa: FBT001
        if "disabled" not in vars(logger) or not self._is_loading():
            vars(logger)["disabled"] = disabled


def _report_uncaught() -> None:
    """Log what ends a thread, and what cannot be raised anywhere. A hook that a fork copied is the parent's."""
    threading.excepthook = _log_thread_error
    sys.unraisablehook = _log_unraisable


def _log_thread_error(args: threading.ExceptHookArgs, /) -> None:
    if not issubclass(args.exc_type, SystemExit):
        name = args.thread.name if args.thread is not None else "?"
        error = args.exc_value if args.exc_value is not None else args.exc_type()
        logging.getLogger("taskpool").error("uncaught exception in thread %s", name, exc_info=error)


def _log_unraisable(args: Any, /) -> None:
    what = args.err_msg or "exception ignored in"
    text = f"{what}: {plain(args.object, 0)}"
    logging.getLogger("taskpool").error("%s", text, exc_info=args.exc_value)


# Standard logging


def _dumps(record: logging.LogRecord) -> bytes:
    """Return a record as plain data; one that cannot be made into text says so in its text."""
    fields = vars(record)
    message, args = record.msg, record.args
    if not _is_plain(message, args):
        message, args = _text_of(record), None
    error = record.exc_text
    if record.exc_info and not error:
        error = _format_error(record.exc_info)
    extra = None
    if len(fields) > _COUNT:
        extra = {name: plain(value) for name, value in fields.items() if name not in _STANDARD}
        if record.process != os.getpid():  # of a worker of this worker's
            extra["process"] = record.process
    site: Any = record.name, record.levelno, record.levelname, record.pathname, record.lineno, record.funcName
    rest: Any = (
        record.created,
        record.thread,
        record.threadName,
        record.processName,
        message,
        args or None,
        error,
        record.stack_info,
        getattr(record, "taskName", None),
        extra,
    )
    try:
        return marshal.dumps((RECORD, site, *rest))
    except ValueError:  # some field is of a class of its own: an enumeration's member as the name, or by a filter
        return marshal.dumps((RECORD, tuple(map(_bare, site)), *plain(rest)))


def _bare(value: Any) -> Any:
    """Return a name as the text that loggers are found by, whatever it shows."""
    return str.__str__(value) if isinstance(value, str) else plain(value)


def _is_plain(message: Any, args: Any) -> bool:
    """Whether these travel as they are: nothing in them changes any more, and they make a text."""
    if type(message) is not str or type(args) is not tuple or not _SCALARS.issuperset(map(type, args)):
        return False
    try:
        return not args or message % args is not None
    except (TypeError, ValueError):
        return False


def _text_of(record: logging.LogRecord) -> str:
    try:
        return str.__str__(record.getMessage())
    except Exception as error:
        return f"{plain(record.msg, 0)} % {plain(record.args, 0)} <{type(error).__name__}: it cannot be formatted>"


def _format_error(exc_info: Any) -> str:
    try:
        return _default_formatter.formatException(exc_info)
    except Exception as error:
        return f"<{type(error).__name__}: the traceback cannot be formatted>"


# structlog


class _StructlogFinder:
    """A finder of the import system that configures structlog at the moment a task imports it; others do not pay for it."""

    def __init__(self, send: Send) -> None:
        self._send = send

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
                _forward_structlog(module, self._send)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _forward_structlog(structlog: Any, send: Send) -> None:
    def emit(logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
        frame = _caller()
        site = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name) if frame is not None else ("", 0, "")
        name = getattr(logger, "name", None)
        thread = threading.current_thread()
        fields = {plain(key, 0): plain(value) for key, value in event.items()}
        data = (EVENT, plain(name), method, *site, time.time(), thread.ident, thread.name, fields)
        with contextlib.suppress(OSError):  # as above
            send(marshal.dumps(data))
        raise structlog.DropEvent

    processors = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        emit,
    ]
    kept = structlog.get_config()["processors"]
    if isinstance(kept, list):  # in place, too: loggers that a fork copied may have kept the very list
        kept[:] = processors
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        logger_factory=_NamedLogger,
        cache_logger_on_first_use=False,
    )
    # What a module of the program configures as it is imported was configured in the parent, too, and holds there.
    structlog.configure = structlog.configure_once = _leave_as_it_is
    _carrier.bind_here()


def _leave_as_it_is(*_args: object, **_settings: object) -> None:
    """Do nothing: events run through the processors of the parent."""


def _caller() -> Any:
    """Return the frame that logged: the first outside of this file and of structlog."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] != "structlog":
            return frame
        frame = frame.f_back
    return None


class _NamedLogger:
    """What structlog wraps in a worker: it only carries the name that `get_logger(name)` was given."""

    def __init__(self, *args: Any) -> None:
        self.name = str(args[0]) if args else None

    def msg(self, *_args: Any, **_fields: Any) -> None:
        """Do nothing: the last processor has sent the event."""

    debug = info = warning = warn = error = critical = fatal = exception = failure = log = msg
