"""Limits: a task that runs too long is stopped, and says where it was."""

import contextlib
import time

import taskpool


def wait_for_a_reply() -> None:
    while True:
        with contextlib.suppress(BaseException):  # it will not listen
            time.sleep(60)


with taskpool.Executor(1, task_timeout=0.5, grace=0.2) as pool:
    stuck = pool.submit(wait_for_a_reply)
    behind_it = pool.submit(sum, [1, 2, 3])

    try:
        stuck.result()
    except taskpool.TaskTimeoutError as error:
        print(error)
        assert "wait_for_a_reply" in (error.stack or "")
    else:
        raise AssertionError("the task was not bounded")

    # The slot is usable again, and what waited behind the task runs.
    assert behind_it.result() == 6

    # Other limits for other tasks, on the same workers. None is no limit.
    patient = pool.options(task_timeout=30)
    assert patient.submit(time.sleep, 0.6).result() is None

# `timeout=` bounds a whole call. What it had started is stopped.
try:
    taskpool.map(time.sleep, [0, 60], timeout=0.5)
except taskpool.CallTimeoutError as error:
    print(error)
else:
    raise AssertionError("the call was not bounded")
