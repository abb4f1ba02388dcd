"""Whether a task is tried again: retry policies, decided by tenacity. The only file that knows tenacity.

Tenacity's decision machine, `Retrying.iter(state)`, says after each attempt what comes next without sleeping itself. So
the decision is taken in the parent, the wait passes on the engine's clock, and no worker sleeps. tenacity is loaded
when a policy is made of its parts, or when a task with a policy fails for the first time.
"""

from __future__ import annotations

import contextlib
import logging
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from taskpool._checks import MAX_SECONDS, check_count, check_seconds
from taskpool._task import Failure, RawOutcome, Value
from taskpool.errors import NotSendableError

if TYPE_CHECKING:
    import tenacity
    from tenacity.stop import stop_base
    from tenacity.wait import wait_base

    On: TypeAlias = type[BaseException] | tuple[type[BaseException], ...] | tenacity.retry_base
    Retry: TypeAlias = "int | RetryPolicy | tenacity.Retrying | stop_base | wait_base | tenacity.retry_base"

logger = logging.getLogger("taskpool")

NOTED = 10  # failed attempts that the last error's note lists; of more, the latest
LONGEST_TEXT = 200  # characters of an error in that note


@attrs.frozen(slots=False)
class RetryPolicy:
    """When a task is tried again; made by `retry`.

    Attributes:
        attempts: How many attempts there are in all; None leaves that to `stop`.
        wait: Seconds between two attempts, or a wait strategy of tenacity.
        on: Which errors are worth another attempt, or a retry strategy of tenacity; None is every `Exception` but
            `NotSendableError`, which would only come again.
        stop: A stop strategy of tenacity, beside `attempts`.
        base: A `tenacity.Retrying` that decides everything, instead of all these.
    """

    attempts: int | None = 3
    wait: float | wait_base = 0.0
    on: On | None = None
    stop: stop_base | None = None
    base: tenacity.Retrying | None = None

    def judges(self, *, ok: bool) -> bool:
        """Whether it has a say in this outcome: an error always, a result only if its strategy looks at results."""
        return not ok or self._judges_results

    @cached_property
    def _judges_results(self) -> bool:
        strategy = self.on if self.base is None else self.base.retry
        if strategy is None or isinstance(strategy, type | tuple):
            return False
        import tenacity

        # Not by its class: a strategy of exceptions may well want another attempt after a result.
        return type(strategy).__call__ is not tenacity.retry_if_exception.__call__

    def retrying(self) -> tenacity.Retrying:
        """Return a decision machine for one task."""
        import tenacity

        if self.base is not None:
            return self.base.copy(reraise=False)
        return tenacity.Retrying(
            stop=self._stop(),
            wait=tenacity.wait_fixed(self.wait) if isinstance(self.wait, int | float) else self.wait,
            retry=self._condition(),
        )

    def _stop(self) -> Any:
        import tenacity

        stops: list[Any] = [] if self.attempts is None else [tenacity.stop_after_attempt(self.attempts)]
        stops += [] if self.stop is None else [self.stop]
        return tenacity.stop_any(*stops)

    def _condition(self) -> Any:
        import tenacity

        if self.on is None:
            return tenacity.retry_if_exception(_is_worth_it)
        if isinstance(self.on, type | tuple):
            return tenacity.retry_if_exception_type(self.on)
        return self.on


def _is_worth_it(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, NotSendableError)


def retry(
    attempts: int | None = None,
    *,
    wait: float | wait_base = 0.0,
    on: On | None = None,
    stop: stop_base | None = None,
) -> RetryPolicy:
    """Return a retry policy, for `retry=` of an executor, of `options`, and of the maps.

    Args:
        attempts: How many attempts there are in all, the first included; None is 3, or no limit of its own where
            `stop` is given.
        wait: Seconds between two attempts, or a wait strategy such as `tenacity.wait_exponential()`. Nobody sleeps
            meanwhile: the worker runs other tasks.
        on: The exceptions that are worth another attempt, such as `(OSError, TaskTimeoutError, WorkerCrashedError)`, or
            a retry strategy such as `tenacity.retry_if_result(...)`. None is every `Exception`, a passed limit and a
            crash included, but `NotSendableError`, which would only come again.
        stop: A stop strategy such as `tenacity.stop_after_delay(60)`; with `attempts`, whichever comes first.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is out of range.
    """
    if attempts is None and stop is None:
        attempts = 3
    return RetryPolicy(
        attempts=check_count(attempts, "attempts"), wait=_check_wait(wait), on=_check_on(on), stop=_check_stop(stop)
    )


def as_policy(value: object) -> RetryPolicy | None:
    """Return the policy that `retry=` means: None, a number of attempts, a policy, or a part of tenacity.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a number is out of range.
    """
    if value is None or isinstance(value, RetryPolicy):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return retry(check_count(value, "retry"))
    import tenacity

    if isinstance(value, tenacity.Retrying):
        return _as_whole(value)
    if isinstance(value, tenacity.stop.stop_base):
        return retry(stop=value)
    if isinstance(value, tenacity.wait.wait_base):
        return retry(wait=value)
    if isinstance(value, tenacity.retry_base):
        return retry(on=value)
    raise TypeError(
        "retry must be a number of attempts, taskpool.retry(...), a stop, wait or retry strategy of tenacity, a "
        f"tenacity.Retrying, or None, not {value!r}"
    )


