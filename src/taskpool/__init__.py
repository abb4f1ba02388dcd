"""taskpool: run work in several processes, and nothing is lost, nothing hangs.

import taskpool

taskpool.map(fn, items, timeout=5)

with taskpool.Executor(max_workers=4, task_timeout=2) as pool:
    future = pool.submit(fn, 1)
    print(future.result())
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it; `typing` itself takes longer to load than all that stands here

if TYPE_CHECKING:
    from typing import Any

    from taskpool._calls import MapOptions as MapOptions
    from taskpool._calls import View as View
    from taskpool._current import CurrentTask as CurrentTask
    from taskpool._current import current_task as current_task
    from taskpool._default import imap as imap
    from taskpool._default import imap_unordered as imap_unordered
    from taskpool._default import map as map  # noqa: A004
    from taskpool._default import outcomes as outcomes
    from taskpool._default import starmap as starmap
    from taskpool._executor import Executor as Executor
    from taskpool._group import TaskGroup as TaskGroup
    from taskpool._outcome import Outcome as Outcome
    from taskpool._records import Capabilities as Capabilities
    from taskpool._records import RunningTask as RunningTask
    from taskpool._records import Stats as Stats
    from taskpool._retry import RetryPolicy as RetryPolicy
    from taskpool._retry import retry as retry
    from taskpool._share import Shared as Shared
    from taskpool._share import share as share
    from taskpool._task import TaskFuture as TaskFuture
    from taskpool.errors import CallTimeoutError as CallTimeoutError
    from taskpool.errors import ForkedExecutorError as ForkedExecutorError
    from taskpool.errors import InitializerError as InitializerError
    from taskpool.errors import NestingError as NestingError
    from taskpool.errors import NotSendableError as NotSendableError
    from taskpool.errors import QueueFullError as QueueFullError
    from taskpool.errors import RemoteError as RemoteError
    from taskpool.errors import TaskPoolError as TaskPoolError
    from taskpool.errors import TaskTimeoutError as TaskTimeoutError
    from taskpool.errors import UnpickleError as UnpickleError
    from taskpool.errors import UnsupportedError as UnsupportedError
    from taskpool.errors import WorkerCrashedError as WorkerCrashedError

# Where each public name lives. It is imported when it is first used, so that `import taskpool` costs next to nothing,
# in the workers above all.
_HOMES = {
    **dict.fromkeys(("map", "starmap", "imap", "imap_unordered", "outcomes"), "taskpool._default"),
    "Executor": "taskpool._executor",
    "View": "taskpool._calls",
    "MapOptions": "taskpool._calls",
    "Outcome": "taskpool._outcome",
    "retry": "taskpool._retry",
    "RetryPolicy": "taskpool._retry",
    "share": "taskpool._share",
    "Shared": "taskpool._share",
    "current_task": "taskpool._current",
    "CurrentTask": "taskpool._current",
    "TaskFuture": "taskpool._task",
    "TaskGroup": "taskpool._group",
    "Capabilities": "taskpool._records",
    "RunningTask": "taskpool._records",
    "Stats": "taskpool._records",
    **dict.fromkeys(
        (
            "CallTimeoutError",
            "ForkedExecutorError",
            "InitializerError",
            "NestingError",
            "NotSendableError",
            "QueueFullError",
            "RemoteError",
            "TaskPoolError",
            "TaskTimeoutError",
            "UnpickleError",
            "UnsupportedError",
            "WorkerCrashedError",
        ),
        "taskpool.errors",
    ),
}

__all__ = [  # noqa: RUF022  (what people look for first stands first)
    "map",
    "starmap",
    "imap",
    "imap_unordered",
    "outcomes",
    "retry",
    "share",
    "current_task",
    "Executor",
    "View",
    "TaskFuture",
    "Outcome",
    "MapOptions",
    "RetryPolicy",
    "Shared",
    "CurrentTask",
    "TaskGroup",
    "Stats",
    "RunningTask",
    "Capabilities",
    "CallTimeoutError",
    "ForkedExecutorError",
    "InitializerError",
    "NestingError",
    "NotSendableError",
    "QueueFullError",
    "RemoteError",
    "TaskPoolError",
    "TaskTimeoutError",
    "UnpickleError",
    "UnsupportedError",
    "WorkerCrashedError",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'taskpool' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
