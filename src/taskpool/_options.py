"""What holds for each task, and the one merge default -> executor -> view -> call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from taskpool._checks import check_limit, check_name, check_priority, check_seconds

if TYPE_CHECKING:
    from taskpool._retry import RetryPolicy


class TaskOptions(NamedTuple):
    """What holds for one call of a task. Times are in seconds.

    Attributes:
        task_timeout: The longest run of one task, from its start in a worker; None is no limit.
        grace: How long a task that is being stopped may take to clean up before its process is killed.
        name: The task's name in errors, logs and statistics; None names it after its function.
        priority: Tasks of a higher priority leave the queue first; equals first come, first served.
        submit_timeout: How long `submit` waits for a place when `max_pending` tasks are waiting; None has no bound.
        retry: When a task that failed is tried again; None is never.
    """

    task_timeout: float | None = None
    grace: float = 0.5
    name: str | None = None
    priority: int = 0
    submit_timeout: float | None = None
    retry: RetryPolicy | None = None

    def merge(self, changes: dict[str, Any]) -> TaskOptions:
        """Return these options with `changes` on top, each checked.

        Raises:
            TypeError: If an option is unknown or of a wrong type.
            ValueError: If a value is out of range.
        """
        checked: dict[str, Any] = {}
        for option, value in changes.items():
            check = _CHECKS.get(option)
            if check is None:
                raise TypeError(f"unknown option {option!r}; the options of a task are {', '.join(sorted(_CHECKS))}")
            checked[option] = check(value)
        return self._replace(**checked)


def _as_policy(value: object) -> RetryPolicy | None:
    if value is None:
        return None
    from taskpool._retry import as_policy

    return as_policy(value)


_CHECKS: dict[str, Any] = {
    "task_timeout": check_limit,
    "grace": lambda value: check_seconds(value, "grace", none=False),
    "name": check_name,
    "priority": check_priority,
    "submit_timeout": lambda value: check_seconds(value, "submit_timeout"),
    "retry": _as_policy,
}