def _as_whole(base: tenacity.Retrying) -> RetryPolicy | None:
    if not getattr(base, "enabled", True):  # older ones have no such switch
        return None
    policy = RetryPolicy(base=base)
    try:
        policy.retrying()
    except Exception as cause:
        raise TypeError(f"retry={base!r} cannot be copied for each task: {type(cause).__name__}: {cause}") from cause
    return policy


def _check_wait(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return check_seconds(value, "wait", none=False)
    import tenacity

    if isinstance(value, tenacity.wait.wait_base):
        return value
    raise TypeError(f"wait must be a number of seconds or a wait strategy of tenacity, not {value!r}")


def _check_on(value: Any) -> Any:
    kinds = value if isinstance(value, tuple) else (value,)
    if value is None or all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        return value
    import tenacity

    if isinstance(value, tenacity.retry_base):
        return value
    raise TypeError(f"on must be exception classes or a retry strategy of tenacity, not {value!r}")


def _check_stop(value: Any) -> Any:
    if value is None:
        return None
    import tenacity

    if isinstance(value, tenacity.stop.stop_base):
        return value
    raise TypeError(f"stop must be a stop strategy of tenacity, not {value!r}")


class Attempts:
    """The attempts of one task so far. User code runs in `decide`; one thread at a time calls it.

    Args:
        policy: Who decides.
        name: The task's name, for the log.
    """

    def __init__(self, policy: RetryPolicy, name: str) -> None:
        import tenacity

        self.number: int = 1  # of the attempt that was made last, or is being made
        self._name = name
        self._retrying = policy.retrying()
        self._state = tenacity.RetryCallState(self._retrying, None, (), {})
        self._failures: list[str] = []

    def decide(self, outcome: RawOutcome, seconds: float) -> tuple[float | None, RawOutcome]:
        """Decide what follows an attempt.

        Args:
            outcome: How it ended.
            seconds: How long it ran.

        Returns:
            (seconds until the next attempt, what stands if there is none after all), or (None, the outcome that stands).
        """
        value, error = outcome.decode()
        if self.number == 1:
            self._state.start_time = time.monotonic() - seconds  # what stops after a delay counts from the first start
        trace = None if error is None else error.__traceback__
        try:
            wait = self._ask(value, error)
        except _StandsError as stands:
            value, error, wait = stands.value, stands.error, None
        finally:
            if error is not None:
                error.__traceback__ = trace  # not the frames of this decision
        if wait is None:
            return None, Value(value) if error is None else self._noted(error)
        self._note_failure(error, wait)
        return wait, Value(value) if error is None else Failure(error)

    def _ask(self, value: Any, error: BaseException | None) -> float:
        """Return the seconds until the next attempt.

        Raises:
            _StandsError: If there is none; with what stands.
        """
        import tenacity

        self._retrying.begin()  # its statistics are this thread's, which may be another one than last time
        if error is None:
            self._state.set_result(value)
        else:
            self._state.set_exception((type(error), error, error.__traceback__))
        try:
            answer = self._retrying.iter(self._state)
        except tenacity.RetryError:  # the attempts are over: the last one stands
            raise _StandsError(value, error) from None
        except BaseException as raised:
            if raised is not error:
                logger.exception("the retry policy of task %s failed; the task is not tried again", self._name)
            raise _StandsError(value, error) from None
        if isinstance(answer, tenacity.DoSleep):
            self._state.prepare_for_next_attempt()
            return min(max(0.0, float(answer)), MAX_SECONDS)
        # What the machine itself made of it: the result, or what a `retry_error_callback` gave in place of an error.
        raise _StandsError(answer, None)

    def _note_failure(self, error: BaseException | None, wait: float) -> None:
        text = "a result that is not good enough" if error is None else _describe(error)
        logger.info("task %s: attempt %d ended with %s; the next one is in %g s", self._name, self.number, text, wait)
        self._failures.append(f"  attempt {self.number}: {text}")
        del self._failures[:-NOTED]
        self.number += 1

    def _noted(self, error: BaseException) -> Failure:
        """Have the last error say what came before it."""
        with contextlib.suppress(Exception):  # one that takes no notes
            if self.number > 1:
                error.add_note(f"this was attempt {self.number}; before it:\n" + "\n".join(self._failures))
        return Failure(error)


class _StandsError(Exception):
    """There is no further attempt; this stands."""

    def __init__(self, value: Any, error: BaseException | None) -> None:
        super().__init__()
        self.value = value
        self.error = error


def _describe(error: BaseException) -> str:
    try:
        text = str(error).strip().split("\n", 1)[0]
    except BaseException:
        text = "<its text could not be made>"
    return f"{type(error).__name__}: {text}"[:LONGEST_TEXT]
