"""Crash: a death or an odd exception costs its own task at most."""

import os
import signal

import taskpool


class OddError(Exception):
    """What breaks other pools: `__init__` wants more than `args` has."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


def work(n: int) -> int:
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if n == 5:
        raise OddError("no such thing", 404)
    return n * n


with taskpool.Executor(max_workers=2) as pool:
    futures = [pool.submit(work, n) for n in range(8)]
    for n, future in enumerate(futures):
        error = future.exception()
        print(n, repr(error) if error else future.result())

crash, odd = futures[3].exception(), futures[5].exception()
assert isinstance(crash, taskpool.WorkerCrashedError)
assert crash.signal == "SIGKILL"
assert isinstance(odd, OddError)
assert odd.code == 404
assert "in work" in str(odd.__cause__)  # the worker's traceback
results = [futures[n].result() for n in (0, 1, 2, 4, 6, 7)]
assert results == [0, 1, 4, 16, 36, 49]
