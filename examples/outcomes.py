"""Outcomes: a record for each item, and no failure costs another one."""

import os
import time

import taskpool


def work(n: int) -> int:
    if n == 2:
        raise ValueError(f"{n} is not welcome")
    if n == 5:
        os._exit(1)  # the process dies
    if n == 7:
        time.sleep(60)
    return n * n


failed = {}
for outcome in taskpool.outcomes(work, range(10), task_timeout=0.5):
    if outcome.ok:
        print(f"{outcome.item}: {outcome.value} in {outcome.seconds:.3f} s by {outcome.worker}")
    else:
        failed[outcome.item] = type(outcome.error)

assert failed == {
    2: ValueError,
    5: taskpool.WorkerCrashedError,
    7: taskpool.TaskTimeoutError,
}
